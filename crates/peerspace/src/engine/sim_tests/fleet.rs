//! What devices may map beside each other and beside the CPU, looked at from outside of the engine.
//!
//! All chips of a [`Fleet`] share one lock, under which it is checked what the engine owes them, at the moment of each call: that
//! who may write is alone, that what is mapped is there, and that nothing is moved or freed that somebody maps. A panic would be
//! taken for the device's own fault, so what goes wrong is kept, and told when the test [asks](Fleet::check).

use super::chip::Chip;
use super::{Rig, Tried};
use crate::device::mmu::Target;
use crate::sync::Mutex;
use peerspace_core::addr::{Va, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// What a page of addresses leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entered {
    pub(super) to: Target,
    pub(super) writable: bool,
    /// Where the block begins that it was mapped as a part of.
    pub(super) block: Option<u64>,
}

/// An `unmap` that is not over.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) fence: u64,
    pub(super) range: Range<u64>,
    /// So often it is asked in vain.
    pub(super) polls: u32,
}

/// The translations of a chip.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) entered: BTreeMap<u64, Entered>,
    /// The pages to which accesses of its own memory are under way.
    pub(super) busy: Vec<u64>,
    pub(super) used: BTreeSet<u64>,
    pub(super) pending: Vec<Pending>,
    pub(super) fences: u64,
    /// It is cut off: nobody relies on what it does.
    pub(super) cut: bool,
    /// Its memory can be in place, for others as well.
    pub(super) coherent: bool,
}

impl Table {
    pub(super) fn take_away(&mut self, range: &Range<u64>) {
        self.entered.retain(|va, _| !range.contains(va));
    }

    pub(super) fn is_busy(&self, range: &Range<u64>) -> bool {
        self.busy.iter().any(|va| range.contains(va))
    }

    /// Who maps `pages` of its own memory, for writing if that is asked for.
    pub(super) fn maps(&self, pages: &Range<u64>, writing: bool) -> Option<u64> {
        let leads_there =
            |e: &Entered| matches!(e.to, Target::Own(p) if pages.contains(&p)) && (e.writable || !writing);
        self.entered.iter().find(|(_, e)| leads_there(e)).map(|(va, _)| *va)
    }
}

#[derive(Debug, Default)]
pub(super) struct Ground {
    pub(super) tables: Vec<Table>,
    pub(super) wrong: Vec<String>,
    /// Where the CPU's mappings are looked up; nowhere where the program changes them behind everybody's back.
    pub(super) engine: Weak<Tried>,
}

impl Ground {
    /// Says what is wrong with `who` having `new` at `va`, beside what the others have.
    pub(super) fn judge(&self, who: usize, va: u64, new: Entered) -> Result<(), String> {
        for (i, table) in self.tables.iter().enumerate().filter(|(i, t)| *i != who && !t.cut) {
            if let Some(other) = table.entered.get(&va)
                && !agree((new, &self.tables[who]), (*other, table))
            {
                let [a, b] = [&self.tables[who].name, &self.tables[i].name];
                return Err(format!("{a} maps {va:#x} as {new:?}, while {b} does as {other:?}"));
            }
        }
        // The CPU's mapping.
        let cpu = self.engine.upgrade().and_then(|engine| engine.kernel.inner().mapped(Va(va)));
        let fine = match (new.to, cpu) {
            (_, None) => true,
            // One memory, whoever writes to it.
            (Target::Host, _) => true,
            (Target::Own(_), Some(writable)) => !new.writable && !writable,
            (Target::Zero, Some(_)) => false,
        };
        let name = &self.tables[who].name;
        if fine { Ok(()) } else { Err(format!("{name} maps {va:#x} as {new:?}, and the CPU maps it: {cpu:?}")) }
    }
}

/// Whether the page at `vpn` is of memory that stays where it is.
fn stays(engine: &Tried, vpn: Vpn) -> bool {
    engine.region(vpn).is_some_and(|r| r.attributes.has(Attributes::IN_PLACE))
}

/// Whether the page at `vpn` is of memory whose permissions the program changes.
fn adopted(engine: &Tried, vpn: Vpn) -> bool {
    engine.region(vpn).is_some_and(|r| r.attributes.has(Attributes::ADOPTED))
}

/// Whether two devices may have these at once (the table in `core::coherence`).
fn agree((a, of): (Entered, &Table), (b, other): (Entered, &Table)) -> bool {
    match (a.to, b.to) {
        // In place of the one: the same memory.
        (Target::Own(_), Target::Host) if of.coherent => true,
        (Target::Host, Target::Own(_)) if other.coherent => true,
        (Target::Zero, Target::Zero) => true,
        (Target::Zero, _) | (_, Target::Zero) => false,
        // One memory with one content.
        (Target::Host, Target::Host) => true,
        _ => !a.writable && !b.writable,
    }
}

/// Chips that look at each other.
#[derive(Debug, Clone, Default)]
pub(super) struct Fleet(pub(super) Arc<Mutex<Ground>>);

#[cfg_attr(shuttle, allow(dead_code))] // each of the two uses some
impl Fleet {
    /// Has what the CPU maps looked at as well, in every mapping that is entered.
    pub(super) fn watch(&self, rig: &Rig) {
        self.0.lock().engine = Arc::downgrade(&rig.engine);
    }

    /// Panics with what the engine has done that it must not.
    pub(super) fn check(&self) {
        let wrong = std::mem::take(&mut self.0.lock().wrong);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Compares all translations with each other, with the CPU's, and with what the table of `engine`, at rest, says of them
    /// (rule G2).
    pub(super) fn audit(&self, engine: &Tried, chips: &[Chip]) {
        self.check();
        let ground = self.0.lock();
        for chip in chips.iter().filter(|c| !ground.tables[c.at()].cut) {
            let Some(tier) = engine.tiers.by_id(chip.id()) else { continue };
            for (va, entered) in &ground.tables[chip.at()].entered {
                ground.judge(chip.at(), *va, *entered).unwrap_or_else(|wrong| panic!("{wrong}"));
                let vpn = engine.geometry.vpn(Va(*va));
                let (entry, whole) = engine.table.look(vpn).expect("what is mapped is in the table");
                let offset = if whole { vpn - vpn.block_start() } else { 0 };
                let fine = match (entry.state(), entered.to) {
                    (State::Mapped { pfn, .. }, Target::Own(page)) => {
                        // What the program may not write, or might not when it was entered, the device only reads.
                        (entered.writable || adopted(engine, vpn)) && tier.base() + page == pfn + offset
                    }
                    (State::Shared { writable: false, sharers, .. }, Target::Own(_)) => {
                        sharers.has(chip.mmu()) && !entered.writable
                    }
                    (State::Shared { writable, sharers, .. }, Target::Host) => {
                        sharers.has(chip.mmu()) && (writable || !entered.writable)
                    }
                    (State::Coherent { pfn }, Target::Own(page)) => tier.base() + page == pfn + offset,
                    (State::Coherent { .. }, Target::Host) => true,
                    (State::Empty, Target::Host) => stays(engine, vpn),
                    (State::Zero { sharers }, Target::Zero) => sharers.has(chip.mmu()) && !entered.writable,
                    _ => false,
                };
                assert!(fine, "{} maps {va:#x} as {entered:?}, and the table says {entry:?}", tier.info.name);
            }
        }
    }
}
