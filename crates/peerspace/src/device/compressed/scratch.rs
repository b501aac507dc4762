//! Places to work at: the memory that encoding and decoding need, made when the store is.
//!
//! A call of the device may come from a thread at any point of its life, so nothing can be allocated for it and
//! thread-local storage is out of reach. A call takes a free bench, preferring that of the processor it runs on;
//! there are as many as the engine lets threads work at once. A bench is locked by trying only, and whoever has
//! one waits for nobody: it takes none of the other benches, and of the store's locks only those that are held
//! for instructions.

use lz4_flex::block::{CompressTable, get_maximum_output_size};
use peerspace_os::linux::futex::{Mutex, MutexGuard};
use peerspace_os::own::{Box, Own, Vec};

/// Room for one page on its way in or out.
pub(super) struct Bench {
    pub(super) table: CompressTable,
    /// What a page is encoded as; as long as lz4 may ever need. Words, since the store keeps words.
    pub(super) coded: Vec<u64>,
    /// As long as a page.
    pub(super) page: Vec<u64>,
}

/// All benches.
pub(super) struct Benches {
    all: Vec<Box<Mutex<Bench>>>,
}

/// A bench that is ours until this is dropped, and its number.
pub(super) struct Working<'a> {
    pub(super) bench: MutexGuard<'a, Bench>,
    pub(super) number: usize,
}

fn words(bytes: usize) -> Vec<u64> {
    let n = bytes.div_ceil(8);
    let mut v = Vec::with_capacity_in(n, Own);
    v.resize(n, 0);
    v
}

impl Benches {
    /// `n` benches for pages of `page` bytes.
    pub(super) fn new(n: usize, page: usize) -> Benches {
        let mut all = Vec::with_capacity_in(n, Own);
        for _ in 0..n {
            // The small table's positions have 16 bits.
            let small = page < u16::MAX as usize;
            let table = if small { CompressTable::small() } else { CompressTable::large() };
            let bench = Bench { table, coded: words(get_maximum_output_size(page)), page: words(page) };
            all.push(Box::new_in(Mutex::new(bench), Own));
        }
        Benches { all }
    }

    /// Takes a free bench; waits for one if all are taken.
    pub(super) fn take(&self) -> Working<'_> {
        let n = self.all.len();
        let first = crate::engine::cpu() % n;
        let mut rounds = 0;
        loop {
            for i in 0..n {
                let number = (first + i) % n;
                if let Some(bench) = self.all[number].try_lock() {
                    return Working { bench, number };
                }
            }
            relax(&mut rounds);
        }
    }
}

/// Waits a little for another thread that is about to be done, and longer each time: it may not be running.
pub(super) fn relax(rounds: &mut u32) {
    *rounds += 1;
    if *rounds < 50 {
        peerspace_core::sync::spin_hint();
    } else {
        rustix::thread::sched_yield();
    }
}
