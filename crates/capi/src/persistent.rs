//! Regions that outlive the process, by their names on a persistent device (rule Z5).

use crate::args::{self, Out};
use crate::error::{Failure, Inside, call, call_from, ps_status};
use crate::space::{ps_device, with_device};
use crate::table;
use peerspace::{DeviceId, Persistent, Space};
use std::ffi::{c_char, c_void};

/// A region of a persistent device, which was opened by its name. It is used in place; a forked process has the same memory, not
/// a copy.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_persistent {
    /// A handle; 0 is none.
    pub id: u64,
}

/// # Safety
/// `name` and `region` are null or good.
unsafe fn opened(
    device: ps_device,
    name: *const c_char,
    region: *mut ps_persistent,
    open: impl FnOnce(&Space, DeviceId, &str) -> Result<Persistent, peerspace::Error>,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let out = unsafe { Out::new(region, "region") }?;
    // SAFETY: as above.
    let name = unsafe { args::text(name, "name") }?;
    let opened = with_device(device, |entry, id| Ok(open(&entry.space, id, name)?))?;
    out.put(ps_persistent { id: table::open(opened)? });
    Ok(())
}

/// Makes a region of `bytes` bytes, all zero, on a persistent device, and opens it. That it is there is durable on return.
///
/// Errors: PS_ERR_NAMED when there is one of that name, or no room; PS_ERR_DEVICE for a device that is not persistent.
///
/// # Safety
/// `name` and `region` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_persistent_create(
    device: ps_device,
    name: *const c_char,
    bytes: u64,
    region: *mut ps_persistent,
) -> ps_status {
    call("ps_persistent_create", || {
        // SAFETY: the caller's promise.
        unsafe { opened(device, name, region, |space, id, name| space.create_persistent(id, name, bytes)) }
    })
}

/// Opens a region that is there already.
///
/// Errors: PS_ERR_NAMED when there is none of that name, or it is open already; PS_ERR_DEVICE for a device that is not persistent.
///
/// # Safety
/// `name` and `region` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_persistent_open(
    device: ps_device,
    name: *const c_char,
    region: *mut ps_persistent,
) -> ps_status {
    call("ps_persistent_open", || {
        // SAFETY: the caller's promise.
        unsafe { opened(device, name, region, |space, id, name| space.open_persistent(id, name)) }
    })
}

/// Removes a region that is not open, with everything in it.
///
/// Errors: PS_ERR_NAMED when there is none of that name, or it is open; PS_ERR_DEVICE for a device that is not persistent.
///
/// # Safety
/// `name` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_persistent_remove(device: ps_device, name: *const c_char) -> ps_status {
    call("ps_persistent_remove", || {
        // SAFETY: the caller's promise.
        let name = unsafe { args::text(name, "name") }?;
        with_device(device, |entry, id| Ok(entry.space.remove_persistent(id, name)?))
    })
}

/// Where an open region is, and how many bytes it has.
///
/// # Safety
/// `start` and `len` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_persistent_memory(
    region: ps_persistent,
    start: *mut *mut c_void,
    len: *mut usize,
) -> ps_status {
    call_from(Inside::Work, "ps_persistent_memory", || {
        // SAFETY: the caller's promise, here and below.
        let at = unsafe { Out::new(start, "start") }?;
        // SAFETY: as above.
        let bytes = unsafe { Out::new(len, "len") }?;
        let region = table::find::<Persistent>(region.id, "region")?;
        at.put(region.as_ptr().cast());
        bytes.put(region.len());
        Ok(())
    })
}

/// Makes `len` bytes from `at` on durable: on return they survive a crash, of the machine as well.
///
/// Errors: PS_ERR_DEVICE when they may not be durable; PS_ERR_RANGE when the range does not lie inside.
#[unsafe(no_mangle)]
pub extern "C" fn ps_persistent_flush(region: ps_persistent, at: usize, len: usize) -> ps_status {
    call("ps_persistent_flush", || Ok(table::find::<Persistent>(region.id, "region")?.flush(args::part(at, len)?)?))
}

/// Closes a region. Its bytes stay on the device. Calls under way are waited for.
///
/// Errors: PS_ERR_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_persistent_release(region: ps_persistent) -> ps_status {
    call("ps_persistent_release", || table::close::<Persistent>(region.id, "region").map(drop))
}
