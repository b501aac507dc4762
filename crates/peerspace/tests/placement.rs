//! Exactly the pages that somebody names go where he says, over the real kernel (rules G8, H2, Z8, Z9).

mod common;

use common::{MIB, fill, is_filled, mib, page, word, words_per_page};
use peerspace::device::mmu::Mode;
use peerspace::device::soft::{Accelerator, Failure, Lane, Options, Soft};
use peerspace::{CpuMapping, DeviceId, Error, Faults, Node, PageView, Region, Residence, Space, Use};
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

/// Rules G2, G3, Z9: each page is said to be where it is, and looking changes nothing.
#[test]
fn g2_pages_are_where_they_are_said_to_be() {
    let options = Options::new(mib(16)).deadline(Duration::from_millis(50)).mode(Mode::Replicate);
    let a = Accelerator::new(options).unwrap();
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    let (base, p) = (region.as_ptr(), page());
    let at = |i: usize| space.pages(base.wrapping_add(i * p), 1).unwrap().next().unwrap();
    let seen = |i: usize| (at(i).residence, at(i).cpu);
    assert_eq!(seen(0), (Residence::Untouched, CpuMapping::None));
    // SAFETY: pages of the region, which nobody else uses.
    let read = |i: usize| unsafe { base.wrapping_add(i * p).read_volatile() };
    // SAFETY: as above.
    let write = |i: usize| unsafe { base.wrapping_add(i * p).write_volatile(7) };
    assert_eq!(read(3), 0);
    assert_eq!(seen(3), (Residence::Host, CpuMapping::Zero));
    write(3);
    write(700);
    assert_eq!(seen(3), (Residence::Host, CpuMapping::Writable));
    let run = |i: usize, writes: bool| {
        let at = base as u64 + (i * p) as u64;
        let kernel = move |lane: &Lane, _: Range<u64>| {
            if writes { lane.store(at, 9u64) } else { lane.load::<u64>(at).map(drop) }
        };
        // SAFETY: nobody else uses the region.
        unsafe { a.launch(1, kernel) }.unwrap().wait().unwrap();
    };
    run(3, false);
    let view = at(3);
    assert_eq!((view.residence, view.cpu), (Residence::Host, CpuMapping::ReadOnly));
    assert!(view.devices.contains(ids[0]) && view.devices.iter().count() == 1, "{view:?}");
    run(1500, false);
    assert_eq!((at(1500).residence, at(1500).devices.contains(ids[0])), (Residence::Zeros, true));
    run(3, true);
    assert_eq!(seen(3), (Residence::Device { id: ids[0], mapped: true, held: false }, CpuMapping::None));
    assert!(at(3).devices.contains(ids[0]));
    // A block goes in one piece, a page alone does not.
    assert_eq!(region.migrate(4 * MIB..6 * MIB, Node::Device(ids[0])).unwrap(), 2 * MIB);
    assert!(at(1024).huge && at(1535).huge && !at(3).huge);
    assert_eq!(read(1024), 0);
    assert!(matches!(at(1024).residence, Residence::Host), "{:?}", at(1024));
    let all: Vec<PageView> = space.pages(base, 8 * MIB).unwrap().collect();
    assert_eq!(all, (0..8 * MIB / p).map(at).collect::<Vec<_>>());
    assert_eq!(space.pages(base.wrapping_add(p - 1), 2).unwrap().len(), 2);
    assert_eq!(space.pages(base, 0).unwrap().count(), 0);
    // Memory of no region.
    let outside = &raw const all[0];
    assert_eq!(space.pages(outside.cast(), 1).unwrap().next().unwrap().residence, Residence::Unmanaged);
    region.cold(0..8 * MIB).unwrap();
    assert_eq!(seen(700), (Residence::Standby, CpuMapping::None));
    a.fail_at(Failure::NeverUnmap, 0);
    let mut word = [0; 8];
    assert!(region.try_read(3 * p, &mut word).is_err());
    assert_eq!(seen(3), (Residence::Lost, CpuMapping::None));
}

