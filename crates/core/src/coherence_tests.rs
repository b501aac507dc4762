//! The coherence protocol, checked.

use super::*;
use crate::addr::Pfn;

#[test]
fn who_has_it_enters() {
    let pfn = DevicePfn::new(Pfn(7));
    let request =
        Request { mmu: MmuId(0), write: true, atomic: false, wish: Wish::Migrate, zero_page: true, protects: true };
    let step = on_device_fault(State::Device { pfn, stamp: 1, rewritten: false }, request, |_| true);
    assert_eq!(step, Step::Enter(State::Mapped { pfn, held: false }, Grant::Own));
}
