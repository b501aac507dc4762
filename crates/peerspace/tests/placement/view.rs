//! Where pages are is told without touching them (rules G1 to G3, G11, Z9).

use super::common::{self, MIB, mib, page};
use super::{build, gpu};
use peerspace::device::mmu::Mode;
use peerspace::device::soft::{Accelerator, Failure, Lane, Options};
use peerspace::{CpuMapping, Faults, Node, PageView, Residence};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

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

/// Rules Z8, G2: whoever has accessed a page is told that it has come home, however many others came with it.
#[test]
fn z8_what_was_accessed_is_said_to_be_at_home() {
    let a = gpu(16, "a");
    let (space, ids) = build(Faults::Threads, &[&a]);
    let region = common::filled(&space, 2 * MIB);
    let (base, p) = (region.as_ptr() as usize, page());
    let next = AtomicUsize::new(usize::MAX);
    let left = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let look = |first: usize| {
        for n in first..256 {
            let at = (base + n * p) as *const u8;
            // SAFETY: a page of the region, which nobody writes to.
            unsafe { at.cast::<u64>().read_volatile() };
            let view = space.pages(at, 1).unwrap().next().unwrap();
            if view.residence != Residence::Host {
                wrong.lock().unwrap().push((n, view));
            }
        }
    };
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (next, left, look) = (&next, &left, &look);
            scope.spawn(move || {
                for round in 0..200 {
                    while next.load(SeqCst) != round {
                        std::thread::yield_now();
                    }
                    // One leads, and the other finds what has come ahead.
                    look(reader * 3);
                    left.fetch_add(1, SeqCst);
                }
            });
        }
        for round in 0..200 {
            assert_eq!(region.migrate(0..MIB, Node::Device(ids[0])).unwrap(), MIB);
            next.store(round, SeqCst);
            while left.load(SeqCst) < 2 * (round + 1) {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(wrong.into_inner().unwrap(), [], "not all of them were at home");
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
