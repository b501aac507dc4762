//! The one place that swaps the atomics of the standard library for those of a model checker.
//!
//! `--cfg loom` explores every interleaving of two or three threads, `--cfg shuttle` samples the interleavings
//! of many. All of the crates use the names of this module and never `core::sync::atomic` for state that two
//! threads share.

#[cfg(not(any(loom, shuttle)))]
pub use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(shuttle)]
pub use shuttle::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// Tells the processor (or the model checker) that this thread waits for another one.
#[inline]
pub fn spin_hint() {
    #[cfg(not(any(loom, shuttle)))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(shuttle)]
    shuttle::thread::yield_now();
}

/// Blocks a thread until a state word changes. The engine hands in futexes, the model checkers a yield.
///
/// The contract is that of a futex: [`wait`](Park::wait) returns when the low 32 bits of `word` differ from
/// those of `seen`, when [`wake`](Park::wake) was called for the same word, or for no reason at all. Callers
/// look at the word again.
pub trait Park: Send + Sync {
    /// Blocks while the low half of `word` equals the low half of `seen`; may return early.
    fn wait(&self, word: &AtomicU64, seen: u64);
    /// Releases every thread that waits on `word`.
    fn wake(&self, word: &AtomicU64);
}

/// A [`Park`] that spins: for tests, model checkers and critical sections of a few instructions.
#[derive(Debug, Default, Clone, Copy)]
pub struct Spin;

impl Park for Spin {
    fn wait(&self, _word: &AtomicU64, _seen: u64) {
        spin_hint();
    }

    fn wake(&self, _word: &AtomicU64) {}
}

/// A lock that guards no data of its own, can be released by another thread than took it, and can be reset.
///
/// Around a fork such locks are taken in the parent and released in both processes; what a thread that does not
/// exist in the child was holding is reset there.
#[derive(Debug)]
pub struct Latch(AtomicU64);

const FREE: u64 = 0;
const HELD: u64 = 1;
const AWAITED: u64 = 2;

impl Latch {
    /// Not held.
    #[cfg(not(loom))]
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Latch {
        Latch(AtomicU64::new(FREE))
    }

    /// Not held.
    #[cfg(loom)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Latch {
        Latch(AtomicU64::new(FREE))
    }

    /// Takes it, waiting as long as it takes.
    pub fn lock(&self, park: &impl Park) {
        // Acquire: pairs with the Release in unlock.
        if self.try_lock() {
            return;
        }
        while self.0.swap(AWAITED, Ordering::Acquire) != FREE {
            park.wait(&self.0, AWAITED);
        }
    }

    /// Takes it if nobody holds it.
    #[must_use]
    pub fn try_lock(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Releases it.
    pub fn unlock(&self, park: &impl Park) {
        if self.0.swap(FREE, Ordering::Release) == AWAITED {
            park.wake(&self.0);
        }
    }

    /// Makes it free whoever held it: for a process in which nobody else exists.
    pub fn reset(&self) {
        self.0.store(FREE, Ordering::Release);
    }
}
