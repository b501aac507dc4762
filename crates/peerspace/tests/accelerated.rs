//! `soft`, the accelerator, in a space: kernels that use the program's own pointers (rules G1, G4, G7, G8).

mod common;

use common::{MIB, mib};
use peerspace::device::mmu::Mode;
use peerspace::device::soft::{Accelerator, Lane, Link, Options, Soft};
use peerspace::{Faults, Hint, Node, Space};
use std::ops::Range;
use std::time::{Duration, Instant};

fn build(faults: Faults, host: usize, gpus: &[&Accelerator]) -> Space {
    let mut builder = Space::builder().host(mib(host)).device(Soft::new(mib(512)).unwrap());
    for gpu in gpus {
        builder = builder.device((*gpu).clone());
    }
    builder.faults(faults).build().unwrap()
}

/// Faults that brought something to the CPU. Those in which the background makes pages huge bring nothing.
fn brought(space: &Space) -> [u64; 3] {
    let faults = space.statistics().faults;
    [faults.zero_fill, faults.standby, faults.device]
}

fn deliveries() -> Vec<Faults> {
    let threads =
        Space::builder().host(mib(8)).device(Soft::new(mib(8)).unwrap()).faults(Faults::Threads).build().is_ok();
    if threads { vec![Faults::Signal, Faults::Threads] } else { vec![Faults::Signal] }
}

/// A list that the CPU has built from boxes.
struct Node3 {
    value: u64,
    next: Option<Box<Node3>>,
}

/// Rule G1: a structure built by the CPU on its heap, with pointers in it, is traversed and changed by the device.
#[test]
fn g1_a_linked_structure_on_the_heap() {
    for faults in deliveries() {
        let gpu = Accelerator::new(Options::new(mib(16))).unwrap();
        let space = build(faults, 64, &[&gpu]);
        // A vector large enough to be a mapping of its own.
        let mut values = vec![0u64; 1 << 19];
        // With the edges, which the allocator keeps for it.
        let start = values.as_ptr() as usize & !4095;
        let end = (&raw const values[values.len() - 1] as usize + 8).next_multiple_of(4096);
        let adopted = space.adopt(start as *const u8, end - start).unwrap();
        values.iter_mut().enumerate().for_each(|(i, v)| *v = i as u64);
        let (at, n) = (values.as_mut_ptr() as u64, values.len() as u64);
        // SAFETY: nobody uses the vector until the job is done.
        let job = unsafe {
            gpu.launch(n / 512, move |lane: &Lane, items: Range<u64>| {
                for i in items.start * 512..items.end * 512 {
                    let v: u64 = lane.load(at + i * 8)?;
                    lane.store(at + i * 8, v * 3)?;
                }
                Ok(())
            })
        };
        job.unwrap().wait().unwrap();
        assert!(values.iter().enumerate().all(|(i, v)| *v == i as u64 * 3));
        // The check allocates: not while memory of the allocator is managed.
        drop(adopted);
        space.check();
        // A list of boxes, in whatever the allocator gives.
        let mut list = None;
        for value in (0..1000).rev() {
            list = Some(Box::new(Node3 { value, next: list }));
        }
        let head = list.as_ref().map_or(0, |b| &raw const **b as u64);
        let pages = {
            let mut pages = std::collections::BTreeSet::new();
            let mut at = &list;
            while let Some(node) = at {
                pages.insert(&raw const **node as usize & !4095);
                pages.insert((&raw const **node as usize + 15) & !4095);
                at = &node.next;
            }
            pages
        };
        let adopted: Vec<_> = pages.iter().map(|p| space.adopt(*p as *const u8, 4096)).collect();
        {
            assert!(adopted.iter().all(Result::is_ok), "{adopted:?}");
            let (value, next) = (std::mem::offset_of!(Node3, value) as u64, std::mem::offset_of!(Node3, next) as u64);
            // SAFETY: nobody uses the list until the job is done.
            let job = unsafe {
                gpu.launch(1, move |lane: &Lane, _: Range<u64>| {
                    let mut at = head;
                    while at != 0 {
                        let v: u64 = lane.load(at + value)?;
                        lane.store(at + value, v + 1_000_000)?;
                        at = lane.load(at + next)?;
                    }
                    Ok(())
                })
            };
            job.unwrap().wait().unwrap();
            let (mut at, mut n) = (&list, 0);
            while let Some(node) = at {
                assert_eq!(node.value, 1_000_000 + n);
                (at, n) = (&node.next, n + 1);
            }
            assert_eq!(n, 1000);
        }
        drop(adopted);
        space.check();
    }
}

