//! A device whose writes to the host's memory are slow: they have begun, the kernel has the page in hand, and the bytes are a
//! while in coming.
//!
//! Writes that are over in no time hardly ever meet somebody who takes the page away. So these come from a page of the device's
//! own that is not there yet when the kernel copies from it; a *courier* brings it a moment later. Needs a userfaultfd that
//! serves accesses of the kernel; where that is not to be had, writes are as fast as ever.

use super::PAGE;
use super::memory::{discard, own_memory};
use peerspace::device::mmu::{FaultError, Port};
use peerspace_os::linux::uffd::{Mode, Uffd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Of so many writes one is slow.
const ONE_IN: u64 = 2;
/// How long the bytes are in coming, at least.
const DELAY: Duration = Duration::from_micros(50);

/// The device's page, and the courier.
pub(super) struct Slow {
    page: u64,
    count: AtomicU64,
    /// What the page is to hold, to the courier; and from him, that it does.
    courier: Mutex<(Sender<Vec<u8>>, Receiver<()>)>,
}

impl Slow {
    pub(super) fn new() -> Option<Slow> {
        let mut uffd = Uffd::open(false).ok()?;
        uffd.enable(0).ok()?;
        let page = own_memory(PAGE);
        uffd.register(page, PAGE as u64, Mode::Missing).ok()?;
        let (to_courier, orders) = channel::<Vec<u8>>();
        let (done, from_courier) = channel();
        std::thread::spawn(move || {
            for bytes in orders {
                std::thread::sleep(DELAY);
                // SAFETY: the page is ours, missing, and read by nobody but the kernel, in a call that it is to copy for.
                let copied = unsafe { uffd.copy(page, bytes.as_ptr(), PAGE as u64, false, true) };
                assert_eq!(copied, (PAGE as u64, None), "the page of a slow device");
                if done.send(()).is_err() {
                    break;
                }
            }
        });
        Some(Slow { page, count: AtomicU64::new(0), courier: Mutex::new((to_courier, from_courier)) })
    }

    /// Writes `bytes` by `port`, slowly now and then.
    pub(super) fn write(&self, port: &Port, va: u64, bytes: &[u8]) -> Result<(), FaultError> {
        let courier = match self.count.fetch_add(1, SeqCst).is_multiple_of(ONE_IN) {
            true => self.courier.try_lock().ok(),
            false => None,
        };
        let Some(courier) = courier else { return port.write(va, bytes) };
        discard(self.page, PAGE);
        let mut content = bytes.to_vec();
        content.resize(PAGE, 0);
        courier.0.send(content).expect("the courier is there");
        // SAFETY: the page stays mapped, and what is read of it is what the courier brings.
        let slow = unsafe { std::slice::from_raw_parts(self.page as *const u8, bytes.len()) };
        let written = port.write(va, slow);
        courier.1.recv().expect("the courier is there");
        written
    }
}
