//! The library to preload, as a file that the dynamic loader can open.
//!
//! It is carried inside the command. Programs that run for longer than the command itself (daemons) may start others
//! later, so it is kept as a file in the user's cache; where there is none, an anonymous file of the command's own
//! serves as long as the command runs.

use rustix::fs::{MemfdFlags, memfd_create};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpeerspace_preload.so"));

/// Where the library is. Lives as long as the path is to be good.
#[derive(Debug)]
pub(crate) struct Library {
    path: PathBuf,
    _file: Option<OwnedFd>,
}

impl Library {
    /// Finds the library, or puts it where it can be found.
    pub(crate) fn find() -> io::Result<Library> {
        if let Some(path) = std::env::var_os("PEERSPACE_PRELOAD") {
            let path = PathBuf::from(path);
            fs::File::open(&path)?;
            return Ok(Library { path, _file: None });
        }
        if let Some(path) = cache().and_then(|dir| keep(&dir).ok()) {
            return Ok(Library { path, _file: None });
        }
        let file = memfd_create("peerspace-preload", MemfdFlags::empty())?;
        let mut writer = fs::File::from(file.try_clone()?);
        writer.write_all(LIBRARY)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into();
        Ok(Library { path, _file: Some(file) })
    }

    /// What `LD_PRELOAD` shall be, if it is `before` now.
    pub(crate) fn preload(&self, before: Option<OsString>) -> OsString {
        let mut list = self.path.clone().into_os_string();
        if let Some(before) = before.filter(|b| !b.is_empty()) {
            list.push(":");
            list.push(before);
        }
        list
    }
}

/// The user's cache directory for us.
fn cache() -> Option<PathBuf> {
    let absolute = |p: OsString| Some(PathBuf::from(p)).filter(|p| p.is_absolute());
    let base = std::env::var_os("XDG_CACHE_HOME")
        .and_then(absolute)
        .or_else(|| std::env::var_os("HOME").and_then(absolute).map(|h| h.join(".cache")))?;
    // The loader takes these for separators.
    let plain = !base.to_string_lossy().contains([':', ' ']);
    plain.then(|| base.join("peerspace"))
}

/// Keeps the library in `dir`, under a name that says what is in it.
fn keep(dir: &Path) -> io::Result<PathBuf> {
    let sum = xxhash_rust::xxh3::xxh3_128(LIBRARY);
    let path = dir.join(format!("libpeerspace_preload-{sum:032x}.so"));
    if fs::read(&path).is_ok_and(|kept| kept == LIBRARY) {
        return Ok(path);
    }
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(LIBRARY)?;
    rustix::fs::fchmod(file.as_file(), rustix::fs::Mode::from_raw_mode(0o644))?;
    // Others may do the same at the same time: the last one wins, and all are the same.
    file.persist(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_whole_and_mended_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = keep(dir.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), LIBRARY);
        fs::write(&path, b"something else").unwrap();
        assert_eq!(keep(dir.path()).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), LIBRARY);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn other_libraries_stay_preloaded() {
        let library = Library { path: "/x.so".into(), _file: None };
        assert_eq!(library.preload(None), "/x.so");
        assert_eq!(library.preload(Some("".into())), "/x.so");
        assert_eq!(library.preload(Some("/y.so".into())), "/x.so:/y.so");
    }
}
