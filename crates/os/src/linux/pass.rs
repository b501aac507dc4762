//! System calls of our own that wait for a fault which cannot be resolved while they wait.
//!
//! Where faults reach us by message, the kernel's own accesses wait for them like everybody else's. An access that waits for a
//! page that the program has just moved away may be what keeps us from receiving the news of that, before which the kernel
//! refuses to put anything there. It lets a page be unregistered at any time, though: what waits then finds zeros, as in any
//! anonymous memory, and goes on; and protection by a userfaultfd goes with it, if that is what a write waits for.

use super::kernel::Linux;
use crate::kernel::Kernel;
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// How long a system call is given that may go on.
const PATIENCE: Duration = Duration::from_millis(20);

impl Linux {
    /// See [`Kernel::let_pass`].
    pub(super) fn let_waiter_pass(&self, range: VaRange, write: bool, over: &dyn Fn() -> bool) {
        if !self.waits_for_faults() {
            return;
        }
        let is_over = |patience: Duration| {
            let begin = Instant::now();
            while !over() && begin.elapsed() < patience {
                std::thread::yield_now();
            }
            over()
        };
        // Where nothing is mapped any more, it finds that out now.
        let _ = self.uffd.wake(range.start.0, range.len());
        if is_over(PATIENCE / 10) {
            return;
        }
        let page = self.geometry().page_bytes() as u64;
        for at in (range.start.0..range.end.0).step_by(page as usize) {
            // What is there is not waited for but to be written, and stays as it is.
            let is_awaited = match self.pagemap.is_present(Va(at)) {
                Ok(true) => write && self.pagemap.is_protected(Va(at)) == Ok(true),
                present => present.is_ok(),
            };
            // It waits again, so it is still our memory.
            if over() || !is_awaited || self.uffd.unregister(at, page).is_err() {
                continue;
            }
            is_over(PATIENCE);
            while self.uffd.register(at, page, self.mode) == Err(Errno::NOMEM) {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::kernel::{Kernel, Message};
    use crate::linux::self_memory::read_self;
    use crate::linux::{Delivery, Linux, Setup};
    use crate::{Protect, Wake};
    use peerspace_core::addr::{Va, VaRange};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::Duration;

    const PAGE: usize = 4096;

    /// Where there are three new pages, full of sevens.
    fn three_pages() -> u64 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, where the kernel has room, and the bytes of it.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), 3 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            std::ptr::write_bytes(at.cast::<u8>(), 7, 3 * PAGE);
            at as u64
        }
    }

    /// G5: a system call that writes where somebody has left protection behind goes on although nobody resolves its fault; one that
    /// reads does not change protection, on which others rely.
    #[test]
    fn a_write_does_not_wait_for_protection_that_was_left_behind() {
        let Ok(k) = Linux::open(Setup { delivery: Delivery::Messages, blocks: 1, slots: 64, without: 0 }) else {
            return eprintln!("skipped: this process may not have faults by message");
        };
        if !k.capabilities().write_protect {
            return eprintln!("skipped: this kernel protects nothing");
        }
        let at = three_pages();
        let page = |n: u64| VaRange { start: Va(at + n * 4096), end: Va(at + (n + 1) * 4096) };
        let all = VaRange { start: page(0).start, end: page(2).end };
        k.adopt(all).unwrap();
        k.protect(all, Protect::Yes, Wake::No).unwrap();
        let protected = || [0, 1, 2].map(|n| k.pagemap.is_protected(page(n).start).unwrap());
        assert_eq!(protected(), [true; 3]);
        // A call that reads and takes long is not waiting.
        k.let_pass(page(1), false, &|| false);
        assert_eq!(protected(), [true; 3]);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (k, over) = (&k, &over);
            let writer = scope.spawn(move || {
                let written = k.write_mapped(page(1).start, &[9; 8]);
                over.store(true, SeqCst);
                written
            });
            while !over.load(SeqCst) {
                k.let_pass(page(1), true, &|| over.load(SeqCst));
            }
            assert!(writer.join().unwrap());
        });
        assert_eq!(protected(), [true, false, true]);
        // SAFETY: the test's own memory.
        let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, 3 * PAGE) };
        assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == if i / 8 == PAGE / 8 { 9 } else { 7 }));
        // It is watched as before.
        k.protect(page(1), Protect::Yes, Wake::No).unwrap();
        assert_eq!(protected(), [true; 3]);
        k.disown(all).unwrap();
    }

    /// G5: a system call in memory that was moved away ends before anybody has received the news.
    #[test]
    fn a_call_does_not_wait_for_what_has_moved_away() {
        let Ok(k) = Linux::open(Setup { delivery: Delivery::Messages, blocks: 1, slots: 64, without: 0 }) else {
            return eprintln!("skipped: this process may not have faults by message");
        };
        let (from, to) = (three_pages(), three_pages());
        k.adopt(VaRange { start: Va(from), end: Va(from + 3 * PAGE as u64) }).unwrap();
        let (moved, over) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
                // SAFETY: nobody refers to either.
                let at = unsafe { libc::mremap(from as *mut _, 3 * PAGE, 3 * PAGE, flags, to as *mut libc::c_void) };
                assert_eq!(at as u64, to);
                moved.store(true, SeqCst);
            });
            assert!(k.wait_message(Some(Duration::from_secs(10))), "the move is told");
            let page = VaRange { start: Va(from + PAGE as u64), end: Va(from + 2 * PAGE as u64) };
            let (over, at) = (&over, page.start.0);
            let reader = scope.spawn(move || {
                let mut bytes = [1; 8];
                let read = read_self(at, &mut bytes);
                over.store(true, SeqCst);
                (read, bytes)
            });
            while !over.load(SeqCst) {
                k.let_pass(page, false, &|| over.load(SeqCst));
            }
            assert_eq!(reader.join().unwrap(), (Ok(8), [0; 8]));
            assert!(!moved.load(SeqCst), "the news was not received yet");
            while !mover.is_finished() {
                let message = k.receive();
                assert!(!matches!(message, Some(Message::Fault { .. })), "{message:?}: it had passed");
            }
        });
        // Both are watched as before.
        let faulted = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: the test's own memory.
                unsafe { (from as *const u8).read_volatile() };
                faulted.store(true, SeqCst);
            });
            assert!(k.wait_message(Some(Duration::from_secs(10))));
            assert!(matches!(k.receive(), Some(Message::Fault { va: Va(va), .. }) if va == from));
            assert!(!faulted.load(SeqCst));
            let first = VaRange { start: Va(from), end: Va(from + PAGE as u64) };
            assert_eq!(k.zero_in(first, Protect::No, Wake::Yes).trouble, None);
        });
    }
}
