//! What can happen at any moment: accesses of the CPU and of devices, faults, reclaim, eviction, pins, launches, failures.
//!
//! An access of a device begins and ends, and others act in between: it gets to what the translation said when it began.

use super::bugs::Bug;
use super::engine::*;
use super::world::*;
use super::*;
use crate::addr::Access;
use std::collections::HashMap;
use std::vec::Vec;

/// The events of a setup.
pub(super) struct Model {
    pub(super) setup: Setup,
    /// The steps that faults of a device may take, by table word.
    steps: HashMap<(u64, usize), Vec<Step>>,
}

/// Every fault of `device`, whatever it and the engine are able to do.
pub(super) fn requests(device: usize) -> impl Iterator<Item = Request> {
    let wishes = [Wish::Migrate, Wish::Replicate, Wish::Remote];
    let accesses = [(false, false), (true, false), (true, true)];
    wishes.into_iter().flat_map(move |wish| {
        accesses.into_iter().flat_map(move |(write, atomic)| {
            [(true, true), (true, false), (false, true), (false, false)].into_iter().map(
                move |(zero_page, protects)| Request { mmu: mmu(device), write, atomic, wish, zero_page, protects },
            )
        })
    })
}

impl Model {
    pub(super) fn new(setup: Setup) -> Model {
        assert!(setup.devices <= MOST);
        Model { setup, steps: HashMap::new() }
    }

    /// Everything that can happen next.
    pub(super) fn events(&mut self, world: &World, out: &mut Events) {
        self.accesses(world, out);
        self.failures(world, out);
        if world.op == Op::Idle {
            self.faults(world, out);
            self.others(world, out);
        } else {
            if self.setup.bug == Some(Bug::EntersWithoutTheLock) {
                self.enters_at_once(world, out);
            }
            self.setup.proceed(world, out);
        }
    }

    fn accesses(&self, world: &World, out: &mut Events) {
        // What is shown is where the table says; so it is until the commit, and after it.
        let in_place = if world.cpu == Cpu::InPlace { world.truth().expect("it is there") } else { Place::Frame };
        if matches!(world.cpu, Cpu::Write | Cpu::InPlace) {
            let mut w = *world;
            w.write(in_place);
            happens(out, "the CPU writes", None, w);
        }
        for d in 0..self.setup.devices {
            let it = world.devices[d];
            if let Some(flight) = it.flight {
                out.push(ends(world, d, flight));
                continue;
            }
            let mut by = it.pte;
            if self.setup.bug == Some(Bug::ThePortTrustsTheWord)
                && let State::Shared { writable, sharers, .. } = world.state()
                && sharers.has(mmu(d))
            {
                by = Pte::Frame { writable };
            }
            // The port goes by the word where it says that memory is in place, unless it is locked.
            if by == Pte::Nothing
                && world.op == Op::Idle
                && let Some(place) = world.in_place()
            {
                by = Pte::InPlace { of: place.device().map(|d| d as u8) };
            }
            if by == Pte::Nothing || it.health == Health::Cut {
                continue;
            }
            let mut begins = |kind, what| {
                let mut w = *world;
                w.devices[d].flight = Some(Flight { by, kind });
                happens(out, what, Some(d), w);
            };
            begins(Kind::Read, "begins to read");
            if by.writes() {
                begins(Kind::Write, "begins to write");
            }
            // What is in place nobody has alone.
            if by == Pte::Own && world.in_place().is_none()
                || (by.writes() && self.setup.bug == Some(Bug::AtomicsGoRemote))
            {
                begins(Kind::Atomic, "begins an atomic access");
            }
        }
    }

    fn failures(&self, world: &World, out: &mut Events) {
        let failed = world.devices.iter().filter(|d| d.health != Health::Fine).count();
        for d in 0..self.setup.devices {
            let mut w = *world;
            match w.devices[d].health {
                Health::Fine if failed < self.setup.failures => {
                    w.devices[d].health = Health::Hung;
                    happens(out, "fails", Some(d), w);
                }
                Health::Hung => {
                    w.quarantine(d);
                    if self.setup.bug == Some(Bug::QuarantineLeavesTranslations) {
                        w.devices[d].pte = world.devices[d].pte;
                    }
                    happens(out, "is quarantined", Some(d), w);
                }
                _ => {}
            }
        }
    }

