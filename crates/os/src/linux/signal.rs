//! Faults by signal: one SIGBUS handler for the process, which asks each space and else goes on to whoever was
//! there before.
//!
//! The handler runs in the faulting thread with all signals blocked, so that no other handler of the program can
//! run, and touch the same page, while a space works on the fault. It uses no errno, no thread-local storage and
//! no heap.
//!
//! # Chaining
//!
//! A SIGBUS that no space wants goes to the action that was installed before ours: a handler is called as the
//! kernel would have called it; the default action is taken by restoring it and letting the access fault again. A
//! program that installs a handler of its own *after* us replaces ours; such a program calls [`forward`] from its
//! handler first (a preloaded library does this behind the program's back).

use crate::own::Shared;
use peerspace_core::addr::{Access, Va};
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

/// Somebody who resolves faults.
pub trait FaultHandler: Sync {
    /// Resolves the fault, and returns true; or false if the address is none of its own, or the data is lost.
    fn fault(&self, va: Va, access: Access) -> bool;
}

type Call = unsafe fn(*const c_void, Va, Access) -> bool;

struct Place {
    /// The handler; null where there is none.
    data: AtomicPtr<c_void>,
    call: AtomicPtr<c_void>,
    /// Threads inside the handler.
    inside: AtomicUsize,
}

/// Spaces with signal delivery a process can have at once.
const PLACES: usize = 64;
static HANDLERS: [Place; PLACES] = [const {
    Place { data: AtomicPtr::new(null_mut()), call: AtomicPtr::new(null_mut()), inside: AtomicUsize::new(0) }
}; PLACES];
static TAKEN: [AtomicBool; PLACES] = [const { AtomicBool::new(false) }; PLACES];

/// A handler that is asked about faults until this is dropped. Dropping waits until no thread is inside it.
#[derive(Debug)]
pub struct Registration<H: FaultHandler> {
    place: usize,
    /// Keeps the handler where the place says it is.
    _handler: Shared<H>,
}

/// Too many handlers, or the signal's action could not be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CannotRegister;

/// Asks `handler` about every SIGBUS from now on.
///
/// # Errors
/// When there are too many handlers, or sigaction fails.
pub fn register<H: FaultHandler>(handler: Shared<H>) -> Result<Registration<H>, CannotRegister> {
    unsafe fn call<H: FaultHandler>(data: *const c_void, va: Va, access: Access) -> bool {
        // SAFETY: `data` is the value of the shared pointer that the registration keeps; the registration's drop
        // waits for calls like this one.
        unsafe { &*data.cast::<H>() }.fault(va, access)
    }
    install().ok_or(CannotRegister)?;
    let place = TAKEN
        .iter()
        .position(|t| t.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok())
        .ok_or(CannotRegister)?;
    let call: Call = call::<H>;
    HANDLERS[place].call.store(call as *mut c_void, Ordering::Relaxed);
    // Release: whoever sees the data sees the call.
    HANDLERS[place].data.store(Shared::as_ptr(&handler).cast_mut().cast(), Ordering::Release);
    Ok(Registration { place, _handler: handler })
}

impl<H: FaultHandler> Drop for Registration<H> {
    fn drop(&mut self) {
        let place = &HANDLERS[self.place];
        place.data.store(null_mut(), Ordering::Relaxed);
        // Pairs with the fence in `ask`: either it sees no data, or we see it inside.
        fence(Ordering::SeqCst);
        while place.inside.load(Ordering::Acquire) != 0 {
            std::thread::yield_now();
        }
        TAKEN[self.place].store(false, Ordering::Release);
    }
}

/// Asks every handler. True if one of them resolved the fault.
fn ask(va: Va, access: Access) -> bool {
    HANDLERS.iter().any(|place| {
        if place.data.load(Ordering::Relaxed).is_null() {
            return false;
        }
        place.inside.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let data = place.data.load(Ordering::Acquire);
        let done = !data.is_null() && {
            let call = place.call.load(Ordering::Relaxed);
            // SAFETY: `call` was stored from a `Call` before `data`, which we have seen.
            let call: Call = unsafe { std::mem::transmute::<*mut c_void, Call>(call) };
            // SAFETY: `data` belongs to `call`, and cannot go while we are counted as inside.
            unsafe { call(data, va, access) }
        };
        place.inside.fetch_sub(1, Ordering::Release);
        done
    })
}

