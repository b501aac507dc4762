//! News of memory that stays where it is: a second userfaultfd, which resolves nothing and hears of everything.
//!
//! Only private anonymous memory, shared memory and huge pages can be registered with a descriptor that serves faults. One with
//! asynchronous write protection (Linux 6.7), which the kernel resolves by itself, takes any mapping of which the program could
//! have written to the file: nothing is ever protected through it, but the kernel tells it of what the program unmaps, moves
//! and discards. It is opened when it is needed first. Without it, the descriptor of the regions does for what it can.
//!
//! Of a read-only mapping of a file that was opened to be read alone the kernel tells nobody; and where registration is refused
//! nothing is told either.

use super::kernel::{Linux, trouble};
use super::uffd::{Mode, Uffd, feature};
use crate::kernel::Trouble;
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;
use std::sync::OnceLock;

const FEATURES: u64 = feature::WP_ASYNC
    | feature::PAGEFAULT_FLAG_WP
    | feature::EVENT_REMAP
    | feature::EVENT_REMOVE
    | feature::EVENT_UNMAP;

/// The second descriptor.
#[derive(Debug)]
pub(super) struct Watcher {
    uffd: OnceLock<Uffd>,
    /// This kernel has what it takes.
    can: bool,
}

impl Watcher {
    /// Not opened yet. `known`: the features that the kernel has.
    pub(super) fn new(known: u64) -> Watcher {
        Watcher { uffd: OnceLock::new(), can: known & FEATURES == FEATURES }
    }

    /// The descriptor, if it has been opened.
    #[inline]
    pub(super) fn get(&self) -> Option<&Uffd> {
        self.uffd.get()
    }

    /// The descriptor, opened now if that has not been done. One caller at a time.
    fn opened(&self) -> Option<&Uffd> {
        if self.can && self.get().is_none() {
            // It handles no fault at all.
            let mut uffd = Uffd::open(true).or_else(|_| Uffd::open(false)).ok()?;
            uffd.enable(FEATURES).ok()?;
            let _ = self.uffd.set(uffd);
        }
        self.get()
    }

    /// In a forked child: a descriptor of its own.
    ///
    /// # Errors
    /// The errno of userfaultfd.
    pub(super) fn renew(&self) -> Result<(), Errno> {
        self.get().map_or(Ok(()), |uffd| uffd.renew(true, 0).or_else(|_| uffd.renew(false, 0)))
    }

    /// Whether a change is announced that nobody has received. `spare`: a page in which nothing is protected, whatever is there.
    pub(super) fn is_changing(&self, spare: Va, page: u64) -> bool {
        let refused = |uffd: &Uffd| uffd.write_protect(spare.0, page, false, false) == Err(Errno::AGAIN);
        self.get().is_some_and(refused)
    }
}

impl Linux {
    /// Has changes to the mappings of `range` told, by either descriptor.
    pub(super) fn register_for_news(&self, range: VaRange) -> Result<(), Trouble> {
        if let Some(uffd) = self.watcher.opened()
            && uffd.register(range.start.0, range.len(), Mode::Protected).is_ok()
        {
            return Ok(());
        }
        // Nothing is ever protected in it, so nothing faults.
        self.uffd.register(range.start.0, range.len(), Mode::Protected).map_err(trouble)
    }

    /// Undoes it.
    pub(super) fn unregister_for_news(&self, range: VaRange) -> Result<(), Trouble> {
        if let Some(uffd) = self.watcher.get()
            && uffd.unregister(range.start.0, range.len()).is_ok()
        {
            return Ok(());
        }
        self.uffd.unregister(range.start.0, range.len()).map_err(trouble)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::alone;
    use crate::kernel::{Kernel, Mapped, Message};
    use crate::linux::{Delivery, Setup};
    use peerspace_core::addr::Access;
    use rustix::fd::{AsFd, OwnedFd};
    use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};
    use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

    const PAGE: usize = 4096;

    fn open(without: u64) -> Linux {
        Linux::open(Setup { delivery: Delivery::Signal, blocks: 1, slots: 64, without }).unwrap()
    }

    fn mapped(file: impl AsFd, prot: ProtFlags, flags: MapFlags) -> VaRange {
        // SAFETY: a new mapping, where the kernel has room.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4 * PAGE, prot, flags, file, 0) }.unwrap();
        VaRange { start: Va(at as u64), end: Va(at as u64 + 4 * PAGE as u64) }
    }

