//! The memory of a software device: bytes that many threads read and write at the same time, without locks.
//!
//! Programs that run on a device may race, and what they do must stay defined for us. So the memory consists of words of
//! eight bytes, and every access is one of whole words, atomic and relaxed: a smaller store exchanges a part of a word, a
//! load takes out a part, a copy goes word by word. What races with something else sees or leaves old bytes or new ones in
//! each word.
//!
//! Whoever needs an order between accesses brings it along.

use crate::kernel::Trouble;
use crate::linux::files::OurFd;
use crate::linux::map::Mapping;
use crate::linux::shared::SharedMapping;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of a word.
const WORD: usize = 8;
/// From so many words on, a copy is left to the processor's own instruction for it.
const MANY: usize = 32;

/// Zeroed bytes, in huge pages where they can be had. What was not used yet takes up no RAM.
#[derive(Debug)]
pub struct DeviceMemory {
    mapping: Held,
}

#[derive(Debug)]
enum Held {
    Alone(Mapping),
    /// In a file, so that it can be mapped elsewhere as well.
    Shared(SharedMapping, OurFd),
}

/// A file of `len` bytes of memory.
fn file_of(len: usize) -> Result<OwnedFd, Errno> {
    let file = memfd_create(c"peerspace-device", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, len as u64)?;
    Ok(file)
}

