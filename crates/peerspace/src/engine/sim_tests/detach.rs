//! Devices that go: everything they hold is somewhere else then, once (rules Z1 to Z3, Z6, Z9).

use super::{ABLE, Came, PAGE, Rig, Shelf};
use crate::engine::EngineError;
use crate::engine::detach::DetachError;
use peerspace_core::addr::{BLOCK_PAGES, PageRange, Pages, Va, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_core::sync::Ordering;
use peerspace_os::inject::{Call, Planned};
use peerspace_os::own::{Box as OwnBox, Own};
use peerspace_os::{Capabilities, Trouble};

fn va(range: VaRange, page: u64) -> Va {
    Va(range.start.0 + page * PAGE as u64)
}

/// An engine with a device of `room` pages, and six blocks of memory in a budget of two: three in huge folios, the others in
/// pages, each page beginning with its number plus one. What does not fit is on the device.
fn filled(room: u64) -> (Rig, VaRange, Shelf) {
    let shelf = Shelf::new(room).compares();
    let rig = Rig::new(Capabilities { huge: true, ..ABLE }, [shelf.clone()], true);
    let range = rig.region(6);
    let pages = rig.engine.geometry.pages_inside(range);
    let middle = pages.start + 3 * BLOCK_PAGES;
    let (dense, sparse) = (PageRange { end: middle, ..pages }, PageRange { start: middle, ..pages });
    rig.engine.advise(dense, |a| a.with(Attributes::HUGE)).unwrap();
    rig.engine.advise(sparse, |a| a.with(Attributes::NO_HUGE)).unwrap();
    for n in 0..6 * BLOCK_PAGES {
        assert_eq!(rig.write(va(range, n), &(n + 1).to_ne_bytes()), Came::Done);
    }
    // Some of it is in RAM and on the device.
    for n in (0..6 * BLOCK_PAGES).step_by(100) {
        assert_eq!(rig.read(va(range, n), &mut [0; 8]), Came::Done);
    }
    rig.engine.check();
    assert!(shelf.held() > 2 * BLOCK_PAGES, "{} pages", shelf.held());
    (rig, range, shelf)
}

fn attach(rig: &Rig, shelf: &Shelf) -> u64 {
    rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(shelf.clone(), Own))).unwrap()
}

/// How many pages are lost; the others are as they were written.
fn lost_pages(rig: &Rig, range: VaRange) -> u64 {
    let is_lost = |n: &u64| {
        let mut word = [0; 8];
        let came = rig.read(va(range, *n), &mut word);
        assert!(came == Came::Lost || came == Came::Done && u64::from_ne_bytes(word) == n + 1, "page {n}: {came:?}");
        came == Came::Lost
    };
    (0..6 * BLOCK_PAGES).filter(is_lost).count() as u64
}

fn expect_all(rig: &Rig, range: VaRange) {
    assert_eq!(lost_pages(rig, range), 0);
}

#[test]
fn z3_what_a_device_holds_moves_to_others() {
    let (rig, range, first) = filled(8000);
    let second = Shelf::new(8000);
    attach(&rig, &second);
    let held = first.held();
    rig.engine.detach(0).map(drop).unwrap();
    assert_eq!(first.held(), 0);
    assert!(second.held() > held / 2, "what was in RAM alone needs no room: {} of {held}", second.held());
    rig.engine.check();
    expect_all(&rig, range);
    rig.engine.check();
    // There is none of that number any more, nor of one that never was.
    assert_eq!(rig.engine.detach(0).err(), Some(DetachError::NotThere));
    assert_eq!(rig.engine.detach(9).err(), Some(DetachError::NotThere));
    // And back, through the place that is free again.
    assert_eq!(attach(&rig, &first), 2);
    rig.engine.detach(1).map(drop).unwrap();
    assert_eq!(second.held(), 0);
    expect_all(&rig, range);
    rig.release(range);
    assert_eq!(first.held(), 0);
}

