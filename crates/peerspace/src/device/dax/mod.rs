//! `dax`: memory that the CPU addresses in place (rule Z5): a memory file, a file on any file system, huge pages, or a device
//! node.
//!
//! A [coherent](Dax::memory) device takes blocks that are [sent](crate::Region::migrate_to) to it: from then on the program's
//! addresses are mapped to the device's own memory. A [persistent](Dax::persistent) one keeps regions by their names, which
//! are used in place and outlive the process: [`Space::create_persistent`](crate::Space::create_persistent).
//!
//! ```
//! use peerspace::{Space, device::{dax::Dax, soft::Soft}};
//!
//! let space = Space::builder().host(8 << 20).device(Soft::new(64 << 20)?).build()?;
//! let far = space.attach(Dax::memory(64 << 20)?)?;
//! let mut region = space.region(8 << 20)?;
//! region.bytes_mut()[5] = 7;
//! assert_eq!(region.migrate_to(0..region.len(), far)?, region.len());
//! // The same addresses, the device's memory.
//! assert_eq!(region.bytes()[5], 7);
//! region.migrate_home(0..2 << 20)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where things are
//!
//! ```text
//!  coherent    | header: a page | altmap, to the end of a block | pages of the device ...
//!  persistent  | names: a block | altmap, whole blocks          | pages of the device ...
//! ```
//!
//! The altmap holds the descriptors of the device's pages (rules A2 to A4), 16 bytes for a block that is in use as one. A file
//! that others may cut short must not be: an access to what is gone raises SIGBUS, for whoever makes it. The file is locked
//! against others that ask.
//!
//! Locks: that of the directory of names, held while it is changed, across its writes and flushes.

mod error;
mod format;
mod names;
mod names_error;
mod open;
mod persistent;
pub(crate) mod reservation;
#[cfg(test)]
mod tests;

pub use error::DaxError;
pub use names_error::NamesError;

use super::{
    Descriptor, Device, DeviceError, DevicePages, DeviceWords, ForkSide, Load, NamedRegions, OwnMetadata,
    SharedMemory, Store, Usage,
};
use open::{Kind, Layout, Opened};
use peerspace_core::addr::Pfn;
use peerspace_core::sync::{AtomicBool, Ordering};
use peerspace_os::linux::shared::{SharedFile, SharedMapping};
use peerspace_os::own::Shared;
use persistent::Persistence;
use rustix::io::Errno;
use std::fmt;
use std::path::Path;

/// Memory that the CPU addresses in place.
pub struct Dax {
    memory: Shared<SharedFile>,
    kind: Kind,
    name: String,
    layout: Layout,
    /// The part of the memory that descriptors are in.
    altmap: Option<Shared<SharedMapping>>,
    persistence: Option<Persistence>,
    takes_evicted: bool,
    huge: bool,
    /// This process was forked from the one that opened it, and has no such memory.
    foreign: AtomicBool,
}

/// What a device may be made with, where the usual will not do: see [`Dax::memory`], [`Dax::open`], [`Dax::persistent`].
#[derive(Debug, Clone, Default)]
#[must_use = "options make nothing until they are used"]
pub struct Options {
    size: Option<u64>,
    altmap: Option<u64>,
    takes_evicted: bool,
    huge: bool,
    reserved: bool,
}

impl Options {
    /// The file is reserved for this process.
    #[cfg(feature = "process")]
    pub(crate) fn reserved(self) -> Options {
        Options { reserved: true, ..self }
    }

    /// All of the memory's bytes, what it takes for descriptors included. A path that exists has a size already.
    pub fn size(self, bytes: u64) -> Options {
        Options { size: Some(bytes), ..self }
    }

    /// Bytes, whole pages, of the memory for descriptors (`vmem_altmap`); 0 to have them in host memory. As many as there can
    /// be otherwise. With less, pages whose descriptors have no room any more are not used (rule A3: no fallback).
    pub fn altmap(self, bytes: u64) -> Options {
        Options { altmap: Some(bytes), ..self }
    }

    /// What leaves RAM for want of room may go there, too; a fault brings that home again.
    pub fn takes_evicted(self) -> Options {
        Options { takes_evicted: true, ..self }
    }

