//! Random sequences against an oracle that knows each byte.
//!
//! The oracle is a copy of the program's memory as the program must see it. Every read is compared with it, at the end
//! everything is; after each step the engine's own invariants are checked. Only pages that a device has refused to
//! give back may be lost, and they stay lost until the program discards or unmaps them.

use super::areas::{Area, Seen};
use super::chip::Chip;
use super::fleet::Fleet;
use super::holds::Holds;
use super::ops::ops;
pub(super) use super::ops::{Op, op};
use super::{ABLE, Came, PAGE, Rig, Shelf};
use crate::engine::adopt::AdoptError;
use peerspace_core::addr::{Access, PageRange, Va, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_os::inject::Call;
use peerspace_os::own::{Box as OwnBox, Buffer, Own};
use peerspace_os::sim::Allowed;
use peerspace_os::{Capabilities, Kernel};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

pub(super) struct World {
    pub(super) rig: Rig,
    shelves: Vec<Shelf>,
    /// Devices that run code.
    pub(super) fleet: Fleet,
    pub(super) chips: Vec<Chip>,
    /// Pages that devices may have taken with them, at most.
    pub(super) forfeit: u64,
    /// It is a forked child.
    pub(super) reborn: bool,
    pub(super) areas: Vec<Area>,
    pub(super) holds: Holds,
    pub(super) lost: u64,
    limit_pages: usize,
}

fn allowed(n: u8) -> Allowed {
    [Allowed::Nothing, Allowed::Read, Allowed::Write][n as usize]
}

/// The calls that may fail while a program runs. Room for the table is not among them: a mapping that moves cannot be
/// followed without. Nor is discarding where the kernel does not tell of it: the table forgets the content first then.
fn failing(can: Capabilities) -> Vec<Call> {
    let not = [Call::Words, Call::Grow, Call::Map, Call::Bury];
    let may = |c: &Call| !not.contains(c) && (can.move_pages || *c != Call::Discard);
    Call::ALL.into_iter().filter(may).collect()
}

impl World {
    pub(super) fn new(can: Capabilities, compares: bool) -> World {
        // The first device is small, so that there is a second one to go on with.
        let first = if compares { Shelf::new(300).compares() } else { Shelf::new(300).slow() };
        let shelves = vec![first, Shelf::new(8000), Shelf::new(2048).coherent()];
        World {
            rig: Rig::new(can, shelves.clone(), true),
            shelves,
            fleet: Fleet::default(),
            chips: Vec::new(),
            forfeit: 0,
            reborn: false,
            areas: Vec::new(),
            holds: Holds::default(),
            lost: 0,
            limit_pages: 2400,
        }
    }

    fn has_room(&self, pages: usize) -> bool {
        self.areas.iter().map(|a| a.seen.len()).sum::<usize>() + pages <= self.limit_pages
    }

    /// The area and the page that `at` stands for.
    pub(super) fn place(&self, at: usize) -> Option<(usize, usize)> {
        let all: usize = self.areas.iter().map(|a| a.seen.len()).sum();
        let mut at = at.checked_rem(all)?;
        for (i, area) in self.areas.iter().enumerate() {
            if at < area.seen.len() {
                return Some((i, at));
            }
            at -= area.seen.len();
        }
        unreachable!("it lies inside")
    }

    pub(super) fn losses(&self) -> u64 {
        self.shelves.iter().map(Shelf::losses).sum::<u64>() + self.chip_losses()
    }

    /// What an access came to, against what it has to. True if it succeeded.
    fn judge(&mut self, area: usize, page: usize, write: bool, came: Came) -> bool {
        let va = self.areas[area].va(page);
        let seen = &mut self.areas[area].seen[page];
        let may = seen.allowed >= if write { Allowed::Write } else { Allowed::Read };
        match came {
            Came::Refused => assert!(!may, "an access to {va} was refused that is allowed"),
            Came::Done => {
                assert!(may && !seen.lost, "an access to {va} went on, allowed: {may}, lost: {}", seen.lost)
            }
            // Also where it would not be allowed: what is buried fails by itself.
            Came::Lost => {
                self.lost += !seen.lost as u64;
                seen.lost = true;
                let losses = self.losses();
                assert!(self.lost <= losses, "page {va} is lost, and no device has lost it");
            }
        }
        came == Came::Done
    }

    fn read(&mut self, area: usize, page: usize) {
        let mut bytes = [0xaa; PAGE];
        let va = self.areas[area].va(page);
        let came = self.rig.read(va, &mut bytes);
        if self.judge(area, page, false, came) {
            match &self.areas[area].seen[page].bytes {
                Some(want) => assert!(bytes[..] == want[..], "page {va} is not what was written"),
                None => assert!(bytes == [0; PAGE], "page {va} was never written and is not zero"),
            }
        }
    }

    fn write(&mut self, area: usize, page: usize, offset: usize, byte: u8) {
        let bytes = [byte; 16];
        let bytes = &bytes[..16.min(PAGE - offset)];
        let va = self.areas[area].va(page);
        let came = self.rig.write(Va(va.0 + offset as u64), bytes);
        if self.judge(area, page, true, came) {
            let seen = &mut self.areas[area].seen[page];
            seen.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn at_rest(&self, fork: impl FnOnce()) {
        let engine = &self.rig.engine;
        let turn = engine.take_turn();
        engine.leave_shared_memory(&turn);
        // Where that could not be, a child would not go on.
        if !engine.inplace.is_left_behind() {
            turn.keep();
            engine.settle_changes();
            engine.contexts.freeze();
            engine.recall_all();
            while engine.release_ready() {}
            engine.tiers.before_fork();
            fork();
            engine.contexts.thaw();
            engine.give_up_turn();
        }
        engine.reopen_shared_memory();
    }

    /// The blocks that lie inside of some at `at`, if that is a region of the engine's own.
    fn blocks(&self, at: usize, blocks: usize) -> Vec<u64> {
        let Some((i, first)) = self.place(at) else { return Vec::new() };
        let area = &self.areas[i];
        let pages = area.part(first, (blocks * 512).min(area.seen.len() - first));
        let pieces = self.rig.engine.geometry.pages_inside(pages).by_block();
        if area.own { pieces.map(|p| p.start.block()).collect() } else { Vec::new() }
    }

    /// Discards a part of area `i`. True if that could be done.
    fn discard(&mut self, i: usize, first: usize, pages: usize) {
        let range = self.areas[i].part(first, pages);
        self.holds.touched(self.rig.engine.geometry.pages_inside(range));
        let done = if self.areas[i].own {
            let engine = &self.rig.engine;
            let discard = |rest| engine.discard_now(engine.addresses(rest));
            engine.discard_in_place(engine.geometry.pages_inside(range), discard).is_ok()
        } else {
            self.program_discards(i, range)
        };
        if done {
            // What is buried is another mapping, and stays when the engine is not asked.
            let buried = !self.areas[i].managed;
            for seen in &mut self.areas[i].seen[first..first + pages] {
                (seen.bytes, seen.lost) = (None, seen.lost && buried);
            }
        }
    }

    /// Counts the pages that the kernel populated by itself, as the keeper of a managed process does now and then.
    fn count_native(&self) {
        let engine = &self.rig.engine;
        let native = |area: &Area| {
            let pages = (0..area.seen.len()).map(|n| area.va(n));
            let there = |va: &Va| {
                let empty =
                    engine.table.look(engine.geometry.vpn(*va)).is_some_and(|(e, _)| e.state() == State::Empty);
                empty && self.rig.sim().is_present(*va).expect("it is a simulation")
            };
            pages.filter(there).count() as i64
        };
        engine.budget.set_native(self.areas.iter().filter(|a| a.managed).map(native).sum());
    }

    /// Puts `pieces` in the place of area `i`.
    fn replace(&mut self, i: usize, pieces: impl IntoIterator<Item = Area>) {
        self.areas.swap_remove(i);
        self.areas.extend(pieces.into_iter().filter(|a| !a.seen.is_empty()));
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Region { blocks } if self.has_room(blocks as usize * 512) => {
                let range = self.rig.region(blocks);
                self.areas.push(Area::new(range, true, true));
            }
            Op::Plain { pages, fill } if self.has_room(pages as usize) => {
                let range = self.rig.sim().map_plain(pages * PAGE as u64);
                self.areas.push(Area::new(range, false, false));
                for page in 0..fill.min(pages) {
                    self.write(self.areas.len() - 1, page as usize, 0, page as u8 | 1);
                }
            }
            Op::Adopt { area } if !self.areas.is_empty() => {
                let i = area % self.areas.len();
                let area = &mut self.areas[i];
                if !area.managed {
                    match self.rig.engine.adopt(area.range) {
                        Ok(()) => area.managed = true,
                        // The kernel was made to refuse; everything is as it was.
                        Err(AdoptError::Kernel(_) | AdoptError::Table(_) | AdoptError::Changed) => {}
                    }
                }
            }
            Op::Disown { area } if !self.areas.is_empty() => {
                let i = area % self.areas.len();
                if self.areas[i].managed && !self.areas[i].own {
                    self.holds.let_all_go(&self.rig.engine);
                    if self.rig.engine.disown(self.areas[i].range).is_ok() {
                        self.areas[i].managed = false;
                    } else {
                        // Part of it was given up; the rest is as before.
                        let engine = self.rig.engine.clone();
                        let parts = self
                            .areas
                            .swap_remove(i)
                            .by_managed(|va| engine.region(engine.geometry.vpn(va)).is_some());
                        self.areas.extend(parts);
                    }
                }
            }
            Op::Release { area } if !self.areas.is_empty() => {
                let i = area % self.areas.len();
                if self.areas[i].own {
                    self.holds.let_all_go(&self.rig.engine);
                    self.rig.release(self.areas[i].range);
                    self.replace(i, []);
                }
            }
            Op::Read { at } => {
                if let Some((area, page)) = self.place(at) {
                    self.read(area, page);
                }
            }
            Op::Write { at, offset, byte } => {
                if let Some((area, page)) = self.place(at) {
                    self.write(area, page, offset, byte);
                }
            }
            Op::Stream { at, pages, write, down } => {
                let Some((area, first)) = self.place(at) else { return };
                let last = (first + pages).min(self.areas[area].seen.len());
                let step = |i: usize| if down { last - 1 - (i - first) } else { i };
                for i in first..last {
                    if write {
                        self.write(area, step(i), i % PAGE, at as u8);
                    } else {
                        self.read(area, step(i));
                    }
                }
            }
            Op::Reclaim { steps } => self.rig.reclaim(steps),
            Op::ReadAhead => {
                while let Some(what) = self.rig.engine.next_request() {
                    self.rig.engine.bring_ahead(what);
                }
            }
            Op::Collapse { at } => {
                if let Some((area, page)) = self.place(at) {
                    let engine = &self.rig.engine;
                    let before = engine.sums().collapses;
                    let outcome = engine.collapse(engine.geometry.vpn(self.areas[area].va(page)));
                    // One whose mapping alone was split is gathered, without a copy.
                    assert!(engine.sums().collapses - before <= outcome.is_ok() as u64, "{outcome:?}");
                    if outcome.is_ok() {
                        let va = Va(self.areas[area].va(page).0 & !((2 << 20) - 1));
                        assert_eq!(self.rig.sim().is_huge(va), Ok(true));
                    }
                }
            }
            Op::Attach { pages } => {
                let shelf = Shelf::new(pages);
                let shelf = if pages.is_multiple_of(2) { shelf.compares() } else { shelf };
                if self.rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(shelf.clone(), Own))).is_ok() {
                    self.shelves.push(shelf);
                }
            }
            Op::Detach { which } => {
                let engine = &self.rig.engine;
                let ids: Vec<u64> = engine.tiers.iter().map(|t| t.id).collect();
                let id = ids[which % ids.len()];
                // One stays, so that there is somewhere to go.
                if engine.tiers.iter().any(|t| t.id != id && t.info.takes_evicted) {
                    let gone = engine.detach(id).is_ok();
                    assert_eq!(gone, engine.tiers.iter().all(|t| t.id != id));
                }
            }
            Op::MigrateTo { at, blocks, which } => {
                let engine = &self.rig.engine;
                let ids: Vec<u64> = engine.tiers.iter().map(|t| t.id).collect();
                // Mostly to where it is mapped in place.
                let coherent = engine.tiers.iter().filter(|t| t.info.memory == crate::device::MemoryType::Coherent);
                let coherent: Vec<u64> = coherent.map(|t| t.id).collect();
                let coherent = (!coherent.is_empty()).then(|| coherent[which / 4 % coherent.len()]);
                let id = coherent.filter(|_| which % 4 > 0).unwrap_or(ids[which % ids.len()]);
                let mut buffer = Buffer::new(512 * PAGE).unwrap();
                for block in self.blocks(at, blocks) {
                    let vpn = Vpn::of_block(block);
                    let done = engine.migrate_block(block, id, &mut buffer);
                    let state = engine.table.look(vpn).unwrap().0.state();
                    if done.is_ok() && Some(id) == coherent {
                        assert!(matches!(state, State::Coherent { .. }), "block {block} is in place: {state:?}");
                    }
                }
            }
            Op::MigrateHome { at, blocks } => {
                let blocks = self.blocks(at, blocks);
                let end = Vpn::of_block(blocks.last().map_or(0, |b| b + 1));
                for block in blocks {
                    let rest = PageRange { start: Vpn::of_block(block + 1), end };
                    let _ = self.rig.engine.migrate_home(block, rest);
                    let state = self.rig.engine.table.look(Vpn::of_block(block)).unwrap().0.state();
                    let failing = self.rig.engine.kernel.is_failing();
                    assert!(failing || !matches!(state, State::Coherent { .. }), "block {block} is home: {state:?}");
                }
            }
            Op::Compact => drop(self.rig.engine.compact()),
            Op::Cold { at, pages } => {
                let Some((i, first)) = self.place(at) else { return };
                let n = pages.min(self.areas[i].seen.len() - first);
                let engine = &self.rig.engine;
                assert!(engine.set_aside(engine.geometry.pages_inside(self.areas[i].part(first, n))) <= n as u64);
            }
            Op::SplitMapping { at } => {
                let Some((area, page)) = self.place(at) else { return };
                let engine = &self.rig.engine;
                if let Ok(entry) = engine.table.lock(engine.geometry.vpn(self.areas[area].va(page)))
                    && entry.is_whole()
                    && matches!(entry.state(), State::Host { .. })
                {
                    engine.split_mapped(entry, &engine.contexts.take().counters);
                }
            }
            Op::SplitFolio { at } => {
                if let Some((area, page)) = self.place(at) {
                    let engine = &self.rig.engine;
                    let _ = engine.split_folio(engine.geometry.vpn(self.areas[area].va(page)).block());
                }
            }
            Op::Hold { at, pages, write } => {
                let Some((i, first)) = self.place(at) else { return };
                let area = &self.areas[i];
                let n = pages.min(area.seen.len() - first);
                let fine = |s: &Seen| s.allowed == Allowed::Write && !s.lost;
                if area.managed && area.seen[first..first + n].iter().all(fine) {
                    let pages = self.rig.engine.geometry.pages_inside(area.part(first, n));
                    let access = if write { Access::Write } else { Access::Read };
                    self.holds.hold(&self.rig.engine, pages, access);
                }
            }
            Op::LetGo { which } => self.holds.let_go(&self.rig.engine, which),
            Op::Discard { at, pages } => {
                let Some((i, first)) = self.place(at) else { return };
                let n = pages.min(self.areas[i].seen.len() - first);
                // Block by block: each is discarded or not.
                let in_block = (self.areas[i].va(first).0 >> PAGE.ilog2()) as usize % 512;
                let mut at = first;
                while at < first + n {
                    let end = (at + 512 - (in_block + at - first) % 512).min(first + n);
                    self.discard(i, at, end - at);
                    at = end;
                }
            }
            Op::Unmap { at, pages } => {
                let Some((i, first)) = self.place(at) else { return };
                if !self.areas[i].own {
                    let n = pages.min(self.areas[i].seen.len() - first);
                    let range = self.areas[i].part(first, n);
                    self.holds.touched(self.rig.engine.geometry.pages_inside(range));
                    self.rig.sim().munmap(range);
                    let area = self.areas.swap_remove(i);
                    let [before, gone, behind] = area.cut(first, n);
                    self.areas.extend([before, behind].into_iter().filter(|a| !a.seen.is_empty()));
                    assert_eq!(self.rig.read(gone.range.start, &mut [0]), Came::Refused);
                }
            }
            Op::Remap { at, pages, over } => self.remap(at, pages, over),
            Op::Protect { at, pages, allowed: n } => {
                let Some((i, first)) = self.place(at) else { return };
                if !self.areas[i].own {
                    let n_pages = pages.min(self.areas[i].seen.len() - first);
                    self.rig.sim().mprotect(self.areas[i].part(first, n_pages), allowed(n));
                    self.areas[i].seen[first..first + n_pages].iter_mut().for_each(|s| s.allowed = allowed(n));
                }
            }
            Op::Grow { area, pages } if !self.areas.is_empty() && self.has_room(pages as usize) => {
                let i = area % self.areas.len();
                let area = &mut self.areas[i];
                if !area.own && self.rig.sim().grow_in_place(area.range.end, pages * PAGE as u64) {
                    let like = area.seen.last().expect("an area has pages").allowed;
                    let fresh = Seen { bytes: None, allowed: like, lost: false };
                    area.seen.extend(vec![fresh; pages as usize]);
                    area.range.end = Va(area.range.end.0 + pages * PAGE as u64);
                }
            }
            Op::Fork { child: false } => self.at_rest(|| self.rig.sim().fork_in_parent()),
            Op::Fork { child: true } => {
                self.reborn = true;
                self.at_rest(|| {
                    let engine = &self.rig.engine;
                    engine.begin_life();
                    // What grew in place is registered and no region yet; a child registers regions alone, and the rest of
                    // the mapping is ordinary memory there, which nothing was ever taken from.
                    self.rig.sim().fork_in_child(engine.regions.iter().map(|r| engine.addresses(r.range)));
                });
            }
            Op::Break { count, seed } => self.shelves[seed as usize % 2].break_some(count, seed >> 8),
            Op::Flaky { one_in } => {
                self.shelves.iter().for_each(|s| s.set_flaky(if one_in < 2 { 0 } else { one_in }))
            }
            Op::Room { pages } => self.shelves[1].set_room(pages),
            Op::Fail { seed, one_in } => {
                let odds = if one_in < 3 { 0 } else { one_in };
                let kernel = &self.rig.engine.kernel;
                kernel.by_chance(seed, &failing(kernel.capabilities()), odds);
            }
            Op::OnDevice(op) => self.run_device(op),
            Op::Region { .. }
            | Op::Plain { .. }
            | Op::Adopt { .. }
            | Op::Disown { .. }
            | Op::Release { .. }
            | Op::Grow { .. } => {}
        }
    }

    /// MADV_DONTNEED by the program. False where the engine relies on hearing of it and this kernel does not tell.
    fn program_discards(&self, area: usize, range: VaRange) -> bool {
        if self.areas[area].managed && !self.rig.engine.kernel.capabilities().move_pages {
            return self.rig.engine.discard_now(range).is_ok();
        }
        self.rig.sim().dontneed(range);
        true
    }

    fn remap(&mut self, at: usize, pages: usize, over: Option<usize>) {
        let Some((i, first)) = self.place(at) else { return };
        let n = pages.min(self.areas[i].seen.len() - first);
        let one = self.areas[i].seen[first..first + n].windows(2).all(|w| w[0].allowed == w[1].allowed);
        if self.areas[i].own || !one {
            return;
        }
        // Over other memory of the program's, if that is as long.
        let target = over
            .and_then(|o| self.place(o))
            .filter(|(t, first)| *t != i && !self.areas[*t].own && first + n <= self.areas[*t].seen.len());
        let from = self.areas[i].part(first, n);
        let to = target.map(|(t, first)| self.areas[t].va(first));
        let geometry = self.rig.engine.geometry;
        let over = to.and_then(|to| VaRange::new(to, from.len()));
        [Some(from), over].into_iter().flatten().for_each(|r| self.holds.touched(geometry.pages_inside(r)));
        // What grew in place may not be a region yet, and then moves as what it is: a mapping of its own.
        let Some(to) = self.rig.sim().remap(from, to) else { return };
        let mut moved = None;
        let mut rest = Vec::new();
        for (k, area) in std::mem::take(&mut self.areas).into_iter().enumerate() {
            if k == i {
                let [before, middle, behind] = area.cut(first, n);
                moved = Some(Area { range: VaRange { start: to, end: Va(to.0 + from.len()) }, ..middle });
                rest.extend([before, behind]);
            } else if let Some((t, first)) = target
                && k == t
            {
                let [before, _, behind] = area.cut(first, n);
                rest.extend([before, behind]);
            } else {
                rest.push(area);
            }
        }
        rest.extend(moved);
        self.areas = rest.into_iter().filter(|a| !a.seen.is_empty()).collect();
    }

    fn finish(mut self) {
        self.holds.let_all_go(&self.rig.engine);
        self.rig.engine.kernel.relent();
        self.shelves.iter().for_each(|s| s.set_flaky(0));
        self.mend_chips();
        for area in 0..self.areas.len() {
            for page in 0..self.areas[area].seen.len() {
                self.read(area, page);
            }
        }
        self.rig.engine.check();
        for area in std::mem::take(&mut self.areas) {
            if area.own { self.rig.release(area.range) } else { self.rig.sim().munmap(area.range) }
        }
        let left: Vec<PageRange> = self.rig.engine.regions.iter().map(|r| r.range).collect();
        assert!(left.is_empty(), "regions are left: {left:?}");
        assert_eq!(self.rig.engine.check().device_pages, 0);
        assert_eq!(self.shelves.iter().map(Shelf::held).sum::<u64>(), 0, "devices hold what nobody needs");
        self.dismiss_chips();
    }
}

