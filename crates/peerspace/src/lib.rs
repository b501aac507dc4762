//! peerspace
mod adopt;
pub mod device;
pub(crate) mod engine;
mod error;
mod fork;
mod heap;
#[cfg(feature = "process")]
pub mod process;
mod region;
mod report;
mod space;
mod spec;
pub(crate) mod sync;
pub(crate) mod tell;

pub use adopt::{Adopted, Resident, Use};
pub use error::Error;
pub use heap::{Heap, Pool};
pub use peerspace_os::linux::signal::forward as forward_sigbus;
pub use peerspace_os::linux::thread::unmanaged;
pub use region::{Hint, Region};
pub use report::{DeviceStatistics, FaultStatistics, Statistics};
pub use space::{Builder, Faults, Space};
pub use spec::{DeviceSpec, KINDS as DEVICE_KINDS, Size, SizeError, SpecError};
