//! A crash at every moment of random histories: whatever has become of the words that were not durable, the directory
//! opens, and says what it said before the change that was under way, or after it.

use super::*;
use proptest::prelude::*;
use std::ops::Range;

const DATA: u64 = 12;
/// Calls of a medium before a directory is made on it.
const PROBED: u64 = 512;

#[derive(Debug, Clone)]
enum Op {
    /// A region of so many blocks, called by its number.
    Create(u64, u64),
    Remove(u64),
    /// Its data is written and flushed.
    Fill(u64, u64),
    /// The process ends and another goes on.
    Reopen,
}

/// An operation, and how the medium fails it: the process goes on with the directory opened anew.
type Step = (Op, Option<(u64, Failure)>);

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..4u64;
    prop_oneof![
        5 => (name(), 1..5u64).prop_map(|(n, b)| Op::Create(n, b)),
        4 => name().prop_map(Op::Remove),
        3 => (name(), 1..u64::MAX).prop_map(|(n, x)| Op::Fill(n, x)),
        1 => Just(Op::Reopen),
    ]
}

fn failure() -> impl Strategy<Value = Option<(u64, Failure)>> {
    let kind = prop_oneof![Just(Failure::Once), Just(Failure::Half), Just(Failure::Dead), Just(Failure::Dead)];
    proptest::option::weighted(0.3, (0..8u64, kind))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((op(), failure()), 1..14)
}

/// What a directory says, and what the regions' data is: by name, the word that fills it. `None`: not known, it was
/// being written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    regions: Vec<Named>,
    data: BTreeMap<String, Option<u64>>,
}

/// Events of a medium while one thing was done, and what may be found if it crashes meanwhile. At the end of them it
/// is the state that the next phase begins with.
#[derive(Debug)]
struct Phase {
    events: Range<usize>,
    before: State,
    after: State,
}

/// Words that stand for the data of a block: no other is ever written.
fn samples(region: &Named) -> impl Iterator<Item = u64> {
    let blocks = region.extents.iter().flat_map(|e| e.block..e.block + e.blocks);
    blocks.flat_map(|b| [0, 8, BLOCK / 2 + 64, BLOCK - 8].map(|at| b * BLOCK + at))
}

fn name(number: u64) -> String {
    format!("region {number}")
}

/// Runs `steps` on `medium`, which has a directory of no region: what happened, phase by phase.
fn history(medium: &Model, steps: &[Step]) -> Vec<Phase> {
    let open = || Names::open(medium, shape(DATA)).expect("what a process left behind opens");
    let mut names = open();
    let mut phases: Vec<Phase> = Vec::new();
    let mut state = State::default();
    let mut begin = medium.log.borrow().len();
    let mut done = |before: &State, after: &State| {
        let end = medium.log.borrow().len();
        phases.push(Phase { events: begin..end, before: before.clone(), after: after.clone() });
        begin = end;
    };
    done(&state, &state);
    for (op, failure) in steps {
        // What would be, if all went well.
        let mut after = state.clone();
        medium.fail_after(*failure);
        let result = match op {
            Op::Create(number, blocks) => {
                let created =
                    names.create_region(&name(*number), blocks * BLOCK - number, |e| medium.zero(e)).cloned();
                after.data.insert(name(*number), Some(0));
                created.map(|region| after.regions.push(region))
            }
            Op::Remove(number) => {
                after.regions.retain(|r| r.name != name(*number));
                after.data.remove(&name(*number));
                names.remove(&name(*number))
            }
            Op::Fill(number, word) => {
                medium.fail_after(None);
                let Some(region) = names.find(&name(*number)) else { continue };
                after.data.insert(name(*number), Some(*word));
                let mut during = state.clone();
                during.data.insert(name(*number), None);
                for at in samples(region) {
                    medium.write(at, &word.to_le_bytes()).unwrap();
                }
                for extent in &region.extents {
                    medium.flush(extent.block * BLOCK, extent.blocks * BLOCK).unwrap();
                }
                done(&during, &during);
                Ok(())
            }
            Op::Reopen => {
                medium.fail_after(None);
                drop(names);
                names = open();
                Ok(())
            }
        };
        medium.fail_after(None);
        after.regions.sort_by(|a, b| a.name.cmp(&b.name));
        match result {
            Ok(()) => {
                assert_eq!(regions(&names), after.regions);
                done(&state, &after);
                state = after;
            }
            Err(NamesError::Exists { .. } | NamesError::Missing { .. } | NamesError::NoRoom { .. }) => {
                assert_eq!(regions(&names), state.regions);
            }
            Err(NamesError::Io { .. }) => {
                assert_eq!(regions(&names), state.regions, "what failed shows nowhere");
                // What another process sees then is what was written last, and it is what stays.
                drop(names);
                names = open();
                if let (Op::Create(number, blocks), true) = (op, regions(&names).len() > state.regions.len()) {
                    let made = names.find(&name(*number)).expect("what is more is the new one");
                    assert_eq!(made.bytes, blocks * BLOCK - number);
                    after.regions.push(made.clone());
                    after.regions.sort_by(|a, b| a.name.cmp(&b.name));
                }
                let found = if regions(&names) == state.regions { state.clone() } else { after };
                done(&state, &found);
                state = found;
                assert_eq!(regions(&names), state.regions);
            }
            Err(other) => panic!("{op:?}: {other}"),
        }
        check(&names, shape(DATA));
    }
    phases
}

/// What is durable of a medium, and what may be.
#[derive(Debug, Clone, Default)]
struct Durable {
    words: Words,
    /// What was written to words since they were flushed, in order: each of it may be there, or what was before.
    pending: BTreeMap<u64, Vec<u64>>,
}

