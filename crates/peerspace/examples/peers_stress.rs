//! Uses one memory by the CPU and by devices that run code, all at once, and checks every word.
//!
//!   peers_stress [SECONDS [SEED]]
//!
//! Three threads of the CPU and a thread on each of three devices (one exclusive, of a few pages; one with replicas and zeros;
//! one that accesses the host's memory in place) read, write, add, discard, pin, set aside, collapse, migrate and prefetch at
//! random, in regions and in adopted memory, with a fraction of the RAM that takes; a fourth device comes and goes, and dies
//! now and then. Transfers to devices fail in passing.
//!
//! # What is known
//!
//! Each page has a few words with one writer each, who counts them up: a reader has to see what the writer had finished when
//! it began to read, or something later that he had begun. One word is added to by all. The others are the page's filling,
//! changed by somebody who is alone with the page. What nobody wrote is zero. Only in the last region may a page be lost, and
//! only if it was on the fourth device alone when that died: no more pages than were there.

use peerspace::device::mmu::{FaultError, MmuDescriptor, Mode};
use peerspace::device::{dax::Dax, soft::Soft};
use peerspace::{Adopted, DeviceId, Error, Faults, Hint, Node, Region, Space, Use};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

#[path = "../tests/peers/chip.rs"]
mod chip;
use chip::Chip;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Words of a page with a writer each; and one that all add to.
const OWNED: usize = 7;
const SUM: usize = OWNED;
const CPUS: usize = 3;
/// Pages of each area: regions, adopted memory, and the region that may lose pages.
const AREAS: [usize; 4] = [6 * MIB / PAGE, 4 * MIB / PAGE, 3 * MIB / PAGE, 2 * MIB / PAGE];
const ADOPTED: usize = 2;
const MORTAL: usize = 3;

/// What is known of a word: what its writer has begun and finished, counted.
#[derive(Default)]
struct Word {
    begun: AtomicU32,
    done: AtomicU32,
}

/// What is known of a page.
struct Page {
    words: [Word; OWNED + 1],
    /// The number of its filling; 0 for zeros. Locked to read by whoever uses the page, to write by whoever is alone with it.
    filling: RwLock<u64>,
}

/// Some memory that all use.
struct Area {
    start: u64,
    pages: Vec<Page>,
    region: Option<RwLock<Region>>,
    /// Locked to read by whoever uses it.
    adopted: RwLock<Option<Adopted>>,
}

impl Area {
    fn va(&self, page: usize, word: usize) -> u64 {
        self.start + (page * PAGE + word * 8) as u64
    }

    /// Where word `k` of those with a writer is in its page.
    fn place(page: usize, k: usize) -> usize {
        (k * 61 + page * 7) % WORDS
    }
}

fn filling(area: usize, page: usize, word: usize, number: u64) -> u64 {
    if number == 0 {
        return 0;
    }
    let x = ((area << 48 | page << 16 | word) as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number << 20;
    x ^ x >> 29
}

/// What a word with a writer holds when it has been counted up to `count`.
fn counted(area: usize, page: usize, k: usize, count: u32) -> u64 {
    let name = ((area * 7919 + page) * 8 + k + 1) as u64;
    if count == 0 { 0 } else { name << 32 | count as u64 }
}

/// xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below.max(1)
    }
}

/// Everything.
struct World {
    space: Space,
    areas: Vec<Area>,
    /// The fourth device, while it is there.
    fourth: RwLock<Option<(Chip, DeviceId)>>,
    chips: Vec<Chip>,
    dax: DeviceId,
    stop: AtomicBool,
    fillings: AtomicU64,
    steps: AtomicU64,
    /// Pages that may be lost: as many as were on fourth devices when they died; and those that were.
    at_risk: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    deaths: AtomicU64,
    detaches: AtomicU64,
}

/// Who does something.
#[derive(Clone)]
enum Actor {
    Cpu,
    Chip(Chip),
}

/// Why something was not done.
#[derive(Debug)]
enum Trouble {
    /// The page is lost.
    Lost,
    /// The device could not, this time.
    Refused,
    /// The device has gone.
    Gone,
}

impl Actor {
    fn trouble(world: &World, e: FaultError) -> Trouble {
        match e {
            FaultError::Lost(..) => Trouble::Lost,
            FaultError::Cut => Trouble::Gone,
            FaultError::Device(..) | FaultError::Pinned(_) => {
                world.refused.fetch_add(1, SeqCst);
                Trouble::Refused
            }
            e => panic!("a device's access failed: {e}"),
        }
    }

