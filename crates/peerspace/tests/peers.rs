//! Devices that run code, over the real kernel: the same pointers on the CPU and on devices (rules G1 to G4, G6 to G10, G13,
//! G14).

#[path = "peers/chip.rs"]
mod chip;
mod common;

use chip::{Chip, PAGE};
use peerspace::device::mmu::{FaultError, MmuDescriptor, Mode, Target};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Region, Space};

fn space(chips: &[&Chip]) -> Space {
    let mut builder = Space::builder().host(32 << 20).device(Soft::new(256 << 20).unwrap());
    for chip in chips {
        builder = builder.device((*chip).clone());
    }
    builder.faults(Faults::Signal).build().unwrap()
}

fn word(region: &Region, at: usize) -> u64 {
    region.typed::<u64>()[at / 8]
}

/// Rules G1, G3, G4.
#[test]
fn g1_a_pointer_of_the_program_is_good_on_a_device() {
    let chip = Chip::exclusive("chip", 8 << 20);
    let space = space(&[&chip]);
    let mut region = space.region(4 << 20).unwrap();
    let base = region.as_ptr() as u64;
    region.typed_mut::<u64>()[0] = 41;
    assert_eq!(chip.load(base).unwrap(), 41);
    chip.store(base, 42).unwrap();
    space.check();
    assert_eq!(word(&region, 0), 42);
    // Never touched: zeros.
    assert_eq!(chip.load(base + (3 << 20)).unwrap(), 0);
    chip.store(base + (3 << 20) + 8, 7).unwrap();
    assert_eq!((word(&region, 3 << 20), word(&region, (3 << 20) + 8)), (0, 7));
    space.check();
}

/// A block that the CPU has touched moves as one.
#[test]
fn g4_huge_folios_move_whole() {
    let chip = Chip::exclusive("chip", 8 << 20);
    let space = space(&[&chip]);
    let mut region = space.region(4 << 20).unwrap();
    region.advise(peerspace::Hint::Dense).unwrap();
    region.typed_mut::<u64>()[..1 << 18].fill(5);
    let base = region.as_ptr() as u64;
    chip.store(base, 6).unwrap();
    assert!(
        matches!(chip.target(base + (1 << 20)), Some((Target::Own(_), true))),
        "{:?}",
        chip.target(base + (1 << 20))
    );
    space.check();
    assert!(region.typed::<u64>()[1..1 << 18].iter().all(|w| *w == 5) && word(&region, 0) == 6);
    assert_eq!(chip.target(base), None);
    space.check();
}

/// Rule G9.
#[test]
fn g9_readers_have_copies_until_somebody_writes() {
    let modes = || MmuDescriptor::new(Mode::Replicate).zero_page();
    let [a, b] = ["a", "b"].map(|name| Chip::new(name, 8 << 20, modes()));
    let space = space(&[&a, &b]);
    let mut region = space.region(2 << 20).unwrap();
    let base = region.as_ptr() as u64;
    region.typed_mut::<u64>()[512] = 9;
    for chip in [&a, &b] {
        assert_eq!(chip.load(base + PAGE).unwrap(), 9);
        assert!(matches!(chip.target(base + PAGE), Some((Target::Own(_), false))));
        assert_eq!(chip.moved()[0], PAGE, "each page moves once per reader");
    }
    space.check();
    assert_eq!(word(&region, 4096), 9);
    assert!(a.target(base + PAGE).is_some(), "a reader on the CPU takes nothing from anybody");
    region.typed_mut::<u64>()[512] = 10;
    assert_eq!((a.target(base + PAGE), b.target(base + PAGE)), (None, None), "one write invalidates all copies");
    assert_eq!((a.load(base + PAGE).unwrap(), b.load(base + PAGE).unwrap()), (10, 10));
    // One of the readers writes: the other's copy and the CPU's mapping go.
    a.store(base + PAGE, 11).unwrap();
    assert_eq!(b.target(base + PAGE), None);
    assert_eq!((b.load(base + PAGE).unwrap(), word(&region, 4096)), (11, 11));
    space.check();
    // Zeros that nobody has written are shared, too, until somebody does.
    let zeros = base + 8 * PAGE;
    assert_eq!((a.load(zeros).unwrap(), b.load(zeros).unwrap()), (0, 0));
    assert_eq!((a.target(zeros), b.target(zeros)), (Some((Target::Zero, false)), Some((Target::Zero, false))));
    b.store(zeros, 1).unwrap();
    assert_eq!(a.target(zeros), None);
    assert_eq!((a.load(zeros).unwrap(), word(&region, 8 * PAGE as usize)), (1, 1));
    space.check();
}

