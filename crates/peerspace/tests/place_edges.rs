//! Memory in place at its edges: beside other memory, beside regions with names, and of devices that do not do what they say.

mod common;

use common::*;
use peerspace::device::dax::Dax;
use peerspace::device::soft::Soft;
use peerspace::{DeviceId, Faults, Region, Space};

const BLOCK: usize = 2 * MIB;

fn mib(n: usize) -> u64 {
    (n * MIB) as u64
}

fn with_dax(faults: Faults, host: usize, dax: Dax) -> (Space, DeviceId) {
    let space = space(faults, host, Soft::new(mib(64)).unwrap());
    let far = space.attach(dax).unwrap();
    (space, far)
}

fn filled(space: &Space, bytes: usize) -> Region {
    let mut region = space.region(bytes as u64).unwrap();
    fill(region.typed_mut());
    region
}

/// What is held of RAM for a copy is let go of, also where memory in place follows it.
#[test]
fn h5_a_copy_that_goes_on_in_place_keeps_nothing_pinned() {
    for faults in [Faults::Signal, Faults::Threads] {
        let (space, far) = with_dax(faults, 16 * MIB, Dax::memory(mib(16)).unwrap());
        let mut region = filled(&space, 2 * BLOCK);
        region.migrate_to(BLOCK..2 * BLOCK, far).unwrap();
        let mut out = [0; 64];
        region.try_read(BLOCK - 32, &mut out).unwrap();
        assert_eq!(out, region.bytes()[BLOCK - 32..BLOCK + 32]);
        region.try_write(BLOCK - 32, &out).unwrap();
        assert_eq!(region.migrate_to(0..BLOCK, far).unwrap(), BLOCK, "nobody relies on it any more");
        space.check();
    }
}

/// Regions with names are in place too, and what is counted for them is given up with them.
#[test]
fn z5_blocks_are_put_in_place_after_regions_with_names_were_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (space, far) = with_dax(Faults::Signal, 16 * MIB, Dax::memory(mib(16)).unwrap());
    let store = space.attach(Dax::persistent(directory.path().join("store"), Some(mib(16))).unwrap()).unwrap();
    for name in ["first", "second"] {
        drop(space.create_persistent(store, name, mib(4)).unwrap());
    }
    let region = filled(&space, 2 * BLOCK);
    assert_eq!(region.migrate_to(0..region.len(), far).unwrap(), region.len());
    space.check();
}
