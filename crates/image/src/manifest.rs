//! From a layout or an archive to one image: which layers, and how to run it.
//!
//! Invariant: manifest and configuration were checked against their digests; the image is for linux/amd64; there are as
//! many diff_ids as layers, and at least one. Left to others: the layers' bytes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::blobs::{self, Blobs, Section};
use crate::digest::Digest;
use crate::docker_archive::SavedImage;
use crate::error::ImageError;
use crate::limits::Limits;

pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Indexes may point to indexes; no tool nests deeper than two.
const INDEX_DEPTH_MAX: usize = 4;

/// How an image wants to be run (OCI image configuration, "config").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// What runs, unless replaced.
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint, or what runs when there is none.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// `user[:group]`, names or numbers; to be found in the image's own files.
    pub user: Option<String>,
    /// Absolute, in the image.
    pub working_dir: Option<String>,
    /// A name such as `SIGTERM`, or a number.
    pub stop_signal: Option<String>,
    /// Such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Absolute paths the image wants on storage of their own.
    pub volumes: Vec<String>,
    /// Free-form.
    pub labels: BTreeMap<String, String>,
}

/// An image whose layers are known.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) digest: Digest,
    pub(crate) config: ImageConfig,
    /// Lowest first.
    pub(crate) layers: Vec<LayerSource>,
    blobs: Blobs,
}

/// One layer as stored.
#[derive(Clone, Debug)]
pub(crate) struct LayerSource {
    /// Of the decompressed stream.
    pub(crate) diff_id: Digest,
    pub(crate) stored: Stored,
}

/// Where a layer is.
#[derive(Clone, Debug)]
pub(crate) enum Stored {
    Blob {
        digest: Digest,
        size: u64,
    },
    /// A member of a `docker save` archive; its stored form may have no digest of its own.
    Member {
        name: String,
        digest: Option<Digest>,
    },
}

impl LayerSource {
    /// What to call the layer in messages.
    pub(crate) fn name(&self) -> String {
        match &self.stored {
            Stored::Blob { digest, .. } => digest.to_string(),
            Stored::Member { .. } => self.diff_id.to_string(),
        }
    }

    /// The digest of the stored form, if known.
    pub(crate) fn digest(&self) -> Option<&Digest> {
        match &self.stored {
            Stored::Blob { digest, .. } => Some(digest),
            Stored::Member { digest, .. } => digest.as_ref(),
        }
    }
}

impl Resolved {
    /// The layer's stored bytes; its size is checked.
    pub(crate) fn open(&self, layer: &LayerSource) -> Result<Section, ImageError> {
        match &layer.stored {
            Stored::Blob { digest, size } => {
                let section = self.blobs.blob(digest)?;
                let found = section.bytes_left();
                if found != *size {
                    return Err(ImageError::SizeMismatch {
                        digest: digest.clone(),
                        expected: *size,
                        found,
                    });
                }
                Ok(section)
            }
            Stored::Member { name, .. } => {
                self.blobs.file(name)?.ok_or_else(|| ImageError::Malformed {
                    what: format!("docker archive {:?}", self.blobs.path()),
                    reason: format!("it has no layer {name:?}"),
                })
            }
        }
    }
}

/// Finds the image in `blobs`; an archive's `manifest.json` goes before its layout.
pub(crate) fn resolve(
    blobs: Blobs,
    tag: Option<&str>,
    limits: &Limits,
) -> Result<Resolved, ImageError> {
    if let Blobs::Archive(archive) = &blobs
        && let Some(saved) = archive.saved_image(limits)?
    {
        return resolve_saved(blobs, saved, limits);
    }
    resolve_layout(blobs, tag, limits)
}

fn resolve_layout(
    blobs: Blobs,
    tag: Option<&str>,
    limits: &Limits,
) -> Result<Resolved, ImageError> {
    let not_a_layout = |missing| ImageError::NotALayout {
        path: blobs.path().to_path_buf(),
        missing,
    };
    let read = |name: &'static str| -> Result<Vec<u8>, ImageError> {
        let section = blobs.file(name)?.ok_or_else(|| not_a_layout(name))?;
        blobs::read_document(
            section,
            &format!("{name} of {:?}", blobs.path()),
            blobs.path(),
            limits,
        )
    };
    let marker: LayoutMarker = json(&read("oci-layout")?, || {
        format!("oci-layout of {:?}", blobs.path())
    })?;
    if !marker.version.starts_with("1.") {
        return Err(not_a_layout("oci-layout of version 1"));
    }
    let index: ImageIndex = json(&read("index.json")?, || {
        format!("index.json of {:?}", blobs.path())
    })?;
    let descriptor = choose_tagged(&index, tag, blobs.path().to_path_buf())?;
    let target: Digest = descriptor.digest().as_ref().parse()?;
    resolve_target(blobs, &target, Some(descriptor.size()), limits)
}

