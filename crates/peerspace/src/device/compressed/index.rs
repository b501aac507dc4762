//! Where each page is: two words a page, in memory that is taken up as pages are stored.
//!
//! ```text
//!   first word    63                                                          3  2 1 0
//!   nothing       |                              0                             |  0   |
//!   one word      |                  checksum of page and word                 |  1   |
//!   bytes         | - |        where, in words         |  how many, less one   | 2..4 |
//!   second word   the repeated word, or the checksum of page and content
//! ```
//!
//! # Who may change it
//!
//! The engine makes no two calls at a time about one page, so a page's words are changed by that one call, and by
//! whoever [moves](Index::moved) its bytes, which changes *where* and nothing else, by compare and exchange.
//! Publishing stores the second word, then exchanges the first (Release); readers load the first (Acquire), then
//! the second. A reader that meets a move reads bytes that may be another page's by now; the checksum tells, and
//! it looks again.
//!
//! # Leaves
//!
//! The words of the pages in one page of index memory make a *leaf*. It is charged when its first page is stored
//! and given back to the kernel when its last one is freed: `leaves[i]` counts the pages in it, and says while it
//! is being given back, which whoever wants to store there waits for. It is a leaf of the lock order: nobody holds
//! anything while waiting.

use super::account::Account;
use super::codec::Form;
use super::scratch::relax;
use peerspace_core::sync::{AtomicU64, Ordering};
use peerspace_core::words::Words;
use peerspace_os::linux::map::Arena;
use rustix::io::Errno;

/// Where bytes are, and how to read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) form: Form,
    /// Bytes: 1 to 65,536.
    pub(super) len: usize,
    /// The first word of the store.
    pub(super) at: u64,
}

/// The first word of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word(u64);

/// What a [`Word`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing is stored.
    Nothing,
    /// The second word, repeated.
    Same,
    /// Bytes.
    Bytes(Place),
    /// No page was ever stored like this: the index is damaged.
    Nonsense,
}

const SAME: u64 = 1;
const LZ4: u64 = 3;
const PLAIN: u64 = 4;
const TAG_BITS: u32 = 3;
const LEN_BITS: u32 = 16;
/// Bits of *where*: 64 TiB.
pub(super) const AT_BITS: u32 = 43;

impl Word {
    pub(super) const NOTHING: Word = Word(0);

    /// All of the page is one word; `checksum` is that of page and word.
    pub(super) fn same(checksum: u64) -> Word {
        Word(checksum << TAG_BITS | SAME)
    }

    pub(super) fn bytes(place: Place) -> Word {
        debug_assert!((1..=1 << LEN_BITS).contains(&place.len) && place.at < 1 << AT_BITS);
        let tag = match place.form {
            Form::Lz4 => LZ4,
            Form::Plain => PLAIN,
        };
        Word(place.at << (TAG_BITS + LEN_BITS) | (place.len as u64 - 1) << TAG_BITS | tag)
    }

    pub(super) fn read(self) -> Held {
        let form = match self.0 & ((1 << TAG_BITS) - 1) {
            0 if self.0 == 0 => return Held::Nothing,
            SAME => return Held::Same,
            LZ4 => Form::Lz4,
            PLAIN => Form::Plain,
            _ => return Held::Nonsense,
        };
        if self.0 >> (TAG_BITS + LEN_BITS + AT_BITS) != 0 {
            return Held::Nonsense;
        }
        let len = (self.0 >> TAG_BITS & ((1 << LEN_BITS) - 1)) as usize + 1;
        Held::Bytes(Place { form, len, at: self.0 >> (TAG_BITS + LEN_BITS) })
    }

    /// Whether `checksum`, of page and word, is the one in a word made by [`same`](Word::same).
    pub(super) fn is_same(self, checksum: u64) -> bool {
        self == Word::same(checksum)
    }
}

/// The words of all pages.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) words: Arena,
    pub(super) leaves: Arena,
    pages: u64,
    /// Pages whose words make a leaf.
    pub(super) per_leaf: u64,
    leaf_bytes: u64,
}

/// A leaf that is being given back; the other bits count its pages.
const CLEARING: u64 = 1 << 63;

