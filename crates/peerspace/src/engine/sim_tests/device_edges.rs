//! What once went wrong between devices that run code and the rest of the engine, and must not again: one small sequence each.

use super::chip::{Chip, Model, page_at};
use super::fleet::Fleet;
use super::{ABLE, Came, PAGE, Rig, Shelf};
use crate::device::mmu::{FaultError, Mode, Target};
use crate::engine::send::{Sending, To};
use peerspace_core::addr::{Access, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_os::inject::{Call, Planned};
use peerspace_os::own::{Box as OwnBox, Buffer, Own};
use peerspace_os::sim::Allowed;
use peerspace_os::{Capabilities, Kernel, Protect, Trouble, Wake};
use std::sync::atomic::Ordering::Relaxed;

/// One thread plays all parts, with devices of these models, beside `shelf` if there is one.
fn rig<const N: usize>(can: Capabilities, shelf: Option<Shelf>, models: [Model; N]) -> (Rig, Fleet, [Chip; N]) {
    let rig = Rig::new(can, shelf, true);
    let fleet = Fleet::default();
    fleet.watch(&rig);
    let chips = models.map(|model| Chip::join(&rig, &fleet, model));
    (rig, fleet, chips)
}

fn adopted(rig: &Rig, pages: usize) -> VaRange {
    let plain = rig.sim().map_plain((pages * PAGE) as u64);
    (0..pages).for_each(|n| put(rig, page_at(plain, n), 100 + n as u64));
    rig.engine.adopt(plain).unwrap();
    plain
}

fn get(rig: &Rig, va: u64) -> Result<u64, Came> {
    let mut word = [0; 8];
    match rig.read(Va(va), &mut word) {
        Came::Done => Ok(u64::from_ne_bytes(word)),
        other => Err(other),
    }
}

fn put(rig: &Rig, va: u64, word: u64) {
    assert_eq!(rig.write(Va(va), &word.to_ne_bytes()), Came::Done);
}

fn state(rig: &Rig, va: u64) -> State {
    rig.engine.table.look(Vpn(va / PAGE as u64)).unwrap().0.state()
}

/// G1, G5: memory that is given up comes home from devices, and they keep no translation of it.
#[test]
fn g5_what_is_given_up_is_no_devices_any_more() {
    let models = [Model::new(4, Mode::Exclusive), Model::new(4, Mode::Replicate).zero_page()];
    let (rig, fleet, [a, b]) = rig(ABLE, None, models);
    let plain = adopted(&rig, 3);
    a.put(&rig, page_at(plain, 0), 1).unwrap();
    b.put(&rig, page_at(plain, 1), 2).unwrap();
    assert_eq!(b.get(&rig, page_at(plain, 2)), Ok(102));
    rig.engine.disown(plain).unwrap();
    assert_eq!([0, 1, 2].map(|n| get(&rig, page_at(plain, n))), [Ok(1), Ok(2), Ok(102)]);
    assert_eq!([a.mapped(), b.mapped()], [0, 0]);
    assert_eq!([a.shelf().held(), b.shelf().held()], [0, 0]);
    assert!(matches!(a.get(&rig, page_at(plain, 0)), Err(FaultError::NotManaged(_))));
    fleet.check();
}

/// G10: the kernel may still protect a page that the table says is writable, where making it so failed half-way. A device's write
/// lifts that, as the CPU's does.
#[test]
fn g10_a_device_writes_where_protection_was_left_behind() {
    let (rig, fleet, [a]) = rig(ABLE, None, [Model::new(4, Mode::Share).remote()]);
    let region = rig.region(2);
    let (first, second) = (page_at(region, 0), page_at(region, 1));
    for va in [first, second] {
        put(&rig, va, 1);
    }
    assert!(matches!(state(&rig, first), State::Host { writable: true, .. }));
    rig.engine.kernel.protect(region, Protect::Yes, Wake::No).unwrap();
    // The same for one that it has been using for a while.
    assert_eq!(a.get(&rig, second), Ok(1));
    a.put(&rig, first, 2).unwrap();
    a.put(&rig, second, 3).unwrap();
    assert_eq!([first, second].map(|va| get(&rig, va)), [Ok(2), Ok(3)]);
    // What the kernel does not do at once it is asked for again before the device goes on: its write would wait.
    let faults = || rig.engine.tiers.by_mmu(a.mmu()).unwrap().mmu_statistics().unwrap().faults;
    let before = faults();
    for trouble in [Trouble::Interrupted, Trouble::NoMemory] {
        rig.engine.recall_pages(rig.engine.geometry.pages_out(region));
        rig.engine.kernel.protect(region, Protect::Yes, Wake::No).unwrap();
        rig.engine.kernel.plan(Planned { call: Call::Protect, after: 0, times: 2, trouble, pages: Pages(0) });
        a.put(&rig, first, 4).unwrap();
        a.put(&rig, second, 5).unwrap();
        assert_eq!([first, second].map(|va| get(&rig, va)), [Ok(4), Ok(5)]);
    }
    assert_eq!(faults() - before, 4, "one for each write");
    fleet.check();
}

/// Z3, G5: a device that has gone has no translations, not of zeros and of the host's memory either; and the next one, which may
/// get its number, is not taken for it.
#[test]
fn z3_a_device_that_has_gone_shares_nothing() {
    let shelf = Shelf::new(100);
    let models = [Model::new(4, Mode::Replicate).zero_page(), Model::new(1, Mode::Share).remote()];
    let (rig, fleet, chips) = rig(ABLE, Some(shelf), models);
    let region = rig.region(1);
    put(&rig, page_at(region, 1), 7);
    for chip in chips.iter().rev() {
        assert_eq!([chip.get(&rig, page_at(region, 0)), chip.get(&rig, page_at(region, 1))], [Ok(0), Ok(7)]);
        assert!(chip.mapped() > 0);
        rig.engine.detach(chip.id()).map(drop).unwrap();
        assert_eq!(chip.mapped(), 0);
        // One that can neither map zeros nor access the host's memory.
        let next = Chip::join(&rig, &fleet, Model::new(4, Mode::Replicate));
        assert_eq!(next.mmu(), chip.mmu());
        for (n, word) in [(0, 0), (1, 7)] {
            assert_eq!(next.get(&rig, page_at(region, n)), Ok(word));
            assert!(matches!(next.target(page_at(region, n)), Some(Target::Own(_))), "page {n}");
        }
        rig.engine.detach(next.id()).map(drop).unwrap();
    }
    fleet.check();
}

/// G4: what the program has protected, devices may do no more with than the program.
#[test]
fn g4_devices_are_bound_by_what_the_program_protects() {
    let models = [
        Model::new(4, Mode::Exclusive),
        Model::new(4, Mode::Replicate).zero_page(),
        Model::new(1, Mode::Share).remote(),
        Model { takes_evicted: true, ..Model::new(9, Mode::Exclusive) },
    ];
    let (rig, fleet, chips) = rig(ABLE, None, models);
    for chip in &chips {
        let plain = adopted(&rig, 2);
        // One page that devices have not seen yet, one that one of them has written, and one that nobody has touched.
        chip.put(&rig, page_at(plain, 1), 5).unwrap();
        assert_eq!(get(&rig, page_at(plain, 1)), Ok(5));
        rig.sim().mprotect(plain, Allowed::Read);
        for (n, word) in [(0, 100), (1, 5)] {
            let va = page_at(plain, n);
            assert_eq!(chip.get(&rig, va), Ok(word), "page {n}");
            // In place, a write is one of the host's.
            assert!(!chip.maps(va, true) || chip.target(va) == Some(Target::Host), "page {n}");
            assert_eq!(chip.put(&rig, va, 9), Err(FaultError::ReadOnly(va)));
            assert_eq!(chip.add(&rig, va, 9), Err(FaultError::ReadOnly(va)));
            assert_eq!(get(&rig, va), Ok(word));
        }
        rig.sim().mprotect(plain, Allowed::Write);
        rig.sim().dontneed(plain);
        rig.sim().mprotect(plain, Allowed::Read);
        let va = page_at(plain, 0);
        assert_eq!(chip.get(&rig, va), Ok(0), "a page that nobody has touched");
        assert_eq!(chip.put(&rig, va, 9), Err(FaultError::ReadOnly(va)));
        rig.sim().mprotect(plain, Allowed::Write);
        rig.sim().dontneed(plain);
        rig.sim().mprotect(plain, Allowed::Nothing);
        assert_eq!(chip.get(&rig, va), Err(FaultError::Protected(va)));
        rig.sim().mprotect(plain, Allowed::Write);
        chip.put(&rig, va, 3).unwrap();
        assert_eq!(get(&rig, va), Ok(3));
    }
    fleet.check();
}

/// Z8, G14: what is pinned does not move; a device that needs it to is told so, at once.
#[test]
fn z8_what_is_pinned_stays_and_devices_are_told() {
    let models = [Model::new(4, Mode::Exclusive), Model::new(4, Mode::Share).remote()];
    let (rig, fleet, [blind, far]) = rig(ABLE, None, models);
    let region = rig.region(1);
    let va = region.start.0;
    let pinned = PageRange::new(rig.engine.geometry.vpn(region.start), Pages(1));
    rig.engine.hold_pages(pinned, Access::Write).unwrap();
    assert_eq!(blind.get(&rig, va), Err(FaultError::Pinned(va)));
    assert_eq!(far.add(&rig, va, 1), Err(FaultError::Pinned(va)));
    far.put(&rig, va, 6).unwrap();
    assert_eq!(get(&rig, va), Ok(6));
    rig.engine.let_go(pinned);
    assert_eq!(blind.get(&rig, va), Ok(6));
    far.add(&rig, va, 1).unwrap();
    assert_eq!(get(&rig, va), Ok(7));
    fleet.check();
}

/// G5: a device that is quarantined while room is made for its own fault is told that it is cut off.
#[test]
fn g5_a_device_that_keeps_a_page_is_cut_off() {
    let (rig, fleet, [chip]) = rig(ABLE, Some(Shelf::new(100)), [Model::new(1, Mode::Exclusive)]);
    let region = rig.region(1);
    chip.put(&rig, page_at(region, 0), 1).unwrap();
    chip.trouble().keeps.store(true, Relaxed);
    let fault = || {
        rig.engine.device_fault(
            chip.mmu(),
            Va(page_at(region, 1)),
            crate::device::mmu::DeviceAccess::Write,
            crate::engine::place::Bring::AsChosen,
        )
    };
    assert_eq!(fault(), Err(FaultError::Cut));
    assert_eq!((get(&rig, page_at(region, 0)), get(&rig, page_at(region, 1))), (Err(Came::Lost), Ok(0)));
    fleet.check();
}

/// G8: what is in place on a coherent device and cannot be taken from there is said to be so.
#[test]
fn g4_what_does_not_leave_its_place_is_said_to_be_there() {
    let can = Capabilities { huge: true, ..ABLE };
    let (rig, fleet, [chip]) = rig(can, None, [Model::new(4, Mode::Exclusive)]);
    let far = Shelf::new(512).coherent();
    let id = rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(far, Own))).unwrap();
    let region = rig.region(1);
    let va = region.start.0;
    put(&rig, va, 4);
    let mut buffer = Buffer::new(512 * PAGE).unwrap();
    rig.engine.migrate_block(rig.engine.geometry.vpn(region.start).block(), id, &mut buffer).unwrap();
    let refuse = Planned { call: Call::Hide, after: 0, times: 1, trouble: Trouble::NoMemory, pages: Pages(0) };
    rig.engine.kernel.plan(refuse);
    assert_eq!(chip.get(&rig, va), Err(FaultError::InPlace(va)));
    assert_eq!((chip.get(&rig, va), get(&rig, va)), (Ok(4), Ok(4)));
    fleet.check();
}

