//! `soft`: plain memory behind the device interface.
//!
//! The memory is private to the device: the CPU reaches it only through loads and stores. It is the fastest device
//! there can be, and so the one to measure the engine with; and a template for authors of devices.

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
    /// A bit for each page that was ever written, and how many there are: what the device takes up of RAM.
    touched: Arena,
    count: AtomicU64,
}

impl Soft {
    /// A device with `bytes` bytes of memory, rounded down to pages.
    ///
    /// # Errors
    /// When there is no address space for it.
    pub fn new(bytes: u64) -> Result<Soft, Trouble> {
        let page = rustix::param::page_size() as u64;
        let memory = Area::new((bytes / page * page) as usize)?;
        let words = (memory.len() as u64 / page).div_ceil(64) as usize;
        let touched = Arena::new(words.max(1), words.max(1)).map_err(|_| Trouble::NoMemory)?;
        Ok(Soft { memory, page, touched, count: AtomicU64::new(0) })
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
            for page in store.page..store.page + store.bytes.len() as u64 / self.page {
                let bit = 1 << (page % 64);
                if self.touched.at((page / 64) as usize).fetch_or(bit, Relaxed) & bit == 0 {
                    self.count.fetch_add(1, Relaxed);
                }
            }
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
        // Memory that was written once stays: it is what the device consists of.
        let bytes = self.count.load(Relaxed) * self.page;
        Some(Usage { used_bytes: bytes, peak_bytes: bytes })
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, super::DeviceError> {
        Ok(self.memory.read(self.at(page), bytes.len(), |at, held| held == &bytes[at..at + held.len()]))
    }
}
