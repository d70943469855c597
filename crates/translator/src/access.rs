//! Page checks: from a guest memory operand to a host one.
//!
//! With dead flags a check is `xor` with the TLB's tag and one unsigned compare,
//! which also refuses operands that run into the next page. With live flags it is
//! a subtraction by `not` and `lea`, `pext` of the bits above the page offset, and
//! `jrcxz`.

use iced_x86::Register;

use crate::assembler::{Memory, NONE, context, guest_register, op};
use crate::context::{Context, S1, S2, TLB_ENTRIES, Tlb};
use crate::emitter::{AT_S1, ColdKind, Emitter, Flags, tlb};
use crate::groups::Check;
use crate::plan::{PAGE, Step};
use crate::registers::{general, is_general32};

const RCX: u8 = 1;
pub(crate) const RSP: u8 = 4;

/// What an access needs to be checked for.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub size: u8,
    pub write: bool,
}

impl Access {
    /// Largest offset in a page at which the operand does not leave it.
    fn last_offset(self) -> i32 {
        PAGE as i32 - i32::from(self.size)
    }
}

impl Emitter<'_> {
    /// Checks the step's memory operand. S1 and S2 are lost, but where the operand
    /// returned uses one of them. `base_free` asks for one at S1 alone.
    pub(crate) fn operand(&mut self, step: &Step, access: Access, base_free: bool) -> Memory {
        if self.bounces() {
            return self.bounce();
        }
        let disp = step.ins.memory_displacement64() as i32;
        if !base_free && let Some(base) = step.plain_base() {
            if base == RSP {
                return self.stack(step, disp, access);
            }
            if self.groups.based >> self.current & 1 != 0 {
                self.want_group(base);
                return Memory::sum(base, S2, disp);
            }
            self.sum(base, disp);
            return self.lookup(step, access, Some((base, disp)));
        }
        match self.address(step) {
            Some(va) => self.lookup_constant(step, va, access),
            None => self.lookup(step, access, None),
        }
    }

    fn bounce(&mut self) -> Memory {
        self.asm.load(S1, context!(bounce_at));
        AT_S1
    }

    /// The effective address into S1, or returned when it is a constant.
    pub(crate) fn address(&mut self, step: &Step) -> Option<u64> {
        let segment = match step.ins.memory_segment() {
            Register::FS => Some(context!(fs_base)),
            Register::GS => Some(context!(gs_base)),
            _ => None,
        };
        let constant = self.offset(step, S1, true);
        let Some(segment) = segment else {
            return constant;
        };
        match constant.map(|value| (value, i32::try_from(value as i64))) {
            Some((_, Ok(disp))) => {
                self.asm.load(S1, segment);
                if disp != 0 {
                    self.asm.lea(S1, Memory::at(S1, disp));
                }
            }
            Some((value, Err(_))) => {
                self.asm.constant(S1, value);
                self.asm.load(S2, segment);
                self.asm.add(S1, S2);
            }
            None => {
                self.asm.load(S2, segment);
                self.asm.add(S1, S2);
            }
        }
        None
    }

    /// The memory operand's offset in its segment into `to`, or returned when it is
    /// a constant; its low half unless `wide`. Uses S1 and S2.
    pub(crate) fn offset(&mut self, step: &Step, to: u8, wide: bool) -> Option<u64> {
        let ins = &step.ins;
        if ins.is_ip_rel_memory_operand() {
            return Some(ins.ip_rel_memory_address());
        }
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let (base_number, index_number) = (general(base), general(index));
        if base_number.is_none() && index_number.is_none() {
            return Some(ins.memory_displacement64());
        }
        let narrow = is_general32(base) || is_general32(index);
        let base_host = match base_number {
            Some(n) if n >= 14 => {
                self.asm.load(S1, guest_register(n));
                S1
            }
            Some(n) => n,
            None => NONE,
        };
        let index_host = match index_number {
            Some(n) if n >= 14 && index_number == base_number => S1,
            Some(n) if n >= 14 => {
                self.asm.load(S2, guest_register(n));
                S2
            }
            Some(n) => n,
            None => NONE,
        };
        let scale = ins.memory_index_scale().trailing_zeros() as u8;
        let disp = ins.memory_displacement64() as i32;
        let m = Memory {
            base: base_host,
            index: index_host,
            scale,
            disp,
        };
        if narrow {
            self.asm
                .bytes([0x67, 0x40 | to >> 3 << 2 | m.rex(), op::LEA]);
            self.asm.modrm(to, m);
        } else if !wide {
            self.asm.bytes([0x40 | to >> 3 << 2 | m.rex(), op::LEA]);
            self.asm.modrm(to, m);
        } else if m == Memory::at(to, 0) {
        } else if index_host == NONE && disp == 0 {
            self.asm.mov(to, base_host);
        } else {
            self.asm.lea(to, m);
        }
        None
    }

    /// A stack access at RSP + `disp`. The operand returned is relative to RSP as it
    /// is now.
    pub(crate) fn stack(&mut self, step: &Step, disp: i32, access: Access) -> Memory {
        if self.bounces() {
            return self.bounce();
        }
        let operand = Memory::sum(RSP, S1, disp);
        if self.groups.stack >> self.current & 1 != 0 {
            self.want_stack();
            return operand;
        }
        self.sum(RSP, disp);
        if step.keeps_flags() || self.request.kind == crate::Kind::PerAccess {
            return self.lookup(step, access, Some((RSP, disp)));
        }
        self.forget();
        let tag = tlb!(self, stack_tag);
        self.asm.gs(op::XOR, S1, tag);
        self.asm.compare_immediate(S1, access.last_offset());
        let jump = self.asm.jcc(7);
        self.asm.load(S1, tlb!(self, stack_addend));
        let exit = self.access_exit(step, access.size, access.write, true);
        let flags = Flags::at(step);
        self.restore_flags(flags);
        self.cold(jump, ColdKind::Stack { flags, tag, exit });
        operand
    }

    /// `base` + `disp` into S1.
    fn sum(&mut self, base: u8, disp: i32) {
        if disp == 0 {
            self.asm.mov(S1, base);
        } else {
            self.asm.lea(S1, Memory::at(base, disp));
        }
    }

    /// Looks the address in S1 up in the TLB. `plain` is base and displacement when
    /// the address is their sum: the operand then keeps them.
    pub(crate) fn lookup(
        &mut self,
        step: &Step,
        access: Access,
        plain: Option<(u8, i32)>,
    ) -> Memory {
        self.forget();
        let flags = Flags::at(step);
        let tag = if access.write {
            tlb!(self, write_tag)
        } else {
            tlb!(self, read_tag)
        };
        self.asm.pext(S2, S1, context!(tlb_mask));
        let jump = if flags.kept() {
            self.asm.store(RCX, context!(saved_rcx));
            self.asm.gs_indexed(op::LOAD, RCX, S2, tag);
            self.asm.subtract(S1, RCX);
            self.asm
                .lea(RCX, Memory::at(S1, i32::from(access.size) - 1));
            self.asm.pext(RCX, RCX, context!(page_mask));
            let jump = self.asm.jmp_unless_rcx_zero();
            self.asm.load(RCX, context!(saved_rcx));
            jump
        } else {
            self.asm.gs_indexed(op::XOR, S1, S2, tag);
            self.asm.compare_immediate(S1, access.last_offset());
            self.asm.jcc(7)
        };
        let exit = self.access_exit(step, access.size, access.write, false);
        self.cold(jump, ColdKind::Indexed { flags, tag, exit });
        let operand = match plain {
            Some((base, disp)) => {
                self.asm.gs_indexed(op::LOAD, S1, S2, tlb!(self, addend));
                Memory::sum(base, S1, disp)
            }
            None if flags.kept() => {
                self.asm.gs_indexed(op::LOAD, S2, S2, tlb!(self, host));
                self.asm.add(S1, S2);
                AT_S1
            }
            None => {
                self.asm.gs_indexed(op::ADD, S1, S2, tlb!(self, host));
                AT_S1
            }
        };
        self.restore_flags(flags);
        operand
    }

    /// Looks up a constant address: its TLB entry is known now.
    fn lookup_constant(&mut self, step: &Step, va: u64, access: Access) -> Memory {
        let offset = (va & (PAGE - 1)) as i32;
        if offset > access.last_offset() {
            self.asm.constant(S1, va);
            return self.lookup(step, access, None);
        }
        self.forget();
        let page = va & !(PAGE - 1);
        let entry = (va / PAGE) as usize & (TLB_ENTRIES - 1);
        let entry = entry as i32 * 8;
        let tag = entry
            + if access.write {
                tlb!(self, write_tag)
            } else {
                tlb!(self, read_tag)
            };
        let flags = Flags::at(step);
        let jump = if flags.kept() {
            self.asm.store(RCX, context!(saved_rcx));
            let less = page.wrapping_neg();
            match i32::try_from(less as i64) {
                Ok(disp) => {
                    self.asm.load(RCX, tag);
                    self.asm.lea(RCX, Memory::at(RCX, disp));
                }
                Err(_) => {
                    self.asm.constant(RCX, less);
                    self.asm.load(S1, tag);
                    self.asm.add(RCX, S1);
                }
            }
            let jump = self.asm.jmp_unless_rcx_zero();
            self.asm.load(RCX, context!(saved_rcx));
            jump
        } else {
            match i32::try_from(page as i64) {
                Ok(low) => {
                    // cmp qword gs:[tag], imm32
                    self.asm.bytes([0x65, 0x48, 0x81, 0x3c, 0x25]);
                    self.asm.i32(tag);
                    self.asm.i32(low);
                }
                Err(_) => {
                    self.asm.constant(S1, page);
                    self.asm.gs(op::CMP, S1, tag);
                }
            }
            self.asm.jcc(5)
        };
        self.asm.load(S1, entry + tlb!(self, host));
        let exit = self.access_exit(step, access.size, access.write, false);
        self.cold(jump, ColdKind::Constant { va, flags, exit });
        self.restore_flags(flags);
        Memory::at(S1, offset)
    }

    /// A shared check, before the current instruction.
    pub(crate) fn shared_check(&mut self, check: Check, step: &Step) {
        self.forget();
        let retry = self.asm.here();
        let flags = Flags::at(step);
        self.sum(check.base, check.lowest);
        let tag = if check.stack {
            tlb!(self, stack_tag)
        } else {
            self.asm.pext(S2, S1, context!(tlb_mask));
            if check.write {
                tlb!(self, write_tag)
            } else {
                tlb!(self, read_tag)
            }
        };
        let mut jumps = [0; crate::emitter::JUMPS_MAX];
        if flags.kept() {
            self.asm.store(RCX, context!(saved_rcx));
            if check.stack {
                self.asm.load(RCX, tag);
            } else {
                self.asm.gs_indexed(op::LOAD, RCX, S2, tag);
            }
            self.asm.subtract(S1, RCX);
            self.asm.pext(RCX, S1, context!(page_mask));
            jumps[0] = self.asm.jmp_unless_rcx_zero();
            self.asm.lea(RCX, Memory::at(S1, i32::from(check.len) - 1));
            self.asm.pext(RCX, RCX, context!(page_mask));
            jumps[1] = self.asm.jmp_unless_rcx_zero();
            self.asm.load(RCX, context!(saved_rcx));
        } else {
            if check.stack {
                self.asm.gs(op::XOR, S1, tag);
            } else {
                self.asm.gs_indexed(op::XOR, S1, S2, tag);
            }
            self.asm
                .compare_immediate(S1, PAGE as i32 - i32::from(check.len));
            jumps[0] = self.asm.jcc(7);
        }
        if !check.stack {
            self.asm.gs_indexed(op::LOAD, S2, S2, tlb!(self, addend));
            self.asm.store(S2, group_addend(check.base));
            self.s2_group = Some(check.base);
        }
        self.restore_flags(flags);
        let kind = ColdKind::Group {
            check,
            flags,
            tag,
            at: step.at,
            retry,
        };
        self.out.cold.push(crate::emitter::Cold { jumps, kind });
    }

    fn want_stack(&mut self) {
        if !self.s1_stack {
            self.asm.load(S1, tlb!(self, stack_addend));
            self.s1_stack = true;
        }
    }

    fn want_group(&mut self, base: u8) {
        if self.s2_group != Some(base) {
            self.asm.load(S2, group_addend(base));
            self.s2_group = Some(base);
        }
    }
}

/// Where the addend of the open group on `base` is kept.
const fn group_addend(base: u8) -> i32 {
    context!(group_addend) + base as i32 * 8
}
