//! Who accesses the memory, and how: a thread of the CPU by pointers, a device by its port.

use super::chip::Chip;
use super::memory::MORTAL;
use super::world::World;
use super::{PAGE, WORDS};
use peerspace::device::mmu::FaultError;
use peerspace::{Error, Use};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Who does something.
#[derive(Clone)]
pub(super) enum Actor {
    Cpu,
    Chip(Chip),
}

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The page is lost.
    Lost,
    /// The device could not, this time.
    Refused,
    /// The device has gone.
    Gone,
}

impl Actor {
    fn trouble(world: &World, e: FaultError) -> Trouble {
        match e {
            FaultError::Lost(..) => Trouble::Lost,
            FaultError::Cut => Trouble::Gone,
            FaultError::Device(..) | FaultError::Pinned(_) => {
                world.refused.fetch_add(1, SeqCst);
                Trouble::Refused
            }
            e => panic!("a device's access failed: {e}"),
        }
    }

    /// Has the CPU access memory of area `area`: where pages may be lost they are held first.
    fn held<T>(
        world: &World,
        area: usize,
        va: u64,
        len: usize,
        how: Use,
        act: impl FnOnce() -> T,
    ) -> Result<T, Trouble> {
        if area != MORTAL {
            return Ok(act());
        }
        match world.space.make_resident(va as *const u8, len, how) {
            Ok(held) => {
                let result = act();
                drop(held);
                Ok(result)
            }
            Err(Error::Lost { .. }) => Err(Trouble::Lost),
            Err(Error::TooManyPinned { .. }) => Err(Trouble::Refused),
            Err(e) => panic!("pages are not to be held: {e}"),
        }
    }

    pub(super) fn load(&self, world: &World, area: usize, va: u64) -> Result<u64, Trouble> {
        match self {
            // SAFETY: the areas live as long as the threads; words are accessed by atomics alone.
            Actor::Cpu => {
                let load = || {
                    // SAFETY: an aligned word of the area, which is mapped as long as it is held.
                    unsafe { (*(va as *const AtomicU64)).load(SeqCst) }
                };
                Self::held(world, area, va, 8, Use::Read, load)
            }
            Actor::Chip(chip) => chip.load(va).map_err(|e| Self::trouble(world, e)),
        }
    }

    pub(super) fn store(&self, world: &World, area: usize, va: u64, word: u64) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, 8, Use::Write, || unsafe {
                (*(va as *const AtomicU64)).store(word, SeqCst)
            }),
            Actor::Chip(chip) => chip.store(va, word).map_err(|e| Self::trouble(world, e)),
        }
    }

    pub(super) fn add(&self, world: &World, area: usize, va: u64) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, 8, Use::Write, || unsafe {
                (*(va as *const AtomicU64)).fetch_add(1, SeqCst);
            }),
            Actor::Chip(chip) => chip.add(va, 1).map_err(|e| Self::trouble(world, e)),
        }
    }

    /// Reads a page of which the caller keeps the filling.
    pub(super) fn read_page(&self, world: &World, area: usize, va: u64) -> Result<Vec<u64>, Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, PAGE, Use::Read, || unsafe {
                (0..WORDS).map(|i| (*(va as *const AtomicU64).add(i)).load(SeqCst)).collect()
            }),
            Actor::Chip(chip) => {
                let mut bytes = vec![0; PAGE];
                chip.read(va, &mut bytes).map_err(|e| Self::trouble(world, e))?;
                Ok(bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes"))).collect())
            }
        }
    }

    /// Writes a page of which the caller keeps everybody else away.
    pub(super) fn write_page(&self, world: &World, area: usize, va: u64, words: &[u64]) -> Result<(), Trouble> {
        match self {
            // SAFETY: as above.
            Actor::Cpu => Self::held(world, area, va, PAGE, Use::Write, || unsafe {
                words.iter().enumerate().for_each(|(i, w)| (*(va as *const AtomicU64).add(i)).store(*w, SeqCst));
            }),
            Actor::Chip(chip) => {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                chip.write(va, &bytes).map_err(|e| Self::trouble(world, e))
            }
        }
    }
}
