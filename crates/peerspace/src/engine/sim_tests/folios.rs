//! Huge folios while they are in use: split mappings, pins, parts discarded and moved (rules H5, H6, H9, H11).

use super::{ABLE, Came, PAGE, Rig, Shelf};
use crate::engine::folio::NoSplit;
use crate::engine::stats::Sums;
use peerspace_core::addr::{Access, BLOCK_PAGES, Va, VaRange};
use peerspace_core::folio::SplitBusy;
use peerspace_core::regions::Attributes;
use peerspace_os::Capabilities;

fn part(range: VaRange, first: u64, pages: u64) -> VaRange {
    let start = Va(range.start.0 + first * PAGE as u64);
    VaRange { start, end: Va(start.0 + pages * PAGE as u64) }
}

/// An engine, and memory of the program's of which the first block is one huge folio, each page beginning with its number
/// plus one.
fn huge() -> (Rig, VaRange) {
    let rig = Rig::new(Capabilities { huge: true, ..ABLE }, [Shelf::new(2000)], true);
    let plain = rig.sim().map_plain(6 << 20);
    let block = 2u64 << 20;
    let start = Va(plain.start.0.next_multiple_of(block));
    let range = VaRange { start, end: Va(start.0 + 2 * block) };
    rig.engine.adopt(range).unwrap();
    rig.engine.advise(rig.engine.geometry.pages_inside(range), |a| a.with(Attributes::HUGE)).unwrap();
    for n in 0..BLOCK_PAGES {
        assert_eq!(rig.write(part(range, n, 1).start, &(n + 1).to_ne_bytes()), Came::Done);
    }
    assert_eq!(rig.engine.check().mapped_whole, BLOCK_PAGES);
    (rig, range)
}

fn expect(rig: &Rig, range: VaRange, pages: std::ops::Range<u64>, moved: u64) {
    for n in pages {
        let mut word = [0; 8];
        assert_eq!(rig.read(part(range, n, 1).start, &mut word), Came::Done);
        assert_eq!(u64::from_ne_bytes(word), n + 1 + moved, "page {n}");
    }
}

fn sums(rig: &Rig) -> Sums {
    let mut sums = Sums::default();
    rig.engine.contexts.all().iter().for_each(|c| sums.add(&c.as_ref().counters));
    sums
}

/// Reclaims until nothing leaves any more.
fn squeeze(rig: &Rig) {
    for _ in 0..40 {
        rig.reclaim(100);
    }
}

#[test]
fn a_folio_with_discarded_pages_is_split_when_memory_is_short() {
    let (rig, range) = huge();
    let charged = rig.engine.budget.charged();
    rig.sim().dontneed(part(range, 100, 156));
    // H11: queued, once, and nothing more.
    rig.sim().dontneed(part(range, 0, 10));
    let census = rig.engine.check();
    assert_eq!((census.mapped, census.spread, census.mapped_whole), (BLOCK_PAGES - 166, 1, 0));
    assert_eq!((rig.engine.blocks.deferrals(), sums(&rig).folio_splits), (1, 0));
    assert_eq!(rig.engine.budget.charged(), charged - 166, "what the kernel counts");
    rig.reclaim(1);
    assert_eq!((rig.engine.check().spread, sums(&rig).folio_splits), (0, 1));
    squeeze(&rig);
    assert_eq!(rig.engine.check().mapped, 0);
    expect(&rig, range, 10..100, 0);
    expect(&rig, range, 256..BLOCK_PAGES, 0);
    rig.engine.check();
}

#[test]
fn a_folio_all_of_whose_pages_go_one_by_one_is_free() {
    let (rig, range) = huge();
    let frames = (0..BLOCK_PAGES / 4).map(|n| (n * 4 + 1) % BLOCK_PAGES);
    frames.for_each(|n| rig.sim().dontneed(part(range, n, 1)));
    rig.sim().dontneed(part(range, 0, BLOCK_PAGES));
    assert_eq!((rig.engine.check().mapped, rig.engine.budget.charged()), (0, 0));
    // The stale place in the queue does no harm, also when the frame is used again.
    rig.reclaim(2);
    assert_eq!(rig.write(part(range, 7, 1).start, &8u64.to_ne_bytes()), Came::Done);
    rig.reclaim(1);
    expect(&rig, range, 7..8, 0);
    assert_eq!(sums(&rig).folio_splits, 0);
    rig.engine.check();
}

