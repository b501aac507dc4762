//! What is mapped and what is populated: PAGEMAP_SCAN and `/proc/self/pagemap`, PROCMAP_QUERY and
//! `/proc/self/maps`.
//!
//! The newer interface is used where the kernel has it (6.7 and 6.11), the text or the table otherwise. Nothing
//! here allocates.

use super::files::OurFd;
use crate::kernel::CpuPage;
use peerspace_core::addr::{Va, VaRange};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

/// `/proc/self/pagemap`, open.
#[derive(Debug)]
pub struct Pagemap {
    fd: OurFd,
    scan: bool,
    page: u64,
}

#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;
/// Pagemap bits: present, or swapped out by the kernel.
const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;
const PM_FILE: u64 = 1 << 61;
/// Write-protected by a userfaultfd.
const PM_PROTECTED: u64 = 1 << 57;

const PAGEMAP: &str = "/proc/self/pagemap";
const MAPS: &str = "/proc/self/maps";

fn open(path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

impl Pagemap {
    /// Opens the page map of this process. To be opened again after a fork.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn open() -> Result<Pagemap, Errno> {
        let mut map =
            Pagemap { fd: OurFd::new(open(PAGEMAP)?)?, scan: true, page: rustix::param::page_size() as u64 };
        let mut found = [const { PageRegion { start: 0, end: 0, categories: 0 } }; 1];
        // An empty range tells whether the call exists.
        map.scan = map.scan_once(VaRange { start: Va(0), end: Va(0) }, Wanted::any(IS_PRESENT), &mut found).is_ok();
        Ok(map)
    }

    /// Opens the page map of the calling process in the place of the one it was forked from.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn renew(&self) -> Result<(), Errno> {
        self.fd.replace(open(PAGEMAP)?)
    }

    /// Whether PAGEMAP_SCAN is there.
    pub fn can_scan(&self) -> bool {
        self.scan
    }

    /// One call: fills `found`, returns how many and where the walk ended.
    fn scan_once(&self, range: VaRange, wanted: Wanted, found: &mut [PageRegion]) -> Result<(usize, u64), Errno> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: range.start.0,
            end: range.end.0,
            walk_end: 0,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: wanted.all_of,
            category_anyof_mask: wanted.any_of,
            return_mask: wanted.told,
        };
        // SAFETY: the opcode belongs to the struct; the vector is ours for the call. Scanning changes nothing.
        let n = unsafe { ioctl(&self.fd, Scan(&mut arg))? };
        Ok((n, arg.walk_end))
    }

    /// The pagemap word of one page.
    fn word(&self, va: Va) -> Result<u64, Errno> {
        let mut bytes = [0u8; 8];
        let n = rustix::io::pread(&self.fd, &mut bytes, va.0 / self.page * 8)?;
        if n != 8 {
            return Err(Errno::IO);
        }
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Whether the page at `va` is populated (or swapped out by the kernel).
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn is_present(&self, va: Va) -> Result<bool, Errno> {
        Ok(self.word(va)? & (PM_PRESENT | PM_SWAP) != 0)
    }

    /// Whether the page at `va` is populated and write-protected by a userfaultfd.
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn is_protected(&self, va: Va) -> Result<bool, Errno> {
        let word = self.word(va)?;
        Ok(word & (PM_PRESENT | PM_SWAP) != 0 && word & PM_PROTECTED != 0)
    }

    /// Calls `run` with each run of populated pages in `range`.
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn present_runs(&self, range: VaRange, run: &mut dyn FnMut(VaRange)) -> Result<(), Errno> {
        let mut at = range.start;
        if !self.scan {
            let mut open: Option<Va> = None;
            let mut words = [0u64; 128];
            while at < range.end {
                let n = ((range.end.0 - at.0) / self.page).min(words.len() as u64) as usize;
                // SAFETY: u64 words are initialised bytes, and any bytes are valid words.
                let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), n * 8) };
                let got = rustix::io::pread(&self.fd, bytes, at.0 / self.page * 8)?;
                if got == 0 || got % 8 != 0 {
                    return Err(Errno::IO);
                }
                for word in &words[..got / 8] {
                    let there = word & (PM_PRESENT | PM_SWAP) != 0;
                    match (there, open) {
                        (true, None) => open = Some(at),
                        (false, Some(start)) => {
                            run(VaRange { start, end: at });
                            open = None;
                        }
                        _ => {}
                    }
                    at = Va(at.0 + self.page);
                }
            }
            if let Some(start) = open {
                run(VaRange { start, end: range.end });
            }
            return Ok(());
        }
        let mut found = [const { PageRegion { start: 0, end: 0, categories: 0 } }; 32];
        // Runs of different kinds follow each other without a gap; they are one run to us.
        let mut open: Option<VaRange> = None;
        while at < range.end {
            let (n, end) =
                self.scan_once(VaRange { start: at, ..range }, Wanted::any(IS_PRESENT | IS_SWAPPED), &mut found)?;
            for r in &found[..n] {
                let (start, end) = (Va(r.start), Va(r.end));
                match &mut open {
                    Some(o) if o.end == start => o.end = end,
                    _ => {
                        if let Some(o) = open.replace(VaRange { start, end }) {
                            run(o);
                        }
                    }
                }
            }
            if end <= at.0 {
                break;
            }
            at = Va(end);
        }
        if let Some(o) = open {
            run(o);
        }
        Ok(())
    }

    /// Whether the page at `va` is mapped by a huge entry.
    ///
    /// # Errors
    /// ENOTTY where the kernel cannot tell.
    pub fn is_huge(&self, va: Va) -> Result<bool, Errno> {
        let range = VaRange { start: va, end: Va(va.0 + self.page) };
        let mut found = [const { PageRegion { start: 0, end: 0, categories: 0 } }; 1];
        Ok(self.scan_once(range, Wanted::any(IS_HUGE), &mut found)?.0 == 1)
    }

    /// Calls `run` with each run of pages of `range`, of one mapping, that are there, and how they are mapped as far as the
    /// page table says.
    ///
    /// # Errors
    /// When the page map cannot be read.
    pub fn cpu_runs(&self, range: VaRange, run: &mut dyn FnMut(VaRange, CpuPage)) -> Result<(), Errno> {
        if !self.scan {
            for at in (range.start.0..range.end.0).step_by(self.page as usize) {
                let word = self.word(Va(at))?;
                if word & PM_PRESENT != 0 {
                    let (writable, file) = (word & PM_PROTECTED == 0, word & PM_FILE != 0);
                    let page = CpuPage { writable, zero: false, huge: false, file };
                    run(VaRange { start: Va(at), end: Va(at + self.page) }, page);
                }
            }
            return Ok(());
        }
        let told = IS_PRESENT | IS_WRITTEN | IS_ZERO | IS_HUGE | IS_FILE;
        let wanted = Wanted { all_of: IS_PRESENT, any_of: 0, told };
        let mut found = [const { PageRegion { start: 0, end: 0, categories: 0 } }; 32];
        let mut at = range.start;
        while at < range.end {
            let (n, end) = self.scan_once(VaRange { start: at, ..range }, wanted, &mut found)?;
            for r in &found[..n] {
                let is = |category| r.categories & category != 0;
                // What is not protected counts as written, whether it was or not.
                let (zero, writable) = (is(IS_ZERO), is(IS_WRITTEN) && !is(IS_ZERO));
                let page = CpuPage { writable, zero, huge: is(IS_HUGE), file: is(IS_FILE) };
                run(VaRange { start: Va(r.start), end: Va(r.end) }, page);
            }
            if end <= at.0 {
                break;
            }
            at = Va(end);
        }
        Ok(())
    }
}

