//! The staging area: where frames are while the program does not map them.
//!
//! ```text
//!  base                            base + blocks * block bytes            end
//!  +---------+---------+-----------+--+--+--+--+--+--+--+--+--+--+--------+
//!  | block 0 | block 1 |    ...    |s0|s1|s2|  ...  slots, a page each    |
//!  +---------+---------+-----------+--+--+--+--+--+--+--+--+--+--+--------+
//! ```
//!
//! Pages here come and go by system calls that other threads make, so nobody may hold a reference to the bytes
//! of a page that is about to be moved. Each *cell* (a block, or a slot) has a word that counts who reads it or
//! says that somebody has it alone; a clash is a bug of the caller and panics, before any byte is touched.

use super::map::{Arena, Mapping};
use peerspace_core::addr::{Geometry, Va, VaRange};
use peerspace_core::sync::Ordering;
use peerspace_core::words::Words;
use rustix::io::Errno;
use rustix::mm::Advice;

const ALONE: u64 = u64::MAX;

/// How a cell is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Its bytes are read.
    Shared,
    /// Its bytes are written, or its pages come or go.
    Alone,
}

/// The staging area and who uses its cells.
#[derive(Debug)]
pub(super) struct Staging {
    mapping: Mapping,
    blocks: u64,
    geometry: Geometry,
    cells: Arena,
}

/// Cells in use; dropping it lets go of them.
pub(super) struct Claim<'a> {
    staging: &'a Staging,
    cells: std::ops::Range<usize>,
    how: Use,
}

impl Staging {
    pub(super) fn new(geometry: Geometry, blocks: u64, slots: u64) -> Result<Staging, Errno> {
        let bytes = blocks * geometry.block_bytes() as u64 + slots * geometry.page_bytes() as u64;
        let mapping = Mapping::new(bytes as usize, geometry.block_bytes(), true)?;
        let cells = Arena::new((blocks + slots) as usize, (blocks + slots) as usize)?;
        let staging = Staging { mapping, blocks, geometry, cells };
        let huge = staging.block_bytes();
        // SAFETY: this advice changes no content. Refusal means that there are no huge pages, which shows later.
        unsafe {
            let _ = staging.mapping.advise(0, huge, Advice::LinuxHugepage);
            if huge < staging.mapping.len() {
                let _ = staging.mapping.advise(huge, staging.mapping.len() - huge, Advice::LinuxNoHugepage);
            }
            // Frames are not worth a place in a core dump twice.
            let _ = staging.mapping.advise(0, staging.mapping.len(), Advice::LinuxDontDump);
        }
        Ok(staging)
    }

    fn block_bytes(&self) -> usize {
        (self.blocks as usize) * self.geometry.block_bytes()
    }

    pub(super) fn range(&self) -> VaRange {
        self.mapping.range()
    }

    pub(super) fn contains(&self, range: VaRange) -> bool {
        let all = self.range();
        all.start <= range.start && range.end <= all.end
    }

    /// Claims the cells that `range` touches.
    ///
    /// # Panics
    /// When the range is no part of staging, or somebody uses a cell of it in a way that excludes this one.
    pub(super) fn claim(&self, range: VaRange, how: Use) -> Claim<'_> {
        assert!(self.contains(range) && !range.is_empty(), "{range} is no part of staging {}", self.range());
        let cell = |va: Va| {
            let offset = va.0 - self.range().start.0;
            let blocks = self.block_bytes() as u64;
            if offset < blocks {
                (offset / self.geometry.block_bytes() as u64) as usize
            } else {
                (self.blocks + (offset - blocks) / self.geometry.page_bytes() as u64) as usize
            }
        };
        let cells = cell(range.start)..cell(Va(range.end.0 - 1)) + 1;
        // Cells are added one by one, so that what was taken is let go of when a later one panics.
        let mut claim = Claim { staging: self, cells: cells.start..cells.start, how };
        for i in cells {
            let word = self.cells.at(i);
            // Acquire: pairs with the Release of the drop before.
            let taken = match how {
                Use::Alone => word.compare_exchange(0, ALONE, Ordering::Acquire, Ordering::Relaxed).is_ok(),
                Use::Shared => {
                    word.try_update(Ordering::Acquire, Ordering::Relaxed, |n| (n != ALONE).then_some(n + 1)).is_ok()
                }
            };
            assert!(taken, "staging cell {i} ({range}) has two users: every frame has one owner");
            claim.cells.end = i + 1;
        }
        claim
    }

    /// The bytes of a claimed range.
    pub(super) fn bytes<'a>(&'a self, claim: &'a Claim<'_>, range: VaRange) -> &'a [u8] {
        let _ = claim;
        // SAFETY: the range lies in the mapping (checked by claim), which is readable; the claim keeps everybody
        // from writing or moving its pages while the reference lives.
        unsafe { std::slice::from_raw_parts(range.start.0 as *const u8, range.len() as usize) }
    }

    /// The bytes of a range claimed alone.
    pub(super) fn bytes_mut<'a>(&'a self, claim: &'a mut Claim<'_>, range: VaRange) -> &'a mut [u8] {
        assert!(claim.how == Use::Alone);
        // SAFETY: as above; the claim is exclusive, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(range.start.0 as *mut u8, range.len() as usize) }
    }

    /// Discards the pages of a range claimed alone.
    pub(super) fn discard(&self, claim: &Claim<'_>, range: VaRange) -> Result<(), Errno> {
        assert!(claim.how == Use::Alone);
        let offset = (range.start.0 - self.range().start.0) as usize;
        // SAFETY: nobody else uses the range, so nobody minds its content.
        unsafe { self.mapping.advise(offset, range.len() as usize, Advice::LinuxDontNeed) }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        for i in self.cells.clone() {
            let word = self.staging.cells.at(i);
            // Release: what was done to the bytes comes before the next claim.
            match self.how {
                Use::Alone => word.store(0, Ordering::Release),
                Use::Shared => {
                    word.fetch_sub(1, Ordering::Release);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging() -> Staging {
        Staging::new(Geometry::KIB4, 2, 8).unwrap()
    }

    fn slots(s: &Staging, from: u64, n: u64) -> VaRange {
        VaRange::new(Va(s.range().start.0 + (2 << 21) + from * 4096), n * 4096).unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_excludes() {
        let s = staging();
        let a = s.claim(slots(&s, 0, 4), Use::Shared);
        let b = s.claim(slots(&s, 3, 2), Use::Shared);
        drop((a, b));
        let mut w = s.claim(slots(&s, 2, 2), Use::Alone);
        s.bytes_mut(&mut w, slots(&s, 2, 2)).fill(9);
        drop(w);
        let r = s.claim(slots(&s, 2, 1), Use::Shared);
        assert!(s.bytes(&r, slots(&s, 2, 1)).iter().all(|b| *b == 9));
    }

    #[test]
    fn two_owners_of_a_cell_are_found_out() {
        let s = staging();
        let _a = s.claim(slots(&s, 4, 1), Use::Shared);
        let clash = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = s.claim(slots(&s, 3, 2), Use::Alone);
        }));
        assert!(clash.is_err());
        // The cell taken before the clash is free again.
        drop(s.claim(slots(&s, 3, 1), Use::Alone));
    }

    #[test]
    #[should_panic(expected = "no part of staging")]
    fn other_memory_is_refused() {
        let s = staging();
        let _ = s.claim(slots(&s, 7, 2), Use::Shared);
    }
}
