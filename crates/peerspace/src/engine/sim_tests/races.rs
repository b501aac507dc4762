//! Several threads at once, in the interleavings that shuttle chooses: faults, reclaim, reading ahead, messages, and a
//! program that changes its mappings meanwhile. Every byte read is compared with what was written.
//!
//! Each test also counts that what it is about has come to pass: a race that never happens proves nothing.

use super::{ABLE, Came, PAGE, Rig, Shelf};
use peerspace_core::addr::{Access, PageRange, Pages, Va, VaRange};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_os::inject::Call;
use peerspace_os::own::{Box as OwnBox, Buffer, Own};
use peerspace_os::sim::Trap;
use peerspace_os::{Capabilities, Kernel};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner, thread};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Samples `schedules` interleavings at random, and as many of those that need few switches (PCT).
pub(super) fn explore(schedules: usize, run: fn()) {
    let mut config = Config::new();
    // The fault path keeps its batches on the stack.
    config.stack_size = 1 << 20;
    // Walks over all pages of a block take many; threads that wait for one take as many again.
    config.max_steps = MaxSteps::FailAfter(10_000_000);
    config.failure_persistence = FailurePersistence::Print;
    Runner::new(RandomScheduler::new(schedules), config.clone()).run(run);
    Runner::new(PctScheduler::new(3, schedules), config).run(run);
}

pub(super) fn page(range: VaRange, n: usize) -> Va {
    Va(range.start.0 + (n * PAGE) as u64)
}

pub(super) fn word(rig: &Rig, va: Va) -> Result<u64, Came> {
    let mut bytes = [0; 8];
    match rig.read(va, &mut bytes) {
        Came::Done => Ok(u64::from_ne_bytes(bytes)),
        other => Err(other),
    }
}

pub(super) fn put(rig: &Rig, va: Va, value: u64) {
    assert_eq!(rig.write(va, &value.to_ne_bytes()), Came::Done, "a write to {va}");
}

/// A thread that receives messages until it is told to stop.
pub(super) struct Receiver {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Receiver {
    pub(super) fn start(rig: &Arc<Rig>) -> Receiver {
        let stop = Arc::new(AtomicBool::new(false));
        let (rig, stopped) = (rig.clone(), stop.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Relaxed) {
                if rig.engine.kernel.wait_message(None) {
                    let _ = rig.engine.receive();
                }
            }
        });
        Receiver { stop, thread }
    }

    pub(super) fn end(self) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
    }
}

pub(super) fn rig(can: Capabilities) -> (Arc<Rig>, Shelf) {
    let shelf = Shelf::new(2000).compares();
    (Arc::new(Rig::new(can, [shelf.clone()], false)), shelf)
}

/// Starts two threads that read and write `pages` pages each, of their own: each page begins with what `first` says, and with
/// its number and the round after each of the `rounds` rounds.
fn writers(
    rig: &Arc<Rig>,
    region: VaRange,
    pages: usize,
    rounds: u64,
    first: fn(usize) -> u64,
) -> [thread::JoinHandle<()>; 2] {
    [0, 1].map(|who| {
        let rig = rig.clone();
        thread::spawn(move || {
            for round in 1..=rounds {
                for n in who * pages..(who + 1) * pages {
                    let was = if round == 1 { first(n) } else { (round - 1) << 8 | n as u64 };
                    assert_eq!(word(&rig, page(region, n)), Ok(was), "page {n} in round {round}");
                    put(&rig, page(region, n), round << 8 | n as u64);
                }
            }
        })
    })
}

