//! From the store to a registry.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use image::{Digest, Entry, ImageError, Name, Store, manifest_chain, media_type_of, parts_of};
use oci_client::RegistryOperation;
use oci_client::errors::OciDistributionError as Failure;
use tokio::io::AsyncReadExt as _;

use crate::Registries;
use crate::error::Error;
use crate::progress::Transfers;
use crate::remote::Remote;

const AT_ONCE: usize = 3;
const CHUNK: usize = 256 << 10;

impl Registries {
    /// Puts the image `entry` where `to` says: for this platform, as only that is here. Returns the manifest's digest.
    ///
    /// # Errors
    ///
    /// Any [`Error`]. What was uploaded stays there.
    pub fn push(
        &self,
        store: &Store,
        entry: &Entry,
        to: &Name,
        transfers: &dyn Transfers,
    ) -> Result<Digest, Error> {
        let _hold = store.hold()?;
        let place = self.configuration.place_to_push(to)?;
        let auth = self.credentials.of(&place.host, to)?;
        let get = |digest: &Digest, _| store.document(digest);
        let (manifest, bytes) = manifest_chain(&entry.target, None, get)?.manifest;
        let (config, layers) = parts_of(&bytes, &manifest, store.limits())?;
        let mut blobs: Vec<(Digest, u64)> = [config].into_iter().chain(layers).collect();
        // A layer may be there twice.
        let mut seen = std::collections::HashSet::new();
        blobs.retain(|(digest, _)| seen.insert(digest.clone()));
        for (digest, size) in &blobs {
            if !store.has_blob(digest, Some(*size)) {
                return Err(Error::Image(ImageError::BlobMissing {
                    digest: digest.clone(),
                    path: store.root().to_path_buf(),
                }));
            }
        }
        transfers.blobs(&blobs);
        self.runtime.block_on(async {
            let remote =
                Remote::connect(&place, auth, RegistryOperation::Push, self.patience).await?;
            stream::iter(blobs.iter().enumerate())
                .map(|(index, (digest, size))| {
                    let path = store.blob_path(digest);
                    let remote = &remote;
                    async move {
                        let already = upload(remote, digest, *size, path).await?;
                        transfers.done(index, already);
                        Ok::<(), Error>(())
                    }
                })
                .buffer_unordered(AT_ONCE)
                .try_collect::<()>()
                .await?;
            let tag = remote.tagged(to.tag().unwrap_or("latest"));
            let kind = media_type_of(&bytes);
            let kind = kind.parse().map_err(|_| Error::Answer {
                registry: remote.host().to_owned(),
                reason: format!("{kind:?} is no media type"),
            })?;
            let pushed = remote.client.push_manifest_raw(&tag, bytes, kind).await;
            pushed.map_err(|failure| remote.failed(&tag.to_string(), failure))
        })?;
        Ok(manifest)
    }
}

/// Uploads a blob unless it is there; returns whether it was.
async fn upload(remote: &Remote, digest: &Digest, size: u64, path: PathBuf) -> Result<bool, Error> {
    debug_assert!(matches!(remote.operation(), RegistryOperation::Push));
    let text = digest.to_string();
    let image = remote.tagged("latest");
    let failed = |failure| remote.failed(&text, failure);
    if remote
        .client
        .blob_exists(&image, &text)
        .await
        .map_err(failed)?
    {
        return Ok(true);
    }
    let file = tokio::fs::File::open(&path).await.map_err(Error::Host)?;
    let chunks = stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK];
        let count = file.read(&mut chunk).await?;
        chunk.truncate(count);
        let next = (count > 0).then(|| (Bytes::from(chunk), file));
        Ok::<_, io::Error>(next)
    });
    let chunks = chunks.map_err(Failure::IoError);
    let pushed = remote
        .client
        .push_blob_stream(&image, chunks, &text, Some(size))
        .await;
    pushed.map(|_| false).map_err(failed)
}
