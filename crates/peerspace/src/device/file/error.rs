//! Why a file cannot be a device, said so that one knows what to do about it.
//!
//! Plain values: nothing here is shared or locked.

use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// [`File::open`](super::File::open) refused. What was there is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The directory, or the directory that the file would be in, is not there.
    #[error("there is no directory {}", .path.display())]
    MissingDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// Nothing can be written there.
    #[error("{} is on a file system that is read-only", .path.display())]
    ReadOnly {
        /// What was to be opened.
        path: PathBuf,
    },
    /// This process may not.
    #[error("no permission to {what} {}", .path.display())]
    Permission {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// The file system is full, or the user's quota used up.
    #[error("no space for {}: {available} bytes can be had, {least} is the least that works", .path.display())]
    NoSpace {
        /// Where it was to be.
        path: PathBuf,
        /// Bytes that can be had.
        available: u64,
        /// Bytes that would do.
        least: u64,
    },
    /// The size that was asked for cannot work.
    #[error("a file of {given} bytes is too small: {least} is the least that works")]
    TooSmall {
        /// What was asked for.
        given: u64,
        /// Bytes that would do.
        least: u64,
    },
    /// The size that was asked for is more than there can be.
    #[error("a file of {given} bytes is too large: {why}")]
    TooLarge {
        /// What was asked for.
        given: u64,
        /// What it is too large for.
        why: &'static str,
    },
    /// Only ordinary files and directories will do.
    #[error("{} is {found}, neither a file nor a directory", .path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The file has content that is not ours, and that would be lost.
    #[error("{} is {found}; expected {expected}. It was not touched", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: String,
        /// What it should look like.
        expected: String,
    },
    /// Another process uses the file as a device.
    #[error("{} is in use by another process", .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The kernel refused memory for tables.
    #[error("no memory for the tables of a file of {bytes} bytes")]
    Memory {
        /// The file's size.
        bytes: u64,
    },
    /// The system refused something else.
    #[error("cannot {what} {}: {}", .path.display(), std::io::Error::from_raw_os_error(*.errno))]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it was refused.
        errno: i32,
    },
}

/// Says what `errno` means when `what` was tried on `path`.
pub(super) fn refused(what: &'static str, path: &Path, errno: Errno) -> FileError {
    let path = path.to_path_buf();
    match errno {
        Errno::ROFS => FileError::ReadOnly { path },
        Errno::ACCESS | Errno::PERM => FileError::Permission { what, path },
        Errno::NOSPC | Errno::DQUOT => FileError::NoSpace { path, available: 0, least: super::layout::least_bytes() },
        errno => FileError::System { what, path, errno: errno.raw_os_error() },
    }
}
