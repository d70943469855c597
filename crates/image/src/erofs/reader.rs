//! Reads images the writer made, for what an upper layer takes from a lower one.
//!
//! Invariant: a damaged image earns an error, never a panic. Left to others: images of other makers (compact inodes,
//! compression, shared attributes), which are refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::spec::{self, BLOCK_BYTES, DIRENT_BYTES, INODE_BYTES, Inode, SLOT_BYTES, SuperBlock};
use crate::error::ImageError;
use crate::tree::{Content, Metadata, Xattrs};

/// An image on disk.
#[derive(Debug)]
pub(crate) struct Reader {
    file: File,
    path: PathBuf,
    super_block: SuperBlock,
}

/// One inode and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoundInode {
    pub(crate) inode: Inode,
    offset: u64,
}

impl FoundInode {
    pub(crate) fn is_directory(&self) -> bool {
        self.inode.mode & spec::TYPE_MASK == spec::TYPE_DIRECTORY
    }

    /// Overlayfs's character device 0/0.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.inode.mode & spec::TYPE_MASK == spec::TYPE_CHAR && self.inode.union == 0
    }
}

impl Reader {
    pub(crate) fn open(path: &Path) -> Result<Reader, ImageError> {
        let file = File::open(path).map_err(ImageError::io("open", path))?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        file.read_exact_at(&mut block, 0)
            .map_err(ImageError::io("read", path))?;
        let super_block = SuperBlock::from_block(&block).ok_or_else(|| ImageError::Malformed {
            what: format!("cached layer {path:?}"),
            reason: "its superblock is damaged: remove the file".to_owned(),
        })?;
        Ok(Reader {
            file,
            path: path.to_path_buf(),
            super_block,
        })
    }

    pub(crate) fn root(&self) -> Result<FoundInode, ImageError> {
        self.inode(u64::from(self.super_block.root_nid))
    }

    /// The inode of that name in a directory, searched for by halves as the kernel does: a hostile layer may ask often,
    /// in directories of a million names.
    pub(crate) fn lookup(
        &self,
        directory: &FoundInode,
        name: &[u8],
    ) -> Result<Option<FoundInode>, ImageError> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        let mut low = 0;
        let mut high = directory.inode.size.div_ceil(BLOCK_BYTES);
        while low < high {
            let middle = low.midpoint(high);
            let at = middle.saturating_mul(BLOCK_BYTES);
            let length = directory.inode.size.saturating_sub(at).min(BLOCK_BYTES) as usize;
            let block = block.get_mut(..length).unwrap_or_default();
            self.read_at(directory, block, at)
                .map_err(ImageError::io("read", &self.path))?;
            match find_in_block(block, name).ok_or_else(|| self.damaged())? {
                Search::Found(nid) => return self.inode(nid).map(Some),
                Search::Before => high = middle,
                Search::NotBefore => low = middle.saturating_add(1),
            }
        }
        Ok(None)
    }

    pub(crate) fn metadata(&self, found: &FoundInode) -> Result<Metadata, ImageError> {
        let inode = &found.inode;
        Ok(Metadata {
            mode: inode.mode & !spec::TYPE_MASK,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            xattrs: self.xattrs(found)?,
        })
    }

    /// A file's or link's contents from the start.
    pub(crate) fn contents<'a>(&'a self, found: &FoundInode) -> Contents<'a> {
        Contents {
            reader: self,
            found: *found,
            at: 0,
        }
    }

    /// What the node is; none for directories and files, whose contents are asked for apart.
    pub(crate) fn special(&self, found: &FoundInode) -> Result<Option<Content>, ImageError> {
        let (major, minor) = spec::device_parts(found.inode.union);
        Ok(match found.inode.mode & spec::TYPE_MASK {
            spec::TYPE_SYMLINK => {
                let mut target = Vec::new();
                self.contents(found)
                    .take(u64::from(u16::MAX))
                    .read_to_end(&mut target)
                    .map_err(ImageError::io("read", &self.path))?;
                Some(Content::Symlink(target))
            }
            spec::TYPE_CHAR => Some(Content::CharDevice { major, minor }),
            spec::TYPE_BLOCK => Some(Content::BlockDevice { major, minor }),
            spec::TYPE_FIFO => Some(Content::Fifo),
            spec::TYPE_SOCKET => Some(Content::Socket),
            spec::TYPE_FILE | spec::TYPE_DIRECTORY => None,
            _ => return Err(self.damaged()),
        })
    }

    fn xattrs(&self, found: &FoundInode) -> Result<Xattrs, ImageError> {
        let mut body = vec![0; found.inode.xattr_bytes() as usize];
        let start = found.offset.saturating_add(INODE_BYTES);
        self.file
            .read_exact_at(&mut body, start)
            .map_err(ImageError::io("read", &self.path))?;
        let mut rest = body.get(spec::XATTR_HEADER_BYTES..).unwrap_or_default();
        let mut xattrs = Vec::new();
        while let Some((entry, after)) = take_xattr(rest) {
            xattrs.push(entry.ok_or_else(|| self.damaged())?);
            rest = after;
        }
        Ok(xattrs)
    }

    fn inode(&self, nid: u64) -> Result<FoundInode, ImageError> {
        let meta = u64::from(self.super_block.meta_block).saturating_mul(BLOCK_BYTES);
        let offset = nid
            .checked_mul(SLOT_BYTES)
            .and_then(|at| at.checked_add(meta))
            .ok_or_else(|| self.damaged())?;
        let mut bytes = [0; INODE_BYTES as usize];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(ImageError::io("read", &self.path))?;
        let inode = Inode::from_bytes(&bytes).ok_or_else(|| self.damaged())?;
        Ok(FoundInode { inode, offset })
    }

    /// Fills `buffer` from `at` on, which must lie within the contents.
    fn read_at(&self, found: &FoundInode, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let tail_start = match found.inode.layout {
            spec::LAYOUT_FLAT_INLINE => {
                found.inode.size.saturating_sub(1) / BLOCK_BYTES * BLOCK_BYTES
            }
            _ => u64::MAX,
        };
        let apart = usize::try_from(tail_start.saturating_sub(at))
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (head, tail) = buffer.split_at_mut(apart);
        let first = u64::from(found.inode.union).saturating_mul(BLOCK_BYTES);
        self.file.read_exact_at(head, first.saturating_add(at))?;
        let inline = found
            .offset
            .saturating_add(INODE_BYTES)
            .saturating_add(found.inode.xattr_bytes());
        let skipped = at.saturating_add(apart as u64).saturating_sub(tail_start);
        self.file
            .read_exact_at(tail, inline.saturating_add(skipped))
    }

    fn damaged(&self) -> ImageError {
        ImageError::Malformed {
            what: format!("cached layer {:?}", self.path),
            reason: "it is damaged: remove the file".to_owned(),
        }
    }
}

