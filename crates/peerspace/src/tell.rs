//! The few sentences the engine says on its own: warnings that nobody asked for but everybody would want.
//!
//! Written to standard error by one system call, without buffers or locks, because it may be a faulting thread
//! that has to say something.

use std::fmt::{self, Write};

struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let n = s.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

/// Says `what` on standard error, one line.
pub(crate) fn warning(what: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    let _ = writeln!(line, "peerspace: {what}");
    // Nothing can be done if standard error is closed.
    let _ = rustix::io::write(rustix::stdio::stderr(), &line.bytes[..line.len]);
}

/// Says `what` on standard error, and ends the process: for when going on would be to go on with wrong data.
pub(crate) fn end(what: fmt::Arguments<'_>) -> ! {
    warning(what);
    std::process::abort()
}
