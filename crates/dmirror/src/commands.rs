//! The requests, one by one.

use crate::abi::{Command, FAIL_ALLOC, Request};
use crate::access::{Bounce, Work};
use crate::device::PAGE;
use crate::files::InUse;
use crate::heap;
use crate::replace;
use crate::snapshot;
use crate::table::FANOUT;
use crate::user::{self, copy_in, copy_out, hand_over};
use peerspace::{DeviceId, Error, Node, PageView, Residence};
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often pages are sent again at once that others have brought home in between, by an access next to them or by reading ahead, or
/// that somebody had in hand; then after pauses.
const AT_ONCE: u32 = 16;
const PAUSE: Duration = Duration::from_millis(1);
/// How long that may go on.
const PATIENCE: Duration = Duration::from_secs(2);

/// Carries out a request with the argument at `arg`, which is written back if all goes well.
pub(crate) fn carry_out(file: &InUse, code: u64, arg: u64) -> Result<(), Errno> {
    let mut command = user::command(arg)?;
    let range = range_of(&command)?;
    let request = Request::of(code).ok_or(Errno::INVAL)?;
    let (world, member, slot) = file.device()?;
    let work = Work { world, member, slot, range };
    // What this thread, or one that it has heard of, has done to its mappings counts.
    world.space.settle();
    (command.cpages, command.faults) = (0, 0);
    match request {
        Request::Read => work.read(&mut command),
        Request::Write => work.write(&mut command),
        Request::MigrateToDevice => work.migrate_to_device(&mut command),
        Request::MigrateToSystem => work.migrate_to_system(&mut command),
        Request::Snapshot => snapshot::take(&work, &mut command),
        Request::Exclusive => work.make_exclusive(&mut command),
        Request::CheckExclusive => work.check_exclusive(&mut command),
        Request::Release => work.release(),
        Request::Flags => {
            member.fail_next.store(command.npages & FAIL_ALLOC != 0, Ordering::Relaxed);
            Ok(())
        }
    }?;
    // SAFETY: the argument of the request, which says that it is written back.
    unsafe { copy_out(&command.to_bytes(), arg) }
}

/// The addresses that a request is about.
fn range_of(command: &Command) -> Result<VaRange, Errno> {
    // As the kernel counts: what does not fit into 64 bits wraps.
    let end = command.addr.wrapping_add(command.npages.wrapping_mul(PAGE));
    if !command.addr.is_multiple_of(PAGE) || command.addr >= end || command.npages > u64::MAX / PAGE {
        return Err(Errno::INVAL);
    }
    Ok(VaRange { start: Va(command.addr), end: Va(end) })
}

