//! The coherence protocol, checked: a model of one page, the CPU and a few devices, whose reachable states are all looked at;
//! and properties of the steps themselves.
//!
//! | file | what it says |
//! |---|---|
//! | `world.rs` | what a state is made of |
//! | `engine.rs` | what the engine does while it has the entry locked, step by step |
//! | `actors.rs` | what can happen at any moment |
//! | `invariants.rs` | what must be true in every state |
//! | `explore.rs` | the search, and that everybody gets on |
//! | `bugs.rs` | deliberate bugs, each of which must be found |
//! | `steps.rs` | properties of [`on_device_fault`] and [`recalled`] |
//!
//! What to do is decided by [`on_device_fault`], [`recalled`], [`plan::on_fault`](crate::plan::on_fault) and
//! [`plan::on_evict`](crate::plan::on_evict), the functions of the engine itself.

mod actors;
mod bugs;
mod engine;
mod explore;
mod invariants;
mod steps;
mod world;

use super::*;
use engine::Setup;
use explore::{Found, explore, explore_by};
use std::cell::RefCell;
use std::collections::HashSet;

const EVERYTHING: Setup = Setup {
    devices: 2,
    failures: 2,
    refusals: true,
    pins: true,
    launches: true,
    tier: true,
    coherent: true,
    coherent_devices: false,
    adopted: true,
    keeps: true,
    bug: None,
};

fn holds(setup: Setup) -> Found {
    let found = explore(setup).unwrap_or_else(|trace| panic!("{}\n  {}", trace.rule, trace.events.join("\n  ")));
    std::println!("{setup:?}: {} worlds, {} events, {} quiet", found.worlds, found.events, found.quiet);
    found
}

/// Rules G2, G3, G5, G9, G14, G16, Z8, Z9: see the invariants. Each step of the protocol is taken, and so is each way to fail.
#[test]
fn g2_g3_g14_two_devices_both_of_which_may_fail() {
    let found = holds(EVERYTHING);
    assert!(found.worlds > 90_000 && found.quiet > 5_000, "{} worlds, {} quiet", found.worlds, found.quiet);
    let expected = [
        "begins an atomic access",
        "evict: it cannot be written back",
        "evict: nothing to be written",
        "evict: written back",
        "faults: enter",
        "faults: leave",
        "faults: move",
        "faults: protect",
        "faults: recall",
        "faults: replicate",
        "faults: unmap",
        "home: a frame of zeros",
        "home: the data is loaded",
        "home: the first write",
        "home: the frame is taken back",
        "recall: it does not answer in time, and is quarantined",
        "the CPU's mapping is refused",
        "the copy fails",
        "the device evicts to the host",
        "the device evicts to the tier",
        "the device has gone: nothing moves",
        "the launch ends",
        "the page cannot be read: it is lost",
        "the program discards it",
        "the program pins it to write",
        "the translation is refused",
        "no device maps what is in place",
    ];
    let missing: HashSet<_> = expected.iter().filter(|what| !found.happened.contains(*what)).collect();
    assert!(missing.is_empty(), "never happened: {missing:?}");
}

/// The same rules: a copy on each of three devices, and one of them may fail. What concerns the CPU alone is left out.
#[test]
fn g2_g3_g14_three_devices_one_of_which_may_fail() {
    let found = holds(Setup { devices: 3, failures: 1, pins: false, coherent: false, adopted: false, ..EVERYTHING });
    assert!(found.worlds > 180_000 && found.quiet > 4_000, "{} worlds, {} quiet", found.worlds, found.quiet);
}

/// Rules G16, Z9: the same where no page of a device is kept for a clean frame, and nothing evicted has anywhere to go.
#[test]
fn g16_two_devices_and_no_tier() {
    let found = holds(Setup { tier: false, coherent: false, keeps: false, ..EVERYTHING });
    assert!(found.worlds > 20_000, "{}", found.worlds);
}

/// Rules Z5, G2, G10: memory of devices that run code is in place for the CPU, for themselves and for others.
#[test]
fn z5_two_devices_with_memory_in_place() {
    let found = holds(Setup { coherent_devices: true, ..EVERYTHING });
    assert!(found.worlds > 100_000, "{}", found.worlds);
    let expected = ["the program has it put in place", "show: commit", "leave: commit"];
    assert!(expected.iter().all(|what| found.happened.contains(what)), "{:?}", found.happened);
}

/// That devices are alike saves work, and nothing else: by their numbers there are more worlds, and each name is one of them.
#[test]
fn numbers_of_devices_make_no_difference() {
    let bare = Setup { failures: 1, pins: false, launches: false, adopted: false, ..EVERYTHING };
    let three = Setup { devices: 3, refusals: false, tier: false, coherent: false, keeps: false, ..bare };
    for (setup, least) in [(bare, 1.8), (three, 4.0)] {
        let few = holds(setup).worlds;
        let all = RefCell::new(HashSet::new());
        let many = explore_by(setup, |world| {
            all.borrow_mut().insert(*world);
            *world
        });
        assert!(many.is_ok(), "a rule is broken under other numbers");
        let all = all.into_inner();
        let names: HashSet<_> = all.iter().map(|world| world.canonical(setup.devices)).collect();
        assert_eq!(names.len(), few, "of {}", all.len());
        assert!(names.is_subset(&all), "a name is no reachable world");
        assert!(all.len() as f64 > least * few as f64, "{} for {few}", all.len());
    }
}
