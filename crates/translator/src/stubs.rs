//! Code that all blocks share, and the jump that replaces a link to a block that
//! may only be entered through the jump cache.

use crate::assembler::{Assembler, context, op};
use crate::block::INDIRECT_EXIT;
use crate::context::{Context, MODES, Mode, S1, S2, Tlb};
use crate::emitter::cross_jump;
use crate::system_calls;

/// Code to be placed where it was asked for, and the host addresses in it.
#[derive(Clone, Debug)]
pub struct Stubs {
    /// Host code.
    pub code: Vec<u8>,
    /// For [`crate::Thunks::jump_miss`].
    pub jump_miss: u64,
    /// For [`crate::Thunks::stack_refill`].
    pub stack_refill: [u64; MODES],
    /// For [`crate::Thunks::system_call`].
    pub system_call: u64,
    /// For [`crate::Thunks::system_return`].
    pub system_return: u64,
}

/// The stubs for `place`; `exit_thunk` is [`crate::Thunks::exit`].
pub fn stubs(place: u64, exit_thunk: u64) -> Stubs {
    let mut asm = Assembler {
        place,
        ..Assembler::default()
    };
    asm.constant(S2, u64::from(INDIRECT_EXIT));
    asm.jmp_to(exit_thunk);
    let mut stub = |emit: &dyn Fn(&mut Assembler)| {
        let at = place.wrapping_add(u64::from(asm.here()));
        emit(&mut asm);
        at
    };
    let stack_refill = Mode::ALL.map(|mode| stub(&|asm| stack_refill(asm, mode)));
    let system_call = stub(&system_calls::call_stub);
    let system_return = stub(&system_calls::return_stub);
    Stubs {
        code: asm.code,
        jump_miss: place,
        stack_refill,
        system_call,
        system_return,
    }
}

/// S1 is the lowest address of the failed check, S2 where to go if the TLB does not
/// have its page either; five bytes before is where to go if it has. Flags are dead.
fn stack_refill(asm: &mut Assembler, mode: Mode) {
    let tlb = context!(tlb) + mode as i32 * size_of::<Tlb>() as i32;
    macro_rules! field {
        ($field:ident) => {
            tlb + core::mem::offset_of!(Tlb, $field) as i32
        };
    }
    asm.store(S1, context!(refill_va));
    asm.store(S2, context!(refill_fail));
    asm.pext(S2, S1, context!(tlb_mask));
    asm.gs_indexed(op::XOR, S1, S2, field!(write_tag));
    asm.compare_immediate(S1, 0xfff);
    let absent = asm.jcc(7);
    // The same page again: then the accesses run into the next one.
    asm.gs_indexed(op::LOAD, S1, S2, field!(write_tag));
    asm.gs(op::CMP, S1, field!(stack_tag));
    let same = asm.jcc(4);
    asm.store(S1, field!(stack_tag));
    asm.gs_indexed(op::LOAD, S1, S2, field!(host));
    asm.store(S1, field!(stack_host));
    asm.gs_indexed(op::LOAD, S1, S2, field!(addend));
    asm.store(S1, field!(stack_addend));
    asm.load(S2, context!(refill_fail));
    asm.lea(S2, crate::assembler::Memory::at(S2, -5));
    // jmp S2
    asm.bytes([0x41, 0xff, 0xe0 | S2 & 7]);
    let fail = asm.here();
    asm.patch(absent, fail);
    asm.patch(same, fail);
    asm.load(S1, context!(refill_va));
    // jmp gs:[refill_fail]
    asm.bytes([0x65, 0xff, 0x24, 0x25]);
    asm.i32(context!(refill_fail));
}

/// A jump to guest address `va` through the jump cache, for `place`: what a link
/// leads to when the target block crosses a page.
pub fn cross_jump_stub(va: u64, mode: Mode, place: u64) -> Vec<u8> {
    let mut asm = Assembler {
        place,
        ..Assembler::default()
    };
    cross_jump(&mut asm, va, mode);
    asm.code
}
