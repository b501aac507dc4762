//! What an accelerator consists of, shared by its handles and its lanes: memory, page table, the state of each lane, and
//! the queue.
//!
//! # Who keeps what alive
//!
//! A [`Handle`] is what users and the engine have; there may be many. Handles and lanes share the [`Core`]. When the last
//! handle goes, the queue is closed; lanes end when the kernel that runs has ended, and the last of them drops the core.
//! Nobody waits for anybody, so that any thread may drop the last handle, a lane too. In a forked process there are no
//! lanes to drop their part: the core stays there for good.
//!
//! # Where things are
//!
//! All of it is in memory of our own: the engine calls with pages locked, and nothing of what it needs may be managed.

use super::error::{KernelError, LaunchError};
use super::failure::{Failure, Failures};
use super::link::Wire;
use super::options::Options;
use super::queue::Queue;
use super::table::{TABLES, Table};
use super::{Link, Touched};
use crate::device::DeviceError;
use crate::device::mmu::{FaultError, Port};
use crate::sync::Mutex;
use peerspace_core::shootdown::{Bars, Epoch, Section, Tlb, TlbEntry, cleared, wait_over};
use peerspace_os::Trouble;
use peerspace_os::devmem::DeviceMemory;
use peerspace_os::linux::futex::{wait_word, wake_word};
use peerspace_os::own::{Own, Shared, Vec};
use rustix::process::Pid;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Lanes stay out because the process is about to fork.
pub(super) const FORKING: Bars = 1;
/// Lanes stay out because the meaning of addresses is changing.
pub(super) const HALTED: Bars = 4;
/// Lanes stay out because the device is gone.
pub(super) const GONE: Bars = 2;

/// A number that one thread counts and others read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What belongs to one lane, and is looked at by others.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct LaneState {
    pub(super) section: Section,
    pub(super) tlb: Tlb<Vec<TlbEntry>>,
    pub(super) block_tlb: Tlb<Vec<TlbEntry>>,
    pub(super) hits: Count,
    pub(super) misses: Count,
    pub(super) faults: Count,
    pub(super) remote_read: Count,
    pub(super) remote_written: Count,
}

impl LaneState {
    fn new(tlb: usize) -> LaneState {
        let entries = |n: usize| {
            let mut entries = Vec::with_capacity_in(n, Own);
            entries.resize_with(n, TlbEntry::new);
            Tlb::new(entries)
        };
        LaneState {
            section: Section::new(),
            tlb: entries(tlb),
            block_tlb: entries((tlb / 8).max(4)),
            hits: Count::default(),
            misses: Count::default(),
            faults: Count::default(),
            remote_read: Count::default(),
            remote_written: Count::default(),
        }
    }
}

/// Bytes and transfers so far, of the engine's requests.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) into: AtomicU64,
    pub(super) out: AtomicU64,
    pub(super) from_peers: AtomicU64,
    pub(super) transfers: AtomicU64,
}

/// The device.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) options: Options,
    pub(super) page_shift: u32,
    /// Bytes of its memory, whole pages.
    pub(super) bytes: u64,
    pub(super) memory: DeviceMemory,
    pub(super) touched: Touched,
    pub(super) table: Table,
    /// Held while `table` is changed.
    pub(super) changing: Mutex<()>,
    pub(super) epoch: Epoch,
    pub(super) lanes: Vec<LaneState>,
    pub(super) port: Mutex<Option<Port>>,
    pub(super) queue: Queue,
    pub(super) failures: Failures,
    pub(super) wire: Wire,
    pub(super) moved: Moved,
    /// Counts what lanes that are kept out wait for.
    bell: AtomicU32,
    /// The process whose lanes run here.
    process: Pid,
    /// The memory is that of the process that this one was forked from.
    pub(super) foreign: AtomicBool,
}

