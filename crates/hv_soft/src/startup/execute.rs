//! Integer and system instructions of 16- and 32-bit code.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};
use x86::control::{cr0, cr4, efer, vector};
use x86::registers::{RAX, RBX, RCX, RDI, RDX, RSI, rflags};
use x86::state::{DescriptorTable, VcpuState};

use super::alu::{self, Shift, mask};
use super::{GP, Trouble};
use crate::cpu::{Cpu, Run};
use crate::interp::{CR0_KNOWN, CR4_KNOWN, segment_index};

const UD: Trouble = Trouble::Fault(vector::UD);

impl Cpu {
    /// Executes `ins`, which is at RIP.
    pub(super) fn early_execute(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        if self.early_transfer(ins)? {
            return Ok(());
        }
        self.early_arithmetic(ins)?;
        self.context.rip = ins.next_ip() & 0xffff_ffff;
        Ok(())
    }

    /// Bytes of operand `k`.
    fn early_size(ins: &Instruction, k: u32) -> usize {
        match ins.op_kind(k) {
            OpKind::Register => ins.op_register(k).size().min(4),
            _ => ins.memory_size().size().clamp(1, 8),
        }
    }

    pub(super) fn early_operand(&mut self, ins: &Instruction, k: u32) -> Result<u64, Trouble> {
        match ins.op_kind(k) {
            OpKind::Register => {
                let register = ins.op_register(k);
                if register.is_segment_register() {
                    Ok(self.regs.segments[segment_index(register)].selector.into())
                } else {
                    Ok(self.register(register))
                }
            }
            OpKind::Memory => {
                let (segment, at) = (segment_index(ins.memory_segment()), self.early_offset(ins));
                self.early_load(segment, at, Self::early_size(ins, k))
            }
            _ => ins.try_immediate(k).map_err(|_| Trouble::Lacks),
        }
    }

    fn set_early_operand(&mut self, ins: &Instruction, k: u32, value: u64) -> Result<(), Trouble> {
        match ins.op_kind(k) {
            OpKind::Register if ins.op_register(k).is_segment_register() => {
                self.early_load_segment(ins.op_register(k), value as u16)
            }
            OpKind::Register => {
                self.set_register(ins.op_register(k), value);
                Ok(())
            }
            OpKind::Memory => {
                let (segment, at) = (segment_index(ins.memory_segment()), self.early_offset(ins));
                self.early_store(segment, at, Self::early_size(ins, k), value)
            }
            _ => Err(Trouble::Lacks),
        }
    }

    fn set_status(&mut self, flags: u64) {
        let context = &mut self.context;
        context.rflags = context.rflags & !rflags::STATUS | flags & rflags::STATUS;
    }

