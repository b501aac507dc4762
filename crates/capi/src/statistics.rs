//! What a space is doing, in numbers, as C has them: flat structures of 64-bit words, to which later versions add.

use crate::args::Versioned;
use peerspace::{DeviceStatistics, Statistics};
use std::ffi::c_char;
use std::time::Duration;

/// Numbers of a space, from its start to now; in a forked process, from the fork on. Bytes are bytes, pages are pages of
/// ps_page_size() bytes.
///
/// They are read one after the other while the space goes on: each is right, but they need not add up.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_statistics {
    /// sizeof(struct ps_statistics); afterwards, the bytes that were filled in.
    pub size: usize,
    /// The budget.
    pub limit_bytes: u64,
    /// RAM in use by managed memory: mapped, on standby, staged.
    pub used_bytes: u64,
    /// The most that was in use.
    pub peak_bytes: u64,
    /// Charged beyond the budget because no device had room.
    pub forced_bytes: u64,
    /// Of the bytes in use, those on standby: they can be had back without any transfer.
    pub standby_bytes: u64,
    /// Of the bytes in use, those in adopted memory that nobody has looked at yet.
    pub native_bytes: u64,
    /// Kept resident; what is so several times counts several times.
    pub pinned_bytes: u64,
    /// Faults that were served, whatever became of them.
    pub faults: u64,
    /// Of those, on memory never touched.
    pub faults_zero_fill: u64,
    /// Resolved from standby.
    pub faults_standby: u64,
    /// Resolved from a device.
    pub faults_device: u64,
    /// Resolved by a huge folio.
    pub faults_huge: u64,
    /// Pages made writable by a first write.
    pub faults_upgrades: u64,
    /// On pages that were there already when the fault was looked at.
    pub faults_spurious: u64,
    /// Half of all faults took no longer, in nanoseconds.
    pub faults_p50_ns: u64,
    /// 99 % of all faults took no longer.
    pub faults_p99_ns: u64,
    /// Pages brought in from devices, those read ahead included.
    pub pages_in: u64,
    /// Pages written to devices.
    pub pages_out: u64,
    /// Pages dropped without being written, because their device still had them.
    pub clean_dropped: u64,
    /// Of those, the ones that were compared first.
    pub compared_equal: u64,
    /// Pages that were all zeros when they left, and took no place on a device.
    pub zero_dropped: u64,
    /// Pages read ahead of streams.
    pub read_ahead: u64,
    /// Huge mappings made.
    pub huge_mapped: u64,
    /// Huge mappings broken into small ones.
    pub splits: u64,
    /// Blocks of small pages put together into huge ones.
    pub collapses: u64,
    /// Blocks that were not, for want of a huge page.
    pub collapses_failed: u64,
    /// Faults that wanted a huge folio, and made do with small pages (rule H2).
    pub huge_fallbacks: u64,
    /// Huge folios split into folios of one page (rule H6).
    pub folio_splits: u64,
    /// Splits that were refused because somebody relied on the folio (rules H5, H6).
    pub folio_splits_failed: u64,
    /// Huge folios queued to be split when memory is short (rule H11).
    pub folio_splits_deferred: u64,
    /// Managed memory that is mapped in huge folios now, in bytes.
    pub huge_bytes: u64,
    /// Pages unmapped to standby.
    pub unmapped: u64,
    /// Pages of adopted memory that were looked at for the first time.
    pub taken_in_hand: u64,
    /// Pages that were to be unmapped and could not be.
    pub busy: u64,
    /// Rounds of reclaim that a faulting thread had to do itself.
    pub direct_reclaims: u64,
    /// Times the background reclaimer was woken.
    pub background_reclaims: u64,
    /// Attempts that had to wait for the program's own changes of its mappings.
    pub waits_for_changes: u64,
    /// Pages lost (rule Z9).
    pub poisoned: u64,
    /// Transfers that devices failed, other than for want of space.
    pub device_errors: u64,
    /// Pages that went to and fro so often that they were left where they were for a while.
    pub truces: u64,
    /// Devices there are.
    pub devices: u64,
}

