//! Reclaim: making room before it is missed, by unmapping what is least likely to be used.
//!
//! ```text
//!  mapped --victim of the policy, unmapped--> standby --asked for--> mapped again
//!                                                |
//!                                                +--its turn comes--> device, or dropped  (evict)
//! ```
//!
//! Reclaim runs in the background when the budget falls below its low watermark, and in the faulting thread when
//! there is nothing left at all. It comes from the frame to the page, against the order of locks, and therefore
//! only ever *tries* to lock an entry.
//!
//! Unmapping a page makes the kernel interrupt every processor that runs a thread of the process. On some
//! machines (virtual ones above all) that costs more than all the rest, and interrupts the program too. The
//! background reclaimer therefore measures what a small page costs it, and leaves small pages to the faulting
//! threads where they do it more cheaply ([`Pace`]).

use super::context::{Context, Working};
use super::evict::Drained;
use super::fault::{Hold, Patience};
use super::stats::{count, count_n};
use super::{Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{BLOCK_PAGES, Order, PageRange, Pages, Va, VaRange};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Arrival, Backing, Frame};
use peerspace_core::regions::Attributes;
use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};
use peerspace_os::{Done, Kernel, Protect, Trouble, Wake};
use std::time::{Duration, Instant};

/// Victims unmapped in one go.
pub(super) const VICTIMS: usize = 32;
/// How long there is no progress before room is made by exceeding the limit: every device is full.
const STUCK: Duration = Duration::from_millis(50);
/// Steps without a page freed before that can be said: some only prepare.
const MOVES: u32 = 1024;
/// The same when it has just been so: then it probably still is.
const STUCK_AGAIN: Duration = Duration::from_micros(100);
/// And then only one of so many faults tries at all.
const HOPE: u64 = 32;
/// The same while memory that is not managed yet takes up the budget: whoever adopts it is on the way.
const STUCK_ON_NATIVE: Duration = Duration::from_millis(500);

/// What one step of reclaim achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// So many pages went back to the kernel.
    Freed(u64),
    /// Something moved on, without freeing a page yet.
    Moved,
    /// Nothing could be done: what is mapped is pinned or in use by other threads, or no device has room.
    Stuck,
    /// Nothing can be done before a change of mappings has been received.
    Changing,
}

/// What unmapping a small page costs in the background, compared with a faulting thread.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Nanoseconds per page, averaged; 0 for unknown.
    background: AtomicU64,
    direct: AtomicU64,
    /// The background leaves small pages alone until then (ns on the clock of `since`).
    leave_until: AtomicU64,
    /// Until then there is little hope that a device has room (on the same clock).
    stuck_until: AtomicU64,
    /// Faults since then.
    hopeful: AtomicU64,
    since: Instant,
}

impl Pace {
    /// The background must be this much slower before it gives up.
    const TOO_SLOW: u64 = 2;
    /// And does so for this long before it tries again.
    const LEAVE: Duration = Duration::from_millis(500);

    pub(crate) fn new() -> Pace {
        Pace {
            background: AtomicU64::new(0),
            direct: AtomicU64::new(0),
            leave_until: AtomicU64::new(0),
            stuck_until: AtomicU64::new(0),
            hopeful: AtomicU64::new(0),
            since: Instant::now(),
        }
    }

    fn note(&self, background: bool, pages: u64, took: Duration) {
        let average = if background { &self.background } else { &self.direct };
        let now = took.as_nanos() as u64 / pages.max(1);
        let before = average.load(Relaxed);
        average.store(if before == 0 { now } else { (before * 7 + now) / 8 }, Relaxed);
        if background {
            // Nothing to compare with: a microsecond is what it costs where nobody is interrupted.
            let direct = self.direct.load(Relaxed).clamp(1000, 5000);
            if self.background.load(Relaxed) > direct * Self::TOO_SLOW {
                let until = self.since.elapsed() + Self::LEAVE;
                self.leave_until.store(until.as_nanos() as u64, Relaxed);
                self.background.store(0, Relaxed);
            }
        }
    }

