//! Fork: parent and child both keep everything, and go their own ways (G12).

use super::*;
use peerspace::device::ForkSide;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::os::fd::{AsFd, OwnedFd};

/// A forked process, which does not survive a test that fails.
pub(crate) struct Child(Option<Pid>);

impl Child {
    /// Its exit status, or 128 and the signal that killed it.
    pub(crate) fn wait(mut self) -> i32 {
        let (_, status) = waitpid(self.0.take(), WaitOptions::empty()).unwrap().unwrap();
        status.exit_status().or(status.terminating_signal().map(|s| 128 + s)).unwrap()
    }

    fn kill(self) {
        kill_process(self.0.unwrap(), Signal::KILL).unwrap();
        assert_eq!(self.wait(), 128 + 9);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// Runs `work` in a forked process, which ends with it.
pub(crate) fn in_child(work: impl FnOnce()) -> Child {
    // SAFETY: the child has this thread alone. It uses no lock that another thread may have held: our heap and the C
    // library take care of their own. It never returns from here.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid > 0 {
        return Child(Pid::from_raw(pid));
    }
    std::panic::set_hook(Box::new(|info| {
        let text = format!("in a child: {info}\n");
        let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
    }));
    let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_ok();
    // SAFETY: ends the process without running anything of the parent's.
    unsafe { libc::_exit(if ok { 0 } else { 1 }) }
}

/// Forks as the engine does. `work` is the child's.
fn fork(file: &File, work: impl FnOnce()) -> Child {
    file.before_fork();
    let child = in_child(|| {
        file.after_fork(ForkSide::Child);
        work();
    });
    file.after_fork(ForkSide::Parent);
    child
}

/// The open files of this process in `dir`: how many, and what they take up.
fn files_in(dir: &Path) -> (usize, u64) {
    let mut seen = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let inside = std::fs::read_link(&path).is_ok_and(|to| to.starts_with(dir) && to != dir);
        if let (true, Ok(stat)) = (inside, rustix::fs::stat(&path)) {
            seen.insert(stat.st_ino, stat.st_blocks as u64 * 512);
        }
    }
    (seen.len(), seen.values().sum())
}

/// Descriptors of this process in `dir`.
fn descriptors_in(dir: &Path) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    entries.filter(|e| std::fs::read_link(e.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(dir))).count()
}

/// Where children wait until they are let through, one by one.
struct Gate(OwnedFd, OwnedFd);

impl Gate {
    fn new() -> Gate {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        Gate(read, write)
    }

    /// In a child: waits.
    fn pass(&self) {
        assert_eq!(rustix::io::read(self.0.as_fd(), &mut [0u8; 1]), Ok(1));
    }

    /// Lets `n` children through.
    fn open(&self, n: usize) {
        assert_eq!(rustix::io::write(self.1.as_fd(), &vec![1; n]), Ok(n));
    }
}

const PAGES: u64 = 4096;

fn open(dir: &Path) -> File {
    File::open(dir, Some((PAGES + 1) * page() as u64)).unwrap()
}

#[test]
fn both_keep_everything_and_change_it_apart() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("pages")] {
        let file = File::open(&path, Some((PAGES + 1) * page() as u64)).unwrap();
        for block in 0..4 {
            store(&file, block * 512, 512, 1).unwrap();
        }
        let single: Vec<u64> = (2048..2900).step_by(3).collect();
        single.chunks(64).for_each(|p| store_each(&file, p, 1));
        // Each writes over the same pages, frees the same pages, and stores them again.
        let live = |own: u64| {
            load(&file, 0, 2048, 1).unwrap();
            single.chunks(64).for_each(|p| load_each(&file, p, 1));
            for round in 0..2 {
                let version = own + round;
                store(&file, 512, 512, version).unwrap();
                single.chunks(50).for_each(|p| store_each(&file, p, version));
                free(&file, 1024, 512);
                for p in (0..512).step_by(2) {
                    free(&file, p, 1);
                }
                store(&file, 1200, 100, version).unwrap();
                (0..512).step_by(2).collect::<Vec<_>>().chunks(64).for_each(|p| store_each(&file, p, version));
                file.trim();
                load(&file, 512, 512, version).unwrap();
                load(&file, 1200, 100, version).unwrap();
                load(&file, 1536, 512, 1).unwrap();
                for p in 0..512 {
                    load(&file, p, 1, if p % 2 == 0 { version } else { 1 }).unwrap();
                }
                single.chunks(64).for_each(|p| load_each(&file, p, version));
                store(&file, 1024, 512, version).unwrap();
            }
        };
        let child = fork(&file, || live(100));
        live(200);
        assert_eq!(child.wait(), 0);
        load(&file, 512, 512, 201).unwrap();
        load(&file, 1024, 512, 201).unwrap();
        load(&file, 1536, 512, 1).unwrap();
        single.chunks(64).for_each(|p| load_each(&file, p, 201));
    }
}

