//! The facade over a real Linux kernel, and what else peerspace needs from it.

pub mod child;
pub mod files;
pub mod fork;
pub mod futex;
pub mod kernel;
pub mod map;
pub mod memory;
pub mod probe;
pub mod raw_thread;
pub mod scan;
pub mod signal;
mod staging;
pub mod thread;
pub mod uffd;

pub use kernel::{Delivery, Linux, Setup};

/// Ends the process at once with `status`, running nothing else.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit is always allowed.
    unsafe { libc::_exit(status) }
}
