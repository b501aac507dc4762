//! What a program says before it changes its own mappings, so that devices hear of it in time (rule G5).

use crate::space::Space;
use arrayvec::ArrayVec;
use peerspace_core::addr::{PageRange, Va, VaRange};
use peerspace_os::linux::signal::without_signals;
use std::fmt;

/// A call that changes mappings is under way, from when [`Space::announce`] returns until this is dropped.
#[must_use = "dropping it says that the call is over"]
pub struct Announced {
    space: Space,
    ranges: ArrayVec<PageRange, 2>,
}

impl Space {
    /// Says that the program is about to change what is mapped at these `len` bytes, or who may access it: by `munmap`,
    /// `mremap`, `mprotect`, `madvise`, or by mapping something else there. From when this returns until the result is dropped,
    /// no device accesses these pages (rule G5): their translations are taken away, and faults of devices wait. Drop it when the
    /// call has returned, whether it succeeded or not; do nothing else in between, least of all wait for a device.
    ///
    /// What a space has not been told of it hears of from the kernel, a moment later: before the thread that made the change
    /// goes on no device uses the old memory any more, but another thread may have been given the addresses anew by then. And
    /// of `mprotect` the kernel says nothing: what devices have mapped they go on to access as before. A library that stands
    /// between a program and the C library's calls announces each of them.
    ///
    /// Pages that no space manages may be among them. Nothing is allocated. The data is not touched: what is on a device stays
    /// there, and goes when the kernel says that it has been unmapped or discarded. What is in place of a device goes home before
    /// the call. Where no device runs code, and nothing was [promised](Space::promise_announcements), this does nothing. At most
    /// 128 calls can be under way at once; more wait.
    pub fn announce(&self, start: *const u8, len: usize) -> Announced {
        self.announce_all(&[(start, len)])
    }

    /// The same for a call that moves what is mapped at `from` (`mremap`), which changes the mappings of both places.
    pub fn announce_move(&self, (from, len): (*const u8, usize), (to, new_len): (*const u8, usize)) -> Announced {
        self.announce_all(&[(from, len), (to, new_len)])
    }

    /// Waits until all changes that the program has made to its mappings so far have been acted on: what is asked of the space from
    /// then on it answers for the mappings as they are. A call that has returned may have made a change of which the space has
    /// heard and not more yet.
    pub fn settle(&self) {
        without_signals(|| self.engine().settle_changes());
    }

    fn announce_all(&self, places: &[(*const u8, usize)]) -> Announced {
        let engine = self.engine();
        let mut ranges = ArrayVec::new();
        if engine.tiers.any_mmu() || engine.announcements.are_promised() {
            // What wraps is refused by the call itself; up to the end of the addresses it is announced all the same.
            let range = |&(start, len): &(*const u8, usize)| VaRange {
                start: Va(start as u64),
                end: Va((start as u64).saturating_add(len as u64)),
            };
            ranges
                .extend(places.iter().map(|place| engine.geometry.pages_out(range(place))).filter(|r| !r.is_empty()));
            without_signals(|| engine.announce_change(&ranges));
        }
        Announced { space: self.clone(), ranges }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if !self.ranges.is_empty() {
            without_signals(|| self.space.engine().change_is_over(&self.ranges));
        }
    }
}

impl fmt::Debug for Announced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Announced").field(&self.ranges).finish()
    }
}
