//! Every interleaving of two or three threads, as far as the memory model allows it, for what works without locks: the
//! words of the table, the stacks of free things, descriptors, and the latch.
//!
//! Run with `RUSTFLAGS="--cfg loom"`. A block has two pages there ([`BLOCK_PAGES`]), which is all that walks, splits
//! and joins need to go wrong. What a lock guards is a *ledger*: a counter that is read and written without being
//! atomic in between, so that it shows when two hold the lock, and when one does not see what the other did.

use crate::addr::{BLOCK_PAGES, Geometry, PageRange, Pages, Pfn, Vpn};
use crate::entry::{Dirt, Entry, State};
use crate::memmap::{Arrival, Backing, FIRST_PFN, Frame, ListId, Memmap};
use crate::reclaim::{Incoming, Policy};
use crate::sync::{AtomicBool, AtomicU64, Latch, Ordering::Relaxed, Ordering::SeqCst, Park, Spin};
use crate::table::{CHUNK_BLOCKS, Table, TableMemory};
use crate::words::{FreeStack, zeroed};
use alloc::boxed::Box;
use alloc::vec::Vec;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

type T = Table<Box<[AtomicU64]>, Spin>;

/// Tries everything with up to `switches` switches that no thread asked for.
fn explore(switches: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(switches);
    model.max_branches = 20_000;
    model.check(run);
}

/// A futex: whoever sleeps does so until somebody wakes him, for ever if nobody does.
#[derive(Default)]
struct Sleep(Mutex<()>, Condvar);

impl Park for Sleep {
    fn wait(&self, word: &AtomicU64, seen: u64) {
        let guard = self.0.lock().unwrap();
        if word.load(SeqCst) == seen {
            drop(self.1.wait(guard).unwrap());
        }
    }

    fn wake(&self, _: &AtomicU64) {
        let _guard = self.0.lock().unwrap();
        self.1.notify_all();
    }
}

fn table(blocks: u64) -> Arc<T> {
    table_with(blocks, Spin)
}

fn table_with<P: Park>(blocks: u64, park: P) -> Arc<Table<Box<[AtomicU64]>, P>> {
    let words = |n| zeroed(n);
    let t = Table::new(
        Geometry::KIB4,
        TableMemory {
            directory: words(2),
            blocks: words(CHUNK_BLOCKS),
            leaves: words((blocks * BLOCK_PAGES) as usize),
            links: words(blocks as usize),
        },
        park,
    );
    t.cover(PageRange::new(Vpn(0), Pages(blocks * BLOCK_PAGES)), blocks as usize).unwrap();
    Arc::new(t)
}

fn host(pfn: u64) -> State {
    State::Host { pfn: Pfn(pfn), writable: true, dirt: Dirt::Dirty }
}

fn enter(ledger: &AtomicU64) {
    let n = ledger.load(Relaxed);
    ledger.store(n + 1, Relaxed);
}

