//! Huge folios that are unmapped and mapped again without losing their place in RAM: by a space, and by the system call
//! alone that it takes.

use super::Contender;
use crate::error::Trouble;
use crate::floor;
use crate::spec::{Metric, Mover, Sample, Spec, Work};
use crate::workload::{self, PAGE_WORDS};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Hint, Region, Space, Use};
use peerspace_os::linux::map::Mapping;
use peerspace_os::linux::uffd::{Mode, Uffd, feature};
use rustix::mm::Advice;
use std::time::{Duration, Instant};

const BLOCK: usize = 2 << 20;
/// How often everything is unmapped and mapped in one sample.
const TIMES: u32 = 8;

/// Who moves, and the memory.
pub(super) enum Turnover {
    /// A space, which maps where it is asked to, or where it is touched (true).
    Ours(Space, Region, bool),
    /// The system call alone, from one mapping to the other and back.
    Raw(Uffd, Mapping, Mapping),
}

impl Turnover {
    pub(super) fn new(spec: &Spec, by: Mover) -> Result<Turnover, Trouble> {
        if by == Mover::Raw {
            let uffd = floor::open(feature::MOVE)?;
            let map = || -> Result<Mapping, Trouble> {
                let mapping = Mapping::new(spec.data as usize, BLOCK, true).map_err(Trouble::failed("map memory"))?;
                // SAFETY: the advice changes no content.
                unsafe { mapping.advise(0, mapping.len(), Advice::LinuxHugepage) }
                    .map_err(Trouble::unavailable("ask for huge pages"))?;
                Ok(mapping)
            };
            let (home, away) = (map()?, map()?);
            // SAFETY: it was just mapped, writable, and nobody else knows of it.
            workload::fill(unsafe { std::slice::from_raw_parts_mut(home.as_ptr().cast(), home.len() / 8) }, 0);
            for m in [&home, &away] {
                let r = m.range();
                uffd.register(r.start.0, r.len(), Mode::Protected).map_err(Trouble::unavailable("register"))?;
            }
            return Ok(Turnover::Raw(uffd, home, away));
        }
        let device = Soft::new(spec.data).map_err(Trouble::unavailable("the device soft"))?;
        let space = Space::builder().host(spec.host).faults(Faults::Signal).device(device).pin_limit(spec.host);
        let space = space.build().map_err(Trouble::unavailable("make a space"))?;
        let mut region = space.region(spec.data).map_err(Trouble::failed("make a region"))?;
        region.advise(Hint::Dense).map_err(Trouble::failed("advise the region"))?;
        workload::fill(region.typed_mut(), 0);
        Ok(Turnover::Ours(space, region, by == Mover::Touched))
    }
}

impl Contender for Turnover {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let (mut out, mut back, mut verified) = (Duration::ZERO, Duration::ZERO, 0);
        let blocks = match self {
            Turnover::Ours(space, region, touched) => {
                for _ in 0..TIMES {
                    let start = Instant::now();
                    let aside = region.cold(0..region.len()).map_err(Trouble::failed("set aside"))?;
                    out += start.elapsed();
                    if aside != region.len() {
                        return Err(Trouble::Failed(format!(
                            "only {aside} of {} bytes were set aside",
                            region.len()
                        )));
                    }
                    let start = Instant::now();
                    if *touched {
                        for block in region.typed::<u64>().chunks_exact(BLOCK / 8) {
                            std::hint::black_box(block[PAGE_WORDS]);
                        }
                    } else {
                        let kept = space.make_resident(region.as_ptr(), region.len(), Use::Write);
                        back += start.elapsed();
                        drop(kept.map_err(Trouble::failed("make resident"))?);
                        continue;
                    }
                    back += start.elapsed();
                }
                let huge = space.statistics().thp.anon_huge_bytes as usize;
                if huge != region.len() {
                    return Err(Trouble::Failed(format!("only {huge} of {} bytes are huge", region.len())));
                }
                verified += workload::read_in_order(region.typed(), 0)?;
                region.len() / BLOCK
            }
            Turnover::Raw(uffd, home, away) => {
                for _ in 0..TIMES {
                    out += move_all(uffd, away, home)?;
                    back += move_all(uffd, home, away)?;
                }
                // SAFETY: mapped, and nobody else has a reference.
                let words = unsafe { std::slice::from_raw_parts(home.as_ptr().cast(), home.len() / 8) };
                verified += workload::read_in_order(words, 0)?;
                home.len() / BLOCK
            }
        };
        let each = |time: Duration| time.as_secs_f64() * 1e6 / (blocks as f64 * TIMES as f64);
        Ok(Sample::verified(verified)
            .with(Metric::PerBlock, each(out + back))
            .with(Metric::OutPerBlock, each(out))
            .with(Metric::BackPerBlock, each(back)))
    }
}

/// Moves block after block.
fn move_all(uffd: &Uffd, to: &Mapping, from: &Mapping) -> Result<Duration, Trouble> {
    let start = Instant::now();
    for at in (0..from.len() as u64).step_by(BLOCK) {
        let (to, from) = (to.range().start.0 + at, from.range().start.0 + at);
        // SAFETY: memory of this contender, of which nobody holds a reference.
        let (bytes, error) = unsafe { uffd.move_pages(to, from, BLOCK as u64, false) };
        if bytes != BLOCK as u64 {
            return Err(Trouble::Failed(format!("moving {BLOCK} bytes came to {bytes}: {error:?}")));
        }
    }
    Ok(start.elapsed())
}