/// In a forked child no thread but the calling one exists, whatever the counts say.
pub(super) fn forget_other_threads() {
    HANDLERS.iter().for_each(|place| place.inside.store(0, Ordering::Relaxed));
}

/// A hardware error, or a page that was poisoned: nothing that could be resolved.
fn is_lost_memory(code: i32) -> bool {
    const BUS_MCEERR_AR: i32 = 4;
    const BUS_MCEERR_AO: i32 = 5;
    code == BUS_MCEERR_AR || code == BUS_MCEERR_AO
}

/// Lets the spaces look at a SIGBUS. True if one of them resolved it and the access can be repeated.
///
/// # Safety
/// To be called from a handler of SIGBUS with the arguments it got.
pub unsafe fn forward(info: *const libc::siginfo_t, context: *const c_void) -> bool {
    // SAFETY: the caller passes on what the kernel gave it.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    // Only the kernel says positive codes: a signal somebody sent is not a fault.
    // SAFETY: as above.
    code > 0 && !is_lost_memory(code) && ask(Va(address), unsafe { access_of(context) })
}

/// Whether the access that faulted was a write.
///
/// # Safety
/// `context` is the third argument of a signal handler.
unsafe fn access_of(context: *const c_void) -> Access {
    let context = context.cast::<libc::ucontext_t>();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller passes a ucontext_t; the page fault's error code has bit 1 set for writes.
    let write = unsafe { (*context).uc_mcontext.gregs[libc::REG_ERR as usize] } & 2 != 0;
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the caller passes a ucontext_t, whose reserved area holds records up to one with magic 0.
    let write = unsafe { aarch64_is_write((&raw const (*context).uc_mcontext).cast()) };
    // Where it cannot be told, a write is what makes both succeed.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let write = {
        let _ = context;
        true
    };
    if write { Access::Write } else { Access::Read }
}

/// Looks for the ESR record among the extension records of a signal frame; WnR is bit 6 of it.
///
/// # Safety
/// `mcontext` points to the kernel's `struct sigcontext`.
#[cfg(target_arch = "aarch64")]
unsafe fn aarch64_is_write(mcontext: *const u8) -> bool {
    const RESERVED: usize = 8 + 31 * 8 + 3 * 8 + 8; // fault_address, regs, sp, pc, pstate, padding to 16
    const ESR_MAGIC: u32 = 0x4553_5201;
    // SAFETY: the records lie inside the 4096 reserved bytes, and each says how long it is.
    unsafe {
        let mut at = mcontext.add(RESERVED);
        for _ in 0..32 {
            let (magic, size) = (at.cast::<u32>().read(), at.add(4).cast::<u32>().read());
            if magic == ESR_MAGIC {
                return at.add(8).cast::<u64>().read() & (1 << 6) != 0;
            }
            if magic == 0 || size < 8 {
                break;
            }
            at = at.add(size as usize);
        }
    }
    true
}

struct Previous(std::cell::UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written once, before INSTALLED becomes 2; only read after that.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(std::cell::UnsafeCell::new(MaybeUninit::uninit()));
/// 0: not installed, 1: being installed, 2: installed.
static INSTALLED: AtomicUsize = AtomicUsize::new(0);

/// Installs the handler, once.
fn install() -> Option<()> {
    loop {
        match INSTALLED.compare_exchange(0, 1, Ordering::Acquire, Ordering::Acquire) {
            Err(2) => return Some(()),
            Err(_) => std::thread::yield_now(),
            Ok(_) => break,
        }
    }
    // SAFETY: a zeroed sigaction is valid; sigfillset initialises the mask; the handler has the right type.
    let ok = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, (*PREVIOUS.0.get()).as_mut_ptr()) == 0
    };
    INSTALLED.store(if ok { 2 } else { 0 }, Ordering::Release);
    ok.then_some(())
}

/// The previous action was to be taken once, and was.
static SPENT: AtomicBool = AtomicBool::new(false);

/// The action that was there before ours.
pub fn previous() -> Option<libc::sigaction> {
    // SAFETY: initialised before INSTALLED became 2, and not changed after.
    (INSTALLED.load(Ordering::Acquire) == 2).then(|| unsafe { (*PREVIOUS.0.get()).assume_init() })
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: these are a handler's arguments.
    if unsafe { forward(info, context) } {
        return;
    }
    let Some(mut previous) = previous() else { return };
    if previous.sa_flags & libc::SA_RESETHAND != 0 && SPENT.swap(true, Ordering::Relaxed) {
        previous.sa_sigaction = libc::SIG_DFL;
    }
    // SAFETY: likewise; `previous` was a valid action of this signal.
    unsafe { run_action(&previous, signal, info, context) }
}

