//! The devices of a space, in the order in which they are tried.
//!
//! Devices come and go while the space is in use (rules Z1 to Z3). Whoever works with one has a reference to it, which keeps
//! it there; a page in use keeps it there as well, so that its owner can always have one.
//!
//! A device that is full is skipped until it has freed something. When none has room, the budget is exceeded with a warning rather
//! than data lost.

use super::mmus::MmuState;
use super::tier::{Tier, answer, unwinding};
use crate::device::{Descriptor, Device, MemoryType, Store};
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{DevicePfn, Geometry, Order, Pfn, Vpn};
use peerspace_core::buddy::Buddy;
use peerspace_core::pagemap::{MAX_RANGES, Pagemaps};
use peerspace_core::sharers::{MAX_MMUS, MmuId};
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering::Relaxed};
use peerspace_core::words::Words;
use peerspace_os::own::{Box, Own, Vec};
use peerspace_os::slot::{Slot, SlotRef};

pub(crate) use super::tier::BATCH;
pub(crate) use crate::device::{DeviceError, ForkSide, Load};
pub(crate) use crate::spec::OpenDevice;

/// A reference to a device.
pub(crate) type TierRef<'a, W> = SlotRef<'a, Box<Tier<W>>>;

/// All devices.
pub(crate) struct Tiers<W> {
    slots: Vec<Slot<Box<Tier<W>>>>,
    maps: Pagemaps,
    geometry: Geometry,
    /// Where the pages of devices begin.
    first: Pfn,
    /// The slots in use, in the order in which their devices are tried: the number of the slot plus one.
    order: [AtomicU64; MAX_RANGES],
    /// The slots of devices with an MMU, by the number of that: the number of the slot plus one.
    mmus: [AtomicU64; MAX_MMUS as usize],
    /// Guards what devices there are.
    changes: Mutex<()>,
    /// Devices there have been.
    ids: AtomicU64,
    /// The last page that was to be written found no room.
    full: AtomicBool,
}

/// One folio to be written to whatever device has room.
pub(crate) struct WriteBack<'a> {
    /// Its bytes: `2^order` pages.
    pub(crate) bytes: &'a [u8],
    pub(crate) order: Order,
    /// Whose data they are.
    pub(crate) vpn: Vpn,
    /// Where it is now, once it is anywhere.
    pub(crate) at: Option<DevicePfn>,
}

impl<W: Words> Tiers<W> {
    /// No devices; their pages will be numbered from `first` on.
    pub(crate) fn new(geometry: Geometry, first: Pfn) -> Tiers<W> {
        let mut slots = Vec::with_capacity_in(MAX_RANGES, Own);
        slots.resize_with(MAX_RANGES, Slot::new);
        Tiers {
            slots,
            maps: Pagemaps::new(),
            geometry,
            first,
            order: std::array::from_fn(|_| AtomicU64::new(0)),
            mmus: std::array::from_fn(|_| AtomicU64::new(0)),
            changes: Mutex::new(()),
            ids: AtomicU64::new(0),
            full: AtomicBool::new(false),
        }
    }

