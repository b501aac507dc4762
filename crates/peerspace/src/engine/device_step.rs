//! What is done about a device's fault with the page's entry locked: one step after the other, as the core says
//! ([`coherence`](peerspace_core::coherence)), until the device has the page or something is needed that must not be waited for
//! under that lock ([`Next`]).

use super::context::Working;
use super::device_fault::Next;
use super::mmus::MmuState;
use super::place::Bring;
use super::tier::{Closed, Tier};
use super::to_device::Stay;
use super::{Engine, Entry};
use crate::device::mmu::DeviceAccess;
use crate::device::port::FaultError;
use peerspace_core::addr::{Access, Order, PageRange, Pages, Va, Vpn};
use peerspace_core::coherence::{Grant, Request, Step, Wish, on_device_fault};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::plan::CLUSTER;
use peerspace_core::regions::{Attributes, RegionInfo};
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::{Kernel, Protect, Trouble, Wake};

/// Faults in a row of one device on one page that it has already, before that is given up.
pub(super) const FRUITLESS: u64 = 10_000;
/// Regions in which nothing is made huge.
const SMALL: Attributes = Attributes::NO_HUGE.with(Attributes::ON_REQUEST);

/// What a fault is about.
pub(super) struct Wanted<'a, W> {
    pub(super) vpn: Vpn,
    pub(super) access: DeviceAccess,
    pub(super) region: RegionInfo,
    pub(super) tier: &'a Tier<W>,
    pub(super) mmu: &'a MmuState,
    pub(super) wish: Wish,
    pub(super) how: Bring,
    pub(super) most: Pages,
}

