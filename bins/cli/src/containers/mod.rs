//! The verbs about containers that outlive the command which started them: one file each. By docker's habits: the same
//! names, flags and output, exit code 1 when something fails.
//!
//! ```text
//! kombi run -d ──record──▶ kombi supervise ──▶ kombi-vmm
//!      ◀── started, or why not ──┘   ▲  │ log
//! kombi stop, kill, wait, logs, … ───┘  ▼
//! ```
//!
//! Invariant: what is for scripts goes to standard output, all else to standard error. Left to others: records and logs
//! (`containers`), machines (`sandbox`).

mod descriptors;
mod detach;
mod doorbell;
mod inspect;
mod list;
mod logs;
mod remove;
mod rename;
mod signals;
mod start;
mod stop;
mod supervise;
mod upper;
mod wait;

pub(crate) use detach::{DetachArgs, Start};
pub(crate) use inspect::value as inspected;
pub(crate) use list::{ListArgs, list};
pub(crate) use logs::{LogsArgs, logs};
pub(crate) use remove::{PruneArgs, RemoveArgs, prune, remove};
pub(crate) use rename::{RenameArgs, rename};
pub(crate) use start::{RestartArgs, StartArgs, restart, start};
pub(crate) use stop::{KillArgs, StopArgs, kill, stop};
pub(crate) use supervise::{SuperviseArgs, supervise};
pub(crate) use wait::{WaitArgs, wait};

use containers::{Container, Containers, Error};
use image::Store;

use crate::complaint::Complaint;

/// As docker's verbs do.
const EXIT_FAILED: u8 = 1;

/// The same verbs as docker groups them.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ContainerVerb {
    #[command(name = "ls", visible_aliases = ["list", "ps"])]
    List(ListArgs),
    Logs(LogsArgs),
    /// Make a container as kombi run -d does, without starting it.
    #[command(override_usage = "kombi container create [OPTIONS] IMAGE [COMMAND [ARG...]]")]
    Create(Box<crate::run::RunArgs>),
    Start(StartArgs),
    Restart(RestartArgs),
    Stop(StopArgs),
    Kill(KillArgs),
    Wait(WaitArgs),
    #[command(name = "rm", visible_alias = "remove")]
    Remove(RemoveArgs),
    Rename(RenameArgs),
    Prune(PruneArgs),
}

/// `kombi container VERB`.
pub(crate) fn container(verb: ContainerVerb) -> Result<u8, Complaint> {
    match verb {
        ContainerVerb::List(args) => list(&args),
        ContainerVerb::Logs(args) => logs(&args),
        ContainerVerb::Create(args) => crate::run::create(*args),
        ContainerVerb::Start(args) => start(&args),
        ContainerVerb::Restart(args) => restart(&args),
        ContainerVerb::Stop(args) => stop(&args),
        ContainerVerb::Kill(args) => kill(&args),
        ContainerVerb::Wait(args) => wait(&args),
        ContainerVerb::Remove(args) => remove(&args),
        ContainerVerb::Rename(args) => rename(&args),
        ContainerVerb::Prune(args) => prune(&args),
    }
}

/// The user's containers.
pub(crate) fn all() -> Result<Containers, Complaint> {
    let root = Store::default_root().map_err(|error| crate::images::complaint(&error))?;
    let root = std::path::absolute(root.join("containers"));
    let root = root.map_err(|error| Complaint::caused(&error, Some("set KOMBI_HOME")))?;
    Containers::open(root).map_err(|error| complaint(&error))
}

/// A container that was made of the image of this digest, the first that is found.
pub(crate) fn user_of(digest: &str) -> Result<Option<Container>, Complaint> {
    let here = all()?.all().map_err(|error| failed(&error))?;
    // Of one that is damaged nobody knows.
    let mut here = here.into_iter().flatten();
    Ok(here.find(|container| container.record().image_digest == digest))
}

/// Does the same to each; goes on after one that fails, prints what was given for one that does not.
fn each(
    given: &[String],
    mut act: impl FnMut(&Containers, Container) -> Result<(), Complaint>,
) -> Result<u8, Complaint> {
    let all = all()?;
    let mut code = 0;
    for given in given {
        let found = all.find(given).map_err(|error| failed(&error));
        match found.and_then(|container| act(&all, container)) {
            Ok(()) => println!("{given}"),
            Err(complaint) => {
                complaint.print();
                code = EXIT_FAILED;
            }
        }
    }
    Ok(code)
}

/// An error of one of these verbs.
fn failed(error: &Error) -> Complaint {
    complaint(error).with_exit_code(EXIT_FAILED)
}

/// What to tell about a container.
pub(crate) fn complaint(error: &Error) -> Complaint {
    let way_out = match error {
        Error::NotHere { .. } => Some("see kombi ps -a"),
        Error::Ambiguous { .. } => Some("give more digits of it"),
        Error::NameInUse { .. } => Some("remove or rename that one, or take another name"),
        Error::BadName { .. } => Some("use 2 to 64 of a-z A-Z 0-9 _ . -, a letter or digit first"),
        Error::Running { .. } => Some("stop it first, or use --force"),
        Error::NotRunning { .. } => Some("see kombi ps -a"),
        Error::Damaged { .. } => Some("remove the directory that it is in"),
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            Some("free some space, or keep containers elsewhere: set KOMBI_HOME")
        }
        Error::Io { .. } => Some("check the path and its permissions"),
        _ => None,
    };
    Complaint::caused(error, way_out)
}
