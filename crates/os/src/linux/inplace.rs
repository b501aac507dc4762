//! Memory that a device shares with the CPU, at the program's own addresses (rule Z5): put there and taken away in one step
//! each, so that nobody ever sees a page of zeros.
//!
//! ```text
//!  registered, all pages out --show--> the device's memory --hide--> registered, all pages missing
//! ```
//!
//! What takes the place of the device's memory is registered before it gets there: from its first moment on, a missing page is
//! a fault that waits. The other way there is nothing to be seen in between, because all of the device's memory is there.

use super::kernel::{Linux, trouble};
use super::map::{Mapping, unclaim};
use super::self_memory::read_self;
use crate::kernel::{Kernel, SharedMemory, Trouble};
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

/// Maps `memory` at `range`, in the place of what is there.
///
/// # Safety
/// What is at `range` may be replaced: nobody relies on its bytes.
unsafe fn map_over(range: VaRange, memory: SharedMemory<'_>) -> Result<(), Errno> {
    let (at, len) = (range.start.0 as *mut _, range.len() as usize);
    // SAFETY: as the caller says.
    unsafe {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        rustix::mm::mmap(at, len, prot, flags, memory.file, memory.offset)?;
        // Refusal is no harm: small pages do as well.
        let _ = rustix::mm::madvise(at, len, Advice::LinuxHugepage);
    }
    Ok(())
}

/// Maps pieces of so many bytes, one after the other, where there is room.
pub(super) fn map_all<'a>(
    k: &Linux,
    pieces: impl Iterator<Item = (SharedMemory<'a>, u64)> + Clone,
) -> Result<VaRange, Trouble> {
    let len: u64 = pieces.clone().map(|(_, len)| len).sum();
    let room = Mapping::new(len as usize, k.geometry().block_bytes(), false).map_err(trouble)?;
    let range = room.range();
    let mut at = range.start;
    for (memory, len) in pieces {
        let piece = VaRange { start: at, end: Va(at.0 + len) };
        // SAFETY: the room is ours, and there is nothing in it.
        unsafe { map_over(piece, memory) }.map_err(trouble)?;
        at = piece.end;
    }
    unclaim(range);
    Ok(room.leak())
}

pub(super) fn show(k: &Linux, range: VaRange, memory: SharedMemory<'_>) -> Result<(), Trouble> {
    k.assert_foreign(range);
    let len = range.len() as usize;
    // Elsewhere first: where mapping it fails, the kernel may have unmapped already what was there.
    let at = map_all(k, std::iter::once((memory, range.len())))?.start.0 as *mut _;
    // SAFETY: the range is a region's, and none of its pages is there: nobody sees a byte of it change. The other mapping is
    // nobody else's.
    unsafe {
        if rustix::mm::mremap_fixed(at, len, len, MremapFlags::MAYMOVE, range.start.0 as *mut _).is_err() {
            // Kernels before 5.16 do not move huge pages of their pool.
            let _ = rustix::mm::munmap(at, len);
            map_over(range, memory).map_err(trouble)?;
        }
    }
    k.wake(range)
}

pub(super) fn hide(k: &Linux, range: VaRange) -> Result<(), Trouble> {
    k.assert_foreign(range);
    let (len, page) = (range.len() as usize, k.geometry().page_bytes());
    // Between two pages that nobody can access: so the kernel joins it with nothing that is beside it, and goes on to join it with what it
    // will be beside. A mapping that has been part of another keeps where that was.
    let around = Mapping::new(len + 2 * page, page, false).map_err(trouble)?;
    let at = VaRange { start: Va(around.range().start.0 + page as u64), end: Va(around.range().end.0 - page as u64) };
    let ends = [around.range().start, at.end];
    // SAFETY: the mapping is ours, and there is nothing in it.
    unsafe {
        let (inside, rw) = (at.start.0 as *mut _, MprotectFlags::READ | MprotectFlags::WRITE);
        rustix::mm::mprotect(inside, len, rw).map_err(trouble)?;
        let _ = rustix::mm::madvise(inside, len, Advice::LinuxHugepage);
    }
    k.register(at)?;
    unclaim(around.range());
    // It goes piece by piece from here on.
    let _ = around.leak();
    // SAFETY: what is at `range` is the device's memory, which stays in the file; no reference into it is lost sight of,
    // since its addresses go on to be served, with the same bytes. The fresh mapping is nobody else's.
    let moved = unsafe {
        rustix::mm::mremap_fixed(at.start.0 as *mut _, len, len, MremapFlags::MAYMOVE, range.start.0 as *mut _)
    };
    let failed = moved.err().map(|e| {
        let _ = k.unmap(at);
        trouble(e)
    });
    for end in ends {
        // SAFETY: the page is ours, and nobody can access it.
        let _ = unsafe { rustix::mm::munmap(end.0 as *mut _, page) };
    }
    failed.map_or(Ok(()), Err)
}

pub(super) fn close(k: &Linux, range: VaRange) -> Result<(), Trouble> {
    k.assert_foreign(range);
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the caller says that nobody refers to what is there; its bytes stay in the file.
    let closed = unsafe {
        let (at, len) = (range.start.0 as *mut _, range.len() as usize);
        rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags)
    };
    closed.map(drop).map_err(trouble)
}

pub(super) fn is_accessible(range: VaRange, write: bool) -> bool {
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    // SAFETY: pages that are there are mapped; no byte changes.
    match unsafe { rustix::mm::madvise(range.start.0 as *mut _, range.len() as usize, advice) } {
        Ok(()) => true,
        // Kernels before 5.14 do not know that: what can be read by the kernel, the program can use as well.
        Err(Errno::INVAL) => {
            let page = rustix::param::page_size();
            (range.start.0..range.end.0).step_by(page).all(|at| matches!(read_self(at, &mut [0]), Ok(1)))
        }
        Err(_) => false,
    }
}

/// How many mappings a process may have.
pub(super) fn most_mappings() -> u64 {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    limit.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(65530)
}
