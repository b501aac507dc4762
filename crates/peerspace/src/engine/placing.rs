//! Pages sent to where the CPU maps them in place, one by one or in runs (rule Z5): what blocks are too coarse for.
//!
//! ```text
//!  mapped, or on MMUs --recalled, set aside--> standby, or on a device --run locked, moved, shown--> in place
//! ```
//!
//! A run is locked from before its data moves until it is in place, so that nobody brings it home in between; its pages follow each
//! other on the device, and are one mapping. A whole block goes in one piece if it can ([`migrate`](super::migrate)). What cannot go
//! stays where it is, and what is on the device and cannot be shown is there like any page on a device.

use super::inplace::{PlaceError, RUN};
use super::migrate::MigrateError;
use super::send::{NotSent, Sending};
use super::to_device::Stay;
use super::{Engine, Entry};
use crate::device::DeviceError;
use crate::device::port::FaultError;
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, DevicePfn, PageRange, Pages, Vpn};
use peerspace_core::entry::State;
use peerspace_core::memmap::Frame;
use peerspace_core::pagemap::PfnRange;
use peerspace_core::plan::CLUSTER;
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_os::Kernel;
use peerspace_os::own::Buffer;

/// What became of the first pages of a range.
enum Placed {
    /// They are where they are to be, or stay where they are, up to here.
    UpTo(Vpn),
    /// Something has changed: look again.
    Again,
    /// Somebody has them in hand.
    Busy,
    /// The device is full.
    NoRoom,
    Lost(DevicePfn),
    Failed(FaultError),
}

impl<K: Kernel> Engine<K> {
    /// Sends `pages`, of one block, to the coherent device `id`, in place if that may be, and into its memory otherwise.
    pub(super) fn send_pages_in_place(&self, id: u64, pages: PageRange, sending: &mut Sending) {
        let found = {
            let _work = self.contexts.take();
            self.tiers.by_id(id).map(|tier| (tier.range, tier.mmu_id()))
        };
        let Some((range, mmu)) = found else {
            return sending.fails(NotSent::Failed(pages.start, FaultError::Cut));
        };
        for region in self.pieces(pages) {
            if self.may_replace(region.attributes) {
                self.place_piece(id, range, region.range, sending);
            } else if let Some(mmu) = mmu {
                self.send_pages_to(mmu, region.range, sending);
            }
        }
    }

    fn place_piece(&self, id: u64, range: PfnRange, piece: PageRange, sending: &mut Sending) {
        if piece == PageRange::block(piece.start.block()) && self.place_block(id, piece, sending) {
            return;
        }
        let mut at = piece.start;
        let mut tries = 0;
        while at < piece.end {
            let rest = PageRange { start: at, end: piece.end };
            let placed = sending.timed(|patience| (self.place_some(id, range, rest), patience));
            tries += 1;
            let next = match placed {
                (Placed::UpTo(next), _) => next,
                (Placed::Again, _) if tries < TRIES => continue,
                (Placed::Busy, patience) if tries < TRIES && !patience.is_zero() => {
                    sending.timed(|_| crate::sync::sleep(PAUSE));
                    continue;
                }
                (Placed::Again | Placed::Busy, _) => at + 1,
                (Placed::NoRoom, _) => {
                    sending.full = true;
                    return;
                }
                (Placed::Lost(pfn), _) => {
                    sending.fails(NotSent::Lost(at, pfn));
                    at + 1
                }
                (Placed::Failed(e), _) => {
                    let gone = e == FaultError::Cut;
                    sending.fails(NotSent::Failed(at, e));
                    if gone {
                        return;
                    }
                    at + 1
                }
            };
            (at, tries) = (next, 0);
        }
    }

    /// Sends a whole block in one piece. False if its pages are to go by themselves.
    fn place_block(&self, id: u64, block: PageRange, sending: &mut Sending) -> bool {
        let Some(buffer) = sending.buffer(self.geometry.block_bytes()) else { return false };
        match self.migrate_block(block.start.block(), id, buffer) {
            Ok(()) => true,
            Err(MigrateError::Device(e)) => {
                let va = self.geometry.va(block.start);
                sending.fails(NotSent::Failed(block.start, FaultError::Device(va.0, e)));
                true
            }
            Err(MigrateError::NotThere | MigrateError::Persistent) => {
                sending.fails(NotSent::Failed(block.start, FaultError::Cut));
                true
            }
            // It is on the device, and cannot be shown.
            Err(MigrateError::Place(PlaceError::TooManyPieces(_) | PlaceError::NoMemory | PlaceError::Kernel(_))) => {
                true
            }
            Err(_) => false,
        }
    }

