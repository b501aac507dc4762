//! What a device is: somewhere pages can live while they are not in RAM.
//!
//! A compressed store, a file, a remote machine, an accelerator: to the engine they are the same kind of thing.
//! The engine decides which page of the device holds what, so a device that moves bytes to and from numbered
//! pages is complete:
//!
//! ```
//! use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
//! use std::sync::Mutex;
//!
//! /// Memory that the engine cannot see into.
//! struct Toy(Mutex<Vec<u8>>);
//!
//! impl Device for Toy {
//!     fn describe(&self) -> Descriptor {
//!         Descriptor::private("toy", self.0.lock().unwrap().len() as u64 / 4096)
//!     }
//!     fn store(&self, batch: &mut [Store<'_>]) {
//!         let mut memory = self.0.lock().unwrap();
//!         for s in batch {
//!             let at = s.page as usize * 4096;
//!             memory[at..at + s.bytes.len()].copy_from_slice(s.bytes);
//!             s.result = Ok(());
//!         }
//!     }
//!     fn load(&self, batch: &mut [Load<'_>]) {
//!         let memory = self.0.lock().unwrap();
//!         for l in batch {
//!             let at = l.page as usize * 4096;
//!             l.bytes.copy_from_slice(&memory[at..at + l.bytes.len()]);
//!             l.result = Ok(());
//!         }
//!     }
//!     fn freed(&self, _: DevicePages) {}
//! }
//! # let _ = Toy(Mutex::new(vec![0; 4096])).describe();
//! ```
//!
//! # What a device is called with
//!
//! Calls come from faulting threads and from the engine's own, concurrently. No two calls at a time are about the
//! same page. While it is called, a device must not touch memory that a space manages, nor allocate from a heap that is
//! managed: it would wait for itself.
//!
//! # Devices that run code
//!
//! A device that has processors of its own has an MMU as well ([`Device::mmu`]), and its code uses the program's own pointers: see
//! [`mmu`]. Nothing else changes for it: `store`, `load` and `freed` carry its pages as before. Its code runs outside of
//! calls, and may touch managed memory in two ways. By the MMU: what it finds mapped there is its own memory, and what it does not
//! find it asks its [`Port`](mmu::Port) for. And, where it runs in threads of this process (the lanes of
//! `soft`), by ordinary pointers like any thread of the program, as long as no call of the device waits for it.
//!
//! `examples/accelerator.rs` is such a device in under seventy lines, its MMU apart.
//!
//! # What is believed
//!
//! Nothing is believed on a device's word where that can be checked. A result that was not set counts as a failure,
//! and so does a panic, of everything in the batch; answers belong to pages, whatever order the batch was put into.
//! A load that fails is tried once more, and if it fails again its page is lost (rule Z9), alone. A page that could
//! not be stored stays in RAM or goes to another device; after 16 failures in a row, other than for want of space,
//! nothing more is stored on the device.
//!
//! A device may hang. One that is suspected of it is given a [deadline](deadline::Deadline).
//!
//! The bytes themselves are believed: that what comes back is what was stored, the device has to see to, unless it is
//! [to be verified](Descriptor::verified). Where that
//! is not certain (a disk, a network), it keeps checksums, as `file` and `compressed` do, and says
//! [`DeviceError::Corrupt`] rather than handing out something else.
//!
//! # Memory in place
//!
//! A coherent or persistent device also says where its memory is for the CPU to map ([`Device::shared`]). While a page is mapped
//! in place, the program reads and writes it there, and the device is not asked for it; before it is loaded again it is taken
//! out of place. What a named region is said to lie on is checked, but that two of them do not share pages with something else
//! is the device's own business.

use peerspace_core::addr::Pages;
use std::fmt;

pub use peerspace_core::altmap::{Altmap, AltmapError};
pub use peerspace_core::devmap::DeviceWords;
pub use peerspace_os::SharedMemory;

#[cfg(feature = "compressed")]
pub mod compressed;
#[cfg(feature = "dax")]
pub mod dax;
pub mod deadline;
pub mod failing;
#[cfg(feature = "file")]
pub mod file;
pub mod mmu;
pub(crate) mod port;
#[cfg(feature = "soft")]
pub mod soft;

