//! How many bytes of RAM the store takes up, and that it never takes more than it may.
//!
//! One counter. Memory is charged before it is touched and uncharged after the kernel has it back, so the counter
//! is never below what is resident, and never above the limit.

use crate::device::Usage;
use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};

/// The account of one store.
#[derive(Debug)]
pub(super) struct Account {
    limit: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

impl Account {
    pub(super) fn new(limit: u64) -> Account {
        Account { limit, used: AtomicU64::new(0), peak: AtomicU64::new(0) }
    }

    /// Takes `bytes` more. False, and nothing taken, when that is more than may be.
    #[must_use]
    pub(super) fn charge(&self, bytes: u64) -> bool {
        // Relaxed: the counter alone decides; the memory it stands for is handed over under other locks.
        let charged =
            self.used.fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= self.limit));
        match charged {
            Ok(before) => {
                let now = before + bytes;
                if now > self.peak.load(Relaxed) {
                    self.peak.fetch_max(now, Relaxed);
                }
                true
            }
            Err(_) => false,
        }
    }

    /// Gives `bytes` back.
    pub(super) fn uncharge(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Relaxed);
        debug_assert!(before >= bytes, "{bytes} bytes given back of {before}");
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn usage(&self) -> Usage {
        Usage { used_bytes: self.used.load(Relaxed), peak_bytes: self.peak.load(Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_never_exceeds_the_limit() {
        let account = Account::new(100);
        assert!(account.charge(60));
        assert!(!account.charge(41));
        assert!(account.charge(40));
        assert!(!account.charge(u64::MAX));
        account.uncharge(70);
        assert_eq!(account.usage(), Usage { used_bytes: 30, peak_bytes: 100 });
        assert!(!account.charge(71));
    }
}
