//! The pfn ranges of devices: which device a page frame number belongs to (rule Z1).
//!
//! One number space covers the host and all devices. The host's frames come first; each device gets a range
//! behind it, as large as the pages it can hold.

use crate::addr::{Pages, Pfn};
use crate::entry::MAX_PFN;
use alloc::vec::Vec;
use core::fmt;

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
}

impl fmt::Display for PagemapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PagemapError::Empty => write!(f, "a device needs at least one page"),
            PagemapError::Overlap(r) => write!(f, "the range overlaps {:?} + {}", r.base, r.pages),
            PagemapError::TooLarge(r) => {
                write!(f, "{} from {:?} do not fit below {:?}", r.pages, r.base, Pfn(MAX_PFN))
            }
        }
    }
}

impl core::error::Error for PagemapError {}

/// All registered ranges.
#[derive(Debug, Default)]
pub struct Pagemaps {
    ranges: Vec<PfnRange>,
}

impl Pagemaps {
    /// No ranges.
    pub const fn new() -> Pagemaps {
        Pagemaps { ranges: Vec::new() }
    }

    /// Registers `range`; returns its number.
    ///
    /// # Errors
    /// When it is empty, too large, or overlaps another (rule Z1).
    pub fn register(&mut self, range: PfnRange) -> Result<usize, PagemapError> {
        if range.pages.0 == 0 {
            return Err(PagemapError::Empty);
        }
        if range.base.0.checked_add(range.pages.0).is_none_or(|end| end > MAX_PFN + 1) {
            return Err(PagemapError::TooLarge(range));
        }
        if let Some(r) = self.ranges.iter().find(|r| r.base < range.end() && range.base < r.end()) {
            return Err(PagemapError::Overlap(*r));
        }
        self.ranges.push(range);
        Ok(self.ranges.len() - 1)
    }

    /// The number of the range that covers `pfn` (rule Z1).
    #[inline]
    pub fn find(&self, pfn: Pfn) -> Option<usize> {
        self.ranges.iter().position(|r| r.contains(pfn))
    }

    /// Range `i`.
    pub fn get(&self, i: usize) -> PfnRange {
        self.ranges[i]
    }

    /// The first pfn behind all ranges.
    pub fn end(&self) -> Pfn {
        self.ranges.iter().map(|r| r.end()).max().unwrap_or(Pfn(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn z1_lookup_finds_the_range_and_overlap_is_refused() {
        let mut m = Pagemaps::new();
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
        assert_eq!(m.end(), Pfn(1025));
    }
}
