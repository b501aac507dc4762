//! The memmap of a device: a descriptor for each of its pages that is in use (rules Z6, A1 and A8).
//!
//! A descriptor is two words: the state word of a folio (`folio.rs`), and the page of the program whose data it holds (the
//! reverse map). A block that is in use as one folio has a single descriptor, its head; its pages get descriptors of their
//! own when they go separate ways. Heads and single pages are two parts of one array, so that a device full of huge folios
//! takes up 16 bytes for each 2 MiB:
//!
//! ```text
//!  | head of block 0, 1, 2 ...  |  page 0, 1, 2, 3 ...                                  |
//!  +-- a leaf of 4 KiB: 512 MiB-+-- a leaf of 4 KiB: 1 MiB -+-- not populated: not used -
//! ```
//!
//! Leaves are populated when the first page that they describe is taken ([`vmemmap`](crate::vmemmap)). That a block can be
//! split later is promised when it is taken as one, so that splitting never fails.
//!
//! An idle page rests at no reference; one that is in use has its owner's. `freed` belongs to whoever gave the last one back.
//!
//! Descriptors are taken, split and given back under the lock of the device's allocator. The reverse map of a page in use is
//! written by whoever has its table entry locked; whoever reads it without looks again under that lock (H12).

use crate::addr::{BLOCK_PAGES, Order, Pages, Pfn, Vpn};
use crate::altmap::Altmap;
use crate::folio::Folio;
use crate::sync::{AtomicU64, Ordering::Relaxed};
use crate::vmemmap::{Host, Leaf, Place, Policy, PopulateError, Sizes, Vmemmap};
use crate::words::Words;
use core::fmt;
use core::ops::Range;

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = 16;
const WORDS: u64 = DESCRIPTOR_BYTES / 8;
const IN_BLOCK: u64 = 1;
const VPN_SHIFT: u32 = 12;

/// A device's own memory, as far as the CPU can address it: for its descriptors.
pub trait DeviceWords: Send + Sync {
    /// Word `i` of the page `pfn`, which lies in the device's altmap.
    fn word(&self, pfn: Pfn, i: usize) -> &AtomicU64;
}

/// The descriptors of one device.
pub struct DeviceMap<W, D> {
    table: Vmemmap<W>,
    host: W,
    own: Option<(Altmap, D)>,
    sizes: Sizes,
    pages: u64,
    heads: u64,
    host_bytes: u64,
}

/// A folio of a device that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// Its first page, counted from the start of the device.
    pub page: u64,
    /// How large it is.
    pub order: Order,
    /// The page of the program whose data it holds, or the first of them.
    pub vpn: Vpn,
}

/// Counts what the host gives: its memory is there as soon as it is touched.
struct Lazy<'a>(&'a mut u64);

impl Host for Lazy<'_> {
    fn take(&mut self, _: u64, bytes: u64) -> bool {
        *self.0 += bytes;
        true
    }

    fn give_back(&mut self, _: u64, bytes: u64) {
        *self.0 -= bytes;
    }

    fn has_huge(&mut self) -> bool {
        false
    }
}

/// Bytes of the array for `pages` pages; and where its second part begins.
fn layout(pages: u64, page_bytes: u64) -> (u64, u64) {
    let heads = (pages.div_ceil(BLOCK_PAGES) * DESCRIPTOR_BYTES).next_multiple_of(page_bytes);
    (heads + pages * DESCRIPTOR_BYTES, heads)
}

/// Pages that an altmap needs for the descriptors of `pages` pages, its own not counted.
pub fn altmap_pages(pages: Pages, page_bytes: u64) -> Pages {
    Pages(layout(pages.0, page_bytes).0.div_ceil(page_bytes))
}

impl<W: Words, D: DeviceWords> DeviceMap<W, D> {
    /// Words of host memory that the descriptors of `pages` pages can take up, and words of the upper tables.
    pub fn words_for(pages: Pages, page_bytes: u64) -> [usize; 2] {
        let (bytes, _) = layout(pages.0, page_bytes);
        let upper = Vmemmap::<W>::words_for(Sizes::new(page_bytes, DESCRIPTOR_BYTES), bytes);
        [bytes.next_multiple_of(page_bytes) as usize / 8, upper]
    }

