//! The logical page table: the one truth about where each page's data is (rule G2).
//!
//! ```text
//!   directory            block words (one per 2 MiB)         leaves (one word per 4 KiB)
//!  +---------+          +------+------+------+---           +------+------+------+---
//!  | chunk+1 |--------->| word | Leaf |-------------------->| word | word | word |    512 of them
//!  +---------+  8192    +------+------+------+---           +------+------+------+---
//!  |    0    |  blocks
//!  +---------+
//! ```
//!
//! A block that is whole (all empty, one huge folio, wholly on a device) is one word. A block is *split* into
//! a leaf the first time two of its pages differ, and *joined* again when they agree. All-zero words mean
//! empty, so nothing is initialised and memory that is never touched costs nothing.
//!
//! # Locking protocol
//!
//! Each word is its own lock (bit [`LOCK`]): whoever holds it owns the page or the block, its frame, its device
//! copy and its mappings. There is no other lock here.
//!
//! - A whole block is locked at its block word, a page of a split block at its leaf word.
//! - [`lock`](Table::lock) of a page in a split block takes the leaf word and then *looks again* whether the
//!   block word still leads to that leaf (rule H12). If not, it lets go and starts over.
//! - [`split`](Locked::split) needs the block word's lock. [`join`](Table::join) takes all 512 leaf words, in
//!   ascending order and without waiting, then replaces the block word: a join excludes every walker of the
//!   block, a split does not.
//! - A leaf that was joined away may be reused for another block while a slow walker still holds a word of it
//!   for a moment: that walker's second look fails and it restores the word it found. Therefore the words of a
//!   leaf are only ever changed under their own lock, also when the leaf is new.
//! - Several locks at once: ascending addresses, or [`try_lock`](Table::try_lock).
//!
//! Orderings: taking a lock is an Acquire that pairs with the Release of the [`commit`](Locked::commit) before
//! it, so an owner sees everything the owner before it did. The block word is published by Release and read by
//! Acquire, which makes the words of a new leaf visible to whoever finds it.

use crate::addr::{BLOCK_ORDER, BLOCK_PAGES, Geometry, PageRange, Vpn};
use crate::entry::{Entry, LOCK, State, WAIT};
use crate::sketch::Sketch;
use crate::sync::{AtomicU64, AtomicUsize, Ordering, Park, spin_hint};
use crate::words::{FreeStack, Words};
use core::fmt;

/// Block words in a chunk: a chunk covers 16 GiB with 4 KiB pages.
pub const CHUNK_BLOCKS: usize = 1 << CHUNK_SHIFT;
const CHUNK_SHIFT: u32 = if cfg!(loom) { 1 } else { 13 };
const LEAF_WORDS: usize = BLOCK_PAGES as usize;
/// Tries before a contended word is slept on: about the time a short critical section takes.
const SPINS: u32 = if cfg!(loom) { 1 } else { 100 };

/// The words a [`Table`] lives in.
#[derive(Debug)]
pub struct TableMemory<W> {
    /// One word per chunk of the address space: see [`Table::directory_words`].
    pub directory: W,
    /// [`CHUNK_BLOCKS`] words per chunk in use.
    pub blocks: W,
    /// 512 words per leaf.
    pub leaves: W,
    /// One word per leaf: links of the free list.
    pub links: W,
}

/// How many words a table needs before a range can be covered; see [`Table::needs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Words of `blocks`.
    pub blocks: usize,
    /// Words of `leaves`.
    pub leaves: usize,
    /// Words of `links`.
    pub links: usize,
}

/// The logical page table of one space.
pub struct Table<W, P> {
    geometry: Geometry,
    memory: TableMemory<W>,
    park: P,
    chunks: AtomicUsize,
    leaves_made: AtomicUsize,
    leaves_promised: AtomicUsize,
    free_leaves: FreeStack,
    split: Sketch,
}

/// The address lies outside what [`Table::cover`] has covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncovered(
    /// The page that was asked for.
    pub Vpn,
);

impl fmt::Display for Uncovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x} lies in no region of this space", self.0.0)
    }
}

