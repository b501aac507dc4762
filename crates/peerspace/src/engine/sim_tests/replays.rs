//! Sequences that the oracle found to go wrong once, and that must not again.

use super::ABLE;
use super::device_ops::{DeviceOp, play_on_devices};
use super::oracle::{Op, play};
use peerspace_os::Capabilities;

/// Plays `ops` after what [`play`] begins with: area 0 is a region of 1024 pages, area 1 adopted memory of 700.
#[track_caller]
fn once_failed(ops: &[Op]) {
    for can in [ABLE, Capabilities { huge: true, ..ABLE }, Capabilities { write_protect: false, ..ABLE }] {
        play(can, true, ops.to_vec());
    }
}

/// Before Linux 5.19 pages that are given up stay protected, and are so when they are adopted once more.
#[test]
fn protection_that_was_left_behind_stops_nobody() {
    let at = 1024 + 660;
    once_failed(&[
        Op::Read { at },
        Op::Disown { area: 1 },
        Op::Adopt { area: 1 },
        Op::Write { at, offset: 5, byte: 7 },
        Op::Read { at },
    ]);
}

/// What grew in place is registered, also when the region that it grew from is elsewhere.
#[test]
fn what_grew_in_place_is_found_without_its_region() {
    once_failed(&[Op::Grow { area: 1, pages: 34 }, Op::Remap { at: 1024, pages: 700, over: None }]);
}

/// A page that was lost does not become zero because its memory is given up and adopted again.
#[test]
fn what_is_lost_stays_lost_when_it_is_given_up() {
    once_failed(&[
        Op::Reclaim { steps: 167 },
        Op::Break { count: 27, seed: 12629843116173771675 },
        Op::Disown { area: 1 },
        Op::Adopt { area: 1 },
        Op::Stream { at: 1024, pages: 700, write: false, down: true },
    ]);
}

/// When the kernel refuses to let go of a part, what came before is no region: nobody would tell of its end.
#[test]
fn what_was_given_up_before_a_refusal_is_no_region() {
    once_failed(&[
        Op::Reclaim { steps: 160 },
        // So that the area is several regions, with a buried page between each two.
        Op::Break { count: 2, seed: 20 },
        Op::Fail { seed: 1, one_in: 3 },
        Op::Disown { area: 1 },
    ]);
}

/// What grew in place and is no region is asked about until it is known whose it is: not to know is not to say that it is
/// none of ours.
#[test]
fn what_grew_in_place_is_not_refused_because_nobody_could_tell() {
    once_failed(&[
        Op::Grow { area: 1, pages: 30 },
        Op::Disown { area: 1 },
        Op::Fail { seed: 1, one_in: 3 },
        Op::Stream { at: 1024 + 700, pages: 30, write: true, down: true },
    ]);
}

/// A device that is alone in having a page of memory that is read-only has it read-only.
#[test]
fn what_is_read_only_moves_to_a_device_that_only_reads_it() {
    let can = Capabilities { move_pages: false, poison: false, write_protect: false, ..ABLE };
    play_on_devices(
        can,
        true,
        vec![
            Op::Protect { at: 1024 + 197, pages: 9, allowed: 1 },
            Op::Detach { which: 12808387891346480886 },
            Op::OnDevice(DeviceOp::Send { chip: 1, at: 1024 + 100, pages: 600, home: false }),
        ],
    );
}

/// Nothing is sent to a device that has failed, not even zeros, which it makes itself (Z9).
#[test]
fn nothing_goes_to_a_device_that_has_failed() {
    for can in [ABLE, Capabilities { move_pages: false, poison: false, ..ABLE }] {
        play_on_devices(
            can,
            true,
            vec![
                Op::Region { blocks: 1 },
                Op::OnDevice(DeviceOp::Fail { chip: 3, keeps: false }),
                Op::OnDevice(DeviceOp::Send { chip: 3, at: 1024 + 700 + 200, pages: 100, home: false }),
            ],
        );
    }
}
