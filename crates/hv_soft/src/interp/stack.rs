//! Stack instructions, near and far transfers, IRET.
//!
//! RSP changes after every access of an instruction has succeeded.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};
use x86::control::vector;
use x86::paging;
use x86::registers::{RBP, RCX, RSP, rflags};
use x86::state::{Segment, VcpuState};

use super::Flow;
use super::segment::segment_index;
use crate::cpu::Run;
use crate::exceptions::{Fault, GP, UD};

impl Run<'_> {
    pub(super) fn stack_or_jump(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Push => {
                let size = width(ins);
                let value = match ins.op0_kind() {
                    OpKind::Register if ins.op0_register().is_segment_register() => {
                        u64::from(self.regs.segments[segment_index(ins.op0_register())].selector)
                    }
                    _ => self.operand(ins, 0, size)?,
                };
                self.push(value, size)?;
            }
            M::Pop => self.pop(ins)?,
            M::Pushf | M::Pushfq => {
                let value = self.rflags() & !(rflags::RF | rflags::VM);
                self.push(value, width(ins))?;
            }
            M::Popf | M::Popfq => {
                let size = width(ins);
                let value = self.stack_load(0, size)?;
                self.context.gpr[RSP] = self.context.gpr[RSP].wrapping_add(size as u64);
                self.pop_flags(value, size);
            }
            M::Leave => {
                let frame = self.context.gpr[RBP];
                let size = width(ins);
                let value = self
                    .load(frame, size)
                    .map_err(|fault| fault.on_stack(true))?;
                self.context.gpr[RSP] = frame.wrapping_add(size as u64);
                self.set_base_pointer(value, size);
            }
            M::Enter => self.enter_frame(ins)?,
            M::Call | M::Jmp => return self.call_or_jump(ins),
            M::Ret => {
                let to = self.stack_load(0, 8)?;
                jump_target(to)?;
                let extra = if ins.op_count() > 0 {
                    u64::from(ins.immediate16())
                } else {
                    0
                };
                self.context.gpr[RSP] = self.context.gpr[RSP].wrapping_add(8 + extra);
                self.context.rip = to;
                return Ok(Flow::Jumped);
            }
            M::Retf => return self.far_return(ins),
            M::Iretq => return self.interrupt_return(8),
            M::Iretd => return self.interrupt_return(4),
            M::Iret => return self.interrupt_return(2),
            M::Loop | M::Loope | M::Loopne => {
                let count = self.count(ins).wrapping_sub(1);
                self.set_count(ins, count);
                let zero = self.context.rflags & rflags::ZF != 0;
                let taken = self.count(ins) != 0
                    && match ins.mnemonic() {
                        M::Loope => zero,
                        M::Loopne => !zero,
                        _ => true,
                    };
                return self.branch(ins, taken);
            }
            M::Jrcxz | M::Jecxz => {
                let taken = self.count(ins) == 0;
                return self.branch(ins, taken);
            }
            _ if ins.is_jcc_short_or_near() => {
                let taken = condition(ins.condition_code(), self.context.rflags);
                return self.branch(ins, taken);
            }
            _ => return Err(UD),
        }
        Ok(Flow::Next)
    }

    fn branch(&mut self, ins: &Instruction, taken: bool) -> Result<Flow, Fault> {
        if !taken {
            return Ok(Flow::Next);
        }
        self.context.rip = jump_target(ins.near_branch_target())?;
        Ok(Flow::Jumped)
    }

    fn narrow_count(ins: &Instruction) -> bool {
        use iced_x86::Code as C;
        matches!(
            ins.code(),
            C::Loop_rel8_64_ECX | C::Loope_rel8_64_ECX | C::Loopne_rel8_64_ECX | C::Jecxz_rel8_64
        )
    }

    fn count(&self, ins: &Instruction) -> u64 {
        let count = self.context.gpr[RCX];
        if Self::narrow_count(ins) {
            count & 0xffff_ffff
        } else {
            count
        }
    }

    fn set_count(&mut self, ins: &Instruction, count: u64) {
        self.context.gpr[RCX] = if Self::narrow_count(ins) {
            count & 0xffff_ffff
        } else {
            count
        };
    }

    /// Loads from the stack, `offset` bytes above RSP.
    fn stack_load(&mut self, offset: u64, size: usize) -> Result<u64, Fault> {
        let at = self.context.gpr[RSP].wrapping_add(offset);
        self.load(at, size).map_err(|fault| fault.on_stack(true))
    }

    fn push(&mut self, value: u64, size: usize) -> Result<(), Fault> {
        let at = self.context.gpr[RSP].wrapping_sub(size as u64);
        self.store(at, size, value)
            .map_err(|fault| fault.on_stack(true))?;
        self.context.gpr[RSP] = at;
        Ok(())
    }

    fn pop(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let size = width(ins);
        let before = self.context.gpr[RSP];
        let value = self.stack_load(0, size)?;
        let after = before.wrapping_add(size as u64);
        match ins.op0_kind() {
            OpKind::Register if ins.op0_register().is_segment_register() => {
                self.load_segment(segment_index(ins.op0_register()), value as u16)?;
                self.context.gpr[RSP] = after;
            }
            OpKind::Register => {
                // POP RSP: the value wins.
                self.context.gpr[RSP] = after;
                self.set_register(ins.op0_register(), value);
            }
            _ => {
                // An RSP in the address is the one behind the pop.
                self.context.gpr[RSP] = after;
                if let Err(fault) = self.set_operand(ins, 0, size, value) {
                    self.context.gpr[RSP] = before;
                    return Err(fault);
                }
            }
        }
        Ok(())
    }

    fn set_base_pointer(&mut self, value: u64, size: usize) {
        let slot = &mut self.context.gpr[RBP];
        *slot = if size == 2 {
            *slot & !0xffff | value & 0xffff
        } else {
            value
        };
    }

    /// ENTER: pushes RBP and, for nested procedures, the frame pointers of the outer
    /// ones. It fails where a store to the new top of the stack would.
    fn enter_frame(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let size = width(ins);
        let (before, frame) = (self.context.gpr[RSP], self.context.gpr[RBP]);
        let result = self.push_frames(frame, size, ins.immediate8_2nd() & 31);
        let end = self.context.gpr[RSP].wrapping_sub(u64::from(ins.immediate16()));
        let mode = self.mode();
        let result = result.and_then(|top| {
            self.check_write(end, size as u64, mode)
                .map_err(|fault| fault.on_stack(true))?;
            Ok(top)
        });
        match result {
            Ok(top) => {
                self.context.gpr[RSP] = end;
                self.set_base_pointer(top, size);
                Ok(())
            }
            Err(fault) => {
                self.context.gpr[RSP] = before;
                Err(fault)
            }
        }
    }

    fn push_frames(&mut self, frame: u64, size: usize, depth: u8) -> Result<u64, Fault> {
        self.push(frame, size)?;
        let top = self.context.gpr[RSP];
        for level in 1..depth {
            let at = frame.wrapping_sub(u64::from(level) * size as u64);
            let outer = self.load(at, size).map_err(|fault| fault.on_stack(true))?;
            self.push(outer, size)?;
        }
        if depth != 0 {
            self.push(top, size)?;
        }
        Ok(top)
    }

    /// POPF: IF only changes at CPL <= IOPL, IOPL only at CPL 0.
    fn pop_flags(&mut self, value: u64, size: usize) {
        let old = self.rflags();
        let iopl = (old & rflags::IOPL) >> 12;
        let mut kept = rflags::VM | rflags::RF;
        if self.regs.cpl != 0 {
            kept |= rflags::IOPL;
        }
        if u64::from(self.regs.cpl) > iopl {
            kept |= rflags::IF;
        }
        if size == 2 {
            kept |= !0xffff;
        }
        self.set_rflags(value & !kept | old & kept & !(rflags::VM | rflags::RF));
        self.context.pending |= u64::from(self.apic.deliverable().is_some());
    }

    fn call_or_jump(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use iced_x86::Code as C;
        let far = matches!(
            ins.code(),
            C::Jmp_m1616
                | C::Jmp_m1632
                | C::Jmp_m1664
                | C::Call_m1616
                | C::Call_m1632
                | C::Call_m1664
        );
        if far {
            return self.far_transfer(ins);
        }
        let target = match ins.op0_kind() {
            OpKind::Register | OpKind::Memory => self.operand(ins, 0, 8)?,
            _ => ins.near_branch_target(),
        };
        jump_target(target)?;
        if ins.mnemonic() == Mnemonic::Call {
            self.push(ins.next_ip(), 8)?;
        }
        self.context.rip = target;
        Ok(Flow::Jumped)
    }

    /// JMP and CALL through a far pointer in memory, to the same privilege.
    fn far_transfer(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        let size = ins.memory_size().size().saturating_sub(2).clamp(2, 8);
        let at = self.address(ins);
        let target = self.load(at, size)?;
        let selector = self.load(at.wrapping_add(size as u64), 2)? as u16;
        let cpl = self.regs.cpl;
        let segment = self.code_segment(selector, cpl)?;
        jump_target(target)?;
        if ins.mnemonic() == Mnemonic::Call {
            let old = u64::from(self.regs.segments[VcpuState::CS].selector);
            let before = self.context.gpr[RSP];
            self.push(old, size)?;
            if let Err(fault) = self.push(ins.next_ip(), size) {
                self.context.gpr[RSP] = before;
                return Err(fault);
            }
        }
        self.regs.segments[VcpuState::CS] = segment;
        self.context.rip = target;
        Ok(Flow::Jumped)
    }

    fn far_return(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use iced_x86::Code as C;
        let size: u64 = match ins.code() {
            C::Retfq | C::Retfq_imm16 => 8,
            C::Retfd | C::Retfd_imm16 => 4,
            _ => 2,
        };
        let extra = if ins.op_count() > 0 {
            u64::from(ins.immediate16())
        } else {
            0
        };
        let rip = self.stack_load(0, size as usize)?;
        let selector = self.stack_load(size, size as usize)? as u16;
        let rpl = (selector & 3) as u8;
        if rpl < self.regs.cpl {
            return Err(Fault::Exception(vector::GP, Some(u32::from(selector & !3))));
        }
        let segment = self.code_segment(selector, rpl)?;
        jump_target(rip)?;
        let rsp = self.context.gpr[RSP].wrapping_add(2 * size + extra);
        if rpl == self.regs.cpl {
            self.context.gpr[RSP] = rsp;
        } else {
            let outer = self.stack_load(2 * size + extra, size as usize)?;
            let stack = self.stack_load(3 * size + extra, size as usize)? as u16;
            self.return_outwards(rpl, stack)?;
            self.context.gpr[RSP] = outer.wrapping_add(extra);
        }
        self.regs.segments[VcpuState::CS] = segment;
        self.context.rip = rip;
        Ok(Flow::Jumped)
    }

    /// IRET (SDM vol. 2A): always pops five words in 64-bit mode.
    fn interrupt_return(&mut self, size: usize) -> Result<Flow, Fault> {
        if self.context.rflags_high & rflags::NT != 0 {
            return Err(GP);
        }
        let mut words = [0u64; 5];
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.stack_load((size * i) as u64, size)?;
        }
        let [rip, cs, flags, rsp, ss] = words;
        let (cs, ss) = (cs as u16, ss as u16);
        let rpl = (cs & 3) as u8;
        if rpl < self.regs.cpl {
            return Err(Fault::Exception(vector::GP, Some(u32::from(cs & !3))));
        }
        let segment = self.code_segment(cs, rpl)?;
        jump_target(rip)?;
        let old = self.rflags();
        let mut kept = rflags::VM;
        if self.regs.cpl != 0 {
            kept |= rflags::IOPL;
            if u64::from(self.regs.cpl) > (old & rflags::IOPL) >> 12 {
                kept |= rflags::IF;
            }
        }
        if size == 2 {
            kept |= !0xffff;
        }
        self.return_outwards(rpl, ss)?;
        self.regs.segments[VcpuState::CS] = segment;
        self.context.gpr[RSP] = rsp;
        self.context.rip = rip;
        self.set_rflags(flags & !kept | old & kept);
        self.nmi_blocked = false;
        self.context.pending |= u64::from(self.apic.deliverable().is_some() || self.nmi_pending);
        Ok(Flow::Jumped)
    }

    /// Loads SS for privilege `cpl`, which becomes the present one.
    fn return_outwards(&mut self, cpl: u8, stack: u16) -> Result<(), Fault> {
        let old = self.regs.cpl;
        if stack & !3 == 0 {
            if cpl == 3 || (stack & 3) as u8 != cpl {
                return Err(GP);
            }
            self.regs.segments[VcpuState::SS] = Segment {
                selector: stack,
                ..Segment::default()
            };
            self.set_cpl(cpl);
        } else {
            self.set_cpl(cpl);
            if let Err(fault) = self.load_segment(VcpuState::SS, stack) {
                self.set_cpl(old);
                return Err(fault);
            }
        }
        if cpl > old {
            // Data segments of the inner privilege are lost (SDM, IRET).
            for index in [VcpuState::ES, VcpuState::DS, VcpuState::FS, VcpuState::GS] {
                let segment = self.regs.segments[index];
                let dpl = (segment.rights >> 5) as u8 & 3;
                let conforming = segment.rights & 0x1c == 0x1c;
                if segment.rights & 0x80 != 0 && dpl < cpl && !conforming {
                    self.regs.segments[index] = Segment::default();
                }
            }
        }
        Ok(())
    }
}

