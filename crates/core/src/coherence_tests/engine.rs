//! The engine's work on a page, step by step: between two steps, whatever does not need the entry's lock may happen.
//!
//! What is to be done is decided by the functions that the engine itself uses. A step has several outcomes where it can fail;
//! the first is the one in which nothing does.

use super::bugs::Bug;
use super::world::*;
use super::*;
use crate::addr::{Access, Pfn};
use crate::entry::{Dirt, Entry};
use crate::plan::{self, EvictPlan, FaultPlan, OnDevices};
use std::vec::Vec;

/// What takes part in a world, and what may happen there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    /// Devices that run code.
    pub(super) devices: usize,
    /// How many of them may fail.
    pub(super) failures: usize,
    /// Copies, mappings and stores may fail on devices that work.
    pub(super) refusals: bool,
    /// The program pins the page.
    pub(super) pins: bool,
    /// Launches hold it.
    pub(super) launches: bool,
    /// There is a tier to evict to.
    pub(super) tier: bool,
    /// The tier's memory can be mapped in place.
    pub(super) coherent: bool,
    /// So can that of devices that run code.
    pub(super) coherent_devices: bool,
    /// The page may be one of the kernel's own when all begins.
    pub(super) adopted: bool,
    /// A clean frame keeps its page on a device that runs code, too.
    pub(super) keeps: bool,
    /// What is wrong with the engine.
    pub(super) bug: Option<Bug>,
}

/// Something that happens: who does it, with which device, and what. What comes of it, or which rule it breaks.
pub(super) struct Event {
    pub(super) what: &'static str,
    pub(super) device: Option<usize>,
    pub(super) leads_to: Result<World, &'static str>,
}

pub(super) type Events = Vec<Event>;

pub(super) fn happens(out: &mut Events, what: &'static str, device: Option<usize>, world: World) {
    out.push(Event { what, device, leads_to: Ok(world) });
}

pub(super) fn dirt(state: State) -> Option<Dirt> {
    match state {
        State::Host { dirt, .. } | State::Standby { dirt, .. } | State::Shared { dirt, .. } => Some(dirt),
        _ => None,
    }
}

fn on_device(place: Place) -> State {
    State::Device { pfn: place.pfn(), stamp: 0, rewritten: false }
}

fn word(state: State) -> u64 {
    Entry::new(state).word()
}

fn own(device: usize) -> impl Fn(DevicePfn) -> bool {
    move |pfn| Place::of(pfn).device() == Some(device)
}

/// What a grant comes to.
pub(super) fn pte(world: &World, device: usize, grant: Grant) -> Pte {
    match grant {
        Grant::Own => Pte::Own,
        Grant::Copy if world.is_used(Place::Copy(device as u8)) => Pte::Copy,
        Grant::Copy => Pte::Frame { writable: false },
        Grant::Frame { .. } if let Some(place) = world.in_place() => {
            Pte::InPlace { of: place.device().map(|d| d as u8) }
        }
        Grant::Frame { writable } => Pte::Frame { writable },
        Grant::Zeros => Pte::Zeros,
    }
}

impl World {
    /// `device` is cut off. What it alone has is lost.
    pub(super) fn quarantine(&mut self, device: usize) {
        let it = &mut self.devices[device];
        it.health = Health::Cut;
        it.pte = Pte::Nothing;
        it.flight = it.flight.filter(|flight| flight.by_port());
        self.lost |= self.truth().and_then(Place::device) == Some(device);
    }

    fn fails(&self, place: Option<Place>) -> bool {
        place.and_then(Place::device).is_some_and(|d| self.devices[d].health != Health::Fine)
    }

    pub(super) fn is_cut(&self, place: Place) -> bool {
        place.device().is_some_and(|d| self.devices[d].health == Health::Cut)
    }

    /// What cannot be read is lost (rule Z9).
    fn poison(&mut self, from: Place) {
        self.lost |= self.fails(Some(from));
        self.free(from);
        self.commit(State::Poisoned { pfn: from.pfn() });
    }

    fn recall(&self) -> Op {
        Op::Recall { left: self.members(), asked: 0 }
    }
}

