//! Memory of devices that the CPU maps in place of a region's own (rule Z5): put there when a block is migrated to a coherent
//! device, and taken away when it comes home, is pinned, discarded, forked, or its device goes or fails.
//!
//! ```text
//!  home --move--> State::Device, all of the block on one device --show--> State::Coherent
//!                 State::Device                                 <--hide-- State::Coherent
//! ```
//!
//! Both halves are complete by themselves: between them a block is what any page on a device is, and a fault brings it home.
//! Faults never move what is in place; to the fault path, [`State::Coherent`] means that there is nothing to be done.
//!
//! # Waiting for oneself
//!
//! To show and to hide are changes of mappings like those of the program: the call goes on when somebody has received the
//! news. Whoever calls has the entry of the block locked, and a receiver that acts on somebody else's change may want that
//! entry. So the one who changes says so first, in a section, when nobody acts on anything ([`InPlace::begin`]); and a receiver
//! that finds such a change under way receives until it is over, before it acts on anything else ([`InPlace::is_ours`],
//! `Engine::apply`), and resolves faults only where it waits for no entry. Only one thread changes at a time; it has the
//! [*turn*](super::turn), which forks and walks of everything take as well.
//!
//! Regions of the space's own are used so: the program does not unmap these, so nobody else's mapping can have come to be where
//! memory is put in place. Of adopted memory the kernel would not say; it is used so where the program has promised to
//! [announce](super::announce) what it does ([`Engine::may_replace`]), since whoever announces a change waits for the entries that
//! are locked here, and takes away what is in place before the call that makes it.
//!
//! On the way back a registered mapping, prepared elsewhere, is moved over the device's memory, so that a reader waits and never
//! sees zeros. Neighbours that are neighbours on the device as well share a mapping, and no more than a quarter of the mappings
//! that a process may have is spent ([`SHARE`]). Before a fork everything moves to where two processes do not share it.

use super::context::{Context, Working};
use super::detach::DetachError;
use super::fault::{Fault, Hold, Outcome};
use super::tier::unwinding;
use super::turn::Turn;
use super::{Engine, Entry};
use crate::device::MemoryType;
use arrayvec::ArrayVec;
use peerspace_core::addr::{Access, BLOCK_PAGES, DevicePfn, Order, PageRange, Pages, VaRange, Vpn};
use peerspace_core::entry::State;
use peerspace_core::regions::Attributes;
use peerspace_core::sync::{AtomicBool, AtomicU64, Ordering, Ordering::Relaxed};
use peerspace_os::own::Buffer;
use peerspace_os::{Kernel, Message, Trouble};

/// Memory of devices may cut up regions into one part in so many of all mappings that a process may have; the rest is the
/// program's own to use.
const SHARE: u64 = 4;
/// One in so many refusals has the pieces counted.
const COUNTED: u64 = 256;
/// Entries that are put in place, or taken away, at once.
pub(super) const RUN: usize = 64;

/// What is being put in place or taken away.
#[derive(Debug)]
pub(crate) struct InPlace {
    /// The addresses whose mappings are just changing; zeros when none are.
    start: AtomicU64,
    end: AtomicU64,
    /// Where what takes their place was prepared, once the kernel has told.
    from: AtomicU64,
    /// A receiver waits for the change to be over, and has received nothing that it has not acted on, apart from changes of
    /// others.
    awaited: AtomicBool,
    /// Copies under way to or from memory in place, which stays there meanwhile.
    holds: AtomicU64,
    /// Runs of pages in place that follow each other on the device too: each is a mapping.
    runs: AtomicU64,
    /// How many of both there were when they were counted last.
    counted: AtomicU64,
    /// Mappings that may be left over where something was taken from the midst of a run, at most: the kernel does not join what was
    /// populated apart.
    left: AtomicU64,
    /// As many of both as there may be.
    most: AtomicU64,
    /// How often it was found that there are as many.
    refused: AtomicU64,
    left_behind: AtomicBool,
}

