//! Locks of the engine, swapped for those of a model checker under `--cfg shuttle`.

#[cfg(not(shuttle))]
mod imp {
    pub(crate) use std::sync::MutexGuard;
    #[cfg(feature = "file")]
    pub(crate) use std::sync::RwLockReadGuard;
    use std::sync::{self, PoisonError, TryLockError};
    pub(crate) use std::thread::{sleep, yield_now};

    /// A mutex whose guard is had also after a panic: the engine's invariants are checked, not assumed.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) const fn new(value: T) -> Mutex<T> {
            Mutex(sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            match self.0.try_lock() {
                Ok(guard) => Some(guard),
                Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            }
        }
    }

    /// A lock for many readers or one writer, likewise.
    #[cfg(feature = "file")]
    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(sync::RwLock<T>);

    #[cfg(feature = "file")]
    impl<T> RwLock<T> {
        pub(crate) const fn new(value: T) -> RwLock<T> {
            RwLock(sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn write(&self) -> sync::RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

#[cfg(shuttle)]
mod imp {
    use shuttle::sync;
    pub(crate) use shuttle::sync::MutexGuard;
    pub(crate) use shuttle::thread::yield_now;

    /// Time does not pass in a model: others run.
    pub(crate) fn sleep(_: std::time::Duration) {
        yield_now();
    }
    #[cfg(feature = "file")]
    pub(crate) use shuttle::sync::RwLockReadGuard;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Mutex<T> {
            Mutex(sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    #[cfg(feature = "file")]
    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(sync::RwLock<T>);

    #[cfg(feature = "file")]
    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> RwLock<T> {
            RwLock(sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap()
        }

        pub(crate) fn write(&self) -> sync::RwLockWriteGuard<'_, T> {
            self.0.write().unwrap()
        }
    }
}

pub(crate) use imp::{Mutex, MutexGuard, sleep, yield_now};
#[cfg(feature = "file")]
pub(crate) use imp::{RwLock, RwLockReadGuard};

/// Keeps a value on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

impl<T> std::ops::Deref for Padded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}
