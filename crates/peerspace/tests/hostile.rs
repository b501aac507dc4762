//! Devices that do what devices must not: whatever they do, an access gets its data, SIGBUS or an error; others go
//! on; nothing is lost that could be saved; nothing reads as zeros or as what it was before; nothing hangs.

mod common;
#[path = "hostile/real.rs"]
mod real;

use common::*;
use peerspace::device::soft::Soft;
use peerspace::device::{Descriptor, Device, DeviceError, DevicePages, Load, Store};
use peerspace::{Error, Faults, Region, Space};
use peerspace_core::addr::Pages;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const HOST: usize = 4 * MIB;
const SIZE: usize = 9 * MIB;
/// No page is lost.
const NONE: [usize; 0] = [];
const BOTH: [Faults; 2] = [Faults::Signal, Faults::Threads];

/// A device of each sort: one that is read in small pages, and one that is read in huge folios too.
fn sorts(orders: &Arc<Orders>) -> [Obedient; 2] {
    let plain = Obedient::new(orders, 64 * MIB);
    let comparing = Obedient { descriptor: plain.descriptor.clone().compares(), ..Obedient::new(orders, 64 * MIB) };
    [plain, comparing]
}

/// Runs `work` with a space for one sort of device and one delivery of faults, of which there are four.
fn with(i: usize, work: impl Fn(&Space, &Orders)) {
    let orders = Orders::new();
    let [plain, comparing] = sorts(&orders);
    let space = space(BOTH[i / 2 % 2], HOST, if i.is_multiple_of(2) { plain } else { comparing });
    work(&space, &orders);
    space.check();
    drop(space);
    orders.check();
}

/// Runs `work` for each of them.
fn each(work: impl Fn(&Space, &Orders)) {
    (0..4).for_each(|i| with(i, &work));
}

/// Looks at every page in a few orders: each has its word, or is lost. Returns which are lost.
fn verify(region: &Region, word: impl Fn(usize) -> u64) -> Vec<usize> {
    let n = region.len() / page();
    let mut lost = std::collections::BTreeSet::new();
    let mut copy = vec![0u8; page()];
    let strides = [1, n - 1, 7];
    for stride in strides {
        for k in 0..n {
            let i = k * stride % n;
            match region.try_read(i * page(), &mut copy) {
                Ok(()) => {
                    let good = copy == word(i).to_le_bytes().repeat(words_per_page());
                    assert!(good, "page {i} is {:#x} and not {:#x}", copy[0], word(i));
                    assert!(!lost.contains(&i), "page {i} was lost and came back");
                }
                Err(Error::Lost { .. }) => drop(lost.insert(i)),
                Err(e) => panic!("page {i}: {e}"),
            }
            if CAN_TRY && stride == 7 {
                let byte = read_byte(region.as_ptr().wrapping_add(i * page() + 8 * (i % 500)));
                assert_eq!(byte, (!lost.contains(&i)).then_some(word(i) as u8), "page {i}");
            }
        }
    }
    lost.into_iter().collect()
}

#[test]
fn loads_that_fail_now_and_then_lose_nothing() {
    let errors = [DeviceError::Io(5), DeviceError::Short { got: 1, wanted: 2 }, DeviceError::Corrupt];
    for (i, (n, error)) in [1, 5, 64].into_iter().zip(errors).enumerate() {
        with(i + 1, |space, orders| {
            let mut region = space.region(SIZE as u64).unwrap();
            fill(region.typed_mut());
            let error = error.clone();
            // Never twice in a row for the same page.
            let mut failed = std::collections::HashSet::new();
            orders.on_load(move |a| match a.page % n == 0 && !failed.remove(&a.page) {
                true => {
                    failed.insert(a.page);
                    Answer::Fails(error.clone())
                }
                false => Answer::Good,
            });
            assert_eq!(verify(&region, word), NONE);
            let s = space.statistics();
            assert!(s.device_errors > 10 && s.poisoned == 0, "{s:?}");
        });
    }
}

