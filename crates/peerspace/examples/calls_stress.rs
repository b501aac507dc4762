//! A program that changes its own memory in every way while devices use it, and checks every word.
//!
//!   calls_stress [SECONDS [SEED]]
//!
//! Threads of the program own adopted memory, each several areas. Each unmaps parts of them and maps them anew, moves them to and
//! fro (`mremap`, with and without leaving the old mapping), discards (`MADV_DONTNEED`, `MADV_FREE`), protects and unprotects,
//! forks children that check and write all of it, pins, and migrates to devices and back, each call announced or not; while
//! three devices (one exclusive, of a few pages; one with replicas; one that accesses the host's memory in place) read, write and
//! add all over it, with a quarter of the RAM that the memory takes.
//!
//! # What is known
//!
//! A page has a few words, each with one writer, who counts it up. In its upper half a word says where it belongs. A page has a
//! *generation* as well: odd while its owner changes it, another even number afterwards. Whoever reads while the generation stays
//! the same must see what the writer had finished in it, or something later that he had begun. Whoever reads across a change may
//! see what was before or after, or be refused; never what belongs elsewhere.

#[path = "../tests/peers/chip.rs"]
mod chip;

use chip::Chip;
use peerspace::device::mmu::{FaultError, MmuDescriptor, Mode};
use peerspace::device::soft::Soft;
use peerspace::{Adopted, Announced, DeviceId, Error, Faults, Node, Space, Use};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
/// Accesses of devices that are enough for a round, and how much longer than it was to last a busy machine may take for them.
const MADE: u64 = 100;
const LATE: Duration = Duration::from_secs(60);
/// Threads of the program; areas of each; pages of an area: some less than a block, some more.
const OWNERS: usize = 2;
const AREAS: usize = 3;
const PAGES: [usize; AREAS] = [24, 700, 1300];
const DEVICES: usize = 3;
/// Words of a page: one for its owner, one for each device.
const WORDS: usize = 1 + DEVICES;
/// Where areas lie: far from what the kernel gives anybody. An area has two places, so that it can move.
const BASE: u64 = 1 << 37;
const PLACE: u64 = 16 << 20;

/// What is known of a word.
#[derive(Default)]
struct Word {
    /// How far its writer has begun to count, and how far he had got in which generation (in the upper half).
    begun: AtomicU64,
    done: AtomicU64,
}

#[derive(Default)]
struct Page {
    generation: AtomicU64,
    words: [Word; WORDS],
}

struct Area {
    number: u64,
    at: AtomicU64,
    pages: Vec<Page>,
}

impl Area {
    fn place(&self, second: bool) -> u64 {
        BASE + (self.number * 2 + u64::from(second)) * PLACE
    }

    fn va(&self, page: usize, word: usize) -> u64 {
        self.at.load(SeqCst) + (page * PAGE + (word * 131 + page * 7) % 512 * 8) as u64
    }

    fn value(&self, page: usize, word: usize, count: u64) -> u64 {
        (self.number << 20 | (page as u64) << 4 | word as u64 | 1 << 31) << 32 | count
    }

    /// Its owner begins to change these pages, or has done so.
    fn next_generation(&self, pages: std::ops::Range<usize>) {
        for page in &self.pages[pages] {
            page.generation.fetch_add(1, SeqCst);
        }
    }

