//! `compressed`: pages in RAM, in less of it than they take up when they are used.
//!
//! The default device. A page is encoded by whatever is cheapest and saves memory ([`codec`]), lies in a slot of
//! about its size ([`slab`]), and is found through an [`index`] of two words a page. Freed memory goes back to the
//! kernel, scattered or not ([`compact`]).
//!
//! | file | subject |
//! |---|---|
//! | [`codec`] | how a page is encoded, and its checksum |
//! | [`index`] | where each page is |
//! | [`slab`], [`record`] | chunks of slots, and their books |
//! | [`compact`] | emptying chunks that are nearly empty |
//! | [`account`] | what all of it takes up |
//! | [`scratch`] | buffers to work in |
//!
//! # What it promises
//!
//! A load gives the bytes that were stored or an error, never anything else (rule Z9): each page has a checksum of
//! its number and its content, made before it was encoded and checked after it was decoded, so it covers the
//! stored bytes, the index and the code in between. Damage is found, not repaired, and stays where it is: an
//! object is freed only if its slot agrees that it is the page's (rule Z6).
//!
//! No call allocates from any heap, uses thread-local storage, or starts a thread. All memory is private memory
//! of our own, so after a fork both processes have it (rule G12); since all locks are free then, there is nothing
//! to be done about a fork.
//!
//! # Locks
//!
//! A call takes a bench, then, for instructions at a time and one after the other, whatever lock of the files
//! above it needs. Nothing is locked but the bench while a page is encoded, decoded or copied.

mod account;
#[cfg(test)]
mod check;
mod codec;
mod compact;
mod index;
mod record;
#[cfg(test)]
mod samples;
mod scratch;
mod slab;
#[cfg(test)]
mod tests;

use super::{Descriptor, Device, DeviceError, DevicePages, Load, Store, Usage};
use account::Account;
use codec::{Encoded, Form, checksum, checksum_same, decode, encode, same_filled};
use compact::MOVES;
use index::{AT_BITS, Held, Index, Place, Word};
use peerspace_core::sync::{Ordering, fence};
use peerspace_os::Trouble;
use rustix::io::Errno;
use scratch::{Bench, Benches};
use slab::{Freed, Slab, WHOLE};
use std::fmt;

/// Pages that can be numbered, for each page of RAM the store may take up: more than data usually shrinks by, and
/// as many cost nothing before they are used.
const PAGES_PER_PAGE: u64 = 16;
/// RAM for each shard, so that those of a small store do not keep it all in half-empty chunks.
const SHARD_BYTES: u64 = 64 << 20;
const MOST_SHARDS: u64 = 16;
/// Objects moved at most to make room for a page when there is no more memory.
const SQUEEZE: usize = 64;
/// Times the same bytes are looked at before they are called corrupt: those of an object that was moved, and
/// moved back, would be looked at again.
const LOOKS: u32 = 4;

/// A store of compressed pages in RAM.
///
/// It takes up at most the bytes it was given: those of its chunks, whole, with their books, and of the index of
/// the pages in it. Beside that come its buffers, about 20 KiB for a page size of 4 KiB, and there are twice as
/// many as processors and six more. When it is full, stores that need more memory fail with
/// [`DeviceError::NoSpace`], and all others go on. Pages that are one word repeated need no memory but their
/// share of the index.
pub struct Compressed {
    page: usize,
    account: Account,
    index: Index,
    slab: Slab,
    benches: Benches,
}

impl fmt::Debug for Compressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressed").field("account", &self.account).finish_non_exhaustive()
    }
}

impl Compressed {
    /// A store that takes up at most `bytes` bytes of RAM. It numbers sixteen times as many pages as `bytes` bytes
    /// are, and takes up nothing but address space before it is used.
    ///
    /// # Errors
    /// When there is no address space for it, or `bytes` is more than 64 TiB.
    pub fn new(bytes: u64) -> Result<Compressed, Trouble> {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let shards = (bytes / SHARD_BYTES).clamp(1, cpus.min(MOST_SHARDS));
        Self::with(rustix::param::page_size(), bytes, shards as usize, (2 * cpus as usize + 6).min(128))
    }

