//! Changes of mappings, and the devices that use what changes (rule G5).
//!
//! The kernel tells of a change when it has made it, and lets the thread that asked for it go on when the news is received. For
//! the CPU that is early enough: its accesses fault, and faults wait at the [gate](super::gate). A device has translations of its
//! own, and with them would go on to use what the addresses meant before. So there are two ways:
//!
//! - Whoever is about to make a change can *announce* it ([`Engine::announce_change`]): what devices map there is recalled, and until
//!   the change is over their faults there wait. When the call returns to the program no device can know the old memory, and
//!   during the call none can get hold of the new one. This is the only way for `mprotect`, of which the kernel tells nothing.
//! - A change that nobody has announced is noticed when its news is on the way. All devices are *halted* before the news is
//!   received ([`Engine::halt_devices`]), so before the thread that made the change goes on, and run again when it has been acted
//!   on. Other threads of the program may have been given the addresses anew before that: the kernel takes a mapping away before
//!   it tells of it.
//!
//! # Why no fault comes between an announcement and its recall
//!
//! ```text
//!  announce: note the range; then for each page: lock, recall    fault: lock; is the range noted? -> let go, wait; else enter
//! ```
//!
//! Both look under the entry's lock. If the fault locks first, the recall finds what it has entered (and waits for the lock
//! if it has not yet: `recall_where` takes what is locked for mapped); if the recall does, the fault finds the note.
//!
//! # Why no news is received with devices running
//!
//! News is received only after the descriptor said that there is something. The kernel counts a change as under way before it
//! sends news of it and until the thread goes on, and it hands faults out before news. So if nothing is under way, what there is
//! is a fault, and it comes first.
//!
//! A device that is halted may be given a translation meanwhile, which is of no use to it before it goes on, and recalled by
//! then. One that cannot be halted has its translations taken away, and gets none meanwhile ([`Closing`]).

use super::Engine;
use super::tier::{Tier, unwinding};
use crate::device::DeviceError;
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{PageRange, VaRange};
use peerspace_core::regions::Attributes;
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering};
use peerspace_os::Kernel;
use std::time::Duration;

/// Announced ranges at once: each is a call that a thread of the program makes.
const MOST: usize = 256;
/// Between two looks whether a change is over, after the first few.
const PAUSE: Duration = Duration::from_micros(20);

/// The changes that are announced and not over.
#[derive(Debug)]
pub(crate) struct Announcements {
    /// Locked with a context in hand only, so that it is free when the process forks.
    ranges: Mutex<ArrayVec<PageRange, MOST>>,
    /// How many there are: for those who need not look.
    count: AtomicU64,
    /// All changes of memory that is adopted are announced.
    promised: AtomicBool,
}

impl Announcements {
    pub(crate) fn new() -> Announcements {
        Announcements {
            ranges: Mutex::new(ArrayVec::new_const()),
            count: AtomicU64::new(0),
            promised: AtomicBool::new(false),
        }
    }

    /// From now on every change of adopted memory is announced.
    pub(crate) fn promise(&self) {
        self.promised.store(true, Ordering::SeqCst);
    }

    /// Whether they are.
    pub(crate) fn are_promised(&self) -> bool {
        self.promised.load(Ordering::SeqCst)
    }

    /// In a forked child: the threads that announced something do not exist.
    pub(crate) fn renew(&self) {
        self.ranges.lock().clear();
        self.count.store(0, Ordering::Relaxed);
    }

    /// Whether a change of any of `pages` is announced. The caller has a context.
    pub(crate) fn concern(&self, pages: PageRange) -> bool {
        // Acquire by the entry's lock: see the head of this file.
        self.count.load(Ordering::SeqCst) != 0 && self.ranges.lock().iter().any(|r| !r.intersect(pages).is_empty())
    }

    /// Notes all of `ranges`, or none if there is no room.
    fn note(&self, ranges: &[PageRange]) -> bool {
        let mut noted = self.ranges.lock();
        if noted.len() + ranges.len() > MOST {
            return false;
        }
        noted.extend(ranges.iter().copied());
        self.count.store(noted.len() as u64, Ordering::SeqCst);
        true
    }

    fn over(&self, ranges: &[PageRange]) {
        let mut noted = self.ranges.lock();
        for range in ranges {
            if let Some(i) = noted.iter().position(|r| r == range) {
                noted.swap_remove(i);
            }
        }
        self.count.store(noted.len() as u64, Ordering::SeqCst);
    }
}

/// Keeps translations from being entered while all of a device's are taken away because it cannot be halted. Either who enters sees
/// that it is closed, or who closes it sees the one who enters.
#[derive(Debug)]
pub(crate) struct Closing {
    closed: AtomicBool,
    entering: AtomicU64,
}

/// A translation is being entered.
pub(crate) struct Entering<'a>(&'a Closing);

impl Closing {
    pub(crate) fn new() -> Closing {
        Closing { closed: AtomicBool::new(false), entering: AtomicU64::new(0) }
    }

