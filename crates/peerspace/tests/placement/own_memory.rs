//! Memory of the program's own: in place of devices, and read-only, where it announces what it does (rules Z5, G1, G5).

use super::common::{self, MIB, page, word, words_per_page};
use super::in_place::coherent;
use super::{both, brought, build, gpu, mappings, own, reserve};
use peerspace::{CpuMapping, Hint, Node, Residence};
use std::ops::Range;

/// Rules Z5, G1: what goes in place may have been adopted, and be used, in many pieces.
#[test]
fn z5_many_pieces_of_a_block_go_in_place() {
    for faults in both() {
        let far = coherent(16, "far");
        let (space, ids) = build(faults, &[&far]);
        let (start, words) = own(2 * MIB);
        let p = page();
        // SAFETY: nothing changes.
        unsafe { space.promise_announcements() };
        let pieces: Vec<_> = (0..40)
            .map(|i| {
                let piece = space.adopt(start.wrapping_add(i * 2 * p), 2 * p).unwrap();
                piece.advise(Hint::ReadMostly(i % 2 == 0)).unwrap();
                piece
            })
            .collect();
        assert_eq!(space.migrate(start, 80 * p, Node::Device(ids[0])).unwrap(), 80 * p);
        let pages = space.pages(start, 80 * p).unwrap();
        assert_eq!(pages.filter(|view| view.residence == Residence::Coherent(ids[0])).count(), 80);
        let good = |(i, page): (usize, &[u64])| page.iter().all(|w| *w == word(i));
        assert!(words.chunks(words_per_page()).enumerate().all(good));
        drop(pieces);
        space.check();
    }
}

/// Rules Z5, G1, G5: memory of the program's own, where it has promised to say what it does with it, and not before.
#[test]
fn z5_adopted_memory_is_in_place_where_changes_are_announced() {
    for faults in both() {
        let (a, b) = (coherent(32, "a"), gpu(16, "b"));
        let (space, ids) = build(faults, &[&a, &b]);
        let (len, p) = (12 * MIB, page());
        let (start, words) = own(len);
        let adopted = space.adopt(start, len).unwrap();
        let node = Node::Device(ids[0]);
        let coherents = || {
            let pages = space.pages(start, len).unwrap();
            pages.filter(|view| view.residence == Residence::Coherent(ids[0])).count() * p
        };
        let good = |words: &[u64], less: Range<usize>| {
            words.chunks(words_per_page()).enumerate().all(|(i, page)| {
                let wanted = if less.contains(&(i * p)) { 0 } else { word(i) };
                page.iter().all(|w| *w == wanted)
            })
        };
        // Without the promise it goes to the device's memory, and not in place.
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), 0);
        assert!(good(words, 0..0));
        // SAFETY: all changes below are announced.
        unsafe { space.promise_announcements() };
        assert_eq!(space.migrate(start.wrapping_add(3 * p), 5 * p, node).unwrap(), 5 * p);
        assert_eq!(coherents(), 5 * p);
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), len);
        let before = brought(&space);
        assert!(good(words, 0..0));
        assert_eq!(brought(&space), before);
        words[700 * 512] = 0;
        words[700 * 512] = word(700);
        space.check();
        // Each call that changes something finds memory of the program's own.
        let part = |from: usize, pages: usize| (start.wrapping_add(from).cast::<libc::c_void>(), pages * p);
        {
            let (at, n) = part(2 * MIB, 3);
            let _announced = space.announce(at.cast(), n);
            assert_eq!(coherents(), len - n, "exactly what is announced leaves");
            // SAFETY: nobody refers to these pages.
            assert_eq!(unsafe { libc::madvise(at, n, libc::MADV_DONTNEED) }, 0);
        }
        let less = 2 * MIB..2 * MIB + 3 * p;
        assert!(good(words, less.clone()));
        {
            let (at, n) = part(5 * MIB, 40);
            let _announced = space.announce(at.cast(), n);
            // SAFETY: nobody writes to these pages before they are writable again.
            assert_eq!(unsafe { libc::mprotect(at, n, libc::PROT_READ) }, 0);
        }
        // What is read-only does not go in place.
        let left = adopted.migrate(node).unwrap();
        assert!(left == len || left == len - 40 * p, "{left}");
        assert_eq!(coherents(), len - 40 * p);
        assert!(good(words, less.clone()));
        {
            let (at, n) = part(5 * MIB, 40);
            let _announced = space.announce(at.cast(), n);
            // SAFETY: as above.
            assert_eq!(unsafe { libc::mprotect(at, n, libc::PROT_READ | libc::PROT_WRITE) }, 0);
        }
        assert_eq!(adopted.migrate(node).unwrap(), len);
        assert_eq!(coherents(), len);
        // Moved elsewhere, in part.
        let (at, n) = part(8 * MIB, 300);
        let moved = {
            // SAFETY: address space of the test's own.
            let to = unsafe {
                libc::mmap(std::ptr::null_mut(), n, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
            };
            let _announced = space.announce_move((at.cast(), n), (to.cast(), n));
            // SAFETY: what is there is not used by its old address any more.
            unsafe { libc::mremap(at, n, n, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) }
        };
        assert_ne!(moved, libc::MAP_FAILED);
        // SAFETY: it has moved there.
        let there = unsafe { std::slice::from_raw_parts(moved.cast::<u64>(), n / 8) };
        assert!(there.chunks(512).enumerate().all(|(i, page)| page.iter().all(|w| *w == word(i + 8 * MIB / p))));
        assert_eq!(space.migrate(moved.cast(), n, node).unwrap(), n);
        assert!(there.chunks(512).enumerate().all(|(i, page)| page[7] == word(i + 8 * MIB / p)));
        space.check();
        // Given up, in place or not.
        adopted.release().unwrap();
        assert!(good(&words[..8 * MIB / 8], less));
        let _announced = space.announce(moved.cast(), n);
        // SAFETY: it is not used any more.
        unsafe { libc::munmap(moved, n) };
    }
}

