//! A buddy allocator whose books are bitmaps outside the memory it hands out.
//!
//! Device memory cannot hold the links of free lists (the CPU may not even reach it), so what is free is kept
//! in one bitmap per order: bit `i` of order `k` says that the `2^k` pages from `i << k` are free and that
//! their buddy is not. Each operation takes O(log n) in the worst case and allocates nothing.
//!
//! Memory beyond the *frontier* has never been handed out and has no bits set, so a new allocator for a
//! terabyte touches none of its bitmaps.
//!
//! Not synchronised: the owner locks.

use crate::addr::{BLOCK_ORDER, BLOCK_PAGES, Order, Pages};
use crate::bitmap::Bitmap;
use crate::words::Words;

const ORDERS: usize = BLOCK_ORDER as usize + 1;

/// Allocates runs of `2^order` pages, numbered from zero.
#[derive(Debug)]
pub struct Buddy<W> {
    words: W,
    free: [Bitmap; ORDERS],
    pages: u64,
    frontier: u64,
    available: u64,
}

impl<W: Words> Buddy<W> {
    /// The most pages an allocator can have.
    pub const MAX_PAGES: u64 = crate::bitmap::MAX_BITS;

    /// Words an allocator of `pages` pages needs.
    pub fn words_for(pages: Pages) -> usize {
        (0..ORDERS).map(|k| Bitmap::words_for(pages.0 >> k)).sum()
    }

    /// An allocator of `pages` pages, all of them free.
    ///
    /// # Panics
    /// When `words` is shorter than [`words_for`](Buddy::words_for) says.
    pub fn new(words: W, pages: Pages) -> Buddy<W> {
        assert!(words.len() >= Self::words_for(pages));
        let mut next = 0;
        let free = core::array::from_fn(|k| {
            let (map, end) = Bitmap::at(next, pages.0 >> k);
            next = end;
            map
        });
        let whole = pages.0 & !(BLOCK_PAGES - 1);
        let mut buddy = Buddy { words, free, pages: whole, frontier: 0, available: whole };
        // The last block may be short: hand its pages in, largest pieces first.
        buddy.pages = pages.0;
        let mut at = whole;
        while at < pages.0 {
            let order = (pages.0 - at).ilog2() as usize;
            buddy.free[order].set(&buddy.words, at >> order);
            at += 1 << order;
            buddy.available += 1 << order;
        }
        buddy
    }

    /// Pages that are free, in runs of whatever size.
    pub fn available(&self) -> Pages {
        Pages(self.available)
    }

    /// The pages that may be taken: those from the first part on were never taken yet, apart from the last block if that is
    /// a short one.
    pub fn touched(&self) -> [core::ops::Range<u64>; 2] {
        [0..self.frontier, self.pages & !(BLOCK_PAGES - 1)..self.pages]
    }

    /// Pages there are.
    pub fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    /// Takes `2^order` pages that begin at a multiple of their number; the first of them, or `None` when no run
    /// of that size is free.
    pub fn alloc(&mut self, order: Order) -> Option<u64> {
        let want = order.get() as usize;
        for have in want..ORDERS {
            if let Some(i) = self.free[have].first(&self.words) {
                self.free[have].clear(&self.words, i);
                return Some(self.carve(i << have, have, want));
            }
        }
        if self.frontier + BLOCK_PAGES <= self.pages & !(BLOCK_PAGES - 1) {
            let at = self.frontier;
            self.frontier += BLOCK_PAGES;
            return Some(self.carve(at, ORDERS - 1, want));
        }
        None
    }

