//! Words for tables, made when they are first looked at: a table for a large address space costs little as long as
//! little of it is used, without any help of a kernel.

use peerspace_core::sync::{AtomicU64, AtomicUsize, Ordering};
use peerspace_core::words::{Words, zeroed};
use std::sync::OnceLock;

const CHUNK: usize = 512;

/// Zeroed words, usable up to a mark that can rise.
#[derive(Debug)]
pub struct SimWords {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    usable: AtomicUsize,
    reserved: usize,
}

impl SimWords {
    pub(super) fn new(reserved: usize, usable: usize) -> SimWords {
        assert!(usable <= reserved);
        let chunks = (0..reserved.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        SimWords { chunks, usable: AtomicUsize::new(usable), reserved }
    }

    /// False beyond what was reserved.
    pub(super) fn grow(&self, usable: usize) -> bool {
        if usable > self.reserved {
            return false;
        }
        self.usable.fetch_max(usable, Ordering::Release);
        true
    }
}

impl Words for SimWords {
    fn len(&self) -> usize {
        self.usable.load(Ordering::Acquire)
    }

    fn at(&self, i: usize) -> &AtomicU64 {
        assert!(i < self.len(), "word {i} of {}", self.len());
        &self.chunks[i / CHUNK].get_or_init(|| zeroed(CHUNK))[i % CHUNK]
    }
}