impl core::error::Error for Uncovered {}

impl<W: Words, P: Park> Table<W, P> {
    /// Words of `directory` that an address space of `va_bits` bits needs.
    pub const fn directory_words(geometry: Geometry, va_bits: u32) -> usize {
        1 << (va_bits - geometry.page_shift() - BLOCK_ORDER as u32 - CHUNK_SHIFT)
    }

    /// A table that covers nothing yet.
    pub fn new(geometry: Geometry, memory: TableMemory<W>, park: P) -> Table<W, P> {
        Table {
            geometry,
            memory,
            park,
            chunks: AtomicUsize::new(0),
            leaves_made: AtomicUsize::new(0),
            leaves_promised: AtomicUsize::new(0),
            free_leaves: FreeStack::new(),
            split: Sketch::new(),
        }
    }

    /// Takes note that `block` is, or has been, in small pages.
    pub fn note_split(&self, block: u64) {
        self.split.insert(block);
    }

    /// False when `block` was never split. True for some others as well.
    pub fn may_have_been_split(&self, block: u64) -> bool {
        self.split.may_have(block)
    }

    /// The words the table lives in, to let them grow.
    pub fn memory(&self) -> &TableMemory<W> {
        &self.memory
    }

    /// The page size this table counts in.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What the table's memory must offer before `range`, of which `new` blocks are in no region yet, can be
    /// [covered](Table::cover).
    pub fn needs(&self, range: PageRange, new: usize) -> Needs {
        let dir = &self.memory.directory;
        let chunks = Self::chunks_of(range)
            .filter(|c| (*c as usize) < dir.len() && dir.at(*c as usize).load(Ordering::Relaxed) == 0)
            .count();
        // Relaxed: callers hold the lock that guards changes to the regions.
        let leaves = self.leaves_promised.load(Ordering::Relaxed) + new;
        Needs {
            blocks: (self.chunks.load(Ordering::Relaxed) + chunks) * CHUNK_BLOCKS,
            leaves: leaves * LEAF_WORDS,
            links: leaves,
        }
    }

    fn chunks_of(range: PageRange) -> core::ops::RangeInclusive<u64> {
        range.start.block() >> CHUNK_SHIFT..=Vpn(range.end.0 - 1).block() >> CHUNK_SHIFT
    }

    /// Makes the words of `range` reachable, and promises a leaf to each of its `new` blocks that are in no
    /// region yet, so that a split can never fail later (rule H6).
    ///
    /// The caller serialises calls, and has made the memory as large as [`needs`](Table::needs) said.
    ///
    /// # Errors
    /// [`Uncovered`] when the range lies beyond the address space or the memory is too small; nothing changed.
    pub fn cover(&self, range: PageRange, new: usize) -> Result<(), Uncovered> {
        let need = self.needs(range, new);
        let dir = &self.memory.directory;
        if range.is_empty()
            || *Self::chunks_of(range).end() as usize >= dir.len()
            || self.memory.blocks.len() < need.blocks
            || self.memory.leaves.len() < need.leaves
            || self.memory.links.len() < need.links
        {
            return Err(Uncovered(range.start));
        }
        for c in Self::chunks_of(range) {
            if dir.at(c as usize).load(Ordering::Relaxed) == 0 {
                let chunk = self.chunks.fetch_add(1, Ordering::Relaxed);
                // Release: pairs with the Acquire in block_word; the chunk's words are zero, which is valid.
                dir.at(c as usize).store(chunk as u64 + 1, Ordering::Release);
            }
        }
        self.leaves_promised.store(need.links, Ordering::Relaxed);
        Ok(())
    }

    /// Takes back the promise of leaves to `gone` blocks that are in no region any more. They are empty and
    /// joined.
    pub fn uncover(&self, gone: usize) {
        self.leaves_promised.fetch_sub(gone, Ordering::Relaxed);
    }

