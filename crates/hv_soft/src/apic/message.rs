//! Interrupt messages between IOAPIC and local APICs, and between local APICs: what
//! is sent, and whom it reaches (SDM vol. 3, §11.6).

/// Delivery mode: to all destinations.
pub(crate) const FIXED: u8 = 0;
/// Delivery mode: to one of them.
pub(crate) const LOWEST: u8 = 1;
/// Delivery mode: non-maskable.
pub(crate) const NMI: u8 = 4;
/// Delivery mode: resets the CPU, which then waits for the next one.
pub(crate) const INIT: u8 = 5;
/// Delivery mode: starts a CPU that waits, in real mode, at the page `vector`.
pub(crate) const START_UP: u8 = 6;

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// The APIC with this id.
    Physical(u32),
    /// APICs whose logical id matches.
    Logical(u32),
    /// The sender.
    Sender,
    /// Every APIC.
    All,
    /// Every APIC but the sender's.
    Others,
}

/// An interrupt for local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) vector: u8,
    pub(crate) delivery: u8,
    pub(crate) level: bool,
    pub(crate) destination: Destination,
}

/// What a local APIC answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) x2apic: bool,
    /// xAPIC: LDR's upper byte.
    pub(crate) logical: u8,
    /// xAPIC: DFR says clusters.
    pub(crate) clusters: bool,
    /// Takes part where the destination is the one of lowest priority.
    pub(crate) enabled: bool,
}

impl Address {
    pub(crate) fn pack(self) -> u32 {
        u32::from(self.logical)
            | u32::from(self.x2apic) << 8
            | u32::from(self.clusters) << 9
            | u32::from(self.enabled) << 10
    }

    pub(crate) fn unpack(bits: u32) -> Self {
        Self {
            x2apic: bits >> 8 & 1 != 0,
            logical: bits as u8,
            clusters: bits >> 9 & 1 != 0,
            enabled: bits >> 10 & 1 != 0,
        }
    }
}

impl Message {
    /// Whether it reaches the APIC of vCPU `id`; `from` is the sender's, if one sent
    /// it.
    pub(crate) fn reaches(&self, id: u32, address: Address, from: Option<u32>) -> bool {
        if self.delivery == LOWEST && !address.enabled {
            return false;
        }
        match self.destination {
            Destination::Physical(to) => to == id,
            Destination::Sender => from == Some(id),
            Destination::All => true,
            Destination::Others => from != Some(id),
            // §11.12.10.2: cluster in the upper half, a bit per APIC in the lower.
            Destination::Logical(to) if address.x2apic => {
                to >> 16 == id >> 4 && to >> (id & 15) & 1 != 0
            }
            Destination::Logical(to) if address.clusters => {
                let (to, me) = (to as u8, address.logical);
                (to >> 4 == me >> 4 || to >> 4 == 15) && to & me & 15 != 0
            }
            Destination::Logical(to) => to as u8 & address.logical != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(destination: Destination, address: Address, from: Option<u32>) -> Vec<u32> {
        let message = Message {
            vector: 0x40,
            delivery: FIXED,
            level: false,
            destination,
        };
        (0..8)
            .filter(|id| {
                let logical = if address.clusters {
                    (*id as u8 / 4) << 4 | 1 << (id % 4)
                } else {
                    1 << id
                };
                message.reaches(*id, Address { logical, ..address }, from)
            })
            .collect()
    }

    #[test]
    fn destinations_are_those_of_the_manual() {
        use Destination as D;
        let flat = Address {
            x2apic: false,
            logical: 0,
            clusters: false,
            enabled: true,
        };
        let x2apic = Address {
            x2apic: true,
            ..flat
        };
        let clusters = Address {
            clusters: true,
            ..flat
        };
        assert_eq!(reaches(D::Physical(3), flat, None), [3]);
        assert_eq!(reaches(D::Sender, flat, Some(2)), [2]);
        assert_eq!(reaches(D::All, flat, Some(2)).len(), 8);
        assert_eq!(reaches(D::Others, x2apic, Some(2)), [0, 1, 3, 4, 5, 6, 7]);
        assert_eq!(reaches(D::Logical(0b101), flat, None), [0, 2]);
        assert_eq!(reaches(D::Logical(0b101), x2apic, None), [0, 2]);
        assert!(reaches(D::Logical(1 << 16 | 1), x2apic, None).is_empty());
        assert_eq!(reaches(D::Logical(0x13), clusters, None), [4, 5]);
        assert_eq!(reaches(D::Logical(0xf1), clusters, None), [0, 4]);
        for address in [flat, x2apic, clusters] {
            assert_eq!(Address::unpack(address.pack()), address);
        }
    }
}
