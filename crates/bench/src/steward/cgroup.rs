//! A memory cgroup with a limit, of version 1 or 2, whichever has the memory controller here.

use super::patiently;
use crate::error::Trouble;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// A cgroup. Dropped, it kills what is in it and goes.
#[derive(Debug)]
pub(super) struct Cgroup {
    dir: PathBuf,
    /// The memory controller was switched on for children of the root, where it had been off.
    _controller: Option<Controller>,
}

/// Where the memory controller is.
#[derive(Debug, PartialEq, Eq)]
enum Hierarchy {
    V1(PathBuf),
    V2(PathBuf),
}

impl Cgroup {
    pub(super) fn new(limit: u64) -> Result<Cgroup, Trouble> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(Trouble::unavailable("read the mounts"))?;
        let hierarchy = find(&mounts, |root| {
            fs::read_to_string(root.join("cgroup.controllers")).is_ok_and(|c| has_word(&c, "memory"))
        });
        let hierarchy = hierarchy.ok_or_else(|| {
            Trouble::Unavailable("no cgroup hierarchy with the memory controller is mounted".into())
        })?;
        let (root, limit_file, controller) = match &hierarchy {
            Hierarchy::V1(root) => (root, "memory.limit_in_bytes", None),
            Hierarchy::V2(root) => (root, "memory.max", Controller::on(root)?),
        };
        let name = format!("peerspace-bench-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let dir = root.join(name);
        fs::create_dir(&dir).map_err(Trouble::unavailable("make a memory cgroup"))?;
        let cgroup = Cgroup { dir, _controller: controller };
        fs::write(cgroup.dir.join(limit_file), limit.to_string())
            .map_err(Trouble::unavailable("limit a memory cgroup"))?;
        Ok(cgroup)
    }

    /// The file that a process writes itself into.
    pub(super) fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        patiently("remove a memory cgroup", || {
            let procs = fs::read_to_string(self.procs()).unwrap_or_default();
            for pid in procs.lines().filter_map(|l| l.parse().ok()).filter_map(Pid::from_raw) {
                // Only contenders enter it, and theirs are over. One that has just ended is no error.
                let _ = kill_process(pid, Signal::KILL);
            }
            fs::remove_dir(&self.dir)
        });
    }
}

/// The memory controller for children of the root of version 2, switched off again when dropped.
#[derive(Debug)]
struct Controller {
    file: PathBuf,
}

impl Controller {
    /// Switches it on where it is off.
    fn on(root: &Path) -> Result<Option<Controller>, Trouble> {
        let file = root.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).map_err(Trouble::unavailable("read the controllers in use"))?;
        if has_word(&enabled, "memory") {
            return Ok(None);
        }
        fs::write(&file, "+memory").map_err(Trouble::unavailable("switch on the memory controller"))?;
        Ok(Some(Controller { file }))
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // Somebody else may rely on it by now.
        let _ = fs::write(&self.file, "-memory");
    }
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|w| w == word)
}

/// Finds the hierarchy in a list of mounts. `controls` says whether a version 2 root has the memory controller.
fn find(mounts: &str, controls: impl Fn(&Path) -> bool) -> Option<Hierarchy> {
    let mut v2 = None;
    for line in mounts.lines() {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else { continue };
        match kind {
            "cgroup" if options.split(',').any(|o| o == "memory") => return Some(Hierarchy::V1(at.into())),
            "cgroup2" if controls(Path::new(at)) => v2 = Some(Hierarchy::V2(at.into())),
            _ => {}
        }
    }
    v2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_controller_is_found_where_it_is() {
        let v1 = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                  cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find(v1, |_| false), Some(Hierarchy::V1("/sys/fs/cgroup/memory".into())));
        let v2 = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(find(v2, |_| true), Some(Hierarchy::V2("/sys/fs/cgroup".into())));
        assert_eq!(find(v2, |_| false), None);
    }
}
