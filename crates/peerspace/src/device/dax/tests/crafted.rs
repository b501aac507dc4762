//! Slots with a right checksum that say what cannot be: refused, each with what is wrong, and never believed so far
//! as to panic or to take memory by their word. And slots as full as they can be.

use super::*;
use crate::device::dax::format::{SLOT, SLOT_HEAD, commit_word, encode, seal, slot_at};
use proptest::prelude::*;

const DATA: u64 = 20;
/// What crafted slots have.
const SEQUENCE: u64 = 2;
const NEXT: u64 = 10;

/// A medium with a directory, and its id.
fn made() -> (Model, u64) {
    let medium = Model::new(shape(DATA).device_bytes);
    drop(Names::create(&medium, shape(DATA)).unwrap());
    let id = medium.word(48);
    (medium, id)
}

/// Makes `slot` the current one.
fn put(medium: &Model, id: u64, slot: &[u8]) {
    let mut whole = slot.to_vec();
    whole.resize(slot.len().next_multiple_of(8), 0);
    medium.write(slot_at(SEQUENCE), &whole).unwrap();
    medium.write(COMMIT, &commit_word(id, SEQUENCE)).unwrap();
}

fn region(name: &str, id: u64, bytes: u64, extents: &[(u64, u64)]) -> Named {
    let extents = extents.iter().map(|(block, blocks)| Extent { block: *block, blocks: *blocks }).collect();
    Named { name: name.into(), id, bytes, extents }
}

/// Two that could be.
fn good() -> Vec<Named> {
    vec![region("aa", 1, 3 * BLOCK, &[(2, 2), (10, 1)]), region("bbbbbbbb", 9, 1, &[(21, 1)])]
}

fn open(medium: &Model) -> Result<Vec<Named>, NamesError> {
    let names = Names::open(medium, shape(DATA))?;
    check(&names, shape(DATA));
    Ok(regions(&names))
}

/// What is said of a directory of `regions`: the reason for which it is refused.
fn said_of(regions: &[Named]) -> String {
    let (medium, id) = made();
    put(&medium, id, &encode(id, SEQUENCE, NEXT, regions.iter()));
    match open(&medium) {
        Err(NamesError::Inconsistent { at, what }) => {
            assert!((slot_at(SEQUENCE)..slot_at(SEQUENCE) + 1000).contains(&at), "{at}");
            what
        }
        other => panic!("{regions:?}: {other:?}"),
    }
}

