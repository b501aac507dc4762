//! Pages sent by number: exactly those that somebody names go to a device or home, and whoever asked waits for it (rules G8, H2).
//!
//! Blocks that lie inside go as huge folios, everything else page by page; blocks of which a part alone is meant are split first.
//! A page that somebody relies on stays where it is and keeps no other from going. How many are there in the end is counted in
//! the end, because others may have had a use for them meanwhile.

use super::Engine;
use super::fault::{Fault, Hold, Outcome};
use super::place::Bring;
use crate::device::mmu::DeviceAccess;
use crate::device::port::FaultError;
use peerspace_core::addr::{Access, BLOCK_PAGES, DevicePfn, PageRange, Pages, Vpn};
use peerspace_core::entry::State;
use peerspace_core::pagemap::PfnRange;
use peerspace_core::plan::{CLUSTER, HUGE_LEVEL};
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::MmuId;
use peerspace_os::own::Buffer;
use peerspace_os::{Kernel, Wake};
use std::time::{Duration, Instant};

/// How long all pages that are in somebody's hands are waited for, together, and one of them at most; and, when everything else has
/// gone, for those that have not.
const PATIENCE: [Duration; 2] = [millis(500), millis(1500)];
const FOR_ONE: [Duration; 2] = [millis(10), millis(1000)];
const fn millis(n: u64) -> Duration {
    Duration::from_millis(if cfg!(shuttle) { 1 << 40 } else { n })
}
/// Looks at one page on its way home.
const LOOKS: u32 = 64;

/// Where pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    Host,
    /// The memory of the device with this MMU, for it alone.
    Mmu(MmuId),
    /// The memory of the coherent device of this number, in place.
    Place(u64),
}

/// Why a page did not go that is not merely in use.
#[derive(Debug)]
pub(crate) enum NotSent {
    /// It was lost before (rule Z9).
    Lost(Vpn, DevicePfn),
    /// The device failed, or cannot reach it.
    Failed(Vpn, FaultError),
}

/// One migration: how much longer it waits, and what went wrong first.
#[derive(Debug)]
pub(crate) struct Sending {
    left: Duration,
    for_one: Duration,
    wrong: Option<NotSent>,
    /// Pages that went, and as many as can go.
    gone: u64,
    room: u64,
    /// The device has no more.
    pub(super) full: bool,
    /// What blocks go through.
    pub(super) buffer: Option<Buffer>,
}

impl Sending {
    pub(crate) fn new() -> Sending {
        Sending {
            left: PATIENCE[0],
            for_one: FOR_ONE[0],
            wrong: None,
            gone: 0,
            room: u64::MAX,
            full: false,
            buffer: None,
        }
    }

    /// Once more, for those that have not gone. False if there is nothing to be hoped for.
    pub(crate) fn again(&mut self) -> bool {
        self.gone = 0;
        (self.left, self.for_one) = (PATIENCE[1], FOR_ONE[1]);
        self.wrong.is_none() && !self.full
    }

    pub(crate) fn wrong(self) -> Option<NotSent> {
        self.wrong
    }

    pub(super) fn fails(&mut self, why: NotSent) {
        self.wrong.get_or_insert(why);
    }

    /// Runs `step`, and takes what it took off what is left.
    pub(super) fn timed<T>(&mut self, step: impl FnOnce(Duration) -> T) -> T {
        let begun = Instant::now();
        let done = step(self.left.min(self.for_one));
        // Bringing a page takes some microseconds in any case.
        self.left = self.left.saturating_sub(begun.elapsed().saturating_sub(Duration::from_millis(1)));
        done
    }
}

impl<K: Kernel> Engine<K> {
    /// The first of `pages` that belongs to no region. What has grown in place is taken into one.
    pub(crate) fn first_unmanaged(&self, pages: PageRange) -> Option<Vpn> {
        let mut at = pages.start;
        while at < pages.end {
            if let Some(region) = self.region(at) {
                at = region.range.end;
                continue;
            }
            let found = self.unknown(at, &mut self.contexts.take());
            match found {
                Ok(_) => return Some(at),
                Err(Hold::Changing) => self.wait_for_changes(),
                Err(_) => crate::sync::yield_now(),
            }
        }
        None
    }

