//! The page map of the process (`/proc/self/pagemap`): of a page that is on a device it says what the kernel says of one on its
//! own devices, that it is swapped out.

use crate::device::PAGE;
use crate::files;
use crate::world::{World, world};
use peerspace::Residence;
use peerspace_os::interpose;
use std::ffi::{CStr, c_char, c_int, c_void};

/// The bits of an entry that say that the page is there, and that it is swapped out.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Whether a path names the page map of this process.
fn is_page_map(path: &CStr) -> bool {
    let Some(of) = path.to_bytes().strip_prefix(b"/proc/").and_then(|rest| rest.strip_suffix(b"/pagemap")) else {
        return false;
    };
    let process = rustix::process::getpid().as_raw_nonzero().get();
    of == b"self" || of == b"thread-self" || std::str::from_utf8(of).is_ok_and(|of| of.parse() == Ok(process))
}

/// The program has opened `path`, or not, by the result.
pub(crate) fn opened(path: *const c_char, fd: c_int) -> c_int {
    // SAFETY: a path of the caller's, a string that ends with a null, since the kernel has taken it.
    if fd >= 0 && is_page_map(unsafe { CStr::from_ptr(path) }) {
        files::note_page_map(fd);
    } else {
        // What had this number may have been closed unseen.
        files::closing(fd);
    }
    fd
}

/// What was read of a page map is completed: `len` bytes at `to`, from `offset` on.
///
/// # Safety
/// The bytes have just been read there for the program.
unsafe fn complete(world: &World, to: *mut c_void, len: usize, offset: i64) {
    let Ok(offset) = u64::try_from(offset) else { return };
    if !offset.is_multiple_of(8) {
        return;
    }
    let entries = len / 8;
    let start = (offset / 8).saturating_mul(PAGE);
    let Ok(pages) = world.space.pages(start as *const u8, entries * PAGE as usize) else { return };
    let away = |residence| matches!(residence, Residence::Device { .. });
    for (nth, _) in pages.enumerate().filter(|(_, view)| away(view.residence)) {
        let at = to.cast::<u64>().wrapping_add(nth);
        // SAFETY: inside of what was read, says the caller; it may not be aligned.
        unsafe {
            let entry = at.read_unaligned();
            if entry & PRESENT == 0 {
                at.write_unaligned(entry | SWAPPED);
            }
        }
    }
}

/// Completes what a read at the file's own position has read.
///
/// # Safety
/// As for [`complete`].
unsafe fn read_on(fd: c_int, to: *mut c_void, done: isize) -> isize {
    if done > 0
        && files::is_page_map(fd)
        && let Some(world) = world()
    {
        // SAFETY: a number of the caller's.
        let end = unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) };
        // SAFETY: the caller's.
        unsafe { complete(world, to, done as usize, end - done as i64) };
    }
    done
}

/// Completes what a read at `offset` has read.
///
/// # Safety
/// As for [`complete`].
unsafe fn read_at(fd: c_int, to: *mut c_void, done: isize, offset: i64) -> isize {
    if done > 0
        && files::is_page_map(fd)
        && let Some(world) = world()
    {
        // SAFETY: the caller's.
        unsafe { complete(world, to, done as usize, offset) };
    }
    done
}

interpose! {
    fn read(fd: c_int, to: *mut c_void, len: usize) -> isize, real => {
        // SAFETY: the caller's arguments, passed on; so for all below.
        unsafe { read_on(fd, to, real(fd, to, len)) }
    }

    fn __read_chk(fd: c_int, to: *mut c_void, len: usize, room: usize) -> isize, real => {
        // SAFETY: see above.
        unsafe { read_on(fd, to, real(fd, to, len, room)) }
    }

    fn pread(fd: c_int, to: *mut c_void, len: usize, offset: i64) -> isize, real => {
        // SAFETY: see above.
        unsafe { read_at(fd, to, real(fd, to, len, offset), offset) }
    }

    fn pread64(fd: c_int, to: *mut c_void, len: usize, offset: i64) -> isize, real => {
        // SAFETY: see above.
        unsafe { read_at(fd, to, real(fd, to, len, offset), offset) }
    }

    fn __pread_chk(fd: c_int, to: *mut c_void, len: usize, offset: i64, room: usize) -> isize, real => {
        // SAFETY: see above.
        unsafe { read_at(fd, to, real(fd, to, len, offset, room), offset) }
    }

    fn __pread64_chk(fd: c_int, to: *mut c_void, len: usize, offset: i64, room: usize) -> isize, real => {
        // SAFETY: see above.
        unsafe { read_at(fd, to, real(fd, to, len, offset, room), offset) }
    }
}
