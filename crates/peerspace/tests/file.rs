//! The storage device against real files, disks and processes.
//!
//! What needs root or a kernel feature that is missing here says so and passes.

#[path = "file/fork.rs"]
mod fork;
#[path = "file/open.rs"]
mod open;
#[path = "file/space.rs"]
mod space;

use peerspace::device::file::File;
use peerspace::device::{Device, DeviceError, DevicePages, Load, Store};
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test at a time: some count descriptors, and a process that one forks would keep the files of the others locked.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn page() -> usize {
    rustix::param::page_size()
}

/// Bytes aligned to a page.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Buffer {
        let memory = vec![0; len + page()];
        let start = memory.as_ptr().addr().next_multiple_of(page()) - memory.as_ptr().addr();
        Buffer { memory, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}

/// Pages as they should be in a version, different in every word.
fn contents(first: u64, count: u64, version: u64) -> Buffer {
    let mut buffer = Buffer::new(count as usize * page());
    let words = page() as u64 / 8;
    for (i, word) in (first * words..).zip(buffer.chunks_exact_mut(8)) {
        let x = (i << 16 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&x.to_le_bytes());
    }
    buffer
}

fn store(file: &File, first: u64, count: u64, version: u64) -> Result<(), DeviceError> {
    let buffer = contents(first, count, version);
    let mut batch = [Store::new(first, &buffer)];
    file.store(&mut batch);
    let [store] = batch;
    store.result
}

fn load(file: &File, first: u64, count: u64, version: u64) -> Result<(), DeviceError> {
    let mut buffer = Buffer::new(count as usize * page());
    let mut batch = [Load::new(first, &mut buffer)];
    file.load(&mut batch);
    let [load] = batch;
    let result = load.result;
    if result.is_ok() {
        let same = *buffer == *contents(first, count, version);
        assert!(same, "{count} pages from {first} on are not those of version {version}");
    }
    result
}

fn free(file: &File, first: u64, count: u64) {
    file.freed(DevicePages { first, count });
}

/// Many single pages in one batch.
fn store_each(file: &File, pages: &[u64], version: u64) {
    let buffers: Vec<_> = pages.iter().map(|p| contents(*p, 1, version)).collect();
    let mut batch: Vec<_> = pages.iter().zip(&buffers).map(|(p, b)| Store::new(*p, b)).collect();
    file.store(&mut batch);
    batch.iter().for_each(|s| assert_eq!(s.result, Ok(()), "page {}", s.page));
}

fn load_each(file: &File, pages: &[u64], version: u64) {
    let mut buffers: Vec<_> = pages.iter().map(|_| Buffer::new(page())).collect();
    let mut batch: Vec<_> = pages.iter().zip(&mut buffers).map(|(p, b)| Load::new(*p, b)).collect();
    file.load(&mut batch);
    for l in &batch {
        assert_eq!(l.result, Ok(()), "page {}", l.page);
        assert!(*l.bytes == *contents(l.page, 1, version), "page {} is not that of version {version}", l.page);
    }
}

/// Runs `work` in a file system of its own at a path, or says why not. `kind`: tmpfs with options, or ext4 in a
/// loop device of so many MiB.
fn mounted(kind: Mount, work: impl FnOnce(&Path)) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can mount a file system");
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("mount");
    std::fs::create_dir(&at).unwrap();
    let run = |command: &mut Command| match command.output() {
        Ok(o) if o.status.success() => Ok(()),
        Ok(o) => Err(String::from_utf8_lossy(&o.stderr).into_owned()),
        Err(e) => Err(e.to_string()),
    };
    let done = match kind {
        Mount::Tmpfs(options) => run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&at)),
        Mount::Ext4(mib) => {
            let image = dir.path().join("image");
            std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
            run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&image))
                .and_then(|()| run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at)))
        }
    };
    if let Err(why) = done {
        return eprintln!("skipped: cannot mount {kind:?}: {why}");
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&at)));
    let gone = run(Command::new("umount").arg(&at));
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
    // Busy: somebody still holds a file.
    gone.unwrap();
}

#[derive(Debug, Clone, Copy)]
enum Mount {
    Tmpfs(&'static str),
    Ext4(u64),
}
