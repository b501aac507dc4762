//! `mremap` of what the program knows as one mapping and the kernel keeps as several.
//!
//! Registration cuts a mapping where what is managed begins or ends, and the kernel does not always join the pieces
//! again. To the program that shows in a single place: `mremap` fails with `EFAULT` when its old range spans mappings.
//! Here the same is done piece by piece. Other threads may see the pieces move one after the other, which nobody can
//! rely on: while a range moves, no address in it is good.
//!
//! From Linux 6.17 on, several mappings can move to a fixed place at once, with holes between them, unless one of them is registered;
//! then the kernel says `EFAULT` when it comes to that, and those before it have moved. So it is asked about one mapping at a
//! time, and if that was cut just then, what has moved of it counts.

use super::interpose::{errno, set_errno};
use super::scan::{Maps, Vma};
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap, mremap_fixed, munmap};
use std::ffi::c_void;
use std::sync::OnceLock;

/// How often a piece is looked up again that has changed since it was looked up: each time something was registered.
const ATTEMPTS: u32 = 64;

/// What `mremap` is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    /// The old range; page-aligned.
    from: VaRange,
    /// The new length in bytes; a multiple of the page size, and not zero.
    len: u64,
    /// Where it must be afterwards (`MREMAP_FIXED`); page-aligned.
    to: Option<Va>,
    /// Whether it may move.
    may_move: bool,
    /// Whether a mapping without content stays where it was (`MREMAP_DONTUNMAP`).
    stays: bool,
}

fn common(a: VaRange, b: VaRange) -> VaRange {
    VaRange { start: a.start.max(b.start), end: a.end.min(b.end) }
}

fn pointer(va: Va) -> *mut c_void {
    va.0 as *mut c_void
}

/// `mremap` as a program calls it, which knows nothing of how its mappings are cut; `real` is the C library's, with the same
/// arguments.
///
/// # Safety
/// As for `mremap`.
pub unsafe fn call(
    (old, old_len): (*mut c_void, usize),
    new_len: usize,
    flags: i32,
    new: *mut c_void,
    real: impl FnOnce() -> *mut c_void,
) -> *mut c_void {
    let request = Request::of((old, old_len), new_len, flags, new);
    // Elsewhere than to a fixed place the kernel moves one mapping or nothing.
    if request.is_none_or(|request| request.to.is_none()) {
        let done = real();
        if done != libc::MAP_FAILED || errno() != libc::EFAULT {
            return done;
        }
    }
    // SAFETY: the caller's ranges.
    match request.map(|request| unsafe { request.carry_out() }) {
        Some(Ok(at)) => pointer(at),
        Some(Err(e)) => {
            set_errno(e.raw_os_error());
            libc::MAP_FAILED
        }
        None => libc::MAP_FAILED,
    }
}

/// Moves `from`, page-aligned, to what begins at `to`, and takes the place of what is there: piece by piece, each in one step. Returns
/// how many bytes have moved, from the start on, and why the rest has not.
///
/// # Safety
/// As for `mremap`: the caller owns both ranges.
pub unsafe fn move_to(from: VaRange, to: Va) -> (u64, Result<(), Errno>) {
    let request = Request { from, len: from.len(), to: Some(to), may_move: true, stays: false };
    let target = VaRange::new(to, from.len()).filter(|target| !target.overlaps(from));
    let Some(target) = target else { return (0, Err(Errno::INVAL)) };
    let maps = match Maps::open() {
        Ok(maps) => maps,
        Err(e) => return (0, Err(e)),
    };
    // What is there is gone with each piece, so there is no way back.
    request.forward(&maps, from, target)
}

impl Request {
    /// What these arguments of `mremap` ask for; `None` where they make no sense, or one that is known here.
    fn of((old, old_len): (*mut c_void, usize), new_len: usize, flags: i32, new: *mut c_void) -> Option<Request> {
        let page = rustix::param::page_size();
        let round = |len: usize| len.checked_next_multiple_of(page).filter(|len| *len > 0).map(|len| len as u64);
        let known = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        if flags & !known != 0 || !(old as usize).is_multiple_of(page) {
            return None;
        }
        let to = (flags & libc::MREMAP_FIXED != 0).then_some(Va(new as u64));
        if to.is_some_and(|to| !to.0.is_multiple_of(page as u64)) {
            return None;
        }
        Some(Request {
            from: VaRange::new(Va(old as u64), round(old_len)?)?,
            len: round(new_len)?,
            to,
            may_move: flags & libc::MREMAP_MAYMOVE != 0,
            stays: flags & libc::MREMAP_DONTUNMAP != 0,
        })
    }

