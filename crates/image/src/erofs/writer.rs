//! Writes an EROFS image while its files stream in.
//!
//! ```text
//! block 0      superblock
//! block 1…     contents of files that do not fit beside their inode, each from a block's start (so they can be DAX)
//!       …      directory blocks and long symbolic links
//! meta_block…  inodes, each followed by its attributes and, when all fits one block, its contents
//! ```
//!
//! Invariant: the bytes follow from the tree and the data alone. Memory grows with the number of names, never with file
//! contents: small contents wait in a spool file until their inode's place is known. Left to others: making the file
//! durable and giving it its name.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::directory::{DirEntry, directory_bytes, directory_data};
use super::spec::{self, BLOCK_BYTES, INODE_BYTES, Inode, SLOT_BYTES, SuperBlock};
use crate::error::ImageError;
use crate::limits::Limits;
use crate::tar_stream::Extent;
use crate::tree::{Content, Directory, NodeId, Tree, Xattrs};

/// Where a file's contents lie until the image is finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileData {
    pub(crate) size: u64,
    place: DataPlace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DataPlace {
    Empty,
    Blocks { first: u32 },
    Spooled { offset: u64 },
}

const COPY_BYTES: usize = 256 * 1024;
/// The first inode does not get number 0: readers of directories skip such entries.
const FIRST_INODE_OFFSET: u64 = 2 * SLOT_BYTES;

/// An image being written.
pub(crate) struct Writer {
    out: BufWriter<File>,
    path: PathBuf,
    spool: BufWriter<File>,
    spool_bytes: u64,
    next_block: u64,
    file_bytes: u64,
    file_bytes_max: u64,
    buffer: Vec<u8>,
}

/// Where a node goes in the metadata area.
#[derive(Clone, Copy)]
struct Placed {
    /// From the start of the metadata area.
    offset: u64,
    size: u64,
    /// First block of contents, device number, or 0.
    union: u32,
    /// How many bytes of contents follow the inode.
    inline_bytes: u64,
    number: u32,
}

/// Where everything goes.
struct Plan {
    /// By node; none for unreachable ones.
    placed: Vec<Option<Placed>>,
    meta_bytes: u64,
    /// Directories and links with contents in blocks, in the order of those blocks.
    contents_order: Vec<NodeId>,
}

impl Writer {
    /// Writes to `out`, an empty file called `path` in errors; `spool` is an empty scratch file.
    pub(crate) fn new(
        out: File,
        path: &Path,
        spool: File,
        limits: &Limits,
    ) -> Result<Writer, ImageError> {
        let mut writer = Writer {
            out: BufWriter::with_capacity(COPY_BYTES, out),
            path: path.to_path_buf(),
            spool: BufWriter::with_capacity(COPY_BYTES, spool),
            spool_bytes: 0,
            next_block: 1,
            file_bytes: 0,
            file_bytes_max: limits.layer_file_bytes_max,
            buffer: vec![0; COPY_BYTES],
        };
        writer.seek_to_block(1)?;
        Ok(writer)
    }

    /// Takes exactly `size` bytes of a file from `data`. `xattrs` will be those of its node; `on_read` words an error
    /// of `data`.
    pub(crate) fn add_file(
        &mut self,
        size: u64,
        xattrs: &Xattrs,
        data: &mut dyn Read,
        on_read: &dyn Fn(io::Error) -> ImageError,
    ) -> Result<FileData, ImageError> {
        self.charge(size)?;
        if size == 0 {
            return Ok(FileData {
                size,
                place: DataPlace::Empty,
            });
        }
        if INODE_BYTES
            .saturating_add(xattr_bytes(xattrs))
            .saturating_add(size)
            <= BLOCK_BYTES
        {
            let offset = self.spool_bytes;
            let part = self.buffer.get_mut(..size as usize).unwrap_or_default();
            data.read_exact(part).map_err(on_read)?;
            self.spool
                .write_all(part)
                .map_err(|e| write_error(&self.path, e))?;
            self.spool_bytes = self.spool_bytes.saturating_add(size);
            return Ok(FileData {
                size,
                place: DataPlace::Spooled { offset },
            });
        }
        let first = self.allocate(size)?;
        self.copy(size, data, on_read)?;
        self.pad(size)?;
        Ok(FileData {
            size,
            place: DataPlace::Blocks { first },
        })
    }

