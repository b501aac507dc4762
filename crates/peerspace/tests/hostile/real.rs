//! The real devices, when what they stand on fails: a file's bytes change or vanish, its disk fills up, a bit of the
//! compressed store flips.

use super::*;
use peerspace::device::compressed::Compressed;
use peerspace::device::file::File;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// A space over a named file.
fn over_file(faults: Faults, path: &Path) -> Space {
    space(faults, HOST, File::open(path, Some(64 * MIB as u64)).unwrap())
}

#[test]
fn a_file_that_was_tampered_with_gives_errors_and_no_bytes() {
    // Whatever somebody else does to the file, the pages are right or lost.
    type Damage = fn(&fs::File, u64);
    let flip: Damage = |file, len| {
        for at in (4096 + 100..len).step_by(4096) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        }
    };
    let zero: Damage = |file, len| {
        for at in (4096..len).step_by(4096) {
            file.write_all_at(&[0; 4096], at).unwrap();
        }
    };
    let swap: Damage = |file, len| {
        let mut all = vec![0; len as usize - 4096];
        file.read_exact_at(&mut all, 4096).unwrap();
        all.rotate_left(4096);
        file.write_all_at(&all, 4096).unwrap();
    };
    let cut: Damage = |file, _| file.set_len(4096).unwrap();
    for (i, damage) in [flip, zero, swap, cut].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pages");
        let space = over_file(BOTH[i % 2], &path);
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        push_out(&space, 2 * HOST);
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        damage(&file, file.metadata().unwrap().len());
        let lost = verify(&region, word);
        assert!(lost.len() > SIZE / page() / 2, "damage {i} was not found: {} pages lost", lost.len());
        space.check();
    }
}

#[test]
fn a_file_put_back_as_it_was_gives_errors_and_no_old_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let space = over_file(Faults::Signal, &path);
    let mut region = space.region(SIZE as u64).unwrap();
    fill(region.typed_mut());
    push_out(&space, 2 * HOST);
    let old = fs::read(&path).unwrap();
    let again = |i: usize| word(i + 500_000);
    for (i, p) in region.typed_mut::<u64>().chunks_exact_mut(words_per_page()).enumerate() {
        p.fill(again(i));
    }
    push_out(&space, 2 * HOST);
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&old, 0).unwrap();
    let lost = verify(&region, again);
    assert!(lost.len() > SIZE / page() / 4, "{} pages lost", lost.len());
}

/// Runs `work` in a small file system of its own.
fn in_tmpfs(mib: usize, work: impl FnOnce(&Path)) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can mount a file system");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "none"]).arg(dir.path());
    if !mount.status().is_ok_and(|s| s.success()) {
        return eprintln!("skipped: cannot mount a tmpfs");
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(dir.path())));
    let gone = Command::new("umount").arg(dir.path()).status();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
    assert!(gone.unwrap().success(), "somebody still holds a file");
}

#[test]
fn a_disk_that_fills_up_meanwhile_loses_nothing() {
    for (i, next) in [(0, true), (1, false), (2, false), (3, true)] {
        in_tmpfs(16, |at| {
            let file = File::open(at, Some(12 * MIB as u64)).unwrap();
            catch_lost_accesses();
            let mut builder = Space::builder().host(HOST as u64).faults(BOTH[i % 2]).device(file);
            if next {
                builder = builder.device(Soft::new(64 * MIB as u64).unwrap());
            }
            let space = builder.build().unwrap();
            let mut region = space.region(SIZE as u64).unwrap();
            fill(&mut region.typed_mut()[..SIZE / 16]);
            // Somebody else takes the rest of the disk, in the middle of it all.
            let mut other = fs::File::create(at.join("other")).unwrap();
            while other.write(&[1; 64 << 10]).is_ok_and(|n| n > 0) {}
            fill(region.typed_mut());
            assert_eq!(verify(&region, word), NONE);
            let s = space.statistics();
            assert!(s.devices[0].stores > 0 && s.poisoned == 0, "{s:?}");
            assert_eq!(s.forced_bytes > 0, !next, "{s:?}");
            // There is room again: it is used.
            drop(other);
            fs::remove_file(at.join("other")).unwrap();
            let stored = s.devices[0].stores;
            let again = |i: usize| word(i + 7);
            for (i, p) in region.typed_mut::<u64>().chunks_exact_mut(words_per_page()).enumerate() {
                p.fill(again(i));
            }
            push_out(&space, 3 * HOST);
            assert_eq!(verify(&region, again), NONE);
            assert!(next || space.statistics().devices[0].stores > stored, "{:?}", space.statistics());
            space.check();
        });
    }
}

