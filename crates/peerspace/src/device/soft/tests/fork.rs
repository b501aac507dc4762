//! Forks: lanes are held while the process forks, and the new one has what the device held, if not its lanes (rule G12).

use super::*;
use crate::device::ForkSide;
use crate::device::soft::LaunchError;
use std::sync::atomic::AtomicBool;

#[test]
fn g12_lanes_rest_while_the_process_forks_and_the_child_has_the_data() {
    let gpu = Accelerator::new(Options::new(8 * page()).lanes(3)).unwrap();
    let space = FakeSpace::new(&gpu, 8, Manner::Move);
    let stop = Arc::new(AtomicBool::new(false));
    let job = {
        let stop = stop.clone();
        launch(&gpu, 3, move |lane, _| {
            let mut n = 0u64;
            while !stop.load(Relaxed) {
                n += 1;
                // Two words that are the same, but for the moment between.
                let at = BASE + lane.index() as u64 * page();
                lane.store(at, n)?;
                lane.store(at + 8, n)?;
            }
            Ok(())
        })
    };
    while (0..3).any(|i| space.cpu_word(BASE + i * page()) == 0) && !job.is_done() {
        std::thread::yield_now();
    }
    let words = || {
        let mut bytes = vec![0; gpu.bytes() as usize];
        let mut batch = [Load::new(0, &mut bytes)];
        gpu.load(&mut batch);
        assert_eq!(batch[0].result, Ok(()));
        bytes
    };
    for _ in 0..5 {
        // The fake space is at rest while it is locked.
        let locked = space.lock();
        gpu.before_fork();
        let held = words();
        // SAFETY: the child calls the device, which neither allocates nor takes a lock that a lane could have had, and ends
        // without running anything of the test's. What it allocates comes from a C library that is ready for that.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            gpu.after_fork(ForkSide::Child);
            let failed = |what: i32, is: bool| {
                if !is {
                    // SAFETY: ends the child at once.
                    unsafe { libc::_exit(what) }
                }
            };
            failed(1, words() == held);
            failed(2, job.wait() == Err(KernelError::Forked));
            // SAFETY: it is not launched.
            failed(3, unsafe { gpu.launch(1, |_, _| Ok(())) }.is_err_and(|e| e == LaunchError::Forked));
            failed(4, gpu.unmap(BASE..BASE + 8 * page()) == Ok(Progress::Done));
            failed(5, gpu.map(&[Mapping { va: BASE, bytes: page(), to: Target::Own(7), writable: true }]).is_ok());
            drop(gpu.clone());
            failed(0, false);
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(words() == held, "a lane wrote while the process forked");
        gpu.after_fork(ForkSide::Parent);
        drop(locked);
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child failed");
        // And they go on.
        let before = space.cpu_word(BASE);
        while space.cpu_word(BASE) == before {
            assert!(!job.is_done(), "{:?}", job.wait());
            std::thread::yield_now();
        }
    }
    stop.store(true, Relaxed);
    assert_eq!(job.wait(), Ok(()));
    space.let_go();
}
