//! Errors of set-up calls: what was tried, on what, why it failed, and what can be done about it.

use std::fmt;

/// A system interface refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OsError {
    /// What was tried: "open /dev/userfaultfd", say.
    pub what: String,
    /// The errno, or 0 where there was none.
    pub errno: i32,
    /// What the user can do about it; empty where nothing is known.
    pub remedy: &'static str,
}

impl OsError {
    /// An error of `what` with the errno of a rustix call.
    pub fn new(what: impl Into<String>, errno: rustix::io::Errno) -> OsError {
        OsError { what: what.into(), errno: errno.raw_os_error(), remedy: "" }
    }

    /// An error without an errno.
    pub fn plain(what: impl Into<String>) -> OsError {
        OsError { what: what.into(), errno: 0, remedy: "" }
    }

    /// The same with a remedy.
    #[must_use]
    pub fn remedy(self, remedy: &'static str) -> OsError {
        OsError { remedy, ..self }
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.errno != 0 {
            write!(f, ": {}", std::io::Error::from_raw_os_error(self.errno))?;
        }
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for OsError {}
