//! `kombi version`.
//!
//! Invariant: the first line is `kombi VERSION`. Left to others: nothing.

use std::io::Write;

use crate::complaint::Complaint;

/// Show the version.
#[derive(Debug, clap::Args)]
pub(crate) struct VersionArgs {}

/// Shows it.
pub(crate) fn version(_: &VersionArgs) -> Result<u8, Complaint> {
    let mut out = std::io::stdout().lock();
    let shown = writeln!(
        out,
        "kombi {}\nguest protocol {}",
        env!("CARGO_PKG_VERSION"),
        sandbox::GUEST_PROTOCOL
    );
    // Nobody reads it: so be it.
    let _ = shown;
    Ok(0)
}
