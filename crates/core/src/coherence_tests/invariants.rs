//! What is true in every world.

use super::engine::dirt;
use super::world::*;
use super::*;
use crate::entry::{Dirt, Entry};

/// Which rule `world` breaks, if any.
pub(super) fn broken(world: &World) -> Option<&'static str> {
    one_writer_or_readers(world)
        .or_else(|| everything_mapped_is_the_latest(world))
        .or_else(|| the_truth_is_where_the_table_says(world))
        .or_else(|| nothing_is_mapped_that_the_table_does_not_permit(world))
        .or_else(|| no_device_has_access_after_quarantine(world))
        .or_else(|| atomics_are_alone(world))
        .or_else(|| pins_and_launches_keep_what_they_have(world))
        .or_else(|| every_place_has_one_owner(world))
}

/// G2, G3.
fn one_writer_or_readers(w: &World) -> Option<&'static str> {
    let maps = |f: fn(Pte) -> bool| w.devices.iter().filter(|d| f(d.pte)).count();
    let places = |(d, it): (usize, &Device)| match it.pte {
        Pte::Own => w.in_place() == Some(Place::Page(d as u8)),
        Pte::InPlace { .. } => true,
        _ => false,
    };
    // Whoever has what is in place has one memory; others have nothing of it.
    let in_place = w.devices.iter().enumerate().filter(|it| places(*it)).count();
    let own = maps(|p| p == Pte::Own) + maps(|p| matches!(p, Pte::InPlace { .. })) - in_place;
    let frame_writers = maps(|p| p == Pte::Frame { writable: true }) + (w.cpu == Cpu::Write) as usize;
    let copies = maps(|p| matches!(p, Pte::Copy | Pte::Zeros));
    let all = maps(|p| p != Pte::Nothing) + (w.cpu != Cpu::Nothing) as usize;
    let in_place = in_place + (w.cpu == Cpu::InPlace) as usize;
    if own > 0 && all > 1 || in_place > 0 && all > in_place {
        return Some("G2: somebody else maps what one maps alone");
    }
    (frame_writers > 0 && copies > 0).then_some("G3: somebody may write while others read copies or zeros")
}

/// G2, G3, Z9: whoever reads now sees the latest.
fn everything_mapped_is_the_latest(w: &World) -> Option<&'static str> {
    let cpu = match w.cpu {
        Cpu::Nothing => true,
        Cpu::Read | Cpu::Write => w.is_latest(Place::Frame),
        Cpu::InPlace => w.truth().is_some_and(|place| w.is_latest(place)),
    };
    if !cpu {
        return Some("G2: the CPU maps what is not the latest");
    }
    let stale = |(d, it): (usize, &Device)| it.pte != Pte::Nothing && !w.holds_latest(World::target(d, it.pte));
    w.devices.iter().enumerate().any(stale).then_some("G2: a device maps what is not the latest")
}

/// Z9, G16: what the table names is the latest, or lost with a device.
fn the_truth_is_where_the_table_says(w: &World) -> Option<&'static str> {
    let truth = w.truth();
    if matches!(w.state(), State::Poisoned { .. }) {
        return (!w.lost).then_some("Z9: a page is poisoned that no device took with it");
    }
    // What the CPU maps already is the truth, while the commit is under way.
    let ahead = matches!(w.op, Op::Installed { .. });
    let named = if ahead { Some(Place::Frame) } else { truth };
    if !w.holds_latest(named) {
        return Some("G16: what the table names is not the latest");
    }
    if truth.is_some_and(|place| w.is_cut(place)) && !w.lost {
        return Some("Z9: a page that was there is given up to a device that is gone");
    }
    let kept = match w.backing {
        Kept::Nowhere => false,
        Kept::Zeros => w.blank,
        Kept::At(place) => w.is_latest(place),
    };
    let frame = truth == Some(Place::Frame) && !ahead;
    (frame && dirt(w.state()) == Some(Dirt::Clean) && !kept)
        .then_some("G16: a frame is clean, and nobody else has its content")
}

