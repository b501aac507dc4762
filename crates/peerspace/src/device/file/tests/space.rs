//! When space is returned, and how much of it is kept for a while.

use super::*;
use std::sync::Arc;

/// The holes that are punched, in pages.
fn watch(d: &Disk<Faulty>) -> Arc<Mutex<Vec<(u64, u64)>>> {
    let holes = Arc::new(Mutex::new(Vec::new()));
    let (note, page) = (holes.clone(), page_bytes() as u64);
    d.raw.before_punch(move |at, len| {
        note.lock().unwrap().push((at / page - 1, len / page));
        Ok(())
    });
    holes
}

#[test]
fn freeing_is_cheap_until_there_is_much_of_it() {
    let pages = 64 * 512;
    let d = disk(pages, true);
    let holes = watch(&d);
    for block in 0..64 {
        store(&d, block * 512, 512, 1).unwrap();
    }
    let allowance = d.allowance();
    free(&d, 0, allowance / 2);
    assert_eq!(holes.lock().unwrap().len(), 0);
    // As more and more is freed, most of it is returned, in whole groups.
    for block in 0..60 {
        free(&d, block * 512, 512);
    }
    let returned: u64 = holes.lock().unwrap().iter().map(|(_, n)| n).sum();
    let garbage = d.garbage.load(Relaxed);
    assert_eq!(returned + garbage, 60 * 512);
    assert!(garbage <= d.allowance() + 512, "{garbage} pages of garbage, {} allowed", d.allowance());
    assert!(holes.lock().unwrap().iter().all(|(first, n)| first % 512 == 0 && *n == 512));
    d.trim();
    assert_eq!(d.garbage.load(Relaxed), 0);
    for block in 60..64 {
        assert_eq!(load(&d, block * 512, 512, 1), Ok(()));
    }
}

#[test]
fn scattered_pages_are_returned_in_runs() {
    let d = disk(4096, true);
    let holes = watch(&d);
    store(&d, 0, 1024, 1).unwrap();
    // Runs that touch, in any order, and one page on its own.
    for page in (100..140).rev().chain(140..160).chain([700]) {
        free(&d, page, 1);
    }
    d.trim();
    let mut seen = holes.lock().unwrap().clone();
    seen.sort();
    // What lies behind was never stored, and may be part of a hole.
    assert_eq!(seen, [(100, 60), (700, 1)]);
    holes.lock().unwrap().clear();
    // A page that is stored again is not punched.
    free(&d, 200, 30);
    store(&d, 210, 5, 2).unwrap();
    d.trim();
    assert_eq!(*holes.lock().unwrap(), [(200, 10), (215, 15)]);
    assert_eq!(load(&d, 210, 5, 2), Ok(()));
}

#[test]
fn a_hole_that_fails_is_tried_again() {
    let d = disk(4096, true);
    store(&d, 0, 1024, 1).unwrap();
    d.raw.before_punch(|_, _| Err(Errno::IO));
    free(&d, 0, 700);
    d.trim();
    assert_eq!(d.garbage.load(Relaxed), 700);
    store(&d, 300, 1, 2).unwrap();
    d.raw.before_punch(|_, _| Ok(()));
    d.trim();
    assert_eq!(d.garbage.load(Relaxed), 0);
    assert_eq!((load(&d, 300, 1, 2), load(&d, 700, 324, 1)), (Ok(()), Ok(())));
}

#[test]
fn the_accounts_add_up() {
    let d = disk(4096, true);
    let page = page_bytes() as u64;
    store(&d, 0, 1000, 1).unwrap();
    store(&d, 0, 500, 2).unwrap();
    assert_eq!((d.usage().used_bytes, d.usage().peak_bytes), (1000 * page, 1000 * page));
    free(&d, 0, 1000);
    d.trim();
    assert_eq!((d.usage().used_bytes, d.usage().peak_bytes), (0, 1000 * page));
}