impl InPlace {
    /// Nothing is in place. The process may have `mappings` mappings.
    pub(crate) fn new(mappings: u64) -> InPlace {
        InPlace {
            most: AtomicU64::new(mappings / SHARE),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            from: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
            holds: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            left: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            left_behind: AtomicBool::new(false),
        }
    }

    /// Lets there be so many pieces at most.
    #[cfg(all(test, not(shuttle), feature = "process"))]
    pub(crate) fn limit(&self, pieces: u64) {
        self.most.store(pieces, Relaxed);
    }

    /// In a forked child, at rest: whoever copied something does not exist.
    pub(crate) fn renew(&self) {
        self.holds.store(0, Relaxed);
    }

    /// Whether what two processes would share could not be moved before a fork.
    pub(crate) fn is_left_behind(&self) -> bool {
        self.left_behind.swap(false, Relaxed)
    }

    /// Says that the mappings of `range` are about to change. The caller is in a section and has the turn.
    fn begin(&self, range: VaRange) {
        self.from.store(0, Ordering::SeqCst);
        self.end.store(range.end.0, Ordering::SeqCst);
        self.start.store(range.start.0, Ordering::SeqCst);
    }

    /// Whether somebody has entries locked and waits for news of their own to be received.
    pub(crate) fn is_under_way(&self) -> bool {
        self.start.load(Ordering::SeqCst) != 0
    }

    /// Receives by `receive` until what is under way is over; calls `other` with what is not news of that.
    pub(crate) fn await_end(&self, mut receive: impl FnMut() -> Option<Message>, mut other: impl FnMut(Message)) {
        let mut nothing_there = false;
        loop {
            self.awaited.store(true, Ordering::SeqCst);
            if !self.is_under_way() {
                return self.awaited.store(false, Ordering::SeqCst);
            }
            if nothing_there {
                crate::sync::yield_now();
            }
            self.awaited.store(false, Ordering::SeqCst);
            let received = receive();
            nothing_there = received.is_none();
            if let Some(change) = received.filter(|change| !self.is_ours(change)) {
                other(change);
            }
        }
    }

    /// Whether `change` is news of what is under way: the range goes on to be what the table says.
    pub(crate) fn is_ours(&self, change: &Message) -> bool {
        let [start, end, from] = [&self.start, &self.end, &self.from].map(|a| a.load(Ordering::SeqCst));
        if start == 0 {
            return false;
        }
        match *change {
            Message::Unmap(r) => {
                (r.start.0, r.end.0) == (start, end) || from != 0 && (r.start.0, r.len()) == (from, end - start)
            }
            Message::Move { from, to, len } if (to.0, len) == (start, end - start) => {
                self.from.store(from.0, Ordering::SeqCst);
                true
            }
            _ => false,
        }
    }
}

/// Why memory was not put in place, or not taken away. It is where it was, or on the device and not in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    /// The kernel refused.
    #[error("{0}")]
    Kernel(Trouble),
    /// There are as many mappings already as may be.
    #[error(
        "memory in place is in {0} pieces already, as many as leave the program enough of the mappings it may have"
    )]
    TooManyPieces(u64),
    /// The device has no memory to be mapped there.
    #[error("the device has no memory there for the CPU to map")]
    NoMemory,
    /// The block has changed meanwhile.
    #[error("somebody works with it")]
    Busy,
}

/// What the kernel would say of it, for those who know no more than that.
impl From<PlaceError> for Trouble {
    fn from(e: PlaceError) -> Trouble {
        match e {
            PlaceError::Kernel(trouble) => trouble,
            PlaceError::TooManyPieces(_) => Trouble::NoMemory,
            PlaceError::NoMemory => Trouble::Unsuitable,
            PlaceError::Busy => Trouble::Busy,
        }
    }
}

