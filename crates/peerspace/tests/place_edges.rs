//! Memory in place at its edges: beside other memory, beside regions with names, and of devices that do not do what they say.

mod common;

use common::*;
use peerspace::device::dax::Dax;
use peerspace::device::soft::Soft;
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, SharedMemory, Store};
use peerspace::device::{NamedError, NamedRegion, NamedRegions};
use peerspace::{Error, Faults, Use};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// What is held of RAM for a copy is let go of, also where memory in place follows it.
#[test]
fn h5_a_copy_that_goes_on_in_place_keeps_nothing_pinned() {
    for faults in [Faults::Signal, Faults::Threads] {
        let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(16)).unwrap());
        let mut region = filled(&space, 2 * BLOCK);
        region.migrate_to(BLOCK..2 * BLOCK, far).unwrap();
        let mut out = [0; 64];
        region.try_read(BLOCK - 32, &mut out).unwrap();
        assert_eq!(out, region.bytes()[BLOCK - 32..BLOCK + 32]);
        region.try_write(BLOCK - 32, &out).unwrap();
        assert_eq!(region.migrate_to(0..BLOCK, far).unwrap(), BLOCK, "nobody relies on it any more");
        space.check();
    }
}

/// Regions with names are in place too, and what is counted for them is given up with them.
#[test]
fn z5_blocks_are_put_in_place_after_regions_with_names_were_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(16)).unwrap());
    let store = space.attach(Dax::persistent(directory.path().join("store"), Some(mib(16))).unwrap()).unwrap();
    for name in ["first", "second"] {
        drop(space.create_persistent(store, name, mib(4)).unwrap());
    }
    let region = filled(&space, 2 * BLOCK);
    assert_eq!(region.migrate_to(0..region.len(), far).unwrap(), region.len());
    space.check();
}

/// Memory whose owner does not do what a device should.
struct Liar {
    file: OwnedFd,
    persistent: bool,
    /// What the CPU is to map instead of the memory, from this page on.
    instead: Option<(u64, UnixStream)>,
    extents: Vec<DevicePages>,
    panics: Arc<AtomicBool>,
    /// Somebody asked for the regions with names: here he stays for a while.
    asked: Option<(AtomicBool, Sender<()>)>,
    /// Somebody frees pages: that takes a while.
    freeing: Option<Sender<()>>,
    /// It is gone.
    gone: Arc<AtomicBool>,
}

const PAGES: u64 = 8 * 512;

impl Liar {
    fn new() -> Liar {
        let file = rustix::fs::memfd_create("liar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, PAGES * page() as u64).unwrap();
        Liar {
            file,
            persistent: false,
            instead: None,
            extents: vec![],
            panics: Arc::default(),
            asked: None,
            freeing: None,
            gone: Arc::default(),
        }
    }
}

impl Device for Liar {
    fn describe(&self) -> Descriptor {
        match self.persistent {
            true => Descriptor::persistent("liar", PAGES),
            false => Descriptor::coherent("liar", PAGES),
        }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for s in batch {
            rustix::io::pwrite(&self.file, s.bytes, s.page * page() as u64).unwrap();
            s.result = if self.gone.load(SeqCst) { Err(DeviceError::Gone) } else { Ok(()) };
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for l in batch {
            rustix::io::pread(&self.file, &mut *l.bytes, l.page * page() as u64).unwrap();
            l.result = Ok(());
        }
    }

    fn freed(&self, _: DevicePages) {
        if let Some(freeing) = &self.freeing {
            let _ = freeing.send(());
            std::thread::sleep(Duration::from_millis(400));
        }
    }

    fn shared(&self, at: u64) -> Option<SharedMemory<'_>> {
        assert!(!self.panics.load(SeqCst), "on purpose");
        let offset = at * page() as u64;
        match &self.instead {
            Some((from, other)) if at >= *from => Some(SharedMemory { file: other.as_fd(), offset }),
            _ => Some(SharedMemory { file: self.file.as_fd(), offset }),
        }
    }

    fn named(&self) -> Option<&dyn NamedRegions> {
        if let Some((first, asked)) = &self.asked
            && first.swap(true, SeqCst)
        {
            asked.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        }
        self.persistent.then_some(self)
    }
}

impl NamedRegions for Liar {
    fn list(&self) -> Result<Vec<NamedRegion>, NamedError> {
        Ok(vec![])
    }

