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
use super::stats::count;
use super::{Engine, Entry};
use crate::waited::Waited;
use peerspace_core::addr::{Access, Order, PageRange, Pages, Va, Vpn};
use peerspace_core::entry::State;
use peerspace_core::memmap::{Backing, Frame};
use peerspace_core::plan::{self, FaultPlan, Grain, GrainFacts};
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::stream::{Direction, Level};
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Kernel, Protect, Trouble, Wake};
use std::time::{Duration, Instant};

/// Attempts before a fault that makes no headway is given up as a bug. Each waits for what it met.
const ATTEMPTS: u32 = 1_000_000;
/// So many faults of one thread may have made blocks dense.
const COLLAPSE_AFTER: u64 = 512;

/// How long a fault goes on trying while the kernel refuses, for want of memory or whatever reason, to let the page be
/// there. After that the access fails, rather than hang.
const REFUSED: Duration = if cfg!(shuttle) { Duration::ZERO } else { Duration::from_secs(2) };
/// Between two tries.
const REFUSED_PAUSE: Duration = Duration::from_micros(200);

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
    /// The kernel does not let the page be there; nothing is lost, but the access cannot go on now.
    Refused,
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
    /// A launch of a device relies on it: wait, however long that takes.
    Held,
    /// The kernel refused, with no change of mappings to explain it: mostly for want of memory.
    Refused,
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
    pub(crate) direction: Direction,
    /// Bring in this page alone: a transfer with neighbours has failed.
    pub(crate) alone: bool,
    /// Nobody waits for it: it is read ahead.
    pub(crate) ahead: bool,
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
            ahead: true,
        }
    }
}

impl<K: Kernel> Engine<K> {
    /// Resolves the fault of an `access` to `va`.
    ///
    /// # Errors
    /// [`Pause`], if there is no patience for what it would take. Never with [`Patience::Waits`].
    pub(crate) fn fault(&self, va: Va, access: Access, wake: Wake, patience: Patience) -> Result<Outcome, Pause> {
        let vpn = self.geometry.vpn(va);
        let (level, direction) = self.streams.arrive(vpn);
        self.resolve(Fault { patience, direction, ahead: false, ..Fault::ahead(vpn, access, wake, level) })
    }

