//! The benchmark of the C library: what a call takes more through C.

use super::{Aim, Benchmark, Make, Target};
use crate::spec::{CCall, Kind, Metric};

impl Make<'_> {
    pub(super) fn c_call(&self) -> Benchmark {
        let calls = [
            ("lookup", CCall::Lookup, "where a region is, and its bytes"),
            ("pin", CCall::Pin, "a page is kept resident, and let go"),
            ("statistics", CCall::Statistics, "numbers of a device"),
        ];
        let plan = |(id, call, what): (&'static str, CCall, &str)| {
            self.with_room(
                id,
                Kind::CCall(call),
                &format!("{what}: through a function of the C library, and without"),
            )
        };
        // What a call takes is known to a nanosecond or so; the work of longer ones is not.
        let aims = calls[..2].iter();
        Benchmark {
            name: "c-call",
            about: "what calls take more through the C library: handles looked up, panics and callbacks kept out"
                .into(),
            contenders: calls.into_iter().map(plan).collect(),
            versus: Vec::new(),
            aims: aims
                .map(|(contender, ..)| Aim { contender, metric: Metric::AddedByC, target: Target::AtMost(20.0) })
                .collect(),
            fresh: false,
            rounds: self.sizes.rounds[0],
        }
    }
}
