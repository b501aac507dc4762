//! Opening: what a path is, whether it may be used, how large it is, and where its pages begin.
//!
//! Everything is found out before anything is changed. What is there already is used only if it is empty or was left behind by
//! a device of the same kind; a device node is used whatever it holds, except what a persistent device has left there.

use super::error::DaxError;
use super::format;
use crate::device::Altmap;
use peerspace_core::addr::{Geometry, Pages, Pfn};
use peerspace_core::buddy::Buddy;
use peerspace_core::devmap::altmap_pages;
use peerspace_core::sync::AtomicU64;
use peerspace_os::linux::shared::{Flush, SharedFile};
use peerspace_os::linux::{files, lock};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, MemfdFlags, Mode, OFlags, SealFlags, Stat, fallocate, fcntl_add_seals,
    fstat, fstatfs, ftruncate, memfd_create, open, statat,
};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What the header of a coherent device's file begins with.
const MAGIC: &[u8; 16] = b"peerspace-memory";
/// What the kernel says file systems of huge pages are.
const HUGETLBFS: i64 = 0x9584_58f6;
/// Bytes for which room is made at once: a signal in the midst of that undoes it, on some file systems.
const RESERVED_AT_ONCE: u64 = 64 << 20;

/// What the memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file in memory that only this process has.
    Memory,
    /// A file that has no name any more.
    Unnamed,
    /// A file with a name.
    Named(PathBuf),
    /// A node of a device.
    Node(PathBuf),
}

/// What a device is made from.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) memory: SharedFile,
    pub(super) kind: Kind,
    pub(super) flush: Flush,
    pub(super) layout: Layout,
}

/// How the memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) page: u64,
    pub(super) block: u64,
    pub(super) bytes: u64,
    /// Where the device's pages begin: at a block.
    pub(super) data: u64,
    /// The descriptors' part.
    pub(super) altmap: Option<Altmap>,
}

impl Layout {
    /// `bytes` bytes, of which `reserve` at the start are for other uses, and `altmap` (as many as all descriptors take up, if
    /// nothing is said) for descriptors.
    pub(super) fn new(bytes: u64, reserve: u64, altmap: Option<u64>) -> Result<Layout, DaxError> {
        let page = rustix::param::page_size() as u64;
        let block = Geometry::from_page_bytes(page).unwrap_or(Geometry::KIB4).block_bytes() as u64;
        let given = bytes;
        let bytes = bytes / block * block;
        let reserve = reserve.next_multiple_of(page);
        let pages = bytes / page;
        let wanted = match altmap {
            Some(bytes) if !bytes.is_multiple_of(page) => {
                return Err(DaxError::AltmapNotPages { given: bytes, page });
            }
            Some(bytes) => bytes / page,
            None => altmap_pages(Pages(pages), page).0,
        };
        let altmap = match wanted {
            0 => None,
            n => Some(Altmap::new(Pfn(0), Pages(pages), Pages(reserve / page), Pages(n)).map_err(DaxError::Altmap)?),
        };
        let front = altmap.map_or(reserve, |a| a.offset().0 * page);
        let data = front.next_multiple_of(block);
        let least = data + block;
        if bytes < least {
            return Err(DaxError::TooSmall { given, least });
        }
        // As many as can be given out.
        let most = data + Buddy::<Vec<AtomicU64>>::MAX_PAGES * page;
        if bytes > most {
            return Err(DaxError::TooLarge { given, most });
        }
        Ok(Layout { page, block, bytes, data, altmap })
    }

    /// Pages of the device.
    pub(super) fn pages(&self) -> u64 {
        (self.bytes - self.data) / self.page
    }

    /// What is needed at least to have `data` bytes of pages.
    pub(super) fn bytes_for(data: u64, reserve: u64) -> u64 {
        let page = rustix::param::page_size() as u64;
        let block = Geometry::from_page_bytes(page).unwrap_or(Geometry::KIB4).block_bytes() as u64;
        // Beyond what can be anyway, sums stay sums.
        let data = data.min(1 << 62).next_multiple_of(block);
        let mut front = block;
        loop {
            let all = front + data;
            let needed = (reserve.next_multiple_of(page) + altmap_pages(Pages(all / page), page).0 * page)
                .next_multiple_of(block);
            if needed <= front {
                return all;
            }
            front = needed;
        }
    }
}

pub(super) fn refused(what: &'static str, path: &Path, e: Errno) -> DaxError {
    DaxError::System { what, path: path.into(), errno: e.raw_os_error() }
}