    fn note_stuck(&self) {
        self.stuck_until.store((self.since.elapsed() + STUCK).as_nanos() as u64, Relaxed);
    }

    /// True for one in [`HOPE`] of those who ask.
    fn hopes(&self) -> bool {
        self.hopeful.fetch_add(1, Relaxed).is_multiple_of(HOPE)
    }

    fn was_stuck(&self) -> bool {
        (self.since.elapsed().as_nanos() as u64) < self.stuck_until.load(Relaxed)
    }

    /// Whether the background should unmap small pages now.
    pub(crate) fn background_pays(&self) -> bool {
        let until = self.leave_until.load(Relaxed);
        until == 0 || self.since.elapsed().as_nanos() as u64 > until
    }
}

impl<K: Kernel> Engine<K> {
    /// Charges `pages`, making room first if there is none. To be called without any lock.
    ///
    /// # Errors
    /// [`Hold::Busy`] if it takes a wait and there is no patience; [`Hold::Changing`] if nothing can leave RAM before
    /// a change has been received, by the caller perhaps.
    pub(crate) fn charge(&self, pages: u64, work: &mut Working<'_>, patience: Patience) -> Result<(), Hold> {
        // Since when nothing was freed, and how many times something at least moved.
        let (mut stuck, mut moves): (Option<Instant>, u32) = (None, 0);
        while !self.budget.try_charge(pages) {
            if patience == Patience::Never && self.has_slow_device() {
                return Err(Hold::Busy);
            }
            if self.is_hopeless() {
                self.budget.force(pages);
                break;
            }
            count(&work.counters.direct_reclaims);
            let since = || stuck.map_or(Duration::ZERO, |since| since.elapsed());
            match self.reclaim_step(work, false) {
                Step::Freed(_) => (stuck, moves) = (None, 0),
                Step::Changing => return Err(Hold::Changing),
                // To and fro: what was unmapped cannot be written, and comes back.
                Step::Moved if moves < MOVES || since() <= self.patience_when_stuck() => {
                    moves += 1;
                    stuck.get_or_insert_with(Instant::now);
                }
                // Other threads may have all of it in hand, or it is shared with a forked process.
                Step::Stuck if since() <= self.patience_when_stuck() => {
                    stuck.get_or_insert_with(Instant::now);
                    self.service.wake_reclaim(&self.kernel.park());
                    crate::sync::yield_now();
                }
                Step::Moved | Step::Stuck => {
                    // Nothing can leave. To go beyond the limit loses nothing.
                    self.tell_full();
                    self.service.pace.note_stuck();
                    self.budget.force(pages);
                    break;
                }
            }
        }
        self.watch_budget();
        Ok(())
    }

    /// Wakes the background reclaimer when room becomes scarce.
    pub(crate) fn watch_budget(&self) {
        if self.budget.left() < self.budget.watermarks().low.0 as i64 {
            self.service.wake_reclaim(&self.kernel.park());
        }
    }

    /// Whether adopting memory will make room.
    fn waits_for_native(&self) -> bool {
        self.native_missed.load(Relaxed) && self.budget.native() > 0 && !self.tiers.full()
    }

    /// While nothing can leave, only some faults try to make room; and none for a while if all devices said that they
    /// are full.
    fn is_hopeless(&self) -> bool {
        let pace = &self.service.pace;
        pace.was_stuck() && !self.waits_for_native() && (self.tiers.full() || !pace.hopes())
    }

    fn patience_when_stuck(&self) -> Duration {
        if self.waits_for_native() {
            STUCK_ON_NATIVE
        } else if self.service.pace.was_stuck() {
            STUCK_AGAIN
        } else {
            STUCK
        }
    }

    fn tell_full(&self) {
        // What cannot leave for a while because the program protects it is no reason to alarm anybody.
        if self.tiers.full() && self.service.say_once_full() {
            crate::tell::warning(format_args!(
                "no device has room for what has to leave RAM; the limit of {} MiB is exceeded rather than data lost",
                self.geometry.bytes(self.budget.limit()) >> 20
            ));
        }
    }

