//! Bytes of our own memory as the kernel reads and writes them: an error, not a signal, where that is not possible.

use rustix::io::Errno;

/// Reads memory of this process through the kernel: a page that vanished is an error, not a fault. Returns how many bytes
/// there were.
///
/// # Errors
/// When there is nothing to read at `at`.
pub fn read_self(at: u64, out: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote = libc::iovec { iov_base: at as *mut _, iov_len: out.len() };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the local vector is ours to write; the kernel checks the remote one.
    let n = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    if n < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::FAULT))
    } else {
        Ok(n as usize)
    }
}

/// Writes bytes to our own memory as the kernel does: an error, not a signal, where that is not possible. Returns how many.
///
/// # Safety
/// As for a raw pointer: what is written there must be valid for whoever reads it.
///
/// # Errors
/// When nothing can be written at `at`.
pub unsafe fn write_self(at: u64, from: &[u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: at as *mut _, iov_len: from.len() };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the local vector is only read; the kernel checks the remote one, and the caller says that it may be written.
    let n = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    if n < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::FAULT))
    } else {
        Ok(n as usize)
    }
}
