//! Memory beyond RAM, through ordinary pointers, in user space, on an unmodified Linux kernel.
//!
//! A [`Space`] gives out memory that takes up no more RAM than its budget. What does not fit lives on
//! [devices](device): compressed, in a file, anywhere else a device can put it. It comes back when it is touched, by
//! the page or two mebibytes at a time, whatever the access shows to be right. The program sees slices and pointers; so does the
//! code of [devices that run any](device::mmu).
//!
//! ```
//! use peerspace::{Space, device::compressed::Compressed};
//!
//! // 8 MiB of RAM, backed by up to 64 MiB of compressed pages.
//! let space = Space::builder().host(8 << 20).device(Compressed::new(64 << 20)?).build()?;
//!
//! // A region four times as large, to be used like any slice.
//! let mut region = space.region(32 << 20)?;
//! let words: &mut [u64] = region.typed_mut();
//! words.iter_mut().enumerate().for_each(|(i, w)| *w = i as u64);
//! assert!(words.iter().enumerate().all(|(i, w)| *w == i as u64));
//!
//! let s = space.statistics();
//! assert!(s.peak_bytes <= 8 << 20 && s.pages_out > 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The parts
//!
//! | part | what it is for |
//! |---|---|
//! | [`Space`], [`Builder`] | a budget, devices, and the way in which faults are served |
//! | [`Region`] | memory of a space, as bytes or slices of values; [hints](Hint); access with errors instead of signals |
//! | [`Pool`] | an allocator over a region, for vectors and maps |
//! | [`Heap`] | a global allocator: the large allocations of a whole program |
//! | [`Space::adopt`] | memory the program got elsewhere |
//! | [`device::mmu`] | devices that run code, and use the program's own pointers |
//! | [`Space::prefetch`], [`Node`], [`Hint`] | where data should be, said ahead of its use |
//! | [`Space::launch`] | work on devices that cannot fault |
//! | [`Space::copy`], [`Space::exclusive`] | bytes copied wherever both ends are; sole access, for atomics of devices |
//! | [`Space::pages`] | where each page is, without touching it |
//! | [`Space::migrate`] | exactly the pages that are named, sent to a device or home |
//! | [`Region::migrate_to`] | memory sent to a device, and used in place there |
//! | [`Persistent`] | regions that are found by name after a restart |
//! | [`Space::make_resident`] | memory that is handed to the kernel or to hardware |
//! | [`device`] | where pages live while they are not in RAM, and how to make one's own such place |
//! | [`Statistics`] | what a space is doing, in numbers |
//! | [`DeviceSpec`], [`Size`] | devices and sizes as they are written on a command line |
//!
//! # How faults are served
//!
//! Chosen for each space by [`Faults`]:
//!
//! - *By signal*: SIGBUS in the faulting thread, three to five microseconds, without privileges. A system call that is
//!   handed memory which is not in RAM fails with EFAULT: [`make_resident`](Space::make_resident) first, and for as
//!   long as the kernel uses it. SIGBUS must not be blocked in threads that touch managed memory: the kernel ends the
//!   process otherwise. Handlers of SIGBUS that were installed before the first space get what is not a space's; one
//!   that is installed later asks [`forward_sigbus`] first, or goes on to the handler it replaces.
//! - *By threads* of the space: system calls are served as well. Needs root, `vm.unprivileged_userfaultfd` or access
//!   to `/dev/userfaultfd`.
//!
//! # What can be relied on
//!
//! - RAM in use stays within the budget, unless no device has room: then the budget is exceeded, with a warning, rather
//!   than data lost.
//! - If a device cannot give a page back, that page is lost and no other. An access to it gets SIGBUS, or
//!   [`Error::Lost`] by [`Region::try_read`] and [`Region::try_write`]; never zeros, never what it was before.
//! - Devices come and go at any time ([`Space::attach`], [`Space::detach`]): what one holds moves to others first.
//! - After `fork`, parent and child both have everything, and go on apart.
//!
//! # What cannot
//!
//! - Pages move and leave RAM that are private and anonymous. Shared memory, files and huge pages of the kernel's pool can be
//!   [adopted](Space::adopt) as well, and stay where they are: devices that can access the host's memory use them there. Stacks
//!   and thread-local storage must not be adopted.
//! - A process that is forked past the C library (by a bare `clone`) is not seen, and must not touch managed memory.
//! - Closing every descriptor (`closefrom` and the like) closes the space's too: what is not in RAM then reads as
//!   zeros. The `peerspace` command guards against it; a program that uses the library sees to it itself.
//! - What devices take up themselves is not part of the budget: [`DeviceStatistics::used_bytes`] says how much it is.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `devices` | yes, by the next four | memory beyond RAM: [devices](device), those of one's own included |
//! | `compressed` | yes | the compressed store |
//! | `file` | yes | files on disk, by io_uring where it can be had |
//! | `dax` | yes | memory that the CPU addresses in place, coherent or persistent |
//! | `soft` | yes | plain memory behind the device interface, and an accelerator in software, for tests and measurements |
//! | `hashbrown` | yes | [`Pool`] as an allocator for `hashbrown` and whatever else uses version 0.2 of `allocator-api2` |
//! | `process` | no | the management of a whole process from inside, for preloaded libraries |
//!
//! Without `devices` nothing of them is left, no branch on the path of a fault either. A space has RAM alone then: what does
//! not fit into its budget exceeds it, with a warning.
//!
//! # Which kernel
//!
//! Linux on x86-64 or arm64. From 6.8 on pages move between the program and their frames without being copied; older
//! kernels, from 5.7 on, are served by copying, and below 6.6 a lost page is known to the space alone, not to the
//! kernel. `peerspace doctor` says what a machine can do.

