//! The pfn ranges of devices: which device a page frame number belongs to (rule Z1).
//!
//! One number space covers the host and all devices. The host's frames come first; each device gets a range
//! behind it, as large as the pages it can hold. Ranges come and go; who looks one up takes no lock. The range of a page
//! that is in use cannot go; of another, what is found may be a moment old, and the holder of a reference to the device
//! looks again.

use crate::addr::{BLOCK_PAGES, Pages, Pfn};
use crate::entry::MAX_PFN;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use core::fmt;

/// The most ranges at a time.
pub const MAX_RANGES: usize = if cfg!(loom) { 2 } else { 64 };

/// The pages of one device in the common number space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PfnRange {
    /// The first page.
    pub base: Pfn,
    /// How many there are.
    pub pages: Pages,
}

impl PfnRange {
    /// The page behind the last.
    pub const fn end(self) -> Pfn {
        Pfn(self.base.0 + self.pages.0)
    }

    /// True when `pfn` lies inside.
    pub const fn contains(self, pfn: Pfn) -> bool {
        self.base.0 <= pfn.0 && pfn.0 < self.end().0
    }
}

/// Why a range was not registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PagemapError {
    /// It has no page.
    Empty,
    /// It shares pages with this registered range.
    Overlap(PfnRange),
    /// It reaches beyond the largest pfn.
    TooLarge(PfnRange),
    /// There are as many as there can be.
    TooMany,
}

impl fmt::Display for PagemapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PagemapError::Empty => write!(f, "a device needs at least one page"),
            PagemapError::Overlap(r) => write!(f, "the range overlaps {:?} + {}", r.base, r.pages),
            PagemapError::TooLarge(r) => {
                write!(f, "{} from {:?} do not fit below {:?}", r.pages, r.base, Pfn(MAX_PFN))
            }
            PagemapError::TooMany => write!(f, "there are {MAX_RANGES} devices already"),
        }
    }
}

impl core::error::Error for PagemapError {}

#[derive(Debug)]
struct Place {
    base: AtomicU64,
    /// Zero where there is no range.
    pages: AtomicU64,
}

/// All registered ranges.
#[derive(Debug)]
pub struct Pagemaps {
    places: [Place; MAX_RANGES],
    /// The place that was found last.
    last: AtomicUsize,
}

