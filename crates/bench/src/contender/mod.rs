//! The process of a contender: sets itself up, then measures whenever it is told to.
//!
//! A contender is alone in its process, so that a memory cgroup, swap, huge pages and warm memory belong to it
//! alone. What most of them are is memory: their data are read by ordinary loads, by the same loops for everybody
//! ([`crate::workload`]), and only how the data come to be there differs. The others do the same reads by other
//! means.

mod accelerated;
mod attach;
mod c_call;
mod collapse;
mod copy;
mod device;
mod footprint;
mod ours;
#[cfg(feature = "dax")]
mod place;
mod pread;
mod start;
mod swap;
mod turn;
mod turnover;

pub(crate) use device::available;

use crate::error::Trouble;
use crate::file::DataFile;
use crate::floor::{FileFloor, MemoryFloor};
use crate::spec::{Answer, Kind, Metric, Sample, Spec, Work};
use crate::workload::{self, Places};
use peerspace::Hint;
use peerspace_os::linux::map::Mapping;
use rustix::mm::Advice;
use rustix::time::{ClockId, clock_gettime};
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

/// Somebody who can be measured.
pub(crate) trait Contender {
    /// Does `work` once.
    fn perform(&mut self, work: Work) -> Result<Sample, Trouble>;
}

/// Memory with the data in it, paged by whoever it belongs to.
pub(crate) trait Memory {
    /// The data.
    fn words(&self) -> &[u64];

    /// What has happened so far.
    fn counters(&mut self) -> Counters;

    /// Moves all data out of RAM and leaves the RAM free.
    fn send_away(&mut self) -> Result<(), Trouble> {
        Err(Trouble::Unavailable("it cannot be told to".into()))
    }
}

/// What a contender knows of its own doings.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    /// Faults that had to fetch data.
    pub(crate) fetches: Option<u64>,
    /// Pages written to where data live that are not in RAM.
    pub(crate) stores: Option<u64>,
}

/// A contender that is memory.
struct Paged<M> {
    memory: M,
    places: Places,
    /// Pages that are out of RAM, in the order in which they will be read.
    away: Vec<u32>,
}

impl<M: Memory> Paged<M> {
    fn new(memory: M) -> Paged<M> {
        let pages = memory.words().len() / workload::PAGE_WORDS;
        Paged { memory, places: Places::new(pages as u64), away: Vec::new() }
    }

    /// `n` pages that are out of RAM, or all there are.
    fn absent(&mut self, n: u64) -> Result<Vec<u32>, Trouble> {
        let all = self.memory.words().len() / workload::PAGE_WORDS;
        let n = all.min(n as usize);
        if self.away.len() < n {
            self.memory.send_away()?;
            self.away = self.places.shuffled();
        }
        // Frames that nobody has used for a moment may have gone back to the host of a virtual machine.
        warm(4 * (n * workload::PAGE_BYTES) as u64, Advice::LinuxNoHugepage)?;
        Ok(self.away.split_off(self.away.len() - n))
    }
}

impl<M: Memory> Contender for Paged<M> {
    fn perform(&mut self, work: Work) -> Result<Sample, Trouble> {
        let absent = match work {
            Work::Absent { accesses } => self.absent(accesses)?,
            _ => Vec::new(),
        };
        let before = self.memory.counters();
        let words = self.memory.words();
        let (bytes, pages) = (size_of_val(words) as f64, (words.len() / workload::PAGE_WORDS) as u64);
        let mut sample = match work {
            Work::Sequential => timed(|| workload::read_in_order(words, 0), |time| throughput(time, bytes))?,
            Work::Random { accesses } => timed(
                || workload::read_at_random(words, &mut self.places, accesses),
                |time| per_access(time, accesses),
            )?,
            Work::Absent { .. } => {
                timed(|| workload::read_each(words, &absent), |time| per_access(time, absent.len() as u64))?
            }
            Work::Own => return Err(Trouble::Failed("it has nothing of its own to do".into())),
        };
        let after = self.memory.counters();
        if let (Some(us), Some(a), Some(b)) =
            (sample.metrics.get(&Metric::PerAccess).copied(), after.fetches, before.fetches)
        {
            let (fetches, reads) = (a - b, sample.verified);
            if !absent.is_empty() && fetches < reads - reads / 32 {
                return Err(Trouble::Failed(format!("only {fetches} of {reads} pages were out of RAM")));
            }
            sample = per_fault(sample, us * reads as f64 / fetches.max(1) as f64);
        }
        if let (true, Some(a), Some(b)) = (absent.is_empty(), after.stores, before.stores) {
            // The first store of each page is that of data that were written.
            let again = |stores: u64| stores.saturating_sub(pages) as f64;
            sample = sample.with(Metric::StoredAgain, again(a) - again(b));
        }
        Ok(sample)
    }
}

