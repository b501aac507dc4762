//! Memory of coherent devices, in place at the program's own addresses (rule Z5): sent there, used, and brought home, under
//! readers and writers that must not notice.

mod common;

use common::*;
use peerspace::device::dax::{Dax, DaxError};
use peerspace::device::soft::Soft;
use peerspace::{Error, Faults, Region, Use};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Mappings that the region is made of.
fn mappings(region: &Region) -> usize {
    let start = region.as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ranges = maps.lines().filter_map(|line| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
    });
    ranges.filter(|(from, to)| *from < start + region.len() && *to > start).count()
}

fn there_and_back(faults: Faults) {
    let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(64)).unwrap());
    // More than RAM: some of it is mapped, some on standby, some on the other device, in whole blocks and in pages.
    let mut region = filled(&space, 48 * MIB);
    assert_sent(&region, 0..region.len(), far, region.len());
    assert_eq!(in_place(&space, 1), region.len());
    assert_eq!(mappings(&region), 1, "what follows each other is one");
    space.check();
    // Faults never migrate it: there are none.
    let faults = space.statistics().faults.total;
    assert!(is_filled(&region));
    region.bytes_mut()[3 * BLOCK + 17] = 99;
    assert_eq!(space.statistics().faults.total, faults);
    assert_eq!(space.statistics().devices[0].used_bytes, space.statistics().devices[0].peak_bytes);
    // Again is no work.
    assert_sent(&region, 0..region.len(), far, region.len());
    assert_eq!(region.migrate_home(0..region.len()).unwrap(), region.len());
    assert_eq!(in_place(&space, 1), 0);
    assert_eq!(region.bytes()[3 * BLOCK + 17], 99);
    region.bytes_mut()[3 * BLOCK + 17] = word(3 * BLOCK / page()).to_ne_bytes()[1];
    assert!(is_filled(&region));
    space.check();
    let s = space.statistics();
    assert!(s.peak_bytes <= s.limit_bytes, "RAM in use: {} of {}", s.peak_bytes, s.limit_bytes);
    // Nothing of it is left there.
    space.detach(far).unwrap();
}

#[test]
fn z5_blocks_go_to_a_coherent_device_and_come_home_by_signal() {
    there_and_back(Faults::Signal);
}

#[test]
fn z5_blocks_go_to_a_coherent_device_and_come_home_by_threads() {
    there_and_back(Faults::Threads);
}

/// Threads count in memory that moves: a word that is zero, or one that was there before, is found at once.
fn under_load(faults: Faults) {
    const THREADS: usize = 3;
    let (space, far) = with_dax(faults, 8 * MIB, Dax::memory(mib(32)).unwrap());
    let region = space.region(mib(16)).unwrap();
    let (pages, words) = (region.len() / page(), words_per_page());
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let memory = region.as_ptr() as usize;
    let count = |thread: usize| {
        // SAFETY: the region lives as long as the threads, and each word has one that writes it.
        let cell = |i: usize| unsafe { &*(memory as *const AtomicU64).add(i * words + thread) };
        let mut n = 0;
        while !stop.load(Relaxed) || n < 2 {
            for i in (thread..pages).step_by(7) {
                assert_eq!(cell(i).load(Relaxed), n, "page {i} of thread {thread}");
                cell(i).store(n + 1, Relaxed);
            }
            n += 1;
            rounds.fetch_add(1, Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(move || count(t))).collect();
        let (begin, mut i, mut moved) = (Instant::now(), 0usize, 0);
        // On a busy machine little may have moved by then.
        let enough = |moved| begin.elapsed() >= Duration::from_secs(if moved > 8 * BLOCK { 3 } else { 60 });
        while !enough(moved) && threads.iter().all(|t| !t.is_finished()) {
            let first = i * 5 % 8;
            let part = first * BLOCK..(first + 1 + i % 3).min(8) * BLOCK;
            moved += match i % 4 {
                0 | 2 => region.migrate_to(part, far).unwrap(),
                1 => region.migrate_home(part).unwrap(),
                // What is kept resident is migrated out.
                _ => {
                    let held =
                        space.make_resident(&raw const region.bytes()[first * BLOCK], page(), Use::Write).unwrap();
                    assert_sent(&region, first * BLOCK..(first + 1) * BLOCK, far, 0);
                    drop(held);
                    BLOCK
                }
            };
            i += 1;
        }
        stop.store(true, Relaxed);
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(moved > 8 * BLOCK, "{moved} bytes moved in {i} steps");
    });
    space.check();
    assert_eq!(space.statistics().poisoned, 0);
}

#[test]
fn z5_nobody_notices_that_memory_moves_by_signal() {
    under_load(Faults::Signal);
}

