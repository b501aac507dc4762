//! The table of handles: what C holds is a number, and every number that was ever given out means one thing or nothing.
//!
//! ```text
//!   handle  kind:8 | index:24 | generation:32         state of a slot  generation:32 | kind:4 | closing:1 | calls:27
//! ```
//!
//! A call on a handle counts itself in the slot's state by one addition, and looks at what was there before: where the
//! generation or the kind is another one, or the slot is closing, the handle is stale, and the call takes itself away again. So
//! a lookup takes no lock, and what it finds stays until the call is over. Whoever releases a handle closes the slot first, so that no
//! call begins, and waits until those under way have ended; then what was there is his alone.
//!
//! A slot has a new generation each time that it is opened, and is used no more when there are none left: a stale handle never
//! becomes good again. Slots are in our own memory, which no space manages.

use crate::error::{Failure, ps_status};
use allocator_api2::boxed::Box;
use peerspace::{Adopted, Persistent, Prefetch, Region, Resident};
use peerspace_os::linux::fork::{ForkHandler, Registration, register};
use peerspace_os::linux::futex::{Mutex, wait_word, wake_word};
use peerspace_os::own::{Own, Shared, Vec};
use std::cell::{Cell, UnsafeCell};
use std::mem::forget;
use std::ops::Deref;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// One generation.
const GENERATION: u64 = 1 << 32;
/// One kind.
const KIND: u64 = 1 << 28;
/// Set while nothing is in the slot, or it is being taken away.
const CLOSING: u64 = 1 << 27;
/// The calls under way.
const CALLS: u64 = CLOSING - 1;

/// Slots of the first chunk; each further one has as many as all before it.
const FIRST: usize = 64;
const CHUNKS: usize = 19;
/// Slots at most: indices have 24 bits.
const MOST: usize = FIRST << (CHUNKS - 1);

/// What can be in a slot.
pub(crate) enum Object {
    Space(Shared<crate::space::SpaceEntry>),
    Region(Of<Region>),
    Adopted(Of<Adopted>),
    Pin(Resident),
    Prefetch(Shared<Prefetch>),
    Device(crate::space::DeviceEntry),
    Port(peerspace::device::mmu::Port),
    Persistent(Persistent),
    #[cfg(test)]
    Test(tests::Counted),
}

/// Something that belongs to a space, with the handle of that.
pub(crate) struct Of<T> {
    pub(crate) it: T,
    pub(crate) space: u64,
}

/// What a handle can mean.
pub(crate) trait Kind: Sized + 'static {
    /// Told apart in handles; from 1 to 15.
    const NUMBER: u8;
    fn object(self) -> Object;
    fn of(object: &Object) -> Option<&Self>;
    fn from(object: Object) -> Option<Self>;
}

/// The kinds, by their numbers.
const NAMES: [&str; 9] = [
    "nothing",
    "a space",
    "a region",
    "adopted memory",
    "a pin",
    "a prefetch",
    "a device",
    "a port",
    "a named region",
];

macro_rules! kinds {
    ($($number:literal $variant:ident $type:ty;)*) => { $(
        impl Kind for $type {
            const NUMBER: u8 = $number;
            fn object(self) -> Object {
                Object::$variant(self)
            }
            fn of(object: &Object) -> Option<&Self> {
                if let Object::$variant(it) = object { Some(it) } else { None }
            }
            fn from(object: Object) -> Option<Self> {
                if let Object::$variant(it) = object { Some(it) } else { None }
            }
        }
    )* };
}

#[cfg(test)]
kinds! {
    9 Test tests::Counted;
}

kinds! {
    1 Space Shared<crate::space::SpaceEntry>;
    2 Region Of<Region>;
    3 Adopted Of<Adopted>;
    4 Pin Resident;
    5 Prefetch Shared<Prefetch>;
    6 Device crate::space::DeviceEntry;
    7 Port peerspace::device::mmu::Port;
    8 Persistent Persistent;
}

#[repr(align(64))]
struct Slot {
    state: AtomicU64,
    value: UnsafeCell<Option<Object>>,
}

// SAFETY: `value` is written by whoever opens the slot, which it got from the free list, before any call can see it, and by whoever
// has closed it and waited until no call was under way. In between it is only shared. All that can be in it is Send and Sync.
unsafe impl Sync for Slot {}

const fn is_send_and_sync<T: Send + Sync>() {}
const _: () = is_send_and_sync::<Object>();

static TABLE: [AtomicPtr<Slot>; CHUNKS] = [const { AtomicPtr::new(null_mut()) }; CHUNKS];
static FREE: Mutex<Free> = Mutex::new(Free { slots: Vec::new_in(Own), made: 0 });
/// Held while the process forks, and by whoever works on what would stay locked in the child.
static STILL: Mutex<()> = Mutex::new(());

