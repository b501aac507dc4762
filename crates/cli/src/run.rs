//! `peerspace run`: runs an unmodified program with its memory bounded to a budget.
//!
//! Everything that can be found out beforehand is: options, the program, the devices, what this machine allows. Only
//! then is the program started, with our library preloaded. The command stays beside it: it passes signals on, and
//! writes the report when the program has ended, however it did.

use crate::library::Library;
use crate::program;
use clap::{Args, ValueEnum};
use comfy_table::{Cell, CellAlignment, Table, presets};
use peerspace::device::failing::FailureSpec;
use peerspace::process::{LEAST_HOST, MOST_HOST, Options, Record};
use peerspace::{DeviceSpec, Size};
use peerspace_os::linux::{Delivery, Linux, Setup};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

/// Options of `peerspace run`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: the program's, or 128 and the signal that ended it. Our own: 2 for options that make no \
sense, 125 where this machine cannot do it (with reason and remedy), 126 for a program that cannot be executed or \
preloaded, 127 for one that does not exist.\n\nExamples:\n  peerspace run --host 256M -- sort -o sorted.txt big.txt\n  \
peerspace run --host 1G --device compressed:2G --device file:/var/tmp --report run.json -- python3 train.py"
)]
pub(crate) struct RunArgs {
    /// RAM that the program's memory may take up: bytes, or with K, M, G, T.
    ///
    /// Counts each process by itself: the resident anonymous memory of the program, pages on standby included. What
    /// `compressed` stores is RAM too, but is counted under devices.
    #[arg(long, value_name = "SIZE")]
    pub(crate) host: Size,

    /// Where memory goes that does not fit: compressed[:SIZE], file:PATH[:SIZE], dax:SIZE, dax:PATH[:SIZE], soft:SIZE.
    ///
    /// May be given several times; they are tried in order. Without it: `compressed`, then an unlinked file in the
    /// temporary directory. `compressed` without a SIZE takes up to as much RAM as --host.
    #[arg(long = "device", value_name = "SPEC")]
    pub(crate) devices: Vec<DeviceSpec>,

    /// Have a device fail: NUMBER:PAGES, the first device being 1, after PAGES pages to or from it.
    ///
    /// What it alone held is lost: an access to it ends the program with SIGBUS unless it handles that. Everything else
    /// goes on. To try out what a program makes of it.
    #[arg(long, value_name = "NUMBER:PAGES")]
    pub(crate) inject: Vec<FailureSpec>,

    /// How page faults are delivered.
    #[arg(long, value_enum, default_value_t = FaultsArg::Auto)]
    pub(crate) faults: FaultsArg,

    /// Write a report (JSON; sizes in bytes, times in ns) to FILE; children write FILE.PID.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Print a summary to standard error at the end.
    #[arg(long)]
    pub(crate) stats: bool,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM [ARGS]")]
    pub(crate) program: Vec<OsString>,
}

/// How page faults are delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FaultsArg {
    /// The fastest that is safe for a program nobody knows: thread.
    Auto,
    /// By threads beside the program's. Serves the kernel's own accesses too, so any program works. Needs root,
    /// vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd.
    Thread,
    /// By SIGBUS in the faulting thread: several times faster, and unprivileged. But a system call that meets memory
    /// that is away fails with EFAULT. The program's own calls of read, write and their kind are covered; what the C
    /// library calls inside itself is not: buffered streams (stdio) other than the standard ones, file names, and
    /// structures passed by pointer. For programs that compute, and programs made for it.
    Signal,
}

/// What ends the command before the program starts.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u8,
    pub(crate) why: String,
}

impl Refusal {
    fn new(status: u8, why: impl Into<String>) -> Refusal {
        Refusal { status, why: why.into() }
    }
}

/// A program that ran.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) record: Record,
}

/// Runs the program; returns the status to exit with.
pub(crate) fn run(args: &RunArgs) -> Result<u8, Refusal> {
    let ran = execute(args, |_| {})?;
    if args.stats {
        eprintln!("{}", summary(&ran.record));
    }
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&ran.record).expect("a record is plain data");
        if let Err(e) = std::fs::write(path, text + "\n") {
            eprintln!("peerspace: the report cannot be written to {}: {e}", path.display());
        }
    }
    Ok(exit_status(ran.status))
}

/// The exit status that stands for how a process ended.
pub(crate) fn exit_status(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.wrapping_add(signal as u8),
        (None, None) => 125,
    }
}