/// Rule G1: of memory of the program's own, what the kernel has populated, and what nobody has.
#[test]
fn g1_pages_of_the_kernels_own_are_told_apart() {
    let (space, _) = build(Faults::Signal, &[]);
    let len = 64 * page();
    // SAFETY: a new mapping.
    let at = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    let start = at.cast::<u8>();
    // SAFETY: it is this test's own.
    unsafe {
        start.add(2 * page()).write_volatile(1);
        start.add(5 * page()).read_volatile();
    }
    let adopted = space.adopt(start, len).unwrap();
    // SAFETY: as above.
    unsafe {
        start.add(9 * page()).write_volatile(1);
        assert_eq!(libc::mprotect(start.add(9 * page()).cast(), page(), libc::PROT_READ), 0);
        start.add(11 * page()).write_volatile(1);
        assert_eq!(libc::mprotect(start.add(11 * page()).cast(), page(), libc::PROT_NONE), 0);
    }
    let views: Vec<_> = space.pages(start, len).unwrap().map(|view| (view.residence, view.cpu)).collect();
    for (i, view) in views.into_iter().enumerate() {
        let expected = match i {
            2 => (Residence::Kernel, CpuMapping::Writable),
            5 => (Residence::Kernel, CpuMapping::Zero),
            9 => (Residence::Host, CpuMapping::ReadOnly),
            11 => (Residence::Host, CpuMapping::None),
            _ => (Residence::Untouched, CpuMapping::None),
        };
        assert_eq!(view, expected, "page {i}");
    }
    drop(adopted);
    // SAFETY: it is not used any more.
    unsafe { libc::munmap(at, len) };
}

/// Rule G11: a page of a file that is mapped privately can be read, until the first write makes a copy; of one that is shared, what
/// the mapping permits is permitted.
#[test]
fn g11_pages_of_files_are_told_from_their_copies() {
    let (space, _) = build(Faults::Signal, &[]);
    let (len, file) = (4 * page(), tempfile::tempfile().unwrap());
    file.set_len(len as u64).unwrap();
    let map = |flags| {
        use std::os::fd::AsRawFd;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>()
    };
    let (private, shared) = (map(libc::MAP_PRIVATE), map(libc::MAP_SHARED));
    // SAFETY: both are this test's own, and as long as the file is.
    unsafe {
        private.read_volatile();
        private.add(page()).write_volatile(1);
        shared.add(page()).write_volatile(1);
    }
    let seen = |at: *const u8| space.pages(at, 2 * page()).unwrap().map(|view| view.cpu).collect::<Vec<_>>();
    assert_eq!(seen(private), [CpuMapping::ReadOnly, CpuMapping::Writable]);
    assert_eq!(seen(shared)[1], CpuMapping::Writable);
    // SAFETY: they are not used any more.
    unsafe {
        libc::munmap(private.cast(), len);
        libc::munmap(shared.cast(), len);
    }
}

/// Rules G7, Z3: everything leaves a device that stays in use, data intact, also where it is more than the host has room for.
#[test]
fn g7_a_device_is_emptied_and_goes_on() {
    for faults in both() {
        let a = Accelerator::new(Options::new(mib(96)).takes_evicted(true)).unwrap();
        let (space, ids) = build(faults, &[&a]);
        let region = common::filled(&space, 80 * MIB);
        let node = Node::Device(ids[0]);
        for part in [5 * page()..5 * page() + 1, MIB..7 * MIB, 0..80 * MIB] {
            let there = region.migrate(part.clone(), node).unwrap();
            assert!(space.evict(ids[0]).unwrap() >= there, "{part:?}");
            assert_eq!(used(&space, whole(&region), ids[0]), 0, "{part:?}");
            space.check();
        }
        assert_eq!(space.evict(ids[0]).unwrap(), 0);
        reads(&a, &region, 0..80 * MIB);
        assert!(used(&space, whole(&region), ids[0]) > 0);
        assert!(is_filled(&region));
        // What runs no code is emptied in the same way.
        let store = space.devices()[0];
        space.evict(ids[0]).unwrap();
        common::push_out(&space, 128 * MIB);
        assert!(used(&space, whole(&region), store) > 0);
        assert!(space.evict(store).unwrap() > 0);
        assert_eq!(used(&space, whole(&region), store), 0);
        assert!(is_filled(&region));
        space.check();
    }
}

