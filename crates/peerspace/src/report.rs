//! What a space is doing, in numbers.

#[cfg(feature = "devices")]
use crate::attach::DeviceId;
#[cfg(feature = "devices")]
use crate::device::Usage;
use crate::engine::stats::{Histogram, Sums};
#[cfg(feature = "devices")]
use crate::engine::tier::Tier;
#[cfg(feature = "devices")]
use crate::error::Error;
use crate::space::Real;
#[cfg(feature = "devices")]
use crate::space::Space;
#[cfg(feature = "devices")]
use peerspace_core::addr::Geometry;
#[cfg(feature = "devices")]
use peerspace_core::sync::Ordering::Relaxed;
#[cfg(feature = "devices")]
use peerspace_core::words::Words;
use std::time::Duration;

/// Numbers of a space, from its start to now; in a forked process, from the fork on. Bytes are bytes, pages are base
/// pages, durations carry their unit.
///
/// Numbers are read one after the other while the space goes on: they are each right, but need not add up.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Statistics {
    /// The budget, in bytes.
    pub limit_bytes: u64,
    /// Bytes of RAM in use by managed memory: mapped, on standby, staged.
    pub used_bytes: u64,
    /// The most bytes that were in use.
    pub peak_bytes: u64,
    /// Bytes that were charged beyond the budget because no device had room.
    pub forced_bytes: u64,
    /// Of the bytes in use, those on standby: they can be had back without any transfer.
    pub standby_bytes: u64,
    /// Of the bytes in use, those in adopted memory that nobody has looked at yet: the kernel populated them.
    pub native_bytes: u64,
    /// Bytes that are kept resident; those that are so several times count several times.
    pub pinned_bytes: u64,
    /// Faults.
    pub faults: FaultStatistics,
    /// Pages brought in from devices, those read ahead included.
    pub pages_in: u64,
    /// Pages written to devices.
    pub pages_out: u64,
    /// Pages dropped without being written, because their device still had them.
    pub clean_dropped: u64,
    /// Of those, the ones that were compared with the device's copy first.
    pub compared_equal: u64,
    /// Pages that were all zeros when they left, and took no place on a device.
    pub zero_dropped: u64,
    /// Pages read ahead of streams.
    pub read_ahead: u64,
    /// Huge mappings made.
    pub huge_mapped: u64,
    /// Huge mappings broken into small ones.
    pub splits: u64,
    /// Small pages put together into huge ones, in huge mappings.
    pub collapses: u64,
    /// Huge folios, by the names of `/proc/vmstat`.
    pub thp: ThpStatistics,
    /// Pages unmapped to standby.
    pub unmapped: u64,
    /// Pages of adopted memory that were looked at for the first time.
    pub taken_in_hand: u64,
    /// Pages that were to be unmapped and could not be: pinned, or shared with a forked process.
    pub busy: u64,
    /// Rounds of reclaim that a faulting thread had to do itself.
    pub direct_reclaims: u64,
    /// Times the background reclaimer was woken.
    pub background_reclaims: u64,
    /// Attempts that had to wait for the program's own changes of its mappings.
    pub waits_for_changes: u64,
    /// Pages lost (rule Z9).
    pub poisoned: u64,
    /// Transfers that devices failed, other than for want of space. Most cost nothing but time: a failed load is
    /// tried again, a page that could not be stored stays in RAM.
    pub device_errors: u64,
    /// Pages that went to and fro between devices and the CPU so often that they were left where they were for a while (rule
    /// G8). A page that does so again counts again.
    pub truces: u64,
    /// The devices, in the order in which they are tried.
    pub devices: Vec<DeviceStatistics>,
}

