//! What the program does to its own mappings reaches the devices in time (rules G5, G11, G12): announced or not, no device uses
//! memory that is not there any more, and none gets hold of what comes next before it is there.

#[path = "peers/chip.rs"]
mod chip;
mod common;

use chip::{Chip, PAGE};
use common::*;
use peerspace::device::mmu::{FaultError, MmuDescriptor, Mode};
use peerspace::device::soft::{Accelerator, KernelError, Lane, Options, Soft};
use peerspace::{Faults, Space, Use};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const BOTH: [Faults; 2] = [Faults::Signal, Faults::Threads];

/// Anonymous memory of the program, mapped and unmapped by it.
struct Map {
    at: *mut u8,
    len: usize,
}

// SAFETY: an address and a length, and accesses that race on purpose.
unsafe impl Sync for Map {}

impl Map {
    /// Where the kernel puts nothing of its own accord: other threads map and unmap as well.
    fn new(len: usize) -> Map {
        static NEXT: AtomicU64 = AtomicU64::new(1 << 36);
        let at = NEXT.fetch_add(len.next_multiple_of(BLOCK) as u64, SeqCst);
        Map::at(at as *mut u8, len, libc::MAP_FIXED_NOREPLACE)
    }

    fn at(at: *mut u8, len: usize, flags: i32) -> Map {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: a new mapping, which replaces none.
        let at = unsafe { libc::mmap(at.cast(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Map { at: at.cast(), len }
    }

    /// A new mapping at the same address, which must be free.
    fn again(&self) -> Map {
        Map::at(self.at, self.len, libc::MAP_FIXED_NOREPLACE)
    }

    fn va(&self) -> u64 {
        self.at as u64
    }

    fn set(&self, word: usize, value: u64) {
        // SAFETY: in the mapping; devices are the only others, and they race on purpose.
        unsafe { std::ptr::write_volatile(self.at.cast::<u64>().add(word), value) }
    }

    fn get(&self, word: usize) -> u64 {
        // SAFETY: as above.
        unsafe { std::ptr::read_volatile(self.at.cast::<u64>().add(word)) }
    }

    fn unmap(&self) {
        // SAFETY: nobody has references into it.
        assert_eq!(unsafe { libc::munmap(self.at.cast(), self.len) }, 0);
    }

    fn protect(&self, how: i32) {
        // SAFETY: nobody has references into it.
        assert_eq!(unsafe { libc::mprotect(self.at.cast(), self.len, how) }, 0);
    }
}

fn space_of(faults: Faults, chips: &[&Chip]) -> Space {
    let builder = Space::builder().host(mib(64)).device(Soft::new(mib(64)).unwrap());
    let builder = chips.iter().fold(builder, |builder, chip| builder.device((*chip).clone()));
    builder.faults(faults).build().unwrap()
}

fn modes() -> [MmuDescriptor; 3] {
    [
        MmuDescriptor::new(Mode::Exclusive),
        MmuDescriptor::new(Mode::Replicate).zero_page(),
        MmuDescriptor::new(Mode::Share).remote(),
    ]
}

/// The generations of one mapping: the program unmaps and maps it anew, each time with the next number in its words, while
/// `look` is called on other threads with the address of one. What it returns must be of the generation that was begun when
/// it was called, or later.
fn generations(
    space: &Space,
    announced: bool,
    rounds: u64,
    look: impl Fn(u64) -> Result<u64, FaultError> + Sync,
) -> u64 {
    let mut map = Map::new(16 * PAGE as usize);
    let (begun, stop, seen) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0));
    let va = map.va();
    std::thread::scope(|scope| {
        for word in [0u64, 5 * PAGE] {
            let (begun, stop, seen, look) = (&begun, &stop, &seen, &look);
            scope.spawn(move || {
                while !stop.load(SeqCst) {
                    let least = begun.load(SeqCst);
                    match look(va + word) {
                        // Zeros are what is in a new mapping before the program has written.
                        Ok(n) => {
                            assert!(n == 0 || n >= least, "it reads {n}, and {least} had begun");
                            seen.fetch_add((n > 0) as u64, SeqCst);
                        }
                        Err(FaultError::NotManaged(_) | FaultError::Protected(_)) => std::thread::yield_now(),
                        Err(e) => panic!("{e}"),
                    }
                }
            });
        }
        for n in 1..=rounds {
            let adopted = space.adopt(map.at, map.len).unwrap();
            map.set(0, n);
            map.set(5 * PAGE as usize / 8, n);
            // Until a device has it.
            let (begin, before) = (Instant::now(), seen.load(SeqCst));
            while seen.load(SeqCst) < before + 4 && begin.elapsed() < Duration::from_millis(50) {
                std::thread::yield_now();
            }
            let announcement = announced.then(|| space.announce(map.at, map.len));
            map.unmap();
            drop(announcement);
            begun.store(n + 1, SeqCst);
            map = map.again();
            drop(adopted);
        }
        stop.store(true, SeqCst);
    });
    map.unmap();
    seen.into_inner()
}

/// Rule G5: once `munmap` has returned, no device reads what was there, whether the call was announced or not; whether the device
/// can be halted or not.
#[test]
fn g5_what_is_unmapped_is_read_by_no_device() {
    for faults in BOTH {
        for mode in modes() {
            for announced in [true, false] {
                let chip = Chip::new("chip", mib(4), mode.clone());
                let space = space_of(faults, &[&chip]);
                let seen = generations(&space, announced, 60, |va| chip.load(va));
                assert!(seen > 60, "hardly anything was seen: {seen}");
                space.check();
            }
        }
    }
}

/// The same for lanes of `soft`, which have TLBs of their own and are halted.
#[test]
fn g5_what_is_unmapped_is_in_no_tlb() {
    for faults in BOTH {
        for announced in [true, false] {
            let gpu = Accelerator::new(Options::new(mib(4)).lanes(2)).unwrap();
            let space = Space::builder().host(mib(64)).device(Soft::new(mib(64)).unwrap());
            let space = space.device(gpu.clone()).faults(faults).build().unwrap();
            let mut map = Map::new(16 * PAGE as usize);
            let va = map.va();
            let shared = Arc::new([const { AtomicU64::new(0) }; 3]);
            let theirs = shared.clone();
            // SAFETY: it only reads.
            let job = unsafe {
                gpu.launch(2, move |lane: &Lane, items: Range<u64>| {
                    let [begun, stop, seen] = &*theirs;
                    while stop.load(SeqCst) == 0 {
                        let least = begun.load(SeqCst);
                        match lane.load::<u64>(va + items.start * 5 * PAGE) {
                            Ok(n) => {
                                assert!(n == 0 || n >= least, "it reads {n}, and {least} had begun");
                                seen.fetch_add((n > 0) as u64, SeqCst);
                            }
                            Err(KernelError::Fault(FaultError::NotManaged(_) | FaultError::Protected(_))) => {
                                std::thread::yield_now();
                            }
                            Err(e) => return Err(e),
                        }
                    }
                    Ok(())
                })
            }
            .unwrap();
            let [begun, stop, seen] = &*shared;
            for n in 1..=200 {
                let adopted = space.adopt(map.at, map.len).unwrap();
                map.set(0, n);
                map.set(5 * PAGE as usize / 8, n);
                let (begin, before) = (Instant::now(), seen.load(SeqCst));
                while seen.load(SeqCst) < before + 100 && begin.elapsed() < Duration::from_millis(50) {
                    std::thread::yield_now();
                }
                let announcement = announced.then(|| space.announce(map.at, map.len));
                map.unmap();
                drop(announcement);
                begun.store(n + 1, SeqCst);
                map = map.again();
                drop(adopted);
            }
            stop.store(1, SeqCst);
            job.wait().unwrap();
            map.unmap();
            assert!(seen.load(SeqCst) > 1000);
            space.check();
        }
    }
}

/// Rule G5: `mprotect` that is announced ends the devices' writing, for good, and so does `PROT_NONE` their reading.
#[test]
fn g5_what_is_protected_is_written_by_no_device() {
    for faults in BOTH {
        for mode in modes() {
            let chip = Chip::new("chip", mib(4), mode);
            let space = space_of(faults, &[&chip]);
            let map = Map::new(4 * PAGE as usize);
            let _adopted = space.adopt(map.at, map.len).unwrap();
            let (last, stop) = (AtomicU64::new(0), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for n in 1.. {
                        match chip.store(map.va() + PAGE, n) {
                            Ok(()) => last.store(n, SeqCst),
                            Err(FaultError::ReadOnly(_)) => break,
                            Err(e) => panic!("{e}"),
                        }
                    }
                    assert!(stop.load(SeqCst), "it was stopped before its time");
                });
                while last.load(SeqCst) < 100 {
                    std::thread::yield_now();
                }
                let announcement = space.announce(map.at, map.len);
                stop.store(true, SeqCst);
                map.protect(libc::PROT_READ);
                drop(announcement);
            });
            let word = PAGE as usize / 8;
            assert_eq!(map.get(word), last.load(SeqCst), "each write that the device has made is there, and no more");
            assert_eq!(chip.load(map.va() + PAGE).unwrap(), last.load(SeqCst));
            let announcement = space.announce(map.at, map.len);
            map.protect(libc::PROT_NONE);
            drop(announcement);
            assert_eq!(chip.load(map.va() + PAGE), Err(FaultError::Protected(map.va() + PAGE)));
            let announcement = space.announce(map.at, map.len);
            map.protect(libc::PROT_READ | libc::PROT_WRITE);
            drop(announcement);
            chip.store(map.va() + PAGE, 7).unwrap();
            assert_eq!(map.get(word), 7);
            map.unmap();
        }
    }
}

