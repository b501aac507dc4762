//! A file with the data in it: unlinked, and opened past the page cache where the file system allows it.

use crate::error::Trouble;
use crate::workload::{self, PAGE_BYTES, PAGE_WORDS};
use peerspace_os::own::Buffer;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Bytes written at once.
const PIECE: usize = 1 << 20;

/// A file with the data in it. Nobody else can open it, and it is gone with the process.
#[derive(Debug)]
pub(crate) struct DataFile {
    fd: OwnedFd,
    len: u64,
    direct: bool,
}

impl DataFile {
    /// Writes `bytes` bytes of data into a new file in `dir`.
    pub(crate) fn new(dir: &Path, bytes: u64) -> Result<DataFile, Trouble> {
        let (fd, direct) = open(dir).map_err(Trouble::unavailable("make a file"))?;
        let len = bytes / PIECE as u64 * PIECE as u64;
        // Aligned to a page, as direct writes want it.
        let mut buffer = Buffer::new(PIECE).map_err(Trouble::failed("map a buffer"))?;
        let mut words = vec![0u64; PIECE / 8];
        for at in (0..len).step_by(PIECE) {
            workload::fill(&mut words, at as usize / 8);
            for (to, word) in buffer.as_chunks_mut::<8>().0.iter_mut().zip(&words) {
                *to = word.to_ne_bytes();
            }
            let n = rustix::io::pwrite(&fd, &buffer, at).map_err(Trouble::unavailable("write a file"))?;
            if n != PIECE {
                return Err(Trouble::Unavailable(format!("write a file: {n} of {PIECE} bytes went")));
            }
        }
        rustix::fs::fsync(&fd).map_err(Trouble::unavailable("write a file"))?;
        Ok(DataFile { fd, len, direct })
    }

    /// Bytes of data.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// How it was opened.
    pub(crate) fn mode(&self) -> &'static str {
        if self.direct { "O_DIRECT" } else { "through the page cache: this file system has no O_DIRECT" }
    }

    /// Reads the page at `offset`.
    pub(crate) fn read_page(&self, page: &mut [u8], offset: u64) -> Result<(), Errno> {
        let n = rustix::io::pread(&self.fd, &mut page[..PAGE_BYTES], offset)?;
        if n == PAGE_BYTES { Ok(()) } else { Err(Errno::IO) }
    }

    /// Pages of data.
    pub(crate) fn pages(&self) -> u64 {
        self.len / PAGE_BYTES as u64
    }
}

/// Word `k` of a page in a buffer.
pub(crate) fn word_of(page: &[u8], k: usize) -> u64 {
    assert!(k < PAGE_WORDS);
    u64::from_ne_bytes(page[k * 8..k * 8 + 8].try_into().expect("eight bytes"))
}

fn open(dir: &Path) -> Result<(OwnedFd, bool), Errno> {
    match unnamed(dir, OFlags::DIRECT) {
        Ok(fd) => Ok((fd, true)),
        Err(_) => unnamed(dir, OFlags::empty()).map(|fd| (fd, false)),
    }
}

/// A file without a name: from the first where the file system can do that, unlinked at once where it cannot.
fn unnamed(dir: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::open(dir, flags | OFlags::TMPFILE, mode).or_else(|_| {
        let path = dir.join(format!(".peerspace-bench-{}", std::process::id()));
        let fd = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode);
        rustix::fs::unlink(&path).and(fd)
    })
}