thread_local! {
    /// A slot that this thread has closed, for the next one that it opens.
    static SPARE: Spare = const { Spare(Cell::new(NONE)) };
}

struct Spare(Cell<u32>);

const NONE: u32 = u32::MAX;

impl Drop for Spare {
    fn drop(&mut self) {
        if self.0.get() != NONE {
            FREE.lock().slots.push(self.0.get());
        }
    }
}

/// Counts ends of calls on closing slots: whoever closes one waits for it to change.
static ENDED: AtomicU32 = AtomicU32::new(0);

/// The slots that can be opened.
struct Free {
    /// Those that were in use before.
    slots: Vec<u32>,
    /// All with lower indices were in use already.
    made: usize,
}

/// The chunk that has the slot `index`, and the slot's place there.
const fn place(index: usize) -> (usize, usize) {
    if index < FIRST {
        return (0, index);
    }
    let chunk = (index / FIRST).ilog2() as usize + 1;
    (chunk, index - (FIRST << (chunk - 1)))
}

#[inline]
fn slot(index: usize) -> Option<&'static Slot> {
    let (chunk, at) = place(index);
    // Acquire: pairs with the Release of whoever made the chunk.
    let chunk = TABLE.get(chunk)?.load(Ordering::Acquire);
    if chunk.is_null() {
        return None;
    }
    // SAFETY: a chunk is never freed, and has the slots that `place` says.
    Some(unsafe { &*chunk.add(at) })
}

impl Free {
    /// A slot to open. Nobody else has it.
    fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.slots.pop() {
            return Some(index);
        }
        if self.made == MOST {
            return None;
        }
        let (chunk, at) = place(self.made);
        if at == 0 && TABLE[chunk].load(Ordering::Relaxed).is_null() {
            let slots = if chunk == 0 { FIRST } else { FIRST << (chunk - 1) };
            let mut made: Vec<Slot> = Vec::new_in(Own);
            made.try_reserve_exact(slots).ok()?;
            // A place for each slot on the free list: to give one back takes no memory.
            self.slots.try_reserve(self.made + slots).ok()?;
            made.extend((0..slots).map(|_| Slot { state: AtomicU64::new(CLOSING), value: UnsafeCell::new(None) }));
            let (first, _) = Box::into_raw_with_allocator(made.into_boxed_slice());
            // Release: pairs with the Acquire in `slot`.
            TABLE[chunk].store(first.cast::<Slot>(), Ordering::Release);
        }
        self.made += 1;
        Some(self.made as u32 - 1)
    }
}

/// The process does not fork as long as the result lives. Not for long, and not twice in one thread.
pub(crate) fn no_fork() -> impl Drop {
    STILL.lock()
}

/// In a forked child no call is under way: those who made them do not exist.
struct Forks;

impl ForkHandler for Forks {
    fn before(&self) {
        // Nobody else is just changing anything while the process is copied.
        forget((STILL.lock(), FREE.lock()));
    }

    fn parent(&self) {
        // SAFETY: locked by `before`, in this thread.
        unsafe { (FREE.force_unlock(), STILL.force_unlock()) };
    }

    fn child(&self) {
        // SAFETY: the copy of what `before` locked, in the copy of its thread.
        unsafe { (FREE.force_unlock(), STILL.force_unlock()) };
        let made = FREE.lock().made;
        for slot in (0..made).filter_map(slot) {
            slot.state.fetch_and(!CALLS, Ordering::Relaxed);
        }
    }
}

/// What a call has found by a handle. It stays until this is dropped.
pub(crate) struct Held<T: 'static> {
    slot: &'static Slot,
    it: &'static T,
}

impl<T> Deref for Held<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.it
    }
}

/// A call on a slot ends.
#[inline]
fn leave(slot: &Slot) {
    // Release: what the call did comes before what whoever closes the slot does.
    let before = slot.state.fetch_sub(1, Ordering::Release);
    if before & (CLOSING | CALLS) == CLOSING | 1 {
        tell_closer();
    }
}

#[cold]
fn tell_closer() {
    ENDED.fetch_add(1, Ordering::Release);
    wake_word(&ENDED, u32::MAX);
}

impl<T> Drop for Held<T> {
    #[inline]
    fn drop(&mut self) {
        leave(self.slot);
    }
}

