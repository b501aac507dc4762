//! Room on a device that runs code: its coldest folios go to the host (rule G7).
//!
//! A hand goes round the device's pages. What the device has used since the hand came by last stays; of the rest, what the host
//! has as well is simply freed, and what the device alone holds goes to a frame on standby, as if it had just left the CPU's
//! mappings. For that the host may have to make room itself, by sending what it can spare to the next tier; that is done before
//! anything is locked, so neither waits for the other.

use super::context::Working;
use super::detach::Moved;
use super::evict::Drained;
use super::fault::{Hold, Outcome, Patience};
use super::staging::Ring;
use super::tier::{Closed, Tier};
use super::{Engine, Entry};
use peerspace_core::addr::{Access, BLOCK_PAGES, Order, Pages, Vpn};
use peerspace_core::devmap::InUse;
use peerspace_core::entry::{Dirt, State};
use peerspace_core::memmap::{Arrival, Backing, Frame};
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Done, Kernel, Wake};

/// Folios looked at before it is said that nothing can go now.
const LOOK: u64 = 4096;

/// What became of an attempt to make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// There is some.
    Made,
    /// All of it is in use by others just now.
    Busy,
    /// There can be none: the device has no such folio at all, or nothing of it can go.
    None,
    /// Nothing is taken of the device.
    Closed(Closed),
}

/// What became of one folio.
#[derive(Debug, PartialEq, Eq)]
enum Gone {
    Yes,
    /// Somebody works with it.
    Busy,
    /// A launch relies on it.
    Held,
}

/// Room on the host for what comes from a device.
enum Berth {
    Page,
    Block(Frame),
}

impl<K: Kernel> Engine<K> {
    /// Makes room for a folio of `order` on the device with `mmu`.
    pub(crate) fn make_room(&self, mmu: MmuId, order: Order) -> Room {
        let Some(pages) = self.with_tier(mmu, |tier| tier.info.pages.0) else { return Room::Closed(Closed::Leaving) };
        if pages < order.pages().0 {
            return Room::None;
        }
        let mut looked = 0;
        let mut busy = false;
        // Twice round: on the first, what was used lately is given a second chance.
        while looked < 2 * LOOK.min(pages) + 2 {
            match self.has_room_for(mmu, order) {
                Err(why) => return Room::Closed(why),
                Ok(true) => return Room::Made,
                Ok(false) => {}
            }
            let spare = looked <= LOOK.min(pages);
            let Some(window) = self.next_window(mmu, order, spare, &mut looked) else {
                // What is about to be freed is neither in use nor free for a moment.
                busy |= self.with_tier(mmu, |tier| tier.used().0 > 0) == Some(true);
                break;
            };
            for folio in window {
                let mut from = folio;
                // A folio may be pages to the table; each goes by itself then.
                while let Some(rest) = from {
                    match self.evict_from_device(mmu, rest) {
                        (Gone::Yes, next) => from = next,
                        (Gone::Busy, next) => {
                            busy = true;
                            from = next.filter(|_| order == Order::BASE);
                        }
                        (Gone::Held, next) => from = next.filter(|_| order == Order::BASE),
                    }
                    if order == Order::BASE && self.has_room_for(mmu, order) == Ok(true) {
                        return Room::Made;
                    }
                }
            }
        }
        match self.has_room_for(mmu, order) {
            Err(why) => Room::Closed(why),
            Ok(true) => Room::Made,
            Ok(false) if busy => Room::Busy,
            Ok(false) => Room::None,
        }
    }

    /// Whether a folio of `order` is free on the device with `mmu`; or why none is taken there.
    fn has_room_for(&self, mmu: MmuId, order: Order) -> Result<bool, Closed> {
        self.with_tier(mmu, |tier| tier.has_folio(order)).unwrap_or(Err(Closed::Leaving))
    }

    /// Asks the device with `mmu`, unless it has gone or failed.
    pub(super) fn with_tier<T>(&self, mmu: MmuId, what: impl FnOnce(&Tier<K::Words>) -> T) -> Option<T> {
        let _work = self.contexts.take();
        self.tiers.by_mmu(mmu).filter(|tier| !tier.has_failed()).map(|tier| what(&tier))
    }

