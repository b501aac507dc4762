//! Devices that run code, simulated: translations in a table, memory that is a [`Shelf`]'s, and accesses that a test makes.
//!
//! An access looks its translation up, and then goes to the memory by it, holding no lock in between: others come in there. What
//! an `unmap` has to promise is kept by fences: it is done when no access by the translations it took away is under way any more.
//!
//! What several of them may map beside each other is the [fleet](super::fleet)'s to say.

use super::fleet::{Entered, Fleet, Pending, Table};
use super::{PAGE, Rig, Shelf, Tried};
use crate::device::mmu::{DeviceAccess, FaultError, Mapping, Mmu, MmuDescriptor, Mode, Progress, Target};
use crate::device::{Descriptor, Device, DeviceError, DevicePages, Load, PeerCopy, SharedMemory, Store};
use crate::engine::place::Bring;
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::MmuId;
use peerspace_os::Kernel;
use peerspace_os::own::{Box as OwnBox, Own};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const BYTES: u64 = PAGE as u64;
const BLOCK: u64 = 2 << 20;
/// Faults for one access, before it is said that it makes no headway.
const TRIES: u32 = 100_000;

/// What a chip does wrong.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// One in so many translations is not entered, and only the first of its batch, or none, is; 0 for none.
    pub(super) bad_maps: AtomicU64,
    /// It says that it cannot take translations away.
    pub(super) keeps: AtomicBool,
    count: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    name: String,
    shelf: Shelf,
    info: MmuDescriptor,
    fleet: Fleet,
    at: usize,
    takes_evicted: bool,
    /// The CPU can map its memory in place.
    coherent: bool,
    /// It copies from others, and makes zeros, without the host.
    able: bool,
    /// It answers an `unmap` later, always.
    lazy: bool,
    trouble: Trouble,
    id: AtomicU64,
    mmu: AtomicU64,
}

/// A simulated device that runs code; a handle.
#[derive(Debug, Clone)]
pub(super) struct Chip(Arc<Inner>);

/// How it is made.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) pages: u64,
    pub(super) info: MmuDescriptor,
    pub(super) takes_evicted: bool,
    pub(super) coherent: bool,
    pub(super) able: bool,
    pub(super) lazy: bool,
}

impl Model {
    pub(super) fn new(pages: u64, mode: Mode) -> Model {
        let info = MmuDescriptor::new(mode);
        // Time does not pass in a model.
        let info = if cfg!(shuttle) { info.deadline(Duration::from_secs(1 << 30)) } else { info };
        Model { pages, info, takes_evicted: false, coherent: false, able: false, lazy: false }
    }

    pub(super) fn remote(self) -> Model {
        Model { info: self.info.remote(), ..self }
    }

    pub(super) fn coherent(self) -> Model {
        Model { coherent: true, ..self }
    }

    pub(super) fn zero_page(self) -> Model {
        Model { info: self.info.zero_page(), ..self }
    }
}

