//! Devices that run code and do what they must not: whatever they do, an access gets its data or an error that says why;
//! others go on; nothing is lost that could be saved; nothing reads as zeros or as what it was before; nothing hangs
//! (rules G4 to G6, G12, G16, Z8, Z9).

#[path = "peers/chip.rs"]
mod chip;
mod common;
#[path = "peers_hostile/cut.rs"]
mod cut;
#[path = "peers_hostile/fork.rs"]
mod fork;
#[path = "peers_hostile/memory.rs"]
mod memory;
#[path = "peers_hostile/moves.rs"]
mod moves;

use chip::{Chip, PAGE, Trouble};
use common::*;
use peerspace::device::DeviceError;
use peerspace::device::mmu::{DeviceAccess, FaultError, MmuDescriptor, Mode, Target};
use peerspace::device::soft::Soft;
use peerspace::{Error, Faults, Hint, Region, Space};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

const BOTH: [Faults; 2] = [Faults::Signal, Faults::Threads];
const CHIP: u64 = 16 << 20;

/// A device in each mode.
fn modes() -> [MmuDescriptor; 3] {
    [
        MmuDescriptor::new(Mode::Exclusive),
        MmuDescriptor::new(Mode::Replicate).zero_page(),
        MmuDescriptor::new(Mode::Share).remote(),
    ]
}

fn space_of(faults: Faults, host: usize, chips: &[&Chip]) -> Space {
    catch_lost_accesses();
    let builder = Space::builder().host(host as u64).device(Soft::new(mib(128)).unwrap());
    let builder = chips.iter().fold(builder, |builder, chip| builder.device((*chip).clone()));
    builder.faults(faults).build().unwrap()
}

/// A filled region of `bytes` bytes, in small pages or in blocks.
fn region_of(space: &Space, bytes: usize, dense: bool) -> Region {
    let mut region = space.region(bytes as u64).unwrap();
    region.advise(if dense { Hint::Dense } else { Hint::Sparse }).unwrap();
    fill(region.typed_mut());
    region
}

fn at(region: &Region, page: usize) -> u64 {
    region.as_ptr() as u64 + page as u64 * PAGE
}

/// What `work` returns; if it takes longer than this it hangs, or as good as.
fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> T) -> T {
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let name = what.to_owned();
    let watch = std::thread::spawn(move || {
        if waits.recv_timeout(limit * 3 + Duration::from_secs(30)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            // Past the capture of the test harness.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{name} hangs\n").as_bytes());
            std::process::abort();
        }
    });
    let begin = Instant::now();
    let result = work();
    let took = begin.elapsed();
    drop(done);
    watch.join().unwrap();
    assert!(took <= limit, "{what} took {took:?}, and may take {limit:?}");
    result
}

/// Waits for something that others do.
fn wait_until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody makes headway");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Looks at every page: it has its word, or is lost. Returns the lost ones.
fn lost_of(region: &Region) -> Vec<usize> {
    let mut bytes = vec![0; page()];
    (0..region.len() / page())
        .filter(|i| match region.try_read(i * page(), &mut bytes) {
            Ok(()) => {
                let good = bytes == word(*i).to_le_bytes().repeat(words_per_page());
                assert!(good, "page {i} is {:#x?} and not {:#x}", &bytes[..8], word(*i));
                false
            }
            Err(Error::Lost { .. }) => {
                if CAN_TRY {
                    assert_eq!(read_byte(region.as_ptr().wrapping_add(i * page())), None, "page {i}");
                }
                true
            }
            Err(e) => panic!("page {i}: {e}"),
        })
        .collect()
}

/// Rule G16: a translation that cannot be entered changes nothing.
#[test]
fn g16_a_device_that_refuses_translations_gets_none_and_loses_nothing() {
    for (faults, dense, info) in all() {
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let region = region_of(&space, 4 * MIB, dense);
        chip.trouble().refuse_map.store(true, SeqCst);
        for i in [0, 1, 700] {
            assert_eq!(chip.load(at(&region, i)), Err(FaultError::Device(at(&region, i), DeviceError::Io(12))));
            assert!(chip.store(at(&region, i), 1).is_err() && chip.add(at(&region, i), 1).is_err());
        }
        space.check();
        assert!(is_filled(&region));
        chip.trouble().refuse_map.store(false, SeqCst);
        assert!((0..1024).all(|i| chip.load(at(&region, i)) == Ok(word(i))));
        space.check();
        assert!(is_filled(&region));
    }
}