/// Two threads write and read pages of their own and read each other's, while a third unmaps and evicts.
fn faults_and_reclaim(can: Capabilities, failing: bool) {
    const PAGES: usize = 3;
    let (rig, shelf) = rig(can);
    let region = rig.region(1);
    if failing {
        rig.engine.kernel.by_chance(
            7,
            &[Call::TakeOut, Call::CopyIn, Call::CopyStaged, Call::PutBack, Call::Protect],
            4,
        );
    }
    let seen = Arc::new([const { AtomicU64::new(0) }; 2 * PAGES]);
    let writers: Vec<_> = (0..2)
        .map(|who| {
            let (rig, seen) = (rig.clone(), seen.clone());
            thread::spawn(move || {
                for round in 1..3u64 {
                    for n in who * PAGES..(who + 1) * PAGES {
                        assert_eq!(word(&rig, page(region, n)), Ok(seen[n].load(Relaxed)), "page {n}, by its writer");
                        let at_most = n as u64 | round << 8;
                        put(&rig, page(region, n), at_most);
                        seen[n].store(at_most, Relaxed);
                        // The other's page: what was seen before it, or something later.
                        let other = (n + PAGES) % (2 * PAGES);
                        let before = seen[other].load(Relaxed);
                        let now = word(&rig, page(region, other)).unwrap();
                        assert!(now >= before, "page {other} went back from {before} to {now}");
                    }
                }
            })
        })
        .collect();
    let reclaimer = {
        let rig = rig.clone();
        thread::spawn(move || {
            for _ in 0..6 {
                rig.reclaim(3);
            }
        })
    };
    writers.into_iter().for_each(|w| w.join().unwrap());
    reclaimer.join().unwrap();
    rig.engine.kernel.relent();
    rig.engine.check();
    for (n, value) in seen.iter().enumerate() {
        assert_eq!(word(&rig, page(region, n)), Ok(value.load(Relaxed)), "page {n} at the end");
    }
    rig.release(region);
    assert_eq!((rig.engine.check().device_pages, shelf.held()), (0, 0));
}

#[test]
fn pages_survive_faults_and_reclaim() {
    explore(40, || faults_and_reclaim(ABLE, false));
}

#[test]
fn pages_survive_calls_that_fail() {
    explore(30, || faults_and_reclaim(ABLE, true));
}

#[test]
fn pages_survive_without_moves() {
    explore(30, || faults_and_reclaim(Capabilities { move_pages: false, poison: false, ..ABLE }, false));
}

/// H3, H12: a block is collapsed while its pages are read, written, discarded and evicted.
#[test]
fn pages_survive_a_collapse() {
    static COLLAPSED: AtomicU64 = AtomicU64::new(0);
    explore(8, || {
        let (rig, shelf) = rig(Capabilities { huge: true, ..ABLE });
        let region = rig.region(1);
        let all = rig.engine.geometry.pages_inside(region);
        let set = |a: Attributes| rig.engine.advise(all, |_| a).unwrap();
        set(Attributes::NO_HUGE);
        (0..512).for_each(|n| put(&rig, page(region, n), n as u64 + 1));
        set(Attributes::default());
        let receiver = Receiver::start(&rig);
        let collapser = {
            let rig = rig.clone();
            thread::spawn(move || {
                let done = (0..3).any(|_| rig.engine.collapse(all.start).is_ok());
                COLLAPSED.fetch_add(done as u64, Relaxed);
            })
        };
        let reclaimer = {
            let rig = rig.clone();
            thread::spawn(move || rig.reclaim(2))
        };
        let user = {
            let rig = rig.clone();
            thread::spawn(move || {
                for n in [0, 255, 511] {
                    assert_eq!(word(&rig, page(region, n)), Ok(n as u64 + 1), "page {n}");
                    put(&rig, page(region, n), n as u64 + 1000);
                }
                rig.sim().dontneed(VaRange { start: page(region, 7), end: page(region, 9) });
                assert_eq!(word(&rig, page(region, 8)), Ok(0), "a discarded page");
            })
        };
        collapser.join().unwrap();
        reclaimer.join().unwrap();
        user.join().unwrap();
        receiver.end();
        while rig.engine.receive().is_some() {}
        rig.engine.check();
        for n in 0..512 {
            let want = match n {
                0 | 255 | 511 => n as u64 + 1000,
                7 | 8 => 0,
                n => n as u64 + 1,
            };
            assert_eq!(word(&rig, page(region, n)), Ok(want), "page {n} at the end");
        }
        rig.release(region);
        assert_eq!((rig.engine.check().device_pages, shelf.held()), (0, 0));
    });
    assert!(COLLAPSED.load(Relaxed) > 0, "no block was ever collapsed");
}