/// Between an announcement and its end devices wait, and nothing that they do by other pages is held up.
#[test]
fn g5_devices_wait_for_what_is_announced() {
    for faults in BOTH {
        let chip = Chip::exclusive("chip", mib(4));
        let space = space_of(faults, &[&chip]);
        let map = Map::new(8 * PAGE as usize);
        let _adopted = space.adopt(map.at, map.len).unwrap();
        chip.store(map.va(), 1).unwrap();
        chip.store(map.va() + 4 * PAGE, 2).unwrap();
        let announcement = space.announce(map.at, 2 * PAGE as usize);
        assert_eq!(chip.target(map.va()), None, "what it has mapped is taken away");
        assert!(chip.target(map.va() + 4 * PAGE).is_some(), "the rest is not");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                chip.store(map.va(), 3).unwrap();
                done.store(true, SeqCst);
            });
            chip.store(map.va() + 2 * PAGE, 4).unwrap();
            // The CPU is not kept out: what it does is its own affair.
            map.set(PAGE as usize / 8, 5);
            std::thread::sleep(Duration::from_millis(50));
            assert!(!done.load(SeqCst), "it went on before the change was over");
            drop(announcement);
            waits.join().unwrap();
        });
        let word = |page: usize| map.get(page * PAGE as usize / 8);
        assert_eq!([word(0), word(1), word(2), word(4)], [3, 5, 4, 2]);
        map.unmap();
    }
}

