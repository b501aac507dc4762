//! The facade: what the engine asks of a kernel, as one trait with its contract.
//!
//! Two implementations stand behind it, [`linux`](crate::linux) and [`sim`](crate::sim), and
//! [`inject`](crate::inject) wraps either of them to make calls fail on a schedule. The engine knows this trait
//! alone; no other crate contains unsafe code.
//!
//! # Vocabulary
//!
//! *Region memory* is what the program uses: private anonymous memory in which a page that is not there raises a
//! fault. *Staging* is memory of ours at fixed addresses where frames are while the program does not map them.
//! A page travels between the two whole, without being copied: [`take_out`](Kernel::take_out) and
//! [`put_back`](Kernel::put_back) are atomic for everybody who looks at the page.
//!
//! # What the calls promise
//!
//! - Calls on ranges work page by page in ascending order and may stop early: [`Done::pages`] says how many pages
//!   were done, [`Done::trouble`] why no more.
//! - [`Trouble::Changing`] means that the program is changing its mappings right now and that a [`Message`] about
//!   it waits to be received. Retrying in place never ends: let go of every lock, let messages be handled, and
//!   plan again.
//! - None of the calls on the fault path allocates, touches region memory, or takes a lock that a user of region
//!   memory could hold.

use peerspace_core::addr::{Access, Geometry, Pages, Va, VaRange};
use peerspace_core::sync::Park;
use peerspace_core::words::Words;
use rustix::fd::BorrowedFd;
use std::fmt;
use std::time::Duration;

/// Why a call stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trouble {
    /// The program is changing its mappings; a message says how (EAGAIN).
    Changing,
    /// There is a page already (EEXIST).
    Present,
    /// There is no page, or no registered mapping (ENOENT).
    Absent,
    /// The page is shared with a forked process, or pinned by the kernel (EBUSY).
    Busy,
    /// The mapping does not allow it: read-only, executable, locked, or not registered (EINVAL).
    Unsuitable,
    /// The kernel has no memory for it (ENOMEM).
    NoMemory,
    /// The process is going away (ESRCH).
    Exiting,
    /// Interrupted before anything was done (EINTR).
    Interrupted,
    /// Anything else, as an errno.
    Other(i32),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Changing => f.write_str("the program is changing its mappings"),
            Trouble::Present => f.write_str("a page is there already"),
            Trouble::Absent => f.write_str("no page, or no registered mapping, is there"),
            Trouble::Busy => f.write_str("the page is shared with a forked process or pinned"),
            Trouble::Unsuitable => f.write_str("the mapping does not allow it"),
            Trouble::NoMemory => f.write_str("the kernel is out of memory"),
            Trouble::Exiting => f.write_str("the process is exiting"),
            Trouble::Interrupted => f.write_str("interrupted by a signal"),
            Trouble::Other(errno) => write!(f, "{}", std::io::Error::from_raw_os_error(*errno)),
        }
    }
}

impl std::error::Error for Trouble {}

/// How far a call on a range came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Done {
    /// Pages done, from the start of the range.
    pub pages: Pages,
    /// Why the rest was not done.
    pub trouble: Option<Trouble>,
}

impl Done {
    /// All of `pages` were done.
    pub const fn all(pages: Pages) -> Done {
        Done { pages, trouble: None }
    }

    /// `pages` were done, then this happened.
    pub const fn stopped(pages: Pages, trouble: Trouble) -> Done {
        Done { pages, trouble: Some(trouble) }
    }
}

/// Memory of a device that the CPU can map (rule Z5): a file, from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct SharedMemory<'a> {
    /// The file, or the device node.
    pub file: BorrowedFd<'a>,
    /// Bytes from its start.
    pub offset: u64,
}

/// Whether a page appears write-protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// The CPU may write without a fault.
    No,
    /// The first write faults.
    Yes,
}

/// Whether threads that wait for the page in the kernel are let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// No: more is to be done first, or nobody can be waiting (signal delivery).
    No,
    /// Yes.
    Yes,
}

/// How the CPU maps a page that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuPage {
    /// A write goes on without a fault that this library hears of.
    pub writable: bool,
    /// It is the kernel's page of zeros; false where that cannot be found out.
    pub zero: bool,
    /// It is part of a huge page, mapped as one.
    pub huge: bool,
    /// It is a page of a file or of shared memory, not one of the program's own.
    pub file: bool,
}