#[test]
fn z5_nobody_notices_that_memory_moves_by_threads() {
    under_load(Faults::Threads);
}

#[test]
fn z5_a_pin_migrates_out_and_what_is_pinned_stays() {
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(16)).unwrap());
    let region = filled(&space, 4 * BLOCK);
    assert_sent(&region, 0..region.len(), far, region.len());
    let held = space.make_resident(&raw const region.bytes()[BLOCK + 5000], 1, Use::Read).unwrap();
    assert_eq!(in_place(&space, 1), 3 * BLOCK);
    // It is in RAM, and not sent away.
    assert_sent(&region, 0..region.len(), far, 3 * BLOCK);
    space.check();
    drop(held);
    assert_sent(&region, 0..region.len(), far, 4 * BLOCK);
    assert!(is_filled(&region));
}

#[test]
fn g8_what_is_discarded_is_zero_wherever_it_was() {
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(16)).unwrap());
    let mut region = filled(&space, 4 * BLOCK);
    assert_sent(&region, 0..region.len(), far, region.len());
    // Half of the first block, all of the second, and a page of the third.
    region.discard(BLOCK / 2..2 * BLOCK + page()).unwrap();
    assert_eq!(in_place(&space, 1), 3 * BLOCK, "blocks that are meant in part stay in place");
    // The news of it is acted on a moment after it was received.
    let used = || space.statistics().devices[1].used_bytes as usize;
    let begin = Instant::now();
    while used() > 3 * BLOCK && begin.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
    }
    assert_eq!(used(), 3 * BLOCK);
    let pages = region.typed::<u64>().chunks_exact(words_per_page());
    for (i, p) in pages.enumerate() {
        let at = i * page();
        let want = if (BLOCK / 2..2 * BLOCK + page()).contains(&at) { 0 } else { word(i) };
        assert!(p.iter().all(|w| *w == want), "page {i}");
    }
    space.check();
    drop(region);
    assert_eq!(in_place(&space, 1), 0);
    space.check();
    // A new region at the same addresses sees nothing of it.
    let region = space.region(4 * BLOCK as u64).unwrap();
    assert!(region.bytes().iter().all(|b| *b == 0));
}

#[test]
fn z3_a_device_with_memory_in_place_is_detached() {
    for faults in [Faults::Signal, Faults::Threads] {
        let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(32)).unwrap());
        let region = filled(&space, 12 * BLOCK);
        assert_sent(&region, 0..10 * BLOCK, far, 10 * BLOCK);
        space.detach(far).unwrap();
        assert!(is_filled(&region));
        space.check();
    }
}

#[test]
fn z9_a_device_that_has_failed_takes_exactly_its_pages_along() {
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(16)).unwrap());
    let mut region = filled(&space, 4 * BLOCK);
    assert_sent(&region, BLOCK..3 * BLOCK, far, 2 * BLOCK);
    space.fail(far).unwrap();
    assert_eq!(in_place(&space, 1), 0, "nobody goes on to use it");
    let mut byte = [0];
    for (i, at) in (0..region.len()).step_by(page()).enumerate() {
        let lost = (BLOCK..3 * BLOCK).contains(&at);
        match region.try_read(at, &mut byte) {
            Err(Error::Lost { device, .. }) => assert!(lost && device == "dax", "page {i}"),
            Ok(()) => assert!(!lost && byte[0] == word(i).to_ne_bytes()[0], "page {i}"),
            Err(e) => panic!("page {i}: {e}"),
        }
        if CAN_TRY && i % 100 == 0 {
            assert_eq!(read_byte(&raw const region.bytes()[at]).is_none(), lost);
        }
    }
    region.discard(BLOCK..3 * BLOCK).unwrap();
    assert!(region.bytes()[BLOCK..3 * BLOCK].iter().all(|b| *b == 0));
    space.check();
}

/// What is read and written with errors instead of signals works in place, and says what a file that was cut short has lost.
#[test]
fn z9_a_file_that_is_cut_short_loses_what_was_cut_off() {
    for faults in [Faults::Signal, Faults::Threads] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("far");
        let (space, far) = with_dax(faults, 16 * MIB, Dax::open(&path, Some(mib(16))).unwrap());
        let mut region = filled(&space, 4 * BLOCK);
        assert_sent(&region, 0..region.len(), far, region.len());
        region.try_write(BLOCK + 100, b"in place").unwrap();
        let mut out = [0; 8];
        region.try_read(BLOCK + 100, &mut out).unwrap();
        assert_eq!(&out, b"in place");
        assert_eq!(in_place(&space, 1), 4 * BLOCK, "a copy in or out is no pin");
        // The first block of the file is the device's own; then follow ours.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len((BLOCK + 3 * BLOCK) as u64).unwrap();
        region.try_read(BLOCK + 100, &mut out).unwrap();
        assert_eq!(&out, b"in place");
        for _ in 0..2 {
            let lost = region.try_read(3 * BLOCK, &mut out);
            assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
        }
        if CAN_TRY {
            assert_eq!(read_byte(&raw const region.bytes()[3 * BLOCK + page()]), None);
            assert!(read_byte(&raw const region.bytes()[2 * BLOCK]).is_some());
        }
        space.check();
    }
}