/// Memory in place is to be taken from there, or discarded: all devices let go of it first.
pub(super) fn vacate(setup: &Setup, discard: bool) -> Op {
    let left = if setup.bug == Some(Bug::LeavesUnderDevices) { 0 } else { (1 << setup.devices) - 1 };
    Op::Vacate { left, asked: 0, discard }
}

impl Setup {
    /// How the CPU may map what was filled, taken back or loaded with this `dirt`: as the engine may choose.
    fn mappings(&self, write: bool, dirt: Dirt, loads: bool) -> Vec<(bool, Dirt)> {
        let access = if write { Access::Write } else { Access::Read };
        let mut all = vec![plan::mapping(access, true, dirt), plan::mapping(access, false, dirt)];
        if !write && (loads || dirt == Dirt::Unverified) {
            all.push(plan::mapping_to_be_written(true));
        }
        if !write && loads {
            all.push(plan::mapping_to_be_written(false));
        }
        all.sort_by_key(|(writable, dirt)| (*writable, *dirt as u8));
        all.dedup();
        all
    }

    /// Begins what a device's fault takes next. `None` when that is to wait, or to give up.
    pub(super) fn begin_step(&self, world: &World, device: usize, step: Step) -> Option<World> {
        let mut w = *world;
        let to = device as u8;
        if w.native && self.bug != Some(Bug::NativeIsZeros) {
            w.op = Op::Adopt;
            return Some(w);
        }
        w.op = match step {
            Step::Enter(state, grant) => {
                w.set(state);
                Op::Enter { to, pte: pte(&w, device, grant) }
            }
            Step::Recall => w.recall(),
            Step::Protect if w.pin == Pin::Write => return None,
            Step::Protect => Op::Protect { done: false },
            Step::Unmap if w.pin != Pin::Not && self.bug != Some(Bug::UnmapsWhatIsPinned) => return None,
            Step::Unmap => Op::Unmap { done: false },
            Step::Home(access) => return self.begin_fault(world, access),
            Step::Move => {
                // Its page is in use as the backing: that is given up first.
                if w.backing == Kept::At(Place::Page(to)) {
                    let State::Standby { pfn, .. } = w.state() else { unreachable!("{w:?} has a backing") };
                    w.forget_backing();
                    w.set(State::Standby { pfn, dirt: Dirt::Dirty });
                }
                w.take(Place::Page(to), false);
                Op::Move { to, copied: false }
            }
            Step::Replicate(sharers) => {
                w.take(Place::Copy(to), false);
                Op::Replicate { to, sharers: sharers.bits(), copied: false }
            }
            Step::Leave => vacate(self, false),
            Step::Wait | Step::Lost(_) => return None,
        };
        Some(w)
    }

    /// Begins what a fault of the CPU takes.
    pub(super) fn begin_fault(&self, world: &World, access: Access) -> Option<World> {
        let mut w = *world;
        w.op = match self.on_fault(w.state(), access) {
            // The kernel says so when the page is to be put there.
            FaultPlan::Fill if w.native => return None,
            FaultPlan::Present | FaultPlan::InPlace(_) | FaultPlan::Wait(_) | FaultPlan::Poison(_) => return None,
            FaultPlan::Recall(OnDevices::Shared(_) | OnDevices::Alone(_)) => w.recall(),
            FaultPlan::Fill | FaultPlan::Upgrade | FaultPlan::TakeBack | FaultPlan::Load(_) => {
                Op::Home { write: access == Access::Write }
            }
        };
        Some(w)
    }