    fn bytes(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// Says whether `seen` can be, of a word that was `done` before and `begun` after, in the generations before and after.
    fn judge(&self, page: usize, word: usize, seen: u64, done: u64, begun: u64, generations: (u64, u64)) {
        let count = seen as u32 as u64;
        let belongs = seen == 0 || seen == self.value(page, word, count);
        assert!(belongs, "word {word} of page {page} of area {} is {seen:#x}, of another place", self.number);
        assert!(
            count <= begun,
            "word {word} of page {page} of area {} is {count}, and {begun} is the last",
            self.number
        );
        let (before, after) = generations;
        if before == after && before.is_multiple_of(2) {
            let least = if done >> 32 == before & 0xffff_ffff { done & 0xffff_ffff } else { 0 };
            assert!(
                count >= least,
                "word {word} of page {page} of area {} is {count}, and was {least}, in generation {before}",
                self.number
            );
        }
    }
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

    /// A page, one of a few more often than others.
    fn page(&mut self, area: &Area) -> usize {
        let few = self.next(3) == 0;
        self.next(if few { 8 } else { area.pages.len() })
    }
}

struct World {
    space: Space,
    chips: Vec<Chip>,
    ids: Vec<DeviceId>,
    areas: Vec<Area>,
    stop: AtomicBool,
    steps: AtomicU64,
    /// Accesses of devices that were made, and refused because the page was not there just then.
    made: AtomicU64,
    refused: AtomicU64,
    calls: [AtomicU64; CALLS],
}

const CALLS: usize = 9;
const NAMES: [&str; CALLS] =
    ["unmap", "move", "move, leaving", "discard", "free", "protect", "fork", "migrate", "pin"];

fn map_at(va: u64, bytes: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping, which replaces none.
    let at = unsafe { libc::mmap(va as *mut _, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_eq!(at as u64, va, "{}", std::io::Error::last_os_error());
}

fn load(va: u64) -> u64 {
    // SAFETY: in an area of the calling thread's own, which is mapped and readable; devices race on purpose.
    unsafe { (*(va as *const AtomicU64)).load(SeqCst) }
}

fn store(va: u64, word: u64) {
    // SAFETY: as above, and writable.
    unsafe { (*(va as *const AtomicU64)).store(word, SeqCst) }
}

impl World {
    fn new(faults: Faults) -> Result<World, Error> {
        let chips = vec![
            Chip::with("few", (7 * PAGE) as u64, MmuDescriptor::new(Mode::Exclusive), false),
            Chip::new("replicas", (3 * MIB) as u64, MmuDescriptor::new(Mode::Replicate).zero_page()),
            Chip::new("sharing", (5 * MIB) as u64, MmuDescriptor::new(Mode::Share).remote()),
        ];
        let soft = Soft::new((64 * MIB) as u64).expect("a device");
        let mut builder = Space::builder().host((4 * MIB) as u64).device(soft);
        for chip in &chips {
            builder = builder.device(chip.clone());
        }
        let space = builder.faults(faults).pin_limit((2 * MIB) as u64).build()?;
        let ids = space.devices()[1..].to_vec();
        let area = |number: usize| Area {
            number: number as u64,
            at: AtomicU64::new(0),
            pages: (0..PAGES[number % AREAS]).map(|_| Page::default()).collect(),
        };
        let areas = (0..OWNERS * AREAS).map(area).collect();
        let (stop, steps, made, refused) = Default::default();
        Ok(World { space, chips, ids, areas, stop, steps, made, refused, calls: Default::default() })
    }

    /// A device's accesses to whatever there is.
    fn device(&self, n: usize, mut random: Random) {
        let chip = &self.chips[n];
        while !self.stop.load(SeqCst) {
            self.steps.fetch_add(1, SeqCst);
            let area = &self.areas[random.next(self.areas.len())];
            if area.at.load(SeqCst) == 0 {
                continue;
            }
            let page = random.page(area);
            let known = &area.pages[page];
            let (word, writes) = match random.next(3) {
                0 => (1 + n, true),
                _ => (random.next(WORDS), false),
            };
            let before = known.generation.load(SeqCst);
            let va = area.va(page, word);
            let at = &known.words[word];
            let result = if writes {
                let next = at.begun.load(SeqCst) + 1;
                at.begun.store(next, SeqCst);
                let stored = chip.store(va, area.value(page, word, next));
                if stored.is_ok() && known.generation.load(SeqCst) == before {
                    at.done.store((before & 0xffff_ffff) << 32 | next, SeqCst);
                }
                stored
            } else {
                let done = at.done.load(SeqCst);
                chip.load(va).map(|seen| {
                    let (begun, after) = (at.begun.load(SeqCst), known.generation.load(SeqCst));
                    area.judge(page, word, seen, done, begun, (before, after));
                })
            };
            let same = known.generation.load(SeqCst) == before && before.is_multiple_of(2);
            match result {
                Ok(()) => self.made.fetch_add(1, SeqCst),
                // It is pinned where the device cannot use it, or there is more pinned than there is room.
                Err(FaultError::Pinned(_)) => self.refused.fetch_add(1, SeqCst),
                Err(FaultError::NotManaged(_) | FaultError::Protected(_) | FaultError::ReadOnly(_)) if !same => {
                    self.refused.fetch_add(1, SeqCst)
                }
                Err(e) => panic!("device {n}, page {page} of area {}: {e}", area.number),
            };
        }
    }

    /// An owner of areas.
    fn owner(&self, n: usize, mut random: Random) {
        let own = &self.areas[n * AREAS..(n + 1) * AREAS];
        // Dropped when nothing of it is there any more.
        let mut adopted: Vec<Adopted> = Vec::new();
        for area in own {
            let at = area.place(false);
            map_at(at, area.bytes());
            adopted.push(self.adopt(at, area.bytes()));
            area.at.store(at, SeqCst);
        }
        let mut second = [false; AREAS];
        while !self.stop.load(SeqCst) {
            self.steps.fetch_add(1, SeqCst);
            let i = random.next(AREAS);
            let area = &own[i];
            for _ in 0..200 {
                self.access(area, &mut random);
            }
            let call = random.next(CALLS);
            self.calls[call].fetch_add(1, SeqCst);
            let first = random.next(area.pages.len());
            let most = if random.next(3) == 0 { 700 } else { 20 };
            let count = 1 + random.next((area.pages.len() - first).min(most));
            let (at, bytes) = (area.at.load(SeqCst) + (first * PAGE) as u64, count * PAGE);
            let pages = first..first + count;
            match NAMES[call] {
                "unmap" => self.change(area, pages, &mut random, || {
                    // SAFETY: the thread's own memory, into which it has no references.
                    assert_eq!(unsafe { libc::munmap(at as *mut _, bytes) }, 0);
                    map_at(at, bytes);
                    // What was unmapped is managed no more.
                    adopted.push(self.adopt(at, bytes));
                }),
                "move" | "move, leaving" => {
                    let to = area.place(!second[i]);
                    let leaves = NAMES[call] != "move";
                    let extra = if leaves { libc::MREMAP_DONTUNMAP } else { 0 };
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | extra;
                    let (from, all) = (area.at.load(SeqCst), area.bytes());
                    let announced = random.next(2) == 0;
                    area.next_generation(0..area.pages.len());
                    let announcement =
                        announced.then(|| self.space.announce_move((from as *const u8, all), (to as *const u8, all)));
                    // What the program knows as one mapping may be several to the kernel: each is moved for itself.
                    self.move_all(from, to, all, flags);
                    if leaves {
                        // SAFETY: nothing is there any more that anybody uses.
                        assert_eq!(unsafe { libc::munmap(from as *mut _, all) }, 0);
                    }
                    drop(announcement);
                    area.at.store(to, SeqCst);
                    second[i] = !second[i];
                    area.next_generation(0..area.pages.len());
                    // All that was written is there.
                    (0..area.pages.len()).for_each(|page| self.check(area, page));
                }
                "discard" => self.change(area, pages, &mut random, || {
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::madvise(at as *mut _, bytes, libc::MADV_DONTNEED) }, 0);
                }),
                "free" => self.change(area, pages, &mut random, || {
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::madvise(at as *mut _, bytes, libc::MADV_FREE) }, 0);
                    // The kernel may drop it now or never, until it is written.
                    for page in first..first + count {
                        (0..512).for_each(|i| store(area.at.load(SeqCst) + (page * PAGE + i * 8) as u64, 0));
                    }
                }),
                "protect" => self.protect(area, pages, at, bytes),
                "fork" => self.fork(own),
                "migrate" => {
                    let to = match random.next(4) {
                        0 => Node::Host,
                        d => Node::Device(self.ids[d - 1]),
                    };
                    match self.space.migrate(at as *const u8, bytes, to) {
                        Ok(_) => {}
                        Err(e) => panic!("migrate: {e}"),
                    }
                }
                _ => match self.space.make_resident(at as *const u8, bytes.min(32 * PAGE), Use::Write) {
                    Ok(held) => {
                        std::thread::sleep(Duration::from_micros(random.next(300) as u64));
                        drop(held);
                    }
                    Err(Error::TooManyPinned { .. }) => {}
                    Err(e) => panic!("pin: {e}"),
                },
            }
        }
        // Nobody else uses it any more: every word, by the CPU.
        for area in own {
            (0..area.pages.len()).for_each(|page| self.check(area, page));
        }
        for area in own {
            // Devices may still be at it.
            area.next_generation(0..area.pages.len());
            // SAFETY: the thread's own memory, into which it has no references.
            assert_eq!(unsafe { libc::munmap(area.at.load(SeqCst) as *mut _, area.bytes()) }, 0);
        }
    }

    fn adopt(&self, at: u64, bytes: usize) -> Adopted {
        self.space.adopt(at as *const u8, bytes).expect("adopt")
    }

    /// Moves `bytes` bytes piece by piece, where the kernel sees several mappings.
    fn move_all(&self, from: u64, to: u64, bytes: usize, flags: i32) {
        // SAFETY: the calling thread's own memory, into which it has no references, and a place that is nobody's.
        let moved = |from: u64, to: u64, n: usize| unsafe {
            libc::mremap(from as *mut _, n, n, flags, to as *mut libc::c_void) != libc::MAP_FAILED
        };
        if moved(from, to, bytes) {
            return;
        }
        let mut at = 0;
        while at < bytes {
            let n = (1..=(bytes - at) / PAGE).rev().map(|pages| pages * PAGE);
            let mut n = n.filter(|n| *n == bytes - at || (from as usize + at + n).is_multiple_of(PAGE));
            let went = n.find(|n| moved(from + at as u64, to + at as u64, *n));
            at += went.unwrap_or_else(|| panic!("mremap: {}", std::io::Error::last_os_error()));
        }
    }

    /// What empties pages of the thread's own.
    fn change(&self, area: &Area, pages: std::ops::Range<usize>, random: &mut Random, call: impl FnOnce()) {
        let announced = random.next(2) == 0;
        area.next_generation(pages.clone());
        let start = area.at.load(SeqCst) + (pages.start * PAGE) as u64;
        let announcement: Option<Announced> =
            announced.then(|| self.space.announce(start as *const u8, pages.len() * PAGE));
        call();
        drop(announcement);
        // What the owner has written is gone; what devices count goes on.
        area.pages[pages.clone()].iter().for_each(|page| page.words[0].done.store(0, SeqCst));
        area.next_generation(pages);
    }

    /// For a while nobody may write, or nobody access, a part of the memory.
    fn protect(&self, area: &Area, pages: std::ops::Range<usize>, at: u64, bytes: usize) {
        let protect = |how| {
            let announcement = self.space.announce(at as *const u8, bytes);
            // SAFETY: changes no content, and the thread accesses nothing there meanwhile.
            assert_eq!(unsafe { libc::mprotect(at as *mut _, bytes, how) }, 0);
            drop(announcement);
        };
        area.next_generation(pages.clone());
        protect(libc::PROT_READ);
        // Nobody writes from here on.
        let sum = || pages.clone().flat_map(|p| (0..WORDS).map(move |w| (p, w))).map(|(p, w)| load(area.va(p, w)));
        let before: Vec<u64> = sum().collect();
        std::thread::sleep(Duration::from_micros(200));
        assert!(sum().eq(before.iter().copied()), "somebody has written to what is read-only");
        protect(libc::PROT_NONE);
        protect(libc::PROT_READ | libc::PROT_WRITE);
        let after: Vec<u64> = sum().collect();
        for (i, (then, now)) in before.iter().zip(&after).enumerate() {
            assert!(
                now >= then,
                "word {} of page {} was {then:#x} and is {now:#x}",
                i % WORDS,
                pages.start + i / WORDS
            );
        }
        area.next_generation(pages);
    }

    /// A child finds all of its memory as it was, and what it writes is its own.
    fn fork(&self, own: &[Area]) {
        // Of what devices write there is something later in the child, or not.
        // SAFETY: the child reads and writes memory, and ends.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
        if child == 0 {
            let good = own.iter().all(|area| {
                (0..area.pages.len()).all(|page| {
                    (0..WORDS).all(|word| {
                        let (at, seen) = (&area.pages[page].words[word], load(area.va(page, word)));
                        let count = seen as u32 as u64;
                        let done = at.done.load(SeqCst);
                        let sure = word == 0 || done >> 32 == area.pages[page].generation.load(SeqCst) & 0xffff_ffff;
                        let least = if sure { done & 0xffff_ffff } else { 0 };
                        store(area.va(page, word), u64::MAX);
                        (seen == 0 || seen == area.value(page, word, count)) && count >= least
                    })
                })
            });
            // Once more: what it has written is what it reads.
            let kept = own.iter().all(|area| (0..area.pages.len()).all(|page| load(area.va(page, 0)) == u64::MAX));
            // SAFETY: ends the child at once.
            unsafe {
                libc::_exit(if !good {
                    41
                } else if !kept {
                    42
                } else {
                    0
                })
            };
        }
        let mut status = 0;
        // SAFETY: waits for the child, and writes its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(
            status, 0,
            "the child found something wrong (41 << 8: what it had, 42 << 8: what it wrote), or died"
        );
    }

    /// One access of the owner's.
    fn access(&self, area: &Area, random: &mut Random) {
        let page = random.page(area);
        self.check(area, page);
        if random.next(2) == 0 {
            let known = &area.pages[page];
            let next = known.words[0].begun.load(SeqCst) + 1;
            known.words[0].begun.store(next, SeqCst);
            store(area.va(page, 0), area.value(page, 0, next));
            let generation = known.generation.load(SeqCst) & 0xffff_ffff;
            known.words[0].done.store(generation << 32 | next, SeqCst);
        }
    }

    /// Looks at a page of the thread's own, which it does not change meanwhile.
    fn check(&self, area: &Area, page: usize) {
        let known = &area.pages[page];
        let generation = known.generation.load(SeqCst);
        for (k, word) in known.words.iter().enumerate() {
            let done = word.done.load(SeqCst);
            let seen = load(area.va(page, k));
            area.judge(page, k, seen, done, word.begun.load(SeqCst), (generation, generation));
            if k == 0 {
                let (count, last) = (seen as u32 as u64, done & 0xffff_ffff);
                assert_eq!(count, last, "its owner's word of page {page} of area {}", area.number);
            }
        }
    }

    fn tell(&self, faults: Faults, begin: Instant) {
        let n = |n: &AtomicU64| n.load(SeqCst);
        let calls: Vec<String> = NAMES.iter().zip(&self.calls).map(|(name, c)| format!("{name} {}", n(c))).collect();
        println!(
            "{faults:?}, {:?}: {} accesses of devices, {} refused; {}",
            begin.elapsed(),
            n(&self.made),
            n(&self.refused),
            calls.join(", ")
        );
    }
}

