//! How far a UFFDIO_MOVE really came.
//!
//! Linux 6.18 moves small pages in batches, and miscounts: once a step inside the call had to be tried again (another
//! thread was just splitting the same huge page), the next batch is moved but not counted, and the call goes on to
//! answer EEXIST for a page that it has itself put there, or EAGAIN with too small a number. Whoever believes it takes
//! a moved page for one that is still in its place. So the answer to an incomplete move is checked against the page
//! tables: one side of every move is staging, which nobody else touches meanwhile.

use super::scan::Pagemap;
use super::uffd::Partial;
use peerspace_core::addr::{Va, VaRange};
use rustix::io::Errno;

/// What a page was moved between, for [`recount`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Sides {
    /// Where the pages were.
    pub(super) from: VaRange,
    /// Where they go.
    pub(super) to: VaRange,
}

/// Corrects the answer to a move that did not come to its end: counts also the pages that were moved after the last
/// one that the kernel counted. `moved` tells of a pair of pages (source, destination) whether it was moved.
fn recount(sides: Sides, page: u64, answer: Partial, moved: impl Fn(Va, Va) -> Result<bool, Errno>) -> Partial {
    let (mut bytes, Some(error)) = answer else { return answer };
    // Else nothing was done, for the reason given, and there is no need to look.
    if bytes == 0 && error != Errno::EXIST {
        return answer;
    }
    let len = sides.from.len();
    while bytes < len {
        match moved(Va(sides.from.start.0 + bytes), Va(sides.to.start.0 + bytes)) {
            Ok(true) => bytes += page,
            // Without the page tables the kernel's word is all there is.
            Ok(false) | Err(_) => break,
        }
    }
    (bytes, (bytes < len).then_some(error))
}

impl Sides {
    /// Corrects the answer to a move to staging. A slot was empty before.
    pub(super) fn taken(self, pagemap: &Pagemap, page: u64, answer: Partial) -> Partial {
        recount(self, page, answer, |from, to| Ok(pagemap.is_present(to)? && !pagemap.is_present(from)?))
    }

    /// Corrects the answer to a move from staging. What is not there any more was moved, whatever the program did with
    /// it since.
    pub(super) fn returned(self, pagemap: &Pagemap, page: u64, answer: Partial) -> Partial {
        recount(self, page, answer, |from, _| Ok(!pagemap.is_present(from)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn sides(pages: u64) -> Sides {
        let range = |start: u64| VaRange { start: Va(start), end: Va(start + pages * PAGE) };
        Sides { from: range(1 << 20), to: range(2 << 20) }
    }

    fn with(answer: Partial, really: u64) -> Partial {
        recount(sides(4), PAGE, answer, |from, to| {
            assert_eq!(to.0 - from.0, 1 << 20);
            Ok((from.0 - (1 << 20)) / PAGE < really)
        })
    }

    #[test]
    fn pages_that_the_kernel_forgot_are_counted() {
        assert_eq!(with((0, Some(Errno::EXIST)), 0), (0, Some(Errno::EXIST)));
        assert_eq!(with((0, Some(Errno::EXIST)), 3), (3 * PAGE, Some(Errno::EXIST)));
        assert_eq!(with((PAGE, Some(Errno::AGAIN)), 2), (2 * PAGE, Some(Errno::AGAIN)));
        assert_eq!(with((0, Some(Errno::EXIST)), 4), (4 * PAGE, None));
        assert_eq!(with((4 * PAGE, None), 0), (4 * PAGE, None));
        assert_eq!(with((0, Some(Errno::AGAIN)), 2), (0, Some(Errno::AGAIN)));
    }

    #[test]
    fn unreadable_page_tables_change_nothing() {
        let answer = recount(sides(4), PAGE, (PAGE, Some(Errno::EXIST)), |_, _| Err(Errno::IO));
        assert_eq!(answer, (PAGE, Some(Errno::EXIST)));
    }
}