/// What moves (`mremap`) is found where it is now, with what devices have written; the old place is nobody's.
#[test]
fn g5_what_moves_goes_with_its_data() {
    for faults in BOTH {
        for announced in [true, false] {
            let chip = Chip::exclusive("chip", mib(8));
            let space = space_of(faults, &[&chip]);
            let len = 4 * MIB;
            let (map, place) = (Map::new(len), Map::new(len));
            let adopted = space.adopt(map.at, len).unwrap();
            for page in 0..len as u64 / PAGE {
                chip.store(map.va() + page * PAGE, page + 1).unwrap();
            }
            let announcement = announced.then(|| space.announce_move((map.at, len), (place.at, len)));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: both are ours, and nobody has references into them.
            let to = unsafe { libc::mremap(map.at.cast(), len, len, flags, place.at) };
            assert_eq!(to, place.at.cast());
            drop(announcement);
            for page in 0..len as u64 / PAGE {
                let read = if page % 2 == 0 {
                    place.get((page * PAGE) as usize / 8)
                } else {
                    chip.load(place.va() + page * PAGE).unwrap()
                };
                assert_eq!(read, page + 1);
            }
            let old = chip.load(map.va());
            assert!(matches!(old, Err(FaultError::NotManaged(_) | FaultError::Protected(_))), "{old:?}");
            std::mem::forget(adopted);
            place.unmap();
            space.check();
        }
    }
}

/// Announcing costs nothing where there is nobody to tell, and takes whatever it is given.
#[test]
fn what_is_announced_need_not_make_sense() {
    let chip = Chip::exclusive("chip", mib(4));
    let with = space_of(Faults::Signal, &[&chip]);
    let without = space_of(Faults::Signal, &[]);
    for space in [&with, &without] {
        drop(space.announce(std::ptr::null(), 0));
        drop(space.announce(std::ptr::null(), usize::MAX));
        drop(space.announce(usize::MAX as *const u8, usize::MAX));
        drop(space.announce_move((std::ptr::null(), 1), (8 as *const u8, 0)));
    }
    // Many at once, and each ends for itself.
    let map = Map::new(300 * PAGE as usize);
    let _adopted = with.adopt(map.at, map.len).unwrap();
    let mut all: Vec<_> = (0..200).map(|n| with.announce(map.at.wrapping_add(n * PAGE as usize), 1)).collect();
    chip.store(map.va() + 200 * PAGE, 1).unwrap();
    drop(all.split_off(100));
    chip.store(map.va() + 150 * PAGE, 1).unwrap();
    drop(all);
    chip.store(map.va(), 1).unwrap();
    let held = with.make_resident(map.at, PAGE as usize, Use::Read).unwrap();
    drop(held);
    map.unmap();
}