/// The first page of an arena of the C library's heap, as a thread finds it that uses it: threads that live at the same time have
/// arenas of their own, as far as there are enough.
fn in_an_arena(depth: u32, then: &(dyn Fn(usize) + Sync)) {
    const HEAP: usize = 64 << 20;
    let found = || {
        let value = Box::new(depth);
        let page = &raw const *value as usize & !(HEAP - 1);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // The heap of the process begins anywhere.
        match maps.lines().any(|line| line.starts_with(&format!("{page:x}-")) && line.contains(" rw-p ")) {
            true => then(page),
            false => {
                assert!(depth < 20, "no thread has an arena");
                in_an_arena(depth + 1, then);
            }
        }
    };
    std::thread::scope(|scope| scope.spawn(found).join().unwrap());
}

/// Rules G1, G11: also what lies in the page in which an arena of the heap begins, which stays where it is: a forked child
/// touches that page before anybody could serve it.
#[cfg(target_env = "gnu")]
#[test]
fn g11_the_first_page_of_an_arena() {
    for faults in deliveries() {
        let gpu = Accelerator::new(Options::new(mib(16))).unwrap();
        let space = build(faults, 64, &[&gpu]);
        in_an_arena(0, &|page| {
            let adopted = space.adopt(page as *const u8, 4096).unwrap();
            assert_eq!(adopted.in_place(), std::slice::from_ref(&(page..page + 4096)));
            // SAFETY: the C library writes to the first word of the page when the arena begins, and nobody after that.
            let (word, job) = unsafe {
                let word = (page as *const u64).read_volatile();
                let see = move |lane: &Lane, _: Range<u64>| {
                    assert_eq!(lane.load::<u64>(page as u64)?, word);
                    Ok(())
                };
                (word, gpu.launch(1, see))
            };
            assert_ne!(word, 0, "it says where the arena is");
            job.unwrap().wait().unwrap();
        });
        space.check();
    }
}

/// Rules G6, G7: several devices of unequal sizes, all smaller than the data, the host too.
#[test]
fn g7_several_accelerators_and_too_little_of_everything() {
    for faults in deliveries() {
        let a = Accelerator::new(Options::new(mib(8)).name("a")).unwrap();
        let b = Accelerator::new(Options::new(mib(3)).name("b").mode(Mode::Replicate)).unwrap();
        let space = build(faults, 16, &[&a, &b]);
        let mut region = space.region(mib(48)).unwrap();
        region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64);
        let (base, words) = (region.as_ptr() as u64, (48 * MIB / 8) as u64);
        for (gpu, add) in [(&a, 1u64), (&b, 10), (&a, 100)] {
            // SAFETY: nobody else uses the region meanwhile.
            let job = unsafe {
                gpu.launch(words / 512, move |lane: &Lane, items: Range<u64>| {
                    let mut page = [0u64; 512];
                    for i in items {
                        let bytes = bytemuck::cast_slice_mut(&mut page);
                        lane.read(base + i * 4096, bytes)?;
                        page.iter_mut().for_each(|w| *w += add);
                        lane.write(base + i * 4096, bytemuck::cast_slice(&page))?;
                    }
                    Ok(())
                })
            };
            job.unwrap().wait().unwrap();
        }
        space.check();
        assert!(region.typed::<u64>().iter().enumerate().all(|(i, w)| *w == i as u64 + 111));
        let s = space.statistics();
        assert!(s.peak_bytes <= mib(16) + mib(1), "{} bytes", s.peak_bytes);
        space.check();
    }
}

