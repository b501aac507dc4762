//! The MMUs of a space's devices: what each maps is taken away here, and nowhere else (rules G2, G5).
//!
//! *Recall* takes all devices' translations of an entry away while it is locked, and returns when none of them makes an access by
//! them any more. It cannot fail: a device that does not let go before its deadline is quarantined. Then its accesses to the
//! host's memory, which all go through its port, are refused; what it alone holds is lost.
//!
//! # Accesses of devices to the host's memory
//!
//! They are made by [`Engine::remote_access`], with a context, in a section of the gate (so that no change of mappings is under
//! way) and only where the table says, unlocked, that the device may. Whoever recalls has set the entry's lock bit before, and
//! then waits for the accesses that began before he looked ([`Engine::drain_remote`]):
//!
//! ```text
//!  access:  remote += 1 (odd); fence; locked? then: not shared? -> leave         recall:  lock; fence; for each context:
//!           copy; remote += 1 (even)                                                      odd? -> wait until it changes
//! ```
//!
//! Either the access sees the lock bit, or the recall sees the access.
//!
//! Devices could be handed pointers; but a pointer cannot be taken back from a device that has stopped answering. Accesses through
//! the port are our own code, so the wait for them ends, whatever the device does; and they can be counted, so that a page that is
//! used much moves ([`place`](super::place)).

use super::announce::Closing;
use super::context::Context;
use super::tier::{Tier, unwinding};
use super::{Engine, Entry};
use crate::device::mmu::{Mapping, Mmu, MmuDescriptor, Mode, Progress, Target};
use crate::device::port::FaultError;
use crate::waited::Waited;
use peerspace_core::addr::{Access, BLOCK_PAGES, DevicePfn, Order, PageRange, Va, VaRange, Vpn};
use peerspace_core::coherence;
use peerspace_core::entry::State;
use peerspace_core::plan::OnDevices;
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::{MmuId, Sharers};
use peerspace_core::stream::Streams;
use peerspace_core::sync::{AtomicU64, Ordering, Ordering::Relaxed, fence};
use peerspace_core::words::Words;
use peerspace_os::Kernel;

/// Pages with which a device may be in trouble at once, and still be found out.
const SLOTS: usize = 16;
const COUNT_BITS: u32 = 20;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

/// What the space knows of a device's MMU.
pub(crate) struct MmuState {
    pub(crate) id: MmuId,
    pub(crate) info: MmuDescriptor,
    /// Streams of its faults.
    pub(crate) streams: Streams,
    /// Where the search for cold pages goes on.
    pub(crate) hand: AtomicU64,
    /// Faults on pages that it had already, since it was given the last one that it had not: the page (plus one, by its low
    /// bits) and how often. Each page has its slot, so that threads of the device that are in trouble with different pages
    /// do not hide each other's.
    fruitless: [AtomicU64; SLOTS],
    /// Pages in place that it was given last, each in its slot: the page as above, and how often something had been taken away
    /// from it until then.
    in_place: [AtomicU64; SLOTS],
    pub(crate) counters: MmuCounters,
    pub(crate) closing: Closing,
}

/// What a device's faults came to.
#[derive(Debug, Default)]
pub(crate) struct MmuCounters {
    pub(crate) faults: AtomicU64,
    /// Pages that moved to the device.
    pub(crate) moved: AtomicU64,
    /// Pages of which it got copies.
    pub(crate) replicated: AtomicU64,
    /// Faults that mapped memory of the host in place.
    pub(crate) remote: AtomicU64,
    /// Translations taken away.
    pub(crate) recalls: AtomicU64,
    /// Pages evicted from the device.
    pub(crate) evicted: AtomicU64,
}

impl MmuState {
    pub(crate) fn new(id: MmuId, info: MmuDescriptor) -> MmuState {
        MmuState {
            id,
            info,
            streams: Streams::new(),
            hand: AtomicU64::new(0),
            fruitless: [const { AtomicU64::new(0) }; SLOTS],
            in_place: [const { AtomicU64::new(0) }; SLOTS],
            counters: MmuCounters::default(),
            closing: Closing::new(),
        }
    }

    /// Forgets which pages it had already when it faulted: it has none of them any more.
    pub(crate) fn forget_faults(&self) {
        self.fruitless.iter().for_each(|slot| slot.store(0, Relaxed));
    }

