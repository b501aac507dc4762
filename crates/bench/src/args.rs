//! What the command line can say.

use crate::catalogue;
use crate::spec::LinkSpeed;
use clap::builder::PossibleValuesParser;
use peerspace::Size;
use std::path::PathBuf;

/// The arguments of the benchmarks, for any program that offers them.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// The benchmarks to run; all of them if none is named
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(catalogue::NAMES))]
    pub(crate) names: Vec<String>,

    /// Write the results to FILE as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Draw the results into FILE as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,

    /// List the benchmarks, their contenders and their targets, and run none
    #[arg(long)]
    pub(crate) list: bool,

    /// Small sizes and few rounds: to see that everything works, not to compare
    #[arg(long)]
    pub(crate) quick: bool,

    /// How often each contender is measured, after one round that does not count [default: 11 where a round
    /// is quick, 5 where it is not, 2 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,

    /// Where the benchmarks put their files: a directory on the disk to be measured [default: the temporary directory]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Bytes each second, with K, M, G or T (binary), of the links that accelerators are modelled to be behind, in each
    /// direction [default: 16000000000]
    #[arg(long, value_name = "SIZE")]
    pub(crate) link_bandwidth: Option<Size>,

    /// Microseconds until the first byte of a transfer over such a link [default: 5]
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub(crate) link_latency: Option<u64>,

    /// Be a contender.
    #[arg(long, hide = true, value_name = "SPEC")]
    pub(crate) contender: Option<String>,

    /// Be the steward.
    #[arg(long, hide = true)]
    pub(crate) steward: bool,
}

impl Args {
    /// How fast accelerators that are behind a link are reached.
    pub(crate) fn link(&self) -> LinkSpeed {
        LinkSpeed {
            bytes_per_second: self.link_bandwidth.map_or(16_000_000_000, |size| size.0),
            latency_ns: self.link_latency.unwrap_or(5) * 1000,
        }
    }
}