    fn with(page: usize, bytes: u64, shards: usize, benches: usize) -> Result<Compressed, Trouble> {
        if bytes / 8 > 1 << AT_BITS {
            return Err(Trouble::NoMemory);
        }
        let trouble = |_| Trouble::NoMemory;
        let index = Index::new(bytes / page as u64 * PAGES_PER_PAGE).map_err(trouble)?;
        let slab = Slab::new(bytes, page, shards).map_err(trouble)?;
        Ok(Compressed { page, account: Account::new(bytes), index, slab, benches: Benches::new(benches, page) })
    }

    /// The device's numbers of the pages in `bytes`.
    fn pages(&self, first: u64, bytes: usize) -> Result<std::ops::Range<u64>, DeviceError> {
        let end = first.checked_add((bytes / self.page) as u64);
        match end {
            Some(end) if end <= self.index.pages() && bytes.is_multiple_of(self.page) => Ok(first..end),
            _ => Err(DeviceError::Io(Errno::INVAL.raw_os_error())),
        }
    }

    /// Stores the pages of one transfer.
    fn put_all(&self, store: &Store<'_>, bench: &mut Bench, home: usize) -> Result<(), DeviceError> {
        let pages = self.pages(store.page, store.bytes.len())?;
        for (page, bytes) in pages.clone().zip(store.bytes.chunks_exact(self.page)) {
            if let Err(e) = self.put(page, bytes, bench, home) {
                // Part of a folio is of no use to anybody, but its memory is.
                (pages.start..page).for_each(|page| self.discard(page));
                return Err(e);
            }
        }
        Ok(())
    }

    /// Stores one page. On error it holds nothing.
    fn put(&self, page: u64, bytes: &[u8], bench: &mut Bench, home: usize) -> Result<(), DeviceError> {
        let is_new = self.index.word(page) == Word::NOTHING;
        if is_new && !self.enter(page, home) {
            return Err(DeviceError::NoSpace);
        }
        let (word, second) = match encode(bytes, self.slab.most(), bench) {
            Encoded::Same(word) => (Word::same(checksum_same(page, word)), word),
            Encoded::Bytes(form, coded) => {
                let at = self.place(page, coded, home).or_else(|| {
                    // What the page holds is about to be overwritten, so its memory can be had.
                    let old = self.index.take(page);
                    self.give_back(page, old);
                    (old != Word::NOTHING).then(|| self.place(page, coded, home)).flatten()
                });
                let Some(at) = at else {
                    self.index.leave(page, &self.account);
                    return Err(DeviceError::NoSpace);
                };
                (Word::bytes(Place { form, len: coded.len(), at }), checksum(page, bytes))
            }
        };
        let old = self.index.publish(page, word, second);
        self.give_back(page, old);
        Ok(())
    }

    /// Makes room in the index for `page`, which holds nothing.
    fn enter(&self, page: u64, home: usize) -> bool {
        self.index.enter(page, &self.account) || {
            self.slab.squeeze(home, SQUEEZE, &self.index, &self.account);
            self.index.enter(page, &self.account)
        }
    }

    /// Puts an object of `page` into a slot. `None` when no memory can be had for it.
    fn place(&self, page: u64, coded: &[u8], home: usize) -> Option<u64> {
        let (slab, account) = (&self.slab, &self.account);
        let class = slab.class(coded.len());
        let slot = slab
            .alloc(home, class, page, account)
            .or_else(|| {
                slab.squeeze(home, SQUEEZE, &self.index, account);
                slab.alloc(home, class, page, account)
            })
            // Wasteful, so last: a slot that is too large.
            .or_else(|| slab.scrape(home, WHOLE, class, page))?;
        slab.write(slot, page, coded);
        Some(slot.at)
    }

    /// Frees what `word`, which `page` had, names.
    fn give_back(&self, page: u64, word: Word) {
        if let Held::Bytes(place) = word.read()
            && let Freed::Crowded(shard) = self.slab.free(page, place.at, &self.account)
        {
            self.slab.compact(shard, MOVES, &self.index, &self.account);
        }
    }

