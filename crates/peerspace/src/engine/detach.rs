//! Devices that come and go while the space is in use (rules Z2 and Z3).
//!
//! ```text
//!  revoke: no page more is taken, nobody new gets a reference
//!     |  not enough room elsewhere? -> restore, and say what is missing
//!  evict: folio by folio, in the order of the device; the descriptors say whose data they hold
//!     |  room ran out after all?    -> restore; what went is elsewhere, what did not is where it was
//!  recall: what a device that runs code maps without holding it: zeros, and memory of the host
//!  drain: wait for the references that exist
//!  free: descriptors, allocator, range of pfns
//! ```
//!
//! The program and other devices go on meanwhile. A page is moved with its entry locked, as everything about a page is done:
//! whoever faults on it waits for as long as one transfer takes.
//!
//! A device that is gone (by its own word, by `Space::fail`, or because it was made to fail for a trial) is not asked again: exactly
//! what it alone holds is lost, when it is asked for.

use super::context::Working;
use super::fault::{Outcome, Patience};
use super::inplace::PlaceError;
use super::tiers::WriteBack;
use super::turn::Turn;
use super::{Engine, EngineError, Entry};
use crate::device::{Device, MemoryType};
use peerspace_core::addr::{Access, DevicePfn, Order, PageRange, Pages, Vpn};
use peerspace_core::entry::State;
use peerspace_core::memmap::Backing;
use peerspace_core::pagemap::PfnRange;
use peerspace_core::regions::Attributes;
use peerspace_os::own::{Box, Buffer};
use peerspace_os::{Kernel, Protect, Wake};
use std::time::Duration;

/// Rounds over a device in which nothing could be moved, before that is given up.
const ROUNDS: u32 = 10_000;
/// So many of them follow each other at once. After that there is a pause between two: whoever has a page in hand may be
/// asking a device that takes its time, or not be running.
const AT_ONCE: u32 = 100;
const PAUSE: Duration = Duration::from_micros(100);

/// Why a device was not detached. It is in use as before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DetachError {
    /// There is none of this number, or it is being detached already.
    NotThere,
    /// For so many pages of it there is no room anywhere else.
    NoRoom(Pages),
    /// So many pages are in use without pause.
    Busy(Pages),
    /// So many pages are of regions with names that are open.
    Open(Pages),
    /// What is in place cannot be taken away.
    Place(PlaceError),
    /// There is no memory to move pages through.
    NoMemory,
}

/// What became of a folio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// It is not on the device any more.
    Yes,
    /// It was not what its descriptor said, or somebody worked with it.
    No,
    /// Nobody has room for it.
    NoRoom,
}

impl<K: Kernel> Engine<K> {
    /// Adds a device, to be tried after those that are there. Returns its number.
    pub(crate) fn attach(&self, device: Box<dyn Device>) -> Result<u64, EngineError> {
        let _work = self.contexts.take();
        let words = |n: usize| self.kernel.words(n, n).map_err(EngineError::Memory);
        Ok(self.tiers.attach(device, words)?)
    }

    /// Takes a device away (rule Z3), and returns it. Nothing that it holds is lost.
    pub(crate) fn detach(&self, id: u64) -> Result<Box<dyn Device>, DetachError> {
        let mut buffer = Buffer::new(self.geometry.block_bytes()).map_err(|_| DetachError::NoMemory)?;
        // One device at a time.
        let turn = self.take_turn();
        let base = {
            let _work = self.contexts.take();
            let tier = self.tiers.by_id(id).ok_or(DetachError::NotThere)?;
            if tier.info.memory == MemoryType::Persistent && tier.used() > Pages(0) {
                return Err(DetachError::Open(tier.used()));
            }
            drop(tier);
            self.tiers.revoke(id).ok_or(DetachError::NotThere)?
        };
        // Whoever found the device before it was closed is done with it: from here on it is given nothing.
        drop(self.rest());
        let moved = self.reserve_elsewhere(base).and_then(|()| self.evict_all(base, &mut buffer, &turn, false));
        if moved.is_ok() {
            self.recall_from(base);
        }
        let _work = self.contexts.take();
        self.tiers.iter().for_each(|tier| tier.unreserve(u64::MAX));
        if let Err(e) = moved {
            self.tiers.restore(base);
            return Err(e);
        }
        self.tiers.remove(base).ok_or(DetachError::NotThere)
    }

