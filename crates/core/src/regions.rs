//! Which address ranges the space manages, and what is known about each: read without a lock.
//!
//! A sorted array under a sequence lock. A reader that meets a writer reads again; writers are serialised by
//! their owner and work on a few thousand entries at most, so a reader waits for microseconds. Every word is an
//! atomic, so a reader that loses the race sees old or new words, never torn ones, and throws them away.

use crate::addr::{PageRange, Vpn};
use crate::sharers::MmuId;
use crate::sync::{AtomicU64, Ordering, fence, spin_hint};
use crate::words::Words;
use core::fmt;

const ENTRY_WORDS: usize = 3;

const ACCESSED_SHIFT: u32 = 16;
const PREFERRED_SHIFT: u32 = 32;
const PREFERRED: u64 = 0xf << PREFERRED_SHIFT;

/// Where data can be preferred to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In RAM.
    Host,
    /// On the device with this MMU.
    Mmu(MmuId),
}

/// How a region came about, and what its user said about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes(u64);

impl Attributes {
    /// The program owned this memory before the space did: pages the kernel populated may be in it, and the
    /// program may unmap or change it at any time.
    pub const ADOPTED: Attributes = Attributes(1);
    /// Never use huge folios here.
    pub const NO_HUGE: Attributes = Attributes(2);
    /// Use huge folios from the first fault on.
    pub const HUGE: Attributes = Attributes(4);
    /// Reclaim leaves the region alone: it is about to go.
    pub const KEPT: Attributes = Attributes(8);
    /// Use huge folios only where somebody asks for them.
    pub const ON_REQUEST: Attributes = Attributes(32);
    /// Being given back: nobody refers to it any more, and no fault in it is resolved.
    pub const LEAVING: Attributes = Attributes(16);
    /// A named region of a persistent device: its memory is used in place, and never goes anywhere else (rule Z5).
    pub const PERSISTENT: Attributes = Attributes(64);
    /// Read far more often than written: devices that read it get copies (rule G8).
    pub const READ_MOSTLY: Attributes = Attributes(128);

    /// These, with the host or a device preferred as the place of the data, or neither (rule G8).
    pub const fn with_preferred(self, place: Option<Place>) -> Attributes {
        let n = match place {
            None => 0,
            Some(Place::Host) => 1,
            Some(Place::Mmu(mmu)) => mmu.0 as u64 + 2,
        };
        Attributes(self.0 & !PREFERRED | n << PREFERRED_SHIFT)
    }

    /// Where the data had best be.
    pub const fn preferred(self) -> Option<Place> {
        match (self.0 & PREFERRED) >> PREFERRED_SHIFT {
            0 => None,
            1 => Some(Place::Host),
            n => Some(Place::Mmu(MmuId((n - 2) as u8))),
        }
    }

    /// These, with or without `mmu` among those that access the memory where it is (rule G8).
    pub const fn with_accessed_by(self, mmu: MmuId, yes: bool) -> Attributes {
        let bit = 1 << (ACCESSED_SHIFT + mmu.0 as u32);
        Attributes(if yes { self.0 | bit } else { self.0 & !bit })
    }

    /// Whether the device with `mmu` accesses the memory where it is.
    pub const fn accessed_by(self, mmu: MmuId) -> bool {
        self.0 & 1 << (ACCESSED_SHIFT + mmu.0 as u32) != 0
    }

    /// These without anything that names the device with `mmu`, which is gone.
    pub fn without_mmu(self, mmu: MmuId) -> Attributes {
        let kept = if self.preferred() == Some(Place::Mmu(mmu)) { self.with_preferred(None) } else { self };
        kept.with_accessed_by(mmu, false)
    }

    /// Devices may read here, and not write (rule G4).
    pub const DEVICES_READ: Attributes = Attributes(256);
    /// Memory of the program that the kernel keeps: shared, of a file, of huge pages. It never moves, and devices access it
    /// where it is (rule G11). No page of it has a state; it is not [`ADOPTED`](Attributes::ADOPTED), whose pages can move.
    pub const IN_PLACE: Attributes = Attributes(512);
    /// What the program does to the mappings of memory [in place](Attributes::IN_PLACE) is told.
    pub const WATCHED: Attributes = Attributes(1024);
    /// Just being adopted: it is not certain yet that all of it is what it was taken for.
    pub const ARRIVING: Attributes = Attributes(2048);

    /// Both.
    pub const fn with(self, other: Attributes) -> Attributes {
        Attributes(self.0 | other.0)
    }

    /// This without `other`.
    pub const fn without(self, other: Attributes) -> Attributes {
        Attributes(self.0 & !other.0)
    }

    /// True when any of `other` is set.
    #[inline]
    pub const fn has_any(self, other: Attributes) -> bool {
        self.0 & other.0 != 0
    }

