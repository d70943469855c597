//! From a registry into the store.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use image::{Digest, Entry, Image, Name, Progress, Store, manifest_chain, media_type_of, parts_of};
use oci_client::RegistryOperation;
use oci_client::client::BlobResponse;

use crate::error::Error;
use crate::progress::Transfers;
use crate::remote::Remote;
use crate::{Place, Registries};

/// Blobs that are downloaded at once, as docker does it.
const AT_ONCE: usize = 3;
/// Times that a blob is tried without a byte of progress.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// An image that is here now.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// Its place in the list.
    pub entry: Entry,
    /// Ready to run.
    pub image: Image,
    /// Whether the name stood for the same image before.
    pub was_here: bool,
}

impl Registries {
    /// Gets the image and makes its layers ready. `transfers` hears of blobs (the configuration, then the layers, lowest
    /// first), `unpacking` of layers.
    ///
    /// # Errors
    ///
    /// Any [`Error`], of the last place that was asked. What was downloaded stays, to be gone on with.
    pub fn pull(
        &self,
        store: &Store,
        name: &Name,
        transfers: &dyn Transfers,
        unpacking: &mut (dyn Progress + Send),
    ) -> Result<Pulled, Error> {
        // Until the image has its name, nobody is to collect what is needed.
        let _hold = store.hold()?;
        let mut places = self.configuration.places(name)?.into_iter().peekable();
        while let Some(place) = places.next() {
            let pulled = self.pull_from(&place, store, name, transfers, unpacking);
            match pulled {
                Err(error) if error.is_of_the_place() && places.peek().is_some() => {
                    tracing::warn!(%error, mirror = place.host, "the next place is asked");
                }
                other => return other,
            }
        }
        Err(Error::Host(std::io::ErrorKind::NotFound.into()))
    }

