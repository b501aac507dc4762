//! The program's own memory, as the kernel copies to and from it: an errno where that is not possible.
//!
//! It may be managed, and away on a device: then it comes home, as for any other access.

use crate::abi::Command;
use peerspace_os::linux::self_memory::{read_self, write_self};
use rustix::io::Errno;

/// Copies bytes of the program's.
pub(crate) fn copy_in(from: u64, to: &mut [u8]) -> Result<(), Errno> {
    all(from, to.len(), |at, done| read_self(at, &mut to[done..]))
}

/// Copies bytes to the program.
///
/// # Safety
/// The program has asked for them to be put there.
pub(crate) unsafe fn copy_out(from: &[u8], to: u64) -> Result<(), Errno> {
    // SAFETY: the caller's.
    all(to, from.len(), |at, done| unsafe { write_self(at, &from[done..]) })
}

/// A request is done with all of its pages, and `bytes` is what comes of it for the program.
pub(crate) fn hand_over(bytes: &[u8], command: &mut Command) -> Result<(), Errno> {
    command.cpages = command.npages;
    // SAFETY: the buffer that the request names for it.
    unsafe { copy_out(bytes, command.ptr) }
}

/// The argument of a request.
pub(crate) fn command(at: u64) -> Result<Command, Errno> {
    let mut bytes = [0; Command::BYTES];
    copy_in(at, &mut bytes)?;
    Ok(Command::from_bytes(&bytes))
}

/// Calls `copy` with the address and the bytes that are done, until all `len` are.
fn all(start: u64, len: usize, mut copy: impl FnMut(u64, usize) -> Result<usize, Errno>) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let at = start.checked_add(done as u64).ok_or(Errno::FAULT)?;
        match copy(at, done) {
            Ok(0) | Err(Errno::FAULT) => return Err(Errno::FAULT),
            // A call copies no more than so many bytes.
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