/// Which pages a scan is to find, by their categories, and which of these it tells.
#[derive(Clone, Copy)]
struct Wanted {
    all_of: u64,
    any_of: u64,
    told: u64,
}

impl Wanted {
    fn any(any_of: u64) -> Wanted {
        Wanted { all_of: 0, any_of, told: any_of }
    }
}

struct Scan<'a>(&'a mut ScanArg);

// SAFETY: PAGEMAP_SCAN is `_IOWR('f', 16, struct pm_scan_arg)`; the result is the number of regions filled.
unsafe impl rustix::ioctl::Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> rustix::ioctl::Opcode {
        opcode::read_write::<ScanArg>(b'f', 16)
    }
    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        (self.0 as *mut ScanArg).cast()
    }
    unsafe fn output_from_ptr(
        out: rustix::ioctl::IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        Ok(out as usize)
    }
}

/// One mapping of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// Its addresses.
    pub range: VaRange,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared.
    pub shared: bool,
    /// Backed by a file.
    pub file: bool,
    /// What the kernel calls it.
    pub name: VmaName,
    /// Bytes of a page of it: more than of others in the kernel's pool of huge pages. 0 where that cannot be found out.
    pub page_bytes: u64,
}

/// The names that matter to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmaName {
    /// None.
    Nothing,
    /// The brk heap.
    Heap,
    /// The main thread's stack.
    Stack,
    /// Another name in brackets: vdso, vvar and the like.
    Special,
    /// A name the program gave, or a file's.
    Other,
}

