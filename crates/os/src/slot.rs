//! A place for something that can be put in and taken away while others use it, without a lock for them (rule Z2).

use peerspace_core::refs::{Refs, Refused};
use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Deref;

/// A place. See [`Refs`] for its states.
pub struct Slot<T> {
    refs: Refs,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: `value` is written only by `put`, before the slot is opened and after `begin` has excluded everybody else, and by
// `take`, after closing has waited for all references. In between it is only shared.
unsafe impl<T: Send + Sync> Sync for Slot<T> {}

/// What is in a slot, kept there for as long as this lives.
pub struct SlotRef<'a, T> {
    slot: &'a Slot<T>,
    shard: usize,
}

impl<T> Slot<T> {
    /// Nothing.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Slot<T> {
        Slot { refs: Refs::new(), value: UnsafeCell::new(None) }
    }

    /// Puts `value` here.
    ///
    /// # Errors
    /// When something is here; `value` comes back.
    pub fn put(&self, value: T) -> Result<(), T> {
        if self.refs.begin().is_err() {
            return Err(value);
        }
        // SAFETY: `begin` succeeds for one caller alone, and no reference exists before `open`.
        unsafe { *self.value.get() = Some(value) };
        self.refs.open();
        Ok(())
    }

    /// What is here; `shard`: any number, best one that others do not use just now.
    ///
    /// # Errors
    /// [`Refused`] when nothing is, or it is being taken away.
    pub fn get(&self, shard: usize) -> Result<SlotRef<'_, T>, Refused> {
        self.refs.get(shard).map(|()| SlotRef { slot: self, shard })
    }

    /// The same for somebody who owns a part of it, which keeps it from being taken away, if not from being revoked.
    ///
    /// # Errors
    /// [`Refused`] when nothing is here.
    pub fn get_as_owner(&self, shard: usize) -> Result<SlotRef<'_, T>, Refused> {
        self.refs.get_as_owner(shard).map(|()| SlotRef { slot: self, shard })
    }

    /// Refuses new references; see [`Refs::revoke`].
    ///
    /// # Errors
    /// When somebody has done so already, or nothing is here.
    pub fn revoke(&self) -> Result<(), Refused> {
        self.refs.revoke()
    }

    /// Takes [`revoke`](Slot::revoke) back.
    ///
    /// # Errors
    /// When it was not revoked.
    pub fn restore(&self) -> Result<(), Refused> {
        self.refs.restore()
    }

    /// Takes away what is here and was revoked, when all references are gone.
    ///
    /// # Errors
    /// When it was not revoked.
    pub fn take(&self) -> Result<T, Refused> {
        self.refs.close()?;
        // SAFETY: closing succeeds for one caller alone and has waited for all references; there are no new ones.
        let value = unsafe { (*self.value.get()).take() };
        self.refs.vacate();
        Ok(value.expect("what is revoked was there"))
    }

    /// In a forked child, in which no thread has a reference.
    pub fn renew(&self) {
        self.refs.renew();
    }
}

impl<T> Deref for SlotRef<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: as long as there is a reference, the value is there and only shared.
        unsafe { (*self.slot.value.get()).as_ref() }.expect("there is a reference to it")
    }
}

impl<T> Drop for SlotRef<'_, T> {
    fn drop(&mut self) {
        self.slot.refs.put(self.shard);
    }
}

impl<T> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({:?})", self.refs)
    }
}

impl<T> fmt::Debug for SlotRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotRef({})", self.shard)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    struct Counted<'a>(&'a AtomicU64, u64);

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
            self.1 = 0;
        }
    }

    #[test]
    fn z2_what_is_used_stays_until_nobody_uses_it() {
        let dropped = AtomicU64::new(0);
        let slot = Slot::new();
        let used = AtomicU64::new(0);
        let rounds = if cfg!(miri) { 20 } else { 3000 };
        std::thread::scope(|scope| {
            for shard in 0..3 {
                let (slot, used, dropped) = (&slot, &used, &dropped);
                scope.spawn(move || {
                    while dropped.load(Relaxed) < rounds {
                        if let Ok(it) = slot.get(shard) as Result<SlotRef<'_, Counted<'_>>, _> {
                            assert_eq!(it.1, 77);
                            used.fetch_add(1, Relaxed);
                        }
                        std::thread::yield_now();
                    }
                });
            }
            for _ in 0..rounds {
                assert!(slot.put(Counted(&dropped, 77)).is_ok());
                let another = slot.put(Counted(&dropped, 77));
                assert!(another.is_err());
                std::mem::forget(another);
                slot.revoke().unwrap();
                assert!(slot.get(0).is_err());
                drop(slot.get_as_owner(0).unwrap());
                drop(slot.take().unwrap());
            }
        });
        assert_eq!(dropped.load(Relaxed), rounds);
    }

    #[test]
    fn what_is_never_taken_away_is_dropped_with_the_slot() {
        let dropped = AtomicU64::new(0);
        let slot = Slot::new();
        assert!(slot.put(Counted(&dropped, 1)).is_ok());
        drop(slot);
        assert_eq!(dropped.load(Relaxed), 1);
    }
}
