//! Memory the program already has (rules G1, G2): taking it under management, page by page into our hands, and
//! letting it go again.
//!
//! Pages that the kernel populated before (or, where a mapping is not registered yet, still populates) are *native*:
//! the table knows nothing of them. That is learnt when a page is first taken in hand, by moving it to standby. If
//! the program uses it, it comes back at once and is tracked from then on; if not, it leaves. So adopting costs
//! nothing until memory is scarce.

use super::context::{Context, Working};
use super::fault::Hold;
use super::stats::{count, count_n};
use super::{AddError, Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, BLOCK_PAGES, Order, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Arrival, Frame};
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Done, Kernel, Protect, Trouble, Wake};

/// Native pages taken in hand in one go.
const TAKE: usize = 32;
/// Blocks looked at in search of native pages before the search is given up for now.
const LOOK: u32 = 64;

/// Tries to take back what the kernel has only half let go of.
const TRIES: u32 = 20;

/// Why memory was not adopted.
#[derive(Debug)]
pub(crate) enum AdoptError {
    /// It is managed already, or the space has no room for it.
    Table(AddError),
    /// The kernel refused to register it.
    Kernel(Trouble),
    /// The program is changing its mappings, or has since somebody looked at them.
    Changed,
}

impl<K: Kernel> Engine<K> {
    /// Waits until every change that the program has made to its mappings so far has been acted on. Not for threads
    /// that receive messages.
    pub(crate) fn settle_changes(&self) {
        while self.kernel.is_changing() {
            self.wait_for_changes();
        }
        self.await_received();
    }

    /// Waits until what has been received has been acted on: also what is just being received.
    pub(crate) fn await_received(&self) {
        while self.gate.turn_if_open().is_none() {
            self.gate.wait_open(&self.kernel.park());
        }
    }

    /// Manages existing private anonymous memory from now on. Its content stays where it is.
    ///
    /// Not for threads that receive messages.
    ///
    /// # Errors
    /// When part of it cannot be managed, or is not mapped any more; then nothing of it is.
    pub(crate) fn adopt(&self, range: VaRange) -> Result<(), AdoptError> {
        let mut at = range.start;
        while at < range.end {
            // News of an older mapping at the same place must not hit the new one.
            self.settle_changes();
            let Some(turn) = self.settled() else { continue };
            let mapping = self.kernel.mapping_at(at).and_then(|mapping| mapping.ok_or(Trouble::Absent));
            let done = mapping.map_err(AdoptError::Kernel).and_then(|mapping| {
                let part = VaRange { start: at, end: mapping.end.min(range.end) };
                self.adopt_settled(part, (turn, mapping)).map(|()| part)
            });
            match done {
                Ok(part) => {
                    let mut native = 0;
                    // Where it cannot be found out, reclaim finds the pages one by one.
                    let _ = self.kernel.present_runs(part, &mut |run| native += self.geometry.pages_in(run.len()).0);
                    self.budget.add_native(native as i64);
                    at = part.end;
                }
                Err(AdoptError::Changed) => {}
                Err(why) => {
                    if range.start < at
                        && let Err(e) = self.disown(VaRange { end: at, ..range })
                    {
                        crate::tell::warning(format_args!("{range} stays managed in part: {e}"));
                    }
                    return Err(why);
                }
            }
        }
        self.watch_budget();
        Ok(())
    }

    /// A number that stays the same as long as no change of mappings is announced; none while one is under way.
    pub(crate) fn settled(&self) -> Option<u64> {
        (!self.kernel.is_changing()).then(|| self.gate.turn_if_open()).flatten()
    }

