//! Memory of coherent devices, some of which run code, in place for everybody (rules Z5, G2, G10, G12, G14).

use super::common::{self, MIB, is_filled, mib, page, word, words_per_page};
use super::{both, brought, build, gpu, mappings, reads, whole};
use peerspace::device::soft::{Accelerator, Lane, Options};
use peerspace::{CpuMapping, DeviceId, Error, Faults, Node, PageView, Region, Residence, Space, Use};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Adds one to the first word of each page of `part`, on a device.
fn add_one(gpu: &Accelerator, region: &Region, part: Range<usize>) {
    let (base, pages) = (region.as_ptr() as u64 + part.start as u64, part.len() / page());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        for i in items {
            let word: u64 = lane.load(base + i * 4096)?;
            lane.store(base + i * 4096, word + 1)?;
        }
        Ok(())
    };
    // SAFETY: the region outlives the job, and nobody else writes to these words meanwhile.
    unsafe { gpu.launch(pages as u64, kernel) }.unwrap().wait().unwrap();
}

pub(super) fn coherent(bytes: usize, name: &str) -> Accelerator {
    Accelerator::new(Options::new(mib(bytes)).name(name).coherent(true)).unwrap()
}

/// Bytes that the CPU maps in place of a device.
fn in_place(space: &Space, region: &Region, id: DeviceId) -> usize {
    let pages = space.pages(region.as_ptr(), region.len()).unwrap();
    pages.filter(|view| view.residence == Residence::Coherent(id)).count() * page()
}

