//! Memory sent to a device, and brought home, because its user says so (rules Z5, G8).

use crate::attach::DeviceId;
use crate::engine::migrate::MigrateError;
use crate::error::Error;
use crate::region::Region;
use peerspace_core::addr::PageRange;
use peerspace_os::linux::signal::without_signals;
use peerspace_os::own::Buffer;
use std::ops::Range;

impl Region {
    /// Migrates the blocks (of 2 MiB, with pages of 4 KiB) that lie wholly inside `part` to a device, while other threads go
    /// on to use them. Returns how many bytes of them are there then; the rest is kept resident, in use without pause, or in
    /// huge pages that a forked process shares.
    ///
    /// On a [coherent](crate::device::MemoryType::Coherent) device they are used in place from then on: accesses take no
    /// fault and move nothing (rule Z5). To a private one they go as if they had left RAM for want of room, and the next
    /// access brings them home.
    ///
    /// Blocks that follow each other share one of the mappings that a process may have, if they follow each other on the
    /// device as well; migrated in order to a device with room they do.
    ///
    /// # Errors
    /// [`Error::Migrate`] when the device has no room, refuses, or takes nothing but regions that have names; or when a page
    /// is lost. What comes before is migrated then. [`Error::NoSuchDevice`] when there is none; [`Error::BadRange`] when
    /// `part` does not lie inside the region.
    pub fn migrate_to(&self, part: Range<usize>, device: DeviceId) -> Result<usize, Error> {
        let engine = self.space().engine();
        let mut buffer = None;
        let moved = self.each_block(part, |block, _| {
            let buffer = match &mut buffer {
                Some(buffer) => buffer,
                none => none.insert(Buffer::new(engine.geometry.block_bytes()).map_err(|_| MigrateError::NoMemory)?),
            };
            engine.migrate_block(block, device.0, buffer)
        })?;
        moved.map_err(|(block, e)| match e {
            MigrateError::NotThere => Error::NoSuchDevice,
            e => {
                let name = engine.tiers.by_id(device.0).map(|tier| tier.info.name.clone());
                self.not_migrated(block, name.map_or("a device that is gone".into(), |n| format!("device {n}")), &e)
            }
        })
    }

    /// Brings the blocks that lie wholly inside `part` home to RAM, from whatever device they are on; they leave RAM again
    /// like any others. Returns how many bytes of them are home then.
    ///
    /// # Errors
    /// [`Error::Migrate`] when the kernel has no memory for it, or a page is lost. [`Error::BadRange`] when `part` does not lie
    /// inside the region.
    pub fn migrate_home(&self, part: Range<usize>) -> Result<usize, Error> {
        let engine = self.space().engine();
        let moved = self.each_block(part, |block, rest| engine.migrate_home(block, rest))?;
        moved.map_err(|(block, e)| self.not_migrated(block, "RAM".into(), &e))
    }

    /// Calls `migrate` with each block inside `part`, and what follows it. Returns the bytes of those that went, or the first that failed; those
    /// that are in use are left where they are.
    fn each_block(
        &self,
        part: Range<usize>,
        mut migrate: impl FnMut(u64, PageRange) -> Result<(), MigrateError>,
    ) -> Result<Result<usize, (u64, MigrateError)>, Error> {
        let engine = self.space().engine();
        let pages = engine.geometry.pages_inside(self.part(part)?);
        let mut moved = 0;
        for piece in pages.by_block().filter(|piece| *piece == PageRange::block(piece.start.block())) {
            let block = piece.start.block();
            // Signals wait for one block at a time.
            // Whole blocks alone.
            let rest = PageRange { start: piece.end, end: pages.end.block_start().max(piece.end) };
            match without_signals(|| migrate(block, rest)) {
                Ok(()) => moved += engine.geometry.block_bytes(),
                Err(MigrateError::Busy) => {}
                Err(e) => return Ok(Err((block, e))),
            }
        }
        Ok(Ok(moved))
    }

    fn not_migrated(&self, block: u64, to: String, why: &MigrateError) -> Error {
        let engine = self.space().engine();
        let range = engine.addresses(PageRange::block(block));
        match why {
            MigrateError::Lost(vpn, pfn) => self.space().lost(*vpn, *pfn),
            why => Error::Migrate { range, to, why: why.to_string() },
        }
    }
}
