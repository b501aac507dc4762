//! Frames that the program does not see: the standby ring of single pages, and the pool of block frames.
//!
//! # The ring
//!
//! Single pages on their way out are moved to *slots* of staging, side by side, in the order in which they were
//! unmapped. [`SEGMENT`] slots make a segment, the unit in which the kernel gets the memory back. A page can be
//! taken back while its segment waits its turn; what is left in its slot is garbage that goes with the segment.
//!
//! ```text
//!   free segment --reserve--> filling --last slot done--> waiting (FIFO) --oldest--> drained --dropped--> free
//! ```
//!
//! `slots[i]` names the frame whose page is in slot `i`; it is set by whoever unmapped the page and cleared by
//! whoever takes it back or evicts it, each with the page's table entry locked. A segment that is drained
//! belongs to one thread; the entry locks keep it apart from faults.
//!
//! # Block frames
//!
//! Each has an address in staging for life, and a huge page that travels between there and the program. *Ready*
//! frames have a page that nobody uses; the others have none, or are in use.

use crate::sync::Mutex;
use peerspace_core::addr::{BLOCK_PAGES, Geometry, Pages, Va, VaRange};
use peerspace_core::memmap::Frame;
use peerspace_core::sync::Ordering;
use peerspace_core::words::Words;
use peerspace_os::own::{Own, Vec};
use peerspace_os::{Done, Trouble};

/// Slots in a segment.
pub(crate) const SEGMENT: u32 = 64;

/// A first-in-first-out queue that never grows.
#[derive(Debug)]
struct Queue {
    items: Vec<u32>,
    head: usize,
    len: usize,
}

impl Queue {
    fn new(capacity: usize) -> Queue {
        let mut items = Vec::with_capacity_in(capacity.max(1), Own);
        items.resize(capacity.max(1), 0);
        Queue { items, head: 0, len: 0 }
    }

    fn push(&mut self, item: u32) {
        assert!(self.len < self.items.len(), "a queue of staging overflows: something is queued twice");
        let at = (self.head + self.len) % self.items.len();
        self.items[at] = item;
        self.len += 1;
    }

    fn pop(&mut self) -> Option<u32> {
        if self.len == 0 {
            return None;
        }
        let item = self.items[self.head];
        self.head = (self.head + 1) % self.items.len();
        self.len -= 1;
        Some(item)
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.len).map(|i| self.items[(self.head + i) % self.items.len()])
    }
}

/// The standby ring.
#[derive(Debug)]
pub(crate) struct Ring<W> {
    geometry: Geometry,
    base: Va,
    slots: W,
    segments: u32,
    state: Mutex<RingState>,
}

#[derive(Debug)]
struct RingState {
    free: Queue,
    waiting: Queue,
    filling: Option<u32>,
    /// Slots of the filling segment handed out.
    used: u32,
    /// Per segment: slots handed out whose fate is not known yet, and slots with a page in them.
    pending: Vec<u32>,
    present: Vec<u32>,
    full: Vec<bool>,
}

