//! The folder that a user's files of translations are in: one file for each build
//! and each set of options, a lock for those who write.
//!
//! Invariant: nothing is read or written unless the folder, and what is read in it,
//! belong to this process's user and nobody else may write them. A file appears
//! under its name complete or not at all.
//!
//! The folder stays open: what is done in it later needs no path.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File as Handle};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat};

use crate::mapping::Mapping;
use crate::{Error, File, Settings};

/// Most bytes of all files of a folder together; the oldest go first.
pub const FOLDER_BYTES_MAX: usize = 64 << 20;
/// `off` or a folder.
const VARIABLE: &str = "KOMBI_TRANSLATION_CACHE";
/// Ends the names of our files.
const ENDING: &str = ".translations";
/// Ends the names of files in the making.
const NEW: &str = ".new";
const LOCK: &str = "lock";
/// How long a writer waits for another one.
const PATIENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);
/// No file of ours is longer.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Where translations are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Off,
    /// In this folder.
    Folder(PathBuf),
}

impl Place {
    /// What was asked for, `off` or a folder; what `KOMBI_TRANSLATION_CACHE` says
    /// otherwise; the user's own folder otherwise, if there is one.
    #[must_use]
    pub fn choose(asked: Option<&OsStr>) -> Self {
        let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match asked.map(OsStr::to_owned).or(variable) {
            Some(word) if word == "off" => Self::Off,
            Some(folder) => Self::Folder(folder.into()),
            None => default_folder().map_or(Self::Off, Self::Folder),
        }
    }
}

/// `$XDG_CACHE_HOME/kombi/translations`, or `~/.cache/kombi/translations`. Relative
/// paths in the variable are ignored (XDG base directory specification).
fn default_folder() -> Option<PathBuf> {
    let set = |name| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("kombi/translations"))
}

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    dir: OwnedFd,
}

/// A file in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    bytes: u64,
    /// Seconds and nanoseconds.
    changed: (i64, u64),
}

impl Folder {
    /// Opens the folder; makes it where there is none.
    ///
    /// # Errors
    /// When it cannot be made or opened, or others could change what is in it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(path)
            .map_err(host("make the folder", path))?;
        Self::open_existing(path)
    }

    /// Opens a folder that is there.
    ///
    /// # Errors
    /// As [`Folder::open`].
    pub fn open_existing(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| host("open the folder", path)(error.into()))?;
        let stat = rustix::fs::fstat(&dir)
            .map_err(|error| host("look at the folder", path)(error.into()))?;
        ours(path, &stat)?;
        Ok(Self {
            path: path.to_owned(),
            dir,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all files of translations in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let files = self.entries(ENDING);
        files.iter().map(|(_, entry)| entry.bytes).sum()
    }

    /// Maps the file of these settings, if there is one.
    ///
    /// # Errors
    /// When it cannot be read, is not ours or not usable.
    pub fn file(&self, settings: Settings) -> Result<Option<File>, Error> {
        let name = settings.file_name();
        let path = self.path.join(&name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.dir, &name, flags, Mode::empty()) {
            Ok(file) => Handle::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(host("open", &path)(error.into())),
        };
        let stat =
            rustix::fs::fstat(&file).map_err(|error| host("look at", &path)(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let why = "it is not a regular file";
            return Err(Error::NotOurs { path, why });
        }
        ours(&path, &stat)?;
        let unusable = |source| Error::Unusable {
            path: path.clone(),
            source,
        };
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if len == 0 || len > FILE_BYTES_MAX {
            return Err(unusable(crate::Refused::Length));
        }
        let mapping = Mapping::new(&file, len as usize).map_err(host("map", &path))?;
        File::new(mapping, settings).map(Some).map_err(unusable)
    }

    /// Keeps all others from writing as long as the lock lives.
    pub(crate) fn lock(&self) -> Result<Lock, Error> {
        let path = self.path.join(LOCK);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, LOCK, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| host("open", &path)(error.into()))?;
        let mut waited = Duration::ZERO;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if waited < PATIENCE => {
                    std::thread::sleep(POLL);
                    waited += POLL;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy { path }),
                Err(error) => return Err(host("lock", &path)(error.into())),
            }
        }
    }

    /// Puts `bytes` in the place of the file of these settings, and removes the
    /// oldest of the others while all are too large.
    pub(crate) fn replace(&self, _: &Lock, settings: Settings, bytes: &[u8]) -> Result<(), Error> {
        // Whoever left these did not come to the end: we hold the lock.
        for (name, _) in self.entries(NEW) {
            let _ = rustix::fs::unlinkat(&self.dir, name, AtFlags::empty());
        }
        let name = settings.file_name();
        let new = format!("{name}{NEW}");
        let path = self.path.join(&new);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, &new, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| host("make", &path)(error.into()))?;
        let renamed = Handle::from(file).write_all(bytes).and_then(|()| {
            rustix::fs::renameat(&self.dir, &new, &self.dir, &name).map_err(io::Error::from)
        });
        if let Err(error) = renamed {
            let _ = rustix::fs::unlinkat(&self.dir, &new, AtFlags::empty());
            return Err(host("write", &path)(error));
        }
        self.drop_oldest(&name);
        Ok(())
    }

    fn drop_oldest(&self, keep: &str) {
        let mut files = self.entries(ENDING);
        files.sort_by_key(|(name, entry)| (name == keep, entry.changed));
        let mut bytes: u64 = files.iter().map(|(_, entry)| entry.bytes).sum();
        for (name, entry) in files {
            if bytes <= FOLDER_BYTES_MAX as u64 || name == keep {
                break;
            }
            if rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()).is_ok() {
                bytes = bytes.saturating_sub(entry.bytes);
            }
        }
    }

    fn entries(&self, ending: &str) -> Vec<(String, Entry)> {
        let Ok(dir) = Dir::read_from(&self.dir) else {
            return Vec::new();
        };
        let entry = |name: &str| {
            let stat = rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some(Entry {
                bytes: u64::try_from(stat.st_size).unwrap_or(0),
                changed: (stat.st_mtime, stat.st_mtime_nsec),
            })
        };
        dir.flatten()
            .filter_map(|found| Some(found.file_name().to_str().ok()?.to_owned()))
            .filter(|name| name.ends_with(ending))
            .filter_map(|name| entry(&name).map(|entry| (name, entry)))
            .collect()
    }
}

/// Held by the only one who writes in a folder.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "closing it unlocks")] OwnedFd);

impl Settings {
    fn file_name(self) -> String {
        let Self { sources, options } = self;
        format!("{sources:016x}-{options:x}{ENDING}")
    }
}

fn host<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Host {
        doing,
        path: path.to_owned(),
        source,
    }
}

fn ours(path: &Path, stat: &Stat) -> Result<(), Error> {
    let why = if stat.st_uid != rustix::process::geteuid().as_raw() {
        "it belongs to another user"
    } else if stat.st_mode & 0o022 != 0 {
        "others may write it"
    } else {
        return Ok(());
    };
    Err(Error::NotOurs {
        path: path.to_owned(),
        why,
    })
}
