//! Decisions: from the state of a page and an event to what has to be done.
//!
//! The functions here are pure. The engine, the simulator and the model checkers carry out the same plans; who
//! wants to know what a fault does in which state reads [`on_fault`].
//!
//! # Nothing between a page and a block
//!
//! Folios of 64 KiB, say, would share a descriptor, not a page of the kernel's: UFFDIO_COPY makes small pages, and UFFDIO_MOVE
//! breaks up all but the largest. Neighbours already come in, leave and are read ahead sixteen at a time ([`CLUSTER`]), and the
//! engine's own code takes 8 % of the processor time of a sequential read in small pages: one more order could win no more.

use crate::addr::{Access, BLOCK_PAGES, DevicePfn, Pages};
use crate::entry::{Dirt, State};
use crate::memmap::Backing;
use crate::regions::Attributes;
use crate::sharers::Sharers;
use crate::stream::Level;

/// What a fault on a page asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultPlan {
    /// Never touched: give it zeros (rule G3).
    Fill,
    /// The CPU maps it already, as far as this table knows. Either another thread was faster, or the program
    /// discarded the page and the news is on its way.
    Present,
    /// The CPU maps it read-only and its content is on a device too: make it writable, forget the other copy.
    Upgrade,
    /// It is in a frame that nobody maps: map it again.
    TakeBack,
    /// It is on a device: bring it home (rule Z8).
    Load(DevicePfn),
    /// The CPU maps it where it is, on a device: nothing of ours is to be done (rule Z5).
    InPlace(DevicePfn),
    /// Devices map it: take their translations away, and look again (rule G3).
    Recall(OnDevices),
    /// A launch of a device relies on it: wait until that is over (rule Z8).
    Wait(DevicePfn),
    /// It is lost: say so (rule Z9).
    Poison(DevicePfn),
}

/// That devices map a page: there is no such thing in a build without devices (rule Z10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDevices {
    /// Copies of it, the frame itself, or zeros.
    Shared(Sharers),
    /// The device that has the only copy.
    Alone(DevicePfn),
}

/// What to do about an access of the CPU that faulted in `state`.
///
/// # Panics
/// On a [`State::Leaf`], which no page has.
pub fn on_fault(state: State, access: Access) -> FaultPlan {
    match state {
        State::Empty => FaultPlan::Fill,
        State::Host { writable: false, .. } if access == Access::Write => FaultPlan::Upgrade,
        State::Host { .. } => FaultPlan::Present,
        State::Standby { .. } => FaultPlan::TakeBack,
        State::Device { pfn, .. } => FaultPlan::Load(pfn),
        State::Coherent { pfn } => FaultPlan::InPlace(pfn),
        State::Shared { writable: false, sharers, .. } if access == Access::Write => {
            FaultPlan::Recall(OnDevices::Shared(sharers))
        }
        State::Shared { .. } => FaultPlan::Present,
        State::Zero { sharers } => FaultPlan::Recall(OnDevices::Shared(sharers)),
        State::Mapped { pfn, held: true } => FaultPlan::Wait(pfn),
        State::Mapped { pfn, .. } => FaultPlan::Recall(OnDevices::Alone(pfn)),
        State::Poisoned { pfn } => FaultPlan::Poison(pfn),
        State::Leaf(_) => unreachable!("a page is no leaf"),
    }
}

/// How the CPU maps a page after a fault, and how it then compares with its other copy.
///
/// `copied`: the page was installed by copying, write-protected from its first moment; only that proves
/// cleanliness. A page that was moved in and protected afterwards is [`Dirt::Unverified`].
pub fn mapping(access: Access, copied: bool, before: Dirt) -> (bool, Dirt) {
    match (access, before) {
        (Access::Write, _) | (_, Dirt::Dirty) => (true, Dirt::Dirty),
        (Access::Read, Dirt::Clean) if copied => (false, Dirt::Clean),
        (Access::Read, _) => (false, Dirt::Unverified),
    }
}