/// Rules G1, G5: pages that the program may only read migrate where it has promised to announce changes; its writes fail as before.
/// In a process of its own, since a fork is one of all spaces.
#[test]
fn g1_read_only_memory_migrates_where_changes_are_announced() {
    let output = common::in_process("own_memory::read_only_memory_migrates", &[]);
    assert!(output.status.success(), "{}", common::said(&output));
}

#[test]
#[ignore = "run in a process of its own"]
fn read_only_memory_migrates() {
    for faults in both() {
        let a = gpu(32, "a");
        let (space, ids) = build(faults, &[&a]);
        let (len, p) = (8 * MIB, page());
        let (start, words) = own(len);
        let adopted = space.adopt(start, len).unwrap();
        let part = |from: usize| start.wrapping_add(from).cast::<libc::c_void>();
        let protect = |from: usize, len: usize, how| {
            let _announced = space.announce(part(from).cast(), len);
            // SAFETY: nobody writes to these pages meanwhile.
            assert_eq!(unsafe { libc::mprotect(part(from), len, how) }, 0);
        };
        let node = Node::Device(ids[0]);
        protect(MIB, 5 * MIB, libc::PROT_READ);
        assert_eq!(adopted.migrate(node).unwrap(), 3 * MIB, "what may only be read stays");
        // SAFETY: all changes are announced.
        unsafe { space.promise_announcements() };
        assert_eq!(adopted.migrate(node).unwrap(), len);
        let is_good = |words: &[u64]| {
            words.chunks(words_per_page()).enumerate().all(|(i, page)| page.iter().all(|w| *w == word(i)))
        };
        assert!(is_good(words));
        // Read home, it is read-only, and can go again.
        let views: Vec<_> = space.pages(part(2 * MIB).cast(), p).unwrap().collect();
        assert_eq!((views[0].residence, views[0].cpu), (Residence::Host, CpuMapping::ReadOnly));
        for (from, n) in [(2 * MIB, p), (2 * MIB + 3 * p, 2 * MIB), (0, len)] {
            assert_eq!(space.migrate(part(from).cast(), n, node).unwrap(), n);
            assert_eq!(space.migrate(part(from).cast(), n, Node::Host).unwrap(), n);
        }
        assert!(is_good(words));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&format!("{:x}-", start as usize + MIB))).unwrap();
        assert!(line.contains("r--p") && mappings(part(MIB).cast()..part(6 * MIB).cast()) == 1, "{line}");
        // A write ends the process that makes it, wherever the page is.
        assert_eq!(space.migrate(part(3 * MIB).cast(), p, node).unwrap(), p);
        for at in [2 * MIB, 3 * MIB] {
            // SAFETY: the child writes and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: SIGSEGV, which is what is tried.
                unsafe {
                    libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                    start.wrapping_add(at).write_volatile(1);
                    libc::_exit(0)
                }
            }
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
        }
        protect(MIB, 5 * MIB, libc::PROT_READ | libc::PROT_WRITE);
        words[3 * MIB / 8] = word(3 * MIB / p);
        assert!(is_good(words));
        space.check();
        adopted.release().unwrap();
    }
}

/// Rule H2: huge pages of the program's own go as huge folios, however many frames lie ready in staging from those that went before.
#[test]
fn h2_huge_pages_of_the_programs_own_go_whole_again_and_again() {
    for faults in both() {
        let a = gpu(32, "a");
        let (space, ids) = build(faults, &[&a]);
        let len = 8 * MIB;
        let huge = |at: *const u8| space.pages(at, len).unwrap().filter(|view| view.huge).count();
        // Twice as much as the host has room for, altogether.
        for round in 0..16 {
            let whole = reserve(len + 2 * MIB);
            let start = whole.wrapping_add(whole.align_offset(2 * MIB));
            // SAFETY: the test's own mapping, and bytes make words.
            let words = unsafe {
                libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
                std::slice::from_raw_parts_mut(start.cast::<u64>(), len / 8)
            };
            common::fill(words);
            let adopted = space.adopt(start, len).unwrap();
            // As many as the kernel had at hand.
            let before = huge(start);
            assert_eq!(adopted.migrate(Node::Device(ids[0])).unwrap(), len);
            assert!(huge(start) >= before, "round {round}: {} of {before} pages are in huge folios", huge(start));
            assert_eq!(words[len / 8 - 1], word(len / page() - 1));
            drop(adopted);
            // SAFETY: nobody refers to it any more.
            assert_eq!(unsafe { libc::munmap(whole.cast(), len + 2 * MIB) }, 0);
        }
    }
}
