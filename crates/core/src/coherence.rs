//! The coherence protocol of the CPU and its devices (rules G2 to G4, G9, G10, G14): who may hold a page in which way, and which
//! step comes next when a device wants it.
//!
//! The table's word of a page is its directory entry. Whoever changes anything about the page has that word locked; what the
//! word says is changed first, or in the same hold, and no translation outlives what permits it.
//!
//! # Who may hold what
//!
//! | state | the only truth is | CPU | devices |
//! |---|---|---|---|
//! | `Empty` | zeros, or a page of the kernel's own | - | - |
//! | `Zero {sharers}` | zeros | - | sharers read a page of zeros |
//! | `Host` | the frame | reads, or reads and writes | - |
//! | `Shared {!writable, sharers}` | the frame | reads | sharers read copies of their own, or the frame |
//! | `Shared {writable, sharers}` | the frame | reads and writes | sharers read and write the frame |
//! | `Standby` | the frame | - | - |
//! | `Device` | the device's page | - | - |
//! | `Mapped` | the device's page | - | its device reads and writes it |
//! | `Mapped {held}` | the same | - | the same, and nobody takes it away |
//! | `Coherent` | the device's page | reads and writes it | its device, and whoever asks through the port, read and write it |
//! | `Poisoned` | gone | fails | fail |
//!
//! So there is one writer of a page, or there are readers; but for a frame of the host that CPU and devices access in place, and
//! memory of a device that is in place for all of them: each is one memory with one content. Copies are read-only as long as
//! there are any.
//!
//! # Which transition takes away whose
//!
//! *Recall* takes the translations of all devices away, and waits until they make no more accesses by them; copies of their own
//! are freed. It turns `Shared` into `Host`, `Zero` into `Empty` and `Mapped` into `Device`, and it is the only way out of these
//! three states but one: a device that joins or already has what it wants enters. It comes before: a CPU's write to what is
//! shared and read-only, any CPU access to what is mapped on a device, a move, an eviction of the frame or of the device's page,
//! a discard, a fork, and a detach.
//!
//! It takes them from all devices: to take them from one alone would save a fault now and then, and be one more way in which each
//! pair of states can follow each other.
//!
//! Of what is `Coherent` no account is kept of who maps it: nobody has to give way as long as it stays in place. Before it is taken
//! from there *all* devices let go of it, and accesses through the port are waited for. An atomic access that must be alone
//! ([`Request::atomic`]) takes it from its place; the memory itself is one for all, so that single words are exchanged in one
//! step there, whoever does it.
//!
//! # What fails how
//!
//! - A device that does not let go is *quarantined*: it is cut off from the host's memory, and its own memory counts as gone.
//!   `Shared` and `Zero` lose nothing by that; of `Mapped` the data is lost, and whoever asks for it is told (Z9).
//! - A move that fails (no room, the copy, the device) leaves the page where it was, unmapped at worst: `Standby` or `Device`.
//! - A translation that cannot be entered leaves what the table says true: the data is where it says, and a fault comes again.
//!
//! # The steps
//!
//! A device's fault is resolved step by step by [`on_device_fault`]: lock the entry, do the step, look again. What has to
//! be done by somebody else's rules (a CPU fault that brings the page home, a CPU mapping that goes) is done without the lock.
//! Each step leads to a state from which fewer are left, unless others interfere, and each is complete by itself.
//!
//! Three things the words of the table do not say, and the steps rely on:
//!
//! - `Empty` means zeros here. Of adopted memory, a page of the kernel's own is taken in hand first.
//! - A pinned page (H5) refuses `Unmap`, and `Protect` if it is pinned to be written: its device waits, or asks again to have
//!   it [`Remote`](Wish::Remote), which takes neither unless the access is atomic.
//! - Whoever accesses the host's memory on behalf of a device goes by the translation that a recall takes away, not by the word,
//!   which changes only after the wait; and a quarantine waits for such accesses, which are our own code.
//!
//! # What has been checked
//!
//! The model in `coherence_tests` takes these steps, [`plan::on_fault`](crate::plan::on_fault) and
//! [`plan::on_evict`](crate::plan::on_evict), cuts each into what others can come between, and looks at every state that is
//! reachable: of one page of one frame, with a page for data and one for a copy on each device, a tier, and a CPU. Accesses
//! under way, reclaim, evictions, discards, pins, launches, memory in place, pages of the kernel's own, copies and mappings that
//! fail, and devices that stop answering come in any order. With two devices that may both fail it has over 100,000 states,
//! with three of which one may fail over 180,000, not counting those that differ in the devices' numbers alone. In each, one
//! writes or all read, nobody gets to what is not the latest, what is lost was on a device that failed, and nobody waits for
//! ever but for a launch or a pin. Beyond its bounds are several pages and blocks, forks, and the order of memory accesses.

use crate::addr::{Access, DevicePfn};
use crate::entry::State;
use crate::sharers::{MmuId, Sharers};

/// How a device is to get at a page, as far as there is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The page moves to the device.
    Migrate,
    /// To read, the device gets a copy; to write, the page moves.
    Replicate,
    /// The page stays on the host, or in place on another device, and the device accesses it there.
    Remote,
}

