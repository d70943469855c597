//! Memory as 16- and 32-bit code sees it: segments (SDM vol. 3, §3.4), and no
//! paging, 32-bit paging, PAE paging, or that of long mode (§4.3 to §4.5).

use std::sync::atomic::Ordering;

use iced_x86::{Instruction, Register};
use translator::context::Mode;
use x86::control::{cr0, cr4, efer, vector};
use x86::descriptor::{self, Descriptor};
use x86::paging;
use x86::registers::RSP;
use x86::state::{Segment, VcpuState};

use super::{GP, Trouble};
use crate::cpu::Cpu;
use crate::guest_ram::set_bits;
use crate::interp::segment_index;
use crate::mmu::walk::Access;

const FAULT: Trouble = Trouble::Fault(vector::PF);

impl Cpu {
    pub(super) fn protected(&self) -> bool {
        self.regs.cr0 & cr0::PE != 0
    }

    /// Where a linear address leads.
    pub(super) fn early_walk(&mut self, va: u64, access: Access) -> Result<u64, Trouble> {
        let va = va & 0xffff_ffff;
        if self.regs.cr0 & cr0::PG == 0 {
            return Ok(va);
        }
        if self.regs.efer & efer::LMA != 0 {
            return Ok(self.walk(va, access, Mode::Kernel)?.pa);
        }
        let write = access == Access::Write;
        if self.regs.cr4 & cr4::PAE == 0 {
            return self.walk_two_levels(va, write);
        }
        // The four pointers lie at any multiple of 32 bytes, and have no bits of access.
        let pointer = (self.regs.cr3 & 0xffff_ffe0) + (va >> 30) * 8;
        let slot = self.ram.entry(pointer).ok_or(FAULT)?;
        let mut table = slot.load(Ordering::Acquire);
        if table & paging::PRESENT == 0 {
            return Err(FAULT);
        }
        for (shift, last) in [(21, false), (12, true)] {
            let at = (table & paging::ADDRESS) + (va >> shift & 511) * 8;
            let slot = self.ram.entry(at).ok_or(FAULT)?;
            let leaf = last || slot.load(Ordering::Acquire) & paging::LARGE != 0;
            let entry = loop {
                let entry = slot.load(Ordering::Acquire);
                self.early_allowed(entry, write)?;
                let dirty = if leaf && write { paging::DIRTY } else { 0 };
                if set_bits(slot, entry, paging::ACCESSED | dirty) {
                    break entry;
                }
            };
            if leaf {
                let offset = (1 << shift) - 1;
                return Ok(entry & paging::ADDRESS & !offset | va & offset);
            }
            table = entry;
        }
        Err(FAULT)
    }

    fn early_allowed(&self, entry: u64, write: bool) -> Result<(), Trouble> {
        let writable = entry & paging::WRITABLE != 0 || self.regs.cr0 & cr0::WP == 0;
        if entry & paging::PRESENT != 0 && (writable || !write) {
            Ok(())
        } else {
            Err(FAULT)
        }
    }

    /// 32-bit paging: entries of four bytes.
    fn walk_two_levels(&mut self, va: u64, write: bool) -> Result<u64, Trouble> {
        let mut table = self.regs.cr3 & 0xffff_f000;
        for (shift, last) in [(22, false), (12, true)] {
            let at = table + (va >> shift & 1023) * 4;
            let slot = self.ram.entry(at & !7).ok_or(FAULT)?;
            let half = (at & 4) * 8;
            let (entry, leaf) = loop {
                let both = slot.load(Ordering::Acquire);
                let entry = both >> half & 0xffff_ffff;
                self.early_allowed(entry, write)?;
                let large = entry & paging::LARGE != 0 && self.regs.cr4 & cr4::PSE != 0;
                let leaf = last || large;
                let dirty = if leaf && write { paging::DIRTY } else { 0 };
                if set_bits(slot, both, (paging::ACCESSED | dirty) << half) {
                    break (entry, leaf);
                }
            };
            if leaf {
                let offset = (1 << shift) - 1;
                // Bits 13 to 20 of a 4 MiB page are its upper address bits (PSE-36).
                let high = if last { 0 } else { (entry >> 13 & 0xff) << 32 };
                return Ok(high | entry & !offset & 0xffff_f000 | va & offset);
            }
            table = entry & 0xffff_f000;
        }
        Err(FAULT)
    }

    /// Reads at a linear address. Where there is no memory there are ones.
    pub(super) fn early_read(&mut self, va: u64, into: &mut [u8]) -> Result<(), Trouble> {
        for (i, byte) in into.iter_mut().enumerate() {
            let pa = self.early_walk(va.wrapping_add(i as u64), Access::Read)?;
            *byte = self.ram.load(pa, 1).unwrap_or(0xff) as u8;
        }
        Ok(())
    }

