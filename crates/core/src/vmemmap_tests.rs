//! Population, by every policy at every page size, with allocations that fail.

use super::*;
use crate::sync::AtomicU64;
use crate::words::zeroed;
use proptest::prelude::*;
use std::collections::BTreeMap;

type Map = Vmemmap<std::boxed::Box<[AtomicU64]>>;

/// A host that counts, and that fails when it is told to.
#[derive(Debug, Default)]
struct Counting {
    out: BTreeMap<u64, u64>,
    huge: bool,
    /// So many more allocations succeed.
    left: Option<u64>,
}

impl Host for Counting {
    fn take(&mut self, at: u64, bytes: u64) -> bool {
        if let Some(left) = &mut self.left {
            if *left == 0 {
                return false;
            }
            *left -= 1;
        }
        assert_eq!(self.out.insert(at, bytes), None, "populated twice");
        true
    }

    fn give_back(&mut self, at: u64, bytes: u64) {
        assert_eq!(self.out.remove(&at), Some(bytes), "what was never taken is given back");
    }

    fn has_huge(&mut self) -> bool {
        self.huge
    }
}

impl Counting {
    fn bytes(&self) -> u64 {
        self.out.values().sum()
    }
}

fn with_huge() -> Counting {
    Counting { huge: true, ..Counting::default() }
}

/// An array of `sections` sections, with descriptors as large as the kernel's.
fn map(page: u64, policy: Policy, sections: u64) -> Map {
    let sizes = Sizes::new(page, 64);
    let bytes = sizes.section * sections;
    Vmemmap::new(zeroed(Map::words_for(sizes, bytes)), sizes, policy, bytes)
}

fn altmap(pages: u64) -> Altmap {
    Altmap::new(Pfn(1 << 20), Pages(1 << 30), Pages(0), Pages(pages)).unwrap()
}

fn section(map: &Map, i: u64) -> Range<u64> {
    i * map.sizes.section..(i + 1) * map.sizes.section
}

#[test]
fn sizes_are_those_of_the_kernel() {
    let of = |page| {
        let s = Sizes::new(page, 64);
        (s.huge >> 20, s.section >> 10)
    };
    assert_eq!([4096, 16384, 65536].map(of), [(2, 2048), (32, 512), (512, 128)]);
}

#[test]
fn a7_x86_64_takes_huge_leaves_from_the_altmap_or_nothing() {
    let m = map(4096, Policy::X86_64, 4);
    let (mut a, mut host) = (altmap(1024), with_huge());
    m.populate(section(&m, 0), Some(&mut a), false, false, &mut host).unwrap();
    assert_eq!((a.taken(), host.bytes()), (Pages(512), 0));
    let leaf = m.find(4096 * 5).unwrap();
    assert_eq!(leaf, Leaf { place: Place::Device(Pfn(1 << 20)), start: 0, bytes: 2 << 20 });
    m.populate(section(&m, 1), Some(&mut a), false, false, &mut host).unwrap();
    let full = m.populate(section(&m, 2), Some(&mut a), false, false, &mut host);
    assert_eq!(full, Err(PopulateError::Altmap(AltmapRefused::Exhausted { asked: 512, left: 0 })));
    assert!(m.find(section(&m, 2).start).is_none() && host.bytes() == 0);
    // A3: only whoever asks for it has the host serve.
    m.populate(section(&m, 2), Some(&mut a), false, true, &mut host).unwrap();
    assert_eq!(host.bytes(), 2 << 20);
    // Less than a section: base leaves, from the host.
    let part = section(&m, 3).start..section(&m, 3).start + 8192;
    let mut fresh = altmap(1024);
    m.populate(part.clone(), Some(&mut fresh), false, false, &mut host).unwrap();
    assert_eq!((fresh.taken(), host.bytes()), (Pages(0), (2 << 20) + 8192));
    // Without huge pages: no altmap, but the host (A6).
    let m = map(4096, Policy::X86_64, 1);
    let mut host = Counting::default();
    assert_eq!(
        m.populate(section(&m, 0), Some(&mut fresh), false, false, &mut host),
        Err(PopulateError::NoHugePages)
    );
    m.populate(section(&m, 0), None, false, false, &mut host).unwrap();
    assert_eq!(host.out.len(), 512);
}

