//! Tests of the accelerator against a space that does the engine's part by hand, under one lock.

mod fork;
mod kernels;
mod mmu;
mod queue;
mod table;
mod transfers;

use super::{Accelerator, Job, KernelError, Lane, Options};
use crate::device::mmu::{DeviceAccess, FaultError, Mapping, Mmu, Port, Progress, Target};
use crate::device::port::PortOps;
use crate::device::{Device, Load, Store};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

/// Where the fake space's memory begins: nothing of the process is there.
const BASE: u64 = 0x7000_0000_0000;

fn page() -> u64 {
    rustix::param::page_size() as u64
}

/// Where a page of the fake space is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// Never touched; the device may have zeros mapped.
    Nowhere,
    Host,
    Device(u64),
}

/// How the fake space resolves a fault for reading or writing.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    /// The page moves to the device.
    Move,
    /// It is mapped where it is on the host.
    Share,
    /// It is said to be mapped, and is not.
    Lie,
}

struct Pages {
    places: Vec<Place>,
    host: Vec<u8>,
    shared: BTreeMap<u64, bool>,
    free: Vec<u64>,
    /// Who is to leave the device next.
    hand: usize,
    manner: Manner,
    gpu: Option<Accelerator>,
    noted: Vec<(u64, u32)>,
}

/// A space of some pages, with one device.
struct FakeSpace {
    pages: Mutex<Pages>,
    faults: AtomicU64,
    moves: AtomicU64,
}

impl FakeSpace {
    fn new(gpu: &Accelerator, count: usize, manner: Manner) -> Arc<FakeSpace> {
        let pages = Pages {
            places: vec![Place::Nowhere; count],
            host: vec![0; count * page() as usize],
            shared: BTreeMap::new(),
            free: (0..gpu.bytes() / page()).collect(),
            hand: 0,
            manner,
            gpu: Some(gpu.clone()),
            noted: Vec::new(),
        };
        let space =
            Arc::new(FakeSpace { pages: Mutex::new(pages), faults: AtomicU64::new(0), moves: AtomicU64::new(0) });
        gpu.mmu().unwrap().attached(Port::new(space.clone()));
        space
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets go of the device: they would keep each other alive.
    fn let_go(&self) {
        drop(self.lock().gpu.take());
    }

    /// The CPU reads: what is on the device comes home first.
    fn cpu_read(&self, va: u64, to: &mut [u8]) {
        let mut pages = self.lock();
        self.home(&mut pages, va, to.len());
        let at = (va - BASE) as usize;
        to.copy_from_slice(&pages.host[at..at + to.len()]);
    }

    fn cpu_write(&self, va: u64, from: &[u8]) {
        let mut pages = self.lock();
        self.home(&mut pages, va, from.len());
        let at = (va - BASE) as usize;
        pages.host[at..at + from.len()].copy_from_slice(from);
    }

    fn cpu_word(&self, va: u64) -> u64 {
        let mut word = [0; 8];
        self.cpu_read(va, &mut word);
        u64::from_ne_bytes(word)
    }

    fn home(&self, pages: &mut Pages, va: u64, len: usize) {
        let first = (va - BASE) / page();
        for i in first..=(va - BASE + len.max(1) as u64 - 1) / page() {
            self.evict(pages, i);
            // A translation to zeros must not stay, once it is written.
            if pages.places[i as usize] == Place::Nowhere {
                unmap(pages.gpu.as_ref().unwrap(), BASE + i * page()..BASE + (i + 1) * page());
                pages.places[i as usize] = Place::Host;
            }
        }
    }

    fn evict(&self, pages: &mut Pages, i: u64) {
        let Place::Device(at) = pages.places[i as usize] else { return };
        let gpu = pages.gpu.clone().unwrap();
        unmap(&gpu, BASE + i * page()..BASE + (i + 1) * page());
        let host = &mut pages.host[(i * page()) as usize..][..page() as usize];
        let mut load = [Load::new(at, host)];
        gpu.load(&mut load);
        load[0].result.clone().unwrap();
        pages.places[i as usize] = Place::Host;
        pages.free.push(at);
        self.moves.fetch_add(1, Relaxed);
    }

    fn room(&self, pages: &mut Pages, but: u64) -> u64 {
        while pages.free.is_empty() {
            pages.hand = (pages.hand + 1) % pages.places.len();
            let hand = pages.hand as u64;
            if hand != but {
                self.evict(pages, hand);
            }
        }
        pages.free.pop().unwrap()
    }
}

/// Takes translations away, and waits until it is done.
fn unmap(gpu: &Accelerator, addresses: Range<u64>) {
    let mmu: &dyn Mmu = gpu;
    if let Progress::Pending(fence) = mmu.unmap(addresses).unwrap() {
        while !mmu.is_done(fence).unwrap() {
            std::thread::yield_now();
        }
    }
}

fn map(gpu: &Accelerator, va: u64, bytes: u64, to: Target, writable: bool) {
    gpu.map(&[Mapping { va, bytes, to, writable }]).unwrap();
}

impl PortOps for FakeSpace {
    fn fault(&self, va: u64, access: DeviceAccess) -> Result<(), FaultError> {
        self.faults.fetch_add(1, Relaxed);
        let mut pages = self.lock();
        let gpu = pages.gpu.clone().ok_or(FaultError::Cut)?;
        let i = va.checked_sub(BASE).map(|at| at / page()).filter(|i| (*i as usize) < pages.places.len());
        let i = i.ok_or(FaultError::NotManaged(va))?;
        let va = BASE + i * page();
        if pages.manner == Manner::Lie {
            return Ok(());
        }
        let place = pages.places[i as usize];
        if place == Place::Nowhere && access == DeviceAccess::Read {
            map(&gpu, va, page(), Target::Zero, false);
            return Ok(());
        }
        if pages.manner == Manner::Share && access != DeviceAccess::Atomic && !matches!(place, Place::Device(_)) {
            pages.places[i as usize] = Place::Host;
            pages.shared.insert(i, access.writes());
            map(&gpu, va, page(), Target::Host, access.writes());
            return Ok(());
        }
        let at = match place {
            Place::Device(at) => at,
            Place::Nowhere | Place::Host => {
                pages.shared.remove(&i);
                let at = self.room(&mut pages, i);
                let mut store = [Store::new(at, &pages.host[(i * page()) as usize..][..page() as usize])];
                gpu.store(&mut store);
                store[0].result.clone().unwrap();
                pages.places[i as usize] = Place::Device(at);
                at
            }
        };
        map(&gpu, va, page(), Target::Own(at), access.writes());
        Ok(())
    }

