//! CPU models: what CPUID shows executes, what it hides does not.

mod bare;
mod models;

use bare::{CODE, DATA, Machine, STOP};
use hv::Vcpu;
use hv_soft::{CpuModel, SoftHypervisor, host_features};
use iced_x86::code_asm::*;
use iced_x86::{
    Code, CpuidFeature, Encoder, Instruction, OpCodeOperandKind, OpKind, Register as R,
};
use models::{OSXSAVE, machine, switch_on, switched_on};
use x86::cpu_template::CpuTemplate;
use x86::features::{Feature, Features};

fn models() -> Vec<CpuModel> {
    let host = host_features();
    CpuModel::ALL
        .into_iter()
        .filter(|model| model.on(host).is_ok())
        .collect()
}

/// The feature behind the decoder's name for it; nothing for what no model has.
fn feature(name: CpuidFeature) -> Option<Feature> {
    use CpuidFeature as C;
    Some(match name {
        C::FPU | C::FPU287 | C::FPU387 => Feature::Fpu,
        C::MMX => Feature::Mmx,
        C::SSE | C::SSE2 | C::FXSR | C::CLFSH => Feature::Sse,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse41,
        C::SSE4_2 => Feature::Sse42,
        C::POPCNT => Feature::Popcnt,
        C::CMPXCHG16B => Feature::Cx16,
        C::CX8 | C::CMOV => Feature::Base,
        C::TSC => Feature::Tsc,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::FMA => Feature::Fma,
        C::F16C => Feature::F16c,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::MOVBE => Feature::Movbe,
        C::ADX => Feature::Adx,
        C::RDRAND => Feature::Rdrand,
        C::RDSEED => Feature::Rdseed,
        C::AES => Feature::Aes,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::SHA => Feature::Sha,
        C::RDTSCP => Feature::Rdtscp,
        C::RDPID => Feature::Rdpid,
        C::FSGSBASE => Feature::Fsgsbase,
        C::XSAVE => Feature::Xsave,
        C::XSAVEOPT => Feature::Xsaveopt,
        C::CLFLUSHOPT => Feature::Clflushopt,
        C::CLWB => Feature::Clwb,
        _ => return None,
    })
}

/// What is not for this test: the 8086 to the 486 and long mode have no bits, or are
/// another's to test; hidden hints do nothing, and F3 0F BC and BD are BSF and BSR.
fn beside_the_point(code: Code) -> bool {
    use CpuidFeature as C;
    let form = code.op_code();
    let hint = matches!(form.table(), iced_x86::OpCodeTableKind::T0F)
        && matches!(form.op_code() & 0xff, 0x0d | 0x18..=0x1f);
    !form.is_instruction()
        || !form.mode64()
        || code.is_privileged() && !matches!(code, Code::Xsetbv)
        || hint
        || without_meaning(code)
        || code.cpuid_features().iter().all(|name| {
            matches!(
                name,
                C::INTEL8086
                    | C::INTEL186
                    | C::INTEL286
                    | C::INTEL286_ONLY
                    | C::INTEL386
                    | C::INTEL386_ONLY
                    | C::INTEL486
                    | C::X64
                    | C::CPUID
                    | C::MSR
                    | C::PAUSE
                    | C::LZCNT
                    | C::MULTIBYTENOP
                    | C::SYSCALL
                    | C::SEP
                    | C::SMX
                    | C::VMX
                    | C::SVM
                    | C::PCOMMIT
            )
        })
        || code.cpuid_features() == [C::BMI1] && matches!(form.op_code(), 0xbc)
}

/// The 8087's and 287's own; the decoder knows them only if it is told to. CPUs since
/// do nothing. ENDBR is a hint.
fn without_meaning(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Fneni | Feni | Fndisi | Fdisi | Fnsetpm | Fsetpm | Endbr32 | Endbr64
    )
}

