//! What a device asks of the space it belongs to: resolving its faults, and access to the host's memory (rules G4, G10).

use super::mmu::DeviceAccess;
use std::fmt;
use std::sync::Arc;

/// Why a device fault was not resolved, or memory of the host not accessed. Each says the address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// No region of the space is there.
    #[error("address {0:#x} lies in no region of the space")]
    NotManaged(u64),
    /// The device's MMU cannot translate it.
    #[error("address {0:#x} is none that the device can translate")]
    OutOfReach(u64),
    /// The device may read there, not write.
    #[error("address {0:#x} can be read and not written")]
    ReadOnly(u64),
    /// The program itself may not even read there.
    #[error("address {0:#x} can neither be read nor written: the program has protected it")]
    Protected(u64),
    /// It is in place on a coherent or persistent device, and does not leave it.
    #[error("what is at address {0:#x} is mapped in place on another device, and cannot be taken from there")]
    InPlace(u64),
    /// It is memory that stays where it is (shared, of a file, of huge pages: rule G11), and the device has no way to access the
    /// host's memory.
    #[error(
        "what is at address {0:#x} stays on the host (it is shared, a file's, or a huge page of the kernel's), and the device \
         cannot access it there: copy it to other memory for this device"
    )]
    NoWay(u64),
    /// It is memory that stays where it is, and so no device can have it alone (rules G11, G14).
    #[error(
        "what is at address {0:#x} stays on the host (it is shared, a file's, or a huge page of the kernel's): no device can \
         have it alone, nor on its own memory"
    )]
    Stays(u64),
    /// The program has mapped it, and the kernel cannot bring it: it is beyond the end of its file, mostly.
    #[error(
        "what is mapped at address {0:#x} cannot be had: it is beyond the end of its file, the file cannot be read or has no \
         room, or there is no huge page left"
    )]
    Unreachable(u64),
    /// The data is gone (rule Z9).
    #[error("what was at address {0:#x} is lost: {1}")]
    Lost(u64, String),
    /// There is no room for the page on the device, and none can be made.
    #[error("there is no room on the device for the page of address {0:#x}")]
    NoRoom(u64),
    /// Somebody relies on the page staying on the host, where the device cannot access it (rule Z8).
    #[error(
        "the page of address {0:#x} is kept resident on the host, and the device cannot access it there: let it go first"
    )]
    Pinned(u64),
    /// The device did not do what was asked of it.
    #[error("the device failed with the page of address {0:#x}: {1}")]
    Device(u64, super::DeviceError),
    /// The device faults there again and again, although it says that it has the translation.
    #[error("the device faults at address {0:#x} for ever: it says that it has the translation, and does not use it")]
    NoHeadway(u64),
    /// The host's memory is not mapped there for this device (any more): it is to fault.
    #[error("address {0:#x} is not mapped in place for the device")]
    NotMapped(u64),
    /// The device has been cut off: it was detached, failed or quarantined, or the space has gone.
    #[error("the device is cut off from its space")]
    Cut,
}

/// What a port does for its device.
pub(crate) trait PortOps: Send + Sync {
    fn fault(&self, va: u64, access: DeviceAccess) -> Result<(), FaultError>;
    fn read(&self, va: u64, to: &mut [u8]) -> Result<(), FaultError>;
    fn write(&self, va: u64, from: &[u8]) -> Result<(), FaultError>;
    fn note_remote(&self, va: u64, accesses: u32);
}

/// A device's way to its space. Clones are the same port.
#[derive(Clone)]
pub struct Port {
    ops: Arc<dyn PortOps>,
}

impl Port {
    /// A port that does what `ops` says.
    pub(crate) fn new(ops: Arc<dyn PortOps>) -> Port {
        Port { ops }
    }

    /// Resolves a fault of the device: an `access` to `va` that found no translation, or none that permits it. Afterwards the
    /// access can be repeated.
    ///
    /// # Errors
    /// [`FaultError`]; nothing has changed for the device then.
    pub fn fault(&self, va: u64, access: DeviceAccess) -> Result<(), FaultError> {
        self.ops.fault(va, access)
    }

    /// Reads memory of the host that is mapped in place for the device, up to the end of the page.
    /// `to` had best be memory that the space does not manage. It is read in parts otherwise, by way of memory that is not, and may
    /// wait for a fault: a device that waits for its accesses when it [unmaps](super::mmu::Mmu::unmap) must not do that.
    ///
    /// # Errors
    /// [`FaultError::NotMapped`] when it is not: the device faults then.
    pub fn read(&self, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        self.ops.read(va, to)
    }

    /// Writes memory of the host that is mapped in place for the device, and writable, up to the end of the page.
    /// `from` had best be memory that the space does not manage, as above.
    ///
    /// # Errors
    /// [`FaultError::NotMapped`] when it is not: the device faults then.
    pub fn write(&self, va: u64, from: &[u8]) -> Result<(), FaultError> {
        self.ops.write(va, from)
    }

    /// Says that so many accesses to the page of `va` went to the host of late: where they are many, the page moves.
    pub fn note_remote(&self, va: u64, accesses: u32) {
        self.ops.note_remote(va, accesses);
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}
