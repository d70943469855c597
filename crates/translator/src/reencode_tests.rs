//! Every allowed code, in every operand form: what is encoded decodes to the same
//! instruction.

use std::collections::BTreeSet;

use iced_x86::{Code, Decoder, Instruction, OpKind, Register};
use x86::features::Features;

use crate::allowed::entries;
use crate::assembler::{Assembler, Memory};
use crate::block::{Kind, Request};
use crate::context::{Mode, S1, S2};
use crate::plan::{decoder_options, step};
use crate::reencode::{reencode, reencode_in_place};
use crate::registers::{Bank, encoding};
use crate::table::{Class, Row, Vex};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
}

/// Guest bytes of an instruction with this row, with junk prefixes at times.
fn sample(code: Code, row: &Row, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    if is_absolute(code) {
        bytes.extend_from_slice(if row.o16 { &[0x66] } else { &[] });
        bytes.extend_from_slice(if row.w { &[0x48] } else { &[] });
        bytes.push(0xa0 | row.opcode & 1 | if row.writes == 1 && row.rm == 0 { 2 } else { 0 });
        bytes.extend_from_slice(&random.next().to_le_bytes());
        return bytes;
    }
    if random.next().is_multiple_of(4) {
        bytes.push([0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x67][random.next() as usize % 7]);
    }
    if row.vex != Vex::No {
        vex_prefix(&mut bytes, row, random);
        return with_operands(bytes, row, random);
    }
    if random.next().is_multiple_of(16) {
        bytes.push(0xf0);
    }
    if row.o16 {
        bytes.push(0x66);
    }
    if row.mandatory != 0 {
        bytes.push(row.mandatory);
    }
    let rex = match random.next() % 4 {
        0 => 0,
        _ => 0x40 | (random.next() as u8 & 7),
    } | if row.w { 0x48 } else { 0 };
    if rex != 0 {
        bytes.push(rex);
    }
    let low = if row.low < 4 {
        random.next() as u8 & 7
    } else {
        0
    };
    bytes.extend_from_slice(match row.map {
        0 => &[],
        1 => &[0x0f],
        2 => &[0x0f, 0x38],
        _ => &[0x0f, 0x3a],
    });
    bytes.push(row.opcode | low);
    with_operands(bytes, row, random)
}

/// The long form of VEX, and the opcode.
fn vex_prefix(bytes: &mut Vec<u8>, row: &Row, random: &mut Random) {
    let registers = random.next() as u8;
    let vvvv = if row.vvvv < 4 { registers >> 3 & 15 } else { 0 };
    let pp = [0, 0x66, 0xf3, 0xf2]
        .iter()
        .position(|prefix| *prefix == row.mandatory)
        .unwrap() as u8;
    let (w, l) = (u8::from(row.w), u8::from(row.vex == Vex::L1));
    bytes.extend([
        0xc4,
        registers << 5 | row.map,
        w << 7 | (!vvvv & 15) << 3 | l << 2 | pp,
        row.opcode,
    ]);
}

/// ModRM and what follows, at random.
fn with_operands(mut bytes: Vec<u8>, row: &Row, random: &mut Random) -> Vec<u8> {
    if row.rm != crate::table::NO_OPERAND {
        let reg = if row.reg >= 0x10 {
            row.reg & 7
        } else {
            random.next() as u8 & 7
        };
        let rm = if row.rm >= 0x10 {
            0xc0 | row.rm & 7
        } else {
            random.next() as u8 & 0xc7
        };
        bytes.push(rm | reg << 3);
    }
    bytes.extend_from_slice(&random.next().to_le_bytes());
    bytes.extend_from_slice(&random.next().to_le_bytes());
    bytes.truncate(15);
    bytes
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, 0x1000, decoder_options(Features::EVERYTHING)).decode()
}

fn request() -> Request {
    Request {
        va: 0,
        mode: Mode::User,
        kind: Kind::Grouped,
        features: Features::EVERYTHING,
        place: 0,
        first_exit: 2,
        thunks: crate::Thunks::default(),
    }
}

