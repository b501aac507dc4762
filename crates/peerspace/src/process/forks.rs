//! Forks of a managed process (rule G12).
//!
//! The thread that forks is the program's and has none of our descriptors, so the keeper prepares everything, and a
//! new keeper sets everything up in the child, while the forking thread waits without touching the program's memory.
//! See [`crate::fork`] for what has to be done.

use super::keeper::{Process, process, spawn_keeper, start_services};
use crate::fork::{Held, come_to_rest, go_on, new_life};
use peerspace_os::OsError;
use peerspace_os::linux::files;
use peerspace_os::linux::fork::ForkHandler;
use peerspace_os::linux::futex::{wait_word, wake_word};
use std::sync::atomic::{AtomicU32, Ordering};

/// The handler of forks.
#[derive(Debug, Default)]
pub(super) struct ProcessForks;

static HELD: Held = Held::new();
/// 0 while a forked child is being set up.
static READY: AtomicU32 = AtomicU32::new(1);

impl ForkHandler for ProcessForks {
    fn before(&self) {
        process().before_fork();
        files::carry_out();
        // When the keeper is at rest, which looks at the stacks.
        super::stacks::before_fork();
    }

    fn parent(&self) {
        super::stacks::after_fork();
        files::carry_back();
        process().after_fork();
    }

    fn child(&self) {
        READY.store(0, Ordering::Release);
        files::at_home();
        let here = 0u8;
        super::stacks::forget_others(&raw const here as u64);
        super::stacks::after_fork();
        process().renew();
        if let Err(e) = spawn_keeper(true) {
            crate::tell::warning(format_args!("a forked process cannot go on: {e}"));
            peerspace_os::linux::exit_now(125);
        }
        while READY.load(Ordering::Acquire) == 0 {
            wait_word(&READY, 0, None);
        }
    }
}

/// On the keeper: brings the engine to rest.
pub(super) fn before(process: &Process) {
    if let Some(engine) = process.engine.get() {
        come_to_rest(engine, &HELD);
    }
}

/// On the keeper: lets the engine go on.
pub(super) fn after(process: &Process) {
    if let Some(engine) = process.engine.get() {
        go_on(engine, &HELD);
    }
}

/// On the keeper of a forked child: sets the engine up.
pub(super) fn set_up_child(process: &Process) -> Result<(), OsError> {
    if let Some(engine) = process.engine.get() {
        new_life(engine, false)?;
    }
    Ok(())
}

/// On the keeper of a forked child, when its descriptors are its own: starts the engine's threads and lets the
/// program run.
pub(super) fn child_is_ready(process: &Process) {
    if let Some(engine) = process.engine.get() {
        start_services(engine);
        engine.contexts.thaw();
        engine.service.go(&process.park());
        HELD.let_go(engine);
    }
    READY.store(1, Ordering::Release);
    wake_word(&READY, u32::MAX);
}
