//! `kombi tag`.

use image::Entry;

use super::pull::parsed;
use super::{EXIT_FAILED, failed, store};
use crate::complaint::Complaint;

/// Give an image another name.
#[derive(Debug, clap::Args)]
pub(crate) struct TagArgs {
    /// Which image: a name, or the first digits of its identifier.
    #[arg(value_name = "IMAGE")]
    image: String,

    /// Its new name, which another image may lose by it.
    #[arg(value_name = "NAME[:TAG]")]
    name: String,
}

/// Names it.
pub(crate) fn tag(args: &TagArgs) -> Result<u8, Complaint> {
    let name = parsed(&args.name)?;
    if name.digest().is_some() {
        let complaint = Complaint::new(
            format!("{:?} has a digest", args.name),
            "give a name and a tag: a digest is the image's own",
        );
        return Err(complaint.with_exit_code(EXIT_FAILED));
    }
    let store = store()?;
    let found = store.find(&args.image).map_err(|error| failed(&error))?;
    let entry = Entry {
        name: Some(name),
        ..found.entry
    };
    store.add_entry(&entry).map_err(|error| failed(&error))?;
    Ok(0)
}