impl Work<'_> {
    fn read(&self, command: &mut Command) -> Result<(), Errno> {
        let mut bounce = Bounce::new(self.range.len())?;
        command.faults = self.access(&mut bounce, false)?.into();
        hand_over(bounce.bytes(), command)
    }

    fn write(&self, command: &mut Command) -> Result<(), Errno> {
        let mut bounce = Bounce::new(self.range.len())?;
        copy_in(command.ptr, bounce.bytes_mut())?;
        command.faults = self.access(&mut bounce, true)?.into();
        command.cpages = command.npages;
        Ok(())
    }

    fn migrate_to_device(&self, command: &mut Command) -> Result<(), Errno> {
        self.world.take_in_hand(self.range, false, Errno::INVAL)?;
        let mut bounce = Bounce::new(self.range.len())?;
        self.refuse_block(Node::Device(self.member.id))?;
        if self.member.is_coherent {
            heap::watch();
        }
        let begun = Instant::now();
        for round in 1.. {
            for piece in self.world.mappings(self.range) {
                let (piece, _) = piece.map_err(|_| Errno::INVAL)?;
                let on_a_mirror = |residence| self.is_on_a_mirror(residence);
                replace::send(self.world, piece, Node::Device(self.member.id), &on_a_mirror)?;
            }
            // What another device has stays there. What this one has may not be in place yet.
            let wanted = |residence| match residence {
                Residence::Device { id, .. } if id == self.member.id => self.member.is_coherent,
                residence => !self.is_on_a_mirror(residence),
            };
            for part in self.parts(wanted) {
                self.send(part, Node::Device(self.member.id))?;
            }
            self.meet_own();
            if self.missing().is_none() && self.read_own(&mut bounce)? == self.pages() {
                return hand_over(bounce.bytes(), command);
            }
            // Memory that stays, and other devices', is not waited for.
            let for_good = |residence| {
                residence == Residence::InPlace || self.is_on_a_mirror(residence) && !self.is_here(residence)
            };
            if begun.elapsed() > PATIENCE || round >= AT_ONCE && !self.parts(for_good).is_empty() {
                break;
            }
            if round >= AT_ONCE {
                std::thread::sleep(PAUSE);
            }
        }
        let missing = self.missing().unwrap_or(self.range);
        let view = self.view(missing.start);
        let why = format!("it has not come to the device, or not stayed there, but is there: {view:?}");
        Err(self.world.refused(Errno::NOENT, missing, &why))
    }

    /// The first part of the range that is not in this device's memory.
    fn missing(&self) -> Option<VaRange> {
        self.parts(|residence| !self.is_here(residence)).into_iter().next()
    }

    /// Where a page is now.
    fn view(&self, at: Va) -> Option<PageView> {
        self.world.space.pages(at.0 as *const u8, 1).ok()?.next()
    }

    /// The file comes upon what is in its device's memory.
    fn meet_own(&self) {
        for part in self.parts(|residence| self.is_here(residence)) {
            for va in (part.start.0..part.end.0).step_by(PAGE as usize) {
                if !self.mirror().meet(va, self.slot, false) {
                    // Where it has gone meanwhile, or cannot be had, it is found missing.
                    let _ = self.mirror().fault_anew(va, self.slot, false);
                }
            }
        }
    }

    fn migrate_to_system(&self, command: &mut Command) -> Result<(), Errno> {
        self.world.take_in_hand(self.range, false, Errno::INVAL)?;
        self.refuse_block(Node::Host)?;
        for part in self.parts(|residence| self.is_here(residence)) {
            self.send(part, Node::Host)?;
            command.cpages += part.len() / PAGE;
        }
        command.cpages = command.cpages.saturating_sub(self.pages_here());
        Ok(())
    }

    /// Has the next huge folio at `node` refused, if that was asked for and one may be wanted.
    fn refuse_block(&self, node: Node) -> Result<(), Errno> {
        let block = PAGE * FANOUT;
        let (start, end) = (self.range.start.0.next_multiple_of(block), self.range.end.0 / block * block);
        if start < end && self.member.fail_next.swap(false, Ordering::Relaxed) {
            self.world.space.refuse_next_block(node).map_err(|e| self.world.refused(Errno::NODEV, self.range, &e))?;
        }
        Ok(())
    }

    fn make_exclusive(&self, command: &mut Command) -> Result<(), Errno> {
        let mut bounce = Bounce::new(self.range.len())?;
        self.world
            .take_in_hand(self.range, true, Errno::FAULT)
            .map_err(|e| if e == Errno::PERM { Errno::FAULT } else { e })?;
        let (start, len) = (self.range.start.0 as *const u8, self.range.len() as usize);
        let begun = Instant::now();
        loop {
            let made = self.world.space.exclusive(start, len, self.member.id);
            made.map_err(|e| self.world.refused(Errno::BUSY, self.range, &e))?;
            for va in (self.range.start.0..self.range.end.0).step_by(PAGE as usize) {
                self.mirror().make_exclusive(va);
                self.mirror().meet(va, self.slot, true);
            }
            if self.read_own(&mut bounce)? == self.pages() {
                return hand_over(bounce.bytes(), command);
            }
            // A fork takes it from the device as well.
            if begun.elapsed() > PATIENCE {
                break;
            }
        }
        Err(self.world.refused(Errno::NOENT, self.range, &"others take it from the device again and again"))
    }

    fn check_exclusive(&self, command: &mut Command) -> Result<(), Errno> {
        let mut exclusive = self.byte_for_each(0)?;
        let pages = (self.range.start.0..self.range.end.0).step_by(PAGE as usize);
        for (byte, va) in exclusive.iter_mut().zip(pages) {
            *byte = self.mirror().is_exclusive(va).into();
        }
        hand_over(&exclusive, command)
    }

    fn release(&self) -> Result<(), Errno> {
        let released = self.world.space.evict(self.member.id);
        released.map(drop).map_err(|e| self.world.refused(Errno::BUSY, self.range, &e))
    }

    /// Sends pages, as many as can go.
    fn send(&self, part: VaRange, to: Node) -> Result<(), Errno> {
        match self.world.space.migrate(part.start.0 as *const u8, part.len() as usize, to) {
            Ok(_) => Ok(()),
            Err(e @ Error::Lost { .. }) => Err(self.world.refused(Errno::IO, part, &e)),
            // Unmapped by another thread meanwhile.
            Err(e @ Error::BadRange { .. }) => Err(self.world.refused(Errno::INVAL, part, &e)),
            // What could not go is where it was; what is refused because of it is for the caller to say.
            Err(e) => {
                self.world.refused(Errno::NOENT, part, &e);
                Ok(())
            }
        }
    }

    /// The parts of the range with such residence.
    fn parts(&self, such: impl Fn(Residence) -> bool) -> Vec<VaRange> {
        self.world.parts(self.range, |view| such(view.residence))
    }

    /// How many of the pages are in this device's memory.
    fn pages_here(&self) -> u64 {
        self.parts(|residence| self.is_here(residence)).iter().map(|part| part.len() / PAGE).sum()
    }

    /// On this device, or on another one of its kind; not where the space keeps what leaves RAM.
    fn is_on_a_mirror(&self, residence: Residence) -> bool {
        let Some(at) = device_of(residence) else { return false };
        self.world.members.iter().any(|member| member.id == at)
    }

    fn is_here(&self, residence: Residence) -> bool {
        device_of(residence) == Some(self.member.id)
    }
}

/// The device that has it.
fn device_of(residence: Residence) -> Option<DeviceId> {
    match residence {
        Residence::Device { id, .. } | Residence::Coherent(id) => Some(id),
        _ => None,
    }
}
