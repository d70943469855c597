//! Segment and gate descriptors as data (SDM vol. 3, §3.4.5 and §6.14.1).

use crate::state::Segment;

/// Rights bit: accessed.
pub const ACCESSED: u16 = 1 << 0;
/// Rights bit of code: readable; of data: writable.
pub const READ_WRITE: u16 = 1 << 1;
/// Rights bit of code: conforming.
pub const CONFORMING: u16 = 1 << 2;
/// Rights bit: code.
pub const CODE: u16 = 1 << 3;
/// Rights bit: code or data, not a system descriptor.
pub const NOT_SYSTEM: u16 = 1 << 4;
/// Rights bit: present.
pub const PRESENT: u16 = 1 << 7;
/// Rights bit: 64-bit code.
pub const LONG: u16 = 1 << 13;
/// Rights bit: 32-bit operands and stack.
pub const BIG: u16 = 1 << 14;
/// Rights bit: the limit counts pages.
pub const PAGES: u16 = 1 << 15;

/// System type: local descriptor table.
pub const TYPE_LDT: u16 = 2;
/// System type: available 64-bit task state.
pub const TYPE_TSS: u16 = 9;
/// System type: busy 64-bit task state.
pub const TYPE_TSS_BUSY: u16 = 11;
/// System type: interrupt gate.
pub const TYPE_INTERRUPT_GATE: u16 = 14;
/// System type: trap gate.
pub const TYPE_TRAP_GATE: u16 = 15;

/// An eight-byte descriptor as it lies in the GDT or LDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Rights as [`Segment::rights`] has them.
    #[must_use]
    pub const fn rights(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }

    /// Type field, four bits.
    #[must_use]
    pub const fn kind(self) -> u16 {
        self.rights() & 0xf
    }

    /// Privilege level.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        (self.rights() >> 5) as u8 & 3
    }

    /// Whether the segment is present.
    #[must_use]
    pub const fn present(self) -> bool {
        self.rights() & PRESENT != 0
    }

    /// Low 32 bits of the base.
    #[must_use]
    pub const fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    /// Limit in bytes.
    #[must_use]
    pub const fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.rights() & PAGES != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }

    /// The segment register that loading this descriptor gives. `upper` is the
    /// second half of a 16-byte system descriptor, or zero.
    #[must_use]
    pub const fn segment(self, selector: u16, upper: u64) -> Segment {
        Segment {
            selector,
            base: self.base() | upper << 32,
            limit: self.limit(),
            rights: self.rights(),
        }
    }
}

/// A 16-byte gate of the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// First eight bytes.
    pub low: u64,
    /// Last eight bytes.
    pub high: u64,
}

impl Gate {
    /// Address of the handler.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000 | self.high << 32
    }

    /// Code segment selector.
    #[must_use]
    pub const fn selector(self) -> u16 {
        (self.low >> 16) as u16
    }

    /// Interrupt stack table index; 0 is none.
    #[must_use]
    pub const fn ist(self) -> u8 {
        (self.low >> 32) as u8 & 7
    }

    /// Type field.
    #[must_use]
    pub const fn kind(self) -> u16 {
        (self.low >> 40) as u16 & 0x1f
    }

    /// Privilege that software interrupts need.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        (self.low >> 45) as u8 & 3
    }

    /// Whether the gate is present.
    #[must_use]
    pub const fn present(self) -> bool {
        self.low >> 47 & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_64_bit_code_is_read_as_linux_writes_it() {
        let code = Descriptor(0x00af_9b00_0000_ffff);
        assert_eq!((code.base(), code.limit()), (0, 0xffff_ffff));
        assert_eq!(code.dpl(), 0);
        assert!(
            code.present()
                && code.rights() & (CODE | LONG | NOT_SYSTEM) == CODE | LONG | NOT_SYSTEM
        );
    }

    #[test]
    fn a_gate_is_put_together_from_its_three_pieces() {
        let gate = Gate {
            low: 0x8234_8e03_0010_5678,
            high: 0xffff_ffff,
        };
        assert_eq!(gate.offset(), 0xffff_ffff_8234_5678);
        assert_eq!(
            (gate.selector(), gate.ist(), gate.kind(), gate.dpl()),
            (0x10, 3, 14, 0)
        );
        assert!(gate.present());
    }
}
