//! The memory that is stressed, and what is known of each word of it.
//!
//! Each page has a few words with one writer each, who counts them up, and one word that all add to; the rest is the page's
//! filling.

use super::{CPUS, LANES, MIB, PAGE, WORDS};
use peerspace::{Adopted, Region};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Words of a page with a writer each; and one that all add to.
pub(super) const OWNED: usize = CPUS + LANES.len() + 1;
pub(super) const SUM: usize = OWNED;
/// Pages of each area: regions, adopted memory, and the region that may lose pages.
pub(super) const AREAS: [usize; 4] = [6 * MIB / PAGE, 4 * MIB / PAGE, 3 * MIB / PAGE, 2 * MIB / PAGE];
pub(super) const ADOPTED: usize = 2;
pub(super) const MORTAL: usize = 3;

/// What is known of a word: what its writer has begun and finished, counted.
#[derive(Default)]
pub(super) struct Word {
    pub(super) begun: AtomicU32,
    pub(super) done: AtomicU32,
}

/// What is known of a page.
pub(super) struct Page {
    pub(super) words: [Word; OWNED + 1],
    /// The number of its filling; 0 for zeros. Locked to read by whoever uses the page, to write by whoever is alone with it.
    pub(super) filling: RwLock<u64>,
}

/// Some memory that all use.
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) pages: Vec<Page>,
    pub(super) region: Option<RwLock<Region>>,
    /// Locked to read by whoever uses it.
    pub(super) adopted: RwLock<Option<Adopted>>,
}

impl Page {
    pub(super) fn new() -> Page {
        Page { words: Default::default(), filling: RwLock::new(0) }
    }

    /// It is zeros, as one knows who is alone with it.
    pub(super) fn forget(&self, filling: &mut u64) {
        *filling = 0;
        for word in &self.words {
            word.begun.store(0, SeqCst);
            word.done.store(0, SeqCst);
        }
    }
}

impl Area {
    pub(super) fn va(&self, page: usize, word: usize) -> u64 {
        self.start + (page * PAGE + word * 8) as u64
    }

    /// Where word `k` of those with a writer is in its page.
    pub(super) fn place(page: usize, k: usize) -> usize {
        (k * 61 + page * 7) % WORDS
    }
}

pub(super) fn filling(area: usize, page: usize, word: usize, number: u64) -> u64 {
    if number == 0 {
        return 0;
    }
    let x = ((area << 48 | page << 16 | word) as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number << 20;
    x ^ x >> 29
}

/// What a word with a writer holds when it has been counted up to `count`.
pub(super) fn counted(area: usize, page: usize, k: usize, count: u32) -> u64 {
    let name = ((area * 7919 + page) * OWNED + k + 1) as u64;
    if count == 0 { 0 } else { name << 32 | count as u64 }
}

/// Locks to read. Whoever found something wrong has said so: the others do not fail for that.
pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks to write; as above.
pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Anonymous memory of the program's own, for as long as the process lives.
pub(super) fn own_memory(bytes: usize) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED, "memory for the stress");
    start as u64
}

pub(super) fn discard(va: u64, bytes: usize) {
    // SAFETY: whole pages of memory of ours that nobody else uses just now.
    assert_eq!(unsafe { libc::madvise(va as *mut _, bytes, libc::MADV_DONTNEED) }, 0);
}