    /// Does it. Returns where the memory is then.
    ///
    /// # Safety
    /// As for `mremap`: the caller owns the old range, and with `to` the new one as well.
    ///
    /// # Errors
    /// `EFAULT` when the old range has holes, unless the kernel minds none; and where anything else is asked for than to move it as it is
    /// to a fixed place, when its mappings are not of one kind, or not private and anonymous; what `mremap` says otherwise.
    /// Nothing has moved then, unless the kernel refused to undo it.
    unsafe fn carry_out(self) -> Result<Va, Errno> {
        let maps = Maps::open().map_err(|_| Errno::FAULT)?;
        let Request { from, len, to, .. } = self;
        if self.stays && len != from.len() {
            return Err(Errno::INVAL);
        }
        let shrunk = VaRange { end: Va(from.start.0 + len.min(from.len())), ..from };
        // SAFETY: the caller's; so for all that is unmapped or moved below.
        let cut = || unsafe {
            if shrunk.end < from.end { munmap(pointer(shrunk.end), (from.len() - len) as usize) } else { Ok(()) }
        };
        if let Some(to) = to {
            let target = VaRange::new(to, len).ok_or(Errno::INVAL)?;
            if target.overlaps(from) || !self.may_move {
                return Err(Errno::INVAL);
            }
            // Each goes as it is; but what is made longer is one to the program.
            if len > from.len() { self.kind(&maps).map(drop) } else { self.may_have_its_holes(&maps) }?;
            cut()?;
            return self.pieces(&maps, shrunk, target).map(|()| to);
        }
        let kind = self.kind(&maps)?;
        if !self.stays {
            if len <= from.len() {
                return cut().map(|()| from.start);
            }
            match self.grow_in_place(&maps) {
                Err(Errno::NOMEM) if self.may_move => {}
                other => return other.map(|()| from.start),
            }
        }
        // SAFETY: a new mapping, of which nobody knows.
        let room = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len as usize, kind, MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        let target = VaRange { start: Va(room as u64), end: Va(room as u64 + len) };
        self.pieces(&maps, from, target).inspect_err(|_| {
            // SAFETY: made above, and nothing is in it.
            let _ = unsafe { munmap(room, len as usize) };
        })?;
        Ok(target.start)
    }

    /// Checks that something is mapped in all of the old range, or the kernel minds no holes in such a request.
    fn may_have_its_holes(&self, maps: &Maps) -> Result<(), Errno> {
        let mut at = self.from.start;
        while at < self.from.end {
            let Some(vma) = maps.at(at)? else {
                if is_mapped(at) {
                    continue;
                }
                let minds = at == self.from.start || self.len != self.from.len() || !moves_around_holes();
                return if minds { Err(Errno::FAULT) } else { Ok(()) };
            };
            at = vma.range.end;
        }
        Ok(())
    }

    /// What may be done with the old range, if it is all of one kind.
    fn kind(&self, maps: &Maps) -> Result<ProtFlags, Errno> {
        let permissions = |v: &Vma| (v.read, v.write, v.execute);
        let mut at = self.from.start;
        let mut first = None;
        while at < self.from.end {
            let vma = maps.at(at)?.filter(|v| !v.shared && !v.file).ok_or(Errno::FAULT)?;
            if *first.get_or_insert(permissions(&vma)) != permissions(&vma) {
                return Err(Errno::FAULT);
            }
            at = vma.range.end;
        }
        let (read, write, execute) = first.ok_or(Errno::FAULT)?;
        let flag = |on: bool, flag: ProtFlags| if on { flag } else { ProtFlags::empty() };
        Ok(flag(read, ProtFlags::READ) | flag(write, ProtFlags::WRITE) | flag(execute, ProtFlags::EXEC))
    }

    /// Makes the last piece longer.
    fn grow_in_place(&self, maps: &Maps) -> Result<(), Errno> {
        let more = self.len - self.from.len();
        let last = |piece: VaRange| {
            // SAFETY: the end of the caller's range; it does not move.
            unsafe {
                mremap(
                    pointer(piece.start),
                    piece.len() as usize,
                    (piece.len() + more) as usize,
                    MremapFlags::empty(),
                )
            }
        };
        for _ in 0..ATTEMPTS {
            let vma = maps.at(Va(self.from.end.0 - 1))?.ok_or(Errno::FAULT)?;
            if vma.range.end != self.from.end {
                return Err(Errno::NOMEM); // something else follows
            }
            match last(common(vma.range, self.from)) {
                Err(Errno::FAULT) => {}
                done => return done.map(drop),
            }
        }
        Err(Errno::FAULT)
    }

