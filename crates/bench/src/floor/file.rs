//! The floor over a file: a page is read into a buffer and copied in with UFFDIO_COPY, the oldest ones are dropped
//! with MADV_DONTNEED, 32 when there is no room. Its data never changes, so nothing is written back.

use super::PAGE;
use super::sigbus::{Serve, Served};
use crate::contender::{Counters, Memory};
use crate::error::Trouble;
use crate::file::DataFile;
use peerspace_os::linux::map::Mapping;
use peerspace_os::linux::uffd::{Mode, Uffd};
use peerspace_os::own::Buffer;
use rustix::mm::Advice;

/// Pages dropped at once.
const BATCH: usize = 32;

/// The floor over a file.
#[derive(Debug)]
pub(crate) struct FileFloor {
    pager: Served<Pager>,
    region: Mapping,
}

#[derive(Debug)]
struct Pager {
    uffd: Uffd,
    file: DataFile,
    region: u64,
    len: u64,
    buffer: Buffer,
    /// Pages that are there, the oldest at `head`.
    ring: Vec<u64>,
    head: usize,
    count: usize,
    faults: u64,
}

impl FileFloor {
    /// A floor for the data of `file` in `host` bytes of pages.
    pub(crate) fn new(file: DataFile, host: u64) -> Result<FileFloor, Trouble> {
        let uffd = super::open(0)?;
        let region =
            Mapping::new(file.len() as usize, 2 << 20, true).map_err(Trouble::failed("map the floor's memory"))?;
        // SAFETY: the advice changes no content.
        let _ = unsafe { region.advise(0, region.len(), Advice::LinuxNoHugepage) };
        let at = region.range().start.0;
        uffd.register(at, file.len(), Mode::Missing).map_err(Trouble::failed("register the floor's memory"))?;
        let pager = Pager {
            uffd,
            region: at,
            len: file.len(),
            file,
            buffer: Buffer::new(PAGE as usize).map_err(Trouble::failed("map a buffer"))?,
            ring: vec![0; (host / PAGE) as usize],
            head: 0,
            count: 0,
            faults: 0,
        };
        Ok(FileFloor { pager: Served::new(pager)?, region })
    }
}

impl Memory for FileFloor {
    fn words(&self) -> &[u64] {
        // SAFETY: the mapping is readable, any bytes are valid words, and what is missing is served from a file that
        // nobody changes.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().cast(), self.region.len() / 8) }
    }

    fn counters(&mut self) -> Counters {
        self.pager.state(|p| Counters { fetches: Some(p.faults), stores: None })
    }

    fn send_away(&mut self) -> Result<(), Trouble> {
        self.pager.state(|p| p.drop_oldest(p.count)).map_err(|e| Trouble::Failed(e.into()))
    }
}

impl Serve for Pager {
    fn serve(&mut self, address: u64) -> Result<(), &'static str> {
        let offset = address.wrapping_sub(self.region) & !(PAGE - 1);
        if offset >= self.len {
            return Err("a fault outside of its memory");
        }
        self.faults += 1;
        self.file.read_page(&mut self.buffer, offset).map_err(|_| "the file cannot be read")?;
        // SAFETY: the buffer is a page and not written meanwhile; the page of the region is missing.
        let (_, error) = unsafe { self.uffd.copy(self.region + offset, self.buffer.as_ptr(), PAGE, false, false) };
        if error.is_some() {
            return Err("a page cannot be copied in");
        }
        if self.count == self.ring.len() {
            self.drop_oldest(BATCH.min(self.count))?;
        }
        let end = (self.head + self.count) % self.ring.len();
        self.ring[end] = offset;
        self.count += 1;
        Ok(())
    }
}

impl Pager {
    fn drop_oldest(&mut self, n: usize) -> Result<(), &'static str> {
        for _ in 0..n {
            let page = (self.region + self.ring[self.head]) as *mut std::ffi::c_void;
            self.head = if self.head + 1 == self.ring.len() { 0 } else { self.head + 1 };
            self.count -= 1;
            // SAFETY: the page is in the region, and comes back with the same content when it is read again.
            unsafe { rustix::mm::madvise(page, PAGE as usize, Advice::LinuxDontNeed) }
                .map_err(|_| "a page cannot be dropped")?;
        }
        Ok(())
    }
}
