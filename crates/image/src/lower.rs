//! What a layer takes from the layers below it: the target of a hard link it does not bring itself, and the metadata of
//! directories its entries only imply. Unpacking onto a mounted overlay would give the same (copy-up).
//!
//! Invariant: lookups see what overlayfs would show of the lower layers: upper before lower, whiteouts and opaque
//! directories honoured. Whether anything was asked is remembered, since the layer's bytes then depend on those below.
//! Left to others: symbolic links in lower layers (not followed).

use std::path::PathBuf;

use crate::erofs::{FoundInode, Reader};
use crate::error::ImageError;
use crate::tree::Metadata;

/// The layers below one, lowest first.
pub(crate) struct LowerLayers<'a> {
    paths: &'a [PathBuf],
    readers: Vec<Reader>,
    asked: bool,
}

/// A node found below.
pub(crate) struct LowerNode<'a> {
    pub(crate) reader: &'a Reader,
    pub(crate) inode: FoundInode,
}

impl<'a> LowerLayers<'a> {
    pub(crate) fn new(paths: &'a [PathBuf]) -> LowerLayers<'a> {
        LowerLayers {
            paths,
            readers: Vec::new(),
            asked: false,
        }
    }

    /// Whether the layer above depends on these.
    pub(crate) fn were_asked(&self) -> bool {
        self.asked
    }

    /// The node overlayfs would show at this path.
    pub(crate) fn find(&mut self, parts: &[&[u8]]) -> Result<Option<LowerNode<'_>>, ImageError> {
        if self.paths.is_empty() {
            return Ok(None);
        }
        self.asked = true;
        if self.readers.is_empty() {
            self.readers = self
                .paths
                .iter()
                .map(|path| Reader::open(path))
                .collect::<Result<_, _>>()?;
        }
        for reader in self.readers.iter().rev() {
            match find_in(reader, parts)? {
                Step::Found(inode) => return Ok(Some(LowerNode { reader, inode })),
                Step::Hidden => return Ok(None),
                Step::Absent => {}
            }
        }
        Ok(None)
    }

    /// The metadata of the directory at this path, or what an implied directory gets.
    pub(crate) fn directory(&mut self, parts: &[&[u8]]) -> Result<Metadata, ImageError> {
        match self.find(parts)? {
            Some(node) if node.inode.is_directory() => {
                let mut metadata = node.reader.metadata(&node.inode)?;
                metadata
                    .xattrs
                    .retain(|(name, _)| !name.starts_with(b"trusted.overlay."));
                Ok(metadata)
            }
            Some(_) | None => Ok(Metadata::implied()),
        }
    }
}

enum Step {
    Found(FoundInode),
    /// Something in this layer hides what lower ones have there.
    Hidden,
    Absent,
}

fn find_in(reader: &Reader, parts: &[&[u8]]) -> Result<Step, ImageError> {
    let mut at = reader.root()?;
    let mut opaque = false;
    for part in parts {
        if !at.is_directory() {
            return Ok(Step::Hidden);
        }
        opaque |= is_opaque(&reader.metadata(&at)?);
        match reader.lookup(&at, part)? {
            Some(child) if child.is_whiteout() => return Ok(Step::Hidden),
            Some(child) => at = child,
            None if opaque => return Ok(Step::Hidden),
            None => return Ok(Step::Absent),
        }
    }
    Ok(Step::Found(at))
}

fn is_opaque(metadata: &Metadata) -> bool {
    metadata
        .xattrs
        .iter()
        .any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y")
}
