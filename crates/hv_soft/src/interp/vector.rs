//! Vector instructions with an access per element: gathers and masked moves. An
//! element that the mask leaves out is not accessed, and so cannot fault.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::control::vector;

use super::Flow;
use crate::cpu::Run;
use crate::enter::{Fpu, fxrstor, fxsave};
use crate::exceptions::{Fault, UD};

/// A YMM register's bytes.
type Bytes = [u8; 32];

/// Number of an XMM or YMM register.
fn number(register: Register) -> usize {
    let first = if register.is_ymm() {
        Register::YMM0
    } else {
        Register::XMM0
    };
    (register as usize).wrapping_sub(first as usize) & 15
}

/// Element `i` of `size` bytes.
fn element(bytes: &[u8], i: usize, size: usize) -> u64 {
    let mut word = [0; 8];
    if let Some(from) = bytes.get(i * size..(i + 1) * size) {
        word[..size].copy_from_slice(from);
    }
    u64::from_le_bytes(word)
}

fn set_element(bytes: &mut Bytes, i: usize, size: usize, value: u64) {
    bytes[i * size..(i + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Is the element's sign bit set?
fn selected(mask: &Bytes, i: usize, size: usize) -> bool {
    mask[(i + 1) * size - 1] & 0x80 != 0
}

impl Run<'_> {
    pub(super) fn vector(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        match ins.mnemonic() {
            M::Vmaskmovps | M::Vpmaskmovd => self.masked_move(ins, 4)?,
            M::Vmaskmovpd | M::Vpmaskmovq => self.masked_move(ins, 8)?,
            M::Vpgatherdd | M::Vpgatherdq | M::Vgatherdps | M::Vgatherdpd => self.gather(ins, 4)?,
            M::Vpgatherqd | M::Vpgatherqq | M::Vgatherqps | M::Vgatherqpd => self.gather(ins, 8)?,
            M::Maskmovdqu | M::Vmaskmovdqu => {
                let from = self.vector_register(ins.op1_register());
                let mask = self.vector_register(ins.op2_register());
                self.masked_bytes(ins, &from[..16], &mask[..16])?;
            }
            M::Maskmovq => self.masked_mmx(ins)?,
            _ => return Err(UD),
        }
        Ok(Flow::Next)
    }

    fn vector_register(&self, register: Register) -> Bytes {
        let (n, mut bytes) = (number(register), [0; 32]);
        let context = &self.context;
        let upper = if context.upper_live != 0 {
            context.ymm_high[n]
        } else {
            [0; 2]
        };
        let words = context.xmm[n].into_iter().chain(upper);
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    /// Writes a register as a VEX-encoded instruction does: what it does not reach is
    /// zero.
    fn set_vector_register(&mut self, register: Register, bytes: &Bytes) {
        let n = number(register);
        let word = |i: usize| element(bytes, i, 8);
        let context = &mut *self.context;
        context.xmm[n] = [word(0), word(1)];
        let upper = if register.is_ymm() {
            [word(2), word(3)]
        } else {
            [0; 2]
        };
        if context.upper_live == 0 && upper != [0; 2] {
            context.ymm_high = [[0; 2]; 16];
            context.upper_live = 1;
        }
        context.ymm_high[n] = upper;
    }

    fn masked_move(&mut self, ins: &Instruction, size: usize) -> Result<(), Fault> {
        let mask = self.vector_register(ins.op1_register());
        let count = ins.memory_size().size() / size;
        let at = self.address(ins);
        let place = |i: usize| at.wrapping_add((i * size) as u64);
        let stack = super::on_stack(ins);
        let chosen = (0..count).filter(|i| selected(&mask, *i, size));
        if ins.op0_kind() == OpKind::Register {
            let mut result = [0; 32];
            for i in chosen {
                let value = self.load(place(i), size).map_err(|f| f.on_stack(stack))?;
                set_element(&mut result, i, size, value);
            }
            self.set_vector_register(ins.op0_register(), &result);
            return Ok(());
        }
        let from = self.vector_register(ins.op2_register());
        let mode = self.mode();
        for i in chosen.clone() {
            self.check_write(place(i), size as u64, mode)
                .map_err(|f| f.on_stack(stack))?;
        }
        for i in chosen {
            self.store(place(i), size, element(&from, i, size))?;
        }
        Ok(())
    }

    /// A fault leaves the elements before it loaded and their mask cleared.
    fn gather(&mut self, ins: &Instruction, index_size: usize) -> Result<(), Fault> {
        let (to, index, masking) = (ins.op0_register(), ins.memory_index(), ins.op2_register());
        let numbers = [to, index, masking].map(number);
        if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
            return Err(UD);
        }
        let size = ins.memory_size().size();
        let count = (to.size() / size).min(index.size() / index_size);
        let indexes = self.vector_register(index);
        let (mut result, mut mask) = (self.vector_register(to), self.vector_register(masking));
        // Also elements that have no index, as hardware does it.
        let len = to.size().max(index.size());
        for i in 0..len / size {
            let value = if selected(&mask, i, size) { !0 } else { 0 };
            set_element(&mut mask, i, size, value);
        }
        mask[len..].fill(0);
        let base = ins.memory_base();
        let narrow = base.is_gpr32() || base == Register::None && ins.memory_displ_size() == 4;
        let start = ins
            .memory_displacement64()
            .wrapping_add(self.register(base));
        let segment = self.segment_base(ins.memory_segment());
        let stack = super::on_stack(ins);
        let mut loaded = false;
        for i in 0..count {
            if !selected(&mask, i, size) {
                continue;
            }
            let shift = 64 - 8 * index_size as u32;
            let offset = (element(&indexes, i, index_size) << shift) as i64 >> shift;
            let scaled = (offset as u64).wrapping_mul(u64::from(ins.memory_index_scale()));
            let mut at = start.wrapping_add(scaled);
            if narrow {
                at &= 0xffff_ffff;
            }
            match self.load(at.wrapping_add(segment), size) {
                Ok(value) => {
                    set_element(&mut result, i, size, value);
                    loaded = true;
                }
                Err(fault) => {
                    // The upper half goes with the first element, or at the end.
                    let reached = if len == 32 { full(to) } else { to };
                    if loaded {
                        self.set_vector_register(reached, &result);
                    }
                    self.set_vector_register(full(masking), &mask);
                    return Err(fault.on_stack(stack));
                }
            }
            set_element(&mut mask, i, size, 0);
        }
        result[count * size..].fill(0);
        self.set_vector_register(to, &result);
        self.set_vector_register(masking, &[0; 32]);
        Ok(())
    }

    /// Stores the bytes of `from` that `mask` selects at DS:RDI.
    fn masked_bytes(&mut self, ins: &Instruction, from: &[u8], mask: &[u8]) -> Result<(), Fault> {
        let rdi = self.context.gpr[x86::registers::RDI];
        let offset = if ins.op0_kind() == OpKind::MemorySegEDI {
            rdi & 0xffff_ffff
        } else {
            rdi
        };
        let at = offset.wrapping_add(self.segment_base(ins.memory_segment()));
        let mode = self.mode();
        let chosen = |i: &usize| mask[*i] & 0x80 != 0;
        for i in (0..from.len()).filter(chosen) {
            self.check_write(at.wrapping_add(i as u64), 1, mode)?;
        }
        for i in (0..from.len()).filter(chosen) {
            self.store(at.wrapping_add(i as u64), 1, u64::from(from[i]))?;
        }
        Ok(())
    }

    /// MASKMOVQ: its registers are x87's, and it leaves those as every MMX
    /// instruction does (SDM vol. 1, §9.5.1).
    fn masked_mmx(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let mut image = Fpu([0; 512]);
        fxsave(&mut image);
        if image.0[2] & 0x80 != 0 {
            return Err(Fault::Exception(vector::MF, None));
        }
        let top = usize::from(image.0[3] >> 3 & 7);
        let registers: [[u8; 16]; 8] = std::array::from_fn(|n| {
            let at = 32 + 16 * ((n + 8 - top) & 7);
            std::array::from_fn(|i| image.0[at + i])
        });
        let register = |register: Register| {
            let n = (register as usize).wrapping_sub(Register::MM0 as usize) & 7;
            &registers[n][..8]
        };
        // Also where the store faults, as hardware does it.
        image.0[32..160].copy_from_slice(registers.as_flattened());
        image.0[3] &= !0x38;
        image.0[4] = 0xff;
        fxrstor(&image);
        self.masked_bytes(
            ins,
            register(ins.op1_register()),
            register(ins.op2_register()),
        )
    }
}

/// The YMM register around an XMM register; itself when it is one.
fn full(register: Register) -> Register {
    Register::YMM0 + number(register) as u32
}
