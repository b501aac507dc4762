//! The directory of a persistent device: which regions there are, by name, and which blocks are whose.
//!
//! All of it is kept in memory too, so that nothing is read but when it is opened. A change writes the whole of the
//! new state into the slot that is not current, flushes it, makes it the current one by writing the commit word,
//! and flushes that. What a crash leaves is one state or the other:
//!
//! ```text
//!              write slot    flush    write commit word    flush
//!  state     a ------------------------------- a or b ----------- b
//! ```
//!
//! The medium may lose, between two flushes, any of the aligned 8-byte words that were written, in any order; a word
//! itself arrives whole. So nothing but the commit word may ever be written in a place that counts.
//!
//! The making of a directory rests on the first word in the same way. The word of the unfinished mark is written
//! where everything is zero, then everything else, then the word that the magic begins with: zeros are an empty
//! device, the mark is one that never held anything, and after the magic all the rest is there.
//!
//! A process that dies leaves behind words that are written and not yet durable: whoever opens the directory reads
//! them, and must not build upon them before they are. Therefore [`Names::open`] writes once more, and flushes, the
//! two words that everything rests on.
//!
//! There is no lock here: a directory is for one process at a time, and for one thread of it. The caller sees to
//! both.
//!
//! What is not understood, or does not add up, is refused, never repaired. A test takes a crash at each of the writes, with any part
//! of what was not flushed missing.

use super::format::{
    COMMIT, DIRECTORY, Extent, MAGIC, Medium, Named, PAGE, SLOT, SLOT_HEAD, Shape, UNFINISHED, commit_word, decode,
    encode, header, length, read_commit, read_header, slot_at, wrong_with,
};
use super::names_error::{NamesError, failed};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::iter;
use std::time::SystemTime;

/// What the start of a device looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing but zeros.
    Empty,
    /// A directory whose making was interrupted: nothing was ever kept there.
    Unfinished,
    /// A directory. Whether it is a good one is for [`Names::open`] to say.
    Ours,
    /// Something else.
    Foreign {
        /// Where it is.
        at: u64,
        /// The first bytes.
        found: [u8; 16],
    },
}

impl Found {
    fn refused(&self) -> NamesError {
        match self {
            Found::Empty => NamesError::Empty,
            Found::Unfinished => NamesError::Unfinished,
            Found::Ours => NamesError::Occupied,
            Found::Foreign { at, found } => {
                NamesError::Foreign { at: *at, found: format!("\"{}\"", found.escape_ascii()) }
            }
        }
    }
}

/// Looks at what there is on a device, of which no more is read than the directory's part.
///
/// A device is empty only where all of that is zeros: most of what others keep on devices begins with zeros, and says
/// later what it is.
pub(super) fn probe<M: Medium>(medium: &M, shape: Shape) -> Result<Found, NamesError> {
    if shape.device_bytes < PAGE as u64 {
        return Err(NamesError::Truncated { found: shape.device_bytes, expected: DIRECTORY });
    }
    let mut page = [0; PAGE];
    let end = shape.device_bytes.min(DIRECTORY);
    for at in (0..end).step_by(PAGE) {
        let part = &mut page[..(end - at).min(PAGE as u64) as usize];
        medium.read(at, part).map_err(failed("read", at))?;
        if at == 0 && part.starts_with(MAGIC) {
            return Ok(Found::Ours);
        }
        if at == 0 && part.starts_with(UNFINISHED) {
            return Ok(Found::Unfinished);
        }
        if *part != [0; PAGE][..part.len()] {
            // Whole words of it, or from the start where it has one.
            let first = part.iter().position(|b| *b != 0).unwrap_or(0) / 8 * 8;
            let mut found = [0; 16];
            let some = &part[first..part.len().min(first + 16)];
            found[..some.len()].copy_from_slice(some);
            return Ok(Found::Foreign { at: at + first as u64, found });
        }
    }
    Ok(Found::Empty)
}

/// The named regions of a device. See the [module](self).
#[derive(Debug)]
pub(super) struct Names<M> {
    medium: M,
    shape: Shape,
    id: u64,
    /// Of what is current on the medium.
    sequence: u64,
    /// The id of the next region.
    next: u64,
    /// By name. Their extents are within the device, behind what is reserved, and no block is in two of them.
    regions: BTreeMap<String, Named>,
    /// A commit failed: what is current on the medium may be this state, or the one that was to be.
    uncertain: bool,
}

