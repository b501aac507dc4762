//! Signals of the program's own, around and inside of faults that come by signal: handlers of SIGBUS from before and
//! after the space, alternate stacks, handlers that fault themselves, blocked signals, threads that go.
//!
//! What a signal does is a property of the process, so each case is a process of its own: this program again.

mod common;

use common::*;
use peerspace::{Faults, Region, Space};
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::SeqCst};

const HOST: usize = 4 * MIB;
const SIZE: usize = 8 * MIB;

/// A region of which hardly anything is in RAM.
static MANAGED: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// Pages behind the end of a file: to touch them is an error that is not ours.
static FOREIGN: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static CALLS: AtomicUsize = AtomicUsize::new(0);
static OLD: AtomicUsize = AtomicUsize::new(0);

type Full = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

fn set_up(faults: Faults) -> (Space, Region) {
    let space =
        Space::builder().host(HOST as u64).device(Obedient::new(&Orders::new(), 64 * MIB)).faults(faults).build();
    let space = space.unwrap();
    let mut region = space.region(SIZE as u64).unwrap();
    fill(region.typed_mut());
    push_out(&space, 2 * HOST);
    MANAGED.store(region.as_ptr(), SeqCst);
    // SAFETY: a mapping of our own of a file that is empty.
    unsafe {
        let file = libc::memfd_create(c"foreign".as_ptr(), 0);
        let p = libc::mmap(null_mut(), 4 * page(), libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file, 0);
        assert_ne!(p, libc::MAP_FAILED);
        FOREIGN.store(p.cast(), SeqCst);
    }
    (space, region)
}

fn install(signal: i32, handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: zeroed actions are valid; the handlers have the types that the flags say.
    unsafe {
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = (std::mem::zeroed(), std::mem::zeroed());
        new.sa_sigaction = handler;
        new.sa_flags = flags;
        assert_eq!(libc::sigaction(signal, &new, &mut old), 0);
        old
    }
}

/// Reads page `i` of what is managed.
fn managed(i: usize) -> u64 {
    // SAFETY: inside of the region, which lives as long as the process.
    unsafe { MANAGED.load(SeqCst).add(i * page()).cast::<u64>().read_volatile() }
}

/// Touches page `i` of what is not.
fn foreign(i: usize) -> u8 {
    // SAFETY: mapped, but an error unless somebody mends it.
    unsafe { FOREIGN.load(SeqCst).add(i * page()).read_volatile() }
}

/// Puts memory in the place of page `i` behind the file.
fn mend(i: usize) {
    // SAFETY: over a page of our own mapping.
    unsafe {
        let at = FOREIGN.load(SeqCst).add(i * page());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let p = libc::mmap(at.cast(), page(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_eq!(p.cast(), at);
        at.write(55);
    }
}

/// Pages that a handler looks at, far apart so that none comes along with another.
fn managed_is_there(n: usize) -> bool {
    (0..5).all(|k| managed(n * 97 % 1000 + k * 200) == word(n * 97 % 1000 + k * 200))
}

extern "C" fn with_info(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let n = CALLS.fetch_add(1, SeqCst);
    // SAFETY: the kernel's own.
    let at = unsafe { (*info).si_addr() }.addr();
    let i = at.wrapping_sub(FOREIGN.load(SeqCst).addr()) / page();
    if i >= 4 || !managed_is_there(n) {
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) };
    }
    mend(i);
}

extern "C" fn plain(_: i32) {
    let n = CALLS.fetch_add(1, SeqCst);
    if !managed_is_there(n) {
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) };
    }
    mend(n);
}

extern "C" fn nested(_: i32) {
    let n = CALLS.fetch_add(1, SeqCst);
    if n < 3 {
        foreign(n + 1);
    }
    mend(n);
}

extern "C" fn counts(_: i32) {
    CALLS.fetch_add(1, SeqCst);
}

/// Installed after the space: what is not its own goes to whoever was there before.
extern "C" fn chains(n: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's arguments; the old handler is one with this type.
    unsafe {
        let at = (*info).si_addr().addr();
        if at.wrapping_sub(FOREIGN.load(SeqCst).addr()) < 4 * page() {
            return with_info(n, info, context);
        }
        std::mem::transmute::<usize, Full>(OLD.load(SeqCst))(n, info, context);
    }
}

/// The same, by asking the space first.
extern "C" fn forwards(n: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's arguments.
    if !unsafe { peerspace::forward_sigbus(info, context) } {
        with_info(n, info, context);
    }
}

extern "C" fn touches(_: i32) {
    let n = CALLS.fetch_add(1, SeqCst);
    if !managed_is_there(n) {
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) };
    }
}

