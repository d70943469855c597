//! A file that appears at its path once it is whole.
//!
//! Invariant: until [`NewFile::finish`] returns, and if it fails, what was at the path
//! before is there unchanged, and the unfinished file goes with its [`NewFile`]. A reader
//! that has the old one open or mapped keeps it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Error;

/// A file that is being written.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    /// Beside it; nothing is there any more once it is finished.
    unfinished: Option<PathBuf>,
}

impl NewFile {
    /// Makes an empty file that only its owner may read, in the directory of `path`.
    ///
    /// # Errors
    /// [`Error::Write`], also where `path` is something else than a file.
    pub fn create(path: &Path) -> Result<Self, Error> {
        Self::try_create(path).map_err(|source| Error::Write {
            path: path.into(),
            source,
        })
    }

    fn try_create(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        static NTH: AtomicU32 = AtomicU32::new(0);
        match std::fs::symlink_metadata(path) {
            Ok(there) if !there.is_file() => {
                let why = "there is something else than a file";
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let nth = NTH.fetch_add(1, Ordering::Relaxed);
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{nth}.unfinished", std::process::id()));
        let unfinished = path.with_file_name(hidden);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)?;
        Ok(Self {
            file,
            path: path.into(),
            unfinished: Some(unfinished),
        })
    }

    /// To write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes what was written durable and puts it at its path.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self) -> Result<(), Error> {
        let finished = self.file.sync_all().and_then(|()| {
            let unfinished = self.unfinished.as_deref().unwrap_or(&self.path);
            std::fs::rename(unfinished, &self.path)
        });
        finished.map_err(|source| Error::Write {
            path: self.path.clone(),
            source,
        })?;
        self.unfinished = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = &self.unfinished {
            let _ = std::fs::remove_file(path);
        }
    }
}