/// Checks everything, starts the program and waits for its end. `prepare` can change how it is started.
pub(crate) fn execute(args: &RunArgs, prepare: impl FnOnce(&mut Command)) -> Result<Ran, Refusal> {
    if args.host.0 < LEAST_HOST {
        return Err(Refusal::new(
            2,
            format!("--host {}: at least {} is needed to run a program in", args.host, Size(LEAST_HOST)),
        ));
    }
    if args.host.0 > MOST_HOST {
        return Err(Refusal::new(
            2,
            format!("--host {}: {} is the most that can be managed", args.host, Size(MOST_HOST)),
        ));
    }
    // The program may go elsewhere before it needs them.
    let devices: Vec<_> = default_devices(&args.devices).iter().map(DeviceSpec::absolute).collect();
    if let Some(failure) = args.inject.iter().find(|f| f.device > devices.len()) {
        let n = devices.len();
        return Err(Refusal::new(2, format!("--inject {failure}: there are {n} devices, of which the first is 1")));
    }
    let path = program::find(&args.program[0]).map_err(|p| {
        let status = p.status();
        let (program::Problem::NotFound(why) | program::Problem::NotExecutable(why)) = p;
        Refusal::new(status, why)
    })?;
    let by_signal = args.faults == FaultsArg::Signal;
    check_machine(by_signal)?;
    let reserved: Result<Vec<_>, _> = devices.iter().map(|d| d.reserve(args.host.0)).collect();
    // Until the end: it may need them late.
    let _reserved = reserved.map_err(|e| Refusal::new(125, e.to_string()))?;
    let place = args.report.as_deref().map(ReportPlace::take).transpose()?;
    let broken = |what: &str, e: std::io::Error| Refusal::new(125, format!("{what}: {e}"));
    let library = Library::find().map_err(|e| broken("the library to preload", e))?;
    let record = memfd_create("peerspace-record", MemfdFlags::CLOEXEC)
        .map_err(|e| broken("a file for the program's record", e.into()))?;
    let options = Options {
        host: args.host.0,
        by_signal,
        devices: devices.iter().map(DeviceSpec::to_string).collect(),
        inject: args.inject.iter().map(FailureSpec::to_string).collect(),
        report: args.report.as_ref().map(|p| std::path::absolute(p).unwrap_or_else(|_| p.clone())),
        parent: std::process::id() as i32,
        record: Some(format!("/proc/{}/fd/{}", std::process::id(), record.as_raw_fd()).into()),
    };
    let mut command = Command::new(&path);
    command
        .arg0(&args.program[0])
        .args(&args.program[1..])
        .env(Options::VARIABLE, serde_json::to_string(&options).expect("options are plain data"))
        .env("LD_PRELOAD", library.preload(std::env::var_os("LD_PRELOAD")));
    prepare(&mut command);
    let started = Instant::now();
    let signals = Signals::catch().map_err(|e| broken("signal handlers", e))?;
    let child = peerspace_os::linux::child::spawn(&mut command).map_err(|e| {
        let status = if e.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
        Refusal::new(status, format!("{}: {e}", path.display()))
    })?;
    if let Some(place) = place {
        place.keep();
    }
    let status = signals.pass_on_until_end(child).map_err(|e| broken("wait for the program", e))?;
    let mut record = read_record(std::fs::File::from(record)).unwrap_or_else(|| Record::idle(args.host.0, 0));
    record.exit_status = Some(exit_status(status) as i32);
    record.wall_seconds = started.elapsed().as_secs_f64();
    Ok(Ran { status, record })
}

/// The file a report is going to be written to, tried out beforehand and not after an hour. If no program comes to
/// run, it is not left behind.
struct ReportPlace<'a> {
    path: &'a Path,
    fresh: bool,
}

impl ReportPlace<'_> {
    fn take(path: &Path) -> Result<ReportPlace<'_>, Refusal> {
        let fresh = !path.exists();
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
        opened.map_err(|e| Refusal::new(2, format!("--report {}: {e}", path.display())))?;
        Ok(ReportPlace { path, fresh })
    }

    fn keep(mut self) {
        self.fresh = false;
    }
}

