//! A directory that is not as it was written, or not on the device that it was made for: always refused, with what
//! was found and what was expected, and never touched.

use super::*;
use crate::device::dax::format::{DIRECTORY, UNFINISHED, slot_at};

/// Opens what is on `medium`, and demands that it be refused and left alone.
fn refused(medium: &Model, shape: Shape) -> NamesError {
    let before = medium.words.borrow().clone();
    let error = Names::open(medium, shape).map(drop).expect_err("it opens");
    assert!(*medium.words.borrow() == before, "refused, and changed all the same: {error}");
    error
}

#[test]
fn every_bit_counts() {
    let medium = Model::new(shape(20).device_bytes);
    let names = sample(&medium);
    let said = regions(&names);
    // Four regions made, one removed, one more made: six changes after the first.
    let sequence = 7;
    let slot = slot_at(sequence);
    let length = u64::from(u32::from_le_bytes(medium.bytes(slot + 32, 4).try_into().unwrap()));
    assert!(length > 200, "{length}");
    for at in (0..4096).chain(COMMIT..COMMIT + 8).chain(slot..slot + length) {
        for bit in 0..8 {
            medium.flip(at, bit);
            let error = refused(&medium, shape(20));
            let expected = match at {
                0..16 => matches!(error, NamesError::Foreign { at: 0, .. }),
                16..20 => matches!(error, NamesError::Version { expected: 1, .. }),
                20..64 => matches!(error, NamesError::Checksum { part: "the header", at: 0, .. }),
                64..4096 => matches!(error, NamesError::Inconsistent { at: found, .. } if found == at),
                COMMIT..8192 => matches!(error, NamesError::Checksum { part: "the commit word", at: COMMIT, .. }),
                // A length that cannot be has no sum.
                _ => match error {
                    NamesError::Checksum { part: "the current slot", at: found, .. } => found == slot,
                    NamesError::Inconsistent { at: found, .. } => found == slot + 32,
                    _ => false,
                },
            };
            assert!(expected, "bit {bit} of byte {at}: {error}");
            medium.flip(at, bit);
        }
    }
    // Nothing else does.
    let unused = [COMMIT + 8, 8192, 65528, slot_at(sequence + 1), slot_at(sequence + 1) + 8, slot + length];
    for at in unused.into_iter().chain([DIRECTORY - 1, DIRECTORY]) {
        medium.flip(at, 3);
        assert_eq!(regions(&Names::open(&medium, shape(20)).unwrap()), said, "byte {at}");
    }
}

#[test]
fn an_older_state_is_not_fallen_back_to() {
    let medium = Model::new(shape(20).device_bytes);
    drop(sample(&medium));
    // The slot of the state before is whole; the current one is gone altogether.
    for at in (0..400).step_by(8) {
        medium.set_word(slot_at(7) + at, 0);
    }
    let error = refused(&medium, shape(20));
    assert!(matches!(error, NamesError::Inconsistent { .. }), "{error}");
}

#[test]
fn a_device_that_is_shorter_than_it_was_is_refused() {
    let full = shape(20).device_bytes;
    let medium = Model::new(full);
    drop(sample(&medium));
    let lengths = [0, 1, 8, 63, 64, 4095, 4096, 4104, 8192, 1 << 16, 1 << 20, DIRECTORY - 1, DIRECTORY]
        .into_iter()
        .chain([2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK, full - BLOCK, full - 8, full - 1]);
    for len in lengths {
        let short = Model::with(len, medium.words.borrow().range(..len / 8 * 8).map(|(a, w)| (*a, *w)).collect());
        let error = refused(&short, Shape { device_bytes: len, ..shape(20) });
        let expected = if len < 4096 { DIRECTORY } else { full };
        assert!(
            matches!(error, NamesError::Truncated { found, expected: e } if found == len && e == expected),
            "{len}: {error}"
        );
        // Or it says that it is as long as ever, and fails.
        let result = Names::open(&short, shape(20));
        if len < slot_at(7) + 100 {
            assert!(matches!(result, Err(NamesError::Io { what: "read", .. })), "{len}");
        } else {
            assert_eq!(result.unwrap().iter().count(), 4, "{len}");
        }
    }
}

#[test]
fn a_device_that_looks_otherwise_is_refused() {
    let medium = Model::new(shape(20).device_bytes);
    drop(sample(&medium));
    let was = shape(20);
    let others = [
        (Shape { page_bytes: 65536, ..was }, "page size", 4096, 65536),
        (Shape { block_bytes: 4 << 20, ..was }, "block size", 2 << 20, 4 << 20),
        (Shape { block_bytes: 0, ..was }, "block size", 2 << 20, 0),
        (Shape { reserved_blocks: 1, ..was }, "number of reserved blocks", 2, 1),
        (Shape { reserved_blocks: 0, ..was }, "number of reserved blocks", 2, 0),
        (Shape { device_bytes: was.device_bytes + 1, ..was }, "device size", was.device_bytes, was.device_bytes + 1),
    ];
    for (other, differs, was, is) in others {
        match refused(&medium, other) {
            NamesError::Geometry { what, found, expected } => assert_eq!((what, found, expected), (differs, was, is)),
            error => panic!("{other:?}: {error}"),
        }
    }
}

