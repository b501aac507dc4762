//! What it takes to attach a device of 1 TiB, and what the descriptors of its pages take up as they are used.

use super::Contender;
use super::footprint::{BYTE, Reciter, own_bytes};
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use peerspace::{Faults, Hint, Region, Space};
use std::time::Instant;

const PAGE: u64 = 4096;
const GIB: f64 = (1 << 30) as f64;
/// Pages of a device of 1 TiB.
const PAGES: u64 = (1 << 40) / PAGE;

/// A process in which no space was made yet.
#[derive(Debug)]
pub(super) struct Attach(Spec);

impl Attach {
    pub(super) fn new(spec: &Spec) -> Attach {
        Attach(spec.clone())
    }

    /// Bytes of descriptors for each GiB that is used of a device of 1 TiB, in huge folios or in pages.
    fn metadata(&self, space: &Space, hint: Hint) -> Result<(f64, Region), Trouble> {
        let mut region = space.region(self.0.data).map_err(Trouble::failed("make a region"))?;
        region.advise(hint).map_err(Trouble::failed("advise the region"))?;
        region.bytes_mut().fill(BYTE);
        let statistics = space.statistics();
        let device = statistics.devices.last().expect("one was attached");
        if device.used_bytes < self.0.data / 2 {
            return Err(Trouble::Failed(format!("only {} bytes of the device are used", device.used_bytes)));
        }
        let wrong = region.bytes().iter().step_by(PAGE as usize).filter(|b| **b != BYTE).count();
        if wrong > 0 {
            return Err(Trouble::Wrong(format!("{wrong} pages")));
        }
        Ok((device.metadata_bytes as f64 * GIB / device.used_bytes as f64, region))
    }
}

impl Contender for Attach {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let space = Space::builder().host(self.0.host).faults(Faults::Signal).device(Reciter { pages: 512 });
        let space = space.build().map_err(Trouble::unavailable("make a space"))?;
        let first = space.devices()[0];
        let exchange = |old| -> Result<_, Trouble> {
            let start = Instant::now();
            let new = space.attach(Reciter { pages: PAGES }).map_err(Trouble::failed("attach"))?;
            let attached = start.elapsed();
            let start = Instant::now();
            space.detach(old).map_err(Trouble::failed("detach"))?;
            Ok((new, attached, start.elapsed()))
        };
        // Nothing lasts of what has to be done once only.
        let (second, ..) = exchange(first)?;
        let before = own_bytes()?;
        let (third, attached, _) = exchange(second)?;
        let bytes = own_bytes()? - before;
        let (huge, region) = self.metadata(&space, Hint::Dense)?;
        // With all that it holds, which goes to another one.
        let (_, _, detached) = exchange(third)?;
        let wrong = region.bytes().iter().step_by(PAGE as usize).filter(|b| **b != BYTE).count();
        if wrong > 0 {
            return Err(Trouble::Wrong(format!("{wrong} pages after their device has gone")));
        }
        let pages = region.len() as u64 / PAGE;
        drop(region);
        let (small, _) = self.metadata(&space, Hint::Sparse)?;
        Ok(Sample::verified(3 * pages)
            .with(Metric::AttachTime, attached.as_secs_f64() * 1e3)
            .with(Metric::AttachBytes, bytes.max(0) as f64)
            .with(Metric::DetachTime, detached.as_secs_f64() * 1e3)
            .with(Metric::DescriptorsHuge, huge)
            .with(Metric::DescriptorsSmall, small))
    }
}
