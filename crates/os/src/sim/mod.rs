//! A kernel in plain memory: for tests without userfaultfd, for model checkers and for Miri.
//!
//! [`Sim`] keeps mappings, pages, staging and messages as ordinary data and answers the calls of the facade as Linux
//! does, refusals and the order of messages included. The program that uses the memory is simulated too: its accesses
//! are calls that succeed or say what they met ([`Sim::read`], [`Trap`]), and so are its changes of mappings
//! ([`Sim::munmap`] and the others).
//!
//! Every call begins with an operation on an atomic, so that a model checker may let another thread come in between.
//! The lock inside is held for moments in which nothing of the kind happens; where a call waits for others
//! (for a message to be received), it gives way, or runs what [`Sim::while_waiting`] was given, which lets a single
//! thread play all the parts.

mod memory;
mod program;
mod words;

pub use memory::{Allowed, Keep, Trap};
pub use program::Waiting;
pub use words::SimWords;

use crate::kernel::{Capabilities, CpuPage, Done, Kernel, Mapped, Message, Protect, SharedMemory, Trouble, Wake};
use memory::{Kind, Memory};
use peerspace_core::addr::{Access, BLOCK_PAGES, Geometry, PageRange, Pages, Va, VaRange, Vpn};
use peerspace_core::sync::{AtomicU64, Ordering, Spin, spin_hint};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Where regions begin.
const REGIONS: u64 = 1 << 32;
/// Where staging begins.
const STAGING: u64 = 1 << 40;
/// Words a table may have: more than that is refused, as where address space is limited.
const MOST_WORDS: usize = 1 << 21;

/// What a [`Sim`] is made with.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Blocks of the staging area.
    pub blocks: u64,
    /// Slots (single pages) of the staging area.
    pub slots: u64,
    /// What it can do.
    pub can: Capabilities,
}

/// A simulated kernel, and the memory of the program on it.
pub struct Sim {
    geometry: Geometry,
    can: Capabilities,
    staging: VaRange,
    blocks: u64,
    /// Calls so far.
    calls: AtomicU64,
    memory: Mutex<Memory>,
    /// The next free address for a mapping.
    free: Mutex<u64>,
    waiting: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sim({} calls)", self.calls.load(Ordering::Relaxed))
    }
}

/// The pages of `range`, which is made of whole pages.
fn pages_of(geometry: Geometry, range: VaRange) -> PageRange {
    let pages = geometry.pages_inside(range);
    assert_eq!(geometry.range(pages), range, "whole pages");
    pages
}

impl Sim {
    /// A kernel on which nothing is mapped.
    pub fn new(setup: Setup) -> Sim {
        let geometry = Geometry::KIB4;
        let pages = setup.blocks * BLOCK_PAGES + setup.slots;
        let staging = VaRange { start: Va(STAGING), end: Va(STAGING + geometry.bytes(Pages(pages))) };
        Sim {
            geometry,
            can: setup.can,
            staging,
            blocks: setup.blocks,
            calls: AtomicU64::new(0),
            memory: Mutex::new(Memory::new(geometry.page_bytes(), setup.can.write_protect)),
            free: Mutex::new(REGIONS),
            waiting: OnceLock::new(),
        }
    }

    /// Has `run` called over and over while a call waits for somebody to receive a message.
    ///
    /// # Panics
    /// The second time.
    pub fn while_waiting(&self, run: impl Fn() + Send + Sync + 'static) {
        assert!(self.waiting.set(Box::new(run)).is_ok(), "somebody plays the other parts already");
    }

    fn is_alone(&self) -> bool {
        self.waiting.get().is_some()
    }

    fn idle(&self) {
        match self.waiting.get() {
            Some(run) => run(),
            None => spin_hint(),
        }
    }