#[test]
fn another_version_is_refused_by_its_number_whatever_its_checksum() {
    let medium = Model::new(shape(20).device_bytes);
    drop(sample(&medium));
    let word = medium.word(16);
    medium.set_word(16, word & !0xffff_ffff | 7);
    let error = refused(&medium, shape(20));
    assert!(matches!(error, NamesError::Version { found: 7, expected: 1 }), "{error}");
    assert_eq!(
        error.to_string(),
        "the device's directory is of version 7, and this build understands 1: use one that fits"
    );
}

#[test]
fn the_directory_of_another_life_is_refused() {
    let (one, other) = (Model::new(shape(20).device_bytes), Model::new(shape(20).device_bytes));
    drop((sample(&one), sample(&other)));
    // The other's commit word and slots, under the one's header.
    one.words.borrow_mut().retain(|at, _| *at < COMMIT);
    one.words.borrow_mut().extend(other.words.borrow().range(COMMIT..));
    let error = refused(&one, shape(20));
    assert!(matches!(error, NamesError::Checksum { part: "the commit word", .. }), "{error}");
}

#[test]
fn what_is_not_ours_is_neither_opened_nor_made_anew() {
    let near = |change: fn(&mut [u8; 16])| {
        let mut magic = *MAGIC;
        change(&mut magic);
        magic
    };
    let foreign: [(u64, [u8; 16]); 8] = [
        (0, *b"peerspace-pages\n"),
        (0, near(|m| m[15] = 0)),
        (0, near(|m| m[0] = 0)),
        (0, [0x89, b'n', b'a', b'm', b'e', b's', b'?', 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        // Where others begin: a partition table, a file system, another one, and the last that counts.
        (512, *b"EFI PART\0\0\x01\0\\\0\0\0"),
        (1024 + 56, *b"\x53\xef\x01\0\x01\0\0\0\0\0\0\0\0\0\0\0"),
        (65536 + 64, *b"_BHRfS_M\0\0\0\0\0\0\0\0"),
        (DIRECTORY - 16, *b"\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
    ];
    for (at, bytes) in foreign {
        let medium = Model::new(shape(20).device_bytes);
        medium.write(at, &bytes).unwrap();
        let before = medium.words.borrow().clone();
        assert_eq!(probe(&medium, shape(20)).unwrap(), Found::Foreign { at, found: bytes });
        for error in [refused(&medium, shape(20)), Names::create(&medium, shape(20)).map(drop).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(&format!("\"{}\" at offset {at},", bytes.escape_ascii())), "{text}");
        }
        assert!(*medium.words.borrow() == before);
    }
    // What lies behind the directory is nobody's business.
    let medium = Model::new(shape(20).device_bytes);
    medium.write(DIRECTORY, &[1; 8]).unwrap();
    assert_eq!(probe(&medium, shape(20)).unwrap(), Found::Empty);
    // Nor what is there of a directory that was not finished.
    medium.write(0, UNFINISHED).unwrap();
    medium.write(8, &[7; 8000]).unwrap();
    medium.write(slot_at(1), &[7; 8000]).unwrap();
    assert_eq!(probe(&medium, shape(20)).unwrap(), Found::Unfinished);
    drop(Names::create(&medium, shape(20)).unwrap());
    assert_eq!(Names::open(&medium, shape(20)).unwrap().iter().count(), 0);
}

#[test]
fn a_directory_is_made_only_where_one_can_be() {
    let good = shape(1);
    let medium = Model::new(good.device_bytes);
    let bad = [
        (Shape { page_bytes: 2048, ..good }, "page size"),
        (Shape { page_bytes: 6000, ..good }, "page size"),
        (Shape { page_bytes: 0, ..good }, "page size"),
        (Shape { block_bytes: 1 << 20, ..good }, "block size"),
        (Shape { block_bytes: 3 << 20, ..good }, "block size"),
        (Shape { block_bytes: 0, ..good }, "block size"),
        (Shape { page_bytes: 4 << 20, ..good }, "block size"),
        (Shape { reserved_blocks: 0, ..good }, "number of reserved blocks"),
        (Shape { reserved_blocks: 3, ..good }, "device size"),
        (Shape { device_bytes: 3 * BLOCK - 1, ..good }, "device size"),
        (Shape { device_bytes: 0, ..good }, "device size"),
    ];
    for (shape, expected) in bad {
        let result = Names::create(&medium, shape).map(drop);
        assert!(matches!(result, Err(NamesError::Shape { what, .. }) if what == expected), "{shape:?}: {result:?}");
    }
    assert!(medium.words.borrow().is_empty());
    assert_eq!(Names::create(&medium, good).unwrap().free_blocks(), 1);
    let again = Names::create(&medium, good).map(drop);
    assert!(matches!(again, Err(NamesError::Occupied)), "{again:?}");
}