/// A fault, or a change the program made to its mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        /// The address, at least to the page.
        va: Va,
        /// It wants to write.
        write: bool,
        /// The page is there but write-protected.
        protected: bool,
        /// The thread, by the number the system has for it; 0 where that is not known.
        thread: u32,
    },
    /// The program discarded the content (MADV_DONTNEED, MADV_FREE, MADV_REMOVE). The pages themselves go a
    /// moment after this message was received.
    Discard(VaRange),
    /// The range was unmapped. Somebody else may use the addresses already.
    Unmap(VaRange),
    /// The mapping moved, with its pages and its registration. That it is unmapped where it was is told afterwards.
    Move {
        /// Where it was.
        from: Va,
        /// Where it is.
        to: Va,
        /// Bytes moved.
        len: u64,
    },
    /// The process forked without asking this library first; the number names the child's registration.
    Fork(i32),
}

/// A mapping of the program's, whatever it maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Its addresses.
    pub range: VaRange,
    /// What the program may do there; `None` for nothing.
    pub allowed: Option<Access>,
}

/// What this kernel can do. Everything else is emulated or done without; see [`Kernel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Pages can be moved between addresses (6.8): [`take_out`](Kernel::take_out), [`put_back`](Kernel::put_back).
    pub move_pages: bool,
    /// Pages can be write-protected (5.7).
    pub write_protect: bool,
    /// Pages can be poisoned in place (6.6). Elsewhere they are [buried](Kernel::bury).
    pub poison: bool,
    /// Accesses by the kernel on behalf of the program are served too, not only the program's own.
    pub kernel_faults: bool,
    /// Huge pages can be had.
    pub huge: bool,
}

