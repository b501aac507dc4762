//! Where a page should be when a device wants it: what mode, hints and the page's own history say (rules G8, G9).
//!
//! A hint decides where there is one. Without one the device's mode does, but for pages that go to and fro
//! ([`wars`](peerspace_core::wars)): these stay where they are for a while, and whoever can accesses them there. A page that a
//! device accesses on the host so often that it had better be on the device goes there
//! ([`Engine::note_remote`]).

use super::Engine;
use super::mmus::MmuState;
use crate::device::mmu::{DeviceAccess, Mode};
use peerspace_core::addr::{PageRange, Va, Vpn};
use peerspace_core::coherence::Wish;
use peerspace_core::entry::State;
use peerspace_core::regions::{Attributes, Place, RegionInfo};
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};
use peerspace_core::wars::Wars;
use peerspace_core::words::Words;
use peerspace_os::Kernel;
use std::time::{Duration, Instant};

/// Ticks of the clock of [`Wars`].
const TICK: Duration = Duration::from_micros(100);
/// How long a device that cannot access a page where it is waits for it at most.
const LONGEST_WAIT: Duration = Duration::from_millis(10);
/// Pages whose accesses are counted at once.
const PAGES: usize = 1024;
/// So many accesses to a page on the host make it worth moving, unless somebody said otherwise.
const HOT: u32 = 256;

/// How a page gets to a device.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bring {
    /// As mode, hints and history say.
    AsChosen,
    /// By moving there, whatever else would be chosen.
    Here,
    /// The same, of these pages and no others, although nobody may want to write. What somebody relies on is not waited for,
    /// and whatever else is in the way so long at most.
    Exactly(PageRange, Duration),
}

impl Bring {
    /// The pages that may move.
    pub(super) fn bounds(self) -> Option<PageRange> {
        match self {
            Bring::Exactly(pages, _) => Some(pages),
            Bring::AsChosen | Bring::Here => None,
        }
    }

    /// Whether a part of the block of `vpn` alone may move.
    pub(super) fn is_part_of_block(self, vpn: Vpn) -> bool {
        self.bounds().is_some_and(|pages| !pages.covers(PageRange::block(vpn.block())))
    }

    pub(super) fn patience(self) -> Option<Duration> {
        match self {
            Bring::Exactly(_, patience) => Some(patience),
            Bring::AsChosen | Bring::Here => None,
        }
    }

    /// These of `pages`.
    pub(super) fn within(self, pages: PageRange) -> PageRange {
        self.bounds().map_or(pages, |bounds| pages.intersect(bounds))
    }
}

/// What the space knows of where pages go.
#[derive(Debug)]
pub(crate) struct Places<W> {
    wars: Wars<W>,
    born: Instant,
    truces: AtomicU64,
    /// Accesses of devices to pages on the host, by hash: a tag of the page, and how many.
    hot: W,
}

impl<W: Words> Places<W> {
    /// `words` makes zeroed words.
    pub(crate) fn new<E>(mut words: impl FnMut(usize) -> Result<W, E>) -> Result<Places<W>, E> {
        Ok(Places {
            wars: Wars::new(words(Wars::<W>::WORDS)?),
            born: Instant::now(),
            truces: AtomicU64::new(0),
            hot: words(PAGES)?,
        })
    }

    fn now(&self) -> u64 {
        (self.born.elapsed().as_nanos() / TICK.as_nanos()) as u64
    }

    /// The page (or block) at `vpn` goes to a device, or home.
    pub(crate) fn moved(&self, vpn: Vpn, to: Option<MmuId>) {
        if self.wars.moved(vpn, to.map_or(0, |mmu| mmu.0 + 1), self.now()) {
            self.truces.fetch_add(1, Relaxed);
        }
    }

    /// How long the page (or block) at `vpn` is to stay where it is.
    pub(crate) fn truce(&self, vpn: Vpn) -> Option<Duration> {
        match self.wars.truce(vpn, self.now()) {
            0 => None,
            ticks => Some(TICK * ticks as u32),
        }
    }

