//! A file that is kept for a process which has yet to open the device.

use super::error::DaxError;
use super::open::{claimed, refused};
use peerspace_os::linux::lock;
use rustix::fs::{Mode, OFlags, fstat, ftruncate, open, unlink};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A file that nobody but who says that it is reserved can open while this lives. One that was made for it and came to no use
/// is removed at the end.
#[derive(Debug)]
pub(crate) struct Reservation {
    path: PathBuf,
    file: OwnedFd,
    fresh: bool,
}

impl Reservation {
    /// Reserves the file at `path`, which was opened on trial and closed again. `fresh`: it was made for that.
    pub(crate) fn new(path: &Path, fresh: bool) -> Result<Reservation, DaxError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| refused("open", path, e))?;
        claimed(path, lock::reserve(file.as_fd()))?;
        // On trial it was given its length.
        let emptied = if fresh { ftruncate(&file, 0) } else { Ok(()) };
        let reservation = Reservation { path: path.into(), file, fresh };
        emptied.map_err(|e| refused("empty", path, e))?;
        Ok(reservation)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let unused = || fstat(&self.file).is_ok_and(|s| s.st_size == 0);
        // Whoever still has it open is one that was started here and lives on.
        if self.fresh && unused() && lock::is_shared(self.file.as_fd()) == Ok(false) {
            // Nothing can be done if it cannot be removed.
            let _ = unlink(&self.path);
        }
    }
}
