//! The MMU of an accelerator, as the engine changes it: entering translations, and taking them away from all lanes.

use super::accelerator::Accelerator;
use super::core::{Core, HALTED, invalid};
use super::failure::Failure;
use super::table::{FANOUT, PAGES, Pte};
use crate::device::DeviceError;
use crate::device::mmu::{Mapping, Mmu, MmuDescriptor, Port, Progress, Target};
use std::ops::Range;

/// The fence of a request that will never be done.
const NEVER: u64 = u64::MAX;

impl Core {
    /// The first page of a mapping, and whether it is of a block.
    ///
    /// # Errors
    /// When it is not aligned, names what is not there, or what the device cannot do.
    fn check(&self, mapping: &Mapping) -> Result<(u64, bool), DeviceError> {
        let Mapping { va, bytes, to, writable } = *mapping;
        let block = bytes == self.page() * FANOUT;
        let end = va.checked_add(bytes).ok_or_else(invalid)?;
        let within = self.options.addresses.start <= va && end <= self.options.addresses.end;
        let aligned = va.is_multiple_of(bytes.max(1)) && (block || bytes == self.page());
        if !aligned || !within || end > PAGES << self.page_shift {
            return Err(invalid());
        }
        match to {
            Target::Own(page) if !block || page.is_multiple_of(FANOUT) => drop(self.place(page, bytes)?),
            Target::Own(_) => return Err(invalid()),
            Target::Host if !self.options.remote => return Err(DeviceError::Unsupported),
            Target::Zero if writable => return Err(invalid()),
            Target::Zero if !self.options.zero_page => return Err(DeviceError::Unsupported),
            _ => {}
        }
        Ok((va >> self.page_shift, block))
    }

    /// The pages that `addresses` touch, as far as there are any that can be translated.
    fn pages(&self, addresses: &Range<u64>) -> Range<u64> {
        let end = addresses.end.div_ceil(self.page()).min(PAGES);
        (addresses.start >> self.page_shift).min(end)..end
    }
}

impl Mmu for Accelerator {
    fn describe(&self) -> MmuDescriptor {
        let o = &self.core().options;
        let (addresses, deadline) = (o.addresses.clone(), o.deadline);
        let descriptor = MmuDescriptor::new(o.mode).addresses(addresses).deadline(deadline);
        MmuDescriptor { remote: o.remote, zero_page: o.zero_page, faults: o.faults, ..descriptor }
    }

    fn attached(&self, port: Port) {
        *self.core().port.lock() = Some(port);
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let core = self.core();
        core.alive()?;
        if core.failures.strikes(Failure::RefuseMap) {
            return Err(DeviceError::NoSpace);
        }
        // What takes the place of something else is used by nobody any more when this returns.
        let mut replaced: Option<Range<u64>> = None;
        let mut result = Ok(());
        let changing = core.changing.lock();
        for mapping in batch {
            let set = core.check(mapping).and_then(|(page, block)| {
                core.table.set(page, block, Pte::new(mapping.to, mapping.writable)).map_err(|_| DeviceError::NoSpace)
            });
            match set {
                Ok(None) => {}
                Ok(Some(gone)) => {
                    let all = replaced.unwrap_or(gone.clone());
                    replaced = Some(all.start.min(gone.start)..all.end.max(gone.end));
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
        }
        drop(changing);
        if let Some(pages) = replaced {
            let epoch = core.shoot_down(pages);
            while !core.wait_over(epoch) {}
        }
        result
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        let core = self.core();
        core.alive()?;
        if core.failures.strikes(Failure::NeverUnmap) {
            return Ok(Progress::Pending(NEVER));
        }
        let changing = core.changing.lock();
        let pages = core.table.clear(core.pages(&addresses));
        drop(changing);
        // Also when nothing was there: another thread may be taking away a block that these pages belong to, and not have
        // waited for its users yet.
        let epoch = core.shoot_down(pages);
        Ok(if core.wait_over(epoch) { Progress::Done } else { Progress::Pending(epoch) })
    }

    fn halt(&self) -> Result<Progress, DeviceError> {
        let core = self.core();
        core.alive()?;
        if core.failures.strikes(Failure::NeverUnmap) {
            return Ok(Progress::Pending(NEVER));
        }
        let epoch = core.halt_lanes();
        Ok(if core.wait_over(epoch) { Progress::Done } else { Progress::Pending(epoch) })
    }

    fn go_on(&self) {
        self.core().release_lanes(HALTED);
    }

    fn is_done(&self, fence: u64) -> Result<bool, DeviceError> {
        let core = self.core();
        if core.failures.is(Failure::Gone) {
            return Err(DeviceError::Gone);
        }
        Ok(fence != NEVER && !core.failures.is(Failure::NeverUnmap) && core.is_over(fence))
    }

    fn reserve(&self, addresses: Range<u64>) -> bool {
        let core = self.core();
        let Range { start, end } = core.options.addresses;
        let apart = |other: &Range<u64>| other.end <= addresses.start || addresses.end <= other.start;
        // What the space has reserved is the space's to keep apart.
        start <= addresses.start && addresses.end <= end && core.options.occupied.iter().all(apart)
    }

    fn take_accessed(&self, addresses: Range<u64>) -> bool {
        let core = self.core();
        let pages = core.pages(&addresses);
        let any = core.table.take_accessed(pages.clone());
        if any {
            // What is still in a TLB would be used without being noted. Who is using it just now need not be waited for.
            let _ = core.shoot_down(pages);
        }
        any
    }
}