#[cfg_attr(shuttle, allow(dead_code))] // each of the two uses some
impl Chip {
    /// Makes a chip of `model`, and has it join the space of `rig`.
    pub(super) fn join(rig: &Rig, fleet: &Fleet, model: Model) -> Chip {
        let Model { pages, info, takes_evicted, coherent, able, lazy } = model;
        let at = {
            let mut ground = fleet.0.lock();
            let name = format!("chip {}", ground.tables.len());
            ground.tables.push(Table { name, coherent, ..Table::default() });
            ground.tables.len() - 1
        };
        let chip = Chip(Arc::new(Inner {
            name: format!("chip {at}"),
            shelf: if coherent { Shelf::new(pages).coherent() } else { Shelf::new(pages) },
            info,
            fleet: fleet.clone(),
            at,
            takes_evicted,
            coherent,
            able,
            lazy,
            trouble: Trouble::default(),
            id: AtomicU64::new(0),
            mmu: AtomicU64::new(0),
        }));
        let id = rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(chip.clone(), Own))).unwrap();
        chip.0.id.store(id, Relaxed);
        let mmu = rig.engine.tiers.by_id(id).and_then(|tier| tier.mmu_id()).expect("it runs code");
        chip.0.mmu.store(mmu.0 as u64, Relaxed);
        chip
    }

    /// Its number in the space.
    /// Where its table is among those of the fleet.
    pub(super) fn at(&self) -> usize {
        self.0.at
    }

    pub(super) fn id(&self) -> u64 {
        self.0.id.load(Relaxed)
    }

    pub(super) fn mmu(&self) -> MmuId {
        MmuId(self.0.mmu.load(Relaxed) as u8)
    }

    /// Its memory.
    pub(super) fn shelf(&self) -> &Shelf {
        &self.0.shelf
    }

    pub(super) fn pages(&self) -> u64 {
        self.0.shelf.pages
    }

    pub(super) fn info(&self) -> &MmuDescriptor {
        &self.0.info
    }

    pub(super) fn is_coherent(&self) -> bool {
        self.0.coherent
    }

    pub(super) fn trouble(&self) -> &Trouble {
        &self.0.trouble
    }

    /// Whether it has a translation of the page of `va`, for writing if that is asked for.
    pub(super) fn maps(&self, va: u64, writing: bool) -> bool {
        let ground = self.0.fleet.0.lock();
        ground.tables[self.0.at].entered.get(&(va / BYTES * BYTES)).is_some_and(|e| e.writable || !writing)
    }

    /// What the page of `va` leads to.
    pub(super) fn target(&self, va: u64) -> Option<Target> {
        self.0.fleet.0.lock().tables[self.0.at].entered.get(&(va / BYTES * BYTES)).map(|e| e.to)
    }

    /// How many pages it has translations of.
    pub(super) fn mapped(&self) -> usize {
        self.0.fleet.0.lock().tables[self.0.at].entered.len()
    }

    /// Its way to the space is cut: it makes no access any more that counts.
    pub(super) fn cut(&self) {
        self.0.fleet.0.lock().tables[self.0.at].cut = true;
    }

    pub(super) fn is_cut(&self) -> bool {
        self.0.fleet.0.lock().tables[self.0.at].cut
    }

    fn wrong(&self, what: String) {
        self.0.fleet.0.lock().wrong.push(format!("{}: {what}", self.0.name));
    }

    /// An access of `len` bytes at `va`, in one page; `op` gets them, to read or to overwrite all of.
    pub(super) fn access(
        &self,
        engine: &Tried,
        va: u64,
        how: DeviceAccess,
        len: usize,
        mut op: impl FnMut(&mut [u8]),
    ) -> Result<(), FaultError> {
        assert!(va % BYTES + len as u64 <= BYTES);
        for _ in 0..TRIES {
            if self.is_cut() {
                return Err(FaultError::Cut);
            }
            match self.once(engine, va, how, len, &mut op) {
                Some(done) => return done,
                None => engine.device_fault(self.mmu(), Va(va), how, Bring::AsChosen)?,
            }
        }
        panic!("an access of {} to {va:#x} makes no headway", self.0.name);
    }

    /// The same by the translation there is; `None` if there is none that permits it.
    fn once(
        &self,
        engine: &Tried,
        va: u64,
        how: DeviceAccess,
        len: usize,
        op: &mut impl FnMut(&mut [u8]),
    ) -> Option<Result<(), FaultError>> {
        let page_va = va / BYTES * BYTES;
        let to = {
            let mut ground = self.0.fleet.0.lock();
            let table = &mut ground.tables[self.0.at];
            let entered = *table.entered.get(&page_va)?;
            let permitted = match how {
                DeviceAccess::Read => true,
                DeviceAccess::Write => entered.writable,
                DeviceAccess::Atomic => entered.writable && entered.to != Target::Host,
            };
            if !permitted {
                return None;
            }
            table.used.insert(page_va);
            if let Target::Own(_) = entered.to {
                table.busy.push(page_va);
            }
            entered.to
        };
        let mut buffer = vec![0; len];
        match to {
            Target::Zero => op(&mut buffer),
            Target::Own(page) => {
                self.in_memory(page, va, how, len, op);
                let mut ground = self.0.fleet.0.lock();
                let busy = &mut ground.tables[self.0.at].busy;
                let i = busy.iter().position(|b| *b == page_va).expect("it is under way");
                busy.swap_remove(i);
            }
            // As its port does it.
            Target::Host => {
                let kernel = &engine.kernel;
                let done = match how {
                    DeviceAccess::Read => {
                        let read = || self.in_place(engine, va, || kernel.read_mapped(Va(va), &mut buffer));
                        let done = engine.remote_access(self.mmu(), Va(va), len, false, read);
                        done.map(|()| op(&mut buffer))
                    }
                    _ => {
                        op(&mut buffer);
                        let write = || self.in_place(engine, va, || kernel.write_mapped(Va(va), &buffer));
                        engine.remote_access(self.mmu(), Va(va), len, true, write)
                    }
                };
                return if let Err(FaultError::NotMapped(_)) = done { None } else { Some(done) };
            }
        }
        Some(Ok(()))
    }

    /// An access to the chip's own memory.
    fn in_memory(&self, page: u64, va: u64, how: DeviceAccess, len: usize, op: &mut impl FnMut(&mut [u8])) {
        let at = (va % BYTES) as usize..(va % BYTES) as usize + len;
        let gone = || self.wrong(format!("page {page}, which {va:#x} leads to, was freed before it was unmapped"));
        // Others come in between here.
        crate::sync::yield_now();
        if how == DeviceAccess::Atomic {
            let Some(before) = self.0.shelf.with(page, |bytes| bytes[at.clone()].to_vec()) else { return gone() };
            crate::sync::yield_now();
            if self.0.shelf.with(page, |bytes| bytes[at.clone()] == before[..]) == Some(false) {
                self.wrong(format!("{va:#x} was changed by somebody else in the middle of an atomic (rule G14)"));
            }
        }
        if self.0.shelf.with(page, |bytes| op(&mut bytes[at.clone()])).is_none() {
            gone();
        }
    }

    /// Makes an access to the host's memory, which takes its time: the table says all the while that the device may.
    fn in_place(&self, engine: &Tried, va: u64, access: impl FnOnce() -> bool) -> bool {
        let vpn = engine.geometry.vpn(Va(va));
        crate::sync::yield_now();
        let done = access();
        crate::sync::yield_now();
        let state = engine.table.look(vpn).map(|(entry, _)| entry.state());
        // Who takes memory away that stays where it is takes the region first, and then waits for the access.
        let may_stay = engine.region(vpn).is_none_or(|r| r.attributes.has(Attributes::IN_PLACE));
        if may_stay && matches!(state, None | Some(State::Empty)) {
            return done;
        }
        let fine = match state {
            Some(State::Shared { sharers, .. }) => sharers.has(self.mmu()),
            Some(State::Coherent { .. }) => true,
            _ => false,
        };
        if !fine {
            self.wrong(format!("{va:#x} became {state:?} while it was accessed in place (rule G10)"));
        }
        done
    }

    /// What is wrong with entering `m`, as far as it concerns this chip alone.
    fn look_at(&self, m: &Mapping) -> Result<(), String> {
        let size = if m.bytes == BLOCK { 512 } else { 1 };
        let aligned = [BYTES, BLOCK].contains(&m.bytes) && m.va.is_multiple_of(m.bytes);
        if !aligned {
            return Err(format!("{m:?} is neither a page nor a block"));
        }
        match m.to {
            Target::Own(page) if !page.is_multiple_of(size) => Err(format!("{m:?} is no block of the device")),
            Target::Own(page) if (page..page + size).any(|p| self.0.shelf.with(p, |_| ()).is_none()) => {
                Err(format!("{m:?} leads to memory that holds nothing"))
            }
            Target::Zero if m.writable => Err(format!("{m:?}: zeros are never writable (rule G3)")),
            Target::Zero if !self.0.info.zero_page => Err(format!("{m:?}, and it has no page of zeros")),
            Target::Host if !self.0.info.remote => Err(format!("{m:?}, and it cannot access the host's memory")),
            _ => Ok(()),
        }
    }

    fn enter(&self, m: &Mapping) {
        if let Err(wrong) = self.look_at(m) {
            return self.wrong(wrong);
        }
        let mut guard = self.0.fleet.0.lock();
        let ground = &mut *guard;
        let range = m.va..m.va + m.bytes;
        let table = &mut ground.tables[self.0.at];
        if table.pending.iter().any(|p| p.range.start < range.end && range.start < p.range.end) {
            ground.wrong.push(format!("{}: {m:?} is entered while it is being unmapped", self.0.name));
        }
        let block = (m.bytes == BLOCK).then_some(m.va);
        for i in 0..m.bytes / BYTES {
            let va = m.va + i * BYTES;
            let to = if let Target::Own(page) = m.to { Target::Own(page + i) } else { m.to };
            let new = Entered { to, writable: m.writable, block };
            if let Err(wrong) = ground.judge(self.0.at, va, new) {
                ground.wrong.push(wrong);
            }
            let table = &mut ground.tables[self.0.at];
            if let Target::Own(page) = to
                && let Some(other) = table.maps(&(page..page + 1), false).filter(|other| *other != va)
            {
                ground.wrong.push(format!("{}: page {page} is mapped at {other:#x} and {va:#x}", self.0.name));
            }
            ground.tables[self.0.at].entered.insert(va, new);
        }
    }

    /// Notes it as wrong if `pages` are mapped, for writing if that is asked for, while the engine does `what` to them.
    fn must_be_unmapped(&self, pages: Range<u64>, writing: bool, what: &str) {
        let mut ground = self.0.fleet.0.lock();
        let table = &ground.tables[self.0.at];
        if let Some(va) = table.maps(&pages, writing).filter(|_| !table.cut) {
            let wrong = format!("{}: pages {pages:?} are {what} while {va:#x} leads there", self.0.name);
            ground.wrong.push(wrong);
        }
    }
}