/// The image whose manifest or index is `target`.
pub(crate) fn resolve_target(
    blobs: Blobs,
    target: &Digest,
    size: Option<u64>,
    limits: &Limits,
) -> Result<Resolved, ImageError> {
    let get = |digest: &Digest, size| blobs.document(digest, size, limits);
    let chain = manifest_chain(target, size, get)?;
    let (digest, bytes) = chain.manifest;
    resolve_manifest(blobs, digest, &bytes, limits)
}

/// The way from an image's target to its manifest for this platform.
#[derive(Clone, Debug)]
pub struct ManifestChain {
    /// The indexes that were passed, outermost first, with their bytes.
    pub indexes: Vec<(Digest, Vec<u8>)>,
    /// The manifest.
    pub manifest: (Digest, Vec<u8>),
}

/// Goes from `target` to the manifest for linux/amd64; `get` gives a document that was checked against its digest and,
/// where one is given, its size.
///
/// # Errors
///
/// `get`'s, [`ImageError::WrongPlatform`], [`ImageError::Json`], [`ImageError::Malformed`].
pub fn manifest_chain<E: From<ImageError>>(
    target: &Digest,
    size: Option<u64>,
    mut get: impl FnMut(&Digest, Option<u64>) -> Result<Vec<u8>, E>,
) -> Result<ManifestChain, E> {
    let mut indexes = Vec::new();
    let (mut digest, mut size) = (target.clone(), size);
    for _ in 0..INDEX_DEPTH_MAX {
        let bytes = get(&digest, size)?;
        match next_of(&bytes, &digest)? {
            None => {
                let manifest = (digest, bytes);
                return Ok(ManifestChain { indexes, manifest });
            }
            Some((next, next_size)) => {
                indexes.push((std::mem::replace(&mut digest, next), bytes));
                size = Some(next_size);
            }
        }
    }
    Err(E::from(ImageError::Malformed {
        what: format!("image {target}"),
        reason: format!("its indexes are nested more than {INDEX_DEPTH_MAX} deep"),
    }))
}

/// Of an index, the document for this platform; none of a manifest.
fn next_of(bytes: &[u8], digest: &Digest) -> Result<Option<(Digest, u64)>, ImageError> {
    match kind_of(bytes, digest)? {
        Kind::Manifest => Ok(None),
        Kind::Index => {
            let index: ImageIndex = json(bytes, || format!("index {digest}"))?;
            let chosen = choose_platform(index.manifests().iter(), &digest.to_string())?;
            Ok(Some((chosen.digest().as_ref().parse()?, chosen.size())))
        }
    }
}

/// The media type of a manifest or an index: what it says of itself, or by what it has where it says nothing.
pub fn media_type_of(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Probe {
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
    }
    let probe: Option<Probe> = serde_json::from_slice(bytes).ok();
    let default = match probe
        .as_ref()
        .is_some_and(|probe| probe.manifests.is_some())
    {
        true => "application/vnd.oci.image.index.v1+json",
        false => "application/vnd.oci.image.manifest.v1+json",
    };
    probe
        .and_then(|probe| probe.media_type)
        .unwrap_or_else(|| default.to_owned())
}

/// A blob that a manifest names, and its size.
pub type Part = (Digest, u64);

/// What a manifest names: its configuration, then its layers, lowest first.
///
/// # Errors
///
/// [`ImageError::Json`], [`ImageError::BadDigest`], [`ImageError::Limit`].
pub fn parts_of(
    bytes: &[u8],
    digest: &Digest,
    limits: &Limits,
) -> Result<(Part, Vec<Part>), ImageError> {
    let manifest: ImageManifest = json(bytes, || format!("manifest {digest}"))?;
    let part = |descriptor: &Descriptor| -> Result<Part, ImageError> {
        Ok((descriptor.digest().as_ref().parse()?, descriptor.size()))
    };
    let config = part(manifest.config())?;
    if config.1 > limits.json_bytes_max {
        let max = limits.json_bytes_max;
        return Err(ImageError::Limit {
            what: format!("configuration {}", config.0),
            limit: "json_bytes_max",
            max,
        });
    }
    let layers: Vec<Part> = manifest
        .layers()
        .iter()
        .map(part)
        .collect::<Result<_, _>>()?;
    check_layers(digest, layers.len(), layers.len(), limits)?;
    for (layer, size) in &layers {
        check_layer_size(layer, *size, limits)?;
    }
    Ok((config, layers))
}