impl Pagemaps {
    /// No ranges.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Pagemaps {
        let place = |_| Place { base: AtomicU64::new(0), pages: AtomicU64::new(0) };
        Pagemaps { places: core::array::from_fn(place), last: AtomicUsize::new(0) }
    }

    /// Registers `range`; returns its number. Whoever registers and unregisters does so one at a time.
    ///
    /// # Errors
    /// When it is empty, too large, or overlaps another (rule Z1). Nothing has changed.
    pub fn register(&self, range: PfnRange) -> Result<usize, PagemapError> {
        if range.pages.0 == 0 {
            return Err(PagemapError::Empty);
        }
        if range.base.0.checked_add(range.pages.0).is_none_or(|end| end > MAX_PFN + 1) {
            return Err(PagemapError::TooLarge(range));
        }
        if let Some(r) = self.ranges().find(|r| r.base < range.end() && range.base < r.end()) {
            return Err(PagemapError::Overlap(r));
        }
        let i = (0..MAX_RANGES).find(|i| self.get(*i).is_none()).ok_or(PagemapError::TooMany)?;
        self.places[i].base.store(range.base.0, Ordering::Relaxed);
        // Release: who sees that there are pages sees where they begin.
        self.places[i].pages.store(range.pages.0, Ordering::Release);
        Ok(i)
    }

    /// Forgets range `i`, no page of which is in use.
    pub fn unregister(&self, i: usize) {
        self.places[i].pages.store(0, Ordering::Release);
    }

    /// The number of the range that covers `pfn` (rule Z1).
    #[inline]
    pub fn find(&self, pfn: Pfn) -> Option<usize> {
        let covers = |i: &usize| self.get(*i).is_some_and(|r| r.contains(pfn));
        // Z2: consecutive lookups mostly are of one range.
        let last = self.last.load(Ordering::Relaxed);
        if covers(&last) {
            return Some(last);
        }
        let found = (0..MAX_RANGES).find(covers)?;
        self.last.store(found, Ordering::Relaxed);
        Some(found)
    }

    /// Range `i`, if there is one.
    pub fn get(&self, i: usize) -> Option<PfnRange> {
        let place = &self.places[i];
        let pages = place.pages.load(Ordering::Acquire);
        (pages > 0).then(|| PfnRange { base: Pfn(place.base.load(Ordering::Relaxed)), pages: Pages(pages) })
    }

    fn ranges(&self) -> impl Iterator<Item = PfnRange> + '_ {
        (0..MAX_RANGES).filter_map(|i| self.get(i))
    }

    /// Where a range of `pages` pages could be, from `first` on and beginning with a block: behind all others if there is
    /// room, so that numbers of devices that are gone are not used again soon.
    ///
    /// # Errors
    /// When there is no room anywhere.
    pub fn place(&self, first: Pfn, pages: Pages) -> Result<PfnRange, PagemapError> {
        let after = |end: Pfn| Pfn(end.0.max(first.0).next_multiple_of(BLOCK_PAGES));
        let last = self.ranges().map(|r| r.end()).max().unwrap_or(first);
        let fits = |base: Pfn| {
            let range = PfnRange { base, pages };
            let inside = base.0.checked_add(pages.0).is_some_and(|end| end <= MAX_PFN + 1);
            (inside && self.ranges().all(|r| r.base >= range.end() || base >= r.end())).then_some(range)
        };
        let ends = [last, first].into_iter().chain(self.ranges().map(|r| r.end()));
        ends.map(after).find_map(fits).ok_or(PagemapError::TooLarge(PfnRange { base: after(last), pages }))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn z1_lookup_finds_the_range_and_overlap_is_refused() {
        let m = Pagemaps::new();
        let a = PfnRange { base: Pfn(1000), pages: Pages(24) };
        let b = PfnRange { base: Pfn(1024), pages: Pages(1) };
        assert_eq!(m.register(a), Ok(0));
        assert_eq!(m.register(b), Ok(1));
        assert_eq!(m.find(Pfn(999)), None);
        assert_eq!(m.find(Pfn(1000)), Some(0));
        assert_eq!(m.find(Pfn(1023)), Some(0));
        assert_eq!(m.find(Pfn(1024)), Some(1));
        assert_eq!(m.find(Pfn(1025)), None);
        assert_eq!(m.register(PfnRange { base: Pfn(0), pages: Pages(1001) }), Err(PagemapError::Overlap(a)));
        assert_eq!(m.register(PfnRange { base: Pfn(5), pages: Pages(0) }), Err(PagemapError::Empty));
        let huge = PfnRange { base: Pfn(MAX_PFN), pages: Pages(u64::MAX) };
        assert_eq!(m.register(huge), Err(PagemapError::TooLarge(huge)));
        m.unregister(0);
        assert_eq!((m.find(Pfn(1000)), m.find(Pfn(1024))), (None, Some(1)));
        assert_eq!(m.register(PfnRange { base: Pfn(0), pages: Pages(1001) }), Ok(0));
    }

    #[test]
    fn ranges_find_room_behind_the_others_or_between_them() {
        let m = Pagemaps::new();
        let place = |pages| m.place(Pfn(700), Pages(pages));
        let a = place(100).unwrap();
        assert_eq!(a.base, Pfn(1024));
        m.register(a).unwrap();
        let b = place(MAX_PFN - 4096).unwrap();
        assert_eq!(b.base, Pfn(1536));
        m.register(b).unwrap();
        assert_eq!(place(2560).unwrap().base, Pfn(MAX_PFN + 1 - 2560));
        assert!(matches!(place(3000), Err(PagemapError::TooLarge(_))));
        m.unregister(0);
        m.register(place(2560).unwrap()).unwrap();
        assert_eq!(place(500).unwrap().base, Pfn(1024), "between them");
        for page in 2..MAX_RANGES as u64 {
            m.register(PfnRange { base: Pfn(page), pages: Pages(1) }).unwrap();
        }
        assert_eq!(m.register(PfnRange { base: Pfn(0), pages: Pages(1) }), Err(PagemapError::TooMany));
    }
}