    /// One step towards more room: frees what is free already, evicts from a long standby, or unmaps.
    pub(crate) fn reclaim_step(&self, work: &mut Working<'_>, background: bool) -> Step {
        // In the background, ready frames are left for the next huge fault.
        if !background && self.release_ready() {
            return Step::Freed(BLOCK_PAGES);
        }
        let (waiting, segments) = self.ring.waiting();
        if waiting > segments / 2
            && let Drained::Freed(n @ 1..) = self.drain_oldest(work)
        {
            return Step::Freed(n);
        }
        if self.blocks.on_standby() > self.standby_blocks() && self.evict_oldest_block(work) {
            return Step::Moved; // the next step releases it
        }
        // What nobody has looked at yet goes to standby first: that is how its use is found out.
        if self.budget.native() > 0 {
            if self.take_native(work) > 0 {
                return Step::Moved;
            }
            // It must be in mappings that are not managed yet.
            self.native_missed.store(true, Relaxed);
        }
        // What nobody uses of a folio, before what somebody does.
        if self.split_deferred(&work.counters) {
            return Step::Moved;
        }
        if self.unmap_victims(work, background) > 0 {
            return Step::Moved;
        }
        // Nothing can be unmapped: what is on standby is all there is.
        if self.evict_oldest_block(work) {
            return Step::Moved;
        }
        let mut drained = self.drain_oldest(work);
        if drained == Drained::Nothing {
            self.ring.close_filling();
            drained = self.drain_oldest(work);
        }
        match drained {
            Drained::Freed(n @ 1..) => Step::Freed(n),
            _ if self.kernel.is_changing() => Step::Changing,
            // A segment in which there was nothing is no headway.
            Drained::Freed(_) | Drained::Kept | Drained::Nothing => Step::Stuck,
        }
    }

    /// One step towards a ready block frame. False when there is no prospect of one.
    pub(crate) fn reclaim_for_block(&self, work: &mut Working<'_>) -> bool {
        if self.blocks.on_standby() > self.standby_blocks() && self.evict_oldest_block(work) {
            return true;
        }
        match self.unmap_victims(work, false) {
            0 => self.evict_oldest_block(work),
            n => {
                if n < BLOCK_PAGES {
                    let (waiting, segments) = self.ring.waiting();
                    if waiting > segments / 2 {
                        let _ = self.drain_oldest(work);
                    }
                }
                true
            }
        }
    }

    /// Blocks that may rest on standby: one in sixteen.
    fn standby_blocks(&self) -> usize {
        (self.budget.limit().0 / BLOCK_PAGES / 16).max(1) as usize
    }

    /// Unmaps the policy's next victims. Returns the pages unmapped.
    fn unmap_victims(&self, work: &mut Working<'_>, background: bool) -> u64 {
        /// Folios in a row that can only be split, or not even that.
        const SPREAD: u32 = 8;
        let mut unmapped = 0;
        for _ in 0..SPREAD {
            let (pages, spread) = self.unmap_some(work, background);
            unmapped += pages;
            if unmapped > 0 || !spread {
                break;
            }
        }
        unmapped
    }

