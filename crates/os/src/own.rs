//! An allocator for our own things, in mappings of our own.
//!
//! Whatever a fault may touch must not be managed memory, or the fault would wait for itself. The program's
//! heap can be adopted, and the program's global allocator can be a region of ours, so the engine keeps its
//! structures here: [`Own`] is an allocator for `allocator-api2` collections, [`OwnGlobal`] the global allocator
//! of a preloaded library. [`Shared`] is a reference-counted pointer to such a structure.
//!
//! Nothing on the fault path calls into this module; it serves set-up and background work.

use crate::kernel::Trouble;
use crate::linux::fork;
use crate::linux::futex::{Mutex, RawMutex};
use crate::linux::map::Mapping;
use allocator_api2::alloc::{AllocError, Allocator, GlobalAlloc, Layout};
use rustix::process::Pid;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use talc::base::Talc;
use talc::source::AllocatorSource;
use talc::{DefaultBinning, TalcLock};

/// The size of the pieces the heap grows by.
const PIECE: usize = 1 << 20;

/// Hands out whole mappings.
#[derive(Debug, Clone, Copy)]
struct Mappings;

// SAFETY: each allocation is a mapping nobody else has; it stays valid until it is deallocated; the type has no
// state, so copies are interchangeable.
unsafe impl Allocator for Mappings {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let mapping = Mapping::new(layout.size(), layout.align(), true).map_err(|_| AllocError)?;
        let range = mapping.leak();
        let p = NonNull::new(range.start.0 as *mut u8).ok_or(AllocError)?;
        Ok(NonNull::slice_from_raw_parts(p, range.len() as usize))
    }

    unsafe fn deallocate(&self, p: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller got `p` from `allocate` with this size, which leaked exactly this mapping.
        drop(unsafe { Mapping::from_leaked(p.as_ptr(), layout.size()) });
    }
}

type Source = AllocatorSource<Mappings>;

static HEAP: TalcLock<RawMutex, Source> = TalcLock::new(AllocatorSource::with_block_size(Mappings, PIECE));

/// The heap while it is [frozen](freeze_heap).
struct Frozen {
    _guard: lock_api::MutexGuard<'static, RawMutex, Talc<Source, DefaultBinning>>,
    /// Who froze it, and how often.
    thread: Pid,
    times: usize,
}

static FROZEN: Mutex<Option<Frozen>> = Mutex::new(None);

/// To be called before the heap is locked: sees to it that it is frozen around every fork, whether or not there is
/// anything else that must be. A child would find it locked otherwise by a thread it does not have.
#[inline]
fn first_use() {
    static SEEN: AtomicBool = AtomicBool::new(false);
    // Set before the call, which may allocate, and so come by here again.
    if !SEEN.load(Ordering::Relaxed) && !SEEN.swap(true, Ordering::Relaxed) {
        fork::install();
    }
}

/// Allocates from mappings of our own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Own;

// SAFETY: delegates to one heap, so all copies are interchangeable.
unsafe impl Allocator for Own {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        first_use();
        HEAP.allocate(layout)
    }

    unsafe fn deallocate(&self, p: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller got `p` from `allocate` of this type, which is the same heap.
        unsafe { HEAP.deallocate(p, layout) }
    }
}

/// [`Own`] as a global allocator: for a library that is preloaded into programs whose heap it manages.
#[derive(Debug, Clone, Copy, Default)]
pub struct OwnGlobal;

// SAFETY: delegates to one heap.
unsafe impl GlobalAlloc for OwnGlobal {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        first_use();
        // SAFETY: the caller keeps the contract of GlobalAlloc.
        unsafe { HEAP.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { GlobalAlloc::dealloc(&HEAP, p, layout) }
    }
}

/// Keeps everybody out of the heap until [`thaw_heap`], so that a process forked in between finds it usable. A thread
/// may do so several times.
pub fn freeze_heap() {
    let thread = rustix::thread::gettid();
    if let Some(frozen) = FROZEN.lock().as_mut().filter(|f| f.thread == thread) {
        frozen.times += 1;
        return;
    }
    let _guard = HEAP.lock();
    *FROZEN.lock() = Some(Frozen { _guard, thread, times: 1 });
}

