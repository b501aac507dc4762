//! Results for people: a table per benchmark.

use crate::catalogue::{Benchmark, Sense, Target};
use crate::results::{BenchmarkResult, ContenderResult, Judged, Measured, Spread};
use crate::spec::Metric;
use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};
use std::io::IsTerminal;

/// The width where there is no terminal that has one.
const WIDTH: u16 = 160;

/// The results of a benchmark as a table.
pub(crate) fn of(result: &BenchmarkResult) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() {
        table.set_width(WIDTH);
    }
    table.set_header(["contender", "what", "evicts", "measured [min..max]", "ours by it [min..max]", "target"]);
    for c in &result.contenders {
        table.add_row(row(result, c));
    }
    // Lines of these belong together and must not be broken; the description can be.
    for i in [0, 2, 3, 4, 5] {
        if let Some(column) = table.column_mut(i) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    format!("{}: {}\n{table}", result.name, result.about)
}

/// One contender, with a line for each of its metrics.
fn row(result: &BenchmarkResult, c: &ContenderResult) -> [String; 6] {
    let evicts = if c.eviction_on_path { "yes" } else { "no" };
    let [mut measured, mut against, mut targets] = [Vec::new(), Vec::new(), Vec::new()];
    let out = [("FAILED", &c.failed), ("skipped", &c.skipped)];
    measured.extend(out.iter().filter_map(|(word, why)| Some(broken(&format!("{word}: {}", why.as_ref()?)))));
    for m in &c.metrics {
        let lines = compared(result, c.id, m);
        measured.push(format!("{} {}", spread(&m.spread), m.label));
        measured.extend(lines.iter().skip(1).map(|_| String::new()));
        if lines.is_empty() {
            against.push(String::new());
            targets.push(String::new());
        }
        for (ratio, target) in lines {
            against.push(ratio);
            targets.push(target);
        }
    }
    let [measured, against, targets] = [measured, against, targets].map(|lines| lines.join("\n"));
    [c.id.into(), c.what.clone(), evicts.into(), measured, against, targets]
}

/// A sentence in lines that leave room for other columns.
fn broken(sentence: &str) -> String {
    const LINE: usize = 44;
    let mut text = String::new();
    let mut used = 0;
    for word in sentence.split_whitespace() {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > LINE {
            text.push('\n');
            used = 0;
        } else if used > 0 {
            text.push(' ');
            used += 1;
        }
        text.push_str(word);
        used += len;
    }
    text
}

/// How ours, in one way or several, compare with contender `id` in this metric, and what is aimed at.
fn compared(result: &BenchmarkResult, id: &str, m: &Measured) -> Vec<(String, String)> {
    let ratios = result.ratios.iter().filter(|r| r.reference == id && r.metric == m.metric).map(|r| {
        let of = match r.of {
            Sense::Time => "the time",
            Sense::Speed => "the speed",
            Sense::Amount => "as much",
        };
        let s = &r.spread;
        // That it is ours is said in the header; which one of ours, if there are several, is not.
        let whose = match r.subject.strip_prefix("ours") {
            Some(which) => which.to_owned(),
            None => format!(", {}", r.subject),
        };
        let text = format!("{:.2}x {of} [{:.2}..{:.2}]{whose}", s.median, s.min, s.max);
        (text, r.target.map(|t| judged(&t, "x")).unwrap_or_default())
    });
    let values = result.values.iter().filter(|v| v.contender == id && v.metric == m.metric);
    ratios.chain(values.map(|v| (String::new(), judged(&v.target, "")))).collect()
}

fn spread(s: &Spread) -> String {
    format!("{} [{}..{}]", number(s.median), number(s.min), number(s.max))
}

/// Three digits that matter.
pub(crate) fn number(x: f64) -> String {
    match x.abs() {
        n if n >= 100.0 || n == 0.0 => format!("{x:.0}"),
        n if n >= 10.0 => format!("{x:.1}"),
        n if n >= 1.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

fn judged(t: &Judged, unit: &str) -> String {
    let met = if t.met { "met" } else { "missed" };
    match t.target {
        Target::AtMost(x) => format!("<= {}{unit}: {met}", short(x)),
        Target::AtLeast(x) => format!(">= {}{unit}: {met}", short(x)),
    }
}

/// A target as it was written.
fn short(x: f64) -> String {
    if x >= 100.0 { format!("{x:.0}") } else { format!("{x}") }
}

/// The benchmarks, their contenders and their targets, without results.
pub(crate) fn list(benchmarks: &[Benchmark]) -> String {
    let mut text = String::new();
    for b in benchmarks {
        text += &format!("{}: {}\n", b.name, b.about);
        for c in &b.contenders {
            text += &format!("    {}: {}\n", c.id, c.what);
        }
        for v in &b.versus {
            let sense = match v.sense {
                Sense::Time => "time",
                Sense::Speed => "speed",
                Sense::Amount => "amount",
            };
            if let Some(t) = v.target {
                text += &format!("    target: {sense} of {} by {} {}x\n", v.subject, v.reference, bound(t));
            }
        }
        for a in &b.aims {
            text += &format!("    target: {} {} {}\n", a.contender, Metric::label(a.metric), bound(a.target));
        }
    }
    text
}

fn bound(t: Target) -> String {
    match t {
        Target::AtMost(x) => format!("<= {}", short(x)),
        Target::AtLeast(x) => format!(">= {}", short(x)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_broken_between_words() {
        let sentence = "skipped: only root can set up swap and a memory cgroup, which takes some privileges";
        let lines = broken(sentence);
        assert!(lines.lines().count() == 2 && lines.lines().all(|l| l.chars().count() <= 44), "{lines}");
        assert_eq!(lines.replace('\n', " "), sentence);
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(["0", "0.123", "1.23", "12.3", "1235"], [0.0, 0.1234, 1.234, 12.34, 1234.6].map(number)[..]);
    }
}
