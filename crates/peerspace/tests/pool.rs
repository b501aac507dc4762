//! Pools: collections in the memory of a space.

use allocator_api2::alloc::{Allocator, Layout};
use allocator_api2::{boxed::Box, vec::Vec};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Pool, Space};

const MIB: usize = 1 << 20;

fn space(faults: Faults, host: usize) -> Space {
    Space::builder().host(host as u64).device(Soft::new(512 << 20).unwrap()).faults(faults).build().expect("a space")
}

/// What is in RAM and on devices.
fn held(space: &Space) -> u64 {
    let s = space.statistics();
    s.used_bytes + (s.pages_out - s.pages_in.min(s.pages_out)) * 4096
}

fn collections(faults: Faults) {
    let space = space(faults, 8 * MIB);
    let pool = space.pool(256 * MIB as u64).unwrap();
    let mut sequence: Vec<u64, Pool> = Vec::new_in(pool.clone());
    // Grows in steps, and is larger than the budget from some step on.
    sequence.extend((0..3 * MIB as u64).map(|n| n ^ 0x5555));
    let mut map: hashbrown::HashMap<u64, [u64; 8], hashbrown::DefaultHashBuilder, Pool> =
        hashbrown::HashMap::new_in(pool.clone());
    for n in 0..100_000 {
        map.insert(n, [n; 8]);
    }
    let boxes: std::vec::Vec<Box<[u64; 512], Pool>> =
        (0..2000).map(|n| Box::new_in([n; 512], pool.clone())).collect();
    assert!(sequence.iter().enumerate().all(|(i, n)| *n == i as u64 ^ 0x5555));
    assert!((0..100_000).all(|n| map[&n] == [n; 8]));
    for n in (0..100_000).step_by(2) {
        assert_eq!(map.remove(&n), Some([n; 8]));
    }
    assert_eq!(map.len(), 50_000);
    assert!(boxes.iter().enumerate().all(|(i, b)| b.iter().all(|n| *n == i as u64)));
    sequence.truncate(1000);
    sequence.shrink_to_fit();
    assert!(sequence.iter().enumerate().all(|(i, n)| *n == i as u64 ^ 0x5555));
    space.check();
    let s = space.statistics();
    assert!(s.pages_out > 1000 && s.peak_bytes <= s.limit_bytes, "{s:?}");
    assert_eq!((s.poisoned, s.forced_bytes), (0, 0));
}

#[test]
fn collections_outgrow_the_budget_by_signal() {
    collections(Faults::Signal);
}

#[test]
fn collections_outgrow_the_budget_by_threads() {
    collections(Faults::Threads);
}

#[test]
fn threads_share_a_pool() {
    for faults in [Faults::Signal, Faults::Threads] {
        let space = space(faults, 8 * MIB);
        let pool = space.pool(128 * MIB as u64).unwrap();
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let pool = pool.clone();
                s.spawn(move || {
                    let mut dice = t * 7 + 1;
                    let mut mine: std::vec::Vec<Vec<u64, Pool>> = std::vec::Vec::new();
                    for _ in 0..400 {
                        dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let len = (dice >> 33) as usize % 40_000;
                        let mut v = Vec::with_capacity_in(len, pool.clone());
                        v.resize(len, dice);
                        mine.push(v);
                        if mine.len() > 20 {
                            let v = mine.swap_remove((dice >> 20) as usize % 20);
                            assert!(v.iter().all(|x| *x == v[0]));
                        }
                    }
                    mine.iter().for_each(|v| assert!(v.iter().all(|x| *x == v[0])));
                });
            }
        });
        space.check();
    }
}

#[test]
fn what_is_freed_in_large_pieces_stays_neither_in_ram_nor_on_a_device() {
    let space = space(Faults::Signal, 8 * MIB);
    let pool = space.pool(256 * MIB as u64).unwrap();
    let before = held(&space);
    for _ in 0..3 {
        let mut v: Vec<u8, Pool> = Vec::with_capacity_in(64 * MIB, pool.clone());
        v.resize(64 * MIB, 7);
        let away = space.statistics().devices[0].stores;
        assert!(away > 0);
        // Half of it goes by shrinking.
        v.truncate(32 * MIB);
        v.shrink_to_fit();
        assert!(v.iter().all(|b| *b == 7));
        drop(v);
        // Changes are acted on by another thread, in the order in which they came.
        let used = (0..200).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            space.statistics().used_bytes
        });
        let limit = before + 5 * MIB as u64;
        assert!(used.take(200).any(|used| used < limit), "{:?}", space.statistics());
    }
    space.check();
    // All of the device's pages are free again: as much as it has can be stored anew.
    let mut v: Vec<u8, Pool> = Vec::new_in(pool);
    v.resize(128 * MIB, 9);
    assert_eq!(space.statistics().forced_bytes, 0);
}

