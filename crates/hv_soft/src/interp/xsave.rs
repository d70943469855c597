//! XSAVE and its family (SDM vol. 1, §13.7 to §13.9), standard form only: XSAVEC and
//! XSAVES are not shown.
//!
//! x87 and SSE always count as in use; AVX while an upper half may not be zero.

use iced_x86::{Instruction, Mnemonic};
use x86::control::{cr0, cr4};
use x86::features::Feature;
use x86::registers::{RAX, RCX, RDX};
use x86::xsave::{self as area, AVX, SSE, X87};

use super::Flow;
use crate::cpu::{Cpu, Run};
use crate::enter::{Fpu, MXCSR_MASK, fxrstor, fxsave};
use crate::exceptions::{Fault, GP, NM, UD};

impl Cpu {
    /// The components that XCR0 may enable.
    pub(crate) fn xcr0_supported(&self) -> u64 {
        if self.model.has(Feature::Avx) {
            X87 | SSE | AVX
        } else {
            X87 | SSE
        }
    }

    /// XINUSE.
    fn in_use(&self) -> u64 {
        let avx = if self.context.upper_live != 0 { AVX } else { 0 };
        X87 | SSE | avx
    }

    /// The upper halves of YMM registers from an XSAVE area's bytes, or zero.
    pub(crate) fn load_upper(&mut self, bytes: Option<&[u8]>) {
        let context = &mut *self.context;
        context.upper_live = u64::from(bytes.is_some());
        let Some(bytes) = bytes else {
            context.ymm_high = [[0; 2]; 16];
            return;
        };
        let words = context.ymm_high.as_flattened_mut();
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
    }

    /// Writes the upper halves of YMM registers as an XSAVE area has them.
    pub(crate) fn save_upper(&self, into: &mut [u8]) {
        let words = self.context.ymm_high.as_flattened();
        for (bytes, word) in into.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            // Not kept up to date while they are zero.
            let live = self.context.upper_live != 0;
            *bytes = if live { word.to_le_bytes() } else { [0; 8] };
        }
    }
}

