//! Devices while the process forks (rule G12): their faults wait, or need nothing that a fork would share; none is refused.

use super::chip::{Chip, Model, page_at};
use super::fleet::Fleet;
use super::{ABLE, Came, PAGE, Rig};
use crate::device::mmu::{FaultError, Mode};
use crate::engine::make_room::Room;
use crate::engine::tier::Closed;
use peerspace_core::addr::{Order, Va, VaRange};
use peerspace_os::sim::Keep;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

/// A coherent device, which accesses the host's memory too, or not.
fn rig(remote: bool) -> (Rig, Fleet, Chip) {
    let rig = Rig::new(ABLE, [], true);
    let fleet = Fleet::default();
    fleet.watch(&rig);
    let model = Model::new(2, Mode::Exclusive).coherent();
    let chip = Chip::join(&rig, &fleet, if remote { model.remote() } else { model });
    (rig, fleet, chip)
}

fn put(rig: &Rig, range: VaRange) {
    for n in 0..range.len() as usize / PAGE {
        assert_eq!(rig.write(Va(page_at(range, n)), &(100 + n as u64).to_ne_bytes()), Came::Done);
    }
}

/// Memory that stays where it is takes nothing of a device: until everybody is brought to rest it is used, and after.
#[test]
fn g12_what_stays_is_used_until_the_fork() {
    let (rig, fleet, chip) = rig(true);
    let range = rig.sim().map_kept(4 * PAGE as u64, Keep::Shared);
    put(&rig, range);
    rig.engine.adopt_in_place(range).unwrap();
    let turn = rig.engine.take_turn();
    rig.engine.leave_shared_memory(&turn);
    assert_eq!(chip.get(&rig, page_at(range, 1)), Ok(101));
    rig.engine.contexts.freeze();
    rig.engine.recall_all();
    assert_eq!(chip.mapped(), 0);
    rig.sim().fork_in_parent();
    rig.engine.contexts.thaw();
    assert_eq!(chip.get(&rig, page_at(range, 2)), Ok(102));
    rig.engine.reopen_shared_memory();
    assert_eq!(chip.get(&rig, page_at(range, 3)), Ok(103));
    // Who is taken away meanwhile gets nothing.
    rig.engine.leave_shared_memory(&turn);
    rig.engine.tiers.by_id(chip.id()).unwrap().close(true);
    rig.engine.reopen_shared_memory();
    assert_eq!(chip.get(&rig, page_at(range, 0)), Err(FaultError::Cut));
    rig.engine.tiers.by_id(chip.id()).unwrap().close(false);
    assert_eq!(chip.get(&rig, page_at(range, 0)), Ok(100));
    drop(turn);
    fleet.check();
    rig.engine.check();
}

/// A fault that needs room on a device whose memory the fork would share waits for the end of the fork, and of all others.
#[test]
fn g12_what_moves_waits_for_the_end_of_the_fork() {
    let (rig, fleet, chip) = rig(false);
    let range = rig.region(1);
    put(&rig, VaRange { end: Va(range.start.0 + 4 * PAGE as u64), ..range });
    let turn = rig.engine.take_turn();
    rig.engine.leave_shared_memory(&turn);
    assert_eq!(rig.engine.make_room(chip.mmu(), Order::BASE), Room::Closed(Closed::Forking));
    let (at_it, over) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            at_it.store(true, SeqCst);
            // More than the device holds: some of it leaves again.
            for n in 0..4 {
                assert_eq!(chip.get(&rig, page_at(range, n)), Ok(100 + n as u64));
                assert!(over.load(SeqCst) || n == 0, "page {n} is on the device while the process forks");
            }
        });
        while !at_it.load(SeqCst) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(chip.mapped(), 0);
        over.store(true, SeqCst);
        for _ in 0..200 {
            rig.engine.reopen_shared_memory();
            rig.engine.leave_shared_memory(&turn);
        }
        rig.engine.reopen_shared_memory();
    });
    drop(turn);
    fleet.check();
    rig.engine.check();
}