    /// Adopts `range`, a part of one mapping, if all changes so far have been acted on. `seen` is what somebody saw who looked at
    /// the program's mappings: the number from [`settled`](Engine::settled), and the mapping that `range` begins in.
    ///
    /// Not for threads that receive messages.
    pub(crate) fn adopt_settled(&self, range: VaRange, seen: (u64, VaRange)) -> Result<(), AdoptError> {
        let pages = self.geometry.pages_inside(range);
        {
            let _work = self.contexts.take();
            let _changes = self.region_changes.lock();
            let is_as_seen = || self.kernel.mapping_at(range.start) == Ok(Some(seen.1));
            let turn = self.settled().filter(|turn| *turn == seen.0 && is_as_seen()).ok_or(AdoptError::Changed)?;
            // The region first: from the moment of registration on, faults in it come. Until that moment no page may
            // leave, since the kernel would put zeros in its place.
            let arriving = Attributes::ADOPTED.with(Attributes::KEPT).with(Attributes::ARRIVING);
            self.insert_fresh_region(pages, arriving).map_err(AdoptError::Table)?;
            // Once more, as late as can be: of memory that is not registered no change is told.
            let registered = if is_as_seen() { self.register_all(range, turn) } else { Err(Trouble::Absent) };
            match registered {
                Ok(true) => {
                    // Without room for that, the region stays as it is: right, if of little use.
                    let _ = self.regions.update(pages, Self::as_arrived);
                    return Ok(());
                }
                Ok(false) => {}
                Err(why) => {
                    let _ = self.regions.remove(pages, |_| {});
                    self.table.uncover(self.lonely_blocks(pages));
                    return Err(if is_as_seen() { AdoptError::Kernel(why) } else { AdoptError::Changed });
                }
            }
        }
        self.make_sure(pages);
        Ok(())
    }

    /// What is certain to be what it was taken for may leave.
    pub(super) fn as_arrived(attributes: Attributes) -> Attributes {
        match attributes.has(Attributes::ARRIVING) {
            true => attributes.without(Attributes::KEPT.with(Attributes::ARRIVING)),
            false => attributes,
        }
    }

    /// Has the kernel tell of `range`. True if all of that is one mapping, and was from when it was registered on; else part of
    /// another may be registered, or a hole in what is ours be filled with what is not. Until then changes were not told. `turn` is
    /// the number from [`settled`](Engine::settled).
    fn register_all(&self, range: VaRange, turn: u64) -> Result<bool, Trouble> {
        let around = self.around(range);
        self.kernel.adopt(range)?;
        Ok(self.around(range) == around && self.is_one_mapping(range) && self.settled() == Some(turn))
    }

    /// Finds out what has become of `pages`, which became a region while mappings changed: what is mapped and registered stays
    /// one, and may leave from then on; the rest is none. What is on the way may be about a mapping that moved to here, which must
    /// stay registered; so that is waited for.
    fn make_sure(&self, pages: PageRange) {
        let mut at = pages.start;
        while at < pages.end {
            self.settle_changes();
            let work = self.contexts.take();
            let changes = self.region_changes.lock();
            let Some(turn) = self.settled() else { continue };
            let Some(region) = self.regions.next(at).filter(|r| r.range.start < pages.end) else { return };
            let mut piece = region.range.intersect(PageRange { start: at, end: pages.end });
            at = piece.end;
            if !region.attributes.has(Attributes::ARRIVING) {
                continue;
            }
            let start = self.geometry.va(piece.start);
            let Ok(mapped) = self.kernel.mapped_from(start) else {
                // Not to be found out: nothing of it ever leaves.
                let _ = self.regions.update(piece, |a| a.without(Attributes::ARRIVING));
                continue;
            };
            let end = match mapped {
                Some(mapped) if mapped.range.contains(start) => self.geometry.vpn(mapped.range.end),
                Some(behind) => self.geometry.vpn(behind.range.start),
                None => piece.end,
            };
            piece.end = piece.end.min(end);
            let is_plain = matches!(self.kernel.mapping_at(start), Ok(Some(_)));
            match is_plain.then(|| self.register_all(self.addresses(piece), turn)) {
                Some(Ok(false)) => at = piece.start,
                Some(Ok(true)) => {
                    at = piece.end;
                    let _ = self.regions.update(piece, Self::as_arrived);
                }
                Some(Err(_)) | None => {
                    at = piece.end;
                    let _ = self.regions.remove(piece, |_| {});
                    // Nothing of it has left: what the table knows of it is there.
                    self.discard(piece, &work.counters);
                    drop(changes);
                    self.release_table(piece);
                }
            }
        }
    }