impl Device for Chip {
    fn describe(&self) -> Descriptor {
        let mut info = match self.0.coherent {
            true => Descriptor::coherent(self.0.name.clone(), self.0.shelf.pages),
            false => Descriptor::private(self.0.name.clone(), self.0.shelf.pages),
        };
        info.takes_evicted = self.0.takes_evicted;
        info
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for store in batch.iter() {
            let pages = store.page..store.page + (store.bytes.len() / PAGE) as u64;
            self.must_be_unmapped(pages, false, "written to");
        }
        self.0.shelf.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for load in batch.iter() {
            self.must_be_unmapped(load.page..load.page + (load.bytes.len() / PAGE) as u64, true, "read");
        }
        self.0.shelf.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.must_be_unmapped(pages.first..pages.first + pages.count, false, "freed");
        for first in pages.first..pages.first + pages.count {
            // What could not be stored is freed as well.
            if self.0.shelf.with(first, |_| ()).is_some() {
                self.0.shelf.freed(DevicePages { first, count: 1 });
            }
        }
    }

    fn mmu(&self) -> Option<&dyn Mmu> {
        Some(self)
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        self.0.shelf.shared(page)
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        if !self.0.able {
            return Err(DeviceError::Unsupported);
        }
        let zeros = vec![0; pages.count as usize * PAGE];
        let mut batch = [Store::new(pages.first, &zeros)];
        self.store(&mut batch);
        let [store] = batch;
        store.result
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        let peer = peer.as_any().and_then(|any| any.downcast_ref::<Chip>()).filter(|peer| self.0.able && peer.0.able);
        for copy in batch {
            let Some(peer) = peer else {
                copy.result = Err(DeviceError::Unsupported);
                continue;
            };
            let mut bytes = vec![0; copy.bytes as usize];
            let mut load = [Load::new(copy.from / BYTES, &mut bytes)];
            peer.load(&mut load);
            let [load] = load;
            copy.result = load.result.and_then(|()| {
                let mut store = [Store::new(copy.to / BYTES, &bytes)];
                self.store(&mut store);
                let [store] = store;
                store.result
            });
        }
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}

impl Mmu for Chip {
    fn describe(&self) -> MmuDescriptor {
        self.0.info.clone()
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let trouble = &self.0.trouble;
        let one_in = trouble.bad_maps.load(Relaxed);
        let n = trouble.count.fetch_add(1, Relaxed);
        if one_in > 0 && n % one_in == one_in - 1 {
            // Some of it may be entered.
            batch.iter().take((n / one_in % 2) as usize).for_each(|m| self.enter(m));
            return Err(DeviceError::Io(12));
        }
        batch.iter().for_each(|m| self.enter(m));
        Ok(())
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        let mut ground = self.0.fleet.0.lock();
        let table = &mut ground.tables[self.0.at];
        if self.0.trouble.keeps.load(Relaxed) {
            table.cut = true;
            return Err(DeviceError::Io(16));
        }
        // A block goes as a whole.
        let mut range = addresses.clone();
        for block in table.entered.range(addresses).filter_map(|(_, e)| e.block) {
            range = range.start.min(block)..range.end.max(block + BLOCK);
        }
        if !self.0.lazy && !table.is_busy(&range) {
            table.take_away(&range);
            return Ok(Progress::Done);
        }
        table.fences += 1;
        let fence = table.fences;
        table.pending.push(Pending { fence, range, polls: if self.0.lazy { 2 } else { 0 } });
        Ok(Progress::Pending(fence))
    }

