//! The queue of kernels: order, errors, panics, and what becomes of it when its device goes.

use super::*;
use crate::device::soft::LaunchError;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

fn attached(lanes: usize) -> (Accelerator, Arc<FakeSpace>) {
    let gpu = Accelerator::new(Options::new(4 * page()).lanes(lanes)).unwrap();
    let space = FakeSpace::new(&gpu, 4, Manner::Move);
    (gpu, space)
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(SeqCst) {
        std::thread::yield_now();
    }
}

/// A kernel that waits for the first flag, after it has set the second.
fn gate(gpu: &Accelerator) -> (Job, Arc<AtomicBool>) {
    let (open, there) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let job = {
        let (open, there) = (open.clone(), there.clone());
        launch(gpu, 1, move |_, _| {
            there.store(true, SeqCst);
            wait_for(&open);
            Ok(())
        })
    };
    wait_for(&there);
    (job, open)
}

#[test]
fn every_item_is_run_once_and_kernels_one_after_the_other() {
    let (gpu, space) = attached(3);
    let seen: Arc<Vec<AtomicU64>> = Arc::new((0..1001).map(|_| AtomicU64::new(0)).collect());
    let jobs: Vec<Job> = (0..20)
        .map(|n| {
            let seen = seen.clone();
            launch(&gpu, 1001, move |_, items| {
                for i in items {
                    // Whoever comes before his turn finds another number.
                    seen[i as usize]
                        .compare_exchange(n, n + 1, SeqCst, SeqCst)
                        .map_err(|_| KernelError::failed("order"))?;
                    if n > 0 && seen[(i as usize + 500) % 1001].load(SeqCst) < n {
                        return Err(KernelError::failed("the kernel before has not ended"));
                    }
                }
                Ok(())
            })
        })
        .collect();
    // In any order, and each as often as one likes.
    jobs.iter().rev().chain(&jobs).for_each(|job| assert_eq!(job.wait(), Ok(())));
    assert!(seen.iter().all(|n| n.load(SeqCst) == 20));
    assert_eq!(launch(&gpu, 0, |_, _| Err(KernelError::failed("no item"))).wait(), Ok(()));
    space.let_go();
}

#[test]
fn lanes_are_named_and_have_numbers() {
    let (gpu, space) = attached(2);
    let met = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
    let job = {
        let met = met.clone();
        launch(&gpu, 2, move |lane, _| {
            assert_eq!(std::thread::current().name(), Some("peerspace-lane"));
            // Each run waits for the other: by one lane alone it would never end.
            met[lane.index()].store(true, SeqCst);
            met.iter().for_each(wait_for);
            Ok(())
        })
    };
    assert_eq!(job.wait(), Ok(()));
    space.let_go();
}

#[test]
fn the_first_error_ends_a_kernel_and_not_the_next() {
    let (gpu, space) = attached(2);
    let runs = Arc::new(AtomicU64::new(0));
    let job = {
        let runs = runs.clone();
        launch(&gpu, 1 << 40, move |_, items| {
            runs.fetch_add(1, SeqCst);
            if items.start == 0 { Err(KernelError::failed("on purpose")) } else { Ok(()) }
        })
    };
    assert_eq!(job.wait(), Err(KernelError::failed("on purpose")));
    assert!(runs.load(SeqCst) <= 16);
    assert_eq!(launch(&gpu, 10, |_, _| Ok(())).wait(), Ok(()));
    space.let_go();
}

/// Panics when it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("dropped on purpose");
    }
}

#[test]
fn panics_are_errors_of_their_kernel() {
    let (gpu, space) = attached(2);
    let failed = |job: Job| match job.wait() {
        Err(KernelError::Panicked(message)) => message,
        other => panic!("{other:?}"),
    };
    assert_eq!(failed(launch(&gpu, 5, |_, items| panic!("of {}", items.end - items.start))), "of 1");
    assert_eq!(failed(launch(&gpu, 1, |_, _| panic!("plain"))), "plain");
    assert_eq!(failed(launch(&gpu, 1, |_, _| std::panic::panic_any(5u8))), "without a message");
    assert_eq!(failed(launch(&gpu, 1, |_, _| std::panic::panic_any(Bomb))), "with something that panics itself");
    let bomb = Bomb;
    assert_eq!(failed(launch(&gpu, 1, move |_, _| Ok(_ = &bomb))), "dropped on purpose");
    assert_eq!(once(&gpu, |lane| lane.store(BASE, 1u8)), Ok(()));
    space.let_go();
}

