//! Where each page is, looked at without touching any: what `mincore` and the page map of a process are for it.

use crate::attach::DeviceId;
use crate::error::Error;
use crate::space::Space;
use arrayvec::ArrayVec;
use peerspace_core::addr::{BLOCK_PAGES, DevicePfn, PageRange, Va, VaRange, Vpn};
use peerspace_core::entry::{Dirt, Entry, State};
use peerspace_core::memmap::Backing;
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::{MAX_MMUS, MmuId};
use peerspace_os::linux::signal::without_signals;
use peerspace_os::{CpuPage, Kernel};
use std::collections::VecDeque;
use std::fmt;

/// Where the data of a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Residence {
    /// The space does not manage it.
    Unmanaged,
    /// Nobody has touched it, or it was discarded: zeros, which are nowhere.
    Untouched,
    /// Nobody has written to it, and devices map a page of zeros there (rule G3).
    Zeros,
    /// The kernel has populated it, in memory of the program's own, and the space has not had it in hand yet.
    Kernel,
    /// It stays where it is: memory that is shared, of a file, of huge pages of the kernel's pool
    /// ([`Adopted::in_place`](crate::Adopted::in_place)). The kernel keeps it, in RAM or not; devices use it there.
    InPlace,
    /// In RAM, and the CPU maps it. Devices may map it beside the CPU: [`PageView::devices`] says which.
    Host,
    /// In RAM, and nobody maps it: an access takes it back without input.
    Standby,
    /// Only on this device.
    Device {
        /// Which one.
        id: DeviceId,
        /// The device's MMU maps it.
        mapped: bool,
        /// A launch holds it there.
        held: bool,
    },
    /// In the memory of this coherent or persistent device, which the CPU maps in place (rule Z5).
    Coherent(DeviceId),
    /// Its data is lost (rule Z9).
    Lost,
}

/// How the CPU maps a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuMapping {
    /// It does not, or the program may not even read there.
    None,
    /// As zeros that nobody has written to, to be read.
    Zero,
    /// To be read: the first write is a fault, or is refused.
    ReadOnly,
    /// To be read and written.
    Writable,
}

/// Some of the devices of a space.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct DeviceSet(ArrayVec<DeviceId, { MAX_MMUS as usize }>);

impl DeviceSet {
    /// Whether `device` is one of them.
    pub fn contains(&self, device: DeviceId) -> bool {
        self.0.contains(&device)
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = DeviceId> + '_ {
        self.0.iter().copied()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for DeviceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.0).finish()
    }
}

/// What there is to be said of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageView {
    /// Where its data is.
    pub residence: Residence,
    /// It belongs to a block (of 2 MiB, with pages of 4 KiB) that is in one piece where it is: in RAM or in place, one huge page of
    /// the CPU's mapping; on a device, one folio.
    pub huge: bool,
    /// How the CPU maps it.
    pub cpu: CpuMapping,
    /// Whose MMUs have been given translations of it: to its own memory, a copy, the host's memory, or zeros. What the CPU maps in
    /// place of a [device](Residence::Coherent), or stays where it [is](Residence::InPlace), is not kept account of in this way.
    pub devices: DeviceSet,
}

/// The pages of a range, one by one: see [`Space::pages`].
#[must_use = "nothing is looked at before it is asked for"]
pub struct Pages {
    space: Space,
    rest: PageRange,
    /// Of the block that was looked at last.
    seen: VecDeque<PageView>,
}

impl Space {
    /// Looks at the pages that `len` bytes at `start` touch, one by one, without changing anything. Each is as it was at some moment
    /// since it was asked for; what others do to it at that moment may show in part.
    ///
    /// # Errors
    /// [`Error::BadRange`] where the range wraps.
    pub fn pages(&self, start: *const u8, len: usize) -> Result<Pages, Error> {
        let bad = || Error::BadRange { what: format!("{len} bytes at {start:p}"), why: "the range wraps" };
        let range = VaRange::new(Va(start as u64), len as u64).ok_or_else(bad)?;
        let rest = match range.is_empty() {
            true => PageRange { start: Vpn(0), end: Vpn(0) },
            false => self.engine().geometry.pages_out(range),
        };
        Ok(Pages { space: self.clone(), rest, seen: VecDeque::new() })
    }
}

