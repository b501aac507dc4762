//! The ports of a space's devices: made when a device with an MMU joins, cut when it goes or the space does.
//!
//! A port refers to the engine, and the engine owns the device that has the port; so the reference is one that can be taken away
//! ([`Slot`]). Whoever cuts a port waits until nothing goes through it any more.

use crate::attach::DeviceId;
use crate::device::mmu::DeviceAccess;
use crate::device::port::{FaultError, Port, PortOps};
use crate::engine;
use crate::engine::place::Bring;
use crate::space::Real;
use peerspace_core::addr::{PageRange, Va, VaRange};
use peerspace_core::sharers::MmuId;
use peerspace_os::Kernel;
use peerspace_os::linux::signal::without_signals;
use peerspace_os::own::Shared;
use peerspace_os::slot::{Slot, SlotRef};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A device's way to the engine.
struct Link {
    engine: Slot<Shared<Real>>,
    mmu: MmuId,
}

impl Link {
    fn engine(&self) -> Result<SlotRef<'_, Shared<Real>>, FaultError> {
        self.engine.get(engine::cpu()).map_err(|_| FaultError::Cut)
    }

    fn cut(&self) {
        // Refused when it was cut before.
        if self.engine.revoke().is_ok() {
            drop(self.engine.take());
        }
    }
}

/// Bytes that are accessed at once where the device's own are managed.
const AT_ONCE: usize = 512;

/// Whether a space manages any of `bytes`. A system call that accessed them would wait, or fail, where a page is away; while it is
/// under way nobody may have to wait for a fault.
fn is_managed(engine: &Real, bytes: &[u8]) -> bool {
    let start = bytes.as_ptr() as u64;
    let pages = engine.geometry.pages_out(VaRange { start: Va(start), end: Va(start + bytes.len() as u64) });
    engine.regions.next(pages.start).is_some_and(|region| region.range.start < pages.end)
}

/// Has `part` access `len` bytes at `va`, all in one page, in parts: each by memory that is not managed.
fn in_parts(
    engine: &Real,
    va: u64,
    len: usize,
    mut part: impl FnMut(Range<usize>, &mut [u8]) -> Result<(), FaultError>,
) -> Result<(), FaultError> {
    engine.page_of(Va(va), len)?;
    let mut own = [0; AT_ONCE];
    (0..len).step_by(AT_ONCE).try_for_each(|at| {
        let range = at..len.min(at + AT_ONCE);
        part(range.clone(), &mut own[..range.len()])
    })
}

impl Link {
    fn read_in_page(&self, engine: &Real, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        let kernel = &engine.kernel;
        // Without signals, as in a fault: whoever takes the page away waits for the access.
        without_signals(|| engine.remote_access(self.mmu, Va(va), to.len(), false, || kernel.read_mapped(Va(va), to)))
    }

    fn write_in_page(&self, engine: &Real, va: u64, from: &[u8]) -> Result<(), FaultError> {
        let kernel = &engine.kernel;
        without_signals(|| {
            engine.remote_access(self.mmu, Va(va), from.len(), true, || kernel.write_mapped(Va(va), from))
        })
    }
}

impl PortOps for Link {
    fn fault(&self, va: u64, access: DeviceAccess) -> Result<(), FaultError> {
        let engine = self.engine()?;
        // Without signals: a handler of the program that touched managed memory now could wait for this thread.
        without_signals(|| engine.device_fault(self.mmu, Va(va), access, Bring::AsChosen))
    }

    fn read(&self, va: u64, to: &mut [u8]) -> Result<(), FaultError> {
        let engine = self.engine()?;
        if !is_managed(&engine, to) {
            return self.read_in_page(&engine, va, to);
        }
        in_parts(&engine, va, to.len(), |range, own| {
            self.read_in_page(&engine, va + range.start as u64, own)?;
            to[range].copy_from_slice(own);
            Ok(())
        })
    }

    fn write(&self, va: u64, from: &[u8]) -> Result<(), FaultError> {
        let engine = self.engine()?;
        if !is_managed(&engine, from) {
            return self.write_in_page(&engine, va, from);
        }
        in_parts(&engine, va, from.len(), |range, own| {
            own.copy_from_slice(&from[range.clone()]);
            self.write_in_page(&engine, va + range.start as u64, own)
        })
    }

    fn note_remote(&self, va: u64, accesses: u32) {
        if let Ok(engine) = self.engine() {
            without_signals(|| engine.note_remote(self.mmu, Va(va), accesses));
        }
    }
}

/// A port that was cut, and may be restored.
#[must_use = "dropping it cuts the port for good"]
pub(crate) struct CutPort(DeviceId, Arc<Link>);

/// All ports of a space.
#[derive(Default)]
pub(crate) struct Ports(Mutex<Vec<(DeviceId, Arc<Link>)>>);

impl Ports {
    fn all(&self) -> std::sync::MutexGuard<'_, Vec<(DeviceId, Arc<Link>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives device `id` its port, if it runs code. Regions that there are already it must be able to translate.
    ///
    /// # Errors
    /// The region that it cannot translate (rule G13).
    pub(crate) fn connect(&self, engine: &Shared<Real>, id: DeviceId) -> Result<(), PageRange> {
        let Some(tier) = engine.tiers.by_id(id.0) else { return Ok(()) };
        let Some(mmu) = tier.mmu_id() else { return Ok(()) };
        let mut reserved = Vec::new();
        for region in engine.regions.iter() {
            let range = engine.addresses(region.range);
            if !tier.reserve_addresses(range) {
                reserved.into_iter().for_each(|range| tier.release_addresses(range));
                return Err(region.range);
            }
            reserved.push(range);
        }
        let link = Link { engine: Slot::new(), mmu };
        let put = link.engine.put(engine.clone());
        debug_assert!(put.is_ok(), "a new port is empty");
        let link = Arc::new(link);
        self.all().push((id, link.clone()));
        tier.give_port(Port::new(link));
        Ok(())
    }

    /// Cuts the port of device `id`, if it has one, and waits until nothing goes through it.
    pub(crate) fn cut(&self, id: DeviceId) -> Option<CutPort> {
        let (id, link) = {
            let mut all = self.all();
            let at = all.iter().position(|(of, _)| *of == id)?;
            all.swap_remove(at)
        };
        link.cut();
        Some(CutPort(id, link))
    }

    /// Undoes [`cut`](Ports::cut): a device has one port as long as it belongs to the space.
    pub(crate) fn restore(&self, engine: &Shared<Real>, CutPort(id, link): CutPort) {
        let put = link.engine.put(engine.clone());
        debug_assert!(put.is_ok(), "a port that was cut is empty");
        self.all().push((id, link));
    }

    /// Cuts all ports.
    pub(crate) fn cut_all(&self) {
        let links = std::mem::take(&mut *self.all());
        links.iter().for_each(|(_, link)| link.cut());
    }

    /// In a forked child: the threads that used them do not exist.
    pub(crate) fn renew(&self) {
        self.all().iter().for_each(|(_, link)| link.engine.renew());
    }
}