mod adopt;
#[cfg(feature = "devices")]
mod announce;
#[cfg(feature = "devices")]
mod attach;
#[cfg(feature = "devices")]
pub mod device;
pub(crate) mod engine;
mod error;
mod fork;
mod heap;
mod huge;
#[cfg(feature = "devices")]
mod launch;
#[cfg(feature = "devices")]
mod migrate;
#[cfg(feature = "devices")]
mod peers;
#[cfg(feature = "devices")]
mod persistent;
#[cfg(feature = "devices")]
mod placement;
#[cfg(feature = "devices")]
mod ports;
#[cfg(feature = "process")]
pub mod process;
mod region;
mod report;
mod size;
mod space;
#[cfg(feature = "devices")]
mod spec;
pub(crate) mod sync;
pub(crate) mod tell;
#[cfg(feature = "devices")]
mod view;
mod waited;

pub use adopt::{Adopted, Resident, Use};
#[cfg(feature = "devices")]
pub use announce::Announced;
#[cfg(feature = "devices")]
pub use attach::DeviceId;
pub use error::Error;
pub use heap::{Heap, Pool};
pub use huge::Hint;
#[cfg(feature = "devices")]
pub use launch::{Launch, LaunchError, LaunchReport, Piece};
#[cfg(feature = "devices")]
pub use peers::{Node, Prefetch};
pub use peerspace_os::linux::signal::forward as forward_sigbus;
pub use peerspace_os::linux::thread::unmanaged;
#[cfg(feature = "devices")]
pub use persistent::Persistent;
pub use region::Region;
pub use report::{DeviceStatistics, FaultStatistics, MmuStatistics, Statistics, ThpStatistics};
pub use size::{Size, SizeError};
pub use space::{Builder, Faults, Space};
#[cfg(feature = "devices")]
pub use spec::{DeviceSpec, KINDS as DEVICE_KINDS, Reservation, SpecError};
#[cfg(feature = "devices")]
pub use view::{CpuMapping, DeviceSet, PageView, Pages, Residence};
