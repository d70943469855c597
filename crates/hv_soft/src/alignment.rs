//! Alignment checks (SDM vol. 3, §6.15, #AC): at CPL 3, with CR0.AM and RFLAGS.AC,
//! each instruction is looked at before it is executed, on its own.
//!
//! As CPUs do it: operands of 16 bytes and more that may be unaligned are not
//! checked; the check comes before page faults, and behind #GP.

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, Register};
use x86::control::{cr0, vector};
use x86::paging;
use x86::registers::RCX;

use crate::cpu::{Cpu, Run};
use crate::exceptions::Fault;

impl Cpu {
    /// Whether accesses must be aligned now.
    #[inline]
    pub(crate) fn checks_alignment(&self) -> bool {
        self.context.alignment_check != 0 && self.regs.cpl == 3 && self.regs.cr0 & cr0::AM != 0
    }
}

impl Run<'_> {
    /// #AC where an access of `ins` would be misaligned.
    pub(crate) fn check_alignment(&self, ins: &Instruction) -> Result<(), Fault> {
        let repeats = ins.is_string_instruction()
            && (ins.has_rep_prefix() || ins.has_repne_prefix())
            && self.context.gpr[RCX] == 0;
        if repeats {
            return Ok(());
        }
        let mut factory = InstructionInfoFactory::new();
        for memory in factory.info(ins).used_memory() {
            if memory.access() == OpAccess::NoMemAccess {
                continue;
            }
            let value = |register: Register, _, _| {
                Some(if register.is_segment_register() {
                    self.segment_base(register)
                } else {
                    self.register(register)
                })
            };
            let Some(va) = memory.virtual_address(0, value) else {
                continue;
            };
            let wanted = alignment(memory.memory_size().size());
            if va & (wanted - 1) != 0 && paging::is_canonical(va) {
                return Err(Fault::Exception(vector::AC, Some(0)));
            }
        }
        Ok(())
    }
}

/// What an operand of so many bytes must be aligned to.
fn alignment(size: usize) -> u64 {
    match size {
        0 | 1 => 1,
        2 => 2,
        8 | 10 => 8,
        16 | 32 | 64 => 1,
        _ => 4,
    }
}
