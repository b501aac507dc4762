//! The header is what the source says, and both C and C++ compilers take it without a word.

mod common;

use common::{compiler, crate_dir, directory, run};
use std::path::PathBuf;
use std::process::Command;

/// The header that the source makes.
fn generated() -> String {
    let source = crate_dir().join("src");
    let config = cbindgen::Config::from_file(crate_dir().join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    // In the order of the modules, which is the order of the header.
    let modules = [
        "library",
        "error",
        "space",
        "statistics",
        "region",
        "adopted",
        "memory",
        "device",
        "mmu",
        "launch",
        "persistent",
    ];
    for module in modules {
        builder = builder.with_src(source.join(module).with_extension("rs"));
    }
    let mut header = Vec::new();
    builder.generate().expect("the source can be read").write(&mut header);
    // What Rust calls the safety of a function is, in C, what its pointers have to be.
    String::from_utf8(header).expect("the header is text").replace("// # Safety\n// ", "// Pointers: ")
}

fn committed() -> PathBuf {
    crate_dir().join("include/peerspace.h")
}

#[test]
fn the_committed_header_is_what_the_source_says() {
    let header = generated();
    if std::env::var_os("PEERSPACE_WRITE_HEADER").is_some() {
        std::fs::write(committed(), &header).expect("write the header");
    }
    let there = std::fs::read_to_string(committed()).expect("include/peerspace.h");
    let differs = there.lines().zip(header.lines()).position(|(a, b)| a != b);
    assert!(
        there == header,
        "include/peerspace.h is not what the source says (first at line {:?}): run\n    \
         PEERSPACE_WRITE_HEADER=1 cargo test -p peerspace-capi --test header",
        differs.map(|n| n + 1)
    );
}

#[test]
fn every_function_of_the_library_is_in_the_header() {
    let header = generated();
    let mut functions = 0;
    for file in std::fs::read_dir(crate_dir().join("src")).expect("src") {
        let path = file.expect("src").path();
        let text = std::fs::read_to_string(&path).expect("a source file");
        for line in text.lines().filter(|l| l.contains("extern \"C\" fn ps_")) {
            let name = line.split("fn ").nth(1).and_then(|rest| rest.split('(').next()).expect("a name");
            assert!(header.contains(&format!("{name}(")), "{name} of {} is not in the header", path.display());
            functions += 1;
        }
    }
    assert!(functions > 40, "only {functions} functions were found");
}

/// Compiles the header alone.
fn compiles(compiler: &str, language: &[&str]) {
    let dir = directory();
    let strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"];
    let source = dir.path().join("only.c");
    // Twice, as headers are; and the macro in use.
    let text = "#include <peerspace.h>\n#include <peerspace.h>\nps_device host(void);\nps_device host(void) { return PS_HOST; }\n";
    std::fs::write(&source, text).expect("write a source file");
    let include = crate_dir().join("include");
    run(Command::new(compiler).args(language).args(strict).arg("-I").arg(include).arg(&source));
}

#[test]
fn it_is_c11() {
    compiles(&compiler("cc"), &["-std=c11"]);
}

#[test]
fn it_is_cpp17() {
    if common::tool("g++").is_none() {
        eprintln!("skipped: there is no g++ here, so nothing is known of C++: .ci/run installs it");
        return;
    }
    compiles("g++", &["-x", "c++", "-std=c++17"]);
}
