//! Kernels over a space: what they read and write, whatever moves meanwhile.

use super::*;
use proptest::prelude::*;

#[test]
fn g1_a_kernel_works_on_more_than_its_device_holds() {
    let gpu = accelerator(8);
    let space = FakeSpace::new(&gpu, 64, Manner::Move);
    let items = 64 * page() / 8;
    for _ in 0..2 {
        let job = launch(&gpu, items, |lane, items| {
            for i in items {
                let x: u64 = lane.load(BASE + 8 * i)?;
                lane.store(BASE + 8 * i, x + i)?;
            }
            Ok(())
        });
        job.wait().unwrap();
    }
    assert!((0..items).all(|i| space.cpu_word(BASE + 8 * i) == 2 * i));
    assert!(space.moves.load(Relaxed) >= 64);
    let s = gpu.statistics();
    assert!(s.bytes_in >= 64 * page() && s.bytes_out >= 64 * page(), "{s:?}");
    assert!(s.tlb_hits > 50 * s.tlb_misses / 10, "{s:?}");
    assert_eq!(s.faults, space.faults.load(Relaxed));
    space.let_go();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Of a value of any size at any address, each byte is where it belongs: across words, pages, and what is on the host.
    #[test]
    fn g1_values_of_any_size_lie_at_any_address(
        steps in prop::collection::vec((0..4 * 4096u64 - 600, 0..9usize, any::<u8>()), 1..40),
        share: bool,
    ) {
        let gpu = accelerator(2);
        let space = FakeSpace::new(&gpu, 6, if share { Manner::Share } else { Manner::Move });
        let expected = Arc::new(Mutex::new(vec![0u8; 4 * 4096]));
        let inner = expected.clone();
        once(&gpu, move |lane| {
            let mut expected = inner.lock().unwrap();
            for (at, size, byte) in &steps {
                let va = BASE + page() - 100 + at;
                fn swap<T: bytemuck::Pod>(lane: &Lane, va: u64, held: &mut [u8], byte: u8) -> Result<(), KernelError> {
                    let held = &mut held[..size_of::<T>()];
                    let seen: T = lane.load(va)?;
                    assert_eq!(bytemuck::bytes_of(&seen), held);
                    held.iter_mut().enumerate().for_each(|(i, b)| *b = byte.wrapping_add(i as u8));
                    lane.store(va, bytemuck::pod_read_unaligned::<T>(held))
                }
                let held = &mut expected[*at as usize..];
                match size {
                    0 => swap::<u8>(lane, va, held, *byte)?,
                    1 => swap::<u16>(lane, va, held, *byte)?,
                    2 => swap::<u32>(lane, va, held, *byte)?,
                    3 => swap::<u64>(lane, va, held, *byte)?,
                    4 => swap::<[u8; 3]>(lane, va, held, *byte)?,
                    5 => swap::<[u32; 3]>(lane, va, held, *byte)?,
                    6 => swap::<u128>(lane, va, held, *byte)?,
                    7 => swap::<[u16; 256]>(lane, va, held, *byte)?,
                    _ => swap::<[u8; 0]>(lane, va, held, *byte)?,
                }
            }
            Ok(())
        }).unwrap();
        let mut all = vec![0; 4 * 4096];
        space.cpu_read(BASE + page() - 100, &mut all);
        prop_assert_eq!(&all, &*expected.lock().unwrap());
        space.let_go();
    }
}

#[test]
fn g1_bytes_are_read_and_written_in_bulk_while_the_cpu_takes_pages_back() {
    let gpu = accelerator(16);
    let space = FakeSpace::new(&gpu, 64, Manner::Move);
    let len = 40 * page() as usize + 77;
    let bytes: Vec<u8> = (0..len).map(|i| ((i * 31) >> 3) as u8).collect();
    let job = {
        let bytes = bytes.clone();
        launch(&gpu, 4, move |lane, items| {
            for i in items {
                let at = BASE + page() * 3 / 2 + i % 2;
                if i == 0 {
                    lane.write(at, &bytes)?;
                }
                let mut back = vec![0; 1000];
                lane.read(at, &mut back)?;
            }
            Ok(())
        })
    };
    while !job.is_done() {
        space.cpu_word(BASE + 5 * page());
    }
    job.wait().unwrap();
    let mut back = vec![0; len];
    space.cpu_read(BASE + page() * 3 / 2, &mut back);
    assert!(back == bytes);
    space.let_go();
}

