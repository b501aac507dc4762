//! Failures on a schedule: a wrapper around any [`Kernel`] that makes some calls fail, for tests.
//!
//! A call fails either by chance, with a generator that is seeded ([`Inject::by_chance`]), or because a test said
//! so for the n-th call of one kind ([`Inject::plan`]). Only failures that the kernel behind could have reported
//! are made up, in the way it would have reported them:
//!
//! - A call on a range may do its first pages and then stop. The pages it reports are done, the others are not.
//! - [`Trouble::Changing`] is made up for operations on region memory alone: Linux says it there for passing
//!   reasons of its own too, with no change to wait for.
//! - [`Trouble::Present`] and [`Trouble::Absent`] are never made up: they are statements about a page, and would
//!   be lies.
//! - Calls that only look ([`Kernel::wait_message`], [`Kernel::receive`]) may see nothing once, and
//!   [`Kernel::is_changing`] always tells the truth.
//!
//! What the wrapper keeps are counters of its own, never those of a model checker: they are no part of what is
//! tested.

use crate::kernel::{Capabilities, CpuPage, Done, Kernel, Mapped, Message, Protect, SharedMemory, Trouble, Wake};
use peerspace_core::addr::{Access, Geometry, Pages, Va, VaRange};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The calls that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)] // each is the method of its name
pub enum Call {
    Words,
    Grow,
    Map,
    Adopt,
    Disown,
    CopyIn,
    CopyStaged,
    ZeroIn,
    PutBack,
    TakeOut,
    Protect,
    Poison,
    Bury,
    Show,
    Hide,
    IsPresent,
    PresentRuns,
    IsHuge,
    Collapse,
    Unshare,
    Discard,
    MappingAt,
    DropStaged,
    WaitMessage,
    Receive,
}

const CALLS: usize = Call::Receive as usize + 1;

impl Call {
    /// All of them.
    pub const ALL: [Call; CALLS] = [
        Call::Words,
        Call::Grow,
        Call::Map,
        Call::Adopt,
        Call::Disown,
        Call::CopyIn,
        Call::CopyStaged,
        Call::ZeroIn,
        Call::PutBack,
        Call::TakeOut,
        Call::Protect,
        Call::Poison,
        Call::Bury,
        Call::Show,
        Call::Hide,
        Call::IsPresent,
        Call::PresentRuns,
        Call::IsHuge,
        Call::Collapse,
        Call::Unshare,
        Call::Discard,
        Call::MappingAt,
        Call::DropStaged,
        Call::WaitMessage,
        Call::Receive,
    ];

    /// What the call may be made to say.
    pub const fn troubles(self) -> &'static [Trouble] {
        use Trouble::{Busy, Changing, Interrupted, NoMemory, Unsuitable};
        match self {
            Call::CopyIn | Call::CopyStaged | Call::ZeroIn => &[Changing, NoMemory, Interrupted],
            Call::PutBack => &[Changing, NoMemory, Busy, Interrupted],
            Call::TakeOut => &[Changing, NoMemory, Busy, Interrupted, Unsuitable],
            Call::Protect | Call::Poison => &[Changing, NoMemory, Interrupted],
            Call::IsPresent | Call::PresentRuns | Call::IsHuge | Call::MappingAt => &[NoMemory, Interrupted],
            Call::Adopt => &[NoMemory, Busy, Unsuitable],
            Call::Collapse => &[NoMemory, Busy, Unsuitable],
            Call::Unshare => &[NoMemory, Busy, Interrupted],
            Call::Words | Call::Grow | Call::Map | Call::Disown => &[NoMemory],
            Call::Discard | Call::DropStaged | Call::Bury | Call::Show | Call::Hide => &[NoMemory],
            Call::WaitMessage | Call::Receive => &[Interrupted],
        }
    }
}

/// A failure that a test asks for: see [`Inject::plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Which call.
    pub call: Call,
    /// How many calls of its kind go well before it.
    pub after: u64,
    /// How many calls of its kind fail from there on; `u64::MAX` for all.
    pub times: u64,
    /// What it says.
    pub trouble: Trouble,
    /// Pages that are done before it says so, where the call works on a range and there are as many.
    pub pages: Pages,
}