    /// Takes a file with holes: `extents` ascend, do not overlap and end within `size`. Holes stay holes on the host.
    pub(crate) fn add_sparse(
        &mut self,
        size: u64,
        extents: &[Extent],
        data: &mut dyn Read,
        on_read: &dyn Fn(io::Error) -> ImageError,
    ) -> Result<FileData, ImageError> {
        self.charge(size)?;
        if size == 0 {
            return Ok(FileData {
                size,
                place: DataPlace::Empty,
            });
        }
        let first = self.allocate(size)?;
        let start = u64::from(first).saturating_mul(BLOCK_BYTES);
        for extent in extents {
            let at = start.saturating_add(extent.offset);
            self.out
                .seek(SeekFrom::Start(at))
                .map_err(|e| write_error(&self.path, e))?;
            self.copy(extent.bytes, data, on_read)?;
        }
        self.seek_to_block(self.next_block)?;
        Ok(FileData {
            size,
            place: DataPlace::Blocks { first },
        })
    }

    /// Writes the tree and the superblock. The file is complete, but neither synced nor renamed.
    pub(crate) fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<File, ImageError> {
        let spool = self
            .spool
            .into_inner()
            .map_err(|e| write_error(&self.path, e.into_error()))?;
        self.spool = BufWriter::with_capacity(0, spool);
        let links = Links::count(tree);
        let Plan {
            placed,
            meta_bytes,
            contents_order,
        } = self.place(tree, &links)?;
        let meta_block = self.next_block;
        let total = meta_block.saturating_add(meta_bytes.div_ceil(BLOCK_BYTES));
        let total = u32::try_from(total).map_err(|_| too_large())?;
        let nid = |id: NodeId| {
            placed
                .get(id.index())
                .copied()
                .flatten()
                .map_or(0, |p: Placed| p.offset / SLOT_BYTES)
        };

        for id in &contents_order {
            let Some(Some(place)) = placed.get(id.index()) else {
                continue;
            };
            let contents = contents(tree, &links, *id, &nid);
            let apart = place.size.saturating_sub(place.inline_bytes) as usize;
            self.write(contents.get(..apart).unwrap_or(&contents))?;
            self.pad(apart as u64)?;
        }

        self.seek_to_block(meta_block)?;
        let mut at: u64 = 0;
        let mut inodes: u64 = 0;
        for (index, place) in placed.iter().enumerate() {
            let Some(place) = place else { continue };
            let id = tree.id_at(index);
            let gap = vec![0; place.offset.saturating_sub(at) as usize];
            self.write(&gap)?;
            let record = self.record(tree, &links, id, place, &nid)?;
            self.write(&record)?;
            at = place.offset.saturating_add(record.len() as u64);
            inodes = inodes.saturating_add(1);
        }
        let mut file = self
            .out
            .into_inner()
            .map_err(|e| write_error(&self.path, e.into_error()))?;
        let super_block = SuperBlock {
            root_nid: u16::try_from(nid(NodeId::ROOT)).map_err(|_| too_large())?,
            inodes,
            blocks: total,
            meta_block: u32::try_from(meta_block).map_err(|_| too_large())?,
            uuid,
        };
        file.set_len(u64::from(total).saturating_mul(BLOCK_BYTES))
            .map_err(|e| write_error(&self.path, e))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|e| write_error(&self.path, e))?;
        file.write_all(&super_block.to_block())
            .map_err(|e| write_error(&self.path, e))?;
        Ok(file)
    }

    /// Gives each reachable node its place, and blocks to contents that need some; says how long the metadata area is
    /// and in which order those contents follow.
    fn place(&mut self, tree: &Tree, links: &Links) -> Result<Plan, ImageError> {
        let mut placed = vec![None; tree.node_count()];
        let mut contents_order = Vec::new();
        let mut end = FIRST_INODE_OFFSET;
        let mut number = 0;
        for (index, slot) in placed.iter_mut().enumerate() {
            let id = tree.id_at(index);
            if links.of(id) == 0 {
                continue;
            }
            let node = tree.node(id);
            let head = INODE_BYTES.saturating_add(xattr_bytes(&node.metadata.xattrs));
            let inline_max = BLOCK_BYTES.saturating_sub(head);
            let (size, union, inline_bytes) = match &node.content {
                Content::File(data) => match data.place {
                    DataPlace::Empty => (0, 0, 0),
                    DataPlace::Blocks { first } => (data.size, first, 0),
                    DataPlace::Spooled { .. } => (data.size, 0, data.size),
                },
                Content::Directory(_) => {
                    let size = directory_bytes(
                        directory_names(tree, id).into_iter().map(|(name, _)| name),
                    );
                    let tail = size % BLOCK_BYTES;
                    let inline = if tail <= inline_max { tail } else { 0 };
                    let apart = size.saturating_sub(inline);
                    let union = if apart == 0 { 0 } else { self.allocate(apart)? };
                    (size, union, inline)
                }
                Content::Symlink(target) => {
                    let size = target.len() as u64;
                    let inline = if size <= inline_max { size } else { 0 };
                    let union = if inline == size {
                        0
                    } else {
                        self.allocate(size)?
                    };
                    (size, union, inline)
                }
                Content::CharDevice { major, minor } | Content::BlockDevice { major, minor } => {
                    (0, spec::device_number(*major, *minor), 0)
                }
                Content::Fifo | Content::Socket => (0, 0, 0),
            };
            if !matches!(node.content, Content::File(_)) && size > inline_bytes {
                contents_order.push(id);
            }
            let record = head.saturating_add(inline_bytes);
            let room = BLOCK_BYTES.saturating_sub(end % BLOCK_BYTES);
            // Inline contents must not cross a block (erofs_map_blocks_flatmode), nor need anything else.
            let offset = if record > room {
                end.next_multiple_of(BLOCK_BYTES)
            } else {
                end
            };
            number += 1;
            *slot = Some(Placed {
                offset,
                size,
                union,
                inline_bytes,
                number,
            });
            end = offset.saturating_add(record).next_multiple_of(SLOT_BYTES);
        }
        Ok(Plan {
            placed,
            // One slot to spare: fsck.erofs 1.5 reads an attribute header behind every inode, even behind one without
            // attributes that ends with the image.
            meta_bytes: end.saturating_add(SLOT_BYTES),
            contents_order,
        })
    }

    /// The node's inode, attributes and inline contents.
    fn record(
        &self,
        tree: &Tree,
        links: &Links,
        id: NodeId,
        place: &Placed,
        nid: &dyn Fn(NodeId) -> u64,
    ) -> Result<Vec<u8>, ImageError> {
        let node = tree.node(id);
        let xattrs = xattr_body(&node.metadata.xattrs);
        let words = xattrs.len().saturating_sub(spec::XATTR_HEADER_BYTES) / 4;
        let xattr_count = if xattrs.is_empty() {
            0
        } else {
            words.saturating_add(1)
        };
        let inode = Inode {
            layout: if place.inline_bytes > 0 {
                spec::LAYOUT_FLAT_INLINE
            } else {
                spec::LAYOUT_FLAT_PLAIN
            },
            xattr_count: u16::try_from(xattr_count).map_err(|_| too_large())?,
            mode: node.metadata.mode | type_bits(&node.content),
            size: place.size,
            union: place.union,
            number: place.number,
            uid: node.metadata.uid,
            gid: node.metadata.gid,
            mtime: node.metadata.mtime,
            links: links.of(id),
        };
        let mut record = inode.to_bytes();
        record.extend(xattrs);
        match &node.content {
            Content::File(FileData {
                size,
                place: DataPlace::Spooled { offset },
            }) => {
                let mut data = vec![0; *size as usize];
                let spool = self.spool.get_ref();
                spool
                    .read_exact_at(&mut data, *offset)
                    .map_err(|e| write_error(&self.path, e))?;
                record.extend(data);
            }
            Content::Directory(_) | Content::Symlink(_) if place.inline_bytes > 0 => {
                let contents = contents(tree, links, id, nid);
                let apart = place.size.saturating_sub(place.inline_bytes) as usize;
                record.extend_from_slice(contents.get(apart..).unwrap_or_default());
            }
            Content::File(_)
            | Content::Directory(_)
            | Content::Symlink(_)
            | Content::CharDevice { .. }
            | Content::BlockDevice { .. }
            | Content::Fifo
            | Content::Socket => {}
        }
        Ok(record)
    }

    fn charge(&mut self, size: u64) -> Result<(), ImageError> {
        self.file_bytes = self.file_bytes.saturating_add(size);
        if self.file_bytes <= self.file_bytes_max {
            return Ok(());
        }
        Err(ImageError::Limit {
            what: "the size of its files".to_owned(),
            limit: "layer_file_bytes_max",
            max: self.file_bytes_max,
        })
    }

    fn allocate(&mut self, bytes: u64) -> Result<u32, ImageError> {
        let first = u32::try_from(self.next_block).map_err(|_| too_large())?;
        self.next_block = self.next_block.saturating_add(bytes.div_ceil(BLOCK_BYTES));
        Ok(first)
    }

    fn copy(
        &mut self,
        size: u64,
        data: &mut dyn Read,
        on_read: &dyn Fn(io::Error) -> ImageError,
    ) -> Result<(), ImageError> {
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(COPY_BYTES);
            let part = self.buffer.get_mut(..most).unwrap_or_default();
            data.read_exact(part).map_err(on_read)?;
            // Long runs of zeros become holes on the host: a hole copied up from a lower layer must not fill its disk.
            let written = if part.len() == COPY_BYTES && part.iter().all(|b| *b == 0) {
                self.out.seek_relative(COPY_BYTES as i64)
            } else {
                self.out.write_all(part)
            };
            written.map_err(|e| write_error(&self.path, e))?;
            left = left.saturating_sub(most as u64);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.out
            .write_all(bytes)
            .map_err(|e| write_error(&self.path, e))
    }

    /// Fills the block that `size` bytes ended in with zeros.
    fn pad(&mut self, size: u64) -> Result<(), ImageError> {
        let zeros = [0; BLOCK_BYTES as usize];
        let missing = size.next_multiple_of(BLOCK_BYTES).saturating_sub(size) as usize;
        self.write(zeros.get(..missing).unwrap_or_default())
    }

    fn seek_to_block(&mut self, block: u64) -> Result<(), ImageError> {
        let at = block.saturating_mul(BLOCK_BYTES);
        self.out
            .seek(SeekFrom::Start(at))
            .map_err(|e| write_error(&self.path, e))?;
        Ok(())
    }
}

