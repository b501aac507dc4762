//! The state word of a folio: who refers to it, who maps it, who pins it (rules H5 to H11).
//!
//! A folio is a run of pages that is handled as one. Its counts are on the *head*, in one word, so that each of them
//! changes together with those it depends on; what is per page is on the *tails*.
//!
//! ```text
//!   63     62      61..50   49..37      36..19      18..11    10..0
//!  +------+-------+--------+-----------+-----------+---------+------------------+
//!  |frozen| queued|  pins  | references| mappings  | entire  | pages mapped     |   head
//!  +------+-------+--------+-----------+-----------+---------+------------------+
//!                                                  | mappings of this page      |   tail
//!                                                  +---------+------------------+
//! ```
//!
//! - *entire*: how many MMUs map the folio by one entry (the kernel's `entire_mapcount`, counted from 0 here).
//! - *pages mapped*: how many of its pages somebody maps alone, plus [`COMPOUND_MAPPED`] while somebody maps the whole: a
//!   unit above any page count, so that the two stay distinguishable (H8).
//! - *mappings*: all of them, whole and single. Each is a reference too.
//! - *references*: those that are not mappings. Whoever allocated the folio has one: the owner of the data it holds.
//!   Every pin is one as well, counted a second time under *pins*.
//!
//! The refcount of H6 is mappings + references. It is zero for what is free, for tails (H7), and for a folio that is
//! [frozen](Folio::freeze) to be split, so that [`get_unless_zero`](Folio::get_unless_zero) fails for all three.
//!
//! # Who may do what
//!
//! | transition | may be called by | order |
//! |---|---|---|
//! | [`begin`](Folio::begin) | whoever took the frame from the free ones | Relaxed: handed on through the table |
//! | [`get_unless_zero`](Folio::get_unless_zero) | anybody, at any time (H10) | Acquire, with the Release of `begin`'s hand-over and of `thaw` |
//! | [`put`](Folio::put) | whoever has a reference | Release; the last one Acquire: it sees what all others did |
//! | [`map_whole`](Folio::map_whole), [`map_part`](Folio::map_part) | the holder of the entry that is to map it | Relaxed: the entry's lock orders it |
//! | [`unmap_whole`](Folio::unmap_whole), [`unmap_part`](Folio::unmap_part) | the holder of the entry that maps it | Release, as a reference goes |
//! | [`pin`](Folio::pin), [`unpin`](Folio::unpin) | the holder of an entry that maps it | Relaxed; Release |
//! | [`freeze`](Folio::freeze) | the holder of all entries that map any of it, with one reference | Acquire: it sees what those did who have let go |
//! | [`thaw`](Folio::thaw) | whoever froze it | Release |
//!
//! Locked entries take the place of the kernel's migration entries (H9): as long as all of them are locked no mapping can
//! come or go and no pin either, a fault waits, and only scanners can still take references, which is what the
//! comparison in `freeze` is for.
//!
//! The mappings of one page change before, and the pages mapped after, the page's own count; whoever looks in between
//! sees a mapping that is not counted as a page yet. Nobody decides anything by that: decisions are made by the holder
//! of all the entries.

use crate::sync::{AtomicU64, Ordering, fence};
use core::fmt;

/// What the pages-mapped count moves by when the first MMU maps the whole folio, and when the last one does no more.
pub const COMPOUND_MAPPED: u64 = 1 << 10;
/// The most pages a folio can have: with more, their count could reach [`COMPOUND_MAPPED`].
pub const MOST_PAGES: u64 = 1 << 9;
/// How many pins one folio can have.
pub const MOST_PINS: u64 = (1 << PINS_BITS) - 1;

const PAGES_MAPPED: Field = Field { shift: 0, bits: 11 };
const ENTIRE: Field = Field { shift: 11, bits: 8 };
const MAPPINGS: Field = Field { shift: 19, bits: 18 };
const REFERENCES: Field = Field { shift: 37, bits: 13 };
const PINS_BITS: u32 = 12;
const PINS: Field = Field { shift: 50, bits: PINS_BITS };
const QUEUED: u64 = 1 << 62;
const FROZEN: u64 = 1 << 63;

#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    bits: u32,
}

impl Field {
    const fn of(self, word: u64) -> u64 {
        word >> self.shift & ((1 << self.bits) - 1)
    }