    #[inline]
    fn block_word(&self, block: u64) -> Option<&AtomicU64> {
        let at = (block >> CHUNK_SHIFT) as usize;
        if at >= self.memory.directory.len() {
            return None;
        }
        // Acquire: pairs with the Release in cover.
        let chunk = self.memory.directory.at(at).load(Ordering::Acquire) as usize;
        let word = chunk.checked_sub(1)? * CHUNK_BLOCKS + (block as usize & (CHUNK_BLOCKS - 1));
        Some(self.memory.blocks.at(word))
    }

    #[inline]
    fn leaf_word(&self, leaf: u32, index: usize) -> &AtomicU64 {
        self.memory.leaves.at(leaf as usize * LEAF_WORDS + index)
    }

    /// The entry of `vpn` at this moment, and whether its block is whole. Nothing keeps it from changing.
    pub fn look(&self, vpn: Vpn) -> Option<(Entry, bool)> {
        let block = self.block_word(vpn.block())?;
        // Acquire: pairs with the Release that published the leaf.
        let word = Entry::from_word(block.load(Ordering::Acquire));
        Some(match word.leaf() {
            None => (word, true),
            Some(leaf) => (Entry::from_word(self.leaf_word(leaf, vpn.index()).load(Ordering::Acquire)), false),
        })
    }

    /// True while somebody holds the lock that [`lock`](Table::lock) of `vpn` would take.
    pub fn is_locked(&self, vpn: Vpn) -> bool {
        let Some(block) = self.block_word(vpn.block()) else { return false };
        let word = block.load(Ordering::Acquire);
        match Entry::from_word(word).leaf() {
            None => word & LOCK != 0,
            Some(leaf) => self.leaf_word(leaf, vpn.index()).load(Ordering::Acquire) & LOCK != 0,
        }
    }