    pub(crate) fn enter(&self) -> Option<Entering<'_>> {
        self.entering.fetch_add(1, Ordering::SeqCst);
        let entering = Entering(self);
        (!self.closed.load(Ordering::SeqCst)).then_some(entering)
    }

    /// Nothing is entered when this returns, nor before it is [opened](Closing::open).
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while self.entering.load(Ordering::SeqCst) != 0 {
            crate::sync::yield_now();
        }
    }

    /// Lets translations be entered again. Also in a forked child, where the thread that closed it does not exist.
    pub(crate) fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }
}

impl Drop for Entering<'_> {
    fn drop(&mut self) {
        self.0.entering.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Devices that make no accesses: those that can be halted, until this is dropped; the others have no translations.
#[must_use = "dropping it lets the devices go on"]
pub(crate) struct Halted<'a, K: Kernel>(&'a Engine<K>);

impl<K: Kernel> Drop for Halted<'_, K> {
    fn drop(&mut self) {
        self.0.tiers.iter().for_each(|tier| tier.go_on());
    }
}

impl<K: Kernel> Engine<K> {
    /// The program is about to change the mappings of `ranges`, or what they hold: no device maps anything there from when this
    /// returns until [`change_is_over`](Engine::change_is_over) is called with the same ranges.
    ///
    /// Not for threads that receive messages.
    pub(crate) fn announce_change(&self, ranges: &[PageRange]) {
        let mut tries = 0;
        while !{
            let _work = self.contexts.take();
            self.announcements.note(ranges)
        } {
            tries += 1;
            crate::sync::sleep(PAUSE * tries.min(50));
        }
        // Of what becomes a region only now, faults have seen the note.
        for piece in ranges.iter().flat_map(|range| self.pieces(*range)) {
            match piece.attributes.has(Attributes::IN_PLACE) {
                // Whoever looks from here on finds it announced, as if it were no region any more.
                true => self.withdraw_gone(piece.range),
                false => self.recall_pages(piece.range),
            }
            // And what is mapped in place of a device is taken away: the call is about memory of the program's own.
            if piece.attributes.has(Attributes::ADOPTED) {
                self.leave_announced(piece.range);
            }
        }
    }

    fn leave_announced(&self, pages: PageRange) {
        if let Err(e) = self.leave_places(pages) {
            let range = self.addresses(pages);
            crate::tell::warning(format_args!(
                "memory of a device stays mapped in {range}, which is about to change: {e}"
            ));
        }
    }

    /// What was [announced](Engine::announce_change) has been done, or given up.
    pub(crate) fn change_is_over(&self, ranges: &[PageRange]) {
        // News of it that has been received is acted on first: until then the table describes what was.
        self.await_received();
        let _work = self.contexts.take();
        self.announcements.over(ranges);
        if self.announcements.are_promised() {
            for range in ranges {
                // Nobody discards anything there without having announced it, so before its news was noted.
                self.going.are_gone(*range, |part| self.announcements.concern(part));
            }
        }
    }

    /// Waits for announced changes of `pages` to be over. Not for threads that receive messages.
    pub(crate) fn await_announced(&self, pages: PageRange) {
        let mut tries = 0;
        while {
            let _work = self.contexts.take();
            self.announcements.concern(pages)
        } {
            tries += 1;
            if tries < 16 { crate::sync::yield_now() } else { crate::sync::sleep(PAUSE) }
        }
    }

    /// Halts the devices if news of a change is on the way. For whoever is about to receive something that is there.
    pub(crate) fn halt_devices(&self) -> Option<Halted<'_, K>> {
        if !self.tiers.any_mmu() || !self.kernel.is_changing() {
            return None;
        }
        let halted = Halted(self);
        for tier in self.tiers.iter() {
            // What becomes a region meanwhile it gets no translations of.
            tier.halt(|| self.regions.iter().map(|region| self.addresses(region.range)));
        }
        Some(halted)
    }
}

impl<W: peerspace_core::words::Words> Tier<W> {
    /// No access by any translation is under way when this returns, and none begins before [`go_on`](Tier::go_on). A device
    /// that cannot be halted loses its translations of all `regions`.
    fn halt<I: Iterator<Item = VaRange>>(&self, regions: impl FnOnce() -> I) {
        let Some((state, mmu)) = self.live_mmu() else { return };
        let begun = unwinding(|| mmu.halt());
        if let Some(Err(DeviceError::Unsupported)) = begun {
            state.forget_faults();
            state.closing.close();
            return regions().for_each(|region| self.unmap(region));
        }
        if let Err(why) = self.await_progress(begun, mmu, state.info.deadline) {
            self.quarantine(&format!("it could not be halted: {why}"));
        }
    }

    fn go_on(&self) {
        if let Some(state) = &self.mmu {
            state.closing.open();
        }
        if let Some((_, mmu)) = self.live_mmu()
            && unwinding(|| mmu.go_on()).is_none()
        {
            self.quarantine("it panicked when it was to go on");
        }
    }
}