fn write_error(path: &Path, source: io::Error) -> ImageError {
    ImageError::io("write", path)(source)
}

fn too_large() -> ImageError {
    // 32-bit block numbers of 4 KiB blocks.
    let max = (u64::from(u32::MAX)).saturating_mul(BLOCK_BYTES);
    ImageError::Limit {
        what: "the file system made of it".to_owned(),
        limit: "erofs_bytes_max",
        max,
    }
}

/// How many names each node has, and each directory's parent; unreachable nodes have none.
struct Links {
    counts: Vec<u32>,
    parents: Vec<NodeId>,
}

impl Links {
    fn count(tree: &Tree) -> Links {
        let mut links = Links {
            counts: vec![0; tree.node_count()],
            parents: vec![NodeId::ROOT; tree.node_count()],
        };
        let mut todo = vec![NodeId::ROOT];
        links.add(NodeId::ROOT, 2);
        while let Some(directory) = todo.pop() {
            for (_, child) in tree.children(directory) {
                if matches!(tree.node(child).content, Content::Directory(_)) {
                    // Its name and its `.`; its `..` counts for the parent.
                    links.add(child, 2);
                    links.add(directory, 1);
                    if let Some(parent) = links.parents.get_mut(child.index()) {
                        *parent = directory;
                    }
                    todo.push(child);
                } else {
                    links.add(child, 1);
                }
            }
        }
        links
    }

