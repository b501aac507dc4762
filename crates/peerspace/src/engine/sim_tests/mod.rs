//! The engine over a simulated kernel: what a program sees is what it wrote, whatever happens in between.
//!
//! [`Rig`] is an engine, its kernel and a program's memory in one process without a single page fault: an access is a
//! call that goes to the engine when it meets a page that is not there, as a signal handler would ([`Rig::read`]).
//! [`Shelf`] is a device that minds the contract it is used by, and fails as it is told to; a [`chip`] is one that runs code.
//!
//! `oracle` tries random sequences of everything a program and the engine can do, one at a time, and `device_ops` adds what
//! devices do; `races`, `adoption` and `device_races` have several threads do it at once, in the interleavings that a model
//! checker chooses.

#[cfg(shuttle)]
mod adoption;
#[cfg(not(shuttle))]
mod areas;
mod chip;
#[cfg(not(shuttle))]
mod detach;
#[cfg(not(shuttle))]
mod device_edges;
#[cfg(not(shuttle))]
mod device_ops;
#[cfg(shuttle)]
mod device_races;
mod fleet;
#[cfg(not(shuttle))]
mod folios;
#[cfg(not(shuttle))]
mod forks;
#[cfg(not(shuttle))]
mod holds;
#[cfg(not(shuttle))]
mod native;
#[cfg(not(shuttle))]
mod ops;
#[cfg(not(shuttle))]
mod oracle;
#[cfg(shuttle)]
mod races;
#[cfg(not(shuttle))]
mod replays;
#[cfg(not(shuttle))]
mod stays;

use super::fault::{Outcome, Patience};
use super::reclaim::Step;
use super::{Config, Engine, staging_layout};
use crate::device::{Descriptor, Device, DeviceError, DevicePages, Load, SharedMemory, Store};
use crate::sync::Mutex;
use peerspace_core::addr::{Access, Pages, Va, VaRange};
use peerspace_core::reclaim::{Policy, S3Fifo};
use peerspace_core::regions::Attributes;
use peerspace_os::inject::Inject;
use peerspace_os::own::{Box as OwnBox, Own, Vec as OwnVec};
use peerspace_os::sim::{Setup, Sim, SimWords, Trap};
use peerspace_os::{Capabilities, Kernel, Wake};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

pub(super) const PAGE: usize = 4096;
const LIMIT: Pages = super::MIN_LIMIT;

pub(super) type Tried = Engine<Inject<Sim>>;

/// What a kernel of today can do.
pub(super) const ABLE: Capabilities =
    Capabilities { move_pages: true, write_protect: true, poison: true, kernel_faults: false, huge: false };

/// What a device is to do wrong.
#[derive(Debug, Default)]
struct Mood {
    held: HashMap<u64, std::boxed::Box<[u8]>>,
    /// Pages that were stored and cannot be read any more.
    bad: HashSet<u64>,
    /// Pages held at most.
    room: usize,
    /// One load in so many fails, but never the same page twice in a row; 0 for none.
    flaky: u64,
    /// One store in so many fails; 0 for none.
    bad_stores: u64,
    failed: HashSet<u64>,
    random: u64,
    /// Loads of bad pages so far, each page counted once.
    losses: u64,
    lost: HashSet<u64>,
    /// Pages that could not be stored, and are to be freed all the same.
    refused: HashSet<u64>,
    /// What the engine did that it must not. A panic would be taken for the device's own fault.
    wrong: Vec<String>,
}

/// A device that keeps pages in plain memory, and minds whether it is used as devices are to be.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    mood: Arc<Mutex<Mood>>,
    pages: u64,
    compares: bool,
    slow: bool,
    /// Where the bytes are that the CPU maps in place, of a coherent one.
    memory: Option<Arc<OwnedFd>>,
}

#[cfg_attr(shuttle, allow(dead_code))] // each of the two uses some
impl Shelf {
    pub(super) fn new(pages: u64) -> Shelf {
        let mood = Mood { room: usize::MAX, ..Mood::default() };
        Shelf { mood: Arc::new(Mutex::new(mood)), pages, compares: false, slow: false, memory: None }
    }

    pub(super) fn compares(self) -> Shelf {
        Shelf { compares: true, ..self }
    }

    pub(super) fn slow(self) -> Shelf {
        Shelf { slow: true, ..self }
    }

    /// One whose memory the CPU maps in place.
    pub(super) fn coherent(self) -> Shelf {
        let file = memfd_create(c"shelf", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, self.pages * PAGE as u64).unwrap();
        Shelf { memory: Some(Arc::new(file)), compares: true, ..self }
    }

    /// Has one load in `one_in` fail; 0 for none.
    pub(super) fn set_flaky(&self, one_in: u64) {
        self.mood.lock().flaky = one_in;
    }

    /// Has one store in `one_in` fail; 0 for none.
    pub(super) fn set_bad_stores(&self, one_in: u64) {
        self.mood.lock().bad_stores = one_in;
    }

