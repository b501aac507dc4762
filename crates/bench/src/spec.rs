//! What a contender is, what it is told to do and what it answers: the words that pass between the parent and the
//! processes of the contenders, as lines of JSON.
//!
//! ```text
//!  parent                                child (the same program, started with a Spec)
//!    |  <------------ Answer::Ready ------  set up: memory warmed, data written
//!    |  ------------- Work ------------->
//!    |  <------------ Answer::Done -------  one sample
//!    |                 ...
//!    |  ------------- end of input ----->   takes everything down and exits
//! ```

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Everything the process of a contender has to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Which contender.
    pub(crate) kind: Kind,
    /// Bytes of data.
    pub(crate) data: u64,
    /// Bytes of RAM for them.
    pub(crate) host: u64,
    /// Where files go.
    pub(crate) dir: PathBuf,
    /// The `cgroup.procs` to enter before there is any data.
    pub(crate) cgroup: Option<PathBuf>,
}

/// A device of ours, as far as the benchmarks tell devices apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DeviceKind {
    /// Plain memory.
    Soft,
    /// Compressed memory.
    Compressed,
    /// A file.
    File,
}

/// The kinds of contenders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A space of ours, with one device.
    Ours(DeviceKind),
    /// The raw floor over memory: the least a pager can cost. Pages of 4 KiB or of 2 MiB, compressed or not.
    Floor {
        /// In units of 2 MiB.
        huge: bool,
        /// Compresses what it stores.
        lz4: bool,
    },
    /// The raw floor over a file.
    FloorFile,
    /// Plain memory in a memory cgroup, with the kernel's swap behind it.
    Swap {
        /// Asks for huge pages.
        huge: bool,
    },
    /// Copies the data, and reads the copy.
    Copy,
    /// Reads the data from a file, one page per access.
    Pread,
    /// What a space of ours needs for itself.
    Footprint,
    /// What a device of 1 TiB costs a space.
    Attach,
    /// Somebody who sends memory to a coherent device and brings it home: a space (true), or system calls.
    Place(bool),
    /// A process that does nothing (false), or makes a space and a region (true).
    Start(bool),
    /// A space of ours, with one device, that is told to use small pages alone.
    OursSmall(DeviceKind),
    /// Somebody who makes huge pages of small ones.
    Collapse(Collapser),
    /// Somebody who unmaps and maps huge pages.
    Turnover(Mover),
    /// A program in a space that uses its memory densely in the end (true), or sparsely all the time (false).
    Turn {
        /// Densely in the end.
        dense: bool,
    },
    /// Somebody who sends memory there and back, so many bytes at a time: a space to an accelerator (true), or memcpy.
    Migrate {
        /// A space.
        ours: bool,
        /// Bytes that are asked for, and waited for, at once.
        piece: u64,
    },
    /// Somebody who touches pages in random order: an accelerator (true), or the CPU.
    Touch {
        /// An accelerator.
        device: bool,
        /// What the pages are before.
        on: Found,
    },
    /// A program that calls the kernel about its memory: some of it on an accelerator (true), or none.
    Calls {
        /// Some of it is on an accelerator.
        ours: bool,
        /// What it calls.
        call: Call,
    },
    /// An accelerator behind a link, which works on a stream of blocks from the host.
    Stream(LinkSpeed),
    /// A program that shares memory with accelerators behind links. Counts what goes over them.
    Traffic {
        /// What it does.
        job: Job,
        /// It says how it is going to use its memory.
        hints: bool,
        /// How fast they are reached.
        link: LinkSpeed,
    },
    /// Somebody who makes the same calls through the C library, and without.
    CCall(CCall),
}

/// A call that can be made through C, and without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CCall {
    /// Where a region is.
    Lookup,
    /// A page is kept resident, and let go: two calls.
    Pin,
    /// The numbers of a device.
    Statistics,
}

/// What a program does to its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Call {
    /// Forks, with half of it away.
    Fork,
    /// The same, in pages of the least size.
    ForkSmall,
    /// Unmaps all of it, all of it away.
    Unmap,
    /// Moves all of it, all of it away.
    Move,
}

/// How fast an accelerator is reached, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkSpeed {
    /// Bytes each second.
    pub(crate) bytes_per_second: u64,
    /// Nanoseconds until the first byte of a transfer.
    pub(crate) latency_ns: u64,
}

