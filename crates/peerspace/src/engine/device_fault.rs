//! The life of a device's fault (rule G4): the same table, the same states, the same locks as the CPU's.
//!
//! ```text
//!  port -> which region? -> how should it get there? (place) -> lock the entry -> look again -> step (core::coherence)
//!       -> recall, protect, unmap, move, copy: whatever the step says -> ... -> enter the translation, commit
//! ```
//!
//! Steps that need no other lock follow each other while the entry is locked ([`device_step`](super::device_step)); the others
//! (a CPU mapping that goes, a page that comes home, room that has to be made) are done here, without it, and then everything is
//! looked at again. A huge folio moves and is mapped as one; where the device has no room for one, its pages go their own ways
//! (rule H2).

use super::Engine;
use super::context::Working;
use super::device_step::Wanted;
use super::fault::{Outcome, Patience};
use super::make_room::Room;
use super::place::Bring;
use super::tier::{Closed, Tier};
use crate::device::mmu::DeviceAccess;
use crate::device::port::FaultError;
use crate::waited::Waited;
use peerspace_core::addr::{Access, Order, PageRange, Pages, Va, Vpn};
use peerspace_core::coherence::Wish;
use peerspace_core::entry::State;
use peerspace_core::plan::CLUSTER;
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::MmuId;
use peerspace_core::stream::Direction;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Kernel, Wake};
use std::time::Duration;

/// How long a fault goes on trying where the kernel or other threads are in the way.
pub(super) const PATIENCE: Duration =
    if cfg!(shuttle) { Duration::from_secs(1 << 30) } else { Duration::from_secs(10) };
/// How long it waits for a page that is pinned.
const PINNED: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_millis(250) };
/// Between two tries, after the first few.
const PAUSE: Duration = Duration::from_micros(50);
const AT_ONCE: u32 = 16;
/// How often it makes room for a block, or waits for others who do, before it makes do with small pages.
const ROOMS: u32 = 16;

/// What comes after an attempt.
pub(super) enum Next {
    /// The device has it: so many pages from the one that was asked for on.
    Done(Pages),
    /// Look again.
    Again,
    /// Look again, after whoever is in the way had time.
    Pause,
    /// It is pinned to the host, where the device cannot use it: whoever relies on it may let it go.
    Pinned,
    /// A launch holds it, for however long.
    Held,
    /// The process forks, and what the device is given now would be shared.
    Forking,
    /// It is to stay where it is for so long.
    Truce(Duration),
    /// It is a block, and its pages are to go separate ways first.
    Split,
    /// Have it mapped on the CPU first.
    Home(Access),
    /// Take it from its place on a coherent device first.
    Leave(peerspace_core::addr::DevicePfn),
    /// Make room on the device for a folio of this order first.
    Room(Order),
    /// The mappings of the program are changing: wait for that.
    Changing,
    /// The program has said that it is about to change what is there: wait until it has.
    Announced(PageRange),
    /// It stays where it is.
    Stays,
    Fail(FaultError),
}

impl<K: Kernel> Engine<K> {
    /// Resolves a fault of the device with `mmu`.
    pub(crate) fn device_fault(
        &self,
        mmu: MmuId,
        va: Va,
        access: DeviceAccess,
        how: Bring,
    ) -> Result<(), FaultError> {
        let vpn = self.geometry.vpn(va);
        let (level, done) = {
            let _work = self.contexts.take();
            let tier = self.tiers.by_mmu(mmu).ok_or(FaultError::Cut)?;
            let state = tier.mmu.as_ref().ok_or(FaultError::Cut)?;
            state.counters.faults.fetch_add(1, Relaxed);
            state.streams.arrive(vpn)
        };
        let most = match level {
            0 => Pages(1),
            1 => Pages(4),
            _ => CLUSTER,
        };
        let got = self.bring_to_device(mmu, vpn, access, (how, most))?;
        // More of a stream: each page as if it had faulted, as long as that takes no waiting.
        let mut next = vpn + got.0;
        if level > 0 && got.0 == 1 && done == Direction::Up {
            let end = Vpn((vpn + most.0).0.min(PageRange::block(vpn.block()).end.0));
            while next < end && self.region(next).is_some() {
                match self.bring_to_device(mmu, next, access, (how, Pages(end - next))) {
                    Ok(pages) => next = next + pages.0,
                    Err(_) => break,
                }
            }
        }
        let _work = self.contexts.take();
        if let Some(tier) = self.tiers.by_mmu(mmu)
            && let Some(state) = &tier.mmu
        {
            state.streams.expect(next, Direction::Up, level.saturating_add(1));
        }
        Ok(())
    }

