//! Regions: copying with errors instead of signals, slices of values, hints, and numbers that add up.

mod common;

use common::*;
use peerspace::device::DeviceError;
use peerspace::device::soft::Soft;
use peerspace::{Error, Faults, Hint, Region, Space, Use};
use std::time::Duration;

const HOST: usize = 4 * MIB;

fn lost_pages(faults: Faults) {
    let orders = Orders::new();
    let space = space(faults, HOST, Obedient::new(&orders, 64 * MIB));
    let mut region = space.region(8 * MIB as u64).unwrap();
    fill(region.typed_mut());
    push_out(&space, 2 * HOST);
    let bad = |i: usize| i % 7 == 3;
    let words: Vec<u64> = (0..region.len() / page()).filter(|i| bad(*i)).map(word).collect();
    orders.on_load(move |a| if words.contains(&a.word) { Answer::Fails(DeviceError::Io(5)) } else { Answer::Good });

    let mut lost = Vec::new();
    let mut copy = vec![0u8; page()];
    for i in 0..region.len() / page() {
        match region.try_read(i * page(), &mut copy) {
            Ok(()) => assert!(copy.chunks_exact(8).all(|w| w == word(i).to_le_bytes()), "page {i}"),
            Err(Error::Lost { range, device, .. }) => {
                assert!(bad(i), "page {i} should not be lost");
                assert_eq!(range.start.0 as usize, region.as_ptr() as usize + i * page());
                assert_eq!((range.len() as usize, device.as_str()), (page(), "obedient"));
                lost.push(i);
            }
            Err(e) => panic!("page {i}: {e}"),
        }
    }
    // What was still in RAM is not lost.
    let all = (0..region.len() / page()).filter(|i| bad(*i)).count();
    assert!(lost.len() > all / 2, "only {} pages of {all} were lost", lost.len());
    let s = space.statistics();
    assert_eq!(s.poisoned, lost.len() as u64);
    assert_eq!(s.device_errors, s.devices[0].errors);
    assert!(s.device_errors >= 2 * s.poisoned, "each was tried again: {} errors", s.device_errors);

    // It stays lost, for every kind of access; what is beside it is not.
    orders.on_load(|_| Answer::Good);
    let i = lost[lost.len() / 2];
    let mut three = vec![7u8; 3 * page()];
    let e = region.try_read((i - 1) * page(), &mut three).unwrap_err();
    assert!(three[..page()].chunks_exact(8).all(|w| w == word(i - 1).to_le_bytes()), "what comes before is copied");
    assert!(three[page()..].iter().all(|b| *b == 7), "what is lost is not made up");
    let said = e.to_string();
    let address = format!("{:#x}", region.as_ptr() as usize + i * page());
    assert!(said.contains(&address) && said.contains("obedient"), "{said}");
    let e = region.try_write((i - 1) * page(), &vec![9; 3 * page()]).unwrap_err();
    assert!(matches!(e, Error::Lost { .. }), "{e}");
    region.try_read((i - 1) * page(), &mut three[..page()]).unwrap();
    assert!(three[..page()].iter().all(|b| *b == 9), "what comes before is written");
    let e = space.make_resident(region.as_ptr(), MIB, peerspace::Use::Read).unwrap_err();
    assert!(matches!(e, Error::Lost { .. }), "{e}");
    if CAN_TRY {
        let first = |i: usize| read_byte(region.as_ptr().wrapping_add(i * page()));
        assert_eq!((first(i - 1), first(i), first(i)), (Some(9), None, None));
        assert_eq!(first(i + 1), Some(word(i + 1) as u8));
    }
    // Discarded, it is as good as new.
    for i in lost {
        region.discard(i * page()..(i + 1) * page()).unwrap();
        assert!(region.bytes()[i * page()..][..page()].iter().all(|b| *b == 0));
        region.try_write(i * page(), &[5; 100]).unwrap();
        assert_eq!(region.bytes()[i * page()..][99..101], [5, 0]);
    }
    space.check();
    drop(region);
    space.check();
    drop(space);
    orders.check();
    assert_eq!(orders.held(), 0, "pages were not freed");
}

#[test]
fn what_is_lost_is_said_by_signal() {
    lost_pages(Faults::Signal);
}

#[test]
fn what_is_lost_is_said_by_threads() {
    lost_pages(Faults::Threads);
}

