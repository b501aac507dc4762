//! Running a benchmark: all contenders are set up one after the other, then measured in turns, round by round.
//!
//! Machines drift, and other programs come and go. What is to be compared is therefore measured within seconds of
//! each other, again and again, and ratios are formed within a round. The first round is thrown away: it is the one
//! that meets cold memory.

use crate::catalogue::{Benchmark, Need, Plan};
use crate::error::Trouble;
use crate::interrupt;
use crate::process::Peer;
use crate::results::{self, BenchmarkResult, ContenderResult};
use crate::spec::{Answer, Kind, Metric, Sample};
use crate::steward::{Steward, SwapOn};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::Pid;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

/// Between two contenders: what a contender's own threads still do ends meanwhile.
const PAUSE: Duration = Duration::from_millis(30);

/// Runs benchmarks.
pub(crate) struct Runner<'a> {
    prefix: &'a [&'a str],
    /// As the user wants it.
    rounds: Option<u32>,
    steward: Option<Steward>,
}

/// A contender in its process.
struct Running {
    peer: Peer,
    pid: Option<Pid>,
    /// From the start of the process until it was ready.
    start: Duration,
    about: Option<String>,
}

/// A contender, with or without a process.
struct Slot<'a> {
    plan: &'a Plan,
    running: Option<Running>,
    samples: Vec<Sample>,
    result: ContenderResult,
}

