//! What the tests of the C library share: compilers, an installed library, and programs that were built against it.

// Each test file is a program of its own, and none uses all of this.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub fn crate_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A directory of the test's own.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the test")
}

/// A program in PATH.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file())
}

/// A compiler that the tests need.
pub fn compiler(name: &str) -> String {
    assert!(tool(name).is_some(), "{name} is not in PATH: install gcc and libc6-dev, or run .ci/run, which does");
    name.into()
}

/// Runs a command that has nothing to complain about.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        out.status.success() && out.stderr.is_empty(),
        "{command:?}: {}\n-- stdout\n{}\n-- stderr\n{}",
        out.status,
        text(&out.stdout),
        text(&out.stderr)
    );
    out
}

/// Where cargo has put the library that this test was built with.
pub fn built() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows where it is");
    test.parent().expect("it is in a directory").into()
}

/// The library, installed by the script that users install it with.
pub fn installed(prefix: &Path) -> PathBuf {
    let script = crate_dir().join("install.sh");
    run(Command::new("sh").arg(script).arg("--prefix").arg(prefix).arg("--from").arg(built()));
    prefix.into()
}