impl Drop for ReportPlace<'_> {
    fn drop(&mut self) {
        if self.fresh {
            // Nothing can be done if it cannot be removed.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// The devices to use when these were asked for.
pub(crate) fn default_devices(asked: &[DeviceSpec]) -> Vec<DeviceSpec> {
    if asked.is_empty() {
        vec![DeviceSpec::Compressed(None), DeviceSpec::File(std::env::temp_dir(), None)]
    } else {
        asked.to_vec()
    }
}

/// Whether this machine allows what is needed, by doing it once.
fn check_machine(by_signal: bool) -> Result<(), Refusal> {
    let delivery = if by_signal { Delivery::Signal } else { Delivery::Messages };
    match Linux::open(Setup { delivery, blocks: 1, slots: 64, without: 0 }) {
        Ok(_) => Ok(()),
        Err(e)
            if !by_signal
                && Linux::open(Setup { delivery: Delivery::Signal, blocks: 1, slots: 64, without: 0 }).is_ok() =>
        {
            Err(Refusal::new(
                125,
                format!(
                    "{e}. Or use --faults signal, which needs none of that, if the program suits it (see --help)"
                ),
            ))
        }
        Err(e) => Err(Refusal::new(125, format!("{e}. `peerspace doctor` says more"))),
    }
}

fn read_record(mut file: std::fs::File) -> Option<Record> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.read_to_string(&mut text).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    serde_json::from_value(value).ok()
}

/// Signals that are meant for the program.
struct Signals {
    caught: signal_hook::iterator::SignalsInfo<signal_hook::iterator::exfiltrator::WithOrigin>,
}

impl Signals {
    fn catch() -> std::io::Result<Signals> {
        use signal_hook::consts::{SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
        let numbers = [SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
        Ok(Signals { caught: signal_hook::iterator::SignalsInfo::new(numbers)? })
    }

    /// Waits for the program's end, and passes on what comes meanwhile.
    fn pass_on_until_end(mut self, mut child: Child) -> std::io::Result<ExitStatus> {
        use signal_hook::consts::{SIGCHLD, SIGINT, SIGQUIT};
        use signal_hook::low_level::siginfo::Cause;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            for origin in self.caught.wait() {
                // What the terminal sends, it sends to the program as well.
                let from_terminal = matches!(origin.signal, SIGINT | SIGQUIT) && origin.cause == Cause::Kernel;
                if origin.signal == SIGCHLD || from_terminal {
                    continue;
                }
                if let (Some(pid), Some(signal)) = (
                    rustix::process::Pid::from_raw(child.id() as i32),
                    rustix::process::Signal::from_named_raw(origin.signal),
                ) {
                    // It may have ended just now.
                    let _ = rustix::process::kill_process(pid, signal);
                }
            }
        }
    }
}

/// The record as a table.
pub(crate) fn summary(r: &Record) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([Cell::new(name), Cell::new(value).set_alignment(CellAlignment::Right)]);
    };
    row("wall time", format!("{:.3} s", r.wall_seconds));
    row("RAM, limit", bytes(r.host.limit_bytes));
    row("RAM, peak", bytes(r.host.peak_bytes));
    row("faults", format!("{}", r.faults.total));
    if r.faults.total > 0 {
        row("  never touched", format!("{}", r.faults.zero_fill));
        row("  from standby", format!("{}", r.faults.standby));
        row("  from a device", format!("{}", r.faults.device));
        row("  huge", format!("{}", r.faults.huge));
        row("  half within", format!("{:.1} us", r.faults.p50_ns as f64 / 1e3));
        row("  99 % within", format!("{:.1} us", r.faults.p99_ns as f64 / 1e3));
        row("brought in", bytes(r.bytes.in_));
        row("written out", bytes(r.bytes.out));
        row("dropped clean", format!("{} pages", r.pages.clean_dropped));
        let thp = &r.folios.thp;
        row("AnonHugePages", bytes(thp.anon_huge_bytes));
        for (name, n) in [
            ("thp_fault_alloc", thp.thp_fault_alloc),
            ("thp_fault_fallback", thp.thp_fault_fallback),
            ("thp_collapse_alloc", thp.thp_collapse_alloc),
            ("thp_collapse_alloc_failed", thp.thp_collapse_alloc_failed),
            ("thp_split_pmd", thp.thp_split_pmd),
            ("thp_split_page", thp.thp_split_page),
            ("thp_split_page_failed", thp.thp_split_page_failed),
            ("thp_deferred_split_page", thp.thp_deferred_split_page),
            ("pgmigrate_success", thp.pgmigrate_success),
            ("pgmigrate_fail", thp.pgmigrate_fail),
        ] {
            row(name, format!("{n}"));
        }
    }
    for d in &r.devices {
        row(&format!("{}, peak", d.name), bytes(d.peak_bytes));
    }
    if r.errors > 0 {
        row("pages lost", format!("{}", r.errors));
    }
    table
}

/// A size for people.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
