//! The space of this process, and its four devices: made when a device is first opened, and there until the process ends.
//!
//! A forked process has them too, with everything that lived on devices (rule G12); files that were open it has not.

use crate::changes;
use crate::device::{Handle, Memory, Mirror, PAGE};
use crate::files;
use crate::table::{SLOTS, Slot};
use peerspace::device::compressed::Compressed;
use peerspace::device::dax::Dax;
use peerspace::device::soft::Soft;
use peerspace::{DeviceId, Faults, PageView, Size, Space};
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::linux::fork::{self, ForkHandler};
use peerspace_os::linux::futex::Mutex;
use peerspace_os::linux::probe::ram_bytes;
use peerspace_os::linux::scan::{Maps, Pagemap, Vma};
use peerspace_os::own::Shared;
use rustix::io::Errno;
use std::fmt::Display;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Devices there are.
pub(crate) const DEVICES: usize = 4;
/// The variable that says how much memory each device has.
pub(crate) const MEMORY: &str = "PEERSPACE_DMIRROR_MEMORY";
/// The variable that says how much RAM managed memory may take up.
pub(crate) const HOST: &str = "PEERSPACE_DMIRROR_HOST";
/// The variable that has the reason of each refusal said on standard error.
pub(crate) const EXPLAIN: &str = "PEERSPACE_DMIRROR_EXPLAIN";

/// One device of this process.
pub(crate) struct Member {
    pub(crate) id: DeviceId,
    pub(crate) is_coherent: bool,
    pub(crate) mirror: Shared<Mirror>,
    /// The next allocation of a huge folio is to fail.
    pub(crate) fail_next: AtomicBool,
    slots: Slots,
}

/// Which bits of the page table's entries stand for files.
struct Slots {
    used: AtomicU32,
    /// No file's any more, but something may still be known to them.
    stale: AtomicU32,
}

/// See the [module](self).
pub(crate) struct World {
    pub(crate) space: Space,
    pub(crate) members: Vec<Member>,
    maps: Maps,
    pagemap: Pagemap,
    explains: bool,
}

static WORLD: OnceLock<World> = OnceLock::new();
/// Held while it is made.
static MAKING: Mutex<()> = Mutex::new(());

/// The space of this process, if there is one.
pub(crate) fn world() -> Option<&'static World> {
    WORLD.get()
}

/// The space of this process.
pub(crate) fn make() -> Result<&'static World, Errno> {
    let _making = MAKING.lock();
    if let Some(world) = WORLD.get() {
        return Ok(world);
    }
    let world = World::new().map_err(|why| {
        crate::complain(format_args!("there are no mirror devices: {why}"));
        Errno::NODEV
    })?;
    Ok(WORLD.get_or_init(|| world))
}

/// Nobody makes a space while the process forks.
struct Quiet;

impl ForkHandler for Quiet {
    fn close(&self) {
        std::mem::forget(MAKING.lock());
        changes::rest();
    }

    fn open(&self) {
        // SAFETY: locked by `close`, in this thread or in the one that this is the copy of.
        unsafe {
            changes::go_on();
            MAKING.force_unlock();
        }
    }

    fn before(&self) {}

    fn parent(&self) {}

    fn child(&self) {
        files::forget_page_maps();
        if let Some(world) = world() {
            // What it said of the other process is worth nothing here. Without it nothing can be asked of the devices.
            let _ = world.maps.renew().and_then(|()| world.pagemap.renew());
        }
    }
}

/// Sees to it that forks find everything here at rest.
pub(crate) fn expect_forks() {
    // There is room: it is the first.
    if let Ok(registration) = fork::register(Shared::new(Quiet)) {
        std::mem::forget(registration);
    }
}

/// A size in the environment.
fn size(variable: &str, otherwise: u64) -> Result<u64, String> {
    match std::env::var(variable) {
        Ok(text) => text.parse::<Size>().map(|size| size.0).map_err(|e| format!("{variable}: {e}")),
        Err(_) => Ok(otherwise),
    }
}

