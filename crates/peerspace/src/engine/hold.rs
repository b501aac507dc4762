//! Pages held where they are, because somebody outside relies on it (rule H5): the kernel, or a device.
//!
//! A pin belongs to a folio. Whoever holds a range pins each folio of it once, whether it is mapped whole or page by page;
//! so it makes no difference if the mapping of one is split in between. The folio itself cannot be split meanwhile, is
//! not collapsed into another, and does not leave RAM.

use super::fault::{Outcome, Patience};
use super::{Engine, Entry};
use peerspace_core::addr::{Access, BLOCK_PAGES, DevicePfn, PageRange, Pages, Vpn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::folio::TooManyPins;
use peerspace_core::memmap::{Arrival, Frame};
use peerspace_core::plan::CLUSTER;
use peerspace_core::regions::Attributes;
use peerspace_os::{Kernel, Trouble, Wake};

/// A page cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HoldError {
    /// Its data is gone (rule Z9), with this page of a device.
    Lost(Vpn, DevicePfn),
    /// It lies in no region of the space.
    Foreign(Vpn),
    /// As many users rely on it as can be counted.
    TooMany(Vpn),
    /// It is in place on a device, and cannot be migrated out of there, for this reason.
    Stays(Vpn, Trouble),
    /// It is mapped and stays where it is, but cannot be accessed.
    Unreachable(Vpn),
}

/// The folios of a range, one after the other: which of them was pinned last.
#[derive(Debug, Default)]
struct Walk {
    /// A huge folio; single pages are folios of their own.
    last: Option<Frame>,
}

impl Walk {
    /// Whether `folio` is met for the first time.
    fn is_new(&mut self, folio: Frame, huge: bool) -> bool {
        let new = !huge || self.last != Some(folio);
        if huge {
            self.last = Some(folio);
        }
        new
    }
}

