//! Where threads run: a thread that serves faults beside the threads it serves.
//!
//! A thread that faults sleeps until a handler has woken it, and the handler sleeps until a thread faults. On two
//! processors each of these wake-ups goes to a processor that has nothing to do: an interrupt, and the end of an idle
//! state, which takes a few microseconds on bare metal and tens of them on some virtual machines. On one processor
//! both are switches between two threads.
//!
//! The scheduler, asked to wake a thread, prefers an idle processor to the one at hand. So the handler stays on one
//! processor, and restricts the thread it is about to wake to the same one, only until it is awake: the thread itself
//! waits for its page meanwhile and cannot notice. Where that pays is found out by trying: for some faults it is done,
//! for some it is not, and what brought the next fault sooner is kept for a while. Where faults are rare nothing is
//! done at all.
//!
//! A thread that is awake before the handler could lift the restriction must not hand it on to threads and processes that
//! it starts: before it starts one, it waits until it is [unrestricted](settle). Only what is started past the C library
//! escapes that.

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity, sched_yield};
use std::sync::atomic::{
    AtomicI32,
    Ordering::{Relaxed, SeqCst},
};
use std::time::{Duration, Instant};

/// Faults of one trial.
const TRIAL: u32 = 128;
/// Faults for which the outcome of a trial is relied on: at first, and at most when it is the same each time.
const KEEP: u32 = 4 * 1024;
const KEEP_MOST: u32 = 128 * 1024;
/// Faults that are further apart than this on average are too rare to matter.
const RARE: Duration = Duration::from_micros(200);
/// A longer gap is counted as this: the program did something else.
const PAUSE: Duration = Duration::from_micros(400);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Trying without.
    Apart,
    /// Trying with, after it took so many nanoseconds without.
    Together { apart: u64 },
    /// Tried.
    Decided { together: bool },
}

/// What one handler knows about where it should run.
#[derive(Debug)]
pub struct Placement {
    phase: Phase,
    left: u32,
    spent: u64,
    last: Option<Instant>,
    /// What came of the last trials, and how long that holds.
    outcome: (bool, u32),
    /// Where the handler stays, and where it could run before.
    home: Option<(usize, CpuSet)>,
    /// It is not allowed, or there is only one processor.
    off: bool,
}

/// Threads that are restricted at this moment; 0 is a free place. With more handlers than places, some go without.
static RESTRICTED: [AtomicI32; 64] = [const { AtomicI32::new(0) }; 64];

/// The thread that is being served, and where it may run otherwise.
#[derive(Debug)]
pub struct Beside {
    thread: Pid,
    mask: CpuSet,
    place: &'static AtomicI32,
}

impl Beside {
    /// Restricts `thread`, which sleeps, to the processor `home`, if it may run there and elsewhere.
    fn new(thread: Pid, home: usize) -> Option<Beside> {
        let mask = sched_getaffinity(Some(thread)).ok().filter(|m| m.is_set(home) && m.count() > 1)?;
        let id = thread.as_raw_nonzero().get();
        // SeqCst: the thread, when it runs again, sees the place taken until it is unrestricted; see `settle`.
        let place = RESTRICTED.iter().find(|p| p.compare_exchange(0, id, SeqCst, Relaxed).is_ok())?;
        let beside = Beside { thread, mask, place };
        sched_setaffinity(Some(thread), &only(home)).ok()?;
        Some(beside)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended.
        let _ = sched_setaffinity(Some(self.thread), &self.mask);
        self.place.store(0, SeqCst);
    }
}

/// Waits until no handler restricts where the calling thread runs: for who is about to start a thread or a process, which
/// would inherit that. May be called anywhere, and costs no system call unless some thread is restricted.
pub fn settle() {
    let mut me = None;
    for place in &RESTRICTED {
        loop {
            let restricted = place.load(SeqCst);
            if restricted == 0 || restricted != *me.get_or_insert_with(|| gettid().as_raw_nonzero().get()) {
                break;
            }
            sched_yield();
        }
    }
}

/// In a forked child: nobody serves anybody.
pub(super) fn renew() {
    RESTRICTED.iter().for_each(|p| p.store(0, SeqCst));
}

impl Default for Placement {
    fn default() -> Self {
        Placement::new()
    }
}

impl Placement {
    /// Of a handler that has served nobody yet.
    pub fn new() -> Placement {
        Placement {
            phase: Phase::Apart,
            left: TRIAL,
            spent: 0,
            last: None,
            outcome: (false, KEEP),
            home: None,
            off: false,
        }
    }

