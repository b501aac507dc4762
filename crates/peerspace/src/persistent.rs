//! Regions that outlive the process: opened by their names on a persistent device (rule Z5).

use crate::attach::DeviceId;
use crate::device::{NamedError as Refused, NamedRegion, NamedRegions};
use crate::engine::named::NamedError;
use crate::engine::tier::unwinding;
use crate::error::Error;
use crate::region::Region;
use crate::space::Space;
use peerspace_core::addr::Pages;
use peerspace_os::SharedMemory;
use peerspace_os::linux::signal::without_signals;
use std::fmt;
use std::ops::Range;

/// A region of a persistent device, by its name. What is written to it is there after a restart; what was
/// [flushed](Persistent::flush) is there after a crash, too.
///
/// It is used in place: accesses take no fault, and nothing of it is ever moved. A forked process has the same memory, not
/// a copy. Dropping it closes it; its bytes stay on the device.
pub struct Persistent {
    region: Region,
    device: DeviceId,
    name: String,
    bytes: usize,
}

impl Space {
    /// Makes a region of `bytes` bytes, all zero, and opens it. That it is there is durable when this returns.
    ///
    /// ```
    /// use peerspace::{Space, device::{dax::Dax, soft::Soft}};
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("store");
    ///
    /// let space = Space::builder().host(8 << 20).device(Soft::new(16 << 20)?).build()?;
    /// let device = space.attach(Dax::persistent(&path, Some(16 << 20))?)?;
    /// let mut log = space.create_persistent(device, "log", 1 << 20)?;
    /// log.bytes_mut()[..5].copy_from_slice(b"hello");
    /// log.flush(0..5)?;
    /// drop(log);
    /// // Now, or after a restart:
    /// assert_eq!(&space.open_persistent(device, "log")?.bytes()[..5], b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Named`] when there is one of that name, or no room for it; [`Error::NoSuchDevice`]; [`Error::Device`] for a
    /// device that is not persistent.
    pub fn create_persistent(&self, device: DeviceId, name: &str, bytes: u64) -> Result<Persistent, Error> {
        let made = self.on_named(device, name, |named| named.create(name, bytes))?;
        self.open_named(device, made).inspect_err(|_| {
            // Nobody has had it. What cannot be removed is found by its name, and can be opened or removed like any other.
            let _ = self.remove_persistent(device, name);
        })
    }

    /// Opens a region that is there already.
    ///
    /// # Errors
    /// [`Error::Named`] when there is none of that name, or it is open already; [`Error::NoSuchDevice`]; [`Error::Device`] for
    /// a device that is not persistent.
    pub fn open_persistent(&self, device: DeviceId, name: &str) -> Result<Persistent, Error> {
        let found = self.on_named(device, name, |named| named.find(name))?;
        self.open_named(device, found)
    }

    /// Removes a region, with everything in it.
    ///
    /// # Errors
    /// [`Error::Named`] when there is none of that name, or it is open; [`Error::NoSuchDevice`]; [`Error::Device`] for a device
    /// that is not persistent.
    pub fn remove_persistent(&self, device: DeviceId, name: &str) -> Result<(), Error> {
        let engine = self.engine();
        // Nobody opens it meanwhile. Before there is a reference to the device, for which whoever takes that away waits with
        // the turn.
        let _turn = engine.take_turn();
        self.on_named(device, name, |named| {
            if engine.is_open(device.0, &extents(&named.find(name)?)) {
                Err(Refused("it is open: drop it first".into()))
            } else {
                named.remove(name)
            }
        })
    }

    /// The regions of a persistent device: their names, and how many bytes they have.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`]; [`Error::Device`] for a device that is not persistent, or cannot be read.
    pub fn persistent_regions(&self, device: DeviceId) -> Result<Vec<(String, u64)>, Error> {
        let all = self.on_named(device, "", |named| named.list())?;
        Ok(all.into_iter().map(|r| (r.name, r.bytes)).collect())
    }

    fn on_named<T>(
        &self,
        device: DeviceId,
        name: &str,
        call: impl FnOnce(&dyn NamedRegions) -> Result<T, Refused>,
    ) -> Result<T, Error> {
        let tier = self.engine().tiers.by_id(device.0).ok_or(Error::NoSuchDevice)?;
        let bad = |why: &str| Error::Device { name: tier.info.name.clone(), why: why.into() };
        let named = unwinding(|| tier.device().named()).flatten();
        let named = named.ok_or_else(|| bad("it is not persistent: it has no regions with names"))?;
        if tier.has_failed() {
            return Err(bad("it has failed"));
        }
        let said = unwinding(|| call(named)).ok_or_else(|| bad("its own code panicked"))?;
        said.map_err(|e| Error::Named { name: name.into(), device: tier.info.name.clone(), why: e.0 })
    }

