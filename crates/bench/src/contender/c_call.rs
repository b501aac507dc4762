//! Calls through the C library, and the same without: what the way through C takes.
//!
//! The functions of the library are called by pointers, as a program in C does, so that nothing of them is made part of the
//! loop.

use super::Contender;
use crate::error::Trouble;
use crate::spec::{CCall, Metric, Sample, Spec, Work};
use peerspace::device::soft::Soft;
use peerspace::{DeviceId, Faults, Region, Space, Use};
use peerspace_capi::device::ps_device_ops;
use peerspace_capi::error::ps_status;
use peerspace_capi::memory::{ps_pin, ps_pin_create, ps_pin_release};
use peerspace_capi::region::{ps_region, ps_region_create, ps_region_memory, ps_region_release, ps_use};
use peerspace_capi::space::{
    ps_device, ps_device_choice, ps_device_get_statistics, ps_faults, ps_space, ps_space_create, ps_space_devices,
    ps_space_options, ps_space_release,
};
use peerspace_capi::statistics::ps_device_statistics;
use std::ffi::c_void;
use std::hint::black_box;
use std::ptr::{null, null_mut};
use std::time::Instant;

/// Calls in a row, of one way: in so short a time little else happens.
const ROW: u32 = 200;
/// Rows of each way, in turns; the middle one counts, and so does the middle of the differences.
const ROWS: usize = 2001;
const BYTES: u64 = 4 << 20;

/// The same things by both ways.
pub(super) struct Calls {
    call: CCall,
    space: Space,
    region: Region,
    device: DeviceId,
    c: InC,
}

struct InC {
    space: ps_space,
    region: ps_region,
    device: ps_device,
    start: *mut c_void,
}

fn must(what: &str, status: ps_status) -> Result<(), Trouble> {
    match status {
        ps_status::PS_OK => Ok(()),
        status => Err(Trouble::Failed(format!("{what}: {status:?}"))),
    }
}

impl InC {
    fn new(spec: &Spec) -> Result<InC, Trouble> {
        let soft = format!("soft:{}\0", spec.data);
        let choice = ps_device_choice { spec: soft.as_ptr().cast(), ops: null::<ps_device_ops>() };
        let options = ps_space_options {
            size: size_of::<ps_space_options>(),
            host_bytes: spec.host,
            pin_limit: 0,
            faults: ps_faults::PS_FAULTS_SIGNAL as u32,
            handlers: 0,
            devices: &choice,
            device_count: 1,
            without_features: 0,
        };
        let mut made = InC {
            space: ps_space { id: 0 },
            region: ps_region { id: 0 },
            device: ps_device { id: 0 },
            start: null_mut(),
        };
        let (mut count, mut len) = (0, 0);
        // SAFETY: every pointer leads to a value of this function, and the specification ends with a 0.
        unsafe {
            must("make a space through C", ps_space_create(&options, &mut made.space))?;
            must("make a region through C", ps_region_create(made.space, BYTES, &mut made.region))?;
            must("find a device through C", ps_space_devices(made.space, &mut made.device, 1, &mut count))?;
            must("find a region through C", ps_region_memory(made.region, &mut made.start, &mut len))?;
        }
        Ok(made)
    }
}

impl Drop for InC {
    fn drop(&mut self) {
        let _ = (ps_region_release(self.region), ps_space_release(self.space));
    }
}

impl Calls {
    pub(super) fn new(spec: &Spec, call: CCall) -> Result<Calls, Trouble> {
        let device = Soft::new(spec.data).map_err(Trouble::unavailable("the device soft"))?;
        let space = Space::builder().host(spec.host).faults(Faults::Signal).device(device);
        let space = space.build().map_err(Trouble::unavailable("make a space"))?;
        let mut region = space.region(BYTES).map_err(Trouble::failed("make a region"))?;
        region.bytes_mut()[0] = 1;
        let device = space.devices()[0];
        let c = InC::new(spec)?;
        // SAFETY: the first byte of a region of this function.
        unsafe { c.start.cast::<u8>().write(1) };
        Ok(Calls { call, space, region, device, c })
    }

