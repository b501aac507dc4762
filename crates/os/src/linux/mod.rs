//! The facade over a real Linux kernel, and what else peerspace needs from it.

pub mod child;
mod choice;
pub mod files;
pub mod fork;
pub mod futex;
mod inplace;
pub mod interpose;
pub mod kernel;
pub mod lock;
pub mod map;
pub mod memory;
mod moved;
mod pass;
pub mod place;
pub mod probe;
pub mod raw_thread;
mod read_only;
pub mod remap;
mod renew;
pub mod scan;
pub mod self_memory;
pub mod shared;
pub mod signal;
mod staging;
pub mod thread;
pub mod transfer;
pub mod uffd;
#[cfg(feature = "uring")]
pub mod uring;
mod watch;

pub use kernel::{Delivery, Linux, Setup};
pub use renew::Kept;

/// Ends the process at once with `status`, running nothing else.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit is always allowed.
    unsafe { libc::_exit(status) }
}

/// Runs `f`, which may call libc, and leaves this thread's `errno` as it was: for what a fault handler calls.
pub(crate) fn keeping_errno<T>(f: impl FnOnce() -> T) -> T {
    let before = interpose::errno();
    let out = f();
    interpose::set_errno(before);
    out
}