    /// Notes a fault at `vpn`; `already`: it had what it asks for. True if there were more than `most` of the kind in a row;
    /// they are counted anew then.
    pub(crate) fn note_fault(&self, vpn: Vpn, already: bool, most: u64) -> bool {
        if !already {
            self.fruitless.iter().filter(|slot| slot.load(Relaxed) != 0).for_each(|slot| slot.store(0, Relaxed));
            return false;
        }
        let slot = &self.fruitless[Self::slot(vpn)];
        let (page, seen) = ((vpn.0 + 1) << COUNT_BITS, slot.load(Relaxed));
        let count = if seen >> COUNT_BITS == page >> COUNT_BITS { (seen & COUNT) + 1 } else { 1 };
        // Two threads at once may count as one.
        slot.store(if count > most { 0 } else { page | count.min(COUNT) }, Relaxed);
        count > most
    }

    /// The same for a page in place, of which nobody notes who has it: it has it already if it was given nothing else in that
    /// page's slot since, and nothing has been taken away from it.
    pub(crate) fn note_in_place(&self, vpn: Vpn, most: u64) -> bool {
        let now = (vpn.0 + 1) << COUNT_BITS | self.counters.recalls.load(Relaxed) & COUNT;
        let already = self.in_place[Self::slot(vpn)].swap(now, Relaxed) == now;
        self.note_fault(vpn, already, most)
    }

    fn slot(vpn: Vpn) -> usize {
        (vpn.0 ^ vpn.0 >> 6) as usize % SLOTS
    }
}

impl<W: Words> Tier<W> {
    /// What its faults came to, if it runs code.
    pub(crate) fn mmu_statistics(&self) -> Option<crate::report::MmuStatistics> {
        let counters = &self.mmu.as_ref()?.counters;
        let n = |counter: &AtomicU64| counter.load(Relaxed);
        Some(crate::report::MmuStatistics {
            faults: n(&counters.faults),
            moved: n(&counters.moved),
            replicated: n(&counters.replicated),
            remote: n(&counters.remote),
            recalls: n(&counters.recalls),
            evicted: n(&counters.evicted),
        })
    }

    /// The number of its MMU, if it runs code.
    pub(crate) fn mmu_id(&self) -> Option<MmuId> {
        self.mmu.as_ref().map(|mmu| mmu.id)
    }

    /// Its MMU, if it runs code and has not failed.
    pub(crate) fn live_mmu(&self) -> Option<(&MmuState, &dyn Mmu)> {
        let state = self.mmu.as_ref().filter(|_| !self.has_failed())?;
        Some((state, unwinding(|| self.device().mmu()).flatten()?))
    }

    /// Gives the device its port.
    pub(crate) fn give_port(&self, port: crate::device::port::Port) {
        if let Some((_, mmu)) = self.live_mmu()
            && unwinding(|| mmu.attached(port)).is_none()
        {
            self.quarantine("it panicked when it was given its port");
        }
    }

    /// Enters translations. False where that has to wait, because the meaning of addresses is changing.
    pub(crate) fn enter(&self, batch: &[Mapping]) -> Result<bool, crate::device::DeviceError> {
        use crate::device::DeviceError;
        let (state, mmu) = self.live_mmu().ok_or(DeviceError::Gone)?;
        let Some(_entering) = state.closing.enter() else { return Ok(false) };
        let done = unwinding(|| mmu.map(batch)).unwrap_or(Err(DeviceError::Panicked));
        if done == Err(DeviceError::Gone) {
            self.fail();
        }
        done.map(|()| true)
    }

    /// Takes translations away. When this returns the device uses them no more, or is cut off.
    pub(crate) fn unmap(&self, range: VaRange) {
        if self.mmu.is_none() || self.has_failed() {
            return;
        }
        let Some((state, mmu)) = self.live_mmu() else {
            return self.quarantine(&format!("it did not let go of {range}: it has no MMU any more"));
        };
        state.counters.recalls.fetch_add(1, Relaxed);
        let begun = unwinding(|| mmu.unmap(range.start.0..range.end.0));
        if let Err(why) = self.await_progress(begun, mmu, state.info.deadline) {
            self.quarantine(&format!("it did not let go of {range}: {why}"));
        }
    }

    /// Waits until what the device was asked for is done; `begun` is its answer. The error says why it never will be.
    pub(crate) fn await_progress(
        &self,
        begun: Option<Result<Progress, crate::device::DeviceError>>,
        mmu: &dyn Mmu,
        deadline: std::time::Duration,
    ) -> Result<(), String> {
        match begun {
            Some(Ok(Progress::Done)) => Ok(()),
            Some(Ok(Progress::Pending(pending))) => self.await_fence(mmu, pending, deadline),
            Some(Err(e)) => Err(e.to_string()),
            None => Err("its own code panicked".into()),
        }
    }

