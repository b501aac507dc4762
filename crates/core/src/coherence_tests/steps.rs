//! What is true of each step alone, for every state and every request.

use super::*;
use crate::addr::{Access, Pfn};
use crate::entry::{Dirt, MAX_PFN};
use crate::plan::{FaultPlan, on_fault};
use crate::sharers::MAX_MMUS;
use proptest::prelude::*;

fn states() -> impl Strategy<Value = State> {
    let frame = (0..=MAX_PFN).prop_map(Pfn);
    let page = (0..=MAX_PFN).prop_map(|n| DevicePfn::new(Pfn(n)));
    let dirt = prop_oneof![Just(Dirt::Dirty), Just(Dirt::Clean), Just(Dirt::Unverified)];
    let sharers = (1u16..1 << MAX_MMUS).prop_map(|bits| Sharers::decode(bits).expect("one at least"));
    let framed = (frame, any::<bool>(), dirt);
    prop_oneof![
        Just(State::Empty),
        framed.clone().prop_map(|(pfn, writable, dirt)| State::Host { pfn, writable, dirt }),
        framed.clone().prop_map(|(pfn, _, dirt)| State::Standby { pfn, dirt }),
        (framed, sharers.clone())
            .prop_map(|((pfn, writable, dirt), sharers)| { State::Shared { pfn, writable, dirt, sharers } }),
        sharers.prop_map(|sharers| State::Zero { sharers }),
        (page.clone(), 0..4096u16, any::<bool>())
            .prop_map(|(pfn, stamp, rewritten)| { State::Device { pfn, stamp, rewritten } }),
        (page.clone(), any::<bool>()).prop_map(|(pfn, held)| State::Mapped { pfn, held }),
        page.clone().prop_map(|pfn| State::Coherent { pfn }),
        page.prop_map(|pfn| State::Poisoned { pfn }),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    let wish = prop_oneof![Just(Wish::Migrate), Just(Wish::Replicate), Just(Wish::Remote)];
    let access = prop_oneof![Just((false, false)), Just((true, false)), Just((true, true)), Just((false, true))];
    (0..MAX_MMUS, access, wish, any::<bool>(), any::<bool>()).prop_map(
        |(mmu, (write, atomic), wish, zero_page, protects)| Request {
            mmu: MmuId(mmu),
            write,
            atomic,
            wish,
            zero_page,
            protects,
        },
    )
}

/// Where a state says that the data is.
#[derive(Debug, PartialEq)]
enum Truth {
    Zeros,
    Frame(Pfn),
    Page(DevicePfn),
}

fn truth(state: State) -> Truth {
    match state {
        State::Empty | State::Zero { .. } => Truth::Zeros,
        State::Host { pfn, .. } | State::Standby { pfn, .. } | State::Shared { pfn, .. } => Truth::Frame(pfn),
        State::Device { pfn, .. } | State::Mapped { pfn, .. } | State::Coherent { pfn } | State::Poisoned { pfn } => {
            Truth::Page(pfn)
        }
        State::Leaf(_) => unreachable!("a page is no leaf"),
    }
}

#[test]
fn who_has_it_enters() {
    let pfn = DevicePfn::new(Pfn(7));
    let request =
        Request { mmu: MmuId(0), write: true, atomic: false, wish: Wish::Migrate, zero_page: true, protects: true };
    let step = on_device_fault(State::Device { pfn, stamp: 1, rewritten: false }, request, |_| true);
    assert_eq!(step, Step::Enter(State::Mapped { pfn, held: false }, Grant::Own));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Rules G2, G3, G14: who enters has been permitted to; the data stays where it is; whoever may write is alone, or all go
    /// to one frame; and what was asked for is granted, or the device would fault for ever.
    #[test]
    fn g2_g3_g14_who_enters_is_permitted_to(state in states(), request in requests(), own: bool) {
        let writes = request.write || request.atomic;
        let Step::Enter(next, grant) = on_device_fault(state, request, |_| own) else { return Ok(()) };
        prop_assert_eq!(truth(next), truth(state));
        match (grant, next) {
            (Grant::Own, State::Mapped { held, .. }) => {
                prop_assert!(own);
                prop_assert_eq!(held, matches!(state, State::Mapped { held: true, .. }));
            }
            // One memory for all, with nobody alone.
            (Grant::Own, State::Coherent { .. }) => prop_assert!(own && !request.atomic),
            (Grant::Frame { writable: true }, State::Coherent { .. }) => {
                prop_assert!(!own && !request.atomic && request.wish == Wish::Remote);
            }
            (Grant::Frame { writable: true }, State::Shared { writable: true, sharers, .. }) => {
                prop_assert!(sharers.has(request.mmu));
                // So was what the others have: no copies.
                let writable =
                    matches!(state, State::Host { writable: true, .. } | State::Shared { writable: true, .. });
                prop_assert!(writable);
            }
            (Grant::Copy, State::Shared { writable: false, sharers, .. }) | (Grant::Zeros, State::Zero { sharers }) => {
                prop_assert!(sharers.has(request.mmu));
                prop_assert!(!writes);
            }
            other => prop_assert!(false, "{:?} is not to be granted", other),
        }
        if request.atomic {
            prop_assert_eq!(grant, Grant::Own);
        }
        // Nobody who was there is forgotten.
        if let (State::Shared { sharers: before, .. }, State::Shared { sharers: after, .. })
        | (State::Zero { sharers: before }, State::Zero { sharers: after }) = (state, next)
        {
            prop_assert_eq!(before.with(request.mmu), after);
        }
    }

    /// Rules G3, G9: a copy is made of what nobody writes to, for who has none and only reads.
    #[test]
    fn g9_copies_are_made_of_what_nobody_writes(state in states(), request in requests(), own: bool) {
        let Step::Replicate(sharers) = on_device_fault(state, request, |_| own) else { return Ok(()) };
        prop_assert!(!request.write && !request.atomic && request.protects && request.wish == Wish::Replicate);
        let before = match state {
            State::Host { writable: false, .. } => Sharers::one(request.mmu),
            State::Shared { writable: false, sharers, .. } => sharers.with(request.mmu),
            other => return Err(TestCaseError::fail(format!("{other:?} is not to be copied"))),
        };
        prop_assert_eq!(sharers, before);
        let has_one = matches!(state, State::Shared { sharers, .. } if sharers.has(request.mmu));
        prop_assert!(!has_one);
    }

    /// Rules G2, Z8: each step is one that its state permits, and one that changes something: nobody runs in circles.
    #[test]
    fn g2_steps_fit_their_states(state in states(), request in requests(), own: bool) {
        let step = on_device_fault(state, request, |_| own);
        let fits = match step {
            Step::Enter(..) | Step::Replicate(_) => true,
            Step::Recall => {
                !matches!(state, State::Mapped { held: true, .. }) && recalled(state, || 0).is_some()
            }
            Step::Protect => request.protects && matches!(state, State::Host { writable: true, .. }),
            Step::Unmap => matches!(state, State::Host { .. }),
            Step::Home(access) => matches!(
                on_fault(state, access),
                FaultPlan::Fill | FaultPlan::Upgrade | FaultPlan::TakeBack | FaultPlan::Load(_)
            ),
            Step::Move => match state {
                State::Empty | State::Standby { .. } => true,
                State::Device { .. } => !own,
                _ => false,
            },
            Step::Leave => matches!(state, State::Coherent { .. }),
            Step::Wait => !own && matches!(state, State::Mapped { held: true, .. }),
            Step::Lost(pfn) => state == State::Poisoned { pfn },
        };
        prop_assert!(fits, "{:?}", step);
        // Only for a write is the page brought home to be written.
        if let Step::Home(access) = step {
            prop_assert_eq!(access == Access::Write, request.write || request.atomic);
        }
        // Z9, Z8: what is lost is said to be lost; what is held is waited for, by devices as by the CPU.
        prop_assert_eq!(matches!(step, Step::Lost(_)), matches!(state, State::Poisoned { .. }));
        if !own {
            let waits = matches!(on_fault(state, Access::Read), FaultPlan::Wait(_));
            prop_assert_eq!(step == Step::Wait, waits);
        }
    }

    /// Rules G2, G16: a recall moves nothing, and once is enough.
    #[test]
    fn g16_a_recall_leaves_the_data_where_it_is(state in states()) {
        let mapped = matches!(state, State::Shared { .. } | State::Zero { .. } | State::Mapped { .. });
        match recalled(state, || 7) {
            Some(next) => {
                prop_assert!(mapped);
                prop_assert_eq!(truth(next), truth(state));
                prop_assert_eq!(recalled(next, || 7), None);
                if let (State::Shared { writable: w, dirt: d, .. }, State::Host { writable, dirt, .. }) = (state, next) {
                    prop_assert_eq!((writable, dirt), (w, d));
                }
            }
            None => prop_assert!(!mapped),
        }
    }

    /// Rules G3, Z8: the CPU takes nothing that devices map without a recall, and waits for what is held.
    #[test]
    fn g3_the_cpu_recalls_before_it_takes(state in states(), write: bool) {
        let plan = on_fault(state, if write { Access::Write } else { Access::Read });
        let reads_beside = matches!(state, State::Shared { writable, .. } if writable || !write);
        match plan {
            FaultPlan::Recall(_) => prop_assert!(recalled(state, || 0).is_some() && !reads_beside),
            FaultPlan::Wait(_) => {
                let held = matches!(state, State::Mapped { held: true, .. });
                prop_assert!(held);
            }
            FaultPlan::Present => {
                let alone = matches!(state, State::Host { writable, .. } if writable || !write);
                prop_assert!(reads_beside || alone);
            }
            _ => prop_assert_eq!(recalled(state, || 0), None),
        }
    }
}
