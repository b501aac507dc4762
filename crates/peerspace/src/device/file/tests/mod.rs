//! Tests of the device from inside, with calls that fail on a schedule.

mod faults;
mod oracle;
mod space;

use super::disk::Disk;
use super::layout::page_bytes;
use super::open;
use super::raw::Raw;
use crate::device::{DeviceError, DevicePages, Load, Store};
use peerspace_os::linux::transfer::{Bytes, Piece, plain};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It goes well.
    None,
    /// It fails.
    Error(Errno),
    /// No more than so many bytes of it are moved.
    Short(usize),
    /// A bit of what is read is wrong.
    Corrupt,
}

/// A request, as the one who decides about faults sees it.
#[derive(Debug, Clone, Copy)]
struct Request {
    write: bool,
    at: u64,
    len: usize,
}

type Decide = Box<dyn FnMut(Request) -> Fault + Send>;
type BeforePunch = Box<dyn FnMut(u64, u64) -> Result<(), Errno> + Send>;

/// Calls that fail as they are told to.
struct Faulty {
    decide: Mutex<Decide>,
    punch: Mutex<BeforePunch>,
    requests: AtomicU64,
}

impl Faulty {
    fn new() -> Faulty {
        Faulty {
            decide: Mutex::new(Box::new(|_| Fault::None)),
            punch: Mutex::new(Box::new(|_, _| Ok(()))),
            requests: AtomicU64::new(0),
        }
    }

    /// Decides about all requests from now on by `decide`.
    fn decide(&self, decide: impl FnMut(Request) -> Fault + Send + 'static) {
        *self.decide.lock().unwrap() = Box::new(decide);
    }

    /// The next requests meet `faults`, one each; the others go well.
    fn schedule(&self, faults: impl IntoIterator<Item = Fault>) {
        let mut faults: VecDeque<Fault> = faults.into_iter().collect();
        self.decide(move |_| faults.pop_front().unwrap_or(Fault::None));
    }

    /// Calls `before` ahead of each hole, which is not punched if that fails.
    fn before_punch(&self, before: impl FnMut(u64, u64) -> Result<(), Errno> + Send + 'static) {
        *self.punch.lock().unwrap() = Box::new(before);
    }
}

impl Raw for Faulty {
    fn transfer(&self, pieces: &mut [Piece<'_>]) {
        for request in pieces.chunk_by_mut(|a, b| a.is_followed_by(b)) {
            self.requests.fetch_add(1, Relaxed);
            let len = request.iter().map(|p| p.bytes.len()).sum();
            let write = matches!(request[0].bytes, Bytes::From(_));
            let fault = (self.decide.lock().unwrap())(Request { write, at: request[0].at, len });
            match fault {
                Fault::Error(e) => request.iter_mut().for_each(|p| p.result = Err(e)),
                Fault::None | Fault::Corrupt => {
                    plain(request);
                    if let (Fault::Corrupt, Bytes::Into(b)) = (fault, &mut request[0].bytes) {
                        b[len / 3 % b.len()] ^= 4;
                    }
                }
                Fault::Short(mut n) => {
                    for piece in request {
                        let part = n.min(piece.bytes.len());
                        // Past the cache nothing less than a page can really be moved.
                        for len in [part, part / page_bytes() * page_bytes()] {
                            plain(&mut [Piece::new(piece.file, piece.at, shorten(&mut piece.bytes, len), 0)]);
                        }
                        piece.result = Ok(part);
                        n -= part;
                    }
                }
            }
        }
    }

    fn punch(&self, file: BorrowedFd<'_>, at: u64, len: u64) -> Result<(), Errno> {
        (self.punch.lock().unwrap())(at, len)?;
        super::raw::System::plain().punch(file, at, len)
    }
}

fn shorten<'b>(bytes: &'b mut Bytes<'_>, n: usize) -> Bytes<'b> {
    let n = n.min(bytes.len());
    match bytes {
        Bytes::Into(b) => Bytes::Into(&mut b[..n]),
        Bytes::From(b) => Bytes::From(&b[..n]),
    }
}

/// A device in a new directory. `direct`: whether it may go past the page cache.
fn disk(pages: u64, direct: bool) -> Disk<Faulty> {
    let dir = tempfile::tempdir().unwrap();
    let mut opened =
        open::open(dir.path(), Some((pages + 1) * page_bytes() as u64), open::Claim::Unreserved).unwrap();
    if !direct {
        rustix::fs::fcntl_setfl(&opened.file, rustix::fs::OFlags::RDWR).unwrap();
        opened.direct = Err(Errno::INVAL);
    }
    Disk::new(opened, Faulty::new()).unwrap()
}

/// What page `page` looks like in its `version`.
fn content(page: u64, version: u64) -> Vec<u8> {
    let mut x = (page << 32 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; page_bytes()];
    for word in bytes.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes());
    }
    bytes
}

/// Bytes aligned to a page, or off by some. On the heap: there is a bound on mappings of our own.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Buffer {
        Buffer::off(len, 0)
    }

    fn off(len: usize, by: usize) -> Buffer {
        let memory = vec![0; len + page_bytes() + by];
        let start = memory.as_ptr().addr().next_multiple_of(page_bytes()) - memory.as_ptr().addr() + by;
        Buffer { memory, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// An aligned buffer with `count` pages from `first` on.
fn contents(first: u64, count: u64, version: u64) -> Buffer {
    let mut buffer = Buffer::new(count as usize * page_bytes());
    for (page, bytes) in (first..).zip(buffer.chunks_exact_mut(page_bytes())) {
        bytes.copy_from_slice(&content(page, version));
    }
    buffer
}

/// Stores `count` pages from `first` on as one transfer.
fn store(disk: &Disk<Faulty>, first: u64, count: u64, version: u64) -> Result<(), DeviceError> {
    let buffer = contents(first, count, version);
    let mut batch = [Store::new(first, &buffer)];
    disk.store(&mut batch);
    batch[0].result.clone()
}

/// Loads pages as one transfer, and compares them with what they should be if that went well.
fn load(disk: &Disk<Faulty>, first: u64, count: u64, version: u64) -> Result<(), DeviceError> {
    let mut buffer = Buffer::new(count as usize * page_bytes());
    let mut batch = [Load::new(first, &mut buffer)];
    disk.load(&mut batch);
    let result = batch[0].result.clone();
    if result.is_ok() {
        assert!(*buffer == *contents(first, count, version), "{count} pages from {first} on, version {version}");
    }
    result
}

fn free(disk: &Disk<Faulty>, first: u64, count: u64) {
    disk.free(DevicePages { first, count });
}
