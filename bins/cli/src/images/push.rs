//! `kombi push`.

use registry::Registries;

use super::pull::parsed;
use super::transfers::Shown;
use super::{EXIT_FAILED, failed, registry_complaint, store};
use crate::complaint::Complaint;

const AFTER_HELP: &str = "\
Pushed is what is here: the image for linux/amd64.

Examples:
  kombi tag busybox localhost:5000/busybox
  kombi push localhost:5000/busybox
  kombi push busybox registry.example/mirror/busybox:1.36";

/// Put an image into a registry.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PushArgs {
    /// Show no progress.
    #[arg(short, long)]
    quiet: bool,

    /// Which image.
    #[arg(value_name = "NAME")]
    image: String,

    /// Where to, when not where its name says.
    #[arg(value_name = "DESTINATION")]
    to: Option<String>,
}

/// Pushes it.
pub(crate) fn push(args: &PushArgs) -> Result<u8, Complaint> {
    let store = store()?;
    let found = store.find(&args.image).map_err(|error| failed(&error))?;
    let to = parsed(args.to.as_ref().unwrap_or(&args.image))?;
    let name = to.familiar();
    let told = |error: registry::Error| {
        let complaint = registry_complaint(&error).about(format!("failed to push {name}"));
        complaint.with_exit_code(EXIT_FAILED)
    };
    let registries = Registries::of_user().map_err(told)?;
    let shown = Shown::new(args.quiet, "pushed");
    if !args.quiet {
        shown.say(&format!(
            "The push refers to repository [{}]",
            to.familiar_repository()
        ));
    }
    let digest = registries
        .push(&store, &found.entry, &to, &shown)
        .map_err(told)?;
    drop(shown);
    if !args.quiet {
        eprintln!("{}: digest: {digest}", to.tag().unwrap_or("pushed"));
    }
    println!("{to}");
    Ok(0)
}
