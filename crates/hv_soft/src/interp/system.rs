//! System instructions: calls into and out of the kernel, control registers, MSRs,
//! CPUID, HLT, TLB maintenance, FXSAVE.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::control::{cr0, cr4, efer, vector};
use x86::features::Feature;
use x86::paging;
use x86::registers::{R11, RAX, RBX, RCX, RDX, rflags};

use super::Flow;
use super::segment::say_once_that_32_bit_code_is_refused;
use crate::cpu::Run;
use crate::enter::{Fpu, MXCSR_MASK, fxrstor, fxsave};
use crate::exceptions::{Fault, GP, Source, UD};

pub(crate) const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
pub(crate) const CR4_KNOWN: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::PCIDE
    | cr4::SMEP
    | cr4::SMAP;
/// Bytes of the FXSAVE image that hold something.
const FXSAVE_USED: usize = 416;

impl Run<'_> {
    pub(super) fn system_call(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Syscall => {
                if self.regs.efer & efer::SCE == 0 {
                    return Err(UD);
                }
                let flags = self.rflags();
                self.context.gpr[RCX] = ins.next_ip();
                self.context.gpr[R11] = flags & !rflags::RF;
                let fmask = self.regs.fmask;
                self.set_rflags(flags & !fmask & !rflags::RF);
                self.load_call_segments();
                self.context.rip = self.regs.lstar;
                self.step_by_new_flags();
            }
            M::Sysretq => {
                self.privileged()?;
                if self.regs.efer & efer::SCE == 0 {
                    return Err(UD);
                }
                let rip = self.context.gpr[RCX];
                if !paging::is_canonical(rip) {
                    return Err(GP);
                }
                self.load_return_segments();
                let flags = self.context.gpr[R11] & 0x3c7fd7;
                self.set_rflags(flags);
                self.context.rip = rip;
                self.step_by_new_flags();
                self.context.pending |= u64::from(self.apic.deliverable().is_some());
            }
            // To 32-bit code, which this engine does not run.
            M::Sysret => {
                say_once_that_32_bit_code_is_refused(ins.ip());
                return Err(GP);
            }
            M::Int3 | M::Int | M::Int1 => {
                let number = match ins.mnemonic() {
                    M::Int3 => vector::BP,
                    M::Int => ins.immediate8(),
                    _ => vector::DB,
                };
                self.context.rip = ins.next_ip();
                let source = if ins.mnemonic() == M::Int1 {
                    Source::Hardware
                } else {
                    Source::Software
                };
                if let Err(fault) = self.deliver(number, None, source) {
                    self.context.rip = ins.ip();
                    return Err(fault);
                }
            }
            _ => return Err(UD),
        }
        Ok(Flow::Jumped)
    }

    pub(super) fn system(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Hlt => {
                self.privileged()?;
                self.halted = true;
                self.context.pending = 1;
            }
            M::Sti => {
                self.sti_allowed()?;
                if self.context.interrupts_enabled == 0 {
                    self.context.interrupts_enabled = 1;
                    self.context.shadow = ins.next_ip();
                }
                self.context.pending |= u64::from(self.apic.deliverable().is_some());
            }
            M::Stac | M::Clac => {
                if self.regs.cpl != 0 {
                    return Err(UD);
                }
                let on = ins.mnemonic() == M::Stac;
                self.context.alignment_check = if on { rflags::AC } else { 0 };
            }
            M::Cli => {
                self.sti_allowed()?;
                self.context.interrupts_enabled = 0;
            }
            M::Cpuid => {
                let (leaf, sub) = (self.context.gpr[RAX] as u32, self.context.gpr[RCX] as u32);
                let answer = self.cpuid(leaf, sub);
                for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(answer) {
                    self.context.gpr[register] = u64::from(value);
                }
            }
            M::Rdmsr => {
                self.privileged()?;
                let value = self.context.gpr[RCX] as u32;
                let value = self.read_msr(value)?;
                self.context.gpr[RAX] = value & 0xffff_ffff;
                self.context.gpr[RDX] = value >> 32;
            }
            M::Wrmsr => {
                self.privileged()?;
                let value = self.context.gpr[RAX] & 0xffff_ffff | self.context.gpr[RDX] << 32;
                let index = self.context.gpr[RCX] as u32;
                self.write_msr(index, value)?;
            }
            M::Rdtsc | M::Rdtscp => {
                if self.regs.cr4 & cr4::TSD != 0 && self.regs.cpl != 0 {
                    return Err(GP);
                }
                let now = self.clock.now();
                self.context.gpr[RAX] = now & 0xffff_ffff;
                self.context.gpr[RDX] = now >> 32;
                if ins.mnemonic() == M::Rdtscp {
                    self.context.gpr[RCX] = self.context.tsc_aux;
                }
            }
            M::Rdpid => {
                let value = self.context.tsc_aux;
                self.set_register(ins.op0_register(), value);
            }
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => self.segment_bases(ins)?,
            M::Swapgs => {
                self.privileged()?;
                let context = &mut *self.context;
                std::mem::swap(&mut context.gs_base, &mut context.kernel_gs_base);
            }
            M::Clts => {
                self.privileged()?;
                self.regs.cr0 &= !cr0::TS;
                self.units_changed();
            }
            M::Invlpg => {
                self.privileged()?;
                let at = self.address(ins);
                self.flush_page(at);
            }
            M::Invpcid => self.invalidate_by_pcid(ins)?,
            M::Wbinvd | M::Invd => self.privileged()?,
            M::Smsw => {
                self.umip()?;
                let value = self.regs.cr0;
                self.set_operand(ins, 0, 2, value)?;
            }
            M::Lmsw => {
                self.privileged()?;
                let value = self.operand(ins, 0, 2)? & 0xf;
                let kept = self.regs.cr0 & !0xe;
                self.set_cr0(kept | value)?;
            }
            M::Fxsave | M::Fxsave64 => self.fxsave(ins)?,
            M::Fxrstor | M::Fxrstor64 => self.fxrstor(ins)?,
            // CPUID shows KVM, so hypercalls do not fault; there are none to serve
            // (Documentation/virt/kvm/x86/hypercalls.rst: -KVM_ENOSYS, -KVM_EPERM).
            M::Vmcall | M::Vmmcall => {
                let refusal = if self.regs.cpl == 0 { -1000 } else { -1 };
                self.context.gpr[RAX] = i64::cast_unsigned(refusal);
            }
            // Caches and TLB hints have nothing to do here.
            M::Wait | M::Clflush | M::Clflushopt | M::Clwb | M::Pause | M::Nop | M::Reservednop => {
            }
            _ => {
                tracing::debug!(%ins, rip = format_args!("{:#x}", ins.ip()), "not executed");
                return Err(UD);
            }
        }
        Ok(Flow::Next)
    }

    /// RDFSBASE and its family, where CR4 allows them.
    fn segment_bases(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let register = ins.op0_register();
        let value = self.register(register);
        if !paging::is_canonical(value)
            && matches!(ins.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase)
        {
            return Err(GP);
        }
        let (fs_base, gs_base) = (self.context.fs_base, self.context.gs_base);
        match ins.mnemonic() {
            Mnemonic::Rdfsbase => self.set_register(register, fs_base),
            Mnemonic::Rdgsbase => self.set_register(register, gs_base),
            Mnemonic::Wrfsbase => self.context.fs_base = value,
            _ => self.context.gs_base = value,
        }
        Ok(())
    }

    fn sti_allowed(&self) -> Result<(), Fault> {
        let iopl = (self.context.rflags_high & rflags::IOPL) >> 12;
        if u64::from(self.regs.cpl) <= iopl {
            Ok(())
        } else {
            Err(GP)
        }
    }

    /// MOV to and from control and debug registers.
    pub(super) fn move_control(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        if !(0..2).any(|k| exists(ins.op_register(k))) {
            return Err(UD);
        }
        self.privileged()?;
        let (to, from) = (ins.op0_register(), ins.op1_register());
        if ins.op0_kind() == OpKind::Register && (to.is_cr() || to.is_dr()) {
            let value = self.register(from);
            match to {
                Register::CR0 => self.set_cr0(value)?,
                Register::CR2 => self.regs.cr2 = value,
                Register::CR3 => {
                    let pcide = self.regs.cr4 & cr4::PCIDE != 0;
                    let ignored = if pcide { paging::CR3_NO_FLUSH } else { 0 };
                    if (value & !ignored) >> crate::mmu::walk::PHYSICAL_BITS != 0 {
                        return Err(GP);
                    }
                    self.load_cr3(value);
                }
                Register::CR4 => self.set_cr4(value)?,
                Register::CR8 => {
                    if value > 15 {
                        return Err(GP);
                    }
                    self.apic.set_tpr((value as u8) << 4);
                    self.context.pending |= u64::from(self.apic.deliverable().is_some());
                }
                _ => match debug_index(to) {
                    Some(index) => self.write_debug(index, value)?,
                    None => return Err(UD),
                },
            }
            return Ok(Flow::Next);
        }
        let value = match from {
            Register::CR0 => self.regs.cr0,
            Register::CR2 => self.regs.cr2,
            Register::CR3 => self.regs.cr3,
            Register::CR4 => self.regs.cr4,
            Register::CR8 => u64::from(self.apic.tpr() >> 4),
            _ => match debug_index(from) {
                Some(index) => self.read_debug(index)?,
                None => return Err(UD),
            },
        };
        self.set_register(to, value);
        Ok(Flow::Next)
    }

    fn set_cr0(&mut self, value: u64) -> Result<(), Fault> {
        // SDM vol. 3, §2.5: upper half reserved; PG needs PE, NW needs CD. Paging
        // cannot be left in 64-bit mode.
        let bad = value >> 32 != 0
            || value & (cr0::PE | cr0::PG) != cr0::PE | cr0::PG
            || value & (cr0::NW | cr0::CD) == cr0::NW;
        if bad {
            return Err(GP);
        }
        let value = value & CR0_KNOWN | cr0::ET;
        let changed = self.regs.cr0 ^ value;
        self.regs.cr0 = value;
        if changed & cr0::WP != 0 {
            self.flush_all();
        }
        self.units_changed();
        Ok(())
    }

    fn set_cr4(&mut self, value: u64) -> Result<(), Fault> {
        if value & !(CR4_KNOWN | self.cr4_of_model()) != 0 || value & cr4::PAE == 0 {
            return Err(GP);
        }
        let changed = self.regs.cr4 ^ value;
        // SDM vol. 3, §4.10.1: not with another identifier than 0 in CR3.
        if changed & value & cr4::PCIDE != 0 && self.regs.cr3 & paging::CR3_PCID != 0 {
            return Err(GP);
        }
        self.regs.cr4 = value;
        let flushing = cr4::PGE | cr4::PSE | cr4::SMEP | cr4::SMAP;
        if changed & (flushing | cr4::PCIDE & !value) != 0 {
            self.flush_all();
        }
        if changed & cr4::DE != 0 {
            self.rearm();
        }
        self.units_changed();
        Ok(())
    }

    /// INVPCID (SDM vol. 2A).
    fn invalidate_by_pcid(&mut self, ins: &Instruction) -> Result<(), Fault> {
        self.privileged()?;
        let kind = self.register(ins.op0_register());
        let at = self.address(ins);
        let mut descriptor = [0; 16];
        let stack = super::on_stack(ins);
        self.read_bytes(at, &mut descriptor)
            .map_err(|fault| fault.on_stack(stack))?;
        let descriptor = u128::from_le_bytes(descriptor);
        let (pcid, va) = (descriptor as u64, (descriptor >> 64) as u64);
        let pcide = self.regs.cr4 & cr4::PCIDE != 0;
        if pcid & !paging::CR3_PCID != 0 || (kind < 2 && !pcide && pcid != 0) {
            return Err(GP);
        }
        match kind {
            0 if !paging::is_canonical(va) => return Err(GP),
            0 => self.invalidate_address(pcid, va),
            1 => self.invalidate_space(pcid),
            2 => self.flush_all(),
            3 => self.invalidate_spaces(),
            _ => return Err(GP),
        }
        Ok(())
    }

    /// SGDT, SIDT, SLDT, SMSW and STR tell nothing at CPL 3 where CR4.UMIP is set.
    pub(super) fn umip(&self) -> Result<(), Fault> {
        if self.regs.cr4 & cr4::UMIP != 0 && self.regs.cpl == 3 {
            return Err(GP);
        }
        Ok(())
    }

    fn fxsave(&mut self, ins: &Instruction) -> Result<(), Fault> {
        self.fpu_available()?;
        let at = self.address(ins);
        if at & 15 != 0 {
            return Err(GP);
        }
        let mut image = Fpu([0; 512]);
        fxsave(&mut image);
        self.put_xmm(&mut image);
        self.write_bytes(at, &image.0[..FXSAVE_USED])
    }

    fn fxrstor(&mut self, ins: &Instruction) -> Result<(), Fault> {
        self.fpu_available()?;
        let at = self.address(ins);
        if at & 15 != 0 {
            return Err(GP);
        }
        let mut image = Fpu([0; 512]);
        self.read_bytes(at, &mut image.0)?;
        if image.mxcsr() & !MXCSR_MASK != 0 {
            return Err(GP);
        }
        fxrstor(&image);
        self.load_xmm(&image);
        Ok(())
    }
}

