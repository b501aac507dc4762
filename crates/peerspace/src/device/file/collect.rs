//! Upkeep: returning the space of pages that were freed, and what else need not be done at once.
//!
//! Punching a hole costs as much as writing the page did, and a page that was freed is likely to be stored again
//! soon; so freeing a page only makes it *garbage*. When there is more garbage than the
//! [allowance](Disk::allowance) the collector goes round the groups of pages that have some, those with the most
//! first: whole groups, then half-full ones, and so on. In each it punches runs of garbage as single holes. It works
//! a little in each store, and in one of many frees; it works as long as it takes when the file system is full.
//!
//! What is left in a file that was sealed once (pages freed or written anew elsewhere in the meantime) has no
//! record. After a file is open again one *thorough* round punches everything in it that is not held by it.
//!
//! Locks: one thread at a time does upkeep, under a lock of its own, which is taken before the files' and only ever
//! tried where a transfer would have to wait. In a group the collector takes the pages in hand that have no content
//! ([`record`](super::record)); a store that wants one of them waits for the hole.
//!
//! Why a thorough round may punch, in one file, a page that another open file holds: only a page that is held
//! nowhere, or by a sealed file, can come to be held by a file it was not in. The first are in hand, the second are
//! left out; and both can only change by upkeep.

use super::disk::Disk;
use super::files::{Files, Member, Seal, held};
use super::raw::Raw;
use super::record::{GROUP, Kind, MOST_FILES, Slot};
use arrayvec::ArrayVec;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::linux::lock;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::AsFd;

/// Garbage in a group that makes it worth a visit at first.
const DENSE: u64 = GROUP / 2;
/// Groups looked at for each that may be punched.
const LOOKS: u64 = 16;
/// Words of the bitmap of groups looked at in one go.
const WORDS: u64 = 4096;
/// Deaths in sealed files after which it is asked again whether they are still shared.
const DEATHS: u64 = 1024;

/// Where the collector is.
#[derive(Debug)]
pub(super) struct Upkeep {
    /// The next group to look at.
    cursor: u64,
    /// Garbage that makes a visit worth it.
    least: u64,
    /// Groups of a thorough round that are left.
    thorough: u64,
}

impl Upkeep {
    pub(super) fn new() -> Upkeep {
        Upkeep { cursor: 0, least: DENSE, thorough: 0 }
    }
}

impl<R: Raw> Disk<R> {
    /// Does some upkeep if any is due and nobody else does: at most `visits` groups. The caller holds no lock.
    pub(super) fn tidy_up(&self, visits: u64) {
        let died = self.chores.died.load(Relaxed);
        let due = died >= DEATHS
            || self.chores.empty_file.load(Relaxed)
            || self.chores.thorough.load(Relaxed)
            || self.garbage.load(Relaxed) > self.allowance();
        if !due {
            return;
        }
        let Some(mut upkeep) = self.upkeep.try_lock() else { return };
        if died >= DEATHS {
            self.open_again(&mut upkeep);
        }
        self.close_empty();
        self.collect(&mut upkeep, visits);
    }

    /// Returns all space that is not needed. Takes as long as that takes.
    pub(super) fn trim(&self) {
        let mut upkeep = self.upkeep.lock();
        self.open_again(&mut upkeep);
        self.close_empty();
        self.collect_all(&mut upkeep, u64::MAX);
    }

    /// Returns space so that `pages` pages can be stored. False if there was none to return.
    pub(super) fn make_room(&self, pages: u64) -> bool {
        let mut upkeep = self.upkeep.lock();
        self.open_again(&mut upkeep);
        let closed = self.close_empty();
        let before = self.blocks();
        // More than needed: the next stores will want some too.
        self.collect_all(&mut upkeep, pages.saturating_mul(4).max(GROUP));
        closed || self.blocks() < before
    }

    /// What all files take up on disk.
    fn blocks(&self) -> i64 {
        self.files.read().iter().map(|(_, m)| rustix::fs::fstat(&m.file).map_or(0, |s| s.st_blocks)).sum()
    }

    /// Sees to it that there is a file for new pages.
    pub(super) fn provide_file(&self) -> Result<(), Errno> {
        self.provide(&mut self.upkeep.lock())
    }

