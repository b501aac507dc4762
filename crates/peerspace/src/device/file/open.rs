//! Opening: which file, whether it may be used, how large it may become, and what can be done with it.
//!
//! Everything is found out before anything is changed. A file that was made here is removed again when a later
//! step fails; a file of ours that was found is emptied only when nothing but the disk can fail any more.
//!
//! Locks: a named file is locked exclusively from before its content is looked at until the last process that uses
//! it closes it. So a file that looks left behind really is. A second lock is its [reservation](super::reservation).

use super::error::{FileError, refused};
use super::layout::{HEADER, Layout, expected, header, least_bytes, recognise};
use crate::device::ForkSide;
use crate::sync::Mutex;
use peerspace_os::linux::files::{self, ForChild, OurFd};
use peerspace_os::linux::lock;
use peerspace_os::own::Buffer;
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the file system keeps when nobody says how much of it to use: one part in this many, at most so many bytes.
const MARGIN_PART: u64 = 16;
const MARGIN_MOST: u64 = 1 << 30;
/// No disk reads a page in less.
const QUICK: Duration = Duration::from_micros(4);
/// How directories are opened.
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The largest file any kernel makes, in whole pages of any size.
const MOST_BYTES: u64 = (i64::MAX as u64) & !0xffff;

/// A file to use, and what was found out about it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: OurFd,
    /// It has a name, and is locked.
    pub(super) named: bool,
    pub(super) site: Site,
    pub(super) layout: Layout,
    /// Whether transfers go past the kernel's page cache.
    pub(super) direct: Result<(), Errno>,
    /// It answers so fast that it must be memory: then a call for each transfer is faster than many in flight.
    pub(super) quick: bool,
    /// Whether the space of single pages can be returned.
    pub(super) punch: Result<(), Errno>,
    /// Whether more files can be made, as a fork needs them.
    pub(super) more: Result<(), Errno>,
}

/// Where more files like the first can be made.
#[derive(Debug)]
pub(super) struct Site {
    directory: OurFd,
    direct: bool,
    bytes: u64,
    /// Around a fork: the directory, for the child.
    for_child: Mutex<Option<ForChild>>,
}

impl Site {
    fn new(directory: OwnedFd, direct: bool, bytes: u64) -> Result<Site, Errno> {
        Ok(Site { directory: OurFd::new(directory)?, direct, bytes, for_child: Mutex::default() })
    }

    fn flags(&self) -> OFlags {
        let direct = if self.direct { OFlags::DIRECT } else { OFlags::empty() };
        OFlags::RDWR | OFlags::CLOEXEC | direct
    }

    /// Another file, without a name and of full length. By system calls alone.
    pub(super) fn another(&self) -> Result<OurFd, Errno> {
        let file = files::unnamed(self.directory.as_fd(), self.flags())?;
        rustix::fs::ftruncate(&file, self.bytes)?;
        OurFd::new(file)
    }

    /// The same file once more, as an open file of its own, for a child that is about to be forked.
    pub(super) fn again(&self, file: BorrowedFd<'_>) -> Result<ForChild, Errno> {
        let file = rustix::fs::open(files::path(file).as_c_str(), self.flags(), Mode::empty())?;
        ForChild::new(file, self.flags())
    }

    pub(super) fn before_fork(&self) {
        let directory = rustix::io::fcntl_dupfd_cloexec(&self.directory, 0);
        *self.for_child.lock() = directory.and_then(|d| ForChild::new(d, DIRECTORY)).ok();
    }

    pub(super) fn after_fork(&self, side: ForkSide) {
        let Some(directory) = self.for_child.lock().take() else { return };
        if side == ForkSide::Child {
            // Without it no more files can be made; a store that needs one says so.
            let _ = directory.arrive().and_then(|d| self.directory.replace(d));
        }
    }
}

/// A file made under a name, to be removed again unless all goes well.
struct Fresh<'a> {
    path: &'a Path,
    keep: bool,
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing can be done if it cannot be removed.
            let _ = rustix::fs::unlink(self.path);
        }
    }
}

/// By what right a named file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// None yet: nobody else may have reserved it.
    Unreserved,
    /// It is reserved for this process.
    Reserved,
}

