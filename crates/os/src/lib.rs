//! What peerspace asks of the operating system, behind one facade.
//!
//! This is the only crate of the engine with unsafe code. [`kernel`] is the facade and its contract; [`linux`]
//! implements it with userfaultfd, [`sim`] simulates it for Miri, the model checkers and tests without the
//! kernel interfaces, and [`inject`] makes either fail on a schedule. Beside the facade: memory of our own
//! that no program can mix up with its own ([`own`]), signals, threads, mappings and the like.

#[cfg(all(test, not(shuttle)))]
mod alone;
#[cfg(all(test, not(shuttle)))]
mod conformance;
pub mod devmem;
pub mod error;
pub mod inject;
pub mod kernel;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod own;
pub mod sim;
pub mod slot;

pub use error::OsError;
pub use kernel::{Capabilities, CpuPage, Done, Kernel, Mapped, Message, Protect, SharedMemory, Trouble, Wake};
