//! Uses one memory by the CPU and by devices that run code, all at once, and checks every word.
//!
//!   peers_stress [SECONDS [SEED]]
//!
//! Three threads of the CPU and four on three devices (one exclusive, of a few pages; one with replicas and zeros; and two on one
//! that accesses the host's memory in place, slowly now and then) read, write, add, discard, pin, set aside, collapse, migrate and prefetch at
//! random, in regions and in adopted memory, with a fraction of the RAM that takes; a fourth device comes and goes, and dies
//! now and then. Transfers to devices fail in passing.
//!
//! # What is known
//!
//! Each page has a few words with one writer each, who counts them up: a reader has to see what the writer had finished when
//! it began to read, or something later that he had begun. One word is added to by all. The others are the page's filling,
//! changed by somebody who is alone with the page. What nobody wrote is zero. Only in the last region may a page be lost, and
//! only if it was on the fourth device alone when that died: no more pages than were there.

use peerspace::{Error, Faults};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

mod access;
mod actor;
#[path = "../../tests/peers/chip.rs"]
mod chip;
mod memory;
mod slow;
mod upheaval;
mod watch;
mod works;
mod world;

use watch::{Watch, Work};
use world::World;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Threads of the CPU.
const CPUS: usize = 3;
/// Threads on devices, by the number of the device.
const LANES: [usize; 4] = [0, 1, 2, 2];
/// The one that does nothing but write.
const WRITER: usize = 3;
/// How long to go on when so much happens besides that there was no time for everything.
const GRACE: Duration = Duration::from_secs(60);

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

/// Transfers fail in passing: now these, now those.
fn trouble(world: &World, elapsed: Duration) {
    let tick = elapsed.as_millis() / 100;
    for (n, chip) in world.chips.iter().enumerate() {
        let n = n as u128;
        chip.trouble().bad_stores.store(if tick % 8 == n { 7 } else { 0 }, SeqCst);
        chip.trouble().every_other_load.store(tick % 5 != n, SeqCst);
        chip.trouble().bad_peers.store(tick % 3 == n, SeqCst);
        chip.trouble().late.store((tick % 2 * 3) as u64, SeqCst);
    }
}

pub(crate) fn stress(faults: Faults, time: Duration, seed: u64) -> Result<(), Error> {
    println!("seed {seed}");
    let world = &World::new(faults)?;
    let watch = Watch::new(world, faults, seed);
    let random = |n: usize| Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n as u64 * 0x1234_5677) | 1);
    let mut works: Vec<Work<'_>> = Vec::new();
    for me in 0..CPUS {
        works.push((format!("cpu {me}"), Box::new(move || world.cpu(me, random(me)))));
    }
    for (lane, n) in LANES.into_iter().enumerate() {
        let work = move || match lane {
            WRITER => world.writer(lane, random(10 + lane)),
            _ => world.device(lane, random(10 + lane)),
        };
        works.push((format!("lane {lane} of device {n}"), Box::new(work)));
    }
    works.push(("mortal".into(), Box::new(move || world.mortal(random(20)))));
    watch.run(works, |elapsed| {
        trouble(world, elapsed);
        elapsed >= time && (elapsed >= time + GRACE || world.left_out().is_empty())
    });
    assert!(world.left_out().is_empty(), "seed {seed}: {}; {:?}", world.left_out(), world.space.statistics());
    world.chips.iter().for_each(|chip| chip.trouble().mend());
    watch.run(vec![("check".into(), Box::new(|| world.check_all()))], |_| false);
    println!("{}", watch.so_far());
    let s = world.space.statistics();
    // Some may have been discarded before anybody asked for them.
    let (lost, at_risk) = (world.lost.load(SeqCst), world.at_risk.load(SeqCst));
    assert!(
        lost <= s.poisoned && s.poisoned <= at_risk,
        "{lost} pages were missed, {} lost, of {at_risk}",
        s.poisoned
    );
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
