//! System calls with buffers, where faults come by signal: the kernel finds EFAULT where a page is missing, so the
//! buffers are made resident first. This covers what programs call directly; what the C library calls inside itself
//! (its streams, say) cannot be covered, which is why delivery by threads is the default.

use crate::by_signal;
use peerspace::process::{Kept, hold};
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::interpose;
use std::ffi::{c_int, c_void};

fn buffer(start: *const c_void, len: usize, write: bool) -> Option<Kept> {
    (by_signal() && len > 0)
        .then(|| VaRange::new(Va(start as u64), len as u64).map(|range| hold(range, write)))
        .flatten()
}

/// The vector itself and everything it points to.
///
/// # Safety
/// `vector` points to `n` entries.
unsafe fn buffers(vector: *const libc::iovec, n: c_int, write: bool) -> Vec<Option<Kept>> {
    if !by_signal() || vector.is_null() || n <= 0 {
        return Vec::new();
    }
    let mut kept = vec![buffer(vector.cast(), n as usize * size_of::<libc::iovec>(), false)];
    for i in 0..n as usize {
        // SAFETY: by contract.
        let entry = unsafe { vector.add(i).read() };
        kept.push(buffer(entry.iov_base, entry.iov_len, write));
    }
    kept
}

interpose! {
    fn read(fd: c_int, to: *mut c_void, len: usize) -> isize, real => {
        let _kept = buffer(to, len, true);
        // SAFETY: passed on, here and below.
        unsafe { real(fd, to, len) }
    }

    fn write(fd: c_int, from: *const c_void, len: usize) -> isize, real => {
        let _kept = buffer(from, len, false);
        // SAFETY: passed on.
        unsafe { real(fd, from, len) }
    }

    fn pread(fd: c_int, to: *mut c_void, len: usize, at: libc::off_t) -> isize, real => {
        let _kept = buffer(to, len, true);
        // SAFETY: passed on.
        unsafe { real(fd, to, len, at) }
    }

    fn pread64(fd: c_int, to: *mut c_void, len: usize, at: libc::off64_t) -> isize, real => {
        let _kept = buffer(to, len, true);
        // SAFETY: passed on.
        unsafe { real(fd, to, len, at) }
    }

    fn pwrite(fd: c_int, from: *const c_void, len: usize, at: libc::off_t) -> isize, real => {
        let _kept = buffer(from, len, false);
        // SAFETY: passed on.
        unsafe { real(fd, from, len, at) }
    }

    fn pwrite64(fd: c_int, from: *const c_void, len: usize, at: libc::off64_t) -> isize, real => {
        let _kept = buffer(from, len, false);
        // SAFETY: passed on.
        unsafe { real(fd, from, len, at) }
    }

    fn readv(fd: c_int, vector: *const libc::iovec, n: c_int) -> isize, real => {
        // SAFETY: the caller's vector.
        let _kept = unsafe { buffers(vector, n, true) };
        // SAFETY: passed on.
        unsafe { real(fd, vector, n) }
    }

    fn writev(fd: c_int, vector: *const libc::iovec, n: c_int) -> isize, real => {
        // SAFETY: the caller's vector.
        let _kept = unsafe { buffers(vector, n, false) };
        // SAFETY: passed on.
        unsafe { real(fd, vector, n) }
    }

    fn recv(fd: c_int, to: *mut c_void, len: usize, flags: c_int) -> isize, real => {
        let _kept = buffer(to, len, true);
        // SAFETY: passed on.
        unsafe { real(fd, to, len, flags) }
    }

    fn send(fd: c_int, from: *const c_void, len: usize, flags: c_int) -> isize, real => {
        let _kept = buffer(from, len, false);
        // SAFETY: passed on.
        unsafe { real(fd, from, len, flags) }
    }

    fn recvfrom(
        fd: c_int,
        to: *mut c_void,
        len: usize,
        flags: c_int,
        address: *mut libc::sockaddr,
        address_len: *mut libc::socklen_t,
    ) -> isize, real => {
        let _kept = buffer(to, len, true);
        let _address = buffer(address.cast(), size_of::<libc::sockaddr_storage>(), true);
        // SAFETY: passed on.
        unsafe { real(fd, to, len, flags, address, address_len) }
    }

    fn sendto(
        fd: c_int,
        from: *const c_void,
        len: usize,
        flags: c_int,
        address: *const libc::sockaddr,
        address_len: libc::socklen_t,
    ) -> isize, real => {
        let _kept = buffer(from, len, false);
        let _address = buffer(address.cast(), address_len as usize, false);
        // SAFETY: passed on.
        unsafe { real(fd, from, len, flags, address, address_len) }
    }
}
