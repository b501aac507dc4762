//! Allocators whose memory is a space's: [`Pool`] for collections that ask for one, [`Heap`] for a whole program.
//!
//! The free lists of both live in the memory they hand out, so a pool of a terabyte costs nothing before it is used.
//! Working on the lists may therefore fault. That is no danger as long as whoever serves faults never waits for the
//! lists: the engine allocates from memory of its own, the lock is not one that a fault takes, and [`Heap`] leaves
//! requests of the engine's threads to the system.
//!
//! Memory is given back lazily: what is freed in pieces of [`DISCARD`] bytes or more, its whole pages are discarded
//! at once, so that they take up neither RAM nor a place on a device; smaller pieces age and leave RAM like anything
//! that is not used.
//!
//! This is the one file of the crate with unsafe code: both traits are unsafe to implement, and their callers hand
//! in raw pointers.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::region::Region;
use crate::space::{Builder, Faults, Space};
#[cfg(feature = "devices")]
use crate::spec::DeviceSpec;
use peerspace_core::addr::{Va, VaRange};
use peerspace_os::linux::fork::{self, ForkHandler};
use peerspace_os::linux::futex::Mutex;
use peerspace_os::linux::thread::{is_unmanaged, unmanaged};
use peerspace_os::own::Shared;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use talc::DefaultBinning;
use talc::base::Talc;
use talc::source::Manual;

/// Freed memory of this many bytes in one piece is discarded from the space at once: what that costs (a system call
/// and a message) is then less than what keeping the pages would.
const DISCARD: usize = 128 << 10;

/// The free lists of a pool.
struct Books(Mutex<Talc<Manual, DefaultBinning>>);

impl ForkHandler for Books {
    fn close(&self) {
        std::mem::forget(self.0.lock());
    }

    fn open(&self) {
        // SAFETY: `close` has taken the lock and forgotten the guard, in this thread or the one it was forked from.
        unsafe { self.0.force_unlock() }
    }

    fn before(&self) {}
    fn parent(&self) {}
    fn child(&self) {}
}

struct Inner {
    // Dropped in this order: nobody asks for the books when the memory goes.
    _forks: fork::Registration<Books>,
    books: Shared<Books>,
    region: Region,
}

/// An allocator that hands out a region's memory: for `Vec`, `Box` and maps that may outgrow RAM.
///
/// Implements `Allocator` of the crate allocator-api2, and with the cargo feature `hashbrown` (on by default) also
/// that of its version 0.2, which hashbrown and others use. Clones are the same pool; it lives until the last of them
/// and of the collections that hold one is gone. All of it can be used from any thread.
///
/// When the region is used up, allocating fails: `AllocError`.
///
/// ```
/// use allocator_api2::vec::Vec;
/// use peerspace::{Space, device::soft::Soft};
///
/// let space = Space::builder().host(16 << 20).device(Soft::new(64 << 20)?).build()?;
/// let pool = space.pool(1 << 30)?;
/// let mut squares: Vec<u64, _> = Vec::new_in(pool.clone());
/// squares.extend((0..10_000).map(|n| n * n));
/// assert_eq!(squares[9_999], 99_980_001);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Pool {
    inner: Shared<Inner>,
}

impl Space {
    /// An allocator with room for about `bytes` bytes, in a region of its own.
    ///
    /// # Errors
    /// As [`region`](Space::region), and when there are too many pools.
    pub fn pool(&self, bytes: u64) -> Result<Pool, Error> {
        Pool::new(self.region(bytes)?)
    }
}

impl Pool {
    /// Hands out the memory of `region`.
    ///
    /// # Errors
    /// When there are too many pools (about fifty in a process).
    pub fn new(region: Region) -> Result<Pool, Error> {
        let mut talc = Talc::new(Manual);
        // SAFETY: the memory is the region's, which nobody else refers to (it was moved in) and which lives as long
        // as the books.
        let claimed = unsafe { talc.claim(region.as_ptr(), region.len()) };
        let books = Shared::new(Books(Mutex::new(talc)));
        let bad = |why| Error::BadRange { what: format!("a pool of {} bytes", region.len()), why };
        claimed.ok_or_else(|| bad("it is too small for its own bookkeeping"))?;
        let _forks = fork::register(books.clone()).map_err(|_| bad("there are too many pools and spaces"))?;
        Ok(Pool { inner: Shared::new(Inner { _forks, books, region }) })
    }

    /// The space it belongs to.
    pub fn space(&self) -> &Space {
        self.inner.region.space()
    }