impl Core {
    pub(super) fn new(options: Options) -> Result<Core, Trouble> {
        let page = rustix::param::page_size() as u64;
        let bytes = options.bytes / page * page;
        let len = usize::try_from(bytes).map_err(|_| Trouble::NoMemory)?;
        let memory = if options.coherent { DeviceMemory::shared(len)? } else { DeviceMemory::new(len)? };
        let mut lanes = Vec::with_capacity_in(options.lanes, Own);
        lanes.resize_with(options.lanes, || LaneState::new(options.tlb));
        Ok(Core {
            page_shift: page.trailing_zeros(),
            bytes,
            memory,
            touched: Touched::new(bytes / page)?,
            table: Table::new(TABLES)?,
            changing: Mutex::new(()),
            epoch: Epoch::new(),
            lanes,
            port: Mutex::new(None),
            queue: Queue::new(),
            failures: Failures::new(),
            wire: Wire::new(options.link),
            moved: Moved::default(),
            bell: AtomicU32::new(0),
            process: rustix::process::getpid(),
            foreign: AtomicBool::new(false),
            options,
        })
    }

    /// Bytes of a page.
    pub(super) fn page(&self) -> u64 {
        1 << self.page_shift
    }

    /// Whether this is the process that the device was made in.
    pub(super) fn at_home(&self) -> bool {
        rustix::process::getpid() == self.process
    }

    /// Where page `page` begins in the memory, if `bytes` from there on are in it.
    pub(super) fn place(&self, page: u64, bytes: u64) -> Result<usize, DeviceError> {
        let at =
            page.checked_mul(self.page()).filter(|at| at.checked_add(bytes).is_some_and(|end| end <= self.bytes));
        at.map(|at| at as usize).ok_or_else(invalid)
    }

    /// Counts a request to the device.
    pub(super) fn alive(&self) -> Result<(), DeviceError> {
        if self.failures.strikes(Failure::Gone) {
            self.epoch.bar(GONE);
            return Err(DeviceError::Gone);
        }
        Ok(())
    }

    fn sections(&self) -> impl Iterator<Item = &Section> + Clone {
        self.lanes.iter().map(|lane| &lane.section)
    }

    /// Takes translations of `pages`, which are gone from the table, out of each TLB. The result is the epoch to wait for.
    pub(super) fn shoot_down(&self, pages: Range<u64>) -> u64 {
        use super::table::FANOUT;
        cleared();
        let blocks = pages.start / FANOUT..pages.end.div_ceil(FANOUT);
        for lane in &self.lanes {
            lane.tlb.clear(pages.clone());
            lane.block_tlb.clear(blocks.clone());
        }
        self.epoch.advance()
    }

    /// Whether no lane is in a section from before the epoch any more.
    pub(super) fn is_over(&self, epoch: u64) -> bool {
        Epoch::is_over(epoch, self.sections())
    }

    /// Waits for that, but not for long: a lane that has lost its processor may be away for a while. Whether it is so.
    pub(super) fn wait_over(&self, epoch: u64) -> bool {
        // A section takes less than a microsecond, or some for a copy, unless its lane does not run.
        wait_over(epoch, self.sections(), 4000, |time| {
            if time > 100 {
                crate::sync::yield_now();
            }
        })
    }

    /// Waits until lanes may enter again, for an access to `va`; may return early.
    ///
    /// # Errors
    /// When they never may.
    pub(super) fn wait_unbarred(&self, bars: Bars, va: u64) -> Result<(), KernelError> {
        if bars & GONE != 0 {
            return Err(FaultError::Device(va, DeviceError::Gone).into());
        }
        // To be halted takes no longer than to act on a message.
        for _ in 0..64 {
            if self.epoch.bars() == 0 {
                return Ok(());
            }
            crate::sync::yield_now();
        }
        let seen = self.bell.load(Ordering::Acquire);
        if self.epoch.bars() & (FORKING | HALTED) != 0 {
            wait_word(&self.bell, seen, None);
        }
        Ok(())
    }

