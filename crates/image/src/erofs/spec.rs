//! The numbers of `fs/erofs/erofs_fs.h` (Linux 6.12) and the two structures written here.
//!
//! Invariant: little-endian, sizes as on disk. Left to others: where anything lies.

/// Bytes of a block; the only size used here, that of a page on x86-64.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// `EROFS_SUPER_OFFSET`.
pub(crate) const SUPER_OFFSET: usize = 1024;
/// `EROFS_SUPER_MAGIC_V1`.
pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME`.
pub(crate) const FEATURE_COMPAT: u32 = 0x1 | 0x2;
/// Bytes an inode number counts in (`EROFS_ISLOTBITS` is 5).
pub(crate) const SLOT_BYTES: u64 = 32;
/// Bytes of an extended inode.
pub(crate) const INODE_BYTES: u64 = 64;
/// Bytes of `struct erofs_dirent`.
pub(crate) const DIRENT_BYTES: usize = 12;
/// Bytes of `struct erofs_xattr_ibody_header`.
pub(crate) const XATTR_HEADER_BYTES: usize = 12;

pub(crate) const LAYOUT_FLAT_PLAIN: u16 = 0;
pub(crate) const LAYOUT_FLAT_INLINE: u16 = 2;

/// `S_IFMT` and its values (POSIX `sys/stat.h`, Linux numbers).
pub(crate) const TYPE_MASK: u16 = 0o170000;
pub(crate) const TYPE_FIFO: u16 = 0o010000;
pub(crate) const TYPE_CHAR: u16 = 0o020000;
pub(crate) const TYPE_DIRECTORY: u16 = 0o040000;
pub(crate) const TYPE_BLOCK: u16 = 0o060000;
pub(crate) const TYPE_FILE: u16 = 0o100000;
pub(crate) const TYPE_SYMLINK: u16 = 0o120000;
pub(crate) const TYPE_SOCKET: u16 = 0o140000;

/// Names whose prefix has a number on disk (`EROFS_XATTR_INDEX_*`); the access control lists are whole names.
pub(crate) const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Splits a full attribute name into its number and the rest; none when EROFS has no way to say it.
pub(crate) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    let (prefix, index) = XATTR_PREFIXES
        .iter()
        .find(|(prefix, _)| name.starts_with(prefix))?;
    let rest = name.get(prefix.len()..)?;
    // A prefix ending in a dot needs something after it, a whole name must have nothing.
    let whole_name = !prefix.ends_with(b".");
    (whole_name == rest.is_empty() && rest.len() <= 255).then_some((*index, rest))
}

/// An inode as far as this crate writes it (`struct erofs_inode_extended`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) layout: u16,
    pub(crate) xattr_count: u16,
    /// With type bits.
    pub(crate) mode: u16,
    pub(crate) size: u64,
    /// First block of data, or device number.
    pub(crate) union: u32,
    pub(crate) number: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u32,
}

impl Inode {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        const EXTENDED: u16 = 1;
        let mut out = Vec::with_capacity(64);
        out.extend((EXTENDED | (self.layout << 1)).to_le_bytes());
        out.extend(self.xattr_count.to_le_bytes());
        out.extend(self.mode.to_le_bytes());
        out.extend([0; 2]);
        out.extend(self.size.to_le_bytes());
        out.extend(self.union.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.uid.to_le_bytes());
        out.extend(self.gid.to_le_bytes());
        out.extend(self.mtime.0.to_le_bytes());
        out.extend(self.mtime.1.to_le_bytes());
        out.extend(self.links.to_le_bytes());
        out.extend([0; 16]);
        out
    }

    /// None for anything but an extended, flat inode.
    pub(crate) fn from_bytes(bytes: &[u8; 64]) -> Option<Inode> {
        let format = u16_at(bytes, 0)?;
        let layout = format >> 1;
        if format & 1 == 0 || (layout != LAYOUT_FLAT_PLAIN && layout != LAYOUT_FLAT_INLINE) {
            return None;
        }
        Some(Inode {
            layout,
            xattr_count: u16_at(bytes, 2)?,
            mode: u16_at(bytes, 4)?,
            size: u64_at(bytes, 8)?,
            union: u32_at(bytes, 16)?,
            number: u32_at(bytes, 20)?,
            uid: u32_at(bytes, 24)?,
            gid: u32_at(bytes, 28)?,
            mtime: (
                i64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?),
                u32_at(bytes, 40)?,
            ),
            links: u32_at(bytes, 44)?,
        })
    }

    /// Bytes of the attributes that follow the inode (`erofs_xattr_ibody_size`).
    pub(crate) fn xattr_bytes(&self) -> u64 {
        match self.xattr_count.checked_sub(1) {
            Some(words) => (XATTR_HEADER_BYTES as u64).saturating_add(4 * u64::from(words)),
            None => 0,
        }
    }
}

/// What the superblock says (`struct erofs_super_block`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SuperBlock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    pub(crate) meta_block: u32,
    pub(crate) uuid: [u8; 16],
}

impl SuperBlock {
    /// The whole first block, checksum included.
    pub(crate) fn to_block(self) -> Vec<u8> {
        let mut sb = Vec::with_capacity(128);
        sb.extend(MAGIC.to_le_bytes());
        sb.extend([0; 4]); // checksum
        sb.extend(FEATURE_COMPAT.to_le_bytes());
        sb.push(12); // blkszbits
        sb.push(0); // sb_extslots
        sb.extend(self.root_nid.to_le_bytes());
        sb.extend(self.inodes.to_le_bytes());
        sb.extend([0; 8 + 4]); // build_time, used by compact inodes only
        sb.extend(self.blocks.to_le_bytes());
        sb.extend(self.meta_block.to_le_bytes());
        sb.extend([0; 4]); // xattr_blkaddr: no shared attributes
        sb.extend(self.uuid);
        // volume_name, feature_incompat and all that belongs to features not used.
        sb.resize(BLOCK_BYTES as usize - SUPER_OFFSET, 0);
        let checksum = crc32c(&sb).to_le_bytes();
        sb.splice(4..8, checksum);
        let mut block = vec![0; SUPER_OFFSET];
        block.extend(sb);
        block
    }

    /// Reads back what [`SuperBlock::to_block`] made; none when it is anything else.
    pub(crate) fn from_block(block: &[u8]) -> Option<SuperBlock> {
        let sb = block.get(SUPER_OFFSET..BLOCK_BYTES as usize)?;
        let mut unsummed = sb.to_vec();
        unsummed.splice(4..8, [0; 4]);
        let good = u32_at(sb, 0)? == MAGIC
            && u32_at(sb, 4)? == crc32c(&unsummed)
            && u32_at(sb, 8)? == FEATURE_COMPAT
            && *sb.get(12)? == 12
            && u32_at(sb, 80)? == 0;
        good.then_some(SuperBlock {
            root_nid: u16_at(sb, 14)?,
            inodes: u64_at(sb, 16)?,
            blocks: u32_at(sb, 36)?,
            meta_block: u32_at(sb, 40)?,
            uuid: sb.get(48..64)?.try_into().ok()?,
        })
    }
}

/// `new_encode_dev` of `include/linux/kdev_t.h`.
pub(crate) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The inverse of [`device_number`].
pub(crate) fn device_parts(number: u32) -> (u32, u32) {
    (
        (number & 0xf_ff00) >> 8,
        (number & 0xff) | ((number >> 12) & 0xf_ff00),
    )
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

/// The kernel's `crc32c(~0, data)`: Castagnoli, reflected, without the closing inversion.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnolis() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_come_back() {
        for (major, minor) in [(0, 0), (1, 3), (0xfff, 0xf_ffff), (8, 256), (259, 70000)] {
            assert_eq!(device_parts(device_number(major, minor)), (major, minor));
        }
    }

    #[test]
    fn super_block_comes_back_and_damage_is_seen() {
        let sb = SuperBlock {
            root_nid: 2,
            inodes: 7,
            blocks: 9,
            meta_block: 1,
            uuid: [3; 16],
        };
        let mut block = sb.to_block();
        assert_eq!(SuperBlock::from_block(&block), Some(sb));
        block[1100] ^= 1;
        assert_eq!(SuperBlock::from_block(&block), None);
    }
}
