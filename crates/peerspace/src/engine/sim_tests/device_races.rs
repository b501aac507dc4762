//! Devices that run code, racing with the program, with each other, and with what the engine does by itself, in the
//! interleavings that shuttle chooses.
//!
//! In each race every player, the CPU or a device, has a word of its own in each page, which nobody else writes: it finds there
//! what it wrote, and of the others nothing older than what was there when it began to look. The [fleet](super::fleet::Fleet) minds
//! meanwhile what devices may map beside each other and beside the CPU.

use super::chip::{Chip, Model, page_at};
use super::fleet::Fleet;
use super::races::{Receiver, explore, put, rig, word};
use super::{ABLE, Came, PAGE, Rig};
use crate::device::mmu::{FaultError, Mode, Target};
use crate::engine::send::{Sending, To};
use peerspace_core::addr::{Order, PageRange, Pages, Va, VaRange};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_os::Capabilities;
use peerspace_os::sim::Keep;
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Whoever reads and writes.
#[derive(Clone)]
enum Player {
    Cpu,
    Device(Chip),
}

impl Player {
    fn get(&self, rig: &Rig, va: u64) -> Result<u64, FaultError> {
        match self {
            Player::Cpu => Ok(word(rig, Va(va)).unwrap()),
            Player::Device(chip) => chip.get(rig, va),
        }
    }

    fn put(&self, rig: &Rig, va: u64, value: u64) -> Result<(), FaultError> {
        match self {
            Player::Cpu => put(rig, Va(va), value),
            Player::Device(chip) => chip.put(rig, va, value)?,
        }
        Ok(())
    }
}

/// What is known of each player's word in each page.
type Known = Arc<Vec<Vec<AtomicU64>>>;

/// A race for `pages` pages of a region.
struct Race {
    rig: Arc<Rig>,
    region: VaRange,
    pages: usize,
    known: Known,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Race {
    fn new(rig: &Arc<Rig>, region: VaRange, players: usize, pages: usize) -> Race {
        let known = (0..players).map(|_| (0..pages).map(|_| AtomicU64::new(0)).collect()).collect();
        Race { rig: rig.clone(), region, pages, known: Arc::new(known), threads: Vec::new() }
    }

    fn at(region: VaRange, page: usize, who: usize) -> u64 {
        page_at(region, page) + 8 * who as u64
    }

    /// Starts the next player, who plays `rounds` rounds: reads all words, and writes its own if it `writes`. A device that is
    /// cut off stops.
    fn start(&mut self, player: Player, rounds: u64, writes: bool) {
        let who = self.threads.len();
        let (rig, region, pages, known) = (self.rig.clone(), self.region, self.pages, self.known.clone());
        self.threads.push(thread::spawn(move || {
            for round in 1..=rounds {
                for n in 0..pages {
                    for (whose, words) in known.iter().enumerate() {
                        let before = words[n].load(Relaxed);
                        let now = match player.get(&rig, Race::at(region, n, whose)) {
                            Ok(now) => now,
                            Err(FaultError::Cut) => return,
                            Err(e) => panic!("page {n}: {e}"),
                        };
                        let fine = if whose == who { now == before } else { now >= before };
                        assert!(fine, "player {who} reads {now} of {whose} in page {n}, after {before}");
                    }
                    if writes {
                        match player.put(&rig, Race::at(region, n, who), round) {
                            Ok(()) => known[who][n].store(round, Relaxed),
                            Err(FaultError::Cut) => return,
                            Err(e) => panic!("page {n}: {e}"),
                        }
                    }
                }
            }
        }));
    }

    /// Waits for all of them. Then the CPU finds what was written last.
    fn end(self, fleet: &Fleet) {
        for t in self.threads {
            t.join().unwrap();
        }
        fleet.check();
        self.rig.engine.check();
        for (who, words) in self.known.iter().enumerate() {
            for (n, last) in words.iter().enumerate() {
                let now = word(&self.rig, Va(Race::at(self.region, n, who)));
                assert_eq!(now, Ok(last.load(Relaxed)), "the word of {who} in page {n}, at the end");
            }
        }
        fleet.check();
    }
}

/// A rig with devices of these models.
fn rig_with<const N: usize>(can: Capabilities, models: [Model; N]) -> (Arc<Rig>, Fleet, [Chip; N]) {
    let (rig, _) = rig(can);
    let fleet = Fleet::default();
    fleet.watch(&rig);
    let chips = models.map(|model| Chip::join(&rig, &fleet, model));
    (rig, fleet, chips)
}

/// Nobody has anything of a region that has gone (rule G5).
fn gone(rig: &Rig, region: VaRange, chips: &[Chip]) {
    rig.release(region);
    for chip in chips {
        assert_eq!((chip.mapped(), chip.shelf().held()), (0, 0));
    }
    assert_eq!(rig.engine.check().device_pages, 0);
}

/// G3, G9: the CPU writes while two devices read copies.
#[test]
fn g9_no_copy_outlives_a_write() {
    static COPIES: AtomicU64 = AtomicU64::new(0);
    explore(30, || {
        let model = || Model::new(8, Mode::Replicate).zero_page();
        let (rig, fleet, chips) = rig_with(ABLE, [model(), model()]);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 2);
        race.start(Player::Cpu, 3, true);
        chips.iter().for_each(|chip| race.start(Player::Device(chip.clone()), 3, false));
        race.end(&fleet);
        for chip in &chips {
            let tier = rig.engine.tiers.by_id(chip.id()).unwrap();
            COPIES.fetch_add(tier.mmu.as_ref().unwrap().counters.replicated.load(Relaxed), Relaxed);
        }
        gone(&rig, region, &chips);
    });
    assert!(COPIES.load(Relaxed) > 0, "no device ever got a copy");
}