impl<K: Kernel> Engine<K> {
    /// Makes `pages` resident, with permission for `access`, and keeps them so until [`let_go`](Engine::let_go).
    ///
    /// # Errors
    /// [`HoldError`]; nothing is held then.
    pub(crate) fn hold_pages(&self, pages: PageRange, access: Access) -> Result<(), HoldError> {
        let mut walk = Walk::default();
        let mut at = pages.start;
        while at < pages.end {
            match self.hold_at(at, access, &mut walk) {
                Ok(next) => at = next,
                Err(e) => {
                    self.let_go(PageRange { start: pages.start, end: at });
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Holds the page at `vpn`, or the block that it is mapped with. Returns what comes next.
    fn hold_at(&self, vpn: Vpn, access: Access, walk: &mut Walk) -> Result<Vpn, HoldError> {
        let mut faulted = false;
        loop {
            // The kernel keeps it, and brings it for whoever wants it.
            if let Some(end) = self.end_in_place(vpn) {
                return Ok(end);
            }
            let work = self.contexts.take();
            let Ok(entry) = self.table.lock(vpn) else { return Err(HoldError::Foreign(vpn)) };
            match entry.state() {
                // What is mapped takes no fault, unless the table does not know yet of something that the program has done.
                State::Host { writable, .. } | State::Shared { writable, .. }
                    if (writable || access == Access::Read) && (faulted || self.gate.turn_if_open().is_some()) =>
                {
                    self.pin_mapped(&entry, walk).map_err(|TooManyPins| HoldError::TooMany(vpn))?;
                    return Ok(entry.range().end);
                }
                // It stays where it is for good.
                State::Coherent { pfn } if self.is_persistent(vpn) => {
                    let page = self.addresses(PageRange::new(vpn, Pages(1)));
                    let fine = self.kernel.is_accessible(page, access == Access::Write);
                    return if fine { Ok(vpn + 1) } else { Err(HoldError::Lost(vpn, pfn)) };
                }
                // A pin for long migrates it out (rule Z5).
                State::Coherent { pfn } => {
                    drop((entry, work));
                    self.leave_place(pfn, vpn).map_err(|why| HoldError::Stays(vpn, why))?;
                    continue;
                }
                // A native page: it is there, but the table knows nothing of it yet.
                State::Empty if faulted => self.track_native(entry),
                State::Poisoned { pfn } if faulted => return Err(HoldError::Lost(vpn, pfn)),
                // Not there, or gone again before it could be held.
                _ => drop(entry),
            }
            drop(work);
            let va = self.geometry.va(vpn);
            if let Ok(Outcome::Foreign) = self.fault(va, access, Wake::Yes, Patience::Waits) {
                return Err(HoldError::Foreign(vpn));
            }
            faulted = true;
        }
    }

    /// The folio that the locked `entry` maps, and whether it is a huge one.
    fn folio_at(&self, entry: &Entry<'_, K>) -> Option<(Frame, bool)> {
        let (State::Host { pfn, .. } | State::Shared { pfn, .. }) = entry.state() else { return None };
        let frame = if entry.is_whole() { self.memmap.block(pfn) } else { self.memmap.head(self.memmap.page(pfn)) };
        Some((frame, self.memmap.is_block(frame)))
    }

    fn pin_mapped(&self, entry: &Entry<'_, K>, walk: &mut Walk) -> Result<(), TooManyPins> {
        let (folio, huge) = self.folio_at(entry).expect("the page is mapped");
        if walk.is_new(folio, huge) { self.memmap.folio(folio).pin() } else { Ok(()) }
    }

    /// Holds some pages at the start of `pages`, to be copied and [let go](Engine::let_go_some): the block of the first if
    /// that is mapped whole, else a few single pages. Returns what is held. Pages that are mapped already take no fault.
    ///
    /// # Errors
    /// [`HoldError`] for the first page; nothing is held then.
    pub(crate) fn hold_some(&self, pages: PageRange, access: Access) -> Result<PageRange, HoldError> {
        if let Some(end) = self.end_in_place(pages.start) {
            let page = self.addresses(PageRange::new(pages.start, Pages(1)));
            return match self.kernel.is_accessible(page, access == Access::Write) {
                true => Ok(PageRange { start: pages.start, end: end.min(pages.end) }),
                false => Err(HoldError::Unreachable(pages.start)),
            };
        }
        if let Some(held) = self.hold_mapped(pages, access) {
            return Ok(held);
        }
        // What became of it is found out below.
        let _ = self.fault(self.geometry.va(pages.start), access, Wake::Yes, Patience::Waits);
        if let Some(held) = self.hold_mapped(pages, access) {
            return Ok(held);
        }
        // What is in place for good, and could not be held there.
        if let Some(State::Coherent { pfn }) = self.table.look(pages.start).map(|(entry, _)| entry.state())
            && self.is_persistent(pages.start)
        {
            return Err(HoldError::Lost(pages.start, pfn));
        }
        let end = self.hold_at(pages.start, access, &mut Walk::default())?;
        Ok(PageRange { start: pages.start, end: end.min(pages.end) })
    }

    /// The same for what is mapped already; `None` if the first page is not, or may not be accessed so.
    fn hold_mapped(&self, pages: PageRange, access: Access) -> Option<PageRange> {
        let _work = self.contexts.take();
        let mut walk = Walk::default();
        let mut held = PageRange { start: pages.start, end: pages.start };
        while held.end < pages.end && held.pages() < CLUSTER {
            let Ok(entry) = self.table.lock(held.end) else { break };
            // Alone, as what comes before it in RAM is.
            if let (State::Coherent { pfn }, true) = (entry.state(), held.is_empty()) {
                return self.hold_in_place(pfn, &entry, pages, access == Access::Write);
            }
            let (State::Host { writable, .. } | State::Shared { writable, .. }) = entry.state() else { break };
            let allowed = writable || access == Access::Read;
            // A whole block alone.
            if !allowed || entry.is_whole() && !held.is_empty() || self.pin_mapped(&entry, &mut walk).is_err() {
                break;
            }
            held.end = entry.range().end.min(pages.end);
        }
        (!held.is_empty()).then_some(held)
    }

    /// Whether the region of `vpn` is one of a persistent device, which stays where it is.
    pub(super) fn is_persistent(&self, vpn: Vpn) -> bool {
        self.region(vpn).is_some_and(|r| r.attributes.has(Attributes::PERSISTENT))
    }

    /// Takes the page at `vpn` into the table where it is, if it is a native one.
    pub(crate) fn track(&self, vpn: Vpn) {
        let _work = self.contexts.take();
        self.track_here(vpn);
    }

    /// The same, by somebody who has a context.
    pub(super) fn track_here(&self, vpn: Vpn) {
        while self.region(vpn).is_some_and(|r| !r.attributes.has(Attributes::IN_PLACE))
            && let Ok(entry) = self.table.lock(vpn)
            && entry.state() == State::Empty
            && self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(false)
        {
            let whole = entry.is_whole();
            self.track_native(entry);
            if !whole {
                return;
            }
        }
    }

    /// Takes a native page into the table where it is.
    fn track_native(&self, entry: Entry<'_, K>) {
        // With the entry locked: what is discarded or unmapped from here on takes it back. Whatever has been put in the place
        // of a region that has gone is none of ours, and what the kernel keeps is in no table.
        if self.region(entry.vpn()).is_none_or(|r| r.attributes.has(Attributes::IN_PLACE)) {
            return;
        }
        if entry.is_whole() {
            return entry.split_evenly();
        }
        if !self.kernel.is_present(self.geometry.va(entry.vpn())).unwrap_or(false) {
            return;
        }
        let Some(frame) = self.new_frame(entry.vpn()) else { return };
        self.budget.take_native(1);
        self.memmap.map(frame);
        self.announce(frame, Arrival::New);
        entry.commit(State::Host { pfn: self.memmap.pfn(frame), writable: true, dirt: Dirt::Dirty });
    }

    /// Undoes [`hold_some`](Engine::hold_some).
    pub(crate) fn let_go_some(&self, held: PageRange) {
        {
            let _work = self.contexts.take();
            if let Ok(entry) = self.table.lock(held.start)
                && let State::Coherent { pfn } = entry.state()
            {
                return self.let_go_in_place(pfn);
            }
        }
        self.let_go(held);
    }

    /// Undoes [`hold_pages`](Engine::hold_pages).
    pub(crate) fn let_go(&self, pages: PageRange) {
        let mut walk = Walk::default();
        let mut at = pages.start;
        while at < pages.end {
            let _work = self.contexts.take();
            let Ok(entry) = self.table.lock(at) else {
                at = at + 1;
                continue;
            };
            // Pages that the program has discarded meanwhile are nobody's to let go. Who discards what is held, and has
            // others hold what comes after it, lets go of that.
            if let Some((folio, huge)) = self.folio_at(&entry)
                && walk.is_new(folio, huge)
            {
                let last = self.memmap.folio(folio).unpin();
                debug_assert_ne!(last, Ok(true), "it is mapped");
            }
            at = if entry.is_whole() { Vpn(at.block_start().0 + BLOCK_PAGES) } else { at + 1 };
        }
    }
}
