//! One access to one page, and what there has to be.

use super::actor::{Actor, Trouble};
use super::memory::{ADOPTED, AREAS, Area, OWNED, SUM, counted, filling, read, write};
use super::world::World;
use super::{Random, WORDS};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;

/// Pages at the beginning of an area that all use at once; of one area after the other.
const HOT: usize = 3;

impl World {
    /// One of a few pages that all use just now.
    fn hot(&self, random: &mut Random) -> (usize, usize) {
        ((self.steps.load(SeqCst) >> 12) as usize % AREAS.len(), random.next(HOT))
    }

    /// Accesses a page somewhere, most often near `focus`; by writer number `me`.
    pub(super) fn step(
        &self,
        actor: &Actor,
        me: usize,
        random: &mut Random,
        focus: &mut (usize, usize),
    ) -> Result<(), Trouble> {
        if random.next(12) == 0 {
            focus.0 = random.next(AREAS.len());
            focus.1 = random.next(AREAS[focus.0]);
        }
        let (area, near) = *focus;
        let (area, page) = match random.next(4) {
            0 => self.hot(random),
            // In order, or near by.
            1 => {
                focus.1 = (near + 1) % AREAS[area];
                (area, near)
            }
            _ => (area, (near + random.next(8)) % AREAS[area]),
        };
        self.use_page(actor, me, random, area, page)
    }

    /// Writes to a page that all use: its own word, as writer number `me`.
    pub(super) fn write_hot(&self, actor: &Actor, me: usize, random: &mut Random) -> Result<(), Trouble> {
        let (area, page) = self.hot(random);
        self.at(area, page, || {
            let _alone = read(&self.areas[area].pages[page].filling);
            self.count_up(actor, me, area, page)
        })
    }

    /// Accesses a page, by writer number `me`.
    pub(super) fn use_page(
        &self,
        actor: &Actor,
        me: usize,
        random: &mut Random,
        area: usize,
        page: usize,
    ) -> Result<(), Trouble> {
        self.at(area, page, || self.access(actor, me, random, area, page))
    }

    /// Does `act`, which accesses a page, and buries it if it is lost.
    fn at(&self, area: usize, page: usize, act: impl FnOnce() -> Result<(), Trouble>) -> Result<(), Trouble> {
        self.steps.fetch_add(1, SeqCst);
        let _managed = (area == ADOPTED).then(|| read(&self.areas[area].adopted));
        match act() {
            Err(Trouble::Lost) => {
                self.bury(area, page);
                Ok(())
            }
            done => done,
        }
    }

    /// One access to one page, by writer number `me`.
    fn access(&self, actor: &Actor, me: usize, random: &mut Random, area: usize, page: usize) -> Result<(), Trouble> {
        let at = &self.areas[area];
        let known = &at.pages[page];
        let kind = random.next(20);
        if kind == 0 {
            return self.fill(actor, area, page);
        }
        let number = read(&known.filling);
        let here = |k: usize| at.va(page, Area::place(page, k));
        match kind {
            1..8 => self.count_up(actor, me, area, page)?,
            8..11 => self.look(actor, me, area, page, random.next(OWNED))?,
            11 | 12 => (0..OWNED).try_for_each(|k| self.look(actor, me, area, page, k))?,
            13 | 14 => {
                let sum = &known.words[SUM];
                sum.begun.fetch_add(1, SeqCst);
                match actor.add(self, area, here(SUM)) {
                    Ok(()) => sum.done.fetch_add(1, SeqCst),
                    Err(e) => {
                        sum.begun.fetch_sub(1, SeqCst);
                        return Err(e);
                    }
                };
            }
            15 => {
                let sum = &known.words[SUM];
                let done = sum.done.load(SeqCst) as u64;
                let seen = actor.load(self, area, here(SUM))?;
                let begun = sum.begun.load(SeqCst) as u64;
                assert!((done..=begun).contains(&seen), "reader {me} sees a sum of {seen}, of {done} to {begun}");
            }
            16 | 17 => {
                let i = random.next(WORDS);
                if (0..=SUM).all(|k| Area::place(page, k) != i) {
                    let seen = actor.load(self, area, at.va(page, i))?;
                    let expected = filling(area, page, i, *number);
                    assert_eq!(
                        seen, expected,
                        "reader {me}, word {i} of page {page} of area {area}, filling {number}"
                    );
                }
            }
            _ => {
                let words = actor.read_page(self, area, at.va(page, 0))?;
                self.check_filling(area, page, &words, *number);
            }
        }
        Ok(())
    }

