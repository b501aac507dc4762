//! Faults of the floor: the shortest way from a SIGBUS to whoever serves it.
//!
//! One floor per process. The handler runs in the faulting thread, which is the only one that uses the floor's
//! memory; it changes the state that the thread has left alone before it touched that memory.

use crate::error::Trouble;
use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

/// Somebody who makes missing pages appear. Must not touch the memory it serves.
pub(super) trait Serve {
    /// Serves a fault at `address`.
    ///
    /// # Errors
    /// When it cannot: that is the end of the process.
    fn serve(&mut self, address: u64) -> Result<(), &'static str>;
}

static STATE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// The state of a floor whose faults are being served.
#[derive(Debug)]
pub(super) struct Served<S: Serve> {
    state: *mut S,
}

impl<S: Serve> Served<S> {
    /// Serves faults with `state` from now on.
    pub(super) fn new(state: S) -> Result<Served<S>, Trouble> {
        let state = Box::into_raw(Box::new(state));
        let before = STATE.swap(state.cast(), Relaxed);
        assert!(before.is_null(), "there is one floor in a process");
        // SAFETY: a zeroed sigaction is valid, and the handler has the type that SA_SIGINFO asks for. SA_NODEFER
        // saves nothing and loses nothing: the handler does not fault.
        let set = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus::<S> as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
        };
        if set != 0 {
            return Err(Trouble::Failed("SIGBUS cannot be handled".into()));
        }
        Ok(Served { state })
    }

    /// The state, while nobody faults: `f` does not touch the memory that is served.
    pub(super) fn state<T>(&mut self, f: impl FnOnce(&mut S) -> T) -> T {
        // SAFETY: `state` came from a box and lives until `self` is dropped. Only the handler refers to it as well,
        // and the handler runs only in a thread that touches the floor's memory: that needs a shared borrow of the
        // floor, which owns `self`, and which is borrowed mutably here.
        f(unsafe { &mut *self.state })
    }
}

impl<S: Serve> Drop for Served<S> {
    fn drop(&mut self) {
        STATE.store(std::ptr::null_mut(), Relaxed);
        // SAFETY: the box is from `new`; its floor is dropped, so nobody faults any more.
        drop(unsafe { Box::from_raw(self.state) });
    }
}

extern "C" fn on_sigbus<S: Serve>(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    let state = STATE.load(Relaxed).cast::<S>();
    if state.is_null() {
        end("a SIGBUS after the floor was gone");
    }
    // SAFETY: the kernel passes a valid siginfo. The state is a live `S`, because this handler is installed together
    // with it, and nobody else refers to it now: see `Served::state`.
    let served = unsafe { (*state).serve((*info).si_addr() as u64) };
    if let Err(why) = served {
        end(why);
    }
}

fn end(why: &str) -> ! {
    for part in ["peerspace-bench: the floor fails: ", why, "\n"] {
        let _ = rustix::io::write(rustix::stdio::stderr(), part.as_bytes());
    }
    std::process::abort();
}
