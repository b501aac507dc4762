//! What takes the place of memory in place where the space has no devices: the build without the feature `devices` (rule
//! Z10). Nothing is ever in place, and there is nothing to wait for.

use super::context::Context;
use super::fault::{Fault, Hold, Outcome};
use super::turn::Turn;
use super::{Engine, Entry};
use peerspace_core::addr::{DevicePfn, PageRange, Vpn};
use peerspace_os::{Kernel, Message, Trouble};

/// What is being put in place or taken away: nothing.
#[derive(Debug)]
pub(crate) struct InPlace;

impl InPlace {
    pub(crate) fn new(_: u64) -> InPlace {
        InPlace
    }

    pub(crate) fn renew(&self) {}

    pub(crate) fn is_left_behind(&self) -> bool {
        false
    }

    pub(crate) fn is_under_way(&self) -> bool {
        false
    }

    pub(crate) fn await_end(&self, _: impl FnMut() -> Option<Message>, _: impl FnMut(Message)) {}

    pub(crate) fn is_ours(&self, _: &Message) -> bool {
        false
    }
}

impl<K: Kernel> Engine<K> {
    pub(super) fn fault_in_place(
        &self,
        pfn: DevicePfn,
        _: Entry<'_, K>,
        _: &Fault,
        _: &Context,
    ) -> Result<Outcome, Hold> {
        pfn.of_no_device()
    }

    pub(super) fn gone_from_place(&self, _: PageRange, pfn: DevicePfn) {
        pfn.of_no_device()
    }

    pub(super) fn close_in_place(&self, _: PageRange) {}

    pub(crate) fn discard_in_place(
        &self,
        pages: PageRange,
        mut rest: impl FnMut(PageRange) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        rest(pages)
    }

    pub(super) fn hold_in_place(&self, pfn: DevicePfn, _: &Entry<'_, K>, _: PageRange, _: bool) -> Option<PageRange> {
        pfn.of_no_device()
    }

    pub(super) fn let_go_in_place(&self, pfn: DevicePfn) {
        pfn.of_no_device()
    }

    pub(super) fn leave_place(&self, pfn: DevicePfn, _: Vpn) -> Result<(), Trouble> {
        pfn.of_no_device()
    }

    /// Nobody promises anything.
    pub(super) fn may_unprotect(&self, _: PageRange) -> bool {
        false
    }

    pub(super) fn leave_places(&self, _: PageRange) -> Result<(), Trouble> {
        Ok(())
    }

    pub(super) fn take_failed_from_place(&self) {}

    pub(crate) fn leave_shared_memory(&self, _: &Turn<'_, K::Park>) {}

    pub(crate) fn reopen_shared_memory(&self) {}
}
