//! The record of a chunk: its state, its neighbours in a list, and which of its slots are in use.
//!
//! Twenty words beside the store, so that looking for a slot touches nothing of the chunk itself:
//!
//! | word | |
//! |---|---|
//! | 0 | the [`State`] |
//! | 1 | the chunks before and after it in its list, plus one |
//! | 2 | its link in the pool of free chunks |
//! | 3 | not used |
//! | 4.. | a bit for each slot in use; for a chunk of 16 whole pages, the page in each slot, plus one |
//!
//! Everything but the pool's link is changed with the lock of the chunk's shard only, or by whoever has just taken
//! the chunk from the pool; so all accesses are Relaxed.

use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};

/// Words that say which slots are in use: 1024 bits, or 16 pages.
pub(super) const BITS_WORDS: usize = 16;
const STATE: usize = 0;
const LINKS: usize = 1;
const POOL: usize = 2;
const BITS: usize = 4;
/// Words of a record.
pub(super) const RECORD_WORDS: usize = BITS + BITS_WORDS;
/// Bytes of a record.
pub(super) const RECORD_BYTES: u64 = RECORD_WORDS as u64 * 8;

/// Lists that the chunks of a class are kept in, by how full they are.
pub(super) const GROUPS: usize = 8;
/// In place of a group: in no list.
pub(super) const UNLINKED: u64 = 15;

/// What a chunk is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing; it is in the pool, or on its way there.
    Free,
    /// Slots are taken and given back.
    Listed,
    /// Slots are given back only; the compactor has it in hand.
    Isolated,
}

/// Phase (2 bits), class (from bit 8), shard (16), live objects (32), group (48).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State(u64);

impl State {
    const fn field(self, shift: u32, bits: u32) -> u64 {
        self.0 >> shift & ((1 << bits) - 1)
    }

    const fn with(self, shift: u32, bits: u32, value: u64) -> State {
        debug_assert!(value < 1 << bits);
        State(self.0 & !(((1 << bits) - 1) << shift) | value << shift)
    }

    /// The state of a chunk without objects, in no list.
    pub(super) fn new(phase: Phase, class: usize, shard: usize) -> State {
        State(0).with(8, 8, class as u64).with(16, 16, shard as u64).with_group(UNLINKED).with_phase(phase)
    }

    pub(super) fn phase(self) -> Phase {
        match self.field(0, 2) {
            1 => Phase::Listed,
            2 => Phase::Isolated,
            _ => Phase::Free,
        }
    }

    #[must_use]
    pub(super) fn with_phase(self, phase: Phase) -> State {
        let value = match phase {
            Phase::Free => 0,
            Phase::Listed => 1,
            Phase::Isolated => 2,
        };
        self.with(0, 2, value)
    }

    pub(super) fn class(self) -> usize {
        self.field(8, 8) as usize
    }

    pub(super) fn shard(self) -> usize {
        self.field(16, 16) as usize
    }

    /// Slots in use.
    pub(super) fn live(self) -> u32 {
        self.field(32, 16) as u32
    }

    #[must_use]
    pub(super) fn with_live(self, live: u32) -> State {
        self.with(32, 16, live as u64)
    }

    pub(super) fn group(self) -> u64 {
        self.field(48, 4)
    }

    #[must_use]
    pub(super) fn with_group(self, group: u64) -> State {
        self.with(48, 4, group)
    }
}

/// The record of one chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a>(&'a [AtomicU64; RECORD_WORDS]);

impl<'a> Record<'a> {
    /// The record of which `words` are the first.
    pub(super) fn new(words: &'a [AtomicU64]) -> Record<'a> {
        Record(words.first_chunk().expect("a record is in bounds"))
    }

    pub(super) fn state(self) -> State {
        State(self.0[STATE].load(Relaxed))
    }

    pub(super) fn set_state(self, state: State) {
        self.0[STATE].store(state.0, Relaxed);
    }

    /// The chunks before and after, plus one.
    pub(super) fn links(self) -> (u32, u32) {
        let links = self.0[LINKS].load(Relaxed);
        ((links >> 32) as u32, links as u32)
    }

    pub(super) fn set_links(self, before: u32, after: u32) {
        self.0[LINKS].store((before as u64) << 32 | after as u64, Relaxed);
    }

    pub(super) fn set_before(self, before: u32) {
        self.set_links(before, self.links().1);
    }

    pub(super) fn set_after(self, after: u32) {
        self.set_links(self.links().0, after);
    }

    /// The link in the pool.
    pub(super) fn pool(self) -> &'a AtomicU64 {
        &self.0[POOL]
    }

