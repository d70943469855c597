//! Images from and to registries (OCI distribution specification 1.1), by docker's and podman's configuration.
//!
//! ```text
//! Name ── Configuration ──▶ places to try: mirrors, then the registry itself
//!                             │ each: Remote (credentials, TLS or not, retries)
//!                             ▼
//! pull: manifest ─▶ configuration and layers, several at once ─▶ image::Store ─▶ name
//!                             └─ each layer becomes EROFS while the next ones arrive
//! push: the same, the other way: blobs that are not there yet, then the manifest
//! ```
//!
//! Invariant: nothing that a registry says is believed: documents are bounded and checked against their digests, blobs
//! against size and digest, and an image gets its name only when all of it is here. A pull that ends early, whatever
//! ended it, leaves downloads to be gone on with.
//!
//! Left to others: what an image is and where it is kept (`image`), showing progress.

#![forbid(unsafe_code)]

mod accounts;
mod configuration;
mod credentials;
mod error;
mod login;
mod progress;
mod pull;
mod push;
mod remote;

pub use configuration::{Configuration, Place};
pub use credentials::Credentials;
pub use error::Error;
pub use progress::{Silent, Transfers};
pub use pull::Pulled;

use std::time::Duration;

use tokio::runtime::Runtime;

/// A transfer without a byte for so long is broken off, if nobody says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// The registries of this host's user.
#[derive(Debug)]
pub struct Registries {
    configuration: Configuration,
    credentials: Credentials,
    runtime: Runtime,
    patience: Duration,
}

impl Registries {
    /// Registries by the given configuration.
    ///
    /// # Errors
    ///
    /// [`Error::Host`]: no event loop can be had.
    pub fn new(configuration: Configuration, credentials: Credentials) -> Result<Self, Error> {
        // An error says that another call was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::Host)?;
        Ok(Self {
            configuration,
            credentials,
            runtime,
            patience: PATIENCE,
        })
    }

    /// Breaks off what has no byte for so long; 30 seconds by default.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// As the user's files say; see [`Configuration::of_user`] and [`Credentials::of_user`].
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`], [`Error::Host`].
    pub fn of_user() -> Result<Self, Error> {
        Self::new(Configuration::of_user()?, Credentials::of_user())
    }
}
