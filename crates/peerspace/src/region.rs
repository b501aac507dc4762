//! A region: memory of a space, to be used as bytes, typed slices or raw pointers.

use crate::error::Error;
use crate::space::Space;
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_os::linux::memory::Memory;
use std::fmt;
use std::ops::Range;

/// Memory of a [`Space`]. It begins as zeros, and takes up RAM only where it is used.
///
/// Everything that works on a slice works on a region. Dropping it gives everything back.
pub struct Region {
    /// Taken out when dropped.
    memory: Option<Memory>,
    range: VaRange,
    space: Space,
}

impl Region {
    pub(crate) fn new(space: Space, bytes: u64, attributes: Attributes) -> Result<Region, Error> {
        let engine = space.engine();
        let bad = |why| Error::BadRange { what: format!("a region of {bytes} bytes"), why };
        if bytes == 0 {
            return Err(bad("it has no byte"));
        }
        let block = engine.geometry.block_bytes() as u64;
        let len = bytes.checked_next_multiple_of(block).filter(|n| *n < 1 << 47);
        let len = len.ok_or_else(|| bad("it is larger than the address space"))?;
        let memory = engine
            .kernel
            .map_memory(len)
            .map_err(|why| Error::Kernel { what: format!("map a region of {bytes} bytes"), why })?;
        let range = memory.range();
        // Without signals: a handler of the program that touched managed memory now could wait for this thread.
        let added = peerspace_os::linux::signal::without_signals(|| {
            let _work = engine.contexts.take();
            engine.add_region(engine.geometry.pages_inside(range), attributes)
        });
        if let Err(e) = added {
            // The mapping is nobody's yet; refusal to unmap it leaks address space and nothing else.
            let _ = engine.kernel.unmap_memory(memory);
            return Err(Error::BadRange {
                what: format!("a region of {bytes} bytes at {range}: {e:?}"),
                why: "the space has no room for it",
            });
        }
        Ok(Region { memory: Some(memory), range, space })
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("a region has memory until it is dropped")
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.memory().bytes()
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().expect("a region has memory until it is dropped").bytes_mut()
    }

    /// The region as a slice of plain values.
    ///
    /// # Panics
    /// Never for types whose size divides a block: a region is aligned to a block and whole blocks long.
    pub fn typed<T: bytemuck::Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// The region as a slice of plain values, to write.
    ///
    /// # Panics
    /// As [`typed`](Region::typed).
    pub fn typed_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// The first byte, for raw use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory().as_ptr()
    }

    /// Bytes, whole blocks.
    pub fn len(&self) -> usize {
        self.range.len() as usize
    }

    /// True for a region of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The space it belongs to.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The addresses of a part of the region.
    pub(crate) fn part(&self, part: Range<usize>) -> Result<VaRange, Error> {
        let all = self.range;
        if part.start > part.end || part.end as u64 > all.len() {
            return Err(Error::BadRange {
                what: format!("bytes {}..{} of a region of {} bytes", part.start, part.end, all.len()),
                why: "the range does not lie inside",
            });
        }
        Ok(VaRange { start: Va(all.start.0 + part.start as u64), end: Va(all.start.0 + part.end as u64) })
    }

    /// Forgets the content of every page that lies wholly inside `part` (rule G8: rounded inwards); it reads as
    /// zeros. Takes no data transfer.
    ///
    /// # Errors
    /// When the range does not lie inside the region.
    pub fn discard(&mut self, part: Range<usize>) -> Result<(), Error> {
        self.discard_unused(self.part(part)?)
    }

    /// The same for addresses inside of the region that nobody refers to.
    pub(crate) fn discard_unused(&self, range: VaRange) -> Result<(), Error> {
        let engine = self.space.engine();
        let whole = engine.geometry.range(engine.geometry.pages_inside(range));
        if whole.is_empty() {
            return Ok(());
        }
        engine.discard_now(whole).map_err(|why| Error::Kernel { what: format!("discard {range}"), why })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let engine = self.space.engine();
        // Nobody refers to the memory any more, so nobody faults in it. What the table knows of a piece goes first.
        let mut rest = Some(memory);
        let range = self.range;
        peerspace_os::linux::signal::without_signals(|| {
            engine.release_region(range, |piece| {
                // Refusal leaks address space and nothing else.
                rest = rest.take().and_then(|memory| engine.kernel.unmap_front(memory, piece.len()).ok().flatten());
            });
        });
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:?})", self.range)
    }
}
