//! Clients of the mirror devices, in C, run with the library preloaded: each says what of the interface it shows.

mod common;

use std::time::Duration;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is to be a number, not {v:?}")))
}

const LIMIT: Duration = Duration::from_secs(300);

/// Rules G1, G3, G4: what devices read and write, and their faults.
#[test]
fn access() {
    common::run("access", &[], LIMIT);
}

/// What is refused, with which errno, and that nothing has changed then. Why is said, if that is wanted.
#[test]
fn errors() {
    let explained = common::run("errors", &[], LIMIT);
    for (why, errno) in [
        ("nothing is mapped from there on", "Bad address"),
        ("nothing is mapped from there on", "Invalid argument"),
        ("the program may not read it", "Bad address"),
        ("the program may not write it", "Operation not permitted"),
        ("the stack of the calling thread", "Bad address"),
    ] {
        let said = explained
            .lines()
            .any(|line| line.starts_with("peerspace: 0x") && line.contains(&format!("{why}: {errno}")));
        assert!(said, "{why}: {errno}\n{explained}");
    }
    let silent = common::run("errors", &[("PEERSPACE_DMIRROR_EXPLAIN", "")], LIMIT);
    assert_eq!(silent, "");
}

/// Rules Z3, Z5, Z7, Z8, G6, G8, H2, H6: migration.
#[test]
fn migrate() {
    common::run("migrate", &[], LIMIT);
}

/// Every byte that a snapshot can have.
#[test]
fn snapshot() {
    common::run("snapshot", &[], LIMIT);
}

/// Rule G14: sole access.
#[test]
fn exclusive() {
    common::run("exclusive", &[], LIMIT);
}

/// Rule G5: changes of mappings.
#[test]
fn mappings() {
    common::run("mappings", &[], LIMIT);
}

/// Rule G11: memory that is not private and anonymous.
#[test]
fn kinds() {
    common::run("kinds", &[], LIMIT);
}

/// Rule G12: forks.
#[test]
fn forks() {
    common::run("forks", &[], LIMIT);
}

/// Rules G1 to G14: all requests and all changes of mappings race, for half a minute in all; longer on request:
/// `PEERSPACE_STRESS_SECONDS=3600`, and `PEERSPACE_STRESS_SEED` to begin in the same way again.
#[test]
fn stress() {
    let seconds = variable("PEERSPACE_STRESS_SECONDS").unwrap_or(24);
    let seed = variable("PEERSPACE_STRESS_SEED");
    // Several short ones begin in more ways than a long one.
    let rounds = if seed.is_some() { 1 } else { (seconds / 20).clamp(4, 200) };
    for round in 0..rounds {
        let time = seconds.div_ceil(rounds).to_string();
        let seed = seed.unwrap_or(1 + round).to_string();
        common::run(
            "stress",
            &[("STRESS_SECONDS", &time), ("STRESS_SEED", &seed)],
            LIMIT + Duration::from_secs(seconds),
        );
    }
}