impl<'a> Runner<'a> {
    /// A runner whose children are started with `prefix` before their own arguments.
    pub(crate) fn new(prefix: &'a [&'a str], rounds: Option<u32>) -> Runner<'a> {
        Runner { prefix, rounds, steward: None }
    }

    /// Runs one.
    ///
    /// # Errors
    /// Only when the user wants to stop. Other trouble is part of the result.
    pub(crate) fn run(&mut self, benchmark: &Benchmark) -> Result<BenchmarkResult, Trouble> {
        let mut slots: Vec<Slot<'_>> = benchmark.contenders.iter().map(Slot::new).collect();
        let rounds = self.rounds.unwrap_or(benchmark.rounds);
        let bar = progress(benchmark, rounds);
        let done = if benchmark.fresh {
            self.rounds_of_fresh(rounds, &mut slots, &bar)
        } else {
            self.set_up(&mut slots, &bar).and_then(|()| self.take_turns(rounds, &mut slots, &bar))
        };
        bar.finish_and_clear();
        // The processes go first: swap and cgroups are theirs.
        for slot in &mut slots {
            slot.running = None;
        }
        if let Some(steward) = &mut self.steward {
            steward.release()?;
        }
        done?;
        Ok(sum_up(benchmark, rounds, slots))
    }

    fn set_up(&mut self, slots: &mut [Slot<'_>], bar: &ProgressBar) -> Result<(), Trouble> {
        let swap = self.provide_swap(slots)?;
        for slot in slots {
            bar.set_message(format!("set up {}", slot.plan.id));
            let cgroup = match (slot.plan.need, &swap) {
                (Need::Nothing, _) => None,
                (_, Err(why)) => {
                    slot.result.skipped = Some(why.clone());
                    None
                }
                (_, Ok(what)) => {
                    slot.result.what = format!("{} ({what})", slot.result.what);
                    let steward = self.steward.as_mut().expect("there is a steward where there is swap");
                    match steward.cgroup(slot.plan.spec.host) {
                        Ok(procs) => Some(procs),
                        Err(e) => {
                            slot.note(e)?;
                            None
                        }
                    }
                }
            };
            slot.start(self.prefix, cgroup)?;
            bar.inc(1);
        }
        Ok(())
    }

    /// Swap for those who need it, if any do; or why it is not to be had.
    fn provide_swap(&mut self, slots: &[Slot<'_>]) -> Result<Result<String, String>, Trouble> {
        let needing = |need: Need| slots.iter().filter(move |s| s.plan.need == need);
        let bytes = |need| needing(need).map(|s| s.plan.spec.data + s.plan.spec.host).sum::<u64>();
        let on = match slots.iter().find(|s| s.plan.need != Need::Nothing).map(|s| (s.plan.need, s)) {
            None => return Ok(Err("no swap is needed".into())),
            Some((Need::SwapFile, slot)) => (SwapOn::File(slot.plan.spec.dir.clone()), bytes(Need::SwapFile)),
            Some(_) => (SwapOn::Zram, bytes(Need::Zram)),
        };
        let steward = match &mut self.steward {
            Some(steward) => steward,
            none => match Steward::start(self.prefix) {
                Ok(steward) => none.insert(steward),
                Err(Trouble::Interrupted) => return Err(Trouble::Interrupted),
                Err(e) => return Ok(Err(e.to_string())),
            },
        };
        match steward.swap(on.0, on.1) {
            Err(Trouble::Interrupted) => Err(Trouble::Interrupted),
            other => Ok(other.map_err(|e| e.to_string())),
        }
    }

    fn take_turns(&self, rounds: u32, slots: &mut [Slot<'_>], bar: &ProgressBar) -> Result<(), Trouble> {
        for round in 0..=rounds {
            for slot in slots.iter_mut() {
                bar.set_message(match round {
                    0 => format!("warm up {}", slot.plan.id),
                    n => format!("round {n}, {}", slot.plan.id),
                });
                slot.measure(round > 0)?;
                bar.inc(1);
            }
        }
        Ok(())
    }

    /// Measures contenders that need a new process for each measurement.
    fn rounds_of_fresh(&self, rounds: u32, slots: &mut [Slot<'_>], bar: &ProgressBar) -> Result<(), Trouble> {
        for round in 1..=rounds {
            for slot in slots.iter_mut() {
                bar.set_message(format!("round {round}, {}", slot.plan.id));
                slot.start(self.prefix, None)?;
                slot.measure(true)?;
                slot.running = None;
                bar.inc(1);
            }
        }
        Ok(())
    }
}

impl<'a> Slot<'a> {
    fn new(plan: &'a Plan) -> Slot<'a> {
        let result = ContenderResult {
            id: plan.id,
            what: plan.what.clone(),
            data_bytes: plan.spec.data,
            host_bytes: plan.spec.host,
            eviction_on_path: plan.evicts,
            skipped: plan.unavailable(),
            failed: None,
            verified_words: 0,
            metrics: Vec::new(),
        };
        Slot { plan, running: None, samples: Vec::new(), result }
    }

    /// Notes why the contender does not take part any more. An error if nobody should.
    fn note(&mut self, trouble: Trouble) -> Result<(), Trouble> {
        if interrupt::is_set() {
            return Err(Trouble::Interrupted);
        }
        match trouble {
            Trouble::Interrupted => return Err(Trouble::Interrupted),
            Trouble::Unavailable(why) => self.result.skipped = Some(why),
            // Nobody else ends processes like that. It is not ours to answer for.
            Trouble::Ended(status) if self.plan.need != Need::Nothing && status.signal() == Some(9) => {
                self.result.skipped = Some("the kernel killed it, being out of memory in its cgroup".into());
            }
            other => self.result.failed = Some(other.to_string()),
        }
        // Numbers of somebody who fails later are worth nothing.
        self.samples.clear();
        if let Some(running) = self.running.take() {
            running.peer.kill();
        }
        Ok(())
    }

    fn is_out(&self) -> bool {
        self.result.skipped.is_some() || self.result.failed.is_some()
    }

    /// Starts the contender's process and waits until it is ready.
    fn start(&mut self, prefix: &[&str], cgroup: Option<std::path::PathBuf>) -> Result<(), Trouble> {
        if self.is_out() {
            return Ok(());
        }
        let mut spec = self.plan.spec.clone();
        spec.cgroup = cgroup;
        match Running::start(prefix, &serde_json::to_string(&spec).expect("a spec can be written as JSON")) {
            Ok(running) => {
                if let (Some(about), true) = (&running.about, self.samples.is_empty()) {
                    self.result.what = format!("{} ({about})", self.result.what);
                }
                self.running = Some(running);
                Ok(())
            }
            Err(e) => self.note(e),
        }
    }

    /// Has the contender do its work once. The sample counts if `counts`.
    fn measure(&mut self, counts: bool) -> Result<(), Trouble> {
        let Some(running) = &mut self.running else { return Ok(()) };
        std::thread::sleep(PAUSE);
        let answer = running.peer.tell(&self.plan.work).and_then(|()| running.peer.hear());
        match answer.and_then(done) {
            Ok(sample) => {
                self.result.verified_words += sample.verified;
                if counts {
                    let start = running.start.as_secs_f64() * 1e3;
                    let starts = matches!(self.plan.spec.kind, Kind::Start(_));
                    self.samples.push(if starts { sample.with(Metric::ProcessTime, start) } else { sample });
                }
                Ok(())
            }
            Err(e) => self.note(e),
        }
    }

    fn finish(self) -> ContenderResult {
        ContenderResult { metrics: results::measured(&self.samples), ..self.result }
    }
}

impl Running {
    fn start(prefix: &[&str], spec: &str) -> Result<Running, Trouble> {
        let start = Instant::now();
        let peer = Peer::start(prefix, &["--contender", spec])?;
        let pid = peer.pid();
        interrupt::contenders(|pids| pids.extend(pid));
        let mut running = Running { peer, pid, start: Duration::ZERO, about: None };
        match running.peer.hear()? {
            Answer::Ready(about) => (running.about, running.start) = (about, start.elapsed()),
            other => return Err(done(other).err().unwrap_or(Trouble::Failed("it began with the end".into()))),
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        interrupt::contenders(|pids| pids.retain(|p| Some(*p) != self.pid));
    }
}

fn sum_up(benchmark: &Benchmark, rounds: u32, slots: Vec<Slot<'_>>) -> BenchmarkResult {
    let samples = |id: &str| &slots.iter().find(|s| s.plan.id == id).expect("it takes part").samples[..];
    let ratios = benchmark.versus.iter().filter_map(|v| results::ratio(v, samples(v.subject), samples(v.reference)));
    let values = benchmark.aims.iter().filter_map(|a| results::value(a, samples(a.contender)));
    BenchmarkResult {
        name: benchmark.name,
        about: benchmark.about.clone(),
        rounds,
        ratios: ratios.collect(),
        values: values.collect(),
        contenders: slots.into_iter().map(Slot::finish).collect(),
    }
}

fn done(answer: Answer) -> Result<Sample, Trouble> {
    match answer {
        Answer::Done(sample) => Ok(sample),
        Answer::Unavailable(why) => Err(Trouble::Unavailable(why)),
        Answer::Wrong(why) => Err(Trouble::Wrong(why)),
        Answer::Failed(why) => Err(Trouble::Failed(why)),
        Answer::Ready(_) => Err(Trouble::Failed("it is ready twice".into())),
    }
}

fn progress(benchmark: &Benchmark, rounds: u32) -> ProgressBar {
    let all = benchmark.contenders.len() as u64;
    let steps = if benchmark.fresh { all * rounds as u64 } else { all * (rounds as u64 + 2) };
    // Hidden by itself where standard error is no terminal.
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {elapsed} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(benchmark.name);
    bar
}
