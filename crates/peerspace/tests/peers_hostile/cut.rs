//! Devices that come and go while they are used, and ports that are asked for nonsense (rules G4, G5, G13, Z3).

use super::*;
use std::sync::atomic::AtomicU64;

/// Uses the region by the chip, at random, until the port is cut. Counts the accesses that went well.
fn use_until_cut(chip: &Chip, base: u64, pages: u64, seed: u64, uses: &AtomicU64) {
    let mut x = seed * 2 + 1;
    loop {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let i = (x >> 33) % pages;
        let va = base + i * PAGE;
        let done = match x >> 20 & 7 {
            0 => chip.add(va + 64, 1),
            1..=3 => chip.store(va, word(i as usize)),
            _ => chip.load(va).map(|w| assert_eq!(w, word(i as usize))),
        };
        match done {
            Ok(()) => drop(uses.fetch_add(1, SeqCst)),
            Err(FaultError::Cut) => return,
            Err(e) => panic!("page {i}: {e}"),
        }
    }
}

/// Rule Z3.
#[test]
fn z3_a_device_is_taken_away_while_it_runs() {
    for (faults, dense, info) in all() {
        let chips: Vec<Chip> = ["a", "b"].map(|name| Chip::new(name, 1 << 20, info.clone())).into();
        let space = space_of(faults, 16 * MIB, &[&chips[0], &chips[1]]);
        let region = region_of(&space, 8 * MIB, dense);
        let base = region.as_ptr() as u64;
        let uses = AtomicU64::new(0);
        for (k, chip) in chips.iter().enumerate() {
            std::thread::scope(|scope| {
                let uses = &uses;
                for n in 0..2 {
                    scope.spawn(move || use_until_cut(chip, base, 2048, 10 * k as u64 + n, uses));
                }
                let before = uses.load(SeqCst);
                wait_until(|| uses.load(SeqCst) > before + 300);
                within(Duration::from_secs(20), "a detach", || space.detach(space.devices()[1]).unwrap());
            });
            assert_eq!(chip.port().read(base, &mut [0]), Err(FaultError::Cut));
            space.check();
        }
        assert_eq!(space.devices().len(), 1);
        let words = region.typed::<u64>();
        assert!((0..2048).all(|i| words[i * 512] == word(i) && words[i * 512 + 511] == word(i)), "{info:?}");
        space.check();
    }
}

/// Rules G5, Z3: what a device maps that has gone is known to nobody, least of all to the next one with its number.
#[test]
fn g5_the_next_device_has_nothing_of_the_one_before() {
    let old = Chip::new("old", 4 << 20, MmuDescriptor::new(Mode::Replicate).zero_page());
    let far = Chip::new("far", 4 << 20, MmuDescriptor::new(Mode::Share).remote());
    let space = space_of(Faults::Signal, 16 * MIB, &[&old, &far]);
    let region = region_of(&space, 2 * MIB, false);
    let zeros = space.region(mib(2)).unwrap();
    for i in 0..64 {
        assert_eq!((old.load(at(&zeros, i)), old.load(at(&region, i))), (Ok(0), Ok(word(i))));
        assert_eq!(far.load(at(&region, 100 + i)), Ok(word(100 + i)));
    }
    space.devices()[1..].iter().for_each(|id| space.detach(*id).unwrap());
    assert_eq!((old.target(at(&zeros, 1)), far.target(at(&region, 101))), (None, None), "they were told to let go");
    space.check();
    // These can do neither zeros nor the host's memory.
    let next = ["a", "b"].map(|name| Chip::new(name, 4 << 20, MmuDescriptor::new(Mode::Replicate)));
    for chip in &next {
        space.attach(chip.clone()).unwrap();
    }
    for chip in &next {
        for (region, i) in [(&zeros, 1), (&region, 1), (&region, 101)] {
            chip.load(at(region, i)).unwrap();
            let target = chip.target(at(region, i));
            assert!(matches!(target, Some((Target::Own(_), _))), "{target:?}");
        }
    }
    space.check();
    assert!(is_filled(&region));
}

