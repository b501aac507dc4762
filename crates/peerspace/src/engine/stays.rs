//! Memory of the program that stays where it is (rule G11): shared memory, files, huge pages of the kernel's pool, whatever the
//! kernel keeps and nobody can take out of a mapping. Devices access it in place, through their ports.
//!
//! Such memory is a region like any other, so that a device's pointer finds it; but no page of it has a state. The table's
//! entries are empty, and what there is to know about a page the kernel knows: whether it is there, and what may be done
//! with it. A fault of a device asks that, has the kernel bring the page, and enters a translation to the host. A fault of the
//! CPU never comes here; one that does is none of ours.
//!
//! # Who is told of what
//!
//! Nobody notes which device has a translation of what. So whatever takes translations away takes them from all devices
//! ([`Engine::withdraw`]). What the program does to mappings is told by messages where the kernel can be asked to
//! ([`Kernel::watch`]): of nearly everything from Linux 6.7 on, of shared memory alone before. Where it tells nothing a region may be *stale*: it outlives its mapping, until somebody
//! finds nothing there, or something else that is to be managed. No harm comes of that: each access of a device goes through
//! the kernel, which looks at the mapping as it is, and its permissions, and says where there is none.
//!
//! # Locks
//!
//! A translation is entered with the entry of the page locked, and after another look at the region. Whoever takes a region
//! away does that first, then waits for those who have an entry of it locked, and then takes the translations: so none is left
//! over. Accesses under way are waited for as those to other memory are ([`super::mmus`]).

use super::adopt::AdoptError;
use super::context::Working;
use super::fault::{Fault, Hold, Outcome, Patience};
use super::{AddError, Engine};
#[cfg(feature = "devices")]
use peerspace_core::addr::Va;
use peerspace_core::addr::{PageRange, Pages, VaRange, Vpn};
use peerspace_core::regions::{Attributes, RegionError, RegionInfo};
use peerspace_os::Kernel;

impl<K: Kernel> Engine<K> {
    /// Has devices access `range`, which the program has mapped and the kernel keeps, where it is.
    ///
    /// Not for threads that receive messages.
    pub(crate) fn adopt_in_place(&self, range: VaRange) -> Result<(), AdoptError> {
        let pages = self.geometry.pages_inside(range);
        loop {
            // News of an older mapping at the same place must not hit the new one.
            self.settle_changes();
            let _work = self.contexts.take();
            let _changes = self.region_changes.lock();
            if self.settled().is_none() {
                continue;
            }
            let new = self.cover(pages).map_err(AdoptError::Table)?;
            self.insert_region(pages, Attributes::IN_PLACE, new).map_err(AdoptError::Table)?;
            // A region first, so that news of it finds it.
            self.each_mapping(range, |part| {
                if self.kernel.watch(part).is_ok() {
                    // Without room for that it counts as one of which nothing is told: right, if of little use.
                    let _ = self.regions.update(self.geometry.pages_inside(part), |a| a.with(Attributes::WATCHED));
                }
            });
            return Ok(());
        }
    }

    /// Calls `each` with what of `range` belongs to one mapping.
    fn each_mapping(&self, range: VaRange, mut each: impl FnMut(VaRange)) {
        let mut at = range.start;
        while at < range.end
            && let Ok(Some(mapped)) = self.kernel.mapped_from(at)
            && mapped.range.start < range.end
        {
            let part = VaRange { start: mapped.range.start.max(at), end: mapped.range.end.min(range.end) };
            each(part);
            at = part.end;
        }
    }

    /// Undoes [`adopt_in_place`](Engine::adopt_in_place) for `pages`.
    pub(crate) fn disown_in_place(&self, pages: PageRange) {
        let _work = self.contexts.take();
        for RegionInfo { range: piece, attributes } in self.pieces(pages) {
            {
                let _changes = self.region_changes.lock();
                self.forget_in_place(piece, |r| r.attributes == attributes);
            }
            if attributes.has(Attributes::IN_PLACE.with(Attributes::WATCHED)) {
                // Refused where it is mapped no longer: there is nothing to be undone then.
                self.each_mapping(self.addresses(piece), |part| {
                    let _ = self.kernel.unwatch(part);
                });
            }
        }
    }

    /// Where the memory ends that stays where it is, if `vpn` lies in any.
    pub(super) fn end_in_place(&self, vpn: Vpn) -> Option<Vpn> {
        self.region(vpn).filter(|r| r.attributes.has(Attributes::IN_PLACE)).map(|r| r.range.end)
    }