/// Slots side by side, handed out to be filled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots {
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl<W: Words> Ring<W> {
    /// A ring of `segments` segments of staging from `base` on. `slots` has a word for each slot.
    pub(crate) fn new(geometry: Geometry, base: Va, segments: u32, slots: W) -> Ring<W> {
        let mut free = Queue::new(segments as usize);
        (0..segments).for_each(|s| free.push(s));
        let zeros = |n| {
            let mut v = Vec::with_capacity_in(n, Own);
            v.resize(n, 0u32);
            v
        };
        let mut full = Vec::with_capacity_in(segments as usize, Own);
        full.resize(segments as usize, false);
        let state = RingState {
            free,
            waiting: Queue::new(segments as usize),
            filling: None,
            used: 0,
            pending: zeros(segments as usize),
            present: zeros(segments as usize),
            full,
        };
        Ring { geometry, base, slots, segments, state: Mutex::new(state) }
    }

    /// Where slots are.
    pub(crate) fn range(&self, slots: Slots) -> VaRange {
        let page = self.geometry.page_bytes() as u64;
        let start = Va(self.base.0 + slots.first as u64 * page);
        VaRange { start, end: Va(start.0 + slots.count as u64 * page) }
    }

    /// Where one slot is.
    pub(crate) fn slot(&self, slot: u32) -> VaRange {
        self.range(Slots { first: slot, count: 1 })
    }

    /// The slots of a segment.
    pub(crate) fn segment(segment: u32) -> Slots {
        Slots { first: segment * SEGMENT, count: SEGMENT }
    }

    /// Hands out up to `want` slots side by side, to be [settled](Ring::settle). None when no segment is free.
    pub(crate) fn reserve(&self, want: u32) -> Option<Slots> {
        let mut s = self.state.lock();
        let segment = match s.filling {
            Some(segment) => segment,
            None => {
                let segment = s.free.pop()?;
                s.filling = Some(segment);
                s.used = 0;
                segment
            }
        };
        let count = want.min(SEGMENT - s.used);
        let first = segment * SEGMENT + s.used;
        s.used += count;
        s.pending[segment as usize] += count;
        if s.used == SEGMENT {
            s.filling = None;
            s.full[segment as usize] = true;
        }
        Some(Slots { first, count })
    }

    /// Says how far the slots handed out were filled; the others stay empty, and are handed out again if nobody was
    /// given any behind them. When that was the last news of a full segment, the segment joins those that wait.
    pub(crate) fn settle(&self, slots: Slots, done: Done) {
        let present = done.pages.0 as u32;
        // A slot in which there is something against all expectation is left alone until its segment was dropped.
        let again = done.trouble != Some(Trouble::Present);
        let mut s = self.state.lock();
        let segment = slots.first / SEGMENT;
        let i = segment as usize;
        s.pending[i] -= slots.count;
        s.present[i] += present;
        if again && s.filling == Some(segment) && slots.first + slots.count == segment * SEGMENT + s.used {
            s.used -= slots.count - present;
        }
        if s.full[i] && s.pending[i] == 0 {
            s.waiting.push(segment);
        }
    }

    /// Names the frame whose page is in `slot`. The page's entry is locked.
    pub(crate) fn occupy(&self, slot: u32, frame: Frame) {
        // Relaxed: what matters is read again under the entry's lock.
        self.slots.at(slot as usize).store(frame.0 as u64 + 1, Ordering::Relaxed);
    }

    /// Makes what is in `slot` garbage. The page's entry is locked.
    pub(crate) fn vacate(&self, slot: u32) {
        self.slots.at(slot as usize).store(0, Ordering::Relaxed);
    }

    /// The frame whose page is in `slot`, as far as can be said without its entry locked.
    pub(crate) fn occupant(&self, slot: u32) -> Option<Frame> {
        let word = self.slots.at(slot as usize).load(Ordering::Relaxed);
        (word != 0).then(|| Frame((word - 1) as u32))
    }

    /// Takes the segment that has waited longest; it is the caller's until [`drained`](Ring::drained) or
    /// [`put_off`](Ring::put_off).
    pub(crate) fn oldest(&self) -> Option<u32> {
        self.state.lock().waiting.pop()
    }

    /// Closes the segment that is being filled although it is not full, so that it can be drained. For when
    /// everything has to go.
    pub(crate) fn close_filling(&self) {
        let mut s = self.state.lock();
        if let Some(segment) = s.filling.take() {
            s.full[segment as usize] = true;
            if s.pending[segment as usize] == 0 {
                s.waiting.push(segment);
            }
        }
    }

    /// A segment that could not be drained waits again.
    pub(crate) fn put_off(&self, segment: u32) {
        self.state.lock().waiting.push(segment);
    }

    /// The pages of a segment are gone; it is free. Returns how many there were.
    pub(crate) fn drained(&self, segment: u32) -> Pages {
        let mut s = self.state.lock();
        let i = segment as usize;
        debug_assert_eq!(s.pending[i], 0);
        s.full[i] = false;
        let present = std::mem::take(&mut s.present[i]);
        s.free.push(segment);
        Pages(present as u64)
    }

    /// Whether a slot can be had.
    #[cfg(feature = "devices")]
    pub(crate) fn has_room(&self) -> bool {
        let s = self.state.lock();
        s.filling.is_some() || s.free.len > 0
    }

    /// Segments that wait, and all there are.
    pub(crate) fn waiting(&self) -> (u32, u32) {
        (self.state.lock().waiting.len as u32, self.segments)
    }

    /// Pages in the ring, garbage included.
    pub(crate) fn pages(&self) -> Pages {
        Pages(self.state.lock().present.iter().map(|n| *n as u64).sum())
    }
}

/// The pool of block frames.
#[derive(Debug)]
pub(crate) struct Blocks {
    geometry: Geometry,
    base: Va,
    state: Mutex<BlockState>,
}

