//! System calls of ours that wait for a fault where the program has its memory (rule G5).
//!
//! What devices read and write on the host is read and written by system calls, where the table says that there is memory, so
//! that memory which is gone after all is an error; and by a system call a process gets pages of its own where it shares them with
//! one that it has forked. Where faults reach us by message, memory that is gone is no error: the call waits. Memory that the
//! program moves away and leaves mapped (`MREMAP_DONTUNMAP`), or allows the kernel to free (`MADV_FREE`), is gone before anybody
//! has heard of it; whoever is to hear of it waits for such calls to be over, or for a device that waits for its own; and so does
//! whoever wants the page. So somebody who waits for nothing looks after calls that take long, and lets them pass: they find zeros,
//! or an error, and count as failed in any case.
//!
//! ```text
//!  the call's thread: ...; it is over; was it let pass?        the watcher: it is let pass; is it over? -> leave it; ...
//! ```
//!
//! With a fence between the two steps on either side, what the watcher has interfered with is never taken for the program's.
//! Where it lets a call pass, the page is out of everybody's hands for a moment: the call is not over for the others before the
//! watcher has put the page back.

use super::Engine;
use super::context::Context;
use super::serve::{Helper, await_bell};
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use peerspace_os::Kernel;
use peerspace_os::own::{Own, Vec};
use std::time::Duration;

/// Between two looks. A call that both see takes long: longer than a thread waits for a processor, mostly.
const LOOK: Duration = Duration::from_millis(50);
/// Looks that see nothing new before this thread sleeps.
const QUIET: u32 = 10;

/// The call that the holder of a [context](Context) makes.
#[derive(Debug)]
pub(crate) struct UnderWay {
    /// Odd while there is one.
    turn: AtomicU32,
    start: AtomicU64,
    end: AtomicU64,
    write: AtomicBool,
    /// The last that was let pass; one more when that is done with.
    passed: AtomicU32,
}

impl UnderWay {
    pub(crate) fn new() -> UnderWay {
        UnderWay {
            turn: AtomicU32::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            write: AtomicBool::new(false),
            passed: AtomicU32::new(0),
        }
    }

    fn begin(&self, range: VaRange, write: bool) -> u32 {
        self.start.store(range.start.0, Ordering::Relaxed);
        self.end.store(range.end.0, Ordering::Relaxed);
        self.write.store(write, Ordering::Relaxed);
        // Release: whoever sees that there is one sees where.
        self.turn.fetch_add(1, Ordering::Release).wrapping_add(1)
    }

    /// Whether nobody interfered. Nobody does so any more.
    fn end(&self, turn: u32) -> bool {
        let over = turn.wrapping_add(1);
        self.turn.store(over, Ordering::Release);
        fence(Ordering::SeqCst);
        // Acquire: the page is registered again.
        while self.passed.load(Ordering::Acquire) == turn {
            crate::sync::yield_now();
        }
        self.passed.load(Ordering::Relaxed) != over
    }

    fn is_over(&self, turn: u32) -> bool {
        self.turn.load(Ordering::Acquire) != turn
    }

    /// Has the call of `turn` pass by `pass`, to which it says where it is and whether it writes, unless it is over: it counts as
    /// failed, and ends when `pass` has.
    fn have_pass(&self, turn: u32, pass: impl FnOnce(VaRange, bool)) {
        let range =
            VaRange { start: Va(self.start.load(Ordering::Relaxed)), end: Va(self.end.load(Ordering::Relaxed)) };
        let write = self.write.load(Ordering::Relaxed);
        self.passed.store(turn, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.is_over(turn) {
            pass(range, write);
        }
        self.passed.store(turn.wrapping_add(1), Ordering::Release);
    }
}

impl<K: Kernel> Engine<K> {
    /// Makes a system call that accesses `range`, where the program has its memory; false if it could not. If it writes, the table
    /// says that the program may. The caller is in a [section](super::gate) with `context`.
    pub(super) fn access_mapped(
        &self,
        context: &Context,
        (range, write): (VaRange, bool),
        access: impl FnOnce() -> bool,
    ) -> bool {
        if !self.kernel.waits_for_faults() {
            return access();
        }
        let turn = context.under_way.begin(range, write);
        // Either whoever is about to sleep sees this call, or this finds him asleep.
        fence(Ordering::SeqCst);
        self.service.watch(&self.kernel.park());
        let done = access();
        context.under_way.end(turn) && done
    }

