//! Room for bytes of many sizes: chunks, each cut into slots of one size.
//!
//! A *chunk* is sixteen pages, aligned to a page. While it is in use it belongs to one *class*, which says into how
//! many slots it is cut: 16 slots of a page, 17 of a little less, and so on to 1024. An *object* lies in one slot,
//! behind a word that names its page (plus one). Only 16 whole pages leave no room for that; they are named in the
//! chunk's record. A chunk without objects goes back to the kernel and can serve any class next, so one that is listed
//! always has some; [`compact`](super::compact) sees to it that there are free chunks.
//!
//! ```text
//!   free --claim--> listed <--relist-- isolated (being emptied by the compactor)
//!    ^                |   --isolate-->     |
//!    +----last object-+----- emptied ------+
//! ```
//!
//! # Locks
//!
//! Chunks in use belong to a *shard*. One lock guards its lists (by class and by how full) and its chunks' records;
//! it is held for a few dozen instructions and never with another. Records are atomic words so that they can also
//! be looked at without it, by someone who looks again under it. The pool of free chunks has no lock.
//!
//! The bytes of an object have no lock at all. Whoever takes a slot writes it before any page names it; whoever
//! reads an object may find that it was moved and its slot reused, and has the page's checksum to tell. Stored
//! bytes are atomic words, so such a race yields wrong bytes and nothing worse.

use super::account::Account;
use super::compact::Compactor;
use super::record::{GROUPS, Phase, RECORD_BYTES, RECORD_WORDS, Record, State, UNLINKED};
use crate::sync::Padded;
use peerspace_core::sync::{AtomicU64, Ordering, Ordering::Relaxed, fence};
use peerspace_core::words::{FreeStack, Words};
use peerspace_os::linux::futex::Mutex;
use peerspace_os::linux::map::Arena;
use peerspace_os::own::{Own, Vec};
use rustix::io::Errno;

/// Pages in a chunk.
const CHUNK_PAGES: usize = 16;

/// Number of classes.
pub(super) const CLASSES: usize = 58;
/// Slots that a chunk of each class is cut into. Sizes are 3 to 6 % apart down to a quarter of a page, and up to
/// 12 % below.
pub(super) const SLOTS: [u32; CLASSES] = {
    let mut slots = [0; CLASSES];
    let (mut class, mut n) = (0, CHUNK_PAGES as u32);
    while class < CLASSES {
        slots[class] = n;
        class += 1;
        let octave = 1 << n.ilog2();
        n += match n {
            ..64 => octave / 16,
            64..512 => octave / 8,
            _ => octave,
        };
    }
    slots
};
/// The class of whole pages.
pub(super) const WHOLE: usize = 0;

/// A slot that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// The first word of the object.
    pub(super) at: u64,
    pub(super) class: usize,
}

/// What freeing an object led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Freed {
    /// Nothing of that page lies there: the index is damaged, and so much memory is lost.
    NotThere,
    /// It is free.
    Done,
    /// It is free, and the compactor of this shard has work.
    Crowded(usize),
}

/// The lists of one shard.
#[derive(Debug)]
pub(super) struct Lists {
    /// The first chunk (plus one) of each list.
    pub(super) heads: [[u32; GROUPS]; CLASSES],
    /// Free slots in listed chunks.
    pub(super) free: [u32; CLASSES],
    /// Slots in listed chunks.
    pub(super) total: [u32; CLASSES],
}

/// Part of the chunks, for part of the processors.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) lists: Mutex<Lists>,
    pub(super) compactor: Mutex<Compactor>,
    /// A bit for each class that has slots to spare, and [`COMPACTING`]: whether looking closer makes sense.
    pub(super) wanting: AtomicU64,
}

/// The compactor of the shard has a chunk in hand.
pub(super) const COMPACTING: u64 = 1 << 63;

/// All chunks.
#[derive(Debug)]
pub(super) struct Slab {
    pub(super) chunk_words: u64,
    /// Words of a slot, by class.
    slot_words: [u64; CLASSES],
    /// The most bytes of an object, by class.
    room: [usize; CLASSES],
    chunks: u64,
    pub(super) store: Arena,
    pub(super) records: Arena,
    pool: FreeStack,
    /// Chunks from here on have never been used.
    pub(super) frontier: AtomicU64,
    shards: Vec<Padded<Shard>>,
    /// Objects the compactors have moved.
    #[cfg(test)]
    pub(super) moved: AtomicU64,
}

