//! Where things are in a file: the header in its first page, then the device's pages in order.
//!
//! ```text
//!  0            page            2 * page                          (pages + 1) * page
//!  +-- header --+--- page 0 ----+--- page 1 ----+-- ... ----------+
//! ```
//!
//! The header says whose the file is, and nothing else: what the pages mean is known to the process alone, so a
//! file found with a header is one that a process left behind, free to be used again.
//!
//! Plain values: nothing here is shared or locked.

use super::record::GROUP;
use crate::device::{DeviceError, DevicePages};
use rustix::io::Errno;
use std::ops::Range;

/// What a header begins with.
pub(super) const MAGIC: &[u8; 16] = b"peerspace-pages\n";
const VERSION: u32 = 1;
/// The part of a header that says anything; it is shorter than any page.
pub(super) const HEADER: usize = 48;

/// The size of the machine's pages.
pub(super) fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// The smallest file: a header and a page.
pub(super) fn least_bytes() -> u64 {
    2 * page_bytes() as u64
}

/// How a file is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    page: usize,
    /// Pages of the device.
    pub(super) pages: u64,
}

impl Layout {
    /// A file of at most `bytes` bytes, which are no fewer than [`least_bytes`].
    pub(super) fn within(bytes: u64) -> Layout {
        let page = page_bytes();
        Layout { page, pages: (bytes / page as u64).saturating_sub(1) }
    }

    /// Bytes of the file.
    pub(super) fn bytes(self) -> u64 {
        self.offset(self.pages)
    }

    pub(super) fn page(self) -> usize {
        self.page
    }

    /// Where `page` begins.
    pub(super) fn offset(self, page: u64) -> u64 {
        (page + 1) * self.page as u64
    }

    /// The page that begins at or before `offset`.
    pub(super) fn page_at(self, offset: u64) -> u64 {
        (offset / self.page as u64).saturating_sub(1)
    }

    /// `pages` in bytes.
    pub(super) fn len(self, pages: u64) -> u64 {
        pages * self.page as u64
    }

    /// The pages of `group`.
    pub(super) fn group(self, group: u64) -> Range<u64> {
        group * GROUP..((group + 1) * GROUP).min(self.pages)
    }

    /// How many pages a transfer of `bytes` bytes from `first` on is about.
    ///
    /// # Errors
    /// When that is none, no whole number, or beyond the end.
    pub(super) fn check(self, first: u64, bytes: usize) -> Result<u64, DeviceError> {
        let count = (bytes / self.page) as u64;
        let fits = first.checked_add(count).is_some_and(|end| end <= self.pages);
        if count == 0 || !bytes.is_multiple_of(self.page) || !fits {
            return Err(DeviceError::Io(Errno::INVAL.raw_os_error()));
        }
        Ok(count)
    }

    /// The part of `pages` that exists.
    pub(super) fn clip(self, pages: DevicePages) -> Range<u64> {
        pages.first.min(self.pages)..pages.first.saturating_add(pages.count).min(self.pages)
    }
}

/// The header of a file with this layout.
pub(super) fn header(layout: Layout) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..16].copy_from_slice(MAGIC);
    bytes[16..20].copy_from_slice(&VERSION.to_le_bytes());
    bytes[20..24].copy_from_slice(&(layout.page as u32).to_le_bytes());
    bytes[24..32].copy_from_slice(&layout.pages.to_le_bytes());
    let sum = xxhash_rust::xxh3::xxh3_64(&bytes[..40]);
    bytes[40..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What a header should look like, in words.
pub(super) fn expected() -> String {
    format!("an empty file, or one of ours: {:?}, version {VERSION}, with a valid checksum", text(MAGIC))
}

/// Whether `start`, what a file of `len` bytes begins with, is a header of ours; what it is instead if not.
pub(super) fn recognise(start: &[u8], len: u64) -> Result<(), String> {
    let Some(header) = start.get(..HEADER).filter(|h| h.starts_with(MAGIC)) else {
        let begin = text(&start[..start.len().min(16)]);
        return Err(format!("a file of {len} bytes that begins with {begin:?}"));
    };
    let (said, sum) = header.split_at(40);
    let version = u32::from_le_bytes([header[16], header[17], header[18], header[19]]);
    if version != VERSION {
        return Err(format!("a file of ours of version {version}"));
    }
    if sum != xxhash_rust::xxh3::xxh3_64(said).to_le_bytes() {
        return Err("a file like ours whose header has a wrong checksum".into());
    }
    Ok(())
}

/// Bytes as text, whatever they are.
fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { *b as char } else { '.' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_fixed_places() {
        let page = page_bytes() as u64;
        let l = Layout::within(page * 11 + 5);
        assert_eq!((l.pages, l.bytes()), (10, page * 11));
        assert_eq!((l.offset(0), l.offset(9)), (page, page * 10));
        assert_eq!((l.page_at(page), l.page_at(page * 10 + 1), l.page_at(0)), (0, 9, 0));
        assert_eq!(l.check(0, 10 * page as usize), Ok(10));
        for (first, bytes) in
            [(0, 0), (0, 1), (1, 10 * page as usize), (10, page as usize), (u64::MAX, page as usize)]
        {
            assert_eq!(l.check(first, bytes), Err(DeviceError::Io(22)), "{first} {bytes}");
        }
        assert_eq!(l.clip(DevicePages { first: 8, count: u64::MAX }), 8..10);
        assert!(l.clip(DevicePages { first: 80, count: 1 }).is_empty());
        assert_eq!(Layout::within(least_bytes()).pages, 1);
    }

    #[test]
    fn only_our_header_is_ours() {
        let good = header(Layout::within(1 << 20));
        assert_eq!(recognise(&good, 1 << 20), Ok(()));
        for i in 0..HEADER {
            let mut bad = good;
            bad[i] ^= 1;
            assert!(recognise(&bad, 1 << 20).is_err(), "byte {i}");
        }
        assert!(recognise(&good[..HEADER - 1], 47).is_err());
        assert_eq!(recognise(b"\x7fELF\x02", 5).unwrap_err(), "a file of 5 bytes that begins with \".ELF.\"");
        let mut newer = good;
        newer[16] = 2;
        assert!(recognise(&newer, 1 << 20).unwrap_err().contains("version 2"));
    }
}
