//! Stores and loads: from a batch of transfers to requests, and from what became of those to results.
//!
//! ```text
//!  batch ─> pieces (cut where the file changes) ─> in order ─> one attempt, together ─> the rest, one by one
//!                                                                          loads only: ─> checked page by page
//! ```
//!
//! The one attempt is all there is as long as nothing goes wrong. What it leaves undone (short transfers, what was
//! interrupted, a request of several pieces of which one is bad) is completed piece by piece, so that an error is
//! reported for exactly the transfers it is about.
//!
//! Nothing is allocated: a batch is worked through in parts that fit on the stack.
//!
//! Locks: the files are held for reading from the first look at a record until the last byte is there. For a store
//! that finds no room the lock is let go of, room made, and the transfers that failed are tried again.

use super::disk::Disk;
use super::files::Files;
use super::raw::Raw;
use crate::device::{DeviceError, DevicePages, Load, Store};
use crate::sync::RwLockReadGuard;
use arrayvec::ArrayVec;
use peerspace_os::linux::transfer::{Bytes, Piece};
use rustix::io::Errno;
use std::os::fd::AsRawFd;

/// Transfers, and pieces, that are worked on at a time.
const PART: usize = 64;
/// Attempts in a row that move nothing before a transfer is given up as stuck.
const PATIENCE: u32 = 16;
/// How often room is made for the same transfers.
const ROUNDS: usize = 3;

type Pieces<'b> = ArrayVec<Piece<'b>, PART>;
/// What went wrong, by the number of the transfer.
type Errors = ArrayVec<(u32, DeviceError), PART>;

fn io_error(errno: Errno) -> DeviceError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => DeviceError::NoSpace,
        errno => DeviceError::Io(errno.raw_os_error()),
    }
}

fn note(errors: &mut Errors, tag: u32, error: DeviceError) {
    // The first error of a transfer stands; there are no more transfers than places.
    if !errors.iter().any(|(t, _)| *t == tag) {
        let _ = errors.try_push((tag, error));
    }
}

