//! All containers of a user.
//!
//! Invariant: whoever makes, renames or removes one holds `ROOT/lock`, so that names stay unique and what a crash left
//! half done is nobody's work. Only a holder whose container goes with its end takes it away without, by one renaming.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde_json::Value;

use crate::container::{Container, STATE};
use crate::files::{lock, open_lock, remove_tree, replace};
use crate::{Error, Id, LogOptions, Record, State, name};

/// On its way in.
const NEW: &str = "new";
/// On its way out.
pub(crate) const GONE: &str = "gone";

/// The containers of one directory.
#[derive(Clone, Debug)]
pub struct Containers {
    root: PathBuf,
}

/// What a new container is to be; see [`Record`].
#[derive(Clone, Debug)]
pub struct Wanted {
    /// One is made up where there is none.
    pub name: Option<String>,
    /// As in [`Record::image`].
    pub image: String,
    /// As in [`Record::image_digest`].
    pub image_digest: String,
    /// As in [`Record::command`].
    pub command: Vec<String>,
    /// As in [`Record::labels`].
    pub labels: BTreeMap<String, String>,
    /// As in [`Record::remove_at_end`].
    pub remove_at_end: bool,
    /// As in [`Record::stop_signal`].
    pub stop_signal: u8,
    /// As in [`Record::stop_timeout_seconds`].
    pub stop_timeout_seconds: u32,
    /// As in [`Record::log`].
    pub log: LogOptions,
    /// As in [`Record::task`].
    pub task: Value,
}

impl Containers {
    /// Those below `root`, which is made if need be.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let root = root.into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(Error::io("create", &root))?;
        Ok(Self { root })
    }

    /// Makes one.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::NameInUse`], [`Error::Io`].
    pub fn create(&self, wanted: Wanted) -> Result<Container, Error> {
        if let Some(name) = &wanted.name {
            name::check(name)?;
        }
        let _held = self.hold()?;
        self.sweep();
        let here = self.records();
        if let Some(name) = &wanted.name {
            is_free(name, &here)?;
        }
        let id = Id::random().map_err(Error::io("make an identifier in", &self.root))?;
        let random = u64::from_str_radix(id.short(), 16).unwrap_or_default();
        let taken = |name: &str| here.iter().any(|record| record.name == name);
        let name = wanted.name.unwrap_or_else(|| name::make(random, taken));
        let record = Record {
            name,
            created: crate::now(),
            image: wanted.image,
            image_digest: wanted.image_digest,
            command: wanted.command,
            labels: wanted.labels,
            remove_at_end: wanted.remove_at_end,
            stop_signal: wanted.stop_signal,
            stop_timeout_seconds: wanted.stop_timeout_seconds,
            log: wanted.log,
            task: wanted.task,
            id,
        };
        let dir = self.root.join(record.id.as_str());
        let new = dir.with_extension(NEW);
        let made = fs::DirBuilder::new()
            .mode(0o700)
            .create(&new)
            .map_err(Error::io("create", &new))
            .and_then(|()| replace(&new.join(crate::container::RECORD), &record))
            .and_then(|()| replace(&new.join(STATE), &State::created()))
            .and_then(|()| fs::rename(&new, &dir).map_err(Error::io("create", &dir)))
            .and_then(|()| self.sync());
        if let Err(error) = made {
            let _ = remove_tree(&new);
            return Err(error);
        }
        Container::at(dir)
    }

    /// All that are here, the newest first. One whose files are damaged is an error of its own.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory cannot be read.
    pub fn all(&self) -> Result<Vec<Result<Container, Error>>, Error> {
        let mut all: Vec<_> = self
            .dirs()?
            .into_iter()
            .map(Container::at)
            // One that went meanwhile.
            .filter(|one| !matches!(one, Err(Error::NotHere { .. })))
            .collect();
        let created = |one: &Result<Container, Error>| {
            one.as_ref()
                .map(|one| one.record().created.clone())
                .unwrap_or_default()
        };
        all.sort_by_key(|one| std::cmp::Reverse(created(one)));
        Ok(all)
    }

    /// The one of that name, or whose identifier begins like that.
    ///
    /// # Errors
    /// [`Error::NotHere`], [`Error::Ambiguous`], [`Error::Damaged`], [`Error::Io`].
    pub fn find(&self, given: &str) -> Result<Container, Error> {
        if let Some(id) = Id::of(given) {
            return Container::at(self.root.join(id.as_str()));
        }
        let mut begins = Vec::new();
        for dir in self.dirs()? {
            let matches = dir
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|id| !given.is_empty() && id.starts_with(given));
            match Container::at(dir) {
                Ok(one) if one.record().name == given => return Ok(one),
                // Others are of no interest, damaged or not.
                one if matches => begins.push(one),
                _ => {}
            }
        }
        match (begins.pop(), begins.is_empty()) {
            (Some(one), true) => one,
            (Some(_), false) => Err(Error::Ambiguous {
                given: given.to_owned(),
            }),
            (None, _) => Err(Error::NotHere {
                given: given.to_owned(),
            }),
        }
    }

    /// Gives a container another name.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::NameInUse`], [`Error::Io`].
    pub fn rename(&self, container: &Container, name: &str) -> Result<(), Error> {
        name::check(name)?;
        let _held = self.hold()?;
        is_free(name, &self.records())?;
        let mut record = Container::at(container.dir().to_path_buf())?
            .record()
            .clone();
        name.clone_into(&mut record.name);
        replace(&container.dir().join(crate::container::RECORD), &record)
    }

    /// Removes one that does not run.
    ///
    /// # Errors
    /// [`Error::Running`], [`Error::Io`].
    pub fn remove(&self, container: &Container) -> Result<(), Error> {
        let _held = self.hold()?;
        container.give_up()
    }

    fn hold(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        lock(&file, FlockOperation::LockExclusive).map_err(Error::io("lock", path))?;
        Ok(file)
    }

    /// Directories of containers.
    fn dirs(&self) -> Result<Vec<PathBuf>, Error> {
        let entries = fs::read_dir(&self.root).map_err(Error::io("read", &self.root))?;
        Ok(entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                name.and_then(Id::of).is_some()
            })
            .collect())
    }

    fn records(&self) -> Vec<Record> {
        let dirs = self.dirs().unwrap_or_default();
        let read = |dir: PathBuf| Some(Container::at(dir).ok()?.record().clone());
        dirs.into_iter().filter_map(read).collect()
    }

    /// Removes what somebody began and did not end. Only with the lock held.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let path = entry.path();
            let left = path.extension().is_some_and(|it| it == NEW || it == GONE);
            if left
                && path
                    .file_stem()
                    .and_then(|it| it.to_str())
                    .and_then(Id::of)
                    .is_some()
            {
                // The next one tries again.
                let _ = remove_tree(&path);
            }
        }
    }

    fn sync(&self) -> Result<(), Error> {
        sync_dir(&self.root)
    }
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("write", dir))
}

fn is_free(name: &str, here: &[Record]) -> Result<(), Error> {
    match here.iter().find(|record| record.name == name) {
        Some(record) => Err(Error::NameInUse {
            name: name.to_owned(),
            id: record.id.short().to_owned(),
        }),
        None => Ok(()),
    }
}
