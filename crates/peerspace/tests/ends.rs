//! Processes that end in the midst of everything (rule G5): while devices work on their memory, threads wait for messages about
//! changes to be received, and forks are under way. They end at once, and leave no process behind.

mod common;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The stress of a program that changes its memory while devices use it, in a process group of its own.
fn start(seed: u64, prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> Child {
    let mut command = Command::new(common::example("calls_stress"));
    command.args(["60", &seed.to_string()]).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    // SAFETY: what is done in the child is a write to a file.
    unsafe { command.pre_exec(prepare) };
    command.spawn().unwrap()
}

fn ended(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begin = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return Some(status),
            None if begin.elapsed() > limit => return None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Children that were forked have ended as well, or do so soon.
fn nobody_left(group: u32) {
    let begin = Instant::now();
    // SAFETY: asks whether there is a process in the group.
    while unsafe { libc::kill(-(group as i32), 0) } == 0 {
        assert!(begin.elapsed() < Duration::from_secs(30), "a process of group {group} is left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn g5_a_process_that_is_killed_ends() {
    for (seed, signal) in [libc::SIGKILL, libc::SIGTERM, libc::SIGABRT, libc::SIGKILL].into_iter().enumerate() {
        let mut child = start(seed as u64 + 1, || Ok(()));
        std::thread::sleep(Duration::from_millis(400 + 300 * seed as u64));
        assert!(child.try_wait().unwrap().is_none(), "it ended before its time");
        // SAFETY: a child of ours, which was not waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let status = ended(&mut child, Duration::from_secs(20)).expect("it goes on after it was killed");
        assert_eq!(status.signal(), Some(signal));
        nobody_left(child.id());
    }
}

/// A memory cgroup of version 1 or 2, removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(limit: u64) -> Option<Cgroup> {
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let dir = Path::new(root).join(format!("peerspace-ends-{}", std::process::id()));
            if std::fs::create_dir(&dir).is_ok() {
                let cgroup = Cgroup(dir);
                if std::fs::write(cgroup.0.join(file), limit.to_string()).is_ok() {
                    return Some(cgroup);
                }
            }
        }
        None
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The kernel takes the memory of a process away that it kills for want of memory, before it has ended.
#[test]
fn g5_a_process_that_the_kernel_kills_for_its_memory_ends() {
    let Some(cgroup) = Cgroup::new(40 << 20) else {
        return eprintln!("skipped: no memory cgroup can be made here");
    };
    let procs = cgroup.0.join("cgroup.procs");
    let mut child = start(7, move || std::fs::write(&procs, "0"));
    // It takes up more than that soon, for what its devices hold.
    let status = ended(&mut child, Duration::from_secs(90)).expect("neither killed nor at its end");
    // The stress itself may notice first that a child that it has forked was killed.
    let code = (status.signal(), status.code());
    assert!(matches!(code, (Some(libc::SIGKILL), _) | (_, Some(101))), "{status}");
    nobody_left(child.id());
}
