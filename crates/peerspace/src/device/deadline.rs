//! A device that may never answer: its calls are made by threads of their own, and given up after a while.
//!
//! A call of a device cannot be taken back once it is made. So [`Deadline`] has a few *couriers* make them, with buffers of
//! their own; whoever called waits for the answer, up to the deadline. After the first one that did not come the device is
//! [gone](DeviceError::Gone) for good, and nothing is asked of it again: the space goes on without it (rule Z9). The courier
//! that waits for it is lost with its buffer.
//!
//! That costs two wake-ups and a copy for each call, so it is for devices that one has reason to doubt: a network, a driver
//! under development. The translations of a device that runs code are the device's own business
//! ([`MmuDescriptor::deadline`](super::mmu::MmuDescriptor::deadline)).

use super::{
    Descriptor, Device, DeviceError, DevicePages, ForkSide, Load, NamedRegions, OwnMetadata, PeerCopy, SharedMemory,
    Store, Usage, mmu,
};
use crate::spec::{OpenDevice, own};
use crate::waited::{MOMENT, Waited};
use peerspace_os::linux::futex::{Mutex, wait_word, wake_word};
use peerspace_os::linux::thread;
use peerspace_os::own::{Buffer, Shared};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Calls that are under way at once.
const COURIERS: usize = 4;
/// What a courier carries at once; longer transfers are several calls.
const LOAD: usize = 64 << 10;

const IDLE: u32 = 0;
const CLAIMED: u32 = 1;
const SENT: u32 = 2;
const ANSWERED: u32 = 3;
const ENDED: u32 = 4;

/// What is asked.
#[derive(Clone, Copy)]
enum Errand {
    Store,
    Load,
    Holds,
    Clear(u64),
    Freed(u64),
}

struct Job {
    errand: Errand,
    page: u64,
    bytes: usize,
    buffer: Buffer,
    answer: Result<bool, DeviceError>,
}

/// A courier's desk.
struct Desk {
    state: AtomicU32,
    job: Mutex<Job>,
}

impl Desk {
    fn set(&self, state: u32) {
        // Release: the job is what the other side finds.
        self.state.store(state, Ordering::Release);
        wake_word(&self.state, u32::MAX);
    }
}

struct Office {
    device: OpenDevice,
    desks: [Desk; COURIERS],
    limit: Duration,
    gone: AtomicBool,
}

impl Office {
    /// Does what is asked at desk `i`, until there is nothing more to come.
    fn serve(&self, i: usize) {
        let desk = &self.desks[i];
        loop {
            match desk.state.load(Ordering::Acquire) {
                SENT => {}
                ENDED => return,
                other => {
                    wait_word(&desk.state, other, None);
                    continue;
                }
            }
            {
                let mut job = desk.job.lock();
                let Job { errand, page, bytes, buffer, answer } = &mut *job;
                *answer = super::guarded(|| self.ask(*errand, *page, &mut buffer[..*bytes]))
                    .unwrap_or(Err(DeviceError::Panicked));
            }
            // Unless it was given up meanwhile.
            if desk.state.compare_exchange(SENT, ANSWERED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                return;
            }
            wake_word(&desk.state, u32::MAX);
        }
    }

    fn ask(&self, errand: Errand, page: u64, bytes: &mut [u8]) -> Result<bool, DeviceError> {
        match errand {
            Errand::Store => {
                let mut batch = [Store::new(page, bytes)];
                self.device.store(&mut batch);
                let [store] = batch;
                store.result.map(|()| true)
            }
            Errand::Load => {
                let mut batch = [Load::new(page, bytes)];
                self.device.load(&mut batch);
                let [load] = batch;
                load.result.map(|()| true)
            }
            Errand::Holds => self.device.holds(page, bytes),
            Errand::Clear(count) => self.device.clear(DevicePages { first: page, count }).map(|()| true),
            Errand::Freed(count) => {
                self.device.freed(DevicePages { first: page, count });
                Ok(true)
            }
        }
    }

