//! Managed memory by its addresses, whether of regions or adopted: access with errors instead of signals, copies, pins,
//! prefetches, sole access (rules Z8, Z9, G8, G14, H5).

use crate::args::{self, Out};
use crate::error::{Failure, Inside, call, call_from, ps_status};
use crate::region::{node_of, use_of};
use crate::space::{SpaceEntry, ps_device, ps_space, true_device_of};
use crate::table;
use peerspace::{Prefetch, Resident, Use};
use peerspace_os::own::Shared;
use std::ffi::{c_int, c_void};

/// Pages that are kept resident.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_pin {
    /// A handle; 0 is none.
    pub id: u64,
}

/// A prefetch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_prefetch {
    /// A handle; 0 is none.
    pub id: u64,
}

/// Both ends of a copy between managed memory and a buffer. They must not overlap: a page of the one is kept while the other
/// is accessed.
fn ends<T, U>((start, name): (*const T, &str), (buffer, other): (*const U, &str), len: usize) -> Result<(), Failure> {
    args::memory(start, len, name)?;
    args::memory(buffer, len, other)?;
    let (a, b) = (start.addr(), buffer.addr());
    if a < b + len && b < a + len {
        let why = format!("{len} bytes at {name} ({a:#x}) and at {other} ({b:#x}) overlap");
        return Err(Failure::new(ps_status::PS_ERR_RANGE, why));
    }
    Ok(())
}

/// Copies `len` bytes of managed memory at `from` to `to`. What a plain access says by SIGBUS, this says by an error.
///
/// Errors: PS_ERR_LOST if one of the pages cannot be had back from its device (rule Z9), with the address: what comes before it is
/// copied; PS_ERR_RANGE where `from` is not managed by the space, or the ranges overlap; PS_ERR_KERNEL.
///
/// # Safety
/// `to` is null, or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_read(space: ps_space, from: *const c_void, to: *mut c_void, len: usize) -> ps_status {
    call("ps_read", || {
        if len == 0 {
            return Ok(());
        }
        ends((from, "from"), (to, "to"), len)?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let mut to = to.cast::<u8>();
        let copy = |piece: *mut u8, n| {
            // SAFETY: the piece is memory of the process, which is kept meanwhile; the caller's promise for the rest. The two do
            // not overlap.
            unsafe {
                to.copy_from_nonoverlapping(piece, n);
                to = to.add(n);
            }
        };
        Ok(entry.space.with_held(from.cast(), len, Use::Read, copy)?)
    })
}

/// Copies `len` bytes at `from` to managed memory at `to`. What a plain access says by SIGBUS, this says by an error.
///
/// Errors: as for ps_read; a lost page of which all is to be written is discarded first, by ps_region_discard.
///
/// # Safety
/// `from` is null, or leads to `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_write(space: ps_space, to: *mut c_void, from: *const c_void, len: usize) -> ps_status {
    call("ps_write", || {
        if len == 0 {
            return Ok(());
        }
        ends((to.cast_const(), "to"), (from, "from"), len)?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let mut from = from.cast::<u8>();
        let copy = |piece: *mut u8, n| {
            // SAFETY: as in `ps_read`; the piece may be written.
            unsafe {
                piece.copy_from_nonoverlapping(from, n);
                from = from.add(n);
            }
        };
        Ok(entry.space.with_held(to.cast_const().cast(), len, Use::Write, copy)?)
    })
}

/// Copies `len` bytes of managed memory, wherever both ends are: what is on devices stays there, and goes from one to the other
/// without the host where they can (rule G8). Nobody may use the destination meanwhile, nor write to either end.
///
/// Errors: PS_ERR_RANGE where the two overlap, or one is not managed by the space; PS_ERR_LOST. What comes before is copied then.
#[unsafe(no_mangle)]
pub extern "C" fn ps_copy(space: ps_space, to: *mut c_void, from: *const c_void, len: usize) -> ps_status {
    call("ps_copy", || {
        if len == 0 {
            return Ok(());
        }
        args::memory(to, len, "to")?;
        args::memory(from, len, "from")?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        // SAFETY: C refers to memory by pointers alone; that nobody uses it now is its promise.
        Ok(unsafe { entry.space.copy(to.cast(), from.cast(), len) }?)
    })
}