#[test]
fn what_cannot_be_loaded_is_lost_and_nothing_else() {
    let answers = [
        Answer::Fails(DeviceError::Short { got: 17, wanted: 4096 }),
        Answer::Silent,
        Answer::Fails(DeviceError::NoSpace),
        Answer::Panics,
    ];
    for (i, answer) in answers.into_iter().enumerate() {
        with(i, |space, orders| {
            let mut region = space.region(SIZE as u64).unwrap();
            fill(region.typed_mut());
            let bad = |i: usize| i.is_multiple_of(97);
            let words: Vec<u64> = (0..region.len() / page()).filter(|i| bad(*i)).map(word).collect();
            let answer = answer.clone();
            orders.on_load(move |a| if words.contains(&a.word) { answer.clone() } else { Answer::Good });
            let lost = verify(&region, word);
            assert!(lost.iter().all(|i| bad(*i)), "{lost:?}");
            assert!(lost.len() > SIZE / page() / 97 / 2, "{lost:?}");
            assert_eq!(space.statistics().poisoned, lost.len() as u64);
        });
    }
}

#[test]
fn z9_a_bad_place_on_a_device_loses_one_page() {
    each(|space, orders| {
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        let bad = 100..110;
        orders.on_load({
            let bad = bad.clone();
            move |a| if bad.contains(&a.page) { Answer::Fails(DeviceError::Corrupt) } else { Answer::Good }
        });
        let lost = verify(&region, word);
        assert!(!lost.is_empty());
        // Nothing else is put there, however often everything comes and goes.
        for _ in 0..3 {
            let lost = verify(&region, word);
            for i in &lost {
                region.discard(i * page()..(i + 1) * page()).unwrap();
            }
            fill(region.typed_mut());
        }
        assert_eq!(verify(&region, word), NONE);
        let s = space.statistics();
        assert!(s.poisoned <= bad.end - bad.start, "{} pages lost for {bad:?}", s.poisoned);
        let device = s.devices.iter().find(|d| d.retired_bytes > 0).unwrap();
        assert_eq!(device.retired_bytes, s.poisoned * page() as u64);
        // It counts as neither used nor free: of a region that has gone nothing is left.
        drop(region);
        assert_eq!(orders.held(), 0);
    });
}

#[test]
fn a_device_that_dies_takes_only_its_own_pages_along() {
    each(|space, orders| {
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        orders.on_load(|_| Answer::Fails(DeviceError::Gone));
        orders.on_store(|_| Answer::Fails(DeviceError::Gone));
        let lost = verify(&region, word);
        let n = SIZE / page();
        assert!(lost.len() > n / 2 && lost.len() <= n - HOST / page() / 4, "{} of {n}", lost.len());
        // What is in RAM stays and can be used.
        let live = (0..n).find(|i| !lost.contains(i)).unwrap();
        region.typed_mut()[live * words_per_page() + 3] = 5u64;
        assert_eq!(region.typed::<u64>()[live * words_per_page() + 3], 5);
    });
}

#[test]
fn stores_that_fail_now_and_then_lose_nothing() {
    let answers = [
        Answer::Fails(DeviceError::NoSpace),
        Answer::Fails(DeviceError::Io(28)),
        Answer::Fails(DeviceError::Short { got: 0, wanted: 1 }),
        Answer::Silent,
        Answer::Panics,
    ];
    for (i, (answer, n)) in answers.into_iter().zip([2, 3, 4, 5, 50]).enumerate() {
        with(i, |space, orders| {
            orders.reversed.store(n % 2 == 0, SeqCst);
            let answer = answer.clone();
            orders.on_store(move |a| if a.nth % n == 0 { answer.clone() } else { Answer::Good });
            let mut region = space.region(SIZE as u64).unwrap();
            fill(region.typed_mut());
            assert_eq!(verify(&region, word), NONE);
            // Pages that are written over where they are: a failure leaves neither the old nor the new there.
            let again = |i: usize| word(i + 1000);
            for (i, p) in region.typed_mut::<u64>().chunks_exact_mut(words_per_page()).enumerate() {
                p.fill(again(i));
            }
            assert_eq!(verify(&region, again), NONE);
            assert_eq!(space.statistics().poisoned, 0);
        });
    }
}

