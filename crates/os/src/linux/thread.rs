//! Threads of our own.
//!
//! They run with all signals blocked, so that no handler of the program ever runs on them.

use super::signal::without_signals;
use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread named `name` that runs `f`.
///
/// # Errors
/// When the system has no thread to give.
pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // The mask is inherited.
    without_signals(|| Builder::new().name(name.into()).spawn(f))
}
