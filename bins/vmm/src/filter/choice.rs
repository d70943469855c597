//! Which filters threads get: ours, those of a file, or none.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use seccompiler::TargetArch;

use super::{Filter, install_handler};
use crate::failure::Failure;

/// Threads that filters are for, by Firecracker's names.
pub(crate) const VMM: &str = "vmm";
/// Those that serve the API.
pub(crate) const API: &str = "api";
/// Those that run vCPUs.
pub(crate) const VCPU: &str = "vcpu";

/// Those that wait for disks. It and those below are ours: with filters of a file they get
/// that of [`VMM`], unless it has one more.
pub(crate) const DISK: &str = "disk";
/// Those that write kept translations, and metrics that no client asked for.
pub(crate) const RECORDS: &str = "records";
/// That which takes signals.
pub(crate) const SIGNALS: &str = "signals";

/// The filters of this process.
pub(crate) enum Choice {
    /// None: `--no-seccomp`.
    Off,
    /// Those that this program has.
    Ours,
    /// `--seccomp-filter`, by thread.
    Given(HashMap<String, Filter>),
}

impl Choice {
    /// What the command line says.
    ///
    /// # Errors
    /// [`Failure::Filter`]: a file that cannot be read, is no list of rules as seccompiler
    /// reads them, or lacks a thread.
    pub(crate) fn new(off: bool, path: Option<&Path>) -> Result<Self, Failure> {
        match path {
            _ if off => Ok(Choice::Off),
            None => Ok(Choice::Ours),
            Some(path) => read(path)
                .map(Choice::Given)
                .map_err(|why| Failure::Filter {
                    path: path.to_owned(),
                    why,
                }),
        }
    }

    /// The filter of a thread, with the one that this program has for it.
    ///
    /// # Errors
    /// What making it says.
    pub(crate) fn of(
        &self,
        thread: &str,
        ours: fn() -> io::Result<Filter>,
    ) -> Result<Option<Filter>, Failure> {
        match self {
            Choice::Off => Ok(None),
            Choice::Ours => ours().map(Some).map_err(|source| Failure::Host {
                doing: "make the filter of system calls",
                source,
            }),
            Choice::Given(filters) => {
                let other = || filters.get(VMM).filter(|_| ![API, VCPU].contains(&thread));
                Ok(filters.get(thread).or_else(other).cloned())
            }
        }
    }
}

fn read(path: &Path) -> Result<HashMap<String, Filter>, String> {
    install_handler().map_err(|error| error.to_string())?;
    let file = File::open(path).map_err(|error| error.to_string())?;
    let compiled = seccompiler::compile_from_json(file, TargetArch::x86_64);
    let compiled = compiled.map_err(|error| crate::failure::chain(&error))?;
    let filters: HashMap<String, Filter> = compiled
        .into_iter()
        .map(|(thread, program)| {
            let programs = Arc::from([program]);
            (thread, Filter { programs })
        })
        .collect();
    match [VMM, API, VCPU]
        .iter()
        .find(|thread| !filters.contains_key(**thread))
    {
        None => Ok(filters),
        Some(thread) => Err(format!("it has no filter for thread {thread}")),
    }
}
