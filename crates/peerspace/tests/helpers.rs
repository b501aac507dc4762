//! A space has the threads that it needs, and no others: what spares the program work is started when there is some. A test
//! program of its own, because it counts the threads of the process.

mod common;

use common::{MIB, is_filled, mib};
use peerspace::device::soft::{Accelerator, Options, Soft};
use peerspace::{Faults, Node, Space};
use std::time::{Duration, Instant};

/// The names of this process's threads that begin so.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("peerspace-")).collect()
}

#[test]
fn threads_are_started_when_there_is_something_for_them() {
    for (faults, least) in [(Faults::Signal, 2), (Faults::Threads, 3)] {
        let gpu = Accelerator::new(Options::new(mib(64)).name("a")).unwrap();
        let builder = Space::builder().host(mib(64)).device(Soft::new(mib(64)).unwrap());
        let space = builder.device(gpu.clone()).faults(faults).build().unwrap();
        let region = common::filled(&space, 8 * MIB);
        assert_eq!(threads().len(), least, "{:?}", threads());
        let node = Node::Device(space.devices()[1]);
        region.prefetch(0..region.len(), node).unwrap().wait().unwrap();
        // Whoever waits does the work himself, if he comes first.
        let begin = Instant::now();
        while !threads().iter().any(|name| name == "peerspace-send") {
            assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", threads());
            std::thread::yield_now();
        }
        assert!(is_filled(&region));
        drop(region);
        drop(space);
        assert_eq!(threads(), [""; 0]);
    }
}