/// A kernel of which some calls fail.
#[derive(Debug)]
pub struct Inject<K> {
    kernel: K,
    /// One call in so many fails, per kind of call; 0 for none.
    odds: [AtomicU32; CALLS],
    random: AtomicU64,
    planned: Mutex<Vec<Planned>>,
    /// True while `planned` has entries, as a number: what calls look at.
    plans: AtomicU32,
    made: [AtomicU64; CALLS],
}

impl<K: Kernel> Inject<K> {
    /// Wraps `kernel`; nothing fails yet.
    pub fn new(kernel: K) -> Inject<K> {
        Inject {
            kernel,
            odds: [const { AtomicU32::new(0) }; CALLS],
            random: AtomicU64::new(1),
            planned: Mutex::new(Vec::new()),
            plans: AtomicU32::new(0),
            made: [const { AtomicU64::new(0) }; CALLS],
        }
    }

    /// The kernel behind.
    pub fn inner(&self) -> &K {
        &self.kernel
    }

    /// Makes one in `one_in` of `calls` fail by chance, beginning from `seed`; 0 for none.
    pub fn by_chance(&self, seed: u64, calls: &[Call], one_in: u32) {
        self.random.store(seed, Relaxed);
        for call in calls {
            self.odds[*call as usize].store(one_in, Relaxed);
        }
    }

    /// Has a call fail as `planned` says. Several plans for one call apply one after the other.
    pub fn plan(&self, planned: Planned) {
        let mut plans = self.lock();
        plans.push(planned);
        self.plans.store(plans.len() as u32, Relaxed);
    }

    /// Lets everything go well from here on.
    pub fn relent(&self) {
        self.odds.iter().for_each(|o| o.store(0, Relaxed));
        self.lock().clear();
        self.plans.store(0, Relaxed);
    }

    /// Whether any call may be made to fail.
    pub fn is_failing(&self) -> bool {
        self.odds.iter().any(|o| o.load(Relaxed) > 0) || self.plans.load(Relaxed) > 0
    }

    /// How many failures of `call` were made up so far.
    pub fn made(&self, call: Call) -> u64 {
        self.made[call as usize].load(Relaxed)
    }

