//! What a forked child needs to go on (rule G12): descriptors of its own, and its memory registered anew.

use super::kernel::{Delivery, Linux};
use super::uffd::{Mode, feature};
use crate::error::OsError;
use peerspace_core::addr::VaRange;

/// How the pages of a region are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// They are taken out, and faults bring them back.
    Movable,
    /// The kernel keeps them, where they are.
    InPlace,
}

impl Linux {
    /// In a forked child: opens everything anew and registers staging and `regions`, which have their pages but not
    /// their registration; what the kernel keeps is [watched](crate::Kernel::watch) where that can be. Calls `gone` with
    /// what is mapped no longer: another thread of the parent had unmapped it, and nobody will tell this process. With
    /// `by_signal`, faults come by signal until the next call, whatever the [delivery](Linux::delivery): for as long as no
    /// thread runs yet that could receive them.
    ///
    /// No page of the regions may be accessed meanwhile, by any thread.
    ///
    /// # Errors
    /// When the system refuses. Missing pages then read as zeros: the child must not go on.
    pub fn renew(
        &self,
        by_signal: bool,
        regions: impl Iterator<Item = (VaRange, Kept)>,
        gone: &mut dyn FnMut(VaRange),
    ) -> Result<(), OsError> {
        let signal = by_signal || self.delivery() == Delivery::Signal;
        let more = if signal { feature::SIGBUS } else { 0 };
        self.uffd
            .renew(signal && !self.capabilities.kernel_faults, more)
            .map_err(|e| OsError::new("open a userfaultfd in a forked process", e))?;
        self.watcher
            .renew()
            .map_err(|e| OsError::new("open a userfaultfd for news of mappings in a forked process", e))?;
        self.pagemap.renew().map_err(|e| OsError::new("open /proc/self/pagemap", e).remedy("mount /proc"))?;
        self.maps.renew().map_err(|e| OsError::new("open /proc/self/maps", e).remedy("mount /proc"))?;
        let register = |r: VaRange, mode| {
            self.uffd
                .register(r.start.0, r.len(), mode)
                .map_err(|e| OsError::new(format!("register {r} in a forked process"), e))
        };
        if self.capabilities.move_pages {
            register(self.staging.range(), Mode::Protected)?;
        }
        for (region, kept) in regions {
            let mut at = region.start;
            while at < region.end {
                let vma = self.maps.at_or_after(at).map_err(|e| OsError::new("read /proc/self/maps", e))?;
                let vma = vma.filter(|v| v.range.start < region.end);
                let start = vma.map_or(region.end, |v| v.range.start.max(at));
                if at < start {
                    gone(VaRange { start: at, end: start });
                }
                at = start;
                if let Some(v) = vma {
                    let piece = VaRange { start, end: v.range.end.min(region.end) };
                    if kept == Kept::InPlace {
                        // Where it is refused, it was so before.
                        let _ = self.register_for_news(piece);
                    } else if v.file || v.shared {
                        gone(piece);
                    } else {
                        register(piece, self.mode)?;
                    }
                    at = piece.end;
                }
            }
        }
        Ok(())
    }
}
