//! A device that is implemented in C, by a table of functions.
//!
//! What a callback gets is made up on the stack, a part of a batch at a time: callbacks run with pages locked, also in the handler
//! of a signal, where nothing may be allocated. What is kept of the table is in our own memory, for the same reason.

use crate::args::{self, Versioned};
use crate::error::{Failure, Inside, answer, inside, ps_status};
use crate::mmu::{CMmu, ps_mmu_ops};
use crate::table;
use peerspace::device::deadline::Deadline;
use peerspace::device::mmu::{Mmu, Port};
use peerspace::device::{
    Descriptor, Device, DeviceError, DevicePages, ForkSide, Load, MemoryType, PeerCopy, SharedMemory, Store, Usage,
};
use peerspace_os::own::Shared;
use std::any::Any;
use std::ffi::{c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What an answer of a device is before it answers: the space takes it for a failure.
pub const PS_NO_ANSWER: i32 = i32::MIN;

/// The CPU cannot map the device's memory: an access of the CPU migrates the page home.
pub const PS_MEMORY_PRIVATE: u32 = 0;
/// The CPU maps the device's memory in place: see `shared`.
pub const PS_MEMORY_COHERENT: u32 = 1;

/// A transfer keeps the calling thread waiting (for a disk, a network), so that others should go on meanwhile.
pub const PS_DEVICE_SLOW: u32 = 1;
/// `holds` costs about as much as a load, so it pays to compare before writing back.
pub const PS_DEVICE_COMPARES: u32 = 2;
/// What the device takes up is RAM of this process.
pub const PS_DEVICE_IN_RAM: u32 = 4;
/// After each store the pages are read back and compared: for a device that may say it has done what it has not.
pub const PS_DEVICE_VERIFIED: u32 = 8;
/// Of a coherent device: what leaves RAM for want of room may go there, too.
pub const PS_DEVICE_TAKES_EVICTED: u32 = 16;
/// Of a private device: only what is sent goes there.
pub const PS_DEVICE_ONLY_SENT: u32 = 32;

/// Transfers that a callback gets at once.
const PART: usize = 32;
/// The longest name, with the 0 at its end.
const NAME: usize = 64;

/// Pages to be written to a device. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_store {
    /// The first page of the device to write.
    pub page: u64,
    /// The bytes of one or more whole pages, aligned to the page size.
    pub bytes: *const c_void,
    /// How many bytes.
    pub len: usize,
    /// What became of it; the device sets it: 0, or an errno. ENOSPC: it is full. ENODEV: it is gone for good.
    pub result: i32,
}

/// Pages to be read from a device. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_load {
    /// The first page of the device to read.
    pub page: u64,
    /// Where one or more whole pages go, aligned to the page size.
    pub bytes: *mut c_void,
    /// How many bytes.
    pub len: usize,
    /// What became of it; the device sets it: 0, or an errno. EBADMSG: what is there is not what was stored.
    pub result: i32,
}

/// Bytes to be copied from one device to another. This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_peer_copy {
    /// Where they go, in bytes from the start of the device's memory.
    pub to: u64,
    /// Where they are, in bytes from the start of the peer's.
    pub from: u64,
    /// How many.
    pub bytes: u64,
    /// What became of it; the device sets it: 0, or an errno. EOPNOTSUPP: it is to go through the host.
    pub result: i32,
}

