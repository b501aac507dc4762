//! One word of the logical page table: where a page's data is, and how the CPU may use it.
//!
//! ```text
//!  63      52 51                               12 11 10 9 8   7 6 5    2  1    0
//! +----------+----------------------------------+-----+-----+---+------+----+----+
//! |  stamp   |                pfn               |  -  |  R  |W|D D| tag |wait|lock|
//! +----------+----------------------------------+-----+-----+---+------+----+----+
//! ```
//!
//! *tag* is the state; *pfn* says which frame, of the host or of a device (or which leaf); *stamp* remembers
//! when a page was evicted, for the refault distance; where the CPU or devices map the page, these bits say which
//! [devices](crate::sharers) do. `W`: the CPU can write without anyone noticing. `D`: how
//! the frame compares with what the device still holds ([`Dirt`]). `R`: the page was written when it was last home; of a page
//! that is mapped on a device, that it is held there. *lock* and *wait* belong to
//! [`Table`](crate::table::Table) and are no part of an [`Entry`].

use crate::addr::{DevicePfn, Pfn};
use crate::sharers::Sharers;
use core::fmt;

/// The lock bit of a table word: whoever sets it owns the page and everything about it.
pub const LOCK: u64 = 1 << 0;
/// Somebody waits for the lock bit to clear.
pub const WAIT: u64 = 1 << 1;

const TAG_SHIFT: u32 = 2;
const TAG_MASK: u64 = 0xf << TAG_SHIFT;
const DIRT_SHIFT: u32 = 6;
const DIRT_MASK: u64 = 0x3 << DIRT_SHIFT;
const WRITABLE: u64 = 1 << 8;
const REWRITTEN: u64 = 1 << 9;
const PFN_SHIFT: u32 = 12;
const PFN_BITS: u32 = 40;
const PFN_MASK: u64 = ((1 << PFN_BITS) - 1) << PFN_SHIFT;
const STAMP_SHIFT: u32 = 52;

/// Frame numbers an entry can hold: 2^40 pages.
pub const MAX_PFN: u64 = (1 << PFN_BITS) - 1;
/// Stamps count modulo this.
pub const STAMPS: u32 = 1 << 12;

/// How a host frame compares with the copy its device still holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dirt {
    /// The frame is the only copy: writing it back is the only way to evict it.
    Dirty,
    /// The device (or the zeros of never-touched memory) holds the same bytes; proved, not guessed: the page was
    /// mapped write-protected from its first moment.
    Clean,
    /// The page was write-protected after it had been mapped, so a write may have slipped in: compare before
    /// dropping it.
    Unverified,
}

/// The state of one page, or of a whole block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing of ours: zeros, or (in adopted memory) a page that the kernel itself populated.
    Empty,
    /// In a host frame that the CPU maps.
    Host {
        /// The frame.
        pfn: Pfn,
        /// The CPU may write without a fault.
        writable: bool,
        /// How it compares with the device's copy.
        dirt: Dirt,
    },
    /// In a host frame that nobody maps: a fault takes it back without any input.
    Standby {
        /// The frame.
        pfn: Pfn,
        /// How it compares with the device's copy.
        dirt: Dirt,
    },
    /// Only in device memory (rule Z7).
    Device {
        /// The page of the device, in the common number space.
        pfn: DevicePfn,
        /// When it was evicted, modulo [`STAMPS`].
        stamp: u16,
        /// It came from a device the last time, too, and was written before it left: it will be written again.
        rewritten: bool,
    },
    /// In a host frame that the CPU maps, and devices too: the frame itself, or copies of it where it is read-only. See
    /// [`coherence`](crate::coherence).
    Shared {
        /// The frame.
        pfn: Pfn,
        /// The CPU may write without a fault, and devices access the frame itself.
        writable: bool,
        /// How it compares with the copy of the device that it came from.
        dirt: Dirt,
        /// Whose MMUs map it.
        sharers: Sharers,
    },
    /// Nobody has ever written to it, and these MMUs map a page of zeros there (rule G3).
    Zero {
        /// Whose MMUs map it.
        sharers: Sharers,
    },
    /// Only in the memory of a device that runs code, whose MMU maps it, and may have written to it.
    Mapped {
        /// The page of the device, in the common number space.
        pfn: DevicePfn,
        /// A launch relies on it: whoever wants it waits.
        held: bool,
    },
    /// On a device whose memory the CPU maps in its place: an access takes no fault (rule Z5).
    Coherent {
        /// The page of the device, in the common number space.
        pfn: DevicePfn,
    },
    /// A block that is split: its 512 pages have words of their own in this leaf.
    Leaf(u32),
    /// The data is lost; accesses get SIGBUS or a typed error (rule Z9).
    Poisoned {
        /// The page of the device that could not be read. It is not ours any more: the number says which device
        /// it was.
        pfn: DevicePfn,
    },
}

