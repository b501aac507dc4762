//! Where pages are, and putting them there by hand: migration of exactly the pages that somebody names (rules G8, Z5).

use crate::adopt::Adopted;
use crate::attach::DeviceId;
use crate::device::MemoryType;
use crate::engine::send::{NotSent, Sending, To};
use crate::error::Error;
use crate::peers::Node;
use crate::region::Region;
use crate::space::Space;
use peerspace_core::addr::{PageRange, Pages, Va, VaRange, Vpn};
use peerspace_os::linux::signal::without_signals;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

impl Space {
    /// Moves the pages that `len` bytes at `start` touch to `to`, and no others; returns when that is done, with how many bytes of
    /// these pages are there.
    ///
    /// To a device go pages that were never touched, too: as zeros. On the host, pages are mapped on the CPU again, as if it
    /// had touched them; of memory that nobody has touched there is nothing to be moved. Blocks (of 2 MiB, with pages of
    /// 4 KiB) that lie inside go as huge folios where there is room for such, everything else in small pages (rule H2).
    ///
    /// On a [coherent](MemoryType::Coherent) device they are used in place from then on (rule Z5), where that may be: in regions
    /// of the space's own, and in adopted memory whose changes are [announced](Space::promise_announcements). Runs of pages that
    /// follow each other on the device as well share one of the mappings that a process may have.
    ///
    /// Pages of adopted memory that the program may only read go where changes are announced, and to private memory.
    ///
    /// A page that somebody relies on stays where it is, and the others go: what is kept resident, held by a launch, on a
    /// named region's device, more than the device has room for, or memory that stays in any case
    /// ([`Adopted::in_place`](crate::Adopted::in_place)). [`prefetch`](Space::prefetch) does not wait, and
    /// rounds out to blocks.
    ///
    /// # Errors
    /// [`Error::BadRange`] where part of the range is not managed by this space; nothing has moved then.
    /// [`Error::NoSuchDevice`], and [`Error::Device`] for one that runs no code (see [`Region::migrate_to`]).
    /// [`Error::Migrate`] with the first page for which the device failed, or that it cannot reach; [`Error::Lost`] with the first
    /// that is lost. All others have gone that can.
    pub fn migrate(&self, start: *const u8, len: usize, to: Node) -> Result<usize, Error> {
        let goal = match to {
            Node::Host => To::Host,
            Node::Device(id) => match self.engine().tiers.by_id(id.0).map(|tier| tier.info.memory) {
                Some(MemoryType::Coherent) => To::Place(id.0),
                _ => To::Mmu(self.mmu_of(id)?),
            },
        };
        let pages = self.managed(start, len)?;
        let engine = self.engine();
        let mut sending = Sending::new();
        // Signals wait for one block at a time.
        for piece in pages.by_block() {
            without_signals(|| engine.send_pages(piece, goal, &mut sending));
        }
        let mut there = engine.count_sent(pages, goal);
        if goal != To::Host && there < pages.pages() && sending.again() {
            for piece in pages.by_block() {
                without_signals(|| {
                    if engine.count_sent(piece, goal) < piece.pages() {
                        engine.send_pages(piece, goal, &mut sending);
                    }
                });
            }
            there = engine.count_sent(pages, goal);
        }
        match sending.wrong() {
            None => Ok(engine.geometry.bytes(there) as usize),
            Some(NotSent::Lost(vpn, pfn)) => Err(self.lost(vpn, pfn)),
            Some(NotSent::Failed(vpn, why)) => {
                let range = engine.addresses(PageRange::new(vpn, Pages(1)));
                Err(Error::Migrate { range, to: self.name_of(to), why: why.to_string() })
            }
        }
    }

    /// Promises that from now on every change of adopted memory is [announced](Space::announce) before it is made: by `munmap`,
    /// `mremap`, `mprotect`, `madvise`, `brk`, or by mapping something else there, by whatever thread. Then pages of it can be
    /// [used in place](Space::migrate) on coherent devices, for which the program's own mapping is replaced for a while; and pages of
    /// memory that the program may only read can migrate, for which its permissions change for a moment.
    ///
    /// # Safety
    /// It is kept as long as the space manages memory: what somebody else had mapped there unheard would be replaced, and its
    /// content lost. The memory is not locked (`mlock`), and nothing relies on its mapping being anonymous, or on what `madvise`
    /// has said of it.
    pub unsafe fn promise_announcements(&self) {
        self.engine().announcements.promise();
    }

    /// Has everything leave a device's memory; it stays attached, and in use. What it alone held is in RAM then, mapped or on
    /// standby, or where it goes from there for want of room. Returns how many bytes left its memory.
    ///
    /// What a launch holds stays, and what the device itself or somebody's migration brings there meanwhile.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`]; [`Error::NoRoom`] when there is neither RAM nor another device to take it;
    /// [`Error::Device`] for a persistent device with regions that are open.
    pub fn evict(&self, device: DeviceId) -> Result<usize, Error> {
        let engine = self.engine();
        match without_signals(|| engine.empty_device(device.0)) {
            Ok(pages) => Ok(engine.geometry.bytes(pages) as usize),
            Err(e) => Err(self.not_detached(device, e)),
        }
    }

    /// Has the next huge folio that somebody wants at `node` refused, once: small pages have to do then (rule H2). For tests of
    /// programs and devices.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`].
    pub fn refuse_next_block(&self, node: Node) -> Result<(), Error> {
        let engine = self.engine();
        match node {
            Node::Host => engine.refuses_block.store(true, Relaxed),
            Node::Device(id) => engine.tiers.by_id(id.0).ok_or(Error::NoSuchDevice)?.refuse_block(),
        }
        Ok(())
    }

    /// The pages that `len` bytes at `start` touch, all of which the space manages.
    fn managed(&self, start: *const u8, len: usize) -> Result<PageRange, Error> {
        let engine = self.engine();
        let what = || format!("{len} bytes at {start:p}");
        let range = VaRange::new(Va(start as u64), len as u64)
            .ok_or_else(|| Error::BadRange { what: what(), why: "the range wraps" })?;
        if range.is_empty() {
            return Ok(PageRange { start: Vpn(0), end: Vpn(0) });
        }
        let pages = engine.geometry.pages_out(range);
        match without_signals(|| engine.first_unmanaged(pages)) {
            None => Ok(pages),
            Some(vpn) => Err(Error::BadRange {
                what: format!("{}: the page at {}", what(), engine.geometry.va(vpn)),
                why: "it is not managed by this space",
            }),
        }
    }
}

impl Region {
    /// Moves the pages that a part of the region touches: see [`Space::migrate`].
    ///
    /// # Errors
    /// As for [`Space::migrate`]; [`Error::BadRange`] when `part` does not lie inside the region.
    pub fn migrate(&self, part: Range<usize>, to: Node) -> Result<usize, Error> {
        let range = self.part(part)?;
        self.space().migrate(range.start.0 as *const u8, range.len() as usize, to)
    }
}

impl Adopted {
    /// Moves the memory: see [`Space::migrate`].
    ///
    /// # Errors
    /// As for [`Space::migrate`].
    pub fn migrate(&self, to: Node) -> Result<usize, Error> {
        let range = self.range();
        self.space().migrate(range.start as *const u8, range.len(), to)
    }
}
