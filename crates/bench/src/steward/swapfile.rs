//! Swap on a file.

use super::swap::{Named, Swap};
use crate::error::Trouble;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};
use std::path::Path;

/// A swap file. The fields are dropped in their order: swap off, then the file.
#[derive(Debug)]
pub(super) struct SwapFile {
    _swap: Swap,
    _file: Named,
}

impl SwapFile {
    pub(super) fn new(dir: &Path, bytes: u64) -> Result<SwapFile, Trouble> {
        // The kernel lets nobody remove a file that it swaps to, so it has a name as long as it lives.
        let path = dir.join(format!("peerspace-bench-{}.swap", std::process::id()));
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(Trouble::unavailable("make a swap file"))?;
        let file = Named(path);
        fallocate(&fd, FallocateFlags::empty(), 0, bytes)
            .map_err(Trouble::unavailable("make room for a swap file"))?;
        drop(fd);
        let swap = Swap::on(&file.0, bytes)?;
        Ok(SwapFile { _swap: swap, _file: file })
    }

    pub(super) fn what(&self) -> String {
        "swap file".into()
    }
}
