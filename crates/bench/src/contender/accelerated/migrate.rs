//! Memory sent to an accelerator and brought home, so many bytes at a time; and memcpy of the same bytes between two buffers.

use super::{accelerator, region, send, space, write_again};
use crate::contender::Contender;
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use crate::workload;
use peerspace::device::soft::Accelerator;
use peerspace::{Hint, Node, Region, Space};
use peerspace_os::linux::map::Mapping;
use rustix::mm::Advice;
use std::time::{Duration, Instant};

/// How often everything goes and comes in one sample.
const TIMES: u32 = 4;

/// Who sends memory away and brings it home.
enum Who {
    /// A space.
    Ours { space: Space, region: Region, accelerator: Accelerator, far: Node },
    /// memcpy, from the first to the second and back.
    Copy(Mapping, Mapping),
}

/// The memory, and how much of it goes at once.
pub(in crate::contender) struct Migrate {
    who: Who,
    piece: usize,
}

impl Migrate {
    pub(in crate::contender) fn new(spec: &Spec, ours: bool, piece: u64) -> Result<Migrate, Trouble> {
        let piece = piece as usize;
        if !ours {
            let map = || -> Result<Mapping, Trouble> {
                let map =
                    Mapping::new(spec.data as usize, super::BLOCK, true).map_err(Trouble::failed("map memory"))?;
                // SAFETY: the advice changes no content.
                unsafe { map.advise(0, map.len(), Advice::LinuxHugepage) }
                    .map_err(Trouble::unavailable("ask for huge pages"))?;
                Ok(map)
            };
            let (mut near, mut far) = (map()?, map()?);
            workload::fill(words(&mut near), 0);
            words(&mut far).fill(1);
            return Ok(Migrate { who: Who::Copy(near, far), piece });
        }
        let accelerator = accelerator(spec.data, None)?;
        let (space, ids) = space(spec, std::slice::from_ref(&accelerator))?;
        let mut region = region(&space, spec.data, Hint::Dense)?;
        workload::fill(region.typed_mut(), 0);
        let far = Node::Device(*ids.last().expect("it has two devices"));
        let all = region.len();
        // Once there and back: then all memory was in use before.
        send(&region, 0..all, far)?;
        send(&region, 0..all, Node::Host)?;
        Ok(Migrate { who: Who::Ours { space, region, accelerator, far }, piece })
    }
}

fn words(memory: &mut Mapping) -> &mut [u64] {
    // SAFETY: mapped, readable and writable, and nobody else knows of it.
    unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().cast(), memory.len() / 8) }
}

/// Calls `send` for each piece of `all` bytes. The result: how long that took.
fn each(
    all: usize,
    piece: usize,
    mut send: impl FnMut(std::ops::Range<usize>) -> Result<(), Trouble>,
) -> Result<Duration, Trouble> {
    let start = Instant::now();
    for at in (0..all).step_by(piece) {
        send(at..at + piece)?;
    }
    Ok(start.elapsed())
}

impl Contender for Migrate {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let (mut there, mut back) = (Duration::ZERO, Duration::ZERO);
        let piece = self.piece;
        let (bytes, verified) = match &mut self.who {
            Who::Copy(near, far) => {
                let (near, far) = (words(near), words(far));
                let all = size_of_val(near);
                let part = |bytes: std::ops::Range<usize>| bytes.start / 8..bytes.end / 8;
                for _ in 0..TIMES {
                    there += each(all, piece, |bytes| {
                        far[part(bytes.clone())].copy_from_slice(&near[part(bytes)]);
                        Ok(())
                    })?;
                    back += each(all, piece, |bytes| {
                        near[part(bytes.clone())].copy_from_slice(&far[part(bytes)]);
                        Ok(())
                    })?;
                }
                (all, workload::read_in_order(near, 0)?)
            }
            Who::Ours { space, region, accelerator, far } => {
                let (all, before) = (region.len(), accelerator.statistics());
                for _ in 0..TIMES {
                    write_again(region);
                    there += each(all, piece, |bytes| send(region, bytes, *far))?;
                    back += each(all, piece, |bytes| send(region, bytes, Node::Host))?;
                }
                let (after, want) = (accelerator.statistics(), all as u64 * u64::from(TIMES));
                let went = [after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out];
                if went != [want; 2] {
                    return Err(Trouble::Failed(format!("{went:?} bytes went and came, instead of {want}")));
                }
                let huge = space.statistics().thp.anon_huge_bytes as usize;
                if huge != all {
                    return Err(Trouble::Failed(format!("only {huge} of {all} bytes are huge at home")));
                }
                (all, workload::read_in_order(region.typed(), 0)?)
            }
        };
        let rate = |took: Duration| bytes as f64 * f64::from(TIMES) / took.as_secs_f64() / 1e9;
        Ok(Sample::verified(verified).with(Metric::Sent, rate(there)).with(Metric::Fetched, rate(back)))
    }
}
