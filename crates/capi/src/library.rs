//! The library itself: its version, its units, and its handler of signals.

use std::ffi::{c_char, c_int, c_void};

/// The version of the library. Never null; good for ever.
#[unsafe(no_mangle)]
pub extern "C" fn ps_version() -> *const c_char {
    const VERSION: &[u8] = concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes();
    VERSION.as_ptr().cast()
}

/// Bytes of a page: what devices number, and what migrates.
#[unsafe(no_mangle)]
pub extern "C" fn ps_page_size() -> usize {
    rustix::param::page_size()
}

/// Bytes of a block: what a huge folio has, and regions are made of. 2 MiB where pages have 4 KiB.
#[unsafe(no_mangle)]
pub extern "C" fn ps_block_size() -> usize {
    512 * rustix::param::page_size()
}

/// For a handler of SIGBUS that was installed after the first space was made, with the arguments it got: returns 1 if a space has
/// resolved the fault, so that the access can be repeated, and 0 if it is the program's own business.
///
/// # Safety
/// To be called from a handler of SIGBUS that was installed with SA_SIGINFO; `info` and `context` are what it got.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_forward_sigbus(info: *const c_void, context: *const c_void) -> c_int {
    if info.is_null() || context.is_null() {
        return 0;
    }
    // SAFETY: the caller's promise.
    unsafe { peerspace::forward_sigbus(info.cast(), context) }.into()
}
