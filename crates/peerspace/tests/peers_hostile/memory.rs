//! What the program does to memory that devices use: protecting, unmapping, discarding, pinning (rules G4, G5, H5, Z8).

use super::*;
use peerspace::Use;
use std::sync::atomic::AtomicU64;

/// Anonymous memory of the program's own.
struct Mapped {
    start: *mut u8,
    len: usize,
}

// SAFETY: it is plain memory; the tests access it by atomics.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(len: usize) -> Mapped {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let memory = Mapped { start: start.cast(), len };
        (0..len / page()).for_each(|i| (0..512).for_each(|k| memory.word(i, k).store(word(i), SeqCst)));
        memory
    }

    fn word(&self, page: usize, k: usize) -> &AtomicU64 {
        assert!(page * 4096 + k * 8 + 8 <= self.len);
        // SAFETY: it lies in the mapping, as long as the test has not unmapped it, and is aligned.
        unsafe { &*self.start.add(page * 4096 + k * 8).cast() }
    }

    fn va(&self, page: usize) -> u64 {
        self.start as u64 + page as u64 * PAGE
    }

    fn advise(&self, pages: std::ops::Range<usize>, advice: i32) {
        // SAFETY: pages of the mapping, whose content the test gives up.
        let done = unsafe { libc::madvise(self.start.add(pages.start * 4096).cast(), pages.len() * 4096, advice) };
        assert_eq!(done, 0);
    }

    fn protect(&self, permission: i32) {
        // SAFETY: the test writes to it no more where it must not.
        assert_eq!(unsafe { libc::mprotect(self.start.cast(), self.len, permission) }, 0);
    }

    fn unmap(&self) {
        // SAFETY: the test refers to it no more.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.len) }, 0);
    }
}

/// Rule G4: the program's own permissions hold for devices.
#[test]
fn g4_memory_made_read_only_is_read_only_on_devices() {
    for (faults, touched, info) in all() {
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let memory = Mapped::new(MIB);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        // Pages that the space knows, and some that it has never heard of.
        if touched {
            (0..64).for_each(|i| assert_eq!(chip.load(memory.va(i)), Ok(word(i))));
            // Home again, what came ahead included: what a device has it keeps, as nobody tells of the change.
            (0..256).for_each(|i| assert_eq!(memory.word(i, 0).load(SeqCst), word(i)));
        }
        memory.protect(libc::PROT_READ);
        within(Duration::from_secs(20), "accesses to what is read-only", || {
            for i in 0..128 {
                let va = memory.va(i);
                assert_eq!(chip.store(va, 1), Err(FaultError::ReadOnly(va)));
                assert_eq!(chip.add(va, 1), Err(FaultError::ReadOnly(va)));
                assert_eq!(chip.load(va), Ok(word(i)));
                // Also when it has what it reads.
                assert_eq!(chip.store(va, 1), Err(FaultError::ReadOnly(va)));
                assert_eq!(memory.word(i, 0).load(SeqCst), word(i));
            }
        });
        memory.protect(libc::PROT_READ | libc::PROT_WRITE);
        (0..128).for_each(|i| chip.store(memory.va(i), word(i)).unwrap());
        adopted.release().unwrap();
        for i in 0..256 {
            assert_eq!(memory.word(i, 0).load(SeqCst), word(i), "page {i}, {touched} {faults:?}");
        }
        space.check();
        memory.unmap();
    }
}

/// Memory given back to the kernel comes home from devices as well, mapped there or not.
#[test]
fn g1_memory_given_back_comes_home_from_devices() {
    for (faults, written, info) in all() {
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let memory = Mapped::new(4 * MIB);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        for i in 0..1024 {
            let va = memory.va(i);
            if written { chip.store(va, word(i)).unwrap() } else { assert_eq!(chip.load(va), Ok(word(i))) }
        }
        chip.add(memory.va(1), 0).unwrap();
        adopted.release().unwrap();
        assert!((0..1024).all(|i| (0..512).all(|k| memory.word(i, k).load(SeqCst) == word(i))));
        assert!(matches!(chip.port().fault(memory.va(1), DeviceAccess::Read), Err(FaultError::NotManaged(_))));
        assert_eq!(chip.target(memory.va(1)), None);
        space.check();
        memory.unmap();
    }
}

