//! Each way in which a file can fail, once: what is reported, and for which transfers (Z9, G16).

use super::*;

const IO: Result<(), DeviceError> = Err(DeviceError::Io(5));

#[test]
fn short_transfers_are_continued() {
    for direct in [false, true] {
        let d = disk(2048, direct);
        let page = page_bytes();
        // Short by less than a page, by whole pages, by nearly all; again and again.
        let shorts = [page, 1, page * 3 + 7, 100, page * 200, 0, 0, page, 5].map(Fault::Short);
        d.raw.schedule(shorts);
        assert_eq!(store(&d, 512, 512, 1), Ok(()));
        d.raw.schedule(shorts);
        assert_eq!(load(&d, 512, 512, 1), Ok(()));
        d.raw.schedule(shorts);
        assert_eq!(load(&d, 700, 1, 1), Ok(()));
    }
}

#[test]
fn what_is_stuck_is_short() {
    let d = disk(64, true);
    let page = page_bytes();
    let stuck = page * 2 + 100;
    store(&d, 0, 8, 1).unwrap();
    d.raw.decide(move |r| Fault::Short(stuck.saturating_sub(r.at as usize - page)));
    // A page that came in part is asked for again as a whole, and does not come either.
    assert_eq!(load(&d, 0, 8, 1), Err(DeviceError::Short { got: stuck, wanted: page * 8 }));
    assert_eq!(load(&d, 0, 2, 1), Ok(()));
    assert_eq!(store(&d, 0, 8, 2), Err(DeviceError::Short { got: stuck, wanted: page * 8 }));
    d.raw.schedule([]);
    // After an error a page holds nothing.
    assert!(load(&d, 0, 1, 1).is_err() && load(&d, 0, 1, 2).is_err());
}

#[test]
fn interruptions_are_retried_but_not_for_ever() {
    for errno in [Errno::INTR, Errno::AGAIN] {
        let d = disk(64, true);
        d.raw.schedule([Fault::Error(errno); 5]);
        assert_eq!(store(&d, 3, 1, 1), Ok(()));
        d.raw.schedule([Fault::Error(errno); 5]);
        assert_eq!(load(&d, 3, 1, 1), Ok(()));
        let before = d.raw.requests.load(Relaxed);
        d.raw.decide(move |_| Fault::Error(errno));
        assert_eq!(load(&d, 3, 1, 1), Err(DeviceError::Io(errno.raw_os_error())));
        assert!(d.raw.requests.load(Relaxed) - before < 100);
    }
}

#[test]
fn an_error_is_reported_for_its_transfer_alone() {
    let d = disk(2048, true);
    // Neighbours, which are one request, and others; in no order.
    let pages = [40u64, 8, 9, 10, 11, 700, 41, 300];
    let bytes: Vec<_> = pages.iter().map(|p| contents(*p, 1, 1)).collect();
    let batch = || pages.iter().zip(&bytes).map(|(p, b)| Store::new(*p, b)).collect::<Vec<_>>();
    let bad = |page: u64, write: bool| {
        let at = (page + 1) * page_bytes() as u64;
        move |r: Request| {
            let hit = r.write == write && (r.at..r.at + r.len as u64).contains(&at);
            if hit { Fault::Error(Errno::IO) } else { Fault::None }
        }
    };
    d.raw.decide(bad(10, true));
    let mut stores = batch();
    d.store(&mut stores);
    for s in &stores {
        assert_eq!(s.result, if s.page == 10 { IO } else { Ok(()) }, "page {}", s.page);
    }
    d.raw.schedule([]);
    assert!(load(&d, 10, 1, 1).is_err());
    assert_eq!(store(&d, 10, 1, 1), Ok(()));

    d.raw.decide(bad(9, false));
    let mut buffers: Vec<_> = pages.iter().map(|_| Buffer::new(page_bytes())).collect();
    let mut loads: Vec<_> = pages.iter().zip(&mut buffers).map(|(p, b)| Load::new(*p, b)).collect();
    d.load(&mut loads);
    for l in &loads {
        assert_eq!(l.result, if l.page == 9 { IO } else { Ok(()) }, "page {}", l.page);
        assert!(l.page == 9 || *l.bytes == content(l.page, 1));
    }
    // It was the transfer that failed, not the page.
    d.raw.schedule([]);
    assert_eq!(load(&d, 9, 1, 1), Ok(()));
}

