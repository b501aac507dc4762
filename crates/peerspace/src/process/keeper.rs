//! The keeper: watches the program's memory, arms the engine when the budget nears, and does jobs for threads of the
//! program that cannot do them themselves.
//!
//! # How the budget holds
//!
//! The engine bounds what it manages. What it does not manage yet (new mappings, a heap that grew) is populated by the
//! kernel without asking, until the keeper finds it. A *margin* of the budget is therefore kept free, and the keeper
//! looks again before the program could have filled it: the closer the limit, the sooner. What is not managed is known
//! exactly as a sum: the kernel counts the process's anonymous pages, and everything else among them is accounted for.
//!
//! # Jobs
//!
//! One at a time: the poster writes the job's number, rings the bell, and waits for the number to become zero. After
//! [`BEFORE_FORK`] the keeper does nothing until [`AFTER_FORK`] comes.

use super::candidates::Search;
use super::forks::ProcessForks;
use super::records::{Options, Record, write_down};
#[cfg(feature = "devices")]
use crate::device::failing::Failing;
use crate::engine::adopt::AdoptError;
use crate::engine::serve::Helper;
use crate::engine::tiers::OpenDevice;
use crate::engine::{self, Config, Engine, MIN_LIMIT};
use crate::report::Statistics;
use crate::space::{Real, usual_contexts, usual_handlers};
#[cfg(feature = "devices")]
use crate::spec::own;
use peerspace_core::addr::{Access, Geometry, PageRange, Va, VaRange};
use peerspace_core::reclaim::{Policy, S3Fifo};
use peerspace_core::sync::Latch;
use peerspace_os::linux::files::{OurFd, isolate};
use peerspace_os::linux::futex::{Futex, wait_word, wake_word};
use peerspace_os::linux::map::{Arena, ours_within};
use peerspace_os::linux::raw_thread::{self, Files};
use peerspace_os::linux::signal;
use peerspace_os::linux::{Delivery, Linux, Setup, fork};
use peerspace_os::own::{Box, Own, Shared, Vec};
use peerspace_os::{Kernel, OsError};
use rustix::fs::{Mode, OFlags};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// The rate at which a program might populate memory: what the keeper reckons with between two looks.
const FILL_RATE: u64 = 2 << 30;
/// The longest and the shortest time between two looks.
const SLOWEST: Duration = Duration::from_millis(20);
const FASTEST: Duration = Duration::from_millis(1);
/// Searches for new mappings in one look.
const SEARCHES: u32 = 8;
/// How often what cannot change fast is looked at.
const SECOND: Duration = Duration::from_secs(1);
/// How often the record is written while the process runs.
const RECORD: Duration = Duration::from_millis(250);

pub(super) const BEFORE_FORK: u32 = 1;
pub(super) const AFTER_FORK: u32 = 2;
/// Stop managing [`Process::argument`].
const DISOWN: u32 = 3;

/// Everything about the process that is managed. There is one, made at start.
pub(super) struct Process {
    pub(super) options: Options,
    /// The number of this process if it is the first one, the one whose record somebody waits for.
    first: Option<i32>,
    /// Never managed, whatever it looks like.
    fixed: VaRange,
    geometry: Geometry,
    pub(super) engine: OnceLock<Shared<Real>>,
    pub(super) bell: AtomicU32,
    job: AtomicU32,
    /// What the job is about: start and end of a range.
    argument: [AtomicU64; 2],
    /// Held by whoever has posted a job; from before a fork until after it.
    posting: Latch,
    /// The most anonymous memory seen, in bytes, our own left out.
    peak: AtomicU64,
    started: Instant,
    said: Mutex<bool>,
    /// Somebody writes the record.
    writing: Latch,
    /// What the keeper reads, opened once; in a forked child each is put in the place of the parent's.
    statm: OnceLock<OurFd>,
    memory: OnceLock<OurFd>,
}

static PROCESS: OnceLock<Process> = OnceLock::new();

/// What the keeper remembers between two looks.
struct Watch {
    statm: &'static OurFd,
    search: Search,
    /// Pages of our own that are populated, apart from staging; and what the devices had then.
    own: u64,
    devices_then: u64,
    looked_closely: Instant,
    recorded: Instant,
    /// Native pages at the last search for new mappings.
    searched_at: i64,
    searched: Instant,
}

