//! Small pages that become huge ones: by ours, by the kernel, and the least that it can cost.
//!
//! All begin with blocks of small pages that were touched in random order, and so lie anywhere in memory.

use super::Contender;
use crate::error::Trouble;
use crate::floor;
use crate::spec::{Collapser, Metric, Sample, Spec};
use crate::workload::{self, PAGE_WORDS, Places};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Hint, Region, Space};
use peerspace_os::linux::map::Mapping;
use peerspace_os::linux::uffd::{Mode, Uffd, feature};
use rustix::mm::Advice;
use std::time::{Duration, Instant};

const BLOCK: usize = 2 << 20;
/// What putting a block together may cost, in copies of it, beside moving pages away and back.
const COPIES: f64 = 1.2;

/// Who collapses.
pub(super) enum Collapse {
    /// A space, when it is asked to.
    Ours(Space, Region),
    /// The kernel, when it is asked to, and plain memory.
    Kernel(Mapping),
    /// Nobody: the copies and moves alone. Memory in small pages, where they move to, and huge pages.
    Least(Uffd, [Mapping; 3]),
}

impl Collapse {
    pub(super) fn new(spec: &Spec, by: Collapser) -> Result<Collapse, Trouble> {
        let map = |advice| -> Result<Mapping, Trouble> {
            let mapping = Mapping::new(spec.data as usize, BLOCK, true).map_err(Trouble::failed("map memory"))?;
            // SAFETY: the advice changes no content.
            unsafe { mapping.advise(0, mapping.len(), advice) }
                .map_err(Trouble::unavailable("choose the page size"))?;
            Ok(mapping)
        };
        Ok(match by {
            Collapser::Ours => {
                let device = Soft::new(spec.data).map_err(Trouble::unavailable("the device soft"))?;
                let space = Space::builder().host(spec.host).faults(Faults::Signal).device(device);
                let space = space.build().map_err(Trouble::unavailable("make a space"))?;
                let region = space.region(spec.data).map_err(Trouble::failed("make a region"))?;
                region.advise(Hint::OnRequest).map_err(Trouble::failed("advise the region"))?;
                Collapse::Ours(space, region)
            }
            Collapser::Kernel => Collapse::Kernel(map(Advice::LinuxNoHugepage)?),
            Collapser::Least => {
                let uffd = floor::open(feature::MOVE)?;
                let small = [map(Advice::LinuxNoHugepage)?, map(Advice::LinuxNoHugepage)?];
                let huge = map(Advice::LinuxHugepage)?;
                let [from, to] = small;
                for m in [&from, &to, &huge] {
                    let r = m.range();
                    uffd.register(r.start.0, r.len(), Mode::Protected).map_err(Trouble::unavailable("register"))?;
                }
                Collapse::Least(uffd, [from, to, huge])
            }
        })
    }

    /// Puts the data into small pages, in random order.
    fn scatter(words: &mut [u64]) {
        for page in Places::new((words.len() / PAGE_WORDS) as u64).shuffled() {
            let at = page as usize * PAGE_WORDS;
            workload::fill(&mut words[at..at + PAGE_WORDS], at);
        }
    }
}

/// All of a mapping, given by its start and length, as words.
///
/// # Safety
/// Nobody else uses it while they are used, and it stays mapped.
unsafe fn words<'m>((at, bytes): (*mut u8, usize)) -> &'m mut [u64] {
    // SAFETY: mapped readable and writable; whoever calls this has it alone.
    unsafe { std::slice::from_raw_parts_mut(at.cast(), bytes / 8) }
}

fn all(mapping: &Mapping) -> (*mut u8, usize) {
    (mapping.as_ptr(), mapping.len())
}

