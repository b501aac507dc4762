//! Memory the program got elsewhere, taken into a space; and memory kept resident for the kernel's use.

use crate::engine::adopt::AdoptError;
use crate::engine::hold::HoldError;
use crate::error::Error;
use crate::huge::Hint;
use crate::space::Space;
use peerspace_core::addr::{Access, DevicePfn, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_os::linux::fork::is_arena_start;
use peerspace_os::linux::map::ours_within;
use peerspace_os::linux::scan::{Nature, Vma};
use peerspace_os::linux::signal::without_signals;
use std::fmt;

/// Blocks that are held, or let go of, at once.
const PIECES: usize = 8;

/// What an access to held memory may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It is only read.
    Read,
    /// It is written, or read and written.
    Write,
}

impl From<Use> for Access {
    fn from(how: Use) -> Access {
        match how {
            Use::Read => Access::Read,
            Use::Write => Access::Write,
        }
    }
}

/// Memory of the program that a space manages until this is dropped. Then everything comes home, beyond the budget
/// if need be, and is the kernel's again; devices have no part in it any more.
#[must_use = "dropping it brings everything home at once"]
pub struct Adopted {
    space: Space,
    range: VaRange,
    /// It was given back already.
    released: bool,
}

/// Pages that stay resident until this is dropped: see [`Space::make_resident`].
#[must_use = "dropping it lets the pages go"]
pub struct Resident {
    space: Space,
    pages: PageRange,
    /// As they were counted.
    pinned: Pages,
}

impl Space {
    /// Manages memory that the program already has, from now on: the whole pages of `len` bytes from `start`. It may be memory
    /// of any kind (rules G1, G11), and a range may span mappings of several kinds.
    ///
    /// Nothing is moved before memory is scarce or a device wants it, and every pointer stays good. The program goes on to own
    /// the memory: it may unmap, move, discard, protect and fork as it likes, and the space follows.
    ///
    /// - *Private anonymous memory* (heap, mmap), whatever its protection, takes part in everything. A device may do there
    ///   what the program may at the time; what the program has protected since, the device is
    ///   [told](crate::device::mmu::FaultError).
    /// - *Everything else* stays where it is: shared memory, mappings of files, huge pages of the kernel's pool
    ///   (`MAP_HUGETLB`), executable memory, the page in which an arena of the C library's heap begins. It takes up nothing of
    ///   the budget and never moves. Devices with [`remote`](crate::device::mmu::MmuDescriptor::remote) access it in place, by
    ///   the program's permissions; for others it is [no way](crate::device::mmu::FaultError::NoWay) to be had. It is not
    ///   migrated, nobody has it [exclusively](crate::Space::exclusive), and hints say nothing to it. [`Adopted::in_place`]
    ///   says what of a range it is.
    ///
    /// Of some mappings the kernel tells nothing when they are changed: shared ones of files that were opened to be read alone
    /// and, before Linux 6.7, any of regular files. A device that uses such memory after the program has unmapped it gets an
    /// error; if something else has been mapped there meanwhile, it accesses that. So let go of the memory before it is
    /// unmapped, as of anything that somebody uses; or [announce](Space::announce) it.
    ///
    /// While memory of a file or shared memory is adopted, each of its pages takes a fault of the kernel's own when the CPU first
    /// uses it, where otherwise one brings in several.
    ///
    /// Not to be adopted: stacks, thread-local storage, and whatever the [devices](crate::device) of the space or the
    /// handlers of signals use.
    ///
    /// # Errors
    /// For a range that is empty, wraps, is not wholly mapped, is managed already, belongs to this library, or is a stack or
    /// memory of the kernel's own. Nothing is changed then.
    pub fn adopt(&self, start: *const u8, len: usize) -> Result<Adopted, Error> {
        let engine = self.engine();
        let bad = |why| Error::BadRange { what: format!("{len} bytes at {start:p}"), why };
        let range = VaRange::new(Va(start as u64), len as u64).ok_or_else(|| bad("the range wraps"))?;
        let range = engine.geometry.range(engine.geometry.pages_inside(range));
        if range.is_empty() {
            return Err(bad("there is no whole page in it"));
        }
        if let Some(own) = ours_within(range).next() {
            return Err(Error::BadRange {
                what: format!("{range}: it overlaps {own}"),
                why: "that is memory of the space itself",
            });
        }
        let parts = self.parts(range, &bad)?;
        // Dropped, it gives back what has been adopted so far.
        let mut adopted =
            Adopted { space: self.clone(), range: VaRange { start: range.start, end: range.start }, released: false };
        for (part, nature) in parts {
            let done = without_signals(|| match nature {
                Nature::InPlace => engine.adopt_in_place(part),
                _ => engine.adopt(part),
            });
            match done {
                Ok(()) => adopted.range.end = part.end,
                Err(AdoptError::Table(e)) => {
                    return Err(Error::BadRange {
                        what: format!("{range}: {e}"),
                        why: "it is managed already, or there is no room",
                    });
                }
                Err(AdoptError::Changed) => return Err(bad("its mappings are being changed")),
                Err(AdoptError::Kernel(why)) => {
                    return Err(Error::Kernel { what: format!("adopt {part}"), why });
                }
            }
        }
        Ok(adopted)
    }

