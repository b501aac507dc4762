//! Launches: work on a device that cannot fault (rule G4).
//!
//! Most devices need every page that they touch to be there before they begin. A launch names its operands; their pages are
//! brought to the device, mapped, and held for as long as the work runs, a piece after the other where not all of them fit.

use crate::attach::DeviceId;
use crate::device::mmu::FaultError;
use crate::error::Error;
use crate::space::Space;
use peerspace_core::addr::{PageRange, Va, VaRange};
use peerspace_core::sharers::MmuId;
use peerspace_os::linux::signal::without_signals;
use std::ops::Range;

/// Work for a device, before it is [run](Launch::run). Made by [`Space::launch`].
#[derive(Debug)]
#[must_use = "a launch does nothing until it is run"]
pub struct Launch<'a> {
    space: &'a Space,
    device: DeviceId,
    items: u64,
    most: u64,
    operands: Vec<Operand>,
}

#[derive(Debug, Clone, Copy)]
struct Operand {
    start: u64,
    /// Bytes of each item, or of all of it.
    bytes: u64,
    /// Each item has its part.
    each: bool,
}

impl Operand {
    /// The addresses that `items` need.
    fn part(self, items: &Range<u64>) -> Option<VaRange> {
        match self.each {
            false => VaRange::new(Va(self.start), self.bytes),
            true => {
                let at = self.bytes.checked_mul(items.start)?.checked_add(self.start)?;
                VaRange::new(Va(at), self.bytes.checked_mul(items.end - items.start)?)
            }
        }
    }
}

/// What a piece of a launch works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The items.
    pub items: Range<u64>,
    /// The addresses of the operands' parts, in the order in which they were named; all of them are mapped on the device.
    pub operands: Vec<Range<u64>>,
}

/// How a launch went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaunchReport {
    /// Pieces it took: 1 when all of it fitted.
    pub pieces: u64,
    /// Items done.
    pub items: u64,
}

/// Why a launch ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError<E> {
    /// The operands of a single item do not fit on the device together, or cannot be brought there.
    #[error("items {0:?} cannot be brought to the device: {1}")]
    Operands(Range<u64>, Error),
    /// The work itself failed, at these items.
    #[error("the work on items {0:?} failed: {1}")]
    Work(Range<u64>, E),
    /// The program has discarded or unmapped an operand of these items while the device worked on it.
    #[error("an operand of items {0:?} was discarded or unmapped while the device worked on it")]
    Discarded(Range<u64>),
}

impl Space {
    /// Begins to describe work for a device that cannot fault, or that need not.
    pub fn launch(&self, device: DeviceId) -> Launch<'_> {
        Launch { space: self, device, items: 1, most: u64::MAX, operands: Vec::new() }
    }
}

