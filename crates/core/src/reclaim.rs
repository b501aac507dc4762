//! Which frame goes next: the reclaim policy.
//!
//! Nobody can see how often a mapped page is used (there is no accessed bit in user space), so a policy learns
//! from *standby*: a victim is unmapped first and keeps its frame for a while; if it is asked for again it
//! costs one cheap fault and has proved to be in use. [`S3Fifo`] builds on that: newcomers pass through a
//! short queue, what is reused from standby (or soon after eviction) moves to the main queue, and a long scan
//! therefore flows through the short queue and leaves the working set alone.
//!
//! Lock: a policy and the links of the frames on its lists are guarded by one lock of the owner, which the
//! fault path never takes. Faults announce frames through [`Incoming`], a lock-free stack that the policy
//! empties when it works.

use crate::addr::Pages;
use crate::memmap::{Arrival, Frame, ListId, Memmap};
use crate::sync::Ordering::Relaxed;
use crate::words::{FreeStack, Words};

/// Chooses victims among mapped frames. Called under one lock.
pub trait Policy<W: Words>: Send {
    /// A name for statistics.
    fn name(&self) -> &'static str;
    /// `frame` was mapped, for the reason its [`arrival`](Memmap::arrival) gives.
    fn insert(&mut self, memmap: &Memmap<W>, frame: Frame);
    /// `frame` goes away (unmapped by the program, say). Does nothing if it is on no list.
    fn remove(&mut self, memmap: &Memmap<W>, frame: Frame);
    /// Takes the next victim off its list; the caller unmaps it, inserts it again, or puts it back.
    fn victim(&mut self, memmap: &Memmap<W>) -> Option<Frame>;
    /// Undoes [`victim`](Policy::victim): `frame` will be the next one again.
    fn put_back(&mut self, memmap: &Memmap<W>, frame: Frame);
    /// Pages on the lists.
    fn pages(&self) -> Pages;
    /// Pages on the list of what has proved to be in use: a refault at less than this distance counts as reuse.
    fn protected(&self) -> Pages;
}

/// The frames that faults have mapped since the policy last looked.
#[derive(Debug)]
pub struct Incoming {
    stack: FreeStack,
}

impl Incoming {
    /// Nothing yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Incoming {
        Incoming { stack: FreeStack::new() }
    }

    /// Announces a frame that is on no list. Never blocks.
    pub fn push<W: Words>(&self, memmap: &Memmap<W>, frame: Frame) {
        debug_assert_eq!(memmap.list(frame), ListId::None);
        memmap.set_list(frame, ListId::Incoming);
        self.stack.push(frame.0, memmap.link(frame));
    }

    /// Hands everything announced to `policy`, oldest first.
    pub fn drain<W: Words>(&self, memmap: &Memmap<W>, policy: &mut dyn Policy<W>) {
        // The chain comes newest first: turn it round in place.
        let mut at = self.stack.take_all();
        let mut oldest: Option<u32> = None;
        while let Some(i) = at {
            let link = memmap.link(Frame(i));
            at = FreeStack::after(link);
            link.store(oldest.map_or(0, |o| o as u64 + 1), Relaxed);
            oldest = Some(i);
        }
        while let Some(i) = oldest {
            oldest = FreeStack::after(memmap.link(Frame(i)));
            memmap.set_list(Frame(i), ListId::None);
            policy.insert(memmap, Frame(i));
        }
    }
}

/// A doubly linked list through the descriptors' link words. Zero means "no frame", so links are index + 1.
#[derive(Debug)]
struct List {
    id: ListId,
    newest: u32,
    oldest: u32,
    pages: u64,
}

impl List {
    fn new(id: ListId) -> List {
        List { id, newest: 0, oldest: 0, pages: 0 }
    }

    fn links<W: Words>(memmap: &Memmap<W>, frame: Frame) -> (u32, u32) {
        let word = memmap.link(frame).load(Relaxed);
        ((word >> 32) as u32, word as u32)
    }

    fn set_links<W: Words>(memmap: &Memmap<W>, frame: Frame, newer: u32, older: u32) {
        memmap.link(frame).store((newer as u64) << 32 | older as u64, Relaxed);
    }

    fn push<W: Words>(&mut self, memmap: &Memmap<W>, frame: Frame) {
        debug_assert_eq!(memmap.list(frame), ListId::None);
        Self::set_links(memmap, frame, 0, self.newest);
        if self.newest != 0 {
            let next = Frame(self.newest - 1);
            Self::set_links(memmap, next, frame.0 + 1, Self::links(memmap, next).1);
        } else {
            self.oldest = frame.0 + 1;
        }
        self.newest = frame.0 + 1;
        memmap.set_list(frame, self.id);
        self.pages += memmap.pages(frame).0;
    }

    fn push_oldest<W: Words>(&mut self, memmap: &Memmap<W>, frame: Frame) {
        debug_assert_eq!(memmap.list(frame), ListId::None);
        Self::set_links(memmap, frame, self.oldest, 0);
        match self.oldest {
            0 => self.newest = frame.0 + 1,
            o => Self::set_links(memmap, Frame(o - 1), Self::links(memmap, Frame(o - 1)).0, frame.0 + 1),
        }
        self.oldest = frame.0 + 1;
        memmap.set_list(frame, self.id);
        self.pages += memmap.pages(frame).0;
    }