    pub(super) fn provide(&self, upkeep: &mut Upkeep) -> Result<(), Errno> {
        self.open_again(upkeep);
        let mut files = self.files.write();
        if files.current.is_some() {
            return Ok(());
        }
        let open = files.iter().find(|(_, m)| m.seal == Seal::Open).map(|(slot, _)| slot);
        let slot = match open {
            Some(slot) => slot,
            // At the bound there is no room for what has nowhere to go: the engine tries its next device.
            None if files.free() == 0 => return Err(Errno::NOSPC),
            None => {
                let slot = files.add(Member::new(self.site.another()?, false))?;
                self.tallies[slot.index()].dead.store(0, Relaxed);
                slot
            }
        };
        files.current = Some(slot);
        Ok(())
    }

    /// Opens sealed files again that nobody else uses any more. True if any was.
    pub(super) fn open_again(&self, upkeep: &mut Upkeep) -> bool {
        self.chores.died.store(0, Relaxed);
        let mut ours = ArrayVec::<Slot, MOST_FILES>::new();
        {
            let files = self.files.read();
            for (slot, member) in files.iter() {
                // Nobody new can appear: only a process that uses a file shares it, by a fork of its own.
                if member.seal == Seal::Sealed && lock::is_shared(member.file.as_fd()) == Ok(false) {
                    ours.push(slot);
                }
            }
        }
        if ours.is_empty() {
            return false;
        }
        let mut files = self.files.write();
        for (slot, member) in files.iter_mut().filter(|(slot, _)| ours.contains(slot)) {
            member.seal = Seal::Open;
            if self.tallies[slot.index()].dead.swap(0, Relaxed) > 0 {
                upkeep.thorough = self.dirty.count();
                self.chores.thorough.store(true, Relaxed);
            }
        }
        true
    }

    /// Closes files that hold nothing, so that their space returns. True if there was one.
    pub(super) fn close_empty(&self) -> bool {
        if !self.chores.empty_file.swap(false, Relaxed) {
            return false;
        }
        let empty = |files: &Files, slot: Slot, member: &Member| {
            // The current one will soon hold something again, and a name is kept.
            held(&self.tallies[slot.index()]) == 0 && !member.named && files.current != Some(slot)
        };
        let any = {
            let files = self.files.read();
            files.iter().any(|(slot, member)| empty(&files, slot, member))
        };
        if !any {
            return false;
        }
        let mut files = self.files.write();
        let mut gone = ArrayVec::<Slot, MOST_FILES>::new();
        gone.extend(files.iter().filter(|(slot, m)| empty(&files, *slot, m)).map(|(slot, _)| slot));
        files.close(|slot, _| gone.contains(&slot));
        !gone.is_empty()
    }

    /// Visits groups until there is little garbage, or `visits` were punched.
    fn collect(&self, upkeep: &mut Upkeep, visits: u64) {
        let files = self.files.read();
        let (mut visits, mut looks, mut words) = (visits, visits * LOOKS, WORDS);
        while visits > 0 && looks > 0 && words > 0 && self.punches.load(Relaxed) {
            if upkeep.thorough == 0 && self.garbage.load(Relaxed) <= self.allowance() {
                upkeep.least = DENSE;
                break;
            }
            let found = self.dirty.find(upkeep.cursor, &mut words);
            let reached = found.map_or_else(|at| at, |group| group + 1);
            let thorough = upkeep.thorough > 0;
            upkeep.thorough = upkeep.thorough.saturating_sub(reached - upkeep.cursor);
            upkeep.cursor = reached;
            if let Ok(group) = found {
                looks -= 1;
                visits -= self.visit(&files, group, upkeep.least, thorough).is_some() as u64;
            }
            if upkeep.cursor >= self.dirty.count() {
                upkeep.cursor = 0;
                upkeep.least = (upkeep.least / 2).max(1);
            }
        }
        self.chores.thorough.store(upkeep.thorough > 0, Relaxed);
    }