/// G2: translations follow the table. While an entry is locked, the CPU's may be ahead of it by what will be committed.
fn nothing_is_mapped_that_the_table_does_not_permit(w: &World) -> Option<&'static str> {
    let permitted = |state: State| match state {
        State::Host { writable, .. } | State::Shared { writable, .. } => {
            if writable {
                Cpu::Write
            } else {
                Cpu::Read
            }
        }
        State::Coherent { .. } => Cpu::InPlace,
        State::Device { .. } if w.op == Op::Shown => Cpu::InPlace,
        _ => Cpu::Nothing,
    };
    let table = if w.native { Cpu::Write } else { permitted(w.state()) };
    let cpu = match w.op {
        // What is to be mapped is mapped; or somebody would fault there for ever.
        Op::Idle => w.cpu == table,
        Op::Installed { target } => w.cpu == permitted(Entry::from_word(target).state()),
        _ => match w.cpu {
            Cpu::Nothing => true,
            Cpu::Read => matches!(table, Cpu::Read | Cpu::Write),
            other => other == table,
        },
    };
    if !cpu {
        return Some("G2: the CPU does not map what the table says");
    }
    let wrong = |(d, it): (usize, &Device)| !match (it.pte, w.state()) {
        (Pte::Nothing, _) => true,
        (Pte::InPlace { of }, State::Coherent { pfn }) => Place::of(pfn).device().map(|d| d as u8) == of,
        (Pte::Own, State::Mapped { pfn, .. } | State::Coherent { pfn }) => pfn == Place::Page(d as u8).pfn(),
        (Pte::Zeros, State::Zero { sharers }) => sharers.has(mmu(d)),
        (Pte::Frame { writable: device }, State::Shared { writable, sharers, .. }) => {
            device == writable && sharers.has(mmu(d))
        }
        (Pte::Copy, State::Shared { writable: false, sharers, .. }) => sharers.has(mmu(d)),
        _ => false,
    };
    w.devices.iter().enumerate().any(wrong).then_some("G2: a device maps what the table does not permit")
}

/// G5: its accesses by the port that were under way are ours, and end.
fn no_device_has_access_after_quarantine(w: &World) -> Option<&'static str> {
    let keeps = |d: &Device| {
        d.health == Health::Cut && (d.pte != Pte::Nothing || d.flight.is_some_and(|flight| !flight.by_port()))
    };
    w.devices.iter().any(keeps).then_some("G5: a device has access after its quarantine")
}

/// G14.
fn atomics_are_alone(w: &World) -> Option<&'static str> {
    let with_others = |(d, it): (usize, &Device)| {
        let other = |(o, it): (usize, &Device)| o != d && (it.pte != Pte::Nothing || it.flight.is_some());
        it.flight.is_some_and(|flight| flight.kind == Kind::Atomic)
            && (w.cpu != Cpu::Nothing || w.devices.iter().enumerate().any(other))
    };
    w.devices.iter().enumerate().any(with_others).then_some("G14: somebody has the page during an atomic access")
}

/// Z8, H5.
fn pins_and_launches_keep_what_they_have(w: &World) -> Option<&'static str> {
    let pin = match w.pin {
        Pin::Not => true,
        Pin::Read => matches!(w.cpu, Cpu::Read | Cpu::Write),
        Pin::Write => w.cpu == Cpu::Write,
    };
    if !pin {
        return Some("H5: what is pinned is not mapped as it was");
    }
    let launch = match w.state() {
        State::Mapped { pfn, held: true } => {
            let it = w.devices[Place::of(pfn).device().expect("a device maps its own page")];
            it.pte == Pte::Own || it.health != Health::Fine
        }
        _ => true,
    };
    (!launch).then_some("Z8: a launch has lost what it holds")
}

/// Nothing is in use that nobody names (the page's places; while somebody is at work, he has more).
fn every_place_has_one_owner(w: &World) -> Option<&'static str> {
    if w.op != Op::Idle {
        return None;
    }
    let sharers = match w.state() {
        State::Shared { .. } => w.members(),
        _ => 0,
    };
    let owned = |place: Place| match place {
        Place::Copy(d) => sharers >> d & 1 != 0 || !w.is_used(place),
        place => w.is_used(place) == (w.truth() == Some(place) || w.backing == Kept::At(place)),
    };
    let pages = (0..MOST as u8).flat_map(|d| [Place::Page(d), Place::Copy(d)]);
    let all = [Place::Frame, Place::Tier].into_iter().chain(pages).all(owned);
    (!all).then_some("G16: a place is in use that nobody owns, or is owned and not in use")
}
