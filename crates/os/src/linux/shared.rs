//! Memory of a device that the CPU addresses: a file on any file system, huge pages, or a device node, by which the device
//! is read and written, and from which its pages are mapped in place.
//!
//! A file that somebody may cut short is read and written by system calls: what is missing is an error there, where an access
//! to a mapping would raise SIGBUS in the middle of the engine. What knows no such calls is mapped as a whole.
//!
//! [`Flush`] says what makes writes durable: cache lines written back, where the memory itself is durable and the kernel
//! promises that the file needs nothing more (MAP_SYNC, device nodes), and `msync` everywhere else.

use super::files::OurFd;
use super::map::{claim, unclaim};
use peerspace_core::addr::{Va, VaRange};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// What makes writes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Writing back the cache lines.
    CacheLines,
    /// msync(2).
    Sync,
}

impl Flush {
    /// What it takes for mappings of `file`, which has at least a page.
    pub fn of(file: BorrowedFd<'_>, is_device_node: bool) -> Flush {
        if can_write_back_lines() && (is_device_node || is_synchronous(file)) {
            Flush::CacheLines
        } else {
            Flush::Sync
        }
    }

    /// Makes what was written to `range`, memory of a device in place, durable.
    ///
    /// # Errors
    /// When it may not be.
    pub fn flush(self, range: VaRange) -> Result<(), Errno> {
        match self {
            Flush::CacheLines => {
                write_back_lines(range);
                Ok(())
            }
            Flush::Sync => {
                let page = rustix::param::page_size() as u64;
                let start = range.start.0 / page * page;
                // SAFETY: writes pages to where they belong; none changes.
                unsafe { rustix::mm::msync(start as *mut _, (range.end.0 - start) as usize, MsyncFlags::SYNC) }
            }
        }
    }
}

/// Whether mappings of `file` can be synchronous (MAP_SYNC): blocks are allocated before a write succeeds, and durable.
fn is_synchronous(file: BorrowedFd<'_>) -> bool {
    let page = rustix::param::page_size();
    let flags = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
    // SAFETY: a new mapping at an address that the kernel chooses, gone again before anybody knows of it.
    unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), page, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0)
            .and_then(|at| rustix::mm::munmap(at, page))
            .is_ok()
    }
}

#[cfg(target_arch = "x86_64")]
fn can_write_back_lines() -> bool {
    true
}

#[cfg(target_arch = "x86_64")]
fn write_back_lines(range: VaRange) {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _mm_sfence};
    const CLFLUSHOPT: u32 = 1 << 23;
    const CLWB: u32 = 1 << 24;
    let more = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).ebx } else { 0 };
    // In units of 8 bytes; there is no processor of this kind that does not say.
    let line = (((__cpuid(1).ebx >> 8) & 0xff) as u64 * 8).max(16);
    for at in (range.start.0 / line * line..range.end.0).step_by(line as usize) {
        // SAFETY: an address of mapped memory, no byte of which changes.
        unsafe {
            if more & CLWB != 0 {
                asm!("clwb [{}]", in(reg) at, options(nostack, preserves_flags));
            } else if more & CLFLUSHOPT != 0 {
                asm!("clflushopt [{}]", in(reg) at, options(nostack, preserves_flags));
            } else {
                asm!("clflush [{}]", in(reg) at, options(nostack, preserves_flags));
            }
        }
    }
    // SAFETY: every processor of this architecture has it.
    unsafe { _mm_sfence() };
}

#[cfg(target_arch = "aarch64")]
fn can_write_back_lines() -> bool {
    // SAFETY: reads a number that the kernel gave the process.
    unsafe { libc::getauxval(libc::AT_HWCAP) & libc::HWCAP_DCPOP != 0 }
}

