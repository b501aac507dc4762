//! The three protocols that everything rests on, raced against the real kernel: changes of mappings, no silent zeros,
//! clean pages. Beside each stands what would go wrong without it, so that it is known that the test can fail.

use super::*;
use crate::alone::alone;
use peerspace_core::addr::Pages;
use rustix::mm::MremapFlags;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

const PAGE: u64 = 4096;

fn open() -> Linux {
    Linux::open(Setup { delivery: Delivery::Messages, blocks: 1, slots: 64, without: 0 }).unwrap()
}

/// A region of one block.
fn region(k: &Linux) -> VaRange {
    k.map(k.geometry().block_bytes() as u64).unwrap()
}

fn page(range: VaRange, n: u64) -> VaRange {
    VaRange { start: Va(range.start.0 + n * PAGE), end: Va(range.start.0 + (n + 1) * PAGE) }
}

fn slot(k: &Linux, n: u64) -> VaRange {
    let all = k.staging();
    page(VaRange { start: Va(all.end.0 - 64 * PAGE), ..all }, n)
}

/// What the program reads at `va`.
fn read(va: Va) -> u64 {
    // SAFETY: the tests read words of pages that they keep mapped; what is missing is served by another thread.
    unsafe { (va.0 as *const AtomicU64).as_ref() }.expect("an address").load(SeqCst)
}

/// The program writes at `va`.
fn write(va: Va, value: u64) {
    // SAFETY: as above.
    unsafe { (va.0 as *const AtomicU64).as_ref() }.expect("an address").store(value, SeqCst);
}

fn copy(k: &Linux, to: VaRange, value: u64, protect: Protect) -> Done {
    let mut bytes = vec![0; PAGE as usize];
    bytes[..8].copy_from_slice(&value.to_ne_bytes());
    k.copy_in(to.start, &bytes, protect, Wake::Yes)
}

fn staged(k: &Linux, slot: VaRange) -> u64 {
    k.read_staged(slot, |b| u64::from_ne_bytes(b[..8].try_into().expect("eight bytes")))
}

fn munmap(range: VaRange) {
    // SAFETY: the tests' own memory, which nobody refers to.
    unsafe { rustix::mm::munmap(range.start.0 as *mut _, range.len() as usize) }.unwrap();
}

/// Maps ordinary memory at `range`, where nothing is.
fn map_at(range: VaRange) {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: nothing is there, or the call fails.
    unsafe { rustix::mm::mmap_anonymous(range.start.0 as *mut _, range.len() as usize, prot, flags) }.unwrap();
}

/// Waits until `k` has news, or `until` holds.
fn wait_for(until: impl Fn() -> bool) {
    while !until() {
        thread::yield_now();
    }
}

// --- pages that a fork has shared ---

/// A huge page that another process has let go of, mapped in pieces here: its pieces can be moved out, one by one, each when it
/// has been made this process's own. The kernel by itself goes by the first piece, and refuses the others for ever.
#[test]
fn pieces_of_a_huge_page_that_was_shared_can_be_moved() {
    let k = open();
    let len = k.geometry().block_bytes() as u64;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: new memory.
    let at =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 2 * len as usize, prot, flags) }.unwrap() as u64;
    let start = Va(at.next_multiple_of(len));
    let block = VaRange { start, end: Va(start.0 + len) };
    // SAFETY: the advice changes nothing.
    unsafe { libc::madvise(start.0 as *mut _, len as usize, libc::MADV_HUGEPAGE) };
    (0..512).for_each(|n| write(page(block, n).start, n + 1));
    let mut bell = [0; 2];
    // SAFETY: two descriptors, of which the child waits for the end of one.
    assert_eq!(unsafe { libc::pipe(bell.as_mut_ptr()) }, 0);
    // SAFETY: the child does nothing but wait, by system calls, and end.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::close(bell[1]);
            libc::read(bell[0], (&raw mut bell).cast(), 1);
            libc::_exit(0);
        }
    }
    // The kernel breaks the mapping up, and copies this piece.
    write(page(block, 5).start, 77);
    // SAFETY: the child ends, and is waited for.
    unsafe {
        libc::close(bell[0]);
        libc::close(bell[1]);
        assert_eq!(libc::waitpid(child, std::ptr::null_mut(), 0), child);
    }
    k.adopt(block).unwrap();
    for n in [5, 100, 511, 1, 0] {
        let from = page(block, n);
        let first = k.take_out(slot(&k, n % 64).start, from);
        if first.trouble.is_some() {
            assert_eq!((first.trouble, first.pages), (Some(Trouble::Busy), Pages(0)));
            k.unshare(from).unwrap();
            assert_eq!(k.take_out(slot(&k, n % 64).start, from).trouble, None, "page {n}");
        }
        assert_eq!(staged(&k, slot(&k, n % 64)), if n == 5 { 77 } else { n + 1 });
        k.drop_staged(slot(&k, n % 64)).unwrap();
    }
    k.disown(block).unwrap();
    munmap(VaRange { start: Va(at), end: Va(at + 2 * len) });
}

