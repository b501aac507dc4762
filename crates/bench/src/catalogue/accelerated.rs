//! The benchmarks of accelerators: moving memory to them and back, their faults, streams, and what goes over their links.

use super::{Aim, Benchmark, MIB, Make, OURS, Plan, Sense, Target, Versus};
use crate::spec::{Found, Job, Kind, Metric, Spec, Work};

impl Make<'_> {
    /// Somebody with `data` bytes, and room for them and as much again.
    pub(super) fn roomy(&self, id: &'static str, kind: Kind, data: u64, what: &str) -> Plan {
        let plan = self.plan(id, kind, Work::Own, what);
        Plan { evicts: false, spec: Spec { data, host: 2 * data + 64 * MIB, ..plan.spec }, ..plan }
    }

    pub(super) fn migrate(&self) -> Benchmark {
        let data = 64 * MIB;
        let sizes = [
            ("ours, 2 MiB", "memcpy, 2 MiB", 2),
            ("ours, 8 MiB", "memcpy, 8 MiB", 8),
            ("ours, 64 MiB", "memcpy, 64 MiB", 64),
        ];
        let pair = |(ours, copy, mib): (&'static str, &'static str, u64)| {
            let kind = |ours| Kind::Migrate { ours, piece: mib * MIB };
            [
                self.roomy(
                    ours,
                    kind(true),
                    data,
                    &format!("a region, {mib} MiB asked for and waited for at a time"),
                ),
                self.roomy(copy, kind(false), data, "between two buffers in huge pages"),
            ]
        };
        let versus = |(subject, reference, _): (&'static str, &'static str, u64)| {
            [Metric::Sent, Metric::Fetched].map(|metric| Versus {
                subject,
                reference,
                metric,
                sense: Sense::Speed,
                target: Some(Target::AtLeast(0.9)),
            })
        };
        Benchmark {
            name: "migrate",
            about: format!(
                "{} MiB are sent to an accelerator in software, with no link between, and brought home",
                data / MIB
            ),
            contenders: sizes.into_iter().flat_map(pair).collect(),
            versus: sizes.into_iter().flat_map(versus).collect(),
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    pub(super) fn device_fault(&self) -> Benchmark {
        let cases = [
            ("device, zeros", "CPU, zeros", Found::Zeros, "small pages that nobody has touched", Some(1.5)),
            (
                "device, stored",
                "CPU, stored",
                Found::Stored,
                "small pages in a device that is memory alone",
                Some(1.5),
            ),
            ("device, mapped", "CPU, mapped", Found::Mapped, "small pages that the other one has mapped", None),
        ];
        let data = 64 * MIB;
        let pair = |(device, cpu, on, what, _): (&'static str, &'static str, Found, &str, Option<f64>)| {
            let plan = |id, device, who: &str| {
                self.roomy(id, Kind::Touch { device, on }, data, &format!("{who} touches {what}"))
            };
            [plan(device, true, "a lane of an accelerator"), plan(cpu, false, "the CPU")]
        };
        let versus =
            |(subject, reference, _, _, target): (&'static str, &'static str, Found, &str, Option<f64>)| Versus {
                subject,
                reference,
                metric: Metric::FaultMedian,
                sense: Sense::Time,
                target: target.map(Target::AtMost),
            };
        Benchmark {
            name: "device-fault",
            about: format!(
                "faults in random order of an accelerator, resolved by its lane, and of the CPU, by signal; {} MiB",
                data / MIB
            ),
            contenders: cases.into_iter().flat_map(pair).collect(),
            versus: cases.into_iter().map(versus).collect(),
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    /// For the description.
    fn behind(&self) -> String {
        format!(
            "a link of {:.1} GB/s and {:.0} us",
            self.link.bytes_per_second as f64 / 1e9,
            self.link.latency_ns as f64 / 1e3
        )
    }

    pub(super) fn prefetch(&self) -> Benchmark {
        let data = self.sizes.host / 2;
        Benchmark {
            name: "prefetch",
            about: format!(
                "{} blocks of 2 MiB are worked on one after the other by an accelerator behind {}",
                data / MIB / 2,
                self.behind()
            ),
            contenders: vec![self.roomy(OURS, Kind::Stream(self.link), data, "a region, four blocks sent for ahead")],
            versus: Vec::new(),
            aims: vec![Aim { contender: OURS, metric: Metric::Hidden, target: Target::AtLeast(0.8) }],
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }

    pub(super) fn link_bytes(&self) -> Benchmark {
        const SPARSE: &str = "sparse, hint";
        const REPLICATED: &str = "replicated";
        const TURNS: &str = "ping-pong";
        let plan = |id, job, hints, data, what: &str| {
            self.roomy(id, Kind::Traffic { job, hints, link: self.link }, data, what)
        };
        let (much, some) = (self.sizes.host / 2, (self.sizes.host / 16).next_multiple_of(2 * MIB));
        let pairs = [(SPARSE, "sparse"), ("read-mostly, hint", "read-mostly"), ("stream, hint", "stream")];
        let versus = |(subject, reference): (&'static str, &'static str)| {
            [(Metric::Took, Sense::Speed), (Metric::OverLink, Sense::Amount)].map(|(metric, sense)| Versus {
                subject,
                reference,
                metric,
                sense,
                target: None,
            })
        };
        let aim = |contender, metric, target| Aim { contender, metric, target };
        Benchmark {
            name: "link-bytes",
            about: format!("what goes over the links of accelerators, each behind {}", self.behind()),
            contenders: vec![
                plan(
                    SPARSE,
                    Job::Sparse,
                    true,
                    much,
                    "8-byte reads at random, the region is said to be accessed in place",
                ),
                plan("sparse", Job::Sparse, false, much, "the same, nothing is said"),
                plan(
                    REPLICATED,
                    Job::ReadOnly,
                    true,
                    some,
                    "two read all of it four times, it is said to be mostly read",
                ),
                plan(
                    "read-mostly, hint",
                    Job::ReadMostly,
                    true,
                    some,
                    "the same, and the CPU writes a word after each time",
                ),
                plan("read-mostly", Job::ReadMostly, false, some, "the same, nothing is said"),
                plan("stream, hint", Job::Stream, true, much, "block after block is read, four are sent for ahead"),
                plan("stream", Job::Stream, false, much, "the same, nothing is said"),
                plan(TURNS, Job::PingPong, true, 2 * MIB, "the CPU and an accelerator write to a page in turns"),
            ],
            versus: pairs.into_iter().flat_map(versus).collect(),
            aims: vec![
                aim(SPARSE, Metric::ByAsked, Target::AtMost(1.0)),
                aim(REPLICATED, Metric::ByReader, Target::AtMost(1.0)),
                aim(REPLICATED, Metric::ByReader, Target::AtLeast(1.0)),
                aim(TURNS, Metric::ByTurns, Target::AtMost(0.1)),
            ],
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }
}
