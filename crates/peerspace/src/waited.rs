//! How long somebody has waited, where data is given up after a while.
//!
//! A process that is stopped (by a shell, a debugger, a freezer) has waited for nothing: neither has whoever it waited for, if that
//! is a thread of its own. So what passes between two looks counts as a moment at most.

use std::time::{Duration, Instant};

/// What passes between two looks counts as no more than this: longer than a thread waits for a processor, mostly.
pub(crate) const MOMENT: Duration = Duration::from_millis(20);

/// How long a thread has waited so far, as far as it ran.
#[derive(Debug, Clone)]
pub(crate) struct Waited {
    looked: Instant,
    sum: Duration,
}

impl Waited {
    /// It begins to wait.
    pub(crate) fn new() -> Waited {
        Waited { looked: Instant::now(), sum: Duration::ZERO }
    }

    /// How long it has waited. To be asked more often than once in a [`MOMENT`].
    pub(crate) fn so_far(&mut self) -> Duration {
        let now = Instant::now();
        self.sum += now.saturating_duration_since(self.looked).min(MOMENT);
        self.looked = now;
        self.sum
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn what_passes_unseen_is_a_moment() {
        let mut waited = Waited::new();
        std::thread::sleep(MOMENT * 10);
        assert_eq!(waited.so_far(), MOMENT);
        let begin = Instant::now();
        while begin.elapsed() < MOMENT {
            waited.so_far();
        }
        assert!((MOMENT..=MOMENT * 3).contains(&waited.so_far()));
    }
}
