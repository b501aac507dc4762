//! Faults resolved by huge folios: a whole block at once, in one page of staging that moves to the program.
//!
//! A block frame is filled while it is staged and then moved in, huge, in about two microseconds. Moving cannot
//! protect a page from its first moment on, so a block that is only read is protected right after, and is
//! *unverified*: before it is dropped it is compared with its device's copy
//! ([`Dirt`](peerspace_core::entry::Dirt)). Devices that cannot compare cheaply are loaded in small pages
//! instead, unless the access is a write.
//!
//! Any of this can fail half-way, because the kernel may have broken a huge page up. What was moved stays moved:
//! the block is then split in the table into pages that are mapped and pages that are on standby in the block's
//! own staging.

use super::context::Working;
use super::fault::{Fault, Hold, Outcome, Patience, Ration};
use super::stats::{Counters, count, count_n};
use super::tiers::Load;
use super::{Engine, Entry};
use peerspace_core::addr::{Access, BLOCK_PAGES, Order, PageRange, Pages, Vpn};
use peerspace_core::entry::{Dirt, Entry as Word, State};
use peerspace_core::memmap::{Arrival, Backing, Frame};
use peerspace_core::plan;
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::stream::Direction;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Done, Kernel, Protect, Trouble, Wake};

impl<K: Kernel> Engine<K> {
    /// A block frame with a huge page in staging, charged: one that lies ready, or a new one. `None` when none
    /// is to be had without long waits; small pages do as well (rule H2).
    pub(crate) fn take_block(&self, work: &mut Working<'_>, patience: Patience) -> Result<Option<Frame>, Hold> {
        if self.refuses_block.load(Relaxed) && self.refuses_block.swap(false, Relaxed) {
            return Ok(None);
        }
        let mut rounds = 0;
        loop {
            if let Some(frame) = self.blocks.take_ready() {
                return Ok(Some(frame));
            }
            if self.budget.try_charge(BLOCK_PAGES) {
                self.watch_budget();
                let Some(frame) = self.memmap.take_block() else {
                    self.budget.uncharge(BLOCK_PAGES);
                    self.service.want_blocks(&self.kernel.park());
                    return Ok(None);
                };
                if self.populate(frame) {
                    return Ok(Some(frame));
                }
                return Ok(None);
            }
            if patience == Patience::Never && self.has_slow_device() {
                return Err(Hold::Busy);
            }
            // Standby blocks are the first to go, then mapped ones are unmapped: either gives a ready frame.
            rounds += 1;
            if rounds > 2 * BLOCK_PAGES / 16 || !self.reclaim_for_block(work) {
                return Ok(None);
            }
        }
    }

    /// Gives a block frame, which is charged, its page. If that does not become a huge one, gives all back.
    fn populate(&self, frame: Frame) -> bool {
        let range = self.blocks.range(frame);
        self.kernel.write_staged(range, |bytes| bytes[0] = 0);
        // The kernel had no huge page at hand: it gave a small one.
        if self.kernel.is_huge(range.start).unwrap_or(true) {
            return true;
        }
        if self.kernel.drop_staged(range).is_err() {
            // The page is still there: the frame lies ready with it, and stays charged.
            self.blocks.give_ready(frame);
            return false;
        }
        self.budget.uncharge(BLOCK_PAGES);
        self.memmap.reset(frame);
        self.memmap.give_back(frame);
        false
    }

    /// Gives the memory of a ready frame back to the kernel. True if there was one.
    pub(crate) fn release_ready(&self) -> bool {
        let Some(frame) = self.blocks.take_ready() else { return false };
        if self.kernel.drop_staged(self.blocks.range(frame)).is_err() {
            self.blocks.give_ready(frame);
            return false;
        }
        self.memmap.reset(frame);
        self.memmap.give_back(frame);
        self.budget.uncharge(BLOCK_PAGES);
        true
    }

