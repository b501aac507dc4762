//! The device against a model of it, with faults at random; and many threads at once.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

const PAGES: u64 = 4 * 512;

#[derive(Debug, Clone)]
enum Op {
    /// Single pages, and whether the buffer is aligned.
    Store(Vec<u64>, bool),
    StoreFolio(u64),
    Load(Vec<u64>, bool),
    LoadMany(u64, u64),
    Free(u64, u64),
    Trim,
}

fn op() -> impl Strategy<Value = Op> {
    // Often the same few pages, in neighbourhoods.
    let page = || prop_oneof![0..40u64, 0..PAGES, 500..530u64];
    let pages = move || proptest::collection::btree_set(page(), 1..90).prop_map(|s| s.into_iter().collect());
    prop_oneof![
        4 => (pages(), proptest::bool::weighted(0.9)).prop_map(|(p, a)| Op::Store(p, a)),
        1 => (0..4u64).prop_map(Op::StoreFolio),
        4 => (pages(), proptest::bool::weighted(0.9)).prop_map(|(p, a)| Op::Load(p, a)),
        2 => (page(), 1..600u64).prop_map(|(p, n)| Op::LoadMany(p, n)),
        3 => (page(), prop_oneof![1..5u64, Just(512)]).prop_map(|(p, n)| Op::Free(p, n)),
        1 => Just(Op::Trim),
    ]
}

/// Faults by chance: those that a transfer survives, and those it does not.
fn by_chance(mut x: u64) -> impl FnMut(Request) -> Fault + Send {
    move |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        match x >> 32 & 63 {
            0 => Fault::Error(Errno::INTR),
            1 => Fault::Error(Errno::AGAIN),
            2..=5 => Fault::Short((x >> 40) as usize % 9000),
            6 => Fault::Error(Errno::IO),
            7 => Fault::Error(Errno::NOSPC),
            8 => Fault::Corrupt,
            _ => Fault::None,
        }
    }
}

/// A device, and what it should hold: pages and their versions.
struct Checked {
    disk: Disk<Faulty>,
    model: BTreeMap<u64, u64>,
    version: u64,
}

/// A buffer of `pages` pages, aligned or not.
fn buffer(aligned: bool, pages: u64) -> Buffer {
    Buffer::off(pages as usize * page_bytes(), if aligned { 0 } else { 24 })
}

impl Checked {
    fn store(&mut self, pages: &[u64], count: u64, aligned: bool) {
        self.version += 1;
        let filled = |page: &u64| {
            let mut buffer = buffer(aligned, count);
            buffer.copy_from_slice(&contents(*page, count, self.version));
            buffer
        };
        let buffers: Vec<_> = pages.iter().map(filled).collect();
        let mut batch: Vec<_> = pages.iter().zip(&buffers).map(|(p, b)| Store::new(*p, b)).collect();
        self.disk.store(&mut batch);
        for s in &batch {
            for page in s.page..s.page + count {
                match &s.result {
                    Ok(()) => self.model.insert(page, self.version),
                    Err(DeviceError::NoAnswer) => panic!("page {} got no answer", s.page),
                    Err(_) => self.model.remove(&page),
                };
            }
            if s.result.is_err() {
                self.disk.free(DevicePages { first: s.page, count });
            }
        }
    }