/// Rules Z5, G2, G10: memory in place is one memory for the CPU, for the device's own code, and for that of another device.
#[test]
fn z5_memory_in_place_is_one_for_the_cpu_and_for_devices() {
    for faults in both() {
        let (a, b) = (coherent(16, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let mut region = common::filled(&space, 8 * MIB);
        let (part, p) = (2 * MIB..6 * MIB, page());
        assert_eq!(region.migrate_to(part.clone(), ids[0]).unwrap(), 4 * MIB);
        assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
        let moved = [a.statistics(), b.statistics()].map(|s| (s.bytes_in, s.bytes_out));
        for round in 0..3u64 {
            add_one(&a, &region, part.clone());
            add_one(&b, &region, part.clone());
            let before = brought(&space);
            for i in part.clone().step_by(p) {
                let at = &mut region.typed_mut::<u64>()[i / 8];
                assert_eq!(*at, word(i / p).wrapping_add(3 * round + 2));
                *at = at.wrapping_add(1);
            }
            assert_eq!(brought(&space), before);
        }
        // Nothing has moved for it.
        assert_eq!([a.statistics(), b.statistics()].map(|s| (s.bytes_in, s.bytes_out)), moved);
        assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
        assert!(b.statistics().remote_bytes_written >= 4 * MIB as u64 / 512);
        space.check();
        // Whatever takes it from its place: nobody goes on to use what is not there any more.
        let kept = space.make_resident(&raw const region.bytes()[2 * MIB], 1, Use::Write).unwrap();
        assert_eq!(in_place(&space, &region, ids[0]), 2 * MIB);
        drop(kept);
        add_one(&b, &region, 2 * MIB..4 * MIB);
        assert_eq!(space.migrate(region.as_ptr().wrapping_add(4 * MIB), 2 * MIB, Node::Host).unwrap(), 2 * MIB);
        add_one(&a, &region, 4 * MIB..6 * MIB);
        add_one(&b, &region, 4 * MIB..6 * MIB);
        for i in part.step_by(p) {
            let more = if i < 4 * MIB { 10 } else { 11 };
            assert_eq!(region.typed::<u64>()[i / 8], word(i / p).wrapping_add(more), "page {}", i / p);
        }
        space.check();
    }
}

/// Rules Z5, G2: memory goes in place and out of it all the while that the CPU and two devices work on it.
#[test]
fn g2_memory_goes_in_and_out_of_place_under_everybody() {
    for faults in both() {
        let (a, b) = (coherent(16, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let region = space.region(mib(4)).unwrap();
        let (base, pages) = (region.as_ptr() as u64, 4 * MIB / page());
        let jobs = [(&a, 1u64), (&b, 2)].map(|(gpu, slot)| {
            let kernel = move |lane: &Lane, items: Range<u64>| {
                for _ in 0..30 {
                    for i in items.clone() {
                        let at = base + i * 4096 + slot * 8;
                        let word: u64 = lane.load(at)?;
                        lane.store(at, word + 1)?;
                    }
                }
                Ok(())
            };
            // SAFETY: each works on words of its own.
            unsafe { gpu.launch(pages as u64, kernel) }.unwrap()
        });
        let mut rounds = 0u64;
        while !jobs.iter().all(|job| job.is_done()) || rounds < 20 {
            let from = rounds as usize * 37 % 300 * page();
            let part = if rounds.is_multiple_of(2) { 0..4 * MIB } else { from..from + 2 * MIB + 11 * page() };
            region.migrate(part, Node::Device(ids[0])).unwrap();
            for i in 0..pages {
                // SAFETY: a word that nobody else uses.
                unsafe {
                    let word = (base as usize + i * page()) as *mut u64;
                    assert_eq!(word.read_volatile(), rounds);
                    word.write_volatile(rounds + 1);
                }
            }
            rounds += 1;
            match rounds % 3 {
                0 => drop(space.evict(ids[0]).unwrap()),
                1 => drop(region.migrate(from..4 * MIB, Node::Host).unwrap()),
                _ => drop(space.migrate(region.as_ptr(), 4 * MIB, Node::Device(ids[1])).unwrap()),
            }
        }
        jobs.iter().for_each(|job| job.wait().unwrap());
        for page in region.typed::<u64>().chunks(words_per_page()) {
            assert_eq!(page[..3], [rounds, 30, 30]);
        }
        space.check();
    }
}

/// Rules G12, Z3: a fork and a detach take memory from its place; parent and child go on apart. In a process of its own, since a
/// fork is one of all spaces.
#[test]
fn g12_memory_in_place_of_a_device_that_runs_code_forks() {
    let output = common::in_process("in_place::forks_with_memory_in_place", &[]);
    assert!(output.status.success(), "{}", common::said(&output));
}

#[test]
#[ignore = "run in a process of its own"]
fn forks_with_memory_in_place() {
    let (a, b) = (coherent(16, "a"), gpu(16, "b"));
    let (space, ids) = build(Faults::Signal, &[&a, &b]);
    let mut region = common::filled(&space, 4 * MIB);
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    add_one(&b, &region, 0..4 * MIB);
    // One that works all the while, on words of its own.
    let (busy, stop) = (space.region(mib(2)).unwrap(), std::sync::Arc::new(AtomicBool::new(false)));
    busy.migrate_to(0..2 * MIB, ids[0]).unwrap();
    let (base, ended) = (busy.as_ptr() as u64, stop.clone());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        while !ended.load(Relaxed) {
            for i in items.clone() {
                let word: u64 = lane.load(base + i * 4096)?;
                lane.store(base + i * 4096, word + 1)?;
                assert_eq!(lane.load::<u64>(base + i * 4096)?, word + 1);
            }
        }
        Ok(())
    };
    // SAFETY: nobody else uses that region before the job is done.
    let job = unsafe { a.launch(512, kernel) }.unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // SAFETY: the child uses the region and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    let good = |region: &Region, more: u64| {
        let pages = region.typed::<u64>().chunks(words_per_page()).enumerate();
        pages.into_iter().all(|(i, page)| page[0] == word(i).wrapping_add(more) && page[1] == word(i))
    };
    if child == 0 {
        region.typed_mut::<u64>()[0] = 77;
        region.typed_mut::<u64>()[0] = word(0).wrapping_add(1);
        // What it sends there is its own.
        let there = region.migrate_to(0..2 * MIB, ids[0]);
        let fine = good(&region, 1) && there.is_ok();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(!fine)) }
    }
    let mut status = -1;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child does not have the data");
    stop.store(true, Relaxed);
    job.wait().unwrap();
    assert!(busy.typed::<u64>().iter().step_by(words_per_page()).any(|w| *w > 1));
    drop(busy);
    add_one(&a, &region, 0..4 * MIB);
    assert!(good(&region, 2));
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    add_one(&b, &region, 0..4 * MIB);
    // The one that uses it goes, then the one whose memory it is.
    space.detach(ids[1]).unwrap();
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    add_one(&a, &region, 0..4 * MIB);
    space.detach(ids[0]).unwrap();
    assert!(good(&region, 4));
    space.check();
}