/// Adopted memory that the program has unmapped may be given up all the same, as often as there is such memory.
#[test]
fn g5_adopted_memory_that_was_unmapped_can_be_given_up() {
    let space = space_of(Faults::Signal, 16 * MIB, &[]);
    for _ in 0..10 {
        let memory = Mapped::new(MIB);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        memory.unmap();
        drop(adopted);
        let region = region_of(&space, 2 * MIB, false);
        assert!(is_filled(&region));
    }
    space.check();
}

/// Rule G5: what the program unmaps is gone for devices before it can be used again.
#[test]
fn g5_memory_that_is_unmapped_under_a_device_is_gone() {
    for (faults, once, info) in all() {
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        for round in 0..if once { 1 } else { 10 } {
            let memory = Mapped::new(MIB);
            let adopted = space.adopt(memory.start, memory.len).unwrap();
            let (stop, uses) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for k in 0..2 {
                    let (chip, memory, stop, uses) = (&chip, &memory, &stop, &uses);
                    scope.spawn(move || {
                        let mut gone = 0;
                        stop_when(stop, |n| {
                            uses.fetch_add(1, SeqCst);
                            let i = (n * 7 + k) as usize % 256;
                            let done = match n % 3 {
                                0 => chip.store(memory.va(i), word(i)),
                                _ => chip.load(memory.va(i)).map(|w| assert_eq!(w, word(i))),
                            };
                            match done {
                                Ok(()) => assert_eq!(gone, 0, "what is gone is back"),
                                Err(FaultError::NotManaged(_)) => gone += 1,
                                Err(e) => panic!("{e}"),
                            }
                        });
                    });
                }
                wait_until(|| uses.load(SeqCst) > 300);
                memory.unmap();
                // Something else is put in its place, which devices have no part in.
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                // SAFETY: the place is free, or the call fails.
                let other = unsafe { libc::mmap(memory.start.cast(), memory.len, 3, flags, -1, 0) };
                if other == memory.start.cast() {
                    (0..256).for_each(|i| memory.word(i, 1).store(77, SeqCst));
                }
                let before = uses.load(SeqCst);
                wait_until(|| uses.load(SeqCst) > before + 100);
                stop.store(true, SeqCst);
                if other == memory.start.cast() {
                    let same =
                        (0..256).all(|i| memory.word(i, 0).load(SeqCst) == 0 && memory.word(i, 1).load(SeqCst) == 77);
                    assert!(same, "round {round}: a device wrote to what is not managed");
                    memory.unmap();
                }
            });
            drop(adopted);
            space.check();
        }
    }
}

/// Rules G3, G5: what is discarded reads as zeros, for everybody.
#[test]
fn g5_what_is_discarded_is_zeros_for_devices_and_the_cpu() {
    for (faults, adopts, info) in all() {
        let what = format!("{faults:?} {adopts} {info:?}");
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let mut region = space.region(mib(2)).unwrap();
        let owned = Mapped::new(2 * MIB);
        let adopted = space.adopt(owned.start, owned.len).unwrap();
        let memory = if adopts { &owned } else { &Mapped { start: region.as_ptr(), len: 2 * MIB } };
        for round in 1..12u64 {
            // Not often the same: what goes to and fro is made to stay for a while.
            let pages = (round / 2 * 32) as usize..(round / 2 * 32 + 32) as usize;
            // On the CPU, on the device, on both; and never used.
            for i in pages.clone() {
                memory.word(i, 3).store(round, SeqCst);
                match i % 4 {
                    0 => chip.store(memory.va(i) + 32, round).unwrap(),
                    1 => assert_eq!(chip.load(memory.va(i) + 24), Ok(round)),
                    _ => {}
                }
            }
            if adopts {
                // The program's own call returns when the news is received; devices hear of it a moment later.
                memory.advise(pages.clone(), libc::MADV_DONTNEED);
                pages.clone().for_each(|i| wait_until(|| chip.load(memory.va(i) + 24) == Ok(0)));
            } else {
                region.discard(pages.start * 4096..pages.end * 4096).unwrap();
            }
            for i in pages {
                let by_cpu = || memory.word(i, 3).load(SeqCst);
                let by_chip = || chip.load(memory.va(i) + 24).unwrap();
                let seen = if i % 3 == 0 {
                    (by_cpu(), by_chip())
                } else {
                    let c = by_chip();
                    (by_cpu(), c)
                };
                assert_eq!(seen, (0, 0), "{what}, round {round}, page {i}");
            }
        }
        space.check();
        adopted.release().unwrap();
        owned.unmap();
    }
}

