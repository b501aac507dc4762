//! Swap on a block device or a file: the header that makes it one, and the two system calls.

use super::patiently;
use crate::error::Trouble;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The highest priority there is, so that whatever is swapped meanwhile is swapped here.
const PRIORITY: i32 = 0x7fff;
const PREFER: i32 = 0x8000;

/// Swap that is on. Dropped, it is off.
#[derive(Debug)]
pub(super) struct Swap {
    path: CString,
}

impl Swap {
    /// Makes `path`, which has `bytes` bytes, swap.
    pub(super) fn on(path: &Path, bytes: u64) -> Result<Swap, Trouble> {
        let failed = |what: &str| Trouble::unavailable::<io::Error>(format!("{what} {}", path.display()));
        let file = OpenOptions::new().write(true).open(path).map_err(failed("open"))?;
        let page = rustix::param::page_size();
        file.write_all_at(&header(page, bytes), 0).and_then(|()| file.sync_all()).map_err(failed("write to"))?;
        drop(file);
        let c = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Trouble::Unavailable(format!("{} has a zero byte in its name", path.display())))?;
        // SAFETY: the path is a string that ends with zero; the call touches no memory of ours.
        if unsafe { libc::swapon(c.as_ptr(), PREFER | PRIORITY) } != 0 {
            return Err(failed("swap on")(io::Error::last_os_error()));
        }
        Ok(Swap { path: c })
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        patiently("swap off", || {
            // SAFETY: as for swapon.
            if unsafe { libc::swapoff(self.path.as_ptr()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
}

/// The first page of a swap area: version, last page, signature at the end.
fn header(page: usize, bytes: u64) -> Vec<u8> {
    let mut header = vec![0; page];
    header[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    header[1028..1032].copy_from_slice(&((bytes / page as u64 - 1) as u32).to_ne_bytes());
    header[page - 10..].copy_from_slice(b"SWAPSPACE2");
    header
}

/// A path that is removed when dropped.
#[derive(Debug)]
pub(super) struct Named(pub(super) PathBuf);

impl Drop for Named {
    fn drop(&mut self) {
        patiently("remove a swap file", || std::fs::remove_file(&self.0));
    }
}
