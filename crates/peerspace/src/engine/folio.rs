//! Folios while they are in use: given back, split, and queued to be split (rules H5 to H7, H10, H11).
//!
//! The mapping of a huge folio can be split at any time, and then its pages are mapped one by one while the folio stays in
//! one piece: one reference for its owner, one place on the policy's lists. Only when memory is short, or its pages go
//! separate ways, is the folio itself split; it cannot be while somebody relies on where it is.
//!
//! A folio some of whose pages the program has discarded holds memory that nobody uses, since the kernel keeps a huge page
//! in one piece as well. It is queued ([`Blocks::defer`](super::staging::Blocks::defer)), and reclaim splits what is queued
//! before it looks for victims; the first of its pages that leaves makes the kernel split its own.
//!
//! Where the kernel puts migration entries (H9), all of the folio's entries are locked. What is left of split blocks moves to
//! small frames when huge folios find no room ([`compact`](super::compact)); the pages stay where they are, only their numbers
//! change.

use super::Engine;
use super::stats::{Counters, count};
use peerspace_core::addr::{BLOCK_PAGES, Order, Vpn};
use peerspace_core::entry::{Entry as Word, State};
use peerspace_core::folio::SplitBusy;
use peerspace_core::memmap::Frame;
use peerspace_os::Kernel;

/// Why a folio was not split. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoSplit {
    /// There is none at this place whose mapping is split.
    NotSpread,
    /// Somebody works with one of its pages just now.
    Contended,
    /// Somebody refers to it, or relies on it.
    Busy(SplitBusy),
    /// Somebody relied on it when its pages went separate ways.
    Scattered,
}

impl<K: Kernel> Engine<K> {
    /// The mapped page of `frame`, or its whole block, is gone: so is the mapping, and the folio with the last one. The
    /// entry is locked, and becomes empty next.
    pub(crate) fn unmap_gone(&self, frame: Frame) {
        let (folio, left) = self.memmap.unmap(frame);
        if !left.unmapped {
            if left.partly && self.memmap.folio(folio).queue() {
                self.blocks.defer(folio, true);
            }
            return;
        }
        self.retract(folio);
        self.free_unmapped(folio);
    }

    /// The same for all of `parts`, which are in use, by as few turns at the policy's lock as can be.
    pub(crate) fn unmap_all_gone(&self, parts: impl Iterator<Item = Frame> + Clone) {
        let alone = |part: &Frame| self.memmap.head(*part) == *part;
        {
            let mut policy = self.policy.lock();
            self.incoming.drain(&self.memmap, &mut **policy);
            parts.clone().filter(alone).for_each(|part| policy.remove(&self.memmap, part));
        }
        for part in parts {
            if alone(&part) {
                let _ = self.memmap.unmap(part);
                self.free_unmapped(part);
            } else {
                self.unmap_gone(part);
            }
        }
    }

    /// Frees a folio that is on no list and that nobody maps any more.
    fn free_unmapped(&self, folio: Frame) {
        // Whoever relied on pages that the program itself has thrown away has nothing left to rely on.
        self.memmap.folio(folio).forget_pins();
        if self.memmap.is_block(folio) {
            self.memmap.folio(folio).unqueue();
            self.memmap.reset(folio);
        }
        self.free_frame(folio, false);
    }

    /// Gives the owner's reference to a frame back. `staged`: the page of a part still lies in its block's staging.
    pub(crate) fn free_frame(&self, frame: Frame, staged: bool) {
        if staged {
            self.memmap.set_garbage(frame);
        }
        self.put_frame(frame);
    }

    /// Frees the frame of a small page that was on standby, where the page was staged, and a device's copy of it. The page's
    /// entry is locked, and says something else already.
    pub(super) fn free_standby(&self, frame: Frame) {
        let (backing, slot) = (self.memmap.backing(frame), self.memmap.slot(frame));
        if let Some(slot) = slot {
            self.ring.vacate(slot);
        }
        self.free_frame(frame, slot.is_none());
        self.free_backing(backing, Order::BASE);
    }

    /// Takes a reference for a look at what may be freed at any moment (H10).
    pub(crate) fn get_frame(&self, frame: Frame) -> bool {
        self.memmap.folio(frame).get_unless_zero()
    }

    /// Gives a reference back. The last one frees the frame.
    pub(crate) fn put_frame(&self, frame: Frame) {
        let Some(head) = self.memmap.head_of(frame) else { return self.memmap.give_back(frame) };
        if !self.memmap.folio(frame).put() {
            return;
        }
        if let Some(garbage) = self.memmap.part_gone(frame) {
            self.memmap.reset(head);
            if garbage.0 > 0 {
                if self.kernel.drop_staged(self.blocks.range(head)).is_err() {
                    // The pages are still there: the frame lies ready with them, and is charged as such.
                    self.budget.force_quietly(BLOCK_PAGES - garbage.0);
                    self.blocks.give_ready(head);
                    return;
                }
                self.budget.uncharge(garbage.0);
            }
            self.memmap.give_back(head);
        }
    }

    /// Splits the folio in `block` whose mapping is split into folios of one page.
    pub(crate) fn split_folio(&self, block: u64) -> Result<(), NoSplit> {
        if !matches!(self.table.look(Vpn::of_block(block)), Some((_, false))) {
            return Err(NoSplit::NotSpread);
        }
        let mut result = Err(NoSplit::Contended);
        // All of its entries are locked meanwhile, which is what the kernel's migration entries are for (H9).
        let joined = self.table.join(block, |page| {
            result = self.split_locked(page);
            None
        });
        debug_assert!(matches!(joined, Ok(None) | Err(_)));
        result
    }

    fn split_locked(&self, page: &dyn Fn(usize) -> Word) -> Result<(), NoSplit> {
        let head_of = |i: usize| match page(i).state() {
            State::Host { pfn, .. } | State::Shared { pfn, .. } => {
                let part = self.memmap.page(pfn);
                Some(self.memmap.head(part)).filter(|head| *head != part)
            }
            _ => None,
        };
        let all = 0..BLOCK_PAGES as usize;
        let head = all.clone().find_map(head_of).ok_or(NoSplit::NotSpread)?;
        let folio = self.memmap.folio(head);
        if all.filter(|i| head_of(*i) == Some(head)).count() as u64 != folio.counts().pages {
            return Err(NoSplit::Scattered);
        }
        folio.freeze().map_err(NoSplit::Busy)?;
        self.retract(head);
        let arrival = self.memmap.arrival(head);
        self.memmap.split_frozen(head);
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(self.memmap.pfn(head) + i);
            if self.memmap.folio(part).counts().mappings > 0 {
                self.announce(part, arrival);
            } else {
                self.free_frame(part, false);
            }
        }
        Ok(())
    }

    /// Splits one of the folios that hold memory which nobody uses. True if there was one that could be.
    pub(crate) fn split_deferred(&self, counters: &Counters) -> bool {
        for _ in 0..self.blocks.deferred() {
            let Some(head) = self.blocks.next_deferred() else { return false };
            if !self.get_frame(head) {
                continue; // freed
            }
            let block = self.memmap.vpn(head).block();
            let queued = self.memmap.folio(head).counts().queued;
            self.put_frame(head);
            if !queued {
                continue; // whole again, or another one by now
            }
            match self.split_folio(block) {
                Ok(()) => {
                    count(&counters.folio_splits);
                    return true;
                }
                Err(NoSplit::NotSpread) => {}
                Err(_) => {
                    count(&counters.folio_splits_failed);
                    self.blocks.defer(head, false);
                }
            }
        }
        false
    }
}