/// Rule G7: while the device and the CPU work on what leaves it.
#[test]
fn g7_a_device_that_works_is_emptied() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    let (base, pages) = (region.as_ptr() as u64, 8 * MIB / page());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        for _ in 0..40 {
            for i in items.clone() {
                lane.fetch_add(base + i * 4096, 1u64)?;
            }
        }
        Ok(())
    };
    // SAFETY: nobody else writes to the region meanwhile.
    let job = unsafe { a.launch(pages as u64, kernel) }.unwrap();
    let mut left = 0;
    while !job.is_done() {
        left += space.evict(ids[0]).unwrap();
    }
    job.wait().unwrap();
    assert!(left > 0);
    assert!(region.typed::<u64>().iter().step_by(words_per_page()).all(|w| *w == 40));
    space.check();
}

/// Rule H2: where a huge folio is refused, on the device or on the host, small pages do.
#[test]
fn h2_a_huge_folio_that_is_refused_goes_in_small_pages() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Signal, &[&a]);
    let region = space.region(mib(8)).unwrap();
    region.advise(peerspace::Hint::Dense).unwrap();
    let node = Node::Device(ids[0]);
    let huge = |from: usize| {
        let pages = space.pages(region.as_ptr().wrapping_add(from), 2 * MIB).unwrap();
        pages.filter(|view| view.huge).count() * page()
    };
    // Memory that was never touched, and memory that is in a huge page.
    // SAFETY: the region is this test's own.
    unsafe { region.as_ptr().wrapping_add(4 * MIB).write_volatile(3) };
    for from in [0, 4 * MIB] {
        space.refuse_next_block(node).unwrap();
        assert_eq!(region.migrate(from..from + 2 * MIB, node).unwrap(), 2 * MIB);
        assert_eq!(huge(from), 0);
        assert_eq!(region.migrate(from + 2 * MIB..from + 4 * MIB, node).unwrap(), 2 * MIB);
        assert_eq!(huge(from + 2 * MIB), 2 * MIB, "only one is refused");
    }
    space.refuse_next_block(Node::Host).unwrap();
    assert_eq!(region.migrate(2 * MIB..4 * MIB, Node::Host).unwrap(), 2 * MIB);
    assert_eq!(huge(2 * MIB), 0);
    assert_eq!(region.migrate(6 * MIB..8 * MIB, Node::Host).unwrap(), 2 * MIB);
    assert_eq!(huge(6 * MIB), 2 * MIB);
    assert_eq!(region.bytes()[4 * MIB], 3);
    assert_eq!(region.bytes().iter().filter(|b| **b != 0).count(), 1);
    assert!(matches!(space.refuse_next_block(Node::Device(space.attach(gpu(1, "b")).unwrap())), Ok(())));
    space.check();
}

/// Adds one to the first word of each page of `part`, on a device.
fn add_one(gpu: &Accelerator, region: &Region, part: Range<usize>) {
    let (base, pages) = (region.as_ptr() as u64 + part.start as u64, part.len() / page());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        for i in items {
            let word: u64 = lane.load(base + i * 4096)?;
            lane.store(base + i * 4096, word + 1)?;
        }
        Ok(())
    };
    // SAFETY: the region outlives the job, and nobody else writes to these words meanwhile.
    unsafe { gpu.launch(pages as u64, kernel) }.unwrap().wait().unwrap();
}

fn coherent(bytes: usize, name: &str) -> Accelerator {
    Accelerator::new(Options::new(mib(bytes)).name(name).coherent(true)).unwrap()
}

