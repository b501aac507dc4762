//! Reading ahead of sequential streams, on another processor.
//!
//! A fault that belongs to a stream leaves a note of what comes next, in a short queue; a worker brings it in. A
//! block is brought to standby, from where the stream's next fault takes it in two microseconds; small pages are
//! mapped at once, clean, so that the stream does not fault at all. The queue is only ever tried: a stream that
//! finds it taken goes on without.

use super::Engine;
use super::context::Working;
use super::fault::{Fault, Patience, Ration};
use super::stats::count_n;
use peerspace_core::addr::{Access, BLOCK_PAGES, PageRange, Pages, Vpn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::plan;
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::stream::Level;
use peerspace_os::{Kernel, Wake};

/// Small pages read ahead at once.
const PAGES_AHEAD: u64 = 64;

/// Something to bring in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// The block of this page, to standby.
    Block(Vpn),
    /// These pages, mapped.
    Pages(PageRange, Level),
}

impl<K: Kernel> Engine<K> {
    /// Has the blocks from `next` on read ahead.
    pub(crate) fn read_ahead_blocks(&self, next: Vpn, level: Level) {
        // What is read ahead rests beside the standby, and must not crowd it out.
        let most = (self.budget.limit().0 / BLOCK_PAGES / 32).min(plan::blocks_ahead(level));
        for i in 0..most {
            let vpn = next + i * BLOCK_PAGES;
            if self.block_to_read(vpn) && !self.service.request(Ahead::Block(vpn), &self.kernel.park()) {
                return;
            }
        }
    }

    /// True when the block at `vpn` is wholly on a device from which it can be brought in whole.
    fn block_to_read(&self, vpn: Vpn) -> bool {
        let Some((entry, true)) = self.table.look(vpn) else { return false };
        let State::Device { pfn, .. } = entry.state() else { return false };
        self.tiers.of(pfn).info.compares
            && self.region(vpn).is_some_and(|r| !r.attributes.has(Attributes::LEAVING) && self.block_inside(r, vpn))
    }

    /// Has small pages from `next` on read ahead.
    pub(crate) fn read_ahead_pages(&self, region: RegionInfo, next: Vpn, level: Level) {
        let wanted = PageRange::new(next, Pages(PAGES_AHEAD)).intersect(region.range);
        let on_device =
            |vpn| matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Device { .. }));
        if !wanted.is_empty() && on_device(wanted.start) {
            self.service.request(Ahead::Pages(wanted, level), &self.kernel.park());
        }
    }

    /// Does what a stream asked for.
    pub(crate) fn bring_ahead(&self, what: Ahead) {
        let mut work = self.contexts.take();
        match what {
            Ahead::Block(vpn) => self.bring_block_ahead(vpn, &mut work),
            Ahead::Pages(pages, level) => self.bring_pages_ahead(pages, level, &mut work),
        }
    }

    fn bring_block_ahead(&self, vpn: Vpn, work: &mut Working<'_>) {
        if !self.block_to_read(vpn) {
            return;
        }
        let Ok(Some(frame)) = self.take_block(work, Patience::Waits) else { return };
        let entry = self.table.try_lock(vpn).ok().flatten().filter(|e| e.is_whole() && self.block_to_read(vpn));
        let Some(mut entry) = entry else { return self.blocks.give_ready(frame) };
        let State::Device { stamp, .. } = entry.state() else { return self.blocks.give_ready(frame) };
        if !self.fill_block(frame, entry.state(), entry.vpn(), work) {
            // The fault that needs it will find out what is wrong.
            return self.blocks.give_ready(frame);
        }
        self.memmap.set_arrival(frame, self.arrival_of(stamp));
        entry.set(State::Standby { pfn: self.memmap.pfn(frame), dirt: Dirt::Clean });
        self.blocks.put_ahead(frame);
        drop(entry);
        count_n(&work.counters.read_ahead, BLOCK_PAGES);
        count_n(&work.counters.pages_in, BLOCK_PAGES);
    }

    fn bring_pages_ahead(&self, pages: PageRange, level: Level, work: &mut Working<'_>) {
        let mut at = pages.start;
        while at < pages.end {
            let on_device = matches!(self.table.look(at), Some((e, _)) if matches!(e.state(), State::Device { .. }));
            // Somebody else is at it, or the stream has overtaken us.
            if !on_device || self.table.is_locked(at) || self.budget.left() < 0 {
                return;
            }
            let mut fault = Fault::ahead(at, Access::Read, Wake::Yes, level);
            let mut ration = Ration::default();
            let done = self.attempt(&mut fault, work, &mut ration);
            self.return_ration(ration);
            if done.is_err() {
                return;
            }
            let next = at + plan::CLUSTER.0;
            count_n(&work.counters.read_ahead, next.min(pages.end) - at);
            at = next;
        }
    }
}