    /// Makes `page` hold nothing.
    fn discard(&self, page: u64) {
        let old = self.index.take(page);
        if old != Word::NOTHING {
            self.give_back(page, old);
            self.index.leave(page, &self.account);
        }
    }

    /// Reads one page into `to`, by way of `coded`, and has `good` check bytes that were
    /// stored: what was read, against the second word.
    fn get(
        &self,
        page: u64,
        to: &mut [u8],
        coded: &mut [u8],
        good: impl Fn(&[u8], u64) -> bool,
    ) -> Result<(), DeviceError> {
        let mut looks = 0;
        while looks < LOOKS {
            let (word, second) = self.index.get(page);
            #[cfg(test)]
            check::reached(check::Point::Found, page);
            match word.read() {
                Held::Same if word.is_same(checksum_same(page, second)) => {
                    to.chunks_exact_mut(8).for_each(|to| to.copy_from_slice(&second.to_ne_bytes()));
                    return Ok(());
                }
                Held::Bytes(place) if place.len <= to.len() => {
                    if self.fetch(place, to, coded).is_some() && good(to, second) {
                        return Ok(());
                    }
                }
                _ => return Err(DeviceError::Corrupt),
            }
            // Acquire: pairs with the fence in Slab::write. If what was read was written in place of the object, the
            // page has a new word, and this sees it.
            fence(Ordering::Acquire);
            if self.index.word(page) == word {
                looks += 1;
            }
        }
        Err(DeviceError::Corrupt)
    }

    fn fetch(&self, place: Place, to: &mut [u8], coded: &mut [u8]) -> Option<()> {
        if place.form == Form::Plain {
            return (place.len == to.len() && self.slab.read(place.at, to)).then_some(());
        }
        let coded = &mut coded[..place.len.next_multiple_of(8)];
        if !self.slab.read(place.at, coded) {
            return None;
        }
        decode(place.form, &coded[..place.len], to)
    }
}

impl Device for Compressed {
    fn describe(&self) -> Descriptor {
        Descriptor::private("compressed", self.index.pages()).capacity_bytes(self.account.limit()).compares().in_ram()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        let mut working = self.benches.take();
        let home = working.number;
        for store in batch {
            store.result = self.put_all(store, &mut working.bench, home);
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        let mut working = self.benches.take();
        let coded = bytemuck::cast_slice_mut(&mut working.bench.coded);
        for load in batch {
            load.result = self.pages(load.page, load.bytes.len()).and_then(|mut pages| {
                let mut bytes = load.bytes.chunks_exact_mut(self.page);
                pages.try_for_each(|page| match bytes.next() {
                    Some(to) => self.get(page, to, coded, |got, second| checksum(page, got) == second),
                    None => Ok(()),
                })
            });
        }
    }

    fn freed(&self, pages: DevicePages) {
        let end = pages.first.saturating_add(pages.count).min(self.index.pages());
        (pages.first..end).for_each(|page| self.discard(page));
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        if self.pages(page, bytes.len())?.count() != 1 {
            return Err(DeviceError::Io(Errno::INVAL.raw_os_error()));
        }
        let (word, second) = self.index.get(page);
        let same = match word.read() {
            Held::Same => return Ok(same_filled(bytes) == Some(second) && word.is_same(checksum_same(page, second))),
            // Also when the checksum is damaged: what is not going to be loaded again is not held.
            _ => checksum(page, bytes) == second,
        };
        if !same {
            return Ok(false);
        }
        let mut working = self.benches.take();
        let Bench { coded, page: held, .. } = &mut *working.bench;
        let (coded, held) = (bytemuck::cast_slice_mut(coded), bytemuck::cast_slice_mut(held));
        self.get(page, held, coded, |got, _| got == bytes).map(|()| true)
    }

    fn usage(&self) -> Option<Usage> {
        Some(self.account.usage())
    }
}