/// The same while the device goes on reading and writing: it sees what was there, or zeros, and does not come to a halt.
#[test]
fn g5_discarding_what_a_device_is_using_ends_well() {
    for (faults, adopts, info) in all() {
        let (far, what) = (info.remote, format!("{faults:?} {adopts} {info:?}"));
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = space.region(mib(2)).unwrap();
        let owned = Mapped::new(2 * MIB);
        let adopted = space.adopt(owned.start, owned.len).unwrap();
        let memory = if adopts { &owned } else { &Mapped { start: region.as_ptr(), len: 2 * MIB } };
        memory.advise(0..64, libc::MADV_DONTNEED);
        let stop = AtomicBool::new(false);
        within(Duration::from_secs(30), &what, || {
            std::thread::scope(|scope| {
                let (chip, stop, what) = (&chip, &stop, &what);
                scope.spawn(move || {
                    let done = stop_when(stop, |n| {
                        let va = memory.va(n as usize % 8);
                        // At once, however often the page goes to and fro.
                        if n % 2 == 0 && !far {
                            chip.add(va + 8, 1).unwrap();
                        } else if n % 9 == 0 {
                            chip.store(va + 8, n).unwrap();
                        }
                        if far || chip.target(va).is_some() {
                            let seen = chip.load(va);
                            assert!(matches!(seen, Ok(0 | 0x5a5a)), "{what}: {seen:x?}");
                        }
                    });
                    assert!(done > 20, "{what}: {done} accesses");
                });
                let end = Instant::now() + Duration::from_millis(700);
                let mut rounds = 0;
                while Instant::now() < end {
                    let i = rounds % 8;
                    rounds += 1;
                    memory.word(i, 0).store(0x5a5a, SeqCst);
                    memory.advise(i..i + 1, libc::MADV_DONTNEED);
                    assert_eq!(memory.word(i, 0).load(SeqCst), 0, "{what}: the program sees what it has discarded");
                }
                stop.store(true, SeqCst);
            });
        });
        space.check();
        adopted.release().unwrap();
        owned.unmap();
    }
}

/// MADV_FREE leaves the pages there until the kernel wants them: there is one memory all the same.
#[test]
fn g5_what_is_given_up_lazily_is_one_memory_for_all() {
    for (faults, adopts, info) in all() {
        let what = format!("{faults:?} {adopts} {info:?}");
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = space.region(mib(2)).unwrap();
        let owned = Mapped::new(2 * MIB);
        let adopted = space.adopt(owned.start, owned.len).unwrap();
        let memory = if adopts { &owned } else { &Mapped { start: region.as_ptr(), len: 2 * MIB } };
        within(Duration::from_secs(30), &what, || {
            for i in 0..3 {
                memory.word(i, 0).store(5, SeqCst);
                memory.advise(i..i + 1, libc::MADV_FREE);
                let seen = memory.word(i, 0).load(SeqCst);
                assert!(seen == 0 || seen == 5, "{what}");
                memory.word(i, 0).store(6, SeqCst);
                assert_eq!(chip.load(memory.va(i)), Ok(6), "{what}");
                chip.store(memory.va(i), 7).unwrap();
                assert_eq!(memory.word(i, 0).load(SeqCst), 7, "{what}");
                memory.word(i, 0).store(8, SeqCst);
                assert_eq!(chip.load(memory.va(i)), Ok(8), "{what}");
            }
        });
        space.check();
        adopted.release().unwrap();
        owned.unmap();
    }
}

