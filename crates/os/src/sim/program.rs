//! What a program does to simulated memory: accesses, and changes of its mappings.
//!
//! A change happens in the steps in which a real kernel takes it, so that others come in between: it is announced
//! (from then on operations on registered memory are refused), carried out, told by a message, and over when the
//! caller, after somebody has received that, goes on. Discarding tells first and drops the pages after. Growth in
//! place and changed permissions are not told at all.

use super::memory::{Allowed, Keep, Kind, Trap};
use super::{Sim, pages_of};
use crate::kernel::Message;
use peerspace_core::addr::{PageRange, Va, VaRange};

/// A thread that waits for a page, where faults come by message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting(u64);

impl Sim {
    /// Reads bytes of one page.
    ///
    /// # Errors
    /// What keeps the access from succeeding; see [`Trap`].
    pub fn read(&self, va: Va, out: &mut [u8]) -> Result<(), Trap> {
        let at = self.offset(va, out.len());
        self.step().access(self.geometry.vpn(va), false, |page| out.copy_from_slice(&page[at..at + out.len()]))
    }

    /// Writes bytes of one page.
    ///
    /// # Errors
    /// As for [`read`](Sim::read).
    pub fn write(&self, va: Va, bytes: &[u8]) -> Result<(), Trap> {
        let at = self.offset(va, bytes.len());
        self.step().access(self.geometry.vpn(va), true, |page| page[at..at + bytes.len()].copy_from_slice(bytes))
    }

    /// The parts of `len` bytes from `at` on that lie in one page each.
    pub(super) fn by_page(&self, at: Va, len: usize) -> impl Iterator<Item = (Va, std::ops::Range<usize>)> {
        let page = self.geometry.page_bytes();
        let first = page - at.0 as usize % page;
        let starts = std::iter::once(0).chain((first..len).step_by(page));
        starts.map(move |from| {
            let end = if from == 0 { first.min(len) } else { len.min(from + page) };
            (Va(at.0 + from as u64), from..end)
        })
    }

    fn offset(&self, va: Va, len: usize) -> usize {
        let at = (va.0 % self.geometry.page_bytes() as u64) as usize;
        assert!(at + len <= self.geometry.page_bytes(), "an access is to one page");
        at
    }

    /// Sends a message about a fault, as the kernel does for an access that met [`Trap::Fault`]. The thread goes on
    /// when it [waits](Sim::is_waiting) no more, and tries again.
    pub fn send_fault(&self, va: Va, write: bool, protected: bool) -> Waiting {
        let vpn = self.geometry.vpn(va);
        let mut m = self.step();
        let ticket = m.ticket();
        m.waiting.insert(ticket, vpn);
        m.faults.push_back(Message::Fault { va, write, protected, thread: 0 });
        Waiting(ticket)
    }

    /// Whether a thread still waits for its page.
    pub fn is_waiting(&self, who: Waiting) -> bool {
        self.step().waiting.contains_key(&who.0)
    }

    /// Maps ordinary memory of whole pages at a block boundary: the kernel itself populates it.
    pub fn map_plain(&self, len: u64) -> VaRange {
        self.place(len, Kind::PLAIN)
    }

    /// Maps memory of another kind, that many bytes of zeros.
    pub fn map_kept(&self, len: u64, keep: Keep) -> VaRange {
        self.place(len, Kind { keep, ..Kind::PLAIN })
    }

    /// Maps it at `range`, where nothing is.
    pub fn map_kept_at(&self, range: VaRange, keep: Keep) {
        let pages = pages_of(self.geometry, range);
        let mut m = self.step();
        assert!(m.pieces(pages).is_empty(), "something is at {range}");
        m.map(pages, Kind { keep, ..Kind::PLAIN });
    }

    /// The file of which `range` is mapped ends before it from here on. Nobody is told.
    pub fn truncate(&self, range: VaRange) {
        self.step().cut(pages_of(self.geometry, range));
    }

    /// Has zeros in the place of what is shared in `range`, as MADV_REMOVE does.
    pub fn remove(&self, range: VaRange) {
        let pages = pages_of(self.geometry, range);
        let pieces = self.step().pieces(pages);
        for (piece, kind) in pieces {
            if kind.registered && self.can.move_pages {
                self.step().changing += 1;
                self.tell(Message::Discard(self.geometry.range(piece)));
            }
            self.step().remove(piece);
        }
    }

    /// Unmaps `range`, whatever is there.
    pub fn munmap(&self, range: VaRange) {
        let pages = pages_of(self.geometry, range);
        let told = {
            let mut m = self.step();
            let told: Vec<PageRange> =
                m.pieces(pages).into_iter().filter(|(_, k)| k.registered).map(|(r, _)| r).collect();
            m.changing += told.len() as u32;
            m.unmap(pages);
            told
        };
        for piece in told {
            self.tell(Message::Unmap(self.geometry.range(piece)));
        }
    }

