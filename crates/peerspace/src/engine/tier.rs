//! One device of a space: its pages, who owns each of them, and what is believed of it.
//!
//! A device numbers its pages from zero; here they get an allocator that says which are free, a descriptor for each that is
//! not ([`DeviceMap`]), and the rule that every page handed out is [freed](Device::freed) exactly once (Z6). A page is owned
//! by the table entry or the frame descriptor that names its pfn, and its own descriptor names that entry.
//!
//! Locks: the allocator and the descriptors have one together, held for a few dozen instructions and never across a call of
//! the device.

use super::mmus::MmuState;
use crate::device::{Descriptor, Device, DeviceError, DevicePages, DeviceWords, Load, OwnMetadata, Store};
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{DevicePfn, Geometry, Order, Pages, Pfn, Va, Vpn};
use peerspace_core::buddy::Buddy;
use peerspace_core::devmap::{DeviceMap, InUse};
use peerspace_core::inverted::Inverted;
use peerspace_core::pagemap::PfnRange;
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering, Ordering::Relaxed, fence};
use peerspace_core::words::Words;
use peerspace_os::own::{Box, Buffer};

/// One part in so many of a device that runs code is for its own faults alone.
const OWN_SHARE: u64 = 8;
/// Pages that are read back at once.
const PROOF_PAGES: usize = 16;
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
    /// Which of all devices there ever were in the space.
    pub(crate) id: u64,
    pub(crate) info: Descriptor,
    pub(crate) range: PfnRange,
    /// How it translates addresses, if it runs code.
    pub(crate) mmu: Option<MmuState>,
    /// What stores are read back into, of a device whose word is not taken for it.
    proof: Option<Mutex<Buffer>>,
    room: Mutex<Room<W>>,
    /// Pages freed so far; and the count at which the device last said it was full, plus one.
    freed: AtomicU64,
    full: AtomicU64,
    strikes: AtomicU64,
    told_failing: AtomicBool,
    /// Why nothing is taken of it, for who has no use for the room: [`FORKING`], [`LEAVING`], or both.
    closed: AtomicU64,
    /// It has failed as a whole: nothing can be had from it any more.
    failed: AtomicBool,
    /// Pages lost so far.
    lost: AtomicU64,
    /// It is being emptied: what leaves RAM goes elsewhere.
    resting: AtomicBool,
    /// The next huge folio is refused: for tests of what happens then (rule H2).
    refuses: AtomicBool,
    /// The memory is another process's, from which this one was forked: its books, which lie in there, are not ours.
    foreign: AtomicBool,
    /// Pages that the CPU maps in place.
    pub(crate) in_place: AtomicU64,
    /// The most pages that were in use.
    pub(crate) most_used: AtomicU64,
    pub(crate) loads: AtomicU64,
    pub(crate) stores: AtomicU64,
    /// Transfers that failed, other than for want of space.
    pub(crate) errors: AtomicU64,
}

/// Why nothing is taken of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// The process forks: whoever wants something waits until it has.
    Forking,
    /// It is being taken away, or is not this process's.
    Leaving,
}

/// The bits of [`Tier::closed`].
const FORKING: u64 = 1;
const LEAVING: u64 = 2;

impl Closed {
    fn of(bits: u64) -> Option<Closed> {
        match bits {
            0 => None,
            FORKING => Some(Closed::Forking),
            _ => Some(Closed::Leaving),
        }
    }
}

/// Memory of a device for its descriptors.
struct OwnWords(Box<dyn DeviceWords>);

impl DeviceWords for OwnWords {
    fn word(&self, pfn: Pfn, i: usize) -> &AtomicU64 {
        self.0.word(pfn, i)
    }
}

/// The pages of a device: which are free, and whose the others are.
struct Room<W> {
    buddy: Buddy<W>,
    map: DeviceMap<W, OwnWords>,
    /// Copies of what is on the host too, of a device with an MMU.
    replicas: Option<Inverted<W>>,
    /// Pages that could not be stored to: free, but the last to be tried again. A few bad ones would otherwise be
    /// what is always tried first.
    aside: ArrayVec<(u64, Order), BATCH>,
    /// Pages whose data could not be had back: nobody's, and never used again, lest they lose more than that (rule Z9).
    retired: Pages,
    /// Kept for pages of a device that is being detached.
    reserved: u64,
    /// Nothing more is taken: see [`Closed`].
    closed: bool,
}

