//! What a space needs for itself, seen from outside: the resident memory of the process that is neither managed
//! data, nor frames for it, nor the memory of a device.
//!
//! Managed memory and staging are registered with userfaultfd, which the kernel shows in `/proc/self/smaps`; the
//! device used here remembers nothing, because all data are the same byte. What is left is code, which is not
//! counted, and our own books. Two sizes of managed memory are compared, so that what does not grow with it falls
//! out.

use super::Contender;
use crate::error::Trouble;
use crate::spec::{Metric, Sample, Spec, Work};
use crate::workload::Places;
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use peerspace::{Faults, Region, Space};

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;
const PAGES: u32 = (BLOCK / PAGE) as u32;
/// All data are this byte.
pub(super) const BYTE: u8 = 0x5a;

/// A device that can recite all that was ever stored in it.
pub(super) struct Reciter {
    pub(super) pages: u64,
}

impl Device for Reciter {
    fn describe(&self) -> Descriptor {
        Descriptor::private("reciter", self.pages).compares()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        for store in batch {
            store.result = if is_data(store.bytes) { Ok(()) } else { Err(DeviceError::Corrupt) };
        }
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        for load in batch {
            load.bytes.fill(BYTE);
            load.result = Ok(());
        }
    }

    fn freed(&self, _: DevicePages) {}

    fn holds(&self, _: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        Ok(is_data(bytes))
    }
}

fn is_data(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == BYTE)
}

/// A process in which no space was made yet.
#[derive(Debug)]
pub(super) struct Footprint {
    data: u64,
    host: u64,
}

impl Footprint {
    pub(super) fn new(spec: &Spec) -> Result<Footprint, Trouble> {
        Ok(Footprint { data: spec.data, host: spec.host })
    }
}

impl Contender for Footprint {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let nothing = own_bytes()?;
        let device = Reciter { pages: 2 * self.data / PAGE as u64 };
        let space = Space::builder().host(self.host).faults(Faults::Signal).device(device);
        let space = space.build().map_err(Trouble::unavailable("make a space"))?;
        let mut region = space.region(self.data).map_err(Trouble::failed("make a region"))?;

        // First as much as makes every frame used and every queue full, then the rest, whose growth counts.
        let all = region.len() / BLOCK;
        let some = (3 * self.host as usize / BLOCK).min(all / 2);
        write(&mut region, 0..some);
        let small = own_bytes()?;
        write(&mut region, some..all);
        let whole = own_bytes()?;

        // The first ones drive out what was written last: from `some` on everything is out of RAM, in whole blocks.
        let order = |blocks: usize, per: usize| Places::new((blocks * per) as u64).shuffled();
        read(&region, (0..some * PAGES as usize).map(|page| page as u32))?;
        // All pages of a few blocks, so few that they stay in RAM, in an order that is no stream.
        let few = (self.host as usize / BLOCK / 4).min((all - some) / 2);
        let page_of = |i: u32, first: usize| i + (first * PAGES as usize) as u32;
        let before = own_bytes()?;
        read(&region, order(few, PAGES as usize).into_iter().map(|i| page_of(i, some)))?;
        let split = own_bytes()?;
        // One page of each of the others: in each block another one.
        let away = order(all - some - few, 1).into_iter().map(|i| (i * PAGES) + i * 131 % PAGES);
        read(&region, away.map(|i| page_of(i, some + few)))?;
        let split_away = own_bytes()?;

        let per = |bytes: i64, blocks: usize| bytes as f64 / blocks as f64;
        Ok(Sample::verified(all as u64)
            .with(Metric::BytesFixed, (small - nothing) as f64)
            .with(Metric::BytesWhole, per(whole - small, all - some))
            .with(Metric::BytesSplit, per(split - before, few))
            .with(Metric::BytesSplitAway, per(split_away - split, all - some - few)))
    }
}

fn write(region: &mut Region, blocks: std::ops::Range<usize>) {
    region.bytes_mut()[blocks.start * BLOCK..blocks.end * BLOCK].fill(BYTE);
}

/// Reads a byte of each of `pages`.
fn read(region: &Region, mut pages: impl Iterator<Item = u32>) -> Result<(), Trouble> {
    let bytes = region.bytes();
    match pages.find(|page| bytes[*page as usize * PAGE + *page as usize % PAGE] != BYTE) {
        None => Ok(()),
        Some(page) => Err(Trouble::Wrong(format!("a byte of page {page} is not {BYTE:#x}"))),
    }
}

/// Resident bytes of private anonymous memory that is not registered with userfaultfd.
pub(super) fn own_bytes() -> Result<i64, Trouble> {
    // What was unmapped a moment ago is still being dealt with by other threads.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(Trouble::unavailable("read /proc/self/smaps"))?;
    Ok(own_kib(&smaps) * 1024)
}

/// KiB in an `smaps` that are anonymous and not registered.
fn own_kib(smaps: &str) -> i64 {
    let (mut sum, mut anonymous) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Anonymous:") => anonymous = words.next().and_then(|n| n.parse().ok()).unwrap_or(0),
            // The last line of each mapping. um and uw: registered for missing pages, for protected ones.
            Some("VmFlags:") if !words.any(|flag| flag == "um" || flag == "uw") => sum += anonymous,
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::own_kib;

    #[test]
    fn registered_memory_is_not_counted() {
        let smaps = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0\n\
                     Rss:                2048 kB\nAnonymous:          2048 kB\nVmFlags: rd wr mr um uw\n\
                     7f0000200000-7f0000204000 rw-p 00000000 00:00 0\n\
                     Rss:                  16 kB\nAnonymous:            12 kB\nVmFlags: rd wr mr mw\n\
                     7f0000204000-7f0000208000 r-xp 00000000 08:01 5 /bin/x\n\
                     Rss:                  16 kB\nAnonymous:             0 kB\nVmFlags: rd ex mr\n";
        assert_eq!(own_kib(smaps), 12);
    }
}