    /// A row of calls, directly. Counts those that were right.
    fn directly(&self) -> Result<u64, Trouble> {
        let mut right = 0;
        for _ in 0..ROW {
            right += match self.call {
                CCall::Lookup => {
                    let region = black_box(&self.region);
                    let (start, len) = black_box((region.as_ptr(), region.len()));
                    u64::from(!start.is_null() && len == BYTES as usize)
                }
                CCall::Pin => {
                    let pin = self.space.make_resident(black_box(self.region.as_ptr()), 8, Use::Read);
                    drop(pin.map_err(Trouble::failed("pin a page"))?);
                    1
                }
                CCall::Statistics => {
                    let numbers = self.space.device_statistics(black_box(self.device));
                    let numbers = numbers.map_err(Trouble::failed("read numbers"))?;
                    u64::from(black_box(&numbers).capacity_bytes > 0)
                }
            };
        }
        Ok(right)
    }

    /// The same through C.
    fn through_c(&self) -> Result<u64, Trouble> {
        let memory: unsafe extern "C" fn(_, _, _) -> _ = black_box(ps_region_memory);
        let create: unsafe extern "C" fn(_, _, _, _, _) -> _ = black_box(ps_pin_create);
        let release: extern "C" fn(_) -> _ = black_box(ps_pin_release);
        let numbers: unsafe extern "C" fn(_, _) -> _ = black_box(ps_device_get_statistics);
        let mut right = 0;
        for _ in 0..ROW {
            right += match self.call {
                CCall::Lookup => {
                    let (mut start, mut len) = (null_mut(), 0);
                    // SAFETY: both lead to values of this function.
                    let status: ps_status = unsafe { memory(black_box(self.c.region), &mut start, &mut len) };
                    u64::from(status == ps_status::PS_OK && !start.is_null() && len == BYTES as usize)
                }
                CCall::Pin => {
                    let mut pin = ps_pin { id: 0 };
                    let how = ps_use::PS_USE_READ as u32;
                    // SAFETY: memory of a region of ours, and a value of this function.
                    let status: ps_status =
                        unsafe { create(self.c.space, black_box(self.c.start).cast_const(), 8, how, &mut pin) };
                    must("pin a page through C", status)?;
                    let status: ps_status = release(pin);
                    u64::from(status == ps_status::PS_OK)
                }
                CCall::Statistics => {
                    // SAFETY: numbers and characters, all of which may be zero.
                    let mut to: ps_device_statistics = unsafe { std::mem::zeroed() };
                    to.size = size_of::<ps_device_statistics>();
                    // SAFETY: a value of this function that says its size.
                    let status: ps_status = unsafe { numbers(black_box(self.c.device), &mut to) };
                    u64::from(status == ps_status::PS_OK && black_box(&to).capacity_bytes > 0)
                }
            };
        }
        Ok(right)
    }
}

impl Contender for Calls {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let calls = if self.call == CCall::Pin { 2 } else { 1 };
        let (mut directly, mut through) = (Vec::with_capacity(ROWS), Vec::with_capacity(ROWS));
        let mut right = 0;
        for _ in 0..ROWS {
            for (times, c) in [(&mut directly, false), (&mut through, true)] {
                let start = Instant::now();
                right += if c { self.through_c() } else { self.directly() }?;
                times.push(start.elapsed().as_nanos() as f64 / f64::from(ROW * calls));
            }
        }
        let all = 2 * ROWS as u64 * u64::from(ROW);
        if right != all {
            return Err(Trouble::Wrong(format!("{} of {all} calls", all - right)));
        }
        let middle = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[ROWS / 2]
        };
        let added = middle(directly.iter().zip(&through).map(|(directly, through)| through - directly).collect());
        Ok(Sample::verified(right)
            .with(Metric::PerCallDirect, middle(directly))
            .with(Metric::PerCallByC, middle(through))
            .with(Metric::AddedByC, added))
    }
}
