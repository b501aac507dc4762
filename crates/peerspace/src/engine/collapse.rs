//! Collapse: the small pages of a block become one huge folio again (rules H3, H4, H12).
//!
//! The kernel puts the bytes together in place, so that there is no moment at which the program misses them. What is
//! seen to here is that the block is one that can be: all of its pages mapped and writable, nobody relying on where one
//! of them is. From the last look to the new entry all entries of the block are locked, which keeps everybody else away
//! from it; a fault waits.
//!
//! In the background ([`Engine::serve_collapse`]) blocks are looked through in turn, in a bounded share of the time, and
//! those are chosen that lack few pages ([`MOST_MISSING`]), since what they lack becomes memory that the program did not ask
//! for, and of which not too many are clean ([`MOST_CLEAN`]).
//!
//! # Why it is left to the kernel
//!
//! Where small pages were mapped there is a page table, and a huge page moved in is broken up at once. To have the table freed,
//! the empty block would have to be discarded, which destroys whatever the program has put there since; and making a huge page
//! and freeing small ones costs as much in either way. `MADV_COLLAPSE` needs neither. It takes unprotected pages only, which is
//! why blocks that are mostly clean are left alone.

use super::serve::await_bell;
use super::stats::count;
use super::{Engine, fault, time_of_thread};
use peerspace_core::addr::{Access, BLOCK_PAGES, Order, PageRange, Vpn};
use peerspace_core::entry::{Dirt, Entry as Word, State};
use peerspace_core::memmap::{Arrival, Backing, ListId};
use peerspace_core::regions::Attributes;
use peerspace_os::{Kernel, Trouble, Wake};
use std::time::Duration;

/// Pages of a block that may be missing for a collapse in the background: less than a tenth.
pub(crate) const MOST_MISSING: u64 = BLOCK_PAGES / 10;
/// Pages that may be clean. A huge page cannot be protected from its first moment on, so they have to be stored anew when
/// the block leaves.
const MOST_CLEAN: u64 = BLOCK_PAGES / 2;
/// The scanner rests so many times as long as it has worked: the time of a processor that it has taken up. The kernel lets
/// it wait for other processors as well, which takes nothing from anybody.
const REST: u32 = 19;
/// And at least so long, so that it does not run for every block.
const LEAST_REST: Duration = Duration::from_millis(2);
/// From the end of one round to the next, as long as there are faults.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(500);
/// It works at most so long between rests, and looks at no more blocks than this.
const WORK: Duration = Duration::from_millis(2);
const BLOCKS_AT_ONCE: usize = 64;

/// Why a block was not collapsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoCollapse {
    /// It is one huge folio already.
    Huge,
    /// It is not inside a region, or the region or this kernel has no huge pages.
    Unsuitable,
    /// Pages are missing, or protected, and were not to be brought.
    Sparse,
    /// Somebody relies on where its pages are, or works with them just now.
    Busy,
    /// There is no frame or no memory for it.
    NoRoom,
}

impl<K: Kernel> Engine<K> {
    /// Makes the block at `start` one huge folio, bringing what is missing, zeros included. Without a context.
    pub(crate) fn collapse(&self, start: Vpn) -> Result<(), NoCollapse> {
        self.try_collapse(start).inspect_err(|e| {
            if *e == NoCollapse::NoRoom {
                count(&self.contexts.take().counters.collapses_failed);
            }
        })
    }

    fn try_collapse(&self, start: Vpn) -> Result<(), NoCollapse> {
        let pages = PageRange::block(start.block());
        let region = self.region(pages.start).ok_or(NoCollapse::Unsuitable)?;
        let never = region.attributes.has_any(Attributes::NO_HUGE.with(Attributes::IN_PLACE));
        if !self.block_inside(region, pages.start) || never || !self.has_huge() {
            return Err(NoCollapse::Unsuitable);
        }
        // The kernel collapses no page that is protected, and none that is not there.
        for vpn in pages.iter() {
            match self.table.look(vpn).map(|(entry, whole)| (entry.state(), whole)) {
                Some((State::Host { .. }, true)) => return Err(NoCollapse::Huge),
                Some((State::Host { writable: true, .. }, false)) => {}
                Some((State::Poisoned { .. }, _)) => return Err(NoCollapse::Unsuitable),
                // A device uses it: it is where it is wanted.
                Some((state, _)) if state.is_on_mmus() => return Err(NoCollapse::Busy),
                Some(_) => {
                    let _ = self.fault(self.geometry.va(vpn), Access::Write, Wake::Yes, fault::Patience::Waits);
                    self.track(vpn);
                }
                None => return Err(NoCollapse::Unsuitable),
            }
        }
        self.join_block(pages)
    }

