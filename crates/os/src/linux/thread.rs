//! Threads of our own.
//!
//! They run with all signals blocked, so that no handler of the program ever runs on them. For the same reason,
//! and because some of them are the ones that serve faults, they must never touch managed memory: where the
//! program's global allocator hands out managed memory, what they allocate, and what is allocated to start them,
//! has to come from elsewhere. [`unmanaged`] says so to that allocator.

use super::signal::without_signals;
use std::cell::Cell;
use std::io;
use std::thread::{Builder, JoinHandle};

thread_local! {
    /// How many [`unmanaged`] calls this thread is in. Not looked at on the fault path.
    static UNMANAGED: Cell<u32> = const { Cell::new(0) };
}

/// Runs `f`; what this thread allocates meanwhile is not managed memory. See [`is_unmanaged`].
pub fn unmanaged<T>(f: impl FnOnce() -> T) -> T {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            UNMANAGED.with(|n| n.set(n.get() - 1));
        }
    }
    UNMANAGED.with(|n| n.set(n.get() + 1));
    let _leave = Leave;
    f()
}

/// True inside [`unmanaged`], and in every thread of our own: an allocator of managed memory leaves such a request
/// to the system.
pub fn is_unmanaged() -> bool {
    UNMANAGED.with(|n| n.get() > 0)
}

/// Starts a thread named `name` that runs `f`.
///
/// # Errors
/// When the system has no thread to give.
pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let run = move || {
        // For good: what ends with the thread is freed by it as well.
        UNMANAGED.with(|n| n.set(n.get() + 1));
        f();
    };
    // The mask is inherited.
    unmanaged(|| without_signals(|| Builder::new().name(name.into()).spawn(run)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_threads_are_unmanaged_and_others_only_as_long_as_they_ask() {
        assert!(!is_unmanaged());
        unmanaged(|| unmanaged(|| assert!(is_unmanaged())));
        let panicked = std::panic::catch_unwind(|| unmanaged(|| panic!("on purpose")));
        assert!(panicked.is_err() && !is_unmanaged());
        let (done, finished) = std::sync::mpsc::channel();
        spawn("ours", move || done.send(is_unmanaged()).unwrap()).unwrap().join().unwrap();
        assert_eq!(finished.recv(), Ok(true));
        std::thread::spawn(|| assert!(!is_unmanaged())).join().unwrap();
    }
}
