//! The page table of a device: an entry for each page, in tables of 512 that are made when they are first needed.
//!
//! A device has one table for all files that are open on it, since where a page is does not depend on who asks. But each file
//! has its own view: an entry says in a bit of its own which of them have come upon it, and to the others it is as if it
//! were not there yet. So each file counts its own faults.
//!
//! ```text
//!   63 .. 36   files that have come upon it: one bit each
//!   35 ..  8   page of the device's memory
//!    6 ..  5   what it leads to
//!    4         part of a block that was entered as a whole, and goes as a whole
//!    3         exclusive to the device
//!    2         used since somebody asked
//!    1         writable
//!    0         valid
//! ```
//!
//! Entries change under the lock of the device, with its gate closed; but their bits for *used*, *exclusive* and the files are set, each by
//! itself, by whoever is inside. A table, once there, stays.

use peerspace::device::mmu::Target;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Entries of a table, and pages of a block.
pub(crate) const FANOUT: u64 = 512;
/// Pages that can be translated: addresses of 47 bits, with pages of 4 KiB.
pub(crate) const PAGES: u64 = 1 << 35;
/// Bits for files.
pub(crate) const SLOTS: u32 = 28;
/// The most pages that the memory of a device can have.
pub(crate) const MOST_PAGES: u64 = 1 << 28;

/// One file's bit. Files beyond the last share that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) u32);

impl Slot {
    fn bit(self) -> u64 {
        1 << (36 + self.0.min(SLOTS - 1))
    }
}

/// A translation; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    const VALID: u64 = 1;
    const WRITABLE: u64 = 2;
    const USED: u64 = 4;
    const EXCLUSIVE: u64 = 8;
    const BLOCK: u64 = 16;
    const KIND: u64 = 3 << 5;
    const OWN: u64 = 0;
    const HOST: u64 = 1 << 5;
    const ZERO: u64 = 2 << 5;
    const PAGE_SHIFT: u32 = 8;

    /// A translation that no file has come upon yet.
    pub(crate) fn new(to: Target, writable: bool, block: bool) -> Entry {
        let to = match to {
            Target::Own(page) => Self::OWN | page << Self::PAGE_SHIFT,
            Target::Host => Self::HOST,
            Target::Zero => Self::ZERO,
        };
        let flag = |on: bool, flag: u64| if on { flag } else { 0 };
        Entry(Self::VALID | to | flag(writable, Self::WRITABLE) | flag(block, Self::BLOCK))
    }

    pub(crate) fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    pub(crate) fn is_exclusive(self) -> bool {
        self.0 & (Self::VALID | Self::EXCLUSIVE) == Self::VALID | Self::EXCLUSIVE
    }

    /// Where it leads, if it permits the access.
    pub(crate) fn target(self, write: bool) -> Option<Target> {
        if !self.is_valid() || write && self.0 & Self::WRITABLE == 0 {
            return None;
        }
        Some(match self.0 & Self::KIND {
            Self::OWN => Target::Own((self.0 >> Self::PAGE_SHIFT) & (MOST_PAGES - 1)),
            Self::HOST => Target::Host,
            _ => Target::Zero,
        })
    }

    pub(crate) fn is_known_to(self, slot: Slot) -> bool {
        self.0 & slot.bit() != 0
    }
}

type Leaf = [AtomicU64; FANOUT as usize];
type Directory<T> = [OnceLock<Box<T>>; FANOUT as usize];

fn directory<T>() -> Directory<T> {
    [const { OnceLock::new() }; FANOUT as usize]
}

/// The table. Whoever [sets](Table::set) and [clears](Table::clear) has locked the device, and closed its gate.
pub(crate) struct Table(Directory<Directory<Directory<Leaf>>>);

impl Table {
    pub(crate) fn new() -> Table {
        Table(directory())
    }

    fn leaf(&self, page: u64) -> Option<&Leaf> {
        if page >= PAGES {
            return None;
        }
        let at = |level: u32| ((page >> (9 * level)) % FANOUT) as usize;
        self.0[at(3)].get()?[at(2)].get()?[at(1)].get().map(|leaf| &**leaf)
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        Some(&self.leaf(page)?[(page % FANOUT) as usize])
    }

    /// The translation of `page`; an invalid one if there is none.
    pub(crate) fn entry(&self, page: u64) -> Entry {
        Entry(self.word(page).map_or(0, |word| word.load(Relaxed)))
    }