    /// True when all of `other` is set.
    pub const fn has(self, other: Attributes) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A managed range of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// The pages.
    pub range: PageRange,
    /// What is known about them.
    pub attributes: Attributes,
}

/// Why a region was not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionError {
    /// The range shares pages with this region.
    Overlap(PageRange),
    /// There are as many regions as the map can hold.
    Full(usize),
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegionError::Overlap(r) => write!(f, "the range overlaps the managed region {r:?}"),
            RegionError::Full(n) => write!(f, "no room for more than {n} regions"),
        }
    }
}

impl core::error::Error for RegionError {}

/// The regions of a space.
#[derive(Debug)]
pub struct Regions<W> {
    words: W,
    sequence: AtomicU64,
    len: AtomicU64,
}

impl<W: Words> Regions<W> {
    /// Words for a map of `n` regions.
    pub const fn words_for(n: usize) -> usize {
        n * ENTRY_WORDS
    }

    /// A map without regions.
    pub fn new(words: W) -> Regions<W> {
        Regions { words, sequence: AtomicU64::new(0), len: AtomicU64::new(0) }
    }

    fn capacity(&self) -> usize {
        self.words.len() / ENTRY_WORDS
    }

    fn entry(&self, i: usize) -> RegionInfo {
        let w = |k| self.words.at(i * ENTRY_WORDS + k).load(Ordering::Relaxed);
        RegionInfo { range: PageRange { start: Vpn(w(0)), end: Vpn(w(1)) }, attributes: Attributes(w(2)) }
    }

    fn put(&self, i: usize, r: RegionInfo) {
        let w = |k, v| self.words.at(i * ENTRY_WORDS + k).store(v, Ordering::Relaxed);
        w(0, r.range.start.0);
        w(1, r.range.end.0);
        w(2, r.attributes.0);
    }

    /// The first region that ends behind `vpn`: the one that holds it, or else the next one.
    pub fn next(&self, vpn: Vpn) -> Option<RegionInfo> {
        loop {
            // Acquire: pairs with the Release that ends a change.
            let before = self.sequence.load(Ordering::Acquire);
            if before & 1 == 0 {
                let len = (self.len.load(Ordering::Relaxed) as usize).min(self.capacity());
                let i = self.search(vpn, len);
                let found = (i < len).then(|| self.entry(i));
                // The loads above stay above this fence; it pairs with the Release fence that begins a change.
                fence(Ordering::Acquire);
                if self.sequence.load(Ordering::Relaxed) == before {
                    return found;
                }
            }
            spin_hint();
        }
    }

    /// The region that holds `vpn`.
    #[inline]
    pub fn find(&self, vpn: Vpn) -> Option<RegionInfo> {
        self.next(vpn).filter(|r| r.range.contains(vpn))
    }

    /// Index of the first of `len` regions that ends behind `vpn`.
    fn search(&self, vpn: Vpn, len: usize) -> usize {
        let (mut low, mut high) = (0, len);
        while low < high {
            let mid = (low + high) / 2;
            if self.words.at(mid * ENTRY_WORDS + 1).load(Ordering::Relaxed) <= vpn.0 {
                low = mid + 1;
            } else {
                high = mid;
            }
        }
        low
    }

