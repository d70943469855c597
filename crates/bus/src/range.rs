//! Who answers at which address.

use std::collections::BTreeMap;

/// Why a device could not be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("address range {start:#x}+{len:#x} is empty or wraps")]
    Range {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Somebody else answers there already.
    #[error("address range {start:#x}+{len:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// Start of the range that is in the way.
        other: u64,
    },
}

/// Devices of type `D` by disjoint address ranges.
#[derive(Debug)]
pub struct Bus<D> {
    by_start: BTreeMap<u64, (u64, D)>,
}

impl<D> Default for Bus<D> {
    fn default() -> Self {
        Self {
            by_start: BTreeMap::new(),
        }
    }
}

impl<D> Bus<D> {
    /// Places `device` at `start`, `len` addresses long.
    ///
    /// # Errors
    /// [`BusError`] when the range is not free.
    pub fn insert(&mut self, start: u64, len: u64, device: D) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|n| start.checked_add(n))
            .ok_or(BusError::Range { start, len })?;
        if let Some((&other, (other_len, _))) = self.by_start.range(..=last).next_back()
            && other + (other_len - 1) >= start
        {
            return Err(BusError::Overlap { start, len, other });
        }
        self.by_start.insert(start, (len, device));
        Ok(())
    }

    /// The device that answers at `at`, and the offset into its range.
    pub fn find(&self, at: u64) -> Option<(u64, &D)> {
        let (&start, (len, device)) = self.by_start.range(..=at).next_back()?;
        let offset = at - start;
        (offset < *len).then_some((offset, device))
    }

    /// Every device in ascending order of address.
    pub fn devices(&self) -> impl Iterator<Item = &D> {
        self.by_start.values().map(|(_, device)| device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_device_whose_range_holds_the_address() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, 'a').unwrap();
        bus.insert(0x1010, 0x10, 'b').unwrap();
        assert_eq!(bus.find(0x0fff), None);
        assert_eq!(bus.find(0x100f), Some((0xf, &'a')));
        assert_eq!(bus.find(0x1010), Some((0, &'b')));
        assert_eq!(bus.find(0x1020), None);
    }

    #[test]
    fn overlapping_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, ()).unwrap();
        for (start, len) in [(0x100f, 1), (0x0fff, 2), (0x0, 0x2000), (0x1004, 2)] {
            let got = bus.insert(start, len, ());
            assert_eq!(
                got,
                Err(BusError::Overlap {
                    start,
                    len,
                    other: 0x1000
                })
            );
        }
        assert!(matches!(
            bus.insert(u64::MAX, 2, ()),
            Err(BusError::Range { .. })
        ));
        assert!(matches!(bus.insert(5, 0, ()), Err(BusError::Range { .. })));
        bus.insert(u64::MAX, 1, ()).unwrap();
    }
}