impl Slab {
    /// Chunks for pages of `page` bytes in at most `bytes` bytes.
    pub(super) fn new(bytes: u64, page: usize, shards: usize) -> Result<Slab, Errno> {
        let chunk_words = (CHUNK_PAGES * page / 8) as u64;
        let slot_words = SLOTS.map(|n| chunk_words / n as u64);
        let room = std::array::from_fn(|c| (slot_words[c] as usize - (c != WHOLE) as usize) * 8);
        let chunks = bytes / (chunk_words * 8 + RECORD_BYTES);
        // Links have 32 bits.
        if chunks >= u32::MAX as u64 {
            return Err(Errno::NOMEM);
        }
        let words = (chunks * chunk_words) as usize;
        let store = Arena::new(words, words)?;
        let records = Arena::new(chunks as usize * RECORD_WORDS, chunks as usize * RECORD_WORDS)?;
        store.use_base_pages();
        records.use_base_pages();
        let mut all = Vec::with_capacity_in(shards, Own);
        all.resize_with(shards, || {
            let lists = Lists { heads: [[0; GROUPS]; CLASSES], free: [0; CLASSES], total: [0; CLASSES] };
            let compactor = Mutex::new(Compactor::default());
            Padded(Shard { lists: Mutex::new(lists), compactor, wanting: AtomicU64::new(0) })
        });
        let (pool, frontier) = (FreeStack::new(), AtomicU64::new(0));
        Ok(Slab {
            chunk_words,
            slot_words,
            room,
            chunks,
            store,
            records,
            pool,
            frontier,
            shards: all,
            #[cfg(test)]
            moved: AtomicU64::new(0),
        })
    }

    /// What a chunk is charged: its memory and its record.
    pub(super) fn chunk_cost(&self) -> u64 {
        self.chunk_words * 8 + RECORD_BYTES
    }

    /// The most bytes that save memory against a whole page.
    pub(super) fn most(&self) -> usize {
        self.room[WHOLE + 1]
    }

    /// The class with the smallest slots that objects of `len` bytes fit into. `len` is at most a page.
    pub(super) fn class(&self, len: usize) -> usize {
        self.room.partition_point(|room| *room >= len) - 1
    }

    /// The most bytes of an object of `class`.
    pub(super) fn room(&self, class: usize) -> usize {
        self.room[class]
    }

    pub(super) fn shard(&self, shard: usize) -> &Shard {
        &self.shards[shard % self.shards.len()]
    }

    pub(super) fn shards(&self) -> usize {
        self.shards.len()
    }

