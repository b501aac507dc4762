//! Memory of a coherent device, in place: what it takes to send blocks there and to bring them home, what reading it in place
//! costs, and what its pages are described by. Beside it the least that sending can be: the system calls that write and read
//! the same blocks.

use super::Contender;
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use crate::workload;
use peerspace::device::dax::Dax;
use peerspace::device::soft::Soft;
use peerspace::{DeviceId, Faults, Hint, Region, Space};
use peerspace_os::linux::map::Mapping;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::Advice;
use std::time::{Duration, Instant};

const BLOCK: usize = 2 << 20;
const GIB: f64 = (1 << 30) as f64;
/// How often everything goes and comes in one sample.
const TIMES: u32 = 4;

/// Who sends memory away and brings it home.
pub(super) enum Place {
    /// A space, to a coherent device.
    Ours(Space, Region, DeviceId),
    /// System calls, to a file in memory.
    Calls(Mapping, OwnedFd),
}

impl Place {
    pub(super) fn new(spec: &Spec, ours: bool) -> Result<Place, Trouble> {
        if !ours {
            let memory = Mapping::new(spec.data as usize, BLOCK, true).map_err(Trouble::failed("map memory"))?;
            // SAFETY: the advice changes no content.
            unsafe { memory.advise(0, memory.len(), Advice::LinuxHugepage) }
                .map_err(Trouble::unavailable("ask for huge pages"))?;
            // SAFETY: it was just mapped, writable, and nobody else knows of it.
            workload::fill(unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().cast(), memory.len() / 8) }, 0);
            let file =
                memfd_create(c"floor", MemfdFlags::CLOEXEC).map_err(Trouble::failed("make a file in memory"))?;
            ftruncate(&file, spec.data).map_err(Trouble::failed("make a file in memory"))?;
            return Ok(Place::Calls(memory, file));
        }
        let device = Soft::new(BLOCK as u64).map_err(Trouble::unavailable("the device soft"))?;
        let space = Space::builder().host(spec.host + spec.data).faults(Faults::Signal).device(device);
        let space = space.build().map_err(Trouble::unavailable("make a space"))?;
        let dax = Dax::memory(spec.data).map_err(Trouble::unavailable("the device dax"))?;
        let far = space.attach(dax).map_err(Trouble::failed("attach"))?;
        let mut region = space.region(spec.data).map_err(Trouble::failed("make a region"))?;
        region.advise(Hint::Dense).map_err(Trouble::failed("advise the region"))?;
        workload::fill(region.typed_mut(), 0);
        Ok(Place::Ours(space, region, far))
    }
}

/// What one time took: there, and back.
type Took = [Duration; 2];

fn by_calls(memory: &Mapping, file: &OwnedFd) -> Result<Took, Trouble> {
    // SAFETY: the mapping is ours alone, and lives on.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), memory.len()) };
    let start = Instant::now();
    for (i, block) in bytes.chunks_exact(BLOCK).enumerate() {
        let done = rustix::io::pwrite(file, block, (i * BLOCK) as u64).map_err(Trouble::failed("write"))?;
        (done == BLOCK).then_some(()).ok_or_else(|| Trouble::Failed(format!("{done} bytes were written")))?;
    }
    let there = start.elapsed();
    let start = Instant::now();
    for (i, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
        let done = rustix::io::pread(file, &mut *block, (i * BLOCK) as u64).map_err(Trouble::failed("read"))?;
        (done == BLOCK).then_some(()).ok_or_else(|| Trouble::Failed(format!("{done} bytes were read")))?;
    }
    Ok([there, start.elapsed()])
}

impl Contender for Place {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let (mut there, mut back, mut verified) = (Duration::ZERO, Duration::ZERO, 0);
        let mut in_place = None;
        let bytes = match self {
            Place::Ours(_, region, _) => region.len(),
            Place::Calls(memory, _) => memory.len(),
        };
        for time in 0..TIMES {
            let [out, home] = match self {
                Place::Calls(memory, file) => by_calls(memory, file)?,
                Place::Ours(space, region, far) => {
                    let start = Instant::now();
                    let moved = region.migrate_to(0..bytes, *far).map_err(Trouble::failed("migrate"))?;
                    let out = start.elapsed();
                    if moved < bytes {
                        return Err(Trouble::Failed(format!("{moved} of {bytes} bytes went")));
                    }
                    if time == 0 {
                        verified += workload::read_in_order(region.typed(), 0)?;
                        let statistics = space.statistics();
                        let device = statistics.devices.last().expect("one was attached");
                        let each = GIB / device.in_place_bytes as f64;
                        in_place =
                            Some([device.metadata_bytes as f64 * each, device.own_metadata_bytes as f64 * each]);
                    }
                    let start = Instant::now();
                    let moved = region.migrate_home(0..bytes).map_err(Trouble::failed("migrate home"))?;
                    if moved < bytes {
                        return Err(Trouble::Failed(format!("{moved} of {bytes} bytes came home")));
                    }
                    [out, start.elapsed()]
                }
            };
            there += out;
            back += home;
        }
        let rate = |took: Duration| bytes as f64 * f64::from(TIMES) / took.as_secs_f64() / 1e9;
        let sample = Sample::verified(verified).with(Metric::Sent, rate(there)).with(Metric::Fetched, rate(back));
        Ok(match in_place {
            None => sample,
            Some([host, own]) => sample.with(Metric::DescriptorsHost, host).with(Metric::DescriptorsOwn, own),
        })
    }
}
