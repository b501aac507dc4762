//! Forks: who has to be asked before, and told after.
//!
//! A forked child gets copies of all private memory, but not the registration of its pages with userfaultfd: until
//! it has registered them anew, a page that is missing reads as zeros. So everything that manages memory is brought
//! to rest before the fork, and set up again in the child before a single instruction of the program runs there.
//!
//! [`register`] enters a handler; the C library's `pthread_atfork` calls it around each `fork`. A process that
//! forks past the C library is not seen.

use super::futex::Futex;
use crate::own::{Shared, freeze_heap, thaw_heap};
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::sync::Latch;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// Somebody who manages memory, or keeps books in managed memory.
pub trait ForkHandler: Sync {
    /// Called before anybody is asked to come to rest: waits until nobody works on what this handler keeps in
    /// managed memory, and lets nobody begin. Such work may fault, so it has to end while faults are served.
    fn close(&self) {}
    /// Undoes [`close`](ForkHandler::close), in parent and child, when everybody has been told of the fork.
    fn open(&self) {}
    /// The calling thread is about to fork: come to rest.
    fn before(&self);
    /// Called in the parent, in the thread that has forked.
    fn parent(&self);
    /// Called in the child, in its only thread, before anything of the program runs.
    fn child(&self);
}

type Call = unsafe fn(*const c_void, u8);

struct Place {
    data: AtomicPtr<c_void>,
    call: AtomicPtr<c_void>,
}

const PLACES: usize = 64;
static HANDLERS: [Place; PLACES] =
    [const { Place { data: AtomicPtr::new(null_mut()), call: AtomicPtr::new(null_mut()) } }; PLACES];
static TAKEN: [AtomicBool; PLACES] = [const { AtomicBool::new(false) }; PLACES];
/// Held from before a fork until after it, and while handlers come and go.
static FORKING: Latch = Latch::new();

const CLOSE: u8 = 0;
const BEFORE: u8 = 1;
const PARENT: u8 = 2;
const CHILD: u8 = 3;
const OPEN: u8 = 4;

/// A handler that is called until this is dropped.
#[derive(Debug)]
pub struct Registration<H: ForkHandler> {
    place: usize,
    _handler: Shared<H>,
}

/// There are too many handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

/// Calls `handler` around every fork from now on.
///
/// # Errors
/// When there are too many.
pub fn register<H: ForkHandler>(handler: Shared<H>) -> Result<Registration<H>, TooMany> {
    unsafe fn call<H: ForkHandler>(data: *const c_void, what: u8) {
        // SAFETY: `data` is the value of the shared pointer that the registration keeps; it is withdrawn, under
        // the latch that forks hold, before that pointer goes.
        let handler = unsafe { &*data.cast::<H>() };
        match what {
            CLOSE => handler.close(),
            BEFORE => handler.before(),
            PARENT => handler.parent(),
            CHILD => handler.child(),
            _ => handler.open(),
        }
    }
    install();
    FORKING.lock(&Futex);
    let place =
        TAKEN.iter().position(|t| t.compare_exchange(false, true, Ordering::Relaxed, Ordering::Relaxed).is_ok());
    if let Some(place) = place {
        let call: Call = call::<H>;
        HANDLERS[place].call.store(call as *mut c_void, Ordering::Relaxed);
        HANDLERS[place].data.store(Shared::as_ptr(&handler).cast_mut().cast(), Ordering::Relaxed);
    }
    FORKING.unlock(&Futex);
    Ok(Registration { place: place.ok_or(TooMany)?, _handler: handler })
}

impl<H: ForkHandler> Drop for Registration<H> {
    fn drop(&mut self) {
        FORKING.lock(&Futex);
        HANDLERS[self.place].data.store(null_mut(), Ordering::Relaxed);
        TAKEN[self.place].store(false, Ordering::Relaxed);
        FORKING.unlock(&Futex);
    }
}

/// Enters this module with the C library, once. What is entered first is asked last before a fork and told first
/// after it, so the earlier this is called, the better.
pub fn install() {
    // Not a `Once`: where the C library's function is interposed, it comes by here again from inside.
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if !INSTALLED.swap(true, Ordering::Relaxed) {
        // SAFETY: the functions live as long as this library, which is never unloaded while a handler exists.
        unsafe { libc::pthread_atfork(Some(atfork_before), Some(atfork_parent), Some(atfork_child)) };
    }
}