fn resolve_manifest(
    blobs: Blobs,
    digest: Digest,
    bytes: &[u8],
    limits: &Limits,
) -> Result<Resolved, ImageError> {
    let manifest: ImageManifest = json(bytes, || format!("manifest {digest}"))?;
    let config_digest: Digest = manifest.config().digest().as_ref().parse()?;
    let config = blobs.document(&config_digest, Some(manifest.config().size()), limits)?;
    let (config, diff_ids) = read_config(&config, &config_digest)?;
    check_layers(&digest, manifest.layers().len(), diff_ids.len(), limits)?;
    let layer = |(descriptor, diff_id): (&Descriptor, Digest)| -> Result<LayerSource, ImageError> {
        let digest: Digest = descriptor.digest().as_ref().parse()?;
        check_layer_size(&digest, descriptor.size(), limits)?;
        Ok(LayerSource {
            diff_id,
            stored: Stored::Blob {
                digest,
                size: descriptor.size(),
            },
        })
    };
    let layers = manifest
        .layers()
        .iter()
        .zip(diff_ids)
        .map(layer)
        .collect::<Result<_, _>>()?;
    Ok(Resolved {
        digest,
        config,
        layers,
        blobs,
    })
}

fn resolve_saved(blobs: Blobs, saved: SavedImage, limits: &Limits) -> Result<Resolved, ImageError> {
    let missing = || ImageError::Malformed {
        what: format!("docker archive {:?}", blobs.path()),
        reason: format!("it has no configuration {:?}", saved.config),
    };
    let section = blobs.file(&saved.config)?.ok_or_else(missing)?;
    let what = format!("configuration of {:?}", blobs.path());
    let bytes = blobs::read_document(section, &what, blobs.path(), limits)?;
    let found = Digest::sha256_of(&bytes);
    // The configuration's name is its digest: `HEX.json`, or `blobs/sha256/HEX`.
    if let Some(expected) = digest_in_name(&saved.config)
        && expected != found
    {
        return Err(ImageError::DigestMismatch { expected, found });
    }
    let (config, diff_ids) = read_config(&bytes, &found)?;
    let names = saved.layers.unwrap_or_default();
    check_layers(&found, names.len(), diff_ids.len(), limits)?;
    let layer = |(name, diff_id): (String, Digest)| {
        // `ID/layer.tar` says nothing; `blobs/sha256/HEX` does.
        let digest = digest_in_name(&name).filter(|_| name.starts_with("blobs/"));
        LayerSource {
            diff_id,
            stored: Stored::Member { name, digest },
        }
    };
    let layers = names.into_iter().zip(diff_ids).map(layer).collect();
    Ok(Resolved {
        digest: found,
        config,
        layers,
        blobs,
    })
}

pub(crate) fn digest_in_name(name: &str) -> Option<Digest> {
    let last = name.rsplit('/').next()?;
    let hex = last
        .strip_suffix(".json")
        .or_else(|| last.strip_suffix(".tar"))
        .unwrap_or(last);
    format!("sha256:{hex}").parse().ok()
}

fn check_layers(
    image: &Digest,
    layers: usize,
    diff_ids: usize,
    limits: &Limits,
) -> Result<(), ImageError> {
    if layers > limits.layers_max {
        let max = limits.layers_max as u64;
        return Err(ImageError::Limit {
            what: format!("image {image}"),
            limit: "layers_max",
            max,
        });
    }
    let reason = if layers == 0 {
        "it has no layers, so there is nothing to run".to_owned()
    } else if layers != diff_ids {
        format!("it has {layers} layers, but its configuration names {diff_ids}")
    } else {
        return Ok(());
    };
    Err(ImageError::Malformed {
        what: format!("image {image}"),
        reason,
    })
}

fn check_layer_size(digest: &Digest, size: u64, limits: &Limits) -> Result<(), ImageError> {
    if size <= limits.layer_blob_bytes_max {
        return Ok(());
    }
    let max = limits.layer_blob_bytes_max;
    Err(ImageError::Limit {
        what: format!("layer {digest}"),
        limit: "layer_blob_bytes_max",
        max,
    })
}

fn read_config(bytes: &[u8], digest: &Digest) -> Result<(ImageConfig, Vec<Digest>), ImageError> {
    let config: ImageConfiguration = json(bytes, || format!("image configuration {digest}"))?;
    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
        let found = format!("{}/{}", config.os(), config.architecture());
        return Err(ImageError::WrongPlatform {
            image: digest.to_string(),
            found,
        });
    }
    let diff_ids = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|id| id.parse())
        .collect::<Result<_, _>>()?;
    let Some(run) = config.config() else {
        return Ok((ImageConfig::default(), diff_ids));
    };
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let mut exposed_ports = run.exposed_ports().clone().unwrap_or_default();
    exposed_ports.sort();
    let mut volumes = run.volumes().clone().unwrap_or_default();
    volumes.sort();
    let config = ImageConfig {
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        user: text(run.user()),
        working_dir: text(run.working_dir()),
        stop_signal: text(run.stop_signal()),
        exposed_ports,
        volumes,
        labels: run
            .labels()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
    };
    Ok((config, diff_ids))
}

