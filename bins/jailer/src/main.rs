//! `kombi-jailer`: started as root, it shuts a monitor into a folder, limits, a
//! cgroup and a user of its own, and becomes it. Firecracker's options and steps.
//!
//! Invariant: until the last step this process is single-threaded and trusts its
//! arguments, but nothing in the jail's folder: an earlier inmate may have written
//! there. A step that fails ends it before the monitor starts, with exit code 1.
//!
//! Left to others: what goes into the jail besides the monitor, and taking folder
//! and cgroups away afterwards (whoever called); filters of system calls (`vmm`).
#![deny(unsafe_code)]

mod args;
mod cgroups;
mod confined;
mod error;
mod limits;
mod monitor;
mod plan;
mod processes;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Args;
use crate::error::Error;
use crate::monitor::Clocks;
use crate::plan::Plan;

fn main() -> ExitCode {
    // What whoever called left open must reach neither the jail nor a file of ours.
    if let Err(source) = processes::close_inherited() {
        return failed(&Error::CloseInherited { source });
    }
    let clocks = Clocks::start();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let outcome = Plan::check(args).and_then(|plan| monitor::start(&plan, clocks));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Tells object, causes and way out in one line.
fn failed(error: &Error) -> ExitCode {
    eprintln!("kombi-jailer: error: {}", error.line());
    ExitCode::FAILURE
}