#[derive(Debug)]
struct BlockState {
    /// Frames with a huge page that nobody uses; the last one given back is the first one taken.
    ready: Vec<u32>,
    standby: Queue,
    /// Frames read ahead of a stream: they rest here before they join the standby.
    ahead: Queue,
    /// Frames whose folios are to be split when memory is short.
    deferred: Queue,
    /// How many there have ever been.
    deferrals: u64,
    /// Per frame: it is in that queue, perhaps since an earlier life.
    is_deferred: Vec<bool>,
    /// Per frame: it is in one of the queues, perhaps since an earlier stay.
    queued: Vec<bool>,
}

/// Blocks read ahead that may rest before the first one joins the standby.
const AHEAD: usize = 8;

impl Blocks {
    pub(crate) fn new(geometry: Geometry, base: Va, frames: u32) -> Blocks {
        let flags = || {
            let mut flags = Vec::with_capacity_in(frames as usize, Own);
            flags.resize(frames as usize, false);
            flags
        };
        let ready = Vec::with_capacity_in(frames as usize, Own);
        let [standby, ahead, deferred] = [(); 3].map(|()| Queue::new(frames as usize));
        let (queued, is_deferred) = (flags(), flags());
        let state = BlockState { ready, standby, ahead, deferred, deferrals: 0, is_deferred, queued };
        Blocks { geometry, base, state: Mutex::new(state) }
    }

    /// Where a block frame's page is while it is staged.
    pub(crate) fn range(&self, frame: Frame) -> VaRange {
        let block = self.geometry.block_bytes() as u64;
        let start = Va(self.base.0 + frame.0 as u64 * block);
        VaRange { start, end: Va(start.0 + block) }
    }

    /// Where part `i` of a block frame is while it is staged.
    pub(crate) fn part(&self, frame: Frame, i: u64) -> VaRange {
        debug_assert!(i < BLOCK_PAGES);
        let page = self.geometry.page_bytes() as u64;
        let start = Va(self.range(frame).start.0 + i * page);
        VaRange { start, end: Va(start.0 + page) }
    }

    /// Takes a frame that has a huge page already.
    pub(crate) fn take_ready(&self) -> Option<Frame> {
        self.state.lock().ready.pop().map(Frame)
    }

    /// Gives back a frame with its huge page, for the next user.
    pub(crate) fn give_ready(&self, frame: Frame) {
        let mut s = self.state.lock();
        debug_assert!(s.ready.len() < s.ready.capacity());
        s.ready.push(frame.0);
    }

    /// Frames with a huge page that nobody uses.
    pub(crate) fn ready(&self) -> usize {
        self.state.lock().ready.len()
    }

    /// A frame was put on standby.
    pub(crate) fn put_on_standby(&self, frame: Frame) {
        let mut s = self.state.lock();
        if !std::mem::replace(&mut s.queued[frame.0 as usize], true) {
            s.standby.push(frame.0);
        }
    }

    /// A frame was read ahead. When too many are, the first one joins the standby.
    pub(crate) fn put_ahead(&self, frame: Frame) {
        let mut s = self.state.lock();
        if !std::mem::replace(&mut s.queued[frame.0 as usize], true) {
            s.ahead.push(frame.0);
        }
        if s.ahead.len > AHEAD {
            let first = s.ahead.pop().expect("there is more than one");
            s.standby.push(first);
        }
    }

    /// The frame that has been on standby longest, if it still is: the caller looks.
    pub(crate) fn oldest(&self) -> Option<Frame> {
        let mut s = self.state.lock();
        let frame = s.standby.pop().or_else(|| s.ahead.pop())?;
        s.queued[frame as usize] = false;
        Some(Frame(frame))
    }

    /// The folio of `frame` is to be split when memory is short (rule H11); `first`: since just now.
    pub(crate) fn defer(&self, frame: Frame, first: bool) {
        let mut s = self.state.lock();
        s.deferrals += first as u64;
        if !std::mem::replace(&mut s.is_deferred[frame.0 as usize], true) {
            s.deferred.push(frame.0);
        }
    }

    /// The folio that was queued to be split longest ago, if it still is: the caller looks.
    pub(crate) fn next_deferred(&self) -> Option<Frame> {
        let mut s = self.state.lock();
        let frame = s.deferred.pop()?;
        s.is_deferred[frame as usize] = false;
        Some(Frame(frame))
    }

    /// Whether `frame` is in that queue.
    pub(crate) fn is_deferred(&self, frame: Frame) -> bool {
        self.state.lock().is_deferred[frame.0 as usize]
    }

