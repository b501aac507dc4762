//! Prefetch: pages sent to where they will be used, by a thread of the engine's own (rule G8).
//!
//! Requests wait in a queue, in the order in which they were made; each is worked off block by block, so that a stream that
//! asks for the next one while it uses this one never waits for more than a block. A [`Ticket`] says how far a request has
//! come. What cannot go (pinned, held by a launch, no room) stays where it is: the access that needs it finds out why.

use super::Engine;
use super::fault::{Fault, Outcome};
use super::place::Bring;
use super::serve::{Helper, await_bell};
use crate::device::mmu::{DeviceAccess, Mode};
use crate::device::port::FaultError;
use crate::sync::Mutex;
use peerspace_core::addr::{Access, BLOCK_PAGES, PageRange, Pages, Vpn};
use peerspace_core::entry::State;
use peerspace_core::plan::{CLUSTER, HUGE_LEVEL};
use peerspace_core::regions::Attributes;
use peerspace_core::sharers::MmuId;
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering, Park};
use peerspace_os::own::{Own, Shared, Vec};
use peerspace_os::{Kernel, Wake};

/// Where pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    Host,
    Mmu(MmuId),
}

/// How far a request has come.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Blocks that are not done yet. Whoever waits sleeps on it.
    left: AtomicU64,
    /// Pages that are where they were sent.
    there: AtomicU64,
    cancelled: AtomicBool,
    /// The first that could not go.
    failed: Mutex<Option<FaultError>>,
}

impl Ticket {
    pub(crate) fn is_done(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn there(&self) -> Pages {
        Pages(self.there.load(Ordering::Acquire))
    }

    pub(crate) fn failed(&self) -> Option<FaultError> {
        self.failed.lock().clone()
    }

    pub(crate) fn wait(&self, park: &impl Park) {
        loop {
            match self.left.load(Ordering::Acquire) {
                0 => return,
                left => park.wait(&self.left, left),
            }
        }
    }

    fn blocks_done(&self, blocks: u64, park: &impl Park) {
        self.left.fetch_sub(blocks, Ordering::Release);
        park.wake(&self.left);
    }
}

#[derive(Debug, Clone)]
struct Request {
    /// What was asked for.
    asked: PageRange,
    /// The blocks that are to be sent yet.
    rest: PageRange,
    to: Goal,
    ticket: Shared<Ticket>,
}

/// What is to be prefetched.
#[derive(Debug)]
pub(crate) struct Prefetches {
    bell: AtomicU64,
    /// Locked with a context in hand only, so that it is free when the process forks.
    requests: Mutex<Vec<Request>>,
}

impl Prefetches {
    pub(crate) fn new() -> Prefetches {
        Prefetches { bell: AtomicU64::new(0), requests: Mutex::new(Vec::new_in(Own)) }
    }

    pub(super) fn bell(&self) -> &AtomicU64 {
        &self.bell
    }

    /// Has the loop look whether it is to stop.
    pub(crate) fn stop(&self, park: &impl Park) {
        self.bell.store(1, Ordering::Release);
        park.wake(&self.bell);
    }

    /// In a forked child: nobody waits.
    pub(crate) fn renew(&self) {
        self.bell.store(0, Ordering::Relaxed);
        self.requests.lock().drain(..).for_each(|r| r.ticket.left.store(0, Ordering::Release));
    }
}

impl<K: Kernel> Engine<K> {
    /// Asks for the blocks that `pages` touches, as far as they are in regions, to be sent to `to`.
    pub(crate) fn prefetch(&self, pages: PageRange, to: Goal) -> Shared<Ticket> {
        let blocks = if pages.is_empty() { 0 } else { Vpn(pages.end.0 - 1).block() - pages.start.block() + 1 };
        let ticket = Shared::new(Ticket {
            left: AtomicU64::new(blocks),
            there: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            failed: Mutex::new(None),
        });
        if blocks > 0 {
            let rest = PageRange {
                start: pages.start.block_start(),
                end: PageRange::block(pages.start.block() + blocks - 1).end,
            };
            let _work = self.contexts.take();
            self.prefetches.requests.lock().push(Request { asked: pages, rest, to, ticket: ticket.clone() });
            self.service.ring_for(Helper::Send, &self.prefetches.bell, &self.kernel.park());
        }
        ticket
    }

    /// Sends what is asked for, until stopped.
    pub(crate) fn serve_prefetch(&self) {
        let park = self.kernel.park();
        await_bell(self.service.started(), &park);
        while !self.service.stopped() {
            await_bell(&self.prefetches.bell, &park);
            while let Some(block) = self.next_prefetch() {
                if !block.ticket.cancelled.load(Ordering::Relaxed) && !self.service.stopped() {
                    self.send_block(&block);
                }
                block.ticket.blocks_done(1, &park);
            }
        }
    }

    /// Works on what `ticket` asks for, as long as nobody else does: its user has nothing better to do than to wait.
    pub(crate) fn help_prefetch(&self, ticket: &Shared<Ticket>) {
        loop {
            let next = {
                let _work = self.contexts.take();
                let mut requests = self.prefetches.requests.lock();
                let ours = requests.iter().position(|r| Shared::as_ptr(&r.ticket) == Shared::as_ptr(ticket));
                ours.and_then(|i| self.next_block_of(&mut requests, i))
            };
            let Some(block) = next else { return };
            if !ticket.cancelled.load(Ordering::Relaxed) {
                self.send_block(&block);
            }
            ticket.blocks_done(1, &self.kernel.park());
        }
    }

