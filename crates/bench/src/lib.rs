//! Measures peerspace against the kernel's own swap and against the least a pager can cost.
//!
//! `peerspace bench`, or `peerspace-bench`, runs the benchmarks of [the catalogue](Args): random and sequential
//! access to more data than there is RAM for, with the data in memory, compressed, or in a file; what a space
//! needs for itself; and what accelerators wait for, and have to move.
//!
//! # How it measures
//!
//! * What is compared is measured in turns, round by round, and ratios are formed within a round. Reported are the
//!   median, the least and the greatest. The first round does not count. A wide spread is a noisy machine, or a
//!   contender whose speed varies: it is shown, not averaged away.
//! * Every contender is a process of its own, so that a memory cgroup, swap and huge pages belong to it alone; it
//!   touches as much memory as it will need before it begins, because the host of a virtual machine backs memory on
//!   first touch, slowly.
//! * All contenders read the same data in the same order by the same loops, and every word that is read is verified.
//! * Processor time by wall time is shown as `cores busy`: much less than one in a contender that waits for nothing
//!   means that other programs were running. Processor time per fault and per GB is shown too: it varies less than
//!   wall time on such a machine, and counts what ours does in the background.
//! * Whether data have to leave RAM while a contender is measured is said in each row.
//! * `us/fault` is the time of all accesses by the number of faults that had to fetch data. It is what to compare
//!   when contenders keep different pages in RAM; `us/access` is what a program feels.
//!
//! # Contenders
//!
//! *ours*: a region of a space with one device, faults by signal. *floor*: a pager over the same calls of the kernel
//! that does nothing else; one thread, no books to keep. *zram swap*, *swap file*: the kernel, with the data in a
//! memory cgroup of the same size (version 1 or 2); only for root. *memcpy*, *pread*: the transfer alone.
//!
//! Accelerators are the one in software, with one lane: what is measured of them is the engine. Where one is behind a link, a
//! transfer takes as long as over that link, or as the copy in memory takes, whichever is longer; `--link-bandwidth` and
//! `--link-latency` say what the link is like. What goes over it is counted by the accelerator. Kernels verify what they
//! read, so the work that transfers are to hide behind is real: it needs a processor, and so does the thread that sends.
//! `cores busy` says whether there were two.
//!
//! Swap devices, cgroups and files are taken down on every way out, also when the benchmarks are killed.
//!
//! # Results as JSON
//!
//! Sizes are in bytes; a *spread* is `median`, `min`, `max` and `samples` in the order of the rounds.
//!
//! ```text
//! schema          1
//! version         of this crate
//! quick           true for small sizes, whose numbers say little
//! machine         processors, processor, kernel, page_bytes, huge_pages (always, madvise, never), memory_bytes,
//!                 load (runnable threads in the minute before)
//! benchmarks[]    name, about, rounds
//!   contenders[]  id, what, data_bytes, host_bytes (RAM for them), eviction_on_path,
//!                 skipped (why, or null), failed (why, or null), verified_words
//!     metrics[]   metric, label, and a spread
//!   ratios[]      subject, reference, metric, and a spread
//!                 of: "time", "amount" (less is better) or "speed" (more is better), of the subject by the reference
//!                 target: null, or { at_most or at_least: x, met: true or false }, judged by the median
//!   values[]      contender, metric, and a spread; target as above
//! ```
//!
//! Metrics: `throughput` (GB/s), `per_access` and `per_fault` (us); `cpu_per_gb` (ms) and `cpu_per_fault` (us), both
//! of processor time; `cores` (processor time by wall time); `stored_again` (pages written once more to where data
//! live outside of RAM, although nobody changed them); `bytes_whole`, `bytes_split` and `bytes_split_away` (our own
//! memory per 2 MiB of managed memory), `bytes_fixed` (our own memory before it grows with the data); `space_time`
//! and `process_time` (ms); `fault_median` (ns); `resident`, `on_demand`, `prefetched` and `took` (ms); `hidden` (the share of
//! the transfer's time that does not show) and `late` (blocks that were touched before they had come); `over_link` (MiB), and
//! `by_asked`, `by_reader` (bytes over links by those that were asked for, or by those that each reader reads), `by_turns`
//! (moves of a page by the turns of those who write to it).
//!
//! # Exit status
//!
//! 0, also when a target is missed; 1 when a contender read something that was not written, or ended otherwise than
//! it should, or a result could not be written; 2 for a command line that means nothing; 130 when interrupted.

mod args;
mod catalogue;
mod chart;
mod contender;
mod error;
mod file;
mod floor;
mod interrupt;
mod machine;
mod process;
mod results;
mod run;
mod spec;
mod steward;
mod table;
mod workload;

pub use args::Args;

use catalogue::Sizes;
use error::Trouble;
use machine::Machine;
use results::Report;
use run::Runner;
use std::path::Path;
use std::process::ExitCode;

/// Runs what `args` say, and prints the results.
///
/// The program starts itself again for each contender: `prefix` is what has to stand before our own arguments then
/// (`["bench"]` where the benchmarks are a subcommand, nothing where they are the program).
pub fn main_with(args: &Args, prefix: &[&str]) -> ExitCode {
    if let Some(spec) = &args.contender {
        return contender::serve(spec);
    }
    if args.steward {
        return steward::serve();
    }
    let sizes = if args.quick { Sizes::QUICK } else { Sizes::FULL };
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let mut benchmarks = catalogue::all(sizes, &dir, args.link());
    benchmarks.retain(|b| args.names.is_empty() || args.names.iter().any(|n| n == b.name));
    if args.list {
        print!("{}", table::list(&benchmarks));
        return ExitCode::SUCCESS;
    }
    interrupt::listen();
    let machine = Machine::look();
    println!("{}", machine.line());
    let mut report =
        Report { schema: 1, version: env!("CARGO_PKG_VERSION"), quick: args.quick, machine, benchmarks: Vec::new() };
    let mut runner = Runner::new(prefix, args.rounds);
    for benchmark in &benchmarks {
        match runner.run(benchmark) {
            Ok(result) => {
                println!("\n{}", table::of(&result));
                report.benchmarks.push(result);
            }
            Err(e) => {
                // What was set up is taken down first; the steward is waited for.
                drop(runner);
                eprintln!("peerspace-bench: {e}");
                return ExitCode::from(if matches!(e, Trouble::Interrupted) { 130 } else { 1 });
            }
        }
    }
    drop(runner);
    let (met, all) = report.targets();
    println!("\n{met} of {all} targets met");
    let mut failed = report.any_failed();
    for (path, write) in [(&args.json, write_json as Write), (&args.svg, chart::draw)] {
        if let Some(path) = path
            && let Err(e) = write(&report, path)
        {
            eprintln!("peerspace-bench: write {}: {e}", path.display());
            failed = true;
        }
    }
    ExitCode::from(failed as u8)
}

type Write = fn(&Report, &Path) -> Result<(), String>;

fn write_json(report: &Report, path: &Path) -> Result<(), String> {
    let mut json = serde_json::to_string_pretty(report).map_err(|e| e.to_string())?;
    json.push('\n');
    std::fs::write(path, json).map_err(|e| e.to_string())
}