impl<M: Medium> Names<M> {
    /// Makes a directory on a device that is empty, or where that was begun and not finished.
    ///
    /// # Errors
    /// When there is something else on the device, none can be on such a device, or the medium fails.
    pub(super) fn create(medium: M, shape: Shape) -> Result<Names<M>, NamesError> {
        shape.check()?;
        match probe(&medium, shape)? {
            Found::Empty | Found::Unfinished => {}
            other => return Err(other.refused()),
        }
        let id = RandomState::new().hash_one(SystemTime::now());
        let names = Names { medium, shape, id, sequence: 1, next: 1, regions: BTreeMap::new(), uncertain: false };
        names.write(0, UNFINISHED)?;
        names.flush(0, UNFINISHED.len())?;
        let slot = encode(id, names.sequence, names.next, iter::empty());
        let header = header(shape, id);
        let (first, rest) = header.split_at(UNFINISHED.len());
        names.write(slot_at(names.sequence), &slot)?;
        names.write(COMMIT, &commit_word(id, names.sequence))?;
        names.write(first.len() as u64, rest)?;
        names.flush(slot_at(names.sequence), slot.len())?;
        names.flush(0, COMMIT as usize + 8)?;
        names.write(0, first)?;
        names.flush(0, first.len())?;
        Ok(names)
    }

    /// Opens the directory of a device.
    ///
    /// # Errors
    /// When there is none, or it is damaged or of a device that looks otherwise, or the medium fails. Nothing on the
    /// medium has changed.
    pub(super) fn open(medium: M, shape: Shape) -> Result<Names<M>, NamesError> {
        match probe(&medium, shape)? {
            Found::Ours => {}
            other => return Err(other.refused()),
        }
        let mut page = [0; PAGE];
        medium.read(0, &mut page).map_err(failed("read", 0))?;
        let id = read_header(&page, shape)?;
        let mut word = [0; 8];
        medium.read(COMMIT, &mut word).map_err(failed("read", COMMIT))?;
        let low = read_commit(word, id)?;
        let at = slot_at(low.into());
        let mut head = [0; SLOT_HEAD];
        medium.read(at, &mut head).map_err(failed("read", at))?;
        let mut slot = vec![0; length(&head, at)?];
        medium.read(at, &mut slot).map_err(failed("read", at))?;
        let contents = decode(&slot, at, id, low, shape)?;
        let names = Names {
            medium,
            shape,
            id,
            sequence: contents.sequence,
            next: contents.next,
            regions: contents.regions,
            uncertain: false,
        };
        // They may be on their way still, since a process died; or a flush has failed, and what was to be flushed
        // passes for clean. What they rest on was flushed before they were written.
        for (at, word) in [(0, &page[..8]), (COMMIT, &word)] {
            names.write(at, word)?;
            names.flush(at, word.len())?;
        }
        Ok(names)
    }

    /// The region of that name.
    pub(super) fn find(&self, name: &str) -> Option<&Named> {
        self.regions.get(name)
    }