/// G3, G6: one page is written by the CPU and two devices, which hand it to each other directly.
#[test]
fn g3_writers_take_a_page_from_each_other() {
    explore(30, || {
        let direct = Model { able: true, ..Model::new(2, Mode::Exclusive) };
        let (rig, fleet, chips) = rig_with(ABLE, [direct.clone(), direct]);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 2);
        race.start(Player::Cpu, 2, true);
        chips.iter().for_each(|chip| race.start(Player::Device(chip.clone()), 2, true));
        race.end(&fleet);
        gone(&rig, region, &chips);
    });
}

/// G9, G10: a device writes to the host's memory in place, another takes pages away from there, or copies of them.
#[test]
fn g10_accesses_in_place_are_over_before_a_page_moves() {
    static REMOTE: AtomicU64 = AtomicU64::new(0);
    explore(20, || {
        for mode in [Mode::Exclusive, Mode::Replicate] {
            let (rig, fleet, chips) = rig_with(ABLE, [Model::new(2, Mode::Share).remote(), Model::new(2, mode)]);
            let region = rig.region(1);
            let mut race = Race::new(&rig, region, 3, 2);
            race.start(Player::Cpu, 2, true);
            race.start(Player::Device(chips[0].clone()), 3, true);
            race.start(Player::Device(chips[1].clone()), 2, mode == Mode::Exclusive);
            race.end(&fleet);
            let tier = rig.engine.tiers.by_id(chips[0].id()).unwrap();
            REMOTE.fetch_add(tier.mmu.as_ref().unwrap().counters.remote.load(Relaxed), Relaxed);
            drop(tier);
            gone(&rig, region, &chips);
        }
    });
    assert!(REMOTE.load(Relaxed) > 0, "nothing was accessed in place");
}

/// G8: two faults of a device in a page that the CPU has move it once, and not home in between.
#[test]
fn g8_whoever_is_late_finds_the_page_on_the_device() {
    explore(150, || {
        let (rig, _fleet, chips) = rig_with(ABLE, [Model::new(4, Mode::Exclusive)]);
        let region = rig.region(1);
        put(&rig, Va(page_at(region, 0)), 7);
        let lanes = [0, 1].map(|_| {
            let (rig, chip) = (rig.clone(), chips[0].clone());
            thread::spawn(move || assert_eq!(chip.get(&rig, page_at(region, 0)), Ok(7)))
        });
        lanes.into_iter().for_each(|lane| lane.join().unwrap());
        assert_eq!(rig.engine.sums().pages_in, 0, "it has been home");
        gone(&rig, region, &chips);
    });
}