/// G7: with nowhere else to go for what leaves a device, it goes home; also when the staging that it passes through is full.
#[test]
fn g7_a_device_is_not_stuck_where_nothing_takes_what_leaves_it() {
    let (rig, fleet, [chip]) = rig(ABLE, None, [Model::new(1, Mode::Exclusive)]);
    let region = rig.region(2);
    let (_, segments) = rig.engine.ring.waiting();
    let pages = ((segments + 2) * crate::engine::staging::SEGMENT) as usize;
    for n in 0..pages {
        chip.put(&rig, page_at(region, n), n as u64 + 1).unwrap();
    }
    rig.engine.check();
    // What the CPU maps, too.
    for n in 0..pages {
        assert_eq!(get(&rig, page_at(region, n)), Ok(n as u64 + 1));
        chip.put(&rig, page_at(region, n), n as u64 + 2).unwrap();
    }
    assert!((0..pages).all(|n| get(&rig, page_at(region, n)) == Ok(n as u64 + 2)));
    fleet.check();
    rig.engine.check();
}

/// G12: in a forked child no page is write-protected any more, whatever was said before: not a copy is given away on that.
#[test]
fn g12_protection_of_another_life_makes_no_copies() {
    let models = [Model::new(4, Mode::Replicate), Model::new(4, Mode::Share).remote()];
    let (rig, fleet, [copies, far]) = rig(ABLE, None, models);
    let region = rig.region(1);
    // A page that is read is clean, and protected.
    let vas = [page_at(region, 0), page_at(region, 1)];
    assert_eq!(vas.map(|va| get(&rig, va)), [Ok(0), Ok(0)]);
    assert!(matches!(state(&rig, vas[0]), State::Host { writable: false, .. }));
    rig.engine.contexts.freeze();
    rig.engine.begin_life();
    rig.sim().fork_in_child(rig.engine.regions.iter().map(|r| rig.engine.addresses(r.range)));
    rig.engine.contexts.thaw();
    assert_eq!((copies.get(&rig, vas[0]), far.get(&rig, vas[1])), (Ok(0), Ok(0)));
    vas.iter().for_each(|va| put(&rig, *va, 8));
    assert_eq!((copies.get(&rig, vas[0]), far.get(&rig, vas[1])), (Ok(8), Ok(8)));
    assert_eq!(copies.get(&rig, vas[1]), Ok(8));
    fleet.check();
    rig.engine.check();
}

