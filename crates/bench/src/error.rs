//! Why something was not measured.
//!
//! The difference that matters is the first one: what this machine cannot do is skipped and said, what went wrong
//! fails the run.

use std::fmt::Display;
use std::process::ExitStatus;

/// Why a contender gave no number.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// This machine, this user or this build cannot do it. The contender is skipped.
    #[error("{0}")]
    Unavailable(String),
    /// Something went wrong that should not have.
    #[error("{0}")]
    Failed(String),
    /// The process ended.
    #[error("its process ended: {0}")]
    Ended(ExitStatus),
    /// A value that was read is not the one that was written.
    #[error("wrong data: {0}")]
    Wrong(String),
    /// The user wants to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Trouble {
    /// For `map_err`: a failure of `what`.
    pub(crate) fn failed<E: Display>(what: impl Display) -> impl FnOnce(E) -> Trouble {
        move |e| Trouble::Failed(format!("{what}: {e}"))
    }

    /// For `map_err`: this machine does not let us do `what`.
    pub(crate) fn unavailable<E: Display>(what: impl Display) -> impl FnOnce(E) -> Trouble {
        move |e| Trouble::Unavailable(format!("{what}: {e}"))
    }
}