/// Whether a condition holds with these flags (SDM vol. 1, appendix B).
fn condition(code: ConditionCode, flags: u64) -> bool {
    use ConditionCode as C;
    let set = |flag| flags & flag != 0;
    let less = set(rflags::SF) != set(rflags::OF);
    match code {
        C::None => true,
        C::o => set(rflags::OF),
        C::no => !set(rflags::OF),
        C::b => set(rflags::CF),
        C::ae => !set(rflags::CF),
        C::e => set(rflags::ZF),
        C::ne => !set(rflags::ZF),
        C::be => set(rflags::CF | rflags::ZF),
        C::a => !set(rflags::CF | rflags::ZF),
        C::s => set(rflags::SF),
        C::ns => !set(rflags::SF),
        C::p => set(rflags::PF),
        C::np => !set(rflags::PF),
        C::l => less,
        C::ge => !less,
        C::le => less || set(rflags::ZF),
        C::g => !less && !set(rflags::ZF),
    }
}

/// Bytes that a stack instruction moves.
fn width(ins: &Instruction) -> usize {
    use iced_x86::Code as C;
    match ins.code() {
        C::Pushfw
        | C::Popfw
        | C::Leavew
        | C::Enterw_imm16_imm8
        | C::Push_r16
        | C::Pop_r16
        | C::Push_rm16
        | C::Pop_rm16
        | C::Push_imm16
        | C::Pushw_imm8
        | C::Pushw_FS
        | C::Pushw_GS
        | C::Popw_FS
        | C::Popw_GS => 2,
        _ => 8,
    }
}

/// #GP(0) unless canonical.
pub(super) fn jump_target(target: u64) -> Result<u64, Fault> {
    if paging::is_canonical(target) {
        Ok(target)
    } else {
        Err(GP)
    }
}
