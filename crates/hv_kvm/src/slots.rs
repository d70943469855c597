//! Guest memory as KVM's slots: which there are, which of them the guest may reach now.
//!
//! Memory that is plugged in blocks has a slot for each block, or for a few of them where
//! they are many: such a slot goes when its last block does, and until then the guest
//! reaches zeros at blocks that were unplugged.

use ram::{Gpa, GuestRam, Kind, Region};

/// Slots of one region at most: KVM has 32764 for all.
const PER_REGION_MAX: u64 = 4096;

/// A slot, whether KVM knows of it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) at: Gpa,
    pub(crate) len: u64,
    pub(crate) read_only: bool,
    /// Part of what can be plugged.
    pub(crate) pluggable: bool,
}

impl Slot {
    /// Whether it has something of `len` bytes from `at`.
    pub(crate) fn touches(&self, at: Gpa, len: u64) -> bool {
        at.0 < self.at.0 + self.len && self.at.0 < at.0.saturating_add(len)
    }

    /// Whether the guest may reach any of it.
    pub(crate) fn is_there(&self, ram: &GuestRam) -> bool {
        !self.pluggable || ram.plugged(self.at, self.len) != Some(false)
    }
}

/// All slots for these regions.
pub(crate) fn slots(regions: impl Iterator<Item = Region>) -> Vec<Slot> {
    let mut slots = Vec::new();
    for region in regions {
        let (piece, read_only, pluggable) = match region.kind {
            Kind::Memory => (region.len, false, false),
            Kind::File { read_only } => (region.len, read_only, false),
            Kind::Pluggable { block } => (piece(region.len, block), false, true),
        };
        let end = region.end().0;
        let mut at = region.start.0;
        while at < end {
            let len = piece.min(end - at);
            slots.push(Slot {
                number: slots.len() as u32,
                at: Gpa(at),
                len,
                read_only,
                pluggable,
            });
            at += len;
        }
    }
    slots
}

/// Blocks of a region, as many as make the slots few enough.
fn piece(len: u64, block: u64) -> u64 {
    let mut piece = block;
    while len / piece > PER_REGION_MAX {
        piece *= 2;
    }
    piece
}

#[cfg(test)]
mod tests {
    use ram::{ByteSize, Further};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn blocks_that_are_plugged_have_slots() {
        let pluggable = Further::Pluggable {
            len: 8 * MIB,
            block: 2 * MIB,
        };
        let ram = GuestRam::with(ByteSize::mib(16), vec![pluggable]).unwrap();
        let slots = slots(ram.regions());
        assert_eq!(slots.len(), 5);
        let there = || -> Vec<_> { slots.iter().map(|slot| slot.is_there(&ram)).collect() };
        assert_eq!(there(), [true, false, false, false, false]);
        ram.plug(slots[2].at, 4 * MIB).unwrap();
        assert_eq!(there(), [true, false, true, true, false]);
        assert!(slots[2].touches(slots[2].at, 1) && !slots[2].touches(slots[3].at, 1));
    }

    #[test]
    fn many_blocks_share_slots() {
        assert_eq!(piece(8 << 30, 2 * MIB), 2 * MIB);
        assert_eq!(piece(64 << 30, 2 * MIB), 16 * MIB);
    }
}
