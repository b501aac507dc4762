//! Moving objects together, so that memory of freed pages goes back to the kernel although it was scattered.
//!
//! When a quarter of a class's slots is free, its emptiest chunk is *isolated*: nobody takes slots of it any more,
//! and its objects are moved to the fullest chunks of the class, until it is empty and can be released. A free
//! page pays for at most [`MOVES`] moves (one would do to keep up), so a call is never held up for long, and the
//! work of one chunk is spread over many calls.
//!
//! # Locks
//!
//! A shard's compactor is locked by trying only: whoever finds it busy leaves the work to the one who is at it.
//! Under it the shard's lists are locked for instructions at a time; never while bytes are copied.
//!
//! # Why moving is safe
//!
//! The object in a slot of an isolated chunk belongs to the page that the slot names, if that page's index word
//! names the slot; the move is done when that very word is exchanged for one that names the new slot. Meanwhile
//! the page may be loaded (its bytes are in both places until the exchange, and afterwards the checksum sends the
//! reader to look again), freed or stored anew (then the exchange fails, and the new slot is given back). The word
//! cannot have become the same again in between, because no slot of an isolated chunk is taken.

use super::account::Account;
use super::index::{Held, Index};
use super::record::Phase;
use super::slab::{CLASSES, COMPACTING, Freed, SLOTS, Shard, Slab, WHOLE};
use peerspace_core::sync::Ordering::Relaxed;

/// Objects moved for each page that is freed.
pub(super) const MOVES: usize = 2;

/// The compactor of one shard.
#[derive(Debug, Default)]
pub(super) struct Compactor {
    /// The isolated chunk, its class, and the slot to look at next.
    at_work: Option<(u32, usize, u32)>,
}

impl Slab {
    /// Moves up to `moves` objects of a shard that has room to spare.
    pub(super) fn compact(&self, shard: usize, moves: usize, index: &Index, account: &Account) {
        let shard = self.shard(shard);
        let Some(mut compactor) = shard.compactor.try_lock() else { return };
        let mut left = moves;
        loop {
            let Some((chunk, class, from)) = compactor.at_work.or_else(|| self.next_chunk(shard)) else { return };
            let record = self.record(chunk);
            let slot = record.next_taken(class == WHOLE, SLOTS[class], from);
            compactor.at_work = match slot {
                Some(slot) if left > 0 => {
                    left -= 1;
                    let room = self.move_object(shard, chunk, class, slot, index, account);
                    Some((chunk, class, if room { slot + 1 } else { SLOTS[class] }))
                }
                Some(slot) => {
                    compactor.at_work = Some((chunk, class, slot));
                    return;
                }
                None => {
                    self.finish(shard, chunk, account);
                    None
                }
            };
            if compactor.at_work.is_none() && left == 0 {
                return;
            }
        }
    }

    /// Isolates the next chunk worth emptying.
    fn next_chunk(&self, shard: &Shard) -> Option<(u32, usize, u32)> {
        loop {
            let class = (shard.wanting.load(Relaxed) & !COMPACTING).trailing_zeros() as usize;
            if class >= CLASSES {
                return None;
            }
            let mut lists = shard.lists.lock();
            if lists.can_shrink(class)
                && let Some(chunk) = self.isolate(&mut lists, class)
            {
                shard.wanting.fetch_or(COMPACTING, Relaxed);
                return Some((chunk, class, 0));
            }
            shard.wanting.fetch_and(!(1 << class), Relaxed);
        }
    }

    /// Moves the object in one slot of an isolated chunk elsewhere, if there is one to move. False if there is no
    /// room elsewhere.
    fn move_object(
        &self,
        shard: &Shard,
        chunk: u32,
        class: usize,
        slot: u32,
        index: &Index,
        account: &Account,
    ) -> bool {
        let from = self.slot(chunk, class, slot);
        // What is not in the index yet, or no longer, is somebody else's business.
        let Some(page) = self.owner(chunk, class, slot).checked_sub(1).filter(|page| *page < index.pages()) else {
            return true;
        };
        let place = match index.word(page).read() {
            Held::Bytes(place) if place.at == from.at && place.len <= self.room(class) => place,
            _ => return true,
        };
        let Some(to) = self.take(&mut shard.lists.lock(), class, page) else { return false };
        self.copy(from, to, page, place.len);
        #[cfg(test)]
        super::check::reached(super::check::Point::Copied, page);
        let moved = index.moved(page, place, to.at);
        #[cfg(test)]
        self.moved.fetch_add(moved as u64, Relaxed);
        let left = if moved { from } else { to };
        let freed = self.free(page, left.at, account);
        debug_assert_ne!(freed, Freed::NotThere);
        true
    }

    /// The compactor is done with a chunk: releases it if it is empty.
    fn finish(&self, shard: &Shard, chunk: u32, account: &Account) {
        let mut lists = shard.lists.lock();
        let record = self.record(chunk);
        let state = record.state();
        shard.wanting.fetch_and(!COMPACTING, Relaxed);
        if state.live() == 0 {
            record.set_state(state.with_phase(Phase::Free));
            drop(lists);
            self.release(chunk, account);
        } else {
            // Objects that were about to be stored when we passed, or whose pages are damaged.
            self.relist(&mut lists, chunk);
        }
    }

    /// Tries harder to get a chunk free, when no more can be had: moves up to `moves` objects of one class that
    /// has room for them, however little else is free.
    pub(super) fn squeeze(&self, home: usize, moves: usize, index: &Index, account: &Account) {
        for i in 0..self.shards() {
            let number = (home + i) % self.shards();
            let shard = self.shard(number);
            let lists = shard.lists.lock();
            let class = (0..CLASSES).find(|class| lists.can_shrink(*class));
            drop(lists);
            let wanting = class.map_or(0, |class| 1 << class);
            if shard.wanting.fetch_or(wanting, Relaxed) | wanting == 0 {
                continue;
            }
            self.compact(number, moves, index, account);
            return;
        }
    }
}