/// What somebody who touches a page finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Found {
    /// Nobody has touched it before.
    Zeros,
    /// It is in a device that is memory alone.
    Stored,
    /// The other one, of the CPU and the accelerator, has it mapped.
    Mapped,
}

/// What a program does with its accelerators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    /// One reads words at random.
    Sparse,
    /// Two read all of it in turns, and now and then the CPU writes a word.
    ReadMostly,
    /// Two read all of it in turns, and nobody writes.
    ReadOnly,
    /// One works on all of it, block after block.
    Stream,
    /// The CPU and one write to the same page in turns. With hints, the accelerator can access it where it is.
    PingPong,
}

/// Who makes huge pages of small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Collapser {
    /// A space.
    Ours,
    /// The kernel.
    Kernel,
    /// Nobody: copying and moving alone, which is the least it can cost.
    Least,
}

/// Who unmaps and maps huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mover {
    /// A space that is asked to.
    Asked,
    /// A space that is asked to unmap, and maps what is touched.
    Touched,
    /// The system call alone.
    Raw,
}

/// What a contender shall do once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Work {
    /// Read all data in order.
    Sequential,
    /// Read words of random pages.
    Random {
        /// How many.
        accesses: u64,
    },
    /// With data out of RAM and room for all of them: read a word of each of so many pages, in random order.
    Absent {
        /// How many.
        accesses: u64,
    },
    /// Whatever the contender is made for.
    Own,
}

/// What is measured. The order is that of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    /// GB/s of data read.
    Throughput,
    /// Microseconds per access, hits included.
    PerAccess,
    /// Microseconds per access that had to fetch data.
    PerFault,
    /// Milliseconds of processor time (user and system, all threads) per GB read.
    CpuPerGb,
    /// Microseconds of processor time per access that had to fetch data.
    CpuPerFault,
    /// Processor time by wall time.
    Cores,
    /// Pages written to where data live outside of RAM although they had been written there and not changed since.
    StoredAgain,
    /// Bytes of our own per 2 MiB of managed memory in whole blocks.
    BytesWhole,
    /// The same for blocks that are split, with all of their pages in RAM.
    BytesSplit,
    /// The same for blocks that are split, with hardly a page in RAM.
    BytesSplitAway,
    /// Bytes of our own, all of them, before there is much data.
    BytesFixed,
    /// Milliseconds to make a space and a region.
    SpaceTime,
    /// Milliseconds from starting the process until it is ready.
    ProcessTime,
    /// Milliseconds to attach a device.
    AttachTime,
    /// Bytes of RAM that an attached device takes up before any page of it is used.
    AttachBytes,
    /// Milliseconds to detach a device, with what is on it.
    DetachTime,
    /// Bytes of descriptors for each GiB of a device that is used in huge folios.
    DescriptorsHuge,
    /// The same in pages.
    DescriptorsSmall,
    /// GB/s of blocks that are sent to a device.
    Sent,
    /// GB/s of blocks that are brought home.
    Fetched,
    /// Bytes of host memory that describe each GiB in place.
    DescriptorsHost,
    /// Bytes of the device's own memory that do.
    DescriptorsOwn,
    /// Microseconds for each 2 MiB that are treated as one.
    PerBlock,
    /// Of those, for unmapping.
    OutPerBlock,
    /// Of those, for mapping.
    BackPerBlock,
    /// How much of the memory in use is in huge pages.
    HugeShare,
    /// Milliseconds until that was so.
    UntilHuge,
    /// RAM in use beyond what the program has touched, by what it has touched.
    Waste,
    /// Nanoseconds that half of the faults took no longer than.
    FaultMedian,
    /// Milliseconds of work on data that are where it is done.
    Resident,
    /// Milliseconds of the same work on data that come when they are touched.
    OnDemand,
    /// Milliseconds of the same work on data that are sent for ahead.
    Prefetched,
    /// Blocks that had not come yet when they were touched, although they had been sent for.
    Late,
    /// How much of the time that data take to come does not show when they are sent for ahead.
    Hidden,
    /// Milliseconds of work.
    Took,
    /// MiB over the links of all accelerators.
    OverLink,
    /// Bytes over the link by the bytes that were asked for.
    ByAsked,
    /// Bytes over the links by what each of the readers reads, once.
    ByReader,
    /// Times that a page went to the accelerator, by the turns of the two that write to it.
    ByTurns,
    /// Microseconds of a call.
    PerCall,
    /// Microseconds until another thread has been asked and has answered.
    RoundTrip,
    /// Nanoseconds for a call, directly.
    PerCallDirect,
    /// Nanoseconds for the same through the C library.
    PerCallByC,
    /// What that is more.
    AddedByC,
}