/// Each delivery, small pages and blocks, each mode.
fn all() -> impl Iterator<Item = (Faults, bool, MmuDescriptor)> {
    let of = |faults| [false, true].into_iter().flat_map(move |dense| modes().map(|info| (faults, dense, info)));
    BOTH.into_iter().flat_map(of)
}

/// A device that says that it has entered translations, and has not, is told so in the end.
#[test]
fn a_device_that_forgets_translations_makes_no_headway() {
    for info in modes() {
        let chip = Chip::new("chip", CHIP, info.clone());
        let space = space_of(Faults::Signal, 16 * MIB, &[&chip]);
        let region = region_of(&space, 4 * MIB, false);
        chip.trouble().forget_map.store(true, SeqCst);
        // One thread; and two, each with a page of its own.
        let tries: [&[usize]; 2] = [&[5], &[6, 900]];
        for pages in tries {
            within(Duration::from_secs(20), "a fault without headway", || {
                std::thread::scope(|scope| {
                    for i in pages {
                        let (chip, va) = (&chip, at(&region, *i));
                        scope.spawn(move || assert_eq!(chip.load(va), Err(FaultError::NoHeadway(va))));
                    }
                });
            });
        }
        chip.trouble().forget_map.store(false, SeqCst);
        assert_eq!(chip.load(at(&region, 5)), Ok(word(5)), "{info:?}");
        space.check();
        assert!(is_filled(&region));
    }
}

fn never(trouble: &Trouble) {
    trouble.never_unmap.store(true, SeqCst);
}

fn refuses(trouble: &Trouble) {
    trouble.refuse_unmap.store(true, SeqCst);
}

fn panics_in_unmap(trouble: &Trouble) {
    trouble.panic_in("unmap");
}

fn panics_in_is_done(trouble: &Trouble) {
    trouble.late.store(3, SeqCst);
    trouble.panic_in("is_done");
}

fn panics_in_mmu(trouble: &Trouble) {
    trouble.panic_in("mmu");
}

/// Rules G5, Z9: a device that does not let go is cut off. What it alone had is lost; what others have too is not.
#[test]
fn g5_a_device_that_does_not_let_go_is_cut_off() {
    let ways = [never, refuses, panics_in_unmap, panics_in_is_done, panics_in_mmu];
    for (n, ((faults, dense, info), how)) in all().zip(ways.into_iter().cycle()).enumerate() {
        let chip = Chip::new("chip", CHIP, info.clone().deadline(Duration::from_millis(300)));
        let other = Chip::exclusive("other", CHIP);
        let space = space_of(faults, 16 * MIB, &[&chip, &other]);
        let mut region = region_of(&space, 4 * MIB, dense);
        let used = if dense { 0..512 } else { 100..200 };
        used.clone().for_each(|i| assert_eq!(chip.load(at(&region, i)), Ok(word(i))));
        how(chip.trouble());
        let what = format!("{n}: {info:?} {dense}");
        // One deadline, and never again.
        within(Duration::from_secs(10), &what, || {
            if info.mode == Mode::Exclusive {
                let lost = lost_of(&region);
                // By blocks, or in runs, the device may have got more than it asked for.
                let all = used.clone().all(|i| lost.contains(&i));
                assert!(all && lost.len() <= used.len() + 64, "{what}: {lost:?}");
                let va = at(&region, lost[0]);
                assert!(matches!(other.load(va), Err(FaultError::Lost(at, _)) if at == va), "{what}");
                region.discard(0..4 * MIB).unwrap();
            } else {
                // Somebody wants to be alone with it.
                other.store(at(&region, used.start), word(used.start)).unwrap();
                assert_eq!(lost_of(&region), Vec::<usize>::new(), "{what}");
            }
        });
        // It keeps no access: neither through its port, nor by what it was given before.
        let va = at(&region, used.start);
        assert_eq!(chip.port().fault(va, DeviceAccess::Read), Err(FaultError::Cut), "{what}");
        assert_eq!(chip.port().read(va, &mut [0; 8]), Err(FaultError::Cut), "{what}");
        assert_eq!(chip.port().write(va, &[1; 8]), Err(FaultError::Cut), "{what}");
        fill(region.typed_mut());
        assert_eq!(other.load(va), Ok(word(used.start)));
        space.check();
        assert!(is_filled(&region), "{what}");
        chip.trouble().panic_in("");
    }
}