/// Rule Z3: a detach that fails leaves the device in use as before, its port included.
#[test]
fn z3_a_device_that_cannot_be_taken_away_goes_on() {
    let chip = Chip::exclusive("chip", 24 << 20);
    catch_lost_accesses();
    let builder = Space::builder().host(mib(4)).device(Soft::new(mib(2)).unwrap()).device(chip.clone());
    let space = builder.faults(Faults::Signal).build().unwrap();
    let region = space.region(mib(16)).unwrap();
    (0..4096).for_each(|i| chip.store(at(&region, i), word(i)).unwrap());
    let id = space.devices()[1];
    for _ in 0..2 {
        let e = space.detach(id).unwrap_err();
        assert!(matches!(e, Error::NoRoom { .. }), "{e}");
        (0..4096).for_each(|i| assert_eq!(chip.load(at(&region, i)), Ok(word(i))));
    }
    assert_eq!(chip.attached(), 1, "a device gets one port");
    let more = space.attach(Soft::new(mib(32)).unwrap()).unwrap();
    space.detach(id).unwrap();
    assert_eq!(chip.load(at(&region, 0)), Err(FaultError::Cut));
    assert!((0..4096).all(|i| region.typed::<u64>()[i * 512] == word(i)));
    assert!(space.devices().contains(&more));
    space.check();
}

/// As many devices as a table word has bits for, and no more.
#[test]
fn one_device_too_many_is_refused() {
    let chips: Vec<Chip> = (0..12).map(|n| Chip::exclusive(&format!("chip {n}"), MIB as u64)).collect();
    let space = space_of(Faults::Signal, 16 * MIB, &chips.iter().collect::<Vec<_>>());
    let region = region_of(&space, 2 * MIB, false);
    let one_more = Chip::exclusive("one more", MIB as u64);
    let e = space.attach(one_more.clone()).unwrap_err().to_string();
    assert!(e.contains("one more") && e.contains("12 devices with an MMU"), "{e}");
    for round in 0..3 {
        for (k, chip) in chips.iter().enumerate() {
            assert_eq!(chip.load(at(&region, k)), Ok(word(k)), "round {round}");
            assert_eq!(chip.load(at(&region, 99)), Ok(word(99)));
        }
    }
    space.check();
    // Where one goes, there is room for another.
    space.detach(space.devices()[5]).unwrap();
    space.attach(one_more.clone()).unwrap();
    assert_eq!(one_more.load(at(&region, 99)), Ok(word(99)));
    assert!(is_filled(&region));
    space.check();
}

/// Rule G13: a device that comes late has to be able to translate what there is.
#[test]
fn g13_a_device_that_cannot_have_a_region_is_not_attached() {
    let space = space_of(Faults::Signal, 16 * MIB, &[]);
    let region = region_of(&space, 2 * MIB, false);
    let start = format!("{:#x}", region.as_ptr() as u64);
    let low = Chip::new("low", MIB as u64, MmuDescriptor::new(Mode::Exclusive).addresses(0..1 << 30));
    let busy = Chip::exclusive("busy", MIB as u64);
    busy.take_addresses(at(&region, 3)..at(&region, 4));
    for (chip, name) in [(&low, "low"), (&busy, "busy")] {
        let e = space.attach(chip.clone()).unwrap_err().to_string();
        assert!(e.contains(name) && e.contains(&start) && e.contains("cannot translate"), "{e}");
    }
    assert_eq!(space.devices().len(), 1);
    assert!(is_filled(&region));
    space.check();
}