    /// Memory of huge pages from the kernel's pool (`vm.nr_hugepages`): for [`memory`](Options::memory) alone. What has a path
    /// has the pages of its file system.
    pub fn huge(self) -> Options {
        Options { huge: true, ..self }
    }

    /// A coherent device in RAM that is not the program's.
    ///
    /// # Errors
    /// [`DaxError`]
    pub fn memory(self) -> Result<Dax, DaxError> {
        let bytes = self.size.ok_or_else(|| DaxError::NoSize { path: "memory".into() })?;
        let opened = open::memory(bytes, self.altmap, self.huge)?;
        Dax::new(opened, self)
    }

    /// A coherent device of the memory at `path`.
    ///
    /// # Errors
    /// [`DaxError`]; what is there is as it was.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Dax, DaxError> {
        let path = path.as_ref();
        self.fit(path)?;
        let opened = open::path(path, self.size, self.altmap, false, self.reserved)?;
        Dax::new(opened, self)
    }

    /// A persistent device of the memory at `path`.
    ///
    /// # Errors
    /// [`DaxError`]; what is there is as it was.
    pub fn persistent(self, path: impl AsRef<Path>) -> Result<Dax, DaxError> {
        let path = path.as_ref();
        self.fit(path)?;
        let opened = open::path(path, self.size, self.altmap, true, self.reserved)?;
        let flush = opened.flush;
        let mut dax = Dax::new(opened, self)?;
        let names = |e| DaxError::Names { path: path.into(), why: e };
        dax.persistence = Some(Persistence::open(dax.memory.clone(), dax.layout, flush).map_err(names)?);
        Ok(dax)
    }

    /// Whether all that was chosen can be had of what is at `path`.
    fn fit(&self, path: &Path) -> Result<(), DaxError> {
        if self.huge { Err(DaxError::HugePath { path: path.into() }) } else { Ok(()) }
    }
}

impl Dax {
    /// A coherent device of `bytes` bytes in RAM that is not the program's: a memory file. A few of them are for descriptors.
    ///
    /// # Errors
    /// [`DaxError`]
    pub fn memory(bytes: u64) -> Result<Dax, DaxError> {
        let page = rustix::param::page_size() as u64;
        Options::default().size(Layout::bytes_for(bytes.max(page), 0)).memory()
    }

    /// A coherent device of the memory at `path`: a device node (`/dev/dax0.0`), a file, or a directory in which a file
    /// without a name is made, on a DAX file system, hugetlbfs or any other. A file is as long as it is, or is made with `size`
    /// bytes. It must be empty, or have been used so before.
    ///
    /// # Errors
    /// [`DaxError`]; what is there is as it was.
    pub fn open(path: impl AsRef<Path>, size: Option<u64>) -> Result<Dax, DaxError> {
        Options { size, ..Options::default() }.open(path)
    }

    /// A persistent device of the memory at `path`, a file or a device node: regions there are found by their names, now and
    /// after a restart. An empty one gets a directory of names; a new file is made with `size` bytes.
    ///
    /// # Errors
    /// [`DaxError`], for memory that holds something else, another version's directory, or a damaged one; what is there is as
    /// it was.
    pub fn persistent(path: impl AsRef<Path>, size: Option<u64>) -> Result<Dax, DaxError> {
        Options { size, ..Options::default() }.persistent(path)
    }

    /// What can be chosen otherwise.
    pub fn options() -> Options {
        Options::default()
    }

    fn new(opened: Opened, options: Options) -> Result<Dax, DaxError> {
        let Opened { memory, kind, layout, .. } = opened;
        let name = match &kind {
            Kind::Named(path) | Kind::Node(path) => format!("dax:{}", path.display()),
            Kind::Memory | Kind::Unnamed => "dax".into(),
        };
        let altmap = match layout.altmap {
            Some(_) => Some(Shared::new(SharedMapping::new(memory.fd(), 0, layout.data as usize).map_err(|e| {
                DaxError::System {
                    what: "map the descriptors' part of",
                    path: name.clone().into(),
                    errno: e.raw_os_error(),
                }
            })?)),
            None => None,
        };
        Ok(Dax {
            memory: Shared::new(memory),
            kind,
            name,
            layout,
            altmap,
            persistence: None,
            takes_evicted: options.takes_evicted,
            huge: options.huge,
            foreign: AtomicBool::new(false),
        })
    }

