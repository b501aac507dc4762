//! The steward: a process that holds what belongs to the whole system (swap devices, memory cgroups, a swap file),
//! and takes it down whatever happens.
//!
//! It is a session of its own, so that Ctrl-C in a terminal does not reach it, and it ends when its input does: when
//! the benchmarks are over, when they panic, when they are killed. Whatever it still holds then it takes down first.
//! The benchmarks themselves change nothing in the system.

mod cgroup;
mod swap;
mod swapfile;
mod zram;

use crate::error::Trouble;
use crate::process::Peer;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Where the kernel swaps to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SwapOn {
    /// Compressed memory.
    Zram,
    /// A file in this directory.
    File(PathBuf),
}

/// What the steward is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// So many bytes of swap.
    Swap(SwapOn, u64),
    /// A memory cgroup with this limit in bytes.
    Cgroup(u64),
    /// Take everything down.
    Release,
}

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// It was done: what it is, or where.
    Done(String),
    /// This system does not have it or does not allow it.
    Unavailable(String),
}

/// The steward, seen from the benchmarks. Dropped, it takes everything down.
#[derive(Debug)]
pub(crate) struct Steward {
    peer: Peer,
}

impl Steward {
    /// Starts one.
    ///
    /// # Errors
    /// When this user cannot do what it would be asked for.
    pub(crate) fn start(prefix: &[&str]) -> Result<Steward, Trouble> {
        if !rustix::process::geteuid().is_root() {
            return Err(Trouble::Unavailable("only root can set up swap and a memory cgroup".into()));
        }
        Ok(Steward { peer: Peer::start(prefix, &["--steward"])? })
    }

    /// `bytes` of swap; says what it is.
    pub(crate) fn swap(&mut self, on: SwapOn, bytes: u64) -> Result<String, Trouble> {
        self.ask(&Request::Swap(on, bytes))
    }

    /// A memory cgroup of `limit` bytes: its `cgroup.procs`.
    pub(crate) fn cgroup(&mut self, limit: u64) -> Result<PathBuf, Trouble> {
        self.ask(&Request::Cgroup(limit)).map(PathBuf::from)
    }

    /// Takes down what there is.
    pub(crate) fn release(&mut self) -> Result<(), Trouble> {
        self.ask(&Request::Release).map(drop)
    }

    fn ask(&mut self, request: &Request) -> Result<String, Trouble> {
        self.peer.tell(request)?;
        match self.peer.hear()? {
            Reply::Done(what) => Ok(what),
            Reply::Unavailable(why) => Err(Trouble::Unavailable(why)),
        }
    }
}

/// The steward's own life.
pub(crate) fn serve() -> ExitCode {
    // Its own session: a terminal's Ctrl-C and hang-up go to the benchmarks, whose end it sees. A polite request to
    // end is not followed before that either; a flag that nobody looks at is the safe way to ignore a signal.
    let _ = rustix::process::setsid();
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
    }
    // The order in which things were made; the end of the list is taken down first.
    let mut held: Vec<Box<dyn Any>> = Vec::new();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let Ok(request) = serde_json::from_str(&line) else { break };
        let reply = answer(request, &mut held).unwrap_or_else(|e| Reply::Unavailable(e.to_string()));
        let mut line = serde_json::to_string(&reply).expect("a reply can be written as JSON");
        line.push('\n');
        let mut out = std::io::stdout();
        if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    release(&mut held);
    ExitCode::SUCCESS
}

fn answer(request: Request, held: &mut Vec<Box<dyn Any>>) -> Result<Reply, Trouble> {
    Ok(Reply::Done(match request {
        Request::Swap(SwapOn::Zram, bytes) => {
            let zram = zram::Zram::new(bytes)?;
            let what = zram.what();
            held.push(Box::new(zram));
            what
        }
        Request::Swap(SwapOn::File(dir), bytes) => {
            let file = swapfile::SwapFile::new(&dir, bytes)?;
            let what = file.what();
            held.push(Box::new(file));
            what
        }
        Request::Cgroup(limit) => {
            let cgroup = cgroup::Cgroup::new(limit)?;
            let procs = cgroup.procs().display().to_string();
            held.push(Box::new(cgroup));
            procs
        }
        Request::Release => {
            release(held);
            String::new()
        }
    }))
}

fn release(held: &mut Vec<Box<dyn Any>>) {
    while let Some(last) = held.pop() {
        drop(last);
    }
}

/// Tries `f` for a while: things of the kernel stay busy for moments after their last user is gone.
fn patiently<T, E: std::fmt::Display>(what: &str, mut f: impl FnMut() -> Result<T, E>) -> Option<T> {
    let mut tries = 0;
    loop {
        match f() {
            Ok(t) => return Some(t),
            Err(e) if tries == 250 => {
                eprintln!("peerspace-bench: {what}: {e}");
                return None;
            }
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
        tries += 1;
    }
}