/// Rule G7: a chain of devices, each smaller than what goes through it: what leaves the first goes to the host, from there to
/// the second, which works on it as well, and from there on.
#[test]
fn g7_a_chain_of_devices() {
    for sizes in [[4, 12], [2, 3]] {
        let a = Accelerator::new(Options::new(mib(sizes[0])).name("a")).unwrap();
        let b = Accelerator::new(Options::new(mib(sizes[1])).name("b").takes_evicted(true)).unwrap();
        let space = Space::builder()
            .host(mib(8))
            .device(b.clone())
            .device(a.clone())
            .device(Soft::new(mib(64)).unwrap())
            .faults(Faults::Signal)
            .build()
            .unwrap();
        let mut region = space.region(mib(32)).unwrap();
        region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64);
        let base = region.as_ptr() as u64;
        for _ in 0..2 {
            // Both at once, on pages that interleave.
            let jobs: Vec<_> = [&a, &b]
                .into_iter()
                .enumerate()
                .map(|(k, gpu)| {
                    let kernel = move |lane: &Lane, items: Range<u64>| {
                        for i in items {
                            let at = base + (2 * i + k as u64) * 4096;
                            let v: u64 = lane.load(at)?;
                            lane.store(at, v + 1)?;
                        }
                        Ok(())
                    };
                    // SAFETY: the devices work on different pages, and nobody else on any.
                    unsafe { gpu.launch(32 * 128, kernel) }.unwrap()
                })
                .collect();
            jobs.into_iter().for_each(|job| job.wait().unwrap());
        }
        space.check();
        let good = |(i, w): (usize, &u64)| *w == i as u64 + if i % 512 == 0 { 2 } else { 0 };
        assert!(region.typed::<u64>().iter().enumerate().all(good));
        space.check();
    }
}

/// Rule G8: prefetched to a device, nothing faults there; prefetched home, nothing faults here.
#[test]
fn g8_what_is_prefetched_does_not_fault() {
    let gpu = Accelerator::new(Options::new(mib(32))).unwrap();
    let space = build(Faults::Signal, 64, &[&gpu]);
    let id = space.devices()[1];
    let mut region = space.region(mib(16)).unwrap();
    region.advise(Hint::Dense).unwrap();
    region.bytes_mut().fill(7);
    let base = region.as_ptr() as u64;
    assert_eq!(region.prefetch(0..16 * MIB, Node::Device(id)).unwrap().wait().unwrap(), 16 * MIB);
    let before = gpu.statistics().faults;
    let sum = move |lane: &Lane, items: Range<u64>| {
        let mut buffer = vec![0; 4096];
        for i in items {
            lane.read(base + i * 4096, &mut buffer)?;
            assert!(buffer.iter().all(|b| *b == 7));
        }
        Ok(())
    };
    // SAFETY: nobody else uses the region meanwhile.
    unsafe { gpu.launch(16 * 256, sum) }.unwrap().wait().unwrap();
    assert_eq!(gpu.statistics().faults, before);
    assert_eq!(region.prefetch(0..16 * MIB, Node::Host).unwrap().wait().unwrap(), 16 * MIB);
    let before = brought(&space);
    assert!(region.bytes().iter().all(|b| *b == 7));
    assert_eq!(brought(&space), before);
    space.check();
    // Rounded out; refused for what runs no code.
    assert_eq!(region.prefetch(3 * MIB..3 * MIB + 1, Node::Device(id)).unwrap().wait().unwrap(), 2 * MIB);
    let e = region.prefetch(0..1, Node::Device(space.devices()[0])).unwrap_err().to_string();
    assert!(e.contains("migrate_to"), "{e}");
}