    /// Sends `pages`, of one block, to where `to` says. To be called without a lock and without a context.
    pub(crate) fn send_pages(&self, pages: PageRange, to: To, sending: &mut Sending) {
        match to {
            To::Host => self.send_pages_home(pages, sending),
            To::Mmu(mmu) => self.send_pages_to(mmu, pages, sending),
            To::Place(id) => self.send_pages_in_place(id, pages, sending),
        }
    }

    /// How many of `pages` are where `to` says.
    pub(crate) fn count_sent(&self, pages: PageRange, to: To) -> Pages {
        let _work = self.contexts.take();
        let range = match to {
            To::Host => None,
            To::Mmu(mmu) => Some(self.tiers.by_mmu(mmu).map(|tier| tier.range)),
            To::Place(id) => Some(self.tiers.by_id(id).map(|tier| tier.range)),
        };
        let range = match range {
            None => None,
            Some(None) => return Pages(0),
            Some(range) => range,
        };
        let mut there = 0;
        let mut at = pages.start;
        while at < pages.end {
            let Some((entry, whole)) = self.table.look(at) else {
                at = Vpn(at.block_start().0 + BLOCK_PAGES);
                continue;
            };
            let next = if whole { Vpn(at.block_start().0 + BLOCK_PAGES).min(pages.end) } else { at + 1 };
            there += match (entry.state(), range) {
                (State::Empty, None) => self.count_untracked(PageRange { start: at, end: next }),
                (state, range) if is_there(state, range) => next - at,
                _ => 0,
            };
            at = next;
        }
        Pages(there)
    }

    /// How many of `pages`, of which the table knows nothing, are the kernel's on the host: because it has populated them, or
    /// because they stay there in any case.
    fn count_untracked(&self, pages: PageRange) -> u64 {
        let mut native: u64 = self.in_place_parts(pages).map(|part| part.pages().0).sum();
        if self.region(pages.start).is_some_and(|r| r.attributes.has(Attributes::ADOPTED)) {
            let count = &mut |run: peerspace_core::addr::VaRange| native += self.geometry.pages_in(run.len()).0;
            // Where that cannot be found out they are not counted.
            let _ = self.kernel.present_runs(self.addresses(pages), count);
        }
        native
    }

    pub(super) fn send_pages_to(&self, mmu: MmuId, pages: PageRange, sending: &mut Sending) {
        let mut at = pages.start;
        let Some(range) = self.with_tier(mmu, |tier| tier.range) else {
            return sending.fails(NotSent::Failed(at, FaultError::Cut));
        };
        // No more than the device holds, or the last would drive out the first.
        sending.room = sending.room.min(range.pages.0);
        while at < pages.end && sending.gone < sending.room {
            let Some((entry, whole)) = self.table.look(at) else { return };
            let next = if whole { Vpn(at.block_start().0 + BLOCK_PAGES).min(pages.end) } else { at + 1 };
            if let (State::Mapped { .. }, true) = (entry.state(), is_there(entry.state(), Some(range))) {
                sending.gone += next - at;
                at = next;
                continue;
            }
            let most = CLUSTER.min(Pages(pages.end - at));
            // Whoever may only read has it moved all the same.
            let brought = sending.timed(|patience| {
                self.bring_to_device(mmu, at, DeviceAccess::Read, (Bring::Exactly(pages, patience), most))
            });
            match brought {
                Ok(got) => {
                    sending.gone += got.0.min(pages.end - at);
                    at = at + got.0;
                    continue;
                }
                Err(FaultError::Lost(..)) => {
                    if let Some((State::Poisoned { pfn }, offset)) = self.state_at(at) {
                        sending.fails(NotSent::Lost(at, pfn + offset));
                    }
                }
                Err(e @ FaultError::Cut) => return sending.fails(NotSent::Failed(at, e)),
                Err(e @ (FaultError::Device(..) | FaultError::OutOfReach(_))) => {
                    sending.fails(NotSent::Failed(at, e));
                }
                Err(FaultError::NoRoom(_)) => {
                    sending.room = sending.gone;
                    sending.full = true;
                    return;
                }
                // It stays.
                Err(_) => {}
            }
            // As it is by now: it may have been split.
            at = match self.table.look(at) {
                Some((_, true)) => next,
                _ => at + 1,
            };
        }
        sending.full |= at < pages.end;
    }

