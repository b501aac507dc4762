//! Eviction: what has been on standby long enough leaves RAM.
//!
//! What it takes to drop a frame is decided by [`plan::on_evict`]: nothing where another copy is certain, a
//! comparison where it is likely, a write otherwise. A frame that no device takes stays where it is; nothing is
//! ever dropped on hope.
//!
//! # What is clean is known, not guessed
//!
//! A page that came by COPY with write protection from its first moment is clean until a write faults. One that was moved in and
//! protected afterwards may have been written in between: it is *unverified*, and compared with the device's copy
//! ([`Device::holds`](crate::device::Device::holds)) when it leaves. Pages that were written each time they were home are mapped
//! writable at once, unverified, which saves the second fault; if they were not written after all, the comparison says so.

use super::context::Working;
use super::stats::{count, count_n};
use super::tiers::{BATCH, WriteBack};
use super::{Engine, Entry};
use arrayvec::ArrayVec;
use peerspace_core::addr::{BLOCK_PAGES, DevicePfn, Order, Pages, VaRange};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Backing, Frame};
use peerspace_core::plan::{self, EvictPlan};
use peerspace_os::Kernel;

/// What became of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// It is empty, and so many pages went back to the kernel.
    Freed(u64),
    /// Some of its pages could not go; it waits again.
    Kept,
    /// No segment waits.
    Nothing,
}

/// True when all of `bytes` are zero. Most pages that are not say so in their first line.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let lines = bytes.chunks_exact(64);
    let tail = lines.remainder();
    lines.into_iter().all(|line| line.iter().fold(0, |a, b| a | b) == 0) && tail.iter().all(|b| *b == 0)
}

impl<K: Kernel> Engine<K> {
    /// Evicts everything in the segment that has waited longest.
    pub(crate) fn drain_oldest(&self, work: &mut Working<'_>) -> Drained {
        match self.ring.oldest() {
            Some(segment) => self.drain(segment, work),
            None => Drained::Nothing,
        }
    }

