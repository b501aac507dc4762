//! A set of numbers that forgets none, and may claim to have some that it has not.

use crate::sync::{AtomicU64, Ordering::Relaxed};
use core::fmt;

/// 2^16 bits, which make 8 KiB.
const BITS: u32 = if cfg!(any(loom, shuttle)) { 6 } else { 16 };
const WORDS: usize = 1 << (BITS - 6);

/// The set. What is said of a number is what somebody may have known a moment ago: all accesses are Relaxed.
pub struct Sketch([AtomicU64; WORDS]);

impl Sketch {
    /// An empty set.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Sketch {
        Sketch(core::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Neighbours in different words of memory would take up a cache line each.
    fn place(&self, n: u64) -> (&AtomicU64, u64) {
        let at = (n >> 6).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS) & !63 | n & 63;
        (&self.0[at as usize / 64], 1 << (at & 63))
    }

    /// Takes `n` in.
    pub fn insert(&self, n: u64) {
        let (word, bit) = self.place(n);
        // Most often it is there, and then nothing that all processors share is written.
        if word.load(Relaxed) & bit == 0 {
            word.fetch_or(bit, Relaxed);
        }
    }

    /// False when `n` was never taken in.
    pub fn may_have(&self, n: u64) -> bool {
        let (word, bit) = self.place(n);
        word.load(Relaxed) & bit != 0
    }
}

impl fmt::Debug for Sketch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ones: u32 = self.0.iter().map(|word| word.load(Relaxed).count_ones()).sum();
        write!(f, "Sketch({ones} bits)")
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn it_forgets_nothing_and_claims_little() {
        let sketch = Sketch::new();
        // Blocks of regions that lie far apart.
        let number = |i: u64| (0x7f00_0000_0000 >> 21) + i / 100 * 8192 + i % 100;
        (0..2000).for_each(|i| sketch.insert(number(i)));
        assert!((0..2000).all(|i| sketch.may_have(number(i))));
        let claimed = (2000..12_000).filter(|i| sketch.may_have(number(*i))).count();
        assert!(claimed < 1000, "{claimed} of 10000");
        assert!(!Sketch::new().may_have(0));
    }
}