/// A file in memory, of `bytes` bytes; of huge pages of the kernel's pool if they are wanted.
pub(super) fn memory(bytes: u64, altmap: Option<u64>, huge: bool) -> Result<Opened, DaxError> {
    let layout = Layout::new(bytes, 0, altmap)?;
    let path = Path::new(if huge { "memory of huge pages" } else { "memory" });
    let file = memory_file(layout.bytes, huge).map_err(|e| match e {
        Errno::NOMEM | Errno::NOSPC if huge => DaxError::NoHugePages { bytes: layout.bytes },
        e => refused("make", path, e),
    })?;
    let memory = SharedFile::new(file, layout.bytes, huge).map_err(|e| match e {
        Errno::NOMEM if huge => DaxError::NoHugePages { bytes: layout.bytes },
        e => refused("map", path, e),
    })?;
    Ok(Opened { memory, kind: Kind::Memory, flush: Flush::Sync, layout })
}

/// A file that only this process has. Nobody can cut it short.
pub(super) fn memory_file(bytes: u64, huge: bool) -> Result<OwnedFd, Errno> {
    let huge = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let file = memfd_create(c"peerspace-dax", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// What a path turned out to be.
struct Place {
    file: OwnedFd,
    kind: Kind,
    /// It knows no read and write.
    by_mapping: bool,
    /// It was made just now.
    fresh: bool,
}

fn place(path: &Path, may_be_directory: bool) -> Result<Place, DaxError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mode = Mode::RUSR | Mode::WUSR;
    let found = statat(CWD, path, AtFlags::empty());
    let kind = found.as_ref().ok().map(|s| FileType::from_raw_mode(s.st_mode));
    match kind {
        Some(FileType::Directory) if !may_be_directory => Err(DaxError::Directory { path: path.into() }),
        Some(FileType::Directory) => {
            let directory = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            let directory = directory.map_err(|e| refused("open", path, e))?;
            let file = files::unnamed(directory.as_fd(), flags).map_err(|e| refused("make a file in", path, e))?;
            Ok(finish(file, Kind::Unnamed, true))
        }
        Some(FileType::RegularFile) => {
            let file = open(path, flags, mode).map_err(|e| refused("open", path, e))?;
            Ok(finish(file, Kind::Named(path.into()), false))
        }
        Some(FileType::CharacterDevice) => {
            let file = open(path, flags, mode).map_err(|e| refused("open", path, e))?;
            Ok(finish(file, Kind::Node(path.into()), false))
        }
        Some(other) => Err(DaxError::NotMemory { path: path.into(), found: name_of(other) }),
        // What is made there is no device.
        None if path.starts_with("/dev") && !path.starts_with("/dev/shm") => Err(refused("find", path, Errno::NOENT)),
        None => {
            let made = open(path, flags | OFlags::CREATE | OFlags::EXCL, mode);
            let file = made.map_err(|e| match e {
                Errno::EXIST if path.is_symlink() => {
                    DaxError::NotMemory { path: path.into(), found: "a symbolic link to what is not there" }
                }
                // Made by another just now.
                Errno::EXIST => DaxError::InUse { path: path.into() },
                e => refused("make", path, e),
            })?;
            Ok(finish(file, Kind::Named(path.into()), true))
        }
    }
}

fn finish(file: OwnedFd, kind: Kind, fresh: bool) -> Place {
    let huge = fstatfs(&file).is_ok_and(|s| s.f_type == HUGETLBFS);
    let by_mapping = huge || matches!(kind, Kind::Node(_));
    Place { file, kind, by_mapping, fresh }
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::BlockDevice => "a block device (make a DAX file system on it, or a device node with `ndctl`)",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "something else",
    }
}

/// The size of a device node of memory, and what its mappings are aligned to.
fn node(path: &Path, stat: &Stat) -> Result<(u64, u64), DaxError> {
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let about = |what: &str| {
        let text = std::fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/{what}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let is_dax = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}/subsystem"))
        .is_ok_and(|to| to.file_name().is_some_and(|name| name == "dax"));
    match about("size") {
        Some(bytes) if is_dax => Ok((bytes, about("align").unwrap_or(0))),
        _ => {
            Err(DaxError::NotMemory { path: path.into(), found: "a device node, but not one of memory (device DAX)" })
        }
    }
}

