//! References to something that can be taken away: they can be refused, and waited for (rules Z2 and Z3).
//!
//! ```text
//!  vacant --open--> live --revoke--> revoked --close--> closed --(all references gone)--> vacant
//!                    ^                  |
//!                    +-----restore------+
//! ```
//!
//! Whoever wants a new reference gets one while it is *live*. Whoever owns a part of it, which keeps it from being
//! closed, gets one while it is *revoked* as well. Counts are spread over several cache lines, so that processors do not
//! compete for one; a reference is given back where it was taken.
//!
//! Orderings: getting adds to a count, then looks at the state; closing sets the state, then looks at the counts. All four
//! are sequentially consistent, so that at least one side sees the other (Dekker). Giving back is a Release that closing
//! acquires, so that what was done with a reference is over; getting acquires what opening released.

#[cfg(loom)]
use crate::sync::fence;
use crate::sync::{AtomicU64, Ordering, spin_hint};
use core::fmt;

/// Counts there are.
pub const SHARDS: usize = if cfg!(loom) { 2 } else { 8 };

const VACANT: u64 = 0;
const OPENING: u64 = 1;
const LIVE: u64 = 2;
const REVOKED: u64 = 3;
const CLOSED: u64 = 4;

/// A count with a cache line to itself.
#[repr(align(64))]
struct Shard(AtomicU64);

/// No reference is to be had: there is nothing, or it is being taken away (rule Z2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not there, or is being taken away")
    }
}

impl core::error::Error for Refused {}

/// The references to one thing.
pub struct Refs {
    state: AtomicU64,
    shards: [Shard; SHARDS],
}

impl Refs {
    /// To nothing yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Refs {
        Refs { state: AtomicU64::new(VACANT), shards: core::array::from_fn(|_| Shard(AtomicU64::new(0))) }
    }

    fn change(&self, from: u64, to: u64) -> Result<(), Refused> {
        self.state.compare_exchange(from, to, Ordering::SeqCst, Ordering::Relaxed).map(drop).map_err(|_| Refused)
    }

    /// Reserves it for whoever is about to put something there.
    ///
    /// # Errors
    /// When something is there.
    pub fn begin(&self) -> Result<(), Refused> {
        self.change(VACANT, OPENING)
    }

    /// What was put there can be referred to from now on. After [`begin`](Refs::begin).
    pub fn open(&self) {
        debug_assert_eq!(self.state.load(Ordering::Relaxed), OPENING);
        self.state.store(LIVE, Ordering::Release);
    }

    fn enter(&self, shard: usize, last: u64) -> Result<(), Refused> {
        let count = &self.shards[shard % SHARDS].0;
        count.fetch_add(1, Ordering::SeqCst);
        // The model checker knows sequential consistency of fences alone.
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        if (LIVE..=last).contains(&self.state.load(Ordering::SeqCst)) {
            return Ok(());
        }
        count.fetch_sub(1, Ordering::Release);
        Err(Refused)
    }

    /// Takes a reference.
    ///
    /// # Errors
    /// [`Refused`] when there is nothing, or it has been revoked.
    pub fn get(&self, shard: usize) -> Result<(), Refused> {
        self.enter(shard, LIVE)
    }

    /// Takes a reference for somebody who owns a part of it.
    ///
    /// # Errors
    /// [`Refused`] when there is nothing, or it has been closed: then nobody owns a part of it.
    pub fn get_as_owner(&self, shard: usize) -> Result<(), Refused> {
        self.enter(shard, REVOKED)
    }

    /// Gives a reference back, where it was taken.
    pub fn put(&self, shard: usize) {
        let before = self.shards[shard % SHARDS].0.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "a reference was given back twice");
    }

    /// Refuses new references from now on; those that exist stay.
    ///
    /// # Errors
    /// When somebody has done so already, or there is nothing.
    pub fn revoke(&self) -> Result<(), Refused> {
        self.change(LIVE, REVOKED)
    }

    /// Takes [`revoke`](Refs::revoke) back.
    ///
    /// # Errors
    /// When it was not revoked.
    pub fn restore(&self) -> Result<(), Refused> {
        // Looked at first: to try to change it is to write to it, and in a forked child to have the page copied.
        if self.state.load(Ordering::SeqCst) != REVOKED {
            return Err(Refused);
        }
        self.change(REVOKED, LIVE)
    }

    /// Refuses all references from now on, and waits for those that exist. Nobody owns a part of it any more.
    ///
    /// # Errors
    /// When it was not revoked.
    pub fn close(&self) -> Result<(), Refused> {
        self.change(REVOKED, CLOSED)?;
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        for shard in &self.shards {
            while shard.0.load(Ordering::SeqCst) != 0 {
                spin_hint();
            }
        }
        Ok(())
    }

    /// There is nothing any more; something else can be put there. After [`close`](Refs::close).
    pub fn vacate(&self) {
        debug_assert_eq!(self.state.load(Ordering::Relaxed), CLOSED);
        self.state.store(VACANT, Ordering::Release);
    }

    /// In a forked child, where whoever had a reference does not exist.
    pub fn renew(&self) {
        // What is read alone is not copied for the child.
        let held = self.shards.iter().filter(|shard| shard.0.load(Ordering::Relaxed) != 0);
        held.for_each(|shard| shard.0.store(0, Ordering::Relaxed));
    }
}