    /// Takes the next block of request `i` in which there is something of ours; none if there is no other, and the request is over.
    fn next_block_of(&self, requests: &mut Vec<Request>, i: usize) -> Option<Request> {
        let Request { asked, rest, to, ticket } = &mut requests[i];
        // Most addresses are nobody's: a request may be for all there are.
        let ours = self.regions.next(rest.start).map_or(rest.end, |r| r.range.start.block_start().min(rest.end));
        if ours > rest.start {
            ticket.blocks_done(ours.block() - rest.start.block(), &self.kernel.park());
            rest.start = ours;
        }
        let block = PageRange::block(rest.start.block());
        let next =
            (!rest.is_empty()).then(|| Request { asked: *asked, rest: block, to: *to, ticket: ticket.clone() });
        if next.is_some() {
            rest.start = block.end;
        }
        if rest.is_empty() {
            requests.remove(i);
        }
        next
    }

    fn next_prefetch(&self) -> Option<Request> {
        let _work = self.contexts.take();
        let mut requests = self.prefetches.requests.lock();
        while !requests.is_empty() {
            if let Some(next) = self.next_block_of(&mut requests, 0) {
                return Some(next);
            }
        }
        // Under the lock, so that a request that comes now rings again.
        self.prefetches.bell.store(self.service.stopped() as u64, Ordering::Release);
        None
    }

    fn send_block(&self, request: &Request) {
        let Request { asked, rest: block, to, ticket } = request;
        let mut at = block.start;
        while at < block.end {
            // The parts of the block that are regions of ours.
            let Some(region) = self.regions.next(at).filter(|r| r.range.start < block.end) else { return };
            let piece = region.range.intersect(PageRange { start: at, end: block.end });
            let sent = match *to {
                _ if region.attributes.has(Attributes::IN_PLACE) => self.send_nowhere(piece, (*asked, *to), ticket),
                Goal::Host => self.send_home(piece, ticket),
                Goal::Mmu(mmu) => self.send_to_device(mmu, piece, region.attributes, ticket),
            };
            if let Err(e) = sent {
                ticket.failed.lock().get_or_insert(e);
            }
            at = piece.end;
        }
    }

    /// `pages` stay where they are, which is on the host. It is an error if they were asked for, and not only lie in a block
    /// of what was.
    fn send_nowhere(
        &self,
        pages: PageRange,
        (asked, to): (PageRange, Goal),
        ticket: &Ticket,
    ) -> Result<(), FaultError> {
        let wanted = pages.intersect(asked);
        match to {
            Goal::Host => {
                ticket.there.fetch_add(pages.pages().0, Ordering::Release);
                Ok(())
            }
            Goal::Mmu(_) if wanted.is_empty() => Ok(()),
            Goal::Mmu(_) => Err(FaultError::Stays(self.geometry.va(wanted.start).0)),
        }
    }

    fn send_to_device(
        &self,
        mmu: MmuId,
        pages: PageRange,
        hints: Attributes,
        ticket: &Ticket,
    ) -> Result<(), FaultError> {
        let mode = {
            let _work = self.contexts.take();
            let tier = self.tiers.by_mmu(mmu).ok_or(FaultError::Cut)?;
            tier.mmu.as_ref().map(|state| state.info.mode)
        };
        // Copies where the device would have got copies; otherwise the pages themselves.
        let copies = hints.has(Attributes::READ_MOSTLY) || mode == Some(Mode::Replicate);
        let access = if copies { DeviceAccess::Read } else { DeviceAccess::Write };
        let how = if copies { Bring::AsChosen } else { Bring::Here };
        let mut at = pages.start;
        while at < pages.end && !ticket.cancelled.load(Ordering::Relaxed) {
            let got = self.bring_to_device(mmu, at, access, (how, CLUSTER))?;
            let got = got.0.min(pages.end - at);
            ticket.there.fetch_add(got, Ordering::Release);
            at = at + got;
        }
        Ok(())
    }

    fn send_home(&self, pages: PageRange, ticket: &Ticket) -> Result<(), FaultError> {
        let mut at = pages.start;
        while at < pages.end && !ticket.cancelled.load(Ordering::Relaxed) {
            let Some((entry, whole)) = self.table.look(at) else { return Ok(()) };
            let next = if whole { Vpn(at.block_start().0 + BLOCK_PAGES).min(pages.end) } else { at + 1 };
            match entry.state() {
                State::Device { .. } | State::Mapped { held: false, .. } => {
                    let va = self.geometry.va(at);
                    match self.resolve(Fault::ahead(at, Access::Read, Wake::Yes, HUGE_LEVEL)) {
                        Ok(Outcome::Resolved) => {}
                        Ok(Outcome::Poisoned) => {
                            return Err(FaultError::Lost(va.0, "its device could not give it back".into()));
                        }
                        // Discarded meanwhile, or there is no memory: the access that needs it will see.
                        _ => at = next,
                    }
                    continue;
                }
                State::Host { .. } | State::Shared { .. } | State::Standby { .. } | State::Coherent { .. } => {
                    ticket.there.fetch_add(next - at, Ordering::Release);
                }
                _ => {}
            }
            at = next;
        }
        Ok(())
    }
}
