//! `peerspace devices`: where memory can go, and how to ask for it.

use clap::Args;
use comfy_table::{Attribute, Cell, ContentArrangement, Table, presets};
use serde::Serialize;

/// Options of `peerspace devices`.
#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// A kind of device.
#[derive(Debug, Serialize)]
struct Kind {
    specification: &'static str,
    #[serde(rename = "type")]
    memory: &'static str,
    what: &'static str,
    #[serde(rename = "for")]
    use_for: &'static str,
    /// How to try it.
    example: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind {
        specification: "compressed[:SIZE]",
        memory: "private",
        what: "A store in RAM, compressed with lz4, of at most SIZE bytes (without it: as many as --host). Pages of one \
               repeated value take nothing; what does not compress is kept as it is.",
        use_for: "Most things: memory that compresses two to one makes room for as much again, at microseconds a page.",
        example: "--device compressed:2G",
    },
    Kind {
        specification: "file:PATH[:SIZE]",
        memory: "private",
        what: "A file on disk of at most SIZE bytes (without it: what the file system has free). PATH is a directory, \
               and the file in it is unlinked; or a file, which must be empty or an old one of ours.",
        use_for: "What is larger than RAM: fast disks serve a page in tens of microseconds.",
        example: "--device file:/var/tmp:32G",
    },
    Kind {
        specification: "dax:SIZE, dax:PATH[:SIZE]",
        memory: "coherent",
        what: "Memory that the CPU addresses in place: SIZE bytes of a memory file; or what is at PATH, a device node, a \
               file, or a directory for an unlinked one (DAX file systems, hugetlbfs). A program that uses the library \
               migrates blocks there and goes on to use them in place, or keeps regions there by name. Before a fork \
               what is there moves to the other devices, or home beyond the budget.",
        use_for: "Memory on a slower bus, persistent memory, huge pages set aside.",
        example: "--device dax:/dev/dax0.0",
    },
    Kind {
        specification: "soft:SIZE",
        memory: "private",
        what: "Plain memory of SIZE bytes behind the device interface.",
        use_for: "Measuring the engine itself, and as a pattern for devices of one's own.",
        example: "--device soft:4G",
    },
];

/// Says what devices there are.
pub(crate) fn devices(args: &DevicesArgs) -> u8 {
    if args.json {
        println!("{}", serde_json::to_string_pretty(&KINDS).expect("kinds are plain data"));
        return 0;
    }
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["SPEC", "type", "what it is", "what it is for", "example"]);
    for k in &KINDS {
        table.add_row([
            Cell::new(k.specification).add_attribute(Attribute::Bold),
            Cell::new(k.memory),
            Cell::new(k.what),
            Cell::new(k.use_for),
            Cell::new(k.example),
        ]);
    }
    println!("{table}");
    println!(
        "Several --device are tried in the order in which they are given: a page goes to the first that has room."
    );
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_understood() {
        for kind in &KINDS {
            let spec = kind.example.strip_prefix("--device ").unwrap();
            spec.parse::<peerspace::DeviceSpec>().unwrap();
            let name = kind.specification.split([':', '[']).next().unwrap();
            assert!(peerspace::DEVICE_KINDS.contains(name));
        }
    }
}
