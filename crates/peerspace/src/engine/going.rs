//! Pages that are about to go: discarded by the program, and still there.
//!
//! The kernel tells of a discard, and discards, when the news has been received, as soon as the thread that asked for it
//! runs again. In between the table knows nothing of the pages any more, and they look as if the kernel had populated
//! them just now. Whoever took them in hand then would keep what the program has thrown away, and give it back to it. No
//! news tells when the pages are gone, so they are left alone for longer than any thread has to wait for a processor.
//!
//! Where all changes are [announced](super::announce), whoever discards says when it is over: what is there then is new.

use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::PageRange;
use peerspace_core::sync::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How long.
const WHILE: Duration = Duration::from_millis(250);
/// Ranges that are told apart.
const RANGES: usize = 64;

/// What the program has discarded of late. Locked with a context in hand only.
#[derive(Debug)]
pub(crate) struct Going {
    ranges: Mutex<ArrayVec<(PageRange, Instant), RANGES>>,
    /// How many there are: mostly none, which is found out without the lock.
    count: AtomicUsize,
}

impl Going {
    pub(crate) fn new() -> Going {
        Going { ranges: Mutex::new(ArrayVec::new_const()), count: AtomicUsize::new(0) }
    }

    /// The program discards `pages` now.
    pub(crate) fn note(&self, pages: PageRange) {
        let now = Instant::now();
        let mut ranges = self.ranges.lock();
        ranges.retain(|(_, then)| now - *then < WHILE);
        if let Err(full) = ranges.try_push((pages, now)) {
            // Rather too much than too little.
            let (range, then) = ranges.last_mut().expect("it is full");
            let (pages, now) = full.element();
            *range = PageRange { start: range.start.min(pages.start), end: range.end.max(pages.end) };
            *then = now;
        }
        // Relaxed: whoever must see it has locked an entry that is locked after this to be emptied.
        self.count.store(ranges.len(), Relaxed);
    }

    /// Whoever was about to discard `pages` has done so. What of them `another` is about to discard as well stays noted, with what was
    /// discarded together with it; that is asked while nothing can be noted.
    #[cfg(any(feature = "devices", test))]
    pub(crate) fn are_gone(&self, pages: PageRange, another: impl Fn(PageRange) -> bool) {
        if self.count.load(Relaxed) == 0 {
            return;
        }
        let mut ranges = self.ranges.lock();
        let mut at = 0;
        while let Some(&(range, then)) = ranges.get(at) {
            let part = range.intersect(pages);
            let rest = [PageRange { end: part.start, ..range }, PageRange { start: part.end, ..range }];
            let mut rest = rest.into_iter().filter(|rest| !rest.is_empty());
            let (first, second) = (rest.next(), rest.next());
            if part.is_empty() || another(part) || second.is_some() && ranges.is_full() {
                at += 1;
                continue;
            }
            match first {
                None => drop(ranges.swap_remove(at)),
                Some(first) => {
                    ranges[at].0 = first;
                    ranges.extend(second.map(|second| (second, then)));
                    at += 1;
                }
            }
        }
        self.count.store(ranges.len(), Relaxed);
    }

    /// Whether some of `pages` may be about to go.
    pub(crate) fn may_hold(&self, pages: PageRange) -> bool {
        if self.count.load(Relaxed) == 0 {
            return false;
        }
        let mut ranges = self.ranges.lock();
        ranges.retain(|(_, then)| then.elapsed() < WHILE);
        self.count.store(ranges.len(), Relaxed);
        ranges
            .iter()
            .any(|(range, then)| range.start < pages.end && pages.start < range.end && then.elapsed() < WHILE)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use peerspace_core::addr::{Pages, Vpn};

    #[test]
    fn what_was_discarded_of_late_is_about_to_go() {
        let going = Going::new();
        let pages = |start: u64, pages: u64| PageRange::new(Vpn(start), Pages(pages));
        going.note(pages(10, 5));
        assert!(going.may_hold(pages(14, 1)) && going.may_hold(pages(0, 100)));
        assert!(!going.may_hold(pages(15, 5)) && !going.may_hold(pages(5, 5)));
        // More than can be told apart: none is forgotten.
        (0..200).for_each(|n| going.note(pages(1000 + 10 * n, 2)));
        assert!((0..200).all(|n| going.may_hold(pages(1001 + 10 * n, 1))) && going.may_hold(pages(12, 1)));
        std::thread::sleep(WHILE);
        assert!(!going.may_hold(pages(0, 10_000)));
    }

    #[test]
    fn g5_what_is_said_to_be_gone_is_new() {
        let going = Going::new();
        let pages = |start: u64, pages: u64| PageRange::new(Vpn(start), Pages(pages));
        going.note(pages(10, 10));
        going.note(pages(30, 10));
        going.are_gone(pages(14, 2), |_| false);
        assert_eq!([13, 14, 15, 16].map(|n| going.may_hold(pages(n, 1))), [true, false, false, true]);
        // Somebody else is still at it.
        going.are_gone(pages(0, 100), |part| part.start < Vpn(14));
        assert_eq!([10, 13, 16, 30].map(|n| going.may_hold(pages(n, 1))), [true, true, false, false]);
        going.are_gone(pages(0, 100), |_| false);
        assert!(!going.may_hold(pages(0, 100)));
    }
}