#[test]
fn corner_cases_of_the_allocator() {
    let space = space(Faults::Signal, 8 * MIB);
    let pool = space.pool(64 * MIB as u64).unwrap();
    // Nothing: aligned, and free of charge.
    let none = Layout::from_size_align(0, 4096).unwrap();
    let p = pool.allocate(none).unwrap();
    assert_eq!((p.len(), p.cast::<u8>().as_ptr() as usize % 4096), (0, 0));
    // SAFETY: allocated above with this layout.
    unsafe { pool.deallocate(p.cast(), none) };
    // Alignments up to a huge page's and beyond.
    for shift in 0..24 {
        let layout = Layout::from_size_align(100, 1 << shift).unwrap();
        let p = pool.allocate(layout).unwrap().cast::<u8>();
        assert!((p.as_ptr() as usize).is_multiple_of(1 << shift) && pool.contains(p.as_ptr()));
        // SAFETY: allocated above with this layout.
        unsafe {
            p.write_bytes(shift as u8, 100);
            pool.deallocate(p, layout);
        }
    }
    // More than there is, in one piece and in many.
    let layout = |n| Layout::from_size_align(n, 8).unwrap();
    assert!(pool.allocate(layout(65 * MIB)).is_err());
    assert!(pool.allocate(layout(isize::MAX as usize - 7)).is_err());
    let mut taken = std::vec::Vec::new();
    while let Ok(p) = pool.allocate(layout(5 * MIB)) {
        taken.push(p.cast::<u8>());
    }
    assert!((10..13).contains(&taken.len()), "{}", taken.len());
    // SAFETY: allocated above; a failure to grow leaves the old memory alone.
    unsafe {
        taken[0].write_bytes(3, 5 * MIB);
        assert!(pool.grow(taken[0], layout(5 * MIB), layout(60 * MIB)).is_err());
        assert!(std::slice::from_raw_parts(taken[0].as_ptr(), 5 * MIB).iter().all(|b| *b == 3));
        taken.into_iter().for_each(|p| pool.deallocate(p, layout(5 * MIB)));
        // Zeroed memory is zero although it was used before; what grows zeroed keeps the rest.
        for n in [100, 5000, 300_001, 8 * MIB] {
            let dirty = pool.allocate(layout(n)).unwrap().cast::<u8>();
            dirty.write_bytes(0xff, n);
            pool.deallocate(dirty, layout(n));
            let p = pool.allocate_zeroed(layout(n)).unwrap().cast::<u8>();
            assert!(std::slice::from_raw_parts(p.as_ptr(), n).iter().all(|b| *b == 0), "{n} bytes");
            p.write_bytes(1, n);
            let p = pool.grow_zeroed(p, layout(n), layout(3 * n)).unwrap().cast::<u8>();
            let bytes = std::slice::from_raw_parts(p.as_ptr(), 3 * n);
            assert!(bytes[..n].iter().all(|b| *b == 1) && bytes[n..].iter().all(|b| *b == 0), "{n} bytes");
            let p = pool.shrink(p, layout(3 * n), layout(n / 2)).unwrap().cast::<u8>();
            assert!(std::slice::from_raw_parts(p.as_ptr(), n / 2).iter().all(|b| *b == 1));
            pool.deallocate(p, layout(n / 2));
        }
    }
    // All of it is one piece again.
    assert!(pool.allocate(layout(60 * MIB)).is_ok());
    space.check();
}

#[test]
fn a_pool_lives_as_long_as_what_is_in_it() {
    let space = space(Faults::Threads, 8 * MIB);
    let weak = {
        let pool = space.pool(64 * MIB as u64).unwrap();
        let mut v: Vec<u32, Pool> = Vec::new_in(pool);
        v.resize(5 * MIB, 17);
        v
    };
    drop(space);
    assert!(weak.iter().all(|x| *x == 17));
}

/// G12: a fork waits for whoever works on a pool, and both sides go on with it.
#[test]
fn g12_a_pool_is_usable_on_both_sides_of_a_fork() {
    for faults in [Faults::Signal, Faults::Threads] {
        let space = space(faults, 8 * MIB);
        let pool = space.pool(256 * MIB as u64).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            // Somebody is always in the middle of something, until the test ends, however it does.
            let busy = pool.clone();
            let stop = &stop;
            let _end = scopeguard(|| stop.store(true, std::sync::atomic::Ordering::Relaxed));
            s.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let mut v: Vec<u64, Pool> = Vec::new_in(busy.clone());
                    v.resize(100_000, 3);
                }
            });
            for round in 0..5u64 {
                let mut v: Vec<u64, Pool> = Vec::new_in(pool.clone());
                v.resize(2 * MIB, round);
                // SAFETY: the child uses nothing but the pool, and ends.
                let pid = unsafe { libc::fork() };
                if pid == 0 {
                    let mut w: Vec<u64, Pool> = Vec::new_in(pool.clone());
                    w.extend(v.iter().map(|x| x + 1));
                    drop(v);
                    let ok = w.iter().all(|x| *x == round + 1);
                    // SAFETY: ends the process.
                    unsafe { libc::_exit(!ok as i32) };
                }
                assert!(v.iter().all(|x| *x == round));
                let mut status = 0;
                // SAFETY: waits for the child just made.
                assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
                assert_eq!(status, 0, "the child failed");
            }
        });
        space.check();
    }
}

/// Runs `f` when it is dropped.
fn scopeguard<F: FnMut()>(f: F) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Guard(f)
}