/// Rules H5, Z8: what is pinned stays on the host. A device that can uses it there; one that cannot waits, and is told in the
/// end.
#[test]
fn z8_what_is_pinned_stays_on_the_host() {
    for (faults, dense, info) in all() {
        let far = info.remote;
        let what = format!("{dense} {info:?}");
        let chip = Chip::new("chip", CHIP, info.clone());
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = region_of(&space, 2 * MIB, dense);
        let va = at(&region, 7);
        assert_eq!(chip.load(va), Ok(word(7)));
        let held = space.make_resident(va as *const u8, 4096, Use::Write).unwrap();
        if far {
            chip.store(va, word(7)).unwrap();
            assert_eq!(chip.target(va), Some((Target::Host, true)), "{what}");
        }
        // What is let go of in time is waited for.
        std::thread::scope(|scope| {
            let user = scope.spawn(|| chip.add(va + 8, 0));
            std::thread::sleep(Duration::from_millis(100));
            drop(held);
            assert_eq!(user.join().unwrap(), Ok(()), "{what}");
        });
        assert!(matches!(chip.target(va), Some((Target::Own(_), true))), "{what}");
        space.check();
        assert!(is_filled(&region));
    }
    // And what is not is given up.
    let chip = Chip::exclusive("chip", CHIP);
    let space = space_of(Faults::Signal, 16 * MIB, &[&chip]);
    let region = region_of(&space, 2 * MIB, false);
    let va = at(&region, 7);
    let held = space.make_resident(va as *const u8, 4096, Use::Write).unwrap();
    let e = within(Duration::from_secs(15), "a fault on what is pinned", || chip.load(va)).unwrap_err();
    assert!(matches!(e, FaultError::Pinned(at) if at == va), "{e}");
    drop(held);
    assert_eq!(chip.load(va), Ok(word(7)));
}

/// Short pins of others, such as those of `try_read`, are no reason to fail.
#[test]
fn h5_short_pins_fail_no_fault() {
    let chip = Chip::exclusive("chip", CHIP);
    let space = space_of(Faults::Signal, 16 * MIB, &[&chip]);
    let region = region_of(&space, 2 * MIB, false);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (region, stop) = (&region, &stop);
        scope.spawn(move || {
            let mut bytes = vec![0; 4 * 4096];
            stop_when(stop, |n| region.try_read(n as usize % 4 * 4096, &mut bytes).unwrap())
        });
        for n in 0..4000 {
            let i = n % 8;
            assert_eq!(chip.load(at(region, i)), Ok(word(i)), "fault {n}");
        }
        stop.store(true, SeqCst);
    });
    space.check();
}

/// A device may wait with unmapping until its accesses to the host are over: they wait for nothing.
#[test]
fn g5_a_device_that_waits_for_its_accesses_keeps_nobody_waiting() {
    for faults in BOTH {
        let chip = Chip::new("chip", CHIP, MmuDescriptor::new(Mode::Share).remote());
        chip.trouble().minds_host.store(true, SeqCst);
        let other = Chip::exclusive("other", CHIP);
        let space = space_of(faults, 16 * MIB, &[&chip, &other]);
        let region = region_of(&space, 2 * MIB, false);
        let stop = AtomicBool::new(false);
        within(Duration::from_secs(30), "discarding what is accessed on the host", || {
            std::thread::scope(|scope| {
                let (chip, other, region, stop) = (&chip, &other, &region, &stop);
                for k in 0..2 {
                    scope.spawn(move || {
                        stop_when(stop, |n| {
                            let i = (n as usize * 2 + k) % 16;
                            let seen = chip.load(at(region, i)).unwrap();
                            assert!(seen == word(i) || seen == 0);
                        });
                    });
                }
                let memory = Mapped { start: region.as_ptr(), len: 2 * MIB };
                for n in 0..300 {
                    let i = n % 16;
                    memory.word(i, 0).store(word(i), SeqCst);
                    match n % 3 {
                        0 => memory.advise(i..i + 1, libc::MADV_DONTNEED),
                        1 => other.add(memory.va(i) + 8, 1).unwrap(),
                        _ => drop(space_of(faults, 16 * MIB, &[])),
                    }
                }
                stop.store(true, SeqCst);
            });
        });
        space.check();
    }
}

