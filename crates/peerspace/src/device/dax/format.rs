//! What the directory of a persistent device looks like on the medium, and what is refused when it is read.
//!
//! The directory has the first 2 MiB of the device:
//!
//! ```text
//!  0          4 KiB      8 KiB    64 KiB         1 MiB         2 MiB - 64 KiB
//!  +- header -+- commit -+- none -+--- slot 0 ---+--- slot 1 ---+--- none ---+
//!
//!  header   0 magic (16)       16 version (4)        20 page bytes (4)   24 block bytes (4)  28 zero (4)
//!          32 device bytes (8) 40 reserved blocks (8) 48 id (8)          56 checksum of 0..56 (8)   64 zeros
//!  commit   0 sequence, its low half (4)   4 check of it (4)
//!  slot     0 checksum of 8..length (8)    8 sequence (8)  16 id (8)  24 next region's id (8)
//!          32 length (4)  36 regions (4)  40 the regions, ordered by name, one after the other:
//!  region   0 id (8)  8 bytes (8)  16 extents (4)  20 bytes of the name (4)
//!          24 extents: first block (8), blocks (8); then the name, with zeros up to a multiple of 8
//! ```
//!
//! Integers are little-endian. Checksums are xxh3; the check of the commit word is seeded with the device's id, and
//! slots carry it too, so that nothing that another life of the device left behind is taken for this one's. A
//! sequence says which slot is meant: the one of its last bit.
//!
//! A right checksum says that these are the bytes that were written, not that they make sense. Everything is checked:
//! no length is believed before it is known to fit, and no extent before it is known to be nobody else's.
//!
//! Plain values: nothing here is shared or locked.

use super::names_error::NamesError;
use std::collections::BTreeMap;
use std::io;
use std::str;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// What a header begins with.
pub(super) const MAGIC: &[u8; 16] = b"peerspace-names\n";
/// What a device begins with whose directory is being made. Nothing else there says anything.
pub(super) const UNFINISHED: &[u8; 8] = b"\x89names?\n";
pub(super) const VERSION: u32 = 1;

/// What the directory takes up of the device.
pub(super) const DIRECTORY: u64 = 2 << 20;
/// The unit that the header and the commit word have to themselves, whatever the size of the machine's pages.
pub(super) const PAGE: usize = 4096;
/// The part of the header that says anything.
const HEADER: usize = 64;
/// Where the commit word is.
pub(super) const COMMIT: u64 = PAGE as u64;
const SLOTS: [u64; 2] = [64 << 10, 1 << 20];
/// How long a slot can be.
pub(super) const SLOT: usize = (1 << 20) - (64 << 10);
pub(super) const SLOT_HEAD: usize = 40;
const REGION_HEAD: usize = 24;
const EXTENT: usize = 16;
/// The longest name.
pub(super) const NAME: usize = 255;
/// No counter that began at 1 ever gets there.
const MOST: u64 = 1 << 62;

