//! userfaultfd: the descriptor and its ioctls, as thin as can be.
//!
//! Numbers and layouts are those of `<linux/userfaultfd.h>`. Every function returns what the kernel said; what
//! it means is decided in [`super::kernel`]. Nothing here uses `errno`, thread-local storage or the heap, so all
//! of it can run in a signal handler and on threads the C library knows nothing of.

use super::files::OurFd;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

/// `UFFDIO_API`'s feature bits.
pub mod feature {
    /// Write-protect faults are told apart.
    pub const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// A forked child stays registered, and the parent hears of it.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// Moving mappings are announced and stay registered.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// Discarded content is announced.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// Unmapped ranges are announced.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// Faults raise SIGBUS instead of being delivered.
    pub const SIGBUS: u64 = 1 << 7;
    /// Messages carry the id of the faulting thread.
    pub const THREAD_ID: u64 = 1 << 8;
    /// Messages carry the exact address.
    pub const EXACT_ADDRESS: u64 = 1 << 11;
    /// UFFDIO_POISON exists.
    pub const POISON: u64 = 1 << 14;
    /// Write protection can be resolved by the kernel.
    pub const WP_ASYNC: u64 = 1 << 15;
    /// UFFDIO_MOVE exists.
    pub const MOVE: u64 = 1 << 16;

    /// Names for reports, in the order of their bits.
    pub const NAMES: [(u64, &str); 17] = [
        (1 << 0, "pagefault_flag_wp"),
        (1 << 1, "event_fork"),
        (1 << 2, "event_remap"),
        (1 << 3, "event_remove"),
        (1 << 4, "missing_hugetlbfs"),
        (1 << 5, "missing_shmem"),
        (1 << 6, "event_unmap"),
        (1 << 7, "sigbus"),
        (1 << 8, "thread_id"),
        (1 << 9, "minor_hugetlbfs"),
        (1 << 10, "minor_shmem"),
        (1 << 11, "exact_address"),
        (1 << 12, "wp_hugetlbfs_shmem"),
        (1 << 13, "wp_unpopulated"),
        (1 << 14, "poison"),
        (1 << 15, "wp_async"),
        (1 << 16, "move"),
    ];
}

/// What a range is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    /// Missing pages fault, and protected ones.
    MissingAndProtected = 3,
    /// Only protected pages fault.
    Protected = 2,
    /// Only missing pages fault: where write protection does not exist.
    Missing = 1,
}

const IOC: u8 = 0xAA;
const API: u64 = 0xAA;

#[repr(C)]
#[derive(Clone, Copy)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

#[repr(C)]
struct Poison {
    range: Range,
    mode: u64,
    updated: i64,
}

#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

/// The kernel's `struct uffd_msg`: 32 bytes, of which the meaning depends on the first.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RawMessage {
    /// Which event.
    pub event: u8,
    _reserved: [u8; 7],
    /// Its arguments.
    pub args: [u64; 3],
}

/// Values of [`RawMessage::event`].
pub mod event {
    /// A fault: flags, address, thread id.
    pub const PAGEFAULT: u8 = 0x12;
    /// A fork: the child's descriptor.
    pub const FORK: u8 = 0x13;
    /// A moved mapping: from, to, length.
    pub const REMAP: u8 = 0x14;
    /// Discarded content: start, end.
    pub const REMOVE: u8 = 0x15;
    /// An unmapped range: start, end.
    pub const UNMAP: u8 = 0x16;
}

/// Fault flag: it was a write.
pub const FAULT_WRITE: u64 = 1 << 0;
/// Fault flag: the page is there but protected.
pub const FAULT_WP: u64 = 1 << 1;

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OurFd,
    features: u64,
}

/// How far an ioctl on a range came, in bytes, and the error that ended it.
pub type Partial = (u64, Option<Errno>);