/// G7: a device with room for one page evicts, by its own faults and by somebody else's wish, what the CPU asks for.
#[test]
fn g7_evictions_from_a_device_race_with_faults() {
    static EVICTED: AtomicU64 = AtomicU64::new(0);
    explore(30, || {
        let (rig, fleet, chips) = rig_with(ABLE, [Model::new(1, Mode::Exclusive)]);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 2);
        race.start(Player::Device(chips[0].clone()), 2, true);
        race.start(Player::Cpu, 2, true);
        let maker = {
            let (rig, mmu) = (rig.clone(), chips[0].mmu());
            thread::spawn(move || {
                for _ in 0..3 {
                    let _ = rig.engine.make_room(mmu, Order::BASE);
                }
            })
        };
        maker.join().unwrap();
        race.end(&fleet);
        let tier = rig.engine.tiers.by_id(chips[0].id()).unwrap();
        EVICTED.fetch_add(tier.mmu.as_ref().unwrap().counters.evicted.load(Relaxed), Relaxed);
        drop(tier);
        gone(&rig, region, &chips);
    });
    assert!(EVICTED.load(Relaxed) > 0, "nothing was evicted");
}

/// G2, G7: the host reclaims what devices use, in every mode.
#[test]
fn g7_reclaim_races_with_devices() {
    explore(20, || {
        for model in [
            Model::new(8, Mode::Replicate),
            Model { takes_evicted: true, ..Model::new(8, Mode::Exclusive) },
            Model::new(2, Mode::Share).remote(),
        ] {
            let (rig, fleet, chips) = rig_with(ABLE, [model]);
            let region = rig.region(1);
            let mut race = Race::new(&rig, region, 2, 2);
            race.start(Player::Device(chips[0].clone()), 2, true);
            race.start(Player::Cpu, 2, true);
            let reclaimer = {
                let rig = rig.clone();
                thread::spawn(move || (0..4).for_each(|_| rig.reclaim(6)))
            };
            reclaimer.join().unwrap();
            race.end(&fleet);
            gone(&rig, region, &chips);
        }
    });
}

/// G14: sums of two devices that add to one word, while the CPU reads it.
#[test]
fn g14_atomics_add_up() {
    const EACH: u64 = 4;
    explore(30, || {
        let (rig, fleet, chips) =
            rig_with(ABLE, [Model::new(1, Mode::Share).remote(), Model::new(1, Mode::Replicate)]);
        let region = rig.region(1);
        let adders = chips.clone().map(|chip| {
            let rig = rig.clone();
            thread::spawn(move || (0..EACH).for_each(|_| chip.add(&rig, region.start.0, 1).unwrap()))
        });
        let mut last = 0;
        for _ in 0..4 {
            let now = word(&rig, region.start).unwrap();
            assert!(last <= now && now <= 2 * EACH, "{now} after {last}");
            last = now;
        }
        adders.into_iter().for_each(|a| a.join().unwrap());
        assert_eq!(word(&rig, region.start), Ok(2 * EACH));
        fleet.check();
        rig.engine.check();
        gone(&rig, region, &chips);
    });
}

