//! What API and guests share: data, tokens and how guests are to ask.

use std::io;
use std::time::Instant;

use crate::store::Store;
use crate::tokens::Tokens;

/// Which way of asking is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// With or without a token.
    #[default]
    V1,
    /// With a token only.
    V2,
}

/// A machine's metadata service without its network. Shared behind a mutex by the API
/// and every network device that leads to it.
#[derive(Debug)]
pub struct Metadata {
    /// The data.
    pub store: Store,
    /// Who may read it.
    pub tokens: Tokens,
    /// Which way of asking is served.
    pub version: Version,
    /// Text whatever form is asked for, as EC2's service does.
    pub imds_compat: bool,
}

impl Metadata {
    /// Empty, of version 1, for the machine `id`.
    ///
    /// # Errors
    /// The host's: it has no random bytes.
    pub fn new(id: &str, bytes_max: usize, now: Instant) -> io::Result<Self> {
        Ok(Self {
            store: Store::new(bytes_max),
            tokens: Tokens::new(id, now)?,
            version: Version::default(),
            imds_compat: false,
        })
    }
}
