//! `close` and its kind, where faults come by signal: the faulting threads are the program's, so our descriptors are in
//! its table, and a program that closes what it did not open must not close them. Where faults come to threads, ours
//! are in a table of their own and all of this passes straight on.

use crate::by_signal;
use peerspace_os::interpose;
use peerspace_os::linux::files;
use peerspace_os::linux::interpose::set_errno;
use std::ffi::{c_int, c_uint};

fn spare(fd: c_int) -> bool {
    by_signal() && files::is_ours(fd)
}

fn bad_descriptor() -> c_int {
    set_errno(libc::EBADF);
    -1
}

interpose! {
    fn close(fd: c_int) -> c_int, real => {
        // To the program the descriptor does not exist.
        if spare(fd) {
            return bad_descriptor();
        }
        // SAFETY: passed on.
        unsafe { real(fd) }
    }

    fn dup2(from: c_int, to: c_int) -> c_int, real => {
        if spare(to) {
            // The program insists on the number: nothing else can be given for it.
            return bad_descriptor();
        }
        // SAFETY: passed on.
        unsafe { real(from, to) }
    }

    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int, real => {
        if spare(to) {
            return bad_descriptor();
        }
        // SAFETY: passed on.
        unsafe { real(from, to, flags) }
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int, real => {
        if !by_signal() {
            // SAFETY: passed on.
            return unsafe { real(first, last, flags) };
        }
        // They close on exec anyway, so flags that say so need no care.
        // SAFETY: the caller's range, without ours.
        files::around_ours(first, last, |first, last| unsafe { real(first, last, flags) })
    }

    fn closefrom(first: c_int) -> (), real => {
        if !by_signal() {
            // SAFETY: passed on.
            return unsafe { real(first) };
        }
        // SAFETY: ours, which spares our descriptors.
        unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
    }
}
