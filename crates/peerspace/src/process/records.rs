//! What is written down: the options a process is run with, and the report of what it did.
//!
//! Both are JSON. The options travel in an environment variable to every process that the program starts; the report
//! is the contract of `--report`: sizes in bytes, times in nanoseconds.

#[cfg(feature = "devices")]
use crate::device::failing::FailureSpec;
use crate::report::{Statistics, ThpStatistics};
#[cfg(feature = "devices")]
use crate::spec::DeviceSpec;
use peerspace_os::linux::files;
use rustix::fs::{self, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// How a process is to be run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Budget of RAM, in bytes, of each process.
    pub host: u64,
    /// Faults by signal instead of threads.
    pub by_signal: bool,
    /// The devices, as written on the command line.
    pub devices: Vec<String>,
    /// Failures of devices to be brought about, as written on the command line.
    #[serde(default)]
    pub inject: Vec<String>,
    /// Where the report of the first process goes; other processes append their number.
    pub report: Option<PathBuf>,
    /// Who starts the first process.
    pub parent: i32,
    /// A file that the first process keeps its record in, for whoever started it.
    pub record: Option<PathBuf>,
}

impl Options {
    /// The environment variable that carries the options.
    pub const VARIABLE: &str = "PEERSPACE_RUN";

    /// The devices, understood.
    ///
    /// # Errors
    /// For a specification that is malformed.
    #[cfg(feature = "devices")]
    pub fn specs(&self) -> Result<Vec<DeviceSpec>, crate::spec::SpecError> {
        self.devices.iter().map(|d| d.parse()).collect()
    }

    /// After how many pages device `i` is to fail, if it is.
    #[cfg(feature = "devices")]
    pub(crate) fn failure(&self, i: usize) -> Option<u64> {
        let mut failures = self.inject.iter().filter_map(|f| f.parse::<FailureSpec>().ok());
        failures.find(|f| f.device == i + 1).map(|f| f.pages)
    }
}

/// The report of one process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    /// The program's exit status, or 128 and the signal that ended it; absent where nobody knows.
    pub exit_status: Option<i32>,
    /// From start to end.
    pub wall_seconds: f64,
    /// RAM.
    pub host: HostRecord,
    /// Faults.
    pub faults: FaultRecord,
    /// Pages moved.
    pub pages: PageRecord,
    /// Bytes moved.
    pub bytes: ByteRecord,
    /// Huge folios.
    pub folios: FolioRecord,
    /// The devices, in the order in which they are tried.
    pub devices: Vec<DeviceRecord>,
    /// Pages lost.
    pub errors: u64,
}

/// RAM of managed memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostRecord {
    /// The budget.
    pub limit_bytes: u64,
    /// The most that was in use.
    pub peak_bytes: u64,
}

/// Faults by what they took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FaultRecord {
    /// All of them.
    pub total: u64,
    /// On memory never touched.
    pub zero_fill: u64,
    /// Resolved from standby.
    pub standby: u64,
    /// Resolved from a device.
    pub device: u64,
    /// Resolved by a huge folio.
    pub huge: u64,
    /// Half of them took no longer.
    pub p50_ns: u64,
    /// 99 % of them took no longer.
    pub p99_ns: u64,
}

/// Pages that moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PageRecord {
    /// From devices.
    #[serde(rename = "in")]
    pub in_: u64,
    /// To devices.
    pub out: u64,
    /// Dropped without being written.
    pub clean_dropped: u64,
}

/// Bytes that moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ByteRecord {
    /// From devices.
    #[serde(rename = "in")]
    pub in_: u64,
    /// To devices.
    pub out: u64,
}

/// Huge folios.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FolioRecord {
    /// Huge mappings made.
    pub huge_mapped: u64,
    /// Huge mappings broken into small ones.
    pub splits: u64,
    /// Small pages put together.
    pub collapses: u64,
    /// More of it, by the names of `/proc/vmstat`.
    #[serde(flatten)]
    pub thp: ThpStatistics,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its name.
    pub name: String,
    /// private, coherent or persistent.
    #[serde(rename = "type")]
    pub memory: String,
    /// What bounds it.
    pub capacity_bytes: u64,
    /// What it took up at the end.
    pub used_bytes: u64,
    /// The most it took up.
    pub peak_bytes: u64,
    /// Pages read from it.
    pub loads: u64,
    /// Pages written to it.
    pub stores: u64,
}

impl Record {
    /// The record of a process that never came near its budget of `limit` bytes; `peak` is what it had.
    pub fn idle(limit: u64, peak: u64) -> Record {
        Record { host: HostRecord { limit_bytes: limit, peak_bytes: peak }, ..Record::default() }
    }