    /// Whether the byte at `p` is memory of this pool.
    pub fn contains(&self, p: *const u8) -> bool {
        (p as usize).wrapping_sub(self.inner.region.as_ptr() as usize) < self.inner.region.len()
    }

    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        if layout.size() == 0 {
            return NonNull::new(std::ptr::without_provenance_mut(layout.align()));
        }
        // SAFETY: the size is not zero.
        unsafe { self.inner.books.0.lock().allocate(layout) }
    }

    fn take_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        let p = self.take(layout)?;
        // SAFETY: the memory was just handed out, so it is ours to write and discard.
        unsafe { self.clear(p, layout.size()) };
        Some(p)
    }

    /// # Safety
    /// `p` comes from [`take`](Pool::take) or [`change`](Pool::change) with this layout, and is not used any more.
    unsafe fn give(&self, p: NonNull<u8>, layout: Layout) {
        if layout.size() == 0 {
            return;
        }
        // While it is still ours: from the moment the books know of it, others may write there.
        // SAFETY: the caller does not use the bytes any more.
        unsafe { self.discard(p, layout.size()) };
        // SAFETY: handed on from the caller.
        unsafe { self.inner.books.0.lock().deallocate(p.as_ptr(), layout) }
    }

    /// Makes an allocation larger or smaller, where it is if possible; it keeps its content up to the smaller size.
    /// If there is no memory for it, everything stays as it was.
    ///
    /// # Safety
    /// `p` comes from [`take`](Pool::take) or this function with the layout `old`. It is not used any more, if it
    /// differs from the pointer that is returned.
    unsafe fn change(&self, p: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<u8>> {
        let fits = p.as_ptr().addr().is_multiple_of(new.align());
        if old.size() != 0 && new.size() != 0 && fits {
            if new.size() <= old.size() {
                // SAFETY: the caller has no use for what lies behind the new size; it is inside of the allocation.
                unsafe { self.discard(p.add(new.size()), old.size() - new.size()) };
            }
            // SAFETY: handed on from the caller; the new size is not zero.
            if unsafe { self.inner.books.0.lock().try_realloc_in_place(p.as_ptr(), old, new.size()) } {
                return Some(p);
            }
        }
        let q = self.take(new)?;
        // SAFETY: two different allocations, each at least as long as what is copied; the caller is done with `p`.
        unsafe {
            q.copy_from_nonoverlapping(p, old.size().min(new.size()));
            self.give(p, old);
        }
        Some(q)
    }

    /// Discards the whole pages of a large piece; they read as zeros or what they held.
    ///
    /// # Safety
    /// Nobody uses the `len` bytes at `p`, which belong to one allocation.
    unsafe fn discard(&self, p: NonNull<u8>, len: usize) -> bool {
        // A thread that serves faults must not wait for its own news of the discarding.
        if len < DISCARD || is_unmanaged() {
            return false;
        }
        let start = Va(p.as_ptr() as u64);
        self.inner.region.discard_unused(VaRange { start, end: Va(start.0 + len as u64) }).is_ok()
    }

    /// Zeroes memory, by discarding it where that is cheaper.
    ///
    /// # Safety
    /// As [`discard`](Pool::discard).
    unsafe fn clear(&self, p: NonNull<u8>, len: usize) {
        let page = rustix::param::page_size();
        let zero = |from: usize, to: usize| {
            // SAFETY: inside of the piece, which is the caller's.
            unsafe { p.add(from).write_bytes(0, to - from) };
        };
        // SAFETY: handed on from the caller.
        if !unsafe { self.discard(p, len) } {
            return zero(0, len);
        }
        let start = p.as_ptr().addr();
        zero(0, start.next_multiple_of(page) - start);
        zero((start + len) / page * page - start, len);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.inner.region).finish()
    }
}

impl PartialEq for Pool {
    /// Whether both are the same pool: memory of one can be given back to the other.
    fn eq(&self, other: &Pool) -> bool {
        Shared::as_ptr(&self.inner) == Shared::as_ptr(&other.inner)
    }
}

impl Eq for Pool {}

