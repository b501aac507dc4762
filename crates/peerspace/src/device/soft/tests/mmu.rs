//! Translations that come and go while lanes use them, and what is refused.

use super::*;
use crate::device::DeviceError;
use crate::device::soft::Failure;
use crate::device::soft::table::FANOUT;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

/// A port whose faults wait for nothing and map nothing: the test does.
struct Idle;

impl PortOps for Idle {
    fn fault(&self, _: u64, _: DeviceAccess) -> Result<(), FaultError> {
        std::thread::yield_now();
        Ok(())
    }
    fn read(&self, va: u64, _: &mut [u8]) -> Result<(), FaultError> {
        Err(FaultError::NotMapped(va))
    }
    fn write(&self, va: u64, _: &[u8]) -> Result<(), FaultError> {
        Err(FaultError::NotMapped(va))
    }
    fn note_remote(&self, _: u64, _: u32) {}
}

fn fill(gpu: &Accelerator, at: u64, count: u64, byte: u8) {
    let bytes = vec![byte; (count * page()) as usize];
    let mut store = [Store::new(at, &bytes)];
    gpu.store(&mut store);
    store[0].result.clone().unwrap();
}

fn is_filled(gpu: &Accelerator, at: u64, count: u64, byte: u8) -> bool {
    let mut bytes = vec![!byte; (count * page()) as usize];
    let mut load = [Load::new(at, &mut bytes)];
    gpu.load(&mut load);
    load[0].result.clone().unwrap();
    bytes.iter().all(|b| *b == byte)
}

/// Lanes read and write a page or block of which the translation goes and comes, each time to another place. Whatever they do by
/// an old one would be seen: they would read the mark of what is free, or write over it.
fn g5_hammer(bytes: u64, rounds: u64, whole: bool) {
    const FREE: u8 = 0xfe;
    const USED: u8 = 0x11;
    let pages = bytes / page();
    let gpu = Accelerator::new(Options::new(2 * bytes).lanes(3).tlb(8)).unwrap();
    gpu.attached(Port::new(Arc::new(Idle)));
    let stop = Arc::new(AtomicBool::new(false));
    let accesses = Arc::new(AtomicU64::new(0));
    fill(&gpu, 0, pages, USED);
    fill(&gpu, pages, pages, FREE);
    map(&gpu, BASE, bytes, Target::Own(0), true);
    let job = {
        let (stop, accesses) = (stop.clone(), accesses.clone());
        launch(&gpu, 3, move |lane, items| {
            let mut i = items.start;
            while !stop.load(Relaxed) {
                i = i.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let va = BASE + (i >> 20) % (bytes - 8);
                let mut seen = [USED; 4096];
                let most = seen.len().min((BASE + bytes - va) as usize);
                let some = &mut seen[..if i & 1 == 0 { 5 } else { most }];
                let read = lane.read(va, some);
                if some.iter().any(|b| *b != USED) {
                    return Err(KernelError::failed("read what was free"));
                }
                // A thousand fruitless faults are nothing here.
                match read.and_then(|()| lane.write(va, some)) {
                    Err(KernelError::Fault(FaultError::NoHeadway(_))) | Ok(()) => {}
                    Err(e) => return Err(e),
                }
                accesses.fetch_add(1, Relaxed);
            }
            Ok(())
        })
    };
    for round in 0..rounds {
        let (old, new) = (round % 2 * pages, (round + 1) % 2 * pages);
        // A part of a block takes the whole away.
        let part = if whole { BASE..BASE + bytes } else { BASE + bytes / 2..BASE + bytes / 2 + page() };
        unmap(&gpu, part);
        // At once: a lane that is still at it would be seen by what it reads, or by what it leaves.
        fill(&gpu, old, pages, FREE);
        if round % 4 == 0 {
            std::thread::yield_now();
        }
        assert!(is_filled(&gpu, old, pages, FREE), "a lane wrote by an old translation in round {round}");
        fill(&gpu, new, pages, USED);
        map(&gpu, BASE, bytes, Target::Own(new), true);
        // Let them get at it now and then, whoever has the processor.
        let seen = accesses.load(Relaxed);
        while round % 16 == 0 && accesses.load(Relaxed) == seen && !job.is_done() {
            std::thread::yield_now();
        }
    }
    stop.store(true, Relaxed);
    job.wait().unwrap();
    let s = gpu.statistics();
    assert!(s.tlb_hits > 0 && s.tlb_misses > 0 && s.faults > 0, "{s:?}");
}

#[test]
fn g5_no_lane_uses_a_page_once_it_is_unmapped() {
    g5_hammer(page(), 4000, true);
}

#[test]
fn g5_no_lane_uses_a_block_once_a_part_of_it_is_unmapped() {
    g5_hammer(page() * FANOUT, 40, false);
}

