//! peerspace
pub mod device;
pub(crate) mod engine;
mod error;
mod region;
mod report;
mod space;
pub(crate) mod sync;
pub(crate) mod tell;

pub use error::Error;
pub use region::Region;
pub use report::{DeviceStatistics, FaultStatistics, Statistics};
pub use space::{Builder, Faults, Space};