// SAFETY: repr(C), begins with its size; numbers of eight bytes.
unsafe impl Versioned for ps_statistics {}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl ps_statistics {
    pub(crate) fn of(s: &Statistics) -> ps_statistics {
        ps_statistics {
            size: size_of::<ps_statistics>(),
            limit_bytes: s.limit_bytes,
            used_bytes: s.used_bytes,
            peak_bytes: s.peak_bytes,
            forced_bytes: s.forced_bytes,
            standby_bytes: s.standby_bytes,
            native_bytes: s.native_bytes,
            pinned_bytes: s.pinned_bytes,
            faults: s.faults.total,
            faults_zero_fill: s.faults.zero_fill,
            faults_standby: s.faults.standby,
            faults_device: s.faults.device,
            faults_huge: s.faults.huge,
            faults_upgrades: s.faults.upgrades,
            faults_spurious: s.faults.spurious,
            faults_p50_ns: ns(s.faults.p50),
            faults_p99_ns: ns(s.faults.p99),
            pages_in: s.pages_in,
            pages_out: s.pages_out,
            clean_dropped: s.clean_dropped,
            compared_equal: s.compared_equal,
            zero_dropped: s.zero_dropped,
            read_ahead: s.read_ahead,
            huge_mapped: s.huge_mapped,
            splits: s.splits,
            collapses: s.collapses,
            collapses_failed: s.thp.thp_collapse_alloc_failed,
            huge_fallbacks: s.thp.thp_fault_fallback,
            folio_splits: s.thp.thp_split_page,
            folio_splits_failed: s.thp.thp_split_page_failed,
            folio_splits_deferred: s.thp.thp_deferred_split_page,
            huge_bytes: s.thp.anon_huge_bytes,
            unmapped: s.unmapped,
            taken_in_hand: s.taken_in_hand,
            busy: s.busy,
            direct_reclaims: s.direct_reclaims,
            background_reclaims: s.background_reclaims,
            waits_for_changes: s.waits_for_changes,
            poisoned: s.poisoned,
            device_errors: s.device_errors,
            truces: s.truces,
            devices: s.devices.len() as u64,
        }
    }
}

/// Numbers of a device, from when it came to now.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_device_statistics {
    /// sizeof(struct ps_device_statistics); afterwards, the bytes that were filled in.
    pub size: usize,
    /// Its name; what does not fit is cut off, and the last byte is 0.
    pub name: [c_char; 64],
    /// "private", "coherent" or "persistent".
    pub memory: [c_char; 16],
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
    /// Host memory that the descriptors of its pages take up.
    pub metadata_bytes: u64,
    /// Its own memory that they take up (rule A2).
    pub own_metadata_bytes: u64,
    /// Bytes of it that the CPU maps in place (rule Z5).
    pub in_place_bytes: u64,
    /// 1 for a device that runs code; what follows is 0 for others.
    pub has_mmu: u64,
    /// Faults of the device.
    pub mmu_faults: u64,
    /// Pages that moved to it because it used them.
    pub mmu_moved: u64,
    /// Pages of which it got copies.
    pub mmu_replicated: u64,
    /// Times that memory of the host was mapped in place for it.
    pub mmu_remote: u64,
    /// Times that translations were taken away.
    pub mmu_recalls: u64,
    /// Pages evicted from it for want of room.
    pub mmu_evicted: u64,
    /// Bytes of it that are not used any more, because what was there could not be had back (rule Z9).
    pub retired_bytes: u64,
}

// SAFETY: repr(C), begins with its size; bytes in multiples of eight, and numbers of eight bytes.
unsafe impl Versioned for ps_device_statistics {}

/// As much of a text as fits, and a 0.
fn bytes<const N: usize>(text: &str) -> [c_char; N] {
    let mut to = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    to.iter_mut().zip(text[..end].bytes()).for_each(|(to, from)| *to = from as c_char);
    to
}

impl ps_device_statistics {
    pub(crate) fn of(d: &DeviceStatistics) -> ps_device_statistics {
        let mmu = d.mmu.unwrap_or_default();
        ps_device_statistics {
            size: size_of::<ps_device_statistics>(),
            name: bytes(&d.name),
            memory: bytes(d.memory),
            capacity_bytes: d.capacity_bytes,
            used_bytes: d.used_bytes,
            peak_bytes: d.peak_bytes,
            loads: d.loads,
            stores: d.stores,
            errors: d.errors,
            metadata_bytes: d.metadata_bytes,
            own_metadata_bytes: d.own_metadata_bytes,
            in_place_bytes: d.in_place_bytes,
            has_mmu: d.mmu.is_some() as u64,
            mmu_faults: mmu.faults,
            mmu_moved: mmu.moved,
            mmu_replicated: mmu.replicated,
            mmu_remote: mmu.remote,
            mmu_recalls: mmu.recalls,
            mmu_evicted: mmu.evicted,
            retired_bytes: d.retired_bytes,
        }
    }
}
