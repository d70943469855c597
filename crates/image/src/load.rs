//! Images out of an archive, into the store: what `docker save`, `podman save` and OCI tools write.
//!
//! Invariant: an image gets its names only when its layers were checked and made. A manifest that is in the archive is
//! kept as it is, so the image keeps its digest; `docker save`'s older form has none, and gets one that is the same each
//! time. Left to others: the archive's own form (`docker_archive.rs`).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifestBuilder, MediaType, SCHEMA_VERSION};

use crate::blobs::{Blobs, Section};
use crate::catalog::{Entry, oci_digest};
use crate::decompress::{Compression, decompress};
use crate::digest::{Digest, DigestAlgorithm, HashingReader};
use crate::docker_archive::{Archive, SavedImage};
use crate::error::ImageError;
use crate::manifest::{REF_NAME, digest_in_name, json, manifest_chain, parts_of};
use crate::name::Name;
use crate::progress::Progress;
use crate::store::Store;

/// containerd's annotation of an image's full name.
pub(crate) const FULL_NAME: &str = "io.containerd.image.name";
const BUFFER_BYTES: usize = 256 << 10;

/// An image of the archive, in the store but without its names.
struct Arrived {
    target: Digest,
    size: u64,
    media_type: String,
    names: Vec<Name>,
}

impl Store {
    /// Takes all images of an archive. Returns each with each of its names, or once without.
    ///
    /// # Errors
    ///
    /// Any [`ImageError`]; images before the one that failed are in the store.
    pub fn load(&self, file: &Path, progress: &mut dyn Progress) -> Result<Vec<Entry>, ImageError> {
        let _hold = self.hold()?;
        self.load_archive(
            Archive::open(file, &self.scratch(), self.limits())?,
            progress,
        )
    }

