//! Counters and latencies: written without contention, added up when somebody asks.
//!
//! Every context has its own, so counting on the fault path costs an uncontended add.

use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Sets it to zero; in a forked child only pages that are written to are copied.
fn reset(counter: &AtomicU64) {
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What is counted.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)*
        }

        /// The sums.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub(crate) struct Sums {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl Sums {
            pub(crate) fn add(&mut self, c: &Counters) {
                $(self.$name += c.$name.load(Relaxed);)*
            }
        }

        impl Counters {
            /// Sets all to zero: in a forked child, whose history begins.
            pub(crate) fn reset(&self) {
                $(reset(&self.$name);)*
            }
        }
    };
}

counters! {
    /// Faults resolved.
    faults,
    /// Faults on memory never touched.
    zero_fill,
    /// Faults that took a frame back from standby.
    standby_hits,
    /// Faults that waited for a device.
    device_loads,
    /// Faults resolved by a huge folio.
    huge_faults,
    /// First writes to clean pages.
    upgrades,
    /// Faults on pages that were there already.
    spurious,
    /// Pages brought in from devices.
    pages_in,
    /// Pages written to devices.
    pages_out,
    /// Pages dropped without being written because the device still had their content.
    clean_dropped,
    /// Of those, the ones found equal by comparison.
    compared_equal,
    /// Pages that turned out to be all zeros and took no device page.
    zero_dropped,
    /// Huge mappings made.
    huge_mapped,
    /// Huge mappings split into small ones.
    splits,
    /// Huge folios split into small ones.
    folio_splits,
    /// Folios that could not be split, because somebody relied on them or worked with them.
    folio_splits_failed,
    /// Small pages put together into huge folios.
    collapses,
    /// Blocks that were not collapsed because there was no huge page to be had.
    collapses_failed,
    /// Parts of split blocks that moved to frames of their own, to make room for huge folios.
    compact_migrated,
    /// Parts that could not, because somebody worked with them or relied on them.
    compact_failed,
    /// Faults that wanted a huge folio, and made do with small pages because none was to be had.
    huge_fallbacks,
    /// Pages read ahead of a stream.
    read_ahead,
    /// Pages moved out of the program's sight, to standby.
    unmapped,
    /// Pages of the program's own that were taken in hand.
    taken_in_hand,
    /// Victims that could not be unmapped: pinned, shared with a forked process, or protected.
    busy,
    /// Rounds of reclaim in a faulting thread.
    direct_reclaims,
    /// Rounds of reclaim in the background.
    background_reclaims,
    /// Pages lost.
    poisoned,
    /// Operations that had to wait for a change of mappings.
    changes,
}

/// Adds one to `counter`.
#[inline]
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Adds `n` to `counter`.
#[inline]
pub(crate) fn count_n(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

const SUB: u32 = 3;
const BUCKETS: usize = 40 << SUB;

/// Latencies in buckets an eighth of a power of two wide.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

fn bucket(ns: u64) -> usize {
    let ns = ns.max(1 << SUB);
    let exponent = 63 - ns.leading_zeros();
    let sub = (ns >> (exponent - SUB)) & ((1 << SUB) - 1);
    ((((exponent - SUB) as usize) << SUB) + sub as usize).min(BUCKETS - 1)
}

/// The upper edge of bucket `i`, in ns.
fn edge(i: usize) -> u64 {
    let exponent = (i >> SUB) as u32 + SUB;
    let sub = (i & ((1 << SUB) - 1)) as u64;
    (1 << exponent) + ((sub + 1) << (exponent - SUB))
}

impl Histogram {
    pub(crate) fn record(&self, d: Duration) {
        self.buckets[bucket(d.as_nanos() as u64)].fetch_add(1, Relaxed);
    }

    pub(crate) fn reset(&self) {
        self.buckets.iter().for_each(reset);
    }

    /// The latencies below which each of `shares` of all recorded in `all` lie, in ns, to an eighth; 0 for none.
    pub(crate) fn quantiles<'a, const N: usize>(
        all: impl Iterator<Item = &'a Histogram> + Clone,
        shares: [f64; N],
    ) -> [u64; N] {
        let at = |i: usize| all.clone().map(|h| h.buckets[i].load(Relaxed)).sum::<u64>();
        let total: u64 = (0..BUCKETS).map(at).sum();
        shares.map(|share| {
            let want = (share * total as f64).ceil().max(1.0) as u64;
            let mut seen = 0;
            for i in 0..BUCKETS {
                seen += at(i);
                if total > 0 && seen >= want {
                    return edge(i);
                }
            }
            0
        })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_an_eighth() {
        let h = Histogram::default();
        for ns in 1..=10_000u64 {
            h.record(Duration::from_nanos(ns));
        }
        let [p50, p99] = Histogram::quantiles([&h].into_iter(), [0.5, 0.99]);
        assert!((5000..=5700).contains(&p50), "{p50}");
        assert!((9900..=11_300).contains(&p99), "{p99}");
        let empty = Histogram::default();
        assert_eq!(Histogram::quantiles([&empty].into_iter(), [0.5]), [0]);
    }

    #[test]
    fn buckets_are_in_order_and_contain_what_they_say() {
        let mut last = 0;
        for ns in (8..1_000_000u64).step_by(7) {
            let b = bucket(ns);
            assert!(b >= last && ns <= edge(b), "{ns} in bucket {b} up to {}", edge(b));
            last = b;
        }
    }
}
