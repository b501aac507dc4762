//! A program whose global allocator is a managed heap, in both deliveries of faults.
//!
//! The delivery is part of the allocator's configuration, so each test is a process of its own: this program again,
//! with the delivery in its environment.

use peerspace::{Faults, Heap};
use std::collections::{BTreeMap, HashMap};
use std::process::Command;

const MIB: usize = 1 << 20;
const HOST: usize = 16 * MIB;
const DELIVERY: &str = "HEAP_TEST_DELIVERY";

#[global_allocator]
static HEAP: Heap =
    Heap::new(HOST as u64).devices(&["soft:512M"]).from(4096).prepare(|builder| {
        match std::env::var(DELIVERY).as_deref() {
            Ok("signal") => builder.faults(Faults::Signal),
            Ok("nowhere") => builder.host(1),
            _ => builder.faults(Faults::Threads),
        }
    });

/// Runs the ignored test `name` in another process.
fn in_process(name: &str, delivery: &str) -> String {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]).env(DELIVERY, delivery);
    let output = program.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {said}\n{}", output.status, String::from_utf8_lossy(&output.stdout));
    said
}

#[test]
fn a_program_outgrows_its_budget_by_signal() {
    in_process("program", "signal");
}

#[test]
fn a_program_outgrows_its_budget_by_threads() {
    in_process("program", "threads");
}

#[test]
fn a_program_without_a_space_goes_on() {
    let said = in_process("unmanaged_program", "nowhere");
    assert!(said.contains("nothing of the heap is managed: a host budget of 1 bytes cannot work"), "{said}");
}

#[test]
#[ignore = "run by others, in a process of its own"]
fn unmanaged_program() {
    let v = vec![7u8; 100_000];
    assert!(!HEAP.manages(v.as_ptr()) && HEAP.space().is_none());
}

fn value(n: usize) -> u64 {
    (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[test]
#[ignore = "run by others, in a process of its own"]
fn program() {
    // One large vector: four times the budget, zeroed, grown and sorted.
    let mut words = vec![0u64; 4 * HOST / 8];
    assert!(HEAP.manages(words.as_ptr().cast()));
    assert!(words.iter().all(|w| *w == 0));
    words.iter_mut().enumerate().for_each(|(i, w)| *w = value(i));
    assert!(words.iter().enumerate().all(|(i, w)| *w == value(i)));
    words.truncate(MIB);
    words.shrink_to_fit();
    words.sort_unstable();
    assert!(words.is_sorted() && words.len() == MIB);

    // Many things of all sizes, made and dropped by several threads.
    let parts: Vec<HashMap<usize, Vec<u64>>> = std::thread::scope(|s| {
        let work = |t: usize| {
            s.spawn(move || {
                let mut map = HashMap::new();
                for i in (t..8000).step_by(4) {
                    let mut list = Vec::new();
                    (0..value(i) as usize % 2000).for_each(|k| list.push(value(i + k)));
                    map.insert(i, list);
                    if i % 5 == 0 {
                        map.remove(&(i / 2));
                    }
                }
                map
            })
        };
        let threads: Vec<_> = (0..4).map(work).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (i, list) in parts.iter().flatten() {
        assert_eq!(list.len(), value(*i) as usize % 2000);
        assert!(list.iter().enumerate().all(|(k, v)| *v == value(i + k)));
    }
    let sorted: BTreeMap<usize, &Vec<u64>> = parts.iter().flatten().map(|(i, list)| (*i, list)).collect();
    assert!(sorted.keys().is_sorted());

    let space = HEAP.space().expect("the heap has a space");
    let by_threads = space.faults() == Faults::Threads;
    if by_threads {
        // Large buffers handed to system calls, of which hardly any page is in RAM.
        let path = std::env::temp_dir().join(format!("peerspace-heap-{}", std::process::id()));
        let text: Vec<u8> = (0..2 * HOST).map(|i| value(i) as u8).collect();
        std::fs::write(&path, &text).unwrap();
        assert!(std::fs::read(&path).unwrap() == text);
        std::fs::remove_file(&path).unwrap();
    }
    // Other processes, and other spaces with threads of their own.
    assert!(Command::new("true").status().unwrap().success());
    let device = peerspace::unmanaged(|| peerspace::device::soft::Soft::new(64 << 20).unwrap());
    let other = peerspace::Space::builder().host(8 << 20).device(device).faults(space.faults()).build().unwrap();
    let mut region = other.region(16 << 20).unwrap();
    region.bytes_mut().fill(5);
    assert!(region.bytes().iter().all(|b| *b == 5));
    drop((region, other));

    let s = space.statistics();
    assert!(s.pages_out > 4000 && s.pages_in > 4000, "{s:?}");
    assert!(s.peak_bytes <= s.limit_bytes, "{s:?}");
    assert_eq!((s.poisoned, s.forced_bytes), (0, 0));

    // A panic: the message, a backtrace, the unwinding, all with what is managed.
    let caught = std::panic::catch_unwind(|| panic!("{}", "on purpose ".repeat(1000)));
    assert!(caught.is_err());

    // SAFETY: the child only uses the heap, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let good = sorted.iter().all(|(i, list)| list.iter().enumerate().all(|(k, v)| *v == value(i + k)));
        let more = vec![1u64; 4 * MIB];
        // SAFETY: ends the process.
        unsafe { libc::_exit(!(good && more.iter().all(|w| *w == 1)) as i32) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
}
