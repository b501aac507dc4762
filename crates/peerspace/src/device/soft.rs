//! `soft`: plain memory behind the device interface.
//!
//! The memory is private to the device: the CPU reaches it only through loads and stores. It is the fastest device
//! there can be, and so the one to measure the engine with; and a template for authors of devices.

use super::{Descriptor, Device, DevicePages, Load, Store};
use peerspace_os::Trouble;
use peerspace_os::own::Area;

/// Memory of a fixed size.
#[derive(Debug)]
pub struct Soft {
    memory: Area,
    page: u64,
}

impl Soft {
    /// A device with `bytes` bytes of memory, rounded down to pages.
    ///
    /// # Errors
    /// When there is no address space for it.
    pub fn new(bytes: u64) -> Result<Soft, Trouble> {
        let page = rustix::param::page_size() as u64;
        let memory = Area::new((bytes / page * page) as usize)?;
        Ok(Soft { memory, page })
    }

    fn at(&self, page: u64) -> usize {
        (page * self.page) as usize
    }
}

impl Device for Soft {
    fn describe(&self) -> Descriptor {
        let bytes = self.memory.len() as u64;
        Descriptor::private("soft", bytes / self.page).capacity_bytes(bytes).compares()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for store in batch {
            self.memory.write(self.at(store.page), store.bytes);
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

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, super::DeviceError> {
        Ok(self.memory.read(self.at(page), bytes.len(), |at, held| held == &bytes[at..at + held.len()]))
    }
}