#[test]
fn a_grandchild_keeps_everything_too() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path());
    store(&file, 0, 1000, 1).unwrap();
    let child = fork(&file, || {
        store(&file, 100, 100, 2).unwrap();
        let grandchild = fork(&file, || {
            store(&file, 150, 100, 3).unwrap();
            free(&file, 0, 50);
            load(&file, 50, 50, 1).unwrap();
            load(&file, 100, 50, 2).unwrap();
            load(&file, 150, 100, 3).unwrap();
            load(&file, 250, 750, 1).unwrap();
        });
        store(&file, 0, 120, 4).unwrap();
        assert_eq!(grandchild.wait(), 0);
        load(&file, 0, 120, 4).unwrap();
        load(&file, 120, 80, 2).unwrap();
        load(&file, 200, 800, 1).unwrap();
        // What it shared with the grandchild alone is its own again; what it shares with the parent is not.
        store(&file, 100, 100, 5).unwrap();
        load(&file, 100, 100, 5).unwrap();
    });
    free(&file, 500, 500);
    store(&file, 0, 10, 6).unwrap();
    file.trim();
    assert_eq!(child.wait(), 0);
    load(&file, 0, 10, 6).unwrap();
    load(&file, 10, 490, 1).unwrap();
}

#[test]
fn space_returns_when_the_other_is_killed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path());
    if file.diagnostics().returns_space.is_err() {
        return eprintln!("skipped: {}", file.diagnostics());
    }
    let bytes = |pages: u64| pages * page() as u64;
    store(&file, 0, 3000, 1).unwrap();
    let gate = Gate::new();
    let child = fork(&file, || gate.pass());
    // What was shared is of no use to this process any more, but stays for the other.
    free(&file, 0, 1000);
    store(&file, 1000, 500, 2).unwrap();
    file.trim();
    let (files, taken) = files_in(dir.path());
    assert_eq!(files, 2);
    assert!(taken > bytes(3000), "{taken} bytes: something was taken from the other process");
    child.kill();
    file.trim();
    let (_, taken) = files_in(dir.path());
    assert!(taken < bytes(2000) + (256 << 10), "{taken} bytes for 2000 pages");
    load(&file, 1000, 500, 2).unwrap();
    load(&file, 1500, 1500, 1).unwrap();
    // And without being asked: when enough was freed.
    let child = fork(&file, || gate.pass());
    child.kill();
    free(&file, 1000, 2000);
    for i in 0..20 {
        store(&file, i, 1, 3).unwrap();
    }
    let (_, taken) = files_in(dir.path());
    assert!(taken < bytes(1000), "{taken} bytes for 20 pages");
}

#[test]
fn a_file_that_holds_nothing_is_closed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path());
    // Without pages there is nothing to share: parent and child go on, each with a file of its own.
    let child = fork(&file, || {
        assert_eq!(files_in(dir.path()).0, 0);
        store(&file, 5, 5, 2).unwrap();
        load(&file, 5, 5, 2).unwrap();
    });
    store(&file, 0, 10, 1).unwrap();
    assert_eq!(child.wait(), 0);
    assert_eq!(files_in(dir.path()).0, 1);
    load(&file, 0, 10, 1).unwrap();
    // A shared one is let go of by both.
    let gate = Gate::new();
    let child = fork(&file, || {
        free(&file, 0, 10);
        store(&file, 3, 1, 4).unwrap();
        assert_eq!(files_in(dir.path()).0, 1, "only the new one");
        gate.pass();
    });
    store(&file, 0, 10, 3).unwrap();
    store(&file, 0, 10, 4).unwrap();
    assert_eq!(files_in(dir.path()).0, 1, "only the new one");
    gate.open(1);
    assert_eq!(child.wait(), 0);
    load(&file, 0, 10, 4).unwrap();
}