/// G5: the program discards, unmaps and moves memory that a device works with. The device sees what was there before or what is
/// there now, and in the end has nothing of what has gone.
#[test]
fn g5_changes_of_mappings_race_with_devices() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    explore(60, || {
        let (rig, _) = rig(ABLE);
        // The program goes on when its news is received, before the devices know: nobody watches the CPU's mappings here.
        let fleet = Fleet::default();
        let chip = Chip::join(&rig, &fleet, Model { able: true, ..Model::new(8, Mode::Exclusive) });
        let receiver = Receiver::start(&rig);
        let plain = rig.sim().map_plain(6 * PAGE as u64);
        let part = |first: usize, pages: usize| VaRange {
            start: Va(page_at(plain, first)),
            end: Va(page_at(plain, first + pages)),
        };
        for n in 0..6 {
            put(&rig, Va(page_at(plain, n)), 100 + n as u64);
        }
        rig.engine.adopt(plain).unwrap();
        let device = {
            let (rig, chip) = (rig.clone(), chip.clone());
            thread::spawn(move || {
                for n in [2, 3] {
                    SEEN.fetch_add(chip.get(&rig, page_at(plain, n)).is_ok() as u64, Relaxed);
                }
                for _ in 0..2 {
                    // Unchanged.
                    assert_eq!(chip.get(&rig, page_at(plain, 0)), Ok(100));
                    // Discarded.
                    let now = chip.get(&rig, page_at(plain, 1)).unwrap();
                    assert!(now == 101 || now == 0, "{now}");
                    // Unmapped, and moved.
                    for n in [2, 3] {
                        match chip.get(&rig, page_at(plain, n)) {
                            Ok(now) => assert_eq!(now, 100 + n as u64),
                            Err(e) => {
                                assert!(matches!(e, FaultError::NotManaged(_) | FaultError::Protected(_)), "{e}")
                            }
                        }
                        SEEN.fetch_add(chip.maps(page_at(plain, n), true) as u64, Relaxed);
                    }
                }
            })
        };
        rig.sim().dontneed(part(1, 1));
        assert_eq!(word(&rig, Va(page_at(plain, 1))), Ok(0), "a discarded page");
        rig.sim().munmap(part(2, 1));
        assert_eq!(word(&rig, Va(page_at(plain, 2))), Err(Came::Refused), "an unmapped page");
        let to = rig.sim().remap(part(3, 1), None).unwrap();
        assert_eq!(word(&rig, to), Ok(103), "a page that moved");
        device.join().unwrap();
        receiver.end();
        while rig.engine.receive().is_some() {}
        fleet.check();
        rig.engine.check();
        assert_eq!(chip.get(&rig, page_at(plain, 1)), Ok(0));
        for n in [2, 3] {
            assert!(!chip.maps(page_at(plain, n), false), "page {n} is gone");
            assert!(matches!(chip.get(&rig, page_at(plain, n)), Err(FaultError::NotManaged(_))));
        }
        assert_eq!((chip.get(&rig, to.0), word(&rig, Va(page_at(plain, 0)))), (Ok(103), Ok(100)));
        fleet.check();
    });
    assert!(SEEN.load(Relaxed) > 0, "the device never had what went");
}

/// G1, G5: memory is given up while a device works with it: all of it comes home, and the device keeps none.
#[test]
fn g5_memory_that_is_given_up_leaves_its_devices() {
    explore(30, || {
        let models = [Model::new(8, Mode::Exclusive), Model::new(2, Mode::Share).remote()];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let plain = rig.sim().map_plain(3 * PAGE as u64);
        rig.engine.adopt(plain).unwrap();
        let devices = chips.clone().map(|chip| {
            let rig = rig.clone();
            thread::spawn(move || {
                let me = chip.mmu().0 as u64;
                let mut wrote = [0; 3];
                for (n, wrote) in wrote.iter_mut().enumerate() {
                    match chip.put(&rig, page_at(plain, n) + 8 * me, 7 + me) {
                        Ok(()) => *wrote = 7 + me,
                        Err(e) => assert!(matches!(e, FaultError::NotManaged(_)), "{e}"),
                    }
                }
                wrote
            })
        });
        rig.engine.disown(plain).unwrap();
        let wrote = devices.map(|d| d.join().unwrap());
        for (chip, wrote) in chips.iter().zip(wrote) {
            assert_eq!((chip.mapped(), chip.shelf().held()), (0, 0));
            for (n, wrote) in wrote.into_iter().enumerate() {
                let at = page_at(plain, n) + 8 * chip.mmu().0 as u64;
                assert_eq!(word(&rig, Va(at)), Ok(wrote), "page {n}");
            }
        }
        fleet.check();
        rig.engine.check();
    });
}

