//! An inverted page table: from the program's page to the device's page that holds a copy of it (rule G8, replicas).
//!
//! What a device holds alone, the logical table names; of what it holds beside the host's frame, the table says only that it
//! does ([`Sharers`](crate::sharers::Sharers)). Which page that is, is found here: a hash of chains through the device's pages, of which each
//! is in one chain at most. So it takes up as much as the device has pages, 16 bytes each, and only where it is used.
//!
//! Changed and read under the lock of the device's allocator.

use crate::addr::Vpn;
use crate::sync::Ordering::Relaxed;
use crate::words::Words;

/// The copies of one device.
#[derive(Debug)]
pub struct Inverted<W> {
    heads: W,
    links: W,
}

impl<W: Words> Inverted<W> {
    /// Words of each of the two arrays, for a device of so many pages.
    pub fn words_for(pages: u64) -> usize {
        pages.next_power_of_two().max(1) as usize
    }

    /// No copies. Both arrays have as many zeroed words as [`words_for`](Inverted::words_for) says.
    pub fn new(heads: W, links: W) -> Inverted<W> {
        assert!(heads.len().is_power_of_two() && links.len() >= heads.len());
        Inverted { heads, links }
    }

    fn bucket(&self, vpn: Vpn) -> usize {
        (vpn.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize & (self.heads.len() - 1)
    }

    /// `page`, or the block that begins there, holds a copy of `vpn` from now on.
    pub fn insert(&mut self, vpn: Vpn, page: u64) {
        let head = self.heads.at(self.bucket(vpn));
        self.links.at(page as usize).store(head.load(Relaxed), Relaxed);
        head.store(page + 1, Relaxed);
    }

    /// The page that holds a copy of `vpn`. `whose` says whose copy a page is.
    pub fn find(&self, vpn: Vpn, whose: impl Fn(u64) -> Option<Vpn>) -> Option<u64> {
        let mut at = self.heads.at(self.bucket(vpn)).load(Relaxed);
        while let Some(page) = at.checked_sub(1) {
            if whose(page) == Some(vpn) {
                return Some(page);
            }
            at = self.links.at(page as usize).load(Relaxed);
        }
        None
    }

    /// Forgets the copy of `vpn`. Returns where it was.
    pub fn remove(&mut self, vpn: Vpn, whose: impl Fn(u64) -> Option<Vpn>) -> Option<u64> {
        let mut link = self.heads.at(self.bucket(vpn));
        while let Some(page) = link.load(Relaxed).checked_sub(1) {
            let next = self.links.at(page as usize);
            if whose(page) == Some(vpn) {
                link.store(next.load(Relaxed), Relaxed);
                return Some(page);
            }
            link = next;
        }
        None
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::words::zeroed;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against an oracle; few pages, so that chains are long.
        #[test]
        fn copies_are_found_until_they_are_forgotten(changes in prop::collection::vec((0u64..40, 0u64..16, any::<bool>()), 1..200)) {
            let n = Inverted::<std::boxed::Box<[crate::sync::AtomicU64]>>::words_for(16);
            let mut table = Inverted::new(zeroed(n), zeroed(n));
            let (mut of, mut whose) = (BTreeMap::new(), BTreeMap::new());
            for (vpn, page, insert) in changes {
                let vpn = Vpn(vpn << 9);
                let found = table.find(vpn, |p| whose.get(&p).copied());
                prop_assert_eq!(found, of.get(&vpn).copied());
                if insert && found.is_none() && !whose.contains_key(&page) {
                    table.insert(vpn, page);
                    of.insert(vpn, page);
                    whose.insert(page, vpn);
                } else if !insert {
                    prop_assert_eq!(table.remove(vpn, |p| whose.get(&p).copied()), of.remove(&vpn));
                    whose.retain(|_, v| *v != vpn);
                }
            }
        }
    }
}
