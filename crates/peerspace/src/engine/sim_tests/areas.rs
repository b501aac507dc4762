//! The program's memory as the program must see it: what the oracle compares with.

use super::PAGE;
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::sim::Allowed;

/// A page as the program must see it.
#[derive(Clone)]
pub(super) struct Seen {
    /// `None` for zeros.
    pub(super) bytes: Option<Box<[u8]>>,
    pub(super) allowed: Allowed,
    pub(super) lost: bool,
}

/// A stretch of the program's memory.
pub(super) struct Area {
    pub(super) range: VaRange,
    /// A region of the engine's own: the program does not change its mapping.
    pub(super) own: bool,
    pub(super) managed: bool,
    pub(super) seen: Vec<Seen>,
}

impl Area {
    pub(super) fn new(range: VaRange, own: bool, managed: bool) -> Area {
        let seen = Seen { bytes: None, allowed: Allowed::Write, lost: false };
        Area { range, own, managed, seen: vec![seen; range.len() as usize / PAGE] }
    }

    pub(super) fn va(&self, page: usize) -> Va {
        Va(self.range.start.0 + (page * PAGE) as u64)
    }

    pub(super) fn part(&self, first: usize, pages: usize) -> VaRange {
        VaRange { start: self.va(first), end: self.va(first + pages) }
    }

    /// Cuts pages out: what is left before, the pages, and what is left behind.
    pub(super) fn cut(mut self, first: usize, pages: usize) -> [Area; 3] {
        let behind = self.seen.split_off(first + pages);
        let middle = self.seen.split_off(first);
        let (a, b) = (self.va(first), self.va(first + pages));
        let VaRange { start, end } = self.range;
        let piece = |start, end, seen| Area { range: VaRange { start, end }, seen, ..self };
        let [before, middle, behind] = [(start, a, None), (a, b, Some(middle)), (b, end, Some(behind))]
            .map(|(s, e, seen)| piece(s, e, seen.unwrap_or_default()));
        [Area { seen: self.seen, ..before }, middle, behind]
    }

    /// The parts that are managed, and those that are not.
    pub(super) fn by_managed(self, is_managed: impl Fn(Va) -> bool) -> Vec<Area> {
        let (mut parts, mut rest) = (Vec::new(), self);
        while !rest.seen.is_empty() {
            let managed = is_managed(rest.va(0));
            let same = (0..rest.seen.len()).take_while(|page| is_managed(rest.va(*page)) == managed).count();
            let [_, part, behind] = rest.cut(0, same);
            parts.push(Area { managed, ..part });
            rest = behind;
        }
        parts
    }
}
