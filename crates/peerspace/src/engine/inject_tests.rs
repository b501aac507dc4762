//! The engine over a real kernel whose calls fail now and then: nothing may be lost, hang or panic.
//!
//! What has to end in SIGBUS is tried in a process of its own: the test starts itself again with a variable set.

use super::fault::Patience;
use super::{Config, Engine, staging_layout};
use crate::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store, soft::Soft};
use crate::space::{Hired, start_threads};
use peerspace_core::addr::{Access, Pages, Va, VaRange};
use peerspace_core::reclaim::{Policy, S3Fifo};
use peerspace_core::regions::Attributes;
use peerspace_os::inject::{Call, Inject, Planned};
use peerspace_os::linux::map::Arena;
use peerspace_os::linux::memory::Memory;
use peerspace_os::linux::signal::{Registration, register};
use peerspace_os::linux::thread::Thread;
use peerspace_os::linux::uffd::feature;
use peerspace_os::linux::{Delivery, Linux, Setup};
use peerspace_os::own::{Box as OwnBox, Own, Shared, Vec as OwnVec};
use peerspace_os::{Kernel, Trouble, Wake};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

type Tried = Engine<Inject<Linux>>;

const PAGE: usize = 4096;
const LIMIT: Pages = Pages(1024);

/// An engine with everything that serves it.
struct Rig {
    engine: Shared<Tried>,
    registration: Option<Registration<Tried>>,
    threads: Vec<Thread>,
    hired: Arc<Hired>,
}

impl Rig {
    fn new(delivery: Delivery, without: u64, device: impl Device + 'static) -> Rig {
        let (blocks, slots) = staging_layout(LIMIT);
        let kernel = Inject::new(Linux::open(Setup { delivery, blocks, slots, without }).unwrap());
        let mut devices: OwnVec<OwnBox<dyn Device>> = OwnVec::new_in(Own);
        devices.push(allocator_api2::unsize_box!(OwnBox::new_in(device, Own)));
        let policy: OwnBox<dyn Policy<Arena>> = allocator_api2::unsize_box!(OwnBox::new_in(S3Fifo::new(), Own));
        let config = Config { limit: LIMIT, ram: Pages(1 << 20), devices, policy, contexts: 8 };
        let engine = Shared::new(Engine::new(kernel, config).unwrap());
        let signal = delivery == Delivery::Signal;
        let registration = signal.then(|| register(engine.clone()).unwrap());
        let hired = Arc::<Hired>::default();
        let threads = start_threads(&engine, delivery, 2, Some(hired.clone())).unwrap();
        Rig { engine, registration, threads, hired }
    }

    fn region(&self, bytes: usize) -> Memory {
        let kernel = self.engine.kernel.inner();
        let map = || {
            kernel.map_memory(bytes as u64).map(|memory| {
                let range = memory.range();
                (memory, range)
            })
        };
        self.engine.make_region(Attributes::default(), map, |m| kernel.unmap_memory(m).unwrap()).unwrap().0
    }

    /// Moves everything that is mapped out to the devices.
    fn evict_all(&self) {
        let mut work = self.engine.contexts.take();
        // Whoever resolved the last fault may still hold its page, so it is asked more than once.
        let mut stuck = 0;
        for _ in 0..10_000 {
            if self.engine.reclaim_step(&mut work, false) == super::reclaim::Step::Stuck {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(1));
            } else {
                stuck = 0;
            }
            if stuck == 10 {
                return;
            }
        }
        panic!("reclaim never comes to an end");
    }

    /// As a program that ends its use of a region.
    fn drop_region(&self, memory: Memory) {
        let mut rest = Some(memory);
        let range = rest.as_ref().unwrap().range();
        self.engine.release_region(range, |piece| {
            let kernel = self.engine.kernel.inner();
            rest = rest.take().and_then(|m| kernel.unmap_front(m, piece.len()).unwrap());
        });
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.engine.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for thread in self.hired.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        drop(self.registration.take());
    }
}