impl<R: Raw> Disk<R> {
    pub(super) fn load(&self, batch: &mut [Load<'_>]) {
        let files = self.files.read();
        for part in batch.chunks_mut(PART) {
            self.load_part(&files, part);
        }
    }

    fn load_part(&self, files: &Files, part: &mut [Load<'_>]) {
        let mut errors = Errors::new();
        let mut pieces = Pieces::new();
        for (tag, load) in (0u32..).zip(part.iter_mut()) {
            let Load { page, bytes, result } = load;
            *result = self.layout.check(*page, bytes.len()).map(drop);
            let mut page = *page;
            let mut rest = if result.is_ok() { &mut **bytes } else { &mut [] };
            while !rest.is_empty() {
                let most = (rest.len() / self.layout.page()) as u64;
                let run = self.table.run(page, most);
                let Some((file, count)) = run.and_then(|(slot, n)| Some((files.file(slot)?, n))) else {
                    // Nothing was stored there.
                    *result = Err(DeviceError::Io(Errno::NODATA.raw_os_error()));
                    break;
                };
                let (bytes, tail) = rest.split_at_mut(self.layout.len(count) as usize);
                let piece = Piece::new(file, self.layout.offset(page), Bytes::Into(bytes), tag);
                self.line_up(piece, &mut pieces, &mut errors);
                rest = tail;
                page += count;
            }
        }
        self.perform(&mut pieces, &mut errors);
        drop(pieces);
        for (tag, error) in errors {
            part[tag as usize].result = Err(error);
        }
        for load in part.iter_mut().filter(|l| l.result.is_ok()) {
            let mut pages = (load.page..).zip(load.bytes.chunks_exact(self.layout.page()));
            if !pages.all(|(page, content)| self.table.get(page).matches(content)) {
                load.result = Err(DeviceError::Corrupt);
            }
        }
    }

    pub(super) fn store(&self, batch: &mut [Store<'_>]) {
        for part in batch.chunks_mut(PART) {
            part.iter_mut().for_each(|s| s.result = Err(DeviceError::NoAnswer));
            self.store_part(part, &DeviceError::NoAnswer);
            for _ in 0..ROUNDS {
                let short = part.iter().filter(|s| s.result == Err(DeviceError::NoSpace));
                let need: usize = short.map(|s| s.bytes.len() / self.layout.page()).sum();
                if need == 0 || !self.make_room(need as u64) {
                    break;
                }
                self.store_part(part, &DeviceError::NoSpace);
            }
        }
        self.tidy_up(2);
    }

    /// The files, of which one takes new pages.
    fn files_to_write(&self) -> Result<RwLockReadGuard<'_, Files>, DeviceError> {
        loop {
            let files = self.files.read();
            if files.current.is_some() {
                return Ok(files);
            }
            drop(files);
            self.provide_file().map_err(io_error)?;
        }
    }

    /// Stores those transfers of `part` whose result is `todo`.
    fn store_part(&self, part: &mut [Store<'_>], todo: &DeviceError) {
        let todo = Err(todo.clone());
        let files = self.files_to_write();
        let (files, current) = match &files {
            Ok(files) => (files, files.current.unwrap_or(super::record::Slot(0))),
            Err(e) => {
                part.iter_mut().filter(|s| s.result == todo).for_each(|s| s.result = Err(e.clone()));
                return;
            }
        };
        let mut errors = Errors::new();
        let mut pieces = Pieces::new();
        for (tag, store) in (0u32..).zip(part.iter_mut()).filter(|(_, s)| s.result == todo) {
            store.result = self.layout.check(store.page, store.bytes.len()).map(drop);
            let mut page = store.page;
            let mut rest = if store.result.is_ok() { store.bytes } else { &[] };
            while !rest.is_empty() {
                let (slot, count) = self.hold(files, current, page, rest);
                let (bytes, tail) = rest.split_at(self.layout.len(count) as usize);
                match files.file(slot) {
                    Some(file) => {
                        let piece = Piece::new(file, self.layout.offset(page), Bytes::From(bytes), tag);
                        self.line_up(piece, &mut pieces, &mut errors);
                    }
                    None => note(&mut errors, tag, DeviceError::Gone),
                }
                rest = tail;
                page += count;
            }
        }
        self.perform(&mut pieces, &mut errors);
        drop(pieces);
        for (tag, error) in errors {
            let store = &mut part[tag as usize];
            store.result = Err(error);
            // What was written of it is of no use, and must not be taken for content.
            let count = (store.bytes.len() / self.layout.page()) as u64;
            self.let_go(files, DevicePages { first: store.page, count });
        }
    }

    pub(super) fn free(&self, pages: DevicePages) {
        self.let_go(&self.files.read(), pages);
        // Two holes for each group's worth of pages: so that garbage gets less where it is too much.
        let group = super::record::GROUP;
        let before = self.freed.fetch_add(pages.count, peerspace_core::sync::Ordering::Relaxed);
        let groups = (before.wrapping_add(pages.count) / group).wrapping_sub(before / group);
        if groups > 0 {
            self.tidy_up(2 * groups.min(4));
        }
    }

    /// Puts `piece` among those to be moved together; moves those first if there is no more room.
    fn line_up<'b>(&self, mut piece: Piece<'b>, pieces: &mut Pieces<'b>, errors: &mut Errors) {
        if self.direct && !piece.bytes.address().is_multiple_of(self.layout.page()) {
            if let Err(e) = self.bounce(&mut piece) {
                note(errors, piece.tag, e);
            }
            return;
        }
        if pieces.is_full() {
            self.perform(pieces, errors);
        }
        pieces.push(piece);
    }

    /// Moves all of `pieces`, and leaves none.
    fn perform(&self, pieces: &mut Pieces<'_>, errors: &mut Errors) {
        let order = |p: &Piece<'_>| (p.file.as_raw_fd(), p.at);
        if !pieces.is_sorted_by_key(order) {
            pieces.sort_unstable_by_key(order);
        }
        if !pieces.is_empty() {
            self.raw.transfer(pieces);
        }
        let alone = pieces.len() == 1;
        for mut piece in pieces.drain(..) {
            if piece.is_whole() {
                continue;
            }
            // An error of several need not be this one's.
            let first = piece.result;
            let result = if alone || first.is_ok() { Some(first) } else { None };
            if let Err(e) = self.complete(&mut piece, result) {
                note(errors, piece.tag, e);
            }
        }
    }

    /// Moves all of `piece`, of which `result` is what a first attempt gave.
    fn complete(&self, piece: &mut Piece<'_>, result: Option<Result<usize, Errno>>) -> Result<(), DeviceError> {
        let wanted = piece.bytes.len();
        let page = self.layout.page();
        let mut result = result;
        // What came, and the part of it that need not be asked for again: past the cache, transfers begin at pages.
        let (mut got, mut done) = (0, 0);
        let mut stuck = 0;
        loop {
            let now = result.take().unwrap_or_else(|| {
                let at = piece.at + done as u64;
                let mut rest = [Piece::new(piece.file, at, piece.bytes.from(done), 0)];
                self.raw.transfer(&mut rest);
                rest[0].result
            });
            let before = done;
            match now {
                Ok(n) => {
                    got = got.max(done.saturating_add(n).min(wanted));
                    if got == wanted {
                        return Ok(());
                    }
                    done = if self.direct { got / page * page } else { got };
                }
                Err(Errno::INTR | Errno::AGAIN) => std::thread::yield_now(),
                Err(e) => return Err(io_error(e)),
            }
            stuck = if done > before { 0 } else { stuck + 1 };
            if stuck > PATIENCE {
                return Err(match now {
                    Ok(_) => DeviceError::Short { got, wanted },
                    Err(e) => io_error(e),
                });
            }
        }
    }

    /// Moves all of `piece` by way of a buffer that is aligned.
    fn bounce(&self, piece: &mut Piece<'_>) -> Result<(), DeviceError> {
        let mut buffer = self.bounce.lock();
        let most = buffer.len();
        let wanted = piece.bytes.len();
        let mut done = 0;
        while done < wanted {
            let n = most.min(wanted - done);
            let at = piece.at + done as u64;
            let result = match piece.bytes.from(done) {
                Bytes::Into(to) => {
                    let read = self.complete(&mut Piece::new(piece.file, at, Bytes::Into(&mut buffer[..n]), 0), None);
                    to[..n].copy_from_slice(&buffer[..n]);
                    read
                }
                Bytes::From(from) => {
                    buffer[..n].copy_from_slice(&from[..n]);
                    self.complete(&mut Piece::new(piece.file, at, Bytes::From(&buffer[..n]), 0), None)
                }
            };
            result.map_err(|e| match e {
                DeviceError::Short { got, .. } => DeviceError::Short { got: done + got, wanted },
                e => e,
            })?;
            done += n;
        }
        Ok(())
    }

    /// Moves one buffer, aligned, to or from one place in one file.
    pub(super) fn move_one(&self, mut piece: Piece<'_>) -> Result<(), DeviceError> {
        self.complete(&mut piece, None)
    }
}
