//! Which of the program's mappings can be managed.
//!
//! Private anonymous memory that can be read and written, without everything that must never be missing: loaded
//! segments and their .bss (which the kernel may show as one mapping with memory of another origin), thread stacks,
//! the control block and thread-local storage of the first thread, alternate signal stacks, the headers of malloc's
//! arenas, and our own memory.

use super::stacks;
use peerspace_core::addr::{Geometry, Va, VaRange};
use peerspace_os::linux::files::OurFd;
use peerspace_os::linux::fork::{is_arena_start, may_become_arena};
use peerspace_os::linux::map::{ours_within, set_apart};
use peerspace_os::linux::scan::{Maps, Vma, VmaName};
use peerspace_os::own::{Own, Vec};

/// Smaller pieces are left to the kernel: what they cost is more than what they hold.
const LEAST: u64 = 64 << 10;
/// Something that can be managed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) range: VaRange,
    /// The mapping it is in.
    pub(super) mapping: VaRange,
}

/// Ranges to be left out: collected anew for each search.
#[derive(Debug)]
pub(super) struct Search {
    geometry: Geometry,
    memory: &'static OurFd,
    excluded: Vec<VaRange>,
    found: Vec<Candidate>,
    mappings: Vec<VaRange>,
}

impl Search {
    /// `memory` is `/proc/self/mem`.
    pub(super) fn new(geometry: Geometry, memory: &'static OurFd) -> Search {
        let empty = || Vec::new_in(Own);
        Search { geometry, memory, excluded: empty(), found: Vec::new_in(Own), mappings: empty() }
    }

    /// What can be managed now and is not part of what `managed` says. `fixed` are ranges to be left out always.
    pub(super) fn candidates(
        &mut self,
        maps: &Maps,
        fixed: &[VaRange],
        mut managed: impl FnMut(VaRange, &mut dyn FnMut(VaRange)),
    ) -> rustix::io::Result<&[Candidate]> {
        self.excluded.clear();
        self.found.clear();
        self.mappings.clear();
        self.excluded.extend_from_slice(fixed);
        let (excluded, mappings, memory) = (&mut self.excluded, &mut self.mappings, self.memory);
        maps.each(&mut |vma: Vma| {
            if vma.file && vma.read {
                loaded_segments(memory, vma.range.start, &mut |r| excluded.push(r));
            }
            if vma.is_plain() {
                mappings.push(vma.range);
            } else if vma.name == VmaName::Stack {
                excluded.push(vma.range);
            }
        })?;
        stacks::for_each(|r| mappings.contains(&r), |r| excluded.push(r));
        for i in 0..self.mappings.len() {
            let vma = self.mappings[i];
            if may_become_arena(vma.start, vma.len()) {
                continue; // until the next search
            }
            let mut inside: Vec<VaRange> = Vec::new_in(Own);
            inside.extend(self.excluded.iter().copied().filter(|e| e.overlaps(vma)));
            inside.extend(ours_within(vma));
            managed(vma, &mut |r| inside.push(r));
            if is_arena_start(vma.start) {
                let page = self.geometry.page_bytes() as u64;
                inside.push(VaRange { start: vma.start, end: Va(vma.start.0 + page) });
            }
            inside.sort_unstable_by_key(|r| r.start);
            let mut at = vma.start;
            for hole in inside.iter().copied().chain([VaRange { start: vma.end, end: vma.end }]) {
                let piece = VaRange { start: at, end: hole.start.min(vma.end).max(at) };
                let piece = self.geometry.range(self.geometry.pages_inside(piece));
                if piece.len() >= LEAST {
                    self.found.push(Candidate { range: piece, mapping: vma });
                }
                at = at.max(hole.end);
            }
        }
        Ok(&self.found)
    }
}

/// The mapping that holds the calling thread's control block, at `pointer`: to be called on the program's first thread,
/// before the program maps anything. From then on the kernel makes no mapping of the program's part of it.
pub fn first_thread_control(pointer: u64) -> VaRange {
    let around = |bytes: u64| VaRange { start: Va(pointer.saturating_sub(bytes)), end: Va(pointer + bytes) };
    let mapping = Maps::open().and_then(|maps| maps.at(Va(pointer))).ok().flatten().map(|vma| vma.range);
    let mapping = mapping.unwrap_or_else(|| around(64 << 10));
    set_apart(mapping);
    mapping
}

