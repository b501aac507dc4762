//! The state of a simulated kernel: mappings, what is in their pages, staging, and what is announced.
//!
//! Everything is kept page by page; a *mapping* is a run of pages of the same kind, as a real kernel merges what lies
//! side by side. All methods are called under one lock, so each is a moment of its own. What they say where they
//! refuse is what `userfaultfd` says, in the order in which it finds out.

use crate::kernel::{CpuPage, Done, Message, Protect, Trouble};
use peerspace_core::addr::{BLOCK_PAGES, PageRange, Pages, Vpn};
use rustix::fd::OwnedFd;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// EFAULT: the kernel itself came upon a page that is not there.
const FAULTED: Trouble = Trouble::Other(14);

/// What the program may do in a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowed {
    /// Nothing.
    Nothing,
    /// To read.
    Read,
    /// To read and write.
    Write,
}

/// Whose the pages of a mapping are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The process's own.
    Private,
    /// Shared memory.
    Shared,
    /// A regular file's.
    File,
}

/// What kind of mapping a page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) registered: bool,
    pub(super) allowed: Allowed,
    pub(super) keep: Keep,
    /// A file without bytes: access raises SIGBUS.
    pub(super) buried: bool,
    /// Memory of a device.
    pub(super) in_place: bool,
}

impl Kind {
    /// Private and anonymous, to be read and written.
    pub(super) const PLAIN: Kind =
        Kind { registered: false, allowed: Allowed::Write, keep: Keep::Private, buried: false, in_place: false };

    pub(super) fn is_plain(self) -> bool {
        !self.buried && !self.in_place && self.keep == Keep::Private
    }
}

/// A physical page.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) bytes: Box<[u8]>,
    protected: bool,
    /// With a forked process.
    shared: bool,
}

impl Page {
    pub(super) fn new(bytes: Box<[u8]>) -> Page {
        Page { bytes, protected: false, shared: false }
    }
}

#[derive(Debug)]
pub(super) enum Content {
    Missing,
    Poisoned,
    Page(Page),
    /// So many bytes into the memory of a device.
    Device(Arc<OwnedFd>, u64),
}

#[derive(Debug)]
pub(super) struct Place {
    kind: Kind,
    content: Content,
}

/// Why an access of the program did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// The page is missing, or (`protected`) there but write-protected.
    Fault {
        /// The latter.
        protected: bool,
    },
    /// SIGBUS: the page is lost.
    Lost,
    /// SIGSEGV: nothing is mapped, or the mapping does not allow it.
    Refused,
}

#[derive(Debug, Default)]
pub(super) struct Memory {
    places: BTreeMap<u64, Place>,
    pub(super) staged: BTreeMap<u64, Page>,
    /// Blocks that are one huge page, in regions and in staging.
    huge: BTreeSet<u64>,
    /// Blocks of regions in which small pages were mapped: a huge page cannot be mapped there any more.
    tables: BTreeSet<u64>,
    /// Users of cells of staging: how many read, or -1 for one that has it alone.
    pub(super) cells: BTreeMap<u64, i64>,
    /// Changes that are announced and not received, or received by somebody and not gone on from.
    pub(super) changing: u32,
    pub(super) changes: VecDeque<(u64, Message)>,
    pub(super) faults: VecDeque<Message>,
    /// Threads that wait for a page.
    pub(super) waiting: BTreeMap<u64, Vpn>,
    tickets: u64,
    page_bytes: usize,
    can_protect: bool,
}

fn single(vpn: u64) -> PageRange {
    PageRange::new(Vpn(vpn), Pages(1))
}

/// An operation that did `pages` pages and met `trouble` with the next. Once something is done, userfaultfd only says
/// that it is to be tried again (EAGAIN).
fn stopped(pages: u64, trouble: Trouble) -> Done {
    Done::stopped(Pages(pages), if pages == 0 { trouble } else { Trouble::Changing })
}

fn is_block(range: PageRange) -> bool {
    range.start.is_block_start() && range.pages().0 == BLOCK_PAGES
}

impl Memory {
    pub(super) fn new(page_bytes: usize, can_protect: bool) -> Memory {
        Memory { page_bytes, can_protect, ..Memory::default() }
    }

    pub(super) fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    fn zeros(&self) -> Box<[u8]> {
        vec![0; self.page_bytes].into()
    }

    // --- mappings ---

