//! Keeping accesses of a device out: while its translations change, while it is halted, while the process forks.
//!
//! An access is inside for as long as it takes to copy a page, and waits for nothing there. The gate is closed by as many as
//! like, and open when all of them have opened it again. Nobody enters meanwhile, so that to close it takes no longer than an
//! access, however many there are.

use peerspace_os::linux::futex::{wait_word, wake_word};
use std::sync::atomic::{AtomicU32, Ordering};

/// One of those who keep it closed. The bits below count who is inside.
const CLOSED: u32 = 1 << 20;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Gate(AtomicU32);

/// Somebody is inside as long as this lives.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a Gate);

/// It is closed as long as this lives.
#[derive(Debug)]
pub(crate) struct Closed<'a>(&'a Gate);

impl Gate {
    pub(crate) const fn new() -> Gate {
        Gate(AtomicU32::new(0))
    }

    /// Enters, when the gate is open.
    pub(crate) fn enter(&self) -> Inside<'_> {
        loop {
            let now = self.0.load(Ordering::Relaxed);
            if now >= CLOSED {
                wait_word(&self.0, now, None);
            // Acquire: pairs with the Release in `open`, so that the translations are seen as they were left.
            } else if self.0.compare_exchange(now, now + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Inside(self);
            }
        }
    }

    /// Closes, until [`open`](Gate::open) is called; waits until nobody is inside.
    pub(crate) fn close(&self) {
        // Acquire, here and below: pairs with the Release of whoever leaves: his access is over.
        let mut now = self.0.fetch_add(CLOSED, Ordering::Acquire) + CLOSED;
        while !now.is_multiple_of(CLOSED) {
            wait_word(&self.0, now, None);
            now = self.0.load(Ordering::Acquire);
        }
    }

    /// Undoes one [`close`](Gate::close).
    pub(crate) fn open(&self) {
        if self.0.fetch_sub(CLOSED, Ordering::Release) < 2 * CLOSED {
            wake_word(&self.0, u32::MAX);
        }
    }

    /// Closes for as long as the result lives.
    pub(crate) fn closed(&self) -> Closed<'_> {
        self.close();
        Closed(self)
    }

    /// Open, and nobody inside: in a forked process, where those who were there are not.
    pub(crate) fn renew(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let before = self.0.0.fetch_sub(1, Ordering::Release);
        if before >= CLOSED && before % CLOSED == 1 {
            wake_word(&self.0.0, u32::MAX);
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}
