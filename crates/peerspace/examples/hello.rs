//! A vector four times as large as the RAM it is given, used like any other.
//!
//! ```text
//! cargo run --release -p peerspace --example hello
//! ```

use allocator_api2::vec::Vec;
use peerspace::Space;
use peerspace::device::compressed::Compressed;

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // At most 8 MiB of RAM for what lives in this space. The rest is compressed.
    let space = Space::builder().host(8 * MIB).device(Compressed::new(256 * MIB)?).build()?;
    let pool = space.pool(256 * MIB)?;

    // Running sums of the squares, looked up afterwards like in any sorted vector.
    let mut sums: Vec<u64, _> = Vec::with_capacity_in(4 << 20, pool);
    let mut sum = 0;
    for n in 0..4u64 << 20 {
        sum += n % 1000 * (n % 1000);
        sums.push(sum);
    }
    let half = sums.partition_point(|s| *s < sum / 2);
    println!("{} sums up to {sum}; half of that is reached at number {half}", sums.len());

    let s = space.statistics();
    let f = s.faults;
    let size = sums.len() * size_of::<u64>();
    println!("the vector has {} MiB; RAM in use was never more than {} MiB", size >> 20, s.peak_bytes >> 20);
    println!("the rest was in {} MiB of compressed memory", s.devices[0].peak_bytes >> 20);
    println!("{} faults, {} of them in huge folios; half of them took less than {:?}", f.total, f.huge, f.p50);
    println!("{} pages went out, {} came back, {} were dropped clean", s.pages_out, s.pages_in, s.clean_dropped);
    Ok(())
}
