//! A vector four times as large as the RAM it is given, used like any other.
//!
//! ```text
//! cargo run --release --example hello
//! ```

use peerspace::Space;
use peerspace::device::compressed::Compressed;

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // At most 16 MiB of RAM for what lives in this space. The rest is compressed.
    let space = Space::builder().host(16 * MIB).device(Compressed::new(256 * MIB)?).build()?;
    let pool = space.pool(256 * MIB)?;

    let mut primes = allocator_api2::vec::Vec::new_in(pool);
    primes.resize(64 << 20, true);
    primes[..2].fill(false);
    for n in (2..).take_while(|n| n * n < 64 << 20) {
        if primes[n] {
            primes[n * n..].iter_mut().step_by(n).for_each(|p| *p = false);
        }
    }
    println!("there are {} primes below {}", primes.iter().filter(|p| **p).count(), primes.len());

    let s = space.statistics();
    let f = s.faults;
    println!("the vector has {} MiB; RAM in use was never more than {} MiB", primes.len() >> 20, s.peak_bytes >> 20);
    println!("the rest was in {} MiB of compressed memory", s.devices[0].peak_bytes >> 20);
    println!("{} faults, {} of them in huge folios; half of them took less than {:?}", f.total, f.huge, f.p50);
    println!("{} pages went out, {} came back, {} were dropped clean", s.pages_out, s.pages_in, s.clean_dropped);
    Ok(())
}
