//! Programs use memory larger than their budget, through ordinary references, in both deliveries of faults.

use peerspace::device::soft::Soft;
use peerspace::{Faults, Space};

const MIB: usize = 1 << 20;

fn space(faults: Faults, host: usize, device: usize) -> Space {
    Space::builder()
        .host(host as u64)
        .device(Soft::new(device as u64).unwrap())
        .faults(faults)
        .build()
        .expect("a space")
}

fn fill(words: &mut [u64]) {
    for (i, w) in words.iter_mut().enumerate() {
        *w = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

fn verify(words: &[u64]) {
    for (i, w) in words.iter().enumerate() {
        assert_eq!(*w, (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15), "word {i}");
    }
}

fn sequential(faults: Faults) {
    let space = space(faults, 16 * MIB, 256 * MIB);
    let mut region = space.region(64 * MIB as u64).unwrap();
    assert!(region.bytes()[..3 * MIB].iter().all(|b| *b == 0));
    fill(region.typed_mut());
    for _ in 0..2 {
        verify(region.typed());
    }
    space.check();
    let s = space.statistics();
    eprintln!("{s:#?}");
    assert!(s.peak_bytes <= s.limit_bytes);
    assert_eq!((s.poisoned, s.forced_bytes), (0, 0));
}

#[test]
fn sequential_by_signal() {
    sequential(Faults::Signal);
}

#[test]
fn sequential_by_threads() {
    sequential(Faults::Threads);
}

fn random(faults: Faults) {
    let space = space(faults, 8 * MIB, 256 * MIB);
    let mut region = space.region(40 * MIB as u64).unwrap();
    let words: &mut [u64] = region.typed_mut();
    let mut model = vec![0u64; words.len() / 512];
    let mut x = 88172645463325252u64;
    for i in 0..60_000u64 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let page = (x >> 20) as usize % model.len();
        let at = page * 512 + page % 512;
        assert_eq!(words[at], model[page], "page {page} at step {i}");
        if x.is_multiple_of(3) {
            words[at] = x;
            model[page] = x;
        }
    }
    space.check();
    let s = space.statistics();
    eprintln!("{s:#?}");
    assert!(s.peak_bytes <= s.limit_bytes);
}

#[test]
fn random_by_signal() {
    random(Faults::Signal);
}

#[test]
fn random_by_threads() {
    random(Faults::Threads);
}

/// Pages that are read and then written each time they are home are soon mapped writable at once; pages that are only
/// read are still never written back.
fn rewritten(faults: Faults) {
    const PAGES: usize = 4096;
    let space = space(faults, 8 * MIB, 256 * MIB);
    let mut region = space.region((PAGES * 4096) as u64).unwrap();
    let words: &mut [u64] = region.typed_mut();
    // An order that looks like no stream.
    let order = || (0..PAGES).map(|i| i * 1663 % PAGES * 512);
    order().for_each(|at| words[at] = at as u64 + 1);
    let mut upgrades = vec![];
    let mut before = 0;
    for round in 1..=4u64 {
        for at in order() {
            assert_eq!(words[at], at as u64 + round);
            words[at] += 1;
        }
        let now = space.statistics().faults.upgrades;
        upgrades.push(now - before);
        before = now;
    }
    // The first time it could not be known.
    assert!(upgrades[0] > PAGES as u64 / 2, "{upgrades:?}");
    assert!(upgrades[2] < PAGES as u64 / 4 && upgrades[3] < PAGES as u64 / 4, "{upgrades:?}");
    // From here on nothing is written, which is found out.
    let mut stored = vec![];
    for _ in 0..4 {
        order().for_each(|at| assert_eq!(words[at], at as u64 + 5));
        stored.push(space.statistics().pages_out);
    }
    assert_eq!(stored[2], stored[3], "{stored:?}");
    space.check();
}

#[test]
fn rewritten_pages_by_signal() {
    rewritten(Faults::Signal);
}

#[test]
fn rewritten_pages_by_threads() {
    rewritten(Faults::Threads);
}
