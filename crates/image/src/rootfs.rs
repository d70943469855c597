//! A directory of the host as an image of one layer.
//!
//! Owners, modes, times and attributes are taken as they are: files of an ordinary user are that user's in the guest,
//! too. What the user may not read is an error that names it. Nothing is followed: symbolic links are data, and other
//! file systems mounted below are taken as the walk sees them. SELinux labels and overlayfs's attributes stay behind.
//!
//! Invariant: the cached file's name has a fingerprint over each name's path, inode number, mode, owner, size, device
//! number, mtime and ctime; whatever changes a file changes its ctime, so an unchanged fingerprint means unchanged
//! contents. A file that changes while it is read is an error. Left to others: directories that are being written.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;

use crate::digest::{Digest, DigestAlgorithm, Hasher};
use crate::erofs::Writer;
use crate::error::ImageError;
use crate::layer::check_xattrs;
use crate::limits::Limits;
use crate::manifest::ImageConfig;
use crate::prepare::Image;
use crate::progress::Progress;
use crate::store::{Claim, Shelf, Store};
use crate::tree::{self, CleanPath, Content, Directory, Tree, Xattrs};

/// How long a file for an earlier state of a directory stays after its last use: a machine about to start may name it.
const STALE_AFTER: Duration = Duration::from_secs(600);
const XATTR_LIST_BYTES_MAX: usize = 65_536;

/// One name below the directory.
struct Found {
    /// Relative, without a leading slash; empty for the directory itself.
    path: PathBuf,
    metadata: Metadata,
}

