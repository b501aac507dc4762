//! The wish of the user to stop: Ctrl-C, a hang-up, a request to end.
//!
//! The signal is noted, and the processes of contenders are ended, so that whoever waits for one of them goes on,
//! sees the note, and takes everything down in the ordinary way.

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

static SET: AtomicBool = AtomicBool::new(false);
static CONTENDERS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Begins to listen. Refusal leaves the signals as they are: they end the process, and the steward sees that.
pub(crate) fn listen() {
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    // Never joined: it ends with the process.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            // Release: whoever finds a contender ended by this finds the note.
            SET.store(true, Ordering::Release);
            contenders(|pids| {
                for pid in pids.iter() {
                    let _ = kill_process(*pid, Signal::KILL);
                }
            });
        }
    });
}

/// Whether the user wants to stop.
pub(crate) fn is_set() -> bool {
    SET.load(Ordering::Acquire)
}

/// Changes the list of processes that are ended when the user wants to stop.
pub(crate) fn contenders<T>(f: impl FnOnce(&mut Vec<Pid>) -> T) -> T {
    f(&mut CONTENDERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}
