//! What an [`Accelerator`](super::Accelerator) is to be like.

use crate::device::mmu::Mode;
use std::ops::Range;
use std::time::Duration;

/// How fast a device is reached. Each direction is a lane of its own, on which one transfer follows the other; so a
/// transfer takes the latency, its bytes at this speed, and the time until those before it are through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Bytes each second in each direction. 0 counts as 1.
    pub bytes_per_second: u64,
    /// From the start of a transfer to its first byte.
    pub latency: Duration,
}

/// What an [`Accelerator`](super::Accelerator) is made of. See each function for what holds without it.
#[derive(Debug, Clone)]
#[must_use]
pub struct Options {
    pub(super) bytes: u64,
    pub(super) lanes: usize,
    pub(super) link: Option<Link>,
    pub(super) mode: Mode,
    pub(super) remote: bool,
    pub(super) zero_page: bool,
    pub(super) faults: bool,
    pub(super) addresses: Range<u64>,
    pub(super) occupied: Vec<Range<u64>>,
    pub(super) tlb: usize,
    pub(super) takes_evicted: bool,
    pub(super) coherent: bool,
    pub(super) name: String,
    pub(super) deadline: Duration,
}

impl Options {
    /// The most lanes there can be.
    pub const MAX_LANES: usize = 64;
    /// The most translations that the TLB of a lane can hold.
    pub const MAX_TLB: usize = 1 << 16;

    /// A device with `bytes` bytes of memory, rounded down to pages.
    pub fn new(bytes: u64) -> Options {
        Options {
            bytes,
            lanes: 2,
            link: None,
            mode: Mode::default(),
            remote: true,
            zero_page: true,
            faults: true,
            addresses: 0..1 << 47,
            occupied: Vec::new(),
            tlb: 512,
            takes_evicted: false,
            coherent: false,
            name: "accelerator".into(),
            deadline: Duration::from_secs(2),
        }
    }

    /// How many threads it runs kernels with, at least 1 and at most [`MAX_LANES`](Options::MAX_LANES). Otherwise 2.
    pub fn lanes(self, lanes: usize) -> Options {
        Options { lanes: lanes.clamp(1, Self::MAX_LANES), ..self }
    }

    /// How fast it is reached. Otherwise as fast as memory is.
    pub fn link(self, link: Link) -> Options {
        Options { link: Some(link), ..self }
    }

    /// Where its accesses go (rule G9). Otherwise [`Mode::Exclusive`].
    pub fn mode(self, mode: Mode) -> Options {
        Options { mode, ..self }
    }

    /// Whether it can access the host's memory in place (rule G10). Otherwise it can.
    pub fn remote(self, remote: bool) -> Options {
        Options { remote, ..self }
    }

    /// Whether it can map a page of zeros that takes up no memory (rule G3). Otherwise it can.
    pub fn zero_page(self, zero_page: bool) -> Options {
        Options { zero_page, ..self }
    }

    /// An access without a translation fails, instead of being a fault that is resolved.
    pub fn without_faults(self) -> Options {
        Options { faults: false, ..self }
    }

    /// The addresses that it can translate (rule G13). Otherwise those of a program: the lower 2^47 bytes.
    pub fn addresses(self, addresses: Range<u64>) -> Options {
        Options { addresses, ..self }
    }

    /// Addresses at which the device has something of its own, so that no region can be there (rule G13). May be said several
    /// times. Otherwise there are none.
    pub fn occupied(mut self, addresses: Range<u64>) -> Options {
        self.occupied.push(addresses);
        self
    }

    /// How many translations each lane remembers, rounded up to a power of two: of 4 at least and
    /// [`MAX_TLB`](Options::MAX_TLB) at most, and an eighth of that of blocks. Otherwise 512.
    pub fn tlb(self, entries: usize) -> Options {
        Options { tlb: entries.clamp(4, Self::MAX_TLB).next_power_of_two(), ..self }
    }

    /// Whether pages go there also when they leave RAM for want of room. Otherwise they do not.
    pub fn takes_evicted(self, takes_evicted: bool) -> Options {
        Options { takes_evicted, ..self }
    }

    /// Whether the CPU can map its memory in place (rule Z5): pages that are sent there are used by the CPU, the device's own code, and
    /// other devices that can access memory in place, without moving. Otherwise the memory is the device's alone.
    pub fn coherent(self, coherent: bool) -> Options {
        Options { coherent, ..self }
    }

    /// Its name in reports and errors. Otherwise "accelerator".
    pub fn name(self, name: impl Into<String>) -> Options {
        Options { name: name.into(), ..self }
    }

    /// How long it says it may take to stop using pages. Otherwise two seconds.
    pub fn deadline(self, deadline: Duration) -> Options {
        Options { deadline, ..self }
    }
}
