//! The calls that reach a file, and the rings that make many of them at once.
//!
//! Everything the device asks of a file goes through [`Raw`], so that tests can make any of it fail.
//!
//! Locks: each ring has one, held for one batch. A caller takes the first free ring, beginning with that of its
//! processor, and waits for that one if all are taken. Rings are made when they are first needed, by system calls
//! alone.

use crate::sync::{Mutex, Padded};
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

/// A place for a ring.
#[derive(Debug, Default)]
struct Place {
    ring: Option<Ring>,
    /// None could be made, and so none is tried again.
    refused: bool,
}

/// The real thing.
#[derive(Debug, Default)]
pub(super) struct System {
    rings: [Padded<Mutex<Place>>; RINGS],
    /// Rings are of no use.
    without: bool,
}

impl System {
    /// One call for each request.
    pub(super) fn plain() -> System {
        System { without: true, ..System::default() }
    }

    /// With rings, of which the first is made.
    ///
    /// # Errors
    /// Why none can be had.
    pub(super) fn with_rings() -> Result<System, Errno> {
        let system = System::default();
        system.rings[0].lock().ring = Some(Ring::new()?);
        Ok(system)
    }

    fn by_ring(&self, pieces: &mut [Piece<'_>]) {
        let first = crate::engine::cpu() % RINGS;
        let free = (0..RINGS).find_map(|i| self.rings[(first + i) % RINGS].try_lock());
        let mut place = free.unwrap_or_else(|| self.rings[first].lock());
        if place.ring.is_none() && !place.refused {
            place.ring = Ring::new().ok();
            place.refused = place.ring.is_none();
        }
        let Some(ring) = &mut place.ring else {
            drop(place);
            return plain(pieces);
        };
        ring.run(pieces);
        if ring.is_broken() {
            place.ring = None;
        }
    }
}

impl Raw for System {
    fn transfer(&self, pieces: &mut [Piece<'_>]) {
        // One request needs no company.
        let one = pieces.windows(2).all(|w| w[0].is_followed_by(&w[1]));
        if one || self.without {
            plain(pieces);
        } else {
            self.by_ring(pieces);
        }
    }

    fn forked(&self) {
        // They are the parent's. A child makes its own when it needs them.
        for ring in &self.rings {
            *ring.lock() = Place::default();
        }
    }
}