    /// As [`Store::load`], of an archive that can only be read once.
    ///
    /// # Errors
    ///
    /// As [`Store::load`].
    pub fn load_stream(
        &self,
        stream: &mut dyn Read,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Entry>, ImageError> {
        let _hold = self.hold()?;
        let file = self.spool(stream)?;
        let archive = Archive::of(file, Path::new("-"), &self.scratch(), self.limits())?;
        self.load_archive(archive, progress)
    }

    /// An unnamed file with all of `stream`.
    pub(crate) fn spool(&self, stream: &mut dyn Read) -> Result<File, ImageError> {
        let scratch = self.scratch();
        let mut file =
            tempfile::tempfile_in(&scratch).map_err(ImageError::io("write to", &scratch))?;
        let max = self.limits().archive_bytes_max;
        let copied = io::copy(&mut stream.take(max), &mut file);
        let copied = copied.map_err(ImageError::io("write to", &scratch))?;
        if copied == max {
            return Err(ImageError::Limit {
                what: "the archive".to_owned(),
                limit: "archive_bytes_max",
                max,
            });
        }
        Ok(file)
    }

    fn load_archive(
        &self,
        archive: Archive,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Entry>, ImageError> {
        let saved = archive.saved_images(self.limits())?;
        let blobs = Blobs::Archive(archive);
        let layout = match blobs.file("index.json")? {
            Some(section) => {
                let what = format!("index.json of {:?}", blobs.path());
                let bytes =
                    crate::blobs::read_document(section, &what, blobs.path(), self.limits())?;
                Some(json::<ImageIndex>(&bytes, || what)?)
            }
            None => None,
        };
        let mut arrived: Vec<Arrived> = Vec::new();
        match (layout, saved) {
            (Some(index), saved) => {
                for descriptor in index.manifests() {
                    let mut image = self.take_described(&blobs, descriptor)?;
                    // An index lists an image once for each of its names.
                    let known = arrived
                        .iter_mut()
                        .find(|other| other.target == image.target);
                    match known {
                        Some(known) => known.names.append(&mut image.names),
                        None => arrived.push(image),
                    }
                }
                // docker's list has names that the layout may lack.
                for image in saved.iter().flatten() {
                    self.add_names(&mut arrived, image)?;
                }
            }
            (None, Some(saved)) => {
                for image in &saved {
                    arrived.push(self.take_saved(&blobs, image)?);
                }
            }
            (None, None) => {
                return Err(ImageError::NotALayout {
                    path: blobs.path().to_path_buf(),
                    missing: "manifest.json or index.json",
                });
            }
        }
        let mut entries = Vec::new();
        for image in arrived {
            self.prepare_target(&image.target, progress)?;
            let named: Vec<Option<Name>> = match image.names.is_empty() {
                true => vec![None],
                false => image.names.into_iter().map(Some).collect(),
            };
            for name in named {
                let entry = Entry {
                    name,
                    target: image.target.clone(),
                    size: image.size,
                    media_type: image.media_type.clone(),
                };
                self.add_entry(&entry)?;
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    /// An image of an OCI layout.
    fn take_described(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
    ) -> Result<Arrived, ImageError> {
        let target: Digest = descriptor.digest().as_ref().parse()?;
        let get = |digest: &Digest, size| blobs.document(digest, size, self.limits());
        let chain = manifest_chain(&target, Some(descriptor.size()), get)?;
        for (digest, bytes) in chain.indexes.iter().chain([&chain.manifest]) {
            self.put_document(digest, bytes)?;
        }
        let (manifest, bytes) = &chain.manifest;
        let (config, layers) = parts_of(bytes, manifest, self.limits())?;
        for (digest, size) in [config].iter().chain(&layers) {
            let section = blobs.blob(digest)?;
            self.take_blob(digest, *size, section, blobs.path())?;
        }
        Ok(Arrived {
            target,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
            names: name_in(descriptor).into_iter().collect(),
        })
    }

    /// An image of `manifest.json`.
    fn take_saved(&self, blobs: &Blobs, image: &SavedImage) -> Result<Arrived, ImageError> {
        let malformed = |what: &str, name: &str| ImageError::Malformed {
            what: format!("docker archive {:?}", blobs.path()),
            reason: format!("it has no {what} {name:?}"),
        };
        let member = |what: &str, name: &str| {
            let found = blobs.file(name)?;
            found.ok_or_else(|| malformed(what, name))
        };
        let section = member("configuration", &image.config)?;
        let what = format!("configuration of {:?}", blobs.path());
        let config = crate::blobs::read_document(section, &what, blobs.path(), self.limits())?;
        let config_digest = Digest::sha256_of(&config);
        self.put_document(&config_digest, &config)?;
        let mut layers = Vec::new();
        for name in image.layers.iter().flatten() {
            let section = member("layer", name)?;
            let size = section.bytes_left();
            let known = digest_in_name(name).filter(|_| name.starts_with("blobs/"));
            let digest = match known {
                Some(digest) => digest,
                None => self.digest_of(section.clone(), blobs.path())?,
            };
            let media_type = Compression::of(&mut section.clone())
                .map_err(ImageError::io("read", blobs.path()))?
                .media_type();
            self.take_blob(&digest, size, section, blobs.path())?;
            layers.push(Descriptor::new(media_type, size, oci_digest(&digest)?));
        }
        let config = Descriptor::new(
            MediaType::ImageConfig,
            config.len() as u64,
            oci_digest(&config_digest)?,
        );
        let (target, size) = self.put_manifest(config, layers)?;
        Ok(Arrived {
            target,
            size,
            media_type: MediaType::ImageManifest.to_string(),
            names: names_of(image),
        })
    }

    /// Keeps the manifest of these; returns its digest and size.
    pub(crate) fn put_manifest(
        &self,
        config: Descriptor,
        layers: Vec<Descriptor>,
    ) -> Result<(Digest, u64), ImageError> {
        let malformed = |reason: String| ImageError::Malformed {
            what: "the image's new manifest".to_owned(),
            reason,
        };
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(layers)
            .build()
            .map_err(|error| malformed(error.to_string()))?;
        let bytes = serde_json::to_vec(&manifest).map_err(|error| malformed(error.to_string()))?;
        let digest = Digest::sha256_of(&bytes);
        self.put_document(&digest, &bytes)?;
        Ok((digest, bytes.len() as u64))
    }

    fn add_names(&self, arrived: &mut [Arrived], image: &SavedImage) -> Result<(), ImageError> {
        let Some(config) = digest_in_name(&image.config) else {
            return Ok(());
        };
        for one in arrived {
            if self.id(&one.target)? != config {
                continue;
            }
            for name in names_of(image) {
                if !one.names.contains(&name) {
                    one.names.push(name);
                }
            }
        }
        Ok(())
    }

    /// Keeps a blob of the archive; its size and digest are checked.
    pub(crate) fn take_blob(
        &self,
        digest: &Digest,
        size: u64,
        mut from: impl Read,
        path: &Path,
    ) -> Result<(), ImageError> {
        if self.has_blob(digest, Some(size)) {
            return Ok(());
        }
        let mut download = self.download(digest, size, &mut || ())?;
        // What a broken pull left may be anything.
        download.restart()?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => download.append(buffer.get(..count).unwrap_or_default())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ImageError::io("read", path)(error)),
            }
        }
        download.finish()
    }

    fn digest_of(&self, section: Section, path: &Path) -> Result<Digest, ImageError> {
        let max = self.limits().layer_blob_bytes_max;
        let mut hashed = HashingReader::new(section, DigestAlgorithm::Sha256, max);
        hashed.drain().map_err(ImageError::io("read", path))?;
        Ok(hashed.finish())
    }

    /// Digest of what a layer's blob decompresses to.
    pub(crate) fn diff_id_of(&self, stored: impl Read) -> Result<Digest, ImageError> {
        let max = self.limits().layer_tar_bytes_max;
        let mut hashed = HashingReader::new(decompress(stored)?, DigestAlgorithm::Sha256, max);
        let drained = hashed.drain();
        if hashed.is_over() {
            return Err(ImageError::Limit {
                what: "its tar stream".to_owned(),
                limit: "layer_tar_bytes_max",
                max,
            });
        }
        drained.map_err(|source| ImageError::Stream {
            what: "its compressed stream",
            source,
        })?;
        Ok(hashed.finish())
    }
}

/// A full name; one that is only a tag names no repository.
fn name_in(descriptor: &Descriptor) -> Option<Name> {
    let annotations = descriptor.annotations().as_ref()?;
    let whole = annotations.get(FULL_NAME);
    let name = whole.or_else(|| {
        let named = annotations.get(REF_NAME);
        named.filter(|name| name.contains([':', '/']))
    });
    name?.parse().ok()
}

fn names_of(image: &SavedImage) -> Vec<Name> {
    let tags = image.repo_tags.iter().flatten();
    tags.filter_map(|tag| tag.parse().ok()).collect()
}
