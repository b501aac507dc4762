//! The turn: one thread at a time changes what is [in place](super::inplace), forks, detaches, opens a region that has a name,
//! or walks over everything.
//!
//! It comes before all other locks (`engine/mod.rs`): whoever waits for it has no context, no entry, and nothing to receive
//! that others wait for.

use super::Engine;
use peerspace_core::sync::{Latch, Park};
use peerspace_os::Kernel;

/// The right to put memory in place and to take it away. Given up when dropped.
#[must_use = "the turn is over when this is dropped"]
pub(crate) struct Turn<'a, P: Park> {
    latch: &'a Latch,
    park: P,
}

impl<P: Park> Turn<'_, P> {
    /// Keeps it until somebody [gives it up](Engine::give_up_turn).
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl<P: Park> Drop for Turn<'_, P> {
    fn drop(&mut self) {
        self.latch.unlock(&self.park);
    }
}

impl<K: Kernel> Engine<K> {
    /// Waits for the turn. Not for threads that receive messages, nor with a context or an entry in hand.
    pub(crate) fn take_turn(&self) -> Turn<'_, K::Park> {
        let park = self.kernel.park();
        self.turn.lock(&park);
        Turn { latch: &self.turn, park }
    }

    /// Gives up a turn that was [kept](Turn::keep).
    pub(crate) fn give_up_turn(&self) {
        self.turn.unlock(&self.kernel.park());
    }
}