    fn early_arithmetic(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        use Mnemonic as M;
        let size = if ins.op_count() > 0 {
            Self::early_size(ins, 0)
        } else {
            0
        };
        let status = self.context.rflags & rflags::STATUS;
        let carry = status & rflags::CF;
        match ins.mnemonic() {
            M::Mov => {
                let (to, from) = (ins.op0_register(), ins.op1_register());
                if to.is_cr() || from.is_cr() || to.is_dr() || from.is_dr() {
                    return self.early_control(ins);
                }
                let value = self.early_operand(ins, 1)?;
                self.set_early_operand(ins, 0, value)?;
            }
            M::Movzx => {
                let value = self.early_operand(ins, 1)?;
                self.set_early_operand(ins, 0, value)?;
            }
            M::Movsx => {
                let narrow = 64 - 8 * Self::early_size(ins, 1) as u32;
                let value = self.early_operand(ins, 1)?;
                let value = (value << narrow) as i64 >> narrow;
                self.set_early_operand(ins, 0, value.cast_unsigned())?;
            }
            M::Lea => {
                let value = self.early_offset(ins);
                self.set_early_operand(ins, 0, value)?;
            }
            M::Xchg => {
                let (a, b) = (self.early_operand(ins, 0)?, self.early_operand(ins, 1)?);
                self.set_early_operand(ins, 0, b)?;
                self.set_early_operand(ins, 1, a)?;
            }
            M::Add | M::Adc | M::Xadd => {
                let (a, b) = (self.early_operand(ins, 0)?, self.early_operand(ins, 1)?);
                let with = if ins.mnemonic() == M::Adc { carry } else { 0 };
                let (result, flags) = alu::add(a, b, with, size);
                self.set_early_operand(ins, 0, result)?;
                if ins.mnemonic() == M::Xadd {
                    self.set_early_operand(ins, 1, a)?;
                }
                self.set_status(flags);
            }
            M::Sub | M::Sbb | M::Cmp => {
                let (a, b) = (self.early_operand(ins, 0)?, self.early_operand(ins, 1)?);
                let with = if ins.mnemonic() == M::Sbb { carry } else { 0 };
                let (result, flags) = alu::subtract(a, b, with, size);
                if ins.mnemonic() != M::Cmp {
                    self.set_early_operand(ins, 0, result)?;
                }
                self.set_status(flags);
            }
            M::And | M::Test | M::Or | M::Xor => {
                let (a, b) = (self.early_operand(ins, 0)?, self.early_operand(ins, 1)?);
                let (result, flags) = match ins.mnemonic() {
                    M::Or => alu::logic(a | b, size),
                    M::Xor => alu::logic(a ^ b, size),
                    _ => alu::logic(a & b, size),
                };
                if ins.mnemonic() != M::Test {
                    self.set_early_operand(ins, 0, result)?;
                }
                self.set_status(flags);
            }
            M::Inc | M::Dec | M::Neg => {
                let a = self.early_operand(ins, 0)?;
                let (result, flags) = match ins.mnemonic() {
                    M::Inc => alu::add(a, 1, 0, size),
                    M::Dec => alu::subtract(a, 1, 0, size),
                    _ => alu::subtract(0, a, 0, size),
                };
                self.set_early_operand(ins, 0, result)?;
                let flags = match ins.mnemonic() {
                    M::Neg => flags,
                    _ => flags & !rflags::CF | carry,
                };
                self.set_status(flags);
            }
            M::Not => {
                let a = self.early_operand(ins, 0)?;
                self.set_early_operand(ins, 0, !a & mask(size))?;
            }
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror => {
                let kind = match ins.mnemonic() {
                    M::Shr => Shift::Right,
                    M::Sar => Shift::Arithmetic,
                    M::Rol => Shift::RotateLeft,
                    M::Ror => Shift::RotateRight,
                    _ => Shift::Left,
                };
                let a = self.early_operand(ins, 0)?;
                let count = self.early_operand(ins, 1)? as u32 & 31;
                let (result, flags) = alu::shift(kind, a, count, size, status);
                self.set_early_operand(ins, 0, result)?;
                self.set_status(flags);
            }
            M::Bt | M::Bts | M::Btr | M::Btc => self.early_bit(ins, size)?,
            M::Bsf | M::Bsr => {
                let value = self.early_operand(ins, 1)?;
                if value == 0 {
                    self.context.rflags |= rflags::ZF;
                } else {
                    let bit = if ins.mnemonic() == M::Bsf {
                        value.trailing_zeros()
                    } else {
                        63 - value.leading_zeros()
                    };
                    self.set_early_operand(ins, 0, bit.into())?;
                    self.context.rflags &= !rflags::ZF;
                }
            }
            M::Cmpxchg => {
                let old = self.early_operand(ins, 0)?;
                let (_, flags) = alu::subtract(self.context.gpr[RAX], old, 0, size);
                if flags & rflags::ZF != 0 {
                    let new = self.early_operand(ins, 1)?;
                    self.set_early_operand(ins, 0, new)?;
                } else {
                    self.set_early_operand(ins, 0, old)?;
                    self.set_register(accumulator(size), old);
                }
                self.set_status(flags);
            }
            M::Mul | M::Imul => self.early_multiply(ins, size)?,
            M::Div | M::Idiv => self.early_divide(ins, size)?,
            M::Bswap => {
                let value = self.early_operand(ins, 0)? as u32;
                self.set_early_operand(ins, 0, value.swap_bytes().into())?;
            }
            M::Cbw | M::Cwde | M::Cwd | M::Cdq => {
                let a = self.context.gpr[RAX];
                let (register, value) = match ins.mnemonic() {
                    M::Cbw => (Register::AX, i64::from(a as i8)),
                    M::Cwde => (Register::EAX, i64::from(a as i16)),
                    M::Cwd => (Register::DX, i64::from(a as i16) >> 16),
                    _ => (Register::EDX, i64::from(a as i32) >> 32),
                };
                self.set_register(register, value.cast_unsigned());
            }
            M::Clc => self.context.rflags &= !rflags::CF,
            M::Stc => self.context.rflags |= rflags::CF,
            M::Cmc => self.context.rflags ^= rflags::CF,
            M::Cld | M::Std => {
                let down = u64::from(ins.mnemonic() == M::Std);
                self.context.direction = down;
                self.context.rflags = self.context.rflags & !rflags::DF | down << 10;
            }
            M::Cli => self.context.interrupts_enabled = 0,
            M::Lahf => {
                let flags = self.rflags() & 0xd5 | 2;
                self.set_register(Register::AH, flags);
            }
            M::Sahf => {
                let flags = self.register(Register::AH) & 0xd5;
                self.context.rflags = self.context.rflags & !0xd5 | flags;
            }
            M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
                if ins.is_string_instruction() =>
            {
                return self.early_string(ins);
            }
            M::Nop
            | M::Pause
            | M::Endbr32
            | M::Wbinvd
            | M::Invd
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Invlpg
            | M::Reservednop => {}
            _ if ins.condition_code() != ConditionCode::None => {
                let met = self.early_condition(ins.condition_code());
                let value = if ins.op_count() == 1 {
                    u64::from(met) // SETcc
                } else {
                    let from = u32::from(met); // CMOVcc
                    self.early_operand(ins, from)?
                };
                self.set_early_operand(ins, 0, value)?;
            }
            _ => return self.early_system(ins),
        }
        Ok(())
    }