fn call_all(what: u8) {
    for place in &HANDLERS {
        let data = place.data.load(Ordering::Relaxed);
        if !data.is_null() {
            let call = place.call.load(Ordering::Relaxed);
            // SAFETY: stored together from a `Call` and its data, under the latch that is held now.
            let call = unsafe { std::mem::transmute::<*mut c_void, Call>(call) };
            // SAFETY: as above.
            unsafe { call(data, what) };
        }
    }
}

/// Brings everything to rest before a fork. `pthread_atfork` does this for `fork`; to be called by hand around
/// anything else that copies the process.
pub fn before() {
    super::place::settle();
    FORKING.lock(&Futex);
    call_all(CLOSE);
    call_all(BEFORE);
    freeze_heap();
}

/// Sets everything going again in the parent.
pub fn parent() {
    thaw_heap();
    call_all(PARENT);
    call_all(OPEN);
    FORKING.unlock(&Futex);
}

/// Sets everything up anew in the child.
pub fn child() {
    super::signal::forget_other_threads();
    super::map::forget_other_threads();
    super::place::renew();
    thaw_heap();
    call_all(CHILD);
    call_all(OPEN);
    FORKING.unlock(&Futex);
}

extern "C" fn atfork_before() {
    before();
}

extern "C" fn atfork_parent() {
    parent();
}

extern "C" fn atfork_child() {
    child();
}

/// Memory that the C library touches in a forked child before it calls anybody: the open streams, whose locks it
/// resets. It must be mapped when the process forks. (Its malloc arenas are the other case: see
/// [`is_arena_start`].)
pub fn early_child_memory(touch: &mut dyn FnMut(VaRange)) {
    // glibc's `struct _IO_FILE`, whose layout is part of its binary interface.
    const CHAIN: usize = 0x68;
    const LOCK: usize = 0x88;
    const SIZE: u64 = 0xe8;
    // Looked up once: it takes microseconds, and the loader's lock.
    static LIST: OnceLock<usize> = OnceLock::new();
    let list = *LIST.get_or_init(|| {
        // SAFETY: looks a symbol up by name.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_IO_list_all".as_ptr()) as usize }
    }) as *const *const u8;
    if list.is_null() || !cfg!(all(target_env = "gnu", target_pointer_width = "64")) {
        return;
    }
    // SAFETY: the symbol is a pointer to the first stream. The list may change under us while other threads open
    // and close streams, as it may under any reader without its lock; a stream is not unmapped when it is closed,
    // and the number of steps is bounded.
    unsafe {
        let mut file = list.read_volatile();
        for _ in 0..10_000 {
            if file.is_null() {
                break;
            }
            let range = |at: u64, len| VaRange { start: Va(at), end: Va(at + len) };
            touch(range(file as u64, SIZE));
            let lock = file.add(LOCK).cast::<*const u8>().read_volatile();
            if !lock.is_null() {
                touch(range(lock as u64, 16));
            }
            file = file.add(CHAIN).cast::<*const u8>().read_volatile();
        }
    }
}

/// Whether an arena of glibc's malloc lies at `va`, the start of a mapping: its page is touched in a forked child before
/// anybody is called, so it has to stay where it is. Where that cannot be found out, it is assumed.
///
/// A heap is so aligned, and says at its start where its arena is: behind that, if it is the arena's first heap.
pub fn is_arena_start(va: Va) -> bool {
    va.is_aligned(HEAP_MAX) && word_at(va).is_none_or(|arena| (va.0..va.0 + 4096).contains(&arena))
}

/// Whether a mapping from `va` on, of `len` bytes, may become an arena's at any moment: the C library has mapped it, and
/// not written to it yet.
pub fn may_become_arena(va: Va, len: u64) -> bool {
    const FIRST: u64 = 1 << 20;
    va.is_aligned(HEAP_MAX) && len <= FIRST && word_at(va).is_none_or(|word| word == 0)
}

/// Heaps of glibc's malloc are so aligned.
const HEAP_MAX: usize = 64 << 20;

/// A word of this process's memory, if it can be read.
fn word_at(va: Va) -> Option<u64> {
    let mut word = 0u64;
    let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let from = libc::iovec { iov_base: va.0 as *mut libc::c_void, iov_len: 8 };
    // SAFETY: writes to the word alone; an address that is not mapped is an error.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    (n == 8).then_some(word)
}
