//! Regions of the space's own: made, and given back.
//!
//! The kernel keeps neighbouring mappings as one, so next to a region of the space's own may be memory that the program
//! has let grow in place, and a fault there that is in no region looks for it ([`Engine::fault`]). What is just being made
//! or given back is no such memory, although it is mapped and registered beside a region. Therefore mapping and becoming a
//! region are one step for everybody else, and so are the two ends: both happen under `region_changes`. Until the second
//! one the region is [leaving](Attributes::LEAVING): late faults, of the engine's own readers ahead as well, leave it
//! alone.

use super::{AddError, Engine};
use arrayvec::ArrayVec;
use peerspace_core::addr::{PageRange, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_os::{Kernel, Trouble};

/// Places that are tried for a region.
const PLACES: usize = 64;

/// Why a region was not made.
#[derive(Debug)]
pub(crate) enum MakeError {
    /// The kernel refused the mapping.
    Kernel(Trouble),
    /// The space has no room for it.
    Table(VaRange, AddError),
    /// There is no place that all devices can translate (rule G13).
    Unreachable(VaRange),
}

impl<K: Kernel> Engine<K> {
    /// Makes a region of what `map` maps, registered and without content. `unmap` undoes that, without messages. Where a device
    /// has something else at the place, or cannot translate it, `map` is asked again, for another (rule G13); what it mapped
    /// before stays mapped until then, so that the kernel does not offer it twice.
    ///
    /// The caller has no context. Not for threads that receive messages.
    pub(crate) fn make_region<M>(
        &self,
        attributes: Attributes,
        mut map: impl FnMut() -> Result<(M, VaRange), Trouble>,
        mut unmap: impl FnMut(M),
    ) -> Result<(M, VaRange), MakeError> {
        let mut refused: ArrayVec<M, PLACES> = ArrayVec::new();
        let made = loop {
            self.settle_changes();
            let _work = self.contexts.take();
            let changes = self.region_changes.lock();
            let (memory, range) = match map() {
                Ok(mapped) => mapped,
                Err(why) => break Err(MakeError::Kernel(why)),
            };
            // The place may be one that the program has just unmapped: news of that must not hit the new region.
            if self.settled().is_none() {
                drop(changes);
                unmap(memory);
                continue;
            }
            if !self.reserve_on_devices(range) {
                if let Err(memory) = refused.try_push(memory) {
                    drop(changes);
                    unmap(memory.element());
                    break Err(MakeError::Unreachable(range));
                }
                continue;
            }
            let pages = self.geometry.pages_inside(range);
            let added = self.insert_fresh_region(pages, attributes);
            if let Err(e) = added {
                drop(changes);
                unmap(memory);
                self.release_on_devices(range);
                break Err(MakeError::Table(range, e));
            }
            break Ok((memory, range));
        };
        let _work = self.contexts.take();
        refused.into_iter().for_each(unmap);
        made
    }

    /// Gives up a region of our own that nobody refers to any more. `unmap` unmaps pieces of it from its start on,
    /// without messages.
    pub(crate) fn release_region(&self, range: VaRange, mut unmap: impl FnMut(VaRange)) {
        /// Pages that may be mapped although they are no longer accounted for.
        const BEHIND: i64 = 2048;
        let pages = self.geometry.pages_inside(range);
        let work = self.contexts.take();
        let leaving = {
            let _changes = self.region_changes.lock();
            self.regions.update(pages, |a| a.with(Attributes::LEAVING))
        };
        debug_assert!(leaving.is_ok(), "{leaving:?}");
        let mut end_of = |from, to| {
            let gone = PageRange { start: from, end: to };
            let _changes = self.region_changes.lock();
            unmap(self.addresses(gone));
            let removed = self.regions.remove(gone, |_| {});
            debug_assert!(removed.is_ok(), "{removed:?}");
        };
        let (mut unmapped, mut behind) = (pages.start, 0);
        for piece in pages.by_block() {
            let before = self.budget.charged();
            self.close_in_place(piece);
            self.discard(piece, &work.counters);
            behind += (before - self.budget.charged()).max(0);
            if behind >= BEHIND {
                end_of(unmapped, piece.end);
                (unmapped, behind) = (piece.end, 0);
            }
        }
        if unmapped < pages.end {
            end_of(unmapped, pages.end);
        }
        self.release_table(pages);
        self.release_on_devices(range);
    }
}
