//! The example that stresses a space in every way, for a few seconds in each delivery of faults.

#![cfg(all(feature = "compressed", feature = "soft"))]

// Its `main` is for the command line.
#[allow(dead_code)]
#[path = "../examples/stress.rs"]
mod example;

use peerspace::Faults;
use std::time::Duration;

#[test]
fn every_byte_is_right_with_a_quarter_of_the_memory() {
    for faults in [Faults::Threads, Faults::Signal] {
        example::stress(faults, 64 << 20, Duration::from_secs(2)).unwrap();
    }
}
