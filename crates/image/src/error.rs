//! Everything that can go wrong with an image.
//!
//! Invariant: each message names its object once and leaves the cause to `source`. Left to others: printing the chain
//! and the hint for the user.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// Why an image could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The image argument has no known form.
    #[error(
        "unknown image {given:?}: use a name, oci:DIR[:TAG], docker-archive:FILE or rootfs:DIR"
    )]
    UnknownReference {
        /// What was asked for.
        given: String,
    },
    /// Not an image's name.
    #[error("{given:?} is no image's name: {reason}")]
    BadName {
        /// What was asked for.
        given: String,
        /// The rule.
        reason: &'static str,
    },
    /// Not an instruction that changes how an image is run.
    #[error("{given:?} changes no image: {reason}")]
    BadChange {
        /// What was asked for.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No image of that name or identifier is in the store.
    #[error("no such image: {given}")]
    NotHere {
        /// What was asked for.
        given: String,
    },
    /// Several images have identifiers that begin like this.
    #[error("more than one image has an identifier that begins with {given}")]
    AmbiguousId {
        /// What was asked for.
        given: String,
    },
    /// A file or directory of the host did not do as asked.
    #[error("failed to {action} {path:?}")]
    Io {
        /// The verb.
        action: &'static str,
        /// The object.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither `KOMBI_HOME`, `XDG_DATA_HOME` nor `HOME` says where images are kept.
    #[error("no place to keep images: set KOMBI_HOME, XDG_DATA_HOME or HOME")]
    NoStoreRoot,
    /// The path is not an OCI image layout.
    #[error("no image layout in {path:?}: it has no usable {missing}")]
    NotALayout {
        /// The directory or archive.
        path: PathBuf,
        /// The file that is missing or unusable.
        missing: &'static str,
    },
    /// The layout has no image of that name.
    #[error("no image tagged {tag:?} in {path:?}: it has {known}")]
    TagNotFound {
        /// What was asked for.
        tag: String,
        /// The layout.
        path: PathBuf,
        /// The tags it has, for the reader.
        known: String,
    },
    /// The layout has several images and none was chosen.
    #[error("{path:?} holds {count} images: choose one of {known}")]
    Ambiguous {
        /// The layout or archive.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The names it has, for the reader.
        known: String,
    },
    /// No variant of the image runs on this machine's kind.
    #[error("image {image} is not for linux/amd64: it is for {found}")]
    WrongPlatform {
        /// The image's digest.
        image: String,
        /// The platforms it is for.
        found: String,
    },
    /// A document of the image is not what it should be.
    #[error("failed to read {what}")]
    Json {
        /// The document.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A document of the image contradicts itself or another.
    #[error("{what} is not usable: {reason}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not `algorithm:hex` with an algorithm that is checked here.
    #[error("{given:?} is not a sha256 or sha512 digest")]
    BadDigest {
        /// The text.
        given: String,
    },
    /// A blob the image names is not there.
    #[error("blob {digest} is missing from {path:?}")]
    BlobMissing {
        /// The blob.
        digest: Digest,
        /// The layout or archive.
        path: PathBuf,
    },
    /// A blob has another size than its descriptor says.
    #[error("blob {digest} has {found} bytes where its descriptor says {expected}")]
    SizeMismatch {
        /// The blob.
        digest: Digest,
        /// Bytes by the descriptor.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A blob's content is not what its digest says.
    #[error("blob {expected} is corrupt: its content has digest {found}")]
    DigestMismatch {
        /// By the descriptor.
        expected: Digest,
        /// By its content.
        found: Digest,
    },
    /// A layer's decompressed content is not what the image's configuration says.
    #[error(
        "layer {layer} is corrupt: its content has diff_id {found}, the configuration says {expected}"
    )]
    DiffIdMismatch {
        /// The layer's blob.
        layer: String,
        /// By the configuration.
        expected: Digest,
        /// By its content.
        found: Digest,
    },
    /// More than a limit allows.
    #[error("{what} is too large: {limit} is {max}")]
    Limit {
        /// The object.
        what: String,
        /// The field of [`crate::Limits`], which carries its unit.
        limit: &'static str,
        /// Its value.
        max: u64,
    },
    /// A layer was refused; the source says which entry and why.
    #[error("layer {layer} is refused")]
    Layer {
        /// The layer's digest.
        layer: String,
        /// Why.
        source: Box<ImageError>,
    },
    /// One entry of a layer was refused.
    #[error("entry {entry:?} {reason}")]
    Entry {
        /// The entry's name, bytes that are not UTF-8 replaced.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A stream of a layer ended early or is not in the format it seems to have.
    #[error("failed to read {what}")]
    Stream {
        /// The stream.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file changed while it was copied.
    #[error("{path:?} changed while it was read: try again when nothing writes to it")]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

impl ImageError {
    /// Wraps an error of the host's file system.
    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> ImageError {
        let path = path.as_ref().to_path_buf();
        move |source| ImageError::Io {
            action,
            path,
            source,
        }
    }

    /// An entry refused for `reason`.
    pub(crate) fn entry(name: &[u8], reason: impl Into<String>) -> ImageError {
        const SHOWN_BYTES_MAX: usize = 300;
        let shown = name.get(..SHOWN_BYTES_MAX).unwrap_or(name);
        let mut entry = String::from_utf8_lossy(shown).into_owned();
        if shown.len() < name.len() {
            entry.push('…');
        }
        ImageError::Entry {
            entry,
            reason: reason.into(),
        }
    }

    /// Names the layer an error came from, unless it says so by itself.
    pub(crate) fn in_layer(self, layer: &str) -> ImageError {
        match self {
            error @ (ImageError::Layer { .. }
            | ImageError::DigestMismatch { .. }
            | ImageError::SizeMismatch { .. }
            | ImageError::DiffIdMismatch { .. }
            | ImageError::BlobMissing { .. }
            | ImageError::Io { .. }) => error,
            other => ImageError::Layer {
                layer: layer.to_owned(),
                source: Box::new(other),
            },
        }
    }
}
