//! The part of a device's memory that holds the descriptors of that memory (rules A2 to A4).
//!
//! ```text
//!  base        base + reserve                                     base + reserve + free
//!   | reserved | padding | taken | padding | taken |   not taken yet   |  pages of the device
//! ```
//!
//! Memory is taken from the front, as from the kernel's `vmem_altmap` (`include/linux/memremap.h`). What is given back
//! mostly leaves the account alone: the sections that use it go together with the device.

use crate::addr::{Pages, Pfn};
use core::fmt;

/// An altmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Altmap {
    base: Pfn,
    reserve: u64,
    free: u64,
    align: u64,
    alloc: u64,
    /// Promised to somebody who has not taken them yet.
    promised: u64,
}

/// Why an altmap cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AltmapError {
    /// It reaches beyond its device.
    LargerThanDevice {
        /// Pages it would take up.
        asked: Pages,
        /// Pages the device has.
        device: Pages,
    },
    /// It has no page to give.
    Empty,
}

impl fmt::Display for AltmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AltmapError::LargerThanDevice { asked, device } => {
                write!(f, "{asked} for descriptors do not fit into a device of {device}")
            }
            AltmapError::Empty => f.write_str("an altmap needs at least one page"),
        }
    }
}

impl core::error::Error for AltmapError {}

/// A request that an altmap refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AltmapRefused {
    /// It was for no whole number of pages, or for none.
    NotPages(u64),
    /// There is less left.
    Exhausted {
        /// Pages asked for, padding included.
        asked: u64,
        /// Pages left.
        left: u64,
    },
}

impl Altmap {
    /// The altmap of a device of `device` pages from `base` on: behind `reserve` pages, `free` pages.
    ///
    /// # Errors
    /// When that is none, or more than the device has.
    pub fn new(base: Pfn, device: Pages, reserve: Pages, free: Pages) -> Result<Altmap, AltmapError> {
        if free.0 == 0 {
            return Err(AltmapError::Empty);
        }
        let asked = Pages(reserve.0.saturating_add(free.0));
        if asked > device || base.0.checked_add(asked.0).is_none() {
            return Err(AltmapError::LargerThanDevice { asked, device });
        }
        Ok(Altmap { base, reserve: reserve.0, free: free.0, align: 0, alloc: 0, promised: 0 })
    }

    /// The first page that is the device's to use for data: behind the altmap.
    pub fn offset(&self) -> Pages {
        Pages(self.reserve + self.free)
    }

    /// The page that is given next.
    fn next(&self) -> u64 {
        self.base.0 + self.reserve + self.alloc + self.align
    }

    /// Pages left, whoever they are promised to.
    pub fn left(&self) -> Pages {
        Pages(self.free - self.alloc - self.align)
    }

    /// Pages given and not given back.
    pub fn taken(&self) -> Pages {
        Pages(self.alloc)
    }

    /// Takes `bytes` bytes of pages of `page` bytes (rule A2): at a page that is a multiple of the lowest bit set in their
    /// number. `promised`: of what was [promised](Altmap::promise).
    ///
    /// # Errors
    /// [`AltmapRefused`]
    pub fn alloc(&mut self, bytes: u64, page: u64, promised: bool) -> Result<Pfn, AltmapRefused> {
        let pages = bytes / page;
        if pages == 0 || !bytes.is_multiple_of(page) {
            return Err(AltmapRefused::NotPages(bytes));
        }
        let next = self.next();
        let unit = 1 << pages.trailing_zeros();
        let padding = next.next_multiple_of(unit) - next;
        let asked = pages + padding;
        let left = self.left().0 - if promised { 0 } else { self.promised };
        if asked > left {
            return Err(AltmapRefused::Exhausted { asked, left });
        }
        if promised {
            self.promised = self.promised.saturating_sub(asked);
        }
        self.align += padding;
        self.alloc += pages;
        Ok(Pfn(next + padding))
    }

