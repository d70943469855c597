//! Where guest memory lies in the guest-physical address space.
//!
//! The gap from 3 GiB to 4 GiB is left to devices and interrupt controllers,
//! as Firecracker leaves it on x86-64. Behind the memory that a machine starts with lie
//! further regions, in the order in which they were asked for.

use crate::{Error, Gpa};

/// Bytes per page, of the guest and of the host.
pub const PAGE_SIZE: u64 = 4096;
/// End of the low region at most: 3 GiB.
pub const LOW_END: u64 = 3 << 30;
/// Start of the high region: 4 GiB.
pub const HIGH_START: u64 = 4 << 30;
/// Alignment and smallest unit of a mapped file: a large page.
pub const FILE_ALIGNMENT: u64 = 2 << 20;
/// Alignment of pluggable memory: Linux adds memory in pieces of this size.
const PLUGGABLE_ALIGNMENT: u64 = 128 << 20;
/// Smallest block of pluggable memory.
const BLOCK_MIN: u64 = 2 << 20;
/// 1 TiB: far below what a 47-bit host address space can reserve.
const SIZE_MAX: u64 = 1 << 40;

/// An amount of memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// So many MiB; saturates.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory that the machine starts with.
    Memory,
    /// Memory of which only blocks that were plugged may be reached: in the memfd too.
    Pluggable {
        /// Bytes of a block: a power of two.
        block: u64,
    },
    /// A file of the host, zeros behind its end.
    File {
        /// The guest cannot write to it.
        read_only: bool,
    },
}

/// One contiguous piece of guest memory. Never empty, always whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in its file, in bytes: the memfd, unless it is a file of the host.
    pub file_offset: u64,
    /// What it is made of.
    pub kind: Kind,
}

/// A region to put behind the memory that a machine starts with.
#[derive(Debug)]
pub enum Further {
    /// A file of the host, mapped so that stores reach it. Its length rounded up to
    /// [`FILE_ALIGNMENT`] is the region's.
    File {
        /// A regular file, open for reading, and for writing unless `read_only`.
        file: std::fs::File,
        /// The guest cannot write to it.
        read_only: bool,
    },
    /// Memory of which nothing is plugged yet.
    Pluggable {
        /// Bytes: a multiple of `block`.
        len: u64,
        /// Bytes that are plugged at once: a power of two, at least 2 MiB.
        block: u64,
    },
}

impl Region {
    /// First address after the region.
    pub fn end(&self) -> Gpa {
        // Layout::new checked the sum.
        Gpa(self.start.0 + self.len)
    }
}

/// Every region, ascending: one or two for the size, then the further ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    regions: Vec<Region>,
    /// Bytes that the machine starts with.
    bytes: u64,
    /// Bytes of the memfd.
    pub(crate) memfd_bytes: u64,
}

