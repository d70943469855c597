//! Instructions that the host executes itself, with their memory operand
//! redirected and guest r14 and r15 brought in.

use crate::access::Access;
use crate::assembler::{Memory, NONE, context, guest_register, op};
use crate::context::{Context, S1, S2};
use crate::emitter::Emitter;
use crate::homes;
use crate::plan::Step;
use crate::reencode::reencode;
use crate::registers::{encoding, general, is_general32};

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RSI: u8 = 6;

impl Emitter<'_> {
    pub(crate) fn copy(&mut self, step: &Step) {
        if step.dirties_upper && !self.upper_live {
            self.asm.store_immediate(context!(upper_live), 1);
            self.upper_live = true;
        }
        if !step.memory {
            return self.copy_registers(step);
        }
        let access = Access {
            size: step.size,
            write: step.write,
        };
        let operand = self.operand(step, access, step.wants_low_address());
        if step.wants_low_address() {
            return self.with_low_address(step, operand);
        }
        self.with_scratch(step, operand);
    }

    /// With REX, AH would become SPL; with r14 and r15 as operands no scratch register
    /// is left. The address goes into RSI, which such an instruction does not name.
    fn with_low_address(&mut self, step: &Step, operand: Memory) {
        self.asm.store(RSI, context!(temp));
        self.asm.lea(RSI, operand);
        let memory = Memory::at(RSI, 0);
        if step.high_byte {
            reencode(self.asm, step.row, &step.ins, Some((memory, NONE)));
        } else {
            self.forget();
            self.asm.load(S1, guest_register(S1));
            self.asm.load(S2, guest_register(S2));
            // Each in its own place.
            crate::reencode::reencode_in_place(self.asm, step.row, &step.ins, memory);
            for n in 0..2 {
                if step.scratch_written >> n & 1 != 0 {
                    self.asm.store(S1 + n, guest_register(S1 + n));
                }
            }
        }
        self.asm.load(RSI, context!(temp));
    }

    /// VZEROUPPER and VZEROALL: from here on there is nothing in the upper halves.
    pub(crate) fn zero_upper(&mut self, step: &Step) {
        reencode(self.asm, step.row, &step.ins, None);
        self.asm.store_immediate(context!(upper_live), 0);
        self.upper_live = false;
    }

    /// RDTSC, with the guest's offset; flags stay.
    pub(crate) fn read_tsc(&mut self) {
        self.asm.bytes([0x0f, 0x31]);
        // Its upper half is zero after RDTSC.
        self.asm.rotate_right(RDX, RDX, 32);
        self.asm.add(RAX, RDX);
        self.asm.load(RDX, context!(tsc_offset));
        self.asm.add(RAX, RDX);
        self.asm.rotate_right(RDX, RAX, 32);
        // mov eax, eax; mov edx, edx
        self.asm.bytes([0x89, 0xc0, 0x89, 0xd2]);
    }

    /// RDTSCP and RDPID, without the host's TSC_AUX.
    pub(crate) fn read_tsc_aux(&mut self, step: &Step) {
        if step.ins.op_count() == 0 {
            // LFENCE waits as RDTSCP does.
            self.asm.bytes([0x0f, 0xae, 0xe8]);
            self.read_tsc();
            self.asm.load(RCX, context!(tsc_aux));
        } else {
            self.load_general(step.ins.op0_register(), context!(tsc_aux));
        }
    }

    /// RDFSBASE and RDGSBASE.
    pub(crate) fn read_base(&mut self, step: &Step) {
        let from = if step.row.reg & 7 == 0 {
            context!(fs_base)
        } else {
            context!(gs_base)
        };
        self.load_general(step.ins.op0_register(), from);
    }

    /// A guest register of 32 or 64 bits from the context.
    fn load_general(&mut self, register: iced_x86::Register, from: i32) {
        let (_, to) = encoding(register);
        let target = if to >= 14 { S1 } else { to };
        self.asm.load(target, from);
        if is_general32(register) {
            // mov target32, target32
            let (high, low) = (target >> 3, target & 7);
            let (rex, modrm) = (0x40 | high << 2 | high, 0xc0 | low << 3 | low);
            self.asm.bytes([rex, op::LOAD, modrm]);
        }
        if to >= 14 {
            self.forget();
            self.asm.store(S1, guest_register(to));
        }
    }

    /// Guest r14 is loaded into host r14, r15 into r15.
    fn copy_registers(&mut self, step: &Step) {
        if step.scratch_used != 0 && homes::emit(self.asm, step) {
            return;
        }
        let read = if homes::overwrites(step) {
            step.scratch_used & !step.scratch_written
        } else {
            step.scratch_used
        };
        for n in 0..2 {
            if read >> n & 1 != 0 {
                self.asm.load(14 + n, guest_register(14 + n));
            }
        }
        reencode(self.asm, step.row, &step.ins, None);
        for n in 0..2 {
            if step.scratch_written >> n & 1 != 0 {
                self.asm.store(14 + n, guest_register(14 + n));
            }
        }
        self.s1_stack &= step.scratch_used & 1 == 0;
        if step.scratch_used & 2 != 0 {
            self.s2_group = None;
        }
    }

    /// Guest r14 or r15 beside a memory operand goes into the scratch register that
    /// the operand does not use.
    fn with_scratch(&mut self, step: &Step, operand: Memory) {
        if step.scratch_used == 0 {
            return reencode(self.asm, step.row, &step.ins, Some((operand, NONE)));
        }
        let home = guest_register(13 + step.scratch_used);
        let scratch = if operand.index == S2 { S1 } else { S2 };
        if scratch == S1 {
            self.s1_stack = false;
        } else {
            self.s2_group = None;
        }
        if step.scratch_written == 0 || !homes::overwrites(step) {
            self.asm.load(scratch, home);
        }
        reencode(self.asm, step.row, &step.ins, Some((operand, scratch)));
        if step.scratch_written != 0 {
            self.asm.store(scratch, home);
        }
    }

    /// BT, BTS, BTR and BTC of memory by a register: the bit index selects a word
    /// beside the operand's address. Keeps flags up to the instruction itself.
    pub(crate) fn bit_string(&mut self, step: &Step) {
        let size = step.size;
        let index = general(step.ins.op1_register()).unwrap_or(0);
        // log2 of the operand's bits, and of its bytes
        let bits = match size {
            8 => 6,
            4 => 5,
            _ => 4,
        };
        if self.bounces() {
            self.asm.load(S1, context!(bounce_at));
        } else {
            if let Some(va) = self.address(step) {
                self.asm.constant(S1, va);
            }
            self.asm.store(RCX, context!(saved_rcx));
            self.index_into_s2(index, size);
            self.asm.constant(RCX, bits);
            self.shift(SARX);
            self.asm.load(RCX, context!(saved_rcx));
            self.asm.lea(
                S1,
                Memory {
                    base: S1,
                    index: S2,
                    scale: bits as u8 - 3,
                    disp: 0,
                },
            );
            let access = Access {
                size,
                write: step.write,
            };
            let operand = self.lookup(step, access, None);
            debug_assert_eq!(operand, Memory::at(S1, 0));
        }
        self.asm.store(RCX, context!(saved_rcx));
        self.index_into_s2(index, size);
        self.asm.constant(RCX, 64 - bits);
        self.shift(SHLX);
        self.shift(SHRX);
        self.asm.load(RCX, context!(saved_rcx));
        // The index register takes S2's place.
        let mut ins = step.ins;
        ins.set_op1_register(match size {
            8 => iced_x86::Register::R15,
            4 => iced_x86::Register::R15D,
            _ => iced_x86::Register::R15W,
        });
        reencode(self.asm, step.row, &ins, Some((Memory::at(S1, 0), S2)));
    }

    /// The sign-extended bit index.
    fn index_into_s2(&mut self, index: u8, size: u8) {
        let from = if index >= 14 {
            self.asm.load(S2, guest_register(index));
            S2
        } else {
            index
        };
        let (rex, modrm) = (0x4c | from >> 3, 0xc0 | (S2 & 7) << 3 | from & 7);
        match size {
            8 if from == S2 => {}
            8 => self.asm.mov(S2, from),
            4 => self.asm.bytes([rex, op::MOVSXD, modrm]),
            _ => self.asm.bytes([rex, 0x0f, 0xbf, modrm]),
        }
    }

    /// `shift r15, r15, rcx` without flags: BMI2's, told apart by a prefix.
    fn shift(&mut self, prefix: u8) {
        self.asm.bytes([0xc4, 0x42, 0xf0 | prefix, 0xf7, 0xff]);
    }

    pub(crate) fn load_effective_address(&mut self, step: &Step) {
        let (_, to) = encoding(step.ins.op0_register());
        let size = if step.row.w {
            8
        } else if step.row.o16 {
            2
        } else {
            4
        };
        let target = if to >= 14 || size == 2 { S1 } else { to };
        let uses = |register| general(register).is_some_and(|n| n >= 14);
        if target == S1 || uses(step.ins.memory_base()) || uses(step.ins.memory_index()) {
            self.forget();
        }
        match self.offset(step, target, size != 4) {
            Some(value) if size == 4 => self.asm.constant(target, value & 0xffff_ffff),
            Some(value) => self.asm.constant(target, value),
            None => {}
        }
        if size == 2 {
            // mov word, r14w
            if to >= 14 {
                let [a, b, c, d] = guest_register(to).to_le_bytes();
                self.asm
                    .bytes([0x65, 0x66, 0x44, 0x89, 0x34, 0x25, a, b, c, d]);
            } else {
                self.asm.bytes([0x66, 0x44 | to >> 3, 0x89, 0xf0 | to & 7]);
            }
        } else if to >= 14 {
            self.asm.store(S1, guest_register(to));
        }
    }
}

/// VEX.pp of SARX, SHLX, SHRX.
const SARX: u8 = 2;
const SHLX: u8 = 1;
const SHRX: u8 = 3;