impl<W: Words> Room<W> {
    fn alloc(&mut self, order: Order, vpn: Vpn, reserved: bool) -> Option<u64> {
        self.alloc_near(None, order, vpn, reserved)
    }

    /// The same, at `near` if that is free.
    fn alloc_near(&mut self, near: Option<u64>, order: Order, vpn: Vpn, reserved: bool) -> Option<u64> {
        let room = self.available().0 - if reserved { 0 } else { self.reserved.min(self.available().0) };
        if self.closed || room < order.pages().0 {
            return None;
        }
        let page = near.filter(|at| self.buddy.alloc_at(*at, order)).or_else(|| self.buddy.alloc(order));
        let page = page.or_else(|| {
            let Room { buddy, aside, .. } = self;
            aside.drain(..).for_each(|(page, order)| buddy.free(page, order));
            buddy.alloc(order)
        })?;
        if self.map.take(page, order, vpn).is_err() {
            // Its descriptors have no room.
            self.buddy.free(page, order);
            return None;
        }
        if reserved {
            self.reserved = self.reserved.saturating_sub(order.pages().0);
        }
        Some(page)
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

    fn used(&self) -> Pages {
        self.buddy.pages() - self.available() - self.retired
    }
}

impl<W: Words> Tier<W> {
    /// `device`, which says of itself what `info` says, with its pages at `range`. `words` makes zeroed words for its books.
    pub(crate) fn new<E>(
        id: u64,
        device: Box<dyn Device>,
        info: Descriptor,
        range: PfnRange,
        geometry: Geometry,
        (own, mmu): (Option<OwnMetadata>, Option<MmuState>),
        mut words: impl FnMut(usize) -> Result<W, E>,
    ) -> Result<Tier<W>, (Box<dyn Device>, E)> {
        let books = || -> Result<Room<W>, E> {
            let page = geometry.page_bytes() as u64;
            let buddy = Buddy::new(words(Buddy::<W>::words_for(info.pages))?, info.pages);
            let [host, upper] = DeviceMap::<W, OwnWords>::words_for(info.pages, page);
            let host = if own.is_some() { 0 } else { host };
            let own = own.map(|own| (own.altmap, OwnWords(own.words)));
            let map = DeviceMap::new(info.pages, page, [words(host)?, words(upper)?], own);
            let n = Inverted::<W>::words_for(info.pages.0);
            let replicas = mmu.is_some().then(|| Ok(Inverted::new(words(n)?, words(n)?))).transpose()?;
            Ok(Room { buddy, map, replicas, aside: ArrayVec::new(), retired: Pages(0), reserved: 0, closed: false })
        };
        let room = match books() {
            Ok(room) => room,
            Err(e) => return Err((device, e)),
        };
        // Where there is no memory for it, its word is taken.
        let proof = info.verified.then(|| Buffer::new(PROOF_PAGES * geometry.page_bytes()));
        let proof = proof.and_then(Result::ok).map(Mutex::new);
        Ok(Tier {
            device,
            id,
            info,
            range,
            mmu,
            proof,
            room: Mutex::new(room),
            freed: AtomicU64::new(0),
            full: AtomicU64::new(0),
            strikes: AtomicU64::new(0),
            told_failing: AtomicBool::new(false),
            closed: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            resting: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
            foreign: AtomicBool::new(false),
            in_place: AtomicU64::new(0),
            most_used: AtomicU64::new(0),
            loads: AtomicU64::new(0),
            stores: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        })
    }