impl Layout {
    pub(crate) fn new(size: ByteSize) -> Result<Self, Error> {
        let bytes = size.bytes();
        if bytes == 0 || bytes > SIZE_MAX || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size {
                bytes,
                most: SIZE_MAX,
            });
        }
        let region = |start, len, file_offset| Region {
            start: Gpa(start),
            len,
            file_offset,
            kind: Kind::Memory,
        };
        let mut regions = vec![region(0, bytes.min(LOW_END), 0)];
        if bytes > LOW_END {
            regions.push(region(HIGH_START, bytes - LOW_END, LOW_END));
        }
        Ok(Self {
            regions,
            bytes,
            memfd_bytes: bytes,
        })
    }

    /// Adds a region for a file of `len` bytes.
    pub(crate) fn add_file(&mut self, len: u64, read_only: bool) -> Result<Region, Error> {
        let kind = Kind::File { read_only };
        // More than what may be is refused below.
        let len = len.min(2 * SIZE_MAX).next_multiple_of(FILE_ALIGNMENT);
        self.add(len, FILE_ALIGNMENT, kind)
    }

    /// Adds a region that is pluggable.
    pub(crate) fn add_pluggable(&mut self, len: u64, block: u64) -> Result<Region, Error> {
        if !block.is_power_of_two() || block < BLOCK_MIN || !len.is_multiple_of(block) {
            return Err(Error::Blocks { len, block });
        }
        let alignment = block.max(PLUGGABLE_ALIGNMENT);
        let region = self.add(len, alignment, Kind::Pluggable { block })?;
        self.memfd_bytes += len;
        Ok(region)
    }

    fn add(&mut self, len: u64, alignment: u64, kind: Kind) -> Result<Region, Error> {
        let start = self.end().0.max(HIGH_START).next_multiple_of(alignment);
        if len == 0 || len > SIZE_MAX || start + len > 4 * SIZE_MAX {
            return Err(Error::Size {
                bytes: len,
                most: SIZE_MAX,
            });
        }
        let region = Region {
            start: Gpa(start),
            len,
            file_offset: match kind {
                Kind::Memory | Kind::Pluggable { .. } => self.memfd_bytes,
                Kind::File { .. } => 0,
            },
            kind,
        };
        self.regions.push(region);
        Ok(region)
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        self.regions.iter().copied()
    }

    /// First address after the last region.
    pub(crate) fn end(&self) -> Gpa {
        self.regions.last().map_or(Gpa(0), Region::end)
    }

    /// Bytes of memory that the machine starts with.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_3_gib_continues_at_4_gib() {
        let layout = Layout::new(ByteSize::mib(5 * 1024)).unwrap();
        let regions: Vec<_> = layout
            .regions()
            .map(|r| (r.start.0, r.len, r.file_offset))
            .collect();
        assert_eq!(regions, [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]);
        assert_eq!(layout.end(), Gpa(6 << 30));
        let small = Layout::new(ByteSize::mib(3 * 1024)).unwrap();
        assert_eq!(small.regions().count(), 1);
    }

    #[test]
    fn sizes_that_are_no_whole_pages_are_refused() {
        for bytes in [0, 1, 4095, 4097, SIZE_MAX + 4096, u64::MAX] {
            assert!(
                matches!(Layout::new(ByteSize(bytes)), Err(Error::Size { .. })),
                "{bytes}"
            );
        }
    }

    #[test]
    fn further_regions_are_aligned_and_lie_above_4_gib_and_above_all_memory() {
        const GIB: u64 = 1 << 30;
        for (mib, first) in [(128, 4 * GIB), (5 * 1024, 6 * GIB)] {
            let mut layout = Layout::new(ByteSize::mib(mib)).unwrap();
            let file = layout.add_file(1, true).unwrap();
            assert_eq!(
                (file.start.0, file.len, file.file_offset),
                (first, 2 << 20, 0)
            );
            let plug = layout.add_pluggable(256 << 20, 4 << 20).unwrap();
            assert_eq!(plug.start.0, first + (128 << 20));
            assert_eq!(plug.file_offset, mib << 20);
            let second = layout.add_file(2 << 20, false).unwrap();
            assert_eq!((second.start, second.len), (plug.end(), 2 << 20));
            assert_eq!(layout.end(), second.end());
            assert_eq!(layout.bytes(), mib << 20);
            assert_eq!(layout.memfd_bytes, (mib + 256) << 20);
        }
    }

    #[test]
    fn further_regions_that_cannot_be_are_refused() {
        let mut layout = Layout::new(ByteSize::mib(128)).unwrap();
        let before = layout.clone();
        for len in [0, SIZE_MAX + 1, u64::MAX] {
            assert!(layout.add_file(len, false).is_err(), "{len}");
        }
        for (len, block) in [
            (0, 2 << 20),
            (1 << 30, 3 << 20),
            (1 << 30, 1 << 20),
            (1 << 30, 0),
            (3 << 20, 2 << 20),
            (!0 << 21, 2 << 20),
        ] {
            assert!(layout.add_pluggable(len, block).is_err(), "{len} {block}");
        }
        assert_eq!(layout, before);
    }
}
