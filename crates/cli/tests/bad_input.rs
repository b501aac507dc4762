//! What the command refuses, and how: a sentence that says what is wrong and what to do, a status that keeps clear of
//! the program's, and nothing half done. And that the program's own end is passed on.

mod common;

use common::{Ended, Small, compiled, directory, end, peerspace, run};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// `peerspace` with these arguments.
fn given(arguments: &[&str]) -> Ended {
    end(peerspace().args(arguments))
}

#[test]
fn options_that_make_no_sense() {
    for (arguments, words) in [
        (&["run", "--", "true"][..], &["--host"][..]),
        (&["run", "--host", "64M"], &["PROGRAM"]),
        (&["run", "--host", "64M", "--frobnicate", "--", "true"], &["--frobnicate"]),
        (&["run", "--host", "64M", "--faults", "magic", "--", "true"], &["magic", "thread", "signal"]),
        (&["run", "--host", "", "--", "true"], &["--host"]),
        (&["run", "--host", "lots", "--", "true"], &["lots", "256M"]),
        (&["run", "--host", "-5M", "--", "true"], &["-5"]),
        (&["run", "--host", "1.5G", "--", "true"], &["1.5G", "256M"]),
        (&["run", "--host", "0", "--", "true"], &["zero"]),
        (&["run", "--host", "99999999999999999999", "--", "true"], &["99999999999999999999", "more bytes"]),
        (&["run", "--host", "17000000T", "--", "true"], &["17000000T", "more bytes"]),
        // What can be counted, but not be managed.
        (&["run", "--host", "9000000T", "--", "true"], &["--host 9000000T", "2T"]),
        (&["run", "--host", "15M", "--", "true"], &["--host 15M", "16M"]),
        (&["run", "--host", "64M", "--device", "tape", "--", "true"], &["tape", "compressed[:SIZE]"]),
        (&["run", "--host", "64M", "--device", "soft", "--", "true"], &["soft", "soft:1G"]),
        (&["run", "--host", "64M", "--device", "soft:0", "--", "true"], &["soft:0", "zero"]),
        (&["run", "--host", "64M", "--device", "compressed:3X", "--", "true"], &["3X"]),
        (&["run", "--host", "64M", "--device", "file:", "--", "true"], &["file:", "path"]),
        (&["run", "--host", "64M", "--device", "file:/tmp:99999999T", "--", "true"], &["99999999T"]),
        (&["run", "--host", "64M", "--report", "/no/such/place/r", "--", "true"], &["--report", "/no/such/place/r"]),
        (&["run", "--host", "64M", "--report", "/", "--", "true"], &["--report"]),
        (&["fly"], &["fly"]),
        (&[], &["run"]),
    ] {
        let ended = given(arguments).refused(2, words);
        assert!(ended.took.as_secs() < 20, "{ended}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    assert!(given(&["--version"]).well().text().starts_with("peerspace "));
    let help = given(&["run", "--help"]).well().text();
    for word in ["--host", "--device", "--faults", "--report", "--stats", "EFAULT", "125", "126", "127"] {
        assert!(help.contains(word), "{word} is missing in {help}");
    }
}

#[test]
fn programs_that_cannot_be_run() {
    let dir = directory();
    let plain = dir.path().join("plain");
    fs::write(&plain, "#!/bin/sh\nexit 0\n").unwrap();
    let plain = plain.to_str().unwrap();
    let lost = dir.path().join("lost");
    fs::write(&lost, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&lost, fs::Permissions::from_mode(0o755)).unwrap();
    let noise = dir.path().join("noise");
    fs::write(&noise, "nothing that anybody can execute").unwrap();
    fs::set_permissions(&noise, fs::Permissions::from_mode(0o755)).unwrap();
    let report = dir.path().join("report.json");
    for (program, status, words) in [
        ("no-such-program-anywhere", 127, &["no-such-program-anywhere", "PATH"][..]),
        ("/no/such/file", 127, &["/no/such/file"]),
        (lost.to_str().unwrap(), 127, &["/no/such/interpreter"]),
        (plain, 126, &[plain, "permission"]),
        (dir.path().to_str().unwrap(), 126, &["directory"]),
        (noise.to_str().unwrap(), 126, &["noise"]),
    ] {
        let mut command = run(64, &["soft:64M"], "thread");
        end(command.arg("--report").arg(&report).arg("--").arg(program)).refused(status, words);
        assert!(!report.exists(), "a report of a program that did not run");
    }
}

#[test]
fn a_static_program_is_refused_with_the_reason() {
    let program = compiled("ends", "musl-gcc", &["-static"]);
    let mut command = run(64, &["soft:64M"], "thread");
    end(command.arg("--").arg(&program).args(["says", "0", "0"])).refused(126, &["statically linked", "library"]);
    let program = compiled("ends", "gcc", &["-static"]);
    let mut command = run(64, &["soft:64M"], "thread");
    end(command.arg("--").arg(&program).args(["says", "0", "0"])).refused(126, &["statically linked"]);
    // Linked dynamically, but with another C library than ours.
    let program = compiled("ends", "musl-gcc", &[]);
    let mut command = run(64, &["soft:64M"], "thread");
    end(command.arg("--").arg(&program).args(["says", "0", "0"])).refused(126, &["musl"]);
}

#[test]
fn devices_that_cannot_be_had() {
    let program = compiled("ends", "gcc", &[]);
    let program = program.to_str().unwrap();
    let refused = |devices: &[&str], words: &[&str]| {
        let mut command = run(64, devices, "thread");
        end(command.arg("--").arg(program).args(["says", "0", "0"])).refused(125, words);
    };
    refused(&["file:/no/such/directory/at/all"], &["/no/such/directory/at", "no directory"]);
    refused(&["file:/dev/null"], &["/dev/null", "neither"]);
    refused(&["soft:8000T"], &["soft:8000T"]);
    refused(&["compressed:8000T"], &["compressed:8000T"]);
    let dir = directory();
    let foreign = dir.path().join("letter");
    fs::write(&foreign, "Dear all, this is not to be overwritten.").unwrap();
    refused(&[&format!("file:{}", foreign.display())], &["letter", "not touched"]);
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "Dear all, this is not to be overwritten.");
    // A device that could be had is not left behind because of one that could not.
    let fresh = dir.path().join("fresh");
    refused(&[&format!("file:{}", fresh.display()), "file:/no/such/directory/at/all"], &["no directory"]);
    assert!(!fresh.exists(), "a file was left behind");
    if let Some(full) = Small::new("size=1M") {
        fs::write(full.0.path().join("filler"), vec![1; (1 << 20) - 8192]).unwrap();
        refused(&[&full.device()], &["no space"]);
    }
    if let Some(read_only) = Small::new("size=8M,ro") {
        refused(&[&read_only.device()], &["read-only"]);
    }
}

/// Runs the command in other surroundings: see `programs/as_other.c`.
fn surrounded(how: &str, command: &Command) -> Command {
    let mut outer = Command::new(compiled("as_other", "gcc", &[]));
    outer.arg(how).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can become somebody else");
    }
    root
}

