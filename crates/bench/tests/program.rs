//! The program as scripts see it: results that parse, exit statuses, and nothing left behind.
//!
//! These runs are too small to compare anything; they take the ways of the real ones. What this machine or this user
//! does not have is skipped by the program itself, with a reason.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Held by tests that set up swap, or look at what swap there is.
static SWAP: Mutex<()> = Mutex::new(());

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peerspace-bench"));
    command.args(args);
    command
}

fn run(args: &[&str]) -> Output {
    bench(args).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn array<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().unwrap_or_else(|| panic!("{field} is no list in {value}"))
}

fn check_spread(value: &Value, rounds: usize) {
    let number = |field: &str| value[field].as_f64().unwrap_or_else(|| panic!("no {field} in {value}"));
    let samples: Vec<f64> = array(value, "samples").iter().map(|s| s.as_f64().expect("a number")).collect();
    assert_eq!(samples.len(), rounds, "{value}");
    assert!(number("min") <= number("median") && number("median") <= number("max"), "{value}");
    assert!(samples.iter().all(|s| s.is_finite() && *s >= number("min") && *s <= number("max")), "{value}");
}

#[test]
fn results_parse_and_say_what_they_should() {
    let _swap = SWAP.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let (json, svg) = (dir.path().join("results.json"), dir.path().join("results.svg"));
    let out = bench(&["--quick", "--rounds", "3", "fault", "sequential", "random-file", "metadata", "--dir"])
        .arg(dir.path())
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .output()
        .unwrap();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{}\n{stdout}\n{stderr}", out.status);

    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((&report["schema"], &report["quick"]), (&Value::from(1), &Value::from(true)));
    assert!(report["machine"]["processors"].as_u64().unwrap() > 0);
    let names: Vec<_> = array(&report, "benchmarks").iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["fault", "sequential", "random-file", "metadata"]);
    let mut compared = 0;
    for benchmark in array(&report, "benchmarks") {
        assert_eq!(benchmark["rounds"], 3);
        for contender in array(benchmark, "contenders") {
            assert!(contender["failed"].is_null(), "{contender}");
            let skipped = contender["skipped"].is_string();
            assert_eq!(array(contender, "metrics").is_empty(), skipped, "{contender}");
            array(contender, "metrics").iter().for_each(|m| check_spread(m, 3));
            if !skipped && contender["id"] != "empty" {
                assert!(contender["verified_words"].as_u64().unwrap() > 0, "{contender}");
            }
            assert!(stdout.contains(contender["id"].as_str().unwrap()), "{stdout}");
        }
        for ratio in array(benchmark, "ratios") {
            check_spread(ratio, 3);
            assert!(ratio["min"].as_f64().unwrap() > 0.0, "{ratio}");
            compared += 1;
        }
        for value in array(benchmark, "values") {
            check_spread(value, 3);
            assert!(value["target"]["met"].is_boolean(), "{value}");
        }
    }
    // Whatever a machine lacks, start-up can be measured.
    assert!(compared > 0);

    let svg = fs::read_to_string(&svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("metadata") && svg.trim_end().ends_with("</svg>"));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "more than the results is left: {left:?}");
}

