//! Clients of the mirror devices, in C, run with the library preloaded: each says what of the interface it shows.

mod common;

use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);

/// Rules G1, G3, G4: what devices read and write, and their faults.
#[test]
fn access() {
    common::run("access", &[], LIMIT);
}

/// What is refused, with which errno, and that nothing has changed then.
#[test]
fn errors() {
    common::run("errors", &[], LIMIT);
}

/// Rules Z3, Z5, Z7, Z8, G6, G8, H2, H6: migration.
#[test]
fn migrate() {
    common::run("migrate", &[], LIMIT);
}

/// Every byte that a snapshot can have.
#[test]
fn snapshot() {
    common::run("snapshot", &[], LIMIT);
}

/// Rule G14: sole access.
#[test]
fn exclusive() {
    common::run("exclusive", &[], LIMIT);
}

/// Rule G5: changes of mappings.
#[test]
fn mappings() {
    common::run("mappings", &[], LIMIT);
}

/// Rule G11: memory that is not private and anonymous.
#[test]
fn kinds() {
    common::run("kinds", &[], LIMIT);
}

/// Rule G12: forks.
#[test]
fn forks() {
    common::run("forks", &[], LIMIT);
}