/// Starts to manage this process. `fixed` is never managed: the memory around the first thread's control block.
///
/// To be called once, early, on the first thread. From then on the process is watched; nothing else happens until its
/// memory nears the budget.
///
/// # Errors
/// When no thread can be started.
pub fn start(options: Options, fixed: VaRange) -> Result<(), OsError> {
    let page = rustix::param::page_size() as u64;
    let geometry = Geometry::from_page_bytes(page)
        .ok_or_else(|| OsError::plain(format!("pages of {page} bytes are not supported")))?;
    let parent = rustix::process::getppid().map(|p| p.as_raw_nonzero().get());
    let this = rustix::process::getpid().as_raw_nonzero().get();
    let process = Process {
        first: (parent == Some(options.parent)).then_some(this),
        options,
        fixed,
        geometry,
        engine: OnceLock::new(),
        bell: AtomicU32::new(0),
        job: AtomicU32::new(0),
        argument: [AtomicU64::new(0), AtomicU64::new(0)],
        posting: Latch::new(),
        peak: AtomicU64::new(0),
        started: Instant::now(),
        said: Mutex::new(false),
        writing: Latch::new(),
        statm: OnceLock::new(),
        memory: OnceLock::new(),
    };
    if PROCESS.set(process).is_err() {
        return Err(OsError::plain("this process is managed already"));
    }
    let forks = fork::register(Shared::new(ProcessForks));
    // For the life of the process.
    std::mem::forget(forks.map_err(|_| OsError::plain("there are too many spaces"))?);
    spawn_keeper(false)
}

pub(super) fn process() -> &'static Process {
    PROCESS.get().expect("the process is managed")
}

/// Starts the keeper; with `child` in a process that was just forked.
pub(super) fn spawn_keeper(child: bool) -> Result<(), OsError> {
    let files = if process().options.by_signal { Files::Shared } else { Files::Own };
    let thread = raw_thread::spawn(files, keeper, child as usize);
    thread.map(drop).map_err(|e| OsError::new("start a thread", e))
}

/// The keeper's thread.
fn keeper(child: usize) {
    let process = process();
    let mut watch = match prepare(process, child != 0) {
        Ok(watch) => watch,
        Err(e) => {
            crate::tell::warning(format_args!("{e}"));
            peerspace_os::linux::exit_now(125);
        }
    };
    let mut wait = FASTEST;
    loop {
        let seen = process.bell.load(Ordering::Acquire);
        match process.job.load(Ordering::Acquire) {
            0 => {}
            job => {
                process.do_job(job);
                continue;
            }
        }
        wait_word(&process.bell, seen, Some(wait));
        if process.job.load(Ordering::Acquire) == 0 {
            wait = process.look(&mut watch);
        }
    }
}

fn prepare(process: &'static Process, child: bool) -> Result<Watch, OsError> {
    if child {
        super::forks::set_up_child(process)?;
    }
    let statm = open_own(&process.statm, "/proc/self/statm")?;
    let search = Search::new(process.geometry, open_own(&process.memory, "/proc/self/mem")?);
    let watch = Watch {
        statm,
        search,
        own: 0,
        devices_then: 0,
        looked_closely: Instant::now() - SECOND,
        recorded: Instant::now(),
        searched_at: 0,
        searched: Instant::now(),
    };
    if !process.options.by_signal {
        isolate().map_err(|e| OsError::new("get a descriptor table of our own", e))?;
    }
    if child {
        super::forks::child_is_ready(process);
    }
    Ok(watch)
}