    fn add(&mut self, id: NodeId, count: u32) {
        if let Some(links) = self.counts.get_mut(id.index()) {
            *links = links.saturating_add(count);
        }
    }

    fn of(&self, id: NodeId) -> u32 {
        self.counts.get(id.index()).copied().unwrap_or(0)
    }

    fn parent(&self, id: NodeId) -> NodeId {
        self.parents
            .get(id.index())
            .copied()
            .unwrap_or(NodeId::ROOT)
    }
}

/// The directory's names in order, `.` and `..` among them; no node stands for the latter.
fn directory_names(tree: &Tree, id: NodeId) -> Vec<(&[u8], Option<NodeId>)> {
    let mut names: Vec<(&[u8], Option<NodeId>)> = tree
        .children(id)
        .map(|(name, id)| (name, Some(id)))
        .collect();
    for dots in [&b"."[..], b".."] {
        let at = names.partition_point(|(name, _)| *name < dots);
        names.insert(at, (dots, None));
    }
    names
}

/// A directory's or symbolic link's contents, nothing for others.
fn contents(tree: &Tree, links: &Links, id: NodeId, nid: &dyn Fn(NodeId) -> u64) -> Vec<u8> {
    match &tree.node(id).content {
        Content::Symlink(target) => target.clone(),
        Content::Directory(_) => {
            let names = directory_names(tree, id);
            let entries: Vec<DirEntry<'_>> = names
                .into_iter()
                .map(|(name, child)| {
                    let node = match child {
                        Some(child) => child,
                        None if name == b"." => id,
                        None => links.parent(id),
                    };
                    DirEntry {
                        name,
                        nid: nid(node),
                        file_type: file_type(&tree.node(node).content),
                    }
                })
                .collect();
            directory_data(&entries)
        }
        Content::File(_)
        | Content::CharDevice { .. }
        | Content::BlockDevice { .. }
        | Content::Fifo
        | Content::Socket => Vec::new(),
    }
}

