//! Translations that are used without a lock, and taking them away (TLB shootdown).
//!
//! A *lane* (a thread of a software device) translates an address and uses what it got in a [section](Section): a few
//! instructions that never block. Translations are in a page table, which all lanes read, and in the lane's own [`Tlb`].
//! Whoever takes one away must know when no lane uses it any more. He does, in this order:
//!
//! ```text
//!   lane                                    whoever takes a translation away
//!   E1  section = epoch | 1                 U1  table entry = 0
//!   E2  fence                               U2  fence
//!   E3  look into the TLB; if it is there,  U3  the entry of each lane's TLB = 0
//!       go on at E7                         U4  epoch = epoch + 1
//!   E4  read the table entry                U5  fence
//!   E5  TLB entry = what was read; fence    U6  wait until each lane's section is 0, or not below the new epoch
//!   E6  read the table entry again: if it
//!       has changed, TLB entry = 0, and
//!       back to E4
//!   E7  use it
//!   E8  section = 0
//! ```
//!
//! Fences are sequentially consistent, so of any two of them one is first.
//!
//! *No section that U6 does not see uses the translation.* Say U6 reads a value of the lane's section from before E1. Then
//! U5 comes before E2: E3 and E4 see what U1 and U3 have written, or later values. And if U6 reads a section with the new
//! epoch or a later one, the lane has read that epoch in E1 (acquire, by E2) from U4 (release), and sees the same.
//!
//! *Nothing stale stays in a TLB.* Say E4 has read the entry before U1, and E5 comes later. Either U2 comes before the fence
//! of E5: then E6 sees that the entry has changed, and takes it out again, all within the section for which U6 waits. Or the
//! fence of E5 comes before U2: then U3 sees what E5 has written, and clears it. If the entry has been put back by the time
//! of E6, with the same value, it is valid again, and whoever takes it away next has his own U3.
//!
//! *What was done by the translation is seen.* U6 reads (acquire) what E8 or a later E1 has written (release).
//!
//! The entries of a TLB are written by its lane; others only clear them.

use crate::sync::{AtomicU64, Ordering, fence, spin_hint};
use core::ops::{Deref, Range};

/// How many times translations were taken away, and whether lanes may enter sections at all.
#[derive(Debug)]
pub struct Epoch(AtomicU64);

/// Why lanes may not enter: bits, see [`Epoch::bar`].
pub type Bars = u64;

const BAR_BITS: u32 = 3;
const BARS: u64 = (1 << BAR_BITS) - 1;
/// A section's word is the epoch in which it began, and this bit.
const INSIDE: u64 = 1;

/// What one lane is doing: a word that it writes and others read. On a cache line of its own, best.
#[derive(Debug)]
pub struct Section(AtomicU64);

/// The lane is in its section as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Inside<'a>(&'a Section);

