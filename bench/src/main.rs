//! Speed and memory, side by side in one run with what a user would pick instead:
//! QEMU's microvm machine under TCG, and the host itself. Prints medians, the
//! ratio of the medians, and the spread of the pairwise ratios.
//!
//! usage: bench [all|boot|run|cpu|memory|python|monitor|block|net|pull]
//!        bench engine [--only NAME,…] [--rounds N] [--no-qemu] [--vmm PATH] [--other PATH]
//!                     [--cpu-model MODEL] [--other-cpu-model MODEL]
#![forbid(unsafe_code)]

mod devices;
mod engine;
mod figures;
mod guests;
mod measures;
mod memory;
mod monitor;
mod pull;
mod rivals;
mod rows;

use std::process::ExitCode;

/// Measures, prints, and says whether the target was reached.
type Measure = fn(&guests::Guests) -> anyhow::Result<bool>;

const MEASURES: [(&str, Measure); 9] = [
    ("boot", measures::boot),
    ("run", measures::run),
    ("cpu", measures::cpu),
    ("memory", measures::memory),
    ("python", measures::python),
    ("monitor", monitor::monitor),
    ("block", devices::block),
    ("net", devices::net),
    ("pull", pull::pull),
];

/// Exit code of a measurement for another process: a target was missed.
const MISSED: u8 = 3;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "engine") {
        let result = engine::Asked::parse(&words[1..]).and_then(|asked| engine::run(&asked));
        return match result {
            Ok(reached) => conclude(reached),
            Err(error) => {
                eprintln!("bench engine: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let asked = words.into_iter().next().unwrap_or_else(|| "all".to_owned());
    let chosen: Vec<_> = MEASURES
        .iter()
        .filter(|(name, _)| asked == "all" || asked == *name)
        .collect();
    if chosen.is_empty() {
        let names: Vec<_> = MEASURES.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: bench [all|{}|engine]", names.join("|"));
        return ExitCode::from(2);
    }
    let guests = match guests::Guests::prepare() {
        Ok(guests) => guests,
        Err(error) => {
            eprintln!("bench: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let mut all_reached = true;
    for (name, measure) in chosen {
        match measure(&guests) {
            Ok(reached) => all_reached &= reached,
            Err(error) => {
                eprintln!("bench {name}: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    // Another process of this program draws the conclusion.
    if std::env::var_os(devices::MARK).is_some() {
        return ExitCode::from(if all_reached { 0 } else { MISSED });
    }
    conclude(all_reached)
}

fn conclude(all_reached: bool) -> ExitCode {
    println!(
        "\n{}",
        if all_reached {
            "every target reached"
        } else {
            "some target was missed"
        }
    );
    ExitCode::SUCCESS
}
