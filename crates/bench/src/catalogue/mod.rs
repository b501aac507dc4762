//! The benchmarks: who takes part, what they do, which ratios and values are aimed at.

mod accelerated;
mod calls;
mod library;

use crate::contender;
use crate::spec::{Collapser, DeviceKind, Kind, LinkSpeed, Metric, Mover, Spec, Work};
use std::path::Path;

/// The names, in the order in which they are run.
pub(crate) const NAMES: [&str; 20] = [
    "fault",
    "sequential",
    "sequential-compressed",
    "random-compressed",
    "random-file",
    "huge-sequential",
    "huge-random",
    "huge-turnover",
    "huge-collapse",
    "huge-turn",
    "metadata",
    "attach",
    "in-place",
    "migrate",
    "device-fault",
    "prefetch",
    "link-bytes",
    "fork",
    "unmap",
    "c-call",
];

const MIB: u64 = 1 << 20;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Bytes of data.
    data: u64,
    /// Bytes of RAM for them.
    host: u64,
    /// Random accesses to memory in a round.
    accesses: u64,
    /// Random accesses to a file in a round.
    file_accesses: u64,
    /// Bytes of managed memory to measure our own by.
    managed: u64,
    /// Rounds of what is quick, and of what takes seconds each.
    rounds: [u32; 2],
}

impl Sizes {
    /// The sizes that are compared.
    pub(crate) const FULL: Sizes = Sizes {
        data: 1024 * MIB,
        host: 256 * MIB,
        accesses: 100_000,
        file_accesses: 10_000,
        managed: 8192 * MIB,
        rounds: [11, 5],
    };
    /// Sizes that only show that everything works.
    pub(crate) const QUICK: Sizes = Sizes {
        data: 96 * MIB,
        host: 24 * MIB,
        accesses: 20_000,
        file_accesses: 1000,
        managed: 2048 * MIB,
        rounds: [2, 2],
    };
}

/// What of the system a contender needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing.
    Nothing,
    /// A memory cgroup, and swap on zram.
    Zram,
    /// A memory cgroup, and swap on a file.
    SwapFile,
}

/// Somebody who takes part.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Its name within the benchmark.
    pub(crate) id: &'static str,
    /// What it is.
    pub(crate) what: String,
    pub(crate) spec: Spec,
    pub(crate) work: Work,
    /// Whether data have to leave RAM while it is measured.
    pub(crate) evicts: bool,
    pub(crate) need: Need,
}

/// What is aimed at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

/// How two contenders are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sense {
    /// The subject's time by the reference's.
    Time,
    /// The subject's speed by the reference's.
    Speed,
    /// What there is of it with the subject, by what there is with the reference.
    Amount,
}

/// A comparison of two contenders, round by round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Versus {
    pub(crate) subject: &'static str,
    pub(crate) reference: &'static str,
    pub(crate) metric: Metric,
    pub(crate) sense: Sense,
    pub(crate) target: Option<Target>,
}

/// A number of one contender that is aimed at for itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Aim {
    pub(crate) contender: &'static str,
    pub(crate) metric: Metric,
    pub(crate) target: Target,
}

/// A benchmark.
#[derive(Debug, Clone)]
pub(crate) struct Benchmark {
    pub(crate) name: &'static str,
    pub(crate) about: String,
    pub(crate) contenders: Vec<Plan>,
    pub(crate) versus: Vec<Versus>,
    pub(crate) aims: Vec<Aim>,
    /// Each measurement takes a process of its own, and none is thrown away.
    pub(crate) fresh: bool,
    /// Rounds, unless the user says otherwise.
    pub(crate) rounds: u32,
}

/// All benchmarks. Files go into `dir`; accelerators that are behind a link are behind this one.
pub(crate) fn all(sizes: Sizes, dir: &Path, link: LinkSpeed) -> Vec<Benchmark> {
    let make = Make { sizes, dir, link };
    vec![
        make.fault(),
        make.sequential(),
        make.sequential_compressed(),
        make.random_compressed(),
        make.random_file(),
        make.huge(true),
        make.huge(false),
        make.huge_turnover(),
        make.huge_collapse(),
        make.huge_turn(),
        make.metadata(),
        make.attach(),
        make.in_place(),
        make.migrate(),
        make.device_fault(),
        make.prefetch(),
        make.link_bytes(),
        make.fork(),
        make.unmap(),
        make.c_call(),
    ]
}

const OURS: &str = "ours";
const OURS_ROOM: &str = "ours, room to spare";
const FLOOR: &str = "floor";
const FLOOR_ROOM: &str = "floor, room to spare";
const ZRAM: &str = "zram swap";
const ZRAM_HUGE: &str = "zram swap, huge";