    /// A whole block that was never touched, or is on one device as a whole.
    pub(crate) fn bring_in_block(
        &self,
        entry: Entry<'_, K>,
        region: RegionInfo,
        fault: &mut Fault,
        work: &mut Working<'_>,
        ration: &mut Ration,
    ) -> Result<Outcome, Hold> {
        let device = match entry.state() {
            State::Device { pfn, stamp, .. } => Some((pfn, stamp)),
            _ => None,
        };
        if device.is_none() && region.attributes.has(Attributes::ADOPTED) && self.has_native(entry.range()) {
            entry.split_evenly();
            return Err(Hold::Again);
        }
        if let Some((pfn, _)) = device {
            let tier = self.tiers.of(pfn);
            if tier.info.slow && fault.patience == Patience::Never {
                return Err(Hold::Busy);
            }
            if fault.access == Access::Read && !tier.info.compares {
                // In small pages, which can be proved clean.
                entry.split_evenly();
                return Err(Hold::Again);
            }
        }
        let Some(frame) = ration.block.take() else { return Err(Hold::Again) };
        let state = entry.state();
        let staged = self.fill_block(frame, state, entry.vpn(), work);
        if !staged {
            self.blocks.give_ready(frame);
            // Some page cannot be read: in small pages, exactly that one is lost.
            entry.split_evenly();
            return Err(Hold::Again);
        }
        let arrival = device.map_or(Arrival::New, |(_, stamp)| self.arrival_of(stamp));
        match device {
            None => count(&work.counters.zero_fill),
            Some(_) => {
                count(&work.counters.device_loads);
                count_n(&work.counters.pages_in, BLOCK_PAGES);
            }
        }
        let dirt = if self.kernel.capabilities().write_protect { Dirt::Unverified } else { Dirt::Dirty };
        let mut entry = entry;
        entry.set(State::Standby { pfn: self.memmap.pfn(frame), dirt });
        self.map_block(entry, frame, arrival, fault, work)
    }

    /// Whether the kernel itself has populated any of `pages`; true where that cannot be found out.
    pub(crate) fn has_native(&self, pages: PageRange) -> bool {
        let mut any = false;
        self.kernel.present_runs(self.addresses(pages), &mut |_| any = true).is_err() || any
    }

    /// Fills a staged block frame with what `state` says; false when a device failed. The frame is then backed
    /// by the device's copy, or by zero.
    pub(crate) fn fill_block(&self, frame: Frame, state: State, vpn: Vpn, _work: &Working<'_>) -> bool {
        self.memmap.reset(frame);
        self.memmap.place(frame, vpn, self.life());
        let range = self.blocks.range(frame);
        match state {
            State::Device { pfn, .. } => {
                let tier = self.tiers.of(pfn);
                let ok = self.kernel.write_staged(range, |bytes| {
                    let mut batch = [Load::new(pfn - tier.range.base, bytes)];
                    tier.load(&mut batch, self.geometry);
                    let [load] = batch;
                    load.result.is_ok()
                });
                self.memmap.set_backing(frame, Backing::Page(pfn));
                ok
            }
            _ => {
                self.kernel.write_staged(range, |bytes| bytes.fill(0));
                self.memmap.set_backing(frame, Backing::Zero);
                true
            }
        }
    }

    /// A whole block on standby: moves it back.
    pub(crate) fn take_back_block(
        &self,
        entry: Entry<'_, K>,
        fault: &mut Fault,
        work: &mut Working<'_>,
    ) -> Result<Outcome, Hold> {
        let State::Standby { pfn, .. } = entry.state() else { unreachable!("the block is on standby") };
        let frame = self.memmap.block(pfn);
        count(&work.counters.standby_hits);
        // Reclaim has marked what it unmapped as reused; a block that was read ahead is used for the first time.
        let arrival = self.memmap.arrival(frame);
        if arrival == Arrival::Reuse {
            self.memmap.set_frequency(frame, self.memmap.frequency(frame) + 1);
        }
        self.map_block(entry, frame, arrival, fault, work)
    }

    /// Moves a staged block frame in. `entry` says that it is on standby.
    fn map_block(
        &self,
        mut entry: Entry<'_, K>,
        frame: Frame,
        arrival: Arrival,
        fault: &mut Fault,
        work: &mut Working<'_>,
    ) -> Result<Outcome, Hold> {
        let State::Standby { pfn, dirt } = entry.state() else { unreachable!("the block is on standby") };
        let life = self.memmap.epoch(frame) == self.life();
        let dirt = if !life && dirt == Dirt::Clean { Dirt::Unverified } else { dirt };
        let (writable, now) = plan::mapping(fault.access, false, dirt);
        let pages = entry.range();
        let range = self.addresses(pages);
        let done = match self.gate.enter(work.context()) {
            Some(_section) => {
                // The program is woken when the page is protected: its write would be seen otherwise, but late.
                let wake = if writable { fault.wake } else { Wake::No };
                let done = self.kernel.put_back(range.start, self.blocks.range(frame), wake);
                if done.trouble.is_none() && !writable {
                    // Whatever was written before this moment is found by the comparison at eviction.
                    match self.kernel.protect(range, Protect::Yes, Wake::No) {
                        Ok(()) => done,
                        Err(t) => Done::stopped(done.pages, t),
                    }
                } else {
                    done
                }
            }
            None => Done::stopped(Pages(0), Trouble::Changing),
        };
        if done.pages.0 == BLOCK_PAGES {
            let woken = writable;
            // If protecting failed, the block is simply dirty.
            let (writable, now) = if done.trouble.is_some() { (true, Dirt::Dirty) } else { (writable, now) };
            let backing = self.memmap.backing(frame);
            self.memmap.place(frame, pages.start, self.life());
            if now == Dirt::Dirty {
                self.memmap.set_backing(frame, Backing::None);
            }
            self.memmap.map(frame);
            self.announce(frame, arrival);
            entry.set(State::Host { pfn, writable, dirt: now });
            drop(entry);
            if fault.wake == Wake::Yes && !woken {
                let _ = self.kernel.wake(range);
            }
            if now == Dirt::Dirty {
                self.free_backing(backing, Order::BLOCK);
            }
            count(&work.counters.huge_faults);
            // Where a page table exists already the kernel maps the block in small pages.
            if !self.may_have_page_table(pages.start) || self.kernel.is_huge(range.start).unwrap_or(true) {
                count(&work.counters.huge_mapped);
            }
            self.after_block(fault, pages);
            return Ok(Outcome::Resolved);
        }
        if done.pages.0 == 0 {
            if let Some(t @ (Trouble::Changing | Trouble::Absent)) = done.trouble {
                // The frame stays on standby, full, for the next attempt.
                self.blocks.put_on_standby(frame);
                drop(entry);
                return Err(self.hold(t));
            }
            // Small pages can be copied where a huge one cannot move: its memory is shared with a forked process, or
            // the kernel has pages of its own in the block.
            self.split_staged(entry, frame, Pages(0));
            fault.level = 0;
            return Err(Hold::Again);
        }
        // Some pages came in, the rest did not: the block goes on in pieces.
        self.split_staged(entry, frame, done.pages);
        let _ = self.kernel.wake(range);
        fault.level = 0;
        Err(Hold::Again)
    }

