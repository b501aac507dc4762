//! The interface as its clients see it: requests, their argument, and the bytes of a snapshot.

/// The argument of every request; written back only when it has succeeded.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Command {
    /// The address asked about, a multiple of the page size.
    pub(crate) addr: u64,
    /// A buffer of the program's.
    pub(crate) ptr: u64,
    /// Pages asked about.
    pub(crate) npages: u64,
    /// Pages done.
    pub(crate) cpages: u64,
    /// Rounds of faults that it took.
    pub(crate) faults: u64,
}

impl Command {
    /// Bytes of it.
    pub(crate) const BYTES: usize = 40;

    /// What these bytes say.
    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Command {
        let word = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_ne_bytes(word)
        };
        Command { addr: word(0), ptr: word(1), npages: word(2), cpages: word(3), faults: word(4) }
    }

    /// It as bytes.
    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.addr, self.ptr, self.npages, self.cpages, self.faults];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// What a client can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// The device reads the pages at `addr` into `ptr`.
    Read,
    /// The device writes what is at `ptr` to the pages at `addr`.
    Write,
    /// The pages move into the device's memory; what the device has then is copied to `ptr`.
    MigrateToDevice,
    /// The pages move from the device's memory to the host.
    MigrateToSystem,
    /// A byte for each page, of what the mirror would see: see [`snapshot`].
    Snapshot,
    /// The pages become exclusive to the device; what it has is copied to `ptr`.
    Exclusive,
    /// A byte for each page: whether it is exclusive to the device still.
    CheckExclusive,
    /// Everything leaves the device's memory.
    Release,
    /// `npages` are [flags](FAIL_ALLOC).
    Flags,
}

/// Flag: the next allocation of a huge folio on the device fails.
pub(crate) const FAIL_ALLOC: u64 = 1;

/// `_IOWR('H', 0, 40 bytes)`.
const FIRST: u64 = 0xc028_4800;

impl Request {
    /// The request with this number.
    pub(crate) fn of(code: u64) -> Option<Request> {
        use Request::*;
        const ALL: [Request; 9] =
            [Read, Write, MigrateToDevice, MigrateToSystem, Snapshot, Exclusive, CheckExclusive, Release, Flags];
        // The C library hands a number of 32 bits on, which may have been sign-extended.
        let at = (code & 0xffff_ffff).checked_sub(FIRST)?;
        ALL.get(usize::try_from(at).ok()?).copied()
    }
}

/// The bytes of a snapshot.
pub(crate) mod snapshot {
    /// No mapping, or one that cannot be read.
    pub(crate) const ERROR: u8 = 0xff;
    /// Nothing is there yet, or it is private memory of another device.
    pub(crate) const NONE: u8 = 0;
    /// It can be read. One of these two is in all that follow.
    pub(crate) const READ: u8 = 1;
    /// It can be written.
    pub(crate) const WRITE: u8 = 2;
    /// It is mapped by an entry of 2 MiB.
    pub(crate) const PMD: u8 = 4;
    /// It is mapped by an entry of 1 GiB.
    pub(crate) const PUD: u8 = 8;
    /// The page of zeros.
    pub(crate) const ZERO: u8 = 0x10;
    /// Private memory of this device.
    pub(crate) const PRIVATE_HERE: u8 = 0x20;
    /// Coherent memory of this device.
    pub(crate) const COHERENT_HERE: u8 = 0x40;
    /// Coherent memory of another device.
    pub(crate) const COHERENT_ELSEWHERE: u8 = 0x50;
}
