//! Regions that outlive the process (rule Z5): found by name after a restart, whole after a crash, refused when the device is
//! not what it was.

mod common;

use common::*;
use peerspace::device::dax::{Dax, DaxError, NamesError};
use peerspace::device::soft::Soft;
use peerspace::{DeviceId, Error, Faults, Persistent, Space, Use};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn store() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    (directory, path)
}

/// A space with the device at `path`, which is made with 32 MiB if it is not there.
fn opened(faults: Faults, path: &Path) -> (Space, DeviceId) {
    let space = space(faults, 8 * MIB, Soft::new(mib(32)).unwrap());
    let size = (!path.exists()).then_some(mib(32));
    let device = space.attach(Dax::persistent(path, size).unwrap()).unwrap();
    (space, device)
}

#[test]
fn z5_regions_come_back_by_name_after_a_restart() {
    for faults in [Faults::Signal, Faults::Threads] {
        let (_directory, path) = store();
        {
            let (space, device) = opened(faults, &path);
            let mut first = space.create_persistent(device, "first", mib(5) + 3).unwrap();
            let mut second = space.create_persistent(device, "the second", mib(2)).unwrap();
            assert_eq!((first.len(), second.len()), (5 * MIB + 3, 2 * MIB));
            assert!(first.bytes().iter().all(|b| *b == 0));
            fill(first.typed_mut());
            second.bytes_mut().fill(7);
            // In place: no fault, no RAM of the budget, no transfer.
            let s = space.statistics();
            assert_eq!((s.faults.total, s.used_bytes), (0, s.standby_bytes));
            assert_eq!((s.devices[1].memory, s.devices[1].loads + s.devices[1].stores), ("persistent", 0));
            assert_eq!(s.devices[1].in_place_bytes as usize, 8 * MIB);
            space.check();
            first.flush(0..first.len()).unwrap();
        }
        let (space, device) = opened(faults, &path);
        assert_eq!(
            space.persistent_regions(device).unwrap(),
            [("first".into(), mib(5) + 3), ("the second".into(), mib(2))]
        );
        let mut first = space.open_persistent(device, "first").unwrap();
        let second = space.open_persistent(device, "the second").unwrap();
        let pages = first.typed::<u64>().chunks_exact(words_per_page());
        assert!(pages.enumerate().all(|(i, p)| p.iter().all(|w| *w == word(i))));
        assert!(second.bytes().iter().all(|b| *b == 7));
        first.try_write(4 * MIB, b"typed").unwrap();
        let mut out = [0; 5];
        first.try_read(4 * MIB, &mut out).unwrap();
        assert_eq!(&out, b"typed");
        // What is there stays there, also when somebody relies on it.
        let held = space.make_resident(first.as_ptr(), BLOCK, Use::Write).unwrap();
        assert_eq!(space.statistics().devices[1].in_place_bytes as usize, 8 * MIB);
        drop(held);
        // Closed and removed, its room is free for the next, which sees nothing of it.
        drop(second);
        space.remove_persistent(device, "the second").unwrap();
        let third = space.create_persistent(device, "third", mib(2)).unwrap();
        assert!(third.bytes().iter().all(|b| *b == 0));
        space.check();
    }
}

/// Regions with names are pieces of memory in place like any others: closed, they leave room for as many as before.
#[test]
fn z5_other_memory_goes_on_moving_when_a_region_was_closed() {
    let (_directory, path) = store();
    let (space, device) = opened(Faults::Signal, &path);
    let far = space.attach(Dax::memory(mib(8)).unwrap()).unwrap();
    let mut region = space.region(mib(4)).unwrap();
    region.bytes_mut().fill(3);
    for round in 0..3 {
        // Whole, and in pieces that do not follow each other on the device.
        let [a, b, c] = ["a", "b", "c"].map(|name| space.create_persistent(device, name, mib(4)).unwrap());
        drop(b);
        space.remove_persistent(device, "b").unwrap();
        drop(c);
        let apart = space.create_persistent(device, "apart", mib(20)).unwrap();
        assert_eq!(region.migrate_to(0..region.len(), far).unwrap(), region.len(), "round {round}");
        drop((a, apart));
        assert_eq!(region.migrate_home(0..region.len()).unwrap(), region.len());
        assert_eq!(region.migrate_to(0..region.len(), far).unwrap(), region.len(), "round {round}");
        assert_eq!(region.migrate_home(0..region.len()).unwrap(), region.len());
        ["a", "c", "apart"].iter().for_each(|name| space.remove_persistent(device, name).unwrap());
    }
    assert!(region.bytes().iter().all(|b| *b == 3));
    space.check();
}

