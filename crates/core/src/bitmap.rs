//! A bitmap that finds its first set bit in O(log n): each level has a bit for every word of the level below.

use crate::sync::Ordering::Relaxed;
use crate::words::Words;

const MAX_LEVELS: usize = 6;
/// The most bits a bitmap can have.
pub const MAX_BITS: u64 = 1 << (6 * MAX_LEVELS);

/// A bitmap over words that belong to somebody else, from a given offset. Not synchronised: the owner locks.
#[derive(Debug, Clone)]
pub struct Bitmap {
    /// Offset of each level's first word, the bits themselves first.
    levels: [usize; MAX_LEVELS],
    depth: usize,
    bits: u64,
}

impl Bitmap {
    /// Words that a bitmap of `bits` bits takes up.
    pub fn words_for(bits: u64) -> usize {
        let mut words = bits.div_ceil(64).max(1);
        let mut sum = words;
        while words > 1 {
            words = words.div_ceil(64);
            sum += words;
        }
        sum as usize
    }

    /// A bitmap of `bits` bits whose words, all zero, begin at `offset`; and the offset behind them.
    ///
    /// # Panics
    /// For more than [`MAX_BITS`].
    pub fn at(offset: usize, bits: u64) -> (Bitmap, usize) {
        let mut levels = [0; MAX_LEVELS];
        let mut depth = 0;
        let mut next = offset;
        let mut words = bits.div_ceil(64).max(1);
        loop {
            assert!(depth < MAX_LEVELS, "a bitmap of {bits} bits is too large");
            levels[depth] = next;
            depth += 1;
            next += words as usize;
            if words == 1 {
                break;
            }
            words = words.div_ceil(64);
        }
        (Bitmap { levels, depth, bits }, next)
    }

    /// Number of bits.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Whether bit `i` is set; false beyond the end.
    pub fn get(&self, w: &impl Words, i: u64) -> bool {
        i < self.bits && w.at(self.levels[0] + (i / 64) as usize).load(Relaxed) >> (i % 64) & 1 != 0
    }

    /// Sets bit `i`.
    pub fn set(&self, w: &impl Words, i: u64) {
        debug_assert!(i < self.bits);
        let mut i = i;
        for level in &self.levels[..self.depth] {
            let word = w.at(level + (i / 64) as usize);
            let before = word.load(Relaxed);
            word.store(before | 1 << (i % 64), Relaxed);
            if before != 0 {
                return; // the levels above know of this word
            }
            i /= 64;
        }
    }

    /// Clears bit `i`.
    pub fn clear(&self, w: &impl Words, i: u64) {
        debug_assert!(i < self.bits);
        let mut i = i;
        for level in &self.levels[..self.depth] {
            let word = w.at(level + (i / 64) as usize);
            let after = word.load(Relaxed) & !(1 << (i % 64));
            word.store(after, Relaxed);
            if after != 0 {
                return;
            }
            i /= 64;
        }
    }

    /// The lowest set bit.
    pub fn first(&self, w: &impl Words) -> Option<u64> {
        let mut at = 0u64;
        for level in self.levels[..self.depth].iter().rev() {
            let word = w.at(level + at as usize).load(Relaxed);
            if word == 0 {
                return None; // only the topmost level can be empty
            }
            at = at * 64 + word.trailing_zeros() as u64;
        }
        Some(at)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_an_ordered_set(
            bits in 1u64..70_000,
            ops in proptest::collection::vec((any::<bool>(), any::<u64>()), 1..300),
        ) {
            let offset = 3;
            let words = zeroed(offset + Bitmap::words_for(bits));
            let (map, end) = Bitmap::at(offset, bits);
            prop_assert_eq!(end, words.len());
            let mut model = BTreeSet::new();
            for (set, i) in ops {
                let i = i % bits;
                if set { map.set(&words, i); model.insert(i); } else { map.clear(&words, i); model.remove(&i); }
                prop_assert_eq!(map.first(&words), model.first().copied());
                prop_assert_eq!(map.get(&words, i), set);
            }
            for i in &model { map.clear(&words, *i); }
            prop_assert!(words.iter().all(|w| w.load(Relaxed) == 0));
        }
    }
}
