//! Moves, bit strings and exchanges, for accesses that translated code cannot do:
//! devices, page borders, code pages.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::registers::{RAX, RBX, RCX, RDX, rflags};

use super::Flow;
use crate::cpu::Run;
use crate::exceptions::{Fault, GP, UD};

/// Instructions that LOCK may precede, of those handled here.
pub(super) fn may_lock(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Xchg | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Bts | M::Btr | M::Btc
    )
}

fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - 8 * size.clamp(1, 8) as u32;
    ((value << shift) as i64 >> shift) as u64
}

/// Bytes of operand `k`.
fn operand_size(ins: &Instruction, k: u32) -> usize {
    match ins.op_kind(k) {
        OpKind::Register => ins.op_register(k).size(),
        _ => ins.memory_size().size(),
    }
}

impl Run<'_> {
    pub(super) fn data(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Mov => {
                let plain = (0..2)
                    .all(|k| ins.op_kind(k) != OpKind::Register || ins.op_register(k).is_gpr());
                if !plain {
                    return Err(UD);
                }
                let size = operand_size(ins, 0);
                let value = self.operand(ins, 1, size)?;
                self.set_operand(ins, 0, size, value)?;
            }
            M::Movzx => {
                let value = self.operand(ins, 1, operand_size(ins, 1))?;
                self.set_register(ins.op0_register(), value);
            }
            M::Movsx | M::Movsxd => {
                let size = operand_size(ins, 1);
                let value = self.operand(ins, 1, size)?;
                self.set_register(ins.op0_register(), sign_extend(value, size));
            }
            M::Movbe => {
                let size = ins.memory_size().size();
                let value = self.operand(ins, 1, size)?;
                self.set_operand(ins, 0, size, value.swap_bytes() >> (64 - 8 * size as u32))?;
            }
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_string(ins)?,
            M::Lea => {
                let value = self.offset(ins);
                self.set_register(ins.op0_register(), value);
            }
            M::Xlatb => {
                let offset = self.context.gpr[RBX].wrapping_add(self.context.gpr[RAX] & 0xff);
                let at = offset.wrapping_add(self.segment_base(ins.memory_segment()));
                let value = self.load(at, 1)?;
                self.set_register(Register::AL, value);
            }
            M::Xchg => {
                let size = operand_size(ins, 0);
                let (a, b) = (self.operand(ins, 0, size)?, self.operand(ins, 1, size)?);
                self.set_operand(ins, 0, size, b)?;
                self.set_operand(ins, 1, size, a)?;
            }
            M::Cmpxchg => {
                let size = operand_size(ins, 0);
                let old = self.operand(ins, 0, size)?;
                let expected = self.context.gpr[RAX] & mask(size);
                // Writes in any case (SDM, CMPXCHG), and so faults in any case.
                if old == expected {
                    let new = self.register(ins.op1_register());
                    self.set_operand(ins, 0, size, new)?;
                } else {
                    self.set_operand(ins, 0, size, old)?;
                    let accumulator = match size {
                        1 => Register::AL,
                        2 => Register::AX,
                        4 => Register::EAX,
                        _ => Register::RAX,
                    };
                    self.set_register(accumulator, old);
                }
                let flags = super::string::compare(expected, old, size as u64);
                self.context.rflags = self.context.rflags & !rflags::STATUS | flags;
            }
            M::Cmpxchg8b => self.compare_exchange_pair(ins, 4)?,
            M::Cmpxchg16b => self.compare_exchange_pair(ins, 8)?,
            M::Lahf => {
                let flags = self.rflags() & 0xd5 | 2;
                self.set_register(Register::AH, flags);
            }
            M::Sahf => {
                let flags = self.register(Register::AH) & 0xd5;
                self.context.rflags = self.context.rflags & !0xd5 | flags;
            }
            _ => return Err(UD),
        }
        Ok(Flow::Next)
    }

    /// The bit index reaches beyond the operand when it is in a register.
    fn bit_string(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let size = operand_size(ins, 0);
        let bits = 8 * size as u64;
        let in_register = ins.op1_kind() == OpKind::Register;
        let index = self.operand(ins, 1, size)?;
        let bit = index & (bits - 1);
        let write = ins.mnemonic() != Mnemonic::Bt;
        let at = if ins.op0_kind() == OpKind::Memory && in_register {
            let steps = (sign_extend(index, size) as i64).div_euclid(bits as i64);
            let beyond = (steps as u64).wrapping_mul(size as u64);
            let narrow = ins.memory_base().is_gpr32() || ins.memory_index().is_gpr32();
            Some(if narrow {
                // The offset wraps at 32 bits, the bits' distance included.
                let offset = self.offset(ins).wrapping_add(beyond) & 0xffff_ffff;
                offset.wrapping_add(self.segment_base(ins.memory_segment()))
            } else {
                self.address(ins).wrapping_add(beyond)
            })
        } else {
            None
        };
        if let Some(at) = at
            && write
        {
            let mode = self.mode();
            self.check_write(at, size as u64, mode)?;
        }
        let old = match at {
            Some(at) => self.load(at, size)?,
            None => self.operand(ins, 0, size)?,
        };
        let new = match ins.mnemonic() {
            Mnemonic::Bts => old | 1 << bit,
            Mnemonic::Btr => old & !(1 << bit),
            _ => old ^ 1 << bit,
        };
        match at {
            Some(at) if write => self.store(at, size, new)?,
            None if write => self.set_operand(ins, 0, size, new)?,
            Some(_) | None => {}
        }
        self.context.rflags = self.context.rflags & !rflags::CF | old >> bit & 1;
        Ok(())
    }

    fn compare_exchange_pair(&mut self, ins: &Instruction, half: usize) -> Result<(), Fault> {
        let at = self.address(ins);
        if half == 8 && at & 15 != 0 {
            return Err(GP);
        }
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..2 * half];
        self.read_bytes(at, bytes)?;
        let halves = |bytes: &[u8]| {
            let word = |from: &[u8]| {
                from.iter()
                    .rev()
                    .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
            };
            (word(&bytes[..half]), word(&bytes[half..]))
        };
        let (low, high) = halves(bytes);
        let gpr = self.context.gpr;
        let equal = low == gpr[RAX] & mask(half) && high == gpr[RDX] & mask(half);
        if equal {
            bytes[..half].copy_from_slice(&gpr[RBX].to_le_bytes()[..half]);
            bytes[half..].copy_from_slice(&gpr[RCX].to_le_bytes()[..half]);
        }
        self.write_bytes(at, bytes)?;
        if equal {
            self.context.rflags |= rflags::ZF;
        } else {
            self.context.rflags &= !rflags::ZF;
            self.context.gpr[RAX] = low;
            self.context.gpr[RDX] = high;
        }
        Ok(())
    }
}

fn mask(size: usize) -> u64 {
    if size >= 8 { !0 } else { (1 << (8 * size)) - 1 }
}