/// Rules G8, G9, G10: what has to go over a link does, and no more, whatever the machine is like. The times of such a run
/// say nothing.
#[test]
fn g8_g10_what_accelerators_move_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("results.json");
    let out = bench(&["--quick", "--rounds", "1", "migrate", "device-fault", "prefetch", "link-bytes"])
        .args(["--link-bandwidth", "4000000000", "--link-latency", "20", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{}\n{stdout}\n{stderr}", out.status);
    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    for benchmark in array(&report, "benchmarks") {
        for contender in array(benchmark, "contenders") {
            assert!(contender["failed"].is_null() && contender["skipped"].is_null(), "{contender}");
            assert!(contender["verified_words"].as_u64().unwrap() > 0, "{contender}");
            array(contender, "metrics").iter().for_each(|m| check_spread(m, 1));
        }
    }
    let about = |i: usize| report["benchmarks"][i]["about"].as_str().unwrap();
    for i in [2, 3] {
        assert!(about(i).contains("4.0 GB/s and 20 us"), "{}", about(i));
    }
    let measured = |benchmark: usize, id: &str, metric: &str| {
        let contenders = array(&report["benchmarks"][benchmark], "contenders");
        let contender = contenders.iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no {id}"));
        let found = array(contender, "metrics").iter().find(|m| m["metric"] == metric);
        found.unwrap_or_else(|| panic!("no {metric} in {contender}"))["median"].as_f64().unwrap()
    };
    let of = |id, metric| measured(3, id, metric);
    assert_eq!(of("sparse, hint", "by_asked"), 1.0);
    assert_eq!(of("replicated", "by_reader"), 1.0);
    assert_eq!((of("stream, hint", "by_asked"), of("stream", "by_asked")), (1.0, 1.0));
    assert!(of("ping-pong", "by_turns") <= 0.1);
    assert!(of("read-mostly, hint", "over_link") < of("read-mostly", "over_link"));
    // In milliseconds: nothing comes faster than the link lets it.
    let least = (2 << 20) as f64 / 4e9 * 1e3 + 0.02;
    let blocks =
        (report["benchmarks"][2]["contenders"][0]["data_bytes"].as_f64().unwrap() / (2 << 20) as f64).floor();
    assert!(measured(2, "ours", "on_demand") >= blocks * least, "{blocks} blocks");
    assert_eq!(array(&report["benchmarks"][3], "values").iter().filter(|v| v["target"]["met"] == true).count(), 4);
    for bad in [&["--link-bandwidth", "0"][..], &["--link-bandwidth", "fast"], &["--link-latency", "2000000"]] {
        let out = run(&[bad, &["prefetch"]].concat());
        assert_eq!(out.status.code(), Some(2), "{bad:?}: {}", text(&out.stderr));
    }
}

#[test]
fn a_command_line_that_means_nothing_is_a_usage_error() {
    for args in [&["no-such-benchmark"][..], &["--rounds", "0"], &["--no-such-option"]] {
        let out = run(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", text(&out.stderr));
        assert!(out.stdout.is_empty());
    }
}

#[test]
fn what_there_is_can_be_listed() {
    let out = run(&["--list"]);
    assert!(out.status.success());
    let list = text(&out.stdout);
    for name in
        ["fault", "sequential", "sequential-compressed", "random-compressed", "random-file", "metadata", "link-bytes"]
    {
        assert!(list.lines().any(|l| l.starts_with(&format!("{name}: "))), "{name} in {list}");
    }
    assert!(text(&run(&["--list", "fault"]).stdout).lines().filter(|l| !l.starts_with(' ')).count() == 1);
}

#[test]
fn results_that_cannot_be_written_fail_the_run() {
    let out = run(&["--quick", "--rounds", "1", "metadata", "--json", "/no/such/directory/results.json"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("/no/such/directory"), "{}", text(&out.stderr));
}

/// What a steward holds, found by its process id.
struct Held {
    pid: u32,
}

impl Held {
    /// The steward of `parent`, once it holds a cgroup.
    fn by(parent: u32, patience: Duration) -> Option<Held> {
        let start = Instant::now();
        while start.elapsed() < patience {
            let steward = processes().find(|(_, ppid, args)| *ppid == parent && args.contains("--steward"));
            if let Some((pid, ..)) = steward {
                let held = Held { pid };
                if !held.cgroups().is_empty() {
                    return Some(held);
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    fn cgroups(&self) -> Vec<String> {
        let name = format!("peerspace-bench-{}-", self.pid);
        ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"]
            .iter()
            .filter_map(|root| fs::read_dir(root).ok())
            .flatten()
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.starts_with(&name))
            .collect()
    }

    fn is_gone(&self) -> bool {
        !Path::new(&format!("/proc/{}", self.pid)).exists()
    }
}

/// Process, its parent, its arguments.
fn processes() -> impl Iterator<Item = (u32, u32, String)> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        let args = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        Some((pid, parent, args))
    })
}

/// Swap devices and zram devices.
fn system() -> (String, Vec<String>) {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let devices =
        fs::read_dir("/sys/block").into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok());
    (swaps, devices.filter(|n| n.starts_with("zram")).collect())
}

#[test]
fn nothing_is_left_however_it_ends() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root gets swap and a memory cgroup");
        return;
    }
    let _swap = SWAP.lock().unwrap_or_else(PoisonError::into_inner);
    let before = system();
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM, rustix::process::Signal::KILL] {
        let mut child = bench(&["--quick", "--rounds", "1000", "sequential"])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let Some(held) = Held::by(child.id(), Duration::from_secs(20)) else {
            child.kill().unwrap();
            child.wait().unwrap();
            eprintln!("skipped: there is no zram, or no memory controller");
            return;
        };
        // Somewhere in the middle.
        std::thread::sleep(Duration::from_millis(1500));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        let status = child.wait().unwrap();
        let killed = signal == rustix::process::Signal::KILL;
        assert_eq!(status.code(), if killed { None } else { Some(130) }, "{status}");
        let start = Instant::now();
        while !held.is_gone() && killed && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(held.is_gone(), "the steward goes on after {signal:?}");
        assert_eq!(held.cgroups(), Vec::<String>::new(), "after {signal:?}");
        assert_eq!(system(), before, "after {signal:?}");
    }
}
