//! A device that fails after a while: to see what becomes of a program then (rule Z9).

use super::{
    Descriptor, Device, DeviceError, DevicePages, ForkSide, Load, NamedRegions, OwnMetadata, SharedMemory, Store,
    Usage,
};
use crate::spec::{OpenDevice, own};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Another device, until so many pages have been transferred; then it is [gone](DeviceError::Gone) for good.
pub struct Failing {
    inner: OpenDevice,
    left: AtomicU64,
    page: u64,
}

impl Failing {
    /// `device`, for `pages` pages to or from it.
    pub fn new(device: impl Device + 'static, pages: u64) -> Failing {
        Failing::of(own(device), pages)
    }

    pub(crate) fn of(inner: OpenDevice, pages: u64) -> Failing {
        Failing { inner, left: AtomicU64::new(pages), page: rustix::param::page_size() as u64 }
    }

    /// Whether it lives through a transfer of so many bytes.
    fn lives(&self, bytes: u64) -> bool {
        let pages = bytes / self.page;
        let lives = self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(pages)).is_ok();
        if !lives {
            self.left.store(0, Relaxed);
        }
        lives
    }
}

impl Device for Failing {
    fn describe(&self) -> Descriptor {
        self.inner.describe()
    }

    fn store(&self, batch: &mut [Store<'_>]) {
        if self.lives(batch.iter().map(|s| s.bytes.len() as u64).sum()) {
            return self.inner.store(batch);
        }
        batch.iter_mut().for_each(|s| s.result = Err(DeviceError::Gone));
    }

    fn load(&self, batch: &mut [Load<'_>]) {
        if self.lives(batch.iter().map(|l| l.bytes.len() as u64).sum()) {
            return self.inner.load(batch);
        }
        batch.iter_mut().for_each(|l| l.result = Err(DeviceError::Gone));
    }

    fn clear(&self, pages: DevicePages) -> Result<(), DeviceError> {
        if self.lives(pages.count * self.page) { self.inner.clear(pages) } else { Err(DeviceError::Gone) }
    }

    fn mmu(&self) -> Option<&dyn super::mmu::Mmu> {
        self.inner.mmu()
    }

    fn freed(&self, pages: DevicePages) {
        self.inner.freed(pages);
    }

    fn holds(&self, page: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        if self.left.load(Relaxed) > 0 { self.inner.holds(page, bytes) } else { Err(DeviceError::Gone) }
    }

    fn usage(&self) -> Option<Usage> {
        self.inner.usage()
    }

    fn shared(&self, page: u64) -> Option<SharedMemory<'_>> {
        self.inner.shared(page)
    }

    fn altmap(&self) -> Option<OwnMetadata> {
        self.inner.altmap()
    }

    fn named(&self) -> Option<&dyn NamedRegions> {
        self.inner.named()
    }

    fn before_fork(&self) {
        self.inner.before_fork();
    }

    fn after_fork(&self, side: ForkSide) {
        self.inner.after_fork(side);
    }
}

impl fmt::Debug for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failing").field("left", &self.left).finish_non_exhaustive()
    }
}

/// A failure as written on a command line: `NUMBER:PAGES`, the device of that number (the first is 1) fails after so many
/// pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailureSpec {
    /// Which device, counted from 1 in the order in which they are tried.
    pub device: usize,
    /// Pages that are transferred before it fails.
    pub pages: u64,
}

/// A failure that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no failure: write the number of a device and pages to transfer before it fails, such as 1:5000")]
pub struct FailureError(String);

impl FromStr for FailureSpec {
    type Err = FailureError;

    fn from_str(s: &str) -> Result<FailureSpec, FailureError> {
        let parse = || {
            let (device, pages) = s.split_once(':')?;
            let plain = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
            let device = device.parse().ok().filter(|n| *n > 0 && plain(device))?;
            Some(FailureSpec { device, pages: pages.parse().ok().filter(|_| plain(pages))? })
        };
        parse().ok_or_else(|| FailureError(s.into()))
    }
}

impl fmt::Display for FailureSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_read_and_written() {
        assert_eq!("2:500".parse(), Ok(FailureSpec { device: 2, pages: 500 }));
        assert_eq!("1:0".parse::<FailureSpec>().unwrap().to_string(), "1:0");
        for bad in ["", "1", ":", "0:5", "1:", ":5", "+1:5", "1:5x", "compressed:5", "1:99999999999999999999"] {
            assert!(bad.parse::<FailureSpec>().is_err(), "{bad}");
        }
    }

    #[cfg(feature = "soft")]
    #[test]
    fn it_does_what_it_says_and_then_is_gone() {
        let page = rustix::param::page_size();
        let device = Failing::new(super::super::soft::Soft::new(16 * page as u64).unwrap(), 3);
        let bytes = vec![7; page];
        let mut back = vec![0; page];
        let mut store = [Store::new(1, &bytes)];
        device.store(&mut store);
        let mut load = [Load::new(1, &mut back)];
        device.load(&mut load);
        assert_eq!((&store[0].result, &load[0].result), (&Ok(()), &Ok(())));
        assert_eq!(device.holds(1, &bytes), Ok(true));
        let mut third = [Store::new(2, &bytes)];
        device.store(&mut third);
        assert_eq!(third[0].result, Ok(()));
        for _ in 0..2 {
            let mut load = [Load::new(1, &mut back)];
            device.load(&mut load);
            assert_eq!(load[0].result, Err(DeviceError::Gone));
        }
        assert_eq!(device.holds(1, &bytes), Err(DeviceError::Gone));
        assert_eq!(back, bytes, "what came before stays");
    }
}
