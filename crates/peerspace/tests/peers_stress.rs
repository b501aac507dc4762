//! The example that stresses the memory that CPU and devices share, for half a minute in all; longer on request:
//! `PEERSPACE_STRESS_SECONDS=3600`, and `PEERSPACE_STRESS_SEED` to do something again.

// Its `main` is for the command line.
#[allow(dead_code)]
#[path = "../examples/peers_stress/main.rs"]
mod example;

use peerspace::Faults;
use std::time::Duration;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is to be a number, not {v:?}")))
}

/// Rules G1, G3, G5, G7, G9, G14, Z3, Z8, Z9.
#[test]
fn every_word_is_right_whoever_uses_it() {
    let seconds = variable("PEERSPACE_STRESS_SECONDS").unwrap_or(36);
    let seed = variable("PEERSPACE_STRESS_SEED");
    // Several short ones begin in more ways than a long one.
    let rounds = if seed.is_some() || seconds < 30 { 1 } else { (seconds / 60).clamp(2, 60) };
    for round in 0..rounds {
        for faults in [Faults::Threads, Faults::Signal] {
            let time = Duration::from_millis(seconds * 1000 / rounds / 2);
            example::stress(faults, time, seed.unwrap_or(1000 + round)).unwrap();
        }
    }
}
