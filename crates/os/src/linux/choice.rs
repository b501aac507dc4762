//! What of userfaultfd is used: which of the features that this kernel has, and which of its two kinds of descriptor.
//!
//! A descriptor that serves accesses of the kernel needs privileges, and is of use only where faults come as messages; one for
//! the program's own accesses anybody may open. Features that are missing have a fallback, or an error that says which kernel has
//! them.
//!
//! # Write protection is synchronous
//!
//! `WP_ASYNC` would spare signal delivery its trouble with system calls that write to protected pages, but it belongs to the whole
//! descriptor and splits huge mappings. Instead the library makes ranges resident, writable where asked, before they are handed to
//! the kernel (`make_resident`), and the preload library does so for the calls that it covers.

use super::kernel::{Delivery, Setup};
use super::uffd::{Uffd, feature};
use crate::error::OsError;

/// The features wanted for each delivery, if the kernel has them.
const WANTED: u64 = feature::PAGEFAULT_FLAG_WP
    | feature::EVENT_REMAP
    | feature::EVENT_REMOVE
    | feature::EVENT_UNMAP
    | feature::THREAD_ID
    | feature::EXACT_ADDRESS
    | feature::POISON
    | feature::MOVE;
/// The features nothing works without.
const NEEDED: u64 = feature::EVENT_REMAP | feature::EVENT_UNMAP;

const REMEDY_PERMISSION: &str = "run as root, set vm.unprivileged_userfaultfd=1, or make /dev/userfaultfd accessible; \
     in a container allow the userfaultfd system call";

/// A descriptor with its features switched on.
pub(super) struct Choice {
    pub(super) uffd: Uffd,
    /// The features in use, of [`feature`].
    features: u64,
    /// The features that may be used.
    pub(super) known: u64,
    /// It serves accesses of the kernel too.
    pub(super) kernel_faults: bool,
}

impl Choice {
    /// Opens a descriptor for faults that are delivered as `setup` says.
    ///
    /// # Errors
    /// With a sentence and a remedy when this kernel or this container does not allow it.
    pub(super) fn open(setup: Setup) -> Result<Choice, OsError> {
        let known = Uffd::known_features().map_err(|e| {
            let e = OsError::new("this system offers no userfaultfd", e);
            if e.errno == libc::ENOSYS {
                e.remedy("the kernel needs CONFIG_USERFAULTFD, and a container must allow the system call")
            } else {
                e.remedy(REMEDY_PERMISSION)
            }
        })? & !setup.without;
        let signal = setup.delivery == Delivery::Signal;
        let features = features(known, signal)?;
        // Accesses of the kernel need the stronger kind; signal delivery cannot serve them in any case.
        let (mut uffd, kernel_faults) = match Uffd::open(false) {
            Ok(u) => (u, !signal),
            Err(e) if signal => (
                Uffd::open(true).map_err(|_| OsError::new("open a userfaultfd", e).remedy(REMEDY_PERMISSION))?,
                false,
            ),
            Err(e) => {
                return Err(
                    OsError::new("open a userfaultfd that serves system calls too", e).remedy(REMEDY_PERMISSION)
                );
            }
        };
        uffd.enable(features)
            .map_err(|e| OsError::new(format!("switch on userfaultfd features {features:#x}"), e))?;
        Ok(Choice { uffd, features, known, kernel_faults })
    }

    /// Whether all of `features` are in use.
    pub(super) fn has(&self, features: u64) -> bool {
        self.features & features == features
    }
}

/// Which of the features `known` to the kernel to use.
fn features(known: u64, signal: bool) -> Result<u64, OsError> {
    if known & NEEDED != NEEDED {
        return Err(OsError::plain("this kernel's userfaultfd does not report changed mappings")
            .remedy("Linux 4.14 or newer is needed"));
    }
    // What is to leave RAM must be taken out of the program's hands at one moment: moved, or protected first.
    if known & (feature::MOVE | feature::PAGEFAULT_FLAG_WP) == 0 {
        return Err(OsError::plain("this kernel's userfaultfd can neither move nor write-protect pages")
            .remedy("Linux 6.8 or newer is needed, or 5.7 on x86-64"));
    }
    let mut features = known & WANTED;
    if signal {
        if known & feature::SIGBUS == 0 {
            return Err(OsError::plain("this kernel's userfaultfd cannot deliver faults by signal")
                .remedy("Linux 4.14 or newer is needed, or thread delivery"));
        }
        features |= feature::SIGBUS;
    }
    if features & feature::POISON == 0 {
        // Whose access cannot be made to fail has to be told by signal.
        features |= known & feature::THREAD_ID;
    }
    if features & feature::MOVE == 0 {
        // Pages are dropped by madvise then, which must not announce itself.
        features &= !feature::EVENT_REMOVE;
    }
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn what_is_missing_has_a_fallback() {
        let features = |known, signal| super::features(known, signal).expect("enough");
        assert_eq!(features(ALL, false), WANTED);
        assert_eq!(features(ALL, true), WANTED | feature::SIGBUS);
        assert_eq!(features(ALL & !feature::POISON, false), WANTED & !feature::POISON);
        // A discard of ours must not wait for ourselves.
        assert_eq!(features(ALL & !feature::MOVE, false), WANTED & !(feature::MOVE | feature::EVENT_REMOVE));
        assert_eq!(features(ALL & !feature::PAGEFAULT_FLAG_WP, false), WANTED & !feature::PAGEFAULT_FLAG_WP);
    }

    #[test]
    fn a_kernel_that_has_too_little_is_refused_with_a_remedy() {
        let unmap = ALL & !feature::EVENT_UNMAP;
        let neither = ALL & !(feature::MOVE | feature::PAGEFAULT_FLAG_WP);
        for (known, signal) in [(unmap, false), (neither, false), (ALL & !feature::SIGBUS, true)] {
            let e = features(known, signal).expect_err("too little");
            assert!(e.to_string().contains("or newer is needed"), "{e}");
        }
        assert!(features(ALL & !feature::SIGBUS, false).is_ok());
    }
}