    fn place_some(&self, id: u64, range: PfnRange, rest: PageRange) -> Placed {
        let at = rest.start;
        let Some((entry, whole)) = self.table.look(at) else { return Placed::UpTo(rest.end) };
        let block = PageRange::block(at.block());
        match entry.state() {
            State::Coherent { pfn } if range.contains(pfn.pfn()) => {
                return Placed::UpTo(if whole { block.end.min(rest.end) } else { at + 1 });
            }
            State::Mapped { held: true, .. } => return Placed::UpTo(at + 1),
            State::Poisoned { pfn } => return Placed::Lost(pfn + if whole { at - block.start } else { 0 }),
            _ if whole => {
                self.split_for_device(at);
                return Placed::Again;
            }
            State::Coherent { .. } => {
                let turn = self.take_turn();
                return match self.take_range_from_place(PageRange::new(at, Pages(1)), &turn) {
                    Ok(()) => Placed::Again,
                    Err(_) => Placed::UpTo(at + 1),
                };
            }
            State::Host { .. } | State::Shared { .. } | State::Zero { .. } | State::Mapped { .. } => {
                return self.set_aside_for_place(rest);
            }
            State::Empty | State::Standby { .. } | State::Device { .. } => {}
            State::Leaf(_) => unreachable!("a page is no leaf"),
        }
        let adopted = self.region(at).is_some_and(|r| r.attributes.has(Attributes::ADOPTED));
        if adopted && entry.state() == State::Empty && self.kernel.is_present(self.geometry.va(at)).unwrap_or(true) {
            return self.set_aside_for_place(rest);
        }
        self.place_run(id, range, rest)
    }

    /// Takes some pages from the CPU's mappings and from MMUs.
    fn set_aside_for_place(&self, rest: PageRange) -> Placed {
        let near = PageRange::new(rest.start, CLUSTER.min(rest.pages()));
        if self.is_pinned_at(near.start) {
            return Placed::UpTo(near.start + 1);
        }
        {
            let _work = self.contexts.take();
            self.recall_where(near, |state| state.is_on_mmus() && !matches!(state, State::Mapped { held: true, .. }));
        }
        let set_aside = self.set_aside(near);
        let there = matches!(self.table.look(near.start), Some((e, _)) if matches!(e.state(), State::Host { .. }));
        if set_aside == 0 && there { Placed::Busy } else { Placed::Again }
    }

    /// Whether somebody relies on the page at `vpn` staying where it is.
    fn is_pinned_at(&self, vpn: Vpn) -> bool {
        let _work = self.contexts.take();
        let frame: Option<Frame> = match self.table.look(vpn) {
            Some((entry, false)) => match entry.state() {
                State::Host { pfn, .. } | State::Shared { pfn, .. } => Some(self.memmap.head(self.memmap.page(pfn))),
                _ => None,
            },
            _ => None,
        };
        frame.is_some_and(|frame| self.memmap.pins(frame) > 0)
    }

    /// Whether the CPU's mapping of `pages`, whose entries are locked, may be replaced now: of adopted memory where the program may
    /// write, and has not announced that it changes that.
    pub(super) fn may_replace_now(&self, region: RegionInfo, pages: PageRange) -> bool {
        if !self.may_replace(region.attributes) {
            return false;
        }
        if !region.attributes.has(Attributes::ADOPTED) {
            return true;
        }
        let range = self.addresses(pages);
        let mut at = range.start;
        while at < range.end {
            match self.kernel.allowed_at(at) {
                Ok(Some((mapping, Access::Write))) => at = mapping.end,
                _ => return false,
            }
        }
        !self.announcements.concern(pages)
    }

