//! The devices of a space, in the order in which they are tried, and who owns each of their pages.
//!
//! A device numbers its pages from zero; here they get their place in the common pfn space, an allocator that
//! says which are free, and the rule that every page handed out is [freed](Device::freed) exactly once (Z6). A
//! page is owned by the table entry or the frame descriptor that names its pfn.
//!
//! Locks: each tier's allocator has one, held for a few dozen instructions and never across a call of the device.

use crate::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{BLOCK_PAGES, Geometry, Order, Pages, Pfn, Va};
use peerspace_core::buddy::Buddy;
use peerspace_core::pagemap::{Pagemaps, PfnRange};
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering::Relaxed};
use peerspace_core::words::Words;
use peerspace_os::own::{Box, Own, Vec};

/// The most transfers in one batch.
pub(crate) const BATCH: usize = 64;
/// Stores that fail in a row (for another reason than want of space) before a device is not asked any more.
const STRIKES: u64 = 16;
/// Lost pages that are reported one by one.
const LOUD: u64 = 16;
/// A full device is asked again after this many of its pages were freed.
const ROOM_AGAIN: u64 = 16;

/// A device and its pages.
pub(crate) struct Tier<W> {
    device: Box<dyn Device>,
    pub(crate) info: Descriptor,
    pub(crate) range: PfnRange,
    room: Mutex<Room<W>>,
    /// Pages freed so far; and the count at which the device last said it was full, plus one.
    freed: AtomicU64,
    full: AtomicU64,
    strikes: AtomicU64,
    told_failing: AtomicBool,
    /// Pages lost so far.
    lost: AtomicU64,
    /// The most pages that were in use.
    pub(crate) most_used: AtomicU64,
    pub(crate) loads: AtomicU64,
    pub(crate) stores: AtomicU64,
    /// Transfers that failed, other than for want of space.
    pub(crate) errors: AtomicU64,
}

/// The pages of a device that are free.
struct Room<W> {
    buddy: Buddy<W>,
    /// Pages that could not be stored to: free, but the last to be tried again. A few bad ones would otherwise be
    /// what is always tried first.
    aside: ArrayVec<(u64, Order), BATCH>,
}

impl<W: Words> Room<W> {
    fn alloc(&mut self, order: Order) -> Option<u64> {
        self.buddy.alloc(order).or_else(|| {
            let Room { buddy, aside } = self;
            aside.drain(..).for_each(|(page, order)| buddy.free(page, order));
            buddy.alloc(order)
        })
    }

    fn free(&mut self, page: u64, order: Order, bad: bool) {
        let (mut page, mut order) = (page, order);
        if bad {
            if !self.aside.is_full() {
                return self.aside.push((page, order));
            }
            let oldest = self.aside.remove(0);
            self.aside.push((page, order));
            (page, order) = oldest;
        }
        self.buddy.free(page, order);
    }

    fn available(&self) -> Pages {
        self.aside.iter().fold(self.buddy.available(), |n, (_, order)| n + order.pages())
    }
}

/// All devices.
pub(crate) struct Tiers<W> {
    all: Vec<Tier<W>>,
    maps: Pagemaps,
    geometry: Geometry,
    /// The last page that was to be written found no room.
    full: AtomicBool,
}

/// One folio to be written to whatever device has room.
pub(crate) struct WriteBack<'a> {
    /// Its bytes: `2^order` pages.
    pub(crate) bytes: &'a [u8],
    pub(crate) order: Order,
    /// Where it is now, once it is anywhere.
    pub(crate) at: Option<Pfn>,
}

