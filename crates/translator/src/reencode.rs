//! Encodes an allowed instruction from its row and its decoded operands. Nothing
//! of the guest's own encoding survives but the meaning: redundant and unknown
//! prefixes, segment overrides and odd REX placements are gone, so that the host
//! executes what the decoder saw.

use iced_x86::{Instruction, OpKind, Register};

use crate::assembler::{Assembler, Memory};
use crate::registers::{Bank, encoding};
use crate::table::{DIGIT, NO_OPERAND, Row, Vex};

/// Encodes `instruction`. A memory operand is replaced by `memory`; guest r14 or
/// r15 as an operand beside it becomes the register that comes with it.
pub(crate) fn reencode(
    asm: &mut Assembler,
    row: &Row,
    instruction: &Instruction,
    memory: Option<(Memory, u8)>,
) {
    encode(asm, row, instruction, memory.map(|(m, s)| (m, Some(s))));
}

/// As [`reencode`] with a memory operand, but r14 and r15 stay what they are.
pub(crate) fn reencode_in_place(
    asm: &mut Assembler,
    row: &Row,
    instruction: &Instruction,
    memory: Memory,
) {
    encode(asm, row, instruction, Some((memory, None)));
}

fn encode(
    asm: &mut Assembler,
    row: &Row,
    instruction: &Instruction,
    memory: Option<(Memory, Option<u8>)>,
) {
    let mut rex = u8::from(row.w) << 3;
    let mut must_rex = false;
    let mut number = |operand: u8| -> u8 {
        let (bank, number) = encoding(operand_register(instruction, operand));
        must_rex |= bank == Bank::RexByte;
        match memory {
            Some((_, Some(scratch))) if number >= 14 && bank != Bank::Vector => scratch,
            _ => number,
        }
    };
    let reg = match row.reg {
        NO_OPERAND => 0,
        digit if digit & DIGIT != 0 => digit & 7,
        operand => number(operand),
    };
    let mut rm_memory = None;
    let rm = match row.rm {
        NO_OPERAND => 0,
        digit if digit & DIGIT != 0 => digit & 7,
        operand if operand_kind(instruction, operand) == OpKind::Memory => {
            rm_memory = memory;
            0
        }
        operand => number(operand),
    };
    let low = if row.low == NO_OPERAND {
        0
    } else {
        number(row.low)
    };
    let (vvvv, is4) = match row.vex {
        Vex::No => (0, 0),
        Vex::L0 | Vex::L1 => (
            if row.vvvv == NO_OPERAND {
                0
            } else {
                number(row.vvvv)
            },
            if row.is4 == NO_OPERAND {
                0
            } else {
                number(row.is4)
            },
        ),
    };
    rex |= reg >> 3 << 2 | rm >> 3 | low >> 3;
    if let Some((m, _)) = rm_memory {
        rex |= m.rex();
    }
    if row.vex == Vex::No {
        legacy_prefixes(asm, row, instruction, rex, must_rex, low);
    } else {
        vex_prefix(asm, row, rex, vvvv);
    }
    if let Some((m, _)) = rm_memory {
        asm.modrm(reg, m);
    } else if row.rm != NO_OPERAND {
        asm.byte(0xc0 | (reg & 7) << 3 | rm & 7);
    }
    if row.is4 != NO_OPERAND {
        asm.byte(is4 << 4);
    } else if row.immediate_size != 0 {
        let value = immediate(instruction, row.immediate).to_le_bytes();
        match row.immediate_size {
            1 => asm.byte(value[0]),
            2 => asm.bytes([value[0], value[1]]),
            4 => asm.bytes([value[0], value[1], value[2], value[3]]),
            _ => asm.bytes(value),
        }
    }
}

/// Prefixes, REX and opcode.
fn legacy_prefixes(
    asm: &mut Assembler,
    row: &Row,
    instruction: &Instruction,
    rex: u8,
    must_rex: bool,
    low: u8,
) {
    if instruction.has_lock_prefix() {
        asm.byte(0xf0);
    }
    if row.o16 {
        asm.byte(0x66);
    }
    if row.mandatory != 0 {
        asm.byte(row.mandatory);
    }
    if rex != 0 || must_rex {
        asm.byte(0x40 | rex);
    }
    let opcode = row.opcode | low & 7;
    match row.map {
        0 => asm.byte(opcode),
        1 => asm.bytes([0x0f, opcode]),
        2 => asm.bytes([0x0f, 0x38, opcode]),
        _ => asm.bytes([0x0f, 0x3a, opcode]),
    }
}

/// VEX in its shorter form where it has one (SDM vol. 2, 2.3.5), and opcode.
fn vex_prefix(asm: &mut Assembler, row: &Row, rex: u8, vvvv: u8) {
    let pp = match row.mandatory {
        0x66 => 1,
        0xf3 => 2,
        0xf2 => 3,
        _ => 0,
    };
    let rest = (!vvvv & 15) << 3 | u8::from(row.vex == Vex::L1) << 2 | pp;
    if row.map == 1 && rex & 0b1011 == 0 {
        asm.bytes([0xc5, (!rex & 4) << 5 | rest, row.opcode]);
    } else {
        let first = (!rex & 7) << 5 | row.map;
        asm.bytes([0xc4, first, (rex & 8) << 4 | rest, row.opcode]);
    }
}

/// The register in operand 0 to 3.
pub(crate) fn operand_register(instruction: &Instruction, operand: u8) -> Register {
    match operand {
        0 => instruction.op0_register(),
        1 => instruction.op1_register(),
        2 => instruction.op2_register(),
        3 => instruction.op3_register(),
        _ => Register::None,
    }
}

/// The kind of operand 0 to 3.
pub(crate) fn operand_kind(instruction: &Instruction, operand: u8) -> OpKind {
    match operand {
        0 => instruction.op0_kind(),
        1 => instruction.op1_kind(),
        2 => instruction.op2_kind(),
        _ => instruction.op3_kind(),
    }
}

/// The immediate in `operand`, sign-extended where the instruction does it.
pub(crate) fn immediate(instruction: &Instruction, operand: u8) -> u64 {
    instruction.try_immediate(u32::from(operand)).unwrap_or(0)
}
