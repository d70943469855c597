//! Makes OCI image layouts on disk, also damaged ones.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use image::Digest;
use serde_json::{Value, json};

/// One layer: as stored, and what the configuration shall say of it.
#[derive(Clone)]
pub struct Layer {
    pub stored: Vec<u8>,
    pub diff_id: String,
}

pub fn plain(tar: Vec<u8>) -> Layer {
    let diff_id = Digest::sha256_of(&tar).to_string();
    Layer {
        stored: tar,
        diff_id,
    }
}

pub fn gzip(tar: &[u8]) -> Layer {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(tar).expect("written");
    Layer {
        stored: encoder.finish().expect("finished"),
        diff_id: Digest::sha256_of(tar).to_string(),
    }
}

pub fn zstd(tar: &[u8]) -> Layer {
    Layer {
        stored: zstd::encode_all(tar, 3).expect("compressed"),
        diff_id: Digest::sha256_of(tar).to_string(),
    }
}

/// Writes `bytes` as a blob of the layout; gives its digest.
pub fn blob(dir: &Path, bytes: &[u8]) -> Digest {
    let digest = Digest::sha256_of(bytes);
    let folder = dir.join("blobs/sha256");
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join(digest.hex()), bytes).expect("a blob");
    digest
}

pub fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

pub fn descriptor(media_type: &str, digest: &Digest, size: usize) -> Value {
    json!({"mediaType": media_type, "digest": digest.to_string(), "size": size})
}

/// A configuration for linux/amd64.
pub fn config(layers: &[Layer], run: Value) -> Vec<u8> {
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    config.to_string().into_bytes()
}

/// Writes config, layers and manifest; gives the manifest's descriptor.
pub fn manifest(dir: &Path, layers: &[Layer], run: Value) -> Value {
    let config = config(layers, run);
    let config_digest = blob(dir, &config);
    let described: Vec<Value> = layers
        .iter()
        .map(|layer| {
            let digest = blob(dir, &layer.stored);
            let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
            descriptor(media_type, &digest, layer.stored.len())
        })
        .collect();
    let media_type = "application/vnd.oci.image.config.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "config": descriptor(media_type, &config_digest, config.len()),
        "layers": described,
    });
    let manifest = manifest.to_string().into_bytes();
    let digest = blob(dir, &manifest);
    descriptor(
        "application/vnd.oci.image.manifest.v1+json",
        &digest,
        manifest.len(),
    )
}

pub fn index(dir: &Path, manifests: &[Value]) {
    fs::create_dir_all(dir).expect("a folder");
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(dir.join("index.json"), index.to_string()).expect("written");
}

/// A layout of one image.
pub fn layout(dir: &Path, layers: &[Layer]) {
    let manifest = manifest(dir, layers, json!({"Cmd": ["/bin/true"]}));
    index(dir, &[manifest]);
}