impl World {
    fn new() -> Result<World, String> {
        let (ram, bytes) = (ram_bytes(), size(MEMORY, 1 << 30)?);
        let host = size(HOST, ram)?;
        let no_memory = |why: &dyn Display| format!("no memory for a device of {bytes} bytes: {why}");
        let fallback = Compressed::new(ram).map_err(|e| no_memory(&e))?;
        let builder = Space::builder().host(host).faults(Faults::Threads).device(fallback);
        let space = builder.build().map_err(|e| e.to_string())?;
        // SAFETY: the C library's functions by which mappings change are interposed (`mappings`, `heap`), and announce it.
        unsafe { space.promise_announcements() };
        let mut members = Vec::new();
        for number in 0..DEVICES {
            let memory = match number {
                0 | 1 => Memory::Private(Soft::new(bytes).map_err(|e| no_memory(&e))?),
                _ => Memory::Coherent(Box::new(Dax::memory(bytes).map_err(|e| no_memory(&e))?)),
            };
            let mirror = Shared::new(Mirror::new(number, memory));
            let id = space.attach(Handle(mirror.clone())).map_err(|e| e.to_string())?;
            let slots = Slots { used: AtomicU32::new(0), stale: AtomicU32::new(0) };
            members.push(Member { id, is_coherent: number >= 2, mirror, fail_next: AtomicBool::new(false), slots });
        }
        let maps = Maps::open().map_err(|e| format!("/proc/self/maps: {e}"))?;
        let pagemap = Pagemap::open().map_err(|e| format!("/proc/self/pagemap: {e}"))?;
        let explains = std::env::var_os(EXPLAIN).is_some_and(|value| !value.is_empty());
        Ok(World { space, members, maps, pagemap, explains })
    }

    /// Says why a request is refused with this errno, if that is wanted.
    pub(crate) fn refused(&self, errno: Errno, range: VaRange, why: &dyn Display) -> Errno {
        if self.explains {
            crate::complain(format_args!("{range}: {why}: {errno}"));
        }
        errno
    }

    /// The mapping that holds `va`, or else the next one.
    pub(crate) fn mapping_from(&self, va: u64) -> Option<Vma> {
        self.maps.at_or_after(Va(va)).ok().flatten()
    }

    /// The pieces of mappings that make up `range`, in order, as they are asked for; then, as an error, from where on
    /// there is none.
    pub(crate) fn mappings(&self, range: VaRange) -> impl Iterator<Item = Result<(VaRange, Vma), VaRange>> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let Some(vma) = self.mapping_from(at.0).filter(|vma| vma.range.contains(at)) else {
                let rest = VaRange { start: at, ..range };
                at = range.end;
                return Some(Err(rest));
            };
            let piece = VaRange { start: at, end: vma.range.end.min(range.end) };
            at = piece.end;
            Some(Ok((piece, vma)))
        })
    }

    /// The parts of `range`, of a private mapping of a file, that the program has pages of its own of.
    pub(crate) fn copied(&self, range: VaRange) -> Result<Vec<VaRange>, Errno> {
        let mut copied = Vec::new();
        self.pagemap.cpu_runs(range, &mut |run, page| {
            if !page.file {
                copied.push(run);
            }
        })?;
        Ok(copied)
    }

    /// The parts of `range` whose pages are such, as they are now.
    pub(crate) fn parts(&self, range: VaRange, such: impl Fn(&PageView) -> bool) -> Vec<VaRange> {
        let mut parts: Vec<VaRange> = Vec::new();
        let pages = self.space.pages(range.start.0 as *const u8, range.len() as usize);
        for (nth, _) in pages.into_iter().flatten().enumerate().filter(|(_, view)| such(view)) {
            let start = Va(range.start.0 + nth as u64 * PAGE);
            let end = Va(start.0 + PAGE);
            match parts.last_mut().filter(|last| last.end == start) {
                Some(last) => last.end = end,
                None => parts.push(VaRange { start, end }),
            }
        }
        parts
    }
}

impl Member {
    /// A bit for a new file.
    pub(crate) fn take_slot(&self) -> Slot {
        let all = (1u32 << SLOTS) - 1;
        loop {
            let (used, stale) = (self.slots.used.load(Ordering::Relaxed), self.slots.stale.load(Ordering::Acquire));
            // What is stale last: it is work.
            let free = [all & !used & !stale, all & !used].into_iter().find(|free| *free != 0);
            let Some(free) = free else { return Slot(SLOTS - 1) };
            let bit = 1 << free.trailing_zeros();
            if self.slots.used.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
                continue;
            }
            let slot = Slot(free.trailing_zeros());
            if self.slots.stale.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
                self.mirror.forget(slot);
            }
            return slot;
        }
    }

    /// A file is closed. Takes no lock: programs close files in handlers of signals.
    pub(crate) fn leave_slot(&self, slot: Slot) {
        let bit = 1 << slot.0;
        self.slots.stale.fetch_or(bit, Ordering::AcqRel);
        self.slots.used.fetch_and(!bit, Ordering::AcqRel);
    }
}