    /// The next steps of whoever has the entry locked. None while it waits for an access to end.
    pub(super) fn proceed(&self, world: &World, out: &mut Events) {
        let mut w = *world;
        let state = w.state();
        match w.op {
            Op::Idle => {}
            Op::Recall { left: 0, asked: 0 } => {
                w.commit(recalled(state, || 0).expect("devices mapped it"));
                happens(out, "recalled: commit", None, w);
            }
            Op::Recall { left, asked } => self.recall(world, left, asked, out),
            Op::Vacate { left: 0, asked: 0, discard } => {
                w.op = if discard { Op::Discard { done: false } } else { Op::Leave };
                happens(out, "no device maps what is in place", None, w);
            }
            Op::Vacate { left, asked, .. } => self.recall(world, left, asked, out),
            Op::Enter { to, pte } => {
                let device = &mut w.devices[to as usize];
                let held = matches!(state, State::Mapped { held: true, .. });
                (device.pte, w.op) = (pte, Op::Idle);
                if world.devices[to as usize].health != Health::Cut {
                    happens(out, "the translation is written", Some(to as usize), w);
                }
                if world.devices[to as usize].health != Health::Fine || (self.refusals && !held) {
                    w.devices[to as usize].pte = Pte::Nothing;
                    happens(out, "the translation is refused", Some(to as usize), w);
                }
            }
            Op::Replicate { to, sharers, copied: false } => {
                let place = Place::Copy(to);
                w.fill(place, w.is_latest(Place::Frame));
                w.op = Op::Replicate { to, sharers, copied: true };
                self.unless_it_fails(world, w, to as usize, "the copy is made", out);
            }
            Op::Replicate { to, sharers, copied: true } => {
                let (State::Host { pfn, writable, dirt } | State::Shared { pfn, writable, dirt, .. }) = state else {
                    unreachable!("{state:?} has no frame to copy")
                };
                let sharers = Sharers::decode(sharers).expect("one at least");
                w.set(State::Shared { pfn, writable, dirt, sharers });
                w.op = Op::Enter { to, pte: Pte::Copy };
                happens(out, "replicate: commit", Some(to as usize), w);
            }
            Op::Adopt => {
                w.native = false;
                w.commit(State::Host { pfn: FRAME, writable: true, dirt: Dirt::Dirty });
                happens(out, "adopt: commit", None, w);
            }
            Op::Protect { done: false } => {
                w.cpu = Cpu::Read;
                w.op = Op::Protect { done: true };
                happens(out, "the CPU's mapping is protected", None, w);
            }
            Op::Protect { done: true } => {
                let State::Host { pfn, dirt, .. } = state else {
                    unreachable!("{state:?} is mapped on the CPU alone")
                };
                w.commit(State::Host { pfn, writable: false, dirt });
                happens(out, "protect: commit", None, w);
            }
            Op::Unmap { done: false } => {
                w.cpu = Cpu::Nothing;
                w.op = Op::Unmap { done: true };
                happens(out, "the CPU's mapping is taken away", None, w);
            }
            Op::Unmap { done: true } => {
                let State::Host { pfn, dirt, .. } = state else {
                    unreachable!("{state:?} is mapped on the CPU alone")
                };
                w.commit(State::Standby { pfn, dirt });
                happens(out, "unmap: commit", None, w);
            }
            Op::Move { to, copied } => self.r#move(world, to, copied, out),
            Op::Home { write } => self.home(world, write, out),
            Op::Install { target } => {
                let State::Host { writable, .. } = Entry::from_word(target).state() else {
                    unreachable!("the CPU maps frames")
                };
                w.cpu = if writable { Cpu::Write } else { Cpu::Read };
                w.op = Op::Installed { target };
                happens(out, "the CPU maps it", None, w);
                if self.refusals {
                    let mut w = *world;
                    if matches!(state, State::Empty | State::Zero { .. } | State::Device { .. }) {
                        w.free(Place::Frame);
                    }
                    w.op = Op::Idle;
                    happens(out, "the CPU's mapping is refused", None, w);
                }
            }
            Op::Installed { target } => {
                let target = Entry::from_word(target).state();
                let from = match state {
                    State::Empty => Kept::Zeros,
                    State::Device { pfn, .. } => Kept::At(Place::of(pfn)),
                    _ => w.backing,
                };
                w.backing = from;
                if dirt(target) == Some(Dirt::Dirty) {
                    w.forget_backing();
                }
                w.commit(target);
                happens(out, "home: commit", None, w);
            }
            Op::Evict { same_life } => self.evict(world, same_life, out),
            Op::Evicted { target } | Op::Expelled { target } => {
                let target = Entry::from_word(target).state();
                let was = w.op;
                w.commit(target);
                if w.truth().is_some_and(|place| w.is_cut(place)) && self.bug != Some(Bug::DropsToTheDead) {
                    // Gone since: it stays where it is.
                    w = *world;
                    w.op = Op::Idle;
                } else if matches!(was, Op::Evicted { .. }) {
                    w.free(Place::Frame);
                    if w.truth().is_none_or(|place| w.backing != Kept::At(place)) {
                        w.forget_backing();
                    }
                    w.backing = Kept::Nowhere;
                } else {
                    w.free(world.truth().expect("it was on a device"));
                }
                happens(out, "evict: commit", None, w);
            }
            Op::Expel { to_tier } => {
                let from = w.truth().expect("it is on a device");
                if w.fails(Some(from)) {
                    w.poison(from);
                    return happens(out, "the page cannot be read: it is lost", None, w);
                }
                let to = if to_tier { Place::Tier } else { Place::Frame };
                w.take(to, w.is_latest(from));
                let target = if to_tier { on_device(to) } else { State::Standby { pfn: FRAME, dirt: Dirt::Dirty } };
                w.op = Op::Expelled { target: word(target) };
                happens(out, "the device's page is copied out", None, w);
                if self.refusals {
                    w = *world;
                    w.op = Op::Idle;
                    happens(out, "the device's page cannot be copied now", None, w);
                }
            }
            Op::Discard { done: false } => {
                w.cpu = Cpu::Nothing;
                w.op = Op::Discard { done: true };
                happens(out, "the program discards it", None, w);
            }
            Op::Discard { done: true } => {
                w.free_all();
                (w.backing, w.blank, w.native) = (Kept::Nowhere, true, false);
                w.commit(State::Empty);
                happens(out, "discard: commit", None, w);
            }
            Op::Settle => {
                if w.backing == Kept::At(Place::Tier) {
                    w.forget_backing();
                    w.set(State::Standby { pfn: FRAME, dirt: Dirt::Dirty });
                }
                w.take(Place::Tier, w.is_latest(Place::Frame));
                w.op = Op::Settled;
                happens(out, "it is copied to its place on the tier", None, w);
            }
            Op::Settled => {
                w.free(Place::Frame);
                w.forget_backing();
                w.cpu = Cpu::InPlace;
                w.commit(State::Coherent { pfn: Place::Tier.pfn() });
                happens(out, "it is mapped in place", None, w);
            }
            Op::Show => {
                let place = w.truth().expect("it is on a device");
                if w.is_cut(place) {
                    w.op = Op::Idle;
                    return happens(out, "the device has gone: nothing is shown", None, w);
                }
                w.cpu = Cpu::InPlace;
                w.op = Op::Shown;
                happens(out, "the device's page is mapped in place", None, w);
            }
            Op::Shown => {
                let pfn = w.truth().expect("it is on a device").pfn();
                w.commit(State::Coherent { pfn });
                happens(out, "show: commit", None, w);
            }
            Op::Leave => {
                w.cpu = Cpu::Nothing;
                w.op = Op::Left;
                happens(out, "it is taken from its place", None, w);
            }
            Op::Left => {
                let place = w.in_place().expect("it was in place");
                w.commit(on_device(place));
                happens(out, "leave: commit", None, w);
            }
        }
    }