    /// The folios in use that have to go for a folio of `order`: one, or all in a block's place. `None` when nothing is in use.
    fn next_window(
        &self,
        mmu: MmuId,
        order: Order,
        spare: bool,
        looked: &mut u64,
    ) -> Option<impl Iterator<Item = Option<InUse>> + use<K>> {
        let found = self.with_tier(mmu, |tier| {
            let state = tier.mmu.as_ref()?;
            loop {
                let hand = state.hand.load(Relaxed);
                let folio = match tier.next_in_use(hand) {
                    Some(folio) => folio,
                    None if hand == 0 => return None,
                    None => {
                        state.hand.store(0, Relaxed);
                        continue;
                    }
                };
                let start = if order == Order::BLOCK { folio.page / BLOCK_PAGES * BLOCK_PAGES } else { folio.page };
                let step = if order == Order::BLOCK { BLOCK_PAGES } else { folio.order.pages().0 };
                state.hand.store(start + step, Relaxed);
                *looked += if order == Order::BLOCK { BLOCK_PAGES } else { 1 };
                let used = peerspace_core::addr::PageRange::new(folio.vpn, folio.order.pages());
                if spare && tier.take_accessed(self.addresses(used)) {
                    if *looked > LOOK.min(tier.info.pages.0) {
                        return Some((folio, start, step));
                    }
                    continue;
                }
                return Some((folio, start, step));
            }
        })??;
        let (folio, start, step) = found;
        let mut all = arrayvec::ArrayVec::<InUse, { BLOCK_PAGES as usize }>::new();
        all.push(folio);
        if order == Order::BLOCK {
            self.with_tier(mmu, |tier| {
                let mut at = folio.page + folio.order.pages().0;
                while let Some(next) = tier.next_in_use(at).filter(|n| n.page < start + step) {
                    if all.try_push(next).is_err() {
                        break;
                    }
                    at = next.page + next.order.pages().0;
                }
            });
        }
        Some(all.into_iter().map(Some))
    }

    /// Has the first part of a folio leave the device, if it can. Returns what is left to be tried.
    pub(super) fn expel(&self, mmu: MmuId, folio: InUse) -> Option<InUse> {
        self.evict_from_device(mmu, folio).1
    }

    /// Has the first part of a folio leave the device: all of it, or one page where the table has pages. Returns what is left.
    fn evict_from_device(&self, mmu: MmuId, folio: InUse) -> (Gone, Option<InUse>) {
        let (whole, alone) = {
            let _work = self.contexts.take();
            match self.table.look(folio.vpn) {
                Some((entry, whole)) => {
                    (whole, matches!(entry.state(), State::Device { .. } | State::Mapped { held: false, .. }))
                }
                None => return (Gone::Busy, None),
            }
        };
        let order = if whole { folio.order } else { Order::BASE };
        let next = (order != folio.order).then(|| InUse { page: folio.page + 1, vpn: folio.vpn + 1, ..folio });
        // The rest of a block that is taken page by page.
        let next = next.filter(|n| n.page % BLOCK_PAGES != 0);
        let mut work = self.contexts.take();
        let berth = match (alone, order) {
            (false, _) => None,
            (true, Order::BLOCK) => match self.take_block(&mut work, Patience::Waits) {
                Ok(Some(frame)) => Some(Berth::Block(frame)),
                // No huge frame: it goes in pages (rule H2).
                _ => {
                    if let Ok(Some(entry)) = self.table.try_lock(folio.vpn)
                        && entry.is_whole()
                        && !matches!(entry.state(), State::Mapped { held: true, .. })
                    {
                        let entry = self.recall(entry);
                        if let State::Device { .. } = entry.state() {
                            entry.split_evenly();
                        }
                    }
                    return (Gone::Busy, Some(folio));
                }
            },
            (true, _) => match self.slot_and_charge(&mut work) {
                Ok(true) => Some(Berth::Page),
                // Nothing leaves standby any more, so nothing can land there: it comes home, beyond the budget if need be.
                Ok(false) => {
                    drop(work);
                    return (self.evict_home(folio.vpn), next);
                }
                Err(Hold::Changing) => {
                    drop(work);
                    self.wait_for_changes();
                    return (Gone::Busy, next);
                }
                Err(_) => return (Gone::Busy, next),
            },
        };
        let Some(tier) = self.tiers.by_mmu(mmu) else { return (Gone::Busy, None) };
        let gone = match self.table.try_lock(folio.vpn) {
            Ok(Some(entry)) if entry.is_whole() == whole => {
                self.evict_entry(entry, &tier, folio.page, berth, &mut work)
            }
            _ => {
                self.return_berth(berth);
                Gone::Busy
            }
        };
        if gone == Gone::Yes
            && let Some(state) = &tier.mmu
        {
            state.counters.evicted.fetch_add(order.pages().0, Relaxed);
        }
        (gone, next)
    }

    /// Where the staging of small pages is full of what no device takes, brings home what has waited longest, beyond the limit if
    /// need be: a page that is to move has to pass through there, whatever else is full (rule G7). To be called without a lock
    /// and without a context.
    pub(super) fn keep_staging_open(&self) {
        if self.ring.has_room() {
            return;
        }
        let segment = {
            let mut work = self.contexts.take();
            match self.drain_oldest(&mut work) {
                Drained::Kept => self.ring.oldest(),
                Drained::Freed(_) | Drained::Nothing => None,
            }
        };
        let Some(segment) = segment else { return };
        let slots = Ring::<K::Words>::segment(segment);
        for frame in (slots.first..slots.first + slots.count).filter_map(|slot| self.ring.occupant(slot)) {
            // Where it is by now is found out there.
            let va = self.geometry.va(self.memmap.vpn(frame));
            let _ = self.fault(va, Access::Read, Wake::Yes, Patience::Waits);
        }
        let _ = self.drain(segment, &mut self.contexts.take());
    }

