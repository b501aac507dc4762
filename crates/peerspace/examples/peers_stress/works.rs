//! What the threads do, as loops that go on until they are told to stop.

use super::actor::{Actor, Trouble};
use super::chip::Chip;
use super::memory::{AREAS, MORTAL};
use super::world::World;
use super::{CPUS, LANES, MIB, PAGE, Random};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

impl World {
    pub(super) fn cpu(&self, me: usize, mut random: Random) {
        let mut focus = (0, 0);
        while !self.stop.load(SeqCst) {
            if me == 0 && random.next(40) == 0 || random.next(300) == 0 {
                self.upheaval(&mut random);
            }
            if me == 1 && random.next(4000) == 0 {
                self.give_back_and_adopt();
            }
            let _ = self.step(&Actor::Cpu, me, &mut random, &mut focus);
        }
    }

    pub(super) fn device(&self, lane: usize, mut random: Random) {
        let (mut focus, actor) = ((0, 0), Actor::Chip(self.chips[LANES[lane]].clone()));
        self.on_device(lane, || self.step(&actor, CPUS + lane, &mut random, &mut focus));
    }

    /// Does nothing but write, where the others are.
    pub(super) fn writer(&self, lane: usize, mut random: Random) {
        let actor = Actor::Chip(self.chips[LANES[lane]].clone());
        self.on_device(lane, || self.write_hot(&actor, CPUS + lane, &mut random));
    }

    fn on_device(&self, lane: usize, mut step: impl FnMut() -> Result<(), Trouble>) {
        while !self.stop.load(SeqCst) {
            if let Err(Trouble::Gone) = step() {
                panic!("device {} was cut off", LANES[lane]);
            }
        }
    }

    /// Uses the region that may lose pages by a device that comes, and goes or dies.
    pub(super) fn mortal(&self, mut random: Random) {
        while !self.stop.load(SeqCst) {
            let chip = Chip::exclusive("mortal", MIB as u64);
            let id = self.space.attach(chip.clone()).expect("attach");
            let actor = Actor::Chip(chip.clone());
            for _ in 0..200 + random.next(600) {
                let page = random.next(AREAS[MORTAL]);
                let _ = self.use_page(&actor, CPUS + LANES.len(), &mut random, MORTAL, page);
            }
            if random.next(2) == 0 {
                // What it holds now, and nobody gives it more: its one thread is this one.
                let used = |d: &peerspace::DeviceStatistics| d.name == "mortal";
                let held = self.space.statistics().devices.into_iter().find(used).map_or(0, |d| d.used_bytes);
                self.at_risk.fetch_add(held / PAGE as u64, SeqCst);
                self.deaths.fetch_add(1, SeqCst);
                chip.trouble().gone.store(true, SeqCst);
                self.space.fail(id).expect("it is there");
            }
            let begin = Instant::now();
            while let Err(e) = self.space.detach(id) {
                assert!(begin.elapsed() < Duration::from_secs(30), "the fourth device cannot be detached: {e}");
                std::thread::sleep(Duration::from_millis(5));
            }
            self.detaches.fetch_add(1, SeqCst);
        }
    }
}
