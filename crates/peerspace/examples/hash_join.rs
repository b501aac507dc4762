//! A hash join of two tables that are larger than the device's memory, and than the host's budget: in pieces on a device that
//! cannot fault, and with faults, hints and prefetches on one that can.
//!
//! ```text
//! cargo run --release -p peerspace --example hash_join [-- --rows N]
//! ```
//!
//! Each of N rows is looked up in a table of a quarter as many. For that the device makes a hash table of the smaller one, which
//! fits into its memory, and looks all rows of the larger one up in it. The kernels are the same each time; what differs is how
//! the data comes to them:
//! - *in pieces*: `Space::launch` names what a kernel uses, brings it to the device, and calls back for each piece that fits.
//! - *by faults*: the kernel runs over everything, and what it touches comes when it is touched.
//! - *with hints*: rows are only read, so the device gets copies, which are dropped and not written back when they make room.
//!   Results are few and far between, so they are written in place, on the host. The next rows are prefetched while the kernel is
//!   at work on those before.

use peerspace::device::compressed::Compressed;
use peerspace::device::soft::{Accelerator, KernelError, Lane, Options};
use peerspace::{DeviceId, Hint, Node, Region, Space};
use std::collections::HashMap;
use std::error::Error;
use std::ops::Range;
use std::time::Instant;

/// A key, which is never 0, a value, and what else there is in a row.
type Row = [u64; 4];
const ROW: u64 = size_of::<Row>() as u64;
/// A slot of a hash table: a key and a value.
type Slot = [u64; 2];
const SLOT: u64 = size_of::<Slot>() as u64;
/// Rows that a kernel reads at a time.
const BATCH: u64 = 256;
/// Rows that are prefetched at a time.
const AHEAD: u64 = (2 << 20) / ROW;

