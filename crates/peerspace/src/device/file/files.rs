//! The files of one device: one, until the process forks.
//!
//! Parent and child share what was stored before the fork, so from then on neither writes to those files nor
//! punches holes into them: they are *sealed*. New content goes to another file, at the same offset; a page's
//! [record](super::record) says which file has it. A sealed file is opened again for writing when no other process
//! uses it any more, and closed when it holds no page of this process.
//!
//! ```text
//!            made                       fork, with pages in it
//!  (none) ────────> open ─────────────────────────────────────────────> sealed
//!     ^              │ ^────────────────────────────────────────────────┘  │
//!     │              │      nobody else has a lock on it                   │
//!     └──────────────┴─────────────────────────────────────────────────────┘ no page is left in it
//! ```
//!
//! Who else uses a file is told by locks ([`peerspace_os::linux::lock`]): each process has an open file of its own
//! for each sealed file, with a shared lock on it. The child's is made before the fork, so there is no moment at
//! which it has none; the kernel releases it when the child dies, however it does. Where that cannot be had (no
//! /proc, no descriptors left, a file system that does not lock) a file stays sealed for as long as it is used.
//!
//! Locks: the members are under one reader-writer lock. Transfers read for their whole duration, so a writer is
//! alone with the files: nothing is in flight, and no page changes its file. Every writer holds the upkeep lock
//! ([`super::collect`]) first; a reader never waits for that one.

use super::record::{Kind, MOST_FILES, Record, Slot};
use peerspace_core::sync::{AtomicU64, Ordering::Relaxed};
use peerspace_os::linux::files::{ForChild, OurFd};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};

/// Who may write to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seal {
    /// This process alone uses it.
    Open,
    /// Others may use it; its lock tells.
    Sealed,
    /// Others may use it, and nothing tells.
    Forever,
}

/// One file.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) file: OurFd,
    pub(super) seal: Seal,
    /// It has a name that is this process's as long as it holds the file.
    pub(super) named: bool,
    /// Around a fork: the same file, for the child.
    pub(super) for_child: Option<ForChild>,
}

impl Member {
    pub(super) fn new(file: OurFd, named: bool) -> Member {
        Member { file, seal: Seal::Open, named, for_child: None }
    }
}

/// What is counted per file.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Pages it holds.
    pub(super) held: AtomicU64,
    /// Pages that were let go of while it was sealed: it still takes up space for them.
    pub(super) dead: AtomicU64,
}

/// All files of a device, by slot.
#[derive(Debug)]
pub(super) struct Files {
    all: [Option<Member>; MOST_FILES],
    /// Where pages go that are in no open file yet. It is open itself.
    pub(super) current: Option<Slot>,
}

impl Files {
    pub(super) fn new(first: Member) -> Files {
        let mut all = [const { None }; MOST_FILES];
        all[0] = Some(first);
        Files { all, current: Some(Slot(0)) }
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Member> {
        self.all.get(slot.index())?.as_ref()
    }

    pub(super) fn file(&self, slot: Slot) -> Option<BorrowedFd<'_>> {
        self.get(slot).map(|m| m.file.as_fd())
    }

    pub(super) fn is_open(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|m| m.seal == Seal::Open)
    }

    pub(super) fn is_sealed(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|m| m.seal != Seal::Open)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Slot, &Member)> {
        (0u8..).map(Slot).zip(&self.all).filter_map(|(slot, m)| Some((slot, m.as_ref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Slot, &mut Member)> {
        (0u8..).map(Slot).zip(&mut self.all).filter_map(|(slot, m)| Some((slot, m.as_mut()?)))
    }

    pub(super) fn any_sealed(&self) -> bool {
        self.iter().any(|(_, m)| m.seal != Seal::Open)
    }

    /// Slots without a file.
    pub(super) fn free(&self) -> usize {
        self.all.iter().filter(|m| m.is_none()).count()
    }

    /// Where a page goes that is written now, and was `before`: to the file it is in if that is open, so that no
    /// other file takes up space for it; else to `current`.
    pub(super) fn target(&self, before: Record, current: Slot) -> Slot {
        match before.kind() {
            Kind::Held | Kind::Garbage if self.is_open(before.slot()) => before.slot(),
            _ => current,
        }
    }

    /// Takes a file in.
    ///
    /// # Errors
    /// ENFILE when there are as many as can be told apart.
    pub(super) fn add(&mut self, member: Member) -> Result<Slot, Errno> {
        let at = self.all.iter().position(Option::is_none).ok_or(Errno::NFILE)?;
        self.all[at] = Some(member);
        Ok(Slot(at as u8))
    }

    /// Closes the files that `gone` says.
    pub(super) fn close(&mut self, mut gone: impl FnMut(Slot, &Member) -> bool) {
        for (slot, place) in (0u8..).map(Slot).zip(&mut self.all) {
            if place.as_ref().is_some_and(|m| gone(slot, m)) {
                *place = None;
                if self.current == Some(slot) {
                    self.current = None;
                }
            }
        }
    }
}

/// Pages that `tally` says are held.
pub(super) fn held(tally: &Tally) -> u64 {
    tally.held.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn member() -> Member {
        Member::new(OurFd::new(memfd_create(c"member", MemfdFlags::CLOEXEC).unwrap()).unwrap(), false)
    }

    #[test]
    fn there_is_a_bound_on_files() {
        let mut files = Files::new(member());
        for i in 1..MOST_FILES {
            assert_eq!(files.free(), MOST_FILES - i);
            assert_eq!(files.add(member()), Ok(Slot(i as u8)));
        }
        assert_eq!(files.add(member()), Err(Errno::NFILE));
        files.close(|slot, _| slot.0 % 2 == 0);
        assert_eq!((files.free(), files.current), (MOST_FILES / 2, None));
        assert_eq!(files.add(member()), Ok(Slot(0)));
        assert_eq!(files.iter().count(), MOST_FILES / 2 + 1);
    }

    #[test]
    fn pages_stay_in_open_files_only() {
        let mut files = Files::new(member());
        let table = super::super::record::Table::new(1).unwrap();
        let other = files.add(member()).unwrap();
        assert_eq!(files.target(table.get(0), other), other);
        table.hold(0, 0, |_| Some(Slot(0)));
        assert_eq!(files.target(table.get(0), other), Slot(0));
        files.iter_mut().next().unwrap().1.seal = Seal::Sealed;
        assert_eq!(files.target(table.get(0), other), other);
        assert!(files.any_sealed() && files.is_sealed(Slot(0)) && files.is_open(other));
        files.close(|slot, _| slot == Slot(0));
        assert_eq!(files.target(table.get(0), other), other);
        assert!(!files.is_sealed(Slot(0)) && !files.is_open(Slot(0)));
    }
}
