//! Compaction: room for huge folios where single pages have it.
//!
//! A block frame whose folio was split is free when its last part is. Until then it is no huge folio's, however few parts
//! are left; where many blocks were split and used sparsely after, huge folios could not be had any more although there is
//! memory for them. So the parts that are left move to frames of their own. That is a change of descriptors: the page
//! stays where the program has it, or in its slot.

use super::stats::{Counters, count};
use super::{Engine, Entry};
use peerspace_core::addr::BLOCK_PAGES;
use peerspace_core::entry::State;
use peerspace_core::memmap::{Arrival, Frame, ListId};
use peerspace_os::Kernel;

/// Block frames emptied in one go: enough for as many huge folios.
const AT_ONCE: u32 = 8;

impl<K: Kernel> Engine<K> {
    /// Empties block frames of which few parts are left, fewest first. Returns how many became free.
    pub(crate) fn compact(&self) -> u32 {
        let work = self.contexts.take();
        // What is queued to be split lies in block frames too.
        while self.split_deferred(&work.counters) {}
        let mut freed = 0;
        // Twice as many parts at each pass: what is cheap comes first.
        let mut most = 1;
        while freed < AT_ONCE && most < BLOCK_PAGES {
            for i in 0..self.memmap.block_frames() {
                let head = Frame(i);
                if self.memmap.parts_left(head).is_some_and(|left| left <= most && left * 2 > most) {
                    freed += self.empty(head, &work.counters) as u32;
                }
                if freed == AT_ONCE {
                    break;
                }
            }
            most *= 2;
        }
        freed
    }

    /// Moves the parts of a split block that are left to frames of their own. True if that was all of them.
    fn empty(&self, head: Frame, counters: &Counters) -> bool {
        for i in 0..BLOCK_PAGES {
            let part = self.memmap.page(self.memmap.pfn(head) + i);
            // Scanners look at what may be freed at any moment (H10).
            if !self.get_frame(part) {
                continue;
            }
            let entry = self.table.try_lock(self.memmap.vpn(part)).ok().flatten();
            let moved = entry.is_some_and(|entry| self.move_part(entry, part));
            self.put_frame(part);
            count(if moved { &counters.compact_migrated } else { &counters.compact_failed });
        }
        // The last reference frees the block. If it is another's by now, that one is not split.
        self.memmap.parts_left(head).is_none()
    }

    /// Moves what `part` holds, if `entry` says so, to a frame of its own.
    fn move_part(&self, mut entry: Entry<'_, K>, part: Frame) -> bool {
        let pfn = self.memmap.pfn(part);
        let ours = match entry.state() {
            State::Host { pfn: p, .. } => p == pfn && self.memmap.pins(part) == 0,
            // What lies in the block's own staging leaves with the standby.
            State::Standby { pfn: p, .. } => p == pfn && self.memmap.slot(part).is_some(),
            _ => false,
        };
        if entry.is_whole() || !ours {
            return false;
        }
        let Some(frame) = self.memmap.take_small() else { return false };
        let mut arrival = self.memmap.arrival(part);
        if matches!(entry.state(), State::Host { .. }) {
            if self.memmap.list(part) == ListId::Main {
                arrival = Arrival::Reuse;
            }
            self.retract(part);
        }
        self.memmap.take_over(frame, part);
        match entry.state() {
            State::Host { writable, dirt, .. } => {
                let _ = self.memmap.unmap(part);
                self.memmap.map(frame);
                self.announce(frame, arrival);
                entry.set(State::Host { pfn: self.memmap.pfn(frame), writable, dirt });
            }
            State::Standby { dirt, .. } => {
                let slot = self.memmap.slot(part);
                self.memmap.set_slot(frame, slot);
                self.ring.occupy(slot.expect("it is in one"), frame);
                entry.set(State::Standby { pfn: self.memmap.pfn(frame), dirt });
            }
            _ => unreachable!("looked at above"),
        }
        drop(entry);
        self.free_frame(part, false);
        true
    }
}