impl State {
    /// Whether MMUs of devices map the page.
    #[inline]
    pub const fn is_on_mmus(self) -> bool {
        matches!(self, State::Shared { .. } | State::Zero { .. } | State::Mapped { .. })
    }

    /// Whether MMUs of devices may map the page: also what is in place, of which no account is kept.
    #[inline]
    pub const fn may_be_on_mmus(self) -> bool {
        self.is_on_mmus() || matches!(self, State::Coherent { .. })
    }
}

/// A table word without its lock bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

mod tag {
    pub(super) const EMPTY: u64 = 0;
    pub(super) const HOST: u64 = 1;
    pub(super) const STANDBY: u64 = 2;
    pub(super) const DEVICE: u64 = 3;
    pub(super) const LEAF: u64 = 4;
    pub(super) const POISONED: u64 = 5;
    pub(super) const COHERENT: u64 = 6;
    pub(super) const SHARED: u64 = 7;
    pub(super) const ZERO: u64 = 8;
    pub(super) const MAPPED: u64 = 9;
}

impl Entry {
    /// The entry of memory nobody has touched yet.
    pub const EMPTY: Entry = Entry(0);

    /// Interprets a table word; lock bits are ignored.
    #[inline]
    pub const fn from_word(word: u64) -> Entry {
        Entry(word & !(LOCK | WAIT))
    }

    /// The word to store, unlocked.
    #[inline]
    pub const fn word(self) -> u64 {
        self.0
    }

    const fn build(tag: u64, pfn: Pfn) -> u64 {
        debug_assert!(pfn.0 <= MAX_PFN);
        (tag << TAG_SHIFT) | (pfn.0 << PFN_SHIFT)
    }

    /// The word for `state`.
    pub const fn new(state: State) -> Entry {
        Entry(match state {
            State::Empty => 0,
            State::Host { pfn, writable, dirt } => {
                Self::build(tag::HOST, pfn) | ((dirt as u64) << DIRT_SHIFT) | if writable { WRITABLE } else { 0 }
            }
            State::Standby { pfn, dirt } => Self::build(tag::STANDBY, pfn) | ((dirt as u64) << DIRT_SHIFT),
            State::Device { pfn, stamp, rewritten } => {
                Self::build(tag::DEVICE, pfn.pfn())
                    | ((stamp as u64 & (STAMPS as u64 - 1)) << STAMP_SHIFT)
                    | if rewritten { REWRITTEN } else { 0 }
            }
            State::Leaf(leaf) => Self::build(tag::LEAF, Pfn(leaf as u64)),
            State::Poisoned { pfn } => Self::build(tag::POISONED, pfn.pfn()),
            State::Coherent { pfn } => Self::build(tag::COHERENT, pfn.pfn()),
            State::Shared { pfn, writable, dirt, sharers } => {
                Self::build(tag::SHARED, pfn)
                    | ((dirt as u64) << DIRT_SHIFT)
                    | if writable { WRITABLE } else { 0 }
                    | ((sharers.bits() as u64) << STAMP_SHIFT)
            }
            State::Zero { sharers } => Self::build(tag::ZERO, Pfn(0)) | ((sharers.bits() as u64) << STAMP_SHIFT),
            State::Mapped { pfn, held } => Self::build(tag::MAPPED, pfn.pfn()) | if held { REWRITTEN } else { 0 },
        })
    }