    /// Takes the `2^order` pages from `at` on, if all of them are free. Takes longer the further from all that was ever
    /// taken they are.
    ///
    /// # Panics
    /// When `at` is no multiple of their number.
    pub fn alloc_at(&mut self, at: u64, order: Order) -> bool {
        let want = order.get() as usize;
        assert!(at & ((1 << want) - 1) == 0, "page {at:#x} is no run of order {want}");
        if at.checked_add(1 << want).is_none_or(|end| end > self.pages) {
            return false;
        }
        // What lies between has not been taken, but may be from now on.
        let whole = self.pages & !(BLOCK_PAGES - 1);
        while self.frontier <= at && self.frontier < whole {
            self.free[ORDERS - 1].set(&self.words, self.frontier >> (ORDERS - 1));
            self.frontier += BLOCK_PAGES;
        }
        let Some(have) = (want..ORDERS).find(|k| self.free[*k].get(&self.words, at >> k)) else { return false };
        self.free[have].clear(&self.words, at >> have);
        for k in want..have {
            // The half that is not wanted.
            self.free[k].set(&self.words, (at >> k) ^ 1);
        }
        self.available -= 1 << want;
        true
    }

    /// Keeps the lower `2^want` of the `2^have` pages at `at`, frees the rest.
    fn carve(&mut self, at: u64, have: usize, want: usize) -> u64 {
        for k in want..have {
            let buddy = at + (1 << k);
            self.free[k].set(&self.words, buddy >> k);
        }
        self.available -= 1 << want;
        at
    }

    /// Gives back `2^order` pages. They may be part of a larger run that was taken: any aligned piece of what is
    /// taken can be given back alone.
    ///
    /// # Panics
    /// When any of the pages is free already, or lies outside: a page freed twice would get two owners.
    pub fn free(&mut self, at: u64, order: Order) {
        let mut k = order.get() as usize;
        let mut at = at;
        assert!(at & ((1 << k) - 1) == 0 && at + (1 << k) <= self.pages, "page {at:#x} is no run of order {k}");
        assert!(!self.is_free(at), "page {at:#x} freed twice");
        self.available += 1 << k;
        while k < ORDERS - 1 {
            let buddy = at ^ (1 << k);
            if !self.free[k].get(&self.words, buddy >> k) {
                break;
            }
            self.free[k].clear(&self.words, buddy >> k);
            at &= !(1 << k);
            k += 1;
        }
        self.free[k].set(&self.words, at >> k);
    }

    /// True when page `at` is free.
    pub fn is_free(&self, at: u64) -> bool {
        let virgin = at >= self.frontier && at < self.pages & !(BLOCK_PAGES - 1);
        virgin || (0..ORDERS).any(|k| self.free[k].get(&self.words, at >> k))
    }