impl<W: Words> Tiers<W> {
    /// Puts `devices` into the pfn space behind `first`. `words` makes zeroed words for an allocator.
    pub(crate) fn new<E>(
        geometry: Geometry,
        first: Pfn,
        devices: Vec<Box<dyn Device>>,
        mut words: impl FnMut(usize) -> Result<W, E>,
    ) -> Result<Tiers<W>, TierError<E>> {
        let mut maps = Pagemaps::new();
        let mut all = Vec::with_capacity_in(devices.len(), Own);
        let mut base = first;
        for device in devices {
            let info = unwinding(|| device.describe()).ok_or_else(|| {
                TierError::Refused(format!("number {}", all.len() + 1), "it panicked in `describe`".into())
            })?;
            base = Pfn(base.0.next_multiple_of(BLOCK_PAGES));
            let range = PfnRange { base, pages: info.pages };
            maps.register(range).map_err(|e| TierError::Refused(info.name.clone(), e.to_string()))?;
            let most = Buddy::<W>::MAX_PAGES;
            if info.pages.0 > most {
                let why = format!("it has {} pages; up to {most} can be managed", info.pages.0);
                return Err(TierError::Refused(info.name, why));
            }
            base = range.end();
            let memory = words(Buddy::<W>::words_for(info.pages)).map_err(TierError::Memory)?;
            all.push(Tier {
                device,
                range,
                room: Mutex::new(Room { buddy: Buddy::new(memory, info.pages), aside: ArrayVec::new() }),
                info,
                freed: AtomicU64::new(0),
                full: AtomicU64::new(0),
                strikes: AtomicU64::new(0),
                told_failing: AtomicBool::new(false),
                lost: AtomicU64::new(0),
                most_used: AtomicU64::new(0),
                loads: AtomicU64::new(0),
                stores: AtomicU64::new(0),
                errors: AtomicU64::new(0),
            });
        }
        Ok(Tiers { all, maps, geometry, full: AtomicBool::new(false) })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tier<W>> {
        self.all.iter()
    }

    /// The tier that `pfn` belongs to.
    ///
    /// # Panics
    /// When it belongs to none: then an entry of the table is corrupt.
    pub(crate) fn of(&self, pfn: Pfn) -> &Tier<W> {
        let i = self.maps.find(pfn);
        &self.all[i.unwrap_or_else(|| panic!("{pfn} belongs to no device: the logical table is corrupt"))]
    }

    /// Gives back `2^order` pages from `pfn` on.
    pub(crate) fn free(&self, pfn: Pfn, order: Order) {
        let tier = self.of(pfn);
        tier.free(pfn - tier.range.base, order);
    }

    /// Whether the device page `pfn` holds exactly `bytes`; false where that cannot be said.
    pub(crate) fn holds(&self, pfn: Pfn, bytes: &[u8]) -> bool {
        let tier = self.of(pfn);
        let page = pfn - tier.range.base;
        // A panic counts as not knowing.
        tier.info.compares && unwinding(|| tier.device.holds(page, bytes)) == Some(Ok(true))
    }

    /// Writes folios to the first device that takes each. Those for which `at` stays empty fit nowhere.
    ///
    /// At most [`BATCH`] of them.
    pub(crate) fn write_back(&self, folios: &mut [WriteBack<'_>]) {
        for tier in &self.all {
            if !tier.accepts() || folios.iter().all(|f| f.at.is_some()) {
                continue;
            }
            let mut which: ArrayVec<(usize, u64), BATCH> = ArrayVec::new();
            let mut batch: ArrayVec<Store<'_>, BATCH> = ArrayVec::new();
            {
                let mut room = tier.room.lock();
                for (i, f) in folios.iter().enumerate().filter(|(_, f)| f.at.is_none()) {
                    let Some(page) = room.alloc(f.order) else { continue };
                    which.push((i, page));
                    batch.push(Store::new(page, f.bytes));
                }
                tier.most_used.fetch_max((tier.range.pages - room.available()).0, Relaxed);
            }
            if batch.is_empty() {
                continue;
            }
            tier.store(&mut batch);
            for (k, (i, page)) in which.into_iter().enumerate() {
                let result = answer(&batch, k, page);
                let bad = !matches!(result, Ok(()) | Err(DeviceError::NoSpace));
                if tier.judge(result) {
                    folios[i].at = Some(tier.range.base + page);
                    tier.stores.fetch_add(folios[i].order.pages().0, Relaxed);
                } else {
                    tier.give_up(page, folios[i].order, bad);
                }
            }
        }
        // A block may find no room where pages do.
        if let Some(last) = folios.iter().rfind(|f| f.order == Order::BASE) {
            self.full.store(last.at.is_none(), Relaxed);
        }
    }

    /// Whether, as far as is known, no device has room for anything.
    pub(crate) fn full(&self) -> bool {
        self.full.load(Relaxed)
    }

    /// Writes new content to a device page that is allocated already. False when the device failed; the page
    /// then holds nothing to rely on.
    pub(crate) fn rewrite(&self, pfn: Pfn, bytes: &[u8]) -> bool {
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
        self.all.iter().for_each(|t| t.device.before_fork());
    }

    /// Lets every device go on after a fork.
    pub(crate) fn after_fork(&self, side: crate::device::ForkSide) {
        self.all.iter().for_each(|t| t.device.after_fork(side));
    }
}

impl<W: Words> Tier<W> {
    /// Reads device pages. Several loads may be in one batch; each gets its own result.
    pub(crate) fn load(&self, batch: &mut [Load<'_>], geometry: Geometry) {
        let pages: u64 = batch.iter().map(|l| geometry.pages_in(l.bytes.len() as u64).0).sum();
        if unwinding(|| self.device.load(batch)).is_none() {
            batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Panicked));
        }
        self.loads.fetch_add(pages, Relaxed);
        let failed = batch.iter().filter(|l| l.result.is_err()).count() as u64;
        if failed > 0 {
            self.errors.fetch_add(failed, Relaxed);
        }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        if unwinding(|| self.device.store(batch)).is_none() {
            batch.iter_mut().for_each(|s| s.result = Err(DeviceError::Panicked));
        }
    }

    fn free(&self, page: u64, order: Order) {
        self.give_up(page, order, false);
    }

    /// Frees pages; if they are bad, others are to be tried first from now on.
    fn give_up(&self, page: u64, order: Order, bad: bool) {
        if unwinding(|| self.device.freed(DevicePages { first: page, count: order.pages().0 })).is_none() {
            // The pages are free nevertheless: nobody will ask for what is in them.
            self.errors.fetch_add(1, Relaxed);
        }
        self.room.lock().free(page, order, bad);
        self.freed.fetch_add(order.pages().0, Relaxed);
    }

    /// Whether it makes sense to store here now.
    fn accepts(&self) -> bool {
        let full = self.full.load(Relaxed);
        let room = full == 0 || self.freed.load(Relaxed) >= full - 1 + ROOM_AGAIN;
        room && self.strikes.load(Relaxed) < STRIKES
    }

    /// Whether the device has not said that it is full.
    pub(crate) fn has_room(&self) -> bool {
        self.full.load(Relaxed) == 0
    }

    /// Says that the page at `va` cannot be had back from here; where there are many, not of each.
    pub(crate) fn tell_lost(&self, va: Va, pfn: Pfn, error: DeviceError) {
        let name = &self.info.name;
        let before = self.lost.fetch_add(1, Relaxed);
        if before < LOUD {
            let page = pfn - self.range.base;
            crate::tell::warning(format_args!("page {va} is lost: device {name}, page {page}: {error}"));
        } else if before == LOUD {
            crate::tell::warning(format_args!("device {name} goes on losing pages; the others are only counted"));
        }
    }

    /// Notes what a store says about the device. True if it went well.
    fn judge(&self, result: Result<(), DeviceError>) -> bool {
        match result {
            Ok(()) => {
                if self.strikes.load(Relaxed) != 0 {
                    self.strikes.store(0, Relaxed);
                }
                if self.full.load(Relaxed) != 0 {
                    self.full.store(0, Relaxed);
                }
                true
            }
            Err(DeviceError::NoSpace) => {
                self.full.store(self.freed.load(Relaxed) + 1, Relaxed);
                false
            }
            Err(e) => {
                self.errors.fetch_add(1, Relaxed);
                if self.strikes.fetch_add(1, Relaxed) + 1 >= STRIKES && !self.told_failing.swap(true, Relaxed) {
                    crate::tell::warning(format_args!(
                        "device {}: {STRIKES} writes failed in a row ({e}); nothing more is written to it",
                        self.info.name
                    ));
                }
                false
            }
        }
    }

    /// RAM of this process that the device takes up.
    #[cfg(feature = "process")]
    pub(crate) fn ram_bytes(&self) -> u64 {
        if self.info.in_ram { self.device.usage().map_or(0, |u| u.used_bytes) } else { 0 }
    }

    pub(crate) fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// Pages that are free by number.
    pub(crate) fn available(&self) -> Pages {
        self.room.lock().available()
    }
}

/// Calls a device. `None` if it panicked, which must not reach the program's own code: it is in the middle of an
/// access, and knows nothing of devices.
fn unwinding<T>(call: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).ok()
}

/// What a device said about the store of `page`, which was number `i` of the batch. A device may have put its batch
/// into another order: an answer never counts for another page.
fn answer(batch: &[Store<'_>], i: usize, page: u64) -> Result<(), DeviceError> {
    let mut found = batch.get(i).into_iter().chain(batch).filter(|s| s.page == page);
    found.next().map_or(Err(DeviceError::NoAnswer), |s| s.result.clone())
}

/// A device that cannot be used.
#[derive(Debug)]
pub(crate) enum TierError<E> {
    /// The one of this name cannot be used, for this reason.
    Refused(String, String),
    /// There is no memory for its allocator.
    Memory(E),
}
