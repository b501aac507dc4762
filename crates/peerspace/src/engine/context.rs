//! What a thread needs while it works in the engine: a buffer, counters, and the flag of its section.
//!
//! A fault may strike any thread at any moment, so nothing can be allocated for it and thread-local storage is
//! out of reach. Contexts are made beforehand; a thread takes a free one, preferring the one of the processor it
//! runs on, whose cache lines are near. There are more than processors, since a thread that waits for a disk
//! keeps its own.

use crate::engine::stats::{Counters, Histogram};
use crate::sync::{Mutex, MutexGuard, Padded};
use peerspace_core::sync::{AtomicU32, Ordering, fence, spin_hint};
use peerspace_os::own::{Buffer, Own, Vec};
use std::ops::{Deref, DerefMut};

/// Looks for a free context before the processor is given to others.
const SPINS: u32 = 64;

/// One of the places to work at.
#[derive(Debug)]
pub(crate) struct Context {
    /// 1 while its holder is in a section of the [gate](crate::engine::gate).
    pub(crate) section: AtomicU32,
    /// Odd while its holder accesses memory of the host for a device: see [`mmus`](crate::engine::mmus).
    pub(crate) remote: AtomicU32,
    pub(crate) under_way: super::watch::UnderWay,
    pub(crate) counters: Counters,
    pub(crate) latency: Histogram,
    /// 1 while somebody works here, or is about to find out that nobody may.
    taken: AtomicU32,
    /// Locked by whoever has taken the context.
    buffer: Mutex<Buffer>,
}

/// All contexts. One more, the last, belongs to the thread that receives changes: it must never wait for others.
///
/// Every lock of the engine other than those of table entries is only ever taken by somebody who has a context.
/// So when all contexts are free and [frozen](Contexts::freeze), all of the engine's state is at rest.
#[derive(Debug)]
pub(crate) struct Contexts {
    all: Vec<Slot>,
    /// How many want nobody to work.
    frozen: AtomicU32,
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
    /// None only while it is being dropped.
    buffer: Option<MutexGuard<'a, Buffer>>,
}

impl Contexts {
    /// `n` contexts with buffers of `bytes` bytes.
    pub(crate) fn new(n: usize, bytes: usize) -> Result<Contexts, peerspace_os::Trouble> {
        let mut all = Vec::with_capacity_in(n + 1, Own);
        for _ in 0..=n {
            all.push(Slot(Padded(Context {
                section: AtomicU32::new(0),
                remote: AtomicU32::new(0),
                under_way: super::watch::UnderWay::new(),
                counters: Counters::default(),
                latency: Histogram::default(),
                taken: AtomicU32::new(0),
                buffer: Mutex::new(Buffer::new(bytes)?),
            })));
        }
        Ok(Contexts { all, frozen: AtomicU32::new(0) })
    }

    pub(crate) fn all(&self) -> &[Slot] {
        &self.all
    }

    /// Takes context `i` if it is free and nothing is frozen.
    fn try_take(&self, i: usize) -> Option<Working<'_>> {
        let context = self.all[i].as_ref();
        // Acquire: pairs with the Release of whoever had it before.
        context.taken.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok()?;
        // Pairs with the fence in freeze: either we see that it is frozen, or the freezer sees it taken.
        fence(Ordering::SeqCst);
        if self.frozen.load(Ordering::Relaxed) != 0 {
            context.taken.store(0, Ordering::Release);
            return None;
        }
        Some(Working { context, buffer: Some(context.buffer.lock()) })
    }

    /// Takes the context of the thread that receives changes.
    pub(crate) fn receiver(&self) -> Working<'_> {
        loop {
            if let Some(work) = self.try_take(self.all.len() - 1) {
                return work;
            }
            self.pause();
        }
    }

    /// Takes a free context; waits for one if all are taken.
    pub(crate) fn take(&self) -> Working<'_> {
        // The threads of devices may be many more than there are contexts, or processors.
        for _ in 0..SPINS {
            if let Some(work) = self.take_if_any() {
                return work;
            }
            self.pause();
        }
        loop {
            crate::sync::yield_now();
            if let Some(work) = self.take_if_any() {
                return work;
            }
        }
    }

    /// Takes a context, if one is free.
    pub(crate) fn take_if_any(&self) -> Option<Working<'_>> {
        let n = self.all.len() - 1;
        let first = crate::engine::cpu() % n;
        (0..n).find_map(|i| self.try_take((first + i) % n))
    }

    fn pause(&self) {
        if self.frozen.load(Ordering::Relaxed) == 0 {
            spin_hint();
        } else {
            // That takes as long as a fork, or a walk of everything.
            crate::sync::yield_now();
        }
    }

    /// Keeps everybody from working in the engine until [`thaw`](Contexts::thaw), and waits until nobody does. The
    /// caller has no context.
    pub(crate) fn freeze(&self) {
        self.frozen.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for slot in &self.all {
            // Acquire: pairs with the Release of whoever works there.
            while slot.as_ref().taken.load(Ordering::Acquire) != 0 {
                crate::sync::yield_now();
            }
        }
    }

    /// In a forked child, at rest: nobody works. A thread of the parent that was about to find out that everything is
    /// frozen may have had a context in hand for that moment, and does not exist here.
    pub(crate) fn renew(&self) {
        for slot in &self.all {
            let Context { taken, section, remote, .. } = slot.as_ref();
            // Only pages that are written to are copied for the child.
            let set = [taken, section, remote].into_iter().filter(|word| word.load(Ordering::Relaxed) != 0);
            set.for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }

    /// Undoes [`freeze`](Contexts::freeze).
    pub(crate) fn thaw(&self) {
        self.frozen.fetch_sub(1, Ordering::Release);
    }
}

impl<'a> Working<'a> {
    pub(crate) fn context(&self) -> &'a Context {
        self.context
    }

    /// The context and its buffer, which is aligned to a page, to use both at once.
    pub(crate) fn parts(&mut self) -> (&'a Context, &mut [u8]) {
        (self.context, self.buffer.as_mut().expect("there until it is dropped").deref_mut())
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        // The buffer first, so that it is free when somebody else has the context.
        self.buffer = None;
        self.context.taken.store(0, Ordering::Release);
    }
}

impl Deref for Working<'_> {
    type Target = Context;
    fn deref(&self) -> &Context {
        self.context
    }
}
