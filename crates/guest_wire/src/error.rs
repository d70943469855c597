//! What can go wrong between the two ends of the control stream.

use std::io;

use crate::Version;

/// An error of the control stream; every one of them ends the conversation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream could not be read or written.
    #[error("failed to use the control stream")]
    Stream(#[source] io::Error),
    /// The stream ended inside a frame.
    #[error("control stream ended inside a frame")]
    Truncated,
    /// The stream ended before the peer's [`crate::Hello`]: the peer is gone, or never was what we took it for.
    #[error("control stream ended before its greeting")]
    NoHello,
    /// A frame is longer than [`crate::FRAME_BYTES_MAX`].
    #[error("control frame of {length} bytes is longer than the {limit} allowed")]
    FrameTooLong {
        /// Length of the body, in bytes.
        length: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The first frame is no [`crate::Hello`].
    #[error("control stream does not start with a Kombi greeting")]
    NotHello,
    /// The two ends speak different major versions.
    #[error(
        "guest protocol {theirs} does not fit this side's {ours}; \
         install kombi and its guest init (kombi-init) from the same release"
    )]
    VersionMismatch {
        /// What this side speaks.
        ours: Version,
        /// What the peer said it speaks.
        theirs: Version,
    },
    /// A frame holds no message that this version knows.
    #[error("control frame of {length} bytes holds no known message")]
    Malformed {
        /// Length of the body, in bytes.
        length: usize,
        /// What the decoder says.
        #[source]
        source: postcard::Error,
    },
    /// A frame holds a message and then something else.
    #[error("control frame has {surplus} bytes after its message")]
    Surplus {
        /// Bytes after the message.
        surplus: usize,
    },
    /// A message could not be encoded.
    #[error("failed to encode a control message")]
    Encode(#[source] postcard::Error),
}
