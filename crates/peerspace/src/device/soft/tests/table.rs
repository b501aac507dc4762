//! The page table against a map of pages: whatever is entered and taken away, in whatever sizes.

use crate::device::mmu::Target;
use crate::device::soft::table::{FANOUT, NoTable, PAGES, Pte, Table};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Pages that are next to each other, in neighbouring blocks, and far away.
fn some_page() -> impl Strategy<Value = u64> {
    let far = prop_oneof![Just(0), Just(FANOUT.pow(2) - 2 * FANOUT), Just(FANOUT.pow(3)), Just(PAGES - 3 * FANOUT)];
    (far, 0..3 * FANOUT).prop_map(|(far, near)| far + near)
}

#[derive(Debug, Clone)]
enum Step {
    Page(u64, Target, bool),
    Block(u64, u64, bool),
    Clear(u64, u64),
    Use(u64),
    TakeUsed(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let target = prop_oneof![(0u64..1 << 30).prop_map(Target::Own), Just(Target::Host), Just(Target::Zero)];
    prop_oneof![
        4 => (some_page(), target, any::<bool>()).prop_map(|(p, to, w)| Step::Page(p, to, w)),
        2 => (some_page(), 0u64..1000, any::<bool>()).prop_map(|(p, b, w)| Step::Block(p / FANOUT * FANOUT, b * FANOUT, w)),
        2 => (some_page(), prop_oneof![1u64..4, 1..3 * FANOUT, Just(PAGES)]).prop_map(|(p, n)| Step::Clear(p, n)),
        3 => some_page().prop_map(Step::Use),
        1 => (some_page(), 1..2 * FANOUT).prop_map(|(p, n)| Step::TakeUsed(p, n)),
    ]
}

/// What a page leads to: target, writable, block, used. Of a block: each of its pages, with the block's first as the key of use.
type Model = BTreeMap<u64, (Target, bool, bool)>;

fn clear(model: &mut Model, pages: std::ops::Range<u64>) {
    let hit: Vec<u64> = model.range(pages).map(|(p, _)| *p).collect();
    for p in hit {
        if model.get(&p).is_some_and(|(_, _, block)| *block) {
            let first = p / FANOUT * FANOUT;
            (first..first + FANOUT).for_each(|p| _ = model.remove(&p));
        }
        model.remove(&p);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn g1_the_table_says_what_was_entered(steps in prop::collection::vec(step(), 1..60)) {
        let table = Table::new(1000).unwrap();
        let mut model = Model::new();
        let mut used = std::collections::BTreeSet::new();
        let key = |p: u64, block: bool| if block { (p / FANOUT * FANOUT, true) } else { (p, false) };
        for step in steps {
            match step {
                Step::Page(p, to, writable) => {
                    let before = model.get(&p).copied();
                    let gone = table.set(p, false, Pte::new(to, writable)).unwrap();
                    let expected = match before {
                        None => None,
                        Some((_, _, true)) => Some(p / FANOUT * FANOUT..(p / FANOUT + 1) * FANOUT),
                        Some((old, w, false)) => (old != to || (w && !writable)).then_some(p..p + 1),
                    };
                    prop_assert_eq!(gone, expected);
                    clear(&mut model, p..p + 1);
                    used.remove(&(p, false));
                    used.remove(&key(p, true));
                    model.insert(p, (to, writable, false));
                }
                Step::Block(p, at, writable) => {
                    let to = Target::Own(at);
                    let before: Vec<_> = model.range(p..p + FANOUT).map(|(_, v)| *v).collect();
                    let stays = before.iter().all(|(_, w, block)| *block && (!*w || writable))
                        && before.first().is_none_or(|(old, _, _)| *old == to);
                    let gone = table.set(p, true, Pte::new(to, writable)).unwrap();
                    prop_assert_eq!(gone, (!stays).then_some(p..p + FANOUT));
                    clear(&mut model, p..p + FANOUT);
                    (p..p + FANOUT).for_each(|p| _ = used.remove(&(p, false)));
                    used.remove(&(p, true));
                    (0..FANOUT).for_each(|i| _ = model.insert(p + i, (Target::Own(at + i), writable, true)));
                }
                Step::Clear(p, n) => {
                    let range = p..p.saturating_add(n).min(PAGES);
                    let all = table.clear(range.clone());
                    let before: Vec<u64> = model.keys().copied().collect();
                    clear(&mut model, range.clone());
                    // What went is among what it says went, and what was meant is too.
                    prop_assert!(all.start <= range.start && all.end >= range.end);
                    for p in before {
                        prop_assert!(model.contains_key(&p) || all.contains(&p), "{p} went silently");
                    }
                }
                Step::Use(p) => {
                    let found = table.walk(p);
                    prop_assert_eq!(found.is_some(), model.contains_key(&p));
                    if let Some(found) = found {
                        prop_assert!(found.is_still() && found.mark_accessed() && found.is_still());
                        used.insert(key(p, found.block));
                    }
                }
                Step::TakeUsed(p, n) => {
                    let range = p..(p + n).min(PAGES);
                    let blocks = range.start / FANOUT * FANOUT..range.end;
                    let hit = |(p, block): &(u64, bool)| if *block { blocks.contains(p) } else { range.contains(p) };
                    let live = |(p, block): &(u64, bool)| model.get(p).is_some_and(|m| m.2 == *block);
                    let any = used.iter().any(|u| hit(u) && live(u));
                    prop_assert_eq!(table.take_accessed(range.clone()), any);
                    used.retain(|u| !hit(u));
                }
            }
            used.retain(|(p, block)| model.get(p).is_some_and(|m| m.2 == *block));
        }
        for far in [0, FANOUT.pow(2) - 2 * FANOUT, FANOUT.pow(3), PAGES - 3 * FANOUT] {
            for p in far..far + 3 * FANOUT {
                let found = table.walk(p).map(|f| {
                    let pte = if f.block { f.pte.of_block(p % FANOUT) } else { f.pte };
                    (pte.to(), pte.writable(), f.block)
                });
                prop_assert_eq!(found, model.get(&p).copied(), "page {}", p);
            }
        }
    }
}

#[test]
fn tables_stay_and_are_used_again() {
    let table = Table::new(1000).unwrap();
    let mut bytes = Vec::new();
    for _ in 0..100 {
        table.set(5, false, Pte::new(Target::Host, true)).unwrap();
        table.set(0, true, Pte::new(Target::Own(0), true)).unwrap();
        table.clear(0..PAGES);
        bytes.push(table.bytes());
    }
    assert!(bytes.iter().all(|b| *b == bytes[0]), "{bytes:?}");
    assert_eq!(bytes[0], 5 * FANOUT * 8);
}

#[test]
fn g16_a_table_that_there_is_no_room_for_is_refused_and_the_others_stay() {
    let table = Table::new(9).unwrap();
    let pte = Pte::new(Target::Host, true);
    // The root, an upper one, two for blocks, one for pages: then four more for pages.
    (0..5).for_each(|b| assert_eq!(table.set(b * FANOUT, false, pte), Ok(None)));
    assert_eq!(table.set(5 * FANOUT, false, pte), Err(NoTable));
    assert_eq!(table.set(PAGES - FANOUT, true, pte), Err(NoTable));
    // A block needs none.
    assert_eq!(table.set(5 * FANOUT, true, pte), Ok(None));
    assert!((0..6).all(|b| table.walk(b * FANOUT).is_some_and(|f| f.pte == pte)));
    assert!(table.walk(PAGES - FANOUT).is_none());
}