#[test]
fn a6_arm64_takes_base_leaves_from_the_altmap() {
    for (page, policy, leaves) in
        [(4096, Policy::ARM64_4K, 512), (16384, Policy::ARM64, 32), (65536, Policy::ARM64, 2)]
    {
        let m = map(page, policy, 2);
        let (mut a, mut host) = (altmap(leaves), Counting::default());
        m.populate(section(&m, 0), Some(&mut a), false, false, &mut host).unwrap();
        // A9: what the altmap has served, the host does not serve again.
        assert_eq!((a.taken(), a.left(), host.bytes()), (Pages(leaves), Pages(0), 0), "{}", policy.name);
        assert_eq!(m.find(0).unwrap().bytes, page);
        assert!(m.populate(section(&m, 1), Some(&mut a), false, false, &mut host).is_err());
        assert_eq!(host.bytes(), 0);
    }
    // With huge pages and pages of 4 KiB, huge ones.
    let m = map(4096, Policy::ARM64_4K, 1);
    let mut a = altmap(512);
    m.populate(section(&m, 0), Some(&mut a), false, false, &mut with_huge()).unwrap();
    assert_eq!(m.find(0).unwrap().bytes, 2 << 20);
}

#[test]
fn a7_powerpc_goes_on_with_the_host() {
    let m = map(4096, Policy::POWERPC, 3);
    let (mut a, mut host) = (altmap(700), with_huge());
    m.populate(0..m.bytes, Some(&mut a), false, false, &mut host).unwrap();
    assert_eq!((a.taken(), host.bytes()), (Pages(512), 4 << 20));
    // A leaf of 32 MiB describes 8 GiB; the device has less.
    let m = map(16384, Policy::POWERPC, 3);
    let (mut a, mut host) = (altmap(1 << 20), with_huge());
    m.populate(0..m.bytes, Some(&mut a), false, false, &mut host).unwrap();
    assert_eq!((a.taken(), host.bytes()), (Pages(0), 32 << 20));
}

#[test]
fn a7_riscv_has_no_use_for_an_altmap() {
    for page in [4096, 16384, 65536] {
        let m = map(page, Policy::RISCV, 1);
        let (mut a, mut host) = (altmap(1 << 20), with_huge());
        m.populate(section(&m, 0), Some(&mut a), false, false, &mut host).unwrap();
        assert_eq!((a.taken(), host.bytes()), (Pages(0), m.sizes.section));
        assert_eq!(m.find(0).unwrap().bytes, page);
    }
}

#[test]
fn a3_to_fall_back_from_nothing_is_a_bug_of_the_caller() {
    let m = map(4096, Policy::SPACE, 1);
    let mut host = Counting::default();
    let e = m.populate(0..4096, None, false, true, &mut host);
    assert_eq!(e, Err(PopulateError::FallbackWithoutAltmap));
    assert_eq!(m.populate(0..m.bytes + 1, None, false, false, &mut host), Err(PopulateError::Outside));
    assert!(host.out.is_empty());
}

#[test]
fn a5_mixed_leaves_go_back_to_where_they_came_from() {
    let m = map(4096, Policy::SPACE, 1);
    let (mut a, mut host) = (altmap(3), Counting::default());
    m.populate(0..5 * 4096, Some(&mut a), false, true, &mut host).unwrap();
    assert_eq!((a.taken(), host.bytes()), (Pages(3), 2 * 4096));
    m.depopulate(4096..4 * 4096, Some(&mut a), &mut host);
    assert_eq!((a.taken(), host.bytes()), (Pages(1), 4096));
    m.depopulate(0..m.bytes, Some(&mut a), &mut host);
    assert_eq!((a.taken(), a.left(), host.bytes()), (Pages(0), Pages(3), 0));
}

