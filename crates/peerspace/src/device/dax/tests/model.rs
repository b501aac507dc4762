//! The directory against a model of it; how blocks are given out; names.

use super::*;
use proptest::prelude::*;

const DATA: u64 = 64;

fn no_zeros(_: &Extent) -> io::Result<()> {
    Ok(())
}

/// Lengths of the longest runs that `taken` leaves, longest first.
fn runs(taken: &BTreeSet<u64>) -> Vec<u64> {
    let mut runs = vec![0];
    for block in 2..DATA + 2 {
        if taken.contains(&block) {
            runs.push(0);
        } else if let Some(run) = runs.last_mut() {
            *run += 1;
        }
    }
    runs.retain(|n| *n > 0);
    runs.sort_unstable_by(|a, b| b.cmp(a));
    runs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_a_model_does(ops in proptest::collection::vec((0..12u8, 0..20u64, 1..BLOCK, any::<bool>()), 1..60)) {
        let shape = shape(DATA);
        let medium = Model::new(shape.device_bytes);
        let mut names = Names::create(&medium, shape).unwrap();
        // By name: bytes, id, blocks in order.
        let mut model: BTreeMap<String, (u64, u64, Vec<u64>)> = BTreeMap::new();
        let mut ids = BTreeSet::new();
        for (number, blocks, odd, reopen) in ops {
            let name = format!("{number}");
            let taken: BTreeSet<u64> = model.values().flat_map(|(_, _, b)| b.iter().copied()).collect();
            let free = runs(&taken);
            assert_eq!(names.free_blocks(), free.iter().sum::<u64>());
            if model.remove(&name).is_some() {
                let exists = names.create_region(&name, 1, no_zeros).map(drop);
                assert!(matches!(exists, Err(NamesError::Exists { .. })));
                names.remove(&name).unwrap();
            } else {
                assert!(matches!(names.remove(&name), Err(NamesError::Missing { .. })));
                let mut zeroed = Vec::new();
                let bytes = blocks * BLOCK + odd;
                let made = names.create_region(&name, bytes, |e| {
                    zeroed.push(*e);
                    Ok(())
                });
                match made {
                    Ok(region) => {
                        assert_eq!(&region.name, &name);
                        assert_eq!(region.bytes, bytes);
                        assert_eq!(&zeroed, &region.extents, "each zeroed, once");
                        assert!(ids.insert(region.id), "an id came twice");
                        let of = region.extents.iter().flat_map(|e| e.block..e.block + e.blocks).collect::<Vec<_>>();
                        assert_eq!(of.len() as u64, blocks + 1);
                        assert!(of.iter().all(|b| (2..DATA + 2).contains(b) && !taken.contains(b)));
                        // As few as can be: the longest runs that are enough.
                        let sums = free.iter().scan(0, |sum, n| { *sum += n; Some(*sum) });
                        let fewest = sums.take_while(|sum| *sum < blocks + 1).count() + 1;
                        assert_eq!(region.extents.len(), fewest);
                        model.insert(name, (bytes, region.id, of));
                    }
                    Err(NamesError::NoRoom { asked, free: all, largest }) => {
                        assert_eq!((asked, all), (blocks + 1, free.iter().sum()));
                        assert_eq!(largest, free.first().copied().unwrap_or(0));
                        assert!(asked > all);
                        assert!(zeroed.is_empty());
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            if reopen {
                drop(names);
                names = Names::open(&medium, shape).unwrap();
            }
            check(&names, shape);
            let said: BTreeMap<_, _> = names.iter().map(|r| {
                (r.name.clone(), (r.bytes, r.id, r.extents.iter().flat_map(|e| e.block..e.block + e.blocks).collect()))
            }).collect();
            assert_eq!(&said, &model);
        }
        for name in model.keys() {
            names.remove(name).unwrap();
        }
        assert_eq!(names.free_blocks(), DATA);
        let all = names.create_region("all", DATA * BLOCK, no_zeros).unwrap();
        assert_eq!(&all.extents, &[Extent { block: 2, blocks: DATA }]);
    }
}

#[test]
fn blocks_are_given_out_in_as_few_pieces_as_can_be() {
    let medium = Model::new(shape(DATA).device_bytes);
    let mut names = Names::create(&medium, shape(DATA)).unwrap();
    // Free in the end: 2 blocks at 2, 6 at 5, 4 at 12, 6 at 18, and nothing more.
    for (name, blocks) in [("a", 2), ("1", 1), ("b", 6), ("2", 1), ("c", 4), ("3", 2), ("d", 6), ("4", 42)] {
        names.create_region(name, blocks * BLOCK, no_zeros).unwrap();
    }
    assert_eq!(names.free_blocks(), 0);
    for name in ["a", "b", "c", "d"] {
        names.remove(name).unwrap();
    }
    assert_eq!(names.free_blocks(), 18);
    let mut made = |blocks: u64| {
        let region = names.create_region("x", blocks * BLOCK, no_zeros).unwrap();
        let extents: Vec<_> = region.extents.iter().map(|e| (e.block, e.blocks)).collect();
        names.remove("x").unwrap();
        extents
    };
    assert_eq!(made(1), [(2, 1)]);
    assert_eq!(made(3), [(5, 3)]);
    assert_eq!(made(6), [(5, 6)]);
    assert_eq!(made(7), [(5, 6), (2, 1)]);
    assert_eq!(made(9), [(5, 6), (12, 3)]);
    assert_eq!(made(12), [(5, 6), (18, 6)]);
    assert_eq!(made(15), [(5, 6), (18, 6), (12, 3)]);
    assert_eq!(made(18), [(5, 6), (18, 6), (12, 4), (2, 2)]);
    let error = names.create_region("x", 18 * BLOCK + 1, no_zeros).unwrap_err();
    assert!(matches!(error, NamesError::NoRoom { asked: 19, free: 18, largest: 6 }), "{error}");
    let error = names.create_region("x", u64::MAX, no_zeros).unwrap_err();
    assert!(matches!(error, NamesError::NoRoom { free: 18, .. }), "{error}");
    let error = names.create_region("x", 0, no_zeros).unwrap_err();
    assert!(matches!(error, NamesError::NoBytes { .. }), "{error}");
}

#[test]
fn an_id_is_never_used_again() {
    let medium = Model::new(shape(DATA).device_bytes);
    let mut names = Names::create(&medium, shape(DATA)).unwrap();
    for expected in 1..6 {
        assert_eq!(names.create_region("x", 1, no_zeros).unwrap().id, expected);
        names.remove("x").unwrap();
        names = Names::open(&medium, shape(DATA)).unwrap();
    }
}

#[test]
fn names_are_utf8_of_1_to_255_bytes_without_control_characters() {
    let medium = Model::new(shape(DATA).device_bytes);
    let mut names = Names::create(&medium, shape(DATA)).unwrap();
    let longest = "é".repeat(127) + "x";
    let good =
        ["a", " ", "/", "..", "db/table 1.idx", "größe", "名前", "🦀", "12345678", "1234567", "\u{a0}", &longest];
    for name in good {
        names.create_region(name, 1, no_zeros).unwrap();
    }
    let names = &mut Names::open(&medium, shape(DATA)).unwrap();
    assert_eq!(names.iter().count(), good.len());
    for name in good {
        assert_eq!(names.find(name).unwrap().name, name);
    }
    let bad = [
        (String::new(), "it is empty"),
        ("é".repeat(128), "it has 256 bytes, and 255 is the most"),
        ("a\0".into(), "there is a control character, '\\0', at byte 1"),
        ("a\nb".into(), "there is a control character, '\\n', at byte 1"),
        ("é\u{7f}".into(), "there is a control character, '\\u{7f}', at byte 2"),
        ("\u{85}".into(), "there is a control character, '\\u{85}', at byte 0"),
    ];
    for (name, expected) in bad {
        match names.create_region(&name, 1, no_zeros) {
            Err(NamesError::Name { name: said, why }) => assert_eq!((said, &*why), (name.clone(), expected)),
            other => panic!("{name:?}: {other:?}"),
        }
        assert_eq!(names.find(&name), None);
        assert!(matches!(names.remove(&name), Err(NamesError::Missing { .. })));
    }
}
