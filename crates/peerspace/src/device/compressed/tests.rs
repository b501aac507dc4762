//! The store against an oracle, under threads, when it is full, and when it is damaged.

use super::check::Point;
use super::samples::{self, Dice, Kind};
use super::*;
use crate::device::{DeviceError, ForkSide};
use peerspace_core::sync::Ordering::Relaxed;
use proptest::prelude::*;
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

fn page_size() -> usize {
    rustix::param::page_size()
}

/// A store of so many pages' worth of RAM.
fn store_of(pages: u64, shards: usize) -> Compressed {
    Compressed::with(page_size(), pages * page_size() as u64, shards, 8).unwrap()
}

fn put(device: &Compressed, page: u64, bytes: &[u8]) -> Result<(), DeviceError> {
    let mut batch = [Store::new(page, bytes)];
    device.store(&mut batch);
    let [store] = batch;
    store.result
}

fn get(device: &Compressed, page: u64, pages: usize) -> Result<Vec<u8>, DeviceError> {
    let mut to = vec![0xa5; pages * device.page];
    let mut batch = [Load::new(page, &mut to)];
    device.load(&mut batch);
    let [load] = batch;
    load.result.map(|()| to)
}

fn free(device: &Compressed, first: u64, count: u64) {
    device.freed(DevicePages { first, count });
}

fn sample(kind: Kind, seed: u64) -> Vec<u8> {
    samples::page(page_size(), kind, seed)
}

/// Bytes of `ranges` that are in RAM, as the kernel says.
fn resident(ranges: &[std::ops::Range<usize>]) -> u64 {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let page = page_size();
    let mut sum = 0;
    for range in ranges {
        let mut words = vec![0u8; range.len().div_ceil(page) * 8];
        pagemap.read_exact_at(&mut words, (range.start / page * 8) as u64).unwrap();
        let present = |word: &[u8]| u64::from_le_bytes(word.try_into().unwrap()) >> 62 != 0;
        sum += words.chunks_exact(8).filter(|word| present(word)).count() * page;
    }
    sum as u64
}

/// Pages in a folio of the tests: as large as the engine's, or several chunks' worth.
const FOLIO: u64 = 512;
/// Single pages that tests use, behind two folios.
const SINGLES: u64 = 600;

#[derive(Debug, Clone)]
enum Op {
    Store { page: u64, kind: Kind, seed: u64 },
    StoreFolio { which: u64, kinds: Vec<Kind>, seed: u64 },
    StoreMany { from: u64, count: u64, kind: Kind, seed: u64 },
    Free { page: u64, count: u64 },
    FreeScattered { seed: u64 },
    FreeFolio { which: u64 },
    Load { page: u64, count: u64 },
    Holds { page: u64, at: usize },
}

fn ops() -> impl Strategy<Value = Op> {
    let page = 0..2 * FOLIO + SINGLES;
    prop_oneof![
        4 => (page.clone(), samples::kinds(), any::<u64>())
            .prop_map(|(page, kind, seed)| Op::Store { page, kind, seed }),
        2 => (0..2u64, proptest::collection::vec(samples::kinds(), 1..4), any::<u64>())
            .prop_map(|(which, kinds, seed)| Op::StoreFolio { which, kinds, seed }),
        3 => (page.clone(), 1..300u64, samples::kinds(), any::<u64>())
            .prop_map(|(from, count, kind, seed)| Op::StoreMany { from, count, kind, seed }),
        2 => (page.clone(), 1..100u64).prop_map(|(page, count)| Op::Free { page, count }),
        2 => any::<u64>().prop_map(|seed| Op::FreeScattered { seed }),
        1 => (0..2u64).prop_map(|which| Op::FreeFolio { which }),
        4 => (page.clone(), 1..FOLIO).prop_map(|(page, count)| Op::Load { page, count }),
        4 => (page, any::<usize>()).prop_map(|(page, at)| Op::Holds { page, at }),
    ]
}

/// The store and what should be in it.
struct Pair {
    device: Compressed,
    model: HashMap<u64, Vec<u8>>,
}