    fn early_bit(&mut self, ins: &Instruction, size: usize) -> Result<(), Trouble> {
        let index = self.early_operand(ins, 1)?;
        let bits = 8 * size as u64;
        let bit = index & (bits - 1);
        let far = ins.op0_kind() == OpKind::Memory && ins.op1_kind() == OpKind::Register;
        if far && index >= bits {
            // Another word than the operand's own.
            return Err(Trouble::Lacks);
        }
        let old = self.early_operand(ins, 0)?;
        match ins.mnemonic() {
            Mnemonic::Bts => self.set_early_operand(ins, 0, old | 1 << bit)?,
            Mnemonic::Btr => self.set_early_operand(ins, 0, old & !(1 << bit))?,
            Mnemonic::Btc => self.set_early_operand(ins, 0, old ^ 1 << bit)?,
            _ => {}
        }
        self.context.rflags = self.context.rflags & !rflags::CF | old >> bit & 1;
        Ok(())
    }

    fn early_multiply(&mut self, ins: &Instruction, size: usize) -> Result<(), Trouble> {
        let narrow = 64 - 8 * size as u32;
        let signed = ins.mnemonic() == Mnemonic::Imul;
        let extend = |value: u64| {
            if signed {
                i128::from((value << narrow) as i64 >> narrow)
            } else {
                i128::from(value & mask(size))
            }
        };
        let (a, b) = match ins.op_count() {
            1 => (self.context.gpr[RAX], self.early_operand(ins, 0)?),
            2 => (self.early_operand(ins, 0)?, self.early_operand(ins, 1)?),
            _ => (self.early_operand(ins, 1)?, self.early_operand(ins, 2)?),
        };
        let product = extend(a) * extend(b);
        let low = product as u64 & mask(size);
        let high = (product >> (8 * size)) as u64 & mask(size);
        match (ins.op_count(), size) {
            (1, 1) => self.set_register(Register::AX, product as u64),
            (1, _) => {
                self.set_register(accumulator(size), low);
                self.set_register(upper_accumulator(size), high);
            }
            _ => self.set_early_operand(ins, 0, low)?,
        }
        let over = u64::from(extend(low) != product);
        let flags = self.context.rflags & !(rflags::CF | rflags::OF);
        self.context.rflags = flags | over | over << 11;
        Ok(())
    }

    fn early_divide(&mut self, ins: &Instruction, size: usize) -> Result<(), Trouble> {
        let by = self.early_operand(ins, 0)?;
        let (high, low) = if size == 1 {
            (self.register(Register::AH), self.register(Register::AL))
        } else {
            (self.context.gpr[RDX], self.context.gpr[RAX])
        };
        let signed = ins.mnemonic() == Mnemonic::Idiv;
        let (quotient, remainder) =
            alu::divide(high, low, by, size, signed).ok_or(Trouble::Fault(vector::DE))?;
        if size == 1 {
            self.set_register(Register::AL, quotient);
            self.set_register(Register::AH, remainder);
        } else {
            self.set_register(accumulator(size), quotient);
            self.set_register(upper_accumulator(size), remainder);
        }
        Ok(())
    }