impl<K: Kernel> Engine<K> {
    /// Locks the entry, and does what can be done with it locked.
    pub(super) fn step_for_device(
        &self,
        wanted: Wanted<'_, K::Words>,
        stays: &mut bool,
        work: &mut Working<'_>,
    ) -> Next {
        let Wanted { vpn, access, region, tier, mmu, wish, how, most } = wanted;
        let va = self.geometry.va(vpn);
        let Ok(mut entry) = self.table.lock(vpn) else { return Next::Again };
        match tier.closed() {
            None => {}
            Some(Closed::Forking) => return Next::Forking,
            // Who takes it away looks for what it maps only once.
            Some(Closed::Leaving) => return Next::Fail(FaultError::Cut),
        }
        if self.region(vpn) != Some(region) {
            return Next::Again;
        }
        if entry.is_whole() && how.is_part_of_block(vpn) {
            // It has become one huge folio since somebody looked, of which a part alone is to go.
            return Next::Split;
        }
        if self.announcements.concern(entry.range()) {
            let page = PageRange::new(vpn, Pages(1));
            let apart = entry.is_whole() && !self.announcements.concern(page);
            return if apart { Next::Split } else { Next::Announced(page) };
        }
        let small = region.attributes.without(SMALL) != region.attributes || !self.block_inside(region, vpn);
        if entry.is_whole() && small && matches!(entry.state(), State::Empty | State::Device { .. }) {
            entry.split_evenly();
            return Next::Again;
        }
        let adopted = region.attributes.has(Attributes::ADOPTED);
        if access.writes() && region.attributes.has(Attributes::DEVICES_READ) {
            return Next::Fail(FaultError::ReadOnly(va.0));
        }
        let mut writable = true;
        // What is in place was the program's to write, and nobody has announced anything else.
        if adopted && !matches!(entry.state(), State::Coherent { .. }) {
            let range = self.addresses(entry.range());
            // No message tells that the program has made it read-only.
            match self.kernel.allowed_at(va) {
                Ok(Some((m, _))) if entry.is_whole() && !(m.start <= range.start && range.end <= m.end) => {
                    // One part of the block may be written, another not.
                    let entry = self.recall(entry);
                    self.split_whole(entry, &work.counters);
                    return Next::Again;
                }
                Ok(Some((_, allowed))) => writable = allowed == Access::Write,
                // It has been unmapped, and the news is on the way.
                Ok(None) if self.gate.enter(work.context()).is_none() || self.kernel.is_changing() => {
                    return Next::Changing;
                }
                Ok(None) if self.region(vpn) != Some(region) => return Next::Again,
                Ok(None) => return Next::Fail(FaultError::Protected(va.0)),
                Err(_) => return Next::Pause,
            }
            if access.writes() && !writable {
                return Next::Fail(FaultError::ReadOnly(va.0));
            }
        }
        // The kernel moves nothing out of memory that is read-only.
        let wish = match wish {
            // Unless nobody changes its permissions unheard; what is not mapped moves in any case.
            Wish::Migrate if !writable && how.bounds().is_some() => {
                let mapped = match entry.state() {
                    State::Host { .. } | State::Shared { .. } => true,
                    State::Empty => self.is_native(&entry, vpn),
                    _ => false,
                };
                if mapped && !self.may_unprotect(entry.range().intersect(region.range)) {
                    return Next::Fail(FaultError::ReadOnly(va.0));
                }
                Wish::Migrate
            }
            Wish::Migrate if !writable && !self.kernel.capabilities().write_protect && mmu.info.remote => {
                Wish::Remote
            }
            Wish::Migrate if !writable => Wish::Replicate,
            wish => wish,
        };
        let going = || self.going.may_hold(entry.range());
        // Also where the space has populated everything itself: what the program gives up (MADV_FREE) may be there yet.
        if entry.state() == State::Empty && self.is_native(&entry, vpn) {
            let range = entry.range().intersect(region.range);
            if going() {
                // What was discarded a moment ago is not to be taken in hand before it is gone.
                return Next::Pause;
            }
            drop(entry);
            return self.take_native_for(vpn, (how.within(range), how), wish, work);
        }
        // What is not there because it has just been unmapped is not zeros.
        let changing = || self.gate.enter(work.context()).is_none() || self.kernel.is_changing();
        if adopted && entry.state() == State::Empty && changing() {
            return Next::Changing;
        }
        let wish = match entry.state() {
            // What was sent there stays there, where that is no hindrance.
            State::Coherent { .. } if mmu.info.remote && matches!(how, Bring::AsChosen) => Wish::Remote,
            _ => wish,
        };
        // Nor is what may go in a moment to be read where it is: whoever reads it then would wait for it.
        let wish = match wish {
            Wish::Migrate => wish,
            _ if !going() => wish,
            _ if writable => Wish::Migrate,
            _ => return Next::Pause,
        };
        let request = Request {
            mmu: mmu.id,
            // Only what is written moves in any case.
            write: access == DeviceAccess::Write || how.bounds().is_some(),
            atomic: access == DeviceAccess::Atomic,
            wish,
            zero_page: mmu.info.zero_page,
            protects: self.kernel.capabilities().write_protect,
        };
        if self.is_left_to_the_parent(&entry, vpn) {
            return Next::Home(Access::Read);
        }
        self.doubt_protection(&mut entry);
        loop {
            match on_device_fault(entry.state(), request, |pfn| tier.range.contains(pfn.pfn())) {
                Step::Enter(state, grant) => {
                    if matches!(grant, Grant::Frame { writable: true })
                        && let Err(next) = self.lift_protection(&entry, work)
                    {
                        return next;
                    }
                    return self.enter_for_device(entry, state, (grant, writable), tier, mmu, vpn);
                }
                Step::Recall => entry = self.recall(entry),
                Step::Protect | Step::Replicate(_) if self.is_pinned_entry(&entry) => {
                    // The kernel may write there without asking anybody.
                    *stays = true;
                    return if mmu.info.remote && !request.atomic { Next::Again } else { Next::Pinned };
                }
                Step::Protect => {
                    let State::Host { pfn, dirt, .. } = entry.state() else { unreachable!("it is mapped") };
                    let Some(_section) = self.gate.enter(work.context()) else { return Next::Changing };
                    if self.kernel.protect(self.addresses(entry.range()), Protect::Yes, Wake::No).is_err() {
                        return Next::Pause;
                    }
                    entry.set(State::Host { pfn, writable: false, dirt });
                }
                Step::Unmap => {
                    if self.is_pinned_entry(&entry) {
                        // What is pinned stays on the host (rule Z8); the device can use it there.
                        *stays = true;
                        return if mmu.info.remote && !request.atomic { Next::Again } else { Next::Pinned };
                    }
                    let near =
                        PageRange::new(vpn, most).intersect(PageRange::block(vpn.block())).intersect(region.range);
                    let rest = if entry.is_whole() { entry.range() } else { how.within(near) };
                    drop(entry);
                    let went = self.walk(rest, work, |rest, work| self.set_some_aside(rest, work));
                    if went > 0 {
                        return Next::Again;
                    }
                    // Somebody else may have been faster, and have it on a device by now: to bring it home would be to move it twice.
                    let mapped = |state| matches!(state, State::Host { .. } | State::Shared { .. });
                    return match self.table.lock(vpn) {
                        Ok(entry) if mapped(entry.state()) => self.pause_or_home(va),
                        _ => Next::Again,
                    };
                }
                Step::Home(access) => return Next::Home(access),
                Step::Move => {
                    let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
                    match self.move_here(&mut entry, tier, None, work) {
                        Ok(()) => {
                            self.places.moved(entry.vpn(), Some(mmu.id));
                            mmu.counters.moved.fetch_add(order.pages().0, Relaxed);
                        }
                        Err(stay) => return self.stayed(stay, entry, (order, va), work),
                    }
                }
                Step::Replicate(sharers) => {
                    let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
                    match self.copy_here(&mut entry, sharers, tier, work) {
                        Ok(grant) => {
                            mmu.counters.replicated.fetch_add(order.pages().0, Relaxed);
                            let state = entry.state();
                            return self.enter_for_device(entry, state, (grant, writable), tier, mmu, vpn);
                        }
                        Err(stay) => return self.stayed(stay, entry, (order, va), work),
                    }
                }
                Step::Leave => {
                    let State::Coherent { pfn } = entry.state() else { unreachable!("it is in place") };
                    return match self.is_persistent(vpn) {
                        true => Next::Fail(FaultError::InPlace(va.0)),
                        false => Next::Leave(pfn),
                    };
                }
                Step::Wait => return Next::Held,
                Step::Lost(pfn) => {
                    let name = self.tiers.find(pfn).map_or("a device that is gone".into(), |t| t.info.name.clone());
                    return Next::Fail(FaultError::Lost(va.0, format!("device {name} could not give it back")));
                }
            }
        }
    }