    /// Where the mapping that reaches to the start of `range` begins, and where the one from its end on ends. Registration
    /// does not change that, whether it cuts a mapping or joins two.
    fn around(&self, range: VaRange) -> (Option<Va>, Option<Va>) {
        let at = |va: Va| self.kernel.mapping_at(va).ok().flatten();
        (at(Va(range.start.0 - 1)).map(|m| m.start), at(range.end).map(|m| m.end))
    }

    fn is_one_mapping(&self, range: VaRange) -> bool {
        self.kernel.mapping_at(range.start).is_ok_and(|m| m.is_some_and(|m| m.end >= range.end))
    }

    /// Stops managing `range`: brings everything home, even beyond the limit, and leaves it to the kernel. What is
    /// poisoned stays poisoned.
    ///
    /// # Errors
    /// When the kernel refuses; what comes before is managed no longer, the rest as before.
    pub(crate) fn disown(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.geometry.pages_inside(range);
        let mut at = pages.start;
        while at < pages.end {
            let rest = PageRange { start: at, end: pages.end };
            let part = self.in_place_parts(rest).next();
            let end = part.map_or(pages.end, |part| part.start);
            if at < end {
                self.disown_movable(self.addresses(PageRange { start: at, end }))?;
            }
            if let Some(part) = part {
                self.disown_in_place(part);
            }
            at = part.map_or(pages.end, |part| part.end);
        }
        Ok(())
    }

    fn disown_movable(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.geometry.pages_inside(range);
        let keep = |kept: bool| {
            let change = |a: Attributes| {
                if kept { a.with(Attributes::KEPT) } else { a.without(Attributes::KEPT) }
            };
            self.advise(pages, change).map_err(|_| Trouble::NoMemory)
        };
        keep(true)?;
        loop {
            self.bring_home(pages);
            self.bury_within(pages);
            let rest = self.rest();
            // A victim that was in hand when the region was marked is not home yet; and a page that is lost and not marked
            // as such would read as zeros from here on.
            if !self.all_home(pages) || !self.all_lost_marked(pages) {
                drop(rest);
                crate::sync::yield_now();
                continue;
            }
            // The program may have unmapped some of it long ago, and have something else there.
            let mut pieces = self.pieces(pages).map(|region| region.range);
            let stopped = pieces.find_map(|piece| match self.kernel.disown(self.addresses(piece)) {
                Ok(()) => {
                    self.forget_given(piece);
                    None
                }
                Err(why) => Some((piece, why)),
            });
            let Some((piece, why)) = stopped else { return Ok(()) };
            if self.kernel.is_changing() {
                // It has unmapped some just now.
                drop(rest);
                self.wait_for_changes();
                continue;
            }
            // Some of it may have been given up. What is not registered must not leave: it would read as zeros.
            let back = (0..TRIES).any(|_| self.kernel.adopt(self.addresses(piece)).is_ok());
            drop(rest);
            if back {
                keep(false)?;
            }
            return Err(why);
        }
    }

    /// What is home of `piece` is the kernel's from here on, which tells of changes to it no longer. The engine is at rest.
    fn forget_given(&self, piece: PageRange) {
        let charged = self.budget.charged();
        let _ = self.regions.remove(piece, |_| {});
        self.discard(piece, &self.contexts.all()[0].as_ref().counters);
        self.release_table(piece);
        let tracked = charged - self.budget.charged();
        let mut there = 0;
        let count = &mut |run: VaRange| there += self.geometry.pages_in(run.len()).0 as i64;
        let _ = self.kernel.present_runs(self.addresses(piece), count);
        self.budget.add_native((tracked - there).min(0));
    }

    fn all_home(&self, pages: PageRange) -> bool {
        self.away(pages).next().is_none()
    }

