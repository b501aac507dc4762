//! `file`: pages in a file on disk.
//!
//! A page of the device has a fixed place in the file, which is sparse: only pages that are stored take up space.
//! The file is unlinked from the start, or is a named one that nobody else uses; either way nothing of it means
//! anything to another process.
//!
//! # What can be relied on
//!
//! - Every page that comes back is compared with a checksum kept in RAM. What the disk or anybody else made of it in
//!   the meantime is an error, never data (rule Z9), for exactly the transfers it is about (G16).
//! - A full disk is an error of the transfer that found no room. The space of freed pages (rule Z6) is returned to
//!   the file system, not one by one but as soon as there is enough of it to pay; see [`File::trim`].
//! - After a fork parent and child keep everything that was stored, and go on independently (rule G12).
//!
//! # How it is made
//!
//! | file | subject |
//! |---|---|
//! | `open` `layout` `error` | which file, how it is divided, why not |
//! | `record` | a word for each page: where it is, what it adds up to |
//! | `disk` `transfer` | stores and loads |
//! | `raw` | the calls that reach the file |
//! | `collect` | returning space |
//! | `files` `fork` | sharing with other processes |
//!
//! The locking protocol is told where the locks are: `disk` has their order.
//!
//! On the path of a store, a load or a free nothing is allocated, from whatever heap, and no thread-local storage is
//! used: what those need is made beforehand or lies on the stack.

mod collect;
mod disk;
mod error;
mod files;
mod fork;
mod layout;
mod open;
mod raw;
mod record;
mod reservation;
#[cfg(test)]
mod tests;
mod transfer;

pub use error::FileError;
pub use reservation::Reservation;

use super::{Descriptor, Device, DevicePages, ForkSide, Load, Store, Usage};
use disk::Disk;
use open::Claim;
use peerspace_os::own::{Own, Vec as OwnVec};
use raw::System;
use std::fmt;
use std::path::Path;

/// A file, or the files it becomes when the process forks. See the [module](self).
pub struct File {
    disk: Disk<System>,
    /// In memory of our own, like everything else that lasts.
    path: OwnVec<u8>,
    diagnostics: Diagnostics,
}

/// How well a [`File`] works where it is: what the kernel and the file system allow. Each is true, or an errno says
/// why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Diagnostics {
    /// Transfers go past the page cache (O_DIRECT). Otherwise stored pages take up the kernel's RAM as well, until
    /// it writes them out and drops them.
    pub direct: Result<(), i32>,
    /// How batches are moved.
    pub batches: Batches,
    /// Space of freed pages is returned to the file system. Otherwise it is only used again.
    pub returns_space: Result<(), i32>,
    /// Further files can be made in the directory. Otherwise nothing new can be stored after a fork while the other
    /// process lives.
    pub forks: Result<(), i32>,
}

/// How a batch of several requests is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Batches {
    /// All of it is in flight at once (io_uring).
    Together,
    /// One request after the other, because the file answers so fast that this is faster.
    OneByOne,
    /// One request after the other, because io_uring cannot be had; the errno says why.
    WithoutRing(i32),
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut say = |state: Result<(), i32>, yes: &str, no: &str| match state {
            Ok(()) => write!(f, "{yes}"),
            Err(errno) => write!(f, "{no} ({})", std::io::Error::from_raw_os_error(errno)),
        };
        say(self.direct, "direct transfers", "transfers through the page cache")?;
        match self.batches {
            Batches::Together => say(Ok(()), ", batches by io_uring", "")?,
            Batches::OneByOne => say(Ok(()), ", batches one by one, as in memory", "")?,
            Batches::WithoutRing(errno) => say(Err(errno), "", ", no io_uring")?,
        }
        say(self.returns_space, ", returns space", ", reuses space without returning it")?;
        say(self.forks, ", stores after a fork", ", no stores after a fork")
    }
}

impl File {
    /// Opens a device in `path`.
    ///
    /// A directory: in an unlinked file there, which ends with the process. A file, existing or not: in that one,
    /// which must be empty or left behind by a process that did the same; it stays behind again, recognisable. No
    /// other process can use it meanwhile.
    ///
    /// `size` bounds the file, in bytes. Without it, it may grow to what the file system has free now, less a
    /// sixteenth or 1 GiB. Either way a full disk shows only when it is met. (After a fork, and as long as the other
    /// process lives, what each of them stores anew is in a file of its own, with the same bound.)
    ///
    /// # Errors
    /// See [`FileError`]; nothing was changed then.
    pub fn open(path: impl AsRef<Path>, size: Option<u64>) -> Result<File, FileError> {
        File::open_by(path.as_ref(), size, Claim::Unreserved)
    }

    /// Opens a device in `path`, which a [`Reservation`] keeps for this process.
    ///
    /// # Errors
    /// See [`FileError`]; nothing was changed then.
    pub fn open_reserved(path: impl AsRef<Path>, size: Option<u64>) -> Result<File, FileError> {
        File::open_by(path.as_ref(), size, Claim::Reserved)
    }

    fn open_by(path: &Path, size: Option<u64>, claim: Claim) -> Result<File, FileError> {
        let opened = open::open(path, size, claim)?;
        let (system, batches) = match opened.quick {
            true => (System::plain(), Batches::OneByOne),
            false => match System::with_rings() {
                Ok(system) => (system, Batches::Together),
                Err(e) => (System::plain(), Batches::WithoutRing(e.raw_os_error())),
            },
        };
        let errno = |r: Result<(), rustix::io::Errno>| r.map_err(|e| e.raw_os_error());
        let diagnostics = Diagnostics {
            direct: errno(opened.direct),
            batches,
            returns_space: errno(opened.punch),
            forks: errno(opened.more),
        };
        let bytes = opened.layout.bytes();
        let disk = Disk::new(opened, system).map_err(|_| FileError::Memory { bytes })?;
        let mut name = OwnVec::new_in(Own);
        name.extend_from_slice(path.as_os_str().as_encoded_bytes());
        Ok(File { disk, path: name, diagnostics })
    }

    /// How well it works here.
    pub fn diagnostics(&self) -> Diagnostics {
        self.diagnostics
    }

    /// Returns all the space of freed pages to the file system, and of files that were shared with processes that
    /// are gone. Takes as long as that takes: for moments when nothing else is to be done. Without it there may
    /// remain up to 16 MiB and an eighth of what is held.
    pub fn trim(&self) {
        self.disk.trim();
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("path", &String::from_utf8_lossy(&self.path))
            .field("bytes", &self.disk.layout.bytes())
            .field("diagnostics", &self.diagnostics)
            .finish_non_exhaustive()
    }
}

impl Device for File {
    fn describe(&self) -> Descriptor {
        let name = format!("file:{}", String::from_utf8_lossy(&self.path));
        Descriptor::private(name, self.disk.layout.pages).capacity_bytes(self.disk.layout.bytes()).slow()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.disk.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.disk.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.disk.free(pages);
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.disk.usage())
    }

    fn before_fork(&self) {
        self.disk.before_fork();
    }

    fn after_fork(&self, side: ForkSide) {
        self.disk.after_fork(side);
    }
}
