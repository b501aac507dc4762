//! How a page is encoded: the cheapest form that saves memory, found by cheap tests first.
//!
//! 1. One word repeated: nothing but the word.
//! 2. Bytes spread as evenly as noise: as it is. A tenth of a microsecond tells, where lz4 needs half of one to
//!    find out.
//! 3. lz4; or the page as it is when that does not save at least a size class.
//!
//! Pure functions over a page and a [`Bench`]; no locks. Decoding believes nothing: hostile bytes give an error or
//! a page that the checksum refuses, and touch no memory but the page. `lz4_flex` is built with its safe encoder
//! and its safe, checked decoder; the unsafe encoder is an eighth faster, and the unsafe decoder is slower on
//! runs than the safe one, so there is nothing to gain that would be worth trusting it with damaged bytes.

use super::scratch::Bench;
use lz4_flex::block::{compress_into_with_table, decompress_into};
use xxhash_rust::xxh3::xxh3_64;

/// How stored bytes are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As an lz4 block.
    Lz4,
    /// As they are.
    Plain,
}

/// What a page is encoded as.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Encoded<'a> {
    /// One word, repeated.
    Same(u64),
    /// These bytes.
    Bytes(Form, &'a [u8]),
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The word that all of `page` consists of.
pub(super) fn same_filled(page: &[u8]) -> Option<u64> {
    let first = word(page, 0);
    // Most pages that are not show it at one end or the other.
    if word(page, page.len() - 8) != first {
        return None;
    }
    let lines = page.chunks_exact(64);
    let same = |line: &[u8]| (0..8).fold(0, |differs, i| differs | (word(line, 8 * i) ^ first)) == 0;
    lines.into_iter().all(same).then_some(first)
}

/// Whether the bytes of `page` are spread so evenly that no code will find anything.
///
/// Of `n` samples of noise, the squares of how often each byte value was seen add up to `n + n * n / 256`, give or
/// take `n / 11`. Everything else that was looked at, down to noise in base 64, is far above.
fn is_noise(page: &[u8]) -> bool {
    let samples = (page.len() / 16).min(1024);
    let places = samples / 8;
    let mut seen = [0u16; 256];
    for (i, place) in page.chunks_exact(page.len() / places).enumerate() {
        // Not the same column everywhere: pages like to be tables.
        let at = 8 * (i % 8);
        place[at..at + 8].iter().for_each(|byte| seen[*byte as usize] += 1);
    }
    let squares: usize = seen.iter().map(|n| *n as usize * *n as usize).sum();
    squares <= samples + samples * samples / 256 + samples * 8 / 11
}

/// Encodes `page`. Bytes that are not `page` itself are at most `most`, and lie in `bench`.
pub(super) fn encode<'a>(page: &'a [u8], most: usize, bench: &'a mut Bench) -> Encoded<'a> {
    if let Some(word) = same_filled(page) {
        return Encoded::Same(word);
    }
    if is_noise(page) {
        return Encoded::Bytes(Form::Plain, page);
    }
    let coded = bytemuck::cast_slice_mut::<u64, u8>(&mut bench.coded);
    match compress_into_with_table(page, coded, &mut bench.table) {
        Ok(len) if len <= most => Encoded::Bytes(Form::Lz4, &coded[..len]),
        _ => Encoded::Bytes(Form::Plain, page),
    }
}

/// Decodes `coded` into `page`. `None` when it is nothing that a page is encoded as.
#[must_use]
pub(super) fn decode(form: Form, coded: &[u8], page: &mut [u8]) -> Option<()> {
    match form {
        Form::Lz4 => (decompress_into(coded, page).ok()? == page.len()).then_some(()),
        Form::Plain if coded.len() == page.len() => {
            page.copy_from_slice(coded);
            Some(())
        }
        Form::Plain => None,
    }
}

/// The checksum of page `number` with content `page`: end to end, whatever goes wrong in between, other pages'
/// content under this number included.
pub(super) fn checksum(number: u64, page: &[u8]) -> u64 {
    xxh3_64(page) ^ spread(number)
}

/// The checksum of page `number` when all of it is `word`.
pub(super) fn checksum_same(number: u64, word: u64) -> u64 {
    xxh3_64(&word.to_ne_bytes()) ^ spread(number)
}

fn spread(number: u64) -> u64 {
    (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, Kind};
    use super::super::scratch::Benches;
    use super::*;
    use proptest::prelude::*;

    const PAGES: [usize; 3] = [4096, 16384, 65536];

    fn form(page: &[u8]) -> (Form, usize) {
        let benches = Benches::new(1, page.len());
        let mut working = benches.take();
        match encode(page, page.len() / 16 * 15, &mut working.bench) {
            Encoded::Bytes(form, bytes) => (form, bytes.len()),
            Encoded::Same(word) => panic!("all of it is {word:#x}"),
        }
    }

    #[test]
    fn every_kind_of_page_gets_its_form() {
        for page in PAGES {
            for seed in 0..100 {
                let check = |kind, want, most| {
                    let (form, len) = form(&samples::page(page, kind, seed));
                    assert!(form == want && len <= most, "{page} {kind:?} {seed}: {form:?}, {len}");
                };
                check(Kind::Noise, Form::Plain, page);
                check(Kind::Text, Form::Lz4, page * 3 / 4);
                check(Kind::Numbers, Form::Lz4, page * 3 / 4);
                check(Kind::HalfNoise, Form::Lz4, page * 9 / 16);
                check(Kind::Mixed, Form::Lz4, page * 15 / 16);
            }
        }
    }

    #[test]
    fn one_word_repeated_is_seen_whatever_it_is() {
        for word in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let page = samples::same(4096, word);
            assert_eq!(same_filled(&page), Some(word));
            for at in [0, 7, 8, 63, 64, 2048, 4095] {
                let mut other = page.clone();
                other[at] ^= 1;
                assert_eq!(same_filled(&other), None, "byte {at}");
            }
        }
    }

    #[test]
    fn what_repeats_is_no_noise() {
        // Noise twice, and noise every few bytes: spread as evenly as noise, but not noise.
        let noise = samples::page(4096, Kind::Noise, 3);
        let twice = [&noise[..2048], &noise[..2048]].concat();
        assert_eq!(form(&twice).0, Form::Lz4);
        let every: Vec<u8> = (0..4096).map(|i| noise[i % 100]).collect();
        assert_eq!(form(&every).0, Form::Lz4);
    }

    #[test]
    fn a_checksum_belongs_to_its_page() {
        let page = samples::page(4096, Kind::Text, 1);
        assert_ne!(checksum(1, &page), checksum(2, &page));
        assert_ne!(checksum_same(1, 5), checksum_same(2, 5));
        assert_ne!(checksum_same(1, 5), checksum_same(1, 6));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(size in 0usize..3, kind in samples::kinds(), seed in any::<u64>()) {
            let page = samples::page(PAGES[size], kind, seed);
            let benches = Benches::new(1, page.len());
            let mut working = benches.take();
            let mut back = vec![0x5a; page.len()];
            let most = page.len() / 16 * 15;
            match encode(&page, most, &mut working.bench) {
                Encoded::Same(word) => prop_assert_eq!(&samples::same(page.len(), word), &page),
                Encoded::Bytes(form, bytes) => {
                    prop_assert!(bytes.len() <= most || form == Form::Plain);
                    prop_assert_eq!(decode(form, bytes, &mut back), Some(()));
                    prop_assert_eq!(&back, &page);
                }
            }
        }

        #[test]
        fn hostile_bytes_do_no_harm(
            kind in samples::kinds(),
            seed in any::<u64>(),
            damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..20),
            cut in any::<usize>(),
        ) {
            let page = samples::page(4096, kind, seed);
            let benches = Benches::new(1, page.len());
            let mut working = benches.take();
            let Encoded::Bytes(_, bytes) = encode(&page, 3840, &mut working.bench) else { return Ok(()) };
            let mut bytes = bytes.to_vec();
            for (at, value) in damage {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            bytes.truncate(1 + cut % bytes.len());
            let mut back = vec![0; page.len()];
            for form in [Form::Lz4, Form::Plain] {
                let _ = decode(form, &bytes, &mut back);
            }
        }
    }
}