#[test]
fn answers_belong_to_pages_whatever_their_order() {
    // One page of each batch fails: were the answers mixed up, it would be taken for stored.
    each(|space, orders| {
        orders.reversed.store(true, SeqCst);
        orders.on_store(|a| if a.page % 10 == 3 { Answer::Fails(DeviceError::Io(5)) } else { Answer::Good });
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        assert_eq!(verify(&region, word), NONE);
    });
}

#[test]
fn where_no_device_takes_anything_the_budget_gives_way() {
    let answers = [Answer::Fails(DeviceError::NoSpace), Answer::Fails(DeviceError::Io(5)), Answer::Panics];
    for (i, answer) in answers.into_iter().enumerate() {
        with(i, |space, orders| {
            let answer = answer.clone();
            orders.on_store(move |a| if a.nth >= 300 { answer.clone() } else { Answer::Good });
            // Many times the budget.
            let mut region = space.region(6 * HOST as u64).unwrap();
            fill(region.typed_mut());
            assert_eq!(verify(&region, word), NONE);
            let s = space.statistics();
            assert!(s.forced_bytes > 0 && s.peak_bytes > s.limit_bytes && s.poisoned == 0, "{s:?}");
        });
    }
}

#[test]
fn what_one_device_refuses_the_next_one_takes() {
    catch_lost_accesses();
    for faults in BOTH {
        let orders = Orders::new();
        let space = Space::builder()
            .host(HOST as u64)
            .device(Obedient::new(&orders, 64 * MIB))
            .device(Soft::new(64 * MIB as u64).unwrap())
            .faults(faults)
            .build()
            .unwrap();
        // It works, then fails for good, while much of the data is on it.
        orders.on_store(|a| if a.page > 900 { Answer::Fails(DeviceError::Io(5)) } else { Answer::Good });
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        assert_eq!(verify(&region, word), NONE);
        let s = space.statistics();
        assert!(s.devices[0].stores > 400 && s.devices[1].stores > 400 && s.forced_bytes == 0, "{s:?}");
        assert!((1..40).contains(&s.devices[0].errors), "it is not asked for ever: {s:?}");
        space.check();
        drop((region, space));
        orders.check();
        assert_eq!(orders.held(), 0);
    }
}

#[test]
fn panics_in_calls_that_cannot_fail_change_nothing() {
    each(|space, orders| {
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        orders.panics_always.store(true, SeqCst);
        assert_eq!(verify(&region, word), NONE);
        region.typed_mut::<u64>()[5] = 1;
        drop(region);
        orders.panics_always.store(false, SeqCst);
    });
}

#[test]
fn descriptors_may_say_anything() {
    let build = |descriptor: Descriptor| {
        let device = Obedient { descriptor, ..Obedient::new(&Orders::new(), 0) };
        catch_lost_accesses();
        Space::builder().host(HOST as u64).device(device).build()
    };
    let plain = |pages| Descriptor::private("odd", pages);
    for pages in [0, u64::MAX, u64::MAX - 511, 1 << 63, 1 << 41, (1 << 36) + 1] {
        let e = build(plain(pages)).map(drop).unwrap_err();
        assert!(matches!(&e, Error::Device { name, .. } if name == "odd"), "{pages:#x}: {e}");
    }
    // As many as can be numbered: only their bookkeeping may be too large for the address space.
    match build(plain(1 << 36)) {
        Ok(_) | Err(Error::Kernel { .. }) => {}
        Err(e) => panic!("{e}"),
    }
    // A device that can hold hardly anything is as good as a full one.
    let odd = [
        plain(1),
        plain(64),
        plain(5000).capacity_bytes(u64::MAX).in_ram(),
        plain(5000).capacity_bytes(1).slow(),
        Descriptor::private("\0\n".repeat(5000), 5000),
        Descriptor::private("", 5000).compares().slow().in_ram(),
    ];
    for descriptor in odd {
        let many = descriptor.pages > Pages(1000);
        let space = build(descriptor).unwrap();
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        assert_eq!(verify(&region, word), NONE);
        let s = space.statistics();
        assert_eq!(s.forced_bytes == 0, many, "{s:?}");
        space.check();
    }
    // Several that together have more pages than can be numbered.
    let many = || Obedient { descriptor: plain(1 << 36), ..Obedient::new(&Orders::new(), 0) };
    let builder = (0..16).fold(Space::builder().host(HOST as u64), |b, _| b.device(many()));
    let e = builder.build().map(drop).unwrap_err();
    assert!(matches!(e, Error::Device { .. } | Error::Kernel { .. }), "{e}");
}

