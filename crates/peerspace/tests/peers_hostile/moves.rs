//! Transfers that fail, and devices that fail with what they hold (rules G6, G16, Z8, Z9).

use super::*;
use std::sync::atomic::AtomicU64;

const NONE: Vec<usize> = Vec::new();

type Spoil = fn(&Trouble);

/// What does not get to a device stays where it was, and the device is told why.
#[test]
fn g16_what_does_not_get_to_the_device_stays_where_it_is() {
    let ways: [Spoil; 4] = [
        |t| t.bad_stores.store(1, SeqCst),
        |t| t.bad_stores.store(3, SeqCst),
        |t| t.unanswered.store(true, SeqCst),
        |t| t.panic_in("store"),
    ];
    let moving = all().filter(|(_, _, info)| info.mode != Mode::Share);
    for (n, ((faults, dense, info), how)) in moving.zip(ways.into_iter().cycle()).enumerate() {
        let what = format!("{n}: {info:?} {dense}");
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let mut region = region_of(&space, 4 * MIB, dense);
        // Some pages have been there, and come back changed: what the device has of them is old.
        (0..600).for_each(|i| chip.store(at(&region, i) + 8, word(i)).unwrap());
        (0..600).for_each(|i| assert_eq!(region.typed::<u64>()[i * 512], word(i)));
        (0..300).for_each(|i| region.typed_mut::<u64>()[i * 512 + 9] = word(i));
        how(chip.trouble());
        for i in 0..1024 {
            match chip.load(at(&region, i)) {
                Ok(w) => assert_eq!(w, word(i), "{what}: page {i}"),
                Err(FaultError::Device(va, e)) => {
                    assert_eq!(va, at(&region, i), "{what}");
                    let said = [DeviceError::Io(5), DeviceError::NoAnswer, DeviceError::Panicked];
                    assert!(said.contains(&e), "{what}: {e}");
                }
                Err(e) => panic!("{what}: {e}"),
            }
        }
        assert!(space.statistics().device_errors > 50, "{what}");
        chip.trouble().mend();
        space.check();
        assert_eq!(lost_of(&region), NONE, "{what}");
        assert!((0..1024).all(|i| chip.load(at(&region, i)) == Ok(word(i))), "{what}");
        space.check();
        assert!(is_filled(&region), "{what}");
    }
}

/// A page that the device has in two states: written there over and over, while its stores fail now and then.
#[test]
fn g16_copies_that_could_not_be_written_over_are_not_believed() {
    for dense in [false, true] {
        let chip = Chip::exclusive("chip", CHIP);
        // What it may hold yet is asked for, instead of protecting the page at home.
        chip.trouble().compares.store(true, SeqCst);
        let space = space_of(Faults::Signal, 16 * MIB, &[&chip]);
        let mut region = region_of(&space, 2 * MIB, dense);
        for round in 0..6u64 {
            chip.trouble().mend();
            for i in 0..512 {
                chip.store(at(&region, i) + 8, round).unwrap();
            }
            // Home, written there now and then, and on the way back it fails.
            for i in 0..512 {
                assert_eq!(region.typed::<u64>()[i * 512 + 1], round);
                if round % 2 == 0 {
                    region.typed_mut::<u64>()[i * 512 + 2] = round;
                }
            }
            chip.trouble().bad_stores.store(1, SeqCst);
            (0..512).for_each(|i| drop(chip.load(at(&region, i))));
            space.check();
            let last = round / 2 * 2;
            assert!((0..512).all(|i| region.typed::<u64>()[i * 512 + 1] == round));
            assert!((0..512).all(|i| region.typed::<u64>()[i * 512 + 2] == last));
            space.check();
        }
    }
}

/// Rule Z8: what fails in passing is tried again.
#[test]
fn z8_loads_that_fail_in_passing_lose_nothing() {
    for (faults, dense, info) in all() {
        let what = format!("{info:?} {dense}");
        let chip = Chip::new("chip", CHIP, info);
        let other = Chip::with("other", CHIP, MmuDescriptor::new(Mode::Exclusive), false);
        let space = space_of(faults, 16 * MIB, &[&chip, &other]);
        let region = region_of(&space, 4 * MIB, dense);
        chip.trouble().every_other_load.store(true, SeqCst);
        for _ in 0..2 {
            (0..1024).for_each(|i| chip.store(at(&region, i), word(i)).unwrap());
            (0..512).for_each(|i| assert_eq!(other.load(at(&region, i)), Ok(word(i)), "{what}"));
            space.check();
            assert_eq!(lost_of(&region), NONE, "{what}");
        }
        assert_eq!(space.statistics().poisoned, 0);
    }
}

