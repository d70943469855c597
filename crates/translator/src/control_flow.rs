//! Jumps, and what changes whether interrupts come.

use crate::assembler::{Memory, context};
use crate::block::Exit;
use crate::context::{Context, Mode, S1, S2};
use crate::emitter::{ColdKind, Emitter, cross_jump};
use crate::plan::{PAGE, Step};
use crate::relocation::Target;

const RCX: u8 = 1;
const HLT: u8 = 0xf4;
/// RFLAGS.AC.
const ALIGNMENT_CHECK: i32 = 1 << 18;

impl Emitter<'_> {
    /// Goes on at a constant guest address.
    pub(crate) fn jump(&mut self, target: u64) {
        if self.in_own_page(target) {
            let jump = self.asm.jmp();
            self.link(jump, target);
        } else {
            self.cross_jump(target);
        }
    }

    pub(crate) fn jcc(&mut self, step: &Step) {
        let jump = self.asm.jcc(step.row.opcode);
        self.link(jump, step.ins.near_branch_target());
    }

    pub(crate) fn jrcxz(&mut self, step: &Step) {
        // jrcxz to the second jump, jump over it
        self.asm.bytes([0xe3, 2, 0xeb, 5]);
        let jump = self.asm.jmp();
        self.link(jump, step.ins.near_branch_target());
        self.jump(step.ins.next_ip());
    }

    /// Lets the jump at `jump` lead to `target`, by and by.
    fn link(&mut self, jump: u32, target: u64) {
        if !self.in_own_page(target) {
            self.cold(jump, ColdKind::CrossJump { target });
        } else if let Some(entry) = self.own_entry.filter(|_| target == self.request.va) {
            self.asm.patch(jump, entry);
        } else {
            self.cold(
                jump,
                ColdKind::Link {
                    target: (target & (PAGE - 1)) as u16,
                },
            );
        }
    }

    pub(crate) fn interrupts_off(&mut self) {
        self.asm.store_immediate(context!(interrupts_enabled), 0);
    }

    /// STI ends the block: an interrupt that came while they were off shows in
    /// `pending` only, and then the engine executes STI. In any case it learns
    /// where no interrupt may come: behind STI (SDM, STI). STI and HLT are one, as
    /// idle guests do nothing else. `next_byte` is the opcode behind STI if it is in
    /// the same page.
    pub(crate) fn interrupts_on(&mut self, step: &Step, next_byte: Option<u8>) {
        if next_byte == Some(HLT) {
            self.asm.store_immediate(context!(interrupts_enabled), 1);
            self.exit(Exit::Interpret { at: step.next() });
            return;
        }
        self.asm.store(RCX, context!(saved_rcx));
        self.asm.load(RCX, context!(pending));
        let jump = self.asm.jmp_unless_rcx_zero();
        self.asm.load(RCX, context!(saved_rcx));
        self.forget();
        self.asm.constant(S1, step.ins.next_ip());
        self.asm.store(S1, context!(shadow));
        self.asm.store_immediate(context!(interrupts_enabled), 1);
        self.cold(jump, ColdKind::Interrupted { at: step.at });
        self.jump(step.ins.next_ip());
    }

    /// STAC and CLAC, where they change the mode: the code behind is a block of the
    /// other one.
    pub(crate) fn user_access(&mut self, step: &Step, to: Mode) {
        let on = to == Mode::KernelUserAccess;
        let value = if on { ALIGNMENT_CHECK } else { 0 };
        self.asm.store_immediate(context!(alignment_check), value);
        let next = step.ins.next_ip();
        if self.in_own_page(next) {
            let jump = self.asm.jmp();
            let target = (next & (PAGE - 1)) as u16;
            self.cold(jump, ColdKind::Link { target });
        } else {
            cross_jump(self.asm, next, to);
        }
    }

    pub(crate) fn swap_gs(&mut self) {
        self.forget();
        self.asm.load(S1, context!(gs_base));
        self.asm.load(S2, context!(kernel_gs_base));
        self.asm.store(S2, context!(gs_base));
        self.asm.store(S1, context!(kernel_gs_base));
    }

    /// The entry for the jump cache: goes to the engine unless S1 is the block's
    /// address, without touching flags, which the block that was meant may want.
    pub(crate) fn indirect_entry(&mut self) {
        let less = self.request.va.wrapping_neg();
        self.asm.mov(S2, RCX);
        if let Ok(disp) = i32::try_from(less as i64) {
            self.asm.lea(RCX, Memory::at(S1, disp));
        } else {
            self.asm.constant(RCX, less);
            self.asm.add(RCX, S1);
        }
        // jrcxz over the next two
        self.asm.bytes([0xe3, 8]);
        self.asm.mov(RCX, S2);
        self.asm
            .jmp_to_thunk(Target::JumpMiss, self.request.thunks.jump_miss);
        self.asm.mov(RCX, S2);
    }
}
