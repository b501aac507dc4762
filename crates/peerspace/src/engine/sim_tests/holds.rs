//! What the oracle knows of pages that are held: they stay mapped, whatever happens, until they are let go of or the
//! program itself throws them away.

use super::Tried;
use crate::engine::hold::HoldError;
use peerspace_core::addr::{Access, PageRange};
use peerspace_core::entry::State;

/// A range that is held.
struct Hold {
    pages: PageRange,
    /// Nothing has been done to it that ends the promise.
    kept: bool,
}

/// All of them.
#[derive(Default)]
pub(super) struct Holds {
    all: Vec<Hold>,
    /// Something of what was held has moved with its mapping, and nobody lets go of that.
    left: bool,
}

fn overlap(a: PageRange, b: PageRange) -> bool {
    a.start < b.end && b.start < a.end
}

impl Holds {
    pub(super) fn hold(&mut self, engine: &Tried, pages: PageRange, access: Access) {
        match engine.hold_pages(pages, access) {
            Ok(()) => self.all.push(Hold { pages, kept: true }),
            // A page is lost, or the kernel was made to refuse.
            Err(HoldError::Lost(..) | HoldError::Foreign(_) | HoldError::Stays(..)) => {}
            Err(e @ (HoldError::TooMany(_) | HoldError::Unreachable(_))) => panic!("{e:?}"),
        }
    }

    pub(super) fn let_go(&mut self, engine: &Tried, which: usize) {
        if let Some(i) = which.checked_rem(self.all.len()) {
            let gone = self.all.swap_remove(i);
            engine.let_go(gone.pages);
            if !gone.kept {
                self.left = true;
                // What came in the place of what it held may be held by others, who lose that now.
                self.touched(gone.pages);
            }
        }
    }

    /// Whether some page may be relied on.
    pub(super) fn any(&self) -> bool {
        self.left || !self.all.is_empty()
    }

    pub(super) fn let_all_go(&mut self, engine: &Tried) {
        while !self.all.is_empty() {
            self.let_go(engine, 0);
        }
    }

    /// The program has done something to `pages`.
    pub(super) fn touched(&mut self, pages: PageRange) {
        self.all.iter_mut().filter(|h| overlap(h.pages, pages)).for_each(|h| h.kept = false);
    }

    pub(super) fn check(&self, engine: &Tried) {
        for page in self.all.iter().filter(|h| h.kept).flat_map(|h| h.pages.iter()) {
            let state = engine.table.look(page).map(|(entry, _)| entry.state());
            let mapped = matches!(state, Some(State::Host { .. } | State::Shared { .. }));
            assert!(mapped, "{page:?} is held, and {state:?}");
        }
    }
}