    /// A memmap for `pages` pages of `page_bytes` bytes, in `host`, or in the device itself where that has an altmap.
    ///
    /// # Panics
    /// When there are fewer words than [`words_for`](DeviceMap::words_for) says.
    pub fn new(pages: Pages, page_bytes: u64, [host, upper]: [W; 2], own: Option<(Altmap, D)>) -> DeviceMap<W, D> {
        let (bytes, heads) = layout(pages.0, page_bytes);
        let sizes = Sizes::new(page_bytes, DESCRIPTOR_BYTES);
        assert!(own.is_some() || host.len() as u64 * 8 >= bytes);
        let table = Vmemmap::new(upper, sizes, Policy::SPACE, bytes);
        DeviceMap { table, host, own, sizes, pages: pages.0, heads, host_bytes: 0 }
    }

    fn head_at(block: u64) -> u64 {
        block * DESCRIPTOR_BYTES
    }

    fn page_at(&self, page: u64) -> u64 {
        self.heads + page * DESCRIPTOR_BYTES
    }

    fn word_in(&self, leaf: Leaf, at: u64, i: u64) -> &AtomicU64 {
        match leaf.place {
            Place::Host => self.host.at((at / 8 + i) as usize),
            Place::Device(pfn) => {
                let (_, own) = self.own.as_ref().expect("leaves in the device come from its altmap");
                let offset = at - leaf.start;
                own.word(pfn + offset / self.sizes.base, (offset % self.sizes.base / 8 + i) as usize)
            }
        }
    }

    fn word(&self, at: u64, i: u64) -> Option<&AtomicU64> {
        Some(self.word_in(self.table.find(at)?, at, i))
    }

