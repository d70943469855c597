//! `kombi pull`, and the pulling that `kombi run` does.

use image::{Found, ImageError, Name, Store};
use registry::{Pulled, Registries};

use super::transfers::Shown;
use super::{EXIT_FAILED, failed, registry_complaint, store};
use crate::complaint::Complaint;

const AFTER_HELP: &str = "\
NAME is as in docker: busybox, busybox:1.36, ghcr.io/owner/app@sha256:...

Credentials are those of podman login and docker login, credential helpers included; mirrors and
insecure registries those of registries.conf. A pull that was broken off goes on where it stopped.

Examples:
  kombi pull busybox
  kombi pull localhost:5000/app:1.2";

/// Get an image from a registry.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PullArgs {
    /// Print nothing but the image's name.
    #[arg(short, long)]
    quiet: bool,

    /// Accepted where it is linux/amd64: machines run nothing else.
    #[arg(long, value_name = "OS/ARCH", value_parser = ["linux/amd64", "linux/x86_64", "amd64"])]
    platform: Option<String>,

    /// What to get.
    #[arg(value_name = "NAME[:TAG|@DIGEST]")]
    name: String,
}

/// Pulls it.
pub(crate) fn pull(args: PullArgs) -> Result<u8, Complaint> {
    let name: Name = parsed(&args.name)?;
    if !args.quiet && name.digest().is_none() && !args.name.ends_with(":latest") {
        default_tag(&args.name, &name);
    }
    let pulled = get(&store()?, &name, args.quiet).map_err(|it| it.with_exit_code(EXIT_FAILED))?;
    if !args.quiet {
        let familiar = name.familiar();
        let status = match pulled.was_here {
            true => format!("Image is up to date for {familiar}"),
            false => format!("Downloaded newer image for {familiar}"),
        };
        eprintln!("Digest: {}\nStatus: {status}", pulled.entry.target);
    }
    println!("{name}");
    Ok(0)
}

fn default_tag(given: &str, name: &Name) {
    let after_slash = given.rsplit('/').next().unwrap_or(given);
    if !after_slash.contains(':')
        && let Some(tag) = name.tag()
    {
        eprintln!("Using default tag: {tag}");
    }
}

/// An image's name as it was given.
pub(super) fn parsed(given: &str) -> Result<Name, Complaint> {
    let given = given.strip_prefix("docker://").unwrap_or(given);
    given.parse().map_err(|error| failed(&error))
}

/// Gets an image, and shows how far it has come.
pub(crate) fn get(store: &Store, name: &Name, quiet: bool) -> Result<Pulled, Complaint> {
    let registries = Registries::of_user().map_err(|error| registry_complaint(&error))?;
    let shown = Shown::new(quiet, "pull complete");
    let mut unpacking = shown.unpacking();
    let pulled = registries.pull(store, name, &shown, &mut unpacking);
    drop(unpacking);
    pulled.map_err(|error| {
        registry_complaint(&error).about(format!("failed to pull {}", name.familiar()))
    })
}

/// When `kombi run` asks a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PullPolicy {
    /// When the image is not here.
    Missing,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}

/// The image that `text` names, pulled where `policy` says so.
pub(crate) fn find_or_pull(
    store: &Store,
    text: &str,
    name: &Name,
    policy: PullPolicy,
    quiet: bool,
) -> Result<Found, Complaint> {
    let here = match policy {
        PullPolicy::Always => Err(ImageError::NotHere {
            given: text.to_owned(),
        }),
        PullPolicy::Missing | PullPolicy::Never => store.find(text),
    };
    match here {
        Err(ImageError::NotHere { .. }) if policy != PullPolicy::Never => {
            if policy == PullPolicy::Missing && !quiet {
                eprintln!("Unable to find image '{}' locally", name.familiar());
            }
            let pulled = get(store, name, quiet)?;
            Ok(Found {
                entry: pulled.entry,
                names: vec![name.clone()],
                by_name: true,
            })
        }
        here => here.map_err(|error| super::complaint(&error)),
    }
}
