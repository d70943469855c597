//! Guest instructions that the engine executes itself, decoded: a small cache by
//! exit number, and the fetch behind it.

use iced_x86::{Decoder, Instruction};

use crate::cpu::Cpu;
use crate::exceptions::{Fault, GP, UD};
use crate::mmu::walk::Access;

const ENTRIES: usize = 256;

/// Decoded instructions by exit number. Exit numbers mean the same instruction
/// until the code cache is flushed.
pub(crate) struct Decoded {
    entries: Vec<(u32, Instruction)>,
}

impl Decoded {
    pub(crate) fn new() -> Self {
        Self {
            entries: vec![(0, Instruction::default()); ENTRIES],
        }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.fill((0, Instruction::default()));
    }
}

impl Cpu {
    /// The instruction at RIP, which left translated code through exit `number`.
    pub(crate) fn decode(&mut self, number: u32) -> Result<Instruction, Fault> {
        let slot = number as usize % ENTRIES;
        let (known, instruction) = self.decoded.entries[slot];
        if known == number && instruction.ip() == self.context.rip {
            return Ok(instruction);
        }
        let instruction = self.fetch(self.context.rip)?;
        self.decoded.entries[slot] = (number, instruction);
        Ok(instruction)
    }

    /// Fetches and decodes the instruction at `va`.
    pub(crate) fn fetch(&mut self, va: u64) -> Result<Instruction, Fault> {
        let mode = self.mode();
        let mut bytes = [0u8; 15];
        let first = bytes.len().min(4096 - (va & 0xfff) as usize);
        let walked = self.walk(va, Access::Execute, mode)?;
        if !self.ram.read(walked.pa, &mut bytes[..first]) {
            return Err(GP);
        }
        // As the translator decodes.
        let options = translator::decoder_options(self.executable);
        let mut instruction = decode(&bytes[..first], va, options);
        if instruction.is_invalid() && first < bytes.len() {
            let next = (va | 0xfff).wrapping_add(1);
            let walked = self.walk(next, Access::Execute, mode)?;
            if !self.ram.read(walked.pa, &mut bytes[first..]) {
                return Err(GP);
            }
            instruction = decode(&bytes, va, options);
        }
        if instruction.is_invalid() {
            Err(UD)
        } else {
            Ok(instruction)
        }
    }
}

fn decode(bytes: &[u8], va: u64, options: u32) -> Instruction {
    Decoder::with_ip(64, bytes, va, options).decode()
}
