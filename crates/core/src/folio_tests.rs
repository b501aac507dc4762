//! The state word of a folio: by hand, against an oracle that counts in plain numbers, and under model checkers.
//!
//! In the model checks a [`World`] is one folio and the lock of its entries, behind which is what the folio should be.
//! Scanners come at any time and without that lock.

use super::*;

/// A folio with `N` pages, and what it should be.
struct World<const N: usize> {
    head: AtomicU64,
    tails: [AtomicU64; N],
    freed: AtomicU64,
}

/// What is behind the lock of the entries: one MMU maps the whole or some pages, or the folio was split.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known<const N: usize> {
    whole: u64,
    alone: [u64; N],
    pins: u64,
    split: bool,
    owned: bool,
}

impl<const N: usize> World<N> {
    fn new() -> (World<N>, Known<N>) {
        let world = World {
            head: AtomicU64::new(0),
            tails: std::array::from_fn(|_| AtomicU64::new(0)),
            freed: AtomicU64::new(0),
        };
        world.folio().begin();
        world.folio().map_whole();
        (world, Known { whole: 1, alone: [0; N], pins: 0, split: false, owned: true })
    }

    fn folio(&self) -> Folio<'_> {
        Folio(&self.head)
    }

    fn tail(&self, i: usize) -> Tail<'_> {
        Tail(&self.tails[i])
    }

    fn free_if(&self, last: bool) {
        self.freed.fetch_add(last as u64, Ordering::Relaxed);
    }

    fn scan(&self) {
        if self.folio().get_unless_zero() {
            assert!(self.folio().counts().refcount > 0);
            assert_eq!(self.freed.load(Ordering::Relaxed), 0, "freed under a reference");
            self.free_if(self.folio().put());
        }
        // A tail never gives one, before a split.
    }

    fn split_mapping(&self, known: &mut Known<N>) {
        if known.whole > 0 && !known.split {
            self.folio().split_mapping(N as u64, |i| self.tail(i as usize));
            known.whole -= 1;
            known.alone.iter_mut().for_each(|n| *n += 1);
        }
    }

    fn split(&self, known: &mut Known<N>) -> Result<(), SplitBusy> {
        while known.whole > 0 {
            self.split_mapping(known);
        }
        assert!(known.owned && !known.split);
        self.folio().freeze()?;
        assert_eq!(known.pins, 0, "split although pinned");
        assert!(!self.folio().get_unless_zero(), "a frozen folio gives no references");
        self.tails.iter().for_each(|t| Folio(t).begin_split());
        self.folio().thaw();
        known.split = true;
        Ok(())
    }

    fn unmap_part(&self, known: &mut Known<N>, i: usize) {
        if known.alone[i] == 0 {
            return;
        }
        known.alone[i] -= 1;
        if known.split {
            let left = Folio(&self.tails[i]).unmap_whole(1);
            assert!(!left.free, "its owner still refers to it");
            return;
        }
        let left = self.folio().unmap_part(self.tail(i), N as u64);
        let rest = known.alone.iter().filter(|n| **n > 0).count();
        assert_eq!(left.partly, known.whole == 0 && rest > 0 && rest < N);
        assert_eq!(left.unmapped, known.whole == 0 && rest == 0);
        self.free_if(left.free);
    }

    #[cfg_attr(shuttle, allow(dead_code))]
    fn drop_owner(&self, known: &mut Known<N>) {
        if std::mem::take(&mut known.owned) {
            self.free_if(self.folio().put());
        }
    }

    /// All counts, once nobody else refers to it.
    fn expect(&self, known: &Known<N>) {
        if known.split {
            for (i, n) in known.alone.iter().enumerate() {
                let counts = Folio(&self.tails[i]).counts();
                assert_eq!((counts.refcount, counts.entire, counts.mappings), (n + 1, *n, *n), "page {i}");
            }
            return;
        }
        let alone: u64 = known.alone.iter().sum();
        let counts = self.folio().counts();
        let expected = Counts {
            refcount: known.owned as u64 + known.pins + known.whole + alone,
            entire: known.whole,
            pages: known.alone.iter().filter(|n| **n > 0).count() as u64,
            mappings: known.whole + alone,
            pins: known.pins,
            queued: false,
        };
        assert_eq!(counts, expected);
        assert_eq!(self.head.load(Ordering::Relaxed) & COMPOUND_MAPPED != 0, known.whole > 0, "H8");
        for (i, n) in known.alone.iter().enumerate() {
            assert_eq!(self.tail(i).mappings(), *n, "page {i}");
            assert!(!Folio(&self.tails[i]).get_unless_zero(), "H7: a tail gives no references");
        }
    }
}