#[cfg(target_arch = "aarch64")]
fn write_back_lines(range: VaRange) {
    use std::arch::asm;
    let id: u64;
    // SAFETY: a register that programs may read.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) id, options(nomem, nostack, preserves_flags)) };
    let line = 4u64 << ((id >> 16) & 0xf);
    for at in (range.start.0 / line * line..range.end.0).step_by(line as usize) {
        // SAFETY: an address of mapped memory, no byte of which changes. (To the point of persistence, DC CVAP.)
        unsafe { asm!("sys #3, c7, c12, #1, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: waits for what came before.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn can_write_back_lines() -> bool {
    false
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write_back_lines(_: VaRange) {
    unreachable!("nobody chooses this here")
}

/// A part of a file, mapped and shared. Not for parts that somebody may cut off the file.
pub struct SharedMapping(VaRange);

// SAFETY: memory that any thread may use; who uses which of it is for the device's owners to see to.
unsafe impl Send for SharedMapping {}
// SAFETY: as above.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// The errno of mmap.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<SharedMapping, Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, offset)? };
        let range = VaRange { start: Va(at as u64), end: Va(at as u64 + len as u64) };
        claim(range);
        Ok(SharedMapping(range))
    }

    /// The addresses.
    pub fn range(&self) -> VaRange {
        self.0
    }

    /// In a forked child, where nobody uses it: maps another file in its place.
    ///
    /// # Errors
    /// The errno of mmap; it is shared with the parent then, as before.
    pub fn renew(&self, file: BorrowedFd<'_>, offset: u64) -> Result<(), Errno> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        let (at, len) = (self.0.start.0 as *mut _, self.0.len() as usize);
        // SAFETY: the mapping is ours. Words of it are used as atomics alone, by nobody just now.
        unsafe { rustix::mm::mmap(at, len, prot, flags, file, offset) }.map(drop)
    }

    fn at(&self, at: u64, len: usize) -> *mut u8 {
        let end = at.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.0.len()), "{len} bytes at {at} are not in {}", self.0);
        (self.0.start.0 + at) as *mut u8
    }

    /// Copies bytes from `at` on to `to`.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        // SAFETY: inside of the mapping; whoever reads pages of a device owns them, so nobody writes meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(self.at(at, to.len()), to.as_mut_ptr(), to.len()) };
    }

    /// Copies `from` to `at`. Eight bytes at a multiple of eight are one store.
    pub fn write(&self, at: u64, from: &[u8]) {
        if let (true, Ok(word)) = (at.is_multiple_of(8), <[u8; 8]>::try_from(from)) {
            return self.word(at).store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        // SAFETY: inside of the mapping; whoever writes pages of a device owns them.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at(at, from.len()), from.len()) };
    }

    /// The word at byte `at`, a multiple of 8.
    pub fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: inside of the mapping, which lives as long as `self`, and aligned; only ever used as an atomic.
        unsafe { &*self.at(at, 8).cast::<AtomicU64>() }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        unclaim(self.0);
        // SAFETY: the mapping is ours, and nobody has a reference into it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.start.0 as *mut _, self.0.len() as usize) };
    }
}

impl fmt::Debug for SharedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMapping({})", self.0)
    }
}

/// A file of memory.
#[derive(Debug)]
pub struct SharedFile {
    file: OurFd,
    len: u64,
    /// Others may cut it short.
    may_shrink: bool,
    /// All of it, where there is no other way.
    mapping: Option<SharedMapping>,
}

