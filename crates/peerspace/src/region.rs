//! A region: memory of a space, to be used as bytes, typed slices or raw pointers.

use crate::adopt::Use;
use crate::engine::own::MakeError;
use crate::error::Error;
use crate::huge::Hint;
use crate::space::Space;
use peerspace_core::addr::{Access, Va, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_os::Kernel;
use peerspace_os::linux::memory::Memory;
use peerspace_os::linux::signal::without_signals;
use std::fmt;
use std::ops::Range;

/// Memory of a [`Space`]. It begins as zeros, and takes up RAM only where it is used.
///
/// Everything that works on a slice works on a region. Dropping it gives everything back.
///
/// # When a device fails
///
/// A page that its device cannot give back is lost (rule Z9), and only that page. A plain access to it raises SIGBUS,
/// which ends a program that does not handle it; [`try_read`](Region::try_read) and [`try_write`](Region::try_write)
/// return an error instead that says which address and which device. After [`discard`](Region::discard) the page is
/// usable again.
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
        // Without signals: a handler of the program that touched managed memory now could wait for this thread.
        let made = without_signals(|| {
            let mut places = places(engine.reach(), len, block);
            let map = || {
                // Wherever the kernel likes, first.
                engine.kernel.map_memory_near(places.next().unwrap_or(Va(0)), len).map(|memory| {
                    let range = memory.range();
                    (memory, range)
                })
            };
            // Refusal to unmap what is nobody's yet leaks address space and nothing else.
            let unmap = |memory| {
                let _ = engine.kernel.unmap_memory(memory);
            };
            engine.make_region(attributes, map, unmap)
        });
        let (memory, range) = made.map_err(|e| match e {
            MakeError::Unreachable(last) => Error::BadRange {
                what: format!("a region of {bytes} bytes, at {last} or at any other place that was tried"),
                why: "not all devices of the space can translate these addresses, or have them free",
            },
            MakeError::Kernel(why) => Error::Kernel { what: format!("map a region of {bytes} bytes"), why },
            MakeError::Table(range, e) => Error::BadRange {
                what: format!("a region of {bytes} bytes at {range}: {e:?}"),
                why: "the space has no room for it",
            },
        })?;
        Ok(Region { memory: Some(memory), range, space })
    }

    /// What is mapped already, and a region of the space's.
    #[cfg(feature = "devices")]
    pub(crate) fn of_memory(space: Space, memory: Memory, range: VaRange) -> Region {
        Region { memory: Some(memory), range, space }
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

    /// The region as a slice of plain values: as many as fit.
    ///
    /// ```
    /// # use peerspace::{Space, device::soft::Soft};
    /// # let space = Space::builder().host(16 << 20).device(Soft::new(64 << 20)?).build()?;
    /// let mut region = space.region(1 << 20)?;
    /// let words: &mut [u64] = region.typed_mut();
    /// words[77] = 7;
    /// assert_eq!(region.typed::<[u32; 2]>()[77], [7, 0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Panics
    /// For a type of no bytes, or one that is aligned to more than a block (2 MiB where pages have 4 KiB).
    pub fn typed<T: bytemuck::Pod>(&self) -> &[T] {
        let whole = self.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice(&self.bytes()[..whole])
    }

    /// The region as a slice of plain values, to write.
    ///
    /// # Panics
    /// As [`typed`](Region::typed).
    pub fn typed_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let whole = self.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.bytes_mut()[..whole])
    }

    /// Copies the bytes from `at` on to `to`.
    ///
    /// What a plain access says by SIGBUS, this says by an error.
    ///
    /// # Errors
    /// [`Error::Lost`] if one of the pages cannot be had back from its device: `to` then has the bytes before that
    /// page. [`Error::Kernel`] likewise, if one can neither be used where it is in place on a device nor taken from there.
    /// [`Error::BadRange`] if the bytes do not lie inside the region.
    pub fn try_read(&self, at: usize, to: &mut [u8]) -> Result<(), Error> {
        let bytes = self.bytes();
        held_in_pieces(&self.space, self.range, at, to.len(), Access::Read, |from| {
            to[from.start - at..from.end - at].copy_from_slice(&bytes[from]);
        })
    }

    /// Copies `from` to the bytes from `at` on.
    ///
    /// What a plain access says by SIGBUS, this says by an error.
    ///
    /// # Errors
    /// [`Error::Lost`] if one of the pages, of which other bytes may be needed, cannot be had back from its device:
    /// what comes before that page is written. To write over all of a page that is lost,
    /// [`discard`](Region::discard) it first. [`Error::Kernel`] likewise, as for [`try_read`](Region::try_read).
    /// [`Error::BadRange`] if the bytes do not lie inside the region.
    pub fn try_write(&mut self, at: usize, from: &[u8]) -> Result<(), Error> {
        let Region { memory, range, space } = self;
        let bytes = memory.as_mut().expect("a region has memory until it is dropped").bytes_mut();
        held_in_pieces(space, *range, at, from.len(), Access::Write, |to| {
            bytes[to.clone()].copy_from_slice(&from[to.start - at..to.end - at]);
        })
    }

    /// Says how the region is going to be used. What is in RAM already stays as it is.
    ///
    /// # Errors
    /// When the space has as many regions as it can have.
    pub fn advise(&self, hint: Hint) -> Result<(), Error> {
        self.space.advise(self.range, hint)
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
        part_of(self.range, part)
    }

    /// Forgets the content of every page that lies wholly inside `part` (rule G8: rounded inwards); it reads as
    /// zeros. Takes no data transfer.
    ///
    /// # Errors
    /// When the range does not lie inside the region.
    pub fn discard(&mut self, part: Range<usize>) -> Result<(), Error> {
        self.discard_unused(self.part(part)?)
    }

    /// [`discard`](Region::discard) where several share the region by raw pointers.
    ///
    /// # Safety
    /// Nobody refers to the bytes of `part`.
    ///
    /// # Errors
    /// As for [`discard`](Region::discard).
    pub unsafe fn discard_shared(&self, part: Range<usize>) -> Result<(), Error> {
        self.discard_unused(self.part(part)?)
    }

    /// Makes huge folios of the blocks (of 2 MiB, with pages of 4 KiB) that lie wholly inside `part`, now (rule H3):
    /// what is missing of them is brought in, memory never used included. Returns how many bytes of them are huge then;
    /// the rest stays in small pages, because somebody relies on where they are, or there is no huge page to be had.
    ///
    /// In the background the same happens to blocks that lack less than a tenth. The kernel takes several times as long
    /// for it as for copying the block.
    ///
    /// # Errors
    /// When the range does not lie inside the region, or the hint [`Sparse`](Hint::Sparse) says that it is to stay in small pages.
    pub fn collapse(&self, part: Range<usize>) -> Result<usize, Error> {
        self.space.collapse(self.part(part)?)
    }

    /// Sets aside the pages that lie wholly inside `part`, because they will not be needed soon: they are the first to
    /// leave RAM from now on, and a use takes them back without input (rule G3) as long as they have not. Returns how many
    /// bytes were set aside. What is kept [resident](Space::make_resident) stays, and so do huge folios that lie inside only
    /// in part.
    ///
    /// What `madvise(2)` calls MADV_COLD. Takes no data transfer, unless so many small pages rest already that some have to
    /// go on to a device.
    ///
    /// # Errors
    /// When the range does not lie inside the region.
    pub fn cold(&self, part: Range<usize>) -> Result<usize, Error> {
        Ok(self.space.cold(self.part(part)?))
    }

    /// [`discard`](Region::discard) for addresses inside of the region that nobody refers to.
    pub(crate) fn discard_unused(&self, range: VaRange) -> Result<(), Error> {
        let engine = self.space.engine();
        let whole = engine.geometry.range(engine.geometry.pages_inside(range));
        if whole.is_empty() {
            return Ok(());
        }
        let lost = || match engine.still_lost(engine.geometry.pages_inside(whole)) {
            Some((vpn, pfn)) => Err(self.space.lost(vpn, pfn)),
            None => Ok(()),
        };
        // Where the table is emptied first, it does not know afterwards.
        if !engine.kernel.capabilities().move_pages {
            lost()?;
        }
        let discarded = engine
            .discard_in_place(engine.geometry.pages_inside(whole), |rest| engine.discard_now(engine.addresses(rest)));
        discarded.map_err(|why| Error::Kernel { what: format!("discard {range}"), why })?;
        // The kernel waits until the news is received; devices have to have heard of it (rule G5).
        engine.await_devices();
        lost()
    }
}

