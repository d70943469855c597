//! Blobs as registries give them: manifests, configurations, compressed layers.
//!
//! ```text
//! ROOT/oci-layout, ROOT/index.json    with blobs/ an OCI image layout: other tools can read it
//! ROOT/blobs/sha256/HEX               whole and checked
//! ROOT/downloads/sha256-HEX.partial   so far, under an exclusive flock of whoever downloads
//! ```
//!
//! Invariant: what is in `blobs/` has the digest of its name and was synced before it got it. A download that was
//! killed goes on where it stopped, and its bytes are hashed again before they count. Left to others: which blobs
//! belong to which image (`catalog.rs`), removing them (`collect.rs`), getting the bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::blobs::Blobs;
use crate::digest::{Digest, Hasher};
use crate::error::ImageError;
use crate::store::{Store, is_same_file};

const BUFFER_BYTES: usize = 256 << 10;

impl Store {
    /// Where a blob is or will be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let folder = self.root().join("blobs").join(digest.algorithm().name());
        folder.join(digest.hex())
    }

    /// Whether the blob is here, with that size where one is known. One of another size is not the blob, whoever
    /// wrote it: it is downloaded again.
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> bool {
        let found = fs::metadata(self.blob_path(digest));
        found.is_ok_and(|found| found.is_file() && size.is_none_or(|size| size == found.len()))
    }

    /// A whole document, checked against its digest.
    ///
    /// # Errors
    ///
    /// [`ImageError::BlobMissing`], [`ImageError::DigestMismatch`], [`ImageError::Limit`], [`ImageError::Io`].
    pub fn document(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let blobs = Blobs::Layout(self.root().to_path_buf());
        blobs.document(digest, None, self.limits())
    }

    /// Keeps a document whose digest the caller computed or checked by way of this.
    ///
    /// # Errors
    ///
    /// [`ImageError::DigestMismatch`] when `bytes` are something else; [`ImageError::Io`].
    pub fn put_document(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        if self.has_blob(digest, Some(bytes.len() as u64)) {
            return Ok(());
        }
        let mut download = self.download(digest, bytes.len() as u64, &mut || ())?;
        download.restart()?;
        download.append(bytes)?;
        download.finish()
    }

    /// The right to download a blob, with what there is of it so far. Waits for another process that has it, and
    /// calls `waiting` once then; the caller looks again for the blob.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`]; [`ImageError::Limit`] when no blob may be that large.
    pub fn download(
        &self,
        digest: &Digest,
        size: u64,
        waiting: &mut dyn FnMut(),
    ) -> Result<Download, ImageError> {
        let max = self.limits().layer_blob_bytes_max;
        if size > max {
            return Err(ImageError::Limit {
                what: format!("blob {digest}"),
                limit: "layer_blob_bytes_max",
                max,
            });
        }
        let name = format!("{}-{}.partial", digest.algorithm().name(), digest.hex());
        let partial = self.root().join("downloads").join(name);
        let mut told = false;
        let file = loop {
            let mut options = OpenOptions::new();
            let opened = options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&partial);
            let file = opened.map_err(ImageError::io("open", &partial))?;
            let lock = |operation| rustix::fs::flock(&file, operation).map_err(io::Error::from);
            match lock(FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !std::mem::replace(&mut told, true) {
                        waiting();
                    }
                    lock(FlockOperation::LockExclusive)
                        .map_err(ImageError::io("lock", &partial))?;
                }
                Err(error) => return Err(ImageError::io("lock", &partial)(error)),
            }
            // The one before may have given it its final name while we waited.
            if is_same_file(&file, &partial) {
                break file;
            }
        };
        let mut download = Download {
            file,
            hasher: Hasher::new(digest.algorithm()),
            at: 0,
            size,
            place: self.blob_path(digest),
            digest: digest.clone(),
            partial,
        };
        download.hash_what_is_there()?;
        Ok(download)
    }
}

/// A blob that is being downloaded. Dropped before [`Download::finish`], it stays to be gone on with.
pub struct Download {
    file: File,
    hasher: Hasher,
    at: u64,
    size: u64,
    digest: Digest,
    partial: PathBuf,
    place: PathBuf,
}

impl Download {
    /// Bytes that are here.
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// Bytes that are missing.
    pub fn missing(&self) -> u64 {
        self.size.saturating_sub(self.at)
    }

