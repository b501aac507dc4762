//! What devices that run code do in the sequences of the [oracle](super::oracle): they join and go, read, write and add wherever
//! the program has memory, and fail. The bytes are the program's own, so the same copy says what they must see.

use super::areas::Seen;
use super::chip::{Chip, Model};
use super::oracle::{Op, World, config, op, play_in};
use super::{ABLE, PAGE, Shelf};
use crate::device::mmu::{DeviceAccess, FaultError, Mode};
use crate::engine::send::{NotSent, Sending, To};
use peerspace_core::addr::{Order, PageRange};
use peerspace_os::sim::Allowed;
use peerspace_os::{Capabilities, Kernel};
use proptest::prelude::*;
use std::sync::atomic::Ordering::Relaxed;

/// One thing that happens to a device. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
pub(super) enum DeviceOp {
    Join { model: usize },
    Touch { chip: usize, at: usize, pages: usize, offset: usize, byte: u8, how: u8 },
    Hot { chip: usize, at: usize },
    Send { chip: usize, at: usize, pages: usize, home: bool },
    MakeRoom { chip: usize, block: bool },
    Empty { chip: usize },
    Refuse { chip: usize, home: bool },
    Trouble { chip: usize, maps: u64, stores: u64, loads: u64 },
    Break { chip: usize, count: usize, seed: u64 },
    Fail { chip: usize, keeps: bool },
}

pub(super) fn device_op() -> impl Strategy<Value = DeviceOp> {
    let some = 0..usize::MAX;
    let touch = (some.clone(), some.clone(), 1usize..40, 0usize..PAGE, any::<u8>(), 0u8..8);
    prop_oneof![
        1 => some.clone().prop_map(|model| DeviceOp::Join { model }),
        24 => touch.prop_map(|(chip, at, pages, offset, byte, how)| {
            DeviceOp::Touch { chip, at, pages, offset, byte, how }
        }),
        2 => (some.clone(), some.clone()).prop_map(|(chip, at)| DeviceOp::Hot { chip, at }),
        4 => (some.clone(), some.clone(), 1usize..1200, any::<bool>())
            .prop_map(|(chip, at, pages, home)| DeviceOp::Send { chip, at, pages, home }),
        1 => (some.clone(), any::<bool>()).prop_map(|(chip, block)| DeviceOp::MakeRoom { chip, block }),
        1 => some.clone().prop_map(|chip| DeviceOp::Empty { chip }),
        1 => (some.clone(), any::<bool>()).prop_map(|(chip, home)| DeviceOp::Refuse { chip, home }),
        2 => (some.clone(), 0u64..9, 0u64..9, 0u64..9)
            .prop_map(|(chip, maps, stores, loads)| DeviceOp::Trouble { chip, maps, stores, loads }),
        1 => (some.clone(), 1usize..8, any::<u64>()).prop_map(|(chip, count, seed)| DeviceOp::Break { chip, count, seed }),
        1 => (some, any::<bool>()).prop_map(|(chip, keeps)| DeviceOp::Fail { chip, keeps }),
    ]
}

/// The devices that join: of each mode, small and large, with and without what is optional.
fn model(n: usize) -> Model {
    let models = [
        Model { lazy: true, ..Model::new(3, Mode::Exclusive) },
        Model { able: true, ..Model::new(600, Mode::Replicate).zero_page() },
        Model { able: true, ..Model::new(1, Mode::Share).remote() },
        Model { able: true, ..Model::new(1100, Mode::Exclusive) },
        Model { lazy: true, takes_evicted: true, ..Model::new(600, Mode::Replicate).remote() },
        Model::new(1, Mode::Exclusive).zero_page(),
        Model::new(3, Mode::Replicate),
        Model { able: true, ..Model::new(600, Mode::Share).remote().zero_page() },
        Model { able: true, ..Model::new(1100, Mode::Exclusive).coherent().remote() },
        Model { lazy: true, ..Model::new(600, Mode::Replicate).coherent() },
    ];
    models[n % models.len()].clone()
}

impl World {
    /// Has the first three devices join, and one whose memory can be in place.
    pub(super) fn join_chips(&mut self) {
        self.fleet.watch(&self.rig);
        [0, 1, 2, 8].into_iter().for_each(|n| self.run_device(DeviceOp::Join { model: n }));
    }

