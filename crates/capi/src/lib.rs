//! The C library of peerspace: spaces, regions, hints, pins, copies and statistics for programs in C, and devices that are
//! implemented in C by a table of functions.
//!
//! The header `include/peerspace.h` is generated from this source (`tests/header.rs`), and is the documentation for users: what
//! stands at the functions and structures here stands there. What C gets is handles, numbers that mean one thing or nothing
//! ([`table`]); what it passes is looked at before it is believed ([`args`]); and no panic gets out ([`error`]).
//!
//! This is an edge to C: unsafe code is here because pointers come from there. A function's `# Safety` says what the caller
//! promises; everything that can be checked is checked.

// Names are those that C has.
#![allow(non_camel_case_types)]

pub mod adopted;
mod args;
pub mod device;
pub mod error;
pub mod launch;
pub mod library;
pub mod memory;
pub mod mmu;
pub mod persistent;
pub mod region;
pub mod space;
pub mod statistics;
mod table;
