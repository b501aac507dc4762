//! The engine: faults, reclaim and everything between, over the state and decisions of the core and one kernel.
//!
//! | file | subject |
//! |---|---|
//! | [`fault`] | a CPU fault, from the address to the page being there |
//! | [`pages`] | the same, page by page |
//! | [`block`] | the same, in huge folios |
//! | [`reclaim`] | unmapping victims to standby |
//! | [`evict`] | from standby to a device, or dropped |
//! | [`staging`] | where frames are meanwhile |
//! | [`tiers`], [`tier`] | the devices, and who owns each of their pages; `no_tiers.rs` in a build without any |
//! | [`detach`], [`empty`] | devices that come and go, and those that are emptied and stay |
//! | [`adopt`] | memory the program already has |
//! | [`stays`], [`stays_fault`] | memory the program has that stays where it is, and devices in it |
//! | [`own`] | regions of the space's own, made and given back |
//! | [`collapse`], [`compact`] | small pages become huge folios again, and room is made for them |
//! | [`migrate`], [`inplace`], [`placing`] | blocks and pages sent to a device, and mapped there in place |
//! | [`send`] | exactly the pages that somebody names, sent to a device or home |
//! | [`named`] | regions of persistent devices |
//! | [`hold`], [`cold`] | pages held where they are, and pages set aside |
//! | [`changes`], [`announce`] | what the program itself does to its memory, and the devices that use it |
//! | [`lost`] | pages that cannot be had back |
//! | [`ahead`] | reading ahead of streams |
//! | [`serve`] | the loops of the engine's own threads |
//! | [`folio`] | folios given back, split, and queued to be split |
//! | [`gate`] | keeps all of it apart from changes of mappings |
//! | [`turn`] | one at a time puts memory in place, forks, or detaches |
//! | [`budget`], [`context`], [`stats`] | accounts, places to work at, counters |
//! | [`check`] | the invariants, executable |
//!
//! # Who owns what
//!
//! The lock of a table entry is the only lock that decides about a page: whoever holds it owns the page's frame,
//! its device page, its staging slot and its mapping. Locks are taken in this order, and none is held while
//! waiting for an earlier one:
//!
//! 0. the [turn], by who puts memory of devices in place or takes it away, forks, or detaches,
//! 1. a [context](context) and the [budget] (neither is a lock on data),
//! 2. table entries, ascending; reclaim, which comes from the frame to the entry, only ever tries,
//! 3. a [section](gate) (short; nothing waits in it but [calls that are watched](watch)),
//! 4. the policy's lock, a tier's allocator, the books of staging: leaves, held for instructions.
//!
//! Device transfers happen with entries locked and no section. A thread that must wait for the gate, or wants
//! to reclaim for itself, first lets go of its entries.

pub(crate) mod adopt;
pub(crate) mod ahead;
#[cfg(feature = "devices")]
pub(crate) mod announce;
pub(crate) mod block;
pub(crate) mod budget;
pub(crate) mod changes;
pub(crate) mod check;
pub(crate) mod cold;
pub(crate) mod collapse;
pub(crate) mod compact;
pub(crate) mod context;
#[cfg(feature = "devices")]
pub(crate) mod copy;
#[cfg(feature = "devices")]
pub(crate) mod detach;
#[cfg(feature = "devices")]
pub(crate) mod device_fault;
#[cfg(feature = "devices")]
mod device_step;
#[cfg(feature = "devices")]
pub(crate) mod empty;
pub(crate) mod evict;
pub(crate) mod fault;
pub(crate) mod folio;
pub(crate) mod gate;
mod going;
pub(crate) mod hold;
#[cfg(all(test, feature = "soft", not(any(shuttle, miri))))]
mod inject_tests;
#[cfg(feature = "devices")]
pub(crate) mod inplace;
#[cfg(not(feature = "devices"))]
#[path = "no_inplace.rs"]
pub(crate) mod inplace;
#[cfg(feature = "devices")]
pub(crate) mod launch;
pub(crate) mod lost;
#[cfg(feature = "devices")]
pub(crate) mod make_room;
#[cfg(feature = "devices")]
pub(crate) mod migrate;
#[cfg_attr(not(feature = "devices"), path = "no_mmus.rs")]
pub(crate) mod mmus;
#[cfg(feature = "devices")]
pub(crate) mod named;
pub(crate) mod own;
pub(crate) mod pages;
#[cfg(feature = "devices")]
pub(crate) mod place;
#[cfg(feature = "devices")]
mod placing;
#[cfg(feature = "devices")]
pub(crate) mod prefetch;
pub(crate) mod reclaim;
#[cfg(feature = "devices")]
pub(crate) mod send;
pub(crate) mod serve;
// What a managed process does is part of the sequences; the model checker's races do without.
#[cfg(all(test, feature = "devices", any(shuttle, feature = "process")))]
mod sim_tests;
pub(crate) mod staging;
pub(crate) mod stats;
pub(crate) mod stays;
#[cfg(feature = "devices")]
mod stays_fault;
#[cfg(feature = "devices")]
pub(crate) mod tier;
#[cfg_attr(not(feature = "devices"), path = "no_tiers.rs")]
pub(crate) mod tiers;
#[cfg(feature = "devices")]
pub(crate) mod to_device;
pub(crate) mod turn;
mod watch;

