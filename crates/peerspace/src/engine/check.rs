//! The engine's invariants, executable.
//!
//! [`Engine::check`] walks everything: every page has exactly one owner, every frame and device page one entry,
//! and the account of memory adds up.

use super::Engine;
use peerspace_core::addr::{BLOCK_PAGES, DevicePfn, PageRange, Pfn};
use peerspace_core::entry::{Dirt, State};
use peerspace_core::folio::Counts;
use peerspace_core::memmap::{Backing, Frame, ListId};
use peerspace_os::Kernel;
use std::collections::HashMap;

/// What a walk has seen.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Census {
    /// Pages the CPU maps.
    pub(crate) mapped: u64,
    /// Of those, in whole blocks.
    pub(crate) mapped_whole: u64,
    /// Huge folios that are mapped page by page.
    pub(crate) spread: u64,
    /// Pages on standby.
    pub(crate) standby: u64,
    /// Pages on devices alone.
    pub(crate) on_devices: u64,
    /// Pages of devices that the CPU maps in place.
    pub(crate) in_place: u64,
    /// Pages that are lost.
    pub(crate) poisoned: u64,
    /// Device pages owned, backing of clean frames included.
    pub(crate) device_pages: u64,
}

impl<K: Kernel> Engine<K> {
    /// Brings the engine to rest and checks every invariant. The program must not touch its memory meanwhile.
    ///
    /// # Panics
    /// When one does not hold.
    pub(crate) fn check(&self) -> Census {
        let _turn = self.take_turn();
        let _rest = self.rest();
        let mut census = Census::default();
        let mut owners: HashMap<Pfn, String> = HashMap::new();
        let mut own = |pfn: Pfn, n: u64, who: String| {
            for i in 0..n {
                if let Some(other) = owners.insert(pfn + i, who.clone()) {
                    panic!("{:?} has two owners: {other} and {who}", pfn + i);
                }
            }
        };
        let mut split_heads: HashMap<Frame, u64> = HashMap::new();
        let mut spread: HashMap<Frame, u64> = HashMap::new();
        // Drain what faults announced, so that every mapped frame is on a list.
        {
            let mut policy = self.policy.lock();
            self.incoming.drain(&self.memmap, &mut **policy);
        }
        let mut staged_blocks = 0;
        for region in self.regions.iter() {
            let mut at = region.range.start;
            while at < region.range.end {
                let entry = self.table.lock(at).expect("a region is covered by the table");
                let whole = entry.is_whole();
                let range = entry.range();
                let n = range.pages().0;
                assert!(
                    !whole || entry.state() == State::Empty || region.range.covers(range),
                    "block {range:?} is whole but reaches out of its region {region:?}"
                );
                let who = format!("{range:?}");
                match entry.state() {
                    State::Empty => {}
                    State::Poisoned { .. } => census.poisoned += n,
                    State::Device { pfn, .. } => {
                        assert!(!self.memmap.contains(pfn.pfn()), "{who}: {pfn} is no device page");
                        self.check_device_page(pfn, range, &who);
                        own(pfn.pfn(), n, who);
                        census.on_devices += n;
                        census.device_pages += n;
                    }
                    State::Coherent { pfn } => {
                        assert!(!self.memmap.contains(pfn.pfn()), "{who}: {pfn} is no device page");
                        self.check_device_page(pfn, range, &who);
                        own(pfn.pfn(), n, who);
                        census.in_place += n;
                        census.device_pages += n;
                    }
                    State::Zero { .. } => {}
                    State::Mapped { pfn, .. } => {
                        self.check_device_page(pfn, range, &who);
                        own(pfn.pfn(), n, who);
                        census.on_devices += n;
                        census.device_pages += n;
                    }
                    State::Host { pfn, writable, dirt } | State::Shared { pfn, writable, dirt, .. } => {
                        census.device_pages += self.check_replicas(&entry, &who, &mut own);
                        let frame = self.frame_of(pfn, whole);
                        assert_eq!(self.memmap.vpn(frame), range.start, "{who}: the reverse map is wrong");
                        let head = self.memmap.head(frame);
                        let list = self.memmap.list(head);
                        assert!(matches!(list, ListId::Small | ListId::Main), "{who}: mapped, but on list {list:?}");
                        // What is protected may be dirty: for copies on devices.
                        assert!(!writable || dirt != Dirt::Clean, "{who}: clean, and writable");
                        self.check_backing(frame, dirt, range, &who, &mut own, &mut census);
                        if head != frame {
                            assert_eq!(self.memmap.list(frame), ListId::None, "{who}: a tail on a list of its own");
                            *spread.entry(head).or_default() += 1;
                        } else {
                            self.check_folio(frame, 1, 0, &who);
                            if let (Some(head), false) = (self.memmap.head_of(frame), whole) {
                                *split_heads.entry(head).or_default() += 1;
                            }
                        }
                        own(pfn, n, who);
                        census.mapped += n;
                        census.mapped_whole += if whole { n } else { 0 };
                    }
                    State::Standby { pfn, dirt } => {
                        let frame = self.frame_of(pfn, whole);
                        assert_eq!(self.memmap.vpn(frame), range.start, "{who}: the reverse map is wrong");
                        assert_eq!(self.memmap.list(frame), ListId::None, "{who}: on standby and on a list");
                        self.check_backing(frame, dirt, range, &who, &mut own, &mut census);
                        self.check_folio(frame, 0, 0, &who);
                        if whole {
                            staged_blocks += 1;
                        } else {
                            // A part keeps its block's frame in pieces also while it lies in a slot.
                            let head = self.memmap.head_of(frame);
                            match self.memmap.slot(frame) {
                                Some(slot) => assert_eq!(self.ring.occupant(slot), Some(frame), "{who}: slot {slot}"),
                                None => assert!(head.is_some(), "{who}: staged nowhere, and no part of a block"),
                            }
                            if let Some(head) = head {
                                *split_heads.entry(head).or_default() += 1;
                            }
                        }
                        own(pfn, n, who);
                        census.standby += n;
                    }
                    State::Leaf(_) => unreachable!("a lock is never on a leaf"),
                }
                at = range.end;
            }
        }
        for (head, pages) in &spread {
            self.check_folio(*head, 0, *pages, &format!("{head:?}, mapped in {pages} pages"));
            let queued = self.memmap.folio(*head).counts().queued;
            assert_eq!(queued, *pages < BLOCK_PAGES, "{head:?}: {pages} pages of it are mapped (H11)");
            assert!(!queued || self.blocks.is_deferred(*head), "{head:?} is not in the queue");
        }
        census.spread = spread.len() as u64;
        self.check_tiers(&census);
        self.check_charges(&census, staged_blocks, &split_heads);
        census
    }

