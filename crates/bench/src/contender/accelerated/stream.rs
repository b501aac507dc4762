//! A stream of blocks from the host, each worked on by an accelerator behind a link: all of them there already, coming when
//! they are touched, and sent for some blocks ahead. What a block takes to work on is set to what it takes to come.

use super::{BLOCK, accelerator, ended, read_page, region, send, space, start, warm, write_again};
use crate::contender::{Contender, cpu_seconds};
use crate::error::Trouble;
use crate::spec::{LinkSpeed, Metric, Sample, Spec, Work};
use crate::workload::{self, PAGE_BYTES};
use peerspace::device::soft::Accelerator;
use peerspace::{Hint, Node, Prefetch, Region, Space};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// So many blocks are sent for ahead.
const AHEAD: usize = 4;
/// Kernels that are in the accelerator's queue at once, so that it need not wait for the CPU.
const QUEUED: usize = 2;
/// Blocks that the work on a block is measured by, and how often.
const TRIAL: usize = 16;
const TRIALS: usize = 5;

/// A program that works on a region block by block.
pub(in crate::contender) struct Stream {
    region: Region,
    accelerator: Accelerator,
    far: Node,
    /// Words of each page that are looked at.
    words: usize,
    _space: Space,
}

impl Stream {
    pub(in crate::contender) fn new(spec: &Spec, link: LinkSpeed) -> Result<(Stream, String), Trouble> {
        let accelerator = accelerator(spec.data, Some(link))?;
        let (space, ids) = space(spec, std::slice::from_ref(&accelerator))?;
        let far = *ids.last().expect("it has two devices");
        warm(&space, far, spec.data)?;
        let mut region = region(&space, spec.data, Hint::Dense)?;
        workload::fill(region.typed_mut(), 0);
        let mut stream = Stream { region, accelerator, far: Node::Device(far), words: 1, _space: space };
        let (copy, work) = stream.balance()?;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        Ok((stream, format!("a block takes {:.0} us to come, and {:.0} us to work on", us(copy), us(work))))
    }

    /// Has the work on a block take as long as its way to the accelerator does, when that is begun by a fault. The result: how
    /// long either takes.
    fn balance(&mut self) -> Result<(Duration, Duration), Trouble> {
        const MANY: usize = 4096;
        let blocks = 0..TRIAL.min(self.region.len() / BLOCK);
        // The least of some trials is what other programs on the machine have disturbed least.
        let [mut demand, mut least, mut most] = [Duration::MAX; 3];
        for _ in 0..TRIALS {
            self.come_home()?;
            self.words = 1;
            demand = demand.min(self.pass(blocks.clone(), None)?);
            least = least.min(self.pass(blocks.clone(), None)?);
            self.words = MANY;
            most = most.min(self.pass(blocks.clone(), None)?);
        }
        let way = demand.saturating_sub(least);
        let each = most.saturating_sub(least).as_secs_f64() / (MANY - 1) as f64;
        let words = 1 + (way.saturating_sub(least).as_secs_f64() / each.max(1e-12)) as usize;
        self.words = words.min(4 * MANY);
        let work = least.as_secs_f64() + each * (self.words - 1) as f64;
        Ok((way / blocks.len() as u32, Duration::from_secs_f64(work / blocks.len() as f64)))
    }

    /// All of it is on the host, and changed since it was on the device.
    fn come_home(&mut self) -> Result<(), Trouble> {
        send(&self.region, 0..self.region.len(), Node::Host)?;
        write_again(&mut self.region);
        Ok(())
    }

    /// Works on `blocks`, sending for `ahead` of them ahead. The result: how long it took.
    fn pass(&self, blocks: std::ops::Range<usize>, ahead: Option<usize>) -> Result<Duration, Trouble> {
        let begin = Instant::now();
        let ahead = ahead.map(|blocks| (self.far, blocks));
        let sent = work_on(&self.region, &self.accelerator, blocks, self.words, ahead)?;
        let took = begin.elapsed();
        // One that is late would send again what is brought home next.
        arrive(&sent)?;
        Ok(took)
    }
}

/// Has an accelerator work on blocks of `region`, a kernel for each, and look at `words` words of each page; `ahead` says where
/// to send them, and how many of them before they are needed. What was sent for is returned: it may be under way yet where the work
/// was faster.
pub(super) fn work_on(
    region: &Region,
    on: &Accelerator,
    blocks: std::ops::Range<usize>,
    words: usize,
    ahead: Option<(Node, usize)>,
) -> Result<Vec<Prefetch>, Trouble> {
    let base = region.as_ptr() as u64;
    let (mut next, mut sent) = (blocks.start, Vec::new());
    let mut jobs = VecDeque::with_capacity(QUEUED);
    for block in blocks.clone() {
        if let Some((far, ahead)) = ahead {
            while next < blocks.end.min(block + ahead) {
                let part = next * BLOCK..(next + 1) * BLOCK;
                // It goes on by itself. Whoever finds it not there yet waits for it.
                sent.push(region.prefetch(part, far).map_err(Trouble::failed("prefetch"))?);
                next += 1;
            }
        }
        let first = block * (BLOCK / PAGE_BYTES);
        jobs.push_back(start(on, move |lane| {
            (first..first + BLOCK / PAGE_BYTES).try_for_each(|page| read_page(lane, base, page, words))
        })?);
        if jobs.len() == QUEUED
            && let Some(job) = jobs.pop_front()
        {
            ended(job)?;
        }
    }
    jobs.into_iter().try_for_each(ended)?;
    Ok(sent)
}

/// Waits until what was sent for is there.
pub(super) fn arrive(sent: &[Prefetch]) -> Result<(), Trouble> {
    sent.iter().try_for_each(|sent| sent.wait().map(drop)).map_err(Trouble::failed("prefetch"))
}

impl Contender for Stream {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let blocks = 0..self.region.len() / BLOCK;
        let bytes = self.region.len() as u64;
        let mut came = self.accelerator.statistics().bytes_in;
        let mut all_came = |this: &Stream| {
            let now = this.accelerator.statistics().bytes_in;
            match now - std::mem::replace(&mut came, now) {
                new if new == bytes => Ok(()),
                new => Err(Trouble::Failed(format!("{new} of {bytes} bytes went to the accelerator"))),
            }
        };
        self.come_home()?;
        send(&self.region, 0..self.region.len(), self.far)?;
        all_came(self)?;
        let resident = self.pass(blocks.clone(), None)?;
        self.come_home()?;
        let demand = self.pass(blocks.clone(), None)?;
        all_came(self)?;
        self.come_home()?;
        let before = (cpu_seconds(), self.accelerator.statistics().faults);
        let prefetched = self.pass(blocks, Some(AHEAD))?;
        let cores = (cpu_seconds() - before.0) / prefetched.as_secs_f64();
        let late = self.accelerator.statistics().faults - before.1;
        all_came(self)?;
        let [resident, demand, prefetched] = [resident, demand, prefetched].map(|t| t.as_secs_f64() * 1e3);
        let verified = 3 * self.words.min(workload::PAGE_WORDS - 1) as u64 * (bytes / PAGE_BYTES as u64);
        Ok(Sample::verified(verified)
            .with(Metric::Cores, cores)
            .with(Metric::Resident, resident)
            .with(Metric::OnDemand, demand)
            .with(Metric::Prefetched, prefetched)
            .with(Metric::Late, late as f64)
            .with(Metric::Hidden, 1.0 - (prefetched - resident) / (demand - resident)))
    }
}
