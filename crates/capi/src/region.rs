//! Regions: memory of a space (rules G3, G7, H3), and hints about memory (rule G8).

use crate::args::{self, Out};
use crate::error::{Failure, Inside, call, call_from, ps_status};
use crate::space::{SpaceEntry, device_of, ps_device, ps_space, true_device_of};
use crate::table::{self, Of};
use peerspace::{Hint, Node, Region, Use};
use peerspace_os::own::Shared;
use std::ffi::c_void;

/// Memory of a space. It begins as zeros, and takes up RAM only where it is used.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_region {
    /// A handle; 0 is none.
    pub id: u64,
}

/// How memory is going to be used.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_hint {
    /// Nothing is known: small pages at first, and huge folios where faults show a stream.
    PS_HINT_NORMAL = 0,
    /// Most of it will be used, and neighbours together: huge folios from the first fault on.
    PS_HINT_DENSE = 1,
    /// Single pages here and there: never huge folios.
    PS_HINT_SPARSE = 2,
    /// Small pages, and huge folios only where ps_region_collapse makes them.
    PS_HINT_ON_REQUEST = 3,
    /// Read far more often than written: devices that read it get copies, all of which go when anybody writes.
    PS_HINT_READ_MOSTLY = 4,
    /// Takes PS_HINT_READ_MOSTLY back.
    PS_HINT_NOT_READ_MOSTLY = 5,
    /// The data had best be on the device that is named with the hint, or in RAM for PS_HOST.
    PS_HINT_PREFER = 6,
    /// Takes PS_HINT_PREFER back.
    PS_HINT_NO_PREFERENCE = 7,
    /// The device that is named with the hint accesses the memory of the host in place.
    PS_HINT_ACCESSED_BY = 8,
    /// Takes PS_HINT_ACCESSED_BY back for that device.
    PS_HINT_NOT_ACCESSED_BY = 9,
}

/// What an access may do.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_use {
    /// The memory is only read.
    PS_USE_READ = 0,
    /// It is written, or read and written.
    PS_USE_WRITE = 1,
}

pub(crate) fn use_of(number: u32) -> Result<Use, Failure> {
    args::choice(number, &[Use::Read, Use::Write], "how")
}

/// The place that is meant by a device or PS_HOST.
pub(crate) fn node_of(space: u64, device: ps_device) -> Result<Node, Failure> {
    Ok(device_of(space, device)?.map_or(Node::Host, Node::Device))
}

/// The hint that is meant, for memory of the space with this handle.
pub(crate) fn hint_of(number: u32, space: u64, device: ps_device) -> Result<Hint, Failure> {
    let plain = match number {
        0 => Hint::Normal,
        1 => Hint::Dense,
        2 => Hint::Sparse,
        3 => Hint::OnRequest,
        4 => Hint::ReadMostly(true),
        5 => Hint::ReadMostly(false),
        6 => return Ok(Hint::Prefer(Some(node_of(space, device)?))),
        7 => Hint::Prefer(None),
        8 | 9 => return Ok(Hint::AccessedBy(true_device_of(space, device)?, number == 8)),
        _ => return Err(Failure::argument(format_args!("hint is {number}, and there is none of that number"))),
    };
    if device.id != 0 {
        return Err(Failure::argument(format_args!(
            "device: hint {number} is about no device, so it is to be PS_HOST"
        )));
    }
    Ok(plain)
}

fn find(region: ps_region) -> Result<table::Held<Of<Region>>, Failure> {
    table::find(region.id, "region")
}

/// Makes a region of at least `bytes` bytes, in whole blocks of ps_block_size(): zeros, none of them in RAM yet. Takes the same
/// time for any size. Where it is, ps_region_memory says.
///
/// Errors: PS_ERR_RANGE for no bytes, or more than there are addresses; PS_ERR_KERNEL.
///
/// # Safety
/// `region` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_region_create(space: ps_space, bytes: u64, region: *mut ps_region) -> ps_status {
    call("ps_region_create", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(region, "region") }?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let it = entry.space.region(bytes)?;
        out.put(ps_region { id: table::open(Of { it, space: space.id })? });
        Ok(())
    })
}

/// Gives a region and its memory back. Nobody may use the memory any more. Calls under way are waited for.
///
/// Errors: PS_ERR_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_release(region: ps_region) -> ps_status {
    call("ps_region_release", || table::close::<Of<Region>>(region.id, "region").map(drop))
}