    /// Keeps room for all that the device at `base` holds: on the others, and in RAM that is free.
    fn reserve_elsewhere(&self, base: DevicePfn) -> Result<(), DetachError> {
        let _work = self.contexts.take();
        let mut missing = self.tiers.of(base).used().0;
        for tier in self.tiers.iter().filter(|t| t.range.base != base.pfn() && t.takes_evicted()) {
            missing -= tier.reserve(missing);
        }
        let ram = (self.budget.left() - self.budget.watermarks().low.0 as i64).max(0) as u64;
        match missing.saturating_sub(ram) {
            0 => Ok(()),
            missing => Err(DetachError::NoRoom(Pages(missing))),
        }
    }

    /// Moves everything off the device at `base`. `beyond`: home, beyond the budget, what has no room anywhere.
    pub(super) fn evict_all(
        &self,
        base: DevicePfn,
        buffer: &mut Buffer,
        turn: &Turn<'_, K::Park>,
        beyond: bool,
    ) -> Result<(), DetachError> {
        let mut idle = 0;
        loop {
            let (used, moved) = self.evict_round(base, buffer, turn, beyond)?;
            if used == Pages(0) {
                return Ok(());
            }
            idle = if moved { 0 } else { idle + 1 };
            if idle > ROUNDS {
                return Err(DetachError::Busy(used));
            }
            if !moved && idle > AT_ONCE {
                crate::sync::sleep(PAUSE);
            } else if !moved {
                crate::sync::yield_now();
            }
        }
    }

    /// Takes away what the device at `base`, of which nothing is in use, maps of zeros and of the host's memory: its number is
    /// going to be another's (rule G5).
    fn recall_from(&self, base: DevicePfn) {
        let mmu = {
            let _work = self.contexts.take();
            self.tiers.of(base).mmu_id()
        };
        if let Some(mmu) = mmu {
            let shares = |state| match state {
                State::Zero { sharers } | State::Shared { sharers, .. } => sharers.has(mmu),
                State::Coherent { .. } => true,
                _ => false,
            };
            for region in self.regions.iter() {
                match region.attributes.has(Attributes::IN_PLACE) {
                    true => self.tiers.of(base).unmap(self.addresses(region.range)),
                    false => self.recall_where(region.range, shares),
                }
            }
        }
    }

    /// Goes through the device once. Returns how many pages are in use yet, and whether any was moved.
    pub(super) fn evict_round(
        &self,
        base: DevicePfn,
        buffer: &mut Buffer,
        turn: &Turn<'_, K::Park>,
        beyond: bool,
    ) -> Result<(Pages, bool), DetachError> {
        let (mut from, mut moved) = (0, false);
        loop {
            let mut work = self.contexts.take();
            let (range, found) = {
                let tier = self.tiers.of(base);
                (tier.range, tier.next_in_use(from))
            };
            let Some(folio) = found else { return Ok((self.tiers.of(base).used(), moved)) };
            if self.tiers.of(base).pages_in_place() > 0 {
                drop(work);
                self.take_range_from_place(PageRange::new(folio.vpn, folio.order.pages()), turn)
                    .map_err(DetachError::Place)?;
                work = self.contexts.take();
            }
            // A block on the device may be pages to the table.
            let whole = matches!(self.table.look(folio.vpn), Some((_, true)));
            let order = if whole { folio.order } else { Order::BASE };
            let skipped = from.saturating_sub(folio.page);
            let (page, vpn) = match order {
                Order::BLOCK => (folio.page, folio.vpn),
                _ => (folio.page + skipped, folio.vpn + skipped),
            };
            match self.move_off(range, page, vpn, buffer, &mut work) {
                Moved::Yes => moved = true,
                Moved::No => {}
                Moved::NoRoom if beyond || self.budget.left() > 0 => {
                    drop(work);
                    // Home, then; it is written from there to wherever there is room later.
                    let va = self.geometry.va(vpn);
                    if self.fault(va, Access::Read, Wake::Yes, Patience::Waits) == Ok(Outcome::Resolved) {
                        moved = true;
                        continue;
                    }
                }
                Moved::NoRoom => return Err(DetachError::NoRoom(self.tiers.of(base).used())),
            }
            from = page + order.pages().0;
        }
    }

