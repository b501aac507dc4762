//! How calls end: a status, and a message that says what was wrong, where, and what to do about it. And what every call of the
//! library goes through, so that no panic leaves it, and no callback comes back by a way that would wait for itself.

use peerspace::device::DeviceError;
use peerspace::device::mmu::FaultError;
use peerspace::{Error, SpecError};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ffi::{CStr, c_char};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a call ended. Where it is not PS_OK, ps_last_error() says more.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ps_status {
    /// It was done.
    PS_OK = 0,
    /// An argument is null, unaligned, or has a value that means nothing.
    PS_ERR_ARGUMENT = 1,
    /// The size field of a structure says a version that cannot be understood.
    PS_ERR_SIZE = 2,
    /// A handle was released, is of something else, or was never given out.
    PS_ERR_HANDLE = 3,
    /// A range of bytes does not fit: it wraps, lies elsewhere, overlaps, or is managed already.
    PS_ERR_RANGE = 4,
    /// It was called from inside of a callback that must not call it.
    PS_ERR_REENTRANT = 5,
    /// This system does not allow what is needed; or it is out of threads or handles.
    PS_ERR_SYSTEM = 6,
    /// The kernel refused a single request.
    PS_ERR_KERNEL = 7,
    /// The budget of RAM cannot work.
    PS_ERR_BUDGET = 8,
    /// There is no such device, or the space has none.
    PS_ERR_NO_DEVICE = 9,
    /// A device cannot be used for this, or has failed.
    PS_ERR_DEVICE = 10,
    /// There is no room elsewhere for what a device holds, or on a device for what is wanted there.
    PS_ERR_NO_ROOM = 11,
    /// More would be kept resident than may be, or the page is kept resident.
    PS_ERR_PINNED = 12,
    /// Memory could not be migrated; it is where it was.
    PS_ERR_MIGRATE = 13,
    /// The data of a page is lost: its device could not give it back.
    PS_ERR_LOST = 14,
    /// A region with a name cannot be had.
    PS_ERR_NAMED = 15,
    /// The device may read there, and not write.
    PS_ERR_READ_ONLY = 16,
    /// The program has protected the memory.
    PS_ERR_PROTECTED = 17,
    /// The host's memory is not mapped there for the device (any more): it is to fault.
    PS_ERR_NOT_MAPPED = 18,
    /// The device faults for ever, although it says that it has the translation.
    PS_ERR_NO_HEADWAY = 19,
    /// The device has been cut off from its space.
    PS_ERR_CUT = 20,
    /// The work of a launch failed.
    PS_ERR_WORK = 21,
    /// The program has discarded or unmapped an operand while a device worked on it.
    PS_ERR_DISCARDED = 22,
    /// The library itself has failed. Please report it.
    PS_ERR_INTERNAL = 23,
}

use ps_status::*;

/// What each status means, by its number.
const MEANINGS: [&CStr; 24] = [
    c"no error",
    c"an argument is null, unaligned, or means nothing",
    c"the size field of a structure says a version that cannot be understood",
    c"a handle was released, is of something else, or was never given out",
    c"a range of bytes does not fit",
    c"called from inside of a callback that must not call it",
    c"this system does not allow what is needed",
    c"the kernel refused",
    c"the budget of RAM cannot work",
    c"there is no such device",
    c"a device cannot be used for this, or has failed",
    c"there is no room",
    c"more would be kept resident than may be, or a page is kept resident",
    c"memory could not be migrated",
    c"data is lost",
    c"a region with a name cannot be had",
    c"the device may not write there",
    c"the program has protected the memory",
    c"not mapped for the device",
    c"the device faults for ever at one address",
    c"the device is cut off from its space",
    c"the work of a launch failed",
    c"an operand was discarded while a device worked on it",
    c"the library itself has failed",
];

/// Why a call did not do what it was asked to.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: ps_status,
    pub(crate) text: String,
}

impl Failure {
    #[cold]
    pub(crate) fn new(status: ps_status, text: impl Into<String>) -> Failure {
        Failure { status, text: text.into() }
    }

    #[cold]
    pub(crate) fn argument(text: impl fmt::Display) -> Failure {
        Failure::new(PS_ERR_ARGUMENT, text.to_string())
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        let status = match &e {
            Error::System(_) | Error::Thread(_) => PS_ERR_SYSTEM,
            Error::BudgetTooSmall { .. } | Error::BudgetTooLarge { .. } => PS_ERR_BUDGET,
            Error::NoDevice | Error::NoSuchDevice => PS_ERR_NO_DEVICE,
            Error::NoRoom { .. } => PS_ERR_NO_ROOM,
            Error::Migrate { .. } => PS_ERR_MIGRATE,
            Error::Named { .. } => PS_ERR_NAMED,
            Error::BadRange { .. } => PS_ERR_RANGE,
            Error::TooManyPinned { .. } => PS_ERR_PINNED,
            Error::Kernel { .. } => PS_ERR_KERNEL,
            Error::Lost { .. } => PS_ERR_LOST,
            // What later versions add is said by its message.
            _ => PS_ERR_DEVICE,
        };
        Failure::new(status, in_c(e.to_string()))
    }
}

