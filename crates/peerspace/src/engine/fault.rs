//! The life of a CPU fault.
//!
//! ```text
//!  deliver -> which region? -> charge what it will take -> lock the entry -> look again -> plan
//!          -> transfer (no section) -> install (in a section) -> commit, wake
//! ```
//!
//! [`Engine::fault`] is called in the faulting thread (signal delivery) or by a handler thread (messages). It
//! allocates nothing, touches no managed memory and holds no lock but those of the entries it is about. Neighbours
//! of the faulting page that are in the same state may come along when the faults show a stream
//! ([`peerspace_core::stream`]); their locks are only ever tried.
//!
//! An attempt that finds the world changed gives everything back and starts over ([`Hold`]); nothing is ever
//! retried in place.

use super::context::Working;
use super::stats::{count, count_n};
use super::{Engine, Entry};
use crate::device::Load;
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, Order, PageRange, Pages, Pfn, Va, VaRange, Vpn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Arrival, Backing, Frame};
use peerspace_core::plan::{self, CLUSTER, FaultPlan, Grain, GrainFacts};
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::stream::{Direction, Level};
use peerspace_os::{Done, Kernel, Protect, Trouble, Wake};
use std::time::Instant;

const MOST: usize = CLUSTER.0 as usize;
/// Attempts before a fault that makes no headway is given up as a bug. Each waits for what it met.
const ATTEMPTS: u32 = 1_000_000;

/// Whether a fault may keep the calling thread waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// For locks, slow devices and the program's own changes.
    Waits,
    /// For locks and slow devices. For a thread that may be the one to receive the program's changes.
    Locks,
    /// For nothing that another thread has to do first.
    Never,
}

/// What became of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The access can be repeated.
    Resolved,
    /// The data is lost; the access must fail (rule Z9).
    Poisoned,
    /// The address is none of ours.
    Foreign,
}

/// Why a fault without patience was not resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    /// The program is changing its mappings; handle its messages first.
    Changing,
    /// It takes a wait.
    Busy,
}

/// Why an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Something changed: start over.
    Again,
    /// The program is changing its mappings: wait for that, then start over.
    Changing,
    /// It takes a wait, and there is no patience for one.
    Busy,
}

/// What is in hand before any lock is taken.
#[derive(Debug, Default)]
pub(crate) struct Ration {
    /// Pages charged and not used yet.
    pub(crate) pages: u64,
    /// A block frame with a huge page in staging, charged.
    pub(crate) block: Option<Frame>,
    /// No block frame could be had; small pages have to do (rule H2).
    pub(crate) no_block: bool,
}

/// One fault, through all its attempts.
pub(crate) struct Fault {
    pub(crate) vpn: Vpn,
    pub(crate) access: Access,
    pub(crate) wake: Wake,
    pub(crate) patience: Patience,
    pub(crate) level: Level,
    direction: Direction,
    /// Bring in this page alone: a transfer with neighbours has failed.
    alone: bool,
    failures: u32,
    /// Nobody waits for it: it is read ahead.
    ahead: bool,
}

impl Fault {
    /// A fault that has not happened yet: brings in what lies ahead of a stream of `level`.
    pub(crate) fn ahead(vpn: Vpn, access: Access, wake: Wake, level: Level) -> Fault {
        Fault {
            vpn,
            access,
            wake,
            patience: Patience::Waits,
            level,
            direction: Direction::Up,
            alone: false,
            failures: 0,
            ahead: true,
        }
    }
}

/// Entries locked side by side, in ascending order.
type Locks<'t, K> = ArrayVec<Entry<'t, K>, MOST>;

impl<K: Kernel> Engine<K> {
    /// Resolves the fault of an `access` to `va`.
    ///
    /// # Errors
    /// [`Pause`], if there is no patience for what it would take. Never with [`Patience::Waits`].
    pub(crate) fn fault(&self, va: Va, access: Access, wake: Wake, patience: Patience) -> Result<Outcome, Pause> {
        let started = Instant::now();
        let vpn = self.geometry.vpn(va);
        let mut work = self.contexts.take();
        let (level, direction) = self.streams.arrive(vpn);
        let mut fault = Fault { patience, direction, ahead: false, ..Fault::ahead(vpn, access, wake, level) };
        let mut ration = Ration::default();
        let mut attempts = 0;
        let result = loop {
            match self.attempt(&mut fault, &mut work, &mut ration) {
                Ok(outcome) => break Ok(outcome),
                Err(Hold::Again) => {}
                Err(Hold::Changing) => {
                    count(&work.counters.changes);
                    if patience != Patience::Waits {
                        break Err(Pause::Changing);
                    }
                    // Without the context, which whoever makes the change known may need.
                    drop(work);
                    self.wait_for_changes();
                    work = self.contexts.take();
                }
                Err(Hold::Busy) if patience == Patience::Never => break Err(Pause::Busy),
                Err(Hold::Busy) => std::thread::yield_now(),
            }
            attempts += 1;
            assert!(attempts < ATTEMPTS, "a fault at {va} makes no headway: {:?}", self.table.look(vpn));
        };
        self.return_ration(ration);
        if result.is_ok() {
            count(&work.counters.faults);
            work.latency.record(started.elapsed());
        } else if level > 0 {
            // The fault comes again, and still belongs to its stream.
            self.streams.expect(vpn, direction, level);
        }
        result
    }