    /// False when there never was a small page in the block of `vpn`, as far as can be known without asking the kernel.
    fn may_have_page_table(&self, vpn: Vpn) -> bool {
        self.table.may_have_been_split(vpn.block())
            || self.region(vpn).is_none_or(|r| r.attributes.has(Attributes::ADOPTED))
    }

    /// Splits a block of which the first `mapped` pages are mapped and the others staged.
    fn split_staged(&self, entry: Entry<'_, K>, frame: Frame, mapped: Pages) {
        let State::Standby { pfn, dirt } = entry.state() else { unreachable!("the block is on standby") };
        self.memmap.split_block(frame);
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(pfn + i);
            if i < mapped.0 {
                // Moved in without protection: dirty, and the device's copy is stale.
                if let Backing::Page(copy) = self.memmap.backing(part) {
                    self.tiers.free(copy, Order::BASE);
                }
                self.memmap.set_backing(part, Backing::None);
                self.memmap.map(part);
                self.announce(part, Arrival::New);
            } else {
                self.memmap.set_slot(part, None);
            }
        }
        entry.split(|i| {
            let pfn = pfn + i;
            Word::new(if i < mapped.0 {
                State::Host { pfn, writable: true, dirt: Dirt::Dirty }
            } else {
                State::Standby { pfn, dirt }
            })
        });
        self.blocks.put_on_standby(frame);
    }

    /// Splits the mapping of a whole block (rule H6: cannot fail): its pages are mapped as they are, one by one. The folio
    /// stays in one piece. The caller lets go of the block by it.
    pub(crate) fn split_mapped(&self, entry: Entry<'_, K>, counters: &Counters) {
        let State::Host { pfn, .. } = entry.state() else { unreachable!("the block is mapped") };
        self.memmap.spread(self.memmap.block(pfn));
        entry.split_evenly();
        count(&counters.splits);
    }

    /// Makes a whole block writable.
    pub(crate) fn upgrade_block(
        &self,
        entry: Entry<'_, K>,
        fault: &mut Fault,
        work: &mut Working<'_>,
    ) -> Result<Outcome, Hold> {
        let State::Host { pfn, .. } = entry.state() else { unreachable!("the block is mapped") };
        let range = self.addresses(entry.range());
        {
            let _section = self.gate.enter(work.context()).ok_or(Hold::Changing)?;
            self.kernel.protect(range, Protect::No, fault.wake).map_err(|t| self.hold(t))?;
        }
        let frame = self.memmap.block(pfn);
        let backing = self.memmap.backing(frame);
        self.memmap.set_backing(frame, Backing::None);
        entry.commit(State::Host { pfn, writable: true, dirt: Dirt::Dirty });
        self.free_backing(backing, Order::BLOCK);
        count(&work.counters.upgrades);
        Ok(Outcome::Resolved)
    }

    /// Continues the stream behind a block, and has the next ones read ahead.
    fn after_block(&self, fault: &Fault, block: PageRange) {
        let level = fault.level.saturating_add(1);
        self.streams.expect(block.end, Direction::Up, level);
        self.read_ahead_blocks(block.end, level);
    }

    pub(crate) fn has_slow_device(&self) -> bool {
        self.tiers.iter().any(|t| t.info.slow)
    }
}
