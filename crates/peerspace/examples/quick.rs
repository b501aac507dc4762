use peerspace::device::soft::Soft;
use peerspace::{Faults, Space};
use std::time::Instant;
fn main() {
    let mib: usize = std::env::args().nth(1).map_or(1024, |s| s.parse().unwrap());
    let faults = if std::env::args().nth(2).as_deref() == Some("thr") { Faults::Threads } else { Faults::Signal };
    let space = Space::builder()
        .host(256 << 20)
        .device(Soft::new(2 * (mib as u64) << 20).unwrap())
        .faults(faults)
        .build()
        .unwrap();
    let mut region = space.region((mib as u64) << 20).unwrap();
    {
        // warm
        let mut w = vec![1u8; 3 << 30];
        for i in (0..w.len()).step_by(4096) {
            w[i] = 1;
        }
        std::hint::black_box(&w);
    }
    let words: &mut [u64] = region.typed_mut();
    let n = words.len();
    let gb = n as f64 * 8.0 / 1e9;
    let t = Instant::now();
    for p in 0..n / 512 {
        for k in 0..512 {
            words[p * 512 + k] = if k < 256 { (p * 4096 * 7 + k) as u64 } else { 0 };
        }
    }
    println!("fill {:.3} GB/s", gb / t.elapsed().as_secs_f64());
    for _ in 0..3 {
        let t = Instant::now();
        let mut s = 0u64;
        for i in (0..n).step_by(8) {
            s = s.wrapping_add(unsafe { std::ptr::read_volatile(&words[i]) });
        }
        println!("seq read {:.3} GB/s ({s})", gb / t.elapsed().as_secs_f64());
    }
    let mut x = 88172645463325252u64;
    let ops = 200_000;
    for _ in 0..3 {
        let f0 = space.statistics().faults.total;
        let t = Instant::now();
        let mut s = 0u64;
        for _ in 0..ops {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let p = x as usize % (n / 512);
            s = s.wrapping_add(unsafe { std::ptr::read_volatile(&words[p * 512 + (x >> 40) as usize % 512]) });
        }
        let f = space.statistics().faults.total - f0;
        let us = t.elapsed().as_secs_f64() * 1e6;
        println!("rand {:.2} us/op {:.2} us/fault ({f} faults) ({s})", us / ops as f64, us / f as f64);
    }
    println!("{:?}", space.statistics());
}
