//! What the program does to memory that stays where it is, while devices use it (rules G4, G5, G12).

use super::*;

/// Rule G4: the program's permissions are the devices'.
#[test]
fn g4_what_the_program_protects_is_protected_from_devices() {
    each_kind(&STAYING, 2 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [a, b, _] = chips();
        let space = space_of(faults, &[&a, &b]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        for chip in [&a, &b] {
            chip.store(memory.va(5), word(5)).unwrap();
            chip.load(memory.va(6)).unwrap();
        }
        let whole = 0..memory.pages();
        memory.protect(whole.clone(), libc::PROT_READ);
        for va in [memory.va(5), memory.va(6), memory.va(200)] {
            for chip in [&a, &b] {
                assert_eq!(chip.store(va, 1), Err(FaultError::ReadOnly(va)), "{what}");
                assert!(chip.load(va).is_ok(), "{what}");
            }
        }
        memory.protect(whole.clone(), libc::PROT_NONE);
        for va in [memory.va(5), memory.va(6), memory.va(200)] {
            assert_eq!(a.load(va), Err(FaultError::Protected(va)), "{what}");
            assert_eq!(b.store(va, 1), Err(FaultError::Protected(va)), "{what}");
        }
        memory.protect(whole, RW);
        a.store(memory.va(5), 8).unwrap();
        assert_eq!((b.load(memory.va(5)), memory.word(5, 0).load(SeqCst)), (Ok(8), 8), "{what}");
        memory.word(5, 0).store(word(5), SeqCst);
        assert!(memory.is_filled());
        space.check();
        drop(adopted);
    });
}