impl Uffd {
    /// Opens a userfaultfd, close-on-exec and non-blocking. `user_only` asks for one that serves user-mode
    /// accesses alone, which any process may have.
    ///
    /// Without `user_only` it tries the system call, then `/dev/userfaultfd`.
    ///
    /// # Errors
    /// The errno of the system call: EPERM without permission, ENOSYS where the kernel or a filter has none.
    pub fn open(user_only: bool) -> Result<Uffd, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if user_only { 1 } else { 0 };
        let fd = match sys_userfaultfd(flags) {
            Ok(fd) => fd,
            Err(first) if !user_only => open_device(flags).map_err(|_| first)?,
            Err(e) => return Err(e),
        };
        Ok(Uffd { fd: OurFd::new(fd)?, features: 0 })
    }

    /// The features this kernel knows. Asks with a descriptor of its own.
    ///
    /// # Errors
    /// As [`open`](Uffd::open).
    pub fn known_features() -> Result<u64, Errno> {
        let uffd = match Uffd::open(false) {
            Ok(u) => u,
            Err(_) => Uffd::open(true)?,
        };
        let mut arg = Api { api: API, features: 0, ioctls: 0 };
        // SAFETY: the opcode belongs to the struct, which the kernel reads and writes.
        unsafe { ioctl(&uffd.fd, Updater::<{ opcode::read_write::<Api>(IOC, 0x3F) }, Api>::new(&mut arg))? };
        Ok(arg.features)
    }

    /// Switches `features` on. To be called once, first.
    ///
    /// # Errors
    /// EINVAL when the kernel lacks one of them, EPERM when one needs a privilege.
    pub fn enable(&mut self, features: u64) -> Result<(), Errno> {
        let mut arg = Api { api: API, features, ioctls: 0 };
        // SAFETY: the opcode belongs to the struct, which the kernel reads and writes.
        unsafe { ioctl(&self.fd, Updater::<{ opcode::read_write::<Api>(IOC, 0x3F) }, Api>::new(&mut arg))? };
        self.features = features;
        Ok(())
    }

    /// Puts a new userfaultfd with the same features, and `more` of them, in the place of this one: what was
    /// registered with the old one is registered no longer.
    ///
    /// # Errors
    /// As for [`open`](Uffd::open) and [`enable`](Uffd::enable); nothing changed.
    pub fn renew(&self, user_only: bool, more: u64) -> Result<(), Errno> {
        let fresh = {
            let mut fresh = Uffd::open(user_only)?;
            fresh.enable(self.features | more)?;
            rustix::io::fcntl_dupfd_cloexec(&fresh.fd, 0)?
        };
        self.fd.replace(fresh)
    }

    /// The features switched on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Registers a range.
    ///
    /// # Errors
    /// EINVAL for memory that cannot be, EBUSY when it belongs to another userfaultfd.
    pub fn register(&self, start: u64, len: u64, mode: Mode) -> Result<(), Errno> {
        let mut arg = Register { range: Range { start, len }, mode: mode as u64, ioctls: 0 };
        // SAFETY: the opcode belongs to the struct. Registering changes no bytes: missing pages begin to fault.
        unsafe { ioctl(&self.fd, Updater::<{ opcode::read_write::<Register>(IOC, 0x00) }, Register>::new(&mut arg)) }
    }

    /// Undoes [`register`](Uffd::register).
    ///
    /// # Errors
    /// EINVAL when there is no such mapping.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut arg = Range { start, len };
        // SAFETY: as above; `_IOR` by the header although the kernel reads.
        unsafe { ioctl(&self.fd, Updater::<{ opcode::read::<Range>(IOC, 0x01) }, Range>::new(&mut arg)) }
    }

    /// Lets waiting threads look again.
    ///
    /// # Errors
    /// EINVAL for an unaligned range.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut arg = Range { start, len };
        // SAFETY: as above.
        unsafe { ioctl(&self.fd, Updater::<{ opcode::read::<Range>(IOC, 0x02) }, Range>::new(&mut arg)) }
    }

    /// Copies `len` bytes from `src` into missing pages at `dst`.
    ///
    /// # Safety
    /// `src` must be readable for `len` bytes and not written meanwhile. `dst` is a range registered here, in
    /// which pages only appear that were missing: no byte anybody can have seen changes.
    pub unsafe fn copy(&self, dst: u64, src: *const u8, len: u64, protect: bool, wake: bool) -> Partial {
        let mode = if wake { 0 } else { 1 } | if protect { 2 } else { 0 };
        let mut arg = Copy { dst, src: src as u64, len, mode, copy: 0 };
        // SAFETY: the opcode belongs to the struct; the caller vouches for the addresses.
        let r = unsafe { ioctl(&self.fd, Updater::<{ opcode::read_write::<Copy>(IOC, 0x03) }, Copy>::new(&mut arg)) };
        partial(r, arg.copy, len)
    }

    /// Moves pages from `src` to `dst`.
    ///
    /// # Safety
    /// Neither range may overlap memory that Rust references point to, unless its owner expects it to change.
    pub unsafe fn move_pages(&self, dst: u64, src: u64, len: u64, wake: bool) -> Partial {
        let mut arg = Move { dst, src, len, mode: if wake { 0 } else { 1 }, moved: 0 };
        // SAFETY: the opcode belongs to the struct; the caller vouches for the addresses.
        let r = unsafe { ioctl(&self.fd, Updater::<{ opcode::read_write::<Move>(IOC, 0x05) }, Move>::new(&mut arg)) };
        partial(r, arg.moved, len)
    }

    /// Sets or clears write protection.
    ///
    /// # Errors
    /// ENOENT when the range is not registered for it, EAGAIN while mappings change.
    pub fn write_protect(&self, start: u64, len: u64, on: bool, wake: bool) -> Result<(), Errno> {
        let mode = if on { 1 } else { 0 } | if wake || on { 0 } else { 2 };
        let mut arg = WriteProtect { range: Range { start, len }, mode };
        // SAFETY: the opcode belongs to the struct. Protection changes no bytes.
        unsafe {
            ioctl(&self.fd, Updater::<{ opcode::read_write::<WriteProtect>(IOC, 0x06) }, WriteProtect>::new(&mut arg))
        }
    }

    /// Makes accesses to missing pages raise SIGBUS.
    pub fn poison(&self, start: u64, len: u64) -> Partial {
        let mut arg = Poison { range: Range { start, len }, mode: 0, updated: 0 };
        // SAFETY: the opcode belongs to the struct. Only pages that are missing are marked.
        let r =
            unsafe { ioctl(&self.fd, Updater::<{ opcode::read_write::<Poison>(IOC, 0x08) }, Poison>::new(&mut arg)) };
        partial(r, arg.updated, len)
    }

    /// Reads the next message.
    ///
    /// # Errors
    /// EAGAIN when there is none.
    pub fn read(&self) -> Result<RawMessage, Errno> {
        let mut message = [0u64; 4];
        // SAFETY: four u64 are 32 initialised bytes, and any bytes are four valid u64.
        let bytes = unsafe { std::slice::from_raw_parts_mut(message.as_mut_ptr().cast::<u8>(), 32) };
        let n = rustix::io::read(&self.fd, bytes)?;
        if n != 32 {
            return Err(Errno::IO);
        }
        Ok(RawMessage { event: message[0] as u8, _reserved: [0; 7], args: [message[1], message[2], message[3]] })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The kernel reports what it did, or a negated errno, in the last field; the return value repeats an error.
fn partial(result: Result<(), Errno>, field: i64, len: u64) -> Partial {
    match result {
        Ok(()) => (len, None),
        Err(e) => (if field > 0 { (field as u64).min(len) } else { 0 }, Some(e)),
    }
}

fn sys_userfaultfd(flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: creates a descriptor, touches no memory. rustix's constant for UFFD_USER_MODE_ONLY is missing, so
    // the flags are passed as bits.
    unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::from_bits_retain(flags as u32)) }
}

fn open_device(flags: i32) -> Result<OwnedFd, Errno> {
    use rustix::fs::{Mode, OFlags, open};
    let device = open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // USERFAULTFD_IOC_NEW: _IO(0xAA, 0); the argument is the flags themselves, the result a descriptor.
    // SAFETY: the ioctl creates a descriptor and touches no memory.
    unsafe { ioctl(&device, NewUffd(flags)) }
}

struct NewUffd(i32);

// SAFETY: `_IO(0xAA, 0)` takes its argument by value and returns a new descriptor.
unsafe impl rustix::ioctl::Ioctl for NewUffd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> rustix::ioctl::Opcode {
        opcode::none(IOC, 0x00)
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        self.0 as usize as *mut core::ffi::c_void
    }

    unsafe fn output_from_ptr(
        out: rustix::ioctl::IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        use rustix::fd::FromRawFd;
        // SAFETY: the kernel just created it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}