#[test]
fn what_cannot_be_is_said() {
    let (_directory, path) = store();
    let (space, device) = opened(Faults::Signal, &path);
    let log = space.create_persistent(device, "log", mib(4)).unwrap();
    let says = |result: Result<Persistent, Error>, what: &str| {
        let e = result.map(|p| p.len()).unwrap_err().to_string();
        assert!(e.contains(what), "{e}");
    };
    says(space.create_persistent(device, "log", 1), "already");
    says(space.open_persistent(device, "log"), "open already");
    says(space.open_persistent(device, "lock"), "no region of that name");
    says(space.create_persistent(device, "", 1), "name");
    says(space.create_persistent(device, "empty", 0), "0 bytes");
    says(space.create_persistent(device, "huge", mib(4000)), "blocks");
    says(space.create_persistent(space.devices()[0], "log", 1), "not persistent");
    let open = space.remove_persistent(device, "log").unwrap_err();
    assert!(open.to_string().contains("drop it first"), "{open}");
    let busy = space.detach(device).unwrap_err();
    assert!(busy.to_string().contains("drop them first"), "{busy}");
    assert!(matches!(log.flush(5..mib(4) as usize + 1), Err(Error::BadRange { .. })));
    // Other memory does not go there.
    let region = space.region(mib(4)).unwrap();
    let refused = region.migrate_to(0..region.len(), device).unwrap_err();
    assert!(refused.to_string().contains("regions that have names"), "{refused}");
    let second = Dax::persistent(&path, None).unwrap_err();
    assert!(matches!(second, DaxError::InUse { .. }), "{second}");
    drop(log);
    space.detach(device).unwrap();
    assert!(matches!(space.open_persistent(device, "log"), Err(Error::NoSuchDevice)));
    // The file is free again.
    Dax::persistent(&path, None).unwrap();
}

