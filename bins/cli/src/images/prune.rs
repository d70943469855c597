//! `kombi prune`.

use std::io::{IsTerminal, Write};

use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;
use crate::human;

const AFTER_HELP: &str = "\
Removed are images without a name, and whatever no image needs: layers, downloads that stopped,
directories that were made ready for rootfs:. All of it can be made or pulled again.";

/// Remove what is not needed.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PruneArgs {
    /// Remove images with a name as well: all that no container is made of.
    #[arg(short, long)]
    all: bool,

    /// Do not ask.
    #[arg(short, long)]
    force: bool,
}

/// Removes it.
pub(crate) fn prune(args: &PruneArgs) -> Result<u8, Complaint> {
    let what = match args.all {
        true => "all images that no container is made of",
        false => "all images without a name",
    };
    if !args.force && !confirmed(what) {
        let complaint = Complaint::new("nothing was removed", "answer y, or give --force");
        return Err(complaint.with_exit_code(EXIT_FAILED));
    }
    let store = store()?;
    let entries = store.entries().map_err(|error| failed(&error))?;
    let mut gone = Vec::new();
    for entry in entries {
        let target = entry.target.to_string();
        let unused = crate::containers::user_of(&target)?.is_none();
        if unused && (args.all || entry.name.is_none()) {
            let id = store.id(&entry.target);
            let id = id.map_or_else(|_| entry.target.to_string(), |id| id.to_string());
            store
                .remove_image(&entry.target)
                .map_err(|error| failed(&error))?;
            if let Some(name) = &entry.name {
                gone.push(format!("untagged: {}", name.familiar()));
            }
            gone.push(format!("deleted: {id}"));
        }
    }
    let Some(freed) = store.collect().map_err(|error| failed(&error))? else {
        let complaint = Complaint::new(
            "another kombi pulls an image or starts a machine",
            "try again when it is done",
        );
        return Err(complaint.with_exit_code(EXIT_FAILED));
    };
    if !gone.is_empty() {
        println!("Deleted Images:");
        let mut told = std::collections::HashSet::new();
        for line in gone {
            if told.insert(line.clone()) {
                println!("{line}");
            }
        }
        println!();
    }
    println!("Total reclaimed space: {}", human::size(freed.bytes));
    Ok(0)
}

fn confirmed(what: &str) -> bool {
    let stdin = std::io::stdin();
    // Who answers by a pipe knows the question.
    if stdin.is_terminal() {
        eprint!(
            "WARNING! This will remove {what}, and what no other image needs.\n\
             Are you sure you want to continue? [y/N] "
        );
        let _ = std::io::stderr().flush();
    }
    let mut answer = String::new();
    // An end of input is no yes.
    let _ = stdin.read_line(&mut answer);
    matches!(answer.trim(), "y" | "Y" | "yes")
}
