//! Devices added to a space, and taken away, while it is in use (rules Z1 to Z3, Z9).

use crate::device::Device;
use crate::engine::detach::DetachError;
use crate::error::Error;
use crate::space::Space;
use crate::spec::{DeviceSpec, OpenDevice, own};
use peerspace_os::linux::signal::without_signals;

/// A device of a space. No two devices of a space ever have the same, also when one is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceId(pub(crate) u64);

impl Space {
    /// Adds a device, to be tried after those that are there. Takes the same time for a device of any size, and RAM only for
    /// those of its pages that are used.
    ///
    /// As with [`Builder::device`](crate::Builder::device), the device is moved out of the program's heap.
    ///
    /// ```
    /// # use peerspace::{Space, device::soft::Soft};
    /// # let space = Space::builder().host(16 << 20).device(Soft::new(64 << 20)?).build()?;
    /// let more = space.attach(Soft::new(256 << 20)?)?;
    /// // ...
    /// space.detach(more)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Device`] when the device cannot be used; [`Error::Kernel`] when there is no memory for its tables.
    pub fn attach(&self, device: impl Device + 'static) -> Result<DeviceId, Error> {
        self.attach_open(own(device))
    }

    fn attach_open(&self, device: OpenDevice) -> Result<DeviceId, Error> {
        let id = DeviceId(without_signals(|| self.engine().attach(device))?);
        if let Err(e) = self.connect(id) {
            let _ = self.detach(id);
            return Err(e);
        }
        Ok(id)
    }

    /// [`attach`](Space::attach) for a device as it is written on a command line. A size that is left out follows from the
    /// budget.
    ///
    /// # Errors
    /// As for [`attach`](Space::attach); [`Error::Device`] also when the device cannot be had, or this build is without it.
    pub fn attach_spec(&self, spec: &DeviceSpec) -> Result<DeviceId, Error> {
        let engine = self.engine();
        let device = spec.open(engine.geometry.bytes(engine.budget.limit()));
        self.attach_open(device.map_err(|e| Error::Device { name: spec.to_string(), why: e.to_string() })?)
    }

    /// Takes a device away, and drops it (rule Z3): room for what it holds is reserved on the other devices and in free RAM,
    /// then all of it is moved there, while the program and the other devices go on.
    ///
    /// # Errors
    /// [`Error::NoRoom`] when there is less room than it takes: that is found out before anything is moved, unless a device
    /// has less room than it said. [`Error::NoSuchDevice`] when it is not there, or being detached by another thread.
    /// [`Error::Device`] when its pages are in use without pause. The device is in use as before then.
    pub fn detach(&self, device: DeviceId) -> Result<(), Error> {
        let engine = self.engine();
        // What it runs gets nothing more from here on.
        let port = self.ports().cut(device);
        let mmu = self.mmu_of(device).ok();
        let detached = without_signals(|| engine.detach(device.0));
        if let (Err(_), Some(port)) = (&detached, port) {
            self.ports().restore(engine, port);
        }
        match detached {
            Ok(device) => {
                if let Some(mmu) = mmu {
                    self.forget_hints(mmu);
                }
                if let Some(mmu) = crate::device::guarded(|| device.mmu()).flatten() {
                    for region in engine.regions.iter() {
                        let range = engine.addresses(region.range);
                        let _ = crate::device::guarded(|| mmu.release(range.start.0..range.end.0));
                    }
                }
                drop(device);
                Ok(())
            }
            Err(e) => Err(self.not_detached(device, e)),
        }
    }

    /// What to tell the program of a device that something cannot leave.
    pub(crate) fn not_detached(&self, device: DeviceId, why: DetachError) -> Error {
        let engine = self.engine();
        let name = engine.tiers.iter().find(|t| t.id == device.0).map_or_else(String::new, |t| t.info.name.clone());
        match why {
            DetachError::NotThere => Error::NoSuchDevice,
            DetachError::NoRoom(missing) => Error::NoRoom { name, missing: engine.geometry.bytes(missing) },
            DetachError::Busy(pages) => {
                Error::Device { name, why: format!("{pages} of it are in use without pause, and cannot be moved") }
            }
            DetachError::Open(pages) => Error::Device {
                name,
                why: format!("regions with names that are open take up {pages} of it: drop them first"),
            },
            DetachError::Place(e) => Error::Device { name, why: format!("what is mapped of it in place stays: {e}") },
            DetachError::NoMemory => {
                Error::Kernel { what: "map a buffer".into(), why: peerspace_os::Trouble::NoMemory }
            }
        }
    }

    /// Gives a device that runs code its way to the space.
    pub(crate) fn connect(&self, id: DeviceId) -> Result<(), Error> {
        self.ports().connect(self.engine(), id).map_err(|region| {
            let engine = self.engine();
            let name = engine.tiers.by_id(id.0).map_or(String::new(), |tier| tier.info.name.clone());
            let range = engine.addresses(region);
            Error::Device {
                name,
                why: format!("its MMU cannot translate the region at {range}, or has something else there"),
            }
        })
    }

    /// The devices of the space, in the order in which they are tried.
    pub fn devices(&self) -> Vec<DeviceId> {
        self.engine().tiers.iter().map(|t| DeviceId(t.id)).collect()
    }

    /// Marks a device as failed: nothing is asked of it any more. What it alone holds is lost, page by page, when it is
    /// asked for (rule Z9); what is in RAM as well is not, and neither is anything else. A device that answers
    /// [`Gone`](crate::device::DeviceError::Gone) marks itself.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] when it is not there.
    pub fn fail(&self, device: DeviceId) -> Result<(), Error> {
        let engine = self.engine();
        let failed = engine.tiers.iter().find(|t| t.id == device.0).map(|tier| {
            tier.fail();
            tier.base()
        });
        let base = failed.ok_or(Error::NoSuchDevice)?;
        // What the CPU has in place it would go on to use.
        without_signals(|| engine.take_all_from_place(base));
        Ok(())
    }
}