    /// What comes next where a page that the table says is mapped cannot be had: it may have been discarded before the news
    /// was acted on, and come back, and gone. A fault of the CPU finds that out.
    fn pause_or_home(&self, va: Va) -> Next {
        match self.kernel.is_present(va) {
            Ok(false) => Next::Home(Access::Read),
            _ => Next::Pause,
        }
    }

    /// Whether the page at `vpn`, which the table says is mapped, is so in the process alone that this one was forked from (rule G12):
    /// where nobody has ever written, the kernel does not copy what it has mapped, which is zeros. A fault of the CPU finds them
    /// again; a device that read there would wait for that with a [section](super::gate) in hand.
    fn is_left_to_the_parent(&self, entry: &Entry<'_, K>, vpn: Vpn) -> bool {
        let State::Host { pfn, writable, .. } = entry.state() else { return false };
        let frame = self.frame_of(pfn, entry.is_whole());
        if self.memmap.epoch(frame) == self.life() {
            return false;
        }
        let there = self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(true);
        if there && writable {
            self.memmap.place(frame, entry.vpn(), self.life());
        }
        !there
    }

    /// Where making a page writable failed half-way, the table knows that it may have been written and the kernel still protects
    /// it. The CPU's next write finds that out; a device's would fail, or wait, for ever.
    fn lift_protection(&self, entry: &Entry<'_, K>, work: &Working<'_>) -> Result<(), Next> {
        // What is in place of a device is never protected.
        if !self.kernel.capabilities().write_protect || matches!(entry.state(), State::Coherent { .. }) {
            return Ok(());
        }
        let Some(_section) = self.gate.enter(work.context()) else { return Err(Next::Changing) };
        match self.kernel.protect(self.addresses(entry.range()), Protect::No, Wake::Yes) {
            Ok(()) => Ok(()),
            Err(Trouble::Changing) => Err(Next::Changing),
            // It has moved away, and the news is on the way; or a page of it is [let pass](super::watch) just now.
            Err(_) => Err(Next::Pause),
        }
    }

    /// Protection that was set up before a fork is gone in the child (rule G12): the CPU may write, and so may have written.
    fn doubt_protection(&self, entry: &mut Entry<'_, K>) {
        let State::Host { pfn, writable: false, dirt } = entry.state() else { return };
        let frame = self.frame_of(pfn, entry.is_whole());
        if self.memmap.epoch(frame) != self.life() {
            let dirt = if dirt == Dirt::Clean { Dirt::Unverified } else { dirt };
            entry.set(State::Host { pfn, writable: true, dirt });
            self.memmap.place(frame, entry.vpn(), self.life());
        }
    }