#[test]
fn g5_what_takes_the_place_of_a_translation_ends_it() {
    let gpu = Accelerator::new(Options::new(2 * page()).lanes(2)).unwrap();
    gpu.attached(Port::new(Arc::new(Idle)));
    fill(&gpu, 0, 2, 1);
    map(&gpu, BASE, page(), Target::Own(0), true);
    let stop = Arc::new(AtomicBool::new(false));
    let job = {
        let stop = stop.clone();
        launch(&gpu, 2, move |lane, _| {
            while !stop.load(Relaxed) {
                if lane.load::<u64>(BASE + 16)? != 0x0101_0101_0101_0101 {
                    return Err(KernelError::failed("read what was given up"));
                }
            }
            Ok(())
        })
    };
    for round in 0..2000 {
        let (old, new) = (round % 2, (round + 1) % 2);
        fill(&gpu, new, 1, 1);
        map(&gpu, BASE, page(), Target::Own(new), round % 3 == 0);
        fill(&gpu, old, 1, 2);
    }
    stop.store(true, Relaxed);
    job.wait().unwrap();
}

#[test]
fn g5_write_permission_that_is_taken_is_gone_at_once() {
    let gpu = Accelerator::new(Options::new(page()).lanes(2)).unwrap();
    gpu.attached(Port::new(Arc::new(Idle)));
    fill(&gpu, 0, 1, 0);
    let stop = Arc::new(AtomicBool::new(false));
    let job = {
        let stop = stop.clone();
        launch(&gpu, 2, move |lane, _| {
            let mut n = 0u64;
            while !stop.load(Relaxed) {
                n += 1;
                match lane.store(BASE + 8 * lane.index() as u64, n) {
                    Ok(()) | Err(KernelError::Fault(FaultError::NoHeadway(_))) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        })
    };
    let both = || {
        let mut bytes = vec![0; page() as usize];
        let mut load = [Load::new(0, &mut bytes)];
        gpu.load(&mut load);
        bytes
    };
    let (mut changed, mut rounds) = (0, 0);
    // As long as it takes for somebody to write, on a processor that has other things to do.
    while rounds < 1000 || (changed == 0 && !job.is_done()) {
        rounds += 1;
        map(&gpu, BASE, page(), Target::Own(0), true);
        let open = both();
        std::thread::yield_now();
        map(&gpu, BASE, page(), Target::Own(0), false);
        let before = both();
        changed += u32::from(open != before);
        std::thread::yield_now();
        assert_eq!(both(), before, "written although it was read-only");
    }
    stop.store(true, Relaxed);
    job.wait().unwrap();
    assert!(changed > 0, "nobody wrote at all");
}

#[test]
fn g4_what_is_not_there_or_not_aligned_is_refused() {
    let gpu = Accelerator::new(Options::new(600 * page()).remote(false).zero_page(false).addresses(BASE..2 * BASE))
        .unwrap();
    let block = page() * FANOUT;
    let refused = |va, bytes, to, writable| gpu.map(&[Mapping { va, bytes, to, writable }]).unwrap_err();
    let invalid = DeviceError::Io(22);
    for (va, bytes, to) in [
        (BASE + 1, page(), Target::Own(0)),
        (BASE, page() + 1, Target::Own(0)),
        (BASE, 0, Target::Own(0)),
        (BASE, u64::MAX, Target::Own(0)),
        (BASE, 2 * page(), Target::Own(0)),
        (BASE + page(), block, Target::Own(0)),
        (BASE, block, Target::Own(1)),
        (BASE, block, Target::Own(FANOUT)),
        (BASE, page(), Target::Own(600)),
        (BASE, page(), Target::Own(u64::MAX)),
        (0, page(), Target::Own(0)),
        (2 * BASE, page(), Target::Own(0)),
        (u64::MAX - page() + 1, page(), Target::Own(0)),
    ] {
        assert_eq!(refused(va, bytes, to, true), invalid, "{va:#x} {bytes} {to:?}");
    }
    assert_eq!(refused(BASE, page(), Target::Host, true), DeviceError::Unsupported);
    assert_eq!(refused(BASE, page(), Target::Zero, false), DeviceError::Unsupported);
    assert_eq!(
        accelerator(1).map(&[Mapping { va: 0, bytes: page(), to: Target::Zero, writable: true }]),
        Err(invalid)
    );
    // And what is there is not.
    map(&gpu, BASE, page(), Target::Own(599), true);
    map(&gpu, BASE + block, block, Target::Own(0), false);
    assert_eq!(gpu.unmap(0..u64::MAX), Ok(Progress::Done));
    assert_eq!(gpu.unmap(u64::MAX..u64::MAX), Ok(Progress::Done));
    assert!(!gpu.take_accessed(0..u64::MAX));
}

#[test]
fn g13_addresses_are_kept_free_where_nothing_of_the_devices_is() {
    let options = Options::new(page()).addresses(0x1000..0x9000_0000).occupied(0x10_0000..0x20_0000);
    let gpu = Accelerator::new(options).unwrap();
    let mmu: &dyn Mmu = &gpu;
    assert_eq!(mmu.describe().addresses, 0x1000..0x9000_0000);
    assert!(!mmu.reserve(0..0x2000) && !mmu.reserve(0x8fff_f000..0x9000_1000));
    assert!(
        !mmu.reserve(0xf_f000..0x10_1000) && !mmu.reserve(0x18_0000..0x19_0000) && mmu.reserve(0x20_0000..0x30_0000)
    );
    // As often as the space likes: it may leave and come back.
    mmu.release(0x20_0000..0x30_0000);
    assert!(mmu.reserve(0x20_0000..0x30_0000) && mmu.reserve(0x20_0000..0x30_0000));
}

#[test]
fn what_was_used_is_told_once_and_again_when_it_was_used_again() {
    let gpu = accelerator(FANOUT + 2);
    gpu.attached(Port::new(Arc::new(Idle)));
    let block = page() * FANOUT;
    map(&gpu, BASE, block, Target::Own(0), true);
    map(&gpu, BASE + block, page(), Target::Own(FANOUT), true);
    map(&gpu, BASE + block + page(), page(), Target::Own(FANOUT + 1), true);
    let all = BASE..BASE + 2 * block;
    assert!(!gpu.take_accessed(all.clone()));
    for _ in 0..3 {
        once(&gpu, move |lane| lane.load::<u8>(BASE + block + page()).map(drop)).unwrap();
        assert!(!gpu.take_accessed(BASE..BASE + block + page()));
        assert!(gpu.take_accessed(BASE + block + page()..BASE + block + 2 * page()));
        assert!(!gpu.take_accessed(all.clone()));
        once(&gpu, move |lane| lane.store(BASE + 5 * page(), 7u32)).unwrap();
        assert!(gpu.take_accessed(BASE + page()..BASE + 2 * page()), "of a block, any part stands for the whole");
    }
}

#[test]
fn g5_a_device_that_never_unmaps_says_so_for_ever() {
    let gpu = accelerator(1);
    gpu.attached(Port::new(Arc::new(Idle)));
    map(&gpu, BASE, page(), Target::Own(0), true);
    gpu.fail_at(Failure::NeverUnmap, 1);
    assert_eq!(gpu.unmap(BASE + page()..BASE + 2 * page()), Ok(Progress::Done));
    let Ok(Progress::Pending(fence)) = gpu.unmap(BASE..BASE + page()) else { panic!("it was done") };
    assert_eq!(gpu.is_done(fence), Ok(false));
    // It goes on using what it was to give up.
    once(&gpu, |lane| lane.store(BASE, 1u8)).unwrap();
    gpu.mend(Failure::NeverUnmap);
    assert_eq!(gpu.is_done(fence), Ok(false));
    assert_eq!(gpu.unmap(BASE..BASE + page()), Ok(Progress::Done));
    assert!(once(&gpu, |lane| lane.store(BASE, 1u8)).is_err());
}

#[test]
fn g16_a_device_that_refuses_to_map_or_is_gone_says_so() {
    let gpu = accelerator(1);
    gpu.attached(Port::new(Arc::new(Idle)));
    let one = [Mapping { va: BASE, bytes: page(), to: Target::Own(0), writable: true }];
    gpu.fail_at(Failure::RefuseMap, 0);
    assert_eq!(gpu.map(&one), Err(DeviceError::NoSpace));
    gpu.mend(Failure::RefuseMap);
    assert_eq!(gpu.map(&one), Ok(()));
    let (ready, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let job = {
        let (ready, go_on) = (ready.clone(), go_on.clone());
        launch(&gpu, 1, move |lane, _| {
            lane.load::<u8>(BASE)?;
            ready.store(true, SeqCst);
            while !go_on.load(SeqCst) {
                std::thread::yield_now();
            }
            lane.load::<u8>(BASE).map(drop)
        })
    };
    while !ready.load(SeqCst) {
        std::thread::yield_now();
    }
    gpu.fail_at(Failure::Gone, 1);
    assert_eq!(gpu.map(&one), Ok(()));
    assert_eq!(gpu.map(&one), Err(DeviceError::Gone));
    assert_eq!(gpu.unmap(BASE..BASE + page()), Err(DeviceError::Gone));
    assert_eq!(gpu.is_done(1), Err(DeviceError::Gone));
    let bytes = vec![0; page() as usize];
    let mut store = [Store::new(0, &bytes)];
    gpu.store(&mut store);
    assert_eq!(store[0].result, Err(DeviceError::Gone));
    go_on.store(true, SeqCst);
    assert_eq!(job.wait(), Err(FaultError::Device(BASE, DeviceError::Gone).into()));
    // SAFETY: it is not launched.
    assert!(unsafe { gpu.launch(1, |_, _| Ok(())) }.is_err());
    gpu.mend(Failure::Gone);
    once(&gpu, |lane| lane.load::<u8>(BASE).map(drop)).unwrap();
}
