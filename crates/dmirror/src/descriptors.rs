//! Opening a device, and what is done with its descriptors: the C library's functions for that.
//!
//! A descriptor of the space's own is not the program's to close: to it there is none of that number.

use crate::commands;
use crate::files;
use crate::pagemap;
use peerspace_os::interpose;
use peerspace_os::linux::files as own;
use peerspace_os::linux::interpose::set_errno;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};

/// The device that a path names.
fn device_of(path: *const c_char) -> Option<usize> {
    const PREFIX: &[u8] = b"/dev/hmm_dmirror";
    if path.is_null() {
        return None;
    }
    // SAFETY: a path of the caller's, a string that ends with a null; no byte behind the first that differs is looked at.
    let starts = PREFIX.iter().enumerate().all(|(i, byte)| unsafe { *path.add(i) as u8 } == *byte);
    if !starts {
        return None;
    }
    // SAFETY: as above.
    let rest = unsafe { CStr::from_ptr(path) }.to_bytes().strip_prefix(PREFIX)?;
    match rest {
        [digit @ b'0'..=b'3'] => Some((digit - b'0') as usize),
        _ => None,
    }
}

/// Opens a device for the program.
fn open_device(device: usize, flags: c_int) -> c_int {
    let opened = if flags & libc::O_DIRECTORY != 0 {
        Err(libc::ENOTDIR)
    } else if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL {
        Err(libc::EEXIST)
    } else {
        files::open(device, flags & libc::O_CLOEXEC != 0).map_err(|e| e.raw_os_error())
    };
    opened.unwrap_or_else(fail)
}

/// Opens what a path names: a device of ours, or by `real` something else.
fn opening(path: *const c_char, flags: c_int, real: impl FnOnce() -> c_int) -> c_int {
    match device_of(path) {
        Some(device) => open_device(device, flags),
        None => pagemap::opened(path, real()),
    }
}

fn fail(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

/// Carries out a request to a device; `None` if it is for something else.
fn request(fd: c_int, code: c_ulong, arg: *mut c_void) -> Option<c_int> {
    // What every file understands is the kernel's to do.
    const KERNELS: [c_ulong; 6] = [
        libc::FIOCLEX as c_ulong,
        libc::FIONCLEX as c_ulong,
        libc::FIONBIO as c_ulong,
        libc::FIOASYNC as c_ulong,
        libc::FIONREAD as c_ulong,
        0x5460, // FIOQSIZE
    ];
    if KERNELS.contains(&code) {
        return None;
    }
    let file = files::find(fd)?;
    Some(match commands::carry_out(&file, code, arg as u64) {
        Ok(()) => 0,
        Err(e) => fail(e.raw_os_error()),
    })
}

interpose! {
    // The last argument of these is there only with O_CREAT; it is passed on unread without.
    fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int, real => {
        // SAFETY: the caller's arguments, passed on; so for all below.
        opening(path, flags, || unsafe { real(path, flags, mode) })
    }

    fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(path, flags, mode) })
    }

    fn __open_2(path: *const c_char, flags: c_int) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(path, flags) })
    }

    fn __open64_2(path: *const c_char, flags: c_int) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(path, flags) })
    }

    // An absolute path does not depend on the directory.
    fn openat(at: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(at, path, flags, mode) })
    }

    fn openat64(at: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(at, path, flags, mode) })
    }

    fn __openat_2(at: c_int, path: *const c_char, flags: c_int) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(at, path, flags) })
    }

    fn __openat64_2(at: c_int, path: *const c_char, flags: c_int) -> c_int, real => {
        // SAFETY: see above.
        opening(path, flags, || unsafe { real(at, path, flags) })
    }

    // What the argument is depends on the request.
    fn ioctl(fd: c_int, code: c_ulong, arg: *mut c_void) -> c_int, real => {
        match request(fd, code, arg) {
            Some(result) => result,
            // SAFETY: see above.
            None => unsafe { real(fd, code, arg) },
        }
    }

    fn close(fd: c_int) -> c_int, real => {
        if own::is_ours(fd) {
            return fail(libc::EBADF);
        }
        files::closing(fd);
        // SAFETY: see above.
        unsafe { real(fd) }
    }

    fn dup(old: c_int) -> c_int, real => {
        // SAFETY: see above.
        let new = unsafe { real(old) };
        files::duplicated(old, new);
        new
    }

    fn dup2(old: c_int, new: c_int) -> c_int, real => {
        // SAFETY: see above.
        replacing(old, new, || unsafe { real(old, new) })
    }

    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int, real => {
        // SAFETY: see above.
        replacing(old, new, || unsafe { real(old, new, flags) })
    }

    fn fcntl(fd: c_int, what: c_int, arg: *mut c_void) -> c_int, real => {
        // SAFETY: see above.
        controlled(fd, what, unsafe { real(fd, what, arg) })
    }

    fn fcntl64(fd: c_int, what: c_int, arg: *mut c_void) -> c_int, real => {
        // SAFETY: see above.
        controlled(fd, what, unsafe { real(fd, what, arg) })
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int, real => {
        // Those flags leave them open.
        if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
            files::closing_all(first, last);
        }
        // SAFETY: see above; ours are spared.
        own::around_ours(first, last, |first, last| unsafe { real(first, last, flags) })
    }

    fn closefrom(first: c_int) -> (), real => {
        // SAFETY: ours, which spares the descriptors of the space.
        unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
    }
}

/// Makes `new` what `old` is by `real`.
fn replacing(old: c_int, new: c_int, real: impl FnOnce() -> c_int) -> c_int {
    if own::is_ours(new) {
        return fail(libc::EBADF);
    }
    let done = real();
    if done >= 0 && old != new {
        files::closing(new);
        files::duplicated(old, new);
    }
    done
}

/// `done` is what came of a request of `fcntl`.
fn controlled(fd: c_int, what: c_int, done: c_int) -> c_int {
    if matches!(what, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        files::duplicated(fd, done);
    }
    done
}