/// A device: what it is, and what it does. `context` is passed to each function.
///
/// Functions are called by faulting threads and by those of the space, concurrently; no two at a time are about the same page.
/// They run with pages locked, and where faults are delivered by signal also inside of the handler of SIGBUS. So they must not
/// touch memory that a space manages, nor wait for a lock that somebody holds who does (or whose handler of a signal does: block
/// signals while it is held), nor allocate from a heap that is managed, nor call this library (PS_ERR_REENTRANT), nor end by
/// longjmp or a C++ exception.
///
/// Nothing is believed where it can be checked: a result that was not set counts as a failure; a load that fails is tried once
/// more, and if it fails again its page is lost (rule Z9), alone; a page that could not be stored stays in RAM or goes elsewhere.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_device_ops {
    /// sizeof(struct ps_device_ops).
    pub size: usize,
    /// Whatever the functions need.
    pub context: *mut c_void,
    /// For reports and errors; at most 63 bytes.
    pub name: *const c_char,
    /// Pages it can number, from 0 on, of ps_page_size() bytes. What it really holds may be less: ENOSPC says so.
    pub pages: u64,
    /// The bytes that bound it, for reports; 0 where the pages do.
    pub capacity_bytes: u64,
    /// PS_MEMORY_PRIVATE or PS_MEMORY_COHERENT (rule Z5).
    pub memory: u32,
    /// PS_DEVICE_SLOW and so on.
    pub flags: u32,
    /// Milliseconds that a call has, or 0. After the first that takes longer the device is gone for good. Costs two wake-ups
    /// and a copy for each call: for a device that may hang.
    pub deadline_ms: u64,
    /// Writes pages, all of the batch; sets each result. A page may be written again without having been freed. After an error
    /// the page holds what it held, or nothing; it is freed then. Needed.
    pub store: Option<unsafe extern "C" fn(context: *mut c_void, batch: *mut ps_store, count: usize)>,
    /// Reads pages that were written, all of the batch; sets each result. On error the bytes may be anything. Needed.
    pub load: Option<unsafe extern "C" fn(context: *mut c_void, batch: *mut ps_load, count: usize)>,
    /// These pages are not needed any more: exactly once for each page that was stored (rule Z6). Needed.
    pub freed: Option<unsafe extern "C" fn(context: *mut c_void, first: u64, count: u64)>,
    /// Sets `*same` to whether `page` holds exactly these bytes, of one page. Returns 0, or an errno. Needed with
    /// PS_DEVICE_COMPARES.
    pub holds: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            page: u64,
            bytes: *const c_void,
            len: usize,
            same: *mut u32,
        ) -> c_int,
    >,
    /// What it takes up by its own account, for reports: bytes now, and the most. May be null.
    pub usage: Option<unsafe extern "C" fn(context: *mut c_void, used_bytes: *mut u64, peak_bytes: *mut u64)>,
    /// Where the memory of `page` is for the CPU to map: a descriptor of a file or a device node, and bytes from its start. Pages
    /// that follow each other lie side by side. Returns 0, or an errno. The descriptor stays open as long as the device is there.
    /// Needed with PS_MEMORY_COHERENT.
    pub shared:
        Option<unsafe extern "C" fn(context: *mut c_void, page: u64, fd: *mut c_int, offset: *mut u64) -> c_int>,
    /// Makes pages zero without a transfer. Returns 0, or an errno. May be null.
    pub clear: Option<unsafe extern "C" fn(context: *mut c_void, first: u64, count: u64) -> c_int>,
    /// Copies bytes from the memory of a peer to its own, without the host (rule G6); sets each result. The peer is a device with
    /// this same function, and may be this device. May be null.
    pub copy_from: Option<
        unsafe extern "C" fn(context: *mut c_void, peer_context: *mut c_void, batch: *mut ps_peer_copy, count: usize),
    >,
    /// The process is about to fork; nothing is in flight. May be null.
    pub before_fork: Option<unsafe extern "C" fn(context: *mut c_void)>,
    /// The process has forked; called in both, with `child` 0 or 1 (rule G12). May be null.
    pub after_fork: Option<unsafe extern "C" fn(context: *mut c_void, child: c_int)>,
    /// The device belongs to no space any more, and no other function is called again. Once for each device that was taken; not
    /// for one that was refused. May be null.
    pub destroy: Option<unsafe extern "C" fn(context: *mut c_void)>,
    /// How it translates addresses, of a device that runs code (rule G1); null for one that does not. Copied.
    pub mmu: *const ps_mmu_ops,
}

// SAFETY: repr(C), begins with its size; words of eight bytes, but for two of four that follow each other; pointers and functions
// that may be null.
unsafe impl Versioned for ps_device_ops {}

/// What is kept of a device in C.
pub(crate) struct Parts {
    pub(crate) ops: ps_device_ops,
    name: [u8; NAME],
    pub(crate) mmu: Option<CMmu>,
    /// The handle of its port, or 0.
    pub(crate) port: AtomicU64,
    /// It belongs to a space for good, and is to be destroyed.
    taken: AtomicBool,
}

// SAFETY: what C has said of itself: its functions may be called by any thread, and by several at a time. The rest is constant.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

impl Drop for Parts {
    fn drop(&mut self) {
        if let Some(destroy) = self.ops.destroy.filter(|_| self.taken.load(Ordering::Relaxed)) {
            // SAFETY: a function of the device, for the last time.
            inside(Inside::Device, || unsafe { destroy(self.ops.context) });
        }
        let port = *self.port.get_mut();
        if port != 0 {
            // It was cut before: whoever comes by it now hears that it is gone.
            let _ = table::close::<Port>(port, "port");
        }
    }
}

/// A device in C.
pub(crate) struct CDevice(Shared<Parts>);

/// Whether the space has taken a device for good.
pub(crate) struct Ownership(Shared<Parts>);

