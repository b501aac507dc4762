//! Regions of persistent devices: opened by name, used in place, closed (rule Z5).
//!
//! A region's blocks are the device's own to give out, and it keeps them by the region's name. As long as a region is open here,
//! each of its blocks is in use like any page of a device: claimed, with a descriptor, owned by a table entry, and freed when the
//! region is closed. Its data stay.

use super::own::MakeError;
use super::tier::Tier;
use super::{AddError, Engine};
use peerspace_core::addr::{BLOCK_PAGES, Order, Pages, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_os::{Kernel, Trouble};

/// Why a named region was not opened. Nothing has changed.
#[derive(Debug)]
pub(crate) enum NamedError {
    /// There is no such device, or it is being detached.
    NotThere,
    /// The block at this page of the device is in use here, or its descriptor has no room.
    InUse(u64),
    /// These pages (the first, and how many) are no blocks of the device; or there are none at all.
    NoBlocks(u64, u64),
    /// The kernel refused the mapping.
    Kernel(Trouble),
    /// The space has no room for it.
    Table(VaRange, AddError),
}

impl<K: Kernel> Engine<K> {
    /// Makes a region of the pages that `extents` (first page, pages) of device `id` say, mapped by `map`, whose mapping
    /// `unmap` undoes. To be called without a lock and without a context.
    pub(crate) fn open_named<M>(
        &self,
        id: u64,
        extents: &[(u64, u64)],
        map: impl Fn(&Tier<K::Words>) -> Result<(M, VaRange), Trouble>,
        mut unmap: impl FnMut(M),
    ) -> Result<(M, VaRange), NamedError> {
        let _turn = self.take_turn();
        let tier = {
            let _work = self.contexts.take();
            self.tiers.by_id(id).ok_or(NamedError::NotThere)?
        };
        let pages = tier.range.pages.0;
        // What a device says of itself may be anything.
        let is_fine = |(first, count): &&(u64, u64)| {
            let aligned = first % BLOCK_PAGES == 0 && count % BLOCK_PAGES == 0 && *count > 0;
            aligned && first.checked_add(*count).is_some_and(|end| end <= pages)
        };
        if let Some((first, count)) = extents.iter().find(|e| !is_fine(e)).or((extents.is_empty()).then_some(&(0, 0)))
        {
            return Err(NamedError::NoBlocks(*first, *count));
        }
        let blocks =
            || extents.iter().flat_map(|(first, pages)| (*first..first + pages).step_by(BLOCK_PAGES as usize));
        let give_up = |n: usize| blocks().take(n).for_each(|page| tier.free(page, Order::BLOCK));
        let mut claimed = 0;
        for page in blocks() {
            // Whose data it is, is known when it has an address.
            if !tier.claim_block(page, Vpn(0)) {
                give_up(claimed);
                return Err(NamedError::InUse(page));
            }
            claimed += 1;
        }
        let made = self.make_region(Attributes::PERSISTENT.with(Attributes::KEPT), || map(&tier), &mut unmap);
        let (memory, range) = match made {
            Ok(made) => made,
            Err(e) => {
                give_up(claimed);
                return Err(match e {
                    MakeError::Kernel(trouble) => NamedError::Kernel(trouble),
                    MakeError::Unreachable(_) => NamedError::Kernel(peerspace_os::Trouble::Unsuitable),
                    MakeError::Table(range, e) => NamedError::Table(range, e),
                });
            }
        };
        let _work = self.contexts.take();
        let all = self.geometry.pages_inside(range);
        for (block, page) in all.by_block().zip(blocks()) {
            debug_assert_eq!(block.pages(), Pages(BLOCK_PAGES));
            let entry = self.table.lock(block.start).expect("a region is covered by the table");
            tier.place(page, Order::BLOCK, block.start);
            let pfn = tier.base() + page;
            self.note_in_place(block, pfn, true);
            entry.commit(State::Coherent { pfn });
        }
        Ok((memory, range))
    }

    /// Whether a block of `extents` of device `id` is in use here.
    pub(crate) fn is_open(&self, id: u64, extents: &[(u64, u64)]) -> bool {
        let _work = self.contexts.take();
        let Some(tier) = self.tiers.by_id(id) else { return false };
        extents.iter().any(|(first, pages)| {
            tier.next_in_use(*first).is_some_and(|folio| folio.page < first.saturating_add(*pages))
        })
    }
}
