//! Devices as users write them, with errors that say what was wrong and what is right.

use crate::device::Device;
use crate::size::Size;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A device as written on a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceSpec {
    /// `compressed[:SIZE]`: a store in RAM, compressed, of at most SIZE bytes.
    Compressed(Option<Size>),
    /// `file:PATH[:SIZE]`: an unlinked file in the directory PATH, or the file PATH itself, of at most SIZE bytes.
    File(PathBuf, Option<Size>),
    /// `dax:SIZE` or `dax:PATH[:SIZE]`: memory that the CPU addresses in place, of a memory file or of what is at PATH: a
    /// directory (an unlinked file in it), a file, or a device node. What leaves RAM goes there, too.
    Dax(Option<PathBuf>, Option<Size>),
    /// `soft:SIZE`: plain memory behind the device interface.
    Soft(Size),
}

/// A device specification that cannot be understood, or a device that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// No such kind of device.
    #[error("there is no device {0:?}; there are: {KINDS}")]
    Unknown(String),
    /// What follows the kind is wrong.
    #[error("device {0:?}: {1}")]
    Malformed(String, String),
    /// This build has no such device.
    #[error("device {0:?}: this build of peerspace was made without it (cargo feature {1:?})")]
    NotBuilt(String, &'static str),
    /// It cannot be opened.
    #[error("device {0:?}: {1}")]
    CannotOpen(String, String),
}

/// The devices there are, for help and errors.
pub const KINDS: &str = "compressed[:SIZE], file:PATH[:SIZE], dax:SIZE, dax:PATH[:SIZE], soft:SIZE";

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<DeviceSpec, SpecError> {
        let malformed = |why: &dyn fmt::Display| SpecError::Malformed(s.into(), why.to_string());
        let (kind, rest) = s.split_once(':').map_or((s, None), |(k, r)| (k, Some(r)));
        let size = |text: &str| text.parse::<Size>().map_err(|e| malformed(&e));
        let path = |text: &str| match text.rsplit_once(':') {
            // A path may contain colons itself: only what is a size is taken for one.
            Some((path, tail)) if !path.is_empty() && tail.starts_with(|c: char| c.is_ascii_digit()) => {
                Ok((PathBuf::from(path), Some(size(tail)?)))
            }
            _ => Ok((text.into(), None)),
        };
        match (kind, rest) {
            ("compressed", None) => Ok(DeviceSpec::Compressed(None)),
            ("compressed", Some(r)) => Ok(DeviceSpec::Compressed(Some(size(r)?))),
            ("file", None | Some("")) => Err(malformed(&"it needs a path, as in file:/var/tmp or file:/var/tmp:8G")),
            ("file", Some(r)) => path(r).map(|(path, size)| DeviceSpec::File(path, size)),
            ("dax", None | Some("")) => {
                Err(malformed(&"it needs a size or a path, as in dax:1G, dax:/dev/dax0.0 or dax:/mnt/pmem:8G"))
            }
            // What looks like a size is one; a file of such a name is ./64M.
            ("dax", Some(r)) if r.starts_with(|c: char| c.is_ascii_digit()) => {
                Ok(DeviceSpec::Dax(None, Some(size(r)?)))
            }
            ("dax", Some(r)) => path(r).map(|(path, size)| DeviceSpec::Dax(Some(path), size)),
            ("soft", None | Some("")) => Err(malformed(&"it needs a size, as in soft:1G")),
            ("soft", Some(r)) => Ok(DeviceSpec::Soft(size(r)?)),
            _ => Err(SpecError::Unknown(kind.into())),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Compressed(None) => f.write_str("compressed"),
            DeviceSpec::Compressed(Some(size)) => write!(f, "compressed:{size}"),
            DeviceSpec::File(path, None) => write!(f, "file:{}", path.display()),
            DeviceSpec::File(path, Some(size)) => write!(f, "file:{}:{size}", path.display()),
            DeviceSpec::Dax(None, None) => f.write_str("dax"),
            DeviceSpec::Dax(None, Some(size)) => write!(f, "dax:{size}"),
            DeviceSpec::Dax(Some(path), None) => write!(f, "dax:{}", path.display()),
            DeviceSpec::Dax(Some(path), Some(size)) => write!(f, "dax:{}:{size}", path.display()),
            DeviceSpec::Soft(size) => write!(f, "soft:{size}"),
        }
    }
}