    /// Charges a page, and sees to it that there is a slot for it on standby. False when there is none to be had.
    fn slot_and_charge(&self, work: &mut Working<'_>) -> Result<bool, Hold> {
        let (waiting, segments) = self.ring.waiting();
        if waiting > segments / 2 && !matches!(self.drain_oldest(work), Drained::Freed(1..)) {
            return Ok(false);
        }
        self.charge(1, work, Patience::Waits).map(|()| true)
    }

    /// Has the CPU map the page at `vpn`, which is on a device alone.
    fn evict_home(&self, vpn: Vpn) -> Gone {
        {
            let _work = self.contexts.take();
            match self.table.try_lock(vpn) {
                Ok(Some(entry)) if !matches!(entry.state(), State::Mapped { held: true, .. }) => {
                    drop(self.recall(entry));
                }
                _ => return Gone::Busy,
            }
        }
        match self.fault(self.geometry.va(vpn), Access::Write, Wake::Yes, Patience::Waits) {
            Ok(Outcome::Resolved) => Gone::Yes,
            _ => Gone::Busy,
        }
    }

    fn return_berth(&self, berth: Option<Berth>) {
        match berth {
            Some(Berth::Page) => self.budget.uncharge(1),
            Some(Berth::Block(frame)) => self.blocks.give_ready(frame),
            None => {}
        }
    }

    /// Has what `entry` holds at `page` of `tier` leave it.
    fn evict_entry<'t>(
        &'t self,
        mut entry: Entry<'t, K>,
        tier: &Tier<K::Words>,
        page: u64,
        berth: Option<Berth>,
        work: &mut Working<'_>,
    ) -> Gone {
        let pfn = tier.base() + page;
        match entry.state() {
            State::Mapped { held: true, .. } => {
                self.return_berth(berth);
                return Gone::Held;
            }
            State::Coherent { .. } => {
                // It was sent there, and stays until somebody wants it elsewhere.
                self.return_berth(berth);
                return Gone::Held;
            }
            State::Mapped { pfn: at, .. } if at == pfn => entry = self.recall(entry),
            State::Device { pfn: at, .. } if at == pfn => {}
            State::Shared { .. } => {
                // A copy, which goes with the translation; or that of a frame which was clean.
                self.return_berth(berth);
                let entry = self.recall(entry);
                let _ = self.forget_copy_if(entry, pfn, work);
                return Gone::Yes;
            }
            _ => {
                self.return_berth(berth);
                return if self.forget_copy_if(entry, pfn, work) == Moved::Yes { Gone::Yes } else { Gone::Busy };
            }
        }
        match berth {
            Some(Berth::Block(frame)) => self.land_block(entry, frame, work),
            Some(Berth::Page) => self.land_page(entry, work),
            None => Gone::Busy,
        }
    }

    fn land_block(&self, mut entry: Entry<'_, K>, frame: Frame, work: &mut Working<'_>) -> Gone {
        let State::Device { pfn, .. } = entry.state() else { unreachable!("it was recalled") };
        if !entry.is_whole() || !self.fill_block(frame, entry.state(), entry.vpn(), work) {
            self.memmap.set_backing(frame, Backing::None);
            self.blocks.give_ready(frame);
            if entry.is_whole() {
                // In pages: which of them cannot be read is found out when they are asked for.
                entry.split_evenly();
            }
            return Gone::Busy;
        }
        self.memmap.set_backing(frame, Backing::None);
        self.memmap.set_arrival(frame, Arrival::New);
        entry.set(State::Standby { pfn: self.memmap.pfn(frame), dirt: Dirt::Dirty });
        self.blocks.put_on_standby(frame);
        drop(entry);
        self.tiers.free(pfn, Order::BLOCK);
        Gone::Yes
    }

    fn land_page(&self, mut entry: Entry<'_, K>, work: &mut Working<'_>) -> Gone {
        let State::Device { pfn, .. } = entry.state() else { unreachable!("it was recalled") };
        let uncharge = || self.budget.uncharge(1);
        if entry.is_whole() {
            entry.split_evenly();
            uncharge();
            return Gone::Busy;
        }
        let Some(frame) = self.new_frame(entry.vpn()) else {
            uncharge();
            return Gone::Busy;
        };
        let Some(slots) = self.ring.reserve(1) else {
            self.memmap.give_back(frame);
            uncharge();
            return Gone::Busy;
        };
        let staged = self.ring.range(slots);
        let loaded = self.kernel.write_staged(staged, |bytes| self.tiers.load(pfn, bytes));
        if let Err(e) = loaded {
            // The page of the slot is there, and goes with its segment; it was charged.
            self.ring.settle(slots, Done::all(Pages(1)));
            self.memmap.give_back(frame);
            self.lose(entry, e, work.context());
            return Gone::Yes;
        }
        self.memmap.set_backing(frame, Backing::None);
        self.memmap.set_slot(frame, Some(slots.first));
        self.memmap.set_arrival(frame, Arrival::New);
        self.ring.occupy(slots.first, frame);
        entry.set(State::Standby { pfn: self.memmap.pfn(frame), dirt: Dirt::Dirty });
        drop(entry);
        self.ring.settle(slots, Done::all(Pages(1)));
        self.tiers.free(pfn, Order::BASE);
        Gone::Yes
    }
}
