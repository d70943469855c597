//! `kombi start` and `kombi restart`.

use containers::{Container, Phase};
use image::Store;

use super::detach::launch;
use super::stop::{Ending, end};
use super::{EXIT_FAILED, each, failed};
use crate::complaint::Complaint;

const AFTER_HELP: &str = "\
What a container wrote is still there. One that was made with --rm cannot be started again: it is gone.";

/// Start containers that do not run.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct StartArgs {
    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Starts them; goes on after one that fails.
pub(crate) fn start(args: &StartArgs) -> Result<u8, Complaint> {
    each(&args.containers, |_, container| begin(&container))
}

/// Stop containers, and start them again.
#[derive(Debug, clap::Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    ending: Ending,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Restarts them; goes on after one that fails.
pub(crate) fn restart(args: &RestartArgs) -> Result<u8, Complaint> {
    each(&args.containers, |_, container| {
        end(&container, &args.ending)?;
        begin(&container)
    })
}

fn begin(container: &Container) -> Result<(), Complaint> {
    let running = container.state().phase == Phase::Running;
    if running && container.is_held().map_err(|error| failed(&error))? {
        return Ok(());
    }
    let store = Store::default_root().and_then(Store::open);
    let store = store.map_err(|error| crate::images::complaint(&error))?;
    // Nobody collects what the machine needs before it has all of it open.
    let _hold = store
        .hold()
        .map_err(|error| crate::images::complaint(&error))?;
    // docker start tells any failure by 1.
    launch(&container.record().id).map_err(|complaint| complaint.with_exit_code(EXIT_FAILED))
}