    /// The memory, for one step of a call.
    fn step(&self) -> MutexGuard<'_, Memory> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `len` bytes at a free block boundary.
    fn place(&self, len: u64, kind: Kind) -> VaRange {
        let block = self.geometry.block_bytes() as u64;
        let start = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // A block stays free in between, for growth in place.
            let start = *free;
            *free += len.next_multiple_of(block) + block;
            start
        };
        let range = VaRange { start: Va(start), end: Va(start + len) };
        self.step().map(pages_of(self.geometry, range), kind);
        range
    }

    fn vpns(&self, to: Va, len: u64) -> PageRange {
        pages_of(self.geometry, VaRange { start: to, end: Va(to.0 + len) })
    }

    fn foreign(&self, range: VaRange) -> PageRange {
        assert!(!self.staging.overlaps(range), "{range} is staging, not region memory");
        pages_of(self.geometry, range)
    }

    /// Wakes who waits for the first `done` of `pages`.
    fn wake_done(m: &mut Memory, pages: PageRange, done: Done, wake: Wake) -> Done {
        if wake == Wake::Yes {
            let woken = PageRange::new(pages.start, done.pages);
            m.waiting.retain(|_, v| !woken.contains(*v));
        }
        done
    }

    /// The cells of staging that `range` touches.
    fn cells(&self, range: VaRange) -> std::ops::RangeInclusive<u64> {
        assert!(
            self.staging.start <= range.start && range.end <= self.staging.end && !range.is_empty(),
            "{range} is no part of staging {}",
            self.staging
        );
        let cell = |vpn: Vpn| {
            let page = vpn - self.geometry.vpn(self.staging.start);
            let in_blocks = self.blocks * BLOCK_PAGES;
            if page < in_blocks { page / BLOCK_PAGES } else { self.blocks + page - in_blocks }
        };
        let pages = pages_of(self.geometry, range);
        cell(pages.start)..=cell(Vpn(pages.end.0 - 1))
    }

    /// Claims cells of staging, alone or with other readers.
    ///
    /// # Panics
    /// When somebody uses one of them in a way that excludes this.
    fn claim(&self, range: VaRange, alone: bool) -> Claim<'_> {
        let cells = self.cells(range);
        let mut m = self.step();
        for cell in cells.clone() {
            let users = m.cells.get(&cell).copied().unwrap_or(0);
            assert!(
                if alone { users == 0 } else { users >= 0 },
                "staging cell {cell} ({range}) has two users: every frame has one owner"
            );
        }
        for cell in cells.clone() {
            *m.cells.entry(cell).or_insert(0) += if alone { -1 } else { 1 };
        }
        Claim { sim: self, cells, alone }
    }

    /// Copies the program's pages to staging and drops them there, without moves.
    fn take_out_by_copy(&self, to: Vpn, from: PageRange) -> Done {
        for (i, vpn) in from.iter().enumerate() {
            let page = PageRange::new(vpn, Pages(1));
            let stop = |t| Done::stopped(Pages(i as u64), t);
            if !self.step().is_present(vpn) {
                return stop(Trouble::Absent);
            }
            if let Err(t) = self.step().protect(page, true) {
                return stop(t);
            }
            let mut m = self.step();
            let Ok(bytes) = m.access(vpn, false, |b| b.to_vec()) else { return stop(Trouble::Absent) };
            m.write_staged(PageRange::new(to + i as u64, Pages(1)), &bytes, false);
            drop(m);
            self.step().drop_pages(page);
        }
        Done::all(from.pages())
    }
}

struct Claim<'a> {
    sim: &'a Sim,
    cells: std::ops::RangeInclusive<u64>,
    alone: bool,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // No step: nothing may come in between while a panic unwinds.
        let mut m = self.sim.memory.lock().unwrap_or_else(PoisonError::into_inner);
        for cell in self.cells.clone() {
            *m.cells.get_mut(&cell).expect("it was claimed") -= if self.alone { -1 } else { 1 };
        }
    }
}

