//! What can go wrong with a kernel: before it runs, and while it does.

use crate::device::mmu::FaultError;

/// A kernel was not launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The device belongs to no space, so no address means anything to it.
    #[error("the device belongs to no space yet: attach it, or build a space with it, before launching")]
    NotAttached,
    /// The process was forked, and the device's threads are in its parent.
    #[error("the device's threads are in the process that this one was forked from: make a new device here")]
    Forked,
    /// The device is gone.
    #[error("the device is gone")]
    Gone,
    /// There was no thread to be had for a lane; the errno says why.
    #[error("a thread for a lane of the device could not be started: {}", std::io::Error::from_raw_os_error(*.0))]
    Threads(i32),
}

/// Why a kernel failed, or an access of one. Whoever gets one of an access can hand it on by `?`, or do without the access.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The space could not resolve a fault.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The device cannot fault, and had no translation.
    #[error(
        "address {0:#x} is not mapped on the device, which cannot fault: launch with all ranges that the kernel uses"
    )]
    NotMapped(u64),
    /// An atomic access was not to a multiple of its size.
    #[error("the atomic access to address {0:#x} is not aligned to its size")]
    Unaligned(u64),
    /// The kernel's own code panicked, with this message.
    #[error("the kernel panicked: {0}")]
    Panicked(String),
    /// The kernel was not run to its end: its device was given up before.
    #[error("the device was given up before the kernel had run to its end")]
    Stopped,
    /// The process was forked while the kernel ran; it runs on in the parent.
    #[error("the kernel runs in the process that this one was forked from")]
    Forked,
    /// A kernel waited for one that comes after it on the same device.
    #[error("a kernel cannot wait for one that its own device will only run after it")]
    WaitsForItself,
    /// The kernel says so itself.
    #[error("{0}")]
    Failed(String),
}

impl KernelError {
    /// An error of the kernel's own.
    pub fn failed(why: impl Into<String>) -> KernelError {
        KernelError::Failed(why.into())
    }
}
