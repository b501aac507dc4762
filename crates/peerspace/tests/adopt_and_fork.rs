//! Memory the program already has (G1, G2, G5), memory kept resident, and forks (G12).

use peerspace::device::soft::Soft;
use peerspace::{Error, Faults, Hint, Space, Use};
use std::io::{Read, Write};

const MIB: usize = 1 << 20;

fn space(faults: Faults, host: usize) -> Space {
    Space::builder().host(host as u64).device(Soft::new(512 << 20).unwrap()).faults(faults).build().expect("a space")
}

fn value(i: usize, salt: u64) -> u64 {
    (i as u64 ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(words: &mut [u64], salt: u64) {
    for (i, w) in words.iter_mut().enumerate() {
        *w = value(i, salt);
    }
}

#[track_caller]
fn verify(words: &[u64], salt: u64) {
    for (i, w) in words.iter().enumerate() {
        assert_eq!(*w, value(i, salt), "word {i} at {w:p}");
    }
}

fn adopt(faults: Faults) {
    let space = space(faults, 8 * MIB);
    let mut memory = vec![0u64; 32 * MIB / 8];
    fill(&mut memory, 1);
    let adopted = space.adopt(memory.as_ptr().cast(), memory.len() * 8).unwrap();
    // What the program reads and writes is what it always was, while most of it has to leave.
    for salt in 2..4 {
        verify(&memory, salt - 1);
        fill(&mut memory, salt);
    }
    space.check();
    let s = space.statistics();
    assert!(s.pages_out > 1000 && s.pages_in > 1000, "{s:?}");
    adopted.release().unwrap();
    verify(&memory, 3);
    // What is left are standby pages that nobody owns any more, and frames that lie ready.
    assert!(space.statistics().used_bytes <= 8 << 20, "{:?}", space.statistics());
    space.check();
}

#[test]
fn adopted_memory_keeps_its_content_by_signal() {
    adopt(Faults::Signal);
}

#[test]
fn adopted_memory_keeps_its_content_by_threads() {
    adopt(Faults::Threads);
}

#[test]
fn what_cannot_be_adopted_is_refused() {
    let space = space(Faults::Signal, 8 * MIB);
    let reason = |r: Result<peerspace::Adopted, Error>| r.expect_err("it was adopted").to_string();
    let on_stack = [0u8; 32 * 1024];
    assert!(reason(space.adopt(on_stack.as_ptr(), on_stack.len())).contains("stack"));
    assert!(reason(space.adopt(std::ptr::null(), 1 << 20)).contains("not mapped"));
    assert!(reason(space.adopt(8 as *const u8, 100)).contains("no whole page"));
    assert!(reason(space.adopt(usize::MAX as *const u8, 4096)).contains("wraps"));
    let code = what_cannot_be_adopted_is_refused as *const u8;
    // Text is a file's: it stays where it is, and none of it leaves RAM for the space's sake (G11).
    let text = space.adopt(code.wrapping_sub(8192), 32768).unwrap();
    assert_eq!(text.in_place(), [text.range()]);
    drop(text);
    let region = space.region(4 * MIB as u64).unwrap();
    assert!(reason(space.adopt(region.as_ptr(), region.len())).contains("managed already"));
    let mut memory = vec![1u8; 4 * MIB];
    let adopted = space.adopt(memory.as_ptr(), memory.len()).unwrap();
    assert!(reason(space.adopt(memory.as_ptr(), memory.len())).contains("managed already"));
    drop(adopted);
    memory.fill(2);
    space.check();
}

/// By signal, a system call finds EFAULT where a page is missing; made resident, it finds the page.
#[test]
fn resident_memory_can_be_handed_to_the_kernel() {
    let space = space(Faults::Signal, 8 * MIB);
    let mut region = space.region(32 * MIB as u64).unwrap();
    fill(region.typed_mut(), 5);
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    for round in 0..200 {
        let at = round * 160_000;
        let part = &mut region.bytes_mut()[at..at + 20_000];
        let before = part.to_vec();
        let resident = space.make_resident(part.as_ptr(), part.len(), Use::Read).unwrap();
        writer.write_all(part).expect("a resident range is written from");
        drop(resident);
        part.fill(0xee);
        let resident = space.make_resident(part.as_ptr(), part.len(), Use::Write).unwrap();
        reader.read_exact(part).expect("a resident range is read to");
        drop(resident);
        assert_eq!(part, before);
    }
    verify(region.typed(), 5);
    space.check();
    assert!(space.make_resident(std::ptr::null(), 4096, Use::Read).is_err());
}

/// H5: what is pinned is counted and bounded, nothing is changed beyond the limit, and a folio with a pinned page stays
/// together.
#[test]
fn h5_pins_are_counted_and_bounded() {
    let space = space(Faults::Signal, 16 * MIB);
    let mut region = space.region(32 * MIB as u64).unwrap();
    fill(region.typed_mut(), 8);
    let pinned = || space.statistics().pinned_bytes as usize;
    let pin = |at: usize, len: usize| space.make_resident(region.as_ptr().wrapping_add(at), len, Use::Write);
    // Three quarters of the budget.
    let a = pin(0, 8 * MIB).unwrap();
    let b = pin(8 * MIB, 4 * MIB - 1).unwrap();
    assert_eq!(pinned(), 12 * MIB);
    let e = pin(20 * MIB, 1).unwrap_err();
    assert!(matches!(e, Error::TooManyPinned { asked: 4096, .. }), "{e}");
    assert!(e.to_string().contains("12582912") && e.to_string().contains("pin_limit"), "{e}");
    // Ranges that are not the space's, and such that wrap.
    drop(b);
    assert!(space.make_resident(std::ptr::null(), MIB, Use::Read).is_err());
    assert!(pin(31 * MIB, 2 * MIB).is_err());
    assert!(pin(0, usize::MAX).is_err());
    assert_eq!(pinned(), 8 * MIB);
    // The same page twice counts twice, and is let go of when both are.
    let c = pin(MIB + 5, 10).unwrap();
    assert_eq!(pinned(), 8 * MIB + 4096);
    drop(a);
    drop(c);
    assert_eq!(pinned(), 0);
    space.check();
    // A page in the midst of a block.
    region.advise(Hint::Sparse).unwrap();
    region.discard(0..2 * MIB).unwrap();
    for page in (0..512).rev() {
        region.bytes_mut()[page * 4096] = 1;
    }
    let one = space.make_resident(region.as_ptr().wrapping_add(MIB), 1, Use::Write).unwrap();
    region.advise(Hint::Normal).unwrap();
    assert_eq!(region.collapse(0..2 * MIB).unwrap(), 0, "a pinned page does not move");
    drop(one);
    space.check();
}

/// Pages that are held stay where they are while everything else has to go.
#[test]
fn held_pages_are_not_reclaimed() {
    let space = space(Faults::Signal, 8 * MIB);
    let mut region = space.region(64 * MIB as u64).unwrap();
    fill(region.typed_mut(), 6);
    let held = space.make_resident(region.as_ptr(), MIB, Use::Write).unwrap();
    let (head, tail) = region.bytes_mut().split_at_mut(MIB);
    tail.iter_mut().step_by(4096).for_each(|b| *b = b.wrapping_add(0));
    // Every page of the held part is in RAM: the kernel itself can read them all without a fault.
    let (mut reader, writer) = std::io::pipe().unwrap();
    for page in head.chunks(4096) {
        assert_eq!((&writer).write(page).expect("a held page was evicted"), page.len());
        reader.read_exact(&mut [0; 4096]).unwrap();
    }
    drop(held);
    verify(region.typed(), 6);
    space.check();
}

/// Runs `child` in a forked process; its result is the parent's to see.
fn in_child(child: impl FnOnce()) {
    // SAFETY: the child runs `child` and ends without returning into the test harness.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends the process.
        unsafe { libc::_exit(result.is_err() as i32) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
}

fn fork_with_data_away(faults: Faults) {
    let space = space(faults, 8 * MIB);
    let mut region = space.region(24 * MIB as u64).unwrap();
    let mut memory = vec![0u64; 24 * MIB / 8];
    let adopted = space.adopt(memory.as_ptr().cast(), memory.len() * 8).unwrap();
    fill(region.typed_mut(), 10);
    fill(&mut memory, 20);
    for round in 0..3 {
        let (a, b) = (10 + round, 20 + round);
        in_child(|| {
            verify(region.typed(), a);
            verify(&memory, b);
            // What the child writes is the child's.
            fill(region.typed_mut(), 100);
            fill(&mut memory, 200);
            verify(region.typed(), 100);
            verify(&memory, 200);
            // And a grandchild gets what the child has now.
            in_child(|| {
                verify(region.typed(), 100);
                verify(&memory, 200);
            });
            verify(&memory, 200);
            space.check();
        });
        verify(region.typed(), a);
        verify(&memory, b);
        fill(region.typed_mut(), a + 1);
        fill(&mut memory, b + 1);
        space.check();
    }
    let s = space.statistics();
    assert_eq!((s.poisoned, s.forced_bytes), (0, 0), "{s:?}");
    drop(adopted);
    verify(&memory, 23);
}

#[test]
fn g12_a_fork_keeps_all_data_on_both_sides_by_signal() {
    fork_with_data_away(Faults::Signal);
}

#[test]
fn g12_a_fork_keeps_all_data_on_both_sides_by_threads() {
    fork_with_data_away(Faults::Threads);
}

/// Memory of the program's own becomes huge on request, and stays in small pages if that is asked for.
#[test]
fn adopted_memory_takes_hints_and_collapses() {
    let space = space(Faults::Signal, 32 * MIB);
    let mut memory = vec![0u64; 8 * MIB / 8];
    let adopted = space.adopt(memory.as_ptr().cast(), 8 * MIB).unwrap();
    adopted.advise(Hint::Sparse).unwrap();
    fill(&mut memory, 3);
    let error = adopted.collapse().unwrap_err().to_string();
    assert!(error.contains("Sparse"), "{error}");
    adopted.advise(Hint::OnRequest).unwrap();
    let blocks = adopted.range().end / (2 * MIB) - adopted.range().start.div_ceil(2 * MIB);
    let huge = adopted.collapse().unwrap();
    let thp = space.statistics().thp;
    if std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|e| !e.contains("[never]")) {
        assert_eq!(huge, blocks * 2 * MIB, "{thp:?}");
    }
    assert_eq!(thp.anon_huge_bytes as usize, huge, "{thp:?}");
    verify(&memory, 3);
    adopted.release().unwrap();
    verify(&memory, 3);
    space.check();
}
