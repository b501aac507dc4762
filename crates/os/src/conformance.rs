//! The same facts asked of every kernel: what the simulated one says must be what the real one does.

use crate::inject::Inject;
use crate::kernel::{Capabilities, CpuPage, Done, Kernel, Message, Protect, SharedMemory, Trouble, Wake};
use crate::sim::{Setup as SimSetup, Sim};
use peerspace_core::addr::{Access, Geometry, Pages, Va, VaRange};
use peerspace_core::words::Words;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const BLOCKS: u64 = 2;
const SLOTS: u64 = 64;

/// A kernel with a region of one block, and places in its staging.
struct Tried<'k, K> {
    k: &'k K,
    geometry: Geometry,
    region: VaRange,
}

impl<K: Kernel> Tried<'_, K> {
    fn part(&self, range: VaRange, first: u64, pages: u64) -> VaRange {
        let start = Va(range.start.0 + self.geometry.bytes(Pages(first)));
        VaRange { start, end: Va(start.0 + self.geometry.bytes(Pages(pages))) }
    }

    fn pages(&self, first: u64, pages: u64) -> VaRange {
        self.part(self.region, first, pages)
    }

    fn slots(&self, first: u64, slots: u64) -> VaRange {
        let staging = self.k.staging();
        let all = self.geometry.pages_in(staging.len()).0;
        self.part(staging, all - SLOTS + first, slots)
    }

    fn bytes(&self, pages: u64, value: u8) -> Vec<u8> {
        vec![value; self.geometry.bytes(Pages(pages)) as usize]
    }

    fn copy(&self, first: u64, pages: u64, value: u8, protect: Protect) -> Done {
        self.k.copy_in(self.pages(first, pages).start, &self.bytes(pages, value), protect, Wake::No)
    }

    fn there(&self, first: u64, pages: u64) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        let page = |va: Va| self.geometry.pages_in(va.0 - self.region.start.0).0;
        self.k.present_runs(self.pages(first, pages), &mut |r| out.push((page(r.start), page(r.end)))).unwrap();
        out
    }

    /// Which pages the CPU maps, and whether as huge pages and to be written.
    fn mapped(&self) -> Vec<(u64, u64, bool, bool)> {
        let mut out: Vec<(u64, u64, bool, bool)> = Vec::new();
        let page = |va: Va| self.geometry.pages_in(va.0 - self.region.start.0).0;
        let mut seen = |r: VaRange, p: CpuPage| match out.last_mut() {
            Some(last) if (last.1, last.2, last.3) == (page(r.start), p.huge, p.writable) => last.1 = page(r.end),
            _ => out.push((page(r.start), page(r.end), p.huge, p.writable)),
        };
        self.k.cpu_runs(self.region, &mut seen).unwrap();
        out
    }

    fn staged(&self, slot: u64) -> u8 {
        self.k.read_staged(self.slots(slot, 1), |b| {
            assert!(b.iter().all(|x| *x == b[0]), "slot {slot} holds more than one value");
            b[0]
        })
    }
}

fn stopped(pages: u64, trouble: Trouble) -> Done {
    Done::stopped(Pages(pages), trouble)
}