/// How a space can manage a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nature {
    /// Private anonymous memory: its pages can be taken elsewhere, as far as its protection lets them at the time.
    Movable,
    /// Anything else that the program has mapped: shared memory, files, huge pages of the kernel's pool, executable memory.
    /// The kernel keeps it.
    InPlace,
    /// Not at all: the main thread's stack.
    Stack,
    /// Not at all: it is the kernel's own.
    Special,
}

impl Vma {
    /// How it can be managed.
    pub fn nature(&self) -> Nature {
        match self.name {
            VmaName::Stack => Nature::Stack,
            VmaName::Special => Nature::Special,
            _ if self.shared || self.file || self.execute => Nature::InPlace,
            _ => Nature::Movable,
        }
    }

    /// Private anonymous memory that can be read and written but not executed: what can be managed by whoever knows
    /// nothing of the program.
    pub fn is_plain(&self) -> bool {
        self.read
            && self.write
            && !self.execute
            && !self.shared
            && !self.file
            && !matches!(self.name, VmaName::Stack | VmaName::Special)
    }
}

/// `/proc/self/maps`, open.
#[derive(Debug)]
pub struct Maps {
    fd: OurFd,
    query: bool,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const QUERY_READABLE: u64 = 1;
const QUERY_WRITABLE: u64 = 2;
const QUERY_EXECUTABLE: u64 = 4;
const QUERY_SHARED: u64 = 8;
const QUERY_COVERING_OR_NEXT: u64 = 0x10;

impl Maps {
    /// Opens the list of mappings of this process. To be opened again after a fork.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn open() -> Result<Maps, Errno> {
        let mut maps = Maps { fd: OurFd::new(open(MAPS)?)?, query: true };
        maps.query = !matches!(maps.ask(Va(0)), Err(Errno::NOTTY | Errno::INVAL));
        Ok(maps)
    }

    /// Opens the list of the calling process in the place of the one it was forked from.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn renew(&self) -> Result<(), Errno> {
        self.fd.replace(open(MAPS)?)
    }

    /// Whether PROCMAP_QUERY is there.
    pub fn can_query(&self) -> bool {
        self.query
    }

    fn ask(&self, va: Va) -> Result<Option<Vma>, Errno> {
        let mut name = [0u8; 64];
        let mut arg = Query {
            size: size_of::<Query>() as u64,
            query_flags: QUERY_COVERING_OR_NEXT,
            query_addr: va.0,
            vma_name_size: name.len() as u32,
            vma_name_addr: name.as_mut_ptr() as u64,
            ..Query::default()
        };
        let ask = |arg: &mut Query| {
            // SAFETY: the opcode belongs to the struct; the name buffer is ours for the call.
            unsafe { ioctl(self.fd.as_fd(), Updater::<{ opcode::read_write::<Query>(b'f', 17) }, Query>::new(arg)) }
        };
        let long = match ask(&mut arg) {
            Ok(()) => false,
            Err(Errno::NOENT) => return Ok(None),
            // The name does not fit: it is a path, and we need not know it.
            Err(Errno::NAMETOOLONG) => {
                arg.vma_name_size = 0;
                arg.vma_name_addr = 0;
                match ask(&mut arg) {
                    Ok(()) => true,
                    Err(Errno::NOENT) => return Ok(None),
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        };
        let named =
            if long { VmaName::Other } else { classify(&name[..(arg.vma_name_size as usize).min(name.len())]) };
        Ok(Some(Vma {
            range: VaRange { start: Va(arg.vma_start), end: Va(arg.vma_end) },
            read: arg.vma_flags & QUERY_READABLE != 0,
            write: arg.vma_flags & QUERY_WRITABLE != 0,
            execute: arg.vma_flags & QUERY_EXECUTABLE != 0,
            shared: arg.vma_flags & QUERY_SHARED != 0,
            file: arg.inode != 0,
            name: named,
            page_bytes: arg.vma_page_size,
        }))
    }

    /// The mapping that holds `va`, or else the next one.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn at_or_after(&self, va: Va) -> Result<Option<Vma>, Errno> {
        if self.query {
            return self.ask(va);
        }
        let mut found = None;
        self.each_line(&mut |vma| {
            if vma.range.end > va && found.is_none() {
                found = Some(vma);
            }
        })?;
        Ok(found)
    }

    /// The mapping that holds `va`.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn at(&self, va: Va) -> Result<Option<Vma>, Errno> {
        Ok(self.at_or_after(va)?.filter(|v| v.range.contains(va)))
    }

    /// Calls `each` with every mapping, in order of address. The list is not a snapshot.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn each(&self, each: &mut dyn FnMut(Vma)) -> Result<(), Errno> {
        self.each_line(each)
    }

    fn each_line(&self, each: &mut dyn FnMut(Vma)) -> Result<(), Errno> {
        rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::Start(0))?;
        let mut buffer = [0u8; 8192];
        let mut held = 0;
        loop {
            let n = rustix::io::read(&self.fd, &mut buffer[held..])?;
            let filled = held + n;
            let mut from = 0;
            while let Some(end) = buffer[from..filled].iter().position(|b| *b == b'\n') {
                if let Some(vma) = parse(&buffer[from..from + end]) {
                    each(vma);
                }
                from += end + 1;
            }
            if n == 0 {
                return Ok(());
            }
            if from == 0 && filled == buffer.len() {
                return Err(Errno::NAMETOOLONG);
            }
            buffer.copy_within(from..filled, 0);
            held = filled - from;
        }
    }
}