/// A size that is no number of whole blocks is the same one the second time; what cannot be opened is not made either.
#[test]
fn z5_what_fails_changes_nothing_and_what_is_there_is_found_again() {
    let (_directory, path) = store();
    for _ in 0..2 {
        Dax::persistent(&path, Some(mib(33) + 5)).unwrap();
    }
    let e = Dax::persistent(&path, Some(mib(34))).unwrap_err();
    assert!(matches!(e, DaxError::Truncated { .. }), "{e}");
    std::fs::remove_file(&path).unwrap();
    let space = space(Faults::Signal, 8 * MIB, Soft::new(mib(32)).unwrap());
    // Descriptors of one block: no more can be in use at once.
    let dax = Dax::options().size(mib(16)).altmap(3 * page() as u64).persistent(&path).unwrap();
    let device = space.attach(dax).unwrap();
    let e = space.create_persistent(device, "log", mib(8)).unwrap_err();
    assert!(e.to_string().contains("has no room in the altmap"), "{e}");
    assert_eq!(space.persistent_regions(device).unwrap(), []);
    space.create_persistent(device, "log", mib(2)).unwrap();
    let link = path.with_file_name("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let e = Dax::persistent(&link, Some(mib(16))).unwrap_err();
    assert!(e.to_string().contains("symbolic link"), "{e}");
    space.check();
}

/// What a device says that is not what it was, and that it is not touched.
#[test]
fn files_that_do_not_fit_are_refused_with_what_was_found() {
    let (_directory, path) = store();
    {
        let (space, device) = opened(Faults::Signal, &path);
        space.create_persistent(device, "log", mib(4)).unwrap().bytes_mut().fill(5);
    }
    let good = std::fs::read(&path).unwrap();
    let refused = |what: &str, break_it: &dyn Fn(&std::fs::File)| {
        std::fs::write(&path, &good).unwrap();
        break_it(&std::fs::File::options().write(true).open(&path).unwrap());
        let before = std::fs::read(&path).unwrap();
        let e = Dax::persistent(&path, None).unwrap_err();
        assert!(e.to_string().contains(what) && e.to_string().contains("store"), "{e}");
        assert!(before == std::fs::read(&path).unwrap(), "it was not touched");
        e
    };
    let e = refused("cut short", &|f| f.set_len(mib(20)).unwrap());
    assert!(matches!(e, DaxError::Names { why: NamesError::Truncated { .. }, .. }), "{e:?}");
    refused("version 9", &|f| f.write_all_at(&9u32.to_le_bytes(), 16).unwrap());
    refused("checksum", &|f| f.write_all_at(&[good[50] ^ 4], 50).unwrap());
    refused("something else", &|f| f.write_all_at(b"somebody's file ", 0).unwrap());
    refused("device size", &|f| f.set_len(mib(40)).unwrap());
    let e = Dax::open(&path, None).unwrap_err();
    assert!(matches!(e, DaxError::Persistent { .. } | DaxError::Foreign { .. }), "{e}");
    std::fs::write(&path, &good).unwrap();
    let e = Dax::open(&path, None).unwrap_err();
    assert!(matches!(e, DaxError::Persistent { .. }), "{e}");
    let (space, device) = opened(Faults::Signal, &path);
    assert!(space.open_persistent(device, "log").unwrap().bytes().iter().all(|b| *b == 5));
    for (bad, what) in [
        (Dax::persistent(path.parent().unwrap(), Some(mib(32))), "directory"),
        (Dax::persistent("/dev/zero", Some(mib(32))), "device node"),
        (Dax::persistent(path.parent().unwrap().join("none"), None), "has no size"),
        (Dax::persistent(path.parent().unwrap().join("small"), Some(4096)), "too few"),
        (Dax::options().size(mib(8)).altmap(mib(9)).memory(), "altmap does not fit"),
        (Dax::options().size(mib(8)).altmap(77).memory(), "whole pages"),
        (Dax::open("/nowhere/at/all", Some(mib(8))), "/nowhere/at/all"),
        (Dax::open("/dev/dax77.7", Some(mib(8))), "cannot find /dev/dax77.7"),
    ] {
        let e = bad.unwrap_err();
        assert!(e.to_string().contains(what), "{e}");
    }
    assert!(!path.parent().unwrap().join("small").exists(), "what was made on trial is gone");
}

#[test]
fn z9_a_device_that_has_failed_is_refused_and_its_bytes_are_lost() {
    let (_directory, path) = store();
    let (space, device) = opened(Faults::Signal, &path);
    let mut log = space.create_persistent(device, "log", mib(4)).unwrap();
    log.bytes_mut().fill(1);
    space.fail(device).unwrap();
    assert!(matches!(log.try_read(77, &mut [0; 9]), Err(Error::Lost { .. })));
    if CAN_TRY {
        assert_eq!(read_byte(log.bytes().as_ptr()), None);
    }
    assert!(log.flush(0..5).unwrap_err().to_string().contains("failed"));
    assert!(space.open_persistent(device, "log").unwrap_err().to_string().contains("failed"));
    drop(log);
    space.check();
}

/// G12: the same memory for both, as the kernel shares what is mapped shared; the names belong to one of them.
#[test]
fn g12_a_forked_process_has_the_same_memory() {
    for faults in [Faults::Signal, Faults::Threads] {
        let (_directory, path) = store();
        let (space, device) = opened(faults, &path);
        let mut log = space.create_persistent(device, "log", mib(4)).unwrap();
        log.bytes_mut()[5] = 1;
        // SAFETY: the child only reads, writes and ends.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let child = || {
                let fine = log.bytes()[5] == 1;
                log.bytes_mut()[6] = 2;
                let refused = space.create_persistent(device, "more", 1).is_err();
                drop(log);
                space.check();
                fine && refused
            };
            let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the process.
            unsafe { libc::_exit(!matches!(fine, Ok(true)) as i32) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0, "the child failed");
        assert_eq!(log.bytes()[5..7], [1, 2]);
        space.create_persistent(device, "more", 1).unwrap();
        space.check();
    }
}

// --- crashes ---

/// Records of one page each: what a page holds when it is whole.
fn record(name: u64, page: usize, version: u64) -> Vec<u64> {
    (0..words_per_page() as u64).map(|i| name << 48 ^ (page as u64) << 32 ^ version << 12 ^ i).collect()
}