/// Gives `it` a handle.
///
/// # Errors
/// When there are as many as there can be, or there is no memory. `it` is dropped then.
pub(crate) fn open<T: Kind>(it: T) -> Result<u64, Failure> {
    static FORKS: OnceLock<Option<Registration<Forks>>> = OnceLock::new();
    FORKS.get_or_init(|| register(Shared::new(Forks)).ok());
    let spare = SPARE.try_with(|spare| spare.0.replace(NONE)).ok().filter(|spare| *spare != NONE);
    let index = spare.or_else(|| FREE.lock().take());
    let Some((index, slot)) = index.and_then(|index| Some((index, slot(index as usize)?))) else {
        let why =
            format!("there is no room for another handle: {MOST} can be in use at once, and memory allows fewer");
        return Err(Failure::new(ps_status::PS_ERR_SYSTEM, why));
    };
    // SAFETY: nobody else has the slot, so it is closed, no call sees what is in it, and nobody else opens it.
    unsafe { *slot.value.get() = Some(it.object()) };
    // Relaxed: nobody else changes anything but the calls. Those by stale handles may be counted just now, and stay so.
    let before = slot.state.load(Ordering::Relaxed) & !CALLS;
    let generation = before / GENERATION + 1;
    let now = generation * GENERATION + u64::from(T::NUMBER) * KIND;
    // Release: pairs with the Acquire in `find`.
    slot.state.fetch_add(now - before, Ordering::Release);
    Ok(u64::from(T::NUMBER) << 56 | u64::from(index) << 32 | generation)
}

/// The state of a slot that is open, and has what `handle` means, without calls. None where it cannot be of that kind.
#[inline]
fn open_state<T: Kind>(handle: u64) -> Option<u64> {
    let kind = u64::from(T::NUMBER);
    (handle >> 56 == kind).then_some((handle % GENERATION) * GENERATION + kind * KIND)
}

/// What `handle` means, and keeps meaning until what this returns is dropped.
///
/// # Errors
/// When it is no handle of that kind, or not any more.
#[inline]
pub(crate) fn find<T: Kind>(handle: u64, name: &'static str) -> Result<Held<T>, Failure> {
    let Some((slot, open)) = slot((handle >> 32) as usize & (MOST - 1)).zip(open_state::<T>(handle)) else {
        return Err(bad::<T>(handle, name));
    };
    // Acquire: pairs with the Release in `open`, so the value is seen.
    let before = slot.state.fetch_add(1, Ordering::Acquire);
    if before & !CALLS == open {
        // SAFETY: the slot is open, and this call is counted: nobody takes the value away before the call is over.
        let value: &'static Option<Object> = unsafe { &*slot.value.get() };
        if let Some(it) = value.as_ref().and_then(T::of) {
            return Ok(Held { slot, it });
        }
    }
    leave(slot);
    Err(bad::<T>(handle, name))
}

/// Takes back a handle, and what it means. Waits for calls under way.
///
/// # Errors
/// As for [`find`]; also when somebody else is doing the same.
pub(crate) fn close<T: Kind>(handle: u64, name: &'static str) -> Result<T, Failure> {
    let index = (handle >> 32) as u32 & (MOST as u32 - 1);
    let Some((slot, open)) = slot(index as usize).zip(open_state::<T>(handle)) else {
        return Err(bad::<T>(handle, name));
    };
    // Acquire: pairs with the Release in `open` and in `leave`. Who closes is settled by this exchange alone.
    let close = |state: u64| (state & !CALLS == open).then_some(state | CLOSING);
    let Ok(before) = slot.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, close) else {
        return Err(bad::<T>(handle, name));
    };
    if before & CALLS != 0 {
        wait_for_calls(slot);
    }
    // SAFETY: this call has closed the slot, and no other is under way that could see the value: such a call was counted
    // before the slot was closed.
    let value = unsafe { (*slot.value.get()).take() };
    // The last generation is not followed by another.
    if handle % GENERATION < GENERATION - 1 {
        let kept = SPARE.try_with(|spare| spare.0.get() == NONE && spare.0.replace(index) == NONE);
        if !kept.unwrap_or(false) {
            FREE.lock().slots.push(index);
        }
    }
    value.and_then(T::from).ok_or_else(|| bad::<T>(handle, name))
}

#[cold]
fn wait_for_calls(slot: &Slot) {
    let mut spins = 0;
    loop {
        let seen = ENDED.load(Ordering::Acquire);
        // Acquire: pairs with the Release in `leave`.
        if slot.state.load(Ordering::Acquire) & CALLS == 0 {
            break;
        }
        spins += 1;
        if spins < 100 {
            std::hint::spin_loop();
        } else {
            wait_word(&ENDED, seen, Some(Duration::from_millis(100)));
        }
    }
}

