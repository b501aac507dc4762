//! Sees sequential streams in the faults, without a lock and in O(1).
//!
//! Every fault leaves a note of the page it expects next. A fault that finds a note with its own page on it
//! belongs to a stream and inherits the note's level; the longer a stream, the more is fetched at once. Notes
//! live in a small hashed table; streams that have proved themselves have one of their own, so that random
//! faults cannot wipe them out. Losing a note costs speed, nothing else: all accesses are Relaxed.

use crate::addr::Vpn;
use crate::sync::{AtomicU64, Ordering::Relaxed};

const NOTES: usize = 64;
const LEVEL_BITS: u32 = 8;
/// A stream at this level has proved itself.
const PROVED: u8 = 2;

/// How far a stream has come: 0 for an access that follows nothing.
pub type Level = u8;

/// Which way a stream runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Towards higher addresses.
    Up,
    /// Towards lower addresses.
    Down,
}

/// The notes.
#[derive(Debug)]
pub struct Streams {
    young: [AtomicU64; NOTES],
    proved: [AtomicU64; NOTES],
}

impl Streams {
    /// No streams.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Streams {
        Streams {
            young: core::array::from_fn(|_| AtomicU64::new(0)),
            proved: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    fn key(vpn: Vpn, direction: Direction) -> u64 {
        (vpn.0 << 1 | (direction == Direction::Down) as u64) << LEVEL_BITS
    }

    fn slot(key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as usize
    }

    /// The stream that expects a fault at `vpn`; it is then expected no longer.
    pub fn arrive(&self, vpn: Vpn) -> (Level, Direction) {
        for direction in [Direction::Up, Direction::Down] {
            let key = Self::key(vpn, direction);
            for notes in [&self.proved, &self.young] {
                let note = &notes[Self::slot(key)];
                let seen = note.load(Relaxed);
                if seen >> LEVEL_BITS == key >> LEVEL_BITS && seen != 0 {
                    note.store(0, Relaxed);
                    return (seen as u8, direction);
                }
            }
        }
        (0, Direction::Up)
    }

    /// Expects the next fault of a stream at `vpn`.
    pub fn expect(&self, vpn: Vpn, direction: Direction, level: Level) {
        let key = Self::key(vpn, direction);
        let notes = if level >= PROVED { &self.proved } else { &self.young };
        notes[Self::slot(key)].store(key | level as u64, Relaxed);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_stream_climbs_and_random_access_does_not() {
        let s = Streams::new();
        let mut at = Vpn(1000);
        for want in 0..6 {
            let (level, direction) = s.arrive(at);
            assert_eq!((level, direction), (want, Direction::Up));
            at = at + 4;
            s.expect(at, Direction::Up, level + 1);
        }
        let mut x = 88172645463325252u64;
        let mut hits = 0;
        for _ in 0..10_000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let (level, _) = s.arrive(Vpn(x >> 24));
            hits += (level > 0) as u32;
            s.expect(Vpn(x >> 24) + 1, Direction::Up, level + 1);
        }
        assert!(hits < 10);
        // The proved stream survived ten thousand random faults.
        assert_eq!(s.arrive(at).0, 6);
        // And a note is good for one fault.
        assert_eq!(s.arrive(at).0, 0);
    }

    #[test]
    fn a_stream_may_run_downwards() {
        let s = Streams::new();
        s.expect(Vpn(99), Direction::Down, 3);
        assert_eq!(s.arrive(Vpn(99)), (3, Direction::Down));
    }
}
