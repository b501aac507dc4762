//! What can go wrong while a program runs: devices that fill up in the midst of eviction, and devices that the program's
//! children would share.

mod common;

use common::{MIB, Small, end, number, report, run, stress};
use std::fs;

#[test]
fn what_a_full_device_has_no_room_for_goes_to_the_next_one() {
    let Some(small) = Small::new("size=16M") else { return };
    // More than the file system has room for, which shows in the midst of it.
    let file = format!("{}:256M", small.device());
    let dir = common::directory();
    let path = dir.path().join("report.json");
    for faults in common::BOTH {
        let mut command = run(24, &[&file, "soft:256M"], faults);
        command.arg("--report").arg(&path).arg("--").arg(stress()).args(["limit", "96"]);
        assert_eq!(end(&mut command).well().text(), "limit 96: every byte was right\n");
        let report = report(&path);
        assert!(number(&report, "/devices/0/stores") > 0, "{report}");
        assert!(number(&report, "/devices/1/stores") > 0, "{report}");
        assert!(number(&report, "/devices/0/peak_bytes") <= 256 * MIB);
        assert_eq!(number(&report, "/errors"), 0);
    }
}

#[test]
fn where_no_device_has_room_the_bound_gives_way_and_no_data() {
    let Some(small) = Small::new("size=16M") else { return };
    let file = format!("{}:256M", small.device());
    let mut command = run(24, &[&file], "thread");
    let ended = end(command.arg("--").arg(stress()).args(["limit", "64"]));
    assert_eq!((ended.code(), ended.text().as_str()), (0, "limit 64: every byte was right\n"), "{ended}");
    // Once, and not for every page.
    assert_eq!(ended.stderr.matches("no device has room").count(), 1, "{ended}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
}

#[test]
fn a_named_file_is_the_first_process_s_and_children_have_one_beside_it() {
    let dir = common::directory();
    let named = dir.path().join("pages");
    // The program and what it starts are all too large for their budgets, at the same time.
    let script = "\"$0\" hold 64 > \"$1\" & sleep 0.01; while [ ! -s \"$1\" ]; do sleep 0.02; done; \"$0\" forks 64 && kill $!";
    let output = dir.path().join("output");
    let mut command = run(16, &[&format!("file:{}", named.display())], "thread");
    command.args(["--", "sh", "-c", script]).arg(stress()).arg(&output);
    let ended = end(&mut command).well();
    assert_eq!(ended.text(), "forks 64: every byte was right\n");
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    // The named file was made when it was tried out at the start, and is left for the next run.
    assert!(names.iter().all(|n| n == "pages" || n == "output"), "{names:?}");
}

#[test]
fn a_named_file_serves_one_run_after_the_other() {
    let dir = common::directory();
    let named = dir.path().join("pages");
    let device = format!("file:{}:256M", named.display());
    for _ in 0..2 {
        let mut command = run(24, &[&device], "thread");
        end(command.arg("--").arg(stress()).args(["limit", "64"])).well();
        assert!(named.exists());
    }
    // And not two at once, from before the program starts.
    let mut first = run(24, &[&device], "thread");
    let started = dir.path().join("started");
    first.args(["--", "sh", "-c", ": > \"$1\"; exec \"$0\" hold 64"]).arg(stress()).arg(&started);
    let running = common::start(&mut first).until(|| started.exists());
    // Whether the first one needs its file already or not.
    for _ in 0..3 {
        let mut second = run(24, &[&device], "thread");
        let ended = end(second.arg("--").arg(stress()).args(["limit", "64"]));
        ended.refused(125, &["in use by another process", "pages"]);
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    drop(running);
}