/// Rule G8: hints decide where data is.
#[test]
fn g8_hints_decide() {
    let gpu = Accelerator::new(Options::new(mib(8))).unwrap();
    let space = build(Faults::Signal, 64, &[&gpu]);
    let id = space.devices()[1];
    let read = |base: u64| {
        let kernel = move |lane: &Lane, _: Range<u64>| lane.load::<u64>(base).map(drop);
        // SAFETY: it reads alone.
        unsafe { gpu.launch(1, kernel) }.unwrap().wait().unwrap();
        space.statistics().devices[1].mmu.unwrap()
    };
    let fresh = || {
        let mut region = space.region(mib(2)).unwrap();
        region.typed_mut::<u64>()[0] = 1;
        region
    };
    let plain = fresh();
    let before = read(plain.as_ptr() as u64);
    assert!(before.moved > 0 && before.replicated == 0 && before.remote == 0);
    let mostly_read = fresh();
    mostly_read.advise(Hint::ReadMostly(true)).unwrap();
    assert_eq!(read(mostly_read.as_ptr() as u64).replicated, 1);
    let accessed = fresh();
    accessed.advise(Hint::AccessedBy(id, true)).unwrap();
    assert_eq!(read(accessed.as_ptr() as u64).remote, 1);
    let at_home = fresh();
    at_home.advise(Hint::Prefer(Some(Node::Host))).unwrap();
    assert_eq!(read(at_home.as_ptr() as u64).remote, 2);
    at_home.advise(Hint::Prefer(None)).unwrap();
    let after = read(at_home.as_ptr() as u64);
    assert_eq!((after.remote, after.replicated), (2, 1));
    // The hint goes with the device.
    space.detach(id).unwrap();
    assert!(accessed.advise(Hint::AccessedBy(id, true)).is_err());
    space.check();
}

/// Rule G8: `copy` leaves both ends where they are.
#[test]
fn g8_a_copy_moves_nothing_else() {
    let [a, b] = ["a", "b"].map(|n| Accelerator::new(Options::new(mib(16)).name(n)).unwrap());
    let space = build(Faults::Signal, 64, &[&a, &b]);
    let [ia, ib] = [space.devices()[1], space.devices()[2]];
    let mut from = space.region(mib(4)).unwrap();
    let mut to = space.region(mib(4)).unwrap();
    let pattern = |i: usize| (i * 7 + i / 4096) as u8;
    for (at_from, at_to) in [
        (Node::Host, Node::Host),
        (Node::Device(ia), Node::Host),
        (Node::Host, Node::Device(ib)),
        (Node::Device(ia), Node::Device(ib)),
        (Node::Device(ia), Node::Device(ia)),
    ] {
        for (dst, src, len) in [(0, 0, 4 * MIB), (5, 77_777, 1_000_003), (4096, 8192, 8192), (4095, 1, 2)] {
            from.bytes_mut().iter_mut().enumerate().for_each(|(i, b)| *b = pattern(i));
            to.bytes_mut().fill(0xee);
            from.prefetch(0..4 * MIB, at_from).unwrap().wait().unwrap();
            to.prefetch(0..4 * MIB, at_to).unwrap().wait().unwrap();
            let host_faults = brought(&space);
            let peer = b.statistics().peer_bytes_in;
            to.copy_from(dst, &from, src..src + len).unwrap();
            if let (Node::Device(_), Node::Device(_)) = (at_from, at_to) {
                assert_eq!(brought(&space), host_faults, "{at_from:?} to {at_to:?}");
                if at_to == Node::Device(ib) {
                    assert_eq!(b.statistics().peer_bytes_in - peer, len as u64);
                }
            }
            let good =
                to.bytes().iter().enumerate().all(|(i, byte)| {
                    *byte == if (dst..dst + len).contains(&i) { pattern(i - dst + src) } else { 0xee }
                });
            assert!(good, "{len} bytes from {src} on {at_from:?} to {dst} on {at_to:?}");
        }
    }
    space.check();
    let e = to.copy_from(4 * MIB - 1, &from, 0..2).unwrap_err().to_string();
    assert!(e.contains("inside"), "{e}");
}

