//! What goes over the links of accelerators while a program works with them, counted by the accelerators: with hints about how
//! the memory is going to be used, and without.
//!
//! What goes from one accelerator's memory to another's is counted once.

use super::stream::{arrive, work_on};
use super::{BLOCK, accelerator, read_page, region, run, space, warm};
use crate::contender::Contender;
use crate::error::Trouble;
use crate::spec::{Job, LinkSpeed, Metric, Sample, Spec, Work};
use crate::workload::{self, PAGE_BYTES, PAGE_WORDS, Places};
use peerspace::device::soft::{Accelerator, KernelError, Lane};
use peerspace::{DeviceId, Hint, Node, Region, Space};
use std::time::Instant;

/// How often all of it is read.
const PASSES: usize = 4;
/// Blocks sent for ahead.
const AHEAD: usize = 4;
/// Random accesses for each MiB of data.
const ACCESSES: u64 = 8;
/// Turns of two that write to the same page.
const TURNS: u64 = 1000;

/// A program with accelerators.
pub(in crate::contender) struct Traffic {
    space: Space,
    accelerators: Vec<Accelerator>,
    ids: Vec<DeviceId>,
    bytes: u64,
    job: Job,
    hints: bool,
    places: Places,
}

/// What came of it: words that were found right, and what there is to be said about what went over links.
struct Outcome {
    verified: u64,
    /// Bytes to measure it by.
    bytes: Option<(Metric, u64)>,
}

impl Traffic {
    pub(in crate::contender) fn new(spec: &Spec, job: Job, hints: bool, link: LinkSpeed) -> Result<Traffic, Trouble> {
        let count = if matches!(job, Job::ReadMostly | Job::ReadOnly) { 2 } else { 1 };
        let accelerators: Result<Vec<_>, _> = (0..count).map(|_| accelerator(spec.data, Some(link))).collect();
        let accelerators = accelerators?;
        let (space, ids) = space(spec, &accelerators)?;
        // Behind the one that is memory alone.
        let ids = ids[1..].to_vec();
        ids.iter().try_for_each(|id| warm(&space, *id, spec.data))?;
        let places = Places::new(spec.data / PAGE_BYTES as u64);
        Ok(Traffic { space, accelerators, ids, bytes: spec.data, job, hints, places })
    }

    /// Bytes over all links so far.
    fn over_links(&self) -> u64 {
        let bytes = |a: &Accelerator| {
            let s = a.statistics();
            s.bytes_in + s.bytes_out + s.peer_bytes_in + s.remote_bytes_read + s.remote_bytes_written
        };
        self.accelerators.iter().map(bytes).sum()
    }

    /// Pages that went to accelerators so far.
    fn moves(&self) -> u64 {
        self.space.statistics().devices.iter().filter_map(|d| d.mmu).map(|m| m.moved).sum()
    }

    fn advise(&self, region: &Region, hint: Hint) -> Result<(), Trouble> {
        if self.hints { region.advise(hint).map_err(Trouble::failed("advise the region")) } else { Ok(()) }
    }

    /// Words at random. Each is eight bytes that are asked for.
    fn sparse(&mut self, region: &Region) -> Result<Outcome, Trouble> {
        let accesses = (self.bytes >> 20) * ACCESSES;
        let places: Vec<_> = (0..accesses).map(|_| self.places.next()).collect();
        let base = region.as_ptr() as u64;
        run(&self.accelerators[0], move |lane: &Lane| -> Result<(), KernelError> {
            for (page, k) in &places {
                let i = page * PAGE_WORDS + k;
                let found: u64 = lane.load(base + 8 * i as u64)?;
                assert!(found == workload::word(i), "{}word {i} is {found:#x}", super::WRONG);
            }
            Ok(())
        })?;
        Ok(Outcome { verified: accesses, bytes: Some((Metric::ByAsked, 8 * accesses)) })
    }

