//! Emptying a device that stays: everything leaves its memory, and it goes on to be used (rules G7, Z3).
//!
//! What a device that runs code holds lands on standby, as if there had been no room for it; what a device without code holds goes
//! to others, or home. Meanwhile nothing that leaves RAM goes there. The device itself may go on to fault, and brings what it
//! needs: so the device is gone through a few times, and not until it is empty whatever happens.

use super::Engine;
use super::detach::DetachError;
use super::tier::Tier;
use super::turn::Turn;
use crate::device::MemoryType;
use peerspace_core::addr::{DevicePfn, PageRange, Pages};
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::Kernel;
use peerspace_os::own::Buffer;
use std::time::Duration;

/// Rounds over a device in which nothing left it, before what is there is left there.
const IDLE: u32 = if cfg!(any(test, shuttle)) { 20 } else { 200 };
/// Tries with one folio in a round.
const SAME: u32 = 16;
/// Rounds altogether.
const ROUNDS: u32 = 1000;
const PAUSE: Duration = Duration::from_micros(100);

/// Nothing that leaves RAM goes to the device at this base until this is dropped.
struct Resting<'a, K: Kernel>(&'a Engine<K>, DevicePfn);

impl<K: Kernel> Engine<K> {
    /// Has everything leave device `id` that can. Returns how many pages left it. To be called without a lock
    /// and without a context; not by threads that receive messages.
    pub(crate) fn empty_device(&self, id: u64) -> Result<Pages, DetachError> {
        let mut buffer = Buffer::new(self.geometry.block_bytes()).map_err(|_| DetachError::NoMemory)?;
        let turn = self.take_turn();
        let (base, mmu, before) = {
            let _work = self.contexts.take();
            let tier = self.tiers.by_id(id).ok_or(DetachError::NotThere)?;
            if tier.info.memory == MemoryType::Persistent && tier.used() > Pages(0) {
                return Err(DetachError::Open(tier.used()));
            }
            tier.rest(true);
            (tier.base(), tier.mmu_id(), tier.used())
        };
        let resting = Resting(self, base);
        let evicted = || {
            let count =
                |tier: &Tier<K::Words>| tier.mmu.as_ref().map_or(0, |state| state.counters.evicted.load(Relaxed));
            mmu.and_then(|mmu| self.with_tier(mmu, count)).unwrap_or(0)
        };
        let evicted_before = evicted();
        let mut idle = 0;
        let mut left = before;
        for _ in 0..ROUNDS {
            let now = match mmu {
                Some(mmu) => self.empty_round(mmu, &turn)?,
                None => self.evict_round(base, &mut buffer, &turn, true)?.0,
            };
            idle = if now < left { 0 } else { idle + 1 };
            left = now;
            if left == Pages(0) || idle > IDLE {
                break;
            }
            if idle > 0 {
                crate::sync::sleep(PAUSE);
            }
        }
        drop(resting);
        // The device may have brought in as much meanwhile.
        let fewer = before.0.saturating_sub(left.0);
        Ok(Pages(fewer.max(evicted().saturating_sub(evicted_before))))
    }

    /// Goes through the device with `mmu` once. Returns how many pages of it are in use yet.
    fn empty_round(&self, mmu: MmuId, turn: &Turn<'_, K::Park>) -> Result<Pages, DetachError> {
        let mut from = 0;
        loop {
            let found = self.with_tier(mmu, |tier| (tier.next_in_use(from), tier.used()));
            // It has failed, or gone.
            let Some((found, used)) = found else { return Ok(Pages(0)) };
            let Some(folio) = found else { return Ok(used) };
            let pages = PageRange::new(folio.vpn, folio.order.pages());
            self.take_range_from_place(pages, turn).map_err(DetachError::Place)?;
            let mut rest = Some(folio);
            let mut again = 0;
            while let Some(part) = rest {
                rest = self.expel(mmu, part);
                // A block that goes on in pages is tried once more; but somebody may have it in hand for long.
                if rest.is_some_and(|next| next.page == part.page) {
                    again += 1;
                    rest = rest.filter(|_| again < SAME);
                    crate::sync::yield_now();
                }
            }
            from = folio.page + folio.order.pages().0;
        }
    }
}

impl<K: Kernel> Drop for Resting<'_, K> {
    fn drop(&mut self) {
        let _work = self.0.contexts.take();
        if let Some(tier) = self.0.tiers.find(self.1) {
            tier.rest(false);
        }
    }
}