    pub(super) fn frame_of(&self, pfn: Pfn, whole: bool) -> Frame {
        assert!(self.memmap.contains(pfn), "{pfn} is no frame of the host");
        if whole { self.memmap.block(pfn) } else { self.memmap.page(pfn) }
    }

    /// The counts of a folio that so many MMUs map whole, and of which so many pages are mapped alone, by one each.
    fn check_folio(&self, folio: Frame, entire: u64, pages: u64, who: &str) {
        let counts = self.memmap.folio(folio).counts();
        let mappings = entire + pages;
        // The owner's reference beside those (H6).
        let refcount = 1 + mappings + counts.pins;
        assert_eq!(counts, Counts { refcount, entire, pages, mappings, ..counts }, "{who}: {folio:?}");
    }

    /// Copies on devices are those of what is shared and read-only. Returns how many pages of devices they are.
    fn check_replicas(&self, entry: &super::Entry<'_, K>, who: &str, own: &mut impl FnMut(Pfn, u64, String)) -> u64 {
        let n = entry.range().pages().0;
        let mut pages = 0;
        for tier in self.tiers.iter() {
            let (Some(mmu), Some(page)) = (tier.mmu_id(), tier.replica(entry.range().start)) else { continue };
            let State::Shared { writable: false, sharers, .. } = entry.state() else {
                panic!("{who}: {:?}, with a copy on {}", entry.state(), tier.info.name)
            };
            assert!(sharers.has(mmu), "{who}: {} has a copy, and does not share it", tier.info.name);
            own(tier.range.base + page, n, format!("copy of {who} on {}", tier.info.name));
            pages += n;
        }
        pages
    }

    fn check_backing(
        &self,
        frame: Frame,
        dirt: Dirt,
        range: PageRange,
        who: &str,
        own: &mut impl FnMut(Pfn, u64, String),
        census: &mut Census,
    ) {
        let n = range.pages().0;
        match (dirt, self.memmap.backing(frame)) {
            (Dirt::Dirty, Backing::None) | (Dirt::Clean | Dirt::Unverified, Backing::Zero) => {}
            (Dirt::Clean | Dirt::Unverified, Backing::Page(pfn)) => {
                self.check_device_page(pfn, range, who);
                own(pfn.pfn(), n, format!("backing of {who}"));
                census.device_pages += n;
            }
            (dirt, backing) => panic!("{who}: {dirt:?} with backing {backing:?}"),
        }
    }

    /// The descriptors of device pages name the pages whose data they hold.
    fn check_device_page(&self, pfn: DevicePfn, range: PageRange, who: &str) {
        let tier = self.tiers.of(pfn);
        if tier.is_foreign() {
            return;
        }
        for (i, vpn) in range.iter().enumerate() {
            let page = pfn - tier.range.base + i as u64;
            assert_eq!(tier.vpn(page), Some(vpn), "{who}: the reverse map of page {page} of {}", tier.info.name);
        }
    }

    /// Device pages in use are exactly those that somebody owns.
    fn check_tiers(&self, census: &Census) {
        let used: u64 = self.tiers.iter().map(|t| t.used().0).sum();
        // The books of devices that a forked process has no part in are not its own.
        if self.tiers.iter().any(|t| t.is_foreign() && t.used().0 > 0) {
            return;
        }
        assert_eq!(used, census.device_pages, "device pages in use, and owned");
        let in_place: u64 = self.tiers.iter().map(|t| t.pages_in_place()).sum();
        assert_eq!(in_place, census.in_place, "pages in place, and counted");
        for tier in self.tiers.iter() {
            let (mut described, mut from) = (0, 0);
            while let Some(folio) = tier.next_in_use(from) {
                described += folio.order.pages().0;
                from = folio.page + folio.order.pages().0;
            }
            assert_eq!(described, tier.used().0, "pages of {} with a descriptor, and in use", tier.info.name);
        }
    }

    /// Charges are mapped pages, staged pages and frames that lie ready.
    fn check_charges(&self, census: &Census, staged_blocks: u64, split_heads: &HashMap<Frame, u64>) {
        // What a split block has left behind in its staging is known only when its last part goes; allow for it.
        let ready = self.blocks.ready() as u64;
        let ring = self.ring.pages();
        let known = census.mapped + ring.0 + (staged_blocks + ready) * BLOCK_PAGES;
        let unsure = split_heads.len() as u64 * BLOCK_PAGES;
        let charged = self.budget.charged() as u64;
        assert!(
            charged >= known && charged <= known + unsure,
            "{charged} pages are charged; {} mapped, {ring} in the ring, {staged_blocks} blocks on standby, {ready} \
             ready, {} blocks in pieces",
            census.mapped,
            split_heads.len(),
        );
    }
}