    fn pull_from(
        &self,
        place: &Place,
        store: &Store,
        name: &Name,
        transfers: &dyn Transfers,
        unpacking: &mut (dyn Progress + Send),
    ) -> Result<Pulled, Error> {
        let auth = self.credentials.of(&place.host, name)?;
        let connecting = Remote::connect(place, auth, RegistryOperation::Pull, self.patience);
        let remote = self.runtime.block_on(connecting)?;
        let bytes_max = store.limits().json_bytes_max;
        let get = |version: &str| {
            self.runtime
                .block_on(patiently(&remote, version, bytes_max))
        };

        let version = match (name.digest(), name.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let first = get(&version)?;
        let target = match name.digest() {
            Some(digest) => checked(digest, &first).map(|()| digest.clone())?,
            None => Digest::sha256_of(&first),
        };
        let chain = manifest_chain(&target, None, |digest, _| -> Result<Vec<u8>, Error> {
            if *digest == target {
                return Ok(first.clone());
            }
            if store.has_blob(digest, None) {
                return Ok(store.document(digest)?);
            }
            let bytes = get(&digest.to_string())?;
            checked(digest, &bytes)?;
            Ok(bytes)
        })?;
        let (manifest, bytes) = &chain.manifest;
        let (config, layers) = parts_of(bytes, manifest, store.limits())?;
        for (digest, bytes) in chain.indexes.iter().chain([&chain.manifest]) {
            store.put_document(digest, bytes)?;
        }

        let blobs: Vec<(Digest, u64)> = [config].into_iter().chain(layers).collect();
        transfers.blobs(&blobs);
        let image = self.get_blobs(&remote, store, &target, &blobs, transfers, unpacking)?;
        let entry = Entry {
            name: Some(name.clone()),
            media_type: media_type_of(&first),
            size: first.len() as u64,
            target,
        };
        let was_here = store
            .entry(name)?
            .is_some_and(|there| there.target == entry.target);
        store.add_entry(&entry)?;
        Ok(Pulled {
            entry,
            image,
            was_here,
        })
    }

    /// Downloads blobs, the configuration first, and makes layers while more of them come.
    fn get_blobs(
        &self,
        remote: &Remote,
        store: &Store,
        target: &Digest,
        blobs: &[(Digest, u64)],
        transfers: &dyn Transfers,
        unpacking: &mut (dyn Progress + Send),
    ) -> Result<Image, Error> {
        let one = |index: usize| async move {
            match blobs.get(index) {
                Some((digest, size)) => {
                    let index = Index { index, transfers };
                    download(remote, store, digest, *size, &index).await
                }
                None => Ok(()),
            }
        };
        self.runtime.block_on(one(0))?;
        let arrivals = Arrivals::default();
        std::thread::scope(|scope| {
            let mut progress = WaitForArrivals {
                inner: unpacking,
                arrivals: &arrivals,
            };
            let unpacked = std::thread::Builder::new()
                .name("layers".to_owned())
                .spawn_scoped(scope, move || store.prepare_target(target, &mut progress))
                .map_err(Error::Host)?;
            let downloads = stream::iter(1..blobs.len()).map(|index| {
                let arrivals = &arrivals;
                async move {
                    one(index).await?;
                    arrivals.arrived(index.saturating_sub(1));
                    Ok::<(), Error>(())
                }
            });
            let all = downloads.buffer_unordered(AT_ONCE).try_collect::<()>();
            let downloaded = self.runtime.block_on(all);
            arrivals.no_more();
            let unpacked = unpacked.join();
            downloaded?;
            match unpacked {
                Ok(image) => Ok(image?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

fn checked(digest: &Digest, bytes: &[u8]) -> Result<(), Error> {
    digest.check(bytes).map_err(Error::Image)
}

async fn patiently(remote: &Remote, version: &str, bytes_max: u64) -> Result<Vec<u8>, Error> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match remote.manifest(version, bytes_max).await {
            Err(error) if error.may_pass() => {
                tracing::debug!(%error, ?pause, "once more");
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            other => return other,
        }
    }
    remote.manifest(version, bytes_max).await
}

/// Who hears of one blob.
struct Index<'a> {
    index: usize,
    transfers: &'a dyn Transfers,
}

async fn download(
    remote: &Remote,
    store: &Store,
    digest: &Digest,
    size: u64,
    hears: &Index<'_>,
) -> Result<(), Error> {
    let Index { index, transfers } = *hears;
    if store.has_blob(digest, Some(size)) {
        transfers.done(index, true);
        return Ok(());
    }
    let mut download = store.download(digest, size, &mut || transfers.waiting(index))?;
    // Whoever we waited for may have finished it.
    if store.has_blob(digest, Some(size)) {
        download.discard()?;
        transfers.done(index, true);
        return Ok(());
    }
    let (mut tries, mut pause) = (0, FIRST_PAUSE);
    let mut best = download.offset();
    loop {
        let error = match go_on(remote, digest, &mut download, hears).await {
            Ok(()) => break,
            Err(error) => error,
        };
        if !error.may_pass() {
            return Err(error);
        }
        // Progress counts as a good sign.
        if download.offset() > best {
            (best, tries, pause) = (download.offset(), 0, FIRST_PAUSE);
        }
        tries += 1;
        if tries == TRIES {
            return Err(Error::BrokenOff {
                registry: remote.host().to_owned(),
                what: digest.to_string(),
                times: TRIES,
                reason: error.to_string(),
            });
        }
        transfers.again(index, &error.to_string());
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    download.finish()?;
    transfers.done(index, false);
    Ok(())
}

/// Gets what is missing, in one request.
async fn go_on(
    remote: &Remote,
    digest: &Digest,
    download: &mut image::Download,
    hears: &Index<'_>,
) -> Result<(), Error> {
    if download.missing() == 0 {
        return Ok(());
    }
    let mut bytes = match remote.blob(digest, download.offset()).await? {
        BlobResponse::Partial(stream) => stream,
        BlobResponse::Full(stream) => {
            download.restart()?;
            stream
        }
    };
    while let Some(chunk) = bytes.next().await {
        match chunk {
            Ok(chunk) => download.append(&chunk)?,
            // All is there: whether it is right, the digest says.
            Err(_) if download.missing() == 0 => break,
            Err(error) => return Err(remote.unreachable(error.to_string())),
        }
        hears.transfers.bytes(hears.index, download.offset());
    }
    match download.missing() {
        0 => Ok(()),
        missing => Err(remote.unreachable(format!("the transfer ended {missing} bytes early"))),
    }
}

/// Which layers are here.
#[derive(Debug, Default)]
struct Arrivals {
    here: Mutex<(Vec<usize>, bool)>,
    changed: Condvar,
}

impl Arrivals {
    fn arrived(&self, layer: usize) {
        let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        here.0.push(layer);
        self.changed.notify_all();
    }

    fn no_more(&self) {
        let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        here.1 = true;
        self.changed.notify_all();
    }

    fn wait_for(&self, layer: usize) {
        let here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |here: &mut (Vec<usize>, bool)| !here.1 && !here.0.contains(&layer);
        drop(self.changed.wait_while(here, waiting));
    }
}

/// Passes everything on, and has layers wait for their blobs.
struct WaitForArrivals<'a> {
    inner: &'a mut (dyn Progress + Send),
    arrivals: &'a Arrivals,
}

impl Progress for WaitForArrivals<'_> {
    fn layers(&mut self, count: usize) {
        self.inner.layers(count);
    }
    fn layer_wanted(&mut self, index: usize) {
        self.arrivals.wait_for(index);
    }
    fn layer_start(&mut self, index: usize, name: &str, bytes_total: u64) {
        self.inner.layer_start(index, name, bytes_total);
    }
    fn layer_bytes(&mut self, index: usize, bytes_done: u64) {
        self.inner.layer_bytes(index, bytes_done);
    }
    fn layer_waiting(&mut self, index: usize) {
        self.inner.layer_waiting(index);
    }
    fn layer_done(&mut self, index: usize, cached: bool) {
        self.inner.layer_done(index, cached);
    }
}