/// Where a region is, and how many bytes it has. Takes a few nanoseconds. Its memory is used like any other, by every thread.
///
/// # Safety
/// `start` and `len` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_region_memory(region: ps_region, start: *mut *mut c_void, len: *mut usize) -> ps_status {
    call_from(Inside::Work, "ps_region_memory", || {
        // SAFETY: the caller's promise, here and below.
        let at = unsafe { Out::new(start, "start") }?;
        // SAFETY: as above.
        let bytes = unsafe { Out::new(len, "len") }?;
        let region = find(region)?;
        at.put(region.it.as_ptr().cast());
        bytes.put(region.it.len());
        Ok(())
    })
}

/// Says how a region is going to be used; `hint` is an enum ps_hint, `device` the one it is about, or PS_HOST. What is in RAM
/// already stays as it is.
///
/// Errors: PS_ERR_ARGUMENT; PS_ERR_DEVICE for a device that runs no code; PS_ERR_RANGE when the space has as many regions as it
/// can have.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_advise(region: ps_region, hint: u32, device: ps_device) -> ps_status {
    call("ps_region_advise", || {
        let region = find(region)?;
        Ok(region.it.advise(hint_of(hint, region.space, device)?)?)
    })
}

/// Says what devices may do with whole pages of a region: with PS_USE_READ a write of a device is an error (rule G4). The CPU may
/// write as before. `how` is an enum ps_use.
///
/// Errors: PS_ERR_RANGE when the `len` bytes from `at` on do not lie inside.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_allow_devices(region: ps_region, at: usize, len: usize, how: u32) -> ps_status {
    call("ps_region_allow_devices", || Ok(find(region)?.it.allow_devices(args::part(at, len)?, use_of(how)?)?))
}

/// Forgets the content of every page that lies wholly inside `len` bytes from `at` on (rule G8); it reads as zeros. Lost pages
/// become usable again. Nobody may use these bytes meanwhile. Takes no transfer.
///
/// Errors: PS_ERR_RANGE when the range does not lie inside.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_discard(region: ps_region, at: usize, len: usize) -> ps_status {
    call("ps_region_discard", || {
        // SAFETY: what C does with the memory it does by pointers; that nobody uses it now is its promise.
        Ok(unsafe { find(region)?.it.discard_shared(args::part(at, len)?) }?)
    })
}

/// Makes huge folios of the blocks that lie wholly inside `len` bytes from `at` on, now (rule H3). `huge_bytes` gets how many
/// bytes of them are huge then; the rest stays in small pages, because somebody relies on where they are, or there is no huge
/// page to be had.
///
/// Errors: PS_ERR_RANGE when the range does not lie inside, or the hint PS_HINT_SPARSE was given.
///
/// # Safety
/// `huge_bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_region_collapse(
    region: ps_region,
    at: usize,
    len: usize,
    huge_bytes: *mut usize,
) -> ps_status {
    call("ps_region_collapse", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(huge_bytes, "huge_bytes") }?;
        out.put(find(region)?.it.collapse(args::part(at, len)?)?);
        Ok(())
    })
}

/// Sets aside the pages that lie wholly inside `len` bytes from `at` on, because they will not be needed soon: they are the first
/// to leave RAM, and a use takes them back without input as long as they have not. `bytes` gets how many were set aside.
///
/// Errors: PS_ERR_RANGE when the range does not lie inside.
///
/// # Safety
/// `bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_region_cold(region: ps_region, at: usize, len: usize, bytes: *mut usize) -> ps_status {
    call("ps_region_cold", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.put(find(region)?.it.cold(args::part(at, len)?)?);
        Ok(())
    })
}

/// Migrates the blocks that lie wholly inside `len` bytes from `at` on to a device, or home to RAM for PS_HOST, while other threads
/// go on to use them (rules Z5, G8). `bytes` gets how many are there then; the rest is kept resident, or in use without pause.
///
/// On a coherent device they are used in place from then on; from a private one the next access brings them home.
///
/// Errors: PS_ERR_MIGRATE with the first block that cannot go, and why: what comes before has gone; PS_ERR_LOST; PS_ERR_RANGE when
/// the range does not lie inside.
///
/// # Safety
/// `bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_region_migrate(
    region: ps_region,
    at: usize,
    len: usize,
    device: ps_device,
    bytes: *mut usize,
) -> ps_status {
    call("ps_region_migrate", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        let region = find(region)?;
        let part = args::part(at, len)?;
        out.put(match device_of(region.space, device)? {
            Some(device) => region.it.migrate_to(part, device)?,
            None => region.it.migrate_home(part)?,
        });
        Ok(())
    })
}
