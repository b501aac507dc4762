//! The `peerspace` command.
//!
//! | file | subject |
//! |---|---|
//! | [`run`] | runs a program with its memory bounded |
//! | [`program`] | what a program is, and whether it can be run so |
//! | [`library`] | the library that is preloaded into it |
//! | [`demo`] | shows all of it on real input |
//! | [`doctor`] | what this machine allows |
//! | [`devices`] | where memory can go |
//!
//! `bench` is [`peerspace_bench`]: a library, so that there is one command to install.

#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod demo;
mod devices;
mod doctor;
mod library;
mod program;
mod run;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// One address space for the CPU and every device.
///
/// Runs unmodified programs in less memory than they need: what does not fit into the budget lives compressed in RAM,
/// in a file, or on other devices, and comes back when it is touched.
#[derive(Debug, Parser)]
#[command(name = "peerspace", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run a program with its memory bounded to a budget.
    Run(run::RunArgs),
    /// See it work: sort a text in a quarter of the memory that takes.
    Demo(demo::DemoArgs),
    /// Measure it against the kernel's own swap and the least a pager can cost.
    Bench(peerspace_bench::Args),
    /// Find out what this machine allows, and what to do about what it does not.
    Doctor(doctor::DoctorArgs),
    /// List the devices that memory can live on.
    Devices(devices::DevicesArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Subcommands::Run(args) => run::run(args),
        Subcommands::Demo(args) => demo::demo(args),
        Subcommands::Bench(args) => return peerspace_bench::main_with(args, &["bench"]),
        Subcommands::Doctor(args) => Ok(doctor::doctor(args)),
        Subcommands::Devices(args) => Ok(devices::devices(args)),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(refusal) => {
            eprintln!("peerspace: {}", refusal.why);
            ExitCode::from(refusal.status)
        }
    }
}
