//! Devices in C that run code: their translations, and their ports (rules G1 to G4, G10, G13).

use crate::args::{self, Versioned};
use crate::device::CDevice;
use crate::error::{Failure, Inside, answer, call_from, inside, ps_status};
use crate::table;
use peerspace::device::DeviceError;
use peerspace::device::mmu::{DeviceAccess, Mapping, Mmu, MmuDescriptor, Mode, Port, Progress, Target};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A device's way to its space: by it the device has its faults resolved, and accesses the host's memory in place. It needs no
/// release: it is good until the device is destroyed. To be used by the device's own threads, never inside of a callback.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_port {
    /// A handle; 0 is none.
    pub id: u64,
}

/// What a device wants to do with a page.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_access {
    /// It reads.
    PS_ACCESS_READ = 0,
    /// It writes, or reads and writes.
    PS_ACCESS_WRITE = 1,
    /// It reads and writes in one step, for which nobody else may access the page (rule G14).
    PS_ACCESS_ATOMIC = 2,
}

/// Where a device's accesses go, as long as no hint says otherwise (rule G9).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_mode {
    /// To its own memory: a page is on the CPU or on one device, and moves to whoever uses it.
    PS_MODE_EXCLUSIVE = 0,
    /// To where the page is on the host: nothing moves. Needs PS_MMU_REMOTE.
    PS_MODE_SHARE = 1,
    /// To its own memory: reads get copies, all of which go when anybody writes; writes move the page.
    PS_MODE_REPLICATE = 2,
}

/// What a translation leads to.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub enum ps_target {
    /// The device's own memory.
    PS_TARGET_OWN = 0,
    /// Memory of the host at the same addresses: to be accessed by ps_port_read and ps_port_write alone.
    PS_TARGET_HOST = 1,
    /// Zeros. Never writable.
    PS_TARGET_ZERO = 2,
}

/// The MMU can map memory of the host in place, and access it through its port (rule G10).
pub const PS_MMU_REMOTE: u32 = 1;
/// It can map a page of zeros that takes up no memory (rule G3).
pub const PS_MMU_ZERO_PAGE: u32 = 2;
/// It cannot fault: its ranges are mapped for the duration of a launch.
pub const PS_MMU_NO_FAULTS: u32 = 4;

/// Translations that a callback gets at once.
const PART: usize = 32;

/// A translation to be entered: of one page, or of a block of ps_block_size() bytes that is aligned to its size on both sides.
/// This structure stays as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_mapping {
    /// Its first address.
    pub address: u64,
    /// Its bytes.
    pub bytes: u64,
    /// The first page of the device's own memory, with PS_TARGET_OWN.
    pub page: u64,
    /// An enum ps_target.
    pub target: u32,
    /// The device may write; otherwise a write is a fault.
    pub writable: u32,
}

