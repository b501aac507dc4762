//! Files that are open on a device, and the descriptors by which the program has them.
//!
//! To the kernel each is an anonymous memory file, which gives it a descriptor like any other: it can be duplicated, inherited,
//! sent, and mapped. Which file a descriptor leads to is noted in a table, without locks, since descriptors are closed by
//! handlers of signals, too. One that came about unseen is told by the number of its file; so is one that was closed unseen, as
//! `fclose` does it.

use crate::table::Slot;
use crate::world::{self, Member, World};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Descriptors that can lead to a device: those below this number.
const MOST_DESCRIPTORS: usize = 1 << 16;
/// Files that can be open at once.
const MOST_FILES: usize = 1 << 10;

/// In the place of a file's number: the [page map](crate::pagemap) of the process.
const PAGE_MAP: u32 = u32::MAX;

/// For each descriptor its file's number + 1, or [`PAGE_MAP`]; 0 for none of ours.
static DESCRIPTORS: [AtomicU32; MOST_DESCRIPTORS] = [const { AtomicU32::new(0) }; MOST_DESCRIPTORS];
static FILES: [File; MOST_FILES] = [const { File::new() }; MOST_FILES];
/// Files that are open, and descriptors of page maps, to spare others the search.
static OPEN: AtomicU32 = AtomicU32::new(0);
static PAGE_MAPS: AtomicU32 = AtomicU32::new(0);

/// A file that is open on a device.
struct File {
    /// Descriptors and requests that use it; 0: it is closed. While it is being set up, [`NEW`].
    users: AtomicU32,
    device: AtomicU32,
    slot: AtomicU32,
    volume: AtomicU64,
    inode: AtomicU64,
    process: AtomicU32,
}

/// Nobody's yet, and nobody else's either.
const NEW: u32 = 1 << 31;

impl File {
    const fn new() -> File {
        File {
            users: AtomicU32::new(0),
            device: AtomicU32::new(0),
            slot: AtomicU32::new(0),
            volume: AtomicU64::new(0),
            inode: AtomicU64::new(0),
            process: AtomicU32::new(0),
        }
    }

    /// One user more, if there is any.
    fn enter(&self) -> bool {
        let more = |n: u32| (n != 0 && n < NEW).then_some(n + 1);
        // Acquire: pairs with the Release in `open`.
        self.users.fetch_update(Ordering::Acquire, Ordering::Relaxed, more).is_ok()
    }

    fn leave(&self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            // In a forked process the bit is that of the other's file, which is of no use here either.
            if let Some(world) = world::world() {
                world.members[self.device.load(Ordering::Relaxed) as usize].leave_slot(self.slot());
            }
        }
    }

    /// What the kernel tells it by.
    fn identity(&self) -> (u64, u64) {
        (self.volume.load(Ordering::Relaxed), self.inode.load(Ordering::Relaxed))
    }

    fn slot(&self) -> Slot {
        Slot(self.slot.load(Ordering::Relaxed))
    }
}

/// A file that is in use, and stays open as long as this lives.
pub(crate) struct InUse(&'static File);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl InUse {
    /// Its device, and its bit in the entries of the page table.
    ///
    /// # Errors
    /// In a process other than the one that has opened it: what it mirrors is that one's memory.
    pub(crate) fn device(&self) -> Result<(&'static World, &'static Member, Slot), Errno> {
        let world = world::world().filter(|_| self.0.process.load(Ordering::Relaxed) == process());
        let world = world.ok_or(Errno::INVAL)?;
        Ok((world, &world.members[self.0.device.load(Ordering::Relaxed) as usize], self.0.slot()))
    }
}

fn process() -> u32 {
    rustix::process::getpid().as_raw_nonzero().get() as u32
}

/// Opens a device.
pub(crate) fn open(device: usize, close_on_exec: bool) -> Result<c_int, Errno> {
    let world = world::make()?;
    let flags = if close_on_exec { MemfdFlags::CLOEXEC } else { MemfdFlags::empty() };
    let memory = memfd_create(format!("hmm_dmirror{device}"), flags)?;
    let fd = memory.as_raw_fd();
    let place = usize::try_from(fd).ok().and_then(|fd| DESCRIPTORS.get(fd)).ok_or(Errno::MFILE)?;
    let identity = fstat(&memory)?;
    let free = |file: &File| file.users.compare_exchange(0, NEW, Ordering::Acquire, Ordering::Relaxed).is_ok();
    let number = FILES.iter().position(free).ok_or(Errno::NFILE)?;
    let file = &FILES[number];
    let slot = world.members[device].take_slot();
    file.device.store(device as u32, Ordering::Relaxed);
    file.slot.store(slot.0, Ordering::Relaxed);
    file.volume.store(identity.st_dev, Ordering::Relaxed);
    file.inode.store(identity.st_ino, Ordering::Relaxed);
    file.process.store(process(), Ordering::Relaxed);
    OPEN.fetch_add(1, Ordering::Relaxed);
    // Release: pairs with the Acquire in `enter`.
    file.users.store(1, Ordering::Release);
    leave(place.swap(number as u32 + 1, Ordering::AcqRel));
    Ok(memory.into_raw_fd())
}

