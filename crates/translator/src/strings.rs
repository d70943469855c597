//! MOVS, STOS and LODS. The host's own instruction runs on host addresses and so
//! honours DF and leaves flags; the pointers are turned back afterwards.

use crate::access::Access;
use crate::assembler::{Memory, context, op};
use crate::block::Exit;
use crate::context::{Context, S1, S2, Tlb};
use crate::emitter::{Cold, ColdKind, Emitter, Flags, tlb};
use crate::plan::{PAGE, Step};

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;

impl Emitter<'_> {
    /// One MOVS, STOS or LODS.
    pub(crate) fn string(&mut self, step: &Step) {
        let size = element_size(step);
        let read = Access { size, write: false };
        let write = Access { size, write: true };
        let lookup = |emitter: &mut Self, pointer, access| {
            emitter.asm.mov(S1, pointer);
            emitter.lookup(step, access, Some((pointer, 0)));
        };
        match shape(step) {
            Shape::Move => {
                lookup(self, RSI, read);
                self.asm.store(S1, context!(temp));
                self.retry_from_here();
                lookup(self, RDI, write);
                self.asm.load(S2, context!(temp));
                self.asm.add(RSI, S2);
                self.asm.add(RDI, S1);
                self.string_opcode(step);
                self.asm.subtract(RDI, S1);
                self.asm.subtract(RSI, S2);
            }
            Shape::Store => {
                lookup(self, RDI, write);
                self.asm.add(RDI, S1);
                self.string_opcode(step);
                self.asm.subtract(RDI, S1);
            }
            Shape::Load => {
                lookup(self, RSI, read);
                self.asm.add(RSI, S1);
                self.string_opcode(step);
                self.asm.subtract(RSI, S1);
            }
        }
    }

    /// REP MOVS and REP STOS upwards, when both ends lie in one page each. The
    /// engine does all else.
    pub(crate) fn repeated_string(&mut self, step: &Step) {
        let flags = match Flags::at(step) {
            Flags::Kept => {
                self.save_flags();
                Flags::Saved
            }
            flags => flags,
        };
        let moves = matches!(shape(step), Shape::Move);
        let size = element_size(step);
        let scale = size.trailing_zeros() as u8;
        let mut jumps = [0; 6];
        let mut refused = jumps.iter_mut();
        let mut refuse = |jump: u32| {
            if let Some(slot) = refused.next() {
                *slot = jump;
            }
        };
        // cmp qword gs:[direction], 0
        self.asm.bytes([0x65, 0x48, 0x83, 0x3c, 0x25]);
        self.asm.i32(context!(direction));
        self.asm.byte(0);
        refuse(self.asm.jcc(5));
        self.asm
            .compare_immediate(RCX, PAGE as i32 / i32::from(size));
        refuse(self.asm.jcc(7));
        let pointers: &[_] = if moves {
            &[(RDI, tlb!(self, write_tag)), (RSI, tlb!(self, read_tag))]
        } else {
            &[(RDI, tlb!(self, write_tag))]
        };
        for &(pointer, tag) in pointers {
            self.asm.pext(S2, pointer, context!(tlb_mask));
            self.asm.mov(S1, pointer);
            self.asm.gs_indexed(op::XOR, S1, S2, tag);
            self.asm.compare_immediate(S1, PAGE as i32 - 1);
            refuse(self.asm.jcc(7));
            self.asm.lea(
                S1,
                Memory {
                    base: S1,
                    index: RCX,
                    scale,
                    disp: 0,
                },
            );
            self.asm.compare_immediate(S1, PAGE as i32);
            refuse(self.asm.jcc(7));
            self.asm.gs_indexed(op::LOAD, S1, S2, tlb!(self, addend));
            if pointer == RDI && moves {
                self.asm.store(S1, context!(temp));
            }
        }
        self.restore_flags(flags);
        let (to, from) = if moves { (S2, S1) } else { (S1, S2) };
        if moves {
            self.asm.load(S2, context!(temp));
            self.asm.add(RSI, from);
        }
        self.asm.add(RDI, to);
        self.asm.byte(0xf3);
        self.string_opcode(step);
        self.asm.subtract(RDI, to);
        if moves {
            self.asm.subtract(RSI, from);
        }
        self.jump(step.ins.next_ip());
        let exit = Exit::Interpret { at: step.at };
        self.out.cold.push(Cold {
            jumps,
            kind: ColdKind::Plain { flags, exit },
        });
    }

    fn string_opcode(&mut self, step: &Step) {
        if step.row.o16 {
            self.asm.byte(0x66);
        }
        if step.row.w {
            self.asm.byte(0x48);
        }
        self.asm.byte(step.row.opcode);
    }
}

enum Shape {
    Move,
    Store,
    Load,
}

fn shape(step: &Step) -> Shape {
    match step.row.opcode {
        0xa4 | 0xa5 => Shape::Move,
        0xaa | 0xab => Shape::Store,
        _ => Shape::Load,
    }
}

fn element_size(step: &Step) -> u8 {
    let row = step.row;
    match (row.opcode & 1, row.o16, row.w) {
        (0, _, _) => 1,
        (_, true, _) => 2,
        (_, _, true) => 8,
        _ => 4,
    }
}
