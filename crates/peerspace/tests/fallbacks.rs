//! A space on older kernels: the same promises without the features that they lack.
//!
//! Features are left out by their numbers in `<linux/userfaultfd.h>`. Each case is a process of its own, so that one
//! that hangs is named.

mod common;

use common::*;
use peerspace::device::DeviceError;
use peerspace::{Error, Faults, Space};
use peerspace_os::linux::uffd::feature::{EXACT_ADDRESS, MOVE, PAGEFAULT_FLAG_WP, POISON, WP_ASYNC};
use std::sync::Arc;

const HOST: usize = 4 * MIB;
const SIZE: usize = 9 * MIB;

/// Kernels, by what they lack: before 6.8, before 6.7 and 6.6, and what a kernel may be built without.
const LACKING: [(&str, u64); 5] = [
    ("move", MOVE),
    ("move-poison", MOVE | POISON | WP_ASYNC),
    ("poison", POISON),
    ("exact-address", EXACT_ADDRESS),
    ("protection", PAGEFAULT_FLAG_WP),
];

fn space(without: u64, faults: Faults, orders: &Arc<Orders>) -> Result<Space, Error> {
    catch_lost_accesses();
    let device = Obedient::new(orders, 64 * MIB);
    Space::builder().host(HOST as u64).device(device).faults(faults).without_features(without).build()
}

/// Streams, random accesses of two threads, discarding, a fork: against a model.
fn program(space: &Space) {
    let mut region = space.region(SIZE as u64).unwrap();
    assert!(region.bytes()[..MIB].iter().all(|b| *b == 0));
    fill(region.typed_mut());
    for _ in 0..2 {
        let words = region.typed::<u64>();
        assert!((0..SIZE / page()).all(|i| words[i * words_per_page() + i % 512] == word(i)));
    }
    let (left, right) = region.typed_mut::<u64>().split_at_mut(SIZE / 16);
    std::thread::scope(|s| {
        for (seed, half, first) in [(1u64, left, 0), (2, right, SIZE / 2 / page())] {
            s.spawn(move || {
                let n = half.len() / words_per_page();
                let mut model: Vec<u64> = (first..first + n).map(word).collect();
                let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                for step in 0..8000 {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let i = (x >> 20) as usize % n;
                    let at = &mut half[i * words_per_page() + i % 512];
                    assert_eq!(*at, model[i], "page {i} at step {step}");
                    if x.is_multiple_of(3) {
                        *at = x;
                        model[i] = x;
                    }
                }
            });
        }
    });
    region.discard(MIB..3 * MIB).unwrap();
    assert!(region.bytes()[MIB..3 * MIB].iter().all(|b| *b == 0));
    fill(region.typed_mut());
    push_out(space, 2 * HOST);
    // SAFETY: the child uses what is managed and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let words = region.typed_mut::<u64>();
        let good = (0..SIZE / page()).all(|i| std::mem::take(&mut words[i * words_per_page()]) == word(i));
        // SAFETY: ends the process.
        unsafe { libc::_exit(!good as i32) };
    }
    let words = region.typed::<u64>();
    assert!((0..SIZE / page()).all(|i| words[i * words_per_page() + 7] == word(i)));
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child has lost something");
    assert!((0..SIZE / page()).all(|i| words[i * words_per_page()] == word(i)));
    space.check();
    let s = space.statistics();
    assert!(s.pages_out > 2000 && s.forced_bytes == 0 && s.peak_bytes <= s.limit_bytes && s.poisoned == 0, "{s:?}");
}

/// Lost pages are lost, alone, and for every kind of access.
///
/// `stays_lost`: such a page cannot be made good by discarding it.
fn losses(space: &Space, orders: &Orders, stays_lost: bool) {
    let mut region = space.region(SIZE as u64).unwrap();
    fill(region.typed_mut());
    push_out(space, 2 * HOST);
    let bad = |i: usize| i % 97 == 5;
    let words: Vec<u64> = (0..SIZE / page()).filter(|i| bad(*i)).map(word).collect();
    let all = words.len();
    orders.on_load(move |a| if words.contains(&a.word) { Answer::Fails(DeviceError::Io(5)) } else { Answer::Good });
    let at = region.as_ptr();
    let mut lost = Vec::new();
    for i in 0..SIZE / page() {
        let byte = read_byte(at.wrapping_add(i * page()));
        let result = region.try_read(i * page(), &mut [0; 8]);
        match &result {
            Ok(()) => assert!(byte == Some(word(i) as u8) || !CAN_TRY, "page {i}"),
            Err(Error::Lost { .. }) => {
                assert!(bad(i) && byte.is_none(), "page {i}");
                lost.push(i);
            }
            Err(e) => panic!("page {i}: {e}"),
        }
    }
    // Some were still in RAM.
    assert!(lost.len() > all / 2, "{lost:?}");
    assert_eq!(space.statistics().poisoned, lost.len() as u64);
    let i = lost[all / 3];
    let discarded = region.discard(i * page()..(i + 1) * page());
    if stays_lost {
        // Something else is mapped in its place.
        assert!(matches!(discarded, Err(Error::Lost { .. })) && read_byte(at.wrapping_add(i * page())).is_none());
    } else {
        discarded.unwrap();
        assert!(region.bytes()[i * page()..][..page()].iter().all(|b| *b == 0));
    }
    space.check();
}

#[test]
#[ignore = "run by others, in a process of its own"]
fn case() {
    let name = std::env::var("CASE").unwrap();
    let (lacking, rest) = name.split_once('/').unwrap();
    let without = LACKING.iter().find(|(name, _)| *name == lacking).unwrap().1;
    let faults = if rest == "signal" { Faults::Signal } else { Faults::Threads };
    let orders = Orders::new();
    let first = space(without, faults, &orders).unwrap();
    program(&first);
    drop(first);
    orders.check();
    let orders = Orders::new();
    losses(&space(without, faults, &orders).unwrap(), &orders, without & POISON != 0 && faults == Faults::Threads);
    orders.check();
}

fn without(lacking: &str) {
    for faults in ["signal", "threads"] {
        let case = format!("{lacking}/{faults}");
        let output = in_process("case", &[("CASE", &case)]);
        assert!(output.status.success(), "{case}: {}: {}", output.status, said(&output));
    }
}

#[test]
fn without_moving_pages() {
    without("move");
}

#[test]
fn without_moving_and_poisoning() {
    without("move-poison");
}

#[test]
fn without_poisoning() {
    without("poison");
}

#[test]
fn without_exact_addresses() {
    without("exact-address");
}

#[test]
fn without_write_protection() {
    without("protection");
}

#[test]
fn without_a_way_to_take_pages_out_a_space_is_refused() {
    for faults in [Faults::Signal, Faults::Threads] {
        let e = space(MOVE | PAGEFAULT_FLAG_WP, faults, &Orders::new()).map(drop).unwrap_err().to_string();
        assert!(e.contains("5.7"), "{e}");
    }
}
