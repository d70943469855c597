//! Images as one archive that docker, podman and OCI tools take: an OCI layout with docker's `manifest.json` beside it.
//!
//! Invariant: the same images give the same bytes, and no blob is there twice. Only the platform's own manifest is
//! saved, as only its layers are here. Left to others: where the bytes go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use oci_spec::image::{
    Descriptor, DescriptorBuilder, ImageIndexBuilder, MediaType, SCHEMA_VERSION,
};
use serde::Serialize;

use crate::catalog::oci_digest;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::load::FULL_NAME;
use crate::manifest::{REF_NAME, manifest_chain, media_type_of, parts_of};
use crate::name::Name;
use crate::store::Store;

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl Store {
    /// Writes images, each with the names it is to have where it is loaded.
    ///
    /// # Errors
    ///
    /// What is missing or corrupt of an image; [`ImageError::Io`] with `to`'s error.
    pub fn save(
        &self,
        images: &BTreeMap<Digest, Vec<Name>>,
        to: &mut dyn Write,
        path: &Path,
    ) -> Result<(), ImageError> {
        let _hold = self.hold()?;
        let mut archive = Writer {
            tar: tar::Builder::new(to),
            path,
            there: HashSet::new(),
        };
        let (mut described, mut saved) = (Vec::new(), Vec::new());
        for (target, names) in images {
            let get = |digest: &Digest, _| self.document(digest);
            let (manifest, bytes) = manifest_chain(target, None, get)?.manifest;
            let (config, layers) = parts_of(&bytes, &manifest, self.limits())?;
            archive.blob(&manifest, bytes.len() as u64, bytes.as_slice())?;
            for (digest, size) in [&config].into_iter().chain(&layers) {
                let blob = self.blob_path(digest);
                let file = File::open(&blob).map_err(|source| match source.kind() {
                    io::ErrorKind::NotFound => ImageError::BlobMissing {
                        digest: digest.clone(),
                        path: self.root().to_path_buf(),
                    },
                    _ => ImageError::io("open", &blob)(source),
                })?;
                archive.blob(digest, *size, file)?;
            }
            described.extend(descriptors(&manifest, &bytes, names)?);
            saved.push(Saved {
                config: member(&config.0),
                repo_tags: names.iter().map(Name::familiar).collect(),
                layers: layers.iter().map(|(digest, _)| member(digest)).collect(),
            });
        }
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(described)
            .build()
            .map_err(|error| malformed(error.to_string()))?;
        archive.document("index.json", &index)?;
        archive.document("manifest.json", &saved)?;
        archive.member("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.end()
    }
}

/// One for each name, as an index has no other place for it.
fn descriptors(
    manifest: &Digest,
    bytes: &[u8],
    names: &[Name],
) -> Result<Vec<Descriptor>, ImageError> {
    let one = |name: Option<&Name>| {
        let mut builder = DescriptorBuilder::default()
            .media_type(MediaType::from(media_type_of(bytes).as_str()))
            .digest(oci_digest(manifest)?)
            .size(bytes.len() as u64);
        if let Some(name) = name {
            let mut annotations = HashMap::from([(FULL_NAME.to_owned(), name.to_string())]);
            if let Some(tag) = name.tag() {
                annotations.insert(REF_NAME.to_owned(), tag.to_owned());
            }
            builder = builder.annotations(annotations);
        }
        builder
            .build()
            .map_err(|error| malformed(error.to_string()))
    };
    match names {
        [] => Ok(vec![one(None)?]),
        names => names.iter().map(|name| one(Some(name))).collect(),
    }
}

fn member(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn malformed(reason: String) -> ImageError {
    ImageError::Malformed {
        what: "the archive's list of images".to_owned(),
        reason,
    }
}

struct Writer<'a> {
    tar: tar::Builder<&'a mut dyn Write>,
    path: &'a Path,
    there: HashSet<Digest>,
}

impl Writer<'_> {
    fn blob(&mut self, digest: &Digest, size: u64, from: impl Read) -> Result<(), ImageError> {
        if !self.there.insert(digest.clone()) {
            return Ok(());
        }
        // A blob that is shorter than it should be must not shift what follows.
        let mut from = from.take(size);
        self.append(&member(digest), size, &mut from)?;
        match from.limit() {
            0 => Ok(()),
            missing => Err(ImageError::SizeMismatch {
                digest: digest.clone(),
                expected: size,
                found: size.saturating_sub(missing),
            }),
        }
    }

    fn document(&mut self, name: &str, value: &impl Serialize) -> Result<(), ImageError> {
        // By way of a value, which has its fields in order: maps have none.
        let value = serde_json::to_value(value).map_err(|error| malformed(error.to_string()))?;
        let bytes = serde_json::to_vec(&value).map_err(|error| malformed(error.to_string()))?;
        self.member(name, &bytes)
    }

    fn member(&mut self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        self.append(name, bytes.len() as u64, bytes)
    }

    fn append(&mut self, name: &str, size: u64, from: impl Read) -> Result<(), ImageError> {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(0);
        let appended = self.tar.append_data(&mut header, name, from);
        appended.map_err(ImageError::io("write", self.path))
    }

    fn end(self) -> Result<(), ImageError> {
        let ended = self.tar.into_inner().and_then(|to| to.flush());
        ended.map_err(ImageError::io("write", self.path))
    }
}
