//! What is known of each page: which file holds it, and what its bytes must add up to.
//!
//! One word per page, in memory that costs nothing until it is touched: a file of a terabyte takes two gigabytes
//! of address space, and eight bytes of RAM per page that is in use.
//!
//! ```text
//!              store                     freed, or a store that failed
//!  nothing ────────────> held(file, sum) ─────────────────────────────> garbage(file)   the file is ours alone
//!     ^  ^                 ^    │                                          │      │
//!     │  └─────────────────│────┘ freed, the file is shared (G12)    store │      │ collector
//!     │                    └───────────────────────────────────────────────┘      v
//!     └──────────────────────────────────────────────────────────────────── punching(file)
//! ```
//!
//! Who may change a word: the caller of the device, who is alone with a page (see [`Device`](crate::device)),
//! makes it held and lets go of it. The collector, one thread at a time, moves words between garbage or nothing
//! and punching, by compare-and-exchange because a store may come at any time. A store that meets a page in
//! punching waits: the hole that is being punched would swallow what it writes. So a page that is held is never
//! punched, and a page being punched never becomes held.
//!
//! Orderings: leaving *punching* is a Release, which the Acquire of the store that waited pairs with: the write
//! comes after the hole. Everything else about one page is ordered by the device's caller.

use peerspace_core::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};
use peerspace_core::sync::{AtomicU64, spin_hint};
use peerspace_core::words::Words;
use peerspace_os::Trouble;
use peerspace_os::linux::map::Arena;

/// Files that can be told apart.
pub(super) const MOST_FILES: usize = 64;
/// Pages that are looked after together: a block's.
pub(super) const GROUP: u64 = peerspace_core::addr::BLOCK_PAGES;

const SUM: u64 = (1 << 56) - 1;
const KIND_AT: u32 = 56;
const SLOT_AT: u32 = 58;

/// The number of a file, below [`MOST_FILES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(pub(super) u8);

impl Slot {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The checksum of a page, as far as it is kept.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes) & SUM
}

/// A page's word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Record(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No content, and nothing to be returned.
    Nothing,
    /// The file has its content.
    Held,
    /// No content, but the file may still take up space for it.
    Garbage,
    /// The collector has it in hand.
    Punching,
}

impl Record {
    const NOTHING: Record = Record(0);

    fn new(kind: Kind, slot: Slot, sum: u64) -> Record {
        let kind = match kind {
            Kind::Nothing => 0,
            Kind::Held => 1,
            Kind::Garbage => 2,
            Kind::Punching => 3,
        };
        Record((slot.0 as u64) << SLOT_AT | kind << KIND_AT | (sum & SUM))
    }

    pub(super) fn kind(self) -> Kind {
        match self.0 >> KIND_AT & 3 {
            0 => Kind::Nothing,
            1 => Kind::Held,
            2 => Kind::Garbage,
            _ => Kind::Punching,
        }
    }

    /// The file it names; without meaning for [`Kind::Nothing`].
    pub(super) fn slot(self) -> Slot {
        Slot((self.0 >> SLOT_AT) as u8)
    }

    /// The file that holds the page's content, if any does.
    pub(super) fn holder(self) -> Option<Slot> {
        (self.kind() == Kind::Held).then(|| self.slot())
    }

    /// Whether a page that the collector has in hand was garbage before.
    pub(super) fn was_garbage(self) -> bool {
        self.kind() == Kind::Punching && self.0 & 1 == 1
    }

    /// Whether `bytes` are the page's content.
    pub(super) fn matches(self, bytes: &[u8]) -> bool {
        self.kind() == Kind::Held && self.0 & SUM == checksum(bytes)
    }
}

/// The words of all pages.
#[derive(Debug)]
pub(super) struct Table {
    words: Arena,
}

impl Table {
    pub(super) fn new(pages: u64) -> Result<Table, Trouble> {
        let n = usize::try_from(pages).map_err(|_| Trouble::NoMemory)?;
        Ok(Table { words: Arena::new(n, n).map_err(|_| Trouble::NoMemory)? })
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        self.words.at(page as usize)
    }

    pub(super) fn get(&self, page: u64) -> Record {
        Record(self.word(page).load(Relaxed))
    }

