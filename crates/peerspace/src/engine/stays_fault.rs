//! Devices in memory that [stays](super::stays) where it is: their faults, their accesses, and how translations are taken away.
//!
//! ```text
//!  fault -> lock the entry, look again -> what is mapped there, and may it be done? -> has the kernel the page there? -> enter
//! ```
//!
//! To have the page there may take the kernel as long as a file system takes; so that is asked for with nothing locked, and
//! everything looked at again. An access through the port waits for nothing: where the page is not there, the device faults.

use super::Engine;
use super::context::Working;
use super::device_fault::PATIENCE;
use super::device_step::FRUITLESS;
use super::tier::{Closed, Tier};
use crate::device::mmu::{DeviceAccess, Mapping, Target};
use crate::device::port::FaultError;
use crate::waited::Waited;
use peerspace_core::addr::{Access, BLOCK_PAGES, PageRange, Pages, Vpn};
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::{Ordering, Ordering::Relaxed, fence};
use peerspace_os::Kernel;

/// What comes after an attempt.
enum Next {
    /// The device has it: so many pages from the one that was asked for on.
    Done(Pages),
    /// Look again.
    Again,
    /// Have the kernel bring these pages first, the one that was asked for at least.
    Reach(PageRange),
    /// Nothing is mapped there.
    Unmapped,
    /// The mappings of the program are changing: wait for that.
    Changing,
    /// The program has said that it is about to change what is there: wait until it has.
    Announced,
    /// It is no memory in place.
    Other,
    Fail(FaultError),
}

impl<K: Kernel> Engine<K> {
    /// Has the device with `mmu` map the page at `vpn` where it stays, for `access`. Returns how many pages from there on it has
    /// now; `None` where it does not stay any more. `most`: so many are going to be asked for.
    pub(super) fn bring_in_place(
        &self,
        mmu: MmuId,
        vpn: Vpn,
        access: DeviceAccess,
        most: Pages,
    ) -> Option<Result<Pages, FaultError>> {
        let va = self.geometry.va(vpn);
        let mut waited = Waited::new();
        let mut reached = false;
        while waited.so_far() < PATIENCE {
            let next = {
                let work = self.contexts.take();
                // Not while it is being taken away: what it was given now would be left over.
                match self.tiers.open_by_mmu(mmu).filter(|tier| !tier.has_failed()) {
                    Some(tier) => self.attempt_in_place(&tier, vpn, access, (most, reached), &work),
                    None => Next::Fail(FaultError::Cut),
                }
            };
            match next {
                Next::Done(pages) => return Some(Ok(pages)),
                Next::Fail(e) => return Some(Err(e)),
                Next::Other => return None,
                Next::Again => {}
                Next::Changing => self.wait_for_changes(),
                // However long the program takes.
                Next::Announced => {
                    self.await_announced(PageRange::new(vpn, Pages(1)));
                    waited = Waited::new();
                }
                Next::Unmapped if self.forget_unmapped(vpn) => return Some(Err(FaultError::NotManaged(va.0))),
                Next::Unmapped => crate::sync::yield_now(),
                Next::Reach(pages) => match self.have_there(pages, access) {
                    true => reached = true,
                    false if self.look_for_stale(vpn) => {}
                    // What has changed since is found out below; what has not stays as it is.
                    false if reached => {}
                    false => {
                        if let Some(e) = self.why_not(vpn, access) {
                            return Some(Err(e));
                        }
                    }
                },
            }
        }
        Some(Err(FaultError::NoHeadway(va.0)))
    }

    /// Has the kernel bring the first of `pages`, and the others if they are only to be read and it can. Whether it has.
    fn have_there(&self, pages: PageRange, access: DeviceAccess) -> bool {
        let first = PageRange::new(pages.start, Pages(1));
        let all = if access.writes() { first } else { pages };
        let there = |pages| self.kernel.is_accessible(self.addresses(pages), access.writes());
        there(all) || all != first && there(first)
    }

    /// Why the page at `vpn`, which is mapped, cannot be had; `None` if that may have changed.
    fn why_not(&self, vpn: Vpn, access: DeviceAccess) -> Option<FaultError> {
        let va = self.geometry.va(vpn);
        let needs = if access.writes() { Access::Write } else { Access::Read };
        match self.mapped_at(va) {
            Ok(Some(mapped)) if mapped.allowed == Some(Access::Write) || mapped.allowed == Some(needs) => {
                Some(FaultError::Unreachable(va.0))
            }
            _ => None,
        }
    }

    /// Forgets the region at `vpn` if it is stale. Whether it was.
    fn look_for_stale(&self, vpn: Vpn) -> bool {
        let _work = self.contexts.take();
        let _changes = self.region_changes.lock();
        let stale = self
            .region(vpn)
            .is_some_and(|region| region.attributes.has(Attributes::IN_PLACE) && self.is_stale(region, vpn));
        if stale {
            self.forget_stale_at(vpn);
        }
        stale
    }

