//! Segment registers and descriptor tables in 64-bit mode (SDM vol. 3, §3.4, §3.5).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::control::vector;
use x86::descriptor::{self, Descriptor};
use x86::paging;
use x86::registers::rflags;
use x86::state::{DescriptorTable, Segment, VcpuState};

use super::Flow;
use crate::cpu::{Cpu, Run};
use crate::exceptions::{Fault, GP, UD};

fn selector_fault(exception: u8, selector: u16) -> Fault {
    Fault::Exception(exception, Some(u32::from(selector & !3)))
}

/// A guest's user sees a program that dies of #GP, which needs an explanation: once, as
/// guests could ask for it for ever.
pub(super) fn say_once_that_32_bit_code_is_refused(rip: u64) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            rip = format_args!("{rip:#x}"),
            "the guest wants to run 32-bit code and gets #GP: the software engine runs 64-bit code only"
        );
    });
}

impl Cpu {
    /// Loads ES, SS, DS, FS or GS.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Fault> {
        let stack = index == VcpuState::SS;
        let rpl = (selector & 3) as u8;
        let segment = if selector & !3 == 0 {
            if stack && (self.regs.cpl == 3 || rpl != self.regs.cpl) {
                return Err(GP);
            }
            Segment {
                selector,
                ..Segment::default()
            }
        } else {
            let Some(found) = self.descriptor(selector)? else {
                return Err(selector_fault(vector::GP, selector));
            };
            let rights = found.rights();
            let code = rights & descriptor::CODE != 0;
            let allowed = if rights & descriptor::NOT_SYSTEM == 0 {
                false
            } else if stack {
                !code
                    && rights & descriptor::READ_WRITE != 0
                    && found.dpl() == self.regs.cpl
                    && rpl == self.regs.cpl
            } else {
                let conforming = code && rights & descriptor::CONFORMING != 0;
                let readable = !code || rights & descriptor::READ_WRITE != 0;
                readable && (conforming || found.dpl() >= self.regs.cpl.max(rpl))
            };
            if !allowed {
                return Err(selector_fault(vector::GP, selector));
            }
            if !found.present() {
                let exception = if stack { vector::SS } else { vector::NP };
                return Err(selector_fault(exception, selector));
            }
            self.mark_accessed(selector, found)?;
            found.segment(selector, 0)
        };
        match index {
            VcpuState::FS => self.context.fs_base = segment.base,
            VcpuState::GS => self.context.gs_base = segment.base,
            _ => {}
        }
        self.regs.segments[index] = segment;
        Ok(())
    }

    fn mark_accessed(&mut self, selector: u16, found: Descriptor) -> Result<(), Fault> {
        if found.rights() & descriptor::ACCESSED != 0 {
            return Ok(());
        }
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let rights = (found.0 >> 40) as u8 | 1;
        self.store_system(at.wrapping_add(5), &[rights])
    }

    /// The code segment for a far transfer to `selector` that ends at `cpl`: 64-bit
    /// code only, this engine runs no other.
    pub(crate) fn code_segment(&mut self, selector: u16, cpl: u8) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            return Err(GP);
        }
        let Some(found) = self.descriptor(selector)? else {
            return Err(selector_fault(vector::GP, selector));
        };
        let rights = found.rights();
        let long = descriptor::NOT_SYSTEM | descriptor::CODE | descriptor::LONG;
        let conforming = rights & descriptor::CONFORMING != 0;
        let privilege = if conforming {
            found.dpl() <= cpl
        } else {
            found.dpl() == cpl
        };
        if rights & (long | descriptor::BIG) != long || !privilege {
            if rights & long == descriptor::NOT_SYSTEM | descriptor::CODE {
                say_once_that_32_bit_code_is_refused(self.context.rip);
            }
            return Err(selector_fault(vector::GP, selector));
        }
        if !found.present() {
            return Err(selector_fault(vector::NP, selector));
        }
        Ok(found.segment(selector & !3 | u16::from(cpl), 0))
    }

    fn load_system_segment(&mut self, selector: u16, kind: u16) -> Result<Segment, Fault> {
        let bad = selector_fault(vector::GP, selector);
        if selector & 4 != 0 {
            return Err(bad);
        }
        let Some(at) = self.descriptor_address(selector, 16) else {
            return Err(bad);
        };
        let found = Descriptor(self.load_system(at)?);
        let upper = self.load_system(at.wrapping_add(8))?;
        if found.rights() & descriptor::NOT_SYSTEM != 0 || found.kind() != kind {
            return Err(bad);
        }
        if !found.present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let mut segment = found.segment(selector, upper & 0xffff_ffff);
        if !paging::is_canonical(segment.base) {
            return Err(bad);
        }
        if kind == descriptor::TYPE_TSS {
            let busy = (found.0 >> 40) as u8 | 2;
            self.store_system(at.wrapping_add(5), &[busy])?;
            segment.rights |= 2;
        }
        Ok(segment)
    }
}

