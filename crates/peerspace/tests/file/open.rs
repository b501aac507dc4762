//! Which paths can be opened, and what is said of the others.

use super::*;
use peerspace::device::file::FileError;
use std::fs;
use std::os::unix::fs::MetadataExt;

fn least() -> u64 {
    2 * page() as u64
}

/// Works as a device should.
fn works(file: &File) {
    for version in 0..2 {
        store(file, 0, 1, version).unwrap();
        store(file, 5, 3, version).unwrap();
        assert_eq!((load(file, 0, 1, version), load(file, 5, 3, version)), (Ok(()), Ok(())));
    }
}

#[test]
fn a_directory_gets_a_file_that_nobody_sees() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let file = File::open(dir.path(), Some(1 << 20)).unwrap();
    works(&file);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let d = file.describe();
    assert_eq!((d.capacity_bytes, d.pages.0), (1 << 20, (1 << 20) / page() as u64 - 1));
    assert!(d.slow && !d.compares && d.name == format!("file:{}", dir.path().display()));
    // Any number of them, each its own.
    let other = File::open(dir.path(), Some(1 << 20)).unwrap();
    store(&other, 0, 1, 77).unwrap();
    assert_eq!((load(&file, 0, 1, 1), load(&other, 0, 1, 77)), (Ok(()), Ok(())));
    eprintln!("{}", file.diagnostics());
}

#[test]
fn a_file_is_made_kept_and_used_again() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let file = File::open(&path, Some(1 << 20)).unwrap();
    works(&file);
    drop(file);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert!(fs::read(&path).unwrap().starts_with(b"peerspace-pages\n"));
    // Larger, and smaller.
    for size in [4 << 20, 1 << 16] {
        let file = File::open(&path, Some(size)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), size);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 64 << 10, "it was not emptied");
        assert!(load(&file, 0, 1, 1).is_err(), "a page from another life");
        works(&file);
    }
    // An empty file is as good.
    fs::write(&path, b"").unwrap();
    works(&File::open(&path, Some(1 << 20)).unwrap());
    // And so is another name for it.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    works(&File::open(&link, Some(1 << 20)).unwrap());
}

#[test]
fn foreign_content_is_refused_and_left_alone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    drop(File::open(&path, Some(least())).unwrap());
    let good = fs::read(&path).unwrap();
    let mut wrong_sum = good.clone();
    wrong_sum[25] ^= 1;
    let mut newer = good.clone();
    newer[16] = 9;
    let cases: [(Vec<u8>, &str); 5] = [
        (b"precious".to_vec(), "a file of 8 bytes that begins with \"precious\""),
        (vec![0; 100_000], "a file of 100000 bytes that begins with \"................\""),
        (good[..40].to_vec(), "a file of 40 bytes that begins with \"peerspace-pages.\""),
        (wrong_sum, "wrong checksum"),
        (newer, "version 9"),
    ];
    for (content, what) in cases {
        fs::write(&path, &content).unwrap();
        let Err(FileError::Foreign { found, expected, .. }) = File::open(&path, Some(1 << 20)) else {
            panic!("{what}: not refused");
        };
        assert!(found.contains(what), "{found:?} does not say {what:?}");
        assert!(expected.contains("peerspace-pages"), "{expected}");
        assert!(fs::read(&path).unwrap() == content, "{what}: it was changed");
    }
}

#[test]
fn a_file_in_use_is_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let file = File::open(&path, Some(1 << 20)).unwrap();
    works(&file);
    assert_eq!(File::open(&path, Some(1 << 20)).unwrap_err(), FileError::InUse { path: path.clone() });
    assert_eq!(load(&file, 0, 1, 1), Ok(()));
    drop(file);
    works(&File::open(&path, Some(1 << 20)).unwrap());
}

