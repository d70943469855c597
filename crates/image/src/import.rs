//! A root file system, given as one tar stream, becomes an image of one layer.
//!
//! Invariant: the stream is kept as it came; what it decompresses to is checked like any layer before the image is
//! listed. Left to others: where the stream comes from, what the image is called.

use std::io::{Read, Seek};
use std::path::Path;

use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, HistoryBuilder, ImageConfigurationBuilder, MediaType, Os,
    RootFsBuilder,
};

use crate::catalog::{Entry, oci_digest};
use crate::decompress::Compression;
use crate::digest::{Digest, DigestAlgorithm, HashingReader};
use crate::error::ImageError;
use crate::manifest::ImageConfig;
use crate::name::Name;
use crate::progress::Progress;
use crate::store::Store;

/// What an imported image says of itself.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// What it is to be called, if anything.
    pub name: Option<Name>,
    /// How it is to be run.
    pub config: ImageConfig,
    /// For its history.
    pub message: Option<String>,
    /// RFC 3339.
    pub created: String,
}

impl Store {
    /// Makes an image of a tar stream, plain or compressed.
    ///
    /// # Errors
    ///
    /// Any [`ImageError`].
    pub fn import(
        &self,
        stream: &mut dyn Read,
        import: Import,
        progress: &mut dyn Progress,
    ) -> Result<Entry, ImageError> {
        let _hold = self.hold()?;
        let path = Path::new("-");
        let mut file = self.spool(stream)?;
        let mut rewound = || {
            file.rewind().map_err(ImageError::io("read", path))?;
            file.try_clone().map_err(ImageError::io("read", path))
        };
        let max = self.limits().layer_blob_bytes_max;
        let mut hashed = HashingReader::new(rewound()?, DigestAlgorithm::Sha256, max);
        hashed.drain().map_err(ImageError::io("read", path))?;
        let blob = hashed.finish();
        let media_type = Compression::of(&mut rewound()?)
            .map_err(ImageError::io("read", path))?
            .media_type();
        let diff_id = self.diff_id_of(rewound()?)?;
        let from = rewound()?;
        let size = from.metadata().map_err(ImageError::io("read", path))?.len();
        self.take_blob(&blob, size, from, path)?;

        let config = configuration(&import, &diff_id)?;
        let config_digest = Digest::sha256_of(&config);
        self.put_document(&config_digest, &config)?;
        let config = Descriptor::new(
            MediaType::ImageConfig,
            config.len() as u64,
            oci_digest(&config_digest)?,
        );
        let layer = Descriptor::new(media_type, size, oci_digest(&blob)?);
        let (target, size) = self.put_manifest(config, vec![layer])?;
        self.prepare_target(&target, progress)?;
        let entry = Entry {
            name: import.name,
            target,
            size,
            media_type: MediaType::ImageManifest.to_string(),
        };
        self.add_entry(&entry)?;
        Ok(entry)
    }
}

fn configuration(import: &Import, diff_id: &Digest) -> Result<Vec<u8>, ImageError> {
    let malformed = |reason: String| ImageError::Malformed {
        what: "the image's new configuration".to_owned(),
        reason,
    };
    let built = |error: oci_spec::OciSpecError| malformed(error.to_string());
    let ImageConfig {
        entrypoint,
        cmd,
        env,
        user,
        working_dir,
        stop_signal,
        exposed_ports,
        volumes,
        labels,
    } = import.config.clone();
    let mut config = ConfigBuilder::default();
    if !entrypoint.is_empty() {
        config = config.entrypoint(entrypoint);
    }
    if !cmd.is_empty() {
        config = config.cmd(cmd);
    }
    if !env.is_empty() {
        config = config.env(env);
    }
    if let Some(user) = user {
        config = config.user(user);
    }
    if let Some(working_dir) = working_dir {
        config = config.working_dir(working_dir);
    }
    if let Some(stop_signal) = stop_signal {
        config = config.stop_signal(stop_signal);
    }
    if !exposed_ports.is_empty() {
        config = config.exposed_ports(exposed_ports);
    }
    if !volumes.is_empty() {
        config = config.volumes(volumes);
    }
    if !labels.is_empty() {
        config = config.labels(
            labels
                .into_iter()
                .collect::<std::collections::HashMap<_, _>>(),
        );
    }
    let mut history = HistoryBuilder::default().created(import.created.clone());
    if let Some(message) = &import.message {
        history = history.comment(message.clone());
    }
    let rootfs = RootFsBuilder::default()
        .typ("layers".to_owned())
        .diff_ids(vec![diff_id.to_string()])
        .build()
        .map_err(built)?;
    let configuration = ImageConfigurationBuilder::default()
        .created(import.created.clone())
        .architecture(Arch::Amd64)
        .os(Os::Linux)
        .config(config.build().map_err(built)?)
        .rootfs(rootfs)
        .history(vec![history.build().map_err(built)?])
        .build()
        .map_err(built)?;
    // By way of a value, which has its fields in order: the same import gives the same digest.
    let value = serde_json::to_value(&configuration);
    let value = value.map_err(|error| malformed(error.to_string()))?;
    serde_json::to_vec(&value).map_err(|error| malformed(error.to_string()))
}
