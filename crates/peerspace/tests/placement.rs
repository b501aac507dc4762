//! Exactly the pages that somebody names go where he says, over the real kernel (rules G8, H2, Z8, Z9).

mod common;
#[path = "placement/devices.rs"]
mod devices;
#[path = "placement/in_place.rs"]
mod in_place;
#[path = "placement/own_memory.rs"]
mod own_memory;
#[path = "placement/view.rs"]
mod view;

use common::{MIB, fill, is_filled, mib, page, word, words_per_page};
use peerspace::device::mmu::Mode;
use peerspace::device::soft::{Accelerator, Failure, Lane, Options, Soft};
use peerspace::{DeviceId, Error, Faults, Node, Region, Residence, Space, Use};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

fn build(faults: Faults, gpus: &[&Accelerator]) -> (Space, Vec<DeviceId>) {
    let mut builder = Space::builder().host(mib(64)).device(Soft::new(mib(256)).unwrap()).faults(faults);
    for gpu in gpus {
        builder = builder.device((*gpu).clone());
    }
    let space = builder.build().unwrap();
    let ids = space.devices()[1..].to_vec();
    (space, ids)
}

fn gpu(bytes: usize, name: &str) -> Accelerator {
    Accelerator::new(Options::new(mib(bytes)).name(name)).unwrap()
}

/// Bytes of the memory at `range` that are on a device.
fn used(space: &Space, range: Range<*const u8>, id: DeviceId) -> usize {
    let pages = space.pages(range.start, range.end as usize - range.start as usize).unwrap();
    pages.filter(|view| matches!(view.residence, Residence::Device { id: at, .. } if at == id)).count() * page()
}

fn whole(region: &Region) -> Range<*const u8> {
    region.as_ptr().cast_const()..region.as_ptr().wrapping_add(region.len()).cast_const()
}

/// Faults of the CPU that brought something.
fn brought(space: &Space) -> u64 {
    let faults = space.statistics().faults;
    faults.zero_fill + faults.standby + faults.device
}

/// Has a device read all of `part`; what it reads is what each page was filled with. Returns its faults.
fn reads(gpu: &Accelerator, region: &Region, part: Range<usize>) -> u64 {
    let (base, pages) = (region.as_ptr() as u64, part.start / page()..part.end.div_ceil(page()));
    let before = gpu.statistics().faults;
    let first = pages.start;
    let kernel = move |lane: &Lane, items: Range<u64>| {
        let mut bytes = vec![0u64; words_per_page()];
        for i in items {
            let i = i as usize + first;
            lane.read(base + (i * page()) as u64, bytemuck::cast_slice_mut(&mut bytes))?;
            assert!(bytes.iter().all(|w| *w == word(i)), "page {i} on the device");
        }
        Ok(())
    };
    // SAFETY: the region outlives the job, and any bytes make a word.
    unsafe { gpu.launch(pages.len() as u64, kernel) }.unwrap().wait().unwrap();
    gpu.statistics().faults - before
}

fn both() -> [Faults; 2] {
    [Faults::Signal, Faults::Threads]
}

/// The mappings that a part of the process's memory consists of.
fn mappings(part: Range<*const u8>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ranges = maps.lines().map(|line| {
        let (from, to) = line.split_ascii_whitespace().next().unwrap().split_once('-').unwrap();
        [from, to].map(|at| usize::from_str_radix(at, 16).unwrap())
    });
    ranges.filter(|[from, to]| *from < part.end as usize && *to > part.start as usize).count()
}

/// Memory of the program's own, of zeros.
fn reserve(len: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// The same, filled, for good.
fn own(len: usize) -> (*mut u8, &'static mut [u64]) {
    let at = reserve(len);
    // SAFETY: the mapping is the test's own for good.
    let words = unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), len / 8) };
    fill(words);
    (at, words)
}