    /// Locks the word that holds the state of `vpn`, waiting as long as it takes.
    ///
    /// # Errors
    /// [`Uncovered`] when no region covers the page.
    pub fn lock(&self, vpn: Vpn) -> Result<Locked<'_, W, P>, Uncovered> {
        loop {
            if let Some(locked) = self.attempt(vpn, |word| Some(self.wait_for(word)))? {
                return Ok(locked);
            }
        }
    }

    /// Locks the word that holds the state of `vpn`, waiting as long as `stop` does not hold; `None` if it does, and somebody
    /// else holds the word. Whoever makes it hold [turns away](Locked::turn_away) those who wait already.
    ///
    /// # Errors
    /// [`Uncovered`] when no region covers the page.
    pub fn lock_unless(&self, vpn: Vpn, stop: impl Fn() -> bool) -> Result<Option<Locked<'_, W, P>>, Uncovered> {
        loop {
            let stopped = core::cell::Cell::new(false);
            let locked = self.attempt(vpn, |word| {
                let entry = self.wait_unless(word, &stop);
                stopped.set(entry.is_none());
                entry
            })?;
            if locked.is_some() || stopped.get() {
                return Ok(locked);
            }
        }
    }

    /// Locks the word that holds the state of `vpn` unless somebody else holds it.
    ///
    /// # Errors
    /// [`Uncovered`] when no region covers the page.
    pub fn try_lock(&self, vpn: Vpn) -> Result<Option<Locked<'_, W, P>>, Uncovered> {
        self.attempt(vpn, |word| {
            let seen = word.load(Ordering::Relaxed);
            let free = seen & LOCK == 0;
            // Acquire: pairs with the Release of the commit before.
            (free && word.compare_exchange(seen, seen | LOCK, Ordering::Acquire, Ordering::Relaxed).is_ok())
                .then(|| Entry::from_word(seen))
        })
    }

    /// One walk. `Ok(None)`: somebody holds the word, or the block changed under the walk.
    fn attempt<'t>(
        &'t self,
        vpn: Vpn,
        take: impl Fn(&'t AtomicU64) -> Option<Entry>,
    ) -> Result<Option<Locked<'t, W, P>>, Uncovered> {
        let block = self.block_word(vpn.block()).ok_or(Uncovered(vpn))?;
        let seen = Entry::from_word(block.load(Ordering::Acquire));
        let (word, whole) = match seen.leaf() {
            Some(leaf) => (self.leaf_word(leaf, vpn.index()), false),
            None => (block, true),
        };
        let Some(entry) = take(word) else { return Ok(None) };
        let vpn = if whole { vpn.block_start() } else { vpn };
        let locked = Locked { table: self, word, entry, vpn, whole };
        // Look again: a join or a split may have come first. Dropping `locked` lets go of the word unchanged.
        let still =
            if whole { entry.leaf().is_none() } else { Entry::from_word(block.load(Ordering::Acquire)) == seen };
        Ok(still.then_some(locked))
    }

    fn wait_for(&self, word: &AtomicU64) -> Entry {
        self.wait_unless(word, &|| false).expect("nothing stops the wait")
    }

    fn wait_unless(&self, word: &AtomicU64, stop: &impl Fn() -> bool) -> Option<Entry> {
        let mut spins = 0;
        loop {
            let seen = word.load(Ordering::Relaxed);
            if seen & LOCK == 0 {
                // Acquire: pairs with the Release of the commit before.
                if word.compare_exchange_weak(seen, seen | LOCK, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    return Some(Entry::from_word(seen));
                }
            } else if spins < SPINS {
                spins += 1;
                spin_hint();
            // Acquire: pairs with the Release of whoever turned those away who waited before.
            } else if word.compare_exchange(seen, seen | WAIT, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                if stop() {
                    return None;
                }
                self.park.wait(word, seen | WAIT);
            }
        }
    }

    fn release(&self, word: &AtomicU64, entry: Entry) {
        // Release: pairs with the Acquire of the next lock. A swap, so that a waiter is never missed.
        let before = word.swap(entry.word(), Ordering::Release);
        debug_assert!(before & LOCK != 0, "a table word was released by someone who does not hold it");
        if before & WAIT != 0 {
            self.park.wake(word);
        }
    }

    /// Joins a split block into one word, if nobody holds any of its pages and `agree` turns their entries into
    /// one. Returns the lock on the block word, whose entry is then what `agree` returned.
    ///
    /// `agree` gets the entry of each page, in order, through a function.
    ///
    /// # Errors
    /// [`Uncovered`] when no region covers the block.
    pub fn join(
        &self,
        block: u64,
        agree: impl FnOnce(&dyn Fn(usize) -> Entry) -> Option<Entry>,
    ) -> Result<Option<Locked<'_, W, P>>, Uncovered> {
        let start = Vpn::of_block(block);
        let word = self.block_word(block).ok_or(Uncovered(start))?;
        let seen = word.load(Ordering::Acquire);
        let Some(leaf) = Entry::from_word(seen).leaf() else { return Ok(None) };
        // The block word of a split block is locked by joins alone.
        if seen & LOCK != 0 || word.compare_exchange(seen, seen | LOCK, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return Ok(None);
        }
        let mut held = 0;
        while held < LEAF_WORDS {
            let w = self.leaf_word(leaf, held);
            let v = w.load(Ordering::Relaxed);
            if v & LOCK != 0 || w.compare_exchange(v, v | LOCK, Ordering::Acquire, Ordering::Relaxed).is_err() {
                break;
            }
            held += 1;
        }
        let entry = |i: usize| Entry::from_word(self.leaf_word(leaf, i).load(Ordering::Relaxed));
        let joined = if held == LEAF_WORDS { agree(&entry) } else { None };
        let Some(joined) = joined else {
            for i in 0..held {
                self.release(self.leaf_word(leaf, i), entry(i));
            }
            self.release(word, Entry::from_word(seen));
            return Ok(None);
        };
        debug_assert!(joined.leaf().is_none());
        // The block word stays locked while it changes, so a walker that comes now waits at the block.
        // Release: pairs with the second look of walkers that hold a word of the leaf afterwards.
        let mut now = word.load(Ordering::Relaxed);
        while let Err(changed) =
            word.compare_exchange(now, joined.word() | LOCK | (now & WAIT), Ordering::Release, Ordering::Relaxed)
        {
            now = changed;
        }
        for i in 0..LEAF_WORDS {
            self.release(self.leaf_word(leaf, i), Entry::EMPTY);
        }
        self.free_leaves.push(leaf, self.memory.links.at(leaf as usize));
        Ok(Some(Locked { table: self, word, entry: joined, vpn: start, whole: true }))
    }

    fn take_leaf(&self) -> u32 {
        if let Some(leaf) = self.free_leaves.pop(|i| self.memory.links.at(i as usize)) {
            return leaf;
        }
        // Relaxed: the number is all that is shared; the words behind it are zero.
        let leaf = self.leaves_made.fetch_add(1, Ordering::Relaxed);
        // cover() has promised one leaf per covered block, so there is one.
        assert!(leaf < self.memory.links.len(), "more blocks were split than are covered");
        leaf as u32
    }

    /// Leaves in use or free: what [`TableMemory::leaves`] has been touched up to.
    pub fn leaves_made(&self) -> usize {
        self.leaves_made.load(Ordering::Relaxed)
    }
}

