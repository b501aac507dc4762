//! `peerspace-bench`: the benchmarks as a program of their own.

use clap::Parser;
use peerspace_bench::Args;
use std::process::ExitCode;

/// Measures peerspace against the kernel's own swap and against the least a pager can cost.
#[derive(Debug, Parser)]
#[command(version)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn main() -> ExitCode {
    peerspace_bench::main_with(&Command::parse().args, &[])
}