/// Rule G10.
#[test]
fn g10_remote_access_moves_nothing() {
    let chip = Chip::new("chip", 8 << 20, MmuDescriptor::new(Mode::Share).remote());
    let space = space(&[&chip]);
    let mut region = space.region(2 << 20).unwrap();
    let base = region.as_ptr() as u64;
    region.typed_mut::<u64>()[3] = 1;
    chip.store(base, 2).unwrap();
    assert_eq!(chip.load(base + 24).unwrap(), 1);
    assert_eq!(chip.target(base), Some((Target::Host, true)));
    region.typed_mut::<u64>()[4] = 5;
    assert_eq!((chip.load(base + 32).unwrap(), word(&region, 0)), (5, 2));
    assert_eq!(chip.moved(), [0; 3]);
    space.check();
}

/// Rule G6.
#[test]
fn g6_devices_copy_to_each_other() {
    for direct in [true, false] {
        let [a, b] = ["a", "b"].map(|n| Chip::with(n, 8 << 20, MmuDescriptor::new(Mode::Exclusive), direct));
        let space = space(&[&a, &b]);
        let region = space.region(4 << 20).unwrap();
        let base = region.as_ptr() as u64;
        for i in 0..1024 {
            a.store(base + i * PAGE, i + 1).unwrap();
        }
        for i in 0..1024 {
            assert_eq!(b.load(base + i * PAGE).unwrap(), i + 1);
        }
        assert_eq!(b.moved()[2] > 0, direct);
        assert_eq!(a.target(base), None);
        space.check();
        assert!((0..1024).all(|i| word(&region, i * PAGE as usize) == i as u64 + 1));
        space.check();
    }
}

/// Rule G7: more than the device holds, more than the host may hold, at once.
#[test]
fn g7_a_working_set_larger_than_device_and_host() {
    for bytes in [PAGE, 16 * PAGE, 2 << 20, 4 << 20] {
        let chip = Chip::exclusive("chip", bytes);
        let space = Space::builder()
            .host(16 << 20)
            .device(Soft::new(256 << 20).unwrap())
            .device(chip.clone())
            .faults(Faults::Signal)
            .build()
            .unwrap();
        let region = space.region(48 << 20).unwrap();
        let base = region.as_ptr() as u64;
        let pages = if bytes < 1 << 20 { 2048 } else { (48 << 20) / PAGE };
        for i in 0..pages {
            chip.store(base + i * PAGE, i ^ 0x55).unwrap();
        }
        space.check();
        for i in 0..pages {
            assert_eq!(chip.load(base + i * PAGE).unwrap(), i ^ 0x55, "{bytes} bytes of device, page {i}");
        }
        assert!((0..pages).all(|i| word(&region, (i * PAGE) as usize) == i ^ 0x55));
        space.check();
    }
}

/// Rule G14.
#[test]
fn g14_atomics_of_devices_add_up() {
    let [a, b] = ["a", "b"].map(|name| Chip::new(name, 4 << 20, MmuDescriptor::new(Mode::Share).remote()));
    let space = space(&[&a, &b]);
    let mut region = space.region(2 << 20).unwrap();
    let base = region.as_ptr() as u64;
    std::thread::scope(|scope| {
        for chip in [&a, &b] {
            scope.spawn(move || (0..2000).for_each(|_| chip.add(base, 1).unwrap()));
        }
        for _ in 0..2000 {
            assert!(word(&region, 0) <= 4000);
        }
    });
    assert_eq!(word(&region, 0), 4000);
    region.typed_mut::<u64>()[0] = 1;
    a.add(base, 1).unwrap();
    assert_eq!(word(&region, 0), 2);
    space.check();
}

/// Rule G13.
#[test]
fn g13_a_region_is_where_every_device_can_have_it() {
    let low = Chip::new("low", 4 << 20, MmuDescriptor::new(Mode::Exclusive).addresses(0..1 << 40));
    let picky = Chip::exclusive("picky", 4 << 20);
    let space = space(&[&low, &picky]);
    let first = space.region(64 << 20).unwrap();
    let at = first.as_ptr() as u64;
    assert!(at < 1 << 40, "{at:#x}");
    low.store(at, 1).unwrap();
    drop(first);
    picky.take_addresses(at..at + (64 << 20));
    let second = space.region(64 << 20).unwrap();
    let elsewhere = second.as_ptr() as u64;
    assert!(elsewhere < 1 << 40 && (elsewhere + (64 << 20) <= at || elsewhere >= at + (64 << 20)), "{elsewhere:#x}");
    // And where there is none, that is said.
    picky.take_addresses(0..1 << 47);
    let e = space.region(2 << 20).unwrap_err().to_string();
    assert!(e.contains("not all devices"), "{e}");
}