#[test]
fn the_parent_may_go_first() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::new();
    let done = Gate::new();
    let parent = in_child(|| {
        let file = open(dir.path());
        store(&file, 0, 2000, 1).unwrap();
        let child = fork(&file, || {
            gate.pass();
            load(&file, 0, 2000, 1).unwrap();
            // Nobody else is left: the file is this process's, to write to and to return space of.
            store(&file, 0, 1000, 2).unwrap();
            free(&file, 500, 1500);
            file.trim();
            let (files, taken) = files_in(dir.path());
            assert_eq!(files, 1);
            assert!(file.diagnostics().returns_space.is_err() || taken < 700 * page() as u64, "{taken} bytes");
            load(&file, 0, 500, 2).unwrap();
            done.open(1);
        });
        std::mem::forget(child);
    });
    assert_eq!(parent.wait(), 0);
    gate.open(1);
    // Its own writing end must not keep the test waiting for a child that failed.
    let Gate(read, write) = done;
    drop(write);
    assert_eq!(rustix::io::read(&read, &mut [0u8; 1]), Ok(1), "the child failed");
}

#[test]
fn many_forks_in_a_row_cost_nothing_that_stays() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path());
    store(&file, 0, 1000, 0).unwrap();
    let mut version = vec![0; 1000];
    for n in 1..=200u64 {
        let child = fork(&file, || {
            let p = n * 7 % 1000;
            load(&file, p, 1, version[p as usize]).unwrap();
            store(&file, p, 1, 9999).unwrap();
            load(&file, p, 1, 9999).unwrap();
        });
        // Some are still there when the parent goes on, some are gone.
        let early = n % 2 == 0;
        let p = n * 13 % 1000;
        let child = if early {
            assert_eq!(child.wait(), 0);
            None
        } else {
            Some(child)
        };
        store(&file, p, 1, n).unwrap();
        version[p as usize] = n;
        child.into_iter().for_each(|c| assert_eq!(c.wait(), 0));
        let files = files_in(dir.path()).0;
        assert!(files <= 3, "{files} files after {n} forks");
    }
    for (p, v) in (0..).zip(&version) {
        load(&file, p, 1, *v).unwrap();
    }
    assert!(descriptors_in(dir.path()) <= 4);
    file.trim();
    let (_, taken) = files_in(dir.path());
    assert!(file.diagnostics().returns_space.is_err() || taken < 1100 * page() as u64 + (256 << 10), "{taken} bytes");
}

/// Loads pages, of which each has its version.
fn load_runs(file: &File, versions: &[u64]) {
    let mut first = 0;
    for run in versions.chunk_by(|a, b| a == b) {
        load(file, first, run.len() as u64, run[0]).unwrap();
        first += run.len() as u64;
    }
}

#[test]
fn there_is_a_bound_on_files() {
    // More generations than files; each with too many pages to be merged lightly.
    const GENERATIONS: u64 = 90;
    const EACH: u64 = 70;
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let pages = GENERATIONS * EACH;
    let file = File::open(dir.path(), Some((pages + 1) * page() as u64)).unwrap();
    store(&file, 0, pages, 0).unwrap();
    let mut version = vec![0; pages as usize];
    let gate = Gate::new();
    let mut children = Vec::new();
    for n in 0..GENERATIONS {
        let (file, now) = (&file, version.clone());
        let first = n * EACH;
        // Each generation pins the file that was written before it.
        children.push(fork(file, || {
            gate.pass();
            // The first generations, and the last ones.
            load_runs(file, &now[..first.min(2 * EACH) as usize]);
            if n > 0 {
                load(file, first - EACH, EACH, n).unwrap();
            }
            load(file, first, EACH, 0).unwrap();
            store(file, 50, 20, 5555).unwrap();
            load(file, 50, 20, 5555).unwrap();
        }));
        store(file, first, EACH, n + 1).unwrap();
        version[first as usize..][..EACH as usize].fill(n + 1);
        let files = files_in(dir.path()).0;
        assert!(files <= 64, "{files} files after {n} forks");
        assert!(n < 70 || files > 60, "{files} files: they were not kept apart");
    }
    load_runs(&file, &version);
    gate.open(GENERATIONS as usize);
    children.into_iter().for_each(|c| assert_eq!(c.wait(), 0));
    load_runs(&file, &version);
    file.trim();
    // All of them are this process's own now.
    let (_, taken) = files_in(dir.path());
    let bound = pages * page() as u64 + (1 << 20);
    assert!(file.diagnostics().returns_space.is_err() || taken < bound, "{taken} bytes");
}