/// If an ELF object is mapped at `base`, calls `each` with the memory its segments take up, .bss included.
///
/// Reads through the kernel, because the object may be unmapped at any moment.
fn loaded_segments(memory: &OurFd, base: Va, each: &mut dyn FnMut(VaRange)) {
    const PT_LOAD: u32 = 1;
    const ET_EXEC: u16 = 2;
    let mut header = [0u8; 64];
    if rustix::io::pread(memory, &mut header, base.0) != Ok(64) || !header.starts_with(b"\x7fELF\x02") {
        return;
    }
    let u16_at = |b: &[u8], at: usize| u16::from_ne_bytes([b[at], b[at + 1]]);
    let u64_at = |b: &[u8], at: usize| u64::from_ne_bytes(b[at..at + 8].try_into().unwrap_or_default());
    let (kind, table, size, count) =
        (u16_at(&header, 16), u64_at(&header, 32), u16_at(&header, 54) as u64, u16_at(&header, 56));
    let slide = if kind == ET_EXEC { 0 } else { base.0 };
    for i in 0..count.min(64) as u64 {
        let mut segment = [0u8; 56];
        let at = base.0.wrapping_add(table).wrapping_add(i * size);
        if rustix::io::pread(memory, &mut segment, at) != Ok(56) {
            return;
        }
        if u32::from_ne_bytes(segment[..4].try_into().unwrap_or_default()) == PT_LOAD {
            let (address, len) = (u64_at(&segment, 16), u64_at(&segment, 40));
            if let Some(range) = VaRange::new(Va(slide.wrapping_add(address)), len) {
                // To the end of its last page, whatever the page size.
                each(VaRange { end: Va(range.end.0.next_multiple_of(65536)), ..range });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerspace_os::linux::map::Mapping;

    static mut BSS: [u8; 1 << 20] = [0; 1 << 20];

    #[test]
    fn the_heap_is_found_and_what_must_stay_is_not() {
        use rustix::fs::{Mode, OFlags, open};
        let memory = OurFd::new(open("/proc/self/mem", OFlags::RDONLY, Mode::empty()).unwrap()).unwrap();
        let mut search = Search::new(Geometry::KIB4, std::boxed::Box::leak(std::boxed::Box::new(memory)));
        let maps = Maps::open().unwrap();
        let heap = std::vec![1u8; 8 << 20];
        let own = Mapping::new(8 << 20, 4096, true).unwrap();
        let stack = [0u8; 64];
        let here = Va(stack.as_ptr() as u64 & !0xffff);
        stacks::enter(VaRange { start: here, end: Va(here.0 + 0x10000) });
        let taken = VaRange::new(Va((heap.as_ptr() as u64 + (4 << 20)) & !4095), 1 << 20).unwrap();
        let found = search
            .candidates(&maps, &[], |vma, each| {
                if vma.overlaps(taken) {
                    each(taken);
                }
            })
            .unwrap();
        let found: std::vec::Vec<_> = found.iter().map(|c| c.range).collect();
        let has = |p: *const u8| found.iter().any(|r| r.contains(Va(p as u64)));
        assert!(has(heap.as_ptr().wrapping_add(1 << 20)) && has(heap.as_ptr().wrapping_add(6 << 20)));
        assert!(!has(taken.start.0 as *const u8));
        assert!(!has(own.as_ptr()));
        assert!(!has(std::hint::black_box(stack.as_ptr())));
        assert!(!has((&raw const BSS).cast::<u8>().wrapping_add(1 << 19)));
        assert!(!has(the_heap_is_found_and_what_must_stay_is_not as *const u8));
        for (i, a) in found.iter().enumerate() {
            assert!(found[i + 1..].iter().all(|b| !a.overlaps(*b)) && a.len() >= LEAST);
        }
    }
}
