//! Builds the library that `peerspace run` preloads, to be carried inside the command.
//!
//! `cargo install` installs commands alone, and cargo cannot yet make one package's library part of another's binary,
//! so this asks cargo itself, in a target directory of its own. `PEERSPACE_PRELOAD_LIBRARY` names a library that was
//! built otherwise.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libpeerspace_preload.so");
    println!("cargo:rerun-if-env-changed=PEERSPACE_PRELOAD_LIBRARY");
    let built = match env::var_os("PEERSPACE_PRELOAD_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => build(&out),
    };
    if let Err(e) = std::fs::copy(&built, &library) {
        panic!("cannot copy {} to {}: {e}", built.display(), library.display());
    }
}

fn build(out: &Path) -> PathBuf {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let crates = here.parent().expect("this crate has siblings");
    for name in ["core", "os", "peerspace", "preload"] {
        for part in ["src", "Cargo.toml"] {
            println!("cargo:rerun-if-changed={}", crates.join(name).join(part).display());
        }
    }
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let directory = out.join("preload");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--target", &target, "--manifest-path"])
        .arg(crates.join("preload").join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&directory);
    // What cargo tells build scripts about this build is not meant for another one.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        let keep = matches!(&*name, "CARGO" | "CARGO_HOME" | "CARGO_NET_OFFLINE");
        if (name.starts_with("CARGO") && !keep) || name.starts_with("RUSTC") || name == "RUSTFLAGS" {
            command.env_remove(&*name);
        }
    }
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("building the library to preload failed: {status}"),
        Err(e) => panic!("cannot run cargo to build the library to preload: {e}"),
    }
    directory.join(target).join("release").join("libpeerspace_preload.so")
}