// --- changes of mappings ---

/// From the moment a change is made until somebody receives it, nothing is done to registered memory; trying again
/// never ends; and whoever made the change goes on when it is received.
#[test]
fn operations_are_refused_until_a_change_is_received() {
    let k = open();
    let r = region(&k);
    let _ = copy(&k, page(r, 0), 1, Protect::No);
    k.write_staged(slot(&k, 1), |b| b.fill(2));
    let went_on = AtomicBool::new(false);
    thread::scope(|s| {
        s.spawn(|| {
            munmap(page(r, 8));
            went_on.store(true, SeqCst);
        });
        wait_for(|| k.is_changing());
        for _ in 0..2000 {
            let refused = Done::stopped(Pages(0), Trouble::Changing);
            assert_eq!(k.take_out(slot(&k, 0).start, page(r, 0)), refused);
            assert_eq!(k.put_back(page(r, 1).start, slot(&k, 1), Wake::No), refused);
            assert_eq!(copy(&k, page(r, 1), 3, Protect::No), refused);
            assert_eq!(k.protect(page(r, 0), Protect::Yes, Wake::No), Err(Trouble::Changing));
            assert_eq!(k.poison(page(r, 2).start), Err(Trouble::Changing));
        }
        assert!(!went_on.load(SeqCst), "the program went on before its change was received");
        assert!(k.wait_message(None));
        assert_eq!(k.receive(), Some(Message::Unmap(page(r, 8))));
        wait_for(|| went_on.load(SeqCst));
    });
    wait_for(|| !k.is_changing());
    assert_eq!(k.take_out(slot(&k, 0).start, page(r, 0)), Done::all(Pages(1)));
    assert_eq!(staged(&k, slot(&k, 0)), 1);
}

/// A page is never taken from a mapping that somebody has put in the place of ours, although the news of that waits.
/// Through a descriptor without events, which many pagers use for staging, it is.
#[test]
fn nothing_is_taken_from_a_mapping_that_took_our_place() {
    alone(|| {
        for naive in [false, true] {
            let k = open();
            let r = region(&k);
            let here = page(r, 8);
            let _ = copy(&k, here, 1, Protect::No);
            let other = Mapping::new(PAGE as usize, PAGE as usize, true).unwrap();
            let mut without_events = Uffd::open(false).unwrap();
            without_events.enable(feature::MOVE).unwrap();
            without_events.register(other.range().start.0, PAGE, Mode::Missing).unwrap();
            let taken = thread::scope(|s| {
                s.spawn(|| munmap(here));
                wait_for(|| k.is_changing());
                // The addresses are free already, and a third thread is given them.
                map_at(here);
                write(here.start, 77);
                let taken = if naive {
                    // SAFETY: both ends are the test's own, and read through atomics or not at all.
                    unsafe { without_events.move_pages(other.range().start.0, here.start.0, PAGE, false) }.1.is_none()
                } else {
                    k.take_out(slot(&k, 0).start, here) == Done::all(Pages(1))
                };
                while k.receive().is_none() {}
                taken
            });
            assert_eq!(taken, naive, "naive: {naive}");
            assert_eq!(read(here.start), if naive { 0 } else { 77 }, "naive: {naive}");
            munmap(here);
        }
    });
}

