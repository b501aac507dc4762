//! How much RAM managed memory may take up, and how much it does.
//!
//! Whoever makes a physical page appear charges it first, whoever makes one go away uncharges it after: mapped
//! pages, staged pages (garbage included), block frames whether in use or not, and the pages a program's own
//! kernel faults populated ([`Budget::set_native`]). One counter, no lock; a charge that would exceed the limit
//! fails, and the caller reclaims.

use peerspace_core::addr::Pages;
use peerspace_core::plan::Watermarks;
use peerspace_core::sync::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// The account of host memory, in pages.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: AtomicU64,
    charged: AtomicI64,
    native: AtomicI64,
    peak: AtomicI64,
    /// Pages charged although the limit was reached, because no device had room for what would have to go.
    forced: AtomicU64,
    /// Pages that users keep resident, as often as they do, and how many they may.
    pinned: AtomicU64,
    most_pinned: AtomicU64,
}

/// So many pages cannot be pinned in addition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyPinned {
    pub(crate) pinned: Pages,
    pub(crate) most: Pages,
}

impl Budget {
    pub(crate) fn new(limit: Pages) -> Budget {
        Budget {
            limit: AtomicU64::new(limit.0),
            charged: AtomicI64::new(0),
            native: AtomicI64::new(0),
            peak: AtomicI64::new(0),
            forced: AtomicU64::new(0),
            pinned: AtomicU64::new(0),
            most_pinned: AtomicU64::new(limit.0 / 4 * 3),
        }
    }

    /// Sets how many pages may be pinned: otherwise three quarters of the limit.
    pub(crate) fn set_most_pinned(&self, most: Pages) {
        self.most_pinned.store(most.0, Relaxed);
    }

    pub(crate) fn pinned(&self) -> Pages {
        Pages(self.pinned.load(Relaxed))
    }

    /// Takes note that `pages` are going to be pinned, if that many may be.
    pub(crate) fn pin(&self, pages: Pages) -> Result<(), TooManyPinned> {
        let most = self.most_pinned.load(Relaxed);
        let fits = |pinned: u64| pinned.checked_add(pages.0).filter(|sum| *sum <= most);
        // Relaxed: a counter.
        match self.pinned.fetch_update(Relaxed, Relaxed, fits) {
            Ok(_) => Ok(()),
            Err(pinned) => Err(TooManyPinned { pinned: Pages(pinned), most: Pages(most) }),
        }
    }

    pub(crate) fn unpin(&self, pages: Pages) {
        let before = self.pinned.fetch_sub(pages.0, Relaxed);
        debug_assert!(before >= pages.0, "more pages are let go of than were pinned");
    }

    pub(crate) fn limit(&self) -> Pages {
        Pages(self.limit.load(Relaxed))
    }

    pub(crate) fn watermarks(&self) -> Watermarks {
        Watermarks::for_limit(self.limit())
    }

    /// Pages in use, native ones included.
    pub(crate) fn used(&self) -> i64 {
        self.charged.load(Relaxed) + self.native.load(Relaxed)
    }

    /// Pages charged by the engine itself.
    pub(crate) fn charged(&self) -> i64 {
        self.charged.load(Relaxed)
    }

    /// Pages below the limit; negative when it is exceeded.
    pub(crate) fn left(&self) -> i64 {
        self.limit.load(Relaxed) as i64 - self.used()
    }

    pub(crate) fn peak(&self) -> Pages {
        Pages(self.peak.load(Relaxed).max(0) as u64)
    }

    pub(crate) fn forced(&self) -> Pages {
        Pages(self.forced.load(Relaxed))
    }

    /// Charges `pages`, or nothing if they do not fit.
    #[must_use]
    pub(crate) fn try_charge(&self, pages: u64) -> bool {
        // Relaxed: a counter; what the pages hold is handed over by the table's locks.
        let limit = self.limit.load(Relaxed) as i64 - self.native.load(Relaxed);
        let mut now = self.charged.load(Relaxed);
        loop {
            let next = now + pages as i64;
            if next > limit {
                return false;
            }
            match self.charged.compare_exchange_weak(now, next, Relaxed, Relaxed) {
                Ok(_) => {
                    self.note_peak();
                    return true;
                }
                Err(seen) => now = seen,
            }
        }
    }

    /// Charges `pages` even beyond the limit: losing data would be the alternative.
    pub(crate) fn force(&self, pages: u64) {
        self.forced.fetch_add(pages, Relaxed);
        self.force_quietly(pages);
    }

    /// Charges `pages` even beyond the limit, on purpose.
    pub(crate) fn force_quietly(&self, pages: u64) {
        self.charged.fetch_add(pages as i64, Relaxed);
        self.note_peak();
    }

    pub(crate) fn uncharge(&self, pages: u64) {
        let before = self.charged.fetch_sub(pages as i64, Relaxed);
        debug_assert!(before >= pages as i64, "{pages} pages uncharged of {before}");
    }

    /// Pages that moved from the kernel's care into ours: charged here, native no longer.
    pub(crate) fn take_native(&self, pages: u64) {
        self.charged.fetch_add(pages as i64, Relaxed);
        let native = self.native.fetch_sub(pages as i64, Relaxed) - pages as i64;
        if native < 0 {
            // More than was known of.
            let _ = self.native.compare_exchange(native, 0, Relaxed, Relaxed);
        }
    }

    /// Says how many pages the kernel populated by itself in the program's memory, as far as is known.
    /// Pages the kernel populated by itself, as far as is known.
    pub(crate) fn native(&self) -> i64 {
        self.native.load(Relaxed)
    }

    /// So many more pages that the kernel populated are managed now.
    pub(crate) fn add_native(&self, pages: i64) {
        self.native.fetch_add(pages, Relaxed);
        self.note_peak();
    }

    #[cfg(any(all(test, not(shuttle)), feature = "process"))]
    pub(crate) fn set_native(&self, pages: i64) {
        self.native.store(pages.max(0), Relaxed);
        self.note_peak();
    }

    fn note_peak(&self) {
        let used = self.used();
        // Mostly a load: the peak rarely rises.
        if used > self.peak.load(Relaxed) {
            self.peak.fetch_max(used, Relaxed);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_under_contention() {
        let b = Budget::new(Pages(1000));
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for n in 0..20_000u64 {
                        if b.try_charge(n % 7) {
                            assert!(b.used() <= 1000);
                            b.uncharge(n % 7);
                        }
                    }
                });
            }
        });
        assert_eq!(b.charged(), 0);
        assert!(b.peak() <= Pages(1000));
        b.set_native(995);
        assert!(b.try_charge(5) && !b.try_charge(1));
        b.force(1);
        assert_eq!((b.left(), b.forced()), (-1, Pages(1)));
    }
}