    fn find(&self, name: &str) -> Result<NamedRegion, NamedError> {
        Ok(NamedRegion { name: name.into(), bytes: 1, extents: self.extents.clone() })
    }

    fn create(&self, name: &str, _: u64) -> Result<NamedRegion, NamedError> {
        self.find(name)
    }

    fn remove(&self, _: &str) -> Result<(), NamedError> {
        Ok(())
    }

    fn flush(&self, _: std::ops::Range<usize>) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A liar who has not all that he needs, or takes more than he may.
struct Lacking {
    liar: Liar,
    shared: bool,
    named: bool,
    takes_evicted: bool,
}

impl Device for Lacking {
    fn describe(&self) -> Descriptor {
        let what = self.liar.describe();
        if self.takes_evicted { what.takes_evicted() } else { what }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.liar.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.liar.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.liar.freed(pages);
    }

    fn shared(&self, at: u64) -> Option<SharedMemory<'_>> {
        self.shared.then(|| self.liar.shared(at))?
    }

    fn named(&self) -> Option<&dyn NamedRegions> {
        self.named.then(|| self.liar.named())?
    }
}

/// A device must have what its kind needs, and is refused by name, with what it lacks, before anything is done with it.
#[test]
fn z11_a_device_that_lacks_what_its_kind_needs_is_refused() {
    let space = space(Faults::Signal, 8 * MIB, Soft::new(mib(32)).unwrap());
    let attach = |persistent, shared, named, takes_evicted| {
        space.attach(Lacking { liar: Liar { persistent, ..Liar::new() }, shared, named, takes_evicted })
    };
    for (refused, what) in [
        (attach(false, false, false, false), "Device::shared"),
        (attach(true, false, true, false), "Device::shared"),
        (attach(true, true, false, false), "Device::named"),
        (attach(true, true, true, true), "cannot take what leaves RAM"),
    ] {
        let e = refused.unwrap_err();
        assert!(matches!(&e, Error::Device { name, .. } if name == "liar"), "{e:?}");
        assert!(e.to_string().contains(what), "{what}: {e}");
        assert_eq!(space.devices().len(), 1);
    }
    // A device of ours that was made so is no different.
    let directory = tempfile::tempdir().unwrap();
    let store = Dax::options().size(mib(8)).takes_evicted().persistent(directory.path().join("store")).unwrap();
    let e = space.attach(store).unwrap_err();
    assert!(e.to_string().contains("cannot take what leaves RAM"), "{e}");
    // With what they need they are devices.
    for (persistent, takes_evicted) in [(false, false), (false, true), (true, false)] {
        let id = attach(persistent, true, persistent, takes_evicted).unwrap();
        space.detach(id).unwrap();
    }
    space.check();
}

/// Where the kernel refuses to map what a device shows, the memory stays where it was, and nobody meets a hole.
#[test]
fn z5_what_cannot_be_mapped_leaves_no_hole() {
    for faults in [Faults::Signal, Faults::Threads] {
        let space = space(faults, 16 * MIB, Soft::new(mib(64)).unwrap());
        // A socket: the kernel finds out that it cannot be mapped when it has made room for it already.
        let liar = Liar { instead: Some((512, UnixStream::pair().unwrap().0)), ..Liar::new() };
        let far = space.attach(liar).unwrap();
        let region = filled(&space, 2 * BLOCK);
        let refused = region.migrate_to(0..2 * BLOCK, far).unwrap_err();
        assert!(refused.to_string().contains("in place"), "{refused}");
        assert_eq!(in_place(&space, 1), BLOCK, "the first was no lie");
        for (i, page) in region.typed::<u64>().chunks_exact(words_per_page()).enumerate() {
            assert!(page.iter().all(|w| *w == word(i)), "page {i}");
        }
        space.check();
        space.detach(far).unwrap();
    }
}

/// Extents that cannot be are refused, whatever they are, and so is memory that cannot be had.
#[test]
fn z5_extents_that_cannot_be_are_refused() {
    let run = |first, count| DevicePages { first, count };
    let lies = [
        vec![],
        vec![run(0, 0)],
        vec![run(0, 1)],
        vec![run(1, 512)],
        vec![run(0, 513)],
        vec![run(0, PAGES + 512)],
        vec![run(512, u64::MAX - 511)],
        vec![run(u64::MAX - 511, 512)],
        vec![run(0, u64::MAX / 512 * 512), run(0, 1024)],
        vec![run(0, 512), run(0, 512)],
        vec![run(0, 1 << 60), run(0, 1 << 60)],
    ];
    for extents in lies {
        let space = space(Faults::Signal, 8 * MIB, Soft::new(mib(32)).unwrap());
        let what = format!("{extents:?}");
        let store = space.attach(Liar { persistent: true, extents, ..Liar::new() }).unwrap();
        let refused = space.open_persistent(store, "lie").map(|p| p.len());
        assert!(matches!(refused, Err(Error::Named { .. })), "{what}: {refused:?}");
        assert!(!matches!(space.remove_persistent(store, "lie"), Err(Error::NoSuchDevice)));
        space.check();
        space.detach(store).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    let space = space(Faults::Signal, 8 * MIB, Soft::new(mib(32)).unwrap());
    let panics = Arc::new(AtomicBool::new(false));
    let extents = vec![run(512, 1024)];
    let liar = Liar { persistent: true, extents, panics: panics.clone(), ..Liar::new() };
    let store = space.attach(liar).unwrap();
    panics.store(true, SeqCst);
    let refused = space.open_persistent(store, "panic").map(|p| p.len());
    assert!(matches!(refused, Err(Error::Named { .. })), "{refused:?}");
    panics.store(false, SeqCst);
    assert_eq!(space.open_persistent(store, "fine").unwrap().len(), 1);
    space.check();
    space.detach(store).unwrap();
}

/// Who removes a region, and who takes its device away at the same time, do not wait for each other.
#[test]
fn z3_a_device_goes_while_a_region_of_it_is_removed() {
    let space = space(Faults::Signal, 8 * MIB, Soft::new(mib(32)).unwrap());
    let (sender, asked) = std::sync::mpsc::channel();
    let extents = vec![DevicePages { first: 0, count: 512 }];
    let liar = Liar { persistent: true, extents, asked: Some((AtomicBool::new(false), sender)), ..Liar::new() };
    let store = space.attach(liar).unwrap();
    let (done, ends) = std::sync::mpsc::channel();
    for removes in [true, false] {
        let (space, done) = (space.clone(), done.clone());
        std::thread::spawn(move || {
            let result = match removes {
                true => space.remove_persistent(store, "it"),
                false => space.detach(store),
            };
            done.send((removes, result)).unwrap();
        });
        if removes {
            asked.recv_timeout(Duration::from_secs(20)).unwrap();
        }
    }
    for _ in 0..2 {
        let (removes, result) = ends.recv_timeout(Duration::from_secs(20)).expect("they wait for each other");
        assert!(result.is_ok() || removes && matches!(result, Err(Error::NoSuchDevice)), "{removes}: {result:?}");
    }
    space.check();
}

/// Runs `child` in a forked process, which must say that all is well.
fn in_child(child: impl FnOnce() -> bool) {
    // SAFETY: the child only uses its memory and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends the process.
        unsafe { libc::_exit(!matches!(fine, Ok(true)) as i32) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
}

/// What cannot be migrated out for a pin stays in place, whole; and who asked is told why.
#[test]
fn z5_a_pin_that_cannot_migrate_out_says_why() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    for faults in [Faults::Signal, Faults::Threads] {
        let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(16)).unwrap());
        let region = filled(&space, 2 * BLOCK);
        // In a process of its own, which is left no room for another mapping.
        in_child(|| {
            region.migrate_to(0..2 * BLOCK, far).unwrap();
            let at = &raw const region.bytes()[BLOCK + 5 * page()];
            let usual = getrlimit(Resource::As);
            setrlimit(Resource::As, Rlimit { current: Some(1 << 20), ..usual }).unwrap();
            let refused = space.make_resident(at, 1, Use::Read).map(drop);
            setrlimit(Resource::As, usual).unwrap();
            let Err(refused) = refused else { panic!("it had no room to come home") };
            assert!(matches!(refused, Error::Kernel { .. }), "{refused:?}");
            let said = refused.to_string();
            assert!(said.contains(&format!("{:x}", at as usize)), "where: {said}");
            assert!(said.contains("in place") && said.contains("out of memory"), "what and why: {said}");
            assert_eq!(in_place(&space, 1), 2 * BLOCK, "it stays");
            // With room, it is no different from others.
            drop(space.make_resident(at, 1, Use::Read).unwrap());
            assert_eq!(in_place(&space, 1), BLOCK);
            is_filled(&region)
        });
        space.check();
    }
}

