//! What happens in the sequences of the [oracle](super::oracle): which operations there are, and how they are drawn.
//!
//! An operation is a few numbers that mean something in any state, so that a sequence stays one when some of it is left out. The
//! weights have sequences spend half of their steps on accesses and on what moves pages; changes of mappings, forks and failures
//! come now and then.

use super::PAGE;
use super::device_ops::DeviceOp;
use proptest::prelude::*;

/// One thing that happens. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Region { blocks: u64 },
    Plain { pages: u64, fill: u64 },
    Adopt { area: usize },
    Disown { area: usize },
    Release { area: usize },
    Read { at: usize },
    Write { at: usize, offset: usize, byte: u8 },
    Stream { at: usize, pages: usize, write: bool, down: bool },
    Reclaim { steps: usize },
    ReadAhead,
    Collapse { at: usize },
    Attach { pages: u64 },
    Detach { which: usize },
    MigrateTo { at: usize, blocks: usize, which: usize },
    MigrateHome { at: usize, blocks: usize },
    Compact,
    Cold { at: usize, pages: usize },
    SplitMapping { at: usize },
    SplitFolio { at: usize },
    Hold { at: usize, pages: usize, write: bool },
    LetGo { which: usize },
    Discard { at: usize, pages: usize },
    Unmap { at: usize, pages: usize },
    Remap { at: usize, pages: usize, over: Option<usize> },
    Protect { at: usize, pages: usize, allowed: u8 },
    Grow { area: usize, pages: u64 },
    Fork { child: bool },
    Break { count: usize, seed: u64 },
    Flaky { one_in: u64 },
    Room { pages: usize },
    Fail { seed: u64, one_in: u32 },
    OnDevice(DeviceOp),
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let some = 0..usize::MAX;
    let run = 1usize..80;
    prop_oneof![
        2 => (1u64..3).prop_map(|blocks| Op::Region { blocks }),
        2 => (1u64..700, 0u64..700).prop_map(|(pages, fill)| Op::Plain { pages, fill }),
        3 => some.clone().prop_map(|area| Op::Adopt { area }),
        1 => some.clone().prop_map(|area| Op::Disown { area }),
        1 => some.clone().prop_map(|area| Op::Release { area }),
        8 => some.clone().prop_map(|at| Op::Read { at }),
        10 => (some.clone(), 0usize..PAGE, any::<u8>()).prop_map(|(at, offset, byte)| Op::Write { at, offset, byte }),
        10 => (some.clone(), 1usize..900, any::<bool>(), any::<bool>())
            .prop_map(|(at, pages, write, down)| Op::Stream { at, pages, write, down }),
        12 => (1usize..200).prop_map(|steps| Op::Reclaim { steps }),
        3 => Just(Op::ReadAhead),
        3 => some.clone().prop_map(|at| Op::Collapse { at }),
        2 => (1u64..3000).prop_map(|pages| Op::Attach { pages }),
        2 => some.clone().prop_map(|which| Op::Detach { which }),
        5 => (some.clone(), 1usize..4, some.clone()).prop_map(|(at, blocks, which)| Op::MigrateTo { at, blocks, which }),
        3 => (some.clone(), 1usize..4).prop_map(|(at, blocks)| Op::MigrateHome { at, blocks }),
        1 => Just(Op::Compact),
        2 => (some.clone(), 1usize..900).prop_map(|(at, pages)| Op::Cold { at, pages }),
        1 => some.clone().prop_map(|at| Op::SplitMapping { at }),
        1 => some.clone().prop_map(|at| Op::SplitFolio { at }),
        3 => (some.clone(), 1usize..600, any::<bool>()).prop_map(|(at, pages, write)| Op::Hold { at, pages, write }),
        4 => some.clone().prop_map(|which| Op::LetGo { which }),
        4 => (some.clone(), run.clone()).prop_map(|(at, pages)| Op::Discard { at, pages }),
        2 => (some.clone(), run).prop_map(|(at, pages)| Op::Unmap { at, pages }),
        3 => (some.clone(), 1usize..700, proptest::option::of(some.clone()))
            .prop_map(|(at, pages, over)| Op::Remap { at, pages, over }),
        2 => (some.clone(), 1usize..12, 0u8..3).prop_map(|(at, pages, allowed)| Op::Protect { at, pages, allowed }),
        2 => (some.clone(), 1u64..40).prop_map(|(area, pages)| Op::Grow { area, pages }),
        3 => any::<bool>().prop_map(|child| Op::Fork { child }),
        2 => (1usize..40, any::<u64>()).prop_map(|(count, seed)| Op::Break { count, seed }),
        2 => (0u64..6).prop_map(|one_in| Op::Flaky { one_in }),
        1 => (2000usize..4000).prop_map(|pages| Op::Room { pages }),
        3 => (any::<u64>(), 0u32..9).prop_map(|(seed, one_in)| Op::Fail { seed, one_in }),
    ]
}

/// A sequence of them.
pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 10..60)
}
