//! A file that is kept for a process which has yet to open the device.

use super::error::DaxError;
use super::open::{claimed, refused};
use peerspace_os::linux::lock::Reserved;
use std::path::Path;

/// A file that nobody but who says that it is reserved can open while this lives. One that was made for it and came to no use
/// is removed at the end.
#[derive(Debug)]
pub(crate) struct Reservation {
    _kept: Reserved,
}

impl Reservation {
    /// Reserves the file at `path`, which was opened on trial and closed again. `fresh`: it was made for that.
    pub(crate) fn new(path: &Path, fresh: bool) -> Result<Reservation, DaxError> {
        let kept = Reserved::new(path, fresh, |lock| claimed(path, lock), |what, e| refused(what, path, e));
        kept.map(|kept| Reservation { _kept: kept })
    }
}