fn per_access(seconds: f64, accesses: u64) -> Vec<(Metric, f64)> {
    vec![(Metric::PerAccess, seconds * 1e6 / accesses as f64)]
}

fn throughput(seconds: f64, bytes: f64) -> Vec<(Metric, f64)> {
    vec![(Metric::Throughput, bytes / seconds / 1e9)]
}

/// Adds what a fault took.
fn per_fault(sample: Sample, us: f64) -> Sample {
    let cores = sample.metrics.get(&Metric::Cores).copied().unwrap_or(0.0);
    sample.with(Metric::PerFault, us).with(Metric::CpuPerFault, us * cores)
}

/// Runs `f` with a clock and the meter of processor time.
fn timed(
    f: impl FnOnce() -> Result<u64, Trouble>,
    metrics: impl FnOnce(f64) -> Vec<(Metric, f64)>,
) -> Result<Sample, Trouble> {
    let cpu = cpu_seconds();
    let start = Instant::now();
    let verified = f()?;
    let time = start.elapsed().as_secs_f64();
    let cores = (cpu_seconds() - cpu) / time;
    let sample = Sample::verified(verified).with(Metric::Cores, cores);
    Ok(metrics(time).into_iter().fold(sample, |s, (m, v)| match m {
        Metric::Throughput => s.with(m, v).with(Metric::CpuPerGb, cores * 1e3 / v),
        _ => s.with(m, v),
    }))
}

