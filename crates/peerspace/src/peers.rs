//! What users say about memory that devices use: where it should be, and what is to be copied (rules G8, G14).

use crate::adopt::{Adopted, Use};
use crate::attach::DeviceId;
use crate::device::mmu::{DeviceAccess, FaultError};
use crate::engine::copy::Through;
use crate::engine::place::Bring;
use crate::engine::prefetch::{Goal, Ticket};
use crate::error::Error;
use crate::region::Region;
use crate::space::Space;
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::plan::CLUSTER;
use peerspace_core::regions::{Attributes, Place};
use peerspace_core::sharers::MmuId;
use peerspace_os::Kernel;
use peerspace_os::linux::signal::without_signals;
use peerspace_os::own::Shared;
use std::fmt;
use std::ops::Range;

/// A place for data: the host's RAM, or a device that runs code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    /// RAM.
    Host,
    /// The memory of this device.
    Device(DeviceId),
}

/// A prefetch under way. Dropping it lets it go on.
#[must_use = "a prefetch goes on by itself; to ignore this is to never know how it went"]
pub struct Prefetch {
    ticket: Shared<Ticket>,
    space: Space,
    range: VaRange,
    to: Node,
}

impl Prefetch {
    /// Whether it is over.
    pub fn is_done(&self) -> bool {
        self.ticket.is_done()
    }

    /// Ends it as soon as may be; what has gone stays there.
    pub fn cancel(&self) {
        self.ticket.cancel();
    }

    /// Waits until it is over. Returns how many bytes are where they were sent.
    ///
    /// # Errors
    /// [`Error::Migrate`] says the first page that could not go, and why: all others have gone, and it is where it was.
    pub fn wait(&self) -> Result<usize, Error> {
        let engine = self.space.engine();
        without_signals(|| engine.help_prefetch(&self.ticket));
        self.ticket.wait(&engine.kernel.park());
        match self.ticket.failed() {
            None => Ok(engine.geometry.bytes(self.ticket.there()) as usize),
            Some(e) => Err(Error::Migrate { range: self.range, to: self.space.name_of(self.to), why: e.to_string() }),
        }
    }
}

impl fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetch").field("range", &self.range).field("to", &self.to).finish_non_exhaustive()
    }
}

impl Space {
    /// Has managed memory sent to where it is going to be used, by a thread of the space; returns at once. The range is rounded
    /// *out* to blocks (of 2 MiB, with pages of 4 KiB), as far as they are managed (rule G8). Prefetches are worked off in the
    /// order in which they are asked for.
    ///
    /// Devices that would get copies ([`Hint::ReadMostly`](crate::Hint::ReadMostly),
    /// [`Mode::Replicate`](crate::device::mmu::Mode::Replicate)) do; otherwise the pages move.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`]; [`Error::Device`] for one that runs no code (see [`Region::migrate_to`]).
    pub fn prefetch(&self, start: *const u8, len: usize, to: Node) -> Result<Prefetch, Error> {
        let engine = self.engine();
        let goal = match to {
            Node::Host => Goal::Host,
            Node::Device(id) => Goal::Mmu(self.mmu_of(id)?),
        };
        let bad = || Error::BadRange { what: format!("{len} bytes at {start:p}"), why: "the range wraps" };
        let range = VaRange::new(Va(start as u64), len as u64).ok_or_else(bad)?;
        let ticket = without_signals(|| engine.prefetch(engine.geometry.pages_out(range), goal));
        Ok(Prefetch { ticket, space: self.clone(), range, to })
    }

    /// Gives a device sole access to managed memory, for atomic operations of its code (rule G14): the pages that `len` bytes at
    /// `start` touch move there and are mapped, whatever mode and hints say. Any access of the CPU or of another device ends
    /// it, page by page.
    ///
    /// # Errors
    /// [`Error::Migrate`] with the first page that cannot go; what comes before has gone. [`Error::NoSuchDevice`] and
    /// [`Error::Device`] as for [`prefetch`](Space::prefetch).
    pub fn exclusive(&self, start: *const u8, len: usize, device: DeviceId) -> Result<(), Error> {
        let mmu = self.mmu_of(device)?;
        let engine = self.engine();
        let bad = || Error::BadRange { what: format!("{len} bytes at {start:p}"), why: "the range wraps" };
        let range = VaRange::new(Va(start as u64), len as u64).ok_or_else(bad)?;
        let pages = engine.geometry.pages_out(range);
        let mut at = pages.start;
        while at < pages.end {
            let got =
                without_signals(|| engine.bring_to_device(mmu, at, DeviceAccess::Atomic, (Bring::Here, CLUSTER)));
            let got = got.map_err(|e| self.not_moved(range, Node::Device(device), &e))?;
            at = at + got.0;
        }
        Ok(())
    }

    /// Copies bytes of managed memory, wherever both ends are: what is on devices stays there, and goes from one to the other
    /// without the host where they can (rule G8). Other threads see it piece by piece.
    ///
    /// # Safety
    /// Nobody has a reference to the destination's bytes, nor writes to those of either end, until this returns.
    ///
    /// # Errors
    /// [`Error::BadRange`] where the two overlap, or one is not managed by this space; [`Error::Lost`] when a page is. What
    /// comes before is copied then.
    pub unsafe fn copy(&self, to: *mut u8, from: *const u8, len: usize) -> Result<(), Error> {
        self.copy_bytes(to as u64, from as u64, len)
    }

