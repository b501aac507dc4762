//! What the program does to its own memory: discarding, unmapping, moving (rules G5, H11, H12).
//!
//! The kernel tells of each by a message, and lets the program go on as soon as the message is received. All of
//! this runs with the [gate](super::gate) closed, so no operation on region memory is under way; entries that are
//! locked by a device transfer are waited for.

use super::folio::NoSplit;
use super::stats::Counters;
use super::{AddError, Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{BLOCK_PAGES, Order, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::folio::SplitBusy;
use peerspace_core::memmap::{Backing, Frame};
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_os::own::{Own, Vec};
use peerspace_os::{Kernel, Message, Trouble};
use std::time::Duration;

/// Moves of mappings under way at once; each is another thread's, so there are few.
const MOVES: usize = 64;
/// How often to look for the rest of a move before doing what can be done without it: for some 20 microseconds, if nobody
/// else wants the processor.
const LOOKS: u32 = 64;

/// What is known and cannot be acted on yet, while the gate is closed.
struct News {
    /// Moves (from, to, length) to where there still is a region.
    postponed: ArrayVec<(Va, Va, u64), MOVES>,
    /// What is going to be announced as unmapped because it has moved.
    due: ArrayVec<VaRange, MOVES>,
}

impl<K: Kernel> Engine<K> {
    /// Receives one message, which the kernel [said](Kernel::wait_message) that there is. A change of mappings is acted on here;
    /// a fault is returned.
    ///
    /// One caller at a time: the holder of [`Service::reader`](super::serve::Service).
    pub(crate) fn receive(&self) -> Option<Message> {
        // Before the gate: an access of a device to the host's memory that is under way waits for that to open.
        let _halted = self.halt_devices();
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

    /// Acts on `first`, and on what has to be received before the gate may open.
    ///
    /// Threads that change mappings at the same time announce it when the kernel has done it, in any order. So a
    /// mapping may have moved to where, as far as we know, there is another one: news of that one's end is on the
    /// way, and comes first. And a thread that moved a mapping announces next that the old place is unmapped: by then
    /// there may be another one. Nobody has to do anything for these to come, so they are waited for here.
    ///
    /// The thread that moved a mapping waits for both to be received. So the second is, if it comes soon, before the move
    /// is acted on; anything else is, after.
    fn apply(&self, first: Message, counters: &Counters) {
        let mut news = News { postponed: ArrayVec::new(), due: ArrayVec::new() };
        self.note_when_free(first, &mut news, counters);
        let mut looks = 0;
        let mut faults: ArrayVec<Va, MOVES> = ArrayVec::new();
        // Mostly the thread that goes on now waits for this processor.
        if !news.due.is_empty() {
            crate::sync::yield_now();
        }
        while !(news.postponed.is_empty() && news.due.is_empty()) {
            match self.kernel.receive() {
                // The thread faults again when all is done; before that it would be in the way of the end of it.
                Some(Message::Fault { va, .. }) => {
                    if let Err(full) = faults.try_push(va) {
                        self.send_back(full.element());
                    }
                }
                Some(change) => self.note(change, &mut news, counters),
                // Nothing is on the way: what is in the way has gone without news.
                None if !self.kernel.is_changing() => {
                    news.due.clear();
                    for (from, to, len) in news.postponed.take() {
                        self.forget_range(VaRange { start: to, end: Va(to.0 + len) }, counters);
                        self.relocate(
                            self.geometry.vpn(from),
                            self.geometry.vpn(to),
                            self.geometry.pages_in(len),
                            counters,
                        );
                    }
                }
                None => {
                    looks += 1;
                    if looks == LOOKS {
                        self.relocate_postponed(&mut news, counters);
                    }
                    crate::sync::yield_now();
                }
            }
        }
        faults.into_iter().for_each(|va| self.send_back(va));
    }

    /// Acts on `first`; but if somebody [changes what is in place](super::inplace), and has entries locked until the news of
    /// that is received, receives that before.
    fn note_when_free(&self, first: Message, news: &mut News, counters: &Counters) {
        if self.inplace.is_ours(&first) {
            return;
        }
        if !self.inplace.is_under_way() {
            return self.note(first, news, counters);
        }
        let mut waiting = Vec::new_in(Own);
        waiting.push(first);
        self.inplace.await_end(
            || self.kernel.receive(),
            |message| match message {
                Message::Fault { va, .. } => self.send_back(va),
                change => waiting.push(change),
            },
        );
        waiting.drain(..).for_each(|change| self.note(change, news, counters));
    }

    /// Acts on `change` and on what was postponed because of it; or postpones it.
    fn note(&self, change: Message, news: &mut News, counters: &Counters) {
        if !matches!(change, Message::Unmap(range) if news.due.contains(&range)) {
            // It finds everything where it has moved before.
            self.relocate_postponed(news, counters);
        }
        match change {
            Message::Discard(range) => {
                let pages = self.geometry.pages_inside(range);
                self.going.note(pages);
                self.discard(pages, counters);
                self.withdraw_in_place(pages);
            }
            Message::Unmap(range) if self.service.graves.is_ours(self.geometry.pages_inside(range)) => {}
            Message::Unmap(range) => match news.due.iter().position(|d| *d == range) {
                Some(i) => drop(news.due.swap_remove(i)),
                None => self.forget_range(range, counters),
            },
            Message::Move { from, to, len } => {
                // As many threads as there is room for may be in the midst of that; more are beyond belief.
                let _ = news.due.try_push(VaRange { start: from, end: Va(from.0 + len) });
                if news.postponed.try_push((from, to, len)).is_err() {
                    crate::tell::warning(format_args!("too many mappings move at once: {to} is lost from sight"));
                }
                return;
            }
            Message::Fault { .. } | Message::Fork(_) => {}
        }
        self.relocate_postponed(news, counters);
    }

    /// Acts on the moves to where there is nothing: each may make room for another.
    fn relocate_postponed(&self, news: &mut News, counters: &Counters) {
        while let Some(i) = news.postponed.iter().position(|(_, to, len)| {
            let target = self.geometry.pages_inside(VaRange { start: *to, end: Va(to.0 + len) });
            self.pieces(target).next().is_none()
        }) {
            let (from, to, len) = news.postponed.remove(i);
            self.relocate(self.geometry.vpn(from), self.geometry.vpn(to), self.geometry.pages_in(len), counters);
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
                crate::sync::yield_now();
            } else {
                crate::sync::sleep(Duration::from_micros(50));
            }
        }
        self.gate.wait_open(&park);
    }

    /// Waits until what has been received has been acted on, if there are devices that could still use what is discarded. Not
    /// for threads that receive.
    pub(crate) fn await_devices(&self) {
        if self.tiers.iter().any(|tier| tier.mmu_id().is_some()) {
            self.await_received();
        }
    }

    /// Calls `each` with the locked entries of `pages`, whole blocks as whole blocks where they lie inside. Blocks
    /// that lie inside only in part are split first.
    fn each_entry(&self, pages: PageRange, counters: &Counters, mut each: impl FnMut(Entry<'_, K>)) {
        for piece in pages.by_block() {
            let mut at = piece.start;
            while at < piece.end {
                // Not covered: nothing of ours in this block.
                let Ok(entry) = self.table.lock(at) else { break };
                // Devices hear of it before the memory can be used again (G5).
                let entry = self.recall(entry);
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

    /// Empties an entry, and frees whatever it owned.
    fn drop_content(&self, mut entry: Entry<'_, K>) {
        let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
        match entry.state() {
            State::Empty => {}
            State::Poisoned { .. } => entry.commit(State::Empty),
            // It was unmapped where it was in place.
            State::Coherent { pfn } => {
                self.gone_from_place(entry.range(), pfn);
                entry.commit(State::Empty);
                self.tiers.free(pfn, order);
            }
            State::Device { pfn, .. } => {
                entry.commit(State::Empty);
                self.tiers.free(pfn, order);
            }
            State::Host { .. } if order == Order::BASE => self.forget_mapped(entry),
            State::Host { pfn, .. } => {
                // The kernel drops the huge page itself; its frame has none from here on.
                let frame = self.memmap.block(pfn);
                let backing = self.memmap.backing(frame);
                self.unmap_gone(frame);
                entry.commit(State::Empty);
                self.budget.uncharge(BLOCK_PAGES);
                self.free_backing(backing, order);
            }
            State::Standby { pfn, .. } if order == Order::BASE => {
                entry.set(State::Empty);
                self.free_standby(self.memmap.page(pfn));
            }
            State::Standby { pfn, .. } => {
                let frame = self.memmap.block(pfn);
                let backing = self.memmap.backing(frame);
                entry.commit(State::Empty);
                self.free_backing(backing, order);
                self.blocks.give_ready(frame);
            }
            State::Shared { .. } | State::Zero { .. } | State::Mapped { .. } => {
                unreachable!("what devices map was recalled")
            }
            State::Leaf(_) => unreachable!("a lock is never on a leaf"),
        }
    }

    /// The parts of regions that lie in `pages`, as they are when they are asked for.
    pub(super) fn pieces(&self, pages: PageRange) -> impl Iterator<Item = RegionInfo> + '_ {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            let region = self.regions.next(at).filter(|r| r.range.start < pages.end)?;
            at = region.range.end;
            Some(RegionInfo { range: region.range.intersect(pages), ..region })
        })
    }

    /// `range` is mapped no longer: it is no region any more, and nothing in it is kept.
    pub(crate) fn forget_range(&self, range: VaRange, counters: &Counters) {
        // First the region, so that a fault that comes now finds nothing; then what it held. A failure means that
        // there are more regions than a process can have mappings.
        for RegionInfo { range: piece, attributes } in self.pieces(self.geometry.pages_inside(range)) {
            let removed = self.remove_region(piece, |_| {});
            debug_assert!(removed.is_ok(), "{removed:?}");
            if attributes.has(Attributes::IN_PLACE) {
                self.withdraw_gone(piece);
            }
            self.discard(piece, counters);
            self.release_table(piece);
        }
    }

    /// Joins the blocks of `pages`, all of which were regions, that no region touches any more, and takes back the
    /// promise of their leaves.
    pub(crate) fn release_table(&self, pages: PageRange) {
        if !pages.is_empty() {
            let _changes = self.region_changes.lock();
            self.release_table_here(pages);
        }
    }

    /// The same by somebody who holds `region_changes`.
    pub(super) fn release_table_here(&self, pages: PageRange) {
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

    /// A mapping of `pages` pages moved from `from` to `to`, where no region is, with everything in it.
    fn relocate(&self, from: Vpn, to: Vpn, pages: Pages, counters: &Counters) {
        let shift = |vpn: Vpn| Vpn(vpn.0 - from.0 + to.0);
        // The new range is no region yet, so faults there wait at the gate until all is in place.
        for RegionInfo { range: piece, attributes } in self.pieces(PageRange::new(from, pages)) {
            let target = PageRange { start: shift(piece.start), end: shift(piece.end) };
            self.take_apart(piece, shift, counters);
            let moved = self.remove_region(piece, |_| {}).map_err(AddError::Region).and_then(|()| {
                if attributes.has(Attributes::IN_PLACE) {
                    self.withdraw_gone(piece);
                }
                let _changes = self.region_changes.lock();
                let new = self.cover(target)?;
                self.each_entry(piece, counters, |entry| self.relocate_entry(entry, shift, counters));
                // The kernel has told of it: so all of it was registered.
                self.insert_region(target, Self::as_arrived(attributes), new)
            });
            if let Err(e) = moved {
                self.lost_from_sight(piece, target, &e, counters);
            }
            self.release_table(piece);
        }
    }

    /// Splits the folios that do not move as a whole: their pages go separate ways. Where somebody relies on one, it stays
    /// one folio all the same, which cannot leave RAM any more until it is discarded.
    fn take_apart(&self, pages: PageRange, shift: impl Fn(Vpn) -> Vpn, counters: &Counters) {
        for piece in pages.by_block() {
            let whole_goes = piece == PageRange::block(piece.start.block()) && shift(piece.start).is_block_start();
            loop {
                match self.table.look(piece.start) {
                    None => break,
                    Some((word, true)) if whole_goes || word.is_empty() => break,
                    Some((_, true)) => {
                        if let Ok(entry) = self.table.lock(piece.start)
                            && entry.is_whole()
                            && entry.state() != State::Empty
                        {
                            self.split_whole(entry, counters);
                        }
                    }
                    Some((_, false)) => match self.split_folio(piece.start.block()) {
                        // The gate is closed: whoever is in the way is on the way out.
                        Err(NoSplit::Contended | NoSplit::Busy(SplitBusy::Referenced(_))) => crate::sync::yield_now(),
                        _ => break,
                    },
                }
            }
        }
    }

    /// A mapping has moved to where there is no room to keep track of it. What of it is mapped goes on as ordinary memory.
    /// What is not can neither be brought there, nor can accesses be made to fail, as long as the mappings are changing:
    /// they would read zeros. So that is the end of the program.
    fn lost_from_sight(&self, from: PageRange, to: PageRange, why: &AddError, counters: &Counters) {
        let away = |vpn: Vpn| {
            let state = self.table.look(vpn).map(|(entry, _)| entry.state());
            !matches!(state, None | Some(State::Empty | State::Host { .. }))
        };
        let gone = from.iter().chain(to.iter()).filter(|vpn| away(*vpn)).count();
        let range = self.addresses(to);
        if gone > 0 {
            crate::tell::end(format_args!(
                "a mapping moved to {range}, and cannot be followed: {why}. {gone} pages of it are not in memory and would \
                 be lost: the program is ended"
            ));
        }
        crate::tell::warning(format_args!("a mapping moved to {range}, and is not managed from here on: {why}"));
        self.discard(from, counters);
        self.discard(to, counters);
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
        let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
        let on_device = match state {
            State::Host { pfn, .. } | State::Standby { pfn, .. } => {
                let frame = self.frame_of(pfn, entry.is_whole());
                self.memmap.place(frame, to, self.memmap.epoch(frame));
                self.memmap.backing(frame)
            }
            State::Device { pfn, .. } | State::Coherent { pfn } => Backing::Page(pfn),
            _ => Backing::None,
        };
        if let Backing::Page(pfn) = on_device {
            self.tiers.place(pfn, order, to);
        }
        target.commit(state);
        entry.commit(State::Empty);
    }
}
