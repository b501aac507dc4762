//! Locks on whole files that belong to an open file description: not to a process, and not to a descriptor.
//!
//! Such a lock is shared by all descriptors that were duplicated or inherited from one another, and ends when the
//! last of them is closed, by whatever death of a process. That makes it the one way to learn whether another
//! process still uses a file. Unlike `flock`, a change of such a lock either happens or leaves the old one in
//! place, and a question can be asked without changing anything. A file can be kept by one for a process that has yet to
//! open it ([`Reserved`]).

use super::interpose::errno;
use super::keeping_errno;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lock that another process holds is asked for.
pub const PATIENCE: Duration = Duration::from_millis(250);

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
            Err(Errno::from_raw_os_error(errno()))
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
/// stays. The file is open for writing. Waits up to [`PATIENCE`] for another process to be gone.
///
/// # Errors
/// As for [`share`], when another description holds any lock.
pub fn exclude(file: BorrowedFd<'_>) -> Result<(), Errno> {
    soon(|| command(file, libc::F_OFD_SETLK, &mut whole_file(libc::F_WRLCK)))
}

/// Locks the right to use the file at all against all others, whatever becomes of the file. The file is open for writing.
/// Waits up to [`PATIENCE`] for another process to be gone.
///
/// # Errors
/// As for [`exclude`], when another description holds this lock.
pub fn reserve(file: BorrowedFd<'_>) -> Result<(), Errno> {
    soon(|| command(file, libc::F_OFD_SETLK, &mut bytes(libc::F_WRLCK, FILE, 1)))
}

/// Asks again for a while. The requests that a process had in its io_uring keep its files open until the kernel has got
/// round to them, which can be after the process was waited for.
fn soon(lock: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    let begin = Instant::now();
    loop {
        match lock() {
            Err(Errno::AGAIN | Errno::ACCESS) if begin.elapsed() < PATIENCE => std::thread::sleep(PATIENCE / 50),
            answer => return answer,
        }
    }
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

/// A file that is [reserved](reserve) while this lives, for a process that is to open it. One that was made for it and came to
/// no use is removed at the end.
#[derive(Debug)]
pub struct Reserved {
    path: PathBuf,
    file: OwnedFd,
    fresh: bool,
}

impl Reserved {
    /// Reserves the file at `path`, which was opened on trial and closed again. `fresh`: it was made for that, and is emptied.
    /// `locked` says what the answer of [`reserve`] means, and `refused` what it means that the system did not do something
    /// else.
    ///
    /// # Errors
    /// What `locked` or `refused` says.
    pub fn new<E>(
        path: &Path,
        fresh: bool,
        locked: impl FnOnce(Result<(), Errno>) -> Result<(), E>,
        refused: impl Fn(&'static str, Errno) -> E,
    ) -> Result<Reserved, E> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| refused("open", e))?;
        locked(reserve(file.as_fd()))?;
        // On trial it was given its length.
        let emptied = if fresh { rustix::fs::ftruncate(&file, 0) } else { Ok(()) };
        let reserved = Reserved { path: path.to_path_buf(), file, fresh };
        emptied.map_err(|e| refused("empty", e))?;
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let unused = || rustix::fs::fstat(&self.file).is_ok_and(|s| s.st_size == 0);
        // Whoever still has it open is one that was started here and lives on.
        if self.fresh && unused() && is_shared(self.file.as_fd()) == Ok(false) {
            // Nothing can be done if it cannot be removed.
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create, open};

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
    fn a_lock_that_is_about_to_go_is_waited_for() {
        let a = memfd_create(c"lock", MemfdFlags::CLOEXEC).unwrap();
        let b = again(&a);
        exclude(a.as_fd()).unwrap();
        let begin = Instant::now();
        assert!(exclude(b.as_fd()).is_err());
        assert!(begin.elapsed() >= PATIENCE);
        let closer = std::thread::spawn(move || {
            std::thread::sleep(PATIENCE / 10);
            drop(a);
        });
        exclude(b.as_fd()).unwrap();
        closer.join().unwrap();
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

    #[test]
    fn a_file_that_is_kept_is_removed_if_it_came_to_no_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept");
        let keep = |fresh| Reserved::new(&path, fresh, |lock| lock, |_, e| e);
        let use_it = || open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        std::fs::write(&path, "on trial").unwrap();
        let kept = keep(true).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        assert!(matches!(keep(false), Err(Errno::AGAIN | Errno::ACCESS)), "it is kept for one");
        drop(kept);
        assert!(!path.exists());
        // Somebody has it open, though it is empty; somebody has written; it was there before.
        let kept = keep(true).unwrap();
        let user = use_it();
        exclude(user.as_fd()).unwrap();
        drop(kept);
        assert!(path.exists());
        drop(user);
        let kept = keep(true).unwrap();
        std::fs::write(&path, "used").unwrap();
        drop(kept);
        assert!(path.exists());
        drop(keep(false).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"used");
    }

    #[test]
    fn a_file_that_cannot_be_kept_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept");
        let other = |path| Reserved::new(path, true, |lock| lock.map_err(|e| ("lock", e)), |what, e| (what, e));
        let kept = other(&path).unwrap();
        std::fs::write(&path, "another's").unwrap();
        assert!(matches!(other(&path), Err(("lock", _))));
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");
        drop(kept);
        assert_eq!(other(&dir.path().join("none/kept")).unwrap_err(), ("open", Errno::NOENT));
    }
}