    /// The words that say which slots are in use.
    pub(super) fn slots(self) -> &'a [AtomicU64] {
        &self.0[BITS..]
    }

    /// No slot is in use.
    pub(super) fn clear(self) {
        self.slots().iter().for_each(|w| w.store(0, Relaxed));
    }

    /// Takes the first of `n` slots that is not in use. `owner`, which is not 0, is noted if slots are `whole` pages.
    pub(super) fn take_slot(self, whole: bool, n: u32, owner: u64) -> Option<u32> {
        if whole {
            let slot = self.slots().iter().position(|page| page.load(Relaxed) == 0)?;
            self.slots()[slot].store(owner, Relaxed);
            return Some(slot as u32);
        }
        let (i, word) = self.slots().iter().enumerate().find(|(_, word)| word.load(Relaxed) != u64::MAX)?;
        let bit = word.load(Relaxed).trailing_ones();
        let slot = i as u32 * 64 + bit;
        (slot < n).then(|| {
            word.store(word.load(Relaxed) | 1 << bit, Relaxed);
            slot
        })
    }

    /// Whether a slot is in use.
    pub(super) fn is_taken(self, whole: bool, slot: u32) -> bool {
        if whole {
            return self.slots()[slot as usize].load(Relaxed) != 0;
        }
        self.slots()[slot as usize / 64].load(Relaxed) >> (slot % 64) & 1 != 0
    }

    /// Gives a slot back. False if it was not in use.
    #[must_use]
    pub(super) fn give_slot(self, whole: bool, slot: u32) -> bool {
        if !self.is_taken(whole, slot) {
            return false;
        }
        if whole {
            self.slots()[slot as usize].store(0, Relaxed);
        } else {
            let word = &self.slots()[slot as usize / 64];
            word.store(word.load(Relaxed) & !(1 << (slot % 64)), Relaxed);
        }
        true
    }

    /// The first slot from `from` on, of `n`, that is in use.
    pub(super) fn next_taken(self, whole: bool, n: u32, from: u32) -> Option<u32> {
        if whole {
            return (from..n).find(|slot| self.is_taken(true, *slot));
        }
        let mut at = from;
        while at < n {
            let rest = self.slots()[at as usize / 64].load(Relaxed) >> (at % 64);
            if rest != 0 {
                let slot = at + rest.trailing_zeros();
                return (slot < n).then_some(slot);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerspace_core::words::zeroed;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_state_keeps_its_fields_apart() {
        let state = State::new(Phase::Listed, 57, 300).with_live(1024).with_group(3);
        assert_eq!((state.phase(), state.class(), state.shard()), (Phase::Listed, 57, 300));
        assert_eq!((state.live(), state.group()), (1024, 3));
        let state = state.with_phase(Phase::Isolated).with_live(0).with_group(UNLINKED);
        assert_eq!((state.phase(), state.class(), state.shard()), (Phase::Isolated, 57, 300));
        assert_eq!((state.live(), state.group()), (0, UNLINKED));
    }

    proptest! {
        #[test]
        fn slots_are_a_set(
            n in prop_oneof![Just(16u32), Just(17), Just(64), Just(100), Just(1024)],
            ops in proptest::collection::vec((0u32..1024, any::<bool>()), 1..400),
        ) {
            let words = zeroed(RECORD_WORDS);
            let record = Record::new(&words);
            let whole = n == 16;
            let mut model = BTreeSet::new();
            for (slot, give) in ops {
                let slot = slot % n;
                if give {
                    prop_assert_eq!(record.give_slot(whole, slot), model.remove(&slot));
                } else {
                    let free = (0..n).find(|slot| !model.contains(slot));
                    prop_assert_eq!(record.take_slot(whole, n, 7), free);
                    model.extend(free);
                }
                prop_assert_eq!(record.next_taken(whole, n, slot), model.range(slot..).next().copied());
            }
        }
    }
}