/// Writes pages and flushes them, and says so; makes regions and removes them. Until it is killed.
#[test]
#[ignore = "runs in a process of its own, which is killed"]
fn writer() {
    let path = PathBuf::from(std::env::var("STORE").unwrap());
    let mut x: u64 = std::env::var("SEED").unwrap().parse().unwrap();
    let (space, device) = opened(Faults::Signal, &path);
    let mut out = std::io::stdout();
    let mut say = |what: String| {
        // At once, in one piece.
        out.write_all(format!("#{what}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    };
    let there = space.persistent_regions(device).unwrap();
    let mut open: Vec<(u64, Persistent, Vec<u64>)> = there
        .iter()
        .map(|(name, _)| {
            let region = space.open_persistent(device, name).unwrap();
            let next = region.typed::<u64>().chunks_exact(words_per_page()).map(|_| 1000).collect();
            (name.parse().unwrap(), region, next)
        })
        .collect();
    loop {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let r = x >> 33;
        match r % 16 {
            0 if open.len() < 6 => {
                let name = r % 97;
                if open.iter().any(|(n, ..)| *n == name) {
                    continue;
                }
                say(format!("making {name}"));
                let Ok(region) = space.create_persistent(device, &name.to_string(), BLOCK as u64 * (1 + r % 3))
                else {
                    continue;
                };
                assert!(region.bytes().iter().all(|b| *b == 0), "a new region is zeros");
                say(format!("made {name}"));
                let pages = region.len() / page();
                open.push((name, region, vec![1; pages]));
            }
            1 if open.len() > 2 => {
                let (name, region, _) = open.swap_remove((r / 16) as usize % open.len());
                drop(region);
                say(format!("removing {name}"));
                space.remove_persistent(device, &name.to_string()).unwrap();
                say(format!("removed {name}"));
            }
            _ if !open.is_empty() => {
                let which = (r / 16) as usize % open.len();
                let (name, region, next) = &mut open[which];
                // A page that was flushed is not written again: pages are written in turn, and what is not flushed yet
                // may be torn.
                let page_nr = (r / 512) as usize % next.len();
                let version = next[page_nr];
                if version % 2 == 0 {
                    continue;
                }
                let words = words_per_page();
                region.typed_mut::<u64>()[page_nr * words..(page_nr + 1) * words]
                    .copy_from_slice(&record(*name, page_nr, version));
                region.flush(page_nr * page()..(page_nr + 1) * page()).unwrap();
                say(format!("flushed {name} {page_nr} {version}"));
                next[page_nr] += 1;
            }
            _ => {}
        }
    }
}

/// Kills the writer at random moments, again and again on the same device: each flushed page is whole, and the names are
/// those before or after what was under way.
#[test]
fn z5_a_crash_at_any_moment_leaves_each_flushed_page_whole() {
    let (_directory, path) = store();
    // Name -> page -> version, as far as it was flushed.
    let mut flushed: std::collections::BTreeMap<u64, std::collections::BTreeMap<usize, u64>> = Default::default();
    let (mut kills, mut pages) = (0, 0);
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--ignored", "--nocapture", "--test-threads=1"])
            .env("STORE", &path)
            .env("SEED", (round * 7919 + 1).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            // What the harness says of the test comes before the first line, in the same one.
            let said = |line: String| line.find('#').map(|at| line[at..].to_string());
            BufReader::new(stdout).lines().map_while(Result::ok).filter_map(said).collect::<Vec<_>>()
        });
        std::thread::sleep(Duration::from_millis(60 + round * 37 % 190));
        child.kill().unwrap();
        let said = child.wait_with_output().unwrap();
        assert_eq!(said.status.signal(), Some(9), "{}", String::from_utf8_lossy(&said.stderr));
        let lines = reader.join().unwrap();
        kills += 1;
        let mut under_way = None;
        for line in &lines {
            let words: Vec<&str> = line[1..].split(' ').collect();
            let number = |i: usize| words[i].parse::<u64>().unwrap();
            match words[0] {
                "making" | "removing" => under_way = Some(number(1)),
                "made" => {
                    flushed.insert(number(1), Default::default());
                    under_way = None;
                }
                "removed" => {
                    flushed.remove(&number(1));
                    under_way = None;
                }
                "flushed" => {
                    flushed.get_mut(&number(1)).unwrap().insert(number(2) as usize, number(3));
                    under_way = None;
                }
                other => panic!("{other}"),
            }
        }
        let (space, device) = opened(Faults::Signal, &path);
        let names: Vec<u64> =
            space.persistent_regions(device).unwrap().iter().map(|(n, _)| n.parse().unwrap()).collect();
        for name in &names {
            assert!(flushed.contains_key(name) || under_way == Some(*name), "{name} was never made");
        }
        let gone: Vec<u64> = flushed.keys().copied().filter(|n| !names.contains(n)).collect();
        assert!(gone.iter().all(|n| under_way == Some(*n)), "{gone:?} are gone");
        gone.iter().for_each(|n| drop(flushed.remove(n)));
        for name in names {
            let region = space.open_persistent(device, &name.to_string()).unwrap();
            let known = flushed.entry(name).or_default();
            for (page_nr, version) in known.iter() {
                let words = words_per_page();
                let found = &region.typed::<u64>()[page_nr * words..(page_nr + 1) * words];
                assert!(found == record(name, *page_nr, *version), "page {page_nr} of {name} is torn");
                pages += 1;
            }
        }
        space.check();
    }
    println!("{kills} kills, {pages} pages looked at");
    assert!(pages > 100, "only {pages} pages were flushed in {kills} lives");
}