    /// How many failures were made up so far.
    pub fn made_in_all(&self) -> u64 {
        Call::ALL.iter().map(|c| self.made(*c)).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Planned>> {
        self.planned.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The next random number (splitmix64): one atomic addition, so that threads never share one.
    fn next(&self) -> u64 {
        let mut x = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Whether this `call` on `pages` pages fails: what it says, and the pages it does first.
    fn fails(&self, call: Call, pages: u64) -> Option<(Trouble, u64)> {
        let failure = self.planned_failure(call, pages).or_else(|| {
            let odds = self.odds[call as usize].load(Relaxed);
            if odds == 0 {
                return None;
            }
            let x = self.next();
            if !x.is_multiple_of(odds as u64) {
                return None;
            }
            let troubles = call.troubles();
            let trouble = troubles[(x >> 32) as usize % troubles.len()];
            Some((trouble, (x >> 40) % pages.max(1)))
        })?;
        self.made[call as usize].fetch_add(1, Relaxed);
        Some(failure)
    }

    fn planned_failure(&self, call: Call, pages: u64) -> Option<(Trouble, u64)> {
        if self.plans.load(Relaxed) == 0 {
            return None;
        }
        let mut plans = self.lock();
        let i = plans.iter().position(|p| p.call == call)?;
        let plan = &mut plans[i];
        if plan.after > 0 {
            plan.after -= 1;
            return None;
        }
        let failure = (plan.trouble, plan.pages.0.min(pages.saturating_sub(1)));
        if plan.times <= 1 {
            plans.remove(i);
            self.plans.store(plans.len() as u32, Relaxed);
        } else if plan.times != u64::MAX {
            plan.times -= 1;
        }
        Some(failure)
    }

    /// A call that works or fails as a whole.
    fn whole<T>(&self, call: Call, run: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
        match self.fails(call, 0) {
            Some((trouble, _)) => Err(trouble),
            None => run(),
        }
    }

    /// A call on a range of `len` bytes, which `run` carries out for the bytes it is given.
    fn partly(&self, call: Call, len: u64, run: impl FnOnce(u64) -> Done) -> Done {
        let geometry = self.kernel.geometry();
        match self.fails(call, geometry.pages_in(len).0) {
            None => run(len),
            Some((trouble, 0)) => Done::stopped(Pages(0), trouble),
            Some((trouble, pages)) => {
                let done = run(geometry.bytes(Pages(pages)));
                Done { trouble: Some(done.trouble.unwrap_or(trouble)), ..done }
            }
        }
    }
}

/// The first `len` bytes of `range`.
fn front(range: VaRange, len: u64) -> VaRange {
    VaRange { end: Va(range.start.0 + len), ..range }
}

impl<K: Kernel> Kernel for Inject<K> {
    type Words = K::Words;
    type Park = K::Park;

    fn geometry(&self) -> Geometry {
        self.kernel.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.kernel.capabilities()
    }

    fn park(&self) -> K::Park {
        self.kernel.park()
    }

    fn words(&self, words: usize, usable: usize) -> Result<K::Words, Trouble> {
        self.whole(Call::Words, || self.kernel.words(words, usable))
    }

    fn grow(&self, words: &K::Words, usable: usize) -> Result<(), Trouble> {
        self.whole(Call::Grow, || self.kernel.grow(words, usable))
    }

    fn map(&self, len: u64) -> Result<VaRange, Trouble> {
        self.whole(Call::Map, || self.kernel.map(len))
    }

    fn unmap(&self, range: VaRange) -> Result<(), Trouble> {
        self.kernel.unmap(range)
    }

    fn adopt(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Adopt, || self.kernel.adopt(range))
    }

    fn confirm(&self, page: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Adopt, || self.kernel.confirm(page))
    }

    fn disown(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Disown, || self.kernel.disown(range))
    }

    fn copy_in(&self, to: Va, from: &[u8], protect: Protect, wake: Wake) -> Done {
        let len = from.len() as u64;
        self.partly(Call::CopyIn, len, |n| self.kernel.copy_in(to, &from[..n as usize], protect, wake))
    }

    fn copy_staged(&self, to: Va, from: VaRange, protect: Protect, wake: Wake) -> Done {
        self.partly(Call::CopyStaged, from.len(), |n| self.kernel.copy_staged(to, front(from, n), protect, wake))
    }

    fn zero_in(&self, to: VaRange, protect: Protect, wake: Wake) -> Done {
        self.partly(Call::ZeroIn, to.len(), |n| self.kernel.zero_in(front(to, n), protect, wake))
    }

    fn put_back(&self, to: Va, from: VaRange, wake: Wake) -> Done {
        self.partly(Call::PutBack, from.len(), |n| self.kernel.put_back(to, front(from, n), wake))
    }

    fn take_out(&self, to: Va, from: VaRange) -> Done {
        self.partly(Call::TakeOut, from.len(), |n| self.kernel.take_out(to, front(from, n)))
    }

    fn take_out_read_only(&self, to: Va, from: VaRange) -> Done {
        self.partly(Call::TakeOut, from.len(), |n| self.kernel.take_out_read_only(to, front(from, n)))
    }

    fn protect(&self, range: VaRange, protect: Protect, wake: Wake) -> Result<(), Trouble> {
        self.whole(Call::Protect, || self.kernel.protect(range, protect, wake))
    }

    fn waits_for_faults(&self) -> bool {
        self.inner().waits_for_faults()
    }

    fn let_pass(&self, range: VaRange, write: bool, over: &dyn Fn() -> bool) {
        self.inner().let_pass(range, write, over);
    }

