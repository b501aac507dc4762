//! `peerspace demo`: the main job, on real input, to be seen.
//!
//! Sorts a text with the system's own `sort`, once as usual and once with a quarter of the memory that took, and shows
//! both side by side: the same output, byte for byte.

use crate::run::{FaultsArg, Refusal, RunArgs, bytes, execute};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use peerspace::Size;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Options of `peerspace demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// A text to sort. Without it, lines are gathered from this system's own headers, scripts and documentation.
    file: Option<PathBuf>,

    /// How much text to gather.
    #[arg(long, value_name = "SIZE", default_value = "192M")]
    size: Size,
}

/// What one run showed.
struct Seen {
    took: Duration,
    peak: u64,
    sum: u128,
}

/// Shows it.
pub(crate) fn demo(args: &DemoArgs) -> Result<u8, Refusal> {
    let broken = |what: &str, e: std::io::Error| Refusal { status: 125, why: format!("{what}: {e}") };
    let dir = tempfile::tempdir().map_err(|e| broken("a temporary directory", e))?;
    let input = match &args.file {
        Some(file) => file.clone(),
        None => gather(dir.path(), args.size.0).map_err(|e| broken("gather text", e))?,
    };
    let size = fs::metadata(&input).map_err(|e| broken(&input.display().to_string(), e))?.len();
    println!("Sorting {} of text with `sort`, which keeps all of it in memory.\n", bytes(size));

    let plain_out = dir.path().join("plain");
    let plain = sort_plain(&input, &plain_out).map_err(|e| broken("sort", e))?;
    let host = (plain.peak / 4).max(peerspace::process::LEAST_HOST) >> 20 << 20;
    println!(
        "As usual it took {:.1} s and {} of RAM. Now with {}:",
        plain.took.as_secs_f64(),
        bytes(plain.peak),
        bytes(host)
    );

    let managed_out = dir.path().join("managed");
    let run = RunArgs {
        inject: Vec::new(),
        host: Size(host),
        devices: Vec::new(),
        faults: FaultsArg::Auto,
        report: None,
        stats: false,
        program: sort_command(&input, &managed_out),
    };
    let spinner = spinner("sorting in a quarter of the memory");
    let started = Instant::now();
    let ran = execute(&run, |c| {
        c.env("LC_ALL", "C");
    })?;
    let took = started.elapsed();
    spinner.finish_and_clear();
    if !ran.status.success() {
        return Err(Refusal { status: 125, why: format!("sort ended with {}", ran.status) });
    }
    let sum = checksum(&managed_out).map_err(|e| broken("read the result", e))?;
    let managed = Seen { took, peak: ran.record.host.peak_bytes, sum };
    println!("\n{}\n", compare(&plain, &managed));
    println!("{}", crate::run::summary(&ran.record));
    if plain.sum != managed.sum {
        return Err(Refusal { status: 125, why: "the outputs differ: this is a bug, please report it".into() });
    }
    println!("\nBoth outputs are the same, byte for byte.");
    Ok(0)
}

fn sort_command(input: &Path, output: &Path) -> Vec<std::ffi::OsString> {
    // All in memory, one thread: sort would otherwise divide the work to suit the memory there is.
    let mut command: Vec<std::ffi::OsString> = ["sort", "-S", "80%", "--parallel=1", "-o"].map(Into::into).into();
    command.push(output.into());
    command.push(input.into());
    command
}

fn sort_plain(input: &Path, output: &Path) -> std::io::Result<Seen> {
    let command = sort_command(input, output);
    let spinner = spinner("sorting as usual");
    let started = Instant::now();
    let mut child = Command::new(&command[0]).args(&command[1..]).env("LC_ALL", "C").spawn()?;
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak = peak.max(anonymous_memory(child.id()).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(10));
    };
    let took = started.elapsed();
    spinner.finish_and_clear();
    if !status.success() {
        return Err(std::io::Error::other(format!("it ended with {status}")));
    }
    Ok(Seen { took, peak, sum: checksum(output)? })
}

/// The anonymous memory of another process, as the kernel counts it.
fn anonymous_memory(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

fn checksum(path: &Path) -> std::io::Result<u128> {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.digest128()),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn compare(plain: &Seen, managed: &Seen) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["", "time", "RAM, peak", "output"]);
    for (name, seen) in [("as usual", plain), ("with peerspace", managed)] {
        table.add_row([
            Cell::new(name),
            Cell::new(format!("{:.1} s", seen.took.as_secs_f64())).set_alignment(CellAlignment::Right),
            Cell::new(bytes(seen.peak)).set_alignment(CellAlignment::Right),
            Cell::new(format!("{:016x}", seen.sum as u64)),
        ]);
    }
    table
}

fn spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").expect("the template is fixed"));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Collects lines of text from the system's own files until there are `size` bytes, going round as often as needed.
fn gather(dir: &Path, size: u64) -> std::io::Result<PathBuf> {
    let bar = ProgressBar::new(size).with_message("gathering text");
    bar.set_style(
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}").expect("the template is fixed"),
    );
    let path = dir.join("text");
    let mut out = BufWriter::new(File::create(&path)?);
    let mut written = 0;
    let mut round = 0u64;
    while written < size {
        let before = written;
        for root in ["/usr/include", "/usr/share", "/usr/lib", "/etc"] {
            let more = visit(Path::new(root), &mut |file| {
                written += copy_lines(file, &mut out, round, size - written).unwrap_or(0);
                bar.set_position(written);
                written < size
            });
            if !more {
                break;
            }
        }
        round += 1;
        if written == before {
            // A system without a single text file: numbers have to do.
            let line = format!("{:016x}\n", written.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            out.write_all(line.as_bytes())?;
            written += line.len() as u64;
        }
    }
    out.flush()?;
    bar.finish_and_clear();
    Ok(path)
}

/// Calls `each` with the files below `root` until it returns false. True if it never did.
fn visit(root: &Path, each: &mut impl FnMut(&Path) -> bool) -> bool {
    let Ok(entries) = fs::read_dir(root) else { return true };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(|e| e.file_name());
    entries.into_iter().all(|entry| match entry.file_type() {
        Ok(t) if t.is_dir() => visit(&entry.path(), each),
        Ok(t) if t.is_file() => each(&entry.path()),
        _ => true,
    })
}

/// Copies the lines of a text file, marked with the round so that no two are the same in different rounds.
fn copy_lines(file: &Path, out: &mut impl Write, round: u64, most: u64) -> std::io::Result<u64> {
    let mut written = 0;
    for line in BufReader::new(File::open(file)?.take(1 << 20)).lines() {
        // What is not text ends here.
        let line = line?;
        if line.trim().len() < 8 || line.len() > 400 {
            continue;
        }
        let text = if round == 0 { format!("{line}\n") } else { format!("{line} {round}\n") };
        out.write_all(text.as_bytes())?;
        written += text.len() as u64;
        if written >= most {
            break;
        }
    }
    Ok(written)
}
