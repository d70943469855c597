//! From a [`Reference`] to layers a machine can mount.
//!
//! Invariant: a layer is committed to the store only when its size, its digest and its diff_id were right and its whole
//! stream was read. When both the content and its digest are wrong, the digest is reported: that is the cause.
//! Left to others: what becomes of the layers.

use std::io::{self, Read};
use std::path::PathBuf;

use crate::blobs::{Blobs, Section};
use crate::decompress::decompress;
use crate::digest::{Digest, DigestAlgorithm, HashingReader};
use crate::docker_archive::Archive;
use crate::erofs::Writer;
use crate::error::ImageError;
use crate::layer::read_layer;
use crate::lower::LowerLayers;
use crate::manifest::{self, ImageConfig, LayerSource, Resolved};
use crate::progress::Progress;
use crate::reference::Reference;
use crate::rootfs;
use crate::store::{Claim, Shelf, Store};

/// An image ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// EROFS files, lowest layer first. Whiteouts and opaque directories are in overlayfs's form.
    pub layers: Vec<PathBuf>,
    /// How it wants to be run; empty for `rootfs:`.
    pub config: ImageConfig,
    /// The manifest's digest (`oci:`), the configuration's (`docker-archive:`), or of the directory's names, sizes,
    /// times and inode numbers (`rootfs:`).
    pub digest: Digest,
}

impl Store {
    /// Makes the image's layers, as far as they are not there yet.
    ///
    /// # Errors
    ///
    /// Any [`ImageError`]. Nothing is left in the store but the layers that were finished before.
    pub fn prepare(
        &self,
        reference: &Reference,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        let (blobs, tag) = match reference {
            Reference::Named(name) => {
                let entry = self.entry(name)?.ok_or_else(|| ImageError::NotHere {
                    given: name.familiar(),
                })?;
                return self.prepare_target(&entry.target, progress);
            }
            Reference::Rootfs { dir } => return rootfs::prepare(self, dir, progress),
            Reference::Oci { dir, tag } => {
                if !dir.is_dir() {
                    return Err(ImageError::io("open image layout", dir)(
                        io::ErrorKind::NotFound.into(),
                    ));
                }
                (Blobs::Layout(dir.clone()), tag.as_deref())
            }
            Reference::DockerArchive { file } => (
                Blobs::Archive(Archive::open(file, &self.scratch(), self.limits())?),
                None,
            ),
        };
        self.make_layers(&manifest::resolve(blobs, tag, self.limits())?, progress)
    }

    /// As [`Store::prepare`], of an image of the store whose manifest or index is `target`.
    ///
    /// # Errors
    ///
    /// As [`Store::prepare`].
    pub fn prepare_target(
        &self,
        target: &Digest,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        let blobs = Blobs::Layout(self.root().to_path_buf());
        let resolved = manifest::resolve_target(blobs, target, None, self.limits())?;
        self.make_layers(&resolved, progress)
    }

    fn make_layers(
        &self,
        resolved: &Resolved,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        progress.layers(resolved.layers.len());
        let mut layers = Vec::with_capacity(resolved.layers.len());
        let mut chain: Option<Digest> = None;
        for (index, layer) in resolved.layers.iter().enumerate() {
            let names = LayerNames::new(&layer.diff_id, chain.as_ref());
            let (path, cached) = match names.find(self) {
                Some(path) => (path, true),
                None => self.make_layer(resolved, layer, index, &names, &layers, progress)?,
            };
            progress.layer_done(index, cached);
            layers.push(path);
            chain = Some(chain_id(chain.as_ref(), &layer.diff_id));
        }
        Ok(Image {
            layers,
            config: resolved.config.clone(),
            digest: resolved.digest.clone(),
        })
    }

    fn make_layer(
        &self,
        resolved: &Resolved,
        layer: &LayerSource,
        index: usize,
        names: &LayerNames,
        below: &[PathBuf],
        progress: &mut dyn Progress,
    ) -> Result<(PathBuf, bool), ImageError> {
        let claim = self.claim(&names.alone, &mut || progress.layer_waiting(index))?;
        if let Some(path) = names.find(self) {
            return Ok((path, true));
        }
        progress.layer_wanted(index);
        let stored = resolved.open(layer)?;
        progress.layer_start(index, &layer.name(), stored.bytes_left());
        let mut on_bytes = |bytes| progress.layer_bytes(index, bytes);
        let mut lower = LowerLayers::new(below);
        self.build_layer(&claim, layer, stored, names, &mut lower, &mut on_bytes)
            .map_err(|error| error.in_layer(&layer.name()))?;
        let name = if lower.were_asked() {
            &names.on_others
        } else {
            &names.alone
        };
        let place = self.place(Shelf::Layers, name);
        claim.commit(&place)?;
        Ok((place, false))
    }