/// Rules G8, H2: one page, pages that begin and end anywhere, blocks, and blocks with edges go, and their neighbours stay.
#[test]
fn g8_exactly_the_pages_named_go_to_a_device_and_home() {
    for faults in both() {
        let a = gpu(48, "a");
        let (space, ids) = build(faults, &[&a]);
        let region = common::filled(&space, 24 * MIB);
        let p = page();
        let ranges = [
            0..1,
            5 * p..6 * p,
            7 * p - 1..7 * p + 1,
            3 * MIB..3 * MIB + 77 * p,
            2 * MIB..4 * MIB,
            4 * MIB - p..6 * MIB + p,
            7 * MIB + 3 * p..19 * MIB - 5 * p,
            0..24 * MIB,
        ];
        for part in ranges {
            let pages = part.start / p * p..part.end.next_multiple_of(p);
            let there = region.migrate(part.clone(), Node::Device(ids[0])).unwrap();
            assert_eq!((there, used(&space, whole(&region), ids[0])), (pages.len(), pages.len()), "{part:?}");
            assert_eq!(reads(&a, &region, pages.clone()), 0, "{part:?}: the device faults");
            // What lies beside it has not been moved.
            let before = brought(&space);
            let bytes = region.bytes();
            assert!((0..pages.start).chain(pages.end..bytes.len()).step_by(p).all(|i| bytes[i] == word(i / p) as u8));
            assert_eq!(brought(&space), before, "{part:?}: its neighbours have moved too");
            assert_eq!(region.migrate(part.clone(), Node::Host).unwrap(), pages.len());
            assert_eq!(used(&space, whole(&region), ids[0]), 0, "{part:?}");
            let before = brought(&space);
            assert!(is_filled(&region), "{part:?}");
            assert_eq!(brought(&space), before, "{part:?}: the CPU faults");
            space.check();
        }
    }
}

/// Rule G3: memory that nobody has touched becomes zeros on the device, and stays memory that nobody has touched at home.
#[test]
fn g3_untouched_pages_become_zeros_on_the_device() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    let p = page();
    for part in [0..p, MIB..5 * MIB, 0..8 * MIB] {
        assert_eq!(region.migrate(part.clone(), Node::Device(ids[0])).unwrap(), part.len());
        assert!(used(&space, whole(&region), ids[0]) >= part.len());
    }
    assert_eq!(space.statistics().faults.zero_fill, 0);
    assert!(region.bytes().iter().all(|b| *b == 0));
    let untouched = space.region(mib(2)).unwrap();
    assert_eq!(untouched.migrate(0..2 * MIB, Node::Host).unwrap(), 0);
    assert_eq!(region.migrate(0..0, Node::Device(ids[0])).unwrap(), 0);
    space.check();
}

/// Rule G6: from one device to another, in part and whole.
#[test]
fn g6_pages_go_from_one_device_to_another() {
    let (a, b) = (gpu(32, "a"), gpu(32, "b"));
    let (space, ids) = build(Faults::Signal, &[&a, &b]);
    let region = common::filled(&space, 8 * MIB);
    let all = 0..8 * MIB;
    assert_eq!(region.migrate(all.clone(), Node::Device(ids[0])).unwrap(), 8 * MIB);
    let middle = 3 * MIB + page()..6 * MIB + 9 * page();
    assert_eq!(region.migrate(middle.clone(), Node::Device(ids[1])).unwrap(), middle.len());
    assert_eq!([ids[0], ids[1]].map(|id| used(&space, whole(&region), id)), [8 * MIB - middle.len(), middle.len()]);
    assert_eq!(reads(&b, &region, middle.clone()), 0);
    assert_eq!(reads(&a, &region, 0..2 * MIB), 0);
    assert_eq!(b.statistics().peer_bytes_in, middle.len() as u64);
    assert_eq!(region.migrate(all.clone(), Node::Device(ids[1])).unwrap(), 8 * MIB);
    assert_eq!(used(&space, whole(&region), ids[0]), 0);
    assert!(is_filled(&region));
    space.check();
}

