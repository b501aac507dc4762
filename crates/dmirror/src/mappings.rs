//! Changes of the program's mappings: devices hear of them before they happen (rule G5).
//!
//! The kernel tells of a change only when it is under way, and of a change of protection not at all. So each is announced first;
//! from then until it is over no device has a translation in the range, and faults there wait.
//!
//! What the C library does to mappings by itself cannot be seen here. Of that the kernel tells; see also [`crate::heap`].

use crate::changes;
use crate::files;
use crate::world;
use peerspace_os::interpose;
use peerspace_os::linux::remap;
use std::ffi::{c_int, c_void};

/// Makes a change of a range, which is announced, if there is anybody to hear of it.
pub(crate) fn announced<T>(start: *const c_void, len: usize, change: impl FnOnce() -> T) -> T {
    let Some(world) = world::world() else { return change() };
    changes::alone(|| {
        let _announced = world.space.announce(start.cast(), len);
        change()
    })
}

/// Whether this advice takes something away.
fn discards(advice: c_int) -> bool {
    // Not all C libraries know of the last two.
    const DONTNEED_LOCKED: c_int = 24;
    const GUARD_INSTALL: c_int = 102;
    matches!(
        advice,
        libc::MADV_DONTNEED
            | libc::MADV_FREE
            | libc::MADV_REMOVE
            | libc::MADV_HWPOISON
            | libc::MADV_PAGEOUT
            | DONTNEED_LOCKED
            | GUARD_INSTALL
    )
}

interpose! {
    fn munmap(at: *mut c_void, len: usize) -> c_int, real => {
        // SAFETY: the caller's arguments, passed on; so for all below.
        announced(at, len, || unsafe { real(at, len) })
    }

    fn mprotect(at: *mut c_void, len: usize, protection: c_int) -> c_int, real => {
        // SAFETY: see above.
        announced(at, len, || unsafe { real(at, len, protection) })
    }

    fn pkey_mprotect(at: *mut c_void, len: usize, protection: c_int, key: c_int) -> c_int, real => {
        // SAFETY: see above.
        announced(at, len, || unsafe { real(at, len, protection, key) })
    }

    fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int, real => {
        // SAFETY: see above.
        let real = || unsafe { real(at, len, advice) };
        if discards(advice) { announced(at, len, real) } else { real() }
    }

    fn mmap(at: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void,
    real => {
        // SAFETY: see above.
        map(at, len, flags, fd, offset, || unsafe { real(at, len, protection, flags, fd, offset) })
    }

    fn mmap64(at: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void,
    real => {
        // SAFETY: see above.
        map(at, len, flags, fd, offset, || unsafe { real(at, len, protection, flags, fd, offset) })
    }

    fn shmdt(at: *const c_void) -> c_int, real => {
        let attached = world::world().and_then(|world| world.mapping_from(at as u64));
        let attached = attached.filter(|vma| vma.range.start.0 == at as u64);
        // SAFETY: see above.
        announced(at, attached.map_or(0, |vma| vma.range.len() as usize), || unsafe { real(at) })
    }

    // The last argument is there only with MREMAP_FIXED; it is passed on unread without.
    fn mremap(
        old: *mut c_void,
        old_len: usize,
        new_len: usize,
        flags: c_int,
        new: *mut c_void,
    ) -> *mut c_void, real => {
        // SAFETY: see above.
        let real = || unsafe { real(old, old_len, new_len, flags, new) };
        let Some(world) = world::world() else { return real() };
        // Where the kernel chooses the place, nobody has anything there. It may grow to where it is.
        let to = if flags & libc::MREMAP_FIXED != 0 { (new.cast_const().cast(), new_len) } else { (std::ptr::null(), 0) };
        changes::alone(|| {
            let _announced = world.space.announce_move((old.cast_const().cast(), old_len.max(new_len)), to);
            // What the program knows as one mapping may be several to the kernel, because parts of it are managed.
            // SAFETY: see above.
            unsafe { remap::call((old, old_len), new_len, flags, new, real) }
        })
    }
}

/// A new mapping, perhaps of a device's file, perhaps in the place of an old one.
fn map(
    at: *mut c_void,
    len: usize,
    flags: c_int,
    fd: c_int,
    offset: i64,
    real: impl FnOnce() -> *mut c_void,
) -> *mut c_void {
    let replaces = flags & libc::MAP_FIXED != 0 && flags & libc::MAP_FIXED_NOREPLACE != libc::MAP_FIXED_NOREPLACE;
    let device = flags & libc::MAP_ANONYMOUS == 0 && files::make_room(fd, offset, len);
    let done = if replaces { announced(at, len, real) } else { real() };
    if device && done != libc::MAP_FAILED {
        // The pages of such a mapping are there from the start, to be read. What cannot be is found out by whoever tries.
        const POPULATE_READ: c_int = 22;
        // SAFETY: the mapping just made; nothing in it changes.
        unsafe { libc::madvise(done, len, POPULATE_READ) };
    }
    done
}