    /// The parts that make up `range`, of one nature each, if it can all be managed.
    fn parts(&self, range: VaRange, bad: &dyn Fn(&'static str) -> Error) -> Result<Vec<(VaRange, Nature)>, Error> {
        let here = 0u8;
        let stack = Va(&raw const here as u64);
        let maps = self.engine().kernel.maps();
        let mut parts: Vec<(VaRange, Nature)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let vma: Option<Vma> = maps.at(at).map_err(|_| bad("the mappings of the process cannot be read"))?;
            let vma = vma.ok_or_else(|| bad("part of it is not mapped"))?;
            match vma.nature() {
                _ if vma.range.contains(stack) => return Err(bad("it holds the stack of the calling thread")),
                Nature::Stack => return Err(bad("it holds the stack of the first thread")),
                Nature::Special => return Err(bad("it holds memory that the kernel has mapped for itself")),
                nature => {
                    let mut part = VaRange { start: at, end: vma.range.end.min(range.end) };
                    if nature == Nature::Movable && is_arena_start(at) {
                        let behind = Va(at.0 + self.engine().geometry.page_bytes() as u64);
                        parts.push((VaRange { end: behind, ..part }, Nature::InPlace));
                        part.start = behind;
                    }
                    match parts.last_mut() {
                        Some((last, same)) if *same == nature => last.end = part.end,
                        _ if part.is_empty() => {}
                        _ => parts.push((part, nature)),
                    }
                }
            }
            at = vma.range.end;
        }
        Ok(parts)
    }

    /// Brings the pages of a part of a managed range into RAM, permits `how`, and keeps them so.
    ///
    /// With [`Faults::Signal`](crate::Faults::Signal), memory is made resident before it is handed to a system call
    /// (with [`Use::Write`] if the call writes to it) and for as long as the kernel may use it. With threads that is
    /// only needed for memory that must not move: buffers registered with io_uring, or used by a device.
    ///
    /// What is resident counts towards the budget, and nothing else can leave in its place. So there is a
    /// [limit](crate::Builder::pin_limit), by default three quarters of the budget. Its pages are pinned (rule H5): they
    /// stay where they are, and no collapse moves them.
    ///
    /// # Errors
    /// [`Error::TooManyPinned`] beyond the limit; [`Error::Lost`] if a page cannot be had back; [`Error::BadRange`] if
    /// one is not managed by this space; [`Error::Kernel`] if one cannot be taken from where it is in place on a device.
    /// Nothing is kept then.
    pub fn make_resident(&self, start: *const u8, len: usize, how: Use) -> Result<Resident, Error> {
        let engine = self.engine();
        let bad = |why| Error::BadRange { what: format!("{len} bytes at {start:p}"), why };
        let range = VaRange::new(Va(start as u64), len as u64).ok_or_else(|| bad("the range wraps"))?;
        let pages = engine.geometry.pages_out(range);
        engine.budget.pin(pages.pages()).map_err(|e| Error::TooManyPinned {
            asked: engine.geometry.bytes(pages.pages()),
            pinned: engine.geometry.bytes(e.pinned),
            most: engine.geometry.bytes(e.most),
        })?;
        // What is held already is let go of again if the rest cannot be.
        let none = PageRange { start: pages.start, end: pages.start };
        let mut held = Resident { space: self.clone(), pages: none, pinned: pages.pages() };
        let mut pieces = pages.by_block().peekable();
        while pieces.peek().is_some() {
            // Signals wait for a few blocks.
            without_signals(|| {
                for piece in pieces.by_ref().take(PIECES) {
                    engine.hold_pages(piece, how.into())?;
                    held.pages.end = piece.end;
                }
                Ok(())
            })
            .map_err(|e| self.cannot_hold(e, &bad))?;
        }
        Ok(held)
    }