    fn at(&self, page: u64) -> u64 {
        self.layout.data + page * self.layout.page
    }

    fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    /// In a forked child: memory of its own, where it can have any.
    fn renew(&self) -> Result<(), Errno> {
        if self.kind != Kind::Memory {
            return Err(Errno::BUSY);
        }
        let file = open::memory_file(self.layout.bytes, self.huge)?;
        if let Some(altmap) = &self.altmap {
            use std::os::fd::AsFd;
            altmap.renew(file.as_fd(), 0)?;
        }
        self.memory.renew(file)
    }
}

/// What an errno of a transfer means.
fn failure(e: Errno) -> DeviceError {
    match e {
        Errno::NOSPC | Errno::DQUOT | Errno::NOMEM => DeviceError::NoSpace,
        e => DeviceError::Io(e.raw_os_error()),
    }
}

impl Device for Dax {
    fn describe(&self) -> Descriptor {
        let pages = self.layout.pages();
        let what = match self.persistence {
            Some(_) => Descriptor::persistent(&self.name, pages),
            None => Descriptor::coherent(&self.name, pages),
        };
        let what = what.capacity_bytes(pages * self.layout.page).compares();
        if self.takes_evicted { what.takes_evicted() } else { what }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for store in batch {
            store.result = match self.is_foreign() {
                true => Err(DeviceError::NoSpace),
                false => self.memory.write(self.at(store.page), store.bytes).map_err(failure),
            };
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for load in batch {
            let wanted = load.bytes.len();
            load.result = match self.memory.read(self.at(load.page), load.bytes) {
                _ if self.is_foreign() => Err(DeviceError::Gone),
                Ok(got) if got < wanted => Err(DeviceError::Short { got, wanted }),
                Ok(_) => Ok(()),
                Err(e) => Err(failure(e)),
            };
        }
    }

    // Memory stays: it is what the device consists of.
    fn freed(&self, _: DevicePages) {}

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let mut held = [0; 4096];
        for (i, piece) in bytes.chunks(held.len()).enumerate() {
            let held = &mut held[..piece.len()];
            let got = self.memory.read(self.at(page) + i as u64 * 4096, held).map_err(failure)?;
            if got < piece.len() || *held != *piece {
                return Ok(false);
            }
        }
        Ok(!self.is_foreign())
    }

    fn usage(&self) -> Option<Usage> {
        if let Some(persistence) = &self.persistence {
            let used_bytes = persistence.used_bytes();
            return Some(Usage { used_bytes, peak_bytes: used_bytes });
        }
        None
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        (!self.is_foreign()).then(|| SharedMemory { file: self.memory.fd(), offset: self.at(page) })
    }

    fn altmap(&self) -> Option<OwnMetadata> {
        let words = Words { memory: self.altmap.clone()?, page: self.layout.page };
        Some(OwnMetadata::new(self.layout.altmap?, words))
    }

    fn named(&self) -> Option<&dyn NamedRegions> {
        self.persistence.as_ref().map(|p| p as &dyn NamedRegions)
    }

    fn after_fork(&self, side: ForkSide) {
        if side == ForkSide::Child && self.renew().is_err() {
            self.foreign.store(true, Ordering::Relaxed);
            if let Some(persistence) = &self.persistence {
                persistence.is_foreign_now();
            }
        }
    }
}

impl fmt::Debug for Dax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dax").field("kind", &self.kind).field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// The descriptors' memory, as the engine reaches it.
struct Words {
    memory: Shared<SharedMapping>,
    page: u64,
}

impl DeviceWords for Words {
    fn word(&self, pfn: Pfn, i: usize) -> &peerspace_core::sync::AtomicU64 {
        self.memory.word(pfn.0 * self.page + i as u64 * 8)
    }
}
