//! The examples, as programs: they run, and show what they say.

use std::path::PathBuf;
use std::process::Command;

/// Runs an example, which cargo has built with the tests.
fn output_of(name: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let directory: PathBuf = test.parent().and_then(|p| p.parent()).unwrap().join("examples");
    let program = directory.join(name);
    assert!(program.exists(), "{} is missing: run cargo build --examples", program.display());
    let output = Command::new(program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    said
}

/// The numbers in what an example said, in order.
fn numbers(said: &str) -> Vec<u64> {
    said.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

#[test]
fn hello_counts_primes_in_a_quarter_of_the_memory() {
    let said = output_of("hello");
    assert!(said.starts_with("there are 3957809 primes below 67108864"), "{said}");
    let n = numbers(said.lines().nth(1).unwrap());
    assert_eq!(n[0], 64, "{said}");
    assert!(n[1] <= 16, "{said}");
}

#[test]
fn the_device_of_ones_own_has_carried_data_and_is_short() {
    let said = output_of("device");
    assert!(said.starts_with("4194304 squares are what they should be"), "{said}");
    let n = numbers(said.lines().nth(1).unwrap());
    assert!(n[0] > 6000 && n[1] > 6000 && n[2] == 0, "{said}");
    let source = include_str!("../examples/device.rs");
    let device = source.split("/// Shelves with").nth(1).unwrap().split("fn main").next().unwrap();
    assert!(device.lines().count() < 70, "the device has {} lines", device.lines().count());
}
