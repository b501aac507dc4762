//! Devices that come, go and fail under a program that goes on (rules Z1 to Z3, Z9).

mod common;

use common::*;
use peerspace::device::soft::Soft;
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use peerspace::{Error, Faults, Hint, Space};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

fn soft(mib: usize) -> Soft {
    Soft::new((mib * MIB) as u64).unwrap()
}

/// Threads read and write a region that is three times as large as RAM, while the device behind it is exchanged again and
/// again.
fn exchange(faults: Faults) {
    const THREADS: usize = 3;
    let space = space(faults, 16 * MIB, soft(64));
    let region = space.region(48 * MIB as u64).unwrap();
    let pages = region.len() / page();
    let words = page() / 8;
    let stop = AtomicBool::new(false);
    let accesses = AtomicU64::new(0);
    // Each page has one thread that uses it; what it shall be is kept beside it.
    let memory = region.as_ptr() as usize;
    let work = |thread: usize| {
        let mut want = vec![0u64; pages / THREADS];
        let mut x = thread as u64 * 77 + 1;
        let mut n = 0;
        while !stop.load(Relaxed) {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let i = (x >> 33) as usize % want.len();
            let at = memory as *mut u64;
            // SAFETY: the region lives as long as the threads; a page is used by one of them alone.
            let cell = unsafe { &mut *at.add((i * THREADS + thread) * words + i % words) };
            assert_eq!(*cell, want[i], "page {} of thread {thread}", i);
            if x & 1 << 20 != 0 {
                want[i] = x;
                *cell = x;
            }
            n += 1;
            if n % 64 == 0 {
                accesses.fetch_add(64, Relaxed);
            }
        }
        for (i, want) in want.iter().enumerate() {
            // SAFETY: as above.
            let cell = unsafe { *(memory as *const u64).add((i * THREADS + thread) * words + i % words) };
            assert_eq!(cell, *want, "page {i} of thread {thread} in the end");
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(move || work(t))).collect();
        let mut old = space.devices()[0];
        for round in 0..12 {
            let before = accesses.load(Relaxed);
            let new = space.attach(soft(64 + round)).unwrap();
            space.detach(old).unwrap();
            assert_eq!(space.devices(), [new]);
            assert!(matches!(space.detach(old), Err(Error::NoSuchDevice)));
            old = new;
            let begin = Instant::now();
            while accesses.load(Relaxed) < before + 3000 && begin.elapsed() < Duration::from_secs(20) {
                std::thread::yield_now();
            }
            assert!(accesses.load(Relaxed) > before, "the program went on");
        }
        stop.store(true, Relaxed);
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
    space.check();
    let statistics = space.statistics();
    assert_eq!((statistics.poisoned, statistics.devices.len()), (0, 1));
    assert!(statistics.devices[0].used_bytes > 0);
}

#[test]
fn z3_devices_are_exchanged_under_load_by_signal() {
    exchange(Faults::Signal);
}

#[test]
fn z3_devices_are_exchanged_under_load_by_threads() {
    exchange(Faults::Threads);
}

#[test]
fn z3_what_is_missing_is_said() {
    let space = space(Faults::Signal, 16 * MIB, soft(64));
    let mut region = space.region(40 * MIB as u64).unwrap();
    region.bytes_mut().fill(3);
    let only = space.devices()[0];
    let Err(Error::NoRoom { name, missing }) = space.detach(only) else { panic!("there is nowhere to go") };
    assert_eq!(name, "soft");
    assert!((10 * MIB..=40 * MIB).contains(&(missing as usize)), "{missing}");
    let message = space.detach(only).unwrap_err().to_string();
    assert!(message.contains("have no room") && message.contains("Attach another device"), "{message}");
    // What is said to be missing is enough.
    let _more = space.attach(Soft::new(missing + 4 * MIB as u64).unwrap()).unwrap();
    space.detach(only).unwrap();
    assert!(region.bytes().iter().all(|b| *b == 3));
    space.check();
}

/// A device in plain memory that says that it is gone when it is told to.
struct Mortal {
    inner: Soft,
    dead: Arc<AtomicBool>,
}

impl Device for Mortal {
    fn describe(&self) -> Descriptor {
        Descriptor::private("mortal", self.inner.describe().pages.0)
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        if self.dead.load(Relaxed) {
            return batch.iter_mut().for_each(|s| s.result = Err(DeviceError::Gone));
        }
        self.inner.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        if self.dead.load(Relaxed) {
            return batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Gone));
        }
        self.inner.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.inner.freed(pages);
    }
}

