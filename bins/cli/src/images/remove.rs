//! `kombi rmi`.

use image::{ImageError, Store};

use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;

const AFTER_HELP: &str = "\
An image with several names loses the one that is given; with its last name it goes, and with it
what no other image needs. Machines that run go on.";

/// Remove images.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct RemoveArgs {
    /// Remove an image given by its identifier with all of its names, and one that containers are made of; an image that
    /// is not here is no failure.
    #[arg(short, long)]
    force: bool,

    /// Which: names, or the first digits of identifiers.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Removes them; goes on after one that fails.
pub(crate) fn remove(args: &RemoveArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let mut code = 0;
    let mut gone = Vec::new();
    for image in &args.images {
        match remove_one(&store, image, args.force) {
            Ok(deleted) => gone.extend(deleted),
            Err(complaint) => {
                complaint.print();
                code = EXIT_FAILED;
            }
        }
    }
    if !gone.is_empty() {
        let freed = store.collect().map_err(|error| failed(&error))?;
        for id in gone {
            println!("Deleted: {id}");
        }
        if freed.is_none() {
            eprintln!(
                "kombi: another kombi works with images; kombi prune removes their files later"
            );
        }
    }
    Ok(code)
}

/// Returns the identifier of the image when it went.
fn remove_one(store: &Store, given: &str, force: bool) -> Result<Option<String>, Complaint> {
    let found = match store.find(given) {
        Ok(found) => found,
        Err(error @ ImageError::NotHere { .. }) if force => {
            failed(&error).print();
            return Ok(None);
        }
        Err(error) => return Err(failed(&error)),
    };
    let target = found.entry.target.clone();
    let id = match store.id(&target) {
        Ok(id) => id.to_string(),
        // A broken image can be removed all the same.
        Err(_) => target.to_string(),
    };
    if !found.by_name && found.names.len() > 1 && !force {
        let complaint = Complaint::new(
            format!("image {given} has {} names", found.names.len()),
            "give one of them, or remove all with --force",
        );
        return Err(complaint.with_exit_code(EXIT_FAILED));
    }
    let goes = !found.by_name || found.names.len() <= 1;
    if goes
        && !force
        && let Some(user) = crate::containers::user_of(&target.to_string())?
    {
        let (name, state) = (&user.record().name, user.state().phase.as_str());
        let complaint = Complaint::new(
            format!("image {given} is what container {name} is made of, which is {state}"),
            "remove the container first, or give --force: it does not start again then",
        );
        return Err(complaint.with_exit_code(EXIT_FAILED));
    }
    match &found.entry.name {
        Some(name) if found.by_name && found.names.len() > 1 => {
            store.remove_name(name).map_err(|error| failed(&error))?;
            println!("Untagged: {}", name.familiar());
            Ok(None)
        }
        _ => {
            store
                .remove_image(&target)
                .map_err(|error| failed(&error))?;
            for name in &found.names {
                println!("Untagged: {}", name.familiar());
            }
            Ok(Some(id))
        }
    }
}
