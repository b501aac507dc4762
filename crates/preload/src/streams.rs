//! The C library's standard streams where faults come by signal.
//!
//! The library hands a stream's buffer to the kernel by calls of its own, which nobody can step in front of; if the buffer
//! is on the heap and away, what was written is lost without a word. So the standard streams get buffers that are never
//! managed. Streams that the program opens itself keep theirs: `--help` names them as a limit.

use libc::FILE;

unsafe extern "C" {
    static stdin: *mut FILE;
    static stdout: *mut FILE;
}

/// Bytes of a buffer: what the C library would give a pipe.
const BUFFER: usize = 4096;

/// Gives standard input and output buffers from our own heap. Called before the program's `main`.
pub(crate) fn keep_buffers() {
    // SAFETY: set by the C library before any constructor runs.
    let (input, output) = unsafe { (stdin, stdout) };
    // SAFETY: only looks at a descriptor.
    let to_terminal = unsafe { libc::isatty(libc::STDOUT_FILENO) } == 1;
    for (stream, mode) in [(input, libc::_IOFBF), (output, if to_terminal { libc::_IOLBF } else { libc::_IOFBF })] {
        let buffer = Box::leak(Box::new([0u8; BUFFER]));
        // SAFETY: nothing has used the stream yet, and the buffer lives for ever.
        unsafe { libc::setvbuf(stream, buffer.as_mut_ptr().cast(), mode, BUFFER) };
    }
}
