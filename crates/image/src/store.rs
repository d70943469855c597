//! Where finished layers are kept.
//!
//! ```text
//! ROOT/index.json, blobs/, downloads/     see catalog.rs and content.rs
//! ROOT/layers/DIFF_ID.erofs              a layer that needs no other
//! ROOT/layers/DIFF_ID-on-CHAIN_ID.erofs  a layer that took something from those below (see lower.rs)
//! ROOT/rootfs/PATH-FINGERPRINT.erofs     a directory of the host
//! ROOT/tmp/NAME.partial                  being built, under an exclusive flock of its builder
//! ```
//!
//! Invariant: what is in `layers/` and `rootfs/` was complete, checked and synced before it got its name. A file in `tmp/`
//! that nobody has locked is left over from a builder that was killed; the next [`Store::open`] removes it. Two
//! processes never build the same layer at once. Left to others: removing layers no image uses (`collect.rs`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::error::ImageError;
use crate::limits::Limits;

/// An image store on disk.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
}

/// Which folder a finished file goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shelf {
    Layers,
    Rootfs,
}

impl Shelf {
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Shelf::Layers => "layers",
            Shelf::Rootfs => "rootfs",
        }
    }
}

/// The right to build one file. Dropped before [`Claim::commit`], it leaves nothing.
#[derive(Debug)]
pub(crate) struct Claim {
    file: File,
    partial: PathBuf,
    committed: bool,
}

impl Store {
    /// Opens the store at `root`, made when missing, and removes what killed builders left.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`] when the folders cannot be made or read.
    pub fn open(root: impl Into<PathBuf>) -> Result<Store, ImageError> {
        Store::open_with_limits(root, Limits::default())
    }

    /// As [`Store::open`], with other limits than the default ones.
    ///
    /// # Errors
    ///
    /// As [`Store::open`].
    pub fn open_with_limits(root: impl Into<PathBuf>, limits: Limits) -> Result<Store, ImageError> {
        let store = Store {
            root: root.into(),
            limits,
        };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for folder in [
            Shelf::Layers.folder(),
            Shelf::Rootfs.folder(),
            "tmp",
            "blobs/sha256",
            "downloads",
        ] {
            let path = store.root.join(folder);
            builder
                .create(&path)
                .map_err(ImageError::io("make folder", &path))?;
        }
        store.remove_leftovers()?;
        Ok(store)
    }

    /// `$KOMBI_HOME`, or `kombi` in `$XDG_DATA_HOME`, or `~/.local/share/kombi`.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoStoreRoot`] when none of the variables is set.
    pub fn default_root() -> Result<PathBuf, ImageError> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(home) = set("KOMBI_HOME") {
            return Ok(home);
        }
        // Relative paths in XDG variables are to be ignored (XDG base directory specification).
        let data = set("XDG_DATA_HOME").filter(|path| path.is_absolute());
        let data = data.or_else(|| set("HOME").map(|home| home.join(".local/share")));
        data.map(|data| data.join("kombi"))
            .ok_or(ImageError::NoStoreRoot)
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Where unnamed scratch files may go.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Where a finished file of that name is or will be.
    pub(crate) fn place(&self, shelf: Shelf, name: &str) -> PathBuf {
        self.root.join(shelf.folder()).join(format!("{name}.erofs"))
    }

    /// The finished file, if there is one.
    pub(crate) fn finished(&self, shelf: Shelf, name: &str) -> Option<PathBuf> {
        let place = self.place(shelf, name);
        place.is_file().then_some(place)
    }

