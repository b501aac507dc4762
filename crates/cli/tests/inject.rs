//! Devices that fail under a program (rule Z9): exactly what they alone held is lost, and the report says so.

mod common;

use common::*;
use std::process::Command;

/// Fills three times as much as there is RAM for, then reads all of it.
const PROGRAM: &str = "import sys\n\
    pages = [bytearray([n % 251]) * 65536 for n in range(1536)]\n\
    print('filled', flush=True)\n\
    assert all(p.count(n % 251) == 65536 for n, p in enumerate(pages))\n\
    print('read', flush=True)\n";

fn program(command: &mut Command) -> Ended {
    end(command.arg("--").args(["python3", "-c", PROGRAM]))
}

#[test]
fn z9_a_program_is_told_what_a_device_has_lost() {
    for faults in BOTH {
        let dir = directory();
        let report = dir.path().join("report.json");
        let mut command = run(32, &["soft:256M"], faults);
        let ended = program(command.args(["--inject", "1:20000", "--report"]).arg(&report));
        assert_eq!(ended.code(), 128 + 7, "{ended}");
        assert!(!String::from_utf8_lossy(&ended.stdout).contains("read"), "{ended}");
        assert!(ended.stderr.contains("device soft has failed"), "{ended}");
        let report = common::report(&report);
        assert_eq!(number(&report, "/exit_status"), 128 + 7);
        assert!(number(&report, "/errors") >= 1, "{report}");
    }
}

#[test]
fn a_device_that_fails_late_or_beside_another_harms_nobody() {
    // After more than it is used for; and a device that has taken nothing yet.
    for devices in [&["soft:256M"][..], &["soft:256M", "compressed:64M"]] {
        let mut command = run(32, devices, "thread");
        let which = devices.len();
        let after = if which == 1 { 100_000_000 } else { 0 };
        let ended = program(command.arg("--inject").arg(format!("{which}:{after}")));
        assert_eq!(ended.code(), 0, "{ended}");
    }
}

#[test]
fn failures_that_make_no_sense_are_refused() {
    for (failure, words) in
        [("5:7", &["5:7", "1 devices"][..]), ("x", &["NUMBER:PAGES"]), ("0:7", &["such as 1:5000"])]
    {
        let mut command = run(32, &["soft:64M"], "thread");
        end(command.args(["--inject", failure, "--", "true"])).refused(2, words);
    }
}