/// Memory of ours that has come to where a scan saw the program's is not taken for that, however late it comes.
#[test]
fn g11_what_is_ours_is_never_registered() {
    alone(|| {
        let k = open();
        // Where nobody is put who does not ask for it.
        let spot = VaRange { start: Va(128 << 30), end: Va((128 << 30) + 16 * PAGE) };
        let rounds = 1000;
        let done = AtomicBool::new(false);
        thread::scope(|s| {
            let adopter = s.spawn(|| {
                let (mut asked, mut taken) = (0, 0);
                while !done.load(SeqCst) {
                    // Nothing is there, or something of ours. If it was taken, it is given back: whoever touched it waits.
                    if k.adopt(spot).is_ok() {
                        taken += 1;
                        let _ = k.disown(spot);
                    }
                    while k.receive().is_some() {}
                    asked += 1;
                }
                (asked, taken)
            });
            let mut hit = 0;
            for _ in 0..rounds {
                let ours = Mapping::near(spot.start.0 as usize, spot.len() as usize, PAGE as usize, true).unwrap();
                hit += (ours.range() == spot) as u32;
                write(ours.range().start, 1);
            }
            done.store(true, SeqCst);
            let (asked, taken) = adopter.join().unwrap();
            assert!(hit > rounds / 2 && asked > 100, "{hit} times at the spot, asked {asked} times");
            assert_eq!(taken, 0, "of {asked} times");
        });
    });
}