    /// Counts accesses of the device with `mmu` to the page at `vpn`. True if these made it hot; then it begins anew.
    fn warms(&self, mmu: MmuId, vpn: Vpn, accesses: u32) -> bool {
        let key = vpn.0 << 4 | mmu.0 as u64;
        let hash = (key + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let (slot, tag) = (self.hot.at((hash >> 54) as usize % PAGES), hash << 32 >> 32);
        let seen = slot.load(Relaxed);
        // A page that shares its slot with another begins anew each time: it stays where it is, and costs nothing.
        let before = if seen >> 32 == tag { seen as u32 } else { 0 };
        let now = before.saturating_add(accesses);
        slot.store(tag << 32 | if now < HOT { now as u64 } else { 0 }, Relaxed);
        now >= HOT
    }

    /// How many truces there have been.
    pub(crate) fn truces(&self) -> u64 {
        self.truces.load(Relaxed)
    }
}

/// How a device is to get at a page, and how long it is to wait first.
pub(crate) struct Choice {
    pub(crate) wish: Wish,
    pub(crate) wait: Option<Duration>,
    /// The page goes to and fro. If it is a block, its pages may be fought over by nobody.
    pub(crate) war: bool,
}

impl<K: Kernel> Engine<K> {
    /// How the device with `mmu` is to get at the page (or block) that begins at `vpn`, for `access`.
    pub(crate) fn choose(&self, region: RegionInfo, vpn: Vpn, mmu: &MmuState, access: DeviceAccess) -> Choice {
        let now = |wish| Choice { wish, wait: None, war: false };
        let hints = region.attributes;
        let far = mmu.info.remote;
        if access == DeviceAccess::Atomic {
            return now(Wish::Migrate);
        }
        if far && hints.accessed_by(mmu.id) {
            return now(Wish::Remote);
        }
        if hints.has(Attributes::READ_MOSTLY) {
            return now(Wish::Replicate);
        }
        match hints.preferred() {
            Some(Place::Host) if far => return now(Wish::Remote),
            Some(Place::Mmu(id)) if id == mmu.id => return now(Wish::Migrate),
            _ => {}
        }
        let wish = match mmu.info.mode {
            Mode::Share if far => return now(Wish::Remote),
            Mode::Replicate if access == DeviceAccess::Read => Wish::Replicate,
            Mode::Share | Mode::Exclusive | Mode::Replicate => Wish::Migrate,
        };
        match self.places.truce(vpn) {
            None => now(wish),
            Some(_) if far => Choice { war: true, ..now(Wish::Remote) },
            Some(truce) => Choice { wish, wait: Some(truce.min(LONGEST_WAIT)), war: true },
        }
    }

    /// The device with `mmu` has accessed the page at `va` on the host so many times of late. Where that is often, and nobody
    /// has said that it is to stay there, it moves to the device.
    pub(crate) fn note_remote(&self, mmu: MmuId, va: Va, accesses: u32) {
        let vpn = self.geometry.vpn(va);
        if !self.places.warms(mmu, vpn, accesses) {
            return;
        }
        let moves = {
            let _work = self.contexts.take();
            let (Some(region), Some(tier)) = (self.region(vpn), self.tiers.by_mmu(mmu)) else { return };
            let Some(state) = &tier.mmu else { return };
            let hints = region.attributes;
            // What is in place of a device was sent there.
            if matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Coherent { .. })) {
                return;
            }
            let stays = hints.has(Attributes::IN_PLACE)
                || hints.accessed_by(mmu)
                || hints.preferred() == Some(Place::Host)
                || hints.has(Attributes::READ_MOSTLY);
            let start = self.table.look(vpn).map_or(vpn, |(_, whole)| if whole { vpn.block_start() } else { vpn });
            state.info.mode != Mode::Share && !stays && self.places.truce(start).is_none()
        };
        if moves {
            // Whether it does is found out at the next access.
            let _ = self.device_fault(mmu, va, DeviceAccess::Write, Bring::Here);
        }
    }
}