/// Devices that cannot fault: in pieces where not all fits.
#[test]
fn g4_launches_hold_what_they_name() {
    let gpu = Accelerator::new(Options::new(mib(4)).without_faults()).unwrap();
    let space = build(Faults::Signal, 32, &[&gpu]);
    let id = space.devices()[1];
    let mut input = space.region(mib(16)).unwrap();
    let output = space.region(mib(16)).unwrap();
    input.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64);
    let n = (16 * MIB / 8) as u64;
    let report = space
        .launch(id)
        .items(n)
        .each(input.as_ptr(), 8)
        .each(output.as_ptr(), 8)
        .run(|piece| {
            let (from, to) = (piece.operands[0].start, piece.operands[1].start);
            let kernel = move |lane: &Lane, items: Range<u64>| {
                for i in items {
                    let v: u64 = lane.load(from + i * 8)?;
                    lane.store(to + i * 8, v + 5)?;
                }
                Ok(())
            };
            // SAFETY: nobody else uses the regions meanwhile.
            unsafe { gpu.launch(piece.items.end - piece.items.start, kernel) }.unwrap().wait()
        })
        .unwrap();
    assert!(report.pieces > 4 && report.items == n, "{report:?}");
    assert!(output.typed::<u64>().iter().enumerate().all(|(i, w)| *w == i as u64 + 5));
    space.check();
    // A CPU access waits for the end of a launch.
    let begin = Instant::now();
    let mut woken = Duration::ZERO;
    space
        .launch(id)
        .whole(input.as_ptr(), 4096)
        .run(|_| {
            std::thread::scope(|scope| {
                let _ = &scope;
            });
            std::thread::sleep(Duration::from_millis(50));
            woken = begin.elapsed();
            Ok::<(), String>(())
        })
        .unwrap();
    assert_eq!(input.typed::<u64>()[1], 1);
    assert!(begin.elapsed() >= woken);
    // Too large for a single item.
    let e = space.launch(id).whole(input.as_ptr(), 16 * MIB).run(|_| Ok::<(), String>(())).unwrap_err().to_string();
    assert!(e.contains("no room"), "{e}");
    let e = space.launch(id).run(|_| Ok::<(), String>(())).unwrap_err().to_string();
    assert!(e.contains("no operand"), "{e}");
    space.check();
}

/// Rule H2: what a launch needs of huge folios fits where the folios do not.
#[test]
fn h2_small_operands_in_huge_folios() {
    let gpu = Accelerator::new(Options::new(mib(4)).without_faults()).unwrap();
    let space = build(Faults::Signal, 32, &[&gpu]);
    let regions = [1u8, 2, 3].map(|fill| {
        let mut region = space.region(mib(2)).unwrap();
        region.advise(Hint::Dense).unwrap();
        region.bytes_mut().fill(fill);
        region
    });
    let launch = regions.iter().fold(space.launch(space.devices()[1]), |l, r| l.whole(r.as_ptr(), 16));
    let report = launch
        .run(|piece| {
            let at: Vec<u64> = piece.operands.iter().map(|o| o.start).collect();
            let kernel = move |lane: &Lane, _: Range<u64>| {
                at.iter().try_for_each(|at| lane.store(*at, lane.load::<u8>(*at)? + 10))
            };
            // SAFETY: nobody else uses the regions meanwhile.
            unsafe { gpu.launch(1, kernel) }.unwrap().wait()
        })
        .unwrap();
    assert_eq!(report.pieces, 1);
    for (region, fill) in regions.iter().zip(1u8..) {
        assert_eq!(region.bytes()[0], fill + 10);
        assert!(region.bytes()[1..].iter().all(|b| *b == fill));
    }
    space.check();
}

/// Rule G7: a device that is all there is beside the host, and smaller than the data.
#[test]
fn g7_no_other_tier_than_the_device_itself() {
    for takes_evicted in [true, false] {
        let gpu = Accelerator::new(Options::new(mib(1)).takes_evicted(takes_evicted)).unwrap();
        let space = Space::builder().host(mib(16)).device(gpu.clone()).faults(Faults::Signal).build().unwrap();
        let mut region = space.region(mib(8)).unwrap();
        region.typed_mut::<u64>().iter_mut().enumerate().for_each(|(i, w)| *w = i as u64);
        let base = region.as_ptr() as u64;
        let kernel = move |lane: &Lane, items: Range<u64>| {
            items.into_iter().try_for_each(|i| lane.store(base + i * 4096, lane.load::<u64>(base + i * 4096)? * 2))
        };
        // SAFETY: nobody else uses the region meanwhile.
        let done = unsafe { gpu.launch(2048, kernel) }.unwrap().wait();
        assert!(done.is_ok(), "{takes_evicted} {done:?} {:?} {:?}", space.statistics(), gpu.statistics());
        let good = |(i, w): (usize, &u64)| *w == if i % 512 == 0 { 2 * i as u64 } else { i as u64 };
        assert!(region.typed::<u64>().iter().enumerate().all(good));
        space.check();
    }
}