    /// Moves all of `from` to the start of `to`, and makes the last piece as long as `to` is; or moves back what has moved.
    fn pieces(&self, maps: &Maps, from: VaRange, to: VaRange) -> Result<(), Errno> {
        let (done, result) = self.forward(maps, from, to);
        if result.is_err() && done > 0 && to.start != from.start {
            let from = VaRange { start: from.start, end: Va(from.start.0 + done) };
            let to = VaRange { start: to.start, end: Va(to.start.0 + done) };
            let undo = Request { from: to, len: done, to: Some(from.start), ..*self };
            let _ = undo.forward(maps, to, from);
        }
        result
    }

    /// Moves pieces of `from` to the start of `to`, and makes the last as long as `to` is. Returns how much has moved, or was a hole.
    fn forward(&self, maps: &Maps, from: VaRange, to: VaRange) -> (u64, Result<(), Errno>) {
        let mut done = 0;
        while done < from.len() {
            match self.piece(
                maps,
                VaRange { start: Va(from.start.0 + done), ..from },
                VaRange { start: Va(to.start.0 + done), ..to },
            ) {
                Ok(len) => done += len,
                Err(e) => return (done, Err(e)),
            }
        }
        (done, Ok(()))
    }

    /// Moves the first piece of `from`, or skips a hole. Returns its length.
    fn piece(&self, maps: &Maps, from: VaRange, to: VaRange) -> Result<u64, Errno> {
        let flags = if self.stays { MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP } else { MremapFlags::MAYMOVE };
        for _ in 0..ATTEMPTS {
            let vma = maps.at_or_after(from.start)?;
            let next = vma.as_ref().map_or(from.end, |vma| vma.range.start.max(from.start).min(from.end));
            if next > from.start && is_mapped(from.start) {
                continue;
            }
            let Some(vma) = vma.filter(|_| next == from.start) else {
                // There was none when it was looked through, or it has moved, and what is behind it has not.
                return Ok(next.0 - from.start.0);
            };
            let piece = common(vma.range, from);
            let len = if piece.end == from.end { to.len() } else { piece.len() };
            // SAFETY: the caller owns both ranges.
            match unsafe {
                mremap_fixed(pointer(piece.start), piece.len() as usize, len as usize, flags, pointer(to.start))
            } {
                Ok(_) => return Ok(piece.len()),
                Err(Errno::FAULT) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Errno::FAULT)
    }
}

/// Whether something is mapped at `va`, page-aligned, for certain: a look at the mappings takes no lock that keeps them from being split and
/// joined meanwhile.
pub(super) fn is_mapped(va: Va) -> bool {
    let mut resident = 0u8;
    // SAFETY: one page, and room for what is said of it.
    let said = unsafe { libc::mincore(pointer(va), rustix::param::page_size(), &raw mut resident) };
    said == 0 || errno() != libc::ENOMEM
}

/// Whether the kernel moves what has holes to a fixed place: from 6.17 on.
fn moves_around_holes() -> bool {
    static MOVES: OnceLock<bool> = OnceLock::new();
    *MOVES.get_or_init(|| {
        let page = rustix::param::page_size();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: new memory, of which nobody else knows, and parts of it.
        unsafe {
            let Ok(all) = mmap_anonymous(std::ptr::null_mut(), 6 * page, ProtFlags::empty(), flags) else {
                return false;
            };
            let (hole, to) = (all.wrapping_byte_add(page), all.wrapping_byte_add(3 * page));
            let moved =
                munmap(hole, page).and_then(|()| mremap_fixed(all, 3 * page, 3 * page, MremapFlags::MAYMOVE, to));
            // Each of what is mapped by itself: in the holes may be somebody else's by now.
            let left = if moved.is_ok() {
                [None, None, Some(3), Some(4), Some(5)]
            } else {
                [Some(0), Some(2), Some(3), Some(4), Some(5)]
            };
            for nth in left.into_iter().flatten() {
                let _ = munmap(all.wrapping_byte_add(nth * page), page);
            }
            moved.is_ok()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::alone;
    use crate::linux::uffd::{Mode, Uffd};
    use rustix::mm::{MprotectFlags, mprotect};

    fn page() -> u64 {
        rustix::param::page_size() as u64
    }

    fn map(pages: u64) -> Va {
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), (pages * page()) as usize, rw, MapFlags::PRIVATE) };
        Va(at.unwrap() as u64)
    }

    /// `n` pages from page `first` of what begins at `start`.
    fn part(start: Va, first: u64, n: u64) -> VaRange {
        let start = Va(start.0 + first * page());
        VaRange { start, end: Va(start.0 + n * page()) }
    }

    fn unmap(range: VaRange) {
        // SAFETY: memory of these tests.
        unsafe { munmap(pointer(range.start), range.len() as usize) }.unwrap();
    }

    /// Five pages in three mappings that the kernel does not join, since each got its pages elsewhere, with eleven more
    /// pages mapped behind them. Page `n` begins with 7 + `n`.
    fn cut() -> VaRange {
        let start = map(16);
        for (first, n) in [(0, 2), (2, 1), (3, 2)] {
            let (from, to) = (map(n), part(start, first, n));
            for i in 0..n {
                // SAFETY: mapped above.
                unsafe { (part(from, i, 1).start.0 as *mut u64).write(7 + first + i) };
            }
            let len = to.len() as usize;
            // SAFETY: both ranges were mapped above.
            unsafe { mremap_fixed(pointer(from), len, len, MremapFlags::MAYMOVE, pointer(to.start)) }.unwrap();
        }
        part(start, 0, 5)
    }

    /// Compares pages of what began as [`cut`] and is now at `at`, and grew.
    fn expect(at: Va, pages: std::ops::Range<u64>) {
        for n in pages {
            // SAFETY: mapped and readable.
            let found = unsafe { (part(at, n, 1).start.0 as *const u64).read() };
            assert_eq!(found, if n < 5 { 7 + n } else { 0 }, "page {n}");
        }
    }

    fn ask(from: VaRange, pages: u64) -> Request {
        Request { from, len: pages * page(), to: None, may_move: true, stays: false }
    }

    fn carry_out(request: Request) -> Result<Va, Errno> {
        // SAFETY: memory of these tests.
        unsafe { request.carry_out() }
    }

    #[test]
    fn what_the_kernel_refuses_is_done_in_pieces() {
        alone(|| {
            let from = cut();
            let (old, new) = (from.len() as usize, 40 * page() as usize);
            // SAFETY: our own memory.
            let kernel = unsafe { mremap(pointer(from.start), old, new, MremapFlags::MAYMOVE) };
            assert_eq!(kernel, Err(Errno::FAULT), "else this test shows nothing");
            let to = carry_out(ask(from, 40)).unwrap();
            assert_ne!(to, from.start);
            expect(to, 0..40);
            assert!(
                !is_mapped(from.start) && !is_mapped(part(from.start, 4, 1).start),
                "nothing is left where it was"
            );
        });
    }

    #[test]
    fn a_part_of_a_mapping_moves_to_a_fixed_place() {
        alone(|| {
            let (from, to) = (cut(), map(2));
            // SAFETY: memory of this test.
            unsafe { move_to(part(from.start, 1, 1), to) }.1.unwrap();
            // SAFETY: mapped and readable.
            assert_eq!(unsafe { (to.0 as *const u64).read() }, 8);
            assert_eq!([0, 1, 2].map(|n| is_mapped(part(from.start, n, 1).start)), [true, false, true]);
        });
    }

    #[test]
    fn it_grows_and_shrinks_in_place() {
        alone(|| {
            let from = cut();
            let stays = Request { may_move: false, ..ask(from, 9) };
            assert_eq!(carry_out(stays), Err(Errno::NOMEM), "something is in the way");
            unmap(part(from.start, 5, 11));
            assert_eq!(carry_out(stays), Ok(from.start));
            expect(from.start, 0..9);
            assert_eq!(carry_out(ask(part(from.start, 0, 9), 3)), Ok(from.start));
            expect(from.start, 0..3);
            assert!(!is_mapped(part(from.start, 3, 1).start));
        });
    }

    #[test]
    fn it_goes_to_a_fixed_place_and_may_leave_an_empty_mapping() {
        alone(|| {
            let (from, over) = (cut(), cut().start);
            assert_eq!(carry_out(Request { to: Some(over), stays: true, ..ask(from, 5) }), Ok(over));
            expect(over, 0..5);
            for n in 0..5 {
                // SAFETY: it stays mapped.
                assert_eq!(unsafe { (part(from.start, n, 1).start.0 as *const u64).read() }, 0);
            }
            let back = Request { to: Some(from.start), ..ask(part(over, 0, 5), 9) };
            assert_eq!(carry_out(back), Ok(from.start));
            expect(from.start, 0..9);
            assert!(!is_mapped(over));
        });
    }

    /// Rule G5: where a later one of several mappings is registered the kernel stops in the middle (from 6.17 on); here all of it moves.
    #[test]
    fn g5_all_of_it_moves_to_a_fixed_place_whatever_is_registered() {
        alone(|| {
            for (first, n) in [(0, 5), (2, 1), (3, 2), (0, 2)] {
                let from = cut();
                let managed = part(from.start, first, n);
                // It asks for no news, so nobody has to receive any.
                let mut uffd = Uffd::open(false).unwrap();
                uffd.enable(0).unwrap();
                uffd.register(managed.start.0, managed.len(), Mode::Missing).unwrap();
                let to = map(5);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let len = from.len() as usize;
                // SAFETY: both ranges were mapped above.
                let done = unsafe {
                    call((pointer(from.start), len), len, flags, pointer(to), || {
                        unreachable!("it is asked piece by piece")
                    })
                };
                assert_eq!(done, pointer(to));
                expect(to, 0..5);
                assert!((0..5).all(|i| !is_mapped(part(from.start, i, 1).start)));
            }
        });
    }

    /// What has moved in the place of something else stays there: what was there is gone.
    #[test]
    fn what_cannot_go_on_does_not_go_back() {
        alone(|| {
            const MSEAL: libc::c_long = 462;
            let (from, to) = (map(3), map(3));
            let all = VaRange { start: from, end: Va(from.0 + 3 * page()) };
            let last = part(from, 2, 1);
            (0..3u64).for_each(|n| {
                // SAFETY: memory of this test; so for all below.
                unsafe { (part(from, n, 1).start.0 as *mut u64).write(7 + n) };
            });
            // SAFETY: see above. It stays mapped for good.
            let sealed = unsafe {
                mprotect(pointer(last.start), page() as usize, MprotectFlags::READ).unwrap();
                libc::syscall(MSEAL, last.start.0, page(), 0)
            };
            if sealed != 0 {
                return; // Linux 6.10 is the first that can
            }
            // SAFETY: see above.
            assert_eq!(unsafe { move_to(all, to) }, (2 * page(), Err(Errno::PERM)));
            assert_eq!([0, 1, 2].map(|n| is_mapped(part(from, n, 1).start)), [false, false, true]);
            let words = [part(to, 0, 1), part(to, 1, 1), last].map(|page| {
                // SAFETY: mapped and readable.
                unsafe { (page.start.0 as *const u64).read() }
            });
            assert_eq!(words, [7, 8, 9]);
        });
    }

    #[test]
    fn holes_move_where_the_kernel_moves_them() {
        alone(|| {
            let ask_kernel = |from: VaRange, to: Va| {
                let len = from.len() as usize;
                // SAFETY: memory of this test.
                unsafe { mremap_fixed(pointer(from.start), len, len, MremapFlags::MAYMOVE, pointer(to)) }.map(drop)
            };
            let ask_us = |from: VaRange, to: Va| {
                carry_out(Request { to: Some(to), ..ask(from, from.len() / page()) }).map(drop)
            };
            for hole in [0, 1, 4] {
                let run = |ask: &dyn Fn(VaRange, Va) -> Result<(), Errno>| {
                    let (from, to) = (cut(), map(5));
                    unmap(part(from.start, hole, 1));
                    let done = ask(from, to);
                    let there = |start: Va| (0..5).map(|n| is_mapped(part(start, n, 1).start)).collect::<Vec<_>>();
                    // Where the hole comes to be, something is mapped already.
                    let words = there(to).into_iter().enumerate().map(|(n, there)| {
                        // SAFETY: it is mapped.
                        there.then(|| unsafe { (part(to, n as u64, 1).start.0 as *const u64).read() })
                    });
                    (done, words.collect::<Vec<_>>(), there(from.start))
                };
                assert_eq!(run(&ask_us), run(&ask_kernel), "page {hole} is not there");
            }
        });
    }

    #[test]
    fn what_is_not_one_mapping_to_the_program_is_refused_and_stays() {
        alone(|| {
            let from = cut();
            let [second, last] = [1, 4].map(|n| part(from.start, n, 1).start);
            assert_eq!(carry_out(Request { to: Some(second), ..ask(from, 5) }), Err(Errno::INVAL), "they overlap");
            assert_eq!(carry_out(Request { stays: true, ..ask(from, 6) }), Err(Errno::INVAL));
            // SAFETY: our own.
            unsafe { mprotect(pointer(last), page() as usize, MprotectFlags::READ) }.unwrap();
            assert_eq!(carry_out(ask(from, 40)), Err(Errno::FAULT));
            expect(from.start, 0..5);
            unmap(part(second, 0, 1));
            assert_eq!(carry_out(ask(part(from.start, 0, 4), 40)), Err(Errno::FAULT));
            expect(from.start, 0..1);
            expect(from.start, 2..5);
        });
    }
}