use crate::sync::Mutex;
use budget::Budget;
use context::Contexts;
use gate::Gate;
use peerspace_core::addr::{BLOCK_PAGES, Geometry, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_core::entry::STAMPS;
use peerspace_core::memmap::{Arrival, Frame, Memmap};
use peerspace_core::plan::CLUSTER;
use peerspace_core::reclaim::{Incoming, Policy};
use peerspace_core::regions::{Attributes, RegionError, RegionInfo, Regions};
use peerspace_core::stream::Streams;
use peerspace_core::sync::{AtomicBool, AtomicU32, AtomicU64, Latch, Ordering::Relaxed};
use peerspace_core::table::{Locked, Table, TableMemory};
use peerspace_os::own::{Box, Vec};
use peerspace_os::{Kernel, Trouble};
use staging::{Blocks, Ring, SEGMENT};
use tiers::{OpenDevice, TierError, Tiers};

/// Bits of virtual addresses that programs are given unless they ask for more.
const VA_BITS: u32 = if cfg!(target_arch = "aarch64") { 48 } else { 47 };
/// Regions a space can manage: as many as a process can have mappings.
const MAX_REGIONS: usize = 1 << 16;

/// A space: its table, its frames, its devices, over one kernel.
pub(crate) struct Engine<K: Kernel> {
    pub(crate) kernel: K,
    pub(crate) geometry: Geometry,
    pub(crate) table: Table<K::Words, K::Park>,
    pub(crate) memmap: Memmap<K::Words>,
    pub(crate) regions: Regions<K::Words>,
    /// Guards changes to `regions` and to what the table covers.
    pub(crate) region_changes: Mutex<()>,
    pub(crate) contexts: Contexts,
    pub(crate) gate: Gate,
    pub(crate) budget: Budget,
    pub(crate) tiers: Tiers<K::Words>,
    pub(crate) inplace: inplace::InPlace,
    /// See [`turn`].
    turn: Latch,
    #[cfg(feature = "devices")]
    pub(crate) places: place::Places<K::Words>,
    #[cfg(feature = "devices")]
    pub(crate) prefetches: prefetch::Prefetches,
    #[cfg(feature = "devices")]
    pub(crate) launches: launch::Launches,
    #[cfg(feature = "devices")]
    pub(crate) announcements: announce::Announcements,
    pub(crate) ring: Ring<K::Words>,
    pub(crate) blocks: Blocks,
    pub(crate) policy: Mutex<Box<dyn Policy<K::Words>>>,
    pub(crate) incoming: Incoming,
    pub(crate) streams: Streams,
    pub(crate) service: serve::Service,
    /// Which life of the process this is (rule G12): write protection set up in another one is void.
    pub(crate) epoch: AtomicU32,
    /// Pages evicted so far: the clock that refault distances are measured by.
    evictions: AtomicU64,
    /// Called when a page is lost, before the program learns of it; not for each where there are many.
    pub(crate) on_loss: std::sync::OnceLock<fn()>,
    /// What the program has discarded of late.
    pub(crate) going: going::Going,
    /// Pages on the policy's protected list, as of its last work.
    protected: AtomicU64,
    pub(crate) huge: AtomicBool,
    /// The next huge frame is refused: for tests of what happens then (rule H2).
    pub(crate) refuses_block: AtomicBool,
    /// Where the search for native pages goes on.
    pub(crate) native_hand: AtomicU64,
    /// There are native pages, but no managed region has one: somebody should look for new mappings.
    pub(crate) native_missed: AtomicBool,
}

/// The lock of a table entry.
pub(crate) type Entry<'t, K> = Locked<'t, <K as Kernel>::Words, <K as Kernel>::Park>;

/// What an engine is made from.
pub(crate) struct Config<W> {
    /// Pages of RAM to make do with.
    pub(crate) limit: Pages,
    /// Pages of RAM that the machine has.
    pub(crate) ram: Pages,
    /// The devices, in the order in which they are tried.
    pub(crate) devices: Vec<OpenDevice>,
    /// Chooses victims.
    pub(crate) policy: Box<dyn Policy<W>>,
    /// Contexts to make.
    pub(crate) contexts: usize,
}

/// Why an engine could not be made.
#[derive(Debug)]
pub(crate) enum EngineError {
    /// The kernel refused memory for tables.
    Memory(Trouble),
    /// The device of this name cannot be used, for this reason.
    Device(String, String),
}

impl From<TierError<EngineError>> for EngineError {
    fn from(e: TierError<EngineError>) -> EngineError {
        match e {
            TierError::Refused(name, why) => EngineError::Device(name, why),
            TierError::Memory(e) => e,
        }
    }
}

/// How a staging area for `limit` pages is laid out: block frames, then slots. Block frames have their place even where
/// there are no huge pages: the kernel's side, which is laid out before that is known, says what is where.
pub(crate) fn staging_layout(limit: Pages) -> (u64, u64) {
    // A few more block frames than fit: frames whose parts are used one by one keep their number.
    let blocks = limit.0.div_ceil(BLOCK_PAGES) + 8;
    let slots = (limit.0 / 16).clamp(4 * SEGMENT as u64, 16384).next_multiple_of(SEGMENT as u64);
    (blocks, slots)
}

/// The smallest budget that can work, in pages: the ring, a cluster per context, and room to turn round in.
pub(crate) const MIN_LIMIT: Pages = Pages(1024);

impl<K: Kernel> Engine<K> {
    /// An engine without regions. `kernel`'s staging is laid out by [`staging_layout`].
    pub(crate) fn new(kernel: K, config: Config<K::Words>) -> Result<Engine<K>, EngineError> {
        assert!(config.limit >= MIN_LIMIT);
        let geometry = kernel.geometry();
        let huge = kernel.capabilities().huge;
        let (blocks, slots) = staging_layout(config.limit);
        let words = |n: usize| kernel.words(n, n).map_err(EngineError::Memory);
        // Twice the limit is what it takes as long as it is kept. Where no device has room it is exceeded, by as much
        // as there is RAM. Descriptors that are never used cost nothing but addresses.
        let least = config.limit.0 * 2 + slots;
        let most = (u32::MAX as u64 / 2).saturating_sub(blocks * (BLOCK_PAGES + 1)).max(least);
        let wanted = (config.ram.0 + slots).clamp(least, most);
        let (small, memmap) = [wanted, least]
            .into_iter()
            .find_map(|n| Some((n as u32, words(Memmap::<K::Words>::words_for(blocks as u32, n as u32)).ok()?)))
            .ok_or(EngineError::Memory(Trouble::NoMemory))?;
        let memory = Self::reserve_table(&kernel, geometry).map_err(EngineError::Memory)?;
        let memmap = Memmap::new(memmap, blocks as u32, small);
        let tiers = Tiers::new(geometry, memmap.end());
        for device in config.devices {
            tiers.attach(device, words)?;
        }
        let staging = kernel.staging();
        // At its end: where huge pages cannot be had, staging may still have room for block frames at its start.
        let slots_at = Va(staging.end.0 - slots * geometry.page_bytes() as u64);
        let buffer = CLUSTER.0 as usize * geometry.page_bytes();
        Ok(Engine {
            table: Table::new(geometry, memory, kernel.park()),
            memmap,
            regions: Regions::new(words(Regions::<K::Words>::words_for(MAX_REGIONS))?),
            region_changes: Mutex::new(()),
            contexts: Contexts::new(config.contexts, buffer).map_err(EngineError::Memory)?,
            gate: Gate::new(),
            budget: Budget::new(config.limit),
            tiers,
            inplace: inplace::InPlace::new(kernel.most_mappings()),
            #[cfg(feature = "devices")]
            places: place::Places::new(words)?,
            #[cfg(feature = "devices")]
            prefetches: prefetch::Prefetches::new(),
            #[cfg(feature = "devices")]
            launches: launch::Launches::new(),
            #[cfg(feature = "devices")]
            announcements: announce::Announcements::new(),
            turn: Latch::new(),
            ring: Ring::new(geometry, slots_at, (slots / SEGMENT as u64) as u32, words(slots as usize)?),
            blocks: Blocks::new(geometry, staging.start, blocks as u32),
            policy: Mutex::new(config.policy),
            incoming: Incoming::new(),
            streams: Streams::new(),
            service: serve::Service::new(),
            epoch: AtomicU32::new(0),
            evictions: AtomicU64::new(0),
            on_loss: std::sync::OnceLock::new(),
            going: going::Going::new(),
            protected: AtomicU64::new(0),
            huge: AtomicBool::new(huge),
            refuses_block: AtomicBool::new(false),
            native_hand: AtomicU64::new(0),
            native_missed: AtomicBool::new(false),
            geometry,
            kernel,
        })
    }

    /// Reserves address space for the table of whatever the program may ever manage: 8 TiB, or less where
    /// address space is limited. None of it is used yet.
    fn reserve_table(kernel: &K, geometry: Geometry) -> Result<TableMemory<K::Words>, Trouble> {
        let directory = Table::<K::Words, K::Park>::directory_words(geometry, VA_BITS);
        let mut blocks = 1usize << 22;
        loop {
            let all = || {
                Ok(TableMemory {
                    directory: kernel.words(directory, directory)?,
                    blocks: kernel.words(blocks * 4, 0)?,
                    leaves: kernel.words(blocks * BLOCK_PAGES as usize, 0)?,
                    links: kernel.words(blocks, 0)?,
                })
            };
            match all() {
                Ok(memory) => return Ok(memory),
                Err(e) if blocks <= 1 << 12 => return Err(e),
                Err(_) => blocks /= 4,
            }
        }
    }

    /// Makes the table's words for `range` usable, before it becomes a region. Returns how many blocks no region
    /// touched before, for [`insert_region`](Engine::insert_region). The caller holds `region_changes`.
    pub(crate) fn cover(&self, range: PageRange) -> Result<usize, AddError> {
        let new = self.lonely_blocks(range);
        let memory = self.table.memory();
        let need = self.table.needs(range, new);
        for (words, n) in [(&memory.blocks, need.blocks), (&memory.leaves, need.leaves), (&memory.links, need.links)]
        {
            self.kernel.grow(words, n).map_err(|_| AddError::TableFull(range))?;
        }
        self.table.cover(range, new).map_err(|_| AddError::TableFull(range))?;
        Ok(new)
    }

    /// Makes a covered range a region. The caller holds `region_changes`.
    pub(crate) fn insert_region(&self, range: PageRange, attributes: Attributes, new: usize) -> Result<(), AddError> {
        self.regions.insert(RegionInfo { range, attributes }).map_err(|e| {
            self.table.uncover(new);
            AddError::Region(e)
        })
    }

    /// Changes what is known about `range`.
    pub(crate) fn advise(
        &self,
        range: PageRange,
        change: impl Fn(Attributes) -> Attributes,
    ) -> Result<(), RegionError> {
        let _work = self.contexts.take();
        let _changes = self.region_changes.lock();
        self.regions.update(range, change)
    }

    /// Takes `range` out of all regions; calls `removed` with each piece. The pages keep their entries.
    pub(crate) fn remove_region(&self, range: PageRange, removed: impl FnMut(RegionInfo)) -> Result<(), RegionError> {
        let _changes = self.region_changes.lock();
        self.regions.remove(range, removed)
    }

    /// How many of the blocks that `range` touches no region touches.
    pub(crate) fn lonely_blocks(&self, range: PageRange) -> usize {
        let touched = |block: u64| {
            let block = PageRange::block(block);
            self.regions.next(block.start).is_some_and(|r| r.range.start < block.end)
        };
        // Only the first and the last block can be shared with regions outside of the range.
        let (first, last) = (range.start.block(), Vpn(range.end.0 - 1).block());
        let shared = touched(first) as usize + (last != first && touched(last)) as usize;
        (last - first + 1) as usize - shared
    }

    /// The region that holds `vpn`.
    pub(crate) fn region(&self, vpn: Vpn) -> Option<RegionInfo> {
        self.regions.find(vpn)
    }

    /// Whether huge pages are to be had.
    pub(crate) fn has_huge(&self) -> bool {
        self.huge.load(Relaxed)
    }

    /// True when the whole block of `vpn` lies in `region`.
    pub(crate) fn block_inside(&self, region: RegionInfo, vpn: Vpn) -> bool {
        region.range.covers(PageRange::block(vpn.block()))
    }

    /// The addresses of `pages`.
    pub(crate) fn addresses(&self, pages: PageRange) -> VaRange {
        self.geometry.range(pages)
    }

    /// Takes a small frame for the page at `vpn`. The page is charged already.
    pub(crate) fn new_frame(&self, vpn: Vpn) -> Option<Frame> {
        let frame = self.memmap.take_small()?;
        self.memmap.reset(frame);
        self.memmap.place(frame, vpn, self.life());
        Some(frame)
    }

    /// The current life, as noted in frames.
    pub(crate) fn life(&self) -> u8 {
        self.epoch.load(Relaxed) as u8
    }

    /// A frame is mapped from now on: the policy shall hear of it. To be called with the entry still locked, so
    /// that nobody frees the frame before it is on a list.
    pub(crate) fn announce(&self, frame: Frame, arrival: Arrival) {
        self.memmap.set_arrival(frame, arrival);
        self.incoming.push(&self.memmap, frame);
    }

    /// Takes a mapped frame off the policy's lists, because it is about to be freed. Its entry is locked.
    ///
    /// The policy's lock is needed even if the frame seems to be on no list: reclaim may have it in hand, and
    /// puts it back under that lock when it finds the entry locked.
    pub(crate) fn retract(&self, frame: Frame) {
        let mut policy = self.policy.lock();
        self.incoming.drain(&self.memmap, &mut **policy);
        policy.remove(&self.memmap, frame);
    }

    /// The stamp for a page evicted now.
    pub(crate) fn stamp(&self) -> u16 {
        let n = self.evictions.fetch_add(1, Relaxed);
        (n / self.stamp_unit() % STAMPS as u64) as u16
    }

    fn stamp_unit(&self) -> u64 {
        (self.budget.limit().0 / 256).max(1)
    }

    /// Whether a page evicted at `stamp` came back so soon that it should have been kept.
    pub(crate) fn arrival_of(&self, stamp: u16) -> Arrival {
        let now = (self.evictions.load(Relaxed) / self.stamp_unit() % STAMPS as u64) as u32;
        let distance = (now + STAMPS - stamp as u32) % STAMPS;
        let window = self.protected.load(Relaxed).max(self.budget.limit().0 / 2) / self.stamp_unit();
        if (distance as u64) < window { Arrival::Refault } else { Arrival::New }
    }

    pub(crate) fn note_protected(&self, pages: Pages) {
        self.protected.store(pages.0, Relaxed);
    }

    /// Waits until nothing is under way in the engine, and keeps it so while the guard lives: no fault is being
    /// resolved, nothing reclaimed, no message acted on. The calling thread has no context, and must not fault.
    pub(crate) fn rest(&self) -> Rest<'_> {
        self.contexts.freeze();
        Rest { contexts: &self.contexts }
    }

    /// In a forked child, at rest: forgets what belonged to the parent's threads, and makes void what its mappings
    /// proved (rule G12).
    pub(crate) fn begin_life(&self) {
        self.epoch.fetch_add(1, Relaxed);
        self.gate.renew();
        self.service.renew();
        #[cfg(feature = "devices")]
        {
            self.prefetches.renew();
            self.launches.renew();
            self.announcements.renew();
        }
        self.contexts.renew();
        self.tiers.renew();
        self.inplace.renew();
        // The thread that forked had it.
        self.turn.reset();
        for slot in self.contexts.all() {
            slot.as_ref().counters.reset();
            slot.as_ref().latency.reset();
        }
    }

    /// The sums of all counters.
    pub(crate) fn sums(&self) -> stats::Sums {
        let mut sums = stats::Sums::default();
        self.contexts.all().iter().for_each(|c| sums.add(&c.as_ref().counters));
        sums
    }
}

/// Keeps the engine at rest.
pub(crate) struct Rest<'a> {
    contexts: &'a Contexts,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.contexts.thaw();
    }
}

/// Why a range cannot be managed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddError {
    /// The logical table has no room for it.
    #[error("the table has no room for pages {0:?}")]
    TableFull(PageRange),
    /// It collides with another region, or there are too many.
    #[error("{0}")]
    Region(RegionError),
}

/// How long this thread has been running on a processor.
pub(crate) fn time_of_thread() -> std::time::Duration {
    #[cfg(not(any(shuttle, miri)))]
    {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        std::time::Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }
    #[cfg(any(shuttle, miri))]
    std::time::Duration::ZERO
}

/// The processor this thread runs on, or a guess.
pub(crate) fn cpu() -> usize {
    #[cfg(not(any(shuttle, miri)))]
    return rustix::thread::sched_getcpu();
    #[cfg(any(shuttle, miri))]
    return 0;
}