/// Where a directory is kept. Offsets are in bytes from the start of the device.
pub(super) trait Medium {
    /// Reads all of `to`.
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes`. Eight bytes at a multiple of eight arrive together or not at all, after a crash too:
    /// for memory that means one store.
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// When this returns, everything written to the range before is durable, whoever wrote it.
    fn flush(&self, at: u64, len: u64) -> io::Result<()>;
}

impl<M: Medium + ?Sized> Medium for &M {
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        (**self).read(at, to)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write(at, bytes)
    }

    fn flush(&self, at: u64, len: u64) -> io::Result<()> {
        (**self).flush(at, len)
    }
}

/// What a device looks like. Where it was when its directory was made, it has to be when that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// The machine's pages.
    pub(super) page_bytes: u32,
    /// What regions are made of.
    pub(super) block_bytes: u32,
    /// All of the device.
    pub(super) device_bytes: u64,
    /// Blocks at the start that are not for regions: the directory's, and what the kernel keeps there.
    pub(super) reserved_blocks: u64,
}

impl Shape {
    /// Blocks of the device, reserved ones too.
    pub(super) fn blocks(self) -> u64 {
        self.device_bytes / u64::from(self.block_bytes.max(1))
    }

    /// Blocks that `bytes` bytes take up.
    pub(super) fn blocks_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(u64::from(self.block_bytes.max(1)))
    }

    /// Whether a directory can be made on a device like this.
    pub(super) fn check(self) -> Result<(), NamesError> {
        let refuse = |what, given, expected: &str| Err(NamesError::Shape { what, given, expected: expected.into() });
        if !self.page_bytes.is_power_of_two() || self.page_bytes < PAGE as u32 {
            return refuse("page size", self.page_bytes.into(), "a power of two, 4096 or more");
        }
        if !self.block_bytes.is_power_of_two() || u64::from(self.block_bytes) < DIRECTORY.max(self.page_bytes.into())
        {
            return refuse("block size", self.block_bytes.into(), "a power of two, no less than a page and 2 MiB");
        }
        if self.reserved_blocks == 0 {
            return refuse("number of reserved blocks", 0, "one or more: the directory is in the first");
        }
        if self.blocks() <= self.reserved_blocks {
            let expected =
                format!("more than the {} reserved blocks of {} bytes", self.reserved_blocks, self.block_bytes);
            return refuse("device size", self.device_bytes, &expected);
        }
        Ok(())
    }
}

/// A run of blocks, counted from the start of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) block: u64,
    pub(super) blocks: u64,
}

/// A region that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) name: String,
    /// No other region of this device ever has had it, or will.
    pub(super) id: u64,
    /// As asked for; its blocks hold at least as many.
    pub(super) bytes: u64,
    /// Its blocks, in the order of its bytes.
    pub(super) extents: Vec<Extent>,
}

impl Named {
    /// What it takes up in a slot.
    pub(super) fn encoded(&self) -> usize {
        REGION_HEAD + self.extents.len() * EXTENT + self.name.len().next_multiple_of(8)
    }
}

/// What a slot says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) sequence: u64,
    /// The id of the next region.
    pub(super) next: u64,
    pub(super) regions: BTreeMap<String, Named>,
}

/// Where the slot of a sequence is.
pub(super) fn slot_at(sequence: u64) -> u64 {
    SLOTS[(sequence & 1) as usize]
}

/// The header of a finished directory, with all of its page.
pub(super) fn header(shape: Shape, id: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..16].copy_from_slice(MAGIC);
    page[16..20].copy_from_slice(&VERSION.to_le_bytes());
    page[20..24].copy_from_slice(&shape.page_bytes.to_le_bytes());
    page[24..28].copy_from_slice(&shape.block_bytes.to_le_bytes());
    page[32..40].copy_from_slice(&shape.device_bytes.to_le_bytes());
    page[40..48].copy_from_slice(&shape.reserved_blocks.to_le_bytes());
    page[48..56].copy_from_slice(&id.to_le_bytes());
    let sum = xxh3_64(&page[..HEADER - 8]);
    page[HEADER - 8..HEADER].copy_from_slice(&sum.to_le_bytes());
    page
}

/// The id of a directory whose header, which begins with the magic, fits `shape`.
pub(super) fn read_header(page: &[u8; PAGE], shape: Shape) -> Result<u64, NamesError> {
    // Another version may be made quite otherwise, checksum included.
    let version = u32_at(page, 16);
    if version != VERSION {
        return Err(NamesError::Version { found: version, expected: VERSION });
    }
    let (found, expected) = (u64_at(page, HEADER - 8), xxh3_64(&page[..HEADER - 8]));
    if found != expected {
        return Err(NamesError::Checksum { part: "the header", at: 0, found, expected });
    }
    if page[28..32] != [0; 4] {
        return Err(inconsistent(28, "the header has something where zeros are expected"));
    }
    if let Some(at) = page[HEADER..].iter().position(|b| *b != 0) {
        return Err(inconsistent((HEADER + at) as u64, "the header has something behind it; expected zeros"));
    }
    let same = |what, found: u64, expected: u64| match found == expected {
        true => Ok(()),
        false => Err(NamesError::Geometry { what, found, expected }),
    };
    same("page size", u32_at(page, 20).into(), shape.page_bytes.into())?;
    same("block size", u32_at(page, 24).into(), shape.block_bytes.into())?;
    same("number of reserved blocks", u64_at(page, 40), shape.reserved_blocks)?;
    let device_bytes = u64_at(page, 32);
    if shape.device_bytes < device_bytes {
        return Err(NamesError::Truncated { found: shape.device_bytes, expected: device_bytes });
    }
    same("device size", device_bytes, shape.device_bytes)?;
    shape.check()?;
    Ok(u64_at(page, 48))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

fn inconsistent(at: u64, what: impl Into<String>) -> NamesError {
    NamesError::Inconsistent { at, what: what.into() }
}

/// The word that makes `sequence` the current one.
pub(super) fn commit_word(id: u64, sequence: u64) -> [u8; 8] {
    let low = sequence as u32;
    (u64::from(low) | commit_check(id, low) << 32).to_le_bytes()
}

fn commit_check(id: u64, low: u32) -> u64 {
    xxh3_64_with_seed(&low.to_le_bytes(), id) >> 32
}

/// The low half of the current sequence.
pub(super) fn read_commit(word: [u8; 8], id: u64) -> Result<u32, NamesError> {
    let word = u64::from_le_bytes(word);
    let low = word as u32;
    let (found, expected) = (word >> 32, commit_check(id, low));
    match found == expected {
        true => Ok(low),
        false => Err(NamesError::Checksum { part: "the commit word", at: COMMIT, found, expected }),
    }
}

/// What `regions`, ordered by name, look like in a slot; it may be longer than a slot can be.
pub(super) fn encode<'a>(id: u64, sequence: u64, next: u64, regions: impl Iterator<Item = &'a Named>) -> Vec<u8> {
    let mut slot = vec![0; SLOT_HEAD];
    let mut count = 0u32;
    for region in regions {
        let end = slot.len() + region.encoded();
        slot.extend_from_slice(&region.id.to_le_bytes());
        slot.extend_from_slice(&region.bytes.to_le_bytes());
        slot.extend_from_slice(&(region.extents.len() as u32).to_le_bytes());
        slot.extend_from_slice(&(region.name.len() as u32).to_le_bytes());
        for extent in &region.extents {
            slot.extend_from_slice(&extent.block.to_le_bytes());
            slot.extend_from_slice(&extent.blocks.to_le_bytes());
        }
        slot.extend_from_slice(region.name.as_bytes());
        slot.resize(end, 0);
        count += 1;
    }
    let length = slot.len() as u32;
    slot[8..16].copy_from_slice(&sequence.to_le_bytes());
    slot[16..24].copy_from_slice(&id.to_le_bytes());
    slot[24..32].copy_from_slice(&next.to_le_bytes());
    slot[32..36].copy_from_slice(&length.to_le_bytes());
    slot[36..40].copy_from_slice(&count.to_le_bytes());
    seal(&mut slot);
    slot
}

/// Gives a slot the checksum of what it says.
pub(super) fn seal(slot: &mut [u8]) {
    let sum = xxh3_64(&slot[8..]);
    slot[..8].copy_from_slice(&sum.to_le_bytes());
}

/// How long the slot at `at` is that begins with `head`.
pub(super) fn length(head: &[u8; SLOT_HEAD], at: u64) -> Result<usize, NamesError> {
    let length = u32_at(head, 32) as usize;
    if !(SLOT_HEAD..=SLOT).contains(&length) || !length.is_multiple_of(8) {
        let what = format!("a slot has {length} bytes; expected a multiple of 8 from {SLOT_HEAD} to {SLOT}");
        return Err(inconsistent(at + 32, what));
    }
    Ok(length)
}

/// What `slot`, which is at `at` and as long as it says, has to say: for the device with this id and shape, when
/// the low half of the current sequence is `low`.
pub(super) fn decode(slot: &[u8], at: u64, id: u64, low: u32, shape: Shape) -> Result<Contents, NamesError> {
    let (found, expected) = (u64_at(slot, 0), xxh3_64(&slot[8..]));
    if found != expected {
        return Err(NamesError::Checksum { part: "the current slot", at, found, expected });
    }
    let (sequence, owner, next) = (u64_at(slot, 8), u64_at(slot, 16), u64_at(slot, 24));
    if sequence as u32 != low || sequence >= MOST {
        let what =
            format!("the slot has sequence {sequence}; expected one that ends in {low:#x} as the commit word says");
        return Err(inconsistent(at + 8, what));
    }
    if owner != id {
        return Err(inconsistent(at + 16, format!("the slot belongs to device {owner:#x}; expected {id:#x}")));
    }
    if next == 0 || next >= MOST {
        return Err(inconsistent(at + 24, format!("the next region's id is {next}; expected 1 to {MOST}")));
    }
    let mut reader = Reader { slot, at: SLOT_HEAD, start: at };
    let mut regions = BTreeMap::new();
    for _ in 0..u32_at(slot, 36) {
        let start = reader.offset();
        let region = reader.region(shape)?;
        if let Some((last, _)) = regions.last_key_value().filter(|(last, _)| **last >= region.name) {
            let what =
                format!("the region {:?} comes behind {last:?}; expected names in order, each once", region.name);
            return Err(inconsistent(start, what));
        }
        regions.insert(region.name.clone(), region);
    }
    if reader.at != slot.len() {
        let what = format!("the last region ends; expected {} more bytes of regions", slot.len() - reader.at);
        return Err(inconsistent(reader.offset(), what));
    }
    ids_are_unique(&regions, next, at)?;
    extents_are_apart(&regions, at)?;
    Ok(Contents { sequence, next, regions })
}

fn ids_are_unique(regions: &BTreeMap<String, Named>, next: u64, at: u64) -> Result<(), NamesError> {
    let mut ids = BTreeMap::new();
    for region in regions.values() {
        if region.id == 0 || region.id >= next {
            let what = format!("the region {:?} has id {}; expected 1 to {}", region.name, region.id, next - 1);
            return Err(inconsistent(at, what));
        }
        if let Some(other) = ids.insert(region.id, &region.name) {
            let what = format!("the regions {other:?} and {:?} have the same id {}", region.name, region.id);
            return Err(inconsistent(at, what));
        }
    }
    Ok(())
}

fn extents_are_apart(regions: &BTreeMap<String, Named>, at: u64) -> Result<(), NamesError> {
    let mut extents: Vec<_> = regions.values().flat_map(|r| r.extents.iter().map(move |e| (e, r))).collect();
    extents.sort_unstable_by_key(|(extent, _)| extent.block);
    for pair in extents.windows(2) {
        let [(a, of_a), (b, of_b)] = pair else { continue };
        if a.block + a.blocks > b.block {
            let what = format!(
                "the region {:?} has {} blocks from {} on, and {:?} has {} from {} on; expected no block in common",
                of_a.name, a.blocks, a.block, of_b.name, b.blocks, b.block
            );
            return Err(inconsistent(at, what));
        }
    }
    Ok(())
}

/// What is wrong with `name` as a name, if anything is.
pub(super) fn wrong_with(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("it is empty".into());
    }
    if name.len() > NAME {
        return Some(format!("it has {} bytes, and {NAME} is the most", name.len()));
    }
    let (at, control) = name.char_indices().find(|(_, c)| c.is_control())?;
    Some(format!("there is a control character, {control:?}, at byte {at}"))
}

/// Reads what follows the head of a slot.
struct Reader<'a> {
    slot: &'a [u8],
    /// Where in the slot.
    at: usize,
    /// Where the slot is.
    start: u64,
}

impl<'a> Reader<'a> {
    /// Where on the device.
    fn offset(&self) -> u64 {
        self.start + self.at as u64
    }

    /// The next `count` pieces of `each` bytes.
    fn take(&mut self, count: usize, each: usize, what: &str) -> Result<&'a [u8], NamesError> {
        let left = self.slot.len() - self.at;
        let Some(bytes) = count.checked_mul(each).filter(|n| *n <= left) else {
            let what = format!("{count} times {each} bytes of {what} are due, and the slot has {left} more bytes");
            return Err(inconsistent(self.offset(), what));
        };
        self.at += bytes;
        Ok(&self.slot[self.at - bytes..self.at])
    }

    fn region(&mut self, shape: Shape) -> Result<Named, NamesError> {
        let start = self.offset();
        let head = self.take(1, REGION_HEAD, "a region")?;
        let (id, bytes) = (u64_at(head, 0), u64_at(head, 8));
        let runs = self.take(u32_at(head, 16) as usize, EXTENT, "extents")?;
        let length = u32_at(head, 20) as usize;
        if length > NAME {
            return Err(inconsistent(start + 20, format!("a name has {length} bytes; expected 1 to {NAME}")));
        }
        let (name, padding) = self.take(1, length.next_multiple_of(8), "a name")?.split_at(length);
        let Ok(name) = str::from_utf8(name) else {
            return Err(inconsistent(start, format!("a name is \"{}\"; expected UTF-8", name.escape_ascii())));
        };
        if let Some(why) = wrong_with(name) {
            return Err(inconsistent(start, format!("{name:?} cannot be a name: {why}")));
        }
        if padding.iter().any(|b| *b != 0) {
            return Err(inconsistent(start, format!("something follows the name {name:?}; expected zeros")));
        }
        let extents = runs.chunks_exact(EXTENT).map(|e| Extent { block: u64_at(e, 0), blocks: u64_at(e, 8) });
        let extents: Vec<_> = extents.collect();
        let all = shape.reserved_blocks..shape.blocks();
        let mut sum = 0;
        for extent in &extents {
            let end = extent.block.checked_add(extent.blocks).filter(|end| *end <= all.end);
            if extent.blocks == 0 || extent.block < all.start || end.is_none() {
                let what = format!(
                    "the region {name:?} has {} blocks from {} on; expected one or more within {} to {}",
                    extent.blocks, extent.block, all.start, all.end
                );
                return Err(inconsistent(start, what));
            }
            // Extents that overlap may add up to anything.
            sum = u64::saturating_add(sum, extent.blocks);
        }
        if bytes == 0 || sum != shape.blocks_for(bytes) {
            let blocks = shape.blocks_for(bytes);
            let what = format!("the region {name:?} of {bytes} bytes has {sum} blocks; expected {}", blocks.max(1));
            return Err(inconsistent(start, what));
        }
        Ok(Named { name: name.into(), id, bytes, extents })
    }
}
