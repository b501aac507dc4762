//! Upkeep: returning the space of pages that were freed, and what else need not be done at once.
//!
//! Punching a hole costs as much as writing a page did, or more, however small the hole is; and a page that was
//! freed is likely to be stored again soon. So freeing a page only makes it *garbage*. When there is more garbage
//! than the [allowance](Disk::allowance) the collector goes round the groups of pages that have some, and punches
//! the longest runs first: whole groups, then half ones, and so on, down to [`LEAST`]. It makes a hole or two in a
//! store, and in one of many frees. Shorter runs wait for their neighbours or for being stored again, unless the
//! file system is full: then, as when asked to [trim](Disk::trim), it takes whatever there is.
//!
//! What is left in a file that was sealed once (pages freed or written anew elsewhere in the meantime) has no
//! record. After a file is open again a *thorough* round punches everything in it that is not held by it.
//!
//! Locks: one thread at a time does upkeep, under a lock of its own, which is taken before the files' and only ever
//! tried where a transfer would have to wait. The collector takes the pages of a run in hand that have no content
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

/// The shortest run that is worth a hole, when nobody asks for more.
const LEAST: u64 = 8;
/// Groups looked at for each hole that may be punched.
const LOOKS: u64 = 8;
/// Words of the bitmap of groups looked at in one go.
const WORDS: u64 = 4096;
/// Deaths in sealed files after which it is asked again whether they are still shared.
const DEATHS: u64 = 1024;

/// Where the collector is.
#[derive(Debug)]
pub(super) struct Upkeep {
    /// The next group to look at.
    cursor: u64,
    /// The shortest run that is punched in this round.
    least: u64,
    /// A hole was punched in this round.
    punched: bool,
    /// Groups of a thorough round that are left.
    thorough: u64,
    /// Some file may have content without a record.
    stale: bool,
}

impl Upkeep {
    pub(super) fn new() -> Upkeep {
        Upkeep { cursor: 0, least: GROUP, punched: false, thorough: 0, stale: false }
    }
}

/// How a group is visited.
#[derive(Debug, Clone, Copy)]
struct Visit {
    /// The shortest run to punch.
    least: u64,
    /// Content without a record is looked for, too.
    thorough: bool,
    /// Holes to make at most.
    holes: u64,
}

/// What a visit achieved.
#[derive(Debug, Clone, Copy, Default)]
struct Visited {
    /// Holes made, or tried.
    holes: u64,
    /// Pages of garbage that are gone.
    pages: u64,
    /// There is more to be had.
    left: bool,
}

impl<R: Raw> Disk<R> {
    /// Does some upkeep if any is due and nobody else does: at most `holes` of them. The caller holds no lock.
    pub(super) fn tidy_up(&self, holes: u64) {
        let died = self.chores.died.load(Relaxed);
        let due = died >= DEATHS
            || self.chores.empty_file.load(Relaxed)
            || self.chores.thorough.load(Relaxed)
            || self.garbage.load(Relaxed) > self.allowance().max(self.chores.quiet.load(Relaxed));
        if !due {
            return;
        }
        let Some(mut upkeep) = self.upkeep.try_lock() else { return };
        if died >= DEATHS {
            self.open_again(&mut upkeep);
        }
        self.close_empty();
        self.collect(&mut upkeep, holes);
    }

    /// Returns all space that is not needed. Takes as long as that takes.
    pub(super) fn trim(&self) {
        let mut upkeep = self.upkeep.lock();
        self.open_again(&mut upkeep);
        self.close_empty();
        self.collect_all(&mut upkeep, 1, u64::MAX);
    }

