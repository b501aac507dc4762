//! Devices that run code: how they see a space, and how a space keeps what they see true (rules G1 to G4).
//!
//! A device with an [`Mmu`] uses the program's own pointers. Its MMU holds translations that the space enters and takes away;
//! an access that finds none is a *device fault*, and the device asks its [`Port`] to resolve it, in whatever thread it has at
//! hand. The port finds the page wherever it is, moves or maps it as mode and hints say, and enters the translation; the device
//! repeats the access.
//!
//! ```text
//!   device thread         Port                       engine                              Mmu
//!   access misses ------> fault(address, access) --> entry locked, data moved, table --> map
//!   access again  <------ Ok                                                changed
//!                                       CPU access, reclaim, another device ... -------> unmap, and wait until it is done
//! ```
//!
//! # What a device promises
//!
//! - When an `unmap` has been answered by [`Progress::Done`], or its fence [is done](Mmu::is_done), the device makes no access
//!   by those addresses any more before they are mapped again. Whoever does not answer before the
//!   [deadline](MmuDescriptor::deadline) is *quarantined*: its port is cut, nothing is asked of it again, and what it alone
//!   holds is lost (rule Z9).
//! - [`Mmu`] functions return soon and never call the port: they are called with pages locked. They may wait for accesses under
//!   way, those by [`Port::read`] and [`Port::write`] included, which wait for nothing; not for a [`Port::fault`].
//! - A lock that they take is held elsewhere only with signals blocked: a handler of the program's that touches managed memory
//!   has them called, and would wait for the thread that it has interrupted.
//! - Nothing is accessed by the address of memory that lies on the host but through the port ([`Port::read`],
//!   [`Port::write`]): so it can be cut off.
//!
//! A device that cannot fault ([`MmuDescriptor::faults`] is false) has its ranges mapped for the duration of a
//! [launch](crate::Space::launch).

use super::DeviceError;
use std::ops::Range;
use std::time::Duration;

pub use super::port::{FaultError, Port};

/// What a device wants to do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceAccess {
    /// It reads.
    Read,
    /// It writes, or reads and writes.
    Write,
    /// It reads and writes in one step, for which nobody else may access the page: not the CPU, no other device (rule G14).
    /// The page migrates to the device, whatever its mode.
    Atomic,
}

impl DeviceAccess {
    /// Whether it changes the page.
    pub const fn writes(self) -> bool {
        !matches!(self, DeviceAccess::Read)
    }
}

/// Where a device's accesses go, as long as no [hint](crate::Hint) says otherwise (rule G9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// To where the page is on the host: nothing moves. Needs [`remote`](MmuDescriptor::remote).
    Share,
    /// To the device's own memory: a page is on the CPU or on one device, and moves to whoever uses it.
    #[default]
    Exclusive,
    /// To the device's own memory: reads get a copy beside the CPU's and other devices', all of which go when anybody writes;
    /// writes move the page.
    Replicate,
}

/// What an MMU is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmuDescriptor {
    /// The addresses it can translate (rule G13).
    pub addresses: Range<u64>,
    /// It can map memory of the host in place, and access it through its [`Port`] (rule G10).
    pub remote: bool,
    /// It can map a page of zeros that takes up no memory (rule G3).
    pub zero_page: bool,
    /// An access without a translation is a fault that it can resolve and repeat. Otherwise it needs
    /// [launches](crate::Space::launch).
    pub faults: bool,
    /// Where its accesses go.
    pub mode: Mode,
    /// How long it may take to stop using pages.
    pub deadline: Duration,
}

impl MmuDescriptor {
    /// All addresses of a program, with faults; no access to the host's memory; a deadline of two seconds.
    pub fn new(mode: Mode) -> MmuDescriptor {
        let deadline = Duration::from_secs(2);
        MmuDescriptor { addresses: 0..1 << 47, remote: false, zero_page: false, faults: true, mode, deadline }
    }

