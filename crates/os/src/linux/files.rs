//! File descriptors of our own, told apart from the program's.
//!
//! A program may close descriptors it never opened (`closefrom`, `close_range`); losing a userfaultfd that way would
//! turn every missing page into zeros. Each descriptor of ours is therefore entered here ([`OurFd`]), so that
//! interposed calls can spare it, and so that a thread with a descriptor table of its own ([`isolate`]) keeps ours
//! and drops everybody else's. Files that nobody else can find are made here too ([`unnamed`]).

use super::lock;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fmt::Write;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

const MOST: usize = 1024;
/// Numbers of our descriptors; -1 is a free place.
static OURS: [AtomicI32; MOST] = [const { AtomicI32::new(-1) }; MOST];
/// The thread in whose table our descriptors are, when they are not in the program's; 0 otherwise.
static HOME: AtomicI32 = AtomicI32::new(0);

/// The entry of a number among [`OURS`], as long as it lives.
#[derive(Debug)]
pub(crate) struct Entry(RawFd);

impl Entry {
    pub(crate) fn new(fd: RawFd) -> Result<Entry, Errno> {
        let take = |o: &AtomicI32| o.compare_exchange(-1, fd, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if OURS.iter().any(take) { Ok(Entry(fd)) } else { Err(Errno::MFILE) }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let leave = |o: &AtomicI32| o.compare_exchange(self.0, -1, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        OURS.iter().any(leave);
    }
}

/// A descriptor that is ours. Closes it when dropped.
#[derive(Debug)]
pub struct OurFd {
    // Goes first: the number may be anybody's as soon as it is closed.
    _entry: Entry,
    fd: OwnedFd,
}

impl OurFd {
    /// Enters a descriptor as ours.
    ///
    /// # Errors
    /// EMFILE when there are more of ours than can be told apart.
    pub fn new(fd: OwnedFd) -> Result<OurFd, Errno> {
        Ok(OurFd { _entry: Entry::new(fd.as_raw_fd())?, fd })
    }

    /// Puts what `with` refers to in the place of this descriptor, under the same number.
    ///
    /// # Errors
    /// The errno of dup3.
    pub fn replace(&self, with: OwnedFd) -> Result<(), Errno> {
        if with.as_raw_fd() == self.fd.as_raw_fd() {
            // In a table where the number was free: it is in place already.
            std::mem::forget(with);
            return Ok(());
        }
        // SAFETY: the number is ours and open; whoever uses it means whatever is behind it now. `with` is another
        // descriptor, so dup3 does not fail for equality.
        let r = unsafe { libc::syscall(libc::SYS_dup3, with.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
        if r < 0 { Err(Errno::BADF) } else { Ok(()) }
    }
}

impl AsFd for OurFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a forked child is to have of ours, kept for it by number.
///
/// Where our descriptors are in the program's table, the child has them all. Where they are not, it has a copy of the
/// program's table alone: so the thread that forks puts them there for the time of the fork ([`carry_out`],
/// [`carry_back`]), and the child takes them from there.
#[derive(Debug)]
pub struct ForChild {
    fd: OurFd,
    place: Place,
}

const MOST_CARRIED: usize = 256;
static CARRIED: [Carried; MOST_CARRIED] = [const { Carried::none() }; MOST_CARRIED];

struct Carried {
    /// The number in our table; -1 is a free place.
    ours: AtomicI32,
    flags: AtomicI32,
    /// The number in the program's table, during a fork; or [`AT_HOME`], or [`MISSING`].
    theirs: AtomicI32,
}

/// What is carried is in the program's table as it is.
const AT_HOME: RawFd = -1;
/// It could not be put into the program's table.
const MISSING: RawFd = -2;

impl Carried {
    const fn none() -> Carried {
        Carried { ours: AtomicI32::new(-1), flags: AtomicI32::new(0), theirs: AtomicI32::new(AT_HOME) }
    }
}

impl ForChild {
    /// Has the next forked child get what `fd` refers to, opened with `flags`. What is opened for reading and writing
    /// carries a [shared lock](lock::share).
    ///
    /// # Errors
    /// EMFILE when there are too many; what the lock says.
    pub fn new(fd: OwnedFd, flags: OFlags) -> Result<ForChild, Errno> {
        if flags.contains(OFlags::RDWR) {
            lock::share(fd.as_fd())?;
        }
        let fd = OurFd::new(fd)?;
        let number = fd.as_fd().as_raw_fd();
        let take = |c: &Carried| c.ours.compare_exchange(-1, number, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let place = CARRIED.iter().position(take).ok_or(Errno::MFILE)?;
        CARRIED[place].flags.store(flags.bits() as i32, Ordering::Relaxed);
        CARRIED[place].theirs.store(AT_HOME, Ordering::Relaxed);
        Ok(ForChild { fd, place: Place(place) })
    }

    /// In the child: what it was given.
    ///
    /// # Errors
    /// EBADF when it could not be carried.
    pub fn arrive(self) -> Result<OwnedFd, Errno> {
        let ForChild { fd: OurFd { _entry, fd }, place } = self;
        let theirs = CARRIED[place.0].theirs.swap(AT_HOME, Ordering::Relaxed);
        if theirs == AT_HOME {
            return Ok(fd);
        }
        // The number is good in the parent's table of our own; in this one it is free, or the program's.
        std::mem::forget(fd);
        if theirs == MISSING {
            return Err(Errno::BADF);
        }
        // SAFETY: opened by `carry_out` for nobody but this, and in this process a copy of its own.
        Ok(unsafe { OwnedFd::from_raw_fd(theirs) })
    }
}

/// A place in [`CARRIED`].
#[derive(Debug)]
struct Place(usize);

impl Drop for Place {
    fn drop(&mut self) {
        CARRIED[self.0].ours.store(-1, Ordering::Relaxed);
    }
}

/// Before a fork, on the thread that forks, when everything is at rest: puts what the child is to have into the
/// program's table, where that is not ours. What cannot be had there will be missing in the child.
pub fn carry_out() {
    if !is_isolated() {
        return;
    }
    // The child puts ours under their numbers again, and must not overwrite one that it has yet to take.
    let floor = ours().max().unwrap_or(0) + 1;
    for c in &CARRIED {
        let ours = c.ours.load(Ordering::Relaxed);
        if ours >= 0 {
            let flags = OFlags::from_bits_retain(c.flags.load(Ordering::Relaxed) as u32);
            let number = open_for_child(ours, flags, floor).unwrap_or(MISSING);
            c.theirs.store(number, Ordering::Relaxed);
        }
    }
}

fn open_for_child(ours: RawFd, flags: OFlags, floor: RawFd) -> Result<RawFd, Errno> {
    use rustix::fd::IntoRawFd;
    let fd = rustix::fs::open(path_of(ours).as_c_str(), flags | OFlags::CLOEXEC, Mode::empty())?;
    let fd = rustix::io::fcntl_dupfd_cloexec(fd, floor)?;
    if flags.contains(OFlags::RDWR) {
        lock::share(fd.as_fd())?;
    }
    Ok(fd.into_raw_fd())
}

/// After the fork, in the parent, on the same thread: takes back what [`carry_out`] has put there.
pub fn carry_back() {
    for c in &CARRIED {
        let theirs = c.theirs.swap(AT_HOME, Ordering::Relaxed);
        if theirs >= 0 {
            // SAFETY: opened by `carry_out`, and used by nobody in this process.
            drop(unsafe { OwnedFd::from_raw_fd(theirs) });
        }
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

/// Closes the descriptors from `first` to `last` by `close`, which is like close_range(2), but for ours. The result is 0, or what
/// the call says that failed.
pub fn around_ours(first: u32, last: u32, mut close: impl FnMut(u32, u32) -> i32) -> i32 {
    let mut from = Some(first);
    // The next of ours each time: there are few, and nothing may be allocated in a child of vfork.
    while let Some(start) = from.filter(|start| *start <= last) {
        let next = ours().map(|fd| fd as u32).filter(|fd| (start..=last).contains(fd)).min();
        let end = next.map_or(Some(last), |fd| fd.checked_sub(1));
        if let Some(end) = end.filter(|end| *end >= start) {
            let result = close(start, end);
            if result != 0 {
                return result;
            }
        }
        from = next.and_then(|fd| fd.checked_add(1));
    }
    0
}

/// A short path that is not on the heap.
#[derive(Debug)]
pub struct ShortPath {
    bytes: [u8; 64],
    len: usize,
}

impl ShortPath {
    /// An empty one.
    pub const fn new() -> ShortPath {
        ShortPath { bytes: [0; 64], len: 0 }
    }

    /// What was written, as the kernel wants it.
    pub fn as_c_str(&self) -> &std::ffi::CStr {
        std::ffi::CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }
}

impl Default for ShortPath {
    fn default() -> ShortPath {
        ShortPath::new()
    }
}

impl Write for ShortPath {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        // The last byte stays zero.
        let to = self.bytes[..63].get_mut(self.len..self.len + s.len()).ok_or(std::fmt::Error)?;
        to.copy_from_slice(s.as_bytes());
        self.len += s.len();
        Ok(())
    }
}

fn path_of(fd: RawFd) -> ShortPath {
    let mut path = ShortPath::new();
    // Cannot fail: it is short.
    let _ = match HOME.load(Ordering::Relaxed) {
        0 => write!(path, "/proc/self/fd/{fd}"),
        tid => write!(path, "/proc/self/task/{tid}/fd/{fd}"),
    };
    path
}

/// The `/proc` path by which any thread of this process can open what `fd`, a descriptor of ours, refers to.
pub fn path(fd: BorrowedFd<'_>) -> ShortPath {
    path_of(fd.as_raw_fd())
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

/// A new file in `directory` that nobody else can find, and that ends with its last descriptor. Opened with `flags`. By
/// system calls alone.
///
/// # Errors
/// The errno of openat or unlinkat; EEXIST where all names that were tried are taken.
pub fn unnamed(directory: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::openat(directory, c".", flags | OFlags::TMPFILE, mode) {
        // The ways in which file systems and kernels say that they cannot do this.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => {}
        other => return other,
    }
    make_and_unlink(directory, flags, mode)
}

fn make_and_unlink(directory: BorrowedFd<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let pid = rustix::process::getpid().as_raw_nonzero();
    for _ in 0..1000 {
        let mut name = ShortPath::new();
        let _ = write!(name, ".peerspace-{pid}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        match rustix::fs::openat(directory, name.as_c_str(), flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => continue,
            Err(e) => return Err(e),
            Ok(file) => {
                rustix::fs::unlinkat(directory, name.as_c_str(), AtFlags::empty())?;
                return Ok(file);
            }
        }
    }
    Err(Errno::EXIST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_without_a_name_are_made_without_tmpfile_too() {
        let dir = tempfile::tempdir().unwrap();
        let directory = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        for file in [
            make_and_unlink(directory.as_fd(), flags, Mode::RUSR | Mode::WUSR).unwrap(),
            unnamed(directory.as_fd(), flags).unwrap(),
        ] {
            assert_eq!(rustix::fs::fstat(&file).unwrap().st_nlink, 0);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_child_takes_what_was_carried_to_a_table_that_is_not_ours() {
        use rustix::fs::{MemfdFlags, memfd_create};
        let file = memfd_create(c"carried", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&file, b"x", 0).unwrap();
        let (give, given) = std::sync::mpsc::channel();
        let (done, finish) = std::sync::mpsc::channel::<()>();
        // A thread with a table of its own, as the keeper is.
        let home = std::thread::spawn(move || {
            // SAFETY: gives this thread a table of its own.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
            let again = rustix::io::fcntl_dupfd_cloexec(&file, 500).unwrap();
            drop(file);
            let child = ForChild::new(again, OFlags::RDWR).unwrap();
            isolate().unwrap();
            give.send(child).unwrap();
            finish.recv().unwrap();
        });
        let child = given.recv().unwrap();
        let number = child.fd.as_fd().as_raw_fd();
        assert!(rustix::io::fcntl_getfd(&child.fd).is_err(), "the number means nothing here");
        carry_out();
        let theirs = CARRIED[child.place.0].theirs.load(Ordering::Relaxed);
        assert!(theirs > number);
        let came = child.arrive().unwrap();
        assert_eq!(came.as_raw_fd(), theirs);
        let mut byte = [0];
        assert_eq!(rustix::io::pread(&came, &mut byte, 0), Ok(1));
        assert_eq!(&byte, b"x");
        carry_back();
        assert!(rustix::io::fcntl_getfd(&came).is_ok(), "what has arrived is not taken back");
        at_home();
        done.send(()).unwrap();
        home.join().unwrap();
    }

    #[test]
    fn a_range_of_descriptors_is_closed_around_ours() {
        let null = || rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty()).unwrap();
        // Numbers that no other test uses.
        let at = |n: i32| OurFd::new(rustix::io::fcntl_dupfd_cloexec(null(), n).unwrap()).unwrap();
        let (one, two) = (at(900), at(901));
        let (a, b) = (one.fd.as_raw_fd() as u32, two.fd.as_raw_fd() as u32);
        assert_eq!(b, a + 1);
        let closed = |first, last| {
            let mut closed = Vec::new();
            let close = |first, last| {
                closed.push((first, last));
                0
            };
            assert_eq!(around_ours(first, last, close), 0);
            closed
        };
        assert_eq!(closed(a - 5, b + 5), [(a - 5, a - 1), (b + 1, b + 5)]);
        assert_eq!(closed(a, b), []);
        assert_eq!(closed(b, u32::MAX), [(b + 1, u32::MAX)]);
        assert_eq!(closed(a - 1, a), [(a - 1, a - 1)]);
        assert_eq!(around_ours(a - 5, b + 5, |_, _| -1), -1, "what fails ends it");
    }

    #[test]
    fn ours_are_told_apart() {
        let fd = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let n = fd.as_raw_fd();
        assert!(!is_ours(n));
        let ours_ = OurFd::new(fd).unwrap();
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
