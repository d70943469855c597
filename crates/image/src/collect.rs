//! Removing what no image of the list needs.
//!
//! Invariant: nothing is removed while anybody holds the store ([`Store::hold`]): who pulls, makes layers or starts a
//! machine does until what it needs is named or open. What is removed can be made or pulled again. Left to others:
//! which images are wanted.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{json, manifest_chain, parts_of};
use crate::store::{Shelf, Store};

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Files.
    pub files: u64,
    /// Bytes that they had on disk.
    pub bytes: u64,
}

impl Store {
    /// Removes blobs, layers, directories that were made ready, and downloads that stopped, as far as no image of the
    /// list has them. `None` when somebody works with the store: nothing was removed then.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`]; what cannot be read of an image keeps nothing alive but itself.
    pub fn collect(&self) -> Result<Option<Freed>, ImageError> {
        let Some(_alone) = self.hold_alone()? else {
            return Ok(None);
        };
        let mut needed = Needed::default();
        for entry in self.entries()? {
            needed.blobs.insert(self.blob_path(&entry.target));
            // A broken image is no reason to keep the disk full.
            let _ = self.mark(&entry.target, &mut needed);
        }
        let mut freed = Freed::default();
        for folder in ["blobs/sha256", "blobs/sha512"] {
            sweep(&self.root().join(folder), &mut freed, |path| {
                !needed.blobs.contains(path)
            })?;
        }
        sweep(&self.root().join("downloads"), &mut freed, |_| true)?;
        let layers = self.root().join(Shelf::Layers.folder());
        sweep(&layers, &mut freed, |path| {
            let stem = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default();
            let diff_id = stem.split_once("-on-").map_or(stem, |(diff_id, _)| diff_id);
            !needed.layers.contains(diff_id)
        })?;
        sweep(
            &self.root().join(Shelf::Rootfs.folder()),
            &mut freed,
            |_| true,
        )?;
        Ok(Some(freed))
    }

    fn mark(&self, target: &Digest, needed: &mut Needed) -> Result<(), ImageError> {
        let blobs = Blobs::Layout(self.root().to_path_buf());
        let get = |digest: &Digest, size| blobs.document(digest, size, self.limits());
        let chain = manifest_chain(target, None, get)?;
        let (manifest, bytes) = chain.manifest;
        let documents = chain.indexes.into_iter().map(|(digest, _)| digest);
        for digest in documents.chain([manifest.clone()]) {
            needed.blobs.insert(self.blob_path(&digest));
        }
        let ((config, size), layers) = parts_of(&bytes, &manifest, self.limits())?;
        for digest in layers.iter().map(|(digest, _)| digest).chain([&config]) {
            needed.blobs.insert(self.blob_path(digest));
        }
        let text = blobs.document(&config, Some(size), self.limits())?;
        let read: oci_spec::image::ImageConfiguration =
            json(&text, || format!("image configuration {config}"))?;
        for diff_id in read.rootfs().diff_ids() {
            needed
                .layers
                .insert(diff_id.parse::<Digest>()?.hex().to_owned());
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Needed {
    blobs: HashSet<PathBuf>,
    /// Hexadecimal digits of diff_ids.
    layers: HashSet<String>,
}

fn sweep(folder: &Path, freed: &mut Freed, goes: impl Fn(&Path) -> bool) -> Result<(), ImageError> {
    use std::os::unix::fs::MetadataExt;
    let list = match fs::read_dir(folder) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ImageError::io("list", folder)(error)),
    };
    for entry in list {
        let path = entry.map_err(ImageError::io("list", folder))?.path();
        if !goes(&path) {
            continue;
        }
        let bytes =
            fs::symlink_metadata(&path).map_or(0, |found| found.blocks().saturating_mul(512));
        match fs::remove_file(&path) {
            Ok(()) => {
                freed.files = freed.files.saturating_add(1);
                freed.bytes = freed.bytes.saturating_add(bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(ImageError::io("remove", &path)(error)),
        }
    }
    Ok(())
}