/// What a device reads and writes on the host may come from, and go to, managed memory that is not there just then.
#[test]
fn g5_a_device_may_have_its_own_bytes_in_managed_memory() {
    for faults in BOTH {
        let chip = Chip::new("chip", CHIP, MmuDescriptor::new(Mode::Share).remote());
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let mut region = region_of(&space, 2 * MIB, false);
        assert_eq!(chip.load(at(&region, 3)), Ok(word(3)));
        chip.store(at(&region, 4) + 64, word(4)).unwrap();
        let mut own = space.region(mib(2)).unwrap();
        within(Duration::from_secs(20), "an access with managed memory", || {
            // Pages that were never there.
            let to = &mut own.bytes_mut()[4000..4000 + 4096];
            chip.port().read(at(&region, 3), to).unwrap();
            assert!(*to == region.bytes()[3 * 4096..4 * 4096]);
            assert!(chip.port().read(at(&region, 3) + 8, to).is_err(), "it ends in the next page");
            // And that are on a device.
            push_out(&space, 32 * MIB);
            let from = &own.bytes()[4000..4000 + 2000];
            while chip.port().write(at(&region, 4), from) == Err(FaultError::NotMapped(at(&region, 4))) {
                chip.store(at(&region, 4), word(4)).unwrap();
            }
            assert!(region.bytes()[4 * 4096..][..2000] == *from);
        });
        fill(region.typed_mut());
        space.check();
        assert!(is_filled(&region));
    }
}

static TOUCHED: AtomicU64 = AtomicU64::new(0);

extern "C" fn touch(_: i32) {
    let at = TOUCHED.load(SeqCst);
    if at != 0 {
        // SAFETY: the test keeps a region there as long as signals come.
        unsafe { (*(at as *const AtomicU64)).fetch_add(1, SeqCst) };
    }
}

/// A handler of the program's own may use managed memory, also while its thread accesses memory for a device.
#[test]
fn signals_in_the_midst_of_a_remote_access_do_no_harm() {
    for faults in BOTH {
        let chip = Chip::new("chip", CHIP, MmuDescriptor::new(Mode::Share).remote());
        let near = Chip::new("near", CHIP, MmuDescriptor::new(Mode::Replicate));
        let space = space_of(faults, 16 * MIB, &[&chip, &near]);
        let region = region_of(&space, 2 * MIB, false);
        // SAFETY: a zeroed sigaction is valid, and the handler has the right type.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = touch as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()), 0);
        }
        TOUCHED.store(at(&region, 9), SeqCst);
        let stop = AtomicBool::new(false);
        within(Duration::from_secs(30), "remote accesses with signals", || {
            std::thread::scope(|scope| {
                let (chip, near, region, stop) = (&chip, &near, &region, &stop);
                let (me, user) = std::sync::mpsc::channel();
                scope.spawn(move || {
                    // SAFETY: asks for nothing.
                    me.send(unsafe { libc::pthread_self() }).unwrap();
                    stop_when(stop, |n| {
                        let i = n as usize % 4 + 4;
                        assert_eq!(chip.load(at(region, i) + 64), Ok(word(i)));
                    });
                });
                let thread = user.recv().unwrap();
                // Each time the handler's write has the devices let go of what they may only read.
                let page = Mapped { start: at(region, 9) as *mut u8, len: 4096 };
                for n in 0..300 {
                    assert_eq!(near.load(at(region, 9)), Ok(word(9) + n));
                    assert_eq!(chip.load(at(region, 9)), Ok(word(9) + n));
                    assert_eq!(chip.target(at(region, 9)), Some((Target::Host, false)));
                    // SAFETY: the thread runs until it is told to stop.
                    unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
                    while page.word(0, 0).load(SeqCst) == word(9) + n {
                        std::thread::yield_now();
                    }
                }
                stop.store(true, SeqCst);
            });
        });
        TOUCHED.store(0, SeqCst);
        space.check();
    }
}