/// Opens `path` as [`File::open`](super::File::open) says.
pub(super) fn open(path: &Path, size: Option<u64>, claim: Claim) -> Result<Opened, FileError> {
    if let Some(given) = size.filter(|s| *s < least_bytes()) {
        return Err(FileError::TooSmall { given, least: least_bytes() });
    }
    // Twice: a file may come or go in between.
    for _ in 0..2 {
        match rustix::fs::stat(path) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => return in_directory(path, size),
                FileType::RegularFile => match existing(path, size, claim) {
                    Err(FileError::System { errno, .. }) if errno == Errno::NOENT.raw_os_error() => continue,
                    other => return other,
                },
                kind => return Err(FileError::NotRegular { path: path.to_path_buf(), found: word_for(kind) }),
            },
            Err(Errno::NOENT) => {
                let wants_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/");
                if wants_directory || path.file_name().is_none() {
                    return Err(FileError::MissingDirectory { path: path.to_path_buf() });
                }
                match new(path, size, claim) {
                    Err(FileError::System { errno, .. }) if errno == Errno::EXIST.raw_os_error() => continue,
                    other => return other,
                }
            }
            Err(Errno::NOTDIR) => return Err(FileError::MissingDirectory { path: parent(path) }),
            Err(e) => return Err(refused("look at", path, e)),
        }
    }
    Err(refused("open", path, Errno::NOENT))
}

fn word_for(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "something else",
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, FileError> {
    rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR => FileError::MissingDirectory { path: path.to_path_buf() },
        e => refused("open", path, e),
    })
}

fn in_directory(path: &Path, size: Option<u64>) -> Result<Opened, FileError> {
    let directory = open_directory(path)?;
    let bytes = bytes_for(path, size, 0)?;
    let file = files::unnamed(directory.as_fd(), OFlags::RDWR | OFlags::CLOEXEC)
        .map_err(|e| refused("make a file in", path, e))?;
    prepare(path, file, directory, bytes, size.is_none(), false)
}

fn existing(path: &Path, size: Option<u64>, claim: Claim) -> Result<Opened, FileError> {
    let directory = open_directory(&parent(path))?;
    // Without waiting, in case it has become something one waits for.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| refused("open", path, e))?;
    let look = || rustix::fs::fstat(&file).map_err(|e| refused("look at", path, e));
    let kind = FileType::from_raw_mode(look()?.st_mode);
    if kind != FileType::RegularFile {
        return Err(FileError::NotRegular { path: path.to_path_buf(), found: word_for(kind) });
    }
    seize(path, &file, claim)?;
    // Nobody of ours changes it from here on.
    let stat = look()?;
    let len = stat.st_size as u64;
    if len > 0 {
        let mut start = [0; HEADER];
        let n = read_start(&file, &mut start).map_err(|e| refused("read", path, e))?;
        recognise(&start[..n], len).map_err(|found| FileError::Foreign {
            path: path.to_path_buf(),
            found,
            expected: expected(),
        })?;
    }
    let bytes = bytes_for(path, size, stat.st_blocks as u64 * 512)?;
    prepare(path, file, directory, bytes, size.is_none(), true)
}

fn new(path: &Path, size: Option<u64>, claim: Claim) -> Result<Opened, FileError> {
    let directory = open_directory(&parent(path))?;
    let bytes = bytes_for(&parent(path), size, 0)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
    let file = rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR => FileError::MissingDirectory { path: parent(path) },
        e => refused("make", path, e),
    })?;
    // Another process may have found it, empty, before it was locked: then it is that one's.
    seize(path, &file, claim)?;
    let mut fresh = Fresh { path, keep: false };
    let opened = prepare(path, file, directory, bytes, size.is_none(), true)?;
    fresh.keep = true;
    Ok(opened)
}

/// Locks a named file for this process.
fn seize(path: &Path, file: &OwnedFd, claim: Claim) -> Result<(), FileError> {
    if claim == Claim::Unreserved {
        claimed(path, lock::reserve(file.as_fd()))?;
    }
    claimed(path, lock::exclude(file.as_fd()))
}

/// What a lock on a named file says.
pub(super) fn claimed(path: &Path, lock: Result<(), Errno>) -> Result<(), FileError> {
    lock.map_err(|e| match e {
        Errno::AGAIN | Errno::ACCESS => FileError::InUse { path: path.to_path_buf() },
        e => refused("lock", path, e),
    })
}

