//! Region memory as Rust bytes.

use peerspace_core::addr::VaRange;

/// Sole ownership of a range of region memory: what a program reads and writes by ordinary references.
///
/// Pages of the range may be taken out at any moment and come back on access with the same content, so references
/// stay good: to the program nothing ever happens.
#[derive(Debug)]
pub struct Memory {
    range: VaRange,
}

impl Memory {
    /// Takes over a range that was just mapped readable and writable, and that nothing else refers to. Whoever
    /// makes one sees to it that its missing pages are served as long as it lives.
    pub(super) fn new(range: VaRange) -> Memory {
        Memory { range }
    }

    /// Its addresses.
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped and nobody else's (see `new`); what is missing appears when it is read.
        unsafe { std::slice::from_raw_parts(self.range.start.0 as *const u8, self.range.len() as usize) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.range.start.0 as *mut u8, self.range.len() as usize) }
    }

    /// The first byte, for raw use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.range.start.0 as *mut u8
    }
}
