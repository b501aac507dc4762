//! Stores, loads and frees of the storage device allocate nothing: neither from the program's heap, which a space
//! may manage so that touching it would wait for itself, nor from our own. In a forked child neither.

use peerspace::device::file::File;
use peerspace::device::{Device, DevicePages, ForkSide, Load, Store};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);

// SAFETY: delegates to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(SeqCst) {
            COUNT.fetch_add(1, SeqCst);
        }
        // SAFETY: the caller keeps the contract of GlobalAlloc.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        if COUNTING.load(SeqCst) {
            COUNT.fetch_add(1, SeqCst);
        }
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

/// Runs `f`, which must leave both heaps alone. Waiting for our own, which is locked meanwhile, ends the process.
fn without_heaps<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: sets a timer, whose signal ends the process.
    unsafe { libc::alarm(60) };
    peerspace_os::own::freeze_heap();
    COUNT.store(0, SeqCst);
    COUNTING.store(true, SeqCst);
    let out = f();
    COUNTING.store(false, SeqCst);
    peerspace_os::own::thaw_heap();
    // SAFETY: takes the timer back.
    unsafe { libc::alarm(0) };
    assert_eq!(COUNT.load(SeqCst), 0, "the heap was used");
    out
}

/// Everything a device is asked for while a program runs. `bytes`: two mebibytes, aligned.
fn use_all_of(file: &File, bytes: &mut [u8], page: usize) -> bool {
    let mut ok = true;
    let mut check = |good: bool| ok &= good;
    for round in 0..3u8 {
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = (i >> 3) as u8 ^ round;
        }
        let pages = (bytes.len() / page) as u64;
        // A folio, and what fits of it somewhere unaligned.
        let mut batch = [Store::new(0, bytes)];
        file.store(&mut batch);
        check(batch[0].result.is_ok());
        let mut batch = [Store::new(pages, &bytes[8..8 + 3 * page])];
        file.store(&mut batch);
        check(batch[0].result.is_ok());
        let mut batch = [Load::new(0, bytes)];
        file.load(&mut batch);
        check(batch[0].result.is_ok());
        // Many at once, scattered and in no order.
        let mut parts = bytes.chunks_exact_mut(page);
        let mut batch: [Store<'_>; 64] = std::array::from_fn(|i| {
            Store::new((i as u64 * 7919) % 509 * 3 + 1000, parts.next().map_or(&[][..], |b| &*b))
        });
        file.store(&mut batch);
        batch.iter().for_each(|s| check(s.result.is_ok()));
        let mut parts = bytes.chunks_exact_mut(page);
        let mut batch: [Load<'_>; 64] =
            std::array::from_fn(|i| Load::new((i as u64 * 7919) % 509 * 3 + 1000, parts.next().unwrap_or(&mut [])));
        file.load(&mut batch);
        batch.iter().for_each(|l| check(l.result.is_ok()));
        // Errors, too.
        let mut batch = [Load::new(5000, &mut bytes[..page])];
        file.load(&mut batch);
        check(batch[0].result.is_err());
        // Enough is freed for the collector to come.
        for _ in 0..4 {
            for first in (0..4096).step_by(512) {
                let mut batch = [Store::new(first, &*bytes)];
                file.store(&mut batch);
                check(batch[0].result.is_ok());
                file.freed(DevicePages { first, count: 512 });
            }
        }
        file.trim();
        let mut batch = [Store::new(3, &bytes[..page])];
        file.store(&mut batch);
        check(batch[0].result.is_ok());
    }
    ok
}

#[test]
fn stores_loads_and_frees_allocate_nothing() {
    let page = rustix::param::page_size();
    let dir = tempfile::tempdir().unwrap();
    let file = File::open(dir.path(), Some(8192 * page as u64)).unwrap();
    let mut memory = vec![0u8; 513 * page];
    let start = memory.as_ptr().addr().next_multiple_of(page) - memory.as_ptr().addr();
    let bytes = &mut memory[start..][..512 * page];
    assert!(without_heaps(|| use_all_of(&file, bytes, page)));

    let child = without_heaps(|| {
        file.before_fork();
        // SAFETY: the child calls nothing but the device, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            file.after_fork(ForkSide::Child);
            // With rings and a file of its own, made on the way.
            let ok = use_all_of(&file, bytes, page) && COUNT.load(SeqCst) == 0;
            // SAFETY: ends the process without running anything of the parent's.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) };
        }
        file.after_fork(ForkSide::Parent);
        assert!(use_all_of(&file, bytes, page));
        pid
    });
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child used the heap, or failed");
}