/// Discarding, unmapping and operations from all sides: what is told adds up, and pages nobody changed are as they were.
#[test]
fn changes_race_with_operations() {
    let k = open();
    let r = region(&k);
    const ROUNDS: u64 = 300;
    for n in 0..16 {
        let _ = copy(&k, page(r, n), 100 + n, Protect::No);
    }
    let told = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let receiver = s.spawn(|| {
            while !stop.load(SeqCst) {
                if k.wait_message(Some(Duration::from_millis(20))) {
                    match k.receive() {
                        Some(Message::Discard(d)) => {
                            assert_eq!(d, page(r, 20));
                            told.fetch_add(1, SeqCst);
                        }
                        None => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        let mover = s.spawn(|| {
            // Each page goes out and comes back until the changes are over.
            while !stop.load(SeqCst) {
                for n in 0..16 {
                    while k.take_out(slot(&k, n).start, page(r, n)) != Done::all(Pages(1)) {}
                    assert_eq!(staged(&k, slot(&k, n)), 100 + n);
                    while k.put_back(page(r, n).start, slot(&k, n), Wake::No) != Done::all(Pages(1)) {}
                }
            }
        });
        (0..ROUNDS).for_each(|_| k.discard(page(r, 20)).unwrap());
        stop.store(true, SeqCst);
        mover.join().unwrap();
        receiver.join().unwrap();
    });
    assert_eq!(told.load(SeqCst), ROUNDS);
    (0..16).for_each(|n| assert_eq!(read(page(r, n).start), 100 + n));
}

// --- no silent zeros ---

/// Serves faults on `pages` pages of `region`, whose content is staged in the slot of the same number if `away` says
/// so, until `stop`. A page that is in somebody's hands is locked.
fn serve(k: &Linux, region: VaRange, away: &[Mutex<bool>], stop: &AtomicBool) {
    while !stop.load(SeqCst) {
        if !k.wait_message(Some(Duration::from_millis(20))) {
            continue;
        }
        let Some(Message::Fault { va, .. }) = k.receive() else { continue };
        let n = (va.0 - region.start.0) / PAGE;
        let mut away = away[n as usize].lock().unwrap();
        if *away {
            assert_eq!(k.put_back(page(region, n).start, slot(k, n), Wake::Yes), Done::all(Pages(1)), "page {n}");
            *away = false;
        } else {
            k.wake(page(region, n)).unwrap();
        }
    }
}

/// Pages go out and come back under readers, who never see anything else than their content.
#[test]
fn readers_see_no_zeros_while_pages_come_and_go() {
    const PAGES: u64 = 8;
    let k = open();
    let r = region(&k);
    for n in 0..PAGES {
        let _ = copy(&k, page(r, n), 500 + n, Protect::No);
    }
    let away: Vec<Mutex<bool>> = (0..PAGES).map(|_| Mutex::new(false)).collect();
    let (stop, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let taken = thread::scope(|s| {
        s.spawn(|| serve(&k, r, &away, &stop));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                s.spawn(|| {
                    while !over.load(SeqCst) {
                        (0..PAGES).for_each(|n| assert_eq!(read(page(r, n).start), 500 + n, "page {n}"));
                    }
                })
            })
            .collect();
        let mut taken = 0;
        while taken < 3000 && !readers.iter().any(|r| r.is_finished()) {
            let n = taken % PAGES;
            let mut away = away[n as usize].lock().unwrap();
            if !*away {
                assert_eq!(k.take_out(slot(&k, n).start, page(r, n)), Done::all(Pages(1)));
                *away = true;
                taken += 1;
            } else {
                drop(away);
                thread::yield_now();
            }
        }
        over.store(true, SeqCst);
        let readers: Vec<_> = readers.into_iter().map(|r| r.join()).collect();
        stop.store(true, SeqCst);
        readers.into_iter().for_each(|r| r.expect("a reader saw something else"));
        taken
    });
    assert_eq!(taken, 3000);
    // What a reader would have seen: whoever loses the registration for a moment loses the page.
    if !*away[0].lock().unwrap() {
        assert_eq!(k.take_out(slot(&k, 60).start, page(r, 0)), Done::all(Pages(1)));
    }
    k.disown(page(r, 0)).unwrap();
    assert_eq!(read(page(r, 0).start), 0);
}

/// A mapping that moves stays registered: what is away faults at the new place too. Without the event it is zeros.
#[test]
fn a_mapping_that_moves_keeps_its_faults() {
    let moved = |from: VaRange| {
        let to = Mapping::new((4 * PAGE) as usize, PAGE as usize, false).unwrap().leak();
        super::super::map::unclaim(to);
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: the target is the test's own, and nobody uses it; the source is moved as a whole.
        let at = unsafe {
            rustix::mm::mremap_fixed(
                from.start.0 as *mut _,
                from.len() as usize,
                to.len() as usize,
                flags,
                to.start.0 as *mut _,
            )
        };
        assert_eq!(at.unwrap() as u64, to.start.0);
        to
    };
    let k = open();
    let r = region(&k);
    let part = VaRange { start: r.start, end: page(r, 3).end };
    let _ = copy(&k, page(r, 1), 41, Protect::No);
    assert_eq!(k.take_out(slot(&k, 1).start, page(r, 1)), Done::all(Pages(1)));
    thread::scope(|s| {
        let program = s.spawn(|| {
            let to = moved(part);
            (to, read(page(to, 1).start))
        });
        let mut base = r;
        loop {
            assert!(k.wait_message(None));
            match k.receive() {
                Some(Message::Move { from, to, len }) => {
                    assert_eq!((from, len), (part.start, part.len()));
                    base = VaRange { start: to, end: Va(to.0 + len) };
                }
                Some(Message::Fault { va, .. }) => {
                    assert_eq!(va.0 & !(PAGE - 1), page(base, 1).start.0, "the fault is at the new place");
                    assert_eq!(k.put_back(page(base, 1).start, slot(&k, 1), Wake::Yes), Done::all(Pages(1)));
                    break;
                }
                // Where it was, it is unmapped: that is told too, afterwards.
                Some(Message::Unmap(gone)) => assert_eq!((gone, base != r), (part, true)),
                None => {}
                other => panic!("{other:?}"),
            }
        }
        let (to, seen) = program.join().unwrap();
        assert_eq!((to, seen), (base, 41));
    });
    // The same with a descriptor that does not ask for the event.
    let plain = Mapping::new((4 * PAGE) as usize, PAGE as usize, true).unwrap().leak();
    super::super::map::unclaim(plain);
    let mut deaf = Uffd::open(false).unwrap();
    deaf.enable(0).unwrap();
    deaf.register(plain.start.0, plain.len(), Mode::Missing).unwrap();
    assert_eq!(read(moved(plain).start), 0);
}

// --- clean pages ---

/// A page that came by copying, protected, is as it came until a fault says otherwise: no write is ever missed.
#[test]
fn no_write_is_missed_on_a_page_that_came_protected() {
    const ROUNDS: u64 = 1500;
    let k = open();
    let r = region(&k);
    let here = page(r, 0);
    let (go, wrote) = (AtomicU64::new(0), AtomicU64::new(0));
    let (mut dropped, mut written_back) = (0, 0);
    thread::scope(|s| {
        s.spawn(|| {
            for i in 1..=ROUNDS {
                wait_for(|| go.load(SeqCst) == i);
                write(here.start, i);
                wrote.store(i, SeqCst);
            }
        });
        for i in 1..=ROUNDS {
            let before = i - 1;
            assert_eq!(copy(&k, here, before, Protect::Yes), Done::all(Pages(1)));
            go.store(i, SeqCst);
            // At a moment that differs from round to round the page is to go.
            (0..(i * 7919) % 4000).for_each(|_| std::hint::spin_loop());
            let mut dirty = false;
            if let Some(Message::Fault { protected: true, write: true, .. }) = k.receive() {
                k.protect(here, Protect::No, Wake::Yes).unwrap();
                dirty = true;
                wait_for(|| wrote.load(SeqCst) == i);
            }
            assert_eq!(k.take_out(slot(&k, 0).start, here), Done::all(Pages(1)));
            let content = staged(&k, slot(&k, 0));
            k.drop_staged(slot(&k, 0)).unwrap();
            if dirty {
                assert_eq!(content, i, "a write was lost");
                written_back += 1;
                continue;
            }
            // Clean: it may be dropped for what was there before. The writer's fault brings that back.
            assert_eq!(content, before, "a page was written that nobody heard of");
            dropped += 1;
            assert_eq!(copy(&k, here, before, Protect::No), Done::all(Pages(1)));
            wait_for(|| {
                let _ = k.receive();
                k.wake(here).unwrap();
                wrote.load(SeqCst) == i
            });
            assert_eq!(k.take_out(slot(&k, 0).start, here), Done::all(Pages(1)));
            assert_eq!(staged(&k, slot(&k, 0)), i, "a write was lost");
            k.drop_staged(slot(&k, 0)).unwrap();
        }
    });
    assert_eq!(dropped + written_back, ROUNDS);
}

/// What moves in comes unprotected: a write can slip in before it is protected, and only a comparison finds it.
#[test]
fn a_page_that_moved_in_has_to_be_compared() {
    let k = open();
    let r = region(&k);
    let here = page(r, 0);
    k.write_staged(slot(&k, 0), |b| b[..8].copy_from_slice(&5u64.to_ne_bytes()));
    assert_eq!(k.put_back(here.start, slot(&k, 0), Wake::No), Done::all(Pages(1)));
    // No fault stops this one, and none tells of it.
    write(here.start, 6);
    k.protect(here, Protect::Yes, Wake::No).unwrap();
    assert_eq!(k.receive(), None);
    assert_eq!(k.take_out(slot(&k, 0).start, here), Done::all(Pages(1)));
    assert_eq!(staged(&k, slot(&k, 0)), 6, "who calls it clean because it was protected loses a write");
    // Nor does protection survive the way out and back.
    assert_eq!(k.put_back(here.start, slot(&k, 0), Wake::No), Done::all(Pages(1)));
    write(here.start, 7);
    assert_eq!((read(here.start), k.receive()), (7, None));
}

// --- moves that are miscounted ---

/// Two threads take pages out of one huge page at once: each learns exactly which of its pages went. The kernel alone
/// does not say so; see `moved`.
#[test]
fn pages_that_leave_a_huge_page_together_are_counted() {
    alone(|| {
        let k = open();
        let mut stopped = 0u64;
        for round in 0..100u64 {
            let r = region(&k);
            let block = VaRange { start: k.staging().start, end: Va(k.staging().start.0 + r.len()) };
            let bytes: Vec<u8> = (0..r.len()).map(|i| (i / PAGE % 251) as u8 + 1).collect();
            k.write_staged(block, |b| b.copy_from_slice(&bytes));
            assert_eq!(k.put_back(r.start, block, Wake::No), Done::all(Pages(512)));
            let take = |first: u64, pages: u64, at: u64| {
                let from = VaRange { start: page(r, first).start, end: page(r, first + pages).start };
                let done = k.take_out(slot(&k, at).start, from);
                for n in 0..pages {
                    let there = k.is_present(slot(&k, at + n).start).unwrap();
                    assert_eq!(there, n < done.pages.0, "page {n} of {done:?} in round {round}");
                    assert_ne!(there, k.is_present(page(r, first + n).start).unwrap(), "page {n} of {done:?}");
                    if there {
                        let byte = k.read_staged(slot(&k, at + n), |b| b[17]);
                        assert_eq!(byte, ((first + n) % 251) as u8 + 1);
                    }
                }
                (done.pages.0 != pages) as u64
            };
            thread::scope(|s| {
                let other = s.spawn(|| take(23, 23, 23));
                stopped += take(0, 1 + round % 3, 0);
                stopped += other.join().unwrap();
            });
            k.drop_staged(VaRange { start: slot(&k, 0).start, end: slot(&k, 64).start }).unwrap();
            k.unmap(r).unwrap();
        }
        assert!(stopped < 100, "every other move came to nothing");
    });
}

// --- memory of devices in place ---

/// A file of one block in memory.
fn shared(bytes: u64) -> OwnedFd {
    let file = memfd_create("a device", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    file
}

/// What a pager does that thinks of registration last.
fn hide_naively(k: &Linux, range: VaRange) {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let (prot, len) = (ProtFlags::READ | ProtFlags::WRITE, range.len() as usize);
    // SAFETY: the test's own memory, which is read and written as atomic words.
    unsafe { rustix::mm::mmap_anonymous(range.start.0 as *mut _, len, prot, flags) }.unwrap();
    thread::yield_now();
    k.adopt(range).unwrap();
}

/// Z5: a block goes to memory that a device shares and comes back, again and again, under readers who never see zeros and a
/// writer whose writes are never lost. Returns how many zeros were seen.
fn blocks_come_and_go_in_place(rounds: u64, naive: bool) -> u64 {
    let k = open();
    let r = region(&k);
    let staging = VaRange { start: k.staging().start, end: Va(k.staging().start.0 + r.len()) };
    let device = shared(r.len());
    for n in 0..512 {
        let _ = copy(&k, page(r, n), 1000 + n, Protect::No);
    }
    // Held by whoever moves the block: what is missing is on its way.
    let moving = Mutex::new(());
    let (over, ended, zeros) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|s| {
        s.spawn(|| {
            let mut waiting = Vec::new();
            while !ended.load(SeqCst) {
                if k.wait_message(Some(Duration::from_millis(1))) {
                    match k.receive() {
                        Some(Message::Fault { va, .. }) => waiting.push((va.0 - r.start.0) / PAGE),
                        Some(Message::Unmap(range)) => assert!(range == r || !range.overlaps(r), "{range}"),
                        Some(Message::Move { to, len, .. }) => assert_eq!((to, len), (r.start, r.len())),
                        None => {}
                        other => panic!("{other:?}"),
                    }
                }
                if let Ok(_still) = moving.try_lock() {
                    waiting.drain(..).for_each(|n| k.wake(page(r, n)).unwrap());
                }
            }
        });
        let readers: Vec<_> = (0..2)
            .map(|_| {
                s.spawn(|| {
                    while !over.load(SeqCst) {
                        for n in 1..512 {
                            let value = read(page(r, n).start);
                            assert!(value == 1000 + n || value == 0, "page {n}: {value}");
                            zeros.fetch_add((value == 0) as u64, SeqCst);
                        }
                    }
                })
            })
            .collect();
        let writer = s.spawn(|| {
            let (at, mut last) = (r.start, 1000);
            while !over.load(SeqCst) {
                let value = read(at);
                if naive && value != last {
                    return; // that is lost as well
                }
                assert_eq!(value, last, "a write was lost");
                last += 1;
                write(at, last);
            }
        });
        let all = Done::all(Pages(512));
        for _ in 0..rounds {
            {
                let _moving = moving.lock().unwrap();
                while k.take_out(staging.start, r) != all {}
                k.read_staged(staging, |b| rustix::io::pwrite(&device, b, 0)).unwrap();
                k.show(r, SharedMemory { file: device.as_fd(), offset: 0 }).unwrap();
            }
            thread::sleep(Duration::from_micros(300));
            let _moving = moving.lock().unwrap();
            if naive {
                hide_naively(&k, r);
            } else {
                k.hide(r).unwrap();
            }
            k.write_staged(staging, |b| rustix::io::pread(&device, b, 0)).unwrap();
            if naive {
                // Pages of zeros are in the way by now; the others are filled so that everybody comes to an end.
                for n in 0..512 {
                    let _ = copy(&k, page(r, n), 1000 + n, Protect::No);
                }
                break;
            }
            while k.put_back(r.start, staging, Wake::Yes) != all {}
        }
        over.store(true, SeqCst);
        for thread in readers.into_iter().chain([writer]) {
            while !thread.is_finished() {
                k.wake(r).unwrap();
                thread::yield_now();
            }
            thread.join().unwrap();
        }
        ended.store(true, SeqCst);
    });
    zeros.load(SeqCst)
}

#[test]
fn z5_readers_see_no_zeros_while_memory_is_shared_in_place() {
    assert_eq!(blocks_come_and_go_in_place(60, false), 0);
}

#[test]
fn registering_afterwards_shows_zeros() {
    assert!((0..200).any(|_| blocks_come_and_go_in_place(1, true) > 0), "the test above could not fail");
}