/// Bytes that the CPU maps in place of a device.
fn in_place(space: &Space, region: &Region, id: DeviceId) -> usize {
    let pages = space.pages(region.as_ptr(), region.len()).unwrap();
    pages.filter(|view| view.residence == Residence::Coherent(id)).count() * page()
}

/// Rules Z5, G2, G10: memory in place is one memory for the CPU, for the device's own code, and for that of another device.
#[test]
fn z5_memory_in_place_is_one_for_the_cpu_and_for_devices() {
    for faults in both() {
        let (a, b) = (coherent(16, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let mut region = common::filled(&space, 8 * MIB);
        let (part, p) = (2 * MIB..6 * MIB, page());
        assert_eq!(region.migrate_to(part.clone(), ids[0]).unwrap(), 4 * MIB);
        assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
        let moved = [a.statistics(), b.statistics()].map(|s| (s.bytes_in, s.bytes_out));
        for round in 0..3u64 {
            add_one(&a, &region, part.clone());
            add_one(&b, &region, part.clone());
            let before = brought(&space);
            for i in part.clone().step_by(p) {
                let at = &mut region.typed_mut::<u64>()[i / 8];
                assert_eq!(*at, word(i / p).wrapping_add(3 * round + 2));
                *at = at.wrapping_add(1);
            }
            assert_eq!(brought(&space), before);
        }
        // Nothing has moved for it.
        assert_eq!([a.statistics(), b.statistics()].map(|s| (s.bytes_in, s.bytes_out)), moved);
        assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
        assert!(b.statistics().remote_bytes_written >= 4 * MIB as u64 / 512);
        space.check();
        // Whatever takes it from its place: nobody goes on to use what is not there any more.
        let kept = space.make_resident(&raw const region.bytes()[2 * MIB], 1, Use::Write).unwrap();
        assert_eq!(in_place(&space, &region, ids[0]), 2 * MIB);
        drop(kept);
        add_one(&b, &region, 2 * MIB..4 * MIB);
        assert_eq!(space.migrate(region.as_ptr().wrapping_add(4 * MIB), 2 * MIB, Node::Host).unwrap(), 2 * MIB);
        add_one(&a, &region, 4 * MIB..6 * MIB);
        add_one(&b, &region, 4 * MIB..6 * MIB);
        for i in part.step_by(p) {
            let more = if i < 4 * MIB { 10 } else { 11 };
            assert_eq!(region.typed::<u64>()[i / 8], word(i / p).wrapping_add(more), "page {}", i / p);
        }
        space.check();
    }
}

/// Rules Z5, G2: memory goes in place and out of it all the while that the CPU and two devices work on it.
#[test]
fn g2_memory_goes_in_and_out_of_place_under_everybody() {
    for faults in both() {
        let (a, b) = (coherent(16, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let region = space.region(mib(4)).unwrap();
        let (base, pages) = (region.as_ptr() as u64, 4 * MIB / page());
        let jobs = [(&a, 1u64), (&b, 2)].map(|(gpu, slot)| {
            let kernel = move |lane: &Lane, items: Range<u64>| {
                for _ in 0..30 {
                    for i in items.clone() {
                        let at = base + i * 4096 + slot * 8;
                        let word: u64 = lane.load(at)?;
                        lane.store(at, word + 1)?;
                    }
                }
                Ok(())
            };
            // SAFETY: each works on words of its own.
            unsafe { gpu.launch(pages as u64, kernel) }.unwrap()
        });
        let mut rounds = 0u64;
        while !jobs.iter().all(|job| job.is_done()) || rounds < 20 {
            let from = rounds as usize * 37 % 300 * page();
            let part = if rounds.is_multiple_of(2) { 0..4 * MIB } else { from..from + 2 * MIB + 11 * page() };
            region.migrate(part, Node::Device(ids[0])).unwrap();
            for i in 0..pages {
                // SAFETY: a word that nobody else uses.
                unsafe {
                    let word = (base as usize + i * page()) as *mut u64;
                    assert_eq!(word.read_volatile(), rounds);
                    word.write_volatile(rounds + 1);
                }
            }
            rounds += 1;
            match rounds % 3 {
                0 => drop(space.evict(ids[0]).unwrap()),
                1 => drop(region.migrate(from..4 * MIB, Node::Host).unwrap()),
                _ => drop(space.migrate(region.as_ptr(), 4 * MIB, Node::Device(ids[1])).unwrap()),
            }
        }
        jobs.iter().for_each(|job| job.wait().unwrap());
        for page in region.typed::<u64>().chunks(words_per_page()) {
            assert_eq!(page[..3], [rounds, 30, 30]);
        }
        space.check();
    }
}

/// Rules G12, Z3: a fork and a detach take memory from its place; parent and child go on apart. In a process of its own, since a
/// fork is one of all spaces.
#[test]
fn g12_memory_in_place_of_a_device_that_runs_code_forks() {
    let output = common::in_process("forks_with_memory_in_place", &[]);
    assert!(output.status.success(), "{}", common::said(&output));
}

#[test]
#[ignore = "run in a process of its own"]
fn forks_with_memory_in_place() {
    let (a, b) = (coherent(16, "a"), gpu(16, "b"));
    let (space, ids) = build(Faults::Signal, &[&a, &b]);
    let mut region = common::filled(&space, 4 * MIB);
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    add_one(&b, &region, 0..4 * MIB);
    // One that works all the while, on words of its own.
    let (busy, stop) = (space.region(mib(2)).unwrap(), std::sync::Arc::new(AtomicBool::new(false)));
    busy.migrate_to(0..2 * MIB, ids[0]).unwrap();
    let (base, ended) = (busy.as_ptr() as u64, stop.clone());
    let kernel = move |lane: &Lane, items: Range<u64>| {
        while !ended.load(Relaxed) {
            for i in items.clone() {
                let word: u64 = lane.load(base + i * 4096)?;
                lane.store(base + i * 4096, word + 1)?;
                assert_eq!(lane.load::<u64>(base + i * 4096)?, word + 1);
            }
        }
        Ok(())
    };
    // SAFETY: nobody else uses that region before the job is done.
    let job = unsafe { a.launch(512, kernel) }.unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // SAFETY: the child uses the region and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    let good = |region: &Region, more: u64| {
        let pages = region.typed::<u64>().chunks(words_per_page()).enumerate();
        pages.into_iter().all(|(i, page)| page[0] == word(i).wrapping_add(more) && page[1] == word(i))
    };
    if child == 0 {
        region.typed_mut::<u64>()[0] = 77;
        region.typed_mut::<u64>()[0] = word(0).wrapping_add(1);
        // What it sends there is its own.
        let there = region.migrate_to(0..2 * MIB, ids[0]);
        let fine = good(&region, 1) && there.is_ok();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(!fine)) }
    }
    let mut status = -1;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child does not have the data");
    stop.store(true, Relaxed);
    job.wait().unwrap();
    assert!(busy.typed::<u64>().iter().step_by(words_per_page()).any(|w| *w > 1));
    drop(busy);
    add_one(&a, &region, 0..4 * MIB);
    assert!(good(&region, 2));
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    add_one(&b, &region, 0..4 * MIB);
    // The one that uses it goes, then the one whose memory it is.
    space.detach(ids[1]).unwrap();
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    add_one(&a, &region, 0..4 * MIB);
    space.detach(ids[0]).unwrap();
    assert!(good(&region, 4));
    space.check();
}

/// Rules Z9, G14: what a device that fails held in place is lost; sole access takes memory from its place.
#[test]
fn g14_sole_access_and_failures_of_memory_in_place() {
    let (a, b) = (coherent(8, "a"), gpu(8, "b"));
    let (space, ids) = build(Faults::Signal, &[&a, &b]);
    let region = common::filled(&space, 4 * MIB);
    region.migrate_to(0..4 * MIB, ids[0]).unwrap();
    for id in [ids[0], ids[1]] {
        region.exclusive(0..MIB, id).unwrap();
        let pages: Vec<_> = space.pages(region.as_ptr(), MIB).unwrap().collect();
        let sole = |view: &PageView| view.cpu == CpuMapping::None && view.devices.iter().eq([id]);
        assert!(pages.iter().all(sole), "{:?}", pages[0]);
    }
    assert!(is_filled(&region));
    assert_eq!(region.migrate_to(0..4 * MIB, ids[0]).unwrap(), 4 * MIB);
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    // More than there is room for beside it is used where it is.
    let more = common::filled(&space, 8 * MIB);
    reads(&a, &more, 0..8 * MIB);
    assert_eq!(in_place(&space, &region, ids[0]), 4 * MIB);
    assert!(is_filled(&more));
    space.fail(ids[0]).unwrap();
    for at in [0, 3 * MIB, 4 * MIB - 8] {
        assert!(matches!(region.try_read(at, &mut [0; 8]), Err(Error::Lost { .. })));
    }
    assert!(is_filled(&more));
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

/// Rules Z5, G8, H2: pages and runs of pages are in place by themselves, beside what is not; also on a device that runs no code.
#[test]
fn z5_pages_are_in_place_one_by_one() {
    for faults in both() {
        for runs_code in [true, false] {
            let a = coherent(32, "a");
            let (space, mut ids) = build(faults, if runs_code { vec![&a] } else { vec![] }.as_slice());
            if !runs_code {
                ids.push(space.attach(peerspace::device::dax::Dax::memory(mib(32)).unwrap()).unwrap());
            }
            let mut region = common::filled(&space, 12 * MIB);
            let (node, p) = (Node::Device(ids[0]), page());
            let ranges = [0..1, 5 * p..9 * p, MIB - p..MIB + p, 2 * MIB..4 * MIB, 5 * MIB + p..9 * MIB - 3 * p];
            let mut there = 0;
            for part in ranges {
                let pages = part.start / p * p..part.end.next_multiple_of(p);
                assert_eq!(region.migrate(part.clone(), node).unwrap(), pages.len(), "{part:?}");
                there += pages.len();
                assert_eq!(in_place(&space, &region, ids[0]), there, "{part:?}");
                space.check();
            }
            // A run is one mapping.
            let run = whole(&region).start.wrapping_add(5 * p)..whole(&region).start.wrapping_add(9 * p);
            assert_eq!(mappings(run), 1);
            assert!(mappings(whole(&region)) <= 13, "{} mappings", mappings(whole(&region)));
            let before = brought(&space);
            assert!(is_filled(&region));
            assert_eq!(brought(&space), before);
            if runs_code {
                assert!(reads(&a, &region, 2 * MIB..4 * MIB) <= 2, "a block in place is one translation");
                reads(&a, &region, 5 * MIB..9 * MIB);
            }
            // Again is no work; home go those that are named.
            assert_eq!(region.migrate(6 * p..8 * p, node).unwrap(), 2 * p);
            for part in [6 * p..7 * p, 3 * MIB..3 * MIB + p, 8 * MIB..8 * MIB + 100 * p] {
                assert_eq!(region.migrate(part.clone(), Node::Host).unwrap(), part.len());
                there -= part.len();
                assert_eq!(in_place(&space, &region, ids[0]), there, "{part:?}");
                space.check();
            }
            // A part of it is discarded, a part pinned.
            region.discard(8 * p..MIB).unwrap();
            let held = space.make_resident(whole(&region).start.wrapping_add(7 * MIB), 3 * p, Use::Write).unwrap();
            assert!(region.bytes()[8 * p..MIB].iter().all(|b| *b == 0));
            let good = |i: &usize| region.bytes()[*i] == if (8 * p..MIB).contains(i) { 0 } else { word(i / p) as u8 };
            assert!((0..12 * MIB).step_by(p).all(|i| good(&i)));
            drop(held);
            assert!(space.evict(ids[0]).unwrap() > 0);
            assert_eq!(in_place(&space, &region, ids[0]), 0);
            // The kernel does not join what was populated apart.
            assert!(mappings(whole(&region)) <= 13, "{} mappings", mappings(whole(&region)));
            assert!((0..12 * MIB).step_by(p).all(|i| good(&i)));
            space.check();
        }
    }
}

/// Memory of the program's own, filled.
fn own(len: usize) -> (*mut u8, &'static mut [u64]) {
    // SAFETY: a new mapping, which is the test's own for good.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let words = std::slice::from_raw_parts_mut(at.cast::<u64>(), len / 8);
        fill(words);
        (at.cast(), words)
    }
}

/// Rules Z5, G1, G5: memory of the program's own, where it has promised to say what it does with it, and not before.
#[test]
fn z5_adopted_memory_is_in_place_where_changes_are_announced() {
    for faults in both() {
        let (a, b) = (coherent(32, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let (len, p) = (12 * MIB, page());
        let (start, words) = own(len);
        let adopted = space.adopt(start, len).unwrap();
        let node = Node::Device(ids[0]);
        let coherents = || {
            let pages = space.pages(start, len).unwrap();
            pages.filter(|view| view.residence == Residence::Coherent(ids[0])).count() * p
        };
        let good = |words: &[u64], less: Range<usize>| {
            words.chunks(words_per_page()).enumerate().all(|(i, page)| {
                let wanted = if less.contains(&(i * p)) { 0 } else { word(i) };
                page.iter().all(|w| *w == wanted)
            })
        };
        // Without the promise it goes to the device's memory, and not in place.
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), 0);
        assert!(good(words, 0..0));
        // SAFETY: all changes below are announced.
        unsafe { space.promise_announcements() };
        assert_eq!(space.migrate(start.wrapping_add(3 * p), 5 * p, node).unwrap(), 5 * p);
        assert_eq!(coherents(), 5 * p);
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), len);
        let before = brought(&space);
        assert!(good(words, 0..0));
        assert_eq!(brought(&space), before);
        words[700 * 512] = 0;
        words[700 * 512] = word(700);
        space.check();
        // Each call that changes something finds memory of the program's own.
        let part = |from: usize, pages: usize| (start.wrapping_add(from).cast::<libc::c_void>(), pages * p);
        {
            let (at, n) = part(2 * MIB, 3);
            let _announced = space.announce(at.cast(), n);
            assert_eq!(coherents(), len - n, "exactly what is announced leaves");
            // SAFETY: nobody refers to these pages.
            assert_eq!(unsafe { libc::madvise(at, n, libc::MADV_DONTNEED) }, 0);
        }
        let less = 2 * MIB..2 * MIB + 3 * p;
        assert!(good(words, less.clone()));
        {
            let (at, n) = part(5 * MIB, 40);
            let _announced = space.announce(at.cast(), n);
            // SAFETY: nobody writes to these pages before they are writable again.
            assert_eq!(unsafe { libc::mprotect(at, n, libc::PROT_READ) }, 0);
        }
        // What is read-only does not go in place.
        let left = adopted.migrate(node).unwrap();
        assert!(left == len || left == len - 40 * p, "{left}");
        assert_eq!(coherents(), len - 40 * p);
        assert!(good(words, less.clone()));
        {
            let (at, n) = part(5 * MIB, 40);
            let _announced = space.announce(at.cast(), n);
            // SAFETY: as above.
            assert_eq!(unsafe { libc::mprotect(at, n, libc::PROT_READ | libc::PROT_WRITE) }, 0);
        }
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), len);
        // Moved elsewhere, in part.
        let (at, n) = part(8 * MIB, 300);
        let moved = {
            // SAFETY: address space of the test's own.
            let to = unsafe {
                libc::mmap(std::ptr::null_mut(), n, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            };
            let _announced = space.announce_move((at.cast(), n), (to.cast(), n));
            // SAFETY: what is there is not used by its old address any more.
            unsafe { libc::mremap(at, n, n, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) }
        };
        assert_ne!(moved, libc::MAP_FAILED);
        // SAFETY: it has moved there.
        let there = unsafe { std::slice::from_raw_parts(moved.cast::<u64>(), n / 8) };
        assert!(there.chunks(512).enumerate().all(|(i, page)| page.iter().all(|w| *w == word(i + 8 * MIB / p))));
        assert_eq!(space.migrate(moved.cast(), n, node).unwrap(), n);
        assert!(there.chunks(512).enumerate().all(|(i, page)| page[7] == word(i + 8 * MIB / p)));
        space.check();
        // Given up, in place or not.
        adopted.release().unwrap();
        assert!(good(&words[..8 * MIB / 8], less));
        let _announced = space.announce(moved.cast(), n);
        // SAFETY: it is not used any more.
        unsafe { libc::munmap(moved, n) };
    }
}

