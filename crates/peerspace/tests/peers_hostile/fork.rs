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
            let chip = [&a, &b, &c][i / 700];
            match i % 3 {
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