fn type_bits(content: &Content) -> u16 {
    match content {
        Content::Directory(Directory { .. }) => spec::TYPE_DIRECTORY,
        Content::File(_) => spec::TYPE_FILE,
        Content::Symlink(_) => spec::TYPE_SYMLINK,
        Content::CharDevice { .. } => spec::TYPE_CHAR,
        Content::BlockDevice { .. } => spec::TYPE_BLOCK,
        Content::Fifo => spec::TYPE_FIFO,
        Content::Socket => spec::TYPE_SOCKET,
    }
}

/// `FT_*` of Linux `include/linux/fs_types.h`.
fn file_type(content: &Content) -> u8 {
    match content {
        Content::File(_) => 1,
        Content::Directory(_) => 2,
        Content::CharDevice { .. } => 3,
        Content::BlockDevice { .. } => 4,
        Content::Fifo => 5,
        Content::Socket => 6,
        Content::Symlink(_) => 7,
    }
}

/// Bytes the attributes take after the inode.
fn xattr_bytes(xattrs: &Xattrs) -> u64 {
    if xattrs.is_empty() {
        0
    } else {
        xattr_body(xattrs).len() as u64
    }
}

/// The attributes as they follow the inode; nothing when there are none EROFS can hold.
fn xattr_body(xattrs: &Xattrs) -> Vec<u8> {
    let mut out = vec![0; spec::XATTR_HEADER_BYTES];
    for (name, value) in xattrs {
        let Some((index, rest)) = spec::xattr_index(name) else {
            continue;
        };
        let (Ok(name_bytes), Ok(value_bytes)) =
            (u8::try_from(rest.len()), u16::try_from(value.len()))
        else {
            continue;
        };
        out.extend([name_bytes, index]);
        out.extend(value_bytes.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    if out.len() == spec::XATTR_HEADER_BYTES {
        Vec::new()
    } else {
        out
    }
}
