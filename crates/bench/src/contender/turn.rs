//! Programs that use their memory first here and there, and then densely; or sparsely all the time. How much of it is in
//! huge pages in the end, and how much RAM is taken up by what nobody has asked for.

use super::Contender;
use super::ours::present;
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use crate::workload::{self, PAGE_WORDS, Places};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Space};
use std::time::{Duration, Instant};

/// How long the background may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// When nothing has become huge for so long, nothing will.
const QUIET: Duration = Duration::from_secs(3);
/// Of so many pages, a sparse program uses one.
const SPARSE: u64 = 16;

/// A program, and memory for it.
#[derive(Debug)]
pub(super) struct Turn {
    spec: Spec,
    dense: bool,
}

impl Turn {
    pub(super) fn new(spec: &Spec, dense: bool) -> Turn {
        Turn { spec: spec.clone(), dense }
    }

    fn space(&self) -> Result<Space, Trouble> {
        let device = Soft::new(2 * self.spec.data).map_err(Trouble::unavailable("the device soft"))?;
        let space = Space::builder().host(self.spec.host).faults(Faults::Signal).device(device);
        space.build().map_err(Trouble::unavailable("make a space"))
    }

    /// Uses a third of the pages in random order, more than there is RAM for, gives a third of those back, and then uses
    /// three quarters of what there is RAM for, all of it, again and again.
    fn dense(&self) -> Result<Sample, Trouble> {
        let space = self.space()?;
        let mut region = space.region(self.spec.data).map_err(Trouble::failed("make a region"))?;
        let pages = (region.len() / workload::PAGE_BYTES) as u64;
        let some: Vec<u32> = Places::new(pages).shuffled().into_iter().take(pages as usize / 3).collect();
        for page in &some {
            fill(region.typed_mut(), *page as usize);
        }
        for page in some.iter().step_by(3) {
            let at = *page as usize * workload::PAGE_BYTES;
            region.discard(at..at + workload::PAGE_BYTES).map_err(Trouble::failed("discard"))?;
        }
        let used = (self.spec.host / 4 * 3) as usize / (2 << 20) * (2 << 20);
        let words = used / 8;
        let begin = Instant::now();
        let mut last = (0, begin);
        for page in Places::new((used / workload::PAGE_BYTES) as u64).shuffled() {
            fill(region.typed_mut(), page as usize);
        }
        let mut verified = 0;
        while begin.elapsed() < PATIENCE && last.1.elapsed() < QUIET {
            verified += workload::read_in_order(&region.typed::<u64>()[..words], 0)?;
            let huge = space.statistics().thp.anon_huge_bytes;
            if huge != last.0 {
                last = (huge, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Sample::verified(verified)
            .with(Metric::HugeShare, last.0 as f64 / used as f64)
            .with(Metric::UntilHuge, (last.1 - begin).as_secs_f64() * 1e3))
    }

    /// Uses one page of many in random order, as many as there is RAM for three quarters of, again and again.
    fn sparse(&self) -> Result<Sample, Trouble> {
        let space = self.space()?;
        let most = self.spec.host / 4 * 3 / workload::PAGE_BYTES as u64;
        let mut region =
            space.region(most * SPARSE * workload::PAGE_BYTES as u64).map_err(Trouble::failed("make a region"))?;
        let mut pages = Places::new(most).shuffled();
        // Not at a regular distance.
        pages.iter_mut().for_each(|p| *p = *p * SPARSE as u32 + p.wrapping_mul(2_654_435_761) % SPARSE as u32);
        for page in &pages {
            fill(region.typed_mut(), *page as usize);
        }
        let mut verified = 0;
        let end = Instant::now() + QUIET;
        while Instant::now() < end {
            verified += workload::read_each(region.typed(), &pages)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        let taken = present(&region)? as f64;
        Ok(Sample::verified(verified).with(Metric::Waste, taken / pages.len() as f64 - 1.0))
    }
}

fn fill(words: &mut [u64], page: usize) {
    let at = page * PAGE_WORDS;
    workload::fill(&mut words[at..at + PAGE_WORDS], at);
}

impl Contender for Turn {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        if self.dense { self.dense() } else { self.sparse() }
    }
}
