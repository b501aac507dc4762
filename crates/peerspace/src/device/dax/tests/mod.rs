//! Tests of the directory of a persistent device from inside, on a medium that keeps account of what a crash may
//! leave of it.

mod crafted;
mod crash;
mod damage;
mod errors;
mod model;

use super::format::{COMMIT, Extent, MAGIC, Medium, Named, Shape};
use super::names::{Found, Names, probe};
use super::names_error::NamesError;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

const BLOCK: u64 = 2 << 20;

/// A device with `data` blocks for regions, behind two that are reserved.
fn shape(data: u64) -> Shape {
    Shape { page_bytes: 4096, block_bytes: BLOCK as u32, device_bytes: (data + 2) * BLOCK, reserved_blocks: 2 }
}

/// What happened to a medium, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    /// A word was written.
    Word(u64, u64),
    /// A write of words has ended: whatever becomes of them.
    Written,
    /// The words of a range were flushed.
    Flushed(u64, u64),
    /// They were not, but count as if they had been: a later flush leaves them out.
    FlushFailed(u64, u64),
}

/// Words that are not zero, by their offset.
type Words = BTreeMap<u64, u64>;

/// How a medium fails from a moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// Once, and without doing anything.
    Once,
    /// Once; a write has been done in part.
    Half,
    /// In all that follows: as good as a process that dies.
    Dead,
}

/// A medium of 8-byte words in memory.
#[derive(Debug, Default)]
struct Model {
    len: u64,
    /// What is read.
    words: RefCell<Words>,
    /// Those that were ever written, zeros too.
    written: RefCell<BTreeSet<u64>>,
    log: RefCell<Vec<Event>>,
    /// Calls until it fails.
    until: Cell<Option<(u64, Failure)>>,
    /// Calls that there were.
    calls: Cell<u64>,
}

impl Model {
    fn new(len: u64) -> Model {
        Model { len, ..Model::default() }
    }

    fn with(len: u64, words: Words) -> Model {
        Model { len, words: RefCell::new(words), ..Model::default() }
    }

    /// Fails at the call after `calls` more, or never.
    fn fail_after(&self, failure: Option<(u64, Failure)>) {
        self.until.set(failure);
    }

    /// Whether this call fails.
    fn fails(&self) -> Option<Failure> {
        self.calls.set(self.calls.get() + 1);
        let (left, failure) = self.until.get()?;
        if left > 0 {
            self.until.set(Some((left - 1, failure)));
            return None;
        }
        if failure != Failure::Dead {
            self.until.set(None);
        }
        Some(failure)
    }

    fn word(&self, at: u64) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }

    fn set_word(&self, at: u64, word: u64) {
        if word == 0 {
            self.words.borrow_mut().remove(&at);
        } else {
            self.words.borrow_mut().insert(at, word);
        }
        self.written.borrow_mut().insert(at);
        self.log.borrow_mut().push(Event::Word(at, word));
    }

    fn flip(&self, at: u64, bit: u32) {
        let word = self.word(at / 8 * 8);
        self.set_word(at / 8 * 8, word ^ 1 << (at % 8 * 8 + u64::from(bit)));
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes).unwrap();
        bytes
    }

    /// Fills an extent with zeros, as a device does, and flushes it: whatever may not be zero on the medium, though
    /// it reads as zero after a flush that failed.
    fn zero(&self, extent: &Extent) -> io::Result<()> {
        if self.fails().is_some() {
            return Err(io::Error::other("zeroing failed"));
        }
        let (at, len) = (extent.block * BLOCK, extent.blocks * BLOCK);
        let there: Vec<u64> = self.written.borrow().range(at..at + len).copied().collect();
        for at in there {
            self.set_word(at, 0);
        }
        self.log.borrow_mut().push(Event::Written);
        self.flush(at, len)
    }

    fn within(&self, at: u64, len: u64) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        }
    }
}

impl Medium for Model {
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.within(at, to.len() as u64)?;
        if self.fails().is_some() {
            return Err(io::Error::other("reading failed"));
        }
        to.fill(0);
        let end = at + to.len() as u64;
        for (word_at, word) in self.words.borrow().range(at / 8 * 8..end) {
            for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
                let offset = word_at + i as u64;
                if (at..end).contains(&offset) {
                    to[(offset - at) as usize] = byte;
                }
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.within(at, bytes.len() as u64)?;
        assert!(at.is_multiple_of(8) && bytes.len().is_multiple_of(8), "whole words only: {} at {at}", bytes.len());
        let failure = self.fails();
        let words = bytes.len() / 8;
        let done = match failure {
            None => words,
            Some(Failure::Half) => words / 2,
            Some(Failure::Once | Failure::Dead) => 0,
        };
        for (i, word) in bytes.as_chunks::<8>().0.iter().take(done).enumerate() {
            self.set_word(at + i as u64 * 8, u64::from_le_bytes(*word));
        }
        self.log.borrow_mut().push(Event::Written);
        if failure.is_some() { Err(io::Error::other("writing failed")) } else { Ok(()) }
    }

    fn flush(&self, at: u64, len: u64) -> io::Result<()> {
        self.within(at, len)?;
        let failure = self.fails();
        let event = match failure {
            None => Event::Flushed(at, len),
            Some(Failure::Once | Failure::Half) => Event::FlushFailed(at, len),
            Some(Failure::Dead) => return Err(io::Error::other("flushing failed")),
        };
        self.log.borrow_mut().push(event);
        if failure.is_some() { Err(io::Error::other("flushing failed")) } else { Ok(()) }
    }
}

/// What a directory says, for comparisons.
fn regions<M: Medium>(names: &Names<M>) -> Vec<Named> {
    names.iter().cloned().collect()
}

/// That a directory is sound: no block has two owners, and all are where they may be.
fn check<M: Medium>(names: &Names<M>, shape: Shape) {
    let mut owned = 0;
    let mut extents = Vec::new();
    for region in names.iter() {
        assert_eq!(names.find(&region.name), Some(region));
        let blocks: u64 = region.extents.iter().map(|e| e.blocks).sum();
        assert_eq!(blocks, region.bytes.div_ceil(shape.block_bytes.into()), "{region:?}");
        assert!(region.bytes > 0);
        owned += blocks;
        extents.extend(region.extents.iter().copied());
    }
    extents.sort_by_key(|e| e.block);
    let mut end = shape.reserved_blocks;
    for extent in extents {
        assert!(extent.block >= end && extent.blocks > 0, "{extent:?} begins before {end}");
        end = extent.block + extent.blocks;
    }
    assert!(end <= shape.blocks());
    assert_eq!(names.free_blocks(), shape.blocks() - shape.reserved_blocks - owned);
    let mut ids: Vec<u64> = names.iter().map(|r| r.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), names.iter().count());
}

/// A directory of four regions, one of them in two pieces, made on `medium`.
fn sample(medium: &Model) -> Names<&Model> {
    let mut names = Names::create(medium, shape(20)).unwrap();
    for (name, blocks) in [("one", 4), ("between", 3), ("two", 4), ("end", 5)] {
        names.create_region(name, blocks * BLOCK - 100, |e| medium.zero(e)).unwrap();
    }
    names.remove("between").unwrap();
    names.create_region("in pieces: é", 6 * BLOCK, |e| medium.zero(e)).unwrap();
    names
}
