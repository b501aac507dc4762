//! Mappings of our own: reserved, committed, registered so that nobody adopts them.
//!
//! Everything this library keeps for itself lives in a [`Mapping`]: private anonymous memory that is entered in
//! a table of own ranges ([`ours_within`]), so that a scan of the process's mappings never takes it for the
//! program's. Nothing here comes from the program's heap.
//!
//! A scan may have seen the program's memory where something of ours is by now. So whoever is about to have the kernel
//! tell of faults in a range does so [while nothing of ours is there](where_nothing_is_ours): ours are mapped and entered in
//! one step for him, under [`PLACING`].

use super::futex::Mutex;
use super::signal::without_signals;
use peerspace_core::addr::{Va, VaRange};
use peerspace_core::sync::{AtomicU64, AtomicUsize, Ordering};
use peerspace_core::words::Words;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::AtomicU64 as StdAtomicU64;

/// A private anonymous mapping that is unmapped when dropped.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping is memory, usable from any thread; what is in it is guarded by its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, aligned to `align` (a power of two, at least a page). Without `usable` nothing can be
    /// accessed until [`allow`](Mapping::allow).
    ///
    /// # Errors
    /// The errno of mmap.
    pub fn new(len: usize, align: usize, usable: bool) -> Result<Mapping, Errno> {
        Self::near(0, len, align, usable)
    }

    /// The same, at the address `near` if that is free; wherever else if not.
    ///
    /// # Errors
    /// The errno of mmap; ENOMEM too when there are more of ours than can be told apart.
    pub fn near(near: usize, len: usize, align: usize, usable: bool) -> Result<Mapping, Errno> {
        // Signals wait, since a handler of the program may fault and come by here again.
        without_signals(|| {
            let _placing = PLACING.lock();
            let mapping = Self::map(near, len, align, usable)?;
            if enter(mapping.range()) {
                return Ok(mapping);
            }
            // Losing track of own memory would let it be adopted and evicted under our feet.
            let range = mapping.leak();
            // SAFETY: the mapping just made, of which nobody knows.
            unsafe { rustix::mm::munmap(range.start.0 as *mut c_void, range.len() as usize)? };
            Err(Errno::NOMEM)
        })
    }

    fn map(near: usize, len: usize, align: usize, usable: bool) -> Result<Mapping, Errno> {
        let prot = if usable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::empty() };
        let page = rustix::param::page_size();
        let len = len.next_multiple_of(page);
        let slack = align.saturating_sub(page);
        let total = len.checked_add(slack).ok_or(Errno::NOMEM)?;
        // SAFETY: a new mapping at an address the kernel chooses: what is there already it leaves alone.
        let at = unsafe {
            rustix::mm::mmap_anonymous(near as *mut c_void, total, prot, MapFlags::PRIVATE | MapFlags::NORESERVE)?
        };
        let start = (at as usize).next_multiple_of(align);
        let (front, back) = (start - at as usize, at as usize + total - (start + len));
        // SAFETY: both ends belong to the mapping just made, and nobody knows of them.
        unsafe {
            if front > 0 {
                rustix::mm::munmap(at, front)?;
            }
            if back > 0 {
                rustix::mm::munmap((start + len) as *mut c_void, back)?;
            }
        }
        Ok(Mapping { start: start as *mut u8, len })
    }

    /// The addresses.
    pub fn range(&self) -> VaRange {
        VaRange { start: Va(self.start as u64), end: Va(self.start as u64 + self.len as u64) }
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a mapping of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes the first `len` bytes readable and writable.
    ///
    /// # Errors
    /// The errno of mprotect; ENOMEM beyond the end.
    pub fn allow(&self, len: usize) -> Result<(), Errno> {
        if len > self.len {
            return Err(Errno::NOMEM);
        }
        // SAFETY: the range is ours; adding permissions cannot break a reference.
        unsafe { rustix::mm::mprotect(self.start.cast(), len, MprotectFlags::READ | MprotectFlags::WRITE) }
    }

    /// Gives advice about `len` bytes from `offset`.
    ///
    /// # Safety
    /// Advice that discards content needs the bytes to be unreferenced.
    ///
    /// # Errors
    /// The errno of madvise.
    pub unsafe fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        assert!(offset + len <= self.len);
        // SAFETY: the range is ours; the caller vouches for the content.
        unsafe { rustix::mm::madvise(self.start.add(offset).cast(), len, advice) }
    }

    /// Lets go of the mapping without unmapping it: for memory whose use cannot be seen to end.
    #[must_use]
    pub fn leak(self) -> VaRange {
        let range = self.range();
        std::mem::forget(self);
        range
    }
}

