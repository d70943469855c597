//! Where an image's bytes lie: an OCI layout's directory, or inside an archive.
//!
//! Invariant: only regular files are opened, and a blob's path is made of a checked digest, so it cannot leave its
//! directory (unless the user put a symbolic link there himself). Left to others: what the bytes mean.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::docker_archive::Archive;
use crate::error::ImageError;
use crate::limits::Limits;

/// A place that has blobs.
#[derive(Debug)]
pub(crate) enum Blobs {
    /// An OCI image layout (image-layout.md).
    Layout(PathBuf),
    /// The same, or `docker save`'s form, in a tar file.
    Archive(Archive),
}

/// A run of bytes in a file, read without moving the file's own position.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Section {
    pub(crate) fn new(file: Arc<File>, at: u64, bytes: u64) -> Section {
        Section {
            file,
            at,
            end: at.saturating_add(bytes),
        }
    }

    pub(crate) fn bytes_left(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.bytes_left())
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self
            .file
            .read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(count as u64);
        Ok(count)
    }
}

impl Blobs {
    /// The directory or file, for errors.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Blobs::Layout(dir) => dir,
            Blobs::Archive(archive) => archive.path(),
        }
    }

    /// A file by its name in the layout; none when it is not there.
    pub(crate) fn file(&self, name: &str) -> Result<Option<Section>, ImageError> {
        match self {
            Blobs::Layout(dir) => open_section(&dir.join(name)),
            Blobs::Archive(archive) => Ok(archive.member(name)),
        }
    }

    /// A blob by its digest.
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Section, ImageError> {
        let name = format!("blobs/{}", digest.to_string().replace(':', "/"));
        let missing = || ImageError::BlobMissing {
            digest: digest.clone(),
            path: self.path().to_path_buf(),
        };
        self.file(&name)?.ok_or_else(missing)
    }

    /// A whole blob that is a document: its size, when described, and its digest are checked.
    pub(crate) fn document(
        &self,
        digest: &Digest,
        size: Option<u64>,
        limits: &Limits,
    ) -> Result<Vec<u8>, ImageError> {
        let section = self.blob(digest)?;
        let found = section.bytes_left();
        if let Some(expected) = size
            && expected != found
        {
            return Err(ImageError::SizeMismatch {
                digest: digest.clone(),
                expected,
                found,
            });
        }
        let bytes = read_document(section, &digest.to_string(), self.path(), limits)?;
        let found = digest.same_kind_of(&bytes);
        if found != *digest {
            return Err(ImageError::DigestMismatch {
                expected: digest.clone(),
                found,
            });
        }
        Ok(bytes)
    }
}

/// A whole JSON document, bounded.
pub(crate) fn read_document(
    section: Section,
    what: &str,
    path: &Path,
    limits: &Limits,
) -> Result<Vec<u8>, ImageError> {
    if section.bytes_left() > limits.json_bytes_max {
        let max = limits.json_bytes_max;
        return Err(ImageError::Limit {
            what: what.to_owned(),
            limit: "json_bytes_max",
            max,
        });
    }
    let mut bytes = Vec::new();
    let mut bounded = section.take(limits.json_bytes_max);
    bounded
        .read_to_end(&mut bytes)
        .map_err(ImageError::io("read", path))?;
    Ok(bytes)
}

/// Opens a regular file; none when there is nothing of that name.
pub(crate) fn open_section(path: &Path) -> Result<Option<Section>, ImageError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => return Err(ImageError::io("open", path)(error)),
    };
    if !metadata.is_file() {
        // A FIFO would block for ever.
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(ImageError::io("open", path)(source));
    }
    let file = File::open(path).map_err(ImageError::io("open", path))?;
    Ok(Some(Section::new(Arc::new(file), 0, metadata.len())))
}
