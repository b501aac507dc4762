//! The floor over memory: frames travel by UFFDIO_MOVE between a pool and the region, data between the pool and a
//! store beside it.
//!
//! ```text
//!   fault: [evict the frame that came first: MOVE out, store]  load into the frame, MOVE in
//! ```

use super::PAGE;
use super::sigbus::{Serve, Served};
use crate::contender::{Counters, Memory};
use crate::error::Trouble;
use peerspace_os::linux::map::Mapping;
use peerspace_os::linux::uffd::{Mode, Uffd, feature};
use rustix::mm::Advice;

const HUGE: usize = 2 << 20;
/// The length of a unit that was never stored: it is zero.
const NEVER: u32 = u32::MAX;
/// The length of a unit that is stored as it is.
const RAW: u32 = 0;

/// The floor over memory.
#[derive(Debug)]
pub(crate) struct MemoryFloor {
    pager: Served<Pager>,
    region: Mapping,
}

#[derive(Debug)]
struct Pager {
    uffd: Uffd,
    region: u64,
    units: usize,
    pool: Mapping,
    store: Mapping,
    shift: u32,
    lz4: bool,
    /// Which unit of the region a frame holds.
    holds: Vec<u32>,
    /// How much of the store a unit takes up.
    lengths: Vec<u32>,
    /// Frames that were handed out.
    used: usize,
    /// The frame that came first.
    hand: usize,
    faults: u64,
    /// Units written to the store.
    stores: u64,
}

impl MemoryFloor {
    /// A floor for `data` bytes in `host` bytes of frames, in units of 4 KiB or 2 MiB.
    pub(crate) fn new(data: u64, host: u64, huge: bool, lz4: bool) -> Result<MemoryFloor, Trouble> {
        if lz4 && !cfg!(feature = "lz4") {
            return Err(Trouble::Unavailable("built without the C library lz4".into()));
        }
        let uffd = super::open(feature::MOVE)?;
        let unit = if huge { HUGE } else { PAGE as usize };
        let map = |len: u64, huge: bool| {
            let mapping = Mapping::new(len as usize, HUGE, true)?;
            let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
            // SAFETY: the advice changes no content. Refusal would show in the numbers.
            let _ = unsafe { mapping.advise(0, mapping.len(), advice) };
            Ok::<_, rustix::io::Errno>(mapping)
        };
        let maps = || Ok::<_, rustix::io::Errno>((map(data, huge)?, map(host, huge)?, map(data, true)?));
        let (region, pool, store) = maps().map_err(Trouble::failed("map the floor's memory"))?;
        for mapping in [&pool, &store] {
            // SAFETY: the mapping is new: readable, writable, and nobody else's. What was touched once is there.
            unsafe { mapping.as_ptr().write_bytes(1, mapping.len()) };
        }
        for mapping in [&region, &pool] {
            let r = mapping.range();
            uffd.register(r.start.0, r.len(), Mode::Missing)
                .map_err(Trouble::failed("register the floor's memory"))?;
        }
        let pager = Pager {
            uffd,
            region: region.range().start.0,
            units: region.len() / unit,
            shift: unit.ilog2(),
            lz4,
            holds: vec![0; pool.len() / unit],
            lengths: vec![NEVER; region.len() / unit],
            used: 0,
            hand: 0,
            faults: 0,
            stores: 0,
            pool,
            store,
        };
        let mut floor = MemoryFloor { pager: Served::new(pager)?, region };
        crate::workload::fill(floor.words_mut(), 0);
        Ok(floor)
    }

    fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: the mapping is readable, writable and borrowed mutably; missing pages are served.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr().cast(), self.region.len() / 8) }
    }
}

impl Memory for MemoryFloor {
    fn words(&self) -> &[u64] {
        // SAFETY: the mapping is readable, any bytes are valid words, and what is missing is served with the content
        // it had: to the reader nothing ever changes.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().cast(), self.region.len() / 8) }
    }

    fn counters(&mut self) -> Counters {
        self.pager.state(|p| Counters { fetches: Some(p.faults), stores: Some(p.stores << (p.shift - PAGE.ilog2())) })
    }