impl Epoch {
    /// The beginning; nothing bars the way.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Epoch {
        Epoch(AtomicU64::new(1 << BAR_BITS))
    }

    /// Begins a new epoch: steps U4 and U5. Translations were taken out of the table and the TLBs before. The result is for
    /// [`is_over`](Epoch::is_over).
    #[must_use]
    pub fn advance(&self) -> u64 {
        // Release: pairs with the acquire of Section::enter.
        let now = self.0.fetch_add(1 << BAR_BITS, Ordering::AcqRel) >> BAR_BITS;
        fence(Ordering::SeqCst);
        now + 1
    }

    /// Whether each of `sections` that began before the epoch `began` is over: step U6.
    #[must_use]
    pub fn is_over<'a>(began: u64, sections: impl IntoIterator<Item = &'a Section>) -> bool {
        // Acquire: pairs with the Release in Section::enter and in the end of a section.
        sections.into_iter().all(|section| {
            let word = section.0.load(Ordering::Acquire);
            word == 0 || word >> 1 >= began
        })
    }

    /// Lets no lane enter any more, for the reason that these bits (below 8) stand for. Sections that have begun go on;
    /// [`advance`](Epoch::advance) and [`is_over`](Epoch::is_over) tell when they have ended: of those that a lane
    /// still enters afterwards, none begins its use.
    pub fn bar(&self, why: Bars) {
        self.0.fetch_or(why & BARS, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Takes [`bar`](Epoch::bar) back.
    pub fn unbar(&self, why: Bars) {
        self.0.fetch_and(!(why & BARS), Ordering::AcqRel);
    }

    /// What bars the way now; 0: nothing.
    pub fn bars(&self) -> Bars {
        self.0.load(Ordering::Acquire) & BARS
    }
}

impl Section {
    /// Outside.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Section {
        Section(AtomicU64::new(0))
    }

    /// Enters: steps E1 and E2. Only the lane that the section belongs to does so, and not twice.
    ///
    /// # Errors
    /// What bars the way. The lane is outside then.
    #[inline]
    pub fn enter(&self, epoch: &Epoch) -> Result<Inside<'_>, Bars> {
        // Relaxed: the fence below makes it an acquire, which pairs with the Release in Epoch::advance.
        let began = epoch.0.load(Ordering::Relaxed) >> BAR_BITS;
        // Release: what the lane did in earlier sections is seen by whoever reads this word in their stead.
        self.0.store(began << 1 | INSIDE, Ordering::Release);
        fence(Ordering::SeqCst);
        let inside = Inside(self);
        // After the fence: either this sees the bar, or whoever has put it there sees this section.
        match epoch.0.load(Ordering::Relaxed) & BARS {
            0 => Ok(inside),
            bars => Err(bars),
        }
    }

    /// Whether the lane is outside.
    pub fn is_outside(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    /// Outside again, for a forked process that does not have the lane.
    pub fn reset(&self) {
        if !self.is_outside() {
            self.0.store(0, Ordering::Release);
        }
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with the Acquire in Epoch::is_over.
        self.0.0.store(0, Ordering::Release);
    }
}

/// Step U2: after entries of the table were cleared, and before TLBs are.
pub fn cleared() {
    fence(Ordering::SeqCst);
}

/// One translation in a TLB: the key, and what it leads to.
#[derive(Debug)]
pub struct TlbEntry {
    /// The key and 1 in bit 0; 0 where nothing is.
    tag: AtomicU64,
    value: AtomicU64,
}

impl TlbEntry {
    /// Nothing.
    #[allow(clippy::new_without_default)]
    pub fn new() -> TlbEntry {
        TlbEntry { tag: AtomicU64::new(0), value: AtomicU64::new(0) }
    }
}

/// Entries in a set.
const WAYS: usize = 4;

/// The translations that one lane has used of late, by key (a page number, below 2^63). The lane looks up and fills, in a
/// section; anybody clears.
#[derive(Debug)]
pub struct Tlb<S> {
    entries: S,
    turn: AtomicU64,
}

impl<S: Deref<Target = [TlbEntry]>> Tlb<S> {
    /// A TLB of these entries, which are empty.
    ///
    /// # Panics
    /// Unless there are a power of two of them.
    pub fn new(entries: S) -> Tlb<S> {
        assert!(entries.len().is_power_of_two(), "a TLB of {} entries", entries.len());
        Tlb { entries, turn: AtomicU64::new(0) }
    }

    #[inline]
    fn set(&self, key: u64) -> &[TlbEntry] {
        let ways = WAYS.min(self.entries.len());
        let first = (key as usize * ways) & (self.entries.len() - 1);
        &self.entries[first..first + ways]
    }

    /// What is known of `key`: step E3.
    #[inline]
    pub fn look_up(&self, key: u64) -> Option<u64> {
        let tag = key << 1 | 1;
        // Relaxed: the fence of E2 comes before. The value was written by this thread.
        let entry = self.set(key).iter().find(|e| e.tag.load(Ordering::Relaxed) == tag)?;
        Some(entry.value.load(Ordering::Relaxed))
    }

