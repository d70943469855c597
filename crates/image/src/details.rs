//! What an image says of itself, for people and scripts.
//!
//! Left to others: how it is shown.

use std::fs;

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{json, manifest_chain, parts_of};
use crate::store::{Shelf, Store};

/// An image of the store.
#[derive(Clone, Debug)]
pub struct Details {
    /// Its identifier, as in docker: the digest of its configuration.
    pub id: Digest,
    /// Of the manifest for this platform.
    pub manifest: Digest,
    /// The configuration as it was made.
    pub config: ImageConfiguration,
    /// The same, for what typed fields leave out.
    pub config_text: Vec<u8>,
    /// Bytes as stored, layers and documents.
    pub stored_bytes: u64,
    /// Bytes of the file systems that machines mount, of those layers that were made.
    pub unpacked_bytes: u64,
    /// Digests of the layers as stored, lowest first.
    pub layers: Vec<Digest>,
}

/// One step of an image's history.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Step {
    /// RFC 3339.
    #[serde(default)]
    pub created: Option<String>,
    /// The command.
    #[serde(default)]
    pub created_by: Option<String>,
    /// Free-form.
    #[serde(default)]
    pub comment: Option<String>,
    /// Whether it made no layer.
    #[serde(default)]
    pub empty_layer: bool,
    /// Bytes of its layer as stored.
    #[serde(skip)]
    pub bytes: u64,
}

impl Store {
    /// The identifier of the image whose manifest or index is `target`.
    ///
    /// # Errors
    ///
    /// What is missing or corrupt of the image.
    pub fn id(&self, target: &Digest) -> Result<Digest, ImageError> {
        let blobs = Blobs::Layout(self.root().to_path_buf());
        let get = |digest: &Digest, size| blobs.document(digest, size, self.limits());
        let (digest, bytes) = manifest_chain(target, None, get)?.manifest;
        let ((config, _), _) = parts_of(&bytes, &digest, self.limits())?;
        Ok(config)
    }

    /// All of an image.
    ///
    /// # Errors
    ///
    /// What is missing or corrupt of it.
    pub fn details(&self, target: &Digest) -> Result<Details, ImageError> {
        let blobs = Blobs::Layout(self.root().to_path_buf());
        let get = |digest: &Digest, size| blobs.document(digest, size, self.limits());
        let (manifest, bytes) = manifest_chain(target, None, get)?.manifest;
        let ((id, config_bytes), layers) = parts_of(&bytes, &manifest, self.limits())?;
        let config_text = blobs.document(&id, Some(config_bytes), self.limits())?;
        let config: ImageConfiguration =
            json(&config_text, || format!("image configuration {id}"))?;
        let stored = layers
            .iter()
            .map(|(_, size)| *size)
            .fold(0, u64::saturating_add);
        let made = config
            .rootfs()
            .diff_ids()
            .iter()
            .filter_map(|id| self.made_bytes(id));
        Ok(Details {
            unpacked_bytes: made.fold(0, u64::saturating_add),
            stored_bytes: stored
                .saturating_add(config_bytes)
                .saturating_add(bytes.len() as u64),
            id,
            manifest,
            config,
            config_text,
            layers: layers.into_iter().map(|(digest, _)| digest).collect(),
        })
    }

    /// How an image came about, oldest step first.
    ///
    /// # Errors
    ///
    /// What is missing or corrupt of it.
    pub fn history(&self, target: &Digest) -> Result<Vec<Step>, ImageError> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default)]
            history: Vec<Step>,
        }
        let details = self.details(target)?;
        let what = || format!("image configuration {}", details.id);
        let Document { mut history } = json(&details.config_text, what)?;
        let size = |digest: &Digest| {
            let found = fs::metadata(self.blob_path(digest));
            found.map_or(0, |found| found.len())
        };
        let mut layers = details.layers.iter();
        for step in history.iter_mut().filter(|step| !step.empty_layer) {
            step.bytes = layers.next().map_or(0, size);
        }
        // Some tools write no history: the layers are there all the same.
        let unsaid = layers.map(|layer| Step {
            created: None,
            created_by: None,
            comment: None,
            empty_layer: false,
            bytes: size(layer),
        });
        history.extend(unsaid.collect::<Vec<_>>());
        Ok(history)
    }

    fn made_bytes(&self, diff_id: &str) -> Option<u64> {
        let diff_id: Digest = diff_id.parse().ok()?;
        let alone = fs::metadata(self.place(Shelf::Layers, diff_id.hex()));
        alone.ok().map(|file| file.len())
    }
}