/// Undoes [`freeze_heap`], in the parent and in the child.
pub fn thaw_heap() {
    let mut frozen = FROZEN.lock();
    match frozen.as_mut() {
        Some(f) if f.times > 1 => {
            f.times -= 1;
            // In a child it is another thread by name.
            f.thread = rustix::thread::gettid();
        }
        _ => drop(frozen.take()),
    }
}

/// A vector in our own memory.
pub type Vec<T> = allocator_api2::vec::Vec<T, Own>;
/// A box in our own memory.
pub type Box<T> = allocator_api2::boxed::Box<T, Own>;

/// Bytes in a mapping of our own, aligned to a page: for transfers that want it so.
#[derive(Debug)]
pub struct Buffer {
    mapping: Mapping,
}

impl Buffer {
    /// `len` zeroed bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub fn new(len: usize) -> Result<Buffer, Trouble> {
        let mapping = Mapping::new(len.max(1), rustix::param::page_size(), true).map_err(|_| Trouble::NoMemory)?;
        Ok(Buffer { mapping })
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is readable, initialised by the kernel, and only reached through this buffer.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr(), self.mapping.len()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.mapping.len()) }
    }
}

/// A large mapping of our own that several threads read and write in pieces: the memory of a device, say.
///
/// Each [`Area::PIECE`] bytes have a lock; an access locks the pieces it touches. Not used yet costs nothing.
#[derive(Debug)]
pub struct Area {
    mapping: Mapping,
    locks: Vec<std::sync::RwLock<()>>,
}

impl Area {
    /// Bytes under one lock.
    pub const PIECE: usize = 2 << 20;

    /// `len` zeroed bytes, in huge pages where they can be had.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub fn new(len: usize) -> Result<Area, Trouble> {
        let mapping = Mapping::new(len.max(1), Self::PIECE, true).map_err(|_| Trouble::NoMemory)?;
        // SAFETY: the advice changes no content. Refusal means small pages.
        let _ = unsafe { mapping.advise(0, mapping.len(), rustix::mm::Advice::LinuxHugepage) };
        let mut locks = Vec::with_capacity_in(len.div_ceil(Self::PIECE), Own);
        locks.resize_with(len.div_ceil(Self::PIECE), Default::default);
        Ok(Area { mapping, locks })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// True for an area of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// Cuts `at..at + len` into pieces under one lock each: the lock, and the range of the piece.
    fn pieces(&self, at: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len()), "{len} bytes at {at} of {}", self.len());
        let end = at + len;
        (at / Self::PIECE..end.div_ceil(Self::PIECE))
            .map(move |i| (i, at.max(i * Self::PIECE)..end.min((i + 1) * Self::PIECE)))
    }

    /// Gives `read` the bytes at `at`, piece by piece with their offset from `at`, while it returns true. True if
    /// it always did.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn read(&self, at: usize, len: usize, mut read: impl FnMut(usize, &[u8]) -> bool) -> bool {
        self.pieces(at, len).all(|(lock, range)| {
            let _guard = self.locks[lock].read().unwrap_or_else(std::sync::PoisonError::into_inner);
            // SAFETY: in bounds (checked by pieces), initialised by the kernel, and nobody writes under the lock.
            let bytes = unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().add(range.start), range.len()) };
            read(range.start - at, bytes)
        })
    }

    /// Copies `bytes` to `at`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (lock, range) in self.pieces(at, bytes.len()) {
            let _guard = self.locks[lock].write().unwrap_or_else(std::sync::PoisonError::into_inner);
            // SAFETY: in bounds (checked by pieces), and nobody else reads or writes under the lock.
            let to = unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr().add(range.start), range.len()) };
            to.copy_from_slice(&bytes[range.start - at..range.end - at]);
        }
    }

    /// Gives the memory of whole pages inside `at..at + len` back to the kernel; they read as zeros.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn clear(&self, at: usize, len: usize) {
        let page = rustix::param::page_size();
        for (lock, range) in self.pieces(at, len) {
            let (start, end) = (range.start.next_multiple_of(page), range.end / page * page);
            if start < end {
                let _guard = self.locks[lock].write().unwrap_or_else(std::sync::PoisonError::into_inner);
                // SAFETY: in bounds, and nobody refers to the bytes under the lock. Refusal leaves them as they are.
                let _ = unsafe { self.mapping.advise(start, end - start, rustix::mm::Advice::LinuxDontNeed) };
            }
        }
    }
}