    /// Keeps lanes out of sections, and waits until none is in one.
    pub(super) fn hold_lanes(&self) {
        self.epoch.bar(FORKING);
        while !self.sections().all(Section::is_outside) {
            crate::sync::yield_now();
        }
    }

    /// Keeps lanes out of sections for a moment. The result is the epoch to wait for: then none is in one.
    pub(super) fn halt_lanes(&self) -> u64 {
        self.epoch.bar(HALTED);
        self.epoch.advance()
    }

    /// Lets lanes go on that were kept out because of `why`.
    pub(super) fn release_lanes(&self, why: Bars) {
        self.epoch.unbar(why);
        // Release: pairs with the Acquire in `wait_unbarred`.
        self.bell.fetch_add(1, Ordering::Release);
        wake_word(&self.bell, u32::MAX);
    }

    /// In a forked process: the lanes are not there.
    pub(super) fn forget_lanes(&self) {
        self.sections().for_each(Section::reset);
    }

    pub(super) fn mend(&self, failure: Failure) {
        self.failures.mend(failure);
        if failure == Failure::Gone {
            self.epoch.unbar(GONE);
        }
    }

    pub(super) fn launchable(&self) -> Result<Port, LaunchError> {
        if !self.at_home() {
            return Err(LaunchError::Forked);
        }
        if self.epoch.bars() & GONE != 0 || self.failures.is(Failure::Gone) {
            return Err(LaunchError::Gone);
        }
        self.port.lock().clone().ok_or(LaunchError::NotAttached)
    }
}

/// A request that names what is not there, or is not aligned.
pub(super) fn invalid() -> DeviceError {
    DeviceError::Io(rustix::io::Errno::INVAL.raw_os_error())
}

/// What users and the engine have of a device.
pub(super) struct Handle(pub(super) Shared<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        // In a forked process a lane of the parent may have had the queue locked. It stays as it is.
        if self.0.at_home() {
            self.0.queue.close();
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { name, lanes, link, .. } = &self.0.options;
        let link: &Option<Link> = link;
        write!(f, "Accelerator({name:?}, {} bytes, {lanes} lanes, {link:?})", self.0.bytes)
    }
}

/// What a device has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AcceleratorStatistics {
    /// Bytes that came from the host into its memory, by transfers.
    pub bytes_in: u64,
    /// Bytes that went from its memory to the host, by transfers.
    pub bytes_out: u64,
    /// Bytes that came from other devices' memory, or from elsewhere in its own, without the host.
    pub peer_bytes_in: u64,
    /// Bytes of the host's memory that kernels have read in place.
    pub remote_bytes_read: u64,
    /// Bytes of the host's memory that kernels have written in place.
    pub remote_bytes_written: u64,
    /// Transfers, of any number of bytes: those into its memory, out of it, and from other devices.
    pub transfers: u64,
    /// Faults of its kernels.
    pub faults: u64,
    /// Accesses of its kernels, piece by piece, for which a lane's TLB had the translation.
    pub tlb_hits: u64,
    /// Those for which it had not.
    pub tlb_misses: u64,
    /// How long its link was busy, both directions added up. Zero without a link.
    pub link_busy: Duration,
}

impl Core {
    pub(super) fn statistics(&self) -> AcceleratorStatistics {
        let sum = |count: fn(&LaneState) -> &Count| self.lanes.iter().map(|lane| count(lane).get()).sum();
        let moved = |count: &AtomicU64| count.load(Ordering::Relaxed);
        AcceleratorStatistics {
            bytes_in: moved(&self.moved.into),
            bytes_out: moved(&self.moved.out),
            peer_bytes_in: moved(&self.moved.from_peers),
            remote_bytes_read: sum(|lane| &lane.remote_read),
            remote_bytes_written: sum(|lane| &lane.remote_written),
            transfers: moved(&self.moved.transfers),
            faults: sum(|lane| &lane.faults),
            tlb_hits: sum(|lane| &lane.hits),
            tlb_misses: sum(|lane| &lane.misses),
            link_busy: self.wire.busy(),
        }
    }
}