    pub(crate) fn attempt(
        &self,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        let Some(region) = self.region(fault.vpn) else { return self.unknown(fault.vpn, work) };
        let (seen, whole) = self.table.look(fault.vpn).ok_or(Hold::Again)?;
        let grain = plan::grain(GrainFacts {
            level: fault.level,
            whole,
            huge_possible: self.huge_possible(region, fault.vpn) && !ration.no_block && !fault.alone,
            attributes: region.attributes,
        });
        self.provide(seen.state(), whole, grain, fault, work, ration)?;

        let entry = match fault.patience {
            Patience::Waits | Patience::Locks => self.table.lock(fault.vpn).map_err(|_| Hold::Again)?,
            Patience::Never => self.table.try_lock(fault.vpn).map_err(|_| Hold::Again)?.ok_or(Hold::Busy)?,
        };
        // Look again (H12): the region may have gone and the state changed before the lock was ours.
        if self.region(fault.vpn) != Some(region) || entry.is_whole() != whole {
            return Err(Hold::Again);
        }
        match plan::on_fault(entry.state(), fault.access) {
            FaultPlan::Poison => self.poisoned(entry, fault),
            FaultPlan::Present => self.present(entry, fault, work),
            FaultPlan::Upgrade => self.upgrade(entry, region, fault, work),
            FaultPlan::TakeBack if whole => self.take_back_block(entry, fault, work),
            FaultPlan::TakeBack => self.take_back(entry, fault, work, ration),
            FaultPlan::Fill | FaultPlan::Load(_) if whole && grain == Grain::Block => {
                self.bring_in_block(entry, region, fault, work, ration)
            }
            FaultPlan::Fill | FaultPlan::Load(_) if whole => {
                entry.split_evenly();
                Err(Hold::Again)
            }
            plan => {
                let Grain::Pages(most) = grain else { return Err(Hold::Again) };
                let most = if fault.alone { Pages(1) } else { most };
                match plan {
                    FaultPlan::Fill => self.fill(entry, region, most, fault, work, ration),
                    _ => self.load(entry, region, most, fault, work, ration),
                }
            }
        }
    }

