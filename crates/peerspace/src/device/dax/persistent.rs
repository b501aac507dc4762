//! The regions of a persistent device: the directory of their names on the memory itself, and what makes writes durable.
//!
//! Locks: one, for the directory, held across its writes and flushes. Nobody who holds it waits for anything but the memory.

use super::format::{Extent, Medium, Named, Shape};
use super::names::{Found, Names, probe};
use super::names_error::NamesError;
use super::open::Layout;
use crate::device::{DeviceError, DevicePages, NamedError, NamedRegion, NamedRegions};
use crate::sync::Mutex;
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::sync::{AtomicBool, Ordering};
use peerspace_os::linux::shared::{Flush, SharedFile};
use peerspace_os::own::Shared;
use rustix::fs::FallocateFlags;
use std::io;

/// The memory, as the directory sees it.
struct Memory {
    memory: Shared<SharedFile>,
    flush: Flush,
}

impl Medium for Memory {
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let got = self.memory.read(at, to)?;
        if got < to.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        Ok(self.memory.write(at, bytes)?)
    }

    fn flush(&self, at: u64, len: u64) -> io::Result<()> {
        Ok(self.memory.flush(self.flush, at, len)?)
    }
}

/// What makes a device persistent.
pub(super) struct Persistence {
    names: Mutex<Names<Memory>>,
    memory: Shared<SharedFile>,
    layout: Layout,
    flush: Flush,
    /// The directory belongs to the process that this one was forked from.
    foreign: AtomicBool,
}

impl Persistence {
    /// Opens the directory of `memory`, or makes one if there is nothing.
    pub(super) fn open(memory: Shared<SharedFile>, layout: Layout, flush: Flush) -> Result<Persistence, NamesError> {
        let shape = Shape {
            page_bytes: layout.page as u32,
            block_bytes: layout.block as u32,
            device_bytes: layout.bytes,
            reserved_blocks: layout.data / layout.block,
        };
        let medium = Memory { memory: memory.clone(), flush };
        let names = match probe(&medium, shape)? {
            Found::Empty | Found::Unfinished => Names::create(medium, shape)?,
            Found::Ours | Found::Foreign { .. } => Names::open(medium, shape)?,
        };
        Ok(Persistence { names: Mutex::new(names), memory, layout, flush, foreign: AtomicBool::new(false) })
    }

    /// Bytes that regions take up.
    pub(super) fn used_bytes(&self) -> u64 {
        self.layout.bytes - self.layout.data - self.names.lock().free_blocks() * self.layout.block
    }

    pub(super) fn is_foreign_now(&self) {
        self.foreign.store(true, Ordering::Relaxed);
    }

    fn is_ours(&self) -> Result<(), NamedError> {
        match self.foreign.load(Ordering::Relaxed) {
            true => Err(NamedError(
                "only the process that opened the device may change what there is, not one forked from it".into(),
            )),
            false => Ok(()),
        }
    }

    fn region(&self, named: &Named) -> NamedRegion {
        let pages = self.layout.block / self.layout.page;
        let first = self.layout.data / self.layout.page;
        let extent = |e: &Extent| DevicePages { first: e.block * pages - first, count: e.blocks * pages };
        NamedRegion {
            name: named.name.clone(),
            bytes: named.bytes,
            extents: named.extents.iter().map(extent).collect(),
        }
    }

    /// Makes an extent zeros, durably.
    fn zero(&self, extent: &Extent) -> io::Result<()> {
        let (at, len) = (extent.block * self.layout.block, extent.blocks * self.layout.block);
        let zeroed = rustix::fs::fallocate(self.memory.fd(), FallocateFlags::ZERO_RANGE, at, len);
        if zeroed.is_err() {
            let zeros = vec![0; self.layout.block as usize];
            for at in (at..at + len).step_by(zeros.len()) {
                self.memory.write(at, &zeros)?;
            }
        }
        Ok(self.memory.flush(self.flush, at, len)?)
    }
}

fn said(e: impl std::fmt::Display) -> NamedError {
    NamedError(e.to_string())
}

impl NamedRegions for Persistence {
    fn list(&self) -> Result<Vec<NamedRegion>, NamedError> {
        Ok(self.names.lock().iter().map(|named| self.region(named)).collect())
    }

    fn find(&self, name: &str) -> Result<NamedRegion, NamedError> {
        let names = self.names.lock();
        let found = names.find(name).map(|named| self.region(named));
        found
            .ok_or_else(|| NamedError("there is no region of that name: Space::persistent_regions lists them".into()))
    }

    fn create(&self, name: &str, bytes: u64) -> Result<NamedRegion, NamedError> {
        self.is_ours()?;
        let mut names = self.names.lock();
        let named = names.create_region(name, bytes, |extent| self.zero(extent)).map_err(said)?;
        Ok(self.region(named))
    }

    fn remove(&self, name: &str) -> Result<(), NamedError> {
        self.is_ours()?;
        self.names.lock().remove(name).map_err(said)
    }

    fn flush(&self, range: std::ops::Range<usize>) -> Result<(), DeviceError> {
        let range = VaRange { start: Va(range.start as u64), end: Va(range.end as u64) };
        self.flush.flush(range).map_err(|e| DeviceError::Io(e.raw_os_error()))
    }
}
