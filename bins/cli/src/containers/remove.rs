//! `kombi rm` and `kombi container prune`.

use std::io::{IsTerminal, Write};

use containers::Error;

use super::stop::kill_now;
use super::{EXIT_FAILED, all, complaint, each, failed};
use crate::complaint::Complaint;

/// Remove containers.
#[derive(Debug, clap::Args)]
pub(crate) struct RemoveArgs {
    /// End those that run; one that is not here is no failure.
    #[arg(short, long)]
    force: bool,

    /// Accepted for docker's sake: there are no volumes yet.
    #[arg(short, long)]
    volumes: bool,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Removes them; goes on after one that fails.
pub(crate) fn remove(args: &RemoveArgs) -> Result<u8, Complaint> {
    if !args.force {
        return each(&args.containers, |all, container| {
            all.remove(&container).map_err(|error| failed(&error))
        });
    }
    let all = all()?;
    let mut code = 0;
    for given in &args.containers {
        let container = match all.find(given) {
            Ok(container) => container,
            Err(error @ Error::NotHere { .. }) => {
                failed(&error).print();
                continue;
            }
            Err(error) => {
                failed(&error).print();
                code = EXIT_FAILED;
                continue;
            }
        };
        let ended = match container.is_held() {
            Ok(true) => kill_now(&container),
            _ => Ok(()),
        };
        match ended.and_then(|()| all.remove(&container).map_err(|error| failed(&error))) {
            Ok(()) => println!("{given}"),
            Err(complaint) => {
                complaint.print();
                code = EXIT_FAILED;
            }
        }
    }
    Ok(code)
}

/// Remove all containers that do not run.
#[derive(Debug, clap::Args)]
pub(crate) struct PruneArgs {
    /// Do not ask.
    #[arg(short, long)]
    force: bool,
}

/// Removes them.
pub(crate) fn prune(args: &PruneArgs) -> Result<u8, Complaint> {
    if !args.force && !confirmed() {
        let complaint = Complaint::new("nothing was removed", "answer y, or give --force");
        return Err(complaint.with_exit_code(EXIT_FAILED));
    }
    let all = all()?;
    let mut gone = Vec::new();
    for container in all.all().map_err(|error| failed(&error))? {
        let removed = container.and_then(|container| match container.is_held()? {
            true => Ok(()),
            false => {
                all.remove(&container)?;
                gone.push(container.record().id.clone());
                Ok(())
            }
        });
        match removed {
            // It was started meanwhile.
            Ok(()) | Err(Error::Running { .. }) => {}
            Err(error) => complaint(&error).print(),
        }
    }
    if !gone.is_empty() {
        println!("Deleted Containers:");
        for id in gone {
            println!("{id}");
        }
    }
    Ok(0)
}

fn confirmed() -> bool {
    let stdin = std::io::stdin();
    // Who answers by a pipe knows the question.
    if stdin.is_terminal() {
        eprint!(
            "WARNING! This will remove all stopped containers.\n\
             Are you sure you want to continue? [y/N] "
        );
        let _ = std::io::stderr().flush();
    }
    let mut answer = String::new();
    // An end of input is no yes.
    let _ = stdin.read_line(&mut answer);
    matches!(answer.trim(), "y" | "Y" | "yes")
}
