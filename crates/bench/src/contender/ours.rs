//! Ours: a region of a space with one device, faults by signal.

use super::{Counters, Memory, device};
use crate::error::Trouble;
use crate::spec::{DeviceKind, Spec};
use crate::workload;
use peerspace::{Faults, Hint, Region, Space};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// More than is ever read ahead.
const END: usize = 32 << 20;

/// A region with the data in it.
#[derive(Debug)]
pub(super) struct Ours {
    space: Space,
    region: Region,
    host: u64,
}

impl Ours {
    pub(super) fn new(spec: &Spec, device: DeviceKind, hint: Hint) -> Result<(Ours, Option<String>), Trouble> {
        let builder = Space::builder().host(spec.host).faults(Faults::Signal);
        let (builder, about) = device::attach(builder, device, spec)?;
        let space = builder.build().map_err(Trouble::unavailable("make a space"))?;
        let mut region = space.region(spec.data).map_err(Trouble::failed("make a region"))?;
        region.advise(hint).map_err(Trouble::failed("advise the region"))?;
        workload::fill(region.typed_mut(), 0);
        // What was written last is in RAM and dirty. Another pass drives it out, so that from here on whoever stores
        // a page stores it for the second time.
        workload::read_in_order(region.typed(), 0)?;
        Ok((Ours { space, region, host: spec.host }, about))
    }
}

/// Pages of `region` that the processor can see, as the kernel says.
pub(super) fn present(region: &Region) -> Result<usize, Trouble> {
    const PRESENT: u64 = 1 << 63;
    let pagemap = File::open("/proc/self/pagemap").map_err(Trouble::failed("look at the page map"))?;
    let page = rustix::param::page_size();
    let mut words = vec![0u8; region.len() / page * 8];
    pagemap
        .read_exact_at(&mut words, (region.as_ptr() as usize / page * 8) as u64)
        .map_err(Trouble::failed("look at the page map"))?;
    Ok(words.as_chunks::<8>().0.iter().filter(|w| u64::from_ne_bytes(**w) & PRESENT != 0).count())
}

impl Memory for Ours {
    fn words(&self) -> &[u64] {
        self.region.typed()
    }

    fn counters(&mut self) -> Counters {
        let s = self.space.statistics();
        Counters { fetches: Some(s.faults.device), stores: s.devices.first().map(|d| d.stores) }
    }

    /// The data are written once more, into a region without a history, and then another region, larger than all RAM
    /// of the space, is used up and given back. What came first leaves first, whatever the policy: nothing tells it
    /// that these pages are worth more than those.
    fn send_away(&mut self) -> Result<(), Trouble> {
        let bytes = self.region.len() as u64;
        let make = |bytes| self.space.region(bytes).map_err(Trouble::failed("make a region"));
        let fresh = make(bytes)?;
        drop(std::mem::replace(&mut self.region, fresh));
        workload::fill(self.region.typed_mut(), 0);
        // Without the end of it: what is read ahead there may belong to the data, which can be next to it.
        let ballast = make(self.host + self.host / 2 + END as u64)?;
        let words = &ballast.typed::<u64>()[..(ballast.len() - END) / 8];
        if let Some(i) = words.iter().step_by(workload::PAGE_WORDS).position(|w| *w != 0) {
            return Err(Trouble::Wrong(format!("page {i} of a new region is not zero")));
        }
        match present(&self.region)? {
            0 => Ok(()),
            n => Err(Trouble::Failed(format!("{n} pages stay in RAM although others came later"))),
        }
    }
}