    /// Sets managed memory aside. Returns how many bytes were.
    pub(crate) fn cold(&self, range: VaRange) -> usize {
        let engine = self.engine();
        let aside = without_signals(|| engine.set_aside(engine.geometry.pages_inside(range)));
        engine.geometry.bytes(Pages(aside)) as usize
    }

    /// What to tell the program of the page `vpn`, which was on the device page `pfn`.
    pub(crate) fn lost(&self, vpn: Vpn, pfn: DevicePfn) -> Error {
        let engine = self.engine();
        let tier = engine.tiers.find(pfn);
        let (device, page) = match tier {
            Some(tier) => (tier.info.name.clone(), pfn - tier.range.base),
            None => ("a device that is gone".into(), 0),
        };
        Error::Lost { range: engine.geometry.range(PageRange { start: vpn, end: vpn + 1 }), device, page }
    }

    /// What to tell the program of pages that could not be held.
    pub(crate) fn cannot_hold(&self, e: HoldError, bad: &dyn Fn(&'static str) -> Error) -> Error {
        match e {
            HoldError::Lost(vpn, pfn) => self.lost(vpn, pfn),
            HoldError::Foreign(_) => bad("part of it is not managed by this space"),
            HoldError::Unreachable(_) => {
                bad("part of it is mapped and cannot be accessed: it is beyond the end of its file, or protected")
            }
            HoldError::TooMany(_) => bad("a page of it is kept resident too many times"),
            HoldError::Stays(vpn, why) => {
                let page = self.engine().addresses(PageRange::new(vpn, Pages(1)));
                Error::Kernel { what: format!("migrate {page} out of where it is in place on a device"), why }
            }
        }
    }
}

impl Adopted {
    /// The space it is managed by.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The addresses managed.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.range.start.0 as usize..self.range.end.0 as usize
    }

    /// The parts of it that stay where they are, and that devices access in place: see [`Space::adopt`].
    pub fn in_place(&self) -> Vec<std::ops::Range<usize>> {
        let engine = self.space.engine();
        let mut parts: Vec<std::ops::Range<usize>> = Vec::new();
        for part in engine.in_place_parts(engine.geometry.pages_inside(self.range)) {
            let VaRange { start, end } = engine.addresses(part);
            match parts.last_mut() {
                Some(last) if last.end == start.0 as usize => last.end = end.0 as usize,
                _ => parts.push(start.0 as usize..end.0 as usize),
            }
        }
        parts
    }

    /// Says how the memory is going to be used. What is in RAM already stays as it is.
    ///
    /// # Errors
    /// When the space has as many regions as it can have.
    pub fn advise(&self, hint: Hint) -> Result<(), Error> {
        self.space.advise(self.range, hint)
    }

    /// Makes huge folios of the blocks that lie wholly inside the memory, as [`Region::collapse`](crate::Region::collapse)
    /// does. Returns how many bytes of it are huge then.
    ///
    /// # Errors
    /// When the hint [`Sparse`](Hint::Sparse) says that it is to stay in small pages.
    pub fn collapse(&self) -> Result<usize, Error> {
        self.space.collapse(self.range)
    }

    /// Sets the memory aside because it will not be needed soon, as [`Region::cold`](crate::Region::cold) does. Returns how
    /// many bytes of it were.
    pub fn cold(&self) -> usize {
        self.space.cold(self.range)
    }

    /// Brings everything home and gives the memory back to the kernel's care; what dropping does, with its error.
    ///
    /// # Errors
    /// When the kernel refuses: what it refuses, and what comes behind, is then managed for as long as the process lives.
    pub fn release(mut self) -> Result<(), Error> {
        self.give_up()
    }

    fn give_up(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.released, true) || self.range.is_empty() {
            return Ok(());
        }
        let engine = self.space.engine();
        engine.disown(self.range).map_err(|why| {
            // What is away must be served for ever.
            std::mem::forget(self.space.clone());
            Error::Kernel { what: format!("give {} back", self.range), why }
        })
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if let Err(e) = self.give_up() {
            crate::tell::warning(format_args!("{e}"));
        }
    }
}

impl fmt::Debug for Adopted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adopted({})", self.range)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let engine = self.space.engine();
        let mut pieces = self.pages.by_block().peekable();
        while pieces.peek().is_some() {
            without_signals(|| pieces.by_ref().take(PIECES).for_each(|piece| engine.let_go(piece)));
        }
        self.space.engine().budget.unpin(self.pinned);
    }
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resident({:?})", self.pages)
    }
}