/// The allocator trait is the same in all versions of its crate, but each version's is another one.
macro_rules! allocator {
    ($api:ident) => {
        // SAFETY: memory handed out stays valid while any clone of the pool lives, since the region does; clones are
        // the same pool. Sizes, alignments and content are kept by `take`, `give` and `change`.
        unsafe impl $api::alloc::Allocator for Pool {
            fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, $api::alloc::AllocError> {
                let p = self.take(layout).ok_or($api::alloc::AllocError)?;
                Ok(NonNull::slice_from_raw_parts(p, layout.size()))
            }

            fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, $api::alloc::AllocError> {
                let p = self.take_zeroed(layout).ok_or($api::alloc::AllocError)?;
                Ok(NonNull::slice_from_raw_parts(p, layout.size()))
            }

            unsafe fn deallocate(&self, p: NonNull<u8>, layout: Layout) {
                // SAFETY: the caller keeps the trait's contract, which is the same.
                unsafe { self.give(p, layout) }
            }

            unsafe fn grow(
                &self,
                p: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $api::alloc::AllocError> {
                // SAFETY: as above.
                let q = unsafe { self.change(p, old, new) }.ok_or($api::alloc::AllocError)?;
                Ok(NonNull::slice_from_raw_parts(q, new.size()))
            }

            unsafe fn grow_zeroed(
                &self,
                p: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $api::alloc::AllocError> {
                // SAFETY: as above; what is new is not used by anybody yet.
                unsafe {
                    let q = self.change(p, old, new).ok_or($api::alloc::AllocError)?;
                    self.clear(q.add(old.size()), new.size() - old.size());
                    Ok(NonNull::slice_from_raw_parts(q, new.size()))
                }
            }

            unsafe fn shrink(
                &self,
                p: NonNull<u8>,
                old: Layout,
                new: Layout,
            ) -> Result<NonNull<[u8]>, $api::alloc::AllocError> {
                // SAFETY: as above.
                let q = unsafe { self.change(p, old, new) }.ok_or($api::alloc::AllocError)?;
                Ok(NonNull::slice_from_raw_parts(q, new.size()))
            }
        }
    };
}

allocator!(allocator_api2);
#[cfg(feature = "hashbrown")]
allocator!(allocator_api2_02);

/// A global allocator whose large allocations are managed memory.
///
/// ```no_run
/// use peerspace::Heap;
///
/// #[global_allocator]
/// static HEAP: Heap = Heap::new(256 << 20).devices(&["compressed:1G", "file:/var/tmp"]);
///
/// let data = vec![1u64; 1 << 30]; // 8 GiB
/// # drop(data);
/// ```
///
/// The space is made when the first large allocation is asked for, in the thread that asks. If that cannot be done on
/// this machine, a line on standard error says why, and the program goes on with the system's allocator.
///
/// # What is managed
///
/// Allocations of [`from`](Heap::from) bytes and more; all others are the system's. So are those made by the space's
/// own threads, while the space is being made, and inside of [`unmanaged`](crate::unmanaged): whoever serves faults
/// must never cause one. A [device](crate::device) that allocates does so at its own risk; those named by
/// [`devices`](Heap::devices) and made by [`prepare`](Heap::prepare) are made in system memory.
///
/// # Signals
///
/// By default faults are served by [threads](Faults::Threads). With [`Faults::Signal`] a system call that is handed
/// a large buffer fails with EFAULT where a page of it is away (`read` into a fresh vector does so at once), which
/// no program expects of its heap: choose it for programs that only compute.
pub struct Heap {
    host: u64,
    room: u64,
    from: usize,
    #[cfg(feature = "devices")]
    devices: &'static [&'static str],
    faults: Faults,
    prepare: Option<fn(Builder) -> Builder>,
    /// Somebody makes the space, or has tried.
    begun: AtomicBool,
    pool: OnceLock<Pool>,
}

impl Heap {
    /// The least that [`from`](Heap::from) can be: the standard library keeps smaller things that threads of the
    /// space look at, too.
    pub const LEAST: usize = 2048;

    /// A heap that takes up at most `host` bytes of RAM for what is managed, with the devices of the command line's
    /// default: `compressed`, and a file in the temporary directory.
    pub const fn new(host: u64) -> Heap {
        Heap {
            host,
            room: 1 << 40,
            from: 16 << 10,
            #[cfg(feature = "devices")]
            devices: &[],
            faults: Faults::Threads,
            prepare: None,
            begun: AtomicBool::new(false),
            pool: OnceLock::new(),
        }
    }

    /// Other devices, as written on the command line ([`DeviceSpec`]), in the order in which they are tried.
    #[cfg(feature = "devices")]
    pub const fn devices(mut self, specs: &'static [&'static str]) -> Heap {
        self.devices = specs;
        self
    }

    /// How faults are delivered; see [Signals](Heap#signals).
    pub const fn faults(mut self, faults: Faults) -> Heap {
        self.faults = faults;
        self
    }

    /// Allocations of at least `bytes` bytes are managed: 16 KiB otherwise, never less than [`LEAST`](Heap::LEAST).
    pub const fn from(mut self, bytes: usize) -> Heap {
        self.from = if bytes < Heap::LEAST { Heap::LEAST } else { bytes };
        self
    }

    /// How many bytes can be managed at once: a tebibyte of address space otherwise. Beyond that, allocating fails.
    pub const fn room(mut self, bytes: u64) -> Heap {
        self.room = bytes;
        self
    }

    /// Calls `f` with the builder before the space is made: to add devices of the program's own, say. The devices
    /// named by [`devices`](Heap::devices) are there already; no others are added.
    pub const fn prepare(mut self, f: fn(Builder) -> Builder) -> Heap {
        self.prepare = Some(f);
        self
    }

    /// The space, once it is made: for its [statistics](Space::statistics).
    pub fn space(&self) -> Option<&Space> {
        self.pool.get().map(Pool::space)
    }

    /// Whether the byte at `p` is managed.
    pub fn manages(&self, p: *const u8) -> bool {
        self.pool.get().is_some_and(|pool| pool.contains(p))
    }

    /// The pool for an allocation of `size` bytes; none where the system's allocator has to do.
    fn pool_for(&self, size: usize) -> Option<&Pool> {
        if size < self.from || is_unmanaged() {
            return None;
        }
        if let Some(pool) = self.pool.get() {
            return Some(pool);
        }
        // Nobody waits for whoever makes the space: that takes allocations itself, in this thread and in new ones.
        if self.begun.load(Ordering::Relaxed) || self.begun.swap(true, Ordering::Relaxed) {
            return None;
        }
        unmanaged(|| match self.build() {
            Ok(pool) => {
                let _ = self.pool.set(pool);
            }
            Err(e) => crate::tell::warning(format_args!("nothing of the heap is managed: {e}")),
        });
        self.pool.get()
    }

    fn build(&self) -> Result<Pool, Box<dyn std::error::Error>> {
        let mut builder = Space::builder().host(self.host).faults(self.faults);
        #[cfg(feature = "devices")]
        for spec in self.devices {
            builder = builder.spec(&spec.parse()?)?;
        }
        builder = match self.prepare {
            Some(prepare) => prepare(builder),
            #[cfg(feature = "devices")]
            None if self.devices.is_empty() => {
                builder.spec(&DeviceSpec::Compressed(None))?.spec(&DeviceSpec::File(std::env::temp_dir(), None))?
            }
            None => builder,
        };
        Ok(builder.build()?.pool(self.room)?)
    }

    /// The pool that `p` comes from, if it is not the system's.
    fn pool_of(&self, p: *mut u8) -> Option<(&Pool, NonNull<u8>)> {
        let pool = self.pool.get().filter(|pool| pool.contains(p))?;
        Some((pool, NonNull::new(p)?))
    }
}