/// Transparent huge pages (rules H1 to H11), by the names that the kernel has for the same things in `/proc/vmstat` and
/// `/proc/meminfo`. Events are counted from the start; sizes are those of now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "process", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct ThpStatistics {
    /// Faults that a huge folio resolved.
    pub thp_fault_alloc: u64,
    /// Faults that wanted a huge folio, and made do with small pages because none was to be had (H2).
    pub thp_fault_fallback: u64,
    /// Blocks of small pages that became huge folios (H3).
    pub thp_collapse_alloc: u64,
    /// Blocks that did not, because there was no huge page to be had.
    pub thp_collapse_alloc_failed: u64,
    /// Huge folios split into folios of one page (H6).
    pub thp_split_page: u64,
    /// Splits that were refused because somebody relied on the folio or worked with it (H5, H6).
    pub thp_split_page_failed: u64,
    /// Huge folios queued to be split when memory is short, because parts of them were discarded (H11).
    pub thp_deferred_split_page: u64,
    /// Huge mappings split into mappings of single pages (H6).
    pub thp_split_pmd: u64,
    /// Single pages that moved to make room for huge folios.
    pub pgmigrate_success: u64,
    /// Those that could not.
    pub pgmigrate_fail: u64,
    /// Bytes of managed memory that are mapped in huge folios now (`AnonHugePages`).
    pub anon_huge_bytes: u64,
}

/// Faults by what they took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FaultStatistics {
    /// All that were served, whatever became of them.
    pub total: u64,
    /// On memory never touched.
    pub zero_fill: u64,
    /// Resolved from standby.
    pub standby: u64,
    /// Resolved from a device.
    pub device: u64,
    /// Resolved by a huge folio.
    pub huge: u64,
    /// Pages made writable by a first write to one of them.
    pub upgrades: u64,
    /// On pages that were there already when the fault was looked at.
    pub spurious: u64,
    /// Half of all faults took no longer than this, from delivery to the resumption of the thread.
    pub p50: Duration,
    /// 99 % of all faults took no longer than this.
    pub p99: Duration,
}

/// Numbers of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceStatistics {
    /// Its name.
    pub name: String,
    /// private, coherent or persistent.
    pub memory: &'static str,
    /// The bytes that bound it.
    pub capacity_bytes: u64,
    /// Bytes it takes up.
    pub used_bytes: u64,
    /// The most it took up.
    pub peak_bytes: u64,
    /// Pages read from it.
    pub loads: u64,
    /// Pages written to it.
    pub stores: u64,
    /// Transfers it failed, other than for want of space.
    pub errors: u64,
    /// Bytes of host memory that the descriptors of its pages take up: those that are or were in use.
    pub metadata_bytes: u64,
    /// Bytes of its own memory that they take up (rule A2).
    pub own_metadata_bytes: u64,
    /// Bytes of it that the CPU maps in place (rule Z5).
    pub in_place_bytes: u64,
    /// Bytes of it that are not used any more, because what was there could not be had back (rule Z9).
    pub retired_bytes: u64,
    /// What its MMU has been told, of a device that runs code.
    pub mmu: Option<MmuStatistics>,
}

/// What the faults of a device that runs code came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MmuStatistics {
    /// Faults of the device.
    pub faults: u64,
    /// Pages that moved to the device.
    pub moved: u64,
    /// Pages of which it got copies.
    pub replicated: u64,
    /// Times that memory of the host was mapped in place.
    pub remote: u64,
    /// Times that translations were taken away.
    pub recalls: u64,
    /// Pages evicted from it for want of room.
    pub evicted: u64,
}