    /// Devices are asked and waited for in any order.
    fn recall(&self, world: &World, left: u16, asked: u16, out: &mut Events) {
        let goes_on = |left, asked| match world.op {
            Op::Vacate { discard, .. } => Op::Vacate { left, asked, discard },
            _ => Op::Recall { left, asked },
        };
        let waits_for_ever = self.bug == Some(Bug::FailedDevicesAreWaitedFor);
        for d in (0..MOST).filter(|d| (left | asked) >> d & 1 != 0) {
            let (mut w, bit) = (*world, 1 << d);
            let device = w.devices[d];
            if left & bit != 0 {
                match device.health {
                    Health::Fine => w.devices[d].pte = Pte::Nothing,
                    Health::Hung if waits_for_ever => continue,
                    Health::Hung => w.quarantine(d),
                    Health::Cut => {}
                }
                w.op = goes_on(left & !bit, asked | bit);
                if self.bug == Some(Bug::RecallForgetsOne) {
                    w.op = goes_on(0, bit);
                }
                happens(out, "recall: the translation is taken away", Some(d), w);
                continue;
            }
            let waits = match self.bug {
                Some(Bug::RecallDoesNotWait) => false,
                Some(Bug::QuarantineForgetsThePort) if device.health == Health::Cut => false,
                _ => device.flight.is_some(),
            };
            if !waits {
                if self.bug != Some(Bug::RecallKeepsCopies) {
                    w.free(Place::Copy(d as u8));
                }
                w.op = goes_on(left, asked & !bit);
                happens(out, "recall: it makes no access any more", Some(d), w);
            } else if device.health == Health::Hung && !waits_for_ever {
                w.quarantine(d);
                happens(out, "recall: it does not answer in time, and is quarantined", Some(d), w);
            }
        }
    }