    const fn one(self) -> u64 {
        1 << self.shift
    }

    fn is_full(self, word: u64) -> bool {
        self.of(word) == (1 << self.bits) - 1
    }
}

/// All counts of a folio at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// References, mappings included: zero for what is free, a tail, or frozen.
    pub refcount: u64,
    /// MMUs that map the folio by one entry.
    pub entire: u64,
    /// Pages that somebody maps alone.
    pub pages: u64,
    /// All mappings.
    pub mappings: u64,
    /// Users that rely on the folio staying where it is.
    pub pins: u64,
    /// It is to be split when memory is short (H11).
    pub queued: bool,
}

impl Counts {
    fn of(word: u64) -> Counts {
        let frozen = word & FROZEN != 0;
        Counts {
            refcount: if frozen { 0 } else { MAPPINGS.of(word) + REFERENCES.of(word) },
            entire: ENTIRE.of(word),
            pages: PAGES_MAPPED.of(word) & (COMPOUND_MAPPED - 1),
            mappings: MAPPINGS.of(word),
            pins: PINS.of(word),
            queued: word & QUEUED != 0,
        }
    }

    /// True when some pages of a folio of `pages` are mapped and others are not: it holds memory that nobody uses.
    pub fn is_partly_mapped(self, pages: u64) -> bool {
        self.entire == 0 && self.pages > 0 && self.pages < pages
    }
}

/// Why a folio cannot be split now (H6). Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitBusy {
    /// So many users rely on where its pages are (H5).
    Pinned(u64),
    /// So many references to it are neither mappings nor the caller's.
    Referenced(u64),
}

impl fmt::Display for SplitBusy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SplitBusy::Pinned(n) => write!(f, "the folio has {n} pins"),
            SplitBusy::Referenced(n) => write!(f, "{n} others refer to the folio"),
        }
    }
}

impl core::error::Error for SplitBusy {}

/// A folio has as many pins as can be counted: [`MOST_PINS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyPins;

/// A pin was given back that nobody had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPinned;

/// What is left when a mapping has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Left {
    /// It was the last reference: the folio is the caller's to free.
    pub free: bool,
    /// It was the last mapping: what the folio holds is used by nobody. One caller alone is told.
    pub unmapped: bool,
    /// Some pages are mapped no more and others are: for the queue of folios to be split (H11).
    pub partly: bool,
}

impl Left {
    fn of(before: u64, now: u64, pages: u64) -> Left {
        Left {
            free: Folio::was_last(before, 1),
            unmapped: MAPPINGS.of(now) == 0,
            partly: Counts::of(now).is_partly_mapped(pages),
        }
    }
}

/// The state word of a head. See the [module](self) for who may call what.
#[derive(Debug, Clone, Copy)]
pub struct Folio<'w>(
    /// The word.
    pub &'w AtomicU64,
);

/// The word of a tail: how often its page is mapped alone. Its refcount is zero always (H7).
#[derive(Debug, Clone, Copy)]
pub struct Tail<'w>(
    /// The word.
    pub &'w AtomicU64,
);

impl Tail<'_> {
    /// A tail of which nobody maps anything.
    pub fn begin(self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// How often its page is mapped alone.
    pub fn mappings(self) -> u64 {
        ENTIRE.of(self.0.load(Ordering::Relaxed))
    }
}

