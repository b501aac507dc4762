//! Gives the shared library its name for the dynamic loader: programs remember that, and not the name of a file.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The number grows when a program that was built against an older header could not use a newer library.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libpeerspace.so.0");
}
