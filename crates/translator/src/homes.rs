//! Guest r14 and r15 used where they live, in the context: a form of the instruction
//! with a memory operand takes the place of the register form. That saves a load, and
//! the scratch registers keep what they hold.

use iced_x86::{Instruction, OpKind};

use crate::assembler::{Assembler, Memory, NONE, guest_register};
use crate::plan::Step;
use crate::reencode::{immediate, operand_kind, operand_register};
use crate::registers::{Bank, encoding, general};
use crate::table::{DIGIT, NO_OPERAND, Row, Vex};

/// ModRM.reg, with what REX needs to know of it.
#[derive(Clone, Copy)]
struct Reg {
    number: u8,
    must_rex: bool,
}

/// The form of an instruction that has r14 or r15 in memory.
struct Form {
    opcode: u8,
    reg: Reg,
    home: i32,
    /// An immediate byte instead of the instruction's own.
    zero: bool,
}

/// Emits `step`, an instruction without a memory operand, with guest r14 or r15 as a
/// memory operand; false if it has no such form.
pub(crate) fn emit(asm: &mut Assembler, step: &Step) -> bool {
    let Some(form) = form(&step.ins, step.row) else {
        return false;
    };
    let row = step.row;
    asm.byte(0x65);
    if row.o16 {
        asm.byte(0x66);
    }
    if row.mandatory != 0 {
        asm.byte(row.mandatory);
    }
    let rex = u8::from(row.w) << 3 | form.reg.number >> 3 << 2;
    if rex != 0 || form.reg.must_rex {
        asm.byte(0x40 | rex);
    }
    match row.map {
        0 => asm.byte(form.opcode),
        1 => asm.bytes([0x0f, form.opcode]),
        2 => asm.bytes([0x0f, 0x38, form.opcode]),
        _ => asm.bytes([0x0f, 0x3a, form.opcode]),
    }
    asm.modrm(form.reg.number, Memory::at(NONE, form.home));
    if form.zero {
        asm.byte(0);
    } else if row.immediate_size != 0 {
        let value = immediate(&step.ins, row.immediate).to_le_bytes();
        for byte in value.iter().take(usize::from(row.immediate_size)) {
            asm.byte(*byte);
        }
    }
    true
}

fn form(ins: &Instruction, row: &Row) -> Option<Form> {
    if row.low != NO_OPERAND || row.vex != Vex::No {
        return None;
    }
    // What is written may be in memory unless its upper half must become zero.
    let written = row.w || row.o16 || row.opcode & 1 == 0;
    let writes = |operand: u8| operand < 4 && row.writes >> operand & 1 != 0;
    let form = |opcode, reg, home, zero| {
        Some(Form {
            opcode,
            reg,
            home: guest_register(home),
            zero,
        })
    };
    match (scratch(ins, row.rm), scratch(ins, row.reg)) {
        (Some(home), None) => {
            let reg = reg(ins, row.reg)?;
            let fits = if writes(row.rm) {
                written && in_place(row, reg.number)
            } else {
                // BT with a register would look beyond the operand.
                row.map != 1 || row.opcode != 0xa3
            };
            fits.then(|| form(row.opcode, reg, home, false))?
        }
        // op rm, r14 as op r, m; op r14, rm as op m, r
        (None, Some(home)) if row.map == 0 => {
            let other = reg(ins, row.rm)?;
            let opcode = match row.opcode {
                0x84 | 0x85 => row.opcode,
                0x00..=0x3b if row.opcode & 7 < 4 => row.opcode ^ 2,
                0x88..=0x8b => row.opcode ^ 2,
                _ => return None,
            };
            (!writes(row.reg) || written).then(|| form(opcode, other, home, false))?
        }
        // test r14, r14 writes the same flags as cmp m, 0
        (Some(home), Some(same)) if home == same && row.map == 0 => {
            let opcode = match row.opcode {
                0x84 => 0x80,
                0x85 => 0x83,
                _ => return None,
            };
            let reg = Reg {
                number: 7,
                must_rex: false,
            };
            form(opcode, reg, home, true)
        }
        _ => None,
    }
}

/// Instructions that read and write ModRM.rm, or only write it. Not shifts and
/// rotates: the OF of a count above 1 is another in memory.
fn in_place(row: &Row, digit: u8) -> bool {
    row.map == 0
        && match row.opcode {
            0x00..=0x3b => row.opcode & 7 < 2,
            0x80 | 0x81 | 0x83 | 0x88 | 0x89 => true,
            0xc6 | 0xc7 | 0xf6 | 0xf7 | 0xfe | 0xff => row.reg & DIGIT != 0 && digit < 4,
            _ => false,
        }
}

/// 14 or 15 if that general register is in `operand`.
fn scratch(ins: &Instruction, operand: u8) -> Option<u8> {
    if operand >= 4 || operand_kind(ins, operand) != OpKind::Register {
        return None;
    }
    match encoding(operand_register(ins, operand)) {
        (Bank::General | Bank::Byte, number @ 14..) => Some(number),
        _ => None,
    }
}

fn reg(ins: &Instruction, operand: u8) -> Option<Reg> {
    if operand != NO_OPERAND && operand & DIGIT != 0 {
        return Some(Reg {
            number: operand & 7,
            must_rex: false,
        });
    }
    if operand >= 4 || operand_kind(ins, operand) != OpKind::Register {
        return None;
    }
    let (bank, number) = encoding(operand_register(ins, operand));
    (bank != Bank::Other && bank != Bank::HighByte).then_some(Reg {
        number,
        must_rex: bank == Bank::RexByte,
    })
}

/// Does the instruction overwrite the whole general register that it writes, without
/// reading it?
pub(crate) fn overwrites(step: &Step) -> bool {
    let (ins, row) = (&step.ins, step.row);
    let own = general(ins.op0_register());
    let whole = (row.w || !row.o16) && own.is_some() && own != general(ins.op1_register());
    match row.map {
        0 => whole && matches!(row.opcode, 0x63 | 0x89 | 0x8b | 0xb8 | 0xc7),
        1 => whole && matches!(row.opcode, 0xb6 | 0xb7 | 0xbe | 0xbf),
        _ => false,
    }
}
