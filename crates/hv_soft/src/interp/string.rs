//! String instructions, page by page.

use iced_x86::{Instruction, Mnemonic, Register};
use x86::registers::{RAX, RCX, RDI, RSI, rflags};

use super::Flow;
use crate::cpu::Run;
use crate::exceptions::Fault;
use crate::mmu::access::Place;

/// A repeated instruction goes back to the loop after so many bytes, so that
/// interrupts and kicks come through.
const BUDGET: u64 = 256 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Move,
    Store,
    Load,
    Scan,
    Compare,
}

impl Run<'_> {
    pub(super) fn string(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        let shape = match ins.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Shape::Move,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Shape::Store,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Shape::Load,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Shape::Scan,
            _ => Shape::Compare,
        };
        let size: u64 = match ins.mnemonic() {
            M::Movsb | M::Stosb | M::Lodsb | M::Scasb | M::Cmpsb => 1,
            M::Movsw | M::Stosw | M::Lodsw | M::Scasw | M::Cmpsw => 2,
            M::Movsd | M::Stosd | M::Lodsd | M::Scasd | M::Cmpsd => 4,
            _ => 8,
        };
        let repeat = ins.has_rep_prefix() || ins.has_repne_prefix();
        let narrow = has_address32(ins);
        let address_mask = if narrow { 0xffff_ffff } else { !0 };
        let source_base = self.segment_base(ins.memory_segment());
        let down = self.context.rflags & rflags::DF != 0;
        let step = if down { size.wrapping_neg() } else { size };
        let mut budget = BUDGET;
        loop {
            let count = self.context.gpr[RCX] & address_mask;
            if repeat && count == 0 {
                return Ok(Flow::Next);
            }
            if budget == 0 {
                return Ok(Flow::Jumped); // again, at the same RIP
            }
            let from = (self.context.gpr[RSI] & address_mask).wrapping_add(source_base);
            let to = self.context.gpr[RDI] & address_mask;
            let by_element = self.steps_elements();
            let runs = repeat && !down && !narrow && !by_element;
            if runs && matches!(shape, Shape::Move | Shape::Store) {
                let done = self.string_run(shape, to, from, count, size)?;
                if done != 0 {
                    let bytes = done * size;
                    self.context.gpr[RCX] -= done;
                    self.context.gpr[RDI] = to.wrapping_add(bytes);
                    if shape == Shape::Move {
                        self.context.gpr[RSI] = self.context.gpr[RSI].wrapping_add(bytes);
                    }
                    budget = budget.saturating_sub(bytes);
                    continue;
                }
            }
            let width = size as usize;
            let mut stop = false;
            match shape {
                Shape::Move => {
                    let value = self.load(from, width)?;
                    self.store(to, width, value)?;
                }
                Shape::Store => self.store(to, width, self.context.gpr[RAX])?,
                Shape::Load => {
                    let value = self.load(from, width)?;
                    self.set_register(accumulator(size), value);
                }
                Shape::Scan | Shape::Compare => {
                    let left = match shape {
                        Shape::Compare => self.load(from, width)?,
                        _ => self.register(accumulator(size)),
                    };
                    let right = self.load(to, width)?;
                    let flags = compare(left, right, size);
                    self.context.rflags = self.context.rflags & !rflags::STATUS | flags;
                    let equal = flags & rflags::ZF != 0;
                    stop = equal == ins.has_repne_prefix();
                }
            }
            let advance = |value: u64| {
                let moved = value.wrapping_add(step);
                if narrow { moved & 0xffff_ffff } else { moved }
            };
            if matches!(shape, Shape::Move | Shape::Load | Shape::Compare) {
                self.context.gpr[RSI] = advance(self.context.gpr[RSI]);
            }
            if shape != Shape::Load {
                self.context.gpr[RDI] = advance(self.context.gpr[RDI]);
            }
            budget = budget.saturating_sub(size.max(16));
            if !repeat {
                return Ok(Flow::Next);
            }
            self.context.gpr[RCX] = (count - 1) & address_mask;
            if stop {
                return Ok(Flow::Next);
            }
            if by_element && count != 1 && self.will_trap() {
                self.resume = true;
                return Ok(Flow::Jumped);
            }
        }
    }

    /// As many elements as stay within a page on both sides, in memory; 0 when not even
    /// one does. Into code they are one store: a kernel patches itself in this way.
    fn string_run(
        &mut self,
        shape: Shape,
        to: u64,
        from: u64,
        count: u64,
        size: u64,
    ) -> Result<u64, Fault> {
        let mode = self.mode();
        let room = |at: u64| 4096 - (at & 0xfff);
        let mut bytes = room(to);
        if shape == Shape::Move {
            bytes = bytes.min(room(from));
        }
        let elements = (bytes / size).min(count);
        if elements == 0 {
            return Ok(0);
        }
        // The load of the first element comes first, and so does its fault.
        let source = if shape == Shape::Move {
            Some(self.place(from, false, mode)?)
        } else {
            None
        };
        let source = match source {
            Some(Place::Memory(source) | Place::Code(source)) => Some(source),
            Some(Place::Device(_)) => return Ok(0),
            None => None,
        };
        let (target, code) = match self.place(to, true, mode)? {
            Place::Memory(target) => (target, false),
            Place::Code(target) => (target, true),
            Place::Device(_) => return Ok(0),
        };
        if code {
            self.begin_code_store(target, elements * size);
        }
        let done = match source {
            Some(source) => self.ram.copy_up(target, source, elements, size),
            None => self
                .ram
                .fill_up(target, elements, size, self.context.gpr[RAX]),
        };
        if code {
            self.end_code_store(target, elements * size);
        }
        Ok(if done { elements } else { 0 })
    }
}

fn accumulator(size: u64) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

fn has_address32(ins: &Instruction) -> bool {
    use iced_x86::OpKind as K;
    (0..ins.op_count()).any(|k| {
        matches!(
            ins.op_kind(k),
            K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI
        )
    })
}

/// Status flags of `left - right` at a size in bytes.
pub(super) fn compare(left: u64, right: u64, size: u64) -> u64 {
    let shift = 64 - size * 8;
    let (a, b) = (left << shift, right << shift);
    let (result, borrow) = a.overflowing_sub(b);
    let overflow = ((a ^ b) & (a ^ result)) >> 63;
    let low = (result >> shift) as u8;
    let adjust = (left ^ right ^ result >> shift) & rflags::AF;
    u64::from(borrow)
        | u64::from(low.count_ones() & 1 == 0) << 2
        | adjust
        | u64::from(result == 0) << 6
        | result >> 63 << 7
        | overflow << 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_comparison_are_those_of_the_manual() {
        assert_eq!(compare(5, 5, 1), rflags::ZF | rflags::PF);
        assert_eq!(
            compare(0, 1, 8),
            rflags::CF | rflags::SF | rflags::AF | rflags::PF
        );
        assert_eq!(compare(0x80, 1, 1), rflags::OF | rflags::AF);
        assert_eq!(compare(0x1_0000, 0, 2), rflags::ZF | rflags::PF);
    }
}