/// Pages that two sides write in turns are left where they are for a while.
#[test]
fn g8_a_page_war_ends_in_a_truce() {
    let gpu = Accelerator::new(
        Options::new(mib(8)).link(Link { bytes_per_second: 16_000_000_000, latency: Duration::from_micros(5) }),
    )
    .unwrap();
    let space = build(Faults::Signal, 64, &[&gpu]);
    let mut region = space.region(mib(2)).unwrap();
    let base = region.as_ptr() as u64;
    for turn in 0..200u64 {
        region.typed_mut::<u64>()[0] += 1;
        let kernel = move |lane: &Lane, _: Range<u64>| {
            let v: u64 = lane.load(base)?;
            lane.store(base, v + 1)
        };
        // SAFETY: the CPU waits for it.
        unsafe { gpu.launch(1, kernel) }.unwrap().wait().unwrap();
        assert_eq!(region.typed::<u64>()[0], 2 * turn + 2);
    }
    let s = space.statistics();
    assert!(s.truces > 0, "{s:?}");
    let moved = s.devices[1].mmu.unwrap().moved;
    assert!(moved < 100, "{moved} moves in 200 turns");
    space.check();
    // When it is over, a page that the device goes on to use where it is had better be there: its accesses are counted.
    std::thread::sleep(Duration::from_millis(1100));
    let kernel = move |lane: &Lane, _: Range<u64>| (0..2000).try_for_each(|_| lane.load::<u64>(base).map(drop));
    // SAFETY: it reads alone.
    unsafe { gpu.launch(1, kernel) }.unwrap().wait().unwrap();
    assert_eq!(space.statistics().devices[1].mmu.unwrap().moved, moved + 1);
    assert_eq!(region.typed::<u64>()[0], 400);
    space.check();
}

/// Rule G14: sole access, whatever mode and hints say, until somebody else comes.
#[test]
fn g14_sole_access_ends_with_the_first_access_of_another() {
    let far = Accelerator::new(Options::new(mib(4)).mode(Mode::Share).lanes(3)).unwrap();
    let space = build(Faults::Signal, 32, &[&far]);
    let id = space.devices()[1];
    let mut region = space.region(mib(2)).unwrap();
    region.advise(Hint::Prefer(Some(Node::Host))).unwrap();
    region.typed_mut::<u64>()[..1024].fill(1);
    let base = region.as_ptr() as u64;
    region.exclusive(0..8192, id).unwrap();
    let before = far.statistics();
    // SAFETY: the CPU waits for it.
    let add = |words: u64| unsafe {
        far.launch(3000, move |lane: &Lane, items: Range<u64>| {
            items.into_iter().try_for_each(|i| lane.fetch_add(base + i % words * 8, 1u64).map(drop))
        })
    };
    add(1000).unwrap().wait().unwrap();
    let after = far.statistics();
    assert_eq!(after.faults, before.faults, "it has them");
    assert_eq!(after.remote_bytes_written, 0, "no atomic of a device is done on the host");
    // The CPU takes one page, and not the other.
    let faults = brought(&space);
    assert_eq!(region.typed::<u64>()[0], 4);
    assert_ne!(brought(&space), faults);
    assert_eq!(region.typed::<u64>()[..1000], [4; 1000]);
    assert_eq!(region.typed::<u64>()[1000..1024], [1; 24]);
    let e = region.exclusive(0..8, space.devices()[0]).unwrap_err().to_string();
    assert!(e.contains("runs no code"), "{e}");
    space.check();
}