/// Rule G4.
#[test]
fn g4_a_region_for_reading_is_not_written_by_devices() {
    for mode in [Mode::Exclusive, Mode::Replicate, Mode::Share] {
        let chip = Chip::new("chip", 4 << 20, MmuDescriptor::new(mode).remote());
        let space = space(&[&chip]);
        let mut region = space.region(4 << 20).unwrap();
        let base = region.as_ptr() as u64;
        region.typed_mut::<u64>()[0] = 5;
        chip.store(base + 8, 6).unwrap();
        region.allow_devices(0..2 << 20, peerspace::Use::Read).unwrap();
        assert_eq!((chip.load(base).unwrap(), chip.load(base + 8).unwrap()), (5, 6));
        assert_eq!(chip.store(base, 7), Err(FaultError::ReadOnly(base)));
        assert_eq!(chip.add(base, 7), Err(FaultError::ReadOnly(base)));
        assert_eq!(word(&region, 0), 5);
        chip.store(base + (2 << 20), 8).unwrap();
        region.allow_devices(0..2 << 20, peerspace::Use::Write).unwrap();
        chip.store(base, 9).unwrap();
        assert_eq!((word(&region, 0), word(&region, 2 << 20)), (9, 8));
        space.check();
    }
}

/// Rule G4, over the real kernel: which tells nobody when a program protects its memory.
#[test]
fn g4_memory_that_the_program_protects_is_no_devices_to_write() {
    let chip = Chip::exclusive("chip", 4 << 20);
    let space = space(&[&chip]);
    // Two megabytes of its own, to be protected as a whole.
    let len = 2 << 20;
    // SAFETY: a new mapping, of nobody else's.
    let memory = unsafe {
        let (write, own) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), len, write, own, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    let at = memory as u64;
    // SAFETY: the mapping above, which stays until the end.
    let words = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u64>(), len / 8) };
    words[0] = 5;
    let adopted = space.adopt(memory.cast(), len).unwrap();
    chip.store(at + PAGE, 6).unwrap();
    assert_eq!(words[512], 6);
    // SAFETY: as above; nobody writes to it until it is writable again.
    let protect = |how| assert_eq!(unsafe { libc::mprotect(memory, len, how) }, 0);
    protect(libc::PROT_READ);
    assert_eq!((chip.load(at).unwrap(), chip.load(at + PAGE).unwrap(), chip.load(at + 2 * PAGE).unwrap()), (5, 6, 0));
    assert_eq!(chip.store(at, 7), Err(FaultError::ReadOnly(at)));
    assert_eq!((words[0], words[512]), (5, 6));
    space.check();
    protect(libc::PROT_READ | libc::PROT_WRITE);
    chip.store(at, 7).unwrap();
    assert_eq!(words[0], 7);
    protect(libc::PROT_NONE);
    let beyond = at + 8 * PAGE;
    assert_eq!(chip.load(beyond), Err(FaultError::Protected(beyond)));
    protect(libc::PROT_READ | libc::PROT_WRITE);
    drop(adopted);
    assert_eq!((words[0], words[512]), (7, 6));
    // SAFETY: nobody uses it any more.
    assert_eq!(unsafe { libc::munmap(memory, len) }, 0);
}

/// What no region covers is no device's to use.
#[test]
fn pointers_to_nowhere_are_refused() {
    let chip = Chip::exclusive("chip", 4 << 20);
    let space = space(&[&chip]);
    let region = space.region(2 << 20).unwrap();
    let local = 7u64;
    let own = &raw const local as u64;
    assert_eq!(chip.load(own & !7), Err(FaultError::NotManaged(own & !7 & !(PAGE - 1))));
    let end = region.as_ptr() as u64 + region.len() as u64;
    assert!(matches!(chip.load(end), Err(FaultError::NotManaged(_))));
    assert!(matches!(chip.load(1 << 48), Err(FaultError::OutOfReach(_))));
    assert_eq!(word(&region, 0), 0);
}