    /// The file that holds `page`, and how many pages from it on, at most `most`, the same file holds.
    pub(super) fn run(&self, page: u64, most: u64) -> Option<(Slot, u64)> {
        let slot = self.get(page).holder()?;
        let more = (1..most).take_while(|i| self.get(page + i).holder() == Some(slot)).count();
        Some((slot, 1 + more as u64))
    }

    /// Notes that `page` is about to be written, to the file that `choose` says; or not, if it names none. Waits
    /// while it is being punched. Returns what it was before, and the file.
    pub(super) fn hold(
        &self,
        page: u64,
        sum: u64,
        choose: impl Fn(Record) -> Option<Slot>,
    ) -> Option<(Record, Slot)> {
        let word = self.word(page);
        let mut spins = 0u32;
        loop {
            let before = Record(word.load(Acquire));
            if before.kind() == Kind::Punching {
                spins += 1;
                if spins < 100 {
                    spin_hint()
                } else {
                    std::thread::yield_now()
                }
                continue;
            }
            let slot = choose(before)?;
            let after = Record::new(Kind::Held, slot, sum);
            // Fails only if the collector has taken the page in hand.
            if word.compare_exchange(before.0, after.0, AcqRel, Relaxed).is_ok() {
                return Some((before, slot));
            }
        }
    }

    /// The content of `page`, which is held, is needed no more; whether its file should take up no space for it is
    /// for the collector to see to, or not.
    pub(super) fn let_go(&self, page: u64, to: Afterwards) {
        let word = self.word(page);
        let before = Record(word.load(Relaxed));
        debug_assert_eq!(before.kind(), Kind::Held);
        let after = match to {
            Afterwards::Garbage => Record::new(Kind::Garbage, before.slot(), 0),
            Afterwards::Nothing => Record::NOTHING,
        };
        // Release: the collector's claim, an Acquire, comes after whatever was read from the page.
        word.store(after.0, Release);
    }

    /// The content of `page`, which is held, is in file `to` now. Nobody else uses the table.
    pub(super) fn moved(&self, page: u64, to: Slot) {
        let sum = self.get(page).0 & SUM;
        self.word(page).store(Record::new(Kind::Held, to, sum).0, Relaxed);
    }

    /// The garbage at `page` is none that could be punched. False if it is not garbage any more.
    pub(super) fn forget(&self, page: u64) -> bool {
        let before = self.get(page);
        let word = self.word(page);
        before.kind() == Kind::Garbage && word.compare_exchange(before.0, 0, Relaxed, Relaxed).is_ok()
    }

    /// Takes `page` in hand, if it has no content.
    pub(super) fn claim(&self, page: u64) -> bool {
        let before = self.get(page);
        let garbage = match before.kind() {
            Kind::Nothing => 0,
            Kind::Garbage => 1,
            Kind::Held | Kind::Punching => return false,
        };
        let after = Record::new(Kind::Punching, before.slot(), garbage);
        self.word(page).compare_exchange(before.0, after.0, AcqRel, Relaxed).is_ok()
    }

    /// Lets `page` go, which is in hand: it is a hole now, or is `still` what it was.
    pub(super) fn unclaim(&self, page: u64, still: bool) {
        let before = self.get(page);
        debug_assert_eq!(before.kind(), Kind::Punching);
        let after = if still && before.was_garbage() {
            Record::new(Kind::Garbage, before.slot(), 0)
        } else {
            Record::NOTHING
        };
        // Release: pairs with the Acquire in `hold`.
        self.word(page).store(after.0, Release);
    }
}

/// What becomes of a page whose content is needed no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Afterwards {
    /// The collector shall return its space.
    Garbage,
    /// There is nothing to be done about its space, for now.
    Nothing,
}

/// A bit for each group of pages in which the collector may find something.
///
/// A bit is set after the change it tells of, and cleared before the group is looked at: so a change is either
/// seen or told again.
#[derive(Debug)]
pub(super) struct Groups {
    words: Arena,
    count: u64,
}

