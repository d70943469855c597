//! Random instructions of a wanted code, with operands that stay where a program
//! may go.

use iced_x86::{Code, Instruction, InstructionInfoFactory, MemoryOperand, OpCodeOperandKind};
use iced_x86::{OpAccess, OpKind, Register};

use crate::Random;
use crate::layout::{DATA, GS_BASE};

/// Which registers a program keeps for itself.
#[derive(Clone, Debug)]
pub(crate) struct Roles {
    /// Point into the data.
    pub pointers: Vec<u8>,
    /// A small number.
    pub index: u8,
}

impl Roles {
    fn keeps(&self, register: u8) -> bool {
        register == 4 || register == self.index || self.pointers.contains(&register)
    }
}

/// A random instruction with this code, or nothing when chance made one that would
/// spoil a kept register.
pub(crate) fn random(
    code: Code,
    roles: &Roles,
    random: &mut Random,
    info: &mut InstructionInfoFactory,
) -> Option<Instruction> {
    let form = code.op_code();
    let mut ins = Instruction::default();
    ins.set_code(code);
    for operand in 0..form.op_count() {
        set_operand(&mut ins, operand, form.op_kind(operand), roles, random);
    }
    if is_bit_string(&ins) {
        // Its bits lie far away unless the index is small.
        let bits = ins.op1_register().size();
        ins.set_op1_register(general(roles.index, bits));
    }
    let memory = (0..ins.op_count()).any(|operand| ins.op_kind(operand) == OpKind::Memory);
    if memory && form.can_use_lock_prefix() && ins.op0_kind() == OpKind::Memory && random.one_in(4)
    {
        ins.set_has_lock_prefix(true);
    }
    let spoils = info.info(&ins).used_registers().iter().any(|used| {
        let full = used.register().full_register();
        let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        // POP RSP would lead anywhere.
        let moves_stack = full == Register::RSP
            && is_stack(code)
            && (code != Code::Pop_r64 && code != Code::Pop_rm64
                || ins.op0_register().full_register() != Register::RSP);
        full.is_gpr64()
            && written
            && !moves_stack
            && roles.keeps((full as u8).wrapping_sub(Register::RAX as u8))
    });
    (!spoils).then_some(ins)
}

fn is_stack(code: Code) -> bool {
    matches!(
        code,
        Code::Push_r64
            | Code::Pushq_imm8
            | Code::Pushq_imm32
            | Code::Push_rm64
            | Code::Pop_r64
            | Code::Pop_rm64
            | Code::Pushfq
    )
}

fn is_bit_string(ins: &Instruction) -> bool {
    use iced_x86::Mnemonic::{Bt, Btc, Btr, Bts};
    matches!(ins.mnemonic(), Bt | Btc | Btr | Bts)
        && ins.op0_kind() == OpKind::Memory
        && ins.op1_kind() == OpKind::Register
}

/// The part of general register `n` that has `size` bytes.
pub(crate) fn general(n: u8, size: usize) -> Register {
    let first = match size {
        8 => Register::RAX,
        4 => Register::EAX,
        _ => Register::AX,
    };
    first + u32::from(n)
}

fn byte_register(random: &mut Random) -> Register {
    // AL to BH, SPL to R15L
    Register::AL + random.below(20) as u32
}

fn set_operand(
    ins: &mut Instruction,
    operand: u32,
    kind: OpCodeOperandKind,
    roles: &Roles,
    random: &mut Random,
) {
    use OpCodeOperandKind as K;
    let any = random.below(16) as u8;
    let eight = random.below(8) as u32;
    let register = |ins: &mut Instruction, register| {
        ins.set_op_kind(operand, OpKind::Register);
        ins.set_op_register(operand, register);
    };
    let to_memory = random.below(3) != 0;
    match kind {
        K::mem => memory(ins, operand, roles, random),
        K::mem_offs => {
            ins.set_op_kind(operand, OpKind::Memory);
            let at = DATA + 0x1000 + random.below(0x2ffc);
            ins.set_memory_displacement64(at);
            ins.set_memory_displ_size(8);
        }
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
            if to_memory =>
        {
            memory(ins, operand, roles, random);
        }
        K::r8_or_mem | K::r8_reg | K::r8_opcode => register(ins, byte_register(random)),
        K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => register(ins, general(any, 2)),
        K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            register(ins, general(any, 4))
        }
        K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            register(ins, general(any, 8))
        }
        K::mm_or_mem | K::mm_reg | K::mm_rm => register(ins, Register::MM0 + eight),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
            register(ins, Register::XMM0 + u32::from(any));
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
            register(ins, Register::YMM0 + u32::from(any));
        }
        K::mem_vsib32x | K::mem_vsib64x => {
            vector_memory(ins, operand, Register::XMM0, roles, random)
        }
        K::mem_vsib32y | K::mem_vsib64y => {
            vector_memory(ins, operand, Register::YMM0, roles, random)
        }
        K::seg_rDI => ins.set_op_kind(operand, OpKind::MemorySegRDI),
        K::sti_opcode => register(ins, Register::ST0 + eight),
        K::st0 => register(ins, Register::ST0),
        K::al => register(ins, Register::AL),
        K::cl => register(ins, Register::CL),
        K::ax => register(ins, Register::AX),
        K::eax => register(ins, Register::EAX),
        K::rax => register(ins, Register::RAX),
        K::dx => register(ins, Register::DX),
        K::imm8_const_1 => immediate(ins, operand, OpKind::Immediate8, 1),
        K::imm8 => immediate(ins, operand, OpKind::Immediate8, random.bits() & 0xff),
        K::imm8sex16 => sign_extended(ins, operand, OpKind::Immediate8to16, random),
        K::imm8sex32 => sign_extended(ins, operand, OpKind::Immediate8to32, random),
        K::imm8sex64 => sign_extended(ins, operand, OpKind::Immediate8to64, random),
        K::imm16 => immediate(ins, operand, OpKind::Immediate16, random.bits() & 0xffff),
        K::imm32 => immediate(
            ins,
            operand,
            OpKind::Immediate32,
            random.bits() & 0xffff_ffff,
        ),
        K::imm32sex64 => {
            let value = random.bits() as i32 as i64;
            immediate(ins, operand, OpKind::Immediate32to64, value as u64);
        }
        K::imm64 => immediate(ins, operand, OpKind::Immediate64, random.bits()),
        _ => {}
    }
}

