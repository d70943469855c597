//! What can go wrong between here and a registry.

use std::io;
use std::path::PathBuf;

use image::ImageError;

/// Why an image was not pulled or pushed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was given for a registry is none.
    #[error("{given:?} is not a registry")]
    NotARegistry {
        /// What was given.
        given: String,
    },
    /// The registry does not have it.
    #[error("{registry} has no {what}")]
    NotFound {
        /// Its address.
        registry: String,
        /// The image.
        what: String,
    },
    /// The registry wants other credentials than those that were found, or some.
    #[error("{registry} refuses access to {what}")]
    Denied {
        /// Its address.
        registry: String,
        /// The image.
        what: String,
    },
    /// No answer.
    #[error("failed to reach {registry}: {reason}")]
    Unreachable {
        /// Its address.
        registry: String,
        /// Why, in words.
        reason: String,
    },
    /// An answer that makes no sense, or an error of the registry's own.
    #[error("{registry} answered with an error: {reason}")]
    Answer {
        /// Its address.
        registry: String,
        /// What it was.
        reason: String,
    },
    /// A transfer stopped, and again and again.
    #[error("{registry} broke off {what} {times} times: {reason}")]
    BrokenOff {
        /// Its address.
        registry: String,
        /// The blob.
        what: String,
        /// How often.
        times: u32,
        /// The last time's reason.
        reason: String,
    },
    /// The configuration forbids the registry.
    #[error("registry {registry} is blocked by {path:?}")]
    Blocked {
        /// Its name.
        registry: String,
        /// The file that says so.
        path: PathBuf,
    },
    /// A configuration file makes no sense.
    #[error("failed to read {path:?}: {reason}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Credentials were asked for in vain.
    #[error("failed to get credentials for {registry}: {reason}")]
    Credentials {
        /// For whom.
        registry: String,
        /// What went wrong.
        reason: String,
    },
    /// What came is not an image that can be kept.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host has no event loop, thread or file for us.
    #[error("failed to prepare for transfers")]
    Host(#[source] io::Error),
}

impl Error {
    /// Whether another place may have the image all the same.
    pub(crate) fn is_of_the_place(&self) -> bool {
        !matches!(self, Error::Image(ImageError::Io { .. }) | Error::Host(_))
    }

    /// Whether the same may go well in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Error::Unreachable { .. })
    }
}