    /// Has the device with `mmu` map the page at `vpn`, for `access`. Returns how many pages from there on it has now. `most`: so
    /// many are going to be asked for, this one included.
    pub(crate) fn bring_to_device(
        &self,
        mmu: MmuId,
        vpn: Vpn,
        access: DeviceAccess,
        (how, most): (Bring, Pages),
    ) -> Result<Pages, FaultError> {
        let va = self.geometry.va(vpn);
        let mut started: Option<Waited> = None;
        let (mut tries, mut rooms) = (0, 0);
        let (mut stays, mut waited, mut peace) = (false, false, !matches!(how, Bring::AsChosen));
        loop {
            let next = {
                let mut work = self.contexts.take();
                // Not while it is being taken away: what it was given now would be left over.
                let tier = self.tiers.open_by_mmu(mmu).filter(|tier| !tier.has_failed()).ok_or(FaultError::Cut)?;
                self.attempt_for_device(&tier, vpn, access, (how, most), (&mut stays, &mut waited, peace), &mut work)
            };
            match next {
                Next::Done(pages) => return Ok(pages),
                Next::Fail(e) => return Err(e),
                Next::Again => {}
                Next::Held | Next::Pinned if how.bounds().is_some() => return Err(FaultError::Pinned(va.0)),
                Next::Held | Next::Forking => {
                    crate::sync::sleep(PAUSE);
                    continue;
                }
                // Without a context, which faults of the CPU need to go on.
                Next::Truce(wait) => {
                    crate::sync::sleep(wait);
                    peace = true;
                    continue;
                }
                Next::Pinned if started.get_or_insert_with(Waited::new).so_far() >= PINNED => {
                    return Err(FaultError::Pinned(va.0));
                }
                Next::Pause | Next::Pinned => {
                    self.keep_staging_open();
                    if tries < AT_ONCE {
                        crate::sync::yield_now();
                    } else {
                        crate::sync::sleep(PAUSE);
                    }
                }
                Next::Changing => self.wait_for_changes(),
                // However long the program takes.
                Next::Announced(pages) => {
                    self.await_announced(pages);
                    continue;
                }
                // Also by who sends it: it does not go.
                Next::Stays if !matches!(how, Bring::AsChosen) => return Err(FaultError::Stays(va.0)),
                Next::Stays => {
                    if let Some(done) = self.bring_in_place(mmu, vpn, access, most) {
                        return done;
                    }
                }
                Next::Split => self.split_for_device(vpn),
                Next::Home(access) => match self.fault(va, access, Wake::Yes, Patience::Waits) {
                    Ok(Outcome::Foreign) => return Err(FaultError::NotManaged(va.0)),
                    // It is asked for again, and found to be lost.
                    Ok(Outcome::Resolved | Outcome::Poisoned | Outcome::Refused) | Err(_) => {}
                },
                Next::Leave(pfn) => {
                    if self.leave_place(pfn, vpn).is_err() {
                        return Err(FaultError::InPlace(va.0));
                    }
                }
                // Room for a block is not kept for anybody: where others always have part of it, small pages have to do.
                Next::Room(Order::BLOCK) if rooms == ROOMS => {
                    rooms = 0;
                    self.split_for_device(vpn);
                }
                Next::Room(order) => match self.make_room(mmu, order) {
                    Room::Made => rooms += 1,
                    Room::Busy => {
                        rooms += 1;
                        self.keep_staging_open();
                        crate::sync::sleep(PAUSE);
                    }
                    Room::Closed(Closed::Forking) => {
                        crate::sync::sleep(PAUSE);
                        continue;
                    }
                    Room::Closed(Closed::Leaving) => return Err(FaultError::Cut),
                    // Full of what is in place: it is used where it is.
                    Room::None
                        if order == Order::BASE
                            && !stays
                            && access != DeviceAccess::Atomic
                            && how.bounds().is_none()
                            && self.is_full_for_good(mmu) =>
                    {
                        stays = true;
                    }
                    Room::None if order == Order::BASE => return Err(FaultError::NoRoom(va.0)),
                    // In small pages then.
                    Room::None => self.split_for_device(vpn),
                },
            }
            tries += 1;
            if tries > AT_ONCE
                && started.get_or_insert_with(Waited::new).so_far() > how.patience().unwrap_or(PATIENCE)
            {
                return Err(FaultError::NoHeadway(va.0));
            }
        }
    }