    fn open_named(&self, device: DeviceId, found: NamedRegion) -> Result<Persistent, Error> {
        let engine = self.engine();
        let refused = |why: String| {
            let tier = engine.tiers.by_id(device.0);
            let device = tier.map_or_else(|| "that is gone".into(), |t| t.info.name.clone());
            Error::Named { name: found.name.clone(), device, why }
        };
        let pages = found.extents.iter().fold(0, |n: u64, e| n.saturating_add(e.count));
        let room = pages.saturating_mul(engine.geometry.page_bytes() as u64);
        let bytes = usize::try_from(found.bytes).ok().filter(|b| *b as u64 <= room);
        let bytes =
            bytes.ok_or_else(|| refused(format!("it is said to have {} bytes in {pages} pages", found.bytes)))?;
        let opened = without_signals(|| {
            engine.open_named(
                device.0,
                &extents(&found),
                |tier| {
                    let pieces = found.extents.iter().map(|e| {
                        let memory = unwinding(|| tier.device().shared(e.first)).flatten()?;
                        Some((memory, engine.geometry.bytes(Pages(e.count))))
                    });
                    let pieces: Option<Vec<(SharedMemory<'_>, u64)>> = pieces.collect();
                    let pieces = pieces.ok_or(peerspace_os::Trouble::Absent)?;
                    let memory = engine.kernel.map_shared_memory(pieces.iter().copied())?;
                    let range = memory.range();
                    Ok((memory, range))
                },
                // Refusal leaks address space and nothing else.
                |memory| {
                    let _ = engine.kernel.unmap_memory(memory);
                },
            )
        });
        let (memory, range) = opened.map_err(|e| match e {
            NamedError::NotThere => Error::NoSuchDevice,
            NamedError::InUse(page) => refused(format!(
                "it is open already, or the descriptor of its block at page {page} has no room in the altmap"
            )),
            NamedError::NoBlocks(first, count) => {
                refused(format!("{count} pages at page {first}, where it is said to be, are no blocks of the device"))
            }
            NamedError::Kernel(why) => refused(format!("it cannot be mapped: {why}")),
            NamedError::Table(range, e) => refused(format!("the space has no room for it at {range}: {e}")),
        })?;
        let region = Region::of_memory(self.clone(), memory, range);
        Ok(Persistent { region, device, name: found.name, bytes })
    }
}

fn extents(region: &NamedRegion) -> Vec<(u64, u64)> {
    region.extents.iter().map(|e| (e.first, e.count)).collect()
}

impl Persistent {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes, as many as were asked for.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// True for a region of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.region.bytes()[..self.bytes]
    }

    /// The bytes, to write. They are durable when they were [flushed](Persistent::flush).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.region.bytes_mut()[..self.bytes]
    }

    /// The first byte, for raw use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// The region as a slice of plain values: as many as fit.
    ///
    /// # Panics
    /// As [`Region::typed`].
    pub fn typed<T: bytemuck::Pod>(&self) -> &[T] {
        let whole = self.bytes / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice(&self.bytes()[..whole])
    }

    /// The region as a slice of plain values, to write.
    ///
    /// # Panics
    /// As [`Region::typed`].
    pub fn typed_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let whole = self.bytes / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.bytes_mut()[..whole])
    }

    /// Copies the bytes from `at` on to `to`: [`Region::try_read`].
    ///
    /// # Errors
    /// [`Error::Lost`] where the device has failed, or its file was cut short; [`Error::BadRange`].
    pub fn try_read(&self, at: usize, to: &mut [u8]) -> Result<(), Error> {
        self.part(at..at.saturating_add(to.len()))?;
        self.region.try_read(at, to)
    }

    /// Copies `from` to the bytes from `at` on: [`Region::try_write`].
    ///
    /// # Errors
    /// As for [`try_read`](Persistent::try_read).
    pub fn try_write(&mut self, at: usize, from: &[u8]) -> Result<(), Error> {
        self.part(at..at.saturating_add(from.len()))?;
        self.region.try_write(at, from)
    }

    /// Makes what was written to `part` durable: when this returns it survives a crash, of the machine as well. By writing
    /// back cache lines where the memory is durable itself, by `msync` elsewhere.
    ///
    /// # Errors
    /// [`Error::Device`] when it may not be durable; [`Error::BadRange`] when `part` does not lie inside.
    pub fn flush(&self, part: Range<usize>) -> Result<(), Error> {
        self.part(part.clone())?;
        if part.is_empty() {
            return Ok(());
        }
        let start = self.region.as_ptr() as usize;
        let tier = self.region.space().engine().tiers.by_id(self.device.0).ok_or(Error::NoSuchDevice)?;
        let bad = |why: String| Error::Device { name: tier.info.name.clone(), why };
        if tier.has_failed() {
            return Err(bad("it has failed".into()));
        }
        let flushed = unwinding(|| tier.device().named().map(|n| n.flush(start + part.start..start + part.end)));
        match flushed {
            Some(Some(Ok(()))) => Ok(()),
            Some(Some(Err(e))) => {
                Err(bad(format!("bytes {}..{} of {:?} may not be durable: {e}", part.start, part.end, self.name)))
            }
            _ => Err(bad("its own code panicked, or it is not persistent any more".into())),
        }
    }

    fn part(&self, part: Range<usize>) -> Result<(), Error> {
        if part.start <= part.end && part.end <= self.bytes {
            return Ok(());
        }
        Err(Error::BadRange {
            what: format!("bytes {}..{} of the region {:?} of {} bytes", part.start, part.end, self.name, self.bytes),
            why: "the range does not lie inside",
        })
    }
}

impl fmt::Debug for Persistent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Persistent({:?}, {:?})", self.name, self.region)
    }
}