    /// Resolves `fault`, whatever stream it belongs to.
    ///
    /// # Errors
    /// As [`fault`](Engine::fault).
    pub(crate) fn resolve(&self, mut fault: Fault) -> Result<Outcome, Pause> {
        let started = Instant::now();
        let Fault { vpn, level, direction, patience, .. } = fault;
        let va = self.geometry.va(vpn);
        let mut work = self.contexts.take();
        let mut ration = Ration::default();
        let mut attempts = 0;
        let mut refused: Option<Waited> = None;
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
                Err(Hold::Busy | Hold::Refused | Hold::Held) if patience == Patience::Never => {
                    break Err(Pause::Busy);
                }
                Err(Hold::Held) => {
                    // Without the context, which others need to go on.
                    drop(work);
                    crate::sync::sleep(REFUSED_PAUSE);
                    work = self.contexts.take();
                    continue;
                }
                Err(Hold::Refused) if refused.get_or_insert_with(Waited::new).so_far() >= REFUSED => {
                    self.tell_refused(va);
                    break Ok(Outcome::Refused);
                }
                // Memory that is given back may be what the kernel lacks.
                Err(Hold::Refused) => {
                    let _ = self.reclaim_step(&mut work, false);
                    crate::sync::sleep(REFUSED_PAUSE);
                }
                Err(Hold::Busy) => crate::sync::yield_now(),
            }
            attempts += 1;
            assert!(attempts < ATTEMPTS, "a fault at {va} makes no headway: {:?}", self.table.look(vpn));
        };
        self.return_ration(ration);
        if result.is_ok() {
            if work.counters.faults.fetch_add(1, Relaxed) % COLLAPSE_AFTER == COLLAPSE_AFTER - 1 && self.has_huge() {
                self.service.wake_collapse(&self.kernel.park());
            }
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
        if region.attributes.has_any(Attributes::LEAVING.with(Attributes::IN_PLACE)) {
            return self.fault_elsewhere(region, fault, work);
        }
        let (seen, whole) = self.table.look(fault.vpn).ok_or(Hold::Again)?;
        // What a device had in one piece comes home so.
        if let (State::Mapped { .. }, true) = (seen.state(), whole) {
            fault.level = fault.level.max(plan::HUGE_LEVEL);
        }
        let grain = plan::grain(GrainFacts {
            level: fault.level,
            whole,
            huge_possible: self.huge_possible(region, fault.vpn) && !ration.no_block && !fault.alone,
            attributes: region.attributes,
        });
        self.provide(seen.state(), whole, grain, fault, work, ration)?;

        let entry = match fault.patience {
            Patience::Waits => self.table.lock(fault.vpn).map_err(|_| Hold::Again)?,
            // Who has it may wait for a thread like this one to receive.
            Patience::Locks => {
                let locked = self.table.lock_unless(fault.vpn, || self.inplace.is_under_way());
                locked.map_err(|_| Hold::Again)?.ok_or(Hold::Changing)?
            }
            Patience::Never => self.table.try_lock(fault.vpn).map_err(|_| Hold::Again)?.ok_or(Hold::Busy)?,
        };
        // Look again (H12): the region may have gone and the state changed before the lock was ours.
        if self.region(fault.vpn) != Some(region) || entry.is_whole() != whole {
            return Err(Hold::Again);
        }
        let entry = match plan::on_fault(entry.state(), fault.access) {
            FaultPlan::Recall(on) => self.recall_for_cpu(on, entry),
            _ => entry,
        };
        if let State::Device { pfn, .. } = entry.state() {
            fault.access = self.access_from(pfn, fault.access);
        }
        match plan::on_fault(entry.state(), fault.access) {
            FaultPlan::Recall(_) => unreachable!("devices map nothing of it any more"),
            FaultPlan::Wait(_) => Err(Hold::Held),
            FaultPlan::Poison(_) => self.poisoned(entry, fault, work),
            FaultPlan::Present => self.present(entry, fault, work),
            FaultPlan::InPlace(pfn) => self.fault_in_place(pfn, entry, fault, work.context()),
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
                    FaultPlan::Load(_) => self.load(entry, region, most, fault, work, ration),
                    _ => self.fill(entry, region, most, fault, work, ration),
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
            FaultPlan::Fill | FaultPlan::Load(_) | FaultPlan::Recall(_) if whole && grain == Grain::Block => {
                if ration.block.is_none() {
                    ration.block = self.take_block(work, fault.patience)?;
                    ration.no_block = ration.block.is_none();
                    if ration.no_block {
                        count(&work.counters.huge_fallbacks);
                        return Err(Hold::Again);
                    }
                }
            }
            FaultPlan::TakeBack if whole => {}
            FaultPlan::Fill | FaultPlan::Load(_) | FaultPlan::TakeBack | FaultPlan::Recall(_) => {
                if ration.pages == 0 {
                    self.charge(1, work, fault.patience)?;
                    ration.pages = 1;
                }
            }
            FaultPlan::Present
            | FaultPlan::InPlace(_)
            | FaultPlan::Upgrade
            | FaultPlan::Wait(_)
            | FaultPlan::Poison(_) => {}
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
        self.has_huge() && self.block_inside(region, vpn)
    }

    /// What a kernel operation that did not do anything means for the attempt.
    pub(crate) fn hold(&self, trouble: Trouble) -> Hold {
        match trouble {
            // The mapping went away, or its news is on the way.
            Trouble::Changing | Trouble::Absent => Hold::Changing,
            Trouble::Present | Trouble::Busy | Trouble::Interrupted => Hold::Again,
            _ => Hold::Refused,
        }
    }

    fn tell_refused(&self, va: Va) {
        if self.service.say_once_refused() {
            crate::tell::warning(format_args!(
                "the kernel refuses to map a page at {va}, mostly for want of memory: accesses to it fail"
            ));
        }
    }

    /// A fault in no region: perhaps one that grew in place, which no message tells.
    pub(super) fn unknown(&self, vpn: Vpn, work: &mut Working<'_>) -> Result<Outcome, Hold> {
        // In one section: news of a change that comes later than the look at the mappings is also acted on later, and
        // takes back what is no longer so. Without waiting for the lock, whose holder may wait for the gate.
        let _section = self.gate.enter(work.context()).ok_or(Hold::Changing)?;
        if self.kernel.is_changing() {
            return Err(Hold::Changing);
        }
        let Some(_changes) = self.region_changes.try_lock() else { return Err(Hold::Busy) };
        if self.region(vpn).is_some() {
            return Err(Hold::Again);
        }
        // Not to know is not to say that it is none of ours: that would be the end of the program.
        let mapping = self.kernel.mapping_at(self.geometry.va(vpn)).map_err(|t| self.hold(t))?;
        let Some(mapping) = mapping else { return Ok(Outcome::Foreign) };
        let mapping = self.geometry.pages_inside(mapping);
        // Registration is a property of a whole mapping, so a mapping with a region in it is all ours.
        let mut gap = mapping;
        let mut ours = false;
        let mut at = mapping.start;
        while let Some(r) = self.regions.next(at).filter(|r| r.range.start < mapping.end) {
            ours |= !r.attributes.has(Attributes::IN_PLACE);
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
        // Without room for it the fault comes again.
        let _ = self.cover(gap).and_then(|new| self.insert_region(gap, Attributes::ADOPTED, new));
        Err(Hold::Again)
    }

    /// A page in no region was accessed just now, by the calling thread: what has grown in place is registered with us,
    /// also when the region before it has gone elsewhere. Nothing of it was ever taken out, so zeros are what the program
    /// has to see. False if it is not ours.
    ///
    /// Whose it is the kernel tells when it is asked to register it (once more). Operations on pages do not, they go
    /// through whichever descriptor; and the mapping around the page may be another by now.
    pub(crate) fn fill_unknown(&self, va: Va) -> bool {
        let page = self.addresses(PageRange::new(self.geometry.vpn(va), Pages(1)));
        let in_place = self.region(self.geometry.vpn(va)).is_some_and(|r| r.attributes.has(Attributes::IN_PLACE));
        if in_place || page.overlaps(self.kernel.staging()) {
            return false;
        }
        // Files and shared memory raise SIGBUS for reasons of their own, and could be registered all the same.
        match self.kernel.mapping_at(va) {
            // What is ours is registered already, so it takes nothing that there could be too little of.
            Ok(Some(_)) if self.kernel.confirm(page).is_ok() => {}
            Ok(_) => return false,
            Err(_) => {
                // Not to know is not to say that it is none of ours: the access faults again.
                crate::sync::yield_now();
                return true;
            }
        }
        // If there is something in the way, the access faults again.
        let _ = self.kernel.zero_in(page, Protect::No, Wake::Yes);
        true
    }

    fn poisoned(&self, entry: Entry<'_, K>, fault: &Fault, work: &Working<'_>) -> Result<Outcome, Hold> {
        // The program may have discarded it, and the news be on the way.
        if self.gate.enter(work.context()).is_none() || self.kernel.is_changing() {
            return Err(Hold::Changing);
        }
        // In case the marker that makes accesses fail got lost with a change of mappings.
        if self.mark_lost(&entry, work.context()) {
            let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
        }
        drop(entry);
        Ok(Outcome::Poisoned)
    }

    /// The table says the page is there. Either another thread was faster, or the program discarded it.
    fn present(&self, entry: Entry<'_, K>, fault: &Fault, work: &mut Working<'_>) -> Result<Outcome, Hold> {
        let va = self.geometry.va(fault.vpn);
        let there = self.kernel.is_present(va).map_err(|t| self.hold(t))?;
        if there {
            if fault.access == Access::Write {
                // Where making a page writable failed half-way, the table knows that it may have been written and the
                // kernel still protects it: every write would end here.
                let _section = self.gate.enter(work.context()).ok_or(Hold::Changing)?;
                let range = self.addresses(entry.range());
                self.kernel.protect(range, Protect::No, fault.wake).map_err(|t| self.hold(t))?;
            }
            let _ = self.kernel.wake(self.addresses(PageRange::new(fault.vpn, Pages(1))));
            count(&work.counters.spurious);
            return Ok(Outcome::Resolved);
        }
        let open = self.gate.enter(work.context()).is_some();
        if !open || self.kernel.is_changing() {
            return Err(Hold::Changing);
        }
        let entry = self.recall(entry);
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
        let backing = self.memmap.backing(frame);
        self.unmap_gone(frame);
        entry.commit(State::Empty);
        self.budget.uncharge(1);
        self.free_backing(backing, Order::BASE);
    }

    /// The copy that `backing` names is needed no more.
    pub(crate) fn free_backing(&self, backing: Backing, order: Order) {
        if let Backing::Page(pfn) = backing {
            self.tiers.free(pfn, order);
        }
    }
}
