//! Memory of any kind that a program has, in a space with devices that run code (rules G1, G4, G5, G11, G12, G14): shared
//! memory, files and huge pages of the kernel's pool are accessed in place, through the same pointers.

#[path = "kinds/changes.rs"]
mod changes;
#[path = "peers/chip.rs"]
mod chip;
mod common;
#[path = "kinds/memory.rs"]
mod memory;

use chip::{Chip, PAGE};
use common::*;
use memory::*;
use peerspace::device::mmu::{FaultError, MmuDescriptor, Mode, Target};
use peerspace::device::soft::{Accelerator, Lane, Options, Soft};
use peerspace::{Error, Faults, Hint, Node, Residence, Space, Use};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

const BOTH: [Faults; 2] = [Faults::Signal, Faults::Threads];
const CHIP: u64 = 16 << 20;

/// A device in each mode, all of which can access the host's memory.
fn chips() -> [Chip; 3] {
    [Mode::Exclusive, Mode::Replicate, Mode::Share]
        .map(|mode| Chip::new(&format!("{mode:?}"), CHIP, MmuDescriptor::new(mode).remote()))
}

fn space_of(faults: Faults, chips: &[&Chip]) -> Space {
    space_without(0, faults, chips)
}

/// userfaultfd's asynchronous write protection, without which the kernel tells of no change to mappings of files.
const WP_ASYNC: u64 = 1 << 15;

/// A space that does without features of userfaultfd.
fn space_without(features: u64, faults: Faults, chips: &[&Chip]) -> Space {
    catch_lost_accesses();
    let builder = Space::builder().host(mib(16)).device(Soft::new(mib(128)).unwrap());
    let builder = chips.iter().fold(builder, |builder, chip| builder.device((*chip).clone()));
    builder.faults(faults).without_features(features).build().unwrap()
}

/// Waits for something that others do.
fn wait_until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody makes headway");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Each delivery with memory of each kind that there is here.
fn each_kind(kinds: &[Kind], len: usize, mut test: impl FnMut(Faults, Kind, &Mapped)) {
    for faults in BOTH {
        for kind in kinds {
            if let Some(memory) = Mapped::new(*kind, len) {
                test(faults, *kind, &memory);
                memory.unmap();
            }
        }
    }
}

/// Rules G1, G11: CPU and devices read and write the same bytes through the same pointer, whatever kind of memory it is. What
/// stays takes up nothing of the budget and of no device.
#[test]
fn g11_memory_of_each_kind_is_one_memory() {
    let kinds: Vec<Kind> = STAYING.into_iter().chain([Private]).collect();
    each_kind(&kinds, 4 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [a, b, c] = chips();
        let space = space_of(faults, &[&a, &b, &c]);
        let before = space.statistics().used_bytes;
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        let in_place = if kind.stays() { vec![memory.range()] } else { vec![] };
        assert_eq!(adopted.in_place(), in_place, "{what}");
        for i in 0..1024 {
            let va = memory.va(i);
            assert_eq!(a.load(va), Ok(word(i)), "{what}, page {i}");
            b.store(va + 8, word(i) ^ 1).unwrap();
            assert_eq!(memory.word(i, 1).load(SeqCst), word(i) ^ 1, "{what}, page {i}");
            memory.word(i, 2).store(word(i) ^ 2, SeqCst);
            assert_eq!((a.load(va + 8), c.load(va + 16)), (Ok(word(i) ^ 1), Ok(word(i) ^ 2)), "{what}, page {i}");
            c.store(va + 4088, 7).unwrap();
            assert_eq!((b.load(va + 4088), memory.word(i, 511).load(SeqCst)), (Ok(7), 7), "{what}, page {i}");
        }
        space.check();
        if kind.stays() {
            for chip in [&a, &b, &c] {
                assert_eq!(chip.moved(), [0; 3], "{what}: nothing moves");
            }
            assert_eq!(space.statistics().used_bytes, before, "{what}: it is no part of the budget");
        }
        if kind.has_file() {
            let shared = kind.is_shared();
            assert!((0..1024).all(|i| memory.in_file(i) == word(i)));
            use std::os::unix::fs::FileExt;
            let mut bytes = [0; 8];
            memory.file.as_ref().unwrap().read_exact_at(&mut bytes, 8).unwrap();
            let written = if shared { word(0) ^ 1 } else { word(0) };
            assert_eq!(u64::from_ne_bytes(bytes), written, "{what}: who maps a file for itself leaves it as it is");
        }
        adopted.release().unwrap();
        assert!(matches!(a.load(memory.va(3)), Err(FaultError::NotManaged(_))), "{what}");
        assert!([&a, &b, &c].iter().all(|chip| chip.target(memory.va(3)).is_none()), "{what}");
        assert!((0..1024).all(|i| {
            let seen = [0, 1, 2, 511].map(|k| memory.word(i, k).load(SeqCst));
            seen == [word(i), word(i) ^ 1, word(i) ^ 2, 7]
        }));
        space.check();
    });
}