/// How a device's memory relates to the CPU (rule Z5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryType {
    /// The CPU cannot map it: an access migrates the page home.
    Private,
    /// The CPU maps it in place.
    Coherent,
    /// The CPU maps it in place, and it survives the process.
    Persistent,
}

impl MemoryType {
    /// The word for it in reports.
    pub const fn name(self) -> &'static str {
        match self {
            MemoryType::Private => "private",
            MemoryType::Coherent => "coherent",
            MemoryType::Persistent => "persistent",
        }
    }
}

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Descriptor {
    /// A name for reports and errors.
    pub name: String,
    /// How its memory relates to the CPU.
    pub memory: MemoryType,
    /// Pages it can number. What it really holds may be less: [`DeviceError::NoSpace`] says so.
    pub pages: Pages,
    /// The bytes that bound it, for reports; 0 where the pages do.
    pub capacity_bytes: u64,
    /// A transfer keeps the calling thread waiting (for a disk, a network), so that others should go on meanwhile.
    pub slow: bool,
    /// [`Device::holds`] costs about as much as a load, so it pays to compare before writing back.
    pub compares: bool,
    /// What it takes up is RAM of this process ([`Device::usage`] says how much).
    pub in_ram: bool,
    /// After each store the pages are read back and compared, while the data is still in RAM: for a device that may say it
    /// has done what it has not.
    pub verified: bool,
    /// What leaves RAM for want of room may go there. Elsewhere pages go only where they are
    /// [sent](crate::Region::migrate_to) (rule Z5).
    pub takes_evicted: bool,
}

impl Descriptor {
    /// A private device of `pages` pages that is fast and does not compare.
    pub fn private(name: impl Into<String>, pages: u64) -> Descriptor {
        Descriptor {
            name: name.into(),
            memory: MemoryType::Private,
            pages: Pages(pages),
            capacity_bytes: 0,
            slow: false,
            compares: false,
            in_ram: false,
            verified: false,
            takes_evicted: true,
        }
    }

    /// A coherent device of `pages` pages, which the CPU maps in place: see [`Device::shared`]. Pages go there only when they
    /// are sent.
    pub fn coherent(name: impl Into<String>, pages: u64) -> Descriptor {
        Descriptor { memory: MemoryType::Coherent, takes_evicted: false, ..Descriptor::private(name, pages) }
    }

    /// A persistent device of `pages` pages, for regions that have names: see [`Device::named`].
    pub fn persistent(name: impl Into<String>, pages: u64) -> Descriptor {
        Descriptor { memory: MemoryType::Persistent, ..Descriptor::coherent(name, pages) }
    }

    /// The same for a device to which pages go also when they leave RAM for want of room, and from which a fault brings
    /// those home again.
    #[must_use]
    pub fn takes_evicted(self) -> Descriptor {
        Descriptor { takes_evicted: true, ..self }
    }

    /// The same for a device that keeps what it holds in this process's RAM.
    #[must_use]
    pub fn in_ram(self) -> Descriptor {
        Descriptor { in_ram: true, ..self }
    }

    /// The same with another bound for reports.
    #[must_use]
    pub fn capacity_bytes(self, bytes: u64) -> Descriptor {
        Descriptor { capacity_bytes: bytes, ..self }
    }

    /// The same for a device whose transfers wait for something.
    #[must_use]
    pub fn slow(self) -> Descriptor {
        Descriptor { slow: true, ..self }
    }

    /// The same for a device whose stores are read back and compared.
    #[must_use]
    pub fn verified(self) -> Descriptor {
        Descriptor { verified: true, ..self }
    }

    /// The same for a device that can [compare](Device::holds).
    #[must_use]
    pub fn compares(self) -> Descriptor {
        Descriptor { compares: true, ..self }
    }
}