/// A file that becomes shorter under the device: an error that says so, at once, for what is gone and for nothing else.
#[test]
fn g5_a_file_is_cut_short_under_the_device() {
    each_kind(&[Memfd, PrivateMemfd, File, PrivateFile], 4 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [a, b, _] = chips();
        let space = space_of(faults, &[&a, &b]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        assert!((0..1024).all(|i| a.load(memory.va(i)) == Ok(word(i))));
        memory.truncate(MIB);
        let begin = Instant::now();
        for i in [256, 300, 1023] {
            let va = memory.va(i);
            assert_eq!(a.load(va), Err(FaultError::Unreachable(va)), "{what}");
            assert_eq!(b.store(va, 1), Err(FaultError::Unreachable(va)), "{what}");
            if CAN_TRY {
                assert_eq!(read_byte(va as *const u8), None, "{what}: so it is for the CPU");
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{what}");
        // SAFETY: nobody uses the bytes meanwhile.
        let copied = unsafe { space.copy(memory.start, memory.va(300) as *const u8, 100) };
        assert!(copied.unwrap_err().to_string().contains("beyond the end of its file"), "{what}");
        assert!((0..256).all(|i| a.load(memory.va(i)) == Ok(word(i)) && b.load(memory.va(i)) == Ok(word(i))));
        space.check();
        memory.truncate(4 * MIB);
        assert_eq!((a.load(memory.va(300)), b.load(memory.va(255))), (Ok(0), Ok(word(255))), "{what}");
        b.store(memory.va(300), 5).unwrap();
        assert_eq!(memory.word(300, 0).load(SeqCst), 5);
        space.check();
        drop(adopted);
    });
}

/// Repeats `step` until told to stop.
fn until(stop: &AtomicBool, mut step: impl FnMut(usize)) -> usize {
    let mut n = 0;
    while !stop.load(SeqCst) {
        step(n);
        n += 1;
    }
    n
}

/// Rule G5: unmapped while devices work on it. What takes its place later is none of theirs, where the kernel tells of the change.
///
/// Run alone: of other tests' memory that took the place of a file, nothing would tell.
#[test]
#[ignore = "in a process of its own"]
fn unmapping() {
    for round in 0..3 {
        each_kind_once(&STAYING, |faults, kind| unmap_in_use(faults, kind, kind.is_told(), round));
        each_kind_once(&[File, PrivateFile], |faults, kind| unmap_in_use(faults, kind, false, round));
        each_kind_once(&[Memfd, Huge], |faults, kind| unmap_in_use(faults, kind, true, round + 10));
    }
}

/// `told`: the space hears of it; from round 10 on without what tells of files.
fn unmap_in_use(faults: Faults, kind: Kind, told: bool, round: usize) {
    let what = format!("{kind:?} {faults:?}, round {round}");
    let [a, b, _] = chips();
    let without = if told && round < 10 { 0 } else { WP_ASYNC };
    let space = space_without(without, faults, &[&a, &b]);
    let Some(memory) = Mapped::new(kind, 2 * MIB) else { return };
    let adopted = space.adopt(memory.start, memory.len).unwrap();
    let stop = AtomicBool::new(false);
    let refused = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for chip in [&a, &b] {
            let (memory, stop, refused, what) = (&memory, &stop, &refused, &what);
            scope.spawn(move || {
                until(stop, |n| {
                    let (va, write) = (memory.va(n * 7 % 512) + 64, n % 3 == 0);
                    let done = if write { chip.store(va, 0xbad) } else { chip.load(va).map(drop) };
                    match done {
                        Ok(()) => {}
                        Err(FaultError::NotManaged(_)) => drop(refused.fetch_add(1, SeqCst)),
                        Err(e) => panic!("{what}: {e}"),
                    }
                })
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        memory.unmap();
        let other = if told { Mapped::in_gap(memory.start, Private, memory.len) } else { None };
        let before = refused.load(SeqCst);
        wait_until(|| refused.load(SeqCst) > before + 100);
        stop.store(true, SeqCst);
        if let Some(other) = other {
            assert!(other.is_filled(), "{what}: a device wrote to what is not managed");
            other.unmap();
        }
    });
    if told {
        assert_eq!(adopted.in_place(), [], "{what}");
    }
    drop(adopted);
    space.check();
}

fn each_kind_once(kinds: &[Kind], mut test: impl FnMut(Faults, Kind)) {
    BOTH.into_iter().for_each(|faults| kinds.iter().for_each(|kind| test(faults, *kind)));
}

#[test]
fn g5_memory_is_unmapped_under_the_device() {
    let output = in_process("changes::unmapping", &[]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn g5_what_takes_the_place_of_a_file_is_managed_as_what_it_is() {
    let output = in_process("changes::replacing", &[]);
    assert!(output.status.success(), "{}", said(&output));
}

/// Of what the kernel has not told, nothing is left in the way: what comes to be there is managed as anything. Run alone, as
/// above.
#[test]
#[ignore = "in a process of its own"]
fn replacing() {
    for (faults, told) in BOTH.into_iter().flat_map(|faults| [(faults, true), (faults, false)]) {
        let told = told && tells_of_files();
        let [chip, ..] = chips();
        let space = space_without(if told { 0 } else { WP_ASYNC }, faults, &[&chip]);
        let (mut kinds, mut taken) = (vec![File, Memfd, Private], 0);
        while let Some(kind) = kinds.pop() {
            let memory = Mapped::new(PrivateFile, 4 * MIB).unwrap();
            let first = space.adopt(memory.start, memory.len).unwrap();
            assert_eq!(chip.load(memory.va(600)), Ok(word(600)));
            memory.unmap();
            // Without news, part of it is found to be gone by the device, the rest by nobody.
            assert!(matches!(chip.load(memory.va(600)), Err(FaultError::NotManaged(_))));
            assert_eq!(first.in_place().len(), !told as usize);
            let Some(there) = Mapped::in_gap(memory.start, kind, 4 * MIB) else {
                // The stack of a thread, most likely, that the space has started just now.
                taken += 1;
                assert!(taken < 10, "the gap is somebody else's, always");
                kinds.push(kind);
                continue;
            };
            if kind != Private && !told {
                // It may be what it always was, as far as anybody can say: the program has not let go of it.
                let e = space.adopt(there.start, there.len).unwrap_err().to_string();
                assert!(e.contains("managed already"), "{e}");
                drop(first);
                let second = space.adopt(there.start, there.len).unwrap();
                assert_eq!(chip.load(there.va(5)), Ok(word(5)));
                drop(second);
                there.unmap();
                continue;
            }
            let second = space.adopt(there.start, there.len).unwrap();
            let before = chip.moved()[0];
            assert_eq!(second.in_place().len(), kind.stays() as usize);
            for i in 0..1024 {
                chip.store(there.va(i) + 8, 1).unwrap();
            }
            assert_eq!(chip.moved()[0] > before, !kind.stays(), "what can move does");
            assert!(
                (0..1024).all(|i| there.word(i, 0).load(SeqCst) == word(i) && there.word(i, 1).load(SeqCst) == 1)
            );
            space.check();
            drop(second);
            drop(first);
            there.unmap();
        }
        space.check();
    }
}

/// Rule G5: shared memory moves, and the devices' pointers are the new ones.
#[test]
fn g5_a_mapping_moves_under_the_device() {
    each_kind_once(&[SharedAnonymous, Memfd, PrivateMemfd, Code, File, PrivateFile], |faults, kind| {
        if !kind.is_told() {
            return;
        }
        let [chip, ..] = chips();
        let space = space_of(faults, &[&chip]);
        let memory = Mapped::new(kind, 4 * MIB).unwrap();
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        assert!((0..1024).all(|i| chip.load(memory.va(i)) == Ok(word(i))));
        let place = Mapped::new(Private, 4 * MIB).unwrap();
        // SAFETY: both mappings are the test's, and nobody refers to the one that is replaced.
        let moved = unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(memory.start.cast(), memory.len, memory.len, flags, place.start)
        };
        assert_eq!(moved, place.start.cast());
        wait_until(|| chip.load(place.va(700)) == Ok(word(700)));
        for i in 0..1024 {
            assert!(matches!(chip.load(memory.va(i)), Err(FaultError::NotManaged(_))));
            chip.store(place.va(i) + 16, 4).unwrap();
            assert_eq!((place.word(i, 0).load(SeqCst), place.word(i, 2).load(SeqCst)), (word(i), 4));
        }
        space.check();
        drop(adopted);
        place.unmap();
        wait_until(|| matches!(chip.load(place.va(0)), Err(FaultError::NotManaged(_))));
        space.check();
    });
}

/// Rules G3, G5: what is discarded is what the file has, or zeros where that is given up as well.
#[test]
fn g5_what_is_discarded_is_what_the_file_has() {
    each_kind(&[Memfd, PrivateMemfd, SharedAnonymous, File, PrivateFile], 2 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [chip, ..] = chips();
        let space = space_of(faults, &[&chip]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        for i in 0..64 {
            chip.store(memory.va(i), 1).unwrap();
        }
        assert!(memory.advise(0..64, libc::MADV_DONTNEED));
        let there = if kind.is_shared() { |_| 1 } else { word };
        for i in 0..64 {
            wait_until(|| chip.load(memory.va(i)) == Ok(there(i)));
            assert_eq!(memory.word(i, 0).load(SeqCst), there(i), "{what}");
        }
        if kind.is_shared() && memory.advise(0..32, libc::MADV_REMOVE) {
            for i in 0..32 {
                wait_until(|| chip.load(memory.va(i)) == Ok(0));
                assert_eq!(memory.word(i, 0).load(SeqCst), 0, "{what}");
            }
        }
        space.check();
        drop(adopted);
    });
}

/// Rule Z3: a device that has translations of such memory leaves, and another takes its place.
#[test]
fn z3_a_device_leaves_what_it_accesses_in_place() {
    for faults in BOTH {
        let [a, b, c] = chips();
        let space = space_of(faults, &[&a, &b]);
        let memory = Mapped::new(Memfd, 4 * MIB).unwrap();
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        let uses = |chip: &Chip| (0..1024).all(|i| chip.load(memory.va(i)) == Ok(word(i)));
        assert!(uses(&a) && uses(&b));
        let id = space.devices()[1];
        space.detach(id).unwrap();
        assert!((0..1024).all(|i| a.target(memory.va(i)).is_none()));
        assert_eq!(a.load(memory.va(0)), Err(FaultError::Cut));
        space.attach(c.clone()).unwrap();
        assert!(uses(&b) && uses(&c));
        // One that has failed is cut off, and others are none the worse for it.
        c.trouble().refuse_unmap.store(true, SeqCst);
        assert!(memory.advise(0..8, libc::MADV_DONTNEED));
        wait_until(|| c.load(memory.va(0)) == Err(FaultError::Cut));
        assert!(uses(&b));
        space.check();
        drop(adopted);
        memory.unmap();
    }
}

/// Rule G12, run alone since other tests' threads would not exist in the child.
#[test]
#[ignore = "in a process of its own"]
fn forking() {
    for faults in BOTH {
        for kind in STAYING {
            let [a, b, _] = chips();
            let space = space_of(faults, &[&a, &b]);
            let Some(memory) = Mapped::new(kind, 2 * MIB) else { continue };
            let adopted = space.adopt(memory.start, memory.len).unwrap();
            assert!((0..512).all(|i| a.load(memory.va(i)) == Ok(word(i))));
            let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
            // SAFETY: the child calls what the space supports after a fork, and ends without destructors.
            let child = unsafe { libc::fork() };
            assert!(child >= 0);
            if child == 0 {
                let work = || {
                    // Its devices are memory here, and go on.
                    let all = (0..512).all(|i| b.load(memory.va(i)) == Ok(word(i)));
                    b.store(memory.va(3), 33).unwrap();
                    memory.word(4, 0).store(44, SeqCst);
                    std::io::Write::write_all(&mut to_parent, b"!").unwrap();
                    if kind.is_shared() {
                        wait_until(|| memory.word(5, 0).load(SeqCst) == 55);
                        assert_eq!(b.load(memory.va(5)), Ok(55));
                    }
                    space.check();
                    // The child's registration is its own: what it unmaps it hears of itself.
                    let before = memory.word(9, 0).load(SeqCst);
                    memory.unmap();
                    wait_until(|| b.load(memory.va(7)).is_err());
                    all && before == word(9)
                };
                let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
                // SAFETY: nothing of the parent's is to be torn down here.
                unsafe { libc::_exit(!good as i32) };
            }
            std::io::Read::read_exact(&mut from_child, &mut [0]).unwrap();
            a.store(memory.va(5), 55).unwrap();
            let seen = [a.load(memory.va(3)).unwrap(), a.load(memory.va(4)).unwrap()];
            let expected = if kind.is_shared() { [33, 44] } else { [word(3), word(4)] };
            assert_eq!(seen, expected, "{kind:?} {faults:?}");
            let mut status = 0;
            // SAFETY: a child of ours, and a place for its status.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0, "what the child of {kind:?} {faults:?} saw or did");
            assert_eq!((a.load(memory.va(7)), memory.word(5, 0).load(SeqCst)), (Ok(word(7)), 55));
            space.check();
            drop(adopted);
            memory.unmap();
        }
    }
}

#[test]
fn g12_shared_memory_is_shared_after_a_fork_and_private_is_not() {
    let output = in_process("changes::forking", &[]);
    assert!(output.status.success(), "{}", said(&output));
}

/// Rule G5: from when a change is announced until it is over no device accesses what stays, and after that none does what may not
/// be done any more.
#[test]
fn g5_announced_changes_keep_devices_out() {
    each_kind(&STAYING, 2 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [a, b, _] = chips();
        let space = space_of(faults, &[&a, &b]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        for chip in [&a, &b] {
            (0..512).for_each(|i| assert_eq!(chip.load(memory.va(i)), Ok(word(i))));
        }
        let (va, beside) = (memory.va(3), memory.va(300));
        let change = space.announce(va as *const u8, 4096);
        assert_eq!((a.target(va), b.target(va)), (None, None), "{what}");
        assert!(matches!(a.port().read(va, &mut [0; 8]), Err(FaultError::NotMapped(_))), "{what}");
        assert_eq!(b.load(beside), Ok(word(300)), "{what}: what is not concerned goes on");
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let stored = a.store(va, 1);
                assert!(is_over.load(SeqCst), "{what}: it did not wait");
                stored
            });
            std::thread::sleep(Duration::from_millis(20));
            let done = if kind == Huge || kind == SharedHuge { 0..512 } else { 3..4 };
            memory.protect(done, libc::PROT_READ);
            is_over.store(true, SeqCst);
            drop(change);
            assert_eq!(waits.join().unwrap(), Err(FaultError::ReadOnly(va)), "{what}");
        });
        assert_eq!((b.load(va), memory.word(3, 0).load(SeqCst)), (Ok(word(3)), word(3)), "{what}");
        space.check();
        drop(adopted);
    });
}