/// Two devices and the CPU at once: each word is added to by each, in its turn.
#[test]
fn g11_two_devices_and_the_cpu_at_once() {
    each_kind(&STAYING, 2 * MIB, |faults, kind, memory| {
        let [a, b, _] = chips();
        let space = space_of(faults, &[&a, &b]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        (0..512).for_each(|i| memory.word(i, 5).store(0, SeqCst));
        std::thread::scope(|scope| {
            for (turn, chip) in [&a, &b].into_iter().enumerate() {
                scope.spawn(move || {
                    for round in 0..20u64 {
                        for i in (0..512).step_by(8) {
                            let va = memory.va(i) + 40;
                            while chip.load(va).unwrap() % 3 != turn as u64 {
                                std::thread::yield_now();
                            }
                            chip.store(va, round * 3 + turn as u64 + 1).unwrap();
                        }
                    }
                });
            }
            for round in 0..20u64 {
                for i in (0..512).step_by(8) {
                    while memory.word(i, 5).load(SeqCst) != round * 3 + 2 {
                        std::thread::yield_now();
                    }
                    memory.word(i, 5).store(round * 3 + 3, SeqCst);
                }
            }
        });
        assert!((0..512).step_by(8).all(|i| a.load(memory.va(i) + 40) == Ok(60)), "{kind:?}");
        space.check();
        drop(adopted);
    });
}

/// A block inside one mapping is one translation; where permissions or regions end, there are pages.
#[test]
fn g4_blocks_are_translated_whole_where_they_can_be() {
    let [chip, ..] = chips();
    let space = space_of(Faults::Signal, &[&chip]);
    let memory = Mapped::new(Memfd, 8 * MIB).unwrap();
    let first = memory.range().start.next_multiple_of(BLOCK);
    let page = (first - memory.range().start) / 4096;
    let adopted = space.adopt(memory.start, memory.len).unwrap();
    chip.load(memory.va(page + 5)).unwrap();
    let target = |i| chip.target(memory.va(i));
    assert_eq!([page, page + 5, page + 511].map(target), [Some((Target::Host, true)); 3]);
    assert_eq!(target(page + 512), None);
    // One page is another mapping from here on.
    memory.protect(page + 600..page + 601, libc::PROT_READ);
    chip.load(memory.va(page + 600)).unwrap();
    assert_eq!((target(page + 600), target(page + 601)), (Some((Target::Host, false)), None));
    chip.store(memory.va(page + 800), 3).unwrap();
    assert_eq!((target(page + 800), target(page + 801)), (Some((Target::Host, true)), None));
    space.check();
    drop(adopted);
    assert_eq!(target(page), None);
    memory.unmap();
}

/// Rules G4, G11, G14: what devices cannot have, they are told about, and nothing changes.
#[test]
fn g11_what_stays_is_not_moved_and_nobody_has_it_alone() {
    each_kind(&STAYING, 2 * MIB, |faults, kind, memory| {
        let what = format!("{kind:?} {faults:?}");
        let [chip, ..] = chips();
        let near = Chip::new("near", CHIP, MmuDescriptor::new(Mode::Exclusive));
        let space = space_of(faults, &[&chip, &near]);
        let ids = space.devices();
        let (chips_id, nears_id) = (ids[1], ids[2]);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        let va = memory.va(3);
        for e in [near.load(va), near.store(va, 1).map(|()| 0), near.add(va, 1).map(|()| 0)] {
            assert_eq!(e, Err(FaultError::NoWay(va)), "{what}");
        }
        assert_eq!(chip.add(va, 1), Err(FaultError::Stays(va)), "{what}");
        let e = space.exclusive(va as *const u8, 8, chips_id).unwrap_err().to_string();
        assert!(e.contains("device Exclusive") && e.contains("no device can have it alone"), "{e}");
        let e = adopted.prefetch(Node::Device(chips_id)).unwrap().wait().unwrap_err();
        assert!(matches!(&e, Error::Migrate { why, .. } if why.contains("stays on the host")), "{e}");
        assert!(adopted.prefetch(Node::Host).unwrap().wait().is_ok());
        assert_eq!(adopted.migrate(Node::Device(chips_id)).unwrap(), 0, "{what}");
        assert_eq!(adopted.migrate(Node::Host).unwrap(), 2 * MIB, "{what}");
        assert!(space.pages(memory.start, memory.len).unwrap().all(|p| p.residence == Residence::InPlace), "{what}");
        assert_eq!(chip.target(va), None, "{what}: nothing was mapped for it");
        // Hints that say where things are to be change nothing about that.
        for hint in [Hint::Prefer(Some(Node::Device(chips_id))), Hint::ReadMostly(true), Hint::Dense] {
            adopted.advise(hint).unwrap();
        }
        assert_eq!(chip.load(va), Ok(word(3)));
        chip.port().note_remote(va, 10_000);
        chip.store(va, word(3)).unwrap();
        assert_eq!((adopted.collapse().unwrap(), adopted.cold()), (0, 0), "{what}");
        assert_eq!((chip.moved(), near.moved()), ([0; 3], [0; 3]), "{what}");
        // What needs no device alone.
        let e = space.launch(nears_id).whole(memory.start, memory.len).run(|_| Ok::<(), FaultError>(())).unwrap_err();
        assert!(e.to_string().contains("cannot access it there"), "{e}");
        let done = space.launch(chips_id).each(memory.start, 4096).items(512).run(|piece| {
            let table = piece.operands[0].clone();
            for va in table.step_by(4096) {
                assert!(matches!(chip.target(va), Some((Target::Host, true))), "{what}: {:?}", chip.target(va));
                chip.store(va + 8, 9).unwrap();
            }
            Ok::<(), ()>(())
        });
        assert_eq!(done.unwrap().items, 512);
        assert!((0..512).all(|i| memory.word(i, 1).load(SeqCst) == 9 && memory.word(i, 0).load(SeqCst) == word(i)));
        // What the program may only read is an operand that is only read.
        memory.protect(0..512, libc::PROT_READ);
        let done = space.launch(chips_id).whole(memory.start, memory.len).run(|_| {
            assert_eq!(chip.target(va), Some((Target::Host, false)), "{what}");
            chip.load(va).map(drop)
        });
        assert!(done.is_ok(), "{what}: {done:?}");
        memory.protect(0..512, RW);
        // Unmapped while the device works, the launch is told, as far as the kernel tells of it.
        if kind.is_told() && memory.len == 2 * MIB && kind != Huge && kind != SharedHuge {
            let done = space.launch(chips_id).whole(memory.start, memory.len).run(|_| {
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
                assert!(map(memory.start.wrapping_add(MIB), 4096, RW, flags, None).is_some());
                wait_until(|| adopted.in_place().len() == 2);
                Ok::<(), ()>(())
            });
            assert!(matches!(done, Err(peerspace::LaunchError::Discarded(_))), "{what}: {done:?}");
        }
        space.check();
        drop(adopted);
    });
}

/// Pins and copies of such memory are as those of any.
#[test]
fn g8_what_stays_is_copied_and_handed_to_the_kernel() {
    each_kind(&STAYING, 2 * MIB, |faults, kind, memory| {
        let [chip, ..] = chips();
        let space = space_of(faults, &[&chip]);
        let mut region = space.region(mib(2)).unwrap();
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        (0..512).for_each(|i| chip.store(region.as_ptr() as u64 + i * PAGE, i).unwrap());
        let len = MIB + 12_345;
        // SAFETY: nobody uses either meanwhile.
        unsafe {
            space.copy(memory.start.wrapping_add(MIB / 2 + 3), region.as_ptr(), 1000).unwrap();
            assert_eq!(std::ptr::read_unaligned(memory.start.add(MIB / 2 + 3).cast::<u64>()), 0);
            memory.fill();
            space.copy(region.bytes_mut().as_mut_ptr(), memory.start, len).unwrap();
            space.copy(memory.start.wrapping_add(MIB), region.as_ptr(), 8192).unwrap();
        }
        assert!((0..len / 4096).all(|i| region.typed::<u64>()[i * 512 + 100] == word(i)), "{kind:?}");
        assert_eq!(memory.word(256, 1).load(SeqCst), word(0));
        drop(space.make_resident(memory.start.wrapping_add(100), MIB, Use::Write).unwrap());
        space.check();
        drop(adopted);
    });
}

/// An accelerator with lanes that run at once works on a file as it is mapped.
#[test]
fn g1_an_accelerator_works_on_a_mapped_file() {
    for (faults, kind) in [(Faults::Signal, File), (Faults::Threads, Memfd), (Faults::Signal, PrivateFile)] {
        let gpu = Accelerator::new(Options::new(mib(4)).lanes(4)).unwrap();
        let space = Space::builder().host(mib(8)).device(Soft::new(mib(16)).unwrap()).device(gpu.clone());
        let space = space.faults(faults).build().unwrap();
        let memory = Mapped::new(kind, 16 * MIB).unwrap();
        let sums = space.region(mib(2)).unwrap();
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        let (from, to) = (memory.va(0), sums.as_ptr() as u64);
        // SAFETY: nobody else uses either until the job is done.
        let job = unsafe {
            gpu.launch(4096, move |lane: &Lane, items: std::ops::Range<u64>| {
                let mut page = [0u64; 512];
                for i in items {
                    lane.read(from + i * 4096, bytemuck::cast_slice_mut(&mut page))?;
                    lane.store(to + i * 8, page.iter().fold(0u64, |sum, w| sum.wrapping_add(*w)))?;
                    lane.store(from + i * 4096 + 8, i)?;
                }
                Ok(())
            })
        };
        job.unwrap().wait().unwrap();
        let sums = sums.typed::<u64>();
        assert!((0..4096).all(|i| sums[i] == word(i).wrapping_mul(512)), "{kind:?}");
        assert!((0..4096).all(|i| memory.word(i, 1).load(SeqCst) == i as u64));
        space.check();
        drop(adopted);
        memory.unmap();
    }
}

/// One range over mappings of all kinds and protections.
#[test]
fn g11_a_range_of_many_kinds() {
    for faults in BOTH {
        let [chip, ..] = chips();
        let space = space_of(faults, &[&chip]);
        let all = Mapped::new(Private, 16 * MIB).unwrap();
        let part = |n: usize| all.start.wrapping_add(n * 2 * MIB);
        let kinds = [Private, File, PrivateFile, Private, SharedAnonymous, Memfd, Private, Code];
        for (n, kind) in kinds.into_iter().enumerate().filter(|(_, kind)| *kind != Private) {
            assert!(Mapped::at(part(n), kind, 2 * MIB).is_some());
        }
        all.fill();
        all.protect(3 * 512..4 * 512, libc::PROT_READ);
        all.protect(6 * 512..6 * 512 + 256, libc::PROT_NONE);
        let adopted = space.adopt(all.start, all.len).unwrap();
        let at = |n: usize| all.range().start + n * 2 * MIB;
        assert_eq!(adopted.in_place(), [at(1)..at(3), at(4)..at(6), at(7)..at(8)]);
        for n in 0..8 {
            let i = n * 512 + 9;
            let va = all.va(i);
            match n {
                3 => {
                    assert_eq!(chip.load(va), Ok(word(i)));
                    assert_eq!(chip.store(va, 1), Err(FaultError::ReadOnly(va)));
                }
                6 => {
                    assert_eq!(chip.load(va), Err(FaultError::Protected(va)));
                    chip.store(va + (1 << 20), 5).unwrap();
                    assert_eq!(all.word(i + 256, 0).load(SeqCst), 5);
                }
                _ => {
                    assert_eq!(chip.load(va), Ok(word(i)));
                    chip.store(va, !word(i)).unwrap();
                    assert_eq!(all.word(i, 0).load(SeqCst), !word(i));
                }
            }
        }
        // What lies beside what stays goes where it is sent: only what was asked for and cannot is an error.
        let own = space.devices()[1];
        let sent = space.prefetch(part(0), 2 * MIB, Node::Device(own)).unwrap().wait();
        assert!(sent.as_ref().is_ok_and(|bytes| *bytes >= 2 * MIB), "{sent:?}");
        assert!(space.prefetch(part(0), 4 * MIB, Node::Device(own)).unwrap().wait().is_err());
        space.check();
        adopted.release().unwrap();
        all.protect(0..all.pages(), RW);
        for n in 0..8 {
            let i = n * 512 + 9;
            let expected = if n == 3 || n == 6 { word(i) } else { !word(i) };
            assert_eq!(all.word(i, 0).load(SeqCst), expected, "part {n}");
            assert_eq!(all.word(i + 1, 0).load(SeqCst), word(i + 1), "part {n}");
        }
        space.check();
        all.unmap();
    }
}

/// Private memory that may not be accessed, or only read, is managed all the same (rule G1): what is away stays away, and is
/// there when it may be accessed again.
#[test]
fn g1_protected_memory_is_managed_and_comes_back() {
    for faults in BOTH {
        let [chip, ..] = chips();
        let space = space_of(faults, &[&chip]);
        let memory = Mapped::new(Private, 16 * MIB).unwrap();
        memory.protect(0..512, libc::PROT_NONE);
        memory.protect(512..1024, libc::PROT_READ);
        let adopted = space.adopt(memory.start, memory.len).unwrap();
        assert_eq!(adopted.in_place(), []);
        for i in (0..512).step_by(50) {
            assert_eq!(chip.load(memory.va(i)), Err(FaultError::Protected(memory.va(i))));
            assert_eq!(chip.load(memory.va(i + 512)), Ok(word(i + 512)));
            assert_eq!(chip.store(memory.va(i + 512), 0), Err(FaultError::ReadOnly(memory.va(i + 512))));
        }
        // Some of it goes to the device, then nobody may access it.
        for i in (2048..2552).step_by(7) {
            chip.store(memory.va(i), word(i)).unwrap();
        }
        memory.protect(2048..2552, libc::PROT_NONE);
        let mut other = space.region(mib(24)).unwrap();
        fill(other.typed_mut());
        memory.protect(0..memory.pages(), RW);
        assert!(memory.is_filled());
        assert!(is_filled(&other));
        space.check();
        // And what is given back while it is protected.
        for i in (2048..2552).step_by(7) {
            chip.store(memory.va(i), word(i)).unwrap();
        }
        memory.protect(0..memory.pages(), libc::PROT_NONE);
        adopted.release().unwrap();
        memory.protect(0..memory.pages(), RW);
        assert!(memory.is_filled());
        space.check();
        memory.unmap();
    }
}

/// Each refusal says why, and nothing has changed.
#[test]
fn what_cannot_be_adopted_is_refused() {
    let [chip, ..] = chips();
    let space = space_of(Faults::Signal, &[&chip]);
    let reason = |start: *const u8, len| space.adopt(start, len).expect_err("it was adopted").to_string();
    let nothing = |va: u64| assert!(matches!(chip.load(va), Err(FaultError::NotManaged(_))), "{va:#x} is managed");
    // A hole behind some of each kind.
    let memory = Mapped::new(Private, 8 * MIB).unwrap();
    for (n, kind) in [Memfd, File].into_iter().enumerate() {
        assert!(Mapped::at(memory.start.wrapping_add((n + 1) * 2 * MIB), kind, 2 * MIB).is_some());
    }
    let end = Mapped { start: memory.start.wrapping_add(6 * MIB), len: 2 * MIB, file: None };
    end.unmap();
    assert!(reason(memory.start, 8 * MIB).contains("not mapped"));
    (0..4).for_each(|n| nothing(memory.va(n * 512)));
    // Something in the midst is managed already.
    let part = space.adopt(memory.start.wrapping_add(2 * MIB), 2 * MIB).unwrap();
    for (start, len) in [(0, 6), (2, 2), (2, 4), (0, 4), (3, 1)] {
        let e = reason(memory.start.wrapping_add(start * MIB), len * MIB);
        assert!(e.contains("managed already"), "{e}");
    }
    assert!(part.in_place().into_iter().eq([part.range()]));
    nothing(memory.va(0));
    nothing(memory.va(1024));
    assert_eq!(chip.load(memory.va(512)), Ok(word(0)));
    drop(part);
    // What is the kernel's, and stacks.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapping = |name: &str| {
        let line = maps.lines().find(|l| l.ends_with(name))?;
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    };
    let (start, end) = mapping("[vdso]").unwrap();
    assert!(reason(start as *const u8, end - start).contains("the kernel has mapped for itself"));
    let (_, end) = mapping("[stack]").unwrap();
    assert!(reason((end - 8192) as *const u8, 4096).contains("stack of the first thread"));
    let here = 0u8;
    assert!(reason((&raw const here as usize & !4095) as *const u8, 4096).contains("stack of the calling thread"));
    let rest = space.adopt(memory.start, 6 * MIB).unwrap();
    assert!([0, 512, 1024].into_iter().all(|i| chip.load(memory.va(i)).is_ok()));
    drop(rest);
    space.check();
}

/// The program's own text and constants are read by a device, and written by none.
#[test]
fn g11_a_program_is_read_by_a_device() {
    static WORDS: [u64; 4096] = [0x0123_4567_89ab_cdef; 4096];
    let [chip, ..] = chips();
    let space = space_of(Faults::Signal, &[&chip]);
    let start = WORDS.as_ptr() as usize & !4095;
    let adopted = space.adopt(start as *const u8, 8 * 4096).unwrap();
    assert_eq!(adopted.in_place().len(), 1);
    let va = &raw const WORDS[1000] as u64;
    assert_eq!(chip.load(va), Ok(WORDS[1000]));
    let page = va & !4095;
    assert_eq!(chip.store(va, 1), Err(FaultError::ReadOnly(page)));
    let code = g11_a_program_is_read_by_a_device as *const u8 as usize & !4095;
    let text = space.adopt(code as *const u8, 4096).unwrap();
    // SAFETY: the page of a function can be read.
    let first = unsafe { *(code as *const u64) };
    assert_eq!(chip.load(code as u64), Ok(first));
    assert_eq!(chip.store(code as u64, 1), Err(FaultError::ReadOnly(code as u64)));
    drop((adopted, text));
    space.check();
}
