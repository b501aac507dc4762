//! Threads of our own.
//!
//! They run with all signals blocked, so that no handler of the program ever runs on them. For the same reason,
//! and because some of them are the ones that serve faults, they must never touch managed memory: where the
//! program's global allocator hands out managed memory, what they allocate, and what is allocated to start them,
//! has to come from elsewhere. [`unmanaged`] says so to that allocator.

use super::signal::without_signals;
use crate::own::{Box, Own};
use std::any::Any;
use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of stack: what devices do on it is theirs to say.
const STACK: usize = 2 << 20;

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

/// Starts a thread of Rust's named `name` that runs `f`, code of the program's: it finds its name, and has a stack for signals.
///
/// # Errors
/// When the system has no thread to give.
pub fn spawn_for_program(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<std::thread::JoinHandle<()>> {
    let run = move || {
        UNMANAGED.with(|n| n.set(n.get() + 1));
        f();
    };
    // The mask is inherited.
    unmanaged(|| without_signals(|| std::thread::Builder::new().name(name.into()).spawn(run)))
}

/// A thread of our own that was started. One that is not [joined](Thread::join) goes on by itself.
#[derive(Debug)]
pub struct Thread {
    id: libc::pthread_t,
}

// SAFETY: the id of a thread may be used by any other, once.
unsafe impl Send for Thread {}
// SAFETY: as above; whoever joins has it alone.
unsafe impl Sync for Thread {}

impl Thread {
    /// Waits until it has ended.
    ///
    /// # Errors
    /// What it panicked with.
    ///
    /// # Panics
    /// When a thread joins itself.
    pub fn join(self) -> std::thread::Result<()> {
        let mut result = null_mut();
        // SAFETY: nobody else joins or detaches it, because `self` is consumed and not dropped.
        let joined = unsafe { libc::pthread_join(ManuallyDrop::new(self).id, &raw mut result) };
        assert_eq!(joined, 0, "a thread joins itself");
        if result.is_null() {
            return Ok(());
        }
        // SAFETY: made by `run` from a box, and had by nobody else.
        Err(*unsafe { std::boxed::Box::from_raw(result.cast::<Panic>()) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: nobody joins it any more.
        unsafe { libc::pthread_detach(self.id) };
    }
}

type Panic = std::boxed::Box<dyn Any + Send>;

/// What a new thread is given, in memory that is no heap's: a thread that never allocates has no heap of its own.
struct Start<F> {
    name: [u8; 16],
    run: F,
}

extern "C" fn run<F: FnOnce()>(start: *mut c_void) -> *mut c_void {
    // For good: what ends with the thread is freed by it as well.
    UNMANAGED.with(|n| n.set(n.get() + 1));
    // SAFETY: made by `spawn` from a box, for this thread alone.
    let Start { name, run } = Box::into_inner(unsafe { Box::from_raw_in(start.cast::<Start<F>>(), Own) });
    // SAFETY: the name ends with a zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(()) => null_mut(),
        Err(panic) => std::boxed::Box::into_raw(std::boxed::Box::new(panic)).cast(),
    }
}

/// Starts a thread and waits for its end, once: the next one is given its stack again. The C library has the loader look up, when
/// a stack is used again for the first time, the function that it needs for that. Unless that has happened, every forked child has
/// it looked up anew for its first thread, and thereby reads pages that it would not need.
fn reuse_a_stack() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if !DONE.swap(true, Ordering::Relaxed)
        && let Ok(first) = start("peerspace", || {})
    {
        let _ = first.join();
    }
}

/// Starts a thread named `name`, of which the kernel keeps 15 bytes, that runs `f`.
///
/// It is made by the C library and not by Rust's, which gives each thread an alternate stack for signals, and has it allocate:
/// a process with fewer mappings forks faster.
///
/// # Errors
/// When the system has no thread to give.
pub fn spawn<F: FnOnce() + Send + 'static>(name: &str, f: F) -> io::Result<Thread> {
    reuse_a_stack();
    start(name, f)
}

fn start<F: FnOnce() + Send + 'static>(name: &str, f: F) -> io::Result<Thread> {
    let mut short = [0; 16];
    let len = name.len().min(15);
    short[..len].copy_from_slice(&name.as_bytes()[..len]);
    let start = Box::into_raw(Box::new_in(Start { name: short, run: f }, Own));
    let mut id = MaybeUninit::uninit();
    // SAFETY: the attributes are initialised before they are used; `run` takes what `start` is. The mask is inherited.
    let error = unsafe {
        let mut attributes = MaybeUninit::uninit();
        libc::pthread_attr_init(attributes.as_mut_ptr());
        libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK);
        let create = || libc::pthread_create(id.as_mut_ptr(), attributes.as_ptr(), run::<F>, start.cast());
        let error = unmanaged(|| without_signals(create));
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        error
    };
    if error != 0 {
        // SAFETY: no thread has it.
        drop(unsafe { Box::from_raw_in(start, Own) });
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: the call succeeded.
    Ok(Thread { id: unsafe { id.assume_init() } })
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
        let panic = spawn("a name that is too long", || panic!("on purpose")).unwrap().join().unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
        std::thread::spawn(|| assert!(!is_unmanaged())).join().unwrap();
    }
}