/// Prepares `rootfs:DIR`.
pub(crate) fn prepare(
    store: &Store,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<Image, ImageError> {
    let dir = fs::canonicalize(dir).map_err(ImageError::io("open directory", dir))?;
    let found = walk(&dir, store.limits())?;
    let digest = fingerprint(&found);
    let path_hash = Digest::sha256_of(dir.as_os_str().as_bytes());
    let prefix = path_hash.hex().get(..16).unwrap_or_default().to_owned();
    let name = format!("{prefix}-{}", digest.hex());
    let image = |path| Image {
        layers: vec![path],
        config: ImageConfig::default(),
        digest: digest.clone(),
    };
    progress.layers(1);
    if let Some(path) = store.finished(Shelf::Rootfs, &name) {
        touch(&path);
        progress.layer_done(0, true);
        return Ok(image(path));
    }
    let claim = store.claim(&name, &mut || progress.layer_waiting(0))?;
    if let Some(path) = store.finished(Shelf::Rootfs, &name) {
        progress.layer_done(0, true);
        return Ok(image(path));
    }
    let total = found
        .iter()
        .filter(|f| f.metadata.is_file())
        .map(|f| f.metadata.len())
        .sum();
    progress.layer_start(0, &dir.display().to_string(), total);
    build(store, &claim, &dir, &found, &digest, progress)?;
    let place = store.place(Shelf::Rootfs, &name);
    claim.commit(&place)?;
    remove_stale(&place, &prefix);
    progress.layer_done(0, false);
    Ok(image(place))
}

/// All names below `dir`, parents before children, sorted.
fn walk(dir: &Path, limits: &Limits) -> Result<Vec<Found>, ImageError> {
    let metadata = fs::symlink_metadata(dir).map_err(ImageError::io("read", dir))?;
    if !metadata.is_dir() {
        return Err(ImageError::io("list", dir)(
            io::ErrorKind::NotADirectory.into(),
        ));
    }
    let mut found = vec![Found {
        path: PathBuf::new(),
        metadata,
    }];
    let mut todo = vec![PathBuf::new()];
    while let Some(parent) = todo.pop() {
        let full = dir.join(&parent);
        let list = fs::read_dir(&full).map_err(ImageError::io("list", &full))?;
        let names = list
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>();
        let mut names = names.map_err(ImageError::io("list", &full))?;
        names.sort();
        for name in names {
            if found.len() >= limits.layer_entries_max {
                let max = limits.layer_entries_max as u64;
                return Err(ImageError::Limit {
                    what: format!("{dir:?}"),
                    limit: "layer_entries_max",
                    max,
                });
            }
            let path = parent.join(name);
            let full = dir.join(&path);
            let metadata = fs::symlink_metadata(&full).map_err(ImageError::io("read", &full))?;
            if metadata.is_dir() {
                todo.push(path.clone());
            }
            found.push(Found { path, metadata });
        }
    }
    Ok(found)
}

fn fingerprint(found: &[Found]) -> Digest {
    let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
    for Found { path, metadata } in found {
        let path = path.as_os_str().as_bytes();
        hasher.update(&(path.len() as u64).to_le_bytes());
        hasher.update(path);
        for number in [
            metadata.dev(),
            metadata.ino(),
            metadata.size(),
            metadata.rdev(),
            metadata.nlink(),
        ] {
            hasher.update(&number.to_le_bytes());
        }
        for number in [metadata.mode(), metadata.uid(), metadata.gid()] {
            hasher.update(&number.to_le_bytes());
        }
        for number in [
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        ] {
            hasher.update(&number.to_le_bytes());
        }
    }
    hasher.finish()
}

fn build(
    store: &Store,
    claim: &Claim,
    dir: &Path,
    found: &[Found],
    digest: &Digest,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    let limits = store.limits();
    let scratch = store.scratch();
    let spool = tempfile::tempfile_in(&scratch).map_err(ImageError::io("write to", &scratch))?;
    let mut writer = Writer::new(claim.file()?, claim.path(), spool, limits)?;
    let mut tree = Tree::new(*limits);
    let mut first_names: HashMap<(u64, u64), &Path> = HashMap::new();
    let mut bytes_done: u64 = 0;
    for Found { path, metadata } in found {
        let full = dir.join(path);
        let clean = CleanPath::new(path.as_os_str().as_bytes(), limits)?;
        let mut no_implied = |_: &[&[u8]]| Ok(tree::Metadata::implied());
        if metadata.nlink() > 1 && !metadata.is_dir() {
            match first_names.get(&(metadata.dev(), metadata.ino())) {
                Some(first) => {
                    let first = CleanPath::new(first.as_os_str().as_bytes(), limits)?;
                    if tree.link(&clean, &first, &mut no_implied)? {
                        continue;
                    }
                }
                None => {
                    first_names.insert((metadata.dev(), metadata.ino()), path);
                }
            }
        }
        let xattrs = read_xattrs(&full, limits)?;
        let content = read_content(&full, metadata, &xattrs, &mut writer)?;
        if metadata.is_file() {
            bytes_done = bytes_done.saturating_add(metadata.len());
            progress.layer_bytes(0, bytes_done);
        }
        let metadata = tree::Metadata {
            mode: (metadata.mode() & 0o7777) as u16,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (
                metadata.mtime(),
                u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            ),
            xattrs,
        };
        tree.insert(&clean, metadata, content, &mut no_implied)?;
    }
    writer.finish(&tree, digest.uuid())?;
    Ok(())
}

fn read_content(
    full: &Path,
    metadata: &Metadata,
    xattrs: &Xattrs,
    writer: &mut Writer,
) -> Result<Content, ImageError> {
    let kind = metadata.file_type();
    let device = || {
        let number = metadata.rdev();
        (rustix::fs::major(number), rustix::fs::minor(number))
    };
    Ok(if kind.is_dir() {
        Content::Directory(Directory::default())
    } else if kind.is_symlink() {
        let target = fs::read_link(full).map_err(ImageError::io("read", full))?;
        Content::Symlink(target.into_os_string().into_vec())
    } else if kind.is_file() {
        let mut file = open_unchanged(full, metadata)?;
        let on_read = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => ImageError::Changed {
                path: full.to_path_buf(),
            },
            _ => ImageError::io("read", full)(source),
        };
        let data = writer.add_file(metadata.len(), xattrs, &mut file, &on_read)?;
        expect_unchanged(full, &file, metadata)?;
        Content::File(data)
    } else if kind.is_char_device() {
        let (major, minor) = device();
        Content::CharDevice { major, minor }
    } else if kind.is_block_device() {
        let (major, minor) = device();
        Content::BlockDevice { major, minor }
    } else if kind.is_fifo() {
        Content::Fifo
    } else {
        Content::Socket
    })
}

