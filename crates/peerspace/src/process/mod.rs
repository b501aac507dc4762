//! Managing a whole process from inside: what a preloaded library is made of.
//!
//! The program knows nothing of it. One thread, the *keeper*, watches how much anonymous memory the program has; as
//! long as that is far below the budget, nothing else happens. When it comes near, the keeper makes an engine, takes
//! the program's memory under management ([`candidates`]) and starts the engine's threads; from then on it looks for
//! memory that has come since, and tells the engine how much of it the kernel has populated by itself.
//!
//! All threads are [raw](peerspace_os::linux::raw_thread): the program's C library does not know them. Unless faults
//! come by signal they also have a descriptor table of their own, where the program cannot close anything of ours.
//! Whatever needs such a descriptor is therefore done by these threads: a thread of the program that forks hands
//! [jobs](keeper) to the keeper.

mod candidates;
mod forks;
mod keeper;
mod records;
pub mod stacks;

pub use candidates::first_thread_control;
pub use keeper::{Kept, hold, last_words, start, thread_starts};
pub use records::{Options, Record};

/// The least budget of RAM a process can be run with: the engine's own minimum, room for what cannot be managed, and
/// for what comes between two looks.
pub const LEAST_HOST: u64 = 16 << 20;

/// The most RAM a process can be run with: frames have 32-bit numbers.
pub const MOST_HOST: u64 = 2 << 40;
