//! Mirror devices over a peerspace space, for programs written for the kernel's (`test_hmm`).
//!
//! Preloaded into such a program, this library gives it `/dev/hmm_dmirror0` to `3`: devices that mirror the program's
//! whole address space, 0 and 1 with private memory, 2 and 3 with coherent memory. They read and write the program's memory
//! through their own page tables, by device faults; pages migrate to them and home; the program need not be changed, nor
//! know of a space. Whatever range a request names is adopted.
//!
//! ```text
//! LD_PRELOAD=libpeerspace_dmirror.so ./hmm-tests
//! ```
//!
//! | variable | what it says | otherwise |
//! |---|---|---|
//! | `PEERSPACE_DMIRROR_MEMORY` | memory of each device, in bytes or with K, M, G, T | 1G |
//! | `PEERSPACE_DMIRROR_HOST` | RAM that memory which devices have had to do with may take up | all there is |
//! | `PEERSPACE_DMIRROR_EXPLAIN` | if it is anything: on standard error, why a request was refused | silence |
//!
//! # The parts
//!
//! | file | what is there |
//! |---|---|
//! | [`descriptors`], [`mappings`], [`heap`], [`pagemap`] | the C library's functions whose place ours take |
//! | [`files`] | files that are open on a device |
//! | [`abi`], [`commands`], [`access`], [`snapshot`] | the requests |
//! | [`device`], [`table`], [`gate`] | the devices: their memory, their page table, and keeping them out while it changes |
//! | [`replace`], [`changes`] | memory that migrates only when other memory has taken its place |
//! | [`world`] | the space of the process |
//! | [`user`] | copying to and from the program |
//!
//! # What differs from the kernel's devices
//!
//! - Faults are served by threads, which takes root, `vm.unprivileged_userfaultfd`, or access to `/dev/userfaultfd`. Without
//!   that, opening a device fails with ENODEV, and standard error says why.
//! - Releasing a device's memory concerns the calling process; the kernel's devices are one for all processes.
//! - Pages that the program has written in a private mapping of a file are anonymous memory once they have migrated: what is discarded
//!   of them (`MADV_DONTNEED`) reads as zeros, not as the file.
//! - A forked process cannot use the files it has inherited (EINVAL): it opens its own, as such clients do.

#![cfg(target_os = "linux")]
// The C interface is what the C library documents, so are the safety conditions.
#![allow(clippy::missing_safety_doc, missing_docs, unreachable_pub)]

mod abi;
mod access;
mod changes;
mod commands;
mod descriptors;
mod device;
mod files;
mod gate;
mod heap;
mod mappings;
mod pagemap;
mod replace;
mod snapshot;
mod table;
mod user;
mod world;

use peerspace_os::own::OwnGlobal;

/// Nothing of ours comes from the program's heap, which a device may be asked about.
#[global_allocator]
static HEAP: OwnGlobal = OwnGlobal;

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

/// Called by the dynamic loader before `main`.
extern "C" fn constructor() {
    // Asked last before a fork, and told first after it.
    peerspace_os::linux::fork::install();
    world::expect_forks();
}

/// Says something on standard error.
fn complain(what: std::fmt::Arguments<'_>) {
    let text = format!("peerspace: {what}\n");
    // SAFETY: writes our own bytes. Nothing can be done if it fails.
    unsafe { libc::syscall(libc::SYS_write, 2, text.as_ptr(), text.len()) };
}