    /// Moves pages at the start of `rest`, which nobody maps, to the device, and puts them in place there: as many as follow each
    /// other.
    fn place_run(&self, id: u64, range: PfnRange, rest: PageRange) -> Placed {
        let turn = self.take_turn();
        let mut work = self.contexts.take();
        let Some(region) = self.region(rest.start) else { return Placed::UpTo(rest.start + 1) };
        let mut locked = self.lock_movable(region, rest);
        let Some(first) = locked.first() else { return Placed::Busy };
        let all = PageRange { start: first.vpn(), end: locked[locked.len() - 1].range().end };
        if !self.may_replace_now(region, all) {
            // Some of it, perhaps.
            locked.truncate(1);
            if !self.may_replace_now(region, locked[0].range()) {
                return if self.announcements.concern(all) { Placed::Busy } else { Placed::UpTo(rest.start + 1) };
            }
        }
        let mut run: ArrayVec<Entry<'_, K>, RUN> = ArrayVec::new();
        let mut last = self.place_before(rest.start, range);
        let mut why = Placed::Again;
        {
            let Some(tier) = self.tiers.by_id(id).filter(|tier| !tier.has_failed()) else {
                return Placed::Failed(FaultError::Cut);
            };
            for mut entry in locked {
                let here = |state| matches!(state, State::Device { pfn, .. } if range.contains(pfn.pfn()));
                if !here(entry.state()) {
                    let near = last.map(|pfn| pfn + 1 - range.base);
                    match self.move_here(&mut entry, &tier, near, &mut work) {
                        Ok(()) => {}
                        Err(stay) => {
                            why = self.not_placed(stay, entry, &work);
                            break;
                        }
                    }
                }
                let State::Device { pfn, .. } = entry.state() else { unreachable!("it has been moved there") };
                if !run.is_empty() && last.is_none_or(|last| pfn != last + 1) {
                    // The next run begins with it.
                    break;
                }
                last = Some(pfn);
                run.push(entry);
            }
        }
        let Some(end) = run.last().map(|entry| entry.range().end) else { return why };
        match self.put_run_in_place(run, work, &turn) {
            Ok(()) => Placed::UpTo(end),
            Err(PlaceError::Busy) => Placed::Busy,
            // It is there like any page on a device.
            Err(_) => Placed::UpTo(end),
        }
    }

    /// Locks entries at the start of `rest` that nobody maps.
    fn lock_movable(&self, region: RegionInfo, rest: PageRange) -> ArrayVec<Entry<'_, K>, RUN> {
        let mut run = ArrayVec::new();
        let adopted = region.attributes.has(Attributes::ADOPTED);
        for vpn in rest.iter().take(RUN) {
            let entry = match run.is_empty() {
                true => self.table.lock(vpn).ok(),
                false => self.table.try_lock(vpn).ok().flatten(),
            };
            let movable = |state| matches!(state, State::Empty | State::Standby { .. } | State::Device { .. });
            let Some(entry) = entry.filter(|e| !e.is_whole() && movable(e.state())) else { break };
            let native = || self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(true);
            if self.region(vpn) != Some(region) || adopted && entry.state() == State::Empty && native() {
                break;
            }
            run.push(entry);
        }
        run
    }

    /// Where on the device at `range` the page before `vpn` is in place, if it is.
    pub(super) fn place_before(&self, vpn: Vpn, range: PfnRange) -> Option<DevicePfn> {
        let before = Vpn(vpn.0.checked_sub(1)?);
        let (entry, whole) = self.table.look(before)?;
        let offset = if whole { before - before.block_start() } else { 0 };
        match entry.state() {
            State::Coherent { pfn } if range.contains(pfn.pfn()) => Some(pfn + offset),
            _ => None,
        }
    }

    fn not_placed(&self, stay: Stay, entry: Entry<'_, K>, work: &super::context::Working<'_>) -> Placed {
        let va = self.geometry.va(entry.vpn());
        match stay {
            Stay::NoRoom | Stay::Refused => Placed::NoRoom,
            Stay::Changing => Placed::Busy,
            Stay::Failed(DeviceError::Gone) => Placed::Failed(FaultError::Cut),
            Stay::Failed(e) => Placed::Failed(FaultError::Device(va.0, e)),
            Stay::Unreadable(e) => {
                self.lose(entry, e, work.context());
                Placed::Again
            }
        }
    }
}

/// Tries at the same pages.
const TRIES: u32 = 64;
const PAUSE: std::time::Duration = std::time::Duration::from_micros(50);

impl Sending {
    /// Room for a block.
    fn buffer(&mut self, bytes: usize) -> Option<&mut Buffer> {
        if self.buffer.is_none() {
            self.buffer = Buffer::new(bytes).ok();
        }
        self.buffer.as_mut()
    }
}
