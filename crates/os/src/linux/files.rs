//! File descriptors of our own, told apart from the program's.
//!
//! A program may close descriptors it never opened (`closefrom`, `close_range`); losing a userfaultfd that way would
//! turn every missing page into zeros. Each descriptor of ours is therefore entered here ([`OurFd`]), so that
//! interposed calls can spare it, and so that a thread with a descriptor table of its own ([`isolate`]) keeps ours
//! and drops everybody else's.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use rustix::io::Errno;
use std::sync::atomic::{AtomicI32, Ordering};

const MOST: usize = 256;
/// Numbers of our descriptors; -1 is a free place.
static OURS: [AtomicI32; MOST] = [const { AtomicI32::new(-1) }; MOST];
/// The thread in whose table our descriptors are, when they are not in the program's; 0 otherwise.
static HOME: AtomicI32 = AtomicI32::new(0);

/// A descriptor that is ours. Closes it when dropped.
#[derive(Debug)]
pub struct OurFd(OwnedFd);

impl OurFd {
    /// Enters a descriptor as ours.
    ///
    /// # Panics
    /// When there are more of them than anything here should ever open.
    pub fn new(fd: OwnedFd) -> OurFd {
        let free =
            OURS.iter().any(|o| o.compare_exchange(-1, fd.as_raw_fd(), Ordering::Relaxed, Ordering::Relaxed).is_ok());
        assert!(free, "more than {MOST} descriptors of our own");
        OurFd(fd)
    }

    /// Puts what `with` refers to in the place of this descriptor, under the same number.
    ///
    /// # Errors
    /// The errno of dup3.
    pub fn replace(&self, with: OwnedFd) -> Result<(), Errno> {
        if with.as_raw_fd() == self.0.as_raw_fd() {
            // In a table where the number was free: it is in place already.
            std::mem::forget(with);
            return Ok(());
        }
        // SAFETY: the number is ours and open; whoever uses it means whatever is behind it now. `with` is another
        // descriptor, so dup3 does not fail for equality.
        let r = unsafe { libc::syscall(libc::SYS_dup3, with.as_raw_fd(), self.0.as_raw_fd(), libc::O_CLOEXEC) };
        if r < 0 { Err(Errno::BADF) } else { Ok(()) }
    }
}

impl AsFd for OurFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for OurFd {
    fn drop(&mut self) {
        let fd = self.0.as_raw_fd();
        // The entry goes first: the number may be anybody's as soon as it is closed.
        OURS.iter().any(|o| o.compare_exchange(fd, -1, Ordering::Relaxed, Ordering::Relaxed).is_ok());
    }
}

/// Whether descriptor `fd` is ours.
pub fn is_ours(fd: RawFd) -> bool {
    fd >= 0 && OURS.iter().any(|o| o.load(Ordering::Relaxed) == fd)
}

/// Our descriptors.
pub fn ours() -> impl Iterator<Item = RawFd> {
    OURS.iter().map(|o| o.load(Ordering::Relaxed)).filter(|fd| *fd >= 0)
}

/// The `/proc` path by which a thread of this process can open what `fd`, a descriptor of ours, refers to.
pub fn path(fd: BorrowedFd<'_>) -> std::ffi::CString {
    let home = HOME.load(Ordering::Relaxed);
    let path = match home {
        0 => format!("/proc/self/fd/{}", fd.as_raw_fd()),
        tid => format!("/proc/self/task/{tid}/fd/{}", fd.as_raw_fd()),
    };
    std::ffi::CString::new(path).expect("the path has no zero byte")
}

/// Whether our descriptors are in a table of their own, which the program's threads do not share.
pub fn is_isolated() -> bool {
    HOME.load(Ordering::Relaxed) != 0
}

/// Declares the descriptor table of the calling thread, which it shares with no thread of the program, to be the
/// home of our descriptors, and closes everybody else's in it but standard error.
///
/// A copy of the program's descriptors left open here would keep its pipes from ever ending.
///
/// # Errors
/// When the table cannot be cleared; then nothing may rely on it.
pub fn isolate() -> Result<(), Errno> {
    HOME.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    let mut keep = [0; MOST + 1];
    let mut n = 0;
    for fd in ours().chain([2]) {
        keep[n] = fd;
        n += 1;
    }
    keep[..n].sort_unstable();
    let mut from = 0u32;
    for fd in &keep[..n] {
        let fd = *fd as u32;
        if fd > from {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX)
}

/// Declares our descriptors to be in the program's table (again): in a forked child, which has only that.
pub fn at_home() {
    HOME.store(0, Ordering::Relaxed);
}

fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: closes descriptors of the calling thread's own table, which nobody else uses.
    let r = unsafe { raw_close_range(first, last) };
    if r == 0 {
        return Ok(());
    }
    // Before Linux 5.9: one by one, as far as numbers go.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 16);
    for fd in first..=last.min(limit.min(1 << 20) as u32) {
        // SAFETY: as above.
        unsafe { rustix::io::close(fd as i32) };
    }
    Ok(())
}

/// The system call, past any interposed function of that name.
///
/// # Safety
/// The descriptors are the caller's to close.
unsafe fn raw_close_range(first: u32, last: u32) -> libc::c_long {
    // SAFETY: by contract.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_told_apart() {
        let fd = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let n = fd.as_raw_fd();
        assert!(!is_ours(n));
        let ours_ = OurFd::new(fd);
        assert!(is_ours(n) && ours().any(|o| o == n) && !is_ours(-1));
        let other = rustix::fs::open("/dev/zero", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        ours_.replace(other).unwrap();
        let mut byte = [1u8];
        assert_eq!(rustix::io::read(&ours_, &mut byte), Ok(1));
        assert_eq!(byte, [0]);
        drop(ours_);
        assert!(!is_ours(n));
    }
}