/// Rule Z9: exactly what the device alone had, and only if it is asked for.
#[test]
fn z9_what_cannot_be_loaded_is_lost_and_nothing_else() {
    let ways: [Spoil; 5] = [
        |t| t.bad_loads.store(1, SeqCst),
        |t| t.unanswered.store(true, SeqCst),
        |t| t.short_loads.store(true, SeqCst),
        |t| t.panic_in("load"),
        |t| t.gone.store(true, SeqCst),
    ];
    for (n, ((faults, dense, info), how)) in all().chain(all()).zip(ways.into_iter().cycle()).take(20).enumerate() {
        let what = format!("{n}: {info:?} {dense}");
        let chip = Chip::new("chip", CHIP, info.clone());
        let other = Chip::with("other", CHIP, MmuDescriptor::new(Mode::Exclusive), false);
        let space = space_of(faults, 16 * MIB, &[&chip, &other]);
        let mut region = region_of(&space, 4 * MIB, dense);
        // Read there in the first half, which leaves nothing to lose unless it moved; written in some of the second.
        (0..512).for_each(|i| assert_eq!(chip.load(at(&region, i)), Ok(word(i))));
        let moved = if info.mode == Mode::Exclusive { 0..512 } else { 0..0 };
        if info.mode != Mode::Share {
            (600..700).for_each(|i| chip.store(at(&region, i), word(i)).unwrap());
        }
        // Where nothing is on the device alone, what is atomic is.
        (800..810).for_each(|i| chip.add(at(&region, i), 0).unwrap());
        let alone: Vec<usize> = (0..1024)
            .filter(|i| match chip.target(at(&region, *i)) {
                Some((Target::Own(_), true)) => true,
                _ => moved.contains(i),
            })
            .collect();
        assert!(alone.len() >= 10, "{what}");
        how(chip.trouble());
        // Another device is told, and so is the CPU.
        let va = at(&region, alone[0]);
        assert!(matches!(other.load(va), Err(FaultError::Lost(at, _)) if at == va), "{what}");
        let lost = lost_of(&region);
        assert_eq!(lost, alone, "{what}");
        assert_eq!(space.statistics().poisoned, alone.len() as u64, "{what}");
        space.check();
        // The others can be used by everybody, and what is discarded can be used again.
        for i in (0..1024).filter(|i| !lost.contains(i)) {
            assert_eq!(other.load(at(&region, i)), Ok(word(i)), "{what}");
        }
        region.discard(0..4 * MIB).unwrap();
        chip.trouble().mend();
        fill(region.typed_mut());
        (0..1024).for_each(|i| assert_eq!(other.load(at(&region, i)), Ok(word(i)), "{what}"));
        space.check();
        assert!(is_filled(&region), "{what}");
        let again = chip.port().fault(at(&region, 3), DeviceAccess::Read);
        let failed = n % ways.len() == 4;
        assert_eq!(again, if failed { Err(FaultError::Cut) } else { Ok(()) }, "{what}");
    }
}

/// A device that is said to have failed while its pages are mapped, and one whose port is asked by many threads just then.
#[test]
fn z9_a_device_that_fails_in_use_takes_its_own_pages_along() {
    for (faults, dense, info) in all() {
        let what = format!("{info:?} {dense}");
        let chip = Chip::new("chip", CHIP, info.clone());
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = region_of(&space, 4 * MIB, dense);
        let id = space.devices()[1];
        let uses = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for k in 0..2 {
                let (chip, region, what, uses) = (&chip, &region, &what, &uses);
                scope.spawn(move || {
                    for n in 0.. {
                        uses.fetch_add(1, SeqCst);
                        let i = (n * 37 + k) % 1024;
                        match chip.store(at(region, i), word(i)) {
                            Ok(()) => {}
                            Err(FaultError::Cut | FaultError::Lost(..)) => return,
                            Err(FaultError::Device(_, DeviceError::Gone)) => {}
                            Err(e) => panic!("{what}: {e}"),
                        }
                        if chip.port().fault(at(region, i), DeviceAccess::Read) == Err(FaultError::Cut) {
                            return;
                        }
                    }
                });
            }
            wait_until(|| uses.load(SeqCst) > 300);
            space.fail(id).unwrap();
        });
        let lost = lost_of(&region);
        assert!(info.mode != Mode::Share || lost.is_empty(), "{what}: {lost:?}");
        assert!(info.mode == Mode::Share || !lost.is_empty(), "{what}: nothing was on the device");
        assert_eq!(chip.port().fault(at(&region, 1), DeviceAccess::Write), Err(FaultError::Cut));
        space.check();
        // Taken away, nothing more is lost with it.
        space.detach(id).unwrap();
        assert_eq!(lost_of(&region), lost, "{what}");
        space.check();
    }
}

/// Rule G6: what devices cannot copy to each other goes by way of the host.
#[test]
fn g6_failing_copies_between_devices_go_through_the_host() {
    let ways: [Spoil; 2] = [|t| t.bad_peers.store(true, SeqCst), |t| t.panic_in("copy_from")];
    for (n, how) in ways.into_iter().cycle().take(4).enumerate() {
        let [a, b] = ["a", "b"].map(|name| Chip::exclusive(name, CHIP));
        let space = space_of(BOTH[n / 2], 16 * MIB, &[&a, &b]);
        let region = region_of(&space, 4 * MIB, n % 2 == 0);
        how(a.trouble());
        how(b.trouble());
        // Not often: what goes to and fro is made to stay for a while.
        for chip in [&a, &b, &a] {
            (0..1024).for_each(|i| assert_eq!(chip.load(at(&region, i)), Ok(word(i)), "{n}"));
        }
        assert_eq!((a.moved()[2], b.moved()[2]), (0, 0));
        space.check();
        assert!(is_filled(&region));
        // And where neither way is open, the page stays where it is.
        b.load(at(&region, 5)).unwrap();
        a.trouble().bad_stores.store(1, SeqCst);
        assert!(matches!(a.load(at(&region, 5)), Err(FaultError::Device(_, DeviceError::Io(5)))));
        assert_eq!(b.load(at(&region, 5)), Ok(word(5)));
        space.check();
        assert!(is_filled(&region));
    }
}
