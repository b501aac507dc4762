//! Data on the way to a device that runs code: moved there, or copied (rules G3, G6, G16).
//!
//! All of it happens with the entry locked and its CPU mapping gone, or read-only. Whatever fails leaves the data where it was,
//! and the entry saying so.

use super::context::Working;
use super::tier::{Tier, answer, unwinding};
use super::{Engine, Entry};
use crate::device::{DeviceError, DevicePages, PeerCopy, Store};
use peerspace_core::addr::{BLOCK_PAGES, DevicePfn, Order, Pages, Va, VaRange, Vpn};
use peerspace_core::coherence::Grant;
use peerspace_core::entry::State;
use peerspace_core::memmap::{Backing, Frame};
use peerspace_core::plan::{self, CLUSTER, EvictPlan};
use peerspace_core::sharers::Sharers;
use peerspace_core::sync::Ordering::Relaxed;
use peerspace_os::Kernel;

/// Why data did not come to a device. It is where it was.
#[derive(Debug)]
pub(crate) enum Stay {
    /// There is no room for it.
    NoRoom,
    /// It cannot be had in one piece; its pages can.
    Refused,
    /// The mappings of the program are changing, and what is mapped cannot be read meanwhile.
    Changing,
    /// It cannot be read where it is.
    Unreadable(DeviceError),
    /// The device did not take it.
    Failed(DeviceError),
}

fn order_of<K: Kernel>(entry: &Entry<'_, K>) -> Order {
    if entry.is_whole() { Order::BLOCK } else { Order::BASE }
}

impl<K: Kernel> Engine<K> {
    /// Moves what `entry` has to pages of `tier`, at `near` if that is free: zeros, a frame on standby, or what another device holds.
    pub(super) fn move_here(
        &self,
        entry: &mut Entry<'_, K>,
        tier: &Tier<K::Words>,
        near: Option<u64>,
        work: &mut Working<'_>,
    ) -> Result<(), Stay> {
        let order = order_of::<K>(entry);
        let page = match entry.state() {
            State::Empty => {
                let page = take(tier, order, near, entry.vpn())?;
                self.clear_pages(tier, page, order, work).map_err(|e| give_up(tier, page, order, e))?;
                page
            }
            State::Standby { pfn, dirt } => {
                let frame = self.frame_of(pfn, entry.is_whole());
                let page = self.store_frame(entry, frame, dirt, (tier, near))?;
                let backing = self.memmap.backing(frame);
                entry.set(self.arrived(tier, page));
                if order == Order::BLOCK {
                    self.blocks.give_ready(frame);
                    if backing != Backing::Page(tier.base() + page) {
                        self.free_backing(backing, order);
                    }
                } else {
                    if backing == Backing::Page(tier.base() + page) {
                        self.memmap.set_backing(frame, Backing::None);
                    }
                    self.free_standby(frame);
                }
                return Ok(());
            }
            State::Device { pfn, .. } => {
                let page = take(tier, order, near, entry.vpn())?;
                if let Err(stay) = self.copy_between(pfn, tier, page, order, work) {
                    tier.give_up(page, order, false);
                    return Err(stay);
                }
                entry.set(self.arrived(tier, page));
                self.tiers.free(pfn, order);
                return Ok(());
            }
            other => unreachable!("{other:?} is not to be moved"),
        };
        entry.set(self.arrived(tier, page));
        Ok(())
    }

    fn arrived(&self, tier: &Tier<K::Words>, page: u64) -> State {
        State::Device { pfn: tier.base() + page, stamp: self.stamp(), rewritten: false }
    }

    /// Where a frame on standby lies.
    fn staged(&self, frame: Frame, order: Order) -> VaRange {
        if order == Order::BLOCK { self.blocks.range(frame) } else { self.staged_at(frame).0 }
    }

    /// Writes a frame on standby to `tier`: over the copy that it has there, if it has one, and not at all if that is the same.
    fn store_frame(
        &self,
        entry: &mut Entry<'_, K>,
        frame: Frame,
        dirt: peerspace_core::entry::Dirt,
        (tier, near): (&Tier<K::Words>, Option<u64>),
    ) -> Result<u64, Stay> {
        let order = order_of::<K>(entry);
        let backing = self.memmap.backing(frame);
        let same_life = self.memmap.epoch(frame) == self.life();
        let staged = self.staged(frame, order);
        if let Backing::Page(at) = backing
            && tier.range.contains(at.pfn())
        {
            let page = at - tier.range.base;
            let same = match plan::on_evict(dirt, backing, same_life) {
                EvictPlan::DropTo(_) => true,
                EvictPlan::CompareWith(_) if order == Order::BASE => {
                    self.kernel.read_staged(staged, |bytes| tier.holds(page, bytes))
                }
                _ => false,
            };
            if same {
                return Ok(page);
            }
            // If that fails the copy is worth nothing; the frame is all there is, and says so.
            if self.kernel.read_staged(staged, |bytes| store(tier, page, bytes)).is_ok() {
                return Ok(page);
            }
            self.forget_copy(entry, frame);
            return Err(Stay::Failed(DeviceError::Io(rustix::io::Errno::IO.raw_os_error())));
        }
        let page = take(tier, order, near, entry.vpn())?;
        let stored = self.kernel.read_staged(staged, |bytes| store(tier, page, bytes));
        stored.map_err(|e| give_up(tier, page, order, e))?;
        Ok(page)
    }