/// A device that is the parent's is never the child's, whatever the child does.
#[test]
fn g12_a_child_that_forks_leaves_the_memory_of_its_parent_alone() {
    let directory = tempfile::tempdir().unwrap();
    let dax = Dax::open(directory.path().join("far"), Some(mib(16))).unwrap();
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, dax);
    let region = filled(&space, 4 * BLOCK);
    let (mut tell, mut told) = UnixStream::pair().unwrap();
    // SAFETY: the child only uses its memory and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let child = || {
            told.read_exact(&mut [0]).unwrap();
            in_child(|| true);
            region.migrate_to(2 * BLOCK..4 * BLOCK, far).is_err()
        };
        let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends the process.
        unsafe { libc::_exit(!matches!(fine, Ok(true)) as i32) };
    }
    assert_eq!(region.migrate_to(0..2 * BLOCK, far).unwrap(), 2 * BLOCK);
    tell.write_all(&[0]).unwrap();
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    space.check();
    space.detach(far).unwrap();
    for (i, page) in region.typed::<u64>().chunks_exact(words_per_page()).enumerate() {
        assert!(page.iter().all(|w| *w == word(i)), "page {i}");
    }
    assert_eq!(status, 0, "the child failed");
}

/// What a device that has failed took along is lost in a forked process, too: not zeros.
#[test]
fn g12_what_is_lost_of_a_persistent_device_is_lost_in_a_child() {
    let directory = tempfile::tempdir().unwrap();
    for faults in [Faults::Signal, Faults::Threads] {
        let space = space(faults, 8 * MIB, Soft::new(mib(32)).unwrap());
        let path = directory.path().join(format!("{faults:?}"));
        let store = space.attach(Dax::persistent(path, Some(mib(16))).unwrap()).unwrap();
        let mut log = space.create_persistent(store, "log", mib(4)).unwrap();
        log.bytes_mut().fill(7);
        space.fail(store).unwrap();
        let is_lost = || {
            let tried = matches!(log.try_read(BLOCK + 5, &mut [0]), Err(Error::Lost { .. }));
            tried && (!CAN_TRY || read_byte(&raw const log.bytes()[9 * page()]).is_none())
        };
        in_child(is_lost);
        assert!(is_lost());
        space.check();
    }
}

