//! A region that outlives the process: run it again and again, and it goes on counting.
//!
//! ```console
//! $ cargo run -p peerspace --example persistent -- /tmp/counter
//! ```

use peerspace::Space;
use peerspace::device::{dax::Dax, soft::Soft};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("say where to count, such as /tmp/counter")?;
    // A new file needs a size; one that is there is checked, and refused if it is anything else.
    let size = (!std::path::Path::new(&path).exists()).then_some(16 << 20);
    let space = Space::builder().host(8 << 20).device(Soft::new(16 << 20)?).build()?;
    let device = space.attach(Dax::persistent(&path, size)?)?;

    let mut counter = match space.open_persistent(device, "counter") {
        Ok(there) => there,
        Err(_) => space.create_persistent(device, "counter", 4096)?,
    };
    let runs = &mut counter.typed_mut::<u64>()[0];
    *runs += 1;
    let runs = *runs;
    // From here on it survives also the end of the machine.
    counter.flush(0..8)?;
    println!("this is run number {runs}; the region {:?} lies at {:p}", counter.name(), counter.as_ptr());
    Ok(())
}
