//! The stacks of the program's threads, which are never managed: a thread's control block lies at their top, the
//! kernel writes to it when the thread ends, and then nobody can serve a fault any more.
//!
//! Whoever starts threads says so ([`starting`]) before a new stack is mapped, and the new thread says where it is
//! ([`enter`]) before it runs anything else; in between nothing is adopted. A stack that a thread has left is kept by
//! the C library for the next one, so it stays entered as long as its mapping looks like one.

use crate::sync::Mutex;
use peerspace_core::addr::VaRange;
use peerspace_core::sync::Latch;
use peerspace_os::linux::futex::Futex;
use peerspace_os::own::{Own, Vec};
use std::sync::atomic::{AtomicU32, Ordering};

#[derive(Debug, Clone, Copy)]
struct Stack {
    range: VaRange,
    /// A thread runs on it.
    used: bool,
}

/// Through [`with_stacks`] only, so that it is free when the process forks.
static STACKS: Mutex<Vec<Stack>> = Mutex::new(Vec::new_in(Own));
/// Held around every use of [`STACKS`], and by a thread that forks: the child has no other thread to let go of it.
static IN_USE: Latch = Latch::new();
/// Threads that have been asked for but have not said where their stack is.
static STARTING: AtomicU32 = AtomicU32::new(0);

/// A thread is about to be made.
pub fn starting() {
    STARTING.fetch_add(1, Ordering::SeqCst);
}

/// The thread has entered its stack, or could not be made.
pub fn started() {
    STARTING.fetch_sub(1, Ordering::SeqCst);
}

/// Whether some new thread has not said yet where its stack is.
pub(super) fn any_starting() -> bool {
    STARTING.load(Ordering::SeqCst) != 0
}

fn with_stacks<T>(act: impl FnOnce(&mut Vec<Stack>) -> T) -> T {
    IN_USE.lock(&Futex);
    let out = act(&mut STACKS.lock());
    IN_USE.unlock(&Futex);
    out
}

/// Keeps everybody out until [`after_fork`]: on the thread that forks, before our own heap is kept from changing.
pub(super) fn before_fork() {
    IN_USE.lock(&Futex);
}

/// Undoes [`before_fork`], in the parent and in the child.
pub(super) fn after_fork() {
    IN_USE.unlock(&Futex);
}

/// A thread runs on this stack from now on.
pub fn enter(range: VaRange) {
    with_stacks(|stacks| {
        stacks.retain(|s| !s.range.overlaps(range));
        stacks.push(Stack { range, used: true });
    });
}

/// The thread on this stack ends.
pub fn leave(range: VaRange) {
    with_stacks(|stacks| stacks.iter_mut().filter(|s| s.range == range).for_each(|s| s.used = false));
}

/// Calls `each` with every stack. One without a thread counts only while `is_mapping` says that it is a mapping of its
/// own: otherwise its memory has been given back, and may be anything by now.
pub(super) fn for_each(mut is_mapping: impl FnMut(VaRange) -> bool, mut each: impl FnMut(VaRange)) {
    with_stacks(|stacks| {
        stacks.retain(|s| {
            let stays = s.used || is_mapping(s.range);
            if stays {
                each(s.range);
            }
            stays
        });
    });
}

/// In a forked child: only the calling thread exists, on the stack that holds `here`; the other stacks have their
/// pages but no thread. Before [`after_fork`].
pub(super) fn forget_others(here: u64) {
    STARTING.store(0, Ordering::SeqCst);
    for stack in STACKS.lock().iter_mut() {
        stack.used = stack.range.contains(peerspace_core::addr::Va(here));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerspace_core::addr::Va;

    #[test]
    fn a_left_stack_counts_while_it_is_mapped() {
        let a = VaRange { start: Va(0x10_0000), end: Va(0x20_0000) };
        let b = VaRange { start: Va(0x30_0000), end: Va(0x40_0000) };
        let all = |mapped: bool| {
            let mut seen = std::vec::Vec::new();
            for_each(|_| mapped, |r| seen.push(r));
            // Threads of other tests are there too.
            seen.retain(|r| [a, b].contains(r));
            seen
        };
        enter(a);
        enter(b);
        assert_eq!(all(false), [a, b]);
        leave(a);
        assert_eq!(all(true), [a, b]);
        // Taken up by a new thread.
        enter(a);
        assert_eq!(all(false), [b, a]);
        leave(a);
        leave(b);
        assert!(all(false).is_empty() && all(true).is_empty());
    }
}