/// H5, H6, H9, H11: mappings and folios are split, held and moved to other frames while their pages are read, written,
/// discarded and evicted.
#[test]
fn pages_survive_splits() {
    static SPLIT: AtomicU64 = AtomicU64::new(0);
    explore(12, || {
        let (rig, shelf) = rig(Capabilities { huge: true, ..ABLE });
        let region = rig.region(1);
        let all = rig.engine.geometry.pages_inside(region);
        rig.engine.advise(all, |_| Attributes::HUGE).unwrap();
        for n in [0, 1, 255, 511] {
            put(&rig, page(region, n), n as u64 + 1);
        }
        assert_eq!(rig.engine.check().mapped_whole, 512);
        let receiver = Receiver::start(&rig);
        let splitter = {
            let rig = rig.clone();
            thread::spawn(move || {
                let engine = &rig.engine;
                if let Ok(entry) = engine.table.lock(all.start)
                    && entry.is_whole()
                    && matches!(entry.state(), State::Host { .. })
                {
                    engine.split_mapped(entry, &engine.contexts.take().counters);
                }
                let done = (0..3).any(|_| engine.split_folio(all.start.block()).is_ok());
                SPLIT.fetch_add(done as u64, Relaxed);
                engine.compact();
            })
        };
        let holder = {
            let rig = rig.clone();
            thread::spawn(move || {
                let pages = PageRange::new(all.start + 255, Pages(2));
                rig.engine.hold_pages(pages, Access::Write).unwrap();
                let mapped = |n: u64| rig.engine.table.look(pages.start + n).map(|(e, _)| e.state());
                assert!((0..2).all(|n| matches!(mapped(n), Some(State::Host { .. }))), "held, and not there");
                rig.engine.let_go(pages);
            })
        };
        let reclaimer = {
            let rig = rig.clone();
            thread::spawn(move || rig.reclaim(3))
        };
        put(&rig, page(region, 511), 9000);
        rig.sim().dontneed(VaRange { start: page(region, 7), end: page(region, 9) });
        assert_eq!(word(&rig, page(region, 8)), Ok(0), "a discarded page");
        splitter.join().unwrap();
        holder.join().unwrap();
        reclaimer.join().unwrap();
        receiver.end();
        while rig.engine.receive().is_some() {}
        rig.engine.check();
        for (n, want) in [(0, 1), (1, 2), (8, 0), (255, 256), (511, 9000)] {
            assert_eq!(word(&rig, page(region, n)), Ok(want), "page {n} at the end");
        }
        rig.release(region);
        assert_eq!((rig.engine.check().device_pages, shelf.held()), (0, 0));
    });
    assert!(SPLIT.load(Relaxed) > 0, "no folio was ever split");
}

/// A program discards, unmaps and maps anew, moves: a reader never sees what was there before, nor zeros for what is.
#[test]
fn changes_of_mappings_race_with_faults_and_reclaim() {
    explore(40, || {
        let (rig, shelf) = rig(ABLE);
        let receiver = Receiver::start(&rig);
        let plain = rig.sim().map_plain(8 * PAGE as u64);
        for n in 0..8 {
            put(&rig, page(plain, n), 100 + n as u64);
        }
        rig.engine.adopt(plain).unwrap();
        let part =
            move |first: usize, pages: usize| VaRange { start: page(plain, first), end: page(plain, first + pages) };
        let reclaimer = {
            let rig = rig.clone();
            thread::spawn(move || {
                for _ in 0..6 {
                    rig.reclaim(3);
                }
            })
        };
        // Pages that nobody changes stay as they are, whatever becomes of their neighbours.
        let reader = {
            let rig = rig.clone();
            thread::spawn(move || {
                for _ in 0..3 {
                    for n in [0, 7] {
                        assert_eq!(word(&rig, page(plain, n)), Ok(100 + n as u64), "page {n}");
                    }
                }
            })
        };
        let changer = {
            let rig = rig.clone();
            thread::spawn(move || {
                rig.sim().dontneed(part(1, 2));
                assert_eq!(word(&rig, page(plain, 1)), Ok(0), "a discarded page");
                put(&rig, page(plain, 2), 5);
                assert_eq!(word(&rig, page(plain, 2)), Ok(5));
                let to = rig.sim().remap(part(3, 2), None).unwrap();
                assert_eq!(word(&rig, to), Ok(103), "a page that moved");
                assert_eq!(word(&rig, Va(to.0 + PAGE as u64)), Ok(104), "a page that moved");
                assert_eq!(word(&rig, page(plain, 3)), Err(Came::Refused), "where it was");
                rig.sim().munmap(part(5, 1));
                assert_eq!(word(&rig, page(plain, 5)), Err(Came::Refused), "a page that was unmapped");
                to
            })
        };
        let to = changer.join().unwrap();
        reader.join().unwrap();
        reclaimer.join().unwrap();
        receiver.end();
        while rig.engine.receive().is_some() {}
        rig.engine.check();
        assert_eq!(word(&rig, to), Ok(103));
        assert_eq!(word(&rig, page(plain, 2)), Ok(5));
        drop(shelf);
    });
}

