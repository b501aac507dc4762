//! `soft`: plain memory behind the device interface, and a device in software that runs code.
//!
//! [`Soft`] is memory that is private to the device: the CPU reaches it only through loads and stores. It is the fastest
//! device there can be, and so the one to measure the engine with; and a template for authors of devices.
//!
//! [`Accelerator`] has memory too, and an MMU, threads (its *lanes*) and a queue of kernels: it sees a space as a GPU with
//! page faults does. Programs for such devices can be written and tested with it where there is none, and so can the engine.

mod accelerator;
mod core;
mod error;
mod failure;
mod lane;
mod link;
mod mmu;
mod options;
mod queue;
mod table;
#[cfg(all(test, not(shuttle)))]
mod tests;

pub use self::core::AcceleratorStatistics;
pub use accelerator::Accelerator;
pub use error::{KernelError, LaunchError};
pub use failure::Failure;
pub use lane::{AtomicScalar, Lane};
pub use options::{Link, Options};
pub use queue::Job;

use super::{Descriptor, Device, DevicePages, Load, Store, Usage};
use peerspace_core::words::Words;
use peerspace_os::Trouble;
use peerspace_os::linux::map::Arena;
use peerspace_os::own::Area;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Memory of a fixed size.
#[derive(Debug)]
pub struct Soft {
    memory: Area,
    page: u64,
    touched: Touched,
}

/// A bit for each page that was ever written, and how many there are: what a device takes up of RAM. Memory that was written
/// once stays: it is what the device consists of.
#[derive(Debug)]
struct Touched {
    bits: Arena,
    count: AtomicU64,
}

impl Touched {
    fn new(pages: u64) -> Result<Touched, Trouble> {
        let words = (pages.div_ceil(64) as usize).max(1);
        let bits = Arena::new(words, words).map_err(|_| Trouble::NoMemory)?;
        Ok(Touched { bits, count: AtomicU64::new(0) })
    }

    fn touch(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            let bit = 1 << (page % 64);
            if self.bits.at((page / 64) as usize).fetch_or(bit, Relaxed) & bit == 0 {
                self.count.fetch_add(1, Relaxed);
            }
        }
    }

    fn usage(&self, page: u64) -> Usage {
        let bytes = self.count.load(Relaxed) * page;
        Usage { used_bytes: bytes, peak_bytes: bytes }
    }
}

impl Soft {
    /// A device with `bytes` bytes of memory, rounded down to pages.
    ///
    /// # Errors
    /// When there is no address space for it.
    pub fn new(bytes: u64) -> Result<Soft, Trouble> {
        let page = rustix::param::page_size() as u64;
        let memory = Area::new((bytes / page * page) as usize)?;
        let touched = Touched::new(memory.len() as u64 / page)?;
        Ok(Soft { memory, page, touched })
    }

    fn at(&self, page: u64) -> usize {
        (page * self.page) as usize
    }
}

impl Device for Soft {
    fn describe(&self) -> Descriptor {
        let bytes = self.memory.len() as u64;
        Descriptor::private("soft", bytes / self.page).capacity_bytes(bytes).compares().in_ram()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for store in batch {
            self.memory.write(self.at(store.page), store.bytes);
            self.touched.touch(store.page..store.page + store.bytes.len() as u64 / self.page);
            store.result = Ok(());
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for load in batch {
            let to = &mut *load.bytes;
            self.memory.read(self.at(load.page), to.len(), |at, bytes| {
                to[at..at + bytes.len()].copy_from_slice(bytes);
                true
            });
            load.result = Ok(());
        }
    }

    fn freed(&self, _: DevicePages) {}

    fn usage(&self) -> Option<Usage> {
        Some(self.touched.usage(self.page))
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, super::DeviceError> {
        Ok(self.memory.read(self.at(page), bytes.len(), |at, held| held == &bytes[at..at + held.len()]))
    }
}
