//! The compressed store from outside: what it allocates, what it takes up by the kernel's account, how fast it is.

use peerspace::device::compressed::Compressed;
use peerspace::device::{Device, DeviceError, DevicePages, Load, Store};
use peerspace::{Faults, Space};
use peerspace_os::own;
use samples::{Dice, Kind};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

#[path = "../src/device/compressed/samples.rs"]
mod samples;

thread_local! {
    /// Allocations and deallocations of this thread.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

// SAFETY: everything is left to the system's allocator; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What one test measures of the process must not be another's doing.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn page_size() -> usize {
    rustix::param::page_size()
}

fn put(device: &Compressed, page: u64, bytes: &[u8]) -> Result<(), DeviceError> {
    let mut batch = [Store::new(page, bytes)];
    device.store(&mut batch);
    let [store] = batch;
    store.result
}

fn get(device: &Compressed, page: u64, to: &mut [u8]) -> Result<(), DeviceError> {
    let mut batch = [Load::new(page, to)];
    device.load(&mut batch);
    let [load] = batch;
    load.result
}

/// Bytes of RAM this process takes up, as the kernel says.
fn resident() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// A fault may strike inside the program's allocator, or ours: a device that allocated would wait for itself.
#[test]
fn nothing_is_allocated_once_the_store_is_made() {
    let _alone = alone();
    let pages = 2000;
    let device = Compressed::new(800 * page_size() as u64).unwrap();
    let contents: Vec<Vec<u8>> =
        (0..pages).map(|page| samples::page(page_size(), samples::KINDS[page as usize % 9], page)).collect();
    let folio: Vec<u8> = contents[..512].concat();
    let mut to = vec![0; folio.len()];
    let (done, finished) = mpsc::channel();
    // Whoever asks for our own memory now waits until it is thawed.
    own::freeze_heap();
    let worker = std::thread::spawn(move || {
        let before = CALLS.get();
        let mut full = 0;
        for round in 0..4u64 {
            for (page, bytes) in (0..pages).zip(&contents) {
                full += put(&device, page, bytes).is_err() as u64;
            }
            for (page, bytes) in (0..pages).zip(&contents) {
                let _ = black_box(get(&device, page, &mut to[..page_size()]));
                let _ = black_box(device.holds(page, bytes));
            }
            (0..pages).filter(|page| page % 5 != round).for_each(|page| {
                device.freed(DevicePages { first: page, count: 1 });
            });
            full += put(&device, pages, &folio).is_err() as u64;
            let _ = black_box(get(&device, pages, &mut to));
            device.freed(DevicePages { first: 0, count: 2 * pages });
        }
        black_box(device.usage());
        let calls = CALLS.get() - before;
        done.send((calls, full)).unwrap();
    });
    let outcome = finished.recv_timeout(Duration::from_secs(60));
    own::thaw_heap();
    let (calls, full) = outcome.expect("the store waits for memory of our own heap");
    worker.join().unwrap();
    assert_eq!(calls, 0, "calls of the program's allocator");
    assert!(full > 0, "the store should have been full");
}

#[test]
fn memory_of_scattered_pages_goes_back_to_the_kernel() {
    let _alone = alone();
    let bytes = page_size();
    let pages = (96u64 << 20) / bytes as u64;
    let device = Compressed::new(128 << 20).unwrap();
    let contents: Vec<Vec<u8>> = (0..64)
        .map(|i| samples::page(bytes, [Kind::Noise, Kind::Text, Kind::HalfNoise, Kind::Pointers][i % 4], i as u64))
        .collect();
    let empty = resident();
    (0..pages).for_each(|page| put(&device, page, &contents[page as usize % 64]).unwrap());
    let full = resident() - empty;
    let used = device.usage().unwrap().used_bytes;
    assert!(full <= used + (4 << 20), "{full} bytes more resident, {used} by the store's account");
    // In no order, so that hardly any chunk is emptied by that alone.
    let mut dice = Dice(3);
    let mut order: Vec<u64> = (0..pages).collect();
    (1..order.len()).for_each(|i| order.swap(i, dice.below(i as u64 + 1) as usize));
    let kept = order.split_off(order.len() / 10 * 9);
    order.iter().for_each(|page| device.freed(DevicePages { first: *page, count: 1 }));
    let rest = resident().saturating_sub(empty);
    let used = device.usage().unwrap().used_bytes;
    println!("{full} bytes more resident when full, {rest} with a tenth of the pages left ({used} by account)");
    assert!(rest < full / 5, "{rest} bytes resident of {full}");
    let mut to = vec![0; bytes];
    for page in kept {
        get(&device, page, &mut to).unwrap();
        assert!(to == contents[page as usize % 64], "page {page}");
    }
}

