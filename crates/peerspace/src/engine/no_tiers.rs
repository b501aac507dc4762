//! What takes the place of the devices where the space has none: the build without the feature `devices` (rule Z10).
//!
//! There is no page of a device ([`DevicePfn`]) and no device, and the types say so: values of them cannot be made. So
//! whatever the engine would do with one is gone when it is compiled. What is left are answers: nothing is found, nothing is
//! taken, everything is full.

use peerspace_core::addr::{DevicePfn, Geometry, Order, Pages, Pfn, Vpn};
use std::marker::PhantomData;

/// Pages that are evicted together.
pub(crate) const BATCH: usize = 64;

/// What there is none of. Only this module knows, so that nobody else is told that their code is never reached.
enum Nothing {}

/// A device to be added.
pub(crate) struct OpenDevice(Nothing);

/// Why a device did not do something.
pub(crate) struct DeviceError(Nothing);

/// Why a device cannot be used.
#[allow(dead_code)] // where there are devices, either happens
pub(crate) enum TierError<E> {
    Refused(String, String),
    Memory(E),
}

/// Which process this is, after a fork.
pub(crate) enum ForkSide {
    Parent,
    Child,
}

/// Pages to be read from a device.
pub(crate) struct Load<'a> {
    pub(crate) result: Result<(), DeviceError>,
    _bytes: &'a mut [u8],
}

impl<'a> Load<'a> {
    pub(crate) fn new(_: u64, bytes: &'a mut [u8]) -> Load<'a> {
        Load { result: Ok(()), _bytes: bytes }
    }
}

/// One folio that would be written to a device.
#[allow(dead_code)] // nobody looks at what is not written
pub(crate) struct WriteBack<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) order: Order,
    pub(crate) vpn: Vpn,
    pub(crate) at: Option<DevicePfn>,
}

/// Where the pages of a device are.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) base: Pfn,
}

impl Range {
    pub(crate) fn contains(self, _: Pfn) -> bool {
        false
    }
}

/// What a device is.
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) slow: bool,
    pub(crate) compares: bool,
}

/// A folio of a device that is in use.
pub(crate) struct InUse {
    pub(crate) page: u64,
    pub(crate) order: Order,
}

/// A reference to a device.
pub(crate) struct TierRef {
    pub(crate) info: Info,
    pub(crate) range: Range,
    nothing: Nothing,
}

impl TierRef {
    pub(crate) fn load(&self, _: &mut [Load<'_>], _: Geometry) {
        match self.nothing {}
    }

    pub(crate) fn has_room(&self) -> bool {
        match self.nothing {}
    }

    pub(crate) fn is_foreign(&self) -> bool {
        match self.nothing {}
    }

    pub(crate) fn has_failed(&self) -> bool {
        match self.nothing {}
    }

    pub(crate) fn pages_in_place(&self) -> u64 {
        match self.nothing {}
    }

    pub(crate) fn tell_lost(&self, _: peerspace_core::addr::Va, _: DevicePfn, _: DeviceError) -> bool {
        match self.nothing {}
    }

    pub(crate) fn used(&self) -> Pages {
        match self.nothing {}
    }

    pub(crate) fn mmu_id(&self) -> Option<peerspace_core::sharers::MmuId> {
        match self.nothing {}
    }

    pub(crate) fn replica(&self, _: Vpn) -> Option<u64> {
        match self.nothing {}
    }

    pub(crate) fn vpn(&self, _: u64) -> Option<Vpn> {
        match self.nothing {}
    }

    pub(crate) fn next_in_use(&self, _: u64) -> Option<InUse> {
        match self.nothing {}
    }

    #[cfg(feature = "process")]
    pub(crate) fn ram_bytes(&self) -> u64 {
        match self.nothing {}
    }
}

/// All devices.
pub(crate) struct Tiers<W>(PhantomData<fn() -> W>);

impl<W> Tiers<W> {
    pub(crate) fn new(_: Geometry, _: Pfn) -> Tiers<W> {
        Tiers(PhantomData)
    }

    pub(crate) fn attach<E>(
        &self,
        device: OpenDevice,
        _: impl FnMut(usize) -> Result<W, E>,
    ) -> Result<u64, TierError<E>> {
        match device.0 {}
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = TierRef> {
        std::iter::empty()
    }

    pub(crate) fn find(&self, pfn: DevicePfn) -> Option<TierRef> {
        pfn.of_no_device()
    }

    pub(crate) fn of(&self, pfn: DevicePfn) -> TierRef {
        pfn.of_no_device()
    }

    pub(crate) fn free(&self, pfn: DevicePfn, _: Order) {
        pfn.of_no_device()
    }

    pub(crate) fn retire(&self, pfn: DevicePfn) {
        pfn.of_no_device()
    }

    pub(crate) fn place(&self, pfn: DevicePfn, _: Order, _: Vpn) {
        pfn.of_no_device()
    }

    pub(crate) fn load(&self, pfn: DevicePfn, _: &mut [u8]) -> Result<(), DeviceError> {
        pfn.of_no_device()
    }

    pub(crate) fn holds(&self, pfn: DevicePfn, _: &[u8]) -> bool {
        pfn.of_no_device()
    }

    pub(crate) fn rewrite(&self, pfn: DevicePfn, _: &[u8]) -> bool {
        pfn.of_no_device()
    }

    /// Leaves them where they are.
    pub(crate) fn write_back(&self, _: &mut [WriteBack<'_>]) {}

    /// There is room for nothing.
    pub(crate) fn full(&self) -> bool {
        true
    }

    pub(crate) fn before_fork(&self) {}

    pub(crate) fn after_fork(&self, _: ForkSide) {}

    pub(crate) fn renew(&self) {}
}