    /// The largest run that can be taken now.
    pub fn largest(&self) -> Option<Order> {
        let virgin = self.frontier + BLOCK_PAGES <= self.pages & !(BLOCK_PAGES - 1);
        if virgin {
            return Some(Order::BLOCK);
        }
        (0..ORDERS).rev().find(|k| self.free[*k].first(&self.words).is_some()).and_then(|k| Order::new(k as u8))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;
    use proptest::prelude::*;

    fn order(n: u8) -> Order {
        Order::new(n).unwrap()
    }

    fn buddy(pages: u64) -> Buddy<alloc::boxed::Box<[crate::sync::AtomicU64]>> {
        Buddy::new(zeroed(Buddy::<alloc::vec::Vec<crate::sync::AtomicU64>>::words_for(Pages(pages))), Pages(pages))
    }

    #[test]
    fn a_new_allocator_touches_nothing() {
        let b = buddy(1 << 20);
        assert!(b.words.iter().all(|w| w.load(crate::sync::Ordering::Relaxed) == 0));
        assert_eq!(b.available(), Pages(1 << 20));
    }

    #[test]
    fn everything_can_be_taken_and_given_back() {
        for pages in [1, 2, 511, 512, 513, 1000, 4096] {
            let mut b = buddy(pages);
            let mut taken: std::vec::Vec<u64> = (0..pages).map(|_| b.alloc(Order::BASE).unwrap()).collect();
            assert_eq!(b.alloc(Order::BASE), None);
            assert_eq!(b.available(), Pages(0));
            taken.sort_unstable();
            assert!(taken.iter().copied().eq(0..pages));
            for p in taken {
                b.free(p, Order::BASE);
            }
            assert_eq!(b.available(), Pages(pages));
            // Everything merged: whole blocks can be had again.
            for _ in 0..pages / BLOCK_PAGES {
                assert!(b.alloc(Order::BLOCK).is_some());
            }
            assert_eq!(b.alloc(Order::BLOCK), None);
        }
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_double_free_is_refused() {
        let mut b = buddy(2048);
        let p = b.alloc(order(3)).unwrap();
        b.free(p + 4, order(2));
        b.free(p + 4, order(2));
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn freeing_what_was_never_taken_is_refused() {
        let mut b = buddy(2048);
        b.free(1024, order(0));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Alloc(u8),
        AllocAt(u64, u8),
        Free(usize),
        FreePart(usize, u8),
    }

    proptest! {
        /// Random traffic against a map of single pages: no page has two owners, none is lost, a run that
        /// exists is found.
        #[test]
        fn agrees_with_a_page_map(
            pages in 1u64..3000,
            ops in proptest::collection::vec(
                prop_oneof![
                    (0u8..=9).prop_map(Op::Alloc),
                    any::<usize>().prop_map(Op::Free),
                    (any::<usize>(), any::<u8>()).prop_map(|(i, p)| Op::FreePart(i, p)),
                    (any::<u64>(), 0u8..=9).prop_map(|(at, k)| Op::AllocAt(at, k)),
                ],
                1..200,
            ),
        ) {
            let mut b = buddy(pages);
            let mut free = vec![true; pages as usize];
            let mut runs: std::vec::Vec<(u64, u8)> = std::vec::Vec::new();
            for op in ops {
                match op {
                    Op::Alloc(k) => {
                        let exists = (0..pages >> k).any(|i| {
                            let at = (i << k) as usize;
                            free[at..at + (1 << k)].iter().all(|f| *f)
                        });
                        match b.alloc(order(k)) {
                            Some(at) => {
                                prop_assert_eq!(at & ((1 << k) - 1), 0);
                                for f in &mut free[at as usize..(at + (1 << k)) as usize] {
                                    prop_assert!(*f, "page handed out twice");
                                    *f = false;
                                }
                                runs.push((at, k));
                            }
                            None => prop_assert!(!exists, "a free run of order {} was not found", k),
                        }
                    }
                    Op::AllocAt(at, k) => {
                        let at = (at % pages) >> k << k;
                        let run = at as usize..((at + (1 << k)) as usize);
                        let is_free = run.end as u64 <= pages && free[run.clone()].iter().all(|f| *f);
                        prop_assert_eq!(b.alloc_at(at, order(k)), is_free);
                        if is_free {
                            free[run].fill(false);
                            runs.push((at, k));
                        }
                    }
                    Op::Free(i) if !runs.is_empty() => {
                        let (at, k) = runs.swap_remove(i % runs.len());
                        b.free(at, order(k));
                        free[at as usize..(at + (1 << k)) as usize].fill(true);
                    }
                    Op::FreePart(i, part) if !runs.is_empty() => {
                        let i = i % runs.len();
                        let (at, k) = runs[i];
                        if k == 0 { continue; }
                        // One half goes, the other stays.
                        let half = 1u64 << (k - 1);
                        let (gone, kept) = if part & 1 == 0 { (at, at + half) } else { (at + half, at) };
                        runs[i] = (kept, k - 1);
                        b.free(gone, order(k - 1));
                        free[gone as usize..(gone + half) as usize].fill(true);
                    }
                    _ => {}
                }
                prop_assert_eq!(b.available().0 as usize, free.iter().filter(|f| **f).count());
            }
            for (i, f) in free.iter().enumerate() {
                prop_assert_eq!(b.is_free(i as u64), *f);
                prop_assert!(*f || b.touched().iter().any(|r| r.contains(&(i as u64))));
            }
        }
    }
}
