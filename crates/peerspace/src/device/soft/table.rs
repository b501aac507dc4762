//! The page table of a device: four levels of 512 entries. A block (512 pages) is one entry in the second level from
//! below, or has a table of its pages.
//!
//! ```text
//!   page number: 9 bits  root    -> upper table
//!                9 bits  upper   -> table of blocks
//!                9 bits  blocks  :  an entry for the whole block, and beside it the way to a table of its pages
//!                9 bits  pages   :  an entry
//! ```
//!
//! Lanes walk it without a lock; changes are made under a lock of the owner's. A table, once there, stays where it is until the
//! device goes, so that a walk never leads anywhere else: also that of the pages of a block that is mapped as a whole by
//! now. While the entry of a block is valid, those of its pages are not.
//!
//! The tables are in a mapping of our own.

use peerspace_core::sync::{AtomicU64, Ordering};
use peerspace_core::words::Words;
use peerspace_os::Trouble;
use peerspace_os::linux::map::Arena;
use std::ops::Range;

use crate::device::mmu::Target;

/// Entries of a table, and pages of a block.
pub(super) const FANOUT: u64 = 512;
/// Page numbers that can be translated.
pub(super) const PAGES: u64 = FANOUT * FANOUT * FANOUT * FANOUT;
/// Tables there can be: 1 GiB of them, enough for the pages of 512 GiB.
pub(super) const TABLES: usize = 1 << 18;

/// A translation, as a word. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pte(pub(super) u64);

impl Pte {
    const VALID: u64 = 1;
    const WRITABLE: u64 = 2;
    const ACCESSED: u64 = 4;
    const KIND: u64 = 3 << 3;
    const OWN: u64 = 0;
    const HOST: u64 = 1 << 3;
    const ZERO: u64 = 2 << 3;
    const PAGE_SHIFT: u32 = 12;

    pub(super) fn new(to: Target, writable: bool) -> Pte {
        let to = match to {
            Target::Own(page) => Self::OWN | page << Self::PAGE_SHIFT,
            Target::Host => Self::HOST,
            Target::Zero => Self::ZERO,
        };
        Pte(Self::VALID | to | if writable { Self::WRITABLE } else { 0 })
    }

    #[inline]
    pub(super) fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    #[inline]
    pub(super) fn writable(self) -> bool {
        self.0 & Self::WRITABLE != 0
    }

    #[inline]
    pub(super) fn accessed(self) -> bool {
        self.0 & Self::ACCESSED != 0
    }

    #[inline]
    pub(super) fn to(self) -> Target {
        match self.0 & Self::KIND {
            Self::OWN => Target::Own(self.0 >> Self::PAGE_SHIFT),
            Self::HOST => Target::Host,
            _ => Target::Zero,
        }
    }

    /// The translation of the page with this number in a block, from that of the block.
    #[inline]
    pub(super) fn of_block(self, page: u64) -> Pte {
        if self.0 & Self::KIND == Self::OWN { Pte(self.0 + (page << Self::PAGE_SHIFT)) } else { self }
    }

    /// The same but for whether it was used.
    fn same(self, other: Pte) -> bool {
        (self.0 ^ other.0) & !Self::ACCESSED == 0
    }

    /// Whatever was permitted by `self` is by `now`, at the same place.
    fn stays_in(self, now: Pte) -> bool {
        self.same(now) || self.same(Pte(now.0 & !Self::WRITABLE))
    }
}

/// An entry that a walk has found.
pub(super) struct Found<'a> {
    word: &'a AtomicU64,
    /// What was in it.
    pub(super) pte: Pte,
    /// It is that of a block.
    pub(super) block: bool,
}

