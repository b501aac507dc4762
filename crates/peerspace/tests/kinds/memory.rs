//! Memory of each kind that a program can have, mapped by itself.

use super::*;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::AtomicU64;

pub(crate) const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// What is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Private,
    /// To be executed as well.
    Code,
    SharedAnonymous,
    /// Memory files, shared and private.
    Memfd,
    PrivateMemfd,
    /// Files of a file system, shared and private.
    File,
    PrivateFile,
    /// Huge pages of the kernel's pool, private and shared.
    Huge,
    SharedHuge,
}

pub(crate) use Kind::*;

/// All that stay where they are.
pub(crate) const STAYING: [Kind; 8] =
    [Code, SharedAnonymous, Memfd, PrivateMemfd, File, PrivateFile, Huge, SharedHuge];

impl Kind {
    pub(crate) fn stays(self) -> bool {
        self != Private
    }

    /// Whether the kernel tells of changes of such mappings: of files it does from Linux 6.7 on.
    pub(crate) fn is_told(self) -> bool {
        !matches!(self, File | PrivateFile) || tells_of_files()
    }

    pub(crate) fn is_shared(self) -> bool {
        matches!(self, SharedAnonymous | Memfd | File | SharedHuge)
    }

    pub(crate) fn has_file(self) -> bool {
        matches!(self, Memfd | PrivateMemfd | File | PrivateFile)
    }
}

/// A mapping of the program's own, each page of which is full of its word.
pub(crate) struct Mapped {
    pub(crate) start: *mut u8,
    pub(crate) len: usize,
    pub(crate) file: Option<File>,
}

// SAFETY: it is plain memory; the tests access it by atomics.
unsafe impl Sync for Mapped {}

pub(crate) fn tells_of_files() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(7))
}

/// A file of `len` bytes, in the memory or in the file system.
pub(crate) fn file_of(len: usize, in_memory: bool) -> File {
    let mut file = match in_memory {
        // SAFETY: a new descriptor, which is nobody else's.
        true => unsafe {
            let fd = libc::memfd_create(c"kinds".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        },
        false => tempfile::tempfile().unwrap(),
    };
    (0..len / 4096).for_each(|i| file.write_all(&word(i).to_ne_bytes().repeat(512)).unwrap());
    file
}

/// Maps memory.
pub(crate) fn map(place: *mut u8, len: usize, protection: i32, flags: i32, file: Option<&File>) -> Option<*mut u8> {
    let (fd, anonymous) = file.map_or((-1, libc::MAP_ANONYMOUS), |file| (file.as_raw_fd(), 0));
    // SAFETY: a new mapping, or one in the place of another that the test has made for this.
    let start = unsafe { libc::mmap(place.cast(), len, protection, flags | anonymous, fd, 0) };
    (start != libc::MAP_FAILED).then_some(start.cast())
}

impl Mapped {
    /// `None` where there is no memory of the kind, which is said.
    pub(crate) fn new(kind: Kind, len: usize) -> Option<Mapped> {
        Mapped::at(std::ptr::null_mut(), kind, len)
    }

    /// At `place`, in the place of what is there, if it is not null.
    pub(crate) fn at(place: *mut u8, kind: Kind, len: usize) -> Option<Mapped> {
        Mapped::with(place, kind, len, if place.is_null() { 0 } else { libc::MAP_FIXED })
    }

    /// At `place`, where nothing is; `None` if there is something.
    pub(crate) fn in_gap(place: *mut u8, kind: Kind, len: usize) -> Option<Mapped> {
        Mapped::with(place, kind, len, libc::MAP_FIXED_NOREPLACE)
    }

    fn with(place: *mut u8, kind: Kind, len: usize, how: i32) -> Option<Mapped> {
        let file = match kind {
            Memfd | PrivateMemfd => Some(file_of(len, true)),
            File | PrivateFile => Some(file_of(len, false)),
            _ => None,
        };
        let (protection, flags) = match kind {
            Private | PrivateMemfd | PrivateFile => (RW, libc::MAP_PRIVATE),
            Code => (RW | libc::PROT_EXEC, libc::MAP_PRIVATE),
            SharedAnonymous | Memfd | File => (RW, libc::MAP_SHARED),
            Huge => (RW, libc::MAP_PRIVATE | libc::MAP_HUGETLB),
            SharedHuge => (RW, libc::MAP_SHARED | libc::MAP_HUGETLB),
        };
        let Some(start) = map(place, len, protection, flags | how, file.as_ref()) else {
            println!("no {kind:?} memory here: {}", std::io::Error::last_os_error());
            return None;
        };
        let memory = Mapped { start, len, file };
        if !kind.has_file() {
            memory.fill();
        }
        Some(memory)
    }

    pub(crate) fn fill(&self) {
        (0..self.pages()).for_each(|i| (0..512).for_each(|k| self.word(i, k).store(word(i), SeqCst)));
    }

    pub(crate) fn is_filled(&self) -> bool {
        (0..self.pages()).all(|i| (0..512).all(|k| self.word(i, k).load(SeqCst) == word(i)))
    }

    pub(crate) fn pages(&self) -> usize {
        self.len / 4096
    }

    pub(crate) fn word(&self, page: usize, k: usize) -> &AtomicU64 {
        assert!(page * 4096 + k * 8 + 8 <= self.len);
        // SAFETY: it lies in the mapping, as long as the test has not unmapped it, and is aligned.
        unsafe { &*self.start.add(page * 4096 + k * 8).cast() }
    }

    pub(crate) fn va(&self, page: usize) -> u64 {
        self.start as u64 + page as u64 * PAGE
    }

    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.len
    }

    pub(crate) fn advise(&self, pages: std::ops::Range<usize>, advice: i32) -> bool {
        // SAFETY: pages of the mapping, whose content the test gives up.
        unsafe { libc::madvise(self.start.add(pages.start * 4096).cast(), pages.len() * 4096, advice) == 0 }
    }

    pub(crate) fn protect(&self, pages: std::ops::Range<usize>, permission: i32) {
        let at = self.start.wrapping_add(pages.start * 4096).cast();
        // SAFETY: the test accesses it no more where it must not.
        assert_eq!(unsafe { libc::mprotect(at, pages.len() * 4096, permission) }, 0);
    }

    pub(crate) fn unmap(&self) {
        // SAFETY: the test refers to it no more.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.len) }, 0);
    }

    pub(crate) fn truncate(&self, len: usize) {
        self.file.as_ref().unwrap().set_len(len as u64).unwrap();
    }

    /// The first word of a page of the file.
    pub(crate) fn in_file(&self, page: usize) -> u64 {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 8];
        self.file.as_ref().unwrap().read_exact_at(&mut bytes, page as u64 * PAGE).unwrap();
        u64::from_ne_bytes(bytes)
    }
}
