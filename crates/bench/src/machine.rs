//! What the numbers were measured on.

use serde::Serialize;
use std::fs;

/// The facts about a machine that its numbers depend on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Machine {
    pub(crate) processors: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    pub(crate) page_bytes: u64,
    pub(crate) huge_pages: String,
    pub(crate) memory_bytes: u64,
    /// What else the machine was doing: runnable threads, averaged over the minute before the start.
    pub(crate) load: f64,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let load = read("/proc/loadavg");
        Machine {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown").to_owned(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            page_bytes: rustix::param::page_size() as u64,
            // The mode in use is in brackets.
            huge_pages: huge
                .split_whitespace()
                .find_map(|m| m.strip_prefix('[')?.strip_suffix(']'))
                .unwrap_or("none")
                .to_owned(),
            memory_bytes: field(&read("/proc/meminfo"), "MemTotal")
                .and_then(|kb| kb.trim_end_matches("kB").trim().parse::<u64>().ok())
                .map_or(0, |kb| kb * 1024),
            load: load.split_whitespace().next().and_then(|l| l.parse().ok()).unwrap_or(0.0),
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} x {}, {:.1} GiB, Linux {}, pages of {} KiB, huge pages: {}, load before: {:.2}",
            self.processors,
            self.processor,
            self.memory_bytes as f64 / (1u64 << 30) as f64,
            self.kernel,
            self.page_bytes / 1024,
            self.huge_pages,
            self.load,
        )
    }
}

/// The value of the first `name : value` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|l| {
        let (key, value) = l.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_where_they_stand() {
        let text = "MemTotal:       24616968 kB\nMemFree: 1 kB\nmodel name\t: AMD EPYC\n";
        assert_eq!(field(text, "MemTotal"), Some("24616968 kB"));
        assert_eq!(field(text, "model name"), Some("AMD EPYC"));
        assert_eq!(field(text, "missing"), None);
        let here = Machine::look();
        assert!(here.processors > 0 && here.page_bytes >= 4096 && here.memory_bytes > 1 << 20);
    }
}