    /// Visits all groups, until holes were made of `enough` pages of garbage.
    fn collect_all(&self, upkeep: &mut Upkeep, enough: u64) {
        let files = self.files.read();
        let thorough = upkeep.thorough > 0;
        let mut at = 0;
        let mut done = 0;
        while done < enough && at < self.dirty.count() && self.punches.load(Relaxed) {
            match self.dirty.find(at, &mut { WORDS }) {
                Ok(group) => {
                    done += self.visit(&files, group, 1, thorough).unwrap_or(0);
                    at = group + 1;
                }
                Err(reached) => at = reached,
            }
        }
        if at >= self.dirty.count() {
            upkeep.thorough = 0;
            self.chores.thorough.store(false, Relaxed);
        }
    }

    /// Punches holes in a group, if it has at least `least` pages of garbage, or everything there that no file
    /// should have, if `thorough`. Returns how many pages of garbage are gone; `None` if it did not try.
    fn visit(&self, files: &Files, group: u64, least: u64, thorough: bool) -> Option<u64> {
        self.dirty.clear(group);
        let pages = self.layout.group(group);
        let mut garbage = 0;
        for page in pages.clone() {
            let record = self.table.get(page);
            if record.kind() != Kind::Garbage {
                continue;
            }
            if files.is_sealed(record.slot()) && self.table.forget(page) {
                // From before a fork: the other process may need it. Found again by a thorough round.
                self.garbage.fetch_sub(1, Relaxed);
                self.tallies[record.slot().index()].dead.fetch_add(1, Relaxed);
            } else {
                garbage += 1;
            }
        }
        let worth_it = thorough || garbage >= least;
        // What died in a sealed file waits for that to be opened again.
        if files.any_sealed() || (garbage > 0 && !worth_it) {
            self.dirty.mark(pages.start, 1);
        }
        if !worth_it {
            return None;
        }
        let mut in_hand = [0u64; GROUP as usize / 64];
        for (i, page) in pages.clone().enumerate() {
            in_hand[i / 64] |= (self.table.claim(page) as u64) << (i % 64);
        }
        let mut open = files.iter().filter(|(_, m)| m.seal == Seal::Open);
        let failed = open.any(|(slot, m)| self.punch_runs(files, slot, m, pages.clone(), thorough).is_err());
        let mut gone = 0;
        for (_, page) in pages.clone().enumerate().filter(|(i, _)| in_hand[i / 64] >> (i % 64) & 1 == 1) {
            gone += (!failed && self.table.get(page).was_garbage()) as u64;
            self.table.unclaim(page, failed);
        }
        self.garbage.fetch_sub(gone, Relaxed);
        if failed {
            self.dirty.mark(pages.start, 1);
        }
        Some(gone)
    }

    /// Punches holes into one file, in one group.
    fn punch_runs(
        &self,
        files: &Files,
        slot: Slot,
        member: &Member,
        pages: Range<u64>,
        thorough: bool,
    ) -> Result<(), Errno> {
        let may_go = |page: u64| {
            let record = self.table.get(page);
            match record.kind() {
                Kind::Punching => true,
                Kind::Held | Kind::Garbage => thorough && record.slot() != slot && files.is_open(record.slot()),
                Kind::Nothing => false,
            }
        };
        let mut at = pages.start;
        while at < pages.end {
            let end = (at..pages.end).find(|p| !may_go(*p)).unwrap_or(pages.end);
            let mut run = at..end;
            if !thorough {
                // No further than there is garbage of this file.
                let mut garbage = run.clone().filter(|p| self.table.get(*p).is_garbage_in_hand(slot));
                let first = garbage.next();
                let last = garbage.last().or(first);
                run = first.unwrap_or(end)..last.map_or(end, |p| p + 1);
            }
            if !run.is_empty() {
                self.punch(member, run.start, run.end - run.start)?;
            }
            at = end + 1;
        }
        Ok(())
    }

    fn punch(&self, member: &Member, first: u64, count: u64) -> Result<(), Errno> {
        let (at, len) = (self.layout.offset(first), self.layout.len(count));
        let done = rustix::io::retry_on_intr(|| self.raw.punch(member.file.as_fd(), at, len));
        if let Err(Errno::OPNOTSUPP | Errno::NOSYS) = done {
            // The file system cannot: the space is used again, not returned.
            self.punches.store(false, Relaxed);
        }
        done
    }
}