fn classify(name: &[u8]) -> VmaName {
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    match name {
        b"" => VmaName::Nothing,
        b"[heap]" => VmaName::Heap,
        b"[stack]" => VmaName::Stack,
        n if n.starts_with(b"[anon") => VmaName::Other,
        n if n.starts_with(b"[") => VmaName::Special,
        _ => VmaName::Other,
    }
}

/// Parses `55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0    [heap]`.
fn parse(line: &[u8]) -> Option<Vma> {
    let line = std::str::from_utf8(line).ok().unwrap_or_default();
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let flags = fields.next()?.as_bytes();
    let (_offset, _device) = (fields.next()?, fields.next()?);
    let inode = fields.next()?;
    let name = fields.next().unwrap_or_default();
    if flags.len() < 4 {
        return None;
    }
    Some(Vma {
        range: VaRange {
            start: Va(u64::from_str_radix(start, 16).ok()?),
            end: Va(u64::from_str_radix(end, 16).ok()?),
        },
        read: flags[0] == b'r',
        write: flags[1] == b'w',
        execute: flags[2] == b'x',
        shared: flags[3] == b's',
        file: inode != "0",
        name: classify(name.as_bytes()),
        page_bytes: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::map::Mapping;
    use rustix::mm::{MprotectFlags, mprotect};

    #[test]
    fn a_line_is_understood() {
        let v = parse(b"55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]").unwrap();
        assert_eq!(v.range, VaRange { start: Va(0x55d0c0a00000), end: Va(0x55d0c0a21000) });
        assert!(v.is_plain() && v.name == VmaName::Heap);
        let v = parse(b"7f00-8f00 r-xs 00001000 fe:00 1234 /usr/lib/x y.so").unwrap();
        assert!(!v.write && v.execute && v.shared && v.file && !v.is_plain());
        assert_eq!(parse(b"nonsense"), None);
    }

    #[test]
    fn query_and_text_agree() {
        // Writable between what is not: other threads' mappings cannot become one with it.
        let page = rustix::param::page_size();
        let m = Mapping::new(16 * page, page, false).unwrap();
        let inside = VaRange { start: Va(m.range().start.0 + page as u64), end: Va(m.range().end.0 - page as u64) };
        let rw = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: a part of our mapping, of which nobody knows.
        unsafe { mprotect(inside.start.0 as *mut _, inside.len() as usize, rw) }.unwrap();
        let mut maps = Maps::open().unwrap();
        let by_query = maps.at(inside.start).unwrap().unwrap();
        maps.query = false;
        let by_text = maps.at(inside.start).unwrap().unwrap();
        assert_eq!(by_query, Vma { page_bytes: page as u64, ..by_text });
        assert_eq!((by_text.range, by_text.page_bytes), (inside, 0), "the text does not tell the size of pages");
        assert!(by_text.is_plain());
        let stack = &m as *const _ as u64;
        assert!(maps.at(Va(stack)).unwrap().is_some());
    }

    #[test]
    fn scan_and_table_agree_on_what_is_populated() {
        let page = rustix::param::page_size();
        let m = Mapping::new(600 * page, page, true).unwrap();
        let touched = [0usize, 1, 2, 5, 127, 128, 129, 511, 512, 599];
        for i in touched {
            // SAFETY: the page is mapped and ours.
            unsafe { m.as_ptr().add(i * page).write_volatile(1) };
        }
        let mut map = Pagemap::open().unwrap();
        for scan in [map.scan, false] {
            map.scan = scan;
            let mut pages = Vec::new();
            map.present_runs(m.range(), &mut |r| {
                pages.extend(
                    ((r.start.0 - m.range().start.0) / page as u64)..((r.end.0 - m.range().start.0) / page as u64),
                );
            })
            .unwrap();
            assert!(pages.iter().copied().eq(touched.iter().map(|i| *i as u64)), "scan {scan}: {pages:?}");
        }
        assert!(map.is_present(m.range().start).unwrap());
        assert!(!map.is_present(Va(m.range().start.0 + 3 * page as u64)).unwrap());
    }
}