pub(super) fn play(can: Capabilities, compares: bool, ops: Vec<Op>) {
    play_in(World::new(can, compares), ops);
}

/// Plays `ops` in `world`, after what all sequences begin with.
pub(super) fn play_in(mut world: World, ops: Vec<Op>) {
    world.run(Op::Region { blocks: 2 });
    world.run(Op::Plain { pages: 700, fill: 650 });
    world.run(Op::Adopt { area: 1 });
    for op in ops {
        world.run(op);
        world.part_with_chips();
        world.count_native();
        world.rig.engine.check();
        world.holds.check(&world.rig.engine);
        world.fleet.audit(&world.rig.engine, &world.chips);
    }
    world.finish();
}

/// `cases` cases, always the same; or as many as the environment asks for (PROPTEST_CASES), always others.
pub(super) fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        rng_seed: if asked.is_some() { RngSeed::Random } else { RngSeed::Fixed(7) },
        failure_persistence: None,
        max_shrink_iters: 3000,
        max_shrink_time: 15_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn small_pages_keep_their_bytes(compares: bool, ops in ops()) {
        play(ABLE, compares, ops);
    }

    #[test]
    fn huge_pages_keep_their_bytes(compares: bool, ops in ops()) {
        play(Capabilities { huge: true, ..ABLE }, compares, ops);
    }

    #[test]
    fn kernels_that_cannot_move_pages_keep_bytes(ops in ops()) {
        play(Capabilities { move_pages: false, poison: false, ..ABLE }, true, ops);
    }

    #[test]
    fn kernels_that_cannot_protect_pages_keep_bytes(ops in ops()) {
        play(Capabilities { write_protect: false, ..ABLE }, true, ops);
    }
}
