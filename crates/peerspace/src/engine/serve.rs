//! The engine's own threads, as loops that somebody runs: messages, background reclaim, reading ahead.
//!
//! # Messages
//!
//! Several threads may run [`Engine::serve_messages`]; one at a time, the *reader*, receives. It resolves faults
//! itself as long as that takes no wait; before it would wait (for a slow device, for a lock) it hands the reading
//! over. A fault that meets a change of mappings is put aside until the change is over. So there is always somebody
//! who reads, and whoever waits waits for somebody who makes headway.
//!
//! A managed process (`peerspace run`) has its faults served so because it works for every program. What such a fault costs is mostly
//! two wake-ups across processors; where trials show that it pays, the thread is woken up on the handler's own processor
//! ([`place`](peerspace_os::linux::place)).
//!
//! # Helpers
//!
//! What spares the program work, and is not needed before there is some, has a thread from then on only ([`Helper`]): most
//! processes that fork, or that know their data, never need any. The reclaimer starts them, because a thread that may be in a
//! fault cannot. Whoever rings for a helper that nobody plays rings for the reclaimer after that, and the reclaimer looks for
//! such bells after it has said that it sleeps; with a fence between the two steps on either side, one of them sees the other.

use super::Engine;
use super::ahead::Ahead;
use super::fault::{Outcome, Patience, Pause};
use super::lost::Graves;
use super::reclaim::{Pace, Step};
use super::stats::count;
use crate::sync::Mutex;
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, BLOCK_PAGES, PageRange, Pages, Va};
use peerspace_core::sync::{AtomicBool, AtomicU64, AtomicUsize, Latch, Ordering, Park, fence};
use peerspace_os::linux::place::Placement;
use peerspace_os::{Kernel, Message, Protect, Wake};
use std::time::Duration;

/// Faults put aside at once; one more is sent back to fault again.
const PUT_ASIDE: usize = 256;
/// Requests to read ahead that wait.
const REQUESTS: usize = 16;
/// How often a thread that waits for messages looks whether it is to stop.
const POLL: Duration = Duration::from_millis(200);
/// How long faults that are put aside wait before somebody looks whether they may go on.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// A loop that has no thread before there is something to do for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Helper {
    /// Reads ahead.
    Ahead,
    /// Collapses.
    Collapse,
    /// Sends what is prefetched.
    #[cfg(feature = "devices")]
    Send,
    /// Looks after calls that may wait for a fault.
    Watch,
}

impl Helper {
    const ALL: &[Helper] = &[
        Helper::Ahead,
        Helper::Collapse,
        #[cfg(feature = "devices")]
        Helper::Send,
        Helper::Watch,
    ];

    fn bit(self) -> u64 {
        1 << self as u32
    }
}

/// What the engine's threads share.
#[derive(Debug)]
pub(crate) struct Service {
    stop: AtomicBool,
    /// 0 while threads that were started wait for the word to go.
    go: AtomicU64,
    /// Held by whoever waits for messages.
    reader: Latch,
    /// Locked with a context in hand only, so that it is free when the process forks.
    aside: Mutex<ArrayVec<Va, PUT_ASIDE>>,
    /// How many faults are put aside.
    waiting: AtomicUsize,
    reclaim: AtomicU64,
    ahead: AtomicU64,
    collapse: AtomicU64,
    watch: AtomicU64,
    /// The helpers that have threads.
    played: AtomicU64,
    /// There was no block frame for a huge folio.
    blocks_wanted: AtomicBool,
    requests: Mutex<ArrayVec<Ahead, REQUESTS>>,
    said_full: AtomicBool,
    said_refused: AtomicBool,
    pub(crate) pace: Pace,
    pub(crate) graves: Graves,
}

impl Service {
    pub(crate) fn new() -> Service {
        Service {
            stop: AtomicBool::new(false),
            go: AtomicU64::new(1),
            reader: Latch::new(),
            aside: Mutex::new(ArrayVec::new_const()),
            waiting: AtomicUsize::new(0),
            reclaim: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            collapse: AtomicU64::new(0),
            watch: AtomicU64::new(0),
            played: AtomicU64::new(0),
            blocks_wanted: AtomicBool::new(false),
            requests: Mutex::new(ArrayVec::new_const()),
            said_full: AtomicBool::new(false),
            said_refused: AtomicBool::new(false),
            pace: Pace::new(),
            graves: Graves::new(),
        }
    }

