//! SYSCALL at CPL 3 and SYSRET at CPL 0 without the engine: two stubs that all blocks
//! share (SDM vol. 2B, SYSCALL and SYSRET).
//!
//! They do what a kernel that uses them in the ordinary way needs. Everything else is
//! the engine's: it is asked where [`Context::calls_barred`] says so, or flags are
//! set that live in no host register, or RCX is no address of the lower half.
//!
//! Invariant: a stub that goes back to the block has changed nothing of the guest's.
//! What the engine keeps of the vCPU's segments is of before the last crossing until
//! it looks at [`Context::crossed`].

use crate::assembler::{Assembler, context};
use crate::block::Exit;
use crate::context::{Context, Crossed, Mode, S1, S2};
use crate::emitter::{Emitter, jump_indirect};
use crate::plan::Step;
use crate::relocation::Target;

const RAX: u8 = 0;
const RCX: u8 = 1;
const R11: u8 = 11;
/// RFLAGS.IF, DF and OF.
const IF_BIT: u8 = 9;
const DF_BIT: u8 = 10;
const OF_BIT: u8 = 11;

impl Emitter<'_> {
    pub(crate) fn system_call(&mut self, step: &Step) {
        self.asm.constant(S1, step.ins.next_ip());
        let stub = self.request.thunks.system_call;
        self.cross(step, Target::SystemCall, stub);
    }

    pub(crate) fn system_return(&mut self, step: &Step) {
        let stub = self.request.thunks.system_return;
        self.cross(step, Target::SystemReturn, stub);
    }

    /// S2 is where the stub goes if it cannot: the exit behind the jump.
    fn cross(&mut self, step: &Step, target: Target, stub: u64) {
        // lea S2, [rip + 5]
        self.asm.bytes([0x4c, 0x8d, 0x3d, 5, 0, 0, 0]);
        self.asm.jmp_to_thunk(target, stub);
        self.exit(Exit::Interpret { at: step.at });
    }
}

/// The stub for SYSCALL: S1 is the address behind it.
pub(crate) fn call_stub(asm: &mut Assembler) {
    unless_zero_go_back(asm, |asm| {
        asm.load(RCX, context!(calls_barred));
        asm.load(S2, context!(rflags_high));
        asm.add(RCX, S2);
        asm.load(S2, context!(alignment_check));
        asm.add(RCX, S2);
    });
    asm.mov(RCX, S1);
    asm.store(RAX, context!(temp));
    // lahf; seto al; movzx r11d, al; movzx eax, ah
    asm.bytes([0x9f, 0x0f, 0x90, 0xc0]);
    asm.bytes([0x44, 0x0f, 0xb6, 0xd8, 0x0f, 0xb6, 0xc4]);
    asm.rotate_right(R11, R11, 64 - OF_BIT);
    asm.add(R11, RAX);
    for (field, bit) in [
        (context!(interrupts_enabled), IF_BIT),
        (context!(direction), DF_BIT),
    ] {
        asm.load(RAX, field);
        asm.rotate_right(RAX, RAX, 64 - bit);
        asm.add(R11, RAX);
    }
    asm.load(RAX, context!(temp));
    asm.store_immediate(context!(interrupts_enabled), 0);
    asm.store_immediate(context!(direction), 0);
    asm.store_immediate(context!(crossed), Crossed::Called as i32);
    // 1 less 0 clears all six status flags; cld
    asm.constant(S1, 1);
    asm.compare_immediate(S1, 0);
    asm.byte(0xfc);
    asm.load(S1, context!(call_target));
    jump_indirect(asm, Mode::Kernel);
}

/// The stub for SYSRET with REX.W.
pub(crate) fn return_stub(asm: &mut Assembler) {
    unless_zero_go_back(asm, |asm| {
        asm.pext(S1, RCX, context!(upper_half_mask));
        asm.load(RCX, context!(returns_barred));
        asm.add(RCX, S1);
        asm.pext(S1, R11, context!(odd_flags_mask));
        asm.add(RCX, S1);
        asm.load(S1, context!(pending));
        asm.add(RCX, S1);
    });
    asm.load(RCX, context!(saved_rcx));
    asm.pext(S1, R11, context!(interrupts_mask));
    asm.store(S1, context!(interrupts_enabled));
    asm.store_immediate(context!(direction), 0);
    asm.store_immediate(context!(rflags_high), 0);
    asm.store_immediate(context!(crossed), Crossed::Returned as i32);
    // AH are the low flags, AL is OF: movzx eax, r11b; shl eax, 8; add eax, S1d;
    // add al, 0x7f; sahf; cld
    asm.store(RAX, context!(temp));
    asm.pext(S1, R11, context!(overflow_mask));
    asm.bytes([0x41, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 8]);
    asm.bytes([0x44, 0x01, 0xf0]);
    asm.bytes([0x04, 0x7f, 0x9e, 0xfc]);
    asm.load(RAX, context!(temp));
    asm.mov(S1, RCX);
    jump_indirect(asm, Mode::User);
}

/// Goes back to the address in S2 unless `sum` leaves zero in RCX. S2 is lost, flags
/// are not; `sum` may use it, and S1 where the block does not need it again.
fn unless_zero_go_back(asm: &mut Assembler, sum: impl FnOnce(&mut Assembler)) {
    asm.store(S2, context!(refill_fail));
    asm.store(RCX, context!(saved_rcx));
    sum(asm);
    let barred = asm.jmp_unless_rcx_zero();
    // The way back is out of the way of what follows.
    let done = asm.jmp();
    let here = asm.here();
    asm.patch(barred, here);
    asm.load(RCX, context!(saved_rcx));
    // jmp gs:[refill_fail]
    asm.bytes([0x65, 0xff, 0x24, 0x25]);
    asm.i32(context!(refill_fail));
    let here = asm.here();
    asm.patch(done, here);
}