    pub(super) fn early_condition(&self, code: ConditionCode) -> bool {
        use ConditionCode as C;
        let flag = |bit: u64| self.context.rflags & bit != 0;
        let less = || flag(rflags::SF) != flag(rflags::OF);
        match code {
            C::o => flag(rflags::OF),
            C::no => !flag(rflags::OF),
            C::b => flag(rflags::CF),
            C::ae => !flag(rflags::CF),
            C::e => flag(rflags::ZF),
            C::ne => !flag(rflags::ZF),
            C::be => flag(rflags::CF) || flag(rflags::ZF),
            C::a => !flag(rflags::CF) && !flag(rflags::ZF),
            C::s => flag(rflags::SF),
            C::ns => !flag(rflags::SF),
            C::p => flag(rflags::PF),
            C::np => !flag(rflags::PF),
            C::l => less(),
            C::ge => !less(),
            C::le => less() || flag(rflags::ZF),
            C::g => !less() && !flag(rflags::ZF),
            C::None => false,
        }
    }

    /// One element a time: RIP stays until the count is used up.
    fn early_string(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        use Mnemonic as M;
        let size = match ins.mnemonic() {
            M::Movsb | M::Stosb | M::Lodsb => 1,
            M::Movsw | M::Stosw | M::Lodsw => 2,
            _ => 4,
        };
        let narrow = (0..ins.op_count()).any(|k| {
            matches!(
                ins.op_kind(k),
                OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI
            )
        });
        let wide = if narrow { 0xffff } else { 0xffff_ffff };
        let repeat = ins.has_rep_prefix() || ins.has_repne_prefix();
        loop {
            if repeat && self.context.gpr[RCX] & wide == 0 {
                return Ok(());
            }
            let down = self.context.direction != 0;
            let step = if down { -(size as i64) } else { size as i64 };
            let (from, to) = (self.context.gpr[RSI] & wide, self.context.gpr[RDI] & wide);
            let loads = !matches!(ins.mnemonic(), M::Stosb | M::Stosw | M::Stosd);
            let stores = !matches!(ins.mnemonic(), M::Lodsb | M::Lodsw | M::Lodsd);
            let value = if loads {
                self.early_load(segment_index(ins.memory_segment()), from, size)?
            } else {
                self.context.gpr[RAX]
            };
            if stores {
                self.early_store(VcpuState::ES, to, size, value)?;
            } else {
                self.set_register(accumulator(size), value);
            }
            let gpr = &mut self.context.gpr;
            let advance = |slot: &mut u64, by: i64| {
                *slot = *slot & !wide | slot.wrapping_add_signed(by) & wide;
            };
            if loads {
                advance(&mut gpr[RSI], step);
            }
            if stores {
                advance(&mut gpr[RDI], step);
            }
            if !repeat {
                return Ok(());
            }
            advance(&mut gpr[RCX], -1);
        }
    }

