//! All translations that a machine can reach: the file that was there when it
//! started, and what it added since.
//!
//! Invariant: a save loses nothing that another machine saved before; what two
//! machines add at once is added one after the other. Whatever goes wrong costs
//! translations, never a machine.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use translator::block::{Block, GuestCode};

use crate::fresh::Fresh;
use crate::record::Key;
use crate::{Error, File, Folder, merge};

/// Fewer new bytes are not worth a new file…
const SAVE_BYTES_MIN: usize = 64 << 10;
/// …nor is less than this part of the old one.
const SAVE_PART_MIN: usize = 16;

/// What makes translations other ones, beside the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Of the translator's build.
    pub sources: u64,
    /// Of its options.
    pub options: u64,
}

impl Settings {
    /// For a translator of this build.
    #[must_use]
    pub fn of(options: translator::Options) -> Self {
        Self {
            // The build makes it; a number that is none would only be shared less.
            sources: u64::from_str_radix(translator::SOURCES, 16).unwrap_or(0),
            options: options.shape(),
        }
    }
}

/// For a translator of this build with the usual options.
impl Default for Settings {
    fn default() -> Self {
        Self::of(translator::Options::default())
    }
}

/// How often translations were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Found, and used.
    pub found: u64,
    /// Not found.
    pub missed: u64,
    /// In the file that is mapped now.
    pub in_file: u32,
    /// Added and not saved yet.
    pub fresh: u64,
}

/// What a save did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Records that this machine added.
    pub added: u64,
    /// Records in the file now.
    pub entries: u32,
    /// Bytes of the file now.
    pub bytes: u64,
}

/// A machine's translations. Any of its threads may use them.
pub struct Translations {
    settings: Settings,
    folder: Option<Folder>,
    inner: RwLock<Inner>,
    saving: Mutex<()>,
    found: AtomicU64,
    missed: AtomicU64,
}

#[derive(Default)]
struct Inner {
    file: Option<File>,
    fresh: Fresh,
}

impl Translations {
    /// For a translator with `options`, kept in memory only.
    #[must_use]
    pub fn in_memory(options: translator::Options) -> Self {
        Self {
            settings: Settings::of(options),
            folder: None,
            inner: RwLock::default(),
            saving: Mutex::default(),
            found: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        }
    }

    /// For a translator with `options`, kept in a folder; and why what is there
    /// cannot be used. A bad file is replaced by the next save.
    ///
    /// # Errors
    /// When the folder cannot be used at all.
    pub fn open(
        options: translator::Options,
        folder: &Path,
    ) -> Result<(Self, Option<Error>), Error> {
        let folder = Folder::open(folder)?;
        let mut translations = Self::in_memory(options);
        let (file, error) = match folder.file(translations.settings) {
            Ok(file) => (file, None),
            Err(error) => (None, Some(error)),
        };
        translations.folder = Some(folder);
        translations.write().file = file;
        Ok((translations, error))
    }

    /// Puts the block of `key` into `block`, placed nowhere in particular, and the
    /// guest's code that it stands for into `guest`, if there is one all of whose
    /// guest code `same` finds in the guest's memory.
    pub fn find(
        &self,
        key: Key,
        mut same: impl FnMut(u64, &[u8]) -> bool,
        block: &mut Block,
        guest: &mut Vec<u8>,
    ) -> bool {
        let inner = self.read();
        let in_file = inner
            .file
            .as_ref()
            .and_then(|file| file.find(key, &mut same));
        let found = in_file
            .or_else(|| inner.fresh.find(key, &mut same))
            .is_some_and(|record| record.read(block, guest));
        let count = if found { &self.found } else { &self.missed };
        count.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Keeps a block that the translator made of `guest`'s code.
    pub fn add(&self, key: Key, block: &Block, guest: &dyn GuestCode) {
        self.write().fresh.add(key, block, guest);
    }

    /// Writes what was added, if it is worth it, together with what is in the folder.
    ///
    /// # Errors
    /// When the folder cannot be written. What was added is lost then.
    pub fn save(&self) -> Result<Option<Saved>, Error> {
        let Some(folder) = &self.folder else {
            return Ok(None);
        };
        let _one_at_a_time = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = {
            let mut inner = self.write();
            let part = inner.file.as_ref().map_or(0, File::len) / SAVE_PART_MIN;
            if inner.fresh.bytes() < part.max(SAVE_BYTES_MIN) {
                return Ok(None);
            }
            std::mem::take(&mut inner.fresh)
        };
        let added = fresh.len() as u64;
        let lock = folder.lock()?;
        // Another machine may have replaced it; a bad one is as good as none.
        let now = folder.file(self.settings).unwrap_or(None);
        let bytes = {
            let fresh = fresh.into_sealed();
            let inner = self.read();
            merge::merge(self.settings, inner.file.as_ref(), now.as_ref(), &fresh)
        };
        folder.replace(&lock, self.settings, &bytes)?;
        drop((lock, now, bytes));
        let file = folder.file(self.settings)?;
        let saved = file.as_ref().map(|file| Saved {
            added,
            entries: file.entries(),
            bytes: file.len() as u64,
        });
        self.write().file = file;
        Ok(saved)
    }

    /// Gives memory back that comes again by itself when it is needed.
    pub fn release(&self) {
        if let Some(file) = &self.read().file {
            file.release();
        }
    }

    /// What was found so far, and what there is.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let inner = self.read();
        Counts {
            found: self.found.load(Ordering::Relaxed),
            missed: self.missed.load(Ordering::Relaxed),
            in_file: inner.file.as_ref().map_or(0, File::entries),
            fresh: inner.fresh.len() as u64,
        }
    }

    // A thread that panicked left at most a record that is not in its chain.
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Translations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translations")
            .field("folder", &self.folder)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
