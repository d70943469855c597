//! Random programs on the real CPU and on the engine.
//!
//! `KOMBI_DIFF_CASES` and `KOMBI_DIFF_SEED` make it longer or another.

use std::collections::{BTreeMap, BTreeSet};

use lab::difference::compare;
use lab::engine::Guest;
use lab::oracle::Oracle;
use lab::program::{Generator, compared_codes};

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(otherwise)
}

#[test]
fn random_programs_leave_the_same_state_on_the_engine_as_on_the_cpu() {
    let (cases, seed) = (
        number("KOMBI_DIFF_CASES", 4000),
        number("KOMBI_DIFF_SEED", 1),
    );
    let mut oracle = Oracle::start().unwrap();
    let mut guest = Guest::start().unwrap();
    let mut generator = Generator::new(seed);
    let mut codes = BTreeSet::new();
    let mut vectors = BTreeMap::new();
    let mut wrong = 0;
    for case in 0..cases {
        let program = generator.program();
        let outcome = match compare(&mut oracle, &mut guest, &program) {
            Ok(outcome) => outcome,
            Err(error) => panic!("case {case}: {error:?}\n{}", program.text),
        };
        if let Some(difference) = outcome.difference {
            println!("case {case} of seed {seed}:\n{difference}{}", program.text);
            println!("from {:x?}", program.state.gpr);
            wrong += 1;
            if wrong == 5 {
                break;
            }
        }
        *vectors.entry(outcome.vector).or_insert(0) += 1;
        codes.extend(program.codes);
    }
    let all: BTreeSet<_> = compared_codes().collect();
    let missing: Vec<_> = all.difference(&codes).collect();
    println!(
        "{cases} programs, {} of {} codes, ends by vector {vectors:?}; not covered: {missing:?}",
        all.len() - missing.len(),
        all.len()
    );
    assert_eq!(wrong, 0, "programs ended differently");
    assert!(
        missing.is_empty(),
        "allowed codes were not covered: {missing:?}"
    );
    let stats = guest.stats();
    println!("{stats:?}");
    assert!(
        stats.accesses > 0 && stats.bounces > 0 && stats.groups > 0,
        "a slow path was not taken"
    );
    assert!(
        stats.indirect > 0 && stats.faults > 0,
        "a way out of a block was not taken"
    );
    for vector in [0, 13, 14, 16, 19] {
        assert!(
            vectors.contains_key(&Some(vector)),
            "no program ended by vector {vector}"
        );
    }
}