impl Pair {
    fn store(&mut self, page: u64, bytes: &[u8]) {
        let pages = page..page + (bytes.len() / page_size()) as u64;
        match put(&self.device, page, bytes) {
            Ok(()) => self.model.extend(pages.zip(bytes.chunks(page_size()).map(<[u8]>::to_vec))),
            Err(e) => {
                assert_eq!(e, DeviceError::NoSpace);
                // What the engine does: the pages hold nothing to rely on.
                free(&self.device, page, pages.end - pages.start);
                pages.for_each(|page| drop(self.model.remove(&page)));
            }
        }
    }

    fn free(&mut self, page: u64, count: u64) {
        free(&self.device, page, count);
        (page..page + count).for_each(|page| drop(self.model.remove(&page)));
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Store { page, kind, seed } => self.store(page, &sample(kind, seed)),
            Op::StoreFolio { which, kinds, seed } => {
                let bytes: Vec<u8> =
                    (0..FOLIO).flat_map(|i| sample(kinds[i as usize % kinds.len()], seed ^ i)).collect();
                self.store(which * FOLIO, &bytes);
            }
            Op::StoreMany { from, count, kind, seed } => {
                (from..from + count).for_each(|page| self.store(page, &sample(kind, seed ^ page)));
            }
            Op::Free { page, count } => self.free(page, count),
            Op::FreeScattered { seed } => {
                let mut dice = Dice(seed);
                let mut pages: Vec<u64> = self.model.keys().copied().collect();
                pages.sort_unstable();
                pages.into_iter().filter(|_| dice.below(4) != 0).for_each(|page| self.free(page, 1));
            }
            Op::FreeFolio { which } => self.free(which * FOLIO, FOLIO),
            Op::Load { page, count } => {
                let expected: Option<Vec<u8>> = (page..page + count)
                    .map(|page| self.model.get(&page))
                    .collect::<Option<Vec<_>>>()
                    .map(|v| v.into_iter().flatten().copied().collect());
                // Pages that were never stored are an error, not zeros.
                assert!(get(&self.device, page, count as usize) == expected.ok_or(DeviceError::Corrupt));
                for page in (page..page + count).filter(|page| self.model.contains_key(page)) {
                    assert!(get(&self.device, page, 1).as_ref() == Ok(&self.model[&page]), "page {page}");
                }
            }
            Op::Holds { page, at } => {
                let Some(bytes) = self.model.get(&page) else {
                    assert_ne!(self.device.holds(page, &sample(Kind::Zeros, 0)), Ok(true));
                    return;
                };
                assert_eq!(self.device.holds(page, bytes), Ok(true));
                let mut other = bytes.clone();
                other[at % page_size()] ^= 1 << (at % 8);
                assert_eq!(self.device.holds(page, &other), Ok(false));
            }
        }
        let usage = self.device.usage().unwrap();
        assert!(usage.used_bytes <= usage.peak_bytes && usage.peak_bytes <= self.device.account.limit());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_map(
        pages in prop_oneof![Just(160u64), Just(300), Just(1000), Just(4000)],
        shards in 1usize..4,
        ops in proptest::collection::vec(ops(), 1..60),
    ) {
        let mut pair = Pair { device: store_of(pages, shards), model: HashMap::new() };
        for op in ops {
            pair.run(op);
        }
        assert_eq!(pair.device.check(), 0);
        for (page, bytes) in &pair.model {
            assert!(get(&pair.device, *page, 1).as_ref() == Ok(bytes), "page {page}");
        }
        pair.device.before_fork();
        pair.device.after_fork(ForkSide::Child);
        let pages: Vec<u64> = pair.model.keys().copied().collect();
        pages.into_iter().for_each(|page| pair.free(page, 1));
        // Another free lets the compactor finish what it has in hand.
        (0..4).for_each(|shard| pair.device.slab.compact(shard, MOVES, &pair.device.index, &pair.device.account));
        assert_eq!(pair.device.check(), 0);
        assert_eq!(pair.device.usage().unwrap().used_bytes, 0);
        assert!(resident(&pair.device.charged()[..1]) == 0);
    }
}

