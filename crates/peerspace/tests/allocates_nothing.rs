//! What happens in a fault allocates nothing, neither from the program's heap, which may be managed and would then
//! wait for itself, nor from the engine's own; and asks the kernel for nothing that is not needed.
//!
//! Counted is what the faulting thread does: with faults by signal that is everything a fault takes.

mod common;

use common::{MIB, page};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Hint, Region, Space};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

struct Counting;

thread_local! {
    static HERE: Cell<bool> = const { Cell::new(false) };
}
static COUNT: AtomicU64 = AtomicU64::new(0);

fn note() {
    if HERE.get() {
        COUNT.fetch_add(1, Relaxed);
    }
}

// SAFETY: delegates to the system's allocator; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract of GlobalAlloc.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        note();
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

/// Runs `f` in this thread with the engine's own heap locked: waiting for it would never end, which an alarm turns
/// into a failure. Returns how often the program's heap was used.
fn without_heaps(f: impl FnOnce()) -> u64 {
    // SAFETY: sets a timer, whose signal ends the process.
    unsafe { libc::alarm(100) };
    peerspace_os::own::freeze_heap();
    let before = COUNT.load(Relaxed);
    HERE.set(true);
    f();
    HERE.set(false);
    peerspace_os::own::thaw_heap();
    // SAFETY: takes the timer back.
    unsafe { libc::alarm(0) };
    COUNT.load(Relaxed) - before
}

fn value(i: usize) -> u64 {
    (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Everything that faults do: zeros, standby, loads, first writes, streams and single pages, huge and small.
fn use_all_of(words: &mut [u64]) -> bool {
    let step = page() / 8;
    let mut good = true;
    words.iter_mut().step_by(step).enumerate().for_each(|(i, w)| *w = value(i));
    for round in 0..3 {
        good &= words.iter().step_by(step).enumerate().all(|(i, w)| *w == value(i));
        let n = words.len() / step;
        for k in 0..n / 8 {
            let i = k * 1237 % n;
            good &= words[i * step] == value(i);
            if k % 5 == round {
                words[i * step] = value(i);
            }
        }
    }
    good
}

/// One at a time: the heap is locked for all.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn space(host: usize) -> Space {
    let device = Soft::new(128 * MIB as u64).unwrap();
    Space::builder().host(host as u64).device(device).faults(Faults::Signal).build().unwrap()
}

#[test]
fn faults_use_no_heap() {
    let _alone = ALONE.lock().unwrap();
    for hint in [Hint::Normal, Hint::Sparse, Hint::Dense] {
        let space = space(16 * MIB);
        let mut region = space.region(40 * MIB as u64).unwrap();
        region.advise(hint).unwrap();
        let mut good = false;
        let uses = without_heaps(|| good = use_all_of(region.typed_mut()));
        assert!(good);
        assert_eq!(uses, 0, "{hint:?}: the heap was used in faults");
        let s = space.statistics();
        let f = s.faults;
        assert!(f.device > 10 && f.zero_fill > 0 && s.pages_out > 2000, "{s:?}");
        assert!(hint == Hint::Dense || (f.upgrades > 10 && s.direct_reclaims > 0), "{s:?}");
    }
}

#[test]
fn copying_with_errors_uses_no_heap_where_there_are_none() {
    let _alone = ALONE.lock().unwrap();
    let space = space(8 * MIB);
    let mut region = space.region(16 * MIB as u64).unwrap();
    let mut bytes = vec![7u8; 3 * MIB];
    let uses = without_heaps(|| {
        for at in (0..13 * MIB).step_by(MIB) {
            region.try_write(at, &bytes).unwrap();
            region.try_read(at, &mut bytes).unwrap();
        }
    });
    assert_eq!(uses, 0);
}

/// System calls of a kind that this thread makes while it runs `f`, as the kernel's tracer of this process sees them.
fn system_calls(f: impl FnOnce()) -> Vec<(i64, u64)> {
    use std::collections::BTreeMap;
    // A child is traced while it does the work: its calls are seen one by one, and it shares nothing with us.
    // SAFETY: the child runs `f` and ends; it has a copy of everything, and the engine sets itself up in it.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: marks begin and end for the tracer; the last call ends the process.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            f();
            libc::_exit(0);
        }
    }
    let mut calls = BTreeMap::new();
    let mut status = 0;
    // SAFETY: traces the child just made, with buffers of our own.
    unsafe {
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL);
        let mut entering = true;
        let mut deliver = 0;
        loop {
            libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, deliver);
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            deliver = 0;
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
            match libc::WSTOPSIG(status) {
                s if s == libc::SIGTRAP | 0x80 => {
                    if entering {
                        let mut registers: libc::user_regs_struct = std::mem::zeroed();
                        libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers);
                        let request = if registers.orig_rax as i64 == libc::SYS_ioctl { registers.rsi } else { 0 };
                        *calls.entry((registers.orig_rax as i64, request)).or_insert(0) += 1;
                    }
                    entering = !entering;
                }
                s => deliver = s,
            }
        }
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child failed: {status:#x}");
    }
    calls.into_iter().flat_map(|(call, n)| std::iter::repeat_n(call, n)).collect()
}

/// Reads one byte of each page given.
fn touch(region: &Region, pages: impl Iterator<Item = usize>) {
    for i in pages {
        std::hint::black_box(region.bytes()[i * page()]);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_fault_takes_one_operation_and_the_return_of_its_handler() {
    let _alone = ALONE.lock().unwrap();
    let space = space(64 * MIB);
    let mut region = space.region(16 * MIB as u64).unwrap();
    region.advise(Hint::Sparse).unwrap();
    let scattered = || (0..500).map(|k| k * 1237 % 4096);
    // Never touched: a page of zeros each, and nothing else. (Far apart, so that none is part of a stream.)
    let calls = system_calls(|| touch(&region, scattered()));
    let count = |number: i64| calls.iter().filter(|(n, _)| *n == number).count();
    assert_eq!(count(libc::SYS_ioctl), 500, "{calls:?}");
    assert_eq!(count(libc::SYS_rt_sigreturn), 500);
    let others = calls.len() - 1000;
    assert!(others < 100, "{others} other calls for 500 faults: {calls:?}");
    // On the device: the same.
    region.bytes_mut().iter_mut().step_by(page()).for_each(|b| *b = 3);
    let mut other = space.region(96 * MIB as u64).unwrap();
    other.bytes_mut().iter_mut().step_by(page()).for_each(|b| *b = 4);
    drop(other);
    let before = space.statistics().pages_out;
    assert!(before > 4096);
    let calls = system_calls(|| touch(&region, scattered()));
    let count = |number: i64| calls.iter().filter(|(n, _)| *n == number).count();
    let faults = count(libc::SYS_rt_sigreturn);
    assert!((400..=500).contains(&faults), "{faults}");
    assert_eq!(count(libc::SYS_ioctl), faults, "{calls:?}");
    assert!(calls.len() - 2 * faults < 100, "{calls:?}");
}