    /// Maps `range`, in the place of whatever is there, with nothing in it.
    pub(super) fn map(&mut self, range: PageRange, kind: Kind) {
        for vpn in range.iter() {
            self.places.insert(vpn.0, Place { kind, content: Content::Missing });
        }
        self.forget_huge(range);
    }

    /// Maps the memory of a device, from `offset` on.
    pub(super) fn map_device(&mut self, range: PageRange, file: &Arc<OwnedFd>, offset: u64) {
        let kind = Kind { in_place: true, ..Kind::PLAIN };
        for (i, vpn) in range.iter().enumerate() {
            let content = Content::Device(file.clone(), offset + (i * self.page_bytes) as u64);
            self.places.insert(vpn.0, Place { kind, content });
        }
        self.forget_huge(range);
    }

    pub(super) fn unmap(&mut self, range: PageRange) {
        range.iter().for_each(|v| drop(self.places.remove(&v.0)));
        self.forget_huge(range);
    }

    fn forget_huge(&mut self, range: PageRange) {
        for piece in range.by_block() {
            self.huge.remove(&piece.start.block());
            if is_block(piece) {
                self.tables.remove(&piece.start.block());
            }
        }
    }

    pub(super) fn kind(&self, vpn: u64) -> Option<Kind> {
        self.places.get(&vpn).map(|p| p.kind)
    }

    /// The kind of the mapping that all of `range` belongs to, if it is one.
    fn one_mapping(&self, range: PageRange) -> Option<Kind> {
        let kind = self.kind(range.start.0)?;
        range.iter().all(|v| self.kind(v.0) == Some(kind)).then_some(kind)
    }

    /// The mapping around `vpn`.
    pub(super) fn mapping_at(&self, vpn: Vpn) -> Option<PageRange> {
        let kind = self.kind(vpn.0).filter(|k| k.is_plain())?;
        Some(self.around(vpn, kind))
    }

    /// The mapping that holds `vpn` or else the next one, whatever it maps.
    pub(super) fn mapped_from(&self, vpn: Vpn) -> Option<(PageRange, Kind)> {
        let (at, place) = self.places.range(vpn.0..).next()?;
        Some((self.around(Vpn(*at), place.kind), place.kind))
    }

    /// The mapping of this kind around `vpn`.
    fn around(&self, vpn: Vpn, kind: Kind) -> PageRange {
        let (mut start, mut end) = (vpn.0, vpn.0 + 1);
        while start > 0 && self.kind(start - 1) == Some(kind) {
            start -= 1;
        }
        while self.kind(end) == Some(kind) {
            end += 1;
        }
        PageRange { start: Vpn(start), end: Vpn(end) }
    }

    /// The pieces of `range` that are mapped, each of one mapping, and whether that is registered.
    pub(super) fn pieces(&self, range: PageRange) -> Vec<(PageRange, Kind)> {
        let mut out: Vec<(PageRange, Kind)> = Vec::new();
        for (vpn, place) in self.places.range(range.start.0..range.end.0) {
            match out.last_mut() {
                Some((r, kind)) if r.end.0 == *vpn && *kind == place.kind => r.end = r.end + 1,
                _ => out.push((single(*vpn), place.kind)),
            }
        }
        out
    }

    pub(super) fn change_kind(&mut self, range: PageRange, change: impl Fn(&mut Kind)) {
        self.places.range_mut(range.start.0..range.end.0).for_each(|(_, p)| change(&mut p.kind));
    }

    /// Moves a mapping with its pages.
    pub(super) fn relocate(&mut self, from: PageRange, to: Vpn) {
        let moved: Vec<(u64, Place)> =
            from.iter().filter_map(|v| Some((v - from.start, self.places.remove(&v.0)?))).collect();
        self.forget_huge(from);
        self.forget_huge(PageRange::new(to, from.pages()));
        for (offset, place) in moved {
            self.tables.insert((to + offset).block());
            self.places.insert((to + offset).0, place);
        }
    }

    /// As a fork leaves memory: every page is shared. In the child, nothing is registered or protected, and nobody
    /// waits.
    pub(super) fn fork(&mut self, in_child: bool) {
        let pages = self.places.values_mut().filter_map(|p| match &mut p.content {
            Content::Page(page) => Some(page),
            _ => None,
        });
        for page in pages.chain(self.staged.values_mut()) {
            page.shared = true;
            page.protected &= !in_child;
        }
        if in_child {
            self.places.values_mut().for_each(|p| p.kind.registered = false);
            self.faults.clear();
            self.waiting.clear();
        }
    }