/// A message of the library, with what it names called as C has it.
fn in_c(text: String) -> String {
    const NAMES: [(&str, &str); 6] = [
        ("Builder::pin_limit", "pin_limit of ps_space_options"),
        ("Region::migrate_to", "ps_region_migrate"),
        ("Space::create_persistent", "ps_persistent_create"),
        ("Space::persistent_regions lists them", "ps_persistent_create makes one"),
        ("Dax::persistent", "ps_device_attach_persistent"),
        ("Device::shared", "shared"),
    ];
    NAMES.iter().fold(text, |text, (name, c)| if text.contains(name) { text.replace(name, c) } else { text })
}

impl From<SpecError> for Failure {
    fn from(e: SpecError) -> Failure {
        match &e {
            SpecError::CannotOpen(..) => Failure::new(PS_ERR_DEVICE, e.to_string()),
            _ => Failure::argument(e),
        }
    }
}

impl From<FaultError> for Failure {
    fn from(e: FaultError) -> Failure {
        let status = match &e {
            FaultError::NotManaged(_) | FaultError::OutOfReach(_) | FaultError::Unreachable(_) => PS_ERR_RANGE,
            FaultError::ReadOnly(_) => PS_ERR_READ_ONLY,
            FaultError::Protected(_) => PS_ERR_PROTECTED,
            FaultError::InPlace(_) | FaultError::NoWay(_) | FaultError::Stays(_) => PS_ERR_MIGRATE,
            FaultError::Lost(..) => PS_ERR_LOST,
            FaultError::NoRoom(_) => PS_ERR_NO_ROOM,
            FaultError::Pinned(_) => PS_ERR_PINNED,
            FaultError::NoHeadway(_) => PS_ERR_NO_HEADWAY,
            FaultError::NotMapped(_) => PS_ERR_NOT_MAPPED,
            FaultError::Cut => PS_ERR_CUT,
            _ => PS_ERR_DEVICE,
        };
        Failure::new(status, e.to_string())
    }
}

/// What a device's callback has answered, as the space understands it: 0, an errno (of either sign), or PS_NO_ANSWER.
pub(crate) fn answer(number: i32) -> Result<(), DeviceError> {
    let errno = match number {
        0 => return Ok(()),
        i32::MIN => return Err(DeviceError::NoAnswer),
        n => n.abs(),
    };
    Err(match errno {
        libc::ENOSPC => DeviceError::NoSpace,
        libc::ENODEV | libc::ENXIO => DeviceError::Gone,
        libc::EILSEQ | libc::EBADMSG => DeviceError::Corrupt,
        libc::EOPNOTSUPP | libc::ENOSYS => DeviceError::Unsupported,
        errno => DeviceError::Io(errno),
    })
}

/// What this thread is inside of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Inside {
    /// The program's own code.
    Nothing,
    /// The work of a launch: pages are held.
    Work,
    /// A callback of a device: pages are locked.
    Device,
}

thread_local! {
    static INSIDE: Cell<Inside> = const { Cell::new(Inside::Nothing) };
    /// Ends with a 0, and needs no allocation: it can be written while pages of the heap are locked.
    static MESSAGE: UnsafeCell<[u8; LONGEST]> = const { UnsafeCell::new([0; LONGEST]) };
}

/// The longest message, with the 0 at its end.
const LONGEST: usize = 1024;

/// Runs a callback.
pub(crate) fn inside<T>(what: Inside, f: impl FnOnce() -> T) -> T {
    struct Back(Inside);
    impl Drop for Back {
        fn drop(&mut self) {
            INSIDE.set(self.0);
        }
    }
    let _back = Back(INSIDE.replace(what));
    f()
}

/// A call that may be made from the program's own code alone.
#[inline]
pub(crate) fn call(name: &'static str, f: impl FnOnce() -> Result<(), Failure>) -> ps_status {
    call_from(Inside::Nothing, name, f)
}

/// A call that may be made from there as well.
#[inline]
pub(crate) fn call_from(most: Inside, name: &'static str, f: impl FnOnce() -> Result<(), Failure>) -> ps_status {
    let now = INSIDE.get();
    if now > most {
        return reentrant(now, name);
    }
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => PS_OK,
        Ok(Err(failure)) => tell(name, &failure),
        Err(panic) => panicked(name, panic),
    }
}

#[cold]
fn tell(name: &str, failure: &Failure) -> ps_status {
    tell_all([name, ": ", &failure.text]);
    failure.status
}

/// Puts a message together. What is too long is cut off.
fn tell_all<const N: usize>(parts: [&str; N]) {
    MESSAGE.with(|message| {
        // SAFETY: the message is this thread's, and nobody has a reference to it; C was told that its pointer is good until
        // now. A callback that a fault of this thread runs meanwhile touches no managed memory, and so does this.
        let message = unsafe { &mut *message.get() };
        let whole = parts.iter().flat_map(|part| part.chars()).filter(|c| *c != '\0');
        let mut end = 0;
        for c in whole {
            if end + c.len_utf8() >= LONGEST {
                break;
            }
            end += c.encode_utf8(&mut message[end..]).len();
        }
        message[end] = 0;
    });
}

