//! What the program does to its own memory, half or all of which is on an accelerator: forks, unmapping, moving. The reference is
//! the same call on memory that the kernel alone knows of, all of it resident.

use super::{BLOCK, accelerator, space};
use crate::contender::Contender;
use crate::error::Trouble;
use crate::spec::{Call, Metric, Sample, Spec, Work};
use crate::workload;
use peerspace::device::soft::Accelerator;
use peerspace::{Adopted, Node, Space};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How often a call is made in one sample.
const TIMES: u32 = 12;
const PAGE: usize = workload::PAGE_BYTES;

/// The call, on memory of whom.
pub(in crate::contender) struct Calls {
    call: Call,
    bytes: usize,
    ours: Option<Ours>,
    /// What a fork copies, all the time.
    kept: Option<Memory>,
    echo: Echo,
}

struct Ours {
    space: Space,
    far: Node,
    _accelerator: Accelerator,
}

/// Memory of the program, unmapped at the end unless that was done.
struct Memory {
    at: *mut u8,
    bytes: usize,
    adopted: Option<Adopted>,
}

impl Memory {
    /// `bytes` bytes, aligned to a block, of huge pages if it is as much and they are wanted.
    fn new(bytes: usize, huge: bool) -> Result<Memory, Trouble> {
        let (whole, flags) = (bytes + BLOCK, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(Trouble::failed("map memory")(std::io::Error::last_os_error()));
        }
        let at = at.cast::<u8>();
        let skip = at.align_offset(BLOCK);
        // SAFETY: what of the mapping is not used.
        unsafe {
            if skip > 0 {
                libc::munmap(at.cast(), skip);
            }
            libc::munmap(at.add(skip + bytes).cast(), whole - skip - bytes);
        }
        let memory = Memory { at: at.wrapping_add(skip), bytes, adopted: None };
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the advice changes no content.
        unsafe { libc::madvise(memory.at.cast(), bytes, advice) };
        Ok(memory)
    }

    fn words(&mut self) -> &mut [u64] {
        // SAFETY: mapped, readable and writable, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes / 8) }
    }

    fn fill(&mut self) {
        workload::fill(self.words(), 0);
    }

    /// Whether the first word of each page is what was written.
    fn verify(&mut self) -> Result<u64, Trouble> {
        let mut verified = 0;
        for (page, words) in self.words().chunks_exact(PAGE / 8).enumerate() {
            if words[0] != workload::word(page * PAGE / 8) {
                return Err(Trouble::Wrong(format!("the first word of page {page} is {:#x}", words[0])));
            }
            verified += 1;
        }
        Ok(verified)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// Another thread that answers: what the least costs that a call can cost which somebody else has to hear of.
struct Echo {
    ask: OwnedFd,
    answer: OwnedFd,
}

impl Echo {
    fn new() -> Result<Echo, Trouble> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).map_err(Trouble::failed("make an eventfd"));
        let echo = Echo { ask: event()?, answer: event()? };
        let again = |fd: &OwnedFd| fd.try_clone().map_err(Trouble::failed("duplicate an eventfd"));
        let (ask, answer) = (again(&echo.ask)?, again(&echo.answer)?);
        std::thread::spawn(move || {
            let mut word = [0; 8];
            while rustix::io::read(&ask, &mut word).is_ok() {
                let _ = rustix::io::write(&answer, &1u64.to_ne_bytes());
            }
        });
        Ok(echo)
    }

    /// How long a question and its answer take.
    fn round_trip(&self) -> Result<Duration, Trouble> {
        let start = Instant::now();
        rustix::io::write(&self.ask, &1u64.to_ne_bytes()).map_err(Trouble::failed("ask"))?;
        rustix::io::read(&self.answer, &mut [0; 8]).map_err(Trouble::failed("hear the answer"))?;
        Ok(start.elapsed())
    }
}

impl Calls {
    pub(in crate::contender) fn new(spec: &Spec, ours: bool, call: Call) -> Result<Calls, Trouble> {
        let bytes = spec.data as usize;
        let ours = if ours {
            let accelerator = accelerator(spec.data.max(64 << 20), None)?;
            let (space, ids) = space(spec, std::slice::from_ref(&accelerator))?;
            let far = Node::Device(*ids.last().expect("it has two devices"));
            Some(Ours { space, far, _accelerator: accelerator })
        } else {
            None
        };
        let mut calls = Calls { call, bytes, ours, kept: None, echo: Echo::new()? };
        if calls.forks() {
            calls.kept = Some(calls.memory(bytes / 2)?);
        }
        Ok(calls)
    }