struct Mute;

impl Device for Mute {
    fn describe(&self) -> Descriptor {
        panic!("on purpose, in describe")
    }
    fn store(&self, _: &mut [Store<'_>]) {}
    fn load(&self, _: &mut [Load<'_>]) {}
    fn freed(&self, _: DevicePages) {}
}

#[test]
fn a_device_that_cannot_say_what_it_is_is_refused() {
    let soft = || Soft::new(MIB as u64).unwrap();
    let e = Space::builder().host(HOST as u64).device(soft()).device(Mute).build().map(drop).unwrap_err();
    assert!(e.to_string().contains("device number 2 cannot be used"), "{e}");
}

#[test]
fn a_device_that_ignores_everything_keeps_nothing() {
    struct Deaf;
    impl Device for Deaf {
        fn describe(&self) -> Descriptor {
            Descriptor::private("deaf", 1 << 20)
        }
        fn store(&self, _: &mut [Store<'_>]) {}
        fn load(&self, _: &mut [Load<'_>]) {}
        fn freed(&self, _: DevicePages) {}
    }
    for faults in BOTH {
        let space = space(faults, HOST, Deaf);
        let mut region = space.region(SIZE as u64 / 2).unwrap();
        fill(region.typed_mut());
        assert_eq!(verify(&region, word), NONE);
        assert!(space.statistics().forced_bytes > 0);
    }
}

/// While one access waits for its device, and for as long as that takes, all others go on.
#[test]
fn a_slow_device_keeps_nobody_else_waiting() {
    // A device that says it is fast is believed: whoever serves faults waits for it.
    for (faults, slow) in [(Faults::Signal, false), (Faults::Signal, true), (Faults::Threads, true)] {
        let orders = Orders::new();
        let device = Obedient::new(&orders, 64 * MIB);
        let descriptor = if slow { device.descriptor.clone().slow() } else { device.descriptor.clone() };
        let space = space(faults, HOST, Obedient { descriptor, ..device });
        let mut region = space.region(SIZE as u64).unwrap();
        fill(region.typed_mut());
        push_out(&space, 2 * HOST);
        let stuck = SIZE / page() / 2 + 5;
        let gate = Arc::new(Gate::default());
        let (target, at) = (word(stuck), gate.clone());
        orders.on_load(move |a| if a.word == target { Answer::Waits(at.clone()) } else { Answer::Good });
        let blocked = AtomicBool::new(true);
        std::thread::scope(|s| {
            let (region, blocked) = (&region, &blocked);
            let reader = s.spawn(move || {
                let w = region.typed::<u64>()[stuck * words_per_page()];
                assert!(!blocked.load(SeqCst), "it came back before its device answered");
                w
            });
            gate.await_arrival();
            let mut seen = 0u64;
            for i in (0..SIZE / page()).filter(|i| i.abs_diff(stuck) > 64) {
                assert_eq!(region.typed::<u64>()[i * words_per_page()], word(i));
                seen += 1;
            }
            assert!(seen > 1000);
            blocked.store(false, SeqCst);
            gate.open();
            assert_eq!(reader.join().unwrap(), word(stuck));
        });
        space.check();
    }
}
