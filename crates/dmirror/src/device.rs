//! A mirror device: memory, and an MMU whose translations the device's accesses go by.
//!
//! Its memory is that of another device of the library's: [`Soft`], to which the CPU has no way but faults, or [`Dax`], which the
//! CPU maps in place. Its code runs in the thread that asks for it, page by page ([`Mirror::access`]); so it is there in a
//! forked process as well.

use crate::gate::Gate;
use crate::table::{Entry, FANOUT, MOST_PAGES, PAGES, Slot, Table};
use peerspace::device::dax::Dax;
use peerspace::device::mmu::{DeviceAccess, FaultError, Mapping, Mmu, MmuDescriptor, Mode, Port, Progress, Target};
use peerspace::device::soft::Soft;
use peerspace::device::{
    Descriptor, Device, DeviceError, DevicePages, ForkSide, Load, OwnMetadata, PeerCopy, SharedMemory, Store, Usage,
};
use peerspace_os::linux::futex::Mutex;
use peerspace_os::own::Shared;
use std::ops::Range;

/// Bytes of a page. The interface is that of devices with such pages.
pub(crate) const PAGE: u64 = 4096;

/// What a device's memory is.
pub(crate) enum Memory {
    /// The CPU cannot map it.
    Private(Soft),
    /// The CPU maps it in place.
    Coherent(Box<Dax>),
}

/// The device; the space has a [`Handle`] of it.
pub(crate) struct Mirror {
    number: usize,
    memory: Memory,
    table: Table,
    gate: Gate,
    /// Held while translations change.
    changing: Mutex<()>,
    port: Mutex<Option<Port>>,
}

/// An access to one page.
pub(crate) enum Access<'a> {
    /// The device reads it.
    Read(&'a mut [u8]),
    /// The device writes it.
    Write(&'a [u8]),
}

impl Access<'_> {
    fn writes(&self) -> bool {
        matches!(self, Access::Write(_))
    }
}

/// What became of an access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tried {
    /// It was made.
    Done,
    /// There is no translation, or none that permits it, or none that the file has come upon.
    Missing,
    /// There is, but what it leads to is not there: a fault has to bring it.
    Stale,
    /// The device failed.
    Failed(DeviceError),
}

impl Mirror {
    pub(crate) fn new(number: usize, memory: Memory) -> Mirror {
        Mirror {
            number,
            memory,
            table: Table::new(),
            gate: Gate::new(),
            changing: Mutex::new(()),
            port: Mutex::new(None),
        }
    }

    fn memory(&self) -> &dyn Device {
        match &self.memory {
            Memory::Private(soft) => soft,
            Memory::Coherent(dax) => &**dax,
        }
    }

    /// The device accesses the page at `va`, a whole page, by its own translation; it does not fault.
    ///
    /// To be called without signals: whoever takes the translation away waits until the access is over.
    pub(crate) fn access(&self, va: u64, slot: Slot, mut access: Access<'_>) -> Tried {
        let page = va / PAGE;
        let _inside = self.gate.enter();
        let entry = self.table.entry(page);
        let Some(target) = entry.target(access.writes()).filter(|_| entry.is_known_to(slot)) else {
            return Tried::Missing;
        };
        self.table.note_use(page);
        let done = match (target, &mut access) {
            (Target::Own(own), Access::Read(to)) => {
                let mut load = [Load::new(own, to)];
                self.memory().load(&mut load);
                let [load] = load;
                load.result
            }
            (Target::Own(own), Access::Write(from)) => {
                let mut store = [Store::new(own, from)];
                self.memory().store(&mut store);
                let [store] = store;
                store.result
            }
            (Target::Host, access) => {
                let Some(port) = self.port() else { return Tried::Stale };
                let done = match access {
                    Access::Read(to) => port.read(va, to),
                    Access::Write(from) => port.write(va, from),
                };
                return if done.is_ok() { Tried::Done } else { Tried::Stale };
            }
            (Target::Zero, Access::Read(to)) => {
                to.fill(0);
                Ok(())
            }
            (Target::Zero, Access::Write(_)) => return Tried::Missing,
        };
        done.map_or_else(Tried::Failed, |()| Tried::Done)
    }

    /// Brings about a translation of `va` that permits the access: the file comes upon the one there is, or the space enters one.
    /// It may be gone again when this returns.
    pub(crate) fn fault(&self, va: u64, slot: Slot, write: bool) -> Result<(), FaultError> {
        if self.meet(va, slot, write) {
            return Ok(());
        }
        self.fault_anew(va, slot, write)
    }