#[test]
fn without_descriptors_a_file_stays_sealed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    // In a process of its own, whose limit this is about.
    let process = in_child(|| {
        let file = open(dir.path());
        store(&file, 0, 1000, 1).unwrap();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let set = |current| {
            let new = rustix::process::Rlimit { current, maximum: limit.maximum };
            rustix::process::setrlimit(rustix::process::Resource::Nofile, new).unwrap();
        };
        set(Some(0));
        file.before_fork();
        set(limit.current);
        let child = in_child(|| {
            file.after_fork(ForkSide::Child);
            store(&file, 0, 500, 2).unwrap();
            file.trim();
            load(&file, 0, 500, 2).unwrap();
            load(&file, 500, 500, 1).unwrap();
        });
        file.after_fork(ForkSide::Parent);
        free(&file, 0, 500);
        store(&file, 500, 100, 3).unwrap();
        file.trim();
        load(&file, 500, 100, 3).unwrap();
        load(&file, 600, 400, 1).unwrap();
        assert_eq!(child.wait(), 0);
        // It cannot be told that the other is gone: nothing is taken from it.
        file.trim();
        let (files, taken) = files_in(dir.path());
        assert!(files == 2 && taken >= 1000 * page() as u64);
        // But what holds nothing is closed.
        free(&file, 600, 400);
        store(&file, 0, 1, 4).unwrap();
        let (files, taken) = files_in(dir.path());
        assert!(files == 1 && taken < 200 * page() as u64, "{files} files, {taken} bytes");
    });
    assert_eq!(process.wait(), 0);
}

#[test]
fn a_name_stays_with_the_process_that_opened_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let file = File::open(&path, Some(1 << 20)).unwrap();
    store(&file, 0, 10, 1).unwrap();
    let child = fork(&file, || {
        store(&file, 0, 10, 2).unwrap();
        // It holds nothing of the named file any more, which is in use all the same.
        assert!(File::open(&path, Some(1 << 20)).is_err());
    });
    assert_eq!(child.wait(), 0);
    free(&file, 0, 10);
    assert!(File::open(&path, Some(1 << 20)).is_err());
    store(&file, 0, 10, 3).unwrap();
    load(&file, 0, 10, 3).unwrap();
    // A child that uses it still keeps others out.
    let gate = Gate::new();
    let child = fork(&file, || {
        gate.pass();
        load(&file, 0, 10, 3).unwrap();
    });
    drop(file);
    assert!(File::open(&path, Some(1 << 20)).is_err());
    gate.open(1);
    assert_eq!(child.wait(), 0);
    File::open(&path, Some(1 << 20)).unwrap();
}

#[test]
fn both_can_have_many_requests_in_flight() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = open(dir.path());
    let pages: Vec<u64> = (0..64).map(|i| i * 37).collect();
    store_each(&file, &pages, 1);
    let busy = |own: u64| {
        for round in 0..100 {
            load_each(&file, &pages, if round == 0 { 1 } else { own + round - 1 });
            store_each(&file, &pages, own + round);
        }
    };
    let child = fork(&file, || busy(1000));
    std::thread::scope(|s| {
        s.spawn(|| busy(2000));
    });
    assert_eq!(child.wait(), 0);
    load_each(&file, &pages, 2099);
}