    /// Sends an errand, and waits for the answer. `fill` and `take` see the bytes before and after.
    fn send(
        &self,
        (errand, page, bytes): (Errand, u64, usize),
        fill: impl FnOnce(&mut [u8]),
        take: impl FnOnce(&[u8]),
    ) -> Result<bool, DeviceError> {
        let mut waited = Waited::new();
        let claim =
            |desk: &&Desk| desk.state.compare_exchange(IDLE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let desk = loop {
            if self.gone.load(Ordering::Relaxed) {
                return Err(DeviceError::Gone);
            }
            if let Some(desk) = self.desks.iter().find(claim) {
                break desk;
            }
            if waited.so_far() > self.limit {
                return Err(self.give_up());
            }
            std::thread::yield_now();
        };
        {
            let mut job = desk.job.lock();
            (job.errand, job.page, job.bytes) = (errand, page, bytes);
            fill(&mut job.buffer[..bytes]);
        }
        desk.set(SENT);
        loop {
            match desk.state.load(Ordering::Acquire) {
                ANSWERED => break,
                state => {
                    let left = self.limit.checked_sub(waited.so_far());
                    let given_up =
                        || desk.state.compare_exchange(SENT, ENDED, Ordering::AcqRel, Ordering::Relaxed).is_ok();
                    match left {
                        Some(left) => wait_word(&desk.state, state, Some(left.min(MOMENT))),
                        None if given_up() => return Err(self.give_up()),
                        None => {}
                    }
                }
            }
        }
        let answer = {
            let job = desk.job.lock();
            if job.answer.is_ok() {
                take(&job.buffer[..bytes]);
            }
            job.answer.clone()
        };
        desk.set(IDLE);
        answer
    }

    fn give_up(&self) -> DeviceError {
        if !self.gone.swap(true, Ordering::Relaxed) {
            crate::tell::warning(format_args!("a device has not answered for {:?}: it is given up", self.limit));
        }
        DeviceError::Gone
    }
}

/// Another device, whose calls are given up when they are not answered in time.
pub struct Deadline {
    office: Shared<Office>,
}

impl Deadline {
    /// `device`, each of whose calls has so much time.
    ///
    /// # Errors
    /// When there are no threads or no memory for its couriers.
    pub fn new(device: impl Device + 'static, limit: Duration) -> std::io::Result<Deadline> {
        let desk = || {
            let buffer = Buffer::new(LOAD).map_err(|e| std::io::Error::other(e.to_string()))?;
            let job = Job { errand: Errand::Holds, page: 0, bytes: 0, buffer, answer: Err(DeviceError::NoAnswer) };
            Ok::<_, std::io::Error>(Desk { state: AtomicU32::new(IDLE), job: Mutex::new(job) })
        };
        let desks = [desk()?, desk()?, desk()?, desk()?];
        let office = Shared::new(Office { device: own(device), desks, limit, gone: AtomicBool::new(false) });
        let deadline = Deadline { office };
        for i in 0..COURIERS {
            let office = deadline.office.clone();
            // On failure those that run already are ended with `deadline`.
            thread::spawn("peerspace-courier", move || office.serve(i))?;
        }
        Ok(deadline)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // A courier that waits for the device ends when that answers, if ever.
        self.office.desks.iter().for_each(|desk| desk.set(ENDED));
    }
}

impl Device for Deadline {
    fn describe(&self) -> Descriptor {
        self.office.device.describe()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        let page = rustix::param::page_size();
        for store in batch {
            store.result = store.bytes.chunks(LOAD).enumerate().try_for_each(|(i, bytes)| {
                let at = store.page + (i * LOAD / page) as u64;
                let what = (Errand::Store, at, bytes.len());
                self.office.send(what, |to| to.copy_from_slice(bytes), |_| ()).map(drop)
            });
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        let page = rustix::param::page_size();
        for load in batch {
            let first = load.page;
            load.result = load.bytes.chunks_mut(LOAD).enumerate().try_for_each(|(i, bytes)| {
                let what = (Errand::Load, first + (i * LOAD / page) as u64, bytes.len());
                self.office.send(what, |_| (), |from| bytes.copy_from_slice(from)).map(drop)
            });
        }
    }

    fn freed(&self, pages: DevicePages) {
        // What is gone needs no news.
        let _ = self.office.send((Errand::Freed(pages.count), pages.first, 0), |_| (), |_| ());
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        self.office.send((Errand::Holds, page, bytes.len()), |to| to.copy_from_slice(bytes), |_| ())
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        self.office.send((Errand::Clear(pages.count), pages.first, 0), |_| (), |_| ()).map(drop)
    }

    fn usage(&self) -> Option<Usage> {
        self.office.device.usage()
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        self.office.device.shared(page)
    }

    fn altmap(&self) -> Option<OwnMetadata> {
        self.office.device.altmap()
    }

    fn mmu(&self) -> Option<&dyn mmu::Mmu> {
        self.office.device.mmu()
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        // Through the host: a direct copy could not be given up.
        let _ = peer;
        batch.iter_mut().for_each(|copy| copy.result = Err(DeviceError::Unsupported));
    }

    fn named(&self) -> Option<&dyn NamedRegions> {
        self.office.device.named()
    }

    fn before_fork(&self) {
        self.office.device.before_fork();
    }

    fn after_fork(&self, side: ForkSide) {
        if side == ForkSide::Child {
            // Its couriers are the parent's.
            self.office.gone.store(true, Ordering::Relaxed);
        }
        self.office.device.after_fork(side);
    }
}

impl fmt::Debug for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deadline").field("limit", &self.office.limit).finish_non_exhaustive()
    }
}
