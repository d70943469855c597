//! The decoder's registers as numbers in encodings.

use iced_x86::Register;

/// How a register is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Bank {
    /// None that may be encoded here: segments, control registers.
    Other,
    /// 16, 32 or 64 bits general.
    General,
    /// The low byte of a general register, in any encoding.
    Byte,
    /// SPL, BPL, SIL and DIL: only with REX.
    RexByte,
    /// AH, CH, DH and BH: only without REX.
    HighByte,
    /// XMM0 to XMM15 and YMM0 to YMM15.
    Vector,
    /// x87 and MMX.
    Stack,
}

static NUMBERS: [(Bank, u8); 256] = {
    let mut table = [(Bank::Other, 0); 256];
    let mut i = 0;
    while i < 16 {
        if i < 4 {
            table[Register::AL as usize + i] = (Bank::Byte, i as u8);
            table[Register::AH as usize + i] = (Bank::HighByte, i as u8 + 4);
            table[Register::SPL as usize + i] = (Bank::RexByte, i as u8 + 4);
        }
        if i < 8 {
            table[Register::R8L as usize + i] = (Bank::Byte, i as u8 + 8);
            table[Register::ST0 as usize + i] = (Bank::Stack, i as u8);
            table[Register::MM0 as usize + i] = (Bank::Stack, i as u8);
        }
        table[Register::AX as usize + i] = (Bank::General, i as u8);
        table[Register::EAX as usize + i] = (Bank::General, i as u8);
        table[Register::RAX as usize + i] = (Bank::General, i as u8);
        table[Register::XMM0 as usize + i] = (Bank::Vector, i as u8);
        table[Register::YMM0 as usize + i] = (Bank::Vector, i as u8);
        i += 1;
    }
    table
};

/// Bank and number of `register`.
pub(crate) fn encoding(register: Register) -> (Bank, u8) {
    NUMBERS[register as u8 as usize]
}

/// The number of the general register that `register` is, or is part of.
pub(crate) fn general(register: Register) -> Option<u8> {
    match encoding(register) {
        (Bank::General | Bank::Byte | Bank::RexByte, number) => Some(number),
        (Bank::HighByte, number) => Some(number & 3),
        _ => None,
    }
}

/// The number of a 64-bit general register.
pub(crate) fn general64(register: Register) -> Option<u8> {
    (register as u8)
        .checked_sub(Register::RAX as u8)
        .filter(|n| *n < 16)
}

/// Is it a 32-bit general register?
pub(crate) fn is_general32(register: Register) -> bool {
    (register as u8).wrapping_sub(Register::EAX as u8) < 16
}
