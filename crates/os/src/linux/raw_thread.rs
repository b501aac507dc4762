//! Threads that the C library knows nothing of.
//!
//! A library that is preloaded into somebody else's program must not change what that program is: a second thread
//! known to the C library makes its locks and its `malloc` slower, keeps the process alive after the last of the
//! program's own threads is gone, and takes memory from the heap that is about to be managed. The threads made here
//! are made by the kernel alone. They have a stack, a thread-local storage area and (if wanted) a descriptor table of
//! their own, all in our own mappings.
//!
//! Code on such a thread may use system calls, memory functions, atomics, futexes, and `errno`. It must not call what
//! needs the C library's idea of the calling thread: `pthread_*`, `malloc`, streams, `dlopen`. Thread-local variables
//! of libraries that were loaded at start are there, zeroed.

use super::map::Mapping;
use super::signal::without_signals;
use rustix::io::Errno;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};

/// Whether a new thread shares the descriptor table of the one that makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// It does.
    Shared,
    /// It starts with a copy.
    Own,
}

/// Bytes of stack.
const STACK: usize = 256 << 10;
/// Room for thread-local storage on either side of the thread pointer, beyond what is in use.
const TLS_SLACK: usize = 64 << 10;

type Body = fn(usize);

/// What a new thread finds at the start of its mapping.
#[repr(C)]
struct Block {
    body: Body,
    arg: usize,
    /// The thread's id while it lives; the kernel clears it when the thread is gone.
    tid: AtomicU32,
}

/// A thread; it is never waited for unless [`wait`](RawThread::wait) is called, and its memory stays mapped.
#[derive(Debug)]
pub struct RawThread {
    block: *const Block,
}

// SAFETY: the block stays mapped, and its only shared field is atomic.
unsafe impl Send for RawThread {}
// SAFETY: as above.
unsafe impl Sync for RawThread {}

impl RawThread {
    /// The thread's id, or 0 when it has ended.
    pub fn id(&self) -> u32 {
        // SAFETY: the block stays mapped.
        unsafe { &(*self.block).tid }.load(Ordering::Acquire)
    }

    /// Waits until the thread has ended.
    pub fn wait(&self) {
        loop {
            let tid = self.id();
            if tid == 0 {
                return;
            }
            // The kernel wakes without FUTEX_PRIVATE.
            // SAFETY: the word lives in the block.
            let _ = rustix::thread::futex::wait(
                unsafe { &(*self.block).tid },
                rustix::thread::futex::Flags::empty(),
                tid,
                None,
            );
        }
    }
}

/// Starts a thread that runs `body(arg)`, with all signals blocked.
///
/// # Errors
/// The errno of mmap or clone.
pub fn spawn(files: Files, body: Body, arg: usize) -> Result<RawThread, Errno> {
    let tls = tls_span();
    let page = rustix::param::page_size();
    let head = size_of::<Block>().next_multiple_of(page);
    let tls_bytes = (2 * TLS_SLACK + tls).next_multiple_of(page);
    let mapping = Mapping::new(head + STACK + tls_bytes, page, true)?;
    let start = mapping.as_ptr();
    // Its memory is never given back: the thread runs until the process ends, or nearly so.
    let _ = mapping.leak();
    // SAFETY: all addresses lie in the mapping just made, which nobody else knows; the block is written before the
    // thread starts. The new thread runs on its own stack, with its own thread pointer, and shares the rest.
    unsafe {
        let block = start.cast::<Block>();
        block.write(Block { body, arg, tid: AtomicU32::new(1) });
        let stack = start.add(head + STACK);
        let pointer = arch::prepare_tls(stack.add(TLS_SLACK + tls), tls + TLS_SLACK);
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID
            | if files == Files::Shared { libc::CLONE_FILES } else { 0 };
        let tid = (&raw const (*block).tid).cast_mut().cast::<u32>();
        let result = without_signals(|| arch::clone(flags as usize, stack, tid, pointer, enter, block.cast()));
        if result < 0 {
            return Err(Errno::from_raw_os_error(-result as i32));
        }
        Ok(RawThread { block })
    }
}

