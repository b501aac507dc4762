//! Memory of the program that stays where it is (rules G5, G11, G12): shared memory, of whose changes the kernel tells, and files,
//! of which it does not. One small sequence each.

use super::chip::{Chip, Model, page_at};
use super::fleet::Fleet;
use super::{ABLE, Came, PAGE, Rig};
use crate::device::mmu::{FaultError, Mode, Target};
use crate::engine::hold::HoldError;
use peerspace_core::addr::{Access, PageRange, Va, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_os::Trouble;
use peerspace_os::inject::{Call, Planned};
use peerspace_os::sim::{Allowed, Keep};

const BLOCK: u64 = 2 << 20;

/// Two devices that access the host's memory, and one that does not.
fn rig() -> (Rig, Fleet, [Chip; 3]) {
    let rig = Rig::new(ABLE, [], true);
    let fleet = Fleet::default();
    fleet.watch(&rig);
    let models = [
        Model::new(4, Mode::Exclusive).remote(),
        Model::new(4, Mode::Share).remote(),
        Model::new(4, Mode::Exclusive),
    ];
    let chips = models.map(|model| Chip::join(&rig, &fleet, model));
    (rig, fleet, chips)
}

/// So many bytes, each page of which begins with 100 and its number.
fn mapped(rig: &Rig, bytes: u64, keep: Keep) -> VaRange {
    let range = rig.sim().map_kept(bytes, keep);
    (0..bytes as usize / PAGE).for_each(|n| put(rig, page_at(range, n), 100 + n as u64));
    rig.engine.adopt_in_place(range).unwrap();
    range
}

fn pages(rig: &Rig, range: VaRange) -> PageRange {
    rig.engine.geometry.pages_inside(range)
}

fn is_watched(rig: &Rig, range: VaRange) -> bool {
    rig.engine.region(pages(rig, range).start).unwrap().attributes.has(Attributes::WATCHED)
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

fn part(range: VaRange, from: usize, to: usize) -> VaRange {
    VaRange { start: Va(page_at(range, from)), end: Va(page_at(range, to)) }
}

/// G11: one memory, by pages and by blocks; nothing of it has a state, or is on a device.
#[test]
fn g11_what_stays_is_one_memory() {
    for keep in [Keep::Shared, Keep::File] {
        for bytes in [3 * PAGE as u64, BLOCK] {
            let (rig, fleet, [a, b, near]) = rig();
            let range = mapped(&rig, bytes, keep);
            assert_eq!(is_watched(&rig, range), keep == Keep::Shared);
            let at = |n| page_at(range, n);
            assert_eq!((a.get(&rig, at(1)), b.get(&rig, at(2))), (Ok(101), Ok(102)));
            let block = bytes == BLOCK;
            assert_eq!((a.target(at(1)), a.target(at(2))), (Some(Target::Host), block.then_some(Target::Host)));
            a.put(&rig, at(1), 7).unwrap();
            put(&rig, at(2), 8);
            assert_eq!((b.get(&rig, at(1)), get(&rig, at(1)), a.get(&rig, at(2))), (Ok(7), Ok(7), Ok(8)));
            assert_eq!(near.get(&rig, at(1)), Err(FaultError::NoWay(at(1))));
            assert_eq!(a.add(&rig, at(1), 1), Err(FaultError::Stays(at(1))));
            rig.reclaim(50);
            assert_eq!(rig.engine.budget.charged(), 0);
            fleet.check();
            rig.engine.check();
            rig.engine.disown(range).unwrap();
            assert_eq!([a.mapped(), b.mapped(), near.mapped()], [0; 3]);
            assert_eq!(a.get(&rig, at(1)), Err(FaultError::NotManaged(at(1))));
            assert_eq!(get(&rig, at(1)), Ok(7));
            rig.engine.check();
        }
    }
}

/// G4: what the program may do, and where a file ends.
#[test]
fn g4_permissions_and_ends_of_files() {
    let (rig, fleet, [a, b, _]) = rig();
    let range = mapped(&rig, 4 * PAGE as u64, Keep::File);
    let at = |n| page_at(range, n);
    a.put(&rig, at(0), 1).unwrap();
    b.put(&rig, at(2), 3).unwrap();
    rig.sim().mprotect(part(range, 0, 1), Allowed::Read);
    rig.sim().mprotect(part(range, 1, 2), Allowed::Nothing);
    assert_eq!((a.get(&rig, at(0)), a.put(&rig, at(0), 2)), (Ok(1), Err(FaultError::ReadOnly(at(0)))));
    assert_eq!(b.get(&rig, at(1)), Err(FaultError::Protected(at(1))));
    rig.sim().truncate(part(range, 2, 4));
    for n in [2, 3] {
        assert_eq!(a.get(&rig, at(n)), Err(FaultError::Unreachable(at(n))));
        assert_eq!(b.put(&rig, at(n), 1), Err(FaultError::Unreachable(at(n))));
        assert_eq!(get(&rig, at(n)), Err(Came::Lost));
    }
    let last = PageRange { start: pages(&rig, range).start + 2, ..pages(&rig, range) };
    assert_eq!(rig.engine.hold_some(last, Access::Read), Err(HoldError::Unreachable(last.start)));
    assert_eq!(a.get(&rig, at(0)), Ok(1));
    fleet.check();
    rig.engine.check();
}

/// G5: devices have nothing of what has gone, or has moved; what is discarded they find as the kernel has it.
#[test]
fn g5_changes_of_shared_memory_reach_devices() {
    let (rig, fleet, [a, b, _]) = rig();
    let range = mapped(&rig, 2 * BLOCK, Keep::Shared);
    let at = |n| page_at(range, n);
    for chip in [&a, &b] {
        (0..1024).for_each(|n| assert_eq!(chip.get(&rig, at(n)), Ok(100 + n as u64)));
    }
    rig.sim().dontneed(part(range, 0, 4));
    assert_eq!((a.target(at(0)), b.target(at(0))), (None, None));
    assert_eq!((a.get(&rig, at(0)), get(&rig, at(0))), (Ok(100), Ok(100)));
    rig.sim().remove(part(range, 0, 4));
    assert_eq!((a.get(&rig, at(0)), get(&rig, at(0)), b.get(&rig, at(4))), (Ok(0), Ok(0), Ok(104)));
    rig.sim().munmap(part(range, 512, 600));
    assert_eq!(a.get(&rig, at(599)), Err(FaultError::NotManaged(at(599))));
    assert_eq!((a.get(&rig, at(600)), b.get(&rig, at(511))), (Ok(700), Ok(611)));
    let to = rig.sim().remap(part(range, 600, 1024), None).unwrap();
    assert_eq!(b.get(&rig, at(600)), Err(FaultError::NotManaged(at(600))));
    b.put(&rig, to.0, 9).unwrap();
    assert_eq!((get(&rig, to.0), a.get(&rig, to.0 + PAGE as u64)), (Ok(9), Ok(701)));
    fleet.check();
    rig.engine.check();
    // What is given back is what was adopted; what has moved is managed where it is.
    rig.engine.disown(range).unwrap();
    assert_eq!(a.get(&rig, at(0)), Err(FaultError::NotManaged(at(0))));
    assert_eq!(a.get(&rig, to.0), Ok(9));
    rig.engine.check();
}

/// G5: of a file the kernel tells nothing. A device finds out that it is gone, and so much of it is forgotten as is.
#[test]
fn g5_a_file_that_is_gone_is_forgotten_when_somebody_looks() {
    let (rig, fleet, [a, b, _]) = rig();
    let range = mapped(&rig, 8 * PAGE as u64, Keep::File);
    let at = |n| page_at(range, n);
    (0..8).for_each(|n| assert_eq!(a.get(&rig, at(n)), Ok(100 + n as u64)));
    rig.sim().munmap(part(range, 2, 5));
    assert_eq!(a.get(&rig, at(3)), Err(FaultError::NotManaged(at(3))));
    assert_eq!([2, 3, 4, 5].map(|n| a.target(at(n)).is_some()), [true, false, false, true]);
    assert_eq!(a.get(&rig, at(2)), Err(FaultError::NotManaged(at(2))));
    assert_eq!((a.get(&rig, at(1)), b.get(&rig, at(5))), (Ok(101), Ok(105)));
    let left: Vec<u64> = rig.engine.in_place_parts(pages(&rig, range)).map(|p| p.pages().0).collect();
    assert_eq!(left, [2, 3]);
    fleet.check();
    rig.engine.check();
}

/// What is stale stands in nobody's way: neither in that of memory that is adopted, nor of what grows.
#[test]
fn g13_what_is_stale_makes_room() {
    let (rig, fleet, [a, ..]) = rig();
    let range = mapped(&rig, 8 * PAGE as u64, Keep::File);
    let at = |n| page_at(range, n);
    (0..8).for_each(|n| assert_eq!(a.get(&rig, at(n)), Ok(100 + n as u64)));
    rig.sim().munmap(range);
    rig.sim().map_kept_at(range, Keep::Private);
    rig.engine.adopt(range).unwrap();
    assert_eq!(a.mapped(), 0);
    put(&rig, at(1), 5);
    assert_eq!((a.get(&rig, at(1)), a.get(&rig, at(2))), (Ok(5), Ok(0)));
    assert!(matches!(a.target(at(2)), Some(Target::Own(_))));
    rig.engine.check();
    // Behind managed memory, which grows to where a file was.
    let plain = rig.sim().map_plain(4 * PAGE as u64);
    rig.engine.adopt(plain).unwrap();
    let file = VaRange { start: plain.end, end: Va(plain.end.0 + 4 * PAGE as u64) };
    rig.sim().map_kept_at(file, Keep::File);
    rig.engine.adopt_in_place(file).unwrap();
    assert_eq!(a.get(&rig, file.start.0), Ok(0));
    rig.sim().munmap(file);
    assert!(rig.sim().grow_in_place(plain.end, file.len()));
    assert_eq!(get(&rig, page_at(file, 2)), Ok(0));
    put(&rig, page_at(file, 2), 6);
    assert_eq!(a.get(&rig, page_at(file, 2)), Ok(6));
    assert!(!rig.engine.region(pages(&rig, file).start).unwrap().attributes.has(Attributes::IN_PLACE));
    fleet.check();
    rig.engine.check();
}

/// A device faults first where something else has come to be.
#[test]
fn g5_a_device_finds_what_has_taken_the_place_of_a_file() {
    let (rig, fleet, [a, ..]) = rig();
    let plain = rig.sim().map_plain(4 * PAGE as u64);
    rig.engine.adopt(plain).unwrap();
    let file = VaRange { start: plain.end, end: Va(plain.end.0 + 4 * PAGE as u64) };
    rig.sim().map_kept_at(file, Keep::File);
    rig.engine.adopt_in_place(file).unwrap();
    rig.sim().munmap(file);
    assert!(rig.sim().grow_in_place(plain.end, file.len()));
    a.put(&rig, page_at(file, 1), 6).unwrap();
    assert!(matches!(a.target(page_at(file, 1)), Some(Target::Own(_))));
    assert_eq!(get(&rig, page_at(file, 1)), Ok(6));
    fleet.check();
    rig.engine.check();
}

/// Where the kernel refuses to tell, it is as with a file; and what is managed already is not so twice.
#[test]
fn g16_refusals_change_nothing() {
    let (rig, fleet, [a, ..]) = rig();
    rig.engine.kernel.plan(Planned {
        call: Call::Adopt,
        after: 0,
        times: 1,
        trouble: Trouble::NoMemory,
        pages: peerspace_core::addr::Pages(0),
    });
    let range = mapped(&rig, 4 * PAGE as u64, Keep::Shared);
    assert!(!is_watched(&rig, range));
    assert_eq!(a.get(&rig, page_at(range, 1)), Ok(101));
    let regions = rig.engine.regions.len();
    assert!(rig.engine.adopt_in_place(part(range, 1, 2)).is_err());
    let own = rig.region(1);
    assert!(rig.engine.adopt_in_place(own).is_err());
    assert_eq!(rig.engine.regions.len(), regions + 1);
    rig.release(own);
    rig.sim().munmap(range);
    assert_eq!(a.get(&rig, page_at(range, 0)), Err(FaultError::NotManaged(page_at(range, 0))));
    assert!(rig.engine.regions.is_empty());
    // A device that cannot enter translations has none, and says so.
    let range = mapped(&rig, BLOCK, Keep::Shared);
    a.trouble().bad_maps.store(1, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(a.get(&rig, page_at(range, 1)), Err(FaultError::Device(..))));
    assert_eq!(a.mapped(), 0);
    fleet.check();
    rig.engine.check();
}

/// G12, Z3: at the moment of a fork nobody maps anything; who is detached has nothing left of it.
#[test]
fn g12_a_fork_and_a_detachment_take_it_from_devices() {
    let (rig, fleet, [a, b, _]) = rig();
    let range = mapped(&rig, BLOCK, Keep::Shared);
    assert_eq!((a.get(&rig, page_at(range, 0)), b.get(&rig, page_at(range, 9))), (Ok(100), Ok(109)));
    rig.engine.contexts.freeze();
    rig.engine.recall_all();
    assert_eq!((a.mapped(), b.mapped()), (0, 0));
    rig.sim().fork_in_parent();
    rig.engine.contexts.thaw();
    assert_eq!((a.get(&rig, page_at(range, 0)), b.get(&rig, page_at(range, 9))), (Ok(100), Ok(109)));
    rig.engine.detach(a.id()).map(drop).unwrap();
    assert_eq!((a.mapped(), b.mapped()), (0, 512));
    assert_eq!(b.get(&rig, page_at(range, 3)), Ok(103));
    fleet.check();
    rig.engine.check();
}