/// How the CPU maps a page that is read, but was written whenever it was home before: writable from the start, which
/// saves the second fault. `keeps`: its device can compare, and has room to keep its copy meanwhile, so that nothing is
/// written if the expectation proves wrong.
pub fn mapping_to_be_written(keeps: bool) -> (bool, Dirt) {
    (true, if keeps { Dirt::Unverified } else { Dirt::Dirty })
}

/// What it takes to evict a frame that nobody maps any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictPlan {
    /// Its content is all zeros for certain: the page becomes empty.
    DropToZero,
    /// The device still has the content for certain: the page is on the device.
    DropTo(DevicePfn),
    /// The device had the content; compare, and drop the frame if it still has.
    CompareWith(DevicePfn),
    /// The page was zero when it was mapped; look whether it still is.
    CompareWithZero,
    /// The frame is the only copy: write it back.
    WriteBack,
}

/// How to evict a frame with this `dirt` and `backing`. `same_life`: the write protection that `dirt` relies
/// on was set up by this process, not by the parent it was forked from (rule G12).
pub fn on_evict(dirt: Dirt, backing: Backing, same_life: bool) -> EvictPlan {
    let dirt = match dirt {
        Dirt::Clean if !same_life => Dirt::Unverified,
        other => other,
    };
    match (dirt, backing) {
        (Dirt::Clean, Backing::Zero) => EvictPlan::DropToZero,
        (Dirt::Clean, Backing::Page(pfn)) => EvictPlan::DropTo(pfn),
        (Dirt::Unverified, Backing::Zero) => EvictPlan::CompareWithZero,
        (Dirt::Unverified, Backing::Page(pfn)) => EvictPlan::CompareWith(pfn),
        (Dirt::Dirty, _) | (_, Backing::None) => EvictPlan::WriteBack,
    }
}

/// How much to bring in at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// So many pages, as far as they follow each other in the same state.
    Pages(Pages),
    /// The whole block, in a huge folio.
    Block,
}

/// What the choice of a [`Grain`] depends on.
#[derive(Debug, Clone, Copy)]
pub struct GrainFacts {
    /// How far the stream has come that this fault belongs to.
    pub level: Level,
    /// The block is whole: no page of it has a history of its own.
    pub whole: bool,
    /// The region covers the whole block, and huge folios work here.
    pub huge_possible: bool,
    /// What the region's user said.
    pub attributes: Attributes,
}

/// The level from which a stream is served in huge folios.
pub const HUGE_LEVEL: Level = 3;
/// The most pages brought in one by one in a single fault: what a fault's bounce buffer holds.
pub const CLUSTER: Pages = Pages(16);

/// Small folios for sparse access, huge ones for dense access: what the stream of faults shows decides, unless
/// the region's user knows better (rules H2, H4).
pub fn grain(facts: GrainFacts) -> Grain {
    let huge = facts.attributes.has(Attributes::HUGE) || facts.level >= HUGE_LEVEL;
    let never = facts.attributes.has(Attributes::NO_HUGE) || facts.attributes.has(Attributes::ON_REQUEST);
    if huge && facts.whole && facts.huge_possible && !never {
        return Grain::Block;
    }
    Grain::Pages(match facts.level {
        0 => Pages(1),
        1 => Pages(4),
        _ => CLUSTER,
    })
}

/// Blocks to read ahead of a stream of huge folios at `level`.
pub fn blocks_ahead(level: Level) -> u64 {
    if level < HUGE_LEVEL { 0 } else { (level - HUGE_LEVEL + 1).min(4) as u64 }
}

/// When reclaim starts and stops, in pages below the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermarks {
    /// Background reclaim starts when fewer pages than this are left.
    pub low: Pages,
    /// And stops when this many are.
    pub high: Pages,
}