impl Pages {
    /// Looks at the rest of a block.
    fn look(&mut self) {
        let engine = self.space.engine();
        let block = PageRange::block(self.rest.start.block()).intersect(self.rest);
        self.rest.start = block.end;
        let mut cpu = [None::<CpuPage>; BLOCK_PAGES as usize];
        let mut states = [(Residence::Unmanaged, false, 0u16, false); BLOCK_PAGES as usize];
        without_signals(|| {
            for (i, vpn) in block.iter().enumerate() {
                if let Some(region) = engine.region(vpn)
                    && let Some((entry, whole)) = engine.table.look(vpn)
                {
                    let entry = if whole { entry.nth(vpn - vpn.block_start()) } else { entry };
                    states[i] = match region.attributes.has(Attributes::IN_PLACE) {
                        true => (Residence::InPlace, false, 0, false),
                        false => self.residence(entry, whole, region.attributes.has(Attributes::ADOPTED)),
                    };
                }
            }
            // Where it cannot be found out, nothing is said to be mapped.
            let _ = engine.kernel.cpu_runs(engine.addresses(block), &mut |run, page| {
                for vpn in engine.geometry.pages_inside(run).intersect(block).iter() {
                    cpu[(vpn - block.start) as usize] = Some(page);
                }
            });
        });
        for i in 0..block.pages().0 as usize {
            let (residence, folio, mmus, zero) = states[i];
            let cpu = cpu[i];
            let residence = match residence {
                Residence::Untouched if cpu.is_some() => Residence::Kernel,
                Residence::Kernel if cpu.is_none() => Residence::Untouched,
                // On its way home: whoever has accessed it may go on before the table says that it has come.
                Residence::Device { .. } | Residence::Standby if cpu.is_some() => Residence::Host,
                other => other,
            };
            let mmus = if residence == states[i].0 { mmus } else { 0 };
            let huge = match residence {
                Residence::Device { .. } | Residence::Standby => folio,
                _ => cpu.is_some_and(|page| page.huge),
            };
            let mapping = match cpu {
                None => CpuMapping::None,
                Some(page) if page.zero || zero && !page.writable => CpuMapping::Zero,
                Some(page) if page.writable => CpuMapping::Writable,
                Some(_) => CpuMapping::ReadOnly,
            };
            self.seen.push_back(PageView { residence, huge, cpu: mapping, devices: self.devices(mmus) });
        }
    }

    /// Where what `entry` says is; whether it is a block in one piece, which MMUs map it, and whether a frame holds nothing but
    /// zeros for certain.
    fn residence(&self, entry: Entry, whole: bool, adopted: bool) -> (Residence, bool, u16, bool) {
        let engine = self.space.engine();
        let on = |pfn: DevicePfn| engine.tiers.find(pfn);
        let zeros = |pfn, dirt| {
            let frame = if whole { None } else { Some(engine.memmap.page(pfn)) };
            frame.is_some_and(|f| dirt == Dirt::Clean && engine.memmap.backing(f) == Backing::Zero)
        };
        match entry.state() {
            // What the kernel maps of it is found out there.
            State::Empty if adopted => (Residence::Kernel, false, 0, false),
            State::Empty => (Residence::Untouched, false, 0, false),
            State::Zero { sharers } => (Residence::Zeros, whole, sharers.bits(), false),
            State::Host { pfn, dirt, writable } => (Residence::Host, whole, 0, !writable && zeros(pfn, dirt)),
            State::Shared { pfn, dirt, writable, sharers } => {
                (Residence::Host, whole, sharers.bits(), !writable && zeros(pfn, dirt))
            }
            State::Standby { .. } => (Residence::Standby, whole, 0, false),
            State::Device { pfn, .. } => match on(pfn) {
                Some(tier) => {
                    (Residence::Device { id: DeviceId(tier.id), mapped: false, held: false }, whole, 0, false)
                }
                None => (Residence::Untouched, false, 0, false),
            },
            State::Mapped { pfn, held } => match on(pfn) {
                Some(tier) => {
                    let mmu = tier.mmu_id().map_or(0, |MmuId(n)| 1 << n);
                    (Residence::Device { id: DeviceId(tier.id), mapped: true, held }, whole, mmu, false)
                }
                None => (Residence::Untouched, false, 0, false),
            },
            State::Coherent { pfn } => match on(pfn) {
                Some(tier) => (Residence::Coherent(DeviceId(tier.id)), whole, 0, false),
                None => (Residence::Untouched, false, 0, false),
            },
            State::Poisoned { .. } => (Residence::Lost, false, 0, false),
            State::Leaf(_) => unreachable!("a page is no leaf"),
        }
    }

    fn devices(&self, mmus: u16) -> DeviceSet {
        let tiers = &self.space.engine().tiers;
        let ids = (0..MAX_MMUS).filter(|n| mmus & 1 << n != 0);
        DeviceSet(ids.filter_map(|n| tiers.by_mmu(MmuId(n)).map(|tier| DeviceId(tier.id))).collect())
    }
}

impl Iterator for Pages {
    type Item = PageView;

    fn next(&mut self) -> Option<PageView> {
        if self.seen.is_empty() && !self.rest.is_empty() {
            self.look();
        }
        self.seen.pop_front()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let n = self.seen.len() + self.rest.pages().0 as usize;
        (n, Some(n))
    }
}

impl ExactSizeIterator for Pages {}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("rest", &self.rest).finish_non_exhaustive()
    }
}
