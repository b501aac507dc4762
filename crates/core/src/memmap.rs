//! The memmap of the host: one 32-byte descriptor per frame, our `struct page`.
//!
//! Host frames come in two kinds, each with a pfn range of its own. *Block frames* are 512 pages that were
//! allocated as one huge folio; while that is mapped whole, one descriptor, its head, stands for all of them (rule A8).
//! Once the mapping is [spread](Memmap::spread) over its pages each of them has a descriptor, a tail, that says what is
//! per page; references and the place on a list stay with the head. Once the folio is
//! [split](Memmap::split_frozen) its parts are folios of their own. *Small frames* are single pages. Which of the two
//! kinds a table entry means follows from its pfn and from whether its block is whole.
//!
//! ```text
//!  word   bits
//!   0     the state word: references, mappings, pins (`folio.rs`)
//!   1     63..12  vpn it is mapped at (the reverse map)     9 garbage     8 rewritten     7..0 epoch
//!   2     63..32  previous in its list      31..0 next in its list, or the staging slot while on standby
//!   3     39..0   backing: the page of a device with the same content    42..40 list    45..43 frequency   47..46 arrival
//!   3     48      the folio is split; then
//!         31..0   of the head of a split folio: parts left in staging (31..16), parts left (15..0)
//! ```
//!
//! Who may change what: word 0 says itself. Word 1 and the backing belong to whoever holds the lock of the table entry that
//! refers to the frame. Word 2 belongs to the list the frame is on, and so to the lock of the reclaim policy; while
//! the frame is on no list, to the holder of the entry. The list, frequency and arrival bits of word 3 change
//! under the lock of the policy, except that a frame on no list is put on [`ListId::Incoming`] by the holder of
//! its entry. Frames that are free belong to the free stacks.
//!
//! Orderings: everything here but the state word is Relaxed. Hand-over between threads goes through the table's locks, the
//! policy's lock, or the free stacks, each of which orders it.

use crate::addr::{BLOCK_PAGES, DevicePfn, Pages, Pfn, Vpn};
use crate::folio::{Folio, Left, MOST_PAGES, SplitBusy, Tail};
use crate::sync::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use crate::words::{FreeStack, Words};

/// Words per descriptor: 32 bytes.
pub const DESCRIPTOR_WORDS: usize = 4;

const PFN_MASK: u64 = (1 << 40) - 1;
const LIST_SHIFT: u32 = 40;
const LIST_MASK: u64 = 0x7 << LIST_SHIFT;
const FREQUENCY_SHIFT: u32 = 43;
const FREQUENCY_MASK: u64 = 0x7 << FREQUENCY_SHIFT;
const ARRIVAL_SHIFT: u32 = 46;
const ARRIVAL_MASK: u64 = 0x3 << ARRIVAL_SHIFT;

/// Word 3 of the head of a split folio: parts that are left, and above them the pages left behind in staging.
const PARTS_MASK: u64 = 0xffff;
const STAGED_SHIFT: u32 = 16;
/// Word 3: the folio of this head is split.
const SPLIT: u64 = 1 << 48;
const STAGED_MASK: u64 = 0xffff;

/// Word 1: the page has been written since it last came from a device.
const REWRITTEN: u64 = 1 << 8;
/// Word 1 of a part that nobody needs: its page still lies in the block's staging.
const GARBAGE: u64 = 1 << 9;

/// In the place of a slot: the page lies in its block frame's staging.
const IN_BLOCK: u32 = u32::MAX;

/// The pfn that no frame has.
const NO_PFN: u64 = 0;
/// The backing of a page that equals never-touched memory.
const ZERO_PFN: u64 = 1;
/// A block's pages can be counted.
const _: () = assert!(BLOCK_PAGES <= MOST_PAGES);
/// The first pfn that can be a frame.
pub const FIRST_PFN: Pfn = Pfn(BLOCK_PAGES);

/// A frame's descriptor, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame(pub u32);

/// Where a clean frame's content can be had again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Nowhere.
    None,
    /// It is all zeros, like memory never touched.
    Zero,
    /// At this page of a device, which the frame's owner owns too.
    Page(DevicePfn),
}

/// The list a frame is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListId {
    /// None.
    None,
    /// Waiting to be taken up by the policy.
    Incoming,
    /// The policy's list for newcomers.
    Small,
    /// The policy's list for pages seen to be used again.
    Main,
}

