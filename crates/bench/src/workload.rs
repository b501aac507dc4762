//! The data, and how it is read: the same loops for everybody.
//!
//! The value of every word follows from its index, so that whatever is read is verified. In each page half of the
//! words are distinct and look like noise, half are zero: it compresses about 2:1. Random accesses read words that
//! are not zero, so that a page of zeros in the wrong place cannot pass.

use crate::error::Trouble;

/// Words in a page of the workload.
pub(crate) const PAGE_WORDS: usize = 512;
/// Words in a page that are not zero: the first ones.
const FULL_WORDS: usize = PAGE_WORDS / 2;
/// Bytes in a page of the workload.
pub(crate) const PAGE_BYTES: usize = PAGE_WORDS * 8;

/// The value of word `i`.
#[inline]
pub(crate) fn word(i: usize) -> u64 {
    // An odd factor: the values are distinct, and none of them is zero.
    if i % PAGE_WORDS < FULL_WORDS { (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) } else { 0 }
}

/// Writes words `first..` into `words`.
pub(crate) fn fill(words: &mut [u64], first: usize) {
    for (i, w) in words.iter_mut().enumerate() {
        *w = word(first + i);
    }
}

/// Reads one word of every cache line, in order. `first` is the index of the first word, a multiple of a page.
/// Returns how many words were read.
///
/// # Errors
/// When one of them is wrong.
pub(crate) fn read_in_order(words: &[u64], first: usize) -> Result<u64, Trouble> {
    // In eight lines each of the eight places within a line is read once.
    const STEP: usize = 9;
    const CHUNK: usize = 64;
    let (chunks, rest) = words.as_chunks::<CHUNK>();
    assert!(rest.is_empty() && first.is_multiple_of(PAGE_WORDS), "data comes in whole pages");
    let mut wrong = 0;
    for (c, chunk) in chunks.iter().enumerate() {
        let base = first + c * CHUNK;
        for k in (0..CHUNK).step_by(STEP) {
            wrong |= chunk[k] ^ word(base + k);
        }
    }
    if wrong != 0 {
        return Err(Trouble::Wrong(format!(
            "words {first}..{}, read in order, differ from what was written in bits {wrong:#x}",
            first + words.len()
        )));
    }
    Ok((chunks.len() * CHUNK.div_ceil(STEP)) as u64)
}

/// A source of random places: xorshift, the same sequence in every process.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    x: u64,
    pages: u64,
}

impl Places {
    /// Places in `pages` pages.
    pub(crate) fn new(pages: u64) -> Places {
        Places { x: 88_172_645_463_325_252, pages }
    }

    /// A page and a word in it.
    #[inline]
    pub(crate) fn next(&mut self) -> (usize, usize) {
        self.x ^= self.x << 13;
        self.x ^= self.x >> 7;
        self.x ^= self.x << 17;
        // High bits for the page by a multiplication, low ones for the word.
        let page = ((self.x as u128 * self.pages as u128) >> 64) as usize;
        (page, self.x as usize % FULL_WORDS)
    }

    /// All pages, each once.
    pub(crate) fn shuffled(&mut self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.pages as u32).collect();
        let all = self.pages;
        for i in (1..order.len()).rev() {
            self.pages = i as u64 + 1;
            let (j, _) = self.next();
            order.swap(i, j);
        }
        self.pages = all;
        order
    }
}

/// Checks one word that was read.
#[inline]
pub(crate) fn check(page: usize, k: usize, found: u64) -> Result<(), Trouble> {
    let i = page * PAGE_WORDS + k;
    if found == word(i) { Ok(()) } else { Err(wrong(i, found)) }
}

#[cold]
fn wrong(i: usize, found: u64) -> Trouble {
    Trouble::Wrong(format!("word {i} is {found:#x} and was written as {:#x}", word(i)))
}

/// Reads `accesses` words at random.
///
/// # Errors
/// When one of them is wrong.
pub(crate) fn read_at_random(words: &[u64], places: &mut Places, accesses: u64) -> Result<u64, Trouble> {
    for _ in 0..accesses {
        let (page, k) = places.next();
        check(page, k, words[page * PAGE_WORDS + k])?;
    }
    Ok(accesses)
}

/// Reads a word of each page of `order`.
///
/// # Errors
/// When one of them is wrong.
pub(crate) fn read_each(words: &[u64], order: &[u32]) -> Result<u64, Trouble> {
    for page in order {
        let (page, k) = (*page as usize, *page as usize % FULL_WORDS);
        check(page, k, words[page * PAGE_WORDS + k])?;
    }
    Ok(order.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(pages: usize) -> Vec<u64> {
        let mut words = vec![0; pages * PAGE_WORDS];
        fill(&mut words, 0);
        words
    }

    #[test]
    fn data_is_half_zero_and_otherwise_distinct() {
        let mut words = data(16);
        assert_eq!(words.iter().filter(|w| **w == 0).count(), words.len() / 2);
        words.retain(|w| *w != 0);
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 16 * FULL_WORDS);
    }

    #[test]
    fn reading_finds_right_data_right_and_wrong_data_wrong() {
        let mut words = data(8);
        let lines = words.len() as u64 / 8;
        assert_eq!(read_in_order(&words, 0).unwrap(), lines);
        let mut places = Places::new(8);
        assert_eq!(read_at_random(&words, &mut places, 1000).unwrap(), 1000);
        let mut order = places.shuffled();
        assert_eq!(read_each(&words, &order).unwrap(), 8);
        order.sort_unstable();
        assert_eq!(order, (0..8).collect::<Vec<_>>());
        // A page of zeros, as a pager that loses pages would give.
        words[3 * PAGE_WORDS..4 * PAGE_WORDS].fill(0);
        assert!(matches!(read_in_order(&words, 0), Err(Trouble::Wrong(_))));
        assert!(matches!(read_at_random(&words, &mut places, 1000), Err(Trouble::Wrong(_))));
        assert!(matches!(read_each(&words, &order), Err(Trouble::Wrong(_))));
    }

    #[test]
    fn pages_in_each_others_places_are_found_out() {
        let mut words = data(2);
        let (a, b) = words.split_at_mut(PAGE_WORDS);
        a.swap_with_slice(b);
        assert!(read_in_order(&words, 0).is_err());
        assert!(read_in_order(&words[..PAGE_WORDS], PAGE_WORDS).is_ok());
    }

    #[test]
    fn random_places_cover_everything_and_never_read_zeros() {
        let mut places = Places::new(5);
        let mut seen = [0; 5];
        for _ in 0..1000 {
            let (page, k) = places.next();
            seen[page] += 1;
            assert_ne!(word(page * PAGE_WORDS + k), 0);
        }
        assert!(seen.iter().all(|n| (100..400).contains(n)), "{seen:?}");
    }
}
