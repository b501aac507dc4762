//! Every reachable world, breadth first; how the ones that break a rule were reached; and whether everybody gets on.

use super::actors::{Model, requests};
use super::bugs::Bug;
use super::engine::*;
use super::invariants::broken;
use super::world::*;
use super::*;
use crate::addr::Access;
use crate::plan::FaultPlan;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::string::String;
use std::vec::Vec;

/// Own steps in which a fault must be resolved, and those in which a step is done.
const BOUND: usize = 8;

/// What was found where nothing is wrong.
#[derive(Debug)]
pub(super) struct Found {
    /// Worlds of different names.
    pub(super) worlds: usize,
    /// What can happen in all of them.
    pub(super) events: usize,
    /// Worlds in which the headway of everybody was tried.
    pub(super) quiet: usize,
    /// What happened at least once.
    pub(super) happened: HashSet<&'static str>,
}

/// A rule that was broken, and how.
#[derive(Debug)]
pub(super) struct Trace {
    pub(super) rule: String,
    pub(super) events: Vec<String>,
}

#[derive(Clone, Copy)]
struct Reached {
    world: World,
    from: usize,
    what: &'static str,
    device: Option<usize>,
}

/// Looks at everything that can happen in `setup`, to devices whose numbers make no difference.
pub(super) fn explore(setup: Setup) -> Result<Found, Trace> {
    explore_by(setup, |world| world.canonical(setup.devices))
}

/// The same, where two worlds are one if they have the same `name`.
pub(super) fn explore_by(setup: Setup, name: impl Fn(&World) -> World) -> Result<Found, Trace> {
    let mut model = Model::new(setup);
    let mut known: HashSet<World, BuildHasherDefault<Mix>> = HashSet::default();
    let mut happened = HashSet::new();
    let mut reached = Vec::new();
    for world in [World::untouched()].into_iter().chain(setup.adopted.then(World::adopted)) {
        reached.push(Reached { world, from: usize::MAX, what: "", device: None });
        known.insert(name(&world));
    }
    let (mut at, mut seen, mut quiet) = (0, 0, 0);
    let mut out = Events::new();
    while at < reached.len() {
        let world = reached[at].world;
        if let Some(rule) = broken(&world) {
            return Err(Trace { rule: rule.into(), events: history(&reached, at) });
        }
        model.events(&world, &mut out);
        seen += out.len();
        for Event { what, device, leads_to } in out.drain(..) {
            happened.insert(what);
            match leads_to {
                Ok(world) => {
                    if known.insert(name(&world)) {
                        reached.push(Reached { world, from: at, what, device });
                    }
                }
                Err(rule) => {
                    let mut events = history(&reached, at);
                    events.push(said(what, device));
                    return Err(Trace { rule: rule.into(), events });
                }
            }
        }
        at += 1;
    }
    for (at, Reached { world, .. }) in reached.iter().enumerate() {
        quiet += world.is_quiet() as usize;
        if let Some(rule) = no_headway(world, &setup) {
            return Err(Trace { rule, events: history(&reached, at) });
        }
    }
    Ok(Found { worlds: reached.len(), events: seen, quiet, happened })
}

fn said(what: &str, device: Option<usize>) -> String {
    match device {
        Some(d) => format!("device {d}: {what}"),
        None => String::from(what),
    }
}

fn history(reached: &[Reached], mut at: usize) -> Vec<String> {
    let mut events = Vec::new();
    while reached[at].from != usize::MAX {
        let Reached { world, from, what, device } = reached[at];
        events.push(format!("{:<60} {:?}", said(what, device), world.state()));
        at = from;
    }
    events.reverse();
    events
}

