//! The queue of kernels, the lanes that run it, and the jobs by which their launchers wait.
//!
//! Kernels run in the order of their launch. The one in front is cut into runs of items, which lanes take one after the other;
//! when none is left and no lane is at one any more, it goes, and the next is in front. Each lane takes the queue's lock
//! once for each run, and sleeps on its bell when there is nothing to take.
//!
//! A [`Work`] is finished by being dropped: whoever lets go of it last drops the kernel with everything it has captured, and
//! tells whoever waits. So nobody waits for ever, whatever becomes of a queue. It is always a lane that does so, because
//! the handle of a device may be dropped where nothing of a program's may run.

use super::core::Core;
use super::error::{KernelError, LaunchError};
use super::lane::Lane;
use peerspace_os::linux::futex::{Mutex, wait_word, wake_word};
use peerspace_os::linux::signal::with_sigbus;
use peerspace_os::own::{Box, Own, Shared, Vec};
use rustix::process::Pid;
use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a program has launched.
pub(super) type Kernel = Box<dyn Fn(&Lane, Range<u64>) -> Result<(), KernelError> + Send + Sync>;

/// Runs that a lane takes of a kernel, if all are equally fast.
const RUNS: u64 = 8;

thread_local! {
    /// The device whose lane this thread is, by its address; 0: none.
    static DEVICE: Cell<usize> = const { Cell::new(0) };
}

/// A kernel in the queue.
struct Work {
    kernel: Option<Kernel>,
    items: u64,
    run: u64,
    /// The first item that no lane has taken.
    next: AtomicU64,
    /// Items that were run to their end.
    done: AtomicU64,
    outcome: Shared<Outcome>,
}

impl Work {
    /// The next run, for one lane.
    fn take(&self) -> Option<Range<u64>> {
        // Under the lock of the queue, but for `cancel`, which only moves it to the end.
        let start = self.next.load(Ordering::Relaxed).min(self.items);
        let end = start.saturating_add(self.run).min(self.items);
        let taken = self.next.compare_exchange(start, end, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        (taken && start < end).then_some(start..end)
    }

    fn cancel(&self) {
        self.next.store(self.items, Ordering::Relaxed);
    }

    fn run(&self, lane: &Lane, items: Range<u64>) {
        let count = items.end - items.start;
        let Some(kernel) = &self.kernel else { return };
        let result = catch_unwind(AssertUnwindSafe(|| kernel(lane, items)))
            .unwrap_or_else(|panic| Err(KernelError::Panicked(message(panic))));
        match result {
            Ok(()) => {
                self.done.fetch_add(count, Ordering::Relaxed);
            }
            Err(e) => {
                self.outcome.fail(e);
                self.cancel();
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What a kernel has captured may panic when it is dropped, which is the kernel's failure.
        let kernel = self.kernel.take();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(kernel))) {
            self.outcome.fail(KernelError::Panicked(message(panic)));
        }
        if *self.done.get_mut() < self.items {
            // Unless there is a reason already.
            self.outcome.fail(KernelError::Stopped);
        }
        self.outcome.finish();
    }
}

/// What a panic says.
fn message(panic: std::boxed::Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    // Whatever it is may panic as well when it is dropped.
    if catch_unwind(AssertUnwindSafe(|| drop(panic))).is_err() {
        return "with something that panics itself".into();
    }
    text.unwrap_or_else(|| "without a message".into())
}

/// What becomes of a kernel.
#[derive(Default)]
struct Outcome {
    /// 1 when it has ended.
    ended: AtomicU32,
    error: std::sync::Mutex<Option<KernelError>>,
}

impl Outcome {
    fn error(&self) -> std::sync::MutexGuard<'_, Option<KernelError>> {
        self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn fail(&self, error: KernelError) {
        self.error().get_or_insert(error);
    }

    fn finish(&self) {
        // Release: pairs with the Acquire in `has_ended`, so what the kernel did is seen.
        self.ended.store(1, Ordering::Release);
        wake_word(&self.ended, u32::MAX);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) == 1
    }
}

/// A kernel that was launched. Dropping this does not stop it.
pub struct Job {
    outcome: Shared<Outcome>,
    device: usize,
    process: Pid,
}

impl Job {
    /// Whether it has ended, well or not.
    pub fn is_done(&self) -> bool {
        self.outcome.has_ended()
    }

    /// Waits until the kernel has ended, and everything that it captured was dropped.
    ///
    /// # Errors
    /// The first that a lane met; [`KernelError::Stopped`] when the device was given up before; and, without waiting,
    /// [`KernelError::WaitsForItself`] on a lane of the same device, and [`KernelError::Forked`] in a forked process.
    pub fn wait(&self) -> Result<(), KernelError> {
        self.wait_until(None).unwrap_or(Ok(()))
    }

