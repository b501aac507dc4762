//! Which devices' MMUs map a page, beside the CPU: the presence bits of a directory protocol, in a table word.
//!
//! In a build without devices the type has no values (rule Z10), and neither have the states that name one.
//!
//! # The table's word is the directory
//!
//! Which devices map a page is said by bits of its word, where a page that was evicted has its stamp. So who may access a page
//! changes in one store, under the one lock that decides about it, and nothing else has to be kept in step; the fault on a page
//! that no device maps pays nothing for it. Which of its pages a device has a copy on is asked for seldom, and looked up by hash
//! (`inverted.rs`).

use core::fmt;

/// How many devices of a space can have an MMU.
pub const MAX_MMUS: u8 = 12;

/// The number of a device's MMU, below [`MAX_MMUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MmuId(
    /// The number.
    pub u8,
);

/// MMUs that map a page: one at least.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sharers(Bits);

#[cfg(feature = "device")]
type Bits = core::num::NonZeroU16;
#[cfg(not(feature = "device"))]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Bits {}

impl Sharers {
    /// One MMU alone.
    ///
    /// # Panics
    /// For a number that is none.
    #[cfg(feature = "device")]
    pub fn one(mmu: MmuId) -> Sharers {
        assert!(mmu.0 < MAX_MMUS, "{mmu:?} is none of {MAX_MMUS}");
        Sharers(core::num::NonZeroU16::new(1 << mmu.0).expect("a bit is set"))
    }

    /// Those whose bits are set; `None` for none, and in a build without devices.
    #[inline]
    pub const fn decode(bits: u16) -> Option<Sharers> {
        #[cfg(feature = "device")]
        return match core::num::NonZeroU16::new(bits & ((1 << MAX_MMUS) - 1)) {
            Some(bits) => Some(Sharers(bits)),
            None => None,
        };
        #[cfg(not(feature = "device"))]
        {
            let _ = bits;
            None
        }
    }

    /// A bit for each.
    #[inline]
    pub const fn bits(self) -> u16 {
        #[cfg(feature = "device")]
        return self.0.get();
        #[cfg(not(feature = "device"))]
        match self.0 {}
    }

    /// For callers that know no devices.
    ///
    /// # Panics
    /// Where this crate knows devices.
    pub fn of_no_device(self) -> ! {
        #[cfg(feature = "device")]
        panic!("devices {self:?} are said to map a page, and there are none");
        #[cfg(not(feature = "device"))]
        match self.0 {}
    }

    /// Whether `mmu` is one of them.
    pub const fn has(self, mmu: MmuId) -> bool {
        self.bits() & (1 << mmu.0) != 0
    }

    /// These and `mmu`.
    #[must_use]
    pub fn with(self, mmu: MmuId) -> Sharers {
        Sharers::decode(self.bits() | 1 << mmu.0).unwrap_or(self)
    }

    /// These without `mmu`, if any are left.
    pub fn without(self, mmu: MmuId) -> Option<Sharers> {
        Sharers::decode(self.bits() & !(1 << mmu.0))
    }

    /// Each, in ascending order.
    pub fn iter(self) -> impl Iterator<Item = MmuId> {
        (0..MAX_MMUS).map(MmuId).filter(move |mmu| self.has(*mmu))
    }
}

impl fmt::Debug for Sharers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|mmu| mmu.0)).finish()
    }
}

#[cfg(all(test, feature = "device"))]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn sharers_come_and_go() {
        let two = Sharers::one(MmuId(3)).with(MmuId(11));
        assert_eq!(two.iter().collect::<Vec<_>>(), [MmuId(3), MmuId(11)]);
        assert!(two.has(MmuId(3)) && !two.has(MmuId(4)));
        assert_eq!(two.without(MmuId(3)), Some(Sharers::one(MmuId(11))));
        assert_eq!(Sharers::one(MmuId(11)).without(MmuId(11)), None);
        assert_eq!(Sharers::decode(two.bits()), Some(two));
        assert_eq!(Sharers::decode(0), None);
        // What lies beyond the last MMU is none of these.
        assert_eq!(Sharers::decode(1 << MAX_MMUS), None);
    }
}