/// Of the images in `index.json`, the one asked for.
fn choose_tagged<'a>(
    index: &'a ImageIndex,
    tag: Option<&str>,
    path: PathBuf,
) -> Result<&'a Descriptor, ImageError> {
    fn name(descriptor: &Descriptor) -> Option<&str> {
        descriptor
            .annotations()
            .as_ref()?
            .get(REF_NAME)
            .map(String::as_str)
    }
    let known = || {
        let mut names: Vec<&str> = index.manifests().iter().filter_map(name).collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            "no tags".to_owned()
        } else {
            names.join(", ")
        }
    };
    if let Some(tag) = tag {
        let mut tagged = index
            .manifests()
            .iter()
            .filter(|d| name(d) == Some(tag))
            .peekable();
        if tagged.peek().is_none() {
            return Err(ImageError::TagNotFound {
                tag: tag.to_owned(),
                path,
                known: known(),
            });
        }
        return choose_platform(tagged, &format!("{tag:?} in {path:?}"));
    }
    let suitable: Vec<&Descriptor> = index
        .manifests()
        .iter()
        .filter(|d| fits(d) != Fit::No)
        .collect();
    match suitable.as_slice() {
        [only] => Ok(only),
        [] if index.manifests().is_empty() => Err(ImageError::NotALayout {
            path,
            missing: "image in index.json",
        }),
        [] => Err(wrong_platform(
            index.manifests().iter(),
            &format!("{path:?}"),
        )),
        several => Err(ImageError::Ambiguous {
            path,
            count: several.len(),
            known: known(),
        }),
    }
}

/// Of variants of one image, the one for this platform; a variant that does not say is taken when no other fits.
fn choose_platform<'a>(
    variants: impl Iterator<Item = &'a Descriptor> + Clone,
    image: &str,
) -> Result<&'a Descriptor, ImageError> {
    let exact = variants.clone().find(|d| fits(d) == Fit::Yes);
    let chosen = exact.or_else(|| variants.clone().find(|d| fits(d) == Fit::Unsaid));
    chosen.ok_or_else(|| wrong_platform(variants, image))
}

#[derive(PartialEq, Eq)]
enum Fit {
    Yes,
    Unsaid,
    No,
}

fn fits(descriptor: &Descriptor) -> Fit {
    match descriptor.platform() {
        None => Fit::Unsaid,
        Some(platform)
            if *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64 =>
        {
            Fit::Yes
        }
        Some(_) => Fit::No,
    }
}

fn wrong_platform<'a>(variants: impl Iterator<Item = &'a Descriptor>, image: &str) -> ImageError {
    const SHOWN_MAX: usize = 16;
    let platforms = variants.filter_map(|d| d.platform().as_ref());
    let found: Vec<String> = platforms
        .map(|p| format!("{}/{}", p.os(), p.architecture()))
        .take(SHOWN_MAX)
        .collect();
    let found = if found.is_empty() {
        "no platform".to_owned()
    } else {
        found.join(", ")
    };
    ImageError::WrongPlatform {
        image: image.to_owned(),
        found,
    }
}

#[derive(Deserialize)]
struct LayoutMarker {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

enum Kind {
    Manifest,
    Index,
}

/// Media types are optional and vary (OCI, docker): what a document is follows from what it has. One that could be
/// taken for both is refused, since others might take it for the other (GHSA-mc8v-mgrf-8f4m).
fn kind_of(bytes: &[u8], digest: &Digest) -> Result<Kind, ImageError> {
    #[derive(Deserialize)]
    struct Probe {
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
    }
    let probe: Probe = json(bytes, || format!("manifest {digest}"))?;
    match (
        probe.manifests,
        probe.layers.is_some() || probe.config.is_some(),
    ) {
        (Some(_), false) => Ok(Kind::Index),
        (None, true) => Ok(Kind::Manifest),
        (Some(_), true) | (None, false) => Err(ImageError::Malformed {
            what: format!("manifest {digest}"),
            reason: "it is neither an image manifest nor an index".to_owned(),
        }),
    }
}

pub(crate) fn json<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    what: impl FnOnce() -> String,
) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|source| ImageError::Json {
        what: what(),
        source,
    })
}

/// Reads `bytes` as every document an image has; for fuzzing.
pub(crate) fn read_any_document(bytes: &[u8]) {
    let digest = Digest::sha256_of(bytes);
    let _ = kind_of(bytes, &digest);
    let _ = read_config(bytes, &digest);
    let _ = json::<ImageManifest>(bytes, String::new);
    if let Ok(index) = json::<ImageIndex>(bytes, String::new) {
        let _ = choose_tagged(&index, None, PathBuf::new());
        let _ = choose_tagged(&index, Some("latest"), PathBuf::new());
    }
}