#[test]
fn copies_of_any_size_are_right_while_memory_is_scarce() {
    for faults in [Faults::Signal, Faults::Threads] {
        let space = space(faults, HOST, Soft::new(64 * MIB as u64).unwrap());
        let mut region = space.region(16 * MIB as u64).unwrap();
        let mut model = vec![0u8; region.len()];
        let mut x = 88172645463325252u64;
        let mut random = move |n: usize| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 11) as usize % n
        };
        for round in 0..400 {
            let at = random(model.len());
            let len = random(if round % 40 == 0 { 5 * MIB } else { 20_000 }).min(model.len() - at);
            if round % 3 == 0 {
                let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + round) as u8).collect();
                region.try_write(at, &bytes).unwrap();
                model[at..at + len].copy_from_slice(&bytes);
            } else {
                let mut bytes = vec![1; len];
                region.try_read(at, &mut bytes).unwrap();
                assert!(bytes == model[at..at + len], "round {round}: {len} bytes at {at}");
            }
        }
        assert!(region.bytes() == model);
        // From one region to another.
        let mut other = space.region(16 * MIB as u64).unwrap();
        region.try_read(0, other.bytes_mut()).unwrap();
        assert!(other.bytes() == model);
        // Nothing is left held.
        space.check();
        push_out(&space, 2 * HOST);
        let s = space.statistics();
        assert_eq!((s.forced_bytes, s.poisoned, s.device_errors), (0, 0, 0));
        assert!(s.peak_bytes <= s.limit_bytes);
    }
}

#[test]
fn bounds_are_kept() {
    let space = space(Faults::Auto, HOST, Soft::new(64 * MIB as u64).unwrap());
    let mut region = space.region(1).unwrap();
    let len = region.len();
    region.try_write(len - 3, &[1, 2, 3]).unwrap();
    region.try_read(len, &mut []).unwrap();
    for (at, n) in [(len - 3, 4), (len, 1), (len + 1, 0), (usize::MAX, 1), (usize::MAX - 1, 3)] {
        let e = region.try_read(at, &mut vec![0; n]).unwrap_err();
        assert!(matches!(e, Error::BadRange { .. }), "{at}, {n}: {e}");
        let e = region.try_write(at, &vec![0; n]).unwrap_err();
        assert!(matches!(e, Error::BadRange { .. }), "{at}, {n}: {e}");
    }
    // Values of an odd size: as many as fit.
    assert_eq!(region.typed::<[u8; 3]>().len(), len / 3);
    region.typed_mut::<[u8; 3]>()[1] = [7, 8, 9];
    assert_eq!(region.bytes()[3..6], [7, 8, 9]);
}

fn huge_pages(space: &Space) -> bool {
    let mode = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let any = mode.contains('[') && !mode.contains("[never]") && page() == 4096;
    if !any {
        eprintln!("skipped: no huge pages here, in {space:?}");
    }
    any
}

#[test]
fn hints_choose_the_size_of_folios() {
    let space = space(Faults::Signal, 32 * MIB, Soft::new(64 * MIB as u64).unwrap());
    if !huge_pages(&space) {
        return;
    }
    let now = || (space.statistics().faults.huge, space.statistics().used_bytes as usize);
    let dense = space.region(8 * MIB as u64).unwrap();
    dense.advise(Hint::Dense).unwrap();
    assert_eq!(dense.bytes()[5 * MIB], 0);
    assert!(now().0 == 1 && now().1 >= 2 * MIB, "a single access brings in a block: {:?}", now());
    let (huge, used) = now();
    // A stream of faults would be served in huge folios otherwise.
    let mut sparse = space.region(8 * MIB as u64).unwrap();
    sparse.advise(Hint::Sparse).unwrap();
    sparse.bytes_mut()[..4 * MIB].fill(1);
    assert_eq!(now().0, huge);
    assert!(now().1 - used <= 4 * MIB + 16 * page());
    sparse.advise(Hint::Normal).unwrap();
    sparse.bytes_mut()[4 * MIB..].fill(1);
    assert!(now().0 > huge, "streams are served in huge folios again");
}