impl DeviceMemory {
    /// `len` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub fn new(len: usize) -> Result<DeviceMemory, Trouble> {
        let mapping = Mapping::new(len.max(1), 2 << 20, true).map_err(|_| Trouble::NoMemory)?;
        // SAFETY: the advice changes no content. Refusal means small pages.
        let _ = unsafe { mapping.advise(0, mapping.len(), rustix::mm::Advice::LinuxHugepage) };
        Ok(DeviceMemory { mapping: Held::Alone(mapping) })
    }

    /// The same in a file of memory, which others can [map](DeviceMemory::file) as well. After a fork both processes have it, until the
    /// child [renews](DeviceMemory::renew) its part.
    ///
    /// # Errors
    /// When the kernel refuses the file or the mapping.
    pub fn shared(len: usize) -> Result<DeviceMemory, Trouble> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let file = file_of(len).map_err(|_| Trouble::NoMemory)?;
        let mapping = SharedMapping::new(file.as_fd(), 0, len).map_err(|_| Trouble::NoMemory)?;
        let file = OurFd::new(file).map_err(|_| Trouble::NoMemory)?;
        Ok(DeviceMemory { mapping: Held::Shared(mapping, file) })
    }

    /// The file that it lies in, from its start, if it does in one.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.mapping {
            Held::Alone(_) => None,
            Held::Shared(_, file) => Some(file.as_fd()),
        }
    }

    /// In a forked child, where nobody uses it: zeros take the place of what is shared with the parent.
    ///
    /// # Errors
    /// The errno where the kernel refuses; it is shared as before then.
    pub fn renew(&self) -> Result<(), Errno> {
        let Held::Shared(mapping, held) = &self.mapping else { return Ok(()) };
        let file = file_of(self.len())?;
        mapping.renew(file.as_fd(), 0)?;
        held.replace(file)
    }

    fn start(&self) -> *const AtomicU64 {
        match &self.mapping {
            Held::Alone(mapping) => mapping.as_ptr().cast(),
            Held::Shared(mapping, _) => mapping.word(0),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match &self.mapping {
            Held::Alone(mapping) => mapping.len(),
            Held::Shared(mapping, _) => mapping.range().len() as usize,
        }
    }

    /// True for a memory of no bytes, which cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `len` bytes at `at` are inside.
    pub fn has(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len() as u64)
    }

    /// The words.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is readable and writable, initialised by the kernel, aligned to a page, and stays as long as
        // `self`; through it nothing but this type accesses the memory, and only as atomic words. What others do by mappings
        // of their own is for them to keep apart, as between any devices that share memory.
        unsafe { std::slice::from_raw_parts(self.start(), self.len() / WORD) }
    }

    /// The `N` bytes at `at`, which must not cross the end of a word.
    ///
    /// # Panics
    /// When they do, or are beyond the end.
    #[inline]
    pub fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        let word = self.words()[at / WORD].load(Relaxed).to_ne_bytes();
        let mut out = [0; N];
        out.copy_from_slice(&word[at % WORD..at % WORD + N]);
        out
    }

    /// Stores the `N` bytes at `at`, which must not cross the end of a word.
    ///
    /// # Panics
    /// When they do, or are beyond the end.
    #[inline]
    pub fn store<const N: usize>(&self, at: usize, bytes: [u8; N]) {
        assert!(at % WORD + N <= WORD, "{N} bytes at {at:#x} cross the end of a word");
        let word = &self.words()[at / WORD];
        if N == WORD {
            let mut whole = [0; WORD];
            whole.copy_from_slice(&bytes);
            return word.store(u64::from_ne_bytes(whole), Relaxed);
        }
        put(word, at % WORD, &bytes);
    }

    /// Exchanges the four bytes at `at`, which is a multiple of four, if they are `expected`. What they were, either way.
    ///
    /// # Errors
    /// When they were something else.
    ///
    /// # Panics
    /// Unless it is, or beyond the end.
    pub fn compare_exchange_u32(&self, at: usize, expected: u32, new: u32) -> Result<u32, u32> {
        assert!(at.is_multiple_of(4), "{at:#x} is no address of a u32");
        let word = &self.words()[at / WORD];
        let mut now = word.load(Relaxed);
        loop {
            let mut bytes = now.to_ne_bytes();
            let part = &mut bytes[at % WORD..at % WORD + 4];
            let old = u32::from_ne_bytes([part[0], part[1], part[2], part[3]]);
            if old != expected {
                // An acquire like that of an exchange that succeeds.
                std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
                return Err(old);
            }
            part.copy_from_slice(&new.to_ne_bytes());
            use std::sync::atomic::Ordering::SeqCst;
            match word.compare_exchange_weak(now, u64::from_ne_bytes(bytes), SeqCst, Relaxed) {
                Ok(_) => return Ok(old),
                Err(other) => now = other,
            }
        }
    }

    /// The word at `at`, a multiple of eight.
    ///
    /// # Panics
    /// Unless it is, or beyond the end.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(WORD), "{at:#x} is no address of a word");
        &self.words()[at / WORD]
    }

    /// Copies the bytes at `at` to `to`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let (head, words, tail) = self.parts(at, to.len());
        let end = at + to.len();
        let (front, rest) = to.split_at_mut(head);
        let (middle, back) = rest.split_at_mut(words.len() * WORD);
        if head > 0 {
            front.copy_from_slice(&self.words()[at / WORD].load(Relaxed).to_ne_bytes()[at % WORD..][..head]);
        }
        read_words(words, middle);
        if tail > 0 {
            back.copy_from_slice(&self.words()[end / WORD].load(Relaxed).to_ne_bytes()[..tail]);
        }
    }

    /// Copies `from` to `at`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn write(&self, at: usize, from: &[u8]) {
        let (head, words, tail) = self.parts(at, from.len());
        let (front, rest) = from.split_at(head);
        let (middle, back) = rest.split_at(words.len() * WORD);
        if head > 0 {
            put(&self.words()[at / WORD], at % WORD, front);
        }
        write_words(words, middle);
        if tail > 0 {
            put(&self.words()[(at + from.len()) / WORD], 0, back);
        }
    }

    /// Copies `len` bytes of `from`, which may be this memory, from `source` to `at`. Where the two overlap, the result is as
    /// if everything had been read before anything was written, unless somebody else writes there.
    ///
    /// # Panics
    /// Beyond either end.
    pub fn copy_from(&self, at: usize, from: &DeviceMemory, source: usize, len: usize) {
        let same = std::ptr::eq(self, from);
        let overlap = same && at < source.saturating_add(len) && source < at.saturating_add(len);
        if !overlap && at % WORD == source % WORD {
            let (head, to, tail) = self.parts(at, len);
            let (_, words, _) = from.parts(source, len);
            let mut edge = [0; WORD];
            from.read(source, &mut edge[..head]);
            self.write(at, &edge[..head]);
            copy_words(words, to);
            from.read(source + len - tail, &mut edge[..tail]);
            self.write(at + len - tail, &edge[..tail]);
            return;
        }
        let mut bounce = [0u8; 4096];
        let pieces = len.div_ceil(bounce.len());
        for i in 0..pieces {
            // Backwards where the way goes up, so that nothing is overwritten that is still to be read.
            let i = if overlap && at > source { pieces - 1 - i } else { i };
            let start = i * bounce.len();
            let piece = &mut bounce[..(len - start).min(4096)];
            from.read(source + start, piece);
            self.write(at + start, piece);
        }
    }

    /// Makes `len` bytes at `at` zero.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn clear(&self, at: usize, len: usize) {
        let (head, words, tail) = self.parts(at, len);
        self.write(at, &[0; WORD][..head]);
        clear_words(words);
        self.write(at + len - tail, &[0; WORD][..tail]);
    }

    /// Whether the bytes at `at` are `bytes`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn holds(&self, at: usize, bytes: &[u8]) -> bool {
        let mut buffer = [0; 4096];
        bytes.chunks(buffer.len()).enumerate().all(|(i, chunk)| {
            self.read(at + i * 4096, &mut buffer[..chunk.len()]);
            buffer[..chunk.len()] == *chunk
        })
    }

    /// Cuts `len` bytes at `at` into some at the end of a word, whole words, and some at the start of a word.
    fn parts(&self, at: usize, len: usize) -> (usize, &[AtomicU64], usize) {
        assert!(self.has(at as u64, len as u64), "{len} bytes at {at} of {}", self.len());
        let head = (at.next_multiple_of(WORD) - at).min(len);
        let words = (len - head) / WORD;
        let first = (at + head).div_ceil(WORD);
        (head, if words == 0 { &[] } else { &self.words()[first..first + words] }, len - head - words * WORD)
    }
}