impl Index {
    /// An index of `pages` pages.
    pub(super) fn new(pages: u64) -> Result<Index, Errno> {
        let leaf_bytes = rustix::param::page_size() as u64;
        let per_leaf = leaf_bytes / 16;
        let words = (pages * 2) as usize;
        let leaves = pages.div_ceil(per_leaf) as usize;
        let index = Index {
            words: Arena::new(words, words)?,
            leaves: Arena::new(leaves, leaves)?,
            pages,
            per_leaf,
            leaf_bytes,
        };
        index.words.use_base_pages();
        index.leaves.use_base_pages();
        Ok(index)
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    fn first(&self, page: u64) -> &AtomicU64 {
        self.words.at(page as usize * 2)
    }

    fn second(&self, page: u64) -> &AtomicU64 {
        self.words.at(page as usize * 2 + 1)
    }

    /// The first word of `page`, which is below [`pages`](Index::pages).
    pub(super) fn word(&self, page: u64) -> Word {
        // Acquire: pairs with the Release of publish and moved; the bytes it names are seen.
        Word(self.first(page).load(Ordering::Acquire))
    }

    /// Both words of `page`.
    pub(super) fn get(&self, page: u64) -> (Word, u64) {
        let word = self.word(page);
        // Relaxed: only a call about this page changes it, and there is none but ours.
        (word, self.second(page).load(Ordering::Relaxed))
    }

    /// Gives `page` new words. Returns the first word it had.
    pub(super) fn publish(&self, page: u64, word: Word, second: u64) -> Word {
        self.second(page).store(second, Ordering::Relaxed);
        // Release: whoever reads the word sees the bytes it names. Acquire: we give back what the old word names,
        // and whoever put it there must be done with it.
        Word(self.first(page).swap(word.0, Ordering::AcqRel))
    }

    /// Takes away what `page` holds. Returns the first word it had.
    pub(super) fn take(&self, page: u64) -> Word {
        // Acquire: as in publish.
        Word(self.first(page).swap(0, Ordering::AcqRel))
    }

    /// The bytes of `page` were moved. False if the page no longer holds them.
    pub(super) fn moved(&self, page: u64, from: Place, to: u64) -> bool {
        let (from, to) = (Word::bytes(from).0, Word::bytes(Place { at: to, ..from }).0);
        // Release: whoever reads the new word sees the bytes there.
        self.first(page).compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Makes room for the words of `page`, which holds nothing. False when there is no memory for them.
    #[must_use]
    pub(super) fn enter(&self, page: u64, account: &Account) -> bool {
        let leaf = self.leaves.at((page / self.per_leaf) as usize);
        let mut rounds = 0;
        loop {
            // Acquire: pairs with the Release in leave; the leaf has been cleared.
            let pages = leaf.load(Ordering::Acquire);
            if pages == CLEARING {
                relax(&mut rounds);
                continue;
            }
            if pages == 0 && !account.charge(self.leaf_bytes) {
                return false;
            }
            if leaf.compare_exchange(pages, pages + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return true;
            }
            if pages == 0 {
                account.uncharge(self.leaf_bytes);
            }
        }
    }

    /// `page` holds nothing any more.
    pub(super) fn leave(&self, page: u64, account: &Account) {
        let number = page / self.per_leaf;
        let leaf = self.leaves.at(number as usize);
        // Release: the page's word is empty before it leaves. Acquire: whoever leaves last sees all of them empty.
        let left = leaf.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |pages| {
            Some(if pages == 1 { CLEARING } else { pages.saturating_sub(1) })
        });
        if left == Ok(1) {
            let first = number * self.per_leaf;
            let count = self.per_leaf.min(self.pages - first);
            // When the kernel keeps the memory, the leaf's next use finds it as it is, which is empty.
            self.words.discard(first as usize * 2, count as usize * 2);
            leaf.store(0, Ordering::Release);
            account.uncharge(self.leaf_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_word_says_what_it_was_made_from(
            form in prop_oneof![Just(Form::Lz4), Just(Form::Plain)],
            len in 1usize..=65536,
            at in 0u64..1 << AT_BITS,
            checksum in any::<u64>(),
        ) {
            let place = Place { form, len, at };
            prop_assert_eq!(Word::bytes(place).read(), Held::Bytes(place));
            let word = Word::same(checksum);
            prop_assert!(word.is_same(checksum) && !word.is_same(checksum ^ 1));
            prop_assert!(word.read() == Held::Same);
        }
    }

    #[test]
    fn a_leaf_costs_memory_while_it_has_pages() {
        let index = Index::new(10_000).unwrap();
        let account = Account::new(index.leaf_bytes);
        assert!(index.enter(0, &account));
        index.publish(0, Word::same(5), 7);
        assert!(index.enter(index.per_leaf - 1, &account));
        // There is memory for one leaf only.
        assert!(!index.enter(index.per_leaf, &account));
        index.take(0);
        index.leave(0, &account);
        assert!(!index.enter(index.per_leaf, &account));
        index.leave(index.per_leaf - 1, &account);
        assert_eq!(account.usage().used_bytes, 0);
        assert_eq!(index.get(0), (Word::NOTHING, 0));
        assert!(index.enter(index.per_leaf, &account));
    }

    #[test]
    fn a_move_fails_once_the_page_is_elsewhere() {
        let index = Index::new(10).unwrap();
        let place = Place { form: Form::Lz4, len: 100, at: 50 };
        index.publish(3, Word::bytes(place), 1);
        assert!(index.moved(3, place, 80));
        assert!(!index.moved(3, place, 90));
        assert_eq!(index.take(3).read(), Held::Bytes(Place { at: 80, ..place }));
        assert!(!index.moved(3, Place { at: 80, ..place }, 90));
        assert_eq!(index.word(3), Word::NOTHING);
    }
}