/// Rules H5, Z8: what is kept resident stays, at once, and everything around it goes.
#[test]
fn h5_what_is_relied_on_stays_and_the_rest_goes() {
    let a = gpu(32, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let mut region = common::filled(&space, 8 * MIB);
    let p = page();
    let pinned: Vec<_> = [3, 700, 701, 1500]
        .iter()
        .map(|i| space.make_resident(&raw const region.bytes()[i * p], 1, Use::Write).unwrap())
        .collect();
    let began = std::time::Instant::now();
    let there = region.migrate(0..8 * MIB, Node::Device(ids[0])).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // A huge folio that is pinned stays in one piece.
    assert!(there.is_multiple_of(p) && (2 * MIB..8 * MIB).contains(&there), "{there}");
    let before = brought(&space);
    [3, 700, 701, 1500].iter().for_each(|i| assert_eq!(region.typed::<u64>()[i * words_per_page()], word(*i)));
    assert_eq!(brought(&space), before);
    drop(pinned);
    assert_eq!(region.migrate(0..8 * MIB, Node::Device(ids[0])).unwrap(), 8 * MIB);
    assert!(is_filled(&region));
    fill(region.typed_mut());
    space.check();
}

/// Rules G7, H2: to a device that is smaller than the range as much goes as it holds, and the first of it.
#[test]
fn g7_a_device_that_is_too_small_takes_what_it_can() {
    for bytes in [1, 3, 8] {
        let a = gpu(bytes, "a");
        let (space, ids) = build(Faults::Signal, &[&a]);
        let region = common::filled(&space, 16 * MIB);
        let there = region.migrate(0..16 * MIB, Node::Device(ids[0])).unwrap();
        assert!(there > bytes * MIB / 2 && there <= bytes * MIB, "{there} of {bytes} MiB");
        assert_eq!(used(&space, whole(&region), ids[0]), there);
        assert_eq!(reads(&a, &region, 0..MIB / 2), 0, "the first went first");
        assert!(is_filled(&region));
        space.check();
    }
}

/// Rules G2, G8: data is what was written last while pages go to and fro under a CPU that reads and writes them.
#[test]
fn g2_migration_under_a_cpu_that_uses_the_pages() {
    for faults in both() {
        let (a, b) = (gpu(16, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let region = space.region(mib(8)).unwrap();
        let (base, p) = (region.as_ptr() as usize, page());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|t| {
                    let stop = &stop;
                    scope.spawn(move || {
                        let mut counts = vec![0u64; 8 * MIB / p];
                        let mut i = t;
                        while !stop.load(Relaxed) {
                            i = (i + 7 * 2) % counts.len();
                            // SAFETY: the region outlives the scope, and this word is this thread's own.
                            unsafe {
                                let word = (base + i * p + 8 * t) as *mut u64;
                                assert_eq!(word.read_volatile(), counts[i], "page {i}");
                                counts[i] += 1;
                                word.write_volatile(counts[i]);
                            }
                        }
                        counts
                    })
                })
                .collect();
            let nodes = [Node::Device(ids[0]), Node::Device(ids[1]), Node::Host];
            for round in 0..60usize {
                let from = round * 977 % 1900 * p;
                let to = (from + 1 + round * 131_071 % (3 * MIB)).min(8 * MIB);
                let there = region.migrate(from..to, nodes[round % 3]).unwrap();
                assert!(there <= (to - from).next_multiple_of(p) + p);
            }
            stop.store(true, Relaxed);
            for (t, writer) in writers.into_iter().enumerate() {
                let counts = writer.join().unwrap();
                for (i, count) in counts.iter().enumerate() {
                    let there = region.typed::<u64>()[i * words_per_page() + t];
                    assert_eq!(there, *count, "page {i} of writer {t}");
                }
            }
        });
        space.check();
    }
}

/// Rule G9: a device that would get copies or stay remote gets the pages themselves when they are sent.
#[test]
fn g9_what_is_sent_moves_in_every_mode() {
    for mode in [Mode::Share, Mode::Exclusive, Mode::Replicate] {
        let a = Accelerator::new(Options::new(mib(16)).mode(mode)).unwrap();
        let (space, ids) = build(Faults::Signal, &[&a]);
        let region = common::filled(&space, 4 * MIB);
        assert_eq!(region.migrate(MIB..4 * MIB, Node::Device(ids[0])).unwrap(), 3 * MIB, "{mode:?}");
        assert_eq!(used(&space, whole(&region), ids[0]), 3 * MIB);
        region.allow_devices(0..4 * MIB, Use::Read).unwrap();
        // What devices may only read can be sent there as well.
        assert_eq!(region.migrate(0..4 * MIB, Node::Device(ids[0])).unwrap(), 4 * MIB, "{mode:?}");
        reads(&a, &region, 0..4 * MIB);
        assert!(is_filled(&region));
        space.check();
    }
}

/// Rules G1, G8: memory that the program has of its own, which the kernel has populated or not.
#[test]
fn g1_adopted_memory_migrates_by_the_page() {
    for faults in both() {
        let a = gpu(32, "a");
        let (space, ids) = build(faults, &[&a]);
        let len = 12 * MIB;
        // SAFETY: a new mapping.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the mapping is this test's own; the second half of it is not touched.
        let words = unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), len / 8) };
        fill(&mut words[..len / 16]);
        let adopted = space.adopt(at.cast(), len).unwrap();
        let start = at.cast::<u8>();
        let all = start.cast_const()..start.wrapping_add(len).cast_const();
        let node = Node::Device(ids[0]);
        assert_eq!(space.migrate(start.wrapping_add(5 * page()), page(), node).unwrap(), page());
        assert_eq!(used(&space, all.clone(), ids[0]), page());
        assert_eq!(space.migrate(start.wrapping_add(MIB + page()), 9 * MIB, node).unwrap(), 9 * MIB);
        assert_eq!(used(&space, all.clone(), ids[0]), 9 * MIB + page());
        assert_eq!(adopted.migrate(node).unwrap(), len);
        let good = |(i, page): (usize, &[u64])| {
            page.iter().all(|w| *w == if i < len / 2 / common::page() { word(i) } else { 0 })
        };
        assert!(words.chunks(words_per_page()).enumerate().all(good));
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(adopted.migrate(Node::Host).unwrap(), len);
        assert!(words.chunks(words_per_page()).enumerate().all(good));
        // What the program may only read, or not at all, stays; the rest goes.
        // SAFETY: the mapping is this test's own, and nobody writes to these pages below.
        unsafe {
            assert_eq!(libc::mprotect(start.add(MIB).cast(), MIB, libc::PROT_READ), 0);
            assert_eq!(libc::mprotect(start.add(3 * MIB).cast(), page(), libc::PROT_NONE), 0);
        }
        let there = adopted.migrate(node).unwrap();
        assert_eq!(there, len - MIB - page());
        assert!(words[MIB / 8..2 * MIB / 8].chunks(512).enumerate().all(|(i, p)| p[0] == word(i + MIB / page())));
        let e = space.migrate(start.wrapping_sub(2 * page()), 4 * page(), node).unwrap_err();
        assert!(matches!(e, Error::BadRange { .. }), "{e}");
        space.check();
        adopted.release().unwrap();
        // SAFETY: it is not used any more.
        unsafe { libc::munmap(at, len) };
    }
}