/// Exchanges a part of `word`.
fn put(word: &AtomicU64, at: usize, bytes: &[u8]) {
    let (mut mask, mut new) = ([0u8; WORD], [0u8; WORD]);
    mask[at..at + bytes.len()].fill(0xff);
    new[at..at + bytes.len()].copy_from_slice(bytes);
    let (mask, new) = (u64::from_ne_bytes(mask), u64::from_ne_bytes(new));
    let mut now = word.load(Relaxed);
    while let Err(other) = word.compare_exchange_weak(now, now & !mask | new, Relaxed, Relaxed) {
        now = other;
    }
}

fn read_words(from: &[AtomicU64], to: &mut [u8]) {
    assert_eq!(from.len() * WORD, to.len());
    if from.len() >= MANY && cfg!(all(target_arch = "x86_64", not(miri))) {
        // SAFETY: `from` is valid for reads as words that others may change, `to` is ours alone; both have this length.
        return unsafe { move_words(from.as_ptr().cast(), to.as_mut_ptr().cast(), from.len()) };
    }
    for (word, bytes) in from.iter().zip(to.chunks_exact_mut(WORD)) {
        bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
    }
}

fn write_words(to: &[AtomicU64], from: &[u8]) {
    assert_eq!(to.len() * WORD, from.len());
    if to.len() >= MANY && cfg!(all(target_arch = "x86_64", not(miri))) {
        // SAFETY: `to` is valid for writes as words that others may access, `from` does not change; both have this length.
        return unsafe { move_words(from.as_ptr().cast(), to.as_ptr().cast_mut().cast(), to.len()) };
    }
    for (word, bytes) in to.iter().zip(from.chunks_exact(WORD)) {
        let mut whole = [0; WORD];
        whole.copy_from_slice(bytes);
        word.store(u64::from_ne_bytes(whole), Relaxed);
    }
}

fn copy_words(from: &[AtomicU64], to: &[AtomicU64]) {
    assert_eq!(to.len(), from.len());
    if to.len() >= MANY && cfg!(all(target_arch = "x86_64", not(miri))) {
        // SAFETY: both are valid as words that others may access, and have this length.
        return unsafe { move_words(from.as_ptr().cast(), to.as_ptr().cast_mut().cast(), to.len()) };
    }
    for (from, to) in from.iter().zip(to) {
        to.store(from.load(Relaxed), Relaxed);
    }
}

fn clear_words(words: &[AtomicU64]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if words.len() >= MANY {
        // SAFETY: the words are valid for writes, as words that others may access. The instruction stores one aligned quadword
        // after the other, so it does what a loop of relaxed atomic stores does. The direction flag is clear, as everywhere.
        unsafe {
            std::arch::asm!(
                "rep stosq",
                inout("rcx") words.len() => _,
                inout("rdi") words.as_ptr() => _,
                in("rax") 0u64,
                options(nostack, preserves_flags)
            );
        }
        return;
    }
    words.iter().for_each(|word| word.store(0, Relaxed));
}

