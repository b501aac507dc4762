//! One change of mappings at a time, the program's or ours: so that what we put in the place of a mapping does not take the place of
//! something else that has come to be there.

use peerspace_os::linux::futex::Mutex;
use peerspace_os::linux::signal::without_signals;

static CHANGING: Mutex<()> = Mutex::new(());

/// Changes mappings by `change`, while nobody else does. Without signals: their handlers may change mappings.
pub(crate) fn alone<T>(change: impl FnOnce() -> T) -> T {
    without_signals(|| {
        let _changing = CHANGING.lock();
        change()
    })
}

/// Keeps everybody out, across a fork.
pub(crate) fn rest() {
    std::mem::forget(CHANGING.lock());
}

/// Undoes [`rest`], in the parent and in the child.
///
/// # Safety
/// It was called, in this thread or in the one that this is the copy of.
pub(crate) unsafe fn go_on() {
    // SAFETY: locked by `rest`, says the caller.
    unsafe { CHANGING.force_unlock() };
}
