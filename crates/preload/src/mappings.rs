//! `mremap`: what the program knows as one mapping may be several to the kernel, because parts of it are managed.

use peerspace_core::addr::{Va, VaRange};
use peerspace_os::interpose;
use peerspace_os::linux::remap::Request;
use std::ffi::{c_int, c_void};

interpose! {
    // The last argument is there only with MREMAP_FIXED; it is passed on unread without.
    fn mremap(
        old: *mut c_void,
        old_len: usize,
        new_len: usize,
        flags: c_int,
        new: *mut c_void,
    ) -> *mut c_void, real => {
        // SAFETY: the caller's arguments, passed on.
        let done = unsafe { real(old, old_len, new_len, flags, new) };
        // SAFETY: errno of the calling thread, here and below.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: see above.
        if done != libc::MAP_FAILED || !crate::is_on() || unsafe { *errno } != libc::EFAULT {
            return done;
        }
        // SAFETY: the caller's arguments.
        match unsafe { in_pieces(old, old_len, new_len, flags, new) } {
            Some(Ok(at)) => at,
            Some(Err(code)) => {
                // SAFETY: see above.
                unsafe { *errno = code };
                done
            }
            None => done,
        }
    }
}

/// What the kernel refused with EFAULT; `None` if it was right to.
unsafe fn in_pieces(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> Option<Result<*mut c_void, c_int>> {
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let round = |len: usize| len.checked_next_multiple_of(page).filter(|len| *len > 0).map(|len| len as u64);
    let known = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    if flags & !known != 0 {
        return None;
    }
    let request = Request {
        from: VaRange::new(Va(old as u64), round(old_len)?)?,
        len: round(new_len)?,
        to: (flags & libc::MREMAP_FIXED != 0).then_some(Va(new as u64)),
        may_move: flags & libc::MREMAP_MAYMOVE != 0,
        stays: flags & libc::MREMAP_DONTUNMAP != 0,
    };
    // SAFETY: the caller's ranges, as in the call that was refused.
    match unsafe { request.carry_out() } {
        Ok(at) => Some(Ok(at.0 as *mut c_void)),
        Err(e) => Some(Err(e.raw_os_error())),
    }
}