impl Run<'_> {
    pub(super) fn extended_state(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        if self.regs.cr4 & cr4::OSXSAVE == 0 {
            return Err(UD);
        }
        match ins.mnemonic() {
            M::Xgetbv => {
                let value = match self.context.gpr[RCX] as u32 {
                    0 => self.regs.xcr0,
                    1 if self.model.has(Feature::Xgetbv1) => self.regs.xcr0 & self.in_use(),
                    _ => return Err(GP),
                };
                self.context.gpr[RAX] = value & 0xffff_ffff;
                self.context.gpr[RDX] = value >> 32;
            }
            M::Xsetbv => {
                self.privileged()?;
                let value = self.mask();
                if self.context.gpr[RCX] as u32 != 0 || !xcr0_is_valid(value, self.xcr0_supported())
                {
                    return Err(GP);
                }
                self.regs.xcr0 = value;
                self.units_changed();
            }
            M::Xsave | M::Xsave64 => self.xsave(ins, false)?,
            M::Xsaveopt | M::Xsaveopt64 => self.xsave(ins, true)?,
            M::Xrstor | M::Xrstor64 => self.xrstor(ins)?,
            _ => return Err(UD),
        }
        Ok(Flow::Next)
    }

    /// EDX:EAX.
    fn mask(&self) -> u64 {
        self.context.gpr[RDX] << 32 | self.context.gpr[RAX] & 0xffff_ffff
    }

    fn area(&self, ins: &Instruction) -> Result<u64, Fault> {
        if self.regs.cr0 & cr0::TS != 0 {
            return Err(NM);
        }
        let at = self.address(ins);
        if at & 63 == 0 { Ok(at) } else { Err(GP) }
    }

    fn xsave(&mut self, ins: &Instruction, optimized: bool) -> Result<(), Fault> {
        let at = self.area(ins)?;
        let asked = self.regs.xcr0 & self.mask();
        let in_use = self.in_use();
        let saved = if optimized { asked & in_use } else { asked };
        let mode = self.mode();
        let len = if saved & AVX != 0 {
            area::AVX_BYTES
        } else {
            area::SSE_BYTES
        };
        self.check_write(at, len as u64, mode)?;
        let header = at.wrapping_add(area::XSTATE_BV as u64);
        let old = self.load(header, 8)?;
        let mut image = Fpu([0; 512]);
        if asked != 0 {
            fxsave(&mut image);
            self.put_xmm(&mut image);
        }
        let put = |run: &mut Self, range: std::ops::Range<usize>| {
            run.write_bytes(at.wrapping_add(range.start as u64), &image.0[range])
        };
        if saved & (X87 | SSE) == X87 | SSE {
            put(self, 0..area::XMM.end)?;
        } else {
            if saved & X87 != 0 {
                put(self, 0..area::MXCSR)?;
                put(self, area::X87_REGISTERS)?;
            }
            if asked & (SSE | AVX) != 0 {
                put(self, area::MXCSR..area::MXCSR + 8)?;
            }
            if saved & SSE != 0 {
                put(self, area::XMM)?;
            }
        }
        if saved & AVX != 0 {
            let mut upper = [0; area::AVX_BYTES - area::SSE_BYTES];
            self.save_upper(&mut upper);
            self.write_bytes(at.wrapping_add(area::SSE_BYTES as u64), &upper)?;
        }
        self.store(header, 8, old & !asked | in_use & asked)
    }

    fn xrstor(&mut self, ins: &Instruction) -> Result<(), Fault> {
        let at = self.area(ins)?;
        let asked = self.regs.xcr0 & self.mask();
        // Legacy region and header.
        let mut bytes = [0; area::SSE_BYTES];
        self.read_bytes(at, &mut bytes)?;
        let word = |i: usize| {
            let from = bytes[area::XSTATE_BV..].as_chunks::<8>().0;
            from.get(i).copied().map_or(0, u64::from_le_bytes)
        };
        let there = word(0);
        // XCOMP_BV, and eight bytes reserved.
        if there & !self.regs.xcr0 != 0 || word(1) != 0 || word(2) != 0 {
            return Err(GP);
        }
        let mut image = Fpu([0; 512]);
        if asked & X87 == 0 || asked & (SSE | AVX) == 0 {
            fxsave(&mut image);
        }
        if asked & X87 != 0 {
            let (whole, registers) = (0..area::MXCSR, area::X87_REGISTERS);
            if there & X87 != 0 {
                image.0[whole.clone()].copy_from_slice(&bytes[whole]);
                image.0[registers.clone()].copy_from_slice(&bytes[registers]);
            } else {
                image.0[whole].fill(0);
                image.0[registers].fill(0);
                image.0[area::FCW..2].copy_from_slice(&area::FCW_INIT.to_le_bytes());
            }
        }
        if asked & (SSE | AVX) != 0 {
            let mxcsr = area::MXCSR..area::MXCSR + 4;
            image.0[mxcsr.clone()].copy_from_slice(&bytes[mxcsr]);
            if image.mxcsr() & !MXCSR_MASK != 0 {
                return Err(GP);
            }
        }
        let mut upper = [0; area::AVX_BYTES - area::SSE_BYTES];
        if asked & there & AVX != 0 {
            self.read_bytes(at.wrapping_add(area::SSE_BYTES as u64), &mut upper)?;
        }
        if asked != 0 {
            fxrstor(&image);
        }
        if asked & there & SSE != 0 {
            image.0[area::XMM].copy_from_slice(&bytes[area::XMM]);
            self.load_xmm(&image);
        } else if asked & SSE != 0 {
            self.context.xmm = [[0; 2]; 16];
        }
        if asked & AVX != 0 {
            let upper = (there & AVX != 0).then_some(&upper[..]);
            self.load_upper(upper);
        }
        Ok(())
    }
}

/// SDM vol. 1, §13.3.
pub(crate) fn xcr0_is_valid(value: u64, supported: u64) -> bool {
    value & !supported == 0 && value & X87 != 0 && (value & AVX == 0 || value & SSE != 0)
}