fn key(n: u64) -> u64 {
    (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The memory of a join.
struct Tables {
    small: Region,
    large: Region,
    /// For each row of the large table, the value of the small table's row with the same key; or 0.
    results: Region,
    /// Twice as many slots as the small table has rows.
    hash: Region,
}

impl Tables {
    fn new(space: &Space, rows: u64) -> Result<Tables, Box<dyn Error>> {
        let mut small = space.region(rows / 4 * ROW)?;
        small.typed_mut::<Row>().iter_mut().zip(0..).for_each(|(row, i)| *row = [key(i), i + 1, 0, 0]);
        let mut large = space.region(rows * ROW)?;
        // One of eight has a partner.
        large.typed_mut::<Row>().iter_mut().zip(0..).for_each(|(row, i)| *row = [key(key(i) % (2 * rows)), i, 0, 0]);
        Ok(Tables { small, large, results: space.region(rows * 8)?, hash: space.region(rows / 2 * SLOT)? })
    }

    /// The join, by the CPU alone.
    fn expected(&self, rows: u64) -> Vec<u64> {
        let small = &self.small.typed::<Row>()[..rows as usize / 4];
        let map: HashMap<u64, u64> = small.iter().map(|[key, value, ..]| (*key, *value)).collect();
        self.large.typed::<Row>()[..rows as usize]
            .iter()
            .map(|[key, ..]| map.get(key).copied().unwrap_or(0))
            .collect()
    }
}

/// A hash table: an empty slot has key 0, and a row is in the first that was free from its own on.
#[derive(Clone, Copy)]
struct Hash {
    start: u64,
    slots: u64,
}

impl Hash {
    /// The slots where `key` could be, in order.
    fn probe(self, key: u64) -> impl Iterator<Item = u64> {
        let first = (key >> 20) % self.slots;
        (first..self.slots).chain(0..first).map(move |slot| self.start + slot * SLOT)
    }
}

/// Calls `each` for the rows `items` of the table at `rows`.
fn each_row(
    lane: &Lane,
    rows: u64,
    items: Range<u64>,
    mut each: impl FnMut(u64, Row) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let mut batch = [[0; 4]; BATCH as usize];
    for first in items.clone().step_by(BATCH as usize) {
        let batch = &mut batch[..(items.end - first).min(BATCH) as usize];
        lane.read(rows + first * ROW, bytemuck::cast_slice_mut(batch))?;
        batch.iter().zip(first..).try_for_each(|(row, item)| each(item, *row))?;
    }
    Ok(())
}

/// A kernel: puts rows into the hash table.
fn insert(lane: &Lane, rows: u64, items: Range<u64>, hash: Hash) -> Result<(), KernelError> {
    each_row(lane, rows, items, |_, [key, value, ..]| {
        for slot in hash.probe(key) {
            if lane.compare_exchange(slot, 0, key)?.is_ok() {
                return lane.store(slot + 8, value);
            }
        }
        Err(KernelError::failed("the hash table is full"))
    })
}

/// A kernel: looks rows up, and writes what it finds.
fn look_up(lane: &Lane, rows: u64, results: u64, items: Range<u64>, hash: Hash) -> Result<(), KernelError> {
    each_row(lane, rows, items, |item, [key, ..]| {
        for slot in hash.probe(key) {
            match lane.load::<Slot>(slot)? {
                [0, _] => break,
                [there, value] if there == key => return lane.store(results + 8 * item, value),
                _ => {}
            }
        }
        Ok(())
    })
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Pieces,
    Faults,
    Hints,
}

/// A space with a device, and what the device is to join.
struct Join {
    gpu: Accelerator,
    id: DeviceId,
    space: Space,
    tables: Tables,
    rows: u64,
}

impl Join {
    fn new(way: Way, rows: u64) -> Result<Join, Box<dyn Error>> {
        let options = Options::new(24 * rows).name("gpu");
        let gpu = Accelerator::new(if way == Way::Pieces { options.without_faults() } else { options })?;
        let space = Space::builder().host((16 * rows).max(4 << 20)).device(Compressed::new(96 * rows)?).build()?;
        let id = space.attach(gpu.clone())?;
        let tables = Tables::new(&space, rows)?;
        Ok(Join { gpu, id, space, tables, rows })
    }

    fn join(&self, way: Way) -> Result<(), Box<dyn Error>> {
        // Memory that nobody has used yet is zeros.
        let hash = Hash { start: self.tables.hash.as_ptr() as u64, slots: self.rows / 2 };
        match way {
            Way::Pieces => self.in_pieces(hash),
            Way::Faults => self.by_faults(hash),
            Way::Hints => self.with_hints(hash),
        }
    }

    /// Runs a kernel to its end.
    fn run<F>(&self, items: u64, kernel: F) -> Result<(), Box<dyn Error>>
    where
        F: Fn(&Lane, Range<u64>) -> Result<(), KernelError> + Send + Sync + 'static,
    {
        // SAFETY: the tables stay, and the CPU uses none of them before the kernel has ended.
        Ok(unsafe { self.gpu.launch(items, kernel) }?.wait()?)
    }

    fn in_pieces(&self, hash: Hash) -> Result<(), Box<dyn Error>> {
        let Tables { small, large, results, .. } = &self.tables;
        let (slots, bytes) = (hash.start as *const u8, (hash.slots * SLOT) as usize);
        let inserts = self.space.launch(self.id).items(self.rows / 4).each(small.as_ptr(), ROW as usize);
        inserts.whole(slots, bytes).run(|piece| {
            let (rows, items) = (piece.operands[0].start, piece.items.end - piece.items.start);
            self.run(items, move |lane, items| insert(lane, rows, items, hash))
        })?;
        let looks = self.space.launch(self.id).items(self.rows).each(large.as_ptr(), ROW as usize);
        looks.each(results.as_ptr(), 8).whole(slots, bytes).run(|piece| {
            let (rows, results) = (piece.operands[0].start, piece.operands[1].start);
            let items = piece.items.end - piece.items.start;
            self.run(items, move |lane, items| look_up(lane, rows, results, items, hash))
        })?;
        Ok(())
    }

    fn by_faults(&self, hash: Hash) -> Result<(), Box<dyn Error>> {
        let Tables { small, large, results, .. } = &self.tables;
        let [small, large, results] = [small, large, results].map(|region| region.as_ptr() as u64);
        self.run(self.rows / 4, move |lane, items| insert(lane, small, items, hash))?;
        self.run(self.rows, move |lane, items| look_up(lane, large, results, items, hash))
    }

    fn with_hints(&self, hash: Hash) -> Result<(), Box<dyn Error>> {
        let Tables { small, large, results, .. } = &self.tables;
        small.advise(Hint::ReadMostly(true))?;
        large.advise(Hint::ReadMostly(true))?;
        results.advise(Hint::AccessedBy(self.id, true))?;
        let blocks = (0..self.rows).step_by(AHEAD as usize).map(|first| first..(first + AHEAD).min(self.rows));
        let mut ahead = blocks.map(|rows| {
            let bytes = (rows.start * ROW) as usize..(rows.end * ROW) as usize;
            large.prefetch(bytes, Node::Device(self.id)).map(|prefetch| (rows, prefetch))
        });
        let mut next = ahead.next().transpose()?;
        let [small, large, results] = [small, large, results].map(|region| region.as_ptr() as u64);
        self.run(self.rows / 4, move |lane, items| insert(lane, small, items, hash))?;
        while let Some((rows, prefetch)) = next {
            prefetch.wait()?;
            next = ahead.next().transpose()?;
            let (large, results) = (large + rows.start * ROW, results + rows.start * 8);
            self.run(rows.end - rows.start, move |lane, items| look_up(lane, large, results, items, hash))?;
        }
        Ok(())
    }
}

/// What `--rows` says.
fn rows() -> Result<u64, String> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(1 << 20),
        // What the device has must have room for a few blocks to come.
        (Some("--rows"), Some(n)) => match n.parse::<u64>() {
            Ok(n @ 262_144..=1_000_000_000) => Ok(n.next_multiple_of(8)),
            _ => Err(format!("--rows: {n:?} is no number from 262144 to 1000000000")),
        },
        _ => Err("usage: hash_join [--rows N]".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let rows = rows()?;
    println!("{rows} rows of {ROW} bytes are looked up in {}", rows / 4);
    println!("RAM: {} MiB, the device's memory: {} MiB\n", (16 * rows).max(4 << 20) >> 20, (24 * rows) >> 20);
    println!("way        matches    seconds     faults   MiB to it   MiB back   KiB in place");
    let mut expected = None;
    for (way, name) in [(Way::Pieces, "in pieces"), (Way::Faults, "by faults"), (Way::Hints, "with hints")] {
        let join = Join::new(way, rows)?;
        let begin = Instant::now();
        join.join(way)?;
        let took = begin.elapsed().as_secs_f64();
        let s = join.gpu.statistics();
        let results = &join.tables.results.typed::<u64>()[..rows as usize];
        // The tables are the same each time.
        if results != expected.get_or_insert_with(|| join.tables.expected(rows)) {
            return Err(format!("{name}: the CPU's own join says something else").into());
        }
        println!(
            "{name:10} {:7} {took:10.2} {:10} {:11} {:10} {:14}",
            results.iter().filter(|value| **value != 0).count(),
            s.faults,
            s.bytes_in >> 20,
            s.bytes_out >> 20,
            (s.remote_bytes_read + s.remote_bytes_written) >> 10
        );
    }
    println!("\nthe CPU's own join says the same each time");
    Ok(())
}
