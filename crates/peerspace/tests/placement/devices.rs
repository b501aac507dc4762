//! Devices that are emptied and stay, and huge folios that are refused (rules G7, H2, Z3).

use super::common::{self, MIB, is_filled, mib, page, words_per_page};
use super::{both, build, gpu, reads, used, whole};
use peerspace::device::soft::{Accelerator, Lane, Options};
use peerspace::{Faults, Node};
use std::ops::Range;

/// Rules G7, Z3: everything leaves a device that stays in use, data intact, also where it is more than the host has room for.
#[test]
fn g7_a_device_is_emptied_and_goes_on() {
    for faults in both() {
        let a = Accelerator::new(Options::new(mib(96)).takes_evicted(true)).unwrap();
        let (space, ids) = build(faults, &[&a]);
        let region = common::filled(&space, 80 * MIB);
        let node = Node::Device(ids[0]);
        for part in [5 * page()..5 * page() + 1, MIB..7 * MIB, 0..80 * MIB] {
            let there = region.migrate(part.clone(), node).unwrap();
            assert!(space.evict(ids[0]).unwrap() >= there, "{part:?}");
            assert_eq!(used(&space, whole(&region), ids[0]), 0, "{part:?}");
            space.check();
        }
        assert_eq!(space.evict(ids[0]).unwrap(), 0);
        reads(&a, &region, 0..80 * MIB);
        assert!(used(&space, whole(&region), ids[0]) > 0);
        assert!(is_filled(&region));
        // What runs no code is emptied in the same way.
        let store = space.devices()[0];
        space.evict(ids[0]).unwrap();
        common::push_out(&space, 128 * MIB);
        assert!(used(&space, whole(&region), store) > 0);
        assert!(space.evict(store).unwrap() > 0);
        assert_eq!(used(&space, whole(&region), store), 0);
        assert!(is_filled(&region));
        space.check();
    }
}

/// Rule G7: while the device and the CPU work on what leaves it.
#[test]
fn g7_a_device_that_works_is_emptied() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    let (base, pages) = (region.as_ptr() as u64, 8 * MIB / page());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        for _ in 0..40 {
            for i in items.clone() {
                lane.fetch_add(base + i * 4096, 1u64)?;
            }
        }
        Ok(())
    };
    // SAFETY: nobody else writes to the region meanwhile.
    let job = unsafe { a.launch(pages as u64, kernel) }.unwrap();
    let mut left = 0;
    while !job.is_done() {
        left += space.evict(ids[0]).unwrap();
    }
    job.wait().unwrap();
    assert!(left > 0);
    assert!(region.typed::<u64>().iter().step_by(words_per_page()).all(|w| *w == 40));
    space.check();
}

/// Rule H2: where a huge folio is refused, on the device or on the host, small pages do.
#[test]
fn h2_a_huge_folio_that_is_refused_goes_in_small_pages() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    region.advise(peerspace::Hint::Dense).unwrap();
    let node = Node::Device(ids[0]);
    let huge = |from: usize| {
        let pages = space.pages(region.as_ptr().wrapping_add(from), 2 * MIB).unwrap();
        pages.filter(|view| view.huge).count() * page()
    };
    // Memory that was never touched, and memory that is in a huge page.
    // SAFETY: the region is this test's own.
    unsafe { region.as_ptr().wrapping_add(4 * MIB).write_volatile(3) };
    for from in [0, 4 * MIB] {
        space.refuse_next_block(node).unwrap();
        assert_eq!(region.migrate(from..from + 2 * MIB, node).unwrap(), 2 * MIB);
        assert_eq!(huge(from), 0);
        assert_eq!(region.migrate(from + 2 * MIB..from + 4 * MIB, node).unwrap(), 2 * MIB);
        assert_eq!(huge(from + 2 * MIB), 2 * MIB, "only one is refused");
    }
    space.refuse_next_block(Node::Host).unwrap();
    assert_eq!(region.migrate(2 * MIB..4 * MIB, Node::Host).unwrap(), 2 * MIB);
    assert_eq!(huge(2 * MIB), 0);
    assert_eq!(region.migrate(6 * MIB..8 * MIB, Node::Host).unwrap(), 2 * MIB);
    assert_eq!(huge(6 * MIB), 2 * MIB);
    assert_eq!(region.bytes()[4 * MIB], 3);
    assert_eq!(region.bytes().iter().filter(|b| **b != 0).count(), 1);
    assert!(matches!(space.refuse_next_block(Node::Device(space.attach(gpu(1, "b")).unwrap())), Ok(())));
    space.check();
}
