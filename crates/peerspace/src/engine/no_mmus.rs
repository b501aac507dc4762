//! What takes the place of devices' MMUs where the space has no devices: the build without the feature `devices` (rule Z10).

use super::{Engine, Entry};
use peerspace_core::plan::OnDevices;
use peerspace_os::Kernel;

impl<K: Kernel> Engine<K> {
    /// Nobody maps anything.
    #[inline]
    pub(crate) fn recall<'t>(&'t self, entry: Entry<'t, K>) -> Entry<'t, K> {
        entry
    }

    pub(crate) fn recall_for_cpu<'t>(&'t self, on: OnDevices, _: Entry<'t, K>) -> Entry<'t, K> {
        match on {
            OnDevices::Shared(sharers) => sharers.of_no_device(),
            OnDevices::Alone(pfn) => pfn.of_no_device(),
        }
    }

    pub(crate) fn access_from(
        &self,
        pfn: peerspace_core::addr::DevicePfn,
        _: peerspace_core::addr::Access,
    ) -> peerspace_core::addr::Access {
        pfn.of_no_device()
    }

    pub(crate) fn reserve_on_devices(&self, _: peerspace_core::addr::VaRange) -> bool {
        true
    }

    pub(crate) fn release_on_devices(&self, _: peerspace_core::addr::VaRange) {}

    /// Everything can be reached.
    pub(crate) fn reach(&self) -> std::ops::Range<u64> {
        0..u64::MAX
    }

    pub(crate) fn recall_all(&self) {}

    /// There is nobody to halt.
    #[inline]
    pub(crate) fn halt_devices(&self) -> Option<core::convert::Infallible> {
        None
    }

    pub(super) fn withdraw_gone(&self, _: peerspace_core::addr::PageRange) {}

    pub(super) fn withdraw_in_place(&self, _: peerspace_core::addr::PageRange) {}
}
