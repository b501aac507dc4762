//! Why memory cannot be a device, said so that one knows what to do about it.

use super::names_error::NamesError;
use crate::device::AltmapError;
use std::path::PathBuf;

/// Memory cannot be used as a device. What was there is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaxError {
    /// There is too little of it.
    #[error("{given} bytes are too few: {least} is the least that works, descriptors and a block included")]
    TooSmall {
        /// What there is.
        given: u64,
        /// What would do.
        least: u64,
    },
    /// There is too much of it.
    #[error("{given} bytes are too many: {most} is the most that can be managed, descriptors included")]
    TooLarge {
        /// What there is.
        given: u64,
        /// What would do.
        most: u64,
    },
    /// The part for descriptors does not fit.
    #[error("the altmap does not fit: {0}. Make it smaller, or leave its size to the device")]
    Altmap(AltmapError),
    /// The part for descriptors is no number of whole pages.
    #[error("an altmap of {given} bytes is no number of whole pages of {page} bytes")]
    AltmapNotPages {
        /// What was asked for.
        given: u64,
        /// The size of a page.
        page: u64,
    },
    /// A file that is to be made needs a size.
    #[error("{} is not there or empty, and has no size yet: say how large it is to be", .path.display())]
    NoSize {
        /// What was to be opened.
        path: PathBuf,
    },
    /// Persistent memory needs a name.
    #[error("{} is a directory: a file in it that is to be found again needs a name", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// It is neither a file nor a device of memory.
    #[error("{} is {found}: expected a file, a directory or a node of memory such as /dev/dax0.0", .path.display())]
    NotMemory {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A device node can only be mapped in pieces larger than blocks.
    #[error(
        "{} is mapped in pieces of {align} bytes, and blocks have {block}: configure it with a smaller alignment \
         (ndctl create-namespace --align)", .path.display()
    )]
    Alignment {
        /// The node.
        path: PathBuf,
        /// Its alignment.
        align: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// It holds what would be lost.
    #[error("{} begins with {found:?}; expected an empty file, or one that begins with {expected:?}. It was not touched",
        .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
        /// What they should be.
        expected: String,
    },
    /// It holds regions with names.
    #[error("{} holds a persistent device, which would be lost: open it by Dax::persistent, or zero its first block",
        .path.display())]
    Persistent {
        /// The file.
        path: PathBuf,
    },
    /// The directory of names cannot be used.
    #[error("{}: {why}", .path.display())]
    Names {
        /// The file.
        path: PathBuf,
        /// Why.
        why: NamesError,
    },
    /// It is shorter than it should be.
    #[error("{} is cut short: found {found} bytes, expected {expected}", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// The file system is full.
    #[error("no space for the {bytes} bytes of {}", .path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes it was to have.
        bytes: u64,
    },
    /// The kernel's pool of huge pages is too small.
    #[error("{bytes} bytes of huge pages are not to be had: raise vm.nr_hugepages (each is 2 MiB)")]
    NoHugePages {
        /// Bytes asked for.
        bytes: u64,
    },
    /// Huge pages were asked for, and what has a path has the pages of its file system.
    #[error(
        "huge pages cannot be chosen for {}: its file system decides that. Leave Options::huge out; for huge pages of the \
         kernel's pool, name a path on hugetlbfs", .path.display()
    )]
    HugePath {
        /// What was to be opened.
        path: PathBuf,
    },
    /// Another process uses it, or this one does already.
    #[error("{} is in use, by another process or by another device of this one", .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
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