/// In the kernel's mask of a thread: it runs a handler that [`run_action`] called, and for which the kernel would have
/// blocked the signal. We may not, or a fault of the handler on managed memory would kill the process. The C library
/// keeps this signal to itself and never blocks it for long, and a handler that is left by a jump restores the mask
/// without it, so it says the same as the blocked signal would.
const BLOCKED_MARK: u64 = 1 << (32 - 1);

/// The kernel's mask of the context that a signal interrupted.
///
/// # Safety
/// `context` is the third argument of a signal handler.
unsafe fn interrupted_mask(context: *const c_void) -> u64 {
    // SAFETY: the kernel's sigset has 64 bits, which come first.
    unsafe { (&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>().read_unaligned() }
}

/// Does what the kernel would do if `action` were installed, but for two things: the handler runs on the stack that
/// is in use, whatever it says of alternate ones, and what it touches of managed memory is served.
///
/// # Safety
/// To be called from a handler, with its arguments; `action` is valid for the signal.
pub unsafe fn run_action(action: &libc::sigaction, signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the caller vouches for the action; sigaction and sigprocmask are safe in handlers.
    unsafe {
        // Ignoring a fault is not possible: the kernel takes the default action.
        let sent = (*info).si_code <= 0;
        let before = interrupted_mask(context);
        let handled = action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN;
        // A fault in a handler that must not be interrupted by one: the kernel takes the default action as well.
        let doubled = before & BLOCKED_MARK != 0 && !sent;
        if sent && action.sa_sigaction == libc::SIG_IGN {
            return;
        }
        if !handled || doubled {
            // By hand: the C library's function may be one of ours, which keeps our handler in its place, and the access
            // would fault for ever. Handler, flags, restorer and mask: all zero.
            let default = [0u64; 4];
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), null::<u64>(), 8usize);
            if sent {
                // Somebody sent it, so returning would not repeat it.
                libc::raise(signal);
            }
            return;
        }
        // The mask the handler asked for: what was blocked before, its own, and the signal itself.
        let wanted = (&raw const action.sa_mask).cast::<u64>().read_unaligned();
        let itself = 1u64 << (signal - 1);
        let mut mask = (before | wanted) & !itself;
        if action.sa_flags & libc::SA_NODEFER == 0 || (before | wanted) & itself != 0 {
            mask |= BLOCKED_MARK;
        }
        // By hand: the C library does not let the mark through.
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, null::<u64>(), 8usize);
        if action.sa_flags & libc::SA_SIGINFO != 0 {
            let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute::<
                usize,
                extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void),
            >(action.sa_sigaction);
            f(signal, info, context);
        } else {
            let f: extern "C" fn(i32) = std::mem::transmute::<usize, extern "C" fn(i32)>(action.sa_sigaction);
            f(signal);
        }
    }
}

/// Runs `f` with all signals blocked: for moments in which a handler of the program could wait for a lock that
/// this thread holds.
pub fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: the sets are initialised by sigfillset and by the call itself.
    unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        let mut before = MaybeUninit::uninit();
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let out = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut());
        out
    }
}

/// Runs `f` with SIGBUS let through in this thread.
pub fn with_sigbus<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: the sets are initialised by sigemptyset and by the call itself.
    unsafe {
        let mut bus = MaybeUninit::uninit();
        libc::sigemptyset(bus.as_mut_ptr());
        libc::sigaddset(bus.as_mut_ptr(), libc::SIGBUS);
        let mut before = MaybeUninit::uninit();
        libc::pthread_sigmask(libc::SIG_UNBLOCK, bus.as_ptr(), before.as_mut_ptr());
        let out = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut());
        out
    }
}

/// True when SIGBUS is blocked in this thread: a fault by signal would then kill the process.
pub fn sigbus_is_blocked() -> bool {
    // SAFETY: the set is initialised by the call.
    unsafe {
        let mut now = MaybeUninit::uninit();
        libc::pthread_sigmask(libc::SIG_BLOCK, null(), now.as_mut_ptr());
        libc::sigismember(now.as_ptr(), libc::SIGBUS) == 1
    }
}