/// G8: what is brought home leaves the device that works with it.
#[test]
fn g8_what_is_brought_home_leaves_its_device() {
    let (rig, fleet, [chip]) = rig(ABLE, None, [Model::new(4, Mode::Exclusive)]);
    let region = rig.region(1);
    chip.put(&rig, page_at(region, 2), 5).unwrap();
    let block = rig.engine.geometry.vpn(region.start).block();
    rig.engine.migrate_home(block, PageRange::block(block)).unwrap();
    assert!(matches!(state(&rig, page_at(region, 2)), State::Host { .. }), "{:?}", state(&rig, page_at(region, 2)));
    assert_eq!((chip.mapped(), chip.shelf().held(), get(&rig, page_at(region, 2))), (0, 0, Ok(5)));
    fleet.check();
}

/// Z5: pages are in place one by one as long as there are not too many pieces; from then on whole blocks leave, and what goes to the
/// device is there like any page.
#[test]
fn z5_pages_in_place_are_in_a_bounded_number_of_pieces() {
    let (rig, fleet, [chip]) = rig(ABLE, None, [Model::new(2048, Mode::Exclusive).coherent()]);
    let region = rig.region(2);
    (0..1024).for_each(|n| put(&rig, page_at(region, n), n as u64 + 1));
    rig.engine.inplace.limit(20);
    let page = |n: usize| rig.engine.geometry.vpn(Va(page_at(region, n)));
    let mut sending = Sending::new();
    let mut send = |from: usize, n: u64, to| {
        for piece in PageRange::new(page(from), Pages(n)).by_block() {
            rig.engine.send_pages(piece, to, &mut sending);
        }
    };
    let placed = || (0..1024).filter(|n| matches!(state(&rig, page_at(region, *n)), State::Coherent { .. })).count();
    (0..30).for_each(|n| send(2 * n, 1, To::Place(chip.id())));
    assert_eq!(placed(), 20);
    assert_eq!(rig.engine.count_sent(PageRange::new(page(0), Pages(60)), To::Place(chip.id())), Pages(30));
    send(0, 1024, To::Host);
    assert_eq!(placed(), 0);
    rig.engine.check();
    // One piece, out of which pages are taken.
    send(0, 1024, To::Place(chip.id()));
    assert_eq!(placed(), 1024);
    (0..30).for_each(|n| send(2 * n + 1, 1, To::Host));
    assert_eq!(placed(), 512, "all of the block that is in so many pieces has left");
    assert!((0..1024).all(|n| get(&rig, page_at(region, n)) == Ok(n as u64 + 1)));
    fleet.check();
    rig.engine.check();
}