#[cold]
fn reentrant(now: Inside, name: &str) -> ps_status {
    let why = match now {
        Inside::Device => {
            "called from inside of a callback of a device, which runs with pages locked that the call could wait for. Leave \
             it to a thread of the device's own"
        }
        _ => {
            "called from inside of the work of a launch, which holds pages that the call could wait for. Only ports, and \
             questions about handles and statistics, can be used there"
        }
    };
    // Memory of the heap must not be waited for here: no string is made.
    tell_all([name, ": ", why]);
    PS_ERR_REENTRANT
}

#[cold]
fn panicked(name: &str, panic: Box<dyn Any + Send>) -> ps_status {
    let why = panic.downcast_ref::<&str>().copied();
    let why = why.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("for no known reason");
    let text = format!("the library has failed ({why}): please report it");
    // What a panic carries may panic itself when it is dropped.
    let status = tell(name, &Failure::new(PS_ERR_INTERNAL, text));
    std::mem::forget(panic);
    status
}

/// What went wrong in the last call of this thread that did not end with PS_OK: a sentence that says which call, what was
/// wrong, where, and what to do about it. Never null; empty where nothing went wrong yet.
///
/// Good until the thread's next call that fails, and until it ends. Messages longer than 1023 bytes are cut off.
#[unsafe(no_mangle)]
pub extern "C" fn ps_last_error() -> *const c_char {
    MESSAGE.with(|message| message.get().cast_const().cast())
}

/// What a status means, in general. Never null; good for ever. For any number: "unknown status" for those that are none.
#[unsafe(no_mangle)]
pub extern "C" fn ps_strerror(status: i32) -> *const c_char {
    let meaning = usize::try_from(status).ok().and_then(|n| MEANINGS.get(n));
    meaning.map_or(c"unknown status", |meaning| meaning).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: the message of this thread, which makes no call meanwhile.
        unsafe { CStr::from_ptr(ps_last_error()) }.to_str().unwrap().into()
    }

    #[test]
    fn no_panic_leaves_the_library() {
        assert_eq!(call("ps_test", || panic!("on purpose: {}", 7)), PS_ERR_INTERNAL);
        assert!(message().starts_with("ps_test: ") && message().contains("on purpose: 7"), "{}", message());
        assert_eq!(call("ps_test", || Ok(())), PS_OK);
    }

    #[test]
    fn calls_from_inside_of_callbacks_are_refused_unless_they_are_harmless() {
        let ok = || Ok(());
        inside(Inside::Work, || {
            assert_eq!(call("ps_test", ok), PS_ERR_REENTRANT);
            assert!(message().contains("launch"), "{}", message());
            assert_eq!(call_from(Inside::Work, "ps_test", ok), PS_OK);
            inside(Inside::Device, || {
                assert_eq!(call_from(Inside::Work, "ps_test", ok), PS_ERR_REENTRANT);
                assert!(message().contains("callback of a device"), "{}", message());
            });
            assert_eq!(call("ps_test", ok), PS_ERR_REENTRANT);
        });
        assert_eq!(call("ps_test", ok), PS_OK);
    }

    #[test]
    fn messages_are_cut_off_where_they_are_too_long() {
        let long = "ä".repeat(LONGEST);
        assert_eq!(call("ps_test", || Err(Failure::argument(&long))), PS_ERR_ARGUMENT);
        let message = message();
        assert!(message.len() >= LONGEST - 2 && message.ends_with("ä"), "{message}");
    }

    #[test]
    fn every_status_has_a_meaning_of_its_own() {
        // SAFETY: what it returns is constant.
        let text = |n| unsafe { CStr::from_ptr(ps_strerror(n)) };
        let all: std::collections::HashSet<_> = (0..=PS_ERR_INTERNAL as i32).map(text).collect();
        assert_eq!(all.len(), MEANINGS.len());
        assert!(!all.contains(c"unknown status"));
        assert_eq!(text(PS_ERR_INTERNAL as i32), c"the library itself has failed");
        assert_eq!(text(PS_ERR_LOST as i32), c"data is lost");
        for n in [-1, 24, i32::MIN, i32::MAX] {
            assert_eq!(text(n), c"unknown status");
        }
    }

    #[test]
    fn answers_of_devices_are_errnos_of_either_sign() {
        assert_eq!(answer(0), Ok(()));
        assert_eq!(answer(i32::MIN), Err(DeviceError::NoAnswer));
        for (errno, e) in [(libc::ENOSPC, DeviceError::NoSpace), (libc::EIO, DeviceError::Io(libc::EIO))] {
            assert_eq!([answer(errno), answer(-errno)], [Err(e.clone()), Err(e)]);
        }
    }
}