    fn on_disk(flags: OFlags) -> OwnedFd {
        rustix::fs::open("/proc/self/exe", flags, Mode::empty()).unwrap()
    }

    /// What is told of a call, which goes on when that is received.
    fn heard(k: &Linux, call: impl FnOnce() + Send) -> Vec<Message> {
        let mut told = Vec::new();
        std::thread::scope(|scope| {
            let caller = scope.spawn(call);
            while !caller.is_finished() {
                if k.wait_message(Some(std::time::Duration::from_millis(1))) {
                    assert!(k.is_changing(), "there is news, and nothing changes");
                    told.extend(k.receive());
                }
            }
        });
        assert_eq!((k.receive(), k.is_changing()), (None, false));
        told
    }

    /// The program discards, moves and unmaps what `k` watches.
    fn changes(k: &Linux, range: VaRange) {
        let at = |n: usize| (range.start.0 + (n * PAGE) as u64) as *mut std::ffi::c_void;
        let page = |n: usize| VaRange { start: Va(at(n) as u64), end: Va(at(n + 1) as u64) };
        let [first, second, third] = [0, 1, 2].map(|n| at(n) as usize);
        // SAFETY: the test's own mapping, which nobody refers to.
        let told = heard(k, || unsafe {
            rustix::mm::madvise(first as *mut _, PAGE, Advice::LinuxDontNeed).unwrap();
        });
        assert_eq!(told, [Message::Discard(page(0))]);
        // SAFETY: as above.
        let told = heard(k, || unsafe { rustix::mm::munmap(second as *mut _, PAGE).unwrap() });
        assert_eq!(told, [Message::Unmap(page(1))]);
        // SAFETY: as above.
        let told = heard(k, || unsafe {
            let moved = rustix::mm::mremap(third as *mut _, PAGE, 2 * PAGE, MremapFlags::MAYMOVE).unwrap();
            rustix::mm::munmap(moved, 2 * PAGE).unwrap();
        });
        assert!(told.iter().any(|m| matches!(m, Message::Unmap(_))), "{told:?}");
    }

    /// G5: what the program does to any mapping is told, if it could have been one to be written.
    #[test]
    fn changes_of_mappings_of_any_kind_are_told() {
        alone(|| {
            let k = open(0);
            let both = ProtFlags::READ | ProtFlags::WRITE;
            let memory = memfd_create(c"watched", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&memory, 4 * PAGE as u64).unwrap();
            let file = on_disk(OFlags::RDONLY);
            assert!(k.watcher.get().is_none(), "nobody needs it yet");
            for (range, told) in [
                (mapped(&memory, both, MapFlags::SHARED), true),
                (mapped(&memory, ProtFlags::READ, MapFlags::PRIVATE), true),
                (mapped(&file, both, MapFlags::PRIVATE), true),
                (mapped(&file, ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE), true),
                (mapped(&file, ProtFlags::READ, MapFlags::SHARED), false),
            ] {
                if !told {
                    assert_eq!(k.watch(range), Err(Trouble::Unsuitable), "of that the kernel tells nobody");
                    continue;
                }
                k.watch(range).unwrap();
                changes(&k, range);
            }
            // What is watched no longer is nobody's news.
            let range = mapped(&memory, both, MapFlags::SHARED);
            k.watch(range).unwrap();
            k.unwatch(range).unwrap();
            // SAFETY: as above.
            assert_eq!(heard(&k, || unsafe { rustix::mm::munmap(range.start.0 as *mut _, 4 * PAGE).unwrap() }), []);
            assert_eq!(k.unwatch(range), Err(Trouble::Unsuitable));
        });
    }

    /// On kernels before 6.7: shared memory alone.
    #[test]
    fn without_a_second_descriptor_there_is_news_of_shared_memory() {
        alone(|| {
            let k = open(feature::WP_ASYNC);
            let memory = memfd_create(c"watched", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&memory, 4 * PAGE as u64).unwrap();
            let range = mapped(&memory, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
            k.watch(range).unwrap();
            changes(&k, range);
            let file = mapped(on_disk(OFlags::RDONLY), ProtFlags::READ, MapFlags::PRIVATE);
            assert_eq!(k.watch(file), Err(Trouble::Unsuitable));
            assert!(k.watcher.get().is_none());
            let found = Mapped { range: file, allowed: Some(Access::Read) };
            assert_eq!(k.mapped_from(file.start), Ok(Some(found)));
        });
    }
}