const POLICIES: [Policy; 6] =
    [Policy::X86_64, Policy::ARM64_4K, Policy::ARM64, Policy::POWERPC, Policy::RISCV, Policy::SPACE];

/// A3: whichever allocation fails, what was there before is there, and nothing else.
#[test]
fn a3_a_failure_at_any_step_leaves_nothing_behind() {
    for policy in POLICIES {
        for (huge, pages) in [(false, 0), (true, 0), (false, 100), (true, 600), (true, 1100)] {
            let mut n = 0;
            // Few leaves, whatever they are.
            let page = if huge { 4096 } else { 16384 };
            loop {
                let m = map(page, policy, 3);
                let mut host = Counting { huge, left: None, ..Counting::default() };
                let mut a = (pages > 0).then(|| altmap(pages));
                // Something is there already, in the midst of it.
                let before = section(&m, 1).start + page..section(&m, 1).start + 3 * page;
                m.populate(before.clone(), None, false, false, &mut host).unwrap();
                let (had, had_left) = (host.bytes(), a.map(|a| a.left()));
                host.left = Some(n);
                let done = m.populate(0..m.bytes, a.as_mut(), false, false, &mut host);
                let all = (0..m.bytes).step_by(page as usize);
                match done {
                    Ok(()) => {
                        assert!(all.into_iter().all(|at| m.find(at).is_some()), "{}", policy.name);
                        break;
                    }
                    Err(e) => {
                        let left: std::vec::Vec<u64> = all.filter(|at| m.find(*at).is_some()).collect();
                        assert!(left.iter().all(|at| before.contains(at)), "{}: {e}", policy.name);
                        assert_eq!((host.bytes(), a.map(|a| a.left())), (had, had_left), "{}: {e}", policy.name);
                        if !matches!(e, PopulateError::NoMemory) {
                            break;
                        }
                    }
                }
                n += 1;
            }
        }
    }
}

proptest! {
    /// Whatever is populated and freed in whatever order: what is asked for is there, nothing is anywhere twice, and at the
    /// end everything is where it came from.
    #[test]
    fn populating_and_freeing_loses_nothing(
        which in 0..POLICIES.len(), page in prop::sample::select(std::vec![4096u64, 16384, 65536]), pages in 0u64..1500,
        steps in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<bool>(), any::<bool>()), 1..30),
    ) {
        let m = map(page, POLICIES[which], 4);
        let mut host = with_huge();
        let mut a = (pages > 0).then(|| altmap(pages));
        for (at, len, add, fall_back) in steps {
            let start = at % m.bytes;
            let range = start..(start + len % (m.bytes - start) + 1);
            if add {
                let fall_back = fall_back && a.is_some();
                if m.populate(range.clone(), a.as_mut(), false, fall_back, &mut host).is_ok() {
                    prop_assert!(range.clone().step_by(page as usize).all(|at| m.find(at).is_some()));
                    prop_assert!(m.find(range.end - 1).is_some());
                }
            } else {
                m.depopulate(range, a.as_mut(), &mut host);
            }
            let leaves: std::collections::BTreeSet<(u64, u64)> =
                (0..m.bytes).step_by(page as usize).filter_map(|at| m.find(at)).map(|l| (l.start, l.bytes)).collect();
            let bytes: u64 = leaves.iter().map(|l| l.1).sum();
            prop_assert_eq!(bytes, host.bytes() + a.map_or(0, |a| a.taken().0 * page));
        }
        m.depopulate(0..m.bytes, a.as_mut(), &mut host);
        prop_assert_eq!((host.bytes(), a.map_or(0, |a| a.taken().0)), (0, 0));
        prop_assert_eq!(a.map_or(0, |a| a.left().0), pages);
    }
}