/// Rules G1, G3: a device that uses memory where it is reads a page that nobody has touched, among others that the kernel has
/// populated. In the first page of a block, too.
#[test]
fn g3_an_untouched_page_among_the_kernels_own_is_read_as_zeros() {
    for protected in [false, true] {
        let a = Accelerator::new(Options::new(mib(4)).mode(Mode::Share)).unwrap();
        let (space, _) = build(Faults::Signal, &[&a]);
        let len = 6 * MIB;
        // SAFETY: a new mapping.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        let block = at.cast::<u8>().wrapping_add(at.align_offset(2 * MIB));
        for i in [2, 7, 511] {
            // SAFETY: it is this test's own.
            unsafe { block.add(i * page()).cast::<u64>().write_volatile(word(i)) };
        }
        if protected {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::mprotect(block.cast(), 2 * MIB, libc::PROT_READ) }, 0);
        }
        let adopted = space.adopt(block, 2 * MIB).unwrap();
        let start = block as u64;
        let kernel = move |lane: &Lane, items: Range<u64>| {
            for i in items {
                let expected = if [2, 7, 511].contains(&i) { word(i as usize) } else { 0 };
                assert_eq!(lane.load::<u64>(start + i * page() as u64)?, expected, "page {i}");
            }
            Ok(())
        };
        let begun = std::time::Instant::now();
        // SAFETY: the memory stays as it is, and any bytes make a word.
        unsafe { a.launch(512, kernel) }.unwrap().wait().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        adopted.release().unwrap();
        // SAFETY: it is not used any more.
        unsafe { libc::munmap(at, len) };
    }
}

/// Rules Z3, Z9, G13: what cannot be done is said with the first page.
#[test]
fn z9_what_cannot_go_is_said() {
    let options = Options::new(mib(16)).deadline(Duration::from_millis(50));
    let a = Accelerator::new(options).unwrap();
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = common::filled(&space, 4 * MIB);
    let node = Node::Device(ids[0]);
    let e = region.migrate(0..4 * MIB, Node::Device(space.devices()[0])).unwrap_err().to_string();
    assert!(e.contains("migrate_to"), "{e}");
    let e = space.migrate(8 as *const u8, usize::MAX, node).unwrap_err().to_string();
    assert!(e.contains("wraps"), "{e}");
    assert_eq!(region.migrate(0..MIB, node).unwrap(), MIB);
    a.fail_at(Failure::RefuseMap, 0);
    let e = region.migrate(3 * MIB..4 * MIB, node).unwrap_err().to_string();
    assert!(e.contains("device a") || e.contains("accelerator"), "{e}");
    a.mend(Failure::RefuseMap);
    a.fail_at(Failure::NeverUnmap, 0);
    let e = region.migrate(0..4 * MIB, Node::Host).unwrap_err();
    assert!(matches!(&e, Error::Lost { range, .. } if range.start.0 == region.as_ptr() as u64), "{e}");
    // What was elsewhere is there.
    let mut bytes = [0; 8];
    region.try_read(2 * MIB + 16, &mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), word(2 * MIB / page()));
    let e = region.migrate(2 * MIB..4 * MIB, node).unwrap_err();
    assert!(matches!(e, Error::Migrate { .. }), "{e}");
    let gone = space.attach(gpu(4, "b")).unwrap();
    space.detach(gone).unwrap();
    assert!(matches!(region.migrate(0..1, Node::Device(gone)), Err(Error::NoSuchDevice)));
}