    /// Whether a device that can access the host's memory is full of memory in place, which leaves it for no fault.
    fn is_full_for_good(&self, mmu: MmuId) -> bool {
        let full = |tier: &Tier<K::Words>| {
            tier.pages_in_place() > 0 && tier.mmu.as_ref().is_some_and(|state| state.info.remote)
        };
        self.with_tier(mmu, full) == Some(true)
    }

    /// The block of `vpn` goes on in small pages: there is no room for it in one piece.
    pub(super) fn split_for_device(&self, vpn: Vpn) {
        let work = self.contexts.take();
        if let Ok(entry) = self.table.lock(vpn)
            && entry.is_whole()
            // What a launch relies on stays as it is.
            && !matches!(entry.state(), State::Mapped { held: true, .. })
        {
            let entry = self.recall(entry);
            self.split_whole(entry, &work.counters);
        }
    }

    fn attempt_for_device(
        &self,
        tier: &Tier<K::Words>,
        vpn: Vpn,
        access: DeviceAccess,
        (how, most): (Bring, Pages),
        (stays, waited, peace): (&mut bool, &mut bool, bool),
        work: &mut Working<'_>,
    ) -> Next {
        let va = self.geometry.va(vpn);
        let Some(mmu) = &tier.mmu else { return Next::Fail(FaultError::Cut) };
        if !mmu.info.addresses.contains(&va.0) {
            return Next::Fail(FaultError::OutOfReach(va.0));
        }
        let Some(region) = self.region(vpn) else {
            // It may have grown in place, or its news be on the way: the CPU's fault finds out.
            if std::mem::replace(waited, true) {
                return Next::Fail(FaultError::NotManaged(va.0));
            }
            return Next::Home(Access::Read);
        };
        if region.attributes.has(Attributes::ARRIVING) {
            return Next::Pause;
        }
        if region.attributes.has_any(Attributes::LEAVING.with(Attributes::KEPT)) {
            return Next::Fail(FaultError::NotManaged(va.0));
        }
        if region.attributes.has(Attributes::IN_PLACE) && how.bounds().is_some() {
            return Next::Fail(FaultError::InPlace(va.0));
        }
        if region.attributes.has(Attributes::IN_PLACE) {
            return Next::Stays;
        }
        let Some((_, whole)) = self.table.look(vpn) else { return Next::Again };
        let first = if whole { vpn.block_start() } else { vpn };
        let choice = self.choose(region, first, mmu, access);
        if whole && (how.is_part_of_block(vpn) || choice.war && matches!(how, Bring::AsChosen)) {
            // Perhaps it is different pages of it that they want.
            return Next::Split;
        }
        let mut wish = match how {
            Bring::Exactly(..) => Wish::Migrate,
            Bring::Here if access.writes() => Wish::Migrate,
            Bring::Here | Bring::AsChosen => choice.wish,
        };
        if let Some(wait) = choice.wait.filter(|_| !peace) {
            // It goes to and fro, and cannot be accessed where it is: it stays there for a while at least.
            return Next::Truce(wait);
        }
        if *stays && mmu.info.remote {
            wish = Wish::Remote;
        }
        let wanted = Wanted { vpn, access, region, tier, mmu, wish, how, most };
        self.step_for_device(wanted, stays, work)
    }
}
