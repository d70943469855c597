//! A private directory for one container's sockets and pipes, that is gone when its owner is.
//!
//! Invariants:
//! - Directory and parent belong to this user and nobody else may enter them (0700).
//! - `<parent>/<id>.lock` is flock'ed for as long as the owner lives. Only who holds the lock touches `<parent>/<id>`;
//!   whoever gets the lock of an id may remove it: the owner is dead, and the kernel dropped its lock for it.
//! - Nothing below the parent outlives its owner longer than until the next [`RuntimeDir::create`] of the same user.
//!
//! Left to others: what is in it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::Error;

/// Longest name that may be appended to the directory and still be a socket's path: `/v.sock_1024`.
const SOCKET_NAME_BYTES: usize = 16;
/// `sun_path` has 108 bytes and ends with a zero (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest id.
pub(crate) const ID_BYTES_MAX: usize = 64;
/// A lock file can be removed between open and flock by someone who sweeps; then we start over.
const LOCK_ATTEMPTS_MAX: u32 = 100;

/// One container's private directory; dropping it removes it.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    lock_path: PathBuf,
    /// Holds the flock; closed after the removal.
    _lock: OwnedFd,
}

impl RuntimeDir {
    /// Makes `<parent>/<id>`, and removes what dead owners left in `parent`.
    ///
    /// # Errors
    /// [`Error::NameInUse`] when a live owner has that id, otherwise those about runtime directories.
    pub fn create(parent: &Path, id: &str) -> Result<Self, Error> {
        make_private(parent)?;
        let path = parent.join(id);
        if path.as_os_str().len().saturating_add(SOCKET_NAME_BYTES) > SOCKET_PATH_BYTES_MAX {
            return Err(Error::RuntimeDirTooLong { path });
        }
        sweep(parent);
        let lock_path = lock_path(parent, id);
        let lock = take_lock(&lock_path)?.ok_or_else(|| Error::NameInUse {
            name: id.to_owned(),
        })?;
        // Leftovers that sweep could not get, for it saw them before their owner died.
        remove_tree(&path)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| Error::RuntimeDir {
                action: "create",
                path: path.clone(),
                source,
            })?;
        Ok(Self {
            path,
            lock_path,
            _lock: lock,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // Whatever stays, the next start removes.
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!(%error, "runtime directory stays until the next start");
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Where this user's runtime directories live: `$XDG_RUNTIME_DIR/kombi`; without it `/run/kombi` for root and
/// `/tmp/kombi-UID` for others.
#[must_use]
pub fn runtime_parent() -> PathBuf {
    let uid = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() && dir.is_dir() => dir.join("kombi"),
        Some(_) | None if uid.is_root() => PathBuf::from("/run/kombi"),
        Some(_) | None => PathBuf::from(format!("/tmp/kombi-{}", uid.as_raw())),
    }
}

fn lock_path(parent: &Path, id: &str) -> PathBuf {
    parent.join(format!("{id}.lock"))
}

fn make_private(dir: &Path) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => {
            return Err(Error::RuntimeDir {
                action: "create",
                path: dir.to_path_buf(),
                source,
            });
        }
    }
    let unsafe_because = |reason| Error::RuntimeDirUnsafe {
        path: dir.to_path_buf(),
        reason,
    };
    let meta = fs::symlink_metadata(dir).map_err(|source| Error::RuntimeDir {
        action: "examine",
        path: dir.to_path_buf(),
        source,
    })?;
    if !meta.is_dir() {
        return Err(unsafe_because("is not a directory"));
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(unsafe_because("belongs to another user"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(unsafe_because("can be entered by other users"));
    }
    Ok(())
}

/// `None` when someone else holds it.
fn take_lock(path: &Path) -> Result<Option<OwnedFd>, Error> {
    let failed = |source: Errno| Error::RuntimeDir {
        action: "lock",
        path: path.to_path_buf(),
        source: source.into(),
    };
    for _ in 0..LOCK_ATTEMPTS_MAX {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let held = rustix::fs::fstat(&fd).map_err(failed)?;
        match rustix::fs::lstat(path) {
            Ok(named) if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino) => {
                return Ok(Some(fd));
            }
            // Removed, or made anew, between our open and our flock: that lock guards nothing.
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(Errno::BUSY))
}

/// Removes what dead owners left. What cannot be removed is left for the next time: it must not keep anyone from
/// starting.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let mut ids: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .map(|name| name.strip_suffix(".lock").unwrap_or(&name).to_owned())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        let lock_path = lock_path(parent, &id);
        if let Ok(Some(_lock)) = take_lock(&lock_path) {
            let _ = remove_tree(&parent.join(&id));
            let _ = fs::remove_file(&lock_path);
        }
    }
}

fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::RuntimeDir {
            action: "remove",
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// Checks a name that a user gave.
///
/// # Errors
/// [`Error::BadName`].
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let only_known = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    // `x.lock` would be taken for the lock of `x`.
    if starts_well && only_known && name.len() <= ID_BYTES_MAX && !name.ends_with(".lock") {
        Ok(())
    } else {
        Err(Error::BadName {
            name: name.to_owned(),
        })
    }
}

/// A name for who gave none: twelve hexadecimal digits, as docker's short ids.
///
/// # Errors
/// [`Error::Channel`] when the kernel has no random numbers.
pub(crate) fn random_id() -> Result<String, Error> {
    let mut bytes = [0_u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(
        |source| Error::Channel {
            action: "get random numbers",
            source: source.into(),
        },
    )?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parent() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().expect("temporary directory");
        let parent = temp.path().join("kombi");
        (temp, parent)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .expect("readable")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .into_string()
                    .expect("utf-8")
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_private_and_gone_with_its_owner() {
        let (_temp, parent) = parent();
        let dir = RuntimeDir::create(&parent, "a").expect("created");
        for path in [parent.as_path(), dir.path()] {
            assert_eq!(fs::metadata(path).expect("there").mode() & 0o777, 0o700);
        }
        fs::write(dir.path().join("socket"), "").expect("written");
        drop(dir);
        assert!(names(&parent).is_empty(), "{:?}", names(&parent));
    }

    #[test]
    fn a_live_owner_keeps_its_name_and_its_directory() {
        let (_temp, parent) = parent();
        let _a = RuntimeDir::create(&parent, "a").expect("created");
        let error = RuntimeDir::create(&parent, "a").expect_err("taken");
        assert!(matches!(error, Error::NameInUse { .. }), "{error}");
        let _b = RuntimeDir::create(&parent, "b").expect("created");
        assert_eq!(names(&parent), ["a", "a.lock", "b", "b.lock"]);
    }

    #[test]
    fn what_dead_owners_left_is_removed_at_the_next_start() {
        let (_temp, parent) = parent();
        make_private(&parent).expect("made");
        fs::create_dir(parent.join("dead")).expect("made");
        fs::write(parent.join("dead/v.sock_1024"), "").expect("written");
        fs::write(parent.join("dead.lock"), "").expect("written");
        fs::create_dir(parent.join("lockless")).expect("made");
        let _a = RuntimeDir::create(&parent, "a").expect("created");
        assert_eq!(names(&parent), ["a", "a.lock"]);
    }

    #[test]
    fn a_parent_that_others_can_enter_is_refused() {
        let (_temp, parent) = parent();
        fs::create_dir(&parent).expect("made");
        fs::set_permissions(&parent, fs::Permissions::from_mode(0o755)).expect("set");
        let error = RuntimeDir::create(&parent, "a").expect_err("refused");
        assert!(matches!(error, Error::RuntimeDirUnsafe { .. }), "{error}");
    }

    #[test]
    fn a_parent_that_is_a_link_is_refused() {
        let (temp, parent) = parent();
        std::os::unix::fs::symlink(temp.path(), &parent).expect("linked");
        let error = RuntimeDir::create(&parent, "a").expect_err("refused");
        assert!(matches!(error, Error::RuntimeDirUnsafe { .. }), "{error}");
    }

    #[test]
    fn a_parent_too_long_for_a_socket_is_refused() {
        let (temp, _) = parent();
        let parent = temp.path().join("x".repeat(100));
        let error = RuntimeDir::create(&parent, "a").expect_err("refused");
        assert!(matches!(error, Error::RuntimeDirTooLong { .. }), "{error}");
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            ".a",
            "a b",
            "ä",
            "x.lock",
            &"a".repeat(65),
        ] {
            check_name(name).expect_err(name);
        }
        for name in ["a", "web-1", "A.b_c", "0"] {
            check_name(name).expect(name);
        }
    }
}