    /// The record that `s` amounts to, with the limit and peak that the whole process had.
    pub(super) fn of(s: &Statistics, limit: u64, peak: u64, page: u64) -> Record {
        Record {
            exit_status: None,
            wall_seconds: 0.0,
            host: HostRecord { limit_bytes: limit, peak_bytes: peak },
            faults: FaultRecord {
                total: s.faults.total,
                zero_fill: s.faults.zero_fill,
                standby: s.faults.standby,
                device: s.faults.device,
                huge: s.faults.huge,
                p50_ns: s.faults.p50.as_nanos() as u64,
                p99_ns: s.faults.p99.as_nanos() as u64,
            },
            pages: PageRecord { in_: s.pages_in, out: s.pages_out, clean_dropped: s.clean_dropped },
            bytes: ByteRecord { in_: s.pages_in * page, out: s.pages_out * page },
            folios: FolioRecord { huge_mapped: s.huge_mapped, splits: s.splits, collapses: s.collapses, thp: s.thp },
            devices: s
                .devices
                .iter()
                .map(|d| DeviceRecord {
                    name: d.name.clone(),
                    memory: d.memory.into(),
                    capacity_bytes: d.capacity_bytes,
                    used_bytes: d.used_bytes,
                    peak_bytes: d.peak_bytes,
                    loads: d.loads,
                    stores: d.stores,
                })
                .collect(),
            errors: s.poisoned,
        }
    }
}

/// Writes a record to `path`: all of it or nothing, also when the process is killed meanwhile.
pub(super) fn write_down(path: &Path, text: &[u8]) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(0o644);
    let write = |fd: OwnedFd| -> Result<OwnedFd, Errno> {
        let mut rest = text;
        while !rest.is_empty() {
            match rustix::io::write(&fd, rest) {
                Ok(0) => return Err(Errno::IO),
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(fd)
    };
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let unnamed = fs::open(directory, OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC, mode);
    if let Ok(fd) = unnamed.and_then(write) {
        let there = files::path(fd.as_fd());
        let link = || fs::linkat(CWD, there.as_c_str(), CWD, path, AtFlags::SYMLINK_FOLLOW);
        // One of an older process of that number.
        let linked = link().or_else(|_| fs::unlink(path).and_then(|()| link()));
        if linked.is_ok() {
            return linked;
        }
    }
    // File systems that know no files without names.
    fs::open(path, OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::TRUNC, mode).and_then(write).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_names_that_scripts_rely_on() {
        let mut record = Record::idle(100, 50);
        record.devices.push(DeviceRecord {
            name: "compressed".into(),
            memory: "private".into(),
            ..Default::default()
        });
        let json: serde_json::Value = serde_json::to_value(&record).unwrap();
        for path in [
            "/exit_status",
            "/wall_seconds",
            "/host/limit_bytes",
            "/host/peak_bytes",
            "/faults/total",
            "/faults/zero_fill",
            "/faults/standby",
            "/faults/device",
            "/faults/huge",
            "/faults/p50_ns",
            "/faults/p99_ns",
            "/pages/in",
            "/pages/out",
            "/pages/clean_dropped",
            "/bytes/in",
            "/bytes/out",
            "/folios/huge_mapped",
            "/folios/splits",
            "/folios/collapses",
            "/folios/thp_deferred_split_page",
            "/folios/anon_huge_bytes",
            "/devices/0/name",
            "/devices/0/type",
            "/devices/0/capacity_bytes",
            "/devices/0/used_bytes",
            "/devices/0/peak_bytes",
            "/devices/0/loads",
            "/devices/0/stores",
            "/errors",
        ] {
            assert!(json.pointer(path).is_some(), "{path} is missing in {json}");
        }
        assert_eq!(serde_json::from_value::<Record>(json).unwrap(), record);
    }

    #[test]
    fn options_survive_the_environment() {
        let options = Options {
            host: 1 << 28,
            by_signal: false,
            devices: vec!["compressed:1G".into(), "file:/tmp".into()],
            inject: vec!["2:70".into()],
            report: Some("/tmp/r.json".into()),
            parent: 7,
            record: None,
        };
        let text = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<Options>(&text).unwrap(), options);
        #[cfg(feature = "devices")]
        assert_eq!(options.specs().unwrap().len(), 2);
    }

    #[test]
    fn what_is_written_down_takes_the_place_of_what_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        for text in ["a first one, which is longer", "a second"] {
            write_down(&path, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
        assert_eq!(write_down(&directory.path().join("no/where"), b"x"), Err(Errno::NOENT));
    }
}
