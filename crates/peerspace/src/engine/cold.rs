//! Setting memory aside because its user says that it will not be needed soon.
//!
//! What is mapped goes to standby: nobody maps it, it is the first to leave when room is needed, and a fault takes it back
//! without input. Pages that somebody relies on or works with just now stay, and so does a huge folio of which only a part
//! is meant (rule H5). The staging of small pages is of a bounded size; what does not fit goes on to the devices.

use super::context::Working;
use super::evict::Drained;
use super::reclaim::VICTIMS;
use super::stats::{count, count_n};
use super::{Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{PageRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::memmap::Frame;
use peerspace_core::regions::Attributes;
use peerspace_os::Kernel;

impl<K: Kernel> Engine<K> {
    /// Moves what is mapped of `pages` to standby, as far as it can go. Returns how many pages went. To be called without
    /// a lock and without a context.
    pub(crate) fn set_aside(&self, pages: PageRange) -> u64 {
        let mut aside = 0;
        for piece in pages.by_block() {
            let mut work = self.contexts.take();
            if self.region(piece.start).is_some_and(|r| r.attributes.has(Attributes::ADOPTED)) {
                aside += self.walk(piece, &mut work, |rest, work| {
                    let (taken, next) = self.take_native_from(rest, work);
                    count_n(&work.counters.taken_in_hand, taken);
                    (taken, next)
                });
            }
            aside += self.walk(piece, &mut work, |rest, work| self.set_some_aside(rest, work));
        }
        aside
    }

    /// Has `step` go through `piece`, with room in the staging of small pages each time.
    pub(super) fn walk(
        &self,
        piece: PageRange,
        work: &mut Working<'_>,
        mut step: impl FnMut(PageRange, &mut Working<'_>) -> (u64, Vpn),
    ) -> u64 {
        let (mut aside, mut at) = (0, piece.start);
        // A whole block has staging of its own.
        let crowded = |at| {
            let (waiting, segments) = self.ring.waiting();
            waiting > segments / 2 && matches!(self.table.look(at), Some((_, false)))
        };
        while at < piece.end {
            while crowded(at) && matches!(self.drain_oldest(work), Drained::Freed(_)) {}
            let (went, next) = step(PageRange { start: at, end: piece.end }, work);
            aside += went;
            at = next;
        }
        aside
    }

    /// Sets the block that begins `rest` aside, or some of its pages. Returns how many pages went, and where to go on.
    pub(super) fn set_some_aside(&self, rest: PageRange, work: &mut Working<'_>) -> (u64, Vpn) {
        let mut pages: ArrayVec<(Entry<'_, K>, Frame), VICTIMS> = ArrayVec::new();
        let mut at = rest.start;
        while at < rest.end && !pages.is_full() {
            // Whoever has it locked works with it.
            let Ok(Some(entry)) = self.table.try_lock(at) else {
                at = at + 1;
                break;
            };
            let entry = if let State::Shared { .. } = entry.state() { self.recall(entry) } else { entry };
            if entry.is_whole() {
                debug_assert!(pages.is_empty(), "a block is whole or split as long as one of its entries is locked");
                return (self.set_block_aside(entry, rest, work), rest.end);
            }
            if let State::Host { pfn, .. } = entry.state() {
                let frame = self.memmap.page(pfn);
                if self.memmap.head(frame) != frame {
                    if !pages.is_empty() {
                        break;
                    }
                    drop(entry);
                    return match self.split_folio(at.block()) {
                        Ok(()) => {
                            count(&work.counters.folio_splits);
                            (0, at)
                        }
                        Err(_) => (0, rest.end),
                    };
                }
                if self.can_go(&entry, frame) {
                    pages.push((entry, frame));
                }
            }
            at = at + 1;
        }
        {
            let mut policy = self.policy.lock();
            self.incoming.drain(&self.memmap, &mut **policy);
            pages.iter().for_each(|(_, frame)| policy.remove(&self.memmap, *frame));
        }
        (self.unmap_pages(pages, work, false), at)
    }

    /// Sets the block of `entry` aside if `wanted` is all of it.
    fn set_block_aside(&self, entry: Entry<'_, K>, wanted: PageRange, work: &mut Working<'_>) -> u64 {
        let State::Host { pfn, .. } = entry.state() else { return 0 };
        let frame = self.memmap.block(pfn);
        if wanted != entry.range() || !self.can_go(&entry, frame) {
            return 0;
        }
        self.retract(frame);
        self.unmap_block(entry, frame, work)
    }
}