    /// The pages of `pages` whose data is not mapped by the CPU alone.
    fn away(&self, pages: PageRange) -> impl Iterator<Item = Vpn> + '_ {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            while at < pages.end {
                let vpn = at;
                let (entry, whole) = self.table.look(vpn)?;
                at = vpn + 1;
                match entry.state() {
                    State::Standby { .. } | State::Device { .. } => return Some(vpn),
                    state if state.may_be_on_mmus() => return Some(vpn),
                    _ if whole => at = vpn.block_start() + BLOCK_PAGES,
                    _ => {}
                }
            }
            None
        })
    }

    /// Gives everything of `pages` that is away back to the program, as pages of the kernel's: beyond the limit if
    /// need be, for it has nowhere else to go.
    fn bring_home(&self, pages: PageRange) {
        // What cannot be taken from its place is away: whoever waits for all to be home asks again.
        let _ = self.leave_places(pages);
        for vpn in self.away(pages) {
            let mut work = self.contexts.take();
            let Ok(entry) = self.table.lock(vpn) else { continue };
            if let State::Mapped { held: true, .. } = entry.state() {
                // A launch relies on it; whoever waits for all to be home asks again.
                continue;
            }
            // What devices had of it they have no more (rule G5).
            let entry = self.recall(entry);
            if entry.is_whole() {
                if let State::Standby { .. } | State::Device { .. } = entry.state() {
                    self.split_whole(entry, &work.counters);
                }
            } else if self.make_native(entry, &mut work) == Err(Hold::Changing) {
                drop(work);
                self.wait_for_changes();
            }
        }
    }

    /// Puts a page that is away where the program has it, and forgets it.
    pub(crate) fn make_native(&self, mut entry: Entry<'_, K>, work: &mut Working<'_>) -> Result<(), Hold> {
        let to = self.geometry.va(entry.vpn());
        let (context, buffer) = work.parts();
        let bytes = &mut buffer[..self.geometry.page_bytes()];
        let from_standby = match entry.state() {
            State::Standby { pfn, .. } => Some(self.memmap.page(pfn)),
            State::Device { pfn, .. } => {
                if let Err(e) = self.tiers.load(pfn, bytes) {
                    self.lose(entry, e, context);
                    return Ok(());
                }
                None
            }
            _ => return Ok(()),
        };
        let done = match (self.gate.enter(context), from_standby) {
            (Some(_section), None) => self.kernel.copy_in(to, bytes, Protect::No, Wake::Yes),
            (Some(_section), Some(frame)) => {
                self.kernel.copy_staged(to, self.staged_at(frame).0, Protect::No, Wake::Yes)
            }
            (None, _) => Done::stopped(Pages(0), Trouble::Changing),
        };
        if let Some(trouble) = done.trouble {
            return Err(self.hold(trouble));
        }
        self.budget.add_native(1);
        let state = entry.state();
        entry.set(State::Empty);
        match (state, from_standby) {
            (State::Device { pfn, .. }, _) => self.tiers.free(pfn, Order::BASE),
            (_, Some(frame)) => self.free_standby(frame),
            _ => unreachable!("only pages that are away are made native"),
        }
        Ok(())
    }

    /// Takes some native pages in hand: moves them to standby. Returns how many; 0 when a long search found none.
    pub(crate) fn take_native(&self, work: &mut Working<'_>) -> u64 {
        let mut rounds = 0;
        for _ in 0..LOOK {
            let hand = Vpn(self.native_hand.load(Relaxed));
            let region = self.regions.next(hand);
            let Some(region) = region else {
                rounds += 1;
                // Twice: the first round began anywhere.
                if hand.0 == 0 || rounds > 1 {
                    return 0;
                }
                self.native_hand.store(0, Relaxed);
                continue;
            };
            let at = hand.max(region.range.start);
            let piece = PageRange::block(at.block()).intersect(region.range);
            let piece = PageRange { start: at, end: piece.end };
            if !region.attributes.has(Attributes::ADOPTED) || region.attributes.has(Attributes::KEPT) {
                self.native_hand.store(region.range.end.0, Relaxed);
                continue;
            }
            let (taken, next) = self.take_native_from(piece, work);
            self.native_hand.store(next.0, Relaxed);
            if taken > 0 {
                count_n(&work.counters.taken_in_hand, taken);
                return taken;
            }
        }
        0
    }

    /// Takes native pages of one block in hand. Returns how many, and where to go on: behind the block, where its memory is of
    /// a mapping that lets none go.
    pub(super) fn take_native_from(&self, piece: PageRange, work: &mut Working<'_>) -> (u64, Vpn) {
        let mut runs: ArrayVec<PageRange, 16> = ArrayVec::new();
        let mut more = None;
        let scan = self.kernel.present_runs(self.addresses(piece), &mut |run| {
            let run = self.geometry.pages_inside(run);
            if runs.try_push(run).is_err() && more.is_none() {
                more = Some(run.start);
            }
        });
        if scan.is_err() {
            return (0, piece.end);
        }
        if runs.first() == Some(&PageRange::block(piece.start.block()))
            && let Some(taken) = self.take_native_block(piece, work)
        {
            return (taken, piece.end);
        }
        let mut at = piece.start;
        for run in runs {
            at = at.max(run.start);
            while at < run.end {
                let (taken, next) = self.take_native_run(PageRange { start: at, end: run.end }, work);
                if taken > 0 {
                    return (taken, next);
                }
                at = next;
            }
        }
        (0, at.max(more.unwrap_or(piece.end)))
    }

    /// Takes a block in hand that the kernel has populated wholly, of which the table knows nothing yet.
    fn take_native_block(&self, block: PageRange, work: &mut Working<'_>) -> Option<u64> {
        if !self.huge.load(Relaxed) {
            return None;
        }
        let mut entry = self.table.try_lock(block.start).ok().flatten()?;
        if !entry.is_whole() || entry.state() != State::Empty {
            return None;
        }
        // Those that lie ready have pages of their own: this one comes with its own.
        let frame = self.memmap.take_block().or_else(|| {
            self.release_ready();
            self.memmap.take_block()
        })?;
        let done = match self.gate.enter(work.context()) {
            Some(_section) if self.may_take(block) => {
                self.take_native_out(self.blocks.range(frame).start, self.addresses(block), work.context())
            }
            Some(_) => Done::stopped(Pages(0), Trouble::Absent),
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        if done.pages.0 == 0 {
            self.memmap.reset(frame);
            self.memmap.give_back(frame);
            return None;
        }
        self.budget.take_native(done.pages.0);
        self.memmap.reset(frame);
        self.memmap.place(frame, block.start, self.life());
        self.memmap.set_arrival(frame, Arrival::Reuse);
        let pfn = self.memmap.pfn(frame);
        if done.pages.0 == BLOCK_PAGES {
            entry.set(State::Standby { pfn, dirt: Dirt::Dirty });
            self.blocks.put_on_standby(frame);
            return Some(BLOCK_PAGES);
        }
        // Some page could not go: the ones before it are on standby in the block's staging, the others stay native.
        self.memmap.split_block(frame);
        entry.split(|i| {
            if i < done.pages.0 {
                peerspace_core::entry::Entry::new(State::Standby { pfn: pfn + i, dirt: Dirt::Dirty })
            } else {
                peerspace_core::entry::Entry::EMPTY
            }
        });
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(pfn + i);
            self.memmap.set_slot(part, None);
            if i >= done.pages.0 {
                self.free_frame(part, false);
            }
        }
        self.blocks.put_on_standby(frame);
        Some(done.pages.0)
    }

    /// Whether native `pages` may be taken in hand. To be asked in the section in which they are, because until then the
    /// region may have gone, and something else, which is not registered, have taken its place; news that comes later
    /// finds what was taken.
    pub(super) fn may_take(&self, pages: PageRange) -> bool {
        let managed = |r: RegionInfo| {
            r.range.covers(pages) && r.attributes.has(Attributes::ADOPTED) && !r.attributes.has(Attributes::KEPT)
        };
        self.region(pages.start).is_some_and(managed) && !self.going.may_hold(pages)
    }

    /// Moves native pages to staging, in a section; makes them this process's own first where that is needed.
    fn take_native_out(&self, to: Va, mut from: VaRange, context: &Context) -> Done {
        let first = loop {
            match self.take_out_of(to, from) {
                // They may belong to different mappings, whose pages cannot go together.
                Done { pages: Pages(0), trouble: Some(Trouble::Unsuitable) }
                    if from.len() > self.geometry.page_bytes() as u64 =>
                {
                    let half = self.geometry.pages_in(from.len()).0.div_ceil(2);
                    from.end = Va(from.start.0 + self.geometry.bytes(Pages(half)));
                }
                done => break done,
            }
        };
        if first.trouble != Some(Trouble::Busy) {
            return first;
        }
        let done = self.geometry.bytes(first.pages);
        let rest = VaRange { start: Va(from.start.0 + done), ..from };
        if !self.unshare(rest, context) {
            return first;
        }
        let second = self.take_out_of(Va(to.0 + done), rest);
        Done { pages: first.pages + second.pages, ..second }
    }

    /// Where memory begins that may be taken out of its mapping, behind `vpn`, which may not: mostly because the program has
    /// protected it.
    fn behind_protected(&self, vpn: Vpn) -> Vpn {
        match self.kernel.mapped_from(self.geometry.va(vpn)) {
            Ok(Some(mapped)) if mapped.allowed != Some(Access::Write) => {
                self.geometry.vpn(mapped.range.end).max(vpn + 1)
            }
            _ => vpn + 1,
        }
    }

    /// Takes native pages at the start of `run` in hand. Returns how many, and where to go on.
    fn take_native_run(&self, run: PageRange, work: &mut Working<'_>) -> (u64, Vpn) {
        let mut locks: ArrayVec<(Entry<'_, K>, Frame), TAKE> = ArrayVec::new();
        let mut at = run.start;
        while at < run.end && !locks.is_full() {
            let entry = match self.table.try_lock(at) {
                Ok(Some(entry)) if entry.is_whole() && entry.state() == State::Empty => {
                    entry.split_evenly();
                    continue;
                }
                Ok(Some(entry)) if !entry.is_whole() && entry.state() == State::Empty => entry,
                // Tracked already, or in somebody's hands.
                _ => break,
            };
            let Some(frame) = self.new_frame(at) else { break };
            locks.push((entry, frame));
            at = at + 1;
        }
        if locks.is_empty() {
            return (0, at + 1);
        }
        let slots = self.ring.reserve(locks.len() as u32);
        let n = slots.map_or(0, |s| s.count as usize);
        let done = match slots {
            Some(slots) => match self.gate.enter(work.context()) {
                Some(_section) => {
                    let pages = PageRange::new(run.start, Pages(n as u64));
                    if self.may_take(pages) {
                        self.take_native_out(self.ring.range(slots).start, self.addresses(pages), work.context())
                    } else {
                        Done::stopped(Pages(0), Trouble::Absent)
                    }
                }
                None => Done::stopped(Pages(0), Trouble::Changing),
            },
            None => Done::stopped(Pages(0), Trouble::NoMemory),
        };
        let took = done.pages.0 as usize;
        self.budget.take_native(took as u64);
        let mut next = at;
        for (i, (entry, frame)) in locks.into_iter().enumerate() {
            match slots {
                Some(slots) if i < took => {
                    let slot = slots.first + i as u32;
                    self.memmap.set_slot(frame, Some(slot));
                    self.memmap.set_arrival(frame, Arrival::Reuse);
                    self.ring.occupy(slot, frame);
                    entry.commit(State::Standby { pfn: self.memmap.pfn(frame), dirt: Dirt::Dirty });
                }
                _ => {
                    if i == took {
                        // This one cannot go now; the search goes on behind it.
                        next = match done.trouble {
                            Some(Trouble::Unsuitable) => self.behind_protected(entry.vpn()),
                            _ => entry.vpn() + 1,
                        };
                        count(&work.counters.busy);
                    }
                    self.memmap.give_back(frame);
                }
            }
        }
        if let Some(slots) = slots {
            self.ring.settle(slots, done);
        }
        (took as u64, next)
    }
}