    /// Gives the device of `tier` a copy of the frame of `entry`, which the CPU maps read-only: one of its own, unless it holds
    /// the same already. The entry is shared by `sharers` then.
    pub(super) fn copy_here(
        &self,
        entry: &mut Entry<'_, K>,
        sharers: Sharers,
        tier: &Tier<K::Words>,
        work: &mut Working<'_>,
    ) -> Result<Grant, Stay> {
        let order = order_of::<K>(entry);
        let (State::Host { pfn, writable: false, dirt } | State::Shared { pfn, writable: false, dirt, .. }) =
            entry.state()
        else {
            unreachable!("what is copied is read-only")
        };
        let shared = State::Shared { pfn, writable: false, dirt, sharers };
        if self.clean_backing(tier, entry, pfn, dirt).is_some() {
            entry.set(shared);
            return Ok(Grant::Copy);
        }
        let page = take(tier, order, None, entry.vpn())?;
        match self.store_mapped(entry, tier, page, work) {
            Ok(()) => {}
            Err(Stay::Failed(e)) => return Err(give_up(tier, page, order, e)),
            Err(stay) => {
                tier.give_up(page, order, false);
                return Err(stay);
            }
        }
        tier.add_replica(entry.vpn(), page);
        entry.set(shared);
        Ok(Grant::Copy)
    }

    /// Writes what the CPU maps at `entry` to `tier`, from where it is mapped: in a section, so that it stays there.
    fn store_mapped(
        &self,
        entry: &Entry<'_, K>,
        tier: &Tier<K::Words>,
        page: u64,
        work: &mut Working<'_>,
    ) -> Result<(), Stay> {
        let range = self.addresses(entry.range());
        let chunk = self.geometry.bytes(CLUSTER);
        let (context, buffer) = work.parts();
        let mut at = range.start;
        while at < range.end {
            let len = chunk.min(range.end.0 - at.0);
            let bytes = &mut buffer[..len as usize];
            {
                let _section = self.gate.enter(context).ok_or(Stay::Changing)?;
                let part = VaRange { start: at, end: Va(at.0 + len) };
                if !self.access_mapped(context, (part, false), || self.kernel.read_mapped(at, bytes)) {
                    return Err(Stay::Changing);
                }
            }
            store(tier, page + self.geometry.pages_in(at.0 - range.start.0).0, bytes).map_err(Stay::Failed)?;
            at.0 += len;
        }
        Ok(())
    }

    /// Makes pages zero.
    fn clear_pages(
        &self,
        tier: &Tier<K::Words>,
        page: u64,
        order: Order,
        work: &mut Working<'_>,
    ) -> Result<(), DeviceError> {
        let pages = DevicePages { first: page, count: order.pages().0 };
        match tier.clear(pages) {
            Err(DeviceError::Unsupported) => {}
            done => return done,
        }
        let chunk = CLUSTER.0.min(order.pages().0);
        let bytes = &mut work.parts().1[..self.geometry.bytes(Pages(chunk)) as usize];
        bytes.fill(0);
        (0..order.pages().0).step_by(chunk as usize).try_for_each(|i| store(tier, page + i, bytes))
    }

    /// Copies a folio from another device: directly if they can, or through a buffer of ours.
    pub(super) fn copy_between(
        &self,
        from: DevicePfn,
        tier: &Tier<K::Words>,
        page: u64,
        order: Order,
        work: &mut Working<'_>,
    ) -> Result<(), Stay> {
        let other = self.tiers.of(from);
        let bytes = self.geometry.bytes(order.pages());
        let mut batch = [PeerCopy::new(
            self.geometry.bytes(Pages(page)),
            self.geometry.bytes(Pages(from - other.range.base)),
            bytes,
        )];
        if !other.has_failed() && !tier.has_failed() {
            if unwinding(|| tier.device().copy_from(other.device(), &mut batch)).is_none() {
                batch[0].result = Err(DeviceError::Panicked);
            }
            let [PeerCopy { result, .. }] = batch;
            if result.is_ok() {
                tier.stores.fetch_add(order.pages().0, Relaxed);
                other.loads.fetch_add(order.pages().0, Relaxed);
                return Ok(());
            }
        }
        let chunk = CLUSTER.0.min(order.pages().0);
        let buffer = &mut work.parts().1[..self.geometry.bytes(Pages(chunk)) as usize];
        for i in (0..order.pages().0).step_by(chunk as usize) {
            self.tiers.load(from + i, buffer).map_err(Stay::Unreadable)?;
            store(tier, page + i, buffer).map_err(Stay::Failed)?;
        }
        Ok(())
    }
}

/// Takes pages of `tier` for the data of `vpn`, at `near` if that is free.
fn take<W: peerspace_core::words::Words>(
    tier: &Tier<W>,
    order: Order,
    near: Option<u64>,
    vpn: Vpn,
) -> Result<u64, Stay> {
    let page = match order {
        Order::BLOCK if tier.refuses_block() => return Err(Stay::Refused),
        Order::BLOCK if tier.info.pages.0 < BLOCK_PAGES => None,
        Order::BLOCK => tier.take_block(near, vpn),
        _ => tier.take_page(near, vpn),
    };
    page.ok_or(Stay::NoRoom)
}

/// The pages that were taken could not be written to.
fn give_up<W: peerspace_core::words::Words>(tier: &Tier<W>, page: u64, order: Order, e: DeviceError) -> Stay {
    tier.give_up(page, order, e != DeviceError::NoSpace);
    if e == DeviceError::NoSpace { Stay::NoRoom } else { Stay::Failed(e) }
}

/// Writes `bytes` to the pages from `page` on.
fn store<W: peerspace_core::words::Words>(tier: &Tier<W>, page: u64, bytes: &[u8]) -> Result<(), DeviceError> {
    let mut batch = [Store::new(page, bytes)];
    tier.store(&mut batch);
    let result = answer(&batch, 0, page);
    if tier.judge(result.clone()) {
        tier.stores.fetch_add((bytes.len() / rustix::param::page_size()) as u64, Relaxed);
    }
    result
}
