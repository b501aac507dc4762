//! The bound as the kernel sees it from outside: what smaps says of the process while it runs, and the peak of a
//! control group; and what is left behind by a process that is killed.

mod common;

use common::{MIB, descendants, kernel_bytes, number, report, run, start, stress};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The budget, in MiB: large enough that what is native between two looks of the keeper is a small part of it.
const HOST: u64 = 64;

/// What a process with a budget of `host` bytes may take up: the budget, and our own 2 % + 16 MiB.
fn allowed(host: u64) -> u64 {
    host + host / 50 + 16 * MIB
}

/// What is in `dir` apart from directories.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("the directory").map(|e| e.expect("an entry").path()).collect()
}

#[test]
fn the_kernel_counts_no_more_than_the_budget_and_our_overhead() {
    let dir = common::directory();
    let device = format!("file:{}", dir.path().display());
    let file = dir.path().join("report.json");
    let mut command = run(HOST, &[&device], "thread");
    command.arg("--report").arg(&file).arg("--").arg(stress()).args(["limit", &(3 * HOST).to_string()]);
    let (mut most, mut looks) = (0, 0);
    let ended = start(&mut command).wait(|pid| {
        let Some(program) = descendants(pid).first().copied() else { return };
        let anonymous = kernel_bytes(format!("/proc/{program}/smaps_rollup"), "Anonymous");
        most = most.max(anonymous.unwrap_or(0));
        looks += 1;
    });
    ended.well();
    eprintln!("{} MiB anonymous at most, in {looks} looks", most / MIB);
    assert!(looks > 20, "it was over before it could be looked at");
    // It did use what it was given.
    assert!(most > HOST * MIB / 2, "{most}");
    assert!(most <= allowed(HOST * MIB), "{} MiB with {HOST} MiB allowed", most / MIB);
    // And the report does not say less than the kernel saw, but for what is our own.
    let peak = number(&report(&file), "/host/peak_bytes");
    assert!(peak <= allowed(HOST * MIB), "{peak}");
    assert!(peak + 16 * MIB + HOST * MIB / 50 >= most, "the report says {peak}, the kernel {most}");
}

/// A control group for memory, removed at the end.
struct Group(PathBuf);

impl Group {
    /// None with the reason printed, where there cannot be one.
    fn new(name: &str) -> Option<Group> {
        let base = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].map(Path::new);
        let has = |dir: &Path| {
            dir.join("memory.usage_in_bytes").exists()
                || fs::read_to_string(dir.join("cgroup.subtree_control")).is_ok_and(|c| c.contains("memory"))
        };
        let Some(base) = base.into_iter().find(|dir| has(dir)) else {
            eprintln!("skipped: there is no memory controller below /sys/fs/cgroup");
            return None;
        };
        let path = base.join(format!("peerspace-{name}-{}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => Some(Group(path)),
            Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                eprintln!("skipped: {} cannot be made: {e}", path.display());
                None
            }
            Err(e) => panic!("{}: {e}", path.display()),
        }
    }

    /// The most memory that was in use, and what the kernel says of its kinds.
    fn peak(&self) -> u64 {
        ["memory.max_usage_in_bytes", "memory.peak"]
            .iter()
            .find_map(|name| fs::read_to_string(self.0.join(name)).ok()?.trim().parse().ok())
            .expect("the group's peak")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} could not be removed", self.0.display());
    }
}

#[test]
fn the_peak_of_a_control_group_is_bounded_with_a_file_device() {
    let Some(group) = Group::new("bound") else { return };
    let dir = common::directory();
    let device = format!("file:{}", dir.path().display());
    // The shell joins the group first, so that everything is counted.
    let mut run = run(HOST, &[&device], "thread");
    run.arg("--").arg(stress()).args(["limit", &(3 * HOST).to_string()]);
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&group.0);
    command.arg(run.get_program()).args(run.get_args()).envs(run.get_envs().filter_map(|(k, v)| Some((k, v?))));
    common::end(&mut command).well();
    let peak = group.peak();
    eprintln!("the group's peak: {} MiB", peak / MIB);
    assert!(peak > HOST * MIB / 2, "{peak}");
    // The command itself, page tables and what the page cache holds of programs and libraries come on top.
    let most = allowed(HOST * MIB) + 48 * MIB;
    assert!(peak <= most, "{} MiB with {} MiB allowed", peak / MIB, most / MIB);
}

#[test]
fn nothing_is_left_of_a_process_that_is_killed() {
    let dir = common::directory();
    let shared = || files_in(Path::new("/dev/shm"));
    let before = shared();
    for (round, faults) in (0..6).zip(common::BOTH.iter().cycle()) {
        let place = dir.path().join(round.to_string());
        fs::create_dir(&place).unwrap();
        let devices = ["compressed:8M".to_string(), format!("file:{}", place.display())];
        let mut command = run(24, &devices.each_ref().map(String::as_str), faults);
        command.env("TMPDIR", &place).arg("--").arg(stress()).args(["hold", "96"]);
        let running = start(&mut command);
        let started = Instant::now();
        // At moments of all kinds: while it starts, fills, evicts, and goes round.
        let moment = Duration::from_millis([3, 40, 90, 150, 400, 900][round]);
        std::thread::sleep(moment.saturating_sub(started.elapsed()));
        let below = descendants(running.child.id());
        let victim = match below.first() {
            // The program itself, or the command: the program must not outlive it.
            Some(program) if round % 3 != 2 => *program,
            _ => running.child.id(),
        };
        let pid = rustix::process::Pid::from_raw(victim as i32).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill it");
        let command_killed = victim == running.child.id();
        let ended = running.wait(|_| {});
        if command_killed {
            assert_eq!(common::signal_of(ended.status), Some(9), "{ended}");
        } else {
            assert_eq!(ended.code(), 128 + 9, "{ended}");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        // A process of that number that still is what it was.
        let alive =
            |pid: u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("hold"));
        while below.iter().any(|pid| alive(*pid)) {
            assert!(Instant::now() < deadline, "the program outlives the command: {below:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(files_in(&place), Vec::<PathBuf>::new(), "round {round}");
    }
    assert_eq!(shared(), before, "something was left in /dev/shm");
}

/// A program that does nothing but fill its heap, as fast as it can, is held to its budget as any other.
#[test]
fn a_heap_that_grows_without_pause_is_bounded() {
    let dir = common::directory();
    let file = dir.path().join("report.json");
    let fill = "pages = [bytearray([n % 251]) * 65536 for n in range(4096)]\n\
                assert all(p[-1] == n % 251 for n, p in enumerate(pages))\n";
    let mut command = run(HOST, &["soft:512M"], "thread");
    command.arg("--report").arg(&file).args(["--", "python3", "-c", fill]);
    common::end(&mut command).well();
    let peak = number(&report(&file), "/host/peak_bytes");
    assert!(peak <= allowed(HOST * MIB), "{} MiB at most, with {HOST} MiB allowed", peak / MIB);
}