struct Counted<T> {
    count: AtomicUsize,
    value: T,
}

/// A reference-counted pointer to a value in our own memory.
pub struct Shared<T> {
    at: NonNull<Counted<T>>,
}

// SAFETY: like Arc: the value is reached through shared references, the count is atomic.
unsafe impl<T: Send + Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Moves `value` into our own memory.
    pub fn new(value: T) -> Shared<T> {
        let boxed = Box::new_in(Counted { count: AtomicUsize::new(1), value }, Own);
        let (at, _) = Box::into_raw_with_allocator(boxed);
        // SAFETY: into_raw gives a pointer that is not null.
        Shared { at: unsafe { NonNull::new_unchecked(at) } }
    }

    /// How many pointers there are to the value.
    pub fn count(this: &Self) -> usize {
        this.counted().count.load(Ordering::Acquire)
    }

    /// The address of the value, for handing it through C.
    pub fn as_ptr(this: &Self) -> *const T {
        &this.counted().value
    }

    fn counted(&self) -> &Counted<T> {
        // SAFETY: the allocation lives as long as any pointer to it.
        unsafe { self.at.as_ref() }
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        // Relaxed: the new pointer is made from one that exists.
        let before = self.counted().count.fetch_add(1, Ordering::Relaxed);
        assert!(before < usize::MAX / 2, "too many references");
        Shared { at: self.at }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Release, and Acquire by whoever drops the value: everything done through the other pointers is over.
        if self.counted().count.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: this was the last pointer; the box was made from the same allocator.
            drop(unsafe { Box::from_raw_in(self.at.as_ptr(), Own) });
        }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.counted().value
    }
}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::map::ours_within;
    use peerspace_core::addr::{Va, VaRange};

    #[test]
    fn our_things_live_in_our_mappings() {
        let mut v: Vec<u64> = Vec::new_in(Own);
        for i in 0..100_000 {
            v.push(i);
        }
        let b = Box::new_in([7u8; 5000], Own);
        let s = Shared::new(5);
        for p in [v.as_ptr() as u64, b.as_ptr() as u64, Shared::as_ptr(&s) as u64] {
            let at = VaRange::new(Va(p), 1).unwrap();
            assert_eq!(ours_within(at).count(), 1, "{p:#x} is not in memory of our own");
        }
        assert!(v.iter().copied().eq(0..100_000));
    }

    #[test]
    fn an_area_is_read_and_written_across_pieces() {
        let a = Area::new(3 * Area::PIECE).unwrap();
        let bytes: std::vec::Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        a.write(Area::PIECE - 5000, &bytes);
        let mut back = vec![0; bytes.len()];
        assert!(a.read(Area::PIECE - 5000, bytes.len(), |at, b| {
            back[at..at + b.len()].copy_from_slice(b);
            true
        }));
        assert_eq!(back, bytes);
        a.clear(0, 3 * Area::PIECE);
        assert!(a.read(0, 3 * Area::PIECE, |_, b| b.iter().all(|x| *x == 0)));
        assert!(std::panic::catch_unwind(|| a.write(3 * Area::PIECE - 1, &[1, 2])).is_err());
    }

    #[test]
    fn the_last_pointer_drops_the_value() {
        struct Flag<'a>(&'a AtomicUsize);
        impl Drop for Flag<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let dropped = AtomicUsize::new(0);
        let a = Shared::new(Flag(&dropped));
        let b = a.clone();
        assert_eq!(Shared::count(&b), 2);
        drop(a);
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        drop(b);
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
    }
}