fn tried<K: Kernel>(k: &K, run: impl FnOnce(Tried<'_, K>)) {
    let geometry = k.geometry();
    let region = k.map(geometry.block_bytes() as u64).unwrap();
    assert!(region.start.is_aligned(geometry.block_bytes()));
    run(Tried { k, geometry, region });
    k.unmap(region).unwrap();
}

fn pages_come_where_none_are<K: Kernel>(t: Tried<'_, K>) {
    assert_eq!(t.there(0, 512), []);
    assert_eq!(t.copy(3, 2, 7, Protect::No), Done::all(Pages(2)));
    assert_eq!(t.there(0, 512), [(3, 5)]);
    // Up to the first page that is there, and none behind it. Why, is not said before it is tried again.
    assert_eq!(t.copy(1, 6, 8, Protect::No), stopped(2, Trouble::Changing));
    assert_eq!(t.copy(3, 4, 8, Protect::No), stopped(0, Trouble::Present));
    assert_eq!(t.there(0, 512), [(1, 5)]);
    assert_eq!(t.k.zero_in(t.pages(5, 3), Protect::No, Wake::No), Done::all(Pages(3)));
    assert_eq!(t.there(0, 512), [(1, 8)]);
    assert!(t.k.is_present(t.pages(7, 1).start).unwrap());
    assert!(!t.k.is_present(t.pages(8, 1).start).unwrap());
    // Beyond the end of the mapping: nothing at all.
    assert_eq!(t.k.zero_in(t.pages(508, 8), Protect::No, Wake::No), stopped(0, Trouble::Absent));
    assert_eq!(t.there(8, 504), []);
    assert_eq!(t.k.mapping_at(t.pages(9, 1).start).unwrap().map(|r| r.contains(t.region.start)), Some(true));
    let allowed = t.k.allowed_at(t.pages(9, 1).start).unwrap();
    assert_eq!(allowed.map(|(r, access)| (r.contains(t.region.start), access)), Some((true, Access::Write)));
}

fn pages_travel_whole<K: Kernel>(t: Tried<'_, K>) {
    let _ = t.copy(0, 2, 1, Protect::No);
    let _ = t.copy(2, 1, 3, Protect::Yes);
    let to = t.slots(0, 4);
    // The fourth is not there.
    let why = if t.k.capabilities().move_pages { Trouble::Changing } else { Trouble::Absent };
    assert_eq!(t.k.take_out(to.start, t.pages(0, 4)), stopped(3, why));
    assert_eq!(t.there(0, 8), []);
    assert_eq!((t.staged(0), t.staged(2)), (1, 3));
    // Where a page is staged, none comes.
    let _ = t.copy(0, 1, 9, Protect::No);
    if t.k.capabilities().move_pages {
        assert_eq!(t.k.take_out(to.start, t.pages(0, 1)), stopped(0, Trouble::Present));
        assert_eq!(t.k.put_back(t.pages(0, 1).start, t.slots(1, 1), Wake::No), stopped(0, Trouble::Present));
        assert_eq!(t.staged(0), 1);
        // What came back is protected no more; what is staged no longer is absent.
        assert_eq!(t.k.put_back(t.pages(10, 1).start, t.slots(2, 1), Wake::No), Done::all(Pages(1)));
        assert_eq!(t.k.put_back(t.pages(11, 1).start, t.slots(2, 1), Wake::No), stopped(0, Trouble::Absent));
    }
    // A copy leaves the staged page where it is.
    assert_eq!(t.k.copy_staged(t.pages(20, 1).start, t.slots(1, 1), Protect::Yes, Wake::No), Done::all(Pages(1)));
    assert_eq!(t.staged(1), 1);
    t.k.drop_staged(to).unwrap();
    assert_eq!(t.k.take_out(to.start, t.pages(20, 1)), Done::all(Pages(1)));
    assert_eq!(t.staged(0), 1);
    t.k.drop_staged(to).unwrap();
    t.k.write_staged(to, |b| b.fill(5));
    assert_eq!(t.staged(3), 5);
    t.k.drop_staged(to).unwrap();
    assert_eq!(t.k.take_out(to.start, t.pages(30, 1)), stopped(0, Trouble::Absent));
}

fn protection_needs_a_mapping<K: Kernel>(t: Tried<'_, K>) {
    let _ = t.copy(0, 4, 1, Protect::No);
    t.k.protect(t.pages(0, 4), Protect::Yes, Wake::No).unwrap();
    t.k.protect(t.pages(2, 100), Protect::No, Wake::Yes).unwrap();
    t.k.wake(t.pages(0, 4)).unwrap();
    t.k.unshare(t.pages(2, 2)).unwrap();
    let other = t.k.map(t.geometry.block_bytes() as u64).unwrap();
    t.k.unmap(other).unwrap();
    assert_eq!(t.k.protect(t.part(other, 0, 1), Protect::No, Wake::No), Err(Trouble::Absent));
    assert_eq!(t.k.copy_in(other.start, &t.bytes(1, 1), Protect::No, Wake::No), stopped(0, Trouble::Absent));
    assert_eq!(t.k.mapping_at(other.start).unwrap().filter(|m| m.contains(t.region.start)), None);
    assert!(!t.k.is_changing());
    assert_eq!(t.k.receive(), None);
}

fn poison_is_where_no_page_is<K: Kernel>(t: Tried<'_, K>) {
    let _ = t.copy(0, 1, 1, Protect::No);
    if !t.k.capabilities().poison {
        assert_eq!(t.k.poison(t.pages(1, 1).start), Err(Trouble::Unsuitable));
        return;
    }
    assert_eq!(t.k.poison(t.pages(0, 1).start), Err(Trouble::Present));
    t.k.poison(t.pages(1, 1).start).unwrap();
    assert_eq!(t.k.poison(t.pages(1, 1).start), Err(Trouble::Present));
    // The mark counts as a page that is there.
    assert_eq!(t.there(0, 8), [(0, 2)]);
    assert!(t.k.is_present(t.pages(1, 1).start).unwrap());
    // Nothing moves out of there or in, but a copy takes the place of the mark.
    let slot = t.slots(0, 1);
    assert_eq!(t.k.take_out(slot.start, t.pages(1, 1)), stopped(0, Trouble::Other(14)));
    t.k.write_staged(slot, |b| b.fill(5));
    assert_eq!(t.k.put_back(t.pages(1, 1).start, slot, Wake::No), stopped(0, Trouble::Present));
    t.k.drop_staged(slot).unwrap();
    assert_eq!(t.copy(1, 1, 2, Protect::No), Done::all(Pages(1)));
    assert_eq!(t.there(0, 8), [(0, 2)]);
}

fn a_disowned_range_is_ordinary_memory<K: Kernel>(t: Tried<'_, K>) {
    let _ = t.copy(0, 1, 1, Protect::No);
    t.k.disown(t.pages(0, 8)).unwrap();
    assert_eq!(t.copy(1, 1, 1, Protect::No), stopped(0, Trouble::Absent));
    // Over two mappings, one of which is not registered.
    assert_eq!(t.copy(6, 4, 1, Protect::No), stopped(0, Trouble::Absent));
    t.k.adopt(t.pages(0, 8)).unwrap();
    assert_eq!(t.there(0, 8), [(0, 1)]);
    assert_eq!(t.copy(6, 4, 1, Protect::No), Done::all(Pages(4)));
}

fn a_full_block_becomes_huge<K: Kernel>(t: Tried<'_, K>) {
    // Not while a page is missing, nor while one is protected.
    let _ = t.copy(0, 511, 3, Protect::No);
    assert_eq!(t.k.collapse(t.region), Err(Trouble::Busy));
    let _ = t.copy(511, 1, 4, Protect::No);
    if t.k.capabilities().write_protect {
        t.k.protect(t.pages(7, 1), Protect::Yes, Wake::No).unwrap();
        assert_eq!(t.k.collapse(t.region), Err(Trouble::Unsuitable));
        assert_eq!(t.mapped(), [(0, 7, false, true), (7, 8, false, false), (8, 512, false, true)]);
        t.k.protect(t.pages(7, 1), Protect::No, Wake::No).unwrap();
    }
    assert_eq!(t.k.is_huge(t.region.start), Ok(false));
    assert_eq!(t.k.collapse(t.region), Ok(()));
    assert_eq!(t.k.is_huge(t.region.start), Ok(true));
    assert_eq!(t.mapped(), [(0, 512, true, true)]);
    assert_eq!(t.there(0, 512), [(0, 512)]);
    // It travels whole, and so it comes back.
    let block = VaRange { end: Va(t.k.staging().start.0 + t.region.len()), ..t.k.staging() };
    if t.k.capabilities().move_pages {
        assert_eq!(t.k.take_out(block.start, t.region), Done::all(Pages(512)));
        assert_eq!(t.k.is_huge(block.start), Ok(true));
        t.k.read_staged(block, |b| assert_eq!((b[0], b[b.len() / 2], b[b.len() - 1]), (3, 3, 4)));
        t.k.drop_staged(block).unwrap();
    }
}

/// What a call said, and what was received before it returned.
fn heard<T>(k: &impl Kernel, call: impl FnOnce() -> T) -> (T, Vec<Message>) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut all = Vec::new();
            while !over.load(SeqCst) {
                match k.receive() {
                    Some(message) => all.push(message),
                    None => std::thread::yield_now(),
                }
            }
            all
        });
        let said = call();
        over.store(true, SeqCst);
        (said, receiver.join().unwrap())
    })
}