    /// Enters a translation, of a page that can have one.
    pub(crate) fn set(&self, page: u64, entry: Entry) {
        let at = |level: u32| ((page >> (9 * level)) % FANOUT) as usize;
        let upper = self.0[at(3)].get_or_init(|| Box::new(directory()));
        let lower = upper[at(2)].get_or_init(|| Box::new(directory()));
        let leaf = lower[at(1)].get_or_init(|| Box::new([const { AtomicU64::new(0) }; FANOUT as usize]));
        let word = &leaf[(page % FANOUT) as usize];
        let old = Entry(word.load(Relaxed));
        // Who has come upon the page as it is has come upon more of it, or upon the same that may be read and no more.
        let known = match old.target(false) == entry.target(false) {
            true => old.0 & (!0 << 36),
            false => 0,
        };
        word.store(entry.0 | known, Relaxed);
    }

    /// A file has come upon the translation of `page`, if there is one that permits the access. Whether there is.
    pub(crate) fn meet(&self, page: u64, slot: Slot, write: bool) -> bool {
        self.mark(page, slot.bit(), |entry| entry.target(write).is_some())
    }

    /// The translation of `page` was used.
    pub(crate) fn note_use(&self, page: u64) {
        let used = |entry: Entry| entry.0 & Entry::USED == 0;
        self.mark(page, Entry::USED, used);
    }

    /// The page is exclusive to the device from now on, if it has it.
    pub(crate) fn make_exclusive(&self, page: u64) -> bool {
        self.mark(page, Entry::EXCLUSIVE, |entry| matches!(entry.target(true), Some(Target::Own(_))))
    }

    /// Sets bits of an entry that is valid and `fits`. Whether there is such.
    fn mark(&self, page: u64, bits: u64, fits: impl Fn(Entry) -> bool) -> bool {
        let Some(word) = self.word(page) else { return false };
        let change = |now: u64| (Entry(now).is_valid() && fits(Entry(now))).then_some(now | bits);
        word.fetch_update(Relaxed, Relaxed, change).is_ok()
    }

    /// Takes all translations of `pages` away; what was entered as a block goes as a whole.
    pub(crate) fn clear(&self, pages: Range<u64>) {
        let whole = |page: u64| self.entry(page).0 & (Entry::VALID | Entry::BLOCK) == Entry::VALID | Entry::BLOCK;
        let block = |page: u64| page / FANOUT * FANOUT;
        let mut all = pages.clone();
        if pages.start < pages.end && whole(pages.start) {
            all.start = block(pages.start);
        }
        if pages.start < pages.end && whole(pages.end - 1) {
            all.end = block(pages.end - 1) + FANOUT;
        }
        self.each(all, |word| word.store(0, Relaxed));
    }

    /// A file has gone: nothing is known to it.
    pub(crate) fn forget(&self, slot: Slot) {
        let forget = |word: &AtomicU64| {
            if Entry(word.load(Relaxed)).is_known_to(slot) {
                word.fetch_and(!slot.bit(), Relaxed);
            }
        };
        self.each(0..PAGES, forget);
    }

    /// Forgets which of `pages` were used. Whether any was.
    pub(crate) fn take_used(&self, pages: Range<u64>) -> bool {
        let mut any = false;
        self.each(pages, |word| {
            if word.load(Relaxed) & Entry::USED != 0 {
                any |= Entry(word.fetch_and(!Entry::USED, Relaxed)).is_valid();
            }
        });
        any
    }

    /// Calls `f` for each word of `pages` that may have something in it.
    fn each(&self, pages: Range<u64>, mut f: impl FnMut(&AtomicU64)) {
        let end = pages.end.min(PAGES);
        let mut page = pages.start;
        // The first page after the table of level `level` that `page` is in.
        let after = |page: u64, level: u32| ((page >> (9 * level)) + 1) << (9 * level);
        let at = |page: u64, level: u32| ((page >> (9 * level)) % FANOUT) as usize;
        while page < end {
            let Some(upper) = self.0[at(page, 3)].get() else {
                page = after(page, 3);
                continue;
            };
            let Some(lower) = upper[at(page, 2)].get() else {
                page = after(page, 2);
                continue;
            };
            let next = after(page, 1);
            if let Some(leaf) = lower[at(page, 1)].get() {
                let stop = if next <= end { FANOUT } else { end % FANOUT };
                leaf[(page % FANOUT) as usize..stop as usize].iter().for_each(&mut f);
            }
            page = next;
        }
    }
}