/// What is wrong with a handle.
#[cold]
fn bad<T: Kind>(handle: u64, name: &str) -> Failure {
    let wanted = NAMES.get(T::NUMBER as usize).copied().unwrap_or("something else");
    let kind = NAMES.get((handle >> 56) as usize).copied();
    let why = match kind {
        _ if handle == 0 => format!("{name}: the handle is 0, and not that of {wanted}"),
        Some(kind) if kind == wanted => {
            format!("{name}: the handle {handle:#x} of {wanted} was released, or never given out")
        }
        Some(kind) => format!("{name}: {handle:#x} is a handle of {kind}, and not of {wanted}"),
        None => format!("{name}: {handle:#x} is no handle that was given out"),
    };
    Failure::new(ps_status::PS_ERR_HANDLE, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Instant;

    /// Says when it goes.
    pub(crate) struct Counted(Arc<AtomicUsize>, u64);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            self.1 = 0;
        }
    }

    fn gone(at: &Arc<AtomicUsize>) -> usize {
        at.load(Ordering::SeqCst)
    }

    #[test]
    fn places_of_slots_follow_each_other() {
        let sizes = (0..CHUNKS).map(|chunk| if chunk == 0 { FIRST } else { FIRST << (chunk - 1) });
        let mut all = sizes.enumerate().flat_map(|(chunk, size)| (0..size).map(move |at| (chunk, at)));
        assert!((0..MOST).map(place).eq(all.by_ref().take(MOST)));
        assert_eq!(all.next(), None);
    }

    #[test]
    fn a_handle_means_one_thing_or_nothing() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let mut seen = std::collections::HashSet::new();
        for i in 0..1000 {
            let handle = open(Counted(dropped.clone(), i)).unwrap();
            assert!(seen.insert(handle), "{handle:#x} comes again");
            assert_eq!(find::<Counted>(handle, "it").unwrap().1, i);
            assert!(find::<Resident>(handle, "it").is_err());
            assert_eq!(gone(&dropped), i as usize);
            drop(close::<Counted>(handle, "it").unwrap());
            assert_eq!(gone(&dropped), i as usize + 1);
            assert!(find::<Counted>(handle, "it").is_err() && close::<Counted>(handle, "it").is_err());
        }
    }

    #[test]
    fn what_a_thread_has_spare_is_used_when_it_is_gone() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let spare = || {
            let handle = open(Counted(dropped.clone(), 1)).unwrap();
            drop(close::<Counted>(handle, "it").unwrap());
            (handle >> 32) as u32 & (MOST as u32 - 1)
        };
        // Others of these tests may take it at once: then it was there.
        let index = std::thread::scope(|scope| scope.spawn(spare).join().unwrap());
        let used = slot(index as usize).unwrap().state.load(Ordering::Relaxed) / GENERATION > 1;
        assert!(used || FREE.lock().slots.contains(&index));
    }

    #[test]
    fn many_are_open_at_once() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let handles: std::vec::Vec<u64> = (0..5000).map(|i| open(Counted(dropped.clone(), i)).unwrap()).collect();
        for (i, handle) in handles.iter().enumerate() {
            assert_eq!(find::<Counted>(*handle, "it").unwrap().1, i as u64);
        }
        handles.iter().for_each(|handle| drop(close::<Counted>(*handle, "it").unwrap()));
        assert_eq!(gone(&dropped), 5000);
    }

    #[test]
    fn whoever_releases_waits_for_calls_under_way() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let (current, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let used = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        if let Ok(it) = find::<Counted>(current.load(Ordering::Relaxed), "it") {
                            assert_eq!(it.1, 7);
                            std::thread::yield_now();
                            assert_eq!(it.1, 7, "it went while it was used");
                            used.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for round in 0..3000 {
                let handle = open(Counted(dropped.clone(), 7)).unwrap();
                current.store(handle, Ordering::Relaxed);
                let (before, since) = (used.load(Ordering::Relaxed), Instant::now());
                while round % 16 == 0 && used.load(Ordering::Relaxed) < before + 2 {
                    std::thread::yield_now();
                    assert!(since.elapsed() < Duration::from_secs(60), "nobody finds it");
                }
                let it = close::<Counted>(handle, "it").unwrap();
                assert_eq!((gone(&dropped), it.1), (round, 7));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(gone(&dropped), 3000);
    }

    #[test]
    fn a_slot_whose_generations_are_used_up_is_used_no_more() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let handle = open(Counted(dropped.clone(), 1)).unwrap();
        let index = (handle >> 32) as u32 & (MOST as u32 - 1);
        let old = slot(index as usize).unwrap();
        old.state.fetch_or((GENERATION - 1) * GENERATION, Ordering::Relaxed);
        let last = handle | (GENERATION - 1);
        assert_eq!(find::<Counted>(last, "it").unwrap().1, 1);
        assert!(find::<Counted>(handle, "it").is_err());
        drop(close::<Counted>(last, "it").unwrap());
        assert!(!FREE.lock().slots.contains(&index) && SPARE.with(|spare| spare.0.get()) != index);
        assert!(find::<Counted>(last, "it").is_err());
    }
}
