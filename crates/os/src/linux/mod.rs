//! The facade over a real Linux kernel, and what else peerspace needs from it.

pub mod futex;
pub mod kernel;
pub mod map;
pub mod memory;
pub mod probe;
pub mod scan;
pub mod signal;
mod staging;
pub mod thread;
pub mod uffd;

pub use kernel::{Delivery, Linux, Setup};
