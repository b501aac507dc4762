//! Forks with pages on several devices (rule G12).

use super::*;

/// Forks, has the child do `work`, and waits for it: it must end well, and soon.
fn forked(work: impl FnOnce() -> bool, meanwhile: impl FnOnce()) {
    // SAFETY: the child calls what the space supports after a fork, and ends without destructors.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
        // SAFETY: nothing of the parent's is to be torn down here.
        unsafe { libc::_exit(!good as i32) };
    }
    meanwhile();
    let end = Instant::now() + Duration::from_secs(40);
    let mut status = 0;
    // SAFETY: a child of ours, and a place for its status.
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if Instant::now() > end {
            // SAFETY: a child of ours, not waited for yet.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(status, 0, "what the child saw or did");
}

/// Run alone, since other tests' threads would not exist in the child.
#[test]
#[ignore = "in a process of its own"]
fn forking() {
    for (n, faults) in BOTH.into_iter().cycle().take(4).enumerate() {
        let [a, b, c] = modes().map(|info| Chip::new("chip", CHIP, info));
        let space = space_of(faults, 16 * MIB, &[&a, &b, &c]);
        let mut region = region_of(&space, 8 * MIB, n >= 2);
        let zeros = space.region(mib(2)).unwrap();
        for i in 0..2048 {
            let chip = [&a, &b, &c][i % 3];
            match i / 3 % 3 {
                0 => assert_eq!(chip.load(at(&region, i)), Ok(word(i))),
                1 => chip.store(at(&region, i), word(i)).unwrap(),
                _ => chip.add(at(&region, i), 0).unwrap(),
            }
            if i < 512 {
                assert_eq!(b.load(at(&zeros, i)), Ok(0));
            }
        }
        let base = at(&region, 0);
        let everything_is_there = |salt: u64| {
            let words = region.typed::<u64>();
            (0..2048).all(|i| words[i * 512 + 1] == word(i) && words[i * 512] == word(i) + salt)
        };
        forked(
            || {
                let there = everything_is_there(0);
                // The child's own writes are its own.
                // SAFETY: the region is the child's, and nobody else uses it there.
                (0..2048).for_each(|i| unsafe { *((base + i * PAGE) as *mut u64) += 7 });
                // Its devices go on, as far as they have anything to run on: what they are is memory here.
                let chips = (0..2048).all(|i| b.load(at(&region, i)) == Ok(word(i) + 7));
                space.check();
                there && chips && everything_is_there(7) && zeros.typed::<u64>().iter().all(|w| *w == 0)
            },
            || {
                // The parent writes while the child looks.
                (0..2048).for_each(|i| a.store(at(&region, i), word(i) + 9).unwrap());
            },
        );
        assert!(everything_is_there(9), "{faults:?}");
        fill(region.typed_mut());
        space.check();
        assert!(is_filled(&region));
    }
}

#[test]
fn g12_parent_and_child_both_keep_what_was_on_devices() {
    let output = in_process("fork::forking", &[]);
    assert!(output.status.success(), "{}", said(&output));
}

/// Where nobody has written yet the kernel maps its page of zeros, and forgets about it in a forked process.
#[test]
#[ignore = "in a process of its own"]
fn forking_zeros() {
    for faults in BOTH {
        let chip = Chip::new("chip", CHIP, MmuDescriptor::new(Mode::Share).remote());
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = space.region(mib(2)).unwrap();
        region.advise(Hint::Sparse).unwrap();
        let map = || {
            let (none, kind) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: new memory, which stays. Beside others of its kind it would be one mapping with them, and have been written to.
            unsafe {
                let at = libc::mmap(std::ptr::null_mut(), 66 * PAGE as usize, none, kind, -1, 0);
                assert_ne!(at, libc::MAP_FAILED);
                let at = at.wrapping_byte_add(PAGE as usize);
                assert_eq!(libc::mprotect(at, 64 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE), 0);
                at as u64
            }
        };
        let places = [at(&region, 0), map(), map()];
        let read = |va: u64| {
            // SAFETY: mapped, and read only.
            unsafe { (va as *const u64).read_volatile() }
        };
        let pages = |from: u64| {
            places.into_iter().flat_map(move |start| (from..64).step_by(3).map(move |i| start + i * PAGE))
        };
        // In one of them the kernel has mapped all pages by itself.
        assert!((0..64).all(|i| read(places[2] + i * PAGE) == 0));
        let adopted = [1, 2].map(|n| space.adopt(places[n] as *const u8, 64 * PAGE as usize).unwrap());
        assert!((0..3).flat_map(pages).all(|va| chip.load(va) == Ok(0)));
        assert!((0..3).flat_map(pages).all(|va| read(va) == 0));
        let work = || {
            let seen = pages(0).all(|va| chip.load(va) == Ok(0)) && pages(1).all(|va| read(va) == 0);
            pages(2).for_each(|va| chip.store(va, va).unwrap());
            let all = pages(0).chain(pages(1)).all(|va| read(va) == 0) && pages(2).all(|va| read(va) == va);
            space.check();
            seen && all
        };
        forked(work, || ());
        assert!(work());
        drop(adopted);
    }
}

#[test]
fn g12_zeros_that_nobody_wrote_are_zeros_in_a_child() {
    let output = in_process("fork::forking_zeros", &[]);
    assert!(output.status.success(), "{}", said(&output));
}