fn open_unchanged(full: &Path, metadata: &Metadata) -> Result<File, ImageError> {
    // Should it have become a link or a FIFO meanwhile, neither is followed nor waited for.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(full)
        .map_err(ImageError::io("open", full))?;
    expect_unchanged(full, &file, metadata)?;
    Ok(file)
}

fn expect_unchanged(full: &Path, file: &File, before: &Metadata) -> Result<(), ImageError> {
    let now = file.metadata().map_err(ImageError::io("read", full))?;
    let key = |m: &Metadata| {
        (
            m.dev(),
            m.ino(),
            m.mode(),
            m.size(),
            m.mtime(),
            m.mtime_nsec(),
            m.ctime(),
            m.ctime_nsec(),
        )
    };
    if key(&now) == key(before) {
        return Ok(());
    }
    Err(ImageError::Changed {
        path: full.to_path_buf(),
    })
}

fn read_xattrs(full: &Path, limits: &Limits) -> Result<Xattrs, ImageError> {
    let failed = |errno: rustix::io::Errno| {
        ImageError::io("read the extended attributes of", full)(errno.into())
    };
    let mut list = vec![0; XATTR_LIST_BYTES_MAX];
    let length = match rustix::fs::llistxattr(full, &mut list[..]) {
        Ok(0) | Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(length) => length,
        Err(errno) => return Err(failed(errno)),
    };
    let mut xattrs = Xattrs::new();
    for name in list
        .get(..length)
        .unwrap_or_default()
        .split(|b| *b == 0)
        .filter(|name| is_wanted(name))
    {
        let mut value = vec![0; XATTR_LIST_BYTES_MAX];
        match rustix::fs::lgetxattr(full, name, &mut value[..]) {
            Ok(length) => value.truncate(length),
            // Removed meanwhile, or not for us to read.
            Err(
                rustix::io::Errno::NODATA | rustix::io::Errno::PERM | rustix::io::Errno::ACCESS,
            ) => continue,
            Err(errno) => return Err(failed(errno)),
        }
        xattrs.push((name.to_vec(), value));
    }
    xattrs.sort();
    check_xattrs(full.as_os_str().as_bytes(), &xattrs, limits)?;
    Ok(xattrs)
}

fn is_wanted(name: &[u8]) -> bool {
    let of_the_host = name == b"security.selinux" || name.starts_with(b"trusted.overlay.");
    !name.is_empty() && !of_the_host
}

/// Says that the file was used; a failure costs a rebuild at worst.
fn touch(path: &Path) {
    if let Ok(file) = OpenOptions::new().write(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Removes files of earlier states of the same directory that were not used for a while.
fn remove_stale(current: &Path, prefix: &str) {
    let Some(folder) = current.parent() else {
        return;
    };
    let Ok(list) = fs::read_dir(folder) else {
        return;
    };
    for entry in list.flatten() {
        let path = entry.path();
        let same_directory = entry.file_name().as_bytes().starts_with(prefix.as_bytes());
        let used = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .ok();
        let age = used.and_then(|used| SystemTime::now().duration_since(used).ok());
        if same_directory && path != current && age.is_some_and(|age| age > STALE_AFTER) {
            // Not ours to remove, or gone already: nothing is lost.
            let _ = fs::remove_file(path);
        }
    }
}