impl<K: Kernel> Engine<K> {
    /// Says that the mappings of `run`, entries that follow each other, change, unless somebody else's change is being acted
    /// on. The caller has the turn.
    fn begin_change(&self, run: &[Entry<'_, K>], work: &Working<'_>) -> bool {
        let Some(_section) = self.gate.enter(work.context()) else { return false };
        let [first, .., last] = [run.first(), run.last()].map(|entry| entry.expect("something changes"));
        self.inplace.begin(self.addresses(PageRange { start: first.vpn(), end: last.range().end }));
        // Threads that receive wait for no entry from here on.
        run.iter().for_each(Entry::<K>::turn_away);
        true
    }

    /// The call that changes mappings has returned: its news has been received, and is acted on before this returns.
    fn end_change(&self) {
        // Whoever received it has done so with the gate closed, or while he waits for this to end.
        while !self.gate.is_idle() && !self.inplace.awaited.load(Ordering::SeqCst) {
            crate::sync::yield_now();
        }
        self.inplace.start.store(0, Ordering::SeqCst);
    }

    /// Puts the device's memory in the place of the block of `entry`, which is on that device as a whole.
    pub(super) fn put_in_place(
        &self,
        entry: Entry<'_, K>,
        work: Working<'_>,
        turn: &Turn<'_, K::Park>,
    ) -> Result<(), PlaceError> {
        let mut run = ArrayVec::new();
        run.push(entry);
        self.put_run_in_place(run, work, turn)
    }

    /// Puts the device's memory in the place of `run`, entries that follow each other and whose data do so on the device: they are
    /// one mapping.
    pub(super) fn put_run_in_place(
        &self,
        run: ArrayVec<Entry<'_, K>, RUN>,
        work: Working<'_>,
        _turn: &Turn<'_, K::Park>,
    ) -> Result<(), PlaceError> {
        let [first, .., last] = [run.first(), run.last()].map(|entry| entry.expect("something is put in place"));
        let State::Device { pfn, .. } = first.state() else { unreachable!("it is on the device") };
        let all = PageRange { start: first.vpn(), end: last.range().end };
        if let Some(pieces) = self.too_many_pieces() {
            return Err(PlaceError::TooManyPieces(pieces));
        }
        if !self.begin_change(&run, &work) {
            drop((run, work));
            self.wait_for_changes();
            return Err(PlaceError::Busy);
        }
        // Without the context, which whoever brings everything to rest waits for.
        drop(work);
        let tier = self.tiers.of(pfn);
        let shown = match unwinding(|| tier.device().shared(pfn - tier.range.base)).flatten() {
            Some(memory) => self.kernel.show(self.addresses(all), memory).map_err(PlaceError::Kernel),
            None => Err(PlaceError::NoMemory),
        };
        self.end_change();
        shown?;
        for entry in run {
            let State::Device { pfn, .. } = entry.state() else { unreachable!("it is on the device") };
            self.note_in_place(entry.range(), pfn, true);
            entry.commit(State::Coherent { pfn });
        }
        Ok(())
    }

    /// The pieces that regions are in because of what is in place, or was, if they are as many as may be.
    fn too_many_pieces(&self) -> Option<u64> {
        // A little less than none, perhaps: regions that are closed beside each other at once may miss each other.
        let runs = || (self.inplace.runs.load(Relaxed) as i64).max(0) as u64;
        let most = self.inplace.most.load(Relaxed);
        let pieces = runs() + self.inplace.left.load(Relaxed);
        if pieces < most {
            return None;
        }
        // Some of what was left over may be one again: that can be counted, if not often.
        let changed = pieces != self.inplace.counted.load(Relaxed);
        if self.inplace.refused.fetch_add(1, Relaxed).is_multiple_of(COUNTED) || changed {
            let mut left = 0u64;
            for region in self.regions.iter() {
                left += self.kernel.mappings_in(self.addresses(region.range)).unwrap_or(most);
            }
            let left = left.saturating_sub(runs() + self.regions.len() as u64);
            self.inplace.left.store(left, Relaxed);
            self.inplace.counted.store(runs() + left, Relaxed);
        }
        Some(runs() + self.inplace.left.load(Relaxed)).filter(|pieces| *pieces >= most)
    }

    /// Whether the mapping of a region with these attributes may be replaced by that of a device's memory: nobody else changes it
    /// unheard.
    pub(super) fn may_replace(&self, attributes: Attributes) -> bool {
        let others =
            Attributes::KEPT.with(Attributes::LEAVING).with(Attributes::PERSISTENT).with(Attributes::IN_PLACE);
        !attributes.has_any(others) && (!attributes.has(Attributes::ADOPTED) || self.announcements.are_promised())
    }

    /// Whether the permissions of `pages`, whose entries are locked, may be changed for a moment: nobody else changes them meanwhile.
    pub(super) fn may_unprotect(&self, pages: PageRange) -> bool {
        let adopted = self
            .region(pages.start)
            .is_some_and(|region| region.attributes.has(Attributes::ADOPTED) && region.range.covers(pages));
        adopted && self.announcements.are_promised() && !self.announcements.concern(pages)
    }

    /// Takes away whatever is in place of `pages`. Where as many pieces are in place as may be, whole blocks leave, so that there are
    /// no more.
    pub(super) fn take_range_from_place(&self, pages: PageRange, turn: &Turn<'_, K::Park>) -> Result<(), PlaceError> {
        let (mut at, mut end) = (pages.start, pages.end);
        while at < end {
            let block = PageRange::block(at.block());
            let Some((entry, whole)) = self.table.look(at) else {
                at = block.end;
                continue;
            };
            if let State::Coherent { .. } = entry.state() {
                if !whole && self.too_many_pieces().is_some() && !self.is_persistent(at) {
                    // What is left of the block would be more pieces.
                    if block.start < pages.start {
                        self.take_range_from_place(PageRange { start: block.start, end: pages.start }, turn)?;
                    }
                    end = end.max(block.end);
                }
                self.take_run_from_place(PageRange { start: at, end }, turn)?;
                // Somebody may have put it there again, or what is behind it may be in place yet.
                if matches!(self.table.look(at), Some((e, _)) if matches!(e.state(), State::Coherent { .. })) {
                    continue;
                }
            }
            at = if whole { block.end } else { at + 1 };
        }
        Ok(())
    }

    /// Takes away what is in place at the start of `pages`, and what follows it without a gap, some of it at once: the data are on
    /// the device then, and a fault brings them home. Nothing happens where nothing is in place.
    pub(super) fn take_run_from_place(&self, pages: PageRange, _turn: &Turn<'_, K::Park>) -> Result<(), PlaceError> {
        loop {
            let work = self.contexts.take();
            let run = self.lock_run(pages);
            let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
            let all = PageRange { start: first.vpn(), end: last.range().end };
            if self.inplace.holds.load(Ordering::SeqCst) > 0 {
                // A copy is under way, somewhere.
                drop((run, work));
                crate::sync::yield_now();
                continue;
            }
            self.vacate(all);
            if !self.begin_change(&run, &work) {
                drop((run, work));
                self.wait_for_changes();
                continue;
            }
            drop(work);
            let hidden = self.kernel.hide(self.addresses(all)).map_err(PlaceError::Kernel);
            self.end_change();
            hidden?;
            let beside =
                |vpn| matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Coherent { .. }));
            if all.start.0.checked_sub(1).is_some_and(|before| beside(Vpn(before))) || beside(all.end) {
                self.inplace.left.fetch_add(1, Relaxed);
            }
            for entry in run {
                let State::Coherent { pfn } = entry.state() else { unreachable!("seen when it was locked") };
                self.gone_from_place(entry.range(), pfn);
                entry.commit(State::Device { pfn, stamp: self.stamp(), rewritten: false });
            }
            return Ok(());
        }
    }

    /// Locks the entries at the start of `pages` whose memory is in place, as many as are changed at once.
    fn lock_run(&self, pages: PageRange) -> ArrayVec<Entry<'_, K>, RUN> {
        let mut run = ArrayVec::new();
        let mut at = pages.start;
        while at < pages.end && !run.is_full() {
            // The first is what is wanted; who has one of the others may go on.
            let entry = match run.is_empty() {
                true => self.table.lock(at).ok(),
                false => self.table.try_lock(at).ok().flatten(),
            };
            let Some(entry) = entry.filter(|e| matches!(e.state(), State::Coherent { .. })) else { break };
            at = entry.range().end;
            run.push(entry);
        }
        run
    }

    /// Accounts for `range` with `pfn`, of one entry, which is locked: it is in place now, or is not any more.
    pub(super) fn note_in_place(&self, range: PageRange, pfn: DevicePfn, is_now: bool) {
        let beside = |vpn: Option<Vpn>, pfn: Option<u64>| {
            let (Some(vpn), Some(pfn)) = (vpn, pfn) else { return false };
            let Some((entry, whole)) = self.table.look(vpn) else { return false };
            let offset = if whole { vpn - vpn.block_start() } else { 0 };
            matches!(entry.state(), State::Coherent { pfn: at } if at.pfn().0 + offset == pfn)
        };
        let n = range.pages().0;
        let before = beside(range.start.0.checked_sub(1).map(Vpn), pfn.pfn().0.checked_sub(1));
        let after = beside(Some(range.end), Some(pfn.pfn().0 + n));
        // One more piece, less those that it joins; and the other way round.
        let pieces = 1 - before as i64 - after as i64;
        self.inplace.runs.fetch_add((if is_now { pieces } else { -pieces }) as u64, Relaxed);
        let tier = self.tiers.of(pfn);
        let pages = n as i64;
        tier.in_place.fetch_add((if is_now { pages } else { -pages }) as u64, Relaxed);
    }

    /// The pages of `range`, at `pfn`, are not in place any more. Their entries are locked.
    pub(super) fn gone_from_place(&self, range: PageRange, pfn: DevicePfn) {
        self.note_in_place(range, pfn, false);
    }

    /// A fault where memory is in place: it began before it was, or the memory itself cannot be had.
    pub(super) fn fault_in_place(
        &self,
        _: DevicePfn,
        entry: Entry<'_, K>,
        fault: &Fault,
        context: &Context,
    ) -> Result<Outcome, Hold> {
        let page = self.addresses(PageRange::new(fault.vpn, Pages(1)));
        if self.gate.enter(context).is_none() {
            return Err(Hold::Changing);
        }
        // A file that has become shorter, memory that is broken: the kernel says so by the signal that brought us here.
        let broken = !self.kernel.capabilities().kernel_faults
            && !self.kernel.is_accessible(page, fault.access == Access::Write);
        drop(entry);
        if broken {
            return Ok(Outcome::Poisoned);
        }
        let _ = self.kernel.wake(page);
        Ok(Outcome::Resolved)
    }

    /// Holds `pages`, which begin in the locked `entry`, where they are in place: for a copy to or from them, until they are
    /// [let go](Engine::let_go_in_place). `None` where an access would fail.
    pub(super) fn hold_in_place(
        &self,
        _: DevicePfn,
        entry: &Entry<'_, K>,
        pages: PageRange,
        write: bool,
    ) -> Option<PageRange> {
        let held = PageRange { start: pages.start, end: pages.end.min(entry.range().end) };
        if entry.vpn() > pages.start || !self.kernel.is_accessible(self.addresses(held), write) {
            return None;
        }
        self.inplace.holds.fetch_add(1, Ordering::SeqCst);
        Some(held)
    }

    /// Undoes [`hold_in_place`](Engine::hold_in_place). The entry is locked.
    pub(super) fn let_go_in_place(&self, _: DevicePfn) {
        let before = self.inplace.holds.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "more is let go of than was held");
    }

    /// Takes away what is in place at `vpn`, for a pin.
    pub(super) fn leave_place(&self, _: DevicePfn, vpn: Vpn) -> Result<(), Trouble> {
        let turn = self.take_turn();
        Ok(self.take_range_from_place(PageRange::new(vpn, Pages(1)), &turn)?)
    }

    /// Takes away all that is in place of `pages`, and nothing else if that can be. To be called without a lock and without a context; not by threads that receive
    /// messages.
    pub(super) fn leave_places(&self, pages: PageRange) -> Result<(), Trouble> {
        let in_place = || self.tiers.iter().any(|tier| tier.pages_in_place() > 0);
        if pages.is_empty() || !in_place() {
            return Ok(());
        }
        let turn = self.take_turn();
        // Of blocks that are meant in part the rest stays.
        for edge in [pages.start, Vpn(pages.end.0 - 1)] {
            let whole =
                matches!(self.table.look(edge), Some((e, true)) if matches!(e.state(), State::Coherent { .. }));
            if whole && !pages.covers(PageRange::block(edge.block())) {
                self.split_for_device(edge);
            }
        }
        Ok(self.take_range_from_place(pages, &turn)?)
    }

    /// Before memory of the space's own is unmapped that nobody refers to any more: gives up what is in place of `pages`.
    pub(super) fn close_in_place(&self, pages: PageRange) {
        for piece in pages.by_block() {
            let mut at = piece.start;
            while at < piece.end {
                let Some((seen, whole)) = self.table.look(at) else { break };
                let next = if whole { piece.end } else { at + 1 };
                if let State::Coherent { .. } = seen.state()
                    && let Ok(entry) = self.table.lock(at)
                    && let State::Coherent { pfn } = entry.state()
                {
                    let entry = self.recall(entry);
                    let closed = self.kernel.close(self.addresses(entry.range()));
                    // Mapped on, it would be somebody else's data one day.
                    assert!(closed.is_ok(), "memory of a device cannot be unmapped: {closed:?}");
                    self.gone_from_place(entry.range(), pfn);
                    let order = if entry.is_whole() { Order::BLOCK } else { Order::BASE };
                    entry.commit(State::Empty);
                    self.tiers.free(pfn, order);
                }
                at = next;
            }
        }
    }

    /// Before the content of `pages`, of a region of the space's own, is discarded: what is in place of it as whole blocks is
    /// taken away, and of blocks that are meant in part those pages are made zero where they are. Calls `rest` with what is to
    /// be discarded yet.
    pub(crate) fn discard_in_place(
        &self,
        pages: PageRange,
        mut rest: impl FnMut(PageRange) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let mut from = pages.start;
        let in_place =
            |vpn| matches!(self.table.look(vpn), Some((e, _)) if matches!(e.state(), State::Coherent { .. }));
        for piece in pages.by_block() {
            if piece.pages().0 == BLOCK_PAGES {
                if piece.iter().any(in_place) {
                    let turn = self.take_turn();
                    self.take_range_from_place(piece, &turn)?;
                }
                continue;
            }
            let mut at = piece.start;
            while at < piece.end {
                let run = piece.iter().skip((at - piece.start) as usize).take_while(|vpn| in_place(*vpn)).count();
                let run = PageRange::new(at, Pages(run as u64));
                let zeroed = if run.is_empty() { 0 } else { self.zero_in_place(run)? };
                if zeroed == 0 {
                    at = at + 1;
                    continue;
                }
                if from < at {
                    rest(PageRange { start: from, end: at })?;
                }
                at = at + zeroed;
                from = at;
            }
        }
        if from < pages.end { rest(PageRange { start: from, end: pages.end }) } else { Ok(()) }
    }

    /// Makes pages at the start of `pages`, a part of a block, zero where they are in place, as far as one entry says so. Returns how
    /// many; 0 when they are not in place any more.
    fn zero_in_place(&self, pages: PageRange) -> Result<u64, Trouble> {
        let mut work = self.contexts.take();
        let Ok(entry) = self.table.lock(pages.start) else { return Ok(0) };
        let State::Coherent { pfn } = entry.state() else { return Ok(0) };
        let pages = pages.intersect(entry.range());
        // What the device writes there it writes beside nobody.
        self.vacate(pages);
        let zeros = &mut work.parts().1[..self.geometry.page_bytes()];
        zeros.fill(0);
        for vpn in pages.iter() {
            if !self.tiers.rewrite(pfn + (vpn - entry.vpn()), zeros) {
                return Err(Trouble::Other(rustix::io::Errno::IO.raw_os_error()));
            }
        }
        Ok(pages.pages().0)
    }

    /// Takes away all that is in place of the device at `base`.
    pub(crate) fn take_all_from_place(&self, base: DevicePfn) {
        let turn = self.take_turn();
        let mut from = 0;
        loop {
            let found = {
                let _work = self.contexts.take();
                let tier = self.tiers.find(base).filter(|t| t.pages_in_place() > 0);
                tier.and_then(|tier| tier.next_in_use(from))
            };
            let Some(folio) = found else { return };
            if let Err(e) = self.take_range_from_place(PageRange::new(folio.vpn, folio.order.pages()), &turn) {
                crate::tell::warning(format_args!(
                    "memory of a device that has failed stays mapped at {}: {e}",
                    self.geometry.va(folio.vpn)
                ));
            }
            from = folio.page + folio.order.pages().0;
        }
    }

    /// Takes away what is in place of devices that have failed: exactly that is lost when it is asked for (rule Z9).
    pub(super) fn take_failed_from_place(&self) {
        let next = |after: Option<DevicePfn>| {
            let _work = self.contexts.take();
            let failed = self.tiers.iter().filter(|t| t.has_failed() && t.pages_in_place() > 0);
            failed
                .map(|tier| tier.base())
                .filter(|base| after.is_none_or(|a| base.pfn() > a.pfn()))
                .min_by_key(|b| b.pfn())
        };
        // What cannot be taken away has been told.
        let mut at = next(None);
        while let Some(base) = at {
            self.take_all_from_place(base);
            at = next(Some(base));
        }
    }

    /// Before a fork, with the turn: what two processes would share is moved elsewhere, for afterwards each has its own (rule
    /// G12). Where there is no room elsewhere it comes home, beyond the budget.
    pub(crate) fn leave_shared_memory(&self, turn: &Turn<'_, K::Park>) {
        if let Err(e) = self.move_shared_memory(turn) {
            crate::tell::warning(format_args!("what two processes would share cannot be moved before a fork: {e:?}"));
            self.inplace.left_behind.store(true, Relaxed);
        }
    }

    fn move_shared_memory(&self, turn: &Turn<'_, K::Park>) -> Result<(), DetachError> {
        let shared = |base: Option<DevicePfn>| {
            let _work = self.contexts.take();
            let mut coherent = self.tiers.iter().filter(|t| t.info.memory == MemoryType::Coherent);
            let next = coherent.find(|t| {
                // Nothing more goes there until the fork is over.
                t.close_for_fork(true);
                base.is_none_or(|b| t.range.base > b.pfn()) && t.used() > Pages(0)
            });
            next.map(|t| t.base())
        };
        let mut at = shared(None);
        if at.is_none() {
            return Ok(());
        }
        let mut buffer = Buffer::new(self.geometry.block_bytes()).map_err(|_| DetachError::NoMemory)?;
        while let Some(base) = at {
            self.evict_all(base, &mut buffer, turn, true)?;
            at = shared(Some(base));
        }
        Ok(())
    }

    /// After a fork, with the turn: such memory may be used again.
    pub(crate) fn reopen_shared_memory(&self) {
        let _work = self.contexts.take();
        self.tiers.iter().filter(|t| t.info.memory == MemoryType::Coherent).for_each(|t| t.close_for_fork(false));
    }
}
