//! Sees pages that move to and fro between the CPU and devices, and says how long to leave them where they are.
//!
//! Two that write to the same page in turns make it move each time, at the price of a whole transfer for a few bytes. Every move
//! leaves a note of where the page went and when. One that goes elsewhere soon after it came adds to the page's count; from a
//! few on there is a truce: until it is over the page stays, and who can access it in place does so. Each truce that
//! is followed by the same again is twice as long, up to a limit, and a page that was left in peace for long enough starts anew.
//!
//! Notes are one word each in a small table by hash; a page that loses its note to another only moves a few times more.
//! All accesses are relaxed: nothing depends on them but speed.

use crate::addr::Vpn;
use crate::sync::{AtomicU64, Ordering::Relaxed};
use crate::words::Words;

/// Moves, each soon after the one before, that make a war.
const PATIENCE: u64 = 4;
/// What is soon, in ticks of the caller's clock: tenths of a millisecond.
const SOON: u64 = 100;
/// The first truce, and the longest, in ticks.
const TRUCE: u64 = 50;
const LONGEST: u64 = 10_000;

// A note: tag 20, place 4, count 4, truces 4, time 32.
const TIME: u64 = (1 << 32) - 1;

/// The notes. A tick is a tenth of a millisecond.
#[derive(Debug)]
pub struct Wars<W> {
    notes: W,
}

#[derive(Clone, Copy)]
struct Note {
    place: u64,
    count: u64,
    truces: u64,
    time: u64,
}

impl Note {
    fn truce(self) -> u64 {
        if self.truces == 0 { 0 } else { (TRUCE << (self.truces - 1)).min(LONGEST) }
    }
}

impl<W: Words> Wars<W> {
    /// How many words it takes.
    pub const WORDS: usize = 1024;

    /// Peace. There are as many zeroed words as [`WORDS`](Wars::WORDS) says.
    pub fn new(notes: W) -> Wars<W> {
        assert!(notes.len() >= Self::WORDS);
        Wars { notes }
    }

    fn slot(&self, vpn: Vpn) -> (&AtomicU64, u64) {
        let hash = (vpn.0 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (self.notes.at((hash >> 54) as usize % Self::WORDS), (hash >> 30) & 0xf_ffff)
    }

    fn read(word: u64, tag: u64) -> Option<Note> {
        (word >> 44 == tag && word != 0).then_some(Note {
            place: (word >> 40) & 15,
            count: (word >> 36) & 15,
            truces: (word >> 32) & 15,
            time: word & TIME,
        })
    }

    /// The page at `vpn` moves to `place` (below 16), at `now`. True if that begins a truce.
    pub fn moved(&self, vpn: Vpn, place: u8, now: u64) -> bool {
        let (slot, tag) = self.slot(vpn);
        let (place, now) = (place as u64 & 15, now & TIME);
        let fresh = Note { place, count: 0, truces: 0, time: now };
        let word = slot.load(Relaxed);
        let note = match Self::read(word, tag) {
            None => fresh,
            // Whoever cannot do without it takes it even so; the truce goes on.
            Some(note) if note.count == 0 && (now.wrapping_sub(note.time) & TIME) < note.truce() => {
                slot.store(word & !(15 << 40) | place << 40, Relaxed);
                return false;
            }
            Some(note) => {
                let since = now.wrapping_sub(note.time) & TIME;
                let soon = since < SOON + note.truce();
                match (note.place == place, soon) {
                    (true, _) => Note { time: now, ..note },
                    (false, true) if note.count + 1 >= PATIENCE => {
                        Note { place, count: 0, truces: (note.truces + 1).min(9), time: now }
                    }
                    (false, true) => Note { place, count: note.count + 1, time: now, ..note },
                    // It was left alone for a while. What it was like before counts for less.
                    (false, false) => Note { truces: note.truces / 2, ..fresh },
                }
            }
        };
        let begins = note.count == 0 && note.truces > 0 && note.time == now && note.place == place;
        slot.store(tag << 44 | note.place << 40 | note.count << 36 | note.truces << 32 | note.time, Relaxed);
        begins
    }

    /// How many ticks the page at `vpn` is to be left where it is, at `now`: 0 for none.
    pub fn truce(&self, vpn: Vpn, now: u64) -> u64 {
        let (slot, tag) = self.slot(vpn);
        let Some(note) = Self::read(slot.load(Relaxed), tag) else { return 0 };
        if note.count > 0 {
            return 0;
        }
        note.truce().saturating_sub((now & TIME).wrapping_sub(note.time) & TIME)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;

    /// Rule G8: what a war costs is bounded.
    #[test]
    fn a_war_ends_in_longer_and_longer_truces() {
        let wars = Wars::new(zeroed(1024));
        let page = Vpn(77);
        let (mut now, mut moves, mut truces) = (1000, 0u64, std::vec::Vec::new());
        while now < 1000 + 40_000 {
            let truce = wars.truce(page, now);
            if truce > 0 {
                truces.push(truce);
                // One side cannot but have it at once.
                assert!(!wars.moved(page, 0, now + 1));
                assert_eq!(wars.truce(page, now + 1), truce - 1);
                now += truce;
            }
            wars.moved(page, (moves % 2) as u8, now);
            moves += 1;
            now += 1;
        }
        assert!(truces.is_sorted(), "{truces:?}");
        assert!(truces.last() >= Some(&5_000), "{truces:?}");
        // Four seconds of war, with a move each 0.1 ms it would have been 40000.
        assert!(moves < 100, "{moves} moves");
    }

    #[test]
    fn who_stays_or_moves_seldom_is_left_alone() {
        let wars = Wars::new(zeroed(1024));
        for i in 0..1000 {
            assert!(!wars.moved(Vpn(5), 3, i), "it stays");
            assert_eq!(wars.truce(Vpn(5), i), 0);
        }
        for i in 0..1000 {
            assert!(!wars.moved(Vpn(6), (i % 2) as u8, i * SOON), "it moves seldom");
            assert_eq!(wars.truce(Vpn(6), i * SOON), 0);
        }
    }
}