    /// Looks after calls under way, until stopped.
    pub(super) fn serve_watch(&self) {
        let park = self.kernel.park();
        await_bell(self.service.started(), &park);
        let mut seen: Vec<u32> = Vec::new_in(Own);
        seen.resize(self.contexts.all().len(), 0);
        while !self.service.stopped() {
            await_bell(self.bell(Helper::Watch), &park);
            let mut quiet = 0;
            while quiet < QUIET && !self.service.stopped() {
                crate::sync::sleep(LOOK);
                quiet = if self.look_after_calls(&mut seen) { 0 } else { quiet + 1 };
            }
            self.bell(Helper::Watch).store(self.service.stopped() as u64, Ordering::Release);
            fence(Ordering::SeqCst);
            if self.look_after_calls(&mut seen) {
                self.service.watch(&park);
            }
        }
    }

    /// Lets those pass that `seen` has seen before. Whether there was anything new.
    fn look_after_calls(&self, seen: &mut [u32]) -> bool {
        let mut any = false;
        for (slot, seen) in self.contexts.all().iter().zip(seen) {
            let call = &slot.as_ref().under_way;
            let now = call.turn.load(Ordering::Acquire);
            let under_way = now % 2 == 1;
            if under_way && now == *seen {
                call.have_pass(now, |range, write| {
                    let pages = self.addresses(self.geometry.pages_out(range));
                    self.kernel.let_pass(pages, write, &|| call.is_over(now));
                });
            }
            any |= under_way || now != *seen;
            *seen = now;
        }
        any
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_let_pass_has_failed_and_no_other() {
        let call = UnderWay::new();
        let range = |start| VaRange { start: Va(start), end: Va(start + 8) };
        let first = call.begin(range(16), true);
        assert!(!call.is_over(first) && call.end(first) && call.is_over(first));
        let second = call.begin(range(32), false);
        let mut seen = None;
        call.have_pass(first, |range, write| seen = Some((range, write)));
        assert_eq!(seen, None, "that one is over");
        call.have_pass(second, |range, write| seen = Some((range, write)));
        assert_eq!(seen, Some((range(32), false)));
        assert!(!call.end(second));
        let third = call.begin(range(48), true);
        assert!(call.end(third));
    }
}

#[cfg(all(test, shuttle))]
mod sim_tests {
    use super::*;
    use std::sync::Arc;

    /// G5: a page that is out of everybody's hands for a call is back when the call is over for others, which may use it at once;
    /// and a call that did not fail was let alone.
    #[test]
    fn a_call_is_not_over_before_its_page_is_back() {
        shuttle::check_random(
            || {
                let call = Arc::new(UnderWay::new());
                let (out, touched) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
                let turn = call.begin(VaRange { start: Va(16), end: Va(24) }, true);
                let watcher = {
                    let (call, out, touched) = (call.clone(), out.clone(), touched.clone());
                    shuttle::thread::spawn(move || {
                        call.have_pass(turn, |_, _| {
                            out.store(true, Ordering::SeqCst);
                            touched.store(true, Ordering::SeqCst);
                            crate::sync::yield_now();
                            out.store(false, Ordering::SeqCst);
                        });
                    })
                };
                let well = call.end(turn);
                assert!(!out.load(Ordering::SeqCst), "it is out");
                assert!(!well || !touched.load(Ordering::SeqCst), "it was interfered with");
                watcher.join().unwrap();
                assert!(!well || !touched.load(Ordering::SeqCst), "it is interfered with");
            },
            2000,
        );
    }
}