/// An instruction with this code whose memory operand is at RBX; nothing where an
/// operand is of a kind that only instructions beside the point have.
fn sample(code: Code) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let form = code.op_code();
    let mut ins = Instruction::default();
    ins.set_code(code);
    for k in 0..form.op_count() {
        let mut register = |register| {
            ins.set_op_kind(k, OpKind::Register);
            ins.set_op_register(k, register);
        };
        let n = k;
        match form.op_kind(k) {
            K::mem | K::mem_mib | K::sibmem => set_memory(&mut ins, k, R::None),
            K::mem_vsib32x | K::mem_vsib64x => set_memory(&mut ins, k, R::XMM5),
            K::mem_vsib32y | K::mem_vsib64y => set_memory(&mut ins, k, R::YMM5),
            K::mem_vsib32z | K::mem_vsib64z => set_memory(&mut ins, k, R::ZMM5),
            K::r8_or_mem | K::r8_reg | K::r8_opcode => register(R::CL + n),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => register(R::SI + n),
            K::r32_or_mem
            | K::r32_or_mem_mpx
            | K::r32_reg
            | K::r32_rm
            | K::r32_vvvv
            | K::r32_opcode => register(R::ESI + n),
            K::r64_or_mem
            | K::r64_or_mem_mpx
            | K::r64_reg
            | K::r64_rm
            | K::r64_vvvv
            | K::r64_opcode => register(R::RSI + n),
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(R::MM1 + n),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                register(R::XMM1 + n);
            }
            K::xmmp3_vvvv => register(R::XMM4),
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                register(R::YMM1 + n);
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => register(R::ZMM1 + n),
            K::zmmp3_vvvv => register(R::ZMM4),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => register(R::K1 + n),
            K::kp1_reg => register(R::K2),
            K::bnd_or_mem_mpx | K::bnd_reg => register(R::BND0 + n),
            K::tmm_reg | K::tmm_rm | K::tmm_vvvv => register(R::TMM1 + n),
            K::st0 => register(R::ST0),
            K::sti_opcode => register(R::ST1),
            K::al => register(R::AL),
            K::cl => register(R::CL),
            K::ax => register(R::AX),
            K::eax => register(R::EAX),
            K::rax => register(R::RAX),
            K::dx => register(R::DX),
            K::imm8 | K::imm4_m2z | K::imm8_const_1 => ins.set_op_kind(k, OpKind::Immediate8),
            K::imm16 => ins.set_op_kind(k, OpKind::Immediate16),
            K::imm32 => ins.set_op_kind(k, OpKind::Immediate32),
            K::imm32sex64 => ins.set_op_kind(k, OpKind::Immediate32to64),
            K::seg_rDI => ins.set_op_kind(k, OpKind::MemorySegRDI),
            _ => return None,
        }
    }
    if form.can_use_op_mask_register() {
        ins.set_op_mask(R::K1);
    }
    Some(ins)
}

fn set_memory(ins: &mut Instruction, operand: u32, index: R) {
    ins.set_op_kind(operand, OpKind::Memory);
    ins.set_memory_base(R::RBX);
    ins.set_memory_index(index);
}

/// Runs one instruction at CPL 0, and gives the vector of the fault that it raised.
fn execute(machine: &mut Machine, at: u64, bytes: &[u8], features: Features) -> Option<u8> {
    machine.put(at, bytes);
    machine.put(at + bytes.len() as u64, &[0xe6, STOP, 0xf4]);
    let mut state = bare::state();
    switch_on(&mut state, features);
    state.rip = at;
    state.gpr = [0; 16];
    state.gpr[4] = bare::STACK;
    state.gpr[3] = DATA;
    state.gpr[7] = DATA;
    machine.vcpu.set_state(&state).unwrap();
    let state = machine.run_to_stop();
    let ended = state.rip == at + bytes.len() as u64 + 2;
    (!ended).then_some(state.gpr[0] as u8)
}