    /// Reads device pages. Several loads may be in one batch; each gets its own result.
    pub(crate) fn load(&self, batch: &mut [Load<'_>], geometry: Geometry) {
        let pages: u64 = batch.iter().map(|l| geometry.pages_in(l.bytes.len() as u64).0).sum();
        if self.failed.load(Relaxed) {
            batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Gone));
        } else if unwinding(|| self.device.load(batch)).is_none() {
            batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Panicked));
        }
        if batch.iter().any(|l| l.result == Err(DeviceError::Gone)) {
            self.fail();
        }
        self.loads.fetch_add(pages, Relaxed);
        let failed = batch.iter().filter(|l| l.result.is_err()).count() as u64;
        if failed > 0 {
            self.errors.fetch_add(failed, Relaxed);
        }
    }

    pub(crate) fn store(&self, batch: &mut [Store<'_>]) {
        if self.failed.load(Relaxed) {
            batch.iter_mut().for_each(|s| s.result = Err(DeviceError::Gone));
        } else if unwinding(|| self.device.store(batch)).is_none() {
            batch.iter_mut().for_each(|s| s.result = Err(DeviceError::Panicked));
        }
        if batch.iter().any(|s| s.result == Err(DeviceError::Gone)) {
            self.fail();
        }
        if let Some(buffer) = &self.proof {
            self.verify(batch, &mut buffer.lock());
        }
    }

    /// Has the device make zeros of `pages`, by itself.
    pub(crate) fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        if self.has_failed() {
            return Err(DeviceError::Gone);
        }
        let done = unwinding(|| self.device.clear(pages)).unwrap_or(Err(DeviceError::Panicked));
        if done == Err(DeviceError::Gone) {
            self.fail();
        }
        done
    }

    /// Reads back what was stored, for a device that may say it has done what it has not.
    fn verify(&self, batch: &mut [Store<'_>], buffer: &mut Buffer) {
        for store in batch.iter_mut().filter(|s| s.result.is_ok()) {
            let pages = store.bytes.chunks(buffer.len()).zip((store.page..).step_by(PROOF_PAGES));
            for (bytes, page) in pages {
                let mut load = [Load::new(page, &mut buffer[..bytes.len()])];
                let answered = unwinding(|| self.device.load(&mut load)).is_some();
                if !answered || load[0].result.is_err() || load[0].bytes != bytes {
                    store.result = Err(DeviceError::Corrupt);
                    crate::tell::warning(format_args!(
                        "device {} said that it has stored page {page}, and has not: it stays where it was",
                        self.info.name
                    ));
                    break;
                }
            }
        }
    }

    /// The device has failed as a whole: what it alone holds is lost, page by page, when it is asked for (rule Z9).
    pub(crate) fn fail(&self) {
        if !self.failed.swap(true, Relaxed) {
            crate::tell::warning(format_args!(
                "device {} has failed: {} of it are in use, and lost unless they are in RAM too",
                self.info.name,
                self.used()
            ));
        }
    }

    /// Whether it has.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Relaxed)
    }

    /// Whether the device says that `page` holds exactly `bytes`; not if that cannot be said.
    pub(crate) fn holds(&self, page: u64, bytes: &[u8]) -> bool {
        // A panic counts as not knowing.
        let asks = self.info.compares && !self.has_failed();
        asks && unwinding(|| self.device.holds(page, bytes)) == Some(Ok(true))
    }

    /// Takes pages for each of `wanted`: for the data of a page, a folio of this order. Calls `taken` with the number and the
    /// first page of those that could be had. `reserved`: of what was [reserved](Tier::reserve).
    pub(crate) fn take(
        &self,
        wanted: impl Iterator<Item = (usize, Order, Vpn)>,
        reserved: bool,
        mut taken: impl FnMut(usize, u64),
    ) {
        let mut room = self.room.lock();
        // What leaves RAM never takes the last room of a device that runs code: its own faults would have none, and what they
        // have evicted would come straight back (rule G7).
        let own = if self.mmu.is_some() { (self.info.pages.0 / OWN_SHARE).max(1) } else { 0 };
        for (i, order, vpn) in wanted {
            if room.available().0 < order.pages().0 + own || order == Order::BLOCK && self.refuses_block() {
                continue;
            }
            if let Some(page) = room.alloc(order, vpn, reserved) {
                taken(i, page);
            }
        }
        self.note_use(&room);
    }

    /// Pages have been taken of `room`.
    fn note_use(&self, room: &Room<W>) {
        self.most_used.fetch_max(room.used().0, Relaxed);
    }

    /// Takes a page for the data of `vpn`, at `near` if that is free.
    pub(crate) fn take_page(&self, near: Option<u64>, vpn: Vpn) -> Option<u64> {
        let mut room = self.room.lock();
        let page = room.alloc_near(near, Order::BASE, vpn, false);
        self.note_use(&room);
        page
    }

    /// Whether a folio of `order` is free; or why none is taken.
    pub(crate) fn has_folio(&self, order: Order) -> Result<bool, Closed> {
        let mut room = self.room.lock();
        if let Some(why) = self.closed() {
            return Err(why);
        }
        if room.available().0 < order.pages().0 + room.reserved {
            return Ok(false);
        }
        let page = room.buddy.alloc(order);
        if let Some(page) = page {
            room.buddy.free(page, order);
        }
        Ok(page.is_some() || room.aside.iter().any(|(_, o)| *o == order))
    }

    /// Takes a block for the data of `vpn`, at `near` if that is free.
    pub(crate) fn take_block(&self, near: Option<u64>, vpn: Vpn) -> Option<u64> {
        let mut room = self.room.lock();
        let page = room.alloc_near(near, Order::BLOCK, vpn, false);
        self.note_use(&room);
        page
    }

    /// Takes the block at `page` for the data of `vpn`. False when it is in use, or there is no memory for its descriptor.
    pub(crate) fn claim_block(&self, page: u64, vpn: Vpn) -> bool {
        let mut room = self.room.lock();
        if room.closed || !room.buddy.alloc_at(page, Order::BLOCK) {
            return false;
        }
        if room.map.take(page, Order::BLOCK, vpn).is_err() {
            room.buddy.free(page, Order::BLOCK);
            return false;
        }
        self.note_use(&room);
        true
    }

    /// The data of pages in use are those of `vpn` from now on. Their entry is locked.
    pub(crate) fn place(&self, page: u64, order: Order, vpn: Vpn) {
        self.room.lock().map.place(page, order, vpn);
    }

    /// The page of the program whose data `page` holds, as far as can be said without its entry locked.
    pub(crate) fn vpn(&self, page: u64) -> Option<Vpn> {
        self.room.lock().map.vpn(page)
    }

    /// `page`, which was taken for `vpn`, holds a copy of what is on the host too.
    pub(crate) fn add_replica(&self, vpn: Vpn, page: u64) {
        if let Some(replicas) = &mut self.room.lock().replicas {
            replicas.insert(vpn, page);
        }
    }

    /// The page that holds a copy of `vpn`, which is on the host too; of a block the first.
    pub(crate) fn replica(&self, vpn: Vpn) -> Option<u64> {
        let room = self.room.lock();
        room.replicas.as_ref()?.find(vpn, |page| room.map.vpn(page))
    }

    /// Frees the copy of `vpn`, if there is one.
    pub(crate) fn drop_replica(&self, vpn: Vpn, order: Order) {
        let page = {
            let Room { replicas, map, .. } = &mut *self.room.lock();
            replicas.as_mut().and_then(|r| r.remove(vpn, |page| map.vpn(page)))
        };
        if let Some(page) = page {
            self.free(page, order);
        }
    }

    /// The first folio in use at `from` or behind it.
    pub(crate) fn next_in_use(&self, from: u64) -> Option<InUse> {
        let room = self.room.lock();
        let mut parts = room.buddy.touched().into_iter();
        parts.find_map(|part| room.map.next_in_use(part.start.max(from)..part.end))
    }

    /// Keeps up to `pages` pages for whoever has [reserved](Tier::take) them. Returns how many.
    pub(crate) fn reserve(&self, pages: u64) -> u64 {
        let mut room = self.room.lock();
        let left = if room.closed { 0 } else { room.available().0.saturating_sub(room.reserved) };
        let got = pages.min(left);
        room.reserved += got;
        got
    }

    /// Gives up what was reserved.
    pub(crate) fn unreserve(&self, pages: u64) {
        let mut room = self.room.lock();
        room.reserved = room.reserved.saturating_sub(pages);
    }

    /// Takes no more pages from now on, or does so again; but never of memory that is another process's.
    pub(crate) fn close(&self, closed: bool) {
        self.close_because(LEAVING, closed || self.is_foreign());
    }

    /// The same for as long as a fork takes. Its faults wait meanwhile.
    pub(crate) fn close_for_fork(&self, closed: bool) {
        self.close_because(FORKING, closed);
    }

    fn close_because(&self, why: u64, closed: bool) {
        let mut room = self.room.lock();
        let before = self.closed.load(Relaxed);
        let now = if closed { before | why } else { before & !why };
        room.closed = now != 0;
        // Pairs with the fence in `closed`.
        self.closed.store(now, Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Why nothing is mapped on it any more, if so. For somebody who has an entry locked: either he sees that it is closed, or who
    /// closed it sees the entry locked.
    pub(crate) fn closed(&self) -> Option<Closed> {
        fence(Ordering::SeqCst);
        Closed::of(self.closed.load(Relaxed))
    }

    /// In a forked child: leaves the memory and the books of the parent alone from here on.
    pub(crate) fn become_foreign(&self) {
        self.foreign.store(true, Relaxed);
        self.close(true);
    }

    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign.load(Relaxed)
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> Pages {
        self.room.lock().used()
    }

    /// Pages that are never used again: see [`Tier::retire`].
    pub(crate) fn retired(&self) -> Pages {
        self.room.lock().retired
    }

    /// Bytes of descriptors in host memory, and in the device's own.
    pub(crate) fn metadata_bytes(&self) -> [u64; 2] {
        self.room.lock().map.bytes()
    }

    /// Pages that the CPU maps in place.
    pub(crate) fn pages_in_place(&self) -> u64 {
        self.in_place.load(Relaxed)
    }

    /// Its first page, among those of all devices.
    pub(crate) fn base(&self) -> DevicePfn {
        DevicePfn::new(self.range.base)
    }

    /// The device, of which nothing is in use any more.
    pub(crate) fn into_device(self) -> Box<dyn Device> {
        self.device
    }

    /// Frees pages.
    pub(crate) fn free(&self, page: u64, order: Order) {
        self.give_up(page, order, false);
    }

    /// Frees pages; if they are bad, others are to be tried first from now on.
    pub(crate) fn give_up(&self, page: u64, order: Order, bad: bool) {
        if self.forget(page, order) {
            self.room.lock().free(page, order, bad);
            self.freed.fetch_add(order.pages().0, Relaxed);
        }
    }

    /// Frees a page whose data could not be had back. Nothing is stored there until the device is attached anew: as the kernel
    /// does with memory that it found bad.
    pub(crate) fn retire(&self, page: u64) {
        if self.forget(page, Order::BASE) {
            self.room.lock().retired += Pages(1);
        }
    }

    /// Nobody refers to these pages any more; the device is told. False if they are another process's.
    fn forget(&self, page: u64, order: Order) -> bool {
        if self.is_foreign() {
            return false;
        }
        if !self.room.lock().map.put(page, order) {
            debug_assert!(false, "somebody refers to private pages that are freed");
            return false;
        }
        if unwinding(|| self.device.freed(DevicePages { first: page, count: order.pages().0 })).is_none() {
            // The pages are free nevertheless: nobody will ask for what is in them.
            self.errors.fetch_add(1, Relaxed);
        }
        true
    }

    /// Whether what leaves RAM may go here now.
    pub(crate) fn takes_evicted(&self) -> bool {
        self.info.takes_evicted && self.accepts() && !self.resting.load(Relaxed)
    }

    /// Whether what leaves RAM goes elsewhere from now on, while the device is being emptied.
    pub(crate) fn rest(&self, resting: bool) {
        self.resting.store(resting, Relaxed);
    }

    /// Has the next huge folio refused.
    pub(crate) fn refuse_block(&self) {
        self.refuses.store(true, Relaxed);
    }

    /// Whether this one is.
    pub(crate) fn refuses_block(&self) -> bool {
        self.refuses.load(Relaxed) && self.refuses.swap(false, Relaxed)
    }

    /// Whether it makes sense to store here now.
    pub(crate) fn accepts(&self) -> bool {
        let full = self.full.load(Relaxed);
        let room = full == 0 || self.freed.load(Relaxed) >= full - 1 + ROOM_AGAIN;
        room && self.strikes.load(Relaxed) < STRIKES && !self.has_failed()
    }

    /// Whether the device has not said that it is full.
    pub(crate) fn has_room(&self) -> bool {
        self.full.load(Relaxed) == 0
    }

    /// Says that the page at `va` cannot be had back from here; where there are many, not of each. True if it was said.
    pub(crate) fn tell_lost(&self, va: Va, pfn: DevicePfn, error: DeviceError) -> bool {
        let name = &self.info.name;
        let before = self.lost.fetch_add(1, Relaxed);
        if before < LOUD {
            let page = pfn - self.range.base;
            crate::tell::warning(format_args!("page {va} is lost: device {name}, page {page}: {error}"));
        } else if before == LOUD {
            crate::tell::warning(format_args!("device {name} goes on losing pages; the others are only counted"));
        }
        before < LOUD
    }

    /// Notes what a store says about the device. True if it went well.
    pub(crate) fn judge(&self, result: Result<(), DeviceError>) -> bool {
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
}

pub(crate) use crate::device::guarded as unwinding;

/// What a device said about the store of `page`, which was number `i` of the batch. A device may have put its batch
/// into another order: an answer never counts for another page.
pub(super) fn answer(batch: &[Store<'_>], i: usize, page: u64) -> Result<(), DeviceError> {
    let mut found = batch.get(i).into_iter().chain(batch).filter(|s| s.page == page);
    found.next().map_or(Err(DeviceError::NoAnswer), |s| s.result.clone())
}