#[test]
fn z3_too_little_room_is_said_before_anything_moves() {
    let (rig, range, first) = filled(8000);
    let second = Shelf::new(100);
    attach(&rig, &second);
    let loads = || rig.engine.tiers.iter().map(|t| t.loads.load(Ordering::Relaxed)).sum::<u64>();
    let (held, before) = (first.held(), loads());
    let Some(DetachError::NoRoom(Pages(missing))) = rig.engine.detach(0).err() else { panic!("it has no room") };
    assert!(missing <= held - 100 && missing > held / 2, "{missing} of {held}");
    assert_eq!((first.held(), second.held()), (held, 0));
    assert_eq!(loads(), before);
    rig.engine.check();
    // With as much more, it goes.
    attach(&rig, &Shelf::new(missing + BLOCK_PAGES));
    rig.engine.detach(0).map(drop).unwrap();
    assert_eq!(first.held(), 0);
    expect_all(&rig, range);
}

#[test]
fn z3_a_device_that_has_less_room_than_it_said_loses_nothing() {
    let (rig, range, first) = filled(8000);
    let second = Shelf::new(8000);
    second.set_room(700);
    attach(&rig, &second);
    let Some(DetachError::NoRoom(left)) = rig.engine.detach(0).err() else { panic!("it has no room") };
    assert!(left.0 > 0 && left.0 == first.held());
    rig.engine.check();
    expect_all(&rig, range);
    // It is in use as before.
    attach(&rig, &Shelf::new(8000));
    rig.engine.detach(0).map(drop).unwrap();
    expect_all(&rig, range);
    rig.engine.check();
}

#[test]
fn z9_what_cannot_be_read_is_lost_and_nothing_else() {
    let (rig, range, first) = filled(8000);
    first.break_some(20, 12345);
    attach(&rig, &Shelf::new(8000));
    rig.engine.detach(0).map(drop).unwrap();
    assert_eq!(first.held(), 0);
    let lost = lost_pages(&rig, range);
    assert!((1..=20).contains(&lost) && lost == first.losses(), "{lost}, {}", first.losses());
    rig.engine.check();
}

#[test]
fn z9_a_device_that_has_failed_takes_only_its_own_pages_along() {
    let (rig, range, first) = filled(8000);
    let second = Shelf::new(8000);
    attach(&rig, &second);
    let on_device = rig.engine.check().on_devices;
    rig.engine.tiers.iter().find(|t| t.id == 0).unwrap().fail();
    let lost = lost_pages(&rig, range);
    assert_eq!(lost, on_device, "all that it alone held, and nothing else");
    let census = rig.engine.check();
    assert_eq!(census.poisoned, on_device);
    // The space goes on, with the other device; and what has failed can be taken away.
    rig.engine.discard_now(range).unwrap();
    for n in 0..6 * BLOCK_PAGES {
        assert_eq!(rig.write(va(range, n), &(n + 1).to_ne_bytes()), Came::Done);
    }
    assert!(second.held() > 0);
    rig.engine.detach(0).map(drop).unwrap();
    assert_eq!(first.held(), 0);
    expect_all(&rig, range);
}

/// Whichever allocation fails, nothing is left of a device that could not be attached.
#[test]
fn a3_attaching_is_rolled_back_at_every_step() {
    let (rig, range, _first) = filled(8000);
    let mut steps = 0;
    loop {
        let second = Shelf::new(5000);
        rig.engine.kernel.plan(Planned {
            call: Call::Words,
            after: steps,
            times: 1,
            trouble: Trouble::NoMemory,
            pages: Pages(0),
        });
        let attached = rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(second.clone(), Own)));
        rig.engine.kernel.relent();
        if attached.is_ok() {
            break;
        }
        assert!(matches!(attached, Err(EngineError::Memory(Trouble::NoMemory))));
        assert_eq!(rig.engine.tiers.iter().count(), 1);
        assert_eq!(second.references(), 1, "the device was dropped");
        rig.engine.check();
        steps += 1;
    }
    assert_eq!(steps, 3, "an allocator, descriptors and their tables");
    assert_eq!(rig.engine.tiers.iter().count(), 2);
    rig.engine.detach(0).map(drop).unwrap();
    expect_all(&rig, range);
}