    /// Has the CPU access memory of area `area`: where pages may be lost they are held first.
    fn held<T>(
        world: &World,
        area: usize,
        va: u64,
        len: usize,
        how: Use,
        act: impl FnOnce() -> T,
    ) -> Result<T, Trouble> {
        if area != MORTAL {
            return Ok(act());
        }
        match world.space.make_resident(va as *const u8, len, how) {
            Ok(held) => {
                let result = act();
                drop(held);
                Ok(result)
            }
            Err(Error::Lost { .. }) => Err(Trouble::Lost),
            Err(Error::TooManyPinned { .. }) => Err(Trouble::Refused),
            Err(e) => panic!("pages are not to be held: {e}"),
        }
    }

    fn load(&self, world: &World, area: usize, va: u64) -> Result<u64, Trouble> {
        match self {
            // SAFETY: the areas live as long as the threads; words are accessed by atomics alone.
            Actor::Cpu => {
                let load = || {
                    // SAFETY: an aligned word of the area, which is mapped as long as it is held.
                    unsafe { (*(va as *const AtomicU64)).load(SeqCst) }
                };
                Self::held(world, area, va, 8, Use::Read, load)
            }
            Actor::Chip(chip) => chip.load(va).map_err(|e| Self::trouble(world, e)),
        }
    }

    fn store(&self, world: &World, area: usize, va: u64, word: u64) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, 8, Use::Write, || unsafe {
                (*(va as *const AtomicU64)).store(word, SeqCst)
            }),
            Actor::Chip(chip) => chip.store(va, word).map_err(|e| Self::trouble(world, e)),
        }
    }

    fn add(&self, world: &World, area: usize, va: u64) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, 8, Use::Write, || unsafe {
                (*(va as *const AtomicU64)).fetch_add(1, SeqCst);
            }),
            Actor::Chip(chip) => chip.add(va, 1).map_err(|e| Self::trouble(world, e)),
        }
    }

    /// Reads a page of which the caller keeps the filling.
    fn read_page(&self, world: &World, area: usize, va: u64) -> Result<Vec<u64>, Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, PAGE, Use::Read, || unsafe {
                (0..WORDS).map(|i| (*(va as *const AtomicU64).add(i)).load(SeqCst)).collect()
            }),
            Actor::Chip(chip) => {
                let mut bytes = vec![0; PAGE];
                chip.read(va, &mut bytes).map_err(|e| Self::trouble(world, e))?;
                Ok(bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes"))).collect())
            }
        }
    }

    /// Writes a page of which the caller keeps everybody else away.
    fn write_page(&self, world: &World, area: usize, va: u64, words: &[u64]) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, PAGE, Use::Write, || unsafe {
                words.iter().enumerate().for_each(|(i, w)| (*(va as *const AtomicU64).add(i)).store(*w, SeqCst));
            }),
            Actor::Chip(chip) => {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                chip.write(va, &bytes).map_err(|e| Self::trouble(world, e))
            }
        }
    }
}

