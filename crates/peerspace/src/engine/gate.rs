//! The gate between the program's changes to its mappings and the engine's use of them.
//!
//! When the program unmaps, moves or discards memory, the kernel lets it go on as soon as the message about it
//! is *received*, not when it was acted on. From that moment the addresses may mean something else. So:
//!
//! - Whoever is about to touch region memory by a system call does it in a *section*, a few microseconds long,
//!   in which nothing waits for anything. A section can be entered only while the gate is open, and only with
//!   the table entry locked that it acts on.
//! - Whoever receives messages closes the gate first, waits until all sections are over, receives, acts on the
//!   message (which needs the locks of the entries it is about), and opens the gate.
//! - Whoever finds the gate closed lets go of every entry, waits, and plans again from the table.
//!
//! A receiver does not know beforehand whether it will receive a change or a fault. Until it knows, it holds no
//! lock and wants none, so whoever is about to enter waits for it in place; only when it turns out to be a change
//! ([`Gate::hold`]) does the gate turn them away.
//!
//! While a change is announced but not received, the kernel itself refuses operations on region memory
//! ([`Trouble::Changing`](peerspace_os::Trouble::Changing)); while it is received but not acted on, the gate
//! does. So no operation ever acts on a mapping that the table does not describe.
//!
//! Orderings: entering stores the section's flag, then loads the gate; closing stores the gate, then loads the
//! flags. Both pairs are separated by a sequentially consistent fence, so at least one side sees the other
//! (Dekker). Leaving is a Release that the closer acquires.
//!
//! # Who waits
//!
//! A fault that meets a change waits, where faults come by signal, or is put aside, where threads receive, and tried again when
//! the change is over. Threads that receive never wait for anything that only a receiver can bring about, and reclaim that a
//! change stops says so instead of trying on.

use crate::engine::context::Context;
use peerspace_core::sync::{AtomicU64, Ordering, Park, fence, spin_hint};

/// Bits 0 and 1: the state. The rest counts openings, so that a waiter sees that something happened.
#[derive(Debug)]
pub(crate) struct Gate {
    word: AtomicU64,
}

const STATE: u64 = 3;
/// Somebody receives a message, and will soon know which.
const PEEKING: u64 = 1;
/// A change is being acted on.
const CLOSED: u64 = 2;
/// Somebody waits for the gate to open.
const AWAITED: u64 = 4;
const TURN: u64 = 8;
/// How often to look, in a few microseconds, before the processor is left to others.
const SPINS: u32 = 200;

/// Waits for what is over in a few microseconds, unless the thread that is to bring it about has lost its processor: this may be
/// the one that it needs.
fn wait_a_little(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS {
        spin_hint();
    } else {
        crate::sync::yield_now();
    }
}

/// The right to touch region memory; leaves the section when dropped.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    context: &'a Context,
}

impl Gate {
    pub(crate) fn new() -> Gate {
        Gate { word: AtomicU64::new(0) }
    }

    /// Enters a section, unless a change is being acted on.
    pub(crate) fn enter<'a>(&self, context: &'a Context) -> Option<Section<'a>> {
        let mut spins = 0;
        loop {
            context.section.store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let section = Section { context };
            // Acquire: what was done to the table before the gate opened is seen.
            match self.word.load(Ordering::Acquire) & STATE {
                0 => return Some(section),
                PEEKING => {
                    drop(section);
                    wait_a_little(&mut spins);
                }
                _ => return None,
            }
        }
    }

    /// Begins to receive: waits until every section is over, and lets nobody enter. One receiver at a time; the
    /// caller sees to it.
    pub(crate) fn peek(&self, contexts: &[impl AsRef<Context>]) {
        let before = self.word.fetch_or(PEEKING, Ordering::Relaxed);
        debug_assert!(before & STATE == 0, "two receivers");
        fence(Ordering::SeqCst);
        for context in contexts {
            let mut spins = 0;
            while context.as_ref().section.load(Ordering::Acquire) != 0 {
                wait_a_little(&mut spins);
            }
        }
    }

    /// It is a change: turns away whoever wants to enter until the gate [opens](Gate::open).
    pub(crate) fn hold(&self) {
        // Adding one turns PEEKING into CLOSED.
        self.word.fetch_add(CLOSED - PEEKING, Ordering::Relaxed);
    }

    /// Opens the gate.
    pub(crate) fn open(&self, park: &impl Park) {
        let mut seen = self.word.load(Ordering::Relaxed);
        loop {
            let turn = if seen & STATE == CLOSED { TURN } else { 0 };
            let new = (seen & !(STATE | AWAITED)) + turn;
            // Release: pairs with the Acquire in enter.
            match self.word.compare_exchange_weak(seen, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) if seen & AWAITED != 0 => return park.wake(&self.word),
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Open, whatever it was: in a forked child, where nobody receives anything yet.
    pub(crate) fn renew(&self) {
        self.word.store(0, Ordering::Release);
    }

    /// A number that changes when a change has been acted on.
    pub(crate) fn turn(&self) -> u64 {
        self.word.load(Ordering::Acquire) / TURN
    }

    /// The [turn](Gate::turn), unless a change is being acted on; waits for a receiver to find out what it receives.
    pub(crate) fn turn_if_open(&self) -> Option<u64> {
        loop {
            let word = self.word.load(Ordering::Acquire);
            match word & STATE {
                0 => return Some(word / TURN),
                PEEKING => crate::sync::yield_now(),
                _ => return None,
            }
        }
    }

    /// Nobody receives anything just now.
    #[cfg(feature = "devices")]
    pub(crate) fn is_idle(&self) -> bool {
        self.word.load(Ordering::SeqCst) & STATE == 0
    }

    /// Waits until no change is being acted on.
    pub(crate) fn wait_open(&self, park: &impl Park) {
        loop {
            let seen = self.word.load(Ordering::Acquire);
            if seen & STATE != CLOSED {
                return;
            }
            let awaited = seen | AWAITED;
            if seen == awaited
                || self.word.compare_exchange(seen, awaited, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            {
                park.wait(&self.word, awaited);
            }
        }
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in peek.
        self.context.section.store(0, Ordering::Release);
    }
}
