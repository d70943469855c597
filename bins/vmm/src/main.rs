//! `kombi-vmm`: one process, one machine, from a configuration file or the requests of a
//! client to an exit code.
//!
//! Invariant: whatever ends the machine, this process ends with a documented
//! exit code and leaves nothing behind; standard output carries the guest's
//! console and nothing else.
//!
//! Left to others: what a machine is (`machine`), how guest code runs (engines).
#![deny(unsafe_code)]

mod args;
mod engine;
mod failure;
mod filter;
mod frontend;
mod jail;
mod log;
mod metrics;
mod monitor;
mod open_metrics;
mod status;
mod surroundings;
mod whole_lines;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Args;
use crate::failure::exit;
use crate::status::Status;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                exit::BAD_ARGUMENTS.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if args.jail_probe {
        return match jail::probe() {
            Ok(line) => {
                println!("{line}");
                ExitCode::SUCCESS
            }
            Err(failure) => {
                eprintln!("kombi-vmm: error: {}", failure.line());
                failure.exit_code().into()
            }
        };
    }
    if args.snapshot_version {
        println!("{}", snapshot::VERSION);
        return ExitCode::SUCCESS;
    }
    if let Some(path) = &args.describe_snapshot {
        return match snapshot::version_of(path) {
            Ok(version) => {
                println!("{version}");
                ExitCode::SUCCESS
            }
            Err(source) => {
                let failure = failure::Failure::Describe { source };
                eprintln!("kombi-vmm: error: {}", failure.line());
                failure.exit_code().into()
            }
        };
    }
    let mut status = Status::default();
    match monitor::run(&args, &mut status) {
        Ok(code) => code.into(),
        Err(failure) => {
            let line = failure.line();
            status.stopped("error", Some(&line));
            eprintln!("kombi-vmm: error: {line}");
            failure.exit_code().into()
        }
    }
}
