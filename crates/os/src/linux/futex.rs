//! Waiting: futexes on state words, and a mutex made of one.
//!
//! The mutex exists beside the standard library's because it can be taken around a fork and is a constant
//! initialiser for allocators; it neither allocates nor uses thread-local storage.

use peerspace_core::sync::{AtomicU64, Park};
use rustix::thread::futex;
use std::sync::atomic::{AtomicU32, Ordering};

/// Waits on table words by futex.
#[derive(Debug, Clone, Copy, Default)]
pub struct Futex;

fn low_half(word: &AtomicU64) -> &AtomicU32 {
    let p: *const AtomicU64 = word;
    let low = if cfg!(target_endian = "little") { 0 } else { 1 };
    // SAFETY: the pointer is derived from a live reference and stays inside its eight bytes; both types may be
    // accessed concurrently through shared references. The futex call only compares and the kernel only reads.
    unsafe { &*p.cast::<AtomicU32>().add(low) }
}

impl Park for Futex {
    fn wait(&self, word: &AtomicU64, seen: u64) {
        // Any outcome means: look again.
        let _ = futex::wait(low_half(word), futex::Flags::PRIVATE, seen as u32, None);
    }

    fn wake(&self, word: &AtomicU64) {
        let _ = futex::wake(low_half(word), futex::Flags::PRIVATE, u32::MAX >> 1);
    }
}

/// Waits until `word` differs from `seen`, is woken, or `timeout` has passed.
pub fn wait_word(word: &AtomicU32, seen: u32, timeout: Option<std::time::Duration>) {
    let timeout = timeout.and_then(|t| rustix::thread::Timespec::try_from(t).ok());
    let _ = futex::wait(word, futex::Flags::PRIVATE, seen, timeout.as_ref());
}

/// Wakes up to `n` threads in [`wait_word`]. Returns how many there were.
pub fn wake_word(word: &AtomicU32, n: u32) -> usize {
    futex::wake(word, futex::Flags::PRIVATE, n.min(u32::MAX >> 1)).unwrap_or(0)
}

const FREE: u32 = 0;
const HELD: u32 = 1;
const AWAITED: u32 = 2;

/// A mutex for [`lock_api`].
#[derive(Debug)]
pub struct RawMutex(AtomicU32);

// SAFETY: at most one thread is between lock and unlock, since only one exchange from FREE can succeed.
unsafe impl lock_api::RawMutex for RawMutex {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: RawMutex = RawMutex(AtomicU32::new(FREE));
    type GuardMarker = lock_api::GuardSend;

    fn lock(&self) {
        // Acquire: pairs with the Release in unlock.
        if self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return;
        }
        for _ in 0..100 {
            if self.0.load(Ordering::Relaxed) == FREE && self.try_lock() {
                return;
            }
            std::hint::spin_loop();
        }
        while self.0.swap(AWAITED, Ordering::Acquire) != FREE {
            wait_word(&self.0, AWAITED, None);
        }
    }

    fn try_lock(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    unsafe fn unlock(&self) {
        if self.0.swap(FREE, Ordering::Release) == AWAITED {
            wake_word(&self.0, 1);
        }
    }
}

/// A mutex that neither allocates nor uses thread-local storage.
pub type Mutex<T> = lock_api::Mutex<RawMutex, T>;
/// The right to use what a [`Mutex`] guards.
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, RawMutex, T>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mutex_excludes() {
        let m = Mutex::new(0u64);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..20_000 {
                        *m.lock() += 1;
                    }
                });
            }
        });
        assert_eq!(*m.lock(), 80_000);
    }

    #[test]
    fn a_waiter_is_woken() {
        let word = AtomicU64::new(0xffff_ffff_0000_0003);
        std::thread::scope(|s| {
            s.spawn(|| {
                while word.load(std::sync::atomic::Ordering::Acquire) & 3 == 3 {
                    Futex.wait(&word, word.load(std::sync::atomic::Ordering::Relaxed) | 3);
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            word.store(0, std::sync::atomic::Ordering::Release);
            Futex.wake(&word);
        });
    }
}