/// Faults that come by message: whoever waits is woken, also when the fault meets a change and is put aside.
#[test]
fn every_waiter_is_woken() {
    static PUT_ASIDE: AtomicU64 = AtomicU64::new(0);
    explore(40, || {
        let (rig, _shelf) = rig(Capabilities { kernel_faults: true, ..ABLE });
        let plain = rig.sim().map_plain(6 * PAGE as u64);
        (0..6).for_each(|n| put(&rig, page(plain, n), 50 + n as u64));
        rig.engine.adopt(plain).unwrap();
        rig.reclaim(40);
        let servers = [(); 2].map(|()| {
            let rig = rig.clone();
            thread::spawn(move || rig.engine.serve_messages())
        });
        let users: Vec<_> = (0..2usize)
            .map(|who| {
                let rig = rig.clone();
                thread::spawn(move || {
                    for n in [who, 2, 3] {
                        let va = page(plain, n);
                        let mut bytes = [0; 8];
                        loop {
                            match rig.sim().read(va, &mut bytes) {
                                Ok(()) => break,
                                Err(Trap::Fault { protected }) => {
                                    let waiting = rig.sim().send_fault(va, false, protected);
                                    while rig.sim().is_waiting(waiting) {
                                        thread::yield_now();
                                    }
                                }
                                Err(other) => panic!("page {n}: {other:?}"),
                            }
                        }
                        assert_eq!(u64::from_ne_bytes(bytes), 50 + n as u64, "page {n}");
                    }
                })
            })
            .collect();
        rig.sim().dontneed(VaRange { start: page(plain, 4), end: page(plain, 6) });
        users.into_iter().for_each(|u| u.join().unwrap());
        rig.engine.stop();
        servers.into_iter().for_each(|s| s.join().unwrap());
        PUT_ASIDE.fetch_add(rig.engine.sums().changes, Relaxed);
        rig.engine.check();
    });
    assert!(PUT_ASIDE.load(Relaxed) > 0, "no fault ever met a change");
}

/// A helper that is rung for while the reclaimer goes to sleep is hired all the same, once.
#[test]
fn who_is_rung_for_is_hired() {
    explore(400, || {
        let (rig, _shelf) = rig(ABLE);
        let hired = Arc::new(AtomicU64::new(0));
        let reclaimer = {
            let (rig, hired) = (rig.clone(), hired.clone());
            thread::spawn(move || rig.engine.serve_reclaim(|_| _ = hired.fetch_add(1, Relaxed)))
        };
        // Somebody wants room at the same time.
        let other = {
            let rig = rig.clone();
            thread::spawn(move || rig.engine.service.wake_reclaim(&rig.engine.kernel.park()))
        };
        rig.engine.service.wake_collapse(&rig.engine.kernel.park());
        while hired.load(Relaxed) == 0 {
            thread::yield_now();
        }
        rig.engine.stop();
        other.join().unwrap();
        reclaimer.join().unwrap();
        assert_eq!(hired.load(Relaxed), 1);
    });
}

/// A page that is lost is lost to all, and its neighbours to nobody; discarding it makes it zero again.
#[test]
fn a_lost_page_is_lost_to_all() {
    explore(30, || {
        let (rig, shelf) = rig(ABLE);
        let region = rig.region(1);
        (0..3).for_each(|n| put(&rig, page(region, n), 9 + n as u64));
        rig.reclaim(40);
        assert_eq!(shelf.held(), 3);
        shelf.break_some(1, 1);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let rig = rig.clone();
                thread::spawn(move || [0, 1, 2].map(|n| word(&rig, page(region, n))))
            })
            .collect();
        let [a, b] = readers.into_iter().map(|r| r.join().unwrap()).collect::<Vec<_>>().try_into().unwrap();
        assert_eq!(a, b);
        let lost: Vec<usize> = (0..3).filter(|n| a[*n] == Err(Came::Lost)).collect();
        assert_eq!(lost, [1]);
        assert_eq!((a[0], a[2]), (Ok(9), Ok(11)));
        assert_eq!(rig.engine.check().poisoned, 1);
        let receiver = Receiver::start(&rig);
        let gone = VaRange { start: page(region, 1), end: page(region, 2) };
        rig.engine.discard_now(gone).unwrap();
        assert_eq!(word(&rig, page(region, 1)), Ok(0));
        receiver.end();
        rig.release(region);
        assert_eq!(shelf.held(), 0);
    });
}

