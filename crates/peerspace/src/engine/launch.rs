//! Pages held on a device for the duration of a launch: for devices that cannot fault (rules G4, G14).
//!
//! A launch holds its pages in ascending order, each brought to the device alone and marked; so two launches that want the same
//! pages wait for each other in one direction only. The mark is in the page's word, where whoever locks the page sees it, so
//! there is no list to search. What is held stays: eviction passes it by, CPU and other devices wait. The
//! program may discard it all the same; then the launch is told.
//!
//! A fork waits until no launch is under way, and none begins before it is over.

use super::Engine;
use super::place::Bring;
use crate::device::mmu::DeviceAccess;
use crate::device::port::FaultError;
use peerspace_core::addr::{PageRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::plan::CLUSTER;
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::{AtomicU64, Ordering};
use peerspace_os::Kernel;

/// Launches under way.
#[derive(Debug)]
pub(crate) struct Launches(AtomicU64);

impl Launches {
    pub(crate) fn new() -> Launches {
        Launches(AtomicU64::new(0))
    }

    pub(crate) fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }

    /// In a forked child.
    pub(crate) fn renew(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl<K: Kernel> Engine<K> {
    /// Brings `ranges`, which are in ascending order and apart, to the device with `mmu`, and holds them there.
    ///
    /// # Errors
    /// [`FaultError`]; nothing is held then.
    pub(crate) fn hold_on_device(&self, mmu: MmuId, ranges: &[PageRange]) -> Result<(), FaultError> {
        debug_assert!(ranges.is_sorted_by(|a, b| a.end <= b.start));
        {
            // With a context: so not while a fork is under way.
            let _work = self.contexts.take();
            self.launches.0.fetch_add(1, Ordering::SeqCst);
        }
        for (i, range) in ranges.iter().enumerate() {
            let mut at = range.start;
            while at < range.end {
                match self.hold_one(mmu, at) {
                    Ok(end) => at = end,
                    Err(e) => {
                        let begun = PageRange { start: range.start, end: at };
                        for held in ranges[..i].iter().chain([&begun]) {
                            let _ = self.release_held(mmu, *held);
                        }
                        self.launches.0.fetch_sub(1, Ordering::SeqCst);
                        return Err(e);
                    }
                }
            }
        }
        Ok(())
    }

    /// Splits the huge folios of which `ranges` mean a part alone: the device has no room for the rest of them (rule H2).
    pub(crate) fn split_at_edges(&self, ranges: &[PageRange]) {
        for range in ranges {
            for piece in range.by_block() {
                if piece != PageRange::block(piece.start.block()) {
                    self.split_for_device(piece.start);
                }
            }
        }
    }

    /// Holds the page at `vpn`, or the block that it is mapped with. Returns what comes next.
    ///
    /// What stays where it is takes no mark: nobody takes it from the device but who takes it from everybody. It is mapped to be
    /// written if the program may write it.
    fn hold_one(&self, mmu: MmuId, vpn: Vpn) -> Result<Vpn, FaultError> {
        loop {
            if self.end_in_place(vpn).is_some() {
                let bring = |access| self.bring_to_device(mmu, vpn, access, (Bring::AsChosen, CLUSTER));
                let got = match bring(DeviceAccess::Write) {
                    Err(FaultError::ReadOnly(_)) => bring(DeviceAccess::Read)?,
                    got => got?,
                };
                return Ok(vpn + got.0);
            }
            self.bring_to_device(mmu, vpn, DeviceAccess::Atomic, (Bring::Here, CLUSTER))?;
            let _work = self.contexts.take();
            let tier = self.tiers.by_mmu(mmu).ok_or(FaultError::Cut)?;
            let Ok(entry) = self.table.lock(vpn) else { continue };
            match entry.state() {
                State::Mapped { pfn, held: false } if tier.range.contains(pfn.pfn()) => {
                    let end = entry.range().end;
                    entry.commit(State::Mapped { pfn, held: true });
                    return Ok(end);
                }
                // Another launch on the same device has it.
                State::Mapped { held: true, .. } => {
                    drop((entry, tier, _work));
                    crate::sync::sleep(std::time::Duration::from_micros(50));
                }
                // Somebody was faster.
                _ => {}
            }
        }
    }

    /// Ends a launch: lets `ranges` go. False if a part of them was not there any more.
    pub(crate) fn let_go_on_device(&self, mmu: MmuId, ranges: &[PageRange]) -> bool {
        let missing = ranges.iter().filter(|range| !self.release_held(mmu, **range)).count();
        self.launches.0.fetch_sub(1, Ordering::SeqCst);
        missing == 0
    }

    fn release_held(&self, mmu: MmuId, range: PageRange) -> bool {
        let mut all = true;
        let mut at = range.start;
        while at < range.end {
            if let Some(end) = self.end_in_place(at) {
                at = end;
                continue;
            }
            let _work = self.contexts.take();
            let Ok(entry) = self.table.lock(at) else {
                all = false;
                at = at + 1;
                continue;
            };
            at = entry.range().end;
            let own = |pfn: peerspace_core::addr::DevicePfn| {
                self.tiers.by_mmu(mmu).is_some_and(|tier| tier.range.contains(pfn.pfn()))
            };
            match entry.state() {
                State::Mapped { pfn, held: true } if own(pfn) => entry.commit(State::Mapped { pfn, held: false }),
                _ => all = false,
            }
        }
        all
    }
}
