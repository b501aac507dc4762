//! Fork: what two processes share, neither writes to (rule G12).
//!
//! ```text
//!  before_fork           files with pages are sealed, and opened once more, locked, for the child
//!      fork
//!  parent                lets go of what is the child's      child   takes it, lets go of what is the parent's,
//!                                                                    and of files without pages, and of the rings
//!  the next store        makes a new file, or finds one that is open again
//! ```
//!
//! Each fork may add a file, so before each the smallest files are merged into an open one as long as that is cheap;
//! and when there is room for one more file only, the smallest is merged at any cost. Where that fails, and later no
//! file can be added, stores of pages that are not in an open file get [`NoSpace`](DeviceError::NoSpace): the engine
//! goes on with its next device.
//!
//! Locks: everything is at rest, so none is waited for. They are taken all the same: upkeep, then the files.

use super::collect::Upkeep;
use super::disk::{BOUNCE, Disk};
use super::files::{Files, Seal, held};
use super::raw::Raw;
use super::record::Slot;
use crate::device::{DeviceError, ForkSide};
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::linux::files::ForChild;
use peerspace_os::linux::lock;
use peerspace_os::linux::transfer::{Bytes, Piece};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

/// Pages that are moved at each fork to have fewer files.
const CHEAP: u64 = 64;

impl<R: Raw> Disk<R> {
    pub(super) fn before_fork(&self) {
        self.site.before_fork();
        let mut upkeep = self.upkeep.lock();
        self.open_again(&mut upkeep);
        self.chores.empty_file.store(true, Relaxed);
        self.close_empty();
        // What does not work out shows when a file is to be added.
        let _ = self.have_fewer(&mut upkeep);
        let mut files = self.files.write();
        for (slot, member) in files.iter_mut() {
            // A file without pages is of no interest to the child; this process goes on writing to it.
            if held(&self.tallies[slot.index()]) == 0 {
                continue;
            }
            member.for_child = None;
            if member.seal != Seal::Forever {
                member.for_child = self.for_child(member.file.as_fd()).ok();
                member.seal = if member.for_child.is_some() { Seal::Sealed } else { Seal::Forever };
            }
        }
        let current = files.current.filter(|slot| files.is_open(*slot));
        files.current = current;
    }

    /// The file once more, for the child, so that both can tell whether the other still uses it.
    fn for_child(&self, file: BorrowedFd<'_>) -> Result<ForChild, Errno> {
        lock::share(file)?;
        self.site.again(file)
    }

    pub(super) fn after_fork(&self, side: ForkSide) {
        self.site.after_fork(side);
        let _upkeep = self.upkeep.lock();
        let mut files = self.files.write();
        match side {
            // Closing it here leaves it with the child alone.
            ForkSide::Parent => files.iter_mut().for_each(|(_, member)| member.for_child = None),
            ForkSide::Child => {
                self.raw.forked();
                files.close(|slot, _| held(&self.tallies[slot.index()]) == 0);
                for (_, member) in files.iter_mut() {
                    member.named = false;
                    if let Some(file) = member.for_child.take() {
                        // A file that has not come is one whose pages cannot be loaded: an error of each that is.
                        let _ = file.arrive().and_then(|f| member.file.replace(f));
                    }
                }
            }
        }
    }

    /// Merges files, so that there is room for more.
    fn have_fewer(&self, upkeep: &mut Upkeep) -> Result<(), DeviceError> {
        let mut budget = CHEAP;
        loop {
            let must = self.files.read().free() <= 1;
            if must {
                self.provide(upkeep).map_err(|e| DeviceError::Io(e.raw_os_error()))?;
            }
            let Some((from, to, pages)) = self.mergeable() else { return Ok(()) };
            if pages > budget && !must {
                return Ok(());
            }
            budget = budget.saturating_sub(pages);
            self.merge(from, to)?;
            self.chores.empty_file.store(true, Relaxed);
            if !self.close_empty() {
                // Some page cannot be moved.
                return Ok(());
            }
        }
    }

    /// The file with the fewest pages, an open one with many, and how many pages would have to be moved.
    fn mergeable(&self) -> Option<(Slot, Slot, u64)> {
        let files = self.files.read();
        let pages = |slot: &Slot| held(&self.tallies[slot.index()]);
        let open = files.iter().filter(|(_, m)| m.seal == Seal::Open).map(|(slot, _)| slot);
        let to = open.max_by_key(pages)?;
        // A name is kept in any case.
        let others = files.iter().filter(|(slot, m)| *slot != to && !m.named).map(|(slot, _)| slot);
        let from = others.min_by_key(pages)?;
        Some((from, to, pages(&from)))
    }

    /// Moves the pages of file `from` to file `to`.
    fn merge(&self, from: Slot, to: Slot) -> Result<(), DeviceError> {
        let files = self.files.read();
        let file = files.file(from).ok_or(DeviceError::Gone)?;
        let mut at = self.layout.offset(0);
        while held(&self.tallies[from.index()]) > 0 && at < self.layout.bytes() {
            let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(start) => start..rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(self.layout.bytes()),
                Err(Errno::NXIO) => break,
                // The file system does not tell: all of it may be data.
                Err(_) => at..self.layout.bytes(),
            };
            let last = self.layout.page_at(data.end.saturating_sub(1)).min(self.layout.pages - 1);
            self.move_pages(&files, from, to, self.layout.page_at(data.start)..last + 1)?;
            at = self.layout.offset(last + 1).max(data.end);
        }
        Ok(())
    }

    /// Moves those of `pages` that file `from` holds to file `to`.
    fn move_pages(&self, files: &Files, from: Slot, to: Slot, pages: Range<u64>) -> Result<(), DeviceError> {
        let source = files.file(from).ok_or(DeviceError::Gone)?;
        let target = files.file(to).ok_or(DeviceError::Gone)?;
        let mut buffer = self.bounce.lock();
        let mut page = pages.start;
        while page < pages.end {
            let run = self.table.run(page, BOUNCE.min(pages.end - page));
            let Some((_, count)) = run.filter(|(slot, _)| *slot == from) else {
                page += run.map_or(1, |(_, count)| count);
                continue;
            };
            let bytes = &mut buffer[..self.layout.len(count) as usize];
            let at = self.layout.offset(page);
            self.move_one(Piece::new(source, at, Bytes::Into(bytes), 0))?;
            let good = (page..).zip(bytes.chunks_exact(self.layout.page()));
            // A page that cannot be had stays where it is, to be found out by whoever loads it.
            let good = good.take_while(|(p, content)| self.table.get(*p).matches(content)).count() as u64;
            if good > 0 {
                self.move_one(Piece::new(target, at, Bytes::From(&bytes[..self.layout.len(good) as usize]), 0))?;
                (page..page + good).for_each(|p| self.table.moved(p, to));
                self.tallies[from.index()].held.fetch_sub(good, Relaxed);
                self.tallies[from.index()].dead.fetch_add(good, Relaxed);
                self.tallies[to.index()].held.fetch_add(good, Relaxed);
                self.dirty.mark(page, good);
            }
            page += good.max(1);
        }
        Ok(())
    }
}