    /// Has no more than `pages` pages taken from now on.
    pub(super) fn set_room(&self, pages: usize) {
        self.mood.lock().room = pages;
    }

    /// Makes up to `count` of the pages it holds unreadable, chosen by `seed`.
    pub(super) fn break_some(&self, count: usize, seed: u64) {
        let mut m = self.mood.lock();
        let mut held: Vec<u64> = m.held.keys().copied().collect();
        held.sort_unstable();
        for i in 0..count.min(held.len()) {
            let at = (seed as usize).wrapping_add(i * 7) % held.len();
            m.bad.insert(held[at]);
        }
    }

    /// Whether transfers may fail.
    pub(super) fn is_troubled(&self) -> bool {
        let m = self.mood.lock();
        m.flaky > 0 || m.bad_stores > 0 || !m.bad.is_empty() || m.room < usize::MAX
    }

    /// Gives `what` the bytes of `page`, if it holds any.
    fn with<T>(&self, page: u64, what: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
        let mut mood = self.mood.lock();
        let bytes = mood.held.get_mut(&page)?;
        let Some(file) = &self.memory else { return Some(what(bytes)) };
        // The CPU may have written there.
        assert_eq!(pread(&**file, &mut bytes[..], page * PAGE as u64), Ok(PAGE));
        let before = bytes.clone();
        let done = what(bytes);
        if *before != **bytes {
            assert_eq!(pwrite(&**file, bytes, page * PAGE as u64), Ok(PAGE));
        }
        Some(done)
    }

    /// Pages that could not be read when they were asked for.
    pub(super) fn losses(&self) -> u64 {
        self.mood.lock().losses
    }

    /// How many share it, this one included.
    pub(super) fn references(&self) -> usize {
        Arc::strong_count(&self.mood)
    }

    /// Pages it holds, if it has been used as devices are to be.
    pub(super) fn held(&self) -> u64 {
        let m = self.mood.lock();
        assert!(m.wrong.is_empty(), "{:?}", m.wrong);
        m.held.len() as u64
    }
}

impl Mood {
    /// Whether the next transfer is one in `one_in`.
    fn strikes(random: &mut u64, one_in: u64) -> bool {
        *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        one_in > 0 && (*random >> 33).is_multiple_of(one_in)
    }

    fn load(&mut self, first: u64, bytes: &mut [u8], memory: Option<&OwnedFd>) -> Result<(), DeviceError> {
        for (i, out) in bytes.chunks_exact_mut(PAGE).enumerate() {
            let page = first + i as u64;
            let Some(held) = self.held.get(&page) else {
                self.wrong.push(format!("page {page} is loaded and was never stored"));
                return Err(DeviceError::Unsupported);
            };
            if self.bad.contains(&page) {
                self.losses += self.lost.insert(page) as u64;
                return Err(DeviceError::Corrupt);
            }
            if Mood::strikes(&mut self.random, self.flaky) && self.failed.insert(page) {
                return Err(DeviceError::Io(5));
            }
            self.failed.remove(&page);
            match memory {
                Some(file) => assert_eq!(pread(file, out, page * PAGE as u64), Ok(PAGE)),
                None => out.copy_from_slice(held),
            }
        }
        Ok(())
    }
}

impl Device for Shelf {
    fn describe(&self) -> Descriptor {
        let d = match self.memory {
            Some(_) => Descriptor::coherent("shelf", self.pages),
            None => Descriptor::private("shelf", self.pages),
        };
        let d = if self.compares { d.compares() } else { d };
        if self.slow { d.slow() } else { d }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        let mut guard = self.mood.lock();
        let m = &mut *guard;
        for store in batch {
            let pages = store.page..store.page + (store.bytes.len() / PAGE) as u64;
            let more = pages.clone().filter(|p| !m.held.contains_key(p)).count();
            if m.held.len() + more > m.room {
                store.result = Err(DeviceError::NoSpace);
                m.refused.extend(pages);
                continue;
            }
            if m.bad_stores > 0 && Mood::strikes(&mut m.random, m.bad_stores) {
                store.result = Err(DeviceError::Io(5));
                m.refused.extend(pages.filter(|p| !m.held.contains_key(p)));
                continue;
            }
            for (page, bytes) in pages.zip(store.bytes.chunks_exact(PAGE)) {
                if let Some(file) = &self.memory {
                    assert_eq!(pwrite(&**file, bytes, page * PAGE as u64), Ok(PAGE));
                }
                m.held.insert(page, bytes.into());
                m.bad.remove(&page);
                m.lost.remove(&page);
                m.failed.remove(&page);
            }
            store.result = Ok(());
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        let mut m = self.mood.lock();
        for load in batch {
            load.result = m.load(load.page, load.bytes, self.memory.as_deref());
        }
    }

    fn freed(&self, pages: DevicePages) {
        let mut m = self.mood.lock();
        for page in pages.first..pages.first + pages.count {
            if m.held.remove(&page).is_none() & !m.refused.remove(&page) {
                m.wrong.push(format!("page {page} is freed and was not held (rule Z6)"));
            }
            m.bad.remove(&page);
            m.lost.remove(&page);
            m.failed.remove(&page);
        }
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let mut m = self.mood.lock();
        if !m.held.contains_key(&page) {
            m.wrong.push(format!("page {page} is compared and was never stored"));
            return Err(DeviceError::Unsupported);
        }
        let mut held = m.held[&page].clone();
        if let Some(file) = &self.memory {
            assert_eq!(pread(&**file, &mut held[..], page * PAGE as u64), Ok(PAGE));
        }
        if m.bad.contains(&page) { Err(DeviceError::Corrupt) } else { Ok(*held == *bytes) }
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        self.memory.as_ref().map(|file| SharedMemory { file: file.as_fd(), offset: page * PAGE as u64 })
    }
}

/// What an access of the program came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    /// It succeeded.
    Done,
    /// SIGBUS.
    Lost,
    /// SIGSEGV.
    Refused,
}

