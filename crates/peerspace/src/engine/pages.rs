//! Faults resolved page by page: zeros, loads, pages taken back from standby, first writes.
//!
//! Pages are installed by copying: that needs no flush of other processors' translations, and a page that is only
//! read can be write-protected from its first moment on, which proves that it stays clean. Neighbours of the
//! faulting page in the same state come along when the faults show a stream: they are locked beside it if nobody
//! else holds them, transferred in one batch and installed by one call.
//!
//! # Copied in, moved out
//!
//! Unmapping by `UFFDIO_MOVE` makes the kernel flush the translations of every processor that runs a thread of the process:
//! 9 to 10 us on a virtual machine with a second running thread, where the call alone is below 1 us. `UFFDIO_COPY` into a
//! hole needs no flush and takes about 1 us. So a small page comes in by COPY, and is unmapped by MOVE into a slot of standby,
//! in runs where neighbours go together. A huge folio moves both ways for 2 us ([`block`](super::block)). Where flushes prove
//! expensive, the background reclaimer leaves small pages to the faulting threads ([`reclaim`](super::reclaim)).

use super::context::{Context, Working};
use super::fault::{Fault, Hold, Outcome, Patience, Ration};
use super::stats::{count, count_n};
use super::tiers::{DeviceError, Load};
use super::{Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, Order, PageRange, Pages, VaRange, Vpn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Arrival, Backing, Frame};
use peerspace_core::plan::{self, CLUSTER};
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::stream::Direction;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Done, Kernel, Protect, Trouble, Wake};

/// How often in a row a page alone must fail to load before it is lost.
const TRIES: u32 = 3;
/// Pages brought in by one fault.
const MOST: usize = CLUSTER.0 as usize;

/// Entries locked side by side, in ascending order.
type Locks<'t, K> = ArrayVec<Entry<'t, K>, MOST>;

