//! Many transfers in flight at once, by io_uring, behind a safe call.
//!
//! [`Ring::run`] hands all requests to the kernel in one system call and returns when all of them are over. In
//! between the kernel reads and writes memory that the pieces borrow, so the one rule of this module is: **the
//! call does not return while a request is with the kernel**, whatever happens. A ring that cannot be waited for
//! any more (its descriptor was closed behind our back, say) is watched through its shared memory until the last
//! completion is in; it is never used again after that.
//!
//! A ring is used by one thread at a time (`&mut self`), but by any. Its shared memory belongs to the process that
//! made it: after a fork the child must not use an inherited ring. Dropping one in the child closes a descriptor
//! and unmaps a mapping, which the parent does not notice.
//!
//! Nothing here uses the heap or thread-local storage, and `errno` is left as it was: a fault handler may call.

use super::files::Entry;
use super::keeping_errno;
use super::transfer::{Bytes, MOST_TOGETHER, Piece, plain, requests, share_out};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Requests that are in flight at once.
pub const DEPTH: usize = 64;

/// How often the kernel may refuse to take requests in a row before the ring is given up.
const REFUSALS: u32 = 1000;

/// The most bytes one request asks for; the kernel moves no more at a time. What is left over shows as a short
/// transfer.
const MOST_BYTES: usize = 0x7fff_0000;

/// A pair of queues shared with the kernel.
pub struct Ring {
    // Goes before the descriptor it is about.
    _entry: Entry,
    ring: IoUring,
    broken: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("broken", &self.broken).finish_non_exhaustive()
    }
}

/// Requests that are with the kernel, by number. The process must not go on without their completions.
struct Pending(u64);

impl Drop for Pending {
    fn drop(&mut self) {
        if self.0 != 0 {
            // A panic on the way: unwinding would free buffers that the kernel still writes to.
            std::process::abort();
        }
    }
}

impl Ring {
    /// A ring for [`DEPTH`] requests at once.
    ///
    /// # Errors
    /// ENOSYS or EPERM where io_uring is switched off, as many containers have it; ENOMEM where memory for it may
    /// not be locked (kernels before 5.12); EMFILE.
    pub fn new() -> Result<Ring, Errno> {
        keeping_errno(|| {
            let depth = DEPTH as u32;
            // Without interrupting the thread when something completes: it is waiting in the kernel anyway.
            let cooperative = IoUring::builder().setup_coop_taskrun().build(depth);
            let ring = match cooperative {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(depth),
                other => other,
            };
            let ring = ring.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))?;
            Ok(Ring { _entry: Entry::new(ring.as_raw_fd())?, ring, broken: false })
        })
    }

    /// True when the ring went wrong; [`run`](Ring::run) then makes plain calls, and a new one is better.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Moves `pieces`, [`DEPTH`] requests at a time. Tries each once; see [`Piece::result`].
    pub fn run(&mut self, pieces: &mut [Piece<'_>]) {
        for some in pieces.chunks_mut(DEPTH) {
            if self.broken {
                plain(some);
            } else {
                keeping_errno(|| self.run_some(some));
            }
        }
    }

    /// At most [`DEPTH`] pieces, and so at most as many requests.
    fn run_some(&mut self, pieces: &mut [Piece<'_>]) {
        debug_assert!(pieces.len() <= DEPTH && DEPTH <= MOST_TOGETHER);
        // Both outlive `pending`, which does not end before the kernel is done with them.
        let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; DEPTH];
        let mut results = [-libc::EAGAIN; DEPTH];
        let mut pending = Pending(0);
        let mut pushed = 0;
        let mut free = &mut vectors[..];
        for request in requests(pieces) {
            let (now, later) = free.split_at_mut(request.len());
            free = later;
            let entry = entry_for(request, now).user_data(pushed as u64);
            // SAFETY: the entry names buffers that `pieces` borrows and vectors on this stack. Both stay until this
            // function returns, and it does not return (nor unwind, see Pending) before every entry that the
            // kernel has taken is completed. The descriptors are borrowed by the pieces likewise.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                break; // never: the queue is empty between calls, and has room for all
            }
            pending.0 |= 1 << pushed;
            pushed += 1;
        }
        self.wait(&mut pending, pushed, &mut results);
        for (request, result) in requests(pieces).zip(results) {
            let result = match usize::try_from(result) {
                Ok(n) => Ok(n),
                Err(_) => Err(Errno::from_raw_os_error(result.wrapping_neg())),
            };
            share_out(request, result);
        }
    }

    /// Submits what was pushed, and waits until no request is left with the kernel.
    fn wait(&mut self, pending: &mut Pending, pushed: usize, results: &mut [i32; DEPTH]) {
        let mut refusals = 0;
        loop {
            self.collect(pending, results);
            if pending.0 == 0 {
                return;
            }
            match self.ring.submit_and_wait(pending.0.count_ones() as usize) {
                Ok(_) => refusals = 0,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if refusals < REFUSALS => {
                        refusals += 1;
                        std::thread::yield_now();
                    }
                    _ => break,
                },
            }
        }
        // The kernel takes entries in order, so the last ones are those it never saw, and never will: only a call
        // for this ring makes it look.
        self.broken = true;
        let unseen = self.ring.submission().len().min(pushed);
        for i in pushed - unseen..pushed {
            pending.0 &= !(1 << i);
        }
        // Those it has seen complete without us; system calls give the kernel the occasion to say so.
        while pending.0 != 0 {
            std::thread::yield_now();
            self.collect(pending, results);
        }
    }

    fn collect(&mut self, pending: &mut Pending, results: &mut [i32; DEPTH]) {
        for completion in self.ring.completion() {
            let i = completion.user_data();
            // Anything else is no answer to a request of this call.
            if i < DEPTH as u64 && pending.0 & 1 << i != 0 {
                results[i as usize] = completion.result();
                pending.0 &= !(1 << i);
            }
        }
    }
}