    fn unlink<W: Words>(&mut self, memmap: &Memmap<W>, frame: Frame) {
        debug_assert_eq!(memmap.list(frame), self.id);
        let (newer, older) = Self::links(memmap, frame);
        match newer {
            0 => self.newest = older,
            n => Self::set_links(memmap, Frame(n - 1), Self::links(memmap, Frame(n - 1)).0, older),
        }
        match older {
            0 => self.oldest = newer,
            o => Self::set_links(memmap, Frame(o - 1), newer, Self::links(memmap, Frame(o - 1)).1),
        }
        Self::set_links(memmap, frame, 0, 0);
        memmap.set_list(frame, ListId::None);
        self.pages -= memmap.pages(frame).0;
    }

    fn pop<W: Words>(&mut self, memmap: &Memmap<W>) -> Option<Frame> {
        let frame = Frame(self.oldest.checked_sub(1)?);
        self.unlink(memmap, frame);
        Some(frame)
    }

    #[cfg(all(test, not(any(loom, shuttle))))]
    fn check<W: Words>(&self, memmap: &Memmap<W>) {
        let (mut at, mut newer, mut pages) = (self.newest, 0, 0);
        while at != 0 {
            let frame = Frame(at - 1);
            assert_eq!(memmap.list(frame), self.id);
            assert_eq!(Self::links(memmap, frame).0, newer);
            pages += memmap.pages(frame).0;
            newer = at;
            at = Self::links(memmap, frame).1;
        }
        assert_eq!(newer, self.oldest);
        assert_eq!(pages, self.pages);
    }
}

/// S3-FIFO (Yang et al., SOSP 2023), with standby in the place of its access counter.
///
/// Victims come from the short queue as long as it holds more than a tenth of all pages, otherwise from the
/// main queue. A frame of the main queue that was reused several times passes that many turns unprobed.
#[derive(Debug)]
pub struct S3Fifo {
    small: List,
    main: List,
}

impl S3Fifo {
    /// The short queue's share: one page in so many.
    const SHARE: u64 = 10;
    /// How many frequently used frames one search for a victim passes over: it holds a lock.
    const PASSES: u32 = 32;

    /// Empty queues.
    #[allow(clippy::new_without_default)]
    pub fn new() -> S3Fifo {
        S3Fifo { small: List::new(ListId::Small), main: List::new(ListId::Main) }
    }
}

impl<W: Words> Policy<W> for S3Fifo {
    fn name(&self) -> &'static str {
        "s3-fifo"
    }

    fn insert(&mut self, memmap: &Memmap<W>, frame: Frame) {
        match memmap.arrival(frame) {
            Arrival::New => self.small.push(memmap, frame),
            Arrival::Refault | Arrival::Reuse => self.main.push(memmap, frame),
        }
    }

    fn remove(&mut self, memmap: &Memmap<W>, frame: Frame) {
        match memmap.list(frame) {
            ListId::Small => self.small.unlink(memmap, frame),
            ListId::Main => self.main.unlink(memmap, frame),
            ListId::None => {}
            ListId::Incoming => unreachable!("drain the incoming frames before removing one"),
        }
    }

    fn victim(&mut self, memmap: &Memmap<W>) -> Option<Frame> {
        let total = self.small.pages + self.main.pages;
        if self.small.pages * Self::SHARE > total || self.main.pages == 0 {
            return self.small.pop(memmap);
        }
        for _ in 0..Self::PASSES {
            let frame = self.main.pop(memmap)?;
            let n = memmap.frequency(frame);
            if n == 0 {
                return Some(frame);
            }
            memmap.set_frequency(frame, n - 1);
            self.main.push(memmap, frame);
        }
        self.main.pop(memmap)
    }

    fn put_back(&mut self, memmap: &Memmap<W>, frame: Frame) {
        match memmap.arrival(frame) {
            Arrival::New => self.small.push_oldest(memmap, frame),
            Arrival::Refault | Arrival::Reuse => self.main.push_oldest(memmap, frame),
        }
    }

    fn pages(&self) -> Pages {
        Pages(self.small.pages + self.main.pages)
    }

    fn protected(&self) -> Pages {
        Pages(self.main.pages)
    }
}

/// First in, first out: the yardstick for better policies.
#[derive(Debug)]
pub struct Fifo {
    list: List,
}

impl Fifo {
    /// An empty queue.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Fifo {
        Fifo { list: List::new(ListId::Main) }
    }
}

impl<W: Words> Policy<W> for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn insert(&mut self, memmap: &Memmap<W>, frame: Frame) {
        self.list.push(memmap, frame);
    }

    fn remove(&mut self, memmap: &Memmap<W>, frame: Frame) {
        if memmap.list(frame) == ListId::Main {
            self.list.unlink(memmap, frame);
        }
    }

    fn victim(&mut self, memmap: &Memmap<W>) -> Option<Frame> {
        self.list.pop(memmap)
    }

    fn put_back(&mut self, memmap: &Memmap<W>, frame: Frame) {
        self.list.push_oldest(memmap, frame);
    }

    fn pages(&self) -> Pages {
        Pages(self.list.pages)
    }

    fn protected(&self) -> Pages {
        Pages(0)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "reclaim_tests.rs"]
mod tests;
