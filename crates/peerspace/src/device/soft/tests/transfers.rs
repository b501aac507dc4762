//! What goes to the device's memory and comes from it, from the host and from peers, and how long it takes.

use super::*;
use crate::device::soft::{Link, Soft};
use crate::device::{DeviceError, DevicePages, PeerCopy};
use std::time::{Duration, Instant};

fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 40) as u8
        })
        .collect()
}

fn store(gpu: &Accelerator, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
    let mut batch = [Store::new(at, bytes)];
    gpu.store(&mut batch);
    batch[0].result.clone()
}

fn load(gpu: &Accelerator, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
    let mut batch = [Load::new(at, bytes)];
    gpu.load(&mut batch);
    batch[0].result.clone()
}

fn memory(gpu: &Accelerator) -> Vec<u8> {
    let mut all = vec![0; gpu.bytes() as usize];
    load(gpu, 0, &mut all).unwrap();
    all
}

fn copy(to: &Accelerator, from: &dyn Device, at: u64, source: u64, bytes: u64) -> Result<(), DeviceError> {
    let mut batch = [PeerCopy::new(at, source, bytes)];
    to.copy_from(from, &mut batch);
    batch[0].result.clone()
}

#[test]
fn what_was_stored_comes_back_and_what_is_not_there_is_refused() {
    let gpu = Accelerator::new(Options::new(600 * page() + 5).name("gpu0").takes_evicted(true)).unwrap();
    let d = Device::describe(&gpu);
    assert_eq!((d.name.as_str(), d.pages.0, d.capacity_bytes, d.takes_evicted), ("gpu0", 600, 600 * page(), true));
    assert!(!Device::describe(&accelerator(1)).takes_evicted);
    let bytes = noise(513 * page(), 5);
    assert_eq!(store(&gpu, 87, &bytes), Ok(()));
    let mut back = vec![0; bytes.len()];
    assert_eq!(load(&gpu, 87, &mut back), Ok(()));
    assert!(back == bytes);
    assert_eq!(gpu.usage().unwrap().used_bytes, 513 * page());
    assert_eq!(gpu.holds(88, &bytes[page() as usize..2 * page() as usize]), Ok(true));
    assert_eq!(gpu.holds(88, &bytes[..page() as usize]), Ok(false));
    let zeros = DevicePages { first: 90, count: 3 };
    assert_eq!(gpu.clear(zeros), Ok(()));
    assert_eq!(gpu.clear(DevicePages { first: 599, count: 2 }), Err(DeviceError::Io(22)));
    assert_eq!(gpu.clear(DevicePages { first: 1, count: u64::MAX }), Err(DeviceError::Io(22)));
    let mut around = vec![1; 5 * page() as usize];
    assert_eq!(load(&gpu, 89, &mut around), Ok(()));
    let (from, to) = (page() as usize, 4 * page() as usize);
    assert!(around[from..to].iter().all(|b| *b == 0));
    assert!(around[..from] == bytes[2 * from..3 * from] && around[to..] == bytes[6 * from..7 * from]);
    let invalid = Err(DeviceError::Io(22));
    assert_eq!(store(&gpu, 88, &bytes), invalid);
    assert_eq!(load(&gpu, 600, &mut back[..page() as usize]), invalid);
    assert_eq!(load(&gpu, u64::MAX, &mut back), invalid);
    assert_eq!(load(&gpu, u64::MAX / page(), &mut back), invalid);
    assert_eq!(gpu.holds(600, &bytes[..8]), Err(DeviceError::Io(22)));
    let s = gpu.statistics();
    assert_eq!((s.bytes_in, s.bytes_out), (513 * page(), 520 * page()));
    assert_eq!((s.transfers, s.link_busy), (3, Duration::ZERO));
}