    fn folio_at(&self, at: u64) -> Option<Folio<'_>> {
        self.word(at, 0).map(Folio)
    }

    /// The descriptor of the folio that `page` is of: where it is, and whether it is a block's.
    fn at(&self, page: u64) -> (u64, bool) {
        let head = Self::head_at(page / BLOCK_PAGES);
        match self.word(head, 1) {
            Some(word) if word.load(Relaxed) & IN_BLOCK != 0 => (head, true),
            _ => (self.page_at(page), false),
        }
    }

    fn pages_of(&self, block: u64) -> Range<u64> {
        self.page_at(block * BLOCK_PAGES)..self.page_at((block + 1) * BLOCK_PAGES)
    }

    fn leaves(&self, range: &Range<u64>) -> u64 {
        range.end.div_ceil(self.sizes.base) - range.start / self.sizes.base
    }

    fn populate(&mut self, range: Range<u64>, promised: bool) -> Result<(), PopulateError> {
        let DeviceMap { table, own, host_bytes, .. } = self;
        table.populate(range, own.as_mut().map(|(altmap, _)| altmap), promised, false, &mut Lazy(host_bytes))
    }

    /// Takes descriptors for `2^order` pages from `page` on, which nobody uses, for the data of `vpn`.
    ///
    /// # Errors
    /// When there is no memory for them. Nothing has changed.
    pub fn take(&mut self, page: u64, order: Order, vpn: Vpn) -> Result<(), PopulateError> {
        let pages = order.pages().0;
        assert!(page + pages <= self.pages);
        if order == Order::BLOCK {
            let block = page / BLOCK_PAGES;
            let head = Self::head_at(block);
            self.populate(head..head + DESCRIPTOR_BYTES, false)?;
            let promise = self.leaves(&self.pages_of(block));
            if let Some((altmap, _)) = &mut self.own {
                altmap.promise(promise).map_err(PopulateError::Altmap)?;
            }
            self.begin(head, vpn, IN_BLOCK);
        } else {
            let range = self.page_at(page)..self.page_at(page + pages);
            self.populate(range, false)?;
            for i in 0..pages {
                self.begin(self.page_at(page + i), vpn + i, 0);
            }
        }
        Ok(())
    }

    fn begin(&self, at: u64, vpn: Vpn, flags: u64) {
        let leaf = self.table.find(at).expect("it has just been populated");
        self.word_in(leaf, at, 1).store(vpn.0 << VPN_SHIFT | flags, Relaxed);
        Folio(self.word_in(leaf, at, 0)).begin();
    }

    /// Gives the pages of a block that is one folio descriptors of their own. Its owner's reference becomes one of each page.
    fn split(&mut self, block: u64) {
        let head = Self::head_at(block);
        let word = self.word(head, 1).expect("the block is in use");
        let vpn = Vpn(word.load(Relaxed) >> VPN_SHIFT);
        let range = self.pages_of(block);
        let promise = self.leaves(&range);
        let before = self.own.as_ref().map(|(altmap, _)| altmap.taken().0);
        let done = self.populate(range, true);
        assert!(done.is_ok(), "a promise was broken: {done:?}");
        if let (Some((altmap, _)), Some(before)) = (&mut self.own, before) {
            // What was populated already takes up nothing of what was promised.
            let used = altmap.taken().0 - before;
            altmap.forgo(promise - used);
        }
        for i in 0..BLOCK_PAGES {
            self.begin(self.page_at(block * BLOCK_PAGES + i), vpn + i, 0);
        }
        let last = self.folio_at(head).expect("the block is in use").put();
        debug_assert!(last, "somebody refers to a block of a device that is split");
        self.word(head, 1).expect("as above").store(0, Relaxed);
    }

    /// Gives the owner's reference to `2^order` pages from `page` on back. True if it was the last: they are free then.
    /// Pages of a block may go one by one.
    pub fn put(&mut self, page: u64, order: Order) -> bool {
        let (at, whole) = self.at(page);
        if whole && order != Order::BLOCK {
            self.split(page / BLOCK_PAGES);
            return self.put(page, order);
        }
        if whole {
            let promise = self.leaves(&self.pages_of(page / BLOCK_PAGES));
            if let Some((altmap, _)) = &mut self.own {
                altmap.forgo(promise);
            }
            let last = self.folio_at(at).expect("it is in use").put();
            if last {
                self.word(at, 1).expect("it is in use").store(0, Relaxed);
            }
            return last;
        }
        (0..order.pages().0).fold(true, |all, i| {
            let folio = self.folio_at(self.page_at(page + i)).expect("it is in use");
            folio.put() && all
        })
    }

    /// The page of the program whose data `page`, which is in use, holds.
    pub fn vpn(&self, page: u64) -> Option<Vpn> {
        let (at, whole) = self.at(page);
        let folio = self.folio_at(at)?;
        let vpn = Vpn(self.word(at, 1)?.load(Relaxed) >> VPN_SHIFT);
        (folio.counts().refcount > 0).then(|| if whole { vpn + page % BLOCK_PAGES } else { vpn })
    }

    /// The data that `2^order` pages from `page` on hold are those of `vpn` from now on. Their entries are locked.
    pub fn place(&mut self, page: u64, order: Order, vpn: Vpn) {
        let (at, whole) = self.at(page);
        if whole && order != Order::BLOCK {
            self.split(page / BLOCK_PAGES);
            return self.place(page, order, vpn);
        }
        if whole {
            return self.word(at, 1).expect("it is in use").store(vpn.0 << VPN_SHIFT | IN_BLOCK, Relaxed);
        }
        for i in 0..order.pages().0 {
            let word = self.word(self.page_at(page + i), 1).expect("it is in use");
            word.store((vpn.0 + i) << VPN_SHIFT, Relaxed);
        }
    }

    /// The first folio in use of `pages`, or that reaches into them. Leaves that are not there take next to no time.
    pub fn next_in_use(&self, pages: Range<u64>) -> Option<InUse> {
        let mut page = pages.start;
        while page < pages.end {
            let block = page / BLOCK_PAGES;
            let (at, whole) = self.at(page);
            if whole {
                let vpn = Vpn(self.word(at, 1)?.load(Relaxed) >> VPN_SHIFT);
                return Some(InUse { page: block * BLOCK_PAGES, order: Order::BLOCK, vpn });
            }
            let Some(leaf) = self.table.find(at) else {
                page = self.skip(page, at);
                continue;
            };
            let end = (leaf.start + leaf.bytes).min(self.pages_of(block).end).min(self.page_at(pages.end));
            for at in (at..end).step_by(DESCRIPTOR_BYTES as usize) {
                if Folio(self.word_in(leaf, at, 0)).counts().refcount > 0 {
                    let vpn = Vpn(self.word_in(leaf, at, 1).load(Relaxed) >> VPN_SHIFT);
                    return Some(InUse { page: (at - self.heads) / DESCRIPTOR_BYTES, order: Order::BASE, vpn });
                }
            }
            page = (end - self.heads) / DESCRIPTOR_BYTES;
        }
        None
    }

    /// Where to go on from `page`, of which there is no leaf.
    fn skip(&self, page: u64, at: u64) -> u64 {
        let head = Self::head_at(page / BLOCK_PAGES);
        let leaf_end = (at / self.sizes.base + 1) * self.sizes.base;
        let next = (leaf_end - self.heads).div_ceil(DESCRIPTOR_BYTES).max(page + 1);
        if self.table.find(head).is_some() {
            // One of the blocks that follow may be in one piece.
            return next.min((page / BLOCK_PAGES + 1) * BLOCK_PAGES);
        }
        next
    }

    /// Bytes of descriptors in host memory, and in the device.
    pub fn bytes(&self) -> [u64; 2] {
        let own = self.own.as_ref().map_or(0, |(altmap, _)| altmap.taken().0 * self.sizes.base);
        [self.host_bytes, own]
    }
}