    /// Joins a block, all of whose pages should be mapped and writable.
    fn join_block(&self, pages: PageRange) -> Result<(), NoCollapse> {
        let work = self.contexts.take();
        let frame = self.memmap.take_block().ok_or_else(|| {
            self.service.want_blocks(&self.kernel.park());
            NoCollapse::NoRoom
        })?;
        let (mut why, mut proven, mut gathered) = (NoCollapse::Busy, 0, false);
        let joined = self.table.join(pages.start.block(), |page| {
            let state = |i: u64| page(i as usize).state();
            let part = |i: u64| match state(i) {
                State::Host { pfn, .. } => self.memmap.page(pfn),
                _ => unreachable!("all pages are mapped"),
            };
            for i in 0..BLOCK_PAGES {
                match state(i) {
                    State::Host { pfn, writable: true, .. } if self.memmap.pins(self.memmap.page(pfn)) == 0 => {}
                    State::Host { writable: true, .. } => return None,
                    _ => {
                        why = NoCollapse::Sparse;
                        return None;
                    }
                }
            }
            let collapsed = match self.gate.enter(work.context()) {
                Some(_section) => self.kernel.collapse(self.addresses(pages)),
                None => Err(Trouble::Changing),
            };
            if let Err(t) = collapsed {
                why = match t {
                    Trouble::NoMemory => NoCollapse::NoRoom,
                    Trouble::Unsuitable => NoCollapse::Unsuitable,
                    _ => NoCollapse::Busy,
                };
                return None;
            }
            let head = self.memmap.head(part(0));
            if head != part(0) && (0..BLOCK_PAGES).all(|i| part(i) == self.memmap.page(self.memmap.pfn(head) + i)) {
                // One folio all the time; only its mapping was split.
                for part in (0..BLOCK_PAGES).map(part) {
                    self.free_backing(self.memmap.backing(part), Order::BASE);
                }
                self.memmap.gather(head);
                gathered = true;
                return Some(Word::new(State::Host {
                    pfn: self.memmap.pfn(head),
                    writable: true,
                    dirt: Dirt::Dirty,
                }));
            }
            for part in (0..BLOCK_PAGES).map(part) {
                proven += (self.memmap.list(self.memmap.head(part)) == ListId::Main) as u64;
                self.free_backing(self.memmap.backing(part), Order::BASE);
            }
            // The pages as they were are no more; their memory is that of the huge one, which stays charged.
            self.unmap_all_gone((0..BLOCK_PAGES).map(part));
            Some(Word::new(State::Host { pfn: self.memmap.pfn(frame), writable: true, dirt: Dirt::Dirty }))
        });
        let Ok(Some(entry)) = joined else {
            self.memmap.reset(frame);
            self.memmap.give_back(frame);
            return Err(why);
        };
        count(&work.counters.huge_mapped);
        if gathered {
            drop(entry);
            self.memmap.reset(frame);
            self.memmap.give_back(frame);
            return Ok(());
        }
        self.memmap.reset(frame);
        self.memmap.place(frame, pages.start, self.life());
        self.memmap.set_backing(frame, Backing::None);
        self.memmap.map(frame);
        // To be huge does not make it worth more than its pages were.
        self.announce(frame, if proven > BLOCK_PAGES / 2 { Arrival::Reuse } else { Arrival::New });
        drop(entry);
        count(&work.counters.collapses);
        Ok(())
    }

    /// Collapses blocks that have become dense, until stopped.
    pub(crate) fn serve_collapse(&self) {
        let park = self.kernel.park();
        await_bell(self.service.started(), &park);
        while !self.service.stopped() {
            await_bell(self.service.collapse_bell(), &park);
            // As long as the program goes on to use what it had not, there is something to look for.
            let mut before = None;
            while !self.service.stopped() {
                let faults = self.sums().faults;
                if before.replace(faults) == Some(faults) {
                    break;
                }
                if self.service.blocks_wanted() {
                    self.compact();
                }
                while self.collapse_all() > 0 {}
                self.nap(BETWEEN_ROUNDS);
            }
            self.service.answer_collapse();
        }
    }

    /// Goes through all there is once, and rests in between. Returns how many blocks were collapsed.
    fn collapse_all(&self) -> u64 {
        let mut hand = Some(Vpn(0));
        let mut collapsed = 0;
        while let Some(from) = hand.filter(|_| !self.service.stopped()) {
            let started = time_of_thread();
            let (next, n) = self.collapse_some(from);
            hand = next;
            collapsed += n;
            self.nap(((time_of_thread() - started) * REST).max(LEAST_REST));
        }
        collapsed
    }

    fn nap(&self, mut rest: Duration) {
        /// The longest at once: whoever ends the service waits for it.
        const NAP: Duration = Duration::from_millis(5);
        while !rest.is_zero() && !self.service.stopped() {
            crate::sync::sleep(rest.min(NAP));
            rest = rest.saturating_sub(NAP);
        }
    }

    /// Looks at some blocks from `hand` on. Returns where to go on, if there is more, and how many were collapsed.
    fn collapse_some(&self, hand: Vpn) -> (Option<Vpn>, u64) {
        let mut at = hand;
        let mut collapsed = 0;
        let started = time_of_thread();
        for _ in 0..BLOCKS_AT_ONCE {
            if time_of_thread() - started >= WORK {
                break;
            }
            let Some(region) = self.regions.next(at) else { return (None, collapsed) };
            at = at.max(region.range.start);
            let block = PageRange::block(at.block());
            at = block.end;
            let never = [Attributes::NO_HUGE, Attributes::ON_REQUEST, Attributes::LEAVING];
            if !never.iter().any(|a| region.attributes.has(*a))
                && region.range.covers(block)
                // Where there is no room for what is missing, something else would have to leave for it.
                && self.missing(block).is_some_and(|n| (n as i64) < self.budget.left())
            {
                match self.collapse(block.start) {
                    Ok(()) => collapsed += 1,
                    Err(NoCollapse::NoRoom) => return (None, collapsed),
                    Err(_) => {}
                }
            }
        }
        (Some(at), collapsed)
    }

    /// How many pages a block that is split lacks, if they are few; and not too many are clean.
    fn missing(&self, block: PageRange) -> Option<u64> {
        let (mut missing, mut clean) = (0, 0);
        for vpn in block.iter() {
            match self.table.look(vpn).map(|(entry, whole)| (entry.state(), whole)) {
                Some((State::Host { writable, .. }, false)) => clean += !writable as u64,
                Some((State::Poisoned { .. }, _) | (_, true)) | None => return None,
                Some((state, _)) if state.is_on_mmus() => return None,
                Some(_) => missing += 1,
            }
            if missing > MOST_MISSING || clean > MOST_CLEAN {
                return None;
            }
        }
        Some(missing)
    }
}