/// G1, G5: pages that the program may only read go to a device where all changes are announced, unless one just is.
#[test]
fn g1_read_only_pages_go_where_changes_are_announced() {
    let (rig, fleet, [chip]) = rig(ABLE, None, [Model::new(64, Mode::Exclusive)]);
    let plain = adopted(&rig, 20);
    let pages = rig.engine.geometry.pages_inside(plain);
    rig.sim().mprotect(plain, Allowed::Read);
    let send = || {
        rig.engine.send_pages(pages, To::Mmu(chip.mmu()), &mut Sending::new());
        rig.engine.count_sent(pages, To::Mmu(chip.mmu())).0
    };
    assert_eq!(send(), 0);
    rig.engine.announcements.promise();
    rig.engine.announce_change(&[pages]);
    assert!(!rig.engine.may_unprotect(pages));
    rig.engine.change_is_over(&[pages]);
    assert_eq!(send(), 20);
    assert!((0..20).all(|n| chip.get(&rig, page_at(plain, n)) == Ok(100 + n as u64)));
    assert_eq!(chip.put(&rig, page_at(plain, 3), 1), Err(FaultError::ReadOnly(page_at(plain, 3))));
    assert!((0..20).all(|n| get(&rig, page_at(plain, n)) == Ok(100 + n as u64)));
    assert_eq!(rig.write(Va(page_at(plain, 5)), &[1]), Came::Refused);
    assert_eq!(send(), 20);
    fleet.check();
    rig.engine.check();
}