    /// Evicts everything in `segment`, which is the caller's: it waits again if something has to stay.
    pub(super) fn drain(&self, segment: u32, work: &mut Working<'_>) -> Drained {
        let slots = super::staging::Ring::<K::Words>::segment(segment);
        let range = self.ring.range(slots);
        let mut left = false;
        // Dirty pages wait for each other, to be written in one batch; their entries stay locked meanwhile.
        let mut dirty: ArrayVec<(Entry<'_, K>, Frame, u32), BATCH> = ArrayVec::new();
        for slot in slots.first..slots.first + slots.count {
            let Some(frame) = self.ring.occupant(slot) else { continue };
            // It may be taken back and freed at any moment (H10).
            if !self.get_frame(frame) {
                left |= self.ring.occupant(slot).is_some();
                continue;
            }
            let entry = self.table.try_lock(self.memmap.vpn(frame)).ok().flatten();
            self.put_frame(frame);
            let Some(entry) = entry else {
                left |= self.ring.occupant(slot) == Some(frame);
                continue;
            };
            // Look again: the page may have been taken back, and the frame be another page's by now.
            let ours = !entry.is_whole()
                && self.ring.occupant(slot) == Some(frame)
                && matches!(entry.state(), State::Standby { pfn, .. } if pfn == self.memmap.pfn(frame))
                && self.memmap.slot(frame) == Some(slot);
            if !ours {
                left |= self.ring.occupant(slot).is_some();
                continue;
            }
            match self.destination(&entry, frame, work, |read| self.kernel.read_staged(self.ring.slot(slot), read)) {
                Some(state) => self.evicted(entry, frame, Some(slot), state, work),
                None => dirty.push((entry, frame, slot)),
            }
        }
        if !dirty.is_empty() {
            left |= !self.write_segment(dirty, work);
        }
        if left || self.kernel.drop_staged(range).is_err() {
            self.ring.put_off(segment);
            return Drained::Kept;
        }
        let freed = self.ring.drained(segment).0;
        self.budget.uncharge(freed);
        Drained::Freed(freed)
    }

    /// Where a staged page can go without being written: its new state, if there is one.
    fn destination(
        &self,
        entry: &Entry<'_, K>,
        frame: Frame,
        work: &Working<'_>,
        bytes: impl FnOnce(&mut dyn FnMut(&[u8]) -> bool) -> bool,
    ) -> Option<State> {
        let State::Standby { dirt, .. } = entry.state() else { unreachable!("the page is on standby") };
        let backing = self.memmap.backing(frame);
        let same_life = self.memmap.epoch(frame) == self.life();
        match self.plan_evict(dirt, backing, same_life) {
            EvictPlan::DropToZero => {
                count(&work.counters.clean_dropped);
                Some(State::Empty)
            }
            EvictPlan::DropTo(pfn) => {
                count(&work.counters.clean_dropped);
                Some(self.on_device(pfn, false))
            }
            EvictPlan::CompareWith(pfn) => {
                let same = bytes(&mut |b| self.tiers.holds(pfn, b));
                same.then(|| {
                    count(&work.counters.clean_dropped);
                    count(&work.counters.compared_equal);
                    self.on_device(pfn, false)
                })
            }
            // Whatever else it was, a page of zeros needs no place on a device.
            EvictPlan::CompareWithZero | EvictPlan::WriteBack => {
                let zero = bytes(&mut |b| is_zero(b));
                zero.then(|| {
                    count(&work.counters.zero_dropped);
                    State::Empty
                })
            }
        }
    }

    /// How a frame can go. What a device held that has failed since is worth nothing: the frame is all there is (Z9).
    pub(super) fn plan_evict(&self, dirt: Dirt, backing: Backing, same_life: bool) -> EvictPlan {
        match plan::on_evict(dirt, backing, same_life) {
            EvictPlan::DropTo(pfn) | EvictPlan::CompareWith(pfn) if self.tiers.of(pfn).has_failed() => {
                EvictPlan::WriteBack
            }
            plan => plan,
        }
    }

    /// The state of a page that leaves for `pfn` now.
    fn on_device(&self, pfn: DevicePfn, rewritten: bool) -> State {
        State::Device { pfn, stamp: self.stamp(), rewritten }
    }

    /// Whether a page that has to be written back was written before: known from a fault, or because it differs from
    /// the copy that its device kept.
    fn is_rewritten(&self, entry: &Entry<'_, K>, frame: Frame) -> bool {
        let differs = matches!(entry.state(), State::Standby { dirt: Dirt::Unverified, .. })
            && matches!(self.memmap.backing(frame), Backing::Page(_));
        differs || self.memmap.is_rewritten(frame)
    }

    /// The page has left: `state` says where its data is now.
    fn evicted(&self, entry: Entry<'_, K>, frame: Frame, slot: Option<u32>, state: State, _work: &Working<'_>) {
        let backing = self.memmap.backing(frame);
        if let Some(slot) = slot {
            self.ring.vacate(slot);
        }
        entry.commit(state);
        let kept = match state {
            State::Device { pfn, .. } => backing == Backing::Page(pfn),
            _ => false,
        };
        if !kept {
            self.free_backing(backing, Order::BASE);
        }
        self.free_frame(frame, slot.is_none());
    }

    /// Writes pages of one segment back. True if all went.
    fn write_segment(&self, dirty: ArrayVec<(Entry<'_, K>, Frame, u32), BATCH>, work: &Working<'_>) -> bool {
        let page = self.geometry.page_bytes();
        let first = dirty[0].2;
        let count_slots = dirty[dirty.len() - 1].2 - first + 1;
        let range = self.ring.range(super::staging::Slots { first, count: count_slots });
        let mut placed: ArrayVec<Option<DevicePfn>, BATCH> = ArrayVec::new();
        self.kernel.read_staged(range, |bytes| {
            let of = |slot: u32| {
                let at = (slot - first) as usize * page;
                &bytes[at..at + page]
            };
            let mut folios: ArrayVec<WriteBack<'_>, BATCH> = ArrayVec::new();
            for (_, frame, slot) in &dirty {
                // A page that differs from its device's copy is written over it.
                let over = match self.memmap.backing(*frame) {
                    Backing::Page(pfn) if self.tiers.rewrite(pfn, of(*slot)) => Some(pfn),
                    _ => None,
                };
                let vpn = self.memmap.vpn(*frame);
                folios.push(WriteBack { bytes: of(*slot), order: Order::BASE, vpn, at: over });
            }
            self.tiers.write_back(&mut folios);
            placed.extend(folios.iter().map(|f| f.at));
        });
        let mut all = true;
        for ((entry, frame, slot), at) in dirty.into_iter().zip(placed) {
            match at {
                Some(pfn) => {
                    count(&work.counters.pages_out);
                    let state = self.on_device(pfn, self.is_rewritten(&entry, frame));
                    self.evicted(entry, frame, Some(slot), state, work);
                }
                None => {
                    all = false;
                    drop(entry);
                }
            }
        }
        all
    }

    /// Evicts the block that has been on standby longest. True if that gave a ready frame, or moved the queue on.
    pub(crate) fn evict_oldest_block(&self, work: &mut Working<'_>) -> bool {
        let mut looked = self.blocks.queued();
        while looked > 0 {
            looked -= 1;
            let Some(frame) = self.blocks.oldest() else { return false };
            if !self.get_frame(frame) {
                continue;
            }
            let entry = self.table.try_lock(self.memmap.vpn(frame)).ok().flatten();
            self.put_frame(frame);
            let Some(entry) = entry else {
                self.blocks.put_on_standby(frame);
                continue;
            };
            if !entry.is_whole() {
                drop(entry);
                if self.evict_parts(frame, work) {
                    return true;
                }
                continue;
            }
            if !matches!(entry.state(), State::Standby { pfn, .. } if pfn == self.memmap.pfn(frame)) {
                continue; // taken back meanwhile
            }
            if self.evict_block(entry, frame, work) {
                return true;
            }
        }
        false
    }

    /// Evicts a whole block on standby. True if its frame is ready now.
    fn evict_block(&self, mut entry: Entry<'_, K>, frame: Frame, work: &Working<'_>) -> bool {
        let State::Standby { dirt, .. } = entry.state() else { unreachable!("the block is on standby") };
        let range = self.blocks.range(frame);
        let page = self.geometry.page_bytes();
        let backing = self.memmap.backing(frame);
        let same_life = self.memmap.epoch(frame) == self.life();
        let to = match self.plan_evict(dirt, backing, same_life) {
            EvictPlan::DropToZero => Some(State::Empty),
            EvictPlan::DropTo(pfn) => Some(self.on_device(pfn, false)),
            EvictPlan::CompareWith(pfn) => self.kernel.read_staged(range, |bytes| {
                // Only the pages that differ are written.
                let mut written = 0;
                let ok = bytes.chunks_exact(page).enumerate().all(|(i, b)| {
                    let at = pfn + i as u64;
                    self.tiers.holds(at, b) || {
                        written += 1;
                        self.tiers.rewrite(at, b)
                    }
                });
                count_n(&work.counters.pages_out, written);
                count_n(&work.counters.compared_equal, BLOCK_PAGES - written.min(BLOCK_PAGES));
                count_n(&work.counters.clean_dropped, BLOCK_PAGES - written.min(BLOCK_PAGES));
                ok.then(|| self.on_device(pfn, false))
            }),
            EvictPlan::CompareWithZero | EvictPlan::WriteBack => self.kernel.read_staged(range, |bytes| {
                if is_zero(bytes) {
                    count_n(&work.counters.zero_dropped, BLOCK_PAGES);
                    return Some(State::Empty);
                }
                let vpn = entry.vpn();
                let mut folio = [WriteBack { bytes, order: Order::BLOCK, vpn, at: None }];
                self.tiers.write_back(&mut folio);
                folio[0].at.map(|pfn| {
                    count_n(&work.counters.pages_out, BLOCK_PAGES);
                    self.on_device(pfn, false)
                })
            }),
        };
        match to {
            Some(state) => {
                let kept = matches!((state, backing), (State::Device { pfn, .. }, Backing::Page(b)) if pfn == b);
                entry.set(state);
                drop(entry);
                if !kept {
                    self.free_backing(backing, Order::BLOCK);
                }
                self.reuse_block(frame);
                true
            }
            None => {
                // No device has room for all of it in one piece: in pieces, perhaps.
                self.memmap.split_block(frame);
                for i in 0..BLOCK_PAGES {
                    self.memmap.set_slot(self.memmap.page(self.memmap.pfn(frame) + i), None);
                }
                entry.split_evenly();
                count(&work.counters.folio_splits);
                self.blocks.put_on_standby(frame);
                true
            }
        }
    }

    /// An evicted block's frame is ready for its next user, if its page is still a huge one.
    fn reuse_block(&self, frame: Frame) {
        let range = self.blocks.range(frame);
        if self.kernel.is_huge(range.start).unwrap_or(true) {
            self.blocks.give_ready(frame);
            return;
        }
        // Broken up by the kernel: a new one is cheaper than mending this one.
        self.table.note_split(self.memmap.vpn(frame).block());
        if self.kernel.drop_staged(range).is_ok() {
            self.budget.uncharge(BLOCK_PAGES);
            self.memmap.reset(frame);
            self.memmap.give_back(frame);
        } else {
            self.blocks.give_ready(frame);
        }
    }

    /// Evicts the parts of a split block that are on standby in the block's staging. True if any went.
    fn evict_parts(&self, head: Frame, work: &Working<'_>) -> bool {
        let base = self.memmap.pfn(head);
        let mut went = false;
        let mut left = false;
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(base + i);
            if !self.get_frame(part) {
                continue; // freed, or in one piece with the others
            }
            let entry = self.table.try_lock(self.memmap.vpn(part)).ok().flatten();
            self.put_frame(part);
            let Some(entry) = entry else {
                left = true;
                continue;
            };
            let ours = !entry.is_whole()
                && matches!(entry.state(), State::Standby { pfn, .. } if pfn == base + i)
                && self.memmap.slot(part).is_none();
            if !ours {
                continue;
            }
            let range = self.blocks.part(head, i);
            let state = self
                .destination(&entry, part, work, |read| self.kernel.read_staged(range, read))
                .or_else(|| self.write_page(part, range, self.is_rewritten(&entry, part), work));
            match state {
                Some(state) => {
                    self.evicted(entry, part, None, state, work);
                    went = true;
                }
                None => left = true,
            }
        }
        if left {
            self.blocks.put_on_standby(head);
        }
        went
    }

    /// Writes one staged page back; its new state if some device took it.
    fn write_page(&self, frame: Frame, range: VaRange, rewritten: bool, work: &Working<'_>) -> Option<State> {
        let over = match self.memmap.backing(frame) {
            Backing::Page(pfn) => self.kernel.read_staged(range, |b| self.tiers.rewrite(pfn, b)).then_some(pfn),
            _ => None,
        };
        let at = over.or_else(|| {
            self.kernel.read_staged(range, |bytes| {
                let vpn = self.memmap.vpn(frame);
                let mut folio = [WriteBack { bytes, order: Order::BASE, vpn, at: None }];
                self.tiers.write_back(&mut folio);
                folio[0].at
            })
        })?;
        count(&work.counters.pages_out);
        Some(self.on_device(at, rewritten))
    }

    /// Pages on standby, garbage included.
    pub(crate) fn standby_pages(&self) -> Pages {
        // One that has been taken back stays queued.
        let aside = self.blocks.aside(|frame| {
            let counts = self.memmap.folio(frame).counts();
            counts.refcount > 0 && counts.mappings == 0
        });
        Pages(self.ring.pages().0 + aside as u64 * BLOCK_PAGES)
    }
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn zero_is_seen_wherever_a_byte_is_not() {
        let mut page = vec![0u8; 4096];
        assert!(is_zero(&page));
        for i in [0, 1, 63, 64, 2047, 4095] {
            page[i] = 1;
            assert!(!is_zero(&page), "byte {i}");
            page[i] = 0;
        }
        assert!(!is_zero(&[0, 0, 1]));
        assert!(is_zero(&[]));
    }
}
