//! `mremap`: what the program knows as one mapping may be several to the kernel, because parts of it are managed.

use peerspace_os::interpose;
use peerspace_os::linux::remap;
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
        // SAFETY: the caller's arguments, passed on; so below.
        let real = || unsafe { real(old, old_len, new_len, flags, new) };
        if !crate::is_on() {
            return real();
        }
        // SAFETY: see above.
        unsafe { remap::call((old, old_len), new_len, flags, new, real) }
    }
}