fn soft() -> Soft {
    Soft::new(64 << 20).unwrap()
}

fn word(page: &[u8]) -> u64 {
    u64::from_ne_bytes(page[..8].try_into().unwrap())
}

/// Random reads, writes and runs of both by one thread on its own part of a region, against what was written.
fn churn(bytes: &mut [u8], model: &mut [u64], seed: u64, steps: u64) {
    let mut x = seed;
    for step in 0..steps {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let first = (x >> 33) as usize % model.len();
        // Most accesses are random, some are streams, which come in clusters and blocks.
        let run = if x.is_multiple_of(16) { 64 } else { 1 };
        for page in first..(first + run).min(model.len()) {
            let here = &mut bytes[page * PAGE..(page + 1) * PAGE];
            assert_eq!(word(here), model[page], "page {page} in step {step}");
            assert_eq!(word(&here[PAGE - 8..]), model[page], "end of page {page} in step {step}");
            if x >> 16 & 1 == 1 {
                model[page] = x | 1;
                here[..8].copy_from_slice(&model[page].to_ne_bytes());
                here[PAGE - 8..].copy_from_slice(&model[page].to_ne_bytes());
            }
        }
    }
}

/// The calls that can fail after an engine was made.
fn working() -> Vec<Call> {
    let set_up = [Call::Words, Call::Grow, Call::Map, Call::Adopt, Call::Disown];
    Call::ALL.into_iter().filter(|c| !set_up.contains(c)).collect()
}

fn nothing_is_lost(delivery: Delivery, without: u64, one_in: u32, steps: u64) {
    let rig = Rig::new(delivery, without, soft());
    let mut memory = rig.region(24 << 20);
    let pages = (24 << 20) / PAGE;
    let mut model = vec![0u64; pages];
    rig.engine.kernel.by_chance(0x5eed + one_in as u64, &working(), one_in);
    std::thread::scope(|s| {
        let half = pages / 2;
        let (a, b) = memory.bytes_mut().split_at_mut(half * PAGE);
        let (ma, mb) = model.split_at_mut(half);
        s.spawn(move || churn(a, ma, 1, steps));
        s.spawn(move || churn(b, mb, 2, steps));
    });
    let made = rig.engine.kernel.made_in_all();
    assert!(made > 1000, "only {made} calls failed");
    rig.engine.kernel.relent();
    for (i, want) in model.iter().enumerate() {
        assert_eq!(word(&memory.bytes()[i * PAGE..]), *want, "page {i} at the end");
    }
    let census = rig.engine.check();
    assert_eq!(census.poisoned, 0);
    rig.drop_region(memory);
    assert_eq!(rig.engine.check().device_pages, 0);
}

#[test]
fn nothing_is_lost_when_calls_fail_by_signal() {
    nothing_is_lost(Delivery::Signal, 0, 5, 4000);
}

#[test]
fn nothing_is_lost_when_calls_fail_by_threads() {
    nothing_is_lost(Delivery::Messages, 0, 5, 1500);
}

#[test]
fn nothing_is_lost_when_calls_fail_without_moving_pages() {
    nothing_is_lost(Delivery::Signal, feature::MOVE | feature::POISON, 7, 2000);
}

#[test]
fn nothing_is_lost_when_calls_fail_without_write_protection() {
    nothing_is_lost(Delivery::Signal, feature::POISON | feature::PAGEFAULT_FLAG_WP, 7, 2000);
}

#[test]
fn a_kernel_that_can_take_nothing_out_is_refused() {
    let without = feature::MOVE | feature::PAGEFAULT_FLAG_WP;
    let setup = Setup { delivery: Delivery::Signal, blocks: 0, slots: 256, without };
    assert!(Linux::open(setup).unwrap_err().to_string().contains("neither move nor write-protect"));
}