    /// The next bytes.
    ///
    /// # Errors
    ///
    /// [`ImageError::SizeMismatch`] when the blob becomes larger than it may, which empties it; [`ImageError::Io`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if bytes.len() as u64 > self.missing() {
            let found = self.at.saturating_add(bytes.len() as u64);
            self.restart()?;
            return Err(ImageError::SizeMismatch {
                digest: self.digest.clone(),
                expected: self.size,
                found,
            });
        }
        let written = self.file.write_all(bytes);
        written.map_err(ImageError::io("write", &self.partial))?;
        self.hasher.update(bytes);
        self.at = self.at.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Gives it up, with what is here.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub fn discard(self) -> Result<(), ImageError> {
        // Still locked: nobody else has taken the name.
        fs::remove_file(&self.partial).map_err(ImageError::io("remove", &self.partial))
    }

    /// Forgets what is here.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub fn restart(&mut self) -> Result<(), ImageError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(ImageError::io("empty", &self.partial))?;
        self.hasher = Hasher::new(self.digest.algorithm());
        self.at = 0;
        Ok(())
    }

    /// Checks the blob and gives it its name.
    ///
    /// # Errors
    ///
    /// [`ImageError::SizeMismatch`]: there is less of it than there should be, and it stays to be gone on with.
    /// [`ImageError::DigestMismatch`]: it is something else, and was removed. [`ImageError::Io`].
    pub fn finish(self) -> Result<(), ImageError> {
        if self.at != self.size {
            return Err(ImageError::SizeMismatch {
                digest: self.digest,
                expected: self.size,
                found: self.at,
            });
        }
        let found = self.hasher.finish();
        if found != self.digest {
            // Still locked: nobody else has taken the name.
            let removed = fs::remove_file(&self.partial);
            removed.map_err(ImageError::io("remove", &self.partial))?;
            return Err(ImageError::DigestMismatch {
                expected: self.digest,
                found,
            });
        }
        let synced = self.file.sync_all();
        synced.map_err(ImageError::io("sync", &self.partial))?;
        let folder = self.place.parent().unwrap_or(&self.place);
        fs::create_dir_all(folder).map_err(ImageError::io("make folder", folder))?;
        fs::rename(&self.partial, &self.place).map_err(ImageError::io("create", &self.place))?;
        sync_folder(folder)
    }

    fn hash_what_is_there(&mut self) -> Result<(), ImageError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let read = self.file.read(&mut buffer);
            let count = read.map_err(ImageError::io("read", &self.partial))?;
            if count == 0 {
                break;
            }
            self.hasher.update(buffer.get(..count).unwrap_or_default());
            self.at = self.at.saturating_add(count as u64);
        }
        if self.at > self.size {
            return self.restart();
        }
        let sought = self.file.seek(SeekFrom::Start(self.at));
        sought
            .map(drop)
            .map_err(ImageError::io("read", &self.partial))
    }
}

/// Makes names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(ImageError::io("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path()).expect("a store");
        (dir, store)
    }

    #[test]
    fn a_download_that_was_dropped_goes_on_where_it_stopped() {
        let (_dir, store) = store();
        let bytes = vec![7; 100_000];
        let digest = Digest::sha256_of(&bytes);
        let mut first = store
            .download(&digest, 100_000, &mut || ())
            .expect("a download");
        first.append(&bytes[..60_000]).expect("written");
        drop(first);
        let mut second = store
            .download(&digest, 100_000, &mut || ())
            .expect("a download");
        assert_eq!((second.offset(), second.missing()), (60_000, 40_000));
        assert!(!store.has_blob(&digest, None));
        second.append(&bytes[60_000..]).expect("written");
        second.finish().expect("the blob");
        assert!(store.has_blob(&digest, Some(100_000)));
        assert!(!store.has_blob(&digest, Some(99_999)));
        assert_eq!(
            fs::read_dir(store.root().join("downloads"))
                .expect("a folder")
                .count(),
            0
        );
    }

    #[test]
    fn what_is_too_long_too_short_or_something_else_gets_no_name() {
        let (_dir, store) = store();
        let digest = Digest::sha256_of(b"right");
        let mut long = store.download(&digest, 5, &mut || ()).expect("a download");
        long.append(b"righ").expect("written");
        let refused = long.append(b"t!");
        assert!(matches!(
            refused,
            Err(ImageError::SizeMismatch { found: 6, .. })
        ));
        assert_eq!(long.offset(), 0);
        long.append(b"wrong").expect("written");
        assert!(matches!(
            long.finish(),
            Err(ImageError::DigestMismatch { .. })
        ));
        let mut short = store.download(&digest, 5, &mut || ()).expect("a download");
        assert_eq!(short.offset(), 0, "nothing wrong is gone on with");
        short.append(b"rig").expect("written");
        assert!(matches!(
            short.finish(),
            Err(ImageError::SizeMismatch { found: 3, .. })
        ));
        assert!(!store.has_blob(&digest, None));
        store.put_document(&digest, b"right").expect("the document");
        assert_eq!(store.document(&digest).expect("the document"), b"right");
    }

    #[test]
    fn two_downloads_of_one_blob_wait_for_each_other() {
        let (_dir, store) = store();
        let digest = Digest::sha256_of(b"once");
        let mut first = store.download(&digest, 4, &mut || ()).expect("a download");
        first.append(b"once").expect("written");
        let (tell, told) = std::sync::mpsc::channel();
        let (other, name) = (store.clone(), digest.clone());
        let second = std::thread::spawn(move || {
            let waiting = &mut || tell.send(()).expect("a listener");
            drop(other.download(&name, 4, waiting).expect("a download"));
            other.has_blob(&name, Some(4))
        });
        told.recv().expect("the second one waits");
        first.finish().expect("the blob");
        assert!(second.join().expect("no panic"));
    }
}