impl Durable {
    fn apply(&mut self, event: &Event, random: &mut impl FnMut() -> u64) {
        match *event {
            Event::Word(at, word) => self.pending.entry(at).or_default().push(word),
            Event::Written => {}
            Event::Flushed(at, len) => {
                for (at, words) in self.pending.extract_if(at / 8 * 8..at + len, |_, _| true) {
                    self.words.extend(words.last().map(|word| (at, *word)));
                }
            }
            Event::FlushFailed(at, len) => {
                // Each word of it is durable now, or never will be.
                for (at, words) in self.pending.extract_if(at / 8 * 8..at + len, |_, _| true) {
                    self.words.extend(words.last().filter(|_| random().is_multiple_of(2)).map(|word| (at, *word)));
                }
            }
        }
    }

    /// What may be left of it.
    fn crashed(&self, mut choose: impl FnMut(usize) -> usize) -> Words {
        let mut left = self.words.clone();
        for (at, words) in &self.pending {
            let chosen = choose(words.len());
            if chosen > 0 {
                left.insert(*at, words[chosen - 1]);
            }
        }
        left.retain(|_, word| *word != 0);
        left
    }

    /// Several ways in which it may have ended: with nothing of what was pending, with all, and by chance.
    fn endings(&self, random: &mut impl FnMut() -> u64) -> Vec<Words> {
        let mut endings = vec![self.crashed(|_| 0)];
        if self.pending.is_empty() {
            return endings;
        }
        endings.push(self.crashed(|n| n));
        for odds in [2, 2, 8] {
            // Few words of eight, or most of them, or half.
            let most = random().is_multiple_of(2);
            endings.push(self.crashed(|n| {
                let taken = random().is_multiple_of(odds) != most;
                if taken { 1 + (random() % n as u64) as usize } else { 0 }
            }));
        }
        endings
    }
}

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x >> 11
    }
}

/// That what opens from `words` is one of `states`, data and all.
fn is_one_of(words: Words, states: &[&State]) {
    let medium = Model::with(shape(DATA).device_bytes, words);
    let names = Names::open(&medium, shape(DATA)).expect("a device opens after a crash");
    check(&names, shape(DATA));
    let found = regions(&names);
    let holds = |state: &State| {
        state.regions == found
            && found.iter().all(|region| match state.data[&region.name] {
                Some(word) => samples(region).all(|at| medium.word(at) == word),
                None => true,
            })
    };
    assert!(states.iter().any(|s| holds(s)), "found {found:?}, expected one of {states:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_leaves_the_state_before_or_after(steps in steps(), seed in any::<u64>()) {
        let medium = Model::new(shape(DATA).device_bytes);
        drop(Names::create(&medium, shape(DATA)).unwrap());
        let created = medium.log.borrow().len();
        let phases = history(&medium, &steps);
        let log = medium.log.borrow();
        let mut random = random(seed);
        let mut durable = Durable::default();
        log[..created].iter().for_each(|e| durable.apply(e, &mut random));
        for phase in phases {
            for event in &log[phase.events] {
                durable.apply(event, &mut random);
                // Within a write any part of its words may be missing, and so may it be when it has ended.
                if !matches!(event, Event::Word(..)) {
                    for ending in durable.endings(&mut random) {
                        is_one_of(ending, &[&phase.before, &phase.after]);
                    }
                }
            }
            for ending in durable.endings(&mut random) {
                is_one_of(ending, &[&phase.after]);
            }
        }
    }
}

#[test]
fn a_crash_while_a_directory_is_made_leaves_it_empty_unfinished_or_whole() {
    let shape = shape(DATA);
    // What a first try left when it was cut short is made again; the last is not cut short.
    for cut in 0..10 {
        let medium = Model::new(shape.device_bytes);
        medium.fail_after(Some((PROBED + cut, Failure::Dead)));
        let first = Names::create(&medium, shape).map(drop);
        medium.fail_after(None);
        assert_eq!(first.is_ok(), cut == 9);
        if first.is_err() {
            let found = probe(&medium, shape).unwrap();
            if found == Found::Ours {
                assert_eq!(Names::open(&medium, shape).unwrap().iter().count(), 0);
            } else {
                assert!(matches!(found, Found::Empty | Found::Unfinished), "{found:?}");
                Names::create(&medium, shape).unwrap();
            }
        }
        let (mut random, mut durable) = (random(cut + 1), Durable::default());
        let mut seen = [0; 3];
        for event in medium.log.borrow().iter() {
            durable.apply(event, &mut random);
            let endings = if matches!(event, Event::Word(..)) { vec![] } else { durable.endings(&mut random) };
            for ending in endings {
                let medium = Model::with(shape.device_bytes, ending);
                let found = probe(&medium, shape).unwrap();
                let names = match found {
                    Found::Empty => {
                        seen[0] += 1;
                        assert!(matches!(Names::open(&medium, shape), Err(NamesError::Empty)));
                        Names::create(&medium, shape)
                    }
                    Found::Unfinished => {
                        seen[1] += 1;
                        assert!(matches!(Names::open(&medium, shape), Err(NamesError::Unfinished)));
                        Names::create(&medium, shape)
                    }
                    Found::Ours => {
                        seen[2] += 1;
                        assert!(matches!(Names::create(&medium, shape), Err(NamesError::Occupied)));
                        Names::open(&medium, shape)
                    }
                    Found::Foreign { .. } => panic!("{found:?}"),
                };
                assert_eq!(names.unwrap().iter().count(), 0);
                assert_eq!(Names::open(&medium, shape).unwrap().iter().count(), 0);
            }
        }
        assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
        // What was made is durable.
        let medium = Model::with(shape.device_bytes, durable.crashed(|_| 0));
        assert_eq!(probe(&medium, shape).unwrap(), Found::Ours);
    }
}