    /// A fault of `thread` has arrived. While the result lives, waking it keeps it on this processor, if that pays.
    pub fn serve(&mut self, thread: u32) -> Option<Beside> {
        if self.off {
            return None;
        }
        let now = Instant::now();
        let gap = self.last.replace(now).map_or(PAUSE, |last| now - last).min(PAUSE);
        if self.note(gap) { self.stay_beside(thread) } else { None }
    }

    /// Whether to run together with the thread whose fault came `gap` after the one before.
    fn note(&mut self, gap: Duration) -> bool {
        self.spent += gap.as_nanos() as u64;
        self.left -= 1;
        if self.left > 0 {
            return match self.phase {
                Phase::Apart => false,
                Phase::Together { .. } => true,
                Phase::Decided { together } => together,
            };
        }
        let spent = std::mem::take(&mut self.spent);
        let rare = spent > RARE.as_nanos() as u64 * TRIAL as u64;
        (self.phase, self.left) = match self.phase {
            // Nothing to gain.
            Phase::Apart if rare => (Phase::Apart, TRIAL),
            Phase::Apart => (Phase::Together { apart: spent }, TRIAL),
            Phase::Together { apart } => {
                let together = spent < apart - apart / 8;
                let keep = if together == self.outcome.0 { (self.outcome.1 * 2).min(KEEP_MOST) } else { KEEP };
                self.outcome = (together, keep);
                (Phase::Decided { together }, keep)
            }
            Phase::Decided { .. } => (Phase::Apart, TRIAL),
        };
        // Each trial finds its place anew.
        self.leave_home();
        false
    }

    fn stay_beside(&mut self, thread: u32) -> Option<Beside> {
        let thread = Pid::from_raw(thread as i32)?;
        let home = match &self.home {
            Some((home, _)) => *home,
            None => self.settle()?,
        };
        Beside::new(thread, home)
    }

    /// Stays on the processor it is on.
    fn settle(&mut self) -> Option<usize> {
        let here = sched_getcpu();
        let settled = sched_getaffinity(None).ok().filter(|m| m.count() > 1 && here < CpuSet::MAX_CPU);
        let settled = settled.filter(|_| sched_setaffinity(None, &only(here)).is_ok());
        self.off = settled.is_none();
        self.home = Some((here, settled?));
        Some(here)
    }

    fn leave_home(&mut self) {
        if let Some((_, mask)) = self.home.take() {
            let _ = sched_setaffinity(None, &mask);
        }
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        self.leave_home();
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_micros(5);
    const SLOW: Duration = Duration::from_micros(20);

    /// Feeds faults whose gaps depend on whether the handler runs together with the thread; returns for how many of
    /// the last thousand it did.
    fn run(together: Duration, apart: Duration) -> usize {
        let mut placement = Placement::new();
        let mut now = false;
        let mut did = 0;
        for i in 0..20_000 {
            now = placement.note(if now { together } else { apart });
            did += (now && (2_000..3_000).contains(&i)) as usize;
        }
        did
    }

    #[test]
    fn what_is_faster_is_kept() {
        assert_eq!(run(FAST, SLOW), 1000);
        assert_eq!(run(SLOW, FAST), 0);
        // Hardly faster is not worth it.
        assert_eq!(run(FAST, FAST), 0);
    }

    #[test]
    fn rare_faults_are_left_alone() {
        let mut placement = Placement::new();
        assert!((0..10_000).all(|_| !placement.note(PAUSE)));
    }

    #[test]
    fn a_thread_is_kept_only_as_long_as_it_is_served() {
        let mask = sched_getaffinity(None).unwrap();
        if mask.count() < 2 {
            return;
        }
        let mut placement = Placement::new();
        let (tell, told) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            tell.send(gettid()).unwrap();
            gone.recv().unwrap();
            settle();
            sched_getaffinity(None).unwrap()
        });
        let thread = told.recv().unwrap();
        let beside = placement.stay_beside(thread.as_raw_nonzero().get() as u32).unwrap();
        let here = sched_getaffinity(None).unwrap();
        assert_eq!((here.count(), sched_getaffinity(Some(thread)).unwrap()), (1, here));
        // It runs already, and settles before it looks.
        go.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        drop(beside);
        assert_eq!(other.join().unwrap(), mask);
        drop(placement);
        assert_eq!(sched_getaffinity(None).unwrap(), mask);
        settle();
    }
}