/// Copies words upwards, at the speed of memcpy.
///
/// # Safety
/// `words` words at `from` can be read, and at `to` be written; where others access them at the same time, they do so as
/// aligned atomic words.
unsafe fn move_words(from: *const u64, to: *mut u64, words: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the instruction moves one quadword after the other, and aligned quadwords in one access each, so it does what
    // a loop of relaxed atomic loads and stores does. The direction flag is clear, as everywhere. The caller vouches for
    // the memory.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") words => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        let _ = (from, to, words);
        unreachable!("only called where the processor has it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEN: usize = 3 * 4096;

    fn filled() -> (DeviceMemory, Vec<u8>) {
        let m = DeviceMemory::new(LEN).unwrap();
        let bytes: Vec<u8> = (0..LEN).map(|i| (i * 7 + i / 256) as u8).collect();
        m.write(0, &bytes);
        (m, bytes)
    }

    fn all(m: &DeviceMemory) -> Vec<u8> {
        let mut out = vec![0; LEN];
        m.read(0, &mut out);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        #[test]
        fn copies_are_those_of_a_slice(at in 0..LEN, len in 0..LEN, source in 0..LEN, same: bool) {
            let (m, mut bytes) = filled();
            let len = len.min(LEN - at).min(LEN - source);
            let mut out = vec![0; len];
            m.read(at, &mut out);
            prop_assert_eq!(&out[..], &bytes[at..at + len]);
            prop_assert!(m.holds(at, &out));
            if same {
                m.copy_from(at, &m, source, len);
                bytes.copy_within(source..source + len, at);
            } else {
                let other = DeviceMemory::new(LEN).unwrap();
                other.write(source, &vec![0xa5; len]);
                m.copy_from(at, &other, source, len);
                bytes[at..at + len].fill(0xa5);
            }
            prop_assert_eq!(all(&m), &bytes[..]);
            let new: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
            m.write(at, &new);
            bytes[at..at + len].copy_from_slice(&new);
            prop_assert_eq!(all(&m), &bytes[..]);
            if len > 0 {
                m.clear(at, len);
                let mut out = all(&m);
                prop_assert!(out[at..at + len].iter().all(|b| *b == 0));
                out[at..at + len].copy_from_slice(&new);
                prop_assert_eq!(&out, &bytes);
                m.write(at, &new);
                bytes[at] ^= 1;
                prop_assert!(!m.holds(at, &bytes[at..at + len]));
            }
        }
    }

    #[test]
    fn parts_of_words_are_accessed_alone() {
        let (m, mut bytes) = filled();
        m.store(9, [1u8]);
        m.store(18, [2u8, 3]);
        m.store(28, 0x1234_5678_u32.to_ne_bytes());
        m.store(32, u64::MAX.to_ne_bytes());
        bytes[9] = 1;
        bytes[18..20].copy_from_slice(&[2, 3]);
        bytes[28..32].copy_from_slice(&0x1234_5678_u32.to_ne_bytes());
        bytes[32..40].fill(0xff);
        assert_eq!(all(&m), bytes);
        assert_eq!((m.load::<1>(9), m.load::<2>(18), u32::from_ne_bytes(m.load(28))), ([1], [2, 3], 0x1234_5678));
        assert_eq!(m.compare_exchange_u32(28, 1, 2), Err(0x1234_5678));
        assert_eq!(m.compare_exchange_u32(28, 0x1234_5678, 2), Ok(0x1234_5678));
        assert_eq!(u32::from_ne_bytes(m.load(28)), 2);
        assert!(std::panic::catch_unwind(|| m.load::<8>(LEN)).is_err());
        assert!(std::panic::catch_unwind(|| m.read(LEN - 1, &mut [0; 2])).is_err());
        assert!(std::panic::catch_unwind(|| m.copy_from(0, &m, LEN, 1)).is_err());
        assert!(m.has(LEN as u64, 0) && !m.has(u64::MAX, 2));
    }

    #[test]
    fn neighbours_in_a_word_do_not_disturb_each_other() {
        let m = DeviceMemory::new(4096).unwrap();
        let rounds = if cfg!(miri) { 50 } else { 20_000u16 };
        std::thread::scope(|s| {
            for lane in 0..4usize {
                let m = &m;
                s.spawn(move || {
                    for i in 0..rounds {
                        m.store(lane * 2, i.to_ne_bytes());
                        assert_eq!(u16::from_ne_bytes(m.load(lane * 2)), i);
                    }
                });
            }
        });
    }
}