    fn attempt_in_place(
        &self,
        tier: &Tier<K::Words>,
        vpn: Vpn,
        access: DeviceAccess,
        (most, reached): (Pages, bool),
        work: &Working<'_>,
    ) -> Next {
        let va = self.geometry.va(vpn);
        let Some(mmu) = &tier.mmu else { return Next::Fail(FaultError::Cut) };
        let Some(region) = self.region(vpn).filter(|r| r.attributes.has(Attributes::IN_PLACE)) else {
            return Next::Other;
        };
        if !mmu.info.remote {
            return Next::Fail(FaultError::NoWay(va.0));
        }
        if access == DeviceAccess::Atomic {
            return Next::Fail(FaultError::Stays(va.0));
        }
        let read_only = region.attributes.has(Attributes::DEVICES_READ);
        if access.writes() && read_only {
            return Next::Fail(FaultError::ReadOnly(va.0));
        }
        let Ok(entry) = self.table.lock(vpn) else { return Next::Again };
        // A fork takes all translations away when nobody enters any more; nothing is taken of the device for this one.
        if tier.closed() == Some(Closed::Leaving) {
            return Next::Fail(FaultError::Cut);
        }
        if self.region(vpn) != Some(region) {
            return Next::Again;
        }
        if self.announcements.concern(PageRange::new(vpn, Pages(1))) {
            return Next::Announced;
        }
        if !self.gate.is_idle() {
            // If it has the translation, its accesses are refused as long as a change is acted on.
            return Next::Changing;
        }
        let mapped = match self.mapped_at(va) {
            Ok(Some(mapped)) => mapped,
            // The news is on the way.
            Ok(None) if self.gate.enter(work.context()).is_none() || self.kernel.is_changing() => {
                return Next::Changing;
            }
            Ok(None) => return Next::Unmapped,
            Err(_) => return Next::Again,
        };
        let writable = match mapped.allowed {
            None => return Next::Fail(FaultError::Protected(va.0)),
            Some(Access::Read) if access.writes() => return Next::Fail(FaultError::ReadOnly(va.0)),
            Some(allowed) => allowed == Access::Write && !read_only,
        };
        let block = PageRange::block(vpn.block());
        if !reached {
            let mapped = self.geometry.pages_inside(mapped.range);
            let near = PageRange::new(vpn, most.max(Pages(1)));
            return Next::Reach(near.intersect(block).intersect(region.range).intersect(mapped));
        }
        let whole = region.range.covers(block)
            && self.geometry.pages_inside(mapped.range).covers(block)
            && !self.announcements.concern(block);
        let pages = if whole { block } else { PageRange::new(vpn, Pages(1)) };
        let range = self.addresses(pages);
        mmu.counters.remote.fetch_add(1, Relaxed);
        match tier.enter(&[Mapping { va: range.start.0, bytes: range.len(), to: Target::Host, writable }]) {
            Ok(true) => {}
            failed => {
                tier.unmap(range);
                return failed.map_or_else(|e| Next::Fail(FaultError::Device(va.0, e)), |_| Next::Changing);
            }
        }
        drop(entry);
        if mmu.note_in_place(vpn, FRUITLESS) {
            return Next::Fail(FaultError::NoHeadway(va.0));
        }
        Next::Done(Pages(pages.end - vpn))
    }

    /// Whether the device of `tier` may access the page at `vpn`, which the table knows nothing of, where it stays. In a section.
    pub(super) fn may_access_in_place(&self, tier: &Tier<K::Words>, vpn: Vpn) -> bool {
        self.region(vpn).is_some_and(|r| r.attributes.has(Attributes::IN_PLACE))
            && !self.announcements.concern(PageRange::new(vpn, Pages(1)))
            && tier.mmu.as_ref().is_some_and(|mmu| mmu.info.remote)
            // Otherwise the kernel might take long, and whoever changes mappings waits for this section.
            && self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(false)
    }

    /// Takes the translations of all devices for `pages`, which are in place, away, and waits for their accesses.
    pub(super) fn withdraw(&self, pages: PageRange) {
        let range = self.addresses(pages);
        if self.tiers.any_mmu() {
            self.tiers.iter().for_each(|tier| tier.unmap(range));
            self.drain_remote();
        }
    }

    /// The same for `pages` that are no region any more: no translation is entered from here on.
    pub(super) fn withdraw_gone(&self, pages: PageRange) {
        // Pairs with the lock of an entry: whoever locks one from here on finds no region.
        fence(Ordering::SeqCst);
        // A translation may be of the whole block, and only one page of that be locked.
        let last = Vpn(pages.end.0 - 1).block_start() + BLOCK_PAGES;
        self.recall_where(PageRange { start: pages.start.block_start(), end: last }, |_| false);
        self.withdraw(pages);
    }

    /// The same for what is in place of `pages`, and stays a region: what devices may have kept of it is void.
    pub(super) fn withdraw_in_place(&self, pages: PageRange) {
        self.in_place_parts(pages).for_each(|piece| self.withdraw(piece));
    }
}