#[test]
fn what_has_no_room_fails_alone() {
    let device = store_of(200, 1);
    let (noise, zeros) = (sample(Kind::Noise, 1), sample(Kind::Zeros, 0));
    // More noise than there is room for, with pages in between that need none.
    let contents: Vec<(u64, &[u8])> =
        (0..400).map(|page| (page, if page % 4 == 3 { &zeros[..] } else { &noise[..] })).collect();
    let mut results = Vec::new();
    for batch in contents.chunks(64) {
        let mut batch: Vec<Store<'_>> = batch.iter().map(|(page, bytes)| Store::new(*page, bytes)).collect();
        device.store(&mut batch);
        results.extend(batch.into_iter().map(|store| store.result));
    }
    assert!(results.iter().all(|r| matches!(r, Ok(()) | Err(DeviceError::NoSpace))));
    let stored = results.iter().filter(|r| r.is_ok()).count();
    assert!((100 + 150..100 + 200).contains(&stored), "{stored} of 400");
    // The batch that filled it up has both.
    assert!(results.chunks(64).any(|b| b.contains(&Ok(())) && b.contains(&Err(DeviceError::NoSpace))));
    for ((page, bytes), result) in contents.iter().zip(&results) {
        match result {
            Ok(()) => assert!(get(&device, *page, 1).as_deref() == Ok(*bytes), "page {page}"),
            Err(_) => assert_eq!(get(&device, *page, 1), Err(DeviceError::Corrupt)),
        }
    }
    // A folio has room or not as a whole, and leaves nothing behind when not.
    let noisy = |page: &u64| page % 4 != 3 && results[*page as usize].is_ok();
    (0..400).filter(noisy).take(32).for_each(|page| free(&device, page, 1));
    assert_eq!(put(&device, 1024, &noise.repeat(FOLIO as usize)), Err(DeviceError::NoSpace));
    assert_eq!(get(&device, 1024, 1), Err(DeviceError::Corrupt));
    (0..400).filter(noisy).take(32).for_each(|page| put(&device, page, &noise).unwrap());
    // What is full can still be overwritten, and takes more once something was freed.
    assert_eq!(put(&device, 0, &sample(Kind::Noise, 2)), Ok(()));
    assert_eq!(get(&device, 0, 1), Ok(sample(Kind::Noise, 2)));
    assert_eq!(put(&device, 1024, &noise), Err(DeviceError::NoSpace));
    free(&device, 1, 1);
    assert_eq!(put(&device, 1024, &noise), Ok(()));
    assert_eq!(device.check(), 0);
}

#[test]
fn a_full_store_makes_room_by_compaction() {
    let device = store_of(2000, 1);
    let mut n = 0;
    while put(&device, n, &sample(Kind::Text, n)).is_ok() {
        n += 1;
    }
    // A fifth is too little for compaction of its own accord, but enough for whole chunks.
    (0..n).step_by(5).for_each(|page| free(&device, page, 1));
    let stored = (n..2 * n).take_while(|page| put(&device, *page, &sample(Kind::Noise, *page)).is_ok()).count();
    assert!(stored as u64 > n / 5 / 3, "{stored} pages in the room of {}", n / 5);
    for page in (0..n).filter(|page| page % 5 != 0) {
        assert!(get(&device, page, 1) == Ok(sample(Kind::Text, page)), "page {page}");
    }
    assert_eq!(device.check(), 0);
}

#[test]
fn memory_of_scattered_pages_goes_back() {
    let device = store_of(8000, 2);
    let kinds = [Kind::Text, Kind::Noise, Kind::Pointers, Kind::HalfNoise, Kind::Sparse];
    let content = |page: u64| sample(kinds[page as usize % kinds.len()], page);
    let n = 8000;
    for page in 0..n {
        assert_eq!(put(&device, page, &content(page)), Ok(()), "page {page}");
    }
    let (before, used) = (resident(&device.charged()), device.usage().unwrap().used_bytes);
    assert!(before <= used + (64 << 10), "{before} bytes resident, {used} by our account");
    let mut dice = Dice(7);
    let kept: Vec<u64> = (0..n).filter(|_| dice.below(10) == 0).collect();
    let mut order: Vec<u64> = (0..n).filter(|page| kept.binary_search(page).is_err()).collect();
    (1..order.len()).for_each(|i| order.swap(i, dice.below(i as u64 + 1) as usize));
    for page in order {
        free(&device, page, 1);
        assert!(device.usage().unwrap().used_bytes <= used);
    }
    let (after, used) = (resident(&device.charged()), device.usage().unwrap().used_bytes);
    println!("{before} bytes resident, {after} after nine of ten pages were freed ({used} by our account)");
    assert!(after * 5 < before, "{before} bytes resident, {after} after nine of ten pages were freed");
    assert!(after <= used + (64 << 10), "{after} bytes resident, {used} by our account");
    assert_eq!(device.check(), 0);
    for page in kept {
        assert!(get(&device, page, 1) == Ok(content(page)), "page {page}");
    }
}