    pub(super) fn run_device(&mut self, op: DeviceOp) {
        if let DeviceOp::Join { model: n } = op {
            if self.chips.len() < 5 {
                self.chips.push(Chip::join(&self.rig, &self.fleet, model(n)));
            }
            return;
        }
        if self.chips.is_empty() {
            return;
        }
        match op {
            DeviceOp::Join { .. } => {}
            DeviceOp::Touch { chip, at, pages, offset, byte, how } => {
                let Some((area, first)) = self.place(at) else { return };
                let last = (first + pages).min(self.areas[area].seen.len());
                let how = [DeviceAccess::Read, DeviceAccess::Write, DeviceAccess::Atomic][how as usize / 3];
                for page in first..last {
                    self.touch(chip % self.chips.len(), (area, page), how, (offset + page) % PAGE, byte);
                }
            }
            DeviceOp::Hot { chip, at } => {
                let Some((area, page)) = self.place(at) else { return };
                let chip = &self.chips[chip % self.chips.len()];
                if !chip.is_cut() {
                    self.rig.engine.note_remote(chip.mmu(), self.areas[area].va(page), 1000);
                }
            }
            DeviceOp::Send { chip, at, pages, home } => {
                let Some((area, first)) = self.place(at) else { return };
                let last = (first + pages).min(self.areas[area].seen.len());
                let chip = &self.chips[chip % self.chips.len()];
                let to = match (home, chip.is_coherent() && pages % 3 > 0) {
                    (true, _) => To::Host,
                    (false, true) => To::Place(chip.id()),
                    (false, false) => To::Mmu(chip.mmu()),
                };
                let vpn = |page| self.rig.engine.geometry.vpn(self.areas[area].va(page));
                let has_failed = self.rig.engine.tiers.by_id(chip.id()).is_some_and(|tier| tier.has_failed());
                let held = chip.shelf().held();
                let mut sending = Sending::new();
                for piece in (PageRange { start: vpn(first), end: vpn(last) }).by_block() {
                    self.rig.engine.send_pages(piece, to, &mut sending);
                }
                assert!(!has_failed || chip.shelf().held() <= held, "a device that has failed is given something");
                // What is there is found out by later accesses.
                if let Some(NotSent::Lost(at, _)) = sending.wrong() {
                    let page = (at - vpn(0)) as usize;
                    self.found_lost(area, page);
                }
            }
            DeviceOp::MakeRoom { chip, block } => {
                let chip = &self.chips[chip % self.chips.len()];
                let order = if block { Order::BLOCK } else { Order::BASE };
                let _ = self.rig.engine.make_room(chip.mmu(), order);
            }
            DeviceOp::Empty { chip } => {
                let chip = &self.chips[chip % self.chips.len()];
                // Without failures and without anybody who works with what it holds, all of it goes.
                let emptied = self.rig.engine.empty_device(chip.id());
                let tier = self.rig.engine.tiers.by_id(chip.id()).expect("it is attached");
                let in_order = !chip.is_cut() && !tier.has_failed() && !self.rig.engine.kernel.is_failing();
                assert!(!in_order || emptied.is_ok(), "{emptied:?}");
            }
            DeviceOp::Refuse { chip, home } => {
                let chip = &self.chips[chip % self.chips.len()];
                if home {
                    self.rig.engine.refuses_block.store(true, Relaxed);
                } else if let Some(tier) = self.rig.engine.tiers.by_id(chip.id()) {
                    tier.refuse_block();
                }
            }
            DeviceOp::Trouble { chip, maps, stores, loads } => {
                let chip = &self.chips[chip % self.chips.len()];
                let odds = |n: u64| if n < 3 { 0 } else { n };
                chip.trouble().bad_maps.store(odds(maps), Relaxed);
                chip.shelf().set_bad_stores(odds(stores));
                chip.shelf().set_flaky(odds(loads));
            }
            DeviceOp::Break { chip, count, seed } => {
                let chip = &self.chips[chip % self.chips.len()];
                chip.shelf().break_some(count, seed);
            }
            DeviceOp::Fail { chip, keeps } => {
                let chip = &self.chips[chip % self.chips.len()];
                if chip.is_cut() || chip.trouble().keeps.swap(keeps, Relaxed) {
                    return;
                }
                if keeps {
                    // At most what it can ever hold.
                    self.forfeit += chip.pages();
                    return;
                }
                self.forfeit += chip.shelf().held();
                chip.cut();
                if let Some(tier) = self.rig.engine.tiers.by_id(chip.id()) {
                    tier.fail();
                }
            }
        }
    }