    fn copy_bytes(&self, to: u64, from: u64, len: usize) -> Result<(), Error> {
        let bad = |why| Error::BadRange { what: format!("{len} bytes from {from:#x} to {to:#x}"), why };
        let range = |at| VaRange::new(Va(at), len as u64).ok_or_else(|| bad("a range wraps"));
        let (dst, src) = (range(to)?, range(from)?);
        if len > 0 && dst.overlaps(src) {
            return Err(bad("the ranges overlap"));
        }
        let no_memory = |why| Error::Kernel { what: "map a buffer to copy through".into(), why };
        let mut through = Through::new().map_err(no_memory)?;
        // Signals wait for one piece at a time.
        let piece = 4 << 20;
        for at in (0..len as u64).step_by(piece) {
            let n = (len as u64 - at).min(piece as u64);
            let engine = self.engine();
            without_signals(|| engine.copy(Va(to + at), Va(from + at), n, &mut through))
                .map_err(|e| self.cannot_hold(e, &bad))?;
        }
        Ok(())
    }

    /// The number of the MMU of device `id`.
    pub(crate) fn mmu_of(&self, id: DeviceId) -> Result<MmuId, Error> {
        let engine = self.engine();
        let tier = engine.tiers.by_id(id.0).ok_or(Error::NoSuchDevice)?;
        tier.mmu_id().ok_or_else(|| Error::Device {
            name: tier.info.name.clone(),
            why: "it runs no code: pages are sent there by Region::migrate_to".into(),
        })
    }

    pub(crate) fn place_of(&self, node: Node) -> Result<Place, Error> {
        Ok(match node {
            Node::Host => Place::Host,
            Node::Device(id) => Place::Mmu(self.mmu_of(id)?),
        })
    }

    pub(crate) fn name_of(&self, node: Node) -> String {
        match node {
            Node::Host => "RAM".into(),
            Node::Device(id) => match self.engine().tiers.by_id(id.0) {
                Some(tier) => format!("device {}", tier.info.name),
                None => "a device that is gone".into(),
            },
        }
    }

    fn not_moved(&self, range: VaRange, to: Node, why: &FaultError) -> Error {
        Error::Migrate { range, to: self.name_of(to), why: why.to_string() }
    }

    /// A device has gone: no hint names it any more.
    pub(crate) fn forget_hints(&self, mmu: MmuId) {
        let engine = self.engine();
        let regions: Vec<_> =
            engine.regions.iter().filter(|r| r.attributes.without_mmu(mmu) != r.attributes).collect();
        for region in regions {
            // Refused for a region that has gone meanwhile.
            let _ = without_signals(|| engine.advise(region.range, |a| a.without_mmu(mmu)));
        }
    }
}

impl Region {
    /// Has a part of the region sent to where it is going to be used: see [`Space::prefetch`].
    ///
    /// # Errors
    /// As for [`Space::prefetch`]; [`Error::BadRange`] when `part` does not lie inside the region.
    pub fn prefetch(&self, part: Range<usize>, to: Node) -> Result<Prefetch, Error> {
        let range = self.part(part)?;
        self.space().prefetch(range.start.0 as *const u8, range.len() as usize, to)
    }

    /// Gives a device sole access to a part of the region: see [`Space::exclusive`].
    ///
    /// # Errors
    /// As for [`Space::exclusive`]; [`Error::BadRange`] when `part` does not lie inside the region.
    pub fn exclusive(&self, part: Range<usize>, device: DeviceId) -> Result<(), Error> {
        let range = self.part(part)?;
        self.space().exclusive(range.start.0 as *const u8, range.len() as usize, device)
    }

    /// Says what devices may do with a part of the region, in whole pages: with [`Use::Read`] a write of a device is an error
    /// ([`FaultError::ReadOnly`], rule G4). The CPU may write as before.
    ///
    /// # Errors
    /// [`Error::BadRange`] when `part` does not lie inside the region, or the space has as many regions as it can have.
    pub fn allow_devices(&self, part: Range<usize>, how: Use) -> Result<(), Error> {
        let range = self.part(part)?;
        let engine = self.space().engine();
        let pages = engine.geometry.pages_inside(range);
        let change = |a: Attributes| match how {
            Use::Read => a.with(Attributes::DEVICES_READ),
            Use::Write => a.without(Attributes::DEVICES_READ),
        };
        let full =
            |_| Error::BadRange { what: format!("{range}"), why: "the space has as many regions as it can have" };
        without_signals(|| {
            engine.advise(pages, change).map_err(full)?;
            // What they have mapped already they ask for again.
            engine.recall_pages(pages);
            Ok(())
        })
    }

    /// Copies bytes of another region to `at` of this one, wherever both are: see [`Space::copy`].
    ///
    /// # Errors
    /// As for [`Space::copy`]; [`Error::BadRange`] when a range does not lie inside its region, or the regions are of different
    /// spaces.
    pub fn copy_from(&mut self, at: usize, from: &Region, part: Range<usize>) -> Result<(), Error> {
        let src = from.part(part)?;
        let dst = self.part(at..at.saturating_add(src.len() as usize))?;
        if self.space().engine().kernel.staging() != from.space().engine().kernel.staging() {
            return Err(Error::BadRange {
                what: format!("{src} of another space"),
                why: "both ends of a copy belong to one space",
            });
        }
        self.space().copy_bytes(dst.start.0, src.start.0, src.len() as usize)
    }
}

impl Adopted {
    /// Has the memory sent to where it is going to be used: see [`Space::prefetch`].
    ///
    /// # Errors
    /// As for [`Space::prefetch`].
    pub fn prefetch(&self, to: Node) -> Result<Prefetch, Error> {
        let range = self.range();
        self.space().prefetch(range.start as *const u8, range.len(), to)
    }
}