    /// All of it by all accelerators, one after the other; between two passes the CPU writes a word, if anybody writes.
    fn in_turns(&mut self, region: &mut Region, writes: bool) -> Result<Outcome, Trouble> {
        let (base, pages) = (region.as_ptr() as u64, region.len() / PAGE_BYTES);
        for pass in 0..PASSES {
            for accelerator in &self.accelerators {
                run(accelerator, move |lane: &Lane| {
                    (0..pages).try_for_each(|page| read_page(lane, base, page, PAGE_WORDS - 1))
                })?;
            }
            if writes {
                let (page, _) = self.places.next();
                region.typed_mut::<u64>()[page * PAGE_WORDS + PAGE_WORDS - 1] = pass as u64;
            }
        }
        let readers = self.accelerators.len() as u64;
        let verified = (PASSES * pages * (PAGE_WORDS - 1)) as u64 * readers;
        Ok(Outcome { verified, bytes: (!writes).then_some((Metric::ByReader, region.len() as u64 * readers)) })
    }

    fn stream(&mut self, region: &Region) -> Result<Outcome, Trouble> {
        let ahead = self.hints.then_some((Node::Device(self.ids[0]), AHEAD));
        arrive(&work_on(region, &self.accelerators[0], 0..region.len() / BLOCK, PAGE_WORDS - 1, ahead)?)?;
        let verified = (region.len() / PAGE_BYTES * (PAGE_WORDS - 1)) as u64;
        Ok(Outcome { verified, bytes: Some((Metric::ByAsked, region.len() as u64)) })
    }

    /// The CPU and the accelerator write to a page in turns, each what follows from what the other wrote.
    fn ping_pong(&mut self, region: &mut Region) -> Result<Outcome, Trouble> {
        let (at, last) = (region.as_ptr() as u64 + 8 * (PAGE_WORDS as u64 - 1), PAGE_WORDS - 1);
        for turn in 0..TURNS {
            let word = &mut region.typed_mut::<u64>()[last];
            if *word != 2 * turn {
                return Err(Trouble::Wrong(format!("in turn {turn} the CPU finds {word}")));
            }
            *word += 1;
            run(&self.accelerators[0], move |lane: &Lane| {
                let found: u64 = lane.load(at)?;
                assert!(found == 2 * turn + 1, "{}in turn {turn} there is {found}", super::WRONG);
                lane.store(at, found + 1)
            })?;
        }
        Ok(Outcome { verified: 2 * TURNS, bytes: None })
    }
}

impl Contender for Traffic {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let mut region = region(&self.space, self.bytes, Hint::Normal)?;
        match self.job {
            Job::Sparse => self.advise(&region, Hint::AccessedBy(self.ids[0], true))?,
            Job::ReadMostly | Job::ReadOnly => self.advise(&region, Hint::ReadMostly(true))?,
            Job::Stream => self.advise(&region, Hint::Dense)?,
            Job::PingPong => region.advise(Hint::Sparse).map_err(Trouble::failed("advise the region"))?,
        }
        match self.job {
            // A page of it.
            Job::PingPong => region.typed_mut::<u64>()[PAGE_WORDS - 1] = 0,
            _ => workload::fill(region.typed_mut(), 0),
        }
        let before = (self.over_links(), self.moves());
        let start = Instant::now();
        let outcome = match self.job {
            Job::Sparse => self.sparse(&region)?,
            Job::ReadMostly => self.in_turns(&mut region, true)?,
            Job::ReadOnly => self.in_turns(&mut region, false)?,
            Job::Stream => self.stream(&region)?,
            Job::PingPong => self.ping_pong(&mut region)?,
        };
        let took = start.elapsed();
        let (bytes, moves) = (self.over_links() - before.0, self.moves() - before.1);
        let sample = Sample::verified(outcome.verified)
            .with(Metric::Took, took.as_secs_f64() * 1e3)
            .with(Metric::OverLink, bytes as f64 / (1 << 20) as f64);
        let sample = match outcome.bytes {
            Some((metric, by)) => sample.with(metric, bytes as f64 / by as f64),
            None => sample,
        };
        Ok(if self.job == Job::PingPong { sample.with(Metric::ByTurns, moves as f64 / TURNS as f64) } else { sample })
    }
}