/// The thread pointer of the calling thread: its control block is there.
pub fn thread_pointer() -> usize {
    arch::thread_pointer()
}

/// Where a new thread begins.
extern "C" fn enter(block: *mut c_void) {
    // SAFETY: `spawn` has written the block.
    let (body, arg) = unsafe {
        let block = block.cast::<Block>();
        ((*block).body, (*block).arg)
    };
    body(arg);
    // Only this thread ends; the kernel clears and wakes the id. Not through the C library, which has no such thread.
    // SAFETY: exit of the calling thread.
    unsafe { arch::exit_thread() };
}

/// How far `errno`, which every libc call may write, lies from the thread pointer: static thread-local storage reaches
/// at least that far.
fn tls_span() -> usize {
    // SAFETY: the address of errno of the calling thread.
    let errno = unsafe { libc::__errno_location() } as usize;
    arch::thread_pointer().abs_diff(errno).next_multiple_of(4096)
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::asm;
    use std::ffi::c_void;

    pub(super) fn thread_pointer() -> usize {
        let p: usize;
        // SAFETY: the first word of the thread control block is its own address.
        unsafe { asm!("mov {}, fs:0", out(reg) p, options(nostack, readonly, preserves_flags)) };
        p
    }

    /// Words of the thread control block that code looks at: itself, the vector of thread-local storage, itself
    /// again, the stack guard and the pointer guard.
    const SELF: usize = 0;
    const DTV: usize = 1;
    const SELF2: usize = 2;
    const GUARD: usize = 5;
    const POINTER_GUARD: usize = 6;

    /// Makes a thread control block at `at`, with `below` bytes of thread-local storage below it.
    pub(super) unsafe fn prepare_tls(at: *mut u8, below: usize) -> usize {
        // SAFETY: the caller owns the memory on both sides of `at`; the block of the calling thread is readable.
        unsafe {
            let tcb = at.cast::<usize>();
            let mine = thread_pointer() as *const usize;
            tcb.add(SELF).write(at as usize);
            tcb.add(SELF2).write(at as usize);
            tcb.add(GUARD).write(mine.add(GUARD).read());
            tcb.add(POINTER_GUARD).write(mine.add(POINTER_GUARD).read());
            tcb.add(DTV).write(super::copy_dtv(mine.add(DTV).read(), mine as usize, at as usize, below, true));
            at as usize
        }
    }

    /// The system call. In the new thread calls `enter(arg)`.
    pub(super) unsafe fn clone(
        flags: usize,
        stack: *mut u8,
        tid: *mut u32,
        tls: usize,
        enter: extern "C" fn(*mut c_void),
        arg: *mut c_void,
    ) -> isize {
        let result: isize;
        // SAFETY: the caller vouches for the stack and the thread pointer. The child has no frame to return to: it
        // takes its function and argument from registers, which it has copies of, and never leaves the asm block.
        unsafe {
            asm!(
                "syscall",
                "test rax, rax",
                "jnz 2f",
                "xor ebp, ebp",
                "mov rdi, r13",
                "call r12",
                "ud2",
                "2:",
                inlateout("rax") libc::SYS_clone as isize => result,
                in("rdi") flags,
                in("rsi") ((stack as usize) & !15),
                in("rdx") tid,
                in("r10") tid,
                in("r8") tls,
                in("r12") enter,
                in("r13") arg,
                lateout("rcx") _,
                lateout("r11") _,
            );
        }
        result
    }

    pub(super) unsafe fn exit_thread() -> ! {
        // SAFETY: ends the calling thread.
        unsafe { asm!("syscall", in("rax") libc::SYS_exit, in("rdi") 0, options(noreturn)) }
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::asm;
    use std::ffi::c_void;

    pub(super) fn thread_pointer() -> usize {
        let p: usize;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, tpidr_el0", out(reg) p, options(nomem, nostack, preserves_flags)) };
        p
    }

    /// Makes a thread control block at `at`. Thread-local storage lies above it, the C library's own below.
    pub(super) unsafe fn prepare_tls(at: *mut u8, span: usize) -> usize {
        // SAFETY: the caller owns the memory on both sides of `at`; the first word is the vector of thread-local
        // storage.
        unsafe {
            let mine = thread_pointer();
            let dtv = (mine as *const usize).read();
            at.cast::<usize>().write(super::copy_dtv(dtv, mine, at as usize, span, false));
            at as usize
        }
    }

    /// The system call. In the new thread calls `enter(arg)`.
    pub(super) unsafe fn clone(
        flags: usize,
        stack: *mut u8,
        tid: *mut u32,
        tls: usize,
        enter: extern "C" fn(*mut c_void),
        arg: *mut c_void,
    ) -> isize {
        let result: isize;
        // SAFETY: as on x86-64; the order of the arguments differs.
        unsafe {
            asm!(
                "svc 0",
                "cbnz x0, 2f",
                "mov x29, xzr",
                "mov x30, xzr",
                "mov x0, x21",
                "blr x20",
                "brk 1",
                "2:",
                in("x8") libc::SYS_clone,
                inlateout("x0") flags as isize => result,
                in("x1") ((stack as usize) & !15),
                in("x2") tid,
                in("x3") tls,
                in("x4") tid,
                in("x20") enter,
                in("x21") arg,
            );
        }
        result
    }

    pub(super) unsafe fn exit_thread() -> ! {
        // SAFETY: ends the calling thread.
        unsafe { asm!("svc 0", in("x8") libc::SYS_exit, in("x0") 0, options(noreturn)) }
    }
}

/// Copies the vector of thread-local storage of the calling thread, with what lies in its static area moved to the
/// new one's. Entries allocated on first use are left out: nobody here may use them.
///
/// # Safety
/// `dtv` is the vector of the calling thread, whose thread pointer is `mine`.
unsafe fn copy_dtv(dtv: usize, mine: usize, new: usize, span: usize, below: bool) -> usize {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Slot {
        value: usize,
        to_free: usize,
    }
    if dtv == 0 {
        return 0;
    }
    let slots = dtv as *const Slot;
    // SAFETY: the word before the vector says how many entries there are, the first entry is a generation; entries are
    // two words. The copy is ours.
    unsafe {
        let n = slots.sub(1).read().value.min(4096);
        let bytes = (n + 2) * size_of::<Slot>();
        let Ok(mapping) = Mapping::new(bytes, rustix::param::page_size(), true) else { return 0 };
        let copy = mapping.as_ptr().cast::<Slot>();
        let _ = mapping.leak();
        copy.write(Slot { value: n, to_free: 0 });
        copy.add(1).write(slots.read());
        for i in 1..=n {
            let slot = slots.add(i).read();
            let inside = if below {
                slot.value < mine && mine - slot.value <= span
            } else {
                slot.value >= mine && slot.value - mine <= span
            };
            let value = if inside { slot.value.wrapping_sub(mine).wrapping_add(new) } else { usize::MAX };
            copy.add(1 + i).write(Slot { value, to_free: 0 });
        }
        copy.add(1) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::super::interpose::{errno, set_errno};
    use super::*;
    use std::sync::atomic::AtomicUsize;

    static SEEN: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn a_raw_thread_runs_and_ends() {
        fn body(arg: usize) {
            // errno is this thread's own, and system calls work.
            let failed = rustix::fs::open("/nowhere", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
            set_errno(4711);
            assert!(failed.is_err() && super::super::signal::sigbus_is_blocked());
            SEEN.store(arg, Ordering::Release);
        }
        set_errno(17);
        let thread = spawn(Files::Shared, body, 42).unwrap();
        thread.wait();
        assert_eq!(SEEN.load(Ordering::Acquire), 42);
        assert_eq!(thread.id(), 0);
        assert_eq!(errno(), 17);
    }

    #[test]
    fn its_own_files_are_a_copy() {
        fn body(arg: usize) {
            // SAFETY: closes this thread's copy.
            unsafe { rustix::io::close(arg as i32) };
        }
        let (a, b) = rustix::pipe::pipe().unwrap();
        use rustix::fd::AsRawFd;
        spawn(Files::Own, body, b.as_raw_fd() as usize).unwrap().wait();
        assert_eq!(rustix::io::write(&b, b"x"), Ok(1));
        drop(a);
    }
}