impl<W, D> fmt::Debug for DeviceMap<W, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMap").field("pages", &self.pages).field("host_bytes", &self.host_bytes).finish()
    }
}

const _: () = assert!(WORDS == 2);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    type Map = DeviceMap<Box<[AtomicU64]>, OwnWords>;

    /// Memory of a device, for its altmap: pages from `base` on.
    struct OwnWords(Pfn, Vec<Box<[AtomicU64]>>);

    impl DeviceWords for OwnWords {
        fn word(&self, pfn: Pfn, i: usize) -> &AtomicU64 {
            &self.1[(pfn - self.0) as usize][i]
        }
    }

    const BASE: Pfn = Pfn(4096);

    fn map(pages: u64, altmap: u64) -> Map {
        let words = Map::words_for(Pages(pages), 4096).map(zeroed);
        let own = (altmap > 0).then(|| {
            let words = OwnWords(BASE, (0..altmap).map(|_| zeroed(512)).collect());
            (Altmap::new(BASE, Pages(altmap), Pages(0), Pages(altmap)).unwrap(), words)
        });
        Map::new(Pages(pages), 4096, words, own)
    }

    #[test]
    fn a8_a_whole_block_takes_one_descriptor() {
        let mut m = map(512 * 512, 0);
        for block in 0..256 {
            m.take(block * 512, Order::BLOCK, Vpn(block * 512)).unwrap();
        }
        // 512 MiB of device memory, described by one page.
        assert_eq!(m.bytes(), [4096, 0]);
        let touched = m.host.iter().filter(|w| w.load(Relaxed) != 0).count();
        assert!(touched <= 512);
        assert_eq!(m.next_in_use(0..m.pages), Some(InUse { page: 0, order: Order::BLOCK, vpn: Vpn(0) }));
        assert_eq!(m.next_in_use(256 * 512..m.pages), None);
        // Tails only after a split.
        assert!(m.put(3, Order::BASE));
        assert_eq!(m.bytes(), [3 * 4096, 0]);
        assert_eq!(m.next_in_use(3..m.pages), Some(InUse { page: 4, order: Order::BASE, vpn: Vpn(4) }));
        assert_eq!((m.vpn(3), m.vpn(511), m.vpn(512)), (None, Some(Vpn(511)), Some(Vpn(512))));
    }

    #[test]
    fn a4_leaves_come_from_the_device_alone() {
        let need = altmap_pages(Pages(2048), 4096).0;
        let mut m = map(2048, need);
        for block in 0..3 {
            m.take(block * 512, Order::BLOCK, Vpn(block * 512)).unwrap();
        }
        for page in 1536..2048 {
            m.take(page, Order::BASE, Vpn(page)).unwrap();
        }
        assert!(m.put(512, Order::BASE));
        assert_eq!(m.bytes(), [0, 4096 * (1 + 2 + 2)]);
        assert!(m.host.iter().all(|w| w.load(Relaxed) == 0));
    }

    #[test]
    fn a3_what_cannot_be_split_later_is_not_taken() {
        // One leaf of heads, and two leaves for the pages of one block.
        let mut m = map(2048, 3);
        m.take(0, Order::BLOCK, Vpn(0)).unwrap();
        let full = |e| matches!(e, Err(PopulateError::Altmap(_)));
        assert!(full(m.take(512, Order::BLOCK, Vpn(512))));
        assert!(full(m.take(600, Order::BASE, Vpn(600))));
        assert!(m.put(9, Order::BASE), "and what was promised is kept");
        assert_eq!(m.bytes(), [0, 3 * 4096]);
        assert_eq!(m.next_in_use(512..m.pages), None);
    }

    proptest! {
        /// Against a map from pages to the data they hold.
        #[test]
        fn agrees_with_a_map_of_pages(
            blocks in 1u64..6, altmap in prop_oneof![Just(0u64), 4u64..30],
            ops in proptest::collection::vec((0u8..4, any::<u64>(), any::<bool>(), 0u64..1 << 30), 1..120),
        ) {
            let pages = blocks * 512 + 100;
            let mut m = map(pages, altmap);
            let mut want: BTreeMap<u64, u64> = BTreeMap::new();
            let mut fits: Vec<u64> = Vec::new();
            for (op, at, whole, vpn) in ops {
                let page = at % pages;
                let (page, order) = if whole { (page % (blocks * 512) / 512 * 512, Order::BLOCK) } else { (page, Order::BASE) };
                let range = page..page + order.pages().0;
                let used = range.clone().filter(|p| want.contains_key(p)).count() as u64;
                let in_one_piece = m.at(page).1;
                match op {
                    0 | 1 if used == 0 => {
                        if m.take(page, order, Vpn(vpn)).is_ok() {
                            want.extend(range.clone().map(|p| (p, vpn + p - page)));
                            fits.push(page);
                        } else {
                            prop_assert!(altmap > 0);
                        }
                    }
                    2 if used == order.pages().0 => {
                        if order == Order::BLOCK && !in_one_piece {
                            for p in range.clone() {
                                prop_assert!(m.put(p, Order::BASE));
                            }
                        } else {
                            prop_assert!(m.put(page, order));
                        }
                        want.retain(|p, _| !range.contains(p));
                    }
                    3 if used == order.pages().0 => {
                        m.place(page, order, Vpn(vpn));
                        want.extend(range.clone().map(|p| (p, vpn + p - page)));
                    }
                    _ => {}
                }
                let mut found = BTreeMap::new();
                let mut from = 0;
                while let Some(used) = m.next_in_use(from..pages) {
                    prop_assert!(used.page >= from);
                    for i in 0..used.order.pages().0 {
                        found.insert(used.page + i, used.vpn.0 + i);
                    }
                    from = used.page + used.order.pages().0;
                }
                prop_assert_eq!(&found, &want);
                for page in [0, 511, 512, pages - 1] {
                    prop_assert_eq!(m.vpn(page).map(|v| v.0), want.get(&page).copied());
                }
                prop_assert!(altmap == 0 || m.bytes()[0] == 0);
            }
        }
    }
}