#[cfg(not(any(loom, shuttle)))]
mod alone {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fresh_folio_has_an_owner_and_a_free_one_has_nobody() {
        let word = AtomicU64::new(0);
        let folio = Folio(&word);
        assert!(!folio.get_unless_zero(), "H10: free");
        folio.begin();
        assert!(folio.get_unless_zero());
        assert!(!folio.put());
        assert!(folio.put(), "the owner's was the last");
        assert!(!folio.get_unless_zero());
    }

    #[test]
    fn pins_are_counted_bounded_and_given_back_once() {
        let (world, _) = World::<4>::new();
        let folio = world.folio();
        (0..MOST_PINS).for_each(|_| folio.pin().unwrap());
        assert_eq!(folio.pin(), Err(TooManyPins));
        assert_eq!(folio.counts().refcount, MOST_PINS + 2);
        (0..MOST_PINS).for_each(|_| assert_eq!(folio.unpin(), Ok(false)));
        let before = folio.counts();
        assert_eq!(folio.unpin(), Err(NotPinned));
        assert_eq!(folio.counts(), before);
    }

    #[test]
    fn a_split_of_the_mapping_cannot_fail_and_one_of_the_folio_can() {
        // H5, H6: a pin keeps the folio in one piece, its mapping not.
        let (world, mut known) = World::<4>::new();
        world.folio().pin().unwrap();
        known.pins = 1;
        assert_eq!(world.split(&mut known), Err(SplitBusy::Pinned(1)));
        assert_eq!((known.whole, known.alone), (0, [1; 4]));
        world.expect(&known);
        assert_eq!(world.folio().unpin(), Ok(false));
        known.pins = 0;
        assert!(world.folio().get_unless_zero());
        assert_eq!(world.split(&mut known), Err(SplitBusy::Referenced(1)));
        assert!(!world.folio().put());
        world.expect(&known);
        world.split(&mut known).unwrap();
        world.expect(&known);
        assert_eq!(
            world.folio().counts(),
            Counts { refcount: 1, ..Counts::default() },
            "what is left is the caller's"
        );
    }

    #[test]
    fn one_mmu_may_map_the_whole_and_another_a_part() {
        // H8: the two kinds stay distinguishable.
        let (world, mut known) = World::<4>::new();
        world.folio().map_part(world.tail(2));
        known.alone[2] = 1;
        world.expect(&known);
        let left = world.folio().unmap_whole(4);
        known.whole = 0;
        assert_eq!(left, Left { free: false, unmapped: false, partly: true }, "H11: the other pages are nobody's");
        world.expect(&known);
        assert!(world.folio().queue() && !world.folio().queue());
        for i in [0, 1, 3] {
            world.folio().map_part(world.tail(i));
        }
        assert!(!world.folio().counts().is_partly_mapped(4), "whole again");
        assert!(world.folio().unqueue() && !world.folio().unqueue());
        known.alone = [1; 4];
        world.folio().join_mapping(4, |i| world.tail(i as usize));
        known = Known { whole: 1, alone: [0; 4], ..known };
        world.expect(&known);
    }