#[test]
fn every_allowed_instruction_is_encoded_as_it_was_decoded() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut unseen = BTreeSet::new();
    let mut seen_in_place = 0;
    for entry in entries() {
        if !matches!(
            entry.row.class,
            Class::Copy | Class::Direction | Class::BitString | Class::ZeroUpper
        ) {
            continue;
        }
        let mut seen = 0;
        for _ in 0..200 {
            let ins = decode(&sample(entry.code, &entry.row, &mut random));
            let step = step(&ins, 0, &request());
            if step.class == Class::Interpret || ins.code() != entry.code {
                continue;
            }
            seen += 1;
            let memory = step
                .memory
                .then(|| memory(step.wants_low_address(), &mut random));
            if step.memory && step.scratch_used == 3 {
                seen_in_place += 1;
                check(&step.ins, step.row, memory.map(|(m, _)| (m, None)));
            } else {
                check(&step.ins, step.row, memory.map(|(m, s)| (m, Some(s))));
            }
        }
        if seen == 0 {
            unseen.insert(format!("{:?}", entry.code));
        }
    }
    assert_eq!(unseen, BTreeSet::new());
    assert!(seen_in_place > 0, "r14 and r15 beside memory");
}

fn memory(low: bool, random: &mut Random) -> (Memory, u8) {
    let disp = [0, 5, -7, 0x1234_5678][random.next() as usize % 4];
    let base = random.next() as u8 % 14;
    match random.next() % 3 {
        _ if low => (Memory::at(6, 0), S2),
        0 => (Memory::at(S1, disp), S2),
        1 => (Memory::sum(base, S1, disp), S2),
        _ => (Memory::sum(base, S2, disp), S1),
    }
}

fn check(ins: &Instruction, row: &Row, memory: Option<(Memory, Option<u8>)>) {
    let mut asm = Assembler::default();
    match memory {
        Some((m, None)) => reencode_in_place(&mut asm, row, ins, m),
        Some((m, Some(scratch))) => reencode(&mut asm, row, ins, Some((m, scratch))),
        None => reencode(&mut asm, row, ins, None),
    }
    let got = decode(&asm.code);
    let text = format!("{ins:?} -> {got:?} ({:02x?})", asm.code);
    assert!(!got.is_invalid() && got.len() == asm.code.len(), "{text}");
    assert_eq!(got.has_lock_prefix(), ins.has_lock_prefix(), "{text}");
    assert!(
        !got.has_xacquire_prefix() && !got.has_xrelease_prefix(),
        "{text}"
    );
    assert_eq!(got.segment_prefix(), Register::None, "{text}");
    assert_eq!(step(&got, 0, &request()).row.opcode, row.opcode, "{text}");
    if is_absolute(ins.code()) {
        return;
    }
    assert_eq!(got.code(), ins.code(), "{text}");
    assert_eq!(got.op_count(), ins.op_count(), "{text}");
    for operand in 0..ins.op_count() {
        assert_eq!(got.op_kind(operand), ins.op_kind(operand), "{text}");
        match ins.op_kind(operand) {
            OpKind::Register => {
                let (bank, n) = encoding(ins.op_register(operand));
                let (got_bank, got_n) = encoding(got.op_register(operand));
                let moved = n >= 14 && bank != Bank::Vector;
                let scratch = memory.filter(|_| moved).and_then(|(_, scratch)| scratch);
                let want = scratch.unwrap_or(n);
                assert_eq!((got_bank, got_n), (bank, want), "{text}");
            }
            OpKind::Memory => {
                let (m, _) = memory.unwrap();
                assert_eq!(
                    got.memory_base() as u8,
                    Register::RAX as u8 + m.base,
                    "{text}"
                );
                assert_eq!(got.memory_displacement64(), m.disp as u64, "{text}");
                if m.index == crate::assembler::NONE {
                    assert_eq!(got.memory_index(), Register::None, "{text}");
                } else {
                    assert_eq!(
                        got.memory_index() as u8,
                        Register::RAX as u8 + m.index,
                        "{text}"
                    );
                    assert_eq!(got.memory_index_scale(), 1 << m.scale, "{text}");
                }
            }
            _ => assert_eq!(got.immediate(operand), ins.immediate(operand), "{text}"),
        }
    }
}

/// Forms with a 64-bit absolute address become forms with ModRM.
fn is_absolute(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}