    /// Unmaps a run of small pages, or one block. Returns how many pages, and whether it came upon a folio to be split
    /// first.
    fn unmap_some(&self, work: &mut Working<'_>, background: bool) -> (u64, bool) {
        let small = !background || self.service.pace.background_pays();
        let mut pages: ArrayVec<(Entry<'_, K>, Frame), VICTIMS> = ArrayVec::new();
        let mut block = None;
        let mut spread = None;
        {
            let mut policy = self.policy.lock();
            self.incoming.drain(&self.memmap, &mut **policy);
            for _ in 0..2 * VICTIMS {
                let Some(frame) = policy.victim(&self.memmap) else { break };
                let whole = self.memmap.is_block(frame);
                if (whole && !pages.is_empty()) || (!whole && !small) {
                    policy.put_back(&self.memmap, frame);
                    break;
                }
                // It cannot be freed while this holds the lock of the lists, but be split (H10). See `retract`.
                let alive = self.get_frame(frame);
                let entry = self.table.try_lock(self.memmap.vpn(frame)).ok().flatten().filter(|_| alive);
                if alive {
                    self.put_frame(frame);
                }
                if whole && entry.as_ref().is_some_and(|e| !e.is_whole()) {
                    spread = entry.map(|e| e.vpn().block());
                    self.memmap.set_arrival(frame, Arrival::Reuse);
                    policy.insert(&self.memmap, frame);
                    break;
                }
                // A frame on a list is mapped by the entry it names; only its lock may be taken.
                match entry.filter(|e| self.can_go(e, frame)) {
                    Some(entry) if whole => {
                        block = Some((entry, frame));
                        break;
                    }
                    Some(entry) => {
                        pages.push((entry, frame));
                        if pages.is_full() {
                            break;
                        }
                    }
                    None => {
                        self.memmap.set_arrival(frame, Arrival::Reuse);
                        policy.insert(&self.memmap, frame);
                    }
                }
            }
            self.note_protected(policy.protected());
        }
        if let Some(block) = spread {
            // A folio whose pages are mapped one by one is split first (H9).
            match self.split_folio(block) {
                Ok(()) => count(&work.counters.folio_splits),
                Err(_) => count(&work.counters.folio_splits_failed),
            }
        }
        // What devices share of it they do no more.
        let unmapped = match block {
            Some((entry, frame)) => self.unmap_block(self.recall(entry), frame, work),
            None => {
                let pages = pages.into_iter().map(|(entry, frame)| (self.recall(entry), frame)).collect();
                self.unmap_pages(pages, work, background)
            }
        };
        (unmapped, spread.is_some())
    }

    /// Whether `entry` maps `frame`, and it may go.
    pub(super) fn can_go(&self, entry: &Entry<'_, K>, frame: Frame) -> bool {
        matches!(entry.state(), State::Host { pfn, .. } | State::Shared { pfn, .. } if pfn == self.memmap.pfn(frame))
            && entry.is_whole() == self.memmap.is_block(frame)
            && self.memmap.pins(frame) == 0
            && self.region(entry.vpn()).is_some_and(|r| !r.attributes.has(Attributes::KEPT))
    }

    /// Puts a page back on its list, mapped as it was: it could not be unmapped now.
    fn keep(&self, entry: Entry<'_, K>, frame: Frame) {
        self.announce(frame, Arrival::Reuse);
        drop(entry);
    }

    pub(super) fn unmap_pages(
        &self,
        mut pages: ArrayVec<(Entry<'_, K>, Frame), VICTIMS>,
        work: &mut Working<'_>,
        background: bool,
    ) -> u64 {
        if pages.is_empty() {
            return 0;
        }
        // Neighbours in one operation: what costs is the operation, not the page.
        pages.sort_unstable_by_key(|(e, _)| e.vpn());
        let started = Instant::now();
        let mut unmapped = 0;
        while !pages.is_empty() {
            let first = pages[0].0.vpn();
            let run = pages.iter().enumerate().take_while(|(i, (e, _))| e.vpn() == first + *i as u64).count();
            let Some(slots) = self.ring.reserve(run as u32) else { break };
            let (n, done) = self.take_out_pages(&mut pages[..slots.count as usize], slots, work);
            let took = done.pages.0 as usize;
            for (i, (entry, frame)) in pages.drain(..n).enumerate() {
                if i < took {
                    let State::Host { pfn, dirt, .. } = entry.state() else { unreachable!("a victim is mapped") };
                    let slot = slots.first + i as u32;
                    self.memmap.set_slot(frame, Some(slot));
                    self.memmap.set_arrival(frame, Arrival::Reuse);
                    self.ring.occupy(slot, frame);
                    let _ = self.memmap.unmap(frame);
                    entry.commit(State::Standby { pfn, dirt });
                } else if i == took && done.trouble == Some(Trouble::Absent) && self.is_gone(&entry) {
                    // Discarded; see `present` in the fault path. The gate was open, so no news is pending.
                    self.forget_victim(entry, frame);
                } else {
                    count(&work.counters.busy);
                    self.keep(entry, frame);
                }
            }
            self.ring.settle(slots, done);
            unmapped += took as u64;
            if done.trouble == Some(Trouble::Changing) {
                break;
            }
        }
        for (entry, frame) in pages {
            self.keep(entry, frame);
        }
        if unmapped > 0 {
            count_n(&work.counters.unmapped, unmapped);
            self.service.pace.note(background, unmapped, started.elapsed());
        }
        unmapped
    }

    /// Moves neighbouring victims to `slots`: as many of them as one operation can. Returns how many that were, and how
    /// far it came. Those that are shared with a forked process become this process's own first.
    fn take_out_pages(
        &self,
        pages: &mut [(Entry<'_, K>, Frame)],
        slots: super::staging::Slots,
        work: &Working<'_>,
    ) -> (usize, Done) {
        let start = pages[0].0.vpn();
        let to = self.ring.range(slots).start;
        let page = self.geometry.page_bytes() as u64;
        let mut n = pages.len();
        let Some(_section) = self.gate.enter(work.context()) else {
            return (n, Done::stopped(Pages(0), Trouble::Changing));
        };
        let first = loop {
            match self.take_out_of(to, self.addresses(PageRange::new(start, Pages(n as u64)))) {
                // They may belong to different mappings, whose pages cannot go together.
                Done { pages: Pages(0), trouble: Some(Trouble::Unsuitable) } if n > 1 => n /= 2,
                done => break done,
            }
        };
        if first.trouble != Some(Trouble::Busy) {
            return (n, first);
        }
        let went = first.pages.0;
        for (entry, frame) in &mut pages[went as usize..n] {
            self.make_dirty(entry, *frame);
        }
        let rest = self.addresses(PageRange { start: start + went, end: start + n as u64 });
        if !self.make_own(rest, work.context()) {
            return (n, first);
        }
        let second = self.take_out_of(Va(to.0 + went * page), rest);
        (n, Done { pages: first.pages + second.pages, ..second })
    }

    /// Moves the program's pages to staging, in a section and with their entries locked: also out of memory that is read-only, where
    /// nobody changes that unheard.
    pub(super) fn take_out_of(&self, to: Va, from: VaRange) -> Done {
        match self.kernel.take_out(to, from) {
            Done { pages: Pages(0), trouble: Some(Trouble::Unsuitable) }
                if self.may_unprotect(self.geometry.pages_inside(from)) =>
            {
                self.kernel.take_out_read_only(to, from)
            }
            done => done,
        }
    }

    /// Whether the page of `entry` is not there: the kernel itself says so, not only an operation that failed.
    fn is_gone(&self, entry: &Entry<'_, K>) -> bool {
        self.kernel.is_present(self.geometry.va(entry.vpn())) == Ok(false)
    }

    /// Gives the process pages of its own in `range`, where it shares them with a forked one. Called in a section and
    /// with the entries locked, which are [dirty](Engine::make_dirty).
    fn make_own(&self, range: VaRange, context: &Context) -> bool {
        self.kernel.protect(range, Protect::No, Wake::Yes).is_ok() && self.unshare(range, context)
    }

    /// The same for pages that are not protected. They are there and cannot be discarded meanwhile; but the program may move them
    /// away, and the kernel drop what was given up, unheard. The kernel would wait for them to come back.
    pub(super) fn unshare(&self, range: VaRange, context: &Context) -> bool {
        self.access_mapped(context, (range, true), || self.kernel.unshare(range).is_ok())
    }

    /// Takes note that a mapped page (or block) is not write-protected any more, and so may differ from its backing.
    fn make_dirty(&self, entry: &mut Entry<'_, K>, frame: Frame) {
        let State::Host { writable, .. } = entry.state() else { unreachable!("a victim is mapped") };
        if !writable {
            self.forget_copy(entry, frame);
        }
    }

    /// The frame is the only copy from now on.
    pub(super) fn forget_copy(&self, entry: &mut Entry<'_, K>, frame: Frame) {
        let copy = self.memmap.backing(frame);
        self.memmap.set_backing(frame, Backing::None);
        entry.set(match entry.state() {
            State::Host { pfn, .. } => State::Host { pfn, writable: true, dirt: Dirt::Dirty },
            State::Standby { pfn, .. } => State::Standby { pfn, dirt: Dirt::Dirty },
            other => unreachable!("{other:?} has no frame"),
        });
        self.free_backing(copy, if entry.is_whole() { Order::BLOCK } else { Order::BASE });
    }

    /// A victim that is on no list turned out to be discarded by the program.
    fn forget_victim(&self, entry: Entry<'_, K>, frame: Frame) {
        let backing = self.memmap.backing(frame);
        self.unmap_gone(frame);
        entry.commit(State::Empty);
        self.budget.uncharge(1);
        self.free_backing(backing, Order::BASE);
    }

    pub(super) fn unmap_block(&self, mut entry: Entry<'_, K>, frame: Frame, work: &mut Working<'_>) -> u64 {
        let to = self.blocks.range(frame).start;
        let from = self.addresses(entry.range());
        let done = match self.gate.enter(work.context()) {
            Some(_section) => match self.take_out_of(to, from) {
                Done { pages: Pages(0), trouble: Some(Trouble::Busy) } => {
                    self.make_dirty(&mut entry, frame);
                    if self.make_own(from, work.context()) {
                        self.take_out_of(to, from)
                    } else {
                        Done::stopped(Pages(0), Trouble::Busy)
                    }
                }
                done => done,
            },
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        let State::Host { pfn, dirt, .. } = entry.state() else { unreachable!("a victim is mapped") };
        if done.pages.0 == BLOCK_PAGES {
            self.memmap.set_arrival(frame, Arrival::Reuse);
            let _ = self.memmap.unmap(frame);
            entry.set(State::Standby { pfn, dirt });
            self.blocks.put_on_standby(frame);
            drop(entry);
            count_n(&work.counters.unmapped, BLOCK_PAGES);
            return BLOCK_PAGES;
        }
        count(&work.counters.busy);
        if done.pages.0 == 0 && done.trouble == Some(Trouble::Changing) {
            self.keep(entry, frame);
            return 0;
        }
        // The kernel had broken the block up, and one of its pages cannot go: the block goes on in pieces, of
        // which the first are on standby in the block's staging.
        self.split_taken(entry, frame, done.pages, work);
        done.pages.0
    }

    /// Splits a block of which the first `taken` pages are staged and the others still mapped.
    fn split_taken(&self, entry: Entry<'_, K>, frame: Frame, taken: Pages, work: &Working<'_>) {
        let State::Host { pfn, writable, dirt } = entry.state() else { unreachable!("a victim is mapped") };
        self.memmap.split_mapped_block(frame);
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(pfn + i);
            if i < taken.0 {
                let _ = self.memmap.unmap(part);
                self.memmap.set_slot(part, None);
                self.memmap.set_arrival(part, Arrival::Reuse);
            } else {
                self.announce(part, Arrival::Reuse);
            }
        }
        entry.split(|i| {
            let pfn = pfn + i;
            peerspace_core::entry::Entry::new(if i < taken.0 {
                State::Standby { pfn, dirt }
            } else {
                State::Host { pfn, writable, dirt }
            })
        });
        if taken.0 > 0 {
            self.blocks.put_on_standby(frame);
        }
        count(&work.counters.splits);
        count(&work.counters.folio_splits);
    }
}