/// A device that is kept for a process to be started: see [`DeviceSpec::reserve`].
#[derive(Debug, Default)]
pub struct Reservation(#[allow(dead_code)] Kept);

/// What is kept: dropping it gives it up.
#[derive(Debug, Default)]
#[allow(dead_code)]
enum Kept {
    #[default]
    Nothing,
    #[cfg(feature = "file")]
    File(crate::device::file::Reservation),
    #[cfg(feature = "dax")]
    Dax(crate::device::dax::reservation::Reservation),
}

/// A device that was opened, in our own memory.
pub(crate) type OpenDevice = peerspace_os::own::Box<dyn Device>;

/// Moves a device into our own memory.
pub(crate) fn own(device: impl Device + 'static) -> OpenDevice {
    use peerspace_os::own::{Box, Own};
    allocator_api2::unsize_box!(Box::new_in(device, Own))
}

impl DeviceSpec {
    /// Opens the device. A size that was not given follows from `host`, the budget of RAM it stands behind.
    ///
    /// # Errors
    /// When it cannot be had, or this build is without it.
    pub(crate) fn open(&self, host: u64) -> Result<OpenDevice, SpecError> {
        let _ = host;
        match self {
            #[cfg(feature = "soft")]
            DeviceSpec::Soft(size) => {
                Ok(own(crate::device::soft::Soft::new(size.0).map_err(|e| self.cannot_open(&e))?))
            }
            #[cfg(not(feature = "soft"))]
            DeviceSpec::Soft(_) => Err(SpecError::NotBuilt(self.to_string(), "soft")),
            #[cfg(feature = "compressed")]
            DeviceSpec::Compressed(size) => {
                let bytes = size.map_or(host, |s| s.0);
                let store = crate::device::compressed::Compressed::new(bytes);
                Ok(own(store
                    .map_err(|_| self.cannot_open(&format_args!("there is no address space for {bytes} bytes")))?))
            }
            #[cfg(not(feature = "compressed"))]
            DeviceSpec::Compressed(_) => Err(SpecError::NotBuilt(self.to_string(), "compressed")),
            #[cfg(feature = "file")]
            DeviceSpec::File(path, size) => {
                let file = crate::device::file::File::open(path, size.map(|s| s.0));
                Ok(own(file.map_err(|e| self.cannot_open(&e))?))
            }
            #[cfg(not(feature = "file"))]
            DeviceSpec::File(..) => Err(SpecError::NotBuilt(self.to_string(), "file")),
            #[cfg(feature = "dax")]
            DeviceSpec::Dax(path, size) => {
                let options = Self::dax_options(*size);
                let dax = match path {
                    Some(path) => options.open(path),
                    None => options.memory(),
                };
                Ok(own(dax.map_err(|e| self.cannot_open(&e))?))
            }
            #[cfg(not(feature = "dax"))]
            DeviceSpec::Dax(..) => Err(SpecError::NotBuilt(self.to_string(), "dax")),
        }
    }

    #[allow(dead_code)] // not without any device
    fn cannot_open(&self, why: &dyn fmt::Display) -> SpecError {
        SpecError::CannotOpen(self.to_string(), why.to_string())
    }

    /// Opens the device on trial, and keeps a named file for the process that is to
    /// [have](DeviceSpec::open_reserved) the device, until what is returned is dropped.
    ///
    /// # Errors
    /// As [`open`](DeviceSpec::open). A file that was not there is not left behind.
    pub fn reserve(&self, host: u64) -> Result<Reservation, SpecError> {
        #[cfg(feature = "file")]
        if let DeviceSpec::File(path, size) = self {
            let file = crate::device::file::Reservation::new(path, size.map(|s| s.0));
            let kept = |file: Option<_>| Reservation(file.map_or(Kept::Nothing, Kept::File));
            return file.map(kept).map_err(|e| self.cannot_open(&e));
        }
        #[cfg(feature = "dax")]
        if let DeviceSpec::Dax(Some(path), _) = self {
            let fresh = !path.exists();
            drop(self.open(host)?);
            // In a directory everybody has a file of his own; a node is had by whoever comes first.
            let reserve = || crate::device::dax::reservation::Reservation::new(path, fresh);
            let dax = path.is_file().then(reserve).transpose().map_err(|e| self.cannot_open(&e))?;
            return Ok(Reservation(dax.map_or(Kept::Nothing, Kept::Dax)));
        }
        drop(self.open(host)?);
        Ok(Reservation::default())
    }

    /// Opens the device in a process for which it was [reserved](DeviceSpec::reserve).
    #[cfg(feature = "process")]
    pub(crate) fn open_reserved(&self, host: u64) -> Result<OpenDevice, SpecError> {
        #[cfg(feature = "file")]
        if let DeviceSpec::File(path, size) = self {
            let file = crate::device::file::File::open_reserved(path, size.map(|s| s.0));
            return file.map(own).map_err(|e| self.cannot_open(&e));
        }
        #[cfg(feature = "dax")]
        if let DeviceSpec::Dax(Some(path), size) = self {
            let dax = Self::dax_options(*size).reserved().open(path);
            return dax.map(own).map_err(|e| self.cannot_open(&e));
        }
        self.open(host)
    }

    #[cfg(feature = "dax")]
    fn dax_options(size: Option<Size>) -> crate::device::dax::Options {
        let options = crate::device::dax::Dax::options().takes_evicted();
        size.map_or(options.clone(), |size| options.size(size.0))
    }

    /// The same device for a process that is elsewhere: its path from the root on.
    pub fn absolute(&self) -> DeviceSpec {
        match self {
            // A path that cannot be made absolute is empty, and is refused when it is opened.
            DeviceSpec::File(path, size) => {
                DeviceSpec::File(std::path::absolute(path).unwrap_or_else(|_| path.clone()), *size)
            }
            DeviceSpec::Dax(Some(path), size) => {
                DeviceSpec::Dax(Some(std::path::absolute(path).unwrap_or_else(|_| path.clone())), *size)
            }
            other => other.clone(),
        }
    }

    /// The same kind of device for another process: one that shares nothing with this one. In the place of a named
    /// file that is an unlinked one in its directory. A device node can be had once: whoever comes second is told so.
    pub fn beside(&self) -> DeviceSpec {
        let directory = |path: &std::path::Path| -> PathBuf {
            path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(std::path::Path::new(".")).into()
        };
        match self {
            DeviceSpec::File(path, size) if !path.is_dir() => DeviceSpec::File(directory(path), *size),
            // Of the same size, which a directory does not say.
            DeviceSpec::Dax(Some(path), size) if !path.exists() || path.is_file() => {
                let has = std::fs::metadata(path).ok().map(|m| Size(m.len())).filter(|s| s.0 > 0);
                DeviceSpec::Dax(Some(directory(path)), size.or(has))
            }
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_gets_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let directory = DeviceSpec::File(dir.path().into(), Some(Size(7)));
        assert_eq!(directory.beside(), directory);
        assert_eq!(DeviceSpec::File(dir.path().join("named"), Some(Size(7))).beside(), directory);
        assert_eq!(DeviceSpec::File("named".into(), None).beside(), DeviceSpec::File(".".into(), None));
        assert_eq!(DeviceSpec::Soft(Size(7)).beside(), DeviceSpec::Soft(Size(7)));
    }

    #[cfg(feature = "file")]
    #[test]
    fn trying_a_device_out_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("named");
        DeviceSpec::File(path.clone(), Some(Size(1 << 24))).reserve(1 << 24).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, b"").unwrap();
        DeviceSpec::File(path.clone(), Some(Size(1 << 24))).reserve(1 << 24).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn devices_are_read_and_written() {
        for text in
            ["compressed", "compressed:1G", "file:/tmp", "file:/tmp/a:b", "file:/tmp:8G", "soft:64M", "dax:1G"]
        {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        for text in ["dax:/dev/dax0.0", "dax:./64M", "dax:/mnt/pmem:8G"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        assert_eq!("dax:64M".parse(), Ok(DeviceSpec::Dax(None, Some(Size(64 << 20)))));
        assert_eq!("file:/a:b:7".parse(), Ok(DeviceSpec::File("/a:b".into(), Some(Size(7)))));
        for bad in [
            "",
            "tape",
            "compressed:",
            "compressed:x",
            "file",
            "file:",
            "soft",
            "file:/tmp:9Q",
            "dax",
            "dax:",
            "dax:7Q",
            "dax:/a:7Q",
        ] {
            let e = bad.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(!e.is_empty(), "{bad}");
        }
        assert!("tape".parse::<DeviceSpec>().unwrap_err().to_string().contains("compressed[:SIZE]"));
    }
}