impl Mapping {
    /// Takes up again what [`leak`](Mapping::leak) let go of.
    ///
    /// # Safety
    /// `start` and `len` (before rounding to pages) are those of a leaked mapping that nobody uses any more.
    pub unsafe fn from_leaked(start: *mut u8, len: usize) -> Mapping {
        Mapping { start, len: len.next_multiple_of(rustix::param::page_size()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In one step for whoever registers what is not ours. Nobody has to hear of it first, for ours is not registered, or its
        // userfaultfd is closed by now.
        let r = without_signals(|| {
            let _placing = PLACING.lock();
            forget(self.range());
            // SAFETY: the mapping is ours, and its owner lets go of it.
            unsafe { rustix::mm::munmap(self.start.cast(), self.len) }
        });
        debug_assert_eq!(r, Ok(()));
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:?})", self.range())
    }
}

const MAX_OWN: usize = 1024;
/// Start and end of each own range; a start of zero is a free place.
static OWN: [[StdAtomicU64; 2]; MAX_OWN] = [const { [StdAtomicU64::new(0), StdAtomicU64::new(0)] }; MAX_OWN];
/// Held from before something of ours is mapped until it is entered, and while it goes, with signals blocked. Nobody waits for
/// anything else meanwhile.
static PLACING: Mutex<()> = Mutex::new(());

/// Does `act` if nothing in `range` is ours; and nothing of ours is mapped there meanwhile.
pub fn where_nothing_is_ours<T>(range: VaRange, act: impl FnOnce() -> T) -> Option<T> {
    without_signals(|| {
        let _placing = PLACING.lock();
        ours_within(range).next().is_none().then(act)
    })
}

/// In a forked child: a thread that it does not have may have been mapping something, which is nobody's now.
pub(super) fn forget_other_threads() {
    // SAFETY: the only thread is in no call of this module, since none of them forks.
    unsafe { PLACING.force_unlock() };
}

/// Enters `range` as ours. False when there is no place for it.
fn enter(range: VaRange) -> bool {
    for [start, end] in &OWN {
        // The end is written first, so whoever sees the start sees the end.
        if start.load(Ordering::Relaxed) == 0
            && start.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        {
            end.store(range.end.0, Ordering::Relaxed);
            start.store(range.start.0, Ordering::Release);
            return true;
        }
    }
    false
}

fn forget(range: VaRange) {
    for [start, _] in &OWN {
        if start.compare_exchange(range.start.0, 0, Ordering::Release, Ordering::Relaxed).is_ok() {
            return;
        }
    }
    debug_assert!(false, "{range} was not entered");
}

/// Enters memory this library uses that was not mapped here (memory of a device, say).
///
/// # Panics
/// When there are more of ours than can be told apart.
pub fn claim(range: VaRange) {
    assert!(enter(range), "more than {MAX_OWN} own mappings");
}

/// Undoes [`claim`].
pub fn unclaim(range: VaRange) {
    forget(range);
}

/// Has the kernel keep `range` a mapping of its own: one that comes beside it does not become part of it.
pub fn set_apart(range: VaRange) {
    // SAFETY: changes how the memory is backed and nothing it holds. A kernel without huge pages refuses, and then
    // mappings may be joined as before.
    let _ =
        unsafe { rustix::mm::madvise(range.start.0 as *mut c_void, range.len() as usize, Advice::LinuxNoHugepage) };
}

