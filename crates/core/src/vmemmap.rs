//! Where the descriptors of a device's pages are (rules A1 and A3 to A7).
//!
//! The descriptors of a device are one array. It has memory only where pages of the device are in use: it is populated
//! with *leaves*, of a base page or of a huge page, which come from the host or from the device's own [altmap](Altmap).
//! Which leaves are there is written down in upper tables, always in host memory (rule A4):
//!
//! ```text
//!  array      | huge leaf | base base base ... | nothing yet | ...
//!  spans      |  word     |  0                 |  0          |        one word per huge leaf's worth
//!  leaves     |  0  0  0  | word word word     |  0  0  0    |        one word per base leaf's worth
//! ```
//!
//! How it is populated differs between architectures of the kernel, and is [data](Policy) here. The owner populates and
//! frees under a lock; looking up takes none: a word is published by Release and read by Acquire.

use crate::addr::{Pages, Pfn};
use crate::altmap::{Altmap, AltmapRefused};
use crate::sync::Ordering;
use crate::words::Words;
use core::fmt;
use core::ops::Range;

/// What a section of memory is: populated at once.
pub const SECTION_BYTES: u64 = 128 << 20;

/// Which leaves an altmap serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serves {
    /// None.
    Nothing,
    /// Huge ones.
    Huge,
    /// All.
    All,
}

/// How an architecture populates (rule A7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub name: &'static str,
    /// Leaves are huge where they can be.
    pub huge: bool,
    /// What an altmap is used for.
    pub altmap: Serves,
    /// Without huge pages an altmap cannot be used, rather than for base leaves.
    pub altmap_needs_huge: bool,
    /// The host serves when the altmap is exhausted.
    pub falls_back: bool,
    /// The host serves a huge leaf that describes pages outside of the device as well.
    pub host_at_boundary: bool,
}

impl Policy {
    /// x86-64: huge leaves with altmap, no fallback; less than a section in base leaves from the host.
    pub const X86_64: Policy = Policy {
        name: "x86-64",
        huge: true,
        altmap: Serves::Huge,
        altmap_needs_huge: true,
        falls_back: false,
        host_at_boundary: false,
    };
    /// arm64 with pages of 4 KiB: huge leaves, the altmap for base leaves as well, no fallback.
    pub const ARM64_4K: Policy = Policy {
        name: "arm64, 4 KiB",
        huge: true,
        altmap: Serves::All,
        altmap_needs_huge: false,
        falls_back: false,
        host_at_boundary: false,
    };
    /// arm64 with pages of 16 or 64 KiB: base leaves, from the altmap.
    pub const ARM64: Policy = Policy { name: "arm64, 16 or 64 KiB", huge: false, ..Policy::ARM64_4K };
    /// powerpc: the host where the altmap is exhausted, or a leaf reaches beyond the device.
    pub const POWERPC: Policy = Policy {
        name: "powerpc",
        huge: true,
        altmap: Serves::All,
        altmap_needs_huge: false,
        falls_back: true,
        host_at_boundary: true,
    };
    /// riscv and ia64: base leaves, no altmap.
    pub const RISCV: Policy = Policy {
        name: "riscv, ia64",
        huge: false,
        altmap: Serves::Nothing,
        altmap_needs_huge: false,
        falls_back: false,
        host_at_boundary: false,
    };
    /// What a space does: base leaves, so that no more memory is taken up than is used; an altmap serves all of them, and
    /// nobody else does (rule A4).
    pub const SPACE: Policy = Policy { name: "peerspace", ..Policy::ARM64 };
}

/// Sizes that follow from the page size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of a base leaf: a page.
    pub base: u64,
    /// Bytes of a huge leaf: what a full table of base pages maps.
    pub huge: u64,
    /// Bytes of the descriptors of a section.
    pub section: u64,
    /// Bytes of one descriptor.
    pub descriptor: u64,
}

impl Sizes {
    /// For pages of `page` bytes and descriptors of `descriptor` bytes.
    pub const fn new(page: u64, descriptor: u64) -> Sizes {
        Sizes { base: page, huge: page * (page / 8), section: SECTION_BYTES / page * descriptor, descriptor }
    }
}

/// Where a leaf is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In host memory.
    Host,
    /// In the device, from this page on.
    Device(Pfn),
}

/// A leaf that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Where it is.
    pub place: Place,
    /// Which bytes of the array it holds.
    pub start: u64,
    /// How many.
    pub bytes: u64,
}

/// The host as a source of leaves.
pub trait Host {
    /// Memory for the `bytes` bytes of the array at `at`. False when there is none.
    fn take(&mut self, at: u64, bytes: u64) -> bool;
    /// It is not needed any more.
    fn give_back(&mut self, at: u64, bytes: u64);
    /// Whether there are huge pages, of the host or to map the device by.
    fn has_huge(&mut self) -> bool;
}