    /// The parts of `pages` that stay where they are.
    pub(crate) fn in_place_parts(&self, pages: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        self.pieces(pages).filter(|r| r.attributes.has(Attributes::IN_PLACE)).map(|r| r.range)
    }

    /// Forgets such parts of `pages` that stay where they are. The caller has a context, holds `region_changes`, and has no
    /// entry locked.
    fn forget_in_place(&self, pages: PageRange, such: impl Fn(RegionInfo) -> bool) -> bool {
        let mut any = false;
        for RegionInfo { range: piece, attributes } in self.pieces(pages) {
            if !attributes.has(Attributes::IN_PLACE) || !such(RegionInfo { range: piece, attributes }) {
                continue;
            }
            // A failure means that there are more regions than a process can have mappings.
            let removed = self.regions.remove(piece, |_| {});
            debug_assert!(removed.is_ok(), "{removed:?}");
            self.withdraw_gone(piece);
            self.release_table_here(piece);
            any = true;
        }
        any
    }

    /// Forgets what is stale of `pages`, where something else has just been found to be mapped. Returns whether there was any.
    /// The caller has a context, and holds `region_changes`.
    pub(super) fn forget_stale(&self, pages: PageRange) -> bool {
        self.forget_in_place(pages, |r| !r.attributes.has(Attributes::WATCHED))
    }

    /// Covers `pages`, and makes a region of them, where a mapping is that is known to be another than any before: what nobody has said is gone does not stand in its way. The caller has a context, and holds `region_changes`.
    pub(super) fn insert_fresh_region(&self, pages: PageRange, attributes: Attributes) -> Result<(), AddError> {
        let insert = || self.cover(pages).and_then(|new| self.insert_region(pages, attributes, new));
        match insert() {
            Err(AddError::Region(RegionError::Overlap(_))) if self.forget_stale(pages) => insert(),
            inserted => inserted,
        }
    }

    /// A fault of the CPU in a region in which none is ours to resolve.
    #[cold]
    pub(super) fn fault_elsewhere(
        &self,
        region: RegionInfo,
        fault: &Fault,
        _work: &Working<'_>,
    ) -> Result<Outcome, Hold> {
        let page = PageRange::new(fault.vpn, Pages(1));
        if !region.attributes.has(Attributes::IN_PLACE) {
            // Too late: nobody refers to it any more. Whoever does all the same faults again, until it is unmapped.
            let _ = self.kernel.wake(self.addresses(page));
            return Ok(Outcome::Resolved);
        }
        if !self.is_stale(region, fault.vpn) {
            return Ok(Outcome::Foreign);
        }
        if fault.patience == Patience::Never {
            return Err(Hold::Busy);
        }
        let Some(_changes) = self.region_changes.try_lock() else { return Err(Hold::Busy) };
        self.forget_stale_at(fault.vpn);
        Err(Hold::Again)
    }

    /// Whether at `vpn` of `region`, which is in place, private anonymous memory has taken the place of what was there.
    pub(super) fn is_stale(&self, region: RegionInfo, vpn: Vpn) -> bool {
        let unseen = !region.attributes.has(Attributes::WATCHED);
        unseen && matches!(self.kernel.mapping_at(self.geometry.va(vpn)), Ok(Some(_)))
    }

    /// Forgets what is stale around `vpn`. The caller has a context, and holds `region_changes`.
    pub(super) fn forget_stale_at(&self, vpn: Vpn) {
        if let Ok(Some(range)) = self.kernel.mapping_at(self.geometry.va(vpn)) {
            self.forget_stale(self.geometry.pages_inside(range));
        }
    }

    /// Forgets the region at `vpn`, in place, as far as nothing is mapped there from `vpn` on. False if something is.
    #[cfg(feature = "devices")]
    pub(super) fn forget_unmapped(&self, vpn: Vpn) -> bool {
        let _work = self.contexts.take();
        let _changes = self.region_changes.lock();
        let Some(region) = self.region(vpn).filter(|r| r.attributes.has(Attributes::IN_PLACE)) else { return true };
        let end = match self.kernel.mapped_from(self.geometry.va(vpn)) {
            Err(_) => return false,
            Ok(None) => region.range.end,
            Ok(Some(next)) => self.geometry.vpn(next.range.start).min(region.range.end),
        };
        vpn < end && self.forget_in_place(PageRange { start: vpn, end }, |_| true)
    }

    /// The mapping at `va`, whatever it maps.
    #[cfg(feature = "devices")]
    pub(super) fn mapped_at(&self, va: Va) -> Result<Option<peerspace_os::Mapped>, peerspace_os::Trouble> {
        Ok(self.kernel.mapped_from(va)?.filter(|mapped| mapped.range.contains(va)))
    }
}
