//! Devices that hang, and devices that say they have done what they have not: the space goes on, and the message says which
//! (rules Z9, G16).

use peerspace::device::deadline::Deadline;
use peerspace::device::soft::Soft;
use peerspace::device::{Descriptor, Device, DevicePages, Load, Store};
use peerspace::{Error, Faults, Space};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// `soft`, that hangs when it is told to, or stores nothing.
struct Doubtful {
    inner: Soft,
    hangs: Arc<AtomicBool>,
    lies: bool,
    stores: Arc<AtomicU64>,
}

impl Doubtful {
    fn new(bytes: u64) -> Doubtful {
        Doubtful { inner: Soft::new(bytes).unwrap(), hangs: Arc::default(), lies: false, stores: Arc::default() }
    }

    fn wait(&self) {
        while self.hangs.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Device for Doubtful {
    fn describe(&self) -> Descriptor {
        let info = self.inner.describe();
        if self.lies { info.verified() } else { info }
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        self.wait();
        self.stores.fetch_add(1, SeqCst);
        if self.lies {
            return batch.iter_mut().for_each(|s| s.result = Ok(()));
        }
        self.inner.store(batch);
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        self.wait();
        self.inner.load(batch);
    }

    fn freed(&self, pages: DevicePages) {
        self.wait();
        self.inner.freed(pages);
    }
}

fn space(doubtful: impl Device + 'static) -> Space {
    Space::builder()
        .host(8 << 20)
        .device(doubtful)
        .device(Soft::new(128 << 20).unwrap())
        .faults(Faults::Signal)
        .build()
        .unwrap()
}

/// What is on the device when it stops answering is lost, and says so; everything else goes on.
#[test]
fn z9_a_device_that_never_answers_is_given_up() {
    let device = Doubtful::new(16 << 20);
    let hangs = device.hangs.clone();
    let space = space(Deadline::new(device, Duration::from_millis(300)).unwrap());
    let mut region = space.region(48 << 20).unwrap();
    region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64 + 1);
    hangs.store(true, SeqCst);
    let begin = Instant::now();
    let (mut good, mut lost) = (0, 0);
    for at in (0..region.len()).step_by(4096) {
        let mut word = [0; 8];
        match region.try_read(at, &mut word) {
            Ok(()) => {
                assert_eq!(u64::from_le_bytes(word), (at / 8) as u64 + 1);
                good += 1;
            }
            Err(Error::Lost { device, .. }) => {
                assert_eq!(device, "soft");
                lost += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(lost > 0 && lost <= 4096 && good >= 8192, "{good} good, {lost} lost");
    hangs.store(false, SeqCst);
    // What is left goes on, with the other device.
    region.discard(0..48 << 20).unwrap();
    region.bytes_mut().fill(3);
    assert!(region.bytes().iter().all(|b| *b == 3));
}

/// In good times the deadline changes nothing.
#[test]
fn a_deadline_that_is_kept_is_not_noticed() {
    let space = space(Deadline::new(Doubtful::new(64 << 20), Duration::from_secs(20)).unwrap());
    let mut region = space.region(40 << 20).unwrap();
    region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64 ^ 77);
    assert!(region.typed::<u64>().iter().enumerate().all(|(i, w)| *w == i as u64 ^ 77));
    space.check();
    assert_eq!(space.statistics().poisoned, 0);
}

/// Nothing is ever lost to a device that only says that it stores.
#[test]
fn g16_a_device_that_lies_about_stores_holds_nothing() {
    let device = Doubtful { lies: true, ..Doubtful::new(64 << 20) };
    let stores = device.stores.clone();
    let space = space(device);
    let mut region = space.region(40 << 20).unwrap();
    region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64 | 1);
    assert!(region.typed::<u64>().iter().enumerate().all(|(i, w)| *w == i as u64 | 1));
    let s = space.statistics();
    assert!(stores.load(SeqCst) > 0 && s.devices[0].errors > 0 && s.devices[0].stores == 0, "{:?}", s.devices[0]);
    assert_eq!(s.poisoned, 0);
    space.check();
}
