//! `pthread_create`: every new thread says where its stack is before it does anything else.

use peerspace::process::{stacks, thread_starts};
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::interpose;
use peerspace_os::linux::place;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

type Start = extern "C" fn(*mut c_void) -> *mut c_void;

/// What a new thread is to run.
struct Body {
    start: Start,
    arg: *mut c_void,
}

interpose! {
    fn pthread_create(
        thread: *mut libc::pthread_t,
        attributes: *const libc::pthread_attr_t,
        start: Start,
        arg: *mut c_void,
    ) -> c_int, real => {
        if !crate::is_on() {
            // SAFETY: the caller's arguments, passed on.
            return unsafe { real(thread, attributes, start, arg) };
        }
        place::settle();
        stacks::starting();
        let body = Box::into_raw(Box::new(Body { start, arg }));
        // SAFETY: the caller's arguments, but for the function, which frees the body.
        let result = unsafe { real(thread, attributes, run, body.cast()) };
        if result != 0 {
            stacks::started();
            // SAFETY: no thread has it.
            drop(unsafe { Box::from_raw(body) });
        }
        result
    }
}

extern "C" fn run(body: *mut c_void) -> *mut c_void {
    // SAFETY: made by pthread_create above, for this thread alone.
    let body = unsafe { Box::from_raw(body.cast::<Body>()) };
    match own_stack() {
        Some(range) => {
            thread_starts(range);
            leave_at_exit(range);
        }
        None => stacks::started(),
    }
    let Body { start, arg } = *body;
    start(arg)
}

/// The stack of the calling thread, its control block included.
fn own_stack() -> Option<VaRange> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: the call initialises the attributes, which are destroyed after.
    unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return None;
        }
        let (mut start, mut size) = (std::ptr::null_mut(), 0);
        let got = libc::pthread_attr_getstack(attributes.as_ptr(), &mut start, &mut size);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        (got == 0).then_some(VaRange { start: Va(start as u64), end: Va(start as u64 + size as u64) })
    }
}

/// Has the stack marked as left when the thread ends, in whatever way it does.
fn leave_at_exit(range: VaRange) {
    extern "C" fn leave(range: *mut c_void) {
        // SAFETY: boxed below for this thread.
        let range = unsafe { Box::from_raw(range.cast::<VaRange>()) };
        stacks::leave(*range);
    }
    static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let mut key = 0;
        // SAFETY: makes a key; the destructor lives as long as this library.
        (unsafe { libc::pthread_key_create(&mut key, Some(leave)) } == 0).then_some(key)
    });
    if let Some(key) = key {
        // SAFETY: the key exists; its destructor frees the box.
        unsafe { libc::pthread_setspecific(*key, Box::into_raw(Box::new(range)).cast()) };
    }
}