/// A place where everybody can read and write, with everything that is needed to run `peerspace` there.
fn public(program: &Path) -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let copy = |from: &Path| {
        let to = dir.path().join(from.file_name().unwrap());
        fs::copy(from, &to).unwrap();
        to
    };
    let (command, program) = (copy(Path::new(env!("CARGO_BIN_EXE_peerspace"))), copy(program));
    (dir, command, program)
}

#[test]
fn a_user_without_permission_is_told_what_to_do() {
    if !root() {
        return;
    }
    let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let public_device = fs::metadata("/dev/userfaultfd").is_ok_and(|m| m.permissions().mode() & 0o006 != 0);
    if unprivileged.trim() != "0" || public_device {
        eprintln!("skipped: every user has the permission here");
        return;
    }
    let (dir, command, program) = public(&compiled("ends", "gcc", &[]));
    let with = |faults: &str| {
        let mut inner = Command::new(&command);
        inner.env("XDG_CACHE_HOME", dir.path().join("cache")).env_remove("LD_PRELOAD");
        inner.args(["run", "--host", "16M", "--device", "soft:128M", "--faults", faults, "--"]);
        inner.arg(&program).args(["says", "0", "48"]);
        let as_other = dir.path().join("as_other");
        fs::copy(compiled("as_other", "gcc", &[]), &as_other).unwrap();
        end(&mut surrounded("user", &inner))
    };
    with("thread").refused(125, &["vm.unprivileged_userfaultfd", "/dev/userfaultfd", "--faults signal"]);
    with("auto").refused(125, &["--faults signal"]);
    // And what it says works.
    assert_eq!(with("signal").well().text(), "ran\n");
}

#[test]
fn a_container_that_forbids_userfaultfd_is_named() {
    let mut command = run(64, &["soft:64M"], "signal");
    command.args(["--", "true"]);
    // The system call is refused; root could open the device instead, which serves all there is.
    if Path::new("/dev/userfaultfd").exists() && rustix::process::geteuid().is_root() {
        end(&mut surrounded("without-userfaultfd", &command)).well();
        return;
    }
    end(&mut surrounded("without-userfaultfd", &command)).refused(125, &["container", "doctor"]);
}

#[test]
fn it_works_on_a_kernel_without_what_is_new() {
    let program = compiled("stress", "gcc", &[]);
    for faults in common::BOTH {
        let mut command = run(24, &["soft:256M"], faults);
        command.arg("--").arg(&program).args(["limit", "64"]);
        let ended = end(&mut surrounded("old-kernel", &command)).well();
        assert_eq!(ended.text(), "limit 64: every byte was right\n");
    }
}

#[test]
fn the_end_of_the_program_is_passed_on() {
    let program = compiled("ends", "gcc", &[]);
    // Without and with management under way.
    for memory in ["0", "48"] {
        for (how, number, status) in [
            ("exit", "0", 0),
            ("exit", "1", 1),
            ("exit", "77", 77),
            ("exit", "255", 255),
            ("signal", "9", 128 + 9),
            ("signal", "11", 128 + 11),
            ("signal", "15", 128 + 15),
            ("signal", "6", 128 + 6),
        ] {
            let dir = directory();
            let report = dir.path().join("report.json");
            let mut command = run(16, &["soft:128M"], "thread");
            command.arg("--report").arg(&report).arg("--").arg(&program).args([how, number, memory]);
            let ended = end(&mut command);
            assert_eq!(ended.code(), status, "{how} {number}: {ended}");
            assert!(ended.stderr.is_empty(), "{ended}");
            // However it ended, there is a report, which says so.
            assert_eq!(common::report(&report)["exit_status"], status, "{how} {number}");
        }
    }
}

#[test]
fn the_command_passes_signals_on() {
    let dir = directory();
    let ready = dir.path().join("ready");
    let mut command = run(64, &["soft:64M"], "thread");
    command.args(["--", "sh", "-c", "trap 'exit 42' TERM; : > \"$0\"; while :; do sleep 0.05; done"]).arg(&ready);
    let running = common::start(&mut command).until(|| ready.exists());
    let pid = rustix::process::Pid::from_raw(running.child.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(running.wait(|_| {}).code(), 42);
}