/// Z3, G5: a device is detached while it works. What it wrote is there, and it has nothing any more, zeros and memory of the host
/// included, whoever gets its number.
#[test]
fn z3_a_device_is_detached_while_it_works() {
    explore(20, || {
        for model in [
            Model::new(4, Mode::Exclusive),
            Model::new(4, Mode::Replicate).zero_page(),
            Model::new(1, Mode::Share).remote(),
        ] {
            let (rig, fleet, [chip]) = rig_with(ABLE, [model]);
            let region = rig.region(1);
            let mut race = Race::new(&rig, region, 2, 3);
            race.start(Player::Device(chip.clone()), 2, true);
            race.start(Player::Cpu, 1, true);
            rig.engine.detach(chip.id()).map(drop).unwrap();
            assert_eq!((chip.mapped(), chip.shelf().held()), (0, 0));
            race.end(&fleet);
            assert_eq!(chip.mapped(), 0);
            // The next one has the number, and nothing else of it.
            let next = Chip::join(&rig, &fleet, Model::new(2, Mode::Replicate));
            assert_eq!((next.mmu(), next.mapped()), (chip.mmu(), 0));
            assert_eq!(next.get(&rig, page_at(region, 8)), Ok(0));
            assert!(matches!(next.target(page_at(region, 8)), Some(Target::Own(_))));
            gone(&rig, region, &[next]);
        }
    });
}

/// G12: a fork while devices work: at its moment nobody but the CPU maps anything, and nothing is lost after it.
#[test]
fn g12_a_fork_takes_everything_from_devices_first() {
    explore(20, || {
        let models = [Model::new(4, Mode::Exclusive), Model::new(4, Mode::Replicate)];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 2);
        chips.iter().for_each(|chip| race.start(Player::Device(chip.clone()), 2, true));
        race.start(Player::Cpu, 2, true);
        // As `fork::come_to_rest` does it.
        rig.engine.take_turn().keep();
        rig.engine.settle_changes();
        rig.engine.contexts.freeze();
        rig.engine.recall_all();
        while rig.engine.release_ready() {}
        rig.engine.tiers.before_fork();
        assert!(chips.iter().all(|chip| chip.mapped() == 0), "a device maps something during a fork");
        rig.sim().fork_in_parent();
        rig.engine.contexts.thaw();
        rig.engine.give_up_turn();
        race.end(&fleet);
        gone(&rig, region, &chips);
    });
}

/// G5: from when an announcement returns until the change is over no device maps what it is about, whatever devices and the CPU do
/// meanwhile; the rest they go on to use. What was written is there afterwards.
#[test]
fn g5_nobody_maps_what_is_announced() {
    explore(40, || {
        let models = [Model::new(4, Mode::Exclusive), Model::new(4, Mode::Replicate)];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 3);
        chips.iter().for_each(|chip| race.start(Player::Device(chip.clone()), 2, true));
        race.start(Player::Cpu, 2, true);
        let first = peerspace_core::addr::PageRange::new(
            rig.engine.geometry.vpn(region.start),
            peerspace_core::addr::Pages(2),
        );
        for _ in 0..2 {
            rig.engine.announce_change(&[first]);
            for _ in 0..3 {
                for n in 0..2 {
                    let mapped = chips.iter().any(|chip| chip.maps(page_at(region, n), false));
                    assert!(!mapped, "a device maps page {n}, which is about to change");
                }
                thread::yield_now();
            }
            rig.engine.change_is_over(&[first]);
            thread::yield_now();
        }
        race.end(&fleet);
        gone(&rig, region, &chips);
    });
}