    /// One access of a device to page `page` of area `area`.
    fn touch(&mut self, chip: usize, (area, page): (usize, usize), how: DeviceAccess, offset: usize, byte: u8) {
        let chip = self.chips[chip].clone();
        let va = self.areas[area].va(page).0;
        let engine = self.rig.engine.clone();
        let already = chip.maps(va, how.writes());
        let mut bytes = [0xaa; PAGE];
        let n = 16.min(PAGE - offset);
        let at = va + offset as u64;
        let came = match how {
            DeviceAccess::Read => chip.access(&engine, va, how, PAGE, |b| bytes.copy_from_slice(b)),
            DeviceAccess::Write => chip.access(&engine, at, how, n, |b| b.fill(byte)),
            DeviceAccess::Atomic => chip.access(&engine, at, how, n, |b| b[0] = b[0].wrapping_add(byte)),
        };
        if !self.judge_device(&chip, (area, page), how.writes(), already, came) {
            return;
        }
        let seen = &mut self.areas[area].seen[page];
        match how {
            DeviceAccess::Read => match &seen.bytes {
                Some(want) => assert!(bytes[..] == want[..], "{va:#x} is not what was written, to a device"),
                None => assert!(bytes == [0; PAGE], "{va:#x} was never written and is not zero, to a device"),
            },
            DeviceAccess::Write => seen.bytes_mut()[offset..offset + n].fill(byte),
            DeviceAccess::Atomic => {
                let there = &mut seen.bytes_mut()[offset];
                *there = there.wrapping_add(byte);
            }
        }
    }

    /// A page is said to be lost: no more are than devices have lost.
    fn found_lost(&mut self, area: usize, page: usize) {
        let seen = &mut self.areas[area].seen[page];
        self.lost += !seen.lost as u64;
        seen.lost = true;
        let losses = self.losses();
        assert!(self.lost <= losses, "page {page} of area {area} is lost, and no device has lost it");
    }

    /// What an access of a device came to, against what it has to. True if it succeeded.
    fn judge_device(
        &mut self,
        chip: &Chip,
        (area, page): (usize, usize),
        writes: bool,
        already: bool,
        came: Result<(), FaultError>,
    ) -> bool {
        let (managed, va) = (self.areas[area].managed, self.areas[area].va(page));
        let failing = self.rig.engine.kernel.is_failing();
        let relied_on = self.holds.any();
        let protects = self.rig.engine.kernel.capabilities().write_protect;
        let trouble = chip.trouble();
        let troubled = trouble.bad_maps.load(Relaxed) > 0 || chip.shelf().is_troubled();
        let retired = self.is_retired(chip);
        let seen = &mut self.areas[area].seen[page];
        let may = seen.allowed >= if writes { Allowed::Write } else { Allowed::Read };
        match &came {
            // What the program has protected since it was mapped is not known: nobody tells of it.
            Ok(()) => assert!(
                managed && !seen.lost && (may || already),
                "a device got at {va}; managed: {managed}, lost: {}, allowed: {may}",
                seen.lost
            ),
            Err(FaultError::Lost(..)) => self.found_lost(area, page),
            Err(FaultError::InPlace(_)) => assert!(failing, "{va} cannot leave its place"),
            // What had grown in place is ordinary memory in a forked child, until somebody looks.
            Err(FaultError::NotManaged(_)) => {
                let grown = self.reborn && self.rig.engine.region(self.rig.engine.geometry.vpn(va)).is_none();
                assert!(!managed || seen.lost || grown, "{va} is managed");
            }
            Err(FaultError::Protected(_)) => assert_eq!(seen.allowed, Allowed::Nothing, "{va} can be read"),
            Err(FaultError::ReadOnly(_)) => assert!(writes && !may, "{va} can be written to"),
            Err(FaultError::Pinned(_)) => assert!(relied_on, "{va} is not pinned"),
            // What the program has protected, a kernel that cannot protect it as well has not copied.
            Err(FaultError::Device(..)) => {
                assert!(
                    chip.is_cut() || troubled || failing || seen.allowed != Allowed::Write && !protects,
                    "{va}: {came:?}"
                )
            }
            Err(FaultError::Cut) => assert!(chip.is_cut(), "{va}: {came:?}"),
            Err(FaultError::NoRoom(_) | FaultError::NoHeadway(_)) => assert!(
                failing || troubled || retired,
                "{va}: {came:?}, {writes}, {:?}, {:?}, held: {relied_on}, on {:?}",
                seen.allowed,
                self.rig.engine.table.look(self.rig.engine.geometry.vpn(va)),
                chip.info(),
            ),
            Err(e) => panic!("{va}: {e:?}"),
        }
        came.is_ok()
    }