#[test]
fn neighbours_are_one_request() {
    let d = disk(2048, true);
    let bytes: Vec<_> = (0..16).map(|p| contents(p, 1, 1)).collect();
    let mut batch: Vec<_> = (0..16u64).rev().map(|p| Store::new(p, &bytes[p as usize])).collect();
    d.store(&mut batch);
    assert!(batch.iter().all(|s| s.result.is_ok()));
    assert_eq!(d.raw.requests.load(Relaxed), 1);
    assert_eq!(load(&d, 0, 16, 1), Ok(()));
    assert_eq!(store(&d, 512, 512, 1), Ok(()));
    assert_eq!(load(&d, 512, 512, 1), Ok(()));
    assert_eq!(d.raw.requests.load(Relaxed), 4);
}

#[test]
fn a_page_that_changed_on_disk_is_an_error() {
    let d = disk(2048, true);
    store(&d, 0, 4, 1).unwrap();
    store(&d, 512, 512, 1).unwrap();
    d.raw.schedule([Fault::Corrupt]);
    assert_eq!(load(&d, 2, 1, 1), Err(DeviceError::Corrupt));
    assert_eq!(load(&d, 2, 1, 1), Ok(()));
    d.raw.schedule([Fault::Corrupt]);
    assert_eq!(load(&d, 512, 512, 1), Err(DeviceError::Corrupt));
    // Of several transfers, exactly the one that is wrong.
    let mut buffers = [(); 3].map(|()| Buffer::new(page_bytes()));
    let mut batch: Vec<_> = [600u64, 0, 700].iter().zip(&mut buffers).map(|(p, b)| Load::new(*p, b)).collect();
    d.raw.schedule([Fault::Corrupt]); // the first in the order of the file
    d.load(&mut batch);
    let results: Vec<_> = batch.iter().map(|l| (l.page, l.result.clone())).collect();
    assert_eq!(results, [(600, Ok(())), (0, Err(DeviceError::Corrupt)), (700, Ok(()))]);
    // Bytes on the disk itself that somebody else wrote.
    let files = d.files.read();
    let file = files.file(super::super::record::Slot(0)).unwrap();
    rustix::io::pwrite(file, &contents(99, 1, 1), d.layout.offset(3)).unwrap();
    drop(files);
    assert_eq!(load(&d, 3, 1, 1), Err(DeviceError::Corrupt));
    assert_eq!(load(&d, 0, 4, 1), Err(DeviceError::Corrupt));
    assert_eq!(load(&d, 0, 3, 1), Ok(()));
}

#[test]
fn what_was_never_stored_cannot_be_loaded() {
    let d = disk(64, true);
    let nothing = Err(DeviceError::Io(Errno::NODATA.raw_os_error()));
    assert_eq!(load(&d, 5, 1, 0), nothing);
    store(&d, 4, 1, 1).unwrap();
    assert_eq!(load(&d, 4, 2, 1), nothing);
    free(&d, 4, 1);
    assert_eq!(load(&d, 4, 1, 1), nothing);
}