    pub(super) fn record(&self, chunk: u32) -> Record<'_> {
        let first = chunk as usize * RECORD_WORDS;
        Record::new(&self.records.words()[first..first + RECORD_WORDS])
    }

    /// Slot `slot` of `chunk`, which is of `class`.
    pub(super) fn slot(&self, chunk: u32, class: usize, slot: u32) -> Slot {
        let first = chunk as u64 * self.chunk_words + slot as u64 * self.slot_words[class];
        Slot { at: first + (class != WHOLE) as u64, class }
    }

    /// The page (plus one) whose object was written to a slot last.
    pub(super) fn owner(&self, chunk: u32, class: usize, slot: u32) -> u64 {
        if class == WHOLE {
            return self.record(chunk).slots()[slot as usize].load(Relaxed);
        }
        self.store.at(self.slot(chunk, class, slot).at as usize - 1).load(Relaxed)
    }

    /// Takes a slot of `class` for an object of `page`: in shard `home` if there is memory for it, in any other if
    /// not.
    pub(super) fn alloc(&self, home: usize, class: usize, page: u64, account: &Account) -> Option<Slot> {
        let home = home % self.shards.len();
        let taken = self.take(&mut self.shards[home].lists.lock(), class, page);
        taken.or_else(|| self.claim(home, class, page, account)).or_else(|| self.scrape(home, class, class, page))
    }

    /// Takes a slot of any class from `largest` to `class`, in any shard; the smallest there is in the first shard
    /// that has one.
    pub(super) fn scrape(&self, home: usize, largest: usize, class: usize, page: u64) -> Option<Slot> {
        let shards = (0..self.shards.len()).map(|i| (home + i) % self.shards.len());
        shards
            .map(|shard| self.shards[shard].lists.lock())
            .find_map(|mut lists| (largest..=class).rev().find_map(|class| self.take(&mut lists, class, page)))
    }

    /// Takes a slot of `class` in the fullest chunk that has one.
    pub(super) fn take(&self, lists: &mut Lists, class: usize, page: u64) -> Option<Slot> {
        if lists.free[class] == 0 {
            return None;
        }
        let head = lists.heads[class].iter().rev().find(|head| **head != 0)?;
        self.take_of(lists, head - 1, class, page)
    }

    /// Takes a slot of a listed chunk, which is of `class`.
    fn take_of(&self, lists: &mut Lists, chunk: u32, class: usize, page: u64) -> Option<Slot> {
        let record = self.record(chunk);
        let slot = record.take_slot(class == WHOLE, SLOTS[class], page + 1)?;
        let state = record.state();
        record.set_state(state.with_live(state.live() + 1));
        lists.free[class] -= 1;
        self.regroup(lists, chunk);
        Some(self.slot(chunk, class, slot))
    }

    /// Brings a free chunk into use and takes its first slot.
    fn claim(&self, home: usize, class: usize, page: u64, account: &Account) -> Option<Slot> {
        if !account.charge(self.chunk_cost()) {
            return None;
        }
        let pooled = self.pool.pop(|i| self.record(i).pool());
        let chunk = pooled.or_else(|| {
            let fresh = |n| (n < self.chunks).then_some(n + 1);
            self.frontier.fetch_update(Relaxed, Relaxed, fresh).ok().map(|n| n as u32)
        });
        let Some(chunk) = chunk else {
            account.uncharge(self.chunk_cost());
            return None;
        };
        // All of it is charged and most of it will be written: one call is cheaper than a fault for each page.
        self.store.populate((chunk as u64 * self.chunk_words) as usize, self.chunk_words as usize);
        #[cfg(test)]
        super::check::reached(super::check::Point::Claimed, page);
        let mut lists = self.shards[home].lists.lock();
        self.record(chunk).clear();
        self.record(chunk).set_state(State::new(Phase::Listed, class, home));
        lists.free[class] += SLOTS[class];
        lists.total[class] += SLOTS[class];
        // Of this chunk and no other, although one may have got room meanwhile: a chunk goes back to the kernel with its last
        // object, so one that never had any would stay.
        self.take_of(&mut lists, chunk, class, page)
    }

    /// Frees the object of `page` at `at`.
    pub(super) fn free(&self, page: u64, at: u64, account: &Account) -> Freed {
        let chunk = at / self.chunk_words;
        if chunk >= self.chunks {
            return Freed::NotThere;
        }
        let (chunk, within) = (chunk as u32, at % self.chunk_words);
        let record = self.record(chunk);
        // While the object is there the chunk stays what it is. If it is not there, anything may happen to it
        // until the shard is locked, and in a damaged index even then.
        let shard = record.state().shard() % self.shards.len();
        let mut lists = self.shards[shard].lists.lock();
        let state = record.state();
        let class = state.class();
        if state.phase() == Phase::Free || state.shard() != shard || class >= CLASSES {
            return Freed::NotThere;
        }
        let Some(within) = within.checked_sub((class != WHOLE) as u64) else { return Freed::NotThere };
        let slot = (within / self.slot_words[class]) as u32;
        if within % self.slot_words[class] != 0
            || slot >= SLOTS[class]
            || self.owner(chunk, class, slot) != page + 1
            || !record.give_slot(class == WHOLE, slot)
        {
            return Freed::NotThere;
        }
        record.set_state(state.with_live(state.live() - 1));
        if state.phase() == Phase::Listed {
            lists.free[class] += 1;
            if state.live() == 1 {
                self.unlist(&mut lists, chunk);
                drop(lists);
                self.release(chunk, account);
            } else {
                self.regroup(&mut lists, chunk);
                if lists.crowded(class) {
                    self.shards[shard].wanting.fetch_or(1 << class, Relaxed);
                }
            }
        }
        // A chunk that the compactor has in hand is released by the compactor, even when nothing is left in it.
        match self.shards[shard].wanting.load(Relaxed) {
            0 => Freed::Done,
            _ => Freed::Crowded(shard),
        }
    }

    /// Takes a listed chunk out of the lists and their sums, and leaves it free but not in the pool.
    pub(super) fn unlist(&self, lists: &mut Lists, chunk: u32) {
        let record = self.record(chunk);
        self.unlink(lists, chunk);
        let state = record.state();
        let (class, slots) = (state.class(), SLOTS[state.class()]);
        lists.free[class] -= slots - state.live();
        lists.total[class] -= slots;
        record.set_state(state.with_phase(Phase::Free));
    }

    /// Gives the memory of a chunk that is free back to the kernel, and the chunk to whoever needs one next.
    pub(super) fn release(&self, chunk: u32, account: &Account) {
        // When the kernel keeps it, there are no more chunks than there may be all the same.
        self.store.discard((chunk as u64 * self.chunk_words) as usize, self.chunk_words as usize);
        self.pool.push(chunk, self.record(chunk).pool());
        account.uncharge(self.chunk_cost());
    }

    /// Puts a listed chunk into the list that it belongs to by how full it is.
    fn regroup(&self, lists: &mut Lists, chunk: u32) {
        let state = self.record(chunk).state();
        let slots = SLOTS[state.class()];
        let group =
            if state.live() == slots { UNLINKED } else { (state.live() as usize * GROUPS / slots as usize) as u64 };
        if state.group() != group {
            self.unlink(lists, chunk);
            self.link(lists, chunk, group);
        }
    }

    fn unlink(&self, lists: &mut Lists, chunk: u32) {
        let record = self.record(chunk);
        let state = record.state();
        if state.group() == UNLINKED {
            return;
        }
        let (before, after) = record.links();
        match before {
            0 => lists.heads[state.class()][state.group() as usize] = after,
            before => self.record(before - 1).set_after(after),
        }
        if after != 0 {
            self.record(after - 1).set_before(before);
        }
        record.set_state(state.with_group(UNLINKED));
    }

    fn link(&self, lists: &mut Lists, chunk: u32, group: u64) {
        let record = self.record(chunk);
        record.set_state(record.state().with_group(group));
        if group == UNLINKED {
            return;
        }
        let head = &mut lists.heads[record.state().class()][group as usize];
        let after = std::mem::replace(head, chunk + 1);
        record.set_links(0, after);
        if after != 0 {
            self.record(after - 1).set_before(chunk + 1);
        }
    }

    /// The emptiest chunk of `class`, out of the lists: nobody takes slots of it any more.
    pub(super) fn isolate(&self, lists: &mut Lists, class: usize) -> Option<u32> {
        let chunk = lists.heads[class].iter().find(|head| **head != 0)? - 1;
        self.unlist(lists, chunk);
        let record = self.record(chunk);
        record.set_state(record.state().with_phase(Phase::Isolated));
        Some(chunk)
    }

    /// Puts an isolated chunk that is not empty back into the lists; among the fullest, so that it is filled up
    /// and not isolated again at once.
    pub(super) fn relist(&self, lists: &mut Lists, chunk: u32) {
        let record = self.record(chunk);
        let state = record.state();
        let (class, slots) = (state.class(), SLOTS[state.class()]);
        record.set_state(state.with_phase(Phase::Listed));
        lists.free[class] += slots - state.live();
        lists.total[class] += slots;
        let full = state.live() == slots;
        self.link(lists, chunk, if full { UNLINKED } else { GROUPS as u64 - 1 });
    }

    /// Writes the object of `page` to a slot that was taken for it.
    pub(super) fn write(&self, slot: Slot, page: u64, bytes: &[u8]) {
        let at = slot.at as usize;
        let words = &self.store.words()[at..at + bytes.len().div_ceil(8)];
        // Whoever reads any of what follows in place of an object that was here before, sees afterwards (by an
        // Acquire fence) that its page has gone elsewhere.
        fence(Ordering::Release);
        if slot.class != WHOLE {
            self.store.at(at - 1).store(page + 1, Relaxed);
        }
        let whole = bytes.chunks_exact(8);
        let tail = whole.remainder();
        for (word, bytes) in words.iter().zip(whole) {
            word.store(u64::from_ne_bytes(bytes.try_into().expect("eight bytes")), Relaxed);
        }
        if let (false, Some(word)) = (tail.is_empty(), words.last()) {
            let mut last = [0; 8];
            last[..tail.len()].copy_from_slice(tail);
            word.store(u64::from_ne_bytes(last), Relaxed);
        }
    }

    /// Copies the object of `page`, of `len` bytes, from one slot to another.
    pub(super) fn copy(&self, from: Slot, to: Slot, page: u64, len: usize) {
        let words = self.store.words();
        fence(Ordering::Release); // as in write
        if to.class != WHOLE {
            words[to.at as usize - 1].store(page + 1, Relaxed);
        }
        let n = len.div_ceil(8);
        let (from, to) = (&words[from.at as usize..][..n], &words[to.at as usize..][..n]);
        from.iter().zip(to).for_each(|(from, to)| to.store(from.load(Relaxed), Relaxed));
    }

    /// Reads `to.len()` bytes, whole words, from word `at` on. False beyond the end.
    #[must_use]
    pub(super) fn read(&self, at: u64, to: &mut [u8]) -> bool {
        let Some(from) = self.store.words().get(at as usize..).and_then(|w| w.get(..to.len() / 8)) else {
            return false;
        };
        for (to, from) in to.chunks_exact_mut(8).zip(from) {
            to.copy_from_slice(&from.load(Relaxed).to_ne_bytes());
        }
        true
    }
}

