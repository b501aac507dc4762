//! Failures on purpose: for tests of programs, and of the engine, that have to survive a device that fails (rules G5, Z9).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// In which way an [`Accelerator`](super::Accelerator) is to fail. Meant for tests of programs that must survive it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// It enters no translations.
    RefuseMap,
    /// It takes no translations away: it says that it is about to, goes on using them, and never is done. Counts requests to
    /// take some away.
    NeverUnmap,
    /// Everything fails, and no kernel accesses anything any more. Counts transfers and changes of translations.
    Gone,
}

/// How many failures there are.
const KINDS: usize = 3;
const NEVER: u64 = u64::MAX;

/// For each failure, how many more requests go well.
#[derive(Debug)]
pub(super) struct Failures([AtomicU64; KINDS]);

impl Failures {
    pub(super) fn new() -> Failures {
        Failures([const { AtomicU64::new(NEVER) }; KINDS])
    }

    pub(super) fn set(&self, failure: Failure, after: u64) {
        self.0[failure as usize].store(after.min(NEVER - 1), Relaxed);
    }

    pub(super) fn mend(&self, failure: Failure) {
        self.0[failure as usize].store(NEVER, Relaxed);
    }

    /// Whether a request fails now.
    pub(super) fn is(&self, failure: Failure) -> bool {
        self.0[failure as usize].load(Relaxed) == 0
    }

    /// Counts a request. Whether it fails.
    pub(super) fn strikes(&self, failure: Failure) -> bool {
        let left = &self.0[failure as usize];
        // Most of the time nothing is to be counted, and the line stays shared.
        match left.load(Relaxed) {
            NEVER => false,
            _ => left
                .fetch_update(Relaxed, Relaxed, |n| if n == NEVER { None } else { Some(n.saturating_sub(1)) })
                .is_ok_and(|before| before == 0),
        }
    }
}