/// The memory at `path`: of `size` bytes, or of as many as there are. `persistent`: its first block is for the names of what
/// is kept there, which the caller sees to; otherwise for a header that says whose the file is. `reserved`: it is kept
/// for this process, so that others cannot open it.
pub(super) fn path(
    path: &Path,
    size: Option<u64>,
    altmap: Option<u64>,
    persistent: bool,
    reserved: bool,
) -> Result<Opened, DaxError> {
    let Place { file, kind, by_mapping, fresh } = place(path, !persistent)?;
    let undo = |e: DaxError| {
        // A file that another has locked since is his.
        if let (Kind::Named(path), true, false) = (&kind, fresh, matches!(e, DaxError::InUse { .. })) {
            // It was made for this. Nothing can be done if it cannot be removed.
            let _ = rustix::fs::unlink(path);
        }
        e
    };
    let opened = (|| {
        if !matches!(kind, Kind::Unnamed) {
            if !reserved {
                claimed(path, lock::reserve(file.as_fd()))?;
            }
            claimed(path, lock::exclude(file.as_fd()))?;
        }
        // Nobody changes it any more.
        let stat = fstat(&file).map_err(|e| refused("look at", path, e))?;
        let has = match kind {
            Kind::Node(_) => {
                let (bytes, align) = node(path, &stat)?;
                let block = Layout::new(bytes, 0, Some(0))?.block;
                if align > block {
                    return Err(DaxError::Alignment { path: path.into(), align, block });
                }
                bytes
            }
            _ => stat.st_size as u64,
        };
        let bytes = match (size, has) {
            (None, 0) => return Err(DaxError::NoSize { path: path.into() }),
            (None, has) => has,
            (Some(size), _) => size,
        };
        let reserve = if persistent { Layout::new(bytes, 0, Some(0))?.block } else { MAGIC.len() as u64 };
        let layout = Layout::new(bytes, reserve, altmap)?;
        if has > 0 && layout.bytes > has && (persistent || matches!(kind, Kind::Node(_))) {
            return Err(DaxError::Truncated { path: path.into(), found: has, expected: layout.bytes });
        }
        if !persistent && has > 0 {
            recognise(&file, path, &kind, by_mapping, layout)?;
        }
        if !matches!(kind, Kind::Node(_)) {
            lengthen(&file, path, has, by_mapping, persistent, layout).inspect_err(|_| {
                if has < layout.bytes {
                    // It was as long. Nothing can be done if it cannot be so again.
                    let _ = ftruncate(&file, has);
                }
            })?;
        }
        let flush = Flush::of(file.as_fd(), matches!(kind, Kind::Node(_)));
        let memory = SharedFile::new(file, layout.bytes, by_mapping).map_err(|e| refused("map", path, e))?;
        let memory = memory.that_may_shrink();
        if !persistent {
            memory.write(0, MAGIC).map_err(|e| refused("write to", path, e))?;
        }
        Ok((memory, flush, layout))
    })();
    let (memory, flush, layout) = opened.map_err(undo)?;
    Ok(Opened { memory, kind, flush, layout })
}

/// What a lock says. Where the file system has none, nobody is kept out.
pub(super) fn claimed(path: &Path, lock: Result<(), Errno>) -> Result<(), DaxError> {
    match lock {
        Err(Errno::AGAIN | Errno::ACCESS) => Err(DaxError::InUse { path: path.into() }),
        _ => Ok(()),
    }
}

/// Makes a file of `has` bytes as long as `layout` says, and sees to it that there is room for all of that.
fn lengthen(
    file: &OwnedFd,
    path: &Path,
    has: u64,
    by_mapping: bool,
    persistent: bool,
    layout: Layout,
) -> Result<(), DaxError> {
    if has < layout.bytes {
        if !persistent && !by_mapping {
            // Whose it is, first: a process that is killed in the midst of this leaves behind what is recognised.
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(file, MAGIC, 0));
            written.map_err(|e| no_space(path, layout.bytes, "write to", e))?;
        }
        ftruncate(file, layout.bytes).map_err(|e| refused("lengthen", path, e))?;
    }
    // Room that is not there when a page is written by the CPU would be a signal.
    for at in (0..layout.bytes).step_by(RESERVED_AT_ONCE as usize) {
        let len = RESERVED_AT_ONCE.min(layout.bytes - at);
        match rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::empty(), at, len)) {
            Ok(()) => {}
            // Whoever wrote it has seen to that, or has not.
            Err(Errno::OPNOTSUPP) if has >= layout.bytes => break,
            Err(e) => return Err(no_space(path, layout.bytes, "reserve space for", e)),
        }
    }
    Ok(())
}

fn no_space(path: &Path, bytes: u64, what: &'static str, e: Errno) -> DaxError {
    match e {
        Errno::NOSPC | Errno::DQUOT | Errno::NOMEM => DaxError::NoSpace { path: path.into(), bytes },
        e => refused(what, path, e),
    }
}

/// Whether what is at `path` may be written over.
fn recognise(file: &OwnedFd, path: &Path, kind: &Kind, by_mapping: bool, layout: Layout) -> Result<(), DaxError> {
    let len = layout.block;
    let file = file.try_clone().map_err(|_| refused("look at", path, Errno::MFILE))?;
    let memory = SharedFile::new(file, len, by_mapping).map_err(|e| refused("map", path, e))?;
    let mut found = [0; 16];
    memory.read(0, &mut found).map_err(|e| refused("read", path, e))?;
    let is_node = matches!(kind, Kind::Node(_));
    let names = found == *format::MAGIC || found.starts_with(format::UNFINISHED);
    if found == *MAGIC || is_node && !names {
        return Ok(());
    }
    if names {
        return Err(DaxError::Persistent { path: path.into() });
    }
    let found = String::from_utf8_lossy(&found).into_owned();
    Err(DaxError::Foreign { path: path.into(), found, expected: String::from_utf8_lossy(MAGIC).into_owned() })
}
