//! What the command line can say.

use crate::catalogue;
use clap::builder::PossibleValuesParser;
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

    /// Be a contender.
    #[arg(long, hide = true, value_name = "SPEC")]
    pub(crate) contender: Option<String>,

    /// Be the steward.
    #[arg(long, hide = true)]
    pub(crate) steward: bool,
}