impl Ownership {
    pub(crate) fn take(self) {
        self.0.taken.store(true, Ordering::Relaxed);
    }
}

impl CDevice {
    /// The device that `ops` describes, if nothing is missing (rule Z11).
    ///
    /// # Safety
    /// `ops` and what it points to are null or good, and its functions are what they are said to be.
    pub(crate) unsafe fn new(ops: *const ps_device_ops, name: &str) -> Result<CDevice, Failure> {
        // SAFETY: the caller's promise, here and below.
        let ops = unsafe { args::versioned(ops, name) }?;
        // SAFETY: as above.
        let label = unsafe { args::text(ops.name, &format!("{name}.name")) }?;
        if label.is_empty() || label.len() >= NAME {
            return Err(Failure::argument(format_args!(
                "{name}.name {label:?} does not have 1 to {} bytes",
                NAME - 1
            )));
        }
        let missing = |what: &str, why: &str| {
            Failure::argument(format_args!(
                "{name}: device {label:?} has no function `{what}`, which {why} (rule Z11)"
            ))
        };
        let always = "every device needs";
        ops.store.ok_or_else(|| missing("store", always))?;
        ops.load.ok_or_else(|| missing("load", always))?;
        ops.freed.ok_or_else(|| missing("freed", always))?;
        let known = PS_DEVICE_SLOW | PS_DEVICE_COMPARES | PS_DEVICE_IN_RAM | PS_DEVICE_VERIFIED;
        args::flags(ops.flags, known | PS_DEVICE_TAKES_EVICTED | PS_DEVICE_ONLY_SENT, &format!("{name}.flags"))?;
        match ops.memory {
            PS_MEMORY_PRIVATE => {}
            PS_MEMORY_COHERENT => {
                ops.shared.ok_or_else(|| missing("shared", "one with coherent memory needs"))?;
            }
            other => {
                let why = "there are PS_MEMORY_PRIVATE and PS_MEMORY_COHERENT";
                return Err(Failure::argument(format_args!("{name}.memory is {other}: {why}")));
            }
        }
        if ops.flags & PS_DEVICE_COMPARES != 0 {
            ops.holds.ok_or_else(|| missing("holds", "one that compares needs"))?;
        }
        // SAFETY: as above.
        let mmu = if ops.mmu.is_null() { None } else { Some(unsafe { CMmu::new(ops.mmu, &format!("{name}.mmu")) }?) };
        let mut bytes = [0; NAME];
        bytes[..label.len()].copy_from_slice(label.as_bytes());
        let (port, taken) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(CDevice(Shared::new(Parts { ops, name: bytes, mmu, port, taken })))
    }

    pub(crate) fn ownership(&self) -> Ownership {
        Ownership(self.0.clone())
    }

    /// How long its calls may take.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        (self.0.ops.deadline_ms > 0).then(|| Duration::from_millis(self.0.ops.deadline_ms))
    }

    /// The same device, given up when it takes longer.
    pub(crate) fn within(self, limit: Duration) -> Result<Deadline, Failure> {
        Deadline::new(self, limit).map_err(|e| {
            Failure::new(ps_status::PS_ERR_SYSTEM, format!("threads for a device with a deadline cannot be had: {e}"))
        })
    }

    fn ops(&self) -> &ps_device_ops {
        &self.0.ops
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.0
    }
}