/// The translations of a device that runs code. `context` of the device is passed to each function.
///
/// What the device promises: when `unmap` has returned 0 without a fence, or its fence is reached, the device makes no access by
/// those addresses any more before they are mapped again. Whoever does not keep to it is quarantined: its port is cut, nothing is
/// asked of it again, and what it alone holds is lost (rule Z9). The functions return soon, and never call this library. They may
/// wait for accesses under way by ps_port_read and ps_port_write, and not for a ps_port_fault.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ps_mmu_ops {
    /// sizeof(struct ps_mmu_ops).
    pub size: usize,
    /// The addresses it can translate begin here (rule G13).
    pub first_address: u64,
    /// And end here, exclusively; 0 for all addresses of a program.
    pub end_address: u64,
    /// Milliseconds that it may take to stop using pages; 0 for two seconds.
    pub deadline_ms: u64,
    /// An enum ps_mode.
    pub mode: u32,
    /// PS_MMU_REMOTE and so on.
    pub flags: u32,
    /// The device belongs to a space, and resolves its faults by `port`. Called once, before anything else. Needed unless it
    /// cannot fault.
    pub attached: Option<unsafe extern "C" fn(context: *mut c_void, port: ps_port)>,
    /// Enters translations, in place of those there are for the same addresses. Returns 0, or an errno when it could not enter
    /// all of them; all of the batch are taken away then. Needed.
    pub map: Option<unsafe extern "C" fn(context: *mut c_void, batch: *const ps_mapping, count: usize) -> c_int>,
    /// Takes away the translations of the addresses from `start` to `end`, exclusively: whole pages, some of which may have none. A
    /// block of which a part is meant goes as a whole. A device without `halt` is also asked for all its addresses at once: it had
    /// best look through its translations then, and not through the addresses. Where that is not done on return, sets `*fence` to a
    /// number, not 0, of which `is_done` is asked. Returns 0, or an errno when it cannot: the device is quarantined. Needed.
    pub unmap: Option<unsafe extern "C" fn(context: *mut c_void, start: u64, end: u64, fence: *mut u64) -> c_int>,
    /// Sets `*done` to whether the request with this fence is done. Returns 0, or an errno when it will never be. Needed where
    /// `unmap` sets fences.
    pub is_done: Option<unsafe extern "C" fn(context: *mut c_void, fence: u64, done: *mut u32) -> c_int>,
    /// Keeps addresses free for a region of the space (rule G13). Returns 0, or an errno when something else of the device's is
    /// there; the space looks elsewhere then. May be null.
    pub reserve: Option<unsafe extern "C" fn(context: *mut c_void, start: u64, end: u64) -> c_int>,
    /// Gives addresses back that were reserved. May be null.
    pub release: Option<unsafe extern "C" fn(context: *mut c_void, start: u64, end: u64)>,
    /// Returns whether the device has used a page among these addresses since it was last asked. What was not used is evicted
    /// first. May be null.
    pub take_accessed: Option<unsafe extern "C" fn(context: *mut c_void, start: u64, end: u64) -> c_int>,
    /// Halts the device: from when this has returned 0 without a fence, or its fence is reached, until `go_on`, it makes no access
    /// by any translation. Translations stay, and faults that its port is resolving go on. For moments in which the meaning of
    /// addresses changes without its having been told before (rule G5). Returns 0, or an errno when it cannot: the device is
    /// quarantined. May be null together with `go_on`: then all of its translations are taken away instead.
    pub halt: Option<unsafe extern "C" fn(context: *mut c_void, fence: *mut u64) -> c_int>,
    /// Ends what `halt` began.
    pub go_on: Option<unsafe extern "C" fn(context: *mut c_void)>,
}

// SAFETY: repr(C), begins with its size; words of eight bytes, but for two of four that follow each other; functions that may be
// null.
unsafe impl Versioned for ps_mmu_ops {}

/// An MMU in C, of the device that has its context.
pub(crate) struct CMmu(ps_mmu_ops);

impl CMmu {
    /// The MMU that `ops` describes, if nothing is missing (rule Z11).
    ///
    /// # Safety
    /// `ops` is good, and its functions are what they are said to be.
    pub(crate) unsafe fn new(ops: *const ps_mmu_ops, name: &str) -> Result<CMmu, Failure> {
        // SAFETY: the caller's promise.
        let ops = unsafe { args::versioned(ops, name) }?;
        let missing = |what: &str| {
            Failure::argument(format_args!("{name} has no function `{what}`, which it needs (rule Z11)"))
        };
        ops.map.ok_or_else(|| missing("map"))?;
        ops.unmap.ok_or_else(|| missing("unmap"))?;
        args::flags(ops.flags, PS_MMU_REMOTE | PS_MMU_ZERO_PAGE | PS_MMU_NO_FAULTS, &format!("{name}.flags"))?;
        if ops.flags & PS_MMU_NO_FAULTS == 0 {
            ops.attached.ok_or_else(|| missing("attached"))?;
        }
        if ops.halt.is_some() != ops.go_on.is_some() {
            return Err(missing(if ops.halt.is_some() { "go_on" } else { "halt" }));
        }
        if mode(ops.mode, name)? == Mode::Share && ops.flags & PS_MMU_REMOTE == 0 {
            return Err(Failure::argument(format_args!("{name}.mode is PS_MODE_SHARE, which needs PS_MMU_REMOTE")));
        }
        if ops.end_address != 0 && ops.end_address <= ops.first_address {
            let (first, end) = (ops.first_address, ops.end_address);
            return Err(Failure::argument(format_args!("{name}: there is no address from {first:#x} to {end:#x}")));
        }
        Ok(CMmu(ops))
    }
}