impl Run<'_> {
    pub(super) fn segment(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Mov => self.move_segment(ins)?,
            M::Lfs | M::Lgs | M::Lss => self.far_pointer(ins)?,
            M::Lgdt | M::Lidt => {
                self.privileged()?;
                let at = self.address(ins);
                let limit = self.load(at, 2)? as u16;
                let base = self.load(at.wrapping_add(2), 8)?;
                if !paging::is_canonical(base) {
                    return Err(GP);
                }
                let table = DescriptorTable { base, limit };
                match ins.mnemonic() {
                    M::Lgdt => self.regs.gdt = table,
                    _ => self.regs.idt = table,
                }
            }
            M::Sgdt | M::Sidt => {
                self.umip()?;
                let table = if ins.mnemonic() == M::Sgdt {
                    self.regs.gdt
                } else {
                    self.regs.idt
                };
                let mut image = [0; 10];
                image[..2].copy_from_slice(&table.limit.to_le_bytes());
                image[2..].copy_from_slice(&table.base.to_le_bytes());
                let at = self.address(ins);
                self.write_bytes(at, &image)?;
            }
            M::Ltr => {
                self.privileged()?;
                let selector = self.operand(ins, 0, 2)? as u16;
                if selector & !3 == 0 {
                    return Err(GP);
                }
                self.regs.tr = self.load_system_segment(selector, descriptor::TYPE_TSS)?;
            }
            M::Lldt => {
                self.privileged()?;
                let selector = self.operand(ins, 0, 2)? as u16;
                self.regs.ldtr = if selector & !3 == 0 {
                    Segment {
                        selector,
                        ..Segment::default()
                    }
                } else {
                    self.load_system_segment(selector, descriptor::TYPE_LDT)?
                };
            }
            M::Str | M::Sldt if self.umip().is_err() => return Err(GP),
            M::Str => self.store_selector(ins, self.cpu.regs.tr.selector)?,
            M::Sldt => self.store_selector(ins, self.cpu.regs.ldtr.selector)?,
            M::Lsl | M::Lar => self.load_limit_or_rights(ins)?,
            M::Verr | M::Verw => {
                let selector = self.operand(ins, 0, 2)? as u16;
                let write = ins.mnemonic() == M::Verw;
                let ok = self.visible(selector)?.is_some_and(|found| {
                    let rights = found.rights();
                    let code = rights & descriptor::CODE != 0;
                    let able = rights & descriptor::READ_WRITE != 0;
                    rights & descriptor::NOT_SYSTEM != 0
                        && if write { !code && able } else { !code || able }
                });
                self.set_zero_flag(ok);
            }
            _ => return Err(UD),
        }
        Ok(Flow::Next)
    }

    fn move_segment(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let to = ins.op0_register();
        if ins.op0_kind() == OpKind::Register && to.is_segment_register() {
            if to == Register::CS {
                return Err(UD);
            }
            let selector = self.operand(ins, 1, 2)? as u16;
            self.load_segment(segment_index(to), selector)?;
            if to == Register::SS {
                self.shadow_of_stack_load(ins.next_ip());
            }
            return Ok(());
        }
        let selector = self.regs.segments[segment_index(ins.op1_register())].selector;
        self.store_selector(ins, selector)
    }

    /// A selector goes into two bytes of memory, or into a register of any size.
    fn store_selector(&mut self, ins: &Instruction, selector: u16) -> Result<(), Fault> {
        self.set_operand(ins, 0, 2, u64::from(selector))
    }

    fn far_pointer(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let register = ins.op0_register();
        let at = self.address(ins);
        let offset = self.load(at, register.size())?;
        let selector = self.load(at.wrapping_add(register.size() as u64), 2)? as u16;
        let index = match ins.mnemonic() {
            Mnemonic::Lfs => VcpuState::FS,
            Mnemonic::Lgs => VcpuState::GS,
            _ => VcpuState::SS,
        };
        self.load_segment(index, selector)?;
        self.set_register(register, offset);
        Ok(())
    }

    /// The descriptor of a selector, if the present privilege may know of it.
    fn visible(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let privilege = self.regs.cpl.max((selector & 3) as u8);
        Ok(self.descriptor(selector)?.filter(|found| {
            let conforming = descriptor::NOT_SYSTEM | descriptor::CODE | descriptor::CONFORMING;
            found.rights() & conforming == conforming || found.dpl() >= privilege
        }))
    }

    fn load_limit_or_rights(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let selector = self.operand(ins, 1, 2)? as u16;
        let limit = ins.mnemonic() == Mnemonic::Lsl;
        let found = self.visible(selector)?.filter(|found| {
            found.rights() & descriptor::NOT_SYSTEM != 0
                || matches!(
                    found.kind(),
                    descriptor::TYPE_LDT | descriptor::TYPE_TSS | descriptor::TYPE_TSS_BUSY
                )
                || (!limit && found.kind() == 12)
        });
        if let Some(found) = found {
            let value = if limit {
                u64::from(found.limit())
            } else {
                found.0 >> 32 & 0x00f0_ff00
            };
            self.set_register(ins.op0_register(), value);
        }
        self.set_zero_flag(found.is_some());
        Ok(())
    }

    fn set_zero_flag(&mut self, set: bool) {
        self.context.rflags = self.context.rflags & !rflags::ZF | u64::from(set) << 6;
    }
}

/// Index into [`VcpuState::segments`].
pub(crate) fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => VcpuState::ES,
        Register::CS => VcpuState::CS,
        Register::SS => VcpuState::SS,
        Register::DS => VcpuState::DS,
        Register::FS => VcpuState::FS,
        _ => VcpuState::GS,
    }
}
