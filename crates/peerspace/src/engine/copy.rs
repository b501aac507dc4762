//! Copies of memory wherever both ends live (rule G8, hmemcpy): what is on devices stays there.
//!
//! From one device to another, bytes go directly where the devices can; a source on the host is written to the device that
//! has the destination; a source on a device is read into a destination on the host. Nothing moves for it, but for a
//! destination that nobody has touched yet, or that is not in RAM and on no device: that comes home.
//!
//! A copy goes in pieces, each within one entry at either end; other threads see it piece by piece.

use super::hold::HoldError;
use super::tier::unwinding;
use super::{Engine, Entry};
use crate::device::PeerCopy;
use peerspace_core::addr::{Access, DevicePfn, Pages, Va, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_os::Kernel;
use peerspace_os::own::Buffer;

/// The most bytes that go through a buffer at once.
pub(crate) const CHUNK: usize = 128 << 10;

/// What a copy goes through where it has to.
pub(crate) struct Through {
    pub(crate) bytes: Buffer,
    pub(crate) pages: Buffer,
}

/// How an entry can be read or written by bytes.
enum At {
    /// On a device.
    Device(DevicePfn),
    /// Mapped by the CPU.
    Mapped,
    /// Zeros.
    Zeros,
    /// Somewhere else.
    Other,
    Lost(DevicePfn),
}

impl<K: Kernel> Engine<K> {
    /// Copies `len` bytes.
    ///
    /// # Errors
    /// [`HoldError`] for the first page that cannot be read or written; what comes before is copied.
    pub(crate) fn copy(&self, to: Va, from: Va, len: u64, through: &mut Through) -> Result<(), HoldError> {
        let mut done = 0;
        while done < len {
            let (dst, src) = (Va(to.0 + done), Va(from.0 + done));
            let direct = self.copy_on_devices(dst, src, len - done);
            done += match direct {
                0 => {
                    let n = self.read_some(src, (len - done).min(CHUNK as u64), through)?;
                    self.write_all(dst, n, through)?;
                    n
                }
                n => n,
            };
        }
        Ok(())
    }

    fn at(&self, entry: &Entry<'_, K>, vpn: Vpn) -> At {
        match entry.state() {
            State::Device { pfn, .. } | State::Mapped { pfn, .. } => At::Device(pfn + (vpn - entry.vpn())),
            State::Host { .. } | State::Shared { .. } | State::Coherent { .. } => At::Mapped,
            State::Empty | State::Zero { .. } => {
                // What is the kernel's, and what stays where it is.
                let other = Attributes::ADOPTED.with(Attributes::IN_PLACE);
                let adopted = self.region(vpn).is_some_and(|r| r.attributes.has_any(other));
                if adopted { At::Other } else { At::Zeros }
            }
            State::Poisoned { pfn } => At::Lost(pfn),
            State::Standby { .. } | State::Leaf(_) => At::Other,
        }
    }

    /// Copies bytes directly from one device's memory to another's, or within one. Returns how many; 0 if that cannot be.
    fn copy_on_devices(&self, to: Va, from: Va, len: u64) -> u64 {
        let (dst, src) = (self.geometry.vpn(to), self.geometry.vpn(from));
        let _work = self.contexts.take();
        let looks = |vpn| matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Device { .. } | State::Mapped { .. }));
        if !looks(dst) || !looks(src) {
            return 0;
        }
        // In ascending order; one lock may be about both.
        let (low, high) = (dst.min(src), dst.max(src));
        let Ok(first) = self.table.lock(low) else { return 0 };
        let second = match first.range().contains(high) {
            true => None,
            false => match self.table.lock(high) {
                Ok(second) => Some(second),
                Err(_) => return 0,
            },
        };
        let (a, b) = (&first, second.as_ref().unwrap_or(&first));
        let (to_entry, from_entry) = if dst <= src { (a, b) } else { (b, a) };
        let (At::Device(to_pfn), At::Device(from_pfn)) = (self.at(to_entry, dst), self.at(from_entry, src)) else {
            return 0;
        };
        let rest = |entry: &Entry<'_, K>, va: Va| self.addresses(entry.range()).end.0 - va.0;
        let n = len.min(rest(to_entry, to)).min(rest(from_entry, from));
        let (to_tier, from_tier) = (self.tiers.of(to_pfn), self.tiers.of(from_pfn));
        if to_tier.has_failed() || from_tier.has_failed() {
            return 0;
        }
        let page = self.geometry.page_bytes() as u64;
        let at = |tier_base, pfn: DevicePfn, va: Va| self.geometry.bytes(Pages(pfn - tier_base)) + va.0 % page;
        let copy = PeerCopy::new(at(to_tier.range.base, to_pfn, to), at(from_tier.range.base, from_pfn, from), n);
        let mut batch = [copy];
        let answered = unwinding(|| to_tier.device().copy_from(from_tier.device(), &mut batch)).is_some();
        if answered && batch[0].result.is_ok() { n } else { 0 }
    }

    /// Reads up to `len` bytes into `through.bytes`. Returns how many.
    fn read_some(&self, from: Va, len: u64, through: &mut Through) -> Result<u64, HoldError> {
        let vpn = self.geometry.vpn(from);
        let offset = from.0 - self.geometry.va(vpn).0;
        {
            let work = self.contexts.take();
            let Ok(entry) = self.table.lock(vpn) else { return Err(HoldError::Foreign(vpn)) };
            let end = self.addresses(entry.range()).end.0;
            let n = len.min(end - from.0).min(CHUNK as u64 - self.geometry.page_bytes() as u64);
            let read = match self.at(&entry, vpn) {
                At::Device(pfn) => {
                    let pages = self.geometry.pages_out(VaRange { start: from, end: Va(from.0 + n) }).pages();
                    let bytes = self.geometry.bytes(pages) as usize;
                    let loaded = self.tiers.load(pfn, &mut through.pages[..bytes]).is_ok();
                    if loaded {
                        let part = &through.pages[offset as usize..(offset + n) as usize];
                        through.bytes[..n as usize].copy_from_slice(part);
                    }
                    loaded
                }
                At::Mapped => self.gate.enter(work.context()).is_some_and(|_section| {
                    let bytes = &mut through.bytes[..n as usize];
                    let range = VaRange { start: from, end: Va(from.0 + n) };
                    self.access_mapped(work.context(), (range, false), || self.kernel.read_mapped(from, bytes))
                }),
                At::Zeros => {
                    through.bytes[..n as usize].fill(0);
                    true
                }
                At::Lost(pfn) => return Err(HoldError::Lost(vpn, pfn)),
                At::Other => false,
            };
            if read {
                return Ok(n);
            }
        }
        // As the CPU would.
        let wanted = self.geometry.pages_out(VaRange { start: from, end: Va(from.0 + len) });
        let held = self.hold_some(wanted, Access::Read)?;
        let end = self.addresses(held).end.0.min(from.0 + len);
        let n = (end - from.0).min(CHUNK as u64);
        let read = self.kernel.read_mapped(from, &mut through.bytes[..n as usize]);
        self.let_go_some(held);
        if read { Ok(n) } else { Err(self.not_there(vpn)) }
    }

    /// Writes the first `len` bytes of `through.bytes` to `to`.
    fn write_all(&self, to: Va, len: u64, through: &mut Through) -> Result<(), HoldError> {
        let mut done = 0;
        while done < len {
            let at = Va(to.0 + done);
            done += match self.write_on_device(at, done, len - done, through) {
                0 => self.write_on_host(at, done, len - done, through)?,
                n => n,
            };
        }
        Ok(())
    }

    fn write_on_device(&self, to: Va, done: u64, len: u64, through: &mut Through) -> u64 {
        let vpn = self.geometry.vpn(to);
        let _work = self.contexts.take();
        if !matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Device { .. } | State::Mapped { .. }))
        {
            return 0;
        }
        let Ok(entry) = self.table.lock(vpn) else { return 0 };
        let At::Device(pfn) = self.at(&entry, vpn) else { return 0 };
        let page = self.geometry.page_bytes() as u64;
        let offset = to.0 % page;
        // Whole pages at once, or a part of one.
        let end = self.addresses(entry.range()).end.0;
        let n = match offset == 0 && len >= page {
            true => len.min(end - to.0).min(CHUNK as u64) / page * page,
            false => len.min(page - offset),
        };
        let bytes = &through.bytes[done as usize..(done + n) as usize];
        let scratch = match n.is_multiple_of(page) && offset == 0 {
            true => {
                // Aligned to a page, as devices want it.
                let scratch = &mut through.pages[..n as usize];
                scratch.copy_from_slice(bytes);
                scratch
            }
            false => {
                let scratch = &mut through.pages[..page as usize];
                if self.tiers.load(pfn, scratch).is_err() {
                    return 0;
                }
                scratch[offset as usize..(offset + n) as usize].copy_from_slice(bytes);
                scratch
            }
        };
        if self.tiers.rewrite(pfn, scratch) { n } else { 0 }
    }

    fn write_on_host(&self, to: Va, done: u64, len: u64, through: &Through) -> Result<u64, HoldError> {
        let wanted = self.geometry.pages_out(VaRange { start: to, end: Va(to.0 + len) });
        let held = self.hold_some(wanted, Access::Write)?;
        let n = self.addresses(held).end.0.min(to.0 + len) - to.0;
        let written = self.kernel.write_mapped(to, &through.bytes[done as usize..(done + n) as usize]);
        self.let_go_some(held);
        if written { Ok(n) } else { Err(self.not_there(wanted.start)) }
    }

    /// Why bytes from `vpn` on could not be had although they were held.
    fn not_there(&self, vpn: Vpn) -> HoldError {
        match self.region(vpn) {
            Some(r) if r.attributes.has(Attributes::IN_PLACE) => HoldError::Unreachable(vpn),
            _ => HoldError::Foreign(vpn),
        }
    }
}

/// Room for a copy.
impl Through {
    pub(crate) fn new() -> Result<Through, peerspace_os::Trouble> {
        Ok(Through { bytes: Buffer::new(CHUNK)?, pages: Buffer::new(CHUNK + (64 << 10))? })
    }
}
