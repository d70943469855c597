//! `kombi rename`.

use super::{all, failed};
use crate::complaint::Complaint;

/// Give a container another name.
#[derive(Debug, clap::Args)]
pub(crate) struct RenameArgs {
    /// Which: its name, or the first digits of its identifier.
    container: String,

    /// The new name.
    name: String,
}

/// Renames it.
pub(crate) fn rename(args: &RenameArgs) -> Result<u8, Complaint> {
    let all = all()?;
    let container = all.find(&args.container).map_err(|error| failed(&error))?;
    all.rename(&container, &args.name)
        .map_err(|error| failed(&error))?;
    Ok(0)
}
