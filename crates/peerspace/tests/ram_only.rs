//! The build without devices (rule Z10): a space has its RAM and nothing else, and loses nothing for that.
#![cfg(not(feature = "devices"))]

use peerspace::{Faults, Region, Space};
use std::process::Command;

const MIB: usize = 1 << 20;
const HOST: usize = 8 * MIB;

fn space(faults: Faults) -> Space {
    Space::builder().host(HOST as u64).faults(faults).build().expect("a space that needs no device")
}

/// The word `i` of what is written.
fn word(i: usize) -> u64 {
    (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(region: &mut Region) {
    let words: &mut [u64] = region.typed_mut();
    words.iter_mut().enumerate().for_each(|(i, w)| *w = word(i));
}

#[track_caller]
fn verify(region: &Region) {
    let words: &[u64] = region.typed();
    let wrong = words.iter().enumerate().find(|(i, w)| **w != word(*i));
    assert!(wrong.is_none(), "(number, found) of a word that is wrong: {wrong:x?}");
}

fn what_fits_stays_within_the_budget(faults: Faults) {
    let space = space(faults);
    let mut region = space.region(HOST as u64 / 2).unwrap();
    assert!(region.bytes().iter().all(|b| *b == 0));
    fill(&mut region);
    verify(&region);
    region.discard(0..MIB).unwrap();
    assert!(region.bytes()[..MIB].iter().all(|b| *b == 0) && region.bytes()[MIB..].iter().any(|b| *b != 0));
    space.check();
    let s = space.statistics();
    assert!(s.peak_bytes <= s.limit_bytes && s.forced_bytes == 0, "{s:#?}");
    assert!(s.devices.is_empty() && s.pages_out == 0 && s.pages_in == 0, "{s:#?}");
}

#[test]
fn what_fits_stays_within_the_budget_by_signal() {
    what_fits_stays_within_the_budget(Faults::Signal);
}

#[test]
fn what_fits_stays_within_the_budget_by_threads() {
    what_fits_stays_within_the_budget(Faults::Threads);
}

fn zeros_leave_without_a_device(faults: Faults) {
    let space = space(faults);
    let region = space.region(4 * HOST as u64).unwrap();
    for _ in 0..2 {
        assert!(region.bytes().iter().all(|b| *b == 0));
    }
    space.check();
    let s = space.statistics();
    assert!(s.peak_bytes <= s.limit_bytes && s.forced_bytes == 0, "{s:#?}");
    assert!(s.clean_dropped + s.zero_dropped > 0, "{s:#?}");
}

#[test]
fn zeros_leave_without_a_device_by_signal() {
    zeros_leave_without_a_device(Faults::Signal);
}

#[test]
fn zeros_leave_without_a_device_by_threads() {
    zeros_leave_without_a_device(Faults::Threads);
}

/// Set in the process that is watched.
const WATCHED: &str = "PEERSPACE_TEST_WATCHED";

/// Runs in a process of its own, whose words on standard error are looked at.
fn what_does_not_fit_exceeds_the_budget_with_a_warning(test: &str, faults: Faults) {
    if std::env::var_os(WATCHED).is_none() {
        let mut watched = Command::new(std::env::current_exe().unwrap());
        let output = watched.args(["--exact", test, "--nocapture"]).env(WATCHED, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
        let warnings = said.lines().filter(|l| l.contains("no device has room") && l.contains("8 MiB is exceeded"));
        assert_eq!(warnings.count(), 1, "{said}");
        return;
    }
    let space = space(faults);
    let mut region = space.region(3 * HOST as u64).unwrap();
    fill(&mut region);
    for _ in 0..2 {
        verify(&region);
    }
    space.check();
    let s = space.statistics();
    assert!(s.used_bytes >= 3 * HOST as u64 && s.forced_bytes > 0, "{s:#?}");
    assert_eq!((s.poisoned, s.pages_out, s.device_errors), (0, 0, 0), "{s:#?}");
    drop(region);
    // What is given back is room again.
    let mut region = space.region(HOST as u64 / 2).unwrap();
    fill(&mut region);
    verify(&region);
    assert!(space.statistics().used_bytes <= HOST as u64);
}

#[test]
fn what_does_not_fit_exceeds_the_budget_by_signal() {
    let test = "what_does_not_fit_exceeds_the_budget_by_signal";
    what_does_not_fit_exceeds_the_budget_with_a_warning(test, Faults::Signal);
}

#[test]
fn what_does_not_fit_exceeds_the_budget_by_threads() {
    let test = "what_does_not_fit_exceeds_the_budget_by_threads";
    what_does_not_fit_exceeds_the_budget_with_a_warning(test, Faults::Threads);
}

#[test]
fn a_forked_child_has_everything_too() {
    let space = space(Faults::Signal);
    let mut region = space.region(HOST as u64 / 2).unwrap();
    fill(&mut region);
    region.cold(0..region.len()).unwrap();
    // SAFETY: the child looks at the region, which is what a fork is handled for, and ends at once.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let words: &mut [u64] = region.typed_mut();
        let right = words.iter().enumerate().all(|(i, w)| *w == word(i));
        words.fill(7);
        // SAFETY: ends the child without running anything of its parent's.
        unsafe { libc::_exit(if right && words.iter().all(|w| *w == 7) { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
    verify(&region);
    space.check();
}
