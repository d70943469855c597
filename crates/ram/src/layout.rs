//! Where guest memory lies in the guest-physical address space.
//!
//! The gap from 3 GiB to 4 GiB is left to devices and interrupt controllers,
//! as Firecracker leaves it on x86-64.

use crate::{Error, Gpa};

/// Bytes per page, of the guest and of the host.
pub const PAGE_SIZE: u64 = 4096;
/// End of the low region at most: 3 GiB.
pub const LOW_END: u64 = 3 << 30;
/// Start of the high region: 4 GiB.
pub const HIGH_START: u64 = 4 << 30;
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

/// One contiguous piece of guest memory. Never empty, always whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where it starts in the memfd, in bytes.
    pub file_offset: u64,
}

impl Region {
    /// First address after the region.
    pub fn end(&self) -> Gpa {
        // Layout::new checked the sum.
        Gpa(self.start.0 + self.len)
    }
}

/// One or two regions for a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) low: Region,
    pub(crate) high: Option<Region>,
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
        let low = Region {
            start: Gpa(0),
            len: bytes.min(LOW_END),
            file_offset: 0,
        };
        let high = (bytes > LOW_END).then(|| Region {
            start: Gpa(HIGH_START),
            len: bytes - LOW_END,
            file_offset: LOW_END,
        });
        Ok(Self { low, high })
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        std::iter::once(self.low).chain(self.high)
    }

    /// First address after the last region.
    pub(crate) fn end(&self) -> Gpa {
        self.high.unwrap_or(self.low).end()
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.low.len + self.high.map_or(0, |high| high.len)
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
        assert_eq!(Layout::new(ByteSize::mib(3 * 1024)).unwrap().high, None);
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
}
