//! The verbs about images: one file each. By docker's habits: the same names, flags and output, exit code 1 when
//! something fails.
//!
//! Invariant: what is for scripts goes to standard output, all else to standard error. Left to others: what images are
//! (`image`), how they come and go (`registry`).

mod archive;
mod history;
mod inspect;
mod list;
mod login;
mod prune;
pub(crate) mod pull;
mod push;
mod remove;
mod tag;
mod transfers;

pub(crate) use archive::{ImportArgs, LoadArgs, SaveArgs, import, load, save};
pub(crate) use history::{HistoryArgs, history};
pub(crate) use inspect::{InspectArgs, inspect};
pub(crate) use list::{ListArgs, list};
pub(crate) use login::{LoginArgs, LogoutArgs, login, logout};
pub(crate) use prune::{PruneArgs, prune};
pub(crate) use pull::{PullArgs, pull};
pub(crate) use push::{PushArgs, push};
pub(crate) use remove::{RemoveArgs, remove};
pub(crate) use tag::{TagArgs, tag};

use image::{Digest, ImageError, Store};

use crate::complaint::Complaint;

/// As docker's verbs do.
const EXIT_FAILED: u8 = 1;
/// Digits of an identifier that people see.
const ID_DIGITS: usize = 12;

/// The same verbs as docker groups them.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageVerb {
    Pull(PullArgs),
    Push(PushArgs),
    #[command(name = "ls", visible_alias = "list")]
    List(ListArgs),
    #[command(name = "rm", visible_alias = "remove")]
    Remove(RemoveArgs),
    Tag(TagArgs),
    Inspect(InspectArgs),
    History(HistoryArgs),
    Prune(PruneArgs),
    Load(LoadArgs),
    Save(SaveArgs),
    Import(ImportArgs),
}

/// `kombi image VERB`.
pub(crate) fn image(verb: ImageVerb) -> Result<u8, Complaint> {
    match verb {
        ImageVerb::Pull(args) => pull(args),
        ImageVerb::Push(args) => push(&args),
        ImageVerb::List(args) => list(&args),
        ImageVerb::Remove(args) => remove(&args),
        ImageVerb::Tag(args) => tag(&args),
        ImageVerb::Inspect(args) => inspect(&args),
        ImageVerb::History(args) => history(&args),
        ImageVerb::Prune(args) => prune(&args),
        ImageVerb::Load(args) => load(&args),
        ImageVerb::Save(args) => save(&args),
        ImageVerb::Import(args) => import(args),
    }
}

/// The user's images.
fn store() -> Result<Store, Complaint> {
    Store::default_root()
        .and_then(Store::open)
        .map_err(|error| failed(&error))
}

/// An error of one of these verbs.
fn failed(error: &ImageError) -> Complaint {
    complaint(error).with_exit_code(EXIT_FAILED)
}

fn short(id: &Digest) -> String {
    id.hex().chars().take(ID_DIGITS).collect()
}

/// What to tell about an image that is not usable.
pub(crate) fn complaint(error: &ImageError) -> Complaint {
    let way_out = match error {
        // Their text says it.
        ImageError::UnknownReference { .. }
        | ImageError::NoStoreRoot
        | ImageError::TagNotFound { .. }
        | ImageError::Ambiguous { .. }
        | ImageError::Changed { .. } => None,
        ImageError::BadName { .. } => {
            Some("write [REGISTRY/]REPOSITORY[:TAG], oci:DIR, docker-archive:FILE or rootfs:DIR")
        }
        ImageError::BadChange { .. } => Some("write it as in a Dockerfile: ENV NAME=VALUE"),
        ImageError::NotHere { .. } => Some("see kombi images, or get it with kombi pull"),
        ImageError::AmbiguousId { .. } => Some("give more digits of it"),
        ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            Some("free some space, or keep images elsewhere: set KOMBI_HOME")
        }
        ImageError::Io { .. } => Some("check the path and its permissions"),
        ImageError::NotALayout { .. } => Some("give the directory that holds index.json"),
        ImageError::WrongPlatform { .. } => Some("get the image for linux/amd64"),
        ImageError::BlobMissing { .. }
        | ImageError::SizeMismatch { .. }
        | ImageError::DigestMismatch { .. }
        | ImageError::DiffIdMismatch { .. } => Some("get the image again"),
        _ => Some("the image is not usable: get it again, or tell whoever made it"),
    };
    Complaint::caused(error, way_out)
}

/// What to tell when a registry did not do as asked.
pub(crate) fn registry_complaint(error: &registry::Error) -> Complaint {
    use registry::Error;
    let way_out = match error {
        Error::Image(error) => return complaint(error),
        Error::NotARegistry { .. } => "give its host, and its port if it has one of its own",
        Error::NotFound { .. } => "check the name and the tag, or log in where it is private",
        Error::Denied { .. } => {
            "check the name, or log in: kombi login, podman login and docker login share files"
        }
        Error::Unreachable { .. } => "check the registry's name and the network, and try again",
        Error::BrokenOff { .. } => "try again: it goes on where it stopped",
        Error::Blocked { .. } => "remove blocked from that file, or take another registry",
        Error::Configuration { .. } => "mend the file, or set CONTAINERS_REGISTRIES_CONF",
        Error::Credentials { .. } => "mend the credential helper, or log in again",
        _ => "try again, or ask whoever runs the registry",
    };
    Complaint::caused(error, Some(way_out))
}
