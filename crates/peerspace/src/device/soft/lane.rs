//! A lane: how a kernel gets at the program's memory, through the device's MMU.
//!
//! Every access is cut at the ends of pages. A piece is translated and made in one section
//! ([`peerspace_core::shootdown`]), which touches the device's own memory and tables, the lane's state and its stack, and
//! nothing else: no memory of the program's, which could be managed, so that the engine would wait for the lane while the lane
//! waits for the engine. What comes from there or goes there is copied outside. Faults, the host's memory and the kernel's
//! own code come outside of sections too.

use super::core::{Core, LaneState};
use super::error::KernelError;
use super::link::Way;
use super::table::{FANOUT, PAGES, Pte};
use crate::device::mmu::{DeviceAccess, FaultError, Port, Target};
use bytemuck::Pod;
use peerspace_core::shootdown::{Bars, Inside};
use peerspace_os::own::Shared;
use std::cell::Cell;
use std::fmt;

/// Faults of one access after which nothing is to be hoped for: each was resolved, and the access found no translation.
const FRUITLESS: u32 = 1000;
/// The most that is copied in one section, through the stack.
const PIECE: usize = 4096;
/// Accesses to one page of the host after which the space is told.
const TOLD_AFTER: u32 = 64;
/// Pages of the host whose accesses a lane counts at a time.
const COUNTED: usize = 64;

/// One of a device's threads, as the kernel that it runs sees it: the way to the program's memory.
///
/// Addresses are the program's, and need not be aligned but for atomic accesses; accesses may cross pages. What crosses a
/// word of eight bytes is made in parts, each of which others see whole. Accesses of different lanes, and of the CPU, come in
/// no order unless atomic ones bring it about.
pub struct Lane {
    core: Shared<Core>,
    index: usize,
    /// As long as a kernel runs.
    port: Option<Port>,
    /// Pages of the host, and how often they were accessed since the space was told.
    remote: [Cell<(u64, u32)>; COUNTED],
}

/// What an access came to in its section.
enum Try<R> {
    /// It was made.
    Made(R),
    /// The page is the host's.
    Host,
    /// The page is zeros.
    Zeros,
    /// There is no translation that permits it.
    Miss,
    /// Lanes are kept out.
    Barred(Bars),
}

/// Integers that lanes can access atomically: `u32` and `u64`.
pub trait AtomicScalar: Pod + Eq + sealed::Atomic {}
impl AtomicScalar for u32 {}
impl AtomicScalar for u64 {}

mod sealed {
    use peerspace_os::devmem::DeviceMemory;
    use std::sync::atomic::Ordering::SeqCst;

    pub trait Atomic: Sized {
        fn plus(self, other: Self) -> Self;
        fn read(memory: &DeviceMemory, at: usize) -> Self;
        fn exchange(memory: &DeviceMemory, at: usize, expected: Self, new: Self) -> Result<Self, Self>;
    }

    impl Atomic for u32 {
        fn plus(self, other: u32) -> u32 {
            self.wrapping_add(other)
        }

        fn read(memory: &DeviceMemory, at: usize) -> u32 {
            u32::from_ne_bytes(memory.load(at))
        }

        fn exchange(memory: &DeviceMemory, at: usize, expected: u32, new: u32) -> Result<u32, u32> {
            memory.compare_exchange_u32(at, expected, new)
        }
    }

    impl Atomic for u64 {
        fn plus(self, other: u64) -> u64 {
            self.wrapping_add(other)
        }

        fn read(memory: &DeviceMemory, at: usize) -> u64 {
            memory.word(at).load(SeqCst)
        }

        fn exchange(memory: &DeviceMemory, at: usize, expected: u64, new: u64) -> Result<u64, u64> {
            memory.word(at).compare_exchange(expected, new, SeqCst, SeqCst)
        }
    }
}

impl Lane {
    pub(super) fn new(core: Shared<Core>, index: usize) -> Lane {
        Lane { core, index, port: None, remote: [const { Cell::new((u64::MAX, 0)) }; COUNTED] }
    }

    /// A run of a kernel begins.
    pub(super) fn begin(&mut self) {
        self.port = self.core.port.lock().clone();
    }

    /// It has ended: the space is not kept any longer.
    pub(super) fn end(&mut self) {
        self.port = None;
    }

