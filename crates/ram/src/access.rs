//! Which guest memory may be reached now: blocks that were not plugged may not, files
//! that were mapped to be read may not be written.
//!
//! ```text
//! plug:    block's bit set ─▶ listeners: granted
//! unplug:  block's bit cleared ─▶ listeners: withdrawn (nobody reaches it any more)
//!                               ─▶ pages given back to the host
//! ```
//!
//! Invariant: an address that may not be reached is mapped all the same, so that a late
//! access of this process reaches zeros that count as the guest's, never a fault.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Gpa;

/// Told when guest memory comes or goes. Engines are: they hold translations of
/// addresses.
pub trait AccessListener: Send + Sync {
    /// `len` bytes from `at` may be reached from now on.
    fn granted(&self, at: Gpa, len: u64);
    /// `len` bytes from `at` may not be reached any more: once this returned, no vCPU
    /// does.
    fn withdrawn(&self, at: Gpa, len: u64);
}

/// Of one region.
#[derive(Debug)]
pub(crate) enum Access {
    /// Everything.
    All,
    /// Loads.
    ReadOnly,
    /// What is plugged.
    Blocks(Blocks),
}

impl Access {
    /// Whether `len` bytes from `at`, inside of the region, may be reached.
    pub(crate) fn allows(&self, at: Gpa, len: u64, write: bool) -> bool {
        match self {
            Access::All => true,
            Access::ReadOnly => !write,
            Access::Blocks(blocks) => blocks.all(at, len, true),
        }
    }
}

/// A bit for each block of a region: is it plugged?
#[derive(Debug)]
pub(crate) struct Blocks {
    start: Gpa,
    len: u64,
    /// A power of two.
    block: u64,
    plugged: Box<[AtomicU64]>,
}

impl Blocks {
    /// None of `len` bytes from `start` is plugged.
    pub(crate) fn new(start: Gpa, len: u64, block: u64) -> Self {
        let words = usize::try_from((len / block).div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            start,
            len,
            block,
            plugged: crate::zeroed_u64(words),
        }
    }

    /// Numbers of the blocks that `len` bytes from `at` touch; `None` outside.
    fn touched(&self, at: Gpa, len: u64) -> Option<std::ops::RangeInclusive<u64>> {
        let from = at.0.checked_sub(self.start.0)?;
        let last = from.checked_add(len.max(1) - 1)?;
        (last < self.len).then_some(from / self.block..=last / self.block)
    }

    /// The same, if they are whole blocks, at least one.
    pub(crate) fn whole(&self, at: Gpa, len: u64) -> bool {
        let aligned = |n: u64| n.is_multiple_of(self.block);
        len > 0 && aligned(len) && aligned(at.0 - self.start.0) && self.touched(at, len).is_some()
    }

    /// Whether all blocks that are touched are plugged, or all of them not.
    pub(crate) fn all(&self, at: Gpa, len: u64, plugged: bool) -> bool {
        self.touched(at, len).is_some_and(|mut blocks| {
            blocks.all(|block| {
                let (word, bit) = Self::bit(block);
                self.plugged
                    .get(word)
                    .is_some_and(|word| (word.load(Ordering::SeqCst) & bit != 0) == plugged)
            })
        })
    }

    /// Plugs or unplugs what is touched.
    pub(crate) fn set(&self, at: Gpa, len: u64, plugged: bool) {
        for block in self.touched(at, len).into_iter().flatten() {
            let (word, bit) = Self::bit(block);
            let Some(word) = self.plugged.get(word) else {
                continue;
            };
            if plugged {
                word.fetch_or(bit, Ordering::SeqCst);
            } else {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    fn bit(block: u64) -> (usize, u64) {
        ((block / 64) as usize, 1 << (block % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_range_is_plugged_when_all_of_its_blocks_are() {
        let start = Gpa(128 * MIB);
        let blocks = Blocks::new(start, 256 * MIB, 2 * MIB);
        let at = |mib: u64| Gpa(start.0 + mib * MIB);
        blocks.set(at(4), 4 * MIB, true);
        assert!(blocks.all(at(4), 4 * MIB, true));
        assert!(blocks.all(Gpa(at(8).0 - 1), 1, true));
        assert!(!blocks.all(Gpa(at(8).0 - 1), 2, true));
        assert!(!blocks.all(at(2), 4 * MIB, false) && blocks.all(at(2), 2 * MIB, false));
        blocks.set(at(4), 2 * MIB, false);
        assert!(blocks.all(at(6), 2 * MIB, true) && !blocks.all(at(4), 1, true));
    }

    #[test]
    fn what_is_outside_is_neither_plugged_nor_not() {
        let blocks = Blocks::new(Gpa(128 * MIB), 256 * MIB, 2 * MIB);
        for (at, len) in [
            (127 * MIB, 2 * MIB),
            (384 * MIB, 1),
            (382 * MIB, 2 * MIB + 1),
            (u64::MAX, 2),
        ] {
            assert!(!blocks.all(Gpa(at), len, true) && !blocks.all(Gpa(at), len, false));
            blocks.set(Gpa(at), len, true);
        }
        assert!(blocks.all(Gpa(128 * MIB), 256 * MIB, false));
        assert!(blocks.whole(Gpa(382 * MIB), 2 * MIB));
        assert!(!blocks.whole(Gpa(382 * MIB), 4 * MIB));
        assert!(!blocks.whole(Gpa(130 * MIB), MIB) && !blocks.whole(Gpa(130 * MIB), 0));
        assert!(!blocks.whole(Gpa(129 * MIB), 2 * MIB));
    }
}