struct Make<'a> {
    sizes: Sizes,
    dir: &'a Path,
    link: LinkSpeed,
}

impl Make<'_> {
    fn spec(&self, kind: Kind) -> Spec {
        Spec { kind, data: self.sizes.data, host: self.sizes.host, dir: self.dir.into(), cgroup: None }
    }

    fn plan(&self, id: &'static str, kind: Kind, work: Work, what: &str) -> Plan {
        Plan { id, what: what.into(), spec: self.spec(kind), work, evicts: true, need: Need::Nothing }
    }

    fn swap(&self, id: &'static str, huge: bool, work: Work, need: Need) -> Plan {
        let pages = if huge { "huge pages asked for" } else { "small pages" };
        let what = format!("the kernel's swap in a memory cgroup, {pages}");
        Plan { need, ..self.plan(id, Kind::Swap { huge }, work, &what) }
    }

    /// For the description.
    fn amount(&self) -> String {
        format!("{} MiB of data in {} MiB of RAM", self.sizes.data / MIB, self.sizes.host / MIB)
    }

    /// A contender that has RAM for all its data, and none of them in it.
    fn room(&self, id: &'static str, kind: Kind, data: u64, accesses: u64) -> Plan {
        let what = format!("the same, {} MiB that are out of RAM and room for all of them", data / MIB);
        let mut plan = Plan { evicts: false, ..self.plan(id, kind, Work::Absent { accesses }, &what) };
        (plan.spec.data, plan.spec.host) = (data, data + self.sizes.host);
        plan
    }

    fn random(&self) -> Work {
        Work::Random { accesses: self.sizes.accesses }
    }

    fn fault(&self) -> Benchmark {
        let ours = Kind::Ours(DeviceKind::Soft);
        let floor = Kind::Floor { huge: false, lz4: false };
        // Half of the data are enough to find new pages that are out of RAM for a few rounds.
        let data = self.sizes.data / 2;
        let accesses = self.sizes.accesses / 5;
        let room = |id, kind| self.room(id, kind, data, accesses);
        let at_most = |subject, reference| Versus {
            subject,
            reference,
            metric: Metric::PerFault,
            sense: Sense::Time,
            target: Some(Target::AtMost(1.3)),
        };
        let in_all = Versus { metric: Metric::PerAccess, target: None, ..at_most(OURS, FLOOR) };
        Benchmark {
            name: "fault",
            about: format!(
                "random 4 KiB reads, data in uncompressed memory, faults by signal; {}; and the same where nothing has \
                 to leave",
                self.amount(),
            ),
            contenders: vec![
                self.plan(OURS, ours, self.random(), "a space with the device soft"),
                self.plan(FLOOR, floor, self.random(), "raw pager, 4 KiB, memcpy, always writes back"),
                room(OURS_ROOM, ours),
                room(FLOOR_ROOM, floor),
            ],
            versus: vec![
                at_most(OURS, FLOOR),
                Self::by_cpu(at_most(OURS, FLOOR)),
                in_all,
                at_most(OURS_ROOM, FLOOR_ROOM),
                Self::by_cpu(at_most(OURS_ROOM, FLOOR_ROOM)),
            ],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    /// The same comparison by processor time, which other programs on the machine disturb less. It counts what ours
    /// does in the background as well.
    fn by_cpu(versus: Versus) -> Versus {
        let metric = if versus.metric.more_is_better() { Metric::CpuPerGb } else { Metric::CpuPerFault };
        Versus { metric, sense: Sense::Time, target: None, ..versus }
    }

    fn faster(reference: &'static str, metric: Metric, target: Option<f64>) -> Versus {
        Versus { subject: OURS, reference, metric, sense: Sense::Speed, target: target.map(Target::AtLeast) }
    }

    fn sequential(&self) -> Benchmark {
        let work = Work::Sequential;
        let copy = Plan { evicts: false, ..self.plan("memcpy", Kind::Copy, work, "all in RAM, copied and read") };
        let speed = |reference, target| Self::faster(reference, Metric::Throughput, target);
        Benchmark {
            name: "sequential",
            about: format!("a sequential read, data in uncompressed memory; {}", self.amount()),
            contenders: vec![
                self.plan(OURS, Kind::Ours(DeviceKind::Soft), work, "a space with the device soft"),
                self.plan(FLOOR, Kind::Floor { huge: true, lz4: false }, work, "raw pager, 2 MiB, memcpy"),
                copy,
                self.swap(ZRAM, false, work, Need::Zram),
                self.swap(ZRAM_HUGE, true, work, Need::Zram),
            ],
            versus: vec![
                speed(FLOOR, Some(0.8)),
                Self::by_cpu(speed(FLOOR, None)),
                speed("memcpy", None),
                speed(ZRAM, Some(12.0)),
                speed(ZRAM_HUGE, Some(12.0)),
            ],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }

    fn sequential_compressed(&self) -> Benchmark {
        let work = Work::Sequential;
        let speed = |reference, target| Self::faster(reference, Metric::Throughput, target);
        Benchmark {
            name: "sequential-compressed",
            about: format!("a sequential read, data compressed in memory; {}", self.amount()),
            contenders: vec![
                self.plan(OURS, Kind::Ours(DeviceKind::Compressed), work, "a space with the device compressed"),
                self.plan(FLOOR, Kind::Floor { huge: true, lz4: true }, work, "raw pager, 2 MiB, lz4"),
                self.swap(ZRAM, false, work, Need::Zram),
                self.swap(ZRAM_HUGE, true, work, Need::Zram),
            ],
            versus: vec![
                speed(FLOOR, None),
                Self::by_cpu(speed(FLOOR, None)),
                speed(ZRAM, Some(4.0)),
                Self::by_cpu(speed(ZRAM, None)),
                speed(ZRAM_HUGE, Some(4.0)),
                Self::by_cpu(speed(ZRAM_HUGE, None)),
            ],
            // One thread reads; more than one core busy is others working for it.
            aims: vec![Aim { contender: OURS, metric: Metric::Cores, target: Target::AtLeast(1.1) }],
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }

    fn random_compressed(&self) -> Benchmark {
        let work = self.random();
        let speed = |reference, target| Self::faster(reference, Metric::PerAccess, Some(target));
        Benchmark {
            name: "random-compressed",
            about: format!("random 4 KiB reads, data compressed in memory, faults by signal; {}", self.amount()),
            contenders: vec![
                self.plan(OURS, Kind::Ours(DeviceKind::Compressed), work, "a space with the device compressed"),
                self.plan(
                    FLOOR,
                    Kind::Floor { huge: false, lz4: true },
                    work,
                    "raw pager, 4 KiB, lz4, always writes back",
                ),
                self.swap(ZRAM, false, work, Need::Zram),
                self.swap(ZRAM_HUGE, true, work, Need::Zram),
            ],
            versus: [speed(FLOOR, 0.9), speed(ZRAM, 1.3), speed(ZRAM_HUGE, 1.3)]
                .into_iter()
                .flat_map(|v| [v, Self::by_cpu(v)])
                .collect(),
            // Data that are only read are never compressed twice.
            aims: vec![Aim { contender: OURS, metric: Metric::StoredAgain, target: Target::AtMost(0.0) }],
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    fn random_file(&self) -> Benchmark {
        const PREAD: &str = "pread";
        const SWAP: &str = "swap file";
        let work = Work::Random { accesses: self.sizes.file_accesses };
        let ours = Kind::Ours(DeviceKind::File);
        let room = |id, kind| self.room(id, kind, self.sizes.data, self.sizes.file_accesses);
        let at_most = |subject, reference, most: Option<f64>| Versus {
            subject,
            reference,
            metric: Metric::PerFault,
            sense: Sense::Time,
            target: most.map(Target::AtMost),
        };
        Benchmark {
            name: "random-file",
            about: format!(
                "random 4 KiB reads, data in a file, faults by signal; {}; and the same where nothing has to leave",
                self.amount()
            ),
            contenders: vec![
                self.plan(OURS, ours, work, "a space with the device file"),
                Plan { evicts: false, ..self.plan(PREAD, Kind::Pread, work, "a read of the file for each access") },
                self.plan(FLOOR, Kind::FloorFile, work, "raw pager, 4 KiB, pread, only drops"),
                self.swap(SWAP, false, work, Need::SwapFile),
                room(OURS_ROOM, ours),
                room(FLOOR_ROOM, Kind::FloorFile),
            ],
            versus: vec![
                at_most(OURS, PREAD, Some(1.15)),
                at_most(OURS_ROOM, PREAD, Some(1.15)),
                at_most(OURS, FLOOR, None),
                Self::by_cpu(at_most(OURS, FLOOR, None)),
                Self::faster(SWAP, Metric::PerAccess, None),
                at_most(OURS_ROOM, FLOOR_ROOM, None),
            ],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    /// What huge folios are good for, and what they cost where they are not.
    fn huge(&self, sequential: bool) -> Benchmark {
        const SMALL: &str = "ours, small pages";
        let work = if sequential { Work::Sequential } else { self.random() };
        let (metric, target) = if sequential { (Metric::Throughput, 3.0) } else { (Metric::PerAccess, 0.95) };
        let versus = Self::faster(SMALL, metric, Some(target));
        let order = if sequential { "a sequential read" } else { "random 4 KiB reads" };
        Benchmark {
            name: if sequential { "huge-sequential" } else { "huge-random" },
            about: format!(
                "{order} with huge folios and without, data in uncompressed memory, faults by signal; {}",
                self.amount()
            ),
            contenders: vec![
                self.plan(OURS, Kind::Ours(DeviceKind::Soft), work, "a space with the device soft"),
                self.plan(SMALL, Kind::OursSmall(DeviceKind::Soft), work, "the same, told to use small pages alone"),
            ],
            versus: vec![versus, Self::by_cpu(versus)],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[sequential as usize],
        }
    }

    /// Somebody who has four times as much RAM as data, and something of its own to do.
    fn with_room(&self, id: &'static str, kind: Kind, what: &str) -> Plan {
        let mut plan = Plan { evicts: false, ..self.plan(id, kind, Work::Own, what) };
        (plan.spec.data, plan.spec.host) = (self.sizes.host / 2, 2 * self.sizes.host);
        plan
    }

    fn huge_turnover(&self) -> Benchmark {
        const TOUCHED: &str = "touched";
        const RAW: &str = "raw";
        let plan = |id, by, what| self.with_room(id, Kind::Turnover(by), what);
        let by = |subject, target: Option<f64>| Versus {
            subject,
            reference: RAW,
            metric: Metric::PerBlock,
            sense: Sense::Time,
            target: target.map(Target::AtMost),
        };
        Benchmark {
            name: "huge-turnover",
            about: format!("huge folios are unmapped and mapped again; {} MiB of them", self.sizes.host / 2 / MIB),
            contenders: vec![
                plan(OURS, Mover::Asked, "a region that is set aside and made resident again"),
                plan(TOUCHED, Mover::Touched, "the same, touched instead: faults by signal"),
                plan(RAW, Mover::Raw, "UFFDIO_MOVE there and back, and nothing else"),
            ],
            versus: vec![by(OURS, Some(2.0)), by(TOUCHED, None)],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }

    fn huge_collapse(&self) -> Benchmark {
        const KERNEL: &str = "kernel";
        const LEAST: &str = "least";
        let plan = |id, by, what| self.with_room(id, Kind::Collapse(by), what);
        let by = |reference, target: Option<f64>| Versus {
            subject: OURS,
            reference,
            metric: Metric::PerBlock,
            sense: Sense::Time,
            target: target.map(Target::AtMost),
        };
        Benchmark {
            name: "huge-collapse",
            about: format!("512 small pages become a huge one; {} MiB of them", self.sizes.host / 2 / MIB),
            contenders: vec![
                plan(OURS, Collapser::Ours, "a region that is told to collapse"),
                plan(LEAST, Collapser::Least, "1.2 copies of 2 MiB, moving 512 small pages and a huge one"),
                plan(KERNEL, Collapser::Kernel, "MADV_COLLAPSE of plain memory"),
            ],
            versus: vec![by(LEAST, Some(1.0)), by(KERNEL, None)],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }

    fn huge_turn(&self) -> Benchmark {
        let plan = |id, dense, what| self.plan(id, Kind::Turn { dense }, Work::Own, what);
        Benchmark {
            name: "huge-turn",
            about: format!("programs that change their ways, or do not; {}", self.amount()),
            contenders: vec![
                plan("dense", true, "fragments its memory in more than there is RAM for, then uses it densely"),
                plan("sparse", false, "uses one page in sixteen"),
            ],
            versus: Vec::new(),
            aims: vec![
                Aim { contender: "dense", metric: Metric::HugeShare, target: Target::AtLeast(0.9) },
                Aim { contender: "sparse", metric: Metric::Waste, target: Target::AtMost(0.1) },
            ],
            fresh: true,
            rounds: self.sizes.rounds[1],
        }
    }

    fn attach(&self) -> Benchmark {
        let aim = |metric, most| Aim { contender: OURS, metric, target: Target::AtMost(most) };
        // The kernel's struct page: 64 bytes for each 4 KiB.
        let kernel = (1024.0 * 1024.0 / 4.0) * 64.0;
        Benchmark {
            name: "attach",
            about: format!(
                "a device of 1 TiB comes and goes; what its pages are described by, where the kernel takes {kernel} bytes \
                 for a GiB; {}",
                self.amount()
            ),
            contenders: vec![self.plan(OURS, Kind::Attach, Work::Own, "a space")],
            versus: Vec::new(),
            aims: vec![
                aim(Metric::AttachTime, 10.0),
                aim(Metric::AttachBytes, MIB as f64),
                aim(Metric::DescriptorsHuge, kernel / 512.0),
                aim(Metric::DescriptorsSmall, kernel),
            ],
            fresh: true,
            rounds: self.sizes.rounds[1],
        }
    }

    fn in_place(&self) -> Benchmark {
        let half = |plan: Plan| {
            let data = self.sizes.data / 4;
            Plan { evicts: false, spec: Spec { data, ..plan.spec }, ..plan }
        };
        let aim = |metric, target| Aim { contender: OURS, metric, target };
        Benchmark {
            name: "in-place",
            about: format!(
                "{} MiB are sent to a coherent device, where they are used in place, and brought home; the device keeps \
                 its own descriptors",
                self.sizes.data / 4 / MIB
            ),
            contenders: vec![
                half(self.plan(OURS, Kind::Place(true), Work::Own, "a space with the device dax, in memory")),
                half(self.plan(
                    FLOOR,
                    Kind::Place(false),
                    Work::Own,
                    "write and read of the same blocks to such memory",
                )),
            ],
            versus: vec![
                Self::faster(FLOOR, Metric::Sent, Some(0.7)),
                Self::faster(FLOOR, Metric::Fetched, Some(0.7)),
            ],
            aims: vec![aim(Metric::DescriptorsHost, Target::AtMost(0.0))],
            fresh: true,
            rounds: self.sizes.rounds[1],
        }
    }

    fn metadata(&self) -> Benchmark {
        let sized = |mut plan: Plan, data| {
            plan.spec.data = data;
            Plan { evicts: false, ..plan }
        };
        let footprint = self.plan("footprint", Kind::Footprint, Work::Own, "a space, from outside: smaps");
        let start =
            self.plan("start", Kind::Start(true), Work::Own, "a process that makes a space and 1 TiB of region");
        let empty = self.plan("empty", Kind::Start(false), Work::Own, "a process that makes nothing");
        let aim = |contender, metric, most| Aim { contender, metric, target: Target::AtMost(most) };
        Benchmark {
            name: "metadata",
            about: format!(
                "what a space needs for itself: memory ({} MiB managed in {} MiB of RAM), time to start",
                self.sizes.managed / MIB,
                self.sizes.host / MIB
            ),
            contenders: vec![
                Plan { evicts: true, ..sized(footprint, self.sizes.managed) },
                sized(start, 4 * self.sizes.host),
                sized(empty, 0),
            ],
            versus: vec![Versus {
                subject: "start",
                reference: "empty",
                metric: Metric::ProcessTime,
                sense: Sense::Time,
                target: None,
            }],
            aims: vec![
                aim("footprint", Metric::BytesWhole, 64.0),
                aim("footprint", Metric::BytesSplit, 24.0 * 1024.0),
                aim("footprint", Metric::BytesSplitAway, 24.0 * 1024.0),
                // What is said of our own memory: 2 % of the budget and 16 MiB.
                aim("footprint", Metric::BytesFixed, self.sizes.host as f64 * 0.02 + 16.0 * MIB as f64),
                aim("start", Metric::SpaceTime, 5.0),
                aim("start", Metric::ProcessTime, 5.0),
            ],
            fresh: true,
            rounds: self.sizes.rounds[1],
        }
    }
}

impl Plan {
    /// Why this build cannot have it, if it cannot.
    pub(crate) fn unavailable(&self) -> Option<String> {
        match self.spec.kind {
            Kind::Ours(device) | Kind::OursSmall(device) if !contender::available(device) => {
                Some("this device is not available in this build".into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn benchmarks_are_what_their_names_say_and_compare_whom_they_have() {
        for sizes in [Sizes::FULL, Sizes::QUICK] {
            let link = LinkSpeed { bytes_per_second: 1, latency_ns: 1 };
            let all = all(sizes, Path::new("/tmp"), link);
            assert!(all.iter().map(|b| b.name).eq(NAMES));
            for b in &all {
                let ids: Vec<_> = b.contenders.iter().map(|c| c.id).collect();
                for v in &b.versus {
                    assert!(ids.contains(&v.subject) && ids.contains(&v.reference), "{}: {v:?}", b.name);
                }
                assert!(b.aims.iter().all(|a| ids.contains(&a.contender)), "{}", b.name);
            }
        }
    }
}