#[test]
fn a_good_one_is_taken() {
    let (medium, id) = made();
    put(&medium, id, &encode(id, SEQUENCE, NEXT, good().iter()));
    assert_eq!(open(&medium).unwrap(), good());
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let also = |more: Named| {
        let mut regions = good();
        regions.push(more);
        regions
    };
    let outside = "expected one or more within 2 to 22";
    let cases = [
        // Extents.
        (also(region("c", 2, 1, &[(3, 1)])), "expected no block in common"),
        (also(region("c", 2, 5 * BLOCK, &[(6, 5)])), "expected no block in common"),
        (also(region("c", 2, 2 * BLOCK, &[(5, 1), (5, 1)])), "expected no block in common"),
        (also(region("c", 2, 1, &[(22, 1)])), outside),
        (also(region("c", 2, 3 * BLOCK, &[(20, 3)])), outside),
        (also(region("c", 2, 1, &[(1, 1)])), outside),
        (also(region("c", 2, 1, &[(0, 1)])), outside),
        (also(region("c", 2, 1, &[(u64::MAX, 1)])), outside),
        (also(region("c", 2, 1, &[(5, u64::MAX)])), outside),
        (also(region("c", 2, 1, &[(5, u64::MAX - 4)])), outside),
        (also(region("c", 2, 1, &[(5, 1), (7, 0)])), outside),
        // Lengths that do not fit.
        (also(region("c", 2, 1, &[])), "of 1 bytes has 0 blocks; expected 1"),
        (also(region("c", 2, 0, &[])), "of 0 bytes has 0 blocks; expected 1"),
        (also(region("c", 2, 0, &[(5, 1)])), "of 0 bytes has 1 blocks; expected 1"),
        (also(region("c", 2, BLOCK, &[(5, 2)])), "has 2 blocks; expected 1"),
        (also(region("c", 2, BLOCK + 1, &[(5, 1)])), "has 1 blocks; expected 2"),
        (also(region("c", 2, u64::MAX, &[(5, 1)])), "has 1 blocks; expected 8796093022208"),
        // Names.
        (also(region("bbbbbbbb", 2, 1, &[(5, 1)])), "expected names in order, each once"),
        (also(region("b", 2, 1, &[(5, 1)])), "expected names in order, each once"),
        (also(region("", 2, 1, &[(5, 1)])), "cannot be a name: it is empty"),
        (also(region("c\n", 2, 1, &[(5, 1)])), "cannot be a name: there is a control character"),
        (also(region(&"c".repeat(256), 2, 1, &[(5, 1)])), "a name has 256 bytes; expected 1 to 255"),
        // Ids.
        (also(region("c", 1, 1, &[(5, 1)])), "have the same id 1"),
        (also(region("c", 0, 1, &[(5, 1)])), "has id 0; expected 1 to 9"),
        (also(region("c", NEXT, 1, &[(5, 1)])), "has id 10; expected 1 to 9"),
        (also(region("c", u64::MAX, 1, &[(5, 1)])), "; expected 1 to 9"),
    ];
    for (regions, expected) in cases {
        let said = said_of(&regions);
        assert!(said.contains(expected), "{:?}: {said}", regions.last());
    }
}