    /// All regions, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Named> {
        self.regions.values()
    }

    /// Blocks that are in no region.
    pub(super) fn free_blocks(&self) -> u64 {
        self.free_runs().iter().map(|run| run.blocks).sum()
    }

    /// Makes a region of `bytes` bytes, in as few extents as can be; durable when this returns. `zero` fills an
    /// extent with zeros and flushes it, so that a region that is found was zeros when it was made, whatever happened.
    /// It has to write all of it: what reads as zero may be something else on the medium, after a flush that failed.
    ///
    /// # Errors
    /// Nothing has changed, but where the medium failed while the directory was written: then that is not known, and
    /// no change is taken any more ([`NamesError::Uncertain`]).
    pub(super) fn create_region(
        &mut self,
        name: &str,
        bytes: u64,
        mut zero: impl FnMut(&Extent) -> io::Result<()>,
    ) -> Result<&Named, NamesError> {
        self.is_certain()?;
        if let Some(why) = wrong_with(name) {
            return Err(NamesError::Name { name: name.into(), why });
        }
        if bytes == 0 {
            return Err(NamesError::NoBytes { name: name.into() });
        }
        if self.regions.contains_key(name) {
            return Err(NamesError::Exists { name: name.into() });
        }
        let extents = allot(self.free_runs(), self.shape.blocks_for(bytes))?;
        let region = Named { name: name.into(), id: self.next, bytes, extents };
        let next = self.next + 1;
        let before = self.regions.values().take_while(|r| *r.name < *name);
        let after = self.regions.values().skip_while(|r| *r.name < *name);
        let slot = encode(self.id, self.sequence + 1, next, before.chain([&region]).chain(after));
        if slot.len() > SLOT {
            let needed = region.encoded();
            let (regions, used) = (self.regions.len(), slot.len() - needed);
            return Err(NamesError::Full { regions, used, capacity: SLOT, needed, extents: region.extents.len() });
        }
        for extent in &region.extents {
            let at = extent.block * u64::from(self.shape.block_bytes);
            zero(extent).map_err(failed("zero a new region of", at))?;
        }
        self.commit(&slot)?;
        self.next = next;
        Ok(self.regions.entry(region.name.clone()).or_insert(region))
    }

    /// Removes a region; durable when this returns. Its blocks are free then.
    ///
    /// # Errors
    /// As for [`create_region`](Names::create_region).
    pub(super) fn remove(&mut self, name: &str) -> Result<(), NamesError> {
        self.is_certain()?;
        if !self.regions.contains_key(name) {
            return Err(NamesError::Missing { name: name.into() });
        }
        let others = self.regions.values().filter(|r| r.name != name);
        let slot = encode(self.id, self.sequence + 1, self.next, others);
        self.commit(&slot)?;
        self.regions.remove(name);
        Ok(())
    }

    /// Makes `slot` the current one; its sequence is the next.
    fn commit(&mut self, slot: &[u8]) -> Result<(), NamesError> {
        let sequence = self.sequence + 1;
        let at = slot_at(sequence);
        let word = commit_word(self.id, sequence);
        // Until the last of it has gone well.
        self.uncertain = true;
        self.write(at, slot)?;
        self.flush(at, slot.len())?;
        self.write(COMMIT, &word)?;
        self.flush(COMMIT, word.len())?;
        self.uncertain = false;
        self.sequence = sequence;
        Ok(())
    }

    fn is_certain(&self) -> Result<(), NamesError> {
        if self.uncertain { Err(NamesError::Uncertain) } else { Ok(()) }
    }

    /// What is free, in order.
    fn free_runs(&self) -> Vec<Extent> {
        let mut taken: Vec<_> = self.regions.values().flat_map(|r| r.extents.iter().copied()).collect();
        taken.sort_unstable_by_key(|extent| extent.block);
        taken.push(Extent { block: self.shape.blocks(), blocks: 0 });
        let mut runs = Vec::new();
        let mut block = self.shape.reserved_blocks;
        for extent in taken {
            if extent.block > block {
                runs.push(Extent { block, blocks: extent.block - block });
            }
            block = extent.block + extent.blocks;
        }
        runs
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), NamesError> {
        self.medium.write(at, bytes).map_err(failed("write to", at))
    }

    fn flush(&self, at: u64, len: usize) -> Result<(), NamesError> {
        self.medium.flush(at, len as u64).map_err(failed("flush", at))
    }
}

/// `blocks` of what is free, in as few pieces as can be: from the first run that has room for all, or else the
/// longest runs, and then the first that has room for the rest.
fn allot(mut free: Vec<Extent>, blocks: u64) -> Result<Vec<Extent>, NamesError> {
    let sum = free.iter().map(|run| run.blocks).sum();
    let longest = |free: &[Extent]| (0..free.len()).max_by_key(|i| (free[*i].blocks, usize::MAX - i));
    if blocks > sum {
        let largest = longest(&free).map_or(0, |i| free[i].blocks);
        return Err(NamesError::NoRoom { asked: blocks, free: sum, largest });
    }
    let mut allotted = Vec::new();
    let mut left = blocks;
    while left > 0 {
        if let Some(run) = free.iter().find(|run| run.blocks >= left) {
            allotted.push(Extent { block: run.block, blocks: left });
            break;
        }
        // There is one: no run has room for what is left, and all of them together have.
        let Some(run) = longest(&free).map(|i| free.remove(i)) else { break };
        allotted.push(run);
        left -= run.blocks;
    }
    Ok(allotted)
}
