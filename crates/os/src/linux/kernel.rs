//! The facade over Linux: region memory by userfaultfd, staging beside it.
//!
//! One userfaultfd serves the regions and the staging area. That staging is registered with the same descriptor
//! as the regions is what makes [`take_out`](Kernel::take_out) safe: the kernel refuses it (EAGAIN) while an
//! unmap of a region is announced but not received, so a page can never be taken from a mapping that somebody
//! else has put in the place of ours. With a second userfaultfd for staging it could: only operations through the
//! region's own descriptor are refused then. Staging is registered for write protection only, and emptied by unregister,
//! discard, register, so that our own housekeeping causes no messages.

use super::choice::Choice;
use super::futex::Futex;
use super::map::{Arena, Mapping, where_nothing_is_ours};
use super::memory::Memory;
use super::moved::Sides;
use super::scan::{Maps, Pagemap};
use super::self_memory::{read_self, write_self};
use super::staging::{Staging, Use};
use super::uffd::{FAULT_WP, FAULT_WRITE, Mode, Partial, Uffd, event, feature};
use super::watch::Watcher;
use crate::error::OsError;
use crate::kernel::{Capabilities, CpuPage, Done, Kernel, Mapped, Message, Protect, SharedMemory, Trouble, Wake};
use peerspace_core::addr::{Access, Geometry, Va, VaRange};
use peerspace_core::plan::CLUSTER;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::time::Duration;

/// How faults reach the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// By SIGBUS in the faulting thread: fast, for accesses of the program itself.
    Signal,
    /// As messages: also for accesses the kernel makes for the program.
    Messages,
}

/// What a [`Linux`] is opened with.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// How faults reach the engine.
    pub delivery: Delivery,
    /// Blocks of the staging area.
    pub blocks: u64,
    /// Slots (single pages) of the staging area.
    pub slots: u64,
    /// userfaultfd features to do without although the kernel has them: for tests of the fallbacks.
    pub without: u64,
}

/// A real kernel.
#[derive(Debug)]
pub struct Linux {
    geometry: Geometry,
    pub(super) capabilities: Capabilities,
    delivery: Delivery,
    pub(super) uffd: Uffd,
    pub(super) mode: Mode,
    pub(super) staging: Staging,
    zeros: Mapping,
    pub(super) pagemap: Pagemap,
    pub(super) maps: Maps,
    pub(super) watcher: Watcher,
}

impl Linux {
    /// Opens userfaultfd and sets up staging.
    ///
    /// # Errors
    /// With a sentence and a remedy when this kernel or this container does not allow it.
    pub fn open(setup: Setup) -> Result<Linux, OsError> {
        let page = rustix::param::page_size() as u64;
        let geometry = Geometry::from_page_bytes(page)
            .ok_or_else(|| OsError::plain(format!("pages of {page} bytes are not supported")))?;
        let choice = Choice::open(setup)?;
        let write_protect = choice.has(feature::PAGEFAULT_FLAG_WP);
        let move_pages = choice.has(feature::MOVE);
        let huge = move_pages && geometry == Geometry::KIB4 && super::probe::huge_pages_allowed();
        let staging = Staging::new(geometry, setup.blocks, setup.slots)
            .map_err(|e| OsError::new("reserve the staging area", e))?;
        if move_pages {
            let r = staging.range();
            choice
                .uffd
                .register(r.start.0, r.len(), Mode::Protected)
                .map_err(|e| OsError::new("register the staging area", e))?;
        }
        let zeros = Mapping::new(CLUSTER.0 as usize * geometry.page_bytes(), geometry.page_bytes(), true)
            .map_err(|e| OsError::new("map a page of zeros", e))?;
        Ok(Linux {
            watcher: Watcher::new(choice.known),
            geometry,
            capabilities: Capabilities {
                move_pages,
                write_protect,
                poison: choice.has(feature::POISON),
                kernel_faults: choice.kernel_faults,
                huge,
            },
            delivery: setup.delivery,
            uffd: choice.uffd,
            mode: if write_protect { Mode::MissingAndProtected } else { Mode::Missing },
            staging,
            zeros,
            pagemap: Pagemap::open().map_err(|e| OsError::new("open /proc/self/pagemap", e).remedy("mount /proc"))?,
            maps: Maps::open().map_err(|e| OsError::new("open /proc/self/maps", e).remedy("mount /proc"))?,
        })
    }