/// H3, H4: small pages become huge folios on request, with their content; what is missing is brought in.
#[test]
fn h3_small_pages_are_collapsed_on_request() {
    let space = space(Faults::Signal, 32 * MIB, Soft::new(64 * MIB as u64).unwrap());
    if !huge_pages(&space) {
        return;
    }
    let mut region = space.region(8 * MIB as u64).unwrap();
    region.advise(Hint::Sparse).unwrap();
    // All of three blocks, and every other page of the last one.
    let used = |page: usize| page < 1536 || page.is_multiple_of(2);
    for page in (0..2048).rev().filter(|p| used(*p)) {
        region.bytes_mut()[page * 4096] = page as u8 | 1;
    }
    assert_eq!(space.statistics().huge_mapped, 0);
    let error = region.collapse(0..8 * MIB).unwrap_err().to_string();
    assert!(error.contains("Sparse"), "{error}");
    // Not by themselves, although three of them are dense.
    region.advise(Hint::OnRequest).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(region.collapse(0..9 * MIB).is_err());
    assert_eq!(space.statistics().collapses, 0);
    // Only what lies inside: one block.
    assert_eq!(region.collapse(MIB..5 * MIB + 1).unwrap(), 2 * MIB);
    assert_eq!(space.statistics().thp.anon_huge_bytes as usize, 2 * MIB);
    assert_eq!(region.collapse(0..8 * MIB).unwrap(), 8 * MIB);
    let statistics = space.statistics();
    assert_eq!((statistics.thp.thp_collapse_alloc, statistics.thp.anon_huge_bytes as usize), (4, 8 * MIB));
    assert_eq!(statistics.used_bytes as usize, 8 * MIB);
    // Faults in such a region are resolved in small pages, streams as well.
    let mut small = space.region(4 * MIB as u64).unwrap();
    small.advise(Hint::OnRequest).unwrap();
    small.bytes_mut().fill(1);
    assert_eq!(space.statistics().thp.thp_fault_alloc, 0);
    drop(small);
    let right = |region: &Region| {
        (0..2048).all(|page| region.bytes()[page * 4096] == if used(page) { page as u8 | 1 } else { 0 })
    };
    assert!(right(&region));
    space.check();
    // They are folios like any other: they leave and come back whole.
    let mut other = space.region(32 * MIB as u64).unwrap();
    other.bytes_mut().fill(1);
    assert!(right(&region));
    space.check();
    // A collapse of what is away brings it home.
    other.bytes_mut().fill(2);
    assert_eq!(region.collapse(0..2 * MIB).unwrap(), 2 * MIB);
    assert!(right(&region));
    space.check();
}

/// H3: in the background too, where the block lacks little; not where it is sparse.
#[test]
fn h3_dense_blocks_are_collapsed_in_the_background() {
    let space = space(Faults::Signal, 64 * MIB, Soft::new(64 * MIB as u64).unwrap());
    if !huge_pages(&space) {
        return;
    }
    let mut region = space.region(16 * MIB as u64).unwrap();
    region.advise(Hint::Sparse).unwrap();
    // The first half lacks one page in sixteen, the second half all but one in sixteen.
    let used = |page: usize| (page < 2048) != page.is_multiple_of(16);
    for page in (0..4096).rev().filter(|p| used(*p)) {
        region.bytes_mut()[page * 4096] = page as u8 | 1;
    }
    // The last hint counts.
    region.advise(Hint::OnRequest).unwrap();
    region.advise(Hint::Normal).unwrap();
    // Enough faults for somebody to look.
    let mut more = space.region(8 * MIB as u64).unwrap();
    more.advise(Hint::Sparse).unwrap();
    let started = std::time::Instant::now();
    while space.statistics().collapses < 4 {
        assert!(started.elapsed().as_secs() < 60, "{:?}", space.statistics());
        more.discard(0..8 * MIB).unwrap();
        more.bytes_mut().iter_mut().step_by(4096).rev().for_each(|b| *b = 1);
    }
    drop(more);
    assert!((0..4096).all(|page| region.bytes()[page * 4096] == if used(page) { page as u8 | 1 } else { 0 }));
    assert_eq!(space.statistics().collapses, 4, "what is sparse stays so");
    space.check();
}

/// G3: what is set aside is first to leave, and comes back without input as long as it has not.
#[test]
fn g3_what_is_cold_is_set_aside() {
    let space = space(Faults::Signal, 32 * MIB, Soft::new(64 * MIB as u64).unwrap());
    let mut region = space.region(8 * MIB as u64).unwrap();
    region.advise(Hint::Dense).unwrap();
    region.bytes_mut()[..6 * MIB].fill(7);
    region.advise(Hint::Sparse).unwrap();
    // Not where the stream would go on.
    for at in (6 * MIB + page()..8 * MIB).step_by(8 * page()).rev() {
        region.bytes_mut()[at] = 9;
    }
    assert!(region.cold(0..9 * MIB).is_err());
    assert_eq!(region.cold(MIB..MIB + 1).unwrap(), 0);
    let kept = space.make_resident(&region.bytes()[3 * MIB], 1, Use::Write).unwrap();
    // Where there are no huge pages, the one that is kept stays alone.
    let stays = if huge_pages(&space) { 2 * MIB } else { page() };
    let used = 6 * MIB + 2 * MIB / 8;
    assert_eq!(region.cold(0..8 * MIB).unwrap(), used - stays);
    assert_eq!(space.statistics().standby_bytes as usize, used - stays);
    drop(kept);
    assert_eq!(region.cold(0..8 * MIB).unwrap(), stays);
    let right = || (0..2048).all(|n| region.bytes()[n * 4096] == [7, 9 * (n % 8 == 1) as u8][(n >= 1536) as usize]);
    assert!(right());
    space.check();
    let statistics = space.statistics();
    assert_eq!(statistics.pages_in, 0);
    // Small pages are copied back; what they leave is counted until it goes.
    assert!(statistics.standby_bytes as usize <= 2 * MIB / 8);
    assert_eq!(region.cold(0..8 * MIB).unwrap(), used + 2 * MIB - 2 * MIB / 8, "what was read is there as well");
}