/// Why a device did not do something.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceError {
    /// It is full. The engine goes on with the next device.
    NoSpace,
    /// The transfer failed; the errno says why.
    Io(i32),
    /// Fewer bytes came than were asked for.
    Short {
        /// How many came.
        got: usize,
        /// How many were asked for.
        wanted: usize,
    },
    /// What came back is not what was stored: a checksum differs, or it cannot be decoded.
    Corrupt,
    /// The device returned without saying what became of the transfer.
    NoAnswer,
    /// The device cannot do this.
    Unsupported,
    /// The device is gone.
    Gone,
    /// The device's own code panicked.
    Panicked,
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::NoSpace => f.write_str("the device is full"),
            DeviceError::Io(errno) => write!(f, "{}", std::io::Error::from_raw_os_error(*errno)),
            DeviceError::Short { got, wanted } => write!(f, "{got} of {wanted} bytes came"),
            DeviceError::Corrupt => f.write_str("what came back is not what was stored"),
            DeviceError::NoAnswer => f.write_str("the device did not say what became of the transfer"),
            DeviceError::Unsupported => f.write_str("the device cannot do this"),
            DeviceError::Gone => f.write_str("the device is gone"),
            DeviceError::Panicked => f.write_str("the device's own code panicked"),
        }
    }
}

impl std::error::Error for DeviceError {}

/// Pages to be written to a device.
#[derive(Debug)]
pub struct Store<'a> {
    /// The first page of the device to write.
    pub page: u64,
    /// The bytes of one or more whole pages, aligned to the page size.
    pub bytes: &'a [u8],
    /// What became of it; the device sets it.
    pub result: Result<(), DeviceError>,
}

impl<'a> Store<'a> {
    /// A transfer that has not been answered yet.
    pub fn new(page: u64, bytes: &'a [u8]) -> Store<'a> {
        Store { page, bytes, result: Err(DeviceError::NoAnswer) }
    }
}

/// Pages to be read from a device.
#[derive(Debug)]
pub struct Load<'a> {
    /// The first page of the device to read.
    pub page: u64,
    /// Where one or more whole pages go, aligned to the page size.
    pub bytes: &'a mut [u8],
    /// What became of it; the device sets it.
    pub result: Result<(), DeviceError>,
}

impl<'a> Load<'a> {
    /// A transfer that has not been answered yet.
    pub fn new(page: u64, bytes: &'a mut [u8]) -> Load<'a> {
        Load { page, bytes, result: Err(DeviceError::NoAnswer) }
    }
}

/// Bytes to be copied from one device to another.
#[derive(Debug)]
pub struct PeerCopy {
    /// Where they go, in bytes from the start of the device's memory.
    pub to: u64,
    /// Where they are, in bytes from the start of the peer's.
    pub from: u64,
    /// How many.
    pub bytes: u64,
    /// What became of it; the device sets it.
    pub result: Result<(), DeviceError>,
}

impl PeerCopy {
    /// A copy that has not been answered yet.
    pub fn new(to: u64, from: u64, bytes: u64) -> PeerCopy {
        PeerCopy { to, from, bytes, result: Err(DeviceError::NoAnswer) }
    }
}

/// Calls a device. `None` if it panicked, which must not reach the program's own code: it is in the middle of an access, and
/// knows nothing of devices.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).ok()
}

/// A run of a device's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePages {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a device holds right now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes it takes up, by its own account.
    pub used_bytes: u64,
    /// The most it has taken up.
    pub peak_bytes: u64,
}

/// Somewhere pages can live. See the [module](self) for what a device may rely on and what it must not do.
pub trait Device: Send + Sync {
    /// What it is. Asked once.
    fn describe(&self) -> Descriptor;

