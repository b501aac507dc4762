//! The library as programs in C have it: installed by its script, found by pkg-config, and put through tests in C.

mod common;

use common::{compiler, crate_dir, directory, installed, run, tool};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The flags that pkg-config gives for an installed library; where there is no pkg-config, by what its file says.
fn flags(prefix: &Path, extra: &[&str]) -> Vec<OsString> {
    let file = prefix.join("lib/pkgconfig/peerspace.pc");
    let text = std::fs::read_to_string(&file).expect("peerspace.pc");
    assert!(!text.contains('@'), "something was left open:\n{text}");
    let words = |text: &str| text.split_whitespace().map(OsString::from).collect();
    if tool("pkg-config").is_some() {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", file.parent().expect("a directory")).args(["--cflags", "--libs"]).args(extra);
        let out = run(command.arg("peerspace"));
        return words(&String::from_utf8(out.stdout).expect("flags"));
    }
    eprintln!("there is no pkg-config here: its file is read as it would (.ci/run installs it)");
    let line = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).to_owned()
    };
    let mut all = format!("{} {}", line("Cflags"), line("Libs"));
    if extra.contains(&"--static") {
        all += &format!(" {}", line("Libs.private"));
    }
    let prefix = prefix.display().to_string();
    words(
        &all.replace("${includedir}", "${prefix}/include")
            .replace("${libdir}", "${prefix}/lib")
            .replace("${prefix}", &prefix),
    )
}

const STRICT: [&str; 8] = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic"];

/// The library, installed once for all tests of this file.
fn library() -> &'static Path {
    static AT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, at) = AT.get_or_init(|| {
        let dir = directory();
        let at = installed(&dir.path().join("usr"));
        (dir, at)
    });
    at
}

/// Builds a program against the installed library.
fn build(sources: &[PathBuf], to: &Path) {
    let mut command = Command::new(compiler("cc"));
    command.args(STRICT).args(["-pthread", "-o"]).arg(to).args(sources).args(flags(library(), &[]));
    run(&mut command);
}

#[test]
fn what_is_installed_is_what_packages_expect() {
    let lib = library().join("lib");
    let version = env!("CARGO_PKG_VERSION");
    assert!(lib.join(format!("libpeerspace.so.{version}")).is_file());
    assert!(lib.join("libpeerspace.a").is_file());
    for (link, to) in
        [("libpeerspace.so", "libpeerspace.so.0".into()), ("libpeerspace.so.0", format!("libpeerspace.so.{version}"))]
    {
        assert_eq!(std::fs::read_link(lib.join(link)).expect(link), Path::new(&to));
    }
    assert!(library().join("include/peerspace.h").is_file());
    // Into a directory of its own, for one that is used later.
    let (dest, script) = (directory(), crate_dir().join("install.sh"));
    let mut command = Command::new("sh");
    command.arg(&script).args(["--prefix", "/opt/x", "--libdir", "/opt/x/lib64", "--destdir"]).arg(dest.path());
    run(command.arg("--from").arg(common::built()));
    let text = std::fs::read_to_string(dest.path().join("opt/x/lib64/pkgconfig/peerspace.pc")).expect("peerspace.pc");
    assert!(
        text.contains("prefix=/opt/x\nlibdir=/opt/x/lib64\n") && text.contains(&format!("Version: {version}\n")),
        "{text}"
    );
    // Bad options change nothing.
    for bad in
        [&["--prefix"][..], &["--prefix", "not/absolute"], &["--what"], &["--from", "/nowhere", "--prefix", "/opt"]]
    {
        let out = Command::new("sh").arg(&script).args(bad).output().expect("run sh");
        assert!(!out.status.success() && out.stderr.starts_with(b"install.sh: "), "{bad:?}: {out:?}");
    }
}

#[test]
fn a_program_finds_it_by_pkg_config_shared_and_static() {
    let dir = directory();
    let example = crate_dir().join("examples/device.c");
    let says = |program: &Path, with: Option<&Path>| {
        let mut command = Command::new(program);
        if let Some(lib) = with {
            command.env("LD_LIBRARY_PATH", lib);
        }
        String::from_utf8(run(&mut command).stdout).expect("text")
    };
    let shared = dir.path().join("shared");
    build(std::slice::from_ref(&example), &shared);
    let text = says(&shared, Some(&library().join("lib")));
    assert!(text.contains("0 words are wrong") && text.contains("48 MiB in at most 8 MiB"), "{text}");
    // Without the shared library, the static one is what is there.
    let alone = dir.path().join("usr/lib");
    std::fs::create_dir_all(&alone).expect("a directory");
    std::fs::copy(library().join("lib/libpeerspace.a"), alone.join("libpeerspace.a")).expect("copy");
    let stat = dir.path().join("static");
    let flags: Vec<OsString> = flags(library(), &["--static"])
        .into_iter()
        .map(|f| if f.to_string_lossy().starts_with("-L") { format!("-L{}", alone.display()).into() } else { f })
        .collect();
    run(Command::new(compiler("cc")).args(STRICT).arg("-o").arg(&stat).arg(&example).args(flags));
    assert!(says(&stat, None).contains("0 words are wrong"));
}

#[test]
fn the_example_is_as_short_as_it_is_said_to_be() {
    let text = std::fs::read_to_string(crate_dir().join("examples/device.c")).expect("the example");
    let device =
        text.split("/* The device begins here. */").nth(1).and_then(|t| t.split("/* The device ends here.").next());
    let lines =
        device.expect("marks").lines().filter(|l| !l.trim().is_empty() && !l.trim().starts_with("/*")).count();
    assert!(lines < 70, "rule G15: {lines} lines");
}

/// Runs the tests in C with one delivery of faults, and takes their word for what went wrong.
fn tests_in_c(faults: &str) {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let dir = directory();
        let program = dir.path().join("tests");
        let sources = ["main", "chip", "spaces", "devices", "mmus", "hostile"];
        build(&sources.map(|name| crate_dir().join("tests/c").join(name).with_extension("c")), &program);
        (dir, program)
    });
    let mut child = Command::new(program)
        .env("PEERSPACE_TEST_FAULTS", faults)
        .env("LD_LIBRARY_PATH", library().join("lib"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run the tests");
    let stdout = child.stdout.take().expect("a pipe");
    let reader = std::thread::spawn(move || std::io::read_to_string(stdout).expect("read what the tests say"));
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait for the tests") {
            break status;
        }
        if begin.elapsed() > Duration::from_secs(900) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = reader.join().expect("the reader");
    println!("{text}");
    let ran = text.lines().filter(|l| l.starts_with("ok ")).count();
    let skipped = text.lines().filter(|l| l.starts_with("ok ") && l.ends_with("# SKIP")).count();
    assert!(status.success() && text.contains(&format!("1..{ran}\n")), "{status}\n{text}");
    assert!(ran > 50, "only {ran} tests ran\n{text}");
    if skipped > 0 {
        eprintln!("{skipped} of {ran} tests with faults by {faults} were skipped:\n{text}");
    }
}

#[test]
fn tests_in_c_with_faults_by_signal() {
    tests_in_c("signal");
}

#[test]
fn tests_in_c_with_faults_by_threads() {
    tests_in_c("thread");
}