    fn faults(&mut self, world: &World, out: &mut Events) {
        let setup = self.setup;
        for (access, what) in [(Access::Read, "the CPU faults to read"), (Access::Write, "the CPU faults to write")] {
            if let Some(w) = setup.begin_fault(world, access) {
                happens(out, what, None, w);
            }
        }
        for d in (0..setup.devices).filter(|d| world.devices[*d].health != Health::Cut) {
            let steps = self.steps.entry((world.word, d)).or_insert_with(|| {
                let mut steps = Vec::new();
                for request in requests(d) {
                    let step = setup.on_device_fault(world.state(), request, d);
                    // Faults of the CPU and recalls come by themselves.
                    if !steps.contains(&step) && !matches!(step, Step::Home(_) | Step::Wait | Step::Lost(_)) {
                        steps.push(step);
                    }
                }
                steps
            });
            for step in steps {
                if let Some(w) = setup.begin_step(world, d, *step) {
                    let what = match step {
                        Step::Enter(..) => "faults: enter",
                        Step::Recall => "faults: recall",
                        Step::Protect => "faults: protect",
                        Step::Unmap => "faults: unmap",
                        Step::Move => "faults: move",
                        Step::Replicate(_) => "faults: replicate",
                        _ => "faults: leave",
                    };
                    happens(out, what, Some(d), w);
                }
            }
        }
    }

    /// What [`Bug::EntersWithoutTheLock`] does: the table is read, the translation written; the commit would come later.
    fn enters_at_once(&self, world: &World, out: &mut Events) {
        for d in 0..self.setup.devices {
            for request in requests(d) {
                if let Step::Enter(_, grant) = self.setup.on_device_fault(world.state(), request, d) {
                    let mut w = *world;
                    w.devices[d].pte = pte(world, d, grant);
                    happens(out, "enters without the lock", Some(d), w);
                }
            }
        }
    }

    /// Reclaim, eviction, discards, pins, launches.
    fn others(&self, world: &World, out: &mut Events) {
        let setup = self.setup;
        let begin = |op: Op, what: &'static str, out: &mut Events| happens(out, what, None, world.with_op(op));
        let pinned = world.pin != Pin::Not;
        match world.state() {
            State::Host { .. } if !pinned => begin(Op::Unmap { done: false }, "reclaim unmaps", out),
            State::Standby { .. } => {
                begin(Op::Evict { same_life: true }, "reclaim evicts", out);
                begin(Op::Evict { same_life: false }, "reclaim evicts what a parent mapped", out);
                if setup.coherent {
                    begin(Op::Settle, "the program sends it to the tier", out);
                }
            }
            State::Coherent { .. } => {
                begin(vacate(&setup, false), "a pin for long takes it from its place", out);
                begin(vacate(&setup, true), "the program begins to discard what is in place", out);
            }
            State::Device { pfn, .. } if Place::of(pfn) != Place::Tier => {
                if setup.coherent_devices {
                    begin(Op::Show, "the program has it put in place", out);
                }
                begin(Op::Expel { to_tier: false }, "the device evicts to the host", out);
                if setup.tier {
                    begin(Op::Expel { to_tier: true }, "the device evicts to the tier", out);
                }
            }
            State::Shared { .. } | State::Zero { .. } | State::Mapped { held: false, .. } => {
                if let Some(w) = setup.begin_step(world, 0, Step::Recall) {
                    happens(out, "reclaim recalls", None, w);
                }
            }
            _ => {}
        }
        // Of what devices map, after a recall.
        if !pinned && world.members() == 0 && world.state() != State::Empty && world.in_place().is_none() {
            begin(Op::Discard { done: false }, "the program begins to discard", out);
        }
        if setup.launches
            && let State::Mapped { pfn, held } = world.state()
        {
            let owner = &world.devices[Place::of(pfn).device().expect("a device maps its own page")];
            let mut w = *world;
            w.set(State::Mapped { pfn, held: !held });
            if held {
                happens(out, "the launch ends", None, w);
            } else if owner.pte == Pte::Own && owner.health == Health::Fine {
                happens(out, "a launch holds it", None, w);
            }
        }
        if setup.pins {
            let (State::Host { .. } | State::Shared { .. }) = world.state() else { return };
            let pin = |pin: Pin, what, out: &mut Events| happens(out, what, None, world.with_pin(pin));
            match world.pin {
                Pin::Not => {
                    pin(Pin::Read, "the program pins it to read", out);
                    if world.cpu == Cpu::Write {
                        pin(Pin::Write, "the program pins it to write", out);
                    }
                }
                _ => pin(Pin::Not, "the program unpins it", out),
            }
        }
    }
}

fn ends(world: &World, device: usize, flight: Flight) -> Event {
    let mut w = *world;
    let at = World::target(device, flight.by);
    w.devices[device].flight = None;
    let leads_to = if !w.holds_latest(at) {
        Err("G2: a device gets to what is not the latest")
    } else {
        if flight.kind != Kind::Read {
            w.write(at.expect("zeros are never written"));
        }
        Ok(w)
    };
    Event { what: "ends its access", device: Some(device), leads_to }
}