#[test]
fn same_filled_pages_take_no_store() {
    let device = store_of(1000, 1);
    for page in 0..5000 {
        assert_eq!(put(&device, page, &sample(Kind::Same, page % 7)), Ok(()));
    }
    assert_eq!(resident(&device.charged()[..1]), 0);
    assert!((0..5000).all(|page| get(&device, page, 1) == Ok(sample(Kind::Same, page % 7))));
    // Sixteen bytes each.
    assert!(device.usage().unwrap().used_bytes <= 5000 * 16 + page_size() as u64);
    assert_eq!(device.check(), 0);
}

#[test]
fn pages_of_any_size_are_stored() {
    for page in [4096, 16384, 65536] {
        let device = Compressed::with(page, 600 * page as u64, 1, 1).unwrap();
        let content = |i: u64| samples::page(page, samples::KINDS[i as usize % samples::KINDS.len()], i);
        let n = 500;
        for i in 0..n {
            assert_eq!(put(&device, i, &content(i)), Ok(()), "page {i} of {page} bytes");
        }
        for i in (0..n).step_by(3) {
            free(&device, i, 1);
        }
        for i in (0..n).filter(|i| i % 3 != 0) {
            assert!(get(&device, i, 1) == Ok(content(i)), "page {i} of {page} bytes");
            assert_eq!(device.holds(i, &content(i)), Ok(true));
            assert_eq!(device.holds(i, &content(i + 1)), Ok(false));
        }
        assert_eq!(device.check(), 0);
        free(&device, 0, n);
        free(&device, 0, n);
        assert_eq!(device.usage().unwrap().used_bytes, 0);
    }
}

#[test]
fn requests_out_of_bounds_are_refused() {
    let device = store_of(100, 1);
    let pages = device.describe().pages.0;
    let bytes = sample(Kind::Noise, 1);
    let refused = Err(DeviceError::Io(Errno::INVAL.raw_os_error()));
    assert_eq!(put(&device, pages - 1, &bytes), Ok(()));
    assert_eq!(put(&device, pages, &bytes), refused);
    assert_eq!(put(&device, u64::MAX, &bytes), refused);
    assert_eq!(put(&device, 0, &bytes[1..]), refused);
    assert_eq!(get(&device, pages - 1, 2).map(|_| ()), refused);
    assert!(device.holds(pages, &bytes).is_err());
    assert!(device.holds(0, &bytes[1..]).is_err());
    free(&device, pages - 1, u64::MAX);
    free(&device, u64::MAX, 2);
    assert_eq!(device.usage().unwrap().used_bytes, 0);
    // A store too small for anything is no reason to panic.
    let device = Compressed::new(100).unwrap();
    assert_eq!(put(&device, 0, &bytes), refused);
    let device = store_of(3, 1);
    assert_eq!(put(&device, 0, &bytes), Err(DeviceError::NoSpace));
    assert_eq!(put(&device, 0, &sample(Kind::Zeros, 0)), Ok(()));
}