#[test]
fn a_pin_keeps_the_folio_together_and_in_memory() {
    let (rig, range) = huge();
    let engine = &rig.engine;
    let pages = |first, n| engine.geometry.pages_inside(part(range, first, n));
    let block = pages(0, 1).start.block();
    engine.hold_pages(pages(20, 30), Access::Write).unwrap();
    assert_eq!(engine.check().mapped_whole, BLOCK_PAGES, "H5: a pin alone splits nothing");
    // Twice, by overlapping ranges; then the mapping is split (H6), by discarding pages beside them.
    engine.hold_pages(pages(40, 300), Access::Read).unwrap();
    rig.sim().dontneed(part(range, 400, 10));
    assert_eq!(engine.check().spread, 1);
    assert_eq!(engine.split_folio(block), Err(NoSplit::Busy(SplitBusy::Pinned(2))));
    engine.let_go(pages(40, 300));
    assert_eq!(engine.split_folio(block), Err(NoSplit::Busy(SplitBusy::Pinned(1))));
    squeeze(&rig);
    let census = engine.check();
    assert_eq!((census.spread, census.mapped), (1, BLOCK_PAGES - 10), "none of it has left");
    assert!(sums(&rig).folio_splits_failed > 0);
    assert_eq!(engine.collapse(pages(0, 1).start), Err(crate::engine::collapse::NoCollapse::Busy));
    engine.let_go(pages(20, 30));
    squeeze(&rig);
    assert_eq!(engine.check().mapped, 0);
    expect(&rig, range, 0..400, 0);
}

#[test]
fn what_is_pinned_and_discarded_is_nobodys_to_let_go() {
    let (rig, range) = huge();
    let engine = &rig.engine;
    let all = engine.geometry.pages_inside(part(range, 0, BLOCK_PAGES));
    engine.hold_pages(all, Access::Write).unwrap();
    rig.sim().dontneed(part(range, 0, BLOCK_PAGES));
    engine.check();
    assert_eq!(rig.write(range.start, &1u64.to_ne_bytes()), Came::Done);
    engine.let_go(all);
    squeeze(&rig);
    assert_eq!(engine.check().mapped, 0, "the folio that came after it is pinned by nobody");
    expect(&rig, range, 0..1, 0);
}

#[test]
fn a_folio_is_taken_apart_when_its_pages_go_separate_ways() {
    for pinned in [false, true] {
        let (rig, range) = huge();
        let engine = &rig.engine;
        let first = engine.geometry.pages_inside(part(range, 0, 1));
        if pinned {
            engine.hold_pages(first, Access::Read).unwrap();
        }
        let to = rig.sim().remap(part(range, 100, 50), None).unwrap();
        let moved = VaRange { start: to, end: Va(to.0 + 50 * PAGE as u64) };
        assert_eq!(engine.check().spread, pinned as u64);
        expect(&rig, moved, 0..50, 100);
        expect(&rig, range, 0..100, 0);
        expect(&rig, range, 150..BLOCK_PAGES, 0);
        if pinned {
            assert_eq!(engine.split_folio(first.start.block()), Err(NoSplit::Scattered));
            engine.let_go(first);
            rig.sim().dontneed(moved);
            engine.check();
        }
        squeeze(&rig);
        assert_eq!(engine.check().mapped, 0, "pinned: {pinned}");
        expect(&rig, range, 0..100, 0);
        rig.sim().munmap(part(range, 0, 100));
        rig.sim().munmap(part(range, 150, 700));
        engine.check();
    }
}

#[test]
fn a_folio_whose_mapping_was_split_is_gathered_without_a_copy() {
    let (rig, range) = huge();
    let engine = &rig.engine;
    let vpn = engine.geometry.vpn(range.start);
    let entry = engine.table.lock(vpn).unwrap();
    engine.split_mapped(entry, &engine.contexts.take().counters);
    let frame = |census: crate::engine::check::Census| (census.spread, census.mapped_whole);
    assert_eq!(frame(engine.check()), (1, 0));
    engine.collapse(vpn).unwrap();
    assert_eq!(frame(engine.check()), (0, BLOCK_PAGES));
    assert_eq!(sums(&rig).collapses, 0, "nothing was copied");
    expect(&rig, range, 0..BLOCK_PAGES, 0);
}