/// Why a range was not populated. Nothing has changed (rule A3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PopulateError {
    /// The altmap is exhausted, and the policy does not fall back.
    Altmap(AltmapRefused),
    /// The altmap needs huge pages, and there are none.
    NoHugePages,
    /// The host has no memory.
    NoMemory,
    /// To fall back makes sense only with an altmap: the caller has a bug (rule A3).
    FallbackWithoutAltmap,
    /// The range does not lie in the array.
    Outside,
}

impl fmt::Display for PopulateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PopulateError::Altmap(e) => write!(f, "the altmap cannot serve: {e:?}"),
            PopulateError::NoHugePages => f.write_str("the altmap needs huge pages, and there are none"),
            PopulateError::NoMemory => f.write_str("there is no memory for descriptors"),
            PopulateError::FallbackWithoutAltmap => f.write_str("there is no altmap to fall back from"),
            PopulateError::Outside => f.write_str("the range lies outside of the array"),
        }
    }
}

impl core::error::Error for PopulateError {}

/// The array's upper tables.
#[derive(Debug)]
pub struct Vmemmap<W> {
    words: W,
    sizes: Sizes,
    policy: Policy,
    bytes: u64,
}

const PRESENT: u64 = 1;
const IN_DEVICE: u64 = 2;
/// Populated by the call that is under way.
const FRESH: u64 = 4;
const PFN_SHIFT: u32 = 3;

impl<W: Words> Vmemmap<W> {
    fn spans(sizes: Sizes, bytes: u64) -> u64 {
        bytes.div_ceil(sizes.huge)
    }

    /// Words that the upper tables of an array of `bytes` bytes need.
    pub fn words_for(sizes: Sizes, bytes: u64) -> usize {
        (Self::spans(sizes, bytes) + bytes.div_ceil(sizes.base)) as usize
    }

    /// An array of `bytes` bytes without any leaf.
    ///
    /// # Panics
    /// When there are fewer `words` than [`words_for`](Vmemmap::words_for) says.
    pub fn new(words: W, sizes: Sizes, policy: Policy, bytes: u64) -> Vmemmap<W> {
        assert!(words.len() >= Self::words_for(sizes, bytes));
        Vmemmap { words, sizes, policy, bytes }
    }

    fn word(&self, leaf: LeafAt) -> &crate::sync::AtomicU64 {
        let at = match leaf {
            LeafAt::Huge(i) => i,
            LeafAt::Base(i) => Self::spans(self.sizes, self.bytes) + i,
        };
        self.words.at(at as usize)
    }

    fn extent(&self, leaf: LeafAt) -> (u64, u64) {
        match leaf {
            LeafAt::Huge(i) => (i * self.sizes.huge, self.sizes.huge),
            LeafAt::Base(i) => (i * self.sizes.base, self.sizes.base),
        }
    }

    fn look(&self, leaf: LeafAt) -> Option<Leaf> {
        let word = self.word(leaf).load(Ordering::Acquire);
        let (start, bytes) = self.extent(leaf);
        let place = if word & IN_DEVICE != 0 { Place::Device(Pfn(word >> PFN_SHIFT)) } else { Place::Host };
        (word & PRESENT != 0).then_some(Leaf { place, start, bytes })
    }

    /// The leaf that holds byte `at` of the array, if there is one.
    pub fn find(&self, at: u64) -> Option<Leaf> {
        self.look(LeafAt::Huge(at / self.sizes.huge)).or_else(|| self.look(LeafAt::Base(at / self.sizes.base)))
    }

    /// Populates what is missing of `range`, which is in the array, as the policy says. With `fall_back` the host serves
    /// what the altmap cannot, whatever the policy. `promised`: of what the altmap has promised.
    ///
    /// # Errors
    /// [`PopulateError`]; whatever was populated by this call is gone again.
    pub fn populate(
        &self,
        range: Range<u64>,
        mut altmap: Option<&mut Altmap>,
        promised: bool,
        fall_back: bool,
        host: &mut impl Host,
    ) -> Result<(), PopulateError> {
        if range.start > range.end || range.end > self.bytes {
            return Err(PopulateError::Outside);
        }
        if fall_back && altmap.is_none() {
            return Err(PopulateError::FallbackWithoutAltmap);
        }
        let altmap_serves = altmap.is_some() && self.policy.altmap != Serves::Nothing;
        // Ranges under a section are not worth a huge leaf.
        let huge = self.policy.huge && range.end - range.start >= self.sizes.section.min(self.sizes.huge);
        if huge && altmap_serves && self.policy.altmap_needs_huge && !host.has_huge() {
            return Err(PopulateError::NoHugePages);
        }
        let huge = huge && host.has_huge();
        let fall_back = fall_back || self.policy.falls_back;
        let mut at = range.start / self.sizes.base * self.sizes.base;
        let result = loop {
            if at >= range.end {
                break Ok(());
            }
            if let Some(leaf) = self.find(at) {
                at = leaf.start + leaf.bytes;
                continue;
            }
            let span = at / self.sizes.huge;
            let leaf =
                if huge && self.is_free(span) { LeafAt::Huge(span) } else { LeafAt::Base(at / self.sizes.base) };
            match self.add(leaf, altmap.as_deref_mut(), promised, fall_back, host) {
                Ok(()) => {
                    let (start, bytes) = self.extent(leaf);
                    at = start + bytes;
                }
                Err(e) => break Err(e),
            }
        };
        // What was added is kept, or goes in the reverse order.
        for leaf in self.leaves(range.start..at.min(range.end)).rev() {
            let word = self.word(leaf);
            let seen = word.load(Ordering::Relaxed);
            if seen & FRESH != 0 {
                word.store(seen & !FRESH, Ordering::Release);
                if result.is_err() {
                    self.remove(leaf, altmap.as_deref_mut(), host);
                }
            }
        }
        result
    }