/// What a device wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Whose MMU faulted.
    pub mmu: MmuId,
    /// It writes.
    pub write: bool,
    /// Nobody else may access the page meanwhile (G14): it moves, whatever the wish.
    pub atomic: bool,
    /// How it is to get there.
    pub wish: Wish,
    /// The device has a page of zeros to map (G3).
    pub zero_page: bool,
    /// The CPU's mappings can be write-protected.
    pub protects: bool,
}

/// What a translation leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// The device's own page that the state names: to read and to write.
    Own,
    /// The device's own copy, or the host's frame if it has none: to read.
    Copy,
    /// The host's frame, or what is in place of another device.
    Frame {
        /// To write as well.
        writable: bool,
    },
    /// Zeros, to read.
    Zeros,
}

/// What a device's fault takes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Commit this state and enter the translation; then the device repeats its access.
    Enter(State, Grant),
    /// Take all devices' translations away.
    Recall,
    /// Make the CPU's mapping read-only, in the same state otherwise.
    Protect,
    /// Take the CPU's mapping away: the frame goes to standby.
    Unmap,
    /// Have the page mapped on the CPU, as if it had faulted so.
    Home(Access),
    /// Move the data (zeros, of the frame, or of another device) to a page of the device's own: it is [`State::Device`] then.
    Move,
    /// Give the device a copy of the frame, and [enter](Grant::Copy) it.
    Replicate(Sharers),
    /// Take the device's memory from its place in the CPU's mappings.
    Leave,
    /// A launch holds it: wait.
    Wait,
    /// It is lost.
    Lost(DevicePfn),
}

/// What comes next for `request`, on a page in `state`. `own`: whether a page of a device is one of the device that faults.
///
/// # Panics
/// On a [`State::Leaf`], which no page has.
#[cfg(feature = "device")]
pub fn on_device_fault(state: State, request: Request, own: impl Fn(DevicePfn) -> bool) -> Step {
    let Request { mmu, write, atomic, zero_page, protects, .. } = request;
    let writes = write || atomic;
    let wish = match request.wish {
        _ if atomic => Wish::Migrate,
        Wish::Replicate if writes || !protects => Wish::Migrate,
        wish => wish,
    };
    let home = Step::Home(if writes { Access::Write } else { Access::Read });
    match state {
        State::Empty if !writes && zero_page && wish != Wish::Remote => {
            Step::Enter(State::Zero { sharers: Sharers::one(mmu) }, Grant::Zeros)
        }
        State::Empty if wish == Wish::Remote => home,
        State::Empty => Step::Move,
        State::Zero { sharers } if !writes && (zero_page || sharers.has(mmu)) => {
            Step::Enter(State::Zero { sharers: sharers.with(mmu) }, Grant::Zeros)
        }
        State::Zero { .. } => Step::Recall,
        State::Host { pfn, writable, dirt } => match wish {
            Wish::Migrate => Step::Unmap,
            Wish::Replicate if writable => Step::Protect,
            Wish::Replicate => Step::Replicate(Sharers::one(mmu)),
            Wish::Remote if writes && !writable => home,
            Wish::Remote => {
                let shared = State::Shared { pfn, writable, dirt, sharers: Sharers::one(mmu) };
                Step::Enter(shared, if writable { Grant::Frame { writable: true } } else { Grant::Copy })
            }
        },
        State::Shared { pfn, writable, dirt, sharers } => {
            let joined = State::Shared { pfn, writable, dirt, sharers: sharers.with(mmu) };
            match wish {
                Wish::Remote if writable => Step::Enter(joined, Grant::Frame { writable: true }),
                Wish::Remote if !writes => Step::Enter(joined, Grant::Copy),
                Wish::Replicate if !writable && sharers.has(mmu) => Step::Enter(joined, Grant::Copy),
                Wish::Replicate if !writable => Step::Replicate(sharers.with(mmu)),
                _ => Step::Recall,
            }
        }
        State::Standby { .. } if wish == Wish::Migrate => Step::Move,
        State::Standby { .. } => home,
        State::Device { pfn, .. } if own(pfn) => Step::Enter(State::Mapped { pfn, held: false }, Grant::Own),
        State::Device { .. } if wish == Wish::Migrate => Step::Move,
        State::Device { .. } => home,
        State::Mapped { pfn, held } if own(pfn) => Step::Enter(State::Mapped { pfn, held }, Grant::Own),
        State::Mapped { held: true, .. } => Step::Wait,
        State::Mapped { .. } => Step::Recall,
        State::Coherent { pfn } if own(pfn) && !atomic => Step::Enter(state, Grant::Own),
        State::Coherent { .. } if wish == Wish::Remote => Step::Enter(state, Grant::Frame { writable: true }),
        State::Coherent { .. } => Step::Leave,
        State::Poisoned { pfn } => Step::Lost(pfn),
        State::Leaf(_) => unreachable!("a page is no leaf"),
    }
}

/// What a page in `state` is when no device maps it any more; `None` when none does.
#[inline]
pub fn recalled(state: State, stamp: impl FnOnce() -> u16) -> Option<State> {
    match state {
        State::Zero { .. } => Some(State::Empty),
        State::Shared { pfn, writable, dirt, .. } => Some(State::Host { pfn, writable, dirt }),
        State::Mapped { pfn, .. } => Some(State::Device { pfn, stamp: stamp(), rewritten: false }),
        _ => None,
    }
}

#[cfg(all(test, feature = "device", not(any(loom, shuttle))))]
#[path = "coherence_tests/mod.rs"]
mod tests;