impl Space {
    /// Calls `each` with managed memory, piece after piece; while it is called with one, that is in RAM, permits `how`, and
    /// stays. For accesses by raw pointers to which errors are said rather than signals sent, in regions and in adopted memory.
    ///
    /// `each` had best be quick. It must not wait for anybody who uses the memory.
    ///
    /// # Errors
    /// As for [`Region::try_read`]; [`Error::BadRange`] where the memory is not managed by this space. `each` has been called
    /// with what comes before.
    pub fn with_held(
        &self,
        start: *const u8,
        len: usize,
        how: Use,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Result<(), Error> {
        let bad = || Error::BadRange { what: format!("{len} bytes at {start:p}"), why: "the range wraps" };
        let all = VaRange::new(Va(start as u64), len as u64).ok_or_else(bad)?;
        held_in_pieces(self, all, 0, len, how.into(), |piece| {
            each(start.cast_mut().wrapping_add(piece.start), piece.end - piece.start);
        })
    }
}

/// Where to look for room for a region of `len` bytes, when all devices can translate the addresses `reach` alone.
fn places(reach: Range<u64>, len: u64, block: u64) -> impl Iterator<Item = Va> {
    const TRIES: u64 = 48;
    // Kernels give out the top of what a process can have by themselves.
    let reach = reach.start.max(1 << 28)..reach.end.min(1 << 46);
    let room = reach.end.saturating_sub(reach.start).saturating_sub(len);
    let step = (room / TRIES).next_multiple_of(block);
    let at = move |i| Va((reach.end - len).saturating_sub(i * step) / block * block);
    std::iter::once(Va(0)).chain((0..if room == 0 { 0 } else { TRIES }).map(at))
}

/// The addresses of a part of the region at `all`.
fn part_of(all: VaRange, part: Range<usize>) -> Result<VaRange, Error> {
    if part.start > part.end || part.end as u64 > all.len() {
        return Err(Error::BadRange {
            what: format!("bytes {}..{} of a region of {} bytes", part.start, part.end, all.len()),
            why: "the range does not lie inside",
        });
    }
    Ok(VaRange { start: Va(all.start.0 + part.start as u64), end: Va(all.start.0 + part.end as u64) })
}

/// Calls `copy` with pieces of the `len` bytes at `at` of the region at `all`, one after the other, while their pages
/// are kept from leaving.
fn held_in_pieces(
    space: &Space,
    all: VaRange,
    at: usize,
    len: usize,
    access: Access,
    mut copy: impl FnMut(Range<usize>),
) -> Result<(), Error> {
    let engine = space.engine();
    let wanted = part_of(all, at..at.saturating_add(len))?;
    let mut next = wanted.start;
    while next < wanted.end {
        let rest = VaRange { start: next, end: wanted.end };
        // Without signals: a handler of the program that touched managed memory now could wait for this thread.
        let held = without_signals(|| engine.hold_some(engine.geometry.pages_out(rest), access));
        let bad = |why| Error::BadRange { what: format!("{rest}"), why };
        let held = held.map_err(|e| space.cannot_hold(e, &bad))?;
        let end = engine.addresses(held).end.min(wanted.end);
        copy((next.0 - all.start.0) as usize..(end.0 - all.start.0) as usize);
        without_signals(|| engine.let_go_some(held));
        next = end;
    }
    Ok(())
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let engine = self.space.engine();
        // Nobody refers to the memory any more, so nobody faults in it. What the table knows of a piece goes first.
        let mut rest = Some(memory);
        let range = self.range;
        without_signals(|| {
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