    /// The same where the translation there is does not lead to anything.
    pub(crate) fn fault_anew(&self, va: u64, slot: Slot, write: bool) -> Result<(), FaultError> {
        let port = self.port().ok_or(FaultError::Cut)?;
        port.fault(va, if write { DeviceAccess::Write } else { DeviceAccess::Read })?;
        self.meet(va, slot, write);
        Ok(())
    }

    /// The file comes upon the translation of `va`, if there is one that permits the access. Whether there is.
    pub(crate) fn meet(&self, va: u64, slot: Slot, write: bool) -> bool {
        self.table.meet(va / PAGE, slot, write)
    }

    /// The pages of the device's own memory at `va` are exclusive to it. Whether it has the page.
    pub(crate) fn make_exclusive(&self, va: u64) -> bool {
        self.table.make_exclusive(va / PAGE)
    }

    /// Whether the page at `va` is exclusive to the device.
    pub(crate) fn is_exclusive(&self, va: u64) -> bool {
        self.table.entry(va / PAGE).is_exclusive()
    }

    /// A file has been closed.
    pub(crate) fn forget(&self, slot: Slot) {
        self.table.forget(slot);
    }

    fn port(&self) -> Option<Port> {
        self.port.lock().clone()
    }

    /// Checks a translation. The result: its first page, and how many.
    fn check(&self, mapping: &Mapping) -> Result<(u64, u64), DeviceError> {
        let invalid = DeviceError::Io(libc::EINVAL);
        let (page, count) = (mapping.va / PAGE, mapping.bytes / PAGE);
        let sized = count == 1 || count == FANOUT;
        if !sized || mapping.va != page * PAGE || mapping.bytes != count * PAGE || !page.is_multiple_of(count) {
            return Err(invalid);
        }
        let own = match mapping.to {
            Target::Own(own) => own.checked_add(count).is_some_and(|end| end <= MOST_PAGES),
            _ => true,
        };
        let zero = mapping.to == Target::Zero && mapping.writable;
        if page + count > PAGES || !own || zero { Err(invalid) } else { Ok((page, count)) }
    }
}

/// What a space has of a [`Mirror`].
pub(crate) struct Handle(pub(crate) Shared<Mirror>);

impl Device for Handle {
    fn describe(&self) -> Descriptor {
        let mut descriptor = self.0.memory().describe();
        descriptor.name = format!("dmirror{}", self.0.number);
        descriptor.takes_evicted = false;
        descriptor
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.0.memory().store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.0.memory().load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.0.memory().freed(pages);
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        self.0.memory().holds(page, bytes)
    }

    fn usage(&self) -> Option<Usage> {
        self.0.memory().usage()
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        self.0.memory().shared(page)
    }

    fn altmap(&self) -> Option<OwnMetadata> {
        self.0.memory().altmap()
    }

    fn mmu(&self) -> Option<&dyn Mmu> {
        Some(self)
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        self.0.memory().clear(pages)
    }

    fn copy_from(&self, peer: &dyn Device, batch: &mut [PeerCopy]) {
        self.0.memory().copy_from(peer, batch);
    }

    fn before_fork(&self) {
        // The space is at rest: nobody changes a translation but the thread that forks, which may in the child, too.
        self.0.gate.close();
        self.0.memory().before_fork();
    }

    fn after_fork(&self, side: ForkSide) {
        self.0.memory().after_fork(side);
        match side {
            ForkSide::Parent => self.0.gate.open(),
            ForkSide::Child => self.0.gate.renew(),
        }
    }
}

impl Mmu for Handle {
    fn describe(&self) -> MmuDescriptor {
        MmuDescriptor::new(Mode::Share).remote().zero_page().addresses(0..PAGES * PAGE)
    }

    fn attached(&self, port: Port) {
        *self.0.port.lock() = Some(port);
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let _changing = self.0.changing.lock();
        let _closed = self.0.gate.closed();
        for mapping in batch {
            let (page, count) = self.0.check(mapping)?;
            for nth in 0..count {
                let to = match mapping.to {
                    Target::Own(own) => Target::Own(own + nth),
                    to => to,
                };
                self.0.table.set(page + nth, Entry::new(to, mapping.writable, count > 1));
            }
        }
        Ok(())
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        let _changing = self.0.changing.lock();
        let _closed = self.0.gate.closed();
        self.0.table.clear(addresses.start / PAGE..addresses.end.div_ceil(PAGE).min(PAGES));
        Ok(Progress::Done)
    }

    fn halt(&self) -> Result<Progress, DeviceError> {
        self.0.gate.close();
        Ok(Progress::Done)
    }

    fn go_on(&self) {
        self.0.gate.open();
    }

    fn take_accessed(&self, addresses: Range<u64>) -> bool {
        self.0.table.take_used(addresses.start / PAGE..addresses.end.div_ceil(PAGE).min(PAGES))
    }
}