    /// Drops the content of `range`, as MADV_DONTNEED does.
    pub fn dontneed(&self, range: VaRange) {
        let pages = pages_of(self.geometry, range);
        let pieces = self.step().pieces(pages);
        for (piece, kind) in pieces {
            // Without moves pages are dropped by this call too, which must not tell of itself.
            if kind.registered && self.can.move_pages {
                self.step().changing += 1;
                self.tell(Message::Discard(self.geometry.range(piece)));
            }
            self.step().drop_pages(piece);
        }
    }

    /// Moves the mapping `range`, which is one, elsewhere, as MREMAP_MAYMOVE does; without `to`, where there is room.
    /// What is at `to` is unmapped first. `None` when `range` is no mapping.
    pub fn remap(&self, range: VaRange, to: Option<Va>) -> Option<Va> {
        let from = pages_of(self.geometry, range);
        // The kernel looks before it unmaps anything.
        let is_one = |pieces: &[(PageRange, Kind)]| matches!(pieces, [(piece, _)] if *piece == from);
        if !is_one(&self.step().pieces(from)) {
            return None;
        }
        let to = match to {
            Some(to) => {
                self.munmap(VaRange::new(to, range.len())?);
                to
            }
            None => {
                let free = self.place(range.len(), Kind { allowed: Allowed::Nothing, ..Kind::PLAIN });
                free.start
            }
        };
        let registered = {
            let mut m = self.step();
            let pieces = m.pieces(from);
            if !is_one(&pieces) {
                return None;
            }
            let registered = pieces[0].1.registered;
            // Two changes: it is moved, and unmapped where it was.
            m.changing += 2 * registered as u32;
            m.relocate(from, self.geometry.vpn(to));
            registered
        };
        if registered {
            self.tell_all(&[Message::Move { from: range.start, to, len: range.len() }, Message::Unmap(range)]);
        }
        Some(to)
    }

    /// Changes what the program may do in `range`. Nobody is told.
    pub fn mprotect(&self, range: VaRange, allowed: Allowed) {
        self.step().change_kind(pages_of(self.geometry, range), |k| k.allowed = allowed);
    }

    /// Makes the mapping that ends at `end` longer by `len` bytes, in place. Nobody is told. False when there is no
    /// mapping, or no room.
    pub fn grow_in_place(&self, end: Va, len: u64) -> bool {
        let more = pages_of(self.geometry, VaRange { start: end, end: Va(end.0 + len) });
        let mut m = self.step();
        let before = self.geometry.vpn(Va(end.0 - 1));
        let Some((_, kind)) = m.pieces(PageRange { start: before, end: before + 1 }).pop() else { return false };
        if kind.buried || kind.in_place || !m.pieces(more).is_empty() {
            return false;
        }
        m.map(more, kind);
        true
    }

    /// What a fork does to the process that forks: its pages are shared from then on.
    pub fn fork_in_parent(&self) {
        self.step().fork(false);
    }

    /// What the forked process finds: every page, shared; no registration, and no protection. `regions` are registered
    /// anew.
    pub fn fork_in_child(&self, regions: impl Iterator<Item = VaRange>) {
        let mut m = self.step();
        m.fork(true);
        for region in regions {
            m.change_kind(pages_of(self.geometry, region), |k| k.registered = !k.buried && !k.in_place);
        }
    }

    /// Whether a page is mapped at `va`, and then whether a write to it would go on without a fault.
    pub fn mapped(&self, va: Va) -> Option<bool> {
        self.step().mapped(self.geometry.vpn(va))
    }

    /// Whether access to the page at `va` raises SIGBUS.
    pub fn is_lost(&self, va: Va) -> bool {
        self.step().has_poison(self.geometry.vpn(va))
    }

    /// Sends a message about a change that was counted, and waits until it is received.
    pub(super) fn tell(&self, message: Message) {
        self.tell_all(&[message]);
    }

    /// The same for several changes made by one call, which are announced one after the other. Who plays all the parts
    /// gets them at once: a receiver may wait for the second one before it returns from the first.
    pub(super) fn tell_all(&self, messages: &[Message]) {
        let at_once = if self.is_alone() { messages.len() } else { 1 };
        for some in messages.chunks(at_once.max(1)) {
            let last = {
                let mut m = self.step();
                let mut last = m.ticket();
                for message in some {
                    last = m.ticket();
                    m.changes.push_back((last, *message));
                }
                last
            };
            while self.step().changes.iter().any(|(t, _)| *t == last) {
                self.idle();
            }
            // The caller itself says that it goes on: until then, operations are refused although all has been received.
            self.step().changing -= some.len() as u32;
        }
    }
}