    /// Every region, in order of address. Sees regions that exist throughout; others perhaps.
    pub fn iter(&self) -> impl Iterator<Item = RegionInfo> + '_ {
        let mut at = Vpn(0);
        core::iter::from_fn(move || {
            let r = self.next(at)?;
            at = r.range.end;
            Some(r)
        })
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed) as usize
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn change<T>(&self, f: impl FnOnce() -> T) -> T {
        let before = self.sequence.load(Ordering::Relaxed);
        debug_assert!(before & 1 == 0, "two writers");
        self.sequence.store(before + 1, Ordering::Relaxed);
        // No store of the change is seen before the odd number; pairs with the Acquire fence of a reader.
        fence(Ordering::Release);
        let out = f();
        self.sequence.store(before + 2, Ordering::Release);
        out
    }

    /// Opens `n` free entries at index `at`.
    fn open(&self, at: usize, n: usize) {
        let len = self.len();
        for i in (at..len).rev() {
            self.put(i + n, self.entry(i));
        }
        self.len.store((len + n) as u64, Ordering::Relaxed);
    }

    fn close(&self, at: usize, n: usize) {
        let len = self.len();
        for i in at + n..len {
            self.put(i - n, self.entry(i));
        }
        self.len.store((len - n) as u64, Ordering::Relaxed);
    }

    /// Adds a region. Joins it with neighbours that have the same attributes.
    ///
    /// Writers are serialised by the caller.
    ///
    /// # Errors
    /// When it overlaps a region, or the map is full; nothing changed.
    pub fn insert(&self, region: RegionInfo) -> Result<(), RegionError> {
        debug_assert!(!region.range.is_empty());
        let len = self.len();
        let at = self.search(region.range.start, len);
        if at < len && self.entry(at).range.start < region.range.end {
            return Err(RegionError::Overlap(self.entry(at).range));
        }
        let joins = |a: RegionInfo, b: RegionInfo| a.range.end == b.range.start && a.attributes == b.attributes;
        let left = at.checked_sub(1).map(|i| self.entry(i)).filter(|l| joins(*l, region));
        let right = (at < len).then(|| self.entry(at)).filter(|r| joins(region, *r));
        if left.is_none() && right.is_none() && len == self.capacity() {
            return Err(RegionError::Full(self.capacity()));
        }
        self.change(|| match (left, right) {
            (Some(l), Some(r)) => {
                self.close(at, 1);
                self.put(at - 1, RegionInfo { range: PageRange { start: l.range.start, end: r.range.end }, ..l });
            }
            (Some(l), None) => {
                self.put(at - 1, RegionInfo { range: PageRange { end: region.range.end, ..l.range }, ..l });
            }
            (None, Some(r)) => {
                self.put(at, RegionInfo { range: PageRange { start: region.range.start, ..r.range }, ..r });
            }
            (None, None) => {
                self.open(at, 1);
                self.put(at, region);
            }
        });
        Ok(())
    }

    /// Changes the attributes of what regions have of `range`; a reader sees either the old or the new ones.
    ///
    /// # Errors
    /// [`RegionError::Full`] when regions would have to be cut and there is no room; nothing changed.
    pub fn update(&self, range: PageRange, change: impl Fn(Attributes) -> Attributes) -> Result<(), RegionError> {
        // Each end of the range can cut one region in two.
        if self.len() + 2 > self.capacity() {
            return Err(RegionError::Full(self.capacity()));
        }
        let mut at = self.search(range.start, self.len());
        while at < self.len() && self.entry(at).range.start < range.end {
            let old = self.entry(at);
            let piece = old.range.intersect(range);
            let parts = [
                (PageRange { start: old.range.start, end: piece.start }, old.attributes),
                (piece, change(old.attributes)),
                (PageRange { start: piece.end, end: old.range.end }, old.attributes),
            ];
            let n = parts.iter().filter(|(r, _)| !r.is_empty()).count();
            self.change(|| {
                self.open(at, n - 1);
                for (i, (range, attributes)) in parts.into_iter().filter(|(r, _)| !r.is_empty()).enumerate() {
                    self.put(at + i, RegionInfo { range, attributes });
                }
            });
            at += n;
        }
        // What has become the same joins again.
        let mut at = self.search(range.start, self.len()).saturating_sub(1);
        while at + 1 < self.len() && self.entry(at).range.start < range.end {
            let (a, b) = (self.entry(at), self.entry(at + 1));
            if a.range.end == b.range.start && a.attributes == b.attributes {
                self.change(|| {
                    self.close(at + 1, 1);
                    self.put(at, RegionInfo { range: PageRange { start: a.range.start, end: b.range.end }, ..a });
                });
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// Takes `range` out of every region it touches; what remains of a region stays. Calls `removed` with each
    /// piece.
    ///
    /// # Errors
    /// [`RegionError::Full`] when a region would have to become two and there is no room; nothing changed.
    pub fn remove(&self, range: PageRange, mut removed: impl FnMut(RegionInfo)) -> Result<(), RegionError> {
        loop {
            let len = self.len();
            let at = self.search(range.start, len);
            if at == len {
                return Ok(());
            }
            let old = self.entry(at);
            let piece = old.range.intersect(range);
            if piece.is_empty() {
                return Ok(());
            }
            let left = PageRange { start: old.range.start, end: piece.start };
            let right = PageRange { start: piece.end, end: old.range.end };
            match (left.is_empty(), right.is_empty()) {
                (true, true) => self.change(|| self.close(at, 1)),
                (false, true) => self.change(|| self.put(at, RegionInfo { range: left, ..old })),
                (true, false) => self.change(|| self.put(at, RegionInfo { range: right, ..old })),
                (false, false) if len == self.capacity() => return Err(RegionError::Full(len)),
                (false, false) => self.change(|| {
                    self.open(at, 1);
                    self.put(at, RegionInfo { range: left, ..old });
                    self.put(at + 1, RegionInfo { range: right, ..old });
                }),
            }
            removed(RegionInfo { range: piece, ..old });
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange { start: Vpn(start), end: Vpn(end) }
    }

    fn region(start: u64, end: u64) -> RegionInfo {
        RegionInfo { range: range(start, end), attributes: Attributes::default() }
    }

    #[test]
    fn overlap_and_overflow_are_refused() {
        let m = Regions::new(zeroed(Regions::<std::vec::Vec<AtomicU64>>::words_for(2)));
        m.insert(region(10, 20)).unwrap();
        assert_eq!(m.insert(region(19, 30)), Err(RegionError::Overlap(range(10, 20))));
        assert_eq!(m.insert(region(0, 11)), Err(RegionError::Overlap(range(10, 20))));
        m.insert(region(30, 40)).unwrap();
        assert_eq!(m.insert(region(50, 60)), Err(RegionError::Full(2)));
        m.insert(region(20, 30)).unwrap();
        assert_eq!(m.iter().collect::<std::vec::Vec<_>>(), [region(10, 40)]);
        m.insert(region(50, 60)).unwrap();
        assert_eq!(m.remove(range(20, 30), |_| panic!("nothing was removed")), Err(RegionError::Full(2)));
        assert_eq!(m.len(), 2);
    }

    #[test]
    fn attributes_change_in_the_middle_of_a_region() {
        let m = Regions::new(zeroed(30));
        m.insert(region(10, 40)).unwrap();
        m.insert(region(50, 60)).unwrap();
        m.update(range(20, 55), |a| a.with(Attributes::KEPT)).unwrap();
        let kept: std::vec::Vec<_> =
            (0..70).filter(|i| m.find(Vpn(*i)).is_some_and(|r| r.attributes.has(Attributes::KEPT))).collect();
        assert!(kept.into_iter().eq((20..40).chain(50..55)));
        assert_eq!(m.find(Vpn(57)), Some(region(55, 60)));
        assert_eq!(m.len(), 4);
        // What has become the same is one region again.
        m.update(range(0, 70), |a| a.without(Attributes::KEPT)).unwrap();
        assert_eq!(m.iter().collect::<std::vec::Vec<_>>(), [region(10, 40), region(50, 60)]);
    }

    #[test]
    fn different_attributes_stay_apart() {
        let m = Regions::new(zeroed(30));
        m.insert(region(10, 20)).unwrap();
        let adopted = RegionInfo { attributes: Attributes::ADOPTED, ..region(20, 30) };
        m.insert(adopted).unwrap();
        assert_eq!(m.find(Vpn(19)), Some(region(10, 20)));
        assert_eq!(m.find(Vpn(20)), Some(adopted));
        assert_eq!(m.find(Vpn(30)), None);
    }

    proptest! {
        #[test]
        fn agrees_with_a_page_map(ops in proptest::collection::vec((any::<bool>(), 0u64..64, 1u64..20, any::<bool>()), 1..80)) {
            let m = Regions::new(zeroed(300));
            let mut model = [None::<Attributes>; 90];
            for (insert, start, len, adopted) in ops {
                let attributes = if adopted { Attributes::ADOPTED } else { Attributes::default() };
                let pages = start as usize..(start + len) as usize;
                if insert {
                    let free = model[pages.clone()].iter().all(Option::is_none);
                    let got = m.insert(RegionInfo { range: range(start, start + len), attributes });
                    prop_assert_eq!(got.is_ok(), free);
                    if free { model[pages].fill(Some(attributes)); }
                } else {
                    let mut gone = 0;
                    m.remove(range(start, start + len), |r| gone += r.range.pages().0).unwrap();
                    prop_assert_eq!(gone as usize, model[pages.clone()].iter().flatten().count());
                    model[pages].fill(None);
                }
                for (i, want) in model.iter().enumerate() {
                    prop_assert_eq!(m.find(Vpn(i as u64)).map(|r| r.attributes), *want);
                }
                let mut end = Vpn(0);
                for r in m.iter() {
                    prop_assert!(r.range.start >= end && !r.range.is_empty());
                    end = r.range.end;
                }
            }
        }
    }

    #[test]
    fn readers_never_see_half_a_change() {
        let m = Regions::new(zeroed(3000));
        for i in 0..200 {
            m.insert(region(i * 100, i * 100 + 50)).unwrap();
        }
        let stop = crate::sync::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for i in 0..200 {
                        // This region exists throughout, while those in front of it come and go.
                        let r = m.find(Vpn(19_910)).expect("a region that exists was not found");
                        assert_eq!(r.range, range(19_900, 19_950));
                        if let Some(r) = m.find(Vpn(i * 100 + 10)) {
                            assert_eq!(r.range, range(i * 100, i * 100 + 50));
                        }
                    }
                }
            });
            for round in 0..300 {
                let i = round % 199;
                m.remove(range(i * 100, i * 100 + 50), |_| {}).unwrap();
                m.insert(region(i * 100, i * 100 + 50)).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