    /// The same for one that can access the host's memory in place.
    #[must_use]
    pub fn remote(self) -> MmuDescriptor {
        MmuDescriptor { remote: true, ..self }
    }

    /// The same for one that has a page of zeros.
    #[must_use]
    pub fn zero_page(self) -> MmuDescriptor {
        MmuDescriptor { zero_page: true, ..self }
    }

    /// The same for one that cannot fault.
    #[must_use]
    pub fn without_faults(self) -> MmuDescriptor {
        MmuDescriptor { faults: false, ..self }
    }

    /// The same for one that translates these addresses alone.
    #[must_use]
    pub fn addresses(self, addresses: Range<u64>) -> MmuDescriptor {
        MmuDescriptor { addresses, ..self }
    }

    /// The same with another deadline.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> MmuDescriptor {
        MmuDescriptor { deadline, ..self }
    }
}

/// What a translation leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The device's own memory, from this page on.
    Own(u64),
    /// Memory of the host, at the same addresses: to be accessed by [`Port::read`] and [`Port::write`].
    Host,
    /// Zeros. Never writable.
    Zero,
}

/// A translation to be entered: of one page, or of a block (512 pages) that is aligned to its size on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub va: u64,
    /// Its bytes.
    pub bytes: u64,
    /// What it leads to.
    pub to: Target,
    /// The device may write; otherwise a write is a fault.
    pub writable: bool,
}

/// How far a request to the device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It is done.
    Done,
    /// It is under way; [`Mmu::is_done`] says when this fence is reached.
    Pending(u64),
}

/// The translations of a device. See the [module](self) for what it promises.
pub trait Mmu: Send + Sync {
    /// What it can do. Asked once.
    fn describe(&self) -> MmuDescriptor;

    /// The device belongs to a space, and resolves its faults by `port`. Called once, after [`describe`](Mmu::describe).
    fn attached(&self, port: Port) {
        let _ = port;
    }

    /// Enters translations, in place of those there are for the same addresses. They stay until they are taken away: where a
    /// device faults on and on although nothing has been taken away, its fault fails with [`FaultError::NoHeadway`].
    ///
    /// # Errors
    /// When it could not enter all of them. The space takes away all of the batch then.
    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError>;

    /// Takes the translations of these addresses away: whole pages, some of which may have none. A block of which a part
    /// is meant goes as a whole. A device that cannot be [halted](Mmu::halt) is also asked for all addresses at once: it had best
    /// look through its translations then, and not through the addresses.
    ///
    /// # Errors
    /// When it cannot. The device is quarantined.
    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError>;

    /// Halts the device: from when this is answered by [`Progress::Done`], or its fence is done, until
    /// [`go_on`](Mmu::go_on), it makes no access by any translation. Its translations stay, and faults that its port is resolving go
    /// on. The space halts devices for moments in which the meaning of addresses changes without its having been told before
    /// (rule G5).
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where it cannot; then all of its translations are taken away instead. With any other the
    /// device is quarantined.
    fn halt(&self) -> Result<Progress, DeviceError> {
        Err(DeviceError::Unsupported)
    }

    /// Ends what [`halt`](Mmu::halt) began.
    fn go_on(&self) {}

    /// Whether the request with this fence is done.
    ///
    /// # Errors
    /// When it will never be. The device is quarantined.
    fn is_done(&self, fence: u64) -> Result<bool, DeviceError> {
        let _ = fence;
        Err(DeviceError::Unsupported)
    }

    /// Keeps addresses free for a region of the space (rule G13). False when something else of the device's is there; the
    /// space looks elsewhere then.
    fn reserve(&self, addresses: Range<u64>) -> bool {
        let _ = addresses;
        true
    }

    /// Gives addresses back that were reserved.
    fn release(&self, addresses: Range<u64>) {
        let _ = addresses;
    }

    /// Whether the device has used a page among these addresses since it was last asked. What was not used is evicted first.
    fn take_accessed(&self, addresses: Range<u64>) -> bool {
        let _ = addresses;
        false
    }
}