fn nothing_is_noted() -> bool {
    OPEN.load(Ordering::Relaxed) == 0 && PAGE_MAPS.load(Ordering::Relaxed) == 0
}

fn noted(fd: c_int) -> Option<&'static AtomicU32> {
    if nothing_is_noted() {
        return None;
    }
    usize::try_from(fd).ok().and_then(|fd| DESCRIPTORS.get(fd))
}

/// The file that a descriptor leads to, if it is one of a device's.
pub(crate) fn find(fd: c_int) -> Option<InUse> {
    let place = noted(fd)?;
    let number = place.load(Ordering::Acquire);
    if number == 0 {
        return adopt(fd, place);
    }
    let file = FILES.get(number as usize - 1)?;
    let used = file.enter().then(|| InUse(file))?;
    if place.load(Ordering::Acquire) != number {
        // It has been closed, and may be another's, since it was looked up.
        return None;
    }
    if identity(fd)? == file.identity() {
        return Some(used);
    }
    // It was closed unseen, and is something else by now.
    if place.compare_exchange(number, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        leave(number);
    }
    adopt(fd, place)
}

/// What the kernel tells the file of a descriptor by.
fn identity(fd: c_int) -> Option<(u64, u64)> {
    // SAFETY: a number of the caller's; if it is no descriptor, the call says so.
    let stat = fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// Notes a descriptor that came about unseen, if it leads to a file of ours.
fn adopt(fd: c_int, place: &AtomicU32) -> Option<InUse> {
    let wanted = identity(fd)?;
    let same = |file: &&File| file.identity() == wanted;
    let file = FILES.iter().filter(same).find(|file| file.enter())?;
    let used = InUse(file);
    // It may have become another's in between.
    if !same(&file) {
        return None;
    }
    let number = FILES.iter().position(|other| std::ptr::eq(other, file))? as u32 + 1;
    if place.compare_exchange(0, number, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        // For the descriptor.
        file.enter();
    }
    Some(used)
}

/// A descriptor is about to be closed, or has just become something else that is not noted.
pub(crate) fn closing(fd: c_int) {
    let Some(place) = noted(fd) else { return };
    let number = place.swap(0, Ordering::AcqRel);
    leave(number);
}

/// What a descriptor has led to has one less.
fn leave(number: u32) {
    match number {
        0 => {}
        PAGE_MAP => {
            PAGE_MAPS.fetch_sub(1, Ordering::Relaxed);
        }
        number => FILES[number as usize - 1].leave(),
    }
}

/// All descriptors from `first` to `last` are about to be closed.
pub(crate) fn closing_all(first: u32, last: u32) {
    if nothing_is_noted() {
        return;
    }
    let last = last.min(MOST_DESCRIPTORS as u32 - 1);
    (first..=last).for_each(|fd| closing(fd as c_int));
}

/// `new` has just become what `old` is.
pub(crate) fn duplicated(old: c_int, new: c_int) {
    let (Some(from), Some(to)) = (noted(old), noted(new)) else { return };
    let number = from.load(Ordering::Acquire);
    let more = match number {
        _ if old == new => false,
        0 => false,
        PAGE_MAP => {
            PAGE_MAPS.fetch_add(1, Ordering::Relaxed);
            true
        }
        number => FILES[number as usize - 1].enter(),
    };
    if more {
        leave(to.swap(number, Ordering::AcqRel));
    }
}

/// A descriptor leads to the page map of the process.
pub(crate) fn note_page_map(fd: c_int) {
    let place = usize::try_from(fd).ok().and_then(|fd| DESCRIPTORS.get(fd));
    // Beyond those that are noted it says what the kernel knows.
    if let Some(place) = place {
        PAGE_MAPS.fetch_add(1, Ordering::Relaxed);
        leave(place.swap(PAGE_MAP, Ordering::AcqRel));
    }
}

/// In a forked process: page maps that are open are those of the process that it was forked from.
pub(crate) fn forget_page_maps() {
    if PAGE_MAPS.load(Ordering::Relaxed) == 0 {
        return;
    }
    let page_map = |place: &&AtomicU32| place.load(Ordering::Relaxed) == PAGE_MAP;
    DESCRIPTORS.iter().filter(page_map).for_each(|place| leave(place.swap(0, Ordering::Relaxed)));
}

/// Whether a descriptor leads to the page map of the process.
pub(crate) fn is_page_map(fd: c_int) -> bool {
    noted(fd).is_some_and(|place| place.load(Ordering::Relaxed) == PAGE_MAP)
}

/// Makes the file behind a descriptor long enough for a mapping of it. Whether it is one of a device's.
pub(crate) fn make_room(fd: c_int, offset: i64, len: usize) -> bool {
    let Some(_file) = find(fd) else { return false };
    // SAFETY: it is open, as far as the program goes on to say so.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let end = u64::try_from(offset).ok().and_then(|offset| offset.checked_add(len as u64));
    if let (Some(end), Ok(stat)) = (end, fstat(file))
        && (stat.st_size as u64) < end
    {
        // The mapping says what is wrong with it.
        let _ = ftruncate(file, end);
    }
    true
}
