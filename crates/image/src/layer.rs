//! One layer: from its tar stream to a tree, its files' contents going straight into the EROFS file.
//!
//! Invariant: whiteouts (`.wh.NAME`, `.wh..wh..opq`; OCI image layer specification) become overlayfs's; extended
//! attributes that are overlayfs's own are taken from no image, since they steer what the guest sees of other layers.
//! Attributes EROFS has no number for are dropped. Left to others: the stream's digest, the file's name.

use std::io::Read;

use crate::erofs::Writer;
use crate::error::ImageError;
use crate::limits::Limits;
use crate::lower::LowerLayers;
use crate::tar_stream::{TarEntry, TarKind, TarStream};
use crate::tree::{CleanPath, Content, Directory, Metadata, Tree, Xattrs};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// What aufs keeps for itself (`.wh..wh.plnk`, `.wh..wh.aufs`), and the opaque marker among it.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// Reads the whole archive; what follows its end is left in the stream.
pub(crate) fn read_layer(
    stream: impl Read,
    writer: &mut Writer,
    lower: &mut LowerLayers<'_>,
    limits: &Limits,
) -> Result<Tree, ImageError> {
    let mut stream = TarStream::new(stream, *limits);
    let mut tree = Tree::new(*limits);
    while let Some(entry) = stream.next_entry()? {
        put_entry(&mut stream, &mut tree, entry, writer, lower, limits)?;
    }
    tree.seal()?;
    Ok(tree)
}

fn put_entry(
    stream: &mut TarStream<impl Read>,
    tree: &mut Tree,
    entry: TarEntry,
    writer: &mut Writer,
    lower: &mut LowerLayers<'_>,
    limits: &Limits,
) -> Result<(), ImageError> {
    let path = CleanPath::new(&entry.path, limits)?;
    if let Some((name, parents)) = path.parts.split_last() {
        if parents
            .iter()
            .any(|part| part.starts_with(WHITEOUT_PREFIX) && !part.starts_with(AUFS_PREFIX))
        {
            return Err(ImageError::entry(&entry.path, "lies in a whiteout"));
        }
        if *name == OPAQUE_MARKER {
            return tree.opaque(&path, &mut |parts| lower.directory(parts));
        }
        if path.parts.iter().any(|part| part.starts_with(AUFS_PREFIX)) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return tree.whiteout(&path, hidden, &mut |parts| lower.directory(parts));
        }
    }
    let metadata = Metadata {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs: admit_xattrs(&entry, limits)?,
    };
    let content = match &entry.kind {
        TarKind::File { size, extents } => {
            let on_read = |source| ImageError::Stream {
                what: "its tar stream",
                source,
            };
            Content::File(match extents {
                None => writer.add_file(*size, &metadata.xattrs, stream, &on_read)?,
                Some(extents) => writer.add_sparse(*size, extents, stream, &on_read)?,
            })
        }
        TarKind::Directory => Content::Directory(Directory::default()),
        TarKind::Symlink(target) => Content::Symlink(admit_target(&entry.path, target, limits)?),
        TarKind::HardLink(target) => {
            return put_link(tree, &path, &entry.path, target, writer, lower, limits);
        }
        TarKind::CharDevice { major, minor } => Content::CharDevice {
            major: *major,
            minor: *minor,
        },
        TarKind::BlockDevice { major, minor } => Content::BlockDevice {
            major: *major,
            minor: *minor,
        },
        TarKind::Fifo => Content::Fifo,
    };
    tree.insert(&path, metadata, content, &mut |parts| {
        lower.directory(parts)
    })?;
    Ok(())
}

/// A hard link to a node of this layer, or to one of a lower layer, which is then copied up under its own name too.
fn put_link(
    tree: &mut Tree,
    path: &CleanPath<'_>,
    name: &[u8],
    target_name: &[u8],
    writer: &mut Writer,
    lower: &mut LowerLayers<'_>,
    limits: &Limits,
) -> Result<(), ImageError> {
    let shown = String::from_utf8_lossy(target_name).into_owned();
    let refuse = |reason: &str| {
        ImageError::entry(name, format!("is a hard link to {shown:?}, which {reason}"))
    };
    if target_name.first() == Some(&b'/') {
        return Err(refuse("is an absolute path"));
    }
    let target =
        CleanPath::new(target_name, limits).map_err(|_| refuse("leaves the root or is no path"))?;
    if target.parts == path.parts {
        return Ok(());
    }
    if tree.link(path, &target, &mut |parts| lower.directory(parts))? {
        return Ok(());
    }
    let Some(node) = lower.find(&target.parts)? else {
        return Err(refuse("is neither in this layer nor in a lower one"));
    };
    if node.inode.is_directory() {
        return Err(refuse("is a directory"));
    }
    let mut metadata = node.reader.metadata(&node.inode)?;
    metadata.xattrs.retain(|(name, _)| !is_overlay_xattr(name));
    let content = match node.reader.special(&node.inode)? {
        Some(content) => content,
        None => {
            let size = node.inode.inode.size;
            let on_read = |source| ImageError::Stream {
                what: "a lower layer",
                source,
            };
            let mut contents = node.reader.contents(&node.inode);
            Content::File(writer.add_file(size, &metadata.xattrs, &mut contents, &on_read)?)
        }
    };
    tree.insert(&target, metadata, content, &mut |parts| {
        lower.directory(parts)
    })?;
    if tree.link(path, &target, &mut |parts| lower.directory(parts))? {
        return Ok(());
    }
    Err(refuse("could not be copied from a lower layer"))
}

fn admit_target(name: &[u8], target: &[u8], limits: &Limits) -> Result<Vec<u8>, ImageError> {
    if target.is_empty() {
        return Err(ImageError::entry(name, "is a symbolic link to nothing"));
    }
    if target.len() > limits.path_bytes_max || target.contains(&0) {
        return Err(ImageError::entry(
            name,
            "is a symbolic link to something that is no path",
        ));
    }
    Ok(target.to_vec())
}

fn admit_xattrs(entry: &TarEntry, limits: &Limits) -> Result<Xattrs, ImageError> {
    let kept = entry
        .xattrs
        .iter()
        .filter(|(name, _)| !is_overlay_xattr(name));
    let mut xattrs: Xattrs = kept.cloned().collect();
    xattrs.sort();
    check_xattrs(&entry.path, &xattrs, limits)?;
    Ok(xattrs)
}

/// Refuses more attributes than an inode can hold.
pub(crate) fn check_xattrs(
    name: &[u8],
    xattrs: &Xattrs,
    limits: &Limits,
) -> Result<(), ImageError> {
    let bytes: usize = xattrs
        .iter()
        .map(|(name, value)| name.len().saturating_add(value.len()))
        .sum();
    if bytes <= limits.xattr_bytes_max
        && xattrs
            .iter()
            .all(|(_, value)| value.len() <= usize::from(u16::MAX))
    {
        return Ok(());
    }
    Err(ImageError::Limit {
        what: format!(
            "the extended attributes of {:?}",
            String::from_utf8_lossy(name)
        ),
        limit: "xattr_bytes_max",
        max: limits.xattr_bytes_max as u64,
    })
}

/// Attributes by which overlayfs redirects, hides or shares.
fn is_overlay_xattr(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.")
}
