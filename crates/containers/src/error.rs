//! What goes wrong, by object and cause.
//!
//! Invariant: each text names the container or the file. Left to others: the way out, where it is a verb's.

use std::io;
use std::path::PathBuf;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is none of that name, nor one whose identifier begins like that.
    #[error("no such container: {given}")]
    NotHere {
        /// As it was given.
        given: String,
    },
    /// Several identifiers begin like that.
    #[error("{given} begins the identifiers of several containers")]
    Ambiguous {
        /// As it was given.
        given: String,
    },
    /// Somebody else has the name.
    #[error("the name {name:?} is in use by container {id}")]
    NameInUse {
        /// The name.
        name: String,
        /// Whose it is, in twelve digits.
        id: String,
    },
    /// It cannot be a name.
    #[error("{name:?} is no name for a container")]
    BadName {
        /// As it was given.
        name: String,
    },
    /// What is asked cannot be done to a container that runs.
    #[error("container {name} is running")]
    Running {
        /// Its name.
        name: String,
    },
    /// What is asked can only be done to a container that runs.
    #[error("container {name} is not running")]
    NotRunning {
        /// Its name.
        name: String,
    },
    /// A file says what it cannot say.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The host's.
    #[error("failed to {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}