#[test]
fn transfers_beyond_the_end_are_refused() {
    let d = disk(64, true);
    let invalid = Err(DeviceError::Io(Errno::INVAL.raw_os_error()));
    assert_eq!(store(&d, 63, 2, 1), invalid);
    assert_eq!(store(&d, u64::MAX - 5, 1, 1), invalid);
    assert_eq!(load(&d, 64, 1, 1), invalid);
    let bytes = contents(0, 1, 1);
    let mut batch = [Store::new(0, &bytes[..100]), Store::new(1, &bytes[..0]), Store::new(0, &bytes)];
    d.store(&mut batch);
    assert_eq!(batch.map(|s| s.result), [invalid.clone(), invalid, Ok(())]);
    free(&d, 60, u64::MAX);
    free(&d, u64::MAX, 5);
    assert_eq!(load(&d, 0, 1, 1), Ok(()));
}

#[test]
fn buffers_need_not_be_aligned() {
    for direct in [true, false] {
        let d = disk(1024, direct);
        let (pages, len) = (300, 300 * page_bytes());
        let mut from = Buffer::off(len, 24);
        from.copy_from_slice(&contents(100, pages, 1));
        let aligned = contents(7, 1, 1);
        let mut batch = [Store::new(100, &from), Store::new(7, &aligned)];
        d.store(&mut batch);
        assert!(batch.iter().all(|s| s.result.is_ok()));
        assert_eq!(load(&d, 100, pages, 1), Ok(()));
        let mut to = Buffer::off(len, 1);
        let mut batch = [Load::new(100, &mut to)];
        d.load(&mut batch);
        assert_eq!(batch[0].result, Ok(()));
        assert!(*to == *from);
        // Errors are as for other buffers.
        d.raw.schedule([Fault::Error(Errno::IO)]);
        let mut batch = [Load::new(100, &mut to[..page_bytes()])];
        d.load(&mut batch);
        assert_eq!(batch[0].result, IO);
    }
}

#[test]
fn no_space_is_said_so_and_nothing_else_is_lost() {
    let d = disk(2048, true);
    store(&d, 0, 100, 1).unwrap();
    d.raw.decide(|r| if r.write { Fault::Error(Errno::NOSPC) } else { Fault::None });
    assert_eq!(store(&d, 512, 512, 1), Err(DeviceError::NoSpace));
    assert_eq!(load(&d, 0, 100, 1), Ok(()));
    free(&d, 512, 512); // as the engine does
    d.raw.schedule([]);
    assert_eq!(store(&d, 512, 512, 2), Ok(()));
    assert_eq!(load(&d, 512, 512, 2), Ok(()));
    assert_eq!(d.usage().used_bytes, 612 * page_bytes() as u64);
}

#[test]
fn garbage_makes_room_on_a_full_disk() {
    let d = disk(4096, true);
    store(&d, 0, 2048, 1).unwrap();
    free(&d, 100, 300);
    // Full, until a hole is punched.
    let room = std::sync::Arc::new(AtomicU64::new(0));
    let (more, less) = (room.clone(), room.clone());
    d.raw.before_punch(move |_, len| {
        more.fetch_add(len, Relaxed);
        Ok(())
    });
    d.raw.decide(move |r| if r.write && less.load(Relaxed) == 0 { Fault::Error(Errno::NOSPC) } else { Fault::None });
    assert_eq!(store(&d, 3000, 5, 1), Ok(()));
    assert_eq!(room.load(Relaxed), 300 * page_bytes() as u64);
    assert_eq!((load(&d, 3000, 5, 1), load(&d, 0, 100, 1), load(&d, 400, 1648, 1)), (Ok(()), Ok(()), Ok(())));
}

#[test]
fn without_holes_space_is_reused() {
    let d = disk(4096, true);
    d.raw.before_punch(|_, _| Err(Errno::OPNOTSUPP));
    for version in 0..3 {
        store(&d, 0, 4096, version).unwrap();
        assert_eq!(load(&d, 0, 4096, version), Ok(()));
        free(&d, 0, 4096);
        d.trim();
    }
    assert!(!d.punches.load(Relaxed));
    // It takes up what it took up.
    assert_eq!(d.usage().used_bytes, 4096 * page_bytes() as u64);
}