/// G12: what is in place has been moved before two processes could share it.
fn forked(faults: Faults) {
    let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(32)).unwrap());
    let mut region = filled(&space, 8 * BLOCK);
    assert_sent(&region, 0..6 * BLOCK, far, 6 * BLOCK);
    // SAFETY: the child only reads, writes and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let child = || {
            let fine = is_filled(&region);
            // It has a device of its own, under the same name.
            let moved = region.migrate_to(0..4 * BLOCK, far).is_ok_and(|n| n == 4 * BLOCK);
            region.bytes_mut().fill(1);
            std::thread::sleep(Duration::from_millis(50));
            space.check();
            fine && moved && region.bytes().iter().all(|b| *b == 1)
        };
        let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends the process.
        unsafe { libc::_exit(!matches!(fine, Ok(true)) as i32) };
    }
    assert_eq!(in_place(&space, 1), 0);
    // A huge page that both processes map in parts may stay until one of them lets go of it.
    assert!(region.migrate_to(2 * BLOCK..8 * BLOCK, far).unwrap() >= 3 * BLOCK);
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
    assert!(is_filled(&region), "what the child wrote is the child's");
    assert_sent(&region, 2 * BLOCK..8 * BLOCK, far, 6 * BLOCK);
    assert!(is_filled(&region));
    space.check();
}

#[test]
fn g12_a_fork_shares_nothing_that_was_in_place_by_signal() {
    forked(Faults::Signal);
}

#[test]
fn g12_a_fork_shares_nothing_that_was_in_place_by_threads() {
    forked(Faults::Threads);
}

#[test]
fn a4_descriptors_of_a_device_with_an_altmap_take_no_host_memory() {
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(32)).unwrap());
    let bare = space.attach(Dax::options().size(mib(32)).altmap(0).memory().unwrap()).unwrap();
    let region = filled(&space, 8 * BLOCK);
    assert_sent(&region, 0..4 * BLOCK, far, 4 * BLOCK);
    assert_sent(&region, 4 * BLOCK..8 * BLOCK, bare, 4 * BLOCK);
    let s = space.statistics();
    assert_eq!((s.devices[1].metadata_bytes, s.devices[1].own_metadata_bytes), (0, page() as u64));
    assert_eq!((s.devices[2].metadata_bytes, s.devices[2].own_metadata_bytes), (page() as u64, 0));
    // One leaf more than that is all this altmap has: a block may have to be split (A8).
    let few = space.attach(Dax::options().size(mib(32)).altmap(3 * page() as u64).memory().unwrap()).unwrap();
    let full = region.migrate_to(0..region.len(), few);
    assert!(matches!(&full, Err(Error::Migrate { why, .. }) if why.contains("no room")), "{full:?}");
    assert_eq!(in_place(&space, 3), BLOCK, "what has a descriptor has gone");
    assert!(is_filled(&region));
    space.check();
}

#[test]
fn what_cannot_be_migrated_is_refused() {
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(4)).unwrap());
    let region = filled(&space, 4 * BLOCK);
    let full = region.migrate_to(0..region.len(), far).unwrap_err();
    assert!(full.to_string().contains("device dax: it has no room for another block"), "{full}");
    assert_eq!(in_place(&space, 1), 2 * BLOCK, "what came before is migrated");
    let outside = region.migrate_to(0..region.len() + 1, far).unwrap_err();
    assert!(matches!(outside, Error::BadRange { .. }), "{outside}");
    assert_eq!(region.migrate_to(1..BLOCK, far).unwrap(), 0, "no block lies inside");
    space.detach(far).unwrap();
    assert!(matches!(region.migrate_to(0..BLOCK, far), Err(Error::NoSuchDevice)));
    assert!(is_filled(&region));
    space.check();
}

/// To a private device, blocks go as if they had left RAM for want of room.
#[test]
fn g8_blocks_are_sent_to_private_devices_too() {
    let space = space(Faults::Signal, 64 * MIB, Soft::new(mib(64)).unwrap());
    let region = filled(&space, 8 * BLOCK);
    let soft = space.devices()[0];
    assert_sent(&region, 0..4 * BLOCK, soft, 4 * BLOCK);
    let s = space.statistics();
    assert_eq!(s.devices[0].used_bytes as usize, 4 * BLOCK);
    assert!(s.used_bytes <= mib(64) - 4 * BLOCK as u64 || s.standby_bytes == 0);
    space.check();
    assert!(is_filled(&region));
}