/// Damage of every kind, to one page among many: each load gives the right bytes or says that they are lost, and
/// all other pages stay as they are (Z9).
#[test]
fn damage_is_found_and_stays_where_it_is() {
    let mut dice = Dice(11);
    let (mut found, mut tried) = (0, 0);
    let device = store_of(3000, 2);
    let n = 300;
    let content = |page: u64| sample(samples::KINDS[page as usize % samples::KINDS.len()], page);
    for page in 0..n {
        put(&device, page, &content(page)).unwrap();
    }
    for round in 0..4000 {
        let page = dice.below(n);
        let bits = if dice.below(2) == 0 { 1 << dice.below(64) } else { dice.roll() | 1 };
        let object = device.object(page);
        // What can be damaged: the two words of the index, the stored words, the word that names their page.
        let (index, store) = match (dice.below(4), object) {
            (0, _) => ((bits, 0), None),
            (1, _) => ((0, bits), None),
            (2, Some((at, len))) => ((0, 0), Some(at + dice.below(len.div_ceil(8) as u64))),
            (3, Some((at, len))) if len < page_size() => ((0, 0), Some(at - 1)),
            _ => continue,
        };
        let damage = || {
            device.damage_index(page, index.0, index.1);
            store.iter().for_each(|at| device.damage_store(*at, bits));
        };
        damage();
        let expected = content(page);
        tried += 1;
        match get(&device, page, 1) {
            Ok(bytes) => assert!(bytes == expected, "wrong bytes for page {page} in round {round}"),
            Err(e) => {
                assert_eq!(e, DeviceError::Corrupt);
                found += 1;
                // What cannot be loaded is not held either, or the engine would drop it from RAM.
                assert_ne!(device.holds(page, &expected), Ok(true));
            }
        }
        let other = (page + 1 + dice.below(n - 1)) % n;
        assert!(get(&device, other, 1) == Ok(content(other)), "page {other} in round {round}");
        match round % 3 {
            // Free the page as damaged as it is and store it anew; or overwrite it; or undo the damage.
            0 => {
                free(&device, page, 1);
                put(&device, page, &expected).unwrap();
            }
            1 => put(&device, page, &expected).unwrap(),
            _ => damage(),
        }
        assert!(get(&device, page, 1) == Ok(expected), "page {page} after round {round}");
    }
    assert!(found > tried / 2, "{found} of {tried}");
    for page in 0..n {
        assert!(get(&device, page, 1) == Ok(content(page)), "page {page}");
    }
    // Memory whose page is not known any more is lost, and nothing else is; also not when it is in the way of the
    // compactor.
    let lost = device.check();
    assert!(lost > 0);
    let moved = device.slab.moved.load(Relaxed);
    (0..n).filter(|page| page % 8 != 0).for_each(|page| free(&device, page, 1));
    assert!(device.slab.moved.load(Relaxed) > moved);
    for page in (0..n).step_by(8) {
        assert!(get(&device, page, 1) == Ok(content(page)), "page {page}");
    }
    assert_eq!(device.check(), lost);
}

/// Runs `threads` threads of `work`, which is given its number and told when to stop, while `main` runs.
fn beside(threads: u64, work: impl Fn(u64, &AtomicBool) + Sync, main: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|i| {
                scope.spawn({
                    let (work, stop) = (&work, &stop);
                    move || work(i, stop)
                })
            })
            .collect();
        main();
        stop.store(true, Relaxed);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// Every thread has pages of its own, side by side with those of the others; objects are moved all the time.
#[test]
fn threads_do_not_disturb_each_other() {
    let threads = 4;
    // Few kinds, so that there are many chunks of each size.
    let kinds = [Kind::Zeros, Kind::HalfNoise, Kind::Noise, Kind::Pointers];
    for (pages, shards) in [(1000, 1), (6000, 2)] {
        let device = store_of(pages, shards);
        let full = AtomicU64::new(0);
        let work = |me: u64, _: &AtomicBool| {
            let mut dice = Dice(me);
            let mut model: HashMap<u64, (Kind, u64)> = HashMap::new();
            for step in 0..20_000 {
                let page = dice.below(1000) * threads + me;
                match dice.below(8) {
                    0..4 => {
                        let (kind, seed) = (kinds[dice.below(4) as usize], dice.roll());
                        match put(&device, page, &sample(kind, seed)) {
                            Ok(()) => drop(model.insert(page, (kind, seed))),
                            Err(e) => {
                                assert_eq!(e, DeviceError::NoSpace);
                                full.fetch_add(1, Relaxed);
                                free(&device, page, 1);
                                model.remove(&page);
                            }
                        }
                    }
                    4 | 5 => match model.get(&page) {
                        Some((kind, seed)) => {
                            assert!(get(&device, page, 1) == Ok(sample(*kind, *seed)), "page {page}")
                        }
                        None => assert!(get(&device, page, 1).is_err()),
                    },
                    6 => {
                        if let Some((kind, seed)) = model.get(&page) {
                            assert_eq!(device.holds(page, &sample(*kind, *seed)), Ok(true));
                            assert_eq!(
                                device.holds(page, &sample(*kind, *seed ^ 1)) == Ok(true),
                                *kind == Kind::Zeros
                            );
                        }
                    }
                    _ => {
                        // Phases of growing and of shrinking.
                        let run = if step / 3000 % 2 == 0 { 1 } else { 40 };
                        for page in (page..page + run * threads).step_by(threads as usize) {
                            free(&device, page, 1);
                            model.remove(&page);
                        }
                    }
                }
            }
            for (page, (kind, seed)) in model {
                assert!(get(&device, page, 1) == Ok(sample(kind, seed)), "page {page}");
            }
        };
        beside(threads, work, || {});
        assert_eq!(device.check(), 0);
        let moved = device.slab.moved.load(Relaxed);
        println!("{moved} objects moved, {} stores without room", full.load(Relaxed));
        assert!(moved > 500, "only {moved} objects moved");
        assert_eq!(full.load(Relaxed) > 0, pages == 1000);
        let usage = device.usage().unwrap();
        assert!(usage.peak_bytes <= device.account.limit());
    }
}