impl Lists {
    /// Whether `class` has room for all objects of one of its chunks in its other chunks.
    pub(super) fn can_shrink(&self, class: usize) -> bool {
        self.free[class] >= SLOTS[class]
    }

    /// Whether so much of `class` is free that it pays to move objects together: a quarter.
    pub(super) fn crowded(&self, class: usize) -> bool {
        self.can_shrink(class) && self.free[class] as u64 * 4 >= self.total[class] as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_close_together_and_fill_their_chunks() {
        for page in [4096, 16384, 65536] {
            let slab = Slab::new(64 << 20, page, 1).unwrap();
            assert_eq!((slab.room(WHOLE), SLOTS[CLASSES - 1]), (page, 1024));
            for (pair, slots) in slab.slot_words.windows(2).zip(&SLOTS[1..]) {
                let [larger, size] = pair else { unreachable!() };
                let most = if *slots <= 64 {
                    16
                } else if *slots <= 512 {
                    8
                } else {
                    2
                };
                assert!(size < larger && larger - size <= larger / most + 1, "{size} words after {larger}");
                // Small slots are cut to whole words.
                assert!(slab.chunk_words - size * *slots as u64 <= slab.chunk_words / 24);
            }
            for len in 1..=page {
                let class = slab.class(len);
                assert!(slab.room(class) >= len);
                assert!(class + 1 == CLASSES || slab.room(class + 1) < len, "{len} bytes in class {class}");
            }
        }
    }

    #[test]
    fn a_slot_is_its_pages_until_it_is_freed() {
        let slab = Slab::new(64 << 20, 4096, 2).unwrap();
        let account = Account::new(64 << 20);
        for len in [1, 7, 8, 100, 2000, slab.most(), 4096] {
            let bytes: std::vec::Vec<u8> = (0..len).map(|i| i as u8).collect();
            let slot = slab.alloc(1, slab.class(len), 5, &account).unwrap();
            slab.write(slot, 5, &bytes);
            let mut to = vec![0; len.next_multiple_of(8)];
            assert!(slab.read(slot.at, &mut to));
            assert_eq!(to[..len], bytes);
            // Only the right page, at the right place, once.
            assert_eq!(slab.free(6, slot.at, &account), Freed::NotThere);
            assert_eq!(slab.free(5, slot.at + 1, &account), Freed::NotThere);
            assert_eq!(slab.free(5, 1 << 40, &account), Freed::NotThere);
            assert_eq!(slab.free(5, slot.at, &account), Freed::Done);
            assert_eq!(slab.free(5, slot.at, &account), Freed::NotThere);
            assert_eq!(account.usage().used_bytes, 0);
        }
        assert!(!slab.read(1 << 40, &mut [0; 8]));
    }
}
