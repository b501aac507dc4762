//! A device that runs code, in under seventy lines, and an MMU for it: its code uses the program's own pointers.
//!
//! ```text
//! cargo run --release -p peerspace --example accelerator
//! ```
//!
//! What an author of such a device has to know, beside what `device.rs` says of all devices:
//! - The device's memory consists of numbered pages, and the space decides what is on which: `store` and `load` carry data
//!   there and back, whether the device's code has asked for it or not.
//! - The MMU's table belongs to the space as well: `map` and `unmap` change it, and nothing else does. An access of the device's
//!   code that finds no translation there, or none that permits it, is a fault: ask the port to resolve it, and repeat the access.
//! - When `unmap` has answered `Done`, no access by those addresses is under way any more. Here each access holds the table's
//!   lock, so that is so. A device with queues of its own answers `Pending` with a fence, and says by `is_done` when it is
//!   reached. Whoever does not keep this promise is quarantined, and what it alone holds is lost.
//! - Neither `store` and `load` nor the MMU's functions call the port, or wait for the device's code: they are called with pages
//!   locked, which that code may be waiting for. So the lock is let go before a fault.
//! - This device moves what it uses to its own memory. One that can access the host's memory says so (`MmuDescriptor::remote`),
//!   and does it by `Port::read` and `Port::write` where the target is `Target::Host`: that can be cut off, a pointer cannot.

use peerspace::Space;
use peerspace::device::compressed::Compressed;
use peerspace::device::mmu::{DeviceAccess, FaultError, Mapping, Mmu, MmuDescriptor, Mode, Port, Progress, Target};
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

const PAGE: u64 = 4096;

// The device begins here.

/// Memory, a table of translations, and the way to the space. Clones are the same device: one is the space's, one its user's.
#[derive(Clone)]
struct Chip(Arc<Parts>);

struct Parts {
    memory: Mutex<Vec<u8>>,
    /// For each page of the program that is mapped: the page of the memory where it is, and whether it may be written.
    table: Mutex<HashMap<u64, (u64, bool)>>,
    port: OnceLock<Port>,
}

/// Bytes of the memory, from page `page` on.
fn at(page: u64, len: usize) -> Range<usize> {
    (page * PAGE) as usize..(page * PAGE) as usize + len
}

impl Chip {
    fn new(bytes: u64) -> Chip {
        Chip(Arc::new(Parts {
            memory: vec![0; bytes as usize].into(),
            table: Mutex::default(),
            port: OnceLock::new(),
        }))
    }

    /// One access of the device's code to a word of the program.
    fn access<R>(&self, va: u64, how: DeviceAccess, act: impl Fn(&mut [u8; 8]) -> R) -> Result<R, FaultError> {
        loop {
            let table = self.0.table.lock().unwrap();
            if let Some((page, writable)) = table.get(&(va / PAGE)).copied()
                && (writable || how == DeviceAccess::Read)
            {
                let word = &mut self.0.memory.lock().unwrap()[at(page, PAGE as usize)][(va % PAGE) as usize..][..8];
                return Ok(act(word.try_into().unwrap()));
            }
            drop(table);
            self.0.port.get().expect("it belongs to a space").fault(va, how)?;
        }
    }
}

impl Device for Chip {
    fn describe(&self) -> Descriptor {
        Descriptor::private("chip", self.0.memory.lock().unwrap().len() as u64 / PAGE).in_ram()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for s in batch {
            self.0.memory.lock().unwrap()[at(s.page, s.bytes.len())].copy_from_slice(s.bytes);
            s.result = Ok(());
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for l in batch {
            l.bytes.copy_from_slice(&self.0.memory.lock().unwrap()[at(l.page, l.bytes.len())]);
            l.result = Ok(());
        }
    }

    fn freed(&self, _: DevicePages) {}

    fn mmu(&self) -> Option<&dyn Mmu> {
        Some(self)
    }
}

// The device ends here. What follows is its MMU.

impl Mmu for Chip {
    fn describe(&self) -> MmuDescriptor {
        MmuDescriptor::new(Mode::Exclusive)
    }

    fn attached(&self, port: Port) {
        let _ = self.0.port.set(port);
    }

    fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let mut table = self.0.table.lock().unwrap();
        for m in batch {
            // The descriptor says that there is nothing else that it could lead to.
            let Target::Own(first) = m.to else { return Err(DeviceError::Unsupported) };
            table.extend((0..m.bytes / PAGE).map(|i| (m.va / PAGE + i, (first + i, m.writable))));
        }
        Ok(())
    }

    fn unmap(&self, addresses: Range<u64>) -> Result<Progress, DeviceError> {
        // They may be all there are: it is the table that is looked through.
        let pages = addresses.start / PAGE..addresses.end.div_ceil(PAGE);
        self.0.table.lock().unwrap().retain(|page, _| !pages.contains(page));
        Ok(Progress::Done)
    }
}

/// The whole pages that a slice touches. Here all of what is on them is the slice's: a vector as large as this one is a mapping
/// of its own.
fn pages_of<T>(slice: &[T]) -> (*const u8, usize) {
    let Range { start, end } = slice.as_ptr_range();
    let first = start.addr() & !(PAGE as usize - 1);
    (first as *const u8, end.addr().next_multiple_of(PAGE as usize) - first)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A device of 1 MiB, and a vector of 4 MiB that the CPU builds on the ordinary heap.
    let chip = Chip::new(1 << 20);
    let space = Space::builder().host(16 << 20).device(Compressed::new(16 << 20)?).device(chip.clone()).build()?;
    let mut numbers: Vec<u64> = (0..1 << 19).collect();
    let (start, len) = pages_of(&numbers);
    let adopted = space.adopt(start, len)?;

    // The device's code runs in a thread of its own, and has nothing but the program's pointer.
    let (pointer, count) = (numbers.as_mut_ptr() as u64, numbers.len() as u64);
    let code = std::thread::spawn(move || -> Result<u64, FaultError> {
        let mut sum = 0;
        for va in (pointer..pointer + 8 * count).step_by(8) {
            sum += chip.access(va, DeviceAccess::Read, |word| u64::from_ne_bytes(*word))?;
            chip.access(va, DeviceAccess::Write, |word| *word = (2 * u64::from_ne_bytes(*word)).to_ne_bytes())?;
        }
        Ok(sum)
    });
    let sum = code.join().expect("the device's code does not panic")?;
    println!("the device has summed up {count} numbers of the CPU's: {sum}");
    // An ordinary access, and the data comes home.
    assert!(numbers.iter().enumerate().all(|(i, n)| *n == 2 * i as u64));
    println!("the CPU finds every one of them doubled");

    let s = space.statistics();
    let m = s.devices[1].mmu.ok_or("the device has an MMU")?;
    println!(
        "{}: {} faults, {} pages moved there, {} evicted, {} lost",
        s.devices[1].name, m.faults, m.moved, m.evicted, s.poisoned
    );
    adopted.release()?;
    Ok(())
}