/// What a program discards while calls fail is either there as it was, or zero.
#[test]
fn discarding_is_all_or_nothing() {
    let rig = Rig::new(Delivery::Signal, 0, soft());
    let mut memory = rig.region(8 << 20);
    let pages = (8 << 20) / PAGE;
    rig.engine.kernel.by_chance(77, &working(), 4);
    for round in 1..40u64 {
        for page in 0..pages {
            memory.bytes_mut()[page * PAGE..][..8].copy_from_slice(&(round << 32 | page as u64).to_ne_bytes());
        }
        let first = (round as usize * 37) % (pages - 64);
        let range = peerspace_core::addr::VaRange::new(
            peerspace_core::addr::Va(memory.range().start.0 + (first * PAGE) as u64),
            (64 * PAGE) as u64,
        );
        let gone = rig.engine.discard_now(range.unwrap()).is_ok();
        for page in 0..pages {
            let kept = !gone || !(first..first + 64).contains(&page);
            let want = if kept { round << 32 | page as u64 } else { 0 };
            assert_eq!(word(&memory.bytes()[page * PAGE..]), want, "page {page} in round {round}");
        }
    }
    rig.engine.kernel.relent();
    rig.engine.check();
    rig.drop_region(memory);
}

/// A run of clusters and blocks that stops after every possible number of pages.
#[test]
fn a_run_may_stop_anywhere() {
    stop_runs(&[Call::CopyIn, Call::PutBack, Call::ZeroIn]);
}

/// The same when runs of pages that leave stop as well.
#[test]
fn a_run_that_leaves_may_stop_anywhere() {
    stop_runs(&[Call::TakeOut, Call::CopyIn, Call::PutBack, Call::ZeroIn]);
}

fn stop_runs(calls: &[Call]) {
    let rig = Rig::new(Delivery::Signal, 0, soft());
    let mut memory = rig.region(16 << 20);
    let bytes = memory.bytes_mut();
    for (i, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(i as u64 + 1).to_ne_bytes());
    }
    for stop in 0..64u64 {
        for call in calls {
            let call = *call;
            for trouble in call.troubles() {
                let pages = if call == Call::PutBack { stop * 8 } else { stop };
                rig.engine.kernel.plan(Planned {
                    call,
                    after: stop % 3,
                    times: 1,
                    trouble: *trouble,
                    pages: Pages(pages),
                });
            }
        }
        let at = (stop as usize * 61) % 4096;
        for page in (at..at + 700).map(|p| p % 4096) {
            assert_eq!(word(&memory.bytes()[page * PAGE..]), page as u64 + 1);
        }
    }
    rig.engine.kernel.relent();
    rig.engine.check();
    rig.drop_region(memory);
}

const CHILD: &str = "PEERSPACE_TEST_CHILD";

/// Runs the test `name` of this file once more, in a process that is to die of SIGBUS; true in that process.
fn dies_of_sigbus(name: &str) -> bool {
    if std::env::var_os(CHILD).is_some_and(|v| v == name) {
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([&format!("engine::inject_tests::{name}"), "--exact", "--nocapture"]).env(CHILD, name);
    let started = Instant::now();
    let mut child = child.stdout(std::process::Stdio::null()).spawn().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the access neither fails nor goes on");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    false
}

/// When the kernel has no memory whatever is tried, the access fails, in time.
#[test]
fn an_access_ends_where_there_is_no_memory() {
    if dies_of_sigbus("an_access_ends_where_there_is_no_memory") {
        let rig = Rig::new(Delivery::Signal, 0, soft());
        let mut memory = rig.region(4 << 20);
        let never =
            Planned { call: Call::ZeroIn, after: 0, times: u64::MAX, trouble: Trouble::NoMemory, pages: Pages(0) };
        rig.engine.kernel.plan(never);
        memory.bytes_mut()[5] = 7;
        unreachable!("there was no memory for the page");
    }
}

/// When the kernel has memory again, accesses that waited for it go on, in both deliveries.
#[test]
fn an_access_goes_on_when_there_is_memory_again() {
    for delivery in [Delivery::Signal, Delivery::Messages] {
        let rig = Rig::new(delivery, 0, soft());
        let mut memory = rig.region(4 << 20);
        let none = |call| Planned { call, after: 0, times: 50, trouble: Trouble::NoMemory, pages: Pages(0) };
        rig.engine.kernel.plan(none(Call::ZeroIn));
        memory.bytes_mut()[5] = 7;
        rig.evict_all();
        rig.engine.kernel.plan(none(Call::CopyIn));
        assert_eq!(memory.bytes()[5], 7);
        assert!(rig.engine.kernel.made(Call::ZeroIn) >= 50);
        rig.engine.check();
        rig.drop_region(memory);
    }
}

/// Takes whatever it is given, and gives nothing back while it is broken.
struct Broken {
    soft: Soft,
    broken: AtomicBool,
}

impl Device for Broken {
    fn describe(&self) -> Descriptor {
        Descriptor::private("broken", 4096)
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.soft.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        if self.broken.load(Relaxed) {
            batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Corrupt));
        } else {
            self.soft.load(batch);
        }
    }

    fn freed(&self, pages: DevicePages) {
        self.soft.freed(pages);
    }
}