fn immediate(ins: &mut Instruction, operand: u32, kind: OpKind, value: u64) {
    ins.set_op_kind(operand, kind);
    ins.set_immediate_u64(operand, value);
}

fn sign_extended(ins: &mut Instruction, operand: u32, kind: OpKind, random: &mut Random) {
    immediate(ins, operand, kind, random.bits() as i8 as i64 as u64);
}

/// A memory operand with a vector as index; [`crate::program`] keeps that small.
fn vector_memory(
    ins: &mut Instruction,
    operand: u32,
    first: Register,
    roles: &Roles,
    random: &mut Random,
) {
    ins.set_op_kind(operand, OpKind::Memory);
    let size = if random.one_in(4) { 4 } else { 8 };
    ins.set_memory_base(general(random.pick(&roles.pointers), size));
    ins.set_memory_index(first + random.below(16) as u32);
    ins.set_memory_index_scale(1 << random.below(4));
    ins.set_memory_displacement64(random.below(256));
    ins.set_memory_displ_size(1);
    if random.one_in(4) {
        ins.set_segment_prefix(Register::GS);
    }
}

/// A memory operand in one of all the forms.
fn memory(ins: &mut Instruction, operand: u32, roles: &Roles, random: &mut Random) {
    ins.set_op_kind(operand, OpKind::Memory);
    let aligned = ins.memory_size().size() >= 16 && !random.one_in(16);
    let mut disp = random.below(512) as i64 - 256;
    if random.one_in(8) {
        disp = random.below(4096) as i64 - 2048;
    }
    if random.one_in(4) {
        disp = 0;
    }
    let alignment = ins.memory_size().size().next_power_of_two() as i64;
    if aligned {
        disp &= -alignment;
    }
    let pointer = random.pick(&roles.pointers);
    let base = general(pointer, 8);
    let index = general(roles.index, 8);
    let scale = 1 << random.below(4);
    let displ_size = |disp: i64| match disp {
        0 => 0,
        -128..=127 => 1,
        _ => 8,
    };
    let none = Register::None;
    let with = |base, index, scale, disp: i64, size, segment| {
        MemoryOperand::new(base, index, scale, disp, size, false, segment)
    };
    let absolute = ((DATA + 0x1000) as i64 + random.below(0x2ffc) as i64)
        & if aligned { -alignment } else { -1 };
    let operand = match random.below(16) {
        0..=4 => with(base, none, 1, disp, displ_size(disp), none),
        5 | 6 => with(base, index, scale, disp, displ_size(disp), none),
        // An index without a base, the pointer itself.
        7 => with(none, base, 1, disp, 8, none),
        8 => with(Register::RIP, none, 1, absolute, 8, none),
        9 => with(none, none, 1, absolute, 8, none),
        10 => with(
            general(pointer, 4),
            none,
            1,
            disp,
            if disp == 0 { 0 } else { 4 },
            none,
        ),
        11 => with(
            general(pointer, 4),
            general(roles.index, 4),
            scale,
            disp,
            if disp == 0 { 0 } else { 4 },
            none,
        ),
        12 => {
            let disp = disp - GS_BASE as i64;
            with(base, none, 1, disp, displ_size(disp), Register::GS)
        }
        13 => with(none, none, 1, absolute - GS_BASE as i64, 8, Register::GS),
        14 if !aligned || ins.memory_size().size() < 16 => {
            with(Register::RSP, none, 1, disp, displ_size(disp), none)
        }
        _ => with(base, index, scale, disp, displ_size(disp), Register::GS),
    };
    ins.set_memory_base(operand.base);
    ins.set_memory_index(operand.index);
    ins.set_memory_index_scale(operand.scale);
    ins.set_memory_displacement64(operand.displacement as u64);
    ins.set_memory_displ_size(operand.displ_size);
    ins.set_segment_prefix(operand.segment_prefix);
}