    /// Moves the folio at `page` of the device at `range`, which holds the data of `vpn` as its descriptor says, elsewhere;
    /// or has the frame that it is the copy of go on without a copy.
    fn move_off(&self, range: PfnRange, page: u64, vpn: Vpn, buffer: &mut Buffer, work: &mut Working<'_>) -> Moved {
        let pfn = DevicePfn::new(range.base + page);
        let Ok(entry) = self.table.lock(vpn) else { return Moved::No };
        if let State::Mapped { held: true, .. } = entry.state() {
            return Moved::No;
        }
        let copy = matches!(entry.state(), State::Shared { .. });
        let entry = self.recall(entry);
        match entry.state() {
            State::Device { pfn: at, .. } if at == pfn => self.move_to_another(entry, buffer, work),
            // Its copy has gone with the translation; unless this was what the frame came from.
            State::Host { .. } if copy => {
                let _ = self.forget_copy_if(entry, pfn, work);
                Moved::Yes
            }
            _ => self.forget_copy_if(entry, pfn, work),
        }
    }

    /// Has the frame of `vpn` go on without the copy at `page` of the device at `range`, if that is its copy.
    pub(super) fn forget_copy_of(&self, range: PfnRange, page: u64, vpn: Vpn, work: &Working<'_>) {
        if let Ok(entry) = self.table.lock(vpn) {
            self.forget_copy_if(entry, DevicePfn::new(range.base + page), work);
        }
    }

    /// Has the frame of `entry` go on without a copy if that is at `pfn`.
    pub(super) fn forget_copy_if(&self, mut entry: Entry<'_, K>, pfn: DevicePfn, work: &Working<'_>) -> Moved {
        match entry.state() {
            State::Host { pfn: frame, writable, .. } => {
                let frame = self.frame_of(frame, entry.is_whole());
                if self.memmap.backing(frame) != Backing::Page(pfn) {
                    return Moved::No;
                }
                if !writable {
                    // From here on it is the only copy, and need not be protected.
                    let Some(_section) = self.gate.enter(work.context()) else { return Moved::No };
                    if self.kernel.protect(self.addresses(entry.range()), Protect::No, Wake::Yes).is_err() {
                        return Moved::No;
                    }
                }
                self.forget_copy(&mut entry, frame);
                Moved::Yes
            }
            State::Standby { pfn: frame, .. } => {
                let frame = self.frame_of(frame, entry.is_whole());
                if self.memmap.backing(frame) != Backing::Page(pfn) {
                    return Moved::No;
                }
                self.forget_copy(&mut entry, frame);
                Moved::Yes
            }
            _ => Moved::No,
        }
    }

    /// Moves what only the device holds to another one.
    fn move_to_another(&self, mut entry: Entry<'_, K>, buffer: &mut Buffer, work: &Working<'_>) -> Moved {
        let State::Device { pfn, stamp, rewritten } = entry.state() else { unreachable!("it is on a device") };
        let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
        let bytes = &mut buffer[..self.geometry.bytes(order.pages()) as usize];
        if let Err(e) = self.tiers.load(pfn, bytes) {
            if entry.is_whole() {
                // In pages: exactly those are lost that cannot be read (rule Z9).
                entry.split_evenly();
                return Moved::No;
            }
            self.lose(entry, e, work.context());
            return Moved::Yes;
        }
        let mut folio = [WriteBack { bytes, order, vpn: entry.vpn(), at: None }];
        self.tiers.write_to(&mut folio, true);
        match folio[0].at {
            Some(new) => {
                entry.set(State::Device { pfn: new, stamp, rewritten });
                drop(entry);
                self.tiers.free(pfn, order);
                Moved::Yes
            }
            None if order == Order::BLOCK => {
                entry.split_evenly();
                Moved::No
            }
            None => Moved::NoRoom,
        }
    }
}
