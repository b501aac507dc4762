//! The library that `peerspace run` preloads into a program it manages.
//!
//! Everything of substance is in [`peerspace::process`]; here is the edge to C: a constructor that reads the options
//! from the environment, and functions that take the place of the C library's:
//!
//! | file | functions | why |
//! |---|---|---|
//! | [`threads`] | `pthread_create` | stacks are never managed; where the thread may run is settled first |
//! | [`processes`] | `_exit`, `exec*`, `posix_spawn*`, `system`, `popen`, `_Fork`, `__register_atfork` | reports, the environment, the order around a fork |
//! | [`signals`] | `sigaction`, `signal`, masks, `sigaltstack` | where faults come by SIGBUS, the program must not take it away |
//! | [`descriptors`] | `close` and its kind | where our descriptors are in the program's table, it must not close them |
//! | [`streams`] | none | where faults come by signal, buffers of the standard streams are kept |
//! | [`mappings`] | `mremap` | what the program knows as one mapping may be several to the kernel |
//! | [`heap`] | none | how the C library's heap grows |
//! | [`calls`] | `read`, `write` and their kind | where faults come by signal, buffers are made resident first |
//!
//! Without the options in the environment all of them pass straight on.

#![cfg(target_os = "linux")]
#![allow(non_camel_case_types)]
// The C interface is what the C library documents, so are the safety conditions.
#![allow(clippy::missing_safety_doc, missing_docs, unreachable_pub)]

mod calls;
mod descriptors;
mod heap;
mod mappings;
mod processes;
mod signals;
mod streams;
mod threads;

use peerspace::process::{self, Options};
use peerspace_os::linux::raw_thread::thread_pointer;
use peerspace_os::own::OwnGlobal;
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicU8, Ordering};

/// Nothing of ours comes from the program's heap, which is about to be managed.
#[global_allocator]
static HEAP: OwnGlobal = OwnGlobal;

const OFF: u8 = 0;
const THREADS: u8 = 1;
const SIGNAL: u8 = 2;
static MODE: AtomicU8 = AtomicU8::new(OFF);

/// Whether this process is managed.
fn is_on() -> bool {
    MODE.load(Ordering::Relaxed) != OFF
}

/// Whether faults come by signal.
fn by_signal() -> bool {
    MODE.load(Ordering::Relaxed) == SIGNAL
}

/// The options, as they are in the environment of this process: for programs it starts without it.
static OPTIONS: std::sync::OnceLock<std::ffi::CString> = std::sync::OnceLock::new();
static LIBRARY: std::sync::OnceLock<std::ffi::CString> = std::sync::OnceLock::new();

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = constructor;

/// Called by the dynamic loader before `main`.
extern "C" fn constructor(_: c_int, _: *const *const c_char, environment: *const *const c_char) {
    peerspace_os::linux::fork::install();
    let variables = || {
        let mut at = environment;
        std::iter::from_fn(move || {
            // SAFETY: the loader passes the environment, an array of strings that ends with a null.
            unsafe {
                let text = at.as_ref().filter(|text| !text.is_null())?;
                at = at.add(1);
                Some(CStr::from_ptr(*text))
            }
        })
    };
    let variable = |name: &str| {
        let value = |text: &CStr| text.to_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"=").map(Vec::from);
        variables().find_map(value).and_then(|value| std::ffi::CString::new(value).ok())
    };
    let Some(text) = variable(Options::VARIABLE) else { return };
    let options: Options = match serde_json::from_slice(text.to_bytes()) {
        Ok(options) => options,
        Err(e) => return complain(format_args!("{} in the environment is not understood: {e}", Options::VARIABLE)),
    };
    if let Some(library) = variable("LD_PRELOAD") {
        let _ = LIBRARY.set(library);
    }
    let _ = OPTIONS.set(text);
    std::panic::set_hook(Box::new(|info| {
        complain(format_args!("{info}"));
        std::process::abort();
    }));
    MODE.store(if options.by_signal { SIGNAL } else { THREADS }, Ordering::Relaxed);
    heap::grow_in_large_steps(variables());
    let fixed = process::first_thread_control(thread_pointer() as u64);
    match process::start(options, fixed) {
        Ok(()) => {
            processes::report_at_exit();
            if by_signal() {
                streams::keep_buffers();
            }
        }
        Err(e) => {
            MODE.store(OFF, Ordering::Relaxed);
            complain(format_args!("this process is not managed: {e}"));
        }
    }
}

/// Says something on standard error.
fn complain(what: std::fmt::Arguments<'_>) {
    let text = format!("peerspace: {what}\n");
    // SAFETY: writes our own bytes. Nothing can be done if it fails.
    unsafe { libc::syscall(libc::SYS_write, 2, text.as_ptr(), text.len()) };
}
