//! Memory that a device shares with the CPU, at the program's own addresses (rule Z5): put there and taken away in one step
//! each, so that nobody ever sees a page of zeros.
//!
//! ```text
//!  registered, all pages out --show--> the device's memory --hide--> registered, all pages missing
//! ```
//!
//! What takes the place of the device's memory is registered before it gets there: from its first moment on, a missing page is
//! a fault that waits. Both steps are changes of mappings like the program's own, and a message tells of them: an unmapping of
//! the range by [`show`](Linux::show); by [`hide`](Linux::hide) a move to the range, from an address that was never a region,
//! and the unmapping of that. The calls wait until these are received, so a thread that receives must not make them.

use super::kernel::{Linux, trouble};
use super::map::{Mapping, unclaim};
use crate::kernel::{Kernel, Trouble};
use peerspace_core::addr::VaRange;
use rustix::fd::BorrowedFd;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

impl Linux {
    /// Puts the memory of `file` from `offset` on in the place of `range`: blocks of one region, all of whose pages are out.
    /// Whoever waits for one of them goes on with what the file holds.
    ///
    /// # Errors
    /// When the kernel refuses the mapping; see [`Trouble`].
    pub fn show(&self, range: VaRange, file: BorrowedFd<'_>, offset: u64) -> Result<(), Trouble> {
        self.assert_foreign(range);
        // SAFETY: the range is a region's, and none of its pages is there: nobody sees a byte of it change.
        unsafe {
            rustix::mm::mmap(
                range.start.0 as *mut _,
                range.len() as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                file,
                offset,
            )
        }
        .map_err(trouble)?;
        self.wake(range)
    }

    /// Puts missing pages in the place of the memory that [`show`](Linux::show) has put at `range`: every access waits from
    /// then on. What was written until then is in the file.
    ///
    /// # Errors
    /// When the kernel refuses; the device's memory stays.
    pub fn hide(&self, range: VaRange) -> Result<(), Trouble> {
        self.assert_foreign(range);
        let len = range.len() as usize;
        let fresh = Mapping::new(len, self.geometry().block_bytes(), true).map_err(trouble)?;
        // SAFETY: advice without effect on content.
        let _ = unsafe { fresh.advise(0, len, Advice::LinuxHugepage) };
        let at = fresh.range();
        self.register(at)?;
        unclaim(at);
        // SAFETY: what is at `range` is the device's memory, which stays in the file; no reference into it is lost sight of,
        // since its addresses go on to be served, with the same bytes. The fresh mapping is nobody else's.
        let moved = unsafe {
            rustix::mm::mremap_fixed(at.start.0 as *mut _, len, len, MremapFlags::MAYMOVE, range.start.0 as *mut _)
        };
        // It is not there any more, or is given back below.
        let _ = fresh.leak();
        match moved {
            Ok(_) => Ok(()),
            Err(e) => {
                let _ = self.unmap(at);
                Err(trouble(e))
            }
        }
    }
}
