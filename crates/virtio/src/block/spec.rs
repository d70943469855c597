//! Numbers and layouts of virtio 1.2 §5.2.

/// Bytes per sector, whatever the disk's block size.
pub(super) const SECTOR: u64 = 512;

/// VIRTIO_BLK_F_SIZE_MAX.
pub(super) const F_SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX: the configuration says how many segments a request has.
pub(super) const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO: the disk is read-only.
pub(super) const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE: the configuration names the block size.
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH: there is a cache to flush.
pub(super) const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_DISCARD.
pub(super) const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of a disk's identifier.
pub(super) const ID_LEN: usize = 20;
/// Bytes of a request's header.
pub(super) const HEADER_LEN: usize = 16;
/// Bytes of one range to discard or to zero.
pub(super) const RANGE_LEN: usize = 16;
/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
pub(super) const RANGE_UNMAP: u32 = 1;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Anything that we do not know.
    Other,
}

/// The first bytes of each request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) operation: Operation,
    pub(super) sector: u64,
}

impl Header {
    /// Of a request to flush.
    pub(super) const FLUSH: [u8; HEADER_LEN] = (4_u128).to_le_bytes();

    pub(super) fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        let operation = match bits as u32 {
            0 => Operation::Read,
            1 => Operation::Write,
            4 => Operation::Flush,
            8 => Operation::GetId,
            11 => Operation::Discard,
            13 => Operation::WriteZeroes,
            _ => Operation::Other,
        };
        Self {
            operation,
            sector: (bits >> 64) as u64,
        }
    }
}

/// One range to discard or to zero, in sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) flags: u32,
}

impl Range {
    pub(super) fn parse(bytes: [u8; RANGE_LEN]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        Self {
            sector: bits as u64,
            sectors: (bits >> 64) as u32,
            flags: (bits >> 96) as u32,
        }
    }
}

/// The last byte of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) sectors: u64,
    pub(super) segments_max: u32,
    pub(super) block_size: u32,
    pub(super) range_sectors_max: u32,
    pub(super) ranges_max: u32,
}

impl Config {
    pub(super) const LEN: usize = 60;

    /// §5.2.4, struct virtio_blk_config.
    pub(super) fn bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = bytes.get_mut(at..at + value.len()) {
                field.copy_from_slice(value);
            }
        };
        put(0, &self.sectors.to_le_bytes());
        put(12, &self.segments_max.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(36, &self.range_sectors_max.to_le_bytes()); // max_discard_sectors
        put(40, &self.ranges_max.to_le_bytes()); // max_discard_seg
        put(44, &1u32.to_le_bytes()); // discard_sector_alignment
        put(48, &self.range_sectors_max.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &self.ranges_max.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        bytes
    }
}
