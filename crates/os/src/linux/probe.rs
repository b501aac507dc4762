//! What this kernel and this container allow: the facts behind `peerspace doctor`, and the choice of fallbacks.

use super::scan::{Maps, Pagemap};
use super::uffd::{Uffd, feature};
use rustix::io::Errno;

/// Whether the kernel gives huge pages to memory that asks for them.
pub fn huge_pages_allowed() -> bool {
    huge_page_mode().is_some_and(|mode| mode != "never")
}

/// When the kernel uses transparent huge pages: always, madvise or never; `None` where it has none.
pub fn huge_page_mode() -> Option<String> {
    let text = read("/sys/kernel/mm/transparent_hugepage/enabled")?;
    let start = text.find('[')? + 1;
    let end = text[start..].find(']')? + start;
    Some(text[start..end].into())
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn number(path: &str) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

/// What there is to know.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The kernel's release, as uname says it.
    pub kernel: String,
    /// Bytes in a page.
    pub page_bytes: u64,
    /// Processors this process may use.
    pub processors: usize,
    /// Whether a userfaultfd can be had that serves the kernel's accesses too; else why not.
    pub full_userfaultfd: Result<(), i32>,
    /// Whether one can be had that serves the program's own accesses; else why not.
    pub user_userfaultfd: Result<(), i32>,
    /// `vm.unprivileged_userfaultfd`.
    pub unprivileged_userfaultfd: Option<u64>,
    /// Whether `/dev/userfaultfd` exists and can be opened; else why not.
    pub userfaultfd_device: Result<(), i32>,
    /// userfaultfd features the kernel knows, as in `<linux/userfaultfd.h>`.
    pub features: Option<u64>,
    /// PAGEMAP_SCAN is there.
    pub pagemap_scan: bool,
    /// PROCMAP_QUERY is there.
    pub procmap_query: bool,
    /// When transparent huge pages are used.
    pub huge_pages: Option<String>,
    /// The most mappings a process can have.
    pub max_map_count: Option<u64>,
    /// `vm.overcommit_memory`.
    pub overcommit: Option<u64>,
    /// Bytes of RAM, and how many of them are available.
    pub memory: Option<(u64, u64)>,
    /// The memory limit of this process's control group, in bytes, if it has one.
    pub group_limit: Option<u64>,
    /// io_uring can be used; else why not.
    pub io_uring: Result<(), i32>,
    /// Whether this process runs as root.
    pub root: bool,
}

impl Facts {
    /// Finds out.
    pub fn gather() -> Facts {
        let errno = |e: Errno| e.raw_os_error();
        let device = rustix::fs::open(
            "/dev/userfaultfd",
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        Facts {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            page_bytes: rustix::param::page_size() as u64,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            full_userfaultfd: Uffd::open(false).map(drop).map_err(errno),
            user_userfaultfd: Uffd::open(true).map(drop).map_err(errno),
            unprivileged_userfaultfd: number("/proc/sys/vm/unprivileged_userfaultfd"),
            userfaultfd_device: device.map(drop).map_err(errno),
            features: Uffd::known_features().ok(),
            pagemap_scan: Pagemap::open().is_ok_and(|p| p.can_scan()),
            procmap_query: Maps::open().is_ok_and(|m| m.can_query()),
            huge_pages: huge_page_mode(),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            overcommit: number("/proc/sys/vm/overcommit_memory"),
            memory: memory(),
            group_limit: group_limit(),
            io_uring: io_uring(),
            root: rustix::process::geteuid().is_root(),
        }
    }

    /// Whether the kernel knows a userfaultfd feature.
    pub fn has(&self, bit: u64) -> bool {
        self.features.is_some_and(|f| f & bit != 0)
    }

    /// The features that the engine uses and this kernel lacks, by name.
    pub fn missing_features(&self) -> Vec<&'static str> {
        let used = feature::PAGEFAULT_FLAG_WP
            | feature::EVENT_REMAP
            | feature::EVENT_REMOVE
            | feature::EVENT_UNMAP
            | feature::SIGBUS
            | feature::POISON
            | feature::MOVE;
        let lacks = |bit: u64| bit & used != 0 && !self.has(bit);
        feature::NAMES.iter().filter(|(bit, _)| lacks(*bit)).map(|(_, name)| *name).collect()
    }
}

/// Bytes of RAM that this machine has.
pub fn ram_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * info.mem_unit.max(1) as u64
}

fn memory() -> Option<(u64, u64)> {
    let text = read("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

fn group_limit() -> Option<u64> {
    let groups = read("/proc/self/cgroup")?;
    let at = |controller: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            controllers.split(',').any(|c| c == controller).then(|| path.trim_start_matches('/').to_string())
        })
    };
    let v2 = at("").and_then(|p| number(&format!("/sys/fs/cgroup/{p}/memory.max")));
    let v1 = at("memory").and_then(|p| number(&format!("/sys/fs/cgroup/memory/{p}/memory.limit_in_bytes")));
    // Without a limit, v1 says a number close to the largest there is.
    v2.or(v1).filter(|n| *n < 1 << 60)
}

fn io_uring() -> Result<(), i32> {
    // A call with a null pointer fails in one way where io_uring is there, and in others where it is not.
    // SAFETY: the kernel checks the pointer.
    let r = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null::<u8>()) };
    let errno = if r < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
    if errno == libc::EFAULT { Ok(()) } else { Err(errno) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_gathered_without_harm() {
        let f = Facts::gather();
        assert!(f.page_bytes >= 4096 && f.processors > 0 && !f.kernel.is_empty());
        assert!(f.memory.is_some_and(|(total, available)| total >= available && total == ram_bytes()));
        if f.full_userfaultfd.is_ok() {
            assert!(f.features.is_some());
        }
    }
}
