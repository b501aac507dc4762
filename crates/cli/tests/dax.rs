//! Memory that the CPU addresses in place, as a place for what does not fit into RAM (`--device dax`).

mod common;

use common::*;

/// Fills four times as much as there is RAM for; forks when half of it is away, and both read all of it.
const PROGRAM: &str = "import os\n\
    pages = [bytearray([n % 251]) * 65536 for n in range(2048)]\n\
    whole = lambda: all(p.count(n % 251) == 65536 for n, p in enumerate(pages))\n\
    pid = os.fork()\n\
    if pid == 0:\n\
    \x20   pages[5][7] = 1 + pages[5][7] % 7\n\
    \x20   os._exit(0 if pages[6].count(6) == 65536 and all(p.count(n % 251) >= 65535 for n, p in enumerate(pages)) else 3)\n\
    assert os.waitpid(pid, 0)[1] == 0\n\
    assert whole()\n\
    print('read', flush=True)\n";

#[test]
fn g12_what_does_not_fit_goes_to_memory_in_place_and_survives_a_fork() {
    for (faults, named) in [("thread", false), ("signal", true)] {
        let dir = directory();
        let report = dir.path().join("report.json");
        let device = if named { format!("dax:{}:256M", dir.path().join("far").display()) } else { "dax:256M".into() };
        let mut command = run(32, &[&device, "compressed:64M"], faults);
        let ended = end(command.arg("--report").arg(&report).arg("--").args(["python3", "-c", PROGRAM])).well();
        assert_eq!(ended.text(), "read\n");
        let report = common::report(&report);
        assert_eq!((number(&report, "/exit_status"), number(&report, "/errors")), (0, 0));
        assert_eq!(report.pointer("/devices/0/type").and_then(|t| t.as_str()), Some("coherent"), "{report}");
        let [stores, loads] = ["stores", "loads"].map(|what| number(&report, &format!("/devices/0/{what}")));
        assert!(stores > 5_000 && loads > 5_000, "{report}");
    }
}

#[test]
fn what_is_no_such_memory_is_refused() {
    let dir = directory();
    let file = dir.path().join("mine");
    std::fs::write(&file, vec![7; 4 << 20]).unwrap();
    let mine = format!("dax:{}", file.display());
    let none = format!("dax:{}", dir.path().join("none").display());
    for (device, status, words) in [
        (&*mine, 125, &["mine", "not touched"][..]),
        (&none, 125, &["none", "no size"]),
        ("dax:/dev/null:1G", 125, &["/dev/null", "device node"]),
        ("dax:1M", 125, &["too few"]),
        ("dax:", 2, &["dax:1G", "/dev/dax0.0"]),
    ] {
        let mut command = run(32, &[device], "thread");
        end(command.args(["--", "true"])).refused(status, words);
    }
    // One file is one device.
    let twice = format!("dax:{}:64M", dir.path().join("twice").display());
    end(run(32, &[&twice, &twice], "thread").args(["--", "true"])).refused(125, &["twice", "in use"]);
    assert!(!dir.path().join("twice").exists());
    assert!(std::fs::read(&file).unwrap().iter().all(|b| *b == 7));
    assert!(!dir.path().join("none").exists());
}
