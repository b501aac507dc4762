//! A process that makes a space and a region of 1 TiB, and another that makes nothing: what it takes to begin.

use super::Contender;
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use peerspace::device::soft::Soft;
use peerspace::{Faults, Region, Space};
use std::time::{Duration, Instant};

/// The region that is made.
const REGION: u64 = 1 << 40;

/// What was made, and how long it took.
#[derive(Debug)]
pub(super) struct Start {
    took: Duration,
    made: Option<(Space, Region)>,
}

impl Start {
    pub(super) fn new(spec: &Spec, space: bool) -> Result<Start, Trouble> {
        let start = Instant::now();
        let made = if space {
            let device = Soft::new(spec.data).map_err(Trouble::unavailable("the device soft"))?;
            let space = Space::builder().host(spec.host).faults(Faults::Signal).device(device);
            let space = space.build().map_err(Trouble::unavailable("make a space"))?;
            let region = space.region(REGION).map_err(Trouble::failed("make a region of 1 TiB"))?;
            Some((space, region))
        } else {
            None
        };
        Ok(Start { took: start.elapsed(), made })
    }
}

impl Contender for Start {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let Some((_, region)) = &mut self.made else { return Ok(Sample::default()) };
        // It has to be good for something: the first and the last word are there.
        let words = region.typed_mut::<u64>();
        let last = words.len() - 1;
        (words[0], words[last]) = (1, 2);
        if (words[0], words[last], words[last / 2]) != (1, 2, 0) {
            return Err(Trouble::Wrong("words of a region of 1 TiB".into()));
        }
        Ok(Sample::verified(3).with(Metric::SpaceTime, self.took.as_secs_f64() * 1e3))
    }
}
