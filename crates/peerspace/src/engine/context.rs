//! What a thread needs while it works in the engine: a buffer, counters, and the flag of its section.
//!
//! A fault may strike any thread at any moment, so nothing can be allocated for it and thread-local storage is
//! out of reach. Contexts are made beforehand; a thread takes a free one, preferring the one of the processor it
//! runs on, whose cache lines are near. There are more than processors, since a thread that waits for a disk
//! keeps its own.

use crate::engine::stats::{Counters, Histogram};
use crate::sync::{Mutex, MutexGuard, Padded};
use peerspace_core::sync::{AtomicU32, spin_hint};
use peerspace_os::own::{Own, Vec};
use std::ops::{Deref, DerefMut};

/// One of the places to work at.
#[derive(Debug)]
pub(crate) struct Context {
    /// 1 while its holder is in a section of the [gate](crate::engine::gate).
    pub(crate) section: AtomicU32,
    pub(crate) counters: Counters,
    pub(crate) latency: Histogram,
    buffer: Mutex<peerspace_os::own::Buffer>,
}

/// All contexts. One more, the last, belongs to the thread that receives changes: it must never wait for others.
#[derive(Debug)]
pub(crate) struct Contexts {
    all: Vec<Slot>,
}

#[derive(Debug)]
pub(crate) struct Slot(Padded<Context>);

impl AsRef<Context> for Slot {
    fn as_ref(&self) -> &Context {
        &self.0.0
    }
}

/// A context that is ours until this is dropped.
pub(crate) struct Working<'a> {
    context: &'a Context,
    buffer: MutexGuard<'a, peerspace_os::own::Buffer>,
}

impl Contexts {
    /// `n` contexts with buffers of `bytes` bytes.
    pub(crate) fn new(n: usize, bytes: usize) -> Result<Contexts, peerspace_os::Trouble> {
        let mut all = Vec::with_capacity_in(n + 1, Own);
        for _ in 0..=n {
            all.push(Slot(Padded(Context {
                section: AtomicU32::new(0),
                counters: Counters::default(),
                latency: Histogram::default(),
                buffer: Mutex::new(peerspace_os::own::Buffer::new(bytes)?),
            })));
        }
        Ok(Contexts { all })
    }

    pub(crate) fn all(&self) -> &[Slot] {
        &self.all
    }

    /// The context of the thread that receives changes.
    pub(crate) fn receiver(&self) -> &Context {
        self.all[self.all.len() - 1].as_ref()
    }

    /// Takes a free context; waits for one if all are taken.
    pub(crate) fn take(&self) -> Working<'_> {
        let n = self.all.len() - 1;
        let first = crate::engine::cpu() % n;
        loop {
            for i in 0..n {
                let context = self.all[(first + i) % n].as_ref();
                if let Some(buffer) = context.buffer.try_lock() {
                    return Working { context, buffer };
                }
            }
            spin_hint();
        }
    }
}

/// All contexts at once: nobody else works in the engine while this lives.
pub(crate) struct AllContexts<'a> {
    _all: Vec<MutexGuard<'a, peerspace_os::own::Buffer>>,
}

impl Contexts {
    /// Waits until nobody works in the engine, and keeps everybody out.
    pub(crate) fn take_all(&self) -> AllContexts<'_> {
        let mut all = Vec::with_capacity_in(self.all.len(), Own);
        for slot in &self.all {
            all.push(slot.as_ref().buffer.lock());
        }
        AllContexts { _all: all }
    }
}

impl<'a> Working<'a> {
    pub(crate) fn context(&self) -> &'a Context {
        self.context
    }

    /// The buffer, aligned to a page.
    pub(crate) fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    /// The context and its buffer, to use both at once.
    pub(crate) fn parts(&mut self) -> (&'a Context, &mut [u8]) {
        (self.context, self.buffer.deref_mut())
    }
}

impl Deref for Working<'_> {
    type Target = Context;
    fn deref(&self) -> &Context {
        self.context
    }
}
