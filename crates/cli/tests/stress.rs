//! A C program that uses its memory in every way a program can, with a quarter of what it needs: each byte must be
//! right, in both deliveries of faults. Whether the bound holds is the subject of `bounds.rs`, with budgets that are not
//! the least that works.

mod common;

use common::{BOTH, MIB, number, report, run, stress};

/// A small budget, in MiB. The program uses four times as much.
const HOST: u64 = 20;

fn part(name: &str, devices: &[&str], faults: &[&str]) {
    part_with(HOST, name, devices, faults);
}

fn part_with(host: u64, name: &str, devices: &[&str], faults: &[&str]) {
    let memory = 4 * host;
    for faults in faults {
        let dir = common::directory();
        let file = dir.path().join("report.json");
        let mut command = run(host, devices, faults);
        command.arg("--report").arg(&file).arg("--").arg(stress()).arg(name).arg(memory.to_string());
        let ended = common::end(&mut command).well();
        assert_eq!(ended.text(), format!("{name} {memory}: every byte was right\n"), "{faults}");
        let report = report(&file);
        eprintln!("{name} by {faults}: {:?}, peak {} MiB", ended.took, number(&report, "/host/peak_bytes") / MIB);
        assert_eq!(number(&report, "/exit_status"), 0);
        assert_eq!(number(&report, "/errors"), 0);
        assert!(number(&report, "/pages/out") > 0, "nothing left RAM, so nothing was shown: {report}");
        assert!(number(&report, "/pages/in") > 0, "nothing came back: {report}");
    }
}

#[test]
fn malloc_realloc_and_free_at_random_in_threads() {
    part("heap", &["soft:1G"], &BOTH);
}

#[test]
fn mappings_are_made_moved_changed_and_removed_in_threads() {
    part("maps", &["soft:1G"], &BOTH);
}

/// Registration may leave two mappings where the program knows one. The kernel moves no two; under management it works.
#[test]
fn what_was_cut_can_be_moved_as_one() {
    let alone = common::end(std::process::Command::new(stress()).args(["remap", "1"]));
    assert_eq!((alone.status.code(), alone.text().as_str()), (Some(1), ""), "else this shows nothing");
    for faults in BOTH {
        let mut command = run(HOST, &["soft:64M"], faults);
        let ended = common::end(command.arg("--").arg(stress()).args(["remap", "1"])).well();
        assert_eq!(ended.text(), "remap 1: every byte was right\n", "{faults}");
    }
}

#[test]
fn forked_processes_keep_all_data_and_share_none() {
    part("forks", &["soft:1G"], &BOTH);
}

#[test]
fn forked_processes_keep_what_is_compressed() {
    part("forks", &["compressed:512M"], &["thread"]);
}

#[test]
fn forked_processes_keep_what_is_in_a_file() {
    let dir = common::directory();
    part_with(16, "forks", &[&format!("file:{}", dir.path().display())], &["thread"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a file was left behind");
}

#[test]
fn a_program_may_close_every_descriptor_it_did_not_open() {
    let dir = common::directory();
    part("closes", &[&format!("file:{}", dir.path().display())], &BOTH);
}

#[test]
fn threads_may_begin_and_end_at_any_time() {
    part("exits", &["soft:1G"], &BOTH);
}

#[test]
fn handlers_of_the_program_see_its_own_faults_and_none_but_those() {
    part("handlers", &["soft:1G"], &BOTH);
}

#[test]
fn memory_that_is_away_can_be_handed_to_the_kernel() {
    part("calls", &["soft:1G"], &BOTH);
}

#[test]
fn memory_that_is_read_only_stays_right() {
    part("limit", &["soft:1G"], &BOTH);
}