/// A device that takes its time to let go keeps its promises.
#[test]
fn g5_a_device_that_lets_go_in_time_loses_nothing() {
    for (faults, dense, info) in all() {
        let chip = Chip::new("chip", CHIP, info);
        let space = space_of(faults, 16 * MIB, &[&chip]);
        let mut region = region_of(&space, 4 * MIB, dense);
        chip.trouble().late.store(5, SeqCst);
        for round in 0..3 {
            for i in 0..1024 {
                assert_eq!(chip.load(at(&region, i)), Ok(word(i)), "round {round}");
                if i % 3 == 0 {
                    chip.store(at(&region, i), word(i)).unwrap();
                }
            }
            fill(region.typed_mut());
            assert!(is_filled(&region));
        }
        space.check();
    }
}

/// Whatever function of a device panics, the program does not notice but by an error of that device.
#[test]
fn panics_of_devices_stay_with_them() {
    let functions = ["map", "store", "load", "clear", "copy_from", "freed", "take_accessed", "release", "reserve"];
    for (function, faults) in functions.into_iter().zip(BOTH.into_iter().cycle()) {
        // Of few pages, so that it has to evict, too.
        let chip = Chip::exclusive("chip", 64 * PAGE);
        let other = Chip::exclusive("other", CHIP);
        let space = space_of(faults, 16 * MIB, &[&chip, &other]);
        let region = region_of(&space, 4 * MIB, false);
        let fresh = space.region(mib(2)).unwrap();
        (100..200).for_each(|i| assert_eq!(other.load(at(&region, i)), Ok(word(i))));
        chip.trouble().panic_in(function);
        // Where it could not be loaded from, nothing is stored any more: none of its pages is left.
        let is_used_up = |space: &Space| {
            let chip = space.statistics().devices.into_iter().find(|d| d.name == "chip").expect("it is there");
            chip.retired_bytes == chip.capacity_bytes
        };
        let mut bad = 0;
        for i in 0..300 {
            bad += match chip.load(at(&region, i)) {
                Ok(w) => (w != word(i)) as u32 * 1000,
                Err(FaultError::Device(_, DeviceError::Panicked)) => 1,
                // What is lost is what it had and could not be loaded.
                Err(FaultError::Lost(..)) if function == "load" => 1,
                Err(FaultError::NoRoom(_)) if function == "load" && is_used_up(&space) => 1,
                Err(e) => panic!("{function}: {e}"),
            };
            let zero = chip.load(at(&fresh, i));
            assert!(
                matches!(zero, Ok(0) | Err(FaultError::Device(..) | FaultError::Lost(..)))
                    || function == "load" && matches!(zero, Err(FaultError::NoRoom(_))) && is_used_up(&space),
                "{function}: {zero:?}"
            );
        }
        assert!(bad <= 300, "{function}: {bad}");
        // What comes from the other device is not stored.
        let least = [("map", 300), ("store", 190)].iter().find(|f| f.0 == function).map_or(0, |f| f.1);
        assert!(bad >= least, "{function}: {bad}");
        drop(space.region(mib(2)));
        chip.trouble().panic_in("");
        let lost = lost_of(&region);
        assert_eq!(function == "load", !lost.is_empty(), "{function}: {lost:?}");
        space.check();
    }
    // At the beginning the device, or the space, is refused, and says why.
    for function in ["mmu", "attached"] {
        let chip = Chip::exclusive("chip", CHIP);
        chip.trouble().panic_in(function);
        let space = space_of(Faults::Signal, 16 * MIB, &[]);
        let attached = space.attach(chip.clone());
        match function {
            "mmu" => assert!(attached.unwrap_err().to_string().contains("panicked"), "{function}"),
            // It is there, and gets nothing.
            _ => assert!(attached.is_ok()),
        }
        let region = region_of(&space, 4 * MIB, false);
        assert!(is_filled(&region));
        space.check();
    }
}

/// A device without its port is a device that nobody hears of.
fn stop_when(stop: &AtomicBool, mut work: impl FnMut(u64)) -> u64 {
    let mut n = 0;
    while !stop.load(SeqCst) {
        work(n);
        n += 1;
    }
    n
}