impl crate::cpu::Cpu {
    /// CR4 bits that come with the model's features.
    pub(crate) fn cr4_of_model(&self) -> u64 {
        let bit = |feature, bit| if self.model.has(feature) { bit } else { 0 };
        bit(Feature::Xsave, cr4::OSXSAVE) | bit(Feature::Fsgsbase, cr4::FSGSBASE)
    }

    /// Puts the XMM registers into an FXSAVE image.
    pub(crate) fn put_xmm(&self, image: &mut Fpu) {
        let xmm = &self.context.xmm;
        for (bytes, register) in image.0[160..416].chunks_exact_mut(16).zip(xmm) {
            bytes[..8].copy_from_slice(&register[0].to_le_bytes());
            bytes[8..].copy_from_slice(&register[1].to_le_bytes());
        }
    }

    /// The XMM registers of an FXSAVE image.
    pub(crate) fn load_xmm(&mut self, image: &Fpu) {
        for (register, bytes) in self
            .context
            .xmm
            .iter_mut()
            .zip(image.0[160..416].chunks_exact(16))
        {
            for (half, bytes) in register.iter_mut().zip(bytes.chunks_exact(8)) {
                *half = bytes
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
            }
        }
    }
}

/// Number of a debug register, if there is such a one.
fn debug_index(register: Register) -> Option<usize> {
    let index = register as usize - Register::DR0 as usize;
    (index < 8).then_some(index)
}

/// Whether this is a control or debug register that exists.
fn exists(register: Register) -> bool {
    let known = matches!(
        register,
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
    );
    known || (register.is_dr() && debug_index(register).is_some())
}
