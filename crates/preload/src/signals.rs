//! Signals, where faults come by SIGBUS: the program may install a handler of its own, which then gets what is not
//! ours, and may block everything but SIGBUS. Where faults come to threads, all of this passes straight on.

use crate::by_signal;
use peerspace::process::stacks;
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::interpose;
use peerspace_os::linux::signal;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the program wants done about SIGBUS.
struct Wanted {
    action: UnsafeCell<MaybeUninit<libc::sigaction>>,
    /// 0: nothing yet. Odd: being written. Otherwise even and larger.
    version: AtomicUsize,
}

// SAFETY: written under the odd version, by one thread; a reader takes a copy and looks at the version again.
unsafe impl Sync for Wanted {}

static WANTED: Wanted = Wanted { action: UnsafeCell::new(MaybeUninit::uninit()), version: AtomicUsize::new(0) };

impl Wanted {
    fn get(&self) -> Option<libc::sigaction> {
        loop {
            let before = self.version.load(Ordering::Acquire);
            if before == 0 {
                return signal::previous();
            }
            if before.is_multiple_of(2) {
                // SAFETY: initialised; a torn copy is thrown away below.
                let copy = unsafe { self.action.get().read_volatile() };
                std::sync::atomic::fence(Ordering::Acquire);
                if self.version.load(Ordering::Relaxed) == before {
                    // SAFETY: nobody wrote it meanwhile, so it is a whole action.
                    return Some(unsafe { copy.assume_init() });
                }
            }
            std::hint::spin_loop();
        }
    }

    fn set(&self, action: libc::sigaction) {
        loop {
            let before = self.version.load(Ordering::Relaxed);
            if before.is_multiple_of(2)
                && self.version.compare_exchange(before, before + 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                // SAFETY: the odd version makes this thread the only writer.
                unsafe { self.action.get().write_volatile(MaybeUninit::new(action)) };
                self.version.store(before + 2, Ordering::Release);
                return;
            }
            std::hint::spin_loop();
        }
    }
}

/// Installed in the place of whatever the program installs for SIGBUS.
extern "C" fn on_sigbus(number: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: a handler's arguments, passed on.
    unsafe {
        if !signal::forward(info, context)
            && let Some(action) = WANTED.get()
        {
            if action.sa_flags & libc::SA_RESETHAND != 0 {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                WANTED.set(default);
            }
            signal::run_action(&action, number, info, context);
        }
    }
}

interpose! {
    fn sigaction(number: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int, real => {
        if !by_signal() || number != libc::SIGBUS {
            // SAFETY: the caller's arguments, passed on.
            return unsafe { real(number, new, old) };
        }
        // SAFETY: the caller's pointers are good or null. Our own handler is installed in the kernel whatever the
        // program wants; it goes on to that.
        unsafe {
            let before = WANTED.get();
            if !old.is_null() {
                match before {
                    Some(action) => old.write(action),
                    // Nothing of ours is installed yet: what the kernel has is the program's.
                    None => drop(real(number, std::ptr::null(), old)),
                }
            }
            if !new.is_null() {
                WANTED.set(new.read());
                let mut ours: libc::sigaction = std::mem::zeroed();
                ours.sa_sigaction = on_sigbus as *const () as usize;
                ours.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
                libc::sigfillset(&mut ours.sa_mask);
                return real(number, &ours, std::ptr::null_mut());
            }
            0
        }
    }

    fn signal(number: c_int, handler: usize) -> usize, real => {
        if !by_signal() || number != libc::SIGBUS {
            // SAFETY: the caller's arguments, passed on.
            return unsafe { real(number, handler) };
        }
        // SAFETY: zeroed actions are valid.
        unsafe {
            let (mut new, mut old): (libc::sigaction, libc::sigaction) = (std::mem::zeroed(), std::mem::zeroed());
            new.sa_sigaction = handler;
            new.sa_flags = libc::SA_RESTART;
            if sigaction(number, &new, &mut old) == 0 { old.sa_sigaction } else { libc::SIG_ERR }
        }
    }

    fn sigprocmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int, real => {
        // SAFETY: the caller's arguments, but for a set without SIGBUS.
        unsafe { with_sigbus_open(how, set, |set| real(how, set, old)) }
    }

    fn pthread_sigmask(how: c_int, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int, real => {
        // SAFETY: as above.
        unsafe { with_sigbus_open(how, set, |set| real(how, set, old)) }
    }

    fn sigaltstack(new: *const libc::stack_t, old: *mut libc::stack_t) -> c_int, real => {
        if by_signal() && !new.is_null() {
            // SAFETY: the caller's pointer is good. The kernel writes to this stack when nobody can serve a fault.
            let stack = unsafe { new.read() };
            let start = Va(stack.ss_sp as u64);
            if let Some(range) = VaRange::new(start, stack.ss_size as u64).filter(|r| !r.is_empty()) {
                stacks::starting();
                peerspace::process::thread_starts(range);
            }
        }
        // SAFETY: the caller's arguments, passed on.
        unsafe { real(new, old) }
    }
}

/// Calls `f` with `set`, or with a copy of it that leaves SIGBUS alone if the set is to be blocked.
///
/// # Safety
/// `set` is null or points to a set.
unsafe fn with_sigbus_open(
    how: c_int,
    set: *const libc::sigset_t,
    f: impl FnOnce(*const libc::sigset_t) -> c_int,
) -> c_int {
    if !by_signal() || set.is_null() || how == libc::SIG_UNBLOCK {
        return f(set);
    }
    // SAFETY: by contract.
    let mut copy = unsafe { set.read() };
    // SAFETY: a set of our own.
    unsafe { libc::sigdelset(&mut copy, libc::SIGBUS) };
    f(&copy)
}