#[test]
fn a_word_has_one_holder_at_a_time() {
    explore(3, || {
        let (t, ledger) = (table(1), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..2)
            .map(|i| {
                let (t, ledger) = (t.clone(), ledger.clone());
                thread::spawn(move || {
                    let lock = t.lock(Vpn(i)).unwrap();
                    enter(&ledger);
                    lock.commit(host(64));
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(ledger.load(Relaxed), 2);
        assert_eq!(t.look(Vpn(0)), Some((Entry::new(host(64)), true)));
    });
}

/// Whoever waits for a lock unless something holds goes when it does, although the lock is not given up; nobody sleeps
/// through it, and who waits whatever happens has the lock in the end.
#[test]
fn whoever_waits_is_turned_away() {
    explore(3, || {
        let (t, stop) = (table_with(1, Sleep::default()), Arc::new(AtomicBool::new(false)));
        let lock = t.lock(Vpn(0)).unwrap();
        let waiter = {
            let (t, stop) = (t.clone(), stop.clone());
            thread::spawn(move || t.lock_unless(Vpn(0), || stop.load(SeqCst)).unwrap().is_none())
        };
        stop.store(true, SeqCst);
        lock.turn_away();
        assert!(waiter.join().unwrap(), "the lock was not given up");
        drop(lock);
        assert!(t.lock_unless(Vpn(0), || true).unwrap().is_some(), "nobody has it");
    });
    explore(2, || {
        let t = table_with(1, Sleep::default());
        let lock = t.lock(Vpn(0)).unwrap();
        let waiter = {
            let t = t.clone();
            thread::spawn(move || t.lock(Vpn(0)).unwrap().commit(host(64)))
        };
        lock.turn_away();
        drop(lock);
        waiter.join().unwrap();
        assert_eq!(t.look(Vpn(0)), Some((Entry::new(host(64)), true)));
    });
}

#[test]
fn whoever_looks_sees_the_block_whole_or_split() {
    explore(3, || {
        let t = table(1);
        t.lock(Vpn(0)).unwrap().commit(host(64));
        let splitter = {
            let t = t.clone();
            thread::spawn(move || t.lock(Vpn(0)).unwrap().split_evenly())
        };
        let (entry, whole) = t.look(Vpn(1)).unwrap();
        assert_eq!(entry.state(), host(if whole { 64 } else { 65 }));
        splitter.join().unwrap();
        assert_eq!(t.look(Vpn(1)), Some((Entry::new(host(65)), false)));
    });
}

#[test]
fn a_lock_is_on_what_is_there_after_a_split() {
    explore(2, || {
        let t = table(1);
        t.lock(Vpn(0)).unwrap().commit(host(64));
        let splitter = {
            let t = t.clone();
            thread::spawn(move || {
                let lock = t.lock(Vpn(1)).unwrap();
                if lock.is_whole() {
                    lock.split_evenly();
                }
            })
        };
        let other = {
            let t = t.clone();
            thread::spawn(move || {
                let mut lock = t.lock(Vpn(1)).unwrap();
                assert_eq!(lock.state(), host(if lock.is_whole() { 64 } else { 65 }));
                if !lock.is_whole() {
                    lock.set(host(99));
                }
            })
        };
        splitter.join().unwrap();
        other.join().unwrap();
        let (entry, whole) = t.look(Vpn(1)).unwrap();
        assert!(!whole);
        assert!([host(65), host(99)].contains(&entry.state()));
        assert_eq!(t.look(Vpn(0)).unwrap().0.state(), host(64));
    });
}

#[test]
fn a_join_and_a_lock_exclude_each_other() {
    explore(3, || {
        let t = table(1);
        t.lock(Vpn(0)).unwrap().split_evenly();
        let joiner = {
            let t = t.clone();
            thread::spawn(move || {
                let agree = |page: &dyn Fn(usize) -> Entry| {
                    (0..BLOCK_PAGES as usize).all(|i| page(i).is_empty()).then_some(Entry::EMPTY)
                };
                t.join(0, agree).unwrap().map(|lock| lock.commit(host(64))).is_some()
            })
        };
        let lock = t.lock(Vpn(1)).unwrap();
        let whole = lock.is_whole();
        let state = lock.state();
        lock.commit(if whole { state } else { host(7) });
        let joined = joiner.join().unwrap();
        let after = t.look(Vpn(1)).unwrap();
        if whole {
            assert!(joined);
            assert_eq!((state, after), (host(64), (Entry::new(host(64)), true)));
        } else if joined {
            panic!("a page that is not empty was joined away");
        } else {
            assert_eq!(after, (Entry::new(host(7)), false));
        }
    });
}

#[test]
fn a_leaf_used_again_is_no_trap_for_a_slow_walker() {
    explore(2, || {
        let t = table(2);
        t.lock(Vpn(0)).unwrap().split_evenly();
        // The leaf of the first block goes to the second, while somebody walks to a page of the first.
        let mover = {
            let t = t.clone();
            thread::spawn(move || {
                if let Some(lock) = t.join(0, |_| Some(Entry::EMPTY)).unwrap() {
                    lock.commit(host(64));
                }
                t.lock(Vpn(BLOCK_PAGES)).unwrap().split(|i| Entry::new(host(200 + i)));
            })
        };
        let lock = t.lock(Vpn(1)).unwrap();
        assert!(
            matches!((lock.is_whole(), lock.state()), (true, s) if s == host(64)) || lock.state() == State::Empty
        );
        drop(lock);
        mover.join().unwrap();
        for i in 0..BLOCK_PAGES {
            assert_eq!(t.look(Vpn(BLOCK_PAGES + i)), Some((Entry::new(host(200 + i)), false)));
        }
    });
}

#[test]
fn a_free_frame_has_one_taker() {
    explore(3, || {
        let words = Memmap::<Box<[AtomicU64]>>::words_for(0, 3);
        let m = Arc::new(Memmap::new(zeroed(words), 0, 3));
        let ledgers = Arc::new([AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)]);
        // One frame that was in use before, and two that never were.
        let first = m.take_small().unwrap();
        m.give_back(first);
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (m, ledgers) = (m.clone(), ledgers.clone());
                thread::spawn(move || {
                    let a = m.take_small().unwrap();
                    enter(&ledgers[a.0 as usize]);
                    m.give_back(a);
                    let b = m.take_small().unwrap();
                    enter(&ledgers[b.0 as usize]);
                    b
                })
            })
            .collect();
        let mut held: Vec<Frame> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        held.sort_by_key(|f| f.0);
        assert_ne!(held[0], held[1], "a frame has two owners");
        assert_eq!(ledgers.iter().map(|l| l.load(Relaxed)).sum::<u64>(), 4);
    });
}

#[test]
fn an_index_that_comes_back_is_told_apart() {
    explore(3, || {
        let links = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let stack = Arc::new(FreeStack::new());
        (0..2).for_each(|i| stack.push(i, &links[i as usize]));
        let other = {
            let (stack, links) = (stack.clone(), links.clone());
            thread::spawn(move || {
                // Takes both, and gives the first back alone: the head is as it was, and what follows it is not.
                let a = stack.pop(|i| &links[i as usize]);
                let b = stack.pop(|i| &links[i as usize]);
                if let Some(a) = a {
                    stack.push(a, &links[a as usize]);
                }
                b
            })
        };
        let mine = stack.pop(|i| &links[i as usize]);
        let theirs = other.join().unwrap();
        let left = stack.pop(|i| &links[i as usize]);
        let mut all: Vec<u32> = [mine, theirs, left].into_iter().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1], "an index was lost, or has two owners");
    });
}