impl World {
    fn new(faults: Faults) -> Result<World, Error> {
        let chips = vec![
            Chip::with("few", (6 * PAGE) as u64, MmuDescriptor::new(Mode::Exclusive), false),
            Chip::new("replicas", (3 * MIB / 2) as u64, MmuDescriptor::new(Mode::Replicate).zero_page()),
            Chip::new("sharing", (4 * MIB) as u64, MmuDescriptor::new(Mode::Share).remote()),
        ];
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
            let page = || Page { words: Default::default(), filling: RwLock::new(0) };
            let pages = (0..pages).map(|_| page()).collect();
            areas.push(Area { start, pages, region: region.map(RwLock::new), adopted: RwLock::new(adopted) });
        }
        if let Some(region) = &areas[1].region {
            region.read().expect("unharmed").advise(Hint::Dense)?;
        }
        Ok(World {
            space,
            areas,
            fourth: RwLock::new(None),
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
    fn bury(&self, area: usize, page: usize) {
        assert_eq!(area, MORTAL, "page {page} of area {area} is lost, and was never on a device that died");
        let known = &self.areas[area].pages[page];
        let mut filling = known.filling.write().expect("unharmed");
        let region = self.areas[area].region.as_ref().expect("a region");
        let mut byte = [0];
        if region.read().expect("unharmed").try_read(page * PAGE, &mut byte).is_ok() {
            // Somebody else was here before.
            return;
        }
        let lost = self.lost.fetch_add(1, SeqCst) + 1;
        let most = self.at_risk.load(SeqCst);
        assert!(lost <= most, "{lost} pages are lost, and {most} were on devices that died");
        region.write().expect("unharmed").discard(page * PAGE..(page + 1) * PAGE).expect("discard what is lost");
        Self::forget(known, &mut filling);
    }

    fn forget(known: &Page, filling: &mut u64) {
        *filling = 0;
        for word in &known.words {
            word.begun.store(0, SeqCst);
            word.done.store(0, SeqCst);
        }
    }

    /// One access to one page, by writer number `me`.
    fn access(&self, actor: &Actor, me: usize, random: &mut Random, area: usize, page: usize) -> Result<(), Trouble> {
        let at = &self.areas[area];
        let known = &at.pages[page];
        let kind = random.next(20);
        if kind == 0 {
            return self.fill(actor, area, page);
        }
        let number = known.filling.read().expect("unharmed");
        let here = |k: usize| at.va(page, Area::place(page, k));
        match kind {
            // Its own word: it knows what is there.
            1..8 => {
                let word = &known.words[me];
                let done = word.done.load(SeqCst);
                let begun = word.begun.load(SeqCst);
                let seen = actor.load(self, area, here(me))?;
                assert!(
                    (done..=begun).any(|n| seen == counted(area, page, me, n)),
                    "writer {me} reads {seen:#x} in page {page} of area {area}, and has written {done} to {begun}"
                );
                word.begun.store(begun + 1, SeqCst);
                actor.store(self, area, here(me), counted(area, page, me, begun + 1))?;
                word.done.store(begun + 1, SeqCst);
            }
            // Somebody else's.
            8..13 => {
                let k = random.next(OWNED);
                let done = known.words[k].done.load(SeqCst);
                let seen = actor.load(self, area, here(k))?;
                let begun = known.words[k].begun.load(SeqCst);
                let count = seen as u32;
                assert!(
                    seen == counted(area, page, k, count) && (done..=begun).contains(&count),
                    "reader {me} sees {seen:#x} in word {k} of page {page} of area {area}, where {done} to {begun} are written"
                );
            }
            13 | 14 => {
                let sum = &known.words[SUM];
                sum.begun.fetch_add(1, SeqCst);
                match actor.add(self, area, here(SUM)) {
                    Ok(()) => sum.done.fetch_add(1, SeqCst),
                    Err(e) => {
                        sum.begun.fetch_sub(1, SeqCst);
                        return Err(e);
                    }
                };
            }
            15 => {
                let sum = &known.words[SUM];
                let done = sum.done.load(SeqCst) as u64;
                let seen = actor.load(self, area, here(SUM))?;
                let begun = sum.begun.load(SeqCst) as u64;
                assert!((done..=begun).contains(&seen), "reader {me} sees a sum of {seen}, of {done} to {begun}");
            }
            16 | 17 => {
                let i = random.next(WORDS);
                if (0..=SUM).all(|k| Area::place(page, k) != i) {
                    let seen = actor.load(self, area, at.va(page, i))?;
                    let expected = filling(area, page, i, *number);
                    assert_eq!(
                        seen, expected,
                        "reader {me}, word {i} of page {page} of area {area}, filling {number}"
                    );
                }
            }
            _ => {
                let words = actor.read_page(self, area, at.va(page, 0))?;
                self.check_filling(area, page, &words, *number);
            }
        }
        Ok(())
    }

    fn check_filling(&self, area: usize, page: usize, words: &[u64], number: u64) {
        let counted: BTreeSet<usize> = (0..=SUM).map(|k| Area::place(page, k)).collect();
        for (i, w) in words.iter().enumerate().filter(|(i, _)| !counted.contains(i)) {
            let expected = filling(area, page, i, number);
            assert_eq!(*w, expected, "word {i} of page {page} of area {area}, filling {number}");
        }
    }

    /// Gives a page another filling, alone with it.
    fn fill(&self, actor: &Actor, area: usize, page: usize) -> Result<(), Trouble> {
        let at = &self.areas[area];
        let known = &at.pages[page];
        let mut number = known.filling.write().expect("unharmed");
        let mut words = actor.read_page(self, area, at.va(page, 0))?;
        self.check_filling(area, page, &words, *number);
        for (k, word) in known.words.iter().enumerate() {
            let (done, begun) = (word.done.load(SeqCst), word.begun.load(SeqCst));
            let seen = words[Area::place(page, k)];
            let good = if k == SUM {
                seen == done as u64
            } else {
                (done..=begun).any(|n| seen == counted(area, page, k, n))
            };
            assert!(good, "word {k} of page {page} of area {area} is {seen:#x}, of {done} to {begun}");
        }
        let next = self.fillings.fetch_add(1, SeqCst);
        for (i, w) in words.iter_mut().enumerate() {
            if (0..=SUM).all(|k| Area::place(page, k) != i) {
                *w = filling(area, page, i, next);
            }
        }
        actor.write_page(self, area, at.va(page, 0), &words)?;
        *number = next;
        Ok(())
    }

    /// Something that concerns many pages, by a thread of the CPU.
    fn upheaval(&self, random: &mut Random) {
        let area = random.next(AREAS.len());
        let at = &self.areas[area];
        let page = random.next(at.pages.len());
        let most = if random.next(4) == 0 { 600 } else { 8 };
        let count = 1 + random.next((at.pages.len() - page).min(most));
        let bytes = page * PAGE..(page + count) * PAGE;
        let _managed = (area == ADOPTED).then(|| at.adopted.read().expect("unharmed"));
        let region = at.region.as_ref().map(|r| r.read().expect("unharmed"));
        match (random.next(9), region) {
            (0, region) => {
                drop(region);
                let count = count.min(24);
                let mut alone: Vec<_> =
                    at.pages[page..page + count].iter().map(|p| (p, p.filling.write().expect("unharmed"))).collect();
                match &at.region {
                    Some(region) => {
                        let part = page * PAGE..(page + count) * PAGE;
                        region.write().expect("unharmed").discard(part).expect("discard");
                    }
                    None => discard(at.va(page, 0), count * PAGE),
                }
                alone.iter_mut().for_each(|(known, filling)| Self::forget(known, filling));
            }
            (1, region) => {
                drop(region);
                let (start, how) = (at.va(page, 0), if random.next(2) == 0 { Use::Read } else { Use::Write });
                match self.space.make_resident(start as *const u8, count.min(64) * PAGE, how) {
                    Ok(held) => {
                        std::thread::sleep(Duration::from_micros(random.next(300) as u64));
                        drop(held);
                    }
                    Err(Error::Lost { .. } | Error::TooManyPinned { .. }) => {}
                    Err(e) => panic!("pin: {e}"),
                }
            }
            (2 | 3, Some(region)) => drop(region.cold(bytes).expect("set aside")),
            (4, Some(region)) => drop(region.collapse(bytes).expect("collapse")),
            // What is lost says so; what has no room stays.
            (5, Some(region)) if area == 0 => drop(region.migrate_to(bytes, self.dax)),
            (6, Some(region)) => drop(region.migrate_home(bytes)),
            (7, Some(region)) => {
                let devices = self.space.devices();
                let to = match random.next(4) {
                    0 => Node::Host,
                    n => Node::Device(devices[n]),
                };
                if let Ok(under_way) = region.prefetch(bytes, to)
                    && random.next(2) == 0
                {
                    drop(under_way.wait());
                }
            }
            (8, Some(region)) if area < 2 => {
                let hints = [
                    Hint::ReadMostly(random.next(3) == 0),
                    Hint::Prefer(if random.next(2) == 0 { Some(Node::Host) } else { None }),
                    Hint::AccessedBy(self.space.devices()[3], random.next(2) == 0),
                ];
                region.advise(hints[random.next(hints.len())]).expect("a hint");
            }
            _ => {}
        }
    }

    fn step(&self, actor: &Actor, me: usize, random: &mut Random, focus: &mut (usize, usize)) -> Result<(), Trouble> {
        self.steps.fetch_add(1, SeqCst);
        if random.next(12) == 0 {
            focus.0 = random.next(AREAS.len());
            focus.1 = random.next(AREAS[focus.0]);
        }
        let (area, near) = *focus;
        // In order, near by, or anywhere among a few pages that all use.
        let page = match random.next(4) {
            0 => random.next(16),
            1 => {
                focus.1 = (near + 1) % AREAS[area];
                near
            }
            _ => (near + random.next(8)) % AREAS[area],
        };
        let _managed = (area == ADOPTED).then(|| self.areas[area].adopted.read().expect("unharmed"));
        let done = self.access(actor, me, random, area, page);
        if let Err(Trouble::Lost) = done {
            self.bury(area, page);
            return Ok(());
        }
        done
    }

    fn cpu(&self, me: usize, seed: u64) {
        let (mut random, mut focus) = (Random(seed), (0, 0));
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

    fn give_back_and_adopt(&self) {
        let area = &self.areas[ADOPTED];
        let mut adopted = area.adopted.write().expect("unharmed");
        adopted.take().expect("adopted").release().expect("give back");
        let known = &area.pages[3];
        // SAFETY: as elsewhere.
        let words = (0..WORDS).map(|i| unsafe { (*(area.va(3, i) as *const AtomicU64)).load(SeqCst) });
        self.check_filling(ADOPTED, 3, &words.collect::<Vec<_>>(), *known.filling.read().expect("unharmed"));
        *adopted = Some(self.space.adopt(area.start as *const u8, AREAS[ADOPTED] * PAGE).expect("adopt again"));
    }

    fn device(&self, n: usize, seed: u64) {
        let (mut random, mut focus) = (Random(seed), (0, 0));
        let actor = Actor::Chip(self.chips[n].clone());
        while !self.stop.load(SeqCst) {
            if let Err(Trouble::Gone) = self.step(&actor, CPUS + n, &mut random, &mut focus) {
                panic!("device {n} was cut off");
            }
        }
    }

    /// Uses the region that may lose pages by a device that comes, and goes or dies.
    fn mortal(&self, seed: u64) {
        let mut random = Random(seed);
        while !self.stop.load(SeqCst) {
            let chip = Chip::exclusive("mortal", MIB as u64);
            let id = self.space.attach(chip.clone()).expect("attach");
            *self.fourth.write().expect("unharmed") = Some((chip.clone(), id));
            let actor = Actor::Chip(chip.clone());
            for _ in 0..200 + random.next(600) {
                let page = random.next(AREAS[MORTAL]);
                self.steps.fetch_add(1, SeqCst);
                if let Err(Trouble::Lost) = self.access(&actor, CPUS + 3, &mut random, MORTAL, page) {
                    self.bury(MORTAL, page);
                }
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
            *self.fourth.write().expect("unharmed") = None;
            let begin = Instant::now();
            while let Err(e) = self.space.detach(id) {
                assert!(begin.elapsed() < Duration::from_secs(30), "the fourth device cannot be detached: {e}");
                std::thread::sleep(Duration::from_millis(5));
            }
            self.detaches.fetch_add(1, SeqCst);
        }
    }

    /// Every word, when nobody uses anything any more.
    fn check_all(&self) {
        self.space.check();
        for actor in [Actor::Cpu, Actor::Chip(self.chips[1].clone()), Actor::Cpu] {
            for (a, area) in self.areas.iter().enumerate() {
                for (p, known) in area.pages.iter().enumerate() {
                    let number = *known.filling.read().expect("unharmed");
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
                    let number = if *known.filling.read().expect("unharmed") == 0 { 0 } else { number };
                    self.check_filling(a, p, &words, number);
                    for (k, word) in known.words.iter().enumerate() {
                        let (done, begun) = (word.done.load(SeqCst), word.begun.load(SeqCst));
                        let seen = words[Area::place(p, k)];
                        let good = if k == SUM {
                            seen == done as u64
                        } else {
                            (done..=begun).any(|n| seen == counted(a, p, k, n))
                        };
                        assert!(
                            good,
                            "in the end word {k} of page {p} of area {a} is {seen:#x}, of {done} to {begun}"
                        );
                    }
                }
            }
            self.space.check();
        }
    }

    fn tell(&self, faults: Faults, begin: Instant) {
        println!(
            "{faults:?}, {:?}: {} steps, {} times refused, {} devices gone of which {} died, {} pages lost of {}",
            begin.elapsed(),
            self.steps.load(SeqCst),
            self.refused.load(SeqCst),
            self.detaches.load(SeqCst),
            self.deaths.load(SeqCst),
            self.lost.load(SeqCst),
            self.at_risk.load(SeqCst)
        );
    }
}

/// Anonymous memory of the program's own, for as long as the process lives.
fn own_memory(bytes: usize) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED, "memory for the stress");
    start as u64
}

fn discard(va: u64, bytes: usize) {
    // SAFETY: whole pages of memory of ours that nobody else uses just now.
    assert_eq!(unsafe { libc::madvise(va as *mut _, bytes, libc::MADV_DONTNEED) }, 0);
}

pub(crate) fn stress(faults: Faults, time: Duration, seed: u64) -> Result<(), Error> {
    println!("seed {seed}");
    let world = World::new(faults)?;
    // A thread that finds something wrong ends everything: the others might wait for it.
    let failed = Mutex::new(None);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let mut works: Vec<(String, Box<dyn FnOnce() + Send + '_>)> = Vec::new();
        let seed_of = |n: u64| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n * 0x1234_5677) | 1;
        let world = &world;
        for me in 0..CPUS {
            let seed = seed_of(me as u64);
            works.push((format!("cpu {me}"), Box::new(move || world.cpu(me, seed))));
        }
        for n in 0..3 {
            let seed = seed_of(10 + n as u64);
            works.push((format!("device {n}"), Box::new(move || world.device(n, seed))));
        }
        works.push(("mortal".into(), Box::new(move || world.mortal(seed_of(20)))));
        for (name, work) in works {
            let failed = &failed;
            scope.spawn(move || {
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                    *failed.lock().expect("unharmed") = Some(name);
                    world.stop.store(true, SeqCst);
                }
            });
        }
        let (mut told, mut steps, mut moved) = (Instant::now(), 0, Instant::now());
        while begin.elapsed() < time && !world.stop.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(100));
            let now = world.steps.load(SeqCst);
            if now != steps {
                (steps, moved) = (now, Instant::now());
            }
            if moved.elapsed() > Duration::from_secs(60) {
                world.tell(faults, begin);
                eprintln!("seed {seed}: nothing has moved for a minute");
                std::process::abort();
            }
            if told.elapsed() > Duration::from_secs(5) {
                told = Instant::now();
                world.tell(faults, begin);
            }
            // Passing failures of transfers: now these, now those.
            for (n, chip) in world.chips.iter().enumerate() {
                let bad = begin.elapsed().as_millis() / 100 % 8 == n as u128;
                chip.trouble().bad_stores.store(if bad { 7 } else { 0 }, SeqCst);
                chip.trouble().every_other_load.store(begin.elapsed().as_millis() / 100 % 5 == n as u128, SeqCst);
                chip.trouble().bad_peers.store(begin.elapsed().as_millis() / 100 % 3 == n as u128, SeqCst);
                chip.trouble().late.store((begin.elapsed().as_millis() / 100 % 2 * 3) as u64, SeqCst);
            }
        }
        world.stop.store(true, SeqCst);
    });
    if let Some(name) = failed.into_inner().expect("unharmed") {
        panic!("seed {seed}: {name} found something wrong");
    }
    world.chips.iter().for_each(|chip| chip.trouble().mend());
    world.check_all();
    world.tell(faults, begin);
    let s = world.space.statistics();
    // Some may have been discarded before anybody asked for them.
    let (lost, at_risk) = (world.lost.load(SeqCst), world.at_risk.load(SeqCst));
    assert!(
        lost <= s.poisoned && s.poisoned <= at_risk,
        "{lost} pages were missed, {} lost, of {at_risk}",
        s.poisoned
    );
    assert!(s.pages_out > 0 && s.pages_in > 0, "nothing left RAM, so nothing was shown: {s:?}");
    // Each way to get at a page, and each way to leave one.
    let mmus: Vec<_> = s.devices.iter().filter_map(|d| d.mmu.as_ref()).collect();
    assert!(mmus.iter().all(|m| m.faults > 100 && m.recalls > 100 && m.moved > 0), "{s:?}");
    assert!(mmus[0].evicted > 0 && mmus[1].replicated > 0 && mmus[2].remote > 0, "{s:?}");
    assert!(world.detaches.load(SeqCst) > 0 && world.steps.load(SeqCst) > 1000, "hardly anything was done");
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().map_or(Ok(10), |a| a.parse())?;
    let now = || std::time::UNIX_EPOCH.elapsed().map_or(1, |t| t.as_nanos() as u64 % 1_000_000_007);
    let seed = arguments.next().map_or_else(|| Ok(now()), |a| a.parse())?;
    for faults in [Faults::Threads, Faults::Signal] {
        stress(faults, Duration::from_secs(seconds), seed)?;
    }
    Ok(())
}