    /// Keeps `pages` pages for somebody who will take them one by one.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn promise(&mut self, pages: u64) -> Result<(), AltmapRefused> {
        let left = self.left().0 - self.promised;
        if pages > left {
            return Err(AltmapRefused::Exhausted { asked: pages, left });
        }
        self.promised += pages;
        Ok(())
    }

    /// Takes a [promise](Altmap::promise) of `pages` pages back.
    pub fn forgo(&mut self, pages: u64) {
        debug_assert!(pages <= self.promised, "more is forgone than was promised");
        self.promised -= pages;
    }

    /// Whether `pages` pages from `pfn` on, all of them, are of this altmap (rule A5).
    pub fn contains(&self, pfn: Pfn, pages: Pages) -> bool {
        let start = self.base.0 + self.reserve;
        start <= pfn.0 && pfn.0 + pages.0 <= start + self.free
    }

    /// Takes back `pages` pages from `pfn` on. They can be taken again if they are the last, or all are back; what lies
    /// behind them in use would be given twice otherwise.
    pub fn free(&mut self, pfn: Pfn, pages: Pages) {
        debug_assert!(pages.0 <= self.alloc && self.contains(pfn, pages), "more is given back than was taken");
        let last = pfn.0 + pages.0 == self.next();
        self.alloc -= pages.0;
        if self.alloc == 0 {
            self.align = 0;
        } else if !last {
            self.align += pages.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a2_pages_are_taken_in_order_at_their_own_alignment() {
        let mut a = Altmap::new(Pfn(1001), Pages(2000), Pages(2), Pages(1500)).unwrap();
        assert_eq!(a.offset(), Pages(1502));
        assert_eq!(a.alloc(PAGE, PAGE, false), Ok(Pfn(1003)));
        // 512 pages at a multiple of 512: 20 of padding.
        assert_eq!(a.alloc(512 * PAGE, PAGE, false), Ok(Pfn(1024)));
        // The lowest bit set of 6 is 2.
        assert_eq!(a.alloc(6 * PAGE, PAGE, false), Ok(Pfn(1536)));
        assert_eq!(a.alloc(3 * PAGE, PAGE, false), Ok(Pfn(1542)));
        assert_eq!(a.alloc(2 * PAGE, PAGE, false), Ok(Pfn(1546)));
        assert_eq!((a.taken(), a.left()), (Pages(524), Pages(1500 - 524 - 21)));
    }

    #[test]
    fn a2_refusals_change_nothing() {
        let mut a = Altmap::new(Pfn(1), Pages(8), Pages(0), Pages(8)).unwrap();
        let before = a;
        assert_eq!(a.alloc(0, PAGE, false), Err(AltmapRefused::NotPages(0)));
        assert_eq!(a.alloc(PAGE + 1, PAGE, false), Err(AltmapRefused::NotPages(PAGE + 1)));
        // Eight pages would begin at 8, where there is one left.
        assert_eq!(a.alloc(8 * PAGE, PAGE, false), Err(AltmapRefused::Exhausted { asked: 15, left: 8 }));
        assert_eq!(a, before);
        assert_eq!(
            Altmap::new(Pfn(0), Pages(8), Pages(1), Pages(8)).unwrap_err(),
            AltmapError::LargerThanDevice { asked: Pages(9), device: Pages(8) }
        );
        assert_eq!(Altmap::new(Pfn(0), Pages(8), Pages(1), Pages(0)), Err(AltmapError::Empty));
        let endless = Altmap::new(Pfn(0), Pages(8), Pages(u64::MAX), Pages(2));
        assert!(matches!(endless, Err(AltmapError::LargerThanDevice { .. })));
        let beyond = Altmap::new(Pfn(u64::MAX - 3), Pages(8), Pages(0), Pages(8));
        assert!(matches!(beyond, Err(AltmapError::LargerThanDevice { .. })));
    }

    #[test]
    fn a_promise_is_kept() {
        let mut a = Altmap::new(Pfn(0), Pages(10), Pages(0), Pages(10)).unwrap();
        a.promise(4).unwrap();
        assert_eq!(a.alloc(7 * PAGE, PAGE, false), Err(AltmapRefused::Exhausted { asked: 7, left: 6 }));
        for i in 0..6 {
            assert_eq!(a.alloc(PAGE, PAGE, false), Ok(Pfn(i)));
        }
        assert!(a.alloc(PAGE, PAGE, false).is_err() && a.promise(1).is_err());
        for i in 6..9 {
            assert_eq!(a.alloc(PAGE, PAGE, true), Ok(Pfn(i)));
        }
        a.forgo(1);
        assert_eq!(a.alloc(PAGE, PAGE, false), Ok(Pfn(9)));
    }

    proptest! {
        /// Against the definition: nothing is given twice, everything lies inside and is aligned, the account is right.
        #[test]
        fn a2_agrees_with_its_definition(
            base in 0u64..5000, reserve in 0u64..50, free in 1u64..4000,
            asks in proptest::collection::vec((1u64..700, any::<bool>(), any::<usize>()), 1..60),
        ) {
            let mut a = Altmap::new(Pfn(base), Pages(10_000), Pages(reserve), Pages(free)).unwrap();
            let (mut end, mut out) = (base + reserve, std::vec::Vec::new());
            for (pages, give_back, at) in asks {
                let unit = 1u64 << pages.trailing_zeros();
                let start = end.div_ceil(unit) * unit;
                match a.alloc(pages * PAGE, PAGE, false) {
                    Ok(pfn) => {
                        prop_assert_eq!(pfn.0, start);
                        prop_assert!(a.contains(pfn, Pages(pages)));
                        end = start + pages;
                        out.push((pfn, pages));
                    }
                    Err(_) => prop_assert!(start + pages > base + reserve + free),
                }
                prop_assert!(!a.contains(Pfn(base + reserve + free), Pages(1)));
                if give_back && !out.is_empty() {
                    let (pfn, pages) = out.swap_remove(at % out.len());
                    a.free(pfn, Pages(pages));
                    if out.is_empty() {
                        end = base + reserve;
                    } else if pfn.0 + pages == end {
                        end = pfn.0;
                    }
                }
                prop_assert_eq!(a.taken().0, out.iter().map(|(_, pages)| pages).sum::<u64>());
            }
        }
    }
}
