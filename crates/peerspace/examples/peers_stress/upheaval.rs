//! What concerns many pages at once: discards, pins, migrations, hints, and memory that is given back.

use super::memory::{ADOPTED, AREAS, discard, read, write};
use super::world::World;
use super::{PAGE, Random, WORDS};
use peerspace::{Error, Hint, Node, Use};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

impl World {
    /// Something that concerns many pages, by a thread of the CPU.
    pub(super) fn upheaval(&self, random: &mut Random) {
        let area = random.next(AREAS.len());
        let at = &self.areas[area];
        let page = random.next(at.pages.len());
        let most = if random.next(4) == 0 { 600 } else { 8 };
        let count = 1 + random.next((at.pages.len() - page).min(most));
        let bytes = page * PAGE..(page + count) * PAGE;
        let _managed = (area == ADOPTED).then(|| read(&at.adopted));
        let region = at.region.as_ref().map(|r| read(r));
        match (random.next(9), region) {
            (0, region) => {
                drop(region);
                let count = count.min(24);
                let mut alone: Vec<_> = at.pages[page..page + count].iter().map(|p| (p, write(&p.filling))).collect();
                match &at.region {
                    Some(region) => {
                        let part = page * PAGE..(page + count) * PAGE;
                        write(region).discard(part).expect("discard");
                    }
                    None => discard(at.va(page, 0), count * PAGE),
                }
                alone.iter_mut().for_each(|(known, filling)| known.forget(filling));
            }
            (1, region) => {
                drop(region);
                let (start, how) = (at.va(page, 0), if random.next(2) == 0 { Use::Read } else { Use::Write });
                match self.space.make_resident(start as *const u8, count.min(64) * PAGE, how) {
                    Ok(held) => {
                        std::thread::sleep(Duration::from_micros(random.next(300) as u64));
                        drop(held);
                    }
                    Err(Error::Lost { .. } | Error::TooManyPinned { .. }) => {}
                    Err(e) => panic!("pin: {e}"),
                }
            }
            (2 | 3, Some(region)) => drop(region.cold(bytes).expect("set aside")),
            (4, Some(region)) => drop(region.collapse(bytes).expect("collapse")),
            // What is lost says so; what has no room stays.
            (5, Some(region)) if area == 0 => drop(region.migrate_to(bytes, self.dax)),
            (6, Some(region)) => drop(region.migrate_home(bytes)),
            (7, Some(region)) => {
                let devices = self.space.devices();
                let to = match random.next(4) {
                    0 => Node::Host,
                    n => Node::Device(devices[n]),
                };
                if let Ok(under_way) = region.prefetch(bytes, to)
                    && random.next(2) == 0
                {
                    drop(under_way.wait());
                }
            }
            (8, Some(region)) if area < 2 => {
                let hints = [
                    Hint::ReadMostly(random.next(3) == 0),
                    Hint::Prefer(if random.next(2) == 0 { Some(Node::Host) } else { None }),
                    Hint::AccessedBy(self.space.devices()[3], random.next(2) == 0),
                ];
                region.advise(hints[random.next(hints.len())]).expect("a hint");
            }
            _ => {}
        }
    }

    pub(super) fn give_back_and_adopt(&self) {
        let area = &self.areas[ADOPTED];
        let mut adopted = write(&area.adopted);
        adopted.take().expect("adopted").release().expect("give back");
        let known = &area.pages[3];
        // SAFETY: as elsewhere.
        let words = (0..WORDS).map(|i| unsafe { (*(area.va(3, i) as *const AtomicU64)).load(SeqCst) });
        self.check_filling(ADOPTED, 3, &words.collect::<Vec<_>>(), *read(&known.filling));
        *adopted = Some(self.space.adopt(area.start as *const u8, AREAS[ADOPTED] * PAGE).expect("adopt again"));
    }
}