    #[test]
    fn the_largest_folio_fits_with_every_page_mapped_by_many() {
        let (world, mut known) = World::<512>::new();
        for _ in 0..200 {
            world.folio().map_whole();
        }
        known.whole = 201;
        while known.whole > 0 {
            world.split_mapping(&mut known);
        }
        world.expect(&known);
        assert_eq!(world.folio().counts().mappings, 201 * 512);
        (0..512).for_each(|i| (0..201).for_each(|_| world.unmap_part(&mut known, i)));
        world.expect(&known);
        world.drop_owner(&mut known);
        assert_eq!(world.freed.load(Ordering::Relaxed), 1);
    }

    proptest! {
        /// Everything in any order, against plain numbers.
        #[test]
        fn the_word_counts_like_plain_numbers(ops in proptest::collection::vec((0u8..9, 0usize..8), 1..200)) {
            let (world, mut known) = World::<8>::new();
            for (op, i) in ops {
                let folio = world.folio();
                match op {
                    0 if !known.split => { folio.map_whole(); known.whole += 1; }
                    1 if known.whole > 0 => {
                        known.whole -= 1;
                        let rest = known.alone.iter().filter(|n| **n > 0).count();
                        let left = folio.unmap_whole(8);
                        prop_assert_eq!(left.partly, known.whole == 0 && rest > 0 && rest < 8);
                    }
                    2 if !known.split => { folio.map_part(world.tail(i)); known.alone[i] += 1; }
                    3 => world.unmap_part(&mut known, i),
                    4 => world.split_mapping(&mut known),
                    5 if !known.split && known.alone.iter().all(|n| *n > 0) => {
                        folio.join_mapping(8, |i| world.tail(i as usize));
                        known.whole += 1;
                        known.alone.iter_mut().for_each(|n| *n -= 1);
                    }
                    6 if !known.split => { folio.pin().unwrap(); known.pins += 1; }
                    7 if !known.split => {
                        prop_assert_eq!(folio.unpin().is_ok(), known.pins > 0);
                        known.pins = known.pins.saturating_sub(1);
                    }
                    8 if !known.split => {
                        let pins = known.pins;
                        prop_assert_eq!(world.split(&mut known).is_ok(), pins == 0);
                    }
                    _ => world.scan(),
                }
                world.expect(&known);
            }
        }
    }
}

/// Every interleaving of two or three threads (loom).
#[cfg(loom)]
mod every_order {
    use super::*;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    type Shared = Arc<(World<2>, Mutex<Known<2>>)>;

    fn explore(
        switches: usize,
        threads: impl Fn(&Shared) -> std::vec::Vec<thread::JoinHandle<()>> + Send + Sync + 'static,
    ) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(switches);
        model.check(move || {
            let (world, known) = World::new();
            let shared = Arc::new((world, Mutex::new(known)));
            for thread in threads(&shared) {
                thread.join().unwrap();
            }
            let mut known = shared.1.lock().unwrap();
            let world = &shared.0;
            world.expect(&known);
            // Whatever happened, it is freed once, by whoever gives the last reference back.
            if known.split {
                return;
            }
            while known.whole > 0 {
                world.split_mapping(&mut known);
            }
            (0..2).for_each(|i| {
                while known.alone[i] > 0 {
                    world.unmap_part(&mut known, i)
                }
            });
            world.drop_owner(&mut known);
            assert_eq!(world.freed.load(Ordering::Relaxed), 1);
        });
    }

    fn go(shared: &Shared, run: impl Fn(&World<2>, &Mutex<Known<2>>) + Send + 'static) -> thread::JoinHandle<()> {
        let shared = shared.clone();
        thread::spawn(move || run(&shared.0, &shared.1))
    }

    #[test]
    fn a_split_and_a_scanner() {
        explore(3, |s| {
            vec![
                go(s, |w, known| assert!(!matches!(w.split(&mut known.lock().unwrap()), Err(SplitBusy::Pinned(_))))),
                go(s, |w, _| w.scan()),
            ]
        });
    }

    #[test]
    fn a_split_a_pin_and_an_unmapping() {
        explore(2, |s| {
            vec![
                go(s, |w, known| {
                    let mut known = known.lock().unwrap();
                    if known.owned && !known.split {
                        let _ = w.split(&mut known);
                    }
                }),
                go(s, |w, known| {
                    {
                        let mut known = known.lock().unwrap();
                        if known.split {
                            return;
                        }
                        w.folio().pin().unwrap();
                        known.pins += 1;
                    }
                    let mut known = known.lock().unwrap();
                    assert!(!known.split, "split under a pin");
                    assert_eq!(w.folio().unpin(), Ok(false));
                    known.pins -= 1;
                }),
                go(s, |w, known| {
                    let mut known = known.lock().unwrap();
                    w.split_mapping(&mut known);
                    w.unmap_part(&mut known, 0);
                }),
            ]
        });
    }

    #[test]
    fn the_last_reference_frees_whosever_it_is() {
        explore(2, |s| {
            vec![
                go(s, |w, known| {
                    let mut known = known.lock().unwrap();
                    w.split_mapping(&mut known);
                    (0..2).for_each(|i| w.unmap_part(&mut known, i));
                    w.drop_owner(&mut known);
                }),
                go(s, |w, _| w.scan()),
                go(s, |w, _| w.scan()),
            ]
        });
    }

    #[test]
    fn two_mmus_come_and_go() {
        explore(2, |s| {
            let mmu = |i: usize| {
                move |w: &World<2>, known: &Mutex<Known<2>>| {
                    {
                        let mut known = known.lock().unwrap();
                        w.folio().map_part(w.tail(i));
                        known.alone[i] += 1;
                    }
                    w.unmap_part(&mut known.lock().unwrap(), i);
                }
            };
            vec![go(s, mmu(0)), go(s, mmu(1)), go(s, |w, _| w.scan())]
        });
    }
}

