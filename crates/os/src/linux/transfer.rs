//! Moving bytes between memory and files, at given positions, by as few system calls as there are stretches.
//!
//! A [`Piece`] is one buffer and where it belongs in a file. Pieces that lie one behind the other in the same file
//! are one request ([`Piece::is_followed_by`]), whether they go by plain system calls ([`plain`]) or by a
//! [ring](super::uring). Each piece gets its own result.
//!
//! There is nothing to lock: a call borrows its pieces, and with them the buffers and the files, until all of it
//! is over.

use rustix::io::Errno;
use std::array;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pieces that one request puts together at most.
pub const MOST_TOGETHER: usize = 64;

/// A buffer, and which way its bytes go.
#[derive(Debug)]
pub enum Bytes<'b> {
    /// To be read from the file.
    Into(&'b mut [u8]),
    /// To be written to the file.
    From(&'b [u8]),
}

impl Bytes<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Bytes::Into(b) => b.len(),
            Bytes::From(b) => b.len(),
        }
    }

    /// True for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first.
    pub fn address(&self) -> usize {
        match self {
            Bytes::Into(b) => b.as_ptr().addr(),
            Bytes::From(b) => b.as_ptr().addr(),
        }
    }

    /// The bytes from `skip` on.
    ///
    /// # Panics
    /// Beyond the end.
    #[must_use]
    pub fn from(&mut self, skip: usize) -> Bytes<'_> {
        match self {
            Bytes::Into(b) => Bytes::Into(&mut b[skip..]),
            Bytes::From(b) => Bytes::From(&b[skip..]),
        }
    }
}

/// One buffer to be read from, or written to, one place in a file.
#[derive(Debug)]
pub struct Piece<'b> {
    /// The file.
    pub file: BorrowedFd<'b>,
    /// The offset of the first byte in the file.
    pub at: u64,
    /// The buffer.
    pub bytes: Bytes<'b>,
    /// How many bytes were moved, or why none. Fewer than there are is no error: that is how files answer. Where
    /// several pieces were one request that failed, each of them has its error, and none may be to blame.
    pub result: Result<usize, Errno>,
    /// A number for the caller to know it by.
    pub tag: u32,
}

impl<'b> Piece<'b> {
    /// A piece of which nothing was moved yet.
    pub fn new(file: BorrowedFd<'b>, at: u64, bytes: Bytes<'b>, tag: u32) -> Piece<'b> {
        Piece { file, at, bytes, result: Ok(0), tag }
    }

    /// Whether `next` continues this piece: the same way, in the same file, right behind it.
    pub fn is_followed_by(&self, next: &Piece<'_>) -> bool {
        let same_way =
            matches!((&self.bytes, &next.bytes), (Bytes::Into(_), Bytes::Into(_)) | (Bytes::From(_), Bytes::From(_)));
        same_way
            && self.file.as_raw_fd() == next.file.as_raw_fd()
            && self.at.checked_add(self.bytes.len() as u64) == Some(next.at)
    }

    /// True when all of it was moved.
    pub fn is_whole(&self) -> bool {
        self.result == Ok(self.bytes.len())
    }
}

/// The requests that `pieces` make: stretches in which each piece follows the one before.
pub(crate) fn requests<'a, 'b>(pieces: &'a mut [Piece<'b>]) -> impl Iterator<Item = &'a mut [Piece<'b>]> {
    pieces.chunk_by_mut(|a, b| a.is_followed_by(b)).flat_map(|run| run.chunks_mut(MOST_TOGETHER))
}