    /// Remembers `value`, just read from the table, unless `still` says that it is there no more: steps E5 and E6. False
    /// when it is not remembered.
    #[must_use]
    pub fn fill(&self, key: u64, value: u64, still: impl FnOnce() -> bool) -> bool {
        let (set, tag) = (self.set(key), key << 1 | 1);
        let turn = self.turn.load(Ordering::Relaxed) as usize;
        let same = set.iter().position(|e| e.tag.load(Ordering::Relaxed) == tag);
        let at = same.or_else(|| set.iter().position(|e| e.tag.load(Ordering::Relaxed) == 0)).unwrap_or_else(|| {
            self.turn.store(turn as u64 + 1, Ordering::Relaxed);
            turn % set.len()
        });
        set[at].value.store(value, Ordering::Relaxed);
        set[at].tag.store(tag, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let still = still();
        if !still {
            set[at].tag.store(0, Ordering::Relaxed);
        }
        still
    }

    /// Forgets these keys: step U3.
    pub fn clear(&self, keys: Range<u64>) {
        let forget = |entry: &TlbEntry| {
            let tag = entry.tag.load(Ordering::Relaxed);
            if tag != 0 && keys.contains(&(tag >> 1)) {
                // If the lane has put another one here meanwhile, that one stays.
                let _ = entry.tag.compare_exchange(tag, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        };
        if keys.end.saturating_sub(keys.start) < (self.entries.len() / WAYS) as u64 {
            keys.clone().flat_map(|key| self.set(key)).for_each(forget);
        } else {
            self.entries.iter().for_each(forget);
        }
    }
}

/// Waits for [`Epoch::is_over`], up to `times` looks; the result is its last answer. `rest` is called between looks, with their
/// number.
pub fn wait_over<'a, I>(began: u64, sections: I, times: u32, mut rest: impl FnMut(u32)) -> bool
where
    I: IntoIterator<Item = &'a Section> + Clone,
{
    for time in 0..times {
        if Epoch::is_over(began, sections.clone()) {
            return true;
        }
        rest(time);
        spin_hint();
    }
    Epoch::is_over(began, sections)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use alloc::boxed::Box;

    fn tlb(n: usize) -> Tlb<Box<[TlbEntry]>> {
        Tlb::new((0..n).map(|_| TlbEntry::new()).collect())
    }

    #[test]
    fn a_tlb_knows_what_was_filled_and_forgets_what_was_cleared() {
        let t = tlb(16);
        for key in 0..16 {
            assert!(t.fill(key, key + 100, || true));
        }
        assert!((0..16).all(|key| t.look_up(key) == Some(key + 100)));
        t.clear(3..5);
        assert_eq!(
            (2..6).map(|key| t.look_up(key).is_some()).collect::<std::vec::Vec<_>>(),
            [true, false, false, true]
        );
        t.clear(0..u64::MAX >> 1);
        assert!((0..16).all(|key| t.look_up(key).is_none()));
        assert!(!t.fill(7, 1, || false) && t.look_up(7).is_none());
        // More of one set than there are ways: the last ones are known.
        (0..6).for_each(|i| assert!(t.fill(i * 16, i, || true)));
        assert_eq!(t.look_up(5 * 16), Some(5));
        // A key has one entry.
        assert!(t.fill(5 * 16, 9, || true));
        t.clear(80..81);
        assert_eq!(t.look_up(80), None);
    }

    #[test]
    fn a_section_is_waited_for_and_a_later_one_is_not() {
        let (epoch, lanes) = (Epoch::new(), [Section::new(), Section::new()]);
        let old = lanes[0].enter(&epoch).unwrap();
        let began = epoch.advance();
        let new = lanes[1].enter(&epoch).unwrap();
        assert!(!Epoch::is_over(began, &lanes));
        assert!(!wait_over(began, &lanes, 3, |_| {}));
        drop(old);
        assert!(Epoch::is_over(began, &lanes));
        epoch.bar(2);
        assert_eq!(lanes[0].enter(&epoch).unwrap_err(), 2);
        assert!(lanes[0].is_outside() && !lanes[1].is_outside());
        epoch.unbar(2);
        drop(new);
        drop(lanes[0].enter(&epoch).unwrap());
    }
}

#[cfg(all(test, loom))]
mod every_order {
    use super::*;
    use crate::sync::Ordering::{Acquire, Relaxed, Release};
    use alloc::boxed::Box;
    use loom::sync::Arc;
    use loom::thread;

    /// A device with one page, one lane and one translation. Each place it can lead to counts its accesses without being atomic.
    struct Device {
        epoch: Epoch,
        section: Section,
        tlb: Tlb<Box<[TlbEntry]>>,
        entry: AtomicU64,
        places: [AtomicU64; 3],
    }

    impl Device {
        fn new() -> Arc<Device> {
            Arc::new(Device {
                epoch: Epoch::new(),
                section: Section::new(),
                tlb: Tlb::new(Box::new([TlbEntry::new()])),
                entry: AtomicU64::new(1),
                places: [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)],
            })
        }

        /// The lane's way. The place it has accessed, if there was a translation.
        fn access(&self) -> Option<u64> {
            let _inside = self.section.enter(&self.epoch).ok()?;
            let place = loop {
                if let Some(known) = self.tlb.look_up(0) {
                    break known;
                }
                let read = self.entry.load(Acquire);
                if read == 0 {
                    return None;
                }
                if self.tlb.fill(0, read, || self.entry.load(Relaxed) == read) {
                    break read;
                }
            };
            let place_word = &self.places[place as usize];
            place_word.store(place_word.load(Relaxed) + 1, Relaxed);
            Some(place)
        }

        fn take_away(&self) {
            self.entry.store(0, Release);
            cleared();
            self.tlb.clear(0..1);
            let began = self.epoch.advance();
            while !Epoch::is_over(began, [&self.section]) {
                spin_hint();
            }
        }
    }

    fn explore(switches: usize, run: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(switches);
        model.max_branches = 20_000;
        model.check(run);
    }

    #[test]
    fn g5_nothing_is_accessed_once_a_translation_is_gone() {
        explore(4, || {
            let device = Device::new();
            let lane = {
                let device = device.clone();
                thread::spawn(move || (0..2).filter(|_| device.access().is_some()).count() as u64)
            };
            device.take_away();
            // Whatever was done by it is seen here, and nothing comes later.
            let seen = device.places[1].load(Relaxed);
            let done = lane.join().unwrap();
            assert_eq!(seen, done);
            assert_eq!(device.places[1].load(Relaxed), done);
            assert_eq!(device.tlb.look_up(0), None, "something stale is left");
        });
    }

    #[test]
    fn g5_a_translation_that_changes_is_not_mixed_up() {
        explore(3, || {
            let device = Device::new();
            let lane = {
                let device = device.clone();
                thread::spawn(move || (0..2).filter(|_| device.access() == Some(1)).count() as u64)
            };
            device.take_away();
            let seen = device.places[1].load(Relaxed);
            device.entry.store(2, Release);
            assert_eq!(lane.join().unwrap(), seen, "the old place was accessed after it was given up");
            assert_ne!(device.tlb.look_up(0), Some(1));
        });
    }

    #[test]
    fn g5_the_same_translation_comes_back_and_goes_again() {
        explore(3, || {
            let device = Device::new();
            let lane = {
                let device = device.clone();
                thread::spawn(move || u64::from(device.access().is_some()))
            };
            device.take_away();
            device.entry.store(1, Release);
            device.take_away();
            assert_eq!(device.places[1].load(Relaxed), lane.join().unwrap());
            assert_eq!(device.tlb.look_up(0), None);
        });
    }

    #[test]
    fn g12_a_bar_keeps_lanes_out() {
        explore(4, || {
            let device = Device::new();
            let lane = {
                let device = device.clone();
                thread::spawn(move || (0..2).filter(|_| device.access().is_some()).count() as u64)
            };
            device.epoch.bar(1);
            while !device.section.is_outside() {
                spin_hint();
            }
            assert_eq!(device.places[1].load(Relaxed), lane.join().unwrap());
        });
    }
}