/// Reads contents in order.
pub(crate) struct Contents<'a> {
    reader: &'a Reader,
    found: FoundInode,
    at: u64,
}

impl Read for Contents<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.found.inode.size.saturating_sub(self.at);
        let count = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let part = buffer.get_mut(..count).unwrap_or_default();
        self.reader.read_at(&self.found, part, self.at)?;
        self.at = self.at.saturating_add(count as u64);
        Ok(count)
    }
}

/// What a block of a directory tells about a name.
enum Search {
    Found(u64),
    /// The name would stand in an earlier block.
    Before,
    /// It is not here; it may be in a later block.
    NotBefore,
}

/// Looks for `name`; none means damage.
fn find_in_block(block: &[u8], name: &[u8]) -> Option<Search> {
    let count = usize::from(spec::u16_at(block, 8)?) / DIRENT_BYTES;
    for index in 0..count {
        let at = index * DIRENT_BYTES;
        let start = usize::from(spec::u16_at(block, at + 8)?);
        let found = if index + 1 < count {
            block.get(start..usize::from(spec::u16_at(block, at + DIRENT_BYTES + 8)?))?
        } else {
            let rest = block.get(start..)?;
            rest.split(|b| *b == 0).next()?
        };
        if found == name {
            return Some(Search::Found(spec::u64_at(block, at)?));
        }
        if index == 0 && name < found {
            return Some(Search::Before);
        }
    }
    Some(Search::NotBefore)
}

/// The next attribute (its inner none means damage) and what follows it; none at the end.
#[expect(
    clippy::type_complexity,
    reason = "one private caller takes it apart at once"
)]
fn take_xattr(bytes: &[u8]) -> Option<(Option<(Vec<u8>, Vec<u8>)>, &[u8])> {
    let [name_bytes, index, low, high, rest @ ..] = bytes else {
        return None;
    };
    let name_end = usize::from(*name_bytes);
    let value_end = name_end + usize::from(u16::from_le_bytes([*low, *high]));
    let entry = || {
        let (prefix, _) = spec::XATTR_PREFIXES
            .iter()
            .find(|(_, known)| known == index)?;
        let name = [prefix, rest.get(..name_end)?].concat();
        Some((name, rest.get(name_end..value_end)?.to_vec()))
    };
    let next = rest
        .get(value_end.next_multiple_of(4)..)
        .unwrap_or_default();
    Some((entry(), next))
}