    /// Whether every page of `chip` has lost what was there once, so that none is used any more.
    fn is_retired(&self, chip: &Chip) -> bool {
        let tier = self.rig.engine.tiers.by_id(chip.id());
        tier.is_some_and(|tier| tier.retired() == tier.range.pages)
    }

    /// Devices that have been detached have nothing of the space's any more.
    pub(super) fn part_with_chips(&mut self) {
        let engine = &self.rig.engine;
        let gone = |chip: &Chip| engine.tiers.iter().all(|t| t.id != chip.id());
        for chip in self.chips.extract_if(.., |chip| gone(chip)) {
            assert!(chip.is_cut() || chip.mapped() == 0, "a device that was detached maps {} pages", chip.mapped());
            assert_eq!(chip.shelf().held(), 0, "a device that was detached holds something");
            chip.cut();
            self.forfeit += chip.shelf().losses();
        }
    }

    /// The devices are good from here on.
    pub(super) fn mend_chips(&self) {
        for chip in &self.chips {
            chip.trouble().bad_maps.store(0, Relaxed);
            chip.shelf().set_bad_stores(0);
            chip.shelf().set_flaky(0);
        }
    }

    /// At the end: nobody maps or holds anything.
    pub(super) fn dismiss_chips(&self) {
        self.fleet.check();
        for chip in &self.chips {
            assert!(chip.is_cut() || chip.mapped() == 0, "{} pages are mapped at the end", chip.mapped());
        }
        assert_eq!(self.chips.iter().map(|c| c.shelf().held()).sum::<u64>(), 0, "devices hold what nobody needs");
    }

    pub(super) fn chip_losses(&self) -> u64 {
        self.forfeit + self.chips.iter().map(Chip::shelf).map(Shelf::losses).sum::<u64>()
    }
}

impl Seen {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_or_insert_with(|| vec![0; PAGE].into())
    }
}

pub(super) fn play_on_devices(can: Capabilities, compares: bool, ops: Vec<Op>) {
    let mut world = World::new(can, compares);
    world.join_chips();
    play_in(world, ops);
}

fn ops_on_devices() -> impl Strategy<Value = Vec<Op>> {
    let either = prop_oneof![3 => op(), 4 => device_op().prop_map(Op::OnDevice)];
    proptest::collection::vec(either, 10..60)
}

proptest! {
    #![proptest_config(config(12))]

    /// G1 to G3, G6, G7, G9, G10, G12, G14, G16.
    #[test]
    fn devices_and_small_pages_keep_their_bytes(compares: bool, ops in ops_on_devices()) {
        play_on_devices(ABLE, compares, ops);
    }

    #[test]
    fn devices_and_huge_pages_keep_their_bytes(compares: bool, ops in ops_on_devices()) {
        play_on_devices(Capabilities { huge: true, ..ABLE }, compares, ops);
    }

    #[test]
    fn devices_over_old_kernels_keep_their_bytes(protects: bool, ops in ops_on_devices()) {
        play_on_devices(Capabilities { move_pages: protects, write_protect: protects, poison: false, ..ABLE }, true, ops);
    }
}