/// Shares out the result of one request among its pieces.
pub(crate) fn share_out(request: &mut [Piece<'_>], result: Result<usize, Errno>) {
    match result {
        Err(e) => request.iter_mut().for_each(|p| p.result = Err(e)),
        Ok(mut moved) => {
            for piece in request {
                let n = moved.min(piece.bytes.len());
                piece.result = Ok(n);
                moved -= n;
            }
        }
    }
}

/// Moves `pieces`, one request after the other. Tries each once; see [`Piece::result`].
///
/// Uses neither the heap nor thread-local storage.
pub fn plain(pieces: &mut [Piece<'_>]) {
    for request in requests(pieces) {
        let result = match &mut *request {
            [one] => alone(one),
            many => together(many),
        };
        share_out(request, result);
    }
}

fn alone(piece: &mut Piece<'_>) -> Result<usize, Errno> {
    match &mut piece.bytes {
        Bytes::Into(b) => rustix::io::pread(piece.file, &mut **b, piece.at),
        Bytes::From(b) => rustix::io::pwrite(piece.file, b, piece.at),
    }
}

fn together(pieces: &mut [Piece<'_>]) -> Result<usize, Errno> {
    let (file, at, n) = (pieces[0].file, pieces[0].at, pieces.len());
    if matches!(pieces[0].bytes, Bytes::Into(_)) {
        let mut slices: [IoSliceMut<'_>; MOST_TOGETHER] = array::from_fn(|_| IoSliceMut::new(&mut []));
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            if let Bytes::Into(b) = &mut piece.bytes {
                *slice = IoSliceMut::new(b);
            }
        }
        rustix::io::preadv(file, &mut slices[..n], at)
    } else {
        let mut slices: [IoSlice<'_>; MOST_TOGETHER] = array::from_fn(|_| IoSlice::new(&[]));
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            if let Bytes::From(b) = piece.bytes {
                *slice = IoSlice::new(b);
            }
        }
        rustix::io::pwritev(file, &slices[..n], at)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::fd::{AsFd, OwnedFd};

    pub(crate) fn scratch_file() -> OwnedFd {
        memfd_create(c"transfer", MemfdFlags::CLOEXEC).unwrap()
    }

    /// Writes and reads scattered and adjacent pieces by `run`, and pieces beyond the end of the file.
    pub(crate) fn pieces_go_where_they_belong(mut run: impl FnMut(&mut [Piece<'_>])) {
        const LEN: usize = 1000;
        let file = scratch_file();
        let file = file.as_fd();
        // 200 pieces: stretches of one, two and many, longer than what goes together.
        let places: Vec<u64> = (0..200u64).map(|i| if i < 20 { i * 3 } else { 100 + i }).collect();
        let bytes: Vec<Vec<u8>> = places.iter().map(|p| vec![*p as u8 ^ 0x5a; LEN]).collect();
        let mut out: Vec<Piece<'_>> = (places.iter().zip(&bytes))
            .map(|(p, b)| Piece::new(file, p * LEN as u64, Bytes::From(b), *p as u32))
            .collect();
        run(&mut out);
        assert!(out.iter().all(Piece::is_whole));
        let mut back = vec![vec![0u8; LEN]; places.len() + 2];
        let mut into: Vec<Piece<'_>> = (places.iter().chain(&[299, 300]).zip(&mut back))
            .map(|(p, b)| Piece::new(file, p * LEN as u64 + LEN as u64 / 2, Bytes::Into(b), *p as u32))
            .collect();
        run(&mut into);
        // The file ends behind piece 299, so half of that one and nothing of the next is there.
        let short: Vec<_> = into.iter().filter(|p| !p.is_whole()).map(|p| (p.tag, p.result)).collect();
        assert_eq!(short, [(299, Ok(LEN / 2)), (299, Ok(LEN / 2)), (300, Ok(0))]);
        drop(into);
        for (p, b) in places.iter().zip(&back) {
            assert!(b[..LEN / 2].iter().all(|x| *x == *p as u8 ^ 0x5a), "piece {p}");
        }
    }

    #[test]
    fn plain_calls_move_pieces() {
        pieces_go_where_they_belong(plain);
    }

    #[test]
    fn only_neighbours_go_together() {
        let (a, b) = (scratch_file(), scratch_file());
        let bytes = [0u8; 8];
        let piece = |f: &'static str, at| {
            Piece::new(if f == "a" { a.as_fd() } else { b.as_fd() }, at, Bytes::From(&bytes), 0)
        };
        assert!(piece("a", 0).is_followed_by(&piece("a", 8)));
        assert!(!piece("a", 0).is_followed_by(&piece("b", 8)));
        assert!(!piece("a", 8).is_followed_by(&piece("a", 0)));
        assert!(!piece("a", 0).is_followed_by(&piece("a", 9)));
        let mut into = [0u8; 8];
        assert!(!piece("a", 0).is_followed_by(&Piece::new(a.as_fd(), 8, Bytes::Into(&mut into), 0)));
        let mut many: Vec<_> = (0..150).map(|i| piece("a", i * 8)).chain([piece("b", 150 * 8)]).collect();
        let lengths: Vec<_> = requests(&mut many).map(|r| r.len()).collect();
        assert_eq!(lengths, [64, 64, 22, 1]);
    }

    #[test]
    fn an_error_is_everybodys() {
        let file = scratch_file();
        let bytes = [0u8; 8];
        let read_only = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        let mut pieces = [0u64, 8, 16].map(|at| Piece::new(file.as_fd(), at, Bytes::From(&bytes), 0));
        pieces[0].file = read_only.as_fd();
        pieces[1].file = read_only.as_fd();
        plain(&mut pieces);
        assert_eq!(pieces.map(|p| p.result), [Err(Errno::BADF), Err(Errno::BADF), Ok(8)]);
    }
}