    fn load(&self, pages: &[u64], aligned: bool) {
        let mut buffers: Vec<_> = pages.iter().map(|_| buffer(aligned, 1)).collect();
        let mut batch: Vec<_> = pages.iter().zip(&mut buffers).map(|(p, b)| Load::new(*p, b)).collect();
        self.disk.load(&mut batch);
        for l in &batch {
            match (&l.result, self.model.get(&l.page)) {
                (Ok(()), Some(version)) => assert!(*l.bytes == content(l.page, *version), "page {}", l.page),
                (Ok(()), None) => panic!("page {} has content", l.page),
                (Err(DeviceError::NoAnswer), _) => panic!("page {} got no answer", l.page),
                (Err(_), _) => {}
            }
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Store(pages, aligned) => self.store(&pages, 1, aligned),
            Op::StoreFolio(block) => self.store(&[block * 512], 512, true),
            Op::Load(pages, aligned) => self.load(&pages, aligned),
            Op::LoadMany(first, count) => {
                let count = count.min(PAGES - first);
                let mut buffer = buffer(true, count);
                let mut batch = [Load::new(first, &mut buffer)];
                self.disk.load(&mut batch);
                if batch[0].result.is_ok() {
                    for (page, bytes) in (first..).zip(buffer.chunks_exact(page_bytes())) {
                        assert!(bytes == content(page, self.model[&page]), "page {page}");
                    }
                }
            }
            Op::Free(first, count) => {
                self.disk.free(DevicePages { first, count });
                self.model.retain(|page, _| !(first..first + count).contains(page));
            }
            Op::Trim => {
                self.disk.trim();
                self.check_space();
            }
        }
    }

    /// Nothing takes up space but what is held (Z6).
    fn check_space(&self) {
        let page = page_bytes() as u64;
        let held = self.model.len() as u64;
        assert_eq!(self.disk.usage().used_bytes, held * page);
        let files = self.disk.files.read();
        let file = files.file(super::super::record::Slot(0)).unwrap();
        let bytes = rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512;
        // The header, and what the file system needs to know where the pages are.
        assert!(bytes <= (held + 1) * page + (64 << 10), "{bytes} bytes for {held} pages");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_a_map(
        ops in proptest::collection::vec(op(), 1..60),
        faults in proptest::option::of(1u64..),
        direct: bool,
    ) {
        let mut c = Checked { disk: disk(PAGES, direct), model: BTreeMap::new(), version: 0 };
        if let Some(seed) = faults {
            c.disk.raw.decide(by_chance(seed));
        }
        ops.into_iter().for_each(|op| c.run(op));
        // In the end everything there should be is there.
        c.disk.raw.schedule([]);
        let pages: Vec<u64> = c.model.keys().copied().collect();
        for (page, version) in &c.model {
            prop_assert_eq!(load(&c.disk, *page, 1, *version), Ok(()));
        }
        c.load(&pages, true);
        c.disk.free(DevicePages { first: 0, count: PAGES });
        c.model.clear();
        c.run(Op::Trim);
    }
}

/// Threads store, load and free pages that lie between each other's, while space is returned all the time: a hole
/// must never swallow a page that was stored again.
#[test]
fn holes_do_not_swallow_pages_stored_again() {
    const THREADS: u64 = 4;
    let d = disk(PAGES, true);
    d.raw.before_punch(|_, _| {
        std::thread::sleep(std::time::Duration::from_micros(200));
        Ok(())
    });
    let (d, done) = (&d, &AtomicBool::new(false));
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                s.spawn(move || {
                    let mut versions = BTreeMap::new();
                    let mut x = t * 77 + 1;
                    for version in 1..1500u64 {
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        let page = x % 96 * THREADS + t;
                        match versions.get(&page) {
                            Some(_) if x >> 40 & 1 == 0 => {
                                free(d, page, 1);
                                versions.remove(&page);
                            }
                            Some(version) => assert_eq!(load(d, page, 1, *version), Ok(())),
                            None => {
                                assert_eq!(store(d, page, 1, version), Ok(()));
                                versions.insert(page, version);
                            }
                        }
                    }
                    for (page, version) in versions {
                        assert_eq!(load(d, page, 1, version), Ok(()), "page {page}");
                        free(d, page, 1);
                    }
                })
            })
            .collect();
        s.spawn(|| {
            while !done.load(Relaxed) {
                d.trim();
            }
        });
        let results: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        done.store(true, Relaxed);
        results.into_iter().for_each(|r| r.unwrap());
    });
    d.trim();
    assert_eq!(d.usage().used_bytes, 0);
}