/// G5, G11: shared memory is unmapped, and moved, while devices work with it. What comes to be in its place is not theirs: nothing
/// is written there by a translation of before.
#[test]
fn g5_shared_memory_goes_while_devices_work_with_it() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    static ROUND: AtomicU64 = AtomicU64::new(0);
    explore(150, || {
        let models = [Model::new(2, Mode::Share).remote(), Model::new(2, Mode::Exclusive).remote()];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let receiver = Receiver::start(&rig);
        let shared = rig.sim().map_kept(4 * PAGE as u64, Keep::Shared);
        let part = |first: usize, pages: usize| VaRange {
            start: Va(page_at(shared, first)),
            end: Va(page_at(shared, first + pages)),
        };
        rig.engine.adopt_in_place(shared).unwrap();
        for n in 0..4 {
            assert_eq!(chips.each_ref().map(|chip| chip.get(&rig, page_at(shared, n))), [Ok(0), Ok(0)]);
        }
        let devices = chips.clone().map(|chip| {
            let rig = rig.clone();
            thread::spawn(move || {
                let me = 8 * chip.mmu().0 as u64;
                for round in 1..=3 {
                    for n in [2, 3, 0, 1] {
                        match chip.put(&rig, page_at(shared, n) + me, round) {
                            Ok(()) if n < 2 => assert_eq!(chip.get(&rig, page_at(shared, n) + me), Ok(round)),
                            Ok(()) => drop(SEEN.fetch_add(1, Relaxed)),
                            Err(e) => assert!(n >= 2 && matches!(e, FaultError::NotManaged(_)), "page {n}: {e}"),
                        }
                    }
                }
            })
        });
        // For a while, which is another each time.
        (0..ROUND.fetch_add(7, Relaxed) % 160).for_each(|_| {
            let _ = rig.sim().mapped(shared.start);
        });
        rig.sim().munmap(part(2, 1));
        rig.sim().map_kept_at(part(2, 1), Keep::Private);
        let to = rig.sim().remap(part(3, 1), None).unwrap();
        rig.sim().map_kept_at(part(3, 1), Keep::File);
        devices.into_iter().for_each(|device| device.join().unwrap());
        for n in [2, 3] {
            assert_eq!(word(&rig, Va(page_at(shared, n))), Ok(0), "page {n} is another's");
            assert_eq!(word(&rig, Va(page_at(shared, n) + 8)), Ok(0), "page {n} is another's");
        }
        receiver.end();
        while rig.engine.receive().is_some() {}
        for va in [2, 3].map(|n| page_at(shared, n)) {
            assert!(chips.iter().all(|chip| !chip.maps(va, false)), "a device maps what has gone");
        }
        assert!(chips.iter().all(|chip| chip.get(&rig, to.0).is_ok()));
        rig.engine.disown(VaRange { start: shared.start, end: Va(page_at(shared, 2)) }).unwrap();
        assert!(chips.iter().all(|chip| !chip.maps(page_at(shared, 0), false)));
        fleet.check();
        rig.engine.check();
    });
    assert!(SEEN.load(Relaxed) > 0, "no device ever had what went");
}

/// G1, G5: shared memory is given up while devices work with it.
#[test]
fn g5_shared_memory_that_is_given_up_leaves_its_devices() {
    static ROUND: AtomicU64 = AtomicU64::new(0);
    explore(200, || {
        let models = [Model::new(2, Mode::Share).remote(), Model::new(2, Mode::Exclusive).remote()];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let shared = rig.sim().map_kept(2 * PAGE as u64, Keep::Shared);
        rig.engine.adopt_in_place(shared).unwrap();
        let devices = chips.clone().map(|chip| {
            let rig = rig.clone();
            thread::spawn(move || {
                let me = 8 * chip.mmu().0 as u64;
                for n in [0, 1, 0, 1] {
                    if let Err(e) = chip.put(&rig, page_at(shared, n) + me, 7) {
                        assert!(matches!(e, FaultError::NotManaged(_)), "{e}");
                    }
                }
            })
        });
        (0..ROUND.fetch_add(7, Relaxed) % 160).for_each(|_| {
            let _ = rig.sim().mapped(shared.start);
        });
        rig.engine.disown(shared).unwrap();
        let at_its_end: Vec<u64> = (0..4).map(|k| word(&rig, Va(shared.start.0 + 8 * k)).unwrap()).collect();
        devices.into_iter().for_each(|device| device.join().unwrap());
        let now: Vec<u64> = (0..4).map(|k| word(&rig, Va(shared.start.0 + 8 * k)).unwrap()).collect();
        assert_eq!(now, at_its_end, "a device wrote to what had been given up");
        assert!(chips.iter().all(|chip| chip.mapped() == 0));
        fleet.check();
        rig.engine.check();
    });
}