fn read_start(file: &OwnedFd, start: &mut [u8]) -> Result<usize, Errno> {
    let mut n = 0;
    while n < start.len() {
        match rustix::io::pread(file, &mut start[n..], n as u64) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

/// How large the file may become. `reused` bytes it takes up already.
fn bytes_for(path: &Path, size: Option<u64>, reused: u64) -> Result<u64, FileError> {
    let least = least_bytes();
    // Writing beyond that would not only fail, but raise a signal.
    let limit = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
    match size {
        Some(given) if given > MOST_BYTES => Err(FileError::TooLarge { given, why: "offsets in files have 63 bits" }),
        Some(given) if given > limit => {
            Err(FileError::TooLarge { given, why: "this process may not write files of that size (ulimit -f)" })
        }
        Some(given) => Ok(given),
        None => {
            let fs = rustix::fs::statvfs(path).map_err(|e| refused("look at", path, e))?;
            let free = fs.f_bavail.saturating_mul(fs.f_frsize).saturating_add(reused);
            let available = free - (free / MARGIN_PART).min(MARGIN_MOST);
            if available < least {
                return Err(FileError::NoSpace { path: path.to_path_buf(), available, least });
            }
            Ok(available.min(limit).min(MOST_BYTES).max(least))
        }
    }
}

/// Makes a file ready: gives it its length, empties it, writes its header, and finds out what works with it.
/// `shrink`: a smaller file does as well.
fn prepare(
    path: &Path,
    file: OwnedFd,
    directory: OwnedFd,
    mut bytes: u64,
    shrink: bool,
    named: bool,
) -> Result<Opened, FileError> {
    let layout = loop {
        let layout = Layout::within(bytes);
        match rustix::fs::ftruncate(&file, layout.bytes()) {
            Ok(()) => break layout,
            Err(Errno::FBIG) if shrink && bytes / 2 > least_bytes() => bytes /= 2,
            Err(Errno::FBIG) => {
                return Err(FileError::TooLarge { given: bytes, why: "the file system has no files of that size" });
            }
            Err(e) => return Err(refused("give its length to", path, e)),
        }
    };
    if named {
        // Ours from another life: none of its pages mean anything.
        let emptied = rustix::fs::ftruncate(&file, 0).and_then(|()| rustix::fs::ftruncate(&file, layout.bytes()));
        emptied.map_err(|e| refused("empty", path, e))?;
    }
    let no_memory = |_| FileError::Memory { bytes: layout.bytes() };
    let mut page = Buffer::new(layout.page()).map_err(no_memory)?;
    let mut back = Buffer::new(layout.page()).map_err(no_memory)?;
    page[..HEADER].copy_from_slice(&header(layout));
    let set = |direct| {
        let flags = OFlags::RDWR | if direct { OFlags::DIRECT } else { OFlags::empty() };
        rustix::fs::fcntl_setfl(&file, flags)
    };
    // Some file systems take the flag and refuse the transfers, so only one that was made counts.
    let direct = set(true).and_then(|()| write_and_read(&file, &page, &mut back));
    if direct.is_err() {
        set(false).and_then(|()| write_and_read(&file, &page, &mut back)).map_err(|e| refused("write", path, e))?;
    }
    let quick = direct.is_ok() && (0..5).any(|_| reads_quickly(&file, &mut back));
    let holes = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punch = rustix::fs::fallocate(&file, holes, layout.offset(0), layout.len(1));
    let ours = |e| refused("keep open", path, e);
    let site = Site::new(directory, direct.is_ok(), layout.bytes()).map_err(ours)?;
    let file = OurFd::new(file).map_err(ours)?;
    // A directory has just shown that files can be made in it.
    let more = if named { site.another().map(drop) } else { Ok(()) };
    Ok(Opened { file, named, site, layout, direct, quick, punch, more })
}

/// Writes `page` to the start of the file, and reads it back.
fn write_and_read(file: &OwnedFd, page: &[u8], back: &mut [u8]) -> Result<(), Errno> {
    let whole = |n: usize| if n == page.len() { Ok(()) } else { Err(Errno::IO) };
    back.fill(0);
    whole(rustix::io::retry_on_intr(|| rustix::io::pwrite(file, page, 0))?)?;
    whole(rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *back, 0))?)?;
    if back == page { Ok(()) } else { Err(Errno::IO) }
}

fn reads_quickly(file: &OwnedFd, page: &mut [u8]) -> bool {
    let start = Instant::now();
    let n = rustix::io::pread(file, &mut *page, 0);
    n == Ok(page.len()) && start.elapsed() < QUICK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_opened_again_has_its_own_locks() {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new(open_directory(dir.path()).unwrap(), false, 1 << 20).unwrap();
        let file = site.another().unwrap();
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 1 << 20);
        let again = site.again(file.as_fd()).unwrap().arrive().unwrap();
        assert_eq!(lock::is_shared(file.as_fd()), Ok(true));
        assert_eq!(lock::is_shared(again.as_fd()), Ok(false));
    }
}