impl Metric {
    /// The name in tables.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Metric::Throughput => "GB/s",
            Metric::PerAccess => "us/access",
            Metric::PerFault => "us/fault",
            Metric::CpuPerGb => "cpu ms/GB",
            Metric::CpuPerFault => "cpu us/fault",
            Metric::Cores => "cores busy",
            Metric::StoredAgain => "pages stored again",
            Metric::BytesWhole => "own bytes per 2 MiB, whole, away",
            Metric::BytesSplit => "own bytes per 2 MiB, split, in RAM",
            Metric::BytesSplitAway => "own bytes per 2 MiB, split, away",
            Metric::BytesFixed => "own bytes before any data",
            Metric::SpaceTime => "ms for space and region",
            Metric::ProcessTime => "ms from start of process",
            Metric::AttachTime => "ms to attach 1 TiB",
            Metric::AttachBytes => "bytes of RAM for it",
            Metric::DetachTime => "ms to detach it with its data",
            Metric::DescriptorsHuge => "bytes/GiB, in huge folios",
            Metric::DescriptorsSmall => "bytes/GiB, in pages",
            Metric::Sent => "GB/s there",
            Metric::Fetched => "GB/s home",
            Metric::DescriptorsHost => "host bytes/GiB for descriptors",
            Metric::DescriptorsOwn => "its own",
            Metric::PerBlock => "us/2 MiB",
            Metric::OutPerBlock => "of it unmapping",
            Metric::BackPerBlock => "of it mapping",
            Metric::HugeShare => "of it in huge pages",
            Metric::UntilHuge => "ms until then",
            Metric::Waste => "RAM wasted, by what is used",
            Metric::FaultMedian => "ns/fault, p50",
            Metric::Resident => "ms, all of it there",
            Metric::OnDemand => "ms, on demand",
            Metric::Prefetched => "ms, prefetched",
            Metric::Late => "blocks late",
            Metric::Hidden => "of the transfer hidden",
            Metric::Took => "ms",
            Metric::OverLink => "MiB over links",
            Metric::ByAsked => "bytes by bytes asked for",
            Metric::ByReader => "bytes by bytes and readers",
            Metric::ByTurns => "moves by turns",
            Metric::PerCall => "us",
            Metric::RoundTrip => "us to ask a thread",
            Metric::PerCallDirect => "ns/call",
            Metric::PerCallByC => "ns/call through C",
            Metric::AddedByC => "ns added by C",
        }
    }

    /// True where more is better.
    pub(crate) const fn more_is_better(self) -> bool {
        matches!(self, Metric::Throughput | Metric::Sent | Metric::Fetched | Metric::HugeShare | Metric::Hidden)
    }
}

/// One measurement of a contender.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// The numbers.
    pub(crate) metrics: BTreeMap<Metric, f64>,
    /// Words that were read and found right.
    pub(crate) verified: u64,
}

impl Sample {
    /// A sample of nothing yet, with `verified` words found right.
    pub(crate) fn verified(verified: u64) -> Sample {
        Sample { metrics: BTreeMap::new(), verified }
    }

    /// The same with one more number.
    pub(crate) fn with(mut self, metric: Metric, value: f64) -> Sample {
        self.metrics.insert(metric, value);
        self
    }
}

/// What the process of a contender says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// It is set up. What only it could find out about itself.
    Ready(Option<String>),
    /// It cannot be had here.
    Unavailable(String),
    /// It did what it was told.
    Done(Sample),
    /// Something went wrong.
    Failed(String),
    /// It read something that was not written.
    Wrong(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_between_processes_survive_the_pipe() {
        let spec = Spec {
            kind: Kind::Floor { huge: true, lz4: false },
            data: 1 << 30,
            host: 1 << 28,
            dir: "/tmp".into(),
            cgroup: None,
        };
        assert_eq!(serde_json::from_str::<Spec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
        let done = Answer::Done(Sample::verified(7).with(Metric::PerFault, 1.5).with(Metric::Cores, 1.0));
        assert_eq!(serde_json::from_str::<Answer>(&serde_json::to_string(&done).unwrap()).unwrap(), done);
    }
}
