//! Tests of the policies: list integrity, order, and what each keeps under a trace.

use super::*;
use crate::addr::Vpn;
use crate::sync::AtomicU64;
use crate::words::zeroed;
use alloc::boxed::Box;
use proptest::prelude::*;
use std::collections::HashMap;
use std::vec::Vec;

type Map = Memmap<Box<[AtomicU64]>>;

fn memmap(blocks: u32, small: u32) -> Map {
    Memmap::new(zeroed(Map::words_for(blocks, small)), blocks, small)
}

#[test]
fn incoming_frames_reach_the_policy_in_order() {
    let m = memmap(1, 8);
    let incoming = Incoming::new();
    let frames: Vec<Frame> = (0..5).map(|_| m.take_small().unwrap()).collect();
    for f in &frames {
        m.reset(*f);
        incoming.push(&m, *f);
        assert_eq!(m.list(*f), ListId::Incoming);
    }
    let mut p = Fifo::new();
    incoming.drain(&m, &mut p);
    let out: Vec<Frame> = std::iter::from_fn(|| p.victim(&m)).collect();
    assert_eq!(out, frames);
    incoming.drain(&m, &mut p);
    assert_eq!(p.victim(&m), None::<Frame>);
}

proptest! {
    /// Whatever is inserted, removed and taken, the lists stay sound and no frame is lost or doubled.
    #[test]
    fn lists_stay_sound(ops in proptest::collection::vec((0u8..4, 0usize..64, 0u8..3), 1..400)) {
        let m = memmap(4, 60);
        let mut p = S3Fifo::new();
        let mut free: Vec<Frame> = std::iter::from_fn(|| m.take_small().or_else(|| m.take_block())).collect();
        let mut held: Vec<Frame> = Vec::new();
        for (op, i, arrival) in ops {
            match op {
                0 | 1 if !free.is_empty() => {
                    let f = free.swap_remove(i % free.len());
                    m.reset(f);
                    m.set_arrival(f, [Arrival::New, Arrival::Refault, Arrival::Reuse][arrival as usize]);
                    m.set_frequency(f, arrival);
                    Policy::insert(&mut p, &m, f);
                    held.push(f);
                }
                2 if !held.is_empty() => {
                    let f = held.swap_remove(i % held.len());
                    Policy::remove(&mut p, &m, f);
                    Policy::remove(&mut p, &m, f); // of no effect
                    free.push(f);
                }
                _ => {
                    let mut victim = Policy::victim(&mut p, &m);
                    prop_assert_eq!(victim.is_some(), !held.is_empty());
                    if let (Some(f), 1) = (victim, arrival) {
                        Policy::put_back(&mut p, &m, f);
                        p.small.check(&m);
                        p.main.check(&m);
                        victim = Policy::victim(&mut p, &m);
                    }
                    if let Some(f) = victim {
                        let at = held.iter().position(|h| *h == f).expect("a victim nobody inserted");
                        held.swap_remove(at);
                        free.push(f);
                    }
                }
            }
            p.small.check(&m);
            p.main.check(&m);
            let pages: u64 = held.iter().map(|f| m.pages(*f).0).sum();
            prop_assert_eq!(Policy::<Box<[AtomicU64]>>::pages(&p), Pages(pages));
        }
    }
}

/// A cache of `frames` frames in front of a trace, with a standby of a sixteenth of them: what the engine does,
/// without data. Returns the number of loads from the device.
fn misses(policy: &mut dyn Policy<Box<[AtomicU64]>>, frames: u32, trace: impl Iterator<Item = u64>) -> u64 {
    let m = memmap(0, frames);
    let standby_size = (frames / 16).max(1) as usize;
    let mut mapped: HashMap<u64, Frame> = HashMap::new();
    let mut standby: std::collections::VecDeque<(u64, Frame)> = Default::default();
    let mut evicted: HashMap<u64, u64> = HashMap::new();
    let (mut loads, mut evictions) = (0, 0);
    for page in trace {
        if mapped.contains_key(&page) {
            continue; // the policy cannot see this access
        }
        if let Some(at) = standby.iter().position(|(p, _)| *p == page) {
            let (_, f) = standby.remove(at).unwrap();
            m.set_arrival(f, Arrival::Reuse);
            m.set_frequency(f, m.frequency(f) + 1);
            policy.insert(&m, f);
            mapped.insert(page, f);
            continue;
        }
        loads += 1;
        let frame = loop {
            if let Some(f) = m.take_small() {
                break f;
            }
            while standby.len() < standby_size {
                let f = policy.victim(&m).unwrap();
                let page = m.vpn(f).0;
                mapped.remove(&page);
                standby.push_back((page, f));
            }
            let (gone, f) = standby.pop_front().unwrap();
            evictions += 1;
            evicted.insert(gone, evictions);
            m.give_back(f);
        };
        m.reset(frame);
        m.place(frame, Vpn(page), 0);
        let soon = evicted.get(&page).is_some_and(|e| evictions - e <= policy.protected().0.max(frames as u64 / 2));
        m.set_arrival(frame, if soon { Arrival::Refault } else { Arrival::New });
        policy.insert(&m, frame);
        mapped.insert(page, frame);
    }
    loads
}

/// A working set that fits, read again and again, while a long scan goes by.
fn scan_beside_working_set() -> impl Iterator<Item = u64> {
    let mut x = 1u64;
    (0..200_000u64).map(move |i| {
        if i % 4 == 0 {
            1_000_000 + i // the scan never comes back
        } else {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % 500
        }
    })
}

#[test]
fn a_scan_does_not_wipe_out_the_working_set() {
    let scan = 50_000;
    let s3 = misses(&mut S3Fifo::new(), 640, scan_beside_working_set());
    let fifo = misses(&mut Fifo::new(), 640, scan_beside_working_set());
    // Each page of the scan is one load that nobody can avoid.
    let (s3, fifo) = (s3 - scan, fifo - scan);
    assert!(s3 * 3 < fifo, "s3-fifo loaded {s3} pages of the working set again, fifo {fifo}");
}

#[test]
fn a_working_set_that_fits_is_loaded_once() {
    let trace = (0..100_000u64).map(|i| (i * 7919) % 500);
    assert_eq!(misses(&mut S3Fifo::new(), 640, trace), 500);
}