impl Folio<'_> {
    /// A folio that its owner alone refers to.
    pub fn begin(self) {
        self.0.store(REFERENCES.one(), Ordering::Relaxed);
    }

    /// All counts as they are. Nothing keeps them from changing.
    pub fn counts(self) -> Counts {
        Counts::of(self.0.load(Ordering::Relaxed))
    }

    /// How many users rely on the folio staying where it is.
    pub fn pins(self) -> u64 {
        PINS.of(self.0.load(Ordering::Relaxed))
    }

    /// Takes a reference, unless there is none (H10): what is free, a tail, or about to be split stays that.
    #[must_use]
    pub fn get_unless_zero(self) -> bool {
        let more = |word: u64| {
            let alive = word & FROZEN == 0 && MAPPINGS.of(word) + REFERENCES.of(word) > 0;
            (alive && !REFERENCES.is_full(word)).then(|| word + REFERENCES.one())
        };
        self.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, more).is_ok()
    }

    /// Gives a reference back. True if it was the last: the folio is the caller's to free.
    #[must_use]
    pub fn put(self) -> bool {
        let before = self.0.fetch_sub(REFERENCES.one(), Ordering::Release);
        debug_assert!(REFERENCES.of(before) > 0, "a reference was given back that nobody had");
        Self::was_last(before, 1)
    }

    fn was_last(before: u64, gone: u64) -> bool {
        let last = MAPPINGS.of(before) + REFERENCES.of(before) == gone;
        if last {
            // Pairs with the Release of everybody else's.
            fence(Ordering::Acquire);
        }
        last
    }

    fn change(self, order: Ordering, change: impl Fn(u64) -> u64) -> u64 {
        let changed = self.0.fetch_update(order, Ordering::Relaxed, |word| Some(change(word)));
        changed.expect("the change is not conditional")
    }

    /// One MMU more maps the folio by one entry.
    pub fn map_whole(self) {
        self.change(Ordering::Relaxed, |word| {
            debug_assert!(word & FROZEN == 0 && !ENTIRE.is_full(word));
            let first = ENTIRE.of(word) == 0;
            word + ENTIRE.one() + MAPPINGS.one() + if first { COMPOUND_MAPPED } else { 0 }
        });
    }

    /// One MMU less maps the folio, of so many `pages`, by one entry.
    pub fn unmap_whole(self, pages: u64) -> Left {
        let before = self.change(Ordering::Release, |word| {
            debug_assert!(word & FROZEN == 0 && ENTIRE.of(word) > 0, "a mapping has gone that was not counted");
            let last = ENTIRE.of(word) == 1;
            word - ENTIRE.one() - MAPPINGS.one() - if last { COMPOUND_MAPPED } else { 0 }
        });
        let last = ENTIRE.of(before) == 1;
        let now = before - ENTIRE.one() - MAPPINGS.one() - if last { COMPOUND_MAPPED } else { 0 };
        Left::of(before, now, pages)
    }

    /// One MMU more maps the page of `tail` alone.
    pub fn map_part(self, tail: Tail<'_>) {
        // First the reference: whoever sees the page mapped sees that the folio is in use.
        self.0.fetch_add(MAPPINGS.one(), Ordering::Relaxed);
        let before = tail.0.fetch_add(ENTIRE.one(), Ordering::Relaxed);
        debug_assert!(!ENTIRE.is_full(before));
        if ENTIRE.of(before) == 0 {
            self.0.fetch_add(PAGES_MAPPED.one(), Ordering::Relaxed);
        }
    }

    /// One MMU less maps the page of `tail`, one of so many `pages`, alone.
    pub fn unmap_part(self, tail: Tail<'_>, pages: u64) -> Left {
        let before = tail.0.fetch_sub(ENTIRE.one(), Ordering::Relaxed);
        debug_assert!(ENTIRE.of(before) > 0, "a mapping has gone that was not counted");
        let gone = if ENTIRE.of(before) == 1 { PAGES_MAPPED.one() } else { 0 };
        // In one step, so that the last one finds all counts right.
        let before = self.0.fetch_sub(MAPPINGS.one() + gone, Ordering::Release);
        debug_assert!(MAPPINGS.of(before) > 0);
        let now = before - MAPPINGS.one() - gone;
        Left::of(before, now, pages)
    }

    /// Splits one MMU's mapping of the whole folio into mappings of its pages (H6: cannot fail). `tails` gives the word of
    /// each; they are tails already.
    pub fn split_mapping<'t>(self, pages: u64, tails: impl Fn(u64) -> Tail<'t>) {
        // As many references more, before the one of the whole goes.
        let mut first = 0;
        for i in 0..pages {
            first += (ENTIRE.of(tails(i).0.fetch_add(ENTIRE.one(), Ordering::Relaxed)) == 0) as u64;
        }
        self.change(Ordering::Relaxed, |word| {
            debug_assert!(ENTIRE.of(word) > 0);
            let last = ENTIRE.of(word) == 1;
            word + (pages - 1) * MAPPINGS.one() + first * PAGES_MAPPED.one()
                - ENTIRE.one()
                - if last { COMPOUND_MAPPED } else { 0 }
        });
    }

    /// The reverse: one MMU that maps each page alone maps the folio by one entry from now on.
    pub fn join_mapping<'t>(self, pages: u64, tails: impl Fn(u64) -> Tail<'t>) {
        let mut last = 0;
        for i in 0..pages {
            last += (ENTIRE.of(tails(i).0.fetch_sub(ENTIRE.one(), Ordering::Relaxed)) == 1) as u64;
        }
        self.change(Ordering::Relaxed, |word| {
            let first = ENTIRE.of(word) == 0;
            word + ENTIRE.one() + if first { COMPOUND_MAPPED } else { 0 }
                - (pages - 1) * MAPPINGS.one()
                - last * PAGES_MAPPED.one()
        });
    }

    /// One user more relies on where the folio is.
    ///
    /// # Errors
    /// [`TooManyPins`]; nothing has changed.
    pub fn pin(self) -> Result<(), TooManyPins> {
        let more = |word: u64| {
            debug_assert!(word & FROZEN == 0);
            let room = !PINS.is_full(word) && !REFERENCES.is_full(word);
            room.then(|| word + PINS.one() + REFERENCES.one())
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).map(drop).map_err(|_| TooManyPins)
    }

    /// One user less relies on it. True if that was the last reference: the folio is the caller's to free.
    ///
    /// # Errors
    /// [`NotPinned`]; nothing has changed.
    pub fn unpin(self) -> Result<bool, NotPinned> {
        let less = |word: u64| (PINS.of(word) > 0).then(|| word - PINS.one() - REFERENCES.one());
        match self.0.fetch_update(Ordering::Release, Ordering::Relaxed, less) {
            Ok(before) => Ok(Self::was_last(before, 1)),
            Err(_) => Err(NotPinned),
        }
    }

    /// Takes all pins back: what they were for is gone.
    pub fn forget_pins(self) {
        self.change(Ordering::Release, |word| word - PINS.of(word) * (PINS.one() + REFERENCES.one()));
    }

    /// Notes that the folio is to be split when memory is short. True if it was not noted already.
    #[must_use]
    pub fn queue(self) -> bool {
        self.0.fetch_or(QUEUED, Ordering::Relaxed) & QUEUED == 0
    }

    /// Notes that it is not to be split (any more). True if it was.
    pub fn unqueue(self) -> bool {
        self.0.fetch_and(!QUEUED, Ordering::Relaxed) & QUEUED != 0
    }

    /// Begins a split of the folio (H6): possible if nobody refers to it but those who map it and the caller, who has
    /// one reference. From then on nobody can take one, until [`thaw`](Folio::thaw).
    ///
    /// # Errors
    /// [`SplitBusy`]; nothing has changed.
    pub fn freeze(self) -> Result<(), SplitBusy> {
        let alone = |word: u64| {
            debug_assert_eq!(ENTIRE.of(word), 0, "mappings of the whole are split first");
            (word & FROZEN == 0 && REFERENCES.of(word) == 1).then_some(word | FROZEN)
        };
        match self.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, alone) {
            Ok(_) => Ok(()),
            Err(word) if PINS.of(word) > 0 => Err(SplitBusy::Pinned(PINS.of(word))),
            Err(word) => Err(SplitBusy::Referenced(REFERENCES.of(word) - 1)),
        }
    }

    /// Ends a split: the frozen folio's pages are folios of their own, and what is left of it is referred to by the
    /// caller alone (H7: extra references stay with the head).
    pub fn thaw(self) {
        self.0.store(REFERENCES.one(), Ordering::Release);
    }

    /// Makes a tail of a frozen folio a folio of one page, with one reference for its owner. Whoever mapped the page alone
    /// maps that folio whole.
    pub fn begin_split(self) {
        let alone = ENTIRE.of(self.0.load(Ordering::Relaxed));
        let unit = if alone > 0 { COMPOUND_MAPPED } else { 0 };
        let word = REFERENCES.one() + alone * (ENTIRE.one() + MAPPINGS.one()) + unit;
        // Release: a scanner that takes a reference finds a folio.
        self.0.store(word, Ordering::Release);
    }
}

#[cfg(test)]
#[path = "folio_tests.rs"]
mod tests;
