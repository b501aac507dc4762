//! What a device does to memory on behalf of a file: reading and writing by its own translations, with faults in rounds.
//!
//! An access begins with what is mapped. At the first page that is not, all of the rest is faulted, which is one round; then it
//! goes on. Others may take translations away meanwhile, so there may be more rounds, but not for ever.

use crate::changes;
use crate::device::{Access, Mirror, PAGE, Tried};
use crate::table::Slot;
use crate::world::{Member, World};
use peerspace::device::mmu::FaultError;
use peerspace::{Error, Residence};
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::linux::signal::without_signals;
use peerspace_os::own::Buffer;
use rustix::io::Errno;
use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long an access may go on without an end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often memory is to be taken in hand that others take in hand, or give up, at the same time.
const TRIES: u32 = 8;
/// Pages accessed at once: signals wait for them.
const RUN: u64 = 64;

/// Bytes on their way between a device and the program.
pub(crate) struct Bounce {
    buffer: Buffer,
    len: usize,
}

impl Bounce {
    /// For so many bytes: zeros.
    ///
    /// # Errors
    /// ENOMEM when there is less memory than that.
    pub(crate) fn new(bytes: u64) -> Result<Bounce, Errno> {
        let len = possible(bytes)?;
        Buffer::new(len).map(|buffer| Bounce { buffer, len }).map_err(|_| Errno::NOMEM)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }
}

/// So many bytes, if there can be as many.
fn possible(bytes: u64) -> Result<usize, Errno> {
    let fits = bytes <= peerspace_os::linux::probe::ram_bytes();
    usize::try_from(bytes).ok().filter(|_| fits).ok_or(Errno::NOMEM)
}

/// A device, a file that is open on it, and the pages that are asked about.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) world: &'a World,
    pub(crate) member: &'a Member,
    pub(crate) slot: Slot,
    pub(crate) range: VaRange,
}

impl Work<'_> {
    pub(crate) fn mirror(&self) -> &Mirror {
        &self.member.mirror
    }

    pub(crate) fn pages(&self) -> u64 {
        self.range.len() / PAGE
    }

    /// A byte for each page. On the heap, since a mapping of its own might take a place where the program has none, and be seen there.
    ///
    /// # Errors
    /// ENOMEM when there is less memory than that.
    pub(crate) fn byte_for_each(&self, byte: u8) -> Result<Vec<u8>, Errno> {
        let pages = possible(self.pages())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(pages).map_err(|_| Errno::NOMEM)?;
        bytes.resize(pages, byte);
        Ok(bytes)
    }

    fn va(&self, nth: u64) -> u64 {
        self.range.start.0 + nth * PAGE
    }

    /// The pages from the one with this number on.
    pub(crate) fn rest(&self, nth: u64) -> VaRange {
        VaRange { start: Va(self.va(nth)), end: self.range.end }
    }

    /// The page with this number is why the request is refused.
    fn refused(&self, nth: u64, errno: Errno, why: &dyn Display) -> Errno {
        let start = Va(self.va(nth));
        self.world.refused(errno, VaRange { start, end: Va(start.0 + PAGE) }, why)
    }

    /// The device accesses all pages. The result: whether anything had to be faulted.
    pub(crate) fn access(&self, bounce: &mut Bounce, write: bool) -> Result<bool, Errno> {
        let begun = Instant::now();
        let (mut done, mut faulted) = (0, false);
        loop {
            let (came_to, tried) = self.run(done, bounce, write);
            done = came_to;
            match tried {
                Tried::Done => return Ok(faulted),
                Tried::Failed(e) => return Err(self.refused(done, Errno::IO, &e)),
                Tried::Missing | Tried::Stale if begun.elapsed() > PATIENCE => {
                    return Err(self.refused(
                        done,
                        Errno::BUSY,
                        &"others take the translations away again and again",
                    ));
                }
                Tried::Missing => self.fault(done, write)?,
                Tried::Stale => {
                    self.world.take_in_hand(self.rest(done), write, Errno::FAULT)?;
                    let anew = self.mirror().fault_anew(self.va(done), self.slot, write);
                    anew.map_err(|e| self.refused(done, errno(&e), &e))?;
                }
            }
            faulted = true;
        }
    }

    /// Reads what the device has, without faults. Returns how many pages there were before the first that it has not.
    pub(crate) fn read_own(&self, bounce: &mut Bounce) -> Result<u64, Errno> {
        match self.run(0, bounce, false) {
            (done, Tried::Failed(e)) => Err(self.refused(done, Errno::IO, &e)),
            (done, _) => Ok(done),
        }
    }

    /// Accesses pages from the one with number `done` on, as far as they are mapped. Returns how far, and why no further.
    fn run(&self, mut done: u64, bounce: &mut Bounce, write: bool) -> (u64, Tried) {
        while done < self.pages() {
            let end = (done + RUN).min(self.pages());
            let tried = without_signals(|| {
                while done < end {
                    let at = (done * PAGE) as usize..((done + 1) * PAGE) as usize;
                    let access = match write {
                        true => Access::Write(&bounce.bytes()[at]),
                        false => Access::Read(&mut bounce.bytes_mut()[at]),
                    };
                    match self.mirror().access(self.va(done), self.slot, access) {
                        Tried::Done => done += 1,
                        other => return other,
                    }
                }
                Tried::Done
            });
            if tried != Tried::Done {
                return (done, tried);
            }
        }
        (done, Tried::Done)
    }

    /// Faults all pages from the one with number `first` on.
    fn fault(&self, first: u64, write: bool) -> Result<(), Errno> {
        self.world.take_in_hand(self.rest(first), write, Errno::FAULT)?;
        for nth in first..self.pages() {
            let fault = || self.mirror().fault(self.va(nth), self.slot, write);
            match fault() {
                Ok(()) => {}
                // The mapping has been exchanged for another meanwhile.
                Err(FaultError::NotManaged(_)) => {
                    self.world.take_in_hand(self.rest(nth), write, Errno::FAULT)?;
                    fault().map_err(|e| self.refused(nth, errno(&e), &e))?;
                }
                Err(e) => return Err(self.refused(nth, errno(&e), &e)),
            }
        }
        Ok(())
    }
}