    fn is_done(&self, fence: u64) -> Result<bool, DeviceError> {
        let mut ground = self.0.fleet.0.lock();
        let table = &mut ground.tables[self.0.at];
        let Some(i) = table.pending.iter().position(|p| p.fence == fence) else { return Ok(true) };
        if table.pending[i].polls > 0 {
            table.pending[i].polls -= 1;
            return Ok(false);
        }
        let range = table.pending[i].range.clone();
        table.take_away(&range);
        if table.is_busy(&range) {
            return Ok(false);
        }
        table.pending.swap_remove(i);
        Ok(true)
    }

    fn take_accessed(&self, addresses: Range<u64>) -> bool {
        let mut ground = self.0.fleet.0.lock();
        let used = &mut ground.tables[self.0.at].used;
        let there: Vec<u64> = used.range(addresses).copied().collect();
        used.retain(|va| !there.contains(va));
        !there.is_empty()
    }
}

/// The addresses of page `n` of `range`.
pub(super) fn page_at(range: VaRange, n: usize) -> u64 {
    range.start.0 + (n * PAGE) as u64
}

/// The accesses that tests make: to words.
impl Chip {
    pub(super) fn get(&self, rig: &Rig, va: u64) -> Result<u64, FaultError> {
        let mut word = 0;
        self.access(&rig.engine, va, DeviceAccess::Read, 8, |b| {
            word = u64::from_ne_bytes((&*b).try_into().unwrap())
        })?;
        Ok(word)
    }

    pub(super) fn put(&self, rig: &Rig, va: u64, word: u64) -> Result<(), FaultError> {
        self.access(&rig.engine, va, DeviceAccess::Write, 8, |b| b.copy_from_slice(&word.to_ne_bytes()))
    }

    /// Adds to a word in one step.
    pub(super) fn add(&self, rig: &Rig, va: u64, n: u64) -> Result<(), FaultError> {
        self.access(&rig.engine, va, DeviceAccess::Atomic, 8, |b| {
            let sum = u64::from_ne_bytes((&*b).try_into().unwrap()) + n;
            b.copy_from_slice(&sum.to_ne_bytes());
        })
    }
}
