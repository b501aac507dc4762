//! The state and the decisions of peerspace.
//!
//! This crate is what the simulator, the model checkers and the real engine share: it knows pages, frames and
//! devices by number, and no operating system. It forbids unsafe code, allocates nothing after set-up, and
//! every structure that several threads use says in its first paragraphs who may do what, in which order.
//!
//! | module | subject |
//! |---|---|
//! | [`addr`] | addresses, page numbers, sizes and orders as types |
//! | [`entry`] | one word of the logical page table: the states of a page |
//! | [`table`] | the logical page table, its locks, splitting and joining of blocks |
//! | [`folio`] | the state word of a folio: references, mappings, pins |
//! | [`memmap`] | 32-byte descriptors of the host's frames |
//! | [`pagemap`] | which device a page frame number belongs to |
//! | [`buddy`] | the allocator of device memory, over out-of-band bitmaps |
//! | [`regions`] | which addresses are managed |
//! | [`reclaim`] | which frame goes next |
//! | [`shootdown`] | translations used without a lock, and taking them away |
//! | [`stream`] | sequential streams seen in the faults |
//! | [`plan`] | what to do: pure functions from state and event |

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
#[macro_use]
extern crate std;

pub mod addr;
#[cfg(feature = "device")]
pub mod altmap;
#[cfg(feature = "device")]
pub mod bitmap;
#[cfg(feature = "device")]
pub mod buddy;
pub mod coherence;
#[cfg(feature = "device")]
pub mod devmap;
pub mod entry;
pub mod folio;
#[cfg(feature = "device")]
pub mod inverted;
#[cfg(all(test, loom))]
mod loom_tests;
pub mod memmap;
#[cfg(feature = "device")]
pub mod pagemap;
pub mod plan;
pub mod reclaim;
pub mod refs;
pub mod regions;
pub mod sharers;
#[cfg(feature = "device")]
pub mod shootdown;
pub mod sketch;
pub mod stream;
pub mod sync;
pub mod table;
#[cfg(feature = "device")]
pub mod vmemmap;
#[cfg(feature = "device")]
pub mod wars;
pub mod words;