impl Groups {
    pub(super) fn new(pages: u64) -> Result<Groups, Trouble> {
        let count = pages.div_ceil(GROUP);
        let n = count.div_ceil(64) as usize;
        Ok(Groups { words: Arena::new(n, n).map_err(|_| Trouble::NoMemory)?, count })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Marks the groups of `count` pages from `first` on.
    pub(super) fn mark(&self, first: u64, count: u64) {
        for group in first / GROUP..(first + count).div_ceil(GROUP) {
            // Release: whoever clears the bit sees what it is about.
            self.words.at(group as usize / 64).fetch_or(1 << (group % 64), Release);
        }
    }

    pub(super) fn clear(&self, group: u64) {
        self.words.at(group as usize / 64).fetch_and(!(1 << (group % 64)), AcqRel);
    }

    /// The first marked group from `from` on, looking at no more than `words` words; or how far it looked.
    pub(super) fn find(&self, from: u64, words: &mut u64) -> Result<u64, u64> {
        let mut at = from;
        while at < self.count && *words > 0 {
            *words -= 1;
            let word = self.words.at(at as usize / 64).load(Relaxed) & u64::MAX << (at % 64);
            if word != 0 {
                return Ok(at / 64 * 64 + word.trailing_zeros() as u64);
            }
            at = (at / 64 + 1) * 64;
        }
        Err(at.min(self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_its_parts_apart() {
        let page = vec![3u8; 4096];
        for slot in [0, 1, 63] {
            let t = Table::new(10).unwrap();
            let (before, at) = t.hold(7, checksum(&page), |_| Some(Slot(slot))).unwrap();
            assert_eq!((before.kind(), at), (Kind::Nothing, Slot(slot)));
            let r = t.get(7);
            assert_eq!((r.kind(), r.slot(), r.holder()), (Kind::Held, Slot(slot), Some(Slot(slot))));
            assert!(r.matches(&page) && !r.matches(&[3; 4095]) && !t.get(6).matches(&page));
            t.moved(7, Slot(5));
            assert!(t.get(7).matches(&page) && t.get(7).slot() == Slot(5));
            t.let_go(7, Afterwards::Garbage);
            assert_eq!((t.get(7).kind(), t.get(7).slot()), (Kind::Garbage, Slot(5)));
            assert!(t.claim(7) && !t.claim(7) && t.claim(8));
            assert!(t.get(7).was_garbage() && !t.get(8).was_garbage());
            t.unclaim(7, true);
            t.unclaim(8, true);
            assert_eq!((t.get(7).kind(), t.get(8).kind()), (Kind::Garbage, Kind::Nothing));
            assert!(t.forget(7) && !t.forget(7) && t.get(7).kind() == Kind::Nothing);
        }
    }

    #[test]
    fn runs_end_where_the_file_changes() {
        let t = Table::new(100).unwrap();
        for (page, slot) in [(10, 1), (11, 1), (12, 1), (13, 2), (15, 1)] {
            t.hold(page, 0, |_| Some(Slot(slot)));
            assert!(t.hold(page, 1, |_| None).is_none());
        }
        assert_eq!(t.run(10, 90), Some((Slot(1), 3)));
        assert_eq!(t.run(10, 2), Some((Slot(1), 2)));
        assert_eq!(t.run(13, 87), Some((Slot(2), 1)));
        assert_eq!(t.run(14, 1), None);
    }

    #[test]
    fn a_store_waits_for_the_hole() {
        let t = Table::new(1).unwrap();
        assert!(t.claim(0));
        let punched = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                punched.store(true, Relaxed);
                t.unclaim(0, false);
            });
            t.hold(0, 1, |_| Some(Slot(0)));
            assert!(punched.load(Relaxed), "the write would have been swallowed");
        });
    }

    #[test]
    fn marked_groups_are_found_in_order() {
        let g = Groups::new(GROUP * 1000 + 1).unwrap();
        assert_eq!(g.count(), 1001);
        g.mark(GROUP * 5 - 1, 2);
        g.mark(GROUP * 1000, 1);
        let mut plenty = 1000;
        assert_eq!(g.find(0, &mut plenty), Ok(4));
        assert_eq!(g.find(5, &mut plenty), Ok(5));
        assert_eq!(g.find(6, &mut 3), Err(192));
        assert_eq!(g.find(192, &mut plenty), Ok(1000));
        g.clear(1000);
        assert_eq!(g.find(6, &mut plenty), Err(1001));
    }
}