impl Launch<'_> {
    /// The work is that on so many items, which can be done in pieces. One, unless said otherwise: then it is done in one piece.
    pub fn items(self, items: u64) -> Self {
        Launch { items, ..self }
    }

    /// No piece has more items than this.
    pub fn at_most(self, items: u64) -> Self {
        Launch { most: items.max(1), ..self }
    }

    /// An operand of which each item needs its own `bytes` bytes, one after the other from `start` on.
    pub fn each(mut self, start: *const u8, bytes: usize) -> Self {
        self.operands.push(Operand { start: start as u64, bytes: bytes as u64, each: true });
        self
    }

    /// An operand of `bytes` bytes that every piece needs.
    pub fn whole(mut self, start: *const u8, bytes: usize) -> Self {
        self.operands.push(Operand { start: start as u64, bytes: bytes as u64, each: false });
        self
    }

    /// Does the work: calls `work` for each piece, with the pages of its operands mapped on the device, to read and to write,
    /// and held there. Returns when the last one is done.
    ///
    /// While `work` runs, an access of the CPU to a held page waits until it is over. So `work` itself must not touch the
    /// operands but through the device, nor wait for somebody who does, nor fork.
    ///
    /// # Errors
    /// [`LaunchError`]; the pieces before are done.
    pub fn run<E>(self, mut work: impl FnMut(&Piece) -> Result<(), E>) -> Result<LaunchReport, LaunchError<E>> {
        let engine = self.space.engine();
        let refused = |items: &Range<u64>, e| LaunchError::Operands(items.clone(), e);
        let mmu = self.space.mmu_of(self.device).map_err(|e| refused(&(0..self.items), e))?;
        self.check().map_err(|e| refused(&(0..self.items), e))?;
        let mut report = LaunchReport::default();
        let (mut at, mut size) = (0, self.items.min(self.most));
        while at < self.items {
            let items = at..self.items.min(at + size);
            let piece = self.piece(&items);
            let pages = self.pages(&piece);
            let hold = || match engine.hold_on_device(mmu, &pages) {
                Err(FaultError::NoRoom(_)) => {
                    engine.split_at_edges(&pages);
                    engine.hold_on_device(mmu, &pages)
                }
                held => held,
            };
            match without_signals(hold) {
                Ok(()) => {}
                // In smaller pieces.
                Err(FaultError::NoRoom(_)) if size > 1 => {
                    size = size.div_ceil(2);
                    continue;
                }
                Err(e) => {
                    let range = VaRange { start: Va(piece.operands[0].start), end: Va(piece.operands[0].end) };
                    let why = Error::Migrate { range, to: "the device".into(), why: e.to_string() };
                    return Err(refused(&items, why));
                }
            }
            let held = Held { space: self.space, mmu, pages };
            let done = work(&piece);
            let all_there = held.end();
            done.map_err(|e| LaunchError::Work(items.clone(), e))?;
            if !all_there {
                return Err(LaunchError::Discarded(items));
            }
            report.pieces += 1;
            report.items += items.end - items.start;
            at = items.end;
        }
        Ok(report)
    }

    fn check(&self) -> Result<(), Error> {
        let bad = |o: &Operand, why| Error::BadRange {
            what: format!("an operand of {} bytes at {:#x}", o.bytes, o.start),
            why,
        };
        if self.operands.is_empty() {
            return Err(Error::BadRange { what: "a launch".into(), why: "it names no operand" });
        }
        for operand in &self.operands {
            match operand.part(&(0..self.items)) {
                None => return Err(bad(operand, "the range wraps")),
                Some(range) if range.is_empty() => return Err(bad(operand, "it has no byte")),
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn piece(&self, items: &Range<u64>) -> Piece {
        let part = |o: &Operand| o.part(items).map_or(0..0, |r| r.start.0..r.end.0);
        Piece { items: items.clone(), operands: self.operands.iter().map(part).collect() }
    }

    /// The pages of a piece, in ascending order and each once.
    fn pages(&self, piece: &Piece) -> Vec<PageRange> {
        let geometry = self.space.engine().geometry;
        let mut pages: Vec<PageRange> = piece
            .operands
            .iter()
            .map(|r| geometry.pages_out(VaRange { start: Va(r.start), end: Va(r.end) }))
            .collect();
        pages.sort_unstable_by_key(|r| r.start);
        pages.dedup_by(|next, before| {
            let joins = next.start <= before.end;
            if joins {
                before.end = before.end.max(next.end);
            }
            joins
        });
        pages
    }
}

/// Lets go of what is held, also if the work panics.
struct Held<'a> {
    space: &'a Space,
    mmu: MmuId,
    pages: Vec<PageRange>,
}

impl Held<'_> {
    fn end(mut self) -> bool {
        let pages = std::mem::take(&mut self.pages);
        without_signals(|| self.space.engine().let_go_on_device(self.mmu, &pages))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.pages.is_empty() {
            without_signals(|| self.space.engine().let_go_on_device(self.mmu, &self.pages));
        }
    }
}
