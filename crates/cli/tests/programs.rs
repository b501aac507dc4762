//! Programs that everybody has, unmodified, with about a quarter of the memory they would use: their output is the same,
//! byte for byte, as when they run by themselves.

mod common;

use common::{Ended, MIB, end, kernel_bytes, number, report, run, start, tool};
use serde_json::Value;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

/// Runs `program` by itself. What it writes, and the most anonymous memory it had.
fn plain(command: &mut Command) -> (Ended, u64) {
    let mut most = 0;
    let ended = start(command).wait(|pid| {
        most = most.max(kernel_bytes(format!("/proc/{pid}/status"), "RssAnon").unwrap_or(0));
    });
    (ended.well(), most)
}

/// Runs `program` in a quarter of the memory it had by itself, and compares. Returns the report.
fn compared(program: &[&str], environment: &[(&str, &str)], devices: &[&str], faults: &str) -> Value {
    let dir = common::directory();
    let mut alone = Command::new(program[0]);
    let (expected, most) = plain(alone.args(&program[1..]).envs(environment.iter().copied()));
    let host = most / MIB / 4;
    assert!(host >= 16, "{program:?} has only {} MiB, of which a quarter is too little to run in", most / MIB);
    let file = dir.path().join("report.json");
    let mut command = run(host, devices, faults);
    command.envs(environment.iter().copied()).arg("--report").arg(&file).arg("--").args(program);
    let ended = end(&mut command).well();
    assert!(ended.stdout == expected.stdout, "the output differs:\n{ended}\nexpected:\n{expected}");
    let report = report(&file);
    eprintln!(
        "{} by {faults}: {host} of {} MiB, {:.1} s instead of {:.1} s, peak {} MiB, {} pages out",
        program[0],
        most / MIB,
        ended.took.as_secs_f64(),
        expected.took.as_secs_f64(),
        number(&report, "/host/peak_bytes") / MIB,
        number(&report, "/pages/out")
    );
    assert!(number(&report, "/pages/out") > 0 && number(&report, "/pages/in") > 0, "{report}");
    assert_eq!(number(&report, "/errors"), 0);
    report
}

/// Lines in no order, of different lengths, all different.
fn write_text(path: &Path, bytes: usize) {
    let mut out = BufWriter::new(fs::File::create(path).unwrap());
    let mut x = 88172645463325252u64;
    let mut written = 0;
    while written < bytes {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let line = format!(
            "{:016x} {:.*}\n",
            x,
            (x % 60) as usize,
            "a line of text that is as long as chance has it, or so"
        );
        out.write_all(line.as_bytes()).unwrap();
        written += line.len();
    }
}

#[test]
fn sort_sorts_a_large_file() {
    tool("sort");
    let dir = common::directory();
    let input = dir.path().join("text");
    write_text(&input, 40 << 20);
    // All in memory, as it would not do by itself with so little. It meets the lines in any order, so this is mostly
    // waiting for single pages: a file of a few hundred MB shows the same, and takes minutes.
    let program = ["sort", "--parallel=2", "-S", "4G", input.to_str().unwrap()];
    compared(&program, &[("LC_ALL", "C")], &["soft:1G"], "thread");
}

const LISTS: &str = r#"
import random, sys, zlib
random.seed(7)
numbers = [random.getrandbits(60) for _ in range(200_000)]
words = {str(n): i for i, n in enumerate(numbers)}
blob = bytearray(24 << 20)
for i in range(0, len(blob), 4096):
    blob[i:i + 8] = (i * 0x9e3779b97f4a7c15 % 2**64).to_bytes(8, 'little')
# Each of these meets memory where chance has it.
for i in random.sample(range(len(numbers)), 20_000):
    assert words[str(numbers[i])] == i
assert list(words.values()) == list(range(len(numbers)))
for i in range(0, len(blob), 4096):
    assert blob[i:i + 8] == (i * 0x9e3779b97f4a7c15 % 2**64).to_bytes(8, 'little'), i
    assert not any(blob[i + 8:i + 4096:512]), i
ordered = sorted(words.items(), key=lambda kv: kv[0][::-1])
print(len(words), zlib.crc32(repr(ordered[::1000]).encode()), zlib.crc32(blob))
"#;

#[test]
fn python_builds_and_checks_lists_dictionaries_and_bytes() {
    tool("python3");
    compared(&["python3", "-c", LISTS], &[("PYTHONHASHSEED", "0")], &["soft:1G"], "thread");
}

const THREADS: &str = r#"
import threading, zlib
results = {}
def work(which):
    kept = [bytes([which]) * 1000 + str(i).encode() for i in range(20_000)]
    for _ in range(2):
        for i, b in enumerate(kept):
            assert b[0] == which and b.endswith(str(i).encode())
    results[which] = zlib.crc32(b''.join(kept))
threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
for t in threads: t.start()
for t in threads: t.join()
print(sorted(results.items()))
"#;

#[test]
fn python_fills_memory_from_threads() {
    tool("python3");
    compared(&["python3", "-c", THREADS], &[], &["compressed:256M"], "thread");
}

#[test]
fn python_does_so_with_the_devices_there_are_without_asking() {
    tool("python3");
    let report = compared(&["python3", "-c", THREADS], &[], &[], "thread");
    let names: Vec<_> = report["devices"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert!(names.len() == 2 && names[0].starts_with("compressed") && names[1].starts_with("file"), "{names:?}");
}

const PROCESSES: &str = r#"
import multiprocessing, os, subprocess, sys, zlib
def work(which):
    assert all(kept[i] == str(i) * 20 for i in range(which, len(kept), 7))
    mine = [str(i) * 30 for i in range(100_000)]
    assert all(mine[i] == str(i) * 30 for i in range(len(mine)))
    return zlib.crc32(''.join(mine[::100]).encode()) + which
kept = [str(i) * 20 for i in range(500_000)]
context = multiprocessing.get_context('fork')
with context.Pool(3) as pool:
    print(pool.map(work, range(6)))
for i in range(3):
    code = "import sys; b = bytearray(40 << 20); b[::4096] = bytes([%d]) * (len(b) // 4096); print(sum(b[::4096]))" % i
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
print(subprocess.run("echo from a shell; exit 3", shell=True, capture_output=True).stdout, flush=True)
pid = os.fork()
if pid == 0:
    assert all(kept[i] == str(i) * 20 for i in range(len(kept)))
    os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert all(kept[i] == str(i) * 20 for i in range(len(kept)))
"#;

#[test]
fn python_forks_and_starts_programs() {
    tool("python3");
    compared(&["python3", "-c", PROCESSES], &[], &["soft:1G"], "thread");
}

#[test]
fn each_process_has_a_report_of_its_own() {
    tool("python3");
    let dir = common::directory();
    let file = dir.path().join("report.json");
    let mut command = run(32, &["soft:512M"], "thread");
    command.arg("--report").arg(&file).args(["--", "python3", "-c", PROCESSES]);
    end(&mut command).well();
    let first = report(&file);
    assert_eq!(number(&first, "/host/limit_bytes"), 32 * MIB);
    let mut others = 0;
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path != file {
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            assert!(name.strip_prefix("report.json.").is_some_and(|pid| pid.parse::<u32>().is_ok()), "{name}");
            let other = report(&path);
            assert_eq!(number(&other, "/host/limit_bytes"), 32 * MIB);
            others += 1;
        }
    }
    // Three that compute, a shell, and one that is forked at the end. The pool's processes are ended by a signal,
    // which leaves no time for a report.
    assert!(others >= 5, "{others}");
}

const QUERIES: &str = "
create table t(id integer primary key, a integer, b text, c blob);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 150000)
  insert into t select i, (i * 7919) % 100003, printf('%08x row %d of the table', i * 2654435761 % 4294967296, i),
                       zeroblob(i % 300) from n;
create index on_a on t(a);
select count(*), sum(a), sum(length(b)), sum(length(c)) from t;
select sum(id * (a % 13)) from t where a between 1000 and 50000;
select b from t order by b limit 3;
select a, count(*) from t group by a having count(*) > 1 order by a limit 5;
update t set a = a + id where id % 3 = 0;
delete from t where id % 5 = 0;
select count(*), sum(a), total(length(b)) from t;
select x.id, y.id from t x join t y on x.a = y.a + 1 order by x.id, y.id limit 5;
pragma integrity_check;
";

#[test]
fn sqlite_answers_queries_on_a_database_in_memory() {
    tool("sqlite3");
    let report = compared(&["sqlite3", ":memory:", QUERIES], &[], &["compressed:256M"], "thread");
    assert!(number(&report, "/devices/0/stores") > 0);
}

#[test]
fn sqlite_does_so_where_faults_come_by_signal() {
    tool("sqlite3");
    compared(&["sqlite3", ":memory:", QUERIES], &[], &["soft:512M"], "signal");
}

#[test]
fn the_command_shows_itself() {
    tool("sort");
    let dir = common::directory();
    let mut command = common::peerspace();
    command.env("TMPDIR", dir.path()).args(["demo", "--size", "16M"]);
    let ended = end(&mut command);
    assert!(ended.status.success(), "{ended}");
    assert!(ended.text().contains("Both outputs are the same, byte for byte."), "{ended}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a file was left behind");
}
