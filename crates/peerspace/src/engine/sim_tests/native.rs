//! Memory that the kernel populated by itself, or that moved where nobody can follow: what may be taken in hand, and when
//! there is nothing left to do.

use super::{ABLE, Came, PAGE, Rig, Shelf};
use peerspace_core::addr::{PageRange, Pages, Va};
use peerspace_core::regions::Attributes;
use peerspace_os::Kernel;
use peerspace_os::inject::{Call, Planned};

/// Native pages are taken in hand where they belong to a managed region, and the program has not just discarded them:
/// else they are about to go, or somebody else's.
#[test]
fn what_is_about_to_go_is_not_taken_in_hand() {
    let rig = Rig::new(ABLE, [Shelf::new(100)], false);
    let plain = rig.sim().map_plain(40 * PAGE as u64);
    (0..40).for_each(|n| assert_eq!(rig.write(Va(plain.start.0 + n * PAGE as u64), &[7]), Came::Done));
    rig.engine.adopt(plain).unwrap();
    let pages = rig.engine.geometry.pages_inside(plain);
    let first = PageRange { end: pages.start + 20, ..pages };
    let kept = |kept: bool| {
        let set = |a: Attributes| if kept { a.with(Attributes::KEPT) } else { a.without(Attributes::KEPT) };
        rig.engine.advise(pages, set).unwrap();
    };
    assert!(rig.engine.may_take(pages));
    kept(true);
    assert!(!rig.engine.may_take(pages));
    kept(false);
    rig.engine.going.note(first);
    assert!(!rig.engine.may_take(pages));
    // Of all that reclaim does, nothing touches them.
    rig.reclaim(40);
    let there = |vpn| rig.sim().is_present(rig.engine.geometry.va(vpn)).unwrap();
    assert!(first.iter().all(there));
    // Whoever says that it is over says so of what it has announced, and where everybody does that.
    let announced = |part: PageRange| {
        rig.engine.announce_change(&[part]);
        rig.engine.change_is_over(&[part]);
        rig.engine.may_take(part)
    };
    let half = PageRange { end: first.start + 10, ..first };
    assert!(!announced(half));
    rig.engine.announcements.promise();
    assert!(announced(half) && !rig.engine.may_take(first));
    let last = PageRange { start: first.start + 19, ..first };
    rig.engine.announce_change(&[last]);
    // Another thread is still at it there.
    assert!(!announced(first));
    rig.engine.change_is_over(&[last]);
    assert!(announced(first));
    rig.engine.disown(plain).unwrap();
    assert!(!rig.engine.may_take(PageRange { start: first.end, ..pages }), "it is no region");
}

/// A mapping that moves and cannot be followed is the end of a program that would lose pages: no zeros in their place.
#[test]
fn a_move_that_cannot_be_followed_ends_the_program() {
    use std::os::unix::process::ExitStatusExt;
    let name = "engine::sim_tests::native::moves_out_of_sight";
    let tests = std::env::current_exe().unwrap();
    let ended =
        std::process::Command::new(tests).args(["--ignored", "--exact", "--nocapture", name]).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.signal(), Some(6), "{said}");
    assert!(said.contains("cannot be followed") && said.contains("40 pages"), "{said}");
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn moves_out_of_sight() {
    let rig = Rig::new(ABLE, [Shelf::new(100)], true);
    let plain = rig.sim().map_plain(40 * PAGE as u64);
    (0..40).for_each(|n| assert_eq!(rig.write(Va(plain.start.0 + n * PAGE as u64), &[7]), Came::Done));
    rig.engine.adopt(plain).unwrap();
    rig.reclaim(40);
    let trouble = peerspace_os::Trouble::NoMemory;
    let always = Planned { call: Call::Grow, after: 0, times: u64::MAX, trouble, pages: Pages(0) };
    rig.engine.kernel.plan(always);
    let _ = rig.sim().remap(plain, None);
}