    /// Counts up the word of writer number `me`, who knows what is there.
    fn count_up(&self, actor: &Actor, me: usize, area: usize, page: usize) -> Result<(), Trouble> {
        let (here, word) =
            (self.areas[area].va(page, Area::place(page, me)), &self.areas[area].pages[page].words[me]);
        let (done, begun) = (word.done.load(SeqCst), word.begun.load(SeqCst));
        let seen = actor.load(self, area, here)?;
        assert!(
            (done..=begun).any(|n| seen == counted(area, page, me, n)),
            "writer {me} reads {seen:#x} in page {page} of area {area}, and has written {done} to {begun}"
        );
        word.begun.store(begun + 1, SeqCst);
        actor.store(self, area, here, counted(area, page, me, begun + 1))?;
        word.done.store(begun + 1, SeqCst);
        Ok(())
    }

    /// Reads the word of writer number `k`.
    fn look(&self, actor: &Actor, me: usize, area: usize, page: usize, k: usize) -> Result<(), Trouble> {
        let word = &self.areas[area].pages[page].words[k];
        let done = word.done.load(SeqCst);
        let seen = actor.load(self, area, self.areas[area].va(page, Area::place(page, k)))?;
        let begun = word.begun.load(SeqCst);
        let count = seen as u32;
        assert!(
            seen == counted(area, page, k, count) && (done..=begun).contains(&count),
            "reader {me} sees {seen:#x} in word {k} of page {page} of area {area}, where {done} to {begun} are written"
        );
        Ok(())
    }

    pub(super) fn check_filling(&self, area: usize, page: usize, words: &[u64], number: u64) {
        let counted: BTreeSet<usize> = (0..=SUM).map(|k| Area::place(page, k)).collect();
        for (i, w) in words.iter().enumerate().filter(|(i, _)| !counted.contains(i)) {
            let expected = filling(area, page, i, number);
            assert_eq!(*w, expected, "word {i} of page {page} of area {area}, filling {number}");
        }
    }

    /// Checks the words that are counted up, of a page that nobody writes to.
    pub(super) fn check_counted(&self, area: usize, page: usize, words: &[u64]) {
        let known = &self.areas[area].pages[page];
        for (k, word) in known.words.iter().enumerate() {
            let (done, begun) = (word.done.load(SeqCst), word.begun.load(SeqCst));
            let seen = words[Area::place(page, k)];
            let good = if k == SUM {
                seen == done as u64
            } else {
                (done..=begun).any(|n| seen == counted(area, page, k, n))
            };
            assert!(good, "word {k} of page {page} of area {area} is {seen:#x}, of {done} to {begun}");
        }
    }

    /// Gives a page another filling, alone with it.
    fn fill(&self, actor: &Actor, area: usize, page: usize) -> Result<(), Trouble> {
        let at = &self.areas[area];
        let known = &at.pages[page];
        let mut number = write(&known.filling);
        let mut words = actor.read_page(self, area, at.va(page, 0))?;
        self.check_filling(area, page, &words, *number);
        self.check_counted(area, page, &words);
        let next = self.fillings.fetch_add(1, SeqCst);
        for (i, w) in words.iter_mut().enumerate() {
            if (0..=SUM).all(|k| Area::place(page, k) != i) {
                *w = filling(area, page, i, next);
            }
        }
        actor.write_page(self, area, at.va(page, 0), &words)?;
        *number = next;
        Ok(())
    }
}
