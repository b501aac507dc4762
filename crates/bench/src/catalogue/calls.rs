//! The benchmarks of what the program does to its own memory when some of it is on an accelerator (rules G5, G12).

use super::{Benchmark, MIB, Make, Plan, Sense, Target, Versus};
use crate::spec::{Call, Kind, Metric};

impl Make<'_> {
    fn call(&self, id: &'static str, ours: bool, call: Call, data: u64, what: &str) -> Plan {
        self.roomy(id, Kind::Calls { ours, call }, data, what)
    }

    fn slower(subject: &'static str, reference: &'static str, most: Option<f64>) -> Versus {
        Versus { subject, reference, metric: Metric::PerCall, sense: Sense::Time, target: most.map(Target::AtMost) }
    }

    pub(super) fn fork(&self) -> Benchmark {
        let data = self.sizes.data;
        Benchmark {
            name: "fork",
            about: format!("a process with {} MiB forks, and the child ends at once", data / MIB),
            contenders: vec![
                self.call("small pages", true, Call::ForkSmall, data, "half of it is on an accelerator"),
                self.call("small pages, plain", false, Call::ForkSmall, data, "memory of the kernel's alone"),
                self.call("huge pages", true, Call::Fork, data, "half of it is on an accelerator"),
                self.call("huge pages, plain", false, Call::Fork, data, "memory of the kernel's alone"),
            ],
            versus: vec![
                Self::slower("small pages", "small pages, plain", Some(1.5)),
                Self::slower("huge pages", "huge pages, plain", Some(1.5)),
            ],
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[1],
        }
    }

    pub(super) fn unmap(&self) -> Benchmark {
        let large = 64 * MIB;
        let pairs: [(&'static str, &'static str, Call, u64, Option<f64>); 4] = [
            ("munmap, 64 MiB away", "munmap, 64 MiB", Call::Unmap, large, Some(2.0)),
            ("mremap, 64 MiB away", "mremap, 64 MiB", Call::Move, large, Some(2.0)),
            ("munmap, a page away", "munmap, a page", Call::Unmap, 4096, None),
            ("mremap, a page away", "mremap, a page", Call::Move, 4096, None),
        ];
        let plans = pairs.into_iter().flat_map(|(ours, plain, call, data, _)| {
            [
                self.call(ours, true, call, data, "on an accelerator, in memory that the space has adopted"),
                self.call(plain, false, call, data, "resident, memory of the kernel's alone"),
            ]
        });
        Benchmark {
            name: "unmap",
            about:
                "munmap and mremap of memory that is on an accelerator, and of resident memory; beside each what it \
                    takes to ask another thread and hear its answer"
                    .into(),
            contenders: plans.collect(),
            versus: pairs.into_iter().map(|(ours, plain, _, _, most)| Self::slower(ours, plain, most)).collect(),
            aims: Vec::new(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }
}
