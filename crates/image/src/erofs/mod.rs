//! EROFS images, uncompressed: a writer, and a reader for what the writer wrote.
//!
//! On-disk format: `fs/erofs/erofs_fs.h` of Linux 6.12 (dual-licensed; only its facts are used here).
//!
//! Invariant: what is written here mounts on any Linux since 5.4: no incompatible feature is used. Left to others:
//! compression, deduplication.

mod directory;
mod reader;
mod spec;
mod writer;

pub(crate) use reader::{FoundInode, Reader};
pub(crate) use writer::{FileData, Writer};
