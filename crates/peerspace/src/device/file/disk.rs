//! What a device over files consists of, and the accounts that are kept of it.
//!
//! ```text
//!  transfer  stores and loads       ┐
//!  collect   returns space          ├── all work on a Disk
//!  fork      seals, opens, merges   ┘
//! ```
//!
//! Locks, in the order in which they are taken: upkeep, files, bounce. Stores and loads take `files` for reading and
//! nothing before it; only when they have let go of it may they do upkeep. The counters are exact when nothing is in
//! flight, and otherwise may run ahead of the records, never behind: so they never fall below zero.

use super::collect::Upkeep;
use super::files::{Files, Member, Tally};
use super::layout::Layout;
use super::open::{Opened, Site};
use super::raw::Raw;
use super::record::{Afterwards, Groups, Kind, MOST_FILES, Record, Slot, Table, checksum};
use crate::device::{DevicePages, Usage};
use crate::sync::{Mutex, RwLock};
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering::Relaxed};
use peerspace_os::Trouble;
use peerspace_os::own::Buffer;

/// Pages that the bounce buffer has room for.
pub(super) const BOUNCE: u64 = 64;

/// A device over files, reached through `R`.
#[derive(Debug)]
pub(super) struct Disk<R> {
    pub(super) raw: R,
    pub(super) layout: Layout,
    pub(super) site: Site,
    /// Transfers go past the page cache, and buffers must be aligned for that.
    pub(super) direct: bool,
    /// Holes can be punched. Found out again at each.
    pub(super) punches: AtomicBool,
    pub(super) table: Table,
    pub(super) dirty: Groups,
    pub(super) files: RwLock<Files>,
    pub(super) tallies: [Tally; MOST_FILES],
    pub(super) upkeep: Mutex<Upkeep>,
    /// Something is to be done that is not about garbage: see [`super::collect`].
    pub(super) chores: Chores,
    /// For buffers that are not aligned, and for moving pages between files.
    pub(super) bounce: Mutex<Buffer>,
    /// Pages held, in all files together.
    pub(super) held: AtomicU64,
    /// Pages that are garbage.
    pub(super) garbage: AtomicU64,
    /// The most pages that took up space.
    peak: AtomicU64,
    /// Pages freed so far.
    pub(super) freed: AtomicU64,
}

/// Why upkeep is due.
#[derive(Debug, Default)]
pub(super) struct Chores {
    /// A file may have become empty.
    pub(super) empty_file: AtomicBool,
    /// A thorough round is under way.
    pub(super) thorough: AtomicBool,
    /// Garbage below which it is not worth to look for any.
    pub(super) quiet: AtomicU64,
    /// Pages that died in sealed files since it was last asked whether those are still shared.
    pub(super) died: AtomicU64,
}

/// Changes of the accounts that one run of pages makes, to be entered at once.
#[derive(Debug, Default)]
struct Changes {
    fresh: u64,
    gained: u64,
    from_garbage: u64,
}

impl<R: Raw> Disk<R> {
    pub(super) fn new(opened: Opened, raw: R) -> Result<Disk<R>, Trouble> {
        let Opened { file, named, site, layout, direct, punch, .. } = opened;
        Ok(Disk {
            raw,
            layout,
            site,
            direct: direct.is_ok(),
            punches: AtomicBool::new(punch.is_ok()),
            table: Table::new(layout.pages)?,
            dirty: Groups::new(layout.pages)?,
            files: RwLock::new(Files::new(Member::new(file, named))),
            tallies: [const { Tally { held: AtomicU64::new(0), dead: AtomicU64::new(0) } }; MOST_FILES],
            upkeep: Mutex::new(Upkeep::new()),
            chores: Chores::default(),
            bounce: Mutex::new(Buffer::new(layout.len(BOUNCE) as usize)?),
            held: AtomicU64::new(0),
            garbage: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            freed: AtomicU64::new(0),
        })
    }