fn mode(number: u32, name: &str) -> Result<Mode, Failure> {
    args::choice(number, &[Mode::Exclusive, Mode::Share, Mode::Replicate], &format!("{name}.mode"))
}

impl CDevice {
    fn translations(&self) -> Option<(&ps_mmu_ops, *mut c_void)> {
        self.parts().mmu.as_ref().map(|mmu| (&mmu.0, self.parts().ops.context))
    }

    /// One of its functions, if it has that, and what is passed to it.
    fn function<F>(&self, of: impl FnOnce(&ps_mmu_ops) -> Option<F>) -> Option<(F, *mut c_void)> {
        let (ops, context) = self.translations()?;
        Some((of(ops)?, context))
    }
}

/// What a fence that a function has set, or not, says.
fn progress(fence: u64) -> Progress {
    if fence == 0 { Progress::Done } else { Progress::Pending(fence) }
}

impl Mmu for CDevice {
    fn describe(&self) -> MmuDescriptor {
        let Some((ops, _)) = self.translations() else { return MmuDescriptor::new(Mode::default()) };
        let has = |flag| ops.flags & flag != 0;
        // It was looked at when the device was made.
        let mut descriptor = MmuDescriptor::new(mode(ops.mode, "mmu").unwrap_or_default());
        if ops.end_address != 0 || ops.first_address != 0 {
            let end = if ops.end_address == 0 { descriptor.addresses.end } else { ops.end_address };
            descriptor.addresses = ops.first_address..end;
        }
        if ops.deadline_ms != 0 {
            descriptor.deadline = Duration::from_millis(ops.deadline_ms);
        }
        descriptor.remote = has(PS_MMU_REMOTE);
        descriptor.zero_page = has(PS_MMU_ZERO_PAGE);
        descriptor.faults = !has(PS_MMU_NO_FAULTS);
        descriptor
    }

    fn attached(&self, port: Port) {
        // Without a handle its faults fail.
        let id = table::open(port).unwrap_or(0);
        self.parts().port.store(id, Ordering::Relaxed);
        if let Some((attached, context)) = self.function(|ops| ops.attached) {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { attached(context, ps_port { id }) });
        }
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let (map, context) = self.function(|ops| ops.map).ok_or(DeviceError::Unsupported)?;
        for part in batch.chunks(PART) {
            let mut asked = [ps_mapping { address: 0, bytes: 0, page: 0, target: 0, writable: 0 }; PART];
            for (to, from) in asked.iter_mut().zip(part) {
                let (target, page) = match from.to {
                    Target::Own(page) => (ps_target::PS_TARGET_OWN, page),
                    Target::Host => (ps_target::PS_TARGET_HOST, 0),
                    Target::Zero => (ps_target::PS_TARGET_ZERO, 0),
                };
                let (target, writable) = (target as u32, from.writable as u32);
                *to = ps_mapping { address: from.va, bytes: from.bytes, page, target, writable };
            }
            // SAFETY: a function of the device, with as many translations as it is told.
            answer(inside(Inside::Device, || unsafe { map(context, asked.as_ptr(), part.len()) }))?;
        }
        Ok(())
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        let (unmap, context) = self.function(|ops| ops.unmap).ok_or(DeviceError::Unsupported)?;
        let mut fence = 0;
        // SAFETY: a function of the device.
        answer(inside(Inside::Device, || unsafe { unmap(context, addresses.start, addresses.end, &mut fence) }))?;
        Ok(progress(fence))
    }

    fn halt(&self) -> Result<Progress, DeviceError> {
        let (halt, context) = self.function(|ops| ops.halt).ok_or(DeviceError::Unsupported)?;
        let mut fence = 0;
        // SAFETY: a function of the device.
        let said = answer(inside(Inside::Device, || unsafe { halt(context, &mut fence) }));
        // One that has the function, and cannot, is not to be taken for one that has it not.
        said.map_err(|e| if e == DeviceError::Unsupported { DeviceError::Io(libc::EOPNOTSUPP) } else { e })?;
        Ok(progress(fence))
    }

    fn go_on(&self) {
        if let Some((go_on, context)) = self.function(|ops| ops.go_on) {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { go_on(context) });
        }
    }

    fn is_done(&self, fence: u64) -> Result<bool, DeviceError> {
        let (is_done, context) = self.function(|ops| ops.is_done).ok_or(DeviceError::Unsupported)?;
        let mut done = 0;
        // SAFETY: a function of the device.
        answer(inside(Inside::Device, || unsafe { is_done(context, fence, &mut done) })).map(|()| done != 0)
    }

    fn reserve(&self, addresses: Range<u64>) -> bool {
        let Some((reserve, context)) = self.function(|ops| ops.reserve) else {
            return true;
        };
        // SAFETY: a function of the device.
        inside(Inside::Device, || unsafe { reserve(context, addresses.start, addresses.end) }) == 0
    }

    fn release(&self, addresses: Range<u64>) {
        if let Some((release, context)) = self.function(|ops| ops.release) {
            // SAFETY: a function of the device.
            inside(Inside::Device, || unsafe { release(context, addresses.start, addresses.end) });
        }
    }

    fn take_accessed(&self, addresses: Range<u64>) -> bool {
        let Some((take, context)) = self.function(|ops| ops.take_accessed) else {
            return false;
        };
        // SAFETY: a function of the device.
        inside(Inside::Device, || unsafe { take(context, addresses.start, addresses.end) }) != 0
    }
}

