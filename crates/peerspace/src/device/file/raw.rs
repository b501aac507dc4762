//! The calls that reach a file, and the rings that make many of them at once.
//!
//! Everything the device asks of a file goes through [`Raw`], so that tests can make any of it fail.
//!
//! Locks: each ring has one, held for one batch. A caller takes the first free ring, beginning with that of its
//! processor, and waits for that one if all are taken. Rings are made when they are first needed, by system calls
//! alone.

use crate::sync::{Mutex, Padded};
use peerspace_core::sync::{AtomicBool, Ordering::Relaxed};
use peerspace_os::linux::transfer::{Piece, plain};
use peerspace_os::linux::uring::Ring;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::os::fd::BorrowedFd;

/// Rings of one device.
const RINGS: usize = 8;

/// What the device asks of files.
pub(super) trait Raw: Send + Sync {
    /// Moves `pieces`, which are in order of file and offset. Tries each once; see [`Piece::result`].
    fn transfer(&self, pieces: &mut [Piece<'_>]);

    /// Returns the space of `len` bytes at `at`.
    fn punch(&self, file: BorrowedFd<'_>, at: u64, len: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
    }

    /// This process is a child that was just forked.
    fn forked(&self) {}
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Unmade,
    Made(Ring),
    Refused,
}

/// The real thing.
#[derive(Debug, Default)]
pub(super) struct System {
    rings: [Padded<Mutex<Place>>; RINGS],
    /// No ring can be had: nobody need try.
    without: AtomicBool,
}

impl System {
    /// With the first ring made; or why there will be none.
    pub(super) fn new() -> (System, Result<(), Errno>) {
        let system = System::default();
        let made = match Ring::new() {
            Ok(ring) => {
                *system.rings[0].lock() = Place::Made(ring);
                Ok(())
            }
            Err(e) => {
                system.without.store(true, Relaxed);
                Err(e)
            }
        };
        (system, made)
    }

    fn by_ring(&self, pieces: &mut [Piece<'_>]) {
        let first = crate::engine::cpu() % RINGS;
        let free = (0..RINGS).find_map(|i| self.rings[(first + i) % RINGS].try_lock());
        let mut place = free.unwrap_or_else(|| self.rings[first].lock());
        if let Place::Unmade = *place {
            *place = Ring::new().map_or(Place::Refused, Place::Made);
        }
        let Place::Made(ring) = &mut *place else {
            drop(place);
            return plain(pieces);
        };
        ring.run(pieces);
        if ring.is_broken() {
            *place = Place::Unmade;
        }
    }
}

impl Raw for System {
    fn transfer(&self, pieces: &mut [Piece<'_>]) {
        // One request needs no company.
        let one = pieces.windows(2).all(|w| w[0].is_followed_by(&w[1]));
        if one || self.without.load(Relaxed) {
            plain(pieces);
        } else {
            self.by_ring(pieces);
        }
    }

    fn forked(&self) {
        // They are the parent's. A child makes its own when it needs them.
        for ring in &self.rings {
            *ring.lock() = Place::Unmade;
        }
    }
}
