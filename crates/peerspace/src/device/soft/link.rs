//! The link between a device and the host: how long transfers take.
//!
//! Each direction has the time until which it is busy. A transfer begins when it has been asked for and those before it are
//! through; it takes its bytes at the link's speed, and arrives the latency later. What the copy itself takes is part of that;
//! the rest is waited for: by sleeping as long as much is left, by spinning at the end.

use super::options::Link;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// To the device, or from it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    In = 0,
    Out = 1,
}

/// What a sleeping thread may come late by.
const SLACK: Duration = Duration::from_micros(120);

#[derive(Debug)]
pub(super) struct Wire {
    link: Option<Link>,
    start: Instant,
    /// Until when each direction is busy, in nanoseconds from the start.
    busy_until: [AtomicU64; 2],
    /// How long both were, added up, in nanoseconds.
    busy: AtomicU64,
}

impl Wire {
    pub(super) fn new(link: Option<Link>) -> Wire {
        Wire { link, start: Instant::now(), busy_until: [const { AtomicU64::new(0) }; 2], busy: AtomicU64::new(0) }
    }

    pub(super) fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy.load(Relaxed))
    }

    /// Now, if there is anything to be timed.
    pub(super) fn now(&self) -> Option<u64> {
        self.link.map(|_| self.start.elapsed().as_nanos() as u64)
    }

    /// When `bytes` arrive that were sent at `from`.
    fn arrival(&self, way: Way, bytes: u64, from: Option<u64>) -> Option<u64> {
        let (link, from) = (self.link?, from?);
        let takes = bytes as u128 * 1_000_000_000 / u128::from(link.bytes_per_second.max(1));
        let takes = u64::try_from(takes).unwrap_or(u64::MAX >> 2).min(u64::MAX >> 2);
        self.busy.fetch_add(takes, Relaxed);
        let until = |busy: u64| busy.max(from).saturating_add(takes);
        let before = self.busy_until[way as usize].fetch_update(Relaxed, Relaxed, |busy| Some(until(busy)));
        let latency = u64::try_from(link.latency.as_nanos()).unwrap_or(u64::MAX);
        before.ok().map(|busy| until(busy).saturating_add(latency))
    }

    /// Waits until `bytes` that were sent at `from` (see [`now`](Wire::now)) have arrived.
    pub(super) fn arrive(&self, way: Way, bytes: u64, from: Option<u64>) {
        if let Some(arrival) = self.arrival(way, bytes, from) {
            self.wait_until(arrival);
        }
    }

    fn wait_until(&self, arrival: u64) {
        let arrival = Duration::from_nanos(arrival);
        loop {
            let left = arrival.saturating_sub(self.start.elapsed());
            if left.is_zero() {
                return;
            }
            if left > SLACK {
                crate::sync::sleep(left - SLACK);
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

/// Waits until `bytes` have come out of one device and into another.
pub(super) fn between(from: &Wire, to: &Wire, bytes: u64, sent: (Option<u64>, Option<u64>)) {
    // Both are asked before either is waited for: the bytes are on both links at the same time.
    let arrivals = (from.arrival(Way::Out, bytes, sent.0), to.arrival(Way::In, bytes, sent.1));
    arrivals.0.into_iter().for_each(|at| from.wait_until(at));
    arrivals.1.into_iter().for_each(|at| to.wait_until(at));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(n: u64) -> Option<u64> {
        Some(n * 1000)
    }

    #[test]
    fn transfers_follow_each_other_in_one_direction_and_not_in_both() {
        let link = Link { bytes_per_second: 1_000_000_000, latency: Duration::from_micros(5) };
        let wire = Wire::new(Some(link));
        // A thousand bytes take a microsecond.
        assert_eq!(wire.arrival(Way::In, 10_000, micros(100)), micros(115));
        assert_eq!(wire.arrival(Way::In, 10_000, micros(103)), micros(125));
        assert_eq!(wire.arrival(Way::Out, 1_000, micros(103)), micros(109));
        assert_eq!(wire.arrival(Way::In, 0, micros(200)), micros(205));
        assert_eq!(wire.busy(), Duration::from_micros(21));
        let endless = Wire::new(Some(Link { bytes_per_second: 0, latency: Duration::MAX }));
        assert!(endless.arrival(Way::In, u64::MAX, micros(1)).unwrap() > 1 << 60);
        let none = Wire::new(None);
        assert_eq!((none.now(), none.arrival(Way::In, 1, None)), (None, None));
    }

    #[test]
    fn nothing_arrives_early() {
        let link = Link { bytes_per_second: 1 << 30, latency: Duration::from_micros(30) };
        let wire = Wire::new(Some(link));
        for bytes in [0, 4096, 1 << 20] {
            let (begun, from) = (Instant::now(), wire.now());
            wire.arrive(Way::Out, bytes, from);
            let least = Duration::from_micros(30) + Duration::from_nanos((bytes * 1_000_000_000) >> 30);
            assert!(begun.elapsed() >= least, "{bytes} bytes after {:?}", begun.elapsed());
        }
    }
}