    fn wake(&self, range: VaRange) -> Result<(), Trouble> {
        self.kernel.wake(range)
    }

    fn poison(&self, va: Va) -> Result<(), Trouble> {
        self.whole(Call::Poison, || self.kernel.poison(va))
    }

    fn bury(&self, va: Va) -> Result<(), Trouble> {
        self.whole(Call::Bury, || self.kernel.bury(va))
    }

    fn show(&self, range: VaRange, memory: SharedMemory<'_>) -> Result<(), Trouble> {
        self.whole(Call::Show, || self.kernel.show(range, memory))
    }

    fn hide(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Hide, || self.kernel.hide(range))
    }

    fn close(&self, range: VaRange) -> Result<(), Trouble> {
        self.kernel.close(range)
    }

    fn is_accessible(&self, range: VaRange, write: bool) -> bool {
        self.kernel.is_accessible(range, write)
    }

    fn read_mapped(&self, at: Va, to: &mut [u8]) -> bool {
        self.kernel.read_mapped(at, to)
    }

    fn write_mapped(&self, at: Va, from: &[u8]) -> bool {
        self.kernel.write_mapped(at, from)
    }

    fn mappings_in(&self, range: VaRange) -> Result<u64, Trouble> {
        self.whole(Call::MappingAt, || self.kernel.mappings_in(range))
    }

    fn most_mappings(&self) -> u64 {
        self.kernel.most_mappings()
    }

    fn is_present(&self, va: Va) -> Result<bool, Trouble> {
        self.whole(Call::IsPresent, || self.kernel.is_present(va))
    }

    fn present_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange)) -> Result<(), Trouble> {
        self.whole(Call::PresentRuns, || self.kernel.present_runs(range, found))
    }

    fn cpu_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange, CpuPage)) -> Result<(), Trouble> {
        self.whole(Call::PresentRuns, || self.kernel.cpu_runs(range, found))
    }

    fn is_huge(&self, va: Va) -> Result<bool, Trouble> {
        self.whole(Call::IsHuge, || self.kernel.is_huge(va))
    }

    fn collapse(&self, block: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Collapse, || self.kernel.collapse(block))
    }

    fn unshare(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Unshare, || self.kernel.unshare(range))
    }

    fn discard(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Discard, || self.kernel.discard(range))
    }

    fn mapping_at(&self, va: Va) -> Result<Option<VaRange>, Trouble> {
        self.whole(Call::MappingAt, || self.kernel.mapping_at(va))
    }

    fn allowed_at(&self, va: Va) -> Result<Option<(VaRange, Access)>, Trouble> {
        self.whole(Call::MappingAt, || self.kernel.allowed_at(va))
    }

    fn watch(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Adopt, || self.kernel.watch(range))
    }

    fn unwatch(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::Disown, || self.kernel.unwatch(range))
    }

    fn mapped_from(&self, va: Va) -> Result<Option<Mapped>, Trouble> {
        self.whole(Call::MappingAt, || self.kernel.mapped_from(va))
    }

    fn staging(&self) -> VaRange {
        self.kernel.staging()
    }

    fn read_staged<T>(&self, range: VaRange, read: impl FnOnce(&[u8]) -> T) -> T {
        self.kernel.read_staged(range, read)
    }

    fn write_staged<T>(&self, range: VaRange, write: impl FnOnce(&mut [u8]) -> T) -> T {
        self.kernel.write_staged(range, write)
    }

    fn drop_staged(&self, range: VaRange) -> Result<(), Trouble> {
        self.whole(Call::DropStaged, || self.kernel.drop_staged(range))
    }

    fn wait_message(&self, timeout: Option<Duration>) -> bool {
        self.fails(Call::WaitMessage, 0).is_none() && self.kernel.wait_message(timeout)
    }

    fn receive(&self) -> Option<Message> {
        match self.fails(Call::Receive, 0) {
            Some(_) => None,
            None => self.kernel.receive(),
        }
    }

    fn is_changing(&self) -> bool {
        self.kernel.is_changing()
    }
}
