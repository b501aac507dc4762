//! Uses a space in every way the library offers, with a quarter of the memory that takes, and checks every byte.
//!
//!   stress [MEGABYTES [SECONDS]]
//!
//! Threads fill, check, discard, resize and drop regions of one space at random, hold parts of them resident while the
//! kernel writes to them, and let it manage memory they got elsewhere; another space is made and dropped meanwhile. Each
//! word holds what its address and the last generation of its region say, so nothing can be lost, or be somebody
//! else's, without being noticed. Ends with 0 when all was right, in both deliveries of faults.

use peerspace::device::{compressed::Compressed, soft::Soft};
use peerspace::{Error, Faults, Region, Space, Use};
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
const THREADS: usize = 3;

fn value(word: usize, generation: u64) -> u64 {
    let x = (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 29
}

fn fill(words: &mut [u64], from: usize, generation: u64) {
    words.iter_mut().enumerate().for_each(|(i, w)| *w = value(from + i, generation));
}

fn check(what: &str, words: &[u64], from: usize, generation: u64) {
    for (i, w) in words.iter().enumerate() {
        assert_eq!(*w, value(from + i, generation), "{what}: word {} of generation {generation}", from + i);
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
}

/// A region and what is in it: one generation per page, 0 for zeros.
struct Known {
    region: Region,
    pages: Vec<u64>,
}

impl Known {
    fn new(space: &Space, bytes: usize) -> Result<Known, Error> {
        let region = space.region(bytes as u64)?;
        let pages = vec![0; region.len() / PAGE];
        Ok(Known { region, pages })
    }

    fn words(&mut self, page: usize, count: usize) -> &mut [u64] {
        const EACH: usize = PAGE / 8;
        &mut self.region.typed_mut::<u64>()[page * EACH..(page + count) * EACH]
    }

    fn check(&mut self, page: usize, count: usize) {
        for page in page..page + count {
            let generation = self.pages[page];
            let words = self.words(page, 1);
            match generation {
                0 => assert!(words.iter().all(|w| *w == 0), "page {page} is not zero"),
                _ => check("a page", words, page * PAGE / 8, generation),
            }
        }
    }
}

/// What one thread does with about `bytes` bytes until `end`. Returns how many things it did.
fn work(space: &Space, bytes: usize, seed: u64, end: Instant) -> Result<u64, Error> {
    static GENERATIONS: AtomicU64 = AtomicU64::new(1);
    let generation = || GENERATIONS.fetch_add(1, Ordering::Relaxed);
    let mut random = Random(seed);
    let mut regions: Vec<Known> = Vec::new();
    let mut steps = 0;
    while Instant::now() < end {
        steps += 1;
        let held: usize = regions.iter().map(|k| k.region.len()).sum();
        if held < bytes && (regions.is_empty() || random.next(8) == 0) {
            regions.push(Known::new(space, (1 + random.next(bytes / MIB / 2)) * MIB)?);
            continue;
        }
        let which = random.next(regions.len());
        let known = &mut regions[which];
        let all = known.pages.len();
        let page = random.next(all);
        let count = 1 + random.next((all - page).min(512));
        match random.next(8) {
            0..3 => {
                let generation = generation();
                fill(known.words(page, count), page * PAGE / 8, generation);
                known.pages[page..page + count].fill(generation);
            }
            3..5 => known.check(page, count),
            5 => {
                // Rounded inwards to whole pages, so all of these and no more.
                known.region.discard(page * PAGE..(page + count) * PAGE)?;
                known.pages[page..page + count].fill(0);
                known.check(page, count);
            }
            6 => {
                // The kernel writes to memory that is kept where it is.
                let bytes = count * PAGE;
                let start = known.words(page, count).as_ptr().cast::<u8>();
                let resident = space.make_resident(start, bytes, Use::Write)?;
                let buffer = &mut known.region.bytes_mut()[page * PAGE..page * PAGE + bytes];
                std::fs::File::open("/dev/zero").and_then(|mut f| f.read_exact(buffer)).expect("read zeros");
                drop(resident);
                known.pages[page..page + count].fill(0);
            }
            _ if held > bytes / 2 => {
                let mut known = regions.swap_remove(which);
                known.check(0, known.pages.len());
            }
            _ => {}
        }
    }
    for known in &mut regions {
        known.check(0, known.pages.len());
    }
    Ok(steps)
}

/// Memory that came from elsewhere, managed for a while, again and again.
fn adopt(space: &Space, bytes: usize, end: Instant) -> Result<u64, Error> {
    let mut memory = vec![0u64; bytes / 8];
    let mut generation = 1 << 40;
    let mut rounds = 0;
    fill(&mut memory, 0, generation);
    while rounds == 0 || Instant::now() < end {
        let adopted = space.adopt(memory.as_ptr().cast(), bytes)?;
        check("adopted memory", &memory, 0, generation);
        generation += 1;
        fill(&mut memory, 0, generation);
        check("adopted memory, written", &memory, 0, generation);
        adopted.release()?;
        check("memory given back", &memory, 0, generation);
        rounds += 1;
    }
    Ok(rounds)
}

pub(crate) fn stress(faults: Faults, memory: usize, time: Duration) -> Result<(), Error> {
    let space = Space::builder()
        .host((memory / 4) as u64)
        .device(Compressed::new((memory / 8) as u64).expect("a store"))
        .device(Soft::new(4 * memory as u64).expect("a device"))
        .faults(faults)
        .build()?;
    let end = Instant::now() + time;
    let (mut steps, mut rounds, mut spaces) = (0, 0, 0);
    std::thread::scope(|scope| -> Result<(), Error> {
        let workers: Vec<_> = (0..THREADS)
            .map(|i| {
                let space = &space;
                scope.spawn(move || work(space, memory / (THREADS + 1), 0x9e37_79b9 + i as u64, end))
            })
            .collect();
        let adopter = scope.spawn(|| adopt(&space, memory / (THREADS + 1) / 4, end));
        while Instant::now() < end {
            let other = Space::builder().host(8 << 20).device(Soft::new(64 << 20).expect("a device")).build()?;
            let mut region = other.region(24 << 20)?;
            fill(region.typed_mut(), 0, spaces + 1);
            check("another space", region.typed(), 0, spaces + 1);
            spaces += 1;
        }
        for worker in workers {
            steps += worker.join().expect("a thread that found an error has said so")?;
        }
        rounds = adopter.join().expect("likewise")?;
        Ok(())
    })?;
    space.check();
    let s = space.statistics();
    println!(
        "{faults:?}: {steps} steps, {rounds} rounds of adoption, {spaces} spaces; {} faults, {} pages out, {} in",
        s.faults.total, s.pages_out, s.pages_in
    );
    assert_eq!(s.poisoned, 0, "pages were lost");
    assert!(s.pages_out > 0 && s.pages_in > 0, "nothing left RAM, so nothing was shown: {s:?}");
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let memory = arguments.next().map_or(Ok(96), |a| a.parse::<usize>())?.max(32) * MIB;
    let seconds = arguments.next().map_or(Ok(3), |a| a.parse())?;
    for faults in [Faults::Threads, Faults::Signal] {
        stress(faults, memory, Duration::from_secs(seconds))?;
    }
    Ok(())
}