    fn build_layer(
        &self,
        claim: &Claim,
        layer: &LayerSource,
        stored: Section,
        names: &LayerNames,
        lower: &mut LowerLayers<'_>,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<(), ImageError> {
        let limits = self.limits();
        let counted = CountingReader {
            inner: stored,
            bytes: 0,
            on_bytes,
        };
        let algorithm = layer
            .digest()
            .map_or(DigestAlgorithm::Sha256, Digest::algorithm);
        let mut blob = HashingReader::new(counted, algorithm, limits.layer_blob_bytes_max);
        let unpacked = self.unpack(claim, layer, &mut blob, names, lower);
        let drained = blob.drain();
        if blob.is_over() {
            let max = limits.layer_blob_bytes_max;
            return Err(ImageError::Limit {
                what: "its stored form".to_owned(),
                limit: "layer_blob_bytes_max",
                max,
            });
        }
        drained.map_err(|source| ImageError::Stream {
            what: "its stored form",
            source,
        })?;
        let found = blob.finish();
        if let Some(expected) = layer.digest()
            && *expected != found
        {
            return Err(ImageError::DigestMismatch {
                expected: expected.clone(),
                found,
            });
        }
        unpacked
    }

    fn unpack(
        &self,
        claim: &Claim,
        layer: &LayerSource,
        blob: &mut dyn Read,
        names: &LayerNames,
        lower: &mut LowerLayers<'_>,
    ) -> Result<(), ImageError> {
        let limits = self.limits();
        let scratch = self.scratch();
        let spool =
            tempfile::tempfile_in(&scratch).map_err(ImageError::io("write to", &scratch))?;
        let mut writer = Writer::new(claim.file()?, claim.path(), spool, limits)?;
        let algorithm = layer.diff_id.algorithm();
        let mut tar = HashingReader::new(decompress(blob)?, algorithm, limits.layer_tar_bytes_max);
        let tree = read_layer(&mut tar, &mut writer, lower, limits);
        // What follows the archive's end counts for the diff_id.
        let drained = if tree.is_ok() { tar.drain() } else { Ok(()) };
        if tar.is_over() {
            let max = limits.layer_tar_bytes_max;
            return Err(ImageError::Limit {
                what: "its tar stream".to_owned(),
                limit: "layer_tar_bytes_max",
                max,
            });
        }
        let tree = tree?;
        drained.map_err(|source| ImageError::Stream {
            what: "its compressed stream",
            source,
        })?;
        let found = tar.finish();
        if found != layer.diff_id {
            let expected = layer.diff_id.clone();
            return Err(ImageError::DiffIdMismatch {
                layer: layer.name(),
                expected,
                found,
            });
        }
        let name = if lower.were_asked() {
            &names.on_others
        } else {
            &names.alone
        };
        writer.finish(&tree, Digest::sha256_of(name.as_bytes()).uuid())?;
        Ok(())
    }
}

/// What a layer may be called in the store.
struct LayerNames {
    alone: String,
    on_others: String,
}

impl LayerNames {
    fn new(diff_id: &Digest, chain: Option<&Digest>) -> LayerNames {
        let alone = diff_id.hex().to_owned();
        let on_others = match chain {
            Some(chain) => format!("{alone}-on-{}", chain.hex()),
            None => alone.clone(),
        };
        LayerNames { alone, on_others }
    }

    fn find(&self, store: &Store) -> Option<PathBuf> {
        let alone = store.finished(Shelf::Layers, &self.alone);
        alone.or_else(|| store.finished(Shelf::Layers, &self.on_others))
    }
}

/// OCI image configuration, "Layer ChainID".
fn chain_id(below: Option<&Digest>, diff_id: &Digest) -> Digest {
    match below {
        Some(below) => Digest::sha256_of(format!("{below} {diff_id}").as_bytes()),
        None => diff_id.clone(),
    }
}

/// Tells how much was read.
struct CountingReader<'a> {
    inner: Section,
    bytes: u64,
    on_bytes: &'a mut dyn FnMut(u64),
}

impl Read for CountingReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes = self.bytes.saturating_add(count as u64);
        (self.on_bytes)(self.bytes);
        Ok(count)
    }
}