#[test]
fn g14_atomics_of_all_lanes_add_up_while_the_cpu_reads() {
    for manner in [Manner::Move, Manner::Share] {
        let gpu = Accelerator::new(Options::new(4 * page()).lanes(4)).unwrap();
        let space = FakeSpace::new(&gpu, 4, manner);
        let n = 20_000;
        let job = launch(&gpu, n, |lane, items| {
            for i in items {
                lane.fetch_add(BASE + 64, 1u64)?;
                lane.fetch_add(BASE + 76, 3u32)?;
                lane.fetch_update(BASE + 80, |x: u64| (i % 2 == 0).then_some(x + 5))?.ok();
                while lane.compare_exchange(BASE + page(), 0u32, 1u32)?.is_err() {
                    std::thread::yield_now();
                }
                // Under a lock of its own making, a value that is not atomic.
                let plain: u64 = lane.load(BASE + page() + 8)?;
                lane.store(BASE + page() + 8, plain + 1)?;
                lane.compare_exchange(BASE + page(), 1u32, 0u32)?.map_err(|_| KernelError::failed("not locked"))?;
            }
            Ok(())
        });
        while !job.is_done() {
            assert!(space.cpu_word(BASE + 64) <= n);
        }
        job.wait().unwrap();
        assert_eq!(space.cpu_word(BASE + 64), n);
        let mut word = [0; 4];
        space.cpu_read(BASE + 76, &mut word);
        assert_eq!(u32::from_ne_bytes(word), 3 * n as u32);
        assert_eq!(space.cpu_word(BASE + 80), 5 * n / 2);
        assert_eq!(space.cpu_word(BASE + page() + 8), n);
        space.let_go();
    }
}

#[test]
fn g14_an_atomic_access_to_a_page_of_the_host_moves_it() {
    let gpu = accelerator(4);
    let space = FakeSpace::new(&gpu, 4, Manner::Share);
    space.cpu_write(BASE, &7u64.to_ne_bytes());
    once(&gpu, |lane| lane.store(BASE + 8, 1u64)).unwrap();
    assert_eq!(space.lock().places[0], Place::Host);
    once(&gpu, |lane| {
        assert_eq!(lane.fetch_add(BASE, 1u64)?, 7);
        assert_eq!(lane.fetch_add::<u64>(BASE + 4, 1), Err(KernelError::Unaligned(BASE + 4)));
        assert_eq!(lane.compare_exchange(BASE, 7u64, 0)?, Err(8));
        assert_eq!(lane.fetch_update(BASE, |_: u64| None)?, Err(8));
        Ok(())
    })
    .unwrap();
    assert!(matches!(space.lock().places[0], Place::Device(_)));
    assert_eq!((space.cpu_word(BASE), space.cpu_word(BASE + 8)), (8, 1));
    space.let_go();
}

#[test]
fn g3_what_was_never_touched_reads_as_zeros_and_takes_up_nothing() {
    let gpu = accelerator(4);
    let space = FakeSpace::new(&gpu, 4, Manner::Move);
    once(&gpu, |lane| {
        assert_eq!(lane.load::<[u64; 32]>(BASE + page() - 100)?, [0; 32]);
        let mut bytes = vec![1; 3 * page() as usize];
        lane.read(BASE + 3, &mut bytes)?;
        assert!(bytes.iter().all(|b| *b == 0));
        Ok(())
    })
    .unwrap();
    assert_eq!(space.lock().free.len(), 4);
    // A write puts a page there.
    once(&gpu, |lane| lane.store(BASE + 1, 9u8)).unwrap();
    assert_eq!(space.lock().free.len(), 3);
    assert_eq!(space.cpu_word(BASE).to_ne_bytes()[1], 9);
    space.let_go();
}