/// Why a frame came to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// First use, or so long after its eviction that it says nothing.
    New,
    /// Soon after it was evicted: it should have been kept.
    Refault,
    /// It was on standby and asked for again.
    Reuse,
}

/// The descriptors of all host frames, and the frames that are free.
#[derive(Debug)]
pub struct Memmap<W> {
    words: W,
    blocks: u32,
    small: u32,
    free_blocks: FreeStack,
    free_small: FreeStack,
    fresh_blocks: AtomicUsize,
    fresh_small: AtomicUsize,
    whole: AtomicUsize,
}

impl<W: Words> Memmap<W> {
    /// Words needed for `blocks` block frames and `small` small ones.
    pub fn words_for(blocks: u32, small: u32) -> usize {
        (blocks as usize * (1 + BLOCK_PAGES as usize) + small as usize) * DESCRIPTOR_WORDS
    }

    /// A memmap whose frames are all free. Touches nothing.
    ///
    /// # Panics
    /// When `words` is too short, or the frames' numbers do not fit into 32 bits.
    pub fn new(words: W, blocks: u32, small: u32) -> Memmap<W> {
        assert!(words.len() >= Self::words_for(blocks, small));
        assert!(Self::words_for(blocks, small) / DESCRIPTOR_WORDS < u32::MAX as usize);
        Memmap {
            words,
            blocks,
            small,
            free_blocks: FreeStack::new(),
            free_small: FreeStack::new(),
            fresh_blocks: AtomicUsize::new(0),
            fresh_small: AtomicUsize::new(0),
            whole: AtomicUsize::new(0),
        }
    }

    /// The number of block frames.
    pub fn block_frames(&self) -> u32 {
        self.blocks
    }

    /// The first pfn behind the host's.
    pub fn end(&self) -> Pfn {
        FIRST_PFN + self.blocks as u64 * BLOCK_PAGES + self.small as u64
    }

    /// True when `pfn` belongs to the host.
    pub fn contains(&self, pfn: Pfn) -> bool {
        pfn >= FIRST_PFN && pfn < self.end()
    }

    fn small_base(&self) -> Pfn {
        FIRST_PFN + self.blocks as u64 * BLOCK_PAGES
    }

    /// The descriptor of the block frame that begins at `pfn`.
    pub fn block(&self, pfn: Pfn) -> Frame {
        debug_assert!(pfn >= FIRST_PFN && pfn < self.small_base() && pfn.0.is_multiple_of(BLOCK_PAGES));
        Frame(((pfn - FIRST_PFN) / BLOCK_PAGES) as u32)
    }

    /// The descriptor of the single page `pfn`: a small frame, or a part of a split block frame.
    pub fn page(&self, pfn: Pfn) -> Frame {
        debug_assert!(self.contains(pfn));
        let small = self.small_base();
        if pfn >= small {
            Frame(self.blocks + (pfn - small) as u32)
        } else {
            Frame(self.blocks + self.small + (pfn - FIRST_PFN) as u32)
        }
    }

    /// The (first) pfn of `frame`.
    pub fn pfn(&self, frame: Frame) -> Pfn {
        if frame.0 < self.blocks {
            FIRST_PFN + frame.0 as u64 * BLOCK_PAGES
        } else if frame.0 < self.blocks + self.small {
            self.small_base() + (frame.0 - self.blocks) as u64
        } else {
            FIRST_PFN + (frame.0 - self.blocks - self.small) as u64
        }
    }

    /// The block frame of which the single page `pfn` is a part, if it is one.
    pub fn block_of(&self, pfn: Pfn) -> Option<Frame> {
        (pfn < self.small_base()).then(|| Frame(((pfn - FIRST_PFN) / BLOCK_PAGES) as u32))
    }

    /// True for a whole block.
    pub fn is_block(&self, frame: Frame) -> bool {
        frame.0 < self.blocks
    }

    /// Pages the frame consists of.
    pub fn pages(&self, frame: Frame) -> Pages {
        Pages(if self.is_block(frame) { BLOCK_PAGES } else { 1 })
    }

    #[inline]
    fn word(&self, frame: Frame, i: usize) -> &AtomicU64 {
        self.words.at(frame.0 as usize * DESCRIPTOR_WORDS + i)
    }

    /// Takes a free small frame, with one reference for its owner. Its other words are whatever the last owner left.
    pub fn take_small(&self) -> Option<Frame> {
        self.take(&self.free_small, &self.fresh_small, self.small as usize, self.blocks)
            .inspect(|frame| self.folio(*frame).begin())
    }