/// Who does not get on in `world`, if anybody, when nobody interferes (rules Z8, G3, G14).
fn no_headway(world: &World, setup: &Setup) -> Option<String> {
    if world.op != Op::Idle {
        return stuck(world, setup).then(|| String::from("headway: the entry stays locked for ever"));
    }
    if !world.is_quiet() {
        return None;
    }
    for access in [Access::Read, Access::Write] {
        if !cpu_gets_on(*world, access, setup) {
            return Some(format!("headway: the CPU never gets to {access:?}"));
        }
    }
    for d in (0..setup.devices).filter(|d| world.devices[*d].health == Health::Fine) {
        for request in requests(d) {
            if !device_gets_on(*world, d, request, setup) {
                return Some(format!("headway: device {d} never gets what it wants: {request:?}"));
            }
        }
    }
    None
}

/// Whoever has the entry waits for an access that need not end: one of a device that has failed, by other than the port.
fn stuck(world: &World, setup: &Setup) -> bool {
    let mut out = Events::new();
    setup.proceed(world, &mut out);
    let ends = |d: &Device| d.flight.is_some_and(|flight| d.health == Health::Fine || flight.by_port());
    let waits = |asked: u16| (0..MOST).any(|d| asked >> d & 1 != 0 && ends(&world.devices[d]));
    out.is_empty() && !matches!(world.op, Op::Recall { asked, .. } | Op::Vacate { asked, .. } if waits(asked))
}

/// What has begun is done, by the outcomes in which nothing fails.
fn done(begun: Option<World>, setup: &Setup) -> Option<World> {
    let mut world = begun?;
    for _ in 0..4 * BOUND {
        if world.op == Op::Idle {
            return Some(world);
        }
        let mut out = Events::new();
        setup.proceed(&world, &mut out);
        world = out.into_iter().next()?.leads_to.ok()?;
    }
    None
}

fn cpu_gets_on(mut world: World, access: Access, setup: &Setup) -> bool {
    for _ in 0..BOUND {
        match setup.on_fault(world.state(), access) {
            FaultPlan::Present | FaultPlan::InPlace(_) => {
                return match access {
                    Access::Read => world.cpu != Cpu::Nothing,
                    Access::Write => matches!(world.cpu, Cpu::Write | Cpu::InPlace),
                };
            }
            FaultPlan::Fill if world.native => return true,
            FaultPlan::Poison(_) => return matches!(world.state(), State::Poisoned { .. }),
            // Exactly until the launch is over.
            FaultPlan::Wait(_) => return world.is_held(),
            _ => {}
        }
        let Some(next) = done(setup.begin_fault(&world, access), setup) else { return false };
        world = next;
    }
    false
}

fn device_gets_on(mut world: World, device: usize, request: Request, setup: &Setup) -> bool {
    for _ in 0..BOUND {
        let step = setup.on_device_fault(world.state(), request, device);
        match step {
            Step::Wait => return world.is_held() && world.truth() != Some(Place::Page(device as u8)),
            Step::Lost(_) => return matches!(world.state(), State::Poisoned { .. }),
            // Until it is unpinned.
            Step::Unmap if world.pin != Pin::Not => return true,
            Step::Protect if world.pin == Pin::Write => return true,
            _ => {}
        }
        let native = world.native;
        let Some(next) = done(setup.begin_step(&world, device, step), setup) else { return false };
        world = next;
        if !native && matches!(step, Step::Enter(..) | Step::Replicate(_)) {
            let pte = world.devices[device].pte;
            return if request.atomic {
                pte == Pte::Own && world.in_place().is_none() || setup.bug == Some(Bug::AtomicsGoRemote)
            } else {
                pte != Pte::Nothing && (!request.write || pte.writes())
            };
        }
    }
    false
}

/// Quick, and good enough for worlds.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(*b as u64));
    }
    fn write_u8(&mut self, n: u8) {
        self.write_u64(n as u64);
    }
    fn write_u16(&mut self, n: u16) {
        self.write_u64(n as u64);
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(n as u64);
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }
    fn write_isize(&mut self, n: isize) {
        self.write_u64(n as u64);
    }
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}