    /// How many [`next_deferred`](Blocks::next_deferred) can give.
    pub(crate) fn deferred(&self) -> usize {
        self.state.lock().deferred.len
    }

    /// How many folios have ever been queued to be split.
    pub(crate) fn deferrals(&self) -> u64 {
        self.state.lock().deferrals
    }

    /// Frames on standby, some of which may have been taken back; without those read ahead.
    pub(crate) fn on_standby(&self) -> usize {
        self.state.lock().standby.len
    }

    /// How many of the frames that [`oldest`](Blocks::oldest) can give still are on standby, as `is_aside` knows.
    pub(crate) fn aside(&self, is_aside: impl Fn(Frame) -> bool) -> usize {
        let s = self.state.lock();
        s.standby.iter().chain(s.ahead.iter()).filter(|frame| is_aside(Frame(*frame))).count()
    }

    /// Frames that [`oldest`](Blocks::oldest) can give.
    pub(crate) fn queued(&self) -> usize {
        let s = self.state.lock();
        s.standby.len + s.ahead.len
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use peerspace_core::words::zeroed;

    fn filled(pages: u64) -> Done {
        Done::all(Pages(pages))
    }

    #[test]
    fn segments_come_back_in_the_order_they_were_filled() {
        let ring = Ring::new(Geometry::KIB4, Va(1 << 30), 3, zeroed(3 * SEGMENT as usize));
        let mut last = None;
        for _ in 0..3 {
            let a = ring.reserve(40).unwrap();
            let b = ring.reserve(40).unwrap();
            assert_eq!((a.count, b.count), (40, 24));
            assert_eq!(b.first, a.first + 40);
            // A segment does not wait before all of its slots are settled.
            let before = ring.waiting().0;
            ring.settle(b, filled(24));
            assert_eq!(ring.waiting().0, before);
            ring.settle(a, filled(39));
            assert_eq!(ring.waiting().0, before + 1);
            last = Some(a.first / SEGMENT);
        }
        assert!(ring.reserve(1).is_none());
        let first = ring.oldest().unwrap();
        assert_eq!(ring.pages(), Pages(3 * 63));
        assert_eq!(ring.drained(first), Pages(63));
        assert_eq!(ring.reserve(1).unwrap().first / SEGMENT, first);
        ring.oldest().unwrap();
        assert_eq!(ring.oldest(), last);
        assert_eq!(ring.oldest(), None);
        ring.close_filling();
        assert_eq!(ring.waiting().0, 0); // one slot is not settled
        ring.settle(Slots { first: first * SEGMENT, count: 1 }, filled(1));
        assert_eq!(ring.oldest(), Some(first));
    }

    #[test]
    fn slots_that_stay_empty_are_handed_out_again() {
        let ring = Ring::new(Geometry::KIB4, Va(1 << 30), 2, zeroed(2 * SEGMENT as usize));
        let a = ring.reserve(10).unwrap();
        ring.settle(a, filled(4));
        let b = ring.reserve(10).unwrap();
        assert_eq!((b.first, b.count), (a.first + 4, 10));
        // Not those that turned out to be in use.
        ring.settle(b, Done::stopped(Pages(0), Trouble::Present));
        let b = ring.reserve(10).unwrap();
        assert_eq!(b.first, a.first + 14);
        // Not while somebody has slots behind them.
        let c = ring.reserve(5).unwrap();
        ring.settle(b, filled(0));
        assert_eq!(ring.reserve(1).unwrap().first, c.first + c.count);
        ring.settle(c, filled(5));
        assert_eq!(ring.pages(), Pages(9));
        assert_eq!(ring.waiting().0, 0);
    }

    #[test]
    fn a_frame_is_queued_for_standby_once() {
        let blocks = Blocks::new(Geometry::KIB4, Va(1 << 30), 2);
        blocks.put_on_standby(Frame(1));
        blocks.put_on_standby(Frame(0));
        blocks.put_on_standby(Frame(1));
        assert_eq!(blocks.oldest(), Some(Frame(1)));
        assert_eq!(blocks.oldest(), Some(Frame(0)));
        assert_eq!(blocks.oldest(), None);
        blocks.give_ready(Frame(1));
        assert_eq!(blocks.take_ready(), Some(Frame(1)));
        assert_eq!(blocks.part(Frame(1), 3).start.0, (1 << 30) + (2 << 20) + 3 * 4096);
    }
}