    /// How faults reach the engine.
    pub fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// The mappings of this process.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Maps region memory ([`Kernel::map`]) to be used as bytes.
    ///
    /// # Errors
    /// As for [`Kernel::map`].
    pub fn map_memory(&self, len: u64) -> Result<Memory, Trouble> {
        Ok(Memory::new(self.map(len)?))
    }

    /// The same, at `near` if that is free; 0 for anywhere.
    ///
    /// # Errors
    /// As for [`Kernel::map`].
    pub fn map_memory_near(&self, near: Va, len: u64) -> Result<Memory, Trouble> {
        Ok(Memory::new(self.map_near(near, len)?))
    }

    fn map_near(&self, near: Va, len: u64) -> Result<VaRange, Trouble> {
        let mapping =
            Mapping::near(near.0 as usize, len as usize, self.geometry.block_bytes(), true).map_err(trouble)?;
        let r = mapping.range();
        // SAFETY: advice without effect on content. Huge pages appear by our moves alone, not by the kernel's
        // own faults, since every missing page of a registered range is ours to fill.
        let _ = unsafe { mapping.advise(0, r.len() as usize, Advice::LinuxHugepage) };
        self.register(r)?;
        // The mapping is the program's from here on, not one of ours that must not be managed.
        super::map::unclaim(r);
        Ok(mapping.leak())
    }

    /// Maps memory of devices, piece after piece of so many bytes, at a block boundary, to be used as bytes. Nothing faults in
    /// it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map_shared_memory<'a>(
        &self,
        pieces: impl Iterator<Item = (SharedMemory<'a>, u64)> + Clone,
    ) -> Result<Memory, Trouble> {
        super::inplace::map_all(self, pieces).map(Memory::new)
    }

    /// Gives back what [`map_memory`](Linux::map_memory) mapped.
    ///
    /// # Errors
    /// As for [`Kernel::unmap`].
    pub fn unmap_memory(&self, memory: Memory) -> Result<(), Trouble> {
        self.unmap(memory.range())
    }

    /// Gives back the first `len` bytes of what [`map_memory`](Linux::map_memory) mapped; the rest, if there is any,
    /// stays.
    ///
    /// # Errors
    /// As for [`Kernel::unmap`]; the memory is lost then, mapped as it is.
    pub fn unmap_front(&self, memory: Memory, len: u64) -> Result<Option<Memory>, Trouble> {
        let VaRange { start, end } = memory.range();
        let cut = Va(start.0 + len);
        assert!(cut <= end);
        self.unmap(VaRange { start, end: cut })?;
        Ok((cut < end).then(|| Memory::new(VaRange { start: cut, end })))
    }

    fn done(&self, (bytes, error): Partial) -> Done {
        Done { pages: self.geometry.pages_in(bytes), trouble: error.map(trouble) }
    }

    /// Whether anybody may have to be woken: nobody waits in the kernel where faults are signals.
    fn wakes(&self, wake: Wake) -> bool {
        wake == Wake::Yes && self.delivery == Delivery::Messages
    }

    /// Makes missing pages of `range` fault from now on.
    pub(super) fn register(&self, range: VaRange) -> Result<(), Trouble> {
        self.uffd.register(range.start.0, range.len(), self.mode).map_err(trouble)
    }

    pub(super) fn assert_foreign(&self, range: VaRange) {
        assert!(!self.staging.range().overlaps(range), "{range} is staging, not region memory");
    }