impl Kernel for Sim {
    type Words = SimWords;
    type Park = Spin;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        self.can
    }

    fn park(&self) -> Spin {
        Spin
    }

    fn words(&self, words: usize, usable: usize) -> Result<SimWords, Trouble> {
        if words > MOST_WORDS { Err(Trouble::NoMemory) } else { Ok(SimWords::new(words, usable)) }
    }

    fn grow(&self, words: &SimWords, usable: usize) -> Result<(), Trouble> {
        words.grow(usable).then_some(()).ok_or(Trouble::NoMemory)
    }

    fn map(&self, len: u64) -> Result<VaRange, Trouble> {
        let len = len.next_multiple_of(self.geometry.page_bytes() as u64);
        Ok(self.place(len, Kind { registered: true, ..Kind::PLAIN }))
    }

    fn unmap(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        self.step().unmap(pages);
        Ok(())
    }

    fn adopt(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let mut m = self.step();
        // Of what is not mapped userfaultfd says nothing.
        let pieces = m.pieces(pages);
        if pieces.is_empty() || pieces.iter().any(|(_, kind)| !kind.is_plain()) {
            return Err(Trouble::Unsuitable);
        }
        m.change_kind(pages, |k| k.registered = true);
        Ok(())
    }

    fn disown(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let mut m = self.step();
        m.change_kind(pages, |k| k.registered = false);
        m.waiting.retain(|_, v| !pages.contains(*v));
        Ok(())
    }

    fn copy_in(&self, to: Va, from: &[u8], protect: Protect, wake: Wake) -> Done {
        let page = self.geometry.page_bytes();
        let pages = self.vpns(to, from.len() as u64);
        let mut m = self.step();
        let done = m.install(pages, protect, |_, i| from[i as usize * page..][..page].into());
        Sim::wake_done(&mut m, pages, done, wake)
    }

    fn copy_staged(&self, to: Va, from: VaRange, protect: Protect, wake: Wake) -> Done {
        let _claim = self.claim(from, false);
        let pages = self.vpns(to, from.len());
        let staged = self.geometry.vpn(from.start);
        let mut m = self.step();
        let done = m.install(pages, protect, |m, i| m.staged_page(staged + i));
        Sim::wake_done(&mut m, pages, done, wake)
    }

    fn zero_in(&self, to: VaRange, protect: Protect, wake: Wake) -> Done {
        let page = self.geometry.page_bytes();
        let pages = self.foreign(to);
        assert!(pages.pages().0 <= 16);
        let mut m = self.step();
        let done = m.install(pages, protect, |_, _| vec![0; page].into());
        Sim::wake_done(&mut m, pages, done, wake)
    }

    fn put_back(&self, to: Va, from: VaRange, wake: Wake) -> Done {
        if !self.can.move_pages {
            let done = self.copy_staged(to, from, Protect::No, wake);
            let len = self.geometry.bytes(done.pages);
            if len > 0 {
                let _ = self.drop_staged(VaRange { end: Va(from.start.0 + len), ..from });
            }
            return done;
        }
        let _claim = self.claim(from, true);
        let pages = self.vpns(to, from.len());
        let mut m = self.step();
        let done = m.put_back(pages, self.geometry.vpn(from.start));
        Sim::wake_done(&mut m, pages, done, wake)
    }

    fn take_out(&self, to: Va, from: VaRange) -> Done {
        let pages = self.foreign(from);
        let _claim = self.claim(VaRange { start: to, end: Va(to.0 + from.len()) }, true);
        let to = self.geometry.vpn(to);
        if !self.can.move_pages {
            return self.take_out_by_copy(to, pages);
        }
        self.step().take_out(to, pages, Allowed::Write)
    }

    fn take_out_read_only(&self, to: Va, from: VaRange) -> Done {
        let pages = self.foreign(from);
        let _claim = self.claim(VaRange { start: to, end: Va(to.0 + from.len()) }, true);
        if !self.can.move_pages || !self.can.write_protect {
            return Done::stopped(Pages(0), Trouble::Unsuitable);
        }
        self.step().take_out(self.geometry.vpn(to), pages, Allowed::Read)
    }

    fn protect(&self, range: VaRange, protect: Protect, wake: Wake) -> Result<(), Trouble> {
        let on = protect == Protect::Yes;
        if !self.can.write_protect {
            return if on { Err(Trouble::Unsuitable) } else { Ok(()) };
        }
        let pages = self.foreign(range);
        let mut m = self.step();
        m.protect(pages, on)?;
        if !on {
            Sim::wake_done(&mut m, pages, Done::all(pages.pages()), wake).trouble.map_or(Ok(()), Err)?;
        }
        Ok(())
    }

    fn wake(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        self.step().waiting.retain(|_, v| !pages.contains(*v));
        Ok(())
    }

    fn poison(&self, va: Va) -> Result<(), Trouble> {
        if !self.can.poison {
            return Err(Trouble::Unsuitable);
        }
        let vpn = self.geometry.vpn(va);
        let mut m = self.step();
        m.poison(vpn)?;
        m.waiting.retain(|_, v| *v != vpn);
        Ok(())
    }

    fn bury(&self, va: Va) -> Result<(), Trouble> {
        let page = self.vpns(va, self.geometry.page_bytes() as u64);
        let told = {
            let mut m = self.step();
            let told = m.pieces(page).iter().any(|(_, k)| k.registered);
            m.changing += told as u32;
            m.map(page, Kind { buried: true, ..Kind::PLAIN });
            told
        };
        if told {
            self.tell(Message::Unmap(self.geometry.range(page)));
        }
        self.wake(self.geometry.range(page))
    }

    fn show(&self, range: VaRange, memory: SharedMemory<'_>) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let file = memory.file.try_clone_to_owned().map_err(|_| Trouble::NoMemory)?;
        let told = {
            let mut m = self.step();
            assert!(pages.iter().all(|v| !m.is_present(v)), "a page of {range} is there yet: it would be lost");
            let told = m.pieces(pages).iter().any(|(_, k)| k.registered);
            m.changing += told as u32;
            m.map_device(pages, &Arc::new(file), memory.offset);
            told
        };
        if told {
            self.tell(Message::Unmap(range));
        }
        self.wake(range)
    }

    fn hide(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let kind = Kind { registered: true, ..Kind::PLAIN };
        let fresh = self.place(range.len(), kind);
        {
            let mut m = self.step();
            assert!(m.pieces(pages).iter().all(|(_, k)| k.in_place), "{range} is not the memory of a device");
            m.changing += 2;
            m.unmap(pages_of(self.geometry, fresh));
            m.map(pages, kind);
        }
        self.tell_all(&[
            Message::Move { from: fresh.start, to: range.start, len: range.len() },
            Message::Unmap(fresh),
        ]);
        Ok(())
    }

    fn close(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        self.step().map(pages, Kind { allowed: Allowed::Nothing, ..Kind::PLAIN });
        Ok(())
    }

    fn is_accessible(&self, range: VaRange, write: bool) -> bool {
        self.foreign(range).iter().all(|vpn| self.step().access(vpn, write, |_| ()).is_ok())
    }

    fn read_mapped(&self, at: Va, to: &mut [u8]) -> bool {
        self.by_page(at, to.len()).all(|(va, range)| self.read(va, &mut to[range]).is_ok())
    }

    fn write_mapped(&self, at: Va, from: &[u8]) -> bool {
        self.by_page(at, from.len()).all(|(va, range)| self.write(va, &from[range]).is_ok())
    }

    fn mappings_in(&self, range: VaRange) -> Result<u64, Trouble> {
        let pages = self.foreign(range);
        Ok(self.step().pieces(pages).len() as u64)
    }

    fn most_mappings(&self) -> u64 {
        1 << 16
    }

    fn is_present(&self, va: Va) -> Result<bool, Trouble> {
        Ok(self.step().is_present(self.geometry.vpn(va)))
    }

    fn present_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange)) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let present: Vec<Vpn> = {
            let m = self.step();
            pages.iter().filter(|v| m.is_present(*v)).collect()
        };
        for run in present.chunk_by(|a, b| b.0 == a.0 + 1) {
            found(self.geometry.range(PageRange::new(run[0], Pages(run.len() as u64))));
        }
        Ok(())
    }

    fn cpu_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange, CpuPage)) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let seen: Vec<_> = {
            let m = self.step();
            pages.iter().filter_map(|vpn| Some((vpn, m.cpu_page(vpn)?))).collect()
        };
        for (vpn, page) in seen {
            found(self.geometry.range(PageRange::new(vpn, Pages(1))), page);
        }
        Ok(())
    }

    fn is_huge(&self, va: Va) -> Result<bool, Trouble> {
        Ok(self.step().is_huge(self.geometry.vpn(va)))
    }

    fn collapse(&self, block: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(block);
        if !self.can.huge {
            return Err(Trouble::Unsuitable);
        }
        self.step().collapse(pages)
    }

    fn unshare(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        self.step().unshare(pages)
    }

    fn discard(&self, range: VaRange) -> Result<(), Trouble> {
        self.foreign(range);
        self.dontneed(range);
        Ok(())
    }

    fn mapping_at(&self, va: Va) -> Result<Option<VaRange>, Trouble> {
        let mapping = self.step().mapping_at(self.geometry.vpn(va));
        Ok(mapping.map(|r| self.geometry.range(r)))
    }

    fn allowed_at(&self, va: Va) -> Result<Option<(VaRange, Access)>, Trouble> {
        let vpn = self.geometry.vpn(va);
        let m = self.step();
        let access = match m.kind(vpn.0).map(|kind| kind.allowed) {
            None | Some(Allowed::Nothing) => return Ok(None),
            Some(Allowed::Read) => Access::Read,
            Some(Allowed::Write) => Access::Write,
        };
        Ok(m.mapping_at(vpn).map(|r| (self.geometry.range(r), access)))
    }

    fn watch(&self, range: VaRange) -> Result<(), Trouble> {
        let pages = self.foreign(range);
        let mut m = self.step();
        let pieces = m.pieces(pages);
        let mapped: u64 = pieces.iter().map(|(piece, _)| piece.pages().0).sum();
        if mapped < pages.pages().0 || pieces.iter().any(|(_, kind)| kind.keep == Keep::File) {
            return Err(Trouble::Unsuitable);
        }
        m.change_kind(pages, |k| k.registered = true);
        Ok(())
    }

    fn unwatch(&self, range: VaRange) -> Result<(), Trouble> {
        self.disown(range)
    }

    fn mapped_from(&self, va: Va) -> Result<Option<Mapped>, Trouble> {
        let found = self.step().mapped_from(self.geometry.vpn(va));
        Ok(found.map(|(pages, kind)| {
            let allowed = match kind.allowed {
                Allowed::Nothing => None,
                Allowed::Read => Some(Access::Read),
                Allowed::Write => Some(Access::Write),
            };
            Mapped { range: self.geometry.range(pages), allowed }
        }))
    }

    fn staging(&self) -> VaRange {
        self.staging
    }

    fn read_staged<T>(&self, range: VaRange, read: impl FnOnce(&[u8]) -> T) -> T {
        let _claim = self.claim(range, false);
        let bytes = self.step().staged_bytes(pages_of(self.geometry, range));
        read(&bytes)
    }

    fn write_staged<T>(&self, range: VaRange, write: impl FnOnce(&mut [u8]) -> T) -> T {
        let _claim = self.claim(range, true);
        let pages = pages_of(self.geometry, range);
        let mut bytes = self.step().staged_bytes(pages);
        let out = write(&mut bytes);
        self.step().write_staged(pages, &bytes, self.can.huge);
        out
    }

    fn drop_staged(&self, range: VaRange) -> Result<(), Trouble> {
        let _claim = self.claim(range, true);
        self.step().drop_staged(pages_of(self.geometry, range));
        Ok(())
    }

    fn wait_message(&self, _: Option<Duration>) -> bool {
        let there = |m: &Memory| !m.faults.is_empty() || !m.changes.is_empty();
        if there(&self.step()) {
            return true;
        }
        // Time does not pass here: others run.
        spin_hint();
        there(&self.step())
    }

    fn receive(&self) -> Option<Message> {
        let mut m = self.step();
        // Faults come first.
        m.faults.pop_front().or_else(|| m.changes.pop_front().map(|(_, message)| message))
    }

    fn is_changing(&self) -> bool {
        self.step().changing > 0
    }
}