    /// Adds a device, to be tried after the others. Returns its number: no device ever has the same.
    ///
    /// # Errors
    /// [`TierError`]; nothing has changed.
    pub(crate) fn attach<E>(
        &self,
        device: Box<dyn Device>,
        words: impl FnMut(usize) -> Result<W, E>,
    ) -> Result<u64, TierError<E>> {
        let id = self.ids.fetch_add(1, Relaxed);
        let info = unwinding(|| device.describe())
            .ok_or_else(|| TierError::Refused(format!("number {}", id + 1), "it panicked in `describe`".into()))?;
        let refused = |why: String| TierError::Refused(info.name.clone(), why);
        let own = unwinding(|| device.altmap()).ok_or_else(|| refused("it panicked in `altmap`".into()))?;
        let mmu = unwinding(|| device.mmu().map(|mmu| mmu.describe()));
        let mmu = mmu.ok_or_else(|| refused("it panicked in `mmu` or `Mmu::describe`".into()))?;
        lacks(&*device, &info).map_or(Ok(()), |what| Err(refused(what.into())))?;
        let most = Buddy::<W>::MAX_PAGES;
        if info.pages.0 > most {
            return Err(refused(format!("it has {} pages; up to {most} can be managed", info.pages.0)));
        }
        let _changes = self.changes.lock();
        let mmu = match mmu {
            None => None,
            Some(info) => {
                let free = self.mmus.iter().position(|m| m.load(Relaxed) == 0);
                let why =
                    || refused(format!("there are {MAX_MMUS} devices with an MMU already, as many as there can be"));
                Some(MmuState::new(MmuId(free.ok_or_else(why)? as u8), info))
            }
        };
        let number = mmu.as_ref().map(|mmu| mmu.id);
        let range = self.maps.place(self.first, info.pages).map_err(|e| refused(e.to_string()))?;
        let i = self.maps.register(range).map_err(|e| refused(e.to_string()))?;
        let tier = Tier::new(id, device, info, range, self.geometry, (own, mmu), words).map_err(|(_, e)| {
            self.maps.unregister(i);
            TierError::Memory(e)
        })?;
        assert!(self.slots[i].put(Box::new_in(tier, Own)).is_ok(), "a range without a device has a slot without one");
        if let Some(MmuId(n)) = number {
            self.mmus[n as usize].store(i as u64 + 1, peerspace_core::sync::Ordering::Release);
        }
        let free = self.order.iter().find(|o| o.load(Relaxed) == 0).expect("as many places as slots");
        free.store(i as u64 + 1, peerspace_core::sync::Ordering::Release);
        self.full.store(false, Relaxed);
        Ok(id)
    }

    /// Where device `id` is, if it is there.
    fn slot(&self, id: u64) -> Option<usize> {
        let shard = super::cpu();
        (0..MAX_RANGES).find(|i| self.slots[*i].get_as_owner(shard).is_ok_and(|tier| tier.id == id))
    }