impl SharedFile {
    /// The first `len` bytes of `file`. `by_mapping`: it knows no read and write.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn new(file: OwnedFd, len: u64, by_mapping: bool) -> Result<SharedFile, Errno> {
        let mapping = by_mapping.then(|| SharedMapping::new(file.as_fd(), 0, len as usize)).transpose()?;
        Ok(SharedFile { file: OurFd::new(file)?, len, may_shrink: false, mapping })
    }

    /// In a forked child: `file`, as long, takes the place of the one that is shared with the parent, under the same number.
    ///
    /// # Errors
    /// When the system refuses; nothing may be done with the file then.
    pub fn renew(&self, file: OwnedFd) -> Result<(), Errno> {
        if let Some(mapping) = &self.mapping {
            mapping.renew(file.as_fd(), 0)?;
        }
        self.file.replace(file)
    }

    /// The same file, which others may cut short: then nothing is written to it any more. It would become longer again, and
    /// zeros be found where data were.
    #[must_use]
    pub fn that_may_shrink(self) -> SharedFile {
        SharedFile { may_shrink: true, ..self }
    }

    /// The file itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads bytes from `at` on. Returns how many came: fewer only where the file has become shorter.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn read(&self, at: u64, to: &mut [u8]) -> Result<usize, Errno> {
        if let Some(mapping) = &self.mapping {
            mapping.read(at, to);
            return Ok(to.len());
        }
        let mut done = 0;
        while done < to.len() {
            match rustix::io::pread(&self.file, &mut to[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Writes bytes to `at`.
    ///
    /// # Errors
    /// When the system refuses; how much was written is not known then.
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        assert!(at.checked_add(from.len() as u64).is_some_and(|end| end <= self.len), "a write goes beyond the end");
        if let Some(mapping) = &self.mapping {
            mapping.write(at, from);
            return Ok(());
        }
        if self.may_shrink && rustix::fs::fstat(&self.file)?.st_size < self.len as i64 {
            return Err(Errno::IO);
        }
        let mut done = 0;
        while done < from.len() {
            match rustix::io::pwrite(&self.file, &from[done..], at + done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Makes what was written to `len` bytes from `at` on durable.
    ///
    /// # Errors
    /// When it may not be.
    pub fn flush(&self, how: Flush, at: u64, len: u64) -> Result<(), Errno> {
        match &self.mapping {
            Some(mapping) => {
                let start = mapping.range().start.0 + at;
                how.flush(VaRange { start: Va(start), end: Va(start + len) })
            }
            // What was written by calls the kernel has, wherever it keeps it.
            None => rustix::fs::fdatasync(&self.file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(len: u64) -> OwnedFd {
        let file = memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    #[test]
    fn calls_and_mappings_see_the_same_bytes() {
        let file = memfd(1 << 16);
        let by_calls = SharedFile::new(file.try_clone().unwrap(), 1 << 16, false).unwrap();
        let by_mapping = SharedFile::new(file, 1 << 16, true).unwrap();
        by_calls.write(5000, b"by calls").unwrap();
        by_mapping.write(9000, b"by mapping").unwrap();
        let mut out = [0; 10];
        assert_eq!(by_mapping.read(5000, &mut out[..8]), Ok(8));
        assert_eq!(&out[..8], b"by calls");
        assert_eq!(by_calls.read(9000, &mut out), Ok(10));
        assert_eq!(&out, b"by mapping");
    }

    #[test]
    fn what_was_cut_off_is_missing_and_not_zero() {
        let file = memfd(1 << 16);
        let memory = SharedFile::new(file.try_clone().unwrap(), 1 << 16, false).unwrap();
        ftruncate(&file, 6000).unwrap();
        assert_eq!(memory.read(4096, &mut [0; 4096]), Ok(6000 - 4096));
        assert_eq!(memory.read(8192, &mut [0; 4096]), Ok(0));
        // Nor does it become zero because something is written behind it.
        let memory = memory.that_may_shrink();
        assert_eq!(memory.write(12288, &[7; 4096]), Err(Errno::IO));
        assert_eq!(memory.read(8192, &mut [0; 4096]), Ok(0));
        ftruncate(&file, 1 << 16).unwrap();
        memory.write(12288, &[7; 4096]).unwrap();
    }

    #[test]
    fn flushing_changes_nothing() {
        let memory = SharedFile::new(memfd(1 << 16), 1 << 16, true).unwrap();
        let pattern: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        memory.write(777, &pattern).unwrap();
        for how in [Flush::Sync, Flush::CacheLines] {
            memory.flush(how, 777, 1000).unwrap();
            let mut out = vec![0; 1000];
            memory.read(777, &mut out).unwrap();
            assert_eq!(out, pattern);
        }
        assert_eq!(Flush::of(memory.fd(), false), Flush::Sync, "a memfd is no durable memory");
        assert!(Flush::of(memory.fd(), true) == Flush::CacheLines || !can_write_back_lines());
    }
}