impl Contender for Collapse {
    fn perform(&mut self, _: crate::spec::Work) -> Result<Sample, Trouble> {
        let (took, blocks, verified) = match self {
            Collapse::Ours(space, region) => {
                region.discard(0..region.len()).map_err(Trouble::failed("discard"))?;
                Self::scatter(region.typed_mut());
                let start = Instant::now();
                let huge = region.collapse(0..region.len()).map_err(Trouble::failed("collapse"))?;
                let took = start.elapsed();
                if huge != region.len() {
                    let thp = space.statistics().thp;
                    return Err(Trouble::Failed(format!("only {huge} of {} bytes are huge: {thp:?}", region.len())));
                }
                (took, region.len() / BLOCK, workload::read_in_order(region.typed(), 0)?)
            }
            Collapse::Kernel(mapping) => {
                // SAFETY: its content is not needed any more, and the advice changes none.
                unsafe {
                    mapping.advise(0, mapping.len(), Advice::LinuxDontNeed).map_err(Trouble::failed("discard"))?;
                    mapping.advise(0, mapping.len(), Advice::LinuxNoHugepage).map_err(Trouble::failed("advise"))?;
                }
                // SAFETY: nobody else knows of it.
                Self::scatter(unsafe { words(all(mapping)) });
                // SAFETY: changes no content.
                unsafe { mapping.advise(0, mapping.len(), Advice::LinuxHugepage) }
                    .map_err(Trouble::failed("advise"))?;
                let start = Instant::now();
                // SAFETY: changes no content.
                let done = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.len(), libc::MADV_COLLAPSE) };
                if done != 0 {
                    return Err(Trouble::unavailable("collapse")(std::io::Error::last_os_error()));
                }
                let took = start.elapsed();
                // SAFETY: nobody else knows of it.
                (took, mapping.len() / BLOCK, workload::read_in_order(unsafe { words(all(mapping)) }, 0)?)
            }
            Collapse::Least(uffd, mappings) => Self::least(uffd, mappings)?,
        };
        Ok(Sample::verified(verified).with(Metric::PerBlock, took.as_secs_f64() * 1e6 / blocks as f64))
    }
}

impl Collapse {
    /// The least: moves small pages away, copies them to a huge page, and moves that.
    fn least(uffd: &Uffd, [from, to, huge]: &[Mapping; 3]) -> Result<(Duration, usize, u64), Trouble> {
        // What is registered is discarded without messages where it is not registered any more.
        for m in [from, to, huge] {
            let r = m.range();
            uffd.unregister(r.start.0, r.len()).map_err(Trouble::failed("unregister"))?;
            // SAFETY: its content is not needed any more.
            unsafe { m.advise(0, m.len(), Advice::LinuxDontNeed) }.map_err(Trouble::failed("discard"))?;
        }
        // SAFETY: nobody else knows of them, here and below.
        Self::scatter(unsafe { words(all(from)) });
        // SAFETY: as above.
        unsafe { words(all(huge)) }.fill(1);
        for m in [from, to, huge] {
            let r = m.range();
            uffd.register(r.start.0, r.len(), Mode::Protected).map_err(Trouble::failed("register"))?;
        }
        let (mut moves, mut copies) = (Duration::ZERO, Duration::ZERO);
        let blocks = from.len() / BLOCK;
        for block in 0..blocks {
            let at = |m: &Mapping| m.range().start.0 + (block * BLOCK) as u64;
            let start = Instant::now();
            // SAFETY: memory of this contender, of which nobody holds a reference.
            let (bytes, error) = unsafe { uffd.move_pages(at(to), at(from), BLOCK as u64, false) };
            moves += start.elapsed();
            if bytes != BLOCK as u64 {
                return Err(Trouble::Failed(format!("moving {BLOCK} bytes came to {bytes}: {error:?}")));
            }
            let part = block * BLOCK / 8..(block + 1) * BLOCK / 8;
            let start = Instant::now();
            // SAFETY: as above.
            let (from, to) = unsafe { (words(all(to)), words(all(huge))) };
            to[part.clone()].copy_from_slice(&from[part]);
            copies += start.elapsed();
        }
        // Where the small pages were, their page tables still are; the huge pages go where nothing has been.
        let fresh = Mapping::new(huge.len(), BLOCK, true).map_err(Trouble::failed("map memory"))?;
        let r = fresh.range();
        uffd.register(r.start.0, r.len(), Mode::Protected).map_err(Trouble::failed("register"))?;
        let start = Instant::now();
        for block in 0..blocks {
            let offset = (block * BLOCK) as u64;
            // SAFETY: as above.
            let (bytes, error) =
                unsafe { uffd.move_pages(r.start.0 + offset, huge.range().start.0 + offset, BLOCK as u64, false) };
            if bytes != BLOCK as u64 {
                return Err(Trouble::Failed(format!("moving a huge page came to {bytes} bytes: {error:?}")));
            }
        }
        moves += start.elapsed();
        // SAFETY: as above.
        let verified = workload::read_in_order(unsafe { words(all(&fresh)) }, 0)?;
        uffd.unregister(r.start.0, r.len()).map_err(Trouble::failed("unregister"))?;
        Ok((copies.mul_f64(COPIES) + moves, blocks, verified))
    }
}
