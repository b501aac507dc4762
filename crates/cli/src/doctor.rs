//! `peerspace doctor`: what this machine allows, and what to do about what it does not.

use clap::Args;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use peerspace_os::linux::probe::Facts;
use peerspace_os::linux::uffd::feature;
use serde::Serialize;

/// Options of `peerspace doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    Good,
    /// It works, but not as well as it could.
    Fair,
    /// Something is missing.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    health: Health,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

/// Looks, and says. The status to exit with: 0 where programs can be run, 125 where not.
pub(crate) fn doctor(args: &DoctorArgs) -> u8 {
    let facts = Facts::gather();
    let findings = examine(&facts);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings).expect("findings are plain data"));
    } else {
        println!("{}", table(&findings));
        println!("{}", verdict(&facts));
    }
    if facts.user_userfaultfd.is_ok() || facts.full_userfaultfd.is_ok() { 0 } else { 125 }
}

fn verdict(f: &Facts) -> &'static str {
    match (&f.full_userfaultfd, &f.user_userfaultfd) {
        (Ok(()), _) => "Programs can be run as they are: peerspace run --host SIZE -- PROGRAM",
        (_, Ok(())) => {
            "Programs can be run with --faults signal (see `peerspace run --help` for what that means), and the library \
             can be used."
        }
        _ => "Nothing can be run here until userfaultfd is allowed.",
    }
}

fn error(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

fn examine(f: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut say = |what, health, found: String, remedy: &str| {
        findings.push(Finding { what, health, found, remedy: remedy.into() });
    };
    say("kernel", Health::Good, format!("Linux {}, pages of {} KiB", f.kernel, f.page_bytes >> 10), "");
    match (&f.full_userfaultfd, &f.user_userfaultfd) {
        (Ok(()), _) => say("userfaultfd", Health::Good, "serves programs and system calls".into(), ""),
        (Err(e), Ok(())) => say(
            "userfaultfd",
            Health::Fair,
            format!("serves programs, not system calls: {}", error(*e)),
            "run as root, set vm.unprivileged_userfaultfd=1, or give access to /dev/userfaultfd",
        ),
        (_, Err(e)) => say(
            "userfaultfd",
            Health::Bad,
            format!("refused: {}", error(*e)),
            "the kernel needs CONFIG_USERFAULTFD; a container must allow the system call userfaultfd (seccomp)",
        ),
    }
    match &f.userfaultfd_device {
        Ok(()) => say("/dev/userfaultfd", Health::Good, "can be opened".into(), ""),
        Err(e) if f.full_userfaultfd.is_ok() => {
            say("/dev/userfaultfd", Health::Good, format!("not needed ({})", error(*e)), "");
        }
        Err(e) => say(
            "/dev/userfaultfd",
            Health::Fair,
            error(*e),
            "Linux 6.1 or newer has it: chmod or chgrp it for the users who need it, or pass it to the container",
        ),
    }
    let missing = f.missing_features();
    match missing.as_slice() {
        [] => say("userfaultfd features", Health::Good, "all that are used".into(), ""),
        list => say(
            "userfaultfd features",
            Health::Fair,
            format!("missing: {}", list.join(", ")),
            if f.has(feature::MOVE) {
                "a newer kernel has them: poison needs 6.6"
            } else {
                "without move (6.8) pages are copied instead of moved: slower, and without huge pages"
            },
        ),
    }
    let newer = |there: bool| if there { Health::Good } else { Health::Fair };
    let found = |there: bool| if there { "there" } else { "not there" }.to_string();
    say(
        "PAGEMAP_SCAN",
        newer(f.pagemap_scan),
        found(f.pagemap_scan),
        if f.pagemap_scan { "" } else { "Linux 6.7 has it; without it populated pages are found more slowly" },
    );
    say(
        "PROCMAP_QUERY",
        newer(f.procmap_query),
        found(f.procmap_query),
        if f.procmap_query { "" } else { "Linux 6.11 has it; without it mappings are read as text" },
    );
    match f.huge_pages.as_deref() {
        Some("never") => say(
            "huge pages",
            Health::Fair,
            "never".into(),
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; without them sequential work is slower",
        ),
        Some(mode) => say("huge pages", Health::Good, mode.into(), ""),
        None => say("huge pages", Health::Fair, "the kernel has none".into(), "CONFIG_TRANSPARENT_HUGEPAGE"),
    }
    match f.io_uring {
        Ok(()) => say("io_uring", Health::Good, "there".into(), ""),
        Err(e) => say(
            "io_uring",
            Health::Fair,
            error(e),
            "file devices do without it, one request at a time; check kernel.io_uring_disabled and the container",
        ),
    }
    if let Some(n) = f.max_map_count {
        let health = if n >= 65530 { Health::Good } else { Health::Fair };
        say(
            "mappings per process",
            health,
            n.to_string(),
            if health == Health::Good { "" } else { "raise vm.max_map_count" },
        );
    }
    match f.overcommit {
        Some(2) => say(
            "overcommit",
            Health::Fair,
            "strict (2): reserved address space counts as memory".into(),
            "vm.overcommit_memory=0 or 1 lets tables be reserved generously",
        ),
        Some(n) => say("overcommit", Health::Good, n.to_string(), ""),
        None => {}
    }
    if let Some((total, available)) = f.memory {
        say("RAM", Health::Good, format!("{} MiB, {} MiB available", total >> 20, available >> 20), "");
    }
    if let Some(limit) = f.group_limit {
        say(
            "control group",
            Health::Fair,
            format!("memory limited to {} MiB", limit >> 20),
            "what --host and the devices in RAM take up together must stay below it",
        );
    }
    say("processors", Health::Good, f.processors.to_string(), "");
    findings
}

fn table(findings: &[Finding]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    for f in findings {
        let (mark, color) = match f.health {
            Health::Good => ("ok", Color::Green),
            Health::Fair => ("fair", Color::Yellow),
            Health::Bad => ("bad", Color::Red),
        };
        table.add_row([
            Cell::new(mark).fg(color),
            Cell::new(f.what).add_attribute(Attribute::Bold),
            Cell::new(&f.found),
            Cell::new(&f.remedy),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_complaint_comes_with_a_remedy() {
        let mut facts = Facts::gather();
        // The worst machine there can be.
        facts.full_userfaultfd = Err(1);
        facts.user_userfaultfd = Err(38);
        facts.userfaultfd_device = Err(2);
        facts.features = None;
        facts.pagemap_scan = false;
        facts.procmap_query = false;
        facts.huge_pages = Some("never".into());
        facts.io_uring = Err(1);
        facts.max_map_count = Some(1000);
        facts.overcommit = Some(2);
        facts.group_limit = Some(1 << 28);
        let findings = examine(&facts);
        assert!(findings.iter().filter(|f| f.health != Health::Good).count() >= 9);
        for f in findings {
            assert_eq!(f.health == Health::Good, f.remedy.is_empty(), "{f:?}");
        }
        assert!(verdict(&facts).contains("Nothing can be run"));
    }
}
