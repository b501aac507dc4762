//! A device of one's own in under seventy lines: pages are kept on shelves, as they would be on other machines.
//!
//! What an author of a device has to know:
//! - The engine numbers the pages and remembers what is where. A device moves bytes, and says what became of each
//!   transfer: what is not said counts as failed.
//! - Calls come from any thread, several at a time, but never two for the same page.
//! - It is called while the program waits for its memory: it must not touch memory that a space manages, and should not
//!   take a lock that the program could hold.
//! - What it hands back is believed. This one therefore keeps a checksum with each page.

use peerspace::Space;
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

const PAGE: usize = 4096;

/// Pages with their checksums.
type Shelf = HashMap<u64, (u64, Box<[u8]>)>;

/// Shelves, each under a lock of its own.
struct Shelves(Vec<Mutex<Shelf>>);

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks_exact(8)
        .fold(0, |s, w| (s ^ u64::from_le_bytes(w.try_into().unwrap())).wrapping_mul(0x100_0000_01b3))
}

impl Shelves {
    fn shelf(&self, page: u64) -> MutexGuard<'_, Shelf> {
        self.0[page as usize % self.0.len()].lock().unwrap()
    }
}

impl Device for Shelves {
    fn describe(&self) -> Descriptor {
        Descriptor::private("shelves", 1 << 20).slow().in_ram()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for s in batch {
            for (page, bytes) in (s.page..).zip(s.bytes.chunks_exact(PAGE)) {
                self.shelf(page).insert(page, (sum(bytes), bytes.into()));
            }
            s.result = Ok(());
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for l in batch {
            l.result = (l.page..).zip(l.bytes.chunks_exact_mut(PAGE)).try_for_each(|(page, to)| {
                let shelf = self.shelf(page);
                let (sum_then, bytes) = shelf.get(&page).ok_or(DeviceError::Gone)?;
                to.copy_from_slice(bytes);
                if sum(to) == *sum_then { Ok(()) } else { Err(DeviceError::Corrupt) }
            });
        }
    }

    fn freed(&self, pages: DevicePages) {
        (pages.first..pages.first + pages.count).for_each(|page| drop(self.shelf(page).remove(&page)));
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shelves = Shelves((0..16).map(|_| Mutex::default()).collect());
    let space = Space::builder().host(8 << 20).device(shelves).build()?;
    let mut region = space.region(32 << 20)?;
    let words: &mut [u64] = region.typed_mut();
    words.iter_mut().enumerate().for_each(|(i, w)| *w = i as u64 * i as u64);
    assert!(words.iter().enumerate().all(|(i, w)| *w == i as u64 * i as u64));
    println!("{} squares are what they should be", words.len());

    let s = space.statistics();
    let d = &s.devices[0];
    println!("{}: {} pages put up, {} fetched, {} errors", d.name, d.stores, d.loads, d.errors);
    println!("RAM in use was never more than {} MiB of {} MiB", s.peak_bytes >> 20, region.len() >> 20);
    Ok(())
}