    /// Whether nothing of a huge leaf's worth is populated.
    fn is_free(&self, span: u64) -> bool {
        let start = span * self.sizes.huge;
        self.bases(start..(start + self.sizes.huge).min(self.bytes)).all(|leaf| self.look(leaf).is_none())
    }

    fn bases(&self, range: Range<u64>) -> impl DoubleEndedIterator<Item = LeafAt> + use<W> {
        (range.start / self.sizes.base..range.end.div_ceil(self.sizes.base)).map(LeafAt::Base)
    }

    /// All leaves there can be of `range`.
    fn leaves(&self, range: Range<u64>) -> impl DoubleEndedIterator<Item = LeafAt> + use<W> {
        let spans = range.start / self.sizes.huge..range.end.div_ceil(self.sizes.huge);
        spans.map(LeafAt::Huge).chain(self.bases(range))
    }

    fn add(
        &self,
        leaf: LeafAt,
        altmap: Option<&mut Altmap>,
        promised: bool,
        fall_back: bool,
        host: &mut impl Host,
    ) -> Result<(), PopulateError> {
        let (start, bytes) = self.extent(leaf);
        let serves = match leaf {
            LeafAt::Huge(_) => self.policy.altmap != Serves::Nothing,
            LeafAt::Base(_) => self.policy.altmap == Serves::All,
        };
        // A huge leaf at the end of the device describes what is not of the device.
        let beyond = self.policy.host_at_boundary && start + bytes > self.bytes;
        if let Some(altmap) = altmap.filter(|_| serves && !beyond) {
            match altmap.alloc(bytes, self.sizes.base, promised) {
                Ok(pfn) => {
                    let word = pfn.0 << PFN_SHIFT | IN_DEVICE | PRESENT | FRESH;
                    self.word(leaf).store(word, Ordering::Release);
                    // And that is all: whoever goes on from here leaks it (rule A9).
                    return Ok(());
                }
                Err(e) if !fall_back => return Err(PopulateError::Altmap(e)),
                Err(_) => {}
            }
        }
        if !host.take(start, bytes) {
            return Err(PopulateError::NoMemory);
        }
        self.word(leaf).store(PRESENT | FRESH, Ordering::Release);
        Ok(())
    }

    /// Frees a leaf to where it came from, which only its address tells (rule A5).
    fn remove(&self, leaf: LeafAt, altmap: Option<&mut Altmap>, host: &mut impl Host) {
        let Some(found) = self.look(leaf) else { return };
        self.word(leaf).store(0, Ordering::Release);
        match found.place {
            Place::Host => host.give_back(found.start, found.bytes),
            Place::Device(pfn) => {
                let pages = Pages(found.bytes / self.sizes.base);
                match altmap {
                    Some(altmap) if altmap.contains(pfn, pages) => altmap.free(pfn, pages),
                    _ => debug_assert!(false, "a leaf in a device that has no altmap there"),
                }
            }
        }
    }

    /// Frees all leaves of `range` that hold nothing outside of it.
    pub fn depopulate(&self, range: Range<u64>, mut altmap: Option<&mut Altmap>, host: &mut impl Host) {
        for leaf in self.leaves(range.start..range.end.min(self.bytes)).rev() {
            let (start, bytes) = self.extent(leaf);
            if start >= range.start && (start + bytes).min(self.bytes) <= range.end {
                self.remove(leaf, altmap.as_deref_mut(), host);
            }
        }
    }
}

/// Which leaf: so many huge ones, or base ones, lie before it.
#[derive(Debug, Clone, Copy)]
enum LeafAt {
    Huge(u64),
    Base(u64),
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "vmemmap_tests.rs"]
mod tests;
