//! The software accelerator in a space, over the real kernel: kernels and the CPU on the same pointers, while pages move
//! (rules G1, G4, G6, G7, G9, G12, G14, Z3, Z9).

mod common;

use common::{MIB, mib, page};
use peerspace::device::mmu::{FaultError, Mode};
use peerspace::device::soft::{Accelerator, Failure, Job, KernelError, Lane, LaunchError, Options, Soft};
use peerspace::{Error, Faults, Region, Space};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

fn space(gpus: &[&Accelerator], faults: Faults) -> Space {
    let mut builder = Space::builder().host(mib(8)).device(Soft::new(mib(128)).unwrap()).faults(faults);
    for gpu in gpus {
        builder = builder.device((*gpu).clone());
    }
    builder.build().unwrap()
}

/// Launches a kernel on the words of `region`.
fn launch<F>(gpu: &Accelerator, region: &Region, kernel: F) -> Job
where
    F: Fn(&Lane, u64, Range<u64>) -> Result<(), KernelError> + Send + Sync + 'static,
{
    let (base, words) = (region.as_ptr() as u64, region.len() as u64 / 8);
    // SAFETY: the region lives until its job has ended in each of the tests below, and any bytes make a word.
    unsafe { gpu.launch(words, move |lane, items| kernel(lane, base, items)) }.unwrap()
}

fn add_one(lane: &Lane, base: u64, items: Range<u64>) -> Result<(), KernelError> {
    for i in items {
        let word: u64 = lane.load(base + 8 * i)?;
        lane.store(base + 8 * i, word + 1)?;
    }
    Ok(())
}

#[test]
fn g7_g9_kernels_work_on_more_than_host_and_device_hold_in_every_mode() {
    for faults in [Faults::Signal, Faults::Threads] {
        for mode in [Mode::Share, Mode::Exclusive, Mode::Replicate] {
            let gpu = Accelerator::new(Options::new(mib(4)).mode(mode)).unwrap();
            let space = space(&[&gpu], faults);
            let mut region = space.region(mib(12)).unwrap();
            region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = 3 * i as u64);
            // Every eighth word.
            let job = launch(&gpu, &region, |lane, base, items| {
                items.filter(|i| i % 8 == 0).try_for_each(|i| add_one(lane, base, i..i + 1))
            });
            // The CPU looks on, at this and that page.
            let mut i = 0;
            while job.wait_timeout(Duration::from_millis(1)).is_none() {
                i = (i + 77_777) % region.len();
                let mut word = [0; 8];
                region.try_read(i / 8 * 8, &mut word).unwrap();
                assert!(u64::from_ne_bytes(word).wrapping_sub(3 * (i / 8) as u64) < 2);
            }
            job.wait().unwrap();
            space.check();
            let expected = |i: usize| 3 * i as u64 + u64::from(i.is_multiple_of(8));
            assert!(region.typed::<u64>().iter().enumerate().all(|(i, w)| *w == expected(i)), "{mode:?}");
            let s = gpu.statistics();
            assert!(s.faults > 0 && s.tlb_hits > s.tlb_misses, "{mode:?}: {s:?}");
            assert_eq!(s.bytes_in > 0, mode != Mode::Share, "{s:?}");
            assert!(s.remote_bytes_written > 0 || mode != Mode::Share, "{s:?}");
            space.check();
        }
    }
}

#[test]
fn g14_atomics_of_two_accelerators_add_up_while_the_cpu_reads() {
    let gpus = ["a", "b"].map(|name| Accelerator::new(Options::new(mib(4)).name(name)).unwrap());
    let space = space(&[&gpus[0], &gpus[1]], Faults::Signal);
    let region = space.region(mib(2)).unwrap();
    let n = region.len() as u64 / 8 / 16;
    let jobs = gpus.each_ref().map(|gpu| {
        launch(gpu, &region, move |lane, base, items| {
            for i in items.filter(|i| i % 16 == 0) {
                lane.fetch_add(base + i / 16 % 4 * 4096, 1u64)?;
            }
            Ok(())
        })
    });
    let mut word = [0; 8];
    while !jobs.iter().all(Job::is_done) {
        region.try_read(0, &mut word).unwrap();
        std::thread::sleep(Duration::from_micros(300));
    }
    jobs.iter().for_each(|job| job.wait().unwrap());
    assert_eq!((0..4).map(|i| region.typed::<u64>()[i * 512]).sum::<u64>(), 2 * n);
    space.check();
}