/// Opens `path` as ours, or anew in the place of what the parent had opened.
fn open_own(place: &'static OnceLock<OurFd>, path: &str) -> Result<&'static OurFd, OsError> {
    let failed = |e| OsError::new(format!("open {path}"), e).remedy("mount /proc");
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    match place.get() {
        Some(old) => old.replace(fd).map_err(failed)?,
        None => drop(place.set(OurFd::new(fd).map_err(failed)?)),
    }
    Ok(place.get().expect("it was just set"))
}

impl Process {
    pub(super) fn park(&self) -> Futex {
        Futex
    }

    /// The budget in pages, without the margin.
    fn limit(&self) -> u64 {
        let host = self.geometry.pages_in(self.options.host).0;
        (host - self.margin()).max(MIN_LIMIT.0)
    }

    /// Pages kept free for what comes between two looks.
    fn margin(&self) -> u64 {
        let host = self.options.host;
        self.geometry.pages_in((host / 8).clamp(4 << 20, 32 << 20)).0
    }

    /// Has the keeper do `job`, and waits until it is done. The caller holds `posting`.
    fn post(&self, job: u32) {
        self.job.store(job, Ordering::Release);
        self.ring();
        loop {
            let now = self.job.load(Ordering::Acquire);
            if now == 0 {
                return;
            }
            wait_word(&self.job, now, None);
        }
    }

    /// Has the keeper bring everything to rest; until [`after_fork`](Process::after_fork) nobody posts anything.
    pub(super) fn before_fork(&self) {
        self.posting.lock(&Futex);
        self.post(BEFORE_FORK);
    }

    pub(super) fn after_fork(&self) {
        self.post(AFTER_FORK);
        self.posting.unlock(&Futex);
    }

    /// Has the keeper stop managing `range`, which is about to become something that must not be missing.
    fn disown(&self, range: VaRange) {
        self.posting.lock(&Futex);
        self.argument[0].store(range.start.0, Ordering::Relaxed);
        self.argument[1].store(range.end.0, Ordering::Relaxed);
        self.post(DISOWN);
        self.posting.unlock(&Futex);
    }

    pub(super) fn ring(&self) {
        self.bell.fetch_add(1, Ordering::Release);
        wake_word(&self.bell, 1);
    }

    fn job_done(&self) {
        self.job.store(0, Ordering::Release);
        wake_word(&self.job, u32::MAX);
    }

    fn do_job(&self, job: u32) {
        match job {
            BEFORE_FORK => {
                super::forks::before(self);
                self.job_done();
                // Nothing else until the fork is over.
                while self.job.load(Ordering::Acquire) != AFTER_FORK {
                    let seen = self.bell.load(Ordering::Acquire);
                    if self.job.load(Ordering::Acquire) == AFTER_FORK {
                        break;
                    }
                    wait_word(&self.bell, seen, None);
                }
                super::forks::after(self);
            }
            AFTER_FORK => super::forks::after(self),
            DISOWN => {
                let [start, end] = [0, 1].map(|i| Va(self.argument[i].load(Ordering::Relaxed)));
                self.disown_now(VaRange { start, end });
            }
            _ => {}
        }
        self.job_done();
    }

    fn disown_now(&self, range: VaRange) {
        let Some(engine) = self.engine.get() else { return };
        let pages = self.geometry.pages_out(range);
        let mut at = pages.start;
        while let Some(r) = engine.regions.next(at).filter(|r| r.range.start < pages.end) {
            let piece = self.geometry.range(r.range.intersect(pages));
            if let Err(e) = engine.disown(piece) {
                crate::tell::warning(format_args!("{piece} stays managed although it became a stack: {e}"));
            }
            at = r.range.end;
        }
    }

    /// In a forked child, before the new keeper runs.
    pub(super) fn renew(&self) {
        self.posting.reset();
        self.job.store(0, Ordering::Release);
        self.peak.store(0, Ordering::Relaxed);
    }

    /// One look. Returns how long to wait for the next.
    fn look(&self, watch: &mut Watch) -> Duration {
        let Some(anonymous) = anonymous_pages(watch.statm) else { return SLOWEST };
        match self.engine.get() {
            None => {
                let own = self.own_pages(watch, anonymous, 0);
                let used = anonymous.saturating_sub(own);
                self.peak.fetch_max(self.geometry.bytes(peerspace_core::addr::Pages(used)), Ordering::Relaxed);
                let arm_at = self.limit() * 3 / 4;
                if used >= arm_at {
                    self.arm(watch);
                    return FASTEST;
                }
                self.until(arm_at - used)
            }
            Some(engine) => self.look_armed(engine, watch, anonymous),
        }
    }

    /// How long the program would need to populate so many pages.
    fn until(&self, pages: u64) -> Duration {
        let bytes = pages << self.geometry.page_shift();
        Duration::from_micros(bytes * 1_000_000 / FILL_RATE).clamp(FASTEST, SLOWEST)
    }

    /// Populated pages that are neither the program's nor staged.
    fn own_pages(&self, watch: &mut Watch, _anonymous: u64, devices: u64) -> u64 {
        if watch.looked_closely.elapsed() >= SECOND {
            watch.looked_closely = Instant::now();
            watch.own = self.count_own();
            watch.devices_then = devices;
        }
        (watch.own + devices).saturating_sub(watch.devices_then)
    }

    /// Counts the populated pages of our own mappings, apart from staging.
    fn count_own(&self) -> u64 {
        let Some(engine) = self.engine.get() else { return 0 };
        let staging = engine.kernel.staging();
        let mut pages = 0;
        for range in ours_within(VaRange { start: Va(2), end: Va(u64::MAX) }) {
            if range != staging {
                let _ = engine.kernel.present_runs(range, &mut |run| pages += self.geometry.pages_in(run.len()).0);
            }
        }
        pages
    }

    fn look_armed(&self, engine: &Shared<Real>, watch: &mut Watch, anonymous: u64) -> Duration {
        let devices: u64 = engine.tiers.iter().map(|t| t.ram_bytes()).sum();
        let devices = self.geometry.pages_for(devices).0;
        let own = self.own_pages(watch, anonymous, devices) as i64;
        let native = anonymous as i64 - own - engine.budget.charged();
        engine.budget.set_native(native);
        let used = engine.budget.used().max(0) as u64;
        self.peak.fetch_max(self.geometry.bytes(peerspace_core::addr::Pages(used)), Ordering::Relaxed);
        engine.watch_budget();
        let margin = self.margin() as i64;
        // New mappings show as native pages that were not there at the last search, or that cannot be found.
        let missed = native > margin / 8 && engine.native_missed.load(Ordering::Relaxed);
        if native - watch.searched_at > margin / 8 || missed || watch.searched.elapsed() >= SECOND {
            self.adopt_new(engine, watch);
            engine.native_missed.store(false, Ordering::Relaxed);
            watch.searched_at = engine.budget.native();
            watch.searched = Instant::now();
        }
        watch.searched_at = watch.searched_at.min(native.max(0));
        if watch.recorded.elapsed() >= RECORD {
            watch.recorded = Instant::now();
            self.write_record(None);
        }
        // What is not managed may grow into the margin, and into what is left of the budget.
        self.until((engine.budget.left().max(0) as u64 + self.margin()) / 2)
    }

    /// Makes the engine, starts its threads and takes what the program has under management.
    fn arm(&self, watch: &mut Watch) {
        let engine = match self.make_engine() {
            Ok(engine) => engine,
            Err(e) => {
                crate::tell::warning(format_args!(
                    "the memory of process {} cannot be bounded: {e}",
                    rustix::process::getpid().as_raw_nonzero()
                ));
                // There is nothing to do but to let it run.
                loop {
                    let seen = self.bell.load(Ordering::Acquire);
                    match self.job.load(Ordering::Acquire) {
                        0 => wait_word(&self.bell, seen, None),
                        job => self.do_job(job),
                    }
                }
            }
        };
        let engine = self.engine.get_or_init(|| engine);
        // A page that is lost may be the end of the program.
        let _ = engine.on_loss.set(|| process().write_record(None));
        if self.options.by_signal {
            match signal::register(engine.clone()) {
                // For the life of the process.
                Ok(registration) => std::mem::forget(registration),
                Err(_) => return crate::tell::warning(format_args!("SIGBUS cannot be handled: nothing is managed")),
            }
        }
        start_services(engine);
        watch.looked_closely = Instant::now() - SECOND;
        self.adopt_new(engine, watch);
        watch.searched = Instant::now();
    }

    fn make_engine(&self) -> Result<Shared<Real>, OsError> {
        let limit = peerspace_core::addr::Pages(self.limit());
        let devices = self.open_devices()?;
        let (blocks, slots) = engine::staging_layout(limit);
        let delivery = if self.options.by_signal { Delivery::Signal } else { Delivery::Messages };
        let kernel = Linux::open(Setup { delivery, blocks, slots, without: 0 })?;
        let policy: Box<dyn Policy<Arena>> = allocator_api2::unsize_box!(Box::new_in(S3Fifo::new(), Own));
        let ram = self.geometry.pages_in(peerspace_os::linux::probe::ram_bytes());
        let config = Config { limit, ram, devices, policy, contexts: usual_contexts() };
        Engine::new(kernel, config).map(Shared::new).map_err(|e| OsError::plain(format!("set up tables: {e:?}")))
    }

    /// The devices that the options name.
    #[cfg(feature = "devices")]
    fn open_devices(&self) -> Result<Vec<OpenDevice>, OsError> {
        let plain = |e: &dyn std::fmt::Display| OsError::plain(e.to_string());
        let mut devices = Vec::new_in(Own);
        let first = self.first == Some(rustix::process::getpid().as_raw_nonzero().get());
        for (i, spec) in self.options.specs().map_err(|e| plain(&e))?.into_iter().enumerate() {
            // A file with a name is the first process's.
            let spec = if first { spec } else { spec.beside() };
            let device = spec.open_reserved(self.options.host).map_err(|e| plain(&e))?;
            devices.push(match self.options.failure(i) {
                Some(pages) => own(Failing::of(device, pages)),
                None => device,
            });
        }
        Ok(devices)
    }

    #[cfg(not(feature = "devices"))]
    fn open_devices(&self) -> Result<Vec<OpenDevice>, OsError> {
        match self.options.devices.first() {
            None => Ok(Vec::new_in(Own)),
            Some(spec) => Err(OsError::plain(format!(
                "device {spec:?}: this build of peerspace was made without devices (cargo feature \"devices\")"
            ))),
        }
    }

    /// Takes everything under management that can be and is not. Where the program changes its mappings all the
    /// time, that may take several attempts; what is left is found in the next look.
    fn adopt_new(&self, engine: &Real, watch: &mut Watch) {
        for _ in 0..SEARCHES {
            if self.adopt_found(engine, watch) {
                return;
            }
        }
    }

    /// One search. False if the program changed its mappings meanwhile.
    fn adopt_found(&self, engine: &Real, watch: &mut Watch) -> bool {
        if super::stacks::any_starting() {
            return true; // one of the new mappings is a stack, and we do not know which
        }
        engine.settle_changes();
        let Some(turn) = engine.settled() else { return false };
        let managed = |vma: VaRange, each: &mut dyn FnMut(VaRange)| {
            let pages = engine.geometry.pages_inside(vma);
            let mut at = pages.start;
            while let Some(r) = engine.regions.next(at).filter(|r| r.range.start < pages.end) {
                each(engine.geometry.range(PageRange { start: r.range.start, end: r.range.end }));
                at = r.range.end;
            }
        };
        let found = watch.search.candidates(engine.kernel.maps(), &[self.fixed], managed);
        for candidate in found.into_iter().flatten() {
            if super::stacks::any_starting() {
                return true;
            }
            let adopted = engine.adopt_settled(candidate.range, (turn, candidate.mapping));
            // It may also be of a kind that cannot be registered.
            if matches!(adopted, Err(AdoptError::Changed)) {
                return false;
            }
        }
        true
    }

    /// The record of this process as it is now.
    fn record(&self, status: Option<i32>) -> Record {
        let peak = self.peak.load(Ordering::Relaxed);
        let page = self.geometry.page_bytes() as u64;
        let mut record = match self.engine.get() {
            None => Record::idle(self.options.host, peak),
            Some(engine) => Record::of(&Statistics::of(engine), self.options.host, peak, page),
        };
        record.exit_status = status;
        record.wall_seconds = self.started.elapsed().as_secs_f64();
        record
    }

    /// Writes the record down, where somebody wants it.
    fn write_record(&self, status: Option<i32>) {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let last = status.is_some();
        let first = self.first == Some(pid);
        let path = match (&self.options.record, &self.options.report) {
            (Some(record), _) if first => record.clone(),
            // Other processes write once, at the end.
            (_, Some(report)) if !first && last => {
                let mut name = report.clone().into_os_string();
                name.push(format!(".{pid}"));
                name.into()
            }
            _ => return,
        };
        // In a forked child the one who writes may not exist.
        let ours = (0..1000).any(|_| {
            self.writing.try_lock() || {
                std::thread::sleep(Duration::from_micros(100));
                false
            }
        });
        let Ok(mut text) = serde_json::to_string(&self.record(status)) else { return };
        text.push('\n');
        // If it cannot be written, nobody is left to be told.
        let _ = write_down(&path, text.as_bytes());
        if ours {
            self.writing.unlock(&Futex);
        }
    }
}

/// Starts the threads that serve `engine`, from the keeper's thread and with its descriptors.
pub(super) fn start_services(engine: &Shared<Real>) {
    let mut loops: [Option<fn(usize)>; 16] = [None; 16];
    // Nothing is hired: who is there from the start takes nothing from the program's memory.
    loops[0] = Some(|_| process().engine.get().expect("armed").serve_reclaim(|_| {}));
    loops[1] = Some(|_| process().engine.get().expect("armed").serve(Helper::Ahead));
    if engine.has_huge() {
        loops[2] = Some(|_| process().engine.get().expect("armed").serve(Helper::Collapse));
    }
    match engine.kernel.delivery() {
        Delivery::Signal => loops[3] = Some(|_| process().engine.get().expect("armed").serve_changes()),
        Delivery::Messages => {
            loops[3] = Some(|_| process().engine.get().expect("armed").serve(Helper::Watch));
            for l in &mut loops[4..4 + usual_handlers()] {
                *l = Some(|_| process().engine.get().expect("armed").serve_messages());
            }
        }
    }
    for body in loops.into_iter().flatten() {
        if let Err(e) = raw_thread::spawn(Files::Shared, body, 0) {
            // Without it faults would never be served.
            crate::tell::warning(format_args!("cannot start a thread: {e}"));
            peerspace_os::linux::exit_now(125);
        }
    }
}

/// The anonymous pages of this process, as the kernel counts them.
fn anonymous_pages(statm: &OurFd) -> Option<u64> {
    let mut text = [0u8; 128];
    let n = rustix::io::pread(statm, &mut text, 0).ok()?;
    let mut fields = std::str::from_utf8(&text[..n]).ok()?.split_ascii_whitespace().skip(1);
    let resident: u64 = fields.next()?.parse().ok()?;
    let shared: u64 = fields.next()?.parse().ok()?;
    Some(resident.saturating_sub(shared))
}

/// A thread of the program runs on the stack `range` from now on, which is never to be managed. To be called on that
/// thread, first of all.
pub fn thread_starts(range: VaRange) {
    super::stacks::enter(range);
    super::stacks::started();
    // A stack in memory that is managed already: the thread was given one by the program.
    if let Some(process) = PROCESS.get()
        && let Some(engine) = process.engine.get()
    {
        let pages = process.geometry.pages_out(range);
        if engine.regions.next(pages.start).is_some_and(|r| r.range.start < pages.end) {
            process.disown(range);
        }
    }
}

/// Memory kept resident: see [`hold`].
#[derive(Debug)]
pub struct Kept(Option<PageRange>);

impl Drop for Kept {
    fn drop(&mut self) {
        if let (Some(pages), Some(engine)) = (self.0, PROCESS.get().and_then(|p| p.engine.get())) {
            engine.let_go(pages);
        }
    }
}

/// Where faults come by signal: brings memory that is about to be handed to a system call into RAM, and keeps it there
/// while the result lives. Of no effect for memory that is not managed.
pub fn hold(range: VaRange, write: bool) -> Kept {
    let engine = PROCESS.get().filter(|p| p.options.by_signal).and_then(|p| p.engine.get());
    let Some(engine) = engine else { return Kept(None) };
    let pages = engine.geometry.pages_out(range);
    let inside = engine.regions.find(pages.start).filter(|r| r.range.covers(pages));
    let access = if write { Access::Write } else { Access::Read };
    // What cannot be held fails in the system call, as it would without.
    Kept(inside.filter(|_| engine.hold_pages(pages, access).is_ok()).map(|_| pages))
}

/// The process is about to end with `status`: writes its report, once. May be called on any thread of the program.
pub fn last_words(status: i32) {
    let Some(process) = PROCESS.get() else { return };
    // A second call comes from an exit inside an exit.
    match process.said.try_lock() {
        Ok(mut said) if !*said => *said = true,
        _ => return,
    }
    process.write_record(Some(status));
}