#[test]
fn the_last_part_of_a_block_is_one() {
    explore(3, || {
        let words = Memmap::<Box<[AtomicU64]>>::words_for(1, 0);
        let m = Arc::new(Memmap::new(zeroed(words), 1, 0));
        let head = m.take_block().unwrap();
        m.reset(head);
        m.place(head, Vpn(4), 0);
        m.set_backing(head, Backing::Zero);
        m.split_block(head);
        let threads: Vec<_> = (0..BLOCK_PAGES)
            .map(|i| {
                let m = m.clone();
                thread::spawn(move || {
                    let part = m.page(FIRST_PFN + i);
                    m.set_frequency(part, 1 + i as u8);
                    if i == 0 {
                        m.set_garbage(part);
                    }
                    assert!(m.folio(part).put());
                    let last = m.part_gone(part);
                    // Whoever ends the last part has seen what became of the others.
                    if last.is_some() {
                        (0..BLOCK_PAGES).for_each(|k| assert_eq!(m.frequency(m.page(FIRST_PFN + k)), 1 + k as u8));
                    }
                    last
                })
            })
            .collect();
        let last: Vec<Pages> = threads.into_iter().filter_map(|t| t.join().unwrap()).collect();
        assert_eq!(last, [Pages(1)]);
    });
}

/// Notes who comes.
#[derive(Default)]
struct Guests(Vec<Frame>);

impl Policy<Box<[AtomicU64]>> for Guests {
    fn name(&self) -> &'static str {
        "guests"
    }

    fn insert(&mut self, memmap: &Memmap<Box<[AtomicU64]>>, frame: Frame) {
        assert_eq!(memmap.arrival(frame), Arrival::Refault, "what was known of a frame came after it");
        memmap.set_list(frame, ListId::Main);
        self.0.push(frame);
    }

    fn remove(&mut self, _: &Memmap<Box<[AtomicU64]>>, _: Frame) {}

    fn victim(&mut self, _: &Memmap<Box<[AtomicU64]>>) -> Option<Frame> {
        None
    }

    fn put_back(&mut self, _: &Memmap<Box<[AtomicU64]>>, _: Frame) {}

    fn pages(&self) -> Pages {
        Pages(self.0.len() as u64)
    }

    fn protected(&self) -> Pages {
        Pages(0)
    }
}

#[test]
fn whoever_is_announced_comes_once() {
    explore(3, || {
        let words = Memmap::<Box<[AtomicU64]>>::words_for(0, 2);
        let m = Arc::new(Memmap::new(zeroed(words), 0, 2));
        let incoming = Arc::new(Incoming::new());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (m, incoming) = (m.clone(), incoming.clone());
                thread::spawn(move || {
                    let frame = m.take_small().unwrap();
                    m.reset(frame);
                    m.set_arrival(frame, Arrival::Refault);
                    incoming.push(&m, frame);
                })
            })
            .collect();
        let mut guests = Guests::default();
        incoming.drain(&m, &mut guests);
        threads.into_iter().for_each(|t| t.join().unwrap());
        incoming.drain(&m, &mut guests);
        let mut came: Vec<u32> = guests.0.iter().map(|f| f.0).collect();
        came.sort_unstable();
        assert_eq!(came, [0, 1]);
    });
}

#[test]
fn a_latch_has_one_holder_at_a_time() {
    explore(3, || {
        let (latch, ledger) = (Arc::new(Latch::new()), Arc::new(AtomicU64::new(0)));
        let other = {
            let (latch, ledger) = (latch.clone(), ledger.clone());
            thread::spawn(move || {
                latch.lock(&Spin);
                enter(&ledger);
                latch.unlock(&Spin);
            })
        };
        if !latch.try_lock() {
            latch.lock(&Spin);
        }
        enter(&ledger);
        latch.unlock(&Spin);
        other.join().unwrap();
        assert_eq!(ledger.load(Relaxed), 2);
    });
}
