//! A named file that is kept for a program which may come to need it.
//!
//! A program opens its file when its memory is about to outgrow its budget, and perhaps never. Until then only
//! whoever started it can see to it that nobody else takes the file.

use super::error::{FileError, refused};
use super::open::{self, Claim};
use peerspace_os::linux::lock;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A file that nobody but [`File::open_reserved`](super::File::open_reserved) can open while this lives. A file that
/// was made for it and came to no use is removed at the end.
#[derive(Debug)]
pub struct Reservation {
    path: PathBuf,
    file: OwnedFd,
    fresh: bool,
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
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| refused("open", path, e))?;
        open::claimed(path, lock::reserve(file.as_fd()))?;
        // As it was found out whether the file can be used, it was given its length.
        let emptied = if fresh { rustix::fs::ftruncate(&file, 0) } else { Ok(()) };
        let reservation = Reservation { path: path.to_path_buf(), file, fresh };
        emptied.map_err(|e| refused("empty", path, e))?;
        Ok(Some(reservation))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let unused = || rustix::fs::fstat(&self.file).is_ok_and(|s| s.st_size == 0);
        // Whoever still has it open is one that was started here and lives on.
        if self.fresh && unused() && lock::is_shared(self.file.as_fd()) == Ok(false) {
            // Nothing can be done if it cannot be removed.
            let _ = rustix::fs::unlink(&self.path);
        }
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
