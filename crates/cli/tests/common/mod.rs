//! What the tests of the command line share: running `peerspace`, with a limit on time; programs written in C; and the
//! kernel's own counters of what a process takes up.

// Each test file is a program of its own, and none uses all of this.
#![allow(dead_code, unreachable_pub)]

use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const MIB: u64 = 1 << 20;
/// What a page fault is delivered by.
pub const BOTH: [&str; 2] = ["thread", "signal"];
/// Nothing here should take a tenth of this; what does not end by then hangs.
const LONGEST: Duration = Duration::from_secs(300);

/// A directory of the test's own, on a real file system.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the test")
}

/// The command, with nothing of ours or of the user's in its surroundings.
pub fn peerspace() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peerspace"));
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command.env("LC_ALL", "C").env_remove("PEERSPACE_RUN").env_remove("PEERSPACE_PRELOAD").env_remove("LD_PRELOAD");
    command
}

/// `peerspace run` with a budget, the program to be appended.
pub fn run(host_mib: u64, devices: &[&str], faults: &str) -> Command {
    let mut command = peerspace();
    command.arg("run").arg("--host").arg(format!("{host_mib}M")).args(["--faults", faults]);
    for device in devices {
        command.args(["--device", device]);
    }
    command
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
    pub took: Duration,
}

impl Ended {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("it was ended by a signal: {self}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// It ended with 0 and had nothing to complain about.
    #[track_caller]
    pub fn well(self) -> Ended {
        assert!(self.status.success() && self.stderr.is_empty(), "{self}");
        self
    }

    /// It ended with `status`, and said `words`, all of them, in one line on standard error and nothing else.
    #[track_caller]
    pub fn refused(self, status: i32, words: &[&str]) -> Ended {
        assert_eq!(self.status.code(), Some(status), "{self}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing: {self}");
        }
        assert!(self.stdout.is_empty(), "{self}");
        self
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text();
        let start: String = text.chars().take(2000).collect();
        write!(f, "{} after {:?}\n-- stdout\n{start}\n-- stderr\n{}", self.status, self.took, self.stderr)
    }
}

/// A command that runs, with what it writes being collected.
pub struct Running {
    pub child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    started: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed leaves nothing running: the command and all it started are a group.
        if let Some(group) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Starts `command` in a process group of its own.
pub fn start(command: &mut Command) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).expect("read what the command writes");
            bytes
        })
    }
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    Running { child, stdout, stderr, started: Instant::now() }
}

impl Running {
    /// Waits for the end; `each` is called now and then meanwhile.
    #[track_caller]
    pub fn wait(mut self, mut each: impl FnMut(u32)) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for the command") {
                break status;
            }
            let late = self.started.elapsed() > LONGEST;
            assert!(!late, "it has not ended after {LONGEST:?}:\n{}", self.what_hangs());
            each(self.child.id());
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = self.started.elapsed();
        let text = |handle: Option<JoinHandle<Vec<u8>>>| handle.expect("collected once").join().expect("collected");
        let stdout = text(self.stdout.take());
        let stderr = String::from_utf8_lossy(&text(self.stderr.take())).into_owned();
        Ended { status, stdout, stderr, took }
    }

    /// Waits until `condition` holds; the command is to go on meanwhile.
    #[track_caller]
    pub fn until(mut self, condition: impl Fn() -> bool) -> Running {
        while !condition() {
            if self.child.try_wait().expect("wait for the command").is_some() {
                panic!("it ended before its time: {}", self.wait(|_| {}));
            }
            assert!(self.started.elapsed() < LONGEST, "waited in vain for {LONGEST:?}:\n{}", self.what_hangs());
            std::thread::sleep(Duration::from_millis(1));
        }
        self
    }

    /// What the threads of the command's program wait for.
    fn what_hangs(&self) -> String {
        let mut text = String::new();
        for pid in descendants(self.child.id()) {
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
                text += &format!("{pid} {:?}: {} {}\n", task.file_name(), read("wchan"), read("syscall").trim());
            }
        }
        text
    }
}

/// Runs `command` to its end.
#[track_caller]
pub fn end(command: &mut Command) -> Ended {
    start(command).wait(|_| {})
}

