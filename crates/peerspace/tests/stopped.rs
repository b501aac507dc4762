//! A process that is stopped for a while, by a shell or a debugger, has waited for nothing: it goes on as if nothing had happened
//! (rules G5, Z9). In a binary of its own, which is stopped as a whole.

#[path = "peers/chip.rs"]
mod chip;
mod common;

use chip::Chip;
use common::*;
use peerspace::device::deadline::Deadline;
use peerspace::device::mmu::{MmuDescriptor, Mode};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Space};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// How long a device is given.
const DEADLINE: Duration = Duration::from_millis(300);

/// Stops this process for longer than that.
fn stop() {
    let begin = Instant::now();
    let mut waker = Command::new("sh").args(["-c", "sleep 1; kill -CONT $PPID"]).spawn().unwrap();
    // SAFETY: a signal to this process.
    unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
    // This thread may run for a moment yet.
    assert!(waker.wait().unwrap().success());
    assert!(begin.elapsed() > DEADLINE * 2);
}

#[test]
fn what_is_stopped_gives_nobody_up() {
    g5_a_device_that_is_stopped_with_its_process_is_not_cut_off();
    z9_a_device_behind_a_deadline_that_is_stopped_with_its_process_keeps_its_data();
}

fn g5_a_device_that_is_stopped_with_its_process_is_not_cut_off() {
    let chip = Chip::new("chip", 16 << 20, MmuDescriptor::new(Mode::Exclusive).deadline(DEADLINE));
    let space =
        Space::builder().host(16 << 20).device(Soft::new(mib(64)).unwrap()).device(chip.clone()).build().unwrap();
    let mut region = space.region(mib(4)).unwrap();
    fill(region.typed_mut());
    (0..1024).for_each(|i| assert_eq!(chip.load(region.as_ptr() as u64 + i * chip::PAGE), Ok(word(i as usize))));
    // It does not let go before it is allowed to.
    chip.trouble().late.store(1, SeqCst);
    chip.trouble().never_done.store(true, SeqCst);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| is_filled(&region));
        std::thread::sleep(DEADLINE / 3);
        assert!(!reader.is_finished());
        stop();
        chip.trouble().never_done.store(false, SeqCst);
        assert!(reader.join().unwrap());
    });
    chip.trouble().late.store(0, SeqCst);
    assert_eq!(chip.load(region.as_ptr() as u64), Ok(word(0)), "it was not cut off");
    space.check();
}

fn z9_a_device_behind_a_deadline_that_is_stopped_with_its_process_keeps_its_data() {
    let orders = Orders::new();
    let device = Deadline::new(Obedient::new(&orders, 64 * MIB), DEADLINE).unwrap();
    let space = space(Faults::Signal, 8 * MIB, device);
    let region = filled(&space, 8 * MIB);
    push_out(&space, 8 * MIB);
    let gate = Arc::new(Gate::default());
    let held = gate.clone();
    let mut first = true;
    orders.on_load(move |_| match std::mem::replace(&mut first, false) {
        true => Answer::Waits(held.clone()),
        false => Answer::Good,
    });
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| is_filled(&region));
        gate.await_arrival();
        stop();
        gate.open();
        assert!(reader.join().unwrap());
    });
    space.check();
}