/// Many threads, many orders (shuttle).
#[cfg(shuttle)]
mod many_orders {
    use super::*;
    use shuttle::rand::{Rng, thread_rng};
    use shuttle::sync::{Arc, Mutex};
    use shuttle::thread;

    #[test]
    fn everybody_at_once() {
        let run = || {
            let (world, known) = World::<8>::new();
            let shared = Arc::new((world, Mutex::new(known)));
            let threads: std::vec::Vec<_> = (0..6)
                .map(|who| {
                    let shared = shared.clone();
                    thread::spawn(move || (0..12).for_each(|_| act(who, &shared.0, &shared.1)))
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
            let mut known = shared.1.lock().unwrap();
            shared.0.expect(&known);
            if !known.split && known.owned {
                // Nobody is left who could be in the way.
                while known.pins > 0 {
                    assert_eq!(shared.0.folio().unpin(), Ok(false));
                    known.pins -= 1;
                }
                shared.0.split(&mut known).unwrap();
                shared.0.expect(&known);
            }
        };
        shuttle::check_random(run, 2000);
    }

    fn act(who: usize, world: &World<8>, known: &Mutex<Known<8>>) {
        // Two scanners, which hold no lock.
        if who < 2 {
            return world.scan();
        }
        let mut rng = thread_rng();
        let i = rng.gen_range(0..8usize);
        let mut known = known.lock().unwrap();
        let folio = world.folio();
        match rng.gen_range(0..12u8) {
            0 if !known.split => {
                folio.map_whole();
                known.whole += 1;
            }
            1 => world.split_mapping(&mut known),
            2 | 3 if !known.split => {
                folio.map_part(world.tail(i));
                known.alone[i] += 1;
            }
            4..=6 => world.unmap_part(&mut known, i),
            7 | 8 if !known.split => {
                folio.pin().unwrap();
                known.pins += 1;
            }
            9 if known.pins > 0 => {
                assert_eq!(folio.unpin(), Ok(false));
                known.pins -= 1;
            }
            10 if !known.split && rng.gen_range(0..4u8) == 0 => match world.split(&mut known) {
                Ok(()) => {}
                Err(SplitBusy::Pinned(n)) => assert_eq!(n, known.pins),
                Err(SplitBusy::Referenced(n)) => assert!((1..=2).contains(&n) && known.pins == 0),
            },
            _ => {}
        }
    }
}
