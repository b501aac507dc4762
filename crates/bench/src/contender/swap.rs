//! The kernel: plain memory in a memory cgroup that is smaller than the data, with swap behind it.

use super::{Counters, Memory};
use crate::error::Trouble;
use crate::spec::Spec;
use crate::workload;
use peerspace_os::linux::map::Mapping;
use rustix::mm::Advice;

/// Memory under a limit.
#[derive(Debug)]
pub(super) struct Swapped {
    mapping: Mapping,
}

impl Swapped {
    pub(super) fn new(spec: &Spec, huge: bool) -> Result<Swapped, Trouble> {
        let Some(procs) = &spec.cgroup else {
            return Err(Trouble::Failed("it was given no cgroup".into()));
        };
        std::fs::write(procs, "0").map_err(Trouble::unavailable("enter a memory cgroup"))?;
        // On a busy machine the kernel may find nothing to swap out at the moment and take that for the end. There is
        // swap for everything: asked again, it finds something.
        let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
        let mapping =
            Mapping::new(spec.data as usize, 2 << 20, true).map_err(Trouble::failed("map the data's memory"))?;
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: the advice changes no content.
        unsafe { mapping.advise(0, mapping.len(), advice) }.map_err(Trouble::unavailable("ask for huge pages"))?;
        // SAFETY: the mapping is readable and writable, any bytes are valid words, and nobody else refers to it.
        let words = unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().cast::<u64>(), mapping.len() / 8) };
        workload::fill(words, 0);
        Ok(Swapped { mapping })
    }
}

impl Memory for Swapped {
    fn words(&self) -> &[u64] {
        // SAFETY: the mapping is readable, any bytes are valid words, and nobody writes.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast(), self.mapping.len() / 8) }
    }

    fn counters(&mut self) -> Counters {
        Counters { fetches: swapped_in(), stores: None }
    }
}

/// Faults of this process that had to fetch data: the major ones, in field 12 of its `stat`.
fn swapped_in() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program, which can hold anything, ends with the last parenthesis; field 3 follows.
    stat.rsplit_once(')')?.1.split_whitespace().nth(12 - 3)?.parse().ok()
}