    /// Waits for the right to build `name`; `waiting` is called once when another process has it. The caller looks
    /// again for the finished file, since that process may have made it.
    pub(crate) fn claim(&self, name: &str, waiting: &mut dyn FnMut()) -> Result<Claim, ImageError> {
        let partial = self.scratch().join(format!("{name}.partial"));
        let mut told = false;
        loop {
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
                    if !told {
                        told = true;
                        waiting();
                    }
                    lock(FlockOperation::LockExclusive)
                        .map_err(ImageError::io("lock", &partial))?;
                }
                Err(error) => return Err(ImageError::io("lock", &partial)(error)),
            }
            // The one before may have renamed or removed the file while we waited for its lock.
            if is_same_file(&file, &partial) {
                // What a killed builder wrote is worth nothing.
                file.set_len(0).map_err(ImageError::io("empty", &partial))?;
                return Ok(Claim {
                    file,
                    partial,
                    committed: false,
                });
            }
        }
    }

    fn remove_leftovers(&self) -> Result<(), ImageError> {
        let folder = self.scratch();
        for entry in fs::read_dir(&folder).map_err(ImageError::io("list", &folder))? {
            let path = entry.map_err(ImageError::io("list", &folder))?.path();
            // Gone, or of another user: not ours to judge.
            let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
                continue;
            };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
                && is_same_file(&file, &path)
            {
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(ImageError::io("remove", &path)(error));
                    }
                    Ok(()) | Err(_) => {}
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(named)) => ours.dev() == named.dev() && ours.ino() == named.ino(),
        _ => false,
    }
}

impl Claim {
    /// The empty file to build in; the lock stays with it.
    pub(crate) fn file(&self) -> Result<File, ImageError> {
        self.file
            .try_clone()
            .map_err(ImageError::io("open", &self.partial))
    }

    /// Its path, for errors.
    pub(crate) fn path(&self) -> &Path {
        &self.partial
    }

    /// Makes the file durable and gives it its name.
    pub(crate) fn commit(mut self, place: &Path) -> Result<(), ImageError> {
        self.file
            .sync_all()
            .map_err(ImageError::io("sync", &self.partial))?;
        fs::rename(&self.partial, place).map_err(ImageError::io("create", place))?;
        self.committed = true;
        let folder = place.parent().unwrap_or(place);
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(ImageError::io("sync", folder))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.committed {
            // Still locked: nobody else has taken the name. A failure leaves what the next open removes.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(store: &Store) -> Vec<PathBuf> {
        let list = fs::read_dir(store.scratch()).expect("a folder");
        list.map(|entry| entry.expect("an entry").path()).collect()
    }

    #[test]
    fn leftovers_of_a_killed_builder_go_and_those_of_a_live_one_stay() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path()).expect("a store");
        fs::write(store.scratch().join("dead.partial"), b"half").expect("written");
        let live = store.claim("live", &mut || ()).expect("a claim");
        let again = Store::open(dir.path()).expect("a store");
        assert_eq!(files(&again), [live.path()]);
        drop(live);
        assert_eq!(files(&again), Vec::<PathBuf>::new());
    }

    #[test]
    fn second_builder_waits_and_starts_from_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path()).expect("a store");
        let first = store.claim("x", &mut || ()).expect("a claim");
        io::Write::write_all(&mut first.file().expect("its file"), b"first").expect("written");
        let (tell, told) = std::sync::mpsc::channel();
        let other = store.clone();
        let second = std::thread::spawn(move || {
            let claim = other
                .claim("x", &mut || tell.send(()).expect("a listener"))
                .expect("a claim");
            claim
                .file()
                .expect("its file")
                .metadata()
                .expect("metadata")
                .len()
        });
        told.recv().expect("the second one says that it waits");
        first
            .commit(&store.place(Shelf::Layers, "x"))
            .expect("committed");
        assert_eq!(second.join().expect("no panic"), 0);
        assert_eq!(
            fs::read(store.place(Shelf::Layers, "x")).expect("the layer"),
            b"first"
        );
        assert_eq!(files(&store), Vec::<PathBuf>::new());
    }

    #[test]
    fn layers_are_for_their_owner_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path().join("new/store")).expect("a store");
        let mode = fs::metadata(store.root().join("layers"))
            .expect("a folder")
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
