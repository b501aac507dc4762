//! What files take up on disk, seen from outside; and full disks.

use super::*;
use std::fs;
use std::os::unix::fs::MetadataExt;

fn bytes_on_disk(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn the_space_of_freed_pages_is_returned() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let size = 128 << 20;
    let blocks = 48;
    let bytes = |pages: u64| pages * page() as u64;
    if bytes(blocks * 512) > size {
        return eprintln!("skipped: pages are too large for this test");
    }
    let file = File::open(&path, Some(size)).unwrap();
    if file.diagnostics().returns_space.is_err() {
        return eprintln!("skipped: {}", file.diagnostics());
    }
    assert!(bytes_on_disk(&path) < 64 << 10);
    for block in 0..blocks {
        store(&file, block * 512, 512, 1).unwrap();
    }
    let full = bytes_on_disk(&path);
    assert!(full >= bytes(blocks * 512) && full < bytes(blocks * 512) + (1 << 20), "{full}");
    // Without being asked: down to the allowance.
    for block in 0..blocks - 2 {
        free(&file, block * 512, 512);
    }
    let some = bytes_on_disk(&path);
    assert!(some < full / 2, "{some} of {full} bytes are left");
    file.trim();
    let little = bytes_on_disk(&path);
    assert!(little < bytes(2 * 512) + (1 << 20), "{little} bytes for {}", bytes(2 * 512));
    // Single pages, all over the place.
    for p in (0..1024).step_by(2) {
        free(&file, (blocks - 2) * 512 + p, 1);
    }
    file.trim();
    let less = bytes_on_disk(&path);
    assert!(less < little - bytes(400), "{less} of {little} bytes are left");
    for p in (1..1024).step_by(2) {
        assert_eq!(load(&file, (blocks - 2) * 512 + p, 1, 1), Ok(()));
    }
}

/// Stores until the disk is full; what was stored stays; what is freed makes room again.
fn fill(at: &Path, size: u64) {
    let file = File::open(at, Some(size)).unwrap();
    let pages = file.describe().pages.0;
    let mut stored = Vec::new();
    let mut full = 0;
    for block in 0..pages / 512 {
        match store(&file, block * 512, 512, 1) {
            Ok(()) => stored.extend((0..512).map(|i| block * 512 + i)),
            Err(DeviceError::NoSpace) => {
                full += 1;
                // As the engine does: in pieces, perhaps.
                free(&file, block * 512, 512);
                for p in block * 512..(block + 1) * 512 {
                    match store(&file, p, 1, 1) {
                        Ok(()) => stored.push(p),
                        Err(DeviceError::NoSpace) => {
                            full += 1;
                            free(&file, p, 1);
                        }
                        Err(e) => panic!("page {p}: {e}"),
                    }
                    if full > 20 {
                        break;
                    }
                }
            }
            Err(e) => panic!("block {block}: {e}"),
        }
        if full > 20 {
            break;
        }
    }
    assert!(full > 20, "the disk never became full");
    assert!(stored.len() > 100);
    for p in &stored {
        assert_eq!(load(&file, *p, 1, 1), Ok(()), "page {p}");
    }
    // Room is made by what is freed, although nobody asked for it to be returned.
    for p in &stored[..64] {
        free(&file, *p, 1);
    }
    let mut again = 0;
    for p in (pages - 200..pages).take(48) {
        again += store(&file, p, 1, 2).is_ok() as u64;
    }
    assert!(again >= 32, "only {again} pages of 64 that were freed could be used again");
    for p in &stored[64..] {
        assert_eq!(load(&file, *p, 1, 1), Ok(()), "page {p}");
    }
}

#[test]
fn a_full_tmpfs_loses_nothing() {
    let _alone = alone();
    mounted(Mount::Tmpfs("size=5m"), |at| fill(at, 64 << 20));
}

#[test]
fn a_full_disk_loses_nothing() {
    let _alone = alone();
    mounted(Mount::Ext4(12), |at| fill(at, 64 << 20));
}

#[test]
fn a_full_disk_loses_nothing_in_a_batch() {
    let _alone = alone();
    mounted(Mount::Ext4(12), |at| {
        let file = File::open(at, Some(64 << 20)).unwrap();
        let mut ok = Vec::new();
        let mut failed = 0;
        for start in (0..file.describe().pages.0 - 64 * 3).step_by(64 * 3) {
            let pages: Vec<u64> = (0..64).map(|i| start + i * 3).collect();
            let buffers: Vec<_> = pages.iter().map(|p| contents(*p, 1, 4)).collect();
            let mut batch: Vec<_> = pages.iter().zip(&buffers).map(|(p, b)| Store::new(*p, b)).collect();
            file.store(&mut batch);
            for s in &batch {
                match &s.result {
                    Ok(()) => ok.push(s.page),
                    Err(DeviceError::NoSpace) => {
                        failed += 1;
                        free(&file, s.page, 1);
                    }
                    Err(e) => panic!("page {}: {e}", s.page),
                }
            }
            if failed > 100 {
                break;
            }
        }
        assert!(failed > 100 && ok.len() > 500);
        ok.chunks(64).for_each(|pages| load_each(&file, pages, 4));
    });
}