/// Rules Z9, G14: what a device that fails held in place is lost; sole access takes memory from its place.
#[test]
fn g14_sole_access_and_failures_of_memory_in_place() {
    let (a, b) = (coherent(8, "a"), gpu(8, "b"));
    let (space, ids) = build(Faults::Signal, &[&a, &b]);
    let region = common::filled(&space, 4 * MIB);
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    for id in [ids[0], ids[1]] {
        region.exclusive(0..MIB, id).unwrap();
        let pages: Vec<_> = space.pages(region.as_ptr(), MIB).unwrap().collect();
        let sole = |view: &PageView| view.cpu == CpuMapping::None && view.devices.iter().eq([id]);
        assert!(pages.iter().all(sole), "{:?}", pages[0]);
    }
    assert!(is_filled(&region));
    assert_eq!(region.migrate_to(0..4 * MIB, ids[0]).unwrap(), 4 * MIB);
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    // More than there is room for beside it is used where it is.
    let more = common::filled(&space, 8 * MIB);
    reads(&a, &more, 0..8 * MIB);
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    assert!(is_filled(&more));
    space.fail(ids[0]).unwrap();
    for at in [0, 3 * MIB, 4 * MIB - 8] {
        assert!(matches!(region.try_read(at, &mut [0; 8]), Err(Error::Lost { .. })));
    }
    assert!(is_filled(&more));
}

/// Rules Z5, G8, H2: pages and runs of pages are in place by themselves, beside what is not; also on a device that runs no code.
#[test]
fn z5_pages_are_in_place_one_by_one() {
    for faults in both() {
        for runs_code in [true, false] {
            let a = coherent(32, "a");
            let (space, mut ids) = build(faults, if runs_code { vec![&a] } else { vec![] }.as_slice());
            if !runs_code {
                ids.push(space.attach(peerspace::device::dax::Dax::memory(mib(32)).unwrap()).unwrap());
            }
            let mut region = common::filled(&space, 12 * MIB);
            let (node, p) = (Node::Device(ids[0]), page());
            let ranges = [0..1, 5 * p..9 * p, MIB - p..MIB + p, 2 * MIB..4 * MIB, 5 * MIB + p..9 * MIB - 3 * p];
            let mut there = 0;
            for part in ranges {
                let pages = part.start / p * p..part.end.next_multiple_of(p);
                assert_eq!(region.migrate(part.clone(), node).unwrap(), pages.len(), "{part:?}");
                there += pages.len();
                assert_eq!(in_place(&space, &region, ids[0]), there, "{part:?}");
                space.check();
            }
            // A run is one mapping.
            let run = whole(&region).start.wrapping_add(5 * p)..whole(&region).start.wrapping_add(9 * p);
            assert_eq!(mappings(run), 1);
            assert!(mappings(whole(&region)) <= 13, "{} mappings", mappings(whole(&region)));
            let before = brought(&space);
            assert!(is_filled(&region));
            assert_eq!(brought(&space), before);
            if runs_code {
                assert!(reads(&a, &region, 2 * MIB..4 * MIB) <= 2, "a block in place is one translation");
                reads(&a, &region, 5 * MIB..9 * MIB);
            }
            // Again is no work; home go those that are named.
            assert_eq!(region.migrate(6 * p..8 * p, node).unwrap(), 2 * p);
            for part in [6 * p..7 * p, 3 * MIB..3 * MIB + p, 8 * MIB..8 * MIB + 100 * p] {
                assert_eq!(region.migrate(part.clone(), Node::Host).unwrap(), part.len());
                there -= part.len();
                assert_eq!(in_place(&space, &region, ids[0]), there, "{part:?}");
                space.check();
            }
            // A part of it is discarded, a part pinned.
            region.discard(8 * p..MIB).unwrap();
            let held = space.make_resident(whole(&region).start.wrapping_add(7 * MIB), 3 * p, Use::Write).unwrap();
            assert!(region.bytes()[8 * p..MIB].iter().all(|b| *b == 0));
            let good = |i: &usize| region.bytes()[*i] == if (8 * p..MIB).contains(i) { 0 } else { word(i / p) as u8 };
            assert!((0..12 * MIB).step_by(p).all(|i| good(&i)));
            drop(held);
            assert!(space.evict(ids[0]).unwrap() > 0);
            assert_eq!(in_place(&space, &region, ids[0]), 0);
            // The kernel does not join what was populated apart.
            assert!(mappings(whole(&region)) <= 13, "{} mappings", mappings(whole(&region)));
            assert!((0..12 * MIB).step_by(p).all(|i| good(&i)));
            space.check();
        }
    }
}