    /// The state of `vpn`, and how far it is into what that is about.
    fn state_at(&self, vpn: Vpn) -> Option<(State, u64)> {
        let (entry, whole) = self.table.look(vpn)?;
        Some((entry.state(), if whole { vpn - vpn.block_start() } else { 0 }))
    }

    fn send_pages_home(&self, pages: PageRange, sending: &mut Sending) {
        // What devices map is taken from them first, so that neighbours come together.
        self.recall_lone(pages);
        let mut at = pages.start;
        let mut looks = 0;
        while at < pages.end {
            let Some((entry, whole)) = self.table.look(at) else { return };
            let next = if whole { Vpn(at.block_start().0 + BLOCK_PAGES).min(pages.end) } else { at + 1 };
            let state = entry.state();
            let in_part = whole && !pages.covers(PageRange::block(at.block()));
            looks += 1;
            match state {
                State::Device { .. } | State::Mapped { held: false, .. } | State::Standby { .. }
                    if looks <= LOOKS =>
                {
                    if in_part {
                        self.split_for_device(at);
                        continue;
                    }
                    let come = self.resolve(self.homeward(PageRange { start: at, end: next.max(pages.end) }, whole));
                    // Otherwise discarded meanwhile, or there is no memory for it: it stays.
                    if let Ok(Outcome::Resolved | Outcome::Poisoned) = come {
                        continue;
                    }
                }
                State::Coherent { .. } if looks <= LOOKS && in_part && !self.is_persistent(at) => {
                    // Its pages are in place one by one from here on.
                    self.split_for_device(at);
                    continue;
                }
                State::Coherent { .. }
                    if looks <= LOOKS
                        && !self.is_persistent(at)
                        && self.leave_places(PageRange { start: at, end: pages.end }).is_ok() =>
                {
                    continue;
                }
                State::Poisoned { pfn } => {
                    let offset = if whole { at - at.block_start() } else { 0 };
                    sending.fails(NotSent::Lost(at, pfn + offset));
                }
                _ => {}
            }
            (at, looks) = (next, 0);
        }
    }

    /// A fault that brings what begins `pages` home, and nothing that lies behind them.
    fn homeward(&self, pages: PageRange, whole: bool) -> Fault {
        let level = match pages.pages() {
            _ if whole => HUGE_LEVEL,
            n if n >= CLUSTER => HUGE_LEVEL - 1,
            Pages(4..) => 1,
            _ => 0,
        };
        Fault { alone: !whole && level == 0, ..Fault::ahead(pages.start, Access::Read, Wake::Yes, level) }
    }

    /// Recalls what of `pages` a device alone has; of blocks that lie inside in part, those parts.
    fn recall_lone(&self, pages: PageRange) {
        let _work = self.contexts.take();
        self.recall_where(pages, |state| matches!(state, State::Mapped { held: false, .. }));
    }
}

/// Whether a page in `state` is on the device at `range`, or in RAM where there is none.
fn is_there(state: State, range: Option<PfnRange>) -> bool {
    match (state, range) {
        (State::Device { pfn, .. } | State::Mapped { pfn, .. } | State::Coherent { pfn }, Some(range)) => {
            range.contains(pfn.pfn())
        }
        (State::Host { .. } | State::Shared { .. } | State::Standby { .. }, None) => true,
        _ => false,
    }
}
