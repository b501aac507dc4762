//! Arrays of atomic words that the tables live in, wherever they come from.
//!
//! The core allocates nothing for its tables: whoever builds them hands in zeroed words. The engine hands in
//! memory maps that the kernel fills with zeros on first touch, so a table for a terabyte costs nothing until
//! it is used; tests hand in vectors.

use crate::sync::AtomicU64;
use alloc::boxed::Box;
use alloc::vec::Vec;

/// A run of words that start as zero and never move.
///
/// There may be more of them between two calls; there are never fewer, and a word keeps its address. All-zero is
/// the state every structure of this crate takes for "nothing here yet".
#[allow(clippy::len_without_is_empty)] // nobody asks for none
pub trait Words: Send + Sync {
    /// How many words can be used now.
    fn len(&self) -> usize;

    /// Word `i`.
    ///
    /// # Panics
    /// When `i` lies beyond the words that can be used now.
    fn at(&self, i: usize) -> &AtomicU64;
}

impl Words for Vec<AtomicU64> {
    fn len(&self) -> usize {
        <[AtomicU64]>::len(self)
    }

    #[inline]
    fn at(&self, i: usize) -> &AtomicU64 {
        &self[i]
    }
}

impl Words for Box<[AtomicU64]> {
    fn len(&self) -> usize {
        <[AtomicU64]>::len(self)
    }

    #[inline]
    fn at(&self, i: usize) -> &AtomicU64 {
        &self[i]
    }
}

/// `n` zeroed words on the heap: for tests and small tables.
pub fn zeroed(n: usize) -> Box<[AtomicU64]> {
    (0..n).map(|_| AtomicU64::new(0)).collect()
}

/// A set of free indices, last in first out, without a lock.
///
/// The head carries a tag that counts changes, so that an index that was taken and given back in between is
/// told apart (the ABA problem). `next[i]` belongs to whoever owns index `i`.
///
/// Orderings: a push publishes `next[i]` with its Release; a pop that takes `i` acquires it.
#[derive(Debug)]
pub struct FreeStack {
    head: AtomicU64,
}

const INDEX: u64 = 0xffff_ffff;

impl FreeStack {
    /// An empty stack.
    #[allow(clippy::new_without_default)]
    pub fn new() -> FreeStack {
        FreeStack { head: AtomicU64::new(0) }
    }

    /// Puts `i` on the stack. `link` is the word that belongs to `i`; `i` must be below 2^32 - 1.
    pub fn push(&self, i: u32, link: &AtomicU64) {
        use crate::sync::Ordering::{Relaxed, Release};
        let mut head = self.head.load(Relaxed);
        loop {
            link.store(head & INDEX, Relaxed);
            let new = (head & !INDEX).wrapping_add(1 << 32) | (i as u64 + 1);
            match self.head.compare_exchange_weak(head, new, Release, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes the index pushed last. `link` gives the word of an index.
    pub fn pop<'a>(&self, link: impl Fn(u32) -> &'a AtomicU64) -> Option<u32> {
        use crate::sync::Ordering::{Acquire, Relaxed};
        let mut head = self.head.load(Acquire);
        loop {
            let top = (head & INDEX) as u32;
            if top == 0 {
                return None;
            }
            // Another thread may take `top` meanwhile and reuse its word; the tag makes the exchange fail then.
            let next = link(top - 1).load(Relaxed) & INDEX;
            let new = (head & !INDEX).wrapping_add(1 << 32) | next;
            match self.head.compare_exchange_weak(head, new, Acquire, Acquire) {
                Ok(_) => return Some(top - 1),
                Err(now) => head = now,
            }
        }
    }

    /// Takes the whole chain at once: the index pushed last, from which `link` words lead on.
    pub fn take_all(&self) -> Option<u32> {
        use crate::sync::Ordering::{Acquire, Relaxed};
        let mut head = self.head.load(Relaxed);
        loop {
            if head & INDEX == 0 {
                return None;
            }
            let new = (head & !INDEX).wrapping_add(1 << 32);
            match self.head.compare_exchange_weak(head, new, Acquire, Relaxed) {
                Ok(_) => return Some((head & INDEX) as u32 - 1),
                Err(now) => head = now,
            }
        }
    }

    /// What `link` of index `i` says comes after `i` in a chain from [`take_all`](FreeStack::take_all).
    pub fn after(link: &AtomicU64) -> Option<u32> {
        let next = link.load(crate::sync::Ordering::Relaxed) & INDEX;
        if next == 0 { None } else { Some(next as u32 - 1) }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn last_in_first_out() {
        let links = zeroed(4);
        let s = FreeStack::new();
        assert_eq!(s.pop(|i| &links[i as usize]), None);
        for i in [2u32, 0, 3] {
            s.push(i, &links[i as usize]);
        }
        assert_eq!(s.pop(|i| &links[i as usize]), Some(3));
        assert_eq!(s.pop(|i| &links[i as usize]), Some(0));
        s.push(1, &links[1]);
        let first = s.take_all().unwrap();
        assert_eq!(first, 1);
        assert_eq!(FreeStack::after(&links[1]), Some(2));
        assert_eq!(FreeStack::after(&links[2]), None);
        assert_eq!(s.pop(|i| &links[i as usize]), None);
    }
}
