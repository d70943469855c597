//! Translated blocks that outlive the vCPU that needed them first: in the memory of
//! a machine, and in a file that all machines of a user map.
//!
//! ```text
//! Translations ─ find ─▶ file (mapped, read-only)   record ⇄ translator::Block
//!      │          └────▶ fresh (this machine's new ones)
//!      └─ save: fresh + file ─▶ new file, renamed into place   folder, merge
//! ```
//!
//! Invariant: what [`Translations::find`] gives is what the translator of this build
//! would give, or more careful than that, for the guest bytes that the caller just
//! compared in full. Hashes only ever find candidates.
//!
//! **Who is trusted.** The file is trusted as the program itself is: it belongs to the
//! same user, in a folder that nobody else may write, and both are checked. A guest
//! cannot write it. What a guest causes to be kept is a function of guest bytes, and
//! is used only where those very bytes are found again: no guest can make another
//! one run anything but the translation of its own code. What a guest can do is fill
//! the file with translations that nobody else needs; one machine adds at most
//! [`FRESH_BYTES_MAX`] at a time, and what is used stays longest.
//!
//! A file that is torn, truncated, of another build, of another owner or otherwise
//! not as it should be is not used and replaced by the next save. Each record has a
//! checksum, looked at when it is used. Files are never changed, only replaced:
//! machines that map an old one go on using it.
//!
//! Left to others: comparing with the guest's memory and placing blocks (`hv_soft`).
#![deny(unsafe_code)]

mod file;
mod folder;
mod fresh;
mod mapping;
mod merge;
mod record;
mod store;

pub use file::{File, Refused};
pub use folder::{FOLDER_BYTES_MAX, Folder, Place};
pub use fresh::FRESH_BYTES_MAX;
pub use record::Key;
pub use store::{Counts, Saved, Settings, Translations};

/// Why translations could not be kept, or kept ones not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call of the host's kernel failed.
    #[error("failed to {doing} {path:?}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// With what.
        path: std::path::PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Others could change what is in the folder or the file.
    #[error("{path:?} is not used: {why}")]
    NotOurs {
        /// Folder or file.
        path: std::path::PathBuf,
        /// Owner or permissions, in words.
        why: &'static str,
    },
    /// The file is not one that this build can use.
    #[error("{path:?} is not used")]
    Unusable {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: Refused,
    },
    /// Another machine is writing, and does not come to an end.
    #[error("{path:?} is locked by another machine")]
    Busy {
        /// The lock.
        path: std::path::PathBuf,
    },
}