/// Pages that are only ever loaded, while the compactor moves them: readers and movers meet in the same objects.
#[test]
fn loads_get_the_right_bytes_while_objects_move() {
    let device = store_of(6000, 1);
    let n = 2000;
    let kinds = [Kind::Text, Kind::Noise, Kind::HalfNoise, Kind::Pointers];
    let contents: Vec<Vec<u8>> = (0..n).map(|page| sample(kinds[page as usize % 4], page)).collect();
    let readers = |me: u64, stop: &AtomicBool| {
        let mut dice = Dice(me);
        while !stop.load(Relaxed) {
            // Every eighth page stays.
            let page = dice.below(n / 8) * 8 + me;
            match dice.below(2) {
                0 => assert!(get(&device, page, 1).as_ref() == Ok(&contents[page as usize]), "page {page}"),
                _ => assert_eq!(device.holds(page, &contents[page as usize]), Ok(true), "page {page}"),
            }
        }
    };
    for (page, bytes) in (0..).zip(&contents) {
        put(&device, page, bytes).unwrap();
    }
    beside(2, readers, || {
        let mut dice = Dice(99);
        for _ in 0..15 {
            let mut others: Vec<u64> = (0..n).filter(|page| page % 8 > 1).collect();
            (1..others.len()).for_each(|i| others.swap(i, dice.below(i as u64 + 1) as usize));
            others.iter().for_each(|page| free(&device, *page, 1));
            others.iter().for_each(|page| put(&device, *page, &contents[*page as usize]).unwrap());
        }
    });
    assert_eq!(device.check(), 0);
    let moved = device.slab.moved.load(Relaxed);
    assert!(moved > 2000, "only {moved} objects moved");
}

/// A store with pages of noise so scattered that whatever is freed next has one moved; and what is left of them.
fn scattered() -> (Arc<Compressed>, Vec<u64>) {
    let device = Arc::new(store_of(3000, 1));
    let n = 320;
    (0..n).for_each(|page| put(&device, page, &sample(Kind::Noise, page)).unwrap());
    // Without compaction, which needs a free slot in four.
    let left: Vec<u64> = (0..n).filter(|page| page % 5 != 0).collect();
    (0..n).step_by(5).for_each(|page| free(&device, page, 1));
    assert_eq!(device.slab.moved.load(Relaxed), 0);
    (device, left)
}

/// Moves objects of `device` until that of `page` is elsewhere.
fn move_away(device: &Compressed, page: u64) {
    let before = device.object(page);
    for _ in 0..1000 {
        device.slab.squeeze(0, 1, &device.index, &device.account);
        if device.object(page) != before {
            return;
        }
    }
    panic!("page {page} does not move");
}