    fn send_away(&mut self) -> Result<(), Trouble> {
        self.pager.state(|p| {
            for frame in 0..p.used {
                p.evict(frame).map_err(|e| Trouble::Failed(e.into()))?;
            }
            (p.used, p.hand) = (0, 0);
            Ok(())
        })
    }
}

impl Serve for Pager {
    #[inline]
    fn serve(&mut self, address: u64) -> Result<(), &'static str> {
        let unit = (address.wrapping_sub(self.region) >> self.shift) as usize;
        if unit >= self.units {
            return Err("a fault outside of its memory");
        }
        self.faults += 1;
        let frame = if self.used < self.holds.len() {
            self.used += 1;
            self.used - 1
        } else {
            let frame = self.hand;
            self.hand = if frame + 1 == self.holds.len() { 0 } else { frame + 1 };
            self.evict(frame)?;
            frame
        };
        self.load(frame, unit)?;
        self.holds[frame] = unit as u32;
        // SAFETY: the frame is in the pool, where nobody refers to it, and the unit is missing from the region, whose
        // readers expect its content to appear.
        let (_, error) =
            unsafe { self.uffd.move_pages(self.at(unit), self.frame(frame) as u64, 1 << self.shift, false) };
        if error.is_some() { Err("a frame cannot be moved in") } else { Ok(()) }
    }
}

impl Pager {
    fn at(&self, unit: usize) -> u64 {
        self.region + ((unit as u64) << self.shift)
    }

    fn frame(&self, frame: usize) -> *mut u8 {
        self.pool.as_ptr().wrapping_add(frame << self.shift)
    }

    /// The bytes of a frame that is in the pool, and the place of a unit in the store.
    fn bytes(&mut self, frame: usize, unit: usize) -> (&mut [u8], &mut [u8]) {
        let len = 1 << self.shift;
        // SAFETY: both lie inside their mappings, which are different ones, and `self`, which is borrowed mutably, is
        // the only one to refer to either.
        unsafe {
            let stored = self.store.as_ptr().add(unit << self.shift);
            (std::slice::from_raw_parts_mut(self.frame(frame), len), std::slice::from_raw_parts_mut(stored, len))
        }
    }

    fn evict(&mut self, frame: usize) -> Result<(), &'static str> {
        let unit = self.holds[frame] as usize;
        // SAFETY: the frame is missing from the pool, and its content goes on to be what the region's readers see.
        let (_, error) =
            unsafe { self.uffd.move_pages(self.frame(frame) as u64, self.at(unit), 1 << self.shift, false) };
        if error.is_some() {
            return Err("a frame cannot be moved out");
        }
        self.stores += 1;
        let lz4 = self.lz4;
        let (bytes, stored) = self.bytes(frame, unit);
        let packed = if lz4 { pack(bytes, stored) } else { RAW };
        if packed == RAW {
            stored.copy_from_slice(bytes);
        }
        self.lengths[unit] = packed;
        Ok(())
    }

    fn load(&mut self, frame: usize, unit: usize) -> Result<(), &'static str> {
        let length = self.lengths[unit];
        let (bytes, stored) = self.bytes(frame, unit);
        match length {
            NEVER => bytes.fill(0),
            RAW => bytes.copy_from_slice(stored),
            n => return unpack(&stored[..n as usize], bytes),
        }
        Ok(())
    }
}

/// Compresses `from` into `to`; the length, or [`RAW`] if that is of no use.
#[cfg(feature = "lz4")]
fn pack(from: &[u8], to: &mut [u8]) -> u32 {
    let fast = Some(lz4::block::CompressionMode::FAST(2));
    lz4::block::compress_to_buffer(from, fast, false, to).map_or(RAW, |n| n as u32)
}

#[cfg(feature = "lz4")]
fn unpack(from: &[u8], to: &mut [u8]) -> Result<(), &'static str> {
    match lz4::block::decompress_to_buffer(from, Some(to.len() as i32), to) {
        Ok(n) if n == to.len() => Ok(()),
        _ => Err("what was stored cannot be decompressed"),
    }
}

#[cfg(not(feature = "lz4"))]
fn pack(_: &[u8], _: &mut [u8]) -> u32 {
    RAW
}

#[cfg(not(feature = "lz4"))]
fn unpack(_: &[u8], _: &mut [u8]) -> Result<(), &'static str> {
    Err("built without lz4")
}
