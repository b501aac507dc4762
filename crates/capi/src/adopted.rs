//! Memory that the program got elsewhere, managed by a space (rules G1, G11).

use crate::args::{self, Out};
use crate::error::{Inside, call, call_from, ps_status};
use crate::region::hint_of;
use crate::space::{SpaceEntry, ps_device, ps_space};
use crate::table::{self, Of};
use peerspace::Adopted;
use peerspace_os::own::Shared;
use std::ffi::c_void;

/// Memory that the program got elsewhere, and that a space manages.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_adopted {
    /// A handle; 0 is none.
    pub id: u64,
}

type Taken = Of<Adopted>;

/// Manages memory that the program already has, from now on: the whole pages of `len` bytes from `start` (rule G1). Nothing moves
/// before memory is scarce or a device wants it, every pointer stays good, and the program goes on to own the memory: it may unmap,
/// move, discard, protect and fork as it likes.
///
/// Private anonymous memory takes part in everything. All else (shared memory, mappings of files, huge pages of the kernel's pool,
/// executable memory, the page in which an arena of the C library's heap begins) stays where it is: devices with PS_MMU_REMOTE use
/// it in place, others cannot (rule G11).
///
/// Not to be adopted: stacks, thread-local storage, and whatever devices and handlers of signals use.
///
/// Errors: PS_ERR_RANGE for a range that is empty, wraps, is not wholly mapped, is managed already, belongs to this library, or is
/// a stack or memory of the kernel's own; PS_ERR_KERNEL. Nothing is changed then.
///
/// # Safety
/// `adopted` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_adopt(
    space: ps_space,
    start: *mut c_void,
    len: usize,
    adopted: *mut ps_adopted,
) -> ps_status {
    call("ps_adopt", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(adopted, "adopted") }?;
        args::memory(start, len, "start")?;
        let entry = table::find::<Shared<SpaceEntry>>(space.id, "space")?;
        let it = entry.space.adopt(start.cast(), len)?;
        out.put(ps_adopted { id: table::open(Of { it, space: space.id })? });
        Ok(())
    })
}

/// Brings everything home, beyond the budget if need be, and gives the memory back to the kernel's care. Calls under way are
/// waited for.
///
/// Errors: PS_ERR_KERNEL when the kernel refuses: the memory is managed for as long as the process lives then. The handle is
/// released all the same.
#[unsafe(no_mangle)]
pub extern "C" fn ps_adopted_release(adopted: ps_adopted) -> ps_status {
    call("ps_adopted_release", || Ok(table::close::<Taken>(adopted.id, "adopted")?.it.release()?))
}

/// The addresses that are managed: whole pages.
///
/// # Safety
/// `start` and `len` are null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_adopted_memory(
    adopted: ps_adopted,
    start: *mut *mut c_void,
    len: *mut usize,
) -> ps_status {
    call_from(Inside::Work, "ps_adopted_memory", || {
        // SAFETY: the caller's promise, here and below.
        let at = unsafe { Out::new(start, "start") }?;
        // SAFETY: as above.
        let bytes = unsafe { Out::new(len, "len") }?;
        let range = table::find::<Taken>(adopted.id, "adopted")?.it.range();
        at.put(std::ptr::without_provenance_mut(range.start));
        bytes.put(range.len());
        Ok(())
    })
}

/// Says how adopted memory is going to be used, as ps_region_advise does.
#[unsafe(no_mangle)]
pub extern "C" fn ps_adopted_advise(adopted: ps_adopted, hint: u32, device: ps_device) -> ps_status {
    call("ps_adopted_advise", || {
        let adopted = table::find::<Taken>(adopted.id, "adopted")?;
        Ok(adopted.it.advise(hint_of(hint, adopted.space, device)?)?)
    })
}

/// Makes huge folios of the blocks that lie wholly inside adopted memory, as ps_region_collapse does.
///
/// # Safety
/// `huge_bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_adopted_collapse(adopted: ps_adopted, huge_bytes: *mut usize) -> ps_status {
    call("ps_adopted_collapse", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(huge_bytes, "huge_bytes") }?;
        out.put(table::find::<Taken>(adopted.id, "adopted")?.it.collapse()?);
        Ok(())
    })
}

/// Sets adopted memory aside, as ps_region_cold does.
///
/// # Safety
/// `bytes` is null or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_adopted_cold(adopted: ps_adopted, bytes: *mut usize) -> ps_status {
    call("ps_adopted_cold", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(bytes, "bytes") }?;
        out.put(table::find::<Taken>(adopted.id, "adopted")?.it.cold());
        Ok(())
    })
}