impl Found<'_> {
    /// Notes that it was used. False when it is not as it was found.
    pub(super) fn mark_accessed(&self) -> bool {
        // Release: nothing is published by it; it takes the place of the word that `set` has released.
        self.pte.accessed()
            || self
                .word
                .compare_exchange(self.pte.0, self.pte.0 | Pte::ACCESSED, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// Whether it is as it was found.
    pub(super) fn is_still(&self) -> bool {
        self.pte.same(Pte(self.word.load(Ordering::Relaxed)))
    }
}

/// There is no room for another table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoTable;

/// A table. The functions that change it are called by one thread at a time.
#[derive(Debug)]
pub(super) struct Table {
    words: Arena,
    /// Tables that are in use; the first is the root.
    used: AtomicU64,
    tables: u64,
}

impl Table {
    /// An empty one, of at most so many tables.
    pub(super) fn new(tables: usize) -> Result<Table, Trouble> {
        let words = Arena::new(tables * FANOUT as usize, FANOUT as usize).map_err(|_| Trouble::NoMemory)?;
        Ok(Table { words, used: AtomicU64::new(1), tables: tables as u64 })
    }

    /// Bytes of tables.
    pub(super) fn bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed) * FANOUT * 8
    }

    #[inline]
    fn word(&self, table: u64, at: u64) -> &AtomicU64 {
        self.words.at((table * FANOUT + at % FANOUT) as usize)
    }

    #[inline]
    fn next(&self, table: u64, at: u64) -> Option<u64> {
        // Acquire: pairs with the Release in `make`, so the table it leads to is there, and usable.
        Some(self.word(table, at).load(Ordering::Acquire)).filter(|next| *next != 0)
    }

    /// The table of blocks for `page`.
    #[inline]
    fn blocks(&self, page: u64) -> Option<u64> {
        let upper = self.next(0, page / FANOUT.pow(3))?;
        self.next(upper, page / FANOUT.pow(2))
    }

    /// The way from a table of blocks to those of pages is in the table that follows it.
    #[inline]
    fn pages(&self, blocks: u64, page: u64) -> Option<u64> {
        self.next(blocks + 1, page / FANOUT)
    }

    /// The translation of `page`, which is below [`PAGES`].
    #[inline]
    pub(super) fn walk(&self, page: u64) -> Option<Found<'_>> {
        let blocks = self.blocks(page)?;
        let found = |word: &AtomicU64, block| {
            // Acquire: pairs with the Release in `set`: what was done before it was entered is seen by whoever uses it.
            let pte = Pte(word.load(Ordering::Acquire));
            pte.is_valid().then_some((pte, block))
        };
        let word = self.word(blocks, page / FANOUT);
        if let Some((pte, block)) = found(word, true) {
            return Some(Found { word, pte, block });
        }
        let word = self.word(self.pages(blocks, page)?, page);
        found(word, false).map(|(pte, block)| Found { word, pte, block })
    }

    /// The table that `table` leads to from `at`; made of `count` tables in a row if there is none.
    fn make(&self, table: u64, at: u64, count: u64) -> Result<u64, NoTable> {
        if let Some(next) = self.next(table, at) {
            return Ok(next);
        }
        let new = self.used.load(Ordering::Relaxed);
        if new + count > self.tables {
            return Err(NoTable);
        }
        self.words.grow(((new + count) * FANOUT) as usize).map_err(|_| NoTable)?;
        self.used.store(new + count, Ordering::Relaxed);
        // Release: pairs with the Acquire in `next`. The words are zeros.
        self.word(table, at).store(new, Ordering::Release);
        Ok(new)
    }

    /// Enters a translation for `page`, or for the block that begins there. The result: pages whose translations from
    /// before are not part of it, and must not be used any more.
    pub(super) fn set(&self, page: u64, block: bool, pte: Pte) -> Result<Option<Range<u64>>, NoTable> {
        let upper = self.make(0, page / FANOUT.pow(3), 1)?;
        let blocks = self.make(upper, page / FANOUT.pow(2), 2)?;
        let whole = page / FANOUT * FANOUT..(page / FANOUT + 1) * FANOUT;
        let of_block = self.word(blocks, page / FANOUT);
        let (word, gone) = if block {
            let pages = self.pages(blocks, page);
            let gone = pages.map(|pages| whole.clone().filter(|p| take(self.word(pages, *p))).count());
            (of_block, gone.is_some_and(|gone| gone > 0))
        } else {
            let pages = self.make(blocks + 1, page / FANOUT, 1)?;
            (self.word(pages, page), take(of_block))
        };
        // Release: pairs with the Acquire in `walk`.
        let old = Pte(word.swap(pte.0, Ordering::AcqRel));
        let replaced = old.is_valid() && !old.stays_in(pte);
        Ok(if gone || (block && replaced) { Some(whole) } else { replaced.then_some(page..page + 1) })
    }

    /// Takes all translations of `pages` away; blocks as a whole. The pages that are concerned: those, and the rest of their
    /// blocks.
    pub(super) fn clear(&self, pages: Range<u64>) -> Range<u64> {
        let mut all = pages.clone();
        self.each(pages, |word, first, block| {
            if take(word) && block {
                all = all.start.min(first)..all.end.max(first + FANOUT);
            }
        });
        all
    }

    /// Forgets which of these were used. Whether any was.
    pub(super) fn take_accessed(&self, pages: Range<u64>) -> bool {
        let mut any = false;
        self.each(pages, |word, _, _| {
            if Pte(word.load(Ordering::Relaxed)).accessed() {
                any |= Pte(word.fetch_and(!Pte::ACCESSED, Ordering::Relaxed)).is_valid();
            }
        });
        any
    }

    /// Calls `f` for each entry that may be valid, with its first page and whether it is that of a block.
    fn each(&self, pages: Range<u64>, mut f: impl FnMut(&AtomicU64, u64, bool)) {
        let end = pages.end.min(PAGES);
        let mut page = pages.start;
        // The first page after the `size` pages that `page` is in.
        let after = |page: u64, size: u64| (page / size + 1) * size;
        while page < end {
            let Some(upper) = self.next(0, page / FANOUT.pow(3)) else {
                page = after(page, FANOUT.pow(3));
                continue;
            };
            let Some(blocks) = self.next(upper, page / FANOUT.pow(2)) else {
                page = after(page, FANOUT.pow(2));
                continue;
            };
            f(self.word(blocks, page / FANOUT), page / FANOUT * FANOUT, true);
            let next = after(page, FANOUT);
            if let Some(table) = self.pages(blocks, page) {
                (page..next.min(end)).for_each(|p| f(self.word(table, p), p, false));
            }
            page = next;
        }
    }
}

/// Clears an entry. Whether it was valid.
fn take(word: &AtomicU64) -> bool {
    // A lane can do no more to an entry than mark it as used, by an exchange that fails once it is cleared.
    word.load(Ordering::Relaxed) != 0 && Pte(word.swap(0, Ordering::AcqRel)).is_valid()
}