/// A fork, and who takes the device away, wait for a device that takes its time.
#[test]
fn g12_pages_that_are_just_being_freed_are_waited_for() {
    let space = space(Faults::Signal, 16 * MIB, Soft::new(mib(64)).unwrap());
    let (sender, freeing) = std::sync::mpsc::channel();
    let far = space.attach(Liar { freeing: Some(sender), ..Liar::new() }).unwrap();
    for forks in [true, false] {
        let region = filled(&space, BLOCK);
        assert_eq!(region.migrate_to(0..BLOCK, far).unwrap(), BLOCK);
        let dropped = std::thread::spawn(move || drop(region));
        freeing.recv_timeout(Duration::from_secs(20)).unwrap();
        match forks {
            true => in_child(|| true),
            false => space.detach(far).unwrap(),
        }
        dropped.join().unwrap();
    }
    space.check();
}

/// A device fails in the midst of a copy that must not raise a signal: the copy is finished before its memory is taken away.
#[test]
fn z9_a_device_that_fails_during_a_copy_raises_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    for faults in [Faults::Signal, Faults::Threads] {
        let store = Dax::persistent(directory.path().join(format!("{faults:?}")), Some(mib(16))).unwrap();
        let (space, device) = with_dax(faults, 8 * MIB, store);
        let mut log = space.create_persistent(device, "log", mib(4)).unwrap();
        log.bytes_mut().fill(7);
        // The copy goes to memory that has to be brought home from a device that waits.
        let orders = Orders::new();
        let other = common::space(Faults::Signal, 8 * MIB, Obedient::new(&orders, 64 * MIB));
        let mut to = filled(&other, 2 * BLOCK);
        push_out(&other, 16 * MIB);
        let gate = Arc::new(Gate::default());
        let at = gate.clone();
        orders.on_load(move |_| Answer::Waits(at.clone()));
        let result = std::thread::scope(|scope| {
            let reader = scope.spawn(|| log.try_read(0, to.bytes_mut()));
            gate.await_arrival();
            let failing = scope.spawn(|| space.fail(device).unwrap());
            std::thread::sleep(Duration::from_millis(300));
            gate.open();
            failing.join().unwrap();
            reader.join().unwrap()
        });
        assert!(matches!(result, Ok(()) | Err(Error::Lost { .. })), "{result:?}");
        assert!(to.bytes()[..BLOCK].iter().all(|b| *b == 7), "what was held is copied");
        assert!(matches!(log.try_read(0, &mut [0]), Err(Error::Lost { .. })));
        space.check();
    }
}