#[test]
fn slots_that_cannot_be_are_refused() {
    let (medium, id) = made();
    let sound = encode(id, SEQUENCE, NEXT, good().iter());
    let end = sound.len() as u32;
    // Of the first region: its extents, and its name with six zeros.
    let (extents, length, name) = (SLOT_HEAD + 16, SLOT_HEAD + 20, SLOT_HEAD + 24 + 32);
    assert_eq!(sound[name..name + 8], *b"aa\0\0\0\0\0\0");
    let lengths = "expected a multiple of 8 from 40 to 983040";
    let cases: Vec<(usize, Vec<u8>, &str)> = vec![
        (8, (SEQUENCE + 1).to_le_bytes().into(), "expected one that ends in 0x2"),
        (8, (SEQUENCE | 1 << 63).to_le_bytes().into(), "expected one that ends in 0x2"),
        (16, (id ^ 1).to_le_bytes().into(), "the slot belongs to device"),
        (24, 0u64.to_le_bytes().into(), "the next region's id is 0"),
        (24, u64::MAX.to_le_bytes().into(), "the next region's id is 18446744073709551615"),
        (32, 0u32.to_le_bytes().into(), lengths),
        (32, 32u32.to_le_bytes().into(), lengths),
        (32, (end - 1).to_le_bytes().into(), lengths),
        (32, (SLOT as u32 + 8).to_le_bytes().into(), lengths),
        (32, u32::MAX.to_le_bytes().into(), lengths),
        (36, 0u32.to_le_bytes().into(), "more bytes of regions"),
        (36, 1u32.to_le_bytes().into(), "more bytes of regions"),
        (36, 3u32.to_le_bytes().into(), "1 times 24 bytes of a region are due, and the slot has 0 more bytes"),
        (36, u32::MAX.to_le_bytes().into(), "1 times 24 bytes of a region are due"),
        (extents, u32::MAX.to_le_bytes().into(), "4294967295 times 16 bytes of extents are due"),
        (length, 256u32.to_le_bytes().into(), "a name has 256 bytes"),
        (length, u32::MAX.to_le_bytes().into(), "a name has 4294967295 bytes"),
        (length, 200u32.to_le_bytes().into(), "1 times 200 bytes of a name are due"),
        (name + 2, vec![1], "something follows the name \"aa\"; expected zeros"),
        (name + 7, vec![b'x'], "something follows the name \"aa\"; expected zeros"),
        (name, vec![0xff], "a name is \"\\xffa\"; expected UTF-8"),
    ];
    for (at, bytes, expected) in cases {
        let mut slot = sound.clone();
        slot[at..at + bytes.len()].copy_from_slice(&bytes);
        seal(&mut slot);
        put(&medium, id, &slot);
        match open(&medium) {
            Err(NamesError::Inconsistent { what, .. }) => assert!(what.contains(expected), "{at}: {what}"),
            other => panic!("{at}, {expected}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_slot_says_it_is_refused_or_sound(
        changes in proptest::collection::vec((SLOT_HEAD - 8..240usize, 0..24u8, any::<u64>()), 1..4),
    ) {
        let (medium, id) = made();
        let mut slot = encode(id, SEQUENCE, NEXT, good().iter());
        for (at, value, wild) in changes {
            // Mostly small values in the low byte of a field, and sometimes anything anywhere.
            let at = at % slot.len();
            if wild % 4 == 0 {
                slot[at] = wild as u8;
            } else if at / 4 * 4 >= 32 {
                slot[at / 4 * 4] = value;
            }
        }
        // By the length that it says, where it can be.
        let length = u32::from_le_bytes(slot[32..36].try_into().unwrap()) as usize;
        if (SLOT_HEAD..SLOT).contains(&length) {
            slot.resize(length, 0);
        }
        seal(&mut slot);
        put(&medium, id, &slot);
        match open(&medium) {
            Ok(_) | Err(NamesError::Inconsistent { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_directory_can_be_filled_to_its_last_byte_and_no_further() {
    const EACH: usize = 24 + 16 + 256;
    let count = (SLOT - SLOT_HEAD) / EACH;
    let shape = shape(2 * count as u64);
    let medium = Model::new(shape.device_bytes);
    drop(Names::create(&medium, shape).unwrap());
    let id = medium.word(48);
    let name = |i: usize| format!("{i:0255}");
    // Every other block, so that nothing larger than one is free.
    let regions: Vec<_> = (0..count).map(|i| region(&name(i), i as u64 + 1, 1, &[(3 + 2 * i as u64, 1)])).collect();
    let slot = encode(id, SEQUENCE, count as u64 + 1, regions.iter());
    let left = SLOT - slot.len();
    assert!((48..EACH - 8).contains(&left), "{left}");
    put(&medium, id, &slot);
    let mut names = Names::open(&medium, shape).unwrap();
    assert_eq!(names.iter().count(), count);
    let mut zeroed = 0;
    let mut create = |names: &mut Names<&Model>, name: &str, blocks| {
        let zero = |_: &Extent| {
            zeroed += 1;
            Ok(())
        };
        names.create_region(name, blocks * BLOCK, zero).map(drop)
    };
    let error = create(&mut names, &name(count), 1).unwrap_err();
    let expected = (count, slot.len(), SLOT, EACH, 1);
    match error {
        NamesError::Full { regions, used, capacity, needed, extents } => {
            assert_eq!((regions, used, capacity, needed, extents), expected);
        }
        error => panic!("{error}"),
    }
    // One byte of its name too many, and as many as fit.
    let longest = left - 40;
    let error = create(&mut names, &"x".repeat(longest + 1), 1).unwrap_err();
    assert!(matches!(error, NamesError::Full { .. }), "{error}");
    let error = create(&mut names, &"x".repeat(longest - 8), 3).unwrap_err();
    assert!(matches!(error, NamesError::Full { extents: 3, .. }), "{error}");
    create(&mut names, &"x".repeat(longest), 1).unwrap();
    assert_eq!(zeroed, 1, "nothing is zeroed for a region that has no place");
    let names = Names::open(&medium, shape).unwrap();
    assert_eq!(names.iter().count(), count + 1);
    check(&names, shape);
}