#[test]
fn blocks_of_which_little_is_left_make_room_for_huge_folios() {
    // H2, H3: as many blocks as there are frames for, and of each only one page in use.
    const FRAMES: u64 = 10;
    let rig = Rig::new(Capabilities { huge: true, ..ABLE }, [Shelf::new(20_000)], true);
    let engine = &rig.engine;
    assert_eq!(engine.memmap.block_frames() as u64, FRAMES);
    let block = |n: u64| n * BLOCK_PAGES;
    let plain = rig.sim().map_plain((FRAMES + 4) << 21);
    let start = Va(plain.start.0.next_multiple_of(2 << 20));
    let range = part(VaRange { start, ..plain }, 0, block(FRAMES + 3));
    engine.adopt(range).unwrap();
    let huge = |a: Attributes| a.with(Attributes::HUGE);
    engine.advise(engine.geometry.pages_inside(range), huge).unwrap();
    let write = |n: u64| assert_eq!(rig.write(part(range, n, 1).start, &(n + 1).to_ne_bytes()), Came::Done);
    for n in 0..FRAMES {
        write(block(n));
        rig.sim().dontneed(part(range, block(n) + 1, BLOCK_PAGES - 1));
    }
    assert_eq!((engine.check().spread, engine.check().mapped), (FRAMES, FRAMES));
    write(block(FRAMES));
    assert_eq!((engine.check().mapped_whole, sums(&rig).huge_fallbacks), (0, 1));
    // One of them is pinned.
    let pinned = engine.geometry.pages_inside(part(range, block(3), 1));
    engine.hold_pages(pinned, Access::Read).unwrap();
    let mapped = engine.check().mapped;
    assert_eq!(engine.compact(), 8);
    assert_eq!(sums(&rig).compact_migrated, 8);
    assert_eq!(engine.check().mapped, mapped);
    write(block(FRAMES + 1));
    assert_eq!(engine.check().mapped_whole, BLOCK_PAGES);
    assert_eq!(engine.compact(), 1, "all but the pinned one");
    for n in 0..FRAMES {
        expect(&rig, range, block(n)..block(n) + 1, 0);
    }
    engine.let_go(pinned);
    squeeze(&rig);
    engine.check();
    for n in (0..FRAMES).chain([FRAMES, FRAMES + 1]) {
        expect(&rig, range, block(n)..block(n) + 1, 0);
    }
}

#[test]
fn what_is_set_aside_comes_back_without_input() {
    let (rig, range) = huge();
    let geometry = rig.engine.geometry;
    let pages = |range| geometry.pages_inside(range);
    let second = pages(part(range, BLOCK_PAGES, BLOCK_PAGES));
    rig.engine.advise(second, |a| a.without(Attributes::HUGE).with(Attributes::NO_HUGE)).unwrap();
    for n in 0..20 {
        assert_eq!(
            rig.write(part(range, BLOCK_PAGES + n, 1).start, &(BLOCK_PAGES + n + 1).to_ne_bytes()),
            Came::Done
        );
    }
    assert_eq!(rig.engine.check().mapped, BLOCK_PAGES + 20);
    // Of a folio all or nothing, and nothing that somebody relies on (H5).
    assert_eq!(rig.engine.set_aside(pages(part(range, 0, BLOCK_PAGES - 1))), 0);
    let held = pages(part(range, 7, 1));
    rig.engine.hold_pages(held, Access::Read).unwrap();
    assert_eq!(rig.engine.set_aside(pages(range)), 20);
    assert_eq!((rig.engine.check().mapped, rig.engine.check().standby), (BLOCK_PAGES, 20));
    rig.engine.let_go(held);
    assert_eq!(rig.engine.set_aside(pages(range)), BLOCK_PAGES);
    assert_eq!((rig.engine.check().mapped, rig.engine.check().standby), (0, BLOCK_PAGES + 20));
    assert_eq!(rig.engine.set_aside(pages(range)), 0, "it is aside already");
    expect(&rig, range, 0..BLOCK_PAGES + 20, 0);
    let sums = sums(&rig);
    assert_eq!((sums.pages_in, sums.pages_out), (0, 0));
    assert_eq!(rig.engine.check().mapped_whole, BLOCK_PAGES);
}

#[test]
fn a_folio_in_pieces_is_set_aside_in_pieces() {
    let (rig, range) = huge();
    rig.sim().dontneed(part(range, 100, 1));
    assert_eq!(rig.engine.check().spread, 1);
    assert_eq!(rig.engine.set_aside(rig.engine.geometry.pages_inside(part(range, 0, 50))), 50);
    assert_eq!((rig.engine.check().spread, rig.engine.check().mapped), (0, BLOCK_PAGES - 51));
    expect(&rig, range, 0..100, 0);
    expect(&rig, range, 101..BLOCK_PAGES, 0);
}
