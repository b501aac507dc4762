//! The raw floor: the least a pager can cost over the kernel calls that peerspace makes.
//!
//! A floor serves its faults by SIGBUS in the one thread there is, evicts what came first, and keeps no books
//! beyond an array; it knows no second thread, no other region, no failing device. What it costs is the price of
//! the kernel's operations and of the transfer, and nothing that does more work can cost less. Ours is measured
//! against it.
//!
//! [`MemoryFloor`] keeps what it evicts in memory, compressed or not, and writes back whatever it evicts.
//! [`FileFloor`] reads a file and drops what it evicts: its data never changes.

mod file;
mod memory;
mod sigbus;

pub(crate) use file::FileFloor;
pub(crate) use memory::MemoryFloor;

use crate::error::Trouble;
use peerspace_os::linux::uffd::{Uffd, feature};

/// The page the floors are written for.
const PAGE: u64 = 4096;

/// A userfaultfd with SIGBUS delivery and `features` more.
pub(crate) fn open(features: u64) -> Result<Uffd, Trouble> {
    if rustix::param::page_size() as u64 != PAGE {
        return Err(Trouble::Unavailable("the floor is written for pages of 4 KiB".into()));
    }
    let unavailable = Trouble::unavailable::<rustix::io::Errno>;
    let mut uffd = Uffd::open(false).or_else(|_| Uffd::open(true)).map_err(unavailable("open a userfaultfd"))?;
    uffd.enable(feature::SIGBUS | features).map_err(unavailable("switch on what the floor needs of userfaultfd"))?;
    Ok(uffd)
}