    fn await_fence(&self, mmu: &dyn Mmu, pending: u64, deadline: std::time::Duration) -> Result<(), String> {
        let mut waited = Waited::new();
        loop {
            match unwinding(|| mmu.is_done(pending)) {
                Some(Ok(true)) => return Ok(()),
                Some(Ok(false)) if waited.so_far() < deadline => crate::sync::yield_now(),
                Some(Ok(false)) => return Err(format!("it was given {deadline:?}")),
                Some(Err(e)) => return Err(e.to_string()),
                None => return Err("its own code panicked".into()),
            }
        }
    }

    /// The device has not kept its promises: it is cut off (rule G5), and what it alone holds is lost.
    pub(crate) fn quarantine(&self, why: &str) {
        crate::tell::warning(format_args!("device {} is quarantined: {why}", self.info.name));
        self.fail();
    }

    /// Whether any page of `range` was used by the device since it was last asked.
    pub(crate) fn take_accessed(&self, range: VaRange) -> bool {
        let Some((_, mmu)) = self.live_mmu() else { return false };
        unwinding(|| mmu.take_accessed(range.start.0..range.end.0)).unwrap_or(false)
    }

    /// Whether the device can do with a region at `range` (rule G13).
    pub(crate) fn reserve_addresses(&self, range: VaRange) -> bool {
        let Some((state, mmu)) = self.live_mmu() else { return true };
        let reach = &state.info.addresses;
        reach.start <= range.start.0
            && range.end.0 <= reach.end
            && unwinding(|| mmu.reserve(range.start.0..range.end.0)).unwrap_or(false)
    }

    /// Undoes [`reserve_addresses`](Tier::reserve_addresses).
    pub(crate) fn release_addresses(&self, range: VaRange) {
        if let Some((_, mmu)) = self.live_mmu() {
            let _ = unwinding(|| mmu.release(range.start.0..range.end.0));
        }
    }
}

impl<K: Kernel> Engine<K> {
    /// Takes all translations of devices for the pages of `entry` away, and what copies of them there are.
    pub(crate) fn recall<'t>(&'t self, mut entry: Entry<'t, K>) -> Entry<'t, K> {
        let state = entry.state();
        let (pages, range) = (entry.range(), self.addresses(entry.range()));
        let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
        match state {
            State::Shared { sharers, .. } | State::Zero { sharers } => {
                self.each_sharer(sharers, |tier| tier.unmap(range));
                if let State::Shared { .. } = state {
                    self.drain_remote();
                    self.each_sharer(sharers, |tier| tier.drop_replica(pages.start, order));
                }
            }
            State::Mapped { pfn, .. } => self.tiers.of(pfn).unmap(range),
            State::Coherent { .. } => {
                self.vacate(pages);
                return entry;
            }
            _ => return entry,
        }
        let now = coherence::recalled(state, || self.stamp()).expect("devices map it");
        entry.set(now);
        entry
    }

    /// Has all devices let go of `pages`, whose entries are locked and whose memory is in place: nobody keeps account of who maps it.
    /// No access to it is under way when this returns. It goes on to be in place.
    pub(super) fn vacate(&self, pages: PageRange) {
        let mut any = false;
        for tier in self.tiers.iter() {
            if let Some(state) = &tier.mmu {
                any = true;
                tier.unmap(self.addresses(pages));
                // It may ask for the same again and again, because it is taken away again and again.
                state.forget_faults();
            }
        }
        if any {
            self.drain_remote();
        }
    }

    /// How the CPU gets what is in the memory of the device of `pfn`: to write, where the page moves from one to the other and
    /// leaves no copy behind.
    pub(crate) fn access_from(&self, pfn: DevicePfn, access: Access) -> Access {
        let tier = self.tiers.of(pfn);
        let moves = tier.mmu.as_ref().is_some_and(|mmu| mmu.info.mode != Mode::Replicate) && !tier.info.takes_evicted;
        if moves { Access::Write } else { access }
    }

    /// [Recalls](Engine::recall) what the CPU wants.
    pub(crate) fn recall_for_cpu<'t>(&'t self, on: OnDevices, entry: Entry<'t, K>) -> Entry<'t, K> {
        if let OnDevices::Alone(_) = on {
            self.places.moved(entry.vpn(), None);
        }
        self.recall(entry)
    }