    /// Writes at a linear address; nothing is written unless all can be.
    pub(super) fn early_write(&mut self, va: u64, from: &[u8]) -> Result<(), Trouble> {
        let first = self.early_walk(va, Access::Write)?;
        let last = from.len() as u64 - 1;
        let end = self.early_walk(va.wrapping_add(last), Access::Write)?;
        if end.wrapping_sub(first) == last && first >> 12 == end >> 12 {
            self.write_physical(first, from);
            return Ok(());
        }
        for (i, byte) in from.iter().enumerate() {
            let pa = self.early_walk(va.wrapping_add(i as u64), Access::Write)?;
            self.write_physical(pa, &[*byte]);
        }
        Ok(())
    }

    /// Linear address of `len` bytes at an offset in a segment.
    pub(super) fn early_linear(
        &self,
        segment: usize,
        offset: u64,
        len: u64,
    ) -> Result<u64, Trouble> {
        const EXPANDS_DOWN: u16 = 1 << 2;
        let found = self.regs.segments[segment];
        let stack = segment == VcpuState::SS;
        let refused = if stack {
            Trouble::Fault(vector::SS)
        } else {
            GP
        };
        let data = found.rights & descriptor::CODE == 0;
        let down = data && found.rights & EXPANDS_DOWN != 0;
        let beyond = offset + len - 1 > u64::from(found.limit);
        if (self.protected() && found.rights & descriptor::PRESENT == 0) || (beyond && !down) {
            return Err(refused);
        }
        Ok(found.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Offset of the memory operand in its segment.
    pub(super) fn early_offset(&self, ins: &Instruction) -> u64 {
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let mut at = ins.memory_displacement64();
        if base != Register::None {
            at = at.wrapping_add(self.register(base));
        }
        if index != Register::None {
            let scale = u64::from(ins.memory_index_scale());
            at = at.wrapping_add(self.register(index).wrapping_mul(scale));
        }
        let narrow = base.is_gpr16()
            || index.is_gpr16()
            || (base == Register::None && index == Register::None && ins.memory_displ_size() == 2);
        at & if narrow { 0xffff } else { 0xffff_ffff }
    }

    pub(super) fn early_load(
        &mut self,
        segment: usize,
        offset: u64,
        size: usize,
    ) -> Result<u64, Trouble> {
        let va = self.early_linear(segment, offset, size as u64)?;
        let mut bytes = [0; 8];
        self.early_read(va, &mut bytes[..size.min(8)])?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(super) fn early_store(
        &mut self,
        segment: usize,
        offset: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Trouble> {
        let va = self.early_linear(segment, offset, size as u64)?;
        self.early_write(va, &value.to_le_bytes()[..size.min(8)])
    }

    /// The stack pointer, and the bits of it that count.
    fn early_stack(&self) -> (u64, u64) {
        let big = self.regs.segments[VcpuState::SS].rights & descriptor::BIG != 0;
        let mask = if big { 0xffff_ffff } else { 0xffff };
        (self.context.gpr[RSP] & mask, mask)
    }

    pub(super) fn early_push(&mut self, value: u64, size: usize) -> Result<(), Trouble> {
        let (sp, mask) = self.early_stack();
        let new = sp.wrapping_sub(size as u64) & mask;
        self.early_store(VcpuState::SS, new, size, value)?;
        self.move_stack(-(size as i64));
        Ok(())
    }

    pub(super) fn early_pop(&mut self, size: usize) -> Result<u64, Trouble> {
        let (sp, _) = self.early_stack();
        let value = self.early_load(VcpuState::SS, sp, size)?;
        self.move_stack(size as i64);
        Ok(value)
    }

    pub(super) fn move_stack(&mut self, by: i64) {
        let (sp, mask) = self.early_stack();
        let slot = &mut self.context.gpr[RSP];
        *slot = (*slot & !mask | sp.wrapping_add_signed(by) & mask) & 0xffff_ffff;
    }

    /// The descriptor of a selector.
    pub(super) fn early_descriptor(&mut self, selector: u16) -> Result<Descriptor, Trouble> {
        let at = self.descriptor_address(selector, 8).ok_or(GP)?;
        let mut bytes = [0; 8];
        self.early_read(at, &mut bytes)?;
        Ok(Descriptor(u64::from_le_bytes(bytes)))
    }

    /// Loads a data segment register, or SS.
    pub(super) fn early_load_segment(
        &mut self,
        register: Register,
        selector: u16,
    ) -> Result<(), Trouble> {
        if register == Register::CS {
            return Err(Trouble::Fault(vector::UD));
        }
        let index = segment_index(register);
        let segment = if !self.protected() {
            Segment {
                selector,
                base: u64::from(selector) << 4,
                ..self.regs.segments[index]
            }
        } else if selector & !3 == 0 {
            if index == VcpuState::SS {
                return Err(GP);
            }
            Segment {
                selector,
                ..Segment::default()
            }
        } else {
            let found = self.early_descriptor(selector)?;
            let rights = found.rights();
            let code = rights & descriptor::CODE != 0;
            let able = rights & descriptor::READ_WRITE != 0;
            let usable = if index == VcpuState::SS {
                !code && able
            } else {
                !code || able
            };
            if rights & descriptor::NOT_SYSTEM == 0 || !usable || !found.present() {
                return Err(GP);
            }
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
}
