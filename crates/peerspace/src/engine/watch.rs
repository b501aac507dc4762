//! System calls of ours, for devices, that wait for a fault where the program has its memory (rule G5).
//!
//! What devices read and write on the host is read and written by system calls, where the table says that there is memory, so
//! that memory which is gone after all is an error. Where faults reach us by message it is none: the call waits. Memory that the
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

use super::Engine;
use super::context::Context;
use super::serve::{Helper, await_bell};
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::sync::{AtomicU32, AtomicU64, Ordering, fence};
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
    /// The last that was let pass.
    passed: AtomicU32,
}

impl UnderWay {
    pub(crate) fn new() -> UnderWay {
        UnderWay {
            turn: AtomicU32::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            passed: AtomicU32::new(0),
        }
    }

    fn begin(&self, range: VaRange) -> u32 {
        self.start.store(range.start.0, Ordering::Relaxed);
        self.end.store(range.end.0, Ordering::Relaxed);
        // Release: whoever sees that there is one sees where.
        self.turn.fetch_add(1, Ordering::Release).wrapping_add(1)
    }

    /// Whether nobody interfered.
    fn end(&self, turn: u32) -> bool {
        self.turn.store(turn.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst);
        self.passed.load(Ordering::Relaxed) != turn
    }

    fn is_over(&self, turn: u32) -> bool {
        self.turn.load(Ordering::Acquire) != turn
    }

    /// Where the call is, if it is still the one of `turn`: it counts as failed from here on.
    fn fails(&self, turn: u32) -> Option<VaRange> {
        let range =
            VaRange { start: Va(self.start.load(Ordering::Relaxed)), end: Va(self.end.load(Ordering::Relaxed)) };
        self.passed.store(turn, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        (!self.is_over(turn)).then_some(range)
    }
}

impl<K: Kernel> Engine<K> {
    /// Makes a system call that accesses `range`, where the program has its memory; false if it could not. The caller is in a
    /// [section](super::gate) with `context`.
    pub(super) fn access_mapped(&self, context: &Context, range: VaRange, access: impl FnOnce() -> bool) -> bool {
        if !self.kernel.waits_for_faults() {
            return access();
        }
        let turn = context.under_way.begin(range);
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
            if under_way
                && now == *seen
                && let Some(range) = call.fails(now)
            {
                let pages = self.addresses(self.geometry.pages_out(range));
                self.kernel.let_pass(pages, &|| call.is_over(now));
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
        let first = call.begin(range(16));
        assert!(!call.is_over(first) && call.end(first) && call.is_over(first));
        let second = call.begin(range(32));
        assert_eq!(call.fails(first), None, "that one is over");
        assert_eq!(call.fails(second), Some(range(32)));
        assert!(!call.end(second));
        let third = call.begin(range(48));
        assert!(call.end(third));
    }
}
