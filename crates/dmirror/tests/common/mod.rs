//! What the tests of the library share: the library itself, built as it is preloaded; programs written in C; and running these
//! with it, with a limit on time.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The library. Cargo builds none for the tests of a package that has nothing else, so it is asked to;
/// `PEERSPACE_DMIRROR_LIBRARY` names one that was built otherwise.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("PEERSPACE_DMIRROR_LIBRARY") {
            return path.into();
        }
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("library");
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--quiet", "--lib", "--manifest-path"]);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).arg("--target-dir").arg(&target);
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        if profile == "release" {
            command.arg("--release");
        }
        // What cargo tells this test about its own build is not meant for another one.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let keep =
                matches!(&*text, "CARGO" | "CARGO_HOME" | "CARGO_NET_OFFLINE") || text.starts_with("CARGO_PROFILE_");
            if text.starts_with("CARGO") && !keep || text.starts_with("RUSTC") {
                command.env_remove(&name);
            }
        }
        assert!(command.status().expect("cargo can be run").success(), "the library cannot be built");
        target.join(profile).join("libpeerspace_dmirror.so")
    })
}

/// Compiles a program of `programs`. Without a compiler the test cannot be made.
fn compile(name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(format!("{name}.c"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]).arg(&program).arg(source);
    assert!(cc.status().expect("a C compiler is needed: install gcc").success(), "{name}.c cannot be compiled");
    program
}

/// Runs a program with the library preloaded. It says by its status whether all is well; what it says otherwise is shown if
/// not. Returns what stands on its standard error: what the library explains.
pub(crate) fn run(name: &str, surroundings: &[(&str, &str)], limit: Duration) -> String {
    let mut command = Command::new(compile(name));
    command.env("LD_PRELOAD", library()).env("PEERSPACE_DMIRROR_EXPLAIN", "1").envs(surroundings.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().expect("the program can be run");
    fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            from.read_to_end(&mut text).expect("read what the program says");
            String::from_utf8_lossy(&text).into_owned()
        })
    }
    let said = [collect(child.stdout.take().expect("piped")), collect(child.stderr.take().expect("piped"))];
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().expect("wait for the program") {
            Some(status) => break Some(status),
            None if begun.elapsed() > limit => {
                // The group, which it leads.
                let _ = Command::new("kill").arg("-KILL").arg("--").arg(format!("-{}", child.id())).status();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let [stdout, stderr] = said.map(|text| text.join().expect("collected"));
    let well = status.is_some_and(|status| status.success());
    assert!(well, "{name} after {:?}: {status:?}\n{stdout}\n{stderr}", begun.elapsed());
    assert!(stdout.contains("\nok 1 "), "{name} has tested nothing:\n{stdout}");
    print!("{stdout}");
    stderr
}
