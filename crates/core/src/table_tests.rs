//! Tests of the logical table: walking, splitting, joining, and many threads against an oracle.

use super::*;
use crate::addr::{DevicePfn, Pages, Pfn};
use crate::entry::Dirt;
use crate::sync::Spin;
use crate::words::zeroed;
use alloc::boxed::Box;

type T = Table<Box<[AtomicU64]>, Spin>;

fn table(blocks: u64) -> T {
    let t = Table::new(
        Geometry::KIB4,
        TableMemory {
            directory: zeroed(4),
            blocks: zeroed(CHUNK_BLOCKS),
            leaves: zeroed(blocks as usize * 512),
            links: zeroed(blocks as usize),
        },
        Spin,
    );
    t.cover(PageRange::new(Vpn(0), Pages(blocks * 512)), blocks as usize).unwrap();
    t
}

fn host(pfn: u64) -> State {
    State::Host { pfn: Pfn(pfn), writable: true, dirt: Dirt::Dirty }
}

#[test]
fn what_is_not_covered_is_refused() {
    let t = table(2);
    assert!(t.look(Vpn(0)).is_some());
    let outside = Vpn((CHUNK_BLOCKS as u64) << 9);
    assert_eq!(t.look(outside), None);
    assert_eq!(t.lock(outside).unwrap_err(), Uncovered(outside));
    // Beyond the directory, and beyond the memory there is.
    assert!(t.cover(PageRange::new(Vpn(u64::MAX >> 20), Pages(512)), 1).is_err());
    assert!(t.cover(PageRange::new(outside, Pages(512)), 1).is_err());
}

#[test]
fn a_whole_block_is_one_word() {
    let t = table(2);
    let l = t.lock(Vpn(700)).unwrap();
    assert!(l.is_whole());
    assert_eq!(l.range(), PageRange { start: Vpn(512), end: Vpn(1024) });
    l.commit(host(1024));
    assert_eq!(t.look(Vpn(700)), Some((Entry::new(host(1024)), true)));
    assert_eq!(t.look(Vpn(0)), Some((Entry::EMPTY, true)));
    assert_eq!(t.leaves_made(), 0);
}

#[test]
fn a_split_block_goes_on_as_it_was() {
    let t = table(1);
    t.lock(Vpn(5)).unwrap().commit(host(1024));
    t.lock(Vpn(5)).unwrap().split_evenly();
    for i in 0..512 {
        assert_eq!(t.look(Vpn(i)), Some((Entry::new(host(1024 + i)), false)));
    }
    let l = t.lock(Vpn(5)).unwrap();
    assert!(!l.is_whole());
    let lost = DevicePfn::decode(Pfn(9)).map_or(State::Empty, |pfn| State::Poisoned { pfn });
    l.commit(lost);
    assert_eq!(t.look(Vpn(5)).unwrap().0.state(), lost);
    assert_eq!(t.look(Vpn(6)).unwrap().0.state(), host(1030));
}

#[test]
fn joining_needs_every_page() {
    let t = table(2);
    t.lock(Vpn(0)).unwrap().split(|_| Entry::EMPTY);
    let held = t.lock(Vpn(77)).unwrap();
    assert!(t.join(0, |_| Some(Entry::EMPTY)).unwrap().is_none());
    drop(held);
    assert!(t.join(0, |_| None).unwrap().is_none());
    let joined = t.join(0, |page| (0..512).all(|i| page(i).is_empty()).then_some(Entry::EMPTY)).unwrap().unwrap();
    assert!(joined.is_whole());
    joined.commit(host(512));
    assert_eq!(t.look(Vpn(77)), Some((Entry::new(host(512)), true)));
    assert!(t.join(1, |_| unreachable!("block 1 is whole")).unwrap().is_none());
    // The leaf is used again.
    t.lock(Vpn(600)).unwrap().split_evenly();
    assert_eq!(t.leaves_made(), 1);
}

#[test]
fn a_dropped_lock_changes_nothing() {
    let t = table(1);
    drop(t.lock(Vpn(1)).unwrap());
    assert_eq!(t.look(Vpn(1)), Some((Entry::EMPTY, true)));
    let l = t.lock(Vpn(1)).unwrap();
    assert!(t.try_lock(Vpn(9)).unwrap().is_none());
    assert!(t.is_locked(Vpn(9)));
    drop(l);
    assert!(t.try_lock(Vpn(9)).unwrap().is_some());
}

#[cfg(not(any(loom, shuttle)))]
mod threads {
    use super::*;
    use crate::sync::AtomicU64;

    /// Threads lock random pages and move a per-page counter (in the pfn) on by one, while others split and join
    /// the blocks. Not one step may be lost.
    #[test]
    fn no_step_is_lost_while_blocks_split_and_join() {
        const STEPS: u64 = 20_000;
        let t = table(2);
        let made = AtomicU64::new(0);
        std::thread::scope(|s| {
            for seed in 1..4u64 {
                let (t, made) = (&t, &made);
                s.spawn(move || {
                    let mut x = seed;
                    for _ in 0..STEPS {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let vpn = Vpn((x >> 33) % 8 * 128);
                        let l = t.lock(vpn).unwrap();
                        if l.is_whole() {
                            l.split_evenly();
                            continue;
                        }
                        let n = match l.state() {
                            State::Empty => 0,
                            State::Host { pfn, .. } => pfn.0,
                            other => panic!("{other:?}"),
                        };
                        l.commit(host(n + 1));
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            s.spawn(|| {
                for i in 0..STEPS {
                    // Take the counters down, join the block, and put them back by splitting it at once.
                    let mut kept = std::vec::Vec::new();
                    let joined = t
                        .join(i % 2, |page| {
                            kept.extend((0..512).map(page));
                            Some(Entry::EMPTY)
                        })
                        .unwrap();
                    if let Some(l) = joined {
                        l.split(|i| kept[i as usize]);
                    }
                }
            });
        });
        let total: u64 = (0..1024)
            .map(|i| match t.look(Vpn(i)).unwrap().0.state() {
                State::Host { pfn, .. } => pfn.0,
                _ => 0,
            })
            .sum();
        assert_eq!(total, made.load(Ordering::Relaxed));
    }
}