/// An engine over a simulated kernel, and the program on it.
pub(super) struct Rig {
    pub(super) engine: Arc<Tried>,
}

impl Rig {
    /// `alone`: one thread plays all the parts, so it receives messages while it waits for that.
    pub(super) fn new(can: Capabilities, devices: impl IntoIterator<Item = Shelf>, alone: bool) -> Rig {
        let (blocks, slots) = staging_layout(LIMIT);
        let kernel = Inject::new(Sim::new(Setup { blocks, slots, can }));
        let mut list: OwnVec<OwnBox<dyn Device>> = OwnVec::new_in(Own);
        for device in devices {
            list.push(allocator_api2::unsize_box!(OwnBox::new_in(device, Own)));
        }
        let policy: OwnBox<dyn Policy<SimWords>> = allocator_api2::unsize_box!(OwnBox::new_in(S3Fifo::new(), Own));
        let config = Config { limit: LIMIT, ram: Pages(1 << 20), devices: list, policy, contexts: 4 };
        let engine = Arc::new(Engine::new(kernel, config).unwrap());
        if alone {
            let receiver = Arc::downgrade(&engine);
            engine.kernel.inner().while_waiting(move || {
                if let Some(engine) = receiver.upgrade() {
                    let _ = engine.receive();
                }
            });
        }
        Rig { engine }
    }

    pub(super) fn sim(&self) -> &Sim {
        self.engine.kernel.inner()
    }

    /// A region of the engine's own.
    pub(super) fn region(&self, blocks: u64) -> VaRange {
        let map = || self.sim().map(blocks * (2 << 20)).map(|range| (range, range));
        self.engine.make_region(Attributes::default(), map, |range| self.sim().unmap(range).unwrap()).unwrap().1
    }

    fn access(&self, va: Va, access: Access, mut once: impl FnMut(&Sim) -> Result<(), Trap>) -> Came {
        for _ in 0..100_000 {
            match once(self.sim()) {
                Ok(()) => return Came::Done,
                Err(Trap::Lost) => return Came::Lost,
                Err(Trap::Refused) => return Came::Refused,
                Err(Trap::Fault { .. }) => match self.engine.fault(va, access, Wake::No, Patience::Waits) {
                    Ok(Outcome::Resolved | Outcome::Refused) => {}
                    Ok(Outcome::Poisoned) => return Came::Lost,
                    // The mapping may have gone since; or it is there, and nobody knows it. That it is somebody else's, a
                    // kernel that is made to fail says now and then.
                    Ok(Outcome::Foreign) => assert!(
                        (0..20).any(|_| self.engine.fill_unknown(va))
                            || !matches!(once(self.sim()), Err(Trap::Fault { .. }))
                            || self.engine.kernel.is_changing(),
                        "{va} is registered and no region"
                    ),
                    Err(pause) => panic!("a fault that waits came back with {pause:?}"),
                },
            }
        }
        panic!("an access to {va} makes no headway");
    }

    pub(super) fn read(&self, va: Va, out: &mut [u8]) -> Came {
        self.access(va, Access::Read, |sim| sim.read(va, out))
    }

    pub(super) fn write(&self, va: Va, bytes: &[u8]) -> Came {
        self.access(va, Access::Write, |sim| sim.write(va, bytes))
    }

    /// Up to `steps` steps of reclaim.
    pub(super) fn reclaim(&self, steps: usize) {
        let mut work = self.engine.contexts.take();
        for _ in 0..steps {
            if self.engine.reclaim_step(&mut work, false) == Step::Stuck {
                break;
            }
        }
    }

    /// Gives up a region of the engine's own.
    pub(super) fn release(&self, range: VaRange) {
        let mut at = range.start;
        self.engine.release_region(range, |piece| {
            let part = VaRange { start: at, end: Va(at.0 + piece.len()) };
            self.sim().unmap(part).unwrap();
            at = part.end;
        });
    }
}