/// The queue entry for a request, which lists its buffers in `vectors` if there are several.
fn entry_for(request: &mut [Piece<'_>], vectors: &mut [MaybeUninit<libc::iovec>]) -> squeue::Entry {
    let (file, at) = (types::Fd(request[0].file.as_raw_fd()), request[0].at);
    if let [piece] = request {
        let len = piece.bytes.len().min(MOST_BYTES) as u32;
        return match &mut piece.bytes {
            Bytes::Into(b) => opcode::Read::new(file, b.as_mut_ptr(), len).offset(at).build(),
            Bytes::From(b) => opcode::Write::new(file, b.as_ptr(), len).offset(at).build(),
        };
    }
    let n = request.len() as u32;
    let reads = matches!(request[0].bytes, Bytes::Into(_));
    for (vector, piece) in vectors.iter_mut().zip(request) {
        let base = match &mut piece.bytes {
            Bytes::Into(b) => b.as_mut_ptr(),
            // The kernel only reads what is to be written.
            Bytes::From(b) => b.as_ptr().cast_mut(),
        };
        vector.write(libc::iovec { iov_base: base.cast(), iov_len: piece.bytes.len() });
    }
    let vectors = vectors.as_ptr().cast();
    if reads {
        opcode::Readv::new(file, vectors, n).offset(at).build()
    } else {
        opcode::Writev::new(file, vectors, n).offset(at).build()
    }
}

#[cfg(test)]
mod tests {
    use super::super::transfer::tests::{pieces_go_where_they_belong, scratch_file};
    use super::*;
    use std::os::fd::AsFd;

    fn ring() -> Option<Ring> {
        Ring::new().inspect_err(|e| eprintln!("skipped: no io_uring here ({e})")).ok()
    }

    #[test]
    fn a_ring_moves_pieces() {
        let Some(mut ring) = ring() else { return };
        for _ in 0..20 {
            pieces_go_where_they_belong(|p| ring.run(p));
        }
        assert!(!ring.is_broken());
    }

    #[test]
    fn a_request_that_fails_leaves_the_others_alone() {
        let Some(mut ring) = ring() else { return };
        let file = scratch_file();
        let read_only = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let bytes = [7u8; 8];
        let mut pieces: Vec<_> = (0..DEPTH as u64 * 3)
            .map(|i| {
                let file = if i % 10 == 3 { read_only.as_fd() } else { file.as_fd() };
                Piece::new(file, i * 100, Bytes::From(&bytes), i as u32)
            })
            .collect();
        ring.run(&mut pieces);
        for p in &pieces {
            assert_eq!(p.result, if p.tag % 10 == 3 { Err(Errno::BADF) } else { Ok(8) }, "piece {}", p.tag);
        }
    }

    #[test]
    fn a_ring_whose_descriptor_is_gone_loses_nothing() {
        let Some(mut ring) = ring() else { return };
        pieces_go_where_they_belong(|p| ring.run(p));
        // What a program does that closes every descriptor it does not know. Another file takes the number, so
        // that nothing else of this process can.
        let other = scratch_file();
        // SAFETY: dup2 replaces the ring's descriptor, which the ring closes when it is dropped; both exist.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), ring.ring.as_raw_fd()) } >= 0);
        let file = scratch_file();
        let bytes = [7u8; 8];
        let mut pieces = [0u64, 100, 200].map(|at| Piece::new(file.as_fd(), at, Bytes::From(&bytes), 0));
        ring.run(&mut pieces);
        assert!(ring.is_broken());
        assert!(pieces.iter().all(|p| p.result == Err(Errno::AGAIN)));
        ring.run(&mut pieces);
        assert!(pieces.iter().all(Piece::is_whole));
    }
}