    /// Drops the pages of `range`, as MADV_DONTNEED does.
    pub(super) fn drop_pages(&mut self, range: PageRange) {
        let there = self.places.range_mut(range.start.0..range.end.0);
        // What a file holds, or others share, is there as before.
        let own = |place: &Place| !place.kind.in_place && place.kind.keep == Keep::Private;
        there.filter(|(_, p)| own(p)).for_each(|(_, p)| p.content = Content::Missing);
        self.forget_huge(range);
    }

    /// A file ends before `range`.
    pub(super) fn cut(&mut self, range: PageRange) {
        self.places.range_mut(range.start.0..range.end.0).for_each(|(_, p)| p.content = Content::Poisoned);
    }

    /// The pages of `range` are zeros from here on, as MADV_REMOVE has it.
    pub(super) fn remove(&mut self, range: PageRange) {
        self.places.range_mut(range.start.0..range.end.0).for_each(|(_, p)| p.content = Content::Missing);
    }

    // --- accesses of the program ---

    /// Gives the bytes of the page at `vpn` to `access`, if the program may have them.
    pub(super) fn access<T>(
        &mut self,
        vpn: Vpn,
        write: bool,
        access: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, Trap> {
        let (zeros, page_bytes) = (self.zeros(), self.page_bytes);
        let Some(place) = self.places.get_mut(&vpn.0) else { return Err(Trap::Refused) };
        if place.kind.allowed < if write { Allowed::Write } else { Allowed::Read } {
            return Err(Trap::Refused);
        }
        if place.kind.buried {
            return Err(Trap::Lost);
        }
        if let Content::Missing = place.content {
            if place.kind.registered && place.kind.keep == Keep::Private {
                return Err(Trap::Fault { protected: false });
            }
            place.content = Content::Page(Page::new(zeros));
            self.tables.insert(vpn.block());
        }
        match &mut place.content {
            Content::Page(page) => {
                if write && page.protected && place.kind.registered {
                    return Err(Trap::Fault { protected: true });
                }
                if write {
                    (page.protected, page.shared) = (false, false);
                }
                Ok(access(&mut page.bytes))
            }
            Content::Device(file, offset) => {
                let mut bytes = vec![0; page_bytes];
                // Beyond the end of a file: SIGBUS.
                match rustix::io::pread(&**file, &mut *bytes, *offset) {
                    Ok(n) if n == bytes.len() => {}
                    _ => return Err(Trap::Lost),
                }
                let out = access(&mut bytes);
                if write {
                    rustix::io::pwrite(&**file, &bytes, *offset).map_err(|_| Trap::Lost)?;
                }
                Ok(out)
            }
            _ => Err(Trap::Lost),
        }
    }

    // --- operations on registered memory ---

    fn check_changing(&self) -> Option<Done> {
        (self.changing > 0).then_some(Done::stopped(Pages(0), Trouble::Changing))
    }

    /// Installs pages with the bytes that `bytes` gives for each.
    pub(super) fn install(
        &mut self,
        to: PageRange,
        protect: Protect,
        mut bytes: impl FnMut(&Memory, u64) -> Box<[u8]>,
    ) -> Done {
        if let Some(done) = self.check_changing() {
            return done;
        }
        if !self.one_mapping(to).is_some_and(|k| k.registered && k.keep == Keep::Private) {
            return Done::stopped(Pages(0), Trouble::Absent);
        }
        for (i, vpn) in to.iter().enumerate() {
            // A mark that a page is lost is no page: copying replaces it.
            if let Content::Page(_) = self.places[&vpn.0].content {
                return stopped(i as u64, Trouble::Present);
            }
            let protected = protect == Protect::Yes && self.can_protect;
            let page = Page { protected, ..Page::new(bytes(self, i as u64)) };
            self.tables.insert(vpn.block());
            self.places.get_mut(&vpn.0).expect("it is mapped").content = Content::Page(page);
        }
        Done::all(to.pages())
    }

    /// Moves pages of the program to staging, out of a mapping with these permissions.
    pub(super) fn take_out(&mut self, to: Vpn, from: PageRange, allowed: Allowed) -> Done {
        if let Some(done) = self.check_changing() {
            return done;
        }
        match self.one_mapping(from) {
            Some(Kind { allowed: is, keep: Keep::Private, buried: false, in_place: false, .. }) if is == allowed => {}
            _ => return Done::stopped(Pages(0), Trouble::Unsuitable),
        }
        let whole = is_block(from) && to.is_block_start() && self.huge.contains(&from.start.block());
        for (i, vpn) in from.iter().enumerate() {
            let at = (to + i as u64).0;
            let place = self.places.get_mut(&vpn.0).expect("it is mapped");
            let trouble = match &mut place.content {
                _ if self.staged.contains_key(&at) => Trouble::Present,
                Content::Missing => Trouble::Absent,
                Content::Poisoned | Content::Device(..) => FAULTED,
                Content::Page(page) if page.shared => Trouble::Busy,
                Content::Page(_) => {
                    let Content::Page(page) = std::mem::replace(&mut place.content, Content::Missing) else {
                        unreachable!("just seen")
                    };
                    self.staged.insert(at, Page { protected: false, ..page });
                    if !whole {
                        self.huge.remove(&vpn.block());
                        self.huge.remove(&Vpn(at).block());
                    }
                    continue;
                }
            };
            return stopped(i as u64, trouble);
        }
        if whole {
            self.huge.remove(&from.start.block());
            self.huge.insert(to.block());
        }
        Done::all(from.pages())
    }

    /// Moves staged pages to the program.
    pub(super) fn put_back(&mut self, to: PageRange, from: Vpn) -> Done {
        if let Some(done) = self.check_changing() {
            return done;
        }
        let Some(first) = self.kind(to.start.0) else { return Done::stopped(Pages(0), Trouble::Absent) };
        if !first.registered || first.allowed != Allowed::Write || self.one_mapping(to).is_none() {
            return Done::stopped(Pages(0), Trouble::Unsuitable);
        }
        let whole = is_block(to)
            && self.huge.contains(&from.block())
            && !self.tables.contains(&to.start.block())
            && to.iter().all(|v| matches!(self.places[&v.0].content, Content::Missing));
        for (i, vpn) in to.iter().enumerate() {
            let at = (from + i as u64).0;
            let trouble = match (&self.places[&vpn.0].content, self.staged.get(&at)) {
                (_, None) => Trouble::Absent,
                (_, Some(page)) if page.shared => Trouble::Busy,
                (Content::Missing, Some(_)) => {
                    let page = self.staged.remove(&at).expect("just seen");
                    self.places.get_mut(&vpn.0).expect("it is mapped").content = Content::Page(page);
                    continue;
                }
                _ => Trouble::Present,
            };
            self.note_small(to, from, i as u64);
            return stopped(i as u64, trouble);
        }
        if whole {
            self.huge.remove(&from.block());
            self.huge.insert(to.start.block());
        } else {
            self.note_small(to, from, to.pages().0);
        }
        Done::all(to.pages())
    }

    fn note_small(&mut self, to: PageRange, from: Vpn, pages: u64) {
        if pages > 0 {
            self.tables.insert(to.start.block());
            self.tables.insert((to.start + (pages - 1)).block());
            self.huge.remove(&from.block());
        }
    }

    pub(super) fn collapse(&mut self, block: PageRange) -> Result<(), Trouble> {
        if !is_block(block) || self.one_mapping(block).is_none_or(|k| !k.is_plain()) {
            return Err(Trouble::Unsuitable);
        }
        for vpn in block.iter() {
            match &self.places[&vpn.0].content {
                Content::Page(page) if page.protected => return Err(Trouble::Unsuitable),
                Content::Page(page) if !page.shared => {}
                _ => return Err(Trouble::Busy),
            }
        }
        self.huge.insert(block.start.block());
        self.tables.remove(&block.start.block());
        Ok(())
    }

    pub(super) fn protect(&mut self, range: PageRange, on: bool) -> Result<(), Trouble> {
        if self.changing > 0 {
            return Err(Trouble::Changing);
        }
        let pieces = self.pieces(range);
        if pieces.is_empty() {
            return Err(Trouble::Absent);
        }
        for (piece, kind) in pieces {
            if !kind.registered || kind.buried {
                return Err(Trouble::Absent);
            }
            for (_, place) in self.places.range_mut(piece.start.0..piece.end.0) {
                if let Content::Page(page) = &mut place.content {
                    page.protected = on;
                }
            }
        }
        for piece in range.by_block().filter(|p| !is_block(*p)) {
            self.huge.remove(&piece.start.block());
        }
        Ok(())
    }

    pub(super) fn poison(&mut self, vpn: Vpn) -> Result<(), Trouble> {
        if self.changing > 0 {
            return Err(Trouble::Changing);
        }
        match self.places.get_mut(&vpn.0) {
            Some(place) if place.kind.registered => match place.content {
                Content::Missing => {
                    place.content = Content::Poisoned;
                    Ok(())
                }
                _ => Err(Trouble::Present),
            },
            _ => Err(Trouble::Absent),
        }
    }

    /// Gives the process pages of its own, as MADV_POPULATE_WRITE does.
    pub(super) fn unshare(&mut self, range: PageRange) -> Result<(), Trouble> {
        for vpn in range.iter() {
            match self.access(vpn, true, |_| ()) {
                Ok(()) => {}
                Err(Trap::Refused) => return Err(Trouble::Unsuitable),
                Err(_) => return Err(FAULTED),
            }
        }
        Ok(())
    }

    // --- looking ---

    /// A mark that a page is lost counts as one that is swapped out: it is there.
    pub(super) fn is_present(&self, vpn: Vpn) -> bool {
        match self.places.get(&vpn.0).map(|p| &p.content) {
            Some(Content::Page(_) | Content::Poisoned | Content::Device(..)) => true,
            Some(Content::Missing) | None => false,
        }
    }

    /// Whether a page of the program's is there, and then whether a write to it would go on.
    pub(super) fn mapped(&self, vpn: Vpn) -> Option<bool> {
        match self.places.get(&vpn.0)? {
            Place { content: Content::Page(page), kind } => Some(!(page.protected && kind.registered)),
            _ => None,
        }
    }

    /// How the CPU maps the page at `vpn`, if it does.
    pub(super) fn cpu_page(&self, vpn: Vpn) -> Option<CpuPage> {
        let Place { content, kind } = self.places.get(&vpn.0)?;
        let protected = match content {
            Content::Page(page) => page.protected && kind.registered,
            Content::Device(..) => false,
            Content::Missing | Content::Poisoned => return None,
        };
        let page = CpuPage {
            writable: !protected && kind.allowed == Allowed::Write,
            zero: false,
            huge: self.is_huge(vpn),
            file: false,
        };
        (kind.allowed >= Allowed::Read).then_some(page)
    }

    pub(super) fn is_huge(&self, vpn: Vpn) -> bool {
        self.huge.contains(&vpn.block())
    }

    pub(super) fn has_poison(&self, vpn: Vpn) -> bool {
        self.places.get(&vpn.0).is_some_and(|p| p.kind.buried || matches!(p.content, Content::Poisoned))
    }

    // --- staging ---

    /// The bytes of staged pages; where there is no page they are zero.
    pub(super) fn staged_bytes(&self, range: PageRange) -> Vec<u8> {
        let mut out = vec![0; range.pages().0 as usize * self.page_bytes];
        for (vpn, bytes) in range.iter().zip(out.chunks_exact_mut(self.page_bytes)) {
            if let Some(page) = self.staged.get(&vpn.0) {
                bytes.copy_from_slice(&page.bytes);
            }
        }
        out
    }

    pub(super) fn staged_page(&self, vpn: Vpn) -> Box<[u8]> {
        self.staged.get(&vpn.0).map_or_else(|| self.zeros(), |p| p.bytes.clone())
    }

    /// Writes staged pages; `huge` says that a block written where nothing was becomes one huge page.
    pub(super) fn write_staged(&mut self, range: PageRange, bytes: &[u8], huge: bool) {
        let fresh = range.iter().all(|v| !self.staged.contains_key(&v.0));
        for (vpn, bytes) in range.iter().zip(bytes.chunks_exact(self.page_bytes)) {
            self.staged.insert(vpn.0, Page::new(bytes.into()));
        }
        if huge && fresh && is_block(range) {
            self.huge.insert(range.start.block());
        }
    }

    pub(super) fn drop_staged(&mut self, range: PageRange) {
        range.iter().for_each(|v| drop(self.staged.remove(&v.0)));
        for piece in range.by_block() {
            self.huge.remove(&piece.start.block());
        }
    }
}