    /// Which lane of its device this is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`KernelError::Fault`] and [`KernelError::NotMapped`].
    #[inline]
    pub fn load<T: Pod>(&self, va: u64) -> Result<T, KernelError> {
        let mut value = T::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut value);
        if fits_word(va, bytes.len()) {
            let whole = self.access(
                va,
                bytes.len() as u64,
                DeviceAccess::Read,
                |at| self.core.memory.load::<8>(at & !7),
                |port| self.word_of_host(port, va, bytes.len()),
                || Some([0; 8]),
            )?;
            let at = (va & 7) as usize;
            bytes.copy_from_slice(&whole[at..at + bytes.len()]);
        } else {
            self.read_parts(va, bytes)?;
        }
        Ok(value)
    }

    /// Writes a value.
    ///
    /// # Errors
    /// [`KernelError::Fault`] and [`KernelError::NotMapped`]. Of a value that crosses pages, a part may have been written.
    #[inline]
    pub fn store<T: Pod>(&self, va: u64, value: T) -> Result<(), KernelError> {
        let bytes = bytemuck::bytes_of(&value);
        if !fits_word(va, bytes.len()) {
            return self.write_parts(va, bytes);
        }
        let own = |at: usize| match *bytes {
            [a] => self.core.memory.store(at, [a]),
            [a, b] => self.core.memory.store(at, [a, b]),
            [a, b, c, d] => self.core.memory.store(at, [a, b, c, d]),
            _ => self.core.memory.write(at, bytes),
        };
        self.access(va, bytes.len() as u64, DeviceAccess::Write, own, |port| self.to_host(port, va, bytes), || None)
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// As for [`load`](Lane::load). Some of them may have been read.
    pub fn read(&self, va: u64, to: &mut [u8]) -> Result<(), KernelError> {
        self.read_parts(va, to)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// As for [`store`](Lane::store). Some of them may have been written.
    pub fn write(&self, va: u64, from: &[u8]) -> Result<(), KernelError> {
        self.write_parts(va, from)
    }

    /// Adds to a value, wrapping around, in one step. The result: what it was.
    ///
    /// An atomic access is one that nobody else sees a part of, wherever he is: its page comes to the device's own memory, and
    /// is nowhere else meanwhile (rule G14). What came before it on its lane is seen by whoever sees its result by another
    /// atomic access.
    ///
    /// # Errors
    /// [`KernelError::Unaligned`], [`KernelError::Fault`] and [`KernelError::NotMapped`].
    pub fn fetch_add<T: AtomicScalar>(&self, va: u64, value: T) -> Result<T, KernelError> {
        self.atomic::<T, _>(va, |at| {
            let mut now = T::read(&self.core.memory, at);
            while let Err(other) = T::exchange(&self.core.memory, at, now, now.plus(value)) {
                now = other;
            }
            now
        })
    }

    /// Puts `new` in the place of a value, in one step, if it is `expected`. The result: what it was, as an error where that
    /// was something else. See [`fetch_add`](Lane::fetch_add).
    ///
    /// # Errors
    /// As for [`fetch_add`](Lane::fetch_add).
    pub fn compare_exchange<T: AtomicScalar>(
        &self,
        va: u64,
        expected: T,
        new: T,
    ) -> Result<Result<T, T>, KernelError> {
        self.atomic::<T, _>(va, |at| T::exchange(&self.core.memory, at, expected, new))
    }

    /// Puts what `f` makes of a value in its place, in one step; asks again when the value has changed meanwhile. Where `f` says
    /// `None`, nothing changes. The result: what it was, as an error in that case. See [`fetch_add`](Lane::fetch_add).
    ///
    /// # Errors
    /// As for [`fetch_add`](Lane::fetch_add).
    pub fn fetch_update<T: AtomicScalar>(
        &self,
        va: u64,
        mut f: impl FnMut(T) -> Option<T>,
    ) -> Result<Result<T, T>, KernelError> {
        let mut now = self.atomic::<T, _>(va, |at| T::read(&self.core.memory, at))?;
        loop {
            // Outside of sections: it is the program's code.
            let Some(new) = f(now) else { return Ok(Err(now)) };
            match self.compare_exchange(va, now, new)? {
                Ok(was) => return Ok(Ok(was)),
                Err(other) => now = other,
            }
        }
    }

    fn atomic<T: AtomicScalar, R>(&self, va: u64, own: impl Fn(usize) -> R) -> Result<R, KernelError> {
        let size = size_of::<T>() as u64;
        if !va.is_multiple_of(size) {
            return Err(KernelError::Unaligned(va));
        }
        self.access(va, size, DeviceAccess::Atomic, own, |_| Ok(None), || None)
    }

    fn read_parts(&self, va: u64, to: &mut [u8]) -> Result<(), KernelError> {
        let mut bounce = [0u8; PIECE];
        let mut done = 0;
        while done < to.len() {
            let va = advance(va, done)?;
            let n = self.part(va, to.len() - done);
            let piece = &Cell::new(&mut bounce[..n]);
            self.access(
                va,
                n as u64,
                DeviceAccess::Read,
                |at| with(piece, |piece| self.core.memory.read(at, piece)),
                |port| with(piece, |piece| self.read_host(port, va, piece)).map(Some),
                || {
                    with(piece, |piece| piece.fill(0));
                    Some(())
                },
            )?;
            to[done..done + n].copy_from_slice(&bounce[..n]);
            done += n;
        }
        Ok(())
    }

    fn write_parts(&self, va: u64, from: &[u8]) -> Result<(), KernelError> {
        let mut bounce = [0u8; PIECE];
        let mut done = 0;
        while done < from.len() {
            let va = advance(va, done)?;
            let n = self.part(va, from.len() - done);
            bounce[..n].copy_from_slice(&from[done..done + n]);
            let piece = &bounce[..n];
            self.access(
                va,
                n as u64,
                DeviceAccess::Write,
                |at| self.core.memory.write(at, piece),
                |port| self.to_host(port, va, piece),
                || None,
            )?;
            done += n;
        }
        Ok(())
    }

    /// How many of `len` bytes at `va` one section takes.
    fn part(&self, va: u64, len: usize) -> usize {
        let to_end = self.core.page() - (va & (self.core.page() - 1));
        len.min(PIECE).min(to_end as usize)
    }

    fn word_of_host(&self, port: &Port, va: u64, len: usize) -> Result<Option<[u8; 8]>, FaultError> {
        let mut whole = [0; 8];
        let at = (va & 7) as usize;
        self.read_host(port, va, &mut whole[at..at + len])?;
        Ok(Some(whole))
    }

    fn read_host(&self, port: &Port, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        let sent = self.core.wire.now();
        port.read(va, to)?;
        self.core.wire.arrive(Way::In, to.len() as u64, sent);
        self.state().remote_read.add(to.len() as u64);
        self.count_remote(port, va);
        Ok(())
    }

    fn to_host(&self, port: &Port, va: u64, from: &[u8]) -> Result<Option<()>, FaultError> {
        let sent = self.core.wire.now();
        port.write(va, from)?;
        self.core.wire.arrive(Way::Out, from.len() as u64, sent);
        self.state().remote_written.add(from.len() as u64);
        self.count_remote(port, va);
        Ok(Some(()))
    }

    /// Counts an access to the host's memory; tells the space now and then.
    fn count_remote(&self, port: &Port, va: u64) {
        let page = va >> self.core.page_shift;
        let cell = &self.remote[page as usize % COUNTED];
        let (of, count) = cell.get();
        if of != page {
            // Another page was counted here. What is known of it is told, so that none is forgotten whose neighbour by number
            // is used as often.
            if count > 0 {
                port.note_remote(of << self.core.page_shift, count);
            }
            cell.set((page, 1));
        } else if count + 1 == TOLD_AFTER {
            cell.set((page, 0));
            port.note_remote(va, TOLD_AFTER);
        } else {
            cell.set((page, count + 1));
        }
    }

    fn state(&self) -> &LaneState {
        &self.core.lanes[self.index]
    }

    /// Makes an access to `len` bytes inside one page: by `own` in a section, with the place in the device's memory; by
    /// `host`, if the page is there; or by `zeros`. Where the latter two have nothing, a fault has to change the translation.
    #[inline]
    fn access<R>(
        &self,
        va: u64,
        len: u64,
        access: DeviceAccess,
        own: impl Fn(usize) -> R,
        host: impl Fn(&Port) -> Result<Option<R>, FaultError>,
        zeros: impl Fn() -> Option<R>,
    ) -> Result<R, KernelError> {
        match self.attempt(va, access, &own) {
            Try::Made(made) => Ok(made),
            first => self.access_slowly(va, len, access, first, &own, &host, &zeros),
        }
    }

    #[cold]
    #[allow(clippy::too_many_arguments, reason = "the ways of one access")]
    fn access_slowly<R>(
        &self,
        va: u64,
        len: u64,
        access: DeviceAccess,
        first: Try<R>,
        own: &dyn Fn(usize) -> R,
        host: &dyn Fn(&Port) -> Result<Option<R>, FaultError>,
        zeros: &dyn Fn() -> Option<R>,
    ) -> Result<R, KernelError> {
        let addresses = &self.core.options.addresses;
        if va < addresses.start || va.checked_add(len).is_none_or(|end| end > addresses.end) {
            return Err(FaultError::OutOfReach(va).into());
        }
        let mut tried = first;
        let mut fruitless = 0;
        loop {
            match tried {
                Try::Made(made) => return Ok(made),
                Try::Barred(bars) => self.core.wait_unbarred(bars, va)?,
                Try::Host | Try::Zeros | Try::Miss => {
                    let port = self.port.as_ref().ok_or(FaultError::Cut)?;
                    let made = match tried {
                        Try::Host => match host(port) {
                            Err(FaultError::NotMapped(_)) => None,
                            made => made?,
                        },
                        Try::Zeros => zeros(),
                        _ => None,
                    };
                    if let Some(made) = made {
                        return Ok(made);
                    }
                    if fruitless == FRUITLESS {
                        return Err(FaultError::NoHeadway(va).into());
                    }
                    fruitless += 1;
                    self.fault(port, va, access)?;
                }
            }
            tried = self.attempt(va, access, own);
        }
    }

    fn fault(&self, port: &Port, va: u64, access: DeviceAccess) -> Result<(), KernelError> {
        if !self.core.options.faults {
            return Err(KernelError::NotMapped(va));
        }
        self.state().faults.add(1);
        port.fault(va, access)?;
        Ok(())
    }

    /// Translates `va`, and accesses what it leads to in the device's memory, in one section.
    #[inline]
    fn attempt<R>(&self, va: u64, access: DeviceAccess, own: impl Fn(usize) -> R) -> Try<R> {
        let inside = match self.state().section.enter(&self.core.epoch) {
            Ok(inside) => inside,
            Err(bars) => return Try::Barred(bars),
        };
        match self.translate(va, access, &inside).map(Pte::to) {
            None => Try::Miss,
            Some(Target::Own(page)) => {
                let at = (page << self.core.page_shift) + (va & (self.core.page() - 1));
                Try::Made(own(at as usize))
            }
            Some(Target::Host) => Try::Host,
            Some(Target::Zero) => Try::Zeros,
        }
    }

    /// The translation of `va`, if there is one that permits the access.
    #[inline]
    fn translate(&self, va: u64, access: DeviceAccess, inside: &Inside<'_>) -> Option<Pte> {
        let (page, state) = (va >> self.core.page_shift, self.state());
        let small = state.tlb.look_up(page).map(Pte);
        let known = small.or_else(|| Some(Pte(state.block_tlb.look_up(page / FANOUT)?).of_block(page % FANOUT)));
        if let Some(pte) = known.filter(|pte| permits(*pte, access)) {
            state.hits.add(1);
            return Some(pte);
        }
        state.misses.add(1);
        self.walk(page, access, inside)
    }

    #[cold]
    fn walk(&self, page: u64, access: DeviceAccess, _: &Inside<'_>) -> Option<Pte> {
        let state = self.state();
        if page >= PAGES {
            return None;
        }
        loop {
            let found = self.core.table.walk(page).filter(|found| permits(found.pte, access))?;
            let (tlb, key) = if found.block { (&state.block_tlb, page / FANOUT) } else { (&state.tlb, page) };
            if found.mark_accessed() && tlb.fill(key, found.pte.0, || found.is_still()) {
                return Some(if found.block { found.pte.of_block(page % FANOUT) } else { found.pte });
            }
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("index", &self.index).finish_non_exhaustive()
    }
}

#[inline]
fn permits(pte: Pte, access: DeviceAccess) -> bool {
    match access {
        DeviceAccess::Read => true,
        DeviceAccess::Write => pte.writable(),
        DeviceAccess::Atomic => pte.writable() && matches!(pte.to(), Target::Own(_)),
    }
}

/// Whether `len` bytes at `va` are in one word, and can be accessed in one step.
#[inline]
fn fits_word(va: u64, len: usize) -> bool {
    len > 0 && (va & 7) + len as u64 <= 8
}

fn advance(va: u64, by: usize) -> Result<u64, KernelError> {
    va.checked_add(by as u64).ok_or_else(|| FaultError::OutOfReach(va).into())
}

/// Lends what is in `cell`.
fn with<R>(cell: &Cell<&mut [u8]>, f: impl FnOnce(&mut [u8]) -> R) -> R {
    let piece = cell.take();
    let r = f(piece);
    cell.set(piece);
    r
}