/// Our own ranges that overlap `range`.
pub fn ours_within(range: VaRange) -> impl Iterator<Item = VaRange> {
    OWN.iter()
        .map(|[start, end]| {
            let start = start.load(Ordering::Acquire);
            VaRange { start: Va(start), end: Va(end.load(Ordering::Relaxed)) }
        })
        .filter(move |own| own.start.0 > 1 && own.overlaps(range))
}

/// Bytes of our own mappings, used or not.
pub fn own_bytes() -> u64 {
    ours_within(VaRange { start: Va(2), end: Va(u64::MAX) }).map(VaRange::len).sum()
}

/// Zeroed words in a mapping of their own, usable up to a mark that can rise.
#[derive(Debug)]
pub struct Arena {
    mapping: Mapping,
    usable: AtomicUsize,
}

impl Arena {
    /// Reserves `words` words; the first `usable` can be used.
    ///
    /// # Errors
    /// The errno of mmap or mprotect.
    pub fn new(words: usize, usable: usize) -> Result<Arena, Errno> {
        let mapping = Mapping::new(words.max(1) * 8, rustix::param::page_size(), false)?;
        let arena = Arena { mapping, usable: AtomicUsize::new(0) };
        arena.grow(usable)?;
        Ok(arena)
    }

    /// Makes the first `usable` words usable; fewer than now is of no effect.
    ///
    /// # Errors
    /// ENOMEM beyond what was reserved, or the errno of mprotect.
    pub fn grow(&self, usable: usize) -> Result<(), Errno> {
        if usable > self.usable.load(Ordering::Relaxed) {
            // In steps, since each changes a mapping under the kernel's lock.
            let bytes = (usable * 8).next_multiple_of(1 << 20).min(self.mapping.len());
            if usable * 8 > bytes {
                return Err(Errno::NOMEM);
            }
            self.mapping.allow(bytes)?;
            // Release: whoever sees the mark may use the memory below it.
            self.usable.fetch_max(bytes / 8, Ordering::Release);
        }
        Ok(())
    }

    /// Asks for base pages only, so that no more memory is taken up than was touched.
    pub fn use_base_pages(&self) {
        // SAFETY: the advice changes no content. A kernel without huge pages refuses it, and needs it not.
        let _ = unsafe { self.mapping.advise(0, self.mapping.len(), Advice::LinuxNoHugepage) };
    }

    /// Has the kernel take up the memory of `count` words from `first` on at once, which is cheaper than a fault for
    /// each page. They keep their values; where the kernel refuses, nothing happens.
    ///
    /// # Panics
    /// Beyond the words that can be used.
    pub fn populate(&self, first: usize, count: usize) {
        let end = first.checked_add(count).expect("a range of words");
        assert!(end <= self.words().len(), "words {first}..{end} of {}", self.words().len());
        let page = rustix::param::page_size();
        let start = first * 8 / page * page;
        // SAFETY: the advice changes no content.
        let _ = unsafe { self.mapping.advise(start, end * 8 - start, Advice::LinuxPopulateWrite) };
    }

    /// Gives the memory of the whole pages inside `count` words from `first` on back to the kernel; they read as
    /// zeros until they are written again. Whoever accesses them meanwhile sees zeros or what was there.
    ///
    /// False when the kernel refuses (memory that the program has locked, for one); the words are as they were.
    ///
    /// # Panics
    /// Beyond the words that can be used.
    pub fn discard(&self, first: usize, count: usize) -> bool {
        let end = first.checked_add(count).expect("a range of words");
        assert!(end <= self.words().len(), "words {first}..{end} of {}", self.words().len());
        let page = rustix::param::page_size();
        let (start, end) = ((first * 8).next_multiple_of(page), end * 8 / page * page);
        if start >= end {
            return true;
        }
        // SAFETY: the range is mapped and only ever reached as atomic words, whose values may change at any time;
        // the mapping stays readable and writable throughout.
        unsafe { self.mapping.advise(start, end - start, Advice::LinuxDontNeed) }.is_ok()
    }
}