    /// Copies the program's pages to staging and drops them there: what is left to do without UFFDIO_MOVE.
    fn take_out_by_copy(&self, to: Va, from: VaRange) -> Done {
        let page = self.geometry.page_bytes() as u64;
        let staged = VaRange { start: to, end: Va(to.0 + from.len()) };
        let mut claim = self.staging.claim(staged, Use::Alone);
        let mut done = 0;
        let out = self.staging.bytes_mut(&mut claim, staged);
        for (i, out) in out.chunks_exact_mut(page as usize).enumerate() {
            let at = from.start.0 + i as u64 * page;
            match self.pagemap.is_present(Va(at)) {
                Ok(true) => {}
                Ok(false) => return Done::stopped(self.geometry.pages_in(done), Trouble::Absent),
                Err(e) => return Done::stopped(self.geometry.pages_in(done), trouble(e)),
            }
            // Nobody can write from here on: a write waits until the page is gone, and then for its entry.
            if let Err(e) = self.uffd.write_protect(at, page, true, false) {
                return Done::stopped(self.geometry.pages_in(done), trouble(e));
            }
            match read_self(at, out) {
                Ok(n) if n == out.len() => {}
                Ok(_) => return Done::stopped(self.geometry.pages_in(done), Trouble::Absent),
                Err(e) => return Done::stopped(self.geometry.pages_in(done), trouble(e)),
            }
            // SAFETY: the page belongs to a region, its content is safe in staging, and the entry of the page is
            // locked, so that whoever needs it next waits for the engine.
            if let Err(e) = unsafe { rustix::mm::madvise(at as *mut _, page as usize, Advice::LinuxDontNeed) } {
                return Done::stopped(self.geometry.pages_in(done), trouble(e));
            }
            done += page;
        }
        Done::all(self.geometry.pages_in(done))
    }
}

