//! Pages that cannot be had back: how accesses to them are made to fail (rule Z9).
//!
//! A kernel that can mark a page as lost does so at once, under the lock of its entry. On others the program's threads
//! would wait for the page, and fault on it, for ever. There the page is *buried*: one that raises SIGBUS takes its
//! place. That is a change of mappings like those of the program, and whoever makes it waits until it is received; so
//! the thread that finds the page lost, which may be the one to receive it, leaves it to the background reclaimer
//! ([`Graves`]). A thread that waits for the page goes on waiting until then.
//!
//! Where faults come by signal nothing of this is needed: each access asks anew, and is told.
//!
//! A page that the kernel refuses to map for want of memory is not lost. But its access fails after two seconds instead of hanging
//! the program (`fault.rs`).

use super::context::Context;
use super::{Engine, Entry};
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{DevicePfn, PageRange, Pages, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_core::sync::{AtomicU32, AtomicU64, Ordering};
use peerspace_os::{Kernel, Trouble};
use std::time::Duration;

/// Pages that wait to be buried at most; those beyond fault again until there is room.
const GRAVES: usize = 64;

/// Pages to be buried.
#[derive(Debug)]
pub(crate) struct Graves {
    wanted: Mutex<ArrayVec<Vpn, GRAVES>>,
    count: AtomicU32,
    /// How many threads are burying, for which somebody has to receive messages.
    digging: AtomicU32,
    /// The page (plus one) of a region of ours that is being buried: it stays in its region. Only one thread buries.
    ours: AtomicU64,
}

impl Graves {
    pub(crate) fn new() -> Graves {
        Graves {
            wanted: Mutex::new(ArrayVec::new_const()),
            count: AtomicU32::new(0),
            digging: AtomicU32::new(0),
            ours: AtomicU64::new(0),
        }
    }

    /// In a forked child, at rest: the child's own faults ask again.
    pub(crate) fn renew(&self) {
        self.wanted.lock().clear();
        self.count.store(0, Ordering::Relaxed);
        self.digging.store(0, Ordering::Relaxed);
        self.ours.store(0, Ordering::Relaxed);
    }

    /// Has `vpn` buried, soon. False when there is no room. The caller has a context.
    pub(crate) fn request(&self, vpn: Vpn) -> bool {
        let mut wanted = self.wanted.lock();
        let there = wanted.contains(&vpn) || wanted.try_push(vpn).is_ok();
        self.count.store(wanted.len() as u32, Ordering::Release);
        there
    }

    pub(crate) fn wanted(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Somebody may wait for a message of a burial to be received.
    pub(crate) fn digging(&self) -> bool {
        // Sequentially consistent, like the flag that stops: see bury_lost.
        self.digging.load(Ordering::SeqCst) > 0
    }

    /// Whether news that `pages` were unmapped is about a burial, after which the page still belongs to its region. Such
    /// news comes once.
    pub(crate) fn is_ours(&self, pages: PageRange) -> bool {
        let expected = pages.start.0 + 1;
        pages.pages() == Pages(1)
            && self.ours.compare_exchange(expected, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn next(&self) -> Option<Vpn> {
        let mut wanted = self.wanted.lock();
        let vpn = wanted.pop();
        self.count.store(wanted.len() as u32, Ordering::Release);
        vpn
    }
}

impl<K: Kernel> Engine<K> {
    /// Makes accesses to the page of `entry` fail, as far as that can be done here. False when that is left to the
    /// reclaimer, who wakes the threads that wait for the page; otherwise they may look again.
    pub(crate) fn mark_lost(&self, entry: &Entry<'_, K>, context: &Context) -> bool {
        let can = self.kernel.capabilities();
        if can.poison {
            // Refusal is no harm: an access faults again and finds the entry poisoned.
            if let Some(_section) = self.gate.enter(context) {
                let _ = self.kernel.poison(self.geometry.va(entry.vpn()));
            }
            return true;
        }
        if !can.kernel_faults || !self.service.graves.request(entry.vpn()) {
            return true;
        }
        self.service.call_reclaim(&self.kernel.park());
        false
    }

    /// Buries what there is to bury. Not for threads that receive messages; the caller has no context.
    pub(crate) fn bury_lost(&self) {
        let graves = &self.service.graves;
        while graves.wanted() {
            // Whoever receives messages goes on while this is set; and whoever sees that they stop buries no more.
            graves.digging.fetch_add(1, Ordering::SeqCst);
            let done = self.service.stopped() || self.bury_next();
            graves.digging.fetch_sub(1, Ordering::SeqCst);
            if self.service.stopped() {
                return;
            }
            if !done {
                crate::sync::sleep(Duration::from_millis(2));
                return;
            }
        }
    }

    /// The pages of `pages` that are lost.
    fn lost(&self, pages: PageRange) -> impl Iterator<Item = Vpn> + '_ {
        pages
            .iter()
            .filter(|v| self.table.look(*v).is_some_and(|(entry, _)| matches!(entry.state(), State::Poisoned { .. })))
    }

    /// Buries what is lost of `pages`, whose faults are soon ours no longer. A mark would not do: if the range is adopted
    /// once more, nobody knows what it stands for, and whatever is put in its place replaces it.
    pub(crate) fn bury_within(&self, pages: PageRange) {
        for vpn in self.lost(pages) {
            let _work = self.contexts.take();
            let _ = self.service.graves.request(vpn);
        }
        self.bury_lost();
    }

    /// The first lost page of `pages` that cannot be made good by discarding it, because it is buried: after a discarding
    /// of all of them. Without a context.
    pub(crate) fn still_lost(&self, pages: PageRange) -> Option<(Vpn, DevicePfn)> {
        let can = self.kernel.capabilities();
        if can.poison || !can.kernel_faults {
            return None;
        }
        self.wait_for_changes();
        pages.iter().find_map(|vpn| match self.table.look(vpn)?.0.state() {
            State::Poisoned { pfn } => Some((vpn, pfn)),
            _ => None,
        })
    }

    /// Whether every access to what is lost of `pages` fails by itself; sees to it as far as that can be done at once.
    /// The engine is at rest.
    pub(crate) fn all_lost_marked(&self, pages: PageRange) -> bool {
        // What is buried of adopted memory belongs to no region any more.
        self.lost(pages)
            .all(|vpn| matches!(self.kernel.poison(self.geometry.va(vpn)), Ok(()) | Err(Trouble::Present)))
    }

    /// Buries one page. False if it has to be tried again.
    fn bury_next(&self) -> bool {
        let Some(vpn) = ({
            let _work = self.contexts.take();
            self.service.graves.next()
        }) else {
            return true;
        };
        let va = self.geometry.va(vpn);
        let adopted = loop {
            let work = self.contexts.take();
            let Ok(entry) = self.table.lock(vpn) else { return true };
            // Look again: the program may have unmapped or discarded it.
            let Some(region) = self.region(vpn).filter(|_| matches!(entry.state(), State::Poisoned { .. })) else {
                let _ = self.kernel.wake(self.addresses(entry.range()));
                return true;
            };
            if self.gate.enter(work.context()).is_some() && !self.kernel.is_changing() {
                break region.attributes.has(Attributes::ADOPTED);
            }
            drop(entry);
            drop(work);
            self.wait_for_changes();
        };
        // Of adopted memory, the program may map something else there, and nobody would tell.
        let ours = &self.service.graves.ours;
        ours.store(if adopted { 0 } else { vpn.0 + 1 }, Ordering::SeqCst);
        let buried = self.kernel.bury(va).is_ok();
        if !buried {
            ours.store(0, Ordering::SeqCst);
            let _work = self.contexts.take();
            let _ = self.service.graves.request(vpn);
        }
        buried
    }
}