#[test]
fn g5_a_space_goes_while_its_devices_fault() {
    for (faults, dense, info) in all() {
        let chip = Chip::new("chip", 1 << 20, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = region_of(&space, 8 * MIB, dense);
        let base = region.as_ptr() as u64;
        std::thread::scope(|scope| {
            let users: Vec<_> = (0..2)
                .map(|n| {
                    let chip = &chip;
                    scope.spawn(move || {
                        let mut x: u64 = n;
                        loop {
                            x = x.wrapping_mul(7).wrapping_add(3);
                            match chip.load(base + x % 2048 * PAGE) {
                                Ok(w) => assert_eq!(w, word((x % 2048) as usize)),
                                // The region has gone first.
                                Err(FaultError::NotManaged(_)) => {}
                                Err(FaultError::Cut) => return,
                                Err(e) => panic!("{e}"),
                            }
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(20));
            within(Duration::from_secs(20), "the end of a space", || {
                drop(region);
                drop(space);
            });
            users.into_iter().for_each(|user| user.join().unwrap());
        });
        assert_eq!(chip.load(base), Err(FaultError::Cut));
    }
}

/// Rule G4: permission, range and alignment are checked first.
#[test]
fn g4_addresses_that_mean_nothing_are_refused() {
    for (faults, _, info) in all().filter(|(_, dense, _)| !dense) {
        let chip = Chip::new("chip", MIB as u64, info.addresses(0..u64::MAX));
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = region_of(&space, 2 * MIB, false);
        let (start, end) = (at(&region, 0), at(&region, 512));
        let nowhere =
            [0, 1, 8, PAGE - 1, 1 << 20, 1 << 47, (1 << 47) - 1, 1 << 48, 1 << 57, 1 << 63, 0xffff_8000_0000_0000];
        let last = [u64::MAX - 7, u64::MAX - 1, u64::MAX];
        let port = chip.port();
        for va in nowhere.into_iter().chain(last).chain([end, end + 1, start - 1]) {
            for access in [DeviceAccess::Read, DeviceAccess::Write, DeviceAccess::Atomic] {
                let e = port.fault(va, access).unwrap_err();
                assert!(matches!(e, FaultError::NotManaged(_) | FaultError::OutOfReach(_)), "{va:#x}: {e}");
            }
            for len in [0, 1, 8, 4096, 10_000] {
                let mut bytes = vec![7; len];
                assert!(matches!(port.read(va, &mut bytes), Err(FaultError::NotMapped(_))), "{va:#x}, {len}");
                assert!(matches!(port.write(va, &bytes), Err(FaultError::NotMapped(_))), "{va:#x}, {len}");
            }
            port.note_remote(va, u32::MAX);
        }
        // Inside, an address of any byte names its page; a range that reaches over the end of one is refused.
        port.fault(start + 4093, DeviceAccess::Read).unwrap();
        assert_eq!(chip.load(start + 8), Ok(word(0)));
        for (va, len) in [(start + 4090, 8), (start, 4097), (end - 4, 8), (end - 1, 2)] {
            let _ = port.fault(va, DeviceAccess::Write);
            assert_eq!(port.read(va, &mut vec![0; len]), Err(FaultError::NotMapped(va)), "{va:#x}");
            assert_eq!(port.write(va, &vec![0; len]), Err(FaultError::NotMapped(va)), "{va:#x}");
        }
        assert!(is_filled(&region));
        space.check();
    }
}

/// Rule G8: pages that go to and fro between devices are left alone for a while, and nobody else has to wait for that.
#[test]
fn g8_a_war_of_devices_keeps_nobody_else_waiting() {
    let chips = ["a", "b"].map(|name| Chip::exclusive(name, MIB as u64));
    let space = space_of(Faults::Signal, 16 * MIB, &[&chips[0], &chips[1]]);
    let region = region_of(&space, 2 * MIB, false);
    let mut other = space.region(mib(8)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // More threads than a processor has contexts for.
        for n in 0..32 {
            let (chip, region, stop) = (&chips[n % 2], &region, &stop);
            scope.spawn(move || {
                stop_when(stop, |_| {
                    chip.store(at(region, n / 2), word(n / 2)).unwrap();
                    std::thread::sleep(Duration::from_micros(200));
                });
            });
        }
        std::thread::sleep(Duration::from_millis(500));
        let mut longest = Duration::ZERO;
        for i in 0..200 {
            let begin = Instant::now();
            other.typed_mut::<u64>()[i * 512] = 1;
            longest = longest.max(begin.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, SeqCst);
        assert!(longest < Duration::from_millis(250), "a fault of the CPU took {longest:?}");
    });
    assert!(is_filled(&region));
    space.check();
}