    /// The state the word stands for.
    ///
    /// # Panics
    /// On a word no transition of this crate can produce, which means memory corruption.
    #[inline]
    pub fn state(self) -> State {
        let pfn = self.pfn_bits();
        match (self.0 & TAG_MASK) >> TAG_SHIFT {
            tag::EMPTY => State::Empty,
            tag::HOST => State::Host { pfn, writable: self.0 & WRITABLE != 0, dirt: self.dirt() },
            tag::STANDBY => State::Standby { pfn, dirt: self.dirt() },
            tag::DEVICE if let Some(pfn) = DevicePfn::decode(pfn) => {
                State::Device { pfn, stamp: (self.0 >> STAMP_SHIFT) as u16, rewritten: self.0 & REWRITTEN != 0 }
            }
            tag::LEAF => State::Leaf(pfn.0 as u32),
            tag::POISONED if let Some(pfn) = DevicePfn::decode(pfn) => State::Poisoned { pfn },
            tag::COHERENT if let Some(pfn) = DevicePfn::decode(pfn) => State::Coherent { pfn },
            tag::SHARED if let Some(sharers) = self.sharers() => {
                State::Shared { pfn, writable: self.0 & WRITABLE != 0, dirt: self.dirt(), sharers }
            }
            tag::ZERO if let Some(sharers) = self.sharers() => State::Zero { sharers },
            tag::MAPPED if let Some(pfn) = DevicePfn::decode(pfn) => {
                State::Mapped { pfn, held: self.0 & REWRITTEN != 0 }
            }
            other => panic!("logical table word {:#x} has the unknown tag {other}: memory is corrupt", self.0),
        }
    }

    const fn sharers(self) -> Option<Sharers> {
        Sharers::decode((self.0 >> STAMP_SHIFT) as u16)
    }

    const fn pfn_bits(self) -> Pfn {
        Pfn((self.0 & PFN_MASK) >> PFN_SHIFT)
    }

    fn dirt(self) -> Dirt {
        match (self.0 & DIRT_MASK) >> DIRT_SHIFT {
            0 => Dirt::Dirty,
            1 => Dirt::Clean,
            _ => Dirt::Unverified,
        }
    }

    /// The leaf this block word points to, if it is split.
    #[inline]
    pub fn leaf(self) -> Option<u32> {
        if (self.0 & TAG_MASK) >> TAG_SHIFT == tag::LEAF { Some(self.pfn_bits().0 as u32) } else { None }
    }