    /// Returns space so that `pages` pages can be stored. False if there was none to return.
    pub(super) fn make_room(&self, pages: u64) -> bool {
        let mut upkeep = self.upkeep.lock();
        self.open_again(&mut upkeep);
        let closed = self.close_empty();
        let before = self.blocks();
        // More than needed, since the next stores will want some too; where much can be had by one hole if possible.
        let mut enough = pages.saturating_mul(2).max(64);
        for least in [GROUP / 8, LEAST, 1] {
            enough = enough.saturating_sub(self.collect_all(&mut upkeep, least, enough));
        }
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
                upkeep.stale = true;
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

    /// Visits groups until there is little garbage, or `holes` were punched.
    fn collect(&self, upkeep: &mut Upkeep, holes: u64) {
        let files = self.files.read();
        let (mut holes, mut looks, mut words) = (holes, holes * LOOKS, WORDS);
        while holes > 0 && looks > 0 && words > 0 && self.punches.load(Relaxed) {
            let thorough = upkeep.thorough > 0;
            if !thorough && self.garbage.load(Relaxed) <= self.allowance() {
                upkeep.least = GROUP;
                self.chores.quiet.store(0, Relaxed);
                break;
            }
            let found = self.dirty.find(upkeep.cursor, &mut words);
            let mut reached = found.map_or_else(|at| at, |group| group + 1);
            if let Ok(group) = found {
                looks -= 1;
                let least = if thorough { LEAST } else { upkeep.least };
                let visited = self.visit(&files, group, Visit { least, thorough, holes });
                holes -= visited.holes;
                upkeep.punched |= visited.holes > 0;
                if visited.left && holes == 0 {
                    reached = group; // here it goes on
                }
            }
            upkeep.thorough = upkeep.thorough.saturating_sub(reached - upkeep.cursor);
            upkeep.cursor = reached;
            if reached >= self.dirty.count() && !self.next_round(upkeep) {
                break;
            }
        }
        self.chores.thorough.store(upkeep.thorough > 0, Relaxed);
    }

    /// Begins another round. False if that makes no sense, for now.
    fn next_round(&self, upkeep: &mut Upkeep) -> bool {
        let in_vain = upkeep.least == LEAST && !upkeep.punched && upkeep.thorough == 0;
        upkeep.cursor = 0;
        upkeep.punched = false;
        upkeep.least = if in_vain { GROUP } else { (upkeep.least / 2).max(LEAST) };
        if in_vain {
            // What there is lies scattered. When there is more, it may be otherwise.
            let garbage = self.garbage.load(Relaxed);
            self.chores.quiet.store(garbage + garbage / 8 + GROUP, Relaxed);
        }
        !in_vain
    }

    /// Visits all groups, until holes were made of `enough` pages of garbage. Returns of how many they were.
    fn collect_all(&self, upkeep: &mut Upkeep, least: u64, enough: u64) -> u64 {
        let files = self.files.read();
        let thorough = upkeep.stale;
        let mut at = 0;
        let mut done = 0;
        while done < enough && at < self.dirty.count() && self.punches.load(Relaxed) {
            match self.dirty.find(at, &mut { WORDS }) {
                Ok(group) => {
                    done += self.visit(&files, group, Visit { least, thorough, holes: u64::MAX }).pages;
                    at = group + 1;
                }
                Err(reached) => at = reached,
            }
        }
        if least == 1 && at >= self.dirty.count() {
            upkeep.stale = false;
            upkeep.thorough = 0;
            self.chores.thorough.store(false, Relaxed);
        }
        done
    }

    /// Punches holes in a group.
    fn visit(&self, files: &Files, group: u64, how: Visit) -> Visited {
        self.dirty.clear(group);
        let pages = self.layout.group(group);
        // What was garbage before a fork may be the other process's. A thorough round finds it again.
        for page in pages.clone() {
            let record = self.table.get(page);
            let sealed = record.kind() == Kind::Garbage && files.is_sealed(record.slot());
            if sealed && self.table.forget(page) {
                self.garbage.fetch_sub(1, Relaxed);
                self.tallies[record.slot().index()].dead.fetch_add(1, Relaxed);
            }
        }
        let mut visited = Visited::default();
        for (slot, member) in files.iter().filter(|(_, m)| m.seal == Seal::Open) {
            let mut at = pages.start;
            while let Some(run) = self.next_run(files, slot, at..pages.end, how.thorough) {
                at = run.pages.end;
                if run.weight < how.least || visited.holes >= how.holes {
                    visited.left = true;
                    continue;
                }
                visited.holes += 1;
                match self.punch_run(files, (slot, member), run.pages, how.thorough) {
                    Ok(gone) => visited.pages += gone,
                    Err(_) => visited.left = true,
                }
            }
        }
        // What died in a sealed file waits for that to be opened again.
        if visited.left || files.any_sealed() {
            self.dirty.mark(pages.start, 1);
        }
        visited
    }

    /// Whether file `slot` needs no space for `page`.
    fn may_go(&self, files: &Files, slot: Slot, page: u64, thorough: bool) -> MayGo {
        let record = self.table.get(page);
        let other = record.slot() != slot;
        match record.kind() {
            Kind::Nothing => MayGo::InHand { garbage: false },
            Kind::Garbage if !other || files.get(record.slot()).is_none() => MayGo::InHand { garbage: true },
            Kind::Held | Kind::Garbage if thorough && other && files.is_open(record.slot()) => MayGo::AsItIs,
            _ => MayGo::No,
        }
    }

    /// The first run in `pages` that can be punched in file `slot`, and that has something in it.
    fn next_run(&self, files: &Files, slot: Slot, pages: Range<u64>, thorough: bool) -> Option<Run> {
        let may_go = |page: &u64| self.may_go(files, slot, *page, thorough);
        let worth = |page: &u64| thorough || may_go(page) == MayGo::InHand { garbage: true };
        let mut at = pages.start;
        while at < pages.end {
            let start = (at..pages.end).find(|p| may_go(p) != MayGo::No && worth(p))?;
            let end = (start..pages.end).find(|p| may_go(p) == MayGo::No).unwrap_or(pages.end);
            // No further than there is something to be had.
            if let Some(last) = (start..end).rev().find(worth) {
                let weight = (start..=last).filter(worth).count() as u64;
                return Some(Run { pages: start..last + 1, weight });
            }
            at = end + 1; // it has been stored again meanwhile
        }
        None
    }

    /// Punches as much of a run as is still there, from its start. Returns how many pages of garbage are gone.
    fn punch_run(
        &self,
        files: &Files,
        (slot, member): (Slot, &Member),
        pages: Range<u64>,
        thorough: bool,
    ) -> Result<u64, Errno> {
        let mut in_hand = [0u64; GROUP as usize / 64];
        let bit = |page: u64| ((page - pages.start) as usize / 64, 1 << ((page - pages.start) % 64));
        let mut end = pages.start;
        for page in pages.clone() {
            match self.may_go(files, slot, page, thorough) {
                MayGo::InHand { .. } if self.table.claim(page) => in_hand[bit(page).0] |= bit(page).1,
                MayGo::AsItIs => {}
                MayGo::InHand { .. } | MayGo::No => break,
            }
            end = page + 1;
        }
        let done = if end > pages.start { self.punch(member, pages.start, end - pages.start) } else { Ok(()) };
        let mut gone = 0;
        for page in (pages.start..end).filter(|p| in_hand[bit(*p).0] & bit(*p).1 != 0) {
            gone += (done.is_ok() && self.table.get(page).was_garbage()) as u64;
            self.table.unclaim(page, done.is_err());
        }
        self.garbage.fetch_sub(gone, Relaxed);
        done.map(|()| gone)
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

/// What may be done about a page in a file that need not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MayGo {
    /// Nothing: it must have it, or may come to.
    No,
    /// It can be punched while it is in hand.
    InHand { garbage: bool },
    /// Another open file has it, and keeps it.
    AsItIs,
}

/// Pages that can be punched by one hole.
#[derive(Debug)]
struct Run {
    pages: Range<u64>,
    /// How many of them there is a reason to punch for.
    weight: u64,
}
