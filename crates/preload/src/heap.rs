//! How the C library's heap grows.
//!
//! Memory is managed from the moment when the keeper takes note of it. A heap that grows by 132 KiB at a time, as it does
//! by default, is one new mapping after the other, each of them full before anybody looks: a program that does nothing but fill
//! memory is ahead of the keeper all the time, whatever its budget. Growing in larger steps, most of what is new is taken in hand
//! while it is empty, and from then on the program faults at the pace at which others leave.
//!
//! To say so ends the C library's own choice of what it maps alone. That is fixed where it ends up by itself in programs
//! that use large blocks again and again; they stay in the heap then, and are not unmapped, which we would have to be told of.

use std::ffi::CStr;

/// How much the heap grows by, at least.
const STEP: i32 = 32 << 20;
/// Blocks below this come from the heap: the most that the C library allows.
const LARGE: i32 = 32 << 20;

/// Whether `name`, a variable of the environment, has a say of its own about the heap.
fn is_about_the_heap(name: &[u8]) -> bool {
    let ours =
        [&b"MALLOC_TOP_PAD_="[..], b"MALLOC_MMAP_THRESHOLD_=", b"MALLOC_TRIM_THRESHOLD_=", b"MALLOC_MMAP_MAX_="];
    let tunables = name.starts_with(b"GLIBC_TUNABLES=") && name.windows(12).any(|w| w == b"glibc.malloc");
    tunables || ours.iter().any(|n| name.starts_with(n))
}

/// Has the heap grow in large steps, unless the environment says something else. Other allocators than the C library's do not
/// listen.
pub(crate) fn grow_in_large_steps<'a>(mut environment: impl Iterator<Item = &'a CStr>) {
    if environment.any(|variable| is_about_the_heap(variable.to_bytes())) {
        return;
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: numbers for the allocator. Refusal leaves it as it is.
    unsafe {
        libc::mallopt(libc::M_TOP_PAD, STEP);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * LARGE);
    }
}