/// Rules G1, G5: pages that the program may only read migrate where it has promised to announce changes; its writes fail as before.
/// In a process of its own, since a fork is one of all spaces.
#[test]
fn g1_read_only_memory_migrates_where_changes_are_announced() {
    let output = common::in_process("read_only_memory_migrates", &[]);
    assert!(output.status.success(), "{}", common::said(&output));
}

#[test]
#[ignore = "run in a process of its own"]
fn read_only_memory_migrates() {
    for faults in both() {
        let a = gpu(32, "a");
        let (space, ids) = build(faults, &[&a]);
        let (len, p) = (8 * MIB, page());
        let (start, words) = own(len);
        let adopted = space.adopt(start, len).unwrap();
        let part = |from: usize| start.wrapping_add(from).cast::<libc::c_void>();
        let protect = |from: usize, len: usize, how| {
            let _announced = space.announce(part(from).cast(), len);
            // SAFETY: nobody writes to these pages meanwhile.
            assert_eq!(unsafe { libc::mprotect(part(from), len, how) }, 0);
        };
        let node = Node::Device(ids[0]);
        protect(MIB, 5 * MIB, libc::PROT_READ);
        assert_eq!(adopted.migrate(node).unwrap(), 3 * MIB, "what may only be read stays");
        // SAFETY: all changes are announced.
        unsafe { space.promise_announcements() };
        assert_eq!(adopted.migrate(node).unwrap(), len);
        let is_good = |words: &[u64]| {
            words.chunks(words_per_page()).enumerate().all(|(i, page)| page.iter().all(|w| *w == word(i)))
        };
        assert!(is_good(words));
        // Read home, it is read-only, and can go again.
        let views: Vec<_> = space.pages(part(2 * MIB).cast(), p).unwrap().collect();
        assert_eq!((views[0].residence, views[0].cpu), (Residence::Host, CpuMapping::ReadOnly));
        for (from, n) in [(2 * MIB, p), (2 * MIB + 3 * p, 2 * MIB), (0, len)] {
            assert_eq!(space.migrate(part(from).cast(), n, node).unwrap(), n);
            assert_eq!(space.migrate(part(from).cast(), n, Node::Host).unwrap(), n);
        }
        assert!(is_good(words));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&format!("{:x}-", start as usize + MIB))).unwrap();
        assert!(line.contains("r--p") && mappings(part(MIB).cast()..part(6 * MIB).cast()) == 1, "{line}");
        // A write ends the process that makes it, wherever the page is.
        assert_eq!(space.migrate(part(3 * MIB).cast(), p, node).unwrap(), p);
        for at in [2 * MIB, 3 * MIB] {
            // SAFETY: the child writes and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: SIGSEGV, which is what is tried.
                unsafe {
                    libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                    start.wrapping_add(at).write_volatile(1);
                    libc::_exit(0)
                }
            }
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
        }
        protect(MIB, 5 * MIB, libc::PROT_READ | libc::PROT_WRITE);
        words[3 * MIB / 8] = word(3 * MIB / p);
        assert!(is_good(words));
        space.check();
        adopted.release().unwrap();
    }
}