/// Gives a device sole access to the pages that `len` bytes at `start` touch, for atomic operations of its code (rule G14): they
/// move there and are mapped. Any access of the CPU or of another device ends it, page by page.
///
/// Errors: PS_ERR_MIGRATE with the first page that cannot go: what comes before has gone; PS_ERR_DEVICE for a device that runs no
/// code; PS_ERR_RANGE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_exclusive(space: ps_space, start: *mut c_void, len: usize, device: ps_device) -> ps_status {
    call("ps_exclusive", || {
        args::memory(start, len, "start")?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        Ok(entry.space.exclusive(start.cast(), len, true_device_of(space.id, device)?)?)
    })
}

/// Brings the pages that `len` bytes at `start` touch into RAM, permits `how` (an enum ps_use), and keeps them so until the pin is
/// released (rules Z8, H5): before memory is handed to a system call where faults are delivered by signal, or to hardware.
///
/// Errors: PS_ERR_PINNED beyond the limit of the space; PS_ERR_LOST; PS_ERR_RANGE where one is not managed by the space;
/// PS_ERR_KERNEL. Nothing is kept then.
///
/// # Safety
/// `pin` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_pin_create(
    space: ps_space,
    start: *const c_void,
    len: usize,
    how: u32,
    pin: *mut ps_pin,
) -> ps_status {
    call("ps_pin_create", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(pin, "pin") }?;
        args::memory(start, len, "start")?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let held = entry.space.make_resident(start.cast(), len, use_of(how)?)?;
        out.put(ps_pin { id: table::open(held)? });
        Ok(())
    })
}

/// Lets pages go that were kept resident.
///
/// Errors: PS_ERR_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_pin_release(pin: ps_pin) -> ps_status {
    call("ps_pin_release", || table::close::<Resident>(pin.id, "pin").map(drop))
}

/// Has managed memory sent to where it is going to be used, by a thread of the space; returns at once. The range is rounded out to
/// blocks, as far as they are managed (rule G8). PS_HOST is RAM.
///
/// Errors: PS_ERR_DEVICE for a device that runs no code; PS_ERR_RANGE.
///
/// # Safety
/// `prefetch` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_prefetch_create(
    space: ps_space,
    start: *const c_void,
    len: usize,
    to: ps_device,
    prefetch: *mut ps_prefetch,
) -> ps_status {
    call("ps_prefetch_create", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(prefetch, "prefetch") }?;
        args::memory(start, len, "start")?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let begun = entry.space.prefetch(start.cast(), len, node_of(space.id, to)?)?;
        out.put(ps_prefetch { id: table::open(Shared::new(begun))? });
        Ok(())
    })
}

/// Whether a prefetch is over: `done` gets 1 or 0.
///
/// # Safety
/// `done` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_prefetch_is_done(prefetch: ps_prefetch, done: *mut c_int) -> ps_status {
    call_from(Inside::Work, "ps_prefetch_is_done", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(done, "done") }?;
        out.put(table::find::<Shared<Prefetch>>(prefetch.id, "prefetch")?.is_done().into());
        Ok(())
    })
}

/// Ends a prefetch as soon as may be; what has gone stays there.
#[unsafe(no_mangle)]
pub extern "C" fn ps_prefetch_cancel(prefetch: ps_prefetch) -> ps_status {
    call("ps_prefetch_cancel", || {
        table::find::<Shared<Prefetch>>(prefetch.id, "prefetch")?.cancel();
        Ok(())
    })
}

/// Waits until a prefetch is over. `bytes` gets how many are where they were sent.
///
/// Errors: PS_ERR_MIGRATE says the first page that could not go, and why: all others have gone, and it is where it was.
///
/// # Safety
/// `bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_prefetch_wait(prefetch: ps_prefetch, bytes: *mut usize) -> ps_status {
    call("ps_prefetch_wait", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        // A reference of its own: whoever releases the handle meanwhile need not wait as long.
        let begun = (*table::find::<Shared<Prefetch>>(prefetch.id, "prefetch")?).clone();
        out.put(begun.wait()?);
        Ok(())
    })
}

/// Releases the handle of a prefetch, which goes on.
///
/// Errors: PS_ERR_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn ps_prefetch_release(prefetch: ps_prefetch) -> ps_status {
    call("ps_prefetch_release", || table::close::<Shared<Prefetch>>(prefetch.id, "prefetch").map(drop))
}
