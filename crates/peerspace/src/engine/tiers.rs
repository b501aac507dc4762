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
use peerspace_core::addr::{BLOCK_PAGES, Geometry, Order, Pages, Pfn};
use peerspace_core::buddy::Buddy;
use peerspace_core::pagemap::{Pagemaps, PfnRange};
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering::Relaxed};
use peerspace_core::words::Words;
use peerspace_os::own::{Box, Own, Vec};

/// The most transfers in one batch.
pub(crate) const BATCH: usize = 64;
/// Stores that fail in a row (for another reason than want of space) before a device is not asked any more.
const STRIKES: u64 = 16;
/// A full device is asked again after this many of its pages were freed.
const ROOM_AGAIN: u64 = 16;

/// A device and its pages.
pub(crate) struct Tier<W> {
    device: Box<dyn Device>,
    pub(crate) info: Descriptor,
    pub(crate) range: PfnRange,
    buddy: Mutex<Buddy<W>>,
    /// Pages freed so far; and the count at which the device last said it was full, plus one.
    freed: AtomicU64,
    full: AtomicU64,
    strikes: AtomicU64,
    told_failing: AtomicBool,
    /// The most pages that were in use.
    pub(crate) most_used: AtomicU64,
    pub(crate) loads: AtomicU64,
    pub(crate) stores: AtomicU64,
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
            let info = device.describe();
            base = Pfn(base.0.next_multiple_of(BLOCK_PAGES));
            let range = PfnRange { base, pages: info.pages };
            maps.register(range).map_err(|e| TierError::Refused(info.name.clone(), e))?;
            base = range.end();
            let memory = words(Buddy::<W>::words_for(info.pages)).map_err(TierError::Memory)?;
            all.push(Tier {
                device,
                range,
                buddy: Mutex::new(Buddy::new(memory, info.pages)),
                info,
                freed: AtomicU64::new(0),
                full: AtomicU64::new(0),
                strikes: AtomicU64::new(0),
                told_failing: AtomicBool::new(false),
                most_used: AtomicU64::new(0),
                loads: AtomicU64::new(0),
                stores: AtomicU64::new(0),
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
        tier.info.compares && tier.device.holds(pfn - tier.range.base, bytes) == Ok(true)
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
                let mut buddy = tier.buddy.lock();
                for (i, f) in folios.iter().enumerate().filter(|(_, f)| f.at.is_none()) {
                    let Some(page) = buddy.alloc(f.order) else { continue };
                    which.push((i, page));
                    batch.push(Store::new(page, f.bytes));
                }
                tier.most_used.fetch_max((tier.range.pages - buddy.available()).0, Relaxed);
            }
            if batch.is_empty() {
                continue;
            }
            tier.device.store(&mut batch);
            for ((i, page), store) in which.into_iter().zip(batch) {
                if tier.judge(store.result) {
                    folios[i].at = Some(tier.range.base + page);
                    tier.stores.fetch_add(folios[i].order.pages().0, Relaxed);
                } else {
                    tier.free(page, folios[i].order);
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
        let mut batch = [Store::new(pfn - tier.range.base, bytes)];
        tier.device.store(&mut batch);
        let [store] = batch;
        let ok = tier.judge(store.result);
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
        self.device.load(batch);
        self.loads.fetch_add(pages, Relaxed);
    }

    fn free(&self, page: u64, order: Order) {
        self.device.freed(DevicePages { first: page, count: order.pages().0 });
        self.buddy.lock().free(page, order);
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
        self.buddy.lock().available()
    }
}

/// A device that cannot be used.
#[derive(Debug)]
pub(crate) enum TierError<E> {
    /// Its pages do not fit into the pfn space.
    Refused(String, peerspace_core::pagemap::PagemapError),
    /// There is no memory for its allocator.
    Memory(E),
}
