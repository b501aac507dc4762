//! Pages of many kinds, for tests: what memory is like, as far as a store can tell.

// Each user uses some of it.
#![allow(dead_code)]

use proptest::prelude::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Zeros,
    Same,
    /// Words that count up, then zeros.
    Numbers,
    /// Noise in one half, zeros in the other: 2 to 1.
    HalfNoise,
    Text,
    /// Text in one half, noise in the other.
    Mixed,
    Pointers,
    /// Zeros with a few short texts.
    Sparse,
    Noise,
}

pub(crate) const KINDS: [Kind; 9] = [
    Kind::Zeros,
    Kind::Same,
    Kind::Numbers,
    Kind::HalfNoise,
    Kind::Text,
    Kind::Mixed,
    Kind::Pointers,
    Kind::Sparse,
    Kind::Noise,
];

pub(crate) fn kinds() -> impl Strategy<Value = Kind> {
    (0..KINDS.len()).prop_map(|i| KINDS[i])
}

/// Random numbers.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }
}

const WORDS: [&[u8]; 32] = [
    b"the ",
    b"of ",
    b"memory ",
    b"page ",
    b"device ",
    b"and ",
    b"kernel ",
    b"fault ",
    b"address ",
    b"space ",
    b"is ",
    b"to ",
    b"in ",
    b"virtual ",
    b"with ",
    b"that ",
    b"mapped, ",
    b"when ",
    b"process ",
    b"data ",
    b"are ",
    b"stored. ",
    b"Every ",
    b"frame ",
    b"must ",
    b"never ",
    b"between ",
    b"two ",
    b"while ",
    b"another ",
    b"region, ",
    b"until ",
];

fn text(bytes: usize, dice: &mut Dice) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes + 8);
    while text.len() < bytes {
        text.extend_from_slice(WORDS[dice.below(WORDS.len() as u64) as usize]);
    }
    text.truncate(bytes);
    text
}

pub(crate) fn same(bytes: usize, word: u64) -> Vec<u8> {
    (0..bytes / 8).flat_map(|_| word.to_ne_bytes()).collect()
}

/// The page of this kind that `seed` stands for.
pub(crate) fn page(bytes: usize, kind: Kind, seed: u64) -> Vec<u8> {
    let mut dice = Dice(seed);
    let n = bytes / 8;
    let mut words = |f: &mut dyn FnMut(usize, &mut Dice) -> u64| -> Vec<u8> {
        (0..n).flat_map(|i| f(i, &mut dice).to_le_bytes()).collect()
    };
    match kind {
        Kind::Zeros => vec![0; bytes],
        Kind::Same => same(bytes, dice.roll()),
        Kind::Numbers => words(&mut |i, _| if i < n / 2 { seed % (1 << 30) * 7 + i as u64 } else { 0 }),
        Kind::HalfNoise => words(&mut |i, dice| if i < n / 2 { dice.roll() } else { 0 }),
        Kind::Pointers => words(&mut |_, dice| 0x7f3a_0000_0000 + (dice.roll() & 0x0fff_fff8)),
        Kind::Noise => words(&mut |_, dice| dice.roll()),
        Kind::Text => text(bytes, &mut dice),
        Kind::Mixed => {
            let mut page = text(bytes / 2, &mut dice);
            page.extend((0..n / 2).flat_map(|_| dice.roll().to_le_bytes()));
            page
        }
        Kind::Sparse => {
            let mut page = vec![0; bytes];
            for _ in 0..5 {
                let (at, len) = (dice.below(n as u64 - 8) as usize * 8, 20 + dice.below(40) as usize);
                page[at..at + len].copy_from_slice(&text(len, &mut dice));
            }
            page
        }
    }
}
