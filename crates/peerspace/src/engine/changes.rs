//! What the program does to its own memory: discarding, unmapping, moving (rules G5, H11, H12).
//!
//! The kernel tells of each by a message, and lets the program go on as soon as the message is received. All of
//! this runs with the [gate](super::gate) closed, so no operation on region memory is under way; entries that are
//! locked by a device transfer are waited for.

use super::stats::Counters;
use super::{Engine, Entry};
use peerspace_core::addr::{BLOCK_PAGES, Order, PageRange, Pages, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::memmap::Frame;
use peerspace_os::{Kernel, Message, Trouble};
use std::time::Duration;

impl<K: Kernel> Engine<K> {
    /// Receives one message. A change of mappings is acted on here; a fault is returned.
    ///
    /// One caller at a time: the holder of [`Service::reader`](super::serve::Service).
    pub(crate) fn receive(&self) -> Option<Message> {
        let work = self.contexts.receiver();
        self.gate.peek(self.contexts.all());
        let message = self.kernel.receive();
        match message {
            None | Some(Message::Fault { .. }) => {}
            Some(change) => {
                self.gate.hold();
                self.apply(change, &work.counters);
            }
        }
        self.gate.open(&self.kernel.park());
        message
    }

    fn apply(&self, change: Message, counters: &Counters) {
        match change {
            Message::Discard(range) => self.discard(self.geometry.pages_inside(range), counters),
            Message::Unmap(range) => self.forget_range(range, counters),
            Message::Move { from, to, len } => {
                let pages = self.geometry.pages_in(len);
                self.relocate(self.geometry.vpn(from), self.geometry.vpn(to), pages, counters);
            }
            Message::Fault { .. } | Message::Fork(_) => {}
        }
    }

    /// Waits until the change that stopped an operation has been acted on. Not for threads that receive.
    pub(crate) fn wait_for_changes(&self) {
        let park = self.kernel.park();
        let turn = self.gate.turn();
        self.gate.wait_open(&park);
        let mut patience = 0;
        while self.gate.turn() == turn && self.kernel.is_changing() {
            patience += 1;
            if patience < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        self.gate.wait_open(&park);
    }

    /// Calls `each` with the locked entries of `pages`, whole blocks as whole blocks where they lie inside. Blocks
    /// that lie inside only in part are split first.
    fn each_entry(&self, pages: PageRange, counters: &Counters, mut each: impl FnMut(Entry<'_, K>)) {
        for piece in pages.by_block() {
            let mut at = piece.start;
            while at < piece.end {
                // Not covered: nothing of ours in this block.
                let Ok(entry) = self.table.lock(at) else { break };
                if !entry.is_whole() {
                    at = at + 1;
                    each(entry);
                    continue;
                }
                if entry.range() == piece {
                    each(entry);
                    break;
                }
                if entry.state() == State::Empty {
                    break;
                }
                self.split_whole(entry, counters);
            }
        }
    }

    /// Splits a whole block, whatever its state, into pages that go on as it was.
    pub(crate) fn split_whole(&self, entry: Entry<'_, K>, counters: &Counters) {
        match entry.state() {
            State::Host { .. } => self.split_mapped(entry, counters),
            State::Standby { pfn, .. } => self.split_standby(entry, self.memmap.block(pfn)),
            _ => entry.split_evenly(),
        }
    }

    /// Splits a block on standby: its pages stay where they are, in the block's staging.
    pub(crate) fn split_standby(&self, entry: Entry<'_, K>, frame: Frame) {
        let arrival = self.memmap.arrival(frame);
        self.memmap.split_block(frame);
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(self.memmap.pfn(frame) + i);
            self.memmap.set_slot(part, None);
            self.memmap.set_arrival(part, arrival);
        }
        entry.split_evenly();
        self.blocks.put_on_standby(frame);
    }

    /// The content of `pages` is not wanted any more; they are empty from here on.
    pub(crate) fn discard(&self, pages: PageRange, counters: &Counters) {
        self.each_entry(pages, counters, |entry| self.drop_content(entry));
    }

    /// Empties `range`, whole pages, because the engine's own user says so.
    ///
    /// Where the kernel tells of discarded content, it tells of this too, and the table follows the news: a page
    /// that is asked for in between waits at the gate.
    pub(crate) fn discard_now(&self, range: VaRange) -> Result<(), Trouble> {
        if !self.kernel.capabilities().move_pages {
            self.discard(self.geometry.pages_inside(range), &self.contexts.take().counters);
        }
        self.kernel.discard(range)
    }

    /// Gives up a region of our own that nobody refers to any more. `unmap` unmaps pieces of it, without messages.
    pub(crate) fn release_region(&self, range: VaRange, mut unmap: impl FnMut(VaRange)) {
        /// Pages that may be mapped although they are no longer accounted for.
        const BEHIND: i64 = 2048;
        let pages = self.geometry.pages_inside(range);
        let work = self.contexts.take();
        let removed = self.remove_region(pages, |_| {});
        debug_assert!(removed.is_ok(), "{removed:?}");
        let (mut unmapped, mut behind) = (range.start, 0);
        for piece in pages.by_block() {
            let before = self.budget.charged();
            self.discard(piece, &work.counters);
            behind += (before - self.budget.charged()).max(0);
            if behind >= BEHIND {
                let end = self.addresses(piece).end;
                unmap(VaRange { start: unmapped, end });
                (unmapped, behind) = (end, 0);
            }
        }
        if unmapped < range.end {
            unmap(VaRange { start: unmapped, end: range.end });
        }
        self.release_table(pages);
    }

    /// Empties an entry, and frees whatever it owned.
    fn drop_content(&self, entry: Entry<'_, K>) {
        let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
        match entry.state() {
            State::Empty => {}
            State::Poisoned { .. } => entry.commit(State::Empty),
            State::Device { pfn, .. } => {
                entry.commit(State::Empty);
                self.tiers.free(pfn, order);
            }
            State::Host { .. } if order == Order::BASE => self.forget_mapped(entry),
            State::Host { pfn, .. } => {
                // The kernel drops the huge page itself; its frame has none from here on.
                let frame = self.memmap.block(pfn);
                self.retract(frame);
                let backing = self.memmap.backing(frame);
                entry.commit(State::Empty);
                self.budget.uncharge(BLOCK_PAGES);
                self.memmap.reset(frame);
                self.memmap.give_back(frame);
                self.free_backing(backing, order);
            }
            State::Standby { pfn, .. } if order == Order::BASE => {
                let frame = self.memmap.page(pfn);
                let backing = self.memmap.backing(frame);
                let slot = self.memmap.slot(frame);
                if let Some(slot) = slot {
                    self.ring.vacate(slot);
                }
                entry.commit(State::Empty);
                self.free_frame(frame, slot.is_none());
                self.free_backing(backing, order);
            }
            State::Standby { pfn, .. } => {
                let frame = self.memmap.block(pfn);
                let backing = self.memmap.backing(frame);
                entry.commit(State::Empty);
                self.free_backing(backing, order);
                self.blocks.give_ready(frame);
            }
            State::Leaf(_) => unreachable!("a lock is never on a leaf"),
        }
    }

    /// `range` is mapped no longer: it is no region any more, and nothing in it is kept.
    pub(crate) fn forget_range(&self, range: VaRange, counters: &Counters) {
        let pages = self.geometry.pages_inside(range);
        // First the regions, so that a fault that comes now finds nothing; then what they held. A failure means
        // that there are more regions than a process can have mappings.
        let removed = self.remove_region(pages, |_| {});
        debug_assert!(removed.is_ok(), "{removed:?}");
        self.discard(pages, counters);
        self.release_table(pages);
    }

    /// Joins the blocks of `pages` that no region touches any more, and takes back the promise of their leaves.
    pub(crate) fn release_table(&self, pages: PageRange) {
        if pages.is_empty() {
            return;
        }
        let _changes = self.region_changes.lock();
        let mut gone = 0;
        let (first, last) = (pages.start.block(), Vpn(pages.end.0 - 1).block());
        for block in first..=last {
            if (block == first || block == last) && self.lonely_blocks(PageRange::block(block)) == 0 {
                continue;
            }
            if self.table.look(Vpn::of_block(block)).is_some_and(|(_, whole)| !whole) {
                let all_empty = |page: &dyn Fn(usize) -> peerspace_core::entry::Entry| {
                    (0..BLOCK_PAGES as usize)
                        .all(|i| page(i).is_empty())
                        .then_some(peerspace_core::entry::Entry::EMPTY)
                };
                // Somebody may hold an entry for a moment; then the leaf simply stays, and stays promised.
                match self.table.join(block, all_empty) {
                    Ok(Some(joined)) => drop(joined),
                    _ => continue,
                }
            }
            gone += 1;
        }
        self.table.uncover(gone);
    }

    /// A mapping of `pages` pages moved from `from` to `to`, with everything in it.
    fn relocate(&self, from: Vpn, to: Vpn, pages: Pages, counters: &Counters) {
        let old = PageRange::new(from, pages);
        // The new range is no region yet, so faults there wait at the gate until all is in place.
        let mut moved: [Option<(PageRange, peerspace_core::regions::Attributes)>; 16] = [None; 16];
        let mut n = 0;
        // A mapping is mostly one region, but may be several with different attributes.
        while let Some(r) = self.regions.next(old.start).filter(|r| r.range.start < old.end) {
            let piece = r.range.intersect(old);
            if n == moved.len() || self.remove_region(piece, |_| {}).is_err() {
                // Cannot be: data would be lost from sight.
                crate::tell::warning(format_args!("the move of {:?} is too complicated to follow", old));
                break;
            }
            moved[n] = Some((piece, r.attributes));
            n += 1;
        }
        let shift = |vpn: Vpn| Vpn(vpn.0 - from.0 + to.0);
        for (piece, attributes) in moved.iter().flatten() {
            let target = PageRange { start: shift(piece.start), end: shift(piece.end) };
            let _changes = self.region_changes.lock();
            let added = self.cover(target).and_then(|new| {
                self.each_entry(*piece, counters, |entry| self.relocate_entry(entry, shift, counters));
                self.insert_region(target, *attributes, new)
            });
            if let Err(e) = added {
                crate::tell::warning(format_args!("a mapping that moved to {target:?} cannot be followed: {e}"));
            }
        }
        self.release_table(old);
    }

    fn relocate_entry(&self, entry: Entry<'_, K>, shift: impl Fn(Vpn) -> Vpn + Copy, counters: &Counters) {
        let state = entry.state();
        if state == State::Empty {
            return;
        }
        let to = shift(entry.vpn());
        if entry.is_whole() && !to.is_block_start() {
            // A huge mapping at another offset is no longer one.
            let range = entry.range();
            self.split_whole(entry, counters);
            for vpn in range.iter() {
                if let Ok(part) = self.table.lock(vpn) {
                    self.relocate_entry(part, shift, counters);
                }
            }
            return;
        }
        let Ok(mut target) = self.table.lock(to) else { return };
        if target.is_whole() && !entry.is_whole() {
            target.split_evenly();
            let Ok(page) = self.table.lock(to) else { return };
            target = page;
        }
        debug_assert_eq!(target.state(), State::Empty, "a mapping moved to where something is");
        if let State::Host { pfn, .. } | State::Standby { pfn, .. } = state {
            let frame = if entry.is_whole() { self.memmap.block(pfn) } else { self.memmap.page(pfn) };
            self.memmap.place(frame, to, self.memmap.epoch(frame));
        }
        target.commit(state);
        entry.commit(State::Empty);
    }
}
