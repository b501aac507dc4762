//! What can go wrong, said so that one knows what to do about it.

use crate::engine::EngineError;
use peerspace_core::addr::VaRange;
use peerspace_os::{OsError, Trouble};

/// A space could not be made, or a call on it was refused. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This kernel or this container does not allow what is needed.
    #[error("{0}")]
    System(#[from] OsError),
    /// The budget cannot work.
    #[error("a host budget of {given} bytes cannot work: at least {least} bytes are needed")]
    BudgetTooSmall {
        /// What was asked for.
        given: u64,
        /// The least that works.
        least: u64,
    },
    /// The budget is larger than what can be counted.
    #[error("a host budget of {given} bytes is more than the {most} bytes a space can manage")]
    BudgetTooLarge {
        /// What was asked for.
        given: u64,
        /// The most that works.
        most: u64,
    },
    /// There is no device: what does not fit into RAM would have nowhere to go.
    #[error("a space needs at least one device for what does not fit into RAM")]
    NoDevice,
    /// A device cannot be used.
    #[error("device {name} cannot be used: {why}")]
    Device {
        /// Which one.
        name: String,
        /// Why.
        why: String,
    },
    /// The device is not there any more, or is just being detached.
    #[error("there is no such device in this space, or it is being detached already")]
    NoSuchDevice,
    /// What a device holds has nowhere else to go.
    #[error(
        "device {name} cannot be detached: {missing} bytes of what it holds have no room on other devices or in RAM. \
         Attach another device first, or discard what is not needed"
    )]
    NoRoom {
        /// Which device.
        name: String,
        /// How many bytes of room are missing.
        missing: u64,
    },
    /// Memory could not be migrated. What was before it is migrated; it is where it was.
    #[error("{range} cannot be migrated to {to}: {why}")]
    Migrate {
        /// What could not.
        range: VaRange,
        /// Where to: a device, or RAM.
        to: String,
        /// Why.
        why: String,
    },
    /// A region with a name cannot be had.
    #[error("the region {name:?} of device {device}: {why}")]
    Named {
        /// Its name.
        name: String,
        /// Of which device.
        device: String,
        /// Why not, and what to do about it.
        why: String,
    },
    /// A size or an address does not fit.
    #[error("{what}: {why}")]
    BadRange {
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More would be pinned than may be.
    #[error(
        "{asked} bytes cannot be kept resident: {pinned} bytes are, and {most} may be. Let some go first, or allow more \
         with Builder::pin_limit"
    )]
    TooManyPinned {
        /// What was asked for, in whole pages.
        asked: u64,
        /// What is kept resident already; a page that is so twice counts twice.
        pinned: u64,
        /// What may be.
        most: u64,
    },
    /// The kernel refused.
    #[error("{what}: {why}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Why it was refused.
        why: Trouble,
    },
    /// The data of a page is lost (rule Z9).
    #[error(
        "the page at {range} is lost: device {device} could not give its page {page} back. Everything else is as it \
         was; once discarded, the page is usable again, and zero (not on kernels before 6.6, with faults by threads)"
    )]
    Lost {
        /// The addresses that are lost.
        range: VaRange,
        /// The device that had the data.
        device: String,
        /// The page of the device that could not be read.
        page: u64,
    },
    /// A thread could not be started.
    #[error("cannot start a thread of the engine: {0}")]
    Thread(String),
}

impl From<EngineError> for Error {
    fn from(e: EngineError) -> Error {
        match e {
            EngineError::Memory(why) => Error::Kernel { what: "reserve memory for tables".into(), why },
            EngineError::Device(name, why) => Error::Device { name, why },
        }
    }
}