impl Device for CDevice {
    fn describe(&self) -> Descriptor {
        let end = self.0.name.iter().position(|b| *b == 0).unwrap_or(NAME);
        let name = String::from_utf8_lossy(&self.0.name[..end]);
        let has = |flag| self.ops().flags & flag != 0;
        let mut descriptor = match self.ops().memory {
            PS_MEMORY_COHERENT => Descriptor::coherent(name, self.ops().pages),
            _ => Descriptor::private(name, self.ops().pages),
        };
        descriptor.capacity_bytes = self.ops().capacity_bytes;
        descriptor.slow = has(PS_DEVICE_SLOW);
        descriptor.compares = has(PS_DEVICE_COMPARES);
        descriptor.in_ram = has(PS_DEVICE_IN_RAM);
        descriptor.verified = has(PS_DEVICE_VERIFIED);
        descriptor.takes_evicted = match descriptor.memory {
            MemoryType::Private => !has(PS_DEVICE_ONLY_SENT),
            _ => has(PS_DEVICE_TAKES_EVICTED),
        };
        descriptor
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        let Some(store) = self.ops().store else { return };
        for part in batch.chunks_mut(PART) {
            let none = ps_store { page: 0, bytes: std::ptr::null(), len: 0, result: PS_NO_ANSWER };
            let mut asked = [none; PART];
            for (to, from) in asked.iter_mut().zip(part.iter()) {
                (to.page, to.bytes, to.len) = (from.page, from.bytes.as_ptr().cast(), from.bytes.len());
            }
            // SAFETY: a function of the device, with as many transfers as it is told.
            inside(Inside::Device, || unsafe { store(self.ops().context, asked.as_mut_ptr(), part.len()) });
            part.iter_mut().zip(&asked).for_each(|(to, from)| to.result = answer(from.result));
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        let Some(load) = self.ops().load else { return };
        for part in batch.chunks_mut(PART) {
            let none = ps_load { page: 0, bytes: std::ptr::null_mut(), len: 0, result: PS_NO_ANSWER };
            let mut asked = [none; PART];
            for (to, from) in asked.iter_mut().zip(part.iter_mut()) {
                (to.page, to.bytes, to.len) = (from.page, from.bytes.as_mut_ptr().cast(), from.bytes.len());
            }
            // SAFETY: as in `store`.
            inside(Inside::Device, || unsafe { load(self.ops().context, asked.as_mut_ptr(), part.len()) });
            part.iter_mut().zip(&asked).for_each(|(to, from)| to.result = answer(from.result));
        }
    }

    fn freed(&self, pages: DevicePages) {
        if let Some(freed) = self.ops().freed {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { freed(self.ops().context, pages.first, pages.count) });
        }
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let holds = self.ops().holds.ok_or(DeviceError::Unsupported)?;
        let mut same = 0;
        let (at, len) = (bytes.as_ptr().cast(), bytes.len());
        // SAFETY: a function of the device.
        let said = inside(Inside::Device, || unsafe { holds(self.ops().context, page, at, len, &mut same) });
        answer(said).map(|()| same != 0)
    }

    fn usage(&self) -> Option<Usage> {
        let usage = self.ops().usage?;
        let mut numbers = Usage::default();
        let (used, peak) = (&raw mut numbers.used_bytes, &raw mut numbers.peak_bytes);
        // SAFETY: a function of the device.
        inside(Inside::Device, || unsafe { usage(self.ops().context, used, peak) });
        Some(numbers)
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        let shared = self.ops().shared?;
        let (mut fd, mut offset) = (-1, 0);
        // SAFETY: a function of the device.
        let said = inside(Inside::Device, || unsafe { shared(self.ops().context, page, &mut fd, &mut offset) });
        if answer(said).is_err() || fd < 0 {
            return None;
        }
        // SAFETY: not -1; the device has promised that it stays open as long as the device is there. One that is not open is
        // refused by the kernel.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        Some(SharedMemory { file, offset })
    }

    fn mmu(&self) -> Option<&dyn Mmu> {
        self.0.mmu.as_ref().map(|_| self as &dyn Mmu)
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        let clear = self.ops().clear.ok_or(DeviceError::Unsupported)?;
        // SAFETY: a function of the device.
        answer(inside(Inside::Device, || unsafe { clear(self.ops().context, pages.first, pages.count) }))
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        let peer = peer.as_any().and_then(|peer| peer.downcast_ref::<CDevice>());
        // Another driver's context is none of this one's business.
        let same = |peer: &&CDevice| {
            let [ours, theirs] = [self.ops(), peer.ops()].map(|ops| ops.copy_from.map(|f| f as usize));
            ours == theirs
        };
        let Some((copy, peer)) = self.ops().copy_from.zip(peer.filter(same)) else {
            batch.iter_mut().for_each(|copy| copy.result = Err(DeviceError::Unsupported));
            return;
        };
        for part in batch.chunks_mut(PART) {
            let mut asked = [ps_peer_copy { to: 0, from: 0, bytes: 0, result: PS_NO_ANSWER }; PART];
            for (to, from) in asked.iter_mut().zip(part.iter()) {
                (to.to, to.from, to.bytes) = (from.to, from.from, from.bytes);
            }
            let contexts = (self.ops().context, peer.ops().context);
            // SAFETY: as in `store`; the peer's context is one that this function knows.
            inside(Inside::Device, || unsafe { copy(contexts.0, contexts.1, asked.as_mut_ptr(), part.len()) });
            part.iter_mut().zip(&asked).for_each(|(to, from)| to.result = answer(from.result));
        }
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn before_fork(&self) {
        if let Some(before) = self.ops().before_fork {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { before(self.ops().context) });
        }
    }

    fn after_fork(&self, side: ForkSide) {
        if let Some(after) = self.ops().after_fork {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { after(self.ops().context, (side == ForkSide::Child) as c_int) });
        }
    }
}
