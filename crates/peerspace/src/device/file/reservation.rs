//! A named file that is kept for a program which may come to need it.
//!
//! A program opens its file when its memory is about to outgrow its budget, and perhaps never. Until then only
//! whoever started it can see to it that nobody else takes the file.

use super::error::{FileError, refused};
use super::open::{self, Claim};
use peerspace_os::linux::lock::Reserved;
use rustix::io::Errno;
use std::path::Path;

/// A file that nobody but [`File::open_reserved`](super::File::open_reserved) can open while this lives. A file that
/// was made for it and came to no use is removed at the end.
#[derive(Debug)]
pub struct Reservation {
    _kept: Reserved,
}

impl Reservation {
    /// Opens `path` on trial, as [`File::open`](super::File::open) would, and reserves it if it is not a directory:
    /// there every user has a file of its own.
    ///
    /// # Errors
    /// See [`FileError`]; nothing was changed then.
    pub fn new(path: &Path, size: Option<u64>) -> Result<Option<Reservation>, FileError> {
        let fresh = matches!(rustix::fs::lstat(path), Err(Errno::NOENT));
        let opened = open::open(path, size, Claim::Unreserved)?;
        if !opened.named {
            return Ok(None);
        }
        drop(opened);
        let kept = Reserved::new(path, fresh, |lock| open::claimed(path, lock), |what, e| refused(what, path, e))?;
        Ok(Some(Reservation { _kept: kept }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::File;
    use super::*;

    const SIZE: Option<u64> = Some(1 << 24);

    fn in_use<T>(outcome: Result<T, FileError>) -> bool {
        matches!(outcome, Err(FileError::InUse { .. }))
    }

    #[test]
    fn a_reserved_file_is_one_program_s() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("named");
        let reservation = Reservation::new(&path, SIZE).unwrap().unwrap();
        assert!(in_use(Reservation::new(&path, SIZE)) && in_use(File::open(&path, SIZE)));
        let used = File::open_reserved(&path, SIZE).unwrap();
        assert!(in_use(File::open_reserved(&path, SIZE)));
        // Who uses it may outlive who reserved it.
        drop(reservation);
        assert!(in_use(Reservation::new(&path, SIZE)) && in_use(File::open(&path, SIZE)));
        drop(used);
        assert!(path.exists(), "a file that was used stays");
        let unreserved = File::open(&path, SIZE).unwrap();
        assert!(in_use(Reservation::new(&path, SIZE)) && in_use(File::open_reserved(&path, SIZE)));
        drop(unreserved);
        drop(Reservation::new(&path, SIZE).unwrap().unwrap());
        assert!(path.exists(), "so does one that was there before");
    }

    #[test]
    fn what_came_to_no_use_is_not_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("named");
        drop(Reservation::new(&path, SIZE).unwrap().unwrap());
        assert!(!path.exists());
        assert!(Reservation::new(dir.path(), SIZE).unwrap().is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
