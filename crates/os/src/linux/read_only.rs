//! Pages taken out of memory that the program may read and not write.
//!
//! The kernel moves pages out of writable mappings only. So the permissions are changed for a moment, in which the pages are
//! write-protected: who writes then faults, waits until the page is gone, and is refused as it would have been before.

use super::kernel::{Linux, trouble};
use super::remap::is_mapped;
use crate::kernel::{Done, Kernel, Trouble};
use peerspace_core::addr::{Pages, Va, VaRange};
use rustix::io::Errno;
use rustix::mm::{MprotectFlags, mprotect};

impl Linux {
    /// See [`Kernel::take_out_read_only`].
    pub(super) fn take_out_unprotected(&self, to: Va, from: VaRange) -> Done {
        let stopped = |why| Done::stopped(Pages(0), why);
        let Ok(Some(vma)) = self.maps.at(from.start) else { return stopped(Trouble::Unsuitable) };
        let plain = !vma.file && !vma.shared && vma.read && !vma.write && !vma.execute;
        let can = self.capabilities();
        if !plain || vma.range.end < from.end || !can.move_pages || !can.write_protect {
            return stopped(Trouble::Unsuitable);
        }
        if let Err(e) = self.uffd.write_protect(from.start.0, from.len(), true, false) {
            return stopped(trouble(e));
        }
        if let Err(e) = permit(from, MprotectFlags::READ | MprotectFlags::WRITE) {
            return stopped(trouble(e));
        }
        let done = self.take_out(to, from);
        self.unpermit(from);
        done
    }

    /// Makes `range` read-only, as it was a moment ago. Returns at once where something of it is not mapped any more: somebody has
    /// unmapped it unheard, and waits for us.
    fn unpermit(&self, range: VaRange) {
        let pages = || (range.start.0..range.end.0).step_by(self.geometry().page_bytes()).map(Va);
        // The kernel may have no memory for it now, and has when others give some back.
        while permit(range, MprotectFlags::READ) == Err(Errno::NOMEM) && pages().all(is_mapped) {
            std::thread::yield_now();
        }
    }
}

fn permit(range: VaRange, flags: MprotectFlags) -> Result<(), Errno> {
    // SAFETY: the mapping is the program's, and the caller of `take_out_read_only` vouches that nobody else changes it meanwhile;
    // nothing is taken from what may be done with it.
    unsafe { mprotect(range.start.0 as *mut _, range.len() as usize, flags) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::{Delivery, Setup};
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    const PAGE: u64 = 4096;

    fn open() -> Linux {
        Linux::open(Setup { delivery: Delivery::Signal, blocks: 1, slots: 64, without: 0 }).unwrap()
    }

    /// Three pages with words, in a mapping with these permissions.
    fn filled(flags: MprotectFlags) -> VaRange {
        let (prot, len) = (ProtFlags::READ | ProtFlags::WRITE, 3 * PAGE as usize);
        // SAFETY: a new mapping, where the kernel has room, of which nobody else knows.
        let at = unsafe {
            let at = mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE).unwrap();
            (0..3).for_each(|n| at.byte_add(n * PAGE as usize).cast::<u64>().write(7 + n as u64));
            mprotect(at, len, flags).unwrap();
            at as u64
        };
        VaRange { start: Va(at), end: Va(at + 3 * PAGE) }
    }

    fn middle(range: VaRange) -> VaRange {
        VaRange { start: Va(range.start.0 + PAGE), end: Va(range.end.0 - PAGE) }
    }

    /// G1: a page leaves, and what the program may do with its memory is as before.
    #[test]
    fn a_page_leaves_and_the_memory_stays_read_only() {
        let k = open();
        let range = filled(MprotectFlags::READ);
        k.adopt(range).unwrap();
        let all = k.staging();
        let slot = VaRange { start: Va(all.end.0 - 2 * PAGE), end: Va(all.end.0 - PAGE) };
        let page = middle(range);
        assert_eq!(k.take_out(slot.start, page), Done::stopped(Pages(0), Trouble::Unsuitable));
        assert_eq!(k.take_out_read_only(slot.start, page), Done::all(Pages(1)));
        assert_eq!(k.read_staged(slot, |bytes| u64::from_ne_bytes(bytes[..8].try_into().unwrap())), 8);
        let present = [0, 1, 2].map(|n| k.is_present(Va(range.start.0 + n * PAGE)).unwrap());
        assert_eq!(present, [true, false, true]);
        for n in 0..3 {
            let vma = k.maps.at(Va(range.start.0 + n * PAGE)).unwrap().unwrap();
            assert!(vma.read && !vma.write, "page {n}: {vma:?}");
        }
    }

    /// What is writable, or not to be read, is none of it.
    #[test]
    fn other_memory_is_refused() {
        let k = open();
        for flags in [MprotectFlags::READ | MprotectFlags::WRITE, MprotectFlags::empty()] {
            let range = filled(flags);
            k.adopt(range).unwrap();
            let slot = Va(k.staging().end.0 - 2 * PAGE);
            let done = k.take_out_read_only(slot, middle(range));
            assert_eq!(done, Done::stopped(Pages(0), Trouble::Unsuitable));
        }
    }

    /// G5: who unmaps such memory unheard, just then, waits for us to hear of it, and we not for what was there.
    #[test]
    fn g5_what_is_not_mapped_any_more_is_not_waited_for() {
        let k = open();
        let range = filled(MprotectFlags::READ | MprotectFlags::WRITE);
        let page = middle(range);
        // SAFETY: memory of this test.
        unsafe { munmap(page.start.0 as *mut _, PAGE as usize) }.unwrap();
        k.unpermit(range);
        assert!(!k.maps.at(range.start).unwrap().unwrap().write, "the kernel has come as far as that");
    }
}
