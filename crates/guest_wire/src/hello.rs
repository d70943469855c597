//! The greeting: the one frame that every version, past and future, can read.
//!
//! Body, all little-endian: magic (8 bytes), major (`u16`), minor (`u16`), reserved (`u32`, zero). A later version may
//! append bytes; readers ignore them. Nothing else about it may ever change.

use std::fmt;

use crate::WireError;

const MAGIC: [u8; 8] = *b"KOMBIWIR";

/// Bytes of a greeting's body that every version writes and reads.
pub(crate) const HELLO_BYTES: usize = 16;

/// The version that this build speaks.
pub const VERSION: Version = Version { major: 2, minor: 0 };

/// A version of the protocol.
///
/// Peers of different `major` cannot talk. A higher `minor` only adds messages, so that the higher side keeps to the
/// messages of the lower one, which [`Hello::agree`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Incremented by a change that older peers would misread.
    pub major: u16,
    /// Incremented by a message that older peers do not know.
    pub minor: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The first frame in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// What the sender speaks.
    pub version: Version,
}

impl Hello {
    /// The greeting of this build.
    pub const OURS: Self = Self { version: VERSION };

    /// The body of the greeting's frame.
    #[must_use]
    pub fn to_body(self) -> [u8; HELLO_BYTES] {
        let [m0, m1, m2, m3, m4, m5, m6, m7] = MAGIC;
        let [a0, a1] = self.version.major.to_le_bytes();
        let [i0, i1] = self.version.minor.to_le_bytes();
        [m0, m1, m2, m3, m4, m5, m6, m7, a0, a1, i0, i1, 0, 0, 0, 0]
    }

    /// Reads a greeting from its frame's body.
    ///
    /// # Errors
    /// [`WireError::NotHello`] when the body is too short or does not start with the magic.
    pub fn from_body(body: &[u8]) -> Result<Self, WireError> {
        let Some(&[m0, m1, m2, m3, m4, m5, m6, m7, a0, a1, i0, i1, _, _, _, _]) =
            body.first_chunk::<HELLO_BYTES>()
        else {
            return Err(WireError::NotHello);
        };
        if [m0, m1, m2, m3, m4, m5, m6, m7] != MAGIC {
            return Err(WireError::NotHello);
        }
        let version = Version {
            major: u16::from_le_bytes([a0, a1]),
            minor: u16::from_le_bytes([i0, i1]),
        };
        Ok(Self { version })
    }

    /// The version in which this build and the sender of this greeting may talk.
    ///
    /// # Errors
    /// [`WireError::VersionMismatch`], naming both versions and the way out, when the majors differ.
    pub fn agree(self) -> Result<Version, WireError> {
        let (ours, theirs) = (VERSION, self.version);
        if ours.major == theirs.major {
            Ok(ours.min(theirs))
        } else {
            Err(WireError::VersionMismatch { ours, theirs })
        }
    }
}