/// Resolves a fault of the device: an access to `address` that found no translation, or none that permits it; `access` is an
/// enum ps_access. Afterwards the access can be repeated. May take as long as a device takes to give a page back.
///
/// Errors: PS_ERR_RANGE where no memory of the space is, the device cannot translate, or the program's file has ended;
/// PS_ERR_MIGRATE for memory that stays where it is (rule G11), if the device is without PS_MMU_REMOTE or wants it alone;
/// PS_ERR_READ_ONLY; PS_ERR_PROTECTED; PS_ERR_LOST; PS_ERR_NO_ROOM; PS_ERR_PINNED; PS_ERR_NO_HEADWAY; PS_ERR_DEVICE; PS_ERR_CUT.
/// Nothing has changed for the device then.
#[unsafe(no_mangle)]
pub extern "C" fn ps_port_fault(port: ps_port, address: u64, access: u32) -> ps_status {
    call_from(Inside::Work, "ps_port_fault", || {
        let all = [DeviceAccess::Read, DeviceAccess::Write, DeviceAccess::Atomic];
        let access = args::choice(access, &all, "access")?;
        Ok(table::find::<Port>(port.id, "port")?.fault(address, access)?)
    })
}

/// Reads memory of the host that is mapped in place for the device, up to the end of the page.
///
/// Errors: PS_ERR_NOT_MAPPED when it is not: the device faults then; PS_ERR_CUT.
///
/// # Safety
/// `to` is null, or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_port_read(port: ps_port, address: u64, to: *mut c_void, len: usize) -> ps_status {
    call_from(Inside::Work, "ps_port_read", || {
        if len == 0 {
            return Ok(());
        }
        args::memory(to, len, "to")?;
        // SAFETY: the caller's promise; not null, and bytes need no alignment.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), len) };
        Ok(table::find::<Port>(port.id, "port")?.read(address, to)?)
    })
}

/// Writes memory of the host that is mapped in place for the device, and writable, up to the end of the page.
///
/// Errors: as for ps_port_read.
///
/// # Safety
/// `from` is null, or leads to `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ps_port_write(port: ps_port, address: u64, from: *const c_void, len: usize) -> ps_status {
    call_from(Inside::Work, "ps_port_write", || {
        if len == 0 {
            return Ok(());
        }
        args::memory(from, len, "from")?;
        // SAFETY: the caller's promise; not null, and bytes need no alignment.
        let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) };
        Ok(table::find::<Port>(port.id, "port")?.write(address, from)?)
    })
}

/// Says that so many accesses to the page of `address` went to the host of late: where they are many, the page moves.
#[unsafe(no_mangle)]
pub extern "C" fn ps_port_note_remote(port: ps_port, address: u64, accesses: u32) -> ps_status {
    call_from(Inside::Work, "ps_port_note_remote", || {
        table::find::<Port>(port.id, "port")?.note_remote(address, accesses);
        Ok(())
    })
}