impl<W, P> fmt::Debug for Table<W, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// The right to decide about a page, or about a whole block. Dropping it leaves the entry as it was.
#[must_use = "dropping the lock leaves the entry as it was"]
pub struct Locked<'t, W: Words, P: Park> {
    table: &'t Table<W, P>,
    word: &'t AtomicU64,
    entry: Entry,
    vpn: Vpn,
    whole: bool,
}

impl<'t, W: Words, P: Park> Locked<'t, W, P> {
    /// The entry as it was found.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// The state as it was found.
    pub fn state(&self) -> State {
        self.entry.state()
    }

    /// True when this is the word of a whole block.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Has everybody who waits for the lock look again at what may [stop](Table::lock_unless) the wait.
    pub fn turn_away(&self) {
        // Release: what stops the wait is seen by whoever begins to wait from here on. Whoever was about to sleep finds
        // the word changed.
        if self.word.fetch_and(!WAIT, Ordering::Release) & WAIT != 0 {
            self.table.park.wake(self.word);
        }
    }

    /// The pages this lock is about.
    pub fn range(&self) -> PageRange {
        if self.whole { PageRange::block(self.vpn.block()) } else { PageRange { start: self.vpn, end: self.vpn + 1 } }
    }

    /// The first page this lock is about.
    pub fn vpn(&self) -> Vpn {
        self.vpn
    }

    /// Makes `state` the truth and lets go.
    pub fn commit(self, state: State) {
        let entry = Entry::new(state);
        debug_assert!(entry.leaf().is_none(), "leaves are made by split");
        self.table.release(self.word, entry);
        core::mem::forget(self);
    }

    /// Changes the state for now, still holding the lock; what a drop would leave behind.
    pub fn set(&mut self, state: State) {
        self.entry = Entry::new(state);
    }

    /// Splits a whole block: each page gets the word `fill` gives it. Lets go of the block.
    ///
    /// Cannot fail (rule H6): the leaf was promised when the region was covered.
    pub fn split(self, fill: impl Fn(u64) -> Entry) {
        assert!(self.whole, "only a whole block can be split");
        self.table.note_split(self.vpn.block());
        let leaf = self.table.take_leaf();
        for i in 0..LEAF_WORDS {
            let entry = fill(i as u64);
            if entry.is_empty() {
                continue; // a free leaf is all empty
            }
            let word = self.table.leaf_word(leaf, i);
            // A slow walker of the leaf's last block may hold the word for a moment.
            self.table.wait_for(word);
            self.table.release(word, entry);
        }
        // Release (in release): publishes the leaf's words together with its number.
        self.table.release(self.word, Entry::new(State::Leaf(leaf)));
        core::mem::forget(self);
    }

    /// Splits a whole block into pages that go on as the block was.
    pub fn split_evenly(self) {
        let entry = self.entry;
        self.split(|i| entry.nth(i));
    }
}

impl<W: Words, P: Park> Drop for Locked<'_, W, P> {
    fn drop(&mut self) {
        self.table.release(self.word, self.entry);
    }
}

impl<W: Words, P: Park> fmt::Debug for Locked<'_, W, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locked").field("range", &self.range()).field("entry", &self.entry).finish()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "table_tests.rs"]
mod tests;