    fn each_sharer(&self, sharers: Sharers, mut each: impl FnMut(&Tier<K::Words>)) {
        for mmu in sharers.iter() {
            if let Some(tier) = self.tiers.by_mmu(mmu) {
                each(&tier);
            }
        }
    }

    /// [Recalls](Engine::recall) whatever devices map of `pages`.
    pub(crate) fn recall_pages(&self, pages: PageRange) {
        self.recall_where(pages, State::may_be_on_mmus);
    }

    /// [Recalls](Engine::recall) what of `pages` is in such a state, which only that is that devices map. What is locked is waited for.
    pub(crate) fn recall_where(&self, pages: PageRange, such: impl Fn(State) -> bool) {
        let mut at = pages.start;
        while at < pages.end {
            // First whether it is locked: whoever locks it after that finds what the caller has changed before.
            let locked = self.table.is_locked(at);
            let Some((seen, whole)) = self.table.look(at) else {
                at = Vpn(at.block_start().0 + BLOCK_PAGES);
                continue;
            };
            if (such(seen.state()) || locked)
                && let Ok(entry) = self.table.lock(at)
            {
                // Look again (H12).
                let next = entry.range().end;
                if such(entry.state()) {
                    drop(self.recall(entry));
                }
                at = next;
                continue;
            }
            at = if whole { Vpn(at.block_start().0 + BLOCK_PAGES) } else { at + 1 };
        }
    }

    /// Recalls everything, of all regions: before a fork.
    pub(crate) fn recall_all(&self) {
        if self.tiers.iter().any(|tier| tier.mmu.is_some()) {
            for region in self.regions.iter() {
                match region.attributes.has(Attributes::IN_PLACE) {
                    true => self.withdraw(region.range),
                    false => self.recall_pages(region.range),
                }
            }
        }
    }

    /// Waits until the accesses of devices to the host's memory are over that were under way. The caller has locked the entry
    /// that it is about.
    pub(super) fn drain_remote(&self) {
        // Pairs with the fence in remote_access.
        fence(Ordering::SeqCst);
        for slot in self.contexts.all() {
            let remote = &slot.as_ref().remote;
            let seen = remote.load(Ordering::Acquire);
            while seen % 2 == 1 && remote.load(Ordering::Acquire) == seen {
                crate::sync::yield_now();
            }
        }
    }

    /// An access of the device with `mmu` to memory of the host that is mapped for it, of `len` bytes at `va`, all in one page.
    /// `access` makes it; false if it could not.
    pub(crate) fn remote_access(
        &self,
        mmu: MmuId,
        va: Va,
        len: usize,
        write: bool,
        access: impl FnOnce() -> bool,
    ) -> Result<(), FaultError> {
        let vpn = self.page_of(va, len)?;
        // Nothing is waited for here, but in the device's fault: whoever acts on a change, or forks, may be waiting for the
        // device to unmap, and the device for its accesses to end.
        let Some(work) = self.contexts.take_if_any() else { return Err(FaultError::NotMapped(va.0)) };
        let context = work.context();
        let Some(_section) = self.gate.enter(context) else { return Err(FaultError::NotMapped(va.0)) };
        let _remote = Remote::begin(context);
        let tier = self.tiers.by_mmu(mmu).filter(|tier| !tier.has_failed()).ok_or(FaultError::Cut)?;
        // The lock first. Whoever takes it from here on sees this access; had the state been read before, somebody could take
        // the page away, and be done, between the two.
        let reads = write && self.is_for_reading(vpn);
        let barred = self.table.is_locked(vpn) || reads;
        let allowed = match self.table.look(vpn).map(|(entry, _)| entry.state()) {
            Some(State::Shared { sharers, writable, .. }) => !barred && sharers.has(mmu) && (writable || !write),
            // Whoever asks may have it, as long as it is there.
            Some(State::Coherent { .. }) => !barred,
            // What takes it away from devices takes the region away first; no lock says so.
            Some(State::Empty) => !reads && self.may_access_in_place(&tier, vpn),
            _ => false,
        };
        // Even so, memory that the program owns may just have been unmapped.
        let range = VaRange { start: va, end: Va(va.0 + len as u64) };
        if allowed && self.access_mapped(context, (range, write), access) {
            Ok(())
        } else {
            Err(FaultError::NotMapped(va.0))
        }
    }