impl fmt::Debug for Refs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = ["vacant", "opening", "live", "revoked", "closed"][self.state.load(Ordering::Relaxed) as usize];
        let count: u64 = self.shards.iter().map(|s| s.0.load(Ordering::Relaxed)).sum();
        write!(f, "Refs({state}, {count})")
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[cfg(not(loom))]
    #[test]
    fn z2_references_are_refused_once_revoked() {
        let refs = Refs::new();
        assert_eq!(refs.get(0), Err(Refused));
        refs.begin().unwrap();
        assert_eq!((refs.get(0), refs.begin()), (Err(Refused), Err(Refused)));
        refs.open();
        refs.get(3).unwrap();
        refs.revoke().unwrap();
        assert_eq!((refs.get(0), refs.revoke()), (Err(Refused), Err(Refused)));
        refs.get_as_owner(0).unwrap();
        refs.restore().unwrap();
        refs.get(SHARDS + 1).unwrap();
        for shard in [3, 0, 1] {
            refs.put(shard);
        }
        assert_eq!(refs.close(), Err(Refused));
        refs.revoke().unwrap();
        refs.close().unwrap();
        assert_eq!(refs.get_as_owner(0), Err(Refused));
        refs.vacate();
        refs.begin().unwrap();
    }

    /// Nobody uses it after it was closed, whoever was in time is waited for, and what was done is seen.
    #[cfg(loom)]
    #[test]
    fn every_order_of_getting_and_closing() {
        use loom::sync::Arc;
        use loom::sync::atomic::AtomicU64;
        for (users, owner, bound) in [(1, false, None), (1, true, None), (2, true, Some(2))] {
            let mut model = loom::model::Builder::new();
            model.preemption_bound = bound;
            model.check(move || {
                let it = Arc::new((Refs::new(), AtomicU64::new(1)));
                it.0.begin().unwrap();
                it.0.open();
                let use_it = |shard: usize| {
                    let it = it.clone();
                    loom::thread::spawn(move || {
                        let got = if owner { it.0.get_as_owner(shard) } else { it.0.get(shard) };
                        if got.is_ok() {
                            // Relaxed: it is the references that order it.
                            assert_eq!(it.1.load(Ordering::Relaxed), 1, "used after it was taken away");
                            it.0.put(shard);
                        }
                    })
                };
                let users: std::vec::Vec<_> = (0..users).map(use_it).collect();
                it.0.revoke().unwrap();
                it.0.close().unwrap();
                it.1.store(0, Ordering::Relaxed);
                for user in users {
                    user.join().unwrap();
                }
            });
        }
    }
}