    fn read(&self, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        let pages = self.lock();
        if !pages.shared.contains_key(&((va - BASE) / page())) {
            return Err(FaultError::NotMapped(va));
        }
        to.copy_from_slice(&pages.host[(va - BASE) as usize..][..to.len()]);
        Ok(())
    }

    fn write(&self, va: u64, from: &[u8]) -> Result<(), FaultError> {
        let mut pages = self.lock();
        if pages.shared.get(&((va - BASE) / page())) != Some(&true) {
            return Err(FaultError::NotMapped(va));
        }
        pages.host[(va - BASE) as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn note_remote(&self, va: u64, accesses: u32) {
        self.lock().noted.push((va, accesses));
    }
}

/// Launches a kernel. It accesses the fake space alone, of which nothing is memory of the process.
fn launch<F>(gpu: &Accelerator, items: u64, kernel: F) -> Job
where
    F: Fn(&Lane, Range<u64>) -> Result<(), KernelError> + Send + Sync + 'static,
{
    // SAFETY: its addresses lead to the device's memory, or to the fake space, which checks them.
    unsafe { gpu.launch(items, kernel) }.unwrap()
}

/// Runs a kernel once, on one lane.
fn once<F>(gpu: &Accelerator, kernel: F) -> Result<(), KernelError>
where
    F: Fn(&Lane) -> Result<(), KernelError> + Send + Sync + 'static,
{
    launch(gpu, 1, move |lane, _| kernel(lane)).wait()
}

fn accelerator(pages: u64) -> Accelerator {
    Accelerator::new(Options::new(pages * page())).unwrap()
}