/// What a fault that failed is to the program.
pub(crate) fn errno(e: &FaultError) -> Errno {
    match e {
        FaultError::ReadOnly(_) => Errno::PERM,
        FaultError::NoRoom(_) => Errno::NOMEM,
        FaultError::Pinned(_) | FaultError::InPlace(_) | FaultError::NoHeadway(_) => Errno::BUSY,
        FaultError::Lost(..) | FaultError::Device(..) => Errno::IO,
        FaultError::Cut => Errno::NODEV,
        // Not mapped, protected, not ours to manage, beyond what can be translated.
        _ => Errno::FAULT,
    }
}

impl World {
    /// Sees to it that the space manages all of `range`, which is to be accessed, or to migrate.
    ///
    /// # Errors
    /// `errno` where nothing is mapped, or cannot be read, or not be managed; EPERM where it cannot be written and is to be.
    pub(crate) fn take_in_hand(&self, range: VaRange, write: bool, errno: Errno) -> Result<(), Errno> {
        for piece in self.mappings(range) {
            let (piece, vma) = piece.map_err(|hole| self.refused(errno, hole, &"nothing is mapped from there on"))?;
            if !vma.read {
                return Err(self.refused(errno, piece, &"the program may not read it"));
            }
            if write && !vma.write {
                return Err(self.refused(Errno::PERM, piece, &"the program may not write it"));
            }
            self.adopt(piece, errno)?;
        }
        Ok(())
    }

    /// Sees to it that the space manages all of `range`, a part of one mapping.
    ///
    /// # Errors
    /// `errno` when it cannot be managed.
    pub(crate) fn adopt(&self, range: VaRange, errno: Errno) -> Result<(), Errno> {
        let mut tries = 0;
        while !self.unmanaged(range).is_empty() {
            // What is adopted becomes a mapping of its own: not while a call moves it.
            let Some((part, e)) = changes::alone(|| self.adopt_unmanaged(range)) else { return Ok(()) };
            // Another thread may have been faster, with all of it or a part, or news have been on the way.
            tries += 1;
            if tries == TRIES {
                return Err(self.refused(errno, part, &e));
            }
            self.space.settle();
        }
        Ok(())
    }

    /// Has the space manage what of `range` it does not yet, for good: it goes with its mapping. What is refused, and why. The caller
    /// is [alone](changes::alone).
    pub(crate) fn adopt_unmanaged(&self, range: VaRange) -> Option<(VaRange, Error)> {
        self.unmanaged(range).into_iter().find_map(|part| {
            let adopted = self.space.adopt(part.start.0 as *const u8, part.len() as usize);
            adopted.map(std::mem::forget).err().map(|e| (part, e))
        })
    }

    /// The parts of `range` that the space does not manage.
    fn unmanaged(&self, range: VaRange) -> Vec<VaRange> {
        self.parts(range, |view| view.residence == Residence::Unmanaged)
    }
}