#[test]
fn only_files_and_directories_will_do() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, what) in
        [(fifo.as_path(), "a named pipe"), (&socket, "a socket"), (Path::new("/dev/null"), "a character device")]
    {
        match File::open(path, Some(1 << 20)) {
            Err(FileError::NotRegular { found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn what_is_not_there_is_named() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let missing = |path: &Path| match File::open(path, Some(1 << 20)) {
        Err(FileError::MissingDirectory { path }) => path,
        other => panic!("{}: {other:?}", path.display()),
    };
    assert_eq!(missing(&dir.path().join("no/pages")), dir.path().join("no"));
    assert_eq!(missing(&dir.path().join("no/")), dir.path().join("no/"));
    fs::write(dir.path().join("plain"), b"").unwrap();
    assert_eq!(missing(&dir.path().join("plain/pages")), dir.path().join("plain"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn sizes_have_bounds() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    for given in [0, 1, least() - 1] {
        let e = File::open(&path, Some(given)).unwrap_err();
        assert_eq!(e, FileError::TooSmall { given, least: least() });
        assert!(e.to_string().contains(&least().to_string()));
    }
    for given in [u64::MAX, 1 << 63, i64::MAX as u64] {
        let e = File::open(&path, Some(given)).unwrap_err();
        assert!(matches!(e, FileError::TooLarge { .. } | FileError::Memory { .. }), "{e}");
    }
    assert!(!path.exists(), "something was left behind");
    // A directory, likewise; and a file that was there is as it was.
    assert!(matches!(File::open(dir.path(), Some(u64::MAX)), Err(FileError::TooLarge { .. })));
    drop(File::open(&path, Some(1 << 20)).unwrap());
    let before = fs::read(&path).unwrap();
    assert!(File::open(&path, Some(i64::MAX as u64)).is_err());
    assert!(fs::read(&path).unwrap() == before);
    // The smallest that works, does.
    let file = File::open(&path, Some(least())).unwrap();
    assert_eq!(file.describe().pages.0, 1);
    store(&file, 0, 1, 1).unwrap();
    assert_eq!(load(&file, 0, 1, 1), Ok(()));
    drop(file);
    // Without a size: much of what is free, and nothing of it used.
    let fs_free = rustix::fs::statvfs(dir.path()).unwrap();
    let free = fs_free.f_bavail * fs_free.f_frsize;
    let file = File::open(dir.path(), None).unwrap();
    let bytes = file.describe().capacity_bytes;
    assert!(bytes < free && bytes > free / 2, "{bytes} of {free}");
    let last = file.describe().pages.0 - 1;
    store(&file, last, 1, 1).unwrap();
    assert_eq!((load(&file, last, 1, 1), file.usage().unwrap().used_bytes), (Ok(()), page() as u64));
}

#[test]
fn a_read_only_file_system_is_said_so() {
    let _alone = alone();
    mounted(Mount::Tmpfs("ro"), |at| {
        for path in [at.to_path_buf(), at.join("pages")] {
            assert_eq!(File::open(&path, Some(1 << 20)).unwrap_err(), FileError::ReadOnly { path });
        }
    });
}

#[test]
fn a_directory_that_may_not_be_written_is_said_so() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("locked");
    fs::create_dir(&at).unwrap();
    // Nobody, root included, makes files in an immutable directory.
    let chattr = |flag| Command::new("chattr").arg(flag).arg(&at).status().is_ok_and(|s| s.success());
    if !chattr("+i") {
        return eprintln!("skipped: cannot make a directory immutable");
    }
    let results = [at.clone(), at.join("pages")].map(|p| File::open(p, Some(1 << 20)));
    assert!(chattr("-i"));
    for result in results {
        assert!(matches!(result, Err(FileError::Permission { .. })), "{result:?}");
    }
}

#[test]
fn a_full_file_system_is_said_so() {
    let _alone = alone();
    mounted(Mount::Tmpfs("size=1m"), |at| {
        let mut filler = fs::File::create(at.join("filler")).unwrap();
        while std::io::Write::write(&mut filler, &[1; 4096]).is_ok() {}
        for size in [None, Some(1 << 20)] {
            for path in [at.to_path_buf(), at.join("pages")] {
                let e = File::open(&path, size).unwrap_err();
                assert!(matches!(e, FileError::NoSpace { .. }), "{e}");
            }
        }
        assert_eq!(fs::read_dir(at).unwrap().count(), 1, "something was left behind");
    });
}

#[test]
fn a_file_size_limit_is_kept() {
    let _alone = alone();
    // In a process of its own: the limit is the process's.
    let status = super::fork::in_child(|| {
        rustix::process::setrlimit(
            rustix::process::Resource::Fsize,
            rustix::process::Rlimit { current: Some(8 << 20), maximum: None },
        )
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let e = File::open(dir.path(), Some(16 << 20)).unwrap_err();
        assert!(matches!(e, FileError::TooLarge { .. }), "{e}");
        let file = File::open(dir.path(), None).unwrap();
        assert_eq!(file.describe().capacity_bytes, 8 << 20);
        let last = file.describe().pages.0 - 1;
        store(&file, last, 1, 1).unwrap();
        assert_eq!(load(&file, last, 1, 1), Ok(()));
    })
    .wait();
    assert_eq!(status, 0);
}

#[test]
fn a_killed_process_leaves_nothing_behind_but_a_named_file() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pages");
    let child = super::fork::in_child(|| {
        let unnamed = File::open(dir.path(), Some(8 << 20)).unwrap();
        let named = File::open(&path, Some(8 << 20)).unwrap();
        store(&unnamed, 0, 1000, 1).unwrap();
        store(&named, 0, 1000, 1).unwrap();
        std::process::abort();
    });
    assert_ne!(child.wait(), 0);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [path.as_path()]);
    let file = File::open(&path, Some(1 << 20)).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 64 << 10);
    works(&file);
}