#[test]
fn a_page_that_moves_while_it_is_read_is_read_again() {
    let (device, left) = scattered();
    // Its chunk is the one that the last page was freed of, and so the first to be emptied.
    let page = left[left.len() - 1];
    let old = device.object(page).unwrap().0;
    let meanwhile = Arc::clone(&device);
    check::at(Point::Found, move |_| {
        move_away(&meanwhile, page);
        // Other pages fill the slots, that which the page was in among them.
        let mut others = 1000..1200;
        assert!(others.any(|other| {
            put(&meanwhile, other, &sample(Kind::Noise, other)).unwrap();
            meanwhile.object(other).unwrap().0 == old
        }));
    });
    assert!(get(&device, page, 1) == Ok(sample(Kind::Noise, page)));
    assert_ne!(device.object(page).unwrap().0, old);
}

#[test]
fn a_page_that_changes_while_it_is_moved_is_what_it_was_changed_to() {
    for overwrite in [false, true] {
        let (device, left) = scattered();
        let (meanwhile, changed) = (Arc::clone(&device), Arc::new(AtomicU64::new(0)));
        let noted = Arc::clone(&changed);
        check::at(Point::Copied, move |page| {
            noted.store(page, Relaxed);
            match overwrite {
                true => put(&meanwhile, page, &sample(Kind::Noise, 77)).unwrap(),
                false => free(&meanwhile, page, 1),
            }
        });
        device.slab.squeeze(0, 1, &device.index, &device.account);
        let page = changed.load(Relaxed);
        assert_ne!(page, 0, "nothing was moved");
        assert_eq!(device.slab.moved.load(Relaxed), 0);
        match overwrite {
            true => assert!(get(&device, page, 1) == Ok(sample(Kind::Noise, 77))),
            false => assert_eq!(get(&device, page, 1), Err(DeviceError::Corrupt)),
        }
        for other in left.iter().filter(|other| **other != page) {
            assert!(get(&device, *other, 1) == Ok(sample(Kind::Noise, *other)), "page {other}");
        }
        // The slot it would have been moved to is free again.
        assert_eq!(device.check(), 0);
    }
}

#[test]
fn an_object_that_is_about_to_be_stored_is_left_alone() {
    let (device, left) = scattered();
    let slot = device.slab.alloc(0, WHOLE, 2000, &device.account).unwrap();
    let chunk = device.chunk_of(slot.at);
    // What the chunk has besides is freed, so that the compactor turns to it.
    let beside = |page: &&u64| device.chunk_of(device.object(**page).unwrap().0) == chunk;
    left.iter().filter(beside).for_each(|page| free(&device, *page, 1));
    (0..10).for_each(|_| device.slab.squeeze(0, 64, &device.index, &device.account));
    assert!(device.slab.moved.load(Relaxed) > 0);
    assert_eq!(device.check(), 1);
    assert_ne!(device.slab.free(2000, slot.at, &device.account), Freed::NotThere);
    assert_eq!(device.check(), 0);
}

/// Room that comes up while somebody brings a new chunk into use does not leave that chunk without an object, and so in use for
/// good (Z6).
#[test]
fn a_chunk_that_is_brought_into_use_is_used() {
    let device = Arc::new(store_of(100, 1));
    // A chunk of whole pages that is full.
    (0..16).for_each(|page| put(&device, page, &sample(Kind::Noise, page)).unwrap());
    let meanwhile = Arc::clone(&device);
    check::at(Point::Claimed, move |_| free(&meanwhile, 3, 1));
    put(&device, 16, &sample(Kind::Noise, 16)).unwrap();
    assert_eq!(get(&device, 3, 1), Err(DeviceError::Corrupt));
    assert_eq!(device.check(), 0);
    free(&device, 0, 17);
    assert_eq!(device.usage().unwrap().used_bytes, 0);
}

/// The memory of a leaf of the index comes and goes under threads that use it.
#[test]
fn index_memory_comes_and_goes_under_threads() {
    let device = store_of(1000, 1);
    let work = |me: u64, _: &AtomicBool| {
        for seed in 0..20_000 {
            let bytes = sample(Kind::Same, seed ^ me);
            put(&device, me, &bytes).unwrap();
            assert!(get(&device, me, 1) == Ok(bytes));
            free(&device, me, 1);
        }
    };
    beside(3, work, || {});
    assert_eq!(device.check(), 0);
    assert_eq!(device.usage().unwrap().used_bytes, 0);
}
