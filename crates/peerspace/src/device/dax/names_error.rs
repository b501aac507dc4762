//! Why the directory of a persistent device cannot be made, read or changed, said so that one knows what to do about
//! it.
//!
//! Plain values: nothing here is shared or locked.

use super::format::DIRECTORY;
use std::io;

/// Why the directory of a persistent device could not be made, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamesError {
    /// Something is there that is not ours.
    #[error(
        "the device holds something else: found {found} at offset {at}, expected a directory that begins with \
         \"peerspace-names\", or nothing but zeros. It was not touched; if nothing of value is on the device, zero its \
         first {DIRECTORY} bytes"
    )]
    Foreign {
        /// Where, in bytes from the start of the device.
        at: u64,
        /// The bytes there.
        found: String,
    },
    /// There is a directory where one was to be made.
    #[error(
        "the device has a directory already: open it, or zero the device's first {DIRECTORY} bytes to give up all of it"
    )]
    Occupied,
    /// There is no directory.
    #[error("the device has no directory: found nothing but zeros where it should be. Create one first")]
    Empty,
    /// The making of the directory was interrupted.
    #[error(
        "the device's directory was not finished when it was made, so that it never held anything. Create it again"
    )]
    Unfinished,
    /// The directory is of another version.
    #[error("the device's directory is of version {found}, and this build understands {expected}: use one that fits")]
    Version {
        /// The directory's.
        found: u32,
        /// This build's.
        expected: u32,
    },
    /// The directory was made for a device that looks otherwise.
    #[error(
        "the device's directory was made for another {what}: it says {found}, and the device has {expected}. \
         Configure the device as it was"
    )]
    Geometry {
        /// What differs.
        what: &'static str,
        /// What the directory says.
        found: u64,
        /// What it is.
        expected: u64,
    },
    /// The device is smaller than it was.
    #[error("the device is cut short: found {found} bytes, expected {expected}. Configure it as large as it was")]
    Truncated {
        /// Bytes that are there.
        found: u64,
        /// Bytes that there should be.
        expected: u64,
    },
    /// No directory can be made on such a device.
    #[error("no directory for a device with a {what} of {given}: expected {expected}")]
    Shape {
        /// What does not fit.
        what: &'static str,
        /// What it is.
        given: u64,
        /// What would do.
        expected: String,
    },
    /// The directory is damaged.
    #[error(
        "the device's directory is damaged: {part} at offset {at} has checksum {found:#x}, expected {expected:#x}. \
         Nothing was changed; restore it from a copy, or zero the first {DIRECTORY} bytes to give up what the device holds"
    )]
    Checksum {
        /// Which part.
        part: &'static str,
        /// Where it is, in bytes from the start of the device.
        at: u64,
        /// What it says.
        found: u64,
        /// What its bytes add up to.
        expected: u64,
    },
    /// The directory contradicts itself.
    #[error(
        "the device's directory makes no sense: at offset {at}, {what}. Nothing was changed; restore it from a copy, \
         or zero the first {DIRECTORY} bytes to give up what the device holds"
    )]
    Inconsistent {
        /// Where, in bytes from the start of the device.
        at: u64,
        /// What was found, and what was expected.
        what: String,
    },
    /// No region can be called that.
    #[error("{name:?} cannot be the name of a region: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A region without a byte.
    #[error("the region {name:?} was asked for with 0 bytes: expected 1 or more")]
    NoBytes {
        /// Its name.
        name: String,
    },
    /// The name is taken.
    #[error("the device has a region {name:?} already: open or remove that one, or choose another name")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no region of that name.
    #[error("the device has no region {name:?}")]
    Missing {
        /// The name.
        name: String,
    },
    /// Too few blocks are free.
    #[error(
        "no room on the device: {asked} blocks asked for, {free} are free, and {largest} of them in one piece. \
         Remove a region"
    )]
    NoRoom {
        /// Blocks that were asked for.
        asked: u64,
        /// Blocks that are free.
        free: u64,
        /// The longest run of them.
        largest: u64,
    },
    /// The directory has no place for another entry.
    #[error(
        "the device's directory is full: {used} of {capacity} bytes are taken up by {regions} regions, and this one \
         needs {needed}, {extents} extents among them. Remove a region"
    )]
    Full {
        /// Regions that there are.
        regions: usize,
        /// Bytes of the directory that they take up.
        used: usize,
        /// Bytes that there are.
        capacity: usize,
        /// Bytes that one more needs.
        needed: usize,
        /// Pieces that it would have.
        extents: usize,
    },
    /// An earlier change failed half way.
    #[error(
        "an earlier change of the device's directory failed half way, and whether it took place is not known: open \
         the device again"
    )]
    Uncertain,
    /// The medium failed.
    #[error("cannot {what} the device at offset {at}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where, in bytes from the start of the device.
        at: u64,
        /// What the medium said.
        #[source]
        error: io::Error,
    },
}

/// Says what was tried, and where.
pub(super) fn failed(what: &'static str, at: u64) -> impl Fn(io::Error) -> NamesError {
    move |error| NamesError::Io { what, at, error }
}