    /// The device of this number, if it is there and not being taken away.
    pub(crate) fn by_id(&self, id: u64) -> Option<TierRef<'_, W>> {
        self.slots[self.slot(id)?].get(super::cpu()).ok().filter(|tier| tier.id == id)
    }

    /// Whether any device runs code.
    pub(crate) fn any_mmu(&self) -> bool {
        self.mmus.iter().any(|m| m.load(Relaxed) != 0)
    }

    /// The device with this MMU, also while it is being taken away.
    pub(crate) fn by_mmu(&self, mmu: MmuId) -> Option<TierRef<'_, W>> {
        self.with_mmu(mmu, |slot| slot.get_as_owner(super::cpu()).ok())
    }

    /// The device with this MMU, unless it is being taken away.
    pub(crate) fn open_by_mmu(&self, mmu: MmuId) -> Option<TierRef<'_, W>> {
        self.with_mmu(mmu, |slot| slot.get(super::cpu()).ok())
    }

    fn with_mmu<'a>(
        &'a self,
        mmu: MmuId,
        get: impl FnOnce(&'a Slot<Box<Tier<W>>>) -> Option<TierRef<'a, W>>,
    ) -> Option<TierRef<'a, W>> {
        let i = self.mmus[mmu.0 as usize].load(peerspace_core::sync::Ordering::Acquire).checked_sub(1)? as usize;
        // Another one may have come to be there since.
        get(&self.slots[i]).filter(|tier| tier.mmu.as_ref().is_some_and(|state| state.id == mmu))
    }

    /// Begins to take device `id` away: nobody gets a reference to it any more, except who owns a page of it, and no page of
    /// it is taken. A pfn of it, to find it by.
    pub(crate) fn revoke(&self, id: u64) -> Option<DevicePfn> {
        let i = self.slot(id)?;
        let tier = self.slots[i].get(super::cpu()).ok()?;
        self.slots[i].revoke().ok()?;
        tier.close(true);
        Some(DevicePfn::new(tier.range.base))
    }

    /// Takes [`revoke`](Tiers::revoke) back.
    pub(crate) fn restore(&self, base: DevicePfn) {
        let Some(i) = self.maps.find(base.pfn()) else { return };
        self.of(base).close(false);
        let restored = self.slots[i].restore();
        debug_assert!(restored.is_ok(), "a device was restored that was not revoked");
    }

    /// Takes away a device that was revoked and no page of which is in use, when nobody has a reference to it.
    pub(crate) fn remove(&self, base: DevicePfn) -> Option<Box<dyn Device>> {
        let _changes = self.changes.lock();
        let i = self.maps.find(base.pfn())?;
        let tier = self.slots[i].take().ok()?;
        debug_assert_eq!(tier.used().0, 0, "pages of a device that is taken away are in use");
        if let Some(state) = &tier.mmu {
            self.mmus[state.id.0 as usize].store(0, Relaxed);
        }
        self.maps.unregister(i);
        let at = self.order.iter().position(|o| o.load(Relaxed) == i as u64 + 1).expect("it has a place");
        for (to, from) in self.order[at..].iter().zip(&self.order[at + 1..]) {
            to.store(from.load(Relaxed), peerspace_core::sync::Ordering::Release);
        }
        self.order[MAX_RANGES - 1].store(0, Relaxed);
        Some(Box::into_inner(tier).into_device())
    }

    /// References to all devices, those that are being taken away included.
    pub(crate) fn iter(&self) -> impl Iterator<Item = TierRef<'_, W>> {
        let shard = super::cpu();
        let numbers = self.order.iter().map(|o| o.load(peerspace_core::sync::Ordering::Acquire));
        numbers.take_while(|n| *n > 0).filter_map(move |n| self.slots[n as usize - 1].get_as_owner(shard).ok())
    }

    /// The device that `pfn` belongs to, if it is there.
    pub(crate) fn find(&self, pfn: DevicePfn) -> Option<TierRef<'_, W>> {
        let tier = self.slots[self.maps.find(pfn.pfn())?].get_as_owner(super::cpu()).ok()?;
        // Another one may have come to be there since.
        tier.range.contains(pfn.pfn()).then_some(tier)
    }

    /// The device of `pfn`, a page of which is in use.
    ///
    /// # Panics
    /// When there is none: then an entry of the table is corrupt.
    pub(crate) fn of(&self, pfn: DevicePfn) -> TierRef<'_, W> {
        self.find(pfn).unwrap_or_else(|| panic!("{pfn} belongs to no device: the logical table is corrupt"))
    }

    /// Gives back `2^order` pages from `pfn` on.
    pub(crate) fn free(&self, pfn: DevicePfn, order: Order) {
        let tier = self.of(pfn);
        tier.free(pfn - tier.range.base, order);
    }

    /// Frees a page whose data could not be had back, for good.
    pub(crate) fn retire(&self, pfn: DevicePfn) {
        let tier = self.of(pfn);
        tier.retire(pfn - tier.range.base);
    }

    /// `2^order` pages from `pfn` on hold the data of `vpn` from now on: a mapping has moved.
    pub(crate) fn place(&self, pfn: DevicePfn, order: Order, vpn: Vpn) {
        let tier = self.of(pfn);
        tier.place(pfn - tier.range.base, order, vpn);
    }

    /// Reads a folio that begins at `pfn`; once more if that fails, since it may be a passing failure.
    ///
    /// # Errors
    /// What the device says, the second time.
    pub(crate) fn load(&self, pfn: DevicePfn, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let tier = self.of(pfn);
        let mut load = || {
            let mut batch = [Load::new(pfn - tier.range.base, &mut *bytes)];
            tier.load(&mut batch, self.geometry);
            let [load] = batch;
            load.result
        };
        load().or_else(|_| load())
    }

    /// Whether the device page `pfn` holds exactly `bytes`; false where that cannot be said.
    pub(crate) fn holds(&self, pfn: DevicePfn, bytes: &[u8]) -> bool {
        let tier = self.of(pfn);
        tier.holds(pfn - tier.range.base, bytes)
    }

    /// Writes folios to the first device that takes each. Those for which `at` stays empty fit nowhere.
    ///
    /// At most [`BATCH`] of them.
    pub(crate) fn write_back(&self, folios: &mut [WriteBack<'_>]) {
        self.write_to(folios, false);
        // A block may find no room where pages do.
        if let Some(last) = folios.iter().rfind(|f| f.order == Order::BASE) {
            self.full.store(last.at.is_none(), Relaxed);
        }
    }

    /// The same, `reserved`: to what was reserved for them, if there is nothing else.
    pub(crate) fn write_to(&self, folios: &mut [WriteBack<'_>], reserved: bool) {
        for tier in self.iter() {
            if !tier.takes_evicted() || folios.iter().all(|f| f.at.is_some()) {
                continue;
            }
            let mut which: ArrayVec<(usize, u64), BATCH> = ArrayVec::new();
            let mut batch: ArrayVec<Store<'_>, BATCH> = ArrayVec::new();
            let wanted = folios.iter().enumerate().filter(|(_, f)| f.at.is_none()).map(|(i, f)| (i, f.order, f.vpn));
            tier.take(wanted, reserved, |i, page| {
                which.push((i, page));
                batch.push(Store::new(page, folios[i].bytes));
            });
            if batch.is_empty() {
                continue;
            }
            tier.store(&mut batch);
            for (k, (i, page)) in which.into_iter().enumerate() {
                let result = answer(&batch, k, page);
                let bad = !matches!(result, Ok(()) | Err(DeviceError::NoSpace));
                if tier.judge(result) {
                    folios[i].at = Some(DevicePfn::new(tier.range.base + page));
                    tier.stores.fetch_add(folios[i].order.pages().0, Relaxed);
                } else {
                    tier.give_up(page, folios[i].order, bad);
                }
            }
        }
    }

    /// Whether, as far as is known, no device has room for anything.
    pub(crate) fn full(&self) -> bool {
        self.full.load(Relaxed)
    }

    /// Writes new content to a device page that is allocated already. False when the device failed; the page
    /// then holds nothing to rely on.
    pub(crate) fn rewrite(&self, pfn: DevicePfn, bytes: &[u8]) -> bool {
        let tier = self.of(pfn);
        let page = pfn - tier.range.base;
        let mut batch = [Store::new(page, bytes)];
        tier.store(&mut batch);
        let ok = tier.judge(answer(&batch, 0, page));
        if ok {
            tier.stores.fetch_add(self.geometry.pages_in(bytes.len() as u64).0, Relaxed);
        }
        ok
    }

    /// Brings everything to rest before a fork.
    pub(crate) fn before_fork(&self) {
        self.iter().for_each(|t| t.device().before_fork());
    }

    /// Lets every device go on after a fork.
    pub(crate) fn after_fork(&self, side: ForkSide) {
        for tier in self.iter() {
            tier.device().after_fork(side);
            let shares = tier.info.memory != MemoryType::Private;
            if side == ForkSide::Child && shares && !unwinding(|| tier.device().shared(0).is_some()).unwrap_or(false)
            {
                tier.become_foreign();
            }
        }
    }

    /// In a forked child: whoever had a reference, or was taking a device away, does not exist.
    pub(crate) fn renew(&self) {
        for slot in &self.slots {
            slot.renew();
            let _ = slot.restore();
        }
        for tier in self.iter() {
            tier.close_for_fork(false);
            tier.close(false);
            tier.unreserve(u64::MAX);
            if let Some(state) = &tier.mmu {
                state.closing.open();
            }
        }
    }
}

/// What a device of its kind must have and this one has not (rule Z11).
fn lacks(device: &dyn Device, info: &Descriptor) -> Option<&'static str> {
    let shared = unwinding(|| device.shared(0).is_some()).unwrap_or(false);
    let named = unwinding(|| device.named().is_some()).unwrap_or(false);
    match info.memory {
        MemoryType::Private => None,
        _ if !shared => Some("it says that the CPU can map its memory, and has none to map (`Device::shared`)"),
        MemoryType::Persistent if !named => Some("a persistent device needs regions with names (`Device::named`)"),
        MemoryType::Persistent if info.takes_evicted => {
            Some("a persistent device holds what has a name, and cannot take what leaves RAM for want of room")
        }
        MemoryType::Coherent | MemoryType::Persistent => None,
    }
}

/// A device that cannot be used.
#[derive(Debug)]
pub(crate) enum TierError<E> {
    /// The one of this name cannot be used, for this reason.
    Refused(String, String),
    /// There is no memory for its allocator.
    Memory(E),
}
