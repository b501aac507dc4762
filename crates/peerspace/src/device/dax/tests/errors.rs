//! A medium that fails, at each of its calls in turn.

use super::*;

/// What is done to a directory.
type Change = fn(&mut Names<&Model>, &Model) -> Result<(), NamesError>;

fn add(names: &mut Names<&Model>, medium: &Model) -> Result<(), NamesError> {
    names.create_region("new", 6 * BLOCK, |e| medium.zero(e)).map(drop)
}

fn take(names: &mut Names<&Model>, _: &Model) -> Result<(), NamesError> {
    names.remove("one")
}

#[test]
fn a_change_that_fails_half_way_is_reported_and_nothing_is_changed_until_it_is_opened_again() {
    for (change, calls, zeroed) in [(add as Change, 8, 4), (take as Change, 4, 0)] {
        for failure in [Failure::Once, Failure::Half, Failure::Dead] {
            for nth in 0.. {
                let medium = Model::new(shape(20).device_bytes);
                let mut names = sample(&medium);
                // What is added comes in two pieces, each zeroed and flushed.
                names.remove("end").unwrap();
                let before = regions(&names);
                medium.fail_after(Some((nth, failure)));
                let result = change(&mut names, &medium);
                medium.fail_after(None);
                if result.is_ok() {
                    assert_eq!(nth, calls, "a change takes as many calls as that");
                    assert_ne!(regions(&names), before);
                    break;
                }
                let error = result.unwrap_err();
                let what =
                    if nth < zeroed { "zero a new region of" } else { ["write to", "flush"][nth as usize % 2] };
                assert!(matches!(error, NamesError::Io { what: w, .. } if w == what), "{nth}: {error}");
                // What it says has not changed.
                assert_eq!(regions(&names), before);
                assert_eq!(names.find("new"), None);
                check(&names, shape(20));
                if nth < zeroed {
                    // The directory was not written yet, so it is as good as ever.
                    assert_eq!(regions(&Names::open(&medium, shape(20)).unwrap()), before);
                    change(&mut names, &medium).unwrap();
                    continue;
                }
                let calls_before = medium.calls.get();
                for _ in 0..2 {
                    assert!(matches!(add(&mut names, &medium), Err(NamesError::Uncertain)));
                    assert!(matches!(names.remove("two"), Err(NamesError::Uncertain)));
                }
                assert_eq!(medium.calls.get(), calls_before, "not even tried");
                assert_eq!(regions(&names), before);
                // Opened again, it is one or the other, and goes on.
                let mut names = Names::open(&medium, shape(20)).unwrap();
                let found = regions(&names);
                if found == before {
                    change(&mut names, &medium).unwrap();
                } else {
                    assert_eq!(nth, calls - 1, "only where nothing but the last flush was missing");
                    assert!(matches!(
                        change(&mut names, &medium),
                        Err(NamesError::Exists { .. } | NamesError::Missing { .. })
                    ));
                }
                check(&names, shape(20));
                assert_ne!(regions(&names), before);
            }
        }
    }
}

#[test]
fn an_open_that_fails_can_be_tried_again() {
    let medium = Model::new(shape(20).device_bytes);
    let said = regions(&sample(&medium));
    for nth in 0.. {
        medium.fail_after(Some((nth, Failure::Once)));
        let result = Names::open(&medium, shape(20)).map(|n| regions(&n));
        medium.fail_after(None);
        match result {
            Ok(regions) => {
                assert_eq!(regions, said);
                assert_eq!(nth, 9, "five reads, two words written and flushed");
                break;
            }
            Err(NamesError::Io { what, .. }) => {
                assert_eq!(
                    what,
                    ["read", "read", "read", "read", "read", "write to", "flush", "write to", "flush"][nth as usize]
                );
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(regions(&Names::open(&medium, shape(20)).unwrap()), said);
    }
}

#[test]
fn a_directory_whose_making_failed_can_be_made_again() {
    for failure in [Failure::Once, Failure::Half, Failure::Dead] {
        for nth in 0.. {
            let medium = Model::new(shape(20).device_bytes);
            medium.fail_after(Some((nth, failure)));
            let result = Names::create(&medium, shape(20)).map(drop);
            medium.fail_after(None);
            if result.is_ok() {
                assert_eq!(nth, 512 + 9, "what is there was looked at, and then");
                break;
            }
            assert!(matches!(result, Err(NamesError::Io { .. })));
            if probe(&medium, shape(20)).unwrap() == Found::Ours {
                assert_eq!(nth, 512 + 8, "only where nothing but the last flush was missing");
            } else {
                drop(Names::create(&medium, shape(20)).unwrap());
            }
            assert_eq!(Names::open(&medium, shape(20)).unwrap().iter().count(), 0);
        }
    }
}

#[test]
fn an_error_says_what_was_tried_and_where() {
    let medium = Model::new(shape(20).device_bytes);
    let mut names = Names::create(&medium, shape(20)).unwrap();
    let error = names.create_region("a", 1, |_| Err(io::Error::from_raw_os_error(5))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot zero a new region of the device at offset 4194304: Input/output error (os error 5)"
    );
    assert!(std::error::Error::source(&error).is_some());
}