impl Watermarks {
    /// Watermarks for a budget of `limit` pages: 1/32 and 1/16 of it, but no more than 16 and 32 MiB worth of
    /// 4 KiB pages, and at least two blocks' worth where the budget has them to spare.
    pub fn for_limit(limit: Pages) -> Watermarks {
        let low = (limit.0 / 32).clamp(64, 4096);
        let low = if limit.0 >= 64 * BLOCK_PAGES { low.max(2 * BLOCK_PAGES) } else { low };
        Watermarks { low: Pages(low), high: Pages(low * 2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;

    const HOST: State = State::Host { pfn: Pfn(512), writable: false, dirt: Dirt::Clean };

    #[test]
    fn faults_do_what_the_table_of_states_says() {
        assert_eq!(on_fault(State::Empty, Access::Read), FaultPlan::Fill);
        assert_eq!(on_fault(HOST, Access::Read), FaultPlan::Present);
        assert_eq!(on_fault(HOST, Access::Write), FaultPlan::Upgrade);
        let standby = State::Standby { pfn: Pfn(512), dirt: Dirt::Dirty };
        assert_eq!(on_fault(standby, Access::Read), FaultPlan::TakeBack);
        if let Some(pfn) = DevicePfn::decode(Pfn(7)) {
            let device = State::Device { pfn, stamp: 0, rewritten: false };
            assert_eq!(on_fault(device, Access::Write), FaultPlan::Load(pfn));
            assert_eq!(on_fault(State::Poisoned { pfn }, Access::Read), FaultPlan::Poison(pfn));
        }
    }

    #[test]
    fn only_a_copy_that_was_protected_from_the_start_is_clean() {
        assert_eq!(mapping(Access::Read, true, Dirt::Clean), (false, Dirt::Clean));
        assert_eq!(mapping(Access::Read, false, Dirt::Clean), (false, Dirt::Unverified));
        assert_eq!(mapping(Access::Read, true, Dirt::Unverified), (false, Dirt::Unverified));
        assert_eq!(mapping(Access::Read, true, Dirt::Dirty), (true, Dirt::Dirty));
        assert_eq!(mapping(Access::Write, true, Dirt::Clean), (true, Dirt::Dirty));
    }

    #[test]
    fn nothing_is_dropped_unless_another_copy_is_certain() {
        assert_eq!(on_evict(Dirt::Clean, Backing::Zero, true), EvictPlan::DropToZero);
        // After a fork the protection is gone with the parent's mappings.
        assert_eq!(on_evict(Dirt::Clean, Backing::Zero, false), EvictPlan::CompareWithZero);
        if let Some(pfn) = DevicePfn::decode(Pfn(9)) {
            let page = Backing::Page(pfn);
            assert_eq!(on_evict(Dirt::Clean, page, true), EvictPlan::DropTo(pfn));
            assert_eq!(on_evict(Dirt::Clean, page, false), EvictPlan::CompareWith(pfn));
            assert_eq!(on_evict(Dirt::Unverified, page, true), EvictPlan::CompareWith(pfn));
            assert_eq!(on_evict(Dirt::Dirty, page, true), EvictPlan::WriteBack);
        }
        for dirt in [Dirt::Clean, Dirt::Unverified, Dirt::Dirty] {
            assert_eq!(on_evict(dirt, Backing::None, true), EvictPlan::WriteBack);
        }
    }

    #[test]
    fn density_decides_the_grain() {
        let facts = GrainFacts { level: 0, whole: true, huge_possible: true, attributes: Attributes::default() };
        assert_eq!(grain(facts), Grain::Pages(Pages(1)));
        assert_eq!(grain(GrainFacts { level: 3, ..facts }), Grain::Block);
        assert_eq!(grain(GrainFacts { level: 9, whole: false, ..facts }), Grain::Pages(CLUSTER));
        assert_eq!(grain(GrainFacts { level: 9, huge_possible: false, ..facts }), Grain::Pages(CLUSTER));
        assert_eq!(grain(GrainFacts { attributes: Attributes::HUGE, ..facts }), Grain::Block);
        for never in [Attributes::NO_HUGE, Attributes::ON_REQUEST] {
            assert_eq!(grain(GrainFacts { level: 9, attributes: never, ..facts }), Grain::Pages(CLUSTER));
        }
    }

    #[test]
    fn watermarks_leave_room_in_any_budget() {
        for limit in [1024, 2048, 65_536, 1 << 28] {
            let w = Watermarks::for_limit(Pages(limit));
            assert!(w.low < w.high && w.high.0 <= limit / 8);
        }
    }
}
