//! Files that are replaced whole, and locks that end with their holder.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Bytes of a record; a longer file is none.
const JSON_BYTES_MAX: u64 = 4 << 20;

/// Replaces `path` by `value` as JSON; after a crash it is the old file or the new one.
pub(crate) fn replace(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_vec(value).map_err(|error| Error::Damaged {
        path: path.to_path_buf(),
        why: error.to_string(),
    })?;
    if text.len() as u64 > JSON_BYTES_MAX {
        return Err(Error::Damaged {
            path: path.to_path_buf(),
            why: format!("{} bytes are more than a record has", text.len()),
        });
    }
    // Writers of one file exclude each other by a lock: one name is enough.
    let new = path.with_extension("tmp");
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_data()
        })
        .and_then(|()| fs::rename(&new, path));
    written.map_err(|source| {
        let _ = fs::remove_file(&new);
        Error::io("write", path)(source)
    })
}

/// What `path` says.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(JSON_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Damaged {
        path: path.to_path_buf(),
        why: error.to_string(),
    })
}

/// Opens a file that is there for its lock.
pub(crate) fn open_lock(path: &Path) -> Result<File, Error> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("open", path))
}

/// Takes the lock, waiting for it.
pub(crate) fn lock(file: &File, how: FlockOperation) -> io::Result<()> {
    loop {
        match flock(file, how) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Takes the lock, or says that somebody has it.
pub(crate) fn try_lock(file: &File, how: FlockOperation) -> io::Result<bool> {
    match flock(file, how) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes a directory and all in it; one that is not there is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
