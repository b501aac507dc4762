//! The code for pages of numbers: what differs from word to word is kept, what does not is not.
//!
//! Integers, pointers, counters and the exponents of floating-point numbers have bytes that are the same in
//! neighbouring words. A page is cut into blocks of 16 words, and a block into eight *planes*: plane `k` is byte
//! `k` of each word, 16 bytes. A plane of zeros takes no room, a plane of one repeated byte takes one, any other
//! is kept as it is. That costs a transposition in each direction and no search at all: about a tenth of the
//! time of lz4 for such pages, which are also the ones that lz4 is slowest with and finds least in.
//!
//! ```text
//!   block:  tags (2 bits a plane, little endian) | what each plane keeps, plane 0 first
//!           (if all planes are kept whole: the words as they were)
//! ```
//!
//! Pure functions; no locks. Decoding trusts nothing: any bytes either decode or are refused.

/// Words in a block: a plane of it is as long.
const BLOCK: usize = 16;
/// Bytes in a block.
pub(super) const BLOCK_BYTES: usize = BLOCK * 8;

const ZERO: u16 = 0;
const CONSTANT: u16 = 1;
const KEPT: u16 = 2;
/// Every plane is kept: then the words are, as they were.
const ALL_KEPT: u16 = 0xaaaa;

/// Rows of eight words; as planes, row `g` has bytes `8 * g..8 * g + 8` of each plane.
type Block = [[u64; 8]; BLOCK / 8];

/// Transposes every row, taken as eight times eight bytes. Its own inverse.
fn transpose(block: &mut Block) {
    fn swap(block: &mut Block, apart: usize, shift: u32, mask: u64) {
        for row in block {
            for i in (0..8).filter(|i| i & apart == 0) {
                let (a, b) = (row[i], row[i + apart]);
                let differs = ((a >> shift) ^ b) & mask;
                row[i] = a ^ (differs << shift);
                row[i + apart] = b ^ differs;
            }
        }
    }
    swap(block, 4, 32, 0x0000_0000_ffff_ffff);
    swap(block, 2, 16, 0x0000_ffff_0000_ffff);
    swap(block, 1, 8, 0x00ff_00ff_00ff_00ff);
}

fn splat(byte: u8) -> u64 {
    byte as u64 * 0x0101_0101_0101_0101
}

/// Encodes `page`, whole blocks, into `out`. The length, or `None` if it does not fit.
pub(super) fn encode(page: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut at = 0;
    for bytes in page.chunks_exact(BLOCK_BYTES) {
        let mut block = Block::default();
        for (word, bytes) in block.as_flattened_mut().iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        if block.as_flattened().iter().fold(0, |all, word| all | word) == 0 {
            out.get_mut(at..at + 2)?.fill(0);
            at += 2;
            continue;
        }
        transpose(&mut block);
        let tags_at = at;
        let mut tags = 0u16;
        at += 2;
        for plane in 0..8 {
            let first = block[0][plane];
            let constant = first == splat(first as u8) && block.iter().all(|row| row[plane] == first);
            let tag = match constant {
                true if first == 0 => ZERO,
                true => {
                    *out.get_mut(at)? = first as u8;
                    at += 1;
                    CONSTANT
                }
                false => {
                    let kept = out.get_mut(at..at + BLOCK)?;
                    for (row, to) in block.iter().zip(kept.chunks_exact_mut(8)) {
                        to.copy_from_slice(&row[plane].to_le_bytes());
                    }
                    at += BLOCK;
                    KEPT
                }
            };
            tags |= tag << (2 * plane);
        }
        out.get_mut(tags_at..tags_at + 2)?.copy_from_slice(&tags.to_le_bytes());
        if tags == ALL_KEPT {
            out[at - BLOCK_BYTES..at].copy_from_slice(bytes);
        }
    }
    Some(at)
}

/// Decodes `coded` into `page`, whole blocks. `None` unless `coded` is exactly what such a page is encoded as.
pub(super) fn decode(coded: &[u8], page: &mut [u8]) -> Option<()> {
    let mut rest = coded;
    for bytes in page.chunks_exact_mut(BLOCK_BYTES) {
        let (tags, after) = rest.split_first_chunk()?;
        let tags = u16::from_le_bytes(*tags);
        rest = after;
        if tags == 0 {
            bytes.fill(0);
            continue;
        }
        if tags == ALL_KEPT {
            let (kept, after) = rest.split_first_chunk::<BLOCK_BYTES>()?;
            rest = after;
            bytes.copy_from_slice(kept);
            continue;
        }
        let mut block = Block::default();
        for plane in 0..8 {
            match tags >> (2 * plane) & 3 {
                ZERO => {}
                CONSTANT => {
                    let (byte, after) = rest.split_first()?;
                    rest = after;
                    block.iter_mut().for_each(|row| row[plane] = splat(*byte));
                }
                KEPT => {
                    let (kept, after) = rest.split_first_chunk::<BLOCK>()?;
                    rest = after;
                    for (row, from) in block.iter_mut().zip(kept.chunks_exact(8)) {
                        row[plane] = u64::from_le_bytes(from.try_into().expect("eight bytes"));
                    }
                }
                _ => return None,
            }
        }
        transpose(&mut block);
        for (word, to) in block.as_flattened().iter().zip(bytes.chunks_exact_mut(8)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
    rest.is_empty().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_shrink_to_what_differs() {
        let mut out = [0; 4096];
        let page = |f: &dyn Fn(u64) -> u64| -> Vec<u8> { (0..512).flat_map(|i| f(i).to_le_bytes()).collect() };
        // Two tag bytes for each of 32 blocks, and the planes that differ or are not zero.
        assert_eq!(encode(&page(&|_| 0), &mut out), Some(64));
        assert_eq!(encode(&page(&|_| 0x07_00_00_00_01), &mut out), Some(64 + 32 * 2));
        assert_eq!(encode(&page(&|i| i), &mut out), Some(64 + 32 * 16 + 16));
        assert_eq!(encode(&page(&|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)), &mut out), None);
    }

    #[test]
    fn what_is_not_a_code_is_refused() {
        let mut page = [0; BLOCK_BYTES];
        assert_eq!(decode(&[], &mut page), None);
        assert_eq!(decode(&[0, 0, 0], &mut page), None);
        assert_eq!(decode(&[3, 0], &mut page), None);
        assert_eq!(decode(&[1, 0], &mut page), None);
        assert_eq!(decode(&[2, 0, 1, 2, 3], &mut page), None);
        assert_eq!(decode(&[0, 0], &mut page), Some(()));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            shifts in proptest::collection::vec((0u32..64, any::<u64>()), 1..9),
            seed in any::<u64>(),
        ) {
            let mut x = seed | 1;
            let page: Vec<u8> = (0..512)
                .flat_map(|i| {
                    x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (shift, base) = shifts[i / 64 % shifts.len()];
                    (base ^ (x >> shift)).to_le_bytes()
                })
                .collect();
            let mut out = vec![0; 4200];
            let n = encode(&page, &mut out).unwrap();
            let mut back = vec![0xa5; 4096];
            prop_assert_eq!(decode(&out[..n], &mut back), Some(()));
            prop_assert_eq!(&back, &page);
            // Every other length is refused, and so is too small an output.
            prop_assert_eq!(decode(&out[..n - 1], &mut back), None);
            prop_assert_eq!(decode(&out[..n + 1], &mut back), None);
            prop_assert_eq!(encode(&page, &mut out[..n - 1]), None);
        }

        #[test]
        fn hostile_bytes_do_no_harm(coded in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode(&coded, &mut [0; 4 * BLOCK_BYTES]);
        }
    }
}