#[test]
fn g6_peers_copy_any_bytes_without_the_host() {
    let (a, b) = (accelerator(64), accelerator(32));
    let (bytes_a, bytes_b) = (noise(64 * page(), 1), noise(32 * page(), 2));
    store(&a, 0, &bytes_a).unwrap();
    store(&b, 0, &bytes_b).unwrap();
    let mut expected = bytes_b.clone();
    let mut moved = 0;
    for (at, source, len) in [
        (0, 0, 5 * page()),
        (3, 11, 70_000),
        (1, 8, 1),
        (page() - 1, 0, 2),
        (31 * page(), 63 * page(), page()),
        (9, 9, 0),
    ] {
        assert_eq!(copy(&b, &a, at, source, len), Ok(()));
        expected[at as usize..(at + len) as usize]
            .copy_from_slice(&bytes_a[source as usize..(source + len) as usize]);
        moved += len;
        assert!(memory(&b) == expected, "{len} bytes from {source} to {at}");
    }
    // Within one memory, also where the two overlap.
    for (at, source, len) in [(0, 5, 20_000), (5000, 100, 50_000), (4096, 0, 3 * 4096), (7, 7, 4000)] {
        assert_eq!(copy(&b, &b, at, source, len), Ok(()));
        expected.copy_within(source as usize..(source + len) as usize, at as usize);
        moved += len;
        assert!(memory(&b) == expected, "{len} bytes from {source} to {at}");
    }
    let invalid = Err(DeviceError::Io(22));
    for (at, source, len) in
        [(32 * page(), 0, 1), (0, 64 * page(), 1), (u64::MAX, 0, 2), (0, u64::MAX, 1), (0, 0, u64::MAX)]
    {
        assert_eq!(copy(&b, &a, at, source, len), invalid, "{len} bytes from {source} to {at}");
    }
    assert_eq!(copy(&b, &Soft::new(page()).unwrap(), 0, 0, 1), Err(DeviceError::Unsupported));
    assert!(memory(&b) == expected && memory(&a) == bytes_a);
    assert_eq!((b.statistics().peer_bytes_in, a.statistics().peer_bytes_in), (moved, 0));
    assert_eq!(b.statistics().bytes_in, 32 * page());
}

#[test]
fn transfers_take_as_long_as_the_link_does() {
    // 64 MiB each second: a page takes about 60 us.
    let link = Link { bytes_per_second: 64 << 20, latency: Duration::from_micros(300) };
    let linked = |name: &str| Accelerator::new(Options::new(8 << 20).link(link).name(name)).unwrap();
    let (a, b) = (linked("a"), linked("b"));
    let bytes = noise(1 << 20, 3);
    let mut back = vec![0; 1 << 20];
    // A mebibyte takes 1/64 of a second.
    let takes = Duration::from_secs(1) / 64;
    let timed = |f: &mut dyn FnMut()| {
        let begun = Instant::now();
        f();
        begun.elapsed()
    };
    let least = takes + link.latency;
    assert!(timed(&mut || store(&a, 0, &bytes).unwrap()) >= least);
    assert!(timed(&mut || load(&a, 0, &mut back).unwrap()) >= least);
    assert!(back == bytes);
    assert!(timed(&mut || assert_eq!(copy(&b, &a, 1 << 20, 0, 1 << 20), Ok(()))) >= least);
    assert_eq!(a.statistics().link_busy, 3 * takes);
    assert_eq!(b.statistics().link_busy, takes);
    // Within one memory nothing goes by the link.
    copy(&b, &b, 0, 1 << 20, 1 << 20).unwrap();
    assert_eq!(b.statistics().link_busy, takes);
    // What is accessed in place goes by it, each access for itself.
    let space = FakeSpace::new(&a, 4, Manner::Share);
    let begun = Instant::now();
    once(&a, |lane| {
        for i in 0..10 {
            lane.store(BASE + 8 * i, i)?;
        }
        Ok(())
    })
    .unwrap();
    assert!(begun.elapsed() >= 10 * link.latency);
    assert_eq!(space.cpu_word(BASE + 72), 9);
    space.let_go();
}
