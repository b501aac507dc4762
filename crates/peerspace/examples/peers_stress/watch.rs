//! Threads that are watched: whoever finds something wrong ends the work of all, and where nothing moves any more the process
//! says so and ends.
//!
//! What is wrong in memory that others wait for may have them wait for ever; so that is the end of waiting too, whether they
//! are at work or on their way to stop. What is said then goes to standard error itself, past a test harness that keeps what
//! is printed and would be gone before it shows it.

use super::world::World;
use peerspace::Faults;
use std::any::Any;
use std::collections::BTreeSet;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// How long nothing may move.
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(20);

/// What a thread does, and its name.
pub(super) type Work<'w> = (String, Box<dyn FnOnce() + Send + 'w>);

/// Watches the threads of one world.
pub(super) struct Watch<'w> {
    world: &'w World,
    faults: Faults,
    seed: u64,
    begin: Instant,
    /// Who is at work.
    running: Mutex<BTreeSet<String>>,
    /// Who found something wrong, and what.
    wrong: Mutex<Vec<String>>,
}

impl<'w> Watch<'w> {
    pub(super) fn new(world: &'w World, faults: Faults, seed: u64) -> Watch<'w> {
        let (running, wrong) = Default::default();
        Watch { world, faults, seed, begin: Instant::now(), running, wrong }
    }

    /// Does all of `works` until they have ended. Now and then `meanwhile` is told how long that has taken yet; when it says so
    /// they are told to end. Panics if one of them found something wrong.
    pub(super) fn run(&self, works: Vec<Work<'_>>, mut meanwhile: impl FnMut(Duration) -> bool) {
        self.running.lock().expect("unharmed").extend(works.iter().map(|(name, _)| name.clone()));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for (name, work) in works {
                scope.spawn(move || self.work(name, work));
            }
            let (mut told, mut moved, mut seen) = (Instant::now(), Instant::now(), self.seen());
            while seen.1 > 0 {
                std::thread::sleep(TICK);
                let now = self.seen();
                if now != seen {
                    (seen, moved) = (now, Instant::now());
                } else if moved.elapsed() > PATIENCE {
                    self.give_up();
                }
                if told.elapsed() > Duration::from_secs(5) {
                    told = Instant::now();
                    println!("{}", self.so_far());
                }
                if meanwhile(begin.elapsed()) {
                    self.world.stop.store(true, SeqCst);
                }
            }
        });
        let wrong = self.wrong.lock().expect("unharmed");
        assert!(wrong.is_empty(), "seed {}: {}", self.seed, wrong.join("; "));
    }

    /// Where things stand: what changes as long as anything moves.
    fn seen(&self) -> (u64, usize) {
        (self.world.steps.load(SeqCst), self.running.lock().expect("unharmed").len())
    }

    fn work(&self, name: String, work: Box<dyn FnOnce() + Send + '_>) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let mut wrong = self.wrong.lock().expect("unharmed");
            wrong.push(format!("{name} found something wrong: {}", said(&*panic)));
            self.world.stop.store(true, SeqCst);
        }
        self.running.lock().expect("unharmed").remove(&name);
    }

    /// What was done so far, in a line.
    pub(super) fn so_far(&self) -> String {
        format!("{:?}, {:?}: {}", self.faults, self.begin.elapsed(), self.world.so_far())
    }

    fn give_up(&self) -> ! {
        let running: Vec<String> = self.running.lock().expect("unharmed").iter().cloned().collect();
        let wrong = self.wrong.lock().expect("unharmed").join("; ");
        let message = format!(
            "{}\nseed {}: nothing has moved for {PATIENCE:?}; at work: {}. {wrong}\n",
            self.so_far(),
            self.seed,
            running.join(", ")
        );
        // Nothing is left to be done if that fails.
        let _ = std::io::stderr().write_all(message.as_bytes());
        std::process::abort();
    }
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no words for it")
}