    /// Notes that the pages from `first` on are about to be written with `bytes`, as far as they go to the same
    /// file. Returns that file, and how many pages they are: at least one, if there are bytes for it.
    pub(super) fn hold(&self, files: &Files, current: Slot, first: u64, bytes: &[u8]) -> (Slot, u64) {
        let mut changes = Changes::default();
        let mut to = None;
        let mut page = first;
        for content in bytes.chunks_exact(self.layout.page()) {
            let held = self.table.hold(page, checksum(content), |before| {
                let target = files.target(before, current);
                to.is_none_or(|slot| slot == target).then_some(target)
            });
            let Some((before, slot)) = held else { break };
            self.enter(files, page, before, slot, &mut changes);
            to = Some(slot);
            page += 1;
        }
        let slot = to.unwrap_or(current);
        self.settle(slot, changes);
        (slot, page - first)
    }

    /// Enters that `page` is held by `slot` now, and was `before`.
    fn enter(&self, files: &Files, page: u64, before: Record, slot: Slot, changes: &mut Changes) {
        match before.kind() {
            Kind::Held if before.slot() == slot => return,
            Kind::Held => self.died(page, before.slot(), true),
            Kind::Garbage => {
                changes.from_garbage += 1;
                changes.fresh += 1;
                if before.slot() != slot && files.is_sealed(before.slot()) {
                    self.died(page, before.slot(), false);
                }
            }
            Kind::Nothing | Kind::Punching => changes.fresh += 1,
        }
        changes.gained += 1;
    }

    fn settle(&self, slot: Slot, changes: Changes) {
        self.tallies[slot.index()].held.fetch_add(changes.gained, Relaxed);
        let held = self.held.fetch_add(changes.fresh, Relaxed) + changes.fresh;
        let garbage = self.garbage.fetch_sub(changes.from_garbage, Relaxed) - changes.from_garbage;
        if held + garbage > self.peak.load(Relaxed) {
            self.peak.fetch_max(held + garbage, Relaxed);
        }
    }

    /// A page that sealed file `slot` has is needed no more. `held`: it was counted as held there.
    fn died(&self, page: u64, slot: Slot, held: bool) {
        let tally = &self.tallies[slot.index()];
        tally.dead.fetch_add(1, Relaxed);
        self.dirty.mark(page, 1);
        self.chores.died.fetch_add(1, Relaxed);
        if held && tally.held.fetch_sub(1, Relaxed) == 1 {
            self.chores.empty_file.store(true, Relaxed);
        }
    }

    /// Lets go of pages, whatever they are. Those that are not held are of no account.
    pub(super) fn let_go(&self, files: &Files, pages: DevicePages) {
        let pages = self.layout.clip(pages);
        let most = pages.end.saturating_sub(pages.start);
        // Ahead of the records: the collector may come at once.
        self.garbage.fetch_add(most, Relaxed);
        let mut garbage = 0;
        let mut page = pages.start;
        while page < pages.end {
            let Some((slot, run)) = self.table.run(page, pages.end - page) else {
                page += 1;
                continue;
            };
            let open = files.is_open(slot);
            for p in page..page + run {
                if open {
                    self.table.let_go(p, Afterwards::Garbage);
                } else {
                    self.table.let_go(p, Afterwards::Nothing);
                    self.died(p, slot, true);
                }
            }
            if open {
                garbage += run;
                self.dirty.mark(page, run);
                if self.tallies[slot.index()].held.fetch_sub(run, Relaxed) == run {
                    self.chores.empty_file.store(true, Relaxed);
                }
            }
            self.held.fetch_sub(run, Relaxed);
            page += run;
        }
        self.garbage.fetch_sub(most - garbage, Relaxed);
    }

    pub(super) fn usage(&self) -> Usage {
        let used = self.held.load(Relaxed) + self.garbage.load(Relaxed);
        Usage { used_bytes: self.layout.len(used), peak_bytes: self.layout.len(self.peak.load(Relaxed).max(used)) }
    }

    /// Pages of garbage that are left alone, because they are likely to be written again: an eighth of what is held,
    /// and 16 MiB, or less in a small file.
    pub(super) fn allowance(&self) -> u64 {
        let bit = (16 << 20) / self.layout.page() as u64;
        self.held.load(Relaxed) / 8 + bit.min(self.layout.pages / 16)
    }
}
