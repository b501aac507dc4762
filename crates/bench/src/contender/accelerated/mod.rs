//! Spaces with accelerators: what it costs to send memory there and back, to have it come by faults, and to use it from
//! there. The accelerator is the one in software, so these are the costs of the engine, and of a link only where one is
//! modelled.

mod calls;
mod migrate;
mod stream;
mod touch;
mod traffic;

pub(super) use calls::Calls;
pub(super) use migrate::Migrate;
pub(super) use stream::Stream;
pub(super) use touch::Touch;
pub(super) use traffic::Traffic;

use crate::error::Trouble;
use crate::spec::{LinkSpeed, Spec};
use crate::workload::{self, PAGE_BYTES, PAGE_WORDS};
use peerspace::device::soft::{Accelerator, Job, KernelError, Lane, Link, Options, Soft};
use peerspace::{DeviceId, Faults, Hint, Node, Region, Space};
use std::ops::Range;
use std::time::Duration;

/// Bytes of a block.
const BLOCK: usize = 2 << 20;

/// An accelerator with this much memory. One lane: it, and the thread that sends for it, have a processor each on a machine
/// with two.
fn accelerator(bytes: u64, link: Option<LinkSpeed>) -> Result<Accelerator, Trouble> {
    let options = Options::new(bytes).lanes(1);
    let options = match link {
        None => options,
        Some(LinkSpeed { bytes_per_second, latency_ns }) => {
            options.link(Link { bytes_per_second, latency: Duration::from_nanos(latency_ns) })
        }
    };
    Accelerator::new(options).map_err(Trouble::unavailable("make an accelerator"))
}

/// A space with a device that is memory alone, the first, and accelerators. The result: the space, and the ids of all devices.
fn space(spec: &Spec, accelerators: &[Accelerator]) -> Result<(Space, Vec<DeviceId>), Trouble> {
    let store = Soft::new(spec.data).map_err(Trouble::unavailable("the device soft"))?;
    let mut builder = Space::builder().host(spec.host).faults(Faults::Signal).device(store);
    for accelerator in accelerators {
        builder = builder.device(accelerator.clone());
    }
    let space = builder.build().map_err(Trouble::unavailable("make a space"))?;
    let ids = space.devices();
    Ok((space, ids))
}

/// A region to be used in this way.
fn region(space: &Space, bytes: u64, hint: Hint) -> Result<Region, Trouble> {
    let region = space.region(bytes).map_err(Trouble::failed("make a region"))?;
    region.advise(hint).map_err(Trouble::failed("advise the region"))?;
    Ok(region)
}

/// Uses all memory of a device once, so that the host of a virtual machine has backed it.
fn warm(space: &Space, device: DeviceId, bytes: u64) -> Result<(), Trouble> {
    let mut region = region(space, bytes, Hint::Dense)?;
    region.bytes_mut().fill(1);
    let bytes = region.len();
    send(&region, 0..bytes, Node::Device(device))
}

/// Sends a part of a region to a node, and waits until it is there.
fn send(region: &Region, part: Range<usize>, to: Node) -> Result<(), Trouble> {
    let bytes = part.len();
    let sent = region.prefetch(part, to).map_err(Trouble::failed("prefetch"))?;
    match sent.wait().map_err(Trouble::failed("prefetch"))? {
        there if there == bytes => Ok(()),
        there => Err(Trouble::Failed(format!("{there} of {bytes} bytes are where they were sent"))),
    }
}

/// Writes the first word of each block as it is already: then no device has a copy that is still good.
fn write_again(region: &mut Region) {
    for (i, block) in region.typed_mut::<u64>().chunks_exact_mut(BLOCK / 8).enumerate() {
        block[0] = workload::word(i * BLOCK / 8);
    }
}

/// Has one lane run `kernel`, to its end.
fn run<F>(on: &Accelerator, kernel: F) -> Result<(), Trouble>
where
    F: Fn(&Lane) -> Result<(), KernelError> + Send + Sync + 'static,
{
    ended(start(on, kernel)?)
}

/// Has one lane run `kernel` when it is through with what it has to run.
fn start<F>(on: &Accelerator, kernel: F) -> Result<Job, Trouble>
where
    F: Fn(&Lane) -> Result<(), KernelError> + Send + Sync + 'static,
{
    // SAFETY: the kernels of the contenders access their regions alone, which stay until the job has ended, and hold words of
    // any value.
    unsafe { on.launch(1, move |lane: &Lane, _: Range<u64>| kernel(lane)) }
        .map_err(Trouble::failed("launch a kernel"))
}

fn ended(job: Job) -> Result<(), Trouble> {
    job.wait().map_err(|e| match e {
        KernelError::Panicked(what) if what.starts_with(WRONG) => Trouble::Wrong(what),
        e => Trouble::Failed(format!("run a kernel: {e}")),
    })
}

/// What a kernel that finds something wrong says first.
const WRONG: &str = "read on an accelerator: ";

/// Reads the page of data with this number on a lane, the words themselves looked at `words` times in all; the region begins
/// at `base`. One word of those that are looked at is skipped: the last of a page is anybody's to write.
///
/// # Panics
/// When a word is wrong: that is how a kernel says so.
fn read_page(lane: &Lane, base: u64, page: usize, words: usize) -> Result<(), KernelError> {
    let mut bytes = [0; PAGE_BYTES];
    lane.read(base + (page * PAGE_BYTES) as u64, &mut bytes)?;
    let mut wrong = 0;
    let found = bytes.as_chunks::<8>().0;
    for i in 0..words {
        let k = i % (PAGE_WORDS - 1);
        wrong |= u64::from_ne_bytes(found[k]) ^ workload::word(page * PAGE_WORDS + k);
    }
    assert!(wrong == 0, "{WRONG}words of page {page} differ from what was written in bits {wrong:#x}");
    Ok(())
}