    /// The page of an access of a device to `len` bytes at `va`, which are all to be in one.
    pub(crate) fn page_of(&self, va: Va, len: usize) -> Result<Vpn, FaultError> {
        let vpn = self.geometry.vpn(va);
        let end = va.0.checked_add(len as u64).filter(|_| len > 0);
        let is_in_one = end.is_some_and(|end| self.geometry.vpn(Va(end - 1)) == vpn);
        if is_in_one { Ok(vpn) } else { Err(FaultError::NotMapped(va.0)) }
    }

    fn is_for_reading(&self, vpn: Vpn) -> bool {
        self.region(vpn).is_some_and(|r| r.attributes.has(Attributes::DEVICES_READ))
    }

    /// Where what `grant` gives is, for the device of `tier`.
    pub(crate) fn target_of(&self, tier: &Tier<K::Words>, entry: &Entry<'_, K>, grant: coherence::Grant) -> Mapping {
        use coherence::Grant;
        let range = self.addresses(entry.range());
        let (to, writable) = match (grant, entry.state()) {
            (Grant::Own, State::Mapped { pfn, .. }) => (Target::Own(pfn - tier.range.base), true),
            (Grant::Copy, State::Shared { pfn, dirt, .. }) => {
                let own = tier.replica(entry.vpn()).or_else(|| self.clean_backing(tier, entry, pfn, dirt));
                (own.map_or(Target::Host, Target::Own), false)
            }
            (Grant::Frame { writable }, State::Shared { .. }) => (Target::Host, writable),
            (Grant::Own, State::Coherent { pfn }) => (Target::Own(pfn - tier.range.base), true),
            (Grant::Frame { writable }, State::Coherent { .. }) => (Target::Host, writable),
            (Grant::Zeros, State::Zero { .. }) => (Target::Zero, false),
            (grant, state) => unreachable!("{grant:?} in {state:?}"),
        };
        let readable = self.region(entry.vpn()).is_some_and(|r| r.attributes.has(Attributes::DEVICES_READ));
        Mapping { va: range.start.0, bytes: range.len(), to, writable: writable && !readable }
    }

    /// The page of `tier` that holds the same as the frame of `entry` for certain, because it came from there.
    pub(crate) fn clean_backing(
        &self,
        tier: &Tier<K::Words>,
        entry: &Entry<'_, K>,
        pfn: peerspace_core::addr::Pfn,
        dirt: peerspace_core::entry::Dirt,
    ) -> Option<u64> {
        use peerspace_core::entry::Dirt;
        use peerspace_core::memmap::Backing;
        let frame = self.frame_of(pfn, entry.is_whole());
        let sure = dirt == Dirt::Clean && self.memmap.epoch(frame) == self.life();
        match self.memmap.backing(frame) {
            Backing::Page(at) if sure && tier.range.contains(at.pfn()) => Some(at - tier.range.base),
            _ => None,
        }
    }

    /// Whether every device can do with a region at `range`; keeps it free there if so (rule G13).
    pub(crate) fn reserve_on_devices(&self, range: VaRange) -> bool {
        let all: Vec<_> = self.tiers.iter().collect();
        let taken = all.iter().take_while(|tier| tier.reserve_addresses(range)).count();
        if taken < all.len() {
            all[..taken].iter().for_each(|tier| tier.release_addresses(range));
        }
        taken == all.len()
    }

    /// The addresses that all devices can translate.
    pub(crate) fn reach(&self) -> std::ops::Range<u64> {
        let all = self.tiers.iter().filter_map(|tier| tier.mmu.as_ref().map(|mmu| mmu.info.addresses.clone()));
        all.fold(0..u64::MAX, |a, b| a.start.max(b.start)..a.end.min(b.end))
    }

    /// Undoes [`reserve_on_devices`](Engine::reserve_on_devices).
    pub(crate) fn release_on_devices(&self, range: VaRange) {
        self.tiers.iter().for_each(|tier| tier.release_addresses(range));
    }
}

/// An access to the host's memory under way.
struct Remote<'a>(&'a Context);

impl<'a> Remote<'a> {
    fn begin(context: &'a Context) -> Remote<'a> {
        context.remote.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in drain_remote.
        fence(Ordering::SeqCst);
        Remote(context)
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        // Release: what was read and written is over for whoever waits for it.
        self.0.remote.fetch_add(1, Ordering::Release);
    }
}