pub(crate) fn stress(faults: Faults, time: Duration, seed: u64) -> Result<(), Error> {
    println!("seed {seed}");
    let world = &World::new(faults)?;
    let (failed, running) = (&Mutex::new(None), &AtomicU64::new(0));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let random = |n: u64| Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n * 0x1234_5677) | 1);
        let mut works: Vec<(String, Box<dyn FnOnce() + Send + '_>)> = Vec::new();
        for n in 0..OWNERS {
            works.push((format!("owner {n}"), Box::new(move || world.owner(n, random(n as u64)))));
        }
        for n in 0..DEVICES {
            works.push((format!("device {n}"), Box::new(move || world.device(n, random(10 + n as u64)))));
        }
        running.store(works.len() as u64, SeqCst);
        for (name, work) in works {
            scope.spawn(move || {
                // A thread that finds something wrong ends everything: the others might wait for it.
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                    *failed.lock().expect("unharmed") = Some(name);
                    world.stop.store(true, SeqCst);
                }
                running.fetch_sub(1, SeqCst);
            });
        }
        let (mut steps, mut moved, mut told) = (0, Instant::now(), Instant::now());
        while running.load(SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(50));
            // On a busy machine little may have been done by then.
            let done = world.made.load(SeqCst) > MADE && world.refused.load(SeqCst) > 0;
            if begin.elapsed() >= time && (done || begin.elapsed() >= time + LATE) {
                world.stop.store(true, SeqCst);
            }
            let now = world.steps.load(SeqCst);
            if now != steps {
                (steps, moved) = (now, Instant::now());
            }
            if moved.elapsed() > Duration::from_secs(60) {
                world.tell(faults, begin);
                let text = format!("seed {seed}: nothing has moved for a minute\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                std::process::abort();
            }
            if told.elapsed() > Duration::from_secs(5) {
                told = Instant::now();
                world.tell(faults, begin);
            }
        }
    });
    if let Some(name) = failed.lock().expect("unharmed").take() {
        panic!("seed {seed}: {name} found something wrong");
    }
    world.tell(faults, begin);
    world.space.check();
    let [made, refused] = [&world.made, &world.refused].map(|n| n.load(SeqCst));
    assert!(made > MADE && refused > 0, "hardly anything was done: {made} accesses of devices, {refused} refused");
    assert_eq!(world.space.statistics().poisoned, 0, "no page is lost");
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
