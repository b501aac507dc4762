//! Memory that is being adopted while the program changes its mappings (rules G1, G5). The kernel tells nothing of what is not
//! registered yet; so a region is nothing but what is, and its pages may leave.

use super::races::{Receiver, explore, page, put, rig, word};
use super::{ABLE, Came, PAGE};
use crate::engine::adopt::AdoptError;
use peerspace_core::addr::VaRange;
use peerspace_core::regions::Attributes;
use peerspace_os::Trouble;
use peerspace_os::sim::Keep;
use shuttle::rand::Rng;
use shuttle::thread;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What the program does to the second half of what is being adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Unmaps,
    MapsAnew,
    Moves,
}

/// How often it was adopted, and how often refused.
type Outcomes = [AtomicU64; 2];

fn adoption_races_with(change: Change, outcomes: &Outcomes) {
    let (rig, _shelf) = rig(ABLE);
    let receiver = Receiver::start(&rig);
    let plain = rig.sim().map_plain(8 * PAGE as u64);
    (0..8).for_each(|n| put(&rig, page(plain, n), 100 + n as u64));
    let rest = VaRange { start: page(plain, 4), end: plain.end };
    let changer = {
        let rig = rig.clone();
        thread::spawn(move || {
            // At any moment of the adoption, which takes some steps.
            (0..shuttle::rand::thread_rng().gen_range(0..60)).for_each(|_| thread::yield_now());
            if change == Change::Moves {
                return rig.sim().remap(rest, None);
            }
            rig.sim().munmap(rest);
            if change == Change::MapsAnew {
                (0..2).for_each(|_| thread::yield_now());
                rig.sim().map_kept_at(rest, Keep::Private);
                (4..8).for_each(|n| put(&rig, page(plain, n), 200 + n as u64));
            }
            None
        })
    };
    match rig.engine.adopt(plain) {
        Ok(()) => outcomes[0].fetch_add(1, Relaxed),
        Err(why) => {
            let hole = matches!(why, AdoptError::Kernel(Trouble::Absent));
            assert!(hole || change == Change::Unmaps, "{why:?}");
            outcomes[1].fetch_add(1, Relaxed)
        }
    };
    let moved = changer.join().unwrap().and_then(|to| VaRange::new(to, rest.len()));
    assert_eq!(moved.is_some(), change == Change::Moves);
    rig.engine.settle_changes();
    rig.reclaim(40);
    let uncertain = Attributes::KEPT.with(Attributes::ARRIVING);
    let regions: Vec<_> = rig.engine.regions.iter().collect();
    assert!(regions.iter().all(|r| !r.attributes.has_any(uncertain)), "{regions:?} never leave");
    for n in 0..8 {
        let want = match (n, change) {
            (..4, _) => Ok(100 + n as u64),
            (_, Change::MapsAnew) => Ok(200 + n as u64),
            (_, Change::Unmaps | Change::Moves) => Err(Came::Refused),
        };
        assert_eq!(word(&rig, page(plain, n)), want, "page {n}");
    }
    if let Some(moved) = moved {
        (0..4).for_each(|n| assert_eq!(word(&rig, page(moved, n)), Ok(104 + n as u64), "page {n} of what moved"));
        rig.sim().munmap(moved);
    }
    rig.sim().munmap(plain);
    rig.engine.settle_changes();
    assert_eq!(rig.engine.regions.iter().next(), None, "nobody has said that it is gone");
    rig.sim().map_kept_at(plain, Keep::Private);
    (0..8).for_each(|n| assert_eq!(word(&rig, page(plain, n)), Ok(0), "page {n} of something else"));
    receiver.end();
    rig.engine.check();
}

#[test]
fn what_is_unmapped_while_it_is_adopted_is_no_region() {
    static DONE: Outcomes = [const { AtomicU64::new(0) }; 2];
    explore(300, || adoption_races_with(Change::Unmaps, &DONE));
    assert!(DONE.iter().all(|done| done.load(Relaxed) > 0), "{DONE:?}");
}

#[test]
fn what_takes_the_place_of_what_is_being_adopted_is_managed_or_not() {
    static DONE: Outcomes = [const { AtomicU64::new(0) }; 2];
    explore(300, || adoption_races_with(Change::MapsAnew, &DONE));
    assert!(DONE[0].load(Relaxed) > 0, "{DONE:?}");
}

#[test]
fn what_moves_while_it_is_adopted_is_managed_where_it_is_or_not() {
    static DONE: Outcomes = [const { AtomicU64::new(0) }; 2];
    explore(300, || adoption_races_with(Change::Moves, &DONE));
    assert!(DONE.iter().all(|done| done.load(Relaxed) > 0), "{DONE:?}");
}
