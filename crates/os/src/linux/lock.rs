//! Locks on whole files that belong to an open file description: not to a process, and not to a descriptor.
//!
//! Such a lock is shared by all descriptors that were duplicated or inherited from one another, and ends when the
//! last of them is closed, by whatever death of a process. That makes it the one way to learn whether another
//! process still uses a file. Unlike `flock`, a change of such a lock either happens or leaves the old one in
//! place, and a question can be asked without changing anything.

use super::keeping_errno;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The bytes that stand for the file. The one behind them, far from any content, stands for its [reservation](reserve).
const FILE: libc::off_t = 1 << 62;

fn bytes(kind: i32, start: libc::off_t, len: libc::off_t) -> libc::flock {
    // SAFETY: a zeroed flock is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

fn whole_file(kind: i32) -> libc::flock {
    bytes(kind, 0, FILE)
}

fn command(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    keeping_errno(|| {
        // SAFETY: these commands take a pointer to a flock, which is borrowed for the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) } == 0 {
            Ok(())
        } else {
            // SAFETY: the address of this thread's errno, just set.
            Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
        }
    })
}

/// Locks the file so that others can lock it in the same way, but not exclusively. Replaces a lock held through
/// the same description. Does not wait. The file is open for reading.
///
/// # Errors
/// EAGAIN or EACCES when another description holds it exclusively; ENOLCK, EINVAL or EOPNOTSUPP where the file
/// system does not lock.
pub fn share(file: BorrowedFd<'_>) -> Result<(), Errno> {
    command(file, libc::F_OFD_SETLK, &mut whole_file(libc::F_RDLCK))
}

/// Locks the file against all others. Replaces a lock held through the same description; if it fails, that one
/// stays. Does not wait. The file is open for writing.
///
/// # Errors
/// As for [`share`], when another description holds any lock.
pub fn exclude(file: BorrowedFd<'_>) -> Result<(), Errno> {
    command(file, libc::F_OFD_SETLK, &mut whole_file(libc::F_WRLCK))
}

/// Locks the right to use the file at all against all others, whatever becomes of the file. Does not wait. The file is
/// open for writing.
///
/// # Errors
/// As for [`exclude`], when another description holds this lock.
pub fn reserve(file: BorrowedFd<'_>) -> Result<(), Errno> {
    command(file, libc::F_OFD_SETLK, &mut bytes(libc::F_WRLCK, FILE, 1))
}

/// Whether another description holds a lock on the file. Changes nothing.
///
/// # Errors
/// Where the file system does not lock.
pub fn is_shared(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut lock = whole_file(libc::F_WRLCK);
    command(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
    use std::os::fd::{AsFd, OwnedFd};

    /// Another description of the same file.
    fn again(file: &OwnedFd) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn a_lock_belongs_to_the_description() {
        let a = memfd_create(c"lock", MemfdFlags::CLOEXEC).unwrap();
        let b = again(&a);
        assert!(!is_shared(a.as_fd()).unwrap());
        exclude(a.as_fd()).unwrap();
        assert!(is_shared(b.as_fd()).unwrap());
        assert!(!is_shared(a.as_fd()).unwrap());
        assert!(matches!(exclude(b.as_fd()), Err(Errno::AGAIN | Errno::ACCESS)));
        assert!(share(b.as_fd()).is_err());
        share(a.as_fd()).unwrap();
        share(b.as_fd()).unwrap();
        // A refused upgrade leaves the lock as it was.
        assert!(exclude(b.as_fd()).is_err());
        assert!(exclude(a.as_fd()).is_err());
        assert!(is_shared(a.as_fd()).unwrap() && is_shared(b.as_fd()).unwrap());
        // A duplicate is the same description: closing it releases nothing.
        drop(b.try_clone().unwrap());
        assert!(is_shared(a.as_fd()).unwrap());
        drop(b);
        assert!(!is_shared(a.as_fd()).unwrap());
        exclude(a.as_fd()).unwrap();
    }

    #[test]
    fn a_reservation_is_apart_from_the_file() {
        let a = memfd_create(c"lock", MemfdFlags::CLOEXEC).unwrap();
        let b = again(&a);
        reserve(a.as_fd()).unwrap();
        assert!(reserve(b.as_fd()).is_err());
        assert!(!is_shared(b.as_fd()).unwrap());
        exclude(b.as_fd()).unwrap();
        drop(a);
        reserve(b.as_fd()).unwrap();
    }
}