/// A file of no bytes that stays so: access to a mapping of it raises SIGBUS.
fn nothing_at_all() -> Result<OwnedFd, Errno> {
    let file = memfd_create(c"peerspace-lost", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// What an errno means to the engine.
pub(super) fn trouble(e: Errno) -> Trouble {
    match e {
        Errno::AGAIN => Trouble::Changing,
        Errno::EXIST => Trouble::Present,
        Errno::NOENT => Trouble::Absent,
        Errno::BUSY => Trouble::Busy,
        Errno::INVAL | Errno::PERM | Errno::ACCESS => Trouble::Unsuitable,
        Errno::NOMEM => Trouble::NoMemory,
        Errno::SRCH => Trouble::Exiting,
        Errno::INTR => Trouble::Interrupted,
        other => Trouble::Other(other.raw_os_error()),
    }
}

impl Kernel for Linux {
    type Words = Arena;
    type Park = Futex;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn park(&self) -> Futex {
        Futex
    }

    fn words(&self, words: usize, usable: usize) -> Result<Arena, Trouble> {
        Arena::new(words, usable).map_err(trouble)
    }

    fn grow(&self, words: &Arena, usable: usize) -> Result<(), Trouble> {
        words.grow(usable).map_err(trouble)
    }

    fn map(&self, len: u64) -> Result<VaRange, Trouble> {
        self.map_near(Va(0), len)
    }

    fn unmap(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        // Unregistered first, so that nobody has to be told.
        self.uffd.unregister(range.start.0, range.len()).map_err(trouble)?;
        // SAFETY: the caller mapped the range by `map` and lets go of it.
        unsafe { rustix::mm::munmap(range.start.0 as *mut _, range.len() as usize) }.map_err(trouble)
    }

    fn adopt(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        where_nothing_is_ours(range, || self.register(range)).unwrap_or(Err(Trouble::Absent))
    }

    fn confirm(&self, page: VaRange) -> Result<(), Trouble> {
        // In a fault: without the lock.
        self.assert_foreign(page);
        self.register(page)
    }

    fn disown(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        self.uffd.unregister(range.start.0, range.len()).map_err(trouble)
    }

    fn copy_in(&self, to: Va, from: &[u8], protect: Protect, wake: Wake) -> Done {
        debug_assert!(from.len().is_multiple_of(self.geometry.page_bytes()));
        let protect = protect == Protect::Yes && self.capabilities.write_protect;
        // SAFETY: `from` is borrowed for the call. Pages appear only where none were.
        self.done(unsafe { self.uffd.copy(to.0, from.as_ptr(), from.len() as u64, protect, self.wakes(wake)) })
    }

    fn copy_staged(&self, to: Va, from: VaRange, protect: Protect, wake: Wake) -> Done {
        let claim = self.staging.claim(from, Use::Shared);
        self.copy_in(to, self.staging.bytes(&claim, from), protect, wake)
    }

    fn zero_in(&self, to: VaRange, protect: Protect, wake: Wake) -> Done {
        assert!(to.len() <= self.zeros.len() as u64);
        // SAFETY: the mapping lives as long as `self` and is never written.
        let zeros = unsafe { std::slice::from_raw_parts(self.zeros.as_ptr(), to.len() as usize) };
        self.copy_in(to.start, zeros, protect, wake)
    }

    fn put_back(&self, to: Va, from: VaRange, wake: Wake) -> Done {
        if !self.capabilities.move_pages {
            let done = self.copy_staged(to, from, Protect::No, wake);
            return match self.drop_staged(VaRange { end: Va(from.start.0 + self.geometry.bytes(done.pages)), ..from })
            {
                Ok(()) => done,
                Err(t) => Done { trouble: done.trouble.or(Some(t)), ..done },
            };
        }
        let _claim = self.staging.claim(from, Use::Alone);
        // SAFETY: the claim says that nobody refers to the staged bytes; at `to` no page was.
        let answer = unsafe { self.uffd.move_pages(to.0, from.start.0, from.len(), self.wakes(wake)) };
        let sides = Sides { from, to: VaRange { start: to, end: Va(to.0 + from.len()) } };
        let really = sides.returned(&self.pagemap, self.geometry.page_bytes() as u64, answer);
        if really.0 > answer.0 && self.wakes(wake) {
            // The kernel wakes those who wait for what it counted. A range that is gone has nobody waiting.
            let _ = self.uffd.wake(to.0 + answer.0, really.0 - answer.0);
        }
        self.done(really)
    }

    fn take_out(&self, to: Va, from: VaRange) -> Done {
        self.assert_foreign(from);
        if !self.capabilities.move_pages {
            return self.take_out_by_copy(to, from);
        }
        let sides = Sides { from, to: VaRange { start: to, end: Va(to.0 + from.len()) } };
        let _claim = self.staging.claim(sides.to, Use::Alone);
        // SAFETY: the claim says that nobody refers to staging there. The program's pages vanish from its sight
        // and come back on its next access: its references stay good.
        let answer = unsafe { self.uffd.move_pages(to.0, from.start.0, from.len(), false) };
        self.done(sides.taken(&self.pagemap, self.geometry.page_bytes() as u64, answer))
    }

    fn take_out_read_only(&self, to: Va, from: VaRange) -> Done {
        self.take_out_unprotected(to, from)
    }

    fn protect(&self, range: VaRange, protect: Protect, wake: Wake) -> Result<(), Trouble> {
        let on = protect == Protect::Yes;
        if !self.capabilities.write_protect {
            return if on { Err(Trouble::Unsuitable) } else { Ok(()) };
        }
        self.uffd.write_protect(range.start.0, range.len(), on, self.wakes(wake)).map_err(trouble)
    }

    fn waits_for_faults(&self) -> bool {
        self.delivery() == Delivery::Messages
    }

    fn let_pass(&self, range: VaRange, write: bool, over: &dyn Fn() -> bool) {
        self.let_waiter_pass(range, write, over);
    }

    fn wake(&self, range: VaRange) -> Result<(), Trouble> {
        if !self.wakes(Wake::Yes) {
            return Ok(());
        }
        self.uffd.wake(range.start.0, range.len()).map_err(trouble)
    }

    fn poison(&self, va: Va) -> Result<(), Trouble> {
        if !self.capabilities.poison {
            return Err(Trouble::Unsuitable);
        }
        match self.uffd.poison(va.0, self.geometry.page_bytes() as u64) {
            (_, None) => Ok(()),
            (_, Some(e)) => Err(trouble(e)),
        }
    }

    fn bury(&self, va: Va) -> Result<(), Trouble> {
        let page = self.geometry.page_bytes();
        self.assert_foreign(VaRange { start: va, end: Va(va.0 + page as u64) });
        let buried = nothing_at_all().and_then(|file| {
            // SAFETY: the page is missing, so no byte of it can be seen to change; the caller vouches that its content
            // is lost, and that the address is still the region's.
            unsafe {
                rustix::mm::mmap(
                    va.0 as *mut _,
                    page,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                    &file,
                    0,
                )
            }
        });
        if buried.is_err() {
            // SAFETY: as above. No reference to the page can be used any more in any case.
            unsafe { rustix::mm::mprotect(va.0 as *mut _, page, MprotectFlags::empty()) }.map_err(trouble)?;
        }
        self.wake(VaRange { start: va, end: Va(va.0 + page as u64) })
    }

    fn is_present(&self, va: Va) -> Result<bool, Trouble> {
        self.pagemap.is_present(va).map_err(trouble)
    }

    fn present_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange)) -> Result<(), Trouble> {
        self.pagemap.present_runs(range, found).map_err(trouble)
    }

    fn cpu_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange, CpuPage)) -> Result<(), Trouble> {
        let mut at = range.start;
        while let Some(vma) = self.maps.at_or_after(at).map_err(trouble)?.filter(|vma| vma.range.start < range.end) {
            let piece = VaRange { start: vma.range.start.max(at), end: vma.range.end.min(range.end) };
            if vma.read {
                // The first write to a page of a file that is mapped privately makes a copy.
                let writes = |page: CpuPage| page.writable && vma.write && (vma.shared || !page.file);
                let page = |page: CpuPage| CpuPage { writable: writes(page), ..page };
                self.pagemap.cpu_runs(piece, &mut |run, seen| found(run, page(seen))).map_err(trouble)?;
            }
            at = piece.end;
            if at >= range.end {
                break;
            }
        }
        Ok(())
    }

    fn is_huge(&self, va: Va) -> Result<bool, Trouble> {
        self.pagemap.is_huge(va).map_err(trouble)
    }

    fn collapse(&self, block: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(block);
        // SAFETY: the kernel puts the same bytes elsewhere; every reference to them stays good.
        let done = unsafe { libc::madvise(block.start.0 as *mut _, block.len() as usize, libc::MADV_COLLAPSE) };
        if done == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            // Something is in the way for now: pages that are held, or no huge page to be had.
            Some(Errno::AGAIN | Errno::BUSY) => Err(Trouble::Busy),
            other => Err(trouble(other.unwrap_or(Errno::INVAL))),
        }
    }

    fn unshare(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        let advise = |advice| {
            // SAFETY: no advice below changes content. Populating for writing gives each page of the range an own copy.
            unsafe { rustix::mm::madvise(range.start.0 as *mut _, range.len() as usize, advice) }
        };
        advise(Advice::LinuxPopulateWrite).map_err(trouble)?;
        // A page may have become ours because the other process let go of it first. Of a huge page that is mapped in pieces the
        // kernel then goes by the first piece alone, which may be neither ours nor here (Linux 6.18: it says EBUSY for ever).
        // Pieces of it that are said to be cold are taken apart. Refusal leaves it as it is.
        let _ = advise(Advice::LinuxCold);
        Ok(())
    }

    fn discard(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        // SAFETY: the caller has the say over the content of the range, and wants zeros.
        unsafe { rustix::mm::madvise(range.start.0 as *mut _, range.len() as usize, Advice::LinuxDontNeed) }
            .map_err(trouble)
    }

    fn mapping_at(&self, va: Va) -> Result<Option<VaRange>, Trouble> {
        Ok(self.maps.at(va).map_err(trouble)?.filter(|v| !v.file && !v.shared).map(|v| v.range))
    }

    fn allowed_at(&self, va: Va) -> Result<Option<(VaRange, Access)>, Trouble> {
        let mapping = self.maps.at(va).map_err(trouble)?.filter(|v| !v.file && !v.shared && v.read);
        Ok(mapping.map(|v| (v.range, if v.write { Access::Write } else { Access::Read })))
    }

    fn watch(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        where_nothing_is_ours(range, || self.register_for_news(range)).unwrap_or(Err(Trouble::Absent))
    }

    fn unwatch(&self, range: VaRange) -> Result<(), Trouble> {
        self.unregister_for_news(range)
    }

    fn mapped_from(&self, va: Va) -> Result<Option<Mapped>, Trouble> {
        Ok(self.maps.at_or_after(va).map_err(trouble)?.map(|v| {
            let access = if v.write { Access::Write } else { Access::Read };
            Mapped { range: v.range, allowed: v.read.then_some(access) }
        }))
    }

    fn show(&self, range: VaRange, memory: SharedMemory<'_>) -> Result<(), Trouble> {
        super::inplace::show(self, range, memory)
    }

    fn hide(&self, range: VaRange) -> Result<(), Trouble> {
        super::inplace::hide(self, range)
    }

    fn close(&self, range: VaRange) -> Result<(), Trouble> {
        super::inplace::close(self, range)
    }

    fn is_accessible(&self, range: VaRange, write: bool) -> bool {
        super::inplace::is_accessible(range, write)
    }

    fn read_mapped(&self, at: Va, to: &mut [u8]) -> bool {
        read_self(at.0, to) == Ok(to.len())
    }

    fn write_mapped(&self, at: Va, from: &[u8]) -> bool {
        // SAFETY: memory that the program shares with devices, which write there as other threads of the program would.
        unsafe { write_self(at.0, from) == Ok(from.len()) }
    }

    fn mappings_in(&self, range: VaRange) -> Result<u64, Trouble> {
        let (mut at, mut n) = (range.start, 0);
        while let Some(vma) = self.maps.at_or_after(at).map_err(trouble)?.filter(|vma| vma.range.start < range.end) {
            n += 1;
            at = vma.range.end;
        }
        Ok(n)
    }

    fn most_mappings(&self) -> u64 {
        super::inplace::most_mappings()
    }

    fn staging(&self) -> VaRange {
        self.staging.range()
    }

    fn read_staged<T>(&self, range: VaRange, read: impl FnOnce(&[u8]) -> T) -> T {
        let claim = self.staging.claim(range, Use::Shared);
        read(self.staging.bytes(&claim, range))
    }

    fn write_staged<T>(&self, range: VaRange, write: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut claim = self.staging.claim(range, Use::Alone);
        write(self.staging.bytes_mut(&mut claim, range))
    }

    fn drop_staged(&self, range: VaRange) -> Result<(), Trouble> {
        let claim = self.staging.claim(range, Use::Alone);
        if !self.capabilities.move_pages {
            return self.staging.discard(&claim, range).map_err(trouble);
        }
        self.uffd.unregister(range.start.0, range.len()).map_err(trouble)?;
        let dropped = self.staging.discard(&claim, range);
        self.uffd.register(range.start.0, range.len(), Mode::Protected).map_err(trouble)?;
        dropped.map_err(trouble)
    }

    fn wait_message(&self, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        fn fd(uffd: &Uffd) -> PollFd<'_> {
            PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)
        }
        let there = match self.watcher.get() {
            None => poll(&mut [fd(&self.uffd)], timeout.as_ref()),
            Some(watcher) => poll(&mut [fd(&self.uffd), fd(watcher)], timeout.as_ref()),
        };
        matches!(there, Ok(1..))
    }

    fn receive(&self) -> Option<Message> {
        let m = self.uffd.read().ok().or_else(|| self.watcher.get()?.read().ok())?;
        let range = |start, end| VaRange { start: Va(start), end: Va(end) };
        let [a, b, c] = m.args;
        Some(match m.event {
            event::PAGEFAULT => {
                Message::Fault {
                    va: Va(b),
                    write: a & FAULT_WRITE != 0,
                    protected: a & FAULT_WP != 0,
                    // Zero where the kernel does not tell.
                    thread: c as u32,
                }
            }
            event::REMOVE => Message::Discard(range(a, b)),
            event::UNMAP => Message::Unmap(range(a, b)),
            event::REMAP => Message::Move { from: Va(a), to: Va(b), len: c },
            event::FORK => Message::Fork(a as i32),
            _ => return None,
        })
    }

    fn is_changing(&self) -> bool {
        // Every operation is refused while a change is pending; this one does nothing where it is allowed: nothing in
        // staging is protected.
        let page = self.geometry.page_bytes() as u64;
        let r = self.staging.range();
        let spare = Va(r.end.0 - page);
        self.uffd.write_protect(spare.0, page, false, false) == Err(Errno::AGAIN)
            || self.watcher.is_changing(spare, page)
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