/// Processor time of this process so far, user and system, all threads.
fn cpu_seconds() -> f64 {
    let t = clock_gettime(ClockId::ProcessCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Has the host of a virtual machine back `bytes` of memory, which it does on first touch and slowly: whatever is
/// touched next is likely to be memory that was touched just now. Likely only for pages of the same size, since the
/// kernel keeps small and large pieces of free memory apart.
fn warm(bytes: u64, pages: Advice) -> Result<(), Trouble> {
    let mapping = Mapping::new(bytes as usize, 2 << 20, true).map_err(Trouble::failed("map memory to warm"))?;
    // SAFETY: the advice changes no content.
    let _ = unsafe { mapping.advise(0, mapping.len(), pages) };
    // SAFETY: the mapping is writable and nobody else's.
    unsafe { mapping.as_ptr().write_bytes(1, mapping.len()) };
    Ok(())
}

/// Makes the contender of `spec`; and what only it could find out about itself.
fn make(spec: &Spec) -> Result<(Box<dyn Contender>, Option<String>), Trouble> {
    fn paged<M: Memory + 'static>(memory: M) -> Box<dyn Contender> {
        Box::new(Paged::new(memory))
    }
    match spec.kind {
        Kind::Start(_) | Kind::Footprint | Kind::Attach | Kind::CCall(_) => {}
        Kind::Pread | Kind::FloorFile | Kind::Ours(crate::spec::DeviceKind::File) => {
            warm(spec.host, Advice::LinuxNoHugepage)?;
        }
        _ => warm(spec.data + spec.host, Advice::LinuxHugepage)?,
    }
    Ok(match spec.kind {
        Kind::Ours(device) => {
            let (ours, about) = ours::Ours::new(spec, device, Hint::Normal)?;
            (paged(ours), about)
        }
        Kind::OursSmall(device) => {
            let (ours, about) = ours::Ours::new(spec, device, Hint::Sparse)?;
            (paged(ours), about)
        }
        Kind::Collapse(by) => (Box::new(collapse::Collapse::new(spec, by)?), None),
        Kind::Turnover(by) => (Box::new(turnover::Turnover::new(spec, by)?), None),
        Kind::Turn { dense } => (Box::new(turn::Turn::new(spec, dense)), None),
        Kind::Floor { huge, lz4 } => (paged(MemoryFloor::new(spec.data, spec.host, huge, lz4)?), None),
        Kind::FloorFile => {
            let file = DataFile::new(&spec.dir, spec.data)?;
            let about = file.mode().to_owned();
            let floor = FileFloor::new(file, spec.host)?;
            if spec.host < spec.data {
                // With its RAM full, it begins as the others do.
                workload::read_in_order(&floor.words()[..spec.host as usize / 8], 0)?;
            }
            (paged(floor), Some(about))
        }
        Kind::Swap { huge } => (paged(swap::Swapped::new(spec, huge)?), None),
        Kind::Copy => (Box::new(copy::Copy::new(spec)?), None),
        Kind::Pread => {
            let pread = pread::Pread::new(spec)?;
            let about = pread.mode().to_owned();
            (Box::new(pread), Some(about))
        }
        #[cfg(feature = "dax")]
        Kind::Place(ours) => (Box::new(place::Place::new(spec, ours)?), None),
        #[cfg(not(feature = "dax"))]
        Kind::Place(_) => return Err(Trouble::Unavailable("this build has no device dax".into())),
        Kind::Migrate { ours, piece } => (Box::new(accelerated::Migrate::new(spec, ours, piece)?), None),
        Kind::Touch { device, on } => (Box::new(accelerated::Touch::new(spec, device, on)?), None),
        Kind::Stream(link) => {
            let (stream, about) = accelerated::Stream::new(spec, link)?;
            (Box::new(stream), Some(about))
        }
        Kind::Traffic { job, hints, link } => (Box::new(accelerated::Traffic::new(spec, job, hints, link)?), None),
        Kind::Calls { ours, call } => (Box::new(accelerated::Calls::new(spec, ours, call)?), None),
        Kind::Attach => (Box::new(attach::Attach::new(spec)), None),
        Kind::Footprint => (Box::new(footprint::Footprint::new(spec)?), None),
        Kind::CCall(call) => (Box::new(c_call::Calls::new(spec, call)?), None),
        Kind::Start(space) => (Box::new(start::Start::new(spec, space)?), None),
    })
}

/// The life of a contender's process: reads lines of [`Work`] from standard input, and writes lines of [`Answer`] to
/// standard output, until there are no more.
pub(crate) fn serve(spec: &str) -> ExitCode {
    // A parent that is gone wants no more numbers; whoever holds swap or a cgroup for us waits for our end.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let run = || -> Result<(), Trouble> {
        let spec: Spec = serde_json::from_str(spec).map_err(Trouble::failed("read what to be"))?;
        let (mut contender, about) = make(&spec)?;
        say(&Answer::Ready(about));
        for line in std::io::stdin().lock().lines() {
            let line = line.map_err(Trouble::failed("read what to do"))?;
            let work: Work = serde_json::from_str(&line).map_err(Trouble::failed("read what to do"))?;
            say(&Answer::Done(contender.perform(work)?));
        }
        Ok(())
    };
    match run() {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Trouble::Unavailable(why)) => say(&Answer::Unavailable(why)),
        Err(Trouble::Wrong(why)) => say(&Answer::Wrong(why)),
        Err(e) => say(&Answer::Failed(e.to_string())),
    }
    ExitCode::FAILURE
}

fn say(answer: &Answer) {
    let mut line = serde_json::to_string(answer).expect("an answer can be written as JSON");
    line.push('\n');
    // The parent that would read it may be gone, and then nobody is interested.
    let _ = std::io::stdout().write_all(line.as_bytes());
    let _ = std::io::stdout().flush();
}