    /// Commits `state`, and has the device enter the translation, `writable` if the program itself may write there.
    fn enter_for_device(
        &self,
        mut entry: Entry<'_, K>,
        state: State,
        (grant, writable): (Grant, bool),
        tier: &Tier<K::Words>,
        mmu: &MmuState,
        vpn: Vpn,
    ) -> Next {
        let va = self.geometry.va(vpn);
        let already = entry.state() == state;
        entry.set(state);
        let mut mapping = self.target_of(tier, &entry, grant);
        mapping.writable &= writable;
        if mapping.to == crate::device::mmu::Target::Host {
            mmu.counters.remote.fetch_add(1, Relaxed);
            if already && !self.gate.is_idle() {
                // It has the translation, and its accesses are refused as long as a change is acted on.
                return Next::Changing;
            }
            let in_place = matches!(state, State::Coherent { .. });
            if already
                && !in_place
                && let Next::Home(access) = self.pause_or_home(va)
            {
                return Next::Home(access);
            }
        }
        match tier.enter(&[mapping]) {
            Ok(true) => {}
            failed => {
                // The data is where it was; nobody has it mapped but who had before, if that can be said.
                drop(self.recall(entry));
                return failed.map_or_else(|e| Next::Fail(FaultError::Device(va.0, e)), |_| Next::Changing);
            }
        }
        let got = Pages(entry.range().end - vpn);
        drop(entry);
        if mmu.note_fault(vpn, already, FRUITLESS) {
            return Next::Fail(FaultError::NoHeadway(va.0));
        }
        Next::Done(got)
    }

    /// The data did not come to the device.
    fn stayed(&self, stay: Stay, entry: Entry<'_, K>, (order, va): (Order, Va), work: &mut Working<'_>) -> Next {
        match stay {
            Stay::NoRoom => Next::Room(order),
            Stay::Refused => {
                let entry = self.recall(entry);
                self.split_whole(entry, &work.counters);
                Next::Again
            }
            Stay::Changing => Next::Changing,
            Stay::Unreadable(_) if order == Order::BLOCK => {
                // In pages: exactly those are lost that cannot be read (rule Z9).
                self.split_whole(entry, &work.counters);
                Next::Again
            }
            Stay::Unreadable(e) => {
                self.lose(entry, e, work.context());
                Next::Again
            }
            Stay::Failed(e) => Next::Fail(FaultError::Device(va.0, e)),
        }
    }

    /// Whether somebody relies on the folio of `entry`, which is mapped, staying where it is.
    fn is_pinned_entry(&self, entry: &Entry<'_, K>) -> bool {
        let (State::Host { pfn, .. } | State::Shared { pfn, .. }) = entry.state() else { return false };
        let frame = self.frame_of(pfn, entry.is_whole());
        self.memmap.pins(self.memmap.head(frame)) > 0
    }

    /// Whether the kernel has populated a page of adopted memory of which the table knows nothing.
    fn is_native(&self, entry: &Entry<'_, K>, vpn: Vpn) -> bool {
        match entry.is_whole() {
            true => self.has_native(entry.range()),
            false => self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(true),
        }
    }

    /// Takes native pages into the table: to standby if they are to move.
    fn take_native_for(
        &self,
        vpn: Vpn,
        (range, how): (PageRange, Bring),
        wish: Wish,
        work: &mut Working<'_>,
    ) -> Next {
        let known = || !matches!(self.table.look(vpn), Some((e, _)) if e.state() == State::Empty);
        if wish == Wish::Migrate {
            let near = PageRange::new(vpn, CLUSTER).intersect(PageRange::block(vpn.block()));
            let rest = if range.pages() > CLUSTER { range } else { how.within(near) };
            if self.take_native_from(rest, work).0 > 0 && known() {
                return Next::Again;
            }
        }
        self.track_here(vpn);
        if known() || self.part_from_natives(vpn) { Next::Again } else { Next::Pause }
    }

    /// Takes a block of which the table knows nothing apart if the kernel has not populated this page of it, only others. Whether
    /// that was so: the page is by itself then.
    fn part_from_natives(&self, vpn: Vpn) -> bool {
        let Ok(entry) = self.table.lock(vpn) else { return false };
        let populated = || self.kernel.is_present(self.geometry.va(vpn)).unwrap_or(true);
        let apart = entry.is_whole() && entry.state() == State::Empty && !populated();
        if apart {
            entry.split_evenly();
        }
        apart
    }
}
