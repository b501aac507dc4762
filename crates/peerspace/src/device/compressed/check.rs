//! For tests: the invariants of the store, executable, and hooks that damage it or step in between.
//!
//! A check is for a store at rest: it takes the locks one by one and compares what it sees.

use super::Compressed;
use super::index::{Held, Index};
use super::record::{GROUPS, Phase, UNLINKED};
use super::slab::{CLASSES, SLOTS, Slab, WHOLE};
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_core::words::Words;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

/// Where a test can step in, to have happen in between what is hardly ever hit by chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// A reader knows where a page is, and has not read it yet.
    Found,
    /// The compactor has copied an object, and its page does not know yet.
    Copied,
    /// A chunk was found for a page, and is in no list yet.
    Claimed,
}

type Step = (Point, Box<dyn FnOnce(u64)>);

thread_local! {
    static NEXT: RefCell<Option<Step>> = const { RefCell::new(None) };
}

/// Has this thread do something when it reaches `point` next; with the page that it is about.
pub(super) fn at(point: Point, step: impl FnOnce(u64) + 'static) {
    NEXT.set(Some((point, Box::new(step))));
}

pub(super) fn reached(point: Point, page: u64) {
    if let Some((_, step)) = NEXT.with_borrow_mut(|next| next.take_if(|(at, _)| *at == point)) {
        step(page);
    }
}

impl Compressed {
    /// Panics unless books, index and account agree. Returns how many objects belong to no page; none, unless the
    /// index was damaged.
    pub(super) fn check(&self) -> u64 {
        let (objects, leaves) = self.index.check();
        let (chunks, lost) = self.slab.check(&objects);
        let used = chunks * self.slab.chunk_cost() + leaves * rustix::param::page_size() as u64;
        assert_eq!(self.account.usage().used_bytes, used, "{chunks} chunks, {leaves} leaves");
        assert!(used <= self.account.limit());
        lost
    }

    /// Addresses of everything that is charged.
    pub(super) fn charged(&self) -> [Range<usize>; 3] {
        let range = |words: &[_]| {
            let range = words.as_ptr_range();
            range.start as usize..range.end as usize
        };
        [range(self.slab.store.words()), range(self.slab.records.words()), range(self.index.words.words())]
    }

    /// Where the object of `page` is: its first word, and its bytes.
    pub(super) fn object(&self, page: u64) -> Option<(u64, usize)> {
        match self.index.word(page).read() {
            Held::Bytes(place) => Some((place.at, place.len)),
            _ => None,
        }
    }

    /// The chunk that a word of the store lies in.
    pub(super) fn chunk_of(&self, at: u64) -> u64 {
        at / self.slab.chunk_words
    }

    /// Flips bits of a stored word.
    pub(super) fn damage_store(&self, at: u64, bits: u64) {
        self.slab.store.at(at as usize).fetch_xor(bits, Relaxed);
    }

    /// Flips bits of the two words of a page.
    pub(super) fn damage_index(&self, page: u64, first: u64, second: u64) {
        self.index.words.at(page as usize * 2).fetch_xor(first, Relaxed);
        self.index.words.at(page as usize * 2 + 1).fetch_xor(second, Relaxed);
    }
}

impl Index {
    /// The page of each object, by place; and how many leaves there are.
    fn check(&self) -> (HashMap<u64, u64>, u64) {
        let mut objects = HashMap::new();
        let mut leaves = 0;
        for (i, leaf) in self.leaves.words().iter().enumerate() {
            let pages = (i as u64 * self.per_leaf)..((i as u64 + 1) * self.per_leaf).min(self.pages());
            let expected = leaf.load(Relaxed);
            if expected == 0 {
                continue; // looking at it would take up memory
            }
            leaves += 1;
            let held = pages.filter(|page| match self.word(*page).read() {
                Held::Nothing => false,
                Held::Bytes(place) => {
                    assert_eq!(objects.insert(place.at, *page), None, "two pages at {:#x}", place.at);
                    true
                }
                Held::Same | Held::Nonsense => true,
            });
            assert_eq!(held.count() as u64, expected, "pages in leaf {i}");
        }
        (objects, leaves)
    }
}

impl Slab {
    /// Checks that `objects` are in chunks. Returns how many chunks are in use, and what else is in them.
    fn check(&self, objects: &HashMap<u64, u64>) -> (u64, u64) {
        let mut free = vec![[0; CLASSES]; self.shards()];
        let mut total = vec![[0; CLASSES]; self.shards()];
        let mut linked = vec![[[0; GROUPS]; CLASSES]; self.shards()];
        let (mut chunks, mut all, mut found) = (0, 0, 0);
        for chunk in 0..self.frontier.load(Relaxed) as u32 {
            let record = self.record(chunk);
            let state = record.state();
            let (class, shard) = (state.class(), state.shard());
            if state.phase() == Phase::Free {
                continue;
            }
            chunks += 1;
            let mut live = 0;
            let mut from = 0;
            while let Some(slot) = record.next_taken(class == WHOLE, SLOTS[class], from) {
                from = slot + 1;
                live += 1;
                all += 1;
                let at = self.slot(chunk, class, slot).at;
                found += objects.contains_key(&at) as u64;
            }
            assert_eq!(live, state.live(), "objects in chunk {chunk}");
            if state.phase() == Phase::Listed {
                assert!(live > 0, "chunk {chunk} is empty and not released");
                free[shard][class] += SLOTS[class] - live;
                total[shard][class] += SLOTS[class];
                assert_eq!(state.group() == UNLINKED, live == SLOTS[class], "chunk {chunk} in its list");
                if state.group() != UNLINKED {
                    linked[shard][class][state.group() as usize] += 1;
                }
            }
        }
        for i in 0..self.shards() {
            let lists = self.shard(i).lists.lock();
            assert_eq!((lists.free, lists.total), (free[i], total[i]), "shard {i}");
            for (class, heads) in lists.heads.iter().enumerate() {
                for (group, head) in heads.iter().enumerate() {
                    let (mut next, mut before, mut n) = (*head, 0, 0);
                    while next != 0 {
                        let record = self.record(next - 1);
                        assert_eq!(record.links().0, before);
                        assert_eq!((record.state().class(), record.state().group()), (class, group as u64));
                        (before, next, n) = (next, record.links().1, n + 1);
                    }
                    assert_eq!(n, linked[i][class][group], "list {group} of class {class}");
                }
            }
        }
        assert_eq!(found, objects.len() as u64, "objects in the index");
        (chunks, all - found)
    }
}