    /// Takes a free block frame, with one reference for its owner.
    pub fn take_block(&self) -> Option<Frame> {
        self.take(&self.free_blocks, &self.fresh_blocks, self.blocks as usize, 0)
            .inspect(|frame| self.folio(*frame).begin())
    }

    /// The state word of `frame`: see [`Folio`] for who may do what with it.
    pub fn folio(&self, frame: Frame) -> Folio<'_> {
        Folio(self.word(frame, 0))
    }

    fn tail(&self, frame: Frame) -> Tail<'_> {
        Tail(self.word(frame, 0))
    }

    /// The frame whose state word counts for `frame`, which is in use: its block's while that is one folio, else its own.
    /// Stays the same while an entry that maps the page is locked.
    pub fn head(&self, frame: Frame) -> Frame {
        match self.head_of(frame) {
            // H7: a tail has no references, a folio of its own has its owner's.
            Some(head) if self.folio(frame).counts().refcount == 0 => head,
            _ => frame,
        }
    }

    /// One MMU more maps the page of `frame`, or the whole block.
    pub fn map(&self, frame: Frame) {
        match self.head(frame) {
            head if head == frame => {
                self.folio(frame).map_whole();
                if self.is_block(frame) {
                    self.whole.fetch_add(1, Relaxed);
                }
            }
            head => self.folio(head).map_part(self.tail(frame)),
        }
    }

    /// One MMU less maps the page of `frame`, or the whole block. Returns the folio it is of, and what is left of that.
    pub fn unmap(&self, frame: Frame) -> (Frame, Left) {
        match self.head(frame) {
            head if head == frame => {
                if self.is_block(frame) {
                    self.whole.fetch_sub(1, Relaxed);
                }
                (frame, self.folio(frame).unmap_whole(self.pages(frame).0))
            }
            head => (head, self.folio(head).unmap_part(self.tail(frame), BLOCK_PAGES)),
        }
    }

    fn take(&self, stack: &FreeStack, fresh: &AtomicUsize, limit: usize, base: u32) -> Option<Frame> {
        if let Some(i) = stack.pop(|i| self.word(Frame(i), 2)) {
            return Some(Frame(i));
        }
        let mut at = fresh.load(Relaxed);
        while at < limit {
            match fresh.compare_exchange_weak(at, at + 1, Relaxed, Relaxed) {
                Ok(_) => return Some(Frame(base + at as u32)),
                Err(now) => at = now,
            }
        }
        None
    }

    /// Gives the owner's reference, or a scanner's, to a whole block frame or a small frame back. With the last one the
    /// frame is free; it is on no list then.
    pub fn give_back(&self, frame: Frame) {
        if !self.folio(frame).put() {
            return;
        }
        debug_assert_eq!(self.list(frame), ListId::None);
        if self.is_block(frame) {
            self.free_blocks.push(frame.0, self.word(frame, 2));
        } else {
            debug_assert!(frame.0 < self.blocks + self.small, "parts of a block are given back by part_gone");
            self.free_small.push(frame.0, self.word(frame, 2));
        }
    }

    /// The split block frame of which `frame` is a part, if it is one.
    pub fn head_of(&self, frame: Frame) -> Option<Frame> {
        let part = frame.0.checked_sub(self.blocks + self.small)?;
        Some(Frame(part / BLOCK_PAGES as u32))
    }

    /// Says that the page of a part that nobody needs still lies in the block's staging.
    pub fn set_garbage(&self, part: Frame) {
        let word = self.word(part, 1);
        word.store(word.load(Relaxed) | GARBAGE, Relaxed);
    }

    /// The last reference to a part of a split folio has gone. When it was the last part, returns how many pages still
    /// lie in the block's staging, as garbage; the block frame is then the caller's to clear and to give back.
    pub fn part_gone(&self, part: Frame) -> Option<Pages> {
        let head = self.head_of(part).expect("only parts of a split block go one by one");
        let garbage = self.word(part, 1).load(Relaxed) & GARBAGE != 0;
        let add: u64 = if garbage { 1 << STAGED_SHIFT } else { 0 };
        // Two parts go at most once each, so neither half can overflow or borrow.
        // AcqRel: the thread that ends the last part has seen what the others did to theirs.
        let before = self.word(head, 3).fetch_add(add.wrapping_sub(1), crate::sync::Ordering::AcqRel);
        debug_assert!(before & PARTS_MASK > 0, "a part of a block frame went twice");
        (before & PARTS_MASK == 1).then_some(Pages((before >> STAGED_SHIFT & STAGED_MASK) + garbage as u64))
    }

    /// How many parts are left of a block frame whose folio was split; `None` if it is in one piece, or free.
    pub fn parts_left(&self, head: Frame) -> Option<u64> {
        let word = self.word(head, 3).load(Relaxed);
        (word & SPLIT != 0).then_some(word & PARTS_MASK)
    }

    /// Makes `frame`, just taken, hold what `other` holds: everything but the state word and the place on a list.
    pub fn take_over(&self, frame: Frame, other: Frame) {
        self.reset(frame);
        self.place(frame, self.vpn(other), self.epoch(other));
        if self.is_rewritten(other) {
            self.set_rewritten(frame);
        }
        self.set_backing(frame, self.backing(other));
        self.set_arrival(frame, self.arrival(other));
        self.set_frequency(frame, self.frequency(other));
    }

    /// Gives each page of a block frame a descriptor of its own, that of a tail. The caller owns the whole block.
    fn make_tails(&self, head: Frame) {
        let backing = self.backing(head);
        let vpn = self.vpn(head);
        let epoch = self.epoch(head);
        for i in 0..BLOCK_PAGES {
            let part = self.page(self.pfn(head) + i);
            self.reset(part);
            self.tail(part).begin();
            self.place(part, vpn + i, epoch);
            self.set_backing(
                part,
                match backing {
                    Backing::Page(pfn) => Backing::Page(pfn + i),
                    other => other,
                },
            );
        }
    }

    /// Splits the mapping of a whole block (rule H6: cannot fail): from now on its pages are mapped one by one. The folio
    /// stays in one piece. The caller owns the whole block.
    pub fn spread(&self, head: Frame) {
        debug_assert!(self.is_block(head));
        self.make_tails(head);
        self.folio(head).split_mapping(BLOCK_PAGES, |i| self.tail(self.page(self.pfn(head) + i)));
        self.whole.fetch_sub(1, Relaxed);
        self.set_backing(head, Backing::None);
    }

    /// The reverse of [`spread`](Memmap::spread), for a folio all of whose pages are mapped and hold the only copy of their
    /// data. The caller owns the whole block.
    pub fn gather(&self, head: Frame) {
        self.folio(head).join_mapping(BLOCK_PAGES, |i| self.tail(self.page(self.pfn(head) + i)));
        self.folio(head).unqueue();
        self.whole.fetch_add(1, Relaxed);
    }

    /// How many blocks are mapped by one entry, each MMU that does so counted.
    pub fn whole_mappings(&self) -> u64 {
        self.whole.load(Relaxed) as u64
    }

    /// Splits a [frozen](Folio::freeze) folio, which is on no list: each page is a folio of its own, with an owner's
    /// reference, also where nobody maps it.
    pub fn split_frozen(&self, head: Frame) {
        debug_assert_eq!(self.list(head), ListId::None);
        self.change(head, PFN_MASK | SPLIT, BLOCK_PAGES | SPLIT);
        for i in 0..BLOCK_PAGES {
            self.folio(self.page(self.pfn(head) + i)).begin_split();
        }
        self.folio(head).thaw();
    }

    /// Splits a block frame that nobody maps and nobody relies on. The caller owns the whole block, and has taken the head
    /// off its list. Scanners that look at it just now are waited for: they never wait themselves.
    pub fn split_block(&self, head: Frame) {
        debug_assert_eq!(self.folio(head).counts().mappings, 0);
        self.make_tails(head);
        self.split_idle(head);
    }

    /// The same for one that is mapped whole and that nobody relies on: its pages are mapped one by one then.
    pub fn split_mapped_block(&self, head: Frame) {
        self.spread(head);
        self.split_idle(head);
    }

    fn split_idle(&self, head: Frame) {
        while let Err(busy) = self.folio(head).freeze() {
            debug_assert!(!matches!(busy, SplitBusy::Pinned(_)), "nobody relies on it");
            crate::sync::spin_hint();
        }
        self.split_frozen(head);
    }

    /// How many users rely on the folio of `frame` staying where it is (rule H5).
    pub fn pins(&self, frame: Frame) -> u64 {
        self.folio(self.head(frame)).pins()
    }

    /// The page this frame holds the data of.
    pub fn vpn(&self, frame: Frame) -> Vpn {
        Vpn(self.word(frame, 1).load(Relaxed) >> 12)
    }

    /// Which life of the process (rule G12) the frame's write protection dates from.
    pub fn epoch(&self, frame: Frame) -> u8 {
        self.word(frame, 1).load(Relaxed) as u8
    }

    /// Says which page the frame holds the data of.
    pub fn place(&self, frame: Frame, vpn: Vpn, epoch: u8) {
        let rewritten = self.word(frame, 1).load(Relaxed) & REWRITTEN;
        self.word(frame, 1).store(vpn.0 << 12 | rewritten | epoch as u64, Relaxed);
    }

    /// Whether the page has been written since it last came from a device. Of a page that never was on one, false.
    pub fn is_rewritten(&self, frame: Frame) -> bool {
        self.word(frame, 1).load(Relaxed) & REWRITTEN != 0
    }

    /// Says that a page that came from a device has been written.
    pub fn set_rewritten(&self, frame: Frame) {
        let word = self.word(frame, 1);
        word.store(word.load(Relaxed) | REWRITTEN, Relaxed);
    }

    /// Where else the frame's content can be had.
    pub fn backing(&self, frame: Frame) -> Backing {
        match self.word(frame, 3).load(Relaxed) & PFN_MASK {
            NO_PFN => Backing::None,
            ZERO_PFN => Backing::Zero,
            pfn => match DevicePfn::decode(Pfn(pfn)) {
                Some(page) => Backing::Page(page),
                None => panic!("{frame:?} has the copy {pfn:#x}, and there are no devices: memory is corrupt"),
            },
        }
    }

    /// Says where else the frame's content can be had.
    pub fn set_backing(&self, frame: Frame, backing: Backing) {
        let bits = match backing {
            Backing::None => NO_PFN,
            Backing::Zero => ZERO_PFN,
            Backing::Page(page) => page.pfn().0,
        };
        self.change(frame, PFN_MASK, bits);
    }

    /// The staging slot of a single page on standby; none for the part of a block that lies in the block's own
    /// staging.
    pub fn slot(&self, frame: Frame) -> Option<u32> {
        let slot = self.word(frame, 2).load(Relaxed) as u32;
        (slot != IN_BLOCK).then_some(slot)
    }

    /// Says in which staging slot a single page on standby is.
    pub fn set_slot(&self, frame: Frame, slot: Option<u32>) {
        debug_assert_eq!(self.list(frame), ListId::None);
        self.word(frame, 2).store(slot.unwrap_or(IN_BLOCK) as u64, Relaxed);
    }

    /// The list the frame is on.
    pub fn list(&self, frame: Frame) -> ListId {
        match (self.word(frame, 3).load(Relaxed) & LIST_MASK) >> LIST_SHIFT {
            0 => ListId::None,
            1 => ListId::Incoming,
            2 => ListId::Small,
            _ => ListId::Main,
        }
    }

    pub(crate) fn set_list(&self, frame: Frame, list: ListId) {
        self.change(frame, LIST_MASK, (list as u64) << LIST_SHIFT);
    }

    /// How often the frame was asked for again, 0 to 7.
    pub fn frequency(&self, frame: Frame) -> u8 {
        ((self.word(frame, 3).load(Relaxed) & FREQUENCY_MASK) >> FREQUENCY_SHIFT) as u8
    }

    /// Sets how often the frame was asked for again; 7 means often.
    pub fn set_frequency(&self, frame: Frame, n: u8) {
        self.change(frame, FREQUENCY_MASK, (n.min(7) as u64) << FREQUENCY_SHIFT);
    }

    /// Why the frame came to be mapped, as [`set_arrival`](Memmap::set_arrival) said.
    pub fn arrival(&self, frame: Frame) -> Arrival {
        match (self.word(frame, 3).load(Relaxed) & ARRIVAL_MASK) >> ARRIVAL_SHIFT {
            0 => Arrival::New,
            1 => Arrival::Refault,
            _ => Arrival::Reuse,
        }
    }

    /// Notes why the frame came to be mapped.
    pub fn set_arrival(&self, frame: Frame, arrival: Arrival) {
        self.change(frame, ARRIVAL_MASK, (arrival as u64) << ARRIVAL_SHIFT);
    }

    /// Makes the words of a frame that is on no list, apart from the state word, those of one about which nothing is known.
    pub fn reset(&self, frame: Frame) {
        for i in 1..DESCRIPTOR_WORDS {
            self.word(frame, i).store(0, Relaxed);
        }
    }

    fn change(&self, frame: Frame, mask: u64, bits: u64) {
        debug_assert_eq!(bits & !mask, 0);
        let word = self.word(frame, 3);
        let mut seen = word.load(Relaxed);
        // A loop, because the holder of the entry and the policy change different bits of the word.
        while let Err(now) = word.compare_exchange_weak(seen, seen & !mask | bits, Relaxed, Relaxed) {
            seen = now;
        }
    }

    pub(crate) fn link(&self, frame: Frame) -> &AtomicU64 {
        self.word(frame, 2)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;

    type Map = Memmap<alloc::boxed::Box<[AtomicU64]>>;

    fn memmap(blocks: u32, small: u32) -> Map {
        Memmap::new(zeroed(Map::words_for(blocks, small)), blocks, small)
    }

    /// A copy on a device; zeros where there are none.
    fn copy(pfn: u64) -> Backing {
        DevicePfn::decode(Pfn(pfn)).map_or(Backing::Zero, Backing::Page)
    }

    #[test]
    fn a_whole_block_takes_one_descriptor_of_32_bytes() {
        // A8: nothing but the head is touched while the block is whole.
        let m = memmap(4, 0);
        let f = m.take_block().unwrap();
        m.reset(f);
        m.place(f, Vpn(512), 1);
        m.set_backing(f, copy(9999));
        let touched = m.words.iter().filter(|w| w.load(Relaxed) != 0).count();
        assert!(touched <= DESCRIPTOR_WORDS);
        assert_eq!(DESCRIPTOR_WORDS * 8, 32);
    }

    #[test]
    fn numbers_and_frames_are_one_to_one() {
        let m = memmap(2, 10);
        for f in [m.block(FIRST_PFN), m.block(FIRST_PFN + 512)] {
            assert_eq!(m.block(m.pfn(f)), f);
            assert!(m.is_block(f));
        }
        for pfn in FIRST_PFN.0..m.end().0 {
            let f = m.page(Pfn(pfn));
            assert_eq!(m.pfn(f), Pfn(pfn));
            assert!(!m.is_block(f));
        }
        assert!(!m.contains(Pfn(0)) && !m.contains(Pfn(1)) && !m.contains(m.end()));
    }

    #[test]
    fn a_split_block_is_free_when_its_last_part_is() {
        let m = memmap(1, 0);
        let f = m.take_block().unwrap();
        m.reset(f);
        m.place(f, Vpn(1024), 3);
        m.set_backing(f, copy(5120));
        m.split_block(f);
        assert!(m.take_block().is_none());
        for i in 0..512 {
            let part = m.page(m.pfn(f) + i);
            assert_eq!(m.vpn(part), Vpn(1024 + i));
            assert_eq!(m.backing(part), copy(5120 + i));
            assert_eq!(m.epoch(part), 3);
            assert_eq!((m.head_of(part), m.head(part)), (Some(f), part));
            if i % 2 == 0 {
                m.set_garbage(part);
            }
            assert!(m.folio(part).put());
            assert_eq!(m.part_gone(part), (i == 511).then_some(Pages(256)));
        }
        m.reset(f);
        m.give_back(f);
        assert_eq!(m.take_block(), Some(f));
    }

    #[test]
    fn fields_do_not_disturb_each_other() {
        let m = memmap(0, 2);
        let f = m.take_small().unwrap();
        m.reset(f);
        m.set_backing(f, copy((1 << 40) - 1));
        m.set_list(f, ListId::Main);
        m.set_frequency(f, 9);
        m.set_arrival(f, Arrival::Reuse);
        assert_eq!(m.backing(f), copy((1 << 40) - 1));
        assert_eq!((m.list(f), m.frequency(f), m.arrival(f)), (ListId::Main, 7, Arrival::Reuse));
        m.set_backing(f, Backing::Zero);
        assert_eq!((m.backing(f), m.list(f)), (Backing::Zero, ListId::Main));
        m.set_list(f, ListId::None);
        m.give_back(f);
        assert_eq!(m.take_small(), Some(f));
        assert!(m.take_small().is_some());
        assert_eq!(m.take_small(), None);
    }
}
