//! Migration that somebody asks for: of blocks to a device, and home again (rules Z5, G8).
//!
//! A block goes as a whole. What of it is mapped is unmapped to staging first; then all of its entries are locked, its bytes
//! gathered from wherever they are, and written to a block of the device. A coherent device's memory is put in its place after
//! that ([`inplace`](super::inplace)). Whatever fails on the way leaves the block where it was.

use super::fault::{Fault, Outcome};
use super::inplace::PlaceError;
use super::tier::{Tier, answer};
use super::{Engine, Entry};
use crate::device::{DeviceError, MemoryType, Store};
use peerspace_core::addr::{Access, BLOCK_PAGES, DevicePfn, Order, PageRange, Vpn};
use peerspace_core::entry::{Entry as Word, State};
use peerspace_core::memmap::Backing;
use peerspace_core::plan::HUGE_LEVEL;
use peerspace_core::regions::Attributes;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::own::{Buffer, Own, Vec};
use peerspace_os::{Kernel, Wake};
use std::time::{Duration, Instant};

/// How often a block is tried at once that somebody works with, and for how long altogether.
const TRIES: u32 = 8;
const PAUSE: Duration = Duration::from_micros(100);
// Time does not pass in a model.
const PATIENCE: Duration = Duration::from_millis(if cfg!(shuttle) { 0 } else { 250 });

/// Why a block was not migrated. Nothing is lost; it is where it was, or on its way a page on a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MigrateError {
    /// There is no such device, or it is being detached.
    #[error("there is no such device, or it is being detached")]
    NotThere,
    /// The device takes nothing but regions that have names.
    #[error("a persistent device holds regions that have names, and nothing else (Space::create_persistent)")]
    Persistent,
    /// The block lies in memory that the program may unmap at any time.
    #[error("only regions of the space's own can be migrated")]
    NotOwn,
    /// The device has no free block.
    #[error("it has no room for another block")]
    Full,
    /// Somebody relies on a page of it, or works with it.
    #[error("somebody relies on a page of it, or works with it")]
    Busy,
    /// A page of the block is lost already.
    #[error("the page {0:?} is lost")]
    Lost(Vpn, DevicePfn),
    /// The device did not take it.
    #[error("{0}")]
    Device(DeviceError),
    /// Its memory cannot be put in place.
    #[error("its memory cannot be mapped in place: {0}")]
    Place(PlaceError),
    /// The kernel has no memory for it.
    #[error("the kernel has no memory for it")]
    NoMemory,
}

/// How far one attempt came.
enum Attempt<'t, K: Kernel> {
    /// All of the block is on the device, and its entry locked.
    There(Entry<'t, K>),
    /// Some of it is mapped, or something of a device is in its place.
    Unmap,
    /// Somebody works with it.
    Again,
}

impl<K: Kernel> Engine<K> {
    /// Migrates `block` of a region of the space's own to device `id`. `buffer` has room for a block. To be called without a
    /// lock and without a context; not by threads that receive messages.
    pub(crate) fn migrate_block(&self, block: u64, id: u64, buffer: &mut Buffer) -> Result<(), MigrateError> {
        let turn = self.take_turn();
        let start = Vpn::of_block(block);
        let (base, memory) = {
            let _work = self.contexts.take();
            let region = self.region(start).ok_or(MigrateError::NotOwn)?;
            if !self.may_replace(region.attributes) || !region.range.covers(PageRange::block(block)) {
                return Err(MigrateError::NotOwn);
            }
            let tier = self.tiers.by_id(id).ok_or(MigrateError::NotThere)?;
            (tier.base(), tier.info.memory)
        };
        if memory == MemoryType::Persistent {
            return Err(MigrateError::Persistent);
        }
        let begin = Instant::now();
        for tries in 0.. {
            if tries >= TRIES {
                if begin.elapsed() > PATIENCE || self.is_pinned(start) {
                    break;
                }
                // Whoever works with it may be at it for a while.
                crate::sync::sleep(PAUSE);
            }
            if self.is_in_place(start, base) {
                return Ok(());
            }
            let work = self.contexts.take();
            match self.move_block(start, id, buffer)? {
                Attempt::There(_) if memory == MemoryType::Private => return Ok(()),
                Attempt::There(entry) => match self.put_in_place(entry, work, &turn) {
                    Ok(()) => return Ok(()),
                    Err(PlaceError::Busy) => {}
                    Err(e) => return Err(MigrateError::Place(e)),
                },
                Attempt::Unmap => {
                    self.recall_pages(PageRange::block(block));
                    drop(work);
                    self.take_range_from_place(PageRange::block(block), &turn).map_err(MigrateError::Place)?;
                    self.set_aside(PageRange::block(block));
                }
                Attempt::Again => {
                    drop(work);
                    crate::sync::yield_now();
                }
            }
        }
        Err(MigrateError::Busy)
    }

