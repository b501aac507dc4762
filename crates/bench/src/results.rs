//! What came out: numbers with their spread, ratios formed round by round, and whether targets are met.
//!
//! This is what is written as JSON; the crate's documentation describes it field by field.

use crate::catalogue::{Aim, Sense, Target, Versus};
use crate::machine::Machine;
use crate::spec::{Metric, Sample};
use serde::{Serialize, Serializer};

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: u32,
    pub(crate) version: &'static str,
    pub(crate) quick: bool,
    pub(crate) machine: Machine,
    pub(crate) benchmarks: Vec<BenchmarkResult>,
}

/// One benchmark.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BenchmarkResult {
    pub(crate) name: &'static str,
    pub(crate) about: String,
    pub(crate) rounds: u32,
    pub(crate) contenders: Vec<ContenderResult>,
    pub(crate) ratios: Vec<Ratio>,
    pub(crate) values: Vec<Value>,
}

/// One contender.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ContenderResult {
    pub(crate) id: &'static str,
    pub(crate) what: String,
    pub(crate) data_bytes: u64,
    pub(crate) host_bytes: u64,
    pub(crate) eviction_on_path: bool,
    pub(crate) skipped: Option<String>,
    pub(crate) failed: Option<String>,
    pub(crate) verified_words: u64,
    pub(crate) metrics: Vec<Measured>,
}

/// A metric of a contender.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Measured {
    pub(crate) metric: Metric,
    pub(crate) label: &'static str,
    #[serde(flatten)]
    pub(crate) spread: Spread,
}

/// A comparison.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ratio {
    pub(crate) subject: &'static str,
    pub(crate) reference: &'static str,
    pub(crate) metric: Metric,
    #[serde(serialize_with = "sense")]
    pub(crate) of: Sense,
    #[serde(flatten)]
    pub(crate) spread: Spread,
    pub(crate) target: Option<Judged>,
}

/// A number aimed at for itself.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Value {
    pub(crate) contender: &'static str,
    pub(crate) metric: Metric,
    #[serde(flatten)]
    pub(crate) spread: Spread,
    pub(crate) target: Judged,
}

/// Samples in the order of the rounds, and what they come to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) samples: Vec<f64>,
}

/// A target, and whether the median meets it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Judged {
    #[serde(flatten, serialize_with = "target")]
    pub(crate) target: Target,
    pub(crate) met: bool,
}

fn sense<S: Serializer>(sense: &Sense, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(match sense {
        Sense::Time => "time",
        Sense::Speed => "speed",
        Sense::Amount => "amount",
    })
}

fn target<S: Serializer>(target: &Target, to: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeMap;
    let mut map = to.serialize_map(Some(1))?;
    match target {
        Target::AtMost(x) => map.serialize_entry("at_most", x)?,
        Target::AtLeast(x) => map.serialize_entry("at_least", x)?,
    }
    map.end()
}

impl Spread {
    /// Of samples, of which there is one at least.
    pub(crate) fn of(samples: Vec<f64>) -> Option<Spread> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let n = sorted.len();
        let median = if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0 };
        Some(Spread { median, min, max, samples })
    }
}

impl Target {
    /// Judges `spread` by its median.
    pub(crate) fn judge(self, spread: &Spread) -> Judged {
        let met = match self {
            Target::AtMost(x) => spread.median <= x,
            Target::AtLeast(x) => spread.median >= x,
        };
        Judged { target: self, met }
    }
}

/// All metrics that are in `samples`, each with its spread.
pub(crate) fn measured(samples: &[Sample]) -> Vec<Measured> {
    let Some(first) = samples.first() else { return Vec::new() };
    let of = |metric: Metric| {
        let spread = Spread::of(column(samples, metric))?;
        Some(Measured { metric, label: metric.label(), spread })
    };
    first.metrics.keys().filter_map(|m| of(*m)).collect()
}

fn column(samples: &[Sample], metric: Metric) -> Vec<f64> {
    samples.iter().filter_map(|s| s.metrics.get(&metric).copied()).collect()
}