extern "C" fn unprotects(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    touches(0);
    // SAFETY: the page that was protected by this program.
    unsafe {
        let at = (*info).si_addr().map_addr(|a| a & !(page() - 1));
        assert_eq!(libc::mprotect(at, page(), libc::PROT_READ | libc::PROT_WRITE), 0);
    }
}

fn alternate_stack(bytes: usize) {
    let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: bytes };
    // SAFETY: memory that is never given back.
    assert_eq!(unsafe { libc::sigaltstack(&stack, null_mut()) }, 0);
}

fn bus_handler(handler: *const (), flags: i32, faults: Faults) -> (Space, Region) {
    install(libc::SIGBUS, handler.addr(), flags);
    set_up(faults)
}

/// Foreign pages `pages` are mended by the handler, and everything else is as it was.
fn mended(pages: usize, calls: usize) {
    (0..pages).for_each(|i| assert_eq!(foreign(i), 55));
    assert_eq!(CALLS.load(SeqCst), calls);
    (0..SIZE / page()).for_each(|i| assert_eq!(managed(i), word(i)));
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn case() {
    let name = std::env::var("CASE").unwrap();
    let faults = if name.ends_with("threads") { Faults::Threads } else { Faults::Signal };
    let none = null::<()>();
    match name.trim_end_matches("-threads") {
        "before-info" => {
            let _all = bus_handler(with_info as *const (), libc::SA_SIGINFO, faults);
            mended(4, 4);
        }
        "before-plain" => {
            let _all = bus_handler(plain as *const (), 0, faults);
            mended(4, 4);
        }
        "before-alternate-stack" => {
            alternate_stack(256 << 10);
            let _all = bus_handler(with_info as *const (), libc::SA_SIGINFO | libc::SA_ONSTACK, faults);
            mended(4, 4);
        }
        "before-once" => {
            let _all = bus_handler(plain as *const (), libc::SA_RESETHAND, faults);
            mended(1, 1);
            foreign(1);
        }
        "before-nested" => {
            let _all = bus_handler(nested as *const (), libc::SA_NODEFER, faults);
            foreign(0);
            assert_eq!(CALLS.load(SeqCst), 4);
        }
        "before-nested-but-blocked" => {
            let _all = bus_handler(nested as *const (), 0, faults);
            foreign(0);
        }
        "before-sent" => {
            let _all = bus_handler(counts as *const (), 0, faults);
            // SAFETY: to this thread.
            (0..3).for_each(|_| assert_eq!(unsafe { libc::raise(libc::SIGBUS) }, 0));
            mended(0, 3);
        }
        "before-default" => {
            let _all = bus_handler(none, 0, faults);
            mended(0, 0);
            foreign(0);
        }
        "before-default-sent" => {
            let _all = bus_handler(none, 0, faults);
            // SAFETY: to this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
        }
        "before-ignored-sent" => {
            let _all = bus_handler(std::ptr::without_provenance(libc::SIG_IGN), 0, faults);
            // SAFETY: to this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
            mended(0, 0);
        }
        "after-chains" => {
            let _all = bus_handler(none, 0, faults);
            let old = install(libc::SIGBUS, chains as *const () as usize, libc::SA_SIGINFO | libc::SA_NODEFER);
            OLD.store(old.sa_sigaction, SeqCst);
            mended(4, 4);
        }
        "after-forwards" => {
            let _all = bus_handler(none, 0, faults);
            install(libc::SIGBUS, forwards as *const () as usize, libc::SA_SIGINFO | libc::SA_NODEFER);
            mended(4, 4);
        }
        "other-handler" => {
            let _all = set_up(faults);
            alternate_stack(256 << 10);
            install(libc::SIGUSR1, touches as *const () as usize, libc::SA_ONSTACK);
            for _ in 0..20 {
                // SAFETY: to this thread.
                unsafe { libc::raise(libc::SIGUSR1) };
            }
            mended(0, 20);
        }
        "segv-handler" => {
            let (space, region) = set_up(faults);
            install(libc::SIGSEGV, unprotects as *const () as usize, libc::SA_SIGINFO);
            for i in [3, 300, 1500] {
                let at = region.as_ptr().wrapping_add(i * page());
                // SAFETY: a page of the region, whose protection comes back in the handler.
                unsafe { assert_eq!(libc::mprotect(at.cast(), page(), libc::PROT_NONE), 0) };
                assert_eq!(managed(i), word(i));
            }
            mended(0, 3);
            space.check();
        }
        "storm" => storm(faults),
        "blocked" => {
            let _all = set_up(faults);
            // SAFETY: sets are initialised by sigfillset.
            unsafe {
                let mut all = std::mem::zeroed();
                libc::sigfillset(&mut all);
                libc::pthread_sigmask(libc::SIG_SETMASK, &all, null_mut());
            }
            mended(0, 0);
        }
        "threads-that-go" => threads_that_go(faults),
        "exit-while-faulting" => exit_while_faulting(faults),
        other => panic!("no such case: {other}"),
    }
    eprintln!("the end");
}

/// A signal arrives again and again, in the middle of faults too, and its handler faults.
fn storm(faults: Faults) {
    let (space, _region) = set_up(faults);
    install(libc::SIGUSR1, touches as *const () as usize, libc::SA_RESTART);
    // SAFETY: identifies this thread, which lives until the other has ended.
    let target = unsafe { libc::pthread_self() };
    let done = AtomicUsize::new(0);
    std::thread::scope(|s| {
        let done = &done;
        s.spawn(move || {
            while done.load(SeqCst) == 0 {
                // SAFETY: as above.
                unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        for _ in 0..3 {
            (0..SIZE / page()).for_each(|i| assert_eq!(managed(i), word(i)));
        }
        done.store(1, SeqCst);
    });
    assert!(CALLS.load(SeqCst) > 3);
    space.check();
}

struct Last(usize);

impl Drop for Last {
    fn drop(&mut self) {
        assert_eq!(managed(self.0), word(self.0));
    }
}

thread_local! {
    static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
}

/// Threads come and go, and fault to the very last.
fn threads_that_go(faults: Faults) {
    let (space, _region) = set_up(faults);
    for round in 0..50 {
        let threads: Vec<_> = (0..6)
            .map(|t| {
                std::thread::spawn(move || {
                    let at = (round * 6 + t) * 41 % (SIZE / page() - 1);
                    LAST.set(Some(Last(at + 1)));
                    assert_eq!(managed(at), word(at));
                })
            })
            .collect();
        // Some are waited for, some are not.
        threads.into_iter().step_by(2).for_each(|t| t.join().unwrap());
    }
    mended(0, 0);
    while std::fs::read_dir("/proc/self/task").unwrap().count() > 12 {
        std::thread::yield_now();
    }
    space.check();
}

/// The process ends although a thread waits for a device that never answers.
fn exit_while_faulting(faults: Faults) {
    let orders = Orders::new();
    let device = Obedient::new(&orders, 64 * MIB);
    let space = Space::builder().host(HOST as u64).device(device).faults(faults).build().unwrap();
    let mut region = space.region(SIZE as u64).unwrap();
    fill(region.typed_mut());
    push_out(&space, 2 * HOST);
    let gate = Arc::new(Gate::default());
    let at = gate.clone();
    orders.on_load(move |_| Answer::Waits(at.clone()));
    let p = region.as_ptr().expose_provenance();
    std::thread::spawn(move || {
        // SAFETY: the region lives as long as the process.
        unsafe { std::ptr::with_exposed_provenance::<u8>(p + 77 * page()).read_volatile() }
    });
    gate.await_arrival();
    eprintln!("the end");
    std::process::exit(0);
}

/// Runs a case, which has to end by this signal, or well.
fn runs(case: &str, signal: Option<i32>) {
    use std::os::unix::process::ExitStatusExt;
    let output = in_process("case", &[("CASE", case)]);
    assert_eq!(output.status.signal(), signal, "{case}: {}: {}", output.status, said(&output));
    let ended = said(&output).contains("the end");
    assert_eq!(ended && output.status.success(), signal.is_none(), "{case}: {}", said(&output));
}

#[test]
fn handlers_from_before_get_what_is_not_ours() {
    for case in ["before-info", "before-plain", "before-alternate-stack", "before-nested", "before-sent"] {
        runs(case, None);
    }
    runs("before-info-threads", None);
    runs("before-ignored-sent", None);
}

#[test]
fn what_would_have_killed_still_does() {
    let cases = ["before-once", "before-nested-but-blocked", "before-default", "before-default-sent"];
    for case in cases {
        runs(case, Some(libc::SIGBUS));
    }
    runs("before-default-threads", Some(libc::SIGBUS));
}

#[test]
fn handlers_from_after_that_go_on_to_ours_work() {
    for case in ["after-chains", "after-forwards", "after-forwards-threads"] {
        runs(case, None);
    }
}

#[test]
fn other_handlers_may_fault() {
    for case in ["other-handler", "segv-handler", "storm"] {
        runs(case, None);
        runs(&format!("{case}-threads"), None);
    }
}

#[test]
fn with_sigbus_blocked_a_fault_by_signal_ends_the_process() {
    runs("blocked", Some(libc::SIGBUS));
    runs("blocked-threads", None);
}

#[test]
fn threads_and_processes_may_go_at_any_time() {
    for case in ["threads-that-go", "exit-while-faulting"] {
        runs(case, None);
        runs(&format!("{case}-threads"), None);
    }
}