/// Z5: a device's memory in the place of a region's, and the region's in the place of the device's.
fn memory_of_a_device_comes_and_goes<K: Kernel>(t: Tried<'_, K>) {
    let block = t.region.len();
    let file = memfd_create(c"device", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 2 * block).unwrap();
    let memory = SharedMemory { file: file.as_fd(), offset: block };
    let (shown, told) = heard(t.k, || t.k.show(t.region, memory));
    assert_eq!((shown, told), (Ok(()), vec![Message::Unmap(t.region)]));
    assert!(t.k.is_accessible(t.region, true));
    // It is no region memory any more.
    assert_eq!(t.copy(0, 1, 1, Protect::No), stopped(0, Trouble::Absent));
    assert_eq!((t.k.mapping_at(t.region.start), t.k.allowed_at(t.region.start)), (Ok(None), Ok(None)));
    assert!(!t.k.is_changing());
    // What is cut off a file cannot be had.
    ftruncate(&file, block + block / 2).unwrap();
    assert!(t.k.is_accessible(t.pages(0, 256), true));
    assert!(!t.k.is_accessible(t.pages(256, 1), false));
    ftruncate(&file, 2 * block).unwrap();
    let (hidden, told) = heard(t.k, || t.k.hide(t.region));
    assert_eq!(hidden, Ok(()));
    let [Message::Move { from, to, len }, Message::Unmap(gone)] = told[..] else { panic!("{told:?}") };
    assert_eq!((to, len), (t.region.start, block));
    assert_eq!(gone, VaRange { start: from, end: Va(from.0 + block) });
    assert_eq!(t.there(0, 512), []);
    assert_eq!(t.copy(3, 2, 7, Protect::No), Done::all(Pages(2)));
    // Where there are no pages, once more, and then nothing at all, of which nobody is told.
    let (discarded, _) = heard(t.k, || t.k.discard(t.region));
    discarded.unwrap();
    heard(t.k, || t.k.show(t.region, memory)).0.unwrap();
    let (closed, told) = heard(t.k, || t.k.close(t.region));
    assert_eq!((closed, told), (Ok(()), vec![]));
    assert!(!t.k.is_accessible(t.pages(0, 1), false));
}