/// What is lost when a device fails is what it alone held, and is said page by page.
fn fails(by_itself: bool) {
    let dead = Arc::new(AtomicBool::new(false));
    let space = space(Faults::Signal, 16 * MIB, Mortal { inner: soft(64), dead: dead.clone() });
    let mortal = space.devices()[0];
    let healthy = space.attach(soft(64)).unwrap();
    let mut region = space.region(40 * MIB as u64).unwrap();
    region.advise(Hint::Sparse).unwrap();
    let pages = region.len() / page();
    for n in 0..pages {
        region.bytes_mut()[n * page()..(n + 1) * page()].fill(n as u8);
    }
    let held = space.statistics().devices[0].used_bytes;
    assert!(held > 20 * MIB as u64);
    if by_itself {
        dead.store(true, Relaxed);
    } else {
        space.fail(mortal).unwrap();
    }
    let mut lost = 0;
    for n in 0..pages {
        let mut bytes = vec![0; page()];
        match region.try_read(n * page(), &mut bytes) {
            Ok(()) => assert!(bytes.iter().all(|b| *b == n as u8), "page {n}"),
            Err(e @ Error::Lost { .. }) => {
                assert!(e.to_string().contains("mortal"), "{e}");
                lost += page() as u64;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(lost <= held && lost > held / 2, "{lost} of {held}");
    // The space goes on, and with what was lost after it was discarded.
    region.discard(0..40 * MIB).unwrap();
    region.bytes_mut().fill(9);
    assert!(region.bytes().iter().all(|b| *b == 9));
    assert!(space.statistics().devices[1].used_bytes > 0);
    space.detach(mortal).unwrap();
    assert_eq!(space.devices(), [healthy]);
    assert!(region.bytes().iter().all(|b| *b == 9));
    space.check();
    assert!(matches!(space.fail(mortal), Err(Error::NoSuchDevice)));
}

#[test]
fn z9_a_device_that_is_gone_takes_only_its_own_pages_along() {
    fails(true);
}

#[test]
fn z9_a_device_can_be_marked_as_failed() {
    fails(false);
}

/// G12: a process forks while devices are exchanged; each child has all data, and a space that works.
fn forks(faults: Faults) {
    let space = space(faults, 8 * MIB, soft(64));
    let mut region = space.region(24 * MIB as u64).unwrap();
    for (i, word) in region.typed_mut::<u64>().iter_mut().enumerate() {
        *word = i as u64 * 3;
    }
    let stop = AtomicBool::new(false);
    let forked = std::thread::scope(|scope| {
        let exchanger = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Relaxed) || rounds < 3 {
                let old = space.devices()[0];
                space.attach(soft(64)).unwrap();
                space.detach(old).unwrap();
                rounds += 1;
            }
            rounds
        });
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(3));
            // SAFETY: the child only reads, writes and ends.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0);
            if pid == 0 {
                let child = || {
                    let right = |region: &peerspace::Region| {
                        region.typed::<u64>().iter().enumerate().step_by(61).all(|(i, w)| *w == i as u64 * 3)
                    };
                    // In the child nobody is in the midst of taking a device away.
                    let fine = right(&region) && space.attach(soft(64)).is_ok() && {
                        let old = space.devices()[0];
                        space.detach(old).is_ok() && right(&region)
                    };
                    space.check();
                    fine
                };
                let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
                // SAFETY: ends the process.
                unsafe { libc::_exit(!matches!(fine, Ok(true)) as i32) };
            }
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            assert_eq!(status, 0, "the child failed");
        }
        stop.store(true, Relaxed);
        exchanger.join().unwrap()
    });
    assert!(forked >= 3, "devices were exchanged {forked} times");
    assert!(region.typed::<u64>().iter().enumerate().all(|(i, w)| *w == i as u64 * 3));
    space.check();
}

#[test]
fn g12_devices_are_exchanged_while_processes_fork_by_signal() {
    forks(Faults::Signal);
}

#[test]
fn g12_devices_are_exchanged_while_processes_fork_by_threads() {
    forks(Faults::Threads);
}

/// Not more than there can be at once; as many as one likes one after the other.
#[test]
fn devices_come_and_go() {
    let space: Space = space(Faults::Signal, 16 * MIB, soft(1));
    let mut all = Vec::new();
    let full = loop {
        match space.attach(soft(1)) {
            Ok(id) => all.push(id),
            Err(e) => break e,
        }
    };
    assert!(full.to_string().contains("64 devices"), "{full}");
    for id in all {
        space.detach(id).unwrap();
    }
    for _ in 0..500 {
        let id = space.attach(soft(4096)).unwrap();
        space.detach(id).unwrap();
    }
    assert_eq!(space.devices().len(), 1);
}

/// A device that says of itself what it likes.
struct Boast(u64);

impl Device for Boast {
    fn describe(&self) -> Descriptor {
        assert_ne!(self.0, 77, "a device that does not know itself");
        Descriptor::private("boast", self.0)
    }

    fn store(&self, _: &mut [Store<'_>]) {}

    fn load(&self, _: &mut [Load<'_>]) {}

    fn freed(&self, _: DevicePages) {}
}

#[test]
fn z11_devices_that_cannot_be_are_refused() {
    let space = space(Faults::Signal, 16 * MIB, soft(1));
    for (pages, why) in
        [(0, "at least one page"), (u64::MAX, "can be managed"), (1 << 40, "can be managed"), (77, "describe")]
    {
        let e = space.attach(Boast(pages)).unwrap_err();
        assert!(matches!(e, Error::Device { .. }) && e.to_string().contains(why), "{pages}: {e}");
    }
    assert_eq!(space.devices().len(), 1);
}