    /// The outcome of a copy to `to`, unless it fails: then the page stays as it is (rule G16).
    fn unless_it_fails(&self, before: &World, w: World, to: usize, what: &'static str, out: &mut Events) {
        if w.devices[to].health == Health::Fine {
            happens(out, what, Some(to), w);
        }
        if w.devices[to].health != Health::Fine || self.refusals {
            let mut w = *before;
            w.free(if matches!(w.op, Op::Move { .. }) { Place::Page(to as u8) } else { Place::Copy(to as u8) });
            w.op = Op::Idle;
            happens(out, "the copy fails", Some(to), w);
        }
    }

    fn r#move(&self, world: &World, to: u8, copied: bool, out: &mut Events) {
        let mut w = *world;
        let (from, page) = (w.truth(), Place::Page(to));
        if copied {
            if w.is_cut(page) {
                w.free(page);
                w.op = Op::Idle;
                return happens(out, "the device has gone: nothing moves", Some(to as usize), w);
            }
            w.forget_backing();
            if let Some(from) = from {
                w.free(from);
            }
            w.commit(on_device(page));
            return happens(out, "move: commit", Some(to as usize), w);
        }
        if w.fails(from) {
            w.free(page);
            w.poison(from.expect("it is on a device"));
            return happens(out, "the page cannot be read: it is lost", Some(to as usize), w);
        }
        w.fill(page, w.holds_latest(from));
        w.op = Op::Move { to, copied: true };
        self.unless_it_fails(world, w, to as usize, "the data is copied to the device", out);
    }

    fn home(&self, world: &World, write: bool, out: &mut Events) {
        let install = |mut w: World, writable, dirt, what, out: &mut Events| {
            w.op = Op::Install { target: word(State::Host { pfn: FRAME, writable, dirt }) };
            happens(out, what, None, w);
        };
        let mut w = *world;
        match w.state() {
            State::Empty | State::Zero { .. } => {
                w.take(Place::Frame, w.blank);
                for (writable, dirt) in self.mappings(write, Dirt::Clean, false) {
                    install(w, writable, dirt, "home: a frame of zeros", out);
                }
            }
            State::Standby { dirt, .. } => {
                for (writable, dirt) in self.mappings(write, dirt, false) {
                    install(w, writable, dirt, "home: the frame is taken back", out);
                }
            }
            State::Host { dirt, .. } if self.bug == Some(Bug::WritesStayClean) => {
                install(w, true, dirt, "home: the first write", out);
            }
            State::Host { .. } => install(w, true, Dirt::Dirty, "home: the first write", out),
            // Only with a bug.
            State::Shared { pfn, sharers, .. } => {
                w.cpu = Cpu::Write;
                w.commit(State::Shared { pfn, writable: true, dirt: Dirt::Dirty, sharers });
                happens(out, "home: the first write", None, w);
            }
            State::Device { pfn, .. } => {
                let from = Place::of(pfn);
                if w.fails(Some(from)) && self.bug != Some(Bug::LostIsZeros) {
                    w.poison(from);
                    return happens(out, "the page cannot be read: it is lost", None, w);
                }
                let failed = w.fails(Some(from));
                w.take(Place::Frame, !failed && w.is_latest(from));
                for (writable, dirt) in self.mappings(write, Dirt::Clean, true) {
                    let dirt = if from.device().is_some() && !self.keeps { Dirt::Dirty } else { dirt };
                    install(w, writable, dirt, "home: the data is loaded", out);
                }
                if self.refusals {
                    w = *world;
                    w.op = Op::Idle;
                    if self.bug == Some(Bug::RefusalIsLoss) {
                        w.poison(from);
                    }
                    happens(out, "the page cannot be loaded now", None, w);
                }
            }
            other => unreachable!("{other:?} is not brought home"),
        }
    }

    fn evict(&self, world: &World, same_life: bool, out: &mut Events) {
        let mut w = *world;
        let State::Standby { dirt, .. } = w.state() else { unreachable!("only what is on standby is evicted") };
        // What a device that is gone has kept is no copy any more.
        let backing = match w.backing {
            Kept::At(place) if w.is_cut(place) && self.bug != Some(Bug::DropsToTheDead) => Kept::Nowhere,
            other => other,
        };
        let drop_to = match plan::on_evict(dirt, backing.backing(), same_life) {
            EvictPlan::DropToZero => Some(State::Empty),
            EvictPlan::DropTo(pfn) => Some(on_device(Place::of(pfn))),
            EvictPlan::CompareWith(pfn) => {
                let place = Place::of(pfn);
                (!w.fails(Some(place)) && w.is_latest(place)).then(|| on_device(place))
            }
            EvictPlan::CompareWithZero | EvictPlan::WriteBack => w.blank.then_some(State::Empty),
        };
        if let Some(target) = drop_to {
            w.op = Op::Evicted { target: word(target) };
            return happens(out, "evict: nothing to be written", None, w);
        }
        // To the tier, over what it may have kept of an older version.
        w.op = Op::Idle;
        if self.tier {
            let over = w.is_used(Place::Tier);
            assert!(!over || w.backing == Kept::At(Place::Tier), "{w:?}: the tier's page is another's");
            if !over {
                w.take(Place::Tier, false);
            }
            w.fill(Place::Tier, w.is_latest(Place::Frame));
            let mut done = w;
            done.op = Op::Evicted { target: word(on_device(Place::Tier)) };
            happens(out, "evict: written back", None, done);
            if !self.refusals {
                return;
            }
            if over { w.fill(Place::Tier, false) } else { w.free(Place::Tier) }
        }
        happens(out, "evict: it cannot be written back", None, w);
    }

    /// The engine's decision about a fault of the CPU.
    pub(super) fn on_fault(&self, state: State, access: Access) -> FaultPlan {
        match (self.bug, state) {
            (Some(Bug::CpuWritesDoNotRecall), State::Shared { writable: false, .. }) if access == Access::Write => {
                FaultPlan::Upgrade
            }
            (Some(Bug::ZerosAreFilledUnderReaders), State::Zero { .. }) => FaultPlan::Fill,
            _ => plan::on_fault(state, access),
        }
    }

    /// The engine's decision about a fault of `device`.
    pub(super) fn on_device_fault(&self, state: State, request: Request, device: usize) -> Step {
        let step = |request| on_device_fault(state, request, own(device));
        let host = |pfn: Pfn| matches!(state, State::Host { pfn: p, .. } if p == pfn);
        match (self.bug, step(request)) {
            (Some(Bug::ReplicatesWithoutProtecting), Step::Protect) => Step::Replicate(Sharers::one(request.mmu)),
            (Some(Bug::AtomicsGoRemote), _) if request.atomic && request.wish == Wish::Remote => {
                step(Request { atomic: false, write: true, ..request })
            }
            (Some(Bug::MovesWithoutUnmapping), Step::Unmap) if host(FRAME) => Step::Move,
            (Some(Bug::TakesWhatIsHeld), Step::Wait) => Step::Recall,
            (Some(Bug::BringsHomeWhatItMoves), Step::Move) if matches!(state, State::Standby { .. }) => {
                Step::Home(Access::Read)
            }
            (_, step) => step,
        }
    }
}