#[test]
fn g10_accesses_to_the_hosts_memory_are_counted_and_told() {
    let gpu = accelerator(4);
    let space = FakeSpace::new(&gpu, 200, Manner::Share);
    for i in 0..200 {
        space.cpu_write(BASE + i * page(), &i.to_ne_bytes());
    }
    once(&gpu, |lane| {
        for i in 0..200 {
            assert_eq!(lane.load::<u64>(BASE + i * page())?, i);
        }
        for _ in 0..130 {
            lane.load::<u32>(BASE + 150 * page() + 8)?;
        }
        lane.write(BASE + 151 * page() - 8, &[1; 16])
    })
    .unwrap();
    let s = gpu.statistics();
    assert_eq!((s.remote_bytes_read, s.remote_bytes_written), (200 * 8 + 130 * 4, 16));
    assert_eq!((s.bytes_in, s.bytes_out, s.transfers), (0, 0, 0));
    let noted = std::mem::take(&mut space.lock().noted);
    let of =
        |page_number: u64| noted.iter().filter(move |n| n.0 / page() == BASE / page() + page_number).map(|n| n.1);
    // As often as one in 64 times, and when another page of the lane's counters took the place.
    assert_eq!(of(150).collect::<Vec<_>>(), [64, 64], "{noted:?}");
    assert_eq!(of(3).collect::<Vec<_>>(), [1]);
    space.let_go();
}

#[test]
fn g4_faults_that_come_to_nothing_end_with_an_error() {
    let gpu = accelerator(4);
    let space = FakeSpace::new(&gpu, 4, Manner::Lie);
    let failed = once(&gpu, |lane| lane.load::<u8>(BASE + 5).map(drop));
    assert_eq!(failed, Err(FaultError::NoHeadway(BASE + 5).into()));
    assert_eq!(space.faults.load(Relaxed), 1000);
    // Memory of the host that is mapped and never there, likewise.
    map(&gpu, BASE, page(), Target::Host, true);
    assert_eq!(once(&gpu, |lane| lane.store(BASE, 1u8)), Err(FaultError::NoHeadway(BASE).into()));
    assert_eq!(once(&gpu, |lane| lane.fetch_add(BASE, 1u32).map(drop)), Err(FaultError::NoHeadway(BASE).into()));
    space.let_go();
    assert_eq!(once(&gpu, |lane| lane.store(BASE, 1u8)), Err(FaultError::Cut.into()));
}

#[test]
fn g4_addresses_that_are_none_are_errors_of_the_access() {
    let gpu = Accelerator::new(Options::new(4 * page()).addresses(0..BASE + 100 * page())).unwrap();
    let space = FakeSpace::new(&gpu, 4, Manner::Move);
    once(&gpu, |lane| {
        fn not_managed<T>(va: u64) -> Result<T, KernelError> {
            Err(FaultError::NotManaged(va).into())
        }
        fn out_of_reach<T>(va: u64) -> Result<T, KernelError> {
            Err(FaultError::OutOfReach(va).into())
        }
        assert_eq!(lane.load::<u8>(0), not_managed(0));
        assert_eq!(lane.store(BASE - 1, 1u8), not_managed(BASE - 1));
        // What lies inside is written, of what does not.
        assert_eq!(lane.store(BASE + 4 * page() - 4, 0x0101_0101_0101_0101_u64), not_managed(BASE + 4 * page()));
        assert_eq!(lane.load::<u32>(BASE + 4 * page() - 4), Ok(0x0101_0101));
        assert_eq!(lane.load::<u64>(BASE + 100 * page()), out_of_reach(BASE + 100 * page()));
        assert_eq!(lane.load::<u64>(u64::MAX), out_of_reach(u64::MAX));
        assert_eq!(lane.fetch_add::<u64>(u64::MAX - 7, 1), out_of_reach(u64::MAX - 7));
        assert_eq!(lane.write(BASE + 100 * page() - 1, &[0; 2]), not_managed(BASE + 100 * page() - 1));
        assert_eq!(lane.read(u64::MAX - 3, &mut [0; 9]), out_of_reach(u64::MAX - 3));
        Ok(())
    })
    .unwrap();
    space.let_go();
}

#[test]
fn a_device_that_cannot_fault_says_what_it_misses() {
    let gpu = Accelerator::new(Options::new(4 * page()).without_faults()).unwrap();
    let space = FakeSpace::new(&gpu, 4, Manner::Move);
    assert!(!gpu.mmu().unwrap().describe().faults);
    assert_eq!(once(&gpu, |lane| lane.load::<u8>(BASE).map(drop)), Err(KernelError::NotMapped(BASE)));
    map(&gpu, BASE, page(), Target::Own(1), false);
    assert_eq!(once(&gpu, |lane| lane.load::<u8>(BASE).map(drop)), Ok(()));
    assert_eq!(once(&gpu, |lane| lane.store(BASE, 1u8)), Err(KernelError::NotMapped(BASE)));
    assert_eq!(space.faults.load(Relaxed), 0);
    space.let_go();
}