/// The processes below `pid`, itself left out.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(pid) = open.pop() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let children: Vec<u32> = children.split_whitespace().filter_map(|p| p.parse().ok()).collect();
            open.extend(&children);
            found.extend(children);
        }
    }
    found
}

/// A small file system in RAM, unmounted at the end; none with the reason printed where one cannot be mounted.
pub struct Small(pub tempfile::TempDir);

impl Small {
    pub fn new(options: &str) -> Option<Small> {
        let dir = directory();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).output();
        match mounted {
            Ok(o) if o.status.success() => Some(Small(dir)),
            other => {
                eprintln!("skipped: no file system can be mounted here: {other:?}");
                None
            }
        }
    }

    pub fn device(&self) -> String {
        format!("file:{}", self.0.path().display())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|s| s.success()) || std::thread::panicking(), "it is still in use");
    }
}

/// A program that the tests need.
pub fn tool(name: &str) -> PathBuf {
    let package = match name {
        "gcc" => "gcc and libc6-dev",
        "musl-gcc" => "musl-tools",
        other => other,
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file());
    found.unwrap_or_else(|| panic!("{name} is not in PATH: install {package}, or run .ci/run, which does"))
}

/// Compiles `programs/NAME.c`, once for each way of doing it.
pub fn compiled(name: &str, compiler: &str, flags: &[&str]) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name).with_extension("c");
    let text = fs::read(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
    let mut what = text;
    for part in [compiler].iter().chain(flags) {
        what.extend(part.bytes());
    }
    let sum = xxhash_rust::xxh3::xxh3_64(&what);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{sum:016x}"));
    if !path.exists() {
        // Another test program may be doing the same: the file appears whole or not at all.
        let fresh = path.with_extension(std::process::id().to_string());
        let built = Command::new(tool(compiler))
            .args(["-O1", "-g", "-Wall", "-Wextra", "-pthread"])
            .args(flags)
            .arg("-o")
            .arg(&fresh)
            .arg(&source)
            .output();
        let built = built.unwrap_or_else(|e| panic!("{compiler}: {e}"));
        assert!(built.status.success() && built.stderr.is_empty(), "{}", String::from_utf8_lossy(&built.stderr));
        fs::rename(&fresh, &path).expect("keep the program");
    }
    path
}

/// The program that uses memory in every way and checks every byte.
pub fn stress() -> PathBuf {
    compiled("stress", "gcc", &[])
}

/// Reads a report and checks that it has what the contract promises, and that the numbers agree with each other.
#[track_caller]
pub fn report(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    for name in "/exit_status /host/limit_bytes /host/peak_bytes /faults/total /faults/zero_fill /faults/standby \
                 /faults/device /faults/huge /faults/p50_ns /faults/p99_ns /pages/in /pages/out /pages/clean_dropped \
                 /bytes/in /bytes/out /folios/huge_mapped /folios/splits /folios/collapses /errors"
        .split_whitespace()
    {
        assert!(report.pointer(name).is_some_and(Value::is_u64), "{name} is no number in {text}");
    }
    assert!(report["wall_seconds"].as_f64().is_some_and(|s| s > 0.0), "{text}");
    for device in report["devices"].as_array().expect("devices") {
        for name in ["capacity_bytes", "used_bytes", "peak_bytes", "loads", "stores"] {
            assert!(device[name].is_u64(), "{name} is no number in {device}");
        }
        assert!(device["name"].is_string());
        assert!(matches!(device["type"].as_str(), Some("private" | "coherent" | "persistent")), "{device}");
        assert!(number(device, "/used_bytes") <= number(device, "/peak_bytes"), "{device}");
    }
    report
}

/// A number in a report.
#[track_caller]
pub fn number(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} is no number in {report}"))
}

/// Bytes that a line of a file of the kernel's says, in kB.
pub fn kernel_bytes(path: impl AsRef<OsStr>, name: &str) -> Option<u64> {
    let text = fs::read_to_string(Path::new(path.as_ref())).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The number of the signal that ended a command, had a shell run it.
pub fn signal_of(status: ExitStatus) -> Option<i32> {
    status.signal()
}
