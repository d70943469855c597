//! The files of a snapshot.
//!
//! ```text
//! "KOMBISNP"  major, minor, patch, 0   length of the body   body (postcard)   CRC-64/XZ of all before
//!  8 bytes     four times 2 bytes           8 bytes                             8 bytes
//! ```
//!
//! Numbers are little-endian. A reader takes files of its own major version whose minor
//! version is at most its own.
//!
//! Invariants: whatever bytes a file has, reading it gives a value or one error, and takes
//! no more memory than [`BODY_BYTES_MAX`] and what the value itself needs; a file that is
//! being written has another name until it is whole.
//!
//! Left to others: what is in the body (`machine`, `vmm`), memory (`ram`), whether the
//! state is one that a machine can have. The checksum finds accidents, not attackers.
#![forbid(unsafe_code)]

mod new_file;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crc::{CRC_64_XZ, Crc};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use new_file::NewFile;

const MAGIC: &[u8; 8] = b"KOMBISNP";
const HEAD_BYTES: usize = 24;
const CHECKSUM_BYTES: usize = 8;
const CHECKSUM: Crc<u64> = Crc::<u64>::new(&CRC_64_XZ);
/// Bytes of a body at most: 32 vCPUs and 17 devices have far less.
pub const BODY_BYTES_MAX: u64 = 16 << 20;

/// The version of what is written.
pub const VERSION: Version = Version {
    major: 1,
    minor: 0,
    patch: 0,
};

/// The version of a snapshot's format, semantic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Another one cannot be read.
    pub major: u16,
    /// A later one cannot be read.
    pub minor: u16,
    /// Any can be read.
    pub patch: u16,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "v{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why a snapshot's file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be read.
    #[error("failed to read snapshot {path:?}")]
    Read {
        /// Path on the host.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// It cannot be written.
    #[error("failed to write {path:?}")]
    Write {
        /// Path on the host.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path:?} is not a snapshot: {why}")]
    NotOne {
        /// Path on the host.
        path: PathBuf,
        /// What gives it away.
        why: &'static str,
    },
    /// It is of a version that this program does not read.
    #[error("snapshot {path:?} has version {found}, this program reads up to {VERSION}")]
    Version {
        /// Path on the host.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
    /// It is not as it was written.
    #[error("snapshot {path:?} is damaged: {why}")]
    Damaged {
        /// Path on the host.
        path: PathBuf,
        /// How that shows.
        why: &'static str,
    },
    /// A body that is too long.
    #[error("the state for {path:?} is longer than a snapshot's can be")]
    TooLong {
        /// Path on the host.
        path: PathBuf,
    },
}

/// Writes `body` into a file that will be found at `file`'s path once it is finished.
///
/// # Errors
/// [`Error::Write`], [`Error::TooLong`].
pub fn write<T: Serialize>(file: &NewFile, body: &T) -> Result<(), Error> {
    let too_long = || Error::TooLong {
        path: file.path().into(),
    };
    let body = postcard::to_stdvec(body).map_err(|_| too_long())?;
    if body.len() as u64 > BODY_BYTES_MAX {
        return Err(too_long());
    }
    let mut bytes = Vec::with_capacity(HEAD_BYTES + body.len() + CHECKSUM_BYTES);
    bytes.extend(MAGIC);
    for number in [VERSION.major, VERSION.minor, VERSION.patch, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes.extend(CHECKSUM.checksum(&bytes).to_le_bytes());
    let written = (&mut file.file()).write_all(&bytes);
    written.map_err(|source| Error::Write {
        path: file.path().into(),
        source,
    })
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// Each of [`Error`] but those of writing.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let damaged = |why| Error::Damaged {
        path: path.into(),
        why,
    };
    let (file, head) = open(path)?;
    if head.version.major != VERSION.major || head.version.minor > VERSION.minor {
        return Err(Error::Version {
            path: path.into(),
            found: head.version,
        });
    }
    if head.body_bytes > BODY_BYTES_MAX {
        return Err(damaged("its body is longer than any is"));
    }
    let wanted = head.body_bytes + CHECKSUM_BYTES as u64;
    let mut rest = Vec::new();
    // One byte more than there may be.
    let taken = file.take(wanted + 1).read_to_end(&mut rest);
    taken.map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    if rest.len() as u64 != wanted {
        return Err(damaged("it is longer or shorter than it says"));
    }
    let (body, checksum) = rest
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or_else(|| damaged("it ends too early"))?;
    let mut digest = CHECKSUM.digest();
    digest.update(&head.bytes);
    digest.update(body);
    if digest.finalize() != u64::from_le_bytes(*checksum) {
        return Err(damaged("its checksum is wrong"));
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, _)) => Err(damaged("its body has something behind its end")),
        Err(_) => Err(damaged("its body makes no sense")),
    }
}

/// The version of the snapshot at `path`.
///
/// # Errors
/// [`Error::Read`], [`Error::NotOne`].
pub fn version_of(path: &Path) -> Result<Version, Error> {
    open(path).map(|(_, head)| head.version)
}

struct Head {
    bytes: [u8; HEAD_BYTES],
    version: Version,
    body_bytes: u64,
}

fn open(path: &Path) -> Result<(File, Head), Error> {
    let failed = |source| Error::Read {
        path: path.into(),
        source,
    };
    let not_one = |why| Error::NotOne {
        path: path.into(),
        why,
    };
    // Opening a FIFO would wait.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(not_one("it is not a file"));
    }
    let mut file = File::open(path).map_err(failed)?;
    let mut bytes = [0; HEAD_BYTES];
    match file.read_exact(&mut bytes) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(not_one("it is too short"));
        }
        Err(error) => return Err(failed(error)),
    }
    let [magic, numbers, length] = [0, 8, 16].map(|at| {
        let mut part = [0; 8];
        part.copy_from_slice(bytes.get(at..at + 8).unwrap_or(&[0; 8]));
        part
    });
    if magic != *MAGIC {
        return Err(not_one("it does not begin like one"));
    }
    let [a, b, c, d, e, f, _, _] = numbers;
    let head = Head {
        bytes,
        version: Version {
            major: u16::from_le_bytes([a, b]),
            minor: u16::from_le_bytes([c, d]),
            patch: u16::from_le_bytes([e, f]),
        },
        body_bytes: u64::from_le_bytes(length),
    };
    Ok((file, head))
}

#[cfg(test)]
mod tests;