    fn forks(&self) -> bool {
        matches!(self.call, Call::Fork | Call::ForkSmall)
    }

    /// Filled memory, of which so many bytes are on the accelerator, if there is one.
    fn memory(&self, away: usize) -> Result<Memory, Trouble> {
        let mut memory = Memory::new(self.bytes, self.call != Call::ForkSmall)?;
        memory.fill();
        if let Some(Ours { space, far, .. }) = &self.ours {
            memory.adopted = Some(space.adopt(memory.at, self.bytes).map_err(Trouble::failed("adopt memory"))?);
            let went = space.migrate(memory.at, away, *far).map_err(Trouble::failed("migrate"))?;
            if went != away {
                return Err(Trouble::Failed(format!("{went} of {away} bytes went to the accelerator")));
            }
        }
        Ok(memory)
    }

    fn unmap(&self) -> Result<Duration, Trouble> {
        let memory = self.memory(self.bytes)?;
        let start = Instant::now();
        // SAFETY: nobody has a reference into it. What is dropped after this unmaps nothing that is in use: no thread of this
        // process maps anything meanwhile.
        let done = unsafe { libc::munmap(memory.at.cast(), memory.bytes) };
        let took = start.elapsed();
        if done == 0 { Ok(took) } else { Err(Trouble::failed("unmap")(std::io::Error::last_os_error())) }
    }

    fn relocate(&self) -> Result<(Duration, u64), Trouble> {
        let mut memory = self.memory(self.bytes)?;
        let place = Memory::new(self.bytes, self.call != Call::ForkSmall)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let start = Instant::now();
        // SAFETY: nobody has a reference into either.
        let to = unsafe { libc::mremap(memory.at.cast(), self.bytes, self.bytes, flags, place.at.cast::<u8>()) };
        let took = start.elapsed();
        if to == libc::MAP_FAILED {
            return Err(Trouble::failed("move a mapping")(std::io::Error::last_os_error()));
        }
        // It is there now; and where it was nothing is to be unmapped.
        memory.at = place.at;
        std::mem::forget(place);
        let verified = memory.verify()?;
        Ok((took, verified))
    }

    /// Forks; the child reads a word of each page if it is to `look`, and ends.
    fn fork(&mut self, look: bool) -> Result<Duration, Trouble> {
        let kept = self.kept.as_mut().expect("what a fork copies");
        let start = Instant::now();
        // SAFETY: the child reads memory and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let good = !look || kept.verify().is_ok();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(!good)) };
        }
        if child < 0 {
            return Err(Trouble::failed("fork")(std::io::Error::last_os_error()));
        }
        let mut status = 0;
        // SAFETY: waits for the child, and writes its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        match status {
            0 => Ok(start.elapsed()),
            status => {
                Err(Trouble::Wrong(format!("the child did not read what was written, or ended so: {status:#x}")))
            }
        }
    }
}

impl Contender for Calls {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let (mut took, mut verified) = (Vec::new(), 0);
        let mut trips = Vec::new();
        for _ in 0..TIMES {
            took.push(match self.call {
                Call::Fork | Call::ForkSmall => self.fork(false)?,
                Call::Unmap => self.unmap()?,
                Call::Move => {
                    let (took, words) = self.relocate()?;
                    verified += words;
                    took
                }
            });
            if !self.forks() {
                // As long after the last wake-up as the call was: a processor that has slept takes longer to wake up.
                drop(self.memory(self.bytes)?);
            }
            trips.push(self.echo.round_trip()?);
        }
        if self.forks() {
            self.fork(true)?;
            verified += (self.bytes / PAGE) as u64;
        }
        let median = |all: &mut Vec<Duration>| {
            all.sort_unstable();
            all[all.len() / 2].as_secs_f64() * 1e6
        };
        Ok(Sample::verified(verified)
            .with(Metric::PerCall, median(&mut took))
            .with(Metric::RoundTrip, median(&mut trips)))
    }
}
