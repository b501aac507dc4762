//! The space with its devices, and what all threads share.

use super::actor::{Actor, Trouble};
use super::chip::Chip;
use super::memory::{ADOPTED, AREAS, Area, MORTAL, Page, own_memory, read, write};
use super::slow::Slow;
use super::{MIB, PAGE, WORDS};
use peerspace::device::mmu::{MmuDescriptor, Mode, Port};
use peerspace::device::{dax::Dax, soft::Soft};
use peerspace::{DeviceId, Error, Faults, Hint, Space};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Everything.
pub(super) struct World {
    pub(super) space: Space,
    pub(super) areas: Vec<Area>,
    pub(super) chips: Vec<Chip>,
    pub(super) dax: DeviceId,
    pub(super) stop: AtomicBool,
    pub(super) fillings: AtomicU64,
    pub(super) steps: AtomicU64,
    /// Pages that may be lost: as many as were on fourth devices when they died; and those that were.
    pub(super) at_risk: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) deaths: AtomicU64,
    pub(super) detaches: AtomicU64,
}

impl World {
    pub(super) fn new(faults: Faults) -> Result<World, Error> {
        let chips = vec![
            Chip::with("few", (6 * PAGE) as u64, MmuDescriptor::new(Mode::Exclusive), false),
            Chip::new("replicas", (3 * MIB / 2) as u64, MmuDescriptor::new(Mode::Replicate).zero_page()),
            Chip::new("sharing", (4 * MIB) as u64, MmuDescriptor::new(Mode::Share).remote()),
        ];
        if let Some(slow) = Slow::new() {
            let write = move |port: &Port, va, bytes: &[u8]| slow.write(port, va, bytes);
            assert!(chips[2].trouble().host_write.set(Box::new(write)).is_ok());
        }
        let mut builder =
            Space::builder().host((6 * MIB) as u64).device(Soft::new((64 * MIB) as u64).expect("a device"));
        for chip in &chips {
            builder = builder.device(chip.clone());
        }
        let space = builder.faults(faults).pin_limit((4 * MIB) as u64).build()?;
        let dax = space.attach(Dax::options().size((4 * MIB) as u64).memory().expect("memory in place"))?;
        let mut areas = Vec::new();
        for (i, pages) in AREAS.into_iter().enumerate() {
            let bytes = pages * PAGE;
            let region = if i == ADOPTED { None } else { Some(space.region(bytes as u64)?) };
            let (start, adopted) = match &region {
                Some(region) => (region.as_ptr() as u64, None),
                None => {
                    let start = own_memory(bytes);
                    (start, Some(space.adopt(start as *const u8, bytes)?))
                }
            };
            let pages = (0..pages).map(|_| Page::new()).collect();
            areas.push(Area { start, pages, region: region.map(RwLock::new), adopted: RwLock::new(adopted) });
        }
        if let Some(region) = &areas[1].region {
            read(region).advise(Hint::Dense)?;
        }
        Ok(World {
            space,
            areas,
            chips,
            dax,
            stop: AtomicBool::new(false),
            fillings: AtomicU64::new(1),
            steps: AtomicU64::new(0),
            at_risk: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            deaths: AtomicU64::new(0),
            detaches: AtomicU64::new(0),
        })
    }

    /// The page is lost: nobody may get anything of it, until it is discarded. Then it is zeros.
    pub(super) fn bury(&self, area: usize, page: usize) {
        assert_eq!(area, MORTAL, "page {page} of area {area} is lost, and was never on a device that died");
        let known = &self.areas[area].pages[page];
        let mut filling = write(&known.filling);
        let region = self.areas[area].region.as_ref().expect("a region");
        let mut byte = [0];
        if read(region).try_read(page * PAGE, &mut byte).is_ok() {
            // Somebody else was here before.
            return;
        }
        let lost = self.lost.fetch_add(1, SeqCst) + 1;
        let most = self.at_risk.load(SeqCst);
        assert!(lost <= most, "{lost} pages are lost, and {most} were on devices that died");
        write(region).discard(page * PAGE..(page + 1) * PAGE).expect("discard what is lost");
        known.forget(&mut filling);
    }

    /// Every word, when nobody uses anything any more.
    pub(super) fn check_all(&self) {
        self.space.check();
        for actor in [Actor::Cpu, Actor::Chip(self.chips[1].clone()), Actor::Cpu] {
            for (a, area) in self.areas.iter().enumerate() {
                for (p, known) in area.pages.iter().enumerate() {
                    let number = *read(&known.filling);
                    let words = loop {
                        match actor.read_page(self, a, area.va(p, 0)) {
                            Ok(words) => break words,
                            Err(Trouble::Lost) => {
                                self.bury(a, p);
                                break vec![0; WORDS];
                            }
                            Err(Trouble::Refused) => {}
                            Err(Trouble::Gone) => panic!("a device was cut off"),
                        }
                    };
                    let number = if *read(&known.filling) == 0 { 0 } else { number };
                    self.check_filling(a, p, &words, number);
                    self.check_counted(a, p, &words);
                    self.steps.fetch_add(1, SeqCst);
                }
            }
            self.space.check();
        }
    }

    /// What has not been done yet, and must be for anything to be shown: each way to get at a page, and each way to leave one.
    pub(super) fn left_out(&self) -> String {
        let s = self.space.statistics();
        let mmus: Vec<_> = s.devices.iter().filter_map(|d| d.mmu.as_ref()).take(self.chips.len()).collect();
        let all = [
            ("1000 steps", self.steps.load(SeqCst) > 1000),
            ("a device that went", self.detaches.load(SeqCst) > 0),
            ("pages that left RAM and came back", s.pages_out > 0 && s.pages_in > 0),
            ("100 faults of each device", mmus.iter().all(|m| m.faults > 100)),
            ("100 recalls from each device", mmus.iter().all(|m| m.recalls > 100)),
            ("moves to each device", mmus.iter().all(|m| m.moved > 0)),
            (
                "evictions, copies and memory in place",
                mmus[0].evicted > 0 && mmus[1].replicated > 0 && mmus[2].remote > 0,
            ),
        ];
        all.iter().filter(|(_, done)| !done).map(|(what, _)| format!("no {what}")).collect::<Vec<_>>().join(", ")
    }

    /// What was done so far.
    pub(super) fn so_far(&self) -> String {
        let mut line = format!(
            "{} steps, {} times refused, {} devices gone of which {} died, {} pages lost of {}",
            self.steps.load(SeqCst),
            self.refused.load(SeqCst),
            self.detaches.load(SeqCst),
            self.deaths.load(SeqCst),
            self.lost.load(SeqCst),
            self.at_risk.load(SeqCst)
        );
        for device in self.space.statistics().devices {
            if let Some(m) = device.mmu {
                let (moved, copied, in_place) = (m.moved, m.replicated, m.remote);
                line += &format!("; {}: {moved} moved, {copied} copied, {in_place} in place", device.name);
            }
        }
        line
    }
}