    /// Ends the loops, once they look.
    pub(crate) fn stop(&self, park: &impl Park) {
        self.stop.store(true, Ordering::SeqCst);
        for word in [&self.reclaim, &self.ahead, &self.collapse, &self.watch] {
            word.store(1, Ordering::Release);
            park.wake(word);
        }
    }

    /// In a forked child, whose threads are yet to be started: nobody reads, nobody sleeps, nothing is wanted.
    pub(crate) fn renew(&self) {
        self.go.store(0, Ordering::Relaxed);
        self.reader.reset();
        self.reclaim.store(0, Ordering::Relaxed);
        self.ahead.store(0, Ordering::Relaxed);
        self.collapse.store(0, Ordering::Relaxed);
        self.watch.store(0, Ordering::Relaxed);
        self.played.store(0, Ordering::Relaxed);
        self.requests.lock().clear();
        self.aside.lock().clear();
        self.waiting.store(0, Ordering::Relaxed);
        self.graves.renew();
    }

    /// Lets threads that were started after [`renew`](Service::renew) begin.
    pub(crate) fn go(&self, park: &impl Park) {
        self.go.store(1, Ordering::Release);
        park.wake(&self.go);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(crate) fn wake_reclaim(&self, park: &impl Park) {
        ring(&self.reclaim, park);
    }

    /// The same for whoever wants something else of the reclaimer than room, and has said what.
    pub(crate) fn call_reclaim(&self, park: &impl Park) {
        // Either this finds it asleep, or it finds what it is called for.
        fence(Ordering::SeqCst);
        ring(&self.reclaim, park);
    }

    /// Has blocks looked through that may have become dense.
    pub(crate) fn wake_collapse(&self, park: &impl Park) {
        self.ring_for(Helper::Collapse, &self.collapse, park);
    }

    /// Has calls looked after: one is under way.
    pub(super) fn watch(&self, park: &impl Park) {
        self.ring_for(Helper::Watch, &self.watch, park);
    }

    /// Rings the bell of a helper; if nobody plays it, somebody soon does.
    pub(super) fn ring_for(&self, helper: Helper, bell: &AtomicU64, park: &impl Park) {
        if ring(bell, park) && self.played.load(Ordering::Relaxed) & helper.bit() == 0 {
            self.call_reclaim(park);
        }
    }

    /// The calling thread, or one that it is about to start, plays `helper`. False if another one does.
    pub(super) fn play(&self, helper: Helper) -> bool {
        self.played.fetch_or(helper.bit(), Ordering::Relaxed) & helper.bit() == 0
    }

    /// Has block frames emptied of which few parts are left: there was none for a huge folio.
    pub(crate) fn want_blocks(&self, park: &impl Park) {
        self.blocks_wanted.store(true, Ordering::Relaxed);
        self.wake_collapse(park);
    }

    /// Whether block frames have been wanted since it was asked last.
    pub(super) fn blocks_wanted(&self) -> bool {
        self.blocks_wanted.swap(false, Ordering::Relaxed)
    }

    /// The word that is 0 while the threads are not to begin yet.
    pub(super) fn started(&self) -> &AtomicU64 {
        &self.go
    }

    pub(super) fn collapse_bell(&self) -> &AtomicU64 {
        &self.collapse
    }

    /// All blocks were looked through; whoever rings from here on is heard.
    pub(super) fn answer_collapse(&self) {
        self.collapse.store(self.stopped() as u64, Ordering::Release);
    }

    /// Asks for something to be read ahead. False when the queue is full or taken.
    pub(crate) fn request(&self, what: Ahead, park: &impl Park) -> bool {
        let Some(mut requests) = self.requests.try_lock() else { return false };
        if !requests.contains(&what) && requests.try_push(what).is_err() {
            return false;
        }
        drop(requests);
        self.ring_for(Helper::Ahead, &self.ahead, park);
        true
    }

    pub(crate) fn say_once_full(&self) -> bool {
        !self.said_full.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn say_once_refused(&self) -> bool {
        !self.said_refused.swap(true, Ordering::Relaxed)
    }
}

/// Rings a bell: the word is 1 while its thread works or is about to. No system call unless it sleeps. False if it rang
/// already.
fn ring(bell: &AtomicU64, park: &impl Park) -> bool {
    // Release: what was asked for is seen by whoever answers.
    let rings = bell.load(Ordering::Relaxed) == 0 && bell.swap(1, Ordering::Release) == 0;
    if rings {
        park.wake(bell);
    }
    rings
}

/// Sleeps until the bell rings.
pub(super) fn await_bell(bell: &AtomicU64, park: &impl Park) {
    while bell.load(Ordering::Acquire) == 0 {
        park.wait(bell, 0);
    }
}

impl<K: Kernel> Engine<K> {
    /// Ends all loops, once they look.
    pub(crate) fn stop(&self) {
        self.service.stop(&self.kernel.park());
        #[cfg(feature = "devices")]
        self.prefetches.stop(&self.kernel.park());
    }

    /// The bell of `helper`.
    pub(super) fn bell(&self, helper: Helper) -> &AtomicU64 {
        match helper {
            Helper::Ahead => &self.service.ahead,
            Helper::Collapse => &self.service.collapse,
            #[cfg(feature = "devices")]
            Helper::Send => self.prefetches.bell(),
            Helper::Watch => &self.service.watch,
        }
    }

    /// The helpers that are rung for and that nobody plays.
    fn missed(&self) -> impl Iterator<Item = Helper> + '_ {
        let played = self.service.played.load(Ordering::Relaxed);
        let mut missed = Helper::ALL.iter().copied().filter(move |h| played & h.bit() == 0);
        // Mostly none is.
        std::iter::from_fn(move || missed.find(|h| self.bell(*h).load(Ordering::Acquire) != 0))
    }

    /// The loop of `helper`, until stopped.
    pub(crate) fn serve(&self, helper: Helper) {
        self.service.play(helper);
        match helper {
            Helper::Ahead => self.serve_ahead(),
            Helper::Collapse => self.serve_collapse(),
            #[cfg(feature = "devices")]
            Helper::Send => self.serve_prefetch(),
            Helper::Watch => self.serve_watch(),
        }
    }

    /// Reclaims in the background, until stopped. `hire` starts a thread that [serves](Engine::serve) as a helper.
    pub(crate) fn serve_reclaim(&self, mut hire: impl FnMut(Helper)) {
        let park = self.kernel.park();
        await_bell(&self.service.go, &park);
        while !self.service.stopped() {
            await_bell(&self.service.reclaim, &park);
            // Whoever stops all this says so, and rings every bell then.
            let needed = |helper: &Helper| !self.service.stopped() && self.service.play(*helper);
            // What follows may make such calls itself.
            let watch = self.kernel.waits_for_faults().then_some(Helper::Watch);
            self.missed().chain(watch).filter(needed).for_each(&mut hire);
            self.bury_lost();
            self.take_failed_from_place();
            let mut work = self.contexts.take();
            count(&work.counters.background_reclaims);
            let high = self.budget.watermarks().high.0 as i64;
            let mut stuck = false;
            // Ready frames are room, for whoever wants a block.
            while !self.service.stopped()
                && !stuck
                && self.budget.left() + (self.blocks.ready() as u64 * BLOCK_PAGES) as i64 <= high
            {
                stuck = matches!(self.reclaim_step(&mut work, true), Step::Stuck | Step::Changing);
            }
            drop(work);
            self.take_failed_from_place();
            if stuck {
                crate::sync::sleep(Duration::from_millis(2));
            }
            // Answered. Whoever rings from here on is heard.
            self.service.reclaim.store(self.service.stopped() as u64, Ordering::Release);
            fence(Ordering::SeqCst);
            if self.service.graves.wanted() || self.missed().next().is_some() {
                self.service.wake_reclaim(&park);
            }
        }
    }

    /// Reads ahead, until stopped.
    pub(crate) fn serve_ahead(&self) {
        let park = self.kernel.park();
        await_bell(&self.service.go, &park);
        while !self.service.stopped() {
            await_bell(&self.service.ahead, &park);
            while let Some(what) = self.next_request() {
                if self.service.stopped() {
                    break;
                }
                self.bring_ahead(what);
            }
        }
    }

    pub(super) fn next_request(&self) -> Option<Ahead> {
        let _work = self.contexts.take();
        let mut requests = self.service.requests.lock();
        if requests.is_empty() {
            // Under the lock, so that a request that comes now rings again.
            self.service.ahead.store(self.service.stopped() as u64, Ordering::Release);
            return None;
        }
        Some(requests.remove(0))
    }

    /// Receives changes of mappings where faults come by signal, until stopped.
    pub(crate) fn serve_changes(&self) {
        await_bell(&self.service.go, &self.kernel.park());
        while !self.service.stopped() || self.service.graves.digging() {
            if self.kernel.wait_message(Some(POLL)) {
                self.receive();
            }
        }
    }

    /// Receives faults and changes, until stopped. Several threads may run this.
    pub(crate) fn serve_messages(&self) {
        let park = self.kernel.park();
        await_bell(&self.service.go, &park);
        let reader = &self.service.reader;
        let mut placement = Placement::new();
        reader.lock(&park);
        while !self.service.stopped() || self.service.graves.digging() {
            self.retry_aside();
            if !self.kernel.wait_message(Some(if self.is_any_aside() { LOOK_AGAIN } else { POLL })) {
                continue;
            }
            match self.receive() {
                None => {}
                Some(Message::Fault { va, write, thread, .. }) => {
                    let beside = placement.serve(thread);
                    let access = if write { Access::Write } else { Access::Read };
                    match self.fault(va, access, Wake::Yes, Patience::Never) {
                        Err(Pause::Busy) => {
                            // Somebody else reads, while this thread waits for what the fault takes.
                            reader.unlock(&park);
                            let outcome = self.fault(va, access, Wake::Yes, Patience::Locks);
                            self.conclude(va, outcome);
                            // Before any wait.
                            drop(beside);
                            self.read_again();
                        }
                        outcome => self.conclude(va, outcome),
                    }
                }
                // A change has been acted on: what waited for it may soon try again.
                Some(_) => {}
            }
        }
        reader.unlock(&park);
    }

    /// Becomes the reader again. As long as faults are put aside, somebody has to look whether the change that they
    /// met is over: whoever reads now may sleep until there is a message, and there may be none for long.
    fn read_again(&self) {
        let reader = &self.service.reader;
        while self.is_any_aside() {
            if reader.try_lock() {
                return;
            }
            self.retry_aside();
            crate::sync::sleep(LOOK_AGAIN);
        }
        reader.lock(&self.kernel.park());
    }

    fn is_any_aside(&self) -> bool {
        self.service.waiting.load(Ordering::SeqCst) != 0
    }

    /// Lets those fault again who met a change that is over. The message about it is no sign of that: the kernel
    /// refuses operations for a while longer, until the thread that made the change has seen the answer.
    fn retry_aside(&self) {
        if self.is_any_aside() && !self.kernel.is_changing() {
            for va in self.take_aside() {
                self.send_back(va);
            }
        }
    }

    fn take_aside(&self) -> ArrayVec<Va, PUT_ASIDE> {
        let _work = self.contexts.take();
        let mut aside = self.service.aside.lock();
        self.service.waiting.store(0, Ordering::SeqCst);
        std::mem::take(&mut *aside)
    }

    /// Ends a fault, or puts it aside if it has to wait for a change of mappings to be over.
    fn conclude(&self, va: Va, outcome: Result<Outcome, Pause>) {
        match outcome {
            Ok(Outcome::Resolved | Outcome::Poisoned) => {}
            // To fail one access without losing the page is not possible here: it tries again, and goes on when the kernel
            // has memory again, while this thread serves others.
            Ok(Outcome::Refused) => self.send_back(va),
            // Registered with us but no region: nothing of it can ever have been evicted.
            Ok(Outcome::Foreign) => {
                let page = PageRange::new(self.geometry.vpn(va), Pages(1));
                let _ = self.kernel.zero_in(self.addresses(page), Protect::No, Wake::Yes);
                self.send_back(va);
            }
            Err(_) => {
                let full = {
                    let _work = self.contexts.take();
                    let mut aside = self.service.aside.lock();
                    let full = aside.try_push(va).is_err();
                    self.service.waiting.store(aside.len(), Ordering::SeqCst);
                    full
                };
                if full {
                    self.send_back(va);
                }
            }
        }
    }

    /// Lets a thread that waits for `va` fault again.
    pub(crate) fn send_back(&self, va: Va) {
        let _ = self.kernel.wake(self.addresses(PageRange::new(self.geometry.vpn(va), Pages(1))));
    }
}