#[test]
fn what_cpuid_shows_executes_and_what_it_hides_is_undefined() {
    for model in models() {
        let (mut machine, features) = switched_on(model);
        let (mut shown, mut hidden, mut wrong) = (0, 0, Vec::new());
        let codes = Code::values().filter(|code| !beside_the_point(*code));
        for (code, at) in codes.zip((CODE..).step_by(32)) {
            let may = code
                .cpuid_features()
                .iter()
                .all(|name| feature(*name).is_some_and(|feature| features.has(feature)));
            let mut encoder = Encoder::new(64);
            let ins = sample(code);
            if ins.is_none_or(|ins| encoder.encode(&ins, at).is_err()) {
                // Of what no model has, a few cannot be made here.
                if may {
                    wrong.push(format!("{code:?}: no sample"));
                }
                continue;
            }
            let vector = execute(&mut machine, at, &encoder.take_buffer(), features);
            if may == (vector == Some(6)) {
                wrong.push(format!("{code:?}: {vector:?}"));
            }
            *(if may { &mut shown } else { &mut hidden }) += 1;
        }
        println!("{}: {shown} codes execute, {hidden} do not", model.name());
        assert!(wrong.is_empty(), "{}: {wrong:#?}", model.name());
        assert!(shown > 600 && hidden > 1000);
    }
}

#[test]
fn cpuid_shows_what_the_model_has_and_cr4_in_osxsave() {
    for model in models() {
        let (mut machine, features) = switched_on(model);
        for leaf in [1_u32, 7, 0x8000_0001] {
            machine.code(|asm| {
                asm.mov(eax, leaf).unwrap();
                asm.xor(ecx, ecx).unwrap();
                asm.cpuid().unwrap();
                asm.out(u32::from(STOP), al).unwrap();
                asm.hlt().unwrap();
            });
            machine.change(|state| state.rip = CODE);
            let state = machine.run_to_stop();
            let got = [0, 3, 1, 2].map(|n: usize| state.gpr[n] as u32);
            for feature in Feature::ALL {
                let Some(place) = feature.place().filter(|place| place.leaf == leaf) else {
                    continue;
                };
                let shown = got[place.register] >> place.bit & 1 != 0;
                assert_eq!(shown, features.has(*feature), "{feature:?} of {model:?}");
            }
            if leaf == 1 {
                assert_eq!(got[2] >> 27 & 1 != 0, features.has(Feature::Xsave));
            }
        }
    }
}

#[test]
fn a_state_with_what_the_model_lacks_is_refused() {
    let mut machine = machine(CpuModel::V2);
    let mut state = machine.vcpu.state().unwrap();
    state.xcr0 = 7;
    assert!(machine.vcpu.set_state(&state).is_err());
    state.xcr0 = 1;
    state.cr4 |= OSXSAVE;
    assert!(machine.vcpu.set_state(&state).is_err());
    state.cr4 &= !OSXSAVE;
    state.xsave.truncate(512);
    assert!(machine.vcpu.set_state(&state).is_err());
}

#[test]
fn a_template_takes_features_away_and_changes_what_is_read() {
    // Bit 3 of leaf 7's EBX is BMI1, bit 23 of leaf 1's ECX is POPCNT.
    let template = r#"{
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
            {"register": "ecx", "bitmap": "0b0xxxxxxxxxxxxxxxxxxxxxxx"},
            {"register": "eax", "bitmap": "0b00000000000000000000011011110010"}
        ]}, {"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [
            {"register": "ebx", "bitmap": "0b0xxx"}
        ]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b100x"}]
    }"#;
    let template: CpuTemplate = serde_json::from_str(template).unwrap();
    let engine = SoftHypervisor::default().with_template(template);
    let mut machine = Machine::on(engine);
    machine.code(|asm| {
        asm.mov(eax, 1).unwrap();
        asm.mov(ecx, 5).unwrap();
        asm.cpuid().unwrap();
        asm.mov(r8d, eax).unwrap();
        asm.mov(r9d, ecx).unwrap();
        asm.mov(ecx, 0x10a).unwrap();
        asm.rdmsr().unwrap();
        asm.out(u32::from(STOP), al).unwrap();
        asm.andn(eax, eax, ecx).unwrap();
        asm.hlt().unwrap();
    });
    let state = machine.run_to_stop();
    assert_eq!(state.gpr[8], 0b0110_1111_0010);
    assert_eq!(state.gpr[9] >> 23 & 1, 0);
    assert_eq!(state.gpr[0], 0b1001);
    assert_eq!(machine.run_to_exception().vector, 6);
}