/// Z5, G2, G10: pages go in place of a device and out of it, one by one and in runs, while the CPU, that device and another work on
/// them.
#[test]
fn z5_memory_goes_in_and_out_of_place_under_everybody() {
    static PLACED: AtomicU64 = AtomicU64::new(0);
    explore(60, || {
        let models = [Model::new(16, Mode::Exclusive).coherent().remote(), Model::new(4, Mode::Exclusive).remote()];
        let (rig, fleet, chips) = rig_with(ABLE, models);
        let receiver = Receiver::start(&rig);
        let region = rig.region(1);
        let mut race = Race::new(&rig, region, 3, 3);
        race.start(Player::Cpu, 3, true);
        chips.iter().for_each(|chip| race.start(Player::Device(chip.clone()), 3, true));
        let mover = {
            let (rig, id) = (rig.clone(), chips[0].id());
            thread::spawn(move || {
                let first = rig.engine.geometry.vpn(region.start);
                let pages = |from: u64, n: u64| PageRange::new(first + from, Pages(n));
                for part in [pages(0, 3), pages(1, 1), pages(0, 2)] {
                    rig.engine.send_pages(part, To::Place(id), &mut Sending::new());
                    let placed = |vpn| matches!(rig.engine.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Coherent { .. }));
                    PLACED.fetch_add(part.iter().filter(|vpn| placed(*vpn)).count() as u64, Relaxed);
                    rig.engine.send_pages(pages(1, 2), To::Host, &mut Sending::new());
                }
            })
        };
        mover.join().unwrap();
        race.end(&fleet);
        fleet.audit(&rig.engine, &chips);
        rig.release(region);
        receiver.end();
        assert_eq!(rig.engine.check().device_pages, 0);
    });
    assert!(PLACED.load(Relaxed) > 0);
}

/// G8, H12: a part of a block goes to a device by itself, also if the block becomes one huge folio while it goes.
#[test]
fn g8_a_part_of_a_block_goes_alone_while_the_block_is_collapsed() {
    static COLLAPSED: AtomicU64 = AtomicU64::new(0);
    explore(40, || {
        let (rig, fleet, chips) = rig_with(Capabilities { huge: true, ..ABLE }, [Model::new(600, Mode::Exclusive)]);
        let region = rig.region(1);
        let all = rig.engine.geometry.pages_inside(region);
        let set = |a: Attributes| rig.engine.advise(all, |_| a).unwrap();
        set(Attributes::NO_HUGE);
        (0..512).for_each(|n| put(&rig, Va(page_at(region, n)), n as u64 + 1));
        set(Attributes::default());
        let collapser = {
            let rig = rig.clone();
            thread::spawn(move || COLLAPSED.fetch_add(rig.engine.collapse(all.start).is_ok() as u64, Relaxed))
        };
        let part = PageRange::new(all.start + 5, Pages(3));
        rig.engine.send_pages(part, To::Mmu(chips[0].mmu()), &mut Sending::new());
        collapser.join().unwrap();
        let away = |state: State| !matches!(state, State::Host { .. });
        let others = all.iter().filter(|vpn| !part.contains(*vpn));
        let moved = others.filter(|vpn| away(rig.engine.table.look(*vpn).unwrap().0.state())).count();
        assert_eq!(moved, 0, "its neighbours have moved too");
        for n in 0..512 {
            assert_eq!(word(&rig, Va(page_at(region, n))), Ok(n as u64 + 1), "page {n}");
        }
        fleet.check();
        gone(&rig, region, &chips);
    });
    assert!(COLLAPSED.load(Relaxed) > 0, "no block was ever collapsed");
}