impl Statistics {
    pub(crate) fn of(engine: &Real) -> Statistics {
        let s: Sums = engine.sums();
        let g = engine.geometry;
        let latencies = engine.contexts.all().iter().map(|c| &c.as_ref().latency);
        let [p50, p99] = Histogram::quantiles(latencies, [0.5, 0.99]).map(Duration::from_nanos);
        Statistics {
            limit_bytes: g.bytes(engine.budget.limit()),
            used_bytes: (engine.budget.used().max(0) as u64) << g.page_shift(),
            peak_bytes: g.bytes(engine.budget.peak()),
            forced_bytes: g.bytes(engine.budget.forced()),
            standby_bytes: g.bytes(engine.standby_pages()),
            native_bytes: (engine.budget.native().max(0) as u64) << g.page_shift(),
            pinned_bytes: g.bytes(engine.budget.pinned()),
            faults: FaultStatistics {
                total: s.faults,
                zero_fill: s.zero_fill,
                standby: s.standby_hits,
                device: s.device_loads,
                huge: s.huge_faults,
                upgrades: s.upgrades,
                spurious: s.spurious,
                p50,
                p99,
            },
            pages_in: s.pages_in,
            pages_out: s.pages_out,
            clean_dropped: s.clean_dropped,
            compared_equal: s.compared_equal,
            zero_dropped: s.zero_dropped,
            read_ahead: s.read_ahead,
            huge_mapped: s.huge_mapped,
            splits: s.splits,
            collapses: s.collapses,
            thp: ThpStatistics {
                thp_fault_alloc: s.huge_faults,
                thp_fault_fallback: s.huge_fallbacks,
                thp_collapse_alloc: s.collapses,
                thp_collapse_alloc_failed: s.collapses_failed,
                thp_split_page: s.folio_splits,
                thp_split_page_failed: s.folio_splits_failed,
                thp_deferred_split_page: engine.blocks.deferrals(),
                thp_split_pmd: s.splits,
                pgmigrate_success: s.compact_migrated,
                pgmigrate_fail: s.compact_failed,
                anon_huge_bytes: engine.memmap.whole_mappings() * g.block_bytes() as u64,
            },
            unmapped: s.unmapped,
            taken_in_hand: s.taken_in_hand,
            busy: s.busy,
            direct_reclaims: s.direct_reclaims,
            background_reclaims: s.background_reclaims,
            waits_for_changes: s.changes,
            poisoned: s.poisoned,
            #[cfg(not(feature = "devices"))]
            truces: 0,
            #[cfg(feature = "devices")]
            truces: engine.places.truces(),
            #[cfg(not(feature = "devices"))]
            device_errors: 0,
            #[cfg(not(feature = "devices"))]
            devices: Vec::new(),
            #[cfg(feature = "devices")]
            device_errors: engine.tiers.iter().map(|t| t.errors.load(Relaxed)).sum(),
            #[cfg(feature = "devices")]
            devices: engine.tiers.iter().map(|tier| DeviceStatistics::of(g, &tier)).collect(),
        }
    }
}

#[cfg(feature = "devices")]
impl DeviceStatistics {
    fn of<W: Words>(g: Geometry, tier: &Tier<W>) -> DeviceStatistics {
        let pages = |n| g.bytes(peerspace_core::addr::Pages(n));
        let usage = tier.device().usage().unwrap_or_else(|| Usage {
            used_bytes: g.bytes(tier.used()),
            peak_bytes: pages(tier.most_used.load(Relaxed)),
        });
        let [host, own] = tier.metadata_bytes();
        DeviceStatistics {
            name: tier.info.name.clone(),
            memory: tier.info.memory.name(),
            capacity_bytes: match tier.info.capacity_bytes {
                0 => g.bytes(tier.info.pages),
                n => n,
            },
            used_bytes: usage.used_bytes,
            peak_bytes: usage.peak_bytes,
            loads: tier.loads.load(Relaxed),
            stores: tier.stores.load(Relaxed),
            errors: tier.errors.load(Relaxed),
            metadata_bytes: host,
            own_metadata_bytes: own,
            in_place_bytes: pages(tier.pages_in_place()),
            retired_bytes: g.bytes(tier.retired()),
            mmu: tier.mmu_statistics(),
        }
    }
}

#[cfg(feature = "devices")]
impl Space {
    /// The numbers of one device, as they are among the [space's](Space::statistics).
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] when it is not there.
    pub fn device_statistics(&self, device: DeviceId) -> Result<DeviceStatistics, Error> {
        let engine = self.engine();
        let tier = engine.tiers.by_id(device.0).ok_or(Error::NoSuchDevice)?;
        Ok(DeviceStatistics::of(engine.geometry, &tier))
    }
}
