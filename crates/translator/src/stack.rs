//! PUSH, POP, CALL, RET, LEAVE and PUSHF. RSP changes behind the access only, so
//! that a fault finds the instruction not begun.

use iced_x86::OpKind;

use crate::access::{Access, RSP};
use crate::assembler::{Memory, context, guest_register, op};
use crate::context::{Context, S1, S2};
use crate::emitter::Emitter;
use crate::plan::Step;
use crate::reencode::immediate;
use crate::registers::general;

const PUSHED: Access = Access {
    size: 8,
    write: true,
};
const POPPED: Access = Access {
    size: 8,
    write: false,
};
const RAX: u8 = 0;
const RBP: u8 = 5;

impl Emitter<'_> {
    pub(crate) fn push(&mut self, step: &Step) {
        if step.memory {
            let operand = self.operand(step, POPPED, false);
            self.asm.memory(op::LOAD, S2, operand);
            self.s2_group = None;
            self.push_s2(step);
        } else if step.ins.op0_kind() == OpKind::Register {
            self.push_register(step, general(step.ins.op0_register()).unwrap_or(0));
        } else {
            self.push_value(step, immediate(&step.ins, 0));
        }
    }

    fn push_register(&mut self, step: &Step, register: u8) {
        let operand = self.stack(step, -8, PUSHED);
        if register >= 14 {
            self.asm.load(S2, guest_register(register));
            self.s2_group = None;
            self.asm.memory(op::STORE, S2, operand);
        } else {
            self.asm.memory(op::STORE, register, operand);
        }
        self.move_rsp(-8);
    }

    /// Pushes S2. The stack's check may use S2 unless it is shared.
    fn push_s2(&mut self, step: &Step) {
        let shared = self.groups.stack >> self.current & 1 != 0;
        if !shared {
            self.asm.store(S2, context!(temp));
            self.retry_from_here();
        }
        let operand = self.stack(step, -8, PUSHED);
        if !shared {
            self.asm.load(S2, context!(temp));
        }
        self.asm.memory(op::STORE, S2, operand);
        self.move_rsp(-8);
    }

    pub(crate) fn push_value(&mut self, step: &Step, value: u64) {
        let operand = self.stack(step, -8, PUSHED);
        if let Ok(low) = i32::try_from(value as i64) {
            // mov qword m, imm32
            self.asm.memory(0xc7, 0, operand);
            self.asm.i32(low);
        } else {
            self.asm.constant(S2, value);
            self.s2_group = None;
            self.asm.memory(op::STORE, S2, operand);
        }
        self.move_rsp(-8);
    }

    pub(crate) fn pop(&mut self, step: &Step) {
        if step.memory {
            return self.pop_memory(step);
        }
        let register = general(step.ins.op0_register()).unwrap_or(0);
        let direct = register < 14 && register != RSP;
        let operand = self.stack(step, 0, POPPED);
        let to = if direct { register } else { S2 };
        self.asm.memory(op::LOAD, to, operand);
        if !direct {
            self.s2_group = None;
        }
        if register == RSP {
            self.asm.mov(RSP, S2);
            return;
        }
        if !direct {
            self.asm.store(S2, guest_register(register));
        }
        self.move_rsp(8);
    }

    /// POP m: an RSP in the address is the one behind the pop (SDM, POP).
    fn pop_memory(&mut self, step: &Step) {
        let operand = self.stack(step, 0, POPPED);
        self.asm.memory(op::LOAD, S1, operand);
        self.s1_stack = false;
        self.asm.store(S1, context!(temp));
        self.retry_from_here();
        if let Some(va) = self.address(step) {
            self.asm.constant(S1, va);
        } else if general(step.ins.memory_base()) == Some(RSP) {
            self.asm.lea(S1, Memory::at(S1, 8));
        }
        let operand = self.lookup(step, PUSHED, None);
        self.asm.load(S2, context!(temp));
        self.asm.memory(op::STORE, S2, operand);
        self.move_rsp(8);
    }

    pub(crate) fn leave(&mut self, step: &Step) {
        self.asm.mov(S1, RBP);
        let operand = if self.bounces() {
            self.stack(step, 0, POPPED)
        } else {
            self.lookup(step, POPPED, None)
        };
        self.asm.memory(op::LOAD, S1, operand);
        self.asm.lea(RSP, Memory::at(RBP, 8));
        self.asm.mov(RBP, S1);
    }

    /// The status flags come through LAHF and SETO; the rest from the context.
    pub(crate) fn push_flags(&mut self, step: &Step) {
        self.s2_group = None;
        self.asm.store(RAX, context!(temp) + 8);
        // lahf; seto al; movzx r15d, al; movzx eax, ah
        self.asm.bytes([0x9f, 0x0f, 0x90, 0xc0]);
        self.asm.bytes([0x44, 0x0f, 0xb6, 0xf8, 0x0f, 0xb6, 0xc4]);
        self.asm.rotate_right(S2, S2, 64 - 11);
        self.asm.add(S2, RAX);
        for (field, bit) in [(context!(interrupts_enabled), 9), (context!(direction), 10)] {
            self.asm.load(RAX, field);
            self.asm.rotate_right(RAX, RAX, 64 - bit);
            self.asm.add(S2, RAX);
        }
        for field in [context!(rflags_high), context!(alignment_check)] {
            self.asm.load(RAX, field);
            self.asm.add(S2, RAX);
        }
        self.asm.load(RAX, context!(temp) + 8);
        self.push_s2(step);
    }

    pub(crate) fn call(&mut self, step: &Step) {
        self.push_value(step, step.ins.next_ip());
        self.jump(step.ins.near_branch_target());
    }

    pub(crate) fn call_indirect(&mut self, step: &Step) {
        let next = step.ins.next_ip();
        let register = general(step.ins.op0_register()).unwrap_or(0);
        if step.memory {
            let operand = self.operand(step, POPPED, false);
            self.asm.memory(op::LOAD, S1, operand);
        } else if register == RSP {
            self.asm.mov(S1, RSP);
        } else {
            self.push_value(step, next);
            self.register_into_s1(register);
            return self.jump_indirect();
        }
        self.s1_stack = false;
        self.asm.store(S1, context!(temp));
        self.retry_from_here();
        self.push_value(step, next);
        self.asm.load(S1, context!(temp));
        self.jump_indirect();
    }

    pub(crate) fn jmp_indirect(&mut self, step: &Step) {
        if step.memory {
            let operand = self.operand(step, POPPED, false);
            self.asm.memory(op::LOAD, S1, operand);
        } else {
            self.register_into_s1(general(step.ins.op0_register()).unwrap_or(0));
        }
        self.jump_indirect();
    }

    pub(crate) fn ret(&mut self, step: &Step) {
        let operand = self.stack(step, 0, POPPED);
        self.asm.memory(op::LOAD, S1, operand);
        let extra = if step.row.immediate_size != 0 {
            immediate(&step.ins, 0) as i32
        } else {
            0
        };
        self.move_rsp(8 + extra);
        self.jump_indirect();
    }

    fn register_into_s1(&mut self, register: u8) {
        if register >= 14 {
            self.asm.load(S1, guest_register(register));
        } else {
            self.asm.mov(S1, register);
        }
    }

    fn move_rsp(&mut self, by: i32) {
        self.asm.lea(RSP, Memory::at(RSP, by));
    }
}
