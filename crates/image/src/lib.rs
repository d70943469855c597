//! OCI images, checked and turned into EROFS layers a machine mounts read-only.
//!
//! The road of an image: a [`Reference`] names where it lies, its manifest and configuration are read and checked
//! against their digests, each layer's tar stream is checked (size, digest, diff_id) while it flows through a decoder
//! into an in-memory tree and straight on into an EROFS file, and the [`Store`] keeps that file under its diff_id.
//! The second time, only the manifest and the configuration are read.
//!
//! Invariants:
//! - Nothing of an image is ever unpacked onto the host's file system: names, links, owners, device nodes are data in a
//!   tree, so no path can leave the image's root and no privilege is needed.
//! - A file under the store's `layers/` or `rootfs/` is complete and checked; what is not yet so lives under `tmp/`.
//! - The same layer gives the same bytes.
//! - Input is hostile: it earns an [`ImageError`], never a panic, and every quantity has a [`Limits`] field.
//!
//! Left to others: talking to registries (`registry`), mounting the layers (the guest's init), finding users in `/etc/passwd`
//! (the guest's init).

#![forbid(unsafe_code)]

mod blobs;
mod catalog;
mod change;
mod collect;
mod content;
mod decompress;
mod details;
mod digest;
mod docker_archive;
mod erofs;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod import;
mod layer;
mod limits;
mod load;
mod lower;
mod manifest;
mod name;
mod pax;
mod prepare;
mod progress;
mod reference;
mod rootfs;
mod save;
mod store;
mod tar_stream;
mod tree;

pub use catalog::{Entry, Found, Hold};
pub use collect::Freed;
pub use content::Download;
pub use details::{Details, Step};
pub use digest::{Digest, DigestAlgorithm};
pub use error::ImageError;
pub use import::Import;
pub use limits::Limits;
pub use manifest::{ImageConfig, ManifestChain, Part, manifest_chain, media_type_of, parts_of};
pub use name::Name;
pub use prepare::Image;
pub use progress::{Progress, Silent};
pub use reference::Reference;
pub use store::Store;