/// The operating system, as the engine sees it. See the [module](self) for the contract.
pub trait Kernel: Send + Sync + 'static {
    /// Memory for tables.
    type Words: Words + 'static;
    /// How threads wait for each other.
    type Park: Park + Clone + 'static;

    /// The page size.
    fn geometry(&self) -> Geometry;

    /// What can be done here.
    fn capabilities(&self) -> Capabilities;

    /// How threads wait for each other.
    fn park(&self) -> Self::Park;

    /// Reserves `words` zeroed words of which `usable` can be used at once.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    fn words(&self, words: usize, usable: usize) -> Result<Self::Words, Trouble>;

    /// Makes the first `usable` words usable.
    ///
    /// # Errors
    /// When that is more than was reserved, or the kernel refuses.
    fn grow(&self, words: &Self::Words, usable: usize) -> Result<(), Trouble>;

    // --- region memory ---

    /// Maps fresh region memory of `len` bytes at a block boundary: no page is there, every access faults.
    ///
    /// # Errors
    /// When there is no room, or the kernel refuses.
    fn map(&self, len: u64) -> Result<VaRange, Trouble>;

    /// Gives back what [`map`](Kernel::map) mapped, without a [`Message`].
    ///
    /// # Errors
    /// When the kernel refuses.
    fn unmap(&self, range: VaRange) -> Result<(), Trouble>;

    /// Makes accesses to missing pages of existing private anonymous memory fault from now on. Pages that are
    /// there stay.
    ///
    /// # Errors
    /// [`Trouble::Unsuitable`] for memory of another kind, [`Trouble::Busy`] when it is registered elsewhere,
    /// [`Trouble::Absent`] where some of it belongs to this library.
    fn adopt(&self, range: VaRange) -> Result<(), Trouble>;

    /// Whether faults in `page` come here already, asked in the one way there is: by [adopting](Kernel::adopt) it once more. For
    /// whoever has just faulted there, so that it is no memory of this library's.
    ///
    /// # Errors
    /// As for [`adopt`](Kernel::adopt), when they do not.
    fn confirm(&self, page: VaRange) -> Result<(), Trouble> {
        self.adopt(page)
    }

    /// Undoes [`adopt`](Kernel::adopt). Missing pages read as zeros from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn disown(&self, range: VaRange) -> Result<(), Trouble>;

    /// Installs copies of `from`, whole pages, at `to`.
    fn copy_in(&self, to: Va, from: &[u8], protect: Protect, wake: Wake) -> Done;

    /// Installs copies of staged pages at `to`: [`copy_in`](Kernel::copy_in) from `from` in staging.
    fn copy_staged(&self, to: Va, from: VaRange, protect: Protect, wake: Wake) -> Done;

    /// Installs zeroed pages at `to`, at most 16 of them.
    fn zero_in(&self, to: VaRange, protect: Protect, wake: Wake) -> Done;

    /// Moves staged pages to `to`, where none may be. They appear writable. A whole block of one huge page
    /// stays huge where nothing has ever been mapped in the block.
    fn put_back(&self, to: Va, from: VaRange, wake: Wake) -> Done;

    /// Moves the program's pages to staging, where none may be.
    fn take_out(&self, to: Va, from: VaRange) -> Done;

    /// The same out of memory that the program may read and not write: its permissions are changed for a moment, in which its
    /// writes fault and nobody else may change its mappings. To be called with the entries of the pages locked, where all
    /// changes of mappings are announced. [`Trouble::Unsuitable`] for memory of another kind, [`Trouble::Busy`] also where
    /// pages are shared with a forked process.
    fn take_out_read_only(&self, to: Va, from: VaRange) -> Done;

    /// Sets or clears write protection of the pages that are there. Clearing can wake.
    ///
    /// # Errors
    /// See [`Trouble`].
    fn protect(&self, range: VaRange, protect: Protect, wake: Wake) -> Result<(), Trouble>;

    /// Lets threads that wait for pages of `range` look again.
    ///
    /// # Errors
    /// When the range is not registered.
    fn wake(&self, range: VaRange) -> Result<(), Trouble>;

    /// Makes every access to the page at `va`, which is not there, raise SIGBUS (rule Z9).
    ///
    /// # Errors
    /// [`Trouble::Unsuitable`] where the kernel cannot, as its [`Capabilities`] say; see [`Trouble`].
    fn poison(&self, va: Va) -> Result<(), Trouble>;

    /// Does what [`poison`](Kernel::poison) does where the kernel cannot: puts a page that raises SIGBUS in the place
    /// of the one at `va`, which is not there, in one step, so that nobody ever sees zeros; then wakes who waits for
    /// it. The page belongs to no registered mapping any more: a [`Message::Unmap`] tells of it, and the call waits
    /// until that is received. Not for threads that receive messages, and not in a section.
    ///
    /// When that fails, accesses to the page raise SIGSEGV instead: never do they read zeros.
    ///
    /// # Errors
    /// When not even that can be had; accesses go on waiting.
    fn bury(&self, va: Va) -> Result<(), Trouble>;

    /// Whether the page at `va` is there.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn is_present(&self, va: Va) -> Result<bool, Trouble>;

    /// Calls `found` with each run of pages of `range` that are there.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn present_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange)) -> Result<(), Trouble>;

    /// Calls `found` with each run of pages of `range` that are there and that the program may read, in ascending order, and
    /// how the CPU maps them. Neighbouring runs may be mapped in the same way.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn cpu_runs(&self, range: VaRange, found: &mut dyn FnMut(VaRange, CpuPage)) -> Result<(), Trouble>;

    /// Whether the CPU maps the block at `va` by one huge page.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn is_huge(&self, va: Va) -> Result<bool, Trouble>;

    /// Makes one huge page of a block (rule H3), all of whose pages are there and none of which is write-protected.
    /// Nobody sees it happen; the mapping stays as it is if it cannot be done.
    ///
    /// # Errors
    /// [`Trouble::Busy`] when a page is missing or somebody holds it, [`Trouble::NoMemory`] when there is no huge page
    /// to be had, [`Trouble::Unsuitable`] when a page is protected or the mapping is of another kind.
    fn collapse(&self, block: VaRange) -> Result<(), Trouble>;

    /// Gives the process pages of its own where it still shares them with a forked one. Pages that are there
    /// become writable. It waits for pages that are missing, where a system call [waits for
    /// faults](Kernel::waits_for_faults); whoever does so is to be [let pass](Kernel::let_pass).
    ///
    /// # Errors
    /// See [`Trouble`].
    fn unshare(&self, range: VaRange) -> Result<(), Trouble>;

    /// Drops the program's pages of `range`: they are missing from then on. Where pages can be moved, a [`Message`]
    /// tells of it like of any discarding; the call waits until that is received.
    ///
    /// # Errors
    /// See [`Trouble`].
    fn discard(&self, range: VaRange) -> Result<(), Trouble>;

    /// The registered mapping that holds `va`, if `va` belongs to one: the program may have grown a region in
    /// place, which no message tells.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn mapping_at(&self, va: Va) -> Result<Option<VaRange>, Trouble>;

    /// What the program may do with memory of its own at `va`, and the mapping of which that holds; `None` where it has
    /// mapped nothing of the kind, or may not even read: no message tells of a change of permissions.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn allowed_at(&self, va: Va) -> Result<Option<(VaRange, Access)>, Trouble>;

    // --- memory of the program that stays where it is ---

    /// Has [`Message`]s tell what the program does to the mappings of `range`, which are of any kind and hold memory that
    /// nobody takes out: no access of it ever faults here. One caller at a time. Of what happens in the first fifth of a second
    /// after the very first call news may come as late as that.
    ///
    /// # Errors
    /// [`Trouble::Unsuitable`] where the kernel does not tell about all of it: before 6.7 of regular files, and of files that
    /// were opened to be read alone and are shared. See also [`Trouble`].
    fn watch(&self, range: VaRange) -> Result<(), Trouble>;

    /// Undoes [`watch`](Kernel::watch).
    ///
    /// # Errors
    /// When the kernel refuses, because part of it is not watched, or not mapped.
    fn unwatch(&self, range: VaRange) -> Result<(), Trouble>;

    /// The mapping that holds `va`, or else the next one behind it; `None` where there is none. Permissions, and what is not
    /// [watched](Kernel::watch), change without a message.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn mapped_from(&self, va: Va) -> Result<Option<Mapped>, Trouble>;

    // --- memory of devices, in the place of a region's ---

    /// Puts the memory of a device in the place of `range`, blocks or pages of one region all of whose pages are out.
    /// Whoever waits for one of them goes on with what the device holds; no access faults from then on.
    ///
    /// Where there was a registered mapping, a [`Message::Unmap`] of `range` tells of it, and the call waits until that is
    /// received. Not for threads that receive messages, and not in a section.
    ///
    /// # Errors
    /// When the kernel refuses the mapping; the message may have come nevertheless.
    fn show(&self, range: VaRange, memory: SharedMemory<'_>) -> Result<(), Trouble>;

    /// Puts missing pages of a region in the place of the memory that [`show`](Kernel::show) has put at `range`: every access
    /// waits from then on, and none sees anything else in between. What was written until then, the device holds.
    ///
    /// What takes the place is prepared elsewhere and moves there: a [`Message::Move`] to `range` tells of it, and a
    /// [`Message::Unmap`] of where it came from. The call waits for both to be received. Not for threads that receive
    /// messages, and not in a section.
    ///
    /// # Errors
    /// When the kernel refuses; the device's memory stays, and no message is left over.
    fn hide(&self, range: VaRange) -> Result<(), Trouble>;

    /// Puts nothing at all in the place of memory that [`show`](Kernel::show) has put at `range`, and that nobody refers to
    /// any more. The addresses stay taken. Nobody is told.
    ///
    /// # Errors
    /// When the kernel refuses; the device's memory stays.
    fn close(&self, range: VaRange) -> Result<(), Trouble>;

    /// Whether an access to memory of a device in place would succeed, as far as can be said: a file may have become shorter,
    /// the memory behind it broken. Changes no byte.
    fn is_accessible(&self, range: VaRange, write: bool) -> bool;

    /// Reads what the program has at `at`, where pages are there. False if not all of it could be read. Never waits for a page:
    /// to be called in a section, of what the table says is mapped.
    fn read_mapped(&self, at: Va, to: &mut [u8]) -> bool;

    /// Writes to where the program may write without a fault; otherwise as [`read_mapped`](Kernel::read_mapped).
    fn write_mapped(&self, at: Va, from: &[u8]) -> bool;

    /// How many mappings there are in `range`, each counted that is there in part.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn mappings_in(&self, range: VaRange) -> Result<u64, Trouble>;

    /// How many mappings this process may have.
    fn most_mappings(&self) -> u64;

    // --- staging ---

    /// The staging area; fixed for the life of this kernel object.
    fn staging(&self) -> VaRange;

    /// Gives `read` the bytes of staged pages. The caller owns them.
    fn read_staged<T>(&self, range: VaRange, read: impl FnOnce(&[u8]) -> T) -> T;

    /// Gives `write` the bytes of staged pages, which appear (zeroed) where there are none. The caller owns
    /// them.
    fn write_staged<T>(&self, range: VaRange, write: impl FnOnce(&mut [u8]) -> T) -> T;

    /// Frees the staged pages of `range`. Not while messages are being handled by the caller.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn drop_staged(&self, range: VaRange) -> Result<(), Trouble>;

    // --- messages ---

    /// Waits up to `timeout` for a message to be there. True when [`receive`](Kernel::receive) may find one.
    fn wait_message(&self, timeout: Option<Duration>) -> bool;

    /// Receives the next message, if there is one. Whoever caused a [`Message`] other than a fault goes on from
    /// here, whether or not it has been acted on.
    fn receive(&self) -> Option<Message>;

    /// True when a change of mappings has been announced that nobody has received yet.
    fn is_changing(&self) -> bool;

    /// Whether a system call of ours that meets a page that is not there waits for its fault to be resolved, and does not fail.
    fn waits_for_faults(&self) -> bool {
        false
    }

    /// Ends such a wait somewhere in `range`, where the table says that pages are mapped: one has moved away, or was given up, or
    /// is write-protected for no reason. The system call finds zeros there or, where nothing is mapped, an error. `over` says
    /// whether it has ended. `write`: it writes, and the table says that the program may without a fault.
    ///
    /// The caller sees to it that, while the call is under way and until this has returned, nobody changes what the table says of
    /// these pages.
    fn let_pass(&self, _range: VaRange, _write: bool, _over: &dyn Fn() -> bool) {}
}