fn raw(p: Option<NonNull<u8>>) -> *mut u8 {
    p.map_or(null_mut(), NonNull::as_ptr)
}

// SAFETY: each allocation is the pool's or the system's, told apart by its address, and both keep the contract.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.pool_for(layout.size()) {
            Some(pool) => raw(pool.take(layout)),
            // SAFETY: the caller keeps the contract.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match self.pool_for(layout.size()) {
            Some(pool) => raw(pool.take_zeroed(layout)),
            // SAFETY: the caller keeps the contract.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        match self.pool_of(p) {
            // SAFETY: the caller keeps the contract, and `p` is whose it is said to be.
            Some((pool, p)) => unsafe { pool.give(p, layout) },
            // SAFETY: likewise.
            None => unsafe { System.dealloc(p, layout) },
        }
    }

    unsafe fn realloc(&self, p: *mut u8, old: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, old.align()) else { return null_mut() };
        match (self.pool_of(p), self.pool_for(size)) {
            // SAFETY: as above. What has become small stays where it is.
            (Some((pool, p)), _) => raw(unsafe { pool.change(p, old, new) }),
            // SAFETY: as above.
            (None, None) => unsafe { System.realloc(p, old, size) },
            (None, Some(pool)) => {
                // It has become large: it moves.
                let Some(q) = pool.take(new) else { return null_mut() };
                // SAFETY: two different allocations, each at least as long as what is copied.
                unsafe {
                    q.as_ptr().copy_from_nonoverlapping(p, old.size().min(size));
                    System.dealloc(p, old);
                }
                q.as_ptr()
            }
        }
    }
}

impl fmt::Debug for Heap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").field("host", &self.host).field("pool", &self.pool.get()).finish_non_exhaustive()
    }
}