#[test]
fn waiting_has_an_end_and_gives_what_was_captured_back_before() {
    let (gpu, space) = attached(2);
    let captured = Arc::new(());
    let (job, open) = gate(&gpu);
    let later = {
        let captured = captured.clone();
        launch(&gpu, 100, move |_, _| {
            drop(captured.clone());
            Ok(())
        })
    };
    let begun = Instant::now();
    assert_eq!(job.wait_timeout(Duration::from_millis(20)), None);
    assert!(begun.elapsed() >= Duration::from_millis(20));
    assert!(!job.is_done() && !later.is_done());
    // A job that nobody holds is run all the same.
    let left = Arc::new(AtomicBool::new(false));
    let flag = left.clone();
    drop(launch(&gpu, 1, move |_, _| {
        flag.store(true, SeqCst);
        Ok(())
    }));
    open.store(true, SeqCst);
    assert_eq!(later.wait_timeout(Duration::MAX), Some(Ok(())));
    assert_eq!(Arc::strong_count(&captured), 1);
    assert!(job.is_done());
    wait_for(&left);
    space.let_go();
}

#[test]
fn a_kernel_that_waits_for_its_own_device_is_told() {
    let (gpu, space) = attached(2);
    let (other, other_space) = attached(1);
    let inner = (gpu.clone(), other.clone());
    let failed = once(&gpu, move |_| {
        launch(&inner.1, 1, |_, _| Ok(())).wait()?;
        launch(&inner.0, 1, |_, _| Ok(())).wait()
    });
    assert_eq!(failed, Err(KernelError::WaitsForItself));
    space.let_go();
    other_space.let_go();
}

#[test]
fn the_last_handle_may_be_dropped_by_a_lane_and_what_is_left_is_stopped() {
    let (gpu, space) = attached(2);
    space.let_go();
    let (first, open) = gate(&gpu);
    let (dropped, flag) = (Arc::new(()), Arc::new(AtomicBool::new(false)));
    let last = gpu.clone();
    let second = launch(&gpu, 1, |_, _| Ok(()));
    drop(last);
    let third = {
        let (dropped, flag) = (dropped.clone(), flag.clone());
        launch(&gpu, 3, move |_, _| {
            drop(dropped.clone());
            flag.store(true, SeqCst);
            Ok(())
        })
    };
    drop(gpu);
    // What runs is run to its end, and what is behind it is not begun.
    assert!(!first.is_done());
    open.store(true, SeqCst);
    assert_eq!(first.wait(), Ok(()));
    assert_eq!((second.wait(), third.wait()), (Err(KernelError::Stopped), Err(KernelError::Stopped)));
    assert!(!flag.load(SeqCst) && Arc::strong_count(&dropped) == 1);

    // A kernel that holds its own device, the last to do so.
    let (gpu, space) = attached(2);
    space.let_go();
    let held = Mutex::new(Some(gpu.clone()));
    let job = launch(&gpu, 40, move |_, _| {
        drop(held.lock().unwrap().take());
        Ok(())
    });
    drop(gpu);
    assert_eq!(job.wait(), Ok(()));
}

#[test]
fn lanes_and_memory_go_when_the_last_handle_does() {
    let (gpu, space) = attached(3);
    space.let_go();
    assert_eq!(once(&gpu, |_| Ok(())), Ok(()));
    let core = gpu.handle_core();
    drop(gpu);
    let end = Instant::now() + Duration::from_secs(20);
    while peerspace_os::own::Shared::count(&core) > 1 {
        assert!(Instant::now() < end, "a lane is still there");
        std::thread::yield_now();
    }
}

#[test]
fn without_a_space_nothing_is_launched() {
    let gpu = accelerator(1);
    // SAFETY: it is not launched.
    let refused = unsafe { gpu.launch(1, |_, _| Ok(())) };
    assert_eq!(refused.unwrap_err(), LaunchError::NotAttached);
}