/// Memory of huge pages from the kernel's pool, where there is one (vm.nr_hugepages).
#[test]
fn z5_huge_pages_of_the_kernel_are_a_device() {
    let made = Dax::options().size(6 * BLOCK as u64).huge().memory();
    match made {
        Ok(dax) => {
            let (space, far) = with_dax(Faults::Signal, 16 * MIB, dax);
            let mut region = filled(&space, 4 * BLOCK);
            assert_sent(&region, 0..region.len(), far, region.len());
            assert!(is_filled(&region));
            region.bytes_mut()[7] = 1;
            region.migrate_home(0..BLOCK).unwrap();
            assert_eq!(region.bytes()[7], 1);
            space.detach(far).unwrap();
            assert_eq!(region.bytes()[7], 1);
            region.bytes_mut()[7] = word(0).to_ne_bytes()[7];
            assert!(is_filled(&region));
            space.check();
        }
        Err(e) => {
            assert!(e.to_string().contains("vm.nr_hugepages"), "{e}");
            println!("not tried: {e}");
        }
    }
}

/// In a directory, the memory is a file that nobody else finds, and each device has its own.
#[test]
fn z5_a_file_without_a_name_is_a_device() {
    let directory = tempfile::tempdir().unwrap();
    let open = || Dax::open(directory.path(), Some(mib(16))).unwrap();
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, open());
    let other = space.attach(open()).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let region = filled(&space, 4 * BLOCK);
    assert_sent(&region, 0..2 * BLOCK, far, 2 * BLOCK);
    assert_sent(&region, 2 * BLOCK..4 * BLOCK, other, 2 * BLOCK);
    assert_eq!((in_place(&space, 1), in_place(&space, 2)), (2 * BLOCK, 2 * BLOCK));
    assert!(is_filled(&region));
    space.check();
}

/// An option that could do nothing is refused, and nothing is made.
#[test]
fn huge_pages_cannot_be_chosen_for_what_has_a_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("far");
    let options = || Dax::options().size(mib(8)).huge();
    for bad in [options().open(&path), options().persistent(&path), options().open(directory.path())] {
        let e = bad.unwrap_err();
        assert!(matches!(e, DaxError::HugePath { .. }), "{e:?}");
        let said = e.to_string();
        assert!(said.contains(directory.path().to_str().unwrap()) && said.contains("hugetlbfs"), "{said}");
    }
    assert!(!path.exists());
}

/// Sizes that cannot be are refused at once, with what could be, and nothing is left behind.
#[test]
fn what_is_too_large_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("far");
    for bytes in [1 << 50, 1 << 56, 1 << 60, u64::MAX - 1, u64::MAX] {
        for bad in [
            Dax::memory(bytes),
            Dax::options().size(bytes).altmap(0).memory(),
            Dax::open(&path, Some(bytes)),
            Dax::persistent(&path, Some(bytes)),
        ] {
            let e = bad.unwrap_err().to_string();
            assert!(e.contains("are too many"), "{bytes}: {e}");
        }
        assert!(!path.exists());
    }
    // A file that was there is as it was.
    std::fs::write(&path, b"").unwrap();
    Dax::open(&path, Some(1 << 47)).unwrap_err();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
}

/// A file that a process left behind when it was killed while making it is whose it was to be.
#[test]
fn a_file_that_was_not_finished_is_taken_up_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("far");
    for len in [16, mib(8)] {
        std::fs::write(&path, b"peerspace-memory").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::open(&path, Some(mib(8))).unwrap());
        // Room for all of it, where there were holes: the CPU asks nobody.
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
        assert!(blocks * 512 >= mib(8), "{blocks} blocks");
        let region = filled(&space, 2 * BLOCK);
        assert_sent(&region, 0..region.len(), far, region.len());
        assert!(is_filled(&region));
    }
}

/// Whoever makes a device says first whose the file is: killed at any moment, it leaves behind what can be used.
#[test]
#[ignore = "runs in a process of its own, which is killed"]
fn maker() {
    let path = std::env::var("FAR").unwrap();
    drop(Dax::open(&path, Some(mib(512))));
}

#[test]
fn a_process_killed_while_it_makes_a_device_leaves_a_usable_file() {
    // Where making room takes a while.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("far");
    for round in 0..8 {
        let mut maker = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "maker", "--ignored"])
            .env("FAR", &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while !path.exists() && begin.elapsed() < Duration::from_secs(20) {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_millis(round * 5));
        maker.kill().unwrap();
        maker.wait().unwrap();
        Dax::open(&path, Some(mib(16))).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