impl Arena {
    /// The words that can be used now.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        let n = self.usable.load(Ordering::Acquire);
        // SAFETY: the first `n` words are mapped, zeroed by the kernel, and stay so while `self` lives; an
        // all-zero AtomicU64 is valid.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast::<AtomicU64>(), n) }
    }
}

impl Words for Arena {
    fn len(&self) -> usize {
        self.usable.load(Ordering::Acquire)
    }

    #[inline]
    fn at(&self, i: usize) -> &AtomicU64 {
        &self.words()[i]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::alone;

    #[test]
    fn own_mappings_are_known_and_forgotten() {
        let m = Mapping::new(3 << 20, 2 << 20, true).unwrap();
        let r = m.range();
        assert!(r.start.is_aligned(2 << 20));
        assert_eq!(ours_within(r).collect::<Vec<_>>(), [r]);
        drop(m);
        assert!(!ours_within(r).any(|x| x == r));
    }

    /// One more than can be told apart is refused, and nothing of it stays mapped.
    #[test]
    fn too_many_mappings_of_ours_are_refused() {
        alone(|| {
            let page = rustix::param::page_size();
            let mut all = std::vec::Vec::with_capacity(MAX_OWN);
            let why = loop {
                match Mapping::new(page, page, false) {
                    Ok(mapping) => all.push(mapping),
                    Err(why) => break why,
                }
            };
            assert_eq!(why, Errno::NOMEM);
            assert!(all.len() > MAX_OWN / 2 && all.len() <= MAX_OWN, "{}", all.len());
            // Where nobody is put who does not ask for it.
            let spot = 128 << 30;
            assert_eq!(Mapping::near(spot, page, page, false).map(drop), Err(Errno::NOMEM));
            assert!(!crate::linux::remap::is_mapped(Va(spot as u64)));
            drop(all.pop());
            let again = Mapping::new(page, page, true).unwrap();
            assert_eq!(ours_within(again.range()).collect::<Vec<_>>(), [again.range()]);
        });
    }

    #[test]
    fn an_arena_grows_in_place_and_refuses_more_than_it_has() {
        let a = Arena::new(1 << 22, 10).unwrap();
        let first = a.words().as_ptr();
        assert!(a.words().len() >= 10);
        a.words()[9].store(7, Ordering::Relaxed);
        a.grow(1 << 20).unwrap();
        assert_eq!(a.words().as_ptr(), first);
        assert!(a.words().len() >= 1 << 20);
        assert_eq!(a.words()[9].load(Ordering::Relaxed), 7);
        assert_eq!(a.words()[(1 << 20) - 1].load(Ordering::Relaxed), 0);
        assert!(a.grow((1 << 22) + 1).is_err());
    }

    #[test]
    fn discarding_zeroes_the_whole_pages_inside() {
        let per_page = rustix::param::page_size() / 8;
        let a = Arena::new(4 * per_page, 4 * per_page).unwrap();
        a.use_base_pages();
        a.words().iter().for_each(|w| w.store(7, Ordering::Relaxed));
        a.populate(1, 4 * per_page - 1);
        assert!(a.words()[..4 * per_page].iter().all(|w| w.load(Ordering::Relaxed) == 7));
        // From the middle of the first page to the middle of the last.
        assert!(a.discard(per_page / 2, 3 * per_page));
        for (i, w) in a.words()[..4 * per_page].iter().enumerate() {
            let kept = i < per_page || i >= 3 * per_page;
            assert_eq!(w.load(Ordering::Relaxed), if kept { 7 } else { 0 }, "word {i}");
        }
        assert!(a.discard(1, 2));
        assert_eq!(a.words()[1].load(Ordering::Relaxed), 7);
    }

    #[test]
    #[should_panic(expected = "words")]
    fn discarding_beyond_the_end_is_refused() {
        let a = Arena::new(1 << 17, 1 << 17).unwrap();
        a.discard(1 << 16, (1 << 16) + 1);
    }
}