    /// Charges what the plan for `state` will take, while no lock is held.
    fn provide(
        &self,
        state: State,
        whole: bool,
        grain: Grain,
        fault: &Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<(), Hold> {
        match plan::on_fault(state, fault.access) {
            FaultPlan::Fill | FaultPlan::Load(_) if whole && grain == Grain::Block => {
                if ration.block.is_none() {
                    ration.block = self.take_block(work, fault.patience)?;
                    ration.no_block = ration.block.is_none();
                    if ration.no_block {
                        return Err(Hold::Again);
                    }
                }
            }
            FaultPlan::TakeBack if whole => {}
            FaultPlan::Fill | FaultPlan::Load(_) | FaultPlan::TakeBack => {
                if ration.pages == 0 {
                    self.charge(1, work, fault.patience)?;
                    ration.pages = 1;
                }
            }
            FaultPlan::Present | FaultPlan::Upgrade | FaultPlan::Poison => {}
        }
        Ok(())
    }

    pub(crate) fn return_ration(&self, ration: Ration) {
        if ration.pages > 0 {
            self.budget.uncharge(ration.pages);
        }
        if let Some(frame) = ration.block {
            self.blocks.give_ready(frame);
        }
    }

    fn huge_possible(&self, region: RegionInfo, vpn: Vpn) -> bool {
        self.huge.load(peerspace_core::sync::Ordering::Relaxed) && self.block_inside(region, vpn)
    }

    /// What a kernel operation that did not do anything means for the attempt.
    pub(crate) fn hold(&self, trouble: Trouble) -> Hold {
        match trouble {
            // The mapping went away, or its news is on the way.
            Trouble::Changing | Trouble::Absent => Hold::Changing,
            _ => Hold::Again,
        }
    }

    /// A fault in no region: perhaps one that grew in place, which no message tells.
    fn unknown(&self, vpn: Vpn, work: &mut Working<'_>) -> Result<Outcome, Hold> {
        if self.gate.enter(work.context()).is_none() || self.kernel.is_changing() {
            return Err(Hold::Changing);
        }
        if self.region(vpn).is_some() {
            return Err(Hold::Again);
        }
        let Ok(Some(mapping)) = self.kernel.mapping_at(self.geometry.va(vpn)) else { return Ok(Outcome::Foreign) };
        let mapping = self.geometry.pages_inside(mapping);
        // Registration is a property of a whole mapping, so a mapping with a region in it is all ours.
        let mut gap = mapping;
        let mut ours = false;
        let mut at = mapping.start;
        while let Some(r) = self.regions.next(at).filter(|r| r.range.start < mapping.end) {
            ours = true;
            if r.range.end <= vpn {
                gap.start = r.range.end;
            } else if r.range.start > vpn {
                gap.end = gap.end.min(r.range.start);
            } else {
                return Err(Hold::Again);
            }
            at = r.range.end;
        }
        if !ours {
            return Ok(Outcome::Foreign);
        }
        // Another thread may add the same range: then this fails, and the next attempt finds it.
        let _ = self.add_region(gap, Attributes::ADOPTED);
        Err(Hold::Again)
    }

    fn poisoned(&self, entry: Entry<'_, K>, fault: &Fault) -> Result<Outcome, Hold> {
        // In case the marker that makes accesses fail got lost with a change of mappings.
        let _ = self.kernel.poison(self.geometry.va(fault.vpn));
        let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
        drop(entry);
        Ok(Outcome::Poisoned)
    }

    /// The table says the page is there. Either another thread was faster, or the program discarded it.
    fn present(&self, entry: Entry<'_, K>, fault: &Fault, work: &mut Working<'_>) -> Result<Outcome, Hold> {
        let va = self.geometry.va(fault.vpn);
        let there = self.kernel.is_present(va).map_err(|t| self.hold(t))?;
        if there {
            let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
            count(&work.counters.spurious);
            return Ok(Outcome::Resolved);
        }
        let open = self.gate.enter(work.context()).is_some();
        if !open || self.kernel.is_changing() {
            return Err(Hold::Changing);
        }
        // No change is pending, so the page was discarded by a call whose message has been acted on: between
        // the message and the discarding itself, this page had come back.
        if entry.is_whole() {
            self.split_mapped(entry, &work.counters);
            return Err(Hold::Again);
        }
        self.forget_mapped(entry);
        Err(Hold::Again)
    }

    /// The kernel has dropped the mapped page of `entry`: so does the table.
    pub(crate) fn forget_mapped(&self, entry: Entry<'_, K>) {
        let State::Host { pfn, .. } = entry.state() else { unreachable!("the page is mapped") };
        let frame = self.memmap.page(pfn);
        self.retract(frame);
        let backing = self.memmap.backing(frame);
        entry.commit(State::Empty);
        self.budget.uncharge(1);
        self.free_frame(frame, false);
        self.free_backing(backing, Order::BASE);
    }

    /// Frees the descriptor of a single page. `staged`: the page still lies in its block's staging.
    pub(crate) fn free_frame(&self, frame: Frame, staged: bool) {
        match self.memmap.head_of(frame) {
            None => self.memmap.give_back(frame),
            Some(head) => {
                if let Some(garbage) = self.memmap.part_gone(frame, staged) {
                    if garbage.0 > 0 {
                        // Refusal leaves the pages there, and charged.
                        if self.kernel.drop_staged(self.blocks.range(head)).is_ok() {
                            self.budget.uncharge(garbage.0);
                        }
                    }
                    self.memmap.reset(head);
                    self.memmap.give_back(head);
                }
            }
        }
    }

    /// The copy that `backing` names is needed no more.
    pub(crate) fn free_backing(&self, backing: Backing, order: Order) {
        if let Backing::Page(pfn) = backing {
            self.tiers.free(pfn, order);
        }
    }

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
            // A page of the kernel's own is there: the program had it all along.
            Some(Trouble::Present) if run.start + done.pages.0 == fault.vpn => {
                let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
                Ok(Outcome::Resolved)
            }
            Some(Trouble::Present) => {
                fault.alone = true;
                Err(Hold::Again)
            }
            Some(Trouble::NoMemory) => {
                fault.alone = true;
                self.service.wake_reclaim(&self.kernel.park());
                Err(Hold::Busy)
            }
            Some(t) => Err(self.hold(t)),
            None => unreachable!("everything was installed"),
        }
    }

    /// Zeros for memory never touched (rule G3).
    fn fill(
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
            return Err(Hold::Busy);
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
    fn load(
        &self,
        entry: Entry<'_, K>,
        region: RegionInfo,
        most: Pages,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        let State::Device { pfn, .. } = entry.state() else { unreachable!("the page is on a device") };
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
            |s| matches!(s, State::Device { pfn, .. } if range.contains(pfn)),
        );
        let frames = self.frames_for(&mut locks, fault.vpn, ration);
        if frames.is_empty() {
            return Err(Hold::Busy);
        }
        let run = self.span(&locks);
        let (context, buffer) = work.parts();
        let bytes = self.geometry.bytes(run.pages()) as usize;
        if let Err(e) = self.transfer(&locks, &mut buffer[..bytes]) {
            count(&context.counters.device_errors);
            for f in frames {
                self.memmap.give_back(f);
            }
            self.spare_charges(ration);
            if locks.len() > 1 || fault.failures == 0 {
                // Once more, this page alone: it may be a neighbour that cannot be read, or a passing fault.
                fault.alone = true;
                fault.failures += (locks.len() == 1) as u32;
                return Err(Hold::Again);
            }
            let entry = locks.pop().expect("one entry is locked");
            return self.lose(entry, fault, e, context);
        }
        let (protect, writable, dirt) = self.map_copy(fault.access, Dirt::Clean);
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
    fn transfer(&self, locks: &Locks<'_, K>, buffer: &mut [u8]) -> Result<(), crate::device::DeviceError> {
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
    fn lose(
        &self,
        entry: Entry<'_, K>,
        fault: &Fault,
        error: crate::device::DeviceError,
        context: &super::context::Context,
    ) -> Result<Outcome, Hold> {
        let State::Device { pfn, .. } = entry.state() else { unreachable!("the page is on a device") };
        let va = self.geometry.va(fault.vpn);
        crate::tell::warning(format_args!(
            "page {va} is lost: device {}, page {}: {error}",
            self.tiers.of(pfn).info.name,
            pfn - self.tiers.of(pfn).range.base,
        ));
        count(&context.counters.poisoned);
        // Refusal is no harm: an access faults again and finds the entry poisoned.
        let _ = self.kernel.poison(va);
        entry.commit(State::Poisoned);
        let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
        self.tiers.free(pfn, Order::BASE);
        Ok(Outcome::Poisoned)
    }

    /// Maps a page on standby again. By copying: that needs no flush of other processors' translations, and
    /// proves that a page that is only read stays clean. What is left in staging is garbage.
    fn take_back(
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
        let (protect, writable, now) = self.map_copy(fault.access, dirt);
        let (from, slot) = self.staged_at(frame);
        let to = self.geometry.va(fault.vpn);
        let done = match self.gate.enter(work.context()) {
            Some(_section) => self.kernel.copy_staged(to, from, protect, fault.wake),
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        if done.pages.0 == 0 {
            return self.not_installed(done, PageRange::new(fault.vpn, Pages(1)), fault);
        }
        ration.pages -= 1;
        let frame = match slot {
            Some(slot) => {
                self.ring.vacate(slot);
                frame
            }
            // Its page stays behind in the block's staging; the descriptor of the part goes with it.
            None => match self.memmap.take_small() {
                Some(new) => {
                    self.memmap.reset(new);
                    self.memmap.set_backing(new, self.memmap.backing(frame));
                    self.free_frame(frame, true);
                    new
                }
                None => unreachable!("there are twice as many descriptors as pages"),
            },
        };
        self.memmap.place(frame, fault.vpn, self.life());
        let backing = self.memmap.backing(frame);
        if now == Dirt::Dirty {
            self.memmap.set_backing(frame, Backing::None);
        }
        self.memmap.set_frequency(frame, self.memmap.frequency(frame) + 1);
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
    fn upgrade(
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
        let most = if fault.level > 0 { CLUSTER } else { Pages(1) };
        let locks = self.neighbours(entry, region, most, fault.direction, clean);
        let run = self.span(&locks);
        {
            let _section = self.gate.enter(work.context()).ok_or(Hold::Changing)?;
            self.kernel.protect(self.addresses(run), Protect::No, fault.wake).map_err(|t| self.hold(t))?;
        }
        count_n(&work.counters.upgrades, locks.len() as u64);
        for lock in locks {
            let State::Host { pfn, .. } = lock.state() else { unreachable!("the page is mapped") };
            let frame = self.memmap.page(pfn);
            let backing = self.memmap.backing(frame);
            self.memmap.set_backing(frame, Backing::None);
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

    /// Whether `pfn` is a page of some device, for the checker.
    pub(crate) fn is_device_page(&self, pfn: Pfn) -> bool {
        !self.memmap.contains(pfn)
    }
}