/// Compares the samples of two contenders, each with the one of the same round.
pub(crate) fn ratio(versus: &Versus, subject: &[Sample], reference: &[Sample]) -> Option<Ratio> {
    let own = column(subject, versus.metric);
    let other = column(reference, versus.metric);
    // Speed is what there is more of where more is better, and the inverse of a time otherwise.
    let inverse = (versus.sense == Sense::Speed) != versus.metric.more_is_better();
    let ratios = own.iter().zip(&other).map(|(a, b)| if inverse { b / a } else { a / b }).collect();
    let spread = Spread::of(ratios)?;
    Some(Ratio {
        subject: versus.subject,
        reference: versus.reference,
        metric: versus.metric,
        of: versus.sense,
        target: versus.target.map(|t| t.judge(&spread)),
        spread,
    })
}

/// What became of a number that is aimed at.
pub(crate) fn value(aim: &Aim, samples: &[Sample]) -> Option<Value> {
    let spread = Spread::of(column(samples, aim.metric))?;
    Some(Value { contender: aim.contender, metric: aim.metric, target: aim.target.judge(&spread), spread })
}

impl Report {
    /// Whether a contender went wrong.
    pub(crate) fn any_failed(&self) -> bool {
        self.benchmarks.iter().any(|b| b.contenders.iter().any(|c| c.failed.is_some()))
    }

    /// Targets met, and all that could be judged.
    pub(crate) fn targets(&self) -> (usize, usize) {
        let judged = self.benchmarks.iter().flat_map(|b| {
            let ratios = b.ratios.iter().filter_map(|r| r.target);
            ratios.chain(b.values.iter().map(|v| v.target))
        });
        judged.fold((0, 0), |(met, all), j| (met + j.met as usize, all + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(metric: Metric, values: &[f64]) -> Vec<Sample> {
        values.iter().map(|v| Sample::verified(1).with(metric, *v)).collect()
    }

    #[test]
    fn a_spread_has_the_middle_and_both_ends() {
        let s = Spread::of(vec![3.0, 1.0, 10.0]).unwrap();
        assert_eq!((s.median, s.min, s.max), (3.0, 1.0, 10.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn ratios_are_formed_within_a_round() {
        // Everything is twice as slow in the second round: the ratio does not see it.
        let versus = |metric, sense| Versus {
            subject: "a",
            reference: "b",
            metric,
            sense,
            target: Some(Target::AtLeast(2.0)),
        };
        let time = Metric::PerFault;
        let (a, b) = (samples(time, &[1.0, 2.0, 1.0]), samples(time, &[2.0, 4.0, 2.5]));
        let r = ratio(&versus(time, Sense::Speed), &a, &b).unwrap();
        assert_eq!(r.spread.samples, [2.0, 2.0, 2.5]);
        assert!(r.target.unwrap().met);
        let r = ratio(&versus(time, Sense::Time), &a, &b).unwrap();
        assert_eq!(r.spread.samples, [0.5, 0.5, 0.4]);
        assert!(!r.target.unwrap().met);
        let rate = Metric::Throughput;
        let r = ratio(&versus(rate, Sense::Speed), &samples(rate, &[6.0]), &samples(rate, &[3.0])).unwrap();
        assert_eq!(r.spread.median, 2.0);
        assert!(ratio(&versus(rate, Sense::Speed), &samples(rate, &[6.0]), &[]).is_none());
    }

    #[test]
    fn json_says_targets_in_words() {
        let value = value(
            &Aim { contender: "a", metric: Metric::StoredAgain, target: Target::AtMost(0.0) },
            &samples(Metric::StoredAgain, &[0.0]),
        );
        let json = serde_json::to_value(value.unwrap()).unwrap();
        assert_eq!(json["target"]["at_most"], 0.0);
        assert_eq!(json["target"]["met"], true);
        assert_eq!(json["metric"], "stored_again");
        assert_eq!(json["median"], 0.0);
    }
}