    /// True for memory nobody has touched yet.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 & TAG_MASK == 0
    }

    /// The entry of page `i` of a whole block that has this entry: the same state, `i` frames further on.
    pub fn nth(self, i: u64) -> Entry {
        match self.state() {
            State::Host { pfn, writable, dirt } => Entry::new(State::Host { pfn: pfn + i, writable, dirt }),
            State::Standby { pfn, dirt } => Entry::new(State::Standby { pfn: pfn + i, dirt }),
            State::Device { pfn, stamp, rewritten } => Entry::new(State::Device { pfn: pfn + i, stamp, rewritten }),
            State::Poisoned { pfn } => Entry::new(State::Poisoned { pfn: pfn + i }),
            State::Coherent { pfn } => Entry::new(State::Coherent { pfn: pfn + i }),
            State::Shared { pfn, writable, dirt, sharers } => {
                Entry::new(State::Shared { pfn: pfn + i, writable, dirt, sharers })
            }
            State::Mapped { pfn, held } => Entry::new(State::Mapped { pfn: pfn + i, held }),
            State::Empty | State::Zero { .. } => self,
            State::Leaf(_) => unreachable!("a leaf has no pages of its own"),
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.state())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dirt() -> impl Strategy<Value = Dirt> {
        prop_oneof![Just(Dirt::Dirty), Just(Dirt::Clean), Just(Dirt::Unverified)]
    }

    /// Without devices, nothing.
    fn on_device(pfn: Pfn, state: impl FnOnce(DevicePfn) -> State) -> State {
        DevicePfn::decode(pfn).map_or(State::Empty, state)
    }

    /// Without devices, `none`.
    fn sharers(none: State, state: impl Fn(Sharers) -> State) -> impl Strategy<Value = State> {
        any::<u16>().prop_map(move |bits| Sharers::decode(bits).map_or(none, &state))
    }

    fn states() -> impl Strategy<Value = State> {
        let pfn = (0..=MAX_PFN).prop_map(Pfn);
        prop_oneof![
            Just(State::Empty),
            (pfn.clone(), any::<bool>(), dirt()).prop_map(|(pfn, writable, dirt)| State::Host {
                pfn,
                writable,
                dirt
            }),
            (pfn.clone(), dirt()).prop_map(|(pfn, dirt)| State::Standby { pfn, dirt }),
            (pfn.clone(), 0..STAMPS as u16, any::<bool>()).prop_map(|(pfn, stamp, rewritten)| {
                on_device(pfn, |pfn| State::Device { pfn, stamp, rewritten })
            }),
            pfn.clone().prop_map(|pfn| on_device(pfn, |pfn| State::Poisoned { pfn })),
            pfn.clone().prop_map(|pfn| on_device(pfn, |pfn| State::Coherent { pfn })),
            (pfn.clone(), any::<bool>()).prop_map(|(pfn, held)| on_device(pfn, |pfn| State::Mapped { pfn, held })),
            sharers(State::Empty, |sharers| State::Zero { sharers }),
            (pfn, any::<bool>(), dirt()).prop_flat_map(|(pfn, writable, dirt)| {
                sharers(State::Empty, move |sharers| State::Shared { pfn, writable, dirt, sharers })
            }),
            any::<u32>().prop_map(State::Leaf),
        ]
    }

    proptest! {
        #[test]
        fn every_state_survives_its_word(state in states()) {
            let entry = Entry::new(state);
            prop_assert_eq!(entry.state(), state);
            prop_assert_eq!(Entry::from_word(entry.word() | LOCK | WAIT), entry);
            prop_assert_eq!(entry.word() & (LOCK | WAIT), 0);
        }
    }

    /// Rule Z10.
    #[cfg(not(feature = "device"))]
    #[test]
    fn without_devices_a_page_on_one_is_corrupt() {
        for tag in [tag::DEVICE, tag::POISONED, tag::COHERENT, tag::SHARED, tag::ZERO, tag::MAPPED] {
            let entry = Entry::from_word(Entry::build(tag, Pfn(7)));
            let said = std::panic::catch_unwind(|| entry.state()).unwrap_err();
            let said = said.downcast::<std::string::String>().unwrap();
            assert!(said.contains("memory is corrupt"), "{said}");
        }
    }

    #[test]
    fn zero_is_empty() {
        assert_eq!(Entry::from_word(0).state(), State::Empty);
        assert_eq!(Entry::EMPTY.word(), 0);
    }

    #[test]
    fn pages_of_a_block_follow_each_other() {
        let e = Entry::new(State::Host { pfn: Pfn(512), writable: true, dirt: Dirt::Dirty });
        assert_eq!(e.nth(7).state(), State::Host { pfn: Pfn(519), writable: true, dirt: Dirt::Dirty });
        assert_eq!(Entry::EMPTY.nth(3), Entry::EMPTY);
    }
}