/// A device that the test keeps a hand on.
struct Lent(Shared<Broken>);

impl Device for Lent {
    fn describe(&self) -> Descriptor {
        self.0.describe()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.0.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.0.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.0.freed(pages);
    }
}

/// A program that reads a page that was lost.
fn read_a_lost_page(delivery: Delivery, without: u64) {
    let rig = Rig::new(delivery, without, Broken { soft: soft(), broken: AtomicBool::new(true) });
    let mut memory = rig.region(4 << 20);
    memory.bytes_mut()[3 * PAGE] = 7;
    rig.evict_all();
    let first = std::hint::black_box(memory.bytes()[3 * PAGE]);
    unreachable!("a lost page was read as {first}");
}

#[test]
fn a_lost_page_raises_sigbus_by_signal() {
    if dies_of_sigbus("a_lost_page_raises_sigbus_by_signal") {
        read_a_lost_page(Delivery::Signal, 0);
    }
}

#[test]
fn a_lost_page_raises_sigbus_by_threads() {
    if dies_of_sigbus("a_lost_page_raises_sigbus_by_threads") {
        read_a_lost_page(Delivery::Messages, 0);
    }
}

#[test]
fn a_lost_page_raises_sigbus_by_signal_on_an_old_kernel() {
    if dies_of_sigbus("a_lost_page_raises_sigbus_by_signal_on_an_old_kernel") {
        read_a_lost_page(Delivery::Signal, feature::POISON);
    }
}

#[test]
fn a_lost_page_raises_sigbus_by_threads_on_an_old_kernel() {
    if dies_of_sigbus("a_lost_page_raises_sigbus_by_threads_on_an_old_kernel") {
        read_a_lost_page(Delivery::Messages, feature::POISON | feature::MOVE);
    }
}

/// Where the kernel cannot mark a page as lost, system calls fail on it too, its neighbours are as they were, and the
/// region can be given up like any other; also if the kernel refuses at first.
#[test]
fn a_lost_page_is_buried_alone() {
    let device = Shared::new(Broken { soft: soft(), broken: AtomicBool::new(false) });
    let rig = Rig::new(Delivery::Messages, feature::POISON | feature::MOVE, Lent(device.clone()));
    let mut memory = rig.region(4 << 20);
    let pages = (4 << 20) / PAGE;
    for page in 0..pages {
        memory.bytes_mut()[page * PAGE] = page as u8 | 1;
    }
    rig.evict_all();
    let refused = Planned { call: Call::Bury, after: 0, times: 3, trouble: Trouble::NoMemory, pages: Pages(0) };
    rig.engine.kernel.plan(refused);
    device.broken.store(true, Relaxed);
    let (_reader, writer) = std::io::pipe().unwrap();
    let send = |page: usize| rustix::io::write(&writer, &memory.bytes()[page * PAGE..][..1]);
    for lost in [3, 4, 700] {
        assert_eq!(send(lost), Err(rustix::io::Errno::FAULT), "page {lost}");
        assert_eq!(send(lost), Err(rustix::io::Errno::FAULT), "page {lost} once more");
    }
    assert_eq!(rig.engine.kernel.made(Call::Bury), 3);
    device.broken.store(false, Relaxed);
    for page in (0..pages).filter(|p| ![3, 4, 700].contains(p)) {
        assert_eq!(memory.bytes()[page * PAGE], page as u8 | 1, "page {page}");
    }
    rig.engine.check();
    rig.drop_region(memory);
    assert_eq!(rig.engine.check().device_pages, 0);
}

