//! The x87 environment: FNSTENV, FLDENV, FNSAVE, FRSTOR (SDM vol. 1, §8.1.10). Copied
//! they would show where in the host the last x87 instruction was; here instruction
//! and operand pointers read as zero.

use iced_x86::{Instruction, Mnemonic};

use super::Flow;
use crate::cpu::Run;
use crate::enter::{Fpu, fxrstor, fxsave};
use crate::exceptions::{Fault, UD};

/// Seven words of two or four bytes.
const WORDS: usize = 7;
/// Eight registers of ten bytes.
const REGISTER_BYTES: usize = 80;

impl Run<'_> {
    pub(super) fn environment(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        // 14, 28, 94 or 108 bytes.
        let len = ins.memory_size().size();
        let word = if matches!(len, 14 | 94) { 2 } else { 4 };
        let all = WORDS * word;
        let at = self.address(ins);
        let mut image = Fpu([0; 512]);
        fxsave(&mut image);
        let mut bytes = [0; WORDS * 4 + REGISTER_BYTES];
        let bytes = &mut bytes[..len];
        match ins.mnemonic() {
            M::Fnstenv => {
                store(&image, bytes, word);
                self.write_bytes(at, bytes)?;
                // All exceptions masked.
                image.0[0] |= 0x3f;
            }
            M::Fnsave => {
                store(&image, &mut bytes[..all], word);
                let registers = image.0[32..160].chunks_exact(16);
                for (to, from) in bytes[all..].chunks_exact_mut(10).zip(registers) {
                    to.copy_from_slice(&from[..10]);
                }
                self.write_bytes(at, bytes)?;
                image.0[..24].fill(0);
                image.0[..2].copy_from_slice(&x86::xsave::FCW_INIT.to_le_bytes());
            }
            M::Fldenv => {
                self.read_bytes(at, bytes)?;
                load(&mut image, bytes, word);
            }
            M::Frstor => {
                self.read_bytes(at, bytes)?;
                let registers = image.0[32..160].chunks_exact_mut(16);
                for (from, to) in bytes[all..].chunks_exact(10).zip(registers) {
                    to[..10].copy_from_slice(from);
                }
                load(&mut image, &bytes[..all], word);
            }
            _ => return Err(UD),
        }
        fxrstor(&image);
        Ok(Flow::Next)
    }
}

fn half(image: &Fpu, at: usize) -> u16 {
    u16::from_le_bytes([image.0[at], image.0[at + 1]])
}

/// Control, status and tag word, then the pointers.
fn store(image: &Fpu, bytes: &mut [u8], word: usize) {
    let values = [half(image, 0), half(image, 2), full_tags(image)];
    for (to, value) in bytes.chunks_exact_mut(word).zip(values) {
        // Upper halves read as ones.
        to.fill(0xff);
        to[..2].copy_from_slice(&value.to_le_bytes());
    }
    if word == 4 {
        // What is beside the last pointer's selector as well.
        bytes[26..28].fill(0xff);
    }
}

fn load(image: &mut Fpu, bytes: &[u8], word: usize) {
    let value = |i: usize| u16::from_le_bytes([bytes[i * word], bytes[i * word + 1]]);
    let (control, mut status, tags) = (value(0), value(1), value(2));
    // ES and B follow from what is raised and not masked.
    status &= !0x8080;
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    image.0[..2].copy_from_slice(&control.to_le_bytes());
    image.0[2..4].copy_from_slice(&status.to_le_bytes());
    image.0[4] = (0..8).fold(0, |short, n| {
        short | u8::from(tags >> (2 * n) & 3 != 3) << n
    });
    image.0[6..24].fill(0);
}

/// The tag word of two bits a register, from what is in the registers (SDM vol. 1,
/// §10.5.1.1).
fn full_tags(image: &Fpu) -> u16 {
    let top = usize::from(image.0[3] >> 3 & 7);
    (0..8).fold(0, |tags, n| {
        let at = 32 + 16 * ((n + 8 - top) & 7);
        let register = &image.0[at..at + 10];
        let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
        let tag = if image.0[4] >> n & 1 == 0 {
            3
        } else if exponent == 0 && register[..8].iter().all(|byte| *byte == 0) {
            1
        } else if exponent == 0 || exponent == 0x7fff || register[7] & 0x80 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * n)
    })
}
