//! Jumps, calls, returns and the stack in 16- and 32-bit code; the far jump that
//! ends it.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::control::{efer, vector};
use x86::descriptor;
use x86::registers::{RBP, RSP, rflags};
use x86::state::{Segment, VcpuState};

use super::{GP, Trouble};
use crate::cpu::{Cpu, Phase};
use crate::interp::segment_index;

impl Cpu {
    /// Executes `ins` if it is one of these, RIP included.
    pub(super) fn early_transfer(&mut self, ins: &Instruction) -> Result<bool, Trouble> {
        use Mnemonic as M;
        let size = stack_size(ins);
        let next = ins.next_ip() & 0xffff_ffff;
        let mut to = next;
        match ins.mnemonic() {
            M::Jmp | M::Call if ins.op0_kind() == OpKind::FarBranch16 => {
                let offset = u64::from(ins.far_branch16());
                self.far_transfer(ins, ins.far_branch_selector(), offset, 2)?;
                return Ok(true);
            }
            M::Jmp | M::Call if ins.op0_kind() == OpKind::FarBranch32 => {
                let offset = u64::from(ins.far_branch32());
                self.far_transfer(ins, ins.far_branch_selector(), offset, 4)?;
                return Ok(true);
            }
            M::Jmp | M::Call if ins.is_jmp_far_indirect() || ins.is_call_far_indirect() => {
                let (segment, at) = (segment_index(ins.memory_segment()), self.early_offset(ins));
                let offset_size = ins.memory_size().size().saturating_sub(2).min(4);
                let offset = self.early_load(segment, at, offset_size)?;
                let selector = self.early_load(segment, at + offset_size as u64, 2)? as u16;
                self.far_transfer(ins, selector, offset, offset_size)?;
                return Ok(true);
            }
            M::Jmp => to = self.near_target(ins)?,
            M::Call => {
                to = self.near_target(ins)?;
                let size = branch_size(ins);
                self.early_push(next, size)?;
            }
            M::Ret => {
                to = self.early_pop(size)?;
                if ins.op_count() > 0 {
                    self.move_stack(i64::from(ins.immediate16()));
                }
            }
            M::Retf => {
                let offset = self.early_pop(size)?;
                let selector = self.early_pop(size)? as u16;
                self.far_jump(selector, offset)?;
                if ins.op_count() > 0 {
                    self.move_stack(i64::from(ins.immediate16()));
                }
                return Ok(true);
            }
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz => {
                if self.count_branch(ins) {
                    to = ins.near_branch_target();
                }
            }
            _ if ins.is_jcc_short_or_near() => {
                if self.early_condition(ins.condition_code()) {
                    to = ins.near_branch_target();
                }
            }
            M::Push => {
                let value = match ins.op0_kind() {
                    OpKind::Register | OpKind::Memory => self.early_operand(ins, 0)?,
                    _ => ins.try_immediate(0).map_err(|_| Trouble::Lacks)?,
                };
                self.early_push(value, size)?;
            }
            M::Pop => {
                let before = self.context.gpr[RSP];
                let value = self.early_pop(size)?;
                let done = self.pop_into(ins, size, value);
                if done.is_err() {
                    self.context.gpr[RSP] = before;
                }
                done?;
            }
            M::Pushf | M::Pushfd => {
                let value = self.rflags() & !(rflags::RF | rflags::VM);
                self.early_push(value, size)?;
            }
            M::Popf | M::Popfd => {
                const CHANGED: u64 = rflags::STATUS
                    | rflags::DF
                    | rflags::IF
                    | rflags::IOPL
                    | rflags::NT
                    | rflags::AC
                    | rflags::ID;
                let value = self.early_pop(size)?;
                let changed = if size == 2 { CHANGED & 0xffff } else { CHANGED };
                let flags = self.rflags() & !changed | value & changed;
                self.set_rflags(flags);
            }
            M::Leave => {
                self.context.gpr[RSP] = self.context.gpr[RBP];
                let value = self.early_pop(size)?;
                let register = if size == 2 {
                    Register::BP
                } else {
                    Register::EBP
                };
                self.set_register(register, value);
            }
            _ => return Ok(false),
        }
        self.context.rip = to & 0xffff_ffff;
        Ok(true)
    }

