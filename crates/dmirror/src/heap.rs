//! Memory of the C library's heap that is given back: its own calls for that cannot be seen, and while a coherent device has
//! memory of it in place, nobody may give that back unheard (rule Z5). So what is freed leaves its place before.

use crate::mappings::announced;
use peerspace_os::interpose;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Something may be in place of a coherent device.
static IN_PLACE: AtomicBool = AtomicBool::new(false);

/// From here on, memory may be in place of a coherent device.
pub(crate) fn watch() {
    IN_PLACE.store(true, Relaxed);
}

/// Gives memory of the heap back by `real`.
fn give_back<T>(memory: *mut c_void, real: impl FnOnce() -> T) -> T {
    if memory.is_null() || !IN_PLACE.load(Relaxed) {
        return real();
    }
    // SAFETY: memory of the heap, as the caller says who gives it back.
    let len = unsafe { libc::malloc_usable_size(memory) };
    announced(memory, len, real)
}

interpose! {
    fn free(memory: *mut c_void) -> (), real => {
        // SAFETY: the caller's argument, passed on; so for all below.
        give_back(memory, || unsafe { real(memory) })
    }

    fn realloc(memory: *mut c_void, len: usize) -> *mut c_void, real => {
        // SAFETY: see above.
        give_back(memory, || unsafe { real(memory, len) })
    }

    fn reallocarray(memory: *mut c_void, count: usize, len: usize) -> *mut c_void, real => {
        // SAFETY: see above.
        give_back(memory, || unsafe { real(memory, count, len) })
    }

    fn brk(to: *mut c_void) -> c_int, real => {
        // SAFETY: asks where it is.
        let now = unsafe { libc::sbrk(0) } as usize;
        // SAFETY: see above.
        announced(to, now.saturating_sub(to as usize), || unsafe { real(to) })
    }

    fn sbrk(by: isize) -> *mut c_void, real => {
        if by >= 0 {
            // SAFETY: see above.
            return unsafe { real(by) };
        }
        // SAFETY: asks where it is.
        let now = unsafe { real(0) } as usize;
        // SAFETY: see above.
        announced((now - by.unsigned_abs()) as *const c_void, by.unsigned_abs(), || unsafe { real(by) })
    }
}