    /// Writes pages, all of the batch; sets each result. A page may be written again without having been freed.
    ///
    /// After an error the page holds what it held before, or nothing; the engine frees it.
    fn store(&self, batch: &mut [Store<'_>]);

    /// Reads pages that were written, all of the batch; sets each result. On error the bytes may be anything.
    fn load(&self, batch: &mut [Load<'_>]);

    /// The pages are not needed any more; called exactly once for each page that was stored (rule Z6), and for each of a named
    /// region that was open.
    fn freed(&self, pages: DevicePages);

    /// Whether `page` holds exactly `bytes`, one page. Only called when the descriptor says that the device
    /// compares.
    ///
    /// # Errors
    /// When that cannot be found out; the engine then writes the page back.
    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let _ = (page, bytes);
        Err(DeviceError::Unsupported)
    }

    /// What it holds, for reports; `None` where that is what its pages in use add up to.
    fn usage(&self) -> Option<Usage> {
        None
    }

    /// Where the memory of `page` is for the CPU to map (rule Z5). Pages that follow each other lie side by side. Coherent and
    /// persistent devices have such memory; what is written there by the CPU, loads see, and the other way round.
    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        let _ = page;
        None
    }

    /// A part of the device's own memory, no page of it, for the descriptors of its pages (rule A2). Asked once, when the
    /// device is attached. Without it descriptors are in host memory.
    fn altmap(&self) -> Option<OwnMetadata> {
        None
    }

    /// How it translates addresses, of a device that runs code (rule G1).
    fn mmu(&self) -> Option<&dyn mmu::Mmu> {
        None
    }

    /// Makes pages zero, without a transfer.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where the device cannot: zeros are stored then. Others when it failed.
    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        let _ = pages;
        Err(DeviceError::Unsupported)
    }

    /// Copies bytes from `peer`'s memory to this device's own, without the host (rule G6); sets each result. The peer may be this
    /// device. No page of it is mapped for writing meanwhile.
    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        let _ = peer;
        batch.iter_mut().for_each(|copy| copy.result = Err(DeviceError::Unsupported));
    }

    /// The device itself, for peers that know its type.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// The regions that have names, of a persistent device.
    fn named(&self) -> Option<&dyn NamedRegions> {
        None
    }

    /// The process is about to fork: bring everything into a state that two processes can go on from. Nothing is
    /// in flight.
    ///
    /// In the child, what the program had unmapped by then is given up before [`after_fork`](Device::after_fork):
    /// [`freed`](Device::freed) and [`Mmu::unmap`](mmu::Mmu::unmap) may be called in between, and have to work.
    fn before_fork(&self) {}

    /// The process has forked; called in both (rule G12).
    fn after_fork(&self, side: ForkSide) {
        let _ = side;
    }
}

/// A part of a device's own memory for descriptors (`vmem_altmap`).
pub struct OwnMetadata {
    pub(crate) altmap: Altmap,
    pub(crate) words: peerspace_os::own::Box<dyn DeviceWords>,
}

impl OwnMetadata {
    /// The pages that `altmap` says, in memory that `words` reaches.
    pub fn new(altmap: Altmap, words: impl DeviceWords + 'static) -> OwnMetadata {
        use peerspace_os::own::{Box, Own};
        OwnMetadata { altmap, words: allocator_api2::unsize_box!(Box::new_in(words, Own)) }
    }
}

impl fmt::Debug for OwnMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnMetadata").field("altmap", &self.altmap).finish_non_exhaustive()
    }
}

/// A region that a persistent device keeps by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRegion {
    /// Its name.
    pub name: String,
    /// Bytes, as they were asked for.
    pub bytes: u64,
    /// Where it is: runs of the device's pages, whole blocks, in the order of the region.
    pub extents: Vec<DevicePages>,
}

/// A region by a name cannot be had: a sentence that says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NamedError(pub String);

/// The regions of a persistent device, which outlive the process. What returns without error is durable.
pub trait NamedRegions {
    /// The regions there are.
    ///
    /// # Errors
    /// When they cannot be read.
    fn list(&self) -> Result<Vec<NamedRegion>, NamedError>;

    /// The region of that name.
    ///
    /// # Errors
    /// When there is none.
    fn find(&self, name: &str) -> Result<NamedRegion, NamedError>;

    /// Makes a region of zeros.
    ///
    /// # Errors
    /// When there is one of that name, or no room. Nothing has changed.
    fn create(&self, name: &str, bytes: u64) -> Result<NamedRegion, NamedError>;

    /// Removes a region, with everything in it.
    ///
    /// # Errors
    /// When there is none of that name. Nothing has changed.
    fn remove(&self, name: &str) -> Result<(), NamedError>;

    /// Makes durable what the CPU has written to the addresses `range`, where memory of this device is mapped in place.
    ///
    /// # Errors
    /// When it may not be.
    fn flush(&self, range: std::ops::Range<usize>) -> Result<(), DeviceError>;
}

/// Which process this is, after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkSide {
    /// The one that called fork.
    Parent,
    /// The new one. It has copies of all private memory; threads, and what is shared by descriptor, it has not.
    Child,
}