/// Changes a byte wherever `needle` lies in memory of this process that is not in `except`. Returns how often it did.
fn damage_memory(needle: &[u8], except: std::ops::Range<usize>) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut memory = fs::File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    let mut found = 0;
    let mut piece = vec![0; 4 * MIB];
    let own = [piece.as_ptr_range(), needle.as_ptr_range()].map(|r| r.start.addr()..r.end.addr());
    for line in maps.lines().filter(|l| l.contains(" rw-p ") && !l.contains('/') && !l.contains("[stack]")) {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, end].map(|x| usize::from_str_radix(x, 16).unwrap());
        if start < except.end && except.start < end {
            continue;
        }
        for at in (start..end).step_by(piece.len()) {
            let n = piece.len().min(end - at);
            memory.seek(SeekFrom::Start(at as u64)).unwrap();
            if memory.read_exact(&mut piece[..n]).is_err() {
                continue;
            }
            let mut from = 0;
            while let Some(i) = find(&piece[from..n], needle) {
                let hit = at + from + i + needle.len() / 2;
                if !own.iter().any(|r| r.contains(&hit)) {
                    memory.seek(SeekFrom::Start(hit as u64)).unwrap();
                    memory.write_all(&[needle[needle.len() / 2] ^ 1]).unwrap();
                    found += 1;
                }
                from += i + 1;
            }
        }
    }
    found
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    // SAFETY: both are slices, with their lengths.
    let hit = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), needle.as_ptr().cast(), needle.len()) };
    (!hit.is_null()).then(|| hit.addr() - bytes.as_ptr().addr())
}

#[test]
fn a_bit_that_flips_in_the_compressed_store_is_found() {
    let output = in_process("real::flipped_bit", &[]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn flipped_bit() {
    let space = space(Faults::Signal, HOST, Compressed::new(64 * MIB as u64).unwrap());
    let mut region = space.region(SIZE as u64).unwrap();
    // A quarter of each page cannot be compressed, and is stored as it is.
    let noise = |i: usize| {
        let mut x = word(i);
        std::iter::repeat_with(move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        })
    };
    for (i, p) in region.typed_mut::<u64>().chunks_exact_mut(words_per_page()).enumerate() {
        p[..128].iter_mut().zip(noise(i)).for_each(|(w, x)| *w = x);
    }
    push_out(&space, 2 * HOST);
    let target = 77;
    let needle: Vec<u8> = noise(target).skip(40).take(8).flat_map(u64::to_le_bytes).collect();
    let at = region.as_ptr().addr();
    assert!(damage_memory(&needle, at..at + region.len()) > 0, "the store does not have the page");
    let e = region.try_read(target * page(), &mut [0; 100]).unwrap_err();
    assert!(matches!(&e, Error::Lost { device, .. } if device == "compressed"), "{e}");
    for i in (0..SIZE / page()).filter(|i| *i != target) {
        let p = &region.typed::<u64>()[i * words_per_page()..][..words_per_page()];
        assert!(p[..128].iter().copied().eq(noise(i).take(128)) && p[128..].iter().all(|w| *w == 0), "page {i}");
    }
    assert_eq!(space.statistics().poisoned, 1);
}