    fn early_system(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Hlt => {
                self.halted = true;
                // So that it sleeps.
                self.context.pending = 1;
            }
            M::Cpuid => {
                let (leaf, sub) = (self.context.gpr[RAX] as u32, self.context.gpr[RCX] as u32);
                let answer = self.cpuid(leaf, sub);
                for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(answer) {
                    self.context.gpr[register] = u64::from(value);
                }
            }
            M::Rdmsr => {
                let value = self.read_msr(self.context.gpr[RCX] as u32)?;
                self.context.gpr[RAX] = value & 0xffff_ffff;
                self.context.gpr[RDX] = value >> 32;
            }
            M::Wrmsr => {
                let value = self.context.gpr[RAX] & 0xffff_ffff | self.context.gpr[RDX] << 32;
                self.write_msr(self.context.gpr[RCX] as u32, value)?;
            }
            M::Rdtsc => {
                let now = self.clock.now();
                self.context.gpr[RAX] = now & 0xffff_ffff;
                self.context.gpr[RDX] = now >> 32;
            }
            M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => return self.early_table(ins),
            M::Clts => {
                self.regs.cr0 &= !cr0::TS;
                self.units_changed();
            }
            M::Smsw => {
                let value = self.regs.cr0;
                self.set_early_operand(ins, 0, value)?;
            }
            M::Lmsw => {
                let value = self.early_operand(ins, 0)? & 0xf;
                // It cannot leave protected mode.
                let kept = self.regs.cr0 & !0xe;
                self.set_early_cr0(kept | value)?;
            }
            M::Ud0 | M::Ud1 | M::Ud2 => return Err(UD),
            _ => return Err(Trouble::Lacks),
        }
        Ok(())
    }

    fn early_table(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        let (segment, at) = (segment_index(ins.memory_segment()), self.early_offset(ins));
        let mnemonic = ins.mnemonic();
        if matches!(mnemonic, Mnemonic::Sgdt | Mnemonic::Sidt) {
            let table = if mnemonic == Mnemonic::Sgdt {
                self.regs.gdt
            } else {
                self.regs.idt
            };
            self.early_store(segment, at, 2, table.limit.into())?;
            return self.early_store(segment, at + 2, 4, table.base);
        }
        let limit = self.early_load(segment, at, 2)? as u16;
        let base = self.early_load(segment, at + 2, 4)?;
        // A 16-bit operand size leaves the upper byte out (SDM vol. 2, LGDT).
        let base = if matches!(ins.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
            base & 0xff_ffff
        } else {
            base
        };
        let table = DescriptorTable { base, limit };
        if mnemonic == Mnemonic::Lgdt {
            self.regs.gdt = table;
        } else {
            self.regs.idt = table;
        }
        Ok(())
    }

    /// MOV to and from control registers.
    fn early_control(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        let (to, from) = (ins.op0_register(), ins.op1_register());
        if to.is_cr() {
            let value = self.register(from);
            match to {
                Register::CR0 => return self.set_early_cr0(value),
                Register::CR2 => self.regs.cr2 = value,
                Register::CR3 => self.regs.cr3 = value,
                Register::CR4 => {
                    // What long mode needs stays while it is active; PCID needs it.
                    let long = self.regs.efer & efer::LMA != 0;
                    if value & !(CR4_KNOWN | self.cr4_of_model()) != 0
                        || (long && value & cr4::PAE == 0)
                        || (!long && value & cr4::PCIDE != 0)
                    {
                        return Err(GP);
                    }
                    self.regs.cr4 = value;
                    self.units_changed();
                }
                _ => return Err(Trouble::Lacks),
            }
            return Ok(());
        }
        let value = match from {
            Register::CR0 => self.regs.cr0,
            Register::CR2 => self.regs.cr2,
            Register::CR3 => self.regs.cr3,
            Register::CR4 => self.regs.cr4,
            _ => return Err(Trouble::Lacks),
        };
        if !to.is_gpr() {
            return Err(UD);
        }
        self.set_register(to, value);
        Ok(())
    }

    /// SDM vol. 3, §2.5 and §9.8.5: paging makes long mode active where it is enabled.
    fn set_early_cr0(&mut self, value: u64) -> Result<(), Trouble> {
        let paging = value & cr0::PG != 0;
        if value >> 32 != 0
            || (paging && value & cr0::PE == 0)
            || value & (cr0::NW | cr0::CD) == cr0::NW
        {
            return Err(GP);
        }
        if paging && self.regs.efer & efer::LME != 0 {
            if self.regs.cr4 & cr4::PAE == 0 {
                return Err(GP);
            }
            self.regs.efer |= efer::LMA;
        } else {
            self.regs.efer &= !efer::LMA;
        }
        self.regs.cr0 = value & CR0_KNOWN | cr0::ET;
        self.units_changed();
        Ok(())
    }
}

impl Run<'_> {
    /// IN and OUT: at CPL 0, all ports are open.
    pub(super) fn early_port(&mut self, ins: &Instruction) -> Result<(), Trouble> {
        let port_of = |run: &Self, k| match ins.op_kind(k) {
            OpKind::Register => run.context.gpr[RDX] as u16,
            _ => u16::from(ins.immediate8()),
        };
        if ins.mnemonic() == Mnemonic::In {
            let to = ins.op0_register();
            let port = port_of(self, 1);
            let value = self.port_read(port, to.size());
            self.set_register(to, value);
        } else {
            let from = ins.op1_register();
            let port = port_of(self, 0);
            let value = self.register(from);
            self.port_write(port, from.size(), value);
        }
        self.context.rip = ins.next_ip() & 0xffff_ffff;
        Ok(())
    }
}

fn upper_accumulator(size: usize) -> Register {
    if size == 2 {
        Register::DX
    } else {
        Register::EDX
    }
}

fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        _ => Register::EAX,
    }
}