impl<K: Kernel> Engine<K> {
    /// Locks up to `most` pages around the one locked that lie in its block and region and satisfy `same`.
    fn neighbours<'t>(
        &'t self,
        entry: Entry<'t, K>,
        region: RegionInfo,
        most: Pages,
        direction: Direction,
        same: impl Fn(State) -> bool,
    ) -> Locks<'t, K> {
        let vpn = entry.vpn();
        let bounds = PageRange::block(vpn.block()).intersect(region.range);
        let mut locks = Locks::<K>::new();
        locks.push(entry);
        let mut at = vpn;
        while (locks.len() as u64) < most.0 && !locks.is_full() {
            at = match direction {
                Direction::Up => at + 1,
                Direction::Down if at.0 > 0 => Vpn(at.0 - 1),
                Direction::Down => break,
            };
            if !bounds.contains(at) {
                break;
            }
            match self.table.try_lock(at) {
                Ok(Some(l)) if !l.is_whole() && same(l.state()) => locks.push(l),
                _ => break,
            }
        }
        // Whoever empties a region that is leaving waits for what was locked before that was said, and for nothing else.
        if locks.len() > 1 && self.region(vpn) != Some(region) {
            locks.retain(|l| l.vpn() == vpn);
        }
        if direction == Direction::Down {
            locks.reverse();
        }
        locks
    }

    /// The pages of `locks`, which lie side by side.
    fn span(&self, locks: &Locks<'_, K>) -> PageRange {
        PageRange::new(locks[0].vpn(), Pages(locks.len() as u64))
    }

    /// How a page installed by copying is mapped: protection proves that it stays clean.
    fn map_copy(&self, access: Access, before: Dirt) -> (Protect, bool, Dirt) {
        if !self.kernel.capabilities().write_protect {
            return (Protect::No, true, Dirt::Dirty);
        }
        let (writable, dirt) = plan::mapping(access, true, before);
        (if writable { Protect::No } else { Protect::Yes }, writable, dirt)
    }

    /// Whether to rely on the expectation that a page will be written, where nobody will find out if it was not: mostly.
    /// Every eighth page is looked at again.
    fn is_sure(&self, context: &Context) -> bool {
        !context.counters.device_loads.load(Relaxed).is_multiple_of(8)
    }

    /// Takes charges and frames for the pages of `locks`, or for the page at `keep` alone (which is charged
    /// already) if there are not enough; lets go of the others.
    fn frames_for(&self, locks: &mut Locks<'_, K>, keep: Vpn, ration: &mut Ration) -> ArrayVec<Frame, MOST> {
        let extra = locks.len() as u64 - 1;
        if extra > 0 && self.budget.try_charge(extra) {
            ration.pages += extra;
            let frames: ArrayVec<Frame, MOST> = locks.iter().map_while(|l| self.new_frame(l.vpn())).collect();
            if frames.len() == locks.len() {
                return frames;
            }
            frames.into_iter().for_each(|f| self.memmap.give_back(f));
            self.spare_charges(ration);
        }
        locks.retain(|l| l.vpn() == keep);
        self.new_frame(keep).into_iter().collect()
    }

    /// There are no more frames: so far beyond the limit has the space gone because no device has room. In adopted
    /// memory a page can be the kernel's again, which takes none; it is taken in hand when that changes.
    fn without_frame(&self, region: RegionInfo, fault: &Fault, work: &mut Working<'_>) -> Result<Outcome, Hold> {
        if !self.tiers.full() || !region.attributes.has(Attributes::ADOPTED) {
            return Err(Hold::Busy);
        }
        let entry = self.table.try_lock(fault.vpn).ok().flatten().filter(|e| !e.is_whole()).ok_or(Hold::Busy)?;
        match entry.state() {
            State::Device { .. } | State::Standby { .. } => self.make_native(entry, work)?,
            State::Empty => {
                let page = PageRange::new(fault.vpn, Pages(1));
                let done = match self.gate.enter(work.context()) {
                    Some(_section) => self.kernel.zero_in(self.addresses(page), Protect::No, Wake::Yes),
                    None => Done::stopped(Pages(0), Trouble::Changing),
                };
                if let Some(trouble) = done.trouble {
                    return Err(self.hold(trouble));
                }
                self.budget.add_native(1);
            }
            _ => return Err(Hold::Again),
        }
        Ok(Outcome::Resolved)
    }

    /// Makes the first `done` pages of `locks` the CPU's, gives the other frames back, and uses up charges.
    #[allow(clippy::too_many_arguments)]
    fn commit_mapped(
        &self,
        locks: Locks<'_, K>,
        frames: ArrayVec<Frame, MOST>,
        done: usize,
        writable: bool,
        dirt: Dirt,
        arrival: impl Fn(State) -> Arrival,
        ration: &mut Ration,
    ) {
        for (i, (lock, frame)) in locks.into_iter().zip(frames).enumerate() {
            if i >= done {
                self.memmap.give_back(frame);
                continue;
            }
            let old = match lock.state() {
                State::Device { pfn, .. } => Backing::Page(pfn),
                _ => Backing::Zero,
            };
            let clean = dirt != Dirt::Dirty;
            self.memmap.set_backing(frame, if clean { old } else { Backing::None });
            if !clean && old != Backing::Zero {
                self.memmap.set_rewritten(frame);
            }
            self.memmap.map(frame);
            self.announce(frame, arrival(lock.state()));
            ration.pages -= 1;
            lock.commit(State::Host { pfn: self.memmap.pfn(frame), writable, dirt });
            if !clean {
                self.free_backing(old, Order::BASE);
            }
        }
        self.spare_charges(ration);
    }

    /// Gives back charges of pages that did not come along.
    fn spare_charges(&self, ration: &mut Ration) {
        if ration.pages > 1 {
            self.budget.uncharge(ration.pages - 1);
            ration.pages = 1;
        }
    }

    /// What the next fault of the stream will be, after `range` was brought in.
    fn continue_stream(&self, fault: &Fault, range: PageRange) {
        let level = fault.level.saturating_add(1);
        match fault.direction {
            Direction::Up => {
                self.streams.expect(range.end, Direction::Up, level);
                if fault.level == 0 && range.start.0 > 0 {
                    self.streams.expect(Vpn(range.start.0 - 1), Direction::Down, 1);
                }
            }
            Direction::Down if range.start.0 > 0 => {
                self.streams.expect(Vpn(range.start.0 - 1), Direction::Down, level)
            }
            Direction::Down => {}
        }
    }

    /// An installation of pages `run` stopped before it did the faulting page.
    fn not_installed(&self, done: Done, run: PageRange, fault: &mut Fault) -> Result<Outcome, Hold> {
        match done.trouble {
            // A page of the kernel's own is there: in adopted memory the program had it all along. What the table
            // has for the page, if it has anything, is not what the program sees; that stays the kernel's.
            Some(Trouble::Present) if run.start + done.pages.0 == fault.vpn => {
                let page = self.addresses(PageRange::new(fault.vpn, Pages(1)));
                if fault.access == Access::Write {
                    // Before 5.19 the kernel left pages protected that were given up, and they may have come back.
                    let _ = self.kernel.protect(page, Protect::No, Wake::No);
                }
                let _ = self.kernel.wake(page);
                Ok(Outcome::Resolved)
            }
            // Or the run reaches over the end of a mapping: regions may span several.
            Some(Trouble::Present | Trouble::Absent) if run.pages().0 > 1 => {
                fault.alone = true;
                Err(Hold::Again)
            }
            Some(t) => {
                let hold = self.hold(t);
                if hold == Hold::Refused {
                    fault.alone = true;
                    self.service.wake_reclaim(&self.kernel.park());
                }
                Err(hold)
            }
            None => unreachable!("everything was installed"),
        }
    }

    /// Zeros for memory never touched (rule G3).
    pub(crate) fn fill(
        &self,
        entry: Entry<'_, K>,
        region: RegionInfo,
        most: Pages,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        if ration.pages == 0 {
            return Err(Hold::Again);
        }
        let mut locks = self.neighbours(entry, region, most, fault.direction, |s| s == State::Empty);
        let frames = self.frames_for(&mut locks, fault.vpn, ration);
        if frames.is_empty() {
            drop(locks);
            return self.without_frame(region, fault, work);
        }
        let run = self.span(&locks);
        let (protect, writable, dirt) = self.map_copy(fault.access, Dirt::Clean);
        let done = match self.gate.enter(work.context()) {
            Some(_section) => self.kernel.zero_in(self.addresses(run), protect, fault.wake),
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        let n = done.pages.0 as usize;
        let arrived = run.start + done.pages.0 > fault.vpn;
        self.commit_mapped(locks, frames, n, writable, dirt, |_| Arrival::New, ration);
        if !arrived {
            return self.not_installed(done, run, fault);
        }
        count_n(&work.counters.zero_fill, 1);
        self.continue_stream(fault, PageRange::new(run.start, done.pages));
        self.after_run(fault, region, run);
        Ok(Outcome::Resolved)
    }

    /// Brings pages home from a device (rule Z8).
    pub(crate) fn load(
        &self,
        entry: Entry<'_, K>,
        region: RegionInfo,
        most: Pages,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        let State::Device { pfn, rewritten, .. } = entry.state() else { unreachable!("the page is on a device") };
        let tier = self.tiers.of(pfn);
        if tier.info.slow && fault.patience == Patience::Never {
            return Err(Hold::Busy);
        }
        if ration.pages == 0 {
            return Err(Hold::Again);
        }
        let range = tier.range;
        let mut locks = self.neighbours(
            entry,
            region,
            most,
            fault.direction,
            |s| matches!(s, State::Device { pfn, rewritten: r, .. } if range.contains(pfn.pfn()) && r == rewritten),
        );
        let frames = self.frames_for(&mut locks, fault.vpn, ration);
        if frames.is_empty() {
            drop(locks);
            return self.without_frame(region, fault, work);
        }
        let run = self.span(&locks);
        let (context, buffer) = work.parts();
        let bytes = self.geometry.bytes(run.pages()) as usize;
        let mut loaded = self.transfer(&locks, &mut buffer[..bytes]);
        // A passing failure, perhaps. The page stays locked: that others bring it home in between, and it goes again and fails
        // anew, would be no sign of its being lost.
        let mut tries = 1;
        while loaded.is_err() && locks.len() == 1 && tries < TRIES {
            loaded = self.transfer(&locks, &mut buffer[..bytes]);
            tries += 1;
        }
        if let Err(e) = loaded {
            for f in frames {
                self.memmap.give_back(f);
            }
            self.spare_charges(ration);
            if locks.len() > 1 {
                // Again, this page alone: it may be a neighbour that cannot be read.
                fault.alone = true;
                return Err(Hold::Again);
            }
            let entry = locks.pop().expect("one entry is locked");
            self.lose(entry, e, context);
            return Ok(Outcome::Poisoned);
        }
        let keeps = tier.info.compares && tier.has_room();
        let (protect, writable, dirt) =
            if fault.access == Access::Read && rewritten && (keeps || self.is_sure(context)) {
                let (writable, dirt) = plan::mapping_to_be_written(keeps);
                (Protect::No, writable, dirt)
            } else {
                self.map_copy(fault.access, Dirt::Clean)
            };
        let done = match self.gate.enter(context) {
            Some(_section) => self.kernel.copy_in(self.geometry.va(run.start), &buffer[..bytes], protect, fault.wake),
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        let n = done.pages.0 as usize;
        let arrived = run.start + done.pages.0 > fault.vpn;
        let arrival = |s| match s {
            State::Device { stamp, .. } => self.arrival_of(stamp),
            _ => Arrival::New,
        };
        self.commit_mapped(locks, frames, n, writable, dirt, arrival, ration);
        count_n(&context.counters.pages_in, done.pages.0);
        if !arrived {
            return self.not_installed(done, run, fault);
        }
        count(&context.counters.device_loads);
        self.continue_stream(fault, PageRange::new(run.start, done.pages));
        self.after_run(fault, region, run);
        Ok(Outcome::Resolved)
    }

    /// Reads the device pages of `locks`, all of one tier, into `buffer`. Neighbours on the device are one
    /// transfer.
    fn transfer(&self, locks: &Locks<'_, K>, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let page = self.geometry.page_bytes();
        let pfn = |l: &Entry<'_, K>| match l.state() {
            State::Device { pfn, .. } => pfn,
            other => unreachable!("{other:?} is on no device"),
        };
        let tier = self.tiers.of(pfn(&locks[0]));
        let mut batch: ArrayVec<Load<'_>, MOST> = ArrayVec::new();
        let mut rest = buffer;
        let mut i = 0;
        while i < locks.len() {
            let first = pfn(&locks[i]);
            let n = locks[i..].iter().enumerate().take_while(|(k, l)| pfn(l) == first + *k as u64).count();
            let (bytes, tail) = rest.split_at_mut(n * page);
            batch.push(Load::new(first - tier.range.base, bytes));
            rest = tail;
            i += n;
        }
        tier.load(&mut batch, self.geometry);
        batch.into_iter().try_for_each(|l| l.result)
    }

    /// A page cannot be had back from its device: it is lost, and exactly it (rule Z9).
    pub(crate) fn lose(&self, entry: Entry<'_, K>, error: DeviceError, context: &Context) {
        let State::Device { pfn, .. } = entry.state() else { unreachable!("the page is on a device") };
        let va = self.geometry.va(entry.vpn());
        let tier = self.tiers.of(pfn);
        let loud = tier.tell_lost(va, pfn, error);
        if tier.pages_in_place() > 0 && tier.has_failed() {
            // What is in place of it is taken away.
            self.service.wake_reclaim(&self.kernel.park());
        }
        count(&context.counters.poisoned);
        let (vpn, range) = (entry.vpn(), self.addresses(entry.range()));
        entry.commit(State::Poisoned { pfn });
        self.tiers.retire(pfn);
        // Before the program learns of it, and without a lock: it may take a file to be written.
        if let (true, Some(tell)) = (loud, self.on_loss.get()) {
            tell();
        }
        let marked = match self.table.lock(vpn) {
            Ok(entry) if matches!(entry.state(), State::Poisoned { .. }) => self.mark_lost(&entry, context),
            // Discarded meanwhile: whoever waits looks again.
            _ => true,
        };
        if marked {
            let _ = self.kernel.wake(range);
        }
    }

    /// Maps a page on standby again. By copying: that needs no flush of other processors' translations, and
    /// proves that a page that is only read stays clean. What is left in staging is garbage.
    pub(crate) fn take_back(
        &self,
        mut entry: Entry<'_, K>,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        let State::Standby { pfn, dirt } = entry.state() else { unreachable!("the page is on standby") };
        if ration.pages == 0 {
            return Err(Hold::Again);
        }
        let frame = self.memmap.page(pfn);
        // Protection from another life proves nothing any more (G12).
        let dirt =
            if self.memmap.epoch(frame) != self.life() && dirt != Dirt::Dirty { Dirt::Unverified } else { dirt };
        // Where the device will be asked anyway whether the page was written, a fault that tells is not worth its price.
        let asked = matches!(self.memmap.backing(frame), Backing::Page(pfn) if self.tiers.of(pfn).info.compares);
        let (protect, writable, now) = if dirt == Dirt::Unverified && asked && fault.access == Access::Read {
            (Protect::No, true, Dirt::Unverified)
        } else {
            self.map_copy(fault.access, dirt)
        };
        let (from, slot) = self.staged_at(frame);
        let to = self.geometry.va(fault.vpn);
        // The page of a block's part stays behind in the block's staging, and the descriptor of the part goes with it.
        let new = if slot.is_none() { self.memmap.take_small() } else { None };
        if slot.is_none() && new.is_none() {
            drop(entry);
            let region = self.region(fault.vpn).ok_or(Hold::Again)?;
            return self.without_frame(region, fault, work);
        }
        let done = match self.gate.enter(work.context()) {
            Some(_section) => self.kernel.copy_staged(to, from, protect, fault.wake),
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        if done.pages.0 == 0 {
            if let Some(new) = new {
                self.memmap.give_back(new);
            }
            return self.not_installed(done, PageRange::new(fault.vpn, Pages(1)), fault);
        }
        ration.pages -= 1;
        if let Some(slot) = slot {
            self.ring.vacate(slot);
        }
        let frame = match new {
            None => frame,
            Some(new) => {
                self.memmap.take_over(new, frame);
                self.free_frame(frame, true);
                new
            }
        };
        self.memmap.place(frame, fault.vpn, self.life());
        let backing = self.memmap.backing(frame);
        if now == Dirt::Dirty {
            self.memmap.set_backing(frame, Backing::None);
            if matches!(backing, Backing::Page(_)) {
                self.memmap.set_rewritten(frame);
            }
        }
        self.memmap.set_frequency(frame, self.memmap.frequency(frame) + 1);
        self.memmap.map(frame);
        self.announce(frame, Arrival::Reuse);
        entry.set(State::Host { pfn: self.memmap.pfn(frame), writable, dirt: now });
        drop(entry);
        if now == Dirt::Dirty {
            self.free_backing(backing, Order::BASE);
        }
        count(&work.counters.standby_hits);
        self.continue_stream(fault, PageRange::new(fault.vpn, Pages(1)));
        Ok(Outcome::Resolved)
    }

    /// Where a single page on standby lies, and its slot if it is in one.
    pub(crate) fn staged_at(&self, frame: Frame) -> (VaRange, Option<u32>) {
        match self.memmap.slot(frame) {
            Some(slot) => (self.ring.slot(slot), Some(slot)),
            None => {
                let head = self.memmap.head_of(frame).expect("only parts of blocks have no slot");
                let i = self.memmap.pfn(frame) - self.memmap.pfn(head);
                (self.blocks.part(head, i), None)
            }
        }
    }

    /// The first write to a clean page: from here on the frame is the only copy.
    pub(crate) fn upgrade(
        &self,
        entry: Entry<'_, K>,
        region: RegionInfo,
        fault: &mut Fault,
        work: &mut Working<'_>,
    ) -> Result<Outcome, Hold> {
        if entry.is_whole() {
            return self.upgrade_block(entry, fault, work);
        }
        let clean = |s| matches!(s, State::Host { writable: false, .. });
        let most = if fault.level > 0 && !fault.alone { CLUSTER } else { Pages(1) };
        let locks = self.neighbours(entry, region, most, fault.direction, clean);
        let run = self.span(&locks);
        {
            let _section = self.gate.enter(work.context()).ok_or(Hold::Changing)?;
            if let Err(t) = self.kernel.protect(self.addresses(run), Protect::No, fault.wake) {
                fault.alone = true;
                return Err(self.hold(t));
            }
        }
        count_n(&work.counters.upgrades, locks.len() as u64);
        for lock in locks {
            let State::Host { pfn, .. } = lock.state() else { unreachable!("the page is mapped") };
            let frame = self.memmap.page(pfn);
            let backing = self.memmap.backing(frame);
            self.memmap.set_backing(frame, Backing::None);
            if matches!(backing, Backing::Page(_)) {
                self.memmap.set_rewritten(frame);
            }
            lock.commit(State::Host { pfn, writable: true, dirt: Dirt::Dirty });
            self.free_backing(backing, Order::BASE);
        }
        self.continue_stream(fault, run);
        Ok(Outcome::Resolved)
    }

    /// Has more of a stream read ahead where that pays.
    fn after_run(&self, fault: &Fault, region: RegionInfo, run: PageRange) {
        if !fault.ahead && fault.level >= plan::HUGE_LEVEL && fault.direction == Direction::Up {
            self.read_ahead_pages(region, run.end, fault.level);
        }
    }
}