    /// Whether somebody relies on a page of the block at `start`, as far as can be said without a lock.
    fn is_pinned(&self, start: Vpn) -> bool {
        let _work = self.contexts.take();
        PageRange::block(start.block()).iter().any(|vpn| match self.table.look(vpn) {
            Some((entry, whole)) if let State::Host { pfn, .. } = entry.state() => {
                let frame = if whole { self.memmap.block(pfn) } else { self.memmap.head(self.memmap.page(pfn)) };
                self.memmap.pins(frame) > 0
            }
            _ => false,
        })
    }

    /// Whether the block at `start` is in place on the device at `base`: all of it.
    fn is_in_place(&self, start: Vpn, base: DevicePfn) -> bool {
        let _work = self.contexts.take();
        let Some(tier) = self.tiers.find(base) else { return false };
        let mut pages = PageRange::block(start.block()).iter().map(|vpn| self.table.look(vpn));
        let there = |(entry, _): (Word, bool)| match entry.state() {
            State::Coherent { pfn } => tier.range.contains(pfn.pfn()),
            _ => false,
        };
        match self.table.look(start) {
            Some((entry, true)) => there((entry, true)),
            _ => pages.all(|page| page.is_some_and(there)),
        }
    }

    /// Moves all of the block at `start` to device `id`, if nothing of it is mapped. The caller has a context.
    fn move_block(&self, start: Vpn, id: u64, buffer: &mut Buffer) -> Result<Attempt<'_, K>, MigrateError> {
        let tier = self.tiers.by_id(id).ok_or(MigrateError::NotThere)?;
        if tier.has_failed() {
            return Err(MigrateError::Device(DeviceError::Gone));
        }
        let bytes = &mut buffer[..self.geometry.block_bytes()];
        if !matches!(self.table.look(start), Some((_, true))) {
            return self.move_pages(start, &tier, bytes);
        }
        let Ok(mut entry) = self.table.lock(start) else { return Err(MigrateError::NotOwn) };
        if !entry.is_whole() {
            return Ok(Attempt::Again);
        }
        if let Some(attempt) = self.not_now(start)? {
            return Ok(attempt);
        }
        if entry.state() == State::Empty && self.is_adopted(start) && self.has_native(entry.range()) {
            return Ok(Attempt::Unmap);
        }
        let state = entry.state();
        match state {
            State::Device { pfn, .. } if tier.range.contains(pfn.pfn()) => return Ok(Attempt::There(entry)),
            State::Host { .. }
            | State::Coherent { .. }
            | State::Shared { .. }
            | State::Zero { .. }
            | State::Mapped { .. } => return Ok(Attempt::Unmap),
            State::Poisoned { pfn } => return Err(MigrateError::Lost(start, pfn)),
            State::Leaf(_) => unreachable!("a lock is never on a leaf"),
            State::Empty | State::Standby { .. } | State::Device { .. } => {}
        }
        let pfn = match state {
            State::Standby { pfn, .. } => {
                let staged = self.blocks.range(self.memmap.block(pfn));
                self.kernel.read_staged(staged, |bytes| self.store_block(&tier, start, bytes))?
            }
            State::Device { pfn, .. } => {
                if self.tiers.load(pfn, bytes).is_err() {
                    // In pages: it is found out which of them cannot be read.
                    entry.split_evenly();
                    return Ok(Attempt::Again);
                }
                self.store_block(&tier, start, bytes)?
            }
            _ => {
                bytes.fill(0);
                self.store_block(&tier, start, bytes)?
            }
        };
        entry.set(State::Device { pfn, stamp: self.stamp(), rewritten: false });
        match state {
            State::Standby { pfn, .. } => {
                let frame = self.memmap.block(pfn);
                self.free_backing(self.memmap.backing(frame), Order::BLOCK);
                self.blocks.give_ready(frame);
            }
            State::Device { pfn, .. } => self.tiers.free(pfn, Order::BLOCK),
            _ => {}
        }
        Ok(Attempt::There(entry))
    }

    /// What comes first, if the block at `start`, whose entries are locked, cannot go now.
    fn not_now(&self, start: Vpn) -> Result<Option<Attempt<'_, K>>, MigrateError> {
        let block = PageRange::block(start.block());
        let region = self.region(start).ok_or(MigrateError::NotOwn)?;
        if self.announcements.concern(block) {
            return Ok(Some(Attempt::Again));
        }
        if !self.may_replace_now(region, block) {
            return Err(MigrateError::NotOwn);
        }
        Ok(None)
    }

    fn is_adopted(&self, vpn: Vpn) -> bool {
        self.region(vpn).is_some_and(|region| region.attributes.has(Attributes::ADOPTED))
    }

    /// The same for a block that is split.
    fn move_pages(
        &self,
        start: Vpn,
        tier: &Tier<K::Words>,
        bytes: &mut [u8],
    ) -> Result<Attempt<'_, K>, MigrateError> {
        let mut states: Vec<State> = Vec::with_capacity_in(BLOCK_PAGES as usize, Own);
        let mut outcome = Ok(Attempt::Again);
        let joined = self.table.join(start.block(), |page| {
            states.extend((0..BLOCK_PAGES as usize).map(|i| page(i).state()));
            match self.not_now(start) {
                Ok(None) => {}
                not_now => {
                    outcome = not_now.map(|attempt| attempt.unwrap_or(Attempt::Again));
                    return None;
                }
            }
            let gathered = self.gather(start, &states, bytes).and_then(|all| match all {
                true => self.store_block(tier, start, bytes).map(Some),
                false => Ok(None),
            });
            match gathered {
                Ok(Some(pfn)) => Some(Word::new(State::Device { pfn, stamp: self.stamp(), rewritten: false })),
                Ok(None) => {
                    outcome = Ok(Attempt::Unmap);
                    None
                }
                Err(e) => {
                    outcome = Err(e);
                    None
                }
            }
        });
        if let Ok(Some(entry)) = joined {
            // Nobody finds what the pages were any more.
            states.iter().for_each(|state| self.give_up_page(*state));
            return Ok(Attempt::There(entry));
        }
        outcome
    }

    /// Reads the pages of a block in these states, which are locked. False when one is mapped.
    fn gather(&self, start: Vpn, states: &[State], bytes: &mut [u8]) -> Result<bool, MigrateError> {
        if states.iter().any(|s| matches!(s, State::Host { .. } | State::Coherent { .. }) || s.is_on_mmus()) {
            return Ok(false);
        }
        // What the table knows nothing of may be there all the same.
        let unknown = |(i, state): (usize, &State)| {
            *state == State::Empty && self.kernel.is_present(self.geometry.va(start + i as u64)).unwrap_or(true)
        };
        if self.is_adopted(start) && states.iter().enumerate().any(unknown) {
            return Ok(false);
        }
        for ((state, page), vpn) in
            states.iter().zip(bytes.chunks_exact_mut(self.geometry.page_bytes())).zip(start.0..)
        {
            match *state {
                State::Empty => page.fill(0),
                State::Standby { pfn, .. } => {
                    let (staged, _) = self.staged_at(self.memmap.page(pfn));
                    self.kernel.read_staged(staged, |bytes| page.copy_from_slice(bytes));
                }
                State::Device { pfn, .. } => {
                    self.tiers.load(pfn, page).map_err(|_| MigrateError::Lost(Vpn(vpn), pfn))?;
                }
                State::Poisoned { pfn } => return Err(MigrateError::Lost(Vpn(vpn), pfn)),
                State::Host { .. }
                | State::Coherent { .. }
                | State::Shared { .. }
                | State::Zero { .. }
                | State::Mapped { .. }
                | State::Leaf(_) => unreachable!("looked at above"),
            }
        }
        Ok(true)
    }

    /// Frees what a page in this state, which is not mapped, was kept in.
    fn give_up_page(&self, state: State) {
        match state {
            State::Standby { pfn, .. } => self.free_standby(self.memmap.page(pfn)),
            State::Device { pfn, .. } => self.tiers.free(pfn, Order::BASE),
            _ => {}
        }
    }

    /// Writes a block to the device: beside its neighbours, if that can be, for then it takes no mapping of its own.
    fn store_block(&self, tier: &Tier<K::Words>, start: Vpn, bytes: &[u8]) -> Result<DevicePfn, MigrateError> {
        let after = || match self.table.look(start + BLOCK_PAGES)?.0.state() {
            State::Coherent { pfn } if tier.range.contains(pfn.pfn()) => {
                (pfn - tier.range.base).checked_sub(BLOCK_PAGES)
            }
            _ => None,
        };
        let before = self.place_before(start, tier.range).map(|pfn| pfn + 1 - tier.range.base);
        let near = before.or_else(after).filter(|page| page.is_multiple_of(BLOCK_PAGES));
        if tier.refuses_block() {
            return Err(MigrateError::Full);
        }
        let page = tier.take_block(near, start).ok_or(MigrateError::Full)?;
        let mut batch = [Store::new(page, bytes)];
        tier.store(&mut batch);
        let result = answer(&batch, 0, page);
        if tier.judge(result.clone()) {
            tier.stores.fetch_add(BLOCK_PAGES, Relaxed);
            return Ok(tier.base() + page);
        }
        if tier.has_failed() {
            // What is in place of it is taken away.
            self.service.wake_reclaim(&self.kernel.park());
        }
        let error = result.err().unwrap_or(DeviceError::NoAnswer);
        tier.give_up(page, Order::BLOCK, error != DeviceError::NoSpace);
        Err(MigrateError::Device(error))
    }

    /// Brings `block` home, from whatever device it was migrated to; `ahead` says what else is going to be brought home next.
    pub(crate) fn migrate_home(&self, block: u64, ahead: PageRange) -> Result<(), MigrateError> {
        let start = Vpn::of_block(block);
        if self.is_persistent(start) {
            return Err(MigrateError::NotOwn);
        }
        if let Some(State::Coherent { .. }) = self.table.look(start).map(|(entry, _)| entry.state()) {
            let turn = self.take_turn();
            let run = PageRange { start, end: ahead.end.max(start + BLOCK_PAGES) };
            self.take_run_from_place(run, &turn).map_err(MigrateError::Place)?;
        }
        // Of a block that is split, any of its pages may be in place.
        self.leave_places(PageRange::block(block)).map_err(|e| MigrateError::Place(PlaceError::Kernel(e)))?;
        for vpn in PageRange::block(block).iter() {
            for tries in 0.. {
                let Some((entry, _)) = self.table.look(vpn) else { return Err(MigrateError::NotOwn) };
                match entry.state() {
                    State::Mapped { held: true, .. } => return Err(MigrateError::Busy),
                    State::Device { .. } | State::Mapped { .. } if tries >= 2 * TRIES => {
                        return Err(MigrateError::Busy);
                    }
                    // To be written: then it needs no copy on the device any more.
                    State::Device { .. } | State::Mapped { .. } => {
                        match self.resolve(Fault::ahead(vpn, Access::Write, Wake::Yes, HUGE_LEVEL)) {
                            Ok(Outcome::Refused) => return Err(MigrateError::NoMemory),
                            Ok(Outcome::Foreign) => return Err(MigrateError::NotOwn),
                            _ => {}
                        }
                    }
                    State::Poisoned { pfn } => return Err(MigrateError::Lost(vpn, pfn)),
                    _ => break,
                }
            }
            self.leave_copy(vpn);
        }
        Ok(())
    }

    /// The frame of `vpn`, if it has one, needs no copy on a device that takes nothing of what leaves RAM.
    fn leave_copy(&self, vpn: Vpn) {
        let work = &mut self.contexts.take();
        let Some((entry, whole)) = self.table.look(vpn) else { return };
        let (State::Host { pfn, .. } | State::Standby { pfn, .. }) = entry.state() else { return };
        let frame = if whole { self.memmap.block(pfn) } else { self.memmap.page(pfn) };
        let Backing::Page(copy) = self.memmap.backing(frame) else { return };
        let range = match self.tiers.find(copy) {
            Some(tier) if !tier.info.takes_evicted => tier.range,
            _ => return,
        };
        let first = if whole { vpn.block_start() } else { vpn };
        self.forget_copy_of(range, copy - range.base, first, work);
    }
}
