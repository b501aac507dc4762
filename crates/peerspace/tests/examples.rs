//! The examples, as programs: they run, and show what they say.

mod common;

use std::process::Command;

/// Runs an example.
fn output_of(name: &str) -> String {
    output_with(name, &[])
}

/// The same, with arguments.
fn output_with(name: &str, arguments: &[&std::ffi::OsStr]) -> String {
    let output = Command::new(common::example(name)).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    said
}

/// The numbers in what an example said, in order.
fn numbers(said: &str) -> Vec<u64> {
    said.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

#[test]
fn hello_has_a_vector_four_times_as_large_as_its_memory() {
    let said = output_of("hello");
    assert!(said.starts_with("4194304 sums up to 1395913017664"), "{said}");
    let n = numbers(said.lines().nth(1).unwrap());
    assert_eq!(n[0], 32, "{said}");
    assert!(n[1] <= 8, "{said}");
}

#[test]
fn the_device_of_ones_own_has_carried_data_and_is_short() {
    let said = output_of("device");
    assert!(said.starts_with("4194304 squares are what they should be"), "{said}");
    let n = numbers(said.lines().nth(1).unwrap());
    assert!(n[0] > 6000 && n[1] > 6000 && n[2] == 0, "{said}");
    let source = include_str!("../examples/device.rs");
    let device = source.split("/// Pages with").nth(1).unwrap().split("fn main").next().unwrap();
    assert!(device.lines().count() < 70, "the device has {} lines", device.lines().count());
}

/// Rule G15: a useful device is under 70 lines, its MMU functions apart. Rule G1: it uses the program's own pointers.
#[test]
fn g15_a_device_that_runs_code_is_short() {
    let said = output_of("accelerator");
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("the device has summed up 524288 numbers of the CPU's: 137438691328"), "{said}");
    assert_eq!(lines.next(), Some("the CPU finds every one of them doubled"), "{said}");
    // 1024 pages went through the 256 that it has, and none was lost.
    let [_, moved, evicted, lost] = numbers(lines.next().unwrap())[..] else { panic!("{said}") };
    assert!(moved >= 1024 && evicted >= 1024 - 256 && lost == 0, "{said}");
    let source = include_str!("../examples/accelerator.rs");
    let device = source.split("// The device begins here.\n").nth(1).unwrap();
    let (device, mmu) = device.split_once("// The device ends here.").unwrap();
    assert!(device.contains("impl Device for Chip") && mmu.contains("impl Mmu for Chip"));
    assert!(device.lines().count() < 70, "the device has {} lines", device.lines().count());
}

/// Rules G1, G7 and G14, by two devices of unequal sizes at once.
#[test]
fn g1_two_devices_search_a_graph_that_the_cpu_has_built() {
    let said = output_with("bfs", &["--vertices".as_ref(), "20000".as_ref()]);
    assert!(said.starts_with("20000 vertices, 89477 edges\n19772 reached in 15 levels\n"), "{said}");
    assert!(said.contains("the CPU's own search says the same\n"), "{said}");
    for device in ["large", "small"] {
        let line = said.lines().find(|line| line.starts_with(device)).unwrap();
        let [memory, faults, moved, replicated, _, evicted, link] = numbers(line)[..] else { panic!("{said}") };
        assert!(faults > 0 && moved > 0 && replicated > 0 && evicted > 0, "{said}");
        // More went there than there is room for.
        assert!(link > memory, "{said}");
    }
}

/// Rules G4, G7 and G8: by launches, by faults, and with hints.
#[test]
fn g8_a_join_that_fits_nowhere() {
    let said = output_with("hash_join", &["--rows".as_ref(), "262144".as_ref()]);
    assert!(said.ends_with("the CPU's own join says the same each time\n"), "{said}");
    let row = |way: &str| {
        let line = said.lines().find(|line| line.starts_with(way)).unwrap();
        let cells: Vec<&str> = line[way.len()..].split_whitespace().collect();
        let [matches, _seconds, faults, to, _back, in_place] = cells[..] else { panic!("{said}") };
        [matches, faults, to, in_place].map(|cell| cell.parse::<u64>().unwrap())
    };
    let ([pieces, faults, hints], [matches, ..]) =
        (["in pieces", "by faults", "with hints"].map(row), row("in pieces"));
    assert!(matches > 30_000 && [pieces, faults, hints].iter().all(|row| row[0] == matches), "{said}");
    // What cannot fault does not, and what can does. Both tables went there, and results were written in place where a hint
    // said so.
    assert!(pieces[1] == 0 && faults[1] > 0 && hints[1] > 0, "{said}");
    assert!([pieces, faults, hints].iter().all(|row| row[2] >= 10), "{said}");
    assert!(pieces[3] == 0 && hints[3] >= (matches * 8) >> 10, "{said}");
}

#[test]
fn the_persistent_region_goes_on_counting() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("counter");
    for run in 1..4 {
        let said = output_with("persistent", &[path.as_os_str()]);
        assert!(said.starts_with(&format!("this is run number {run}; the region \"counter\"")), "{said}");
    }
}