fn words_grow_in_place<K: Kernel>(t: Tried<'_, K>) {
    use peerspace_core::sync::Ordering::Relaxed;
    let words = t.k.words(1 << 20, 10).unwrap();
    let first: *const _ = words.at(3);
    words.at(3).store(9, Relaxed);
    t.k.grow(&words, 1 << 19).unwrap();
    assert!(words.len() >= 1 << 19);
    assert_eq!(words.at(3).load(Relaxed), 9);
    assert!(std::ptr::eq(words.at(3), first));
    assert_eq!(words.at((1 << 19) - 1).load(Relaxed), 0);
    assert!(t.k.grow(&words, (1 << 20) + 1).is_err());
}

fn all<K: Kernel>(k: &K) {
    tried(k, pages_come_where_none_are);
    tried(k, pages_travel_whole);
    if k.capabilities().write_protect {
        tried(k, protection_needs_a_mapping);
    }
    tried(k, poison_is_where_no_page_is);
    tried(k, a_disowned_range_is_ordinary_memory);
    if k.capabilities().huge {
        tried(k, a_full_block_becomes_huge);
    }
    tried(k, memory_of_a_device_comes_and_goes);
    tried(k, words_grow_in_place);
}

const ABLE: Capabilities =
    Capabilities { move_pages: true, write_protect: true, poison: true, kernel_faults: false, huge: false };

#[test]
fn the_simulated_kernel() {
    let huge = Capabilities { huge: true, ..ABLE };
    let still = Capabilities { move_pages: false, poison: false, ..ABLE };
    for can in [ABLE, huge, still, Capabilities { poison: false, ..ABLE }] {
        all(&Sim::new(SimSetup { blocks: BLOCKS, slots: SLOTS, can }));
    }
    all(&Inject::new(Sim::new(SimSetup { blocks: BLOCKS, slots: SLOTS, can: ABLE })));
}

#[cfg(all(target_os = "linux", not(miri)))]
#[test]
fn the_real_kernel() {
    use crate::linux::uffd::feature;
    use crate::linux::{Delivery, Linux, Setup};
    for without in [0, feature::MOVE | feature::POISON, feature::POISON] {
        for delivery in [Delivery::Signal, Delivery::Messages] {
            all(&Linux::open(Setup { delivery, blocks: BLOCKS, slots: SLOTS, without }).unwrap());
        }
    }
}