/// G12: getting pages of its own does not wait for one that has gone: whoever receives its fault waits for the section.
#[test]
fn g12_a_page_that_has_gone_is_not_waited_for_in_a_section() {
    let rig = Rig::new(Delivery::Messages, 0, soft());
    let mut memory = rig.region(4 << 20);
    memory.bytes_mut()[..4 * PAGE].fill(7);
    rig.evict_all();
    let start = memory.range().start;
    let gone = VaRange { start: Va(start.0 + PAGE as u64), end: Va(start.0 + 3 * PAGE as u64) };
    assert_eq!(rig.engine.kernel.inner().is_present(gone.start), Ok(false));
    {
        let work = rig.engine.contexts.take();
        let section = rig.engine.gate.enter(work.context()).expect("nothing changes");
        assert!(!rig.engine.unshare(gone, work.context()), "it was let pass");
        drop(section);
    }
    // The others are as they were; of these there are zeros now that nobody knows of.
    assert_eq!([0, 3].map(|page| memory.bytes()[page * PAGE]), [7, 7]);
    rig.engine.kernel.inner().discard(gone).unwrap();
    assert_eq!([1, 2].map(|page| memory.bytes()[page * PAGE]), [0, 0]);
    rig.engine.check();
    rig.drop_region(memory);
}

/// A fault that comes late finds a region that is being made, or has been given up, but is mapped and registered: it must
/// not be taken for what the program has let grow in place beside another region.
#[test]
fn late_faults_make_no_regions_of_what_comes_and_goes() {
    const MIB: u64 = 1 << 20;
    let rig = Rig::new(Delivery::Messages, 0, soft());
    let engine = &rig.engine;
    let kernel = engine.kernel.inner();
    let late = |at: Va| {
        let engine = engine.clone();
        let fault = std::thread::spawn(move || engine.fault(at, Access::Read, Wake::Yes, Patience::Waits).is_ok());
        std::thread::sleep(Duration::from_millis(2));
        fault
    };
    for round in 0..10 {
        let mut faults = Vec::new();
        let map = || {
            let memory = kernel.map_memory(12 * MIB)?;
            let range = memory.range();
            faults.push(late(range.start));
            Ok((memory, range))
        };
        let made = engine.make_region(Attributes::default(), map, |m| kernel.unmap_memory(m).unwrap());
        let (memory, range) = made.unwrap_or_else(|e| panic!("round {round}: {e:?}"));
        let at = |mib: u64| Va(range.start.0 + mib * MIB);
        // The first third goes; what stays is the same mapping.
        let mut rest = Some(memory);
        let mut release = |from: u64, to: u64| {
            engine.release_region(VaRange { start: at(from), end: at(to) }, |piece| {
                faults.push(late(Va(piece.start.0 + PAGE as u64)));
                rest = rest.take().and_then(|m| kernel.unmap_front(m, piece.len()).unwrap());
            });
        };
        release(0, 4);
        let left = engine.regions.next(engine.geometry.vpn(range.start)).map(|r| engine.geometry.range(r.range));
        assert_eq!(left, Some(VaRange { start: at(4), end: at(12) }), "round {round}");
        release(4, 12);
        assert_eq!(engine.regions.len(), 0, "round {round}");
        assert!(faults.into_iter().all(|f| f.join().unwrap()));
    }
    engine.check();
}