#[test]
fn a_space_lives_on_it() {
    let _alone = alone();
    const MIB: u64 = 1 << 20;
    for faults in [Faults::Signal, Faults::Threads] {
        let device = Compressed::new(128 * MIB).unwrap();
        let space = Space::builder().host(16 * MIB).device(device).faults(faults).build().unwrap();
        let mut region = space.region(64 * MIB).unwrap();
        let page = page_size();
        let kind = |i: usize| samples::KINDS[i % samples::KINDS.len()];
        for (i, bytes) in region.bytes_mut().chunks_exact_mut(page).enumerate() {
            bytes.copy_from_slice(&samples::page(page, kind(i), i as u64));
        }
        for _ in 0..2 {
            for (i, bytes) in region.bytes().chunks_exact(page).enumerate() {
                assert!(bytes == samples::page(page, kind(i), i as u64), "page {i}");
            }
        }
        space.check();
        assert_eq!(space.statistics().poisoned, 0);
    }
}

/// Nanoseconds for each of `n`, the best of several rounds.
fn best(n: usize, mut round: impl FnMut()) -> f64 {
    (0..9)
        .map(|_| {
            let t = Instant::now();
            round();
            t.elapsed().as_nanos() as f64 / n as f64
        })
        .fold(f64::MAX, f64::min)
}

/// What a store and a load cost: `cargo test --release -p peerspace --test compressed -- --ignored --nocapture`.
#[test]
#[ignore = "measures; says something only in release builds, alone on a machine"]
fn timing() {
    let _alone = alone();
    let bytes = page_size();
    let n = 8192;
    println!(
        "{:10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}  ns per page",
        "", "new", "again", "load", "holds", "freed", "ratio"
    );
    for kind in samples::KINDS {
        let device = Compressed::new(256 << 20).unwrap();
        let contents: Vec<Vec<u8>> = (0..256).map(|i| samples::page(bytes, kind, i)).collect();
        let pages = || (0..n as u64).map(|page| (page, &contents[page as usize % 256]));
        let store = |page, bytes: &[u8]| put(&device, page, black_box(bytes)).unwrap();
        let mut new = f64::MAX;
        let mut freed = f64::MAX;
        let mut used = 0;
        for _ in 0..5 {
            let t = Instant::now();
            pages().for_each(|(page, bytes)| store(page, bytes));
            new = new.min(t.elapsed().as_nanos() as f64 / n as f64);
            used = device.usage().unwrap().used_bytes;
            let t = Instant::now();
            device.freed(DevicePages { first: 0, count: n as u64 });
            freed = freed.min(t.elapsed().as_nanos() as f64 / n as f64);
        }
        pages().for_each(|(page, bytes)| store(page, bytes));
        let over = best(n, || pages().for_each(|(page, bytes)| store(page, bytes)));
        let mut to = vec![0u8; bytes];
        let load = best(n, || {
            for page in 0..n as u64 {
                get(&device, page, black_box(&mut to)).unwrap();
            }
        });
        let holds = best(n, || pages().for_each(|(page, bytes)| assert_eq!(device.holds(page, bytes), Ok(true))));
        let ratio = (n * bytes) as f64 / used as f64;
        println!("{:10} {new:8.0} {over:8.0} {load:8.0} {holds:8.0} {freed:8.0} {ratio:8.2}", format!("{kind:?}"));
    }
}