/// Regions come and go, blocks move there and back, devices come and go, and the process forks, all at the same time.
fn everything_at_once(faults: Faults) {
    let directory = tempfile::tempdir().unwrap();
    let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(32)).unwrap());
    let store = space.attach(Dax::persistent(directory.path().join("store"), Some(mib(32))).unwrap()).unwrap();
    let kept = filled(&space, 4 * BLOCK);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut threads = vec![];
        for t in 0..2usize {
            let (space, stop) = (&space, &stop);
            threads.push(scope.spawn(move || {
                let mut i = t;
                while !stop.load(SeqCst) {
                    i += 1;
                    let mut region = filled(space, 3 * BLOCK);
                    region.migrate_to(0..region.len(), far).unwrap();
                    assert!(is_filled(&region));
                    match i % 4 {
                        0 => drop(region.migrate_home(0..2 * BLOCK).unwrap()),
                        1 => region.discard(BLOCK / 2..3 * BLOCK).unwrap(),
                        2 => region.try_write(BLOCK - 8, &[1; 16]).unwrap(),
                        _ => {}
                    }
                    let name = format!("{t}");
                    let mut log = space.create_persistent(store, &name, mib(3)).unwrap();
                    log.try_write(5, &[7; 9]).unwrap();
                    drop(region);
                    drop(log);
                    space.remove_persistent(store, &name).unwrap();
                }
            }));
        }
        let begin = Instant::now();
        let mut rounds = 0;
        while begin.elapsed() < Duration::from_secs(3) && threads.iter().all(|t| !t.is_finished()) {
            rounds += 1;
            match rounds % 3 {
                0 => {
                    let other = space.attach(Dax::memory(mib(16)).unwrap()).unwrap();
                    kept.migrate_to(0..3 * BLOCK, other).unwrap();
                    space.detach(other).unwrap();
                }
                1 => {
                    kept.migrate_to(BLOCK..4 * BLOCK, far).unwrap();
                    in_child(|| is_filled(&kept));
                }
                _ => drop(kept.migrate_home(0..4 * BLOCK).unwrap()),
            }
            assert!(is_filled(&kept));
        }
        stop.store(true, SeqCst);
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
    space.check();
    space.detach(far).unwrap();
    space.detach(store).unwrap();
    assert!(is_filled(&kept));
    space.check();
}

#[test]
fn z5_everything_at_once_by_signal() {
    everything_at_once(Faults::Signal);
}

#[test]
fn z5_everything_at_once_by_threads() {
    everything_at_once(Faults::Threads);
}

/// A device that says itself that it is gone is not used in place any longer, also when nothing else happens in the space.
#[test]
fn z9_what_is_in_place_of_a_device_that_says_it_is_gone_is_taken_away() {
    let space = space(Faults::Signal, 16 * MIB, Soft::new(mib(64)).unwrap());
    let devices = [Liar::new(), Liar::new()];
    let gone = devices.each_ref().map(|liar| liar.gone.clone());
    let devices = devices.map(|liar| space.attach(liar).unwrap());
    let region = filled(&space, 4 * BLOCK);
    region.migrate_to(0..BLOCK, devices[0]).unwrap();
    region.migrate_to(BLOCK..2 * BLOCK, devices[1]).unwrap();
    gone.iter().for_each(|gone| gone.store(true, SeqCst));
    for device in devices {
        let refused = region.migrate_to(2 * BLOCK..3 * BLOCK, device).unwrap_err();
        assert!(matches!(refused, Error::Migrate { .. }), "{refused}");
    }
    let begin = Instant::now();
    while space.statistics().devices[1..].iter().any(|d| d.in_place_bytes > 0) {
        assert!(begin.elapsed() < Duration::from_secs(20), "the CPU goes on to use it");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(region.try_read(5, &mut [0]), Err(Error::Lost { .. })));
    assert_eq!(
        region.bytes()[2 * BLOCK],
        word(2 * BLOCK / page()).to_ne_bytes()[0],
        "what was refused is where it was"
    );
    space.check();
}