    fn pop_into(&mut self, ins: &Instruction, size: usize, value: u64) -> Result<(), Trouble> {
        let register = ins.op0_register();
        match ins.op0_kind() {
            OpKind::Register if register.is_segment_register() => {
                self.early_load_segment(register, value as u16)
            }
            OpKind::Register => {
                self.set_register(register, value);
                Ok(())
            }
            _ => {
                let (segment, at) = (segment_index(ins.memory_segment()), self.early_offset(ins));
                self.early_store(segment, at, size, value)
            }
        }
    }

    fn near_target(&mut self, ins: &Instruction) -> Result<u64, Trouble> {
        match ins.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 => Ok(ins.near_branch_target()),
            OpKind::Register | OpKind::Memory => self.early_operand(ins, 0),
            _ => Err(Trouble::Lacks),
        }
    }

    fn count_branch(&mut self, ins: &Instruction) -> bool {
        use Mnemonic as M;
        let register = match ins.mnemonic() {
            M::Jcxz => Register::CX,
            M::Jecxz => Register::ECX,
            _ if loops_by_cx(ins) => Register::CX,
            _ => Register::ECX,
        };
        if matches!(ins.mnemonic(), M::Jcxz | M::Jecxz) {
            return self.register(register) == 0;
        }
        let left = self.register(register).wrapping_sub(1);
        self.set_register(register, left);
        let zero = self.context.rflags & rflags::ZF != 0;
        self.register(register) != 0
            && match ins.mnemonic() {
                M::Loope => zero,
                M::Loopne => !zero,
                _ => true,
            }
    }

    fn far_transfer(
        &mut self,
        ins: &Instruction,
        selector: u16,
        offset: u64,
        size: usize,
    ) -> Result<(), Trouble> {
        if ins.mnemonic() == Mnemonic::Call {
            let old = self.regs.segments[VcpuState::CS].selector;
            self.early_push(old.into(), size)?;
            self.early_push(ins.next_ip(), size)?;
        }
        self.far_jump(selector, offset)
    }

    /// Loads CS and RIP; 64-bit code goes on in translation.
    fn far_jump(&mut self, selector: u16, offset: u64) -> Result<(), Trouble> {
        let old = self.regs.segments[VcpuState::CS];
        if !self.protected() {
            self.regs.segments[VcpuState::CS] = Segment {
                selector,
                base: u64::from(selector) << 4,
                ..old
            };
            self.context.rip = offset;
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(GP);
        }
        let found = self.early_descriptor(selector)?;
        let rights = found.rights();
        let code = descriptor::NOT_SYSTEM | descriptor::CODE;
        if rights & descriptor::NOT_SYSTEM == 0 {
            // Gates and tasks.
            return Err(Trouble::Lacks);
        }
        if rights & code != code || found.dpl() != 0 {
            return Err(GP);
        }
        if !found.present() {
            return Err(Trouble::Fault(vector::NP));
        }
        let long = self.regs.efer & efer::LMA != 0 && rights & descriptor::LONG != 0;
        if long && rights & descriptor::BIG != 0 {
            return Err(GP);
        }
        self.regs.segments[VcpuState::CS] = found.segment(selector & !3, 0);
        self.context.rip = offset;
        if long {
            self.set_cpl(0);
            self.flush_all();
            self.phase = Phase::Long;
            tracing::debug!(vcpu = self.id, rip = offset, "in 64-bit mode");
        }
        Ok(())
    }
}

/// LOOP counts in CX or ECX by its address size.
fn loops_by_cx(ins: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(
        ins.code(),
        C::Loop_rel8_16_CX
            | C::Loop_rel8_32_CX
            | C::Loope_rel8_16_CX
            | C::Loope_rel8_32_CX
            | C::Loopne_rel8_16_CX
            | C::Loopne_rel8_32_CX
    )
}

/// Bytes that a stack instruction, or a return, moves.
fn stack_size(ins: &Instruction) -> usize {
    use iced_x86::Code as C;
    match ins.code() {
        C::Retnw | C::Retnw_imm16 | C::Retfw | C::Retfw_imm16 => 2,
        C::Leavew => 2,
        C::Retnd | C::Retnd_imm16 | C::Retfd | C::Retfd_imm16 => 4,
        _ => match ins.stack_pointer_increment().unsigned_abs() {
            2 => 2,
            _ => 4,
        },
    }
}

/// Bytes that a near call pushes.
fn branch_size(ins: &Instruction) -> usize {
    match ins.stack_pointer_increment() {
        -2 => 2,
        _ => 4,
    }
}