#[test]
fn g6_pages_go_from_one_accelerator_to_the_other() {
    let gpus = ["a", "b"].map(|name| Accelerator::new(Options::new(mib(8)).name(name)).unwrap());
    let space = space(&[&gpus[0], &gpus[1]], Faults::Signal);
    let region = space.region(mib(4)).unwrap();
    for round in 0..4 {
        launch(&gpus[round % 2], &region, add_one).wait().unwrap();
    }
    assert!(gpus.iter().all(|gpu| gpu.statistics().peer_bytes_in >= mib(4)), "{:?}", gpus[0].statistics());
    assert!(region.typed::<u64>().iter().all(|w| *w == 4));
    space.check();
}

#[test]
fn z3_an_accelerator_can_leave_while_it_works() {
    let space = space(&[], Faults::Signal);
    let gpu = Accelerator::new(Options::new(mib(8))).unwrap();
    let id = space.attach(gpu.clone()).unwrap();
    let region = space.region(mib(8)).unwrap();
    let job = launch(&gpu, &region, |lane, base, items| {
        // Until it cannot.
        loop {
            add_one(lane, base, items.clone())?;
        }
    });
    while gpu.statistics().tlb_hits < 10_000 && !job.is_done() {
        std::thread::yield_now();
    }
    space.detach(id).unwrap();
    assert_eq!(job.wait(), Err(FaultError::Cut.into()));
    space.check();
    // What it did stays done.
    assert!(region.typed::<u64>().iter().any(|w| *w > 0));
    // And it can come back.
    space.attach(gpu.clone()).unwrap();
    launch(&gpu, &region, |lane, base, items| items.clone().try_for_each(|i| lane.store(base + 8 * i, 7u64)))
        .wait()
        .unwrap();
    assert!(region.typed::<u64>().iter().all(|w| *w == 7));
    space.check();
}

#[test]
fn g12_a_process_that_works_on_an_accelerator_forks() {
    let gpu = Accelerator::new(Options::new(mib(8))).unwrap();
    let space = space(&[&gpu], Faults::Signal);
    let mut region = space.region(mib(4)).unwrap();
    region.typed_mut::<u64>().fill(1);
    let stop = Arc::new(AtomicBool::new(false));
    let job = {
        let stop = stop.clone();
        launch(&gpu, &region, move |lane, base, items| {
            // Of each pair of words the first is never behind the second.
            while !stop.load(Relaxed) {
                for i in items.clone().step_by(256) {
                    lane.fetch_add(base + 8 * i, 1u64)?;
                    lane.fetch_add(base + 8 * i + 8, 1u64)?;
                }
            }
            Ok(())
        })
    };
    while gpu.statistics().tlb_hits < 10_000 {
        std::thread::yield_now();
    }
    for _ in 0..3 {
        // SAFETY: the child reads the region and asks the device, and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let words = region.typed::<u64>();
            let good = words.chunks(256).all(|w| w[0] >= w[1] && w[0] - w[1] <= 1 && w[2] == 1)
                && job.wait() == Err(KernelError::Forked)
                // SAFETY: it is not launched.
                && unsafe { gpu.launch(1, |_, _| Ok(())) }.is_err_and(|e| e == LaunchError::Forked);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child does not have the data");
    }
    stop.store(true, Relaxed);
    job.wait().unwrap();
    assert!(region.typed::<u64>().chunks(256).all(|w| w[0] == w[1] && w[2] == 1));
    space.check();
}

#[test]
fn z9_what_an_accelerator_does_not_give_up_is_lost_and_nothing_else() {
    let options = Options::new(mib(8)).deadline(Duration::from_millis(50));
    let gpu = Accelerator::new(options).unwrap();
    let space = space(&[&gpu], Faults::Signal);
    let mut region = space.region(mib(4)).unwrap();
    region.typed_mut::<u64>().fill(5);
    let words_per_page = page() / 8;
    // The first mebibyte goes there.
    launch(&gpu, &region, |lane, base, mut items| {
        items.try_for_each(|i| if i < (MIB / 8) as u64 { lane.store(base + 8 * i, 6u64) } else { Ok(()) })
    })
    .wait()
    .unwrap();
    gpu.fail_at(Failure::NeverUnmap, 0);
    let mut word = [0; 8];
    assert!(matches!(region.try_read(0, &mut word), Err(Error::Lost { .. })));
    // Whatever is not there is as it was.
    region.try_read(3 * MIB, &mut word).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 5);
    let failed = launch(&gpu, &region, add_one).wait();
    assert!(matches!(failed, Err(KernelError::Fault(_))), "{failed:?}");
    assert!(region.typed::<u64>()[2 * MIB / 8..].iter().step_by(words_per_page).all(|w| *w == 5));
}