/// Z2, Z3: two threads read and write pages that reclaim sends away, while the device that they are sent to is exchanged
/// for another one, twice.
fn devices_are_exchanged() {
    const PAGES: usize = 4;
    static MOVED: AtomicU64 = AtomicU64::new(0);
    let (rig, first) = rig(ABLE);
    let region = rig.region(1);
    for n in 0..2 * PAGES {
        put(&rig, page(region, n), n as u64);
    }
    rig.reclaim(60);
    let writers = writers(&rig, region, PAGES, 2, |n| n as u64);
    let reclaimer = {
        let rig = rig.clone();
        thread::spawn(move || {
            for _ in 0..4 {
                rig.reclaim(6);
            }
        })
    };
    let shelves: Vec<Shelf> = (0..2)
        .map(|i| {
            let shelf = Shelf::new(1000);
            rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(shelf.clone(), Own))).unwrap();
            MOVED.fetch_add(first.held(), Relaxed);
            rig.engine.detach(i).map(drop).unwrap();
            shelf
        })
        .collect();
    writers.into_iter().for_each(|w| w.join().unwrap());
    reclaimer.join().unwrap();
    rig.engine.check();
    assert_eq!((first.held(), shelves[0].held()), (0, 0));
    for n in 0..2 * PAGES {
        assert_eq!(word(&rig, page(region, n)), Ok(2 << 8 | n as u64), "page {n} at the end");
    }
    rig.release(region);
    assert_eq!((rig.engine.check().device_pages, shelves[1].held()), (0, 0));
    assert!(MOVED.load(Relaxed) > 0, "something was on the device");
}

#[test]
fn pages_survive_devices_that_go() {
    explore(40, devices_are_exchanged);
}

/// Z5: two threads read and write a block that is put in place on a coherent device, brought home and pinned, while a third
/// discards and unmaps memory of its own, whose news a receiver acts on in between.
fn memory_moves_in_place() {
    const PAGES: usize = 3;
    static CHANGED: AtomicU64 = AtomicU64::new(0);
    let (rig, shelf) = rig(Capabilities { huge: true, ..ABLE });
    let far = Shelf::new(1024).coherent();
    let id = rig.engine.attach(allocator_api2::unsize_box!(OwnBox::new_in(far.clone(), Own))).unwrap();
    let region = rig.region(1);
    let block = rig.engine.geometry.vpn(region.start).block();
    let receiver = Receiver::start(&rig);
    let writers = writers(&rig, region, PAGES, 3, |_| 0);
    let program = {
        let rig = rig.clone();
        thread::spawn(move || {
            for _ in 0..2 {
                let plain = rig.sim().map_plain(3 * PAGE as u64);
                put(&rig, plain.start, 7);
                rig.engine.adopt(plain).unwrap();
                rig.sim().dontneed(VaRange { start: plain.start, end: page(plain, 1) });
                assert_eq!(word(&rig, plain.start), Ok(0));
                rig.sim().munmap(plain);
            }
        })
    };
    let mut buffer = Buffer::new(512 * PAGE).unwrap();
    let pages = PageRange::new(rig.engine.geometry.vpn(region.start), Pages(1));
    for step in 0..4 {
        let moved = rig.engine.migrate_block(block, id, &mut buffer);
        CHANGED.fetch_add(moved.is_ok() as u64, Relaxed);
        if step % 2 == 0 {
            let _ = rig.engine.migrate_home(block, pages);
        } else {
            rig.engine.hold_pages(pages, Access::Write).unwrap();
            let state = rig.engine.table.look(pages.start).unwrap().0.state();
            assert!(matches!(state, State::Host { .. }), "what is pinned is in RAM: {state:?}");
            rig.engine.let_go(pages);
        }
    }
    writers.into_iter().for_each(|w| w.join().unwrap());
    program.join().unwrap();
    for n in 0..2 * PAGES {
        assert_eq!(word(&rig, page(region, n)), Ok(3 << 8 | n as u64), "page {n} at the end");
    }
    rig.engine.detach(id).map(drop).unwrap();
    rig.engine.check();
    assert_eq!(far.held(), 0);
    receiver.end();
    rig.release(region);
    assert_eq!((rig.engine.check().device_pages, shelf.held()), (0, 0));
    assert!(CHANGED.load(Relaxed) > 0, "something was in place");
}

#[test]
fn memory_moves_in_place_and_nobody_notices() {
    explore(8, memory_moves_in_place);
}