    /// The same for at most `timeout`; `None` when the kernel has not ended by then.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<(), KernelError>> {
        // A time too far away to be said is none.
        self.wait_until(Instant::now().checked_add(timeout))
    }

    fn wait_until(&self, end: Option<Instant>) -> Option<Result<(), KernelError>> {
        while !self.is_done() {
            if rustix::process::getpid() != self.process {
                return Some(Err(KernelError::Forked));
            }
            if DEVICE.get() == self.device {
                return Some(Err(KernelError::WaitsForItself));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            wait_word(&self.outcome.ended, 0, left);
        }
        Some(self.outcome.error().clone().map_or(Ok(()), Err))
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("is_done", &self.is_done()).finish_non_exhaustive()
    }
}

struct State {
    /// In the order of their launch.
    works: Vec<Shared<Work>>,
    /// Lanes that are at a run of the first.
    at_work: usize,
    /// Lanes there are.
    started: usize,
    closed: bool,
}

/// The queue of a device.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Changes when there may be something to do.
    bell: AtomicU32,
}

impl Queue {
    pub(super) fn new() -> Queue {
        let state = State { works: Vec::new_in(Own), at_work: 0, started: 0, closed: false };
        Queue { state: Mutex::new(state), bell: AtomicU32::new(0) }
    }

    fn ring(&self) {
        // Release: pairs with the Acquire of whoever reads it before looking at the state.
        self.bell.fetch_add(1, Ordering::Release);
        wake_word(&self.bell, u32::MAX);
    }

    /// Starts the lanes that there are not yet.
    pub(super) fn start(
        &self,
        lanes: usize,
        mut spawn: impl FnMut(usize) -> io::Result<()>,
    ) -> Result<(), LaunchError> {
        let mut state = self.state.lock();
        while state.started < lanes {
            spawn(state.started).map_err(|e| LaunchError::Threads(e.raw_os_error().unwrap_or(0)))?;
            state.started += 1;
        }
        Ok(())
    }

    /// Puts a kernel at the end.
    pub(super) fn push(&self, core: &Core, items: u64, kernel: Kernel) -> Job {
        let outcome = Shared::new(Outcome::default());
        let work = Work {
            kernel: Some(kernel),
            items,
            run: items.div_ceil(core.lanes.len() as u64 * RUNS).max(1),
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            outcome: outcome.clone(),
        };
        self.state.lock().works.push(Shared::new(work));
        self.ring();
        Job { outcome, device: std::ptr::from_ref(core).addr(), process: rustix::process::getpid() }
    }

    /// No more kernels: those that have not begun are dropped, by the lanes, which end then.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.ring();
    }

    /// Waits for a run to take. `None` when the queue is closed, and nothing is left of it.
    fn next(&self) -> Option<(Shared<Work>, Range<u64>)> {
        loop {
            // Acquire: pairs with the Release in `ring`.
            let seen = self.bell.load(Ordering::Acquire);
            let mut state = self.state.lock();
            let closed = state.closed;
            let Some(first) = state.works.first().cloned() else {
                drop(state);
                if closed {
                    return None;
                }
                wait_word(&self.bell, seen, None);
                continue;
            };
            let begun = state.at_work > 0 || first.next.load(Ordering::Relaxed) > 0;
            if closed && !begun {
                first.cancel();
            }
            if let Some(items) = first.take() {
                state.at_work += 1;
                return Some((first, items));
            }
            if state.at_work == 0 {
                let ended = state.works.remove(0);
                drop(state);
                // The others may have been waiting for this one to go.
                self.ring();
                // In this order: the last reference finishes it.
                drop(first);
                drop(ended);
                continue;
            }
            drop(state);
            drop(first);
            wait_word(&self.bell, seen, None);
        }
    }

    /// A lane is through with a run.
    fn ran(&self, work: Shared<Work>) {
        // Before it counts as through: whoever takes the work from the queue has the last reference then.
        drop(work);
        let mut state = self.state.lock();
        state.at_work -= 1;
        let last = state.at_work == 0;
        drop(state);
        if last {
            self.ring();
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

/// What the thread of lane `index` does.
pub(super) fn run_lane(core: Shared<Core>, index: usize) {
    DEVICE.set(std::ptr::from_ref::<Core>(&core).addr());
    let mut lane = Lane::new(core.clone(), index);
    // A kernel may touch what the program has captured for it, which may be managed memory.
    with_sigbus(|| {
        while let Some((work, items)) = core.queue.next() {
            lane.begin();
            work.run(&lane, items);
            lane.end();
            core.queue.ran(work);
        }
    });
}
