//! Tests that need a process of their own: what others map beside them, or a fork by one of them, would change what they see.

use std::process::Command;
use std::thread;

/// Set for a test that has its process to itself.
const ALONE: &str = "PEERSPACE_TEST_ALONE";

/// Runs `test`, which is all of the test that calls this, in a process in which no other runs.
pub(crate) fn alone(test: impl FnOnce()) {
    let thread = thread::current();
    // The harness calls each test's thread by its name. Without threads of its own it runs one test at a time.
    let name = thread.name().filter(|name| *name != "main");
    let (Some(name), None) = (name, std::env::var_os(ALONE)) else { return test() };
    let mut again = Command::new(std::env::current_exe().expect("the name of this program"));
    let done = again.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().expect("run the test alone");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && said.contains("1 passed"), "{name}, alone: {}\n{said}", done.status);
}

#[test]
fn a_test_that_is_alone_can_fail() {
    let failed = std::panic::catch_unwind(|| {
        alone(|| {
            // Seen by the other process only.
            assert!(std::env::var_os(ALONE).is_none(), "on purpose");
        })
    });
    if std::env::var_os(ALONE).is_some() {
        failed.unwrap();
    } else if thread::current().name() != Some("main") {
        let why = failed.unwrap_err();
        assert!(why.downcast_ref::<String>().unwrap().contains("on purpose"));
    }
}
